"""ARFlow: Autoregressive Flow with Hybrid Linear Attention (arXiv 2501.16085)

A flow-matching transformer that remembers. It trains on sequences of n different pictures of one class, the
noisiest first, and predicts the velocity of each. Attention is full softmax inside an image; across images a
gated linear attention runs, whose whole memory is one d x d matrix S a head. In sampling, the sequence is the
denoising trajectory itself: each step reads S, then writes the current noisy image into it. (So S holds other
pictures in training and the picture's own past in sampling: a mismatch by design.)

    image 1 (noisiest)      image 2                 image n (cleanest)
    [softmax inside] --S--> [softmax inside] --S--> [softmax inside]        S <- gamma S + K^T V
       velocity 1              velocity 2              velocity n

Run:      python arflow.py                          demo: learns to draw shapes in 3 minutes, leaves pictures
          python arflow.py --gpus 2                 the same in two processes
          python arflow.py --preset small           CIFAR-10, one GPU
          python arflow.py --preset ARFlow-XL/2@256 --data latents:imagenet256.npz --gpus 8
          python arflow.py --sample runs/arflow/demo/last.pt --classes 6,9 --scale 3
Faithful: sequences, times, conditioning, block, hybrid attention, initialisation, loss, optimizer, sampler
          and guidance as in the authors' code. Labels A1 to A22 number its equations in the order of the
          method: data A1-A6, network A7-A10, attention A11-A20, sampler A21-A22 (the paper's are unknown).
Scaled:   the demo's model, its learning rate with warm-up and decay, its EMA, its 50 calls: see PRESETS.
Left out: making VAE latents (vitok.py exports its own, the README shows how to cache SD-VAE's); FID itself
          (--export NAME.npz writes what the ADM suite of evaluations reads).
Letters:  B sequences, n images a sequence, C channels, h w sides of an image or latent, p patch, N tokens an
          image, D width, H heads, d = D/H, K classes (label K: none). Time: t = 0 is noise, t = 1 is data.
CUDA:     never run on CUDA.
Read in this order: hybrid, Attention, Block, ARFlow, draw, loss, sample, train. Fifteen minutes.
"""

import copy
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
import data

# --- Configuration -----------------------------------------------------------

@dataclass
class Config:
    preset: str = "demo"                             # where the values below start from
    data: str = "shapes"                             # shapes, cifar10, npz:PATH, folder:PATH or latents:PATH
    size: int = 32                                   # image side in pixels; with latents, the latent's side
    patch: int = 2                                   # patch side p; N = (size / p)^2 tokens an image
    width: int = 768                                 # token width D
    depth: int = 12                                  # number of blocks
    heads: int = 12                                  # attention heads H
    images: int = 5                                  # images a sequence n; 1 is ARFlow without context
    block: Literal["arflow", "sit"] = "arflow"       # sit: the SiT baseline, with --images 1
    query_decay: bool = True                         # exp(G) on the query side (A15); off is an ablation
    flip: bool = True                                # flip each image left-right with probability 1/2
    label_dropout: float = 0.1                       # share of sequences trained without their label
    steps: int = 400_000                             # optimizer steps (v1, 128 px; for 256 px unknown)
    batch: int = 8                                   # sequences a step, over all processes
    lr: float = 1e-4                                 # learning rate of AdamW, constant in the paper
    warmup: int = 0                                  # our choice, for short runs: steps of rising lr
    cooldown: float = 0.0                            # our choice: share of the steps of falling lr
    clip: float = 3.0                                # gradients are clipped by VALUE to [-clip, clip]
    ema: float = 0.9999                              # decay of the averaged weights, which are sampled from
    calls: int = 250                                 # network calls R of the sampler
    scale: float = 1.5                               # classifier-free guidance; 1 is none
    guided: int = 0                                  # guided channels; 0: all of pixels, 3 of latents
    context: Literal["carry", "reset"] = "carry"     # keep S along the trajectory, or forget it at every call
    classes: str = "all"                             # with --sample: labels as 3,5; all: each in turn
    count: int = 1000                                # images sampled for the metric or by --sample
    export: str = ""                                 # with --sample: also NAME.npz, for the ADM suite's FID
    seed: int = 0                                    # every random number is a function of (seed, step)
    gpus: int = 1                                    # processes, one a GPU; without GPUs they share the CPU
    device: str = "auto"                             # auto, cpu or cuda
    bf16: bool = False                               # bf16 autocast on CUDA, attention in fp32; paper: TF32
    compile: bool = False                            # torch.compile for the blocks
    name: str = ""                                   # run folder runs/arflow/NAME; default: the preset
    resume: bool = False                             # go on from runs/arflow/NAME/last.pt
    sample: str = ""                                 # checkpoint to draw from, instead of training
    out: str = ""                                    # folder of --sample; default: samples/ beside CHECKPOINT
    log: int = 100                                   # steps between log lines
    save: int = 5000                                 # steps between checkpoints and preview pictures

    # what --sample may change
    sampling = ("calls", "scale", "guided", "context", "classes", "count", "export", "out")

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 18)}       # D, depth, H
PRESETS = {
    # 16 px, drawn shapes, two CPU cores
    "demo": dict(size=16, width=64, depth=4, heads=2, flip=False, steps=4400, batch=2, lr=3e-3, warmup=50,
                 cooldown=0.5, ema=0.99, calls=50, scale=3.0, count=200, save=2200),
    # CIFAR-10 for one GPU; planned for under an hour, not yet run.
    "small": dict(data="cifar10", width=256, depth=8, heads=4, steps=60_000, batch=32, lr=3e-4, ema=0.999),
}
PRESETS |= {                                         # the paper's models, on latents of 1/8 of the side
    f"ARFlow-{letter}/{p}@{pixels}": dict(
        name=f"ARFlow-{letter}-{p}-{pixels}", data=f"latents:imagenet{pixels}.npz", size=pixels // 8, patch=p,
        width=D, depth=depth, heads=16 if H == 18 and p > 2 else H)
    for letter, (D, depth, H) in SIZES.items() for p in (2, 4, 8) for pixels in (128, 256)}

