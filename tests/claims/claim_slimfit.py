"""SlimFit's claims: frozen share, accuracy, memory, load balance, static footprint, scheduling, gradients, time.

Trainings use the demo's task (a small ViT pre-trained on one half of the drawn shapes, fine-tuned on the other), each
variant with its own learning rate; byte figures are exact and come from the published runs' own settings. Real data: MiniLM
on MRPC, --full alone. Nothing here is the paper's table: its tables could not be read.
"""

import dataclasses
import functools
import os
import time
import weakref

import common
import slimfit
from tests import ROOT
from tests.claims import seeds, spread

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

STEPS = {"quick": 250, "full": 1200}
RATES = (0.0, 0.5, 0.75, 0.9, 0.95)
FACTORS = {"quick": (1, 2), "full": (0.5, 1, 2, 4)}  # searched multiples of the demo's rate for full fine-tuning
MRPC_STEPS = 115                                     # one epoch
CACHE = {}                                           # what this process has opened and trained


def demo(scale, seed=0, **changes):
    """The demo's configuration at the scale's length, on one thread, as slimfit.train runs models this small."""
    torch.set_num_threads(1)
    fields = {**slimfit.PRESETS["demo"], "steps": STEPS[scale], "seed": seed, **changes}
    return dataclasses.replace(slimfit.Config(), **fields)


def task(cfg, split, half):
    """(data set, positions of the samples of a half of its classes), opened once."""
    key = (cfg.data, cfg.image, cfg.length, split)
    if key not in CACHE:
        CACHE[key] = slimfit.open_split(cfg, split)
    return CACHE[key], slimfit.class_half(CACHE[key], half)


def fit(cfg, steps, weights, half, seconds=None):
    """slimfit.finetune without a folder: the trained model and its scheduler."""
    device = common.device_of(cfg)
    cfg = dataclasses.replace(cfg, steps=steps)
    dataset, rows = task(cfg, "train", half)
    torch.manual_seed(common.make_generator(cfg.seed, half, "weights").initial_seed())
    model = slimfit.build_model(cfg)
    if weights:
        slimfit.load_weights(model, weights, "weights")
    model.to(device).train()
    scheduler, opt = slimfit.Scheduler(model, cfg), slimfit.optimizer(model, cfg)
    order = slimfit.epochs(cfg, rows, steps)
    for step in range(steps):
        batch = slimfit.draw(dataset, order, cfg, step, device)
        common.set_learning_rate(opt, slimfit.learning_rate(cfg, step))
        start = time.process_time()
        scheduler.freeze(step)
        common.seed_dropout(cfg.seed, step)
        opt.zero_grad()
        slimfit.loss(model, batch).backward()
        opt.step()
        scheduler.measure()
        if seconds is not None:
            seconds.append(time.process_time() - start)
    return model, scheduler


