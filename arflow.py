"""ARFlow: Autoregressive Flow with Hybrid Linear Attention (arXiv 2501.16085)

A flow-matching transformer that remembers. It trains on sequences of n different pictures of one class, the
noisiest first, and predicts the velocity of each. Inside an image attention is full softmax; across images it
is gated and linear, and its whole memory is one d x d matrix S per head. In sampling the sequence is the
denoising trajectory itself: each step reads S, then writes the current noisy image into it.

    image 1 (noisiest)      image 2                 image n (cleanest)
    [softmax inside] --S--> [softmax inside] --S--> [softmax inside]        S <- gamma S + K^T V
       velocity 1              velocity 2              velocity n

The demo: class accuracy 0.84 (200 samples, mean of 5 seeds) in 3 minutes on one CPU core.

Run:      python arflow.py                          demo: learns to draw shapes, leaves pictures
          python arflow.py --gpus 2                 the same in two processes
          python arflow.py --preset small           CIFAR-10, one GPU
          python arflow.py --preset ARFlow-XL/2@256 --data latents:imagenet256.npz --gpus 8
          python arflow.py --sample runs/arflow/demo/last.pt --classes 6,9 --cfg_scale 3
Faithful: sequences, times, conditioning, block, hybrid attention, initialisation, loss, optimizer, sampler
          and guidance, as in the authors' code (of the paper we read the abstracts alone). The equations
          stand in the code; A1 to A22 are our numbers: data from A1, network from A6, sampler from A21.
Scaled:   the demo (model, batch, steps, learning rate, EMA, guidance 3, no flip) and `small`: see PRESETS.
Left out: the VAE (latents come from vitok.py or by the README's recipe for SD-VAE); FID (--export writes
          what its tools read).
Letters:  B sequences, n images a sequence, C channels, h w sides of an image or latent, p patch, N tokens an
          image, D width, H heads, d = D/H, K classes (label K: none). Time: t = 0 is noise, t = 1 is data.
CUDA:     never run on CUDA.
Read in this order: hybrid, Attention, Block, ARFlow, loss, sample, draw, train. Fifteen minutes.
"""

import copy
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import common  # before torch, which reads OMP_WAIT_POLICY (set there) when it is imported
import data

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# --- Configuration -----------------------------------------------------------


# The comment behind a field is its --help and, before the colon, its range: common.py reads it.
@dataclass
class Config:
    preset: str = "demo"                             # where the values below start from
    data: str = "shapes"                             # shapes, cifar10, npz:PATH, folder:PATH or latents:PATH
    size: int = 32                                   # >= 1: side of an image in pixels, or of a latent
    patch: int = 2                                   # >= 1: patch side p; N = (size / p)^2 tokens an image
    width: int = 768                                 # >= 4: token width D
    depth: int = 12                                  # in [1, 1000]: number of blocks
    heads: int = 12                                  # >= 1: attention heads H
    images: int = 5                                  # >= 1: images a sequence n; 1: ARFlow without context
    block: Literal["arflow", "sit"] = "arflow"       # sit: the SiT baseline; --images 1 --batch n * B
    query_decay: bool = True                         # exp(G) on the query side (A17); off is an ablation
    flip: bool = True                                # flip each image left-right with probability 1/2
    label_dropout: float = 0.1                       # in [0, 1]: share of sequences without their label
    steps: int = 400_000                             # >= 1: optimizer steps (paper, 128 px; 256 px unknown)
    batch: int = 8                                   # >= 1: sequences a step, over all processes
    accumulate: int = 1                              # >= 1: equal parts of a process's batch, in turn
    lr: float = 1e-4                                 # > 0: learning rate of AdamW (official: constant)
    warmup: int = 0                                  # >= 0: our choice: steps of rising learning rate
    cooldown: float = 0.0                            # in [0, 1]: our choice: share of the steps of falling lr
    clip: float = 3.0                                # > 0: gradients are clipped by VALUE to [-clip, clip]
    ema: float = 0.9999                              # in [0, 1]: decay of the averaged weights, sampled from
    num_steps: int = 250                             # >= 2: steps of the sampler, one network call each
    cfg_scale: float = 1.5                           # >= 0: classifier-free guidance; 1 is none
    cfg_channels: int = 3                            # >= 1: first channels under guidance, 3 of a latent's 4
    context: Literal["carry", "reset"] = "carry"     # sampling: keep S, or empty it each step (n = 1: reset)
    classes: str = "all"                             # with --sample: labels as 3,5; all: each in turn
    count: int = 1000                                # >= 1: samples of the metric or of --sample
    export: str = ""                                 # with --sample: NAME.npz (ADM suite) or a folder of PNGs
    seed: int = 0                                    # every random number is a function of (seed, step)
    gpus: int = 1                                    # >= 1: processes, one a GPU; without GPUs on the CPU
    device: str = "auto"                             # auto, cpu or cuda
    bf16: bool = False                               # bf16 on CUDA, attention in fp32; official code: TF32
    compile: bool = False                            # torch.compile for the blocks; minutes on a CPU
    init: str = ""                                   # checkpoint whose weights this run starts from
    name: str = ""                                   # run folder runs/arflow/NAME; default: the preset
    resume: bool = False                             # go on from runs/arflow/NAME/last.pt
    sample: str = ""                                 # checkpoint to draw from, instead of training
    out: str = ""                                    # folder of --sample; default: samples/ beside CHECKPOINT
    log: int = 100                                   # >= 1: steps between log lines
    save: int = 5000                                 # >= 1: steps between checkpoints and preview pictures

    sampling: ClassVar = (                           # what --sample may change
        "num_steps", "cfg_scale", "cfg_channels", "context", "classes", "count", "export", "gpus")


SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}       # D, depth, H
# official code: its kernel wants 64 channels a head, so XL/2 got 18 heads; XL/4 and XL/8 have 16 heads of 72
# channels and cannot run there.
OTHER_HEADS = {("XL", 2): 18}

PRESETS = {
    # 16 px, drawn shapes, one CPU core; all values here and in `small` are our choice
    "demo": dict(size=16, width=64, depth=4, heads=2, flip=False, steps=4400, batch=2, lr=6e-3, warmup=100,
                 cooldown=0.5, ema=0.995, num_steps=50, cfg_scale=3.0, count=200, save=2200),
    # CIFAR-10 for one GPU; planned for under an hour, not yet run
    "small": dict(data="cifar10", width=256, depth=8, heads=4, steps=60_000, batch=32, lr=3e-4, ema=0.999),
    # the official code's models, on latents of an eighth of the picture's side
    **{f"ARFlow-{letter}/{p}@{pixels}": dict(
        name=f"ARFlow-{letter}-{p}-{pixels}", data=f"latents:imagenet{pixels}.npz", size=pixels // 8, patch=p,
        width=D, depth=depth, heads=OTHER_HEADS.get((letter, p), H))
       for letter, (D, depth, H) in SIZES.items() for p in (2, 4, 8) for pixels in (128, 256)},
}
OF_THE_DATA = ("label.weight", "latent_scale")         # what --init does not take over from other data

# Class accuracy of the demo's 200 samples, mean - 4 s.d. of seeds 0 to 4: .860 .825 .860 .860 .805.
TARGET = 0.74

# --- Building blocks ---------------------------------------------------------
#
# Hybrid attention over the images i = 1 ... n of a sequence, in one head: Q_i, K_i, V_i (N, d), log decays
# g_i (N), all <= 0, and a state S_i (d, d), S_1 = 0. It is chunkwise linear attention with an image for a
# chunk and full softmax inside; the linear part has no feature map, no rotation and no denominator.
#
# A15  G_ij = g_i1 + ... + g_ij                             running sum over the tokens of image i, row by row
# A16  gamma_i = exp(mean_j g_ij)                           decay of the state: by the mean, not the sum
# A17  O_i = softmax(Q_i K_i^T) V_i + exp(G_i) Q_i S_i      an image reads itself, and the past from S
# A18  S_(i+1) = gamma_i S_i + K_i^T V_i                    then it is written into S, undecayed
#
# From image to image S goes on in `hybrid`, from call to call through `states`.
#
# A19  O = M V over all n N tokens at once; for token a of image r and token b of image s
#          M_ab = softmax over b of q_a k_b                 s = r
#          M_ab = q_a k_b exp(G_a + C_(r-1) - C_s)          s < r, with C_i = log(gamma_1 ... gamma_i)
#          M_ab = 0                                         s > r
#      C_(r-1) - C_s is the decay by the images between s and r, without both.


def softmax_attention(q, k, v, scale):
    """Softmax inside images: q, k, v (B, n, H, N, d) -> (B, n, H, N, d). Fast kernels want four axes."""
    flat = [x.flatten(0, 1) for x in (q, k, v)]                                        # each (B*n, H, N, d)
    return F.scaled_dot_product_attention(*flat, scale=scale).unflatten(0, q.shape[:2])      # (B, n, H, N, d)


def hybrid(q, k, v, log_decay, S, query_decay=True):
    """Hybrid attention (A15, A16, A17, A18): a loop over the images for what depends on their order.

    q, k, v (B, n, H, N, d), k already times d^-1/2; log_decay g (B, n, H, N); S (B, H, d, d), at first zeros.
    Returns the outputs (B, n, H, N, d), and S behind the last image.
    """
    added = k.mT @ v                                                                         # (B, n, H, d, d)
    gamma = log_decay.mean(-1).exp()[..., None, None]                                        # (B, n, H, 1, 1)
    states = [S]
    for i in range(q.shape[1]):
        states.append(gamma[:, i] * states[i] + added[:, i])        # A18: this alone goes in order
    # An image looks at all of itself, and through its S at the images before it.
    inside = softmax_attention(q, k, v, scale=1.0)                                           # (B, n, H, N, d)
    past = q @ torch.stack(states[:-1], 1)                                                   # (B, n, H, N, d)
    if query_decay:
        past = log_decay.cumsum(-1).exp()[..., None] * past                                  # (B, n, H, N, d)
    return inside + past, states[-1]                                           # (B, n, H, N, d), (B, H, d, d)