LAST_TIME = 0.96                                     # the SDE's grid ends here as in the official sampler
ENOUGH = 65                                          # samples: fewer have no covariance of 64 features
# Class accuracy of the demo's 200 samples, mean - 4 s.d. of seeds 0 to 4: .83, .79, .745, .87, .85.
TARGET = 0.61

def check(cfg):
    """Every mistake that can be seen without the data; UserError with one line."""
    need = common.need
    minimum = dict(size=1, patch=1, width=4, depth=1, heads=1, images=1, count=1, calls=2, warmup=0, guided=0)
    for name, least in minimum.items():
        need(getattr(cfg, name) >= least, f"--{name} {getattr(cfg, name)}: must be at least {least}")
    for name in ("label_dropout", "cooldown", "ema"):
        need(0 <= getattr(cfg, name) <= 1, f"--{name} {getattr(cfg, name)}: must lie in [0, 1]")
    need(cfg.clip > 0, f"--clip {cfg.clip}: must be above 0")
    need(0 <= cfg.scale < math.inf, f"--scale {cfg.scale}: must be a number from 0 up")
    need(cfg.size % cfg.patch == 0, f"--patch {cfg.patch}: must divide --size {cfg.size}")
    need(cfg.width % cfg.heads == 0, f"--heads {cfg.heads}: must divide --width {cfg.width}")
    need(cfg.width % 4 == 0, f"--width {cfg.width}: must be a multiple of 4 (the position table)")
    need(cfg.block == "arflow" or cfg.images == 1, "--block sit: has no context; add --images 1")
    form = re.fullmatch(r"all|\d+(,\d+)*", cfg.classes)
    need(form, f"--classes {cfg.classes}: write all, or labels as 3,5")
    need(cfg.sample or cfg.classes == "all", f"--classes {cfg.classes}: goes with --sample CHECKPOINT")
    for name in ("export", "out"):
        value = getattr(cfg, name)
        need(cfg.sample or not value, f"--{name} {value}: goes with --sample CHECKPOINT")

def open_split(cfg, split, count=20_000):
    """The data's 'train', 'test' or 'judge' split; UserError where it does not fit the configuration."""
    found = data.open_data(cfg.data, split, size=cfg.size, count=count)
    shape = found.images.shape
    fits = len(shape) == 4 and shape[2] == shape[3] == cfg.size
    common.need(fits, f"--size {cfg.size}: {cfg.data} holds {tuple(shape)}, not (M, C, size, size)")
    common.need(cfg.guided <= shape[1], f"--guided {cfg.guided}: {cfg.data} has {shape[1]} channels")
    if split == "train":
        few, name = min((len(index), name) for index, name in zip(found.by_class, found.classes))
        common.need(few >= cfg.images, f"--images {cfg.images}: class {name} of {cfg.data} has only {few}")
    return found

