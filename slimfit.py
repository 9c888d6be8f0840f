"""SlimFit: Memory-Efficient Fine-Tuning of Transformer-based Models Using Training Dynamics, arXiv 2305.18513

Fine-tuning memory is mostly what the forward pass saves for the backward pass. A frozen weight needs no saved
input (dx = g W), so all but k weight tensors are frozen, anew at every step: those train that moved most when
they last trained. What the gradient needs anyway is stored in 8 or 4 bits or pruned; forward stays exact.

    slots, k of them lit    [ ] [#] [ ] [ ] [#] [ ] [ ] [ ] [#] [ ]     slot: a tensor's input; lit: it trains
    over a static floor     [ q k v: int8 | softmax: uint8 | GELU input: 4 bits | a tenth of LayerNorm's y ]

Run:      python slimfit.py     demo: rate 0.75: accuracy .905 +- .017, 5.4 MB saved; in full .96, 13.1; 160 s
          python slimfit.py --preset imagenet --plan        memory of any model and batch, without running
          python slimfit.py --preset mrpc --weights bert-base-cased --data glue:MRPC:glue
          python slimfit.py --sample runs/slimfit/demo/rate-0.75.pt       evaluate a checkpoint
Faithful: operators, formats, scheduling, AdamW, runs as in the authors' code; departures are marked. (Of the
          paper we read the abstract alone; S1 to S15 are ours.) Scaled: the demo. Left out: RandAugment.
Letters:  B batch, T tokens, d width, H heads, e = d/H, K outputs, N = B T d, S = B H T^2, g arriving gradient
CUDA:     never run on CUDA. Read in this order: Dense8 to SoftmaxValue, Block, Scheduler, activation_rows.
"""

import functools
import math
import re
import time
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import common  # before torch: it says how torch's threads wait
import data

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# --- Configuration -----------------------------------------------------------

@dataclass
class Config:
    preset: str = "demo"                             # where the values below start from
    data: str = "shapes"                             # shapes cifar10 npz:P folder:P glue:TASK:P squad:P
    weights: str = ""                                # pre-trained: folder or file; vocabulary beside it
    family: Literal["vit", "bert"] = "bert"          # pre-norm on pixels, or post-norm on words
    target: Literal["class", "score", "span"] = "class"    # what the head gives: score STS-B, span SQuAD
    classes: int = 2                                 # >= 1: outputs K of the head
    depth: int = 12                                  # in [1, 1000]: blocks
    width: int = 768                                 # >= 1: width d
    heads: int = 12                                  # >= 1: attention heads H
    eps: float = 1e-12                               # > 0: epsilon of every LayerNorm
    image: int = 224                                 # >= 1: side of the pictures; others are resized
    patch: int = 16                                  # >= 1: side of a patch
    pixels: Literal["half", "imagenet"] = "half"     # mean, deviation: .5, .5 (CIFAR: a guess), or ImageNet's
    scaled: bool = False                             # LayerScale gains behind both branches (DINOv2)
    words: int = 28996                               # >= 1: vocabulary size
    cased: bool = False                              # case counts; the tokenizer's own files overrule
    positions: int = 512                             # >= 1: rows of the position table of texts
    length: int = 128                                # >= 1: tokens of a text, padded
    dropout: float = 0.0                             # in [0, 1): branches, embeddings, pooled vector
    attention_dropout: float = 0.0                   # in [0, 1): on V as the authors do; on P in stock
    products: bool = True                            # store q, k, v in int8
    probabilities: bool = True                       # store the softmax output P in uint8
    gelu: bool = True                                # store the GELU input in 4 bits
    mlp: bool = True                                 # store the input of the second MLP matrix in int8
    keep: float = 0.1                                # in (0, 1]: stored share of a frozen LayerNorm's y, S4
    policy: Literal["ils", "random", "last", "progressive", "none"] = "ils"    # who trains, see choose
    rate: float = 0.9                                # in [0, 1): share of the eligible tensors frozen
    freeze_head: bool = False                        # the head may be frozen, too (as in ten scripts)
    adam: Literal["authors", "torch"] = "authors"    # epsilon before or after bias correction
    decay: float = 0.0                               # >= 0: weight decay of matrices
    decay_all: bool = False                          # decay biases and gains, too
    schedule: Literal["linear", "stsb", "vit", "zero"] = "linear"    # of the learning rate, see S13
    pretrain: int = 0                                # >= 0: steps on the first half of the classes, before
    compare: str = ""                                # rates to run beside full fine-tuning, as 0.75,0.9
    full_lr: float = 0.0                             # >= 0: learning rate of that full one; 0: --lr
    plan: bool = False                               # print the memory account and stop
    steps: int = 345                                 # >= 1: optimizer steps
    batch: int = 32                                  # >= 1: samples a step, over all processes
    accumulate: int = 1                              # >= 1: equal parts of a process's batch, in turn
    lr: float = 5e-5                                 # > 0: learning rate
    seed: int = 0                                    # every random number is a function of (seed, step)
    gpus: int = 1                                    # >= 1: processes, one a GPU, or sharing the CPU
    device: str = "auto"                             # auto, cpu or cuda
    bf16: bool = False                               # refused: SlimFit's formats start from fp32
    compile: bool = False                            # refused: torch would compile every set that trains
    name: str = ""                                   # run folder runs/slimfit/NAME; default: the preset
    resume: bool = False                             # go on from the run's checkpoint
    sample: str = ""                                 # checkpoint to evaluate, instead of training
    out: str = ""                                    # folder for what --sample writes; default: beside it
    log: int = 50                                    # >= 1: steps between log lines
    save: int = 1000                                 # >= 1: steps between checkpoints
    sampling: ClassVar = ("data", "weights", "batch")    # what --sample may change

BERT = dict(dropout=0.1, attention_dropout=0.1, decay=0.01, freeze_head=True, cased=True, seed=43)
VIT = dict(family="vit", schedule="vit", freeze_head=True, seed=43)    # both: as the twelve published runs
PRESETS = {
    "demo": dict(family="vit", classes=10, image=16, patch=4, width=64, depth=4, heads=4, pretrain=800,
                 compare="0.5,0.75,0.9", steps=1200, lr=4e-3, full_lr=3e-3, schedule="vit", log=200),
    "small": dict(family="vit", data="cifar10", classes=10, image=98, patch=14, width=384, heads=6,
                  scaled=True, eps=1e-6, pixels="imagenet", lr=1e-4, schedule="vit", steps=4689),
    "cola": dict(BERT, data="glue:CoLA:glue", lr=8e-5, steps=804),
    "mnli": dict(BERT, data="glue:MNLI:glue", lr=4e-5, rate=0.8, steps=36816, classes=3),
    "mrpc": dict(BERT, data="glue:MRPC:glue", lr=1.25e-4, steps=345),
    "qnli": dict(BERT, data="glue:QNLI:glue", lr=5e-5, rate=0.95, steps=9822),
    "qqp": dict(BERT, data="glue:QQP:glue", lr=5e-5, rate=0.8, steps=34113),
    "rte": dict(BERT, data="glue:RTE:glue", lr=1.2e-4, steps=468, batch=16, seed=47),
    "sst2": dict(BERT, data="glue:SST-2:glue", lr=8e-5, rate=0.95, steps=6315, seed=44),
    "stsb": dict(BERT, data="glue:STS-B:glue", lr=8e-5, rate=0.85, steps=540, target="score", classes=1,
                 schedule="stsb", freeze_head=False),
    "squad": dict(BERT, data="squad:squad", lr=1.8e-4, rate=0.8, steps=3057, batch=128, length=384,
                  target="span", words=30522, cased=False, decay_all=True, seed=23),
    "cifar10": dict(VIT, data="cifar10", classes=10, lr=7.5e-5, steps=4689, freeze_head=False),
    "cifar100": dict(VIT, data="npz:cifar100.npz", classes=100, lr=5.5e-5, rate=0.75, steps=4689),
    "imagenet": dict(VIT, data="folder:imagenet", classes=1000, lr=5e-5, rate=0.95, steps=30030, batch=128,
                     image=384, pixels="imagenet", adam="torch", decay=0.01, decay_all=True),
}
TARGET = 0.837      # at rate 0.75, of 2,000 pictures: mean accuracy .905 - 4 s.d. of .017, five seeds

