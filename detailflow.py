"""DetailFlow: 1D Coarse-to-Fine Autoregressive Image Generation via Next-Detail Prediction (arXiv 2505.21473)

N tokens are an image, coarse to fine; the first n show it at R(n) pixels. A transformer writes g at a time:
    [patches | query 1 ... N] -> encoder -> codebook -> token 1 ... N        a query sees no later group
    [mask ... mask | token 1 ... n] -> decoder -> image of R(n) pixels       fewer tokens, fewer masks
    class -> token 1, ..., token g, then g tokens a step                     stop after any group and decode
Run:      python detailflow.py       demo, 3 minutes on one CPU core: error .041 to .049, accuracy .93 to .96
          python detailflow.py --preset DetailFlow-16 --data folder:imagenet --teacher siglip2.pt --gpus 8
          python detailflow.py --sample CHECKPOINT --classes 6 --keep 8      (--encode, --decode, --export F)
Faithful: D1 to D20 (our numbers), but for "our choice" and "differs". Scaled: the demo, which has Muon, too.
Left out: VGG, DINO, SigLIP2: one --teacher is all three; the encoder starts at random, or from --tokenizer.
Letters:  B images, b = B, or 2 B with the corrected ones (D7), C channels, R side, f patch, p patches a side,
          P all, N tokens, n kept, g group, c causal, K codes, d wide, D width, H heads, w = D/H, S features.
CUDA:     never run on CUDA.  Read in this order: resolution, VQ, Tokenizer, loss_tokenizer, AR, generate.
"""

import copy
import dataclasses
import math
from typing import ClassVar, Literal, NamedTuple

import common  # before torch: it says how torch's threads wait
import data

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# --- Configuration -----------------------------------------------------------

@dataclasses.dataclass
class Config:
    preset: str = "demo"            # where the values below start from
    data: str = "shapes"            # shapes, cifar10, npz:PATH or folder:PATH
    stage: Literal["all", "tokenizer", "ar"] = "all"    # what to train
    objects: int = 1                # in [1, 4]: most objects in a drawn image
    size: int = 256                 # >= 2: side R of the image
    flip: bool = True               # flip each image left-right with probability 1/2
    zoom: float = 1.25              # in [1, 10]: crop images enlarged by 1 to it; ar: 1 + 0.4 (zoom - 1)
    patch: int = 16                 # >= 1: patch side f
    tokens: int = 128               # >= 2: N, tokens an image
    group: int = 8                  # >= 1: g, tokens predicted in one step
    causal: int = 8                 # >= 1: c, how many tokens are predicted one by one at first
    codes: int = 8192               # >= 1: K, size of the codebook
    dim: int = 8                    # >= 1: d, width of a code
    alpha: float = 1.5              # in (0, 100]: exponent of the resolution law; 1: linear
    rounding: Literal["ceil", "nearest"] = "ceil"       # of R(n) to multiples of f: official code, or paper
    encoder: str = "1152x12x16x4304"                    # WIDTHxDEPTHxHEADSxMLP
    decoder: str = "768x12x12x3072"                     # the same of the decoder
    gpt: str = "1024x24x16x2816"    # the same of the AR transformer
    std: float = 0.0                # >= 0: our choice: s.d. of queries and positions; 0: .02, grids D^-1/2
    degrade: float = 0.2            # in [0, 1]: share of the steps that decode fewer than N tokens
    correct: bool = True            # self-correction, at every step
    near: int = 50                  # >= 1: a noisy token is one of so many codes, nearest to the latent
    kmeans: int = 0                 # >= 0: our choice: steps before k-means sets the codes; 0: paper
    perceptual: float = 1.0         # >= 0: weight of the perceptual loss
    ramp: int = 10_000              # >= 0: steps in which it rises from 0
    gan: float = 0.2                # >= 0: weight of the adversarial losses
    gan_from: int = 40_000          # >= 0: first step with them, counted from 1 (official code)
    align: float = 1.0              # >= 0: weight of the first token's alignment
    teacher: str = "judge"          # judge: a classifier trained here; or TorchScript .pt, torch.export .pt2
    tokenizer: str = ""             # checkpoint: stage ar builds on it, stage tokenizer starts from it
    init: str = ""                  # checkpoint whose weights this run starts from; classes may differ
    crops: int = 10                 # in [0, 10]: crops an image whose tokens are stored; 0: cut afresh
    noisy: float = 0.3              # in [0, 1]: share of AR sequences with a mistake and its correction
    label_dropout: float = 0.1      # in [0, 1]: share of them that lose their label; 0: no null label
    dropout: float = 0.1            # in [0, 1): of the AR model: embeddings, both residual branches
    steps: int = 1_251_000          # >= 1: optimizer steps of each stage; --steps overrides a preset's next 2
    steps_tokenizer: int = 0        # >= 0: of stage tokenizer; 0: --steps
    steps_ar: int = 0               # >= 0: of stage ar
    batch: int = 256                # >= 1: images a step, over all processes
    batch_ar: int = 0               # >= 0: of stage ar; 0: --batch
    accumulate: int = 1             # >= 1: equal parts of a process's batch, one after the other
    lr: float = 1e-4                # > 0: tokenizer's peak rate at 256 images a step (times batch / 256)
    warmup: float = 0.004           # in [0, 1]: share of its steps with a rising rate
    lr_ar: float = 1e-4             # > 0: peak rate of the AR model, whatever the batch
    muon: float = 0.0               # >= 0: our choice: Muon for blocks' matrices, at so many times the rate
    ema: float = 0.9999             # in [0, 1]: decay of the averaged AR weights, which are sampled from
    cfg_scale: float = 1.5          # >= 0: classifier-free guidance scale; 1 is none
    cfg_gradual: bool = False       # let it fall from group to group
    temperature: float = 1.0        # > 0: of the AR model's softmax
    top_k: int = 0                  # >= 0: sample from so many likeliest codes; 0: all
    top_p: float = 1.0              # in (0, 1]: sample from the likeliest codes of this mass; 1: all
    keep: str = "all"               # tokens generated or decoded: all, 24, or as 48px the side
    classes: str = "all"            # labels to generate, as 3,5; all is every class in turn
    count: int = 500                # >= 1: images measured; rows of a picture of --sample, at most 10
    encode: str = ""                # with --sample: write the tokens of --data to FILE.npz
    decode: str = ""                # with --sample: draw the tokens of FILE.npz
    export: str = ""                # with --sample: --count images to FILE.npz (ADM) or a folder of PNGs
    seed: int = 0                   # every random number is a function of (seed, step)
    gpus: int = 1                   # >= 1: processes, one a GPU; without GPUs they share the CPU
    device: str = "auto"            # auto, cpu or cuda
    bf16: bool = False              # bf16 autocast on CUDA; VQ, rotations and losses stay in fp32
    compile: bool = False           # torch.compile for the blocks; on a CPU minutes before the first step
    name: str = ""                  # run folder runs/detailflow/NAME; default: the preset
    resume: bool = False            # go on with runs/detailflow/NAME in its first unfinished stage
    sample: str = ""                # checkpoint to use
    out: str = ""                   # folder for what --sample writes; default: samples/ beside the checkpoint
    log: int = 100                  # >= 1: steps between log lines
    save: int = 5000                # >= 1: steps between checkpoints
    sampling: ClassVar = ("data", "cfg_scale", "cfg_gradual", "temperature",    # what --sample may change
                          "top_k", "top_p", "keep", "classes", "count", "encode", "decode", "export", "gpus")
SIZES = {"B": "768x12x12x2048", "L": "1024x24x16x2816", "XL": "1280x36x20x3584", "XXL": "1536x48x24x4096"}
PAPER = dict(data="folder:imagenet", teacher="siglip2.pt", bf16=True, steps_ar=1_501_200)   # epochs: 250; 300
PRESETS = {
    "demo": dict(size=16, flip=False, zoom=1.0, crops=1, patch=4, tokens=16, group=4, causal=4, codes=256,
                 near=32, encoder="96x2x4x192", decoder="96x3x4x192", gpt="96x4x4x256", std=0.5, kmeans=200,
                 perceptual=0, gan=0, align=0, steps=1800, steps_ar=1500, batch=16, batch_ar=32, lr=0.056,
                 warmup=0.05, lr_ar=4e-3, muon=3.0, dropout=0.0, ema=0.98, cfg_scale=2.0, temperature=0.8),
    "small": dict(data="cifar10", size=32, patch=4, tokens=32, group=4, causal=4, codes=1024,  # ours, not run
                  encoder="256x6x4x1024", decoder="256x6x4x1024", gpt="384x8x6x1024", std=0.5, kmeans=1000,
                  gan_from=10_000, steps=40_000, batch=128, lr=1e-3, warmup=0.05, lr_ar=3e-4, ema=0.999),
    "DetailFlow-16": PAPER | dict(cfg_scale=1.45),              # scales: README, batch_ar=512 for -16 and -32
    "DetailFlow-32": PAPER | dict(tokens=256), "DetailFlow-64": PAPER | dict(tokens=512, cfg_scale=1.32),
    **{f"DetailFlow-16-{size}": PAPER | dict(stage="ar", gpt=gpt) for size, gpt in SIZES.items()},
    "DetailFlow-16x16": PAPER | dict(tokens=256, group=16, causal=16)}              # groups of 16, Tab. 4

