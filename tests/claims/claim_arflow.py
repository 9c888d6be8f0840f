"""ARFlow's claims at demo scale: guidance, memory, its price, the baselines, the abstract's two ablations.

All arms of a row see the same number of images a step, the same steps, seeds and sampler. The ablations wrap the
batch or replace the attention core here, so that arflow.py stays the paper.
"""

import copy
import dataclasses
import json
import time

import arflow
import common
from tests import ROOT
from tests.claims import seeds, spread

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

STEPS = {"quick": 1500, "full": 4400}
SAMPLES = {"quick": 200, "full": 1000}
SCALES = (1.0, 1.5, 3.0)                             # of guidance
CACHE = {}                                           # trained weights of this process, by their settings


def config(length, seed, **changes):
    """The demo's configuration with the steps of a quick or a full look."""
    rate = {"lr": 3e-3, "warmup": 50, "ema": 0.99}                       # of the demo when the figures were stored
    fields = {**arflow.PRESETS["demo"], **rate, "steps": STEPS[length], "seed": seed, **changes}
    return dataclasses.replace(arflow.Config(), **fields)


def fit(cfg, wrap=None, core=None):
    """arflow.train without a folder: the averaged weights. wrap(batch, draws, dataset, cfg, step) changes the data,
    core replaces arflow.hybrid; both are named functions."""
    key = (repr(cfg), wrap, core)
    if key in CACHE:
        return CACHE[key]
    original = arflow.hybrid
    arflow.hybrid = core or original
    device = common.device_of(cfg)
    dataset = arflow.open_split(cfg, "train")
    torch.manual_seed(common.make_generator(cfg.seed, 0, "weights").initial_seed())
    model = arflow.ARFlow(cfg, 3, len(dataset.classes)).to(device)
    ema, opt = copy.deepcopy(model).requires_grad_(False), arflow.optimizer(model, cfg)
    for step in range(cfg.steps):
        batch, draws = arflow.draw(dataset, cfg, step, device)
        if wrap:
            batch, draws = wrap(batch, draws, dataset, cfg, step)
        common.set_learning_rate(opt, arflow.learning_rate(cfg, step))
        opt.zero_grad()
        arflow.loss(model, batch, draws)[0].backward()
        nn.utils.clip_grad_value_(model.parameters(), cfg.clip)
        opt.step()
        common.ema_update(ema, model, cfg.ema)
    arflow.hybrid = original
    CACHE[key] = ema
    return ema


def judged(model, cfg, length, core=None, **changes):
    """Class accuracy and toy Frechet distance of fresh samples."""
    cfg = dataclasses.replace(cfg, count=SAMPLES[length], **changes)
    key = (id(model), repr(cfg), core)                                   # CACHE keeps the model: its id stays its own
    if key not in CACHE:
        labels, original = np.arange(cfg.count) % 10, arflow.hybrid
        arflow.hybrid = core or original
        images, _ = arflow.sample_many(model, cfg, labels)
        arflow.hybrid = original
        ruler = common.judge(arflow.open_split(cfg, "judge"), "ruler")
        test = arflow.open_split(cfg, "test", 2 * cfg.count)
        CACHE[key] = common.measure_samples(images, labels, ruler, test)
    return CACHE[key]


def both(results):
    """'accuracy a, distance b' of several seeds' results."""
    return f"accuracy {spread([r['accuracy'] for r in results])}, FD {spread([r['distance'] for r in results])}"


def mean_and_deviation(values):
    """What a bar shows of several seeds."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def guidance(scale):
    """CFG's effect: class accuracy rises, the distance falls and then rises."""
    results = {}
    for seed in seeds(scale):
        cfg = config(scale, seed)
        model = fit(cfg)
        for s in SCALES:
            results.setdefault(f"CFG {s:g}", []).append(judged(model, cfg, scale, cfg_scale=s))
    if scale == "full":
        cfg = config(scale, 0)
        results["CFG 1.5, 250 calls"] = [judged(fit(cfg), cfg, scale, cfg_scale=1.5, num_steps=250)]
    accuracy = {name: np.mean([r["accuracy"] for r in rs]) for name, rs in results.items()}
    for unit, factor, file in (("accuracy", 100, "arflow_guidance"), ("distance", 1, "arflow_guidance_distance")):
        points = [[factor * r[unit] for r in results[f"CFG {s:g}"]] for s in SCALES]
        means, deviations = zip(*map(mean_and_deviation, points))
        ylabel = {"accuracy": "class accuracy, %", "distance": "toy Frechet distance"}[unit]
        common.line_chart(ROOT / f"assets/{file}.svg", {"ARFlow demo": (SCALES, means, deviations)},
                          "ARFlow demo: what guidance does to the samples", "guidance scale", ylabel)
    floor = np.mean([r["floor"] for rs in results.values() for r in rs])
    return {"claim": "guidance 1.5 improves samples strongly", "paper": "FID 14.08 to 4.34 (128 px), 6.63 to 1.96 (256 px)",
            "measured": "; ".join(f"{name}: {both(rs)}" for name, rs in results.items()) + f"; floor {floor:.1f}",
            "verdict": "shown" if accuracy["CFG 1"] < accuracy["CFG 1.5"] < accuracy["CFG 3"] else
            "not shown at this scale", "numbers": results}


