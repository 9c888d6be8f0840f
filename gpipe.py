"""GPipe: Easy Scaling with Micro-Batch Pipeline Parallelism (arXiv 1811.06965)

A network that is a sequence of layers is cut into K stages, one a device, a mini-batch into M micro-batches
that stream through them: all forwards, then all backwards in the opposite order. Gradients add up, one update
follows: plain synchronous training, whatever K. A stage keeps only its inputs and recomputes the rest.

    stage 1:     F0 F1 F2 F3 B3 R2 B2 R1 B1 R0 B0         F forward, R recompute, B backward of a micro-batch;
    stage 0:  F0 F1 F2 F3 ..... B3 R2 B2 R1 B1 R0 B0      the bubble idles (K - 1) / (M + K - 1) of the time

Run:      python gpipe.py                                 demo: one model translates numbers, ten languages
          python gpipe.py --preset demo-images            the other job: AmoebaNet-D on drawn shapes
          python gpipe.py --preset Transformer-48 --emulate 0.02 --stages 8    watch eight stages on a laptop
          python gpipe.py --preset AmoebaNet-B-18-512 --plan      memory, bubble, speed-up; nothing runs
          python gpipe.py --preset small --gpus 4         CIFAR-10 on four GPUs
          python gpipe.py --sample runs/gpipe/demo/last.pt
Faithful: partition, schedule, early re-materialization, one update, deferred BatchNorm; AmoebaNet-D and -B,
          T(L, H, A) and Table 1's Transformer-L with the published counts; both depth tricks.
Scaled:   the demos. Translation has lingvo's Adam: the paper's supplement is not to be had.
Left out: auxiliary head, ScheduledDropPath, cutout; BatchNorm moments over replicas.
Letters:  K stages, M micro-batches, L layers, V tokens or classes, B samples, C P Q channels, h w y x sides,
          D width, H feed-forward width, A heads of d channels, S source and N target tokens.
CUDA:     never run on CUDA. Read in this order: schedule, Pipeline (run, follow, F, R, B, L), Channel, train.
"""

import copy
import queue
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data

# --- Configuration -----------------------------------------------------------

PAD, START, END = 0, 1, 2                   # as data.py numbers them

@dataclass
class Config:
    preset: str = "demo"                    # where the values below start from
    model: Literal["translate", "amoebanet-d", "amoebanet-b", "lm"] = "translate"   # lm: Table 1's, to --plan
    data: str = "numbers"                   # numbers, numbers:LIMIT, tsv:PATH; images: shapes, cifar10, ...
    size: int = 32                          # side of an image
    classes: int = 0                        # classes or tokens V; 0: those of the data
    layers: int = 6                         # L: of the encoder and of the decoder; AmoebaNet: normal cells
    width: int = 1024                       # D
    hidden: int = 8192                      # H
    heads: int = 16                         # A, of 64 channels each
    filters: int = 512                      # D of AmoebaNet
    dropout: float = 0.0                    # behind every sub-layer; AmoebaNet: before the classifier
    scaled: bool = True                     # feed-forward initialisation divided by the number of layers
    clip: float = 20.0                      # training clips logits to +-clip (paper: no value); 0: not
    temperature: float = 1.43               # language pairs are drawn ~ size^(1 / temperature)
    stages: int = 0                         # K; 0: as many as --gpus
    micro: int = 8                          # M (paper: at least 4 K)
    checkpoint: Literal["always", "except_last", "never"] = "except_last"       # what is recomputed
    balance: str = "flops"                  # stages share flops, time or params; or layers by hand, as 3,2,4
    goal: Literal["variance", "bottleneck"] = "variance"        # what is least in the stages' shares
    devices: str = ""                       # one a stage, as cuda:0,cuda:0; default: GPUs in turn, or the CPU
    emulate: float = 0.0                    # seconds that a stage sleeps instead of an F; twice for a B
    plan: bool = False                      # print memory, bubble and speed-up; nothing runs
    steps: int = 100_000                    # optimizer steps
    batch: int = 128                        # mini-batch N: samples a step, of all replicas
    lr: float = 0.001                       # peak learning rate
    warmup: int = 0                         # steps over which it rises
    decay: int = 0                          # AmoebaNet: steps in which it falls by 3 % (2 epochs)
    cooldown: float = 0.0                   # share of the steps in which it falls to 2 % (our choice)
    momentum: float = 0.0003                # of BatchNorm's running averages (official code)
    seed: int = 0                           # every random number is a function of (seed, step)
    gpus: int = 1                           # devices; without a GPU, threads of the CPU
    device: str = "auto"                    # auto, cpu or cuda
    bf16: bool = False                      # bf16 autocast on CUDA
    compile: bool = False                   # torch.compile for the layers
    name: str = ""                          # run folder runs/gpipe/NAME; default: the preset
    resume: bool = False                    # go on from runs/gpipe/NAME/last.pt
    sample: str = ""                        # checkpoint to answer the test split with
    log: int = 50                           # steps between log lines
    save: int = 500                         # steps between checkpoints and timelines
    sampling = ("stages", "gpus", "devices", "micro", "balance", "goal")      # what --sample may change

AMOEBA = dict(model="amoebanet-d", data="folder:imagenet", size=224, classes=1000, decay=20_000, dropout=0.5)
SMALL = dict(model="amoebanet-d", data="shapes", lr=0.01, momentum=0.1)
PRESETS = {
    "demo": dict(layers=2, width=96, hidden=192, heads=2, steps=450, batch=192, lr=3e-3, warmup=60,
                 cooldown=0.5, stages=2, micro=4),
    "demo-images": SMALL | dict(size=16, layers=3, filters=16, steps=200, batch=64, cooldown=0.5, stages=2),
    "small": SMALL | dict(data="cifar10", layers=6, filters=64, steps=20_000, cooldown=0.9),    # not yet run
    "AmoebaNet-B-18-512": AMOEBA | dict(model="amoebanet-b", layers=18, size=480, stages=4),
    **{f"AmoebaNet-D-{L}-{D}": AMOEBA | dict(layers=L, filters=D) for L, D in (         # Tables 1 to 3
        (18, 208), (18, 416), (18, 544), (36, 544), (72, 512), (18, 256), (18, 128))},
    **{f"Transformer-{L}": dict(model="lm", classes=32000, layers=L, width=2048, heads=32, batch=32, micro=32)
       for L in (3, 13, 24, 48, 103, 415, 1663)},
    **{f"T-{L}-{H}-{A}": dict(data="tsv:pairs.tsv", classes=64_000, layers=L, hidden=H, heads=A)
       for L, H, A in ((6, 8192, 16), (24, 8192, 16), (12, 16384, 32), (32, 16384, 32), (64, 16384, 32))}}