# --- Building blocks ---------------------------------------------------------

# D1  R(n) = R - (R - 1) ((N - n) / (N - 1))^alpha                    R(1) = 1, R(N) = R, Eq. (3)
# D2  target(n) = bicubic(area mean(X, detail_side(n)), image_side(n)), target(N) = X


def admissible(cfg):
    """The numbers n of tokens that can be decoded: 1 to c, a multiple of g, then the ends of later groups."""
    return [*range(1, cfg.causal + 1), *range(cfg.causal + cfg.group, cfg.tokens + 1, cfg.group)]


def resolution(n, cfg):
    """R(n) of D1: the side in pixels, a real number, of the image that n tokens describe.

    Above alpha = 1 the first tokens buy the most pixels, the last ones the fewest.
    """
    share_missing = (cfg.tokens - n) / (cfg.tokens - 1)
    return cfg.size - (cfg.size - 1) * share_missing ** cfg.alpha


def detail_side(n, cfg):
    """R(n) in whole pixels, cut as in the official code: the target of n tokens holds no finer detail."""
    return int(resolution(n, cfg))


def image_side(n, cfg):
    """The side r of the image that n tokens are decoded to: that of its detail, brought to a multiple of f.

    Official code differs from the paper's figures: it rounds up, they show the nearest multiple. The paper's
    sizes, n = 8: R(n) = 21.8, detail 21, image 32 (nearest: 16).
    """
    patches = detail_side(n, cfg) / cfg.patch
    if cfg.rounding == "ceil":
        return cfg.patch * math.ceil(patches)
    return cfg.patch * max(1, math.floor(patches + 0.5))


def make_target(x, n, cfg):
    """D2: what n tokens are to draw of images (B, C, R, R), without detail beyond R(n) pixels."""
    if n == cfg.tokens:
        return x
    blurred = F.interpolate(x, detail_side(n, cfg), mode="area")                              # (B, C, k, k)
    return F.interpolate(blurred, image_side(n, cfg), mode="bicubic")                         # (B, C, r, r)


