"""ViTok: Learnings from Scaling Visual Tokenizers for Reconstruction and Generation (arXiv 2501.09755)

A plain ViT auto-encoder with a Gaussian bottleneck, for images and video alike, built as an instrument: its
encoder, decoder and code are sized one at a time. Reconstruction depends almost only on E, the floats of the
code: tokens x channels. What the code lost can only be invented, so the adversarial stage trains the decoder
alone; and a diffusion transformer (DiT) learns to make codes, for which more channels are not better.

    pixels -> tubelets of q x p x p -> encoder -> N tokens of c floats -> decoder -> tubelets -> pixels
                                       (light)         E = N c            (heavy)

Run:      python vitok.py                                   demo: shapes, three stages, pictures (3 minutes)
          python vitok.py --gpus 2                          the same in two processes
          python vitok.py --preset sweep                    the study: ten codes, a table, a fit, a picture
          python vitok.py --preset clips                    eight moving frames a clip, animated pictures
          python vitok.py --preset S-B/4x8 --plan           parameters, multiply-adds, E, pixels per float
          python vitok.py --preset S-B/16 --data folder:imagenet256 --vgg lpips_vgg.pt --gpus 8
          python vitok.py --sample runs/vitok/demo/dit.pt --classes 6,9 --scale 3
          python vitok.py --sample runs/vitok/demo/decoder.pt --export latents.npz     (or --decode)
Faithful: both models, widths, losses, stages, optimizers, sampler; latent and masked variants (App. A.3).
          Where the authors' code of January 2025 departs from the paper, the paper is followed.
Scaled:   the demo's models and steps; its perceptual features are those of a small classifier, not VGG16's.
Left out: FID, FVD (they need other networks); random crops (only in the official code); SSIM, baselines and
          the paper's figures are in tests/claims.
Letters:  B clips, T H W frames and pixels, q p tubelet, t h w token grid, N = t h w tokens, l latent tokens,
          M tokens of the code (N or l), c its channels, D width, H heads (in attention), d = D/H. Images are
          clips of one frame. Diffusion time: 0 is clean, 999 is noise. MACs are multiply-adds.
CUDA:     never run on CUDA.
Read in this order: Encoder, Decoder, loss_ae, loss_decoder, loss_dit, sample, train_decoder, sweep.
"""

import copy
import math
import shutil
import tempfile
import zipfile
from collections import namedtuple
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Literal

import common
import data

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# --- Configuration -----------------------------------------------------------

@dataclass
class Config:
    preset: str = "demo"                  # where the values below start from
    data: str = "shapes"                  # shapes, cifar10, npz:PATH, folder:PATH or video:PATH
    stage: Literal["all", "ae", "decoder", "dit"] = "all"  # auto-encoder, decoder with GAN, generator
    size: int = 256                       # image side in pixels
    frames: int = 1                       # frames of a clip T; 1 is images
    objects: int = 1                      # drawn images hold 1 to this many shapes of their class
    flip: bool = True                     # flip each clip left-right with probability 1/2
    model: str = "S-B/16"                 # ENCODER-DECODER/P or /QxP, each S, B, L or WIDTHxDEPTHxHEADS
    channels: int = 16                    # channels of the code c; E = tokens x channels
    rope: Literal["3d", "1d", "none"] = "3d"  # rotary positions; 1d: flat index, as in the official code
    act: Literal["silu", "gelu"] = "silu"  # gate of the MLP: SwiGLU; gelu: GEGLU, as in the official code
    variational: bool = True              # Gaussian bottleneck; off: a plain auto-encoder
    latents: int = 0                      # l > 0: latent variant, the code is l extra tokens (App. A.3)
    masked: bool = False                  # masked variant: codes cut at random lengths (App. A.3)
    recompute: bool = False               # recompute blocks in backward: less memory, more time
    kl: float = 1e-3                      # weight beta of the KL term
    perceptual: float = 1.0               # weight eta of the perceptual term (official video: 0.1)
    vgg: str = ""                         # file of VGG16 and LPIPS weights; default: the teacher
    gan: float = 0.05                     # weight lambda of the GAN (Sec. 2.3: 1.0; App. A.2: .05 best)
    disc: int = 512                       # discriminator channels up to 32 px, halved for each doubling
    dit: str = "L"                        # generator: B, L, XL or WIDTHxDEPTHxHEADS
    steps: int = 100_000                  # optimizer steps of each stage; given, it overrides the next 3
    steps_ae: int = 0                     # of stage ae; 0: --steps
    steps_decoder: int = 0                # of stage decoder
    steps_dit: int = 0                    # of stage dit
    batch: int = 1024                     # clips a step, over all processes
    batch_decoder: int = 0                # of stage decoder; 0: --batch
    batch_dit: int = 0                    # of stage dit
    lr: float = 1e-4                      # peak learning rate for 256 images a step (times batch / 256)
    lr_disc: float = 2e-5                 # the discriminator's
    lr_dit: float = 1e-4                  # the generator's
    ema: float = 0.9999                   # decay of the averaged decoder and generator
    calls: int = 250                      # sampler steps
    scale: float = 1.5                    # classifier-free guidance; 1 is none
    eta: float = 0.0                      # noise of the sampler: 0 DDIM, 1 DDPM (official code)
    classes: str = "all"                  # labels to sample, as 3,5; all is every class in turn
    count: int = 1000                     # clips for the metrics, or sampled by --sample
    plan: bool = False                    # print what the model costs, and stop
    sweep: str = ""                       # the study: stage ae at every MODEL:c,c,...; /P has --model's sizes
    export: str = ""                      # with --sample: write the latents of --data to FILE.npz
    decode: str = ""                      # with --sample: decode the latents of FILE.npz into pictures
    seed: int = 0                         # every random number is a function of (seed, step)
    gpus: int = 1                         # processes, one a GPU; without GPUs they share the CPU
    device: str = "auto"                  # auto, cpu or cuda
    bf16: bool = False                    # bf16 autocast on CUDA, as the paper trained
    compile: bool = False                 # torch.compile for the blocks
    name: str = ""                        # run folder runs/vitok/NAME; default: the preset
    resume: bool = False                  # go on with runs/vitok/NAME in its first unfinished stage
    sample: str = ""                      # checkpoint to draw from (ae, decoder: reconstructions)
    log: int = 100                        # steps between log lines
    save: int = 5000                      # steps between checkpoints
    sampling = "calls scale eta classes count data export decode".split()  # what --sample may change