# --- Building blocks ---------------------------------------------------------

# S1  code(x) = clamp(round(x 2^f), -2^(i+f), 2^(i+f) - 1), ties to even;  it stands for code / 2^f
# S2  byte = 16 (a + 8) + (b + 8)        two 4-bit codes: a of a tensor's first half, b of its second half
#
# The backward pass alone reads what is stored. The forward pass goes on with x itself: its output is the
# stock model's, bit for bit. A format is fixed, for any data: (i, f, dtype), i bits before the point, f
# behind it and a sign, kept in dtype.
INT8 = (3, 4, torch.int8)              # q, k, v, input of the second MLP matrix: [-8, 7.9375], step 1/16
UINT8 = (0, 8, torch.uint8)            # softmax output: [0, 255/256], step 1/256; 1 becomes 255/256
INT4 = (2, 1, torch.int8)              # GELU input: [-4, 3.5], step 1/2; pack4 joins them in pairs


def quantise(x, form):
    """The codes of x in a format, S1; same shape."""
    i, f, dtype = form
    code = (x * 2 ** f).round_().clamp_(-(2 ** (i + f)), 2 ** (i + f) - 1)
    # to uint8 by way of int16: torch turns floats into uint8 one by one
    return code.short().to(dtype) if dtype is torch.uint8 else code.to(dtype)


def restore(stored, form, like):
    """The values of codes, in the dtype of `like`; a tensor that was stored as it is comes back as it is."""
    i, f, dtype = form
    return stored.to(like.dtype).mul_(2.0 ** -f) if stored.dtype is dtype else stored


def pack4(x):
    """INT4 codes of x, two a byte, S2: a flat uint8 tensor of half as many elements, rounded up."""
    code = quantise(x, INT4).flatten()                                                  # (n)
    if code.numel() % 2:
        code = F.pad(code, (0, 1))                                                      # (w)
    first, second = code.add_(8).view(torch.uint8).chunk(2)                             # (m), (m)
    return 16 * first + second                                                          # (m)


def unpack4(byte, table, like):
    """What pack4 stored, in the shape of `like`, each code replaced by its entry in a table (2, 256).

    Row 0 of the table has, for every byte, the entry of its first code, and row 1 that of its second.
    """
    index = byte.int()                                                                  # (m)
    both = like.new_empty(2, len(byte))                                                 # (2, m)
    torch.index_select(table[0], 0, index, out=both[0])
    torch.index_select(table[1], 0, index, out=both[1])
    return both.flatten()[:like.numel()].view(like.shape)