TARGETS = {"demo": 0.93}                    # share of right answers; two seeds gave 0.961 and 0.967

def check(cfg):
    """Every mistake that can be seen without the data; UserError with one line."""
    need, images, still = common.need, "amoebanet" in cfg.model, cfg.plan or cfg.emulate > 0
    for name in ("size", "layers", "width", "hidden", "heads", "filters", "micro", "temperature"):
        need(getattr(cfg, name) > 0, f"--{name} {getattr(cfg, name)}: must be above 0")
    need(0 <= cfg.dropout < 1 and cfg.width % 2 == 0,
         f"--dropout {cfg.dropout}, --width {cfg.width}: must lie in [0, 1) and be even")
    need(not images or cfg.layers % 3 == cfg.filters % 4 == 0,
         f"--layers {cfg.layers}, --filters {cfg.filters}: AmoebaNet needs multiples of 3 and of 4")
    text = cfg.data[:4] == "tsv:" or cfg.data[:7] == "numbers" and (cfg.data[8:] or "0").isdigit()
    need(still or cfg.model == "translate" and text or images and not text,
         f"--data {cfg.data}: nothing that --model {cfg.model} trains on; see both in --help")
    L = cfg.layers + (4 + 2 * (cfg.size > 63) if images else 2 + cfg.layers * (cfg.model == "translate"))
    K, hand = len(devices(cfg)), cfg.balance.split(",") if cfg.balance.replace(",", "").isdecimal() else []
    need(K <= L, f"--stages {K}: this model is a sequence of {L} layers; ask for {L} at most")
    need(hand or cfg.balance in ("flops", "params", *["time"] * (not still)),
         f"--balance {cfg.balance}: write flops, params, 3,2,4 or, in training, time")
    need(not hand or len(hand) == K and sum(map(int, hand)) == L and "0" not in hand,
         f"--balance {cfg.balance}: must be {K} numbers above 0 that sum to {L} layers")