# Width, depth, heads (Tab. 1). Small keeps Base's width and halves the depth. Large is 1152 wide, not 1024:
# its heads of 72 channels split in three, for the axes of a clip. The generators' sizes are DiT's.
SIZES = {"S": (768, 6, 12), "B": (768, 12, 12), "L": (1152, 24, 16)}
DIT_SIZES = {"B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
# The rates are for 256 images a step: at TOY's batch of 32, 1.2e-2 means 1.5e-3.
TOY = dict(size=32, flip=False, model="72x1x6-72x2x6/8", batch=32, lr=1.2e-2, disc=32, lr_disc=2e-3, ema=0.99,
           dit="64x4x4", batch_dit=64, lr_dit=1e-2, steps_decoder=60, calls=30, scale=2.0, count=500)
PAPER = dict(bf16=True, batch_decoder=256, batch_dit=256, steps_dit=500_000)
VIDEO = dict(PAPER, frames=16, size=128, batch=256, batch_decoder=128)  # Tab. 5, UCF-101
PRESETS = {
    "demo": dict(TOY, channels=8, steps=600, steps_dit=1800),
    "sweep": dict(TOY, sweep="/8:1,2,4,8,16,32 /4:2,4,8,16", objects=4, perceptual=0.0, steps=1500),
    "clips": dict(TOY, model="72x1x6-72x2x6/2x8", frames=8, perceptual=0.0, steps=900, batch=16, lr=3e-3),
    "small": dict(data="cifar10", size=32, model="384x6x6-384x12x6/4", channels=8, dit="384x12x6", batch=256,
                  lr=4e-4, lr_dit=3e-4, ema=0.999, steps=20_000, steps_dit=60_000),   # one GPU; not yet run
    **{f"{name}/16": dict(PAPER, model=f"{name}/16", name=f"{name}-16")         # Fig. 6
       for name in ("S-S", "B-S", "S-B", "B-B", "S-L", "B-L", "L-L")},
    **{f"S-B/{qp}": dict(VIDEO, model=f"S-B/{qp}", name=f"S-B-{qp}") for qp in ("4x8", "8x8", "4x16")},
    "S-B/16@512": dict(PAPER, model="S-B/16", size=512, name="S-B-16-512")}
TARGET = dict(psnr=22.35, accuracy=0.13)    # mean - 4 s.d. of seeds 0 to 4: 22.73 +- .09, .326 +- .047
ADAMW = dict(betas=(0.9, 0.95), weight_decay=1e-4, fused=True)          # of all stages (Sec. 2.3)
Sizes = namedtuple("Sizes", "encoder decoder dit q p grid tokens")

def sizes(cfg):
    """(width, depth, heads) of the three trunks, tubelet q and p, token grid (t, h, w), tokens M of the code.
    Encoder and decoder have widths of their own. Official code differs: it gives both the decoder's, which
    makes S-L's "small" encoder twice as large as Tab. 1 says. UserError where the names mean nothing."""
    try:
        pair, patch = cfg.model.split("/")
        names = zip((*pair.split("-"), cfg.dit), (SIZES, SIZES, DIT_SIZES), strict=True)
        trunks = [table.get(name) or tuple(map(int, name.split("x"))) for name, table in names]
        q, p = map(int, patch.split("x")) if "x" in patch else (1, int(patch))
        grid = (cfg.frames // q, cfg.size // p, cfg.size // p)
        common.need(all(min(D, n, H, q, p) > 0 and D // H > 5 and D % (2 * H) == 0 for D, n, H in trunks), "")
    except (ValueError, ZeroDivisionError, common.UserError):
        raise common.UserError(f"--model {cfg.model} --dit {cfg.dit}: write a model as S-B/4x8, a DiT as L "
                               "(or 72x1x6-72x2x6/8, 96x4x6: heads in even parts of 6 or more)") from None
    return Sizes(*trunks, q, p, grid, cfg.latents or math.prod(grid))

def check(cfg):
    """Every mistake that can be seen without the data; UserError with one line."""
    need, s, first = common.need, sizes(cfg), common.folder(cfg) / "ae.pt"
    least = dict(frames=s.q, size=4, channels=1, disc=1, calls=2, count=10)
    parts = dict(frames=s.q, size=s.p, batch_decoder=cfg.gpus, batch_dit=cfg.gpus)
    for name, value in vars(cfg).items():
        low, part = least.get(name, 0), parts.get(name)
        need(isinstance(value, str) or value >= low, f"--{name} {value}: must be at least {low}")
        need(not isinstance(value, float) or value < math.inf, f"--{name} {value}: must be a finite number")
        need(not part or value % part == 0, f"--{name} {value}: must be a multiple of {part}")
    need(max(cfg.ema, cfg.eta) <= 1, f"--ema {cfg.ema} --eta {cfg.eta}: must be at most 1")
    need(cfg.size & cfg.size - 1 == 0 or cfg.stage in ("ae", "dit") or cfg.sweep,
         f"--size {cfg.size}: the discriminator needs a power of two; --stage ae and --stage dit do not")
    need(not cfg.sweep or cfg.sweep.strip(),
         f"--sweep {cfg.sweep!r}: write MODEL:c,c,... as in '/8:4,8 S-B/16:16'")
    if cfg.classes != "all":
        chosen_classes(cfg, math.inf)
    need(cfg.sample or not cfg.export + cfg.decode, "--export and --decode go with --sample CHECKPOINT")
    need(first.exists() or cfg.stage in ("all", "ae") or cfg.sample,
         f"--stage {cfg.stage}: {first} is missing; run --stage ae first")
    for point in points(cfg):
        check(point)

def open_split(cfg, split, count=20_000):
    """The data's 'train', 'test' or 'judge' split. UserError where it is not of --size.
    A folder's pictures must be of that size already: results are PSNR on pixels, and scaling on the way would
    change what they are measured on."""
    size = 0 if cfg.data.startswith("folder:") else cfg.size
    found = data.open_data(cfg.data, split, size, (1, cfg.objects), frames=cfg.frames, count=count)
    fits = found.images.shape[-1] == cfg.size and not found.latent
    common.need(fits, f"--data {cfg.data}: {found.images.shape} where pictures of side {cfg.size} are wanted")
    return found

def judge(cfg, role):
    """common.py's teacher or ruler, trained on stills; an untrained one for a run of a few steps."""
    split = open_split(replace(cfg, frames=1), "judge", 10_000 if cfg.steps >= 100 else 10)
    if cfg.steps < 100:
        torch.manual_seed(0)
        return common.Judge(3, 32, len(split.classes)).requires_grad_(False)
    return common.judge(split, role)

def prepare(cfg):
    """Once, before the processes start: downloads, packing, the teacher or the VGG file."""
    if not (cfg.sample or cfg.plan):
        still = replace(cfg, frames=1)
        for split, opened, least in (("train", cfg, 1), ("test", cfg, 1), ("judge", still, 2)):
            found = open_split(opened, split, 10)
            common.need(len(found) >= least,
                        f"--data {cfg.data}: {len(found)} pictures are too few for {split}")
        chosen_classes(cfg, len(found.classes))
        perceptual_loss(cfg, "cpu")

# --- Building blocks ---------------------------------------------------------
def patchify(x, q, p):
    """Clips (B, 3, T, H, W) -> tubelets in the order (t, y, x), each a vector ordered (channel, t, y, x).
    With a Linear behind it this is the paper's Conv3d of kernel = stride = (q, p, p), as one product."""
    x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(2, (-1, q))         # (B, 3, t, q, h, p, w, p)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)                    # (B, t*h*w, 3*q*p*p)

def unpatchify(x, grid, q, p):
    """The inverse: tubelets (B, t h w, 3 q p p) -> clips. Behind a Linear: the paper's ConvTranspose3d."""
    x = x.unflatten(2, (3, q, p, p)).unflatten(1, grid)                             # (B, t, h, w, 3, q, p, p)
    x = x.permute(0, 4, 1, 5, 2, 6, 3, 7)                                           # (B, 3, t, q, h, p, w, p)
    return x.flatten(6).flatten(4, 5).flatten(2, 3)                                    # (B, 3, t*q, h*p, w*p)

def places(grid, rope, l=0):
    """Where l latent tokens and then the grid's tokens stand: (l + N, 3), ordered x, y, t; '1d': (l + N, 1).
    Our choice: latent tokens, having no place in a picture, stand at the origin; '1d' counts them as well."""
    place = torch.cat((torch.zeros(l, 3), torch.cartesian_prod(*map(torch.arange, grid)).flip(1)))
    return {"3d": place, "1d": torch.arange(len(place))[:, None], "none": torch.zeros_like(place)}[rope]

def rope_angles(place, d):
    """Angles (N, d/2) of tokens at place (N, axes): of an axis's n pairs, pair i turns 10000^(-i/n) a step.
    The paper says only "3D axial". Our choice where 6 does not divide d: parts as equal as can be, the larger
    ones first. S and B have d = 64: 22 + 22 + 20. In an image, time is 0 and its part never turns."""
    pairs = [len(part) for part in torch.arange(d // 2).tensor_split(place.shape[1])]
    rates = [10_000.0 ** (-torch.arange(n, device=place.device).double() / n) for n in pairs]
    return torch.cat([place[:, i:i + 1] * rate for i, rate in enumerate(rates)], 1)

def waves(time, D):
    """Cosines, then sines of diffusion times (B,), the rates as in RoPE (official code)."""
    angles = rope_angles(time[:, None], D)
    return torch.cat((angles.cos(), angles.sin()), 1).float()                                         # (B, D)

def frozen_tokens(N, D):
    """The latent variant's frozen tokens: sines, then cosines of their numbers (official code). The n = D/2
    rates run from 1 to 1/10000, both included: 10000^(-i/(n - 1)), where RoPE has n."""
    rates = 10_000.0 ** (-torch.arange(D // 2).double() / (D // 2 - 1))
    angles = torch.arange(N)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), 1).float()                                         # (N, D)

def rotate(x, cos, sin):
    """Turn adjacent pairs of x (B, H, N, d) by their token's angle, cos and sin (N, d/2); never in bf16."""
    a, b = x.unflatten(3, (-1, 2)).unbind(4)                                      # (B, H, N, k), (B, H, N, k)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), 4).flatten(3).type_as(x)       # (B, H, N, 2*k)

class Attention(nn.Module):
    """Softmax over all tokens, of all frames: nothing is causal in time. No bias on q, k and v, no norm of q
    and k. Values are not rotated. Official code differs: it builds a causal mask and never passes it on."""
    def __init__(self, D, H):
        super().__init__()
        self.heads, self.qkv, self.out = H, nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D)
    def forward(self, x, cos, sin):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)     # each (B, H, N, d)
        x = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)         # (B, H, N, d)
        return self.out(x.transpose(1, 2).flatten(2))                                            # (B, N, H*d)

class Block(nn.Module):
    """Pre-norm block of attention and gated MLP, W3 (act(W1 x) * W2 x) with hidden width int(2.67 D): three
    matrices of that width cost as much as the usual two of 4 D. Official code differs: GELU for the gate.
    In the generator a condition shifts (s), scales (r) and gates (g) both halves (adaLN-zero)."""
    def __init__(self, D, H, act, modulated):
        super().__init__()
        m, self.act = int(2.67 * D), F.silu if act == "silu" else F.gelu
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(D), Attention(D, H), nn.LayerNorm(D)
        self.gate, self.up, self.down = nn.Linear(D, m), nn.Linear(D, m), nn.Linear(m, D)
        self.modulation = nn.Linear(D, 6 * D) if modulated else None
    def forward(self, x, cos, sin, s1=0, r1=0, g1=1, s2=0, r2=0, g2=1):
        """Tokens (B, N, D), rotary cosines and sines (N, d/2), the generator's six modulations (B, 1, D)."""
        x = x + g1 * self.attention((1 + r1) * self.norm1(x) + s1, cos, sin)                       # (B, N, D)
        y = (1 + r2) * self.norm2(x) + s2                                                          # (B, N, D)
        return x + g2 * self.down(self.act(self.gate(y)) * self.up(y))                             # (B, N, D)

class Trunk(nn.Module):
    """A stack of blocks and a last LayerNorm; knows the angles of its tokens' places (N, axes)."""
    def __init__(self, size, place, cfg, modulated=False):
        super().__init__()
        (D, depth, H), self.norm = size, nn.LayerNorm(size[0])
        self.blocks = nn.ModuleList(Block(D, H, cfg.act, modulated) for _ in range(depth))
        # Recomputed: only the blocks' inputs are kept for backward, which runs each block a second time.
        self.call = partial(checkpoint, use_reentrant=False) if cfg.recompute else Block.__call__
        angles = rope_angles(place, D // H)
        self.cos, self.sin = (nn.Buffer(a.float(), persistent=False) for a in (angles.cos(), angles.sin()))
        for block in self.blocks if cfg.compile else ():
            block.compile()
    def forward(self, x, c=None):
        """Tokens (B, N, D) -> the same. In the generator each block makes its own modulations of c (B, D)."""
        for block in self.blocks:
            six = () if c is None else block.modulation(c)[:, None].chunk(6, 2)               # each (B, 1, D)
            x = self.call(block, x, self.cos, self.sin, *six)                                      # (B, N, D)
        return self.norm(x)                                                                        # (B, N, D)

# --- Model -------------------------------------------------------------------
class Encoder(nn.Module):
    """Clips -> mean and log-variance of M tokens of c channels. Simple variant: one token a tubelet, M = N.
    Latent variant: l frozen tokens go in front and only their outputs are kept, M = l, whatever p is.
    E = M c counts the means alone: nobody sends variances."""
    def __init__(self, cfg):
        super().__init__()
        s = sizes(cfg)
        D, self.q, self.p, self.tokens, self.channels = s.encoder[0], s.q, s.p, s.tokens, cfg.channels
        self.embed = nn.Linear(3 * s.q * s.p**2, D)
        self.register_buffer("queries", frozen_tokens(cfg.latents, D), persistent=False)
        self.trunk = Trunk(s.encoder, places(s.grid, cfg.rope, cfg.latents), cfg)
        self.to_code = nn.Linear(D, (1 + cfg.variational) * cfg.channels)
    def forward(self, x):
        """Clips (B, 3, T, H, W) in [-1, 1] -> mean, logvar (B, M, c); not variational: mean and None."""
        x = self.embed(patchify(x, self.q, self.p))                                                # (B, N, D)
        x = torch.cat((self.queries.expand(len(x), -1, -1), x), 1)                               # (B, l+N, D)
        x = self.to_code(self.trunk(x)[:, :self.tokens]).to(self.to_code.weight.dtype)             # (B, M, e)
        mean, logvar = x.tensor_split((self.channels,), 2)                              # (B, M, c), (B, M, k)
        return mean, logvar.clamp(-30, 20) if logvar.numel() else None                  # (B, M, c), (B, M, c)

class Decoder(nn.Module):
    """Codes -> clips; no tanh, no clamp (metrics clamp). Larger than the encoder, since size pays only here
    (Figs. 6 to 8). Latent variant: frozen mask tokens go behind the code, and they are kept."""
    def __init__(self, cfg):
        super().__init__()
        s = sizes(cfg)
        D, self.q, self.p, self.grid, N = s.decoder[0], s.q, s.p, s.grid, math.prod(s.grid)
        self.blank = nn.Parameter(torch.zeros(cfg.channels)) if cfg.masked else None
        self.from_code = nn.Linear(cfg.channels, D)
        self.register_buffer("masks", frozen_tokens(N if cfg.latents else 0, D), persistent=False)
        self.trunk = Trunk(s.decoder, places(s.grid, cfg.rope, cfg.latents), cfg)
        self.to_pixels = nn.Linear(D, 3 * s.q * s.p**2, bias=False)
        self.colour = nn.Parameter(torch.zeros(3, 1, 1, 1))
    def forward(self, z, length=None):
        """Codes z (B, M, c); masked variant: from number length (B,) on, they become the learned blank."""
        if length is not None:
            kept = torch.arange(z.shape[1], device=z.device) < length[:, None]                        # (B, M)
            z = torch.where(kept[..., None], z, self.blank)                                        # (B, M, c)
        x = self.from_code(z)                                                                      # (B, M, D)
        x = torch.cat((x, self.masks.expand(len(x), -1, -1)), 1)                                 # (B, l+N, D)
        x = self.to_pixels(self.trunk(x)[:, -math.prod(self.grid):])                               # (B, N, e)
        return unpatchify(x, self.grid, self.q, self.p) + self.colour                        # (B, 3, T, H, W)

class Autoencoder(nn.Module):
    """Encoder and decoder of separate sizes around the Gaussian bottleneck (Sec. 2)."""
    def __init__(self, cfg):
        super().__init__()
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.apply(initialise)
        bound = self.encoder.embed.in_features ** -0.5      # official code: these keep PyTorch's defaults
        for tensor in (self.encoder.embed.bias, self.decoder.to_pixels.weight, self.decoder.colour):
            nn.init.uniform_(tensor, -bound, bound)
    def forward(self, x, noise=None, length=None):
        """Clips, noise of the bottleneck (B, M, c) or None for z = mean -> reconstruction, mean, logvar."""
        mean, logvar = self.encoder(x)                                                  # (B, M, c), (B, M, c)
        x = self.decoder(bottleneck(mean, logvar, noise), length)                            # (B, 3, T, H, W)
        return x, mean, logvar                                         # (B, 3, T, H, W), (B, M, c), (B, M, c)

def initialise(module):
    """Every Linear and convolution of the three models: Xavier-uniform, zero bias (official code)."""
    for tensor in module.parameters(recurse=False) if isinstance(module, (nn.Linear, nn.Conv2d)) else ():
        (nn.init.xavier_uniform_ if tensor.ndim > 1 else nn.init.zeros_)(tensor)

def bottleneck(mean, logvar, noise):
    """z = mean + exp(logvar / 2) noise (B, M, c). Metrics take no noise, so z = mean; the generator does."""
    return mean if noise is None or logvar is None else mean + torch.exp(0.5 * logvar) * noise     # (B, M, c)

def blur(x):
    """Halve x (B, C, H, W) behind StyleGAN's filter [1, 3, 3, 1]: a bare stride of 2 would fold fine detail
    into coarse."""
    line = x.new_tensor([1, 3, 3, 1]) / 8
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 4, 4)                                 # (C, 1, 4, 4)
    return F.conv2d(x, kernel, stride=2, padding=1, groups=len(kernel))                         # (B, C, h, w)

def halve(x, block):
    """A residual block of the discriminator: half the sides of x (b, C, H, W), K channels. The sum of its two
    branches over sqrt 2 keeps their variance."""
    conv1, conv2, skip = block
    y = F.leaky_relu(conv2(blur(F.leaky_relu(conv1(x), 0.2))), 0.2)                             # (b, K, h, w)
    return (y + skip(blur(x))) / 2**0.5                                                         # (b, K, h, w)

class Discriminator(nn.Module):
    """StyleGAN-type critic of single frames, residual, down to 4 x 4 pixels, without minibatch statistics,
    equalised rates or gradient penalty: small steps (--lr_disc) have to keep it in check."""
    def __init__(self, size, D=512):
        super().__init__()
        C = [D * 32 // max(2**k, 32) for k in range(int(math.log2(size)), 1, -1)]       # at size, ..., 8, 4
        conv = lambda a, b: nn.Conv2d(a, b, 3, padding=1)
        self.rgb = conv(3, C[0])
        # As in the official code, a block widens in its first convolution; StyleGAN2's does in its second.
        self.blocks = nn.ModuleList(nn.ModuleList((conv(a, b), conv(b, b), nn.Conv2d(a, b, 1, bias=False)))
                                    for a, b in zip(C, C[1:]))
        self.conv, self.mid, self.out = conv(D, D), nn.Linear(16 * D, D), nn.Linear(D, 1)
        self.apply(initialise)
    def forward(self, x):
        """Clips (B, 3, T, H, W) -> one number a frame, large for real ones."""
        x = x.transpose(1, 2).flatten(0, 1)                                                     # (b, 3, H, W)
        x = F.leaky_relu(self.rgb(x), 0.2)                                                      # (b, C, H, W)
        x = reduce(halve, self.blocks, x)                                                       # (b, D, 4, 4)
        x = F.leaky_relu(self.conv(x), 0.2)                                                     # (b, D, 4, 4)
        return self.out(F.leaky_relu(self.mid(x.flatten(1)), 0.2))[:, 0]                                 # (b)

class DiT(nn.Module):
    """Class-conditional diffusion transformer on codes, one token each, not patchified (Sec. 2.3).
    Positions: a learned table, and 1-D rotary angles for clips too. Its norms, unlike DiT's, have weights."""
    def __init__(self, cfg, classes):
        super().__init__()
        s, self.classes = sizes(cfg), classes
        D, M, c = s.dit[0], s.tokens, cfg.channels
        self.enter, self.table = nn.Linear(c, D), nn.Parameter(torch.randn(M, D) / M**0.5)
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.label = nn.Embedding(classes + 1, D)                               # the last row: "no label"
        self.trunk = Trunk(s.dit, torch.arange(M)[:, None], cfg, modulated=True)
        self.norm, self.modulation, self.head = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(D, 2 * c)
        self.apply(initialise)
        for module in (self.time[0], self.time[2], self.label):
            nn.init.normal_(module.weight, std=0.02)
        # Zero, so that blocks start as the identity and the output as 0.
        for module in (self.modulation, self.head, *(block.modulation for block in self.trunk.blocks)):
            nn.init.zeros_(module.weight)
    def forward(self, x, time, label):
        """Noisy codes (B, M, c), times (B,), labels (B,) -> noise, and v of the variance, in 2 c channels."""
        c = F.silu(self.time(waves(time, 256).to(self.table.dtype)) + self.label(label))              # (B, D)
        s, r = self.modulation(c)[:, None].chunk(2, 2)                                  # (B, 1, D), (B, 1, D)
        x = self.trunk(self.enter(x) + self.table, c)                                              # (B, M, D)
        return self.head((1 + r) * self.norm(x) + s)                                               # (B, M, e)

# --- Objective ---------------------------------------------------------------
def kl_term(mean, logvar):
    """KL to N(0, I) of each clip (B,): half the MEAN over tokens and channels: beta means the same at any E.
    It hardly regularises: codes keep their own scale, which the log of stage dit shows as std."""
    excess = 0 * mean if logvar is None else mean.square() + logvar.exp() - 1 - logvar             # (B, M, c)
    return 0.5 * excess.mean((1, 2))                                                                     # (B)

def vgg_taps(x, layers):
    """relu1_2, 2_2, 3_3, 4_3 and 5_3 of VGG16, as LPIPS takes them, for frames (B, 3, H, W) in [-1, 1]."""
    shift, scale = x.new_tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])[..., None, None]
    x, taps = (x - shift) / scale, []
    for i, (weight, bias) in enumerate(layers):
        x = F.max_pool2d(x, 2) if i in (2, 4, 7, 10) else x
        x = F.relu(F.conv2d(x, weight, bias, padding=1))
        taps.append(x)
    return [taps[i] for i in (1, 3, 6, 9, 12)]

def lpips(x, y, taps, heads):
    """LPIPS of clips (B, 3, T, H, W) in [-1, 1], one number a frame: a clip is so many images, here as in the
    GAN. Unit vectors, their squared difference, a weight a channel, mean over space, sum over taps."""
    x, y = (taps(a.transpose(1, 2).flatten(0, 1)) for a in (x, y))
    unit = lambda a: a / ((a.square().sum(1, keepdim=True) + 1e-10).sqrt() + 1e-10)
    gaps = [(unit(f.to(w.dtype)) - unit(g.to(w.dtype))).square() for f, g, w in zip(x, y, heads)]
    return sum((gap * w[:, None, None]).sum(1).mean((1, 2)) for gap, w in zip(gaps, heads))

def perceptual_loss(cfg, device):
    """The function (x, y) behind eta: LPIPS with VGG16, or, our stand-in, with the teacher and heads of .1.
    --vgg: a torch file of 13 layers and 5 heads in order, such as lpips.LPIPS(net="vgg").state_dict()."""
    if not cfg.perceptual:
        return None
    if not cfg.vgg:
        teacher, head = judge(cfg, "teacher").to(device), torch.full((64,), 0.1, device=device)
        return lambda x, y: lpips(x, y, lambda a: [teacher.spatial(a)], [head])
    try:
        tensors = [t.float().to(device) for t in torch.load(cfg.vgg, "cpu", weights_only=True).values()]
        weights = [t for t in tensors if t.shape[2:] == (3, 3)]
        heads = [t.flatten() for t in tensors if t.shape[2:] == (1, 1) and t.shape[1] > 3][:5]
        layers = list(zip(weights, [t for t in tensors if t.ndim == 1], strict=True))
        zero = lpips(*torch.zeros(2, 1, 3, 1, 32, 32, device=device), lambda a: vgg_taps(a, layers), heads)
        common.need(len(layers) == 13 and len(heads) == 5 and zero == 0, "its layers are others")
    except Exception as error:
        raise common.UserError(f"--vgg {cfg.vgg}: not VGG16 and LPIPS weights ({str(error)[:80]})") from None
    return lambda x, y: lpips(x, y, lambda a: vgg_taps(a, layers), heads)

def terms_of(recon, mean, logvar, x, cfg, perceptual):
    """Eq. (1) without the GAN: mse + beta KL + eta LPIPS; and the unweighted terms, for the log.
    Official code differs: an `=` for a `+=` overwrites the squared error by a tenth of a smoothed L1."""
    terms = {"mse": F.mse_loss(recon.to(x.dtype), x), "kl": kl_term(mean, logvar).mean()}
    if cfg.perceptual:
        terms["lpips"] = perceptual(recon, x).mean()
    return terms["mse"] + cfg.kl * terms["kl"] + cfg.perceptual * terms.get("lpips", 0), terms

def loss_ae(model, x, draws, cfg, perceptual):
    """Stage 1: Eq. (1) with lambda = 0 for all weights, on clips x (B, 3, T, H, W) -> value, terms.
    draws: noise (B, M, c) of the bottleneck; in the masked variant also length (B,)."""
    return terms_of(*model(x, draws["noise"], draws.get("length")), x, cfg, perceptual)

def loss_decoder(model, x, draws, cfg, perceptual, disc, weight):
    """Stage 2: all of Eq. (1) for the decoder -> value, terms, reconstruction. draws as in loss_ae.
    The encoder is frozen (see load), so the KL term is a constant. `weight` is lambda on its ramp; lambda is
    1 in Sec. 2.3 and .05, the best one, in App. A.2."""
    recon, mean, logvar = model(x, draws["noise"], draws.get("length"))
    value, terms = terms_of(recon, mean, logvar, x, cfg, perceptual)
    terms["gan"] = -disc(recon).to(x.dtype).mean()
    return value + weight * terms["gan"], terms, recon

def loss_disc(disc, x, recon):
    """Hinge loss of the discriminator; nothing flows back into the reconstruction. An image told apart by a
    margin of 1 counts no more."""
    real, fake = disc(x).to(x.dtype), disc(recon.detach()).to(x.dtype)
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())

# DDPM's linear schedule, a-bar, and a-bar one step earlier; (1000, 1, 1), so that BAR.to(x)[time] fits codes.
BETA = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[:, None, None]
BAR = torch.cumprod(1 - BETA, 0)
BEFORE = torch.cat((torch.ones_like(BAR[:1]), BAR[:-1]))

def variational_bound(x, noisy, noise, v, time):
    """Bits per dimension (B,) of one reverse step with learned variance; x, noisy, noise and v are (B, M, c).
    At time 0 it is the 8-bit likelihood (bins of 2/255, open at the ends) inherited from pixel diffusion and
    kept, although codes are not pixels."""
    posterior = BETA * (1 - BEFORE) / (1 - BAR)                                 # 0 at time 0: take time 1's
    low, high = (a.log().to(x)[time] for a in (posterior.clamp(min=posterior[1]), BETA))      # each (B, 1, 1)
    logvar = low + (v + 1) / 2 * (high - low)                                                      # (B, M, c)
    clean = (noisy - (1 - BAR).sqrt().to(x)[time] * noise) / BAR.sqrt().to(x)[time]                # (B, M, c)
    # True less predicted mean: what the noisy code adds to both cancels, and at time 0 it adds nothing.
    miss = (BETA * BEFORE.sqrt() / (1 - BAR)).to(x)[time] * (x - clean)                            # (B, M, c)
    kl = 0.5 * (logvar - low - 1 + (low - logvar).exp() + miss.square() * (-logvar).exp())         # (B, M, c)
    u = torch.stack((miss + 1 / 255, miss - 1 / 255)) * (-0.5 * logvar).exp()                   # (2, B, M, c)
    above, below = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))     # each (B, M, c)
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))        # (B, M, c)
    nats = torch.where(time[:, None, None] == 0, -mass.clamp(min=1e-12).log(), kl)                 # (B, M, c)
    return nats.mean((1, 2)) / math.log(2)                                                               # (B)

