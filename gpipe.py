"""GPipe: Easy Scaling with Micro-Batch Pipeline Parallelism (arXiv 1811.06965)

A network that is a sequence of layers is cut into K stages, one a device. A mini-batch is cut into M
micro-batches that stream through them: all forwards, then all backwards in the opposite order. Gradients add
up, one update follows: the training of one device, whatever K. Of each micro-batch but the last a stage keeps
its input alone, and recomputes the rest before the gradient is due.

    stage 0:  F0 F1 F2 F3 .. .. B3 R2 B2 R1 B1 R0 B0      F forward, R recompute, B backward of a micro-batch;
    stage 1:     F0 F1 F2 F3 B3 R2 B2 R1 B1 R0 B0         the bubble idles (K - 1) / (M + K - 1) of the time,
                                                          and less where recomputation fills it

The demo translates number words between ten languages: after a minute on two cores it has 96 % of unseen
sentences right to the last word (five seeds: 0.960 to 0.971).

Run:      python gpipe.py                                 the demo
          python gpipe.py --preset demo-images            AmoebaNet-D on drawn shapes
          python gpipe.py --preset Transformer-48 --emulate 0.02 --stages 8    watch eight stages on a laptop
          python gpipe.py --preset AmoebaNet-B-18-512 --plan      memory, bubble, speed-up; nothing runs
          python gpipe.py --preset small --gpus 4         CIFAR-10 on four GPUs
          python gpipe.py --sample runs/gpipe/demo/last.pt
Faithful: partition, schedule, early recomputation, one update, deferred BatchNorm; AmoebaNet-D and -B,
          T(L, H, A) and Table 1's Transformer-L with the published counts; both tricks for depth.
Scaled:   the demos. For translation the paper's supplement is not to be had: Adam is that of the example in
          lingvo, GPipe's official code. "TPU code" is AmoebaNet's.
Left out: auxiliary head, ScheduledDropPath, cutout; BatchNorm normalises by the samples of one replica.
Letters:  K stages, M micro-batches, N samples a mini-batch, L layers, V tokens or classes, B samples at hand,
          C P Q R channels, h w y x v u sides, D width, H feed-forward width, A heads of d channels, S source
          and, in shapes, N target tokens. The paper numbers no equation: G1 to G15 are ours, the pipeline's
          first; each stands where the code computes it.
CUDA:     never run on CUDA.
Read in this order: schedule, Pipeline (step, run, worker, do_forward to do_backward), Channel, train.
"""

import copy
import itertools
import math
import os
import queue
import random
import re
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import common
import data

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# --- Configuration -----------------------------------------------------------


# The comment behind a field is its --help and, before the colon, its range: common.py reads it.
@dataclass
class Config:
    preset: str = "demo"                    # where the values below start from; they stand under Training
    model: Literal["translate", "amoebanet-d", "amoebanet-b", "lm"] = "translate"   # lm: --plan, --emulate
    data: str = "numbers"                   # numbers, numbers:LIMIT, tsv:PATH; images: shapes, cifar10, ...
    size: int = 32                          # >= 1: side of an image
    classes: int = 0                        # >= 0: classes or tokens V; 0: those of the data
    layers: int = 6                         # >= 1 and <= 9999: L encoder, L decoder layers; or normal cells
    width: int = 1024                       # >= 1: D; AmoebaNet: filters of the first stack
    hidden: int = 8192                      # >= 1: H
    heads: int = 16                         # >= 1 and <= 9999: A, of 64 channels each
    dropout: float = 0.0                    # in [0, 1): behind a sub-layer; AmoebaNet: before the classifier
    scaled: bool = True                     # feed-forward initialisation divided by the number of layers
    clip: float = 20.0                      # >= 0: training clips logits to +-clip (paper: no value); 0: not
    temperature: float = 1.43               # >= 0.05: T; a language pair of n sentences is drawn ~ n^(1/T)
    stages: int = 0                         # >= 0 and <= 9999: K; 0: as many as --devices or --gpus
    micro: int = 8                          # >= 1: M (paper: at least 4 K)
    checkpoint: Literal["always", "except_last", "never"] = "except_last"    # recomputed (lingvo: always)
    balance: str = "flops"                  # shared evenly: flops, time or params; or layers by hand: 3,2,4
    goal: Literal["variance", "bottleneck"] = "variance"        # what is least among the stages' costs
    devices: str = ""                       # one a stage, as cuda:0,cuda:0; default: --gpus in turn, or CPU
    emulate: float = 0.0                    # in [0, 60]: seconds of F on a mean stage, twice for B; 0: not
    plan: bool = False                      # print memory, bubble and speed-up; nothing runs
    steps: int = 100_000                    # >= 1: optimizer steps
    batch: int = 128                        # >= 1: mini-batch N, of all replicas
    lr: float = 0.001                       # > 0: peak learning rate
    warmup: int = 0                         # >= 0: steps over which it rises
    decay: int = 0                          # >= 0: steps in which it falls by 3 % (paper: 2 epochs); 0: not
    cooldown: float = 0.0                   # in [0, 1]: share of steps in which it falls to 2 % (our choice)
    bn_momentum: float = 0.0003             # in [0, 1]: of BatchNorm's running averages (TPU code)
    seed: int = 0                           # every random number is a function of (seed, step)
    gpus: int = 1                           # >= 1 and <= 9999: devices; without a GPU, threads of the CPU
    device: str = "auto"                    # auto, cpu or cuda
    bf16: bool = False                      # bf16 autocast on CUDA
    compile: bool = False                   # torch.compile for the layers; takes minutes on a CPU
    name: str = ""                          # run folder runs/gpipe/NAME; default: the preset
    resume: bool = False                    # go on from runs/gpipe/NAME/last.pt
    sample: str = ""                        # checkpoint to answer the test split with
    out: str = ""                           # folder for what --sample writes; default: samples/ beside it
    log: int = 50                           # >= 1: steps between log lines
    save: int = 500                         # >= 1: steps between checkpoints and timelines
    sampling: ClassVar = ("stages", "gpus", "devices", "micro", "balance", "goal")  # what --sample may change


# --- Building blocks ---------------------------------------------------------
# A layer takes and returns a tensor or a tuple of tensors, batch first, and leaves its input as it is.
# It may run twice, forward and again for the backward pass, and must then do the same again.

PAD, START, END = 0, 1, 2                   # as data.py numbers them


class ThreadLocal(threading.local):
    """What a stage, which is a thread, tells the layer that it runs."""

    generator = None                        # to draw random numbers from; None: torch's own
    recompute = False                       # the layer has run before on this input
    layer = "BatchNorm"                     # its name, for messages


thread_local = ThreadLocal()


def stage_dropout(x, p, training):
    """F.dropout with the mask drawn from the generator of layer and micro-batch.

    torch has one generator a process: stages would race for it, and a recomputed layer would drop others.
    """
    if p == 0 or not training:
        return x
    keep = torch.empty_like(x).bernoulli_(1 - p, generator=thread_local.generator)
    return x * keep / (1 - p)


# G11  running <- (1 - momentum) running + momentum s       s: mean and variance of the mini-batch, Sec. 2.2