def hybrid_matrix(q, k, v, log_decay, query_decay=True):
    """The same outputs, from an empty S, by one masked product (A19): quadratic in n, the test of `hybrid`.

    The tokens of all images stand in one row; `image` is the number of each token's image.
    """
    B, n, H, N, d = q.shape
    q, k, v = (x.transpose(1, 2).flatten(2, 3) for x in (q, k, v))                       # each (B, H, n*N, d)
    image = torch.arange(n * N, device=q.device) // N                                                  # (n*N)
    scores = q @ k.mT                                                                       # (B, H, n*N, n*N)
    inside = scores.masked_fill(image[:, None] != image, -torch.inf).softmax(-1)            # (B, H, n*N, n*N)

    g = log_decay.transpose(1, 2)                                                               # (B, H, n, N)
    mean = g.mean(-1)                                                                              # (B, H, n)
    C = mean.cumsum(-1)                                                                            # (B, H, n)
    # C_(r-1) - C_s
    exponent = (C - mean)[..., image, None] - C[..., None, image]                           # (B, H, n*N, n*N)
    if query_decay:
        exponent = exponent + g.cumsum(-1).flatten(2)[..., None]                            # (B, H, n*N, n*N)
    decay = exponent.masked_fill(image[:, None] <= image, -torch.inf).exp()                 # (B, H, n*N, n*N)
    M = inside + scores * decay                                                             # (B, H, n*N, n*N)
    return (M @ v).unflatten(2, (n, N)).transpose(1, 2)                                      # (B, n, H, N, d)