def devices(cfg):
    """One device a stage: those named, else --gpus GPUs of this replica in turn, else the CPU."""
    K, gpus = cfg.stages or cfg.gpus, torch.cuda.device_count()
    first = common.rank() % max(1, gpus // cfg.gpus)        # of the replicas on this machine
    turn = "cuda:{}" if gpus and cfg.device != "cpu" else "cpu"
    turns = ",".join(turn.format((first * K + k) * cfg.gpus // K) for k in range(K))
    named = (cfg.devices or turns).split(",")
    there = ["cpu", *map("cuda:{}".format, range(gpus))]
    common.need(set(named) <= set(there) and len(named) >= K,
                f"--devices {','.join(named)}: {K} are needed, one a stage, of {', '.join(there)}")
    return named[:K]

def prepare(cfg):
    """Once, before all else: downloads and packing."""
    return None if cfg.plan or cfg.emulate else open_split(cfg, "train")


# --- Building blocks ---------------------------------------------------------
# A layer takes and returns one tensor or one tuple of tensors, batch first, and leaves its input as it is.

HERE = threading.local()                    # a stage tells its layers: generator, recompute

class Dropout(nn.Module):
    """Dropout whose mask is drawn again when the layer is recomputed."""
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = torch.empty_like(x).bernoulli_(1 - self.p, generator=getattr(HERE, "generator", None))
        return x * keep / (1 - self.p)

class BatchNorm(nn.BatchNorm2d):
    """Deferred (Sec. 2.2, G11): training normalises each micro-batch by its own moments; the running averages
    move once a mini-batch, by the biased moments of all its micro-batches."""

    sums = 0
    def forward(self, x):
        if not self.training:
            return super().forward(x)                                               # (B, C, h, w)
        mean, var = 0 * self.running_mean, 0 * self.running_var                         # (C), (C)
        # With momentum 1 torch leaves the moments of this call in the buffers, the variance unbiased.
        y = F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps)     # (B, C, h, w)
        n, mean, var = x.numel() // x.shape[1], mean.double(), var.double()
        if not getattr(HERE, "recompute", False):       # in float64: s2 / n - mean^2 cancels
            self.sums += torch.stack([0 * mean + n, n * mean, (n - 1) * var + n * mean.square()])
        return y                                                                    # (B, C, h, w)

    @torch.no_grad()
    def commit(self):
        """running <- (1 - momentum) running + momentum * moment, of all micro-batches of all replicas."""
        if common.world() > 1:
            torch.distributed.all_reduce(self.sums)
        n, s1, s2 = self.sums                                                       # (C), (C), (C)
        self.running_mean += self.momentum * (s1 / n - self.running_mean)
        self.running_var += self.momentum * (s2 / n - (s1 / n).square() - self.running_var)
        self.num_batches_tracked += 1

# AmoebaNet (digest Sec. 3): ten operations, each behind the state it reads (0 current input, 1 previous one),
# added in pairs to give states 2 to 6; then the states that are concatenated.
CELLS = {
    "d normal": "1 conv1, 1 max3, 1 none, 0 conv7, 0 conv1, 0 conv7, 2 max3, 2 none, 1 avg3, 5 conv1: 0346",
    "d reduction": "0 max2, 0 max3, 2 none, 1 conv3, 2 conv7, 2 max3, 3 none, 1 max2, 2 avg3, 3 conv1: 456",
    "b normal": "1 conv1, 1 max3, 1 none, 0 sep3, 1 conv1, 0 sep3, 2 conv1, 2 none, 1 avg3, 5 conv1: 0346",
    "b reduction": "0 max2, 0 max3, 2 none, 1 conv3, 2 sep5, 2 max3, 3 none, 1 sep3, 4 avg3, 3 conv1: 56"}

def conv(P, C, size=(1, 1), stride=1):
    """ReLU, convolution from P to C channels without bias, batch norm."""
    return [nn.ReLU(), nn.Conv2d(P, C, size, stride, [n // 2 for n in size], bias=False), BatchNorm(C, 1e-3)]

def operation(name, P, C, stride):
    """The modules of an operation from P to C channels; stride 2 halves the sides, rounding up."""
    pools = {"none": nn.Identity(), "max2": nn.MaxPool2d(2, stride, ceil_mode=True),
             "max3": nn.MaxPool2d(3, stride, 1), "avg3": nn.AvgPool2d(3, stride, 1, count_include_pad=False)}
    if name in pools:
        return [pools[name], *conv(P, C)[1:] * (P != C)]
    k, q = int(name[-1]), C // 4
    if name[:3] == "sep":                               # the paper's dilated sep5 is not dilated in its code
        first, second = (nn.Conv2d(W, W, k, s, k // 2, 1, W, False) for W, s in ((P, stride), (C, 1)))
        return [nn.ReLU(), first, *conv(P, C)[1:], nn.ReLU(), second, *conv(C, C)[1:]]
    middle = {1: [], 3: conv(q, q, (3, 3), stride), 7: conv(q, q, (1, 7)) + conv(q, q, (7, 1))}[k]
    return conv(P, q) + middle + conv(q, C) if middle else conv(P, C)

class FactorizedReduce(nn.Module):
    """Halve the sides: two strided 1x1 convolutions, the second one pixel further, concatenated."""
    def __init__(self, P, C):
        super().__init__()
        self.even, self.odd = (nn.Conv2d(P, half, 1, 2, bias=False) for half in (C // 2, C - C // 2))
        self.norm = BatchNorm(C, 1e-3)

    def forward(self, x):
        x = F.relu(x)                                                               # (B, P, h, w)
        shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]                              # (B, P, h, w)
        return self.norm(torch.cat([self.even(x), self.odd(shifted)], 1))           # (B, C, y, x)

class Cell(nn.Module):
    """An AmoebaNet cell of C filters: (current, previous) -> (concatenation, current)."""
    def __init__(self, kind, P, Q, C, halved, raw):
        """P, Q: channels of current and previous, which is twice as large if halved, left alone if raw."""
        super().__init__()
        genes, concat = CELLS[kind].split(": ")
        self.concat, genes = [int(i) for i in concat], [gene.split() for gene in genes.split(", ")]
        self.current, self.sources = nn.Sequential(*conv(P, C)), [int(source) for source, _ in genes]
        fit = [FactorizedReduce(Q, C)] if halved else [] if raw or Q == C else conv(Q, C)
        self.previous = nn.Sequential(*fit)
        self.steps = nn.ModuleList(nn.Sequential(*operation(
            name, Q if raw and source == "1" else C, C, 2 if "reduction" in kind and source in "01" else 1))
            for source, name in genes)

    def forward(self, states):
        current, previous = states if isinstance(states, tuple) else (states, states)
        h = [self.current(current), self.previous(previous)]
        for i in range(0, 10, 2):
            left, right = (self.steps[j](h[self.sources[j]]) for j in (i, i + 1))   # each (B, C, y, x)
            h.append(left + right)
        return torch.cat([h[i] for i in self.concat], 1), current

class Attention(nn.Module):
    """A heads of d channels; A d need not be D: the counts of Sec. 5 ask for it."""
    def __init__(self, D, A, d=64):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(D, A * d) for _ in range(3))
        self.heads, self.out = A, nn.Linear(A * d, D)

    def forward(self, x, memory, mask=None, causal=False):
        qkv = self.query(x), self.key(memory), self.value(memory)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)         # (B, A, N, d)
        return self.out(y.transpose(1, 2).flatten(2))                               # (B, N, D)

class Layer(nn.Module):
    """A Transformer layer, pre-norm. "encoder" changes x of (x, ..., source ids), "decoder" y of (x, y,
    source ids), "causal" x of (x, ids): Table 1's language model."""
    def __init__(self, D, H, A, dropout, kind):
        super().__init__()
        self.kind, self.drop, self.attention = kind, Dropout(dropout), Attention(D, A)
        self.cross = Attention(D, A) if kind == "decoder" else None
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(3 if kind == "decoder" else 2))
        self.wide, self.narrow = nn.Linear(D, H), nn.Linear(H, D)

    def mix(self, x, mask, memory=None):
        y, causal = self.norms[0](x), self.kind != "encoder"
        x = x + self.drop(self.attention(y, y, None if causal else mask, causal))   # (B, N, D)
        if self.cross:
            x = x + self.drop(self.cross(self.norms[2](x), memory, mask))           # (B, N, D)
        return x + self.drop(self.narrow(F.relu(self.wide(self.norms[1](x)))))      # (B, N, D)

    def forward(self, states):
        x, *rest = states
        mask = (rest[-1] != PAD)[:, None, None]                                     # (B, 1, 1, S)
        if self.kind != "decoder":
            return self.mix(x, mask), *rest
        return x, self.mix(rest[0], mask, F.layer_norm(x, x.shape[-1:])), rest[1]

class Embed(nn.Module):
    """(source, target) ids -> (x, y, source ids), or (ids,) -> (x, ids): vectors plus sines of place."""
    def __init__(self, V, D, dropout):
        super().__init__()
        self.table, self.drop = nn.Embedding(V, D), Dropout(dropout)

    def vectors(self, ids):
        D, places = self.table.embedding_dim, torch.arange(ids.shape[1], device=ids.device)
        angle = places[:, None] * 10000.0 ** -(torch.arange(0, D, 2, device=ids.device) / D)
        waves = torch.cat([angle.sin(), angle.cos()], 1)                            # (N, D)
        return self.drop(self.table(ids) * D ** 0.5 + waves)                        # (B, N, D)

    def forward(self, ids):
        return *map(self.vectors, ids), ids[0]

class Logits(nn.Module):
    """V logits of a map's mean or of the last sequence; training clips the latter, a trick for depth (Sec.
    5)."""
    def __init__(self, D, V, dropout=0.0, clip=0.0, bias=True):
        super().__init__()
        self.project, self.drop, self.clip = nn.Linear(D, V, bias), Dropout(dropout), clip

    def forward(self, states):
        if states[0].ndim == 4:
            return self.project(self.drop(F.relu(states[0]).mean((2, 3))))          # (B, V)
        logits = self.project(F.layer_norm(states[-2], states[-2].shape[-1:]))      # (B, N, V)
        return logits.clamp(-self.clip, self.clip) if self.training and self.clip else logits


# --- Model -------------------------------------------------------------------

def amoebanet(kind, L, D, V, stem="wide", dropout=0.0):
    """AmoebaNet-D or -B (kind "d", "b"): stem, stem cells, three stacks of L/3 normal cells with D, 2 D, 4 D
    filters, reduction cells between them, V logits. stem: filters of the first convolution and of the stem
    cells; "small", for 32 pixels, at stride 1, is our choice."""
    P, *widths = {"wide": (D // 4, D // 2, D), "tpu": (32, D // 4, D // 2), "small": (D,)}[stem]
    stacks = [[("reduction", C)] * (C > D) + [("normal", C)] * (L // 3) for C in (D, 2 * D, 4 * D)]
    plan = sum(stacks, [("reduction", C) for C in widths])
    layers, Q, halved = [nn.Sequential(*conv(3, P, (3, 3), 1 if stem == "small" else 2)[1:])], P, False
    for cell, C in plan:
        layers.append(Cell(f"{kind} {cell}", P, Q, C, halved, raw=stem == "tpu" and len(layers) == 1))
        P, Q, halved = C * len(layers[-1].concat), P, cell == "reduction"
    return nn.Sequential(*layers, Logits(P, V, dropout))

@torch.no_grad()
def transformer(L, H, A, V, D=1024, decoder=True, dropout=0.0, clip=0.0, scaled=True):
    """T(L, H, A) of Sec. 5: L encoder and L decoder layers, feed-forward width H, A heads, V tokens; or,
    without decoder, Transformer-L of Table 1. Weights start with variance 1 / inputs; `scaled`, the other
    trick, divides those of the feed-forward output (our choice) by the number of layers."""
    kinds = ["encoder"] * L + ["decoder"] * L if decoder else ["causal"] * L
    layers = [Layer(D, H, A, dropout, kind) for kind in kinds]
    model = nn.Sequential(Embed(V, D, dropout), *layers, Logits(D, V, 0.0, clip, not decoder))
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            weight.normal_(0, weight.shape[1] ** -0.5 / (len(layers) if scaled and "narrow" in name else 1))
        elif name.endswith("bias"):
            weight.zero_()
    return model


# --- Objective ---------------------------------------------------------------

def loss(output, target, total, smoothing=0.1):
    """Cross-entropy of logits (B, V) or (B, N, V) on the gathered mini-batch (G6), summed over targets but
    -100, over their number: a mean of micro-batch means would weigh uneven ones wrongly. The plain form of a
    step, which the pipeline must equal: loss(model(inputs), target, total).backward()."""
    logits, target = output.flatten(0, -2).float(), target.flatten()
    return F.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing) / total


# --- Sampling ----------------------------------------------------------------

def clock_cycles(K, M):
    """Forward order on K stages: at clock t, stage k has micro-batch m = t - k. M + K - 1 lists of (m, k)."""
    return [[(t - k, k) for k in range(K) if 0 <= t - k < M] for t in range(M + K - 1)]

def schedule(K, M, mode):
    """One training step: tasks (kind, m, k) in an order one worker could follow; each stage follows its own.
    F forward, L loss, R re-materialization, B backward: last in, first out. R asks nothing of the next stage,
    so that it fills the wait for a gradient (Sec. 2.3); "except_last" spares what is needed at once."""
    tasks = [("F", m, k) for cycle in clock_cycles(K, M) for m, k in cycle] + [("L", M - 1, K - 1)]
    for m, k in (entry for cycle in reversed(clock_cycles(K, M)) for entry in cycle):
        tasks += [("R", m, k)] * (mode == "always" or mode == "except_last" and m < M - 1) + [("B", m, k)]
    return tasks

def simulate(tasks, cost, link=0, early=True):
    """{task: (start, end)} on a virtual clock, where a task takes cost(kind, m, k) and a boundary `link`,
    during which stages may work. early=False: R waits for the gradient like B."""
    times, free = {}, {}
    for kind, m, k in tasks:
        before = {"F": ("F", m, k - 1), "B": ("B", m, k + 1), "R": not early and ("B", m, k + 1)}.get(kind)
        start = max(free.get(k, 0), times[before][1] + link if before in times else 0)
        free[k] = start + cost(kind, m, k)
        times[kind, m, k] = start, free[k]
    return times

def idle(times, K):
    """(idle share of K stages, makespan) of {task: (start, end)}."""
    span = max(end for _, end in times.values()) - min(start for start, _ in times.values())
    return 1 - sum(end - start for start, end in times.values()) / (K * span), span

def bubble(K, M):
    """The idle share of equal stages (Sec. 2.3, G10), without the O(.)."""
    return (K - 1) / (M + K - 1)

def partition(costs, K, goal="variance"):
    """Sizes of K runs of consecutive layers by dynamic programming: least variance of costs (Sec. 2.2, G3),
    or least "bottleneck", their largest."""
    total = np.cumsum([0.0, *costs])
    price = (total - total[:, None]) ** (2 if goal == "variance" else 1)    # [i, j]: layers i..j-1
    price[np.tril_indices(len(total))] = np.inf
    best, cuts, ends = price[0], [], [len(costs)]
    for _ in range(K - 1):                                  # best[j]: of layers 0..j-1 in one run more
        options = np.maximum(best[:, None], price) if goal == "bottleneck" else best[:, None] + price
        best, cuts = options.min(0), [options.argmin(0), *cuts]
    for cut in cuts:
        ends.insert(0, int(cut[ends[0]]))
    return np.diff([0, *ends]).tolist()

parts = lambda value: value if isinstance(value, tuple) else (value,)   # a tensor or a tuple, as a tuple

def each(function, value):
    """function of a tensor, or of every tensor of a tuple; None stays None."""
    done = tuple(part if part is None else function(part) for part in parts(value))
    return done if isinstance(value, tuple) else done[0]

def split(value, M):
    """min(M, N) near-equal micro-batches of a tensor or tuple, along the first axis (G4), without graph."""
    sizes = {len(part) for part in parts(value)}
    common.need(len(sizes) == 1 and min(sizes) > 0, f"mini-batch of {sizes} samples: one number is needed")
    cuts = [[cut.requires_grad_(part.requires_grad) for cut in part.detach().tensor_split(min(M, len(part)))]
            for part in parts(value)]
    return list(zip(*cuts)) if isinstance(value, tuple) else cuts[0]

def gather(pieces):
    """The inverse of split."""
    whole = tuple(None if column[0] is None else torch.cat(column) for column in zip(*map(parts, pieces)))
    return whole if isinstance(pieces[0], tuple) else whole[0]

class Channel:
    """One direction of one boundary: a queue, and on CUDA a copy stream on either side."""
    def __init__(self, source, target, read, write):
        self.source, self.target, self.read, self.write = source, target, read, write

    def put(self, value):
        """Send a tensor or tuple (None: no gradient) that the source's current stream has made."""
        self.bytes += sum(part.nbytes for part in parts(value) if part is not None)
        self.queue.put((value, torch.cuda.current_stream(self.source).record_event() if self.read else None))

    def get(self):
        """Wait for the next value, on the target device and ready for its current stream."""
        value, made = self.queue.get()
        if self.closed:
            raise CancelledError
        return each(lambda part: self.copy(part, made), value) if made else value

    def copy(self, part, made):
        """CUDA: torch copies on the source's stream and synchronises the target's; the receiver waits for
        that alone. record_stream: no memory is handed out before the copy is done."""
        self.read.wait_event(made)
        self.write.wait_event(made)
        with torch.cuda.stream(self.read), torch.cuda.stream(self.write):
            arrived = part.detach().to(self.target, non_blocking=True).requires_grad_(part.requires_grad)
        part.record_stream(self.read)
        arrived.record_stream(torch.cuda.current_stream(self.target))
        torch.cuda.current_stream(self.target).wait_stream(self.write)
        return arrived

class Pipeline:
    """An nn.Sequential on K stages, under its own names: `step` leaves one device's gradients in it, `infer`
    predicts. The slow form: one worker (threads=False) on the current streams (streams=False)."""
    def __init__(self, model, sizes, devices, M=1, mode="except_last", seed=0, streams=True, threads=True):
        """sizes: layers of a stage; devices: one a stage; M micro-batches. Raises common.UserError."""
        K, fits = len(sizes), sum(sizes) == len(model) and min(sizes) > 0
        common.need(fits, f"balance {sizes}: must be above 0 and sum to {len(model)} layers")
        common.need(0 < M and K <= len(devices), f"{M} micro-batches, {K} stages on {len(devices)} devices: "
                    "at least 1, and a device a stage")
        self.model, self.chunks, self.mode, self.seed, self.threads = model, M, mode, seed, threads
        self.devices = [torch.device(device) for device in devices[:K]]
        stream = torch.cuda.Stream if streams else torch.cuda.current_stream
        own = [[stream(d) if d.type == "cuda" else None for d in self.devices] for _ in range(5)]
        self.compute, ends = own[0], list(zip([0, *range(K)], [*range(K), K - 1]))      # stages of a boundary
        self.ahead = [Channel(self.devices[a], self.devices[b], own[1][a], own[2][b]) for a, b in ends]
        self.back = [Channel(self.devices[b], self.devices[a], own[3][b], own[4][a]) for a, b in ends]
        self.first = np.cumsum([0, *sizes]).tolist()
        self.cells = [model[self.first[k]:self.first[k + 1]].to(self.devices[k]) for k in range(K)]
        owned = [id(tensor) for cell in self.cells for tensor in {*cell.parameters(), *cell.buffers()}]
        common.need(len(set(owned)) == len(owned), "two stages share a parameter: join their layers")
        self.norms = [module for module in model.modules() if isinstance(module, BatchNorm)]

    def step(self, inputs, loss, number=0):
        """One mini-batch: adds the sum of its micro-batches' gradients (G8) to every .grad; raises what a
        stage raised, all threads ended. inputs: tensor or tuple, batch first; loss(output) -> scalar, on the
        last device; number: training step. Returns (loss, output, gradient of the inputs)."""
        self.model.train()
        self.loss = loss
        self.run(inputs, number)
        for norm in self.norms:
            norm.commit()
        return *self.result, gather([self.back[0].get() for _ in range(self.M)][::-1])

    def infer(self, inputs):
        """The output in evaluation mode: forwards alone, M + K - 1 clock cycles, nothing kept."""
        self.model.eval()
        self.run(inputs)
        return gather([self.ahead[-1].get() for _ in range(self.M)])

    def run(self, inputs, number=None):
        """Feed the micro-batches and let workers follow the schedule; number None: inference."""
        K, kind = len(self.cells), self.devices[0].type
        pieces = split(each(lambda part: part.to(self.devices[0]), inputs), self.chunks)
        self.number, self.training, self.M = number, number is not None, len(pieces)
        self.inputs, self.outputs, self.marks, self.errors = {}, {}, {}, []
        self.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)   # by thread
        tasks = [task for task in schedule(K, self.M, self.mode) if self.training or task[0] == "F"]
        self.again = {m for kind, m, _ in tasks if kind == "R"}
        for norm in self.norms:
            norm.sums = 0
        for channel in self.ahead + self.back:
            channel.queue, channel.closed, channel.bytes = queue.SimpleQueue(), False, 0
        for piece in pieces:
            self.ahead[0].put(piece)
        for device in set(self.devices) if kind == "cuda" else ():      # after what the caller has enqueued
            torch.cuda.synchronize(device)
        self.zero = [self.mark(k) for k in range(K)]
        columns = [[task for task in tasks if task[2] == k] for k in range(K)] if self.threads else [tasks]
        with ThreadPoolExecutor(len(columns)) as workers:
            list(workers.map(self.follow, columns))
        self.times = self.marks
        if kind == "cuda":                                  # events of two devices do not compare
            for stream in self.compute:
                stream.synchronize()
            self.times = {task: tuple(self.zero[task[2]].elapsed_time(mark) / 1000 for mark in pair)
                          for task, pair in self.marks.items()}
        if self.errors:
            raise self.errors[0]

    def mark(self, k):
        """A moment on stage k: seconds on the CPU, an event of the compute stream on CUDA."""
        own = self.compute[k]
        return own.record_event(torch.cuda.Event(enable_timing=True)) if own else time.perf_counter()

    def follow(self, tasks):
        """Do tasks in order, each once its input is here. An exception stops all workers."""
        try:
            for kind, m, k in tasks:
                with torch.cuda.stream(self.compute[k]), torch.set_grad_enabled(self.training):
                    value = {"F": self.ahead[k], "B": self.back[k + 1]}[kind].get() if kind in "FB" else None
                    start = self.mark(k)
                    value = getattr(self, kind)(m, k, value)
                    self.marks[kind, m, k] = start, self.mark(k)
                    if kind in "FB":
                        {"F": self.ahead[k + 1], "B": self.back[k]}[kind].put(value)
        except CancelledError:                              # another stage has failed
            pass
        except BaseException as error:
            self.errors.append(error)
            for channel in self.ahead + self.back:          # turn away whoever waits, now or later
                channel.closed = True
                channel.queue.put((None, None))

    def cell(self, m, k, x, recompute=False):
        """F_k of Sec. 2.1 (G1): stage k's layers in turn, each with its own draws for (seed, step, m)."""
        y, versions, HERE.recompute = x, [part._version for part in parts(x)], recompute
        with torch.autocast(*self.autocast, cache_enabled=False):
            for i, layer in enumerate(self.cells[k], self.first[k]):
                name = f"layer {i} micro-batch {m + common.rank() * self.M}"
                HERE.generator = common.draws(self.seed, self.number, name, self.devices[k])
                y = layer(y)
        common.need(versions == [part._version for part in parts(x)], f"stage {k} changes its input in place")
        return y

    def F(self, m, k, x):
        """Forward. What is recomputed later drops its interior here: nobody keeps its output's graph."""
        y = self.cell(m, k, x)
        if self.training:
            self.inputs[m, k] = x
        if self.training and m not in self.again:
            self.outputs[m, k] = y
        return each(lambda part: part.detach().requires_grad_(part.requires_grad), y)

    def R(self, m, k, _):
        """Re-materialize the interior from the stashed input (Sec. 2.3)."""
        self.outputs[m, k] = self.cell(m, k, self.inputs[m, k], recompute=True)

    def B(self, m, k, gradients):
        """Backward (G7): parameters add up their gradients, the input's goes to the stage before."""
        x, y = self.inputs.pop((m, k)), self.outputs.pop((m, k))
        pairs = [(a, g) for a, g in zip(parts(y), parts(gradients)) if a.requires_grad and g is not None]
        torch.autograd.backward([a for a, _ in pairs], [g for _, g in pairs])
        return each(lambda part: part.grad, x)

    def L(self, m, k, _):
        """The loss of the gathered mini-batch (G6); its gradient returns in pieces, the last one first."""
        y = gather([self.ahead[k + 1].get() for _ in range(m + 1)])
        y = each(lambda part: part.detach().requires_grad_(part.is_floating_point()), y)
        value = self.loss(y)
        value.backward()
        self.result = value.detach(), each(torch.Tensor.detach, y)
        gradients = each(lambda part: torch.zeros_like(part) if part.grad is None else part.grad, y)
        for gradient in reversed(split(gradients, m + 1)):
            self.back[k + 1].put(gradient)

def profile(model, inputs):
    """Of every layer, for one micro-batch and by shapes alone (meta device): forward "flops", "params", bytes
    of its "input" if backward needs it, bytes "kept" of all else that backward needs."""
    x, rows = each(lambda part: part.to("meta"), inputs), []
    place = lambda tensor: tensor.untyped_storage()._cdata
    for layer in copy.deepcopy(model).to("meta"):
        x, kept, out = each(lambda t: t.detach().requires_grad_(t.is_floating_point()), x), {}, []
        hold = lambda tensor, kept=kept: (kept.setdefault(place(tensor), tensor), tensor)[1]
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            flops = common.flops(lambda: out.append(layer(x)))
        weights = {place(weight): weight.numel() for weight in layer.parameters()}
        size = {key: tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights}
        entry = sum(size.pop(key, 0) for key in {place(part) for part in parts(x)})
        rows.append(dict(flops=flops, params=sum(weights.values()), input=entry, kept=sum(size.values())))
        x = out[0]
    return rows

def footprint(rows, sizes, M, mode):
    """(parameter bytes, peak activation bytes) of every stage (Sec. 2.3, G9): 12 a parameter, as Table 1
    (weight, gradient, RMSProp's accumulator); M inputs, and one interior, or M without recomputation."""
    stages = []
    for size, end in zip(sizes, np.cumsum(sizes)):
        cell, entry = rows[end - size:end], rows[end - size]["input"]
        kept = (M if mode == "never" else 1) * (sum(row["kept"] + row["input"] for row in cell) - entry)
        stages.append((12 * sum(row["params"] for row in cell), M * entry + kept))
    return stages

def timeline(path, pipe):
    """Write the last mini-batch as an SVG: a row a stage, a box a task, grey is idle; return that share."""
    K, M, colors, times = len(pipe.cells), pipe.M, dict(zip("FRBL", common.COLORS)), pipe.times
    zero, (share, span) = min(start for start, _ in times.values()), idle(times, K)
    boxes = [f'<rect x="70" y="{40 + 30 * k}" width="860" height="24" fill="#ddd"/>' for k in range(K)]
    boxes += [common.svg_text(62, 56 + 30 * k, f"stage {k}", "end") for k in range(K)]
    title = f"K = {K}, M = {M}: {span:.3g} s, idle {share:.1%}; bubble of equal stages {bubble(K, M):.1%}"
    boxes.append(common.svg_text(480, 24, title, extra='font-weight="bold"'))
    for (kind, m, k), (start, end) in times.items():
        x, y, width = 70 + 860 * (start - zero) / span, 40 + 30 * k, 860 * (end - start) / span
        boxes += [f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="24" fill="{colors[kind]}"/>',
                  common.svg_text(x + width / 2, y + 16, f"{kind}{m}" * (width > 16), extra='fill="white"')]
    for i, word in enumerate(("F forward", "R recompute", "B backward", "L loss")):
        boxes.append(common.svg_text(120 + 130 * i, 60 + 30 * K, word, extra=f'fill="{common.COLORS[i]}"'))
    common.svg(path, 960, 80 + 30 * K, boxes)
    return share


# --- Training ----------------------------------------------------------------

def open_split(cfg, split):
    """Sentence pairs (data.Pairs) or images (data.Data) of the 'train' or 'test' split."""
    kind, _, rest = cfg.data.partition(":")
    if kind in ("numbers", "tsv"):
        source = dict(path=rest) if kind == "tsv" else dict(limit=int(rest or 10_000))
        return data.translation_pairs(split, tests=10, **source)
    return data.open_data(cfg.data, split, size=cfg.size)

def build(cfg, V):
    """The model for V tokens or classes, and a micro-batch of zeros for shapes and times."""
    torch.manual_seed(common.draws(cfg.seed, 0, "weights").initial_seed())
    n, pairs = max(1, cfg.batch // cfg.micro // common.world()), cfg.model == "translate"
    if "amoebanet" not in cfg.model:
        size = cfg.layers, cfg.hidden, cfg.heads, V, cfg.width
        model = transformer(*size, pairs, cfg.dropout, cfg.clip, cfg.scaled)
        return model, (torch.zeros(n, 16 if pairs else 1024, dtype=torch.long),) * (1 + pairs)    # Table 1
    stem = "small" if cfg.size < 64 else {"d": "wide", "b": "tpu"}[cfg.model[-1]]
    model = amoebanet(cfg.model[-1], cfg.layers, cfg.filters, V, stem, cfg.dropout)
    for norm in model.modules():
        norm.momentum = cfg.momentum
    return model, torch.zeros(n, 3, cfg.size, cfg.size)

def shares(cfg, model, inputs, K, rows=None):
    """Layers of each of K stages: by hand, or by a partition of FLOPs, parameters or seconds of F and B."""
    if cfg.balance[0].isdecimal():
        return [int(n) for n in cfg.balance.split(",")]
    if cfg.balance != "time":
        return partition([row[cfg.balance] for row in rows or profile(model, inputs)], K, cfg.goal)
    pipe = Pipeline(copy.deepcopy(model), [1] * len(model), devices(cfg)[:1] * len(model))
    for _ in range(3):                                      # every layer a stage; the last step counts
        pipe.step(inputs, lambda output: output.square().mean())
    spans = {task: end - start for task, (start, end) in pipe.times.items()}
    return partition([spans["F", 0, k] + spans["B", 0, k] for k in range(len(model))], K, cfg.goal)

def pipeline(cfg, dataset):
    """The model for this data, on its stages."""
    V, where = len(dataset.vocabulary.words if cfg.model == "translate" else dataset.classes), devices(cfg)
    common.need(cfg.classes in (0, V), f"--classes {cfg.classes}: {cfg.data} has {V}")
    model, inputs = build(cfg, V)
    torch.set_num_threads(1)                                # inside a stage, so that no number depends on K
    if common.rank() == 0:
        print("no GPU in use: " * (where[0] == "cpu") + f"{len(where)} stages on {', '.join(where)}, "
              f"mini-batches of {cfg.batch} in {min(cfg.micro, cfg.batch)} micro-batches", flush=True)
    cut = shares(cfg, model, inputs, len(where))
    return Pipeline(model, cut, where, cfg.micro, cfg.checkpoint, cfg.seed)

def draw(dataset, cfg, step):
    """One step's (inputs, target, total), drawn for the global mini-batch, cut to this replica: images
    uniformly, mirrored at random; pairs by temperature-based sampling of their direction (Sec. 5)."""
    small = common.draws(cfg.seed, step, "data")
    if cfg.model != "translate":
        index = common.mine(torch.randint(len(dataset), (cfg.batch,), generator=small)).numpy()
        flip = common.mine(torch.rand(cfg.batch, 1, 1, 1, generator=small) < 0.5)
        x = dataset.pixels(index)
        return torch.where(flip, x.flip(-1), x), torch.as_tensor(dataset.labels[index]), len(index)
    size = torch.as_tensor(np.bincount(dataset.direction)[dataset.direction]).double()
    index = torch.multinomial(size ** (1 / cfg.temperature - 1), cfg.batch, True, generator=small).numpy()
    source, ids = torch.as_tensor(dataset.source[index]), torch.as_tensor(dataset.target[index])
    target = torch.where(ids == PAD, -100, ids)[:, 1:]
    total = int((target != -100).sum()) / common.world()    # a token counts alike in all replicas
    return (common.mine(source), common.mine(ids[:, :-1])), common.mine(target), total

def learning_rate(cfg, step):
    """Rise, then the paper's exponential fall or lingvo's inverse square root, and our cooldown."""
    rise, left = (step + 1) / max(1, cfg.warmup), (cfg.steps - step) / max(1, cfg.steps * cfg.cooldown)
    fall = 0.97 ** (step / cfg.decay) if cfg.decay else rise ** -0.5 if cfg.warmup else 1.0
    return cfg.lr * min(1.0, rise, fall, 0.02 + 0.98 * left)

def train(cfg):
    """Train through the pipeline, answer the test split; return the exit code (1: the target is missed)."""
    dataset = open_split(cfg, "train")
    run = common.Run(cfg)
    pipe = pipeline(cfg, dataset)
    # Sec. 4: RMSProp with decay 0.9, eps 0.1 (torch adds it outside the root); translation: lingvo's Adam
    opt = (torch.optim.Adam(pipe.model.parameters(), cfg.lr, (0.9, 0.997), 1e-9) if cfg.model == "translate"
           else torch.optim.RMSprop(pipe.model.parameters(), cfg.lr, 0.9, 0.1, 4e-5))
    start = run.restore(model=pipe.model, opt=opt)
    for layer in pipe.model if cfg.compile else ():
        layer.compile()
    for step in run.steps(start):
        inputs, target, total = draw(dataset, cfg, step)
        for group in opt.param_groups:
            group["lr"] = learning_rate(cfg, step)
        opt.zero_grad()
        with common.autocast(cfg):
            value = pipe.step(inputs, lambda y: loss(y, target.to(y.device), total), step)[0]
        for cell in pipe.cells:
            common.average_gradients(cell.parameters())
        opt.step()
        run.log(step, loss=value)
        if run.due(step, cfg.save) and common.rank() == 0:
            timeline(run.folder / "timeline.svg", pipe)
        run.save(step)
    target = TARGETS.get(cfg.preset, 0.0) * common.is_preset(cfg, PRESETS)
    run.say(f"{run.folder}: timeline.svg, predictions.txt" + f"; target {target} of all" * (target > 0))
    return 0 if common.rank() > 0 or answer(pipe, cfg, run.folder) >= target else 1

def answer(pipe, cfg, folder):
    """Translate or classify the test split into predictions.txt; returns the share of exact answers."""
    test, text, rows = open_split(cfg, "test"), cfg.model == "translate", []
    labels = test.direction if text else test.labels[:1000]
    groups = [f"to {language}" for _, language in test.directions] if text else test.classes
    say = test.vocabulary.decode if text else test.classes.__getitem__
    for index in np.array_split(np.arange(len(labels)), -(-len(labels) // 500)):
        if text:                                            # greedy decoding
            source, found = torch.as_tensor(test.source[index]), torch.full((len(index), 1), START)
            while found.shape[1] <= test.target.shape[1] and not (found == END).any(1).all():
                found = torch.cat([found, pipe.infer((source, found))[:, -1:].argmax(-1).cpu()], 1)
        else:
            found = pipe.infer(test.pixels(index)).argmax(1)
        wanted = test.target[index] if text else labels[index]
        rows += zip(map(groups.__getitem__, labels[index]), map(say, found), map(say, wanted))
    right = {n: np.mean([a == b for g, a, b in rows if n in (g, "all")]) for n in sorted({*groups, "all"})}
    lines = "\n".join(f"{name}: {a}" + f" (wrong: {b})" * (a != b) for name, a, b in rows)
    common.write_atomic(folder / "predictions.txt", lambda file: file.write(lines.encode()))
    print("right answers: " + ", ".join(f"{name} {share:.3f}" for name, share in right.items()), flush=True)
    return right["all"]


# --- Command line ------------------------------------------------------------

class Nap(nn.Module):
    """A layer that sleeps instead of working: `seconds` forward, twice that backward."""
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        y = x.clone()                                                               # (B, C)
        if y.requires_grad:
            y.register_hook(lambda gradient: time.sleep(2 * self.seconds))
        return y

def plan(cfg):
    """--plan: Sec. 2.3 for K stages by shapes alone; GiB of the fullest stage and of all. --emulate: the
    pipeline at work on layers that sleep in proportion to their FLOPs."""
    with torch.device("meta"):
        model, inputs = build(cfg, cfg.classes or 1000)
    rows, M, most = profile(model, inputs), cfg.micro, len(devices(cfg))
    print(f"{sum(row['params'] for row in rows):,} parameters, {len(rows)} layers, N = {cfg.batch}, M = {M}\n"
          "  K  weights  (all)  activations  (all)  bubble   idle  speed-up  layers of each stage")
    one = cfg.balance[0].isdecimal() or not cfg.plan
    for K in [most] if one else sorted({1, 2, 4, 8, most} - {*range(len(rows) + 1, 9)}):
        sizes = shares(cfg, model, inputs, K, rows)
        weights, kept = np.array(footprint(rows, sizes, M, cfg.checkpoint)).T / 2**30
        load = [sum(row["flops"] for row in rows[j - i:j]) for i, j in zip(sizes, np.cumsum(sizes))]
        times = simulate(schedule(K, M, cfg.checkpoint), lambda kind, m, k: "FRBB".count(kind) * load[k])
        share, _ = idle(times, K)
        print(f"{K:3} {weights.max():8.2f} {weights.sum():6.1f} {kept.max():12.2f} {kept.sum():6.1f} "
              f"{bubble(K, M):7.1%} {share:6.1%} {K * (1 - share):9.2f}  {sizes}")
    if cfg.emulate:
        naps = nn.Sequential(*(Nap(cfg.emulate * most * row["flops"] / sum(load)) for row in rows))
        pipe = Pipeline(naps, sizes, ["cpu"] * most, M, cfg.checkpoint)
        pipe.step(torch.zeros(cfg.batch, 1, requires_grad=True), torch.sum)
        share, where = timeline(common.folder(cfg) / "timeline.svg", pipe), common.folder(cfg)
        print(f"{most:3} emulated: idle {share:.1%}, speed-up {most * (1 - share):.2f}; {where}/timeline.svg")
    return 0

def main(cfg):
    """Train, plan, emulate, or answer with a checkpoint; returns the exit code."""
    if not cfg.sample or cfg.plan or cfg.emulate:
        return plan(cfg) if cfg.plan or cfg.emulate else train(cfg)
    pipe, saved = pipeline(cfg, open_split(cfg, "train")), common.read_checkpoint(cfg.sample, "gpipe")
    common.load_into({"model": pipe.model}, saved, cfg.sample)
    answer(pipe, cfg, Path(cfg.sample).parent / "samples")
    return 0

if __name__ == "__main__":
    common.launch(main, common.cli(Config, PRESETS, __doc__), processes=1)
