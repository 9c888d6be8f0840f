"""SlimFit: Memory-Efficient Fine-Tuning of Transformer-based Models Using Training Dynamics, arXiv 2305.18513

Fine-tuning memory is mostly what the forward pass saves for the backward pass. A frozen weight does not need
its input (dx = g W), so all but a few weight tensors are frozen, chosen anew at every step: those train that
moved most, relatively, when they last trained (inter-layer scheduling, ILS). What the gradient needs in any
case is stored in 8 or 4 bits or pruned; the forward pass stays exact. Equal slots over a fixed floor:

    dynamic   [ ] [#] [ ] [ ] [#] [ ] [ ] [ ] [ ] [#] [ ] [ ]      k slots are lit, others at every step
    static    [int8 q k v | uint8 softmax | 4-bit GELU input | pruned LayerNorm input]

Run:      python slimfit.py                                 demo: full fine-tuning against SlimFit (3 minutes)
          python slimfit.py --preset imagenet --plan        memory of any model and batch, without running
          python slimfit.py --preset mrpc --weights bert-base-cased --data glue:MRPC:glue
          python slimfit.py --sample runs/slimfit/mrpc/last.pt        evaluate: metrics, bytes, seconds
Faithful: operators, formats, scheduling, AdamW, schedules, the twelve published runs: the authors' code, S1
          to S11 of the digest (the paper's own equation numbers are not known to us).
Scaled:   the demo. Departures: a new head always trains, no step at lr 0, zeros in (S11), snapshot (freeze).
Left out: SQuAD's reader and n-best list, RandAugment and random erasing of the ImageNet run.
Letters:  B batch, T tokens, d width (4 d in the MLP), H heads, e = d/H, K outputs, C channels, h w pixels, N
          patches; in counts of bytes N = B T d, S = B H T^2; g the gradient that arrives.
CUDA:     never run on CUDA.
Read in this order: Dense8 to SoftmaxValue, Block, Scheduler, activation_bytes, tune. Fifteen minutes.
"""

import json
import math
import re
import time
import weakref
from dataclasses import dataclass, replace
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
    preset: str = "demo"                             # where the values below start from
    data: str = "shapes"                             # shapes cifar10 npz:PATH folder:PATH glue:TASK:PATH
    weights: str = ""                                # folder or file (.safetensors .bin .npz); vocab.txt
    family: Literal["vit", "bert"] = "bert"          # pre-norm on pixels, or post-norm on words
    target: Literal["class", "score", "span"] = "class"    # what is predicted (STS-B: score, SQuAD: span)
    classes: int = 2                                 # outputs K of the head
    depth: int = 12                                  # blocks
    width: int = 768                                 # width d
    heads: int = 12                                  # attention heads H
    eps: float = 1e-12                               # of every LayerNorm
    image: int = 224                                 # side of the pictures in pixels; others are resized
    patch: int = 16                                  # side of a patch
    pixels: Literal["half", "imagenet"] = "half"     # mean and deviation: 0.5 and 0.5, or ImageNet's
    scaled: bool = False                             # LayerScale gains behind both branches (DINOv2)
    words: int = 28996                               # vocabulary size
    cased: bool = False                              # case counts; tokenizer_config.json overrules
    positions: int = 512                             # rows of the position table of texts
    length: int = 128                                # tokens of a text, padded
    dropout: float = 0.0                             # on both branches, the embeddings and the pooled vector
    attention_dropout: float = 0.0                   # on V, as the authors do; on P where both are stock
    products: bool = True                            # store q, k, v in int8
    probabilities: bool = True                       # store the softmax output P in uint8
    gelu: bool = True                                # store the GELU input in 4 bits
    mlp: bool = True                                 # store the input of the second MLP matrix in int8
    keep: float = 0.1                                # share stored of a frozen LayerNorm's input; 1: stock
    policy: Literal["ils", "random", "last", "progressive", "none"] = "ils"    # who trains, see choose
    rate: float = 0.9                                # share of the eligible tensors frozen at every step
    freeze_head: bool = False                        # the head may be frozen, too (as in ten scripts)
    adam: Literal["authors", "torch"] = "authors"    # epsilon before or after bias correction
    decay: float = 0.0                               # weight decay of matrices
    decay_all: bool = False                          # decay biases and gains, too
    schedule: Literal["linear", "stsb", "vit", "zero"] = "linear"    # learning rate, see lr_scale
    pretrain: int = 0                                # demo: steps on the first half of the classes, before
    compare: str = ""                                # rates to run beside full fine-tuning, as 0.75,0.9
    full_lr: float = 0.0                             # learning rate of that full fine-tuning; 0: lr
    plan: bool = False                               # print the memory account and stop
    steps: int = 345                                 # optimizer steps
    batch: int = 32                                  # pictures or texts a step, over all processes
    lr: float = 5e-5                                 # learning rate
    seed: int = 0                                    # every random number is a function of (seed, step)
    gpus: int = 1                                    # processes, one a GPU; without GPUs they share the CPU
    device: str = "auto"                             # auto, cpu or cuda
    bf16: bool = False                               # refused: SlimFit's formats start from fp32
    compile: bool = False                            # refused: torch would compile for every set that trains
    name: str = ""                                   # run folder runs/slimfit/NAME; default: the preset
    resume: bool = False                             # go on from the run's checkpoint
    sample: str = ""                                 # checkpoint to evaluate, instead of training
    log: int = 50                                    # steps between log lines
    save: int = 1000                                 # steps between checkpoints
    sampling = ("data", "weights", "batch")    # what --sample may change

