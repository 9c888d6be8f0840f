"""DetailFlow: 1D Coarse-to-Fine Autoregressive Image Generation via Next-Detail Prediction (arXiv 2505.21473)

A tokenizer writes an image as N tokens, coarse to fine: the first n of them are the image at R(n) pixels, and
R grows with n. A transformer predicts the next details, g tokens in one parallel step. Tokens drawn in
parallel err, so both learn to let later tokens make up for a wrong earlier one.

    [patches | query 1 ... N] -> encoder -> codebook -> token 1 ... N        a query sees its group and before
    [mask ... mask | token 1 ... n] -> decoder -> image of R(n) pixels       fewer tokens, fewer masks
    class -> token 1, ..., token g, then g tokens a step                     stop after any group and decode

Run:      python detailflow.py                          demo: drawn shapes, both stages, pictures; 3 minutes
          python detailflow.py --gpus 2                 the same in two processes
          python detailflow.py --preset DetailFlow-16 --data folder:imagenet --teacher siglip2.pt --gpus 8
          --sample CHECKPOINT and --classes 6 --keep 8 (or 12px), --encode F.npz or --decode F.npz
Faithful: D1 law, D2 targets, D3 encoder, D4 VQ, D5 decoder, D6 correction, D7 losses, D8 codes for stage ar
          (made as it goes), D9 AR model, D10 its training, D11 sampler: our labels, the method in order.
Scaled:   the demo's sizes, rates and losses. Departures for its speed and use of codes: --std and --kmeans.
Left out: SigLIP2, DINO and LPIPS (--teacher reads one network for all, a small one trains here); DINO heads,
          spectral norm, SyncBN of the discriminator (1x1 heads instead); the entropy loss (weight 0).
Letters:  B images, C channels, R side of the image, f patch, P patches, N tokens, n kept, g group, c first
          tokens, one by one, K codes, d their width, s first noisy token, D width, H heads.
CUDA:     never run on CUDA.
Read in this order: resolution, group_causal, VQ, Tokenizer, loss_tokenizer, AR, generate. 20 minutes.
"""

import copy
import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Literal

import common
import data

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# --- Configuration -----------------------------------------------------------

@dataclasses.dataclass
class Config:
    preset: str = "demo"                    # where the values below start from
    data: str = "shapes"                    # shapes, cifar10, npz:PATH or folder:PATH
    stage: Literal["all", "tokenizer", "ar"] = "all"    # what to train
    objects: int = 1                        # most objects in a drawn image
    size: int = 256                         # side R of the image
    flip: bool = True                       # flip each image left-right with probability 1/2
    zoom: float = 1.25                      # cut windows out of images enlarged by up to this (ar: 1.1)
    patch: int = 16                         # patch side f
    tokens: int = 128                       # N, tokens an image
    group: int = 8                          # g, tokens predicted in one step
    causal: int = 8                         # c, first tokens, which are predicted one by one
    codes: int = 8192                       # K, size of the codebook
    dim: int = 8                            # d, width of a code
    alpha: float = 1.5                      # exponent of the resolution law, Eq. (3)
    rounding: Literal["ceil", "nearest"] = "ceil"       # of R(n) to multiples of f: official code, or paper
    encoder: str = "1152x12x16x4304"        # WIDTHxDEPTHxHEADSxMLP
    decoder: str = "768x12x12x3072"         # the same of the decoder
    gpt: str = "1024x24x16x2816"            # the same of the AR transformer
    std: float = 0.0                        # our choice: s.d. of latents and positions at first; 0: paper
    degrade: float = 0.2                    # share of the steps that decode fewer than N tokens
    correct: bool = True                    # self-correction, at every step (D6)
    near: int = 50                          # noise is one of so many nearest codes
    kmeans: int = 0                         # our choice: steps before k-means sets the codebook; 0: paper
    perceptual: float = 1.0                 # weight of the perceptual loss
    ramp: int = 10_000                      # steps in which it rises from 0
    gan: float = 0.2                        # weight of the adversarial losses
    gan_from: int = 40_000                  # first step with them, counted from 1
    align: float = 1.0                      # weight of the first token's alignment, Eq. (4)
    teacher: str = "judge"                  # judge, or a frozen model: TorchScript .pt, torch.export .pt2
    tokenizer: str = ""                     # checkpoint: stage ar builds on it, the other starts from it
    noisy: float = 0.3                      # share of the AR sequences with a mistake and its correction
    label_drop: float = 0.1                 # share of them that lose their label; 0: there is no null label
    dropout: float = 0.1                    # of the AR model: embeddings, both residual branches
    steps: int = 1_251_000                  # optimizer steps of each stage; given, it overrides the next 2
    steps_tokenizer: int = 0                # of stage tokenizer; 0: --steps
    steps_ar: int = 0                       # of stage ar
    batch: int = 256                        # images a step, over all processes
    batch_ar: int = 0                       # of stage ar; 0: --batch
    lr: float = 1e-4                        # tokenizer's peak rate at 256 images a step (times batch / 256)
    warmup: float = 0.004                   # share of its steps with a rising rate
    lr_ar: float = 1e-4                     # peak rate of the AR model, whatever the batch
    ema: float = 0.9999                     # decay of the averaged AR weights, which are sampled from
    guidance: float = 1.5                   # classifier-free guidance scale; 1 is none
    gradual: bool = False                   # let it fall from group to group
    temperature: float = 1.0                # of the AR model's softmax
    top_k: int = 0                          # sample from so many likeliest codes; 0: all
    top_p: float = 1.0                      # sample from the likeliest codes of this mass; 1: all
    keep: str = "all"                       # tokens generated or decoded: all, 24, or as 48px the side
    classes: str = "all"                    # labels to generate, as 3,5; all is every class in turn
    count: int = 500                        # images measured, or rows of a picture of --sample, to 10
    encode: str = ""                        # with --sample: write the tokens of --data to FILE.npz
    decode: str = ""                        # with --sample: draw the tokens of FILE.npz
    seed: int = 0                           # every random number is a function of (seed, step)
    gpus: int = 1                           # processes, one a GPU; without GPUs they share the CPU
    device: str = "auto"                    # auto, cpu or cuda
    bf16: bool = False                      # bf16 autocast on CUDA; VQ, rotations and losses stay in fp32
    compile: bool = False                   # torch.compile for the blocks
    name: str = ""                          # run folder runs/detailflow/NAME; default: the preset
    resume: bool = False                    # go on with runs/detailflow/NAME in its first unfinished stage
    sample: str = ""                        # checkpoint to use; the fields in `sampling` may then change
    log: int = 100                          # steps between log lines
    save: int = 5000                        # steps between checkpoints
    sampling = "data guidance gradual temperature top_k top_p keep classes count encode decode".split()

