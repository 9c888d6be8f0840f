"""gpipe.py: the schedule, the engine against one device, golden runs, the models, the command."""

import copy
import hashlib
import itertools
import json
import random
import re
import threading
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import common
import gpipe
from tests import ROOT, refused
from tests.claims.claim_gpipe import later_schedule, one_f_one_b, simulate

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

MODES = ["always", "except_last", "never"]
CPU = ["cpu"] * 16


def mlp(dtype=torch.float64, seed=0):
    """Six layers without noise: (N, 6) -> (N, 4)."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.LayerNorm(10), nn.Linear(10, 10), nn.GELU(),
                         nn.Linear(10, 4)).to(dtype)


def batch(N=12, dtype=torch.float64):
    g = torch.Generator().manual_seed(N)
    return torch.randn(N, 6, generator=g, dtype=dtype), torch.randint(4, (N,), generator=g)


def sizes_of(L, K):
    return [L // K + (k < L % K) for k in range(K)]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def piped(model, x, y, K=2, M=4, mode="except_last", sizes=None, number=0, **options):
    """(loss, output, input gradient, parameter gradients, pipeline) of one step on a copy of the model."""
    model = copy.deepcopy(model)
    pipe = gpipe.Pipeline(model, sizes or sizes_of(len(model), K), CPU, M, mode, **options)
    value, output, grad = pipe.step(x, lambda out: F.cross_entropy(out, y.to(out.device)), number)
    return value, output, grad, gradients(model), pipe


def plain(model, x, y):
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    output = model(x)
    value = F.cross_entropy(output, y)
    value.backward()
    return value.detach(), output.detach(), x.grad, gradients(model)


def apart(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- The schedule on paper -----------------------------------------------------

@pytest.mark.parametrize("K,M", itertools.product((1, 2, 3, 5), (1, 2, 4, 7)))
def test_clock_cycles(K, M):
    """G5: the set of (m, k) at every clock."""
    cycles = gpipe.clock_cycles(K, M)
    assert len(cycles) == M + K - 1
    assert Counter(entry for cycle in cycles for entry in cycle) == Counter(itertools.product(range(M), range(K)))
    assert all(m + k == t for t, cycle in enumerate(cycles) for m, k in cycle)


@pytest.mark.parametrize("mode,threads", itertools.product(MODES, (True, False)))
def test_every_stage_follows_the_schedule(mode, threads):
    K, M = 3, 5
    x, y = batch(10)
    *_, pipe = piped(mlp(), x, y, K, M, mode, threads=threads)
    for k in range(K):
        mine = [(kind, m) for kind, m, stage in pipe.minibatch.times if stage == k]
        forward, rest = mine[:M], mine[M:]
        assert forward == [("F", m) for m in range(M)]
        expected = [("L", M - 1)] if k == K - 1 else []
        for m in reversed(range(M)):
            again = mode == "always" or mode == "except_last" and m != M - 1
            expected += [("R", m)] * again + [("B", m)]
        assert rest == expected
    for m in range(M):
        for k in range(1, K):
            assert pipe.minibatch.times["F", m, k][0] >= pipe.minibatch.times["F", m, k - 1][0]
            assert pipe.minibatch.times["B", m, k - 1][1] >= pipe.minibatch.times["B", m, k][1]
            assert pipe.minibatch.times["F", m, k][1] >= pipe.minibatch.times["F", m, k - 1][1]


def test_schedule_equals_the_figure():
    """Fig. 2c, K = M = 4: the start of every box on a clock of unit times."""
    times = simulate(gpipe.schedule(4, 4, "never"), lambda kind, m, k: kind != "L")
    for m, k in itertools.product(range(4), range(4)):
        assert times["F", m, k] == (m + k, m + k + 1)
        assert times["B", m, k][0] == 7 + (3 - m) + (3 - k)


@pytest.mark.parametrize("K,M", itertools.product((1, 2, 4, 5), (1, 2, 4, 9, 32)))
def test_makespan_and_bubble(K, M):
    """G10, and the makespans that it stands for."""
    f, b, r = 3, 5, 2
    cost = {"F": f, "B": b, "R": r, "L": 0}
    def run(mode, **options):
        return simulate(gpipe.schedule(K, M, mode), lambda kind, m, k: cost[kind], **options)
    share, span = gpipe.idle(run("never"), K)
    assert span == (M + K - 1) * (f + b)
    assert share == pytest.approx((K - 1) / (M + K - 1), abs=1e-15) == gpipe.bubble(K, M)
    assert gpipe.idle(run("always"), K)[1] == (M + K - 1) * (f + b) + M * r
    assert gpipe.idle(run("except_last"), K)[1] == (M + K - 1) * (f + b) + (M - 1) * r
    uneven = [2 + k % 3 for k in range(K)]
    times = simulate(gpipe.schedule(K, M, "never"),
                           lambda kind, m, k: {"F": 1, "B": 2, "L": 0}[kind] * uneven[k])
    assert gpipe.idle(times, K)[1] == 3 * (sum(uneven) + (M - 1) * max(uneven))


def test_speed_up_of_unequal_stages():
    """G12 is the simulated makespan of one device over that of K."""
    loads, M = [3, 5, 2], 6
    times = simulate(gpipe.schedule(3, M, "never"), lambda kind, m, k: {"F": 1, "B": 2, "L": 0}[kind] * loads[k])
    assert gpipe.speed_up(loads, M) == pytest.approx(M * 3 * sum(loads) / gpipe.idle(times, 3)[1])


def test_limits_of_the_bubble():
    assert gpipe.bubble(1, 7) == 0 and gpipe.bubble(4, 1) == 3 / 4 and gpipe.bubble(4, 10**9) < 1e-8


@pytest.mark.parametrize("K,M", itertools.product((1, 2, 4, 5), (1, 2, 4, 9, 32)))
def test_early_recomputation_saves_what_the_wait_would_cost(K, M):
    cost = {"F": 3, "B": 5, "R": 2, "L": 0}
    early, late = (gpipe.idle(simulate(gpipe.schedule(K, M, "always"), lambda kind, m, k: cost[kind], early=early), K)[1]
                   for early in (True, False))
    assert late == (M + K - 1) * (3 + 5 + 2) and early == late - (K - 1) * 2


def test_the_pictures_in_the_docstrings_are_schedules():
    """Rows of unit tasks, the last stage first, as simulated: in the file's docstring and in schedule's."""
    for text, K, M, mode, loss in ((gpipe.__doc__, 2, 4, "except_last", 0), (gpipe.schedule.__doc__, 2, 2, "always", 1)):
        times = simulate(gpipe.schedule(K, M, mode), lambda kind, m, k, loss=loss: loss if kind == "L" else 1)
        for k in range(K):
            row = {start: f"{kind}{m}" for (kind, m, stage), (start, end) in times.items() if stage == k and end > start}
            words = [row.get(t, "..") for t in range(min(row), max(row) + 1)]
            assert f"    stage {k}:  {'   ' * min(row)}{' '.join(words)}  " in text


@pytest.mark.parametrize("goal", ["variance", "bottleneck"])
def test_partition(goal):
    """G2, G3: as good as the best of all cuts."""
    rng = np.random.default_rng(0)
    for L, K in itertools.product((1, 2, 5, 9, 12), (1, 2, 3, 4)):
        if K > L:
            continue
        costs = rng.integers(0, 20, L)

        def price(sizes, costs=costs):
            loads = [sum(costs[end - size:end]) for size, end in zip(sizes, np.cumsum(sizes))]
            return max(loads) if goal == "bottleneck" else np.var(loads)

        cuts = itertools.combinations(range(1, L), K - 1)
        best = min(price(np.diff([0, *cut, L])) for cut in cuts)
        sizes = gpipe.partition(costs, K, goal)
        assert len(sizes) == K and min(sizes) > 0 and sum(sizes) == L
        assert price(sizes) == pytest.approx(best)
        assert price(gpipe.partition(costs * 7.0, K, goal)) == pytest.approx(best)
        assert price(gpipe.partition(costs[::-1], K, goal)[::-1]) == pytest.approx(best)
    assert gpipe.partition([1, 2, 3, 4, 5, 6], 2, goal) == [4, 2]
    assert gpipe.partition([1] * 8, 4, goal) == [2, 2, 2, 2]


# --- The engine against one device ---------------------------------------------

@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("N", [12, 10])
def test_gradients_equal_one_device(dtype, bound, N):
    """G1, G7, G8: of stages, micro-batches and modes as of the plain model."""
    model, (x, y) = mlp(dtype), batch(N, dtype)
    value, output, _, expected = plain(model, x, y)
    for K, M in itertools.product(range(1, 7), (1, 2, 3, 4, 5, 7, 12, 40)):
        mode = MODES[(K + M) % 3]
        found, out, _, grads, pipe = piped(model, x, y, K, M, mode)
        assert abs(found - value) <= bound and (out - output).abs().max() <= bound
        assert apart(grads, expected) <= bound, (K, M, mode)
        assert pipe.minibatch.M == min(M, N)


@pytest.mark.parametrize("M", [1, 3, 4])
def test_bitwise_over_stages_modes_and_threads(M):
    model, (x, y) = mlp(torch.float32), batch(10, torch.float32)
    reference = piped(model, x, y, 1, M, "never", threads=False)
    for K, mode, threads in itertools.product((1, 2, 3, 6), MODES, (True, False)):
        found = piped(model, x, y, K, M, mode, threads=threads)
        assert torch.equal(found[0], reference[0]) and torch.equal(found[1], reference[1])
        assert same(found[3], reference[3]), (K, mode, threads)


def test_one_micro_batch_is_the_plain_model():
    model, (x, y) = mlp(torch.float32), batch(12, torch.float32)
    value, output, _, expected = plain(model, x, y)
    found, out, _, grads, _ = piped(model, x, y, 3, 1, "never")
    assert torch.equal(found, value) and torch.equal(out, output) and same(grads, expected)


@pytest.mark.parametrize("mode", MODES)
def test_input_gradient(mode):
    model, (x, y) = mlp(), batch(10)
    expected = plain(model, x, y)[2]
    assert (piped(model, x.requires_grad_(), y, 3, 4, mode)[2] - expected).abs().max() <= 1e-12
    assert piped(model, x.detach(), y, 3, 4, mode)[2] is None


def test_uneven_pieces():
    """G4, G6: pieces of 3, 3, 2 and 2 rows; the mean of their means would be wrong."""
    model, (x, y) = mlp(), batch(10)
    value, _, _, expected = plain(model, x, y)
    found, _, _, grads, _ = piped(model, x, y, 2, 4)
    assert abs(found - value) <= 1e-12 and apart(grads, expected) <= 1e-12
    pieces = list(zip(x.tensor_split(4), y.tensor_split(4)))
    assert [len(a) for a, _ in pieces] == [3, 3, 2, 2] == [len(a) for a in gpipe.scatter(x, 4)]
    wrong = torch.stack([plain(model, a, b)[0] for a, b in pieces]).mean()
    assert abs(wrong - value) > 1e-3


class Spy(gpipe.Pipeline):
    """Counts stashed inputs and live interiors of every stage after every task."""

    def worker(self, tasks, batch):
        self.seen = getattr(self, "seen", None) or []
        for task in tasks:
            before = len(self.seen)
            super().worker([task], batch)
            stash, live = ([m for m, k in kept if k == task[2]] for kept in (batch.stash, batch.interior))
            rows = sum(len(batch.stash[m, task[2]]) for m in stash)
            assert len(self.seen) == before
            self.seen.append((task, len(stash), len(live), rows))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_kept(mode):
    """G9: inputs and interiors of every stage after every task."""
    K, M, N = 3, 4, 10
    x, y = batch(N)
    model = mlp()
    pipe = Spy(model, [2, 2, 2], CPU, M, mode, threads=False)
    pipe.step(x, lambda out: F.cross_entropy(out, y))
    for k in range(K):
        mine = [entry for entry in pipe.seen if entry[0][2] == k]
        turn = [entry for entry in mine if entry[0][0] == "F"][-1]
        assert turn[1] == M and turn[3] == N
        assert turn[2] == {"always": 0, "except_last": 1, "never": M}[mode]
        backward = [entry for entry in mine if entry[0][0] in "RB"]
        if mode != "never":
            assert max(entry[2] for entry in backward) == 1
        assert [entry[1] for entry in mine if entry[0][0] == "B"] == list(reversed(range(M)))
        assert mine[-1][1:] == (0, 0, 0)


def test_memory_formula():
    """Equal layers: the peak of a stage is N + (L / K) (N / M) rows."""
    L, K, M, N, width = 8, 4, 4, 16, 32
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(L)))
    rows = gpipe.profile(model, torch.zeros(N // M, width))
    for _, peak in gpipe.footprint(rows, [L // K] * K, M, "always"):
        assert peak == (N + L // K * N // M) * width * 4


class Scale(gpipe.Channel):
    """A channel that weighs what it carries."""

    def put(self, value):
        self.bytes = getattr(self, "bytes", 0) + sum(part.nbytes for part in gpipe.as_tuple(value) if part is not None)
        super().put(value)


def weighed(model, sizes, M, mode):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpipe, "Channel", Scale)
        return gpipe.Pipeline(model, sizes, CPU, M, mode)


@pytest.mark.parametrize("M,mode", itertools.product((1, 2, 5), MODES))
def test_bytes_over_boundaries(M, mode):
    N, pipe = 10, weighed(mlp(), [1, 3, 2], M, mode)
    x, y = batch(N)
    pipe.step(x, lambda out: F.cross_entropy(out, y))
    for k in (1, 2):
        assert pipe.forward_channels[k].bytes == pipe.backward_channels[k].bytes == N * 10 * 8
    assert len(pipe.forward_channels) == len(pipe.backward_channels) == 4


def test_one_update_and_untouched_weights():
    model, (x, y) = mlp(), batch(12)
    hashes, steps = [], []

    class Watch(gpipe.Pipeline):
        def run_stage(self, *args, **options):
            data = b"".join(p.detach().numpy().tobytes() for p in self.model.parameters())
            hashes.append(hashlib.sha256(data).hexdigest())
            return super().run_stage(*args, **options)

    pipe = Watch(model, [3, 3], CPU, 4, "always")
    opt = torch.optim.SGD(model.parameters(), 0.1)
    opt.register_step_post_hook(lambda *_: steps.append(1))
    for number in range(2):
        opt.zero_grad()
        pipe.step(x, lambda out: F.cross_entropy(out, y), number)
        opt.step()
    assert len(hashes) == 2 * 2 * 2 * 4 and len(steps) == 2
    assert len(set(hashes[:16])) == 1 and len(set(hashes[16:])) == 1 and hashes[0] != hashes[16]


def test_training_does_not_depend_on_stages():
    x, y = batch(12)
    curves = []
    for K in (1, 2, 3, 4):
        model = mlp()
        pipe, opt = gpipe.Pipeline(model, sizes_of(6, K), CPU, 3), torch.optim.SGD(model.parameters(), 0.1)
        curves.append([])
        for number in range(20):
            opt.zero_grad()
            curves[-1].append(float(pipe.step(x, lambda out: F.cross_entropy(out, y), number)[0]))
            opt.step()
    assert np.abs(np.array(curves) - curves[0]).max() <= 1e-10 and curves[0][-1] < curves[0][0]


def test_names_survive():
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gpipe.Pipeline(model, [1, 4, 1], CPU, 2)
    assert same(model.state_dict(), before)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in mlp().named_parameters()]


@pytest.mark.parametrize("M", [1, 3, 20])
def test_inference(M):
    model, (x, _) = mlp(), batch(10)
    pipe = gpipe.Pipeline(model, [2, 2, 2], CPU, M, "always")
    out = pipe.infer(x.requires_grad_())
    assert not out.requires_grad and (out - model(x)).abs().max() <= 1e-12
    assert {kind for kind, _, _ in pipe.minibatch.times} == {"F"} and not pipe.minibatch.stash and not pipe.minibatch.interior
    assert len(pipe.minibatch.times) == 3 * min(M, 10)


class Trap(nn.Module):
    """Identity that fails in its n-th forward call (the first is the probe's), or in backward."""

    def __init__(self, call=None, backward=False):
        super().__init__()
        self.call, self.backward, self.calls, self.armed = call, backward, 0, True

    def forward(self, x):
        self.calls += 1
        if self.armed and self.calls == self.call:
            raise KeyError("trap")
        y = x * 1.0
        if self.backward and y.requires_grad:
            y.register_hook(self.snap)
        return y

    def snap(self, grad):
        if self.armed:
            raise KeyError("trap")


@pytest.mark.parametrize("stage,where", itertools.product(range(3), ("F", "R", "B")))
def test_exceptions(stage, where):
    M = 4
    traps = [Trap() for _ in range(3)]
    traps[stage] = Trap(backward=True) if where == "B" else Trap(3 if where == "F" else M + 2)
    model = nn.Sequential(nn.Linear(6, 4), *traps, nn.Linear(4, 4)).double()
    pipe = gpipe.Pipeline(model, [2, 1, 2], CPU, M, "always")
    x, y = batch(8)
    threads = threading.active_count()
    with pytest.raises(KeyError, match="trap"):
        pipe.step(x, lambda out: F.cross_entropy(out, y))
    assert threading.active_count() == threads and isinstance(pipe.minibatch.errors[0], KeyError)
    assert all(isinstance(error, CancelledError) for error in pipe.minibatch.errors[1:])
    if where == "F":
        assert all(trap.calls <= 2 for trap in traps[stage + 1:])
    elif where == "R":
        assert traps[stage].calls == M + 2 and ("B", M - 1, stage) not in pipe.minibatch.times
    traps[stage].armed = False
    model.zero_grad()
    pipe.step(x, lambda out: F.cross_entropy(out, y))
    assert apart(gradients(model), plain(model, x, y)[3]) <= 1e-12


def test_loss_that_fails():
    model, (x, y) = mlp(), batch(8)
    pipe = gpipe.Pipeline(model, [2, 2, 2], CPU, 4)
    with pytest.raises(ZeroDivisionError):
        pipe.step(x, lambda out: 1 / 0)
    assert pipe.step(x, lambda out: F.cross_entropy(out, y))[0] > 0


class Pair(nn.Module):
    """(floats, constant floats, ids) -> the same; uses all three."""

    def __init__(self, first=False):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen = []

    def forward(self, states):
        x, mask, ids = states
        return self.linear(x) * mask + ids[:, None], mask, ids


@pytest.mark.parametrize("mode", MODES)
def test_tuples_and_integers(mode):
    torch.manual_seed(0)
    model = nn.Sequential(Pair(), Pair(), Pair()).double()
    x, mask, ids = torch.randn(6, 4).double(), torch.rand(6, 4).double(), torch.arange(6)
    pipe = weighed(model, [1, 1, 1], 3, mode)
    value, output, grads = pipe.step((x, mask, ids), lambda out: out[0].square().mean())
    other = copy.deepcopy(model)
    other.zero_grad()
    expected = other((x, mask, ids))
    expected[0].square().mean().backward()
    assert apart(gradients(model), gradients(other)) <= 1e-12
    assert grads == (None, None, None) and torch.equal(output[2], ids) and output[2].dtype == torch.int64
    assert pipe.forward_channels[1].bytes == 6 * (4 + 4 + 1) * 8 and pipe.backward_channels[1].bytes == 6 * 4 * 8


class Twice(nn.Module):
    def forward(self, x):
        return x, x


class Sum(nn.Module):
    def forward(self, states):
        return states[0] * 2 + states[1]


@pytest.mark.parametrize("mode", MODES)
def test_one_tensor_twice_in_a_boundary(mode):
    model, (x, y) = mlp(), batch(6)
    both = nn.Sequential(*model[:3], Twice(), nn.Sequential(), Sum(), *model[3:])
    assert apart(piped(both, x, y, 4, 2, mode, sizes=[3, 1, 1, 4])[3], plain(both, x, y)[3]) <= 1e-12


def test_frozen_layers_and_grad_mode():
    model, (x, y) = mlp(), batch(6)
    model[0].requires_grad_(False)
    with torch.no_grad():
        grads = piped(model, x, y, 3, 2)[3]
    assert "0.weight" not in grads and apart(grads, plain(model, x, y)[3]) <= 1e-12


def test_gradients_accumulate_like_torch():
    model, (x, y) = mlp(), batch(6)
    pipe = gpipe.Pipeline(model, [3, 3], CPU, 2)
    for _ in range(2):
        pipe.step(x, lambda out: F.cross_entropy(out, y))
    expected = plain(model, x, y)[3]
    assert max((p.grad - 2 * expected[name]).abs().max() for name, p in model.named_parameters()) <= 1e-12


def test_autocast_reaches_the_threads():
    model, (x, y) = mlp(torch.float32), batch(6, torch.float32)
    seen = []
    model[4].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    pipe = gpipe.Pipeline(model, [2, 2, 2], CPU, 2, "always")
    with torch.autocast("cpu", torch.bfloat16):
        pipe.step(x, lambda out: F.cross_entropy(out.float(), y))
    assert set(seen) == {torch.bfloat16} and len(gradients(model)) == 8


# --- Layers that couple samples or draw ----------------------------------------

def conv_net(dtype=torch.float64, momentum=0.1, eps=1e-5):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), gpipe.BatchNorm(4, eps, momentum), nn.ReLU(),
        nn.Conv2d(4, 5, 3, 2, 1), gpipe.BatchNorm(5, eps, momentum), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(5, 4)).to(dtype)
    return model


