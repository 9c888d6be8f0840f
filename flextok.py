"""FlexTok: Resampling Images into 1D Token Sequences of Flexible Length (arXiv 2502.13967)

An image becomes R ordered tokens, every prefix of them a picture: a flow decoder sees the first k alone, k
random (nested dropout), so the first must say most, and invents the rest. A GPT writes as many as needed.

    [patches | registers] -> encoder -> FSQ -> id 1 ... id R     register i sees patches and registers 1 to i
    [noised patches | id 1 ... id k, mask ... mask] -> decoder -> velocity of the patches
    class or caption -> GPT -> id 1, id 2, ...                   stop after any k and decode

Run:      python flextok.py                   3 minutes: accuracy .15 .22 .49 .84 (k = 1 2 4 8), samples .70
          python flextok.py --preset d18-d28 --data latents:imagenet256.npz --teacher dinov2.pt2 --gpus 8
          python flextok.py --sample runs/flextok/demo/ar.pt --classes 6,9 --keep 4
          python flextok.py --sample runs/flextok/demo/tokenizer.pt --data shapes --encode tokens.npz
          python flextok.py --name words --condition text          and then draw what a sentence asks for:
          python flextok.py --sample runs/flextok/words/ar.pt --prompt "a large red star in the centre"
Faithful: mask, FSQ, nested dropout, null condition, flow decoder, losses, guidances, GPT (F1 to F33). Of the
          paper we had its code, "published", others' words, "reported", but no text: "paper unknown".
Scaled:   demo: sizes, batch, rates, Muon, EMA, null, whole, std, shift, base, sampler; no flips, crops, REPA.
Left out: muP but for its logit scale; the VAE (pixels are their own latent; `latents:` reads cached ones and
          crops none); DINOv2, FLAN-T5-XL: --teacher loads a network, --text its states; stand-ins train here.
Letters:  B images, C channels, h w sides, p patch side, P patches, R registers/tokens, N positions, D width,
          H heads, d = D/H, Q numbers a token, V ids, L words, S features, u uniform. t: 1 noise, 0 image.
CUDA:     never run on CUDA.
Read in this order: Encoder, FSQ, Decoder, loss_tokenizer, sample, GPT, generate, train_tokenizer. 20 minutes.
"""

import copy
import dataclasses
import functools
import math
from pathlib import Path
from typing import ClassVar, Literal

import common  # before torch: it says how torch's threads wait
import data

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# --- Configuration -----------------------------------------------------------

@dataclasses.dataclass
class Config:   # defaults are published, or marked: "reported", "paper unknown", "our choice" (see the top)
    preset: str = "demo"                    # where the values below start from (PRESETS, under Training)
    data: str = "shapes"                    # shapes, cifar10, npz:PATH, folder:PATH or latents:PATH
    stage: Literal["all", "tokenizer", "ar"] = "all"    # what to train
    objects: int = 1                        # in [1, 4]: most objects in a drawn image
    size: int = 32                          # >= 1: side of the image or latent
    channels: int = 16                      # >= 1: its channels C
    flip: bool = True                       # mirror each image with probability 1/2; reported for stage ar
    crop: float = 1.1                       # in [1, 10]: stage ar enlarges so much, then crops; our choice
    crops: int = 10                         # >= 0: of an image, encoded once; 0: afresh each step; reported
    patch: int = 2                          # >= 1: patch side p
    registers: int = 256                    # >= 1: R, tokens an image
    levels: str = "8,8,8,5,5,5"             # FSQ levels; their product is the number of ids V
    encoder: int = 12                       # in [1, 200]: depth of the encoder: n blocks of n heads, D = n d
    decoder: int = 12                       # in [1, 200]: depth of the decoder
    gpt: int = 12                           # in [1, 200]: depth of the GPT
    head: int = 64                          # >= 4: width d of an attention head
    std: float = 0.02                       # > 0: s.d. of registers, token positions, mask, null at the start
    nested: Literal["pow2", "uniform"] = "pow2"         # law of the number of tokens kept (F15)
    whole: float = 0.0                      # in [0, 1): share of images that keep all tokens; our choice
    null: float = 0.1                       # in [0, 1]: share of images decoded without tokens; paper unknown
    time: Literal["mode", "logit-normal", "uniform"] = "mode"    # law of the flow time (F21)
    shift: float = 1.0                      # > 0: our choice, above 1: more times near noise
    base: float = 10_000.0                  # > 1: of the positions' wavelengths (F3); else our choice
    max_time: float = 1000.0                # > 0: T of the time embedding (F17)
    repa: float = 1.0                       # >= 0: weight of REPA (F24), 0 for none; paper unknown
    repa_layer: int = 1                     # >= 0: decoder block that is aligned, counted from 0
    teacher: str = "judge"                  # judge: a classifier trained here; or a network's .pt or .pt2
    tokenizer: str = ""                     # checkpoint that --stage ar builds on; default: this run's
    condition: Literal["class", "text"] = "class"       # what the GPT is told
    text: str = ""                          # FILE.npy of a text encoder's states; default: trains an encoder
    label_dropout: float = 0.1              # in [0, 1]: share of sequences without a condition; reported
    steps: int = 250_000                    # >= 1: optimizer steps of each stage; paper unknown
    steps_tokenizer: int = 0                # >= 0: of stage tokenizer; 0: --steps
    steps_ar: int = 0                       # >= 0: of stage ar; 0: --steps
    batch: int = 1024                       # >= 1: images a step, over all processes; reported for stage ar
    batch_ar: int = 0                       # >= 0: of stage ar; 0: --batch
    accumulate: int = 1                     # >= 1: equal parts of a process's batch, one after the other
    lr: float = 3e-4                        # > 0: peak learning rate of the tokenizer; paper unknown
    lr_ar: float = 1.2e-3                   # > 0: of the GPT: reported for 49M, which is --gpt 10
    muon: float = 0.0                       # >= 0: Muon for blocks at so many times the rate; our choice
    warmup: float = 0.1                     # in [0, 1]: share of steps of rising rate; reported for stage ar
    ema: float = 0.9999                     # in [0, 1]: decay of the averaged weights; paper unknown
    num_steps: int = 20                     # >= 1: Euler steps of the decoder
    cfg_scale: float = 7.5                  # >= 0: guidance scale g of the decoder; 1 is none
    cfg_schedule: Literal["constant", "linear", "cosine"] = "constant"    # g over the flow time
    apg: bool = True                        # adaptive projected guidance (F27); off: plain CFG (F26)
    cfg_scale_ar: float = 1.5               # >= 0: guidance scale g of the GPT; reported: class 1.5, text 3
    temperature: float = 1.0                # > 0: of the GPT's softmax
    top_k: int = 0                          # >= 0: sample from so many likeliest ids; 0: all
    top_p: float = 1.0                      # in (0, 1]: sample from the likeliest ids of this mass; 1: all
    keep: str = "all"                       # tokens generated or decoded: 1 to R
    classes: str = "all"                    # labels to generate, as 3,5; all is every class in turn
    prompt: str = "captions"                # words to draw; captions: those of the test split
    count: int = 500                        # >= 1: test images measured, or rows of a picture of --sample
    encode: str = ""                        # with --sample: write the tokens of --data to FILE.npz
    decode: str = ""                        # with --sample: draw the tokens of FILE.npz
    export: str = ""                        # with --sample: images to NAME.npz (ADM) or, PNGs, a folder
    seed: int = 0                           # every random number is a function of (seed, step)
    gpus: int = 1                           # >= 1: processes, one a GPU; without GPUs they share the CPU
    device: str = "auto"                    # auto, cpu or cuda
    bf16: bool = False                      # bf16 autocast on CUDA, in training and --encode; not FSQ, norms
    compile: bool = False                   # torch.compile for the blocks; on a CPU minutes before step 1
    name: str = ""                          # run folder runs/flextok/NAME; default: the preset
    init: str = ""                          # checkpoint whose weights this run starts from
    resume: bool = False                    # go on with runs/flextok/NAME in its first unfinished stage
    sample: str = ""                        # checkpoint to use, instead of training
    out: str = ""                           # folder for what --sample writes; default: samples/ beside it
    log: int = 100                          # >= 1: steps between log lines
    save: int = 5000                        # >= 1: steps between checkpoints
    sampling: ClassVar = (                  # what --sample may change
        "data", "objects", "num_steps", "cfg_scale", "cfg_schedule", "apg", "cfg_scale_ar", "temperature",
        "top_k", "top_p", "keep", "classes", "prompt", "count", "encode", "decode", "export", "gpus")

# --- Building blocks ---------------------------------------------------------

# F1  x = c z, z ~ N(mean, exp(logvar)): cached latents of a VAE, drawn each step, c their scale; or pixels
# F2  patches of x, row by row; a patch is its p*p*C numbers, by row, column, channel
# F3  pos = [sin r w, cos r w, sin c w, cos c w] of patch (r, c), w_j = base^(-4 j / D), j < D / 4, base 10000
# F6  h <- h + attention(norm(h)), h <- h + mlp(norm(h)); norm: LayerNorm without weights
# F7  attention(h) = W_o softmax(8 / d norm(q) norm(k)^T) v, a head at a time; q, k, v = W_q h, W_k h, W_v h
# F8  mlp(h) = W_2 (silu(W_1 h) * W_3 h), 8 D / 3 wide