PAPER = dict(data="folder:imagenet", teacher="siglip2.pt", bf16=True, steps_ar=1_501_200)   # 250, 300 epochs
GPT = {"B": "768x12x12x2048", "L": "1024x24x16x2816", "XL": "1280x36x20x3584", "XXL": "1536x48x24x4096"}
PRESETS = {
    "demo": dict(size=16, flip=False, zoom=1.0, patch=4, tokens=16, group=4, causal=4, codes=256, near=32,
                 encoder="96x2x4x192", decoder="96x3x4x192", gpt="96x4x4x256", std=0.5, kmeans=200,
                 perceptual=0.0, gan=0.0, align=0.0, steps=2600, steps_ar=1600, batch=16, batch_ar=32,
                 lr=0.056, warmup=0.05, lr_ar=4e-3, dropout=0.0, ema=0.98, guidance=2.5, save=1000),
    "small": dict(data="cifar10", size=32, patch=4, tokens=32, group=4, causal=4, codes=1024,   # not yet run
                  encoder="256x6x4x1024", decoder="256x6x4x1024", gpt="384x8x6x1024", std=0.5, kmeans=1000,
                  gan_from=10_000, steps=40_000, batch=128, lr=1e-3, warmup=0.05, lr_ar=3e-4, ema=0.999),
    **{f"DetailFlow-{N // 8}": PAPER | dict(tokens=N, guidance=scale)
       for N, scale in ((128, 1.45), (256, 1.5), (512, 1.32))},     # guidance: the official README
    **{f"DetailFlow-16-{size}": PAPER | dict(stage="ar", gpt=gpt) for size, gpt in GPT.items()},
    "DetailFlow-16x16": PAPER | dict(tokens=256, group=16, causal=16)}        # Tab. 4: groups of 16
# Of the demo; two seeds gave .050, 256, .652 and .067, 256, .544.
TARGET = dict(error=0.1, codes=128, accuracy=0.4)

def shape(text):
    """A network "WIDTHxDEPTHxHEADSxMLP" as four numbers; UserError."""
    parts = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
    common.need(len(parts) == 4 and all(parts), f"{text}: write a network as WIDTHxDEPTHxHEADSxMLP")
    common.need(parts[0] % (4 * parts[2]) == 0, f"{text}: the width must be a multiple of 4 x heads")
    return parts

def admissible(cfg):
    """The numbers of tokens that can be decoded: 1 to c, then up to the end of any later group."""
    return [*range(1, cfg.causal + 1), *range(cfg.causal + cfg.group, cfg.tokens + 1, cfg.group)]

def kept(cfg):
    """--keep as a number of tokens: all, one admissible, or of those drawn at a side the nearest in R(n)."""
    counts, digits = admissible(cfg), cfg.keep.removesuffix("px")
    n = cfg.tokens if cfg.keep == "all" else int(digits) if digits.isdecimal() else 0
    if digits != cfg.keep:
        n = max([(-abs(pixels(k, cfg) - n), k) for k in counts if side(k, cfg) == n], default=(0, 0))[1]
    common.need(n in counts, f"--keep {cfg.keep}: give all, a side as {cfg.size}px, or one of {counts}")
    return n

def parse_classes(cfg, K):
    """--classes as a list of labels below K; `all` is empty."""
    parts = [] if cfg.classes == "all" else cfg.classes.split(",")
    common.need(all(map(str.isdecimal, parts)), f"--classes {cfg.classes}: write all, or labels as 3,5")
    common.need(all(int(k) < K for k in parts), f"--classes {cfg.classes}: labels are 0 to {K - 1}")
    return [int(k) for k in parts]

def check(cfg):
    """Every mistake that can be seen without the data; UserError with one line."""
    need, N, g, c = common.need, cfg.tokens, cfg.group, cfg.causal
    least = dict.fromkeys("size patch tokens group causal codes dim near zoom objects count".split(), 1)
    least |= dict.fromkeys(("alpha", "temperature", "top_p"), 1e-3) | {"seed": -math.inf}
    most = dict.fromkeys("degrade noisy label_drop dropout warmup ema top_p".split(), 1) | {"objects": 4}
    for name, value in vars(cfg).items():
        low, high = least.get(name, 0), most.get(name, math.inf)
        fine = isinstance(value, str) or low <= value <= high and abs(value) < math.inf
        need(fine, f"--{name} {value}: must lie in [{low}, {high}]")
    for name, part in dict(tokens="group", causal="group", size="patch", batch_ar="gpus").items():
        a, b = getattr(cfg, name), getattr(cfg, part)
        need(a % b == 0, f"--{name} {a}: must be a multiple of --{part} {b}")
    need(g <= c <= N > g, f"--tokens {N}: must be above --group {g}, and --causal {c} between the two")
    need(cfg.near <= cfg.codes, f"--near {cfg.near}: there are only {cfg.codes} codes")
    fine = cfg.label_drop or cfg.guidance == 1
    need(fine, f"--guidance {cfg.guidance}: --label_drop 0 trains no null label; give --guidance 1")
    parse_classes(cfg, math.inf)
    need(cfg.sample or not cfg.encode + cfg.decode, "--encode and --decode go with --sample CHECKPOINT")
    kept(cfg)
    for text in (cfg.encoder, cfg.decoder, cfg.gpt):
        shape(text)

def open_split(cfg, split, count=20_000):
    """The data's 'train', 'test' or 'judge' split; UserError where it does not fit the configuration."""
    found = data.open_data(cfg.data, split, size=cfg.size, objects=(1, cfg.objects), count=count)
    fits = found.images.shape[1:] == (3, cfg.size, cfg.size) and not found.latent
    common.need(fits, f"{cfg.data}: holds {found.images.shape[1:]}, not RGB pictures of --size {cfg.size}")
    return found

def prepare(cfg):
    """Once, before the processes start: downloads, packing, what the run will ask for, the teacher."""
    if cfg.sample:
        return
    train, test = open_split(cfg, "train"), open_split(cfg, "test", cfg.count)
    parse_classes(cfg, len(train.classes))
    common.need(cfg.count > 1, "--count 1: the error of a run is measured on 2 images or more")
    for split, found, why in (("train", train, "a judge"), ("test", test, "the error, a share of variance,")):
        common.need(len(found) > 1, f"{split} split of {cfg.data}: {len(found)} image; {why} needs 2 or more")
    teacher(cfg)

# --- Building blocks ---------------------------------------------------------
def resolution(n, cfg):
    """R(n) = R - b (N - n)^alpha with b = (R - 1) / (N - 1)^alpha, Eq. (3), D1: R(1) = 1 and R(N) = R. Above
    alpha = 1 the first tokens buy the most pixels a side, the last ones the fewest."""
    return cfg.size - (cfg.size - 1) * ((cfg.tokens - n) / (cfg.tokens - 1)) ** cfg.alpha

def pixels(n, cfg):
    """R(n) in whole pixels: n tokens are never shown finer detail (official code)."""
    return min(max(int(resolution(n, cfg)), 1), cfg.size)

def side(n, cfg):
    """The side that n tokens are decoded at, a multiple of f; official code differs: it rounds up."""
    ratio = pixels(n, cfg) / cfg.patch
    return cfg.patch * max(1, math.ceil(ratio) if cfg.rounding == "ceil" else math.floor(ratio + 0.5))

def degraded(x, n, cfg):
    """The target of n tokens (D2): images (B, C, R, R) averaged down to R(n) pixels, enlarged to side(n)."""
    small = F.interpolate(x, (pixels(n, cfg),) * 2, mode="area")
    return x if n == cfg.tokens else F.interpolate(small, (side(n, cfg),) * 2, mode="bicubic")