@pytest.mark.parametrize("mode,M", itertools.product(MODES, (1, 2, 3, 4, 20)))
def test_batch_norm_counts_once(mode, M):
    """G11: one move a mini-batch, by the moments of all of it."""
    model, g = conv_net(), torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 3, 6, 6, generator=g).double() + 3, torch.randint(4, (8,), generator=g)
    first = model[0](x)
    pipe = gpipe.Pipeline(model, [3, 6], CPU, M, mode)
    if M == 20:
        model[0].weight.data[:] = 0.0
        first = model[0](x)
    pipe.step(x, lambda out: F.cross_entropy(out, y))
    norm = model[1]
    assert norm.num_batches_tracked == 1 == model[4].num_batches_tracked
    assert (norm.running_mean - 0.1 * first.mean((0, 2, 3))).abs().max() <= 1e-12
    biased = first.var((0, 2, 3), correction=0)
    assert (norm.running_var - (0.9 + 0.1 * biased)).abs().max() <= 1e-12
    out = pipe.infer(x)
    assert norm.num_batches_tracked == 1
    assert (out - model.eval()(x)).abs().max() <= 1e-12
    assert (gpipe.Pipeline(model, [4, 5], CPU, 5).infer(x) - out).abs().max() <= 1e-12


def test_batch_norm_without_momentum_averages_over_all_mini_batches():
    """As torch's own, but for the variance, which is biased here."""
    ours, torchs = gpipe.BatchNorm(3, momentum=None).double(), nn.BatchNorm2d(3, momentum=None).double()
    for number in range(3):
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(number)).double()
        gpipe.Pipeline(nn.Sequential(ours), [1], CPU, 2, "always").step(x, torch.sum)
        torchs(x)
    assert (ours.running_mean - torchs.running_mean).abs().max() <= 1e-12
    assert (ours.running_var - torchs.running_var * 99 / 100).abs().max() <= 1e-12
    assert ours.num_batches_tracked == torchs.num_batches_tracked == 3