def loss_dit(model, batch, draws):
    """Stage 3: squared error of the noise, and the bound, in which the noise is a constant -> value, terms.
    batch: codes z (B, M, c), labels y (B,). draws: time (B,) in 0..999, eps like z, drop (B,): lose y."""
    (z, y), time, eps = batch, draws["time"], draws["eps"]
    noisy = BAR.sqrt().to(z)[time] * z + (1 - BAR).sqrt().to(z)[time] * eps                        # (B, M, c)
    out = model(noisy, time, y.masked_fill(draws["drop"], model.classes))                          # (B, M, e)
    noise, v = out.type_as(z).chunk(2, 2)                                               # (B, M, c), (B, M, c)
    mse, bound = (noise - eps).square().mean(), variational_bound(z, noisy, noise.detach(), v, time).mean()
    return mse + bound, {"mse": mse, "bound": bound}

# --- Sampling ----------------------------------------------------------------
def guide(model, x, time, y, scale):
    """Classifier-free guidance on all channels: none + scale (conditional - none), exact at 1 and 0. Rank no
    tokenizers by samples at a high scale: at 3 the worst of Fig. 5 has the best gFID."""
    if scale == 1:
        return model(x, time, y)                                                                   # (B, M, e)
    labels = torch.cat((torch.full_like(y, model.classes), y))
    free, conditional = model(torch.cat((x, x)), torch.cat((time, time)), labels).chunk(2)    # each (B, M, e)
    return torch.lerp(free, conditional, scale)                                                    # (B, M, e)