BERT = dict(dropout=0.1, attention_dropout=0.1, decay=0.01, freeze_head=True, cased=True, seed=43)
VIT = dict(family="vit", schedule="vit", freeze_head=True, seed=43)
PRESETS = {
    "demo": dict(family="vit", classes=10, image=16, patch=4, width=64, depth=4, heads=4, pretrain=800,
                 compare="0.5,0.75,0.9", steps=1200, lr=4e-3, full_lr=3e-3, schedule="vit", log=200),
    # DINOv2's ViT-S/14 on CIFAR-10 for one GPU; planned for under an hour, not yet run.
    "small": dict(family="vit", data="cifar10", classes=10, image=98, patch=14, width=384, heads=6,
                  scaled=True, eps=1e-6, pixels="imagenet", lr=1e-4, schedule="vit", steps=4689),
    "minilm": dict(data="glue:MRPC:glue", words=30522, depth=6, width=384, length=64, dropout=0.1,
                   attention_dropout=0.1, decay=0.01, lr=2e-4),
    # The twelve published runs (digest 4), 3 epochs each, from bert-base-cased (SQuAD: uncased) or ViT-B/16.
    # CoLA and SQuAD had --schedule zero: see lr_scale. In ten of them the new head may be frozen; our choice
    # elsewhere: it always trains (digest 6.14).
    "cola": dict(BERT, data="glue:CoLA:glue", lr=8e-5, steps=804),
    "mnli": dict(BERT, data="glue:MNLI:glue", lr=4e-5, rate=0.8, steps=36816, classes=3),
    "mrpc": dict(BERT, data="glue:MRPC:glue", lr=1.25e-4, steps=345),
    "qnli": dict(BERT, data="glue:QNLI:glue", lr=5e-5, rate=0.95, steps=9822),
    "qqp": dict(BERT, data="glue:QQP:glue", lr=5e-5, rate=0.8, steps=34113),
    "rte": dict(BERT, data="glue:RTE:glue", lr=1.2e-4, steps=468, batch=16, seed=47),
    "sst2": dict(BERT, data="glue:SST-2:glue", lr=8e-5, rate=0.95, steps=6315, seed=44),
    "stsb": dict(BERT, data="glue:STS-B:glue", lr=8e-5, rate=0.85, steps=540, target="score", classes=1,
                 schedule="stsb", freeze_head=False),
    "squad": dict(BERT, data="squad", lr=1.8e-4, rate=0.8, steps=3057, batch=128, length=384, target="span",
                  words=30522, cased=False, decay_all=True, seed=23),
    "cifar10": dict(VIT, data="cifar10", classes=10, lr=7.5e-5, steps=4689, freeze_head=False),
    "cifar100": dict(VIT, data="npz:cifar100.npz", classes=100, lr=5.5e-5, rate=0.75, steps=4689),
    "imagenet": dict(VIT, data="folder:imagenet", classes=1000, lr=5e-5, rate=0.95, steps=30030, batch=128,
                     image=384, pixels="imagenet", adam="torch", decay=0.01, decay_all=True),
}
TARGET = 0.837      # the demo's accuracy at rate 0.75: mean 0.905 - 4 s.d. of 0.017, five seeds

def stock(cfg):
    """The same model without SlimFit: nothing frozen, nothing compressed, attention dropout on P."""
    off = dict.fromkeys(("products", "probabilities", "gelu", "mlp"), False)
    return replace(cfg, policy="none", keep=1.0, lr=cfg.full_lr or cfg.lr, **off)

def check(cfg):
    """Every mistake that can be seen without the data; UserError with one line."""
    need = common.need
    for name in ("depth", "width", "heads", "image", "patch", "classes", "words", "positions", "length"):
        need(getattr(cfg, name) >= 1, f"--{name} {getattr(cfg, name)}: must be at least 1")
    for name in ("pretrain", "full_lr", "decay"):
        need(0 <= getattr(cfg, name) < math.inf, f"--{name} {getattr(cfg, name)}: must be 0 or above")
    need(0 < cfg.eps < math.inf, f"--eps {cfg.eps}: must be above 0")
    for name in ("rate", "dropout", "attention_dropout"):
        need(0 <= getattr(cfg, name) < 1, f"--{name} {getattr(cfg, name)}: must lie in [0, 1)")
    need(0 < cfg.keep <= 1, f"--keep {cfg.keep}: must lie in (0, 1]")
    need(cfg.width % cfg.heads == 0, f"--heads {cfg.heads}: must divide --width {cfg.width}")
    need(cfg.image % cfg.patch == 0, f"--patch {cfg.patch}: must divide --image {cfg.image}")
    need(cfg.length <= cfg.positions, f"--length {cfg.length}: only {cfg.positions} positions are known")
    need(not cfg.bf16, "--bf16: SlimFit trains in fp32, from which its formats start; leave it out")
    need(not cfg.compile, "--compile: torch would compile again for every set of tensors that trains, and be "
         "slower once it gives up; leave it out")
    need(re.fullmatch(r"((0?\.\d+|0)(,|$))*", cfg.compare), f"--compare {cfg.compare}: write as 0.75,0.9")
    if not cfg.plan:
        need(cfg.target == "class", f"--target {cfg.target}: has no reader here; add --plan")
        fits = cfg.data.startswith("glue:") == (cfg.family == "bert") and not cfg.data.startswith("latents:")
        need(fits, f"--data {cfg.data}: not for --family {cfg.family}")
        need(cfg.weights or cfg.pretrain or cfg.sample, "give --weights PATH, a pre-trained model")

def prepare(cfg):
    """Once, before the processes start: each split that the run reads is there, and they fit one another."""
    if cfg.plan:
        return
    splits = ["test"] if cfg.sample else ["train", "test"]
    names = {}
    for split in splits:
        _, labels, names[split] = open_split(cfg, split)
        found = len(names[split])
        common.need(found <= cfg.classes, f"--classes {cfg.classes}: {cfg.data} has {found}")
        for half in ([1, 2] if cfg.pretrain else [0]):
            which = ("", "the first half of ", "the second half of ")[half]
            common.need(len(class_half(labels, found, half)),
                        f"{cfg.data}: split {split} has no sample of {which}its {found} classes")
    same = len({tuple(given) for given in names.values()}) == 1
    common.need(same, f"{cfg.data}: train and test must have the same classes, but {names}")
    if cfg.family == "bert":
        vocabulary(cfg)

# --- Building blocks ---------------------------------------------------------
# A format is (i, f, dtype): numbers of i bits before and f bits behind the point, and a sign. It is fixed: no
# minimum, maximum or scale of the data is taken, which would cost a pass over it and bytes of its own.
INT8 = (3, 4, torch.int8)       # q, k, v, input of the second MLP matrix: range [-8, 7.9375], step 1/16
UINT8 = (0, 8, torch.uint8)     # softmax output: range [0, 255/256], step 1/256; 1.0 becomes 255/256
INT4 = (2, 1, torch.int8)       # GELU input: range [-4, 3.5], step 1/2; packed in pairs

def quantise(x, i, f, dtype):
    """Codes clamp(round(x 2^f), -2^(i+f), 2^(i+f) - 1), ties to even, (S1). Backward alone reads them: the
    forward pass goes on with x itself, so that the output is the stock model's, bit for bit (I1)."""
    code = (x * 2 ** f).round_().clamp_(-(2 ** (i + f)), 2 ** (i + f) - 1)
    # by way of int16, because torch turns floats into uint8 one by one
    return code.to(dtype) if dtype is torch.int8 else code.short().to(dtype)

