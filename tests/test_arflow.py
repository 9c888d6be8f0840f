"""ARFlow: its equations A1 to A22, the authors' own numbers, and the command line's promises.

Oracles are written from the formulas (token loops, masked matrices, closed forms), not from the code under test.
"""

import argparse
import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path

import arflow
import common
from tests import ROOT, official, refused
from tests.official import arflow as convert_official

import numpy as np
import pytest
import torch
import torch.nn.functional as F

torch.set_default_dtype(torch.float32)


def config(**changes):
    """A small configuration of the paper's model."""
    small = dict(size=6, patch=2, width=32, depth=2, heads=2, images=4)
    return dataclasses.replace(arflow.Config(), **{**small, **changes})


def network(seed=0, channels=3, classes=5, **changes):
    """A float64 model with every zero-initialised weight made random, so that nothing hides."""
    torch.manual_seed(seed)
    model = arflow.ARFlow(config(**changes), channels, classes).double()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    return model


def core(B=2, n=4, H=2, N=5, d=4, seed=0):
    """Random q, k (already scaled), v, log gates and an empty state, in float64."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, n, H, N, d, generator=g, dtype=torch.float64) for _ in range(3))
    l = F.logsigmoid(torch.randn(B, n, H, N, generator=g, dtype=torch.float64)) / 4
    return q, k / math.sqrt(d), v, l, torch.zeros(B, H, d, d, dtype=torch.float64)


def velocity_loss(model, batch, t, noise, drop):
    """The loss at given draws; it has no parts beside it."""
    value, losses = arflow.loss(model, batch, {"t": t, "noise": noise, "drop": drop})
    assert losses == {}
    return value


def generator(seed):
    return torch.Generator().manual_seed(seed)


def sequence(B=2, n=4, C=3, side=6, K=5, seed=1):
    """Images, sorted times, labels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, n, C, side, side, generator=g, dtype=torch.float64)
    t = torch.rand(B, n, generator=g, dtype=torch.float64).sort(1).values
    return x, t, torch.randint(K, (B,), generator=g)


def token_loop(q, k, v, l, query_decay=True):
    """A15, A16, A17 and A18 read literally, one number at a time: lists, sums and exponentials only."""
    B, n, H, N, d = q.shape
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            S = torch.zeros(d, d, dtype=q.dtype)
            for m in range(n):
                for i in range(N):
                    weights = torch.stack([q[b, m, h, i] @ k[b, m, h, j] for j in range(N)]).exp()
                    inside = sum(weights[j] * v[b, m, h, j] for j in range(N)) / weights.sum()
                    decay = l[b, m, h, :i + 1].sum().exp() if query_decay else 1.0
                    out[b, m, h, i] = inside + decay * (q[b, m, h, i] @ S)
                S = S * l[b, m, h].mean().exp() + sum(torch.outer(k[b, m, h, j], v[b, m, h, j]) for j in range(N))
    return out


# --- The authors' numbers ------------------------------------------------------

GOLDEN = ROOT / "tests" / "golden" / "arflow.npz"     # made by the authors' own code, see tests/golden/README.md


def official_weights():
    """{official name: tensor} of the authors' small model."""
    with np.load(GOLDEN) as golden:
        return {name[8:]: torch.from_numpy(golden[name]) for name in golden.files if name.startswith("weights/")}


def official_model(dtype):
    """The authors' small model, converted by the same code as a published checkpoint."""
    fields, state = convert_official(official_weights(), {})
    golden = np.load(GOLDEN)
    cfg = dataclasses.replace(arflow.Config(), **fields)
    model = arflow.ARFlow(cfg, int(golden["cfg_in_channels"]), int(golden["cfg_num_classes"]))
    model.load_state_dict(state["ema"])
    model = model.to(dtype)
    model.pos_embed = arflow.sincos_pos_embed(cfg.size // cfg.patch, cfg.width).to(dtype)
    numbers = {name: torch.from_numpy(golden[name]) for name in golden.files if golden[name].ndim and "/" not in name}
    return model, {name: x.to(dtype) if x.is_floating_point() else x for name, x in numbers.items()}


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-6), (torch.float32, 2e-5)])
def test_official_outputs_and_states(dtype, atol):
    model, g = official_model(dtype)
    with torch.no_grad():
        out, states = model(g["x"], g["t"], g["y"])
        torch.testing.assert_close(out, g["out"], atol=atol, rtol=0)
        torch.testing.assert_close(torch.stack(states), g["final_states"], atol=atol, rtol=1e-6)
        null, _ = model(g["x"], g["t"], torch.full_like(g["y"], model.classes))
        torch.testing.assert_close(null, g["out_null_label"], atol=atol, rtol=0)
        carried, stream, alone = None, [], []
        for m in range(g["x"].shape[1]):
            one = slice(m, m + 1)
            v, carried = model(g["x"][:, one], g["t"][:, one], g["y"], carried)
            stream.append(v)
            alone.append(model(g["x"][:, one], g["t"][:, one], g["y"])[0])
    torch.testing.assert_close(torch.cat(stream, 1), g["out_stream"], atol=atol, rtol=0)
    torch.testing.assert_close(torch.cat(alone, 1), g["out_each_image_alone"], atol=atol, rtol=0)


def test_official_embeddings():
    """A6: the sum of label and time."""
    model, g = official_model(torch.float64)
    c = model.label(g["y"])[:, None] + model.time(arflow.timestep_embedding(g["t"]))
    torch.testing.assert_close(c, g["cond_c"], atol=1e-6, rtol=0)
    tokens = model.embed(g["x"].flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, (2, 5))
    torch.testing.assert_close(tokens, g["tokens"], atol=1e-12, rtol=0)


def test_sincos_pos_embed_equals_the_official_one():
    ours = arflow.sincos_pos_embed(3, 48)
    torch.testing.assert_close(ours, official_weights()["pos_embed"][0].double(), atol=1e-6, rtol=0)


# --- The equations -------------------------------------------------------------

def test_a_new_model_outputs_zero():
    torch.manual_seed(0)
    model = arflow.ARFlow(config(), 3, 5).double()
    x1, t, y = sequence()
    x0 = torch.randn_like(x1)
    assert not model(x1, t, y)[0].any()
    value = velocity_loss(model, (x1, y), t, x0, torch.zeros(2, dtype=torch.bool))
    torch.testing.assert_close(value, (x1 - x0).square().mean(), rtol=1e-14, atol=0)


def test_initialisation():
    torch.manual_seed(0)
    model = arflow.ARFlow(config(width=128), 4, 300)
    normal = [model.label.weight, model.time[0].weight, model.time[2].weight]
    zero = [model.modulation.weight, model.out.weight] + [block.modulation.weight for block in model.blocks]
    for name, p in model.named_parameters():
        if p.ndim == 1 or any(p is q for q in zero):
            assert not p.any(), name
        elif any(p is q for q in normal):
            assert abs(p.std() / 0.02 - 1) < 0.1, name
        else:
            fan = p.flatten(1).shape[0] + p.flatten(1).shape[1]                 # Xavier uniform, patches flattened
            assert p.abs().max() <= math.sqrt(6 / fan) and abs(p.std() / math.sqrt(2 / fan) - 1) < 0.1, name


@pytest.mark.parametrize("j", range(4))
def test_an_image_changes_nothing_before_it(j):
    model, (x, t, y) = network(), sequence()
    changed = x.clone()
    changed[:, j] += torch.randn(changed[:, j].shape, generator=generator(9))
    before, after = model(x, t, y)[0], model(changed, t, y)[0]
    moved = (before - after).abs().amax((0, 2, 3, 4))
    assert (moved[:j] == 0).all() and (moved[j:] > 0).all()


@pytest.mark.parametrize("query_decay", [True, False])
def test_loop_equals_matrix_equals_definition(query_decay):
    """A15 to A18, against A19 and against the token loop; outputs and gradients."""
    q, k, v, l, S = core()
    leaves = [x.requires_grad_() for x in (q, k, v, l)]
    weight = torch.randn_like(v)
    loop = arflow.hybrid(q, k, v, l, S, query_decay)[0]
    matrix = arflow.hybrid_matrix(q, k, v, l, query_decay=query_decay)
    literal = token_loop(q, k, v, l, query_decay)
    torch.testing.assert_close(loop, matrix, atol=1e-12, rtol=0)
    torch.testing.assert_close(loop, literal, atol=1e-12, rtol=0)
    for out in (matrix, literal):
        for ours, theirs in zip(torch.autograd.grad((loop * weight).sum(), leaves, retain_graph=True),
                                torch.autograd.grad((out * weight).sum(), leaves)):
            torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