@torch.no_grad()
def sample(model, y, generator, calls=250, scale=1.0, eta=0.0):
    """DDIM from N(0, I) to codes (B, M, c) of classes y (B,), at calls >= 2 times round(999 k / (calls - 1)).
    Sec. 2.3: DDIM, 250 steps. Official code differs: eta = 1, fresh noise at every step but the last. Nothing
    brings the codes to the scale of N(0, I) but the weak KL term."""
    shape = (len(y), len(model.table), model.head.out_features // 2)
    x = torch.randn(shape, generator=generator, device=y.device)                                   # (B, M, c)
    times = (torch.arange(calls) * 999 / (calls - 1)).round().long()
    for k in reversed(range(calls)):
        noise = guide(model, x, times[k].to(y.device).expand(len(y)), y, scale).type_as(x).chunk(2, 2)[0]
        bar, before = BAR[times[k]].item(), BAR[times[k - 1]].item() if k else 1.0
        clean = (x - math.sqrt(1 - bar) * noise) / math.sqrt(bar)                                  # (B, M, c)
        sigma = eta * math.sqrt((1 - before) / (1 - bar) * (1 - bar / before))
        x = math.sqrt(before) * clean + math.sqrt(1 - before - sigma**2) * noise                   # (B, M, c)
        x = x + sigma * torch.randn(shape, generator=generator, device=y.device) if sigma else x   # (B, M, c)
    return x

# --- Training ----------------------------------------------------------------
def clips(dataset, index):
    """Images or clips `index` as (B, 3, T, H, W) in [-1, 1]."""
    x = dataset.pixels(index).to(torch.get_default_dtype())
    return x[:, :, None] if x.ndim == 4 else x.transpose(1, 2)

def draw(dataset, cfg, step, stage, batch, device):
    """One step's clips (B, 3, T, H, W), labels (B,) and draws for the losses: drawn for the global batch, cut
    to this rank. All stages draw the same list, each from streams of its own."""
    M, small = sizes(cfg).tokens, common.draws(cfg.seed, step, f"{stage} data")
    large = common.draws(cfg.seed, step, f"{stage} noise", device)
    noise, eps = torch.randn(2, batch, M, cfg.channels, generator=large, device=device)
    index = torch.randint(len(dataset), (batch,), generator=small)
    flip = (torch.rand(batch, generator=small) < 0.5) & cfg.flip
    drop = torch.rand(batch, generator=small) < 0.1                             # official code: label dropout
    time = torch.randint(1000, (batch,), generator=small)
    length = (M // 2 ** torch.randint(4, (batch,), generator=small)).clamp(min=1)       # App. A.3: 32 to 256
    draws = dict(noise=noise, eps=eps, drop=drop, time=time) | ({"length": length} if cfg.masked else {})
    draws = {name: common.mine(value).to(device) for name, value in draws.items()}
    index, flip = common.mine(index).numpy(), common.mine(flip)[:, None, None, None, None]
    x, y = clips(dataset, index), torch.from_numpy(dataset.labels[index])
    return torch.where(flip, x.flip(-1), x).to(device), y.to(device), draws

def ramp(step, start, length):
    """0 up to `start`, 1 from `length` steps later on, a straight line between."""
    return min(max((step - start) / length, 0.0), 1.0)

def cosine(done, low=1 / 40, warmup=0.03):
    """Share of the peak learning rate at a share `done` of the steps: up from `low` during `warmup`, and back
    by a cosine (Sec. 2.3; the official code has the warm-up, and the lows 1e-5 of 4e-4, 3e-5 of 4e-4)."""
    rise = done / warmup if done < warmup else 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
    return low + (1 - low) * rise

def update(opt, value, rate):
    """One step down the gradient of `value`, for the weights of `opt` alone: the two players of stage 2 leave
    nothing in each other's gradients. No clipping: the official code clips before backward, to no effect."""
    group = opt.param_groups[0]
    group["lr"] = rate
    opt.zero_grad()
    value.backward(inputs=group["params"])
    common.average_gradients(group["params"])
    opt.step()

def load(cfg, path):
    """From any checkpoint: the frozen auto-encoder (decoder averaged), and the averaged generator or None."""
    device = common.device_of(cfg)
    saved = common.read_checkpoint(path, "vitok", device)
    tokenizer, generator = Autoencoder(cfg).to(device).requires_grad_(False), None
    common.load_into({"tokenizer": tokenizer}, saved, path)
    if "disc" in saved["state"]:
        common.load_into({"ema": tokenizer.decoder}, saved, path)
    elif "ema" in saved["state"]:
        generator = DiT(cfg, len(saved["state"]["ema"]["label.weight"]) - 1).to(device).requires_grad_(False)
        common.load_into({"ema": generator}, saved, path)
    return tokenizer, generator

def begin(cfg, stage):
    """A stage's device, run, global batch and auto-encoder: a new one, or frozen as the stage before left it.
    --steps, when given, overrides the stage's own number."""
    where, device = common.folder(cfg), common.device_of(cfg)                   # Run may rename its folder
    given = cfg.steps != PRESETS[cfg.preset].get("steps", Config.steps)
    run = common.Run(cfg, stage, not given and getattr(cfg, f"steps_{stage}") or cfg.steps)
    common.barrier()                                                            # wait for the stage before
    torch.manual_seed(common.draws(cfg.seed, 0, f"{stage} weights").initial_seed())
    earlier = where / ("decoder.pt" if stage == "dit" and (where / "decoder.pt").exists() else "ae.pt")
    tokenizer = Autoencoder(cfg).to(device) if stage == "ae" else load(cfg, earlier)[0]
    return device, run, getattr(cfg, f"batch_{stage}", 0) or cfg.batch, tokenizer

def train_ae(cfg, dataset, perceptual):
    """Stage 1: all weights, without the GAN (Sec. 2.3). Returns the auto-encoder."""
    device, run, batch, model = begin(cfg, "ae")
    opt = torch.optim.AdamW(model.parameters(), **ADAMW)
    start = run.restore(tokenizer=model, opt=opt)
    for step in run.steps(start):
        x, _, draws = draw(dataset, cfg, step, "ae", batch, device)
        with common.autocast(cfg):
            value, terms = loss_ae(model, x, draws, cfg, perceptual)
        update(opt, value, cfg.lr * batch * cfg.frames / 256 * cosine(step / run.total))
        run.log(step, loss=value, **terms)
        run.save(step)
    return model

def train_decoder(cfg, dataset, perceptual):
    """Stage 2: decoder against discriminator, the latter trained from step 0 (Sec. 2.3, App. A.2).
    The encoder stays as it is: trained along, it gives an rFID of .77 instead of .56 (Fig. 18). There, too, a
    discriminator twice as fast (4e-5) collapses after 60k steps."""
    device, run, batch, model = begin(cfg, "decoder")
    ema, disc = copy.deepcopy(model.decoder), Discriminator(cfg.size, cfg.disc).to(device)
    opt = torch.optim.AdamW(model.decoder.requires_grad_(True).parameters(), **ADAMW)
    opt_disc = torch.optim.AdamW(disc.parameters(), **ADAMW)
    start = run.restore(tokenizer=model, ema=ema, disc=disc, opt=opt, opt_disc=opt_disc)
    for step in run.steps(start):
        x, _, draws = draw(dataset, cfg, step, "decoder", batch, device)
        weight = cfg.gan * ramp(step, run.total / 20, run.total / 2)            # official: 5k, 50k of 100k
        with common.autocast(cfg):
            value, terms, recon = loss_decoder(model, x, draws, cfg, perceptual, disc, weight)
            value_disc = loss_disc(disc, x, recon)
        update(opt, value, cfg.lr * batch * cfg.frames / 256 * cosine(step / run.total))
        # Sec. 2.3: the discriminator's rate rises during 25k of 100k steps and then stays
        update(opt_disc, value_disc, cfg.lr_disc * batch / 256 * ramp(step + 1, 0, run.total / 4))
        common.ema_update(ema, model.decoder, cfg.ema)
        run.log(step, loss=value, disc=value_disc, **terms)
        run.save(step)

def train_dit(cfg, dataset, _):
    """Stage 3: the generator, on codes sampled from the frozen encoder, neither scaled nor normalised."""
    device, run, batch, tokenizer = begin(cfg, "dit")
    model = DiT(cfg, len(dataset.classes)).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), **ADAMW)
    start = run.restore(model=model, tokenizer=tokenizer, ema=ema, opt=opt)
    for step in run.steps(start):
        x, y, draws = draw(dataset, cfg, step, "dit", batch, device)
        with common.autocast(cfg):
            z = bottleneck(*tokenizer.encoder(x), draws["noise"])
            value, terms = loss_dit(model, (z, y), draws)
        update(opt, value, cfg.lr_dit * batch / 256 * cosine(step / run.total, low=0.075, warmup=0.1))
        common.ema_update(ema, model, cfg.ema)
        run.log(step, loss=value, std=z.std(), **terms)
        run.save(step)