def restore(stored, like):
    """Values of int8 or uint8 codes in the dtype of `like`; a tensor stored as it was comes back as it is."""
    step = {torch.int8: 1 / 16, torch.uint8: 1 / 256}.get(stored.dtype)
    return stored if step is None else stored.to(like.dtype).mul_(step)

def pack4(x):
    """INT4 codes of x, two a byte: 16 (a + 8) + b + 8 for the first half a and the second b, (S2)."""
    code = quantise(x, *INT4).flatten().view(torch.uint8)                               # (n)
    code = F.pad(code, (0, 1)) if code.numel() % 2 else code                            # (w)
    first, second = code.chunk(2)                                                       # (m), (m)
    return (first * 16).add_(second).add_(16 * 8 + 8)         # modulo 256              # (m)

def unpack4(byte, table, like):
    """The codes that pack4 kept, each replaced by its entry in the table (2, 256), which holds for every byte
    what its first and what its second code stand for. The shape is that of `like`."""
    both, index = like.new_empty(2, len(byte)), byte.int()                              # (2, m), (m)
    for half, row in zip(both, table):
        torch.index_select(row, 0, index, out=half)
    return both.flatten()[:like.numel()].view(like.shape)

def gelu_slopes(dtype=None):
    """GELU' at the 16 values of INT4, (S5), as unpack4 wants it (2, 256): looked up, not computed 4 N times.
    It is off the exact derivative by 0.2 at most, near 0, where GELU' is steepest (I6)."""
    z = torch.arange(-8, 8, dtype=dtype) / 2                                            # (w)
    slope = torch.ops.aten.gelu_backward(torch.ones_like(z), z)                         # (w)
    return torch.stack([slope.repeat_interleave(16), slope.repeat(16)])

def largest(x, K):
    """The K largest magnitudes of the whole tensor, not of each token (I9): values and flat int32 indices, in
    any order. Both are saved tensors, so that the 8 K bytes show in every count (digest 6.8)."""
    flat = x.flatten()                                                                  # (n)
    if x.is_cuda:
        index = flat.abs().topk(K, sorted=False).indices
        return flat[index], index.int()
    flat = flat.numpy()                                       # the same set; numpy selects 5 times faster
    index = np.argpartition(np.abs(flat), -K)[len(flat) - K:]                            # K may be 0
    return torch.from_numpy(flat[index]), torch.from_numpy(index.astype(np.int32))      # (K), (K)

class Dense8(torch.autograd.Function):
    """y = x W^T + b whose input is stored in int8 when W trains and not at all when W is frozen, (S3). The
    input is 4 d wide: in int8 it takes the 4 N bytes of any other slot, and it does not matter who trains."""
    @staticmethod
    def forward(ctx, x, W, b):
        ctx.save_for_backward(quantise(x, *INT8) if ctx.needs_input_grad[1] else None, W)
        return F.linear(x, W, b)                                                        # (B, T, d)

    @staticmethod
    def backward(ctx, g):
        # dx = g W needs no input, and the bias, which always trains, needs only g
        x, W = ctx.saved_tensors
        flat = g.flatten(0, -2)
        dW = None if x is None else flat.T @ restore(x, g).flatten(0, -2)
        return g @ W, dW, flat.sum(0)

class Norm(torch.autograd.Function):
    """LayerNorm, (S4). Gain trains: stores x and recomputes the rest. Gain frozen: stores r = 1 / sigma and
    the largest of the normalised x. Then one term of dx, that along the normalised x, is approximate: a share
    of dx of about 1 / sqrt(d), 3 % at d = 768. After the first sweep a gain hardly ever trains again (digest
    2.4): gains stay near 1, so they move little relatively, and the pruned form is the normal one."""
    @staticmethod
    def forward(ctx, x, gain, bias, eps, keep):
        y, mu, r = torch.native_layer_norm(x, gain.shape, gain, bias, eps)  # (B, T, d), (B, T, 1), (B, T, 1)
        ctx.eps, ctx.active = eps, ctx.needs_input_grad[1]
        ctx.save_for_backward(gain, *([x] if ctx.active else
                                      [r, *largest((x - mu).mul_(r), int(keep * x.numel()))]))
        return y                                                                        # (B, T, d)

    @staticmethod
    def backward(ctx, g):
        gain, *kept = ctx.saved_tensors
        if ctx.active:
            # with the epsilon of the forward pass; official code differs: always 1e-12 (digest 6.7)
            y, _, r = torch.native_layer_norm(*kept, gain.shape, None, None, ctx.eps)
        else:
            r, value, index = kept
            y = g.new_zeros(g.numel()).index_add_(0, index, value).view_as(g)
        # at mean 0 and sigma 1 torch's kernel is h - mean(h) - y mean(h y), h = g gain, in one pass
        dx, dgain, dbias = torch.ops.aten.native_layer_norm_backward(
            g, y, gain.shape, 0 * r, torch.ones_like(r), gain, gain, (True, ctx.active, True))
        return dx.mul_(r), dgain, dbias, None, None

class Gelu4(torch.autograd.Function):
    """GELU (erf form) that stores its input z in 4 bits: dx = g (Phi(z) + z phi(z)), (S5), by the table in
    block.slopes: a constant of the model, and so, like a weight, no saved tensor."""
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(pack4(x))
        return F.gelu(x)                                                                # (B, T, m)

    @staticmethod
    def backward(ctx, g):
        return unpack4(ctx.saved_tensors[0], ctx.block.slopes, g).mul_(g), None

class Scores(torch.autograd.Function):
    """s = q k^T with both operands stored in int8, (S6). Division by sqrt(e) and additive mask follow as
    ordinary operations, which save nothing."""
    @staticmethod
    def forward(ctx, q, k):
        ctx.save_for_backward(quantise(q, *INT8), quantise(k, *INT8))
        return q @ k.mT                                                                 # (B, H, T, T)

    @staticmethod
    def backward(ctx, g):
        q, k = (restore(stored, g) for stored in ctx.saved_tensors)
        return g @ k, g.mT @ q

class SoftmaxValue(torch.autograd.Function):
    """o = P v, P = softmax(s), as one node, (S7): P is stored once, in one byte, where softmax and product
    would keep four bytes each. A row of the stored P sums to 1 within T / 512, and so ds to 0 (I7)."""
    @staticmethod
    def forward(ctx, s, v, probabilities, products):
        P = s.softmax(-1)                                                               # (B, H, T, T)
        codes = quantise(P, *UINT8) if probabilities else P                             # (B, H, T, T)
        ctx.save_for_backward(codes, quantise(v, *INT8) if products else v)
        return P @ v                                                                    # (B, H, T, e)

    @staticmethod
    def backward(ctx, g):
        P, v = (restore(stored, g) for stored in ctx.saved_tensors)
        ds = torch._softmax_backward_data(g @ v.mT, P, -1, g.dtype)     # Z - P rowsum(Z), Z = P (g v^T)
        return ds, P.mT @ g, None, None

