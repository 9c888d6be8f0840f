"""FlexTok: Resampling Images into 1D Token Sequences of Flexible Length (arXiv 2502.13967)

An image becomes an ordered sequence of R tokens, every prefix of which is a picture. The order comes from
nested dropout (the decoder sees the first k tokens, k random: the first must say most), the picture at every
k from a flow decoder, which invents what the tokens leave open instead of averaging over it. A GPT then
writes tokens, all R of them or as few as the task needs: a class is said sooner than a sentence.

    [patches | registers] -> encoder -> FSQ -> id 1 ... id R     register i sees patches and registers 1 to i
    [noised patches | id 1 ... id k, mask ... mask] -> decoder -> velocity of the patches
    class or caption -> GPT -> id 1, id 2, ...                   stop after any k and decode

Run:      python flextok.py                          demo: token order of drawn shapes, generation; 3 minutes
          python flextok.py --gpus 2                 the same in two processes
          python flextok.py --preset d18-d28 --data latents:imagenet256.npz --teacher dinov2.pt2 --gpus 8
          python flextok.py --sample runs/flextok/demo/ar.pt --classes 6,9 --keep 4
          python flextok.py --sample runs/flextok/demo/tokenizer.pt --data shapes --encode tokens.npz
          python flextok.py --sample runs/flextok/demo/tokenizer.pt --decode tokens.npz --keep 2
          python flextok.py --name words --condition text          and then draw what a sentence asks for:
          python flextok.py --sample runs/flextok/words/ar.pt --prompt "a large red star in the centre"
Faithful: mask, FSQ, nested dropout, null condition, flow decoder, losses, guidances, GPT.
          Labels F1 to F33 number the equations in the order of the method (the paper's are unknown).
Scaled:   the demo: sizes, rates, start of the token vectors (std), shift of times, no REPA: see PRESETS.
Left out: muP but for its logit scale; the VAE (pixels are their own latent, `latents:` reads cached ones);
          DINOv2 and FLAN-T5-XL (--teacher and --text read them, small stand-ins train here).
Letters:  B images, C channels, h w sides, p patch side, P patches, R registers = tokens, N positions,
          D width, H heads, d = D/H, F numbers a token, V ids, L words, S foreign features. Time: 1 is noise.
CUDA:     never run on CUDA.
Read in this order: Encoder, FSQ, Decoder, loss_tokenizer, sample, GPT, generate, train_tokenizer. 20 minutes.
"""

import copy
import dataclasses
import math
import re
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
    """Defaults are the paper's, where it or the published configuration tells; "paper unknown": a guess."""
    preset: str = "demo"                    # where the values below start from
    data: str = "shapes"                    # shapes, cifar10, npz:PATH, folder:PATH or latents:PATH
    stage: Literal["all", "tokenizer", "ar"] = "all"    # what to train
    objects: int = 1                        # most objects in a drawn image
    size: int = 32                          # side of the image or latent
    channels: int = 16                      # its channels C
    flip: bool = True                       # flip each image left-right with probability 1/2
    crop: float = 1.1                       # stage ar enlarges images so much, then crops them; 1: never
    patch: int = 2                          # patch side p
    registers: int = 256                    # R, tokens an image
    levels: str = "8,8,8,5,5,5"             # FSQ levels; their product is the number of ids V
    encoder: int = 12                       # depth of the encoder: n blocks of n heads, D = n d
    decoder: int = 12                       # depth of the decoder
    gpt: int = 12                           # depth of the GPT
    head: int = 64                          # width d of an attention head
    std: float = 0.02                       # s.d. of registers, token positions, mask and null at the start
    nested: Literal["pow2", "uniform"] = "pow2"         # law of the number of tokens kept (F15)
    null: float = 0.1                       # share of images decoded without tokens; paper unknown
    time: Literal["mode", "logit-normal", "uniform"] = "mode"    # law of the flow time (F21)
    shift: float = 1.0                      # our choice, above 1: more times near noise, where tokens matter
    max_time: float = 1000.0                # T of the time embedding (F17)
    repa: float = 1.0                       # weight of the alignment loss (F24); 0: no teacher
    repa_layer: int = 1                     # decoder block that is aligned, counted from 0
    teacher: str = "judge"                  # judge, or a frozen model: TorchScript .pt, torch.export .pt2
    tokenizer: str = ""                     # checkpoint that stage ar builds on; default: this run's
    condition: Literal["class", "text"] = "class"       # what the GPT is told
    text: str = ""                          # FILE.npy of caption states; default: a word encoder is trained
    ar_drop: float = 0.1                    # share of sequences trained without their condition
    steps: int = 250_000                    # optimizer steps of each stage; given, it overrides the next 2
    steps_tokenizer: int = 0                # of stage tokenizer; 0: --steps
    steps_ar: int = 0                       # of stage ar
    batch: int = 1024                       # images a step, over all processes
    lr: float = 3e-4                        # peak learning rate of the tokenizer; paper unknown
    lr_ar: float = 1.2e-3                   # of the GPT: the paper's for 49M, less for larger ones
    warmup: float = 0.1                     # share of the steps with a rising learning rate
    ema: float = 0.9999                     # decay of the averaged weights, which are used; paper unknown
    euler: int = 20                         # Euler steps N of the decoder
    guidance: float = 7.5                   # guidance scale g of the decoder; 1 is none
    schedule: Literal["constant", "linear", "cosine"] = "constant"    # g over the flow time
    apg: bool = True                        # adaptive projected guidance (F27); off: plain CFG (F26)
    ar_guidance: float = 1.5                # guidance scale on the logits (paper: class 1.5, text 3)
    temperature: float = 1.0                # of the GPT's softmax
    top_k: int = 0                          # sample from so many likeliest ids; 0: all
    top_p: float = 1.0                      # sample from the likeliest ids of this mass; 1: all
    keep: str = "all"                       # tokens generated or decoded: 1 to R
    classes: str = "all"                    # labels to generate, as 3,5; all is every class in turn
    prompt: str = "captions"                # words to draw; captions: those of the test split
    count: int = 500                        # test images measured, or rows of a picture of --sample, to 10
    encode: str = ""                        # with --sample: write the tokens of --data to FILE.npz
    decode: str = ""                        # with --sample: draw the tokens of FILE.npz
    seed: int = 0                           # every random number is a function of (seed, step)
    gpus: int = 1                           # processes, one a GPU; without GPUs they share the CPU
    device: str = "auto"                    # auto, cpu or cuda
    bf16: bool = False                      # bf16 autocast on CUDA; FSQ, norms and losses stay in fp32
    compile: bool = False                   # torch.compile for the blocks
    name: str = ""                          # run folder runs/flextok/NAME; default: the preset
    resume: bool = False                    # go on with runs/flextok/NAME in its first unfinished stage
    sample: str = ""                        # checkpoint to use, instead of training
    log: int = 100                          # steps between log lines
    save: int = 5000                        # steps between checkpoints
    sampling = ("data objects euler guidance schedule apg ar_guidance temperature top_k top_p keep classes "
                "prompt count encode decode").split()               # what --sample may change