def test_batch_norms_of_different_momenta_and_counts_move_together():
    """One at rest, one without momentum, one that sees every micro-batch twice; a step at a time, as each alone would."""
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = gpipe.BatchNorm(2, momentum=0.5).double()

        def forward(self, x):
            return self.norm(self.norm(x) * 2)

    model = nn.Sequential(gpipe.BatchNorm(2, momentum=0.0).double(), gpipe.BatchNorm(2, momentum=None).double(), Again())
    x = torch.randn(6, 2, 3, 3, dtype=torch.float64) * 3 + 1
    pipe = gpipe.Pipeline(model, [3], CPU, 2, "always")
    pipe.step(x, torch.sum)
    assert torch.equal(model[0].running_mean, torch.zeros(2)) and torch.equal(model[0].running_var, torch.ones(2))
    first = torch.cat([F.batch_norm(piece, None, None, training=True) for piece in x.chunk(2)])
    assert (model[1].running_mean - first.mean((0, 2, 3))).abs().max() <= 1e-12
    assert (model[1].running_var - first.var((0, 2, 3), correction=0)).abs().max() <= 1e-12
    seen = []
    model[2].norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    before = model[2].norm.running_mean.clone()
    pipe.mode = "never"
    pipe.step(x + 1, torch.sum)
    expected = 0.5 * before + 0.5 * torch.cat(seen).mean((0, 2, 3))
    assert len(seen) == 4 and (model[2].norm.running_mean - expected).abs().max() <= 1e-12
    assert [int(norm.num_batches_tracked) for norm in (model[0], model[1], model[2].norm)] == [2, 2, 2]


def test_batch_norm_that_tracks_nothing_or_never_runs():
    bare, idle = gpipe.BatchNorm(3, track_running_stats=False), gpipe.BatchNorm(3)
    layer = Returns(lambda x: x)
    layer.idle = idle
    x = torch.randn(4, 3, 5, 5)
    out = gpipe.Pipeline(nn.Sequential(bare, layer), [1, 1], CPU, 2, "always").step(x, torch.sum)[1]
    assert torch.equal(out, torch.cat([F.batch_norm(piece, None, None, training=True) for piece in x.chunk(2)]))
    assert idle.num_batches_tracked == 0


def test_batch_norm_normalises_pieces():
    x = torch.randn(8, 3, 5, 5, dtype=torch.float64)
    norm = gpipe.BatchNorm(3).double()
    model = nn.Sequential(norm, nn.Identity())
    for M in (1, 2, 4):
        out = gpipe.Pipeline(model, [1, 1], CPU, M).step(x, lambda out: out.sum())[1]
        pieces = [F.batch_norm(piece, None, None, norm.weight, norm.bias, True, 0.1, norm.eps) for piece in x.tensor_split(M)]
        assert torch.equal(out, torch.cat(pieces))


class Drop(nn.Module):
    """Dropout alone, so that a test can compare zeros."""

    def forward(self, x):
        return gpipe.stage_dropout(x, 0.5, self.training)


def test_dropout():
    x = torch.rand(8, 50, dtype=torch.float64).requires_grad_()
    outcomes = []
    for mode, K, threads in itertools.product(MODES, (1, 2), (True, False)):
        model = nn.Sequential(Drop(), Drop())
        torch.manual_seed(3)
        pipe = gpipe.Pipeline(model, sizes_of(2, K), CPU, 4, mode, seed=5, threads=threads)
        state = torch.get_rng_state()
        _, out, grad = pipe.step(x, lambda out: out.sum(), 7)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(out == 0, grad == 0) and 0.6 < (out == 0).double().mean() < 0.9
        outcomes.append((out, grad))
    assert all(torch.equal(a, outcomes[0][0]) and torch.equal(b, outcomes[0][1]) for a, b in outcomes)
    different = gpipe.Pipeline(model, [1, 1], CPU, 4, seed=5).step(x, lambda out: out.sum(), 8)[1]
    other_layer = outcomes[0][0][:2] == 0, outcomes[0][0][2:4] == 0
    assert not torch.equal(different, outcomes[0][0]) and not torch.equal(*other_layer)


# --- Golden runs ---------------------------------------------------------------

def golden(name):
    """Arrays of tests/golden: torchgpipe 0.0.7 (a1b4ee2) run unmodified on the CPU, as in ../shared/goldens/gpipe."""
    with np.load(ROOT / "tests" / "golden" / f"gpipe_{name}.npz") as stored:
        return {key: torch.from_numpy(np.array(stored[key])) for key in stored.files}


def entries(stored, prefix):
    return {key[len(prefix):]: value for key, value in stored.items() if key.startswith(prefix)}


def test_golden_transparency():
    stored, model = golden("transparency"), mlp()
    model.load_state_dict(entries(stored, "w/"))
    x, y = stored["x"].requires_grad_(), stored["target"]
    for sizes, M, mode in itertools.product(([6], [1, 5], [2, 2, 2], [3, 1, 1, 1], [1] * 6), (1, 4, 5, 12), MODES):
        value, output, grad, grads, _ = piped(model, x, y, M=M, mode=mode, sizes=sizes)
        assert abs(value - stored["loss"]) <= 1e-12 and (output - stored["logits"]).abs().max() <= 1e-12
        assert (grad - stored["grad_x"]).abs().max() <= 1e-12 and apart(grads, entries(stored, "grad/")) <= 1e-12
    value, _, _, grads, _ = piped(model, x.detach()[:10], y[:10], 3, 4)
    assert abs(value - stored["n10_loss"]) <= 1e-12 and apart(grads, entries(stored, "n10_grad/")) <= 1e-12
    assert abs(value - stored["n10_WRONG_unweighted_loss"]) > 1e-3


@pytest.mark.parametrize("name,make", [
    ("sgdm", lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)), ("adam", lambda p: torch.optim.Adam(p, 0.01)),
    ("rmsprop", lambda p: torch.optim.RMSprop(p, 0.01, alpha=0.9, eps=1e-3))])
def test_golden_trajectories(name, make):
    stored, model = golden("transparency"), mlp()
    model.load_state_dict(entries(stored, "w/"))
    pipe, opt = gpipe.Pipeline(model, [2, 2, 2], CPU, 4), make(model.parameters())
    for number, expected in enumerate(stored[f"traj_{name}_losses"]):
        opt.zero_grad()
        value = pipe.step(stored["x"], lambda out: F.cross_entropy(out, stored["target"]), number)[0]
        assert abs(value - expected) <= 1e-12
        opt.step()
    assert apart(dict(model.named_parameters()), entries(stored, f"traj_{name}/")) <= 1e-12