def rms_norm(x):
    """x over its root mean square along the last axis, without a weight."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def split_heads(x, H):
    """(B, n, N, D) -> (B, n, H, N, d)."""
    return x.unflatten(-1, (H, -1)).transpose(2, 3)


class Attention(nn.Module):
    """Hybrid attention with its projections, norms and gates, always in fp32.

    A11  q, k, v, z, a = W_q x, W_k x, W_v x, W_z x, W_a (x + c)      c: time and label have a say in what is
                                                      forgotten; W_z is output_gate, W_a decay_gate
    A12  q, k, v <- rms_norm of each                  over the full width D, before the split into heads
    A13  g = logsigmoid(a) / 16                       at first near -log(2) / 16: a memory of some 23 images
    A14  k <- k d^-1/2                                once, for the softmax and for the state
    A20  o = W_out (rms_norm(O) SiLU(z))              the norm, in each head, bounds what S has added up
    """

    def __init__(self, D, H, query_decay):
        super().__init__()
        self.heads = H
        self.query_decay = query_decay
        self.q = nn.Linear(D, D, bias=False)
        self.k = nn.Linear(D, D, bias=False)
        self.v = nn.Linear(D, D, bias=False)
        self.output_gate = nn.Linear(D, D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.decay_gate = nn.Linear(D, H, bias=False)

    def forward(self, x, c, S):
        """x (B, n, N, D), conditioning c (B, n, D), state S (B, H, d, d) -> the same shapes for x and S."""
        d = x.shape[-1] // self.heads
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.q.weight.dtype)                                                       # (B, n, N, D)
            q = split_heads(rms_norm(self.q(x)), self.heads)                                 # (B, n, H, N, d)
            k = split_heads(rms_norm(self.k(x)), self.heads) * d ** -0.5                     # (B, n, H, N, d)
            v = split_heads(rms_norm(self.v(x)), self.heads)                                 # (B, n, H, N, d)
            # c itself; Block's modulation reads SiLU(c)
            a = self.decay_gate(x + c[:, :, None])                                              # (B, n, N, H)
            g = F.logsigmoid(a).transpose(2, 3) / 16                                            # (B, n, H, N)
            o, S = hybrid(q, k, v, g, S, self.query_decay)                     # (B, n, H, N, d), (B, H, d, d)
            o = rms_norm(o).transpose(2, 3).flatten(3)                                          # (B, n, N, D)
            o = self.out(o * F.silu(self.output_gate(x)))                                       # (B, n, N, D)
        return o, S                                                               # (B, n, N, D), (B, H, d, d)


class PlainAttention(nn.Module):
    """SiT's attention, for --block sit: softmax in each image, biases, no norms, gates or state."""

    def __init__(self, D, H):
        super().__init__()
        self.heads = H
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)

    def forward(self, x, c, S):
        """As Attention.forward; c is unused and S comes back unchanged."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))  # each (B, n, H, N, d)
        o = softmax_attention(q, k, v, scale=q.shape[-1] ** -0.5)                            # (B, n, H, N, d)
        o = o.transpose(2, 3).flatten(3)                                                        # (B, n, N, D)
        return self.out(o), S                                                     # (B, n, N, D), (B, H, d, d)


def modulate(x, shift, scale):
    """The affine part of a LayerNorm, computed from the condition."""
    return x * (1 + scale) + shift


class Block(nn.Module):
    """Transformer block with adaLN-zero: an image's time and label shift, scale and gate its tokens.

    A9   x <- x + gate_msa Attention(modulate(LN(x), shift_msa, scale_msa), c)
         x <- x + gate_mlp MLP(modulate(LN(x), shift_mlp, scale_mlp))      all six = W SiLU(c), at first zero
    """

    def __init__(self, D, H, kind, query_decay):
        super().__init__()
        self.norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(D, H, query_decay) if kind == "arflow" else PlainAttention(D, H)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(approximate="tanh"), nn.Linear(4 * D, D))
        self.modulation = nn.Linear(D, 6 * D)

    def forward(self, x, c, S):
        """x (B, n, N, D), c (B, n, D), S (B, H, d, d) -> new x and S."""
        six = self.modulation(F.silu(c))[:, :, None].chunk(6, -1)                          # each (B, n, 1, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = six               # each (B, n, 1, D)
        o = modulate(self.norm(x), shift_msa, scale_msa)                                        # (B, n, N, D)
        o, S = self.attention(o, c, S)                                            # (B, n, N, D), (B, H, d, d)
        x = x + gate_msa * o                                                                    # (B, n, N, D)
        o = modulate(self.norm(x), shift_mlp, scale_mlp)                                        # (B, n, N, D)
        x = x + gate_mlp * self.mlp(o)                                                          # (B, n, N, D)
        return x, S                                                               # (B, n, N, D), (B, H, d, d)


# --- Model -------------------------------------------------------------------


def sincos_pos_embed(side, D):
    """The frozen position table (N, D), the same for every image: no token knows the number of its image.

    A7   token in column x of row y:  [sin(x w), cos(x w), sin(y w), cos(y w)],  w_j = 10000^(-j / (D/4))
    """
    w = 10_000.0 ** (-torch.arange(D // 4, dtype=torch.float64) / (D // 4))
    angle = torch.arange(side)[:, None] * w
    line = torch.cat([angle.sin(), angle.cos()], -1)                                             # (side, D/2)
    x = line.repeat(side, 1)
    y = line.repeat_interleave(side, 0)
    return torch.cat([x, y], -1)


def timestep_embedding(t):
    """Times t (B, n) in [0, 1], not in [0, 1000] -> (B, n, 256).

    A8   time(t) = W_2 SiLU(W_1 [cos(t f), sin(t f)] + b_1) + b_2,  f_j = 10000^(-j / 128), j < 128
    """
    f = 10_000.0 ** (-torch.arange(128, device=t.device, dtype=t.dtype) / 128)
    angle = t[..., None] * f
    return torch.cat([angle.cos(), angle.sin()], -1)


class ARFlow(nn.Module):
    """The velocity network: patches to tokens, blocks that each keep a state S, tokens to patches.

    A6   c_i = label(y) + time(t_i)                             one label a sequence, one time an image
    A10  v = unpatchify(W modulate(LN(x), shift, scale))        shift, scale = W' SiLU(c_i)

    The output has 2 C channels as DiT's; the last C are unused. `latent_scale`, a number or one a channel, is
    stored for the decoder of the samples.
    """

    def __init__(self, cfg, channels, classes, latent_scale=1.0):
        super().__init__()
        D = cfg.width
        p = self.patch = cfg.patch
        self.size = cfg.size
        self.heads = cfg.heads
        self.channels = channels
        self.classes = classes
        self.embed = nn.Conv2d(channels, D, p, stride=p)
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.label = nn.Embedding(classes + 1, D)                       # the last row stands for "no label"
        self.blocks = nn.ModuleList(Block(D, cfg.heads, cfg.block, cfg.query_decay) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(D, 2 * D)
        self.out = nn.Linear(D, p * p * 2 * channels)
        self.register_buffer("pos_embed", sincos_pos_embed(cfg.size // p, D).float(), persistent=False)
        self.register_buffer("latent_scale", torch.as_tensor(latent_scale, dtype=torch.float32))
        self.initialise()

    def initialise(self):
        """Xavier for projections, N(0, .02) for embeddings, zero for modulations and output: v = 0 first."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))       # the patch convolution as a Linear
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for weight in (self.label.weight, self.time[0].weight, self.time[2].weight):
            nn.init.normal_(weight, std=0.02)
        for linear in (*(block.modulation for block in self.blocks), self.modulation, self.out):
            nn.init.zeros_(linear.weight)

    def empty_states(self, B):
        """The states before the first image: zeros (B, H, d, d), one a block."""
        d = self.label.embedding_dim // self.heads
        return [self.label.weight.new_zeros(B, self.heads, d, d) for _ in self.blocks]

    def forward(self, x, t, y, states=None):
        """Noisy images x (B, n, C, h, w), times t (B, n), labels y (B,), states of earlier images or None.

        Returns velocities (B, n, C, h, w) and the states for the next images, one (B, H, d, d) a block.
        """
        B, n, C, h, w = x.shape
        p = self.patch
        c = self.label(y)[:, None] + self.time(timestep_embedding(t))                              # (B, n, D)
        x = self.embed(x.flatten(0, 1)).flatten(2).transpose(1, 2) + self.pos_embed              # (B*n, N, D)
        x = x.unflatten(0, (B, n))                                                              # (B, n, N, D)
        if states is None:
            states = self.empty_states(B)                                                  # each (B, H, d, d)
        new_states = []
        for block, S in zip(self.blocks, states):
            x, S = block(x, c, S)                                                 # (B, n, N, D), (B, H, d, d)
            new_states.append(S)
        shift, scale = self.modulation(F.silu(c))[:, :, None].chunk(2, -1)        # (B, n, 1, D), (B, n, 1, D)
        x = self.out(modulate(self.norm(x), shift, scale))                                # (B, n, N, p*p*2*C)
        x = x.view(B, n, h // p, w // p, p, p, 2 * C)                          # (B, n, h//p, w//p, p, p, 2*C)
        x = x[..., :C].permute(0, 1, 6, 2, 4, 3, 5)                              # (B, n, C, h//p, p, w//p, p)
        return x.reshape(B, n, C, h, w), new_states                            # (B, n, C, h, w), (B, H, d, d)


# --- Objective ---------------------------------------------------------------
#
# A4   x_t = t x1 + (1 - t) x0,  u = x1 - x0      the straight path from noise x0 to data x1, and its velocity
# A5   L = mean (v(x_t, t, y) - u)^2              all images count alike, and gradients flow through S


def interpolate(x1, x0, t):
    """x_t and u (B, n, C, h, w) at times t (B, n) (A4)."""
    t = t[..., None, None, None]
    return t * x1 + (1 - t) * x0, x1 - x0


def loss(model, batch, draws):
    """Mean squared error of the velocity (A5) and, as in the other files, a dict of its parts: here none.

    batch: images x1 (B, n, C, h, w) in [-1, 1] or latents, labels y (B,).
    draws: "t" (B, n), "noise" x0 (B, n, C, h, w), "drop" (B,): sequences that lose their label.
    """
    x1, y = batch
    x, u = interpolate(x1, draws["noise"], draws["t"])
    v, _ = model(x, draws["t"], y.masked_fill(draws["drop"], model.classes))
    return (v.to(u.dtype) - u).square().mean(), {}


# --- Sampling ----------------------------------------------------------------
#
# A21  dx = (v + w s) dt + sqrt(2 w) dW,  w = 1 - t      the SDE from noise at t = 0 to data at t = 1
#      s = (t v - x) / (1 - t)                           the velocity gives the score without a second call,
#      v + w s = (1 + t) v - x                           and w cancels its denominator
# A22  v = v_none + cfg_scale (v_y - v_none)             classifier-free guidance

LAST_TIME = 0.96                            # of the grid, as in the official sampler; a last step ends at 1


def guided_velocity(model, x, t, y, states, cfg_scale, cfg_channels):
    """One network call with guidance (A22): images x (B, C, h, w) at time t, labels y -> velocities, states.

    Half of the batch has labels, half has none; each row keeps its own states, and both see the same images.
    Channels behind the first `cfg_channels` follow the label alone. cfg_scale 1 needs no second half.
    """
    if cfg_scale == 1:
        v, states = model(x[:, None], x.new_full((len(x), 1), t), y, states)
        return v[:, 0], states
    x = torch.cat([x, x])
    y = torch.cat([y, torch.full_like(y, model.classes)])
    v, states = model(x[:, None], x.new_full((len(x), 1), t), y, states)
    v_y, v_none = v[:, 0].chunk(2)
    guided = v_none + cfg_scale * (v_y - v_none)
    return torch.cat([guided[:, :cfg_channels], v_y[:, cfg_channels:]], 1), states


@torch.no_grad()
def sample(model, y, generator, num_steps=250, cfg_scale=1.0, cfg_channels=3, context="carry"):
    """Draw an image for each label y (B,) by Euler-Maruyama steps of the SDE (A21).

    y and the generator are on the model's device. Returns images (B, C, h, w) and their trajectory, a list of
    num_steps + 1 on the CPU. One network call a step: a second one would write into S twice. context "reset"
    empties S at every step, to show what it is worth.
    """
    shape = (len(y), model.channels, model.size, model.size)
    x = torch.randn(shape, generator=generator, device=y.device)
    times = torch.linspace(0, LAST_TIME, num_steps)
    dt = float(times[1] - times[0])
    states = None
    trajectory = [x.cpu()]
    for i, t in enumerate(times.tolist()):
        # In training S held other images of the class; here, by design, it holds this image's own past.
        v, states = guided_velocity(model, x, t, y, states, cfg_scale, cfg_channels)
        if context == "reset":
            states = None
        drift = (1 + t) * v - x
        if i < num_steps - 1:
            noise = torch.randn(shape, generator=generator, device=y.device)
            x = x + dt * drift + (2 * (1 - t) * dt) ** 0.5 * noise
        else:
            x = x + (1 - LAST_TIME) * drift                             # the last step: the mean, no noise
        trajectory.append(x.cpu())
    return x, trajectory


def sample_blocks(model, cfg, labels):
    """Samples of labels (M,) in blocks of 100: yields images (m, C, h, w), snapshots (m, 9, C, h, w).

    The ranks share the blocks; each block has its own generator, so that their number changes nothing.
    """
    device = model.pos_embed.device
    context = cfg.context if cfg.images > 1 else "reset"                # n = 1 never learnt to read a state
    # eight noisy images, evenly spaced, and the last
    snapshots = [round(i * (cfg.num_steps - 1) / 8) for i in range(8)] + [cfg.num_steps]

    def make(first, last):
        y = torch.as_tensor(labels[first:last], device=device)
        generator = common.make_generator(cfg.seed, first, "sample", device)
        x, trajectory = sample(model, y, generator, cfg.num_steps, cfg.cfg_scale, cfg.cfg_channels, context)
        return x.cpu(), torch.stack([trajectory[i] for i in snapshots], 1)

    blocks = common.share_blocks(make, len(labels), 100)
    hidden = len(labels) <= 100 or common.rank() > 0 or None            # None: unless it is a terminal
    yield from tqdm(blocks, "sampling", math.ceil(len(labels) / 100), disable=hidden, leave=False)


def sample_many(model, cfg, labels):
    """Samples of labels (M,): images (M, C, h, w), and snapshots (m, 9, C, h, w) of the first m <= 100."""
    blocks = sample_blocks(model, cfg, labels)
    first, snapshots = next(blocks)
    return torch.cat([first, *(images for images, _ in blocks)]), snapshots


# --- Training ----------------------------------------------------------------


def draw(dataset, cfg, step, device):
    """A step's batch and draws for `loss`: drawn for the global batch B, cut to this rank's share.

    A sequence is a label, uniform over the classes, and n different images of it, each flipped or not.

    A1   x1 = scale (mean + exp(clamp(logvar, -30, 20) / 2) noise)     in data.latents, afresh at every step;
                                                                       scale of SD-VAE: 0.18215
    A2   t_1 <= ... <= t_n, uniform numbers in ascending order         image 1 is the noisiest
    A3   x0_i ~ N(0, I)                                                noise of its own for each image
    """
    B = cfg.batch
    n = cfg.images
    cpu_generator = common.make_generator(cfg.seed, step, "data")
    y = torch.randint(len(dataset.classes), (B,), generator=cpu_generator)
    index = []
    for label in y.tolist():
        rows = dataset.by_class[label]
        order = torch.randperm(len(rows), generator=cpu_generator)
        index.append(rows[order[:n].numpy()])
    flip = (torch.rand(B, n, generator=cpu_generator) < 0.5) & cfg.flip
    t = torch.rand(B, n, generator=cpu_generator).sort(1).values
    drop = torch.rand(B, generator=cpu_generator) < cfg.label_dropout

    index = common.shard(np.stack(index)).reshape(-1)
    flip = common.shard(flip).reshape(-1)
    if dataset.latent:
        noise = common.shard(torch.randn(B, n, *dataset.images.shape[1:], generator=cpu_generator))
        x1 = dataset.latents(index, flip, noise.flatten(0, 1), device)
    else:
        x1 = dataset.pixels(index, device)
        x1 = torch.where(flip.to(device)[:, None, None, None], x1.flip(-1), x1)
    x1 = x1.unflatten(0, (-1, n))

    x0 = common.shard_noise((B, *x1.shape[1:]), cfg.seed, step, "noise", device)
    y, t, drop = (common.shard(value).to(device) for value in (y, t, drop))
    return (x1, y), {"t": t, "noise": x0, "drop": drop}


def learning_rate(cfg, step):
    """Official code: constant. Our choice for short runs: a linear rise, and at the end a fall to 2 %."""
    rise = (step + 1) / max(1, cfg.warmup)
    fall = 1.0
    if cfg.cooldown:
        left = (cfg.steps - step) / (cfg.steps * cfg.cooldown)          # above 1 until the fall begins
        fall = 0.02 + 0.98 * left
    return cfg.lr * min(1.0, rise, fall)


def optimizer(model, cfg):
    """AdamW; weight decay .02 on tensors of two and more dimensions, also the label table; none on biases.

    Our choice: --block sit has it, too. SiT itself has torch's betas and no decay.
    """
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.02},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)