# --- The state carries information ---------------------------------------------

def noise_batch(cfg, step, stream="data"):
    """x1 white noise, the SAME for all images of a sequence: only memory can beat the memoryless bound."""
    g = common.make_generator(cfg.seed, step, stream)
    x1 = torch.randn(cfg.batch, 1, 1, cfg.size, cfg.size, generator=g).expand(-1, cfg.images, -1, -1, -1)
    t = torch.rand(cfg.batch, cfg.images, generator=g).sort(1).values
    x0 = torch.randn(x1.shape, generator=g)
    return x1, t, x0


def mechanism(scale):
    """The loss of positions 2 to 5 against its two analytic bounds."""
    losses = []
    for seed in seeds(scale):
        cfg = dataclasses.replace(arflow.Config(), size=4, patch=1, width=64, depth=3, heads=2, images=5, batch=32, lr=2e-3,
                                  steps={"quick": 800, "full": 4000}[scale], seed=seed, warmup=50, cooldown=0.3)
        torch.manual_seed(seed)
        model = arflow.ARFlow(cfg, 1, 1)
        opt, y = arflow.optimizer(model, cfg), torch.ones(cfg.batch, dtype=torch.long)
        for step in range(cfg.steps):
            x1, t, x0 = noise_batch(cfg, step)
            common.set_learning_rate(opt, arflow.learning_rate(cfg, step))
            opt.zero_grad()
            arflow.loss(model, (x1, y), {"t": t, "noise": x0, "drop": y > 0})[0].backward()
            nn.utils.clip_grad_value_(model.parameters(), cfg.clip)
            opt.step()
        test = dataclasses.replace(cfg, batch=2000)
        x1, t, x0 = noise_batch(test, 0, "eval")
        x, u = arflow.interpolate(x1, x0, t)
        with torch.no_grad():
            y = torch.ones(2000, dtype=torch.long)
            carried = (model(x, t, y)[0] - u).square().mean((0, 2, 3, 4))
            alone = torch.stack([(model(x[:, m:m + 1], t[:, m:m + 1], y)[0] - u[:, m:m + 1]).square().mean() for m in range(5)])
        s = (t / (1 - t)) ** 2
        memoryless = (1 / ((1 + s) * (1 - t) ** 2)).mean(0)
        memory = (1 / ((1 + s.cumsum(1)) * (1 - t) ** 2)).mean(0)
        losses.append([curve.tolist() for curve in (carried, memoryless, memory, alone)])
    mean = np.mean(losses, 0)
    common.line_chart(ROOT / "assets/arflow_mechanism.svg", {
        name: (list(range(1, 6)), curve.tolist()) for name, curve in
        zip(("measured", "best without memory", "best with memory"), mean)},
        "the same white noise, seen five times", "position in the sequence", "velocity loss")
    below = mean[0][1:] < mean[1][1:]
    return {"claim": "earlier images reach later ones through S (mechanism test, analytic bounds)", "paper": "no figure",
            "measured": "positions 2-5: " + ", ".join(f"{a:.3f}" for a in mean[0][1:]) + " against memoryless "
            + ", ".join(f"{a:.3f}" for a in mean[1][1:]) + " and with memory " + ", ".join(f"{a:.3f}" for a in mean[2][1:])
            + f" (n = {len(losses)})", "verdict": "shown" if below.all() else "not shown at this scale",
            "numbers": {"order": "measured, memoryless, memory, state reset", "losses": losses}}