class BatchNorm(nn.BatchNorm2d):
    """Deferred: the running averages move once a mini-batch, by the moments of all its micro-batches (G11).

    Training normalises each micro-batch by its own moments. The variance that is averaged is biased as
    lingvo's; torch's is not. A plain BatchNorm would move twice for every recomputed micro-batch.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.moments = []                   # (n, mean, variance) of each micro-batch so far

    def forward(self, x):
        n = x.numel() // x.shape[1]         # values a channel
        common.require(n > 1 or not self.training, f"{thread_local.layer}: a micro-batch has one value a "
                       "channel, so no variance: ask for fewer micro-batches or a larger batch")
        if not self.training or self.running_mean is None:
            return super().forward(x)                                                       # (B, C, h, w)
        if thread_local.recompute:
            return F.batch_norm(x, None, None, self.weight, self.bias, True, eps=self.eps)  # (B, C, h, w)
        # With momentum 1 torch leaves the moments of this call in the buffers, the variance unbiased.
        mean = torch.zeros_like(self.running_mean)                                                   # (C)
        var = torch.zeros_like(self.running_var)                                                     # (C)
        self.moments.append((n, mean, var))
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps)      # (B, C, h, w)


@torch.no_grad()
def commit(norms):
    """Move the running averages of a device's BatchNorms, behind the last micro-batch of all replicas (G11).

    All at once, channel beside channel: one layer after another would take as long as a small layer itself.
    Without momentum, as torch has it, they are averages over all mini-batches so far.
    """
    norms = [norm for norm in norms if norm.moments]            # something came by, and averages are kept
    if not norms:
        return
    counts, means, variances = zip(*itertools.chain(*(norm.moments for norm in norms)))
    mean = torch.cat(means).double()        # of all layers and micro-batches
    var = torch.cat(variances).double()
    n = torch.as_tensor(np.repeat(counts, [len(part) for part in means])).to(mean)
    sums = torch.stack([n, n * mean, (n - 1) * var + n * mean.square()])
    # over the micro-batches of each layer
    channels = [norm.num_features for norm in norms]
    layers = sums.split([C * len(norm.moments) for norm, C in zip(norms, channels)], 1)
    sums = [layer.unflatten(1, (-1, C)).sum(1) for layer, C in zip(layers, channels)]
    n, s1, s2 = common.average(torch.cat(sums, 1))
    mean = s1 / n
    var = s2 / n - mean.square()            # cancels, hence float64
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
    momenta = [1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
               for norm in norms]
    momentum = torch.as_tensor(np.repeat(momenta, channels)).to(mean)
    for name, now in (("running_mean", mean), ("running_var", var)):
        running = [getattr(norm, name) for norm in norms]
        old = torch.cat(running)
        torch._foreach_copy_(running, (old + momentum * (now - old)).split(channels))


# An AmoebaNet cell. States 0 and 1 are the outputs of the last cell (`current`) and of the one before it
# (`previous`). Ten operations, each (state that it reads, name), are added in pairs to make states 2 to 6.
# Last: what is concatenated. The TPU code differs from the AmoebaNet paper's figure of D's normal cell, which
# would concatenate 4, 5, 6; the code's gives the published counts.
CELLS = {
    "d normal": ([(1, "conv1x1"), (1, "max3x3"), (1, "identity"), (0, "conv1x7"), (0, "conv1x1"),
                  (0, "conv1x7"), (2, "max3x3"), (2, "identity"), (1, "avg3x3"), (5, "conv1x1")],
                 (0, 3, 4, 6)),
    "d reduction": ([(0, "max2x2"), (0, "max3x3"), (2, "identity"), (1, "conv3x3"), (2, "conv1x7"),
                     (2, "max3x3"), (3, "identity"), (1, "max2x2"), (2, "avg3x3"), (3, "conv1x1")],
                    (4, 5, 6)),
    "b normal": ([(1, "conv1x1"), (1, "max3x3"), (1, "identity"), (0, "separable3x3"), (1, "conv1x1"),
                  (0, "separable3x3"), (2, "conv1x1"), (2, "identity"), (1, "avg3x3"), (5, "conv1x1")],
                 (0, 3, 4, 6)),
    "b reduction": ([(0, "max2x2"), (0, "max3x3"), (2, "identity"), (1, "conv3x3"), (2, "separable5x5"),
                     (2, "max3x3"), (3, "identity"), (1, "separable3x3"), (4, "avg3x3"), (3, "conv1x1")],
                    (5, 6)),
}


def conv(P, C, size=(1, 1), stride=1):
    """ReLU, convolution from P to C channels without bias, batch norm; a list."""
    padding = [n // 2 for n in size]
    return [nn.ReLU(), nn.Conv2d(P, C, size, stride, padding, bias=False), BatchNorm(C, 1e-3)]


def bottleneck(P, C, middle):
    """Modules for C / 4 channels between two 1x1 convolutions."""
    return conv(P, C // 4) + middle + conv(C // 4, C)


def separable(P, C, k, stride):
    """Twice: ReLU, k x k of each channel alone, 1x1, batch norm; as in the TPU code without dilation."""
    first = nn.Conv2d(P, P, k, stride, k // 2, groups=P, bias=False)
    second = nn.Conv2d(C, C, k, 1, k // 2, groups=C, bias=False)
    return [nn.ReLU(), first, *conv(P, C)[1:], nn.ReLU(), second, *conv(C, C)[1:]]


class MaxPool(nn.MaxPool2d):
    """torch's, to the bit, in a quarter of its time on a CPU, which pools fast where channels lie last."""

    def forward(self, x):
        if x.device.type != "cpu":
            return super().forward(x)                                                       # (B, C, y, x)
        last = x.detach().contiguous(memory_format=torch.channels_last)                     # (B, C, h, w)
        place = F.max_pool2d(last, self.kernel_size, self.stride, self.padding, 1, self.ceil_mode,
                             return_indices=True)[1]                                        # (B, C, y, x)
        return x.flatten(2).gather(2, place.flatten(2)).view(place.shape)                   # (B, C, y, x)


def operation(name, P, C, stride):
    """An operation of a cell, from P to C channels, as a list; stride 2 halves the sides, rounding up."""
    q = C // 4
    if name == "conv1x1":
        return conv(P, C)
    if name == "conv3x3":
        return bottleneck(P, C, conv(q, q, (3, 3), stride))
    if name == "conv1x7":
        return bottleneck(P, C, conv(q, q, (1, 7)) + conv(q, q, (7, 1)))
    if name == "separable3x3":
        return separable(P, C, 3, stride)
    if name == "separable5x5":
        return separable(P, C, 5, stride)
    pools = {"identity": nn.Identity(),
             "max2x2": MaxPool(2, stride, ceil_mode=True),
             "max3x3": MaxPool(3, stride, 1),
             "avg3x3": nn.AvgPool2d(3, stride, 1, count_include_pad=False)}
    widen = conv(P, C)[1:]                  # made even if unused, or later layers would draw other weights
    return [pools[name], *widen] if P != C else [pools[name]]


class FactorizedReduce(nn.Module):
    """Halve the sides: two strided 1x1 convolutions, the second one pixel further, concatenated."""

    def __init__(self, P, C):
        super().__init__()
        self.even = nn.Conv2d(P, C // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(P, C - C // 2, 1, 2, bias=False)
        self.norm = BatchNorm(C, 1e-3)

    def forward(self, x):
        x = F.relu(x)                                                                       # (B, P, h, w)
        shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]                                      # (B, P, h, w)
        return self.norm(torch.cat([self.even(x), self.odd(shifted)], 1))                   # (B, C, y, x)


class Cell(nn.Module):
    """An AmoebaNet cell of C filters: (current, previous) -> (concatenation, current).

    (B, P, h, w), (B, Q, v, u) -> (B, R, y, x), (B, P, h, w): v, u are h, w or twice that; y, x h, w or half.
    """

    def __init__(self, kind, P, Q, C, larger=False, raw=False):
        """P, Q: channels of current and previous. previous is brought to C channels.

        larger: previous has twice current's sides, and is halved. raw, of the first cell behind the TPU
        code's stem: previous stays as it is.
        """
        super().__init__()
        pairs, self.concat = CELLS[kind]
        self.sources = [source for source, _ in pairs]
        self.current = nn.Sequential(*conv(P, C))
        if larger:
            self.previous = FactorizedReduce(Q, C)
        elif raw or Q == C:
            self.previous = nn.Identity()
        else:
            self.previous = nn.Sequential(*conv(Q, C))
        self.operations = nn.ModuleList()
        for source, name in pairs:
            inputs = Q if raw and source == 1 else C
            # a reduction cell halves states 0 and 1; those that it makes of them have the new size
            stride = 2 if "reduction" in kind and source in (0, 1) else 1
            self.operations.append(nn.Sequential(*operation(name, inputs, C, stride)))

    def forward(self, states):
        if torch.is_tensor(states):                             # behind the stem's convolution
            states = (states, states)                                       # (B, P, h, w), (B, P, h, w)
        current, previous = states                                          # (B, P, h, w), (B, Q, v, u)
        h = [self.current(current), self.previous(previous)]                                # (B, C, h, w)
        for i in range(0, 10, 2):
            left = self.operations[i](h[self.sources[i]])                                   # (B, C, y, x)
            right = self.operations[i + 1](h[self.sources[i + 1]])                          # (B, C, y, x)
            h.append(left + right)
        return torch.cat([h[i] for i in self.concat], 1), current           # (B, R, y, x), (B, P, h, w)


class Classifier(nn.Module):
    """V logits of the mean over a map of P channels, behind a ReLU as in the TPU code."""

    def __init__(self, P, V, dropout=0.0):
        super().__init__()
        self.project = nn.Linear(P, V)
        self.dropout = dropout

    def forward(self, states):
        y = F.relu(states[0]).mean((2, 3))                                                        # (B, P)
        return self.project(stage_dropout(y, self.dropout, self.training))                        # (B, V)