@pytest.mark.parametrize("M,mode", itertools.product((1, 2, 4), MODES))
def test_golden_batch_norm(M, mode):
    stored, model = golden("batchnorm_pipeline"), conv_net()
    model.load_state_dict(entries(stored, "w/"))
    pipe = gpipe.Pipeline(model, [3, 6], CPU, M, mode)
    value, logits, _ = pipe.step(stored["x"], lambda out: F.cross_entropy(out, stored["target"]))
    once = entries(stored, f"M{M}_defer1_always/")
    assert abs(value - once["loss"]) <= 1e-10 and (logits - once["logits"]).abs().max() <= 1e-10
    assert apart(gradients(model), entries(once, "grad/")) <= 1e-10
    state = model.state_dict()
    for key in [key for key in once if "running" in key or "tracked" in key]:
        assert (state[key] - stored[f"M{M}_defer1_{mode}/{key}"]).abs().max() <= 1e-10
    expected = stored[f"M{M}_defer1_{mode}/eval_logits"]
    assert (pipe.infer(stored["x_eval"]) - expected).abs().max() <= 1e-10


def test_golden_batch_norm_training():
    stored, model = golden("batchnorm_pipeline"), conv_net()
    model.load_state_dict(entries(stored, "w/"))
    pipe, opt = gpipe.Pipeline(model, [3, 6], CPU, 4), torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for number, expected in enumerate(stored["train3/losses"]):
        opt.zero_grad()
        value = pipe.step(stored["x"], lambda out: F.cross_entropy(out, stored["target"]), number)[0]
        assert abs(value - expected) <= 1e-10
        opt.step()
    final, state = entries(stored, "train3/final/"), model.state_dict()
    assert len(final) >= 8 and max((state[key] - final[key]).abs().max() for key in final) <= 1e-10


# --- The models ----------------------------------------------------------------

def count(model, matrices=False):
    return sum(p.numel() for p in model.parameters() if not matrices or p.ndim == 2)


@pytest.mark.parametrize("L,D,expected", [
    (18, 208, 81_505_540), (18, 416, 319_024_120), (18, 544, 542_734_840), (36, 544, 1_055_832_376),
    (72, 512, 1_844_858_344), (18, 256, 122_470_120), (18, 128, 31_694_440), (18, 512, 481_268_200)])
def test_counts_of_amoebanet_d(L, D, expected):
    with torch.device("meta"):
        model = gpipe.amoebanet("d", L, D, 1000)
    assert count(model) == expected and len(model) == L + 6


@pytest.mark.parametrize("L,D,millions", [
    (18, 208, 81.1), (18, 416, 317.6), (18, 544, 540.2), (36, 544, 1053.3), (72, 512, 1842.6), (18, 256, 121.9),
    (18, 128, 31.6), (18, 512, 479.0)])
def test_counts_of_amoebanet_d_with_the_tpu_stem(L, D, millions):
    with torch.device("meta"):
        assert abs(count(gpipe.amoebanet("d", L, D, 1000, "tpu")) / 1e6 - millions) <= 0.06


def test_counts_of_the_557_million_model():
    with torch.device("meta"):
        assert count(gpipe.amoebanet("b", 18, 512, 1000, "tpu")) == 557_277_864


@pytest.mark.parametrize("L,H,A,millions", [(6, 8192, 16, 407.9), (24, 8192, 16, 1238), (12, 16384, 32, 1238),
                                            (32, 16384, 32, 3084), (64, 16384, 32, 6037)])
def test_counts_of_translation_transformers(L, H, A, millions):
    with torch.device("meta"):
        model = gpipe.transformer(L, H, A, 64000)
    assert count(model, True) == L * (4 * 1024 * 64 * A + 2 * 1024 * H) + L * (
        8 * 1024 * 64 * A + 2 * 1024 * H) + 2 * 64000 * 1024
    assert abs(count(model, True) / 1e6 - millions) <= 0.5 and len(model) == 2 * L + 2


@pytest.mark.parametrize("L,gib", [(3, 3.15), (13, 8.8), (103, 59.5), (415, 235.1), (1663, 937.9)])
def test_counts_of_table_1(L, gib):
    def built(L):
        with torch.device("meta"):
            return count(gpipe.transformer(L, 8192, 32, 32000, 2048, decoder=False))

    parameters = built(L) if L < 200 else built(1) + (L - 1) * (built(2) - built(1))
    assert parameters == L * (4 * 2048**2 + 2 * 2048 * 8192 + 26_624) + 2 * 32000 * 2048 + 32000
    assert abs(12 * parameters / 2**30 / gib - 1) <= 0.005


def test_1f1b():
    """Same makespan and gradients as GPipe, min(M, K - s) live micro-batches on stage s."""
    numbers = later_schedule("quick")["numbers"]
    assert numbers["spans"][0] == numbers["spans"][1] and numbers["apart"] <= 1e-12
    assert numbers["live"]["1F1B"] == [4, 3, 2, 1] and numbers["live"]["GPipe"] == [8] * 4
    assert sorted(one_f_one_b(3, 5)) == sorted(task for task in gpipe.schedule(3, 5, "never") if task[0] != "L")


def forward_by_hand(model, source, target):
    """A translation Transformer of one head in plain matrix algebra, from the paper."""
    def norm(x, weight, bias):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt() * weight + bias

    def attention(w, x, memory, allowed):
        q, k, v = (F.linear(y, w[f"{n}.weight"], w[f"{n}.bias"]) for n, y in
                   (("query", x), ("key", memory), ("value", memory)))
        scores = (q @ k.transpose(1, 2) / 8).masked_fill(~allowed, -torch.inf)
        return F.linear(scores.softmax(-1) @ v, w["out.weight"], w["out.bias"])

    def part(i, prefix):
        return {k[len(f"{i}.{prefix}."):]: v for k, v in state.items() if k.startswith(f"{i}.{prefix}.")}

    state, L = model.state_dict(), (len(model) - 2) // 2
    D = state["0.table.weight"].shape[1]

    def embed(ids):
        angle = torch.arange(ids.shape[1])[:, None] / 10000 ** (torch.arange(0, D, 2) / D)
        return state["0.table.weight"][ids] * D ** 0.5 + torch.cat([angle.sin(), angle.cos()], 1)

    x, y, seen = embed(source), embed(target), (source != 0)[:, None]
    future = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).tril()
    one = torch.ones(D), torch.zeros(D)
    for i in range(1, 2 * L + 1):
        norms = [(state[f"{i}.{name}_norm.weight"], state[f"{i}.{name}_norm.bias"])
                 for name in ("attention", "mlp", "cross")[:2 + (i > L)]]
        z = x if i <= L else y
        inner = norm(z, *norms[0])
        z = z + attention(part(i, "attention"), inner, inner, seen if i <= L else future)
        if i > L:
            z = z + attention(part(i, "cross"), norm(z, *norms[2]), norm(x, *one), seen)
        wide = F.relu(F.linear(norm(z, *norms[1]), state[f"{i}.wide.weight"], state[f"{i}.wide.bias"]))
        z = z + F.linear(wide, state[f"{i}.narrow.weight"], state[f"{i}.narrow.bias"])
        x, y = (z, y) if i <= L else (x, z)
    return norm(y, *one) @ state[f"{2 * L + 1}.project.weight"].T


def test_transformer_by_hand_and_through_the_pipeline():
    """G15 clips in training alone."""
    torch.manual_seed(0)
    model = gpipe.transformer(2, 24, 1, 30, 16, clip=2.0).double()
    source, target = torch.randint(1, 30, (5, 7)), torch.randint(1, 30, (5, 6))
    source[1, 4:], source[3, 2:] = 0, 0
    expected = forward_by_hand(model, source, target)
    # positions are computed in float32: 1e-7
    assert (gpipe.Pipeline(model, [2, 2, 2], CPU, 3).infer((source, target)) - expected).abs().max() <= 1e-6
    out = gpipe.Pipeline(model, [2, 2, 2], CPU, 3).step((source, target), torch.sum)[1]
    assert torch.equal(out, model((source, target))) and (out - expected.clamp(-2, 2)).abs().max() <= 1e-6
    assert (expected.abs() > 2).any() and out.abs().max() == 2


def test_transformer_gradients_and_dropout():
    torch.manual_seed(0)
    model = gpipe.transformer(2, 24, 1, 30, 16, dropout=0.2).double()
    ids = torch.randint(1, 30, (6, 5))
    batches = []
    for K, mode in itertools.product((1, 3), MODES):
        copied = copy.deepcopy(model)
        gpipe.Pipeline(copied, sizes_of(6, K), CPU, 4, mode, seed=1).step((ids, ids), lambda y: y.square().mean(), 3)
        batches.append(gradients(copied))
    assert all(same(other, batches[0]) for other in batches)
    without = gpipe.transformer(2, 24, 1, 30, 16).double()
    without.load_state_dict(model.state_dict())
    pipe = gpipe.Pipeline(without, [2, 2, 2], CPU, 4, "always")
    pipe.step((ids, ids), lambda y: gpipe.loss(y, ids, 30))
    found = gradients(without)
    without.zero_grad()
    gpipe.loss(without((ids, ids)), ids, 30).backward()
    assert apart(found, gradients(without)) <= 1e-12 and apart(found, batches[0]) > 1e-6


def test_initialisation():
    """G14."""
    torch.manual_seed(0)
    scaled, plain_ = (gpipe.transformer(2, 512, 4, 500, 256, scaled=flag) for flag in (True, False))
    for name, p in scaled.named_parameters():
        if p.ndim == 2:
            deep = 4 if "narrow" in name else 1
            assert p.std().item() == pytest.approx(p.shape[1] ** -0.5 / deep, rel=0.05), name
        else:
            assert set(p.unique().tolist()) <= ({1.0} if "norm" in name and "weight" in name else {0.0})
    assert plain_[1].narrow.weight.std().item() == pytest.approx(512 ** -0.5, rel=0.05)