def dropout(x, p, training):
    """Dropout with a mask of one byte an element on every device (torch's own takes four on CPU). Its mask is
    static: it is what carries the gradient down, whoever trains."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x

# --- Model -------------------------------------------------------------------
def layer_norm(norm, x, keep):
    """The LayerNorm module `norm` of x (B, T, d). keep: the share of its input that is stored when its gain
    is frozen; 0.1 is a constant of the official code. 1: torch's own, which stores x, mean, 1 / sigma."""
    return Norm.apply(x, norm.weight, norm.bias, norm.eps, keep) if keep < 1 else norm(x)  # (B, T, d)

class Block(nn.Module):
    """Attention and MLP: post-norm (BERT) or pre-norm with optional LayerScale (ViT).
    The dense layers on d-wide inputs are torch's own, which do (S3): with a frozen weight they store nothing,
    else their input. Query, key and value share theirs: 4 N bytes if any of them trains, once (I18). With all
    switches off the block is stock torch, and attention is explicit: a fused kernel would save no P."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, d = cfg, cfg.width
        self.query, self.key, self.value, self.out = (nn.Linear(d, d) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(d, cfg.eps), nn.LayerNorm(d, cfg.eps)
        self.mlp1, self.mlp2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.register_buffer("slopes", gelu_slopes(), persistent=False)
        if cfg.scaled:
            self.scale1, self.scale2 = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))

    def attention(self, x, mask):
        """Softmax attention and output matrix, (B, T, d) -> (B, T, d); the mask is added to the scores."""
        cfg, (B, T, d), H = self.cfg, x.shape, self.cfg.heads
        parts = self.query(x), self.key(x), self.value(x)                               # each (B, T, d)
        q, k, v = (part.view(B, T, H, -1).transpose(1, 2) for part in parts)            # each (B, H, T, e)
        s = (Scores.apply(q, k) if cfg.products else q @ k.mT) / math.sqrt(d // H)      # (B, H, T, T)
        s = s if mask is None else s + mask                                             # (B, H, T, T)
        if cfg.products or cfg.probabilities:
            # dropout on V: a mask of N bytes instead of S, and no second P; other than BERT's (digest 6.10)
            v = dropout(v, cfg.attention_dropout, self.training)                        # (B, H, T, e)
            o = SoftmaxValue.apply(s, v, cfg.probabilities, cfg.products)               # (B, H, T, e)
        else:
            o = dropout(s.softmax(-1), cfg.attention_dropout, self.training) @ v        # (B, H, T, e)
        o = dropout(self.out(o.transpose(1, 2).reshape(B, T, d)), cfg.dropout, self.training)  # (B, T, d)
        return o * self.scale1 if cfg.scaled else o                                     # (B, T, d)

    def mlp(self, x):
        """Two matrices with a GELU between them, (B, T, d) -> (B, T, d)."""
        z = self.mlp1(x)                                                                # (B, T, 4*d)
        z = Gelu4.apply(z, self) if self.cfg.gelu else F.gelu(z)                        # (B, T, 4*d)
        z = Dense8.apply(z, self.mlp2.weight, self.mlp2.bias) if self.cfg.mlp else self.mlp2(z)  # (B, T, d)
        z = dropout(z, self.cfg.dropout, self.training)                                 # (B, T, d)
        return z * self.scale2 if self.cfg.scaled else z                                # (B, T, d)

    def forward(self, x, mask=None):
        """(B, T, d) -> (B, T, d)."""
        if self.cfg.family == "bert":
            x = layer_norm(self.norm1, x + self.attention(x, mask), self.cfg.keep)      # (B, T, d)
            return layer_norm(self.norm2, x + self.mlp(x), self.cfg.keep)               # (B, T, d)
        x = x + self.attention(layer_norm(self.norm1, x, self.cfg.keep), mask)          # (B, T, d)
        return x + self.mlp(layer_norm(self.norm2, x, self.cfg.keep))                   # (B, T, d)

class Encoder(nn.Module):
    """BERT or ViT with its head: on the pooled first token of a text, on each token (spans), on the class
    token of a picture. A new head is N(0, 0.02), biases 0; our choice: a new encoder N(0, 1 / fan-in). No
    eligible tensor starts at 0, by which (S11) would divide."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, d = cfg, cfg.width
        if cfg.family == "bert":
            self.word, self.position = nn.Embedding(cfg.words, d), nn.Embedding(cfg.positions, d)
            self.token_type, self.norm = nn.Embedding(2, d), nn.LayerNorm(d, cfg.eps)
        else:
            self.cls = nn.Parameter(torch.empty(1, 1, d))
            self.position = nn.Parameter(torch.empty(1, (cfg.image // cfg.patch) ** 2 + 1, d))
            self.patch, self.final = nn.Conv2d(3, d, cfg.patch, cfg.patch), nn.LayerNorm(d, cfg.eps)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        if cfg.family == "bert" and cfg.target != "span":
            self.pooler = nn.Linear(d, d)
        self.head = nn.Linear(d, cfg.classes)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                fan = d if p.ndim == 3 else p[0].numel()
                nn.init.normal_(p, std=0.02 if name == "head.weight" else fan ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x, types=None, keep=None):
        """Normalised pixels x (B, C, h, w); or ids x, types, keep (B, T), keep 1 on tokens and 0 on padding.
        Returns logits (B, K), for spans (B, T, K)."""
        cfg, p, mask = self.cfg, self.cfg.dropout, None
        if cfg.family == "bert":
            x = self.word(x) + self.token_type(types) + self.position.weight[:x.shape[1]]  # (B, T, d)
            x = dropout(layer_norm(self.norm, x, cfg.keep), p, self.training)           # (B, T, d)
            mask = (1 - keep[:, None, None].to(x.dtype)) * -10_000                      # (B, 1, 1, T)
        else:
            x = self.patch(x).flatten(2).mT                                             # (B, N, d)
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position      # (B, N+1, d)
        for block in self.blocks:
            x = block(x, mask)                                                          # (B, T, d)
        if cfg.family == "vit":
            x = layer_norm(self.final, x, cfg.keep)[:, 0]                               # (B, d)
        elif cfg.target == "span":
            return self.head(x)                                                         # (B, T, K)
        else:
            x = dropout(self.pooler(x[:, 0]).tanh(), p, self.training)                  # (B, d)
        return self.head(x)                                                             # (B, K)

NAMES = ((r"^(bert|vit|dinov2)\.", ""), (r"^embeddings\.", ""), ("_embeddings", ""), (r"\.projection", ""),
         ("cls_token", "cls"), ("^LayerNorm", "norm"), ("gamma$", "weight"), ("beta$", "bias"),
         ("^layernorm", "final"), (r"^encoder\.layer\.", "blocks."), (r"attention\.(self|attention)\.", ""),
         (r"attention\.output\.dense", "out"), (r"attention\.output\.LayerNorm|layernorm_before", "norm1"),
         (r"output\.dense|mlp\.fc2", "mlp2"), (r"intermediate\.dense|mlp\.fc1", "mlp1"),
         (r"output\.LayerNorm|layernorm_after", "norm2"), (r"layer_scale(\d)\.lambda1", r"scale\1"),
         (r"^pooler\.dense", "pooler"), ("^(classifier|qa_outputs)", "head"))

def our_name(name):
    """The usual state-dict name of a tensor (BERT, ViT, DINOv2) -> ours: one substitution after the other."""
    for pattern, new in NAMES:
        name = re.sub(pattern, new, name)
    return name

def read_safetensors(path):
    """{name: tensor} of a .safetensors file: the header's length (8 bytes), the header (JSON), raw values."""
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        body = bytearray(file.read())
    return {name: torch.frombuffer(body[slice(*entry["data_offsets"])], dtype=kinds[entry["dtype"]]).view(
        entry["shape"]) for name, entry in header.items() if name != "__metadata__"}

def read_weights(path):
    """{our name: tensor} of a checkpoint file, or of the first one in a folder; UserError without one. Local
    files alone: nothing is downloaded, and pickles are read as tensors, without running their code."""
    readers = {".safetensors": read_safetensors, ".bin": lambda f: torch.load(f, "cpu", weights_only=True),
               ".npz": lambda f: {name: torch.from_numpy(x) for name, x in np.load(f).items()}}
    files = [Path(path)] if Path(path).is_file() else sorted(Path(path).glob("*"))
    found = [file for kind in readers for file in files if file.suffix == kind]
    common.need(found, f"--weights {path}: no .safetensors, .bin or .npz file there")
    with data.reading(found[0]):
        return {our_name(name): tensor for name, tensor in readers[found[0].suffix](found[0]).items()}

def resize_positions(table, tokens):
    """A ViT's position table, (1, 1 + n^2, d) or, without the class token's row, (1, n^2, d), resized
    bicubically to `tokens` rows with one. A class token without a row gets zeros: nothing was added to it."""
    rows, new = table.shape[1], math.isqrt(tokens - 1)
    old = math.isqrt(rows)
    first = table.new_zeros(1, 1, table.shape[2])
    if old * old != rows:
        old, first, table = math.isqrt(rows - 1), table[:, :1], table[:, 1:]
    common.need(old * old == table.shape[1], f"position has {rows} rows, not n^2 or 1 + n^2")
    grid = table.float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    if old != new:
        grid = F.interpolate(grid, (new, new), mode="bicubic")
    return torch.cat([first, grid.flatten(2).mT], 1)

@torch.no_grad()
def load_weights(model, state, path):
    """Copy {our name: tensor} into the model; all must fit, or it is a UserError. New are a head of another
    shape and, aloud, a pooler that is not there; a ViT's position table may be resized."""
    own = dict(model.named_parameters())
    lost = [name for name in state if name.startswith("blocks.") and name not in own]
    common.need(not lost, f"{path}: {lost[:1]} has no place in this model; see --depth and --scaled")
    for name, p in own.items():
        value = state.get(name)
        if name.startswith("head.") and (value is None or value.shape != p.shape):
            continue
        if name.startswith("pooler.") and "pooler.weight" not in state:
            if name == "pooler.weight" and common.rank() == 0:
                print(f"{path}: has no pooler; a new one is drawn", flush=True)
            nn.init.normal_(p, std=0.02) if p.ndim > 1 else nn.init.zeros_(p)
            continue
        common.need(value is not None, f"{path}: lacks {name}")
        common.need(value.isfinite().all(), f"{path}: {name} holds NaN or infinity")
        # our choice: pictures of another size; the authors' checkpoints have the size of their pictures
        if name == "position" and value.ndim == 3 and value.shape[1] != p.shape[1]:
            value = resize_positions(value, p.shape[1])
        common.need(value.shape == p.shape, f"{path}: {name} is {list(value.shape)}, not {list(p.shape)}")
        p.copy_(value)

# --- Objective ---------------------------------------------------------------
def loss(model, batch, draws=None):
    """Mean loss of one batch (inputs, labels). class: cross-entropy; score: squared error; span: that of
    both ends, labels (B, 2), T is ignored. No draws: dropout reads the generator that the loop reseeds."""
    inputs, labels = batch
    logits = model(*inputs)
    if model.cfg.target == "score":
        return F.mse_loss(logits[:, 0], labels)
    return F.cross_entropy(logits, labels, ignore_index=logits.shape[1])        # K, which no class label is

# --- Sampling ----------------------------------------------------------------
# What this method samples, at every step, is the set of tensors that train; then: how, and what it costs.
# A "layer" of the paper is one weight tensor: of a BERT classifier's 201 parameters 102 are eligible, and 91
# of them are frozen at rate 0.9; its 99 biases always train (digest 6.2).

def eligible(model, cfg):
    """{name: tensor} that may be frozen: two or more dimensions, or a LayerNorm's gain (not of a ViT's last,
    as in the code), or, our choice, LayerScale's. Never a bias, so the gradient goes all the way down:
    freezing spares stored inputs and weight gradients, not the backward pass."""
    return {name: p for name, p in model.named_parameters()
            if (p.ndim > 1 or re.search(r"norm\d?\.weight$|scale\d$", name))
            and (cfg.freeze_head or not name.startswith("head."))}

def relative_change(old, new, skip=True):
    """(S11): the mean over elements of |new - old| / |old|, not a ratio of norms, which would rank otherwise.
    Departure: where old = 0 it counts as 0. In the authors' code (skip=False) it is inf if it moves, NaN if
    not; both sort last and pin the tensor active for good, and checkpoints stored in fp16 do hold zeros."""
    ratio = (new - old).div_(old).abs_()
    return (ratio.nan_to_num_(0, 0, 0) if skip else ratio).mean()

def choose(policy, distance, k, step, steps, draw):
    """Indices of the k tensors that train. ils: the largest distances (ascending stable sort, NaN last);
    random: any; last: the nearest to the output; progressive: a window that slides upwards; none: all."""
    t = len(distance)
    if policy == "random":
        return torch.randperm(t, generator=draw)[:k]
    if policy == "progressive":
        return torch.arange(k) + round((t - k) * step / max(1, steps - 1))
    order = distance.argsort(stable=True) if policy == "ils" else torch.arange(t)
    return order if policy == "none" else order[t - k:]

class Scheduler:
    """Inter-layer scheduling (digest 2.4): which tensors train at a step, by how far they moved when they
    last trained. Nothing explores and no distance fades: a frozen tensor returns when the active ones fall
    below its old value. The number of active tensors never changes, and so, nearly, does the memory."""
    def __init__(self, model, cfg):
        self.cfg, self.params = cfg, eligible(model, cfg)
        t = len(self.params)
        self.k = t - int(cfg.rate * t + 1e-9)                 # 0.95 t may come out as an integer minus 1e-15
        # Larger than any distance can be: the first t / k steps sweep over all tensors, in random order
        # (I13). From zeros, those that happen to train first would go on for ever.
        draw = common.draws(cfg.seed, 0, "start")
        self.distance = 1e20 * torch.rand(t, generator=draw, dtype=torch.float64)
        self.active, self.old, self.history = [], [], []      # indices, weights; a row of booleans a step

    def freeze(self, step):
        """Before the forward pass: choose, set requires_grad, copy the active weights (the authors copy all,
        but a frozen tensor, whose gradient is None, cannot move)."""
        cfg, tensors = self.cfg, list(self.params.values())
        draw = common.draws(cfg.seed, step, "policy")
        self.active = choose(cfg.policy, self.distance, self.k, step, cfg.steps, draw).tolist()
        for i, tensor in enumerate(tensors):
            tensor.requires_grad_(i in self.active)
        self.old = [tensors[i].detach().clone() for i in self.active] if cfg.policy == "ils" else []
        self.history.append(torch.tensor([tensor.requires_grad for tensor in tensors]))

    def measure(self):
        """After the update: new distances for the active tensors. The frozen keep theirs, however old."""
        tensors = list(self.params.values())
        moved = [relative_change(old, tensors[i].detach()).double() for i, old in zip(self.active, self.old)]
        if moved:
            self.distance[self.active] = torch.stack(moved).cpu()
        self.old = []

    def state_dict(self):
        return {"distance": self.distance, "history": torch.stack(self.history)}
    def load_state_dict(self, state):
        self.distance, self.history = state["distance"].cpu(), list(state["history"].cpu())

def lr_scale(schedule, i, n):
    """Factor on the learning rate at step i of n, down to about 0; linear: most GLUE scripts. zero: CoLA and
    SQuAD, whose "warm-up 0.1" is a number of steps: the first factor is 0, so that the first active set gets
    distance 0 and never trains again (I20); no preset uses it."""
    return {"linear": (n + 1 - i) / (n + 1), "stsb": (n - i) / n, "vit": (n - i) / (n + 1),
            "zero": (n - i) / (n - 0.1) * (i > 0)}[schedule]

class AdamW(torch.optim.Optimizer):
    """The authors' AdamW: epsilon joins sqrt(v) before bias correction (at the first step it acts as 3e-5,
    not 1e-6), decay follows the update. A tensor without gradient is left alone: no momentum, no decay, no
    count (I14). Each has its own count, which bias correction needs where some train at every step."""
    def __init__(self, groups, lr, betas=(0.9, 0.999), eps=1e-6):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                m = state["m"].lerp_(p.grad, 1 - b1)
                v = state["v"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                size = group["lr"] * math.sqrt(1 - b2 ** state["step"]) / (1 - b1 ** state["step"])
                p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-size)
                p.mul_(1 - group["lr"] * group["weight_decay"])

def optimizer(model, cfg):
    """AdamW over all parameters in two groups: with weight decay, and without (biases and gains, or none).
    Official code differs: by a typing error five GLUE scripts decay the gains, too (digest 6.5)."""
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1 or cfg.decay_all) is decayed],
               "weight_decay": cfg.decay * decayed} for decayed in (True, False)]
    return (AdamW if cfg.adam == "authors" else torch.optim.AdamW)(groups, lr=cfg.lr)