def train(cfg):
    """Train, save, draw; returns the exit code (1: the demo missed its target)."""
    device = common.device_of(cfg)
    dataset = open_split(cfg, "train")
    run = common.Run(cfg, classes=dataset.classes)
    run.seed_weights()
    model = ARFlow(cfg, dataset.images.shape[1], len(dataset.classes), dataset.scale).to(device)
    common.load_init(run, model, new=OF_THE_DATA)
    model.latent_scale.copy_(torch.as_tensor(dataset.scale))            # of these data, not of --init's
    ema = copy.deepcopy(model).requires_grad_(False)
    opt = optimizer(model, cfg)
    start = run.restore(model=model, ema=ema, opt=opt)
    common.compile_blocks(cfg, model.blocks)
    read = common.read_ahead(lambda step: draw(dataset, cfg, step, device), device, run.total)
    for step in run.steps(start):
        batch, draws = read(step)
        common.set_learning_rate(opt, learning_rate(cfg, step))
        opt.zero_grad()
        for part, part_draws in common.in_parts(cfg.accumulate, batch, draws):
            with common.autocast(cfg):
                value, losses = loss(model, part, part_draws)
            (value / cfg.accumulate).backward()
            run.add(loss=value, **losses)
        common.average_gradients(model.parameters())
        nn.utils.clip_grad_value_(model.parameters(), cfg.clip)
        opt.step()
        common.ema_update(ema, model, cfg.ema)
        run.log(step)
        run.save(step)                                                  # after a signal the process ends here
        preview(run, step, ema, cfg, dataset)                           # draws from its own generators
    return finish(run, ema, cfg, dataset)