def parse_levels(text):
    """FSQ levels "8,8,8,5,5,5" as a tuple; UserError."""
    levels = [int(word) if word.isascii() and word.isdigit() else 0 for word in text.split(",")]
    fine = min(levels) > 1 and math.prod(levels) < 2 ** 31
    common.require(fine, f"--levels {text}: write numbers above 1, as 8,8,8,5,5,5, of product below 2^31")
    return tuple(levels)


def patchify(x, p):
    """Images (B, C, h, w) to patches (F2)."""
    B, C, h, w = x.shape
    x = x.view(B, C, h // p, p, w // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)                             # (B, P, p*p*C)


def unpatchify(patches, p, h, w):
    """The inverse of patchify."""
    x = patches.view(len(patches), h // p, w // p, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, h, w)                        # (B, C, h, w)


def sincos_pos_embed(n, D, base=10_000.0):
    """Fixed positions of a grid of n x n patches (F3). our choice: a small base tells few patches apart."""
    frequency = base ** -(torch.arange(D // 4) / (D // 4))
    angle = torch.arange(n)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], 1)
    return torch.cat([wave.repeat_interleave(n, 0), wave.repeat(n, 1)], 1)                          # (P, D)


NORM = dict(eps=1e-5, elementwise_affine=False)                 # of the tokenizer; in fp32 under autocast


class Attention(nn.Module):
    """Attention without biases (F7). Normalised, queries and keys are sqrt(d) long: no logit exceeds 8."""

    def __init__(self, D, d, qk_norm=True):
        super().__init__()
        self.d = d
        self.norm = nn.LayerNorm(d, **NORM) if qk_norm else nn.Identity()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(D, D, bias=False) for _ in range(4))

    def heads(self, x):
        return x.unflatten(2, (-1, self.d)).transpose(1, 2)                                   # (B, H, N, d)

    def keys_values(self, h):
        """Keys and values of h (B, N, D)."""
        return self.norm(self.heads(self.wk(h))), self.heads(self.wv(h))        # (B, H, N, d), (B, H, N, d)

    def forward(self, h, kv=None, mask=None, causal=False):
        """kv: keys and values to look at; None: those of h. mask (..., N, M): True where h may look."""
        q = self.norm(self.heads(self.wq(h)))                                                 # (B, H, N, d)
        k, v = self.keys_values(h) if kv is None else kv                                 # each (B, H, M, d)
        # muP's logit scale 8 / d equals the usual 1 / sqrt(d) at the paper's d = 64 alone.
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=8 / self.d)  # (B, H, N, d)
        return self.wo(y.transpose(1, 2).flatten(2))                                             # (B, N, D)