class Attention(nn.Module):
    """A heads of d channels; A d need not be D: the counts of Sec. 5 ask for it."""

    def __init__(self, D, A, d=64):
        super().__init__()
        self.query = nn.Linear(D, A * d)
        self.key = nn.Linear(D, A * d)
        self.value = nn.Linear(D, A * d)
        self.heads = A
        self.out = nn.Linear(A * d, D)

    def split_heads(self, x):
        """The channels of each head apart."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)                            # (B, A, n, d)

    def forward(self, x, memory, mask=None, causal=False):
        q = self.split_heads(self.query(x))                                                 # (B, A, N, d)
        k = self.split_heads(self.key(memory))                                              # (B, A, S, d)
        v = self.split_heads(self.value(memory))                                            # (B, A, S, d)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)                 # (B, A, N, d)
        return self.out(y.transpose(1, 2).flatten(2))                                          # (B, N, D)


class Layer(nn.Module):
    """A Transformer layer, pre-norm (our choice), of one of three kinds.

    Of (x, y, source ids) "encoder" changes x, the source, and "decoder" y, the target; the rest travels along
    for later layers. "causal" has y alone: Table 1's language model.
    """

    def __init__(self, D, H, A, dropout, kind):
        super().__init__()
        self.kind = kind
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(D)
        self.attention = Attention(D, A)
        if kind == "decoder":
            self.cross_norm = nn.LayerNorm(D)
            self.cross = Attention(D, A)
        self.mlp_norm = nn.LayerNorm(D)
        self.wide = nn.Linear(D, H)
        self.narrow = nn.Linear(H, D)

    def attend(self, x, mask=None):
        """Self-attention: over all tokens that the mask shows or, without one, over those before."""
        y = self.attention_norm(x)                                                             # (B, N, D)
        y = self.attention(y, y, mask, causal=mask is None)                                    # (B, N, D)
        return x + stage_dropout(y, self.dropout, self.training)                               # (B, N, D)

    def attend_source(self, y, x, mask):
        """Cross-attention of the target y to the source x.

        x travels raw, so every layer applies the encoder's final norm here (our choice: without weights).
        """
        memory = F.layer_norm(x, x.shape[-1:])                                                 # (B, S, D)
        z = self.cross(self.cross_norm(y), memory, mask)                                       # (B, N, D)
        return y + stage_dropout(z, self.dropout, self.training)                               # (B, N, D)

    def feed_forward(self, x):
        """Every token alone through H channels."""
        y = self.narrow(F.relu(self.wide(self.mlp_norm(x))))                                   # (B, N, D)
        return x + stage_dropout(y, self.dropout, self.training)                               # (B, N, D)

    def forward(self, states):
        if self.kind == "causal":
            return self.feed_forward(self.attend(states))                                      # (B, N, D)
        x, y, ids = states                                                  # (B, S, D), (B, N, D), (B, S)
        mask = (ids != PAD)[:, None, None]                                                  # (B, 1, 1, S)
        if self.kind == "encoder":
            x = self.feed_forward(self.attend(x, mask))                                        # (B, S, D)
        else:
            y = self.attend_source(self.attend(y), x, mask)                                    # (B, N, D)
            y = self.feed_forward(y)                                                           # (B, N, D)
        return x, y, ids                                                    # (B, S, D), (B, N, D), (B, S)


def sincos_pos_embed(N, D, device):
    """Sines, then cosines, of N positions at D / 2 wavelengths."""
    positions = torch.arange(N, device=device)                                                       # (N)
    channels = torch.arange(0, D, 2, device=device)                                               # (D//2)
    angle = positions[:, None] * 10000.0 ** -(channels / D)                                    # (N, D//2)
    return torch.cat([angle.sin(), angle.cos()], 1)                                               # (N, D)


class Embed(nn.Module):
    """(source, target) ids -> (x, y, source ids), or ids -> y: vectors of tokens plus their positions'."""

    def __init__(self, V, D, dropout):
        super().__init__()
        self.table = nn.Embedding(V, D)
        self.dropout = dropout

    def embed(self, ids):
        D = self.table.embedding_dim
        x = self.table(ids) * D ** 0.5 + sincos_pos_embed(ids.shape[1], D, ids.device)         # (B, N, D)
        return stage_dropout(x, self.dropout, self.training)                                   # (B, N, D)

    def forward(self, ids):
        if torch.is_tensor(ids):
            return self.embed(ids)                                                             # (B, N, D)
        source, target = ids                                                              # (B, S), (B, N)
        return self.embed(source), self.embed(target), source               # (B, S, D), (B, N, D), (B, S)


# G15  logits <- min(max(logits, -clip), clip)       in training: one of two tricks for depth, Sec. 5

class Logits(nn.Module):
    """V logits a token of the last sequence, behind a norm (our choice: without weights).

    The paper gives neither form nor value of G15; lingvo clamps.
    """

    def __init__(self, D, V, clip=0.0, bias=True):
        super().__init__()
        self.project = nn.Linear(D, V, bias)
        self.clip = clip

    def forward(self, states):
        y = states if torch.is_tensor(states) else states[1]                                   # (B, N, D)
        logits = self.project(F.layer_norm(y, y.shape[-1:]))                                   # (B, N, V)
        if self.training and self.clip > 0:
            logits = logits.clamp(-self.clip, self.clip)                                       # (B, N, V)
        return logits                                                                          # (B, N, V)


# --- Model -------------------------------------------------------------------