# --- Checks ------------------------------------------------------------------


def check(cfg):
    """What relates two fields of a request; UserError with one line."""
    common.require(cfg.size % cfg.patch == 0, f"--patch {cfg.patch}: must divide --size {cfg.size}")
    common.require(cfg.width % cfg.heads == 0, f"--heads {cfg.heads}: must divide --width {cfg.width}")
    common.require(cfg.width % 4 == 0, f"--width {cfg.width}: must be a multiple of 4 (see sincos_pos_embed)")
    common.require(cfg.block == "arflow" or cfg.images == 1, "--block sit: has no context; add --images 1")
    for name, default in (("classes", "all"), ("export", ""), ("out", "")):
        value = getattr(cfg, name)
        common.require(cfg.sample or value == default, f"--{name} {value}: goes with --sample CHECKPOINT")


def open_split(cfg, split, count=20_000):
    """The data's 'train', 'test' or 'judge' split; UserError where it does not fit the configuration.

    judge: the images on which common.judge trains the ruler, a classifier that does nothing but measure
    samples. Trained once, it is then read from runs/judges.
    """
    dataset = data.open_data(cfg.data, split, size=cfg.size, count=count)
    shape = dataset.images.shape
    common.require(shape[2:] == (cfg.size, cfg.size), f"--size {cfg.size}: {cfg.data} holds {shape}")
    if split == "train":
        fewest = min(len(rows) for rows in dataset.by_class)
        common.require(fewest >= cfg.images, f"--images {cfg.images}: a class of the data has only {fewest}")
    return dataset