def test_loop_equals_matrix_in_float32():
    q, k, v, l, S = (x.float() for x in core(N=16, d=8))
    loop, matrix = arflow.hybrid(q, k, v, l, S)[0], arflow.hybrid_matrix(q, k, v, l)
    assert ((loop - matrix).norm() / matrix.norm()).item() < 1e-4


@pytest.mark.parametrize("split", [(1, 1, 1, 1), (2, 2), (3, 1), (1, 3)])
def test_streaming_equals_one_pass(split):
    model, (x, t, y) = network(), sequence()
    whole, final = model(x, t, y)
    states, parts = None, []
    for xs, ts in zip(x.split(split, 1), t.split(split, 1)):
        out, states = model(xs, ts, y, states)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=0)
    torch.testing.assert_close(torch.stack(states), torch.stack(final), atol=1e-10, rtol=0)


def test_the_first_image_is_plain_softmax_attention():
    q, k, v, l, S = core()
    d = q.shape[-1]
    out = arflow.hybrid(q[:, :1], k[:, :1], v[:, :1], l[:, :1], S)[0]
    plain = (q[:, :1] @ (k[:, :1] * math.sqrt(d)).mT / math.sqrt(d)).softmax(-1) @ v[:, :1]
    torch.testing.assert_close(out, plain, atol=1e-12, rtol=0)
    model, (x, t, y) = network(), sequence()
    torch.testing.assert_close(model(x, t, y)[0][:, :1], model(x[:, :1], t[:, :1], y)[0], atol=1e-12, rtol=0)


def test_closed_and_open_gates():
    """A16: closed gates forget all, open ones keep all."""
    q, k, v, l, S = core()
    closed = arflow.hybrid(q, k, v, torch.full_like(l, -1e4), S)[0]
    torch.testing.assert_close(closed, (q @ k.mT).softmax(-1) @ v, atol=1e-12, rtol=0)
    opened, state = arflow.hybrid(q, k, v, torch.zeros_like(l), S)
    torch.testing.assert_close(state, torch.einsum("bmhnd,bmhne->bhde", k, v), atol=1e-12, rtol=0)
    no_decay = arflow.hybrid(q, k, v, torch.zeros_like(l), S, query_decay=False)[0]
    torch.testing.assert_close(opened, no_decay, atol=1e-14, rtol=0)           # exp(G) = 1


def test_one_token_images_are_gated_linear_attention():
    """A17 and A18 with N = 1."""
    q, k, v, l, S = core(N=1)
    out, final = arflow.hybrid(q, k, v, l, S)
    for m in range(q.shape[1]):
        read = l[:, m].exp()[..., None] * (q[:, m] @ S)
        torch.testing.assert_close(out[:, m], v[:, m] + read, atol=1e-12, rtol=0)
        S = l[:, m].exp()[..., None] * S + k[:, m].mT @ v[:, m]
    torch.testing.assert_close(final, S, atol=1e-12, rtol=0)


