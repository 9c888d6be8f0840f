"""ViTok: Learnings from Scaling Visual Tokenizers for Reconstruction and Generation (arXiv 2501.09755).

A plain ViT auto-encoder with a Gaussian bottleneck, for images and clips alike, built to be measured:
encoder, decoder and code are sized one at a time. Reconstruction depends almost only on E, the floats of the
code. What the code lost can only be invented; so stage 2, with a GAN, trains the decoder alone. Stage 3 is a
diffusion transformer (DiT) that makes codes; for it, more channels are not better.

    pixels -> tubelets of q x p x p -> encoder -> M tokens of c floats -> decoder -> tubelets -> pixels
                                       (light)         E = M c            (heavy)

The demo reaches 23.6 dB (PSNR of 500 test images); 87 % of 500 samples show the shape asked for, of ten.
Run:      python vitok.py                                   demo: shapes, three stages (104 s on one core)
          python vitok.py --gpus 2                          the same in two processes
          python vitok.py --preset sweep                    the study: ten codes, a table, a fit, a picture
          python vitok.py --preset clips                    eight moving frames a clip, animated pictures
          python vitok.py --preset S-B/4x8 --plan           parameters, multiply-adds, E, pixels per float
          python vitok.py --preset S-B/16 --data folder:imagenet256 --vgg lpips_vgg.pt --gpus 8
          python vitok.py --sample runs/vitok/demo/dit.pt --classes 6,9 --cfg_scale 3
          python vitok.py --sample runs/vitok/demo/decoder.pt --export latents.npz     (or --decode)
Faithful: both models, widths, losses, stages, optimizers, sampler; latent and masked variants (App. A.3).
          Where the authors' code of January 2025 departs from the paper, the paper is followed.
Scaled:   what presets demo (also Muon and kl 1e-2) and small set; --vgg is a small classifier by default.
Left out: FID, FVD; random crops (only in the official code). In tests/claims: SSIM, baselines, figures.
Letters:  B clips, T H W frames and pixels, q p tubelet, t h w token grid, N = t h w tokens, l latent tokens,
          M tokens of the code (N or l), c its channels, D width, H heads (in attention), d = D/H, b = B T,
          e width of an output, K channels of a map. An image is a clip of one frame. Time 0 is clean, 999 is
          noise. V1 to V28 are our numbers.
CUDA:     never run on CUDA.
Read in this order: Encoder, Decoder, loss_ae, loss_decoder, loss_dit, sample, train_decoder, run_sweep.
"""

import contextlib
import copy
import math
import re
import tempfile
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import common  # before torch: it says how torch's threads wait
import data

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# --- Configuration -----------------------------------------------------------


@dataclass
class Config:
    preset: str = "demo"                # where the values below start from; they stand under Training
    data: str = "shapes"                # shapes, cifar10, npz:PATH, folder:PATH or video:PATH
    stage: Literal["all", "ae", "decoder", "dit"] = "all"  # auto-encoder, decoder with GAN, generator
    size: int = 256                     # >= 4: image side in pixels
    frames: int = 1                     # >= 1: frames of a clip T; 1 is images
    objects: int = 1                    # in [1, 4]: drawn images hold 1 to this many shapes of their class
    flip: bool = True                   # flip each clip left-right with probability 1/2
    model: str = "S-B/16"               # ENCODER-DECODER/P or /QxP, each S, B, L or WIDTHxDEPTHxHEADS
    channels: int = 16                  # >= 1: channels of the code c; E = tokens x channels
    rope: Literal["3d", "1d", "none"] = "3d"  # rotary positions; 1d: flat index, as in the official code
    act: Literal["silu", "gelu"] = "silu"  # gate of the MLP: SwiGLU; gelu: GEGLU, as in the official code
    variational: bool = True            # Gaussian bottleneck; off: a plain auto-encoder
    latents: int = 0                    # >= 0: latent variant, the code is l extra tokens (App. A.3); 0: none
    masked: bool = False                # masked variant: codes cut at random lengths (App. A.3)
    recompute: bool = False             # recompute blocks in backward: less memory, more time
    kl: float = 1e-3                    # >= 0: weight beta of the KL term (official video: 3e-4 4096 / E)
    perceptual: float = 1.0             # >= 0: weight eta of the perceptual term (official video: 0.1)
    vgg: str = ""                       # file of VGG16 and LPIPS weights; default: a classifier trained here
    gan: float = 0.05                   # >= 0: weight lambda of the GAN (Sec. 2.3: 1.0; App. A.2: .05 best)
    disc: int = 512                     # in [1, 65536]: discriminator channels to 32 px; a doubling halves
    dit: str = "L"                      # generator: B, L, XL or WIDTHxDEPTHxHEADS
    label_dropout: float = 0.1          # in [0, 1]: the generator's labels that training drops
    steps: int = 100_000                # >= 1: optimizer steps of each stage
    steps_ae: int = 0                   # >= 0: of stage ae; 0: --steps
    steps_decoder: int = 0              # >= 0: of stage decoder; 0: --steps
    steps_dit: int = 0                  # >= 0: of stage dit; 0: --steps
    batch: int = 1024                   # >= 1: clips a step, over all processes
    batch_decoder: int = 0              # >= 0: of stage decoder; 0: --batch
    batch_dit: int = 0                  # >= 0: of stage dit; 0: --batch
    accumulate: int = 1                 # >= 1: equal parts of a process's batch, one after the other
    lr: float = 1e-4                    # > 0: peak learning rate for 256 images a step (times batch / 256)
    lr_disc: float = 2e-5               # >= 0: the discriminator's
    lr_dit: float = 1e-4                # >= 0: the generator's
    muon: float = 0.0                   # >= 0: Muon for blocks at so many times the rate; 0: plain AdamW
    ema: float = 0.9999                 # in [0, 1]: decay of the averaged decoder and generator
    num_steps: int = 250                # >= 2: sampler steps
    cfg_scale: float = 1.5              # >= 0: classifier-free guidance; 1 is none
    eta: float = 0.0                    # in [0, 1]: noise of the sampler: 0 DDIM, 1 DDPM (official code)
    classes: str = "all"                # labels to sample, as 3,5; all is every class in turn
    count: int = 1000                   # >= 1: clips for the metrics, or sampled by --sample
    plan: bool = False                  # print what the model costs, and stop
    sweep: str = ""                     # the study: stage ae at every MODEL:c,c,...; /P: --model's trunks
    export: str = ""                    # with --sample: latents to FILE.npz, or samples to FILE.npz or FOLDER
    decode: str = ""                    # with --sample: decode the latents of FILE.npz into pictures
    seed: int = 0                       # every random number is a function of (seed, step)
    gpus: int = 1                       # >= 1: processes, one a GPU; without GPUs they share the CPU
    device: str = "auto"                # auto, cpu or cuda
    bf16: bool = False                  # bf16 autocast on CUDA, as the paper trained
    compile: bool = False               # torch.compile for the blocks; on a CPU this takes minutes
    name: str = ""                      # run folder runs/vitok/NAME; default: the preset
    init: str = ""                      # checkpoint whose weights this run starts from, other classes allowed
    resume: bool = False                # go on with runs/vitok/NAME in its first unfinished stage
    sample: str = ""                    # checkpoint to draw from (ae, decoder: reconstructions)
    out: str = ""                       # folder for what --sample writes; default: samples/ beside it
    log: int = 100                      # >= 1: steps between log lines
    save: int = 5000                    # >= 1: steps between checkpoints
    sampling: ClassVar = "num_steps cfg_scale eta classes count data gpus export decode".split()

# Width, depth, heads (Tab. 1). Large is 1152 wide: its heads of 72 channels split in three, for clips.
SIZES = {"S": (768, 6, 12), "B": (768, 12, 12), "L": (1152, 24, 16)}
DIT_SIZES = {"B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


# --- Building blocks ---------------------------------------------------------
#
# V1   X_e[n] = W_e tubelet_n + b_e         Conv3d of kernel = stride = (q, p, p), N = t h w tokens, Sec. 2.2
# V4   E = M c                              floats of the code, Eq. (2); pixels a float: 3 T H W / E, Sec. 3.1
# V5   tubelet_n = W_d x_n + colour         x = LN(trunk(W_u z)); ConvTranspose3d as V1, colour its bias
# V6   x <- x + attention(LN x);  x <- x + mlp(LN x)
# V7   mlp(x) = down(silu(gate x) * up x)   SwiGLU, hidden width int(2.67 D)
# V8   angle = position 10000^(-i/n)        RoPE: pair i of the n pairs that an axis (x, y or t) has in a head
# V17  x <- x + gate_msa attention((1 + scale_msa) LN x + shift_msa), likewise mlp; the six = W condition


class Sizes(NamedTuple):
    """What sizes(cfg) finds: width, depth, heads of the trunks, then tubelets and tokens."""

    encoder: tuple
    decoder: tuple
    dit: tuple
    q: int              # frames of a tubelet
    p: int              # its side in pixels
    values: int         # 3 q p p, the numbers in it
    grid: tuple         # tokens t, h, w of a clip
    N: int              # tokens of a clip, t h w
    M: int              # tokens of its code


def parse_trunk(text, table):
    """(width, depth, heads) of a name in the table, or of WIDTHxDEPTHxHEADS with less than 1000 blocks."""
    if text in table:
        return table[text]
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d{0,2})x([1-9]\d*)", text, re.ASCII)
    common.require(found, f"{text!r} is no trunk: write {', '.join(table)} or WIDTHxDEPTHxHEADS as in 72x2x6")
    D, depth, H = map(int, found.groups())
    even = D % (2 * H) == 0 and D >= 6 * H
    common.require(even, f"{text}: heads must be even parts of the width, 6 or more wide")
    return D, depth, H


