"""GPipe: Easy Scaling with Micro-Batch Pipeline Parallelism (arXiv 1811.06965)

A network that is a sequence of layers is cut into K stages, one a device, a mini-batch into M micro-batches
that stream through them: all forwards, then all backwards in the opposite order. Gradients add up, one update
follows: plain synchronous training, whatever K. A stage keeps only its inputs and recomputes the rest.

    stage 1:     F0 F1 F2 F3 B3 R2 B2 R1 B1 R0 B0         F forward, R recompute, B backward of a micro-batch;
    stage 0:  F0 F1 F2 F3 .. .. B3 R2 B2 R1 B1 R0 B0      the bubble idles (K - 1) / (M + K - 1) of the time

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
Letters:  K stages, M micro-batches, L layers, V tokens or classes, B samples, C P Q R channels, h w y x
          v u sides, D width, H feed-forward width, A heads of d channels, S source and N target tokens.
          Labels, for the paper numbers no equation: stage G1, its cost G2, partition G3, split G4, forward
          G5, loss G6, backward G7, sum of gradients G8, memory G9, bubble G10, BatchNorm G11.
CUDA:     never run on CUDA. Read in this order: schedule, Pipeline (run, follow, F, L, R, B), Channel, train.
"""

import copy
import math
import os
import queue
import random
import re
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common
import data

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


# --- Configuration -----------------------------------------------------------
@dataclass
class Config:
    preset: str = "demo"                    # where the values below start from
    model: Literal["translate", "amoebanet-d", "amoebanet-b", "lm"] = "translate"   # lm: Table 1's, to --plan
    data: str = "numbers"                   # numbers, numbers:LIMIT, tsv:PATH; images: shapes, cifar10, ...
    size: int = 32                          # side of an image
    classes: int = 0                        # classes or tokens V; 0: those of the data
    layers: int = 6                         # L: of the encoder and of the decoder; AmoebaNet: normal cells
    width: int = 1024                       # D; AmoebaNet: filters of the first stack
    hidden: int = 8192                      # H
    heads: int = 16                         # A, of 64 channels each
    dropout: float = 0.0                    # behind every sub-layer; AmoebaNet: before the classifier
    scaled: bool = True                     # feed-forward initialisation divided by the number of layers
    clip: float = 20.0                      # training clips logits to +-clip (paper: no value); 0: not
    temperature: float = 1.43               # language pairs are drawn ~ size^(1 / temperature)
    stages: int = 0                         # K; 0: as many as --devices or --gpus
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
    def __post_init__(self):
        """Refuse missing GPUs here, before common.py does: in this file alone one may serve several stages.
        Devices that are named are not counted; under torchrun every replica on the machine wants its own."""
        self.gpus = 1 if self.devices else self.gpus
        have, asked = torch.cuda.device_count(), self.gpus * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        common.need(asked <= have or not have or self.devices or self.device == "cpu",
                    f"--gpus {self.gpus}: this machine has {have}; one twice is --devices cuda:0,cuda:0")

# digest Sec. 4: the ImageNet run has the AmoebaNet paper's optimizer; 0.97 every 2 epochs at batch 128
AMOEBA = dict(model="amoebanet-d", data="folder:imagenet", size=224, classes=1000, decay=20_000, dropout=0.5)
SMALL = dict(model="amoebanet-d", data="shapes", lr=0.01, momentum=0.1)
PRESETS = {
    "demo": dict(layers=2, width=96, hidden=192, heads=2, steps=450, batch=192, lr=3e-3, warmup=60,
                 cooldown=0.5, stages=2, micro=4),
    "demo-images": SMALL | dict(size=16, layers=3, width=16, steps=200, batch=64, cooldown=0.5, stages=2),
    "small": SMALL | dict(data="cifar10", layers=6, width=64, steps=20_000, cooldown=0.9),    # not yet run
    "AmoebaNet-B-18-512": AMOEBA | dict(model="amoebanet-b", layers=18, width=512, size=480, stages=4),
    **{f"AmoebaNet-D-{L}-{D}": AMOEBA | dict(layers=L, width=D) for L, D in (         # Tables 1 to 3
        (18, 208), (18, 416), (18, 544), (36, 544), (72, 512), (18, 256), (18, 128))},
    # Table 1's counts are those of a language model, though Sec. 3 says sequence to sequence
    **{f"Transformer-{L}": dict(model="lm", classes=32000, layers=L, width=2048, heads=32, batch=32, micro=32)
       for L in (3, 13, 24, 48, 103, 415, 1663)},
    **{f"T-{L}-{H}-{A}": dict(data="tsv:pairs.tsv", classes=64_000, layers=L, hidden=H, heads=A)    # Sec. 5
       for L, H, A in ((6, 8192, 16), (24, 8192, 16), (12, 16384, 32), (32, 16384, 32), (64, 16384, 32))}}
TARGETS = {"demo": 0.945}                   # mean - 4 s.d. of seeds 0 to 4: .960, .961, .964, .971, .968