@pytest.mark.parametrize("kind,stem", [("d", "small"), ("d", "wide"), ("b", "tpu")])
def test_amoebanet_through_the_pipeline(kind, stem):
    torch.manual_seed(0)
    model = gpipe.amoebanet(kind, 3, 16, 5, stem).double()
    x, y = torch.randn(4, 3, 33, 33).double(), torch.randint(5, (4,))
    outcomes = []
    for K, mode in ((1, "never"), (3, "always"), (len(model), "except_last")):
        copied = copy.deepcopy(model)
        pipe = gpipe.Pipeline(copied, sizes_of(len(model), K), CPU, 2, mode)
        pipe.step(x, lambda out: gpipe.loss(out, y, 4))
        outcomes.append({**gradients(copied), **dict(copied.named_buffers())})
    assert all(same(outcome, outcomes[0]) for outcome in outcomes[1:])
    assert outcomes[0]["1.current.2.num_batches_tracked"] == 1


def test_amoebanet_cell_by_hand():
    """h2..h6 of a D normal cell, spelled out."""
    torch.manual_seed(0)
    cell = gpipe.Cell("d normal", 12, 8, 8).eval()
    s1, s2 = torch.randn(2, 12, 6, 6), torch.randn(2, 8, 6, 6)
    h0, h1 = cell.current(s1), s2
    op = cell.operations
    h2 = op[0](h1) + F.max_pool2d(h1, 3, 1, 1)
    h3 = h1 + op[3](h0)
    h4 = op[4](h0) + op[5](h0)
    h5 = F.max_pool2d(h2, 3, 1, 1) + h2
    h6 = F.avg_pool2d(h1, 3, 1, 1, count_include_pad=False) + op[9](h5)
    out, current = cell((s1, s2))
    assert torch.equal(out, torch.cat([h0, h3, h4, h6], 1)) and current is s1
    kinds = [[m.kernel_size for m in op[i].modules() if isinstance(m, nn.Conv2d)] for i in (0, 3, 9)]
    assert kinds == [[(1, 1)], [(1, 1), (1, 7), (7, 1), (1, 1)], [(1, 1)]]


def test_factorized_reduce_reads_every_second_pixel():
    reduce = gpipe.FactorizedReduce(2, 4)
    x = torch.randn(1, 2, 5, 5)
    reduce.norm = nn.Identity()
    out, y = reduce(x), F.pad(x.relu(), (0, 1, 0, 1))
    assert torch.allclose(out[:, :2], F.conv2d(x.relu()[:, :, ::2, ::2], reduce.even.weight), atol=1e-6)
    assert torch.allclose(out[:, 2:], F.conv2d(y[:, :, 1::2, 1::2], reduce.odd.weight), atol=1e-6)


# --- The objective, the plan and the picture -----------------------------------

def test_loss_counts_targets():
    logits, target = torch.randn(3, 4, 5).double(), torch.randint(5, (3, 4))
    target[0, 2:] = -100
    valid = target.flatten() != -100
    logp = logits.log_softmax(-1).flatten(0, 1)[valid]
    nll = -logp.gather(1, target.flatten()[valid, None]).squeeze(1)
    expected = (0.9 * nll - 0.1 * logp.mean(1)).mean()
    assert abs(gpipe.loss(logits, target, int(valid.sum())) - expected) <= 1e-12
    assert gpipe.loss(logits.bfloat16(), target, 3.0).dtype == torch.float32


def test_profile_agrees_with_real_bytes():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.GELU()), nn.Sequential(nn.Linear(16, 8), nn.Tanh()))
    rows = gpipe.profile(model, torch.zeros(4, 8))
    assert [row["flops"] for row in rows] == [2 * 4 * 8 * 16] * 2 and [row["params"] for row in rows] == [144, 136]
    # kept: each layer's input and its activation
    assert [(row["input"], row["kept"]) for row in rows] == [(4 * 8 * 4, 4 * 24 * 4), (4 * 16 * 4, 4 * 24 * 4)]
    assert next(model.parameters()).device.type == "cpu"


def test_timeline_is_svg_of_all_tasks(tmp_path):
    x, y = batch(8)
    *_, pipe = piped(mlp(), x, y, 3, 4, "always")
    share = gpipe.draw_timeline(tmp_path / "t.svg", pipe.minibatch, 3)
    text = (tmp_path / "t.svg").read_text()
    assert text.count('height="24"') == 3 + 3 * 4 * 3 + 1 and f"idle {share:.1%}" in text and "20.0%" not in text
    assert f"{gpipe.bubble(3, 4):.1%}" in text and 0 <= share < 1


def config(**changes):
    return gpipe.Config(**changes)


def test_temperature_sampling():
    """G13: A direction is drawn in proportion to size^(1 / T)."""
    dataset = gpipe.data.translation_pairs("train", languages=("en", "sw", "mi"), limit=1000)
    sizes = np.bincount(dataset.direction).astype(float)
    expected = sizes ** (1 / 2.5) / (sizes ** (1 / 2.5)).sum()
    cfg, found = config(batch=512, temperature=2.5), np.zeros(len(sizes))
    weights = gpipe.pair_weights(dataset, cfg)
    rows = {row.tobytes(): d for row, d in zip(np.concatenate([dataset.source, dataset.target], 1), dataset.direction)}
    for step in range(40):
        (source, ids), target, total = gpipe.draw(dataset, weights, cfg, step)
        assert total == (target != -100).sum() and torch.equal(target[:, :-1].clamp(min=0), ids[:, 1:])
        full = np.concatenate([source, ids, np.where(target[:, -1:] < 0, 0, target[:, -1:])], 1)
        np.add.at(found, [rows[row.tobytes()] for row in full], 1)
    assert np.abs(found / found.sum() - expected).max() < 0.012


def test_learning_rate():
    cfg = config(lr=1.0, warmup=10, steps=1000)
    assert gpipe.learning_rate(cfg, 4) == 0.5 and gpipe.learning_rate(cfg, 9) == 1.0
    assert gpipe.learning_rate(cfg, 39) == pytest.approx(0.5)
    assert gpipe.learning_rate(config(lr=1.0, decay=100, steps=1000), 200) == pytest.approx(0.97 ** 2)
    assert gpipe.learning_rate(config(lr=1.0, cooldown=0.5, steps=100), 75) == pytest.approx(0.02 + 0.98 * 0.5)


# --- Training by value ----------------------------------------------------------

@pytest.fixture
def float64(tmp_path, monkeypatch):
    """Weights, draws and pixels in float64, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    pixels = gpipe.data.Data.pixels
    monkeypatch.setattr(gpipe.data.Data, "pixels", lambda *args: pixels(*args).double())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def in_pieces(model, inputs, step, monkeypatch):
    """The model's output in training, layer by layer and in micro-batches of 3, 3 and 2 of 8 samples; dropped out here."""
    def drop(x, p, training):
        assert training
        return x * torch.empty_like(x).bernoulli_(1 - p, generator=generator) / (1 - p)

    outputs = []
    with monkeypatch.context() as patch:
        patch.setattr(gpipe, "stage_dropout", drop)
        for m, rows in enumerate((slice(0, 3), slice(3, 6), slice(6, 8))):
            x = tuple(part[rows] for part in inputs) if isinstance(inputs, tuple) else inputs[rows]
            for i, layer in enumerate(model):
                generator = common.make_generator(0, step, f"layer {i} micro-batch {m}")
                x = layer(x)
            outputs.append(x)
    return torch.cat(outputs)


def smoothed(logits, target):
    """Cross-entropy of one-hot targets, a tenth of which is spread evenly over all V."""
    wanted = 0.9 * F.one_hot(target, logits.shape[-1]) + 0.1 / logits.shape[-1]
    return -(wanted * logits.log_softmax(-1)).sum(-1)


def trained(words):
    """(fresh model, its data, saved checkpoint, losses in the log) of a run of 8 steps."""
    words = ["--steps", "8", "--batch", "8", "--micro", "3", "--log", "1", "--stages", "2", "--cooldown", "0.5", *words.split()]
    cfg = common.cli(gpipe.Config, gpipe.PRESETS, gpipe.__doc__, words)
    pairs = gpipe.open_split(cfg, "train")
    torch.manual_seed(common.make_generator(0, 0, "weights").initial_seed())
    model = gpipe.build(cfg, gpipe.count_classes(cfg, pairs))
    command(words)
    lines = [json.loads(line) for line in Path("runs/gpipe/demo/log.jsonl").read_text().splitlines()]
    return model, pairs, common.read_checkpoint("runs/gpipe/demo/last.pt", "gpipe"), [line["loss"] for line in lines]


def test_translation_trains_by_value(float64, monkeypatch, capsys):
    """8 steps: drawn by G13, dropped out, clipped (G15), smoothed, averaged over tokens, Adam; up, down, down to 2 %."""
    model, pairs, saved, logged = trained("--data numbers:30 --layers 1 --width 16 --hidden 24 --heads 1 --dropout 0.2 "
                                          "--clip 1 --warmup 3 --lr 0.01")
    opt = torch.optim.Adam(model.parameters(), betas=(0.9, 0.997), eps=1e-9)
    n, losses, clipped = Counter(pairs.direction.tolist()), [], 0
    chance = torch.tensor([n[d] ** (1 / 1.43) / n[d] for d in pairs.direction.tolist()])
    for step in range(8):
        rows = torch.multinomial(chance, 8, True, generator=common.make_generator(0, step, "data"))
        source, ids = torch.tensor(pairs.source)[rows], torch.tensor(pairs.target)[rows]
        logits = in_pieces(model, (source, ids[:, :-1]), step, monkeypatch)
        losses.append(smoothed(logits, ids[:, 1:])[ids[:, 1:] != 0].mean())
        clipped += (logits.abs() == 1).sum()
        opt.param_groups[0]["lr"] = 0.01 * min((step + 1) / 3, ((step + 1) / 3) ** -0.5, 0.02 + 0.98 * (8 - step) / 4)
        opt.zero_grad()
        losses[-1].backward()
        opt.step()
    assert logged == pytest.approx([value.item() for value in losses], abs=1e-9) and clipped > 100
    assert saved["step"] == 8 and apart(saved["state"]["model"], {name: p.detach() for name, p in model.named_parameters()}) <= 1e-9
    moments = [(slot["exp_avg"], opt.state[p]["exp_avg"]) for slot, p in zip(saved["state"]["opt"]["state"].values(), model.parameters())]
    assert max((a - b).abs().max() for a, b in moments) <= 1e-9
    answers_by_value(model, capsys.readouterr().out)