def sizes(cfg):
    """What --model, --dit and the shape of a clip imply.

    Encoder and decoder have widths of their own. Official code differs: it gives both the decoder's, which
    makes S-L's "small" encoder twice as large as Tab. 1 says.
    """
    found = re.fullmatch(r"([^-/]+)-([^-/]+)/(?:([1-9]\d*)x)?([1-9]\d*)", cfg.model, re.ASCII)
    common.require(found, f"--model {cfg.model}: write a model as S-B/16, S-B/4x8 or 72x1x6-72x2x6/8")
    trunks = parse_trunk(found[1], SIZES), parse_trunk(found[2], SIZES), parse_trunk(cfg.dit, DIT_SIZES)
    q = int(found[3] or 1)
    p = int(found[4])
    grid = (cfg.frames // q, cfg.size // p, cfg.size // p)
    whole = (grid[0] * q, grid[1] * p) == (cfg.frames, cfg.size)
    clip = f"--frames {cfg.frames} --size {cfg.size}"
    common.require(whole, f"{clip}: not in whole tubelets of --model {cfg.model}")
    N = math.prod(grid)
    return Sizes(*trunks, q, p, 3 * q * p**2, grid, N, cfg.latents or N)


def patchify(x, s):
    """Clips (B, 3, T, H, W) -> tubelets in the order (t, y, x), each a vector ordered (channel, t, y, x).

    A Linear behind it makes V1's Conv3d, as one matrix product. s: Sizes.
    """
    # T, H and W are cut into t x q, h x p and w x p.
    x = x.unflatten(4, (-1, s.p)).unflatten(3, (-1, s.p)).unflatten(2, (-1, s.q))   # (B, 3, t, q, h, p, w, p)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)                    # (B, t*h*w, 3*q*p*p)


def unpatchify(x, s):
    """The inverse: tubelets (B, t h w, 3 q p p) -> clips. Behind a Linear: V5's ConvTranspose3d."""
    x = x.unflatten(2, (3, s.q, s.p, s.p)).unflatten(1, s.grid)                     # (B, t, h, w, 3, q, p, p)
    x = x.permute(0, 4, 1, 5, 2, 6, 3, 7)                                           # (B, 3, t, q, h, p, w, p)
    return x.flatten(6).flatten(4, 5).flatten(2, 3)                                    # (B, 3, t*q, h*p, w*p)


def as_frames(x):
    """Clips (B, 3, T, H, W) as so many single frames."""
    return x.transpose(1, 2).flatten(0, 1)                                                    # (B*T, 3, H, W)


def token_positions(grid, rope, latents=0):
    """Positions x, y, t (l + N, 3) of l latent tokens, then of the grid's; '1d': their numbers (l + N, 1).

    Our choice: latent tokens, having no place in a picture, stand at the origin; '1d' counts them as well.
    """
    if rope == "1d":
        return torch.arange(latents + math.prod(grid))[:, None]
    tyx = torch.cartesian_prod(*map(torch.arange, grid))                                              # (N, 3)
    positions = torch.cat((torch.zeros(latents, 3), tyx.flip(1)))                                   # (l+N, 3)
    return positions if rope == "3d" else torch.zeros_like(positions)


def rope_angles(positions, d):
    """V8's angles (N, d/2) of tokens at positions (N, axes): each axis turns pairs of channels of its own.

    The paper says only "3D axial". Our choice where 6 does not divide d, as in S and B (64): parts as equal
    as can be. In an image, t is 0 and its part never turns.
    """
    axes = positions.shape[1]
    angles = []
    for axis in range(axes):
        n = (d // 2 + axes - 1 - axis) // axes                  # of 32 pairs: 11, 11, 10
        rates = 10_000.0 ** (-torch.arange(n, device=positions.device).double() / n)                     # (n)
        angles.append(positions[:, axis, None] * rates)
    return torch.cat(angles, 1)                                                                     # (N, d/2)


def rotary_table(angles):
    """What turns pairs of channels by V8's angles (N, d/2): (2, N, d), cosines and sines, each twice."""
    sin = torch.stack((-angles.sin(), angles.sin()), 2).flatten(1)                                    # (N, d)
    return torch.stack((angles.cos().repeat_interleave(2, 1), sin))                                # (2, N, d)


def rotate(x, rotary):
    """Turn adjacent pairs (a, b) of x (B, H, N, d) to (a cos - b sin, b cos + a sin), in float32."""
    cos, sin = rotary                                                                      # (N, d), (N, d)
    swapped = x.unflatten(3, (-1, 2)).flip(4).flatten(3)                                        # (B, H, N, d)
    return (x * cos + swapped * sin).type_as(x)                                                 # (B, H, N, d)


def timestep_embedding(time, D=256):
    """Cosines, then sines of diffusion times (B,), at RoPE's rates (official code)."""
    angles = rope_angles(time[:, None], D)                                                          # (B, D/2)
    return torch.cat((angles.cos(), angles.sin()), 1).float()                                         # (B, D)


def sincos_pos_embed(N, D):
    """V9's frozen tokens: sines, then cosines of their numbers (official code).

    The D/2 rates run from 1 to 1/10000, both included; V8's stop one short of it.
    """
    rates = 10_000.0 ** (-torch.arange(D // 2).double() / (D // 2 - 1))                                # (D/2)
    angles = torch.arange(N)[:, None] * rates                                                       # (N, D/2)
    return torch.cat((angles.sin(), angles.cos()), 1).float()                                         # (N, D)


class Attention(nn.Module):
    """Softmax over all tokens of all frames, not causal in time; no bias on q, k, v, no norm of q and k.

    Official code differs: it builds a causal mask, and never passes it on.
    """

    def __init__(self, D, H):
        super().__init__()
        self.heads = H
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D)

    def forward(self, x, rotary):
        """Tokens (B, N, D), the rotary_table of their positions."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))                                  # (B, N, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                               # each (B, H, N, d)
        x = F.scaled_dot_product_attention(rotate(q, rotary), rotate(k, rotary), v)             # (B, H, N, d)
        return self.out(x.transpose(1, 2).flatten(2))                                            # (B, N, H*d)


class Block(nn.Module):
    """Pre-norm block of residual attention and gated MLP, V6 and V7. Three matrices of hidden width
    int(2.67 D) cost as much as the usual two of 4 D. Official code differs: GELU for the gate."""

    def __init__(self, D, H, act):
        super().__init__()
        hidden = int(2.67 * D)
        self.act = F.silu if act == "silu" else F.gelu
        self.norm1 = nn.LayerNorm(D)
        self.attention = Attention(D, H)
        self.norm2 = nn.LayerNorm(D)
        self.gate = nn.Linear(D, hidden)
        self.up = nn.Linear(D, hidden)
        self.down = nn.Linear(hidden, D)

    def mlp(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))                                      # (B, N, D)

    def forward(self, x, rotary):
        """Tokens (B, N, D), the rotary_table of their positions."""
        x = x + self.attention(self.norm1(x), rotary)                                              # (B, N, D)
        return x + self.mlp(self.norm2(x))                                                         # (B, N, D)


class ModulatedBlock(Block):
    """The generator's block, V17: a condition (B, D) shifts, scales and gates both halves (adaLN-zero)."""

    def __init__(self, D, H, act):
        super().__init__(D, H, act)
        self.modulation = nn.Linear(D, 6 * D)

    def forward(self, x, rotary, condition):
        modulation = self.modulation(condition)[:, None].chunk(6, 2)                          # each (B, 1, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation           # each (B, 1, D)
        y = (1 + scale_msa) * self.norm1(x) + shift_msa                                            # (B, N, D)
        x = x + gate_msa * self.attention(y, rotary)                                               # (B, N, D)
        y = (1 + scale_mlp) * self.norm2(x) + shift_mlp                                            # (B, N, D)
        return x + gate_mlp * self.mlp(y)                                                          # (B, N, D)


class Trunk(nn.Module):
    """A stack of blocks and a last LayerNorm; it keeps the angles of its tokens' positions (N, axes).

    size: width, depth, heads; block: the class of the blocks.
    """

    def __init__(self, size, positions, cfg, block=Block):
        super().__init__()
        D, depth, H = size
        self.recompute = cfg.recompute
        self.norm = nn.LayerNorm(D)
        self.blocks = nn.ModuleList(block(D, H, cfg.act) for _ in range(depth))
        table = rotary_table(rope_angles(positions, D // H))
        self.rotary = nn.Buffer(table.float(), persistent=False)

    def forward(self, x, *condition):
        """Tokens (B, N, D) -> the same. The generator's blocks also get one condition (B, D)."""
        for block in self.blocks:
            if self.recompute:                  # keep blocks' inputs alone; backward runs each block again
                x = checkpoint(block, x, self.rotary, *condition, use_reentrant=False)             # (B, N, D)
            else:
                x = block(x, self.rotary, *condition)                                              # (B, N, D)
        return self.norm(x)                                                                        # (B, N, D)


# --- Model -------------------------------------------------------------------
#
# V2   mean, logvar = W_c LN(trunk(X_e))    2 c channels a token; logvar clamped to [-30, 20]
# V3   z = mean + exp(logvar / 2) eps       eps from N(0, I), Sec. 2.1
# V9   encoder([queries; X_e])[:l],  decoder([W_u z; masks])[-N:]      latent variant, both frozen, App. A.3
# V10  z_j = blank for j >= length, which is M/8, M/4, M/2 or M        masked variant, App. A.3


class Encoder(nn.Module):
    """Clips -> mean and log-variance of M = N tokens of c channels, V1 and V2.

    Latent variant, V9: l frozen tokens go in front, and only their outputs are kept: M = l, whatever p is.
    E = M c counts the means alone: nobody sends variances.
    """

    def __init__(self, cfg):
        super().__init__()
        self.sizes = s = sizes(cfg)
        self.variational = cfg.variational
        D = s.encoder[0]
        outputs = 2 * cfg.channels if cfg.variational else cfg.channels
        self.embed = nn.Linear(s.values, D)
        self.queries = nn.Buffer(sincos_pos_embed(cfg.latents, D), persistent=False)
        self.trunk = Trunk(s.encoder, token_positions(s.grid, cfg.rope, cfg.latents), cfg)
        self.to_code = nn.Linear(D, outputs)

    def forward(self, x):
        """Clips (B, 3, T, H, W) in [-1, 1] -> mean, logvar (B, M, c); not variational: mean and None."""
        x = self.embed(patchify(x, self.sizes))                                                    # (B, N, D)
        queries = self.queries.expand(len(x), -1, -1)                                              # (B, l, D)
        x = self.trunk(torch.cat((queries, x), 1))                                               # (B, l+N, D)
        x = self.to_code(x[:, :self.sizes.M])                                                      # (B, M, e)
        code = x.to(self.to_code.weight.dtype)              # float32 again, behind autocast       # (B, M, e)
        if not self.variational:
            return code, None                                                           # (B, M, c), (B, M, c)
        mean, logvar = code.chunk(2, 2)                                                 # (B, M, c), (B, M, c)
        return mean, logvar.clamp(-30, 20)                                              # (B, M, c), (B, M, c)


class Decoder(nn.Module):
    """Codes -> clips, V5, without tanh or clamp. Larger than the encoder: size pays only here (Figs. 6 to 9).

    Latent variant, V9: N frozen tokens go behind the code, and only their outputs are kept.
    """

    def __init__(self, cfg):
        super().__init__()
        self.sizes = s = sizes(cfg)
        D = s.decoder[0]
        self.blank = nn.Parameter(torch.zeros(cfg.channels)) if cfg.masked else None
        self.from_code = nn.Linear(cfg.channels, D)
        masks = s.N if cfg.latents else 0
        self.masks = nn.Buffer(sincos_pos_embed(masks, D), persistent=False)
        self.trunk = Trunk(s.decoder, token_positions(s.grid, cfg.rope, cfg.latents), cfg)
        self.to_pixels = nn.Linear(D, s.values, bias=False)
        self.colour = nn.Parameter(torch.zeros(3, 1, 1, 1))

    def forward(self, z, length=None):
        """Codes z (B, M, c) -> clips. Masked variant, V10: tokens from number length (B,) on become blank."""
        if self.blank is not None and length is not None:
            kept = torch.arange(z.shape[1], device=z.device) < length[:, None]                        # (B, M)
            z = torch.where(kept[..., None], z, self.blank)                                        # (B, M, c)
        masks = self.masks.expand(len(z), -1, -1)                                                  # (B, m, D)
        x = self.trunk(torch.cat((self.from_code(z), masks), 1))                                 # (B, M+m, D)
        x = self.to_pixels(x[:, -self.sizes.N:])                                                   # (B, N, e)
        return unpatchify(x, self.sizes) + self.colour                                       # (B, 3, T, H, W)


class Autoencoder(nn.Module):
    """Encoder and decoder of separate sizes around the Gaussian bottleneck (Sec. 2)."""

    def __init__(self, cfg):
        super().__init__()
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.apply(initialise)
        # Official code: V1's bias and all of V5, convolutions there, keep PyTorch's default.
        bound = self.encoder.embed.in_features ** -0.5
        for tensor in (self.encoder.embed.bias, self.decoder.to_pixels.weight, self.decoder.colour):
            nn.init.uniform_(tensor, -bound, bound)

    @property
    def blocks(self):
        return [*self.encoder.trunk.blocks, *self.decoder.trunk.blocks]

    def forward(self, x, noise=None, length=None):
        """Clips, noise of the bottleneck (B, M, c) or None for z = mean -> reconstruction, mean, logvar."""
        mean, logvar = self.encoder(x)                                                  # (B, M, c), (B, M, c)
        x = self.decoder(bottleneck(mean, logvar, noise), length)                            # (B, 3, T, H, W)
        return x, mean, logvar                                         # (B, 3, T, H, W), (B, M, c), (B, M, c)


def initialise(module):
    """Every Linear and convolution of the three models: Xavier-uniform, zero bias (official code)."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def bottleneck(mean, logvar, noise):
    """The code z (B, M, c), V3. Metrics take no noise, so z = mean; the generator learns from noisy codes."""
    if noise is None or logvar is None:
        return mean                                                                                # (B, M, c)
    return mean + torch.exp(0.5 * logvar) * noise                                                  # (B, M, c)


def blur(x):
    """Halve x (B, C, H, W) behind StyleGAN's filter [1, 3, 3, 1], against aliasing."""
    line = x.new_tensor([1, 3, 3, 1]) / 8
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 4, 4)                                 # (C, 1, 4, 4)
    return F.conv2d(x, kernel, stride=2, padding=1, groups=len(kernel))                         # (B, C, h, w)


class DiscriminatorBlock(nn.Module):
    """Residual: halves the sides, a channels become b, in the first convolution (official code; in StyleGAN2,
    in the second). The sum of two branches over sqrt 2 keeps their variance."""

    def __init__(self, a, b):
        super().__init__()
        self.conv1 = nn.Conv2d(a, b, 3, padding=1)
        self.conv2 = nn.Conv2d(b, b, 3, padding=1)
        self.skip = nn.Conv2d(a, b, 1, bias=False)

    def forward(self, x):
        y = F.leaky_relu(self.conv1(x), 0.2)                                                    # (b, K, H, W)
        y = F.leaky_relu(self.conv2(blur(y)), 0.2)                                              # (b, K, h, w)
        return (y + self.skip(blur(x))) / 2**0.5                                                # (b, K, h, w)


class Discriminator(nn.Module):
    """StyleGAN-type critic of single frames, down to 4 x 4 pixels, without minibatch statistics, equalised
    rates or gradient penalty: small steps (--lr_disc) have to keep it in check."""

    def __init__(self, size, D=512):
        super().__init__()
        sides = [2**k for k in range(int(math.log2(size)), 1, -1)]              # size, size / 2, ..., 4
        widths = [max(1, D * 32 // max(side, 32)) for side in sides]            # D up to 32, then halved
        layers = [nn.Conv2d(3, widths[0], 3, padding=1), nn.LeakyReLU(0.2)]
        layers += [DiscriminatorBlock(a, b) for a, b in zip(widths, widths[1:])]
        layers += [nn.Conv2d(D, D, 3, padding=1), nn.LeakyReLU(0.2), nn.Flatten()]
        layers += [nn.Linear(16 * D, D), nn.LeakyReLU(0.2), nn.Linear(D, 1)]
        self.layers = nn.Sequential(*layers)
        self.apply(initialise)

    def forward(self, x):
        """Clips (B, 3, T, H, W) -> one number a frame, large for real ones."""
        return self.layers(as_frames(x))[:, 0]                                                           # (b)


class DiT(nn.Module):
    """Class-conditional diffusion transformer on codes, not patchified (Sec. 2.3).

    Positions: a learned table, and 1-D rotary angles, for clips too. Official code: its norms, unlike DiT's,
    have weights, and the last one follows upon the trunk's.
    """

    def __init__(self, cfg, classes):
        super().__init__()
        s = sizes(cfg)
        D = s.dit[0]
        self.classes = classes
        self.code = (s.M, cfg.channels)                 # shape of what it makes
        self.enter = nn.Linear(cfg.channels, D)
        self.pos_embed = nn.Parameter(torch.randn(s.M, D) / s.M**0.5)
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.label = nn.Embedding(classes + 1, D)                               # the last row: "no label"
        self.trunk = Trunk(s.dit, torch.arange(s.M)[:, None], cfg, ModulatedBlock)
        self.norm = nn.LayerNorm(D)
        self.modulation = nn.Linear(D, 2 * D)
        self.head = nn.Linear(D, 2 * cfg.channels)
        self.apply(initialise)
        for module in (self.time[0], self.time[2], self.label):
            nn.init.normal_(module.weight, std=0.02)
        # Zero, so that blocks start as the identity and the output as 0.
        for module in (self.modulation, self.head, *(block.modulation for block in self.trunk.blocks)):
            nn.init.zeros_(module.weight)

    def forward(self, x, time, label):
        """Noisy codes (B, M, c), times (B,), labels (B,) -> noise, and v of the variance, in 2 c channels."""
        time = self.time(timestep_embedding(time).to(x.dtype))                                        # (B, D)
        condition = F.silu(time + self.label(label))                                                  # (B, D)
        shift, scale = self.modulation(condition)[:, None].chunk(2, 2)                  # (B, 1, D), (B, 1, D)
        x = self.trunk(self.enter(x) + self.pos_embed, condition)                                  # (B, M, D)
        return self.head((1 + scale) * self.norm(x) + shift)                                       # (B, M, e)


# --- Objective ---------------------------------------------------------------
#
# V11  L = L_rec + beta L_kl + eta L_lpips + lambda L_gan          Eq. (1); L_rec is the mean squared error
#      lambda is 0 in stage 1; in stage 2 L_kl is a constant
# V12  L_kl = 1/2 mean(mean^2 + exp(logvar) - 1 - logvar)          over tokens and channels (official code)
# V13  L_lpips = sum over taps of mean over space of w . (unit(f) - unit(g))^2
# V14  L_gan = -mean D(reconstruction)
# V15  L_disc = 1/2 mean relu(1 - D(clip)) + 1/2 mean relu(1 + D(reconstruction))      hinge loss
# V18  z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps                 abar_t = product of (1 - beta_s), s <= t
# V19  L_dit = mean (eps - eps')^2 + L_vb                          eps' predicted; detached inside L_vb
# V20  logvar_t = f log beta_t + (1 - f) log betatilde_t           f = (v + 1)/2, v predicted
# V21  L_vb = KL(q(z_(t-1) | z_t, z) || p(z_(t-1) | z_t)) / log 2  bits per dimension, for t > 0
#      mean of q = weight_t z + rest_t z_t, of p the same with z' (V24) for z;  variances betatilde_t and V20
# V22  L_vb = -log2 (cdf(z + 1/255) - cdf(z - 1/255))              for t = 0, cdf of p(z_(t-1) | z_t)


def kl_term(mean, logvar):
    """V12 of each clip (B,): half the MEAN, so that beta means the same at any E; 0 if not variational.

    It hardly regularises: codes keep a scale of their own, the std in the log of stage dit.
    """
    if logvar is None:
        return mean.new_zeros(len(mean))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)                                         # (B, M, c)
    return kl.mean((1, 2))                                                                               # (B)


class VGG16:
    """The features behind LPIPS: relu1_2, 2_2, 3_3, 4_3, 5_3 of VGG16, and LPIPS's weights of their channels.

    From a file of 13 layers and 5 heads in order, such as lpips.LPIPS(net="vgg").state_dict() saved by torch.
    """

    def __init__(self, path, device):
        tensors = [tensor.float().to(device) for tensor in common.read_weights(path).values()]
        layers = [t for t in tensors if t.ndim == 1 or t.shape[2:] == (3, 3)]
        # Those with 3 channels are constants of LPIPS's scaling.
        heads = [t.flatten() for t in tensors if t.shape[2:] == (1, 1) and t.shape[1] > 3]
        widths = [64] * 4 + [128] * 4 + [256] * 6 + [512] * 12 + [64, 128, 256, 512, 512]
        fits = [len(t) for t in layers + heads[:5]] == widths
        common.require(fits, f"--vgg {path}: not the weights of VGG16 and LPIPS")
        self.layers = list(zip(layers[::2], layers[1::2]))
        self.heads = heads[:5]

    def __call__(self, x):
        """Frames (b, 3, H, W) in [-1, 1] -> five maps (b, K, h, w)."""
        shift = x.new_tensor([-0.030, -0.088, -0.188])[:, None, None]
        scale = x.new_tensor([0.458, 0.448, 0.450])[:, None, None]
        x = (x - shift) / scale                                                                 # (b, 3, H, W)
        maps = []
        for i, (kernel, bias) in enumerate(self.layers):
            if i in (2, 4, 7, 10):
                x = F.max_pool2d(x, 2)
            x = F.relu(F.conv2d(x, kernel, bias, padding=1))
            maps.append(x)
        return [maps[i] for i in (1, 3, 6, 9, 12)]


class TeacherFeatures:
    """Our stand-in for VGG16: the last map of a small classifier, its 64 channels weighted by .1 each."""

    def __init__(self, teacher, device):
        self.teacher = teacher.to(device)
        self.heads = [torch.full((64,), 0.1, device=device)]

    def __call__(self, x):
        return [self.teacher.spatial(x)]                                                       # (b, 64, h, w)


def perceptual_features(cfg, device):
    """The features behind eta: VGG16 from --vgg, or the teacher; None without a perceptual term."""
    if not cfg.perceptual:
        return None
    if cfg.vgg:
        return VGG16(cfg.vgg, device)
    return TeacherFeatures(judge(cfg, "teacher"), device)


def unit_vectors(x):
    """Maps (b, K, h, w), every place's vector of K channels scaled to length 1."""
    return x / ((x.square().sum(1, keepdim=True) + 1e-10).sqrt() + 1e-10)                       # (b, K, h, w)


def lpips(x, y, features):
    """V13 of clips (B, 3, T, H, W) in [-1, 1], one number a frame: a clip is so many images, here as in the
    GAN. features(frames) -> maps; features.heads: a weight a channel for each."""
    distance = 0
    for f, g, head in zip(features(as_frames(x)), features(as_frames(y)), features.heads):
        f = unit_vectors(f.to(head.dtype))
        g = unit_vectors(g.to(head.dtype))
        distance = distance + ((f - g).square() * head[:, None, None]).sum(1).mean((1, 2))               # (b)
    return distance


def reconstruction_losses(recon, mean, logvar, x, cfg, features):
    """V11 without the GAN -> value, and its unweighted parts for the log. features: as in lpips.

    Official code differs: an `=` for a `+=` overwrites the squared error by a tenth of a smoothed L1.
    """
    losses = {"mse": F.mse_loss(recon.to(x.dtype), x), "kl": kl_term(mean, logvar).mean()}
    value = losses["mse"] + cfg.kl * losses["kl"]
    if cfg.perceptual:
        losses["lpips"] = lpips(recon, x, features).mean()
        value = value + cfg.perceptual * losses["lpips"]
    return value, losses


def loss_ae(model, batch, draws, cfg, features):
    """Stage 1: V11 with lambda = 0 -> value, losses. batch: clips (B, 3, T, H, W) and labels.

    draws: noise (B, M, c) of V3; masked variant: length (B,) of V10.
    """
    x, _ = batch
    recon, mean, logvar = model(x, draws["noise"], draws.get("length"))
    return reconstruction_losses(recon, mean, logvar, x, cfg, features)


def loss_decoder(model, batch, draws, cfg, features, disc, weight):
    """Stage 2: all of V11, for the decoder -> value, losses, reconstruction. batch and draws as in loss_ae.

    The encoder is frozen, so the KL term is a constant. weight: lambda on its ramp, V16; lambda is 1 in
    Sec. 2.3, and .05, the best one, in App. A.2.
    """
    x, _ = batch
    recon, mean, logvar = model(x, draws["noise"], draws.get("length"))
    value, losses = reconstruction_losses(recon, mean, logvar, x, cfg, features)
    losses["gan"] = -disc(recon).to(x.dtype).mean()                                             # V14
    return value + weight * losses["gan"], losses, recon


def loss_disc(disc, x, recon):
    """V15: a frame that is told apart by a margin of 1 counts no more. Nothing flows back into recon."""
    real = disc(x).to(x.dtype)                                                                           # (b)
    fake = disc(recon.detach()).to(x.dtype)                                                              # (b)
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


# DDPM's linear schedule for times 0 to 999; prev: one step earlier. betatilde, the posterior variance, is 0
# at time 0, which takes the logarithm of time 1.
betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
alphas_cumprod = torch.cumprod(1 - betas, 0)
alphas_cumprod_prev = torch.cat((torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]))
posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
posterior_log_variance = posterior_variance.clamp(min=posterior_variance[1]).log()


def at(table, time, x):
    """The entries `time` (B,) of a table (1000,), to stand beside codes x (B, M, c)."""
    return table.to(x)[time][:, None, None]                                                        # (B, 1, 1)


def variational_bound(z, noisy, noise, v, time):
    """Bits per dimension (B,) of one reverse step; z, noisy z_t, predicted noise and v are (B, M, c)."""
    low = at(posterior_log_variance, time, z)                                                      # (B, 1, 1)
    high = at(betas.log(), time, z)                                                                # (B, 1, 1)
    logvar = low + (v + 1) / 2 * (high - low)                                                      # (B, M, c)
    clean = noisy - at((1 - alphas_cumprod).sqrt(), time, z) * noise                               # (B, M, c)
    clean = clean / at(alphas_cumprod.sqrt(), time, z)                                             # (B, M, c)
    # gap: the mean of q less that of p. Their parts rest_t z_t cancel; at t = 0 the mean of q is z.
    weight = betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod)                                # (1000)
    gap = at(weight, time, z) * (z - clean)                                                        # (B, M, c)
    kl = 0.5 * (logvar - low - 1 + (low - logvar).exp() + gap.square() * (-logvar).exp())          # (B, M, c)
    first = time[:, None, None] == 0                                                               # (B, 1, 1)
    nats = torch.where(first, first_step_nats(z, gap, logvar), kl)                                 # (B, M, c)
    return nats.mean((1, 2)) / math.log(2)                                                               # (B)


def first_step_nats(z, gap, logvar):
    """V22 in nats (B, M, c): the likelihood of 8-bit pixels in bins of 2/255, open at the ends, which the
    official code keeps for codes. gap: z less the mean of p."""
    precision = (-0.5 * logvar).exp()                                                              # (B, M, c)
    above = normal_cdf((gap + 1 / 255) * precision)                                                # (B, M, c)
    below = normal_cdf((gap - 1 / 255) * precision)                                                # (B, M, c)
    mass = torch.where(z > 0.999, 1 - below, above - below)                                        # (B, M, c)
    mass = torch.where(z < -0.999, above, mass)                                                    # (B, M, c)
    return -mass.clamp(min=1e-12).log()                                                            # (B, M, c)


def normal_cdf(u):
    """The normal distribution function, by GELU's approximation with tanh."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


def loss_dit(model, batch, draws):
    """Stage 3, V19 -> value, losses. batch: codes z (B, M, c), labels y (B,).

    draws: time (B,) in 0..999, eps like z, drop (B,): lose the label.
    """
    z, y = batch
    time = draws["time"]
    noisy = at(alphas_cumprod.sqrt(), time, z) * z                                                 # (B, M, c)
    noisy = noisy + at((1 - alphas_cumprod).sqrt(), time, z) * draws["eps"]                        # (B, M, c)
    label = y.masked_fill(draws["drop"], model.classes)                                                  # (B)
    noise, v = model(noisy, time, label).type_as(z).chunk(2, 2)                         # (B, M, c), (B, M, c)
    mse = (noise - draws["eps"]).square().mean()
    bound = variational_bound(z, noisy, noise.detach(), v, time).mean()
    return mse + bound, {"mse": mse, "bound": bound}


# --- Sampling ----------------------------------------------------------------
#
# V23  eps' = eps'(no label) + cfg_scale (eps'(label) - eps'(no label))
# V24  z' = (z_t - sqrt(1 - abar_t) eps') / sqrt(abar_t)
#      z_s = sqrt(abar_s) z' + sqrt(1 - abar_s - sigma^2) eps' + sigma n           from time t to the next, s
# V25  sigma = eta sqrt((1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s))


def guided(model, x, time, y, cfg_scale):
    """Classifier-free guidance, V23, of all channels, those of the variance too; exact at 1 and 0.

    Rank no tokenizers by samples at a high scale: that with the best gFID of Fig. 5 at 3 (p = 8, c = 32) is
    one of the three worst at 1.5.
    """
    if cfg_scale == 1:
        return model(x, time, y)                                                                   # (B, M, e)
    labels = torch.cat((torch.full_like(y, model.classes), y))                                         # (2*B)
    both = model(torch.cat((x, x)), torch.cat((time, time)), labels)                             # (2*B, M, e)
    unconditional, conditional = both.chunk(2)                                                # each (B, M, e)
    return torch.lerp(unconditional, conditional, cfg_scale)                                       # (B, M, e)


@torch.no_grad()
def sample(model, y, generator, num_steps=250, cfg_scale=1.0, eta=0.0):
    """DDIM, V24, from N(0, I) to codes (B, M, c) of classes y (B,), at num_steps >= 2 even times.

    Sec. 2.3: DDIM, 250 steps. Official code differs: eta = 1, fresh noise at every step but the last. Nothing
    brings the codes to the scale of N(0, I) but the weak KL term.
    """
    x = torch.randn(len(y), *model.code, generator=generator, device=y.device)                     # (B, M, c)
    times = (torch.arange(num_steps) * 999 / (num_steps - 1)).round().long()
    for k in reversed(range(num_steps)):
        time = times[k].to(y.device).expand(len(y))                                                      # (B)
        noise, _ = guided(model, x, time, y, cfg_scale).type_as(x).chunk(2, 2)          # (B, M, c), (B, M, c)
        abar = alphas_cumprod[times[k]].item()
        abar_next = alphas_cumprod[times[k - 1]].item() if k > 0 else 1.0
        sigma = eta * math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))          # V25
        clean = (x - math.sqrt(1 - abar) * noise) / math.sqrt(abar)                                # (B, M, c)
        x = math.sqrt(abar_next) * clean + math.sqrt(1 - abar_next - sigma**2) * noise             # (B, M, c)
        if sigma > 0:
            x = x + sigma * torch.randn(x.shape, generator=generator, device=y.device)             # (B, M, c)
    return x


# --- Training ----------------------------------------------------------------
#
# V16  lambda(step) = lambda clip((step - s0) / s1, 0, 1)   s0, s1: 5 %, 50 % of the steps (official: of 100k)
# V26  lr(step) = peak (low + (1 - low) rise)             rise: linear in the warm-up, then half a cosine

# Learning rates are for 256 images a step: at TOY's batch of 32, 1.2e-2 means 1.5e-3.
TOY = dict(size=32, flip=False, model="72x1x6-72x2x6/8", batch=32, lr=1.2e-2, disc=32, lr_disc=2e-3, ema=0.99,
           dit="64x4x4", batch_dit=64, lr_dit=1e-2, steps_decoder=60, num_steps=30, cfg_scale=2.0, count=500)
PAPER = dict(bf16=True, batch_decoder=256, batch_dit=256, steps_dit=500_000)    # Tab. 6: dit XL, 4M steps
VIDEO = dict(PAPER, frames=16, size=128, batch=256, batch_decoder=128)           # Tab. 5, UCF-101
PRESETS = {
    "demo": dict(TOY, channels=8, steps=600, steps_dit=1500, kl=1e-2, muon=3.0, lr_dit=2e-2, cfg_scale=4.0),
    "sweep": dict(TOY, sweep="/8:1,2,4,8,16,32 /4:2,4,8,16", objects=4, perceptual=0.0, steps=1500),
    "clips": dict(TOY, model="72x1x6-72x2x6/2x8", frames=8, perceptual=0.0, steps=900, batch=16, lr=3e-3),
    "small": dict(data="cifar10", size=32, model="384x6x6-384x12x6/4", channels=8, dit="384x12x6", batch=256,
                  lr=4e-4, lr_dit=3e-4, ema=0.999, steps=20_000, steps_dit=60_000),  # our choice, not yet run
    **{f"{pair}/16": dict(PAPER, model=f"{pair}/16")                    # Fig. 6: encoder and decoder apart
       for pair in ("S-S", "B-S", "S-B", "B-B", "S-L", "B-L", "L-L")},
    **{f"S-B/{tubelet}": dict(VIDEO, model=f"S-B/{tubelet}") for tubelet in ("4x8", "8x8", "4x16")},
    "S-B/16@512": dict(PAPER, model="S-B/16", size=512)}
TARGET = dict(psnr=23.25, accuracy=0.75)    # mean - 4 s.d. of seeds 0 to 4: 23.57 +- .08, .867 +- .029


def clips(dataset, index, device="cpu"):
    """Images or clips `index` as (B, 3, T, H, W) in [-1, 1], made on the device."""
    x = dataset.pixels(index, device).to(torch.get_default_dtype())
    return x[:, :, None] if x.ndim == 4 else x.transpose(1, 2)


def draw(dataset, cfg, step, device, stage="ae"):
    """A step's clips (B, 3, T, H, W) and labels (B,), and by name the draws of the stage's loss.

    Drawn for the global batch B, cut to this rank's share: noise of V3, a draw of length for the masked
    variant, and for stage dit time, eps and drop.
    """
    B = common.batch_size(cfg, stage)
    M = sizes(cfg).M
    generator = common.make_generator(cfg.seed, step, f"{stage} data")
    index = torch.randint(len(dataset), (B,), generator=generator)
    flip = torch.rand(B, generator=generator) < 0.5
    draws = {}
    if stage == "dit":
        draws["drop"] = torch.rand(B, generator=generator) < cfg.label_dropout
        draws["time"] = torch.randint(1000, (B,), generator=generator)
    elif cfg.masked:
        draws["length"] = (M // 2 ** torch.randint(4, (B,), generator=generator)).clamp(min=1)  # V10
    draws = {name: common.shard(value).to(device) for name, value in draws.items()}
    names = ("noise", "eps") if stage == "dit" else ("noise",)
    shape = (len(names), B, M, cfg.channels)
    draws |= zip(names, common.shard_noise(shape, cfg.seed, step, f"{stage} noise", device, axis=1))
    index = common.shard(index).numpy()
    x = clips(dataset, index, device)
    if cfg.flip:
        x = torch.where(common.shard(flip).to(device)[:, None, None, None, None], x.flip(-1), x)
    return (x, torch.from_numpy(dataset.labels[index]).to(device)), draws


def ramp(step, start, length):
    """V16's factor: 0 up to `start`, 1 from `length` steps later on, a straight line between."""
    return min(max((step - start) / length, 0.0), 1.0)


def learning_rate(cfg, step, stage="ae"):
    """V26 (Sec. 2.3); of a clip, each frame counts as an image, but not in stage dit (official code).

    Official code differs: after the same warm-ups, lows of 1e-5, in stage dit 3e-5, whatever the batch. Here
    they keep the share of the peak that they have at batch 1024; so at batch 256 they are a quarter of those.
    """
    if stage == "dit":
        peak, frames, low, warmup = cfg.lr_dit, 1, 0.075, 0.1
    else:
        peak, frames, low, warmup = cfg.lr, cfg.frames, 0.025, 0.03
    done = step / (getattr(cfg, f"steps_{stage}") or cfg.steps)
    if done < warmup:
        rise = done / warmup
    else:
        rise = 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
    return peak * common.batch_size(cfg, stage) * frames / 256 * (low + (1 - low) * rise)


def optimizer(model, cfg, muon=0.0):
    """AdamW of all stages (Sec. 2.3): biases and norms decay, too. The rate is set before every step.

    No clipping: the official code clips before backward, to no effect. muon: our choice, Muon for the
    matrices of the blocks at that multiple of the rate; 0 is the paper's.
    """
    adamw = torch.optim.AdamW(model.parameters(), cfg.lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    blocks = nn.ModuleList(module for module in model.modules() if isinstance(module, Block))
    return common.with_muon(adamw, blocks, muon)


def init_parts(cfg, model):
    """What --init has for a model: (part, its name in the checkpoint, tables that may stay as they are).

    A checkpoint of any stage starts an auto-encoder, one of stage dit a generator too, of any classes.
    """
    state = common.read_checkpoint(cfg.init, "vitok")["state"] if cfg.init else {}
    if isinstance(model, DiT):
        return [(model, "ema", ("label.weight",))] if "model" in state else []
    if "disc" in state:
        return [(model.encoder, "encoder", ()), (model.decoder, "ema", ())]
    return [(model, "tokenizer", ())] if state else []


def start_from(cfg, run, model):
    """--init: another run's weights, unless this stage goes on from its own."""
    if run.begins:
        for part, name, new in init_parts(cfg, model):
            common.load_init(run, part, name, new)


def load(cfg, path):
    """From any checkpoint: the frozen auto-encoder (decoder averaged), the averaged generator or None, and
    the names of the classes."""
    device = common.device_of(cfg)
    saved = common.read_checkpoint(path, "vitok", device)
    tokenizer = Autoencoder(cfg).to(device).requires_grad_(False)
    if "disc" in saved["state"]:                                # written by stage decoder
        common.load_into({"encoder": tokenizer.encoder, "ema": tokenizer.decoder}, saved, path)
    else:
        common.load_into({"tokenizer": tokenizer}, saved, path)
    if "model" not in saved["state"]:                           # not by stage dit
        return tokenizer, None, saved["classes"]
    classes = len(saved["state"]["ema"]["label.weight"]) - 1
    generator = DiT(cfg, classes).to(device).requires_grad_(False)
    common.load_into({"ema": generator}, saved, path)
    return tokenizer, generator, common.class_names(saved, classes)


def train_ae(cfg):
    """Stage 1: all weights, without the GAN and without averaging (Sec. 2.3)."""
    device = common.device_of(cfg)
    dataset = open_split(cfg, "train")
    features = perceptual_features(cfg, device)
    run = common.Run(cfg, "ae", classes=dataset.classes)
    run.seed_weights()
    model = Autoencoder(cfg).to(device)
    start_from(cfg, run, model)
    opt = optimizer(model, cfg, cfg.muon)
    start = run.restore(tokenizer=model, opt=opt)
    common.compile_blocks(cfg, model.blocks)
    read = common.read_ahead(lambda step: draw(dataset, cfg, step, device), device, run.total)
    for step in run.steps(start):
        batch, draws = read(step)
        common.set_learning_rate(opt, learning_rate(cfg, step))
        opt.zero_grad()
        for part, part_draws in common.in_parts(cfg.accumulate, batch, draws):
            with common.autocast(cfg):
                value, losses = loss_ae(model, part, part_draws, cfg, features)
            (value / cfg.accumulate).backward()
            run.add(loss=value, **losses)
        common.average_gradients(model.parameters())
        opt.step()
        run.log(step)
        run.save(step)


def train_decoder(cfg):
    """Stage 2: decoder against discriminator, the latter trained from step 0 (Sec. 2.3, App. A.2).

    The encoder stays as it is: trained along, it gives an rFID of .77 instead of .56 (Fig. 18). There, too, a
    discriminator twice as fast (4e-5) collapses after 60k steps.
    """
    device = common.device_of(cfg)
    dataset = open_split(cfg, "train")
    features = perceptual_features(cfg, device)
    earlier = common.require_stage(cfg, "ae")                   # before Run, which puts aside an old one
    run = common.Run(cfg, "decoder", classes=dataset.classes)
    run.seed_weights()
    model, _, _ = load(cfg, earlier)
    decoder = model.decoder.requires_grad_(True)
    disc = Discriminator(cfg.size, cfg.disc).to(device)
    ema = copy.deepcopy(decoder).requires_grad_(False)
    opt = optimizer(decoder, cfg)
    opt_disc = optimizer(disc, cfg)
    start = run.restore(frozen={"encoder": model.encoder}, decoder=decoder, ema=ema, disc=disc, opt=opt,
                        opt_disc=opt_disc)
    common.compile_blocks(cfg, model.blocks)
    peak_disc = cfg.lr_disc * common.batch_size(cfg, "decoder") / 256
    read = common.read_ahead(lambda step: draw(dataset, cfg, step, device, "decoder"), device, run.total)
    for step in run.steps(start):
        batch, draws = read(step)
        common.set_learning_rate(opt, learning_rate(cfg, step, "decoder"))
        # Sec. 2.3: the discriminator's rate rises during 25k of 100k steps, from the first on.
        common.set_learning_rate(opt_disc, peak_disc * ramp(step + 1, 0, run.total / 4))
        weight = cfg.gan * ramp(step, run.total / 20, run.total / 2)
        opt.zero_grad()
        opt_disc.zero_grad()
        for part, part_draws in common.in_parts(cfg.accumulate, batch, draws):
            with common.autocast(cfg):
                value, losses, recon = loss_decoder(model, part, part_draws, cfg, features, disc, weight)
                value_disc = loss_disc(disc, part[0], recon)
            (value / cfg.accumulate).backward(inputs=list(decoder.parameters()))    # none into disc
            (value_disc / cfg.accumulate).backward()
            run.add(loss=value, disc=value_disc, **losses)
        common.average_gradients([*decoder.parameters(), *disc.parameters()])
        opt.step()
        opt_disc.step()
        common.ema_update(ema, decoder, cfg.ema)
        run.log(step)
        run.save(step)


def require_same_encoder(cfg, path):
    """UserError where decoder.pt was trained behind another encoder than that of ae.pt, at `path`."""
    fresh, _, _ = load(cfg, path)
    behind, _, _ = load(cfg, path.with_name("decoder.pt"))
    stale = common.differs(fresh.encoder, behind.encoder.state_dict())
    common.require(not stale, f"{path.with_name('decoder.pt')}: was trained behind another ae.pt; "
                   "run --stage decoder with --resume first")


def train_dit(cfg):
    """Stage 3: the generator, on codes sampled from the frozen encoder, neither scaled nor normalised."""
    device = common.device_of(cfg)
    dataset = open_split(cfg, "train")
    earlier = common.require_stage(cfg, "ae")
    if earlier.with_name("decoder.pt").exists():
        require_same_encoder(cfg, earlier)
        earlier = earlier.with_name("decoder.pt")
    run = common.Run(cfg, "dit", classes=dataset.classes)
    run.seed_weights()
    tokenizer, _, _ = load(cfg, earlier)
    model = DiT(cfg, len(dataset.classes)).to(device)
    start_from(cfg, run, model)
    ema = copy.deepcopy(model).requires_grad_(False)
    opt = optimizer(model, cfg, cfg.muon)
    start = run.restore(frozen={"tokenizer": tokenizer}, model=model, ema=ema, opt=opt)
    common.compile_blocks(cfg, model.trunk.blocks)
    read = common.read_ahead(lambda step: draw(dataset, cfg, step, device, "dit"), device, run.total)
    for step in run.steps(start):
        batch, draws = read(step)
        common.set_learning_rate(opt, learning_rate(cfg, step, "dit"))
        opt.zero_grad()
        for (x, y), part_draws in common.in_parts(cfg.accumulate, batch, draws):
            with common.autocast(cfg):
                z = bottleneck(*tokenizer.encoder(x), part_draws["noise"])
                value, losses = loss_dit(model, (z, y), part_draws)
            (value / cfg.accumulate).backward()
            run.add(loss=value, std=z.std(), **losses)
        common.average_gradients(model.parameters())
        opt.step()
        common.ema_update(ema, model, cfg.ema)
        run.log(step)
        run.save(step)


STAGES = {"ae": train_ae, "decoder": train_decoder, "dit": train_dit}


def train(cfg):
    """One stage, or all in order (--resume passes over the finished); 1 where the demo missed a target."""
    last = common.run_stages(cfg, STAGES)
    result = report(cfg, last)
    if common.rank() > 0 or cfg.preset != "demo" or not common.is_preset(cfg, PRESETS):
        return 0
    missed = [name for name, least in TARGET.items() if result[name] < least]
    print(f"target {TARGET}: {'MISSED: ' + ', '.join(missed) if missed else 'reached'}")
    return int(bool(missed) and common.Run.trained)


# --- Checks ------------------------------------------------------------------


def check(cfg):
    """Every mistake that can be seen without the data; UserError with one line."""
    for point in parse_sweep(cfg):
        sizes(point)
    fits = cfg.sweep or cfg.stage in ("ae", "dit") or math.log2(cfg.size).is_integer()
    common.require(fits, f"--size {cfg.size}: the discriminator needs a power of two; --stage ae does not")
    common.require(cfg.sample or not cfg.export + cfg.decode, "--export, --decode: only with --sample")
    if cfg.classes != "all":
        common.parse_classes(cfg.classes, math.inf)
    if cfg.stage in ("decoder", "dit") and not cfg.sample:
        common.require_stage(cfg, "ae")


def parse_sweep(cfg):
    """The configurations of --sweep, each with a run folder of its own; without --sweep, cfg alone.

    Words MODEL:c,c,...: a MODEL as --model has it, or /P or /QxP for --model's trunks, with each c channels.
    """
    if not cfg.sweep:
        return [cfg]
    points = []
    for word in cfg.sweep.split() or [""]:
        found = re.fullmatch(r"([^:]+):([1-9]\d*(?:,[1-9]\d*)*)", word, re.ASCII)
        common.require(found, f"--sweep {cfg.sweep!r}: write MODEL:c,c,... as in '/8:4,8 S-B/16:16'")
        model = found[1]
        if model.startswith("/"):
            model = cfg.model.split("/")[0] + model
        for c in found[2].split(","):
            name = f"{cfg.name}-{model.replace('/', '-')}-c{c}"
            points.append(replace(cfg, model=model, channels=int(c), name=name, stage="ae", sweep=""))
    return points


def open_split(cfg, split, count=20_000):
    """The data's 'train', 'test' or 'judge' split (stills); UserError where it is not of --size.

    A folder's pictures must be of that size already: results are PSNR on pixels, and scaling on the way would
    change what they are measured on.
    """
    size = 0 if cfg.data.startswith("folder:") else cfg.size
    frames = 1 if split == "judge" else cfg.frames
    dataset = data.open_data(cfg.data, split, size, (1, cfg.objects), frames=frames, count=count)
    shape = dataset.images.shape
    common.require(shape[-1] == cfg.size and not dataset.latent,
                   f"--data {cfg.data}: {shape} where pictures of side {cfg.size} are wanted")
    return dataset


def judge(cfg, role):
    """A small classifier: as teacher it gives features, as ruler it measures; untrained in a short trial."""
    if cfg.steps >= 100:
        return common.judge(open_split(cfg, "judge", 10_000), role)
    torch.manual_seed(0)
    return common.Judge(3, 32, len(open_split(cfg, "judge", 10).classes)).requires_grad_(False)


def prepare(cfg):
    """Once, before the processes start: are there pictures and memory? Makes or fetches what is needed."""
    if cfg.sample or cfg.plan:
        return
    train = open_split(cfg, "train")
    test = open_split(cfg, "test", cfg.count)
    print(data.describe({"train": train, "test": test}), flush=True)
    data.require_images(open_split(cfg, "judge", 10), "judge", 2, "a judge")
    K = len(train.classes)
    common.parse_classes(cfg.classes, K)
    for point in parse_sweep(cfg):
        models = common.require_memory(cfg, lambda: nn.ModuleList([Autoencoder(point), DiT(point, K)]))
        for model in () if cfg.resume else models:
            for part, name, new in init_parts(cfg, model):
                common.init_state(cfg, part, name, new)
    perceptual_features(cfg, "cpu")


# --- Command line ------------------------------------------------------------
#
# V27  MACs of a side = depth (S (4 D^2 + 3 D m) + 2 S^2 D) + 3 q p p N D + code D
#      S tokens in its trunk
#      m = int(2.67 D)
#      code = 2 M c in the encoder (means and variances), M c in the decoder
# V28  PSNR = 10 log10(4 / mean (x - x')^2)       x' the reconstruction; values lie in [-1, 1]


def in_class(ruler, x, labels):
    """1 for each clip (B, 3, T, H, W) whose first frame the ruler puts into its class, else 0 (B,)."""
    return (ruler(x[:, :, 0].float().cpu()).argmax(1) == labels).float()


@torch.no_grad()
def reconstruct(cfg, tokenizer, ruler=None):
    """Test clips x and reconstructions y through z = mean, the first ten, and the means over --count of them.

    psnr: V28. With a ruler, accuracy_decoded, accuracy_real: the shares of y, x put into their class. All
    processes share the work. Official code differs: one PSNR from the squared error of a whole batch, which
    comes out lower.
    """
    test = open_split(cfg, "test", cfg.count)
    device = common.device_of(cfg)

    def measure(first, last):
        index = np.arange(first, last)
        x = clips(test, index, device)
        y = tokenizer(x)[0].to(x.dtype).clamp(-1, 1)
        error = (y - x).square().mean((1, 2, 3, 4))                                                      # (B)
        found = {"psnr": 10 * (4 / error).log10().cpu()}
        if ruler:
            labels = torch.from_numpy(test.labels[index])
            found["accuracy_decoded"] = in_class(ruler, y, labels)
            found["accuracy_real"] = in_class(ruler, x, labels)
        return x[:10].cpu(), y[:10].cpu(), found

    blocks = list(common.share_blocks(measure, min(cfg.count, len(test))))
    x, y, names = blocks[0]
    return x, y, {name: torch.cat([found[name] for _, _, found in blocks]).mean().item() for name in names}


def draw_samples(cfg, tokenizer, generator, labels):
    """Yields samples (m, 3, T, H, W) in [-1, 1] of labels (M,), 100 at a time, each block from a random
    stream of its own. All processes share the work, and each gets all of it."""
    device = common.device_of(cfg)

    def make(first, last):
        stream = common.make_generator(cfg.seed, first // 100, "sample", device)
        z = sample(generator, labels[first:last].to(device), stream, cfg.num_steps, cfg.cfg_scale, cfg.eta)
        return tokenizer.decoder(z).clamp(-1, 1).cpu()

    return common.share_blocks(make, len(labels))


def sample_labels(cfg, K, most):
    """Labels (classes, per class) of --count samples of --classes, out of K; at most `most` of a class."""
    chosen = torch.tensor(common.parse_classes(cfg.classes, K))
    return chosen[:, None].repeat(1, max(1, min(most, cfg.count // len(chosen))))


def film(path, x, rows, heads=()):
    """Clips (M, 3, T, H, W) in equal rows of these names, as one picture, animated where T > 1. Rank 0 alone
    writes it."""
    if common.rank() > 0:
        return
    columns = len(x) // len(rows)
    scale = max(1, 64 // x.shape[-1])
    frames = [common.grid(frame, columns, rows, heads, scale) for frame in common.to_uint8(x).unbind(2)]
    common.png(path, np.stack(frames))


def show_reconstructions(cfg, tokenizer, where, ruler=None):
    """reconstructions.png, test clips above what is decoded of them; returns the figures of reconstruct."""
    x, y, figures = reconstruct(cfg, tokenizer, ruler)
    film(where / "reconstructions.png", torch.cat((x, y)), ["original", "decoded"])
    return figures


def show_samples(cfg, tokenizer, generator, names, where, most, ruler=None):
    """samples.png, a row for each of ten classes; returns the first of each row, and figures of all samples.

    accuracy, with a ruler: the share that it puts into their class. Only what is shown is kept.
    """
    labels = sample_labels(cfg, generator.classes, most)
    shown = torch.arange(labels.numel()).view(labels.shape)[:10, :8]
    kept = []
    hits = []
    blocks = draw_samples(cfg, tokenizer, generator, labels.flatten())
    for rows, x in zip(torch.arange(labels.numel()).split(100), blocks):
        kept.append(x[torch.isin(rows, shown)])
        if ruler:
            hits.append(in_class(ruler, x, labels.flatten()[rows]))
    x = torch.cat(kept)
    film(where / "samples.png", x, [names[k] for k in labels[:10, 0]])
    return x[::shown.shape[1]], {"accuracy": torch.cat(hits).mean().item()} if ruler else {}


def show_nearest(cfg, x, where):
    """nearest.png: samples x (m, 3, T, H, W) above the training clips nearest to them."""
    x = x.transpose(1, 2)                                       # frames first, as data has them
    found = common.nearest(x, open_split(cfg, "train")).view_as(x)
    film(where / "nearest.png", torch.cat((x, found)).transpose(1, 2), ["sample", "train"])


def report(cfg, path):
    """Pictures and figures of a run that has ended with the checkpoint `path`; printed and returned.

    PSNR, and by the ruler, unless the run was a short trial: the share of clips in their class.
    """
    tokenizer, generator, names = load(cfg, path)
    where = path.parent
    ruler = judge(cfg, "ruler") if cfg.steps >= 100 else None
    result = show_reconstructions(cfg, tokenizer, where, ruler)
    if generator:
        most = cfg.count if ruler else 1
        x, figures = show_samples(cfg, tokenizer, generator, names, where, most, ruler)
        result |= figures
        if common.rank() == 0:
            show_nearest(cfg, x, where)
    if common.rank() == 0:
        print(f"{where}: " + "  ".join(f"{name} {value:.3f}" for name, value in result.items()), flush=True)
    return result


def export_samples(cfg, tokenizer, generator):
    """--export of a generator: --count samples, frame after frame, as FID tools read them."""
    chosen = common.parse_classes(cfg.classes, generator.classes)
    labels = torch.from_numpy(np.resize(chosen, cfg.count))     # in turn
    blocks = (as_frames(x) for x in draw_samples(cfg, tokenizer, generator, labels))
    common.export_images(cfg.export, blocks, len(labels) * cfg.frames)
    return f"{cfg.export}: {len(labels)} samples"


@torch.no_grad()
def export_latents(cfg, tokenizer):
    """--export of an auto-encoder: mean and logvar of the training split for `latents:FILE`, with --flip of
    its mirror images, too.

    scale: 1 / s.d. of mean plus noise, for others who train on the file; stage dit wants none.
    Arrays grow on disk, in a folder, until they are one file: memory does not grow with the data set.
    """
    dataset = open_split(cfg, "train")
    device = common.device_of(cfg)
    grid = (1, 1, cfg.latents) if cfg.latents else sizes(cfg).grid
    if cfg.frames == 1:
        grid = grid[1:]                                         # images: (h, w); clips: (t, h, w)
    shape = (len(dataset), cfg.channels, *grid)
    parts = ("latents", "logvar") if cfg.variational else ("latents",)

    def encode(first, last):
        x = clips(dataset, np.arange(first, last), device)
        codes = dict(zip(parts, tokenizer.encoder(x)))
        if cfg.flip:
            codes |= zip((f"{part}_flip" for part in parts), tokenizer.encoder(x.flip(-1)))
        return {name: code.transpose(1, 2).unflatten(2, grid).cpu() for name, code in codes.items()}

    blocks = common.share_blocks(encode, len(dataset), 64)
    if common.rank() > 0:
        return list(map(len, blocks))                           # it takes part in making them
    return f"{cfg.export}: latents {shape}, scale {write_latents(cfg.export, blocks, shape, dataset):.4f}"


def write_latents(path, blocks, shape, dataset):
    """An npz of the blocks {name: codes (m, ...)} of arrays of this shape, float16; returns its scale.

    Each array grows in a file of its own, until all are packed into one: not more than a block is in memory.
    """
    total = square = 0.0
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder, contextlib.ExitStack() as files:
        arrays = {}
        for codes in blocks:
            total += codes["latents"].double().sum().item()
            square += codes["latents"].double().square().sum().item()
            if "logvar" in codes:
                square += codes["logvar"].double().exp().sum().item()
            for name, code in codes.items():
                if name not in arrays:
                    arrays[name] = files.enter_context(open(f"{folder}/{name}.npy", "wb"))
                    np.lib.format.write_array_header_1_0(arrays[name], header)
                arrays[name].write(code.half().numpy().tobytes())
        files.close()
        count = math.prod(shape)
        scale = (square / count - (total / count)**2) ** -0.5
        for name, array in dict(labels=dataset.labels, class_names=dataset.classes, scale=scale).items():
            np.save(f"{folder}/{name}.npy", array)

        def write(file):
            with zipfile.ZipFile(file, "w") as archive:
                for member in Path(folder).iterdir():
                    archive.write(member, member.name)

        common.write_atomic(path, write)
    return scale


@torch.no_grad()
def decode_latents(cfg, tokenizer, where):
    """--decode: latents (M, c, h, w) or (M, c, t, h, w), unscaled, as stored -> decoded.png with the first.

    All go, frame after frame, as FID tools read them, to --export or decoded.npz.
    """
    found = data.open_data(f"latents:{cfg.decode}", size=0)
    shape = (math.prod(found.images.shape[2:]), found.images.shape[1])
    wanted = (sizes(cfg).M, cfg.channels)
    fits = shape == wanted
    common.require(fits, f"--decode {cfg.decode}: {shape} tokens and channels, {wanted} are wanted")

    def decode(first, last):
        z = torch.from_numpy(np.array(found.images[first:last], np.float32)).flatten(2).transpose(1, 2)
        data.release(found.images)
        return tokenizer.decoder(z.to(common.device_of(cfg))).cpu()

    target = cfg.export or where / "decoded.npz"
    blocks = (as_frames(x) for x in common.share_blocks(decode, len(found), 64))
    common.export_images(target, blocks, len(found) * cfg.frames)
    film(where / "decoded.png", decode(0, min(8, len(found))), ["decoded"])
    return f"{len(found)} decoded: {where}/decoded.png, {target}"


def count_costs(cfg):
    """What a configuration costs: parameters and multiply-adds, V27.

    The paper's "GFLOPs" are 10^9 MACs. Its Tab. 5 counts any tubelet as a patch of 3 q p p = 768 values.
    """
    s = sizes(cfg)
    S = s.N + cfg.latents
    E = s.M * cfg.channels
    with torch.device("meta"):
        model = Autoencoder(cfg)
    costs = {"tokens": s.M, "E": E, "pixels per float": 3 * cfg.frames * cfg.size**2 / E}
    for name, side, trunk in (("encoder", model.encoder, s.encoder), ("decoder", model.decoder, s.decoder)):
        D, depth, _ = trunk
        block = S * (4 * D**2 + 3 * D * int(2.67 * D)) + 2 * S**2 * D
        code = 2 * E if name == "encoder" and cfg.variational else E
        costs[f"{name} parameters"] = sum(p.numel() for p in side.parameters())
        costs[f"{name} MACs"] = depth * block + s.N * s.values * D + D * code
    for what in ("parameters", "MACs"):
        costs[what] = costs[f"encoder {what}"] + costs[f"decoder {what}"]
    return costs


def least_squares(x, y, degree=1):
    """The polynomial's coefficients, highest power first, and R^2."""
    coefficients = np.polyfit(x, y, degree)
    return coefficients, 1 - np.var(y - np.polyval(coefficients, x)) / np.var(y)


def run_sweep(cfg):
    """The study: stage ae at every point, then PSNR, which is a logarithm, against log2 E and log2 MACs.

    Figs. 2, 5: E decides (R^2 .92; 2.3 dB a doubling, by our fit), whatever p, c and the cost; so compare
    tokenizers at equal E. Leaves sweep.png: originals, then their reconstructions, E rising, each with its p.
    """
    if common.rank() == 0:
        common.write_json(common.folder(cfg) / "config.json", asdict(cfg) | {"resume": False})  # for --resume
    rows = [count_costs(point) | {"point": point} for point in parse_sweep(cfg)]
    rows.sort(key=lambda row: (row["E"], row["point"].model))
    for row in rows:
        tokenizer, _, _ = load(row["point"], common.run_stages(row["point"], STAGES))
        x, row["decoded"], figures = reconstruct(row["point"], tokenizer)
        row["psnr"] = figures["psnr"]
    if common.rank() > 0:
        return
    print(f"{'model':>24}{'c':>5}{'E':>8}{'pixels/float':>14}{'MACs':>16}{'PSNR':>8}")
    line = "{point.model:>24}{point.channels:5}{E:8}{pixels per float:14.2f}{MACs:16,}{psnr:8.2f}"
    for row in rows:
        print(line.format(**row))
    for name in ("E", "MACs"):
        if len({row[name] for row in rows}) < 3:                # two points lie on any line
            print(f"PSNR on log2 {name}: no fit, for want of three values")
            continue
        (slope, _), r2 = least_squares(np.log2([row[name] for row in rows]), [row["psnr"] for row in rows])
        print(f"PSNR on log2 {name}: {slope:+.2f} dB per doubling, R^2 {r2:.3f}")
    heads = ["original", *(f"E{row['E']} p{sizes(row['point']).p}" for row in rows)]
    shown = torch.stack([x, *(row["decoded"] for row in rows)], 1)[:8]
    film(common.folder(cfg) / "sweep.png", shown.flatten(0, 1), [""] * len(shown), heads)


def use_checkpoint(cfg):
    """--sample: decode latents, export samples or latents, or draw what a generator or a decoder makes."""
    tokenizer, generator, names = load(cfg, cfg.sample)
    where = common.sample_folder(cfg)
    if cfg.decode:
        text = decode_latents(cfg, tokenizer, where)
    elif cfg.export and generator:
        text = export_samples(cfg, tokenizer, generator)
    elif cfg.export:
        text = export_latents(cfg, tokenizer)
    elif generator:
        show_samples(cfg, tokenizer, generator, names, where, 8)
        text = f"{where}/samples.png"
    else:
        text = f"{where}/reconstructions.png: psnr {show_reconstructions(cfg, tokenizer, where)['psnr']:.3f}"
    if common.rank() == 0:
        print(text)


def main(cfg):
    """Plan, use a checkpoint, sweep or train; returns the exit code."""
    if cfg.plan:
        for name, value in count_costs(cfg).items():
            print(f"{name:>18} {value:,}")
    elif cfg.sample:
        use_checkpoint(cfg)
    elif cfg.sweep:
        run_sweep(cfg)
    else:
        return train(cfg)


if __name__ == "__main__":
    common.launch(main, common.cli(Config, PRESETS, __doc__), check, prepare)