# Width, heads and depth are one number, as in the paper: 12 blocks of 12 heads of 64 channels are "d12". The
# demo is 12 pixels wide, with patches of 2: a token must name a place, and in patches of 4, where the decoder
# has to carry 48 numbers of noise through 64 channels, all eight learned the two colours and nothing else.
PAPER = dict(data="latents:imagenet256.npz", stage="tokenizer", teacher="dinov2.pt2", bf16=True)
AR, TEXT = dict(stage="ar", encoder=18, decoder=28), dict(condition="text", text="t5-xl.npy", ar_guidance=3.0)
PRESETS = {
    "demo": dict(size=12, channels=3, flip=False, crop=1.0, registers=8, levels="8,5,5,5", encoder=2,
                 decoder=2, gpt=2, head=32, std=0.5, null=0.05, shift=8.0, repa=0.0, steps=4500,
                 steps_ar=2000, batch=16, lr=2e-3, lr_ar=3e-3, warmup=0.025, ema=0.995, euler=8,
                 guidance=1.5, save=1000),
    # CIFAR-10 for one GPU; planned for under an hour, not yet run
    "small": dict(data="cifar10", channels=3, registers=64, encoder=6, decoder=6, gpt=6, steps=40_000,
                  steps_ar=20_000, batch=128, ema=0.999, guidance=2.0),
    # the paper's tokenizers, then its GPTs on tokens of the largest
    **{f"d{e}-d{d}": dict(PAPER, encoder=e, decoder=d) for e, d in ((12, 12), (18, 18), (18, 28))},
    **{f"ar-d{n}": PAPER | AR | {"gpt": n} for n in (10, 12, 16, 20, 24, 30)},
    **{f"ar-text-d{n}": PAPER | AR | TEXT | {"gpt": n} for n in (12, 18, 26, 36)}}
TARGET = 0.047      # error at k = R, at most: mean + 4 s.d. of seeds 0 to 4, .0439 .0434 .0418 .0436 .0420

def parse_levels(text):
    """FSQ levels "8,8,8,5,5,5" as a tuple; UserError."""
    fine = re.fullmatch(r"[0-9]+(,[0-9]+)*", text) and min(map(int, text.split(","))) > 1
    common.need(fine, f"--levels {text}: write numbers above 1, as 8,8,8,5,5,5")
    levels = tuple(map(int, text.split(",")))
    common.need(math.prod(levels) < 2 ** 31, f"--levels {text}: {math.prod(levels)} ids; at most 2^31 - 1")
    return levels

def check(cfg):
    """Every mistake that can be seen without the data; UserError with one line."""
    need, R = common.need, cfg.registers
    for names, low, high in (
            ("size channels crop patch registers encoder decoder gpt head euler count", 1, math.inf),
            ("repa repa_layer lr_ar steps_tokenizer steps_ar top_k guidance ar_guidance", 0, math.inf),
            ("null ar_drop warmup ema", 0, 1), ("temperature max_time shift std", 1e-3, math.inf),
            ("top_p", 1e-3, 1), ("objects", 1, 4)):
        for name in names.split():
            value = getattr(cfg, name)
            need(low <= value <= high and value < math.inf, f"--{name} {value}: finite, in [{low}, {high}]")
    need(cfg.head % 4 == 0, f"--head {cfg.head}: must be a multiple of 4")
    need(cfg.size % cfg.patch == 0, f"--size {cfg.size}: must be a multiple of --patch {cfg.patch}")
    need(cfg.nested != "pow2" or R & R - 1 == 0, f"--registers {R}: give a power of 2, or --nested uniform")
    fine = re.fullmatch("all|[1-9][0-9]*", cfg.keep) and (cfg.keep == "all" or int(cfg.keep) <= R)
    need(fine, f"--keep {cfg.keep}: give all, or 1 to {R}")
    need(not cfg.repa or cfg.repa_layer < cfg.decoder, f"--repa_layer {cfg.repa_layer}: not below --decoder")
    fine = re.fullmatch(r"all|[0-9]+(,[0-9]+)*", cfg.classes)
    need(fine, f"--classes {cfg.classes}: all, or labels as 3,5")
    need(cfg.prompt.strip(), "--prompt: is empty; give some words")
    need(cfg.sample or not cfg.encode + cfg.decode, "--encode and --decode go with --sample CHECKPOINT")
    need(not (cfg.encode and cfg.decode), "--encode and --decode: give one of them")
    words = cfg.condition == "text" and not cfg.text
    need(cfg.sample or cfg.prompt == "captions" or words, "--prompt: for a GPT that learns --condition text")
    fine = cfg.sample or cfg.classes == "all" or cfg.condition == "class"
    need(fine, "--classes: goes with --condition class")
    need(cfg.sample or not cfg.text or cfg.condition == "text", "--text: goes with --condition text")
    need(cfg.sample or not cfg.tokenizer or cfg.stage == "ar", "--tokenizer: goes with --stage ar")
    need(cfg.stage != "ar" or cfg.sample or tokenizer_path(cfg).exists(), f"no {tokenizer_path(cfg)}; "
         f"`python flextok.py --stage tokenizer --preset {cfg.preset} --name {cfg.name}` makes it")
    parse_levels(cfg.levels)

def tokenizer_path(cfg):
    """The checkpoint that stage ar builds on."""
    return Path(cfg.tokenizer or common.folder(cfg) / "tokenizer.pt")

def open_split(cfg, split, count=20_000):
    """The data's 'train', 'test' or 'judge' split; UserError where it does not fit the configuration."""
    found = data.open_data(cfg.data, split, size=cfg.size, objects=(1, cfg.objects), count=count)
    shape = found.images.shape
    common.need(len(shape) == 4 and shape[2] == shape[3],
                f"{cfg.data}: images {shape[1:]}; must be (C, h, h), square and still")
    C, side = shape[1], shape[3]
    common.need((C, side) == (cfg.channels, cfg.size), f"{cfg.data}: give --channels {C} --size {side}")
    return found

def prepare(cfg):
    """Once, before the processes start: downloads, packing, and all that a later step would refuse."""
    if cfg.sample:
        return
    dataset = open_split(cfg, "train")
    open_split(cfg, "test", cfg.count)
    if cfg.stage == "ar":
        path = tokenizer_path(cfg)
        found = common.read_checkpoint(path, "flextok")["config"]
        for name in "size channels patch registers levels encoder decoder head max_time".split():
            asked = getattr(cfg, name)
            common.need(found.get(name) == asked, f"--{name} {asked}: {path} has {found.get(name)}")
    if cfg.stage != "tokenizer":
        with torch.device("meta"):
            _, gpt = conditions(cfg, dataset)
        if cfg.condition == "class":
            chosen_classes(cfg, len(dataset.classes))
        elif cfg.prompt != "captions":
            words = sorted({word for caption in dataset.captions for word in data.split_words(caption)})
            word_rows([cfg.prompt], words, len(gpt.empty))
    teacher(cfg)