def group_causal(n, g, c):
    """Whether a token (row) sees another (column), bool (n, n): those up to it, from c on its whole group.

    The AR model draws a group at once, so none of it comes first. Encoder and AR model share this mask.
    """
    i = torch.arange(n)
    row = i[:, None]                                                                                # (n, 1)
    return torch.where(row < c, i <= row, i // g <= row // g)                                       # (n, n)


def patchify(x, f):
    """Images (B, C, h, w) to row-major patches; inside a patch the order is row, column, channel."""
    x = x.unflatten(3, (-1, f)).unflatten(2, (-1, f))                                   # (B, C, h, f, w, f)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)                              # (B, P, f*f*C)


def unpatchify(patches, f):
    """The inverse, to a square image."""
    p = math.isqrt(patches.shape[1])
    x = patches.unflatten(2, (f, f, -1)).unflatten(1, (p, p))                           # (B, p, p, f, f, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)                           # (B, C, p*f, p*f)


def resize_grid(grid, p):
    """A learned grid of positions (a, a, D) for p x p patches."""
    x = F.interpolate(grid.permute(2, 0, 1)[None], p, mode="bilinear", antialias=True)        # (1, D, p, p)
    return x[0].flatten(1).T                                                                      # (p*p, D)


def gaussian(std, *shape):
    """A parameter drawn from N(0, std^2). Official code differs: it truncates, for positions of tokens."""
    return nn.Parameter(torch.randn(*shape) * std)


# D3  input number k of the AR model, the class not counted (D8), has row k // g and column k mod g
#      angle of pair i = row 10000^(-2 i / (w / 2)) in the first half of a head's pairs, column in the second


def rotary_embedding(N, g, w):
    """Cosines and sines (2, N, w/2) of D3, for heads of width w.

    Official code, as LlamaGen: for the class both are 0, and so its queries and keys are. As it stands in
    front, rows begin one position behind the groups of the mask.
    """
    k = torch.arange(N - 1)[:, None]
    rate = 10_000.0 ** (-torch.arange(0, w // 2, 2) / (w // 2))
    angle = torch.cat([k // g * rate, k % g * rate], 1)                                        # (m, w/2)
    return F.pad(torch.stack([angle.cos(), angle.sin()]), (0, 0, 1, 0))                         # (2, N, w/2)


def rotate(x, rotation):
    """Turn adjacent pairs of x (B, H, N, w) by their position's angles (2, N, w/2); never in bf16."""
    cos, sin = rotation
    a, b = x.unflatten(3, (-1, 2)).unbind(4)                                    # (B, H, N, k), (B, H, N, k)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], 4).flatten(3).type_as(x)     # (B, H, N, 2*k)


class Block(nn.Module):
    """Pre-norm block: a ViT's (LayerNorm, biases, GELU) or LlamaGen's (RMSNorm, SwiGLU, no biases)."""

    def __init__(self, D, H, m, llama=False, dropout=0.0):
        super().__init__()
        norm = nn.RMSNorm if llama else nn.LayerNorm
        eps = 1e-5 if llama else 1e-6
        self.heads = H
        self.dropout = nn.Dropout(dropout)
        self.norm1 = norm(D, eps)
        self.norm2 = norm(D, eps)
        self.qkv = nn.Linear(D, 3 * D, bias=not llama)
        self.out = nn.Linear(D, D, bias=not llama)
        self.up = nn.Linear(D, m, bias=not llama)
        self.down = nn.Linear(m, D, bias=not llama)
        self.gate = nn.Linear(D, m, bias=False) if llama else None
        initialise(self, llama)

    def forward(self, h, mask=None, kv_cache=None, rotation=None):
        """Outputs for h (B, N, D); keys and values, behind those of earlier positions in kv_cache."""
        qkv = self.qkv(self.norm1(h)).unflatten(2, (3, self.heads, -1))                    # (B, N, 3, H, w)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                             # each (B, H, N, w)
        if rotation is not None:
            q = rotate(q, rotation)                                                           # (B, H, N, w)
            k = rotate(k, rotation)                                                           # (B, H, N, w)
        if kv_cache is not None:
            k = torch.cat([kv_cache[0], k], 2)                                                # (B, H, L, w)
            v = torch.cat([kv_cache[1], v], 2)                                                # (B, H, L, w)
        y = F.scaled_dot_product_attention(q, k, v, mask)                                     # (B, H, N, w)
        h = h + self.dropout(self.out(y.transpose(1, 2).flatten(2)))                             # (B, N, D)
        x = self.norm2(h)                                                                        # (B, N, D)
        up = self.up(x)                                                                          # (B, N, m)
        y = F.silu(self.gate(x)) * up if self.gate else F.gelu(up, approximate="tanh")           # (B, N, m)
        return h + self.dropout(self.down(y)), (k, v)                              # (B, N, D), (B, H, L, w)


def initialise(module, llama):
    """Matrices N(0, 0.02^2) (LlamaGen) or Xavier-uniform (ViT: query, key, value apart); zero biases."""
    for name, p in module.named_parameters():
        if llama and p.ndim > 1:
            nn.init.normal_(p, std=0.02)
        elif p.ndim > 1:
            rows = len(p) // 3 if name == "qkv.weight" else len(p)
            for part in p.detach().split(rows):
                nn.init.xavier_uniform_(part)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


# --- Model -------------------------------------------------------------------

# D4  u = h / |h|, e_k = E_k / |E_k|, id = argmin_k |u - e_k|, q = u + sg(e_id - u)        sg: stop-gradient
#     L_codebook = mean (e_id - sg u)^2      moves the code to the latent
#     L_commit = mean (sg e_id - u)^2        the latent to the code: an equal number; its weight in D9 is 0.25


class VQ(nn.Module):
    """Codebook of K vectors; latents and codes are normalised whenever they are used (D4)."""

    def __init__(self, K, d):
        super().__init__()
        self.codes = nn.Parameter(F.normalize(torch.empty(K, d).uniform_(-1 / K, 1 / K), dim=1))
        self.register_buffer("use", torch.zeros(K))             # shares of the picks since the last reset
        self.bypass = False                                     # before --kmeans: normalised, not quantised

    def vectors(self, ids):
        """Unit vectors (..., d) of ids (...)."""
        return F.normalize(self.codes, dim=1)[ids]

    def nearest(self, h, k):
        """The k nearest codes of latents (B, N, d), in order; |u - e|^2 is 2 - 2 u e."""
        with torch.autocast(h.device.type, enabled=False):      # bf16 would pick others
            u = F.normalize(h.to(self.codes.dtype), dim=2)                                       # (B, N, d)
            return (u @ F.normalize(self.codes, dim=1).T).topk(k, 2).indices                     # (B, N, k)

    def forward(self, h):
        """Latents (B, N, d) to vectors q, ids and the losses (L_codebook, L_commit) of each token."""
        ids = self.nearest(h.detach(), 1).squeeze(2)                                                # (B, N)
        u = F.normalize(h.to(self.codes.dtype), dim=2)                                           # (B, N, d)
        if self.bypass:
            return u, ids, u.new_zeros(2, *ids.shape)                         # (B, N, d), (B, N), (2, B, N)
        e = self.vectors(ids)                                                                    # (B, N, d)
        losses = torch.stack([(e - u.detach()).square(), (e.detach() - u).square()]).mean(3)     # (2, B, N)
        # Straight-through: the decoder's gradient reaches the latent as if nothing had been exchanged.
        return u + (e - u).detach(), ids, losses                              # (B, N, d), (B, N), (2, B, N)


def parse_network(text):
    """The numbers (width, depth, heads, MLP width) of "WIDTHxDEPTHxHEADSxMLP"; UserError."""
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
    common.require(len(numbers) == 4 and all(numbers), f"{text}: write a network as WIDTHxDEPTHxHEADSxMLP")
    width, _, heads, _ = numbers
    common.require(width % (4 * heads) == 0, f"{text}: the width must be a multiple of 4 x heads")
    return numbers


# D5  latents = ViT[patches + grid, queries + positions]; patches see the patches, queries see them and, by
#     group_causal, the queries. So a prefix of the queries gives a prefix of the latents.


class Encoder(nn.Module):
    """ViT over patches and, behind them, latent queries; the patches never see those (D5)."""

    def __init__(self, cfg):
        super().__init__()
        D, depth, H, m = parse_network(cfg.encoder)
        N = cfg.tokens
        p = cfg.size // cfg.patch
        std = cfg.std or 0.02
        self.f = cfg.patch
        self.P = p * p
        self.embed = nn.Linear(3 * cfg.patch ** 2, D)
        self.norm = nn.LayerNorm(D, 1e-6)
        self.grid = gaussian(cfg.std or D ** -0.5, p, p, D)
        self.queries = gaussian(std, N, D)
        self.refined = gaussian(std, N, D)                      # queries of a second pass (D7)
        self.positions = gaussian(std, N, D)                    # for both kinds of queries
        self.blocks = nn.ModuleList(Block(D, H, m) for _ in range(depth))
        # Rows see columns: all see the patches, queries those queries that group_causal allows.
        mask = torch.ones(self.P + N, self.P + N, dtype=torch.bool)
        mask[:, self.P:] = False
        mask[self.P:, self.P:] = group_causal(N, cfg.group, cfg.causal)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x, z, kv_cache=None):
        """Images (B, 3, R, R) and queries z (1 or B, n, D) to outputs of the queries (B, n, D).

        Also a list, an entry a block, of the patches' keys and values. With it a second pass leaves the
        patches out: exact, as they see no queries.
        """
        end = self.P + z.shape[1]
        if kv_cache is None:
            patches = self.embed(patchify(x, self.f)) + self.grid.flatten(0, 1)                  # (B, P, D)
            h = torch.cat([patches, z.expand(len(x), -1, -1)], 1)                                # (B, L, D)
            mask = self.mask[:end, :end]                                                            # (L, L)
            kv_cache = [None] * len(self.blocks)
        else:
            h = z                                                                                # (B, n, D)
            mask = self.mask[self.P:end, :end]                                                      # (n, L)
        kept = []
        for block, cache in zip(self.blocks, kv_cache):
            h, kv = block(h, mask, cache)                                          # (B, m, D), (B, H, L, w)
            kept.append([part[:, :, :self.P] for part in kv])
        return self.norm(h[:, -z.shape[1]:]), kept                                 # (B, n, D), (B, H, P, w)


# D6  x^ = Linear(ViT[mask + grid(r), read(q[:n]) + positions[:n]]) on the mask tokens, r = image_side(n)


class Decoder(nn.Module):
    """ViT over n tokens and one mask token for each patch of the image to be drawn; all see all (D6).

    So one decoder draws every side: fewer masks, at positions resampled from one learned grid.
    """

    def __init__(self, cfg):
        super().__init__()
        D, depth, H, m = parse_network(cfg.decoder)
        p = cfg.size // cfg.patch
        self.f = cfg.patch
        self.norm = nn.LayerNorm(D, 1e-6)
        self.head = nn.Linear(D, 3 * cfg.patch ** 2)
        self.grid = gaussian(cfg.std or D ** -0.5, p, p, D)
        self.mask = gaussian(0.02, D)
        self.positions = gaussian(cfg.std or 0.02, cfg.tokens, D)
        self.blocks = nn.ModuleList(Block(D, H, m) for _ in range(depth))

    def forward(self, z, r):
        """Tokens (B, n, D) to images of side r: nothing but the number and places of the masks tells it."""
        z = z + self.positions[:z.shape[1]]                                                      # (B, n, D)
        masks = self.mask + resize_grid(self.grid, r // self.f)                                     # (P, D)
        h = torch.cat([masks.expand(len(z), -1, -1), z], 1)                                      # (B, L, D)
        for block in self.blocks:
            h, _ = block(h)                                                        # (B, L, D), (B, H, L, w)
        return unpatchify(self.head(self.norm(h[:, :len(masks)])), self.f)                    # (B, C, r, r)


# D7  tokens s to e - 1, from 0, are noise: one of the first c, or a group; Sec. 3.3
#     corrupt    noise[i] = one of the `near` codes nearest to latent i;  prefix = sg [q[:s], noise[s:e]]
#     re-encode  q' = VQ(enc(X; [refine(prefix), refined[e:]] + positions))     weights of the first pass
#     merge      [prefix, q'[e:]]: the tokens from e on know of the mistake and make up for it
#     losses     (N L + (N - e) L') / (2 N - e)      L: mean over N tokens; L': over those of q' from e on


class Triple(NamedTuple):
    """Three forms of a sequence of ids, each (B, N); equal where nothing was corrupted."""

    clean: torch.Tensor             # what the first pass chose
    given: torch.Tensor             # what an AR model reads: noise, and behind it tokens that make up for it
    target: torch.Tensor            # what it is to predict: the same, with clean ids in place of the noise


class Tokenizer(nn.Module):
    """Encoder, codebook, decoder; and for training alone the head that predicts S features of a teacher."""

    def __init__(self, cfg, S=0):
        super().__init__()
        d = cfg.dim
        D = parse_network(cfg.encoder)[0]
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.vq = VQ(cfg.codes, d)
        self.quant = nn.Linear(D, d)                            # from the encoder to the codebook
        self.refine = nn.Linear(d, D)                           # and back, for a second pass
        self.read = nn.Linear(d, parse_network(cfg.decoder)[0])     # from the codebook to the decoder
        self.align = nn.Identity()
        if S:
            self.align = nn.Sequential(nn.Linear(d, 1024), nn.SiLU(), nn.Linear(1024, 1024), nn.SiLU(),
                                       nn.Linear(1024, S))

    def encode(self, x):
        """Images (B, 3, R, R) to latents (B, N, d), before the codebook; and the cache of the patches."""
        h, kv_cache = self.encoder(x, (self.encoder.queries + self.encoder.positions)[None])
        return self.quant(h), kv_cache                                             # (B, N, d), (B, H, P, w)

    def decode(self, q):
        """Vectors of the first n tokens (B, n, d) to images of the side that n tokens have."""
        return self.decoder(self.read(q), image_side(q.shape[1], self.cfg))                   # (B, C, r, r)

    def tokenize(self, x):
        """Images (B, 3, R, R) to vectors (B, N, d), ids (B, N) and the codebook and commitment losses (2)."""
        q, ids, losses = self.vq(self.encode(x)[0])                           # (B, N, d), (B, N), (2, B, N)
        return q, ids, losses.mean((1, 2))                                         # (B, N, d), (B, N), (2)

    def correct(self, x, s, u):
        """D7 on images (B, 3, R, R): noise from s on, (B,) or one for all, chosen by uniform draws u (B, N).

        Returns vectors (2 B, N, d), clean ones, then corrected ones; a Triple; the losses as tokenize does.
        """
        cfg = self.cfg
        h, kv_cache = self.encode(x)                                               # (B, N, d), (B, H, P, w)
        q, ids, losses = self.vq(h)                                           # (B, N, d), (B, N), (2, B, N)
        place = torch.arange(cfg.tokens, device=x.device)                                              # (N)
        s = torch.as_tensor(s, device=x.device).expand(len(x))[:, None]                             # (B, 1)
        e = s + torch.where(s < cfg.causal, 1, cfg.group)                                           # (B, 1)
        late = place >= e                                                                           # (B, N)
        noisy = (place >= s) & ~late                                                                # (B, N)
        # corrupt. The nearest code is the clean token itself. Official code: clean ones ahead are constants.
        near = self.vq.nearest(h.detach(), cfg.near)                                             # (B, N, k)
        noise = near.gather(2, (u * cfg.near).long()[..., None]).squeeze(2)                         # (B, N)
        prefix = torch.where(noisy[..., None], self.vq.vectors(noise), q).detach()               # (B, N, d)
        # re-encode
        z = torch.where(late[..., None], self.encoder.refined, self.refine(prefix))              # (B, N, D)
        h2, _ = self.encoder(x, z + self.encoder.positions, kv_cache)              # (B, N, D), (B, H, P, w)
        q2, ids2, losses2 = self.vq(self.quant(h2))                           # (B, N, d), (B, N), (2, B, N)
        # merge. The two passes chose N and N - e tokens; the losses are means over all of these.
        q2 = torch.where(late[..., None], q2, prefix)                                            # (B, N, d)
        target = torch.where(late, ids2, ids)                                                       # (B, N)
        triple = Triple(ids, torch.where(noisy, noise, target), target)                     # each (B, N)
        total = losses.sum((1, 2)) + (losses2 * late).sum((1, 2))                                      # (2)
        losses = total / (late.numel() + late.sum())                                                   # (2)
        return torch.cat([q, q2]), triple, losses                                # (2*B, N, d), (B, N), (2)


# D8  reads     class  1  2  3  4  m  m  m  5  6  7  8          N = 12, c = g = 4: position p, from 0,
#     predicts      1  2  3  4  5  6  7  8  9 10 11 12          predicts token p + 1; group_causal mask
#     The learned masks m stand there once, for the first parallel group; behind it token i asks for i + g.
#     The last g tokens are never read.


class AR(nn.Module):
    """Class-conditional transformer in LlamaGen's form; it predicts g tokens a step with one head (D8)."""

    def __init__(self, cfg, classes):
        super().__init__()
        D, depth, H, m = parse_network(cfg.gpt)
        self.g = cfg.group
        self.c = cfg.causal
        self.classes = classes                                  # also the null label, where there is one
        self.table = nn.Embedding(cfg.codes, D)
        self.label = nn.Embedding(classes + 1 if cfg.label_dropout else classes, D)
        self.blocks = nn.ModuleList(Block(D, H, m, True, cfg.dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(D, 1e-5)
        self.head = nn.Linear(D, cfg.codes, bias=False)
        self.dropout = nn.Dropout(cfg.dropout)
        initialise(self, llama=True)
        nn.init.zeros_(self.head.weight)
        self.masks = gaussian(1.0, self.g - 1, D)               # official code: N(0, 1), unlike the rest
        self.register_buffer("rotation", rotary_embedding(cfg.tokens, self.g, D // H), persistent=False)
        self.register_buffer("mask", group_causal(cfg.tokens, self.g, self.c), persistent=False)

    def embed(self, ids, y):
        """The upper row of D8 for ids (B, N) and labels y (B,). With c = N no group is parallel: masks go."""
        B, N = ids.shape
        z = self.table(ids)                                                                      # (B, N, D)
        start = self.label(y)[:, None]                                                           # (B, 1, D)
        masks = self.masks.expand(B, -1, -1)                                                     # (B, m, D)
        h = torch.cat([start, z[:, :self.c], masks, z[:, self.c:N - self.g]], 1)                 # (B, L, D)
        return self.dropout(h[:, :N])                                                            # (B, N, D)

    def decode_step(self, ids, y, i, j, kv_cache):
        """Logits of tokens i+1 to j, behind the keys and values of positions before i; the cache grows."""
        h = self.embed(ids, y)[:, i:j]                                                           # (B, n, D)
        for b, block in enumerate(self.blocks):
            h, kv_cache[b] = block(h, self.mask[i:j, :j], kv_cache[b], self.rotation[:, i:j])
        return self.head(self.norm(h))                                                           # (B, n, K)

    def forward(self, ids, y):
        """Logits of all tokens, given those before their groups: the plain form, without a cache."""
        return self.decode_step(ids, y, 0, ids.shape[1], [None] * len(self.blocks))              # (B, N, K)


def make_discriminator(S):
    """From the teacher's S maps to one logit a place, large for real images; `means` are D15's running means.

    Official code differs: five depths of DINO at 224 pixels, crops of larger images, and on each depth a head
    with spectral norm, SyncBN and circular convolutions; here it is the teacher's one depth.
    """
    disc = nn.Sequential(nn.Conv2d(S, S, 1), nn.LeakyReLU(0.2), nn.Conv2d(S, 1, 1))
    disc.register_buffer("means", torch.zeros(2))               # of real and of fake images
    return disc


# --- Objective ---------------------------------------------------------------

# D9  L = MSE + w_lpips LPIPS + L_codebook + 0.25 L_commit + w_gan L_gan + w_align L_align
#     MSE, LPIPS and L_gan are over clean and corrected images alike; both have the target of D2
# D10  L_align = -cos(MLP(q[0]), mean over places of the teacher's maps of X), q[0] clean, Eq. (4)
# D11  w_lpips = min(1, step / 10,000), w_gan = 0.2 if step >= 40,000 else 0      steps from 1 (official code)


def weights(cfg, step):
    """The weights of the losses (D11). `step` counts from 0, here as everywhere in this file."""
    lpips = cfg.perceptual * min(1, (step + 1) / max(cfg.ramp, 1))
    gan = cfg.gan if step + 1 >= cfg.gan_from else 0.0
    return {"mse": 1.0, "codebook": 1.0, "commit": 0.25, "align": cfg.align, "lpips": lpips, "gan": gan}


# D12  n = N with probability 1 - degrade, else
#      n = t if t <= c else g ceil(t / g)          t uniform in 1 ... N - g
# D13  s = t if t < c else g floor(t / g)          t uniform in 0 ... n - 1 if n <= c, else in 0 ... n - g - 1


def prefix_length(u, v, cfg):
    """D12: two uniform draws to the number n of tokens that a step decodes."""
    if u >= cfg.degrade:
        return cfg.tokens
    t = 1 + int(v * (cfg.tokens - cfg.group))
    return t if t <= cfg.causal else math.ceil(t / cfg.group) * cfg.group


def noise_start(u, n, cfg):
    """D13: uniform draws to first noisy positions s among n > 1 tokens.

    Official code: of n <= c tokens the last may be hit, past correction.
    """
    t = (u * (n if n <= cfg.causal else n - cfg.group)).long()
    return torch.where(t < cfg.causal, t, t // cfg.group * cfg.group)


def enlarge(x, r):
    """Images (B, C, h, h) at side r, where they are smaller."""
    return F.interpolate(x, r, mode="bicubic") if x.shape[-1] < r else x


# D14  DiffAugment: colour, shift by up to 1/8 of the side, a black square; each with probability `chance`


def augment(x, u, cut=0.2, chance=0.5):
    """D14 on images (B, C, h, h), the square's side being cut * h, by draws (B, 2, 10).

    B / 2 draws do where the images are clean and corrected ones: the second ones are of the corrected.
    """
    B, _, h, _ = x.shape
    u = u.transpose(0, 1).flatten(0, 1)[:B]                                                        # (B, 10)
    whether, tint, shift, corner = u.split([3, 3, 2, 2], 1)                # (B, 3), (B, 3), (B, 2), (B, 2)
    coloured, shifted, holed = (whether < chance)[..., None].unbind(1)                          # each (B, 1)
    tint = torch.where(coloured, tint - 0.5, 0)                                                     # (B, 3)
    brightness, saturation, contrast = tint[..., None, None, None].unbind(1)             # each (B, 1, 1, 1)
    # colour
    x = x + brightness                                                                        # (B, C, h, h)
    x = torch.lerp(x.mean(1, keepdim=True), x, 1 + 2 * saturation)                            # (B, C, h, h)
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, 1 + contrast)                          # (B, C, h, h)
    # shift: rows and columns of the image with a black margin around it
    line = torch.arange(h, device=x.device)                                                            # (h)
    margin = round(h / 8)
    shift = torch.where(shifted, (shift * (2 * margin + 1)).long(), margin)                         # (B, 2)
    rows, columns = (line + shift[..., None]).unbind(1)                                     # (B, h), (B, h)
    image = torch.arange(B, device=x.device)[:, None, None]                                      # (B, 1, 1)
    x = F.pad(x, [margin] * 4)[image, :, rows[:, :, None], columns[:, None]]    # puts C last # (B, h, h, C)
    # square
    side = round(h * cut)
    corner = (corner * (h + 1 - side % 2)).long() - side // 2                                       # (B, 2)
    offset = line - corner[..., None]                                                            # (B, 2, h)
    inside = (offset >= 0) & (offset < side) & holed[..., None]                                  # (B, 2, h)
    hole = inside[:, 0, :, None] & inside[:, 1, None]                                            # (B, h, h)
    return (x * ~hole[..., None]).permute(0, 3, 1, 2)                                         # (B, C, h, h)


def loss_tokenizer(model, x, draws, weight, teacher=None, disc=None):
    """D9 on images x (B, 3, R, R), by draws of draw_tokenizer.

    Returns value, losses, and (ids, recon, target) for the discriminator and the count of codes in use.
    """
    n = draws["n"]
    # The encoder always sees the whole image; clean and corrected vectors have the same target.
    target = make_target(x, n, model.cfg)                                                     # (B, C, r, r)
    if draws["s"] is None:
        q, ids, (codebook, commit) = model.tokenize(x)
    else:
        q, (ids, _, _), (codebook, commit) = model.correct(x, draws["s"], draws["noise"])
        target = torch.cat([target, target])                                                # (2*B, C, r, r)
    recon = model.decode(q[:, :n]).to(x.dtype)                                                # (b, C, r, r)
    losses = {"mse": F.mse_loss(recon, target), "codebook": codebook, "commit": commit}
    if weight["lpips"]:                                     # our stand-in: one layer, its channels weigh 0.1
        a, b = (F.normalize(teacher(image).to(x.dtype), dim=1) for image in (recon, target))
        losses["lpips"] = 0.1 * (a - b).square().sum(1).mean()
    if weight["gan"]:
        losses["gan"] = -disc(teacher(augment(recon, draws["augment"][:, 0]))).to(x.dtype).mean()
    if weight["align"]:                                         # D10
        first = model.align(q[:len(x), 0]).to(x.dtype)                                              # (B, S)
        feature = teacher(x).mean((2, 3)).to(x.dtype)                                               # (B, S)
        losses["align"] = -F.cosine_similarity(first, feature).mean()
    value = sum(weight[name] * loss for name, loss in losses.items())
    return value, losses, (ids, recon.detach(), target)


# D15  L_D = w_gan (hinge + 0.001 LeCam) + (4 if w_gan > 0 else 0) mean (D - D')^2
#      D' under harder augmentation (D14)
#      hinge = (mean relu(1 - D_real) + mean relu(1 + D_fake)) / 2
#      LeCam = mean relu(D_real - mean_fake)^2 + mean relu(mean_real - D_fake)^2, running means, decay 0.999


def disc_logits(disc, teacher, recon, target, draws):
    """Logits of real and of fake images, then of both under harder augmentation, by draws (B, 4, 2, 10)."""
    logits = []
    for cut, chance in ((0.2, 0.5), (0.5, 1.0)):
        for x in (target, recon):
            shown = augment(x, draws[:, len(logits)], cut, chance)                            # (b, C, r, r)
            logits.append(disc(teacher(shown)).to(x.dtype))
    return logits


def loss_disc(logits, means, weight):
    """D15 of disc_logits. weight: w_gan, which turns consistency on but does not scale it (official code).

    LeCam charges real logits above the running mean of the fake ones, and fake ones below that of the real
    ones: it holds back a discriminator that runs ahead of the decoder. The means include these logits.
    """
    real, fake, *hard = logits
    hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    lecam = F.relu(real - means[1]).square().mean() + F.relu(means[0] - fake).square().mean()
    consistency = F.mse_loss(torch.cat(hard), torch.cat([real, fake]))
    return weight * (hinge + 0.001 * lecam) + (4 if weight else 0) * consistency


# D16  mean cross-entropy over all N tokens; 30 % of the sequences are read as `given` and predict `target`


def loss_ar(model, batch, draws):
    """D16. batch: a Triple, labels (B,); draws: which sequences (B,) show a mistake, which drop their label.

    What the model reads may hold a mistake, what it is to say never does: it learns to go on from one.
    """
    triple, y = batch
    noisy = draws["noisy"][:, None]                                                                 # (B, 1)
    given = torch.where(noisy, triple.given, triple.clean)                                          # (B, N)
    target = torch.where(noisy, triple.target, triple.clean)                                        # (B, N)
    logits = model(given, y.masked_fill(draws["drop"], model.classes))                           # (B, N, K)
    return F.cross_entropy(logits.flatten(0, 1).to(model.head.weight.dtype), target.flatten()), {}


# --- Sampling ----------------------------------------------------------------

# D17  c tokens one by one, then groups of g: N tokens take c + (N - c) / g steps
# D18  logits = null + scale (cond - null)         scale = cfg_scale
#      with --cfg_gradual, in a step behind i >= c tokens: scale = cfg_scale (N - i + g) / (N + g)


def spans(n, g, c):
    """The steps to n tokens (D17) as (start, end)."""
    for i in range(min(n, c)):
        yield i, i + 1
    for i in range(c, n, g):
        yield i, i + g


def guidance(i, cfg):
    """The scale of D18 for the step behind i tokens."""
    if cfg.cfg_gradual and i >= cfg.causal:
        return cfg.cfg_scale * ((cfg.tokens - i + cfg.group) / (cfg.tokens + cfg.group))
    return cfg.cfg_scale


@torch.no_grad()
def generate(model, y, u, cfg, cached=True):
    """Ids (B, n) for labels y (B,), by uniform draws u (B, n): the tokens of a group are independent (D17).

    cached=False computes all positions again at every step, as the official code does: the definition.
    """
    B, n = u.shape
    guided = cfg.cfg_scale != 1
    if guided:
        y = torch.cat([y, torch.full_like(y, model.classes)])                                          # (b)
    ids = torch.zeros(B, cfg.tokens, dtype=torch.long, device=y.device)                             # (B, N)
    kv_cache = [None] * len(model.blocks)
    for i, j in spans(n, cfg.group, cfg.causal):
        known = ids.repeat(len(y) // B, 1)                      # zeros from i on, which nothing sees yet
        if cached:
            logits = model.decode_step(known, y, i, j, kv_cache)                                 # (b, j-i, K)
        else:
            logits = model(known, y)[:, i:j]                                                     # (b, j-i, K)
        if guided:
            cond, null = logits.chunk(2)                                            # (B, j-i, K), (B, j-i, K)
            logits = null + guidance(i, cfg) * (cond - null)                                     # (B, j-i, K)
        # A distribution and a draw a token: the same draws give the same ids with and without a cache.
        rows = common.filter_logits(logits.flatten(0, 1), cfg.temperature, cfg.top_k, cfg.top_p)
        ids[:, i:j] = common.invert_distribution(rows, u[:, i:j].flatten()).view(B, -1)
    return ids[:, :n]                                                                               # (B, n)


# --- Training ----------------------------------------------------------------


def open_teacher(cfg):
    """The frozen network behind the perceptual, adversarial and alignment losses, and S, how many features.

    A function of images to maps (B, S, h, w); None where those losses are off. 'judge': a small classifier,
    untrained in a run of a few steps. UserError where a file is no such network, or draws or learns.
    """
    if cfg.stage == "ar" or cfg.align + cfg.gan + cfg.perceptual == 0:
        return None, 1
    device = common.device_of(cfg)
    if cfg.teacher != "judge":
        network = common.load_teacher(cfg.teacher, 3, cfg.size)
    elif cfg.steps >= 100:
        network = common.judge(open_split(cfg, "judge"), "teacher").to(device).spatial
    else:
        torch.manual_seed(0)
        network = common.Judge(3, 32, 1).requires_grad_(False).to(device).spatial

    def teacher(x):
        # Official code differs: LPIPS gets small pictures as they are. A file may read no side but --size.
        return network(enlarge(x, cfg.size))

    return teacher, teacher(torch.zeros(1, 3, cfg.size, cfg.size, device=device)).shape[1]


def draw_images(dataset, cfg, step, stage, batch):
    """One step's index of images and its random draws in [0, 1) by name.

    They are drawn for the global batch and cut to this rank; the last three are one for all images.
    """
    generator = common.make_generator(cfg.seed, step, f"{stage} data")
    index = common.shard(torch.randint(len(dataset), (batch,), generator=generator)).numpy()
    widths = dict(flip=1, zoom=1, corner=2, noisy=1, drop=1, noise=cfg.tokens, augment=5 * 2 * 10)
    u = common.shard(torch.rand(batch, sum(widths.values()), generator=generator))
    draws = dict(zip(widths, u.split([*widths.values()], 1)))                   # each of its width, (B, k)
    draws |= zip(("degrade", "length", "start"), torch.rand(3, generator=generator))
    return index, draws


def cut_images(dataset, cfg, index, mirrored, zoom, corner, device):
    """Images `index`, flipped where mirrored (B,), windows of side R / zoom (B, 1) at corner (B, 2) enlarged.

    They travel as bytes; all else is done on the device.
    """
    mirrored, zoom, corner = (u.to(device) for u in (mirrored, zoom, corner))
    x = dataset.pixels(index, device).to(corner.dtype)                                        # (B, C, R, R)
    if cfg.flip:
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)                         # (B, C, R, R)
    if cfg.zoom > 1:
        x = crop(x, zoom, corner)                                                             # (B, C, R, R)
    return x


def crop(x, zoom, corner):
    """Windows of side h / zoom (B, 1) of images (B, C, h, h), at corner (B, 2) from 0 to 1, enlarged to h."""
    h = x.shape[-1]
    line = (2 * torch.arange(h, device=x.device) + 1) / h - 1   # centres of pixels of an image from -1 to 1
    shift = (1 - 1 / zoom) * (2 * corner - 1)                                                       # (B, 2)
    across, down = (line / zoom[..., None] + shift[..., None]).unbind(1)                    # (B, h), (B, h)
    places = torch.stack(torch.broadcast_tensors(across[:, None], down[:, :, None]), 3)       # (B, h, h, 2)
    # What lies beyond the edge has its colour, as where a whole image is resized and then cut.
    return F.grid_sample(x, places, padding_mode="border", align_corners=False)               # (B, C, h, h)


def draw_tokenizer(dataset, cfg, step, device):
    """Images of stage tokenizer and draws: n, s (or None), noise (B, N), augment (B, 5, 2, 10).

    n and s are one for all images. Official code differs: each process has its own.
    Before --kmeans there are no codes: all tokens are decoded and none is corrupted.
    """
    index, draws = draw_images(dataset, cfg, step, "tokenizer", cfg.batch)
    zoom = 1 + (cfg.zoom - 1) * draws["zoom"]                                                       # (B, 1)
    x = cut_images(dataset, cfg, index, draws["flip"][:, 0] < 0.5, zoom, draws["corner"], device)
    n = cfg.tokens
    s = None
    if step >= cfg.kmeans:
        n = prefix_length(draws["degrade"], draws["length"], cfg)
        if cfg.correct and n > 1:
            s = noise_start(draws["start"], n, cfg)
    augment = draws["augment"].unflatten(1, (5, 2, 10))                                       # (B, 5, 2, 10)
    return x, {"n": n, "s": s, "noise": draws["noise"].to(device), "augment": augment.to(device)}


# D19  the noise of an image for stage ar depends on (seed, image), as the official code freezes it when it
#     extracts codes: one s for all its crops, and codes for each crop (where crops are not stored, for all)


def draw_noise(cfg, index, device, k=0):
    """D19 of crop k of images `index`: first noisy positions s (B,), or None, and draws (B, N) of codes."""
    # seed + 1: other numbers than those that drew the images of `shapes`
    columns = np.arange(1, 1 + cfg.tokens) + k * cfg.tokens
    u = data.uniform(np.asarray(index)[:, None], np.array([0, *columns]), cfg.seed + 1)
    dtype = torch.get_default_dtype()
    start, noise = torch.from_numpy(u).to(device, dtype).split([1, cfg.tokens], 1)          # (B, 1), (B, N)
    s = noise_start(start.squeeze(1), cfg.tokens, cfg) if cfg.correct and cfg.noisy else None
    return s, noise                                                                            # (B), (B, N)


def draw_ar(dataset, cfg, step, device, stored=None):
    """Batch of stage ar, a Triple of stored ids and labels (B,), and draws: noisy and drop (B,).

    Without stored ids it is images and labels, and there are draws s (B,) or None and noise (B, N) as well.
    """
    index, draws = draw_images(dataset, cfg, step, "ar", common.batch_size(cfg, "ar"))
    y = torch.from_numpy(dataset.labels[index]).to(device)
    noisy = draws["noisy"][:, 0] < cfg.noisy                                                           # (B)
    drop = draws["drop"][:, 0] < cfg.label_dropout                                                     # (B)
    found = {"noisy": noisy.to(device), "drop": drop.to(device)}
    if stored is not None:
        k = (draws["zoom"][:, 0] * cfg.crops).long().numpy()            # free here: crops are enlarged alike
        ids = torch.from_numpy(stored[index, k].astype(np.int64)).to(device)                     # (B, 3, N)
        return (Triple(*ids.unbind(1)), y), found
    # our choice: cut anywhere, afresh at every step, out of images enlarged as those of the stored crops.
    zoom = torch.full_like(draws["zoom"], ar_zoom(cfg))                                             # (B, 1)
    x = cut_images(dataset, cfg, index, draws["flip"][:, 0] < 0.5, zoom, draws["corner"], device)
    s, noise = draw_noise(cfg, index, device)
    return (x, y), found | {"s": s, "noise": noise}


# D20  t is the share of the steps done; the tokenizer's cosine begins a little below the peak
#      tokenizer  rate / peak = 0.1 + 0.9 t / warmup             for t < warmup, then
#                 rate / peak = 0.1 + 0.9 (1 + cos(pi t)) / 2
#      ar         rate / peak = 0.005 + 0.995 t / 0.05           for t < 0.05, then
#                 rate / peak = 0.01 + 0.99 (1 + cos(pi (t - 0.05) / 0.95)) / 2


def schedule(t, warmup, low, end, cosine_from):
    """D20: a rise from low to 1, then a cosine to end, which counts from t = cosine_from."""
    if t < warmup:
        return low + (1 - low) * t / warmup
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * (t - cosine_from) / (1 - cosine_from)))


def learning_rate(cfg, step):
    """The tokenizer's and discriminator's rate; its peak is scaled by batch / 256."""
    t = step / (cfg.steps_tokenizer or cfg.steps)
    return cfg.lr * cfg.batch / 256 * schedule(t, cfg.warmup, low=0.1, end=0.1, cosine_from=0.0)


def learning_rate_ar(cfg, step):
    """The AR model's rate; its peak is not scaled."""
    t = step / (cfg.steps_ar or cfg.steps)
    return cfg.lr_ar * schedule(t, 0.05, low=0.005, end=0.01, cosine_from=0.05)


def optimizer_tokenizer(model, disc, cfg):
    """Adam for both: their rates are equal."""
    adam = torch.optim.Adam([*model.parameters(), *disc.parameters()], betas=(0.9, 0.95), fused=True)
    blocks = nn.ModuleList([model.encoder.blocks, model.decoder.blocks])
    return common.with_muon(adam, blocks, cfg.muon)


def optimizer_ar(model, cfg):
    """AdamW with decay on the matrices alone, embeddings among them."""
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    return common.with_muon(adamw, model.blocks, cfg.muon)


@torch.no_grad()
def renew_codes(model, dataset, cfg, step):
    """Our choice: at step --kmeans all codes become the spherical k-means of training images' latents.

    Every --kmeans steps after that, until 70 % of the steps are done, codes that nothing has chosen meanwhile
    become such latents. Alike in all processes.
    """
    total = cfg.steps_tokenizer or cfg.steps
    first = step == cfg.kmeans
    if cfg.kmeans == 0 or step == 0 or step % cfg.kmeans:
        return
    if step >= 0.7 * total and not first:
        return
    vq = model.vq
    generator = common.make_generator(cfg.seed, step, "codes")
    index = torch.randint(len(dataset), (64 * cfg.codes // cfg.tokens + 1,), generator=generator)
    parts = [dataset.pixels(part.numpy(), vq.codes.device) for part in index.split(100)]
    latents = torch.cat([model.encode(x.to(vq.codes.dtype))[0] for x in parts])                  # (M, N, d)
    u = F.normalize(latents.flatten(0, 1), dim=1)                                                   # (m, d)
    codes = u[torch.randperm(len(u), generator=generator)[:cfg.codes]]                              # (K, d)
    if first:
        for _ in range(20):
            sums = torch.zeros_like(codes).index_add_(0, (u @ codes.T).argmax(1), u)                # (K, d)
            codes = torch.where(sums.any(1, keepdim=True), F.normalize(sums, dim=1), codes)         # (K, d)
    else:
        codes = torch.where(vq.use[:, None] > 0, vq.codes, codes)
    vq.codes.copy_(common.average(codes))
    vq.use.zero_()


def train_tokenizer(cfg):
    """Stage 1: encoder, codebook and decoder, and their discriminator where --gan asks for one."""
    device = common.device_of(cfg)
    dataset = open_split(cfg, "train")
    teacher, S = open_teacher(cfg)
    run = common.Run(cfg, "tokenizer", classes=dataset.classes)
    run.seed_weights()
    model = Tokenizer(cfg, S if cfg.align else 0).to(device)
    disc = make_discriminator(S).to(device)
    if cfg.tokenizer:                       # the file may hold a part alone, such as SigLIP2's weights
        found = common.read_checkpoint(cfg.tokenizer, "detailflow")["state"]["tokenizer"]
        whole = {name: found.get(name, own) for name, own in model.state_dict().items()}
        common.require(found.keys() & whole.keys(), f"{cfg.tokenizer}: holds no weight of this tokenizer")
        common.load_into({"tokenizer": model}, {"state": {"tokenizer": whole}}, cfg.tokenizer)
    common.load_init(run, model, "tokenizer")
    opt = optimizer_tokenizer(model, disc, cfg)
    start = run.restore(tokenizer=model, disc=disc, opt=opt)
    common.compile_blocks(cfg, [*model.encoder.blocks, *model.decoder.blocks])
    read = common.read_ahead(lambda step: draw_tokenizer(dataset, cfg, step, device), device, run.total)
    for step in run.steps(start):
        batch, draws = read(step)
        common.set_learning_rate(opt, learning_rate(cfg, step))
        renew_codes(model, dataset, cfg, step)
        model.vq.bypass = step < cfg.kmeans
        weight = weights(cfg, step)
        opt.zero_grad()
        picks = []
        logits = []
        for part, part_draws in common.in_parts(cfg.accumulate, batch, draws):
            with common.autocast(cfg):
                value, losses, (ids, recon, target) = loss_tokenizer(
                    model, part, part_draws, weight, teacher, disc)
                if cfg.gan:
                    logits.append(disc_logits(disc, teacher, recon, target, part_draws["augment"][:, 1:]))
            # The adversarial loss of the tokenizer leaves no gradient in the discriminator.
            (value / cfg.accumulate).backward(inputs=[*model.parameters()])
            picks.append(ids)
            run.add(loss=value, **losses)
        if cfg.gan:
            value = follow_disc(disc, logits, weight["gan"])
            value.backward()
            run.add(disc=value)
        common.average_gradients([*model.parameters(), *disc.parameters()])
        for network in (model, disc):
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        opt.step()
        run.log(step, codes=count_codes(model.vq, torch.cat(picks)))
        run.save(step)


def follow_disc(disc, logits, weight):
    """The discriminator's loss, of the logits of all parts of a batch; moves LeCam's running means (D15).

    They move from step 1, though with weight 0 until --gan_from: they are settled by then.
    Official code differs: there each process has means of its own.
    """
    logits = [torch.cat(parts) for parts in zip(*logits)]
    means = torch.stack([part.detach().mean() for part in logits[:2]])                                 # (2)
    disc.means.lerp_(common.average(means), 0.001)
    return loss_disc(logits, disc.means, weight)


def count_codes(vq, ids):
    """How many codes a step has chosen, ids (B, N) of each process; adds their shares to vq.use."""
    picks = torch.bincount(ids.flatten(), minlength=len(vq.use)).to(vq.use.dtype)                      # (K)
    use = common.average(picks / ids.numel())                                                          # (K)
    vq.use += use
    return (use > 0).sum()


def load(cfg, path):
    """From any checkpoint: tokenizer and averaged AR model (or None), both frozen, and the classes' names."""
    saved = common.read_checkpoint(path, "detailflow")
    state = saved["state"]
    device = common.device_of(cfg)
    S = len(state.get("tokenizer", {}).get("align.4.bias", ()))           # features that `align` predicts
    tokenizer = Tokenizer(cfg, S).to(device).requires_grad_(False)
    common.load_into({"tokenizer": tokenizer}, saved, path)
    if "ema" not in state:
        return tokenizer, None, []
    rows = len(state["ema"]["label.weight"])
    ar = AR(cfg, rows - 1 if cfg.label_dropout else rows).to(device).requires_grad_(False).eval()
    common.load_into({"ema": ar}, saved, path)
    return tokenizer, ar, common.class_names(saved, ar.classes)


def tokenizer_path(cfg):
    """The checkpoint that stage ar builds on: --tokenizer with --stage ar, else this run's own."""
    if cfg.stage == "ar" and cfg.tokenizer:
        return cfg.tokenizer
    return common.require_stage(cfg, "tokenizer")


def make_triple(tokenizer, x, s, u):
    """The Triple of images: with noise from s on, by draws u (B, N), or as they are where s is None."""
    if s is None:
        return Triple(*[tokenizer.tokenize(x)[1]] * 3)
    return tokenizer.correct(x, s, u)[1]


def ar_zoom(cfg):
    """How much stage ar enlarges images before it cuts: 1.1 where the tokenizer goes up to 1.25."""
    return 1 + 0.4 * (cfg.zoom - 1)


PLACES = ((0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))       # of crops: centre, then corners


def encode_crops(tokenizer, dataset, index, device):
    """Ids (B, m, 3, N) of the m = --crops crops of images `index`: of each its Triple, with the noise of D19.

    Ten are the centre and the four corners of an image enlarged by 1.1, each followed by its mirror image.
    """
    cfg = tokenizer.cfg
    sides = 2 if cfg.flip else 1
    full = torch.ones(len(index), 1, device=device)                                                 # (B, 1)
    found = []
    for k in range(cfg.crops):
        corner = full * torch.tensor(PLACES[k // sides], device=device)                             # (B, 2)
        x = cut_images(dataset, cfg, index, full[:, 0] == k % sides, ar_zoom(cfg) * full, corner, device)
        s, noise = draw_noise(cfg, index, device, k)
        with common.autocast(cfg):
            triple = make_triple(tokenizer, x, s, noise)                                      # each (B, N)
        found.append(torch.stack(triple, 1))
    return torch.stack(found, 1)                                                              # (B, m, 3, N)


def store_tokens(tokenizer, dataset, run):
    """The ids of all training images' crops, int16 or int32 (M, m, 3, N), in a file of the run, made once.

    None with --crops 0.
    """
    cfg = tokenizer.cfg
    if cfg.crops == 0:
        return None
    dtype = torch.int16 if cfg.codes <= 2 ** 15 else torch.int32

    def make(first, last):
        ids = encode_crops(tokenizer, dataset, np.arange(first, last), run.device)
        return ids.to("cpu", dtype)

    recipe = common.fingerprint(tokenizer)      # all else stands in the run's config.json
    return common.stored_rows(run.folder / "tokens.npy", make, len(dataset), recipe)


def train_ar(cfg):
    """Stage 2: the AR model, on triples that the frozen tokenizer gives to cropped and flipped images."""
    device = common.device_of(cfg)
    dataset = open_split(cfg, "train")
    tokenizer, _, _ = load(cfg, tokenizer_path(cfg))
    run = common.Run(cfg, "ar", classes=dataset.classes)
    run.seed_weights()
    model = AR(cfg, len(dataset.classes)).to(device)
    common.load_init(run, model, "ema", new=("label.weight",))
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    opt = optimizer_ar(model, cfg)
    start = run.restore(model=model, ema=ema, opt=opt, frozen={"tokenizer": tokenizer})
    common.compile_blocks(cfg, model.blocks)
    stored = store_tokens(tokenizer, dataset, run)
    read = common.read_ahead(lambda step: draw_ar(dataset, cfg, step, device, stored), device, run.total)
    for step in run.steps(start):
        batch, draws = read(step)
        common.set_learning_rate(opt, learning_rate_ar(cfg, step))
        common.seed_dropout(cfg.seed, step)
        opt.zero_grad()
        for part, part_draws in common.in_parts(cfg.accumulate, batch, draws):
            with common.autocast(cfg):
                if stored is None:
                    x, y = part
                    part = make_triple(tokenizer, x, part_draws["s"], part_draws["noise"]), y
                value, losses = loss_ar(model, part, part_draws)
            (value / cfg.accumulate).backward()
            run.add(loss=value, **losses)
        common.average_gradients(model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        common.ema_update(ema, model, cfg.ema)
        run.log(step)
        run.save(step)


STAGES = {"tokenizer": train_tokenizer, "ar": train_ar}


def train(cfg):
    """One stage, or both (--resume: a finished one is over at once); 1 where the demo missed its target."""
    path = common.run_stages(cfg, STAGES)
    return report(cfg, path, common.folder(cfg))


# --- Checks ------------------------------------------------------------------


def num_tokens(cfg):
    """--keep as a number of tokens. Several n share a side in pixels: it takes the one of nearest R(n)."""
    counts = admissible(cfg)
    named = [n for n in counts if cfg.keep in (str(n), f"{image_side(n, cfg)}px")]
    if cfg.keep == "all":
        named = [cfg.tokens]
    common.require(named, f"--keep {cfg.keep}: give all, a side as {cfg.size}px, or one of {counts}")
    return min(named, key=lambda n: (abs(detail_side(n, cfg) - image_side(n, cfg)), -n))


def check(cfg):
    """What relates fields to one another; UserError with one line."""
    require = common.require
    values = vars(cfg)
    for name, part in (("size", "patch"), ("tokens", "group"), ("causal", "group")):
        whole = values[name] % values[part] == 0
        require(whole, f"--{name} {values[name]}: must be a multiple of --{part} {values[part]}")
    fits = cfg.group <= cfg.causal <= cfg.tokens and cfg.group < cfg.tokens
    require(fits, f"--tokens {cfg.tokens}: --group {cfg.group} must be less, --causal {cfg.causal} between")
    require(cfg.near <= cfg.codes, f"--near {cfg.near}: there are only {cfg.codes} codes")
    fits = cfg.label_dropout or cfg.cfg_scale == 1
    require(fits, f"--cfg_scale {cfg.cfg_scale}: --label_dropout 0 trains no null label; give --cfg_scale 1")
    asks = cfg.encode + cfg.decode + cfg.export
    require(cfg.sample or not asks, "--encode, --decode and --export go with --sample CHECKPOINT")
    most = (5 if cfg.zoom > 1 else 1) * (2 if cfg.flip else 1)
    require(cfg.crops <= most, f"--crops {cfg.crops}: with this --zoom and --flip only {most} crops differ")
    fits = not cfg.init or cfg.stage == "ar" or cfg.kmeans == 0
    require(fits, f"--init {cfg.init}: brings its own codes; give --kmeans 0")
    num_tokens(cfg)
    for text in (cfg.encoder, cfg.decoder, cfg.gpt):
        parse_network(text)


def open_split(cfg, split, count=20_000):
    """The data's 'train', 'test' or 'judge' split; UserError where it does not fit the configuration."""
    found = data.open_data(cfg.data, split, size=cfg.size, objects=(1, cfg.objects), count=count)
    fits = found.images.shape[1:] == (3, cfg.size, cfg.size) and not found.latent
    common.require(fits, f"{cfg.data}: holds {found.images.shape[1:]}, not RGB pictures of --size {cfg.size}")
    return found


def prepare(cfg):
    """Once, before the processes start: memory, downloads, packing, the teacher.

    Whatever the run will need is looked at here, so that no mistake shows after hours of training.
    """
    if cfg.sample:
        return
    common.require_memory(cfg, lambda: Tokenizer(cfg))
    common.require_memory(cfg, lambda: AR(cfg, 1))
    common.require(cfg.count > 1, "--count 1: the error of a run is measured on 2 images or more")
    train = open_split(cfg, "train")
    test = open_split(cfg, "test", cfg.count)
    print(data.describe({"train": train, "test": test}), flush=True)
    data.require_images(train, "train", 2, "a judge, which learns from one half,")
    data.require_images(test, "test", 2, "the error, a share of variance,")
    common.parse_classes(cfg.classes, len(train.classes))
    if cfg.tokenizer or cfg.stage == "ar":
        common.read_checkpoint(cfg.tokenizer or tokenizer_path(cfg), "detailflow")
    _, S = open_teacher(cfg)
    if cfg.init and not cfg.resume:
        check_init(cfg, S, len(train.classes))


def check_init(cfg, S, classes):
    """UserError where --init does not fit what the stages of this run will train."""
    with torch.device("meta"):
        tokenizer = Tokenizer(cfg, S if cfg.align else 0)
        ar = AR(cfg, classes)
    if cfg.stage != "ar":
        common.init_state(cfg, tokenizer, "tokenizer")
    if cfg.stage != "tokenizer":
        common.init_state(cfg, ar, "ema", ("label.weight",))


# --- Command line ------------------------------------------------------------


def encode_images(tokenizer, x, s=None):
    """Ids (M, 3, N) of images: clean, given, target; with s, of noise from token s on, drawn by --seed."""
    cfg = tokenizer.cfg
    u = torch.rand(len(x), cfg.tokens, generator=common.make_generator(cfg.seed, 0, "noise")).to(x.dtype)
    return common.in_blocks(
        lambda x, u: torch.stack(make_triple(tokenizer, x, s, u), 1), common.device_of(cfg), x, u)


def decode_ids(tokenizer, ids):
    """Images (M, 3, r, r) of token prefixes (M, n), at the side that n tokens have."""
    device = common.device_of(tokenizer.cfg)
    return common.in_blocks(lambda ids: tokenizer.decode(tokenizer.vq.vectors(ids)), device, ids)


def error(y, x):
    """Squared error of images y, enlarged to x, over the variance of x: the mean image would score 1."""
    return ((enlarge(y, x.shape[-1]) - x).square().mean() / x.var(0).mean()).item()


def show_prefixes(path, tokenizer, ids, names, extra=()):
    """A row an image, a column a number of tokens, at its side: ten or fewer, all tokens among them."""
    counts = [n for n in admissible(tokenizer.cfg) if n <= ids.shape[1]]
    every = 1 + len(counts) // 10
    counts = counts[(len(counts) - 1) % every::every]
    common.prefixes_png(path, lambda ids: decode_ids(tokenizer, ids), ids, counts, names,
                        lambda n, x: f"n={n} {x.shape[-1]}px", extra, side=80)


def show_noise(path, tokenizer, x, names):
    """correction.png and errors: a token or group is noise, the rest kept as it was, or chosen again (D7)."""
    N, g, c = tokenizer.cfg.tokens, tokenizer.cfg.group, tokenizer.cfg.causal
    columns = [x]
    heads = ["image"]
    for s in [0, *range(c, N - g, g)][:4]:
        end = s + 1 if s < c else s + g
        kept, given, _ = encode_images(tokenizer, x, s).unbind(1)
        kept[:, s:end] = given[:, s:end]
        columns += [decode_ids(tokenizer, ids) for ids in (kept, given)]
        heads += [f"noise {s + 1}-{end}", "corrected"]
        error_kept, corrected = (error(y, x) for y in columns[-2:])
        print(f"{path}: {heads[-2]}: error {error_kept:.3f}, corrected {corrected:.3f}")
    common.columns_png(path, [column[:10] for column in columns], heads, names, side=80)


def draw_block(ar, cfg, y, first):
    """Ids (m, n) for labels y (m,) of samples first, first + 1, ...: their draws depend on their numbers."""
    device = common.device_of(cfg)
    generator = common.make_generator(cfg.seed, first, "sample")
    u = torch.rand(len(y), num_tokens(cfg), generator=generator)
    return generate(ar, y.to(device), u.to(device), cfg).cpu()


def sample_labels(ar, cfg):
    """Labels (count,) to generate: those of --classes in turn."""
    return torch.from_numpy(np.resize(common.parse_classes(cfg.classes, ar.classes), cfg.count))


def draw_samples(ar, cfg):
    """Ids (count, n) that the AR model draws, in blocks shared by all processes; their labels (count,)."""
    y = sample_labels(ar, cfg)
    blocks = common.share_blocks(lambda first, last: draw_block(ar, cfg, y[first:last], first), cfg.count)
    return torch.cat([*blocks]), y


def export_samples(tokenizer, ar, cfg):
    """--export: images of --count samples, in blocks that all processes share."""
    common.require(ar, f"--export: {cfg.sample} holds no AR model")
    y = sample_labels(ar, cfg)

    def make(first, last):
        return decode_ids(tokenizer, draw_block(ar, cfg, y[first:last], first))

    common.export_images(cfg.export, common.share_blocks(make, cfg.count), cfg.count)


def encode_split(tokenizer, dataset):
    """Ids int32 (M, N) of all images, in blocks that all processes share."""
    device = common.device_of(tokenizer.cfg)

    def make(first, last):
        x = dataset.pixels(np.arange(first, last), device).to(torch.get_default_dtype())
        return tokenizer.tokenize(x)[1].int().cpu()

    return torch.cat([*common.share_blocks(make, len(dataset))]).numpy()


def measure(tokenizer, cfg, where):
    """What the tokenizer makes of test images: prefixes.png, correction.png, and errors of all prefixes.

    Returns the error with all tokens and how many codes are in use; the images and their reconstructions.
    """
    test = open_split(cfg, "test", cfg.count)
    x = test.pixels(np.arange(min(cfg.count, len(test)))).to(torch.get_default_dtype())
    common.require(len(x) > 1, f"--count {cfg.count} of {len(test)} test images: the error needs 2 or more")
    ids = encode_images(tokenizer, x)[:, 0]
    names = [test.classes[label] for label in test.labels[:10]]
    show_prefixes(where / "prefixes.png", tokenizer, ids[:10], names, [("image", lambda _: x[:10])])
    if cfg.correct:
        show_noise(where / "correction.png", tokenizer, x, names)
    errors = {n: error(decode_ids(tokenizer, ids[:, :n]), x) for n in admissible(cfg)}
    print(f"{where}: error " + ", ".join(f"{e:.3f} (n={n})" for n, e in errors.items()), flush=True)
    return {"error": errors[cfg.tokens], "codes": len(ids.unique())}, x, decode_ids(tokenizer, ids)


# Of the demo: mean - 4 s.d. of four seeds, whose error was .041 .049 .045 .042, reconstructed .92 .84 .90 .89
# and accuracy .96 .93 .95 .93; all used 256 codes.
TARGET = dict(error=0.058, codes=200, reconstructed=0.75, accuracy=0.89)


def report(cfg, path, where):
    """Pictures of a checkpoint and its figures, printed; 1 where the demo missed its target.

    All processes draw the samples, the first one does the rest. Accuracy is the share of images that the
    ruler, a classifier of real ones, puts into their class.
    """
    tokenizer, ar, names = load(cfg, path)
    if ar:
        ids, y = draw_samples(ar, cfg)
    if common.rank() > 0:
        return 0
    if ar:
        whole = cfg.keep == "all" and not cfg.sample            # else its images may be absent or larger
        extra = [("train", lambda x: common.nearest(x, open_split(cfg, "train")))] if whole else []
        show_prefixes(where / "generation.png", tokenizer, ids[:10], [names[k] for k in y[:10]], extra)
    if ar and cfg.sample:
        return 0
    found, x, recon = measure(tokenizer, cfg, where)
    if ar and cfg.steps >= 100:
        ruler = common.judge(open_split(cfg, "judge"), "ruler")
        labels = torch.from_numpy(open_split(cfg, "test", cfg.count).labels[:len(x)])
        print(f"{where}: of {len(x)} real images the ruler knows {common.accuracy(ruler, x, labels):.3f}")
        found["reconstructed"] = common.accuracy(ruler, recon, labels)
        found["accuracy"] = common.accuracy(ruler, enlarge(decode_ids(tokenizer, ids), cfg.size), y)
    print(", ".join(f"{name} {value:.3g} (target {TARGET[name]})" for name, value in found.items()))
    missed = found.pop("error") > TARGET["error"] or any(found[name] < TARGET[name] for name in found)
    counts = cfg.preset == "demo" and common.is_preset(cfg, PRESETS) and common.Run.trained
    return int(missed and counts)


def read_tokens(cfg, codebook_hash):
    """--decode: ids (M, n) cut to --keep; UserError where they are no tokens of this codebook.

    Ids mean nothing with other codes, hence the checksum that --encode writes beside them.
    """
    path = cfg.decode
    counts = admissible(cfg)
    with data.reading(path), np.load(path) as found:            # what --encode wrote
        ids = found["ids"].astype(np.int64)[:, :num_tokens(cfg)]
        theirs = str(found["codebook"])
    same = theirs == codebook_hash
    common.require(same, f"--decode {path}: another codebook, {theirs}; {cfg.sample} has {codebook_hash}")
    fits = ids.size and ids.shape[1] in counts and 0 <= ids.min() <= ids.max() < cfg.codes
    common.require(fits, f"--decode {path}: no ids (M, n) below {cfg.codes} with n in {counts}")
    return torch.from_numpy(ids)


def main(cfg):
    """Train, or use a checkpoint and write to --out alone; returns the exit code."""
    if not cfg.sample:
        return train(cfg)
    tokenizer, ar, _ = load(cfg, cfg.sample)
    where = common.sample_folder(cfg)
    codebook_hash = common.fingerprint(tokenizer.vq)[:8]
    written = cfg.export or cfg.encode or where
    if cfg.export:
        export_samples(tokenizer, ar, cfg)
    elif cfg.encode:
        dataset = open_split(cfg, "train")
        packed = dict(ids=encode_split(tokenizer, dataset), labels=dataset.labels, codebook=codebook_hash)
        if common.rank() == 0:
            common.write_atomic(cfg.encode, lambda file: np.savez(file, **packed))
    elif cfg.decode:
        ids = read_tokens(cfg, codebook_hash)[:min(cfg.count, 100)]
        if common.rank() == 0:
            show_prefixes(where / "decoded.png", tokenizer, ids, ())
    else:
        report(cfg, cfg.sample, where)
    if common.rank() == 0:
        print(f"written: {written}")
    return 0


if __name__ == "__main__":
    common.launch(main, common.cli(Config, PRESETS, __doc__), check, prepare)