def carry_or_reset(scale):
    """Earlier denoising steps matter: the same weights, S carried or reset at every call."""
    results = {"carry": [], "reset": []}
    for seed in seeds(scale):
        cfg = config(scale, seed)
        for context in results:
            results[context].append(judged(fit(cfg), cfg, scale, context=context))
    gain = np.array([a["accuracy"] - b["accuracy"] for a, b in zip(results["carry"], results["reset"])])
    clear = gain.mean() > max(0.02, 2 * gain.std())
    return {"claim": "carrying S along the trajectory helps", "paper": "no figure", "measured":
            "; ".join(f"{name}: {both(rs)}" for name, rs in results.items()),
            "verdict": "shown" if clear else "not shown at this scale", "numbers": results}


# --- Price ---------------------------------------------------------------------

def seconds(function, repeats=5):
    """The fastest of several runs, after one to warm up."""
    function()
    best = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best.append(time.perf_counter() - start)
    return min(best)


def cost(scale):
    """Time of the attention core as the number of images grows: the chunk loop and block-causal softmax."""
    torch.manual_seed(0)
    N, d, counts = 64, 64, (1, 2, 4, 8, 16, 32, 64)
    times = {"hybrid chunk loop": [], "block-causal softmax": []}
    with torch.no_grad():
        for n in counts:
            q, k, v = torch.randn(3, 1, n, 1, N, d)
            log_decay, S = -torch.rand(1, n, 1, N) / 16, torch.zeros(1, 1, d, d)
            image = torch.arange(n * N) // N
            mask = image[:, None] >= image
            flat = [x.transpose(1, 2).flatten(2, 3) for x in (q, k, v)]
            times["hybrid chunk loop"].append(seconds(lambda: arflow.hybrid(q, k, v, log_decay, S)))
            times["block-causal softmax"].append(seconds(lambda: F.scaled_dot_product_attention(*flat, attn_mask=mask)))
    slopes = {name: np.polyfit(np.log(counts[4:]), np.log(ts[4:]), 1)[0] for name, ts in times.items()}
    common.line_chart(ROOT / "assets/arflow_cost.svg", {name: (list(counts), [1e3 * t for t in ts]) for name, ts in times.items()},
                      "attention core, N = 64 tokens an image", "images in the sequence", "milliseconds", True, True)
    linear = slopes["hybrid chunk loop"] < 1.3 and slopes["block-causal softmax"] > 1.6
    return {"claim": "cost is linear in the number of images", "paper": "no figure read", "measured":
            "log-log slope from 16 to 64 images: " + ", ".join(f"{name} {s:.2f}" for name, s in slopes.items()),
            "verdict": "shown" if linear else "not shown at this scale", "numbers": {"counts": counts, "seconds": times}}


def step_price(scale):
    """A training step against the same model with softmax inside each image only; optimizer and EMA's share."""
    cfg = config(scale, 0)
    dataset = arflow.open_split(cfg, "train")
    model = arflow.ARFlow(cfg, 3, 10)
    ema, opt = copy.deepcopy(model).requires_grad_(False), arflow.optimizer(model, cfg)
    batch, draws = arflow.draw(dataset, cfg, 0, torch.device("cpu"))

    def update():
        nn.utils.clip_grad_value_(model.parameters(), cfg.clip)
        opt.step()
        common.ema_update(ema, model, cfg.ema)

    def step():
        opt.zero_grad()
        arflow.loss(model, batch, draws)[0].backward()
        update()

    ratios, shares, original = [], [], arflow.hybrid
    for _ in range(5):                                                   # interleaved: the machine is shared
        full = seconds(step, 10)
        shares.append(seconds(update, 10) / full)
        arflow.hybrid = inner_only
        ratios.append(full / seconds(step, 10))
        arflow.hybrid = original
    ratio, share = float(np.median(ratios)), float(np.median(shares))
    return {"claim": "the state is cheap: a training step against softmax inside images only", "paper": "no figure read",
            "measured": f"{ratio:.2f} x (asked: at most 1.3); clip, optimizer and EMA {100 * share:.1f} % of a step "
            "(medians of 5 interleaved pairs)", "verdict": "shown" if ratio <= 1.3 else "not shown at this scale",
            "numbers": {"ratios": ratios, "shares": shares}}


# --- Baselines and ablations ---------------------------------------------------