def measured(cfg):
    """Whether a run ends with class accuracy and Frechet distance.

    Not on latents (the ruler judges pictures), and not after a few steps, which nobody wants to wait for.
    """
    return cfg.steps >= 200 and not cfg.data.startswith("latents:")

def prepare(cfg):
    """Once, before the processes start: downloads, packing, the ruler; says what the end will not measure."""
    if cfg.sample:
        return
    train = open_split(cfg, "train")
    if measured(cfg):
        need, few = common.need, 2 * len(train.classes)
        judge, test = open_split(cfg, "judge"), open_split(cfg, "test", 2 * cfg.count)
        need(len(judge) >= few, f"{cfg.data}: {len(judge)} pictures to learn the ruler from; it needs {few}")
        common.judge(judge, "ruler")
        if min(cfg.count, len(test) // 2) < ENOUGH:
            print(f"no Frechet distance at the end: it needs {ENOUGH} samples and {2 * ENOUGH} test images, "
                  f"and there are {cfg.count} and {len(test)}", flush=True)

# --- Building blocks ---------------------------------------------------------

def rms_norm(x):
    """x over its root mean square along the last axis; no weight (A12, A20)."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)

def hybrid(q, k, v, l, S, query_decay=True):
    """Hybrid attention as a loop over images (A15 to A18): softmax inside, the state S across images.

    q, k, v (B, n, H, N, d), k already times d^-1/2; l (B, n, H, N), the log gates <= 0; S (B, H, d, d), zeros
    at the start of a sequence. Returns the output (B, n, H, N, d) and the state after the last image.
    """
    out = []
    for Q, K, V, log_gate in zip(q.unbind(1), k.unbind(1), v.unbind(1), l.unbind(1)):      # an image, a chunk
        inside = F.scaled_dot_product_attention(Q, K, V, scale=1.0)                             # (B, H, N, d)
        past = Q @ S                                                                            # (B, H, N, d)
        if query_decay:                                                 # A15: running sum, token by token
            past = log_gate.cumsum(-1).exp()[..., None] * past                                  # (B, H, N, d)
        out.append(inside + past)                                       # A17
        gamma = log_gate.mean(-1).exp()[..., None, None]                # A16: not the sum      # (B, H, 1, 1)
        S = gamma * S + K.transpose(-2, -1) @ V                         # A18: after reading    # (B, H, d, d)
    return torch.stack(out, 1), S                                              # (B, n, H, N, d), (B, H, d, d)

def hybrid_matrix(q, k, v, l, query_decay=True):
    """The same output as one masked product O = M V over all n N tokens (A19): what `hybrid` must equal.

    Quadratic in n; takes no incoming state. Shapes as in `hybrid`; returns the output alone.
    """
    B, n, H, N, d = q.shape
    q, k, v = (x.transpose(1, 2).flatten(2, 3) for x in (q, k, v))                       # each (B, H, n*N, d)
    image = torch.arange(n * N, device=q.device) // N                                                  # (n*N)
    same = image[:, None] == image                                                                # (n*N, n*N)
    scores = q @ k.transpose(-2, -1)                                                        # (B, H, n*N, n*N)
    inside = scores.masked_fill(~same, -torch.inf).softmax(-1)                              # (B, H, n*N, n*N)
    l = l.transpose(1, 2)                                                                       # (B, H, n, N)
    total = l.mean(-1).cumsum(-1)                                                                  # (B, H, n)
    age = (total - l.mean(-1))[..., image, None] - total[..., None, image]   # A16          # (B, H, n*N, n*N)
    if query_decay:
        age = age + l.cumsum(-1).flatten(2)[..., None]                  # A15               # (B, H, n*N, n*N)
    past = scores * torch.where(image[:, None] > image, age, -torch.inf).exp()              # (B, H, n*N, n*N)
    out = (inside + past) @ v                                                                 # (B, H, n*N, d)
    return out.unflatten(2, (n, N)).transpose(1, 2)                                          # (B, n, H, N, d)

class Attention(nn.Module):
    """Hybrid attention with projections, norms, decay gate and output gate (A11 to A20); always in fp32."""

    def __init__(self, D, H, query_decay):
        super().__init__()
        self.heads, self.query_decay = H, query_decay
        self.q, self.k, self.v, self.z, self.out = (nn.Linear(D, D, bias=False) for _ in range(5))
        self.gate = nn.Linear(D, H, bias=False)                         # how fast each head forgets

    def forward(self, x, c, S):
        """x (B, n, N, D), conditioning c (B, n, D), state S (B, H, d, d) -> the same shapes for x and S."""
        B, n, N, D = x.shape
        H = self.heads
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.q.weight.dtype)                                                       # (B, n, N, D)
            # A12: unit scale for all that S will add up; over the full width, before the split into heads
            q, k, v = (rms_norm(project(x)) for project in (self.q, self.k, self.v))       # each (B, n, N, D)
            q, k, v = (y.unflatten(-1, (H, -1)).transpose(2, 3) for y in (q, k, v))     # each (B, n, H, N, d)
            # A11: c as it is, without the block's SiLU: time and label may decide what to forget
            a = self.gate(x + c[:, :, None])                                                    # (B, n, N, H)
            # A13: sigmoid(a)^(1/16) starts near 0.96, a memory of some 23 images
            l = F.logsigmoid(a).transpose(2, 3) / 16                                            # (B, n, H, N)
            # A14: scaled once, for the softmax and for the state
            k = k * (D // H) ** -0.5                                                         # (B, n, H, N, d)
            o, S = hybrid(q, k, v, l, S, self.query_decay)                     # (B, n, H, N, d), (B, H, d, d)
            # A20: S grows without a denominator; this norm, head by head, is what keeps the output in bounds
            o = rms_norm(o).transpose(2, 3).flatten(3)                                          # (B, n, N, D)
            return self.out(o * F.silu(self.z(x))), S                             # (B, n, N, D), (B, H, d, d)

class PlainAttention(nn.Module):
    """SiT's attention, for --block sit: biased projections, softmax in each image; no norm, gate or state."""

    def __init__(self, D, H):
        super().__init__()
        self.heads = H
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x, c, S):
        """As Attention.forward; c is not used and S comes back unchanged."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))                              # (B, n, N, 3, H, d)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)                                         # each (B, n, H, N, d)
        o = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(3)                  # (B, n, N, D)
        return self.out(o), S                                                     # (B, n, N, D), (B, H, d, d)

class Block(nn.Module):
    """Transformer block whose norms are modulated by the image's time and label (adaLN-zero, A9).

    Shifts s, scales r, gates g come from the conditioning and start at zero: a new block does nothing.
    """

    def __init__(self, D, H, block, query_decay):
        super().__init__()
        self.norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(D, H, query_decay) if block == "arflow" else PlainAttention(D, H)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(approximate="tanh"), nn.Linear(4 * D, D))
        self.modulation = nn.Linear(D, 6 * D)

    def forward(self, x, c, S):
        """x (B, n, N, D), c (B, n, D), S (B, H, d, d) -> new x and S."""
        s1, r1, g1, s2, r2, g2 = self.modulation(F.silu(c))[:, :, None].chunk(6, -1)       # each (B, n, 1, D)
        o, S = self.attention(self.norm(x) * (1 + r1) + s1, c, S)                 # (B, n, N, D), (B, H, d, d)
        x = x + g1 * o                                                                          # (B, n, N, D)
        x = x + g2 * self.mlp(self.norm(x) * (1 + r2) + s2)                                     # (B, n, N, D)
        return x, S                                                               # (B, n, N, D), (B, H, d, d)

# --- Model -------------------------------------------------------------------

def position_table(side, D):
    """The frozen 2-D sine table (N, D), one for all images: columns first, then rows (A7)."""
    w = 10_000.0 ** (-torch.arange(D // 4, dtype=torch.float64) / (D // 4))
    angle = torch.arange(side)[:, None] * w
    line = torch.cat([angle.sin(), angle.cos()], -1)                                             # (side, D/2)
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, 0)
    return torch.cat([columns, rows], -1)

def time_waves(t):
    """The 256 cosines and sines of t in [0, 1], not of 1000 t (A8): t (B, n) -> (B, n, 256)."""
    f = 10_000.0 ** (-torch.arange(128, device=t.device, dtype=t.dtype) / 128)
    return torch.cat([(t[..., None] * f).cos(), (t[..., None] * f).sin()], -1)

class ARFlow(nn.Module):
    """The velocity network. It keeps `latent_scale`, one or one a channel, for who decodes its samples."""

    def __init__(self, cfg, channels, classes, latent_scale=1.0):
        super().__init__()
        D, p = cfg.width, cfg.patch
        self.patch, self.heads, self.channels, self.classes = p, cfg.heads, channels, classes
        self.embed = nn.Conv2d(channels, D, p, stride=p)
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.label = nn.Embedding(classes + 1, D)                       # the last row stands for "no label"
        self.blocks = nn.ModuleList(Block(D, cfg.heads, cfg.block, cfg.query_decay) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(D, 2 * D)
        self.out = nn.Linear(D, p * p * 2 * channels)                   # A10: 2 C as in DiT, half unused
        self.register_buffer("positions", position_table(cfg.size // p, D).float(), persistent=False)
        self.register_buffer("latent_scale", torch.as_tensor(latent_scale, dtype=torch.float32))
        self.initialise()

    def initialise(self):
        """Xavier for the projections, N(0, .02) for the embeddings, zero where the output must start at 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))       # the patch convolution as a Linear
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for weight in (self.label.weight, self.time[0].weight, self.time[2].weight):
            nn.init.normal_(weight, std=0.02)
        for linear in (*(block.modulation for block in self.blocks), self.modulation, self.out):
            nn.init.zeros_(linear.weight)

    def forward(self, x, t, y, states=None):
        """Noisy images x (B, n, C, h, w), times t (B, n), labels y (B,), states from earlier images or None.

        Returns the velocities (B, n, C, h, w) and the states, one (B, H, d, d) a block, to pass on.
        """
        B, n, C, h, w = x.shape
        p, D, H = self.patch, self.label.embedding_dim, self.heads
        c = self.label(y)[:, None] + self.time(time_waves(t))                                      # (B, n, D)
        x = self.embed(x.flatten(0, 1)).flatten(2).transpose(1, 2) + self.positions              # (B*n, N, D)
        x = x.unflatten(0, (B, n))                                                              # (B, n, N, D)
        empty = x.new_zeros(B, H, D // H, D // H, dtype=c.dtype)                                # (B, H, d, d)
        states = states or [empty] * len(self.blocks)                                      # each (B, H, d, d)
        after = []
        for block, S in zip(self.blocks, states):
            x, S = block(x, c, S)                                                 # (B, n, N, D), (B, H, d, d)
            after.append(S)
        s, r = self.modulation(F.silu(c))[:, :, None].chunk(2, -1)                # (B, n, 1, D), (B, n, 1, D)
        x = self.out(self.norm(x) * (1 + r) + s)                                          # (B, n, N, p*p*2*C)
        x = x.view(B, n, h // p, w // p, p, p, 2 * C)[..., :C]          # A10    # (B, n, h//p, w//p, p, p, C)
        x = x.permute(0, 1, 6, 2, 4, 3, 5).reshape(B, n, C, h, w)                            # (B, n, C, h, w)
        return x, after                                                        # (B, n, C, h, w), (B, H, d, d)

# --- Objective ---------------------------------------------------------------

def interpolate(x1, x0, t):
    """The straight path from noise x0 (t = 0) to data x1 (t = 1), and its velocity (A4)."""
    t = t.view(*t.shape, *[1] * (x1.ndim - t.ndim))
    return t * x1 + (1 - t) * x0, x1 - x0

def loss(model, batch, draws):
    """Mean squared velocity error over all positions of the sequence (A5).

    batch: images x1 (B, n, C, h, w) in [-1, 1] or latents, labels y (B,).
    draws: sorted times t (B, n) (A2), own noise x0 for every image (A3), drop (B,): lose the label (A6).
    """
    (x1, y), (t, x0, drop) = batch, draws
    x, u = interpolate(x1, x0, t)
    v, _ = model(x, t, y.masked_fill(drop, model.classes))              # one label, or none, a sequence
    return (v.to(u.dtype) - u).square().mean()

# --- Sampling ----------------------------------------------------------------

def guide(model, x, t, y, states, scale, guided):
    """One network call with classifier-free guidance (A22): x (B, C, h, w) -> velocity (B, C, h, w), states.

    Both branches are rows of one batch: each carries its own state, both read the same guided trajectory x.
    The first `guided` channels are guided (in the official code 3 of 4), the others stay conditional. With
    scale 1 there is one branch alone, and its states.
    """
    if scale == 1:
        v, states = model(x[:, None], x.new_full((len(x), 1), t), y, states)
        return v[:, 0], states
    both, labels = torch.cat([x, x]), torch.cat([y, torch.full_like(y, model.classes)])
    v, states = model(both[:, None], x.new_full((len(both), 1), t), labels, states)
    conditional, free = v[:, 0].chunk(2)
    mixed = free + scale * (conditional - free)
    return torch.cat([mixed[:, :guided], conditional[:, guided:]], 1), states

@torch.no_grad()
def sample(model, y, generator, calls=250, scale=1.0, guided=0, context="carry"):
    """Draw one image a label by the reverse SDE with diffusion w = 1 - t (A21), from noise at t = 0 to data.

    y (B,) labels; generator on the model's device; guided 0 means all channels. Returns images (B, C, h, w)
    and the trajectory: calls + 1 noisy images on the CPU. S starts empty for each batch; context "reset"
    empties it at every step. One network call a step: a second one would write into S twice.
    """
    side, C = round(len(model.positions) ** 0.5) * model.patch, model.channels
    device = model.positions.device
    x = torch.randn(len(y), C, side, side, generator=generator, device=device)
    times = torch.linspace(0, LAST_TIME, calls)
    dt = float(times[1] - times[0])
    states, trajectory = None, [x.cpu()]
    for i, t in enumerate(times.tolist()):
        v, states = guide(model, x, t, y, states, scale, guided or C)
        states = states if context == "carry" else None
        # The SDE wants v + w score. Noise is known from the velocity, score = (t v - x) / (1 - t), so with
        # w = 1 - t the sum is exact and needs no second call:
        drift = (1 + t) * v - x
        if i < calls - 1:
            noise = torch.randn(x.shape, generator=generator, device=device)
            x = x + dt * drift + (2 * (1 - t) * dt) ** 0.5 * noise
        else:
            x = x + (1 - LAST_TIME) * drift                             # the last step: the mean, no noise
        trajectory.append(x.cpu())
    return x, trajectory

def sample_many(model, cfg, labels):
    """sample() in blocks of 100: images (M, C, h, w), and 9 moments of the first 100 (100, 9, C, h, w)."""
    device = model.positions.device
    guided = cfg.guided or (3 if cfg.data.startswith("latents:") else 0)
    context = cfg.context if cfg.images > 1 else "reset"                # n = 1 never learnt to read a state
    moments = [round(i * (cfg.calls - 1) / 8) for i in range(8)] + [cfg.calls]
    images, ways = [], []
    for start in tqdm(range(0, len(labels), 100), desc="sampling", disable=len(labels) <= 100, leave=False):
        y = torch.as_tensor(labels[start:start + 100], device=device)
        generator = common.draws(cfg.seed, start, "sample", device)
        x, trajectory = sample(model, y, generator, cfg.calls, cfg.scale, guided, context)
        images.append(x.cpu())
        ways = ways or [torch.stack([trajectory[i] for i in moments], 1)]
    return torch.cat(images), ways[0]

# --- Training ----------------------------------------------------------------

def draw(dataset, cfg, step, device):
    """One step's batch and draws for `loss`, drawn for the global batch, cut to this rank (A1 to A3, A6).

    Returns (x1 (B, n, C, h, w), y (B,)) and (t (B, n), x0 (B, n, C, h, w), drop (B,)), a rank's share of B.
    B labels first, uniform over the classes, then n different images of each, each with its own flip.
    """
    B, n, small = cfg.batch, cfg.images, common.draws(cfg.seed, step, "data")
    y = torch.randint(len(dataset.classes), (B,), generator=small)
    rows = [dataset.by_class[k] for k in y]
    index = np.stack([row[torch.randperm(len(row), generator=small)[:n].numpy()] for row in rows])
    flip = (torch.rand(B, n, generator=small) < 0.5) & cfg.flip
    t = torch.rand(B, n, generator=small).sort(1).values                # A2: ascending, as the code has it
    drop = torch.rand(B, generator=small) < cfg.label_dropout
    index, flip = common.mine(index).reshape(-1), common.mine(flip).reshape(-1)
    if dataset.latent:
        shape = (B, n, *dataset.images.shape[1:])
        noise = common.mine(torch.randn(shape, generator=small)).flatten(0, 1)
        x1 = dataset.latents(index, flip, noise)                        # A1: drawn from the VAE's posterior
    else:
        x1 = dataset.pixels(index)
        x1 = torch.where(flip[:, None, None, None], x1.flip(-1), x1)
    x1 = x1.unflatten(0, (-1, n)).to(device)
    large = common.draws(cfg.seed, step, "noise", device)
    x0 = torch.randn(B, *x1.shape[1:], generator=large, device=device)  # A3: each image has its own noise
    x0 = common.mine(x0)
    y, t, drop = (common.mine(value).to(device) for value in (y, t, drop))
    return (x1, y), (t, x0, drop)

def learning_rate(cfg, step):
    """Constant in the paper. Our choice for short runs: a linear rise, then a linear fall to 2 %."""
    left = (cfg.steps - step) / max(1, cfg.steps * cfg.cooldown)       # never below 1 without a cooldown
    return cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup), 0.02 + 0.98 * left)