def measured(cfg):
    """Whether a run ends with class accuracy and Frechet distance: of pictures, unless it is very short."""
    return cfg.steps >= 200 and not cfg.data.startswith("latents:")


def prepare(cfg):
    """Once, before the processes start: downloads, packing, training of the ruler; says what was found."""
    if cfg.sample:
        return
    train = open_split(cfg, "train")
    shape = cfg, train.images.shape[1], len(train.classes), train.scale
    model = common.require_memory(cfg, lambda: ARFlow(*shape))
    if cfg.init and not cfg.resume:
        common.init_state(cfg, model, new=OF_THE_DATA)                  # refuses what does not fit
    splits = {"train": train}
    if measured(cfg):
        judge_split = open_split(cfg, "judge")
        data.require_images(judge_split, "judge", 2 * len(judge_split.classes), "the ruler")
        splits["test"] = open_split(cfg, "test", 2 * cfg.count)
        # the ruler has 64 features: the covariance of fewer than 65 samples is singular
        if min(cfg.count, len(splits["test"]) // 2) < 65:
            print("no Frechet distance at the end: it needs 65 samples and 130 test images", flush=True)
        common.judge(judge_split, "ruler")
    print(data.describe(splits), flush=True)


# --- Command line ------------------------------------------------------------


def pictures(folder, snapshots, labels, names):
    """Of samples' snapshots (m, 9, C, h, w) and labels, at most ten classes and eight samples each:

    samples.png, a row a class; trajectory.png, one sample a class on its way; denoising.png, an animation.
    """
    labels = labels[:len(snapshots)]
    shown = sorted(set(labels.tolist()))[:10]
    rows = [np.flatnonzero(labels == label) for label in shown]
    columns = min(8, *(len(row) for row in rows))
    x = torch.stack([snapshots[row[:columns]] for row in rows])         # (classes, columns, 9, C, h, w)
    titles = [names[label] for label in shown]
    times = [f"t={LAST_TIME * i / 8:.2f}" for i in range(8)] + ["sample"]
    common.columns_png(folder / "samples.png", x[:, :, -1].unbind(1), rows=titles)
    common.columns_png(folder / "trajectory.png", x[:, 0].unbind(1), heads=times, rows=titles)
    # Three samples a class, to keep it small. The end comes first: viewers show the first frame as a still.
    x = common.to_uint8(x[:, :3].transpose(0, 1).flatten(0, 1))         # (samples * classes, 9, C, h, w)
    scale = max(1, 48 // x.shape[-1])
    frames = [common.grid(x[:, i], len(shown), heads=titles, scale=scale) for i in (8, 8, 8, 8, *range(8))]
    common.png(folder / "denoising.png", np.stack(frames), seconds=0.25)


def draw_pictures(run, ema, cfg, dataset, count):
    """Pictures of `count` samples, each class in turn; returns images and labels. The ranks share them."""
    labels = np.arange(count) % len(dataset.classes)
    images, snapshots = sample_many(ema, cfg, labels)
    if common.rank() == 0:
        pictures(run.folder, snapshots, labels, dataset.classes)
    return images, labels


def preview(run, step, ema, cfg, dataset):
    """Pictures on the way, as often as checkpoints; none of latents."""
    on_the_way = run.due(step, cfg.save) and step + 1 < run.total
    if on_the_way and not dataset.latent:
        draw_pictures(run, ema, cfg, dataset, 20)


def finish(run, ema, cfg, dataset):
    """Pictures, and what the ruler says of cfg.count samples.

    Returns the exit code: 1 below TARGET, which counts in a run of exactly the demo's settings. A finished
    run only shows its result.
    """
    if dataset.latent:
        return 0
    images, labels = draw_pictures(run, ema, cfg, dataset, cfg.count if measured(cfg) else 20)
    if common.rank() > 0 or not measured(cfg):
        return 0
    pairs = torch.stack([images[:10], common.nearest(images[:10], dataset)], 1)
    common.columns_png(run.folder / "nearest.png", pairs, rows=["sample", "nearest"])
    ruler = common.judge(open_split(cfg, "judge"), "ruler")
    test = open_split(cfg, "test", 2 * cfg.count)
    rows = np.arange(min(len(test), cfg.count))
    result = common.measure_samples(images, labels, ruler, test)
    result["real"] = common.accuracy(ruler, test.pixels(rows), test.labels[rows])
    common.write_json(run.folder / "result.json", result)
    run.say(f"{run.folder}/samples.png, trajectory.png, denoising.png, nearest.png")
    accuracy = "class accuracy {accuracy:.3f}, of as many test images {real:.3f}"
    run.say(f"{cfg.count} samples at guidance {cfg.cfg_scale}: {accuracy.format(**result)}")
    if result["distance"] is not None:
        distances = "toy Frechet distance {distance:.1f}, real against real {floor:.1f}, {N} images each"
        run.say(distances.format(**result))
    if cfg.preset != "demo" or not common.is_preset(cfg, PRESETS):
        return 0
    reached = result["accuracy"] >= TARGET
    run.say(f"target {TARGET}: {'reached' if reached else 'MISSED'}")
    return int(not reached and common.Run.trained)


def sample_checkpoint(cfg):
    """--sample: draw from a checkpoint's averaged weights; its run stays as it is.

    cfg holds the checkpoint's values, with the flags given over them (common.cli).
    Pictures of at most 100 samples, or all latents, go to --out. With --export all samples go there, and
    pictures are drawn only where --out is given as well.
    """
    device = common.device_of(cfg)
    saved = common.read_checkpoint(cfg.sample, "arflow", device)
    weights = saved["state"].get("ema")
    readable = isinstance(weights, dict) and {"label.weight", "embed.weight"} <= weights.keys()
    common.require(readable, f"{cfg.sample}: field state holds no averaged weights")
    K = len(weights["label.weight"]) - 1                                # cfg lacks classes and channels
    ema = ARFlow(cfg, weights["embed.weight"].shape[1], K, weights.get("latent_scale", 1)).to(device)
    common.load_into({"ema": ema}, saved, cfg.sample)
    latent = cfg.data.startswith("latents:")
    common.require(not (cfg.export and latent), "--export: these are latents; decode them with their VAE")
    labels = np.resize(common.parse_classes(cfg.classes, K), cfg.count)
    names = common.class_names(saved, K)
    folder = common.sample_folder(cfg) if cfg.out or not cfg.export else None
    if latent:
        images, _ = sample_many(ema, cfg, labels)
        if common.rank() == 0:
            write_latents(folder / "latents.npz", images, labels, ema.latent_scale.cpu(), names)
        return
    if cfg.export:
        blocks = (images for images, _ in sample_blocks(ema, cfg, labels))
        common.export_images(cfg.export, blocks, len(labels))
        if common.rank() == 0:
            print(f"{len(labels)} samples: {cfg.export}")
    if folder:
        labels = labels[:100]
        _, snapshots = sample_many(ema, cfg, labels)
        if common.rank() == 0:
            pictures(folder, snapshots, labels, names)
            print(f"{len(labels)} samples: {folder}/samples.png, trajectory.png, denoising.png")


def write_latents(path, images, labels, scale, names):
    """Samples that are latents (M, C, h, w), divided by their scale, with labels and names, for --data."""
    latents = (images / scale.view(-1, 1, 1)).half().numpy()
    pack = dict(latents=latents, labels=labels, scale=scale.numpy(), class_names=np.array(names))
    common.write_atomic(path, lambda file: np.savez(file, **pack))
    print(f"{len(images)} latents: {path}")


def main(cfg):
    """Train, or draw from a checkpoint; returns the exit code."""
    return sample_checkpoint(cfg) if cfg.sample else train(cfg)


if __name__ == "__main__":
    common.launch(main, common.cli(Config, PRESETS, __doc__), check, prepare)