def check(cfg):
    """Every mistake that can be seen without the data; UserError with one line."""
    need, images, still = common.need, "amoebanet" in cfg.model, cfg.plan or cfg.emulate > 0
    for names, low, high in (("size layers width hidden heads micro", 1, math.inf),
                             ("classes clip stages warmup decay", 0, math.inf), ("cooldown momentum", 0, 1),
                             ("emulate", 0, 60)):
        for name in names.split():
            value, least, most = getattr(cfg, name), f"{low:.3g}", f" and at most {high:.3g}"
            need(low <= value <= high and math.isfinite(value),
                 f"--{name} {value}: must be at least {least}" + (most if high < math.inf else ""))
    need(0 <= cfg.dropout < 1, f"--dropout {cfg.dropout}: must lie in [0, 1)")
    need(0 < cfg.temperature < math.inf, f"--temperature {cfg.temperature}: must be above 0")
    need(cfg.width % (4 if images else 2) == 0, f"--width {cfg.width}: no multiple of {4 if images else 2}")
    need(not images or cfg.layers % 3 == 0, f"--layers {cfg.layers}: AmoebaNet has three stacks of as many")
    text = re.fullmatch("tsv:.+|numbers(:[0-9]+)?", cfg.data)
    picture = re.fullmatch("shapes|cifar10|(cifar10|npz|folder|video):.+", cfg.data)
    need(still or (picture if images else text) and cfg.model != "lm",
         f"--data {cfg.data}: nothing that --model {cfg.model} trains on; see both in --help")
    limit = cfg.data[8:] if cfg.data.startswith("numbers:") else "30"
    need(still or 1 <= int(limit) <= 10_000, f"--data {cfg.data}: numbers have words from 0 to 9,999: "
         "LIMIT must lie from 1 to 10000")
    # the sequence's length, before it is built: `amoebanet` adds stem and reductions, `transformer` both ends
    L = cfg.layers + (4 + 2 * (cfg.size > 63) if images else 2 + cfg.layers * (cfg.model == "translate"))
    K, hand = len(devices(cfg)), cfg.balance.split(",") if cfg.balance.replace(",", "").isdecimal() else []
    need(K <= L, f"--stages {K}: this model is a sequence of {L} layers; ask for {L} at most")
    need(cfg.gpus <= K, f"--gpus {cfg.gpus}: {K} stages leave some idle; add --stages {cfg.gpus}")
    need(hand or cfg.balance in ("flops", "params", *["time"] * (not still)),
         f"--balance {cfg.balance}: write flops, params, 3,2,4 or, in training, time")
    need(not hand or len(hand) == K and sum(map(int, hand)) == L and "0" not in hand,
         f"--balance {cfg.balance}: must be {K} numbers above 0 that sum to {L} layers")

def devices(cfg):
    """One device a stage: those named, else --gpus GPUs of this replica in turn, else the CPU."""
    gpus, named = torch.cuda.device_count() * (cfg.device != "cpu"), cfg.devices.replace(",", " ").split()
    K = cfg.stages or len(named) or cfg.gpus
    # under torchrun each replica on this machine drives the next --gpus of its GPUs
    first = common.rank() % max(1, gpus // cfg.gpus) * cfg.gpus
    found = named or [f"cuda:{first + k * cfg.gpus // K}" if gpus else "cpu" for k in range(K)]
    fit = len(found) >= K and {*found} <= {"cpu", *map("cuda:{}".format, range(gpus))}
    common.need(fit, f"--devices {','.join(found)}: {K} are needed, one a stage, of cpu and {gpus} GPUs")
    return found[:K]

def prepare(cfg):
    """Once, before all else: downloads and packing; both splits, so that no run ends in what is missing."""
    if cfg.plan or cfg.emulate:
        return
    train, test = open_split(cfg, "train"), open_split(cfg, "test")
    if cfg.model != "translate":
        about = f"--data {cfg.data}: the test split"
        common.need(not train.latent, f"--data {cfg.data}: latents, where AmoebaNet reads pictures")
        names = [str(name) for name in train.classes]
        common.need([str(name) for name in test.classes] == names[:len(test.classes)],
                    f"{about} has classes {', '.join(map(str, test.classes))}, training {', '.join(names)}")

# --- Building blocks ---------------------------------------------------------
# A layer takes and returns one tensor or one tuple of tensors, batch first, and leaves its input as it is.
PAD, START, END = 0, 1, 2                   # as data.py numbers them
HERE = threading.local()            # what a stage, a thread, tells its layers: generator, recompute, layer

def dropout(x, layer):
    """x, of which a layer in training drops its share `dropout`, by the stage's generator: torch has one a
    process, for which threads would race, and a recomputed layer must draw the same mask again."""
    p = layer.dropout * layer.training
    if p == 0:
        return x
    keep = torch.empty_like(x).bernoulli_(1 - p, generator=getattr(HERE, "generator", None))
    return x * keep / (1 - p)

class BatchNorm(nn.BatchNorm2d):
    """Deferred (Sec. 2.2, G11): training normalises each micro-batch by its own moments; the running averages
    move once a mini-batch, by the moments of all its micro-batches, the variance biased as lingvo's (torch's
    is not). A plain BatchNorm in recomputed layers would move 2 M times, most by the last micro-batches."""
    sums = None
    def forward(self, x):
        n = x.numel() // x.shape[1]
        common.need(n > 1 or not self.training, f"{getattr(HERE, 'layer', 'BatchNorm')}: a micro-batch has "
                    "one value a channel, so no variance: ask for fewer micro-batches or a larger batch")
        if not self.training or self.running_mean is None:
            return super().forward(x)                                                       # (B, C, h, w)
        mean, var = 0 * self.running_mean, 0 * self.running_var                                 # (C), (C)
        # With momentum 1 torch leaves the moments of this call in the buffers, the variance unbiased.
        y = F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps)         # (B, C, h, w)
        if not getattr(HERE, "recompute", False):
            mean, var = mean.double(), var.double()     # in float64: s2 / n - mean^2 cancels    (C), (C)
            sums = torch.stack([0 * mean + n, n * mean, (n - 1) * var + n * mean.square()])
            self.sums = sums if self.sums is None else self.sums + sums
        return y                                                                            # (B, C, h, w)
    def commit(self):
        """running <- (1 - momentum) running + momentum * moment, of all micro-batches of all replicas.
        Without momentum, as torch has it: the average over all mini-batches so far."""
        if self.sums is None:                                   # nothing came by, or nothing is kept
            return
        n, s1, s2 = common.average(self.sums)                                              # (C), (C), (C)
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked.double() if self.momentum is None else self.momentum
        self.running_mean += share * (s1 / n - self.running_mean)
        self.running_var += share * (s2 / n - (s1 / n).square() - self.running_var)

# AmoebaNet (digest Sec. 3): ten operations, each behind the state it reads (0 current input, 1 previous one),
# added in pairs to give states 2 to 6; then the states that are concatenated. Official code differs from the
# AmoebaNet paper's figure of D's normal cell, which would concatenate 456, and gives the published counts.
CELLS = {
    "d normal": "1 conv1, 1 max3, 1 none, 0 conv7, 0 conv1, 0 conv7, 2 max3, 2 none, 1 avg3, 5 conv1: 0346",
    "d reduction": "0 max2, 0 max3, 2 none, 1 conv3, 2 conv7, 2 max3, 3 none, 1 max2, 2 avg3, 3 conv1: 456",
    "b normal": "1 conv1, 1 max3, 1 none, 0 sep3, 1 conv1, 0 sep3, 2 conv1, 2 none, 1 avg3, 5 conv1: 0346",
    "b reduction": "0 max2, 0 max3, 2 none, 1 conv3, 2 sep5, 2 max3, 3 none, 1 sep3, 4 avg3, 3 conv1: 56"}