def gelu_slopes(dtype=None):
    """GELU' at the 16 values of INT4 as a table for unpack4: looked up, not computed for every element.

    It is off the exact derivative by at most 0.2, near 0, where GELU' is steepest.
    """
    z = torch.arange(-8, 8, dtype=dtype) / 2                                            # (w)
    slope = torch.ops.aten.gelu_backward(torch.ones_like(z), z)                         # (w)
    byte = torch.arange(256)                                                            # (n)
    return torch.stack([slope[byte // 16], slope[byte % 16]])                           # (2, n)


def largest(x, count):
    """The `count` largest magnitudes of the whole tensor, not of each token: values, flat int32 indices.

    In any order. Both become saved tensors, 8 bytes an element.
    """
    flat = x.flatten()                                                                  # (n)
    if x.is_cuda:
        index = flat.abs().topk(count, sorted=False).indices
    else:                                                     # numpy finds the same set 5 times faster
        order = np.argpartition(flat.abs().numpy(), -count)
        index = torch.from_numpy(order[len(flat) - count:])                             # (m)
    return flat[index], index.int()                                                     # (m), (m)


class Dense8(torch.autograd.Function):
    """y = x W^T + b whose input is stored in int8 if W trains, and not at all if W is frozen.

    S3  dx = g W,  db = sum of g;  dW = g^T x  only where W trains, with x as it was stored

    The input is 4 d wide: in int8 it takes 4 N bytes like any other slot, whoever trains.
    """

    @staticmethod
    def forward(ctx, x, W, b):
        ctx.save_for_backward(quantise(x, INT8) if ctx.needs_input_grad[1] else None, W)      # [1]: W trains
        return F.linear(x, W, b)                                                        # (B, T, d)

    @staticmethod
    def backward(ctx, g):
        code, W = ctx.saved_tensors
        rows = g.flatten(0, -2)
        dW = None if code is None else rows.T @ restore(code, INT8, g).flatten(0, -2)
        return g @ W, dW, rows.sum(0)                         # the bias always trains; it needs only g


class Norm(torch.autograd.Function):
    """LayerNorm. If its gain trains, x is stored; if not, 1 / sigma and the largest values of y.

    S4  y = (x - mean(x)) / sigma,  h = g gain;  dx = (h - mean(h) - y mean(h y)) / sigma
        dbias = sum of g;  dgain = sum of g y  only where the gain trains;  means over a token

    With y pruned, the term y mean(h y) is approximate: the error is about 1 / sqrt(d) of dx, 3 % at d = 768.
    Gains stay near 1 and move little, relatively: under ils hardly one trains again after the first sweep.
    """

    @staticmethod
    def forward(ctx, x, gain, bias, eps, keep):
        ctx.eps = eps
        ctx.gain_trains = ctx.needs_input_grad[1]
        y, mu, r = torch.native_layer_norm(x, gain.shape, gain, bias, eps)  # (B, T, d), (B, T, 1), (B, T, 1)
        if ctx.gain_trains:
            ctx.save_for_backward(gain, x)
        else:
            value, index = largest((x - mu).mul_(r), int(keep * x.numel()))             # (m), (m)
            ctx.save_for_backward(gain, r, value, index)
        return y                                                                        # (B, T, d)

    @staticmethod
    def backward(ctx, g):
        if ctx.gain_trains:
            gain, x = ctx.saved_tensors
            # official code differs: it has epsilon 1e-12 here, whatever the forward pass had
            y, _, r = torch.native_layer_norm(x, gain.shape, None, None, ctx.eps)
        else:
            gain, r, value, index = ctx.saved_tensors
            y = g.new_zeros(g.numel()).index_add_(0, index, value).view_as(g)
        # torch's kernel, given y with mean 0 and 1 / sigma = 1, computes sigma dx of S4 in one pass; the
        # second gain stands for the bias, whose values are not read
        dx, dgain, dbias = torch.ops.aten.native_layer_norm_backward(
            g, y, gain.shape, 0 * r, torch.ones_like(r), gain, gain, (True, ctx.gain_trains, True))
        return dx.mul_(r), dgain, dbias, None, None


class Gelu4(torch.autograd.Function):
    """GELU (erf form) that stores its input in 4 bits.

    S5  dx = g (Phi(z) + z phi(z)),  z = the INT4 value of x;  Phi, phi: the normal distribution, its density
    """

    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block                                     # for its table, a constant: no saved tensor
        ctx.save_for_backward(pack4(x))
        return F.gelu(x)                                                                # (B, T, m)

    @staticmethod
    def backward(ctx, g):
        return unpack4(*ctx.saved_tensors, ctx.block.slopes, g).mul_(g), None


class Scores(torch.autograd.Function):
    """Attention scores with both operands stored in int8.

    S6  s = q k^T;  dq = g k,  dk = g^T q,  with q and k as they were stored

    Division by sqrt(e) and the mask follow as ordinary operations, which save nothing.
    """

    @staticmethod
    def forward(ctx, q, k):
        ctx.save_for_backward(quantise(q, INT8), quantise(k, INT8))
        return q @ k.mT                                                                 # (B, H, T, T)

    @staticmethod
    def backward(ctx, g):
        q, k = ctx.saved_tensors
        return g @ restore(k, INT8, g), g.mT @ restore(q, INT8, g)


class SoftmaxValue(torch.autograd.Function):
    """Softmax and the product with V as one node, so that P is stored once, in one byte, not twice in four.

    S7  P = softmax(s),  o = P v;  dv = P^T g,  Z = P (g v^T),  ds = Z - P rowsum(Z),  with P, v as stored

    A row of the stored P sums to 1 within (T + 1) / 512, and so a row of ds nearly to 0.
    """

    @staticmethod
    def forward(ctx, s, v, probabilities, products):
        P = s.softmax(-1)                                                               # (B, H, T, T)
        ctx.save_for_backward(quantise(P, UINT8) if probabilities else P,
                              quantise(v, INT8) if products else v)
        return P @ v                                                                    # (B, H, T, e)

    @staticmethod
    def backward(ctx, g):
        P, v = (restore(stored, form, g) for stored, form in zip(ctx.saved_tensors, (UINT8, INT8)))
        ds = torch._softmax_backward_data(g @ v.mT, P, -1, g.dtype)      # Z - P rowsum(Z), in one pass
        return ds, P.mT @ g, None, None


def dropout(x, p, training):
    """Dropout with a mask of one byte an element on every device (torch's own takes four on CPU).

    The mask is static memory: it carries the gradient down, whoever trains.
    """
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


# --- Model -------------------------------------------------------------------

def layer_norm(norm, x, keep):
    """The LayerNorm module `norm` of x (B, T, d), storing the share `keep` of a frozen one's input.

    The authors keep 0.1. At 1 it is torch's own, which stores x, mean and 1 / sigma.
    """
    return Norm.apply(x, norm.weight, norm.bias, norm.eps, keep) if keep < 1 else norm(x)  # (B, T, d)


class Block(nn.Module):
    """Attention and MLP: post-norm (BERT), or pre-norm with optional LayerScale (ViT).

    Dense layers on d-wide inputs are torch's own, which do S3: they store their input if the weight trains,
    else nothing. Query, key and value share one input: 4 N bytes if any of them trains. With all switches off
    the block is stock torch with explicit attention, the authors' baseline: a fused kernel would save no P.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, d = cfg, cfg.width
        self.query, self.key, self.value, self.out = (nn.Linear(d, d) for _ in range(4))
        self.norm1 = nn.LayerNorm(d, cfg.eps)
        self.norm2 = nn.LayerNorm(d, cfg.eps)
        self.mlp1 = nn.Linear(d, 4 * d)
        self.mlp2 = nn.Linear(4 * d, d)
        self.register_buffer("slopes", gelu_slopes(), persistent=False)
        if cfg.scaled:
            self.scale1 = nn.Parameter(torch.ones(d))
            self.scale2 = nn.Parameter(torch.ones(d))

    def attention(self, x, mask):
        """(B, T, d) -> (B, T, d); the mask (B, 1, 1, T) or None is added to the scores."""
        cfg = self.cfg
        heads = (*x.shape[:2], cfg.heads, -1)
        parts = self.query(x), self.key(x), self.value(x)                               # each (B, T, d)
        q, k, v = (part.view(heads).transpose(1, 2) for part in parts)                  # each (B, H, T, e)
        s = Scores.apply(q, k) if cfg.products else q @ k.mT                            # (B, H, T, T)
        s = s / math.sqrt(q.shape[-1])                                                  # (B, H, T, T)
        s = s if mask is None else s + mask                                             # (B, H, T, T)
        if cfg.products or cfg.probabilities:
            # as the authors: dropout on V, where BERT has it on P; N bytes of mask, not S, and P saved once
            v = dropout(v, cfg.attention_dropout, self.training)                        # (B, H, T, e)
            o = SoftmaxValue.apply(s, v, cfg.probabilities, cfg.products)               # (B, H, T, e)
        else:
            o = dropout(s.softmax(-1), cfg.attention_dropout, self.training) @ v        # (B, H, T, e)
        o = dropout(self.out(o.transpose(1, 2).flatten(2)), cfg.dropout, self.training)  # (B, T, d)
        return o * self.scale1 if cfg.scaled else o                                     # (B, T, d)

    def mlp(self, x):
        """Two matrices with a GELU between them, (B, T, d) -> (B, T, d)."""
        cfg = self.cfg
        z = self.mlp1(x)                                                                # (B, T, 4*d)
        z = Gelu4.apply(z, self) if cfg.gelu else F.gelu(z)                             # (B, T, 4*d)
        z = Dense8.apply(z, self.mlp2.weight, self.mlp2.bias) if cfg.mlp else self.mlp2(z)  # (B, T, d)
        z = dropout(z, cfg.dropout, self.training)                                      # (B, T, d)
        return z * self.scale2 if cfg.scaled else z                                     # (B, T, d)

    def forward(self, x, mask=None):
        """(B, T, d) -> (B, T, d)."""
        keep = self.cfg.keep
        if self.cfg.family == "bert":
            x = layer_norm(self.norm1, x + self.attention(x, mask), keep)               # (B, T, d)
            return layer_norm(self.norm2, x + self.mlp(x), keep)                        # (B, T, d)
        x = x + self.attention(layer_norm(self.norm1, x, keep), mask)                   # (B, T, d)
        return x + self.mlp(layer_norm(self.norm2, x, keep))                            # (B, T, d)


class Bert(nn.Module):
    """Ids, token types and a mask (1 on tokens, 0 on padding), each (B, T) -> logits (B, K).

    The head reads the pooled first token, or, for spans, every token: logits (B, T, K).
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, d = cfg, cfg.width
        self.word = nn.Embedding(cfg.words, d)
        self.position = nn.Embedding(cfg.positions, d)
        self.token_type = nn.Embedding(2, d)
        self.norm = nn.LayerNorm(d, cfg.eps)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        if cfg.target != "span":
            self.pooler = nn.Linear(d, d)
        self.head = nn.Linear(d, cfg.classes)
        initialise(self)

    def forward(self, ids, types, mask):
        cfg = self.cfg
        x = self.word(ids) + self.token_type(types) + self.position.weight[:ids.shape[1]]       # (B, T, d)
        x = dropout(layer_norm(self.norm, x, cfg.keep), cfg.dropout, self.training)     # (B, T, d)
        # added to the scores of padding, whose exp becomes 0
        hide = (1 - mask[:, None, None].to(x.dtype)) * -10_000                          # (B, 1, 1, T)
        for block in self.blocks:
            x = block(x, hide)                                                          # (B, T, d)
        if cfg.target == "span":
            return self.head(x)                                                         # (B, T, K)
        x = dropout(self.pooler(x[:, 0]).tanh(), cfg.dropout, self.training)            # (B, d)
        return self.head(x)                                                             # (B, K)


class ViT(nn.Module):
    """Normalised pixels (B, C, h, w) -> logits (B, K), read from the class token."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, d = cfg, cfg.width
        self.cls = nn.Parameter(torch.empty(1, 1, d))
        self.position = nn.Parameter(torch.empty(1, tokens(cfg), d))
        self.patch = nn.Conv2d(3, d, cfg.patch, cfg.patch)
        self.final = nn.LayerNorm(d, cfg.eps)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.head = nn.Linear(d, cfg.classes)
        initialise(self)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT                                                 # (B, P, d)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position          # (B, P+1, d)
        for block in self.blocks:
            x = block(x)                                                                # (B, P+1, d)
        return self.head(layer_norm(self.final, x, self.cfg.keep)[:, 0])                # (B, K)


def build_model(cfg):
    """The network that a configuration describes."""
    return Bert(cfg) if cfg.family == "bert" else ViT(cfg)


def tokens(cfg):
    """T, the tokens of a sample: a text's length, or the patches of a picture and the class token."""
    return cfg.length if cfg.family == "bert" else (cfg.image // cfg.patch) ** 2 + 1


def initialise(model):
    """A new head is N(0, 0.02) as the authors'; our choice: a new encoder is N(0, 1 / fan-in).

    Biases are 0, gains 1. No eligible tensor starts at 0, by which S11 would divide.
    """
    for name, p in model.named_parameters():
        if name == "head.weight":
            nn.init.normal_(p, std=0.02)
        elif p.ndim == 3:                                     # class token, position table: rows of d
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        elif p.ndim > 1:                                      # matrices, word tables, patch convolution
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


# Names in the usual state dicts (BERT, ViT, DINOv2) -> ours: each pattern is replaced, one after the other.
RENAMES = (
    (r"^(bert|vit|dinov2)\.", ""), (r"^embeddings\.", ""), ("_embeddings", ""), (r"\.projection", ""),
    ("cls_token", "cls"), ("gamma$", "weight"), ("beta$", "bias"),
    ("^LayerNorm", "norm"), ("^layernorm", "final"),          # of BERT's embeddings; the last of a ViT
    (r"^encoder\.layer\.", "blocks."), (r"attention\.(self|attention)\.", ""),
    (r"attention\.output\.dense", "out"), (r"attention\.output\.LayerNorm|layernorm_before", "norm1"),
    (r"intermediate\.dense|mlp\.fc1", "mlp1"), (r"output\.LayerNorm|layernorm_after", "norm2"),
    (r"output\.dense|mlp\.fc2", "mlp2"), (r"layer_scale(\d)\.lambda1", r"scale\1"),
    (r"^pooler\.dense", "pooler"), ("^(classifier|qa_outputs)", "head"))


def our_name(name):
    """A tensor's name in the usual state dicts -> its name here."""
    for pattern, new in RENAMES:
        name = re.sub(pattern, new, name)
    return name


def read_pretrained(path):
    """{our name: tensor} of a file of weights, or of the first one in a folder; nothing is downloaded."""
    return {our_name(name): tensor for name, tensor in common.read_weights(path).items()}


def resize_positions(table, rows):
    """A ViT's position table, 1 + n^2 rows or n^2 without the class token's -> (1, rows, d), bicubically.

    A class token without a row gets zeros: nothing was added to it. UserError where n is no whole number.
    """
    n = math.isqrt(table.shape[1])
    extra = table.shape[1] - n * n                            # 1: the class token's row
    common.require(extra <= 1, f"position has {table.shape[1]} rows, not n^2 or 1 + n^2")
    first = table[:, :1] if extra else torch.zeros_like(table[:, :1])
    grid = table[:, extra:].float().unflatten(1, (n, n)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, math.isqrt(rows - 1), mode="bicubic")
    return torch.cat([first, grid.flatten(2).mT], 1)


@torch.no_grad()
def load_weights(model, state, path):
    """Copy {our name: tensor} into the model; all must fit and be finite, or it is a UserError.

    A head of another shape stays new; so does, aloud, a missing pooler. Our choice: a ViT's position table
    is resized to pictures of another size; the authors' checkpoints have the size of their pictures.
    """
    own = dict(model.named_parameters())
    lost = [name for name in state if name.startswith("blocks.") and name not in own]
    common.require(not lost, f"{path}: {lost[:1]} has no place in this model; see --depth and --scaled")
    if "pooler.weight" in own and "pooler.weight" not in state:
        if common.rank() == 0:
            print(f"{path}: has no pooler; a new one is drawn", flush=True)
        weight = nn.init.normal_(torch.empty_like(own["pooler.weight"]), std=0.02)
        state = {**state, "pooler.weight": weight, "pooler.bias": torch.zeros_like(own["pooler.bias"])}
    for name, p in own.items():
        value = state.get(name)
        if name.startswith("head.") and (value is None or value.shape != p.shape):
            continue
        common.require(value is not None, f"{path}: lacks {name}")
        common.require(value.isfinite().all(), f"{path}: {name} holds NaN or infinity")
        if name == "position" and value.ndim == 3 and value.shape[1] != p.shape[1]:
            value = resize_positions(value, p.shape[1])
        common.require(value.shape == p.shape, f"{path}: {name} is {list(value.shape)}, not {list(p.shape)}")
        p.copy_(value)


# --- Objective ---------------------------------------------------------------

def loss(model, batch):
    """Mean loss of one batch (inputs, labels), by --target; dropout alone is random, see seed_dropout.

    class: cross-entropy. score: squared error. span: cross-entropy over the T tokens for either end, labels
    (B, 2); a label T is ignored: that end lies outside the text.
    """
    inputs, labels = batch
    logits = model(*inputs)
    if model.cfg.target == "score":
        return F.mse_loss(logits[:, 0], labels)
    if model.cfg.target == "span":
        return F.cross_entropy(logits, labels, ignore_index=logits.shape[1])            # T
    return F.cross_entropy(logits, labels)


# --- Scheduling --------------------------------------------------------------

# A "layer" of the paper is one weight tensor. Of a BERT classifier's 201 tensors 102 may be frozen with
# --freeze_head, of which 91 are at rate 0.9; its 99 biases always train. So the gradient goes all the way
# down: freezing spares stored inputs and weight gradients, not the backward pass.


def eligible(model, cfg):
    """{name: tensor} that may be frozen: two or more dimensions, LayerNorm gains and, our choice, LayerScale.

    Not a ViT's last LayerNorm, as in the authors' code, and not a new head unless --freeze_head.
    """
    gains = ("norm.weight", "norm1.weight", "norm2.weight", "scale1", "scale2")
    never = () if cfg.freeze_head else ("head.weight",)
    return {name: p for name, p in model.named_parameters()
            if (p.ndim > 1 or name.endswith(gains)) and name not in never}


def relative_change(old, new, skip_zeros=True):
    """How far a tensor has moved: the mean over its elements, not a ratio of norms (which ranks otherwise).

    S11  D = mean_j |w_j' - w_j| / |w_j|        w' behind the optimizer's step, w before it

    Departure: an element that was 0 counts as 0. In the authors' code (skip_zeros False) it makes D infinite
    if it moves and NaN if not; both sort last, and the tensor trains for ever. Weights from fp16 hold zeros.
    """
    ratio = (new - old).div_(old).abs_()
    return (ratio.nan_to_num_(nan=0, posinf=0) if skip_zeros else ratio).mean()


def choose(policy, distance, k, step, steps, generator):
    """Indices of the k of t tensors that train at a step.

    ils: the largest distances (NaN counts as the largest); random: any; last: those nearest the output;
    progressive: a window that slides from the input to the output; none: nothing is frozen. Our choice: all
    but ils, which alone the authors' code has.
    """
    t = len(distance)
    if policy == "random":
        return torch.randperm(t, generator=generator)[:k]
    if policy == "progressive":
        return torch.arange(k) + round((t - k) * step / max(1, steps - 1))
    order = distance.argsort(stable=True) if policy == "ils" else torch.arange(t)
    return order if policy == "none" else order[t - k:]


class Scheduler:
    """Inter-layer scheduling (ILS): which tensors train at a step, by how far they moved when last trained.

    S12  frozen: the int(rate t) smallest of D_1 ... D_t;  D_i is measured anew where i trained, else kept;
         D_i = 1e20 uniform(0, 1) at the start

    Nothing explores and no distance fades: a frozen tensor has no gradient, does not move, and returns when
    active ones fall below its old value. The same number trains at every step: the memory hardly changes.
    """

    def __init__(self, model, cfg):
        self.cfg = cfg
        self.tensors = eligible(model, cfg)
        t = len(self.tensors)
        self.k = t - int(cfg.rate * t + 1e-9)                 # 0.95 t may come out as an integer minus 1e-15
        # Larger than any distance: the first t / k steps train every tensor once, in random order. From
        # zeros, those that happened to train first would go on for ever. (Authors: 1e7, 1e10 or 1e20.)
        generator = common.make_generator(cfg.seed, 0, "start")
        self.distance = 1e20 * torch.rand(t, generator=generator, dtype=torch.float64)
        self.active = []                                      # indices of those that train
        self.old = []                                         # their weights before the update
        self.history = []                                     # a row of t booleans a step

    def freeze(self, step):
        """Before the forward pass, which decides what it saves: choose who trains, copy their weights.

        The authors copy all eligible weights; but a frozen tensor, whose gradient is None, cannot move.
        """
        cfg = self.cfg
        tensors = list(self.tensors.values())
        generator = common.make_generator(cfg.seed, step, "policy")
        self.active = choose(cfg.policy, self.distance, self.k, step, cfg.steps, generator).tolist()
        trains = torch.zeros(len(tensors), dtype=torch.bool)
        trains[self.active] = True
        for tensor, on in zip(tensors, trains.tolist()):
            tensor.requires_grad_(on)
        if cfg.policy == "ils":
            self.old = [tensors[i].detach().clone() for i in self.active]
        self.history.append(trains)

    def measure(self):
        """After the update: new distances of the active tensors, under ils, which alone has copies."""
        tensors = list(self.tensors.values())
        moved = [relative_change(old, tensors[i].detach()) for i, old in zip(self.active, self.old)]
        if moved:
            self.distance[self.active] = torch.stack(moved).double().cpu()
        self.old = []

    def training(self, model):
        """The names of all parameters that trained at the last step."""
        frozen = {name for name, trained in zip(self.tensors, self.history[-1]) if not trained}
        return {name for name, _ in model.named_parameters()} - frozen

    def state_dict(self):
        return {"distance": self.distance, "history": torch.stack(self.history)}

    def load_state_dict(self, state):
        if not state["distance"].shape == state["history"].shape[1:] == self.distance.shape:
            raise ValueError(f"not of {len(self.tensors)} tensors")
        self.distance = state["distance"].cpu()
        self.history = list(state["history"].cpu())


def learning_rate(cfg, step):
    """The learning rate at a step i from 0 to n - 1: lr times a factor that falls to about 0.

    S13  linear: (n + 1 - i) / (n + 1)   most GLUE scripts;   stsb: (n - i) / n;   vit: (n - i) / (n + 1)
         zero:   0 at i = 0, then (n - i) / (n - 0.1)         CoLA and SQuAD

    zero comes of a "warm-up 0.1", taken as a number of steps: at a first learning rate of 0 the first active
    set moves by 0 and never trains again. Our choice: no preset uses it, so cola and squad have linear.
    """
    n = cfg.steps
    if cfg.schedule == "zero" and step == 0:
        return 0.0
    left = n + 1 - step if cfg.schedule == "linear" else n - step
    whole = {"linear": n + 1, "stsb": n, "vit": n + 1, "zero": n - 0.1}[cfg.schedule]
    return cfg.lr * (left / whole)


class AdamW(torch.optim.Optimizer):
    """The authors' AdamW: epsilon joins sqrt(v) before bias correction, so at the first step it acts as 3e-5.

    S14  m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  s <- s + 1
         w <- w - lr sqrt(1 - b2^s) / (1 - b1^s) m / (sqrt(v) + eps),  then  w <- w - lr decay w

    A tensor without gradient is left alone: no momentum, no decay, no count. Each has a count s of its own:
    some train at every step, others hardly ever.
    """

    def __init__(self, groups, lr, betas=(0.9, 0.999), eps=1e-6):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr = group["lr"]
            b1, b2 = group["betas"]
            params = [p for p in group["params"] if p.grad is not None]
            sizes = []
            for p in params:
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                sizes.append(-lr * math.sqrt(1 - b2 ** state["step"]) / (1 - b1 ** state["step"]))
            if not params:
                continue
            grads = [p.grad for p in params]
            m = [self.state[p]["m"] for p in params]
            v = [self.state[p]["v"] for p in params]
            torch._foreach_lerp_(m, grads, 1 - b1)
            torch._foreach_mul_(v, b2)
            torch._foreach_addcmul_(v, grads, grads, 1 - b2)
            root = torch._foreach_sqrt(v)
            torch._foreach_add_(root, group["eps"])
            torch._foreach_addcdiv_(params, m, root, sizes)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])


def optimizer(model, cfg):
    """AdamW over all parameters: matrices with weight decay, biases and gains without (unless --decay_all).

    Official code differs: by a typing error five GLUE scripts decay the gains, too.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1 or cfg.decay_all]
    spared = [p for p in model.parameters() if p.ndim <= 1 and not cfg.decay_all]
    groups = [{"params": decayed, "weight_decay": cfg.decay}, {"params": spared, "weight_decay": 0.0}]
    if cfg.adam == "torch":
        return torch.optim.AdamW(groups, lr=cfg.lr)
    return AdamW(groups, lr=cfg.lr)


# Bytes saved for the backward pass (a slot is the input of one tensor, lit where the tensor trains):
#
# S8  stock block    64 N + 4 S + 16 B T;  with dropout  66 N + 9 S + 16 B T
# S9  SlimFit block  5 N + S  [with dropout 3 N more]  + 4 N for each lit slot: query, key, value together;
#                    out; mlp1; mlp2;  + each LayerNorm: 4 N if its gain trains, else 8 keep N + 4 B T
# S10  outside       one LayerNorm as in S9  + 4 N where pooler or head trains  + what is small behind them;
#                    those two read a view of one token, which keeps the whole tensor


def activation_rows(cfg, B, active):
    """What B samples save for the backward pass where the parameters of the names `active` train.

    Rows (name, static or dynamic, tensors, bytes a number, numbers a tensor). Counted while the loss is
    alive: each storage once, the blocks' inputs included; not parameters, pixels, ids and labels.
    """

    def lit(*names):
        """In how many blocks one of these tensors trains."""
        return sum(any(f"blocks.{i}.{name}" in active for name in names) for i in range(L))

    L = cfg.depth
    T = tokens(cfg)
    N = B * T * cfg.width
    S = B * cfg.heads * T * T
    texts = cfg.family == "bert"                              # True counts as 1 in what follows, False as 0
    pooled = texts and cfg.target != "span"
    on_v = cfg.products or cfg.probabilities                  # attention dropout acts on V
    pruned = cfg.keep < 1
    masks = int(cfg.dropout > 0)
    attention_masks = L if cfg.attention_dropout > 0 else 0
    head = "head.weight" in active
    norms = 2 * L + 1                                         # with the embeddings' or a ViT's last
    gains = lit("norm1.weight") + lit("norm2.weight") + len({"norm.weight", "final.weight"} & active)
    outputs = {"class": B * cfg.classes + 1, "span": 2 * B * T + 1, "score": B}[cfg.target]
    rows = [
        ("q, k, v", "static", 3 * L, 1 if cfg.products else 4, N),
        ("softmax output", "static", L, 1 if cfg.probabilities else 4, S),
        ("GELU input", "static", L, 0.5 if cfg.gelu else 4, 4 * N),
        ("masks of both branches", "static", 2 * L * masks, 1, N),
        ("mask of v", "static", attention_masks * on_v, 1, N),
        ("mask of softmax output", "static", attention_masks * (1 - on_v), 1, S),
        ("softmax output, masked", "static", attention_masks * (1 - on_v), 4, S),
        ("input of query, key, value", "dynamic", lit("query.weight", "key.weight", "value.weight"), 4, N),
        ("input of out", "dynamic", lit("out.weight"), 4, N),
        ("input of mlp1", "dynamic", lit("mlp1.weight"), 4, N),
        ("input of mlp2", "dynamic", lit("mlp2.weight"), 1 if cfg.mlp else 4, 4 * N),
        ("input of LayerScale", "dynamic", lit("scale1") + lit("scale2"), 4, N),
        ("LayerNorm input", "static", norms * (1 - pruned), 4, N),
        ("LayerNorm mean, 1 / sigma", "static", 2 * norms * (1 - pruned), 4, B * T),
        ("LayerNorm input, gain trains", "dynamic", gains * pruned, 4, N),
        ("LayerNorm values and indices", "static", 2 * (norms - gains) * pruned, 4, int(cfg.keep * N)),
        ("LayerNorm 1 / sigma", "static", (norms - gains) * pruned, 4, B * T),
        ("mask of embeddings", "static", masks * texts, 1, N),
        ("input of pooler", "dynamic", int("pooler.weight" in active), 4, N),
        ("tanh output", "static", int(pooled), 4, B * cfg.width),
        ("mask of tanh output", "static", masks * pooled, 1, B * cfg.width),
        ("input of head, masked", "dynamic", masks * pooled * head, 4, B * cfg.width),
        ("input of head", "dynamic", head * (1 - pooled), 4, N),
        ("loss", "static", 1, 4, outputs),
    ]
    return [row for row in rows if row[2] > 0]


def activation_bytes(cfg, B, active):
    """The sums of activation_rows: {"static": bytes, "dynamic": bytes}."""
    total = {"static": 0, "dynamic": 0}
    for _, kind, count, width, size in activation_rows(cfg, B, active):
        total[kind] += int(count * width * size)
    return total


def saved_bytes(function, given):
    """(function(), bytes that its graph keeps for the backward pass), without the storages of `given`.

    A view keeps its whole storage, ten views of it keep it once, and what the graph has dropped by the end
    does not count; so the figure holds on any device, and no allocator blurs it.
    """
    alive = weakref.WeakSet()                                 # forgets what nothing else holds

    class Saved:
        """Stands in the graph for one saved tensor, and dies with it."""

        def __init__(self, tensor):
            self.tensor = tensor.detach()
            alive.add(self)

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        value = function()
    sizes = {}
    for storage in [saved.tensor.untyped_storage() for saved in alive]:
        sizes[storage.data_ptr()] = storage.nbytes()
    for tensor in given:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return value, sum(sizes.values())


def memory_account(model, cfg, B, active):
    """{kind: bytes} of a step on B samples that trains the parameters `active`; totals without and with Adam.

    Freezing spares activations and gradients. Moments stay for every tensor that ever trained: all, after
    the first sweep. The snapshot holds the old weights of the active tensors.
    """
    size = {name: 4 * p.numel() for name, p in model.named_parameters()}
    copied = eligible(model, cfg).keys() & active if cfg.policy == "ils" else ()
    weights = sum(size.values())
    account = {**activation_bytes(cfg, B, active), "gradients": sum(size[name] for name in active),
               "snapshot": sum(size[name] for name in copied), "weights": weights}
    total = sum(account.values())
    return {**account, "no moments": total, "moments": 2 * weights, "total": total + 2 * weights}


# --- Training ----------------------------------------------------------------

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)       # mean and deviation of its colours in [0, 1]


def stock(cfg):
    """The same model without SlimFit: nothing frozen or compressed, attention dropout on P, its own lr.

    The authors' learning rates are 2 to 9 times the usual 2e-5; full fine-tuning wants a smaller one.
    """
    return replace(cfg, policy="none", products=False, probabilities=False, gelu=False, mlp=False, keep=1.0,
                   lr=cfg.full_lr or cfg.lr)


def at_once(cfg):
    """How many samples are in memory: of a process's share of the batch one of --accumulate's parts."""
    return cfg.batch // common.world() // cfg.accumulate


def fetch(dataset, cfg, rows, device="cpu"):
    """(inputs, labels) of the samples `rows`, on the device: normalised pixels, or ids, token types and mask.

    Official code differs on ImageNet: bicubic, test pictures cut from 384 / .875 pixels,
    random erasing, RandAugment.
    """
    labels = data.send(torch.from_numpy(dataset.labels[rows]), device)
    if cfg.family == "bert":
        return data.send(torch.from_numpy(dataset.tokens[rows]), device).unbind(1), labels
    x = dataset.pixels(rows, device)                                                            # (B, C, w, w)
    if x.shape[-1] != cfg.image:
        x = F.interpolate(x, (cfg.image, cfg.image), mode="bilinear", antialias=True)   # (B, C, h, h)
    if cfg.pixels == "imagenet":
        mean, deviation = x.new_tensor(IMAGENET)[:, :, None, None]                      # each (C, 1, 1)
        x = ((x + 1) / 2 - mean) / deviation                                            # (B, C, h, h)
    return (x.to(torch.get_default_dtype()),), labels


def class_half(dataset, half):
    """Positions of the samples of the first (1) or second (2) half of the classes; 0: of all samples."""
    if half == 0:
        return np.arange(len(dataset.labels))
    in_second = dataset.labels >= len(dataset.classes) // 2
    return np.flatnonzero(in_second if half == 2 else ~in_second)


def epochs(cfg, rows, steps):
    """The samples `rows` in the order in which `steps` batches see them: a new order every epoch.

    Official code differs: the last batch of an epoch is short; here it takes the next epoch's first samples.
    """
    count = math.ceil(steps * cfg.batch / len(rows))
    generators = [common.make_generator(cfg.seed, epoch, "data") for epoch in range(count)]
    return np.concatenate([rows[torch.randperm(len(rows), generator=g).numpy()] for g in generators])


def draw(dataset, order, cfg, step, device):
    """The batch of a step, (inputs, labels): this process's share of the next cfg.batch of `order`."""
    rows = order[step * cfg.batch:(step + 1) * cfg.batch]
    return fetch(dataset, cfg, common.shard(rows), device)


def finetune(cfg, variant, stage, dataset, weights, half=0):
    """Train `variant`, cfg with some fields changed, from {name: tensor}: the model, its scheduler, measures.

    Of variant: policy, formats, learning rate, steps; of cfg: data, batch, seed and the run. Measured: bytes
    saved for the backward pass at the last step; seconds a step; on CUDA the allocator's peak, in which
    buffers count, too, that live only for a moment: the paper's "on-device memory" may be such a peak.
    """
    device = common.device_of(cfg)
    order = epochs(cfg, class_half(dataset, half), variant.steps)
    run = common.Run(cfg, stage, variant.steps, classes=dataset.classes)
    # not run.seed_weights(): the new head is to be alike in all variants
    torch.manual_seed(common.make_generator(cfg.seed, half, "weights").initial_seed())
    model = build_model(variant)
    if weights:
        load_weights(model, weights, cfg.weights)
    model.to(device).train()
    scheduler = Scheduler(model, variant)
    opt = optimizer(model, variant)
    start = run.restore(model=model, opt=opt, scheduler=scheduler)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    measured = {"measured": math.nan, "s a step": math.nan}
    kept = run.folder / f"measured-{stage}.json"              # for a call that finds the stage finished
    if cfg.resume and kept.exists():
        measured = common.read_stored(kept)
    clock = time.perf_counter()
    read = common.read_ahead(lambda step: draw(dataset, order, cfg, step, device), device, run.total)
    for step in run.steps(start):
        batch = read(step)
        common.set_learning_rate(opt, learning_rate(variant, step))
        scheduler.freeze(step)                                # before the forward pass decides what it saves
        common.seed_dropout(cfg.seed, step)
        opt.zero_grad()                                       # None: at 0, momentum would move what is frozen
        for (part,) in common.in_parts(cfg.accumulate, batch):
            if run.due(step, cfg.log):
                given = [*model.parameters(), *part[0], part[1]]
                value, measured["measured"] = saved_bytes(lambda: loss(model, part), given)
            else:
                value = loss(model, part)
            (value / cfg.accumulate).backward()
            run.add(loss=value)
        common.average_gradients(model.parameters())
        opt.step()
        scheduler.measure()
        run.log(step)
        if run.due(step, cfg.log):
            measured["s a step"] = (time.perf_counter() - clock) / (step + 1 - start)
            if device.type == "cuda":
                measured["peak"] = torch.cuda.max_memory_allocated(device)
            if common.rank() == 0:
                common.write_json(kept, measured)
        run.save(step)
    return model, scheduler, measured


@torch.no_grad()
def predict(model, dataset, rows):
    """For each block of the samples `rows`: (their positions, logits, labels), in evaluation, on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    for part in np.array_split(rows, math.ceil(len(rows) / 128)):
        inputs, labels = fetch(dataset, model.cfg, part, device)
        yield part, model(*inputs).cpu(), labels.cpu()


def confusion(model, dataset, rows):
    """How often a sample of each class (row) of the data is taken for each class (column): (classes, K)."""
    counts = torch.zeros(len(dataset.classes), model.cfg.classes)
    for part, logits, labels in predict(model, dataset, rows):
        counts.index_put_((labels, logits.argmax(1)), torch.ones(len(part)), accumulate=True)
    return counts


def class_metrics(counts):
    """Accuracy from a confusion table; of two classes also F1 (MRPC, QQP) and Matthews correlation (CoLA)."""
    result = {"accuracy": (counts.diagonal().sum() / counts.sum()).item()}
    if counts.shape == (2, 2):
        (tn, fp), (fn, tp) = counts.tolist()
        result["f1"] = 2 * tp / max(1, 2 * tp + fp + fn)
        spread = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        result["matthews"] = (tp * tn - fp * fn) / max(1, spread) ** 0.5
    return result


def pearson(a, b):
    """Correlation of two vectors; 0 where one of them is constant."""
    return torch.corrcoef(torch.stack([a, b]).double())[0, 1].nan_to_num(0).item()


def ranks(x):
    """Ranks of numbers (M,), from 1 up; equal ones share the mean of theirs. Spearman correlates them."""
    _, group, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[group]


def candidates(model, dataset, rows, count=20, longest=30):
    """Answers to each question of SQuAD, the best first: {id: [(score, text), ...]}; "" stands for none.

    S15  score(i, j) = start_i + end_j,  i <= j < i + longest;  of no answer: start_0 + end_0

    i and j are among the `count` best of their window and lie in its passage; the `count` best texts stay.
    No answer stays, too; of several windows that counts which is surest of an answer. Official code differs:
    a token counts only in the window that shows most around it.
    """
    scores = {question.id: {"": math.inf} for question in dataset.questions}
    for part, logits, _ in predict(model, dataset, rows):
        for row, (start, end) in zip(part, logits.mT.double().numpy()):
            number, shift = dataset.windows[row]
            question = dataset.questions[number]
            found = scores[question.id]
            found[""] = min(found[""], start[0] + end[0])
            passage = np.flatnonzero(dataset.tokens[row, 1])[:-1]        # behind it stands [SEP]
            first = np.intersect1d(np.argsort(-start, kind="stable")[:count], passage)
            last = np.intersect1d(np.argsort(-end, kind="stable")[:count], passage)
            for i in first:
                for j in last[(i <= last) & (last < i + longest)]:
                    begin = question.places[i + shift][0]
                    text = question.passage[begin:question.places[j + shift][1]]
                    found[text] = max(start[i] + end[j], found.get(text, -math.inf))
    best = {}
    for key, found in scores.items():
        none = (float(found.pop("")), "")
        texts = sorted(((float(score), text) for text, score in found.items()), reverse=True)
        best[key] = sorted([*texts[:count], none], reverse=True)        # at a tie the text wins
    return best


def plain_words(text):
    """The words of an answer as SQuAD compares them: no capitals, no punctuation, no articles."""
    text = re.sub(r"[!-/:-@[-`{-~]", "", text.lower())        # all punctuation of ASCII
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def overlap(said, answer):
    """(exact match, F1 of the words) of two answers, both from 0 to 1."""
    said = plain_words(said)
    answer = plain_words(answer)
    exact = float(said == answer)
    if not said or not answer:
        return exact, exact
    shared = sum(min(said.count(word), answer.count(word)) for word in set(said))
    return exact, 2 * shared / (len(said) + len(answer))


def span_metrics(questions, said):
    """Exact match and F1 of {id: text}, each with the best of the answers, as SQuAD 2.0 is evaluated.

    Over all questions, and over those with and without an answer alone (HasAns, NoAns).
    """
    groups = {"": [], "HasAns_": [], "NoAns_": []}
    for question in questions:
        answers = [text for text, _ in question.answers if plain_words(text)] or [""]
        pairs = [overlap(said[question.id], answer) for answer in answers]
        best = [max(side) for side in zip(*pairs)]
        groups[""].append(best)
        groups["HasAns_" if question.answers else "NoAns_"].append(best)
    result = {}
    for group, pairs in groups.items():
        if pairs:
            result[f"{group}exact"], result[f"{group}f1"] = np.mean(pairs, 0).tolist()
    return result


def evaluate(model, dataset, rows):
    """Measures of the samples `rows`, as the task's authors report them, and the predictions they rest on."""
    if model.cfg.target == "span":
        found = candidates(model, dataset, rows)
        said = {key: best[0][1] for key, best in found.items()}
        return span_metrics(dataset.questions, said), {"answers": said, "candidates": found}
    if model.cfg.target == "score":
        pairs = [(logits[:, 0], labels) for _, logits, labels in predict(model, dataset, rows)]
        scores, labels = (torch.cat(side) for side in zip(*pairs))
        measures = {"pearson": pearson(scores, labels), "spearman": pearson(ranks(scores), ranks(labels))}
        return measures, {"scores": scores.tolist()}
    counts = confusion(model, dataset, rows)
    return class_metrics(counts), {"classes": dataset.classes, "confusion": counts.int().tolist()}


def train(cfg):
    """Fine-tune cfg; with --compare, in full and at each rate; with --pretrain, after pre-training."""
    dataset = open_split(cfg, "train")
    test = open_split(cfg, "test")                            # of GLUE dev, where the authors measure, too
    half = 2 if cfg.pretrain else 0
    weights = read_pretrained(cfg.weights) if cfg.weights else {}
    if cfg.pretrain:
        variant = replace(stock(cfg), steps=cfg.pretrain)
        model, *_ = finetune(cfg, variant, "pretrain", dataset, weights, half=1)
        weights = {name: p.detach() for name, p in model.named_parameters() if not name.startswith("head.")}
    rates = {f"rate-{word}": replace(cfg, rate=rate) for word, rate in parse_rates(cfg.compare).items()}
    variants = {"full": stock(cfg), **rates} if rates else {"last": cfg}
    rows = {}
    if not rates and common.rank() == 0:                      # the only row but its own: by formula
        rows["stock"] = plan_memory(cfg)["stock"]
    for stage, variant in variants.items():
        model, scheduler, measured = finetune(cfg, variant, stage, dataset, weights, half)
        if common.rank() == 0:
            account = memory_account(model, variant, at_once(cfg), scheduler.training(model))
            rows[stage] = account | measured | evaluate(model, test, class_half(test, half))[0]
            heat_map(common.folder(cfg) / f"active-{stage}.svg", scheduler)
    if common.rank() > 0:
        return 0
    table(rows)
    common.write_json(common.folder(cfg) / "result.json", rows)
    if cfg.preset == "demo" and common.is_preset(cfg, PRESETS):
        print(f"target: accuracy {TARGET} at rate 0.75")
        return int(rows["rate-0.75"]["accuracy"] < TARGET and common.Run.trained)


# --- Checks ------------------------------------------------------------------

def check(cfg):
    """What is wrong with a configuration as a whole; the ranges of single fields stand behind them."""
    kinds = ("glue:", "squad:")
    if cfg.family == "vit":
        kinds = ("shapes", "cifar10", "npz:", "folder:", "video:")
    target = target_of(cfg.data)
    outputs = {"score": 1, "span": 2}.get(cfg.target, cfg.classes)
    for name, fits, message in (
            ("heads", cfg.width % cfg.heads == 0, f"must divide --width {cfg.width}"),
            ("patch", cfg.image % cfg.patch == 0, f"must divide --image {cfg.image}"),
            ("length", cfg.length <= cfg.positions, f"only {cfg.positions} positions are known"),
            ("bf16", not cfg.bf16, "SlimFit's formats start from fp32; leave it out"),
            ("compile", not cfg.compile, "torch would compile for every set that trains; leave it out"),
            ("data", cfg.plan or cfg.data.startswith(kinds), f"not for --family {cfg.family}"),
            ("target", cfg.plan or cfg.target == target, f"--data {cfg.data} wants {target}"),
            ("classes", cfg.classes == outputs, f"--target {cfg.target} has {outputs}"),
            ("pretrain", not cfg.pretrain or target == "class", "there are no halves of classes"),
            ("weights", cfg.plan or cfg.weights or cfg.pretrain or cfg.sample, "give a pre-trained model")):
        common.require(fits, f"--{name} {getattr(cfg, name)}: {message}")
    parse_rates(cfg.compare)


def target_of(spec):
    """What the head must give for a data set: "class", "score" or "span"."""
    if spec.startswith("squad:"):
        return "span"
    return "score" if spec.startswith("glue:STS-B:") else "class"


def parse_rates(text):
    """{"0.75": 0.75, "0.9": 0.9} of "0.75,0.9", {} of ""; UserError where one is no number in [0, 1)."""
    words = text.split(",") if text else []
    numbers = all(word.replace(".", "", 1).isdecimal() for word in words)
    common.require(numbers and all(float(word) < 1 for word in words),
                   f"--compare {text}: write rates in [0, 1) as 0.75,0.9")
    return {word: float(word) for word in words}


def vocabulary(weights, words, cased):
    """The vocabulary beside the weights: *vocab.txt or, as transformers 5 writes it, tokenizer.json."""
    place = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    found = sorted(place.glob("*vocab.txt")) + sorted(place.glob("tokenizer.json"))
    common.require(found, f"{place / 'vocab.txt'}: neither this nor tokenizer.json is there")
    pieces = data.WordPiece(found[0], cased)
    rows = max(pieces.ids.values()) + 1
    common.require(rows == words, f"--words {words}: the vocabulary has {rows}")
    return pieces


@functools.lru_cache(maxsize=2)
def open_texts(spec, split, length, *given):
    """A split of a GLUE task or of SQuAD as data.Texts, read once; given: for vocabulary."""
    return data.open_texts(spec, split, vocabulary(*given), length)


def open_split(cfg, split):
    """The split "train" or "test" as data.Data or data.Texts."""
    if cfg.family == "bert":
        return open_texts(cfg.data, split, cfg.length, cfg.weights, cfg.words, cfg.cased)
    size = cfg.image if cfg.data.startswith(("shapes", "folder:")) else 0               # 0: as they are
    return data.open_data(cfg.data, split, size, count=10_000 if split == "train" else 4_000)


def prepare(cfg):
    """Once, before the processes start: the model fits; the splits are there and fit it and one another."""
    if cfg.plan:
        return
    common.require_memory(cfg, lambda: build_model(cfg))
    names = ("test",) if cfg.sample else ("train", "test")
    splits = {split: open_split(cfg, split) for split in names}
    classes = splits["test"].classes
    for split, dataset in splits.items():
        K = len(dataset.classes)
        common.require(K <= cfg.classes, f"--classes {cfg.classes}: {cfg.data} has {K}")
        alike = dataset.classes == classes
        common.require(alike, f"{cfg.data}: train has the classes {dataset.classes}, test {classes}")
        counts = [len(class_half(dataset, half)) for half in ((1, 2) if cfg.pretrain else (0,))]
        common.require(all(counts), f"{cfg.data}: split {split}: {counts} samples by halves of {K} classes")
    print(data.describe(splits), flush=True)


# --- Command line ------------------------------------------------------------

def table(rows):
    """Print {run: {column: value}}, one line a run; bytes (whole numbers) in MB of 10^6."""
    columns = max(rows.values(), key=len)
    print(f"{'MB':12}" + "".join(f"{column:>13}" for column in columns))
    for name, row in rows.items():
        cells = [f"{v / 1e6:13,.2f}" if isinstance(v, int) else f"{v:13.3f}" for v in row.values()]
        print(f"{name:12}" + "".join(cells))


def print_rows(title, rows):
    """Print activation_rows under a title; bytes: of a number; numbers: in a tensor."""
    title += ", saved for backward"
    print(f"\n{title:32}{'kind':8}{'tensors':>9}{'bytes':>7}{'numbers':>14}{'MB':>11}")
    for name, kind, count, width, size in rows:
        print(f"{name:32}{kind:8}{count:9}{width:7g}{size:14,}{count * width * size / 1e6:11,.2f}")


def heat_map(path, scheduler):
    """Draw who trained as an SVG: a row a tensor, steps to the right; the darker, the more of those steps."""
    history = torch.stack(scheduler.history).T.float()                                  # (t, n)
    steps = history.shape[1]
    columns = min(60, steps)
    share = F.interpolate(history[None], columns, mode="area")[0]                       # (t, m)
    shade = (8 * share).ceil().int()                          # in eight shades         # (t, m)
    wide = 450 / columns
    bottom = 30 + 13 * len(shade)
    parts = [common.svg_text(140, 18, "light: trained at few of these steps; dark: at all of them", "start"),
             common.svg_text(140, bottom + 16, "step 1", "start"),
             common.svg_text(590, bottom + 16, f"step {steps}", "end")]
    for level in range(1, 9):
        places = (shade == level).nonzero().tolist()
        cells = [f"M{140 + wide * x:.1f} {30 + 13 * y}h{wide:.1f}v12h-{wide:.1f}z" for y, x in places]
        parts.append(f'<path d="{"".join(cells)}" fill="{common.COLORS[0]}" fill-opacity="{level / 8}"/>')
    for row, name in enumerate(scheduler.tensors):
        label = name.removesuffix(".weight").replace("blocks.", "block ").replace(".", "  ")
        parts.append(common.svg_text(132, 41 + 13 * row, label, "end"))
        if label.endswith("query"):                           # the first of a block
            parts.append(f'<path d="M40 {29.5 + 13 * row}h550" stroke="#999"/>')
    common.svg(path, 600, bottom + 26, parts)


def plan_memory(cfg):
    """{case: memory account} of a step of one process, by formula: nothing runs, the model is an outline.

    stock; SlimFit with all frozen that may be; the worst case: each active tensor fills a slot of its own.
    With --plan the rows of each account are printed, too.
    """
    with torch.device("meta"):
        model = build_model(cfg)
    B = at_once(cfg)
    every = {name for name, _ in model.named_parameters()}
    may = list(eligible(model, cfg))
    k = Scheduler(model, cfg).k
    # key.weight stands for query, key and value, which share a slot
    own = ("key.weight", "out.weight", "mlp1.weight", "mlp2.weight")
    slots = [name for name in may if name.endswith(own)]
    others = [name for name in may if name not in slots]
    floor = every - {*may}
    worst = floor | {*(slots + others)[:k]}
    cases = {"stock": (stock(cfg), every), "all frozen": (cfg, floor), "worst case": (cfg, worst)}
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(every)} tensors, "
          f"{len(may)} eligible ({len(may) - k} frozen and {k} active at a step), batch {B}")
    if cfg.plan:
        for name, (variant, active) in cases.items():
            print_rows(name, activation_rows(variant, B, active))
        print()
    return {name: memory_account(model, variant, B, active) for name, (variant, active) in cases.items()}