def optimizer(model, cfg):
    """AdamW; weight decay .02 on tensors of two and more dimensions, the label table too, none on biases."""
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.02},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)

def train(cfg):
    """Train on sequences of one class, save, draw; returns the exit code (1: the demo missed its target)."""
    device = common.device_of(cfg)
    dataset = open_split(cfg, "train")
    run = common.Run(cfg)
    torch.manual_seed(common.draws(cfg.seed, 0, "weights").initial_seed())
    # Initial weights too are a function of the seed alone, on any number of processes.
    model = ARFlow(cfg, dataset.images.shape[1], len(dataset.classes), dataset.scale).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    opt = optimizer(model, cfg)
    start = run.restore(model=model, ema=ema, opt=opt)
    if cfg.compile:                                                     # in place: the EMA's copy stays eager
        for block in model.blocks:
            block.compile()
    for step in run.steps(start):
        batch, draws = draw(dataset, cfg, step, device)
        for group in opt.param_groups:
            group["lr"] = learning_rate(cfg, step)
        with common.autocast(cfg):
            value = loss(model, batch, draws)
        opt.zero_grad()
        value.backward()
        common.average_gradients(model.parameters())
        nn.utils.clip_grad_value_(model.parameters(), cfg.clip)
        opt.step()
        common.ema_update(ema, model, cfg.ema)
        run.log(step, loss=value)
        run.save(step)
        # a look on the way; sampling has its own generators and changes nothing
        if run.due(step, cfg.save) and step + 1 < cfg.steps and not dataset.latent and common.rank() == 0:
            preview(run, ema, cfg, dataset, count=2)
    code = finish(run, ema, cfg, dataset) if common.rank() == 0 else 0
    return code if start < cfg.steps else 0                             # a finished run only shows its result