STAGES = {"ae": train_ae, "decoder": train_decoder, "dit": train_dit}
def train(cfg):
    """One stage, or all in order (--resume passes over the finished); 1 where the demo missed a target."""
    dataset, perceptual = open_split(cfg, "train"), perceptual_loss(cfg, common.device_of(cfg))
    for stage, train_stage in STAGES.items():
        if cfg.stage in ("all", stage):
            train_stage(cfg, dataset, perceptual)
            last = common.folder(cfg) / f"{stage}.pt"
    if common.rank() == 0:
        result = report(cfg, last, last.parent)
        if cfg.preset == "demo" and common.is_preset(cfg, PRESETS):
            missed = [name for name, least in TARGET.items() if result[name] < least]
            print(f"target {TARGET}: {'MISSED: ' + ', '.join(missed) if missed else 'reached'}")
            return 1 if missed else 0

# --- Command line ------------------------------------------------------------
@torch.no_grad()
def reconstruct(tokenizer, cfg):
    """Test clips x, reconstructions y through z = mean, and the mean over clips of their PSNR (peak 2).
    Official code differs: one PSNR from the squared error of a whole batch, which comes out lower."""
    test, device = open_split(cfg, "test", cfg.count), common.device_of(cfg)
    x = clips(test, np.arange(min(cfg.count, len(test))))
    y = torch.cat([tokenizer(block.to(device))[0].float().cpu() for block in x.split(64)]).clamp(-1, 1)
    psnr = -10 * ((y - x).square().mean((1, 2, 3, 4)) / 4).log10()
    return x, y, psnr.mean().item()