def pretrained(scale, seed):
    """{name: tensor} of the demo's model after its half of the classes, without the head."""
    if ("pretrained", scale, seed) not in CACHE:
        cfg = slimfit.stock(demo(scale, seed))
        model, _ = fit(cfg, {"quick": cfg.pretrain // 2, "full": cfg.pretrain}[scale], {}, 1)
        CACHE["pretrained", scale, seed] = {name: p.detach() for name, p in model.named_parameters()
                                            if not name.startswith("head.")}
    return CACHE["pretrained", scale, seed]


def tuned(scale, seed, factor, full=False, **changes):
    """(test accuracy, scheduler) after fine-tuning on the other half with `factor` times full fine-tuning's rate."""
    cfg = demo(scale, seed, **changes)
    cfg = dataclasses.replace(cfg, lr=factor * (cfg.full_lr or cfg.lr), full_lr=0.0)
    cfg = slimfit.stock(cfg) if full else cfg
    key = repr(cfg)
    if key not in CACHE:
        model, scheduler = fit(cfg, cfg.steps, pretrained(scale, seed), 2)
        dataset, rows = task(cfg, "test", 2)
        CACHE[key] = slimfit.class_metrics(slimfit.confusion(model, dataset, rows[:1000]))["accuracy"], scheduler
    return CACHE[key]


def searched(scale, **changes):
    """Accuracies over the seeds at the factor that is best for seed 0, and that factor."""
    best = max(FACTORS[scale], key=lambda factor: tuned(scale, 0, factor, **changes)[0])
    return [tuned(scale, seed, best, **changes)[0] for seed in seeds(scale)], best


# --- Accuracy ----------------------------------------------------------------------

def rates(scale):
    """Accuracy against the frozen share, each with its own learning rate."""
    results = {"full": searched(scale, full=True), **{f"{rate:g}": searched(scale, rate=rate) for rate in RATES}}
    means = {name: np.mean(a) for name, (a, _) in results.items()}
    errors = [float(np.std(results[f"{rate:g}"][0])) for rate in RATES]
    percent = [100 * rate for rate in RATES]
    common.line_chart(ROOT / "assets/slimfit_rates.svg", {
        "SlimFit": (percent, [100 * means[f"{rate:g}"] for rate in RATES], [100 * e for e in errors]),
        "full fine-tuning": (percent, [100 * means["full"]] * len(RATES))},
        "demo task: accuracy against frozen share", "% of the eligible tensors frozen", "test accuracy, %")
    close = means["full"] - means["0.95"] <= 0.004
    return {"claim": "up to 95 % of the layers frozen at no or little loss", "paper": "-0.2 % on average, -0.4 % at worst",
            "measured": "; ".join(f"{name}: {spread(a)} at {best} x lr" for name, (a, best) in results.items())
            + f"; {STEPS[scale]} steps", "verdict": "shown" if close and scale == "full" else "not shown at this scale",
            "numbers": results}


def lowest(policy, distance, k, step, steps, draw):
    """The opposite rule: train what moved least (every tensor once, then the k smallest distances)."""
    fresh = (distance >= 1e6).nonzero()[:, 0]
    return fresh[:k] if len(fresh) >= k else distance.argsort()[:k]


def policies(scale):
    """Scheduled by training dynamics against four other rules at the same frozen share."""
    rate, results, counts = 0.9, {}, {}
    for name in ("ils", "random", "last", "progressive"):
        results[name] = searched(scale, rate=rate, policy=name)
        counts[name] = updates(tuned(scale, 0, results[name][1], rate=rate, policy=name)[1])
    original, slimfit.choose = slimfit.choose, lowest
    results["lowest distance"] = searched(scale, rate=rate, keep=0.1000001)      # apart from the others in CACHE
    slimfit.choose = original
    means = {name: np.mean(a) for name, (a, _) in results.items()}
    others = max(value for name, value in means.items() if name != "ils")
    sure = scale == "full" and means["ils"] - np.std(results["ils"][0]) > others
    return {"claim": "choosing layers by their training dynamics is better than other rules", "paper": "table unread",
            "measured": f"at rate {rate}: " + "; ".join(f"{name} {spread(a)} at {best} x lr"
                                                       for name, (a, best) in results.items())
            + "; updates a tensor under ils: " + ", ".join(f"{k} {v:.0f}" for k, v in counts["ils"].items()),
            "verdict": "shown" if sure else "not shown at this scale", "numbers": {"accuracy": results, "updates": counts}}


def updates(scheduler):
    """Mean number of updates of a tensor, by kind of tensor."""
    total = torch.stack(scheduler.history).sum(0).tolist()
    kinds = {"attention": ("query", "key", "value", "out"), "MLP": ("mlp1", "mlp2"), "LayerNorm": ("norm",),
             "embeddings": ("cls", "position", "patch")}
    return {kind: float(np.mean([n for name, n in zip(scheduler.tensors, total) if any(word in name for word in words)]))
            for kind, words in kinds.items()}


# --- Memory ------------------------------------------------------------------------

RUNS = {"GLUE 80 %": "mnli", "GLUE 90 %": "mrpc", "GLUE 95 %": "qnli", "SQuAD 2.0": "squad", "CIFAR-10": "cifar10",
        "CIFAR-100": "cifar100", "ImageNet": "imagenet"}


def published(preset):
    """Stock and SlimFit's mean memory account (100 random active sets) of a published run, and its configuration."""
    cfg = dataclasses.replace(slimfit.Config(), **slimfit.PRESETS[preset])
    with torch.device("meta"):
        model = slimfit.build_model(cfg)
    may, every = list(slimfit.eligible(model, cfg)), {name for name, _ in model.named_parameters()}
    k, g = slimfit.Scheduler(model, cfg).k, torch.Generator().manual_seed(0)
    sets = [{may[i] for i in torch.randperm(len(may), generator=g)[:k]} for _ in range(100)]
    accounts = [slimfit.memory_account(model, cfg, cfg.batch, (every - set(may)) | chosen) for chosen in sets]
    slim = {kind: float(np.mean([account[kind] for account in accounts])) for kind in accounts[0]}
    return slimfit.memory_account(model, slimfit.stock(cfg), cfg.batch, every), slim


def fused(preset, stock):
    """Activation bytes of the same stock model on a fused attention kernel: no P, but its output and a logarithm."""
    cfg = dataclasses.replace(slimfit.Config(), **slimfit.PRESETS[preset])
    T = cfg.length if cfg.family == "bert" else (cfg.image // cfg.patch) ** 2 + 1
    N, rows = cfg.batch * T * cfg.width, cfg.batch * cfg.heads * T
    return stock["static"] + stock["dynamic"] + cfg.depth * (4 * N + 4 * rows - (9 if cfg.dropout else 4) * rows * T)


def memory_bars(path, rows, unit="MB", size=1e6):
    """Draw {run: memory account} as an SVG: a bar a run, a colour a kind, the total behind it."""
    kinds = ("static", "dynamic", "gradients", "snapshot", "weights", "moments")
    scale = 500 / max(row["total"] for row in rows.values())
    parts = []
    for i, (kind, color) in enumerate(zip(kinds, common.COLORS)):
        parts.append(common.svg_text(160 + 84 * i, 20, kind, "start", f'fill="{color}" font-weight="bold"'))
    for i, (run, row) in enumerate(rows.items()):
        x, y = 160.0, 36 + 26 * i
        parts.append(common.svg_text(x - 8, y + 14, run, "end"))
        for kind, color in zip(kinds, common.COLORS):
            parts.append(f'<path d="M{x:.1f} {y}h{scale * row[kind]:.1f}v19H{x:.1f}" fill="{color}"/>')
            x += scale * row[kind]
        parts.append(common.svg_text(x + 6, y + 14, f"{row['total'] / size:.1f} {unit}", "start"))
    common.svg(path, 750, 44 + 26 * len(rows), parts)


def memory(scale):
    """Activations and total memory of the published runs, by the formula that is exact to the byte."""
    accounts = {name: published(preset) for name, preset in RUNS.items()}
    bars = {f"{name}, {kind}": row for name, pair in accounts.items() if name in ("GLUE 80 %", "GLUE 95 %", "CIFAR-10", "CIFAR-100")
            for kind, row in zip(("stock", "SlimFit"), pair)}
    memory_bars(ROOT / "assets/slimfit_memory.svg", bars, "GB", 1e9)
    ratio = {name: {"activations": (a["static"] + a["dynamic"]) / (b["static"] + b["dynamic"]),
                    "against fused attention": fused(RUNS[name], a) / (b["static"] + b["dynamic"]),
                    "total": a["total"] / b["total"], "without Adam": a["no moments"] / b["no moments"]}
             for name, (a, b) in accounts.items()}
    mean = np.mean([row["total"] for row in ratio.values()])
    return {"claim": "total memory 2.2 x smaller on average, up to 3.1 x", "paper": "2.2 x mean, 3.1 x max, measured on GPU",
            "measured": "; ".join(f"{name}: activations {r['activations']:.1f} x "
                                  f"({r['against fused attention']:.1f} x against fused attention), total {r['total']:.1f} x "
                                  f"({r['without Adam']:.1f} x without Adam)" for name, r in ratio.items())
            + f"; mean total {mean:.1f} x (accounting, no allocator: overstates at large batch)",
            "verdict": "shown" if mean >= 2.2 else "not shown at this scale", "numbers": ratio}


def gpus(scale):
    """Cards of 32 GB: ViT on ImageNet from 3 to 1, BERT on SQuAD 2.0 from 2 to 1, both at batch 128."""
    cards = {}
    for name, preset in (("ImageNet", "imagenet"), ("SQuAD 2.0", "squad")):
        cards[name] = [int(-(-account["total"] // 32e9)) for account in published(preset)]
    return {"claim": "at batch 128, ViT on ImageNet fits 1 card instead of 3, BERT on SQuAD 2.0 1 instead of 2",
            "paper": "3 to 1, 2 to 1 (32 GB)", "measured": "; ".join(f"{name}: {a} to {b}" for name, (a, b) in cards.items())
            + " (accounting)", "verdict": "shown" if cards == {"ImageNet": [3, 1], "SQuAD 2.0": [2, 1]} else
            "not shown at this scale", "numbers": cards}


def balance(scale):
    """Load balance: spread of the dynamic bytes over 100 draws of the active tensors, ViT-B at 90 %."""
    base = dataclasses.replace(slimfit.Config(), **slimfit.PRESETS["cifar10"])
    with torch.device("meta"):
        model = slimfit.build_model(base)
    every, numbers = list(slimfit.eligible(model, base)), {}
    dense = [name for name in every if any(part in name for part in ("out", "mlp1", "mlp2")) and "blocks" in name]
    for label, pool in (("o, MLP-1, MLP-2", dense), ("all tensors", every)):
        for mlp in (True, False):
            cfg, g = dataclasses.replace(base, mlp=mlp), torch.Generator().manual_seed(0)
            sizes = [slimfit.activation_bytes(cfg, 32, {pool[i] for i in torch.randperm(len(pool), generator=g)[:10]})
                     for _ in range(100)]
            sizes = [size["dynamic"] for size in sizes]
            numbers[f"{label}, MLP-2 in {'int8' if mlp else 'fp32'}"] = float(np.std(sizes) / np.mean(sizes))
    zero = numbers["o, MLP-1, MLP-2, MLP-2 in int8"] == 0
    return {"claim": "load balancing: which layers are active does not change the memory", "paper": "no figure read",
            "measured": "s.d. / mean of dynamic bytes: " + "; ".join(f"{k} {100 * v:.0f} %" for k, v in numbers.items()),
            "verdict": "shown" if zero else "not shown at this scale", "numbers": numbers}


def switches(scale):
    """Each compression off in turn at 90 % frozen: activation bytes of ViT-B, measured on one block of the demo too."""
    base = dataclasses.replace(slimfit.Config(), **slimfit.PRESETS["cifar10"])
    with torch.device("meta"):
        model = slimfit.build_model(base)
    never = {name for name, _ in model.named_parameters()} - set(slimfit.eligible(model, base))
    off = {"all on": {}, "q, k, v in fp32": dict(products=False), "softmax in fp32": dict(probabilities=False),
           "GELU input in fp32": dict(gelu=False), "LayerNorm not pruned": dict(keep=1.0)}
    sizes = {name: sum(slimfit.activation_bytes(dataclasses.replace(base, **changes), 32, never).values()) / 1e9
             for name, changes in off.items()}
    sizes["stock"] = sum(slimfit.activation_bytes(slimfit.stock(base), 32, {n for n, _ in model.named_parameters()}
                                                  ).values()) / 1e9
    return {"claim": "quantisation and pruning shrink what freezing cannot", "paper": "no figure read",
            "measured": "ViT-B, batch 32, all frozen, GB: " + "; ".join(f"{k} {v:.2f}" for k, v in sizes.items()),
            "verdict": "shown" if all(v > sizes["all on"] for k, v in sizes.items() if k != "all on") else "reversed",
            "numbers": sizes}


def batch_of(cfg, B, seed=0):
    """(inputs, labels) of B random samples in a configuration's shapes."""
    g = torch.Generator().manual_seed(seed)
    if cfg.family == "vit":
        return (torch.randn(B, 3, cfg.image, cfg.image, generator=g),), torch.randint(cfg.classes, (B,), generator=g)
    ids = torch.randint(cfg.words, (B, cfg.length), generator=g)
    labels = {"class": torch.randint(cfg.classes, (B,), generator=g), "score": torch.rand(B, generator=g),
              "span": torch.randint(cfg.length, (B, 2), generator=g)}[cfg.target]
    return (ids, torch.zeros_like(ids), torch.ones(B, cfg.length)), labels


def presets(scale):
    """Saved bytes, measured beside the formula, of every preset in its full shapes at batch 1: stock, and a step of SlimFit."""
    numbers = {}
    for preset in slimfit.PRESETS:
        base = dataclasses.replace(slimfit.Config(), **{**slimfit.PRESETS[preset], "batch": 1})
        inputs, labels = batch_of(base, 1)
        for name, cfg in (("stock", slimfit.stock(base)), ("SlimFit", base)):
            with torch.device("meta"):                         # values do not count here; drawing them takes longest
                model = slimfit.build_model(cfg).train()
            model = model.to_empty(device="cpu")
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data.fill_(0.01)
            scheduler = slimfit.Scheduler(model, cfg)
            scheduler.freeze(0)
            given = [*model.parameters(), *inputs, labels]
            _, measured = slimfit.saved_bytes(lambda: slimfit.loss(model, (inputs, labels)), given)
            formula = slimfit.activation_bytes(cfg, 1, scheduler.training(model))
            numbers.setdefault(preset, {})[name] = {"measured": measured, "formula": sum(formula.values())}
    equal = all(row["measured"] == row["formula"] for rows in numbers.values() for row in rows.values())
    return {"claim": "the memory account holds to the byte in every preset's shapes (batch 1)", "paper": "no figure read",
            "measured": "MB, stock to SlimFit: " + "; ".join(
                f"{preset} {rows['stock']['measured'] / 1e6:.1f} to {rows['SlimFit']['measured'] / 1e6:.1f}"
                for preset, rows in numbers.items()) + f"; formula {'equal to the byte' if equal else 'differs'}",
            "verdict": "shown" if equal else "reversed", "numbers": numbers}


# --- Gradients and time --------------------------------------------------------------

def peak_bytes(step):
    """Most bytes that graphs keep at any time of step(), each storage once, what a backward pass computes anew included."""
    alive, most = weakref.WeakSet(), 0

    class Saved:
        def __init__(self, tensor):
            nonlocal most
            self.tensor = tensor.detach()
            alive.add(self)
            storages = [saved.tensor.untyped_storage() for saved in alive if not isinstance(saved.tensor, torch.nn.Parameter)]
            most = max(most, sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in given}.values()))

    given = step.given
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        step()
    return most


class Step:
    """A training step of BERT's shapes: stock or SlimFit, its blocks checkpointed or not."""

    def __init__(self, cfg, checkpointed, batch):
        torch.manual_seed(0)
        self.cfg, self.batch, self.number = cfg, batch, 0
        self.model = slimfit.build_model(cfg).train()
        self.scheduler, self.opt = slimfit.Scheduler(self.model, cfg), slimfit.optimizer(self.model, cfg)
        self.given = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *batch[0], batch[1])}
        for block in self.model.blocks:
            if checkpointed:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=True)

    def __call__(self):
        self.scheduler.freeze(self.number)
        common.seed_dropout(0, self.number)
        self.opt.zero_grad()
        slimfit.loss(self.model, self.batch).backward()
        self.opt.step()
        self.scheduler.measure()
        self.number += 1


def checkpointing(scale):
    """What a user would pick instead: torch.utils.checkpoint around each block. BERT, 2 layers, batch 8 of 128 tokens."""
    base = dataclasses.replace(slimfit.Config(), **{**slimfit.PRESETS["mrpc"], "depth": 2, "batch": 8})
    batch = batch_of(base, 8)
    steps = {"stock": Step(slimfit.stock(base), False, batch), "checkpointing": Step(slimfit.stock(base), True, batch),
             "SlimFit .9": Step(base, False, batch), "SlimFit .9, checkpointed": Step(base, True, batch)}
    seconds, numbers = {name: [] for name in steps}, {}
    for _ in range({"quick": 5, "full": 20}[scale]):
        for name, step in steps.items():                       # interleaved: the machine is shared
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    for name, step in steps.items():
        step.scheduler.freeze(step.number)
        _, kept = slimfit.saved_bytes(lambda: slimfit.loss(step.model, batch), [*step.model.parameters(), *batch[0], batch[1]])
        numbers[name] = {"kept": kept, "peak": peak_bytes(step), "seconds": float(np.median(seconds[name][1:]))}
    stock, again, slim = (numbers[name] for name in ("stock", "checkpointing", "SlimFit .9"))
    better = slim["peak"] < stock["peak"] and slim["seconds"] < again["seconds"]
    return {"claim": "beside activation checkpointing: SlimFit saves memory and computes nothing twice", "paper": "not compared",
            "measured": "; ".join(f"{name}: {n['kept'] / 1e6:.1f} MB kept, {n['peak'] / 1e6:.1f} at the peak of the backward pass, "
                                  f"{n['seconds']:.2f} CPU s ({n['seconds'] / stock['seconds']:.2f} x)" for name, n in numbers.items()),
            "verdict": "shown" if better else "not shown at this scale", "numbers": numbers}


def gradients(scale):
    """How far compressed gradients are from the stock model's: cosine and relative error over all shared tensors."""
    cfg = demo(scale)
    inputs, labels = slimfit.fetch(task(cfg, "train", 0)[0], cfg, np.arange(cfg.batch))
    found = {}
    for name, variant in (("stock", slimfit.stock(cfg)), ("all active", cfg), ("all frozen", cfg)):
        model = slimfit.build_model(variant)
        slimfit.load_weights(model, pretrained(scale, 0), "weights")
        torch.manual_seed(0)
        torch.nn.init.normal_(model.head.weight, std=0.02)
        for p in slimfit.eligible(model, variant).values():
            p.requires_grad_(name != "all frozen")
        slimfit.loss(model, (inputs, labels)).backward()
        found[name] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    numbers = {}
    for name in ("all active", "all frozen"):
        shared = [key for key in found[name] if "key.bias" not in key]    # its exact gradient is 0
        a, b = (torch.cat([found[variant][key].flatten() for key in shared]) for variant in (name, "stock"))
        worst = min(F.cosine_similarity(found[name][key].flatten(), found["stock"][key].flatten(), 0).item() for key in shared)
        numbers[name] = {"cosine": F.cosine_similarity(a, b, 0).item(), "worst tensor": worst,
                         "relative error": ((a - b).norm() / b.norm()).item()}
    return {"claim": "compressed storage leaves the gradients nearly unchanged", "paper": "no figure read",
            "measured": "; ".join(f"{k}: cosine {v['cosine']:.3f} (worst tensor {v['worst tensor']:.3f}), relative error "
                                  f"{100 * v['relative error']:.0f} %" for k, v in numbers.items()),
            "verdict": "shown" if numbers["all frozen"]["cosine"] > 0.95 else "not shown at this scale", "numbers": numbers}


def step_time(scale):
    """CPU seconds (the machine is shared) a step against stock: the demo's model, and BERT of 2 layers, batch 8 of 128 tokens."""
    torch.set_num_threads(1)
    bert = dataclasses.replace(slimfit.Config(), **{**slimfit.PRESETS["mrpc"], "depth": 2, "batch": 8})
    numbers, measured, ratios = {}, [], {}
    for about, base, repeats in (("demo", demo(scale), 90), ("BERT", bert, 5)):
        batch = batch_of(base, base.batch)
        steps = {"stock": Step(slimfit.stock(base), False, batch),
                 **{f"{rate:g}": Step(dataclasses.replace(base, rate=rate), False, batch) for rate in (0.75, 0.9)}}
        seconds = {name: [] for name in steps}
        for _ in range(repeats * {"quick": 1, "full": 3}[scale]):
            for name, step in steps.items():                   # interleaved: the machine is shared
                start = time.process_time()
                step()
                seconds[name].append(time.process_time() - start)
        warm = len(seconds["stock"]) // 4                       # the sweep and what is allocated at first
        pairs = {name: np.array(values[warm:]) / np.array(seconds["stock"][warm:]) for name, values in seconds.items()}
        ratios[about] = {name: float(np.median(values)) for name, values in pairs.items()}
        numbers[about] = {"seconds": seconds, "ratio": ratios[about]}
        measured.append(f"{about}: {ratios[about]['0.9']:.2f} x stock at rate 0.9, {ratios[about]['0.75']:.2f} x at 0.75, stock "
                        f"{1e3 * np.median(seconds['stock'][warm:]):.0f} ms")
    fast = ratios["BERT"]["0.9"] <= 0.7, ratios["demo"]["0.9"] <= 1.0
    return {"claim": "a SlimFit step is quicker than a stock step", "paper": "unread",
            "measured": "; ".join(measured) + "; asked at 0.9: at most .70 and 1.0",
            "verdict": "shown" if all(fast) else "not shown at this scale", "numbers": numbers}


# --- Real data -----------------------------------------------------------------------

def mrpc(scale):
    """MiniLM on MRPC, T 64, one epoch: full fine-tuning, .75 and .90, random at .90; two learning rates searched.

    Wants ../shared/data (weights, glue); 16 trainings of 115 steps, some 40 minutes on one core, so not in --quick.
    """
    root = ROOT.parent / "shared/data"
    if not (root / "weights").exists() or not (root / "glue").exists():
        return None
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    base = dataclasses.replace(slimfit.Config(), words=30522, depth=6, width=384, length=64, dropout=0.1,
                               attention_dropout=0.1, decay=0.01, lr=2e-4, data=f"glue:MRPC:{root / 'glue'}", steps=MRPC_STEPS,
                               weights=str(root / "weights/minilm_l6_h384_uncased_fp16.npz"))
    weights, results, start = slimfit.read_pretrained(base.weights), {}, time.perf_counter()
    variants = {"full": (slimfit.stock(base), (5e-5, 1e-4)), "ILS .75": (dataclasses.replace(base, rate=0.75), (1e-4, 2e-4)),
            "ILS .90": (dataclasses.replace(base, rate=0.9), (1e-4, 2e-4)),
            "random .90": (dataclasses.replace(base, rate=0.9, policy="random"), (1e-4, 2e-4))}

    def score(name, variant, lr, seed):
        model, _ = fit(dataclasses.replace(variant, lr=lr, seed=seed), variant.steps, weights, 0)
        found = slimfit.class_metrics(slimfit.confusion(model, *task(variant, "test", 0)))
        print(f"mrpc: {name}, lr {lr:g}, seed {seed}: accuracy {found['accuracy']:.3f}, F1 {found['f1']:.3f}, "
              f"{time.perf_counter() - start:.0f} s since the start", flush=True)
        return found

    for name, (variant, lrs) in variants.items():
        first = {lr: score(name, variant, lr, 0) for lr in lrs}
        best = max(lrs, key=lambda lr: first[lr]["accuracy"])
        results[name] = {"lr": best, "seeds": [first[best], *(score(name, variant, best, seed) for seed in seeds(scale)[1:])]}
    figures = {name: {kind: [run[kind] for run in result["seeds"]] for kind in ("accuracy", "f1")}
               for name, result in results.items()}
    close = np.mean(figures["full"]["accuracy"]) - np.mean(figures["ILS .75"]["accuracy"]) <= 0.01
    return {"claim": "a real task (MiniLM on MRPC): within one point of full fine-tuning at 75 % frozen",
            "paper": "MRPC at 90 %: unread", "measured": "; ".join(
                f"{name}: accuracy {spread(f['accuracy'])}, F1 {spread(f['f1'])} at lr {results[name]['lr']:g}"
                for name, f in figures.items()) + f"; {MRPC_STEPS} steps, one epoch (majority class 0.684)",
            "verdict": "shown" if close and scale == "full" else "not shown at this scale", "numbers": results}


TASKS = {                  # tokens, steps, samples a step, the measure: what two busy cores do in some ten minutes
    "SST-2": (32, 60, 32, "accuracy"), "CoLA": (24, 80, 32, "matthews"), "RTE": (96, 40, 16, "accuracy")}
VARIANTS = {"full": {}, "ILS .75": dict(rate=0.75), "ILS .90": dict(rate=0.9), "random .90": dict(rate=0.9, policy="random"),
            "last .90": dict(rate=0.9, policy="last")}


def real_task(scale, base, full_lr, about, measure, limit=None):
    """Full fine-tuning, .75 and .90, a random choice and the last layers at .90, at given learning rates (none searched)."""
    weights, results = slimfit.read_pretrained(base.weights), {}
    for name, changes in VARIANTS.items():
        variant = dataclasses.replace(base, **changes) if changes else dataclasses.replace(slimfit.stock(base), lr=full_lr)
        for seed in seeds(scale):
            model, _ = fit(dataclasses.replace(variant, seed=seed), variant.steps, weights, 0)
            dataset, rows = task(variant, "test", 0)
            found = slimfit.class_metrics(slimfit.confusion(model, dataset, rows[:limit]))
            results.setdefault(name, []).append(found)
            print(f"{about}: {name}, seed {seed}: {found}", flush=True)
    means = {name: np.mean([run[measure] for run in runs]) for name, runs in results.items()}
    learnt = np.mean([run.get("matthews", run["accuracy"]) for run in results["full"]]) >= 0.2    # Matthews: 0 is chance
    close = learnt and means["full"] - means["ILS .75"] <= 0.01 and means["ILS .75"] > means["last .90"]
    return {"claim": f"a real task ({about}): within one point of full fine-tuning at 75 % frozen, and ahead of the last layers",
            "paper": "its tables unread", "measured": f"{measure}: " + "; ".join(
                f"{name} {spread([run[measure] for run in runs])}" for name, runs in results.items())
            + f"; {base.steps} steps of {base.batch}, lr {full_lr:g} in full, else {base.lr:g}, not searched here",
            "verdict": "shown" if close and scale == "full" else "not shown at this scale", "numbers": results}


def minilm(scale, name):
    """A GLUE task with MiniLM; the learning rates are those that row mrpc found. Wants ../shared/data."""
    root = ROOT.parent / "shared/data"
    if not (root / "weights").exists() or not (root / "glue").exists():
        return None
    length, steps, batch, measure = TASKS[name]
    base = dataclasses.replace(slimfit.Config(), words=30522, depth=6, width=384, length=length, dropout=0.1,
                               attention_dropout=0.1, decay=0.01, lr=2e-4, data=f"glue:{name}:{root / 'glue'}", steps=steps,
                               batch=batch, weights=str(root / "weights/minilm_l6_h384_uncased_fp16.npz"))
    torch.set_num_threads(1)
    return real_task(scale, base, 1e-4, f"MiniLM on {name}", measure)


def minilm_sst2(scale):
    return minilm(scale, "SST-2")


def minilm_cola(scale):
    return minilm(scale, "CoLA")


def minilm_rte(scale):
    return minilm(scale, "RTE")


def vit_s(scale):
    """ViT-S/14 at 98 pixels on CIFAR-10 (the lossless part of it), 40 steps; of the test pictures the first 500."""
    root = ROOT.parent / "shared/data"
    if not (root / "weights").exists() or not (root / "cifar10_lossless9k.npz").exists():
        return None
    base = dataclasses.replace(slimfit.Config(), **{
        **slimfit.PRESETS["small"], "data": f"npz:{root / 'cifar10_lossless9k.npz'}", "steps": 40,
        "weights": str(root / "weights/dinov2_vits14_saliency_fp16.npz")})
    torch.set_num_threads(1)
    return real_task(scale, base, 5e-5, "ViT-S on CIFAR-10", "accuracy", 500)


def gpu_peaks(scale):
    """Allocator peaks and seconds a step: ViT-B/16 batch 128 and BERT-base batch 32, T 128. Needs CUDA."""
    claim = {"claim": "on a GPU: peak memory 2.2 x (mean) to 3.1 x smaller", "paper": "2.2 x, 3.1 x"}
    if not torch.cuda.is_available():
        return {**claim, "measured": "no GPU here", "verdict": "not run", "numbers": {}}
    numbers = {}
    for preset, batch in (("cifar10", 128), ("mrpc", 32)):
        cfg = dataclasses.replace(slimfit.Config(), **{**slimfit.PRESETS[preset], "batch": batch})
        for name, variant in (("stock", slimfit.stock(cfg)), ("SlimFit", cfg)):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            model = slimfit.build_model(variant).cuda()
            scheduler, opt = slimfit.Scheduler(model, variant), slimfit.optimizer(model, variant)
            shape = (batch, 3, 224, 224) if preset == "cifar10" else (batch, 128)
            inputs = [torch.randn(shape).cuda()] if preset == "cifar10" else [
                torch.randint(variant.words, shape).cuda(), torch.zeros(shape, dtype=torch.long).cuda(), torch.ones(shape).cuda()]
            batch_of = inputs, torch.zeros(batch, dtype=torch.long).cuda()
            for step in range(20):
                if step == 5:
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                scheduler.freeze(step)
                opt.zero_grad()
                slimfit.loss(model, batch_of).backward()
                opt.step()
                scheduler.measure()
            torch.cuda.synchronize()
            numbers[f"{preset}, {name}"] = {"peak": torch.cuda.max_memory_allocated(),
                                            "seconds": (time.perf_counter() - start) / 15}
    ratio = [numbers[f"{p}, stock"]["peak"] / numbers[f"{p}, SlimFit"]["peak"] for p in ("cifar10", "mrpc")]
    return {**claim, "measured": f"ViT-B/16 {ratio[0]:.2f} x, BERT-base {ratio[1]:.2f} x; " + "; ".join(
        f"{k} {v['peak'] / 1e9:.2f} GB, {1e3 * v['seconds']:.0f} ms" for k, v in numbers.items()),
        "verdict": "shown" if max(ratio) >= 2.2 else "not shown at this scale", "numbers": numbers}


def gpu_tasks(scale):
    """The other tasks and rates, and the ViT on CIFAR-10: commands that are ready for a GPU."""
    commands = [f"python slimfit.py --preset {preset} --weights {model} --compare 0.75,0.9,0.95" for preset, model in (
        ("sst2", "bert-base-cased"), ("cola", "bert-base-cased"), ("rte", "bert-base-cased"), ("mnli", "bert-base-cased"),
        ("qnli", "bert-base-cased"), ("qqp", "bert-base-cased"), ("stsb", "bert-base-cased"), ("squad", "bert-base-uncased"),
        ("cifar10", "vit-base-patch16-224-in21k"), ("small", "dinov2_vits14_saliency_fp16.npz"))]
    return {"claim": "other GLUE tasks, SQuAD 2.0 and CIFAR-10 at 75, 90 and 95 %", "paper": "tables unread",
            "measured": "ready: " + "; ".join(f"`{command}`" for command in commands), "verdict": "not run",
            "numbers": {"commands": commands}}


LONG = [mrpc, minilm_sst2, minilm_cola, minilm_rte, vit_s]
ROWS = [memory, gpus, balance, switches, presets, gradients, step_time, checkpointing, rates, policies, mrpc, minilm_sst2, minilm_cola,
        minilm_rte, vit_s, gpu_peaks, gpu_tasks]
# Of rows that are not shown: what it would take. A judgement, untested.
NEEDED = {
    "minilm_cola": "more steps than these 80: after them every arm still gives the larger class, full fine-tuning, too",
    "minilm_rte": "more steps, or MNLI before it: even full fine-tuning is at chance here",
    "step_time": "tensors as large as BERT's: the demo's are so small that calls, not arithmetic, take the time",
    "rates": "a longer run: of 250 steps a layer at rate 0.95 gets a dozen",
    "policies": "layers that learn at different speeds: here each rule that reaches all of them does as well"}