def preview(run, ema, cfg, dataset, count):
    """Draw `count` samples of each of the first ten classes and put the pictures into the run's folder."""
    K = min(10, len(dataset.classes))
    labels = np.arange(K * count) % K
    images, ways = sample_many(ema, cfg, labels)
    pictures(run.folder, images, ways, labels, dataset.classes)

def pictures(where, images, ways, labels, names):
    """samples.png (a row a class), trajectory.png (a row a sample), denoising.png (animated), of <= 100."""
    labels = labels[:len(ways)]
    order = np.argsort(labels, kind="stable")
    shown = [label for label in dict.fromkeys(labels[order])][:10]
    columns = min(8, min(int((labels == label).sum()) for label in shown))
    rows = np.concatenate([order[labels[order] == label][:columns] for label in shown])
    scale = max(1, 48 // images.shape[-1])
    titles = [names[label] for label in shown]
    moments = common.to_uint8(ways[rows])
    common.png(where / "samples.png", common.grid(moments[:, -1], columns, titles, scale=scale))
    firsts = moments[::columns]
    times = [f"t={LAST_TIME * i / 8:.2f}" for i in range(8)] + ["sample"]
    common.png(where / "trajectory.png", common.grid(firsts.flatten(0, 1), 9, titles, times, scale=scale))
    frames = [common.grid(moments[:, i], columns, titles, scale=scale) for i in [*range(9), 8, 8, 8, 8]]
    common.png(where / "denoising.png", np.stack(frames), seconds=0.25)

def nearest(where, images, dataset):
    """nearest.png: samples above the training images nearest to them."""
    pair = torch.cat([images, common.nearest(images, dataset)])
    scale = max(1, 48 // images.shape[-1])
    picture = common.grid(common.to_uint8(pair), len(images), ["sample", "train"], scale=scale)
    common.png(where / "nearest.png", picture)

def finish(run, ema, cfg, dataset):
    """The end of a run: pictures, and what the ruler says of cfg.count samples; returns the exit code.

    The ruler is a small classifier that no training has seen; its class accuracy is checked against TARGET
    in a run of exactly the demo's settings.
    """
    if dataset.latent:
        run.say(f"done; draw with: python arflow.py --sample {run.checkpoint}")
        return 0
    if not measured(cfg):
        preview(run, ema, cfg, dataset, count=2)
        return 0
    labels = np.arange(cfg.count) % len(dataset.classes)
    images, ways = sample_many(ema, cfg, labels)
    pictures(run.folder, images, ways, labels, dataset.classes)
    nearest(run.folder, images[:10], dataset)
    result = measure(images, labels, cfg)
    common.write_atomic(run.folder / "result.json", lambda file: file.write(json.dumps(result).encode()))
    target = TARGET if cfg.preset == "demo" and common.is_preset(cfg, PRESETS) else 0.0
    run.say(f"{run.folder}/samples.png, trajectory.png, denoising.png, nearest.png")
    run.say(f"{cfg.count} samples at guidance {cfg.scale}: class accuracy {result['accuracy']:.3f}")
    if result["distance"] is not None:
        told = "toy Frechet distance of {N} samples {distance:.1f} (real against real {floor:.1f})"
        run.say(told.format(**result))
    if target:
        run.say(f"target {target}: {'reached' if result['accuracy'] >= target else 'MISSED'}")
    return 0 if result["accuracy"] >= target else 1

def measure(images, labels, cfg):
    """The ruler's class accuracy, Frechet distance to test images, and that distance between test images.

    Both distances are None where there are not ENOUGH samples or test images for them.
    """
    ruler = common.judge(open_split(cfg, "judge"), "ruler")
    test = open_split(cfg, "test", 2 * len(images))
    N = min(len(images), len(test) // 2)                                # one N for both distances
    result = {"N": N, "accuracy": common.accuracy(ruler, images, labels), "distance": None, "floor": None}
    if N >= ENOUGH:
        real = ruler.features(test.pixels(np.arange(2 * N)))
        result["distance"] = common.frechet(ruler.features(images[:N]), real[:N])
        result["floor"] = common.frechet(real[N:], real[:N])
    return result

# --- Command line ------------------------------------------------------------

def sample_checkpoint(cfg):
    """--sample: draw from a checkpoint's averaged weights, into --export and --out; its run stays as it is.

    Without both: into samples/ beside the checkpoint. --export alone writes no pictures.
    """
    device = common.device_of(cfg)
    saved = common.read_checkpoint(cfg.sample, "arflow", device)
    weights = saved["state"]["ema"]
    K = len(weights["label.weight"]) - 1
    C = weights["embed.weight"].shape[1]
    ema = ARFlow(cfg, C, K, weights["latent_scale"]).to(device).requires_grad_(False)
    common.load_into({"ema": ema}, saved, cfg.sample)
    chosen = np.arange(K) if cfg.classes == "all" else np.array([int(k) for k in cfg.classes.split(",")])
    common.need(max(chosen) < K, f"--classes {cfg.classes}: labels are 0 to {K - 1}")
    common.need(cfg.guided <= C, f"--guided {cfg.guided}: there are {C} channels")
    latent = cfg.data.startswith("latents:")
    common.need(not (cfg.export and latent), "--export: these samples are latents; decode them with vitok.py")
    labels = np.resize(chosen, cfg.count)
    images, ways = sample_many(ema, cfg, labels)
    where = Path(cfg.out or Path(cfg.sample).parent / "samples")
    if latent:
        scale = ema.latent_scale.cpu()
        latents = (images / scale.view(-1, 1, 1)).half().numpy()
        packed = dict(latents=latents, labels=labels, scale=scale.numpy())
        common.write_atomic(where / "latents.npz", lambda file: np.savez(file, **packed))
        print(f"{len(images)} latents in {where / 'latents.npz'}")
        return 0
    names = data.SHAPES if cfg.data == "shapes" else [f"class {k}" for k in range(K)]
    if cfg.export:
        pixels = common.to_uint8(images).permute(0, 2, 3, 1).numpy()
        common.write_atomic(cfg.export, lambda file: np.savez(file, arr_0=pixels))
        print(f"{len(images)} samples: {cfg.export}")
    if cfg.out or not cfg.export:
        pictures(where, images, ways, labels, names)
        print(f"{len(images)} samples: {where}/samples.png, trajectory.png, denoising.png")
    return 0

def main(cfg):
    """Train, or draw from a checkpoint; returns the exit code."""
    return sample_checkpoint(cfg) if cfg.sample else train(cfg)

if __name__ == "__main__":
    common.launch(main, common.cli(Config, PRESETS, __doc__))