def answers_by_value(model, printed):
    """predictions.txt: of every test sentence the likeliest word after word, up to <end> or as many as the longest has."""
    test, model = gpipe.data.translation_pairs("test", tests=10, limit=30), model.eval()
    found = torch.ones(len(test), 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(test.target.shape[1]):
            found = torch.cat([found, model((torch.tensor(test.source), found))[:, -1:].argmax(-1)], 1)
    text, right = [], {}
    for ids, wanted, d in zip(found, test.target, test.direction):
        said, wanted = test.vocabulary.decode(ids), test.vocabulary.decode(wanted)
        text.append(f"to {test.directions[d][1]}: {said}" + (f" (wrong: {wanted})" if said != wanted else ""))
        for group in ("all", f"to {test.directions[d][1]}"):
            right.setdefault(group, []).append(said == wanted)
    assert Path("runs/gpipe/demo/predictions.txt").read_text() == "\n".join(text)
    assert ", ".join(f"{group} {np.mean(hits):.3f}" for group, hits in sorted(right.items())) in printed


def test_images_train_by_value(float64, monkeypatch):
    """8 steps: mirrored, dropped out, smoothed, RMSProp with decay of weights; the rate falls by 3 % in 2 steps, then to 2 %.

    Running averages (G11) from what entered every BatchNorm.
    """
    monkeypatch.setattr(gpipe, "answer", lambda *_: 0.0)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    np.savez("d.npz", images=pixels, labels=np.arange(40) % 4, class_names=list("abcd"))
    model, images, saved, logged = trained("--model amoebanet-d --data npz:d.npz --size 8 --layers 3 --width 4 --dropout 0.5 "
                                           "--warmup 0 --decay 2 --lr 0.02 --bn_momentum 0.3 --checkpoint always")
    opt, losses, seen, mirrored = torch.optim.RMSprop(model.parameters(), alpha=0.9, eps=0.1, weight_decay=4e-5), [], {}, 0
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    averages = {name: torch.stack([torch.zeros(norm.num_features), torch.ones(norm.num_features)]) for name, norm in norms.items()}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach()))
    for step in range(8):
        g = common.make_generator(0, step, "data")
        rows, flip = torch.randint(len(images), (8,), generator=g), torch.rand(8, generator=g) < 0.5
        x = (torch.tensor(images.images[rows.numpy()]).float() / 127.5 - 1).double()
        x[flip] = x[flip].flip(-1)
        mirrored += int(flip.sum())
        losses.append(smoothed(in_pieces(model, x, step, monkeypatch), torch.tensor(images.labels)[rows]).mean())
        opt.param_groups[0]["lr"] = 0.02 * min(0.97 ** (step / 2), 0.02 + 0.98 * (8 - step) / 4)
        opt.zero_grad()
        losses[-1].backward()
        opt.step()
        for name, pieces in seen.items():
            x = torch.cat(pieces)
            now = torch.stack([x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)])
            averages[name] = 0.7 * averages[name] + 0.3 * now
        seen.clear()
    assert logged == pytest.approx([value.item() for value in losses], abs=1e-9) and 16 < mirrored < 48
    assert max((p - saved["state"]["model"][name]).abs().max() for name, p in model.named_parameters()) <= 1e-9
    for name, (mean, var) in averages.items():
        assert (saved["state"]["model"][f"{name}.running_mean"] - mean).abs().max() <= 1e-9, name
        assert (saved["state"]["model"][f"{name}.running_var"] - var).abs().max() <= 1e-9, name
    assert saved["classes"] == [str(name) for name in images.classes]


def as_replica(rank, monkeypatch, sums=None):
    """This process as one of two replicas. sums: what the other one has sent; without it, a list of what this one sends."""
    sent, sums = [], iter(sums) if sums else None
    monkeypatch.setattr(common, "rank", lambda: rank)
    monkeypatch.setattr(common, "world", lambda: 2)
    monkeypatch.setattr(common, "average", lambda x: sent.append(x.clone()) or ((x + next(sums)) / 2 if sums else x))
    return sent


def test_replicas_are_halves_of_one_mini_batch(float64, monkeypatch):
    """Each has dropout of its own, that of its micro-batches in one process; running averages are of both (G11).

    Each draws its share of the samples of one process, and its loss counts the tokens of both.
    """
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Drop(), gpipe.BatchNorm(4), Drop())
    x = torch.randn(8, 3, 2, 2)
    whole = copy.deepcopy(model)
    expected = gpipe.Pipeline(whole, [2, 2], CPU, 4, "always").step(x, torch.sum, 3)[1]
    cfg = config(data="numbers:30", batch=8)
    pairs = gpipe.open_split(cfg, "train")
    weights = gpipe.pair_weights(pairs, cfg)
    samples = gpipe.draw(pairs, weights, cfg, 5)
    outputs, halves, sent = [], [], None
    for rank in (1, 0):
        with monkeypatch.context() as patch:
            sent = as_replica(rank, patch, sent)
            copied = copy.deepcopy(model)
            outputs.insert(0, gpipe.Pipeline(copied, [2, 2], CPU, 2, "always").step(x[4 * rank:][:4], torch.sum, 3)[1])
            halves.insert(0, gpipe.draw(pairs, weights, cfg, 5))
    assert torch.equal(torch.cat(outputs), expected) and not torch.equal(outputs[0] == 0, outputs[1] == 0)
    assert apart(dict(copied.named_buffers()), dict(whole.named_buffers())) <= 1e-12
    assert torch.equal(torch.cat([half.target for half in halves]), samples.target)
    for i in (0, 1):
        assert torch.equal(torch.cat([half.inputs[i] for half in halves]), samples.inputs[i])
    assert halves[0].total == halves[1].total == samples.total / 2 == (samples.target != -100).sum() / 2


def test_dropout_by_value():
    """Ones become 0 or 1 / (1 - p); masks differ by seed, step, layer and micro-batch; evaluation drops nothing."""
    class Rare(Drop):
        def forward(self, x):
            return gpipe.stage_dropout(x, 0.2, self.training)

    masks = []
    for seed, step in ((0, 0), (0, 1), (1, 0)):
        pipe = gpipe.Pipeline(nn.Sequential(Rare(), Returns(lambda x: x)), [1, 1], CPU, 2, "always", seed)
        out = pipe.step(torch.ones(8, 500, dtype=torch.float64), torch.sum, step)[1]
        assert set(out.unique().tolist()) == {0.0, 1 / 0.8} and 0.78 < (out > 0).double().mean() < 0.82
        masks += [out[:4] > 0, out[4:] > 0]
        assert torch.equal(pipe.infer(out), out)
    pipe = gpipe.Pipeline(nn.Sequential(Rare(), Rare()), [2], CPU, 1)
    twice = pipe.step(torch.ones(4, 500), torch.sum)[1]
    assert (twice > 1.5).double().mean() == pytest.approx(0.64, abs=0.05)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


# --- Bad input -----------------------------------------------------------------

def shared_parameter():
    model = mlp()
    model[3].weight = model[5].weight = nn.Parameter(torch.zeros(10, 10))
    return model


class InPlace(nn.Module):
    def forward(self, x):
        return x.add_(1)


class Returns(nn.Module):
    """A layer that returns something else than tensors."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("mode,function,word", [
    ("always", lambda x: None, "NoneType"), ("never", lambda x: None, "NoneType"), ("always", lambda x: 3, "int"),
    ("never", lambda x: [x, x], "list"), ("never", lambda x: (x, None), "Tensor, NoneType"),
    ("except_last", lambda x: x.sum(), "Tensor"), ("never", lambda x: (), "")])
def test_what_crosses_a_boundary_is_tensors(mode, function, word):
    """One line names stage and layer, whichever stage it is and whether it learns or predicts."""
    message = f"returns ({word}): a tensor or a tuple of tensors, batch first"
    for sizes, place in (([2, 1], "stage 0, layer 1"), ([1, 2], "stage 1, layer 2")):
        layers = [nn.Linear(6, 6), nn.Identity(), nn.Identity()]
        layers[int(place[-1])] = Returns(function)
        for work in (lambda pipe: pipe.step(torch.zeros(4, 6), torch.sum), lambda pipe: pipe.infer(torch.zeros(4, 6))):
            with pytest.raises(common.UserError, match=re.escape(f"{place} (Returns) {message}")):
                work(gpipe.Pipeline(nn.Sequential(*layers), sizes, CPU, 2, mode))


@pytest.mark.parametrize("inputs", [None, 3, [torch.zeros(4, 6)], (), (torch.zeros(4, 6), None)])
def test_a_mini_batch_is_tensors(inputs):
    with pytest.raises(common.UserError, match="the mini-batch is .*: a tensor or a tuple of tensors"):
        gpipe.Pipeline(mlp(), [3, 3], CPU, 2).infer(inputs)


class Counting(nn.Module):
    """A layer whose buffer is another tensor after every call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + self.training
        return x


@pytest.mark.parametrize("layer,message", [
    (nn.Dropout(0.5), "stage 1, layer 1 (Dropout): forward changes torch's random numbers"),
    (nn.Sequential(nn.Identity(), nn.Dropout(0.1)), "stage 1, layer 1 (Sequential): forward changes torch's random numbers"),
    (nn.TransformerEncoderLayer(8, 1, 8, batch_first=True), "(TransformerEncoderLayer): forward changes torch's random numbers"),
    (Returns(lambda x: x * np.random.rand()), "(Returns): forward changes NumPy's random numbers"),
    (Returns(lambda x: x * random.random()), "(Returns): forward changes Python's random numbers"),
    (Returns(lambda x: x + torch.randn_like(x)), "(Returns): forward changes torch's random numbers"),
    (nn.BatchNorm1d(8), "stage 1, layer 1 (BatchNorm1d): forward changes running_mean, running_var, num_batches"),
    (nn.Sequential(nn.Tanh(), Counting()), "forward changes 1.count"),
    (torch.nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), "forward changes parametrizations.weight.0._u"),
    (torch.nn.utils.spectral_norm(nn.Linear(8, 8)), "forward changes weight_u")])