def amoebanet(kind, L, D, V, stem="wide", dropout=0.0):
    """AmoebaNet-D or -B (kind "d", "b"): a stem, three stacks of L / 3 normal cells, V logits.

    The stacks have D, 2 D and 4 D filters; reduction cells stand between them. stem: "tpu", the TPU
    code's, gives B its 557 M parameters; "wide", torchgpipe's, Table 1's counts of D; "small", for 32 pixels,
    at stride 1 and without reduction cells, is our choice.
    """
    stems = {"tpu": (32, [D // 4, D // 2]), "wide": (D // 4, [D // 2, D]), "small": (D, [])}
    P, reductions = stems[stem]
    cells = [("reduction", C) for C in reductions]
    for C in (D, 2 * D, 4 * D):
        if C > D:
            cells.append(("reduction", C))
        cells += [("normal", C)] * (L // 3)
    first = conv(3, P, (3, 3), 1 if stem == "small" else 2)[1:]                     # without its ReLU
    layers = [nn.Sequential(*first)]
    Q = P                                   # channels of the output before the last
    before = "normal"
    for cell, C in cells:
        raw = stem == "tpu" and len(layers) == 1
        layers.append(Cell(f"{kind} {cell}", P, Q, C, before == "reduction", raw))
        Q = P
        P = C * len(layers[-1].concat)
        before = cell
    return nn.Sequential(*layers, Classifier(P, V, dropout))


# G14  std(W) = inputs^(-1/2), of feed-forward outputs inputs^(-1/2) / layers      the other trick, Sec. 5

def transformer(L, H, A, V, D=1024, decoder=True, dropout=0.0, clip=0.0, scaled=True):
    """T(L, H, A) of Sec. 5: L encoder and L decoder layers of A heads, feed-forward width H, V tokens.

    Without decoder, Transformer-L of Table 1. scaled: initialise by G14. The paper does not say which weights
    it scales down; those of the feed-forward output are our choice.
    """
    kinds = ["encoder"] * L + ["decoder"] * L if decoder else ["causal"] * L
    layers = [Layer(D, H, A, dropout, kind) for kind in kinds]
    model = nn.Sequential(Embed(V, D, dropout), *layers, Logits(D, V, clip, bias=not decoder))
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            depth = len(layers) if scaled and "narrow" in name else 1
            nn.init.normal_(weight, 0, weight.shape[1] ** -0.5 / depth)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)
    return model


# --- Objective ---------------------------------------------------------------
# G6  l = loss(concat_m y_K^(m), target)       of the whole mini-batch, on the last device, Sec. 2.2; so no B
#                                              starts before the last F


def loss(output, target, total, smoothing=0.1):
    """Cross-entropy of logits (B, V) or (B, N, V), summed over all targets except -100, over `total`.

    total: how many they are in the mini-batch, of which a replica has a share. A mean of micro-batch means
    would weigh uneven micro-batches wrongly (G6). Smoothing is the AmoebaNet paper's, in translation our
    choice. The plain form, which the pipeline must equal: loss(model(inputs), target, total).backward().
    """
    logits = output.flatten(0, -2)                                                              # (B*N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))                        # (B*N, V)
    target = target.flatten()                                                                      # (B*N)
    return F.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing) / total        # ()


# --- Pipeline ----------------------------------------------------------------
# First the cuts, of network and mini-batch; then the order of work; then those who do it; then what it costs.
#
# G1  F_k = f_j o ... o f_i                          stage k: the layers i to j, Sec. 2.1
# G2  C_k = c_i + ... + c_j                          its cost, Sec. 2.1
# G3  cut such that Var_k C_k is least               Sec. 2.2
# G4  x -> x^(1), ..., x^(M)                         micro-batches, Sec. 2.2
# G5  y_k^(m) = F_k(y_(k-1)^(m); W_k)                forward, y_0 = x; one W_k for all m, Sec. 2.2


def partition(costs, K, goal="variance"):
    """Sizes of K stages of consecutive layers: least variance of their costs (G2, G3), or least "bottleneck".

    The bottleneck is the largest cost. The paper speaks of a heuristic and says no more; this is exact, by
    dynamic programming in O(K L^2). Raises common.UserError where K stages are not possible.
    """
    L = len(costs)
    common.require(1 <= K <= L, f"{K} stages: there are {L} layers; 1 to as many are possible")
    total = np.cumsum([0.0, *costs])
    load = total - total[:, None]           # load[i, j]: the cost of layers i to j - 1 as one stage
    # The sum of all costs is fixed, so least squares are least variance.
    price = load if goal == "bottleneck" else load ** 2
    price[np.tril_indices(L + 1)] = np.inf                      # no stage is empty
    # best[j]: the least price of layers 0 to j - 1, on one stage, then on two, and so on to K.
    # starts[n][j]: where the last of n + 2 stages starts, which then hold layers 0 to j - 1.
    best = price[0]
    starts = []
    join = np.maximum if goal == "bottleneck" else np.add
    for _ in range(K - 1):
        options = join(best[:, None], price)                    # [i, j]: the last stage is layers i to j - 1
        best = options.min(0)
        starts.append(options.argmin(0))
    # Backwards: the last stage ends at L; where it starts, the one before it ends.
    ends = [L]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    return np.diff([0, *reversed(ends)]).tolist()


def as_tuple(value):
    """What crosses a boundary, a tensor or a tuple of tensors, as a tuple."""
    return value if isinstance(value, tuple) else (value,)


def map_tensors(function, value):
    """function of a tensor, or of every tensor of a tuple; None (no gradient) stays None."""
    done = tuple(part if part is None else function(part) for part in as_tuple(value))
    return done if isinstance(value, tuple) else done[0]


def require_tensors(value, where):
    """value, or UserError if it cannot cross a boundary."""
    parts = as_tuple(value)
    fits = parts and all(torch.is_tensor(part) and part.ndim > 0 for part in parts)
    kinds = ", ".join(type(part).__name__ for part in parts)
    common.require(fits, f"{where} ({kinds}): a tensor or a tuple of tensors, batch first, is wanted")
    return value


def scatter(value, M):
    """A mini-batch as min(M, N) near-equal micro-batches along the first axis (G4), without its graph.

    The paper's are equal. Uneven ones are ours, and harmless: the loss is the whole mini-batch's (G6).
    """
    counts = {len(part) for part in as_tuple(value)}
    fits = len(counts) == 1 and min(counts) > 0
    common.require(fits, f"mini-batch of {counts} samples: one number, above 0, is needed")
    cuts = [part.detach().tensor_split(min(M, len(part))) for part in as_tuple(value)]
    for part, pieces in zip(as_tuple(value), cuts):
        for piece in pieces:
            piece.requires_grad_(part.requires_grad)
    return list(zip(*cuts)) if isinstance(value, tuple) else cuts[0]


def gather(pieces):
    """The mini-batch of its micro-batches."""
    columns = zip(*map(as_tuple, pieces))
    whole = tuple(None if column[0] is None else torch.cat(column) for column in columns)
    return whole if isinstance(pieces[0], tuple) else whole[0]


def split_like(whole, pieces):
    """What gather has made of pieces, in pieces of the same sizes."""
    columns = zip(*map(as_tuple, pieces))
    split = [part.split([len(piece) for piece in column]) for part, column in zip(as_tuple(whole), columns)]
    return list(zip(*split)) if isinstance(whole, tuple) else split[0]


def clock_cycles(K, M):
    """Forward order on K stages: at clock t, stage k has micro-batch m = t - k. M + K - 1 lists of (m, k)."""
    return [[(t - k, k) for k in range(K) if 0 <= t - k < M] for t in range(M + K - 1)]


def schedule(K, M, mode):
    """One training step: tasks (kind, m, k) in an order one worker could follow; each stage follows its own.

    mode: --checkpoint, the micro-batches that are recomputed.

    F forward, L loss, R recompute, B backward. Backward is forward reversed: last in, first out.
    schedule(2, 2, "always"), where every task takes a unit of time and .. is idle:

        stage 0:  F0 F1 R1 .. .. .. B1 R0 B0    F waits for F of stage k - 1, L for all F of the last stage,
        stage 1:     F0 F1 L1 R1 B1 R0 B0       B for B of stage k + 1, R for nothing: its input is here

    So R fills the wait for a gradient (Sec. 2.3). "except_last", torchgpipe's, spares the last micro-batch,
    whose B is the stage's next task. `step`, `do_loss` and `footprint` count on this order; 1F1B, for
    comparison, stands in tests/claims/claim_gpipe.py.
    """
    forward = [(m, k) for cycle in clock_cycles(K, M) for m, k in cycle]
    recomputed = {"always": M, "except_last": M - 1, "never": 0}[mode]
    tasks = [("F", m, k) for m, k in forward]
    tasks.append(("L", M - 1, K - 1))       # of all micro-batches; it follows the last F
    for m, k in reversed(forward):
        if m < recomputed:
            tasks.append(("R", m, k))
        tasks.append(("B", m, k))
    return tasks


# A stage is a thread, which does its tasks of the schedule in order. Stage k takes the input of F from the
# channel of stage k - 1, the gradient of B from that of stage k + 1, and waits where it is empty.

class Channel:
    """One direction of one boundary: a queue of tensors or tuples of tensors from a stage to its neighbour.

    On CUDA it has a copy stream on either side, so that no copy delays what a stage computes meanwhile
    (Sec. 3: slow links suffice).
    """

    def __init__(self, source, target, make_stream):
        self.source = source
        self.target = target
        self.read_stream = make_stream(source)
        self.write_stream = make_stream(target)
        self.open()

    def open(self):
        """Empty, for a new mini-batch."""
        self.queue = queue.SimpleQueue()
        self.closed = False

    def close(self):
        """Turn away the stage that waits here or comes later."""
        self.closed = True
        self.queue.put((None, None))

    def put(self, value):
        """Send what the source's current stream has made; None in it stands for no gradient."""
        ready = None
        if self.read_stream:
            ready = torch.cuda.current_stream(self.source).record_event()
        self.queue.put((value, ready))

    def get(self):
        """Wait for the next value, on the target device and ready for its current stream."""
        value, ready = self.queue.get()
        if self.closed:
            raise CancelledError
        if ready is None:
            return value
        return map_tensors(lambda part: self.copy(part, ready), value)

    def copy(self, part, ready):
        """CUDA: a copy beside the computing of both stages, for which the receiver alone waits.

        torch copies on the source's current stream and makes the target's wait: both are the copy streams
        here. record_stream: no memory is handed out before the copy is done.
        """
        self.read_stream.wait_event(ready)
        self.write_stream.wait_event(ready)
        with torch.cuda.stream(self.read_stream), torch.cuda.stream(self.write_stream):
            arrived = part.detach().to(self.target, non_blocking=True).requires_grad_(part.requires_grad)
        part.record_stream(self.read_stream)
        compute_stream = torch.cuda.current_stream(self.target)
        arrived.record_stream(compute_stream)
        compute_stream.wait_stream(self.write_stream)
        return arrived


@dataclass
class Minibatch:
    """What the stages know of one mini-batch.

    They share its dicts without a lock, for stage k writes and reads keys (m, k) alone.
    """

    loss_fn: object                         # output -> scalar; None: forward alone, for predictions
    number: int                             # the training step
    M: int                                  # its micro-batches, never more than samples
    recomputed: set                         # those of them that are recomputed, on every stage
    autocast: tuple                         # the caller's (kind of device, type, whether)
    stash: dict = field(default_factory=dict)       # (m, k): a stage's input
    interior: dict = field(default_factory=dict)    # (m, k): its output, whose graph holds all between
    wanted: dict = field(default_factory=dict)      # k: for each output, whether it wants a gradient
    times: dict = field(default_factory=dict)       # (kind, m, k): (start, end) in seconds
    errors: list = field(default_factory=list)      # what stages raised, the first one first
    loss: object = None                     # what the last stage found, without graphs
    output: object = None                   # of the whole mini-batch

    @property
    def training(self):
        """Whether backward follows."""
        return self.loss_fn is not None


# G7  (dW_k^(m), g_(k-1)^(m)) = (dF_k / d(W_k, y_(k-1)^(m)))^T g_k^(m)      backward, m = M, ..., 1, Sec. 2.2;
#                                                                           g_k^(m) = dl / dy_k^(m)
# G8  dl / dW_k = sum_m dW_k^(m)                                            then one update, Sec. 2.2
# G9  kept on a stage: O(N + (L / K) (N / M)) activations                   M inputs, one interior, Sec. 2.3

class Pipeline:
    """An nn.Sequential on K stages; its parameters keep their names.

    `step` leaves the gradients of one device in it, `infer` predicts. The plain forms: one worker
    (threads=False), the current streams (streams=False).

    Layers that are recomputed must do the same twice. `probe` tries each once, before the first step, and
    refuses those whose training draws from the random numbers of torch (nn.Dropout), NumPy or Python, or
    changes a buffer or a parameter (nn.BatchNorm2d, spectral_norm): take stage_dropout and BatchNorm, or mode
    "never". Not seen: draws from a generator of the layer's own, changes of its other attributes.
    """

    def __init__(self, model, sizes, devices, M=1, mode="except_last", seed=0, streams=True, threads=True):
        """sizes: layers of each stage; devices: one a stage; M micro-batches. Raises common.UserError."""
        K = len(sizes)
        fits = sum(sizes) == len(model) and min(sizes) > 0
        common.require(fits, f"balance {sizes}: must be above 0 and sum to {len(model)} layers")
        common.require(M > 0, f"{M} micro-batches: at least 1 is needed")
        common.require(K <= len(devices), f"{len(devices)} devices for {K} stages: one a stage is needed")
        self.model = model
        self.M = M
        self.mode = mode
        self.seed = seed
        self.streams = streams
        self.threads = threads
        self.first_layer = np.cumsum([0, *sizes]).tolist()          # of each stage
        self.devices = [torch.device(device) for device in devices[:K]]
        ends = self.first_layer[1:]
        self.stages = [model[a:b].to(device) for a, b, device in zip(self.first_layer, ends, self.devices)]
        stage_of = {}
        for k, stage in enumerate(self.stages):
            # two stages would add to one gradient at once, and two devices cannot hold one tensor
            for tensor in [*stage.parameters(), *stage.buffers()]:
                alone = stage_of.setdefault(id(tensor), k) == k
                common.require(alone, "two stages share a parameter: join their layers")
        self.norms = [[layer for layer in stage.modules() if isinstance(layer, BatchNorm)]
                      for stage in self.stages]
        self.compute_streams = [self.make_stream(device) for device in self.devices]
        # caller -0- stage 0 -1- stage 1 -2- ... -K- loss: channel k of either direction joins k - 1 and k
        sides = [self.devices[0], *self.devices, self.devices[-1]]
        pairs = list(zip(sides, sides[1:]))
        self.forward_channels = [Channel(a, b, self.make_stream) for a, b in pairs]
        self.backward_channels = [Channel(b, a, self.make_stream) for a, b in pairs]
        self.probed = False
        self.minibatch = None               # the last one

    def make_stream(self, device):
        """A stream on CUDA, else None, which `torch.cuda.stream` ignores."""
        if device.type != "cuda":
            return None
        return torch.cuda.Stream(device) if self.streams else torch.cuda.current_stream(device)

    def step(self, inputs, loss_fn, number=0):
        """One mini-batch: adds the sum of its micro-batches' gradients (G8) to every .grad.

        inputs: tensor or tuple, batch first; loss_fn(output) -> scalar, on the last device; number: the
        training step. Returns (loss, output, gradient of the inputs). Raises what a stage raised.
        """
        batch = self.run(inputs, loss_fn, number)
        for norms in self.norms:
            commit(norms)
        gradients = [self.backward_channels[0].get() for _ in range(batch.M)]
        gradients.reverse()                 # the last micro-batch came first
        return batch.loss, batch.output, gather(gradients)

    def infer(self, inputs):
        """The output in evaluation mode: forwards alone, M + K - 1 clock cycles, nothing kept."""
        batch = self.run(inputs)
        return gather([self.forward_channels[-1].get() for _ in range(batch.M)])

    def run(self, inputs, loss_fn=None, number=0):
        """Feed the micro-batches and let the stages follow the schedule; returns the Minibatch."""
        first = self.devices[0]
        inputs = map_tensors(lambda part: part.to(first), require_tensors(inputs, "the mini-batch is"))
        pieces = scatter(inputs, self.M)
        tasks = schedule(len(self.stages), len(pieces), self.mode)
        if loss_fn is None:
            tasks = [task for task in tasks if task[0] == "F"]
        recomputed = {m for kind, m, _ in tasks if kind == "R"}
        autocast = (first.type, torch.get_autocast_dtype(first.type), torch.is_autocast_enabled(first.type))
        batch = Minibatch(loss_fn, number, len(pieces), recomputed, autocast)
        self.minibatch = batch
        if self.model.training != batch.training:
            self.model.train(batch.training)
        if recomputed and not self.probed:
            self.probe(pieces[0], batch)
        for norm in itertools.chain(*self.norms):
            norm.moments.clear()
        for channel in self.forward_channels + self.backward_channels:
            channel.open()
        for piece in pieces:
            self.forward_channels[0].put(piece)
        self.work(tasks, batch)
        if batch.errors:
            raise batch.errors[0]
        return batch

    def work(self, tasks, batch):
        """A thread a stage does that stage's tasks; all have ended when this returns."""
        K = len(self.stages)
        columns = [tasks]
        if self.threads:
            columns = [[task for task in tasks if task[2] == k] for k in range(K)]
        on_cuda = self.devices[0].type == "cuda"
        if on_cuda:
            for device in set(self.devices):                        # after what the caller has enqueued
                torch.cuda.synchronize(device)
        started = [self.now(k) for k in range(K)]
        with ThreadPoolExecutor(K) as pool:
            for column in columns[:-1]:
                pool.submit(self.worker, column, batch)
            # The last stage works in the caller's thread: a new one, its memory cold, costs a few per cent.
            self.worker(columns[-1], batch)
        if on_cuda:
            for stream in self.compute_streams:                     # before the update
                stream.synchronize()
            for task, (start, end) in batch.times.items():          # events of two devices do not compare
                zero = started[task[2]]
                batch.times[task] = (zero.elapsed_time(start) / 1000, zero.elapsed_time(end) / 1000)

    def worker(self, tasks, batch):
        """Do tasks in order, each once its input is here. An exception stops all workers."""
        try:
            for kind, m, k in tasks:
                # A new thread starts on the default stream with gradients on: both are entered anew.
                with torch.cuda.stream(self.compute_streams[k]), torch.set_grad_enabled(batch.training):
                    self.do_task(kind, m, k, batch)
        except BaseException as error:      # the first is raised; then come those of the stages it turns away
            batch.errors.append(error)
            for channel in self.forward_channels + self.backward_channels:
                channel.close()

    def do_task(self, kind, m, k, batch):
        """Take what a task needs from a neighbour, do it, pass on what it gives."""
        source, do, target = {
            "F": (self.forward_channels[k], self.do_forward, self.forward_channels[k + 1]),
            "L": (None, self.do_loss, None),
            "R": (None, self.do_recompute, None),
            "B": (self.backward_channels[k + 1], self.do_backward, self.backward_channels[k])}[kind]
        value = source.get() if source else None
        start = self.now(k)
        value = do(m, k, value, batch)
        batch.times[kind, m, k] = (start, self.now(k))
        if target:
            target.put(value)

    def do_forward(self, m, k, x, batch):
        """F (G5). Of a micro-batch that is recomputed the input alone is kept, and no graph is built.

        So a stage holds M inputs and one interior at most (G9), but for mode "never". The first micro-batch
        has a graph, which tells for all of them which outputs want a gradient.
        """
        recomputed = m in batch.recomputed
        with torch.set_grad_enabled(batch.training and (m == 0 or not recomputed)):
            y = self.run_stage(m, k, x, batch)
        if batch.training:
            batch.stash[m, k] = x
        if batch.training and not recomputed:
            batch.interior[m, k] = y
        if m == 0:
            batch.wanted[k] = [part.requires_grad for part in as_tuple(y)]
        sent = [part.detach().requires_grad_(wanted) for part, wanted in zip(as_tuple(y), batch.wanted[k])]
        return tuple(sent) if isinstance(y, tuple) else sent[0]

    def do_loss(self, m, k, _, batch):
        """L: the loss of the gathered mini-batch (G6); its gradient returns in pieces, the last one first."""
        pieces = [self.forward_channels[k + 1].get() for _ in range(batch.M)]
        y = map_tensors(lambda part: part.detach().requires_grad_(part.is_floating_point()), gather(pieces))
        value = batch.loss_fn(y)
        value.backward()
        batch.loss = value.detach()
        batch.output = map_tensors(torch.Tensor.detach, y)
        gradients = map_tensors(lambda part: torch.zeros_like(part) if part.grad is None else part.grad, y)
        for gradient in reversed(split_like(gradients, pieces)):
            self.backward_channels[k + 1].put(gradient)

    def do_recompute(self, m, k, _, batch):
        """R: the interior again, from the stashed input (Sec. 2.3)."""
        batch.interior[m, k] = self.run_stage(m, k, batch.stash[m, k], batch, recompute=True)

    def do_backward(self, m, k, gradients, batch):
        """B (G7). Gradients add up in the schedule's order (G8), bitwise the same for every K.

        Every task has its own graph: torch runs the backward of one graph in one thread on the CPU.
        """
        x = batch.stash.pop((m, k))
        y = batch.interior.pop((m, k))
        pairs = zip(as_tuple(y), as_tuple(gradients))
        pairs = [(part, grad) for part, grad in pairs if part.requires_grad and grad is not None]
        torch.autograd.backward([part for part, _ in pairs], [grad for _, grad in pairs])
        return map_tensors(lambda part: part.grad, x)

    def run_stage(self, m, k, x, batch, recompute=False):
        """Stage k's layers in turn (G1)."""
        versions = [part._version for part in as_tuple(x)]
        y = x
        with torch.autocast(*batch.autocast, cache_enabled=False):
            for i in range(self.first_layer[k], self.first_layer[k + 1]):
                y = self.run_layer(m, k, i, y, batch, recompute)
        # Else the interior would be recomputed from another input: wrong gradients, without a word.
        unchanged = versions == [part._version for part in as_tuple(x)]
        common.require(unchanged, f"stage {k} changes its input in place")
        return require_tensors(y, f"{self.name_layer(k, i)} returns")

    def run_layer(self, m, k, i, x, batch, recompute):
        """Layer i, with draws of (seed, step, micro-batch, layer).

        They know neither K nor timing, and come again when the layer is recomputed.
        """
        name = f"layer {i} micro-batch {m + common.rank() * batch.M}"
        thread_local.generator = common.make_generator(self.seed, batch.number, name, self.devices[k])
        thread_local.recompute = recompute
        thread_local.layer = self.name_layer(k, i)
        watched = m in batch.recomputed and not recompute
        before = torch.get_rng_state() if watched else None
        try:
            y = self.model[i](x)
        finally:
            thread_local.__dict__.clear()   # the defaults in its class hold again
        # The probe has seen one micro-batch: a layer may begin to draw later. All threads share the
        # generator, so the one that draws may be another stage's.
        same = before is None or torch.equal(before, torch.get_rng_state())
        about = f"{self.name_layer(k, i)}, or one that runs beside it,"
        common.require(same, f"{about} draws torch's random numbers, and would draw others when recomputed: "
                       'use gpipe.stage_dropout, or checkpoint "never"')
        return y

    def name_layer(self, k, i):
        """For messages."""
        return f"stage {k}, layer {i} ({type(self.model[i]).__name__})"

    def now(self, k):
        """A moment on stage k: seconds on the CPU, an event of its compute stream on CUDA."""
        stream = self.compute_streams[k]
        if stream is None:
            return time.perf_counter()
        return stream.record_event(torch.cuda.Event(enable_timing=True))

    @torch.no_grad()
    def probe(self, x, batch):
        """Run all layers once on a micro-batch; UserError names one whose training has side effects.

        Buffers get their values back.
        """
        x = map_tensors(torch.clone, x)
        for k, device in enumerate(self.devices):
            x = map_tensors(lambda part: part.to(device), x)
            for i, layer in enumerate(self.stages[k], self.first_layer[k]):
                copies = [(buffer, buffer.clone()) for buffer in layer.buffers()]
                before = side_effects(layer, device)
                with torch.autocast(*batch.autocast, cache_enabled=False):
                    x = self.run_layer(0, k, i, x, batch, recompute=True)
                after = side_effects(layer, device)
                for buffer, values in copies:
                    buffer.copy_(values)
                moved = ", ".join(name for name in before if before[name] != after[name])
                common.require(not moved, f"{self.name_layer(k, i)}: forward changes {moved} in training, "
                               "recomputation again: use gpipe.stage_dropout and gpipe.BatchNorm, or "
                               'checkpoint "never"')
            require_tensors(x, f"{self.name_layer(k, i)} returns")
        self.probed = True


def side_effects(layer, device):
    """What a forward pass must leave as it is, {name: something to compare}."""
    state = {name: weight._version for name, weight in layer.named_parameters()}
    state |= {name: (id(buffer), str(buffer.tolist())) for name, buffer in layer.named_buffers()}
    state["Python's random numbers"] = random.getstate()
    state["NumPy's random numbers"] = str([np.array(part).tolist() for part in np.random.get_state()])
    state["torch's random numbers"] = torch.get_rng_state().tolist()
    if device.type == "cuda":
        state["CUDA's random numbers"] = torch.cuda.get_rng_state(device).tolist()
    return state


# G10  idle share of K equal stages: (K - 1) / (M + K - 1)       the bubble, without recomputation, Sec. 2.3

def bubble(K, M):
    """G10, without the paper's O(.): at M = 4 K, "negligible" there, 11 % of two stages and 18 % of eight."""
    return (K - 1) / (M + K - 1)


def idle(times, K):
    """(idle share of K stages, makespan) of {task: (start, end)}."""
    span = max(end for _, end in times.values()) - min(start for start, _ in times.values())
    busy = sum(end - start for start, end in times.values())
    return 1 - busy / (K * span), span


# G12  speed-up: M sum_k C_k / (sum_k C_k + (M - 1) max_k C_k)       of unequal stages (derived)

def speed_up(loads, M):
    """G12: a micro-batch crosses all stages, the others follow at the pace of the slowest."""
    return M * sum(loads) / (sum(loads) + (M - 1) * max(loads))


def by_stage(rows, sizes):
    """The rows of each stage's layers."""
    ends = np.cumsum(sizes)
    return [rows[end - size:end] for size, end in zip(sizes, ends)]


def profile(model, inputs):
    """A row a layer, for one micro-batch, by shapes alone (meta device).

    "flops" of a forward pass, "params", bytes of its "input" and those "kept" for backward. Attention keeps
    its N x S matrices here, as in the paper's time; where torch runs a fused kernel, an upper bound.
    """
    x = map_tensors(lambda part: part.to("meta"), inputs)
    rows = []
    for layer in copy.deepcopy(model).to("meta"):
        row, x = profile_layer(layer, x)
        rows.append(row)
    return rows


def profile_layer(layer, x):
    """(row, output) of one layer on the meta device."""
    x = map_tensors(lambda part: part.detach().requires_grad_(part.is_floating_point()), x)
    saved = {}                              # by storage, for views share one

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    # torch shows every tensor that it keeps for backward to `keep`
    outputs = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        flops = common.flops(lambda: outputs.append(layer(x)))
    weights = {weight.untyped_storage()._cdata: weight.numel() for weight in layer.parameters()}
    kept = sum(storage.nbytes() for key, storage in saved.items() if key not in weights)
    entry = sum(part.nbytes for part in as_tuple(x))
    return dict(flops=flops, params=sum(weights.values()), input=entry, kept=kept), outputs[0]


def footprint(rows, sizes, M, mode):
    """(bytes of parameters, peak bytes of activations) of every stage, from the rows of `profile` (G9).

    12 bytes a parameter, as Table 1; we read them as weight, gradient, RMSProp's accumulator.
    """
    interiors = M if mode == "never" else 1
    stages = []
    for stage in by_stage(rows, sizes):
        interior = sum(row["kept"] for row in stage)
        params = sum(row["params"] for row in stage)
        stages.append((12 * params, M * stage[0]["input"] + interiors * interior))
    return stages


# --- Training ----------------------------------------------------------------

# Sec. 4: the ImageNet run has the AmoebaNet paper's optimizer, lr times 0.97 every 2 epochs. Its batch, steps
# and M are not stated: 128, 100,000 and 32, as in Tables 2 and 3, are our choice.
AMOEBA = dict(model="amoebanet-d", data="folder:imagenet", size=224, classes=1000, decay=20_000, dropout=0.5,
              micro=32)
IMAGES = dict(model="amoebanet-d", data="shapes", lr=0.01, bn_momentum=0.1)     # our choice
LM = dict(model="lm", classes=32_000, width=2048, heads=32, batch=32, micro=32)
# lingvo's lr of a language model: 0.5 D^-0.5 min((s + 1) 40000^-1.5, (s + 1)^-0.5) at step s. M: 4 K, K = 16
PAIRS = dict(data="tsv:pairs.tsv", classes=64_000, lr=7.8125e-5, warmup=40_000, dropout=0.1, micro=64)
PRESETS = {
    "demo": dict(layers=2, width=96, hidden=192, heads=2, steps=450, batch=192, lr=3e-3, warmup=60,
                 cooldown=0.5, stages=2, micro=4),
    "demo-images": IMAGES | dict(size=16, layers=3, width=16, steps=200, batch=64, cooldown=0.5, stages=2),
    "small": IMAGES | dict(data="cifar10", layers=6, width=64, steps=20_000, cooldown=0.9),     # not yet run
    "AmoebaNet-B-18-512": AMOEBA | dict(model="amoebanet-b", layers=18, width=512, size=480, stages=4),
}
# Tables 1 to 3, on the paper's K stages; 0: on any number.
PRESETS |= {f"AmoebaNet-D-{L}-{D}": AMOEBA | dict(layers=L, width=D, stages=K) for L, D, K in (
    (18, 208, 0), (18, 416, 0), (18, 544, 2), (36, 544, 4), (72, 512, 8), (18, 256, 0), (18, 128, 0))}
# Their counts are a language model's, though Sec. 3 says sequence to sequence.
PRESETS |= {f"Transformer-{L}": LM | dict(layers=L, stages=K) for L, K in (
    (3, 0), (13, 0), (24, 0), (48, 0), (103, 8), (415, 32), (1663, 128))}
# Sec. 5
PRESETS |= {f"T-{L}-{H}-{A}": PAIRS | dict(layers=L, hidden=H, heads=A, stages=K) for L, H, A, K in (
    (6, 8192, 16, 0), (24, 8192, 16, 4), (12, 16384, 32, 2), (32, 16384, 32, 8), (64, 16384, 32, 16))}
TARGETS = {"demo": 0.945}                   # mean - 4 s.d. of seeds 0 to 4: .960, .961, .964, .971, .968


class Samples(NamedTuple):
    """One step's samples of this replica."""

    inputs: object          # images (B, C, h, w), or ids of (source, target without its end)
    target: torch.Tensor    # labels (B), or ids of the target without its start (B, N), -100 for padding
    total: float            # the targets that count: the loss is their mean

    def loss(self, output):
        """Their loss (G6), where the output is."""
        return loss(output, self.target.to(output.device), self.total)


# G13  p_d ~ n_d^(1 / T)       temperature-based sampling: how often direction d of n_d pairs is drawn, Sec. 5

def pair_weights(dataset, cfg):
    """How often each sentence pair is drawn (G13), (pairs), for `draw`; images have no weights: None."""
    if cfg.model != "translate":
        return None
    # n_d^(1/T) is shared by the n_d pairs. 1/T = 0.7 is multilingual BERT's, the paper's T unknown.
    n = torch.as_tensor(np.bincount(dataset.direction)).double()                            # (directions)
    return n[dataset.direction] ** (1 / cfg.temperature - 1)                                # (pairs)


def draw(dataset, weights, cfg, step, device="cpu"):
    """A step's Samples, drawn for the global mini-batch: sentence pairs by their weights, or images.

    Images are mirrored at random, on the device.
    """
    generator = common.make_generator(cfg.seed, step, "data")
    if cfg.model != "translate":
        index = torch.randint(len(dataset), (cfg.batch,), generator=generator)
        flip = torch.rand(cfg.batch, 1, 1, 1, generator=generator) < 0.5                    # (B, 1, 1, 1)
        index = common.shard(index).numpy()
        x = dataset.pixels(index, device)                                                   # (B, C, h, w)
        x = torch.where(common.shard(flip).to(device), x.flip(-1), x)                       # (B, C, h, w)
        return Samples(x, torch.as_tensor(dataset.labels[index]), len(index))
    index = torch.multinomial(weights, cfg.batch, replacement=True, generator=generator).numpy()
    source = torch.as_tensor(dataset.source[index])                                                # (B, S)
    ids = torch.as_tensor(dataset.target[index])                                                 # (B, N+1)
    target = torch.where(ids == PAD, -100, ids)[:, 1:]                                             # (B, N)
    total = int((target != -100).sum()) / common.world()        # a token counts alike in all replicas
    return Samples((common.shard(source), common.shard(ids[:, :-1])), common.shard(target), total)


def learning_rate(cfg, step):
    """Rise, then the AmoebaNet paper's exponential fall or lingvo's inverse square root; our cooldown."""
    rise = (step + 1) / max(1, cfg.warmup)
    left = (cfg.steps - step) / max(1, cfg.steps * cfg.cooldown)
    fall = 1.0
    if cfg.decay:
        fall = 0.97 ** (step / cfg.decay)
    elif cfg.warmup:
        fall = rise ** -0.5
    return cfg.lr * min(1.0, rise, fall, 0.02 + 0.98 * left)


def optimizer(model, cfg):
    """Sec. 4: RMSProp. For translation the paper names none.

    Official code differs: TensorFlow divides by sqrt(v + eps), torch by sqrt(v) + eps, which at small v makes
    a step up to 3.2 times as long.
    """
    if cfg.model == "translate":
        return torch.optim.Adam(model.parameters(), cfg.lr, betas=(0.9, 0.997), eps=1e-9)       # lingvo's
    return torch.optim.RMSprop(model.parameters(), cfg.lr, alpha=0.9, eps=0.1, weight_decay=4e-5)


def build(cfg, V):
    """The model for V tokens or classes."""
    if cfg.model in ("translate", "lm"):
        return transformer(cfg.layers, cfg.hidden, cfg.heads, V, cfg.width, cfg.model == "translate",
                           cfg.dropout, cfg.clip, cfg.scaled)
    stem = "wide" if cfg.model == "amoebanet-d" else "tpu"
    if cfg.size < 64:
        stem = "small"
    model = amoebanet(cfg.model[-1], cfg.layers, cfg.width, V, stem, cfg.dropout)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.momentum = cfg.bn_momentum
    return model


def example(cfg):
    """A micro-batch of zeros, from which costs are read."""
    n = max(1, cfg.batch // cfg.micro // common.world())
    if cfg.model == "translate":
        ids = torch.zeros(n, 16, dtype=torch.long)                                                # (B, 16)
        return ids, ids
    if cfg.model == "lm":
        return torch.zeros(n, 1024, dtype=torch.long)           # Table 1's length              # (B, 1024)
    return torch.zeros(n, 3, cfg.size, cfg.size)                                            # (B, 3, h, w)


def stage_devices(cfg):
    """One device a stage: those named, else --gpus GPUs of this replica in turn, else the CPU."""
    gpus = 0 if cfg.device == "cpu" else torch.cuda.device_count()
    found = [name.strip() for name in cfg.devices.split(",")] if cfg.devices else []
    K = cfg.stages or len(found) or cfg.gpus
    if not found and gpus == 0:
        found = ["cpu"] * K
    elif not found:
        first = int(os.environ.get("LOCAL_RANK", 0)) * cfg.gpus     # torchrun: a replica drives the next GPUs
        found = [f"cuda:{first + k * cfg.gpus // K}" for k in range(K)]
    known = ["cpu", *(f"cuda:{i}" for i in range(gpus))]
    fits = len(found) >= K and set(found) <= set(known)
    common.require(fits, f"--devices {','.join(found)}: {K} are needed, one a stage, of {', '.join(known)}")
    return found[:K]


def stage_sizes(cfg, model, K, rows=None):
    """Layers of each of K stages: by hand, or by a partition of FLOPs, parameters or seconds (G3).

    rows: those of `profile`, if they are there already.
    """
    by_hand = parse_balance(cfg.balance)
    if by_hand:
        return by_hand
    if cfg.balance == "time":
        costs = layer_seconds(cfg, model)
    else:
        costs = [row[cfg.balance] for row in rows or profile(model, example(cfg))]
    return partition(costs, K, cfg.goal)


def layer_seconds(cfg, model):
    """Seconds that F and B of every layer take: every layer is a stage of one device."""
    L = len(model)
    pipe = Pipeline(copy.deepcopy(model), [1] * L, stage_devices(cfg)[:1] * L)
    for _ in range(3):                                          # the last step counts
        pipe.step(example(cfg), lambda output: output.square().mean())
    seconds = {task: end - start for task, (start, end) in pipe.minibatch.times.items()}
    return [seconds["F", 0, k] + seconds["B", 0, k] for k in range(L)]


def build_pipeline(cfg, model):
    """The model on its stages."""
    torch.set_num_threads(1)                # inside a stage, so that no number depends on K
    devices = stage_devices(cfg)
    sizes = stage_sizes(cfg, model, len(devices))
    if common.world() > 1:
        torch.distributed.broadcast_object_list(sizes)          # each replica has timed its layers itself
    if common.rank() == 0:
        N = cfg.batch // common.world()
        print(f"{len(sizes)} stages of {sizes} layers on {', '.join(devices)}; {N} samples in "
              f"{min(cfg.micro, N)} micro-batches", flush=True)
    return Pipeline(model, sizes, devices, cfg.micro, cfg.checkpoint, cfg.seed)


def train(cfg):
    """Train through the pipeline, answer the test split; returns the exit code (1: the target is missed)."""
    dataset = open_split(cfg, "train")
    run = common.Run(cfg, classes=class_names(cfg, dataset))
    run.seed_weights()
    model = build(cfg, count_classes(cfg, dataset))
    pipe = build_pipeline(cfg, model)
    opt = optimizer(model, cfg)
    start = run.restore(model=model, opt=opt)
    common.compile_blocks(cfg, model)
    weights = pair_weights(dataset, cfg)
    device = pipe.devices[0]
    read = common.read_ahead(lambda step: draw(dataset, weights, cfg, step, device), device, run.total)
    for step in run.steps(start):
        samples = read(step)
        common.set_learning_rate(opt, learning_rate(cfg, step))
        opt.zero_grad()
        with common.autocast(cfg):
            value, _, _ = pipe.step(samples.inputs, samples.loss, step)
        for stage in pipe.stages:           # over the replicas; a stage at a time, for it has one device
            common.average_gradients(stage.parameters())
        opt.step()
        run.log(step, loss=value)
        if run.due(step, cfg.save) and common.rank() == 0:
            draw_timeline(run.folder / "timeline.svg", pipe.minibatch, len(pipe.stages))
        run.save(step)
    if common.rank() > 0:
        return 0
    right = answer(pipe, cfg, open_split(cfg, "test"), run.classes, run.folder)
    if cfg.preset not in TARGETS or not common.is_preset(cfg, PRESETS):
        return 0
    print(f"right answers to all: {right:.3f}, target {TARGETS[cfg.preset]}")
    return int(right < TARGETS[cfg.preset] and common.Run.trained)


# --- Checks ------------------------------------------------------------------


def check(cfg):
    """Every mistake that can be seen without the data; ranges of single fields stand in their comments."""
    require = common.require
    if cfg.model.startswith("amoebanet"):
        require(cfg.layers % 3 == 0, f"--layers {cfg.layers}: must be a multiple of 3: three equal stacks")
        require(cfg.width % 4 == 0, f"--width {cfg.width}: must be a multiple of 4")
    else:
        require(cfg.width % 2 == 0, f"--width {cfg.width}: must be a multiple of 2")
    trains = not cfg.plan and cfg.emulate == 0
    if trains:
        check_data(cfg)
    K = len(stage_devices(cfg))
    with torch.device("meta"):
        L = len(build(cfg, 1))
    require(K <= L, f"--stages {K}: this model is a sequence of {L} layers; ask for {L} at most")
    require(cfg.gpus <= K, f"--gpus {cfg.gpus}: {K} stages leave some idle; add --stages {cfg.gpus}")
    sizes = parse_balance(cfg.balance)
    if sizes:
        fits = len(sizes) == K and sum(sizes) == L and min(sizes) > 0
        require(fits, f"--balance {cfg.balance}: must be {K} numbers above 0 that sum to {L} layers")
    else:
        words = ("flops", "params", "time") if trains else ("flops", "params")
        require(cfg.balance in words, f"--balance {cfg.balance}: give {', '.join(words)} or, by hand, 3,2,4")


def check_data(cfg):
    """The data set must be of the model's kind."""
    kind, _, rest = cfg.data.partition(":")
    require = common.require
    require(cfg.model != "lm", "--model lm: Table 1's language model is there to --plan or --emulate")
    if cfg.model == "translate":
        require(kind in ("numbers", "tsv"), f"--data {cfg.data}: sentence pairs are numbers or tsv:PATH")
    else:
        kinds = ("shapes", "cifar10", "npz", "folder", "video")
        require(kind in kinds, f"--data {cfg.data}: AmoebaNet reads {', '.join(kinds)}")


def parse_balance(text):
    """[3, 2, 4] of "3,2,4"; None of anything else."""
    if re.fullmatch("[0-9]{1,6}(,[0-9]{1,6})*", text):
        return [int(number) for number in text.split(",")]
    return None


def open_split(cfg, split):
    """Sentence pairs (data.Pairs) or images (data.Data) of the 'train' or 'test' split."""
    kind, _, rest = cfg.data.partition(":")
    if kind == "numbers":
        return data.translation_pairs(split, tests=10, limit=data.parse_limit(rest))
    if kind == "tsv":
        common.require(rest, f"--data {cfg.data}: give a file, as tsv:pairs.tsv")
        return data.translation_pairs(split, tests=10, path=rest)
    return data.open_data(cfg.data, split, size=cfg.size)


def class_names(cfg, dataset):
    """Names of an image's classes; sentence pairs have none."""
    return [] if cfg.model == "translate" else [str(name) for name in dataset.classes]


def count_classes(cfg, dataset):
    """V: the words of sentence pairs, or the classes of images."""
    V = len(dataset.vocabulary.words) if cfg.model == "translate" else len(dataset.classes)
    common.require(cfg.classes in (0, V), f"--classes {cfg.classes}: {cfg.data} has {V}")
    return V


def prepare(cfg):
    """Once, before all else: whether the model fits into memory; downloads and packing of both splits."""
    if cfg.plan or cfg.emulate:
        return
    if len(set(stage_devices(cfg))) == 1:
        # weight, gradient, RMSProp's accumulator (Adam has two)
        common.require_memory(cfg, lambda: build(cfg, cfg.classes or 1), copies=3)
    splits = {split: open_split(cfg, split) for split in ("train", "test")}
    count_classes(cfg, splits["train"])
    print(data.describe(splits), flush=True)


# --- Command line ------------------------------------------------------------


def translate(pipe, test):
    """(group, answer, right answer) of every test sentence, by greedy decoding."""
    for index in np.array_split(np.arange(len(test.source)), math.ceil(len(test.source) / 500)):
        source = torch.as_tensor(test.source[index])
        found = torch.full((len(index), 1), START)
        for _ in range(test.target.shape[1]):
            logits = pipe.infer((source, found))
            found = torch.cat([found, logits[:, -1:].argmax(-1).cpu()], 1)
            if (found == END).any(1).all():
                break
        for row, ids in zip(index, found):
            _, language = test.directions[test.direction[row]]
            decode = test.vocabulary.decode
            yield f"to {language}", decode(ids), decode(test.target[row])


def classify(pipe, test, classes, count=1000):
    """(group, answer, right answer) of the first test images. classes: names of the model's outputs."""
    count = min(count, len(test.labels))
    for index in np.array_split(np.arange(count), math.ceil(count / 500)):
        found = pipe.infer(test.pixels(index, pipe.devices[0])).argmax(1)
        for row, label in zip(index, found):
            wanted = str(test.classes[test.labels[row]])
            yield wanted, classes[label], wanted


def answer(pipe, cfg, test, classes, folder):
    """Answer the test split into folder/predictions.txt; returns the share of right answers."""
    rows = translate(pipe, test) if cfg.model == "translate" else classify(pipe, test, classes)
    lines = []
    right = {}                              # group: whether each of its answers is right
    for group, found, wanted in rows:
        lines.append(f"{group}: {found}" if found == wanted else f"{group}: {found} (wrong: {wanted})")
        for name in {group, "all"}:
            right.setdefault(name, []).append(found == wanted)
    path = folder / "predictions.txt"
    common.write_atomic(path, lambda file: file.write("\n".join(lines).encode()))
    shares = {name: np.mean(right[name]) for name in sorted(right)}
    parts = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
    print(f"right answers: {parts}; {path}", flush=True)
    return shares["all"]


def sample(cfg):
    """--sample: answer the test split with a checkpoint."""
    test = open_split(cfg, "test")
    saved = common.read_checkpoint(cfg.sample, "gpipe")
    classes = saved["classes"] or class_names(cfg, test)
    V = len(classes) if classes else count_classes(cfg, test)
    model = build(cfg, V)
    common.load_into({"model": model}, saved, cfg.sample)
    answer(build_pipeline(cfg, model), cfg, test, classes, common.sample_folder(cfg))


def draw_timeline(path, batch, K):
    """Write a mini-batch as an SVG: a row a stage, a box a task, grey is idle; returns that share."""
    names = {"F": "F forward", "R": "R recompute", "B": "B backward", "L": "L loss"}
    colors = dict(zip(names, common.COLORS))
    share, span = idle(batch.times, K)
    zero = min(start for start, _ in batch.times.values())
    scale = 860 / span                      # pixels a second
    title = f"K = {K}, M = {batch.M}: {span:.3g} s, idle {share:.1%}"
    title += f"; bubble of equal stages {bubble(K, batch.M):.1%}"
    parts = [common.svg_text(480, 24, title, extra='font-weight="bold"')]
    for k in range(K):
        parts.append(box(0, k, 860, "#ddd"))
        parts.append(common.svg_text(62, 56 + 30 * k, f"stage {k}", "end"))
    for (kind, m, k), (start, end) in batch.times.items():
        x = scale * (start - zero)
        width = scale * (end - start)
        parts.append(box(x, k, width, colors[kind]))
        if width > 16:
            parts.append(common.svg_text(70 + x + width / 2, 56 + 30 * k, f"{kind}{m}", extra='fill="white"'))
    for i, kind in enumerate(names):
        parts.append(common.svg_text(120 + 130 * i, 60 + 30 * K, names[kind], extra=f'fill="{colors[kind]}"'))
    common.svg(path, 960, 80 + 30 * K, parts)
    return share


def box(x, k, width, color):
    """An SVG rectangle in the row of stage k."""
    return f'<rect x="{70 + x:.1f}" y="{40 + 30 * k}" width="{width:.1f}" height="24" fill="{color}"/>'


class EmulatedPipeline(Pipeline):
    """Stages that sleep for `seconds` each in place of a forward pass, and twice as long for a backward."""

    def __init__(self, seconds, M, mode):
        K = len(seconds)
        super().__init__(nn.Sequential(*(nn.Identity() for _ in seconds)), [1] * K, ["cpu"] * K, M, mode)
        self.seconds = seconds

    def run_stage(self, m, k, x, batch, recompute=False):
        time.sleep(self.seconds[k])
        return map_tensors(torch.clone, x)

    def do_backward(self, m, k, gradients, batch):
        time.sleep(2 * self.seconds[k])
        return super().do_backward(m, k, gradients, batch)


def plan_memory(cfg):
    """--plan: memory, traffic and speed-up by shapes alone. --emulate: also a pipeline of sleeping stages."""
    with torch.device("meta"):
        model = build(cfg, cfg.classes or 1000)
        rows = profile(model, example(cfg))
    M = cfg.micro
    K = len(stage_devices(cfg))
    sizes = stage_sizes(cfg, model, K, rows)
    loads = [sum(row["flops"] for row in stage) for stage in by_stage(rows, sizes)]
    # what enters a stage from the one before it; as much returns as its gradient
    sent = sum(2 * M * stage[0]["input"] for stage in by_stage(rows, sizes)[1:])
    print(f"{sum(row['params'] for row in rows):,} parameters, {len(rows)} layers, N = {cfg.batch}, "
          f"{sent / 2**30:.2f} GiB a step between stages\n"
          f"K = {K}, M = {M}: bubble of equal stages {bubble(K, M):.1%}, "
          f"speed-up of these {speed_up(loads, M):.2f}, both without recomputation")
    for k, (weights, activations) in enumerate(footprint(rows, sizes, M, cfg.checkpoint)):
        print(f"stage {k}: {sizes[k]} layers, {weights / 2**30:.2f} GiB of weights, "
              f"{activations / 2**30:.2f} of activations")
    if cfg.emulate:
        pipe = EmulatedPipeline([cfg.emulate * K * load / sum(loads) for load in loads], M, cfg.checkpoint)
        pipe.step(torch.zeros(cfg.batch, 1, requires_grad=True), torch.sum)
        path = common.folder(cfg) / "emulated.svg"              # a run of this name keeps its own
        share = draw_timeline(path, pipe.minibatch, K)
        # the speed-up over one device that recomputes as much
        print(f"emulated: idle {share:.1%}, speed-up {K * (1 - share):.2f} of F, R and B; {path}")


def main(cfg):
    """Plan, emulate, answer with a checkpoint, or train; returns the exit code, None for 0."""
    if cfg.plan or cfg.emulate:
        return plan_memory(cfg)
    if cfg.sample:
        return sample(cfg)
    return train(cfg)


if __name__ == "__main__":
    common.launch(main, common.cli(Config, PRESETS, __doc__), check, prepare, processes=1)