def activation_bytes(cfg, B, active):
    """Bytes that B samples save for the backward pass, {"static": ..., "dynamic": ...}, (S8) to (S10).
    active: the names of the parameters that train. Counted while the loss is alive: each storage once, the
    blocks' inputs included; parameters, pixels, ids and labels not."""
    T = cfg.length if cfg.family == "bert" else (cfg.image // cfg.patch) ** 2 + 1
    d, N, S, drop = cfg.width, B * T * cfg.width, B * cfg.heads * T * T, cfg.dropout > 0
    block = (3 if cfg.products else 12) * N + (1 if cfg.probabilities else 4) * S       # q, k, v; P
    block += (2 if cfg.gelu else 16) * N + 2 * N * drop                             # GELU input; two masks
    # attention dropout: the mask of V; where it acts on P as in stock, P's mask and P once more
    block += (N if cfg.products or cfg.probabilities else 5 * S) * (cfg.attention_dropout > 0)
    # one slot of 4 N bytes an active tensor, one for query, key and value; the second MLP matrix: 4 N in int8
    slots = " ".join({re.sub("query|key|value", "qkv", name) for name in active}) + " "
    dynamic = 4 * N * len(re.findall(r"(?:qkv|out|mlp1|mlp2|pooler)\.weight |scale\d ", slots))
    gains, norms = len(re.findall(r"(?:norm\d?|final)\.weight ", slots)), 2 * cfg.depth + 1
    pruned = (norms - gains) * (8 * int(cfg.keep * N) + 4 * B * T)              # values, indices, 1 / sigma
    static = cfg.depth * block + (pruned if cfg.keep < 1 else norms * (4 * N + 8 * B * T))
    dynamic += 12 * N * slots.count("mlp2.weight") * (not cfg.mlp) + 4 * N * gains * (cfg.keep < 1)
    if cfg.family == "bert":                                  # mask of the embeddings; tanh and its mask
        static += N * drop + (4 + drop) * B * d * (cfg.target != "span")
    if "head.weight" in active:                               # a view of one token keeps the whole tensor
        dynamic += 4 * N if cfg.family == "vit" or cfg.target == "span" else 4 * B * d * drop
    static += {"class": 4 * B * cfg.classes + 4, "span": 8 * B * T + 4, "score": 4 * B}[cfg.target]
    return {"static": static, "dynamic": dynamic}

def saved_bytes(function, given):
    """(function(), bytes of the distinct storages that its graph keeps for backward, without `given`'s).
    A view keeps its whole storage, ten views of it keep it once, and what the graph has dropped by the end
    does not count; so the figure holds on any device, and no allocator blurs it (digest 7)."""
    alive = weakref.WeakSet()
    class Kept:                                               # lives as long as the graph needs the tensor
        def __init__(self, tensor):
            self.storage, self.tensor = tensor.untyped_storage(), tensor.detach()
            alive.add(self)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        value = function()
    skip = {tensor.untyped_storage().data_ptr() for tensor in given}
    sizes = {kept.storage.data_ptr(): kept.storage.nbytes() for kept in alive}
    return value, sum(size for place, size in sizes.items() if place not in skip)

KINDS = "static", "dynamic", "gradients", "snapshot", "weights", "moments"

def memory_account(model, cfg, B, active):
    """{kind: bytes} of a step on B samples whose trainable parameters are `active`, without and with Adam.
    Freezing spares activations and gradients; moments stay for every tensor that ever trained: all, after the
    sweep. The snapshot holds the old weights of the active tensors (the authors': of all eligible ones)."""
    size = {name: 4 * p.numel() for name, p in model.named_parameters()}
    copied = sum(size[name] for name in eligible(model, cfg) if name in active) if cfg.policy == "ils" else 0
    account = {**activation_bytes(cfg, B, active), "gradients": sum(size[name] for name in active),
               "snapshot": copied, "weights": sum(size.values())}
    account |= {"no moments": sum(account.values()), "moments": 2 * sum(size.values())}
    return account | {"total": account["no moments"] + account["moments"]}

# --- Training ----------------------------------------------------------------
def open_split(cfg, split):
    """(source, labels, names) of a split: texts, or data.Data; each one's class; the names of the classes."""
    if cfg.family == "bert":
        _, task, path = f"{cfg.data}::".split(":", 2)
        return data.glue(task, path.rstrip(":"), split)
    size = cfg.image if cfg.data.startswith(("shapes", "folder:")) else 0
    found = data.open_data(cfg.data, split, size, count=10_000 if split == "train" else 4_000)
    return found, found.labels, found.classes

def class_half(labels, K, half):
    """Positions of the samples of the first (1) or second half (2) of the K classes; 0: of all samples."""
    second = np.asarray(labels) >= K // 2
    return np.flatnonzero((half == 0) | (second == (half == 2)))

def vocabulary(cfg):
    """The vocabulary beside --weights: *vocab.txt or, as transformers 5 writes it, tokenizer.json."""
    beside = Path(cfg.weights) if Path(cfg.weights).is_dir() else Path(cfg.weights).parent
    found = [*sorted(beside.glob("*vocab.txt")), *beside.glob("tokenizer.json")]
    common.need(found, f"{beside / 'vocab.txt'}: neither this nor tokenizer.json is there")
    words = data.WordPiece(found[0], cfg.cased)
    rows = max(words.ids.values()) + 1
    common.need(rows == cfg.words, f"--words {cfg.words}: the vocabulary has {rows}")
    return words

def open_task(cfg, split, half=0):
    """(fetch, rows, names): fetch(rows) -> (inputs, labels) of samples, on the CPU; all rows; class names.
    half 1 or 2: only the rows of the first or second half of the classes (the demo pre-trains on one)."""
    source, labels, names = open_split(cfg, split)
    rows = class_half(labels, len(names), half)
    if cfg.family == "bert":
        words = vocabulary(cfg)
        ids = torch.tensor([words.encode(*([t] if type(t) is str else t), length=cfg.length) for t in source])
        return lambda rows: (ids[rows].unbind(1), torch.from_numpy(labels[rows])), rows, names
    shift, spread = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    def fetch(rows):
        x = source.pixels(rows)
        if x.shape[-1] != cfg.image:
            x = F.interpolate(x, (cfg.image, cfg.image), mode="bilinear", antialias=True)
        x = ((x + 1) / 2 - shift) / spread if cfg.pixels == "imagenet" else x
        return (x.to(shift.dtype),), torch.from_numpy(labels[rows])
    return fetch, rows, names

@torch.no_grad()
def evaluate(model, cfg, half=0):
    """Metrics on the test split: accuracy; of two classes also F1 (MRPC) and Matthews correlation (CoLA). Of
    GLUE that is dev, where the authors measure, too, without other rows to choose by (digest 6.15)."""
    fetch, rows, names = open_task(cfg, "test", half)
    device, counts = next(model.parameters()).device, torch.zeros(len(names), cfg.classes)
    for part in np.array_split(rows, -(-len(rows) // 128)):
        inputs, labels = fetch(part)
        guess = model.eval()(*(x.to(device) for x in inputs)).argmax(1).cpu()
        counts.index_put_((labels, guess), torch.ones(len(part)), accumulate=True)
    result = {"accuracy": (counts.diagonal().sum() / counts.sum()).item()}
    if counts.shape == (2, 2):
        (tn, fp), (fn, tp) = counts.tolist()
        result["f1"] = 2 * tp / max(1, 2 * tp + fp + fn)
        spread = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        result["matthews"] = (tp * tn - fp * fn) / max(1, spread) ** 0.5
    return result

def tune(cfg, arm, stage, steps, weights, half=0):
    """Train `arm`, cfg with some switches turned, from {name: tensor}; returns the table's row, the model.
    The row sets the measured bytes of the last step beside the formula's; on CUDA also the allocator's peak,
    which holds buffers, too, that live only for a moment: the paper's figures are such peaks."""
    device = common.device_of(cfg)
    fetch, rows, _ = open_task(cfg, "train", half)
    draws = [common.draws(cfg.seed, epoch, "data") for epoch in range(-(-steps * cfg.batch // len(rows)))]
    order = torch.cat([torch.randperm(len(rows), generator=draw) for draw in draws]).numpy()    # one an epoch
    run = common.Run(cfg, stage, steps)
    torch.manual_seed(common.draws(cfg.seed, half, "weights").initial_seed())
    model = Encoder(arm)
    load_weights(model, weights or model.state_dict(), cfg.weights)
    model.to(device).train()
    scheduler, opt = Scheduler(model, arm), optimizer(model, arm)
    start = run.restore(model=model, opt=opt, scheduler=scheduler)
    for block in model.blocks if cfg.compile else ():
        block.compile()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clock, saved = time.perf_counter(), math.nan
    for step in run.steps(start):
        inputs, labels = fetch(common.mine(rows[order[step * cfg.batch:][:cfg.batch]]))
        batch = [x.to(device) for x in inputs], labels.to(device)
        for group in opt.param_groups:
            group["lr"] = arm.lr * lr_scale(arm.schedule, step, steps)
        scheduler.freeze(step)                                # before forward, which decides what it saves
        common.seed_dropout(cfg.seed, step)
        opt.zero_grad()                                       # None: at 0, momentum would move frozen tensors
        value, saved = (loss(model, batch), saved) if not run.due(step, cfg.log) else saved_bytes(
            lambda: loss(model, batch), [*model.parameters(), *batch[0], batch[1]])
        value.backward()
        common.average_gradients(model.parameters())
        opt.step()
        scheduler.measure()
        run.log(step, loss=value)
        run.save(step)
    row = {"measured": saved, "s a step": (time.perf_counter() - clock) / (steps - start or math.nan)}
    row |= {"peak": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    if common.rank() or half == 1:
        return row, model
    heat_map(run.folder / f"active-{stage}.png", scheduler)
    idle = {name for name, on in zip(scheduler.params, scheduler.history[-1]) if not on}
    active = {name for name, _ in model.named_parameters()} - idle
    row = memory_account(model, arm, cfg.batch // common.world(), active) | row
    return row | evaluate(model, cfg, half), model

def train(cfg):
    """Fine-tune cfg; with --compare, in full and at each rate; with --pretrain, after pre-training. Full
    fine-tuning has a learning rate of its own: the authors' rates are 2 to 6 times the usual 2e-5 (digest 4).
    Each arm leaves a heat map, all of them together memory.svg and result.json."""
    if common.device_of(cfg).type == "cpu" and cfg.width <= 128:
        torch.set_num_threads(1)                              # so small that a second one would only wait
    weights, half = read_weights(cfg.weights) if cfg.weights else {}, 2 if cfg.pretrain else 0
    if cfg.pretrain:
        _, model = tune(cfg, stock(cfg), "pretrain", cfg.pretrain, weights, 1)
        weights = {name: p.detach() for name, p in model.named_parameters() if not name.startswith("head.")}
    rates = {f"rate-{rate}": replace(cfg, rate=float(rate)) for rate in cfg.compare.split(",") if rate}
    arms = {"full": stock(cfg), **rates} if rates else {"last": cfg}
    rows = {} if rates or common.rank() else {"stock": plan(cfg)["stock"]}
    rows |= {stage: tune(cfg, arm, stage, cfg.steps, weights, half)[0] for stage, arm in arms.items()}
    if common.rank():
        return 0
    table(rows)
    memory_bars(common.folder(cfg) / "memory.svg", rows)
    text = json.dumps(rows, indent=1).encode()
    common.write_atomic(common.folder(cfg) / "result.json", lambda file: file.write(text))
    if cfg.preset == "demo" and common.is_preset(cfg, PRESETS):
        print(f"target: accuracy {TARGET} at rate 0.75")
        return int(rows["rate-0.75"]["accuracy"] < TARGET)

# --- Command line ------------------------------------------------------------
def table(rows):
    """Print {run: {column: value}}, one line a run; bytes (whole numbers) in MB of 10^6."""
    print(f"{'MB':12}" + "".join(f"{column:>11}" for column in max(rows.values(), key=len)))
    for name, row in rows.items():
        cells = (f"{v / 1e6:11,.2f}" if isinstance(v, int) else f"{v:11.3f}" for v in row.values())
        print(f"{name:12}" + "".join(cells))

def memory_bars(path, rows, unit="MB", size=1e6):
    """Draw {run: memory account} as an SVG: a bar a run, a colour a kind, the total behind it."""
    scale, colors = 500 / max(row["total"] for row in rows.values()), dict(zip(KINDS, common.COLORS))
    parts = [common.svg_text(160 + 84 * i, 20, kind, "start", f'fill="{color}" font-weight="bold"')
             for i, (kind, color) in enumerate(colors.items())]
    for i, (run, row) in enumerate(rows.items()):
        x, y = 160.0, 36 + 26 * i
        parts.append(common.svg_text(x - 8, y + 14, run, "end"))
        for kind, color in colors.items():
            parts.append(f'<path d="M{x:.1f} {y}h{scale * row[kind]:.1f}v19H{x:.1f}" fill="{color}"/>')
            x += scale * row[kind]
        parts.append(common.svg_text(x + 6, y + 14, f"{row['total'] / size:.1f} {unit}", "start"))
    common.svg(path, 750, 44 + 26 * len(rows), parts)

def heat_map(path, scheduler):
    """Which tensor (row) trained at which step (column): dark where it did."""
    share = F.interpolate(torch.stack(scheduler.history).T[None].float(), 600, mode="area")[0]
    strips = (255 - 215 * share)[:, None, None].expand(-1, 1, 10, -1).byte()
    names = [re.sub(r"blocks\.|\.weight", "", name) for name in scheduler.params]
    common.png(path, common.grid(strips, 1, names, [f"steps 1 to {len(scheduler.history)}"]))

def plan(cfg):
    """The memory accounts, by formula, of one process's step: stock; SlimFit with all frozen that may be; the
    worst case, where each active tensor fills a slot of its own. Nothing runs: the model is an outline."""
    with torch.device("meta"):
        model = Encoder(cfg)
    B, every, may = cfg.batch // common.world(), dict(model.named_parameters()), eligible(model, cfg)
    k, floor = Scheduler(model, cfg).k, set(every) - set(may)
    worst = sorted(may, key=lambda name: not re.search(r"(key|out|mlp\d)\.weight", name))[:k]
    print(f"{sum(p.numel() for p in every.values()):,} parameters, {len(every)} tensors, {len(may)} eligible "
          f"({len(may) - k} frozen and {k} active at a step), batch {B}")
    return {"stock": memory_account(model, stock(cfg), B, set(every)),
            "all frozen": memory_account(model, cfg, B, floor),
            "worst case": memory_account(model, cfg, B, floor | set(worst))}

def examine(cfg):
    """--sample: the test metrics of a checkpoint, its weights' bytes and the seconds that it took."""
    clock, device = time.perf_counter(), common.device_of(cfg)
    model = Encoder(cfg).to(device)
    common.load_into({"model": model}, common.read_checkpoint(cfg.sample, "slimfit", device), cfg.sample)
    row = evaluate(model, cfg, 2 if cfg.pretrain else 0)
    row |= {"weights": sum(4 * p.numel() for p in model.parameters()), "seconds": time.perf_counter() - clock}
    table({"test": row})

def main(cfg):
    """Plan, evaluate or train; returns the exit code."""
    return common.rank() == 0 and table(plan(cfg)) if cfg.plan else examine(cfg) if cfg.sample else train(cfg)

if __name__ == "__main__":
    common.launch(main, common.cli(Config, PRESETS, __doc__))