def evaluate_checkpoint(cfg):
    """--sample: test metrics of a checkpoint, its weights' bytes and the seconds that it took.

    Answers go into a file that SQuAD's own evaluation reads, too.
    """
    clock = time.perf_counter()
    device = common.device_of(cfg)
    saved = common.read_checkpoint(cfg.sample, "slimfit", device)
    test = open_split(cfg, "test")
    common.require(saved["classes"] in ([], test.classes),
                   f"{cfg.sample}: its classes are {saved['classes']}; {cfg.data} has {test.classes}")
    model = build_model(cfg).to(device)
    common.load_into({"model": model}, saved, cfg.sample)
    measures, predictions = evaluate(model, test, class_half(test, 2 if cfg.pretrain else 0))
    row = {**measures, "weights": sum(4 * p.numel() for p in model.parameters()),
           "seconds": time.perf_counter() - clock}
    table({"test": row})
    where = common.sample_folder(cfg)
    common.write_json(where / "test.json", row | predictions)
    if cfg.target == "span":
        common.write_json(where / "predictions.json", predictions["answers"])


def main(cfg):
    """Plan, evaluate or train; returns the exit code."""
    if cfg.sample:
        return evaluate_checkpoint(cfg)
    if not cfg.plan:
        return train(cfg)
    if common.rank() == 0:
        table(plan_memory(cfg))


if __name__ == "__main__":
    common.launch(main, common.cli(Config, PRESETS, __doc__), check, prepare)