def baselines(scale):
    """ARFlow against itself without context and against SiT: equal images a step (10), steps, seeds, sampler."""
    arms = {"ARFlow": {}, "--images 1": dict(images=1, batch=10, context="reset"),
            "SiT": dict(images=1, batch=10, context="reset", block="sit")}
    results = {f"{name}, CFG {s:g}": [] for name in arms for s in (1.0, 1.5)}
    for seed in seeds(scale):
        for name, changes in arms.items():
            cfg = config(scale, seed, **changes)
            for s in (1.0, 1.5):
                results[f"{name}, CFG {s:g}"].append(judged(fit(cfg), cfg, scale, cfg_scale=s))
    ratio = {s: np.mean([a["distance"] / b["distance"] for a, b in zip(results[f"ARFlow, CFG {s}"], results[f"SiT, CFG {s}"])])
             for s in ("1", "1.5")}
    shown = all(a["distance"] < b["distance"] for s in ("1", "1.5")
                for a, b in zip(results[f"ARFlow, CFG {s}"], results[f"SiT, CFG {s}"]))
    return {"claim": "ARFlow beats SiT at equal steps", "paper": "FID ratio 0.47 (128 px, CFG 1.5), 0.95 (256 px)",
            "measured": f"FD ratio {ratio['1']:.2f} (CFG 1), {ratio['1.5']:.2f} (CFG 1.5); "
            + "; ".join(f"{name}: {both(rs)}" for name, rs in results.items()),
            "verdict": "shown" if shown and scale == "full" else "not shown at this scale", "numbers": results}


def unsorted_times(batch, draws, dataset, cfg, step):
    """The times of a sequence in random order."""
    g = common.make_generator(cfg.seed, step, "order")
    order = torch.rand(draws["t"].shape, generator=g).argsort(1)
    return batch, {**draws, "t": draws["t"].gather(1, order)}


def reversed_times(batch, draws, dataset, cfg, step):
    """The cleanest image first."""
    return batch, {**draws, "t": draws["t"].flip(1)}


def mixed_classes(batch, draws, dataset, cfg, step):
    """The context images come from any class; the last one has the sequence's label."""
    (x1, y), g = batch, common.make_generator(cfg.seed, step, "order")
    index = torch.randint(len(dataset), x1.shape[:2], generator=g).numpy()
    other = dataset.pixels(index.reshape(-1)).view_as(x1)
    return (torch.cat([other[:, :-1], x1[:, -1:]], 1), y), draws


def repeated_image(batch, draws, dataset, cfg, step):
    """One image at n noise levels."""
    x1, y = batch
    return (x1[:, :1].expand_as(x1), y), draws