def test_what_recomputation_would_betray_is_refused(layer, message):
    """A second forward pass would draw another mask or move averages again; nothing is left changed."""
    x, state = torch.randn(8, 8), {name: value.clone() for name, value in layer.state_dict().items()}
    model = nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 8))
    for mode, M in (("always", 1), ("except_last", 2)):
        with pytest.raises(common.UserError, match=re.escape(message)):
            gpipe.Pipeline(model, [1, 2], CPU, M, mode).step(x, torch.sum)
        assert not gradients(model) and (same(layer.state_dict(), state) or "count" in message)
    for mode, M in (("never", 2), ("except_last", 1)):                  # nothing is recomputed
        gpipe.Pipeline(model, [1, 2], CPU, M, mode).step(x, torch.sum)
    gpipe.Pipeline(model, [1, 2], CPU, 2, "always").infer(x)


def test_a_layer_that_begins_to_draw_after_the_probe_is_refused():
    """Dropout whose rate is raised behind the first step, and a layer that draws for some inputs alone.

    Which layer is named depends on what runs beside it.
    """
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.Linear(4, 1))
    pipe = gpipe.Pipeline(model, [2, 1], CPU, 2, "always")
    pipe.step(torch.randn(4, 4), torch.sum)
    model[1].p = 0.5
    with pytest.raises(common.UserError, match="draws torch's random numbers"):
        pipe.step(torch.randn(4, 4), torch.sum)
    late = Returns(lambda x: x * torch.rand(1) if x[0, 0] > 1 else x)
    x = torch.zeros(4, 4)
    x[2:] = 2.0
    with pytest.raises(common.UserError, match="draws torch's random numbers"):
        gpipe.Pipeline(nn.Sequential(late, nn.Linear(4, 1)), [1, 1], CPU, 2, "always").step(x, torch.sum)


def test_the_probe_leaves_the_mini_batch_and_random_numbers_alone():
    """Layers that draw by the stage's generator and defer their averages pass, once a pipeline."""
    model = nn.Sequential(Drop(), nn.Sequential(gpipe.BatchNorm(3), nn.ReLU(True)), nn.Identity())
    x, calls = torch.randn(8, 3, 4, 4), []
    model[1].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    before, state = x.clone(), torch.get_rng_state()
    pipe = gpipe.Pipeline(model, [1, 2], CPU, 2, "always")
    for _ in range(2):
        pipe.step(x, torch.sum)
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state) and len(calls) == 1 + 2 * 4
    assert model[1][0].num_batches_tracked == 2


def test_gradients_return_in_the_sizes_in_which_the_output_came():
    """Three rows a sample: pieces of 9, 9, 6 and 6 rows, where an even split of 30 has 8, 8, 7, 7."""
    model, (x, _) = mlp(), batch(10)
    model.append(Returns(lambda y: y.repeat_interleave(3, 0)))
    y = torch.randint(4, (30,), generator=torch.Generator().manual_seed(0))
    found, expected = piped(model, x, y, 3, 4)[3], plain(model, x, y)[3]
    assert apart(found, expected) <= 1e-12


@pytest.mark.parametrize("build,message", [
    (lambda: gpipe.partition([1, 2], 0), "0 stages: there are 2 layers"),
    (lambda: gpipe.partition([1, 2], -1), "-1 stages: there are 2 layers"),
    (lambda: gpipe.Pipeline(nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (6, 1, 1)), gpipe.BatchNorm(6)), [1, 2], CPU, 4).step(
        torch.zeros(4, 6), torch.sum), "stage 1, layer 2 .BatchNorm.: a micro-batch has one value a channel"),
    (lambda: gpipe.Pipeline(mlp(), [1] * 7, CPU), "sum to 6 layers"),
    (lambda: gpipe.Pipeline(mlp(), [3, 2], CPU), "sum to 6 layers"),
    (lambda: gpipe.Pipeline(mlp(), [6, 0], CPU), "above 0"),
    (lambda: gpipe.Pipeline(mlp(), [3, 3], ["cpu"]), "one a stage is needed"),
    (lambda: gpipe.Pipeline(mlp(), [6], CPU, 0), "at least 1"),
    (lambda: gpipe.partition([1, 2], 3), "3 stages: there are 2 layers"),
    (lambda: gpipe.Pipeline(shared_parameter(), [4, 2], CPU), "share a parameter"),
    (lambda: gpipe.Pipeline(mlp(), [6], CPU).infer((torch.zeros(3, 6), torch.zeros(2, 6))), "one number"),
    (lambda: gpipe.Pipeline(mlp(), [6], CPU).infer(torch.zeros(0, 6)), "one number"),
    (lambda: gpipe.Pipeline(nn.Sequential(nn.Linear(6, 6), InPlace()), [1, 1], CPU, 2, "always").step(
        torch.zeros(4, 6), torch.sum), "in.place"),
    (lambda: gpipe.Pipeline(nn.Sequential(InPlace(), nn.Linear(6, 6)), [1, 1], CPU, 2, "always").step(
        torch.zeros(4, 6), torch.sum), "stage 0 changes its input in place")])
def test_typed_errors(build, message):
    threads = threading.active_count()
    with pytest.raises((common.UserError, RuntimeError), match=message):
        build()
    assert threading.active_count() == threads


def test_surplus_devices_and_shared_layers_of_one_stage():
    assert len(gpipe.Pipeline(mlp(), [3, 3], CPU).devices) == 2
    gpipe.Pipeline(shared_parameter(), [3, 3], CPU)


def command(words):
    cfg = common.cli(gpipe.Config, gpipe.PRESETS, gpipe.__doc__, words)
    common.launch(gpipe.main, cfg, gpipe.check, gpipe.prepare, processes=1)


@pytest.mark.parametrize("words", [
    "--stages 9", "--micro 0", "--balance 3,2", "--balance 3,2,0 --stages 3", "--balance best", "--data shapes",
    "--model lm", "--devices cuda:7,cuda:7", "--devices cpu --stages 3", "--devices ,", "--devices cpu,,cpu", "--stages 10000000000", "--heads 900000000000000000",
    "--plan --batch 1000000000000000000000000", "--model amoebanet-d --data shapes --layers 4",
    "--width 33", "--dropout 1", "--data numbers:x", "--temperature 0", "--temperature 1e-18", "--stages -1", "--clip -1",
    "--clip nan", "--clip inf", "--cooldown nan", "--cooldown 2", "--decay -1", "--warmup -1", "--bn_momentum nan", "--emulate -1",
    "--emulate nan", "--classes -1", "--data numbers:20000", "--data numbers:0", "--data numbers:²", "--data numbers:1",
    "--data numbersx30", "--data tsv:", "--model amoebanet-d --layers 3 --data latents:/none", "--data latents:/none", "--data numbers:3", "--plan --balance time", "--data tsv:/none", "--classes 7"])