def test_token_permutations():
    q, k, v, l, S = core(N=6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    past = [x.clone() for x in (q, k, v, l)]
    for x in past:
        x[:, 1] = x[:, 1][:, :, order]
    torch.testing.assert_close(arflow.hybrid(*past, S)[0][:, 2:], arflow.hybrid(q, k, v, l, S)[0][:, 2:],
                               atol=1e-12, rtol=0)
    last = [x.clone() for x in (q, k, v, l)]
    for x in last:
        x[:, -1] = x[:, -1][:, :, order]
    moved = {decay: (arflow.hybrid(*last, S, decay)[0][:, -1]
                     - arflow.hybrid(q, k, v, l, S, decay)[0][:, -1][:, :, order]).abs().max() for decay in (True, False)}
    assert moved[True] > 1e-2 and moved[False] < 1e-12


def test_the_matrix_from_one_hot_values():
    """A19, element by element: what one-hot values read out is the matrix itself."""
    n, N = 3, 4
    q, k, _, l, _ = core(B=1, n=n, H=1, N=N)
    S = torch.zeros(1, 1, q.shape[-1], n * N, dtype=torch.float64)
    v = torch.eye(n * N, dtype=torch.float64).view(1, n, 1, N, n * N)
    M = arflow.hybrid(q, k, v, l, S)[0].reshape(n * N, n * N)
    mean, G = l[0, :, 0].mean(-1), l[0, :, 0].cumsum(-1)
    for i in range(n * N):
        for j in range(n * N):
            r, s = i // N, j // N
            qk = (q[0, r, 0, i % N] @ k[0, s, 0, j % N]).item()
            if s > r:
                assert M[i, j] == 0
            elif s < r:
                decay = math.exp(G[r, i % N] + mean[s + 1:r].sum())
                assert math.isclose(M[i, j], qk * decay, abs_tol=1e-12)
    blocks = torch.stack([M[m * N:(m + 1) * N, m * N:(m + 1) * N].sum(-1) for m in range(n)])
    torch.testing.assert_close(blocks, torch.ones_like(blocks), atol=1e-12, rtol=0)


def test_the_last_gate_touches_its_own_image_alone():
    q, k, v, l, S = core()
    l.requires_grad_()
    out, state = arflow.hybrid(q, k, v, l, S)
    before = arflow.hybrid(q[:, :-1], k[:, :-1], v[:, :-1], l[:, :-1], S)[1].detach()
    assert not torch.autograd.grad(out[:, :-1].sum(), l, retain_graph=True)[0][:, -1].any()
    ours = torch.autograd.grad(out.sum(), l, retain_graph=True)[0][:, -1]
    last = l[:, -1].detach().requires_grad_()
    read = last.cumsum(-1).exp()[..., None] * (q[:, -1] @ before)               # exp(G) of the last image, alone
    torch.testing.assert_close(ours, torch.autograd.grad(read.sum(), last)[0], atol=1e-12, rtol=0)
    assert torch.autograd.grad(state.sum(), l)[0][:, -1].any()
    open_end = arflow.hybrid(q, k, v, l, S, query_decay=False)[0]
    assert not torch.autograd.grad(open_end.sum(), l)[0][:, -1].any()


def test_times_are_sorted_uniforms():
    """A2: ascending, each uniform before sorting. A3: every image has its own noise, which knows no time."""
    class Images:
        classes, latent = ["a"], False
        by_class = [np.arange(20)]

        def pixels(self, index, device):
            return torch.zeros(len(index), 1, 1, 1)

    cfg = config(images=5, batch=50_000)
    (x1, y), draws = arflow.draw(Images(), cfg, 0, torch.device("cpu"))
    t, x0, drop = draws["t"], draws["noise"], draws["drop"]
    assert (t[:, 1:] >= t[:, :-1]).all() and x0.shape == (50_000, 5, 1, 1, 1)
    i = torch.arange(1, 6)
    assert ((t.mean(0) - i / 6).abs() < 0.003).all() and ((t.var(0) - i * (6 - i) / 252).abs() < 0.001).all()
    assert abs(drop.float().mean() - 0.1) < 0.01
    r = torch.corrcoef(torch.cat([x0.flatten(1), t], 1).T).abs()
    assert r[:5, 5:].max() < 0.02                                               # noise knows no time
    assert (r[:5, :5] - torch.eye(5)).max() < 0.02                              # and each image has its own (A3)


def test_the_path_from_noise_to_data():
    """A4."""
    x1, t, _ = sequence()
    x0 = torch.randn_like(x1)
    x, u = arflow.interpolate(x1, x0, t)
    s = t[:, :, None, None, None]
    torch.testing.assert_close(x + (1 - s) * u, x1, atol=1e-12, rtol=0)
    torch.testing.assert_close(x - s * u, x0, atol=1e-12, rtol=0)
    assert torch.equal(arflow.interpolate(x1, x0, torch.zeros_like(t))[0], x0)
    assert torch.equal(arflow.interpolate(x1, x0, torch.ones_like(t))[0], x1)


class Gaussian(torch.nn.Module):
    """The exact velocity for data N(0, s^2), and a record of the calls, in the place of the network."""

    def __init__(self, s, size=100):
        super().__init__()
        self.s, self.size, self.channels, self.classes, self.calls = s, size, 1, 10, []

    def forward(self, x, t, y, states):
        self.calls.append((float(t[0, 0]), y.clone(), states))
        t = t[..., None, None, None]
        return (t * self.s ** 2 - (1 - t)) * x / (t ** 2 * self.s ** 2 + (1 - t) ** 2), [len(self.calls)]


def test_the_drift_is_velocity_and_score():
    """A21: the last step shows the drift alone, v + (1 - t) score with score = (t v - x) / (1 - t)."""
    x, way = arflow.sample(Gaussian(0.7, size=9), torch.zeros(1, dtype=torch.long), generator(0), 4)
    before, t = way[-2].double(), 0.96
    v = (t * 0.49 - (1 - t)) * before / (t * t * 0.49 + (1 - t) ** 2)
    score = (t * v - before) / (1 - t)
    torch.testing.assert_close((x.double() - before) / 0.04, v + (1 - t) * score, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("context", ["carry", "reset"])
def test_time_grid_calls_and_state(context):
    model = Gaussian(1.0, size=2)
    _, way = arflow.sample(model, torch.zeros(1, dtype=torch.long), torch.Generator().manual_seed(0), 6, context=context)
    assert np.allclose([t for t, _, _ in model.calls], np.linspace(0, 0.96, 6), atol=1e-7) and len(way) == 7
    states = [state for _, _, state in model.calls]
    used, twin = generator(0), generator(0)
    arflow.sample(Gaussian(1.0, size=2), torch.zeros(1, dtype=torch.long), used, 6)
    for _ in range(6):                                                          # the start and R - 1 steps
        torch.randn(1, 1, 2, 2, generator=twin)
    assert torch.equal(torch.randn(3, generator=used), torch.randn(3, generator=twin))
    assert states == ([None] + [[i] for i in range(1, 6)] if context == "carry" else [None] * 6)


def test_sampler_first_and_last_step_by_value():
    model, y = Gaussian(2.0, size=3), torch.zeros(2, dtype=torch.long)
    x, way = arflow.sample(model, y, torch.Generator().manual_seed(3), 3)
    g = torch.Generator().manual_seed(3)
    start = torch.randn(2, 1, 3, 3, generator=g)
    assert torch.equal(way[0], start)
    dt = 0.48
    first = start + dt * (-start - start) + math.sqrt(2 * dt) * torch.randn(2, 1, 3, 3, generator=g)   # v(x, 0) = -x
    torch.testing.assert_close(way[1], first, atol=1e-6, rtol=0)
    t, before = 0.96, way[2]
    v = (t * 4 - (1 - t)) * before / (t * t * 4 + (1 - t) ** 2)
    torch.testing.assert_close(x, before + 0.04 * ((1 + t) * v - before), atol=1e-6, rtol=0)


@pytest.mark.parametrize("calls, s, expected", [
    (250, 0.5, 0.244375), (6, 1.0, 0.839656)])
def test_final_variance_of_the_exact_solution(calls, s, expected):
    x, _ = arflow.sample(Gaussian(s, size=448), torch.zeros(1, dtype=torch.long), generator(calls), calls)
    assert abs(x.var().item() / expected - 1) < 0.02


@pytest.mark.parametrize("calls, s, expected", [
    (250, 1.0, 0.990505), (250, 0.5, 0.244375), (250, 2.0, 3.964509),
    (6, 1.0, 0.839656), (6, 0.5, 0.237264), (6, 2.0, 2.861641)])
def test_final_variance_exactly(calls, s, expected, monkeypatch):
    """With draw i one-hot at pixel i the sampler is linear in its draws: the squares add up to the variance."""
    count = iter(range(calls))

    def one_hot(*shape, **_):
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        return F.one_hot(torch.tensor(next(count)), shape[-1] ** 2).double().view(*shape)

    monkeypatch.setattr(torch, "randn", one_hot)
    x, _ = arflow.sample(Gaussian(s, size=16), torch.zeros(1, dtype=torch.long), None, calls)
    assert abs(x.square().sum().item() - expected) < 1e-5


def test_guidance():
    """A22: in the first channels alone; equal labels give the label's velocity at any scale."""
    model, (x, _, y) = network(channels=4), sequence(C=4)
    x, null = x[:, 0], torch.full_like(sequence()[2], model.classes)
    t = torch.full((2, 1), 0.3, dtype=torch.float64)
    conditional = model(x[:, None], t, y)[0][:, 0]
    free = model(x[:, None], t, null)[0][:, 0]
    assert torch.equal(arflow.guided_velocity(model, x, 0.3, y, None, 1, 4)[0], conditional)
    for guided in (3, 4):
        v = arflow.guided_velocity(model, x, 0.3, y, None, 2.5, guided)[0]
        expected = conditional.clone()
        expected[:, :guided] = (free + 2.5 * (conditional - free))[:, :guided]
        torch.testing.assert_close(v, expected, atol=1e-12, rtol=0)
    same = arflow.guided_velocity(model, x, 0.3, null, None, 7.0, 4)[0]
    torch.testing.assert_close(same, free, atol=1e-12, rtol=0)


def test_guided_branches_keep_their_own_states():
    model, (x, _, y) = network(), sequence(B=3)
    y, x = torch.tensor([1, 1, 2]), x[:, 0].clone()
    x[1] = x[0]
    _, states = arflow.guided_velocity(model, x, 0.2, y, None, 2.0, 3)
    S = torch.stack(states)                                                     # rows: 3 conditional, 3 free
    assert S.shape[1] == 6
    torch.testing.assert_close(S[:, 0], S[:, 1], atol=1e-12, rtol=0)
    torch.testing.assert_close(S[:, 3], S[:, 4], atol=1e-12, rtol=0)
    assert (S[:, 0] - S[:, 3]).abs().max() > 1e-3
    order = torch.tensor([2, 0, 1])
    _, moved = arflow.guided_velocity(model, x[order], 0.2, y[order], None, 2.0, 3)
    torch.testing.assert_close(torch.stack(moved)[:, :3], S[:, :3][:, order], atol=1e-12, rtol=0)


def test_each_call_folds_once(monkeypatch):
    """The state after r calls is the fold of A18 over the keys, values and gates of these r calls."""
    model, (x, t, y), seen, states = network(depth=1), sequence(), [], None
    original = arflow.hybrid
    monkeypatch.setattr(arflow, "hybrid", lambda q, k, v, l, *rest: seen.append((k, v, l)) or original(q, k, v, l, *rest))
    S = 0
    for m in range(4):
        _, states = model(x[:, m:m + 1], t[:, m:m + 1], y, states)
        k, v, l = (part[:, 0] for part in seen[m])
        S = l.mean(-1).exp()[..., None, None] * S + torch.einsum("bhnd,bhne->bhde", k, v)
        torch.testing.assert_close(states[0], S, atol=1e-12, rtol=0)
    assert len(seen) == 4


def test_state_size_is_constant():
    model, (x, t, y) = network(depth=3), sequence()
    states = None
    for m in range(4):
        _, states = model(x[:, m:m + 1], t[:, m:m + 1], y, states)
        assert sum(S[0].numel() for S in states) == 3 * 2 * 16 * 16
    torch.testing.assert_close(torch.stack(states), torch.stack(model(x, t, y)[1]), atol=1e-10, rtol=0)


def attention(seed=0, D=32, H=2):
    """One attention module in float64 and unit-scale inputs for it."""
    torch.manual_seed(seed)
    module = arflow.Attention(D, H, True).double()
    x, c = torch.randn(2, 3, 9, D, dtype=torch.float64), torch.randn(2, 3, D, dtype=torch.float64)
    return module, x, c, torch.zeros(2, H, D // H, D // H, dtype=torch.float64)


def test_output_norm_and_scales():
    """A20: each head has unit scale, so that the scales of q, k and v do not matter."""
    module, x, c, S = attention()
    heads = []
    handle = module.out.register_forward_pre_hook(lambda _, args: heads.append(args[0] / F.silu(module.output_gate(x))))
    before = module(x, c, S)[0]
    handle.remove()
    rms = heads[0].unflatten(-1, (2, 16)).square().mean(-1).sqrt()
    assert (rms - 1).abs().max() < 1e-4
    for name, changes in (("q", False), ("k", False), ("v", False), ("output_gate", True), ("decay_gate", True), ("out", True)):
        for a in (0.5, 2.0):
            scaled = copy.deepcopy(module)
            getattr(scaled, name).weight.data *= a
            difference = (scaled(x, c, S)[0] - before).abs().max()
            assert difference > 1e-3 if changes else difference < 1e-4, name


def test_norm_over_the_full_width(monkeypatch):
    """A12: before the heads are split, for v too."""
    module, x, c, S = attention()
    seen = {}
    original = arflow.hybrid
    monkeypatch.setattr(arflow, "hybrid", lambda q, k, v, *rest: seen.update(q=q, k=k, v=v) or original(q, k, v, *rest))
    module(x, c, S)
    for name, scale in (("q", 1.0), ("k", 16 ** -0.5), ("v", 1.0)):
        squares = (seen[name] / scale).square().sum(-1)                         # (B, n, H, N)
        torch.testing.assert_close(squares.sum(2), torch.full_like(squares[:, :, 0], 32.0), rtol=1e-3, atol=0)
        assert (squares - 16).abs().max() > 1                                   # but not d a head


def test_attention_from_its_formulas():
    """A11, A12, A13, A14 and A20 written out token by token, on a small module."""
    torch.manual_seed(0)
    D, H, N, n = 8, 2, 3, 2
    module = arflow.Attention(D, H, True).double()
    x, c = torch.randn(1, n, N, D, dtype=torch.float64), torch.randn(1, n, D, dtype=torch.float64)
    rms = lambda y: y / (y.square().mean() + 1e-6).sqrt()
    q, k, v = (torch.stack([torch.stack([rms(f.weight @ x[0, m, i]) for i in range(N)]) for m in range(n)])
               for f in (module.q, module.k, module.v))
    l = torch.stack([torch.stack([F.logsigmoid(module.decay_gate.weight @ (x[0, m, i] + c[0, m])) / 16 for i in range(N)])
                     for m in range(n)])                                         # (n, N, H)
    split = lambda y: y.view(n, N, H, D // H).transpose(1, 2)[None]
    o = token_loop(split(q), split(k) / math.sqrt(D // H), split(v), l.transpose(1, 2)[None])
    expected = torch.zeros_like(x)
    for m in range(n):
        for i in range(N):
            joined = torch.cat([rms(o[0, m, h, i]) for h in range(H)])
            z = module.output_gate.weight @ x[0, m, i]
            expected[0, m, i] = module.out.weight @ (joined * z * torch.sigmoid(z))
    ours = module(x, c, torch.zeros(1, H, D // H, D // H, dtype=torch.float64))[0]
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


def test_timestep_embedding_positions_and_patches_by_value():
    """A8, A7 and A10 at single places."""
    waves = arflow.timestep_embedding(torch.tensor([[0.5]], dtype=torch.float64))[0, 0]
    for j in (0, 1, 127):
        f = 10_000 ** (-j / 128)
        assert math.isclose(waves[j], math.cos(0.5 * f)) and math.isclose(waves[128 + j], math.sin(0.5 * f))
    table = arflow.sincos_pos_embed(3, 8)                                          # token 5: row 1, column 2
    w = 10_000 ** -0.5
    expected = [math.sin(2), math.sin(2 * w), math.cos(2), math.cos(2 * w), math.sin(1), math.sin(w), math.cos(1), math.cos(w)]
    torch.testing.assert_close(table[5], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    model = network()
    numbers = torch.arange(9 * 2 * 2 * 6, dtype=torch.float64).view(1, 9, 24)
    model.out.register_forward_hook(lambda *_: numbers.view(1, 1, 9, 24))
    v = model(*(torch.zeros(1, 1, 3, 6, 6, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0])))[0]
    for channel, y, x in ((0, 0, 0), (2, 3, 4), (1, 5, 1)):
        token, inner = (y // 2) * 3 + x // 2, (y % 2) * 2 + x % 2
        assert v[0, 0, channel, y, x] == token * 24 + inner * 6 + channel        # row, column, channel


PUBLISHED = {"ARFlow-S/2@256": 34_643_744, "ARFlow-B/2@256": 137_467_424, "ARFlow-L/2@256": 483_301_408,
             "ARFlow-XL/2@256": 712_445_216, "ARFlow-XL/4@256": 712_546_688, "ARFlow-XL/8@256": 713_210_624}


def test_published_counts_follow_the_formula():
    assert len([name for name in arflow.PRESETS if name.startswith("ARFlow")]) == 24
    for preset, count in PUBLISHED.items():
        assert formula(dataclasses.replace(arflow.Config(), **arflow.PRESETS[preset])) == count


def formula(cfg, C=4, K=1000):
    """The parameter count, term by term."""
    D, H, p = cfg.width, cfg.heads, cfg.patch
    stem = D * p * p * C + D + 257 * D + D * D + D + (K + 1) * D
    return stem + cfg.depth * (19 * D * D + D * H + 11 * D) + 2 * D * D + 2 * D + (D + 1) * 2 * p * p * C


@pytest.mark.parametrize("preset", [name for name in arflow.PRESETS if name.startswith("ARFlow")])
def test_parameter_counts(preset):
    cfg = dataclasses.replace(arflow.Config(), **arflow.PRESETS[preset])
    count = formula(cfg)
    with torch.device("meta"):
        model = arflow.ARFlow(cfg, 4, 1000)
    assert sum(p.numel() for p in model.parameters()) == count
    assert not model.pos_embed.requires_grad and model.pos_embed.shape == ((cfg.size // cfg.patch) ** 2, cfg.width)


def test_optimizer_groups():
    model = network()
    decayed, plain = arflow.optimizer(model, config()).param_groups
    assert decayed["weight_decay"] == 0.02 and all(p.ndim >= 2 for p in decayed["params"])
    assert plain["weight_decay"] == 0 and all(p.ndim == 1 for p in plain["params"])
    assert any(p is model.label.weight for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_label_dropout_is_per_sequence():
    """A6: one label a sequence, or none."""
    model, (x1, t, y) = network(), sequence()
    x0 = torch.randn_like(x1)
    x, u = arflow.interpolate(x1, x0, t)
    drop = torch.tensor([True, False])
    labels = torch.tensor([model.classes, y[1]])
    expected = (model(x, t, labels)[0] - u).square().mean()
    torch.testing.assert_close(velocity_loss(model, (x1, y), t, x0, drop), expected, rtol=1e-14, atol=0)


def test_loss_is_the_mean_over_images():
    """A5: all positions alike."""
    model, (x1, t, y) = network(), sequence()
    x0, keep = torch.randn_like(x1), torch.zeros(2, dtype=torch.bool)
    x, u = arflow.interpolate(x1, x0, t)
    errors = (model(x, t, y)[0] - u).square().mean((0, 2, 3, 4))
    value = velocity_loss(model, (x1, y), t, x0, keep)
    torch.testing.assert_close(value, errors.sum() / 4, rtol=1e-13, atol=0)
    one = velocity_loss(model, (x1[:, :1], y), t[:, :1], x0[:, :1], keep)
    torch.testing.assert_close(one, errors[0], rtol=1e-12, atol=0)


def test_unused_outputs_have_no_gradient():
    model, (x1, t, y) = network(), sequence()
    velocity_loss(model, (x1, y), t, torch.randn_like(x1), torch.zeros(2, dtype=torch.bool)).backward()
    rows = model.out.weight.grad.view(2, 2, 6, -1)                              # row, column, 2C channels
    assert not rows[:, :, 3:].any() and rows[:, :, :3].any(-1).all()


# --- What a careless version gets wrong ----------------------------------------

def test_gradient_flows_through_the_state_into_earlier_images():
    model, (x, t, y) = network(), sequence()
    x.requires_grad_()
    grad = torch.autograd.grad(model(x, t, y)[0][:, 3].sum(), x)[0]
    assert all(grad[:, m].abs().max() > 0 for m in range(4))


def test_sequences_hold_different_images_of_one_class_with_own_flips():
    class Images:
        classes, latent = list("abcd"), False
        by_class = [np.arange(k, 400, 4) for k in range(4)]

        def pixels(self, index, device):
            index = torch.as_tensor(index, dtype=torch.float32)[:, None, None, None]
            return torch.cat([index, index + 0.25], -1)                         # left and right column differ

    cfg = config(images=5, batch=200)
    (x1, y), draws = arflow.draw(Images(), cfg, 3, torch.device("cpu"))
    number = x1.amin((2, 3, 4))
    assert all(len(set(row.tolist())) == 5 for row in number)                   # n distinct images
    assert (number % 4 == y[:, None]).all() and len(set(y.tolist())) == 4       # of the label's class
    flipped = x1[:, :, 0, 0, 0] > x1[:, :, 0, 0, 1]
    assert 0.45 < flipped.float().mean() < 0.55 and (flipped.any(1) & ~flipped.all(1)).any()
    assert len({tuple(row.tolist()) for row in draws["t"]}) == 200
    again = arflow.draw(Images(), cfg, 3, torch.device("cpu"))
    assert torch.equal(again[0][0], x1) and not torch.equal(arflow.draw(Images(), cfg, 4, torch.device("cpu"))[0][0], x1)


def test_latents_are_drawn_from_the_posterior_afresh():
    """A1: the noise of the posterior is new at every step."""
    class Latents:
        classes, latent, scale = ["a"], True, 0.5
        by_class, images = [np.arange(6)], np.zeros((6, 2, 3, 3), np.float32)

        def latents(self, index, flip, noise, device):
            assert noise.shape == (len(index), 2, 3, 3) and flip.shape == (len(index),)
            return noise

    cfg = config(images=5, batch=2)
    a, b = (arflow.draw(Latents(), cfg, step, torch.device("cpu"))[0][0] for step in (0, 1))
    assert a.shape == (2, 5, 2, 3, 3) and not torch.equal(a, b) and a.flatten(0, 1).std(0).min() > 0


def test_a_block_from_its_formula():
    """A9: both branches, each with its own shift, scale and gate of the image's condition."""
    torch.manual_seed(0)
    block = arflow.Block(8, 2, "sit", True).double()
    x, c = torch.randn(1, 2, 3, 8, dtype=torch.float64), torch.randn(1, 2, 8, dtype=torch.float64)
    six = (block.modulation.weight @ (c / (1 + (-c).exp()))[0].T + block.modulation.bias[:, None]).T.view(2, 6, 8)
    norm = lambda y: (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    ours = block(x, c, None)[0]
    for m in range(2):
        shift1, scale1, gate1, shift2, scale2, gate2 = six[m]
        y = x[:, m:m + 1]
        y = y + gate1 * block.attention(norm(y) * (1 + scale1) + shift1, c, None)[0]
        y = y + gate2 * block.mlp(norm(y) * (1 + scale2) + shift2)
        torch.testing.assert_close(ours[:, m:m + 1], y, atol=1e-12, rtol=0)


def test_sit_baseline_is_plain_attention():
    model = network(block="sit", images=1)
    names = {name for name, _ in model.blocks[0].attention.named_parameters()}
    assert names == {"qkv.weight", "qkv.bias", "out.weight", "out.bias"}
    module, h = model.blocks[0].attention, torch.randn(2, 1, 9, 32, dtype=torch.float64)
    q, k, v = (part.view(2, 9, 2, 16).transpose(1, 2) for part in (h[:, 0] @ module.qkv.weight.T + module.qkv.bias).chunk(3, -1))
    o = ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).reshape(2, 9, 32)
    expected = o @ module.out.weight.T + module.out.bias
    torch.testing.assert_close(module(h, None, None)[0][:, 0], expected, atol=1e-12, rtol=0)
    count = sum(p.numel() for p in model.blocks[0].parameters())
    assert count == 18 * 32 ** 2 + 15 * 32


@pytest.fixture
def float64():
    """Weights, draws and data in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def saved_state(folder="runs/arflow/demo"):
    return torch.load(f"{folder}/last.pt", weights_only=True)["state"]


def test_training_by_value(float64, tmp_path, monkeypatch):
    """12 steps of train(): A4, A5, labels dropped by sequence, values clipped, AdamW, EMA; rate up, level, down.

    --accumulate 2 changes nothing of it.
    """
    monkeypatch.chdir(tmp_path)
    words = [*TINY, "--clip", "0.02", "--ema", "0.8", "--lr", "0.01", "--steps", "12", "--batch", "4", "--warmup", "3",
             "--cooldown", "0.5", "--label_dropout", "0.5", "--flip", "--log", "5", "--accumulate", "2"]
    cfg = common.cli(arflow.Config, arflow.PRESETS, arflow.__doc__, words)
    dataset = arflow.open_split(cfg, "train")
    torch.manual_seed(common.make_generator(0, 0, "weights").initial_seed())
    model = arflow.ARFlow(cfg, 3, 10)
    weights = list(model.parameters())
    mean = [w.detach().clone() for w in weights]
    first, second, clipped, dropped = [0] * len(weights), [0] * len(weights), 0, 0
    for k in range(1, 13):
        (x1, y), draws = arflow.draw(dataset, cfg, k - 1, torch.device("cpu"))
        t, x0 = draws["t"][:, :, None, None, None], draws["noise"]
        y = torch.where(draws["drop"], 10, y)
        v, _ = model(t * x1 + (1 - t) * x0, draws["t"], y)
        grads = torch.autograd.grad((v - (x1 - x0)).square().mean(), weights)
        rate = 0.01 * min(k / 3, 1, 0.02 + 0.98 * (13 - k) / 6)
        for i, (w, g) in enumerate(zip(weights, grads)):
            clipped += (g.abs() > 0.02).sum()
            first[i] = 0.9 * first[i] + 0.1 * g.clamp(-0.02, 0.02)
            second[i] = 0.95 * second[i] + 0.05 * g.clamp(-0.02, 0.02).square()
            move = first[i] / (1 - 0.9 ** k) / ((second[i] / (1 - 0.95 ** k)).sqrt() + 1e-8)
            w.data -= rate * (move + (0.02 if w.ndim > 1 else 0) * w)
            mean[i] = 0.8 * mean[i] + 0.2 * w.detach()
        dropped += draws["drop"].sum()
    run(*words)
    state = saved_state()
    for (name, w), averaged in zip(model.named_parameters(), mean):
        torch.testing.assert_close(state["model"][name], w.detach(), atol=1e-9, rtol=0)
        torch.testing.assert_close(state["ema"][name], averaged, atol=1e-9, rtol=0)
    assert clipped > 100 and 12 < dropped < 36                                  # each branch was taken


def test_draws_by_value():
    """The order of what a step draws, and what of it each rank gets."""
    class Images:
        classes, latent = list("abc"), False
        by_class = [np.arange(k, 60, 3) for k in range(3)]

        def pixels(self, index, device):
            return torch.as_tensor(index, dtype=torch.float32)[:, None, None, None] + torch.tensor([0.0, 0.5])

    cfg = config(images=2, batch=6, label_dropout=0.4, seed=5)
    (x1, y), draws = arflow.draw(Images(), cfg, 8, torch.device("cpu"))
    g = common.make_generator(5, 8, "data")
    labels = torch.randint(3, (6,), generator=g)
    index = np.stack([np.arange(k, 60, 3)[torch.randperm(20, generator=g)[:2].numpy()] for k in labels.tolist()])
    flip, t, drop = torch.rand(6, 2, generator=g) < 0.5, torch.rand(6, 2, generator=g).sort(1)[0], torch.rand(6, generator=g) < 0.4
    left = torch.as_tensor(index, dtype=torch.float32) + 0.5 * flip
    assert torch.equal(y, labels) and torch.equal(x1[:, :, 0, 0, 0], left)
    assert torch.equal(draws["t"], t) and torch.equal(draws["drop"], drop) and 0 < drop.sum() < 6
    noise = torch.randn(6, 2, 1, 1, 2, generator=common.make_generator(5, 8, "noise"))
    assert torch.equal(draws["noise"], noise)


def test_draws_are_independent():
    """What one option decides changes nothing else; all differ by step and by seed; none knows another."""
    class Images:
        classes, latent = list("abcd"), False
        by_class = [np.arange(k, 400, 4) for k in range(4)]

        def pixels(self, index, device):
            return torch.as_tensor(index, dtype=torch.float32)[:, None, None, None] + torch.tensor([0.0, 0.5])

    def drawn(step=0, **changes):
        (x1, y), draws = arflow.draw(Images(), config(images=3, **{"batch": 50, **changes}), step, torch.device("cpu"))
        left, right = x1[:, :, 0, 0].unbind(-1)
        return {"image": torch.minimum(left, right), "flip": left > right, "y": y, **draws}

    base = drawn()
    for changes, changed in ((dict(label_dropout=0.9), "drop"), (dict(flip=False), "flip")):
        other = drawn(**changes)
        assert [name for name in base if not torch.equal(base[name], other[name])] == [changed]
    assert (drawn(label_dropout=0.9)["drop"] >= base["drop"]).all() and not drawn(flip=False)["flip"].any()
    for changes in (dict(step=1), dict(seed=1)):
        other = drawn(**changes)
        assert not any(torch.equal(base[name], other[name]) for name in base)
    many = drawn(batch=20_000, label_dropout=0.5)
    columns = [many["y"], many["drop"], *many["t"].T, *many["flip"].T, *many["noise"].flatten(2)[..., 0].T]
    r = torch.corrcoef(torch.stack([column.double() for column in columns])).abs()
    r[2:5, 2:5] = 0                                                             # sorted times know one another
    assert (r - torch.eye(len(columns)).double() * r.diagonal()).max() < 0.03


def test_a_run_reports_its_averaged_weights(tmp_path, monkeypatch, capsys):
    """Pictures, result.json, nearest.png and --sample, by value: whose weights, which split, which half."""
    monkeypatch.chdir(tmp_path)
    class Ruler(torch.nn.Module):
        """Features are pixels, and the brightest of ten is the class: it tells every picture from another."""

        def features(self, x):
            return x.flatten(1)[:, :64]

        def forward(self, x):
            return self.features(x)[:, 20:30]

    ruler, asked, drawn, shown = Ruler(), [], {}, {}
    first = lambda split: split.pixels(np.arange(9)).sum().item()
    monkeypatch.setattr(common, "judge", lambda split, role: asked.append((first(split), role)) or ruler)
    monkeypatch.setattr(arflow, "measured", lambda cfg: True)
    original = arflow.pictures
    monkeypatch.setattr(arflow, "pictures", lambda folder, snapshots, labels, names: drawn.update(
        {len(drawn): (snapshots, saved_state()["ema"])}) or original(folder, snapshots, labels, names))
    columns = common.columns_png
    monkeypatch.setattr(common, "columns_png", lambda path, images, **k: shown.update({path.name: images}) or columns(path, images, **k))
    words = [*TINY, "--steps", "4", "--lr", "0.05", "--ema", "0.5", "--save", "2", "--count", "70"]
    cfg = common.cli(arflow.Config, arflow.PRESETS, arflow.__doc__, words)
    run(*words)
    saved = torch.load("runs/arflow/demo/last.pt", weights_only=True)
    assert saved["step"] == 4 and saved["classes"][6] == "star" and saved["state"].keys() == {"model", "ema", "opt"}
    model = arflow.ARFlow(cfg, 3, 10)
    model.load_state_dict(drawn[0][1])                                          # of step 2, for the preview
    assert torch.equal(drawn[0][0], arflow.sample_many(model, cfg, np.arange(20) % 10)[1]) and len(drawn) == 2
    model.load_state_dict(saved["state"]["ema"])
    assert not torch.equal(saved["state"]["model"]["out.weight"], model.out.weight)
    labels = np.arange(70) % 10
    images, snapshots = arflow.sample_many(model, cfg, labels)
    assert torch.equal(drawn[1][0], snapshots)

    train, test = arflow.open_split(cfg, "train"), arflow.open_split(cfg, "test", 140)
    assert asked == [(first(arflow.open_split(cfg, "judge")), "ruler")] * 2     # before training and behind it
    real = test.pixels(np.arange(140))
    features, right = ruler.features, lambda x, y: (ruler(x).argmax(1) == torch.as_tensor(y)).double().mean().item()
    with torch.no_grad():
        wanted = {"N": 70, "accuracy": right(images, labels), "real": right(real[:70], test.labels[:70]),
                  "distance": common.frechet(features(images), features(real[:70])),
                  "floor": common.frechet(features(real[70:]), features(real[:70]))}
    result = json.loads(Path("runs/arflow/demo/result.json").read_text())
    assert result == pytest.approx(wanted, rel=1e-6) and result["floor"] > 0
    said = capsys.readouterr().out
    assert f"accuracy {wanted['accuracy']:.3f}, of as many test images {wanted['real']:.3f}" in said
    pixels = train.pixels(np.arange(len(train))).flatten(1)
    near = pixels[torch.cdist(images[:10].flatten(1), pixels).argmin(1)].view(10, 3, 8, 8)
    assert torch.equal(torch.as_tensor(shown["nearest.png"]), torch.stack([images[:10], near], 1))

    run("--sample", "runs/arflow/demo/last.pt", "--export", "out.npz")
    exported = torch.as_tensor(np.load("out.npz")["arr_0"]).permute(0, 3, 1, 2)
    assert torch.equal(exported, torch.as_tensor(common.to_uint8(images)))


def test_learning_rate_is_constant_unless_asked():
    cfg = config(steps=100)
    assert {arflow.learning_rate(cfg, step) for step in range(100)} == {cfg.lr}
    short = config(steps=100, warmup=10, cooldown=0.5, lr=1.0)
    rates = [arflow.learning_rate(short, step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[50] == 1.0 and 0.02 < rates[-1] < 0.05
    assert all(a >= b for a, b in zip(rates[50:], rates[51:]))


def test_conversion_writes_a_checkpoint_that_sample_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = official_weights()
    args = argparse.Namespace(model="ARFlow")                                   # as the authors' train.py pickles it
    torch.save({"model": {}, "ema": weights, "opt": {}, "args": args}, "theirs.pt")
    official.main(["arflow", "theirs.pt", "official.pt"])
    run("--sample", "official.pt", "--count", "4", "--num_steps", "2")
    pack = np.load("samples/latents.npz")
    assert pack["latents"].shape == (4, 4, 6, 6) and math.isclose(pack["scale"], 0.18215, rel_tol=1e-6)


# --- Command line --------------------------------------------------------------

def run(*argv):
    """arflow.py with these arguments, in this process."""
    cfg = common.cli(arflow.Config, arflow.PRESETS, arflow.__doc__, list(argv))
    common.launch(arflow.main, cfg, arflow.check, arflow.prepare)


TINY = ["--size", "8", "--width", "16", "--depth", "1", "--heads", "2", "--steps", "2", "--batch", "2", "--num_steps", "2"]


@pytest.mark.parametrize("argv, words", [
    (["--size", "9"], "--patch 2: must divide --size 9"),
    (["--width", "66", "--heads", "4"], "--heads 4: must divide --width 66"),
    (["--width", "18"], "multiple of 4"),
    (["--block", "sit"], "--images 1"),
    (["--block", "what"], "invalid choice"),
    (["--images", "0"], "--images 0"),
    (["--images", "3000"], "has only 2000"),
    (["--num_steps", "1"], "must be >= 2"),
    (["--width", "0"], "--width 0"),
    (["--size", "-4"], "--size -4"),
    (["--cfg_scale", "inf"], "--cfg_scale inf: must be >= 0"),
    (["--cfg_channels", "0"], "must be >= 1"),
    (["--width", "1000000", "--heads", "1"], "bytes to train"),
    (["--classes", "3"], "--sample"),
    (["--label_dropout", "1.5"], "in [0, 1]"),
    (["--export", "x.npz"], "--sample"),
    (["--out", "here"], "--sample"),
    (["--cfg_scale", "nan"], "--cfg_scale nan: must be >= 0"),
    (["--ema", "nan"], "--ema nan"),
    (["--clip", "-1"], "--clip -1"),
    (["--data", "npz:nowhere.npz"], "nowhere.npz"),
    (["--data", "latents:nowhere.npz"], "nowhere.npz"),
    (["--sample", "nowhere.pt"], "nowhere.pt"),
    (["--batch", "3", "--gpus", "2"], "multiple of 2"),
])
def test_bad_input_is_one_line_and_exit_2(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert words in refused(run, argv, capsys) and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of one tiny finished run."""
    where = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        run(*TINY)
    return where / "runs" / "arflow" / "demo"


def test_a_run_leaves_its_folder(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "arflow.py", "log.jsonl", "loss.svg", "last.pt", "samples.png", "trajectory.png",
            "denoising.png"} <= names
    assert (trained / "arflow.py").read_text() == (ROOT / "arflow.py").read_text()


def test_sample_writes_grids_and_the_export(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = (trained / "last.pt").read_bytes()
    kept = sorted(trained.iterdir())
    run("--sample", str(trained / "last.pt"), "--classes", "3,5", "--count", "6", "--seed", "4", "--export", "out.npz")
    images = np.load("out.npz")["arr_0"]                                        # the ADM suite's name and layout
    assert images.shape == (6, 8, 8, 3) and images.dtype == np.uint8
    assert sorted(trained.iterdir()) == kept and [path.name for path in tmp_path.iterdir()] == ["out.npz"]
    run("--sample", str(trained / "last.pt"), "--classes", "3,5", "--count", "6", "--out", "here")
    assert sorted(trained.iterdir()) == kept
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"samples.png", "trajectory.png", "denoising.png"}
    run("--sample", str(trained / "last.pt"), "--classes", "3,5", "--count", "6")
    assert {path.name for path in (trained / "samples").iterdir()} == {path.name for path in Path("here").iterdir()}
    first = images.copy()
    for seed, same in (("4", True), ("5", False)):
        run("--sample", str(trained / "last.pt"), "--classes", "3,5", "--count", "6", "--seed", seed, "--export", "b.npz")
        assert np.array_equal(np.load("b.npz")["arr_0"], first) == same
    assert (trained / "last.pt").read_bytes() == before


def test_export_to_a_folder_writes_pngs(trained, tmp_path, monkeypatch):
    """For pytorch-fid, clean-fid and torch-fidelity; any path but an .npz is a folder."""
    monkeypatch.chdir(tmp_path)
    run("--sample", str(trained / "last.pt"), "--count", "5", "--export", "pictures")
    files = sorted(Path("pictures").iterdir())
    assert [file.name for file in files] == [f"{i:06}.png" for i in range(5)] and list(tmp_path.iterdir()) == [Path("pictures").resolve()]
    assert all(file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for file in files)


def test_an_export_is_the_same_in_any_number_of_blocks(trained, tmp_path, monkeypatch):
    """The first images of a longer export are those of a shorter one of whole blocks."""
    monkeypatch.chdir(tmp_path)
    for count in (100, 203):
        run("--sample", str(trained / "last.pt"), "--count", str(count), "--export", f"{count}.npz")
    short, long = np.load("100.npz")["arr_0"], np.load("203.npz")["arr_0"]
    assert len(long) == 203 and np.array_equal(long[:100], short)


def test_class_names_travel_from_the_data_into_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez("own.npz", images=images, labels=np.arange(40) // 2 % 2, class_names=np.array(["cat", "dog"]))
    run(*TINY, "--data", "npz:own.npz")
    seen = []
    monkeypatch.setattr(arflow, "pictures", lambda folder, snapshots, labels, names: seen.append(list(names)))
    run("--sample", "runs/arflow/demo/last.pt", "--count", "2")
    assert seen == [["cat", "dog"]]


def test_the_animation_begins_with_its_result(tmp_path, monkeypatch):
    """A viewer that shows a still shows the first frame."""
    drawn = {}
    monkeypatch.setattr(common, "png", lambda path, picture, **_: drawn.update({path.name: np.asarray(picture)}))
    snapshots = torch.linspace(-1, 1, 9)[None, :, None, None, None].expand(6, 9, 3, 8, 8)
    arflow.pictures(tmp_path, snapshots, np.arange(6) % 2, ["a", "b"])
    brightness = drawn["denoising.png"][:, -20:].reshape(12, -1).mean(1)
    assert (np.diff(brightness[4:]) > 0).all() and (brightness[:4] > brightness[4:].max()).all()


@pytest.mark.parametrize("state", [{}, {"ema": []}, {"ema": {"label.weight": torch.ones(3, 2)}}, {"model": {}}])
def test_a_checkpoint_without_averaged_weights_is_one_line(state, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved = torch.load(trained / "last.pt", weights_only=True)
    torch.save({**saved, "state": state}, "broken.pt")
    assert "broken.pt: field state" in refused(run, ["--sample", "broken.pt"], capsys)


@pytest.mark.parametrize("argv, words", [
    (["--preset", "small"], "--preset small"), (["--width", "32"], "--width 32"), (["--classes", "10"], "0 to 9"),
    (["--classes", "a"], "--classes a"), (["--classes", "3,,5"], "--classes 3,,5"), (["--cfg_scale", "nan"], "--cfg_scale nan")])
def test_sample_refuses_what_contradicts_the_checkpoint(argv, words, trained, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--sample", str(trained / "last.pt"), *argv)
    assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("argv", [
    ["--images", "1"], ["--block", "sit", "--images", "1"], ["--no-query_decay"], ["--context", "reset"],
    ["--flip"], ["--cfg_scale", "1"], ["--cfg_channels", "2"], ["--bf16"], ["--warmup", "1"]])
def test_every_option_trains(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*TINY, *argv)
    assert (tmp_path / "runs/arflow/demo/samples.png").exists()


@pytest.mark.parametrize("changes, expected", [
    ({}, ("carry", 3)), (dict(context="reset"), ("reset", 3)), (dict(images=1), ("reset", 3)),
    (dict(data="latents:x"), ("carry", 3)), (dict(data="latents:x", cfg_channels=4), ("carry", 4))])
def test_the_sampler_gets_the_context_and_the_guided_channels(changes, expected, monkeypatch):
    seen = []
    original = arflow.sample
    monkeypatch.setattr(arflow, "sample", lambda m, y, g, num_steps, cfg_scale, cfg_channels, context: seen.append(
        (context, cfg_channels)) or original(m, y, g, num_steps, cfg_scale, cfg_channels, context))
    arflow.sample_many(network(channels=4).float(), config(num_steps=2, **changes), np.arange(3))
    assert seen == [expected]


def test_switches_change_the_network_and_the_samples():
    x, t, y = sequence()
    assert not torch.equal(network()(x, t, y)[0], network(query_decay=False)(x, t, y)[0])
    model = network().float()
    carried, reset = (arflow.sample(model, y, generator(0), 4, context=c)[0] for c in ("carry", "reset"))
    assert (carried - reset).abs().max() > 1e-3


@pytest.mark.parametrize("total, count, N", [(1400, 200, 70), (1400, 1, 1), (600, 200, 30), (20, 50, 1), (10, 50, 0)])
def test_a_frechet_distance_is_left_out_aloud_where_there_is_too_little(total, count, N, tmp_path, monkeypatch, capsys):
    """64 features have no covariance below 65 samples; accuracy is measured all the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "judge", lambda *_: common.Judge(3, 24, 2).eval())      # only N matters here
    images = np.random.default_rng(0).integers(0, 256, (total, 8, 8, 3), dtype=np.uint8)
    np.savez("own.npz", images=images, labels=np.arange(total) // 2 % 2)
    cfg = config(size=8, data="npz:own.npz", count=count, steps=200, name="few")
    monkeypatch.setattr(arflow, "sample_many", lambda model, cfg, labels: (
        torch.randn(count, 3, 8, 8), torch.randn(min(count, 100), 9, 3, 8, 8)))
    arflow.prepare(cfg)
    said = capsys.readouterr().out
    assert f"test {total // 10}" in said
    arflow.finish(common.Run(cfg), None, cfg, arflow.open_split(cfg, "train"))
    result = json.loads(Path("runs/arflow/few/result.json").read_text())
    assert result["N"] == N and 0 <= result["accuracy"] <= 1
    if N < 65:
        assert result["distance"] is result["floor"] is None
        assert "needs 65 samples and 130 test images" in said
        assert "class accuracy" in (told := capsys.readouterr().out) and "toy Frechet" not in told
    else:
        assert math.isfinite(result["distance"] + result["floor"]) and "no Frechet" not in said


def test_a_run_of_few_pictures_ends_with_what_can_be_measured(tmp_path, monkeypatch, capsys):
    """20 pictures in all, one sample: trained, judged and drawn, without a distance."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "judge", lambda *_: common.Judge(3, 24, 2).eval())
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez("own.npz", images=images, labels=np.arange(20) % 2)
    monkeypatch.setattr(arflow, "measured", lambda cfg: True)
    run(*TINY, "--data", "npz:own.npz", "--count", "1")
    said = capsys.readouterr().out
    assert "no Frechet distance" in said and "class accuracy" in said and "toy Frechet" not in said
    assert json.loads(Path("runs/arflow/demo/result.json").read_text())["distance"] is None


def test_too_few_pictures_for_the_ruler_are_one_line_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("own.npz", images=np.zeros((10, 8, 8, 3), np.uint8), labels=np.arange(10) % 5)
    words = [*TINY, "--data", "npz:own.npz", "--images", "1", "--steps", "200"]
    assert "9 images; the ruler needs 10" in refused(run, words, capsys)
    assert not Path("runs").exists()


def test_target_decides_the_exit_code(tmp_path, monkeypatch):
    assert 0.5 < arflow.TARGET < 1
    monkeypatch.chdir(tmp_path)
    cfg = common.cli(arflow.Config, arflow.PRESETS, arflow.__doc__, [])
    monkeypatch.setattr(arflow, "sample_many", lambda *_: (torch.zeros(200, 3, 16, 16), torch.zeros(100, 9, 3, 16, 16)))
    monkeypatch.setattr(common, "judge", lambda *_: None)
    monkeypatch.setattr(common, "accuracy", lambda *_: 1.0)
    small = arflow.open_split(cfg, "test", 400)
    monkeypatch.setattr(arflow, "open_split", lambda *_: small)
    for accuracy, changed, trained, code in ((0.1, False, True, 1), (0.99, False, True, 0), (0.1, True, True, 0), (0.1, False, False, 0)):
        monkeypatch.setattr(common.Run, "trained", trained)
        result = dict(N=1, accuracy=accuracy, distance=0.0, floor=0.0)
        monkeypatch.setattr(common, "measure_samples", lambda *_: result)  # noqa: B023
        now = dataclasses.replace(cfg, **(dict(seed=1) if changed else {}))
        assert arflow.finish(common.Run(now), None, now, small) == code


@pytest.mark.parametrize("save, drawn", [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3, 4])])
def test_pictures_on_the_way_and_at_the_end(save, drawn, tmp_path, monkeypatch):
    """At every checkpoint but the last, and once at the end."""
    monkeypatch.chdir(tmp_path)
    steps = []
    monkeypatch.setattr(arflow, "draw_pictures", lambda run, *_: steps.append(run.finished) or (None, None))
    log = common.Run.log
    monkeypatch.setattr(common.Run, "log", lambda self, step, **values: setattr(self, "finished", step + 1) or log(self, step, **values))
    run(*TINY, "--steps", "4", "--save", str(save))
    assert steps == drawn


def test_the_exit_code_is_that_of_the_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(arflow, "finish", lambda *_: seen.append(common.Run.trained) or 7)
    cfg = common.cli(arflow.Config, arflow.PRESETS, arflow.__doc__, TINY)
    for resume in (False, True):
        with pytest.raises(SystemExit) as stop:
            common.launch(arflow.main, dataclasses.replace(cfg, resume=resume), arflow.check, arflow.prepare)
        assert stop.value.code == 7
    assert seen == [True, False]


def test_ranks_share_the_samples(trained, tmp_path, monkeypatch, capsys):
    """Blocks of 100, each of its own generator; ranks behind the first make theirs and write nothing."""
    model, cfg, labels = network().float(), config(num_steps=2, seed=3), np.arange(250) % 5
    blocks = [images for images, _ in arflow.sample_blocks(model, cfg, labels)]
    assert [len(images) for images in blocks] == [100, 100, 50]
    for first, images in zip((0, 100, 200), blocks):
        g = common.make_generator(3, first, "sample")
        alone, _ = arflow.sample(model, torch.as_tensor(labels[first:first + 100]), g, 2, 1.5)
        assert torch.equal(alone, images)
    assert not capsys.readouterr().err                                          # no bar where no terminal is
    monkeypatch.chdir(tmp_path)
    cfg = common.cli(arflow.Config, arflow.PRESETS, arflow.__doc__,
                     ["--sample", str(trained / "last.pt"), "--gpus", "2", "--count", "130", "--out", "here"])
    assert cfg.gpus == 2
    made = []
    monkeypatch.setattr(common, "rank", lambda: 1)
    monkeypatch.setattr(common, "share_blocks", lambda make, count, size: (
        made.append((i, min(count, i + size))) or make(*made[-1]) for i in range(0, count, size)))
    for words, wanted in ({}, [(0, 100)]), ({"export": "b.npz", "out": ""}, [(0, 100), (100, 130)]):
        arflow.sample_checkpoint(dataclasses.replace(cfg, **words))
        assert made == wanted and not [path for path in tmp_path.rglob("*") if path.is_file()]
        made.clear()


def test_a_run_starts_from_other_weights(trained, tmp_path, monkeypatch, capsys):
    """--init: the averaged weights, but for a table of other classes and the scale of other data."""
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez("own.npz", images=images, labels=np.arange(40) // 2 % 2)
    seen, optimizer = [], arflow.optimizer
    monkeypatch.setattr(arflow, "optimizer", lambda model, cfg: seen.append(copy.deepcopy(model)) or optimizer(model, cfg))
    theirs = str(trained / "last.pt")
    run(*TINY, "--data", "npz:own.npz", "--init", theirs)
    weights = saved_state(trained)["ema"]
    own = seen[0].state_dict()
    assert len(own["label.weight"]) == 3 and all(torch.equal(own[name], weights[name]) for name in own if name != "label.weight")
    model, averaged = (saved_state()[name] for name in ("model", "ema"))
    assert not torch.equal(model["out.weight"], weights["out.weight"]) and averaged["label.weight"].shape == (3, 16)
    for words, said in ((["--width", "32"], "does not fit"), (["--init", "own.npz"], "own.npz")):
        assert said in refused(run, [*TINY, "--name", "other", "--init", theirs, *words], capsys)
    assert [path.name for path in Path("runs/arflow").iterdir()] == ["demo"]


def test_no_checkpoint_runs_code(trained, tmp_path, monkeypatch, capsys):
    """A file whose loading would leave a mark leaves none, whichever flag names it."""
    class Marks:
        def __reduce__(self):
            return Path.touch, (tmp_path / "marked",)

    monkeypatch.chdir(tmp_path)
    saved = torch.load(trained / "last.pt", weights_only=True)
    folder = shutil.copytree(trained, "runs/arflow/demo")
    for hostile in ({**saved, "state": {**saved["state"], "ema": Marks()}}, Marks()):
        torch.save(hostile, folder + "/last.pt")
        for words in (["--sample", "runs/arflow/demo/last.pt"], ["--resume", "--steps", "4"],
                      [*TINY, "--name", "b", "--init", "runs/arflow/demo/last.pt"]):
            assert "last.pt" in refused(run, words, capsys)
    assert not (tmp_path / "marked").exists()
    torch.load(folder + "/last.pt", weights_only=False)                         # a careless reader would have left it
    assert (tmp_path / "marked").exists()


def test_a_latent_scale_may_have_one_number_a_channel(tmp_path, monkeypatch):
    """Stored with the weights; samples are divided by it, channel by channel, and carry it."""
    monkeypatch.chdir(tmp_path)
    scale = np.array([0.5, 2.0, 1.0, 4.0], np.float32)
    cfg = common.cli(arflow.Config, arflow.PRESETS, arflow.__doc__, [*TINY, "--size", "4", "--data", "latents:x"])
    model = arflow.ARFlow(cfg, 4, 2, scale)
    state = {"method": "arflow", "config": dataclasses.asdict(cfg), "step": 0, "sums": {},
             "state": {"ema": model.state_dict()}}
    torch.save(state, "scaled.pt")
    run("--sample", "scaled.pt", "--count", "4")
    pack = np.load("samples/latents.npz")
    assert np.array_equal(pack["scale"], scale)
    images, _ = arflow.sample_many(model, dataclasses.replace(cfg, count=4), np.arange(4) % 2)
    assert np.allclose(pack["latents"] * scale[:, None, None], images.numpy(), atol=1e-2)


def test_latents_train_sample_and_come_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    g = np.random.default_rng(0)
    pack = {name: g.normal(size=(20, 4, 4, 4)).astype(np.float16) for name in ("latents", "logvar", "latents_flip", "logvar_flip")}
    np.savez("pack.npz", labels=np.arange(20) % 2, scale=np.float32(0.5), **pack)
    run(*TINY, "--data", "latents:pack.npz", "--size", "4")
    run("--sample", "runs/arflow/demo/last.pt", "--count", "4")
    back = np.load("runs/arflow/demo/samples/latents.npz")
    assert back["latents"].shape == (4, 4, 4, 4) and back["scale"] == 0.5 and back["labels"].tolist() == [0, 1, 0, 1]
    np.savez("other.npz", labels=np.arange(20) % 2, scale=np.float32(0.25), **pack)
    run(*TINY, "--data", "latents:other.npz", "--size", "4", "--init", "runs/arflow/demo/last.pt", "--name", "other")
    assert saved_state("runs/arflow/other")["ema"]["latent_scale"] == 0.25      # of the data, not of the weights