def ablation(scale, arms, core=False):
    """Train each arm at half the demo's length, sample with guidance 1.5; {arm: results}."""
    results = {}
    for seed in seeds(scale):
        cfg = config(scale, seed, steps=STEPS["full"] // 2, cfg_scale=1.5)
        for name, change in arms.items():
            model = fit(cfg, **{"core" if core else "wrap": change})
            results.setdefault(name, []).append(judged(model, cfg, scale, core=change if core else None))
    return results


def verdict(results, first):
    """Whether the first arm has the best accuracy by more than its own spread (never from one seed)."""
    accuracy = {name: [r["accuracy"] for r in rs] for name, rs in results.items()}
    best = max(np.mean(a) for name, a in accuracy.items() if name != first)
    sure = len(accuracy[first]) > 1 and np.mean(accuracy[first]) - np.std(accuracy[first], ddof=1) > best
    return "shown" if sure else "not shown at this scale"


def sequences(scale):
    """The abstract's first ablation: order and content of the training sequence."""
    results = ablation(scale, {"sorted, same class": None, "unsorted": unsorted_times, "reversed": reversed_times,
                               "mixed classes": mixed_classes, "repeated image": repeated_image})
    return {"claim": "causally ordered sequences of one class are the right training data", "paper": "table unread",
            "measured": "; ".join(f"{name}: {both(rs)}" for name, rs in results.items()),
            "verdict": verdict(results, "sorted, same class"), "numbers": results}


def inner_only(q, k, v, log_decay, S, query_decay=True):
    """Softmax inside each image, nothing across."""
    return arflow.softmax_attention(q, k, v, scale=1.0), S


def inner_linear(q, k, v, log_decay, S, query_decay=True):
    """Causal gated linear attention inside the image as well (gated RetNet; no softmax anywhere)."""
    outputs = []
    for Q, K, V, gate in zip(q.unbind(1), k.unbind(1), v.unbind(1), log_decay.unbind(1)):
        G = gate.cumsum(-1)
        decay = (G[..., :, None] - G[..., None, :]).tril().exp().tril()
        outputs.append((Q @ K.mT * decay) @ V + G.exp()[..., None] * (Q @ S))
        S = G[..., -1, None, None].exp() * S + ((G[..., -1:] - G).exp()[..., None] * K).mT @ V
    return torch.stack(outputs, 1), S


def no_inner(q, k, v, log_decay, S, query_decay=True):
    """The state alone: an image does not look at itself."""
    out, S = arflow_hybrid(q, k, v, log_decay, S, query_decay)
    return out - arflow.softmax_attention(q, k, v, scale=1.0), S


arflow_hybrid = arflow.hybrid


def attention(scale):
    """The abstract's second ablation: what attends inside an image."""
    results = ablation(scale, {"softmax inside": None, "gated linear inside": inner_linear, "nothing inside": no_inner,
                               "softmax, no state": inner_only}, core=True)
    return {"claim": "full softmax inside an image is the right chunk", "paper": "table unread",
            "measured": "; ".join(f"{name}: {both(rs)}" for name, rs in results.items()),
            "verdict": verdict(results, "softmax inside"), "numbers": results}


# --- GPU -----------------------------------------------------------------------

PEAK = {"tf32": 495e12, "bf16": 989e12}               # H100 SXM, dense, FLOP/s


def gpu(scale):
    """Step time, images/s and MFU of ARFlow-B/2 and XL/2 at 128 px shapes, with random latents; needs a CUDA GPU."""
    claim = {"claim": "training speed of ARFlow-B/2 and XL/2 at 128 px on one GPU", "paper": "no figure read"}
    if not torch.cuda.is_available():
        return {**claim, "measured": "not run", "verdict": "not run", "numbers": {}}
    numbers, device, flops = {}, torch.device("cuda"), 0
    torch.backends.cuda.matmul.allow_tf32 = True
    for preset in ("ARFlow-B/2@128", "ARFlow-XL/2@128"):
        for bf16 in (False, True):
            for compiled in (False, True):
                cfg = dataclasses.replace(arflow.Config(), **arflow.PRESETS[preset], batch=32, bf16=bf16)
                model = arflow.ARFlow(cfg, 4, 1000).to(device)
                opt = arflow.optimizer(model, cfg)
                if compiled:
                    common.compile_blocks(dataclasses.replace(cfg, compile=True), model.blocks)
                x1, x0 = torch.randn(2, 32, 5, 4, 16, 16, device=device)
                y, t = torch.randint(1000, (32,), device=device), torch.rand(32, 5, device=device).sort(1).values
                drop = torch.zeros(32, dtype=torch.bool, device=device)

                def step():
                    opt.zero_grad()
                    with common.autocast(cfg):
                        value, _ = arflow.loss(model, (x1, y), {"t": t, "noise": x0, "drop": drop})
                    value.backward()
                    nn.utils.clip_grad_value_(model.parameters(), cfg.clip)
                    opt.step()
                    torch.cuda.synchronize()

                flops = flops if compiled else common.flops(step)
                time_of_step = seconds(step, 20)
                name = f"{preset} {'bf16' if bf16 else 'tf32'}{' compiled' if compiled else ''}"
                numbers[name] = {"seconds": time_of_step, "images/s": 160 / time_of_step,
                                 "MFU": flops / time_of_step / PEAK["bf16" if bf16 else "tf32"]}
    common.write_atomic(ROOT / "assets/claims/arflow_gpu.json", lambda file: file.write(json.dumps(
        {"file": "arflow", "hardware": torch.cuda.get_device_name(), "numbers": numbers}, indent=1).encode()))
    return {**claim, "measured": "; ".join(f"{name} {row['images/s']:.0f} images/s, MFU {100 * row['MFU']:.0f} %"
                                           for name, row in numbers.items()), "verdict": "shown", "numbers": numbers}


ROWS = [guidance, mechanism, carry_or_reset, cost, step_price, baselines, sequences, attention, gpu]
LONG = [sequences, attention]                       # in a quick look only when named: seven minutes each
# Of rows that are not shown: what it would take. A judgement, untested.
NEEDED = {
    "carry_or_reset": "a task or a length at which the state pays: without one softmax alone is ahead here (the row on chunks)",
    "baselines": "the paper's length, 400,000 steps: the state has to be learnt before it can help",
    "sequences": "a longer run, or some sixty seeds: sorted leads unsorted by half a standard deviation",
    "attention": "a task or a length at which the state pays: without one softmax alone is ahead here"}