# --- Building blocks ---------------------------------------------------------
def patchify(x, p):
    """Image (B, C, h, w) to row-major patches; inside a patch the order is row, column, channel (F2)."""
    B, C, h, w = x.shape
    x = x.view(B, C, h // p, p, w // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)                             # (B, P, p*p*C)

def unpatchify(u, p, h, w):
    """The inverse of patchify."""
    x = u.view(len(u), h // p, w // p, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(u), -1, h, w)                              # (B, C, h, w)

def sincos(n, D):
    """Fixed positions of an n x n grid: [sin row, cos row, sin column, cos column] (F3)."""
    angle = torch.arange(n)[:, None] * 10_000.0 ** -(torch.arange(D // 4) / (D // 4))
    wave = torch.cat([angle.sin(), angle.cos()], 1)
    return torch.cat([wave.repeat_interleave(n, 0), wave.repeat(n, 1)], 1)                          # (P, D)

NORM = dict(eps=1e-5, elementwise_affine=False)                 # the tokenizer's norms learn nothing; in fp32
class Attention(nn.Module):
    """Attention without biases (F7). In the tokenizer queries and keys are normalised, each head's d numbers
    for themselves, so that their lengths say nothing: no logit exceeds 8."""
    def __init__(self, D, d, qk_norm=True):
        super().__init__()
        self.d, self.norm = d, nn.LayerNorm(d, **NORM) if qk_norm else nn.Identity()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(D, D, bias=False) for _ in range(4))
    def keys(self, h):
        """Keys and values of h (B, N, D)."""
        k, v = (w(h).unflatten(2, (-1, self.d)).transpose(1, 2) for w in (self.wk, self.wv))
        return self.norm(k), v                                                  # (B, H, N, d), (B, H, N, d)
    def forward(self, h, keys=None, mask=None, causal=False):
        q = self.norm(self.wq(h).unflatten(2, (-1, self.d)).transpose(1, 2))                  # (B, H, N, d)
        k, v = keys or self.keys(h)                                                      # each (B, H, M, d)
        # The logit scale 8/d of muP is 1/sqrt(d) at the paper's d = 64 alone.
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=8 / self.d)  # (B, H, N, d)
        return self.wo(y.transpose(1, 2).flatten(2))                                             # (B, N, D)

class Block(nn.Module):
    """Pre-norm transformer block of the encoder and of the words, with SwiGLU (F6, F8)."""
    def __init__(self, D, d):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(D, **NORM), Attention(D, d)
        self.w1, self.w3 = (nn.Linear(D, 8 * D // 3, bias=False) for _ in range(2))
        self.w2 = nn.Linear(8 * D // 3, D, bias=False)
    def mlp(self, h):
        return self.w2(F.silu(self.w1(h)) * self.w3(h))                                          # (B, N, D)
    def forward(self, h, mask):
        h = h + self.attention(self.norm(h), mask=mask)                                          # (B, N, D)
        return h + self.mlp(self.norm(h))                                                        # (B, N, D)

def affine(h, P, scale, shift):
    """h (B, P+R, D) times scale (B, 2, 1, D) plus shift, two tensors; the first of either is for the patches,
    the first P positions, the second for the registers."""
    patches = torch.addcmul(shift[0], h[:, :P], scale[:, 0])                                     # (B, P, D)
    registers = torch.addcmul(shift[1], h[:, P:], scale[:, 1])                                   # (B, R, D)
    return torch.cat([patches, registers], 1)                                                  # (B, P+R, D)

class DecoderBlock(Block):
    """The same block under adaLN-zero (F18): the identity at the start of training. Patches and registers are
    modulated apart, for time changes what is noise and not what is known."""
    def __init__(self, D, d):
        super().__init__(D, d)
        self.modulation = nn.Linear(D, 2 * 6 * D)
    def forward(self, h, tau, P):
        # Both gates come first, then shift and scale of the attention, shift and scale of the MLP: not DiT's
        # order, but the one of the published checkpoints.
        m = self.modulation(F.silu(tau)).unflatten(1, (2, 6, 1, -1))                       # (B, 2, 6, 1, D)
        gate1, gate2, shift1, scale1, shift2, scale2 = m.unbind(2)                       # each (B, 2, 1, D)
        y = self.attention(affine(self.norm(h), P, 1 + scale1, shift1.unbind(1)))                # (B, N, D)
        h = affine(y, P, gate1, (h[:, :P], h[:, P:]))                                            # (B, N, D)
        y = self.mlp(affine(self.norm(h), P, 1 + scale2, shift2.unbind(1)))                      # (B, N, D)
        return affine(y, P, gate2, (h[:, :P], h[:, P:]))                                         # (B, N, D)

class GPTBlock(Block):
    """The causal block, with RMSNorm, without QK-norm; for text with cross-attention (F31, F32)."""
    def __init__(self, D, d, text):
        super().__init__(D, d)
        # our choice: RMSNorm without gain; a block then holds 12 D^2 numbers, with text 16 D^2.
        self.norm = nn.RMSNorm(D, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(D, d, qk_norm=False)
        self.cross = Attention(D, d, qk_norm=False) if text else None
    def forward(self, h, words, mask, past=None):
        """past: keys and values of the earlier tokens, if h is one new token. Returns h and the new past."""
        x = self.norm(h)                                                                         # (B, N, D)
        k, v = self.attention.keys(x)                                           # (B, H, N, d), (B, H, N, d)
        if past:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)                # each (B, H, M, d)
        h = h + self.attention(x, (k, v), causal=not past)                                       # (B, N, D)
        if self.cross:
            h = h + self.cross(self.norm(h), words, mask)                                        # (B, N, D)
        return h + self.mlp(self.norm(h)), (k, v)                                  # (B, N, D), (B, H, M, d)

# --- Model -------------------------------------------------------------------
class FSQ(nn.Module):
    """Finite scalar quantisation of F numbers a token (F10 to F13): each is squashed and rounded to one of L
    levels, the digits of the id, the first the fastest. Nothing to learn, no loss of its own."""
    def __init__(self, levels):
        super().__init__()
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", self.levels.cumprod(0) // self.levels, persistent=False)
    def forward(self, z):
        """z (B, R, F) to values in [-1, 1], with the straight-through gradient (F11), and ids (F12)."""
        # F10, squash to the levels' range, even ones shifted so that 0 stays 0; in bf16 ids would change. The
        # .001 keeps the outermost levels within reach of a finite z.
        z = z.to(torch.promote_types(z.dtype, torch.float32))                                    # (B, R, F)
        half, offset = (self.levels - 1) * (1 + 1e-3) / 2, 0.5 * (self.levels % 2 == 0)           # (F), (F)
        b = half * torch.tanh(z + torch.atanh(offset / half)) - offset                           # (B, R, F)
        digits = b.detach().round().long() + self.levels // 2                                    # (B, R, F)
        values = (b + (b.round() - b).detach()) / (self.levels // 2)                             # (B, R, F)
        return values, (digits * self.basis).sum(-1)                                     # (B, R, F), (B, R)
    def values(self, ids):
        """The inverse: ids (B, R) to values (F13)."""
        digits = ids[..., None] // self.basis % self.levels                                      # (B, R, F)
        return (digits - self.levels // 2) / (self.levels // 2)                                  # (B, R, F)

def initialise(module, std=0.02):
    """Xavier-uniform matrices, zero biases, truncated normal vectors and positions (paper: s.d. .02)."""
    for child in module.modules():
        for name, weight in child.named_parameters(recurse=False):
            if isinstance(child, nn.Linear):
                nn.init.zeros_(weight) if name == "bias" else nn.init.xavier_uniform_(weight)
            else:
                nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

class Encoder(nn.Module):
    """Image to F numbers a register (F4 to F9). Registers are learned vectors behind the patches; they differ
    in nothing but their start values and what they see."""
    def __init__(self, cfg):
        super().__init__()
        n, D = cfg.size // cfg.patch, cfg.encoder * cfg.head
        self.p, self.embed = cfg.patch, nn.Linear(cfg.patch ** 2 * cfg.channels, D)
        self.registers = nn.Parameter(torch.empty(cfg.registers, D))
        self.blocks = nn.ModuleList(Block(D, cfg.head) for _ in range(cfg.encoder))
        self.norm, self.head = nn.LayerNorm(D, **NORM), nn.Linear(D, len(parse_levels(cfg.levels)))
        self.register_buffer("position", sincos(n, D), persistent=False)
        # F5, who (row) sees whom (column): patches see patches, register i patches and registers 1 to i. So
        # the first k tokens do not depend on how many are asked for.
        place = torch.arange(n * n + cfg.registers)
        self.register_buffer("mask", (place < n * n) | (place <= place[:, None]), persistent=False)
        initialise(self, cfg.std)
        # At first every image has the same ids (F9): the decoder wakes up alone, its output before its gates,
        # then this head, then the blocks behind it, within some five steps.
        nn.init.zeros_(self.head.weight)
    def forward(self, x, count=None):
        """Latents (B, C, h, w) to z (B, R, F); count: of the first so many registers alone."""
        e = self.embed(patchify(x, self.p)) + self.position                                      # (B, P, D)
        h = torch.cat([e, self.registers[:count].expand(len(x), -1, -1)], 1)                   # (B, P+R, D)
        for block in self.blocks:
            h = block(h, self.mask[:h.shape[1], :h.shape[1]])                                  # (B, P+R, D)
        return self.head(self.norm(h[:, e.shape[1]:]))                                           # (B, R, F)

class Decoder(nn.Module):
    """Noised latents, flow time and a token prefix to the velocity (F14 to F19)."""
    def __init__(self, cfg):
        super().__init__()
        n, D, S = cfg.size // cfg.patch, cfg.decoder * cfg.head, cfg.patch ** 2 * cfg.channels
        self.p, self.T, self.layer = cfg.patch, cfg.max_time, cfg.repa_layer
        self.read, self.embed = nn.Linear(len(parse_levels(cfg.levels)), D), nn.Linear(S, D)
        self.token_position = nn.Parameter(torch.empty(cfg.registers, D))
        self.mask, self.null = (nn.Parameter(torch.empty(D)) for _ in range(2))
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.blocks = nn.ModuleList(DecoderBlock(D, cfg.head) for _ in range(cfg.decoder))
        self.norm, self.modulation, self.head = nn.LayerNorm(D, **NORM), nn.Linear(D, 2 * D), nn.Linear(D, S)
        self.register_buffer("position", sincos(n, D), persistent=False)
        initialise(self, cfg.std)
        for linear in (self.modulation, self.head, *(block.modulation for block in self.blocks)):
            nn.init.zeros_(linear.weight)
    def tokens(self, values, keep, null):
        """Token inputs: positions (F14), then the mask vector beyond keep (B,), then null (B,) (F16)."""
        r = self.read(values) + self.token_position                                              # (B, R, D)
        dropped = torch.arange(r.shape[1], device=keep.device) >= keep[:, None]                     # (B, R)
        # A dropped token is replaced, never cut off (F15): nothing, not even its position, is left of it. The
        # null vector comes last (F16): an image without tokens is the same at every k, as guidance needs.
        r = torch.where(dropped[..., None], self.mask, r)                                        # (B, R, D)
        return torch.where(null[:, None, None], self.null, r)                                    # (B, R, D)
    def forward(self, x, t, values, keep, null):
        """x (B, C, h, w), t (B,), values (B, R, F) to the velocity, and the patches of block `repa_layer`."""
        # F17: with the published T = 1000 no angle exceeds 1, a smooth code.
        frequency = 1000 / self.T * 256.0 ** -(torch.arange(128, device=t.device).type_as(t) / 128)  # (128)
        angle = t[:, None] * frequency                                                            # (B, 128)
        tau = self.time(torch.cat([angle.cos(), angle.sin()], 1))                                   # (B, D)
        h = self.embed(patchify(x, self.p)) + self.position                                      # (B, P, D)
        P, feature = h.shape[1], None
        h = torch.cat([h, self.tokens(values, keep, null)], 1)                                 # (B, P+R, D)
        for i, block in enumerate(self.blocks):
            h = block(h, tau, P)                                                               # (B, P+R, D)
            if i == self.layer:
                feature = h[:, :P]                                                               # (B, P, D)
        shift, scale = self.modulation(F.silu(tau))[:, None].chunk(2, -1)             # (B, 1, D), (B, 1, D)
        u = self.head(self.norm(h[:, :P]) * (1 + scale) + shift)                             # (B, P, p*p*C)
        return unpatchify(u, self.p, *x.shape[2:]), feature                        # (B, C, h, w), (B, P, D)

class Tokenizer(nn.Module):
    """Encoder, FSQ, decoder and, for training alone, the head that predicts S features of a teacher (F23)."""
    def __init__(self, cfg, S=0):
        super().__init__()
        D, self.repa = cfg.decoder * cfg.head, cfg.repa
        self.encoder, self.fsq, self.decoder = Encoder(cfg), FSQ(parse_levels(cfg.levels)), Decoder(cfg)
        # official code differs: its head of this form ends in a zero layer, where a cosine has no gradient.
        layers = [nn.LayerNorm(D, **NORM), nn.Linear(D, 4 * D), nn.SiLU(), nn.Linear(4 * D, 4 * D), nn.SiLU()]
        self.align = nn.Sequential(*layers, nn.Linear(4 * D, S)) if S else nn.Identity()
        initialise(self.align)

class GPT(nn.Module):
    """Causal transformer over the R ids, given a class or a caption. No length, no end token (F29 to F32): it
    always learns full sequences, and whoever samples decides when to stop.
    Conditions are tensors, and `empty` is the one that says nothing: labels (B,), empty -1; word ids (B, L),
    0 for padding; or states (B, L, S) of a foreign text encoder, zero rows for padding."""
    def __init__(self, cfg, empty, classes=0, words=()):
        super().__init__()
        D, d, V = cfg.gpt * cfg.head, cfg.head, math.prod(parse_levels(cfg.levels))
        S = empty.shape[-1] if empty.ndim == 2 else D
        self.register_buffer("empty", empty)
        self.table, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.start, self.position = nn.Parameter(torch.empty(D)), nn.Parameter(torch.empty(cfg.registers, D))
        self.classes = nn.Embedding(classes, D) if classes else None
        layers = [nn.Linear(S, S, bias=False), nn.GELU("tanh"), nn.Linear(S, D, bias=False)]
        self.text = None if classes else nn.Sequential(*layers)
        # A small text encoder in the place of the frozen FLAN-T5-XL; its vocabulary is stored as bytes.
        self.register_buffer("words", torch.tensor([*" ".join(words).encode()], dtype=torch.uint8))
        self.word_table = nn.Embedding(4 + len(words), D) if words else None
        self.word_position = nn.Parameter(torch.empty(len(empty), D)) if words else None
        self.word_blocks = nn.ModuleList(Block(D, d) for _ in range(2 if words else 0))
        self.blocks = nn.ModuleList(GPTBlock(D, d, text=not classes) for _ in range(cfg.gpt))
        self.norm = nn.RMSNorm(D, eps=1e-6, elementwise_affine=False)
        initialise(self)
        for vectors in (self.table.weight, self.start, *(self.classes.parameters() if classes else ())):
            nn.init.uniform_(vectors, -0.1, 0.1)
    def prepare(self, cond):
        """The first input (B, 1, D); for text also each block's keys and values of the words, and a mask."""
        start = self.start.expand(len(cond), 1, -1)                                              # (B, 1, D)
        if self.classes:
            # F30: the class is added to the start vector; without a class that vector stands alone.
            label = self.classes(cond.clamp(min=0)) * (cond >= 0)[:, None]                          # (B, D)
            return start + label[:, None], [None] * len(self.blocks), None
        mask = (cond if cond.ndim == 2 else cond.abs().amax(-1))[:, None, None] > 0           # (B, 1, 1, L)
        states = self.word_table(cond) + self.word_position if self.word_table else cond.to(start.dtype)
        for block in self.word_blocks:
            states = block(states, mask)                                                         # (B, L, S)
        text = self.text(states)                                                                 # (B, L, D)
        return start, [block.cross.keys(text) for block in self.blocks], mask
    def forward(self, ids, cond):
        """Logits (B, R, V) of every id given those before it: the plain form, without a cache."""
        start, words, mask = self.prepare(cond)                      # (B, 1, D), (B, H, L, d), (B, 1, 1, L)
        h = torch.cat([start, self.table(ids[:, :-1])], 1)                                       # (B, N, D)
        return self.go_on(h, 0, words, mask, [None] * len(words))                                # (B, N, V)
    def go_on(self, h, i, words, mask, past):
        """Inputs (B, N, D) at position i and on, behind those in the key-value cache, which grows; logits."""
        h = h + self.position[i:i + h.shape[1]]                                                  # (B, N, D)
        for j, block in enumerate(self.blocks):
            h, past[j] = block(h, words[j], mask, past[j])
        return self.head(self.norm(h))                                                           # (B, N, V)

# --- Objective ---------------------------------------------------------------
def kept_tokens(u, R, law):
    """Uniform draws u (B,) in [0, 1) to numbers of tokens kept, 1 to R, for every image its own (F15). pow2,
    the published law, practises short prefixes: the later half is kept for one image in log2(2 R)."""
    return 2 ** (u * R.bit_length()).long() if law == "pow2" else 1 + (u * R).long()                   # (B)

def flow_time(u, law, shift=1.0, s=0.25):
    """Uniform draws u (B,) to flow times. F21, the mode sampling of SD3, is the published law. Our addition
    for short runs is SD3's shift towards noise: only there does the loss ask what the tokens say."""
    mode = s * (law == "mode") * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)                             # (B)
    t = torch.special.ndtri(u).sigmoid() if law == "logit-normal" else 1 - u - mode                    # (B)
    return shift * t / (1 + (shift - 1) * t)                                                           # (B)

def loss_tokenizer(model, batch, draws):
    """Flow matching and alignment (F22 to F24), their sum first. The encoder learns through the FSQ alone.
    batch: latents x (B, C, h, w), teacher features (B, S, g, g) or None.
    draws: times (B,), noise (B, C, h, w), tokens kept (B,), images without tokens (B,) bool."""
    (x, features), (t, noise, keep, null) = batch, draws
    values, _ = model.fsq(model.encoder(x))
    noised = torch.lerp(x, noise, t.view(-1, 1, 1, 1))  # F20                                 # (B, C, h, w)
    v, patches = model.decoder(noised, t, values, keep, null)                      # (B, C, h, w), (B, P, D)
    flow = (v.to(x.dtype) - (noise - x)).square().mean()
    if features is None:
        return flow, {"flow": flow}
    # F23, REPA: early patches are to look like what a frozen network sees in the clean image.
    # our choice: features on the grid of patches, not patches on one of 37 x 37.
    n = math.isqrt(patches.shape[1])
    target = F.interpolate(features, (n, n), mode="bilinear").flatten(2).transpose(1, 2)         # (B, P, S)
    cosine = F.cosine_similarity(model.align(patches).to(x.dtype), target, dim=-1).mean()
    return flow - model.repa * cosine, {"flow": flow, "cosine": cosine}

def loss_ar(model, batch, draws):
    """Cross-entropy of every id given the earlier ones, over all R (F29).
    batch: ids (B, R) and conditions; draws: the sequences (B,) that lose theirs."""
    ids, cond = batch
    cond = torch.where(draws.view(-1, *[1] * (cond.ndim - 1)), model.empty, cond)
    return F.cross_entropy(model(ids, cond).to(model.start.dtype).flatten(0, 1), ids.flatten())

# --- Sampling ----------------------------------------------------------------
def apg(v, without, g, average, momentum=-0.5, threshold=2.5, eta=0.0):
    """Adaptive projected guidance on velocities (F27): of the difference that tokens make, damped against the
    last step's and cut at a length, only the part across v counts; that along v would oversaturate.
    Without memory, bound and projection (momentum 0, threshold inf, eta 1) it is plain CFG (F26).
    v, without (B, C, h, w): with and without tokens; average: what the last step returned, at first 0."""
    average = v - without + momentum * average                                                # (B, C, h, w)
    norm = average.flatten(1).norm(dim=1).view(-1, 1, 1, 1)                                   # (B, 1, 1, 1)
    a, u = (average * (threshold / norm).clamp(max=1)).double(), v.double()     # (B, C, h, w), (B, C, h, w)
    share = (a * u).sum((1, 2, 3), True) / u.square().sum((1, 2, 3), True).clamp(min=1e-30)   # (B, 1, 1, 1)
    step = a - (1 - eta) * share * u                                                          # (B, C, h, w)
    return (u + (g - 1) * step).to(v.dtype), average                            # (B, C, h, w), (B, C, h, w)

@torch.no_grad()
def sample(model, noise, ids, cfg):
    """Decode a prefix: ids (B, K), K <= R, noise (B, C, h, w) to images, by N Euler steps from t = 1 to 0, as
    in F25 to F28. v points from data to noise, hence the minus. The cost does not depend on K."""
    B, K = ids.shape
    # The padding is never seen: from K on the decoder puts its mask (F28).
    ids = F.pad(ids, (0, len(model.decoder.token_position) - K))                                    # (B, R)
    values = model.fsq.values(ids).to(noise.dtype)                                               # (B, R, F)
    keep, full = torch.full((B,), K, device=ids.device), torch.zeros(B, dtype=torch.bool, device=ids.device)
    x, average = noise, torch.zeros_like(noise)                                 # (B, C, h, w), (B, C, h, w)
    # APG's threshold belongs to the paper's latents, 2.5 beside a noise of norm sqrt(16 * 32 * 32) = 128. our
    # choice: for other sizes it stays in that proportion.
    how = (-0.5, 2.5 * noise[0].numel() ** 0.5 / 128, 0.0) if cfg.apg else (0.0, math.inf, 1.0)
    for i in range(cfg.euler, 0, -1):
        t = noise.new_full((B,), i / cfg.euler)                                                        # (B)
        # our choice of schedules: g throughout, or 1 at t = 1 (noise) and g at t = 0.
        rise = {"constant": 1, "linear": 1 - i / cfg.euler, "cosine": math.cos(math.pi / 2 * i / cfg.euler)}
        g = 1 + (cfg.guidance - 1) * rise[cfg.schedule]
        if g == 1:                                              # one call, not two, and exactly the model's v
            v, _ = model.decoder(x, t, values, keep, full)
        else:
            twice = (torch.cat([a, a]) for a in (x, t, values, keep))
            v, without = model.decoder(*twice, torch.cat([full, ~full]))[0].chunk(2)
            v, average = apg(v, without, g, average, *how)
        x = x - v / cfg.euler                                                                 # (B, C, h, w)
    return x

def filtered(logits, cfg):
    """Logits (B, V) under temperature, top-k and top-p; what is cut becomes -inf (F33)."""
    logits = logits.double() / cfg.temperature                                                      # (B, V)
    if cfg.top_k:
        least = logits.topk(min(cfg.top_k, logits.shape[1])).values[:, -1:]                         # (B, 1)
        logits = logits.masked_fill(logits < least, -math.inf)                                      # (B, V)
    if cfg.top_p < 1:
        order = logits.argsort(1)                                                                   # (B, V)
        cut = logits.softmax(1).gather(1, order).cumsum(1) <= 1 - cfg.top_p                         # (B, V)
        cut[:, -1] = False                                      # the likeliest always stays
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), -math.inf)        # (B, V)
    return logits

@torch.no_grad()
def generate(model, cond, u, cfg):
    """Ids (B, K) for conditions, one uniform draw u (B, K) a token, with a key-value cache (F33)."""
    guided, ids = cfg.ar_guidance != 1, []
    h, words, mask = model.prepare(torch.cat([cond, model.empty.expand_as(cond)]) if guided else cond)
    past = [None] * len(words)
    for i in range(u.shape[1]):
        logits = model.go_on(h, i, words, mask, past)[:, 0]
        if guided:
            logits, without = logits.chunk(2)                                               # (B, V), (B, V)
            logits = without + cfg.ar_guidance * (logits - without)                                 # (B, V)
        mass = filtered(logits, cfg).softmax(1).cumsum(1)                                           # (B, V)
        # The distribution function, inverted at u: the same draws give the same ids with and without a cache.
        ids.append(torch.searchsorted(mass, u[:, i:i + 1].double() * mass[:, -1:], right=True)[:, 0])
        h = model.table(torch.cat(ids[-1:] * (1 + guided)))[:, None]
    return torch.stack(ids, 1)                                                                      # (B, K)

# --- Training ----------------------------------------------------------------
def teacher(cfg):
    """The frozen teacher as a function, images (B, C, H, W) -> features (B, S, g, g), or None.
    A file's model sees what the tokenizer sees (latents, if so) and gives that, or (B, g*g, S)."""
    if not cfg.repa or cfg.stage == "ar":
        return None
    if cfg.teacher == "judge":                                  # untrained for a run of a few steps
        split = open_split(cfg, "judge", 20_000 if cfg.steps >= 100 else 10)
        common.need(not split.latent, f"{cfg.data}: the judge reads pixels; give --teacher FILE, or --repa 0")
        torch.manual_seed(0)
        network = common.judge(split, "teacher") if cfg.steps >= 100 else common.Judge(cfg.channels, 32, 1)
        return network.requires_grad_(False).to(common.device_of(cfg)).spatial
    with data.reading(f"--teacher {cfg.teacher}"):              # TorchScript or torch.export
        script = cfg.teacher.endswith(".pt")
        network = torch.jit.load(cfg.teacher).eval() if script else torch.export.load(cfg.teacher).module()
    def look(x):
        f = network.to(x.device)(x)
        f = f.transpose(1, 2).unflatten(2, (math.isqrt(f.shape[1]), -1)) if f.ndim == 3 else f
        square = f.ndim == 4 and f.shape[2] == f.shape[3]
        common.need(square, f"--teacher {cfg.teacher}: features {[*f.shape]} cannot be resized")
        return f
    trial, device = torch.Generator().manual_seed(0), common.device_of(cfg)
    x = torch.randn(2, cfg.channels, cfg.size, cfg.size, generator=trial).to(device)
    with torch.no_grad(), torch.random.fork_rng(), data.reading(f"--teacher {cfg.teacher}, images 1, 2"):
        one, two = look(x[:1]), look(x)
    # Dropout, or norms over the batch, give an image other features beside other images.
    frozen = len(two) == 2 and (one[0] - two[0]).abs().max() <= 1e-3 * two.abs().max()
    common.need(frozen, f"--teacher {cfg.teacher}: features differ from call to call; save it after .eval()")
    return torch.no_grad()(look)

def draw(dataset, cfg, step, stage, device):
    """One step's latents, their index, five uniform draws each (B, 5): flip, time or row of the crop, tokens
    kept or its column, tokens or condition dropped, unused. Drawn for all ranks, cut to this one."""
    small = common.draws(cfg.seed, step, f"{stage} data")
    index = common.mine(torch.randint(len(dataset), (cfg.batch,), generator=small)).numpy()
    u = common.mine(torch.rand(cfg.batch, 5, generator=small))
    flip = (u[:, 0] < 0.5) & cfg.flip
    if dataset.latent:                                          # F1: drawn from the VAE's posterior
        noise = torch.randn(cfg.batch, *dataset.images.shape[1:], generator=small)
        x = dataset.latents(index, flip.numpy(), common.mine(noise))
    else:
        x = dataset.pixels(index)
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    if stage == "ar" and not dataset.latent:                    # enlarged, and cut at a place of its own
        n, x = cfg.size, F.interpolate(x, (round(cfg.crop * cfg.size),) * 2, mode="bilinear")
        corners = (u[:, 1:3] * (x.shape[-1] - n + 1)).long().tolist()
        x = torch.stack([image[:, i:i + n, j:j + n] for image, (i, j) in zip(x, corners)])
    return x.to(device, u.dtype), index, u.to(device)

def set_rate(opt, done, peak, warmup):
    """Linear warm-up, then a cosine to 1 % of the peak; done: the share of the steps that is over."""
    rise = done / warmup if done < warmup else 0.5 + 0.5 * math.cos(math.pi * (done - warmup) / (1 - warmup))
    opt.param_groups[0]["lr"] = peak * (0.01 + 0.99 * rise)

def update(cfg, model, ema, opt, value):
    """A step on a loss: gradients averaged over the processes and clipped, AdamW, averaged weights."""
    opt.zero_grad()
    value.backward()
    common.average_gradients(model.parameters())
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    common.ema_update(ema, model, cfg.ema)

def begin(cfg, stage):
    """A stage's device, data and run. --steps, when given, overrides the stage's own number."""
    given = cfg.steps != PRESETS[cfg.preset].get("steps", Config.steps)
    run = common.Run(cfg, stage, not given and getattr(cfg, f"steps_{stage}") or cfg.steps)
    torch.manual_seed(common.draws(cfg.seed, 0, f"{stage} weights").initial_seed())
    return common.device_of(cfg), open_split(cfg, "train"), run

def word_rows(captions, words, L=0):
    """Captions as word ids (M, L): the start word 1, the words, zeros. UserError names unknown words."""
    unknown = {word for text in captions for word in data.split_words(text)} - {*words}
    common.need(not unknown, f"unknown words: {' '.join(sorted(unknown))}; known are: {' '.join(words)}")
    rows = [[1, *ids] for ids in map(data.Vocabulary(words).encode, captions)]
    longest = max(map(len, rows))
    common.need(longest <= (L or longest), f"a caption has {longest - 1} words; at most {L - 1} are read")
    return np.array([row + [0] * ((L or longest) - len(row)) for row in rows])

def text_states(cfg):
    """The caption states in --text, memory-mapped; UserError where the file holds no array."""
    with data.reading(f"--text {cfg.text}"):
        states = np.load(cfg.text, mmap_mode="r")
    common.need(isinstance(states, np.ndarray), f"--text {cfg.text}: must hold one array, as np.save writes")
    return states

def conditions(cfg, dataset):
    """The conditions of all images (M, ...), as GPT wants them, and an untrained GPT."""
    if cfg.condition == "class":
        return dataset.labels, GPT(cfg, torch.tensor(-1), classes=len(dataset.classes))
    if cfg.text:
        states = text_states(cfg)
        fine = states.ndim == 3 and len(states) == len(dataset) + 1 and states.dtype.kind == "f"
        common.need(fine, f"--text {cfg.text}: must hold "
                    f"({len(dataset) + 1}, L, S): states of the training captions, then of the empty one")
        return states, GPT(cfg, torch.tensor(states[-1]).float())
    common.need(dataset.captions, f"--condition text: {cfg.data} has no captions; give --text FILE.npy")
    words = sorted({word for caption in dataset.captions for word in data.split_words(caption)})
    rows = word_rows(dataset.captions, words)
    return rows, GPT(cfg, torch.eye(rows.shape[1]).long()[0], words=words)     # empty: the start word alone

def load(cfg, path):
    """From any checkpoint: the averaged tokenizer, and the averaged GPT or None; both frozen. UserError."""
    saved, device, gpt = common.read_checkpoint(path, "flextok"), common.device_of(cfg), None
    with data.reading(path):
        for name in {"ema", "tokenizer"} & {*saved["state"]}:
            for key, value in saved["state"][name].items():
                fine = value.isfinite().all()
                common.need(fine, f"{path}: {name} {key} is not finite; take an earlier checkpoint")
    common.need("ema" in saved["state"], f"{path}: holds no averaged weights")
    weights, ema = (saved["state"].get(name, saved["state"]["ema"]) for name in ("tokenizer", "ema"))
    tokenizer = Tokenizer(cfg, len(weights.get("align.5.bias", ()))).to(device).requires_grad_(False)
    common.load_into({"tokenizer": tokenizer}, {"state": {"tokenizer": weights}}, path)
    if weights is not ema:
        words = bytes(ema["words"].tolist()).decode().split()
        gpt = GPT(cfg, ema["empty"], len(ema.get("classes.weight", ())), words).to(device)
        common.load_into({"ema": gpt.requires_grad_(False)}, saved, path)
    return tokenizer, gpt

def train_tokenizer(cfg):
    """Stage 1: encoder and decoder together (F14 to F24). Optimizer, rates, averaging: our choice."""
    look = teacher(cfg)
    device, dataset, run = begin(cfg, "tokenizer")
    S = look(draw(dataset, cfg, 0, "tokenizer", device)[0]).shape[1] if cfg.repa else 0
    model = Tokenizer(cfg, S).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    start = run.restore(model=model, ema=ema, opt=opt)
    for block in (*model.encoder.blocks, *model.decoder.blocks) if cfg.compile else ():
        block.compile()
    for step in run.steps(start):
        x, _, u = draw(dataset, cfg, step, "tokenizer", device)
        set_rate(opt, step / run.total, cfg.lr, cfg.warmup)
        large, shape = common.draws(cfg.seed, step, "tokenizer noise", device), (cfg.batch, *x.shape[1:])
        noise = common.mine(torch.randn(shape, generator=large, device=device))
        t, keep = flow_time(u[:, 1], cfg.time, cfg.shift), kept_tokens(u[:, 2], cfg.registers, cfg.nested)
        with common.autocast(cfg):
            features = look(x) if cfg.repa else None
            value, terms = loss_tokenizer(model, (x, features), (t, noise, keep, u[:, 3] < cfg.null))
        update(cfg, model, ema, opt, value)
        run.log(step, loss=value, **terms)
        run.save(step)

def train_ar(cfg):
    """Stage 2: the GPT, on ids that the frozen tokenizer gives to cropped and flipped images (F29 to F32)."""
    tokenizer, _ = load(cfg, tokenizer_path(cfg))
    device, dataset, run = begin(cfg, "ar")
    cond, model = conditions(cfg, dataset)
    ema = copy.deepcopy(model.to(device)).requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    start = run.restore(model=model, tokenizer=tokenizer, ema=ema, opt=opt)
    for block in model.blocks if cfg.compile else ():
        block.compile()
    for step in run.steps(start):
        x, index, u = draw(dataset, cfg, step, "ar", device)
        given = torch.from_numpy(np.array(cond[index])).to(device)
        set_rate(opt, step / run.total, cfg.lr_ar, cfg.warmup)
        with common.autocast(cfg):
            # our choice: a fresh crop in every step, where the paper stores the tokens of ten.
            _, ids = tokenizer.fsq(tokenizer.encoder(x))
            value = loss_ar(model, (ids, given), u[:, 3] < cfg.ar_drop)
        update(cfg, model, ema, opt, value)
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
def by_blocks(cfg, function, *tensors):
    """function(*tensors) on blocks of 100 rows, computed on the device, returned on the CPU."""
    blocks, device = zip(*(tensor.split(100) for tensor in tensors)), common.device_of(cfg)
    return torch.cat([function(*(part.to(device) for part in block)).cpu() for block in blocks])

def encoded(tokenizer, cfg, dataset, count):
    """The first images of a data set (latents: their means) and their ids (M, R)."""
    rows = np.arange(min(count, len(dataset)))
    x = dataset.latents(rows, rows < 0, 0.0) if dataset.latent else dataset.pixels(rows)
    x = x.to(torch.get_default_dtype())
    return x, by_blocks(cfg, lambda block: tokenizer.fsq(tokenizer.encoder(block))[1], x)

def decoded(tokenizer, cfg, ids):
    """Images of token prefixes (M, K). Image i starts from the same noise at every K."""
    start = common.draws(cfg.seed, 0, "sample")
    noise = torch.randn(len(ids), cfg.channels, cfg.size, cfg.size, generator=start)
    return by_blocks(cfg, lambda n, i: sample(tokenizer, n, i, cfg), noise, ids)

def picture(path, columns, heads=(), rows=()):
    """Columns of images, (M, C, h, w) each, side by side, as a PNG."""
    pixels = common.to_uint8(torch.stack(columns, 1).flatten(0, 1))
    common.png(path, common.grid(pixels, len(columns), rows, heads, scale=max(1, 48 // pixels.shape[-1])))

def sweep(path, tokenizer, cfg, ids, names, **beside):
    """A row an image, a column a prefix length (returned); beside={head: f(last column)} adds columns."""
    ks = sorted({*(2 ** i for i in range(ids.shape[1].bit_length())), ids.shape[1]})
    columns = [decoded(tokenizer, cfg, ids[:, :k]) for k in ks]
    columns += [make(columns[-1]) for make in beside.values()]
    picture(path, columns, [*(f"k={k}" for k in ks), *beside], names)
    return ks

def show_tokens(tokenizer, cfg, where):
    """prefixes.png; vocabulary.png: the first token of the column's image before the others of the row's; and
    lengths k and mean squared errors of the one-step estimate: what k tokens know without invention."""
    test = open_split(cfg, "test", cfg.count)
    x, ids = encoded(tokenizer, cfg, test, cfg.count)
    n, names = min(6, len(x)), [test.classes[label] for label in test.labels[:10]]
    ks = sweep(where / "prefixes.png", tokenizer, cfg, ids[:10], names, image=lambda _: x[:10])
    swapped = [torch.cat([ids[j, :1].expand(n, 1), ids[:n, 1:]], 1) for j in range(n)]
    columns = [torch.cat([x[j:j + 1], decoded(tokenizer, cfg, mixed)]) for j, mixed in enumerate(swapped)]
    picture(where / "vocabulary.png", columns, rows=["first token", *names[:n]])
    once = dataclasses.replace(cfg, euler=1, guidance=1.0)
    return ks, [(decoded(tokenizer, once, ids[:, :k]) - x).square().mean().item() for k in ks]

def chosen_classes(cfg, K):
    """The labels that --classes names; UserError where one is not below K."""
    chosen = [*range(K)] if cfg.classes == "all" else [*map(int, cfg.classes.split(","))]
    common.need(max(chosen) < K, f"--classes {cfg.classes}: labels are 0 to {K - 1}")
    return chosen

def show_samples(tokenizer, gpt, cfg, where):
    """generation.png: a row a class or caption, a column a prefix length; the nearest training image."""
    count, K = min(cfg.count, 10), cfg.registers if cfg.keep == "all" else int(cfg.keep)
    if gpt.classes:
        classes = range(len(gpt.classes.weight))
        chosen = chosen_classes(cfg, len(classes))
        known = data.SHAPES if cfg.data == "shapes" else [f"class {k}" for k in classes]
        cond, names = np.resize(chosen, count), [known[k] for k in np.resize(chosen, count)]
    elif gpt.word_table:
        texts = open_split(cfg, "test", count).captions if cfg.prompt == "captions" else [cfg.prompt]
        names = [texts[i % len(texts)] for i in range(count)]
        cond = word_rows(names, bytes(gpt.words).decode().split(), len(gpt.empty))
    else:
        states = text_states(cfg)
        fine = states.ndim == 3 and len(states) and states.shape[1:] == gpt.empty.shape
        common.need(fine, f"--text {cfg.text}: states {states.shape[1:]}; the GPT reads {*gpt.empty.shape,}")
        cond = states[np.arange(count) % len(states)]
        names = [f"row {i}" for i in range(count)]
    u = torch.rand(count, K, generator=common.draws(cfg.seed, 0, "tokens"))
    ids = by_blocks(cfg, lambda c, n: generate(gpt, c, n, cfg), torch.tensor(cond), u)
    blind = cfg.sample or cfg.data.startswith("latents")        # no training images are at hand
    beside = {} if blind else {"train": lambda x: common.nearest(x, open_split(cfg, "train"))}
    sweep(where / "generation.png", tokenizer, cfg, ids, [name[:40] for name in names], **beside)

def report(cfg, path, where):
    """Pictures of a checkpoint and its errors, printed; 1 where the demo missed its target."""
    tokenizer, gpt = load(cfg, path)
    if gpt:
        show_samples(tokenizer, gpt, cfg, where)
    if gpt and cfg.sample:
        return 0
    ks, errors = show_tokens(tokenizer, cfg, where)
    print(f"{where}: error " + ", ".join(f"{e:.4f} (k={k})" for k, e in zip(ks, errors)), flush=True)
    good = errors[-1] <= TARGET and all(b < 1.01 * a for a, b in zip(errors, errors[1:]))
    return int(cfg.preset == "demo" and common.is_preset(cfg, PRESETS) and not good)

def read_tokens(cfg):
    """--decode: ids (M, K) cut to --keep; UserError where they are no tokens of this codebook."""
    path, need, V = cfg.decode, common.need, math.prod(parse_levels(cfg.levels))
    with data.reading(path), np.load(path) as found:            # what --encode wrote
        ids, levels = found["ids"].astype(np.int64), ",".join(map(str, found["levels"].tolist()))
    need(levels == cfg.levels, f"--decode {path}: another codebook, of levels {levels}, not {cfg.levels}")
    need(ids.ndim == 2 and ids.size and 0 <= ids.min() <= ids.max() < V,
         f"--decode {path}: ids {ids.shape} up to {ids.max(initial=0)}; must be (M, K) of 0 to {V - 1}")
    K, most = ids.shape[1] if cfg.keep == "all" else int(cfg.keep), min(ids.shape[1], cfg.registers)
    need(K <= most, f"--keep {K}: {path} and the decoder share {most} tokens")
    return torch.from_numpy(ids[:, :K])

def main(cfg):
    """Train, or use a checkpoint and touch nothing but <its run>/samples; returns the exit code."""
    if not cfg.sample:
        return train(cfg)
    (tokenizer, gpt), where = load(cfg, cfg.sample), Path(cfg.sample).parent / "samples"
    common.need(cfg.prompt == "captions" or gpt and gpt.word_table, f"--prompt: {cfg.sample} never saw words")
    if cfg.encode:
        dataset = open_split(cfg, "train")
        _, ids = encoded(tokenizer, cfg, dataset, len(dataset))
        packed = dict(ids=ids.int().numpy(), labels=dataset.labels, levels=np.array(parse_levels(cfg.levels)))
        common.write_atomic(cfg.encode, lambda file: np.savez(file, **packed))
    elif cfg.decode:
        sweep(where / "decoded.png", tokenizer, cfg, read_tokens(cfg)[:min(cfg.count, 100)], ())
    else:
        report(cfg, cfg.sample, where)
    print(f"written: {cfg.encode or where}")
    return 0

if __name__ == "__main__":
    common.launch(main, common.cli(Config, PRESETS, __doc__))