def conv(P, C, size=(1, 1), stride=1):
    """ReLU, convolution from P to C channels without bias, batch norm."""
    return [nn.ReLU(), nn.Conv2d(P, C, size, stride, [n // 2 for n in size], bias=False), BatchNorm(C, 1e-3)]

def operation(name, P, C, stride):
    """The modules of an operation from P to C channels; stride 2 halves the sides, rounding up. Kernels above
    1 x 1 are bottlenecks of C / 4 channels, but for sep: depthwise, then 1 x 1, and both twice."""
    pools = {"none": nn.Identity(), "max2": nn.MaxPool2d(2, stride, ceil_mode=True),
             "max3": nn.MaxPool2d(3, stride, 1), "avg3": nn.AvgPool2d(3, stride, 1, count_include_pad=False)}
    if name in pools:
        return [pools[name], *conv(P, C)[1:] * (P != C)]
    k, q = int(name[-1]), C // 4
    if name == "conv1":
        return conv(P, C)
    if name[:3] == "sep":                               # the paper's dilated sep5 is not dilated in its code
        first, second = (nn.Conv2d(W, W, k, s, k // 2, 1, W, False) for W, s in ((P, stride), (C, 1)))
        return [nn.ReLU(), first, *conv(P, C)[1:], nn.ReLU(), second, *conv(C, C)[1:]]
    middle = conv(q, q, (3, 3), stride) if k == 3 else conv(q, q, (1, 7)) + conv(q, q, (7, 1))
    return conv(P, q) + middle + conv(q, C)

class FactorizedReduce(nn.Module):
    """Halve the sides: two strided 1x1 convolutions, the second one pixel further, concatenated."""
    def __init__(self, P, C):
        super().__init__()
        self.even, self.odd = (nn.Conv2d(P, half, 1, 2, bias=False) for half in (C // 2, C - C // 2))
        self.norm = BatchNorm(C, 1e-3)
    def forward(self, x):
        x = F.relu(x)                                                                       # (B, P, h, w)
        shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]                                      # (B, P, h, w)
        return self.norm(torch.cat([self.even(x), self.odd(shifted)], 1))                   # (B, C, y, x)

class Cell(nn.Module):
    """An AmoebaNet cell of C filters: (current, previous) -> (concatenation, current)."""
    def __init__(self, kind, P, Q, C, halved, raw):
        """P, Q: channels of current and previous. previous is brought to C channels, and halved where it is
        twice as large as current; raw, in the first cell of the official code's stem: left as it is."""
        super().__init__()
        genes, concat = CELLS[kind].split(": ")
        self.concat, genes = [int(state) for state in concat], [gene.split() for gene in genes.split(", ")]
        self.current, self.sources = nn.Sequential(*conv(P, C)), [int(source) for source, _ in genes]
        fit = [FactorizedReduce(Q, C)] if halved else [] if raw or Q == C else conv(Q, C)
        self.previous, self.steps = nn.Sequential(*fit), nn.ModuleList()
        for source, name in genes:
            # a reduction cell halves states 0 and 1; those that it makes of them have the new size
            stride = 2 if "reduction" in kind and source in "01" else 1
            self.steps.append(nn.Sequential(*operation(name, Q if raw and source == "1" else C, C, stride)))
    def forward(self, states):
        current, previous = (states,) * 2 if torch.is_tensor(states) else states  # (B, P, h, w), (B, Q, v, u)
        h = [self.current(current), self.previous(previous)]                                # (B, C, h, w)
        for i in range(0, 10, 2):
            left, right = (self.steps[j](h[self.sources[j]]) for j in (i, i + 1))      # each (B, C, y, x)
            h.append(left + right)
        return torch.cat([h[i] for i in self.concat], 1), current             # (B, R, y, x), (B, P, h, w)

class Attention(nn.Module):
    """A heads of d channels; A d need not be D: the counts of Sec. 5 ask for it."""
    def __init__(self, D, A, d=64):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(D, A * d) for _ in range(3))
        self.heads, self.out = A, nn.Linear(A * d, D)
    def forward(self, x, memory, mask=None, causal=False):
        qkv = self.query(x), self.key(memory), self.value(memory)  # (B, N, A*d), (B, S, A*d), (B, S, A*d)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for y in qkv)                                # (B, A, N, d), (B, A, S, d), (B, A, S, d)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)                 # (B, A, N, d)
        return self.out(y.transpose(1, 2).flatten(2))                                          # (B, N, D)

class Layer(nn.Module):
    """A Transformer layer, pre-norm (our choice). "encoder" changes x of (x, y, source ids), "decoder" y, and
    the rest travels along for later layers. "causal" has x alone: Table 1's language model."""
    def __init__(self, D, H, A, dropout, kind):
        super().__init__()
        self.kind, self.dropout, self.attention = kind, dropout, Attention(D, A)
        self.cross = Attention(D, A) if kind == "decoder" else None
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(3 if kind == "decoder" else 2))
        self.wide, self.narrow = nn.Linear(D, H), nn.Linear(H, D)
    def mix(self, x, mask, memory=None):
        y = self.norms[0](x)                                                                   # (B, N, D)
        causal = self.kind != "encoder"
        x = x + dropout(self.attention(y, y, None if causal else mask, causal), self)          # (B, N, D)
        if self.cross:
            x = x + dropout(self.cross(self.norms[2](x), memory, mask), self)                  # (B, N, D)
        return x + dropout(self.narrow(F.relu(self.wide(self.norms[1](x)))), self)             # (B, N, D)
    def forward(self, states):
        if self.kind == "causal":
            return self.mix(states, None)                                                      # (B, N, D)
        x, y, ids = states                                                  # (B, S, D), (B, N, D), (B, S)
        mask = (ids != PAD)[:, None, None]                                                  # (B, 1, 1, S)
        if self.kind == "encoder":
            return self.mix(x, mask), y, ids                                # (B, S, D), (B, N, D), (B, S)
        # x travels raw: the encoder's final norm has no weights and stands in every decoder layer
        return x, self.mix(y, mask, F.layer_norm(x, x.shape[-1:])), ids     # (B, S, D), (B, N, D), (B, S)

class Embed(nn.Module):
    """(source, target) ids -> (x, y, source ids), or ids -> x: vectors plus sines of place."""
    def __init__(self, V, D, dropout):
        super().__init__()
        self.table, self.dropout = nn.Embedding(V, D), dropout
    def vectors(self, ids):
        D = self.table.embedding_dim
        places = torch.arange(ids.shape[1], device=ids.device)                                       # (N)
        angle = places[:, None] * 10000.0 ** -(torch.arange(0, D, 2, device=ids.device) / D)   # (N, D//2)
        waves = torch.cat([angle.sin(), angle.cos()], 1)                                          # (N, D)
        return dropout(self.table(ids) * D ** 0.5 + waves, self)                               # (B, N, D)
    def forward(self, ids):
        if torch.is_tensor(ids):
            return self.vectors(ids)                                                           # (B, N, D)
        return self.vectors(ids[0]), self.vectors(ids[1]), ids[0]           # (B, S, D), (B, N, D), (B, S)

class Logits(nn.Module):
    """V logits of a map's mean (B, P, h, w) or of the last sequence. Training clips the latter, one of two
    tricks for depth (Sec. 5). The paper gives no value and no form; lingvo clamps, in training alone."""
    def __init__(self, D, V, dropout=0.0, clip=0.0, bias=True):
        super().__init__()
        self.project, self.dropout, self.clip = nn.Linear(D, V, bias), dropout, clip
    def forward(self, states):
        if states[0].ndim == 4:
            return self.project(dropout(F.relu(states[0]).mean((2, 3)), self))                    # (B, V)
        y = states if torch.is_tensor(states) else states[1]                                   # (B, N, D)
        logits = self.project(F.layer_norm(y, y.shape[-1:]))                                   # (B, N, V)
        return logits.clamp(-self.clip, self.clip) if self.training and self.clip else logits  # (B, N, V)

# --- Model -------------------------------------------------------------------
def amoebanet(kind, L, D, V, stem="wide", dropout=0.0):
    """AmoebaNet-D or -B (kind "d", "b"): stem, stem cells, three stacks of L/3 normal cells with D, 2 D, 4 D
    filters, reduction cells between them, V logits. stem: filters of the first convolution and of the stem
    cells. "tpu", the official code's, makes B's 557 M parameters; "wide", torchgpipe's, Table 1's of D;
    "small", for 32 pixels, at stride 1, is our choice."""
    P, *widths = {"wide": (D // 4, D // 2, D), "tpu": (32, D // 4, D // 2), "small": (D,)}[stem]
    stacks = [[("reduction", C)] * (C > D) + [("normal", C)] * (L // 3) for C in (D, 2 * D, 4 * D)]
    plan = sum(stacks, [("reduction", C) for C in widths])
    layers, Q, halved = [nn.Sequential(*conv(3, P, (3, 3), 1 if stem == "small" else 2)[1:])], P, False
    for cell, C in plan:
        layers.append(Cell(f"{kind} {cell}", P, Q, C, halved, raw=stem == "tpu" and len(layers) == 1))
        P, Q, halved = C * len(layers[-1].concat), P, cell == "reduction"
    return nn.Sequential(*layers, Logits(P, V, dropout))

def transformer(L, H, A, V, D=1024, decoder=True, dropout=0.0, clip=0.0, scaled=True):
    """T(L, H, A) of Sec. 5: L encoder and L decoder layers, feed-forward width H, A heads, V tokens; or,
    without decoder, Transformer-L of Table 1. Weights start with variance 1 / inputs; `scaled`, the other
    trick, divides those of the feed-forward output (our choice) by the number of layers."""
    kinds = ["encoder"] * L + ["decoder"] * L if decoder else ["causal"] * L
    layers = [Layer(D, H, A, dropout, kind) for kind in kinds]
    model = nn.Sequential(Embed(V, D, dropout), *layers, Logits(D, V, 0.0, clip, not decoder))
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            deep = len(layers) if scaled and "narrow" in name else 1
            nn.init.normal_(weight, 0, weight.shape[1] ** -0.5 / deep)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)
    return model

# --- Objective ---------------------------------------------------------------
def loss(output, target, total, smoothing=0.1):
    """Cross-entropy of logits (B, V) or (B, N, V) on the gathered mini-batch (G6), summed over targets but
    -100, over their number: a mean of micro-batch means would weigh uneven ones wrongly. The plain form of a
    step, which the pipeline must equal: loss(model(inputs), target, total).backward()."""
    logits, target = output.flatten(0, -2).float(), target.flatten()                     # (B*N, V), (B*N)
    return F.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing) / total        # ()

# --- Sampling ----------------------------------------------------------------
# First the cuts, of network and mini-batch; then the order of work; then those who do it.
def partition(costs, K, goal="variance"):
    """Sizes of K runs of consecutive layers with the least variance of costs (Sec. 2.2, G2, G3), or with the
    least "bottleneck", their largest. The paper speaks of a heuristic and says no more; this is exact."""
    common.need(1 <= K <= len(costs), f"{K} stages: there are {len(costs)} layers; 1 to as many are possible")
    total = np.cumsum([0.0, *costs])
    # price[i, j] of layers i..j-1 as one run; the sum of costs is fixed: least squares are least variance
    price = (total - total[:, None]) ** (2 if goal == "variance" else 1)
    price[np.tril_indices(len(total))] = np.inf
    # Dynamic programming: best[j] of layers 0..j-1 in one run, in two, ...; cut[j]: where their last starts
    best, cuts, ends = price[0], [], [len(costs)]
    for _ in range(K - 1):
        options = np.maximum(best[:, None], price) if goal == "bottleneck" else best[:, None] + price
        best, cuts = options.min(0), [options.argmin(0), *cuts]
    for cut in cuts:
        ends.insert(0, int(cut[ends[0]]))
    return np.diff([0, *ends]).tolist()

def parts(value):
    """What crosses a boundary, a tensor or a tuple of tensors, as a tuple."""
    return value if isinstance(value, tuple) else (value,)

def each(function, value):
    """function of a tensor, or of every tensor of a tuple; None stays None."""
    done = tuple(part if part is None else function(part) for part in parts(value))
    return done if isinstance(value, tuple) else done[0]

WANTED = ", where a tensor or a tuple of tensors, batch first, is wanted"

def checked(value, where):
    """value, if it can cross a boundary: a tensor or a tuple of tensors, batch first."""
    for part in parts(value):
        kind = f"{part.ndim}-d tensor" if torch.is_tensor(part) else type(part).__name__
        common.need(torch.is_tensor(part) and part.ndim > 0, f"{where} {kind}"
                    + " in a tuple" * isinstance(value, tuple) + WANTED)
    common.need(parts(value), f"{where} an empty tuple" + WANTED)
    return value

def split(value, M):
    """min(M, N) near-equal micro-batches of a tensor or tuple, along the first axis (G4), without graph. The
    paper's are equal; uneven ones are ours, and harmless with the loss of the whole mini-batch (G6)."""
    sizes = {len(part) for part in parts(value)}
    common.need(len(sizes) == 1 and min(sizes) > 0, f"mini-batch of {sizes} samples: one number is needed")
    cuts = [[cut.requires_grad_(part.requires_grad) for cut in part.detach().tensor_split(min(M, len(part)))]
            for part in parts(value)]
    return list(zip(*cuts)) if isinstance(value, tuple) else cuts[0]

def gather(pieces):
    """The inverse of split."""
    whole = tuple(None if column[0] is None else torch.cat(column) for column in zip(*map(parts, pieces)))
    return whole if isinstance(pieces[0], tuple) else whole[0]

def clock_cycles(K, M):
    """Forward order on K stages: at clock t, stage k has micro-batch m = t - k. M + K - 1 lists of (m, k)."""
    return [[(t - k, k) for k in range(K) if 0 <= t - k < M] for t in range(M + K - 1)]

def schedule(K, M, mode):
    """One training step: tasks (kind, m, k) in an order one worker could follow; each stage follows its own.

    F forward, L loss, R re-materialization, B backward. Backward is forward reversed: last in, first out.
    schedule(2, 2, "always"), where every task takes a unit of time and .. is idle:

        stage 1:     F0 F1 L1 R1 B1 R0 B0       F waits for F of the stage before, L for all F of the last,
        stage 0:  F0 F1 R1 .. .. .. B1 R0 B0    B for B of the stage behind, R for nothing: its input is here

    So R fills the wait for a gradient (Sec. 2.3). "except_last" spares those that follow their F directly.
    """
    forward = [("F", m, k) for cycle in clock_cycles(K, M) for m, k in cycle]
    again = {"always": M, "except_last": M - 1, "never": 0}[mode]       # so many micro-batches are recomputed
    backward = [(kind, m, k) for _, m, k in reversed(forward) for kind in "RB" if kind == "B" or m < again]
    return [*forward, ("L", M - 1, K - 1), *backward]

def states(device):
    """What the random numbers of Python, NumPy and torch are drawn from."""
    chance, (_, keys, *rest) = [torch.get_rng_state()], np.random.get_state()
    if device.type == "cuda":
        chance.append(torch.cuda.get_rng_state(device))
    return [random.getstate(), keys.tobytes(), rest, *(state.numpy().tobytes() for state in chance)]

def idle(times, K):
    """(idle share of K stages, makespan) of {task: (start, end)}."""
    span = max(end for _, end in times.values()) - min(start for start, _ in times.values())
    return 1 - sum(end - start for start, end in times.values()) / (K * span), span

def bubble(K, M):
    """The idle share of equal stages that recompute nothing (Sec. 2.3, G10), without the O(.). At M = 4 K,
    where the paper calls it negligible, it still is 11 % of two stages and 18 % of eight."""
    return (K - 1) / (M + K - 1)

class Channel:
    """One direction of one boundary: a queue, and on CUDA a copy stream on either side, for no copy to delay
    what a stage computes meanwhile (Sec. 3: slow links suffice)."""
    def __init__(self, source, target, stream):
        self.source, self.target = source, target
        self.read, self.write = stream(source), stream(target)
    def put(self, value):
        """Send a tensor or tuple (None: no gradient) that the source's current stream has made."""
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
    """An nn.Sequential on K stages, under its own names: `step` leaves one device's gradients in it,
    `infer` predicts. The slow form: one worker (threads=False) on the current streams (streams=False).

    Layers that are recomputed must do the same twice. `probe` tries each once, before the first step, and
    refuses those whose training draws from the random numbers of torch (nn.Dropout: stages would race for its
    one generator), NumPy or Python, or changes a buffer or a parameter (nn.BatchNorm2d, spectral_norm). Not
    seen: draws from a layer's own generator, changes of other attributes. `dropout` and `BatchNorm` pass.
    """
    def __init__(self, model, sizes, devices, M=1, mode="except_last", seed=0, streams=True, threads=True):
        """sizes: layers of a stage; devices: one a stage; M micro-batches. Raises common.UserError."""
        K, fits = len(sizes), sum(sizes) == len(model) and min(sizes) > 0
        common.need(fits, f"balance {sizes}: must be above 0 and sum to {len(model)} layers")
        common.need(M > 0, f"{M} micro-batches: at least 1 is needed")
        common.need(K <= len(devices), f"{len(devices)} devices for {K} stages: a device a stage is needed")
        self.model, self.micro, self.mode, self.seed, self.threads = model, M, mode, seed, threads
        self.devices = [torch.device(device) for device in devices[:K]]
        # on the CPU None, which `torch.cuda.stream` ignores
        make = torch.cuda.Stream if streams else torch.cuda.current_stream
        stream = lambda device: make(device) if device.type == "cuda" else None
        self.compute = [stream(device) for device in self.devices]
        # channel k of either direction joins stages k - 1 and k; 0 and K join first and last to the caller
        sides = [self.devices[0], *self.devices, self.devices[-1]]
        self.ahead = [Channel(a, b, stream) for a, b in zip(sides, sides[1:])]
        self.back = [Channel(b, a, stream) for a, b in zip(sides, sides[1:])]
        self.first = np.cumsum([0, *sizes]).tolist()
        self.cells = [model[self.first[k]:self.first[k + 1]].to(self.devices[k]) for k in range(K)]
        # two threads would add to one gradient at once, and two devices cannot hold one tensor
        owned = [id(tensor) for cell in self.cells for tensor in {*cell.parameters(), *cell.buffers()}]
        common.need(len(set(owned)) == len(owned), "two stages share a parameter: join their layers")
        self.probed = False
        self.norms = [module for module in model.modules() if isinstance(module, BatchNorm)]

    def step(self, inputs, loss, number=0):
        """One mini-batch: adds the sum of its micro-batches' gradients (G8) to every .grad; raises what a
        stage raised, all threads ended. inputs: tensor or tuple, batch first; loss(output) -> scalar, on the
        last device; number: training step. Returns (loss, output, gradient of the inputs)."""
        self.run(inputs, loss, number)
        for norm in self.norms:
            norm.commit()
        return *self.result, gather([self.back[0].get() for _ in range(self.M)][::-1])

    def infer(self, inputs):
        """The output in evaluation mode: forwards alone, M + K - 1 clock cycles, nothing kept."""
        self.run(inputs)
        return gather([self.ahead[-1].get() for _ in range(self.M)])

    def run(self, inputs, loss=None, number=None):
        """Feed the micro-batches and let workers follow the schedule; without loss, its F alone."""
        inputs = each(lambda part: part.to(self.devices[0]), checked(inputs, "the mini-batch is"))
        pieces = split(inputs, self.micro)
        K, kind, self.M = len(self.cells), self.devices[0].type, len(pieces)
        self.loss, self.number, self.training = loss, number, self.model.train(loss is not None).training
        # by (m, k) a stage's input, and its output, whose graph holds the interior; by task (start, end)
        self.stash, self.interior, self.times, self.errors = {}, {}, {}, []
        self.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        tasks = [task for task in schedule(K, self.M, self.mode) if self.training or task[0] == "F"]
        self.again = {m for kind, m, _ in tasks if kind == "R"}
        if self.again and not self.probed:
            self.probe(pieces[0])
        for norm in self.norms:
            norm.sums = None
        for channel in self.ahead + self.back:
            channel.queue, channel.closed = queue.SimpleQueue(), False
        for piece in pieces:
            self.ahead[0].put(piece)
        for device in set(self.devices) if kind == "cuda" else ():      # after what the caller has enqueued
            torch.cuda.synchronize(device)
        zero = [self.mark(k) for k in range(K)]
        columns = [[task for task in tasks if task[2] == k] for k in range(K)] if self.threads else [tasks]
        with ThreadPoolExecutor(K) as workers:
            workers.map(self.follow, columns[:-1])
            self.follow(columns[-1])        # in the caller's thread: a new one costs per cents in page faults
        if kind == "cuda":                  # before the update; events of two devices do not compare
            for own in self.compute:
                own.synchronize()
            self.times = {task: tuple(zero[task[2]].elapsed_time(mark) / 1000 for mark in marks)
                          for task, marks in self.times.items()}
        if self.errors:
            raise self.errors[0]

    @torch.no_grad()
    def probe(self, x):
        """Run the layers once in turn on a micro-batch; UserError where recomputation would betray one."""
        x = each(torch.clone, x)
        for k, device in enumerate(self.devices):
            x = each(lambda part: part.to(device), x)
            for i, layer in enumerate(self.cells[k], self.first[k]):
                chance, versions = states(device), [weight._version for weight in layer.parameters()]
                before = {name: (buffer, buffer.clone()) for name, buffer in layer.named_buffers()}
                x = self.layer(0, k, i, x, recompute=True)
                after, where = dict(layer.named_buffers()), self.place(k, i)
                moved = [name for name, (buffer, old) in before.items()
                         if after.get(name) is not buffer or not old.equal(buffer) and old.equal(old)]
                moved += [name for (name, weight), version in zip(layer.named_parameters(), versions)
                          if weight._version != version]
                for buffer, old in before.values():
                    buffer.copy_(old)
                moved = ", ".join(moved)
                common.need(not moved, f"{where}: training changes {moved}, and recomputation again: "
                            'use gpipe.BatchNorm for a norm, or checkpoint "never"')
                common.need(chance == states(device), f"{where}: training draws random numbers, and "
                            'recomputation would draw others: use gpipe.dropout, or checkpoint "never"')
            checked(x, f"{where} returns")
        self.probed = True

    def mark(self, k):
        """A moment on stage k: seconds on the CPU, an event of the compute stream on CUDA."""
        own = self.compute[k]
        return own.record_event(torch.cuda.Event(enable_timing=True)) if own else time.perf_counter()

    def follow(self, tasks):
        """Do tasks in order, each once its input is here. An exception stops all workers."""
        work = {"F": self.do_forward, "L": self.do_loss, "R": self.do_recompute, "B": self.do_backward}
        try:
            for kind, m, k in tasks:
                source = {"F": self.ahead[k], "B": self.back[k + 1]}.get(kind)
                target = {"F": self.ahead[k + 1], "B": self.back[k]}.get(kind)
                # a new thread starts with gradients on, without autocast, on the default stream: enter anew
                with torch.cuda.stream(self.compute[k]), torch.set_grad_enabled(self.training):
                    value = source.get() if source else None
                    start = self.mark(k)
                    value = work[kind](m, k, value)
                    self.times[kind, m, k] = start, self.mark(k)
                    if target:
                        target.put(value)
        except BaseException as error:      # the first is raised; then come those of the stages it turns away
            self.errors.append(error)
            for channel in self.ahead + self.back:
                channel.closed = True
                channel.queue.put((None, None))

    def cell(self, m, k, x, recompute=False):
        """Stage k's layers in turn (G1, G5), each with the draws of (seed, step, micro-batch, layer): those
        know neither K nor timing, and come again in re-materialization."""
        y, versions = x, [part._version for part in parts(x)]
        for i in range(self.first[k], self.first[k + 1]):
            y = self.layer(m, k, i, y, recompute)
        # else the interior would be recomputed from another input: wrong gradients, without a word
        common.need(versions == [part._version for part in parts(x)], f"stage {k} changes its input in place")
        return checked(y, f"{self.place(k, i)} returns")

    def place(self, k, i):
        return f"stage {k}, layer {i} ({type(self.model[i]).__name__})"

    def layer(self, m, k, i, x, recompute):
        """Layer i of stage k, told what it must know."""
        name = f"layer {i} micro-batch {m + common.rank() * self.M}"
        HERE.generator = common.draws(self.seed, self.number, name, self.devices[k])
        HERE.recompute, HERE.layer = recompute, self.place(k, i)
        try:
            with torch.autocast(*self.autocast, cache_enabled=False):
                return self.model[i](x)
        finally:
            HERE.__dict__.clear()

    def do_forward(self, m, k, x):
        """F. What is recomputed drops its graph here, which only told which outputs want a gradient. So a
        stage holds M inputs and one interior at most (G9), but for mode "never"."""
        y = self.cell(m, k, x)
        if self.training:
            self.stash[m, k], self.interior[m, k] = x, None if m in self.again else y
        return each(lambda part: part.detach().requires_grad_(part.requires_grad), y)

    def do_loss(self, m, k, _):
        """L: the loss of the gathered mini-batch (G6); its gradient returns in pieces, the last one first."""
        pieces = [self.ahead[k + 1].get() for _ in range(m + 1)]
        y = gather(pieces)
        y = each(lambda part: part.detach().requires_grad_(part.is_floating_point()), y)
        value = self.loss(y)
        value.backward()
        self.result = value.detach(), each(torch.Tensor.detach, y)
        gradients = each(lambda part: torch.zeros_like(part) if part.grad is None else part.grad, y)
        # in the sizes in which the pieces came, which need not be those of split
        sizes = zip(*[map(len, parts(piece)) for piece in pieces])
        columns = [part.split(list(rows)) for part, rows in zip(parts(gradients), sizes)]
        for gradient in reversed([*zip(*columns)]):
            self.back[k + 1].put(gradient if isinstance(y, tuple) else gradient[0])

    def do_recompute(self, m, k, _):
        """R: the interior again, from the stashed input (Sec. 2.3)."""
        self.interior[m, k] = self.cell(m, k, self.stash[m, k], recompute=True)

    def do_backward(self, m, k, gradients):
        """B, the vector-Jacobian product (G7). Gradients add up in the schedule's order, bitwise the same for
        every K. A task has its own graph, for torch runs the backward of one graph in one CPU thread."""
        x, y = self.stash.pop((m, k)), self.interior.pop((m, k))
        pairs = [(a, g) for a, g in zip(parts(y), parts(gradients)) if a.requires_grad and g is not None]
        torch.autograd.backward([a for a, _ in pairs], [g for _, g in pairs])
        return each(lambda part: part.grad, x)

def profile(model, inputs):
    """Of every layer, for one micro-batch and by shapes alone (meta device): forward "flops", "params", bytes
    of its "input" and those "kept" for backward. Attention keeps its N x S matrices here, as in the paper's
    time; where torch runs a fused kernel, this is an upper bound."""
    x, rows = each(lambda part: part.to("meta"), inputs), []
    for layer in copy.deepcopy(model).to("meta"):
        x, held, out = each(lambda part: part.detach().requires_grad_(part.is_floating_point()), x), [], []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: held.append(t) or t, lambda t: t):
            flops = common.flops(lambda: out.append(layer(x)))
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in held}
        weights = {weight.untyped_storage()._cdata: weight.numel() for weight in layer.parameters()}
        kept = sum(storage.nbytes() for place, storage in storages.items() if place not in weights)
        entry = sum(part.nbytes for part in parts(x))
        rows.append(dict(flops=flops, params=sum(weights.values()), input=entry, kept=kept))
        x = out[0]
    return rows

def footprint(rows, sizes, M, mode):
    """(parameter bytes, peak activation bytes) of every stage (Sec. 2.3, G9): 12 a parameter, as Table 1
    (weight, gradient, RMSProp's accumulator); M inputs, and one interior, or M without recomputation."""
    stages, live = [], M if mode == "never" else 1
    for size, end in zip(sizes, np.cumsum(sizes)):
        cell = rows[end - size:end]
        interior = sum(row["kept"] for row in cell)
        stages.append((12 * sum(row["params"] for row in cell), M * cell[0]["input"] + live * interior))
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
        ids = torch.zeros(n, 16 if pairs else 1024, dtype=torch.long)           # 1024: Table 1
        return model, (ids, ids) if pairs else ids
    stem = "small" if cfg.size < 64 else {"d": "wide", "b": "tpu"}[cfg.model[-1]]
    model = amoebanet(cfg.model[-1], cfg.layers, cfg.width, V, stem, cfg.dropout)
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
    cut, N = shares(cfg, model, inputs, len(where)), cfg.batch // common.world()
    if common.rank() == 0:
        print("no GPU in use: " * (where[0] == "cpu") + f"{len(where)} stages on {', '.join(where)} of {cut}",
              f"layers; {N} samples in {min(cfg.micro, N)} micro-batches" + ", no more fit" * (cfg.micro > N))
    return Pipeline(model, cut, where, cfg.micro, cfg.checkpoint, cfg.seed)

def draw(dataset, cfg, step):
    """One step's (inputs, target, total), drawn for the global mini-batch, cut to this replica: images
    uniformly, mirrored at random; pairs by temperature-based sampling of their direction (Sec. 5)."""
    small = common.draws(cfg.seed, step, "data")
    if cfg.model != "translate":
        index = common.mine(torch.randint(len(dataset), (cfg.batch,), generator=small)).numpy()
        flip = common.mine(torch.rand(cfg.batch, 1, 1, 1, generator=small) < 0.5)           # (B, 1, 1, 1)
        x = dataset.pixels(index)                                                           # (B, C, h, w)
        return torch.where(flip, x.flip(-1), x), torch.as_tensor(dataset.labels[index]), len(index)
    # A direction of n pairs gets the share n^(1/T). 1/T = 0.7 is multilingual BERT's, the paper's T unknown.
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
    for layer in pipe.model if cfg.compile else ():
        layer.compile()
    for step in run.steps(run.restore(model=pipe.model, opt=opt)):
        inputs, target, total = draw(dataset, cfg, step)
        opt.param_groups[0]["lr"] = learning_rate(cfg, step)
        opt.zero_grad()
        with common.autocast(cfg):
            value = pipe.step(inputs, lambda y: loss(y, target.to(y.device), total), step)[0]
        # replicas of the whole pipeline (G8): a stage at a time, for it has one device
        for cell in pipe.cells:
            common.average_gradients(cell.parameters())
        opt.step()
        run.log(step, loss=value)
        if run.due(step, cfg.save) and common.rank() == 0:
            timeline(run.folder / "timeline.svg", pipe)
        run.save(step)
    target = TARGETS.get(cfg.preset, 0.0) * common.is_preset(cfg, PRESETS)
    run.say(f"{run.folder}: timeline.svg, predictions.txt" + f"; target {target} of all" * (target > 0))
    classes = None if cfg.model == "translate" else dataset.classes
    return 0 if common.rank() > 0 or answer(pipe, cfg, run.folder, classes) >= target else 1

def answer(pipe, cfg, folder, classes=None):
    """Translate or classify the test split into predictions.txt; returns the share of exact answers. classes:
    names of training's, of which the test split may lack the last."""
    test, text, rows = open_split(cfg, "test"), cfg.model == "translate", []
    labels = test.direction if text else test.labels[:1000]
    classes = None if text else test.classes if classes is None else classes
    groups = [f"to {language}" for _, language in test.directions] if text else classes
    say = test.vocabulary.decode if text else classes.__getitem__
    for index in np.array_split(np.arange(len(labels)), -(-len(labels) // 500)):
        if text:                                            # greedy decoding
            source, found = torch.as_tensor(test.source[index]), torch.full((len(index), 1), START)
            while found.shape[1] <= test.target.shape[1] and not (found == END).any(1).all():
                found = torch.cat([found, pipe.infer((source, found))[:, -1:].argmax(-1).cpu()], 1)
        else:
            found = pipe.infer(test.pixels(index)).argmax(1)
        wanted = test.target[index] if text else labels[index]
        rows += zip(map(groups.__getitem__, labels[index]), map(say, found), map(say, wanted))
    names = sorted({group for group, *_ in rows} | {"all"})
    right = {n: np.mean([a == b for g, a, b in rows if n in (g, "all")]) for n in names}
    lines = "\n".join(f"{name}: {a}" + f" (wrong: {b})" * (a != b) for name, a, b in rows)
    common.write_atomic(folder / "predictions.txt", lambda file: file.write(lines.encode()))
    print("right answers: " + ", ".join(f"{name} {share:.3f}" for name, share in right.items()), flush=True)
    return right["all"]

# --- Command line ------------------------------------------------------------
class Asleep(Pipeline):
    """--emulate: a stage does not work but sleeps its `seconds`, twice as long in backward as in forward."""
    def cell(self, m, k, x, recompute=False):
        time.sleep(self.seconds[k])
        return each(torch.clone, x)
    def do_backward(self, m, k, gradients):
        time.sleep(2 * self.seconds[k])
        return super().do_backward(m, k, gradients)

def plan(cfg):
    """--plan: Sec. 2.3 by shapes alone. The speed-up is that of these stages, by FLOPs: a micro-batch crosses
    all, the others follow at the pace of the slowest. --emulate: the pipeline at work, asleep as long."""
    with torch.device("meta"):
        model, inputs = build(cfg, cfg.classes or 1000)
    rows, M, K = profile(model, inputs), cfg.micro, len(devices(cfg))
    sizes = shares(cfg, model, inputs, K, rows)
    load = [sum(row["flops"] for row in rows[end - size:end]) for size, end in zip(sizes, np.cumsum(sizes))]
    gain = M * sum(load) / (sum(load) + (M - 1) * max(load))
    print(f"{sum(row['params'] for row in rows):,} parameters, {len(rows)} layers, N = {cfg.batch}\n"
          f"K = {K}, M = {M}: bubble of equal stages {bubble(K, M):.1%}, speed-up of these {gain:.2f}")
    for k, (weights, kept) in enumerate(np.array(footprint(rows, sizes, M, cfg.checkpoint)) / 2**30):
        print(f"stage {k}: {sizes[k]} layers, {weights:.2f} GiB of weights, {kept:.2f} of activations")
    if cfg.emulate:
        pipe = Asleep(nn.Sequential(*[nn.Identity()] * K), [1] * K, ["cpu"] * K, M, cfg.checkpoint)
        pipe.seconds = [cfg.emulate * K * flops / sum(load) for flops in load]
        pipe.step(torch.zeros(cfg.batch, 1, requires_grad=True), torch.sum)
        share, where = timeline(common.folder(cfg) / "timeline.svg", pipe), common.folder(cfg)
        print(f"emulated: idle {share:.1%}, speed-up {K * (1 - share):.2f}; {where}/timeline.svg")

def main(cfg):
    """Train, plan, emulate, or answer with a checkpoint; returns the exit code, None for 0."""
    if not cfg.sample or cfg.plan or cfg.emulate:
        return plan(cfg) if cfg.plan or cfg.emulate else train(cfg)
    dataset, saved = open_split(cfg, "train"), common.read_checkpoint(cfg.sample, "gpipe")
    pipe = pipeline(cfg, dataset)
    common.load_into({"model": pipe.model}, saved, cfg.sample)
    classes = None if cfg.model == "translate" else dataset.classes
    answer(pipe, cfg, Path(cfg.sample).parent / "samples", classes)

if __name__ == "__main__":
    common.launch(main, common.cli(Config, PRESETS, __doc__), processes=1)