def test_bad_input_is_one_line(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = refused(lambda *given: command([*given]), ["--steps", "2", "--data", "numbers:30", *words.split()], capsys)
    known = re.findall(r"--\w+ (?!--)\S+", words) + ["/none", "numbers"]
    assert any(given in text for given in known), "the line names what was given"
    assert "--gpus" not in text and not (tmp_path / "runs").exists()


def pictures(count, classes=("a", "b", "c"), **more):
    """A split of pictures with its own list of classes."""
    labels = np.arange(count) % len(classes)
    return gpipe.data.Data(np.zeros((count, 3, 8, 8), np.uint8), labels, list(classes), None, "here", **more)


@pytest.mark.parametrize("names", ["abc", "bc", "cab"])
def test_a_class_counts_by_its_name(names, tmp_path, capsys):
    """A test split may lack a class or count in another order than training, whose classes the model tells apart."""
    test = pictures(7, names)

    class Oracle:
        devices = CPU

        def infer(self, x):
            return F.one_hot(torch.tensor(["abc".index(names[label]) for label in test.labels]), 3)

    assert gpipe.answer(Oracle(), config(model="amoebanet-d"), test, ["a", "b", "c"], tmp_path) == 1.0
    assert "wrong" not in (tmp_path / "predictions.txt").read_text() and "nan" not in capsys.readouterr().out


def test_nine_pictures_are_too_few_before_training(capsys, monkeypatch, tmp_path):
    """Of ten one is held out as a test; of nine none."""
    monkeypatch.chdir(tmp_path)
    for count in (9, 10):
        np.savez(tmp_path / f"{count}.npz", images=np.zeros((count, 8, 8, 3), np.uint8), labels=np.arange(count) % 3)
    words = "--model amoebanet-d --size 8 --layers 3 --width 4 --steps 1 --batch 4 --micro 2".split()
    assert "9.npz" in refused(lambda *given: command([*given]), [*words, "--data", "npz:9.npz"], capsys)
    assert not (tmp_path / "runs").exists()
    command([*words, "--data", "npz:10.npz"])
    assert "right answers: 0 " in capsys.readouterr().out


@pytest.mark.parametrize("words", ["--gpus 2", "--gpus 2 --device cuda", "--gpus 2 --stages 4 --plan", "--devices cuda:1"])
def test_more_gpus_than_there_are(words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert words[:8].rstrip(" 2c") in refused(lambda *given: command([*given]), words.split(), capsys)


def test_devices_of_stages_and_replicas(monkeypatch):
    """A GPU may serve several stages; under torchrun every replica on a machine drives its own --gpus."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpipe.check(config(devices="cuda:0,cuda:0"))
    assert gpipe.stage_devices(config(devices="cuda:0,cuda:0")) == ["cuda:0", "cuda:0"]
    assert gpipe.stage_devices(config(gpus=2, device="cpu")) == ["cpu", "cpu"]
    assert gpipe.stage_devices(config(stages=3)) == ["cuda:0"] * 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert gpipe.stage_devices(config(gpus=2, stages=4)) == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    with pytest.raises(common.UserError, match="--gpus 4: 2 stages leave some idle"):
        gpipe.check(config(gpus=4, stages=2))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert gpipe.stage_devices(config(gpus=2)) == ["cuda:2", "cuda:3"]
    monkeypatch.setenv("LOCAL_RANK", "2")                               # three replicas of two GPUs
    with pytest.raises(common.UserError, match="--devices cuda:4,cuda:5: 2 are needed, one a stage, of cpu, cuda:0"):
        gpipe.check(config(gpus=2))


SMALL = "--data numbers:30 --layers 1 --width 16 --hidden 16 --heads 1 --steps 2 --batch 8 --log 1".split()


@pytest.mark.parametrize("words", [
    "--micro 20", "--checkpoint always", "--checkpoint never --stages 3", "--goal bottleneck", "--balance time",
    "--balance params", "--balance 1,3 --stages 2", "--no-scaled --clip 0", "--devices cpu,cpu --stages 2"])
def test_every_option_runs(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command([*SMALL, *words.split()])
    out = capsys.readouterr().out
    folder = tmp_path / "runs/gpipe/demo"
    assert "stages of" in out and "right answers: all" in out
    assert (folder / "timeline.svg").exists() and (folder / "predictions.txt").read_text().count("to en: ") > 3
    assert ("8 samples in 8 micro-batches" in out) == ("20" in words)


@pytest.mark.parametrize("preset,right,code", [("demo", 0.95, 0), ("demo", 0.94, 1), ("small", 0.0, 0)])
def test_the_demo_fails_below_its_target(preset, right, code, tmp_path, monkeypatch):
    """Only the demo's own settings are held to its target; --sample and other presets have none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "is_preset", lambda cfg, presets: True)
    monkeypatch.setattr(gpipe, "answer", lambda *_: right)
    cfg = common.cli(gpipe.Config, gpipe.PRESETS, gpipe.__doc__, SMALL)
    cfg.preset = preset
    assert gpipe.train(cfg) == code
    common.Run.trained = False                                                  # as in a process of its own
    assert gpipe.train(replace(cfg, resume=True)) == 0, "a finished run only shows its result"


def test_replicas_that_time_their_layers_cut_alike(monkeypatch):
    """Each finds sizes of its own; those of rank 0 count."""
    cfg = common.cli(gpipe.Config, gpipe.PRESETS, gpipe.__doc__, [*SMALL, "--balance", "time", "--stages", "3"])
    model = gpipe.build(cfg, gpipe.count_classes(cfg, gpipe.open_split(cfg, "train")))
    L = len(model)
    monkeypatch.setattr(gpipe, "layer_seconds", lambda *_: [9.0] + [1.0] * (L - 1))
    mine = []

    def broadcast(sizes):
        assert sum(sizes) == L
        mine.append(list(sizes))
        sizes.reverse()

    monkeypatch.setattr(common, "world", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    sizes = [len(stage) for stage in gpipe.build_pipeline(cfg, model).stages]
    assert [sizes] == [own[::-1] for own in mine] and sizes not in mine


def test_a_sample_goes_where_out_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command([*SMALL])
    command(["--sample", "runs/gpipe/demo/last.pt", "--out", "there"])
    assert (tmp_path / "there/predictions.txt").exists() and not (tmp_path / "runs/gpipe/demo/samples").exists()


def test_a_checkpoint_carries_its_classes(tmp_path, monkeypatch):
    """Answers of --sample have the names of the classes that were trained on."""
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "d.npz", images=np.zeros((20, 8, 8, 3), np.uint8), labels=np.arange(20) % 2, class_names=["left", "right"])
    command("--model amoebanet-d --size 8 --layers 3 --width 4 --steps 1 --batch 4 --micro 2 --data npz:d.npz".split())
    assert common.read_checkpoint("runs/gpipe/demo/last.pt", "gpipe")["classes"] == ["left", "right"]
    command(["--sample", "runs/gpipe/demo/last.pt"])
    assert set(re.findall(r"\w+", (tmp_path / "runs/gpipe/demo/samples/predictions.txt").read_text())) <= {"left", "right", "wrong"}


def test_sample_translates_with_other_stages(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command([*SMALL, "--stages", "2"])
    first = (tmp_path / "runs/gpipe/demo/predictions.txt").read_text()
    before = (tmp_path / "runs/gpipe/demo/last.pt").read_bytes()
    command(["--sample", "runs/gpipe/demo/last.pt", "--stages", "4", "--micro", "3"])
    assert (tmp_path / "runs/gpipe/demo/samples/predictions.txt").read_text() == first
    assert (tmp_path / "runs/gpipe/demo/last.pt").read_bytes() == before


def test_plan_and_emulate(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command(["--preset", "AmoebaNet-B-18-512", "--plan", "--stages", "8"])
    out = capsys.readouterr().out
    assert "557,277,864 parameters, 24 layers" in out and f"{7 / 39:.1%}" in out and not list(tmp_path.iterdir())
    assert out.count("GiB of weights") == 8 and 1 < float(re.search(r"speed-up of these (\S+),", out)[1]) < 8 * 32 / 39
    command(["--preset", "Transformer-13", "--emulate", "0.001", "--stages", "3", "--micro", "4"])
    out = capsys.readouterr().out
    # two boundaries, N = 32 samples of 1024 tokens and 2048 channels in fp32, there and back
    assert "emulated: idle" in out and f"{2 * 2 * 32 * 1024 * 2048 * 4 / 2**30:.2f} GiB a step between stages" in out
    assert (tmp_path / "runs/gpipe/Transformer-13/emulated.svg").read_text().count("<rect") > 3 * 4 * 3


def test_greedy_decoding_answers_with_a_trained_model(tmp_path):
    """A model that copies the source's digits into the target answers exactly: `answer` compares whole sentences."""
    test = gpipe.data.translation_pairs("test", languages=("en", "mi"), limit=30, tests=10)

    class Oracle:
        def infer(self, inputs):
            source, found = inputs
            rows = [int(np.flatnonzero((test.source == row.numpy()).all(1))[0]) for row in source]
            wanted = torch.as_tensor(test.target[rows])[:, min(found.shape[1], test.target.shape[1] - 1)]
            return F.one_hot(wanted, 200).double()[:, None]

    assert gpipe.answer(Oracle(), config(), test, [], tmp_path) == 1.0
    assert "wrong" not in (tmp_path / "predictions.txt").read_text()


def test_presets_have_the_published_pipelines():
    """K of Tables 1 and Sec. 4, 5, with M of at least 4 K where the mini-batch has as many; lingvo's learning rate."""
    published = {"AmoebaNet-B-18-512": 4, "AmoebaNet-D-18-544": 2, "AmoebaNet-D-36-544": 4, "AmoebaNet-D-72-512": 8,
                 "Transformer-103": 8, "Transformer-415": 32, "Transformer-1663": 128,
                 "T-24-8192-16": 4, "T-12-16384-32": 2, "T-32-16384-32": 8, "T-64-16384-32": 16}
    for name, K in published.items():
        cfg = config(**gpipe.PRESETS[name])
        assert cfg.stages == K and cfg.micro >= min(4 * K, cfg.batch), name
    cfg = config(**gpipe.PRESETS["T-24-8192-16"])
    for s in (0, 100, 39_999, 40_000, 99_999):
        assert gpipe.learning_rate(cfg, s) == pytest.approx(0.5 * 1024 ** -0.5 * min((s + 1) * 40000 ** -1.5, (s + 1) ** -0.5))


def test_presets_have_the_published_sizes():
    for name, preset in gpipe.PRESETS.items():
        cfg = config(**{"preset": name, **preset, "plan": True})
        if cfg.layers < 50:                                             # check counts the layers of a model that it builds
            gpipe.check(cfg)
        with torch.device("meta"):
            if name in ("AmoebaNet-B-18-512", "T-6-8192-16", "Transformer-3", "AmoebaNet-D-18-208"):
                expected = {"AmoebaNet-B-18-512": 557_277_864, "Transformer-3": 282_178_816,
                            "AmoebaNet-D-18-208": 81_505_540}.get(name)
                model = gpipe.build(cfg, cfg.classes)
                assert expected is None or count(model) == expected


# --- With a GPU ----------------------------------------------------------------

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cuda
@pytest.mark.parametrize("mode", MODES)
def test_cuda_gradients_are_bitwise_equal_with_and_without_streams(mode):
    """One device four times; float32 without TF32 against the CPU; the timeline comes from events."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(8)))
    x, y = torch.randn(64, 256), torch.randint(256, (64,))
    expected = piped(model, x, y, 4, 4, mode)[3]
    found = []
    for streams, threads, _ in itertools.product((True, False), (True, False), range(5)):
        pipe = gpipe.Pipeline(copy.deepcopy(model), [2] * 4, ["cuda:0"] * 4, 4, mode, streams=streams, threads=threads)
        pipe.step(x, lambda out: F.cross_entropy(out, y.to(out.device)))
        found.append(gradients(pipe.model))
        assert same(found[-1], found[0])
        assert all(0 <= start <= end < 60 for start, end in pipe.minibatch.times.values())
        assert len(pipe.minibatch.times) == len(gpipe.schedule(4, 4, mode))
    assert max((grad.cpu() - expected[name]).abs().max() for name, grad in found[0].items()) <= 1e-5


@cuda
@pytest.mark.parametrize("mode", MODES)
def test_cuda_memory_is_as_predicted(mode):
    """The peak of a step over what is there before it, within 10 % of the prediction for one stage."""
    N, M, D, L = 8192, 8, 1024, 32
    model = nn.Sequential(*(nn.Sequential(nn.Linear(D, D), nn.GELU()) for _ in range(L)), nn.Linear(D, 8))
    _, predicted = gpipe.footprint(gpipe.profile(model, torch.zeros(N // M, D)), [L + 1], M, mode)[0]
    pipe, x = gpipe.Pipeline(model, [L + 1], ["cuda:0"], M, mode), torch.randn(N, D, device="cuda:0")
    for _ in range(2):                                                  # the gradients exist from the first step on
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - x.nbytes               # the stash is made of views of the input
        pipe.step(x, lambda out: out.square().mean())
    assert abs((torch.cuda.max_memory_allocated() - before) / predicted - 1) < 0.1