class Block(nn.Module):
    """Pre-norm transformer block (F6) of the encoder and of the word encoder."""

    def __init__(self, D, d):
        super().__init__()
        self.norm = nn.LayerNorm(D, **NORM)
        self.attention = Attention(D, d)
        self.w1, self.w3 = (nn.Linear(D, 8 * D // 3, bias=False) for _ in range(2))
        self.w2 = nn.Linear(8 * D // 3, D, bias=False)

    def mlp(self, h):
        """SwiGLU (F8)."""
        return self.w2(F.silu(self.w1(h)) * self.w3(h))                                          # (B, N, D)

    def forward(self, h, mask, first=0):
        """What leaves the block from position `first` on; all of h (B, M, D) is looked at."""
        x = self.norm(h)                                                                         # (B, M, D)
        kv = self.attention.keys_values(x)                                               # each (B, H, M, d)
        h = h[:, first:] + self.attention(x[:, first:], kv, mask[..., first:, :])                # (B, N, D)
        return h + self.mlp(self.norm(h))                                                        # (B, N, D)


def modulate(h, shift, scale):
    """h * (1 + scale) + shift, as one operation."""
    return torch.addcmul(shift, h, 1 + scale)                                                    # (B, N, D)


class DecoderBlock(Block):
    """The block under adaLN-zero, the identity at the start of training.

    F18  h = [W_n patches of x_t + b_n + pos ; r] at first, r of F14 to F16; each block
         h <- h + gate_msa * attention(norm(h) * (1 + scale_msa) + shift_msa), then the same with mlp; the six
         vectors are W_M silu(tau) + b_M, six for patches and six for registers; W_M and b_M start at zero
    """

    def __init__(self, D, d):
        super().__init__(D, d)
        self.modulation = nn.Linear(D, 2 * 6 * D)

    def forward(self, h, tau, P):
        """h (B, N, D), of which the first P positions are patches; tau (B, D)."""
        # Each vector is written out to the positions that it is for.
        vectors = self.modulation(F.silu(tau)).unflatten(1, (2, 6, 1, -1))                 # (B, 2, 6, 1, D)
        patches = vectors[:, 0].expand(-1, -1, P, -1)                                         # (B, 6, P, D)
        registers = vectors[:, 1].expand(-1, -1, h.shape[1] - P, -1)                          # (B, 6, R, D)
        vectors = torch.cat([patches, registers], 2)                                          # (B, 6, N, D)
        # DiT puts each gate behind its shift and scale; the published checkpoints have both gates first.
        gate_msa, gate_mlp, shift_msa, scale_msa, shift_mlp, scale_mlp = vectors.unbind(1)  # each (B, N, D)
        # addcmul(h, gate, y) is h + gate * y, as one operation.
        y = self.attention(modulate(self.norm(h), shift_msa, scale_msa))                         # (B, N, D)
        h = torch.addcmul(h, gate_msa, y)                                                        # (B, N, D)
        y = self.mlp(modulate(self.norm(h), shift_mlp, scale_mlp))                               # (B, N, D)
        return torch.addcmul(h, gate_mlp, y)                                                     # (B, N, D)


class GPTBlock(Block):
    """The causal block of the GPT, for text with cross-attention.

    F31  h <- h + attention(norm(h)), causal; h <- h + cross(norm(h), text); h <- h + mlp(norm(h))

    reported: RMSNorm, SwiGLU, learned positions, 12 D^2 numbers a block and with text 16 D^2. our choice: the
    norm has no gain, queries and keys no norm.
    """

    def __init__(self, D, d, cross):
        super().__init__(D, d)
        self.norm = nn.RMSNorm(D, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(D, d, qk_norm=False)
        self.cross = Attention(D, d, qk_norm=False) if cross else None

    def forward(self, h, text, kv_cache=None):
        """h (B, N, D) and the text, (keys and values, mask) or None; returns h and the new kv_cache.

        kv_cache: keys and values of the positions before h, which is then one position; None: there are none.
        """
        x = self.norm(h)                                                                         # (B, N, D)
        kv = self.attention.keys_values(x)                                               # each (B, H, N, d)
        if kv_cache:
            kv = [torch.cat(pair, 2) for pair in zip(kv_cache, kv)]                      # each (B, H, M, d)
        h = h + self.attention(x, kv, causal=not kv_cache)                                       # (B, N, D)
        if text:
            h = h + self.cross(self.norm(h), *text)                                              # (B, N, D)
        return h + self.mlp(self.norm(h)), kv                                      # (B, N, D), (B, H, M, d)


# --- Model -------------------------------------------------------------------


class FSQ(nn.Module):
    """Finite scalar quantisation: each of Q numbers is rounded to one of L levels, its digit of the id.

    F10  b = half tanh(z + atanh(offset / half)) - offset; half = 1.001 (L - 1) / 2; offset = 1/2 if L is even
    F11  value = round(b) / floor(L / 2), in [-1, 1]; its gradient is that of b / floor(L / 2)
    F12  id = sum_j digit_j L_1 ... L_(j-1), digit_j = round(b_j) + floor(L_j / 2)
    F13  digit_j = floor(id / (L_1 ... L_(j-1))) mod L_j, value_j = digit_j / floor(L_j / 2) - 1

    Nothing to learn, no loss of its own. The offset, 0 for odd L, keeps z = 0 at value 0; without the 1.001
    its atanh would be infinite at L = 2.
    """

    def __init__(self, levels):
        super().__init__()
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", self.levels.cumprod(0) // self.levels, persistent=False)

    def forward(self, z):
        """z (B, R, Q) to values and ids."""
        # In bf16 ids would change.
        z = z.to(torch.promote_types(z.dtype, torch.float32))                                    # (B, R, Q)
        half = (self.levels - 1) * (1 + 1e-3) / 2                                                      # (Q)
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)                                           # (Q)
        b = half * torch.tanh(z + torch.atanh(offset / half)) - offset                           # (B, R, Q)
        digits = b.detach().round().long() + self.levels // 2                                    # (B, R, Q)
        # Straight through: the value of round(b), the gradient of b.
        rounded = b + (b.round() - b).detach()                                                   # (B, R, Q)
        return rounded / (self.levels // 2), (digits * self.basis).sum(-1)               # (B, R, Q), (B, R)

    def values(self, ids):
        """The inverse: ids (B, R) to values (F13)."""
        digits = ids[..., None] // self.basis % self.levels                                      # (B, R, Q)
        return (digits - self.levels // 2) / (self.levels // 2)                                  # (B, R, Q)


def initialise(module, std=0.02):
    """Truncated normal vectors and tables (official: s.d. .02), Xavier-uniform matrices, zero biases."""
    # Vectors that belong to no layer first, then layers: on the order depends what numbers a seed gives.
    for child in sorted(module.modules(), key=lambda child: isinstance(child, (nn.Linear, nn.Embedding))):
        for weight in child.parameters(recurse=False):
            if not isinstance(child, nn.Linear):                # registers, positions, mask, tables
                nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
            elif weight.ndim > 1:                               # a matrix
                nn.init.xavier_uniform_(weight)
            else:                                               # a bias
                nn.init.zeros_(weight)


class Encoder(nn.Module):
    """Images to Q numbers a register. Registers differ in nothing but their start and what they see.

    F4  h = [W_p patches + b_p + pos ; registers]: learned vectors stand behind the patches
    F5  i sees j if j is a patch or j <= i: patches see patches, register i patches and registers 1 to i
    F9  z = W_z norm(h of the registers) + b_z; W_z and b_z start at zero

    By F5 the first k tokens do not depend on how many are asked for. By F9 all images have the same ids at
    first. What starts at zero lets no gradient through, so layers begin to learn one step after another: W_v
    (F19), the decoder's modulation, W_z, the encoder's blocks, W_r (F14).
    """

    def __init__(self, cfg):
        super().__init__()
        n = cfg.size // cfg.patch
        D = cfg.encoder * cfg.head
        self.p = cfg.patch
        self.embed = nn.Linear(cfg.patch ** 2 * cfg.channels, D)
        self.registers = nn.Parameter(torch.empty(cfg.registers, D))
        self.blocks = nn.ModuleList(Block(D, cfg.head) for _ in range(cfg.encoder))
        self.norm = nn.LayerNorm(D, **NORM)
        self.head = nn.Linear(D, len(parse_levels(cfg.levels)))
        self.register_buffer("pos_embed", sincos_pos_embed(n, D, cfg.base), persistent=False)
        place = torch.arange(n * n + cfg.registers)
        mask = (place < n * n) | (place <= place[:, None])          # mask[i, j]: i sees j
        self.register_buffer("mask", mask, persistent=False)
        initialise(self, cfg.std)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        """Images or latents (B, C, h, w) to z (B, R, Q)."""
        patches = self.embed(patchify(x, self.p)) + self.pos_embed                               # (B, P, D)
        registers = self.registers.expand(len(x), -1, -1)                                        # (B, R, D)
        h = torch.cat([patches, registers], 1)                                                 # (B, P+R, D)
        for block in self.blocks:
            # Nobody reads the patches that would leave the last block.
            first = patches.shape[1] if block is self.blocks[-1] else 0
            h = block(h, self.mask, first)                                                       # (B, N, D)
        return self.head(self.norm(h))                                                           # (B, R, Q)


def timestep_embedding(t, T):
    """Flow times t (B,) as cosines and sines (F17)."""
    j = torch.arange(128, device=t.device).type_as(t)                                                # (128)
    frequency = 1000 / T * 256.0 ** -(j / 128)                                                       # (128)
    angle = t[:, None] * frequency                                                                # (B, 128)
    return torch.cat([angle.cos(), angle.sin()], 1)                                               # (B, 256)


class Decoder(nn.Module):
    """Noised images, flow time and a prefix of tokens to the velocity.

    F14  r_i = W_r value_i + b_r + pos_i, learned positions
    F15  r_i <- mask for i > k: nested dropout; one vector replaces token and position, nothing is cut off;
         k = 2^j, j uniform on 0, 1 ... log2 R (pow2), or k uniform on 1, 2 ... R
    F16  r_i <- null for all i of an image without tokens, so that it is alike at every k, as guidance needs
    F17  tau = MLP([cos(t f), sin(t f)]), f_j = (1000 / T) 256^(-j / 128), j < 128
    F19  v = unpatchify(W_v (norm(h) * (1 + scale) + shift) + b_v) of the patches; a linear layer makes shift
         and scale of silu(tau); both layers start at zero

    With the published T = 1000 no angle of F17 exceeds 1: a smooth code.
    """

    def __init__(self, cfg):
        super().__init__()
        D = cfg.decoder * cfg.head
        patch_size = cfg.patch ** 2 * cfg.channels
        self.p, self.T, self.repa_layer = cfg.patch, cfg.max_time, cfg.repa_layer
        self.read = nn.Linear(len(parse_levels(cfg.levels)), D)
        self.embed = nn.Linear(patch_size, D)
        self.token_position = nn.Parameter(torch.empty(cfg.registers, D))
        self.mask, self.null = (nn.Parameter(torch.empty(D)) for _ in range(2))
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.blocks = nn.ModuleList(DecoderBlock(D, cfg.head) for _ in range(cfg.decoder))
        self.norm = nn.LayerNorm(D, **NORM)
        self.modulation = nn.Linear(D, 2 * D)
        self.head = nn.Linear(D, patch_size)
        pos_embed = sincos_pos_embed(cfg.size // cfg.patch, D, cfg.base)
        self.register_buffer("pos_embed", pos_embed, persistent=False)
        initialise(self, cfg.std)
        for linear in (self.modulation, self.head, *(block.modulation for block in self.blocks)):
            nn.init.zeros_(linear.weight)

    def tokens(self, values, num_tokens, no_tokens):
        """Inputs r (B, R, D), F14 to F16: values (B, R, Q), num_tokens k (B,), no_tokens (B,) bool."""
        r = self.read(values) + self.token_position                                              # (B, R, D)
        dropped = torch.arange(r.shape[1], device=r.device) >= num_tokens[:, None]                  # (B, R)
        r = torch.where(dropped[..., None], self.mask, r)                                        # (B, R, D)
        return torch.where(no_tokens[:, None, None], self.null, r)                               # (B, R, D)

    def forward(self, x, t, values, num_tokens, no_tokens):
        """Of x (B, C, h, w), t (B,) and tokens the velocity, and the patches behind block `repa_layer`."""
        tau = self.time(timestep_embedding(t, self.T))                                              # (B, D)
        patches = self.embed(patchify(x, self.p)) + self.pos_embed                               # (B, P, D)
        P = patches.shape[1]
        early = None
        h = torch.cat([patches, self.tokens(values, num_tokens, no_tokens)], 1)                # (B, P+R, D)
        for i, block in enumerate(self.blocks):
            h = block(h, tau, P)                                                               # (B, P+R, D)
            if i == self.repa_layer:
                early = h[:, :P]                                                                 # (B, P, D)
        shift, scale = self.modulation(F.silu(tau))[:, None].chunk(2, -1)             # (B, 1, D), (B, 1, D)
        v = self.head(self.norm(h[:, :P]) * (1 + scale) + shift)                             # (B, P, p*p*C)
        return unpatchify(v, self.p, *x.shape[2:]), early                          # (B, C, h, w), (B, P, D)


class Tokenizer(nn.Module):
    """Encoder, FSQ, decoder and, for training alone, the head that predicts S features of a teacher (F23)."""

    def __init__(self, cfg, S=0):
        super().__init__()
        D = cfg.decoder * cfg.head
        self.repa = cfg.repa
        self.encoder = Encoder(cfg)
        self.fsq = FSQ(parse_levels(cfg.levels))
        self.decoder = Decoder(cfg)
        self.align = nn.Identity()
        if S:
            # official code differs: its head of this form starts at zero, where torch's cosine, which divides
            # by 10^-8 instead of a length of 0, has a gradient of some 10^7.
            self.align = nn.Sequential(nn.LayerNorm(D, **NORM), nn.Linear(D, 4 * D), nn.SiLU(),
                                       nn.Linear(4 * D, 4 * D), nn.SiLU(), nn.Linear(4 * D, S))
        initialise(self.align)

    def tokenize(self, x):
        """Ids (B, R) of images (B, C, h, w)."""
        return self.fsq(self.encoder(x))[1]                                                         # (B, R)


# Three ways to tell the GPT what to write. A class gives a vector (B, D); a text gives states (B, L, S) and a
# mask (B, 1, 1, L), True where there is a word.


class ClassCondition(nn.Module):
    """Labels (B,) of K classes to vectors (B, D); -1, which is no class and has no row in the table, to 0."""

    def __init__(self, K, D):
        super().__init__()
        self.table = nn.Embedding(K, D)

    def forward(self, labels):
        vectors = self.table(labels.clamp(min=0))                                                   # (B, D)
        return torch.where(labels[:, None] >= 0, vectors, 0.0)                                      # (B, D)


class TextCondition(nn.Module):
    """Ids (B, L) of K words, 0 for padding, read by two blocks that stand in for the paper's FLAN-T5-XL."""

    def __init__(self, K, L, D, d):
        super().__init__()
        self.table = nn.Embedding(K, D)
        self.position = nn.Parameter(torch.empty(L, D))
        self.blocks = nn.ModuleList(Block(D, d) for _ in range(2))

    def forward(self, ids):
        mask = ids[:, None, None] > 0                                                         # (B, 1, 1, L)
        states = self.table(ids) + self.position                                                 # (B, L, D)
        for block in self.blocks:
            states = block(states, mask)                                                         # (B, L, D)
        return states, mask                                                        # (B, L, D), (B, 1, 1, L)


class StateCondition(nn.Module):
    """States (B, L, S) that a frozen text encoder has written to a file; vectors of zeros are padding."""

    def forward(self, states):
        return states, states.abs().amax(-1)[:, None, None] > 0                    # (B, L, S), (B, 1, 1, L)


class GPT(nn.Module):
    """Causal transformer over the R ids.

    F29  p(ids | condition) = prod_i p(id_i | id_1 ... id_(i-1), condition)
    F30  first input = start + pos_1 + class vector; without a class the start vector stands alone
    F32  text = W_2 gelu(W_1 states); every block looks at it by cross-attention

    It always learns whole sequences and knows no end: whoever samples decides when to stop.
    names: the classes, or the words known. empty: the condition that says nothing.
    """

    def __init__(self, cfg, names, empty):
        super().__init__()
        D = cfg.gpt * cfg.head
        V = math.prod(parse_levels(cfg.levels))
        self.names = names
        self.is_text = cfg.condition == "text"
        self.register_buffer("empty", empty.clone())
        self.table = nn.Embedding(V, D)
        self.head = nn.Linear(D, V, bias=False)
        self.start = nn.Parameter(torch.empty(D))
        self.position = nn.Parameter(torch.empty(cfg.registers, D))
        S = empty.shape[-1] if cfg.text else D
        # A class has no use for it. Drawn all the same, it keeps what numbers a seed gives to all the rest.
        text = nn.Sequential(nn.Linear(S, S, bias=False), nn.GELU("tanh"), nn.Linear(S, D, bias=False))
        self.text = text if self.is_text else None
        if not self.is_text:
            self.condition = ClassCondition(len(names), D)
        elif cfg.text:
            self.condition = StateCondition()
        else:
            # Four ids come before the words: padding, start, end, unknown.
            self.condition = TextCondition(4 + len(names), len(empty), D, cfg.head)
        self.blocks = nn.ModuleList(GPTBlock(D, cfg.head, self.is_text) for _ in range(cfg.gpt))
        self.norm = nn.RMSNorm(D, eps=1e-6, elementwise_affine=False)
        initialise(self)
        nn.init.uniform_(self.table.weight, -0.1, 0.1)
        nn.init.uniform_(self.start, -0.1, 0.1)
        if not self.is_text:
            nn.init.uniform_(self.condition.table.weight, -0.1, 0.1)

    def encode_condition(self, cond):
        """The first input (B, 1, D), and for each block the text's (keys and values, mask), or None."""
        start = self.start.expand(len(cond), 1, -1)                                              # (B, 1, D)
        if not self.is_text:
            return start + self.condition(cond)[:, None], [None] * len(self.blocks)
        states, mask = self.condition(cond)                                        # (B, L, S), (B, 1, 1, L)
        text = self.text(states.to(start.dtype))                                                 # (B, L, D)
        return start, [(block.cross.keys_values(text), mask) for block in self.blocks]

    def forward(self, ids, cond):
        """Logits (B, R, V) of every id given those before it: the plain form, without a cache."""
        start, texts = self.encode_condition(cond)                                 # (B, 1, D), (B, H, L, d)
        h = torch.cat([start, self.table(ids[:, :-1])], 1)                                       # (B, N, D)
        return self.decode_step(h, 0, texts, [None] * len(texts))                                # (B, N, V)

    def decode_step(self, h, i, texts, kv_cache):
        """Logits behind inputs h (B, N, D) at position i and on; kv_cache, an entry a block, grows."""
        h = h + self.position[i:i + h.shape[1]]                                                  # (B, N, D)
        for j, block in enumerate(self.blocks):
            h, kv_cache[j] = block(h, texts[j], kv_cache[j])
        return self.head(self.norm(h))                                                           # (B, N, V)


# --- Objective ---------------------------------------------------------------

# F20  x_t = t noise + (1 - t) x: t = 1 is noise, t = 0 the image
# F21  t = 1 - u - s (cos^2(pi u / 2) - 1 + u), s = 1/4, u uniform: SD3's mode law, FlexTok's published
# F22  L_flow = mean |v(x_t, t, tokens 1 to k) - (noise - x)|^2
# F23  L_REPA = -mean_patches cos(MLP(patch after an early block), teacher's feature of the image there)
# F24  L = L_flow + repa L_REPA; the encoder learns through the FSQ alone


def nested_lengths(u, R, law, whole=0.0):
    """Uniform draws u (B,) in [0, 1) to numbers k of tokens kept, for every image its own (F15).

    pow2 is published. It practises short prefixes: half of its k are at most sqrt(R). our choice for short
    runs: a share `whole` of the images keeps all R besides, for what is rarely shown is learned late.
    """
    u = (u / (1 - whole)).clamp(max=1)                          # 1: beyond the law                    # (B)
    if law == "pow2":
        k = 2 ** (u * R.bit_length()).long()                    # log2(R) + 1 powers of two            # (B)
    else:
        k = 1 + (u * R).long()                                                                         # (B)
    return k.clamp(max=R)                                                                              # (B)


def flow_time(u, law, shift=1.0):
    """Uniform draws u (B,) to flow times t (F21); ndtri makes uniform draws normal.

    our choice for short runs: SD3's shift towards noise. There the tokens alone tell what the image is, so
    they learn most.
    """
    if law == "mode":
        t = 1 - u - 0.25 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)                                   # (B)
    elif law == "logit-normal":
        t = torch.special.ndtri(u).sigmoid()                                                           # (B)
    else:
        t = 1 - u                                                                                      # (B)
    return shift * t / (1 + (shift - 1) * t)                                                           # (B)


def loss_tokenizer(model, x, draws, teacher=None):
    """The loss (F20 to F24) of images or latents x (B, C, h, w) and its parts.

    draws: "time" (B,), "noise" like x, "num_tokens" (B,), "no_tokens" (B,) bool: decoded without tokens;
    "images" for the teacher, images -> features (B, S, g, g): x itself, or what the latents x are of.
    """
    t = draws["time"]
    noise = draws["noise"]
    values, _ = model.fsq(model.encoder(x))
    noised = torch.lerp(x, noise, t.view(-1, 1, 1, 1))                                        # (B, C, h, w)
    v, patches = model.decoder(noised, t, values, draws["num_tokens"], draws["no_tokens"])
    flow = (v.to(x.dtype) - (noise - x)).square().mean()
    if teacher is None:
        return flow, {"flow": flow}
    # our choice: features are resized to the grid of patches, not both to one of 37 x 37.
    n = math.isqrt(patches.shape[1])
    features = F.interpolate(teacher(draws["images"]), (n, n), mode="bilinear")               # (B, S, n, n)
    features = features.flatten(2).transpose(1, 2)                                               # (B, P, S)
    cosine = F.cosine_similarity(model.align(patches).to(x.dtype), features, dim=-1).mean()
    return flow - model.repa * cosine, {"flow": flow, "cosine": cosine}


def loss_ar(model, batch, draws):
    """Cross-entropy (F29) of ids (B, R) given conditions; draws: "drop" (B,) bool, who loses theirs."""
    ids, cond = batch
    drop = draws["drop"].view(-1, *[1] * (cond.ndim - 1))
    cond = torch.where(drop, model.empty, cond)
    logits = model(ids, cond).to(model.start.dtype)                                              # (B, R, V)
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten()), {}


# --- Sampling ----------------------------------------------------------------

# F25  x <- x - v(x, t) / n for t = 1, (n - 1) / n ... 1 / n (num_steps), from x = noise; v points from image
#      to noise
# F26  CFG: v + (g - 1) diff, diff = v - v_null: velocities with tokens and without
# F27  APG: diff <- diff - 1/2 (that of the last step, uncut), then cut to a length of 2.5; v + (g - 1) times
#      its part orthogonal to v, for the part parallel to v would oversaturate
# F28  a prefix id_1 ... id_k is filled up with any ids; the mask then replaces them (F15)
# F33  logits = free + g (told - free), with the condition and without; then temperature, top-k, top-p, a draw


def guidance_scale(cfg, t):
    """g at flow time t. our choice of schedules: g throughout, or 1 at t = 1 (noise) rising to g at t = 0."""
    rise = {"constant": 1, "linear": 1 - t, "cosine": math.cos(math.pi / 2 * t)}
    return 1 + (cfg.cfg_scale - 1) * rise[cfg.cfg_schedule]


def classifier_free_guidance(v, v_null, scale):
    """Guided velocities (F26). our choice: added up in float64."""
    return (v.double() + (scale - 1) * (v - v_null).double()).to(v.dtype)                     # (B, C, h, w)


def adaptive_projected_guidance(v, v_null, scale, last_diff, threshold=2.5):
    """Guided velocities (F27), projected in float64, and the diff that the next step wants as last_diff."""
    diff = v - v_null - 0.5 * last_diff                                                       # (B, C, h, w)
    length = diff.flatten(1).norm(dim=1).view(-1, 1, 1, 1)                                    # (B, 1, 1, 1)
    cut = (diff * (threshold / length).clamp(max=1)).double()                                 # (B, C, h, w)
    v64 = v.double()
    squared = v64.square().sum((1, 2, 3), True).clamp(min=1e-30)                              # (B, 1, 1, 1)
    parallel = (cut * v64).sum((1, 2, 3), True) / squared * v64                               # (B, C, h, w)
    orthogonal = cut - parallel                                                               # (B, C, h, w)
    return (v64 + (scale - 1) * orthogonal).to(v.dtype), diff                   # (B, C, h, w), (B, C, h, w)


def velocities(decoder, x, t, values, num_tokens):
    """The velocities with tokens and without, in one call."""
    second = torch.arange(2 * len(x), device=x.device) >= len(x)                                      # (2*B)
    v, _ = decoder(x.repeat(2, 1, 1, 1), t.repeat(2), values.repeat(2, 1, 1), num_tokens.repeat(2), second)
    return v.chunk(2)


@torch.no_grad()
def sample(model, noise, ids, cfg):
    """Images from noise (B, C, h, w) and prefixes of tokens (B, k), k <= R. The cost does not depend on k."""
    B, k = ids.shape
    R = len(model.decoder.token_position)
    values = model.fsq.values(F.pad(ids, (0, R - k))).to(noise.dtype)                            # (B, R, Q)
    num_tokens = torch.full((B,), k, device=ids.device)                                                # (B)
    no_tokens = torch.zeros(B, dtype=torch.bool, device=ids.device)                                    # (B)
    # our choice: the threshold stays in proportion to the noise. The official code's 2.5 is meant for latents
    # of 16 x 32 x 32 numbers, whose noise is 128 long.
    threshold = 2.5 * noise[0].numel() ** 0.5 / 128
    x = noise
    diff = torch.zeros_like(noise)
    for i in range(cfg.num_steps, 0, -1):
        t = noise.new_full((B,), i / cfg.num_steps)                                                    # (B)
        scale = guidance_scale(cfg, i / cfg.num_steps)
        if scale == 1:
            v, _ = model.decoder(x, t, values, num_tokens, no_tokens)
        else:
            v, v_null = velocities(model.decoder, x, t, values, num_tokens)
            if cfg.apg:
                v, diff = adaptive_projected_guidance(v, v_null, scale, diff, threshold)
            else:
                v = classifier_free_guidance(v, v_null, scale)
        x = x - v / cfg.num_steps                                                             # (B, C, h, w)
    return x


@torch.no_grad()
def generate(model, cond, u, cfg):
    """Ids (B, k) for conditions, with a key-value cache (F33). Uniform u (B, k): u[:, i] draws token i."""
    guided = cfg.cfg_scale_ar != 1
    if guided:
        cond = torch.cat([cond, model.empty.expand_as(cond)])
    h, texts = model.encode_condition(cond)
    kv_cache = [None] * len(texts)
    ids = []
    for i in range(u.shape[1]):
        logits = model.decode_step(h, i, texts, kv_cache)[:, 0]
        if guided:
            told, free = logits.chunk(2)                                                    # (B, V), (B, V)
            logits = free + cfg.cfg_scale_ar * (told - free)                                        # (B, V)
        logits = common.filter_logits(logits, cfg.temperature, cfg.top_k, cfg.top_p)
        ids.append(common.invert_distribution(logits, u[:, i]))
        h = model.table(ids[-1])[:, None]
        if guided:
            h = h.repeat(2, 1, 1)
    return torch.stack(ids, 1)                                                                      # (B, k)


# --- Training ----------------------------------------------------------------

# Width, heads and depth are one number, as in the paper: 12 blocks of 12 heads of 64 channels are "d12". The
# demo's images are 12 pixels wide, in 9 patches: few but wide tokens learn more in a minute than 36 of 64
# channels. What else three minutes need: Muon for AdamW (paper unknown), three of four images decoded from
# all tokens (k = 1 pays for it), positions that differ in every channel, two Euler steps under little and
# plain guidance (more of either wants a decoder trained for longer), few ids, and a cool GPT.
# Presets of the paper train one stage; the GPT's on tokens of the largest tokenizer, for the reported 300
# epochs. paper unknown: precision, and all that Config calls so.
PAPER = dict(data="latents:imagenet256.npz", stage="tokenizer", teacher="dinov2.pt2", bf16=True)
PAPER_AR = dict(PAPER, stage="ar", encoder=18, decoder=28, steps=375_000)
PAPER_TEXT = dict(PAPER_AR, condition="text", text="t5-xl.npy", cfg_scale_ar=3.0)
PRESETS = {
    "demo": dict(size=12, channels=3, flip=False, crop=1.0, crops=1, patch=4, registers=8,
                 levels="4,4,4,4,4,4", encoder=2, decoder=2, gpt=2, head=48, std=0.5, whole=0.75, null=0.05,
                 shift=8.0, base=10.0, repa=0.0, steps=5200, steps_ar=700, batch=16, batch_ar=64, lr=2e-3,
                 lr_ar=3e-3, muon=3.0, warmup=0.025, ema=0.995, num_steps=2, cfg_scale=1.5,
                 cfg_schedule="linear", apg=False, cfg_scale_ar=3.0, temperature=0.4, save=1000),
    # CIFAR-10 for one GPU; planned for under an hour, not yet run
    "small": dict(data="cifar10", channels=3, registers=64, encoder=6, decoder=6, gpt=6, steps=40_000,
                  steps_ar=20_000, batch=128, ema=0.999, cfg_scale=2.0)}
PRESETS |= {f"d{e}-d{d}": dict(PAPER, encoder=e, decoder=d) for e, d in ((12, 12), (18, 18), (18, 28))}
# our choice: muP's rule for matrices, a rate in inverse proportion to the width.
PRESETS |= {f"ar-d{n}": dict(PAPER_AR, gpt=n, lr_ar=1.2e-3 * 10 / n) for n in (10, 12, 16, 20, 24, 30)}
PRESETS |= {f"ar-text-d{n}": dict(PAPER_TEXT, gpt=n, lr_ar=1.2e-3 * 10 / n) for n in (12, 18, 26, 36)}
# Error at most, accuracy at least: mean and 4 s.d. of seeds 0 to 4 (.0219 .0189 .0183 .0191 .0206; .800 .852
# .872 .836 .816; .674 .702 .760 .682 .680). One thread of a busy machine: 212 to 250 CPU seconds a run.
TARGET = {"error": 0.026, "k=8": 0.72, "samples": 0.56}
SHORT_RUN = 100     # a run of fewer steps only tries the code: its judge stays untrained
OF_DATA = ("condition.table.weight", "condition.position", "empty")     # a GPT has them of its data

def draw_index(dataset, cfg, step, stage):
    """A step's images, index (B,), and four uniform draws (B,): for all ranks, cut to this rank's share."""
    cpu_generator = common.make_generator(cfg.seed, step, f"{stage} data")
    B = common.batch_size(cfg, stage)
    index = torch.randint(len(dataset), (B,), generator=cpu_generator)
    # Of five columns four are used; another number would change what numbers a seed gives.
    u = torch.rand(B, 5, generator=cpu_generator)
    return common.shard(index).numpy(), common.shard(u).unbind(1)[:4]


def posterior_noise(dataset, cfg, step, stage, device):
    """The noise (B, C, h, w) of a step's latents (F1), for this rank; 0 where nothing is to be drawn."""
    if dataset.logvar is None:
        return 0.0
    shape = (common.batch_size(cfg, stage), *dataset.images.shape[1:])
    return common.shard_noise(shape, cfg.seed, step, f"{stage} posterior", device)


def read_images(dataset, index, flip, noise, device):
    """Images or latents x (B, C, h, w) of index (B,) on the device, mirrored where `flip` (B,)."""
    if dataset.latent:
        x = dataset.latents(index, flip.numpy(), noise, device)
    else:
        x = mirror(dataset.pixels(index, device), flip.to(device))
    return x.to(torch.get_default_dtype())                                                    # (B, C, h, w)


def mirror(x, flip):
    """Images x (B, C, h, w), of which those of `flip` (B,) are mirrored."""
    return torch.where(flip[:, None, None, None], x.flip(-1), x)                              # (B, C, h, w)


def draw(dataset, cfg, step, device):
    """One step's images, and the draws that loss_tokenizer names."""
    index, (u_flip, u_time, u_length, u_null) = draw_index(dataset, cfg, step, "tokenizer")
    flip = (u_flip < 0.5) & cfg.flip
    if dataset.latent:
        flip &= dataset.mean_flip is not None
    drawn = posterior_noise(dataset, cfg, step, "tokenizer", device)
    x = read_images(dataset, index, flip, drawn, device)
    noise = common.shard_noise((cfg.batch, *x.shape[1:]), cfg.seed, step, "tokenizer noise", device)
    draws = {"time": flow_time(u_time, cfg.time, cfg.shift), "noise": noise, "no_tokens": u_null < cfg.null,
             "num_tokens": nested_lengths(u_length, cfg.registers, cfg.nested, cfg.whole)}
    draws = {name: value.to(device) for name, value in draws.items()}
    draws["images"] = x
    if dataset.latent and cfg.repa:
        draws["images"] = mirror(dataset.pixels(index, device), flip.to(device))
    return x, draws


def random_crops(x, factor, u_row, u_column):
    """Images enlarged by a factor, then cut to their old size, each at its own place."""
    n = x.shape[-1]
    side = round(factor * n)
    if side == n:
        return x
    x = F.interpolate(x, (side, side), mode="bilinear")
    rows = (u_row * (side - n + 1)).long().tolist()
    columns = (u_column * (side - n + 1)).long().tolist()
    return torch.stack([image[:, i:i + n, j:j + n] for image, i, j in zip(x, rows, columns)])


@torch.no_grad()
def encode_crops(tokenizer, dataset, cfg, index, u, noise):
    """Ids (B, R) of images `index` (B,), mirrored and cropped by uniform draws u, three of (B,).

    Latents get no crop: their file may hold those of ten crops of each image.
    """
    u_flip, u_row, u_column = u
    flip = (u_flip < 0.5) & cfg.flip
    x = read_images(dataset, index, flip, noise, common.device_of(cfg))
    if not dataset.latent:
        x = random_crops(x, cfg.crop, u_row, u_column)
    with common.autocast(cfg):
        return tokenizer.tokenize(x)                                                                # (B, R)


def store_tokens(tokenizer, dataset, cfg, run):
    """Ids (M * crops, R) in a file of the run, where row i * crops + c is crop c of image i; or None.

    reported: GPTs learn from the tokens of ten crops of each image, encoded once. A run that draws fewer
    images than that would be encodes those that it draws.
    """
    count = len(dataset) * cfg.crops
    if count == 0 or run.total * common.batch_size(cfg, "ar") < count:
        return None
    kind = torch.uint16 if math.prod(parse_levels(cfg.levels)) <= 2 ** 16 else torch.int32

    def encode(first, last):
        cpu_generator = common.make_generator(cfg.seed, first, "crops")
        ids = []
        for rows in torch.arange(first, last).split(32):        # few enough for a processor's cache
            noise = 0.0
            if dataset.logvar is not None:
                noise = torch.randn(len(rows), *dataset.images.shape[1:], generator=cpu_generator)
            u = torch.rand(3, len(rows), generator=cpu_generator)
            ids.append(encode_crops(tokenizer, dataset, cfg, rows.numpy() // cfg.crops, u, noise))
        return torch.cat(ids).to(kind).cpu()

    # All that a row depends on.
    names = ("data", "objects", "size", "seed", "flip", "crop", "crops", "bf16")
    recipe = [common.fingerprint(tokenizer.encoder), *(getattr(cfg, name) for name in names)]
    return common.stored_rows(run.folder / "tokens.npy", encode, count, repr(recipe), size=512)


def draw_ar(tokenizer, dataset, stored, conditions, cfg, step, device):
    """One step's ids and conditions, and the draws that loss_ar names; stored: of store_tokens."""
    index, (*u, u_drop) = draw_index(dataset, cfg, step, "ar")
    if stored is None:
        noise = posterior_noise(dataset, cfg, step, "ar", device)
        ids = encode_crops(tokenizer, dataset, cfg, index, u, noise)
    else:
        rows = index * cfg.crops + (u[0] * cfg.crops).long().numpy()
        ids = torch.from_numpy(stored[rows].astype(np.int64)).to(device)
    cond = torch.from_numpy(np.array(conditions[index])).to(device)
    return (ids, cond), {"drop": (u_drop < cfg.label_dropout).to(device)}


def learning_rate(cfg, step, stage="tokenizer"):
    """Linear warm-up from 1 % of the peak (our choice; reported: from 1e-6), then a cosine to 1 %."""
    peak = cfg.lr if stage == "tokenizer" else cfg.lr_ar
    progress = step / (getattr(cfg, f"steps_{stage}") or cfg.steps)
    if progress < cfg.warmup:
        height = progress / cfg.warmup
    else:
        height = 0.5 + 0.5 * math.cos(math.pi * (progress - cfg.warmup) / (1 - cfg.warmup))
    return peak * (0.01 + 0.99 * height)


def optimizer(model, cfg, decay=0.01):
    """AdamW, gradients cut to a length of 1: reported for the GPT, with decay .05; else paper unknown."""
    adamw = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=decay, fused=True)
    blocks = nn.ModuleList(module for module in model.modules() if isinstance(module, Block))
    return common.with_muon(adamw, blocks, cfg.muon)


def open_teacher(cfg, dataset):
    """The frozen teacher, images (B, C, h, w) -> features (B, S, g, g), and S; None and 0 without REPA.

    Images are in [-1, 1]: a file of DINOv2 must itself bring them to the side and the colours it wants.
    """
    if not cfg.repa or cfg.stage == "ar":
        return None, 0
    device = common.device_of(cfg)
    channels, side, _ = dataset.pictures.shape[1:]
    if cfg.teacher != "judge":
        teacher = common.load_teacher(cfg.teacher, channels, side)
    elif (cfg.steps_tokenizer or cfg.steps) < SHORT_RUN:
        torch.manual_seed(0)
        teacher = common.Judge(channels, width=32, classes=1).requires_grad_(False).to(device).spatial
    else:
        teacher = common.judge(open_split(cfg, "judge"), "teacher").to(device).spatial
    return teacher, teacher(torch.zeros(1, channels, side, side, device=device)).shape[1]


def open_conditions(cfg, dataset):
    """What the GPT is told of every image (M, ...), names of classes or words, and what says nothing."""
    if cfg.condition == "class":
        return dataset.labels, dataset.classes, torch.tensor(-1)
    if cfg.text:
        states = read_states(cfg.text)
        wanted = len(dataset) + 1
        common.require(len(states) == wanted, f"--text {cfg.text}: holds {len(states)} states; {wanted} are "
                       "wanted, of the training captions, then of the empty one")
        return states, [], torch.tensor(states[-1]).float()
    common.require(dataset.captions, f"--condition text: {cfg.data} has no captions; give --text FILE.npy")
    split = [data.split_words(caption) for caption in dataset.captions]
    words = sorted({word for caption in split for word in caption})
    ids = encode_captions(["", *dataset.captions], words, 1 + max(map(len, split)))
    return ids[1:], words, torch.from_numpy(ids[0])


def encode_captions(captions, words, L):
    """Captions as word ids (M, L): the start, the words, zeros. UserError where one cannot be read."""
    vocabulary = data.Vocabulary(words)
    known = " ".join(words)
    rows = np.zeros((len(captions), L), np.int64)
    for row, caption in zip(rows, captions):
        ids = [data.START, *vocabulary.encode(caption)]
        common.require(data.UNKNOWN not in ids, f"unknown words in {caption!r}; known are: {known}")
        common.require(len(ids) <= L, f"a caption has {len(ids) - 1} words; at most {L - 1} are read")
        row[:len(ids)] = ids
    return rows


def read_states(path):
    """The caption states in FILE.npy, (M, L, S), memory-mapped."""
    with data.reading(f"--text {path}"):
        states = np.load(path, mmap_mode="r")
    fits = isinstance(states, np.ndarray) and states.ndim == 3 and states.dtype.kind == "f" and len(states)
    common.require(fits, f"--text {path}: must hold one array of floats (M, L, S), as np.save writes it")
    return states


def load_tokenizer(cfg, path):
    """The averaged tokenizer in a checkpoint of either stage, frozen."""
    saved = common.read_checkpoint(path, "flextok")
    name = "tokenizer" if "tokenizer" in saved["state"] else "ema"
    with data.reading(path):
        S = len(saved["state"][name].get("align.5.bias", ()))       # the last layer's; none without REPA
    tokenizer = Tokenizer(cfg, S).to(common.device_of(cfg)).requires_grad_(False)
    common.load_into({name: tokenizer}, saved, path)
    return tokenizer


def load_gpt(cfg, path):
    """The averaged GPT in a checkpoint of stage ar, frozen; None in one of stage tokenizer."""
    saved = common.read_checkpoint(path, "flextok")
    if "tokenizer" not in saved["state"]:
        return None
    with data.reading(path):
        gpt = GPT(cfg, saved["classes"], saved["state"]["ema"]["empty"])
    common.load_into({"ema": gpt}, saved, path)
    return gpt.to(common.device_of(cfg)).requires_grad_(False)


def init_name(cfg, stage):
    """What --init's checkpoint calls a stage's averaged weights; "" where there are none to begin with."""
    if not cfg.init:
        return ""
    both = "tokenizer" in common.read_checkpoint(cfg.init, "flextok")["state"]      # of stage ar
    if stage == "tokenizer":
        return "tokenizer" if both else "ema"
    return "ema" if both else ""


def train_tokenizer(cfg):
    """Stage 1: encoder and decoder together (F2 to F24)."""
    device = common.device_of(cfg)
    dataset = open_split(cfg, "train")
    teacher, S = open_teacher(cfg, dataset)
    run = common.Run(cfg, "tokenizer", classes=dataset.classes)
    run.seed_weights()
    model = Tokenizer(cfg, S).to(device)
    if run.begins:
        common.load_init(run, model, init_name(cfg, "tokenizer"))
    ema = copy.deepcopy(model).requires_grad_(False)
    opt = optimizer(model, cfg)
    start = run.restore(model=model, ema=ema, opt=opt)
    common.compile_blocks(cfg, [*model.encoder.blocks, *model.decoder.blocks])
    read = common.read_ahead(lambda step: draw(dataset, cfg, step, device), device, run.total)
    for step in run.steps(start):
        batch, draws = read(step)
        common.set_learning_rate(opt, learning_rate(cfg, step))
        opt.zero_grad()
        for part, part_draws in common.in_parts(cfg.accumulate, batch, draws):
            with common.autocast(cfg):
                value, losses = loss_tokenizer(model, part, part_draws, teacher)
            (value / cfg.accumulate).backward()
            run.add(loss=value, **losses)
        common.average_gradients(model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        common.ema_update(ema, model, cfg.ema)
        run.log(step)
        run.save(step)


def train_ar(cfg):
    """Stage 2: the GPT, on ids that the frozen tokenizer gives to images of draw_ar (F29 to F32)."""
    device = common.device_of(cfg)
    dataset = open_split(cfg, "train")
    tokenizer = load_tokenizer(cfg, cfg.tokenizer or common.require_stage(cfg, "tokenizer"))
    conditions, names, empty = open_conditions(cfg, dataset)
    run = common.Run(cfg, "ar", classes=names)                      # of a text run: the words, for load_gpt
    run.seed_weights()
    model = GPT(cfg, names, empty).to(device)
    if run.begins and init_name(cfg, "ar"):
        common.load_init(run, model, "ema", OF_DATA)
        model.empty.copy_(empty)
    ema = copy.deepcopy(model).requires_grad_(False)
    opt = optimizer(model, cfg, decay=0.05)
    start = run.restore(model=model, ema=ema, opt=opt, frozen={"tokenizer": tokenizer})
    common.compile_blocks(cfg, model.blocks)
    stored = store_tokens(tokenizer, dataset, cfg, run)
    draw_step = functools.partial(draw_ar, tokenizer, dataset, stored, conditions, cfg, device=device)
    read = common.read_ahead(draw_step, device, run.total)
    for step in run.steps(start):
        batch, draws = read(step)
        common.set_learning_rate(opt, learning_rate(cfg, step, "ar"))
        opt.zero_grad()
        for part, part_draws in common.in_parts(cfg.accumulate, batch, draws):
            with common.autocast(cfg):
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
    """One stage, or what is unfinished of both; 1 where the demo missed its target."""
    path = common.run_stages(cfg, STAGES)
    return report(cfg, path, path.parent) if common.rank() == 0 else 0


# --- Checks ------------------------------------------------------------------


def num_kept(cfg):
    """How many tokens --keep names; UserError."""
    number = str(cfg.registers) if cfg.keep == "all" else cfg.keep
    fine = number.isascii() and number.isdigit() and 1 <= int(number) <= cfg.registers
    common.require(fine, f"--keep {cfg.keep}: give all, or 1 to {cfg.registers}")
    return int(number)


def check(cfg):
    """Every mistake that can be seen without the data; UserError with one line."""
    require, R = common.require, cfg.registers
    require(cfg.head % 4 == 0, f"--head {cfg.head}: must be a multiple of 4")
    require(cfg.size % cfg.patch == 0, f"--size {cfg.size}: must be a multiple of --patch {cfg.patch}")
    fine = cfg.nested != "pow2" or R.bit_count() == 1
    require(fine, f"--registers {R}: --nested pow2 wants a power of 2")
    fine = not cfg.repa or cfg.repa_layer < cfg.decoder
    require(fine, f"--repa_layer {cfg.repa_layer}: not below --decoder {cfg.decoder}")
    parse_levels(cfg.levels)
    num_kept(cfg)
    if cfg.classes != "all":
        common.parse_classes(cfg.classes, 10 ** 9)      # the form alone; prepare knows how many there are
    require(cfg.prompt.strip(), "--prompt: is empty; give some words")
    require(not cfg.encode or not cfg.decode + cfg.export, "--encode: goes without --decode and --export")
    asked = cfg.encode + cfg.decode + cfg.export
    require(cfg.sample or not asked, "--encode, --decode and --export go with --sample CHECKPOINT")
    latent = cfg.data.startswith("latents:")
    require(not cfg.export or not latent, "--export: these are latents; decode them with their VAE")
    if not cfg.sample:
        words = cfg.condition == "text" and not cfg.text
        require(words or cfg.prompt == "captions", "--prompt: for a GPT that learns --condition text")
        require(cfg.condition == "class" or cfg.classes == "all", "--classes: goes with --condition class")
        require(cfg.condition == "text" or not cfg.text, "--text: goes with --condition text")
        require(cfg.stage == "ar" or not cfg.tokenizer, "--tokenizer: goes with --stage ar")


def open_split(cfg, split, count=20_000):
    """The data's 'train', 'test' or 'judge' split; UserError where it does not fit the configuration."""
    found = data.open_data(cfg.data, split, size=cfg.size, objects=(1, cfg.objects), count=count)
    shape = found.images.shape[1:]
    wanted = (cfg.channels, cfg.size, cfg.size)
    hint = " (the paper's VAE has 16 channels, Stable Diffusion's 4)" if found.latent else ""
    common.require(shape == wanted, f"{cfg.data}: {found.kind} {shape}; --channels, --size: {wanted}{hint}")
    return found


def prepare(cfg):
    """Once, before the processes start: downloads, packing, and all that a later step would refuse."""
    if cfg.sample:
        return
    common.require_memory(cfg, lambda: Tokenizer(cfg))
    dataset = open_split(cfg, "train")
    print(data.describe({"train": dataset, "test": open_split(cfg, "test", cfg.count)}), flush=True)
    if dataset.latent and cfg.repa and cfg.stage != "ar":
        sees = dataset.pictures is not None and cfg.teacher != "judge"
        common.require(sees, f"{cfg.data}: REPA's teacher sees images, not latents; add images, uint8 "
                       "(M, H, H, 3), to the file and give --teacher FILE, or --repa 0")
    if cfg.stage == "ar":
        check_tokenizer(cfg, cfg.tokenizer or common.require_stage(cfg, "tokenizer"))
    if cfg.stage != "tokenizer":
        _, names, empty = open_conditions(cfg, dataset)
        gpt = common.require_memory(cfg, lambda: GPT(cfg, names, empty))
        if not cfg.resume and init_name(cfg, "ar"):
            common.init_state(cfg, gpt, "ema", OF_DATA)
        wanted = cfg.stage == "all" or not cfg.init or cfg.resume or init_name(cfg, "ar")
        common.require(wanted, f"--init {cfg.init}: holds no GPT, with which --stage ar could begin")
        if cfg.condition == "class":
            common.parse_classes(cfg.classes, len(names))
        elif cfg.prompt != "captions":
            encode_captions([cfg.prompt], names, len(empty))
    _, S = open_teacher(cfg, dataset)                   # refuses a bad file, or trains the judge, once
    if cfg.stage != "ar" and cfg.init and not cfg.resume:
        tokenizer = common.require_memory(cfg, lambda: Tokenizer(cfg, S))
        common.init_state(cfg, tokenizer, init_name(cfg, "tokenizer"))


def check_tokenizer(cfg, path):
    """UserError where the tokenizer that stage ar builds on was trained at other settings."""
    stored = common.read_checkpoint(path, "flextok")["config"]
    for name in "size channels patch registers levels encoder decoder head base max_time".split():
        asked = getattr(cfg, name)
        common.require(stored.get(name) == asked, f"--{name} {asked}: {path} has {stored.get(name)}")


# --- Command line ------------------------------------------------------------


def plain_images(dataset, rows, device="cpu"):
    """Images (m, C, h, w) of a data set as they are.

    official code differs: it draws latents. Here they are means, so that an image has the same ids always.
    """
    unflipped = torch.zeros(len(rows), dtype=torch.bool)
    return read_images(dataset, np.asarray(rows), unflipped, torch.zeros(1), device)


def encode_rows(tokenizer, cfg, dataset, first, last):
    """The ids (m, R) of images first to last, under autocast where stage ar tokenizes under it."""
    x = plain_images(dataset, range(first, last), common.device_of(cfg))
    with common.autocast(cfg):
        return tokenizer.tokenize(x).cpu()


def encode_images(tokenizer, cfg, dataset, count):
    """The ids (M, R) of the first images of a data set, in blocks."""
    count = min(count, len(dataset))
    firsts = range(0, count, 100)
    return torch.cat([encode_rows(tokenizer, cfg, dataset, i, min(count, i + 100)) for i in firsts])


def decode_tokens(tokenizer, cfg, ids, first=0):
    """Images of token prefixes (M, k), numbered from `first`. Image i starts from the same noise at every k.

    official code differs: it decodes under bf16 autocast, this in fp32.
    """
    generator = common.make_generator(cfg.seed, first, "sample")
    rows = len(ids) + -len(ids) % 100                   # whole hundreds: so no noise depends on how many
    noise = torch.randn(rows, cfg.channels, cfg.size, cfg.size, generator=generator)[:len(ids)]
    return common.in_blocks(lambda n, i: sample(tokenizer, n, i, cfg), common.device_of(cfg), noise, ids)


def prefix_lengths(longest):
    """1, 2, 4 ... and the longest."""
    return sorted({2 ** i for i in range(longest.bit_length())} | {longest})


def show_prefixes(path, tokenizer, cfg, ids, names, *extra):
    """A picture: a row an image, a column a prefix length; extra columns: (title, function of the last)."""
    decode = functools.partial(decode_tokens, tokenizer, cfg)
    lengths = prefix_lengths(ids.shape[1])
    common.prefixes_png(path, decode, ids, lengths, names, lambda k, images: f"k={k}", extra)


def show_tokens(tokenizer, cfg, where):
    """prefixes.png and vocabulary.png; returns prefix lengths and the one-step error of each.

    vocabulary.png puts the first token of the column's image before the others of the row's. The error is the
    mean square of the decoder's first guess, one step from noise to image: a mean of what the tokens leave
    open, so it shows what k tokens know and nothing invented.
    """
    test = open_split(cfg, "test", cfg.count)
    x = plain_images(test, range(min(cfg.count, len(test))))
    ids = encode_images(tokenizer, cfg, test, cfg.count)
    names = [test.classes[label] for label in test.labels[:10]]
    show_prefixes(where / "prefixes.png", tokenizer, cfg, ids[:10], names, ("image", lambda last: x[:10]))
    n = min(6, len(x))
    columns = []
    for j in range(n):
        swapped = torch.cat([ids[j, :1].expand(n, 1), ids[:n, 1:]], 1)
        columns.append(torch.cat([x[j:j + 1], decode_tokens(tokenizer, cfg, swapped)]))
    common.columns_png(where / "vocabulary.png", columns, rows=["first token", *names[:n]])
    once = dataclasses.replace(cfg, num_steps=1, cfg_scale=1.0)
    lengths = prefix_lengths(cfg.registers)
    return lengths, [(decode_tokens(tokenizer, once, ids[:, :k]) - x).square().mean().item() for k in lengths]


def chosen_conditions(gpt, cfg):
    """Conditions (m, ...) that --classes, --text or --prompt name, taken in turn, and their names."""
    if cfg.condition == "class":
        labels = common.parse_classes(cfg.classes, len(gpt.names))
        return np.array(labels), [gpt.names[label] for label in labels]
    if cfg.text:
        states = read_states(cfg.text)
        shape = tuple(gpt.empty.shape)
        fits = states.shape[1:] == shape
        common.require(fits, f"--text {cfg.text}: states {states.shape[1:]}; the GPT reads {shape}")
        return states, [f"row {i}" for i in range(len(states))]
    texts = open_split(cfg, "test", cfg.count).captions if cfg.prompt == "captions" else [cfg.prompt]
    return encode_captions(texts, gpt.names, len(gpt.empty)), texts


def draw_ids(gpt, cfg, conditions, first, last):
    """Ids (m, k) of samples first to last, at most 100. k is --keep: more of them do not change the first."""
    u = torch.rand(100, cfg.registers, generator=common.make_generator(cfg.seed, first, "tokens"))
    u = u[:last - first, :num_kept(cfg)]
    cond = torch.tensor(conditions[np.arange(first, last) % len(conditions)])
    return common.in_blocks(functools.partial(generate, gpt, cfg=cfg), common.device_of(cfg), cond, u)


def show_samples(tokenizer, gpt, cfg, where):
    """generation.png: a row a class or caption, a column a prefix length; the nearest training image."""
    conditions, names = chosen_conditions(gpt, cfg)
    count = min(cfg.count, 10)
    ids = draw_ids(gpt, cfg, conditions, 0, count)
    rows = [names[i % len(names)][:40] for i in range(count)]
    extra = []
    if not cfg.sample and not cfg.data.startswith("latents"):
        extra = [("train", lambda last: common.nearest(last, open_split(cfg, "train")))]
    show_prefixes(where / "generation.png", tokenizer, cfg, ids, rows, *extra)


def class_accuracy(tokenizer, gpt, cfg):
    """The shares of images that the ruler, a classifier of real ones, puts into their class.

    A dict: "real" of test images, "k=1" ... of what prefixes of their tokens decode to, "samples" of a GPT's.
    """
    test = open_split(cfg, "test", cfg.count)
    ruler = common.judge(open_split(cfg, "judge"), "ruler")
    x = plain_images(test, range(min(cfg.count, len(test))))
    labels = torch.from_numpy(test.labels[:len(x)])
    ids = encode_images(tokenizer, cfg, test, cfg.count)
    found = {"real": common.accuracy(ruler, x, labels)}
    for k in prefix_lengths(cfg.registers):
        found[f"k={k}"] = common.accuracy(ruler, decode_tokens(tokenizer, cfg, ids[:, :k]), labels)
    if gpt and not gpt.is_text:
        told, _ = chosen_conditions(gpt, cfg)
        firsts = range(0, cfg.count, 100)
        ids = torch.cat([draw_ids(gpt, cfg, told, i, min(cfg.count, i + 100)) for i in firsts])
        labels = torch.from_numpy(np.resize(told, cfg.count))
        found["samples"] = common.accuracy(ruler, decode_tokens(tokenizer, cfg, ids), labels)
    return found


def report(cfg, path, where):
    """Pictures of a checkpoint and its figures, printed; 1 where the demo missed its target."""
    tokenizer = load_tokenizer(cfg, path)
    gpt = load_gpt(cfg, path)
    if gpt:
        show_samples(tokenizer, gpt, cfg, where)
        if cfg.sample:
            return 0
    lengths, errors = show_tokens(tokenizer, cfg, where)
    text = ", ".join(f"{error:.4f} (k={k})" for k, error in zip(lengths, errors))
    print(f"{where}: error {text}", flush=True)
    falling = all(longer < 1.01 * shorter for shorter, longer in zip(errors, errors[1:]))
    missed = errors[-1] > TARGET["error"] or not falling
    if not cfg.sample and not cfg.data.startswith("latents") and cfg.steps >= SHORT_RUN:
        found = class_accuracy(tokenizer, gpt, cfg)
        text = ", ".join(f"{share:.3f} ({name})" for name, share in found.items())
        print(f"{where}: accuracy {text}", flush=True)
        missed |= any(found.get(name, 1) < least for name, least in TARGET.items() if name != "error")
    counts = cfg.preset == "demo" and common.is_preset(cfg, PRESETS) and common.Run.trained
    return int(counts and missed)


def write_tokens(tokenizer, cfg):
    """--encode: the ids and labels of --data, and the levels that give ids their meaning."""
    dataset = open_split(cfg, "train")
    encode = functools.partial(encode_rows, tokenizer, cfg, dataset)
    blocks = (ids.int().numpy() for ids in common.share_blocks(encode, len(dataset)))
    others = dict(labels=dataset.labels, levels=np.array(parse_levels(cfg.levels)))
    if common.rank() == 0:
        write = functools.partial(common.write_npz, blocks=blocks, count=len(dataset), name="ids", **others)
        common.write_atomic(cfg.encode, write)
    for _ in blocks:                                    # the other ranks take part in making them
        pass


def read_tokens(cfg):
    """--decode: ids (M, k), at most --count and --keep; UserError where they are not of this codebook."""
    levels = parse_levels(cfg.levels)
    with data.reading(cfg.decode):
        found = data.open_arrays(Path(cfg.decode))
        ids = torch.from_numpy(found["ids"][:cfg.count].astype(np.int64))
        same = tuple(found["levels"].tolist()) == levels
    fine = same and ids.ndim == 2 and ids.numel() and 0 <= ids.min() and ids.max() < math.prod(levels)
    common.require(fine, f"--decode {cfg.decode}: holds no ids (M, k) of a codebook of levels {cfg.levels}")
    return ids[:, :num_kept(cfg)]


def export_samples(tokenizer, gpt, cfg):
    """--export: images of --keep tokens each: of FILE (--decode), of the GPT, or else of test images."""
    count = cfg.count
    if cfg.decode:
        found = read_tokens(cfg)
        count = len(found)
    elif gpt:
        conditions, _ = chosen_conditions(gpt, cfg)
    else:
        test = open_split(cfg, "test", count)
        count = min(count, len(test))

    def draw_block(first, last):
        if cfg.decode:
            ids = found[first:last]
        elif gpt:
            ids = draw_ids(gpt, cfg, conditions, first, last)
        else:
            ids = encode_rows(tokenizer, cfg, test, first, last)[:, :num_kept(cfg)]
        return decode_tokens(tokenizer, cfg, ids, first)

    common.export_images(cfg.export, common.share_blocks(draw_block, count), count)


def use_checkpoint(cfg):
    """--sample: encode, export, decode or draw. Touches nothing but what it writes.

    Processes share the work of --encode and --export; one draws pictures.
    """
    gpt = load_gpt(cfg, cfg.sample)
    of_words = gpt and gpt.is_text
    reads_words = of_words and not cfg.text
    common.require(reads_words or cfg.prompt == "captions", f"--prompt: {cfg.sample} never saw words")
    common.require(not of_words or cfg.classes == "all", f"--classes: {cfg.sample} reads words, not classes")
    where = common.sample_folder(cfg)
    if cfg.encode:
        write_tokens(load_tokenizer(cfg, cfg.sample), cfg)
    elif cfg.export:
        export_samples(load_tokenizer(cfg, cfg.sample), gpt, cfg)
    elif common.rank() == 0 and cfg.decode:
        ids = read_tokens(cfg)[:100]
        show_prefixes(where / "decoded.png", load_tokenizer(cfg, cfg.sample), cfg, ids, ())
    elif common.rank() == 0:
        report(cfg, cfg.sample, where)
    if common.rank() == 0:
        print(f"written: {cfg.encode or cfg.export or where}")
    return 0


def main(cfg):
    """Train, or use a checkpoint; returns the exit code."""
    return use_checkpoint(cfg) if cfg.sample else train(cfg)


if __name__ == "__main__":
    common.launch(main, common.cli(Config, PRESETS, __doc__), check, prepare)