def group_causal(n, g, c):
    """Who (row) sees whom (column): the first c tokens those before them, the others also their own group, in
    which none comes first, for the AR model draws it at once. The encoder's queries and the AR share it."""
    i = torch.arange(n)
    return torch.where(i[:, None] < c, i <= i[:, None], i // g <= i[:, None] // g)                  # (n, n)

def enlarged(x, r):
    """Images (B, C, h, h) at side r, where they are smaller."""
    return F.interpolate(x, (r, r), mode="bicubic") if x.shape[-1] < r else x

def patchify(x, f):
    """Images (B, C, h, w) to row-major patches; inside a patch the order is row, column, channel."""
    x = x.unflatten(3, (-1, f)).unflatten(2, (-1, f))                                   # (B, C, h, f, w, f)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)                              # (B, P, f*f*C)

def unpatchify(u, f):
    """The inverse, to a square image."""
    x = u.unflatten(2, (f, f, -1)).unflatten(1, [math.isqrt(u.shape[1])] * 2)           # (B, n, n, f, f, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)                           # (B, C, n*f, n*f)

def resized(grid, n):
    """A learned grid of positions (s, s, D) for n x n patches."""
    x = F.interpolate(grid.permute(2, 0, 1)[None], (n, n), mode="bilinear", antialias=True)   # (B, D, n, n)
    return x[0].flatten(1).T                                                                        # (P, D)

def rotary(N, g, d):
    """Cosines and sines (N, d/2) of positions p: row (p-1)//g, column (p-1) mod g of a table g wide. Both are
    zero for the class, p = 0: so are its queries and keys (LlamaGen), and rows lag the mask's groups by 1."""
    p = torch.arange(N - 1)
    rate = 10_000.0 ** (-torch.arange(0, d // 2, 2) / (d // 2))
    angle = torch.cat([(p // g)[:, None] * rate, (p % g)[:, None] * rate], 1)
    return F.pad(angle.cos(), (0, 0, 1, 0)), F.pad(angle.sin(), (0, 0, 1, 0))

def rotate(x, cos, sin):
    """Turn adjacent pairs of x (B, H, N, d) by their position's angles; never in bf16."""
    a, b = x.unflatten(3, (-1, 2)).unbind(4)                                    # (B, H, N, k), (B, H, N, k)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], 4).flatten(3).type_as(x)     # (B, H, N, 2*k)

class Block(nn.Module):
    """Pre-norm block: a ViT's (LayerNorm, biases, GELU) or LlamaGen's (RMSNorm, no biases, SwiGLU). It goes
    on behind `past`, if any: keys and values of the AR model's past, or of the encoder's patches."""
    def __init__(self, D, H, m, llama=False, dropout=0.0):
        super().__init__()
        self.heads, self.dropout, self.gelu = H, nn.Dropout(dropout), nn.GELU("tanh")
        self.norm1, self.norm2 = (nn.RMSNorm(D, 1e-5) if llama else nn.LayerNorm(D, 1e-6) for _ in range(2))
        self.qkv, self.out, self.up, self.down = (
            nn.Linear(*sides, bias=not llama) for sides in ((D, 3 * D), (D, D), (D, m), (m, D)))
        self.gate = nn.Linear(D, m, bias=False) if llama else None
        initialise(self, llama)
    def forward(self, h, mask=None, past=None, turn=None):
        x = self.qkv(self.norm1(h)).unflatten(2, (3, self.heads, -1))                      # (B, N, c, H, d)
        q, k, v = x.permute(2, 0, 3, 1, 4)                                               # each (B, H, N, d)
        if turn:
            q, k = rotate(q, *turn), rotate(k, *turn)                           # (B, H, N, d), (B, H, N, d)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)       # (B, H, L, d), (B, H, L, d)
        y = F.scaled_dot_product_attention(q, k, v, mask)                                     # (B, H, N, d)
        h = h + self.dropout(self.out(y.transpose(1, 2).flatten(2)))                             # (B, N, D)
        x = self.norm2(h)                                                                        # (B, N, D)
        y = F.silu(self.gate(x)) * self.up(x) if self.gate else self.gelu(self.up(x))            # (B, N, m)
        return h + self.dropout(self.down(y)), (k, v)                              # (B, N, D), (B, H, L, d)

def initialise(module, llama):
    """Matrices N(0, 0.02^2) (LlamaGen) or Xavier-uniform (ViT), zero biases."""
    for name, weight in module.named_parameters():
        for part in weight.detach().chunk(3 if "qkv" in name else 1):
            if part.ndim > 1:
                nn.init.normal_(part, std=0.02) if llama else nn.init.xavier_uniform_(part)
            elif name.endswith("bias"):
                nn.init.zeros_(part)

# --- Model -------------------------------------------------------------------
class VQ(nn.Module):
    """The nearest of K codes by angle (D4): latents and codes are normalised whenever they are used."""
    def __init__(self, K, d):
        super().__init__()
        self.codes = nn.Parameter(F.normalize(torch.empty(K, d).uniform_(-1 / K, 1 / K), dim=1))
        self.register_buffer("use", torch.zeros(K))             # shares of the picks since the last reset
        self.free = False                                       # first phase with --kmeans: no codes yet
    def values(self, ids):
        return F.normalize(self.codes, dim=1)[ids]              # (..., d) of ids (...)
    def nearest(self, h, k):
        """The k nearest codes (B, N, k) of latents (B, N, d), in order; |u - e|^2 is 2 - 2 u e."""
        with torch.autocast(h.device.type, enabled=False):      # bf16 would pick others
            u = F.normalize(h.to(self.codes.dtype), dim=2)                                       # (B, N, d)
            return (u @ F.normalize(self.codes, dim=1).T).topk(k, 2).indices                     # (B, N, k)
    def forward(self, h):
        """Latents (B, N, d) to vectors with the straight-through gradient, ids (B, N), and the codebook
        and commitment losses (2, B, N): one number whose gradient goes to the code, or to the latent."""
        ids = self.nearest(h.detach(), 1)[..., 0]                                                   # (B, N)
        u, e = F.normalize(h.to(self.codes.dtype), dim=2), self.values(ids)           # (B, N, d), (B, N, d)
        if self.free:
            return u, ids, u.new_zeros(2, *ids.shape)                         # (B, N, d), (B, N), (2, B, N)
        # Equal numbers, different gradients: the code moves to the latent, the latent commits to the code.
        losses = torch.stack([(e - u.detach()).square(), (e.detach() - u).square()]).mean(3)     # (2, B, N)
        # Straight-through: the decoder's gradient reaches the latent as if nothing had been exchanged.
        return u + (e - u).detach(), ids, losses                              # (B, N, d), (B, N), (2, B, N)

class Encoder(nn.Module):
    """ViT over patches and, behind them, latent queries; the patches never see those (D3)."""
    def __init__(self, cfg):
        super().__init__()
        (D, depth, H, m), n, N = shape(cfg.encoder), cfg.size // cfg.patch, cfg.tokens
        self.f, self.embed, self.norm = cfg.patch, nn.Linear(3 * cfg.patch ** 2, D), nn.LayerNorm(D, 1e-6)
        self.grid = nn.Parameter(torch.randn(n, n, D) * (cfg.std or D ** -0.5))
        self.queries, self.refined, self.positions = (          # refined: the queries of a second pass
            nn.Parameter(torch.randn(N, D) * (cfg.std or 0.02)) for _ in range(3))
        self.blocks = nn.ModuleList(Block(D, H, m) for _ in range(depth))
        mask = F.pad(group_causal(N, cfg.group, cfg.causal), (n * n, 0, n * n, 0))
        mask[:, :n * n] = True
        self.register_buffer("mask", mask, persistent=False)
    def forward(self, x, h, memory=None):
        """Images (B, 3, R, R) and latents (1 or B, n, D) to outputs of the latents, and to memory: keys and
        values of the patches. Given that, a second pass skips the patches: exact, as they see no latents."""
        P, n = self.grid[..., 0].numel(), h.shape[1]
        if not memory:
            e = self.embed(patchify(x, self.f)) + self.grid.flatten(0, 1)                        # (B, P, D)
            h = torch.cat([e, h.expand(len(x), -1, -1)], 1)                                    # (B, P+n, D)
        seen = self.mask[P + n - h.shape[1]:P + n, :P + n]                                        # (N, P+n)
        keep = []
        for block, past in zip(self.blocks, memory or [None] * len(self.blocks)):
            h, past = block(h, seen, past)                                       # (B, N, D), (B, H, P+n, d)
            keep.append(torch.stack([a[:, :, :P] for a in past]))
        return self.norm(h[:, -n:]), keep                                       # (B, n, D), (2, B, H, P, d)

class Decoder(nn.Module):
    """ViT over n tokens and one mask token for each patch of the image to be drawn; all see all (D5). So one
    decoder draws every side: fewer masks, at positions resampled from one learned grid."""
    def __init__(self, cfg):
        super().__init__()
        (D, depth, H, m), n = shape(cfg.decoder), cfg.size // cfg.patch
        self.f, self.norm, self.head = cfg.patch, nn.LayerNorm(D, 1e-6), nn.Linear(D, 3 * cfg.patch ** 2)
        self.grid = nn.Parameter(torch.randn(n, n, D) * (cfg.std or D ** -0.5))
        self.mask = nn.Parameter(torch.randn(D) * 0.02)
        self.positions = nn.Parameter(torch.randn(cfg.tokens, D) * (cfg.std or 0.02))
        self.blocks = nn.ModuleList(Block(D, H, m) for _ in range(depth))
    def forward(self, z, r):
        """Tokens (B, n, D) to images of side r: nothing but the number and places of the masks tells it."""
        z = z + self.positions[:z.shape[1]]                                                      # (B, n, D)
        masks = self.mask + resized(self.grid, r // self.f)                                         # (P, D)
        h = torch.cat([masks.expand(len(z), -1, -1), z], 1)                                    # (B, P+n, D)
        for block in self.blocks:
            h, _ = block(h)                                                    # (B, P+n, D), (B, H, P+n, d)
        return unpatchify(self.head(self.norm(h[:, :len(masks)])), self.f)                    # (B, C, r, r)

class Tokenizer(nn.Module):
    """Encoder, codebook, decoder; and for training alone the head that predicts S features of a teacher."""
    def __init__(self, cfg, S=0):
        super().__init__()
        (D, *_), (E, *_), d, self.cfg = shape(cfg.encoder), shape(cfg.decoder), cfg.dim, cfg
        self.encoder, self.decoder, self.vq = Encoder(cfg), Decoder(cfg), VQ(cfg.codes, d)
        self.quant, self.refine, self.read = nn.Linear(D, d), nn.Linear(d, D), nn.Linear(d, E)
        self.align = nn.Sequential(nn.Linear(d, 1024), nn.SiLU(), nn.Linear(1024, 1024), nn.SiLU(),
                                   nn.Linear(1024, S)) if S else nn.Identity()
    def encode(self, x, n=None):
        """Images to latents (B, N, d) before the codebook, by the first n queries where given; and memory."""
        z, memory = self.encoder(x, (self.encoder.queries + self.encoder.positions)[None, :n])
        return self.quant(z), memory
    def decode(self, q, n, r=None):
        """Vectors (B, N, d), of which the first n count, to images of side r, by default side(n)."""
        return self.decoder(self.read(q[:, :n]), r or side(n, self.cfg))                      # (B, C, r, r)
    def forward(self, x, s=None, u=None):
        """Images (B, 3, R, R) to vectors (B, N, d), triples of ids (3, B, N) and the two VQ losses (2).
        First noisy positions s, (B,) or one, and draws u (B, N) ask for self-correction (D6, Sec. 3.3): a
        token (from c on: a group) is exchanged for near codes, the encoder runs again, and what follows makes
        up for it, in a second half of the vectors. Triples hold the clean ids, those that an AR model reads,
        and those that it predicts: clean ones in place of noise."""
        (h, memory), e, cfg = self.encode(x), self.encoder, self.cfg
        q, ids, losses = self.vq(h)                                           # (B, N, d), (B, N), (2, B, N)
        if s is None:
            return q, ids.expand(3, -1, -1), losses.mean((1, 2))                 # (B, N, d), (3, B, N), (2)
        place = torch.arange(cfg.tokens, device=x.device)                                              # (N)
        s = torch.as_tensor(s, device=x.device).expand(len(x))                                         # (B)
        end = s + torch.where(s < cfg.causal, 1, cfg.group)                                            # (B)
        noisy, late = (place >= s[:, None]) & (place < end[:, None]), place >= end[:, None]  # (B, N), (B, N)
        near = self.vq.nearest(h.detach(), cfg.near)                                             # (B, N, k)
        wrong = near.gather(2, (u * cfg.near).long()[..., None])[..., 0]                            # (B, N)
        # Official code: the clean tokens ahead of the noise are constants as well.
        prefix = torch.where(noisy[..., None], self.vq.values(wrong), q).detach()                # (B, N, d)
        z = torch.where(late[..., None], e.refined, self.refine(prefix)) + e.positions           # (B, N, D)
        q2, ids2, losses2 = self.vq(self.quant(e(x, z, memory)[0]))           # (B, N, d), (B, N), (2, B, N)
        q2 = torch.where(late[..., None], q2, prefix)                                            # (B, N, d)
        label = torch.where(late, ids2, ids)                                                        # (B, N)
        triples = torch.stack([ids, torch.where(noisy, wrong, label), label])                    # (3, B, N)
        # The weights N / (2N - e) and (N - e) / (2N - e) of both passes: a mean over the tokens they chose.
        total = losses.sum((1, 2)) + (losses2 * late).sum((1, 2))                                      # (2)
        return torch.cat([q, q2]), triples, total / (late.numel() + late.sum())  # (2*B, N, d), (3, B, N), (2)

class Discriminator(nn.Sequential):
    """From S maps of the teacher's to one logit a place, large for real images (D7)."""
    def __init__(self, S):
        super().__init__(nn.Conv2d(S, S, 1), nn.LeakyReLU(0.2), nn.Conv2d(S, 1, 1))
        self.register_buffer("means", torch.zeros(2))           # running means of real and fake logits

class AR(nn.Module):
    """Class-conditional transformer in LlamaGen's form; it predicts g tokens a step with one head (D9)."""
    def __init__(self, cfg, classes):
        super().__init__()
        (D, depth, H, m), K, N, g = shape(cfg.gpt), cfg.codes, cfg.tokens, cfg.group
        self.g, self.c, self.classes = g, cfg.causal, classes   # label `classes` says nothing
        self.table, self.label = nn.Embedding(K, D), nn.Embedding(classes + (cfg.label_drop > 0), D)
        self.blocks = nn.ModuleList(Block(D, H, m, llama=True, dropout=cfg.dropout) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(D, 1e-5), nn.Linear(D, K, bias=False)
        self.dropout = nn.Dropout(cfg.dropout)
        initialise(self, llama=True)
        nn.init.zeros_(self.head.weight)
        self.masks = nn.Parameter(torch.randn(g - 1, D))        # official code: N(0, 1), unlike the rest
        for name, table in zip(("cos", "sin", "mask"), (*rotary(N, g, D // H), group_causal(N, g, self.c))):
            self.register_buffer(name, table, persistent=False)
    def inputs(self, ids, y):
        """[class, token 1 ... c, masks 2 ... g, token c+1 ... N-g]: position p predicts token p+1. The masks,
        which stand there once, ask for the first parallel group, later tokens for those g places on:
            reads       class  1  2  3  4  m  m  m  5  6  7  8          N = 12, c = g = 4
            predicts        1  2  3  4  5  6  7  8  9 10 11 12"""
        B, N = ids.shape
        z, masks = self.table(ids), self.masks.expand(B, -1, -1)                      # (B, N, D), (B, m, D)
        h = torch.cat([self.label(y)[:, None], z[:, :self.c], masks, z[:, self.c:N - self.g]], 1)
        return self.dropout(h[:, :N])                                                            # (B, N, D)
    def go_on(self, ids, y, i, j, past):
        """Logits of tokens i+1 to j, behind the key-value cache of the inputs before i, which grows."""
        h = self.inputs(ids, y)[:, i:j]                                                          # (B, n, D)
        for b, block in enumerate(self.blocks):
            h, past[b] = block(h, self.mask[i:j, :j], past[b], (self.cos[i:j], self.sin[i:j]))
        return self.head(self.norm(h))                                                           # (B, n, K)
    def forward(self, ids, y):
        """Logits of all tokens, given those before their groups: the plain form, without a cache."""
        return self.go_on(ids, y, 0, ids.shape[1], [None] * len(self.blocks))                    # (B, N, K)

# --- Objective ---------------------------------------------------------------
def prefix_length(u, v, cfg):
    """Two uniform draws to the number of tokens that a step decodes: mostly N, else 1 to N - g (D2)."""
    n = 1 + int(v * (cfg.tokens - cfg.group)) if u < cfg.degrade else cfg.tokens
    return n if n <= cfg.causal else -(-n // cfg.group) * cfg.group

def noise_start(u, n, cfg):
    """Uniform draws to first noisy positions among n > 1 tokens: one of the first c, or the start of a later
    group but the last. (Official code: of n <= c tokens the last may be hit, past correction.)"""
    s = (u * (n if n <= cfg.causal else n - cfg.group)).long()
    return torch.where(s < cfg.causal, s, s // cfg.group * cfg.group)

def weights(cfg, step):
    """The weights of the losses (D7): the perceptual one rises, the adversarial one comes late. `step` counts
    from 0, here as everywhere; the official schedules count from 1."""
    return {"mse": 1.0, "codebook": 1.0, "commit": 0.25, "align": cfg.align,
            "lpips": cfg.perceptual * min(1, (step + 1) / (cfg.ramp or 1)),
            "gan": cfg.gan * (step + 1 >= cfg.gan_from)}

def augment(x, u, cut=0.2, chance=0.5):
    """DiffAugment of images (B, C, h, h) by draws u (b, 10), b >= B: colour, shift, and a square cut out."""
    (B, _, h, _), u = x.shape, u[:len(x)]
    on, m, k, line = u[:, :3] < chance, round(h / 8), round(h * cut), torch.arange(h, device=x.device)
    a, b, c = (on[:, :1] * (u[:, 3:6] - 0.5))[..., None, None, None].unbind(1)           # each (B, 1, 1, 1)
    x = torch.lerp((x + a).mean(1, True), x + a, 1 + 2 * b)     # brightness, saturation      # (B, C, h, h)
    x = torch.lerp(x.mean((1, 2, 3), True), x, 1 + c)           # contrast                    # (B, C, h, h)
    shift = (m + on[:, 1:2] * ((u[:, 6:8] * (2 * m + 1)).floor() - m)).long()                       # (B, 2)
    rows, columns = (line + shift[..., None]).unbind(1)                                     # (B, h), (B, h)
    x = F.pad(x, [m] * 4)[torch.arange(B)[:, None, None], :, rows[:, :, None], columns[:, None]]
    past = line - ((u[:, 8:] * (h + 1 - k % 2)).long() - k // 2)[..., None]                      # (B, 2, h)
    y, z = ((past >= 0) & (past < k) & on[:, 2:, None]).unbind(1)                           # (B, h), (B, h)
    return x.permute(0, 3, 1, 2) * ~(y[:, :, None] & z[:, None])[:, None]                     # (B, C, h, h)

def loss_tokenizer(model, x, draws, weight, look=None, disc=None):
    """Stage 1 (D7) on images x (B, 3, R, R): value, terms; ids, reconstructions and targets for further use.
    draws: number n of decoded tokens; s and u (B, N) for Tokenizer; v (2 B, 10) for augment."""
    n, s, u, v = draws
    q, (ids, _, _), (codebook, commit) = model(x, s, u)
    # The encoder always sees the whole image; clean and corrected vectors have the same target.
    goal = degraded(x, n, model.cfg).repeat(len(q) // len(x), 1, 1, 1)                        # (b, C, r, r)
    recon = model.decode(q, n).to(x.dtype)                                                    # (b, C, r, r)
    terms = {"mse": F.mse_loss(recon, goal), "codebook": codebook, "commit": commit}
    if weight["lpips"]:                                         # our stand-in: LPIPS with weights of 0.1
        a, b = (F.normalize(look(image).to(x.dtype), dim=1) for image in (recon, goal))
        terms["lpips"] = 0.1 * (a - b).square().sum(1).mean()
    if weight["gan"]:
        terms["gan"] = -disc(look(augment(recon, v))).to(x.dtype).mean()
    if weight["align"]:                                         # Eq. (4), for the first clean token
        feature = look(x).mean((2, 3)).to(x.dtype)                                                  # (B, S)
        terms["align"] = -F.cosine_similarity(model.align(q[:len(x), 0]).to(x.dtype), feature).mean()
    return sum(weight[name] * term for name, term in terms.items()), terms, (ids, recon.detach(), goal)

def disc_logits(disc, look, recon, goal, v):
    """Logits of real and fake images, then of both under harder augmentation, by draws v (4, 2 B, 10)."""
    cases = zip((goal, recon, goal, recon), v, (0.2, 0.2, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0))
    return [disc(look(augment(x, a, cut, chance))).to(x.dtype) for x, a, cut, chance in cases]

def loss_disc(logits, means, weight):
    """The discriminator's value: hinge and LeCam, times the weight, and consistency under harder
    augmentation, without it (official code). The logits have moved their running `means` already."""
    real, fake, *hard = logits
    # LeCam charges real logits above the running mean of the fake ones, and fake ones below that of the real
    # ones: it holds back a discriminator that runs ahead of the decoder.
    hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    lecam = F.relu(real - means[1]).square().mean() + F.relu(means[0] - fake).square().mean()
    even = F.mse_loss(torch.cat(hard), torch.cat([real, fake]))
    return weight * (hinge + 0.001 * lecam) + 4 * (weight > 0) * even

def loss_ar(model, batch, draws):
    """Stage 2 (D10): mean cross-entropy over all N tokens. batch: triples (3, B, N) and labels (B,).
    draws: sequences (B,) that show a mistake and its correction, sequences (B,) that lose their label."""
    ((clean, given, label), y), (noisy, drop) = batch, draws
    # What it reads may hold a mistake, what it is to say never does: it learns to go on from one.
    read, goal = (torch.where(noisy[:, None], a, clean) for a in (given, label))
    logits = model(read, y.masked_fill(drop, model.classes)).flatten(0, 1)                          # (m, K)
    return F.cross_entropy(logits.to(model.table.weight.dtype), goal.flatten())

# --- Sampling ----------------------------------------------------------------
def filtered(logits, cfg):
    """Logits (B, K) under temperature, top-k and top-p; what is cut becomes -inf."""
    logits = logits.double() / cfg.temperature                                                      # (B, K)
    if cfg.top_k:
        least = logits.topk(min(cfg.top_k, logits.shape[1])).values[:, -1:]                         # (B, 1)
        logits = logits.masked_fill(logits < least, -math.inf)                                      # (B, K)
    if cfg.top_p < 1:
        order = logits.argsort(1)                                                                   # (B, K)
        cut = logits.softmax(1).gather(1, order).cumsum(1) <= 1 - cfg.top_p                         # (B, K)
        cut[:, -1] = False                                      # the likeliest always stays
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), -math.inf)        # (B, K)
    return logits

def spans(n, g, c):
    """The steps to n tokens as (start, end): c one by one, then groups. N tokens take c + (N - c)/g steps."""
    return [(i, i + 1) for i in range(min(n, c))] + [(i, i + g) for i in range(c, n, g)]

@torch.no_grad()
def generate(model, y, u, cfg, cached=True):
    """Ids (B, n) for labels y (B,), by uniform draws u (B, n): the tokens of a group are independent (D11).
    cached=False computes all positions again at every step, as the official code does: the definition."""
    N, g, guided = cfg.tokens, cfg.group, cfg.guidance != 1
    labels = torch.cat([y, torch.full_like(y, model.classes)]) if guided else y
    ids, past = torch.zeros(len(y), N, dtype=torch.long, device=y.device), [None] * len(model.blocks)
    for i, j in spans(u.shape[1], g, model.c):
        known = torch.cat([ids] * (1 + guided))                 # zeros from i on, which nothing sees yet
        logits = model.go_on(known, labels, i, j, past) if cached else model(known, labels)[:, i:j]
        if guided:
            logits, without = logits.chunk(2)                                     # (B, j-i, K), (B, j-i, K)
            scale = cfg.guidance * ((N - i + g) / (N + g) if cfg.gradual and i >= model.c else 1)
            logits = without + scale * (logits - without)                                      # (B, j-i, K)
        # The distribution function, inverted at u: the same draws give the same ids with and without a cache.
        mass = filtered(logits.flatten(0, 1), cfg).softmax(1).cumsum(1)                          # (rows, K)
        height = u[:, i:j].reshape(-1, 1).double() * mass[:, -1:]                                # (rows, 1)
        ids[:, i:j] = torch.searchsorted(mass, height, right=True).view(len(y), -1)
    return ids[:, :u.shape[1]]                                                                      # (B, n)

# --- Training ----------------------------------------------------------------
def teacher(cfg):
    """The frozen network behind the perceptual, adversarial and alignment losses, from images to S maps
    (B, S, h, w), or None; UserError. 'judge': a small classifier, untrained for a run of a few steps."""
    if cfg.stage == "ar" or not cfg.align + cfg.gan + cfg.perceptual:
        return None
    if cfg.teacher == "judge":
        split = open_split(cfg, "judge", 20_000 if cfg.steps >= 100 else 10)
        torch.manual_seed(0)
        judge = common.judge(split, "teacher") if cfg.steps >= 100 else common.Judge(3, 32, 1)
        network = judge.requires_grad_(False).to(common.device_of(cfg)).spatial
    else:
        network = frozen(cfg)
    # Official code differs: LPIPS gets small pictures as they are. Enlarged, all networks can read them.
    return lambda x: network(enlarged(x, cfg.size))

def frozen(cfg):
    """The network of the file --teacher, tried on one image and on two; UserError."""
    x = torch.linspace(-1, 1, 6 * cfg.size ** 2, device=common.device_of(cfg)).view(2, 3, cfg.size, cfg.size)
    with data.reading(cfg.teacher), torch.no_grad():
        script = cfg.teacher.endswith(".pt")
        network = torch.jit.load(cfg.teacher).eval() if script else torch.export.load(cfg.teacher).module()
        network = nn.Sequential(network).requires_grad_(False).to(x.device)
        state = copy.deepcopy(network.state_dict())
        one, two, again = network(x[:1]), network(x), network(x)
    still = all(map(torch.equal, (two, *state.values()), (again, *network.state_dict().values())))
    common.need(still, f"--teacher {cfg.teacher}: draws or learns when it is called: save it after .eval()")
    maps = one.ndim == 4 and len(two) == 2
    common.need(maps, f"--teacher {cfg.teacher}: gives {tuple(one.shape)}, not maps (B, S, h, w)")
    return network

def draw(dataset, cfg, step, stage, batch, device):
    """One step's images, their index, draws (B, 106 + N) and (3) for all: global, cut to this rank."""
    small = common.draws(cfg.seed, step, f"{stage} data")
    index = common.mine(torch.randint(len(dataset), (batch,), generator=small)).numpy()
    # An image: flip, zoom, centre (2); mistake, label (stage ar); noise (N); five augmentations (100).
    u, once = (torch.rand(*size, generator=small) for size in ((batch, cfg.tokens + 106), (3,)))
    x, u = dataset.pixels(index).to(u.dtype), common.mine(u)
    x = torch.where(((u[:, 0] < 0.5) & cfg.flip)[:, None, None, None], x.flip(-1), x)
    # stage ar enlarges by 1.1 where the tokenizer goes up to 1.25. our choice: it cuts anywhere, afresh at
    # every step, where the official code stores the tokens of ten crops.
    zoom = 1 + (cfg.zoom - 1) * (u[:, 1] if stage == "tokenizer" else torch.full_like(u[:, 1], 0.4))
    centre = (1 - 1 / zoom)[:, None, None] * (2 * u[:, 2:4, None] - 1)      # of a window of side 1/zoom
    window = F.affine_grid(torch.cat([torch.eye(2) / zoom[:, None, None], centre], 2), x.shape, False)
    x = F.grid_sample(x, window, align_corners=False) if cfg.zoom > 1 else x
    return x.to(device), index, u.to(device), once

def set_rate(opt, done, peak, warmup, low, end, turn=0.0):
    """Learning rate at a share of the steps: up from low * peak, down a cosine from `turn` to end * peak."""
    fall = end + (1 - end) * 0.5 * (1 + math.cos(math.pi * (done - turn) / (1 - turn)))
    for group in opt.param_groups:
        group["lr"] = peak * (low + (1 - low) * done / warmup if done < warmup else fall)

def begin(cfg, stage):
    """A stage's device, data and run. --steps, when given, overrides the stage's own number."""
    given = cfg.steps != PRESETS[cfg.preset].get("steps", Config.steps)
    run = common.Run(cfg, stage, not given and getattr(cfg, f"steps_{stage}") or cfg.steps)
    torch.manual_seed(common.draws(cfg.seed, 0, f"{stage} weights").initial_seed())
    return common.device_of(cfg), open_split(cfg, "train"), run

def load(cfg, path):
    """From any checkpoint: the tokenizer, and the averaged AR model or None; both frozen."""
    saved, device, ar = common.read_checkpoint(path, "detailflow"), common.device_of(cfg), None
    tokenizer = Tokenizer(cfg, len(saved["state"]["tokenizer"].get("align.4.bias", ()))).to(device)
    common.load_into({"tokenizer": tokenizer.requires_grad_(False)}, saved, path)
    if "ema" in saved["state"]:
        classes = len(saved["state"]["ema"]["label.weight"]) - (cfg.label_drop > 0)
        ar = AR(cfg, classes).to(device).requires_grad_(False).eval()
        common.load_into({"ema": ar}, saved, path)
    return tokenizer, ar

def by_blocks(cfg, function, *tensors):
    """function(*tensors) on blocks of 100 rows, computed on the device, returned on the CPU."""
    blocks, device = zip(*(tensor.split(100) for tensor in tensors)), common.device_of(cfg)
    return torch.cat([function(*(part.to(device) for part in block)).cpu() for block in blocks])

@torch.no_grad()
def renew_codes(model, dataset, cfg, step):
    """Our choice: at step --kmeans all codes become the spherical k-means of training images' latents; after
    as many steps again, codes that were not used meanwhile become such latents. Alike in all processes."""
    vq, draws = model.vq, common.draws(cfg.seed, step, "codes")
    index = torch.randint(len(dataset), (64 * cfg.codes // cfg.tokens + 1,), generator=draws)
    latents = by_blocks(cfg, lambda x: model.encode(x)[0], dataset.pixels(index.numpy()).to(vq.codes.dtype))
    u = F.normalize(latents.flatten(0, 1), dim=1).to(vq.codes.device)                               # (m, d)
    codes = u[torch.randperm(len(u), generator=draws)[:cfg.codes]]                                  # (K, d)
    for _ in range(20 if step == cfg.kmeans else 0):
        sums = torch.zeros_like(codes).index_add_(0, (u @ codes.T).argmax(1), u)                    # (K, d)
        codes = torch.where(sums.any(1, keepdim=True), F.normalize(sums, dim=1), codes)             # (K, d)
    old = (vq.use > 0) & (step > cfg.kmeans)                                                           # (K)
    vq.codes.copy_(common.average(torch.where(old[:, None], vq.codes, codes)))
    vq.use.zero_()

def train_tokenizer(cfg):
    """Stage 1: encoder, codebook and decoder, and their discriminator where --gan asks for one."""
    look = teacher(cfg)
    device, dataset, run = begin(cfg, "tokenizer")
    S = look(torch.zeros(1, 3, cfg.size, cfg.size, device=device)).shape[1] if look else 1
    model, disc = Tokenizer(cfg, S if cfg.align else 0).to(device), Discriminator(S).to(device)
    if cfg.tokenizer:                                           # or what of it there is, as SigLIP2's weights
        found = common.read_checkpoint(cfg.tokenizer, "detailflow")["state"]["tokenizer"]
        model.load_state_dict(found, strict=False)
    params = [*model.parameters(), *disc.parameters()]          # equal rates: one optimizer serves both
    opt = torch.optim.Adam(params, betas=(0.9, 0.95), fused=True)
    start = run.restore(tokenizer=model, disc=disc, opt=opt)
    for block in (*model.encoder.blocks, *model.decoder.blocks) if cfg.compile else ():
        block.compile()
    for step in run.steps(start):
        x, _, u, once = draw(dataset, cfg, step, "tokenizer", cfg.batch, device)
        model.vq.free = step < cfg.kmeans
        if cfg.kmeans and step and step % cfg.kmeans == 0 and step < max(0.7 * run.total, cfg.kmeans + 1):
            renew_codes(model, dataset, cfg, step)
        n = cfg.tokens if model.vq.free else prefix_length(*once[:2], cfg)
        s = noise_start(once[2], n, cfg) if cfg.correct and n > 1 and not model.vq.free else None
        v = u[:, -100:].unflatten(1, (5, 2, 10)).permute(1, 2, 0, 3).flatten(1, 2)              # (5, b, 10)
        weight, draws = weights(cfg, step), (n, s, u[:, 6:-100], v[0])
        set_rate(opt, step / run.total, cfg.lr * cfg.batch / 256, cfg.warmup, 0.1, 0.1)
        with common.autocast(cfg):
            value, terms, (ids, *pair) = loss_tokenizer(model, x, draws, weight, look, disc)
            if cfg.gan:
                # From step 1, though with weight 0 until --gan_from: LeCam's means are settled by then.
                # Official code differs: there each process has means of its own.
                logits = disc_logits(disc, look, *pair, v[1:])
                now = torch.stack([part.detach().mean() for part in logits[:2]])
                disc.means.lerp_(common.average(now), 0.001)
                terms["disc"] = loss_disc(logits, disc.means, weight["gan"])
        opt.zero_grad()
        value.backward(inputs=[*model.parameters()])            # none for the discriminator
        if cfg.gan:
            terms["disc"].backward()
        common.average_gradients(params)
        for network in (model, disc):
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        opt.step()
        use = common.average(torch.bincount(ids.flatten(), minlength=cfg.codes).to(value.dtype) / ids.numel())
        model.vq.use += use
        run.log(step, loss=value, codes=(use > 0).sum(), **terms)
        run.save(step)

def train_ar(cfg):
    """Stage 2: the AR model, on triples that the frozen tokenizer gives to cropped and flipped images."""
    tokenizer, _ = load(cfg, cfg.stage == "ar" and cfg.tokenizer or common.folder(cfg) / "tokenizer.pt")
    device, dataset, run = begin(cfg, "ar")
    model = AR(cfg, len(dataset.classes)).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    decay = [{"params": [p for p in model.parameters() if (p.ndim > 1) == matrix], "weight_decay": rate}
             for matrix, rate in ((True, 0.05), (False, 0.0))]
    opt = torch.optim.AdamW(decay, betas=(0.9, 0.95), fused=True)
    start = run.restore(model=model, tokenizer=tokenizer, ema=ema, opt=opt)
    for block in model.blocks if cfg.compile else ():
        block.compile()
    for step in run.steps(start):
        x, index, u, _ = draw(dataset, cfg, step, "ar", cfg.batch_ar or cfg.batch, device)
        y = torch.from_numpy(dataset.labels[index]).to(device)
        # D8: noise by (seed, image) replaces the official freezing at extraction; `shapes` draws by seed 0.
        v = torch.from_numpy(data.uniform(index[:, None], np.arange(1 + cfg.tokens), cfg.seed + 1)).to(u)
        set_rate(opt, step / run.total, cfg.lr_ar, 0.05, 0.005, 0.01, turn=0.05)
        common.seed_dropout(cfg.seed, step)
        with common.autocast(cfg):
            s = noise_start(v[:, 0], cfg.tokens, cfg) if cfg.correct and cfg.noisy else None
            _, triples, _ = tokenizer(x, s, v[:, 1:])
            value = loss_ar(model, (triples, y), (u[:, 4] < cfg.noisy, u[:, 5] < cfg.label_drop))
        opt.zero_grad()
        value.backward()
        common.average_gradients(model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        common.ema_update(ema, model, cfg.ema)
        run.log(step, loss=value)
        run.save(step)

STAGES = {"tokenizer": train_tokenizer, "ar": train_ar}
def train(cfg):
    """One stage, or both (--resume: a finished one is over at once); 1 where the demo missed its target."""
    for stage in [*STAGES] if cfg.stage == "all" else [cfg.stage]:
        STAGES[stage](cfg)
        common.barrier()                                        # the next stage reads what rank 0 writes
    return report(cfg, common.folder(cfg) / f"{stage}.pt", common.folder(cfg)) if common.rank() == 0 else 0

# --- Command line ------------------------------------------------------------
def encoded(tokenizer, cfg, x, s=None):
    """Triples (M, 3, N) of images; with s, of noise from token s on, drawn by --seed."""
    u = torch.rand(len(x), cfg.tokens, generator=common.draws(cfg.seed, 0, "noise")).to(x.dtype)
    return by_blocks(cfg, lambda a, b: tokenizer(a, s, b)[1].transpose(0, 1), x, u)

def decoded(tokenizer, cfg, ids):
    """Images (M, 3, r, r) of token prefixes (M, n), at the side that n tokens have."""
    return by_blocks(cfg, lambda i: tokenizer.decode(tokenizer.vq.values(i), i.shape[1]), ids)

def error(y, x):
    """Squared error of images y, enlarged to x, over the variance of x: 1 is the mean image, for all."""
    return ((enlarged(y, x.shape[-1]) - x).square().mean() / x.var(0).mean()).item()

def picture(path, columns, heads=(), rows=()):
    """Columns of images (M, 3, r, r), each at its own side, centred on white, as a PNG."""
    R = max(x.shape[-1] for x in columns)
    edge = [[(R - x.shape[-1]) // 2, (R - x.shape[-1] + 1) // 2] * 2 for x in columns]
    x = torch.stack([F.pad(x, pad, value=1.0) for x, pad in zip(columns, edge)], 1).flatten(0, 1)
    common.png(path, common.grid(common.to_uint8(x), len(columns), rows, heads, scale=max(1, 80 // R)))

def sweep(path, tokenizer, cfg, ids, names, **beside):
    """A row an image, a column a number of tokens, at its side; beside={head: f(last column)} adds some."""
    counts = [n for n in admissible(cfg) if n <= ids.shape[1]]
    counts = counts[::-(1 + len(counts) // 10)][::-1]           # ten or fewer, all tokens among them
    columns = [decoded(tokenizer, cfg, ids[:, :n]) for n in counts]
    heads = [f"n={n} {x.shape[-1]}px" for n, x in zip(counts, columns)]
    columns += [make(columns[-1]) for make in beside.values()]
    picture(path, columns, [*heads, *beside], names)

def show_noise(path, tokenizer, cfg, x, names):
    """correction.png and errors: a token or group is noise, the rest left as it was, or chosen again (D6)."""
    columns, heads = [x], ["image"]
    for s in [0, *range(cfg.causal, cfg.tokens - cfg.group, cfg.group)][:4]:
        clean, given, _ = encoded(tokenizer, cfg, x, s).unbind(1)
        end = s + (1 if s < cfg.causal else cfg.group)
        left = torch.cat([clean[:, :s], given[:, s:end], clean[:, end:]], 1)
        columns += [decoded(tokenizer, cfg, ids) for ids in (left, given)]
        heads += [f"noise {s + 1}-{end}", "corrected"]
        print(f"{path}: {heads[-2]}: error %.3f, corrected %.3f" % tuple(error(y, x) for y in columns[-2:]))
    picture(path, [column[:10] for column in columns], heads, names)

def report(cfg, path, where):
    """Pictures of a checkpoint and its figures, printed; 1 where the demo missed its target."""
    tokenizer, ar = load(cfg, path)
    if ar:
        chosen = parse_classes(cfg, ar.classes) or [*range(ar.classes)]
        y = torch.from_numpy(np.resize(chosen, cfg.count))
        u = torch.rand(cfg.count, kept(cfg), generator=common.draws(cfg.seed, 0, "sample"))
        drawn = by_blocks(cfg, lambda a, b: generate(ar, a, b, cfg), y, u)
        names = data.SHAPES if cfg.data == "shapes" else [f"class {k}" for k in range(ar.classes)]
        whole = cfg.keep == "all" and not cfg.sample      # the training images are here, and as large
        beside = {"train": lambda x: common.nearest(x, open_split(cfg, "train"))} if whole else {}
        sweep(where / "generation.png", tokenizer, cfg, drawn[:10], [names[k] for k in y[:10]], **beside)
    if ar and cfg.sample:
        return 0
    test = open_split(cfg, "test", cfg.count)
    x = test.pixels(np.arange(min(cfg.count, len(test)))).to(torch.get_default_dtype())
    common.need(len(x) > 1, f"--count {cfg.count} of {len(test)} test images: the error needs 2 or more")
    ids, names = encoded(tokenizer, cfg, x)[:, 0], [test.classes[label] for label in test.labels[:10]]
    sweep(where / "prefixes.png", tokenizer, cfg, ids[:10], names, image=lambda _: x[:10])
    if cfg.correct:
        show_noise(where / "correction.png", tokenizer, cfg, x, names)
    errors = {n: error(decoded(tokenizer, cfg, ids[:, :n]), x) for n in admissible(cfg)}
    print(f"{where}: error " + ", ".join(f"{e:.3f} (n={n})" for n, e in errors.items()), flush=True)
    found = {"error": errors[cfg.tokens], "codes": len(ids.unique())}
    if ar and cfg.steps >= 100:
        ruler = common.judge(open_split(cfg, "judge"), "ruler")
        found["accuracy"] = common.accuracy(ruler, enlarged(decoded(tokenizer, cfg, drawn), cfg.size), y)
    print(", ".join(f"{name} {value:.3g} (target {TARGET[name]})" for name, value in found.items()))
    missed = found.pop("error") > TARGET["error"] or any(found[name] < TARGET[name] for name in found)
    return int(cfg.preset == "demo" and common.is_preset(cfg, PRESETS) and missed)

def read_tokens(cfg, mark):
    """--decode: ids (M, n) cut to --keep; UserError where they are no tokens of the codebook `mark`."""
    path, counts = cfg.decode, admissible(cfg)
    with data.reading(path), np.load(path) as found:            # what --encode wrote
        ids, theirs = found["ids"].astype(np.int64)[:, :kept(cfg)], str(found["codebook"])
    common.need(theirs == mark, f"--decode {path}: another codebook, {theirs}; {cfg.sample} has {mark}")
    fits = ids.size and ids.shape[1] in counts and 0 <= ids.min() <= ids.max() < cfg.codes
    common.need(fits, f"--decode {path}: no ids (M, n) below {cfg.codes} with n in {counts}")
    return torch.from_numpy(ids)

def main(cfg):
    """Train, or use a checkpoint and touch nothing but <its run>/samples; returns the exit code."""
    if not cfg.sample:
        return train(cfg)
    (tokenizer, _), where = load(cfg, cfg.sample), Path(cfg.sample).parent / "samples"
    mark = hashlib.sha256(tokenizer.vq.codes.cpu().numpy().tobytes()).hexdigest()[:16]
    if cfg.encode:
        dataset = open_split(cfg, "train")
        ids = encoded(tokenizer, cfg, dataset.pixels(np.arange(len(dataset))))[:, 0]
        packed = dict(ids=ids.int().numpy(), labels=dataset.labels, codebook=mark)
        common.write_atomic(cfg.encode, lambda file: np.savez(file, **packed))
    elif cfg.decode:
        sweep(where / "decoded.png", tokenizer, cfg, read_tokens(cfg, mark)[:min(cfg.count, 100)], ())
    else:
        report(cfg, cfg.sample, where)
    print(f"written: {cfg.encode or where}")
    return 0

if __name__ == "__main__":
    common.launch(main, common.cli(Config, PRESETS, __doc__))