def film(path, x, rows, heads=()):
    """Clips (M, 3, T, H, W) in equal rows of these names, as one picture, animated where T > 1."""
    n, scale = len(x) // len(rows), max(1, 64 // x.shape[-1])
    common.png(path, np.stack([common.grid(i, n, rows, heads, scale) for i in common.to_uint8(x).unbind(2)]))

@torch.no_grad()
def report(cfg, path, where):
    """Pictures of a checkpoint's reconstructions and samples, PSNR, class accuracy; printed and returned.
    With --sample, a generator's checkpoint gives samples alone."""
    (tokenizer, generator), result, device = load(cfg, path), {}, common.device_of(cfg)
    if not (cfg.sample and generator):
        x, y, result["psnr"] = reconstruct(tokenizer, cfg)
        film(where / "reconstructions.png", torch.cat((x[:10], y[:10])), ["original", "decoded"])
    if generator:
        K = generator.classes
        chosen = chosen_classes(cfg, K)
        names = data.SHAPES if cfg.data == "shapes" else [f"class {k}" for k in range(K)]
        each = max(1, cfg.count // len(chosen)) if cfg.steps >= 100 else 1
        labels = torch.tensor(chosen).repeat_interleave(each)
        z = [sample(generator, y, common.draws(cfg.seed, i, "sample", device), cfg.calls, cfg.scale, cfg.eta)
             for i, y in enumerate(labels.to(device).split(100))]
        x = torch.cat([tokenizer.decoder(part).clamp(-1, 1).cpu() for part in z]).unflatten(0, (-1, each))
        film(where / "samples.png", x[:10, :8].flatten(0, 1), [names[k] for k in chosen[:10]])
        if not cfg.sample:
            first = x[:10, 0].transpose(1, 2)                               # frames first, as data has them
            train = common.nearest(first, open_split(cfg, "train")).view_as(first)
            film(where / "nearest.png", torch.cat((first, train)).transpose(1, 2), ["sample", "train"])
        if cfg.steps >= 100 and not cfg.sample:
            result["accuracy"] = common.accuracy(judge(cfg, "ruler"), x[:, :, :, 0].flatten(0, 1), labels)
    print(f"{where}: " + "  ".join(f"{name} {value:.3f}" for name, value in result.items()), flush=True)
    return result

def plan(cfg, kernel=0):
    """What a configuration costs: parameters of both sides, and MACs of their matrix products, by formula.
    A block's weights act once on each token; scores and weighted sums are 2 N^2 D. The paper's "GFLOPs" are
    10^9 MACs. Its Tab. 5 counts any tubelet as an image patch: kernel = 768."""
    s, c, costs = sizes(cfg), cfg.channels, {}
    N, E = math.prod(s.grid), s.tokens * c
    with torch.device("meta"):
        model = Autoencoder(cfg)
    for side, (D, depth, _), code in zip(("encoder", "decoder"), s, (E + E * cfg.variational, E)):
        S, weights = N + cfg.latents, 4 * D**2 + 3 * D * int(2.67 * D)
        ends = D * (N * (kernel or 3 * s.q * s.p**2) + code)
        costs[f"{side} parameters"] = sum(p.numel() for p in getattr(model, side).parameters())
        costs[f"{side} MACs"] = depth * (S * weights + 2 * S**2 * D) + ends
    sums = {what: costs[f"encoder {what}"] + costs[f"decoder {what}"] for what in ("parameters", "MACs")}
    return {"tokens": s.tokens, "E": E, "pixels per float": 3 * cfg.frames * cfg.size**2 / E, **costs, **sums}

def fit(x, y, degree=1):
    """Least squares: the polynomial's coefficients, highest power first, and R^2."""
    coefficients = np.polyfit(x, y, degree)
    return coefficients, 1 - np.var(y - np.polyval(coefficients, x)) / np.var(y)

def chosen_classes(cfg, K):
    """The labels of --classes, out of K; UserError where there is no such class."""
    if cfg.classes == "all":
        return [*range(K)]
    words = cfg.classes.split(",")
    common.need(all(map(str.isdecimal, words)), f"--classes {cfg.classes}: write all, or labels as 3,5")
    common.need(max(map(int, words)) < K, f"--classes {cfg.classes}: labels are 0 to {K - 1}")
    return [*map(int, words)]

def points(cfg):
    """The configurations of --sweep, each with its own run folder; UserError where one is none."""
    for word in cfg.sweep.split():
        model, _, channels = word.partition(":")
        model = cfg.model.split("/")[0] + model if model.startswith("/") else model
        for c in channels.split(","):
            common.need(c.isdecimal(), f"--sweep {word}: write MODEL:c,c,... as in '/8:4,8 S-B/16:16'")
            name = f"{cfg.name}-{model.replace('/', '-')}-c{c}"
            yield replace(cfg, model=model, channels=int(c), name=name, stage="ae", sweep="")

def sweep(cfg):
    """The study: stage ae at every point, then PSNR, which is a logarithm, against log2 E and log2 MACs.
    Figs. 2, 3: E decides (R^2 .92, 2.3 dB a doubling), whatever p, c and the cost; so compare tokenizers at
    equal E. Leaves sweep.png: originals, and their reconstructions for rising E, each E with its patch."""
    rows, dataset, perceptual = [], open_split(cfg, "train"), perceptual_loss(cfg, common.device_of(cfg))
    for each in sorted(points(cfg), key=lambda each: (plan(each)["E"], each.model)):
        x, y, psnr = reconstruct(train_ae(each, dataset, perceptual), each)
        rows.append(plan(each) | {"model": each.model, "c": each.channels, "psnr": psnr, "pictures": y[:8]})
    if common.rank() == 0:
        print(f"{'model':>24}{'c':>5}{'E':>8}{'pixels/float':>14}{'MACs':>16}{'PSNR':>8}")
        for row in rows:
            print("{model:>24}{c:5}{E:8}{pixels per float:14.2f}{MACs:16,}{psnr:8.2f}".format(**row))
        for name in ("E", "MACs"):
            (slope, _), r2 = fit(np.log2([row[name] for row in rows]), [row["psnr"] for row in rows])
            print(f"PSNR on log2 {name}: {slope:+.2f} dB per doubling, R^2 {r2:.3f}")
        heads = ["original", *(f"E{row['E']} p{row['model'].split('/')[1]}" for row in rows)]
        shown = torch.stack([x[:8], *(row["pictures"] for row in rows)], 1)
        film(common.folder(cfg) / "sweep.png", shown.flatten(0, 1), [""] * len(shown), heads)

def write_npz(path, blocks, whole):
    """An .npz of arrays that come in blocks of rows, {name: rows} each, and of `whole` arrays, which are read
    when all blocks are there. Rows wait in files beside `path`: memory does not grow with their number."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(path).parent, prefix="export-") as where:
        heads = {}
        for block in blocks:
            for name, rows in block.items():
                with open(Path(where, name), "ab") as file:
                    file.write(np.ascontiguousarray(rows).tobytes())
                count = heads[name]["shape"][0] if name in heads else 0
                heads[name] = np.lib.format.header_data_from_array_1_0(rows)
                heads[name]["shape"] = (count + len(rows), *rows.shape[1:])
        def write(file):
            with zipfile.ZipFile(file, "w") as archive:
                for name, head in heads.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array_header_1_0(member, head)
                        with open(Path(where, name), "rb") as raw:
                            shutil.copyfileobj(raw, member, 2**18)
                for name, array in whole.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, np.asanyarray(array))
        common.write_atomic(path, write)

@torch.no_grad()
def export(cfg, path, _):
    """--export: mean and logvar of the training split (with --flip mirrored too) for `latents:FILE`.
    The scale brings what a reader samples, mean plus noise, to deviation 1; ours takes codes as they are."""
    (tokenizer, _), dataset, device = load(cfg, path), open_split(cfg, "train"), common.device_of(cfg)
    grid = ((1, 1, cfg.latents) if cfg.latents else sizes(cfg).grid)[cfg.frames == 1:]
    whole, sums = {"labels": dataset.labels, "class_names": np.array(dataset.classes)}, np.zeros(4)
    def blocks():
        for index in torch.arange(len(dataset)).split(64):
            block = {}
            for tail, axes in (("", []), ("_flip", [-1]))[:1 + cfg.flip]:
                codes = tokenizer.encoder(clips(dataset, index).flip(axes).to(device))
                for name, part in zip(("latents", "logvar")[:1 + cfg.variational], codes):
                    block[name + tail] = part.transpose(1, 2).unflatten(2, grid).half().cpu().numpy()
            z = block["latents"].astype(np.float64)
            noise = np.exp(block["logvar"].astype(np.float64)).sum() if cfg.variational else 0.0
            sums[:] += z.size, z.sum(), (z**2).sum(), noise
            yield block
        n, total, square, noise = sums
        whole["scale"] = ((square + noise) / n - (total / n)**2) ** -0.5
    write_npz(cfg.export, blocks(), whole)
    print(f"{cfg.export}: {len(dataset)} latents ({cfg.channels}, {', '.join(map(str, grid))}), "
          f"scale {whole['scale']:.4f}")

@torch.no_grad()
def decode(cfg, path, where):
    """--decode: latents (M, c, h, w) or (M, c, t, h, w), unscaled as stored -> decoded.png, decoded.npz."""
    (tokenizer, _), found, s = load(cfg, path), data.open_data(f"latents:{cfg.decode}", size=0), sizes(cfg)
    have = math.prod(found.images.shape[2:]), found.images.shape[1]
    common.need(have == (s.tokens, cfg.channels), f"--decode {cfg.decode}: {have[0]} tokens of "
                f"{have[1]} channels; {cfg.sample} decodes {s.tokens} of {cfg.channels}")
    shown = []
    def blocks():
        for index in torch.arange(len(found)).split(64):
            z = torch.from_numpy(np.array(found.images[index.numpy()], np.float32)).flatten(2).transpose(1, 2)
            x = tokenizer.decoder(z.to(common.device_of(cfg))).cpu()
            if not shown:
                shown.append(x[:8])
            pixels = common.to_uint8(x).permute(0, 2, 3, 4, 1).numpy()
            yield {"videos": pixels} if cfg.frames > 1 else {"images": pixels[:, 0]}
    whole = {"labels": found.labels, "class_names": np.array(found.classes)}
    write_npz(where / "decoded.npz", blocks(), whole)
    film(where / "decoded.png", shown[0], ["decoded"])
    print(f"{len(found)} decoded: {where}/decoded.png, decoded.npz")

def main(cfg):
    """Plan, use a checkpoint, sweep or train; returns the exit code."""
    if cfg.plan:
        print("\n".join(f"{name:>18} {value:,}" for name, value in plan(cfg).items()))
    elif cfg.sample:
        work = export if cfg.export else decode if cfg.decode else report
        work(cfg, cfg.sample, Path(cfg.sample).parent / "samples")
    else:
        return sweep(cfg) if cfg.sweep else train(cfg)

if __name__ == "__main__":
    common.launch(main, common.cli(Config, PRESETS, __doc__))
