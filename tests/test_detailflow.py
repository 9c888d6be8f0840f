"""DetailFlow: its equations D1 to D20, the authors' own numbers, and the command line's promises.

Oracles are written from the formulas (loops over tokens, patches and images), not from the code under test: the
plain_* functions below are the paper's tokenizer, correction, transformer and sampler in their slowest form.
"""

import copy
import dataclasses
import itertools
import json
import math

import common
import data
import detailflow
from tests import ROOT, refused, shared
from tests.official import DETAILFLOW_AR, convert, detailflow_tokenizer, read_official, renamed
from tests.tiny import argv

import numpy as np
import pytest
import torch
import torch.nn.functional as F


def config(**changes):
    """A small configuration: R = 16, P = 16 patches, N = 12 tokens in M = 4 groups, K = 32 codes."""
    small = dict(size=16, patch=4, tokens=12, group=3, causal=3, codes=32, dim=4, near=5, encoder="16x2x2x24",
                 decoder="16x2x2x20", gpt="16x2x2x24", dropout=0.0, cfg_scale=1.0)
    return dataclasses.replace(detailflow.Config(), **{**small, **changes})


def awake(model, seed=0):
    """Every parameter random and sizeable, in float64, so that nothing hides behind a zero."""
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.7 if p.ndim == 1 else 1.5 / math.sqrt(p.shape[-1]))
    return model.double()


def tokenizer(S=0, **changes):
    return awake(detailflow.Tokenizer(config(**changes), S))


def ar(**changes):
    return awake(detailflow.AR(config(**changes), 5)).eval()


def images(B=3, side=16, seed=1):
    return torch.randn(B, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*size, seed=2):
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(n, s=None, u=None, v=None):
    """The draws of a step of the tokenizer: v (B, 2, 10) for the fake images of its own loss."""
    return {"n": n, "s": s, "noise": u, "augment": None if v is None else v[:, None]}


def rows_of(v):
    """Draws (B, 2, 10) as plain_augment reads them: a row an image, those of the corrected images behind."""
    return torch.cat([v[:, 0], v[:, 1]])


def close(a, b, atol):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=atol, rtol=0, check_dtype=False)


# --- The paper in its slowest form -----------------------------------------------

def allowed(i, j, g, c):
    """The mask of D5 and D8, counted from 0: may position i look at position j?"""
    return j <= i if i < c else j // g <= i // g


def plain_norm(h, norm, eps, centred):
    h = h - h.mean(-1, keepdim=True) if centred else h
    h = h / (h.square().mean(-1, keepdim=True) + eps).sqrt()
    return h * norm.weight + (norm.bias if centred else 0)


def linear(x, layer):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def plain_block(block, h, look, turn=None):
    """One transformer block; look: bool (L, L); turn: complex (L, d/2), then in LlamaGen's form."""
    D, llama = h.shape[-1], turn is not None
    eps, y = 1e-5 if llama else 1e-6, []
    for part in linear(plain_norm(h, block.norm1, eps, not llama), block.qkv).split(D, -1):
        y.append(part.unflatten(-1, (block.heads, -1)).transpose(1, 2))
    if llama:
        y[:2] = [torch.view_as_real(torch.view_as_complex(a.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
                 for a in y[:2]]
    q, k, v = y
    score = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).exp() * look
    mixed = score / score.sum(-1, keepdim=True) @ v
    h = h + linear(mixed.transpose(1, 2).flatten(-2), block.out)
    x = plain_norm(h, block.norm2, eps, not llama)
    up = linear(x, block.up)
    if llama:
        gate = linear(x, block.gate)
        return h + linear(gate * torch.sigmoid(gate) * up, block.down)
    return h + linear(0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up ** 3))), block.down)


def plain_encoder(e, x, z, cfg):
    """D5 without memory: outputs of the patches and of the latents z (B, n, D)."""
    f, side, n = cfg.patch, cfg.size // cfg.patch, z.shape[1]
    cells = [(row, column) for row in range(side) for column in range(side)]
    flat = [x[:, :, f * r:f * r + f, f * c:f * c + f].permute(0, 2, 3, 1).flatten(1) for r, c in cells]
    h = torch.stack([linear(a, e.embed) + e.grid[r, c] for a, (r, c) in zip(flat, cells)], 1)
    h, P = torch.cat([h, z.expand(len(x), -1, -1)], 1), len(cells)
    look = torch.tensor([[j < P or i >= P and allowed(i - P, j - P, cfg.group, cfg.causal) for j in range(P + n)]
                         for i in range(P + n)])
    for block in e.blocks:
        h = plain_block(block, h, look)
    return h[:, :P], plain_norm(h[:, P:], e.norm, 1e-6, True)


def plain_decoder(model, q, n, r):
    """D6: the first n vectors of q (B, N, d) to images of side r."""
    d, f, D = model.decoder, model.cfg.patch, model.decoder.mask.numel()
    z = linear(q[:, :n], model.read) + d.positions[:n]
    grid = F.interpolate(d.grid.permute(2, 0, 1)[None], (r // f, r // f), mode="bilinear", antialias=True,
                         align_corners=False)[0]
    masks = torch.stack([d.mask.reshape(D) + grid[:, i, j] for i in range(r // f) for j in range(r // f)])
    h = torch.cat([masks.expand(len(q), -1, -1), z], 1)
    for block in d.blocks:
        h = plain_block(block, h, torch.ones(h.shape[1], h.shape[1], dtype=torch.bool))
    out, x = linear(plain_norm(h, d.norm, 1e-6, True), d.head), q.new_zeros(len(q), 3, r, r)
    for p in range(len(masks)):
        i, j = p // (r // f) * f, p % (r // f) * f
        x[:, :, i:i + f, j:j + f] = out[:, p].view(-1, f, f, 3).permute(0, 3, 1, 2)
    return x


def plain_vq(model, h):
    """D4: vectors, ids of all codes from near to far, and the two losses of each token."""
    u = h / h.square().sum(-1, keepdim=True).sqrt()
    codes = model.vq.codes / model.vq.codes.square().sum(-1, keepdim=True).sqrt()
    order = (u[:, :, None] - codes).square().sum(-1).argsort(-1)
    e = codes[order[..., 0]]
    return u + (e - u).detach(), order, (e - u.detach()).square().mean(-1), (e.detach() - u).square().mean(-1)


def plain_correction(model, x, s, u):
    """D7 word by word: both vectors, triple (3, B, N), L_cb and L_commit (unweighted)."""
    cfg, e, N = model.cfg, model.encoder, model.cfg.tokens
    _, h = plain_encoder(e, x, (e.queries + e.positions)[None], cfg)
    q, order, codebook, commit = plain_vq(model, linear(h, model.quant))
    ids = order[..., 0]
    if s is None:
        return q, torch.stack([ids, ids, ids]), torch.stack([codebook.mean(), commit.mean()])
    end = s + (1 if s < cfg.causal else cfg.group)
    wrong = torch.tensor([[order[b, t, int(u[b, t] * cfg.near)] for t in range(N)] for b in range(len(x))])
    codes = model.vq.codes / model.vq.codes.norm(dim=1, keepdim=True)
    prefix = torch.cat([q[:, :s], codes[wrong[:, s:end]]], 1).detach()
    z = torch.cat([linear(prefix, model.refine), e.refined[end:].expand(len(x), -1, -1)], 1) + e.positions
    q2, order2, codebook2, commit2 = plain_vq(model, linear(plain_encoder(e, x, z, cfg)[1], model.quant))
    ids2, rest = order2[..., 0], N - end
    given = torch.cat([ids[:, :s], wrong[:, s:end], ids2[:, end:]], 1)
    label = torch.cat([ids[:, :end], ids2[:, end:]], 1)
    losses = [a.mean() * N / (2 * N - end) + (b[:, end:].mean() * rest / (2 * N - end) if rest else 0)
              for a, b in ((codebook, codebook2), (commit, commit2))]
    return (torch.cat([q, torch.cat([prefix, q2[:, end:]], 1)]), torch.stack([ids, given, label]), torch.stack(losses))


def plain_target(x, n, cfg):
    """D2 by loops: means over cells [floor(iR/r), ceil((i+1)R/r)), then bicubic (a = -3/4) with clamped borders."""
    R, N = cfg.size, cfg.tokens
    if n == N:
        return x
    r = min(max(math.trunc(R - (R - 1) * ((N - n) / (N - 1)) ** cfg.alpha), 1), R)
    side = max(cfg.patch, math.ceil(r / cfg.patch) * cfg.patch)
    rows, cubic = torch.zeros(r, R).double(), torch.zeros(side, r).double()
    for i in range(r):
        low, high = i * R // r, -(-(i + 1) * R // r)
        rows[i, low:high] = 1 / (high - low)
    for i in range(side):
        place = (i + 0.5) * r / side - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            t, a = abs(place - j), -0.75
            w = (a + 2) * t ** 3 - (a + 3) * t ** 2 + 1 if t <= 1 else a * (t ** 3 - 5 * t ** 2 + 8 * t - 4)
            cubic[i, min(max(j, 0), r - 1)] += w
    both = cubic @ rows
    return torch.einsum("ij,bcjk,lk->bcil", both, x, both)


def plain_turn(p, g, d):
    """D3: complex (d/2) of position p; the class, p = 0, is multiplied by zero."""
    rates = [10_000 ** (-2 * i / (d / 2)) for i in range(d // 4)]
    angle = torch.tensor([(p - 1) // g * w for w in rates] + [(p - 1) % g * w for w in rates]).double()
    return torch.polar((torch.ones(d // 2) * (p > 0)).double(), angle)


def plain_ar(model, ids, y, cfg):
    """Logits of the input [class, z_1 .. z_c, masks, z_c+1 ..] of the known ids (B, n) alone, as long as it is."""
    g, c, n = cfg.group, cfg.causal, ids.shape[1]
    rows = [model.label.weight[y]] + [model.table.weight[ids[:, t]] for t in range(min(c, n))]
    if n >= c:
        rows += [m.expand(len(y), -1) for m in model.masks]
    rows += [model.table.weight[ids[:, t]] for t in range(c, n)]
    h = torch.stack(rows, 1)[:, :cfg.tokens]
    L, d = h.shape[1], h.shape[2] // model.blocks[0].heads
    look = torch.tensor([[allowed(i, j, g, c) for j in range(L)] for i in range(L)])
    turn = torch.stack([plain_turn(p, g, d) for p in range(L)])
    for block in model.blocks:
        h = plain_block(block, h, look, turn)
    return linear(plain_norm(h, model.norm, 1e-5, False), model.head)


def plain_generate(model, y, u, cfg):
    """D17: recompute everything at every step; one token from its own distribution at a time."""
    ids, c, g, M = torch.zeros(len(y), 0, dtype=torch.long), cfg.causal, cfg.group, cfg.tokens // cfg.group
    while ids.shape[1] < u.shape[1]:
        i = ids.shape[1]
        width, k = (1, 0) if i < c else (g, i // g)
        logits, null = (plain_ar(model, ids, label, cfg)[:, -width:] for label in (y, torch.full_like(y, 5)))
        scale = cfg.cfg_scale * (M - k + 1) / (M + 1) if cfg.cfg_gradual and i >= c else cfg.cfg_scale
        p = (null + scale * (logits - null)).div(cfg.temperature).softmax(-1)
        new = [[int(np.searchsorted(np.cumsum(p[b, t].numpy()), u[b, i + t], side="right")) for t in range(width)]
               for b in range(len(y))]
        ids = torch.cat([ids, torch.tensor(new)], 1)
    return ids


# --- The authors' numbers ----------------------------------------------------------

def stored():
    """The reference arrays that live in this repository."""
    return read_official(ROOT / "tests/golden/detailflow.npz")


def part(arrays, start):
    return {name[len(start):]: value for name, value in arrays.items() if name.startswith(start)}


def official_tokenizer():
    """The authors' small tokenizer in float64, converted by the code for published checkpoints; its outputs."""
    weights = part(read_official(shared("goldens", "detailflow", "08a_tokenizer_small_weights.npz")), "w/")
    cfg = config(size=32, patch=4, tokens=16, group=4, causal=4, codes=128, dim=8, encoder="48x2x4x192",
                 decoder="32x2x4x128")
    model = detailflow.Tokenizer(cfg, 24)
    model.align = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 16),
                                      torch.nn.SiLU(), torch.nn.Linear(16, 24))
    model.load_state_dict(detailflow_tokenizer(weights) | {"vq.use": torch.zeros(128)})
    g = read_official(shared("goldens", "detailflow", "08b_tokenizer_small_clean.npz"))
    return model.double(), {name: a.double() if a.is_floating_point() else a for name, a in g.items()}, cfg


@torch.no_grad()
def test_official_tokenizer():
    model, g, cfg = official_tokenizer()
    e = model.encoder
    latent, _ = e(g["x"], (e.queries + e.positions)[None])
    close(latent, g["latent"], 1e-12)
    close(e(g["x"], (e.queries + e.positions)[None, :8])[0], g["latent_first8_only"], 1e-12)
    h, _ = model.encode(g["x"])
    close(h, g["prequant"], 1e-12)
    q, ids, _ = model.vq(h)
    close(q, g["quant"], 1e-12)
    assert torch.equal(ids, g["indices"])
    for n, _, r in g["table_t_R_dec"].tolist():
        assert detailflow.image_side(n, cfg) == r
        close(model.decode(q[:, :n]), g[f"decode_t{n:02}_res{r}"], 1e-12)
    assert detailflow.admissible(cfg) == g["table_t_R_dec"][:, 0].tolist()
    assert [detailflow.detail_side(n, cfg) for n in detailflow.admissible(cfg)] == g["table_t_R_dec"][:, 1].tolist()
    close(model.decoder(model.read(q[:, :8]), 16), g["decode_code_t8_res16"], 1e-12)
    close(model.decode(q), g["decode_code_default_t16_res32"], 1e-12)


@pytest.mark.parametrize("n", [16, 8, 3])
def test_official_losses_and_gradients(n):
    model, g, _ = official_tokenizer()
    weight = detailflow.weights(config(align=1.0, perceptual=0.0), 0)
    features = lambda x: g["teacher_patch_features"].transpose(1, 2).unflatten(2, (8, 8))
    value, losses, (ids, recon, goal) = detailflow.loss_tokenizer(model, g["x"], drawn(n), weight, features)
    close(goal, g[f"train_t{n:02}_target"], 1e-12)
    close(recon, g[f"train_t{n:02}_rec"], 1e-12)
    assert torch.equal(ids, g["indices"])
    L2, codebook, commit, _, align, total = g[f"train_t{n:02}_l2_codebook_commit_entropy_align_total"]
    ours = [losses["mse"], losses["codebook"], 0.25 * losses["commit"], losses["align"], value]
    close(torch.stack(ours).detach(), torch.stack([L2, codebook, commit, align, total]), 1e-12)
    value.backward()
    names = {"encoder.latent_tokens": model.encoder.queries, "encoder.latent_pos_embed": model.encoder.positions,
             "quant_conv.weight": model.quant.weight, "quantize.embedding.weight": model.vq.codes,
             "post_quant_conv.weight": model.read.weight, "decoder.mask_token": model.decoder.mask,
             "decoder.to_pixel.model.weight": model.decoder.head.weight,
             "global_token_proj.0.weight": model.align[0].weight}
    for name, p in names.items():
        close(p.grad, g[f"train_t{n:02}_grad/{name}"].view(p.shape), 1e-12)
    assert model.encoder.refined.grad is None and model.refine.weight.grad is None


def triple(ids):
    """Clean, given and target ids of a tensor (3, B, N)."""
    return detailflow.Triple(*ids)


def official_ar():
    """The authors' small AR model in float32 and its outputs; from this repository, whole."""
    g = stored()
    cfg = config(size=32, patch=4, tokens=16, group=4, causal=4, codes=64, gpt="48x2x4x128")
    model = detailflow.AR(cfg, 10)
    model.load_state_dict(renamed(part(g, "ar/w/"), DETAILFLOW_AR))
    return model.eval(), part(g, "ar/"), cfg


def test_official_ar_logits_loss_and_tables():
    model, g, _ = official_ar()
    close(model(g["z"], g["class"]).detach(), g["teacher_forced_logits"], 2e-5)
    no = torch.zeros(3, dtype=torch.bool)
    value, _ = detailflow.loss_ar(model, (triple(g["z"].expand(3, -1, -1)), g["class"]), {"noisy": no, "drop": no})
    close(value.detach(), g["teacher_forced_loss"], 1e-5)
    value.backward()
    close(model.masks.grad, g["grad/spe_tok_embeddings.special_embeddings.weight"], 1e-5)
    close(model.label.weight.grad, g["grad/cls_embedding.embedding_table.weight"], 1e-5)
    assert torch.equal(model.mask, g["mask_ALLOWED"])
    close(model.rotation.permute(1, 2, 0), g["freqs_cis"][:16], 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.5, 3.0])
@pytest.mark.parametrize("gradual", [False, True])
@pytest.mark.parametrize("cached", [True, False])
def test_official_ar_generation(scale, gradual, cached):
    model, g, cfg = official_ar()
    cfg = dataclasses.replace(cfg, cfg_scale=scale, cfg_gradual=gradual, top_k=1)
    ids = detailflow.generate(model, g["class"], torch.rand(3, 16), cfg, cached)
    assert torch.equal(ids, g[f"argmax_cfg{scale}_gradual{int(gradual)}"].long())
    lengths = g[f"seqlens_cfg{scale}_gradual{int(gradual)}"].tolist()
    assert [j for _, j in detailflow.spans(16, 4, 4)] == lengths


@torch.no_grad()
def test_official_ar_logits_on_what_it_generated():
    model, g, _ = official_ar()
    ids = g["argmax_cfg1.5_gradual0"].long()
    close(model(ids, g["class"]), g["cfg_logits_on_generated_cond"], 2e-5)
    close(model(ids, torch.full((3,), 10)), g["cfg_logits_on_generated_uncond"], 2e-5)


@torch.no_grad()
def test_official_quantiser():
    g = part(stored(), "vq/")
    vq = detailflow.VQ(128, 8).double()
    vq.codes.copy_(g["codes"])
    q, ids, _ = vq(g["prequant"])
    close(q, g["quant"], 1e-12)
    assert torch.equal(ids, g["indices"])


def checkpoint(path, cfg, **state):
    """A file as a run writes it."""
    torch.save({"method": "detailflow", "config": dataclasses.asdict(cfg), "step": 0, "sums": {}, "count": 0,
                "state": {name: module.state_dict() for name, module in state.items()}}, path)


def test_official_ar_checkpoint_joins_a_tokenizer(tmp_path):
    torch.save(part(stored(), "ar/w/"), tmp_path / "official.pt")
    cfg = config(tokens=16, group=4, causal=4, codes=64)
    checkpoint(tmp_path / "tokenizer.pt", cfg, tokenizer=detailflow.Tokenizer(cfg))
    given = {"gpt": "48x2x4x128", "tokenizer": str(tmp_path / "tokenizer.pt")}
    convert("detailflow", tmp_path / "official.pt", tmp_path / "ours.pt", given)
    cfg = detailflow.Config(**common.read_checkpoint(tmp_path / "ours.pt", "detailflow")["config"])
    (_, model, names), (ours, g, _) = detailflow.load(cfg, tmp_path / "ours.pt"), official_ar()
    assert names == [f"class {k}" for k in range(10)]
    assert (cfg.codes, cfg.group, model.classes) == (64, 4, 10)
    assert torch.equal(model(g["z"], g["class"]), ours(g["z"], g["class"]))


@torch.no_grad()
def test_official_tokenizer_checkpoint_becomes_one_that_load_reads(tmp_path):
    weights = part(read_official(shared("goldens", "detailflow", "08a_tokenizer_small_weights.npz")), "w/")
    torch.save({name: a for name, a in weights.items() if "global_token" not in name}, tmp_path / "official.pt")
    given = dict(group=4, causal=4, encoder="48x2x4x192", decoder="32x2x4x128")
    convert("detailflow", tmp_path / "official.pt", tmp_path / "ours.pt", given)
    cfg = detailflow.Config(**common.read_checkpoint(tmp_path / "ours.pt", "detailflow")["config"])
    (model, none, _), (_, g, _) = detailflow.load(cfg, tmp_path / "ours.pt"), official_tokenizer()
    assert none is None and torch.equal(model.tokenize(g["x"].float())[1], g["indices"])
    close(model.tokenize(g["x"].float())[0], g["quant"], 2e-5)


# --- Equation by equation ------------------------------------------------------------

PAPER = config(size=256, patch=16, tokens=128, group=8, causal=8)
# n, the side of the detail, that of the image as the official code rounds, and as the paper's figures do
TABLE = """1 1 16 16, 2 4 16 16, 3 6 16 16, 4 9 16 16, 5 12 16 16, 6 15 16 16, 7 18 32 16, 8 21 32 16, 16 44 48 48,
24 67 80 64, 32 88 96 96, 40 108 112 112, 48 128 128 128, 56 147 160 144, 64 164 176 160, 72 181 192 176,
80 196 208 192, 88 210 224 208, 96 223 224 224, 104 235 240 240, 112 244 256 240, 120 251 256 256, 128 256 256 256"""
TABLE = [tuple(map(int, row.split())) for row in TABLE.split(",")]
TOY = [(1, 1, 4), (2, 2, 4), (3, 3, 4), (4, 5, 8), (8, 10, 12), (12, 15, 16), (16, 20, 20), (20, 24, 24), (24, 27, 28),
       (28, 30, 32), (32, 32, 32)]


def test_D1_resolution_law():
    """D1 and its table for the paper's size, sides included."""
    for cfg in (PAPER, config(alpha=0.5), config(alpha=1.0), config(alpha=2.0)):
        N, R = cfg.tokens, cfg.size
        law = [detailflow.resolution(n, cfg) for n in range(1, N + 1)]
        assert law[0] == 1 and law[-1] == R and all(a < b for a, b in zip(law, law[1:]))
        b = (R - 1) / (N - 1) ** cfg.alpha                              # Eq. (3)
        close(law, [R - b * (N - n) ** cfg.alpha for n in range(1, N + 1)], 1e-9)
        if cfg.alpha == 1:
            close([b - a for a, b in zip(law, law[1:])], [(R - 1) / (N - 1)] * (N - 1), 1e-12)
    nearest = dataclasses.replace(PAPER, rounding="nearest")
    assert TABLE == [(n, detailflow.detail_side(n, PAPER), detailflow.image_side(n, PAPER), detailflow.image_side(n, nearest))
                     for n in detailflow.admissible(PAPER)]
    toy = config(size=32, tokens=32, group=4, causal=4)
    assert TOY == [(n, detailflow.detail_side(n, toy), detailflow.image_side(n, toy)) for n in detailflow.admissible(toy)]


def test_D2_sides():
    for cfg in (PAPER, config(), config(alpha=0.5), config(alpha=2.0, causal=6), config(size=32, patch=8)):
        sides = [detailflow.image_side(n, cfg) for n in detailflow.admissible(cfg)]
        assert sides == sorted(sides) and sides[-1] == cfg.size and all(side % cfg.patch == 0 for side in sides)
        pixels = [detailflow.detail_side(n, cfg) for n in detailflow.admissible(cfg)]
        assert all(side >= max(cfg.patch, r) for side, r in zip(sides, pixels))
    assert detailflow.admissible(config(causal=6)) == [1, 2, 3, 4, 5, 6, 9, 12]


def test_D2_targets():
    cfg, x = config(), images()
    for n in detailflow.admissible(cfg):
        goal = detailflow.make_target(x, n, cfg)
        assert goal.shape[2:] == (detailflow.image_side(n, cfg),) * 2
        close(goal, plain_target(x, n, cfg), 1e-12)
        close(detailflow.make_target(torch.full_like(x, 0.3), n, cfg), torch.full_like(goal, 0.3), 1e-12)
    assert torch.equal(detailflow.make_target(x, 12, cfg), x)
    blurred = detailflow.make_target(x, 6, cfg)                            # R = 9, decoded at 12: no detail above 9 pixels
    assert (blurred - F.interpolate(x, (12, 12), mode="area")).abs().max() > 0.05


def chi_square(drawn, law):
    """Exact support, and Pearson's statistic below its mean + 4 s.d."""
    found = {value: drawn.count(value) for value in set(drawn)}
    assert set(found) <= {value for value, p in law.items() if p > 0}
    assert abs(sum(law.values()) - 1) < 1e-12
    expected = {value: p * len(drawn) for value, p in law.items() if p > 0}
    statistic = sum((found.get(value, 0) - e) ** 2 / e for value, e in expected.items())
    freedom = len(expected) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom), (statistic, freedom)


@pytest.mark.parametrize("cfg", [PAPER, config(), config(causal=6), config(group=1, causal=1, degrade=0.6)])
def test_D12_prefix_lengths(cfg):
    """D12: exact support, and the law by a chi-square test."""
    N, g, c = cfg.tokens, cfg.group, cfg.causal
    law = dict.fromkeys(detailflow.admissible(cfg), 0.0) | {N: 1 - cfg.degrade}
    for t in range(1, N - g + 1):
        law[t if t <= c else math.ceil(t / g) * g] += cfg.degrade / (N - g)
    assert cfg != PAPER or math.isclose(law[16], 0.2 * 8 / 120) and math.isclose(law[3], 0.2 / 120)
    chi_square([detailflow.prefix_length(a, b, cfg) for a, b in uniform(20_000, 2).tolist()], law)
    ends = [detailflow.prefix_length(a, b, cfg) for a in (0.0, cfg.degrade, 1 - 2 ** -24) for b in (0.0, 1 - 2 ** -24)]
    last = N - g if N - g <= c else math.ceil((N - g) / g) * g
    assert ends == [1, last, N, N, N, N]


@pytest.mark.parametrize("cfg", [PAPER, config(), config(causal=6)])
def test_D13_starts_of_noise(cfg):
    """D13: exact support, the law by a chi-square test, and where the noise ends."""
    g, c = cfg.group, cfg.causal
    for n in [n for n in detailflow.admissible(cfg) if n > 1]:
        law, most = {}, n if n <= c else n - g
        for t in range(most):
            s = t if t < c else t // g * g
            law[s] = law.get(s, 0) + 1 / most
        drawn = detailflow.noise_start(uniform(3000, seed=n), n, cfg)
        chi_square(drawn.tolist(), law)
        edges = detailflow.noise_start(torch.tensor([0.0, 1 - 2 ** -24]), n, cfg)
        assert edges[0] == 0 and edges[1] == max(law)
        end = torch.tensor([s + (1 if s < c else g) for s in law])
        assert (end <= (n if n <= c else n - g)).all()


@torch.no_grad()
@pytest.mark.parametrize("c", [3, 6])
def test_D5_encoder_mask(c):
    """D5: who sees whom, one change at a time."""
    model, x, cfg = tokenizer(causal=c), images(2), config(causal=c)
    e = model.encoder
    latents = (e.queries + e.positions)[None]
    out, memory = e(x, latents)
    patches, z = plain_encoder(e, x, latents, cfg)
    close(out, z, 1e-11)
    for j in range(12):
        changed = latents.clone()
        changed[:, j] += torch.randn(16)
        moved, kept = e(x, changed)
        for a, b in zip(kept, memory):                                  # the patches never see a latent
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        difference = (moved - out).abs().amax((0, 2))
        for i in range(12):
            assert difference[i] > 1e-6 if allowed(i, j, 3, c) else difference[i] == 0, (i, j)
    assert allowed(3, 5, 3, 3) and not allowed(1, 2, 3, 3) and not allowed(4, 5, 3, 6)


@torch.no_grad()
@pytest.mark.parametrize("c", [3, 6])
def test_D5_prefix_encoding(c):
    model, x = tokenizer(causal=c), images(2)
    whole = model.encode(x)[0]
    for n in detailflow.admissible(model.cfg):
        latents = (model.encoder.queries + model.encoder.positions)[None, :n]
        close(model.quant(model.encoder(x, latents)[0]), whole[:, :n], 1e-12)


@torch.no_grad()
def test_D5_cache_of_the_patches_is_exact():
    model, x = tokenizer(), images(2)
    z = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    slow, memory = model.encoder(x, z)
    _, other = model.encoder(x, z + 1)
    fast, again = model.encoder(x, z, other)
    close(fast, slow, 1e-12)
    flat = [torch.stack([a for pair in cache for a in pair]) for cache in (memory, other, again)]
    assert len(memory) == 2 and torch.equal(flat[0], flat[1]) and torch.equal(flat[0], flat[2])


def test_D6_decoder():
    """D6: the plain decoder; positions belong to tokens."""
    model, q = tokenizer(), images(2).flatten(1)[:, :48].view(2, 12, 4).clone().requires_grad_()
    for n in detailflow.admissible(model.cfg):
        x = model.decode(q[:, :n])
        assert x.shape == (2, 3, *[detailflow.image_side(n, model.cfg)] * 2)
        close(x.detach(), plain_decoder(model, q, n, x.shape[-1]).detach(), 1e-11)
        gradient, = torch.autograd.grad(x.square().sum(), q)
        assert gradient[:, :n].any(2).all()
    with torch.no_grad():
        order = [0, 4, 2, 3, 1, 5, 6, 7, 8, 9, 10, 11]
        before, other = model.decode(q[:, :6]), copy.deepcopy(model)
        other.decoder.positions.copy_(model.decoder.positions[order])
        close(other.decode(q[:, order[:6]]), before, 1e-10)
        assert (model.decode(q[:, order[:6]]) - before).abs().max() > 1e-3


def test_D4_quantiser():
    """D4: nearest by angle, unit length, straight-through gradient."""
    vq, h = tokenizer().vq, torch.randn(2, 20, 4, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        vq.codes *= torch.rand(32, 1) * 5 + 0.1                         # raw codes have any length
    q, ids, losses = vq(h)
    close(q.norm(dim=2).detach(), torch.ones(2, 20), 1e-12)
    e = vq.codes / vq.codes.norm(dim=1, keepdim=True)
    close(vq.vectors(torch.arange(32)).detach(), e.detach(), 1e-14)
    close(q.detach(), e[ids].detach(), 1e-12)
    for b, t in itertools.product(range(2), range(20)):
        distance = ((h[b, t] / h[b, t].norm() - e) ** 2).sum(1)
        assert ids[b, t] == distance.argmin()
        assert vq.nearest(h, 5)[b, t].tolist() == distance.argsort()[:5].tolist()
    assert vq(vq.codes[None] * 3)[1].tolist() == [[*range(32)]]
    scaled = vq(h * torch.rand(2, 20, 1) * 100)
    assert torch.equal(scaled[1], ids)
    close(scaled[2].detach(), losses.detach(), 1e-12)
    G = torch.randn_like(h)
    gradient, = torch.autograd.grad((q * G).sum(), h)
    for b, t in itertools.product(range(2), range(20)):
        u = h[b, t] / h[b, t].norm()
        close(gradient[b, t], ((G[b, t] - (G[b, t] @ u) * u) / h[b, t].norm()).detach(), 1e-12)
    assert not torch.autograd.grad((vq(h)[0] * G).sum(), vq.codes, allow_unused=True)[0]    # straight through


def test_quantiser_never_computes_in_bf16():
    torch.manual_seed(0)
    vq, h = detailflow.VQ(512, 4), torch.randn(2, 50, 4).bfloat16()
    close(vq.codes.norm(dim=1).detach(), torch.ones(512), 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        q, ids, losses = vq(h)
    assert q.dtype == losses.dtype == torch.float32 and torch.equal(ids, vq(h.float())[1])


def test_D4_commitment_is_a_quarter_with_another_route():
    model, h = tokenizer(), torch.randn(2, 12, 4, dtype=torch.float64, requires_grad=True)
    codebook, commit = model.vq(h)[2].mean((1, 2))
    weight = detailflow.weights(config(), 0)
    assert weight["commit"] * commit == 0.25 * (weight["codebook"] * codebook) > 0
    for term, (to_code, to_latent) in ((codebook, (True, False)), (commit, (False, True))):
        found = torch.autograd.grad(term, (model.vq.codes, h), retain_graph=True, allow_unused=True)
        assert [g is not None and bool(g.any()) for g in found] == [to_code, to_latent]


STARTS = [(3, s) for s in (0, 2, 3, 6, 9)] + [(6, s) for s in (4, 5, 6, 9)]


@torch.no_grad()
@pytest.mark.parametrize("c, s", STARTS)
def test_D7_triples(c, s):
    """D7: what stands where, and the plain correction."""
    model, x, u = tokenizer(causal=c), images(4), uniform(4, 12)
    q, (clean, given, label), losses = model.correct(x, s, u)
    end, h = s + (1 if s < c else 3), model.encode(x)[0]
    assert torch.equal(given[:, :s], clean[:, :s]) and torch.equal(label[:, :end], clean[:, :end])
    assert torch.equal(given[:, end:], label[:, end:]) and len(q) == 8
    near = model.vq.nearest(h, 5)
    assert (given[:, s:end, None] == near[:, s:end]).any(2).all() and (given[:, s:end] != clean[:, s:end]).any()
    assert end > 9 or (label[:, end:] != clean[:, end:]).any()          # the encoder ran again: codes differ
    plain, ids, _ = model.tokenize(x)
    assert torch.equal(q[:4], plain) and torch.equal(ids, clean)
    assert torch.equal(model.decode(q[:, :9])[:4], model.decode(torch.cat([plain, plain])[:, :9])[:4])
    close(q[4:], model.vq.vectors(given), 1e-12)                         # what is decoded is what the AR model reads
    vectors, ids, total = plain_correction(model, x, s, u)
    assert torch.equal(ids, torch.stack([clean, given, label]))
    close(q, vectors, 1e-10)
    close(losses, total, 1e-11)


@torch.no_grad()
def test_D7_noise_is_uniform_among_the_nearest():
    model, x = tokenizer(), images(1).repeat(4000, 1, 1, 1)
    model.encoder.blocks, model.cfg = model.encoder.blocks[:0], config(near=4)
    _, (_, given, _), _ = model.correct(x, 0, uniform(4000, 12))
    near = model.vq.nearest(model.encode(x[:1])[0], 4)[0, 0].tolist()
    chi_square(given[:, 0].tolist(), dict.fromkeys(near, 0.25))


@torch.no_grad()
def test_each_image_may_have_its_own_noise():
    model, x, u = tokenizer(), images(4), uniform(4, 12)
    s = torch.tensor([0, 2, 6, 9])
    q, triples, losses = model.correct(x, s, u)
    total, tokens = torch.zeros(2), 0
    for b in range(4):
        one, three, part = model.correct(x[b:b + 1], int(s[b]), u[b:b + 1])
        assert all(torch.equal(mine[0], all_of_them[b]) for mine, all_of_them in zip(three, triples))
        close(q[[b, b + 4]], one, 1e-11)
        count = 24 - int(s[b]) - (1 if s[b] < 3 else 3)
        total, tokens = total + part * count, tokens + count
    close(losses, total / tokens, 1e-11)


def passes(model):
    """A list that takes (vectors, ids, losses) of each call of the codebook."""
    seen = []
    model.vq.register_forward_hook(lambda m, args, out: seen.append(out))
    return seen


@pytest.mark.parametrize("c, s", STARTS)
def test_D7_where_gradients_stop(c, s):
    model, x, end = tokenizer(causal=c), images(2), s + (1 if s < c else 3)
    seen = passes(model)
    q, _, _ = model.correct(x, s, uniform(2, 12))
    second = (model.decode(q)[2:] - x).square().mean()
    first, refined, refine = torch.autograd.grad(
        second, (seen[0][0], model.encoder.refined, model.refine.weight), allow_unused=True, retain_graph=True)
    assert first is None or not first.any()
    assert not refined[:end].any() and refined[end:].any(1).all() if end < 12 else refined is None or not refined.any()
    assert end == 12 or refine.any()
    if end < 12:                                                        # ordinary queries reach it only by the codes
        queries, = torch.autograd.grad(second, model.encoder.queries, allow_unused=True, retain_graph=True)
        assert queries is None or not queries.any()
        late, = torch.autograd.grad(second, seen[1][0])
        assert late[:, end:].any(2).all() and not late[:, :end].any()


def test_D7_refined_queries_rest_without_correction():
    model, x = tokenizer(), images(2)
    weight = detailflow.weights(config(align=0.0, perceptual=0.0), 0)
    detailflow.loss_tokenizer(model, x, drawn(12), weight)[0].backward()
    assert model.encoder.refined.grad is None and model.refine.weight.grad is None and model.encoder.queries.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("c, s", STARTS)
def test_D7_mix_of_the_vq_losses(c, s):
    model, end, N = tokenizer(causal=c), s + (1 if s < c else 3), 12
    seen = passes(model)
    _, _, losses = model.correct(images(2), s, uniform(2, 12))
    (_, _, first), (_, _, second) = seen
    a, b = N / (2 * N - end), (N - end) / (2 * N - end)
    assert abs(a + b - 1) < 1e-15
    late = second[:, :, end:].mean((1, 2)) if end < N else 0            # never on the prefix again
    close(losses, a * first.mean((1, 2)) + b * late, 1e-12)


@torch.no_grad()
def test_D8_ar_input():
    """D8: the upper row, the mask, and logits by the plain form."""
    for changes in (dict(), dict(causal=6), dict(group=1, causal=1), dict(group=4, causal=8)):
        cfg, model = config(**changes), ar(**changes)
        ids, y = torch.randint(32, (2, 12)), torch.tensor([4, 0])
        rows, g, c = model.embed(ids, y), cfg.group, cfg.causal
        z = model.table.weight[ids]
        expected = [model.label.weight[y]] + [z[:, t] for t in range(c)] + [m.expand(2, -1) for m in model.masks]
        expected += [z[:, t] for t in range(c, 12 - g)]
        close(rows, torch.stack(expected, 1)[:, :12], 1e-14)
        assert rows.shape == (2, 12, 16) and model(ids, y).shape == (2, 12, 32) and len(model.masks) == g - 1
        assert model.mask.tolist() == [[allowed(i, j, g, c) for j in range(12)] for i in range(12)]
        close(model(ids, y), plain_ar(model, ids[:, :12 - g], y, cfg), 2e-5)
    one = ar(group=1, causal=1)
    assert torch.equal(one.mask, torch.ones(12, 12).tril().bool())
    close(one.embed(ids, y), torch.cat([one.label.weight[y][:, None], one.table.weight[ids[:, :-1]]], 1), 1e-14)


@torch.no_grad()
@pytest.mark.parametrize("c", [3, 6])
def test_D8_ar_causality(c):
    model, y = ar(causal=c), torch.tensor([1, 3])
    ids = torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(1))
    before = model(ids, y)
    for t in range(12):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 7) % 32
        moved = (model(changed, y) - before).abs().amax((0, 2))
        for p in range(12):                                             # 0-based: which logits know token t
            knows = t < p if p < c else t // 3 < p // 3
            assert moved[p] > 1e-7 if knows else moved[p] == 0, (t, p)
    assert (model(ids, y.flip(0)) - before).abs().amax((0, 2)).min() > 1e-4


def recorded(model, monkeypatch):
    """Lists of (cond + null) logits of every call of a model, and of what is sampled from."""
    calls, guided = [], []
    forward, filtered = model.decode_step, common.filter_logits

    def decode_step(*args):
        calls.append(forward(*args))
        return calls[-1]
    monkeypatch.setattr(model, "decode_step", decode_step)
    monkeypatch.setattr(common, "filter_logits", lambda *args: guided.append(args[0]) or filtered(*args))
    return calls, guided


@torch.no_grad()
@pytest.mark.parametrize("c", [3, 6])
def test_D17_cache_and_teacher_forcing(c, monkeypatch):
    y, u = torch.tensor([0, 4, 2]), uniform(3, 12)
    for double, atol in ((True, 1e-12), (False, 2e-5)):
        model, cfg = ar(causal=c), config(causal=c, cfg_scale=2.0)
        model = model if double else model.float()
        with monkeypatch.context() as patch:
            calls, _ = recorded(model, patch)
            ids = detailflow.generate(model, y, u, cfg)
        cached = torch.cat(calls, 1)
        whole = torch.cat([model(ids, y), model(ids, torch.full((3,), 5))])
        close(cached, whole, atol)
        assert torch.equal(ids, detailflow.generate(model, y, u, cfg, cached=False))
        greedy = dataclasses.replace(cfg, top_k=1)
        first, second = (detailflow.generate(model, y, u, greedy, cached) for cached in (True, False))
        assert torch.equal(first, second) and not torch.equal(first, ids)


@torch.no_grad()
@pytest.mark.parametrize("changes", [dict(), dict(cfg_scale=2.5), dict(cfg_scale=2.5, cfg_gradual=True),
                                     dict(causal=6, cfg_scale=3.0, cfg_gradual=True), dict(group=1, causal=1, cfg_scale=1.5),
                                     dict(temperature=0.5, group=4, causal=8)])
def test_generation_equals_the_plain_loop(changes):
    model, cfg, y, u = ar(**changes), config(**changes), torch.tensor([0, 4, 2]), uniform(3, 12)
    ids = detailflow.generate(model, y, u, cfg)
    assert torch.equal(ids, plain_generate(model, y, u, cfg))
    for n in detailflow.admissible(cfg):                                # stopping early is a prefix
        assert torch.equal(detailflow.generate(model, y, u[:, :n], cfg), ids[:, :n])


@torch.no_grad()
def test_D17_steps(monkeypatch):
    """D17: how many steps, and which."""
    for N, g, steps in ((128, 8, 23), (256, 8, 39), (512, 8, 71), (256, 16, 31), (128, 4, 35), (128, 1, 128)):
        spans = list(detailflow.spans(N, g, g))
        assert len(spans) == steps == g + N // g - 1
        assert [j for _, j in spans[:-1]] == [i for i, _ in spans[1:]] and spans[0][0] == 0 and spans[-1][1] == N
    assert [*detailflow.spans(12, 3, 6)] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 9), (9, 12)]
    assert [*detailflow.spans(2, 3, 6)] == [(0, 1), (1, 2)]
    for cached, positions in ((True, [1, 1, 1, 3, 3, 3]), (False, [12] * 6)):
        model = ar()
        with monkeypatch.context() as patch:
            calls, _ = recorded(model, patch)
            detailflow.generate(model, torch.tensor([0]), uniform(1, 12), config(), cached)
        assert [call.shape[1] for call in calls] == positions


def test_D16_initial_cross_entropy():
    torch.manual_seed(0)
    for K, expected in ((8192, 9.0109), (32, math.log(32))):
        model = detailflow.AR(config(codes=K), 5).double()
        no, ids = torch.zeros(2, dtype=torch.bool), torch.randint(K, (3, 2, 12))
        batch = triple(ids), torch.tensor([1, 2])
        value = detailflow.loss_ar(model, batch, {"noisy": no, "drop": no})[0].item()
        assert abs(value - math.log(K)) < 1e-6 and abs(value - expected) < 1e-4
        assert not model.head.weight.any() and abs(model.table.weight.std().item() - 0.02) < 2e-3
        assert model.head.bias is None and not any("bias" in name for name, _ in model.named_parameters())


@torch.no_grad()
def test_D18_guidance_by_value(monkeypatch):
    """D18: constant, and gradual from group to group."""
    y, u, M = torch.tensor([0, 4, 2]), uniform(3, 12), 4
    assert len(ar().label.weight) == 6 and len(ar(label_dropout=0.0).label.weight) == 5
    for s, gradual in itertools.product((0.0, 1.0, 2.5), (False, True)):
        model = ar()
        with monkeypatch.context() as patch:
            _, guided = recorded(model, patch)
            ids = detailflow.generate(model, y, u, config(cfg_scale=s, cfg_gradual=gradual))
        cond, null = model(ids, y), model(ids, torch.full((3,), 5))     # row 5, the number of classes, is null
        for step, (i, j) in enumerate([(0, 1), (1, 2), (2, 3), (3, 6), (6, 9), (9, 12)]):
            scale = s * (M - i // 3 + 1) / (M + 1) if gradual and i >= 3 else s
            if s == 1:                                                  # without a null pass nothing can be gradual
                scale = 1.0
            expected = null[:, i:j] + scale * (cond[:, i:j] - null[:, i:j])
            close(guided[step], expected.flatten(0, 1), 1e-11)


def alignment(model, x, features):
    weight = detailflow.weights(config(align=1.0, perceptual=0.0, gan=0.0), 0)
    return detailflow.loss_tokenizer(model, x, drawn(12, 2, uniform(len(x), 12)), weight, features)[1]["align"]


@torch.no_grad()
def test_D10_alignment():
    """D10: minus the cosine between the head of the first clean vector and the teacher's mean."""
    model, x = tokenizer(5), images()
    maps = torch.randn(3, 5, 2, 3, dtype=torch.float64)
    value = alignment(model, x, lambda x: maps)
    q = model.tokenize(x)[0]
    expected = -F.cosine_similarity(model.align(q[:, 0]), maps.mean((2, 3)), dim=1).mean()
    close(value, expected, 1e-11)
    assert -1 <= value <= 1
    close(alignment(model, x, lambda x: 7 * maps), value, 1e-11)
    scaled = copy.deepcopy(model)
    scaled.align[4].weight *= 3
    scaled.align[4].bias *= 3
    close(alignment(scaled, x, lambda x: maps), value, 1e-11)
    close(alignment(model, x, lambda x: 0.1 * model.align(q[:, 0])[..., None, None]), -1.0, 1e-11)
    assert [type(layer).__name__ for layer in model.align] == ["Linear", "SiLU", "Linear", "SiLU", "Linear"]
    assert [layer.out_features for layer in model.align[::2]] == [1024, 1024, 5]


def count(module):
    return sum(p.numel() for p in module.parameters())


def preset(name):
    return dataclasses.replace(detailflow.Config(), **{"preset": name, **detailflow.PRESETS[name]})


@pytest.mark.parametrize("name, N, encoder, total", [
    ("DetailFlow-16", 128, 184_499_520, 270_533_832), ("DetailFlow-32", 256, 184_941_888, None),
    ("DetailFlow-64", 512, 185_826_624, None), ("DetailFlow-16x16", 256, 184_941_888, None)])
def test_published_tokenizer_sizes(name, N, encoder, total):
    cfg = preset(name)
    assert (cfg.tokens, cfg.size, cfg.codes, cfg.dim, cfg.patch) == (N, 256, 8192, 8, 16)
    with torch.device("meta"):
        model = detailflow.Tokenizer(cfg)
        align = detailflow.Tokenizer(cfg, 1152).align
    assert count(model.encoder) == encoder and count(align) == 2_239_616
    assert count(model.encoder.blocks[0]) == 15_239_504 and count(model.decoder.blocks[0]) == 7_087_872
    assert [count(part) for part in (model.quant, model.read, model.refine, model.vq)] == [9_224, 6_912, 10_368, 65_536]
    assert count(model.decoder) == 85_942_272 + (N - 128) * 768
    assert total in (None, count(model))
    for half, heads in ((model.encoder, 16), (model.decoder, 12)):
        assert len(half.blocks) == 12 and half.blocks[0].heads == heads


@pytest.mark.parametrize("name, size", [("DetailFlow-16", 326_140_928), ("DetailFlow-16-L", 326_140_928),
                                        ("DetailFlow-16-B", 98_310_912), ("DetailFlow-16-XL", 753_736_960),
                                        ("DetailFlow-16-XXL", 1_385_817_600)])
def test_published_ar_sizes(name, size):
    cfg = preset(name)
    with torch.device("meta"):
        model = detailflow.AR(cfg, 1000)
    assert count(model) == size and len(model.label.weight) == 1001
    heads = {"B": 12, "L": 16, "XL": 20, "XXL": 24}[name.removeprefix("DetailFlow-16").strip("-") or "L"]
    assert model.blocks[0].heads == heads and model.norm.eps == 1e-5


def test_patches_and_grid():
    x = images(2, side=12)
    u = detailflow.patchify(x, 4)
    assert torch.equal(detailflow.unpatchify(u, 4), x) and u.shape == (2, 9, 48)
    for row, column, i, j, c in itertools.product(range(3), range(3), range(4), range(4), range(3)):
        assert torch.equal(u[:, 3 * row + column, 12 * i + 3 * j + c], x[:, c, 4 * row + i, 4 * column + j])
    grid = torch.randn(4, 4, 7)
    close(detailflow.resize_grid(grid, 4), grid.flatten(0, 1), 1e-6)
    assert detailflow.resize_grid(grid, 3).shape == (9, 7)


def test_D3_rotary_embedding():
    """D3: angles by row and column; products depend on their differences alone; the class is zero."""
    N, g, d = 21, 4, 16
    rotation = cos, sin = detailflow.rotary_embedding(N, g, d).double()
    for p in range(N):
        close(torch.complex(cos[p], sin[p]), plain_turn(p, g, d), 2e-6)
    q, k = torch.randn(2, 1, 1, 1, d, dtype=torch.float64).expand(-1, 1, 1, N, d)
    a, b = (detailflow.rotate(x, rotation)[0, 0] for x in (q, k))
    close(a.norm(dim=1)[1:], q[0, 0].norm(dim=1)[1:], 1e-6)
    assert not a[0].any() and not b[0].any()
    products, seen = a @ b.T, {}
    for i, j in itertools.product(range(1, N), range(1, N)):
        step = (i - 1) // g - (j - 1) // g, (i - 1) % g - (j - 1) % g
        seen.setdefault(step, []).append(products[i, j].item())
    assert all(max(values) - min(values) < 1e-5 for values in seen.values())
    assert len({round(values[0], 4) for values in seen.values()}) > len(seen) // 2


# --- Training steps by hand -----------------------------------------------------------

def judge():
    """A frozen network with maps of 5 features, for any even side."""
    torch.manual_seed(7)
    return torch.nn.Conv2d(3, 5, 2, stride=2).double().requires_grad_(False)


def plain_loss(model, x, n, s, u, weight, features, bypass=False):
    """The sum of the tokenizer's losses without adversary (D9), each of them, and (ids, images, goals), from the slow
    forms above. bypass: there are no codes yet."""
    q, (ids, *_), (codebook, commit) = plain_correction(model, x, s, u)
    if bypass:
        e = model.encoder
        h = linear(plain_encoder(e, x, (e.queries + e.positions)[None], model.cfg)[1], model.quant)
        q, codebook, commit = h / h.norm(dim=2, keepdim=True), 0.0, 0.0
    recon, goal = plain_decoder(model, q, n, detailflow.image_side(n, model.cfg)), plain_target(x, n, model.cfg)
    goal = torch.cat([goal, goal]) if s is not None else goal
    losses = {"mse": (recon - goal).square().mean(), "codebook": codebook, "commit": commit}
    if weight["lpips"]:
        a, b = (f / f.square().sum(1, keepdim=True).sqrt() for f in (features(recon), features(goal)))
        losses["lpips"] = 0.1 * (a - b).square().sum(1).mean()
    if weight["align"]:
        first, feature = model.align(q[:len(x), 0]), features(x).mean((2, 3))
        losses["align"] = -((first * feature).sum(1) / first.norm(dim=1) / feature.norm(dim=1)).mean()
    return sum(weight[name] * loss for name, loss in losses.items()), losses, (ids, recon, goal)


@pytest.mark.parametrize("n, s", [(12, 0), (12, 6), (9, 3), (6, 2), (3, 2), (2, 0), (1, None), (12, None)])
def test_D9_tokenizer_step_by_hand(n, s):
    cfg, x, u, features = config(perceptual=0.7, ramp=10, align=0.6, causal=3), images(2), uniform(2, 12), judge()
    weight = detailflow.weights(cfg, 5)
    assert weight == {"mse": 1, "codebook": 1, "commit": 0.25, "align": 0.6, "lpips": 0.42, "gan": 0.0}
    model, other = tokenizer(5, causal=3), tokenizer(5, causal=3)
    value, losses, (ids, recon, goal) = detailflow.loss_tokenizer(model, x, drawn(n, s, u), weight, features)
    expected, parts, _ = plain_loss(other, x, n, s, u, weight, features)
    assert losses.keys() == parts.keys() and len(goal) == len(recon) == 2 + 2 * (s is not None)
    assert ids.shape == (2, 12) and not recon.requires_grad
    for name in parts:
        close(losses[name].detach(), parts[name].detach(), 1e-11)
    value.backward()
    expected.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        a, b = (torch.zeros_like(p) if g is None else g for g in (p.grad, q.grad))
        assert (a - b).abs().max() <= 1e-9 * (1 + b.abs().max()), name
        assert (p.grad is None) == (q.grad is None) or not a.any(), name


def test_D9_adversarial_term_by_hand():
    cfg, features = config(gan=0.3, gan_from=4, align=0.0, perceptual=0.0), judge()
    x, u, v = images(2), uniform(2, 12), uniform(2, 2, 10)
    assert [detailflow.weights(cfg, step)["gan"] for step in (0, 2, 3, 4)] == [0, 0, 0.3, 0.3]
    disc, model = awake(detailflow.make_discriminator(5)), tokenizer()
    weight = detailflow.weights(cfg, 4)
    value, losses, (_, recon, _) = detailflow.loss_tokenizer(model, x, drawn(12, 3, u, v), weight, features, disc)
    logits = disc(features(torch.stack([plain_augment(a, b, 0.2, 0.5) for a, b in zip(recon, rows_of(v))])))
    close(losses["gan"].detach(), -logits.mean().detach(), 1e-11)
    expected = losses["mse"] + losses["codebook"] + 0.25 * losses["commit"] + 0.3 * losses["gan"]
    close(value.detach(), expected.detach(), 1e-11)
    gradient, = torch.autograd.grad(losses["gan"], model.decoder.head.weight)
    assert gradient.any()


def test_D11_schedules_of_the_losses():
    """D11. The official code counts its steps from 1 (global_step = train_steps + 1), the loop here from 0."""
    cfg = detailflow.Config()
    w = {number: detailflow.weights(cfg, number - 1) for number in (1, 5000, 10_000, 39_999, 40_000, 10 ** 6)}
    assert [w[number]["lpips"] for number in w] == [1e-4, 0.5, 1, 1, 1, 1]
    assert [w[number]["gan"] for number in w] == [0, 0, 0, 0, 0.2, 0.2]
    assert all(x["mse"] == x["codebook"] == 1 and x["commit"] == 0.25 and x["align"] == 1 for x in w.values())
    assert detailflow.weights(config(ramp=0, perceptual=0.5), 1)["lpips"] == 0.5


def plain_augment(x, u, cut, chance):
    """DiffAugment of one image (3, h, h): colour, a shift into a black border, a black square."""
    h, x = x.shape[-1], x.clone()
    if u[0] < chance:
        x = x + u[3] - 0.5
        grey = x.mean(0, keepdim=True)
        x = (x - grey) * (2 * u[4]) + grey
        x = (x - x.mean()) * (u[5] + 0.5) + x.mean()
    if u[1] < chance:
        m = round(h / 8)
        down, right = (int(a * (2 * m + 1)) - m for a in u[6:8])
        moved = torch.zeros_like(x)
        for i, j in itertools.product(range(h), range(h)):
            if 0 <= i + down < h and 0 <= j + right < h:
                moved[:, i, j] = x[:, i + down, j + right]
        x = moved
    if u[2] < chance:
        k = round(h * cut)
        top, left = (int(a * (h + 1 - k % 2)) - k // 2 for a in u[8:10])
        x[:, max(top, 0):max(top + k, 0), max(left, 0):max(left + k, 0)] = 0
    return x


@pytest.mark.parametrize("h, cut, chance", [(16, 0.2, 0.5), (12, 0.5, 1.0), (8, 0.2, 0.0), (4, 0.2, 1.0)])
def test_D14_augmentation_by_hand(h, cut, chance):
    """D14 by loops over images and pixels."""
    x, u = images(40, side=h), uniform(25, 2, 10, seed=int(10 * chance + h))
    expected = torch.stack([plain_augment(a, b, cut, chance) for a, b in zip(x, rows_of(u))])
    close(detailflow.augment(x, u, cut, chance), expected, 1e-12)
    if chance == 0:
        assert torch.equal(detailflow.augment(x, u, cut, chance), x)
    x = x.requires_grad_()
    gradient, = torch.autograd.grad(detailflow.augment(x, u, cut, chance).square().sum(), x)
    assert gradient.any()


def plain_rival(real, fake, hard_real, hard_fake, means):
    """D15 before it is weighed: hinge and LeCam, and consistency, of logits of real and fake images."""
    hinge = (1 - real).clamp(min=0).mean() / 2 + (1 + fake).clamp(min=0).mean() / 2
    lecam = (real - means[1]).clamp(min=0).square().mean() + (means[0] - fake).clamp(min=0).square().mean()
    even = ((hard_real - real).square().mean() + (hard_fake - fake).square().mean()) / 2
    return 0.2 * (hinge + 0.001 * lecam) + 4 * even


def test_D15_discriminator_step_by_hand():
    """D15: hinge, LeCam and consistency from a loop over images."""
    disc, features, v = awake(detailflow.make_discriminator(5)), judge(), uniform(2, 4, 2, 10)
    goal, recon = images(2, seed=3), images(2, seed=4)
    logits = detailflow.disc_logits(disc, features, recon, goal, v)
    means = torch.tensor([0.4, -0.3])
    value = detailflow.loss_disc(logits, means, 0.2)
    assert detailflow.loss_disc(logits, means, 0.0) == 0                # before --gan_from: consistency as well
    cases = [(x, v[:, k, 0], *how) for k, (x, *how) in enumerate(((goal, 0.2, 0.5), (recon, 0.2, 0.5), (goal, 0.5, 1), (recon, 0.5, 1)))]
    real, fake, hard_real, hard_fake = (
        disc(features(torch.stack([plain_augment(a, b, cut, chance) for a, b in zip(x, w)]))).detach().flatten()
        for x, w, cut, chance in cases)
    over = lambda numbers: [max(0.0, float(a)) for a in numbers]
    hinge = np.mean(over(1 - real)) / 2 + np.mean(over(1 + fake)) / 2
    lecam = np.mean(np.square(over(real + 0.3))) + np.mean(np.square(over(0.4 - fake)))
    even = ((hard_real - real).square().mean() + (hard_fake - fake).square().mean()) / 2
    close(value.detach() / 100, (0.2 * (hinge + 0.001 * lecam) + 4 * even).detach() / 100, 1e-11)
    close(torch.stack([a.mean() for a in logits]).detach(),
          torch.stack([a.mean() for a in (real, fake, hard_real, hard_fake)]).detach(), 1e-12)
    layers = [type(layer).__name__ for layer in disc]
    assert layers == ["Conv2d", "LeakyReLU", "Conv2d"] and disc[1].negative_slope == 0.2
    assert disc[0].kernel_size == disc[2].kernel_size == (1, 1) and disc[2].out_channels == 1


def test_D16_ar_step_by_hand():
    """D16: a sum over sequences and positions; value and all gradients."""
    model, cfg, g = ar(), config(), torch.Generator().manual_seed(3)
    triples, y = torch.randint(32, (3, 4, 12), generator=g), torch.tensor([0, 1, 2, 3])
    noisy, drop = torch.tensor([True, False, True, False]), torch.tensor([False, False, True, True])
    value, _ = detailflow.loss_ar(model, (triple(triples), y), {"noisy": noisy, "drop": drop})
    total = 0
    for b in range(4):
        read, goal = (triples[1, b], triples[2, b]) if noisy[b] else (triples[0, b], triples[0, b])
        logits = plain_ar(model, read[None, :9], torch.tensor([5 if drop[b] else int(y[b])]), cfg)[0]
        total = total - sum(logits[p].log_softmax(0)[goal[p]] for p in range(12)) / 12
    close(value.detach(), total.detach() / 4, 2e-6)
    names = dict(model.named_parameters())
    ours = torch.autograd.grad(value, names.values())
    for name, a, b in zip(names, ours, torch.autograd.grad(total / 4, names.values())):
        assert (a - b).abs().max() < 1e-5 and a.any(), name
    assert not ours[list(names).index("label.weight")][[2, 4]].any()    # no sequence had these labels


def test_dropout_has_three_places():
    model = ar(dropout=0.5).train()
    ids, y = torch.randint(32, (2, 12)), torch.tensor([1, 2])
    torch.manual_seed(0)
    rows = model.embed(ids, y)
    close((rows == 0).double().mean(), 0.5, 0.15)
    seen = []
    block = model.blocks[0]
    block.dropout.register_forward_hook(lambda m, args, out: seen.append((out == 0).double().mean()))
    model(ids, y)
    assert len(seen) == 2 and all(0.3 < share < 0.7 for share in seen)  # attention's and the MLP's branch
    assert detailflow.Config().dropout == 0.1


# --- The loops ---------------------------------------------------------------------------

def run(*words):
    """detailflow.py with these arguments, in this process, on 40 training images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detailflow.open_split, "__defaults__", (40,))
        cfg = common.cli(detailflow.Config, detailflow.PRESETS, detailflow.__doc__, list(words))
        common.launch(detailflow.main, cfg, detailflow.check, detailflow.prepare)


def tiny(**changes):
    return argv("detailflow", **changes)


def watched(monkeypatch, name):
    """The list of (copies of the modules at that moment, arguments) of every call of a loss function."""
    calls, function = [], getattr(detailflow, name)

    def call(*args):
        calls.append([copy.deepcopy(a) if isinstance(a, torch.nn.Module) else a for a in args])
        return function(*args)
    monkeypatch.setattr(detailflow, name, call)
    return calls


def clipped(model, value):
    """Gradients by name, scaled so that their norm is at most 1; zero where there is none."""
    names = dict(model.named_parameters())
    found = torch.autograd.grad(value, names.values(), allow_unused=True, retain_graph=True)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in found if g is not None))
    return {name: None if g is None else g / max(1.0, norm + 1e-6) for name, g in zip(names, found)}


def adam_first(p, g, lr, decay=0.0, eps=1e-8):
    """Adam's first step: both corrected means are the gradient itself."""
    return p * (1 - lr * decay) - lr * g / (g.abs() + eps)


@pytest.fixture
def double():
    """Everything in float64, as tests.two trains."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def plain_draws(dataset, step, stage, B):
    """Index (B,) and images of a step, and its draws: columns of u (B, 6 + 8 + 100), three for all images."""
    g = common.make_generator(0, step, f"{stage} data")
    index = torch.randint(len(dataset), (B,), generator=g).numpy()
    u, once = torch.rand(B, 114, generator=g), torch.rand(3, generator=g).tolist()
    x = dataset.pixels(index).double()
    return index, torch.stack([a.flip(2) if v[0] < 0.5 else a for a, v in zip(x, u)]), u, once


def plain_renewal(model, dataset, step, codes):
    """Spherical k-means of 20 rounds over the latents of 129 images, or such latents for the codes without use."""
    g = common.make_generator(0, step, "codes")
    x = dataset.pixels(torch.randint(40, (129,), generator=g).numpy()).double()
    u = F.normalize(model.encode(x)[0].flatten(0, 1), dim=1)
    fresh = u[torch.randperm(len(u), generator=g)[:16]]
    if codes is not None:
        return torch.stack([code if used > 0 else other for code, used, other in zip(codes, model.vq.use, fresh)])
    for _ in range(20):
        near = torch.cdist(u, fresh).argmin(1)
        fresh = torch.stack([F.normalize(u[near == k].sum(0), dim=0) if (near == k).any() else fresh[k] for k in range(16)])
    return fresh


def clip(network):
    """Scale a network's gradients so that their common norm is at most 1."""
    found = [p.grad for p in network.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(g.square().sum()) for g in found))
    for g in found:
        g /= max(1.0, norm + 1e-6)


def test_tokenizer_training_by_value(tmp_path, monkeypatch, double):
    """D9 to D15, D20 in a loop of its own: codes from step 3, renewed at 6 and 9 but not at 12 (70 % of 14 steps), the
    adversary from step 4, the perceptual loss whole from step 7, rates that rise for 3.5 steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(detailflow, "open_teacher", lambda cfg: (judge(), 5))
    run(*tiny(stage="tokenizer", steps=14, kmeans=3, gan_from=5, ramp=8, warmup=0.25, lr=0.4, flip=True, degrade=0.7, batch=2))
    saved = torch.load("runs/detailflow/demo/tokenizer.pt", weights_only=True)
    cfg, features = detailflow.Config(**saved["config"]), judge()
    dataset = detailflow.open_split(cfg, "train", 40)
    torch.manual_seed(common.make_generator(0, 0, "tokenizer weights").initial_seed())
    model, disc, means, phases = detailflow.Tokenizer(cfg, 5), detailflow.make_discriminator(5), torch.zeros(2), set()
    opt = torch.optim.Adam([*model.parameters(), *disc.parameters()], betas=(0.9, 0.95))
    for t in range(14):
        _, x, u, (degrade, length, start) = plain_draws(dataset, t, "tokenizer", 2)
        n = 8 if t < 3 or degrade >= 0.7 else [1, 2, 4, 4, 6, 6][int(6 * length)]
        s = None if t < 3 or n == 1 else [0, 1, 2, 2, 4, 4][int(start * max(n - 2, 2))]
        if t in (3, 6, 9):
            model.vq.codes.data = plain_renewal(model, dataset, t, model.vq.codes if t > 3 else None).detach()
            model.vq.use.zero_()
        opt.param_groups[0]["lr"] = 0.4 / 128 * (0.1 + (0.9 * t / 3.5 if t < 3.5 else 0.45 * (1 + math.cos(math.pi * t / 14))))
        weight = dict(mse=1, codebook=1, commit=0.25, lpips=min(1, (t + 1) / 8), align=1)
        value, _, (ids, recon, goal) = plain_loss(model, x, n, s, u[:, 6:14], weight, features, t < 3)
        v = [u[:, 14 + 20 * k:][:, :20].unflatten(1, (2, 10)).transpose(0, 1).flatten(0, 1) for k in range(5)]
        shown = lambda x, k, *how: disc(features(torch.stack([plain_augment(a, b, *how) for a, b in zip(x, v[k])])))
        value = value - 0.2 * shown(recon, 0, 0.2, 0.5).mean() * (t >= 4)
        soft, hard = [(goal, 1), (recon.detach(), 2)], [(goal, 3), (recon.detach(), 4)]
        logits = [shown(a, k, 0.2, 0.5) for a, k in soft] + [shown(a, k, 0.5, 1.0) for a, k in hard]
        means = 0.999 * means + 0.001 * torch.stack([a.mean().detach() for a in logits[:2]])
        opt.zero_grad()
        value.backward(inputs=[*model.parameters()])
        (plain_rival(*logits, means) * (t >= 4)).backward(inputs=[*disc.parameters()])
        clip(model)
        clip(disc)
        opt.step()
        model.vq.use += torch.bincount(ids.flatten(), minlength=16) / ids.numel()
        phases.add((n, s))
    close(saved["state"]["disc"]["means"], means, 1e-9)
    assert len(phases) > 4 and {1, 8} < {n for n, _ in phases} and len({s for _, s in phases}) > 2
    for network, name in ((model, "tokenizer"), (disc, "disc")):
        for key, tensor in network.state_dict().items():
            close(saved["state"][name][key], means if key == "means" else tensor, 1e-9)


def test_the_gradients_of_both_networks_are_cut_each_at_1(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cut, original = [], torch.nn.utils.clip_grad_norm_

    def noted(params, most):
        params = [*params]
        cut.append((sum(p.numel() for p in params), most))
        return original(params, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted)
    run(*tiny(stage="tokenizer", steps=1, batch=2, align=0.0))
    state = torch.load("runs/detailflow/demo/tokenizer.pt", weights_only=True)["state"]
    count = lambda name, *buffers: sum(value.numel() for key, value in state[name].items() if key not in buffers)
    assert cut == [(count("tokenizer", "vq.use"), 1.0), (count("disc", "means"), 1.0)]


@pytest.mark.parametrize("crops", [0, 2])
def test_ar_training_by_value(crops, tmp_path, monkeypatch, double):
    """D16, D19, D20 in a loop of its own: rates that rise for 1.1 of 22 steps; noise of each image for ever;
    labels lost by a draw of their own, beside noise and without it; averaged weights. Two stored crops are an image and
    its mirror image."""
    monkeypatch.chdir(tmp_path)
    seeds = []
    monkeypatch.setattr(common, "seed_dropout", lambda *of: seeds.append(of))               # nothing is dropped here
    rest = dict(gan=0, perceptual=0, align=0, flip=True, crops=crops)
    run(*tiny(steps=22, steps_tokenizer=2, batch_ar=4, noisy=0.5, label_dropout=0.4, lr_ar=0.04, ema=0.7, **rest))
    saved = torch.load("runs/detailflow/demo/ar.pt", weights_only=True)
    cfg = detailflow.Config(**saved["config"])
    dataset, (tokenizer, _, _) = detailflow.open_split(cfg, "train", 40), detailflow.load(cfg, "runs/detailflow/demo/tokenizer.pt")
    torch.manual_seed(common.make_generator(0, 0, "ar weights").initial_seed())
    model, seen = detailflow.AR(cfg, 10), set()
    average = copy.deepcopy(model).requires_grad_(False)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    opt = torch.optim.AdamW([{"params": decayed}, {"params": [p for p in model.parameters() if p.ndim < 2]}], betas=(0.9, 0.95))
    opt.param_groups[0]["weight_decay"], opt.param_groups[1]["weight_decay"] = 0.05, 0.0
    for t in range(22):
        index, x, u, _ = plain_draws(dataset, t, "ar", 4)
        noise = data.uniform(index[:, None], np.arange(17), 1)                  # by seed + 1 and image, for ever
        rate = 0.005 + 0.995 * t / 1.1 if t < 1.1 else 0.01 + 0.495 * (1 + math.cos(math.pi * (t / 22 - 0.05) / 0.95))
        value = 0
        for b in range(4):
            s, k = [0, 1, 2, 2, 4, 4][int(6 * noise[b, 0])], int(crops * u[b, 1])
            shown = dataset.pixels(index[b:b + 1]).double().flip([3] if k else []) if crops else x[b:b + 1]
            codes = torch.from_numpy(noise[b:b + 1, 1 + 8 * k:9 + 8 * k])
            _, (clean, given, target), _ = plain_correction(tokenizer, shown, s, codes)
            wrong, lost = (u[b, 4:6] < torch.tensor([0.5, 0.4])).tolist()
            read, goal = (given, target) if wrong else (clean, clean)
            logits = plain_ar(model, read[:, :6], torch.tensor([10 if lost else dataset.labels[index[b]]]), cfg)
            value = value - logits.log_softmax(2).gather(2, goal[..., None]).mean() / 4
            seen.add((wrong, lost))
        for group in opt.param_groups:
            group["lr"] = 0.04 * rate
        opt.zero_grad()
        value.backward()
        clip(model)
        opt.step()
        for old, new in zip(average.parameters(), model.parameters()):
            old.mul_(0.7).add_(0.3 * new)
    assert len(seen) == 4 and seeds == [(0, t) for t in range(22)]
    for network, name in ((model, "model"), (average, "ema"), (tokenizer, "tokenizer")):
        for key, tensor in network.state_dict().items():
            close(saved["state"][name][key], tensor, 1e-9)


def test_first_training_steps_by_hand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second, rival = (watched(monkeypatch, name) for name in ("loss_tokenizer", "loss_ar", "disc_logits"))
    run(*tiny(steps=1, kmeans=0, degrade=1, lr=0.3, lr_ar=0.2, gan_from=0, dropout=0, batch_ar=6, ema=0.8, ramp=0))
    model, x, draws, weight, features, disc = first[0]
    value, losses, (ids, recon, goal) = detailflow.loss_tokenizer(*first[0])
    saved = torch.load("runs/detailflow/demo/tokenizer.pt", weights_only=True)["state"]
    lr = 0.3 * 4 / 256 * 0.1                                            # warm-up starts at a tenth of the scaled rate
    for name, g in clipped(model, value).items():
        p = model.get_parameter(name).detach()
        expected = p if g is None else adam_first(p, g, lr)
        close(saved["tokenizer"][name], expected, 2e-6)
    logits = detailflow.disc_logits(*rival[0])
    means = 0.001 * torch.stack([logits[0].mean(), logits[1].mean()]).detach()
    for name, g in clipped(rival[0][0], detailflow.loss_disc(logits, means, 0.2)).items():
        close(saved["disc"][name], adam_first(disc.get_parameter(name).detach(), g, lr), 2e-6)
    close(saved["disc"]["means"], means, 1e-7)
    assert weight["gan"] == 0.2 and torch.equal(rival[0][2], recon) and torch.equal(rival[0][3], goal)
    use, picks = saved["tokenizer"]["vq.use"], torch.bincount(ids.flatten(), minlength=16)
    close(use / use.sum(), picks / picks.sum(), 1e-6)
    model, (triples, y), draws = second[0]
    assert all(ids.shape == (6, 8) for ids in triples) and y.shape == draws["noisy"].shape == draws["drop"].shape == (6,)
    saved = torch.load("runs/detailflow/demo/ar.pt", weights_only=True)["state"]
    for name, g in clipped(model, detailflow.loss_ar(*second[0])[0]).items():
        p = model.get_parameter(name).detach()
        moved = adam_first(p, g, 0.2 * 0.005, decay=0.05 * (p.ndim > 1))
        close(saved["model"][name], moved, 2e-6)
        close(saved["ema"][name], 0.8 * p + 0.2 * moved, 2e-6)


def test_D15_lecam_means_move_from_the_first_step_and_before_they_are_read(tmp_path, monkeypatch):
    """D15: as the official code, with weight 0 until the discriminator starts."""
    monkeypatch.chdir(tmp_path)
    seen, original = [], detailflow.loss_disc

    def loss_disc(logits, means, weight):
        seen.append(([a.mean().item() for a in logits[:2]], means.tolist(), weight))
        return original(logits, means, weight)
    monkeypatch.setattr(detailflow, "loss_disc", loss_disc)
    run(*tiny(steps=5, stage="tokenizer", gan_from=4))
    means = [0.0, 0.0]
    for now, read, _ in seen:
        means = [0.999 * old + 0.001 * new for old, new in zip(means, now)]
        close(read, means, 1e-6)
    assert [weight for *_, weight in seen] == [0, 0, 0, 0.2, 0.2] and all(means)
    saved = torch.load("runs/detailflow/demo/tokenizer.pt", weights_only=True)["state"]
    close(saved["disc"]["means"], means, 1e-6)
    assert saved["opt"]["state"][len(saved["opt"]["state"]) - 1]["step"] == 5       # Adam counts the idle steps as well


@torch.no_grad()
def test_teachers_and_rulers_read_pictures_of_one_side(tmp_path, monkeypatch):
    """The prefixes of few tokens are smaller than any network can read: they come enlarged."""
    cfg = config(size=32, tokens=32, group=4, causal=4, steps=2)
    features = detailflow.open_teacher(cfg)[0]
    for side in sorted({detailflow.image_side(n, cfg) for n in detailflow.admissible(cfg)}):
        x = images(2, side).float()
        whole = F.interpolate(x, (32, 32), mode="bicubic")
        close(features(x), features(whole), 1e-6)
        assert features(x).shape == features(torch.zeros(2, 3, 32, 32)).shape
    monkeypatch.chdir(tmp_path)
    read, original, asked = [], common.accuracy, []
    monkeypatch.setattr(detailflow.open_split, "__defaults__", (40,))
    ruler = common.Judge(3, 8, 10, 32).eval().requires_grad_(False)
    monkeypatch.setattr(common, "judge", lambda split, role: asked.append((split.images, role)) or ruler)
    monkeypatch.setattr(common, "accuracy", lambda ruler, x, y: read.append((x, y)) or original(ruler, x, y))
    small = config(size=32, patch=4, tokens=8, group=2, causal=2, keep="1", steps=100, count=4, preset="demo")
    model, other = detailflow.Tokenizer(small), detailflow.AR(small, 10)
    checkpoint(tmp_path / "ar.pt", small, tokenizer=model, ema=other)
    detailflow.report(small, tmp_path / "ar.pt", tmp_path)
    (real, labels), (recon, same), (drawn, y) = read                    # of the ruler's own split, never of training's
    test = detailflow.open_split(small, "test", 4)
    assert [role for _, role in asked] == ["ruler"] and np.array_equal(asked[0][0], detailflow.open_split(small, "judge").images)
    assert torch.equal(real, test.pixels(np.arange(4))) and labels.tolist() == same.tolist() == test.labels.tolist()
    close(recon, model.decode(model.tokenize(real)[0]), 1e-5)
    ids, labels = detailflow.draw_samples(other.eval(), small)
    assert torch.equal(y, labels) and ids.shape == (4, 1)
    close(drawn, F.interpolate(model.decode(model.vq.vectors(ids)), (32, 32), mode="bicubic"), 1e-5)


def test_draws_of_a_run_follow_the_schedule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = watched(monkeypatch, "loss_tokenizer")
    run(*tiny(stage="tokenizer", steps=40, kmeans=3, gan_from=5, ramp=10, degrade=0.6, align=0, batch=2))
    for step, (model, x, draws, weight, _, _) in enumerate(calls):
        n, s, u, v = draws.values()
        assert model.vq.bypass == (step < 3) and x.shape == (2, 3, 8, 8) and n in (1, 2, 4, 6, 8)
        assert weight["gan"] == (0.2 if step >= 4 else 0) and math.isclose(weight["lpips"], min(1, (step + 1) / 10))
        if step < 3:
            assert n == 8 and s is None
        else:
            assert (s is None) == (n == 1) and (s is None or torch.as_tensor(s).numel() == 1 and s < n)
        assert u.shape == (2, 8) and v.shape == (2, 5, 2, 10)
    lengths = [call[2]["n"] for call in calls[3:]]
    assert {1, 2, 4, 6, 8} >= set(lengths) and len(set(lengths)) > 3 and 8 in lengths
    assert len({float(call[2]["noise"][0, 0]) for call in calls}) == 40       # fresh draws at every step
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for changes, free in ((dict(degrade=0), False), (dict(correct=False), True)):
        calls = watched(monkeypatch, "loss_tokenizer")
        run(*tiny(stage="tokenizer", steps=6, kmeans=0, name=f"n{free}", align=0, **changes))
        assert all((call[2]["s"] is None) == (free or call[2]["n"] == 1) for call in calls)
        assert "degrade" not in changes or {call[2]["n"] for call in calls} == {8}
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)


def test_ar_reads_triples_of_the_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = watched(monkeypatch, "loss_ar")
    run(*tiny(steps=12, batch_ar=60, noisy=0.3, label_dropout=0.1, align=0, gan=0, perceptual=0))
    noisy = torch.cat([call[2]["noisy"] for call in calls]).double().mean()
    drop = torch.cat([call[2]["drop"] for call in calls]).double().mean()
    assert abs(noisy - 0.3) < 0.07 and abs(drop - 0.1) < 0.05
    wrong = torch.cat([call[1][0][1] != call[1][0][2] for call in calls], 0)
    assert (wrong.sum(1) <= 2).all() and wrong.any()                    # one token or one group of 2 is noise
    first = torch.cat([row.nonzero()[:1, 0] for row in wrong])
    assert set(first.tolist()) <= {0, 1, 2, 3, 4, 5}                    # never the last group
    calls.clear()
    run(*tiny(steps=2, stage="ar", tokenizer="runs/detailflow/demo/tokenizer.pt", correct=False, name="plain"))
    clean, given, label = calls[0][1][0]
    assert torch.equal(clean, given) and torch.equal(clean, label)


def test_D19_noise_of_an_image_is_the_same_in_every_epoch(tmp_path, monkeypatch):
    """D19: 40 images, each with one noise, in 120 visits."""
    monkeypatch.chdir(tmp_path)
    starts, original = [], detailflow.Tokenizer.correct

    def correct(self, x, s, u):
        if torch.is_tensor(s) and s.ndim:
            starts.extend((a.sum().item(), int(b), c.sum().item()) for a, b, c in zip(x, s, u))
        return original(self, x, s, u)
    monkeypatch.setattr(detailflow.Tokenizer, "correct", correct)
    run(*tiny(steps=10, batch_ar=12, flip=False, zoom=1.0, crops=0, kmeans=0, align=0, gan=0, perceptual=0))
    assert len(starts) == 120 and len({image for image, _, _ in starts}) == len(set(starts)) <= 40
    assert len({s for _, s, _ in starts}) > 3


def test_muon_takes_the_matrices_of_the_blocks_alone():
    cfg = config(muon=3.0)
    model, disc, ar = detailflow.Tokenizer(cfg, 4), detailflow.make_discriminator(4), detailflow.AR(cfg, 5)
    adam, muon = detailflow.optimizer_tokenizer(model, disc, cfg).param_groups
    matrices = [p for half in (model.encoder, model.decoder) for p in half.blocks.parameters() if p.ndim == 2]
    assert {*muon["params"]} == {*matrices} and muon["factor"] == 3 and muon["weight_decay"] == 0
    assert {*adam["params"]} == {*model.parameters(), *disc.parameters()} - {*matrices}
    decayed, plain, muon = detailflow.optimizer_ar(ar, cfg).param_groups
    assert {*muon["params"]} == {p for p in ar.blocks.parameters() if p.ndim == 2} and muon["weight_decay"] == 0.05
    assert {*decayed["params"]} == {ar.table.weight, ar.label.weight, ar.head.weight, ar.masks}
    assert all(p.ndim == 1 for p in plain["params"]) and detailflow.Config().muon == 0


def test_D20_learning_rates_by_value():
    """D20 by its formula, at first, last and turning steps."""
    cosine = lambda t, end: end + (1 - end) * (1 + math.cos(math.pi * t)) / 2
    cfg = config(steps=1000, steps_ar=500, batch=512, lr=1.0, lr_ar=1.0, warmup=0.004)
    rates = [detailflow.learning_rate(cfg, step) for step in (0, 2, 4, 50, 500, 1000)]
    close(rates, [0.2, 1.1, *[2 * cosine(t, 0.1) for t in (0.004, 0.05, 0.5, 1)]], 1e-12)
    rates = [detailflow.learning_rate_ar(cfg, step) for step in (0, 1, 2, 25, 250, 500)]
    ramp = [0.005 + 0.995 * t / 0.05 for t in (0, 0.002, 0.004)]
    close(rates, [*ramp, *[cosine((t - 0.05) / 0.95, 0.01) for t in (0.05, 0.5, 1)]], 1e-12)
    half = detailflow.learning_rate(dataclasses.replace(cfg, steps_tokenizer=500), 250)
    assert half == detailflow.learning_rate(cfg, 500)
    assert detailflow.learning_rate(dataclasses.replace(cfg, warmup=0.0), 0) == 2.0
    paper = detailflow.Config()
    published = dict(batch=256, lr=1e-4, lr_ar=1e-4, ema=0.9999, degrade=0.2, noisy=0.3, near=50, codes=8192, dim=8,
                     alpha=1.5, align=1.0, gan=0.2, gan_from=40_000, ramp=10_000, cfg_scale=1.5,
                     dropout=0.1, label_dropout=0.1)
    assert vars(paper).items() >= published.items()


@torch.no_grad()
def test_codes_are_renewed():
    cfg = config(size=8, patch=4, tokens=8, group=2, causal=2, codes=6, kmeans=10)
    torch.manual_seed(0)
    model = awake(detailflow.Tokenizer(cfg)).float()
    dataset = detailflow.open_split(cfg, "train", 40)
    model.vq.use.fill_(3)
    detailflow.renew_codes(model, dataset, cfg, 10)
    codes = model.vq.codes.clone()
    close(codes.norm(dim=1), torch.ones(6), 1e-5)
    assert not model.vq.use.any()
    everything = model.encode(dataset.pixels(np.arange(40)))[0].flatten(0, 1)
    u = everything / everything.norm(dim=1, keepdim=True)
    nearest = (u @ codes.T).amax(1).mean()
    assert nearest > (u @ u[torch.randperm(len(u))[:6]].T).amax(1).mean()       # better centres than random latents
    model.vq.use.copy_(torch.tensor([1.0, 0, 2, 0, 5, 1]))
    detailflow.renew_codes(model, dataset, cfg, 20)
    kept = model.vq.use.new_tensor([0, 2, 4, 5]).long()
    assert torch.equal(model.vq.codes[kept], codes[kept]) and not torch.equal(model.vq.codes[[1, 3]], codes[[1, 3]])
    close((u @ model.vq.codes[[1, 3]].T).amax(0), torch.ones(2), 1e-5)
    codes = model.vq.codes.clone()
    detailflow.renew_codes(model, dataset, dataclasses.replace(cfg, steps=25), 20)
    assert torch.equal(model.vq.codes, codes)                           # past 70 % of the steps none is renewed
    detailflow.renew_codes(model, dataset, dataclasses.replace(cfg, steps=12), 10)
    assert not torch.equal(model.vq.codes, codes)                       # but for the first time, however late


def test_initial_weights():
    torch.manual_seed(0)
    cfg = config(encoder="64x2x4x256", decoder="64x2x4x256", tokens=48, size=32)
    model = detailflow.Tokenizer(cfg)
    e, d = model.encoder, model.decoder
    for p in (e.queries, e.refined, e.positions, d.positions, d.mask):
        assert abs(p.std().item() - 0.02) < 0.005 and abs(p.mean().item()) < 0.005
    for half in (model.encoder, model.decoder):
        assert abs(half.grid.std().item() - 64 ** -0.5) < 0.01
        for block in half.blocks:
            q, k, v = block.qkv.weight.chunk(3)
            for w in (q, k, v, block.out.weight, block.up.weight, block.down.weight):
                bound = math.sqrt(6 / sum(w.shape))                     # Xavier-uniform, q, k and v apart
                assert 0.97 * bound < w.abs().max() <= bound
                assert abs(w.std().item() - bound / math.sqrt(3)) < 0.05 * bound
            assert not block.qkv.bias.any() and not block.out.bias.any()
        assert half.norm.eps == half.blocks[0].norm1.eps == 1e-6
    assert abs(detailflow.AR(config(gpt="64x1x4x64", group=4, causal=4), 5).masks.std().item() - 1) < 0.2
    wide = detailflow.Tokenizer(config(std=0.5)).encoder
    assert abs(wide.queries.std().item() - 0.5) < 0.1 and abs(wide.grid.std().item() - 0.5) < 0.1


def test_drawn_images():
    cfg = config(size=8, flip=True, zoom=1.0, kmeans=100, batch=8, batch_ar=8)
    dataset = detailflow.open_split(cfg, "train", 40)
    flips = 0
    for step in range(10):
        index, draws = detailflow.draw_images(dataset, cfg, step, "tokenizer", 8)
        widths = dict(flip=1, zoom=1, corner=2, noisy=1, drop=1, noise=12, augment=100)
        assert {name: draws[name].shape for name in widths} == {name: (8, k) for name, k in widths.items()}
        generator = common.make_generator(cfg.seed, step, "tokenizer data")
        assert torch.equal(torch.randint(40, (8,), generator=generator), torch.as_tensor(index))
        assert torch.equal(torch.cat([draws[name] for name in widths], 1), torch.rand(8, 118, generator=generator))
        once = torch.stack([draws[name] for name in ("degrade", "length", "start")])
        assert torch.equal(once, torch.rand(3, generator=generator))
        for image, plain, u in zip(detailflow.draw_tokenizer(dataset, cfg, step, "cpu")[0], dataset.pixels(index), draws["flip"]):
            assert torch.equal(image, plain.flip(-1) if u < 0.5 else plain)
            flips += bool(u < 0.5)
    assert 20 < flips < 60
    still = dataclasses.replace(cfg, flip=False)
    index, _ = detailflow.draw_images(dataset, still, 0, "ar", 8)
    assert torch.equal(detailflow.draw_ar(dataset, still, 0, "cpu")[0][0], dataset.pixels(index))
    ramp = dataclasses.replace(dataset, images=np.tile(np.arange(8, dtype=np.uint8) * 30, (40, 3, 8, 1)))
    zoomed = dataclasses.replace(cfg, flip=False, zoom=1.25)
    for stage, low, high in (("tokenizer", 0.8, 1.0), ("ar", 1 / 1.1, 1 / 1.1)):
        batch, _ = detailflow.draw_tokenizer(ramp, zoomed, 0, "cpu") if stage == "tokenizer" else detailflow.draw_ar(ramp, zoomed, 0, "cpu")
        x = batch if stage == "tokenizer" else batch[0]
        slope = (x[:, 0, 3, 5] - x[:, 0, 3, 2]) / 3 / (30 / 127.5)      # an enlarged picture changes more slowly
        assert slope.min() >= low - 1e-4 and slope.max() <= high + 1e-4
        assert (slope.max() - slope.min() > 0.02) == (stage == "tokenizer")


def test_crops_are_resized_images_that_are_cut():
    """By value: a whole image enlarged, then a window of it; anywhere, what an affine grid gives inside the edges."""
    x = images(4)
    big = F.interpolate(x, (32, 32), mode="bilinear")
    for (across, down), (left, top) in {(0, 0): (0, 0), (1, 0): (16, 0), (0, 1): (0, 16), (1, 1): (16, 16), (0.5, 0.5): (8, 8)}.items():
        corner = torch.tensor([[across, down]]).double().expand(4, 2)
        close(detailflow.crop(x, torch.full((4, 1), 2.0).double(), corner), big[:, :, top:top + 16, left:left + 16], 1e-12)
    zoom, corner = 1 + uniform(4, 1), uniform(4, 2, seed=5)
    window = torch.cat([torch.eye(2) / zoom[..., None], ((1 - 1 / zoom) * (2 * corner - 1))[..., None]], 2)
    grid = F.affine_grid(window, x.shape, False)
    expected = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    close(detailflow.crop(x, zoom, corner), expected, 1e-12)


def test_D19_stored_crops(tmp_path, monkeypatch):
    """The ten published crops of each image, in a file of the run: one start of the noise, codes of their own."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float64)
    try:
        cfg = config(size=8, tokens=8, group=2, causal=2, flip=True, zoom=3.5, crops=10)      # 3.5: enlarged by 2
        dataset, model = detailflow.open_split(cfg, "train", 6), awake(detailflow.Tokenizer(cfg))
        found = detailflow.encode_crops(model, dataset, np.arange(6), torch.device("cpu"))
        x, u = dataset.pixels(np.arange(6)).double(), data.uniform(np.arange(6)[:, None], np.arange(81), 1)
        assert found.shape == (6, 10, 3, 8) and len({tuple(row) for row in found[:, :, 0].flatten(0, 1).tolist()}) > 10
        starts = torch.tensor([[0, 1, 2, 2, 4, 4][int(6 * row[0])] for row in u])
        for k in range(10):
            left, top = [(4, 4), (0, 0), (8, 0), (0, 8), (8, 8)][k // 2]
            shown = F.interpolate(x.flip(3) if k % 2 else x, (16, 16), mode="bilinear")[:, :, top:top + 8, left:left + 8]
            noise = torch.from_numpy(u[:, 1 + 8 * k:9 + 8 * k])
            assert torch.equal(found[:, k], torch.stack(model.correct(shown, starts, noise)[1], 1))
    finally:
        torch.set_default_dtype(torch.float32)
    run(*tiny(steps=4, flip=True, zoom=1.5, crops=4, batch_ar=8, noisy=0, gan=0, align=0, perceptual=0))
    stored, path = np.load("runs/detailflow/demo/tokens.npy"), "runs/detailflow/demo/tokenizer.pt"
    assert stored.shape == (40, 4, 3, 8) and stored.dtype == np.int16
    cfg = detailflow.Config(**common.read_checkpoint(path, "detailflow")["config"])
    dataset, seen = detailflow.open_split(cfg, "train", 40), set()
    for step in range(20):
        (ids, y), draws = detailflow.draw_ar(dataset, cfg, step, torch.device("cpu"), stored)
        index, u = detailflow.draw_images(dataset, cfg, step, "ar", 8)
        which = [int(4 * a) for a in u["zoom"]]
        assert draws.keys() == {"noisy", "drop"} and torch.equal(ids.clean, torch.from_numpy(stored[index, which, 0]).long())
        seen.update(which)
    assert seen == {0, 1, 2, 3}


@torch.no_grad()
def test_sampled_ids_follow_the_distribution():
    model, cfg = ar(), config()
    B = 8000
    ids = detailflow.generate(model, torch.zeros(B, dtype=torch.long), uniform(B, 3, seed=5), cfg)
    p = model(torch.zeros(1, 12).long(), torch.tensor([0]))[0, 0].softmax(0)
    close(torch.bincount(ids[:, 0], minlength=32) / B, p, 0.022)
    model.head.weight.copy_(torch.randn(32, 16).double() * 0.2)
    # The tokens of a group are independent, each with its own law.
    fixed = torch.full((B, 12), 0.5).double()
    fixed[:, 3:6] = uniform(B, 3, seed=6)
    ids = detailflow.generate(model, torch.zeros(B, dtype=torch.long), fixed[:, :6], cfg)
    laws = model(F.pad(ids[:1, :3], (0, 9)), torch.tensor([0]))[0, 3:6].softmax(1)
    for t in range(3):
        close(torch.bincount(ids[:, 3 + t], minlength=32) / B, laws[t], 0.022)
    assert (laws[0] - laws[1]).abs().max() > 0.01
    a, b = laws[0].argmax(), laws[1].argmax()
    together = ((ids[:, 3] == a) & (ids[:, 4] == b)).double().mean()
    close(together, laws[0, a] * laws[1, b], 0.02)


@pytest.mark.parametrize("cfg", [PAPER, config(), config(causal=6), dataclasses.replace(PAPER, rounding="nearest")])
def test_keep_by_value(cfg):
    for n in detailflow.admissible(cfg):
        assert detailflow.num_tokens(dataclasses.replace(cfg, keep=str(n))) == n
    assert detailflow.num_tokens(dataclasses.replace(cfg, keep="all")) == cfg.tokens
    for r in {detailflow.image_side(n, cfg) for n in detailflow.admissible(cfg)}:     # of those drawn at r the closest R(n)
        there = [n for n in detailflow.admissible(cfg) if detailflow.image_side(n, cfg) == r]
        closest = max(there, key=lambda n: (-abs(detailflow.detail_side(n, cfg) - r), n))
        assert detailflow.num_tokens(dataclasses.replace(cfg, keep=f"{r}px")) == closest


# --- Command line ---------------------------------------------------------------------------

BAD = """--tokens 18 -> --tokens 18: must be a multiple of --group 4
--keep 5 -> one of [1, 2, 3, 4, 8, 12, 16]
--keep 0 -> [1, 2, 3, 4, 8, 12, 16]
--keep x -> --keep x
--keep 17px -> --keep 17px
--keep 0px -> --keep 0px
--keep -4 -> --keep -4
--patch 3 -> --size 16: must be a multiple of --patch 3
--patch 0 -> --patch 0
--label_dropout 0 --cfg_scale 2 -> null label
--label_dropout 0 -> --cfg_scale 1
--label_dropout 2 -> --label_dropout 2
--group 0 -> --group 0
--causal 6 -> --causal 6: must be a multiple of --group 4
--causal 0 -> --causal
--causal 20 -> --causal 20
--tokens 4 -> --tokens 4
--near 257 -> --near 257: there are only 256
--near 0 -> --near 0
--codes 0 -> --codes 0
--dim 0 -> --dim 0
--alpha 0 -> --alpha 0
--rounding down -> invalid choice
--encoder 96x2x4 -> WIDTHxDEPTHxHEADSxMLP
--gpt 96x2x5x8 -> 96x2x5x8
--decoder axbxcxd -> axbxcxd
--encoder 96x0x4x8 -> 96x0x4x8
--degrade 1.5 -> --degrade 1.5
--noisy -0.1 -> --noisy -0.1
--dropout 2 -> --dropout 2
--ema 2 -> --ema 2
--warmup 2 -> --warmup 2
--top_p 0 -> --top_p 0
--top_k -1 -> --top_k -1
--temperature 0 -> --temperature 0
--cfg_scale -1 -> --cfg_scale -1
--cfg_scale inf -> --cfg_scale inf
--cfg_scale nan -> --cfg_scale nan
--temperature inf -> --temperature inf
--alpha inf -> --alpha inf
--zoom inf -> --zoom inf
--gan inf -> --gan inf
--lr_ar nan -> --lr_ar nan
--zoom 0.5 -> --zoom 0.5
--objects 5 -> --objects 5
--gan -1 -> --gan -1
--align -1 -> --align -1
--perceptual nan -> --perceptual nan
--kmeans -1 -> --kmeans -1
--count 0 -> --count 0
--classes a -> --classes a
--classes 1, -> --classes 1,
--classes 30 -> labels are 0 to 9
--classes 3,10 -> labels are 0 to 9
--count 1 -> 2 images or more
--encode x.npz -> --sample
--decode x.npz -> --sample
--stage what -> invalid choice
--data npz:nowhere.npz -> nowhere.npz
--data latents:nowhere.npz -> nowhere.npz
--data folder:nowhere -> nowhere
--sample nowhere.pt -> nowhere.pt
--stage ar -> tokenizer.pt
--stage ar --tokenizer no.pt -> no.pt
--batch 3 --gpus 2 -> multiple of 2
--batch 4 --accumulate 3 -> --batch 4
--batch_ar 4 --batch 6 --accumulate 3 -> --batch_ar 4: must be a multiple of 3
--crops 2 -> --crops 2: with this --zoom and --flip only 1 crops differ
--crops 6 --zoom 1.2 -> only 5 crops differ
--crops 11 -> --crops 11
--muon -1 -> --muon -1
--export x.npz -> --sample
--init no.pt --kmeans 0 -> no.pt
--init no.pt -> --kmeans 0
--batch_ar 3 --batch 4 --gpus 2 -> --batch_ar 3
--align 1 --teacher no.pt -> no.pt
--align 1 --teacher no.pt2 -> no.pt2
--steps 0 -> --steps 0
--lr_ar -1 -> --lr_ar -1
--steps_ar -1 -> --steps_ar -1
--tokenizer no.pt -> no.pt
--lecam 1 -> --lecam"""


@pytest.mark.parametrize("row", BAD.split("\n"))
def test_bad_input_is_one_line_and_exit_2(row, tmp_path, monkeypatch, capsys):
    words, error = row.split(" -> ")[0].split(), row.split(" -> ")[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "judge", lambda data, role: pytest.fail("a judge was trained before the mistake"))
    words = words if "--steps" in words else ["--steps", "2", *words]
    assert error in refused(run, words, capsys) and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a tiny finished run."""
    where = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        run(*tiny())
    return where / "runs" / "detailflow" / "demo"


def test_a_run_leaves_its_folder(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "detailflow.py", "tokenizer.pt", "ar.pt", "prefixes.png", "correction.png", "generation.png",
            "loss-tokenizer.svg", "loss-ar.svg", "log-tokenizer.jsonl", "log-ar.jsonl"} <= names


def test_generation_stands_beside_the_nearest_training_images(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, shown = trained / "ar.pt", {}
    cfg = detailflow.Config(**torch.load(path, weights_only=True)["config"])
    monkeypatch.setattr(common, "columns_png", lambda path, columns, heads, *_, **__: shown.update({path.name: (columns, heads)}))
    with torch.no_grad():
        detailflow.report(cfg, path, tmp_path)
    columns, heads = shown["generation.png"]
    train = detailflow.open_split(cfg, "train").pixels(np.arange(20_000))
    near = torch.cdist(columns[-2].flatten(1), train.flatten(1)).argmin(1)
    assert heads[-1] == "train" and torch.equal(columns[-1], train[near])
    for changes in (dict(sample="a checkpoint"), dict(keep=f"{cfg.tokens // 2}")):      # not here; of another size
        detailflow.report(dataclasses.replace(cfg, **changes), path, tmp_path)
        assert "train" not in shown["generation.png"][1]


def stops(words, error, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*words)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and error in said and said.count("\n") == 1, said


def test_tokens_go_out_and_come_back(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = str(trained / "tokenizer.pt")
    before = {file: file.read_bytes() for file in trained.iterdir() if file.is_file()}
    run("--sample", path, "--encode", "tokens.npz")
    with np.load("tokens.npz") as file:
        found = {name: file[name] for name in file.files}
    cfg = detailflow.Config(**common.read_checkpoint(path, "detailflow")["config"])
    model, _, _ = detailflow.load(cfg, path)
    dataset = detailflow.open_split(cfg, "train", 40)
    ids = model.tokenize(dataset.pixels(np.arange(40)))[1]
    assert np.array_equal(found["ids"], ids.numpy()) and np.array_equal(found["labels"], dataset.labels)
    drawn, picture = [], common.columns_png
    monkeypatch.setattr(common, "columns_png", lambda *args, **more: drawn.append(args[1]) or picture(*args, **more))
    run("--sample", path, "--decode", "tokens.npz", "--count", "5")
    assert [x.shape[-1] for x in drawn[0]] == [detailflow.image_side(n, cfg) for n in (1, 2, 4, 6, 8)]
    for n, x in zip((1, 2, 4, 6, 8), drawn[0]):
        close(x[:5], model.decode(model.vq.vectors(ids[:5, :n])).detach(), 1e-5)
    run("--sample", path, "--decode", "tokens.npz", "--keep", "4")
    assert len(drawn[1]) == 3 and (trained / "samples" / "decoded.png").exists()
    assert all(file.read_bytes() == data for file, data in before.items())
    bad = {"another codebook": found | {"codebook": "0" * 16}, "no ids": found | {"ids": found["ids"] + 16},
           "below 16": found | {"ids": found["ids"][:0]}, "[1, 2, 4, 6, 8]": found | {"ids": found["ids"][:, :5]},
           "bad.npz": {"ids": found["ids"]}}
    for error, arrays in bad.items():
        np.savez("bad.npz", **arrays)
        stops(["--sample", path, "--decode", "bad.npz"], error, capsys)
    stops(["--sample", path, "--decode", "nowhere.npz"], "nowhere.npz", capsys)
    stops(["--sample", path, "--decode", "tokens.npz", "--keep", "5"], "[1, 2, 4, 6, 8]", capsys)
    np.savez("short.npz", **found | {"ids": found["ids"][:, :4]})
    run("--sample", path, "--decode", "short.npz")
    assert [x.shape[-1] for x in drawn[2]] == [detailflow.image_side(n, cfg) for n in (1, 2, 4)]


def test_accumulated_parts_are_one_batch(tmp_path, monkeypatch, double):
    """--accumulate 4: the same weights to rounding in both stages, the discriminator and its running means included."""
    monkeypatch.chdir(tmp_path)
    for parts in (1, 4):
        run(*tiny(steps=6, batch_ar=8, accumulate=parts, crops=parts // 4, name=f"n{parts}"))     # tokens stored or not
    for stage in ("tokenizer", "ar"):
        one, four = (torch.load(f"runs/detailflow/n{parts}/{stage}.pt", weights_only=True)["state"] for parts in (1, 4))
        for name in one.keys() - {"opt"}:
            for key, tensor in one[name].items():
                close(four[name][key], tensor, 1e-9)
    logs = [(tmp_path / f"runs/detailflow/n{parts}/log-tokenizer.jsonl").read_text().split("\n") for parts in (1, 4)]
    close(*[torch.tensor([json.loads(line)["disc"] for line in log[:-1]]) for log in logs], 1e-9)


def test_a_run_starts_from_the_weights_of_another(trained, tmp_path, monkeypatch, capsys):
    """--init: tokenizer and averaged AR model; with other classes the table of classes alone is new."""
    monkeypatch.chdir(tmp_path)
    packed("few.npz", 20, 4)
    first, second = watched(monkeypatch, "loss_tokenizer"), watched(monkeypatch, "loss_ar")
    start = dict(steps=1, init=trained / "ar.pt", kmeans=0)
    run(*tiny(**start, data="npz:few.npz"))
    state = torch.load(trained / "ar.pt", weights_only=True)["state"]
    assert torch.equal(first[0][0].encoder.queries.detach(), state["tokenizer"]["encoder.queries"])
    assert torch.equal(first[0][0].vq.codes.detach(), state["tokenizer"]["vq.codes"])
    model = second[0][0]
    assert model.label.weight.shape == (4, 16) and not torch.equal(state["ema"]["table.weight"], state["model"]["table.weight"])
    assert all(torch.equal(p.detach(), state["ema"][name]) for name, p in model.named_parameters() if name != "label.weight")
    run(*tiny(**start, name="same"))
    assert torch.equal(second[1][0].label.weight.detach(), state["ema"]["label.weight"])
    before = sorted(tmp_path.rglob("*"))
    stops(tiny(**start, name="x", codes=32), "vq.codes is [16, 4] there and [32, 4] here", capsys)
    stops(tiny(**start | dict(init=trained / "tokenizer.pt"), name="x"), "has no ema to start from", capsys)
    assert sorted(tmp_path.rglob("*")) == before
    run(*tiny(**start | dict(init=trained / "tokenizer.pt"), name="x", stage="tokenizer"))


def test_exported_samples_are_those_of_the_report(trained, tmp_path, monkeypatch, capsys):
    """--export in both formats: sample i has draw i and class i mod 10, at the side of --keep, in blocks of 100."""
    monkeypatch.chdir(tmp_path)
    path = trained / "ar.pt"
    cfg = dataclasses.replace(detailflow.Config(**common.read_checkpoint(path, "detailflow")["config"]), count=110)
    tokenizer, ar, _ = detailflow.load(cfg, path)
    ids, y = detailflow.draw_samples(ar, cfg)
    u = torch.cat([torch.rand(m, 8, generator=common.make_generator(0, first, "sample")) for first, m in ((0, 100), (100, 10))])
    assert y.tolist() == [k % 10 for k in range(110)] and torch.equal(ids, detailflow.generate(ar, y, u, cfg))
    run("--sample", str(path), "--count", "110", "--export", "samples.npz")
    with np.load("samples.npz") as file:
        found = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
    assert torch.equal(found, common.to_uint8(detailflow.decode_ids(tokenizer, ids)))
    run("--sample", str(path), "--count", "3", "--export", "folder", "--keep", "1")
    assert len([*(tmp_path / "folder").iterdir()]) == 3
    stops(["--sample", str(trained / "tokenizer.pt"), "--export", "x.npz"], "holds no AR model", capsys)


@pytest.mark.parametrize("words, error", [
    (["ar.pt", "--classes", "10"], "labels are 0 to 9"), (["ar.pt", "--keep", "5"], "[1, 2, 4, 6, 8]"),
    (["ar.pt", "--tokens", "16"], "--tokens 16"),
    (["ar.pt", "--cfg_scale", "-1"], "--cfg_scale -1")])
def test_sample_names_the_mistake(words, error, trained, capsys):
    stops(["--sample", str(trained / words[0]), *words[1:]], error, capsys)


def test_generation_from_a_checkpoint(trained, monkeypatch):
    drawn, original = [], detailflow.generate
    monkeypatch.setattr(detailflow, "generate", lambda *args: drawn.append((args, original(*args))) or drawn[-1][1])
    cases = ([], 8), (["--classes", "6,9", "--keep", "4", "--cfg_scale", "1"], 4), (["--keep", "8px", "--cfg_gradual"], 8)
    for words, n in cases:
        picture = trained / "samples" / "generation.png"
        picture.unlink(missing_ok=True)
        run("--sample", str(trained / "ar.pt"), "--count", "10", *words)
        (_, y, _, cfg, *_), ids = drawn[-1]
        assert ids.shape[1] == n and picture.exists()
        assert y.tolist() == ([6, 9] * 5 if "--classes" in words else [*range(10)])
    again = [drawn[0][1], original(*drawn[0][0])]
    assert torch.equal(*again)
    state = torch.load(trained / "ar.pt", weights_only=True)["state"]
    assert torch.equal(drawn[0][0][0].head.weight, state["ema"]["head.weight"])         # the averaged weights draw
    run("--sample", str(trained / "tokenizer.pt"), "--count", "4")
    assert (trained / "samples" / "prefixes.png").exists()


@pytest.mark.parametrize("changes", [
    dict(rounding="nearest", flip=False, objects=4, zoom=1.25, degrade=1, kmeans=0, std=0.5, correct=False, near=1),
    dict(group=1, causal=1, top_k=3, temperature=0.5, cfg_scale=1, label_dropout=0, degrade=0, noisy=0, gan=0, near=16),
    dict(group=4, causal=4, top_p=0.5, cfg_gradual=True, perceptual=0, align=0, gan=0, noisy=1, ema=0, warmup=0, bf16=True),
    dict(causal=4, keep=4, classes="3,5", alpha=1, ema=1, warmup=1, ramp=0, gan_from=0, dropout=0.1, batch_ar=2),
    dict(causal=8, steps_tokenizer=1, steps_ar=1, degrade=1, keep="8px", alpha=0.5, seed=-3, std=0.1, cfg_scale=0),
    dict(tokens=6, codes=8, dim=2, group=3, causal=3, size=16, encoder="8x2x1x4", decoder="8x2x2x4", gpt="8x2x1x4",
         device="cpu", label_dropout=1, align=0.5)])
def test_every_option_trains(changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*tiny(**dict(steps=2, count=4) | changes))
    names = {path.name for path in (tmp_path / "runs/detailflow/demo").iterdir()}
    assert {"prefixes.png", "generation.png", "ar.pt", "tokenizer.pt"} <= names
    assert ("correction.png" in names) == changes.get("correct", True)


def test_stages_one_by_one(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(*tiny(stage="tokenizer", steps=2))
    assert not (tmp_path / "runs/detailflow/demo/ar.pt").exists()
    run(*tiny(stage="ar", steps=2, tokenizer=str(trained / "tokenizer.pt"), name="other"))
    ours = torch.load("runs/detailflow/other/ar.pt", weights_only=True)["state"]["tokenizer"]
    theirs = torch.load(trained / "tokenizer.pt", weights_only=True)["state"]["tokenizer"]
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    stops(tiny(stage="tokenizer", steps=1, tokenizer=str(trained / "tokenizer.pt"), dim=6, name="misfit"), "does not fit (tokenizer", capsys)
    other = torch.load(trained / "tokenizer.pt", weights_only=True)
    other["state"]["tokenizer"] = {"elsewhere": torch.zeros(1)}
    torch.save(other, "other.pt")
    stops(tiny(stage="tokenizer", steps=1, tokenizer="other.pt", name="nothing"), "holds no weight of this tokenizer", capsys)
    first = watched(monkeypatch, "loss_tokenizer")                      # starts from another run's weights
    run(*tiny(stage="tokenizer", steps=1, tokenizer=str(trained / "tokenizer.pt"), name="third"))
    assert torch.equal(first[0][0].encoder.queries.detach(), theirs["encoder.queries"])


def test_images_from_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    g = np.random.default_rng(0)
    np.savez("pack.npz", images=g.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8), labels=np.arange(20) % 3)
    run(*tiny(steps=2, data="npz:pack.npz", count=4))
    assert torch.load("runs/detailflow/demo/ar.pt", weights_only=True)["state"]["ema"]["label.weight"].shape[0] == 4
    np.savez("wide.npz", images=g.integers(0, 256, (20, 4, 4, 3), dtype=np.uint8), labels=np.arange(20) % 3)
    stops(tiny(steps=2, data="npz:wide.npz", name="x"), "4x4 pixels where 8", capsys)


def packed(path, train, test, side=8):
    """An npz of pictures of noise, in three classes."""
    g = np.random.default_rng(0)
    arrays = {f"{split}_images": g.integers(0, 256, (M, side, side, 3), dtype=np.uint8)
              for split, M in (("train", train), ("test", test))}
    np.savez(path, **arrays, train_labels=np.arange(train) % 3, test_labels=np.arange(test) % 3, class_names=[*"abc"])


class OneSide(torch.nn.Module):
    """A teacher as a transformer is: it reads pictures of 256 pixels and no others."""

    def forward(self, x):
        assert x.shape[-1] == 256
        return torch.nn.functional.avg_pool2d(x, 32)


NARROW = dict(encoder="16x1x2x16", decoder="16x1x2x16", gpt="16x1x2x16", codes=64, batch=2, batch_ar=2, count=2, steps_ar=2)
SHRUNK = {"demo": dict(steps=10, kmeans=3), "small": dict(steps=15, kmeans=3, gan_from=7, ramp=6, data="npz:32.npz")}


KINDS = ["demo", "small", "DetailFlow-16", "DetailFlow-16x16", "DetailFlow-16-B"]


def test_all_other_presets_differ_from_these_in_width_and_length_alone():
    same = dict(preset="", tokens=128, cfg_scale=1.5, gpt="")
    kinds = [dataclasses.replace(preset(name), **same) for name in KINDS]
    assert all(dataclasses.replace(preset(name), **same) in kinds for name in detailflow.PRESETS)


@pytest.mark.parametrize("name", KINDS)
def test_presets_run_over_all_their_phases(name, tmp_path, monkeypatch):
    """Shrunk in width and steps, not in kind: before and after k-means, the ramp and the start of the
    discriminator, with few tokens and with many, then stage ar."""
    monkeypatch.chdir(tmp_path)
    torch.jit.script(OneSide()).save("siglip2.pt")
    changes = NARROW | SHRUNK.get(name, dict(steps=3, ramp=2, gan_from=2, data="npz:256.npz"))
    cfg = dataclasses.replace(preset(name), **changes)
    packed(f"{cfg.size}.npz", 4, 2, cfg.size)
    if cfg.stage == "ar":
        checkpoint(tmp_path / "tokenizer.pt", cfg, tokenizer=detailflow.Tokenizer(cfg))
        changes["tokenizer"] = "tokenizer.pt"
    counts = detailflow.admissible(cfg) if cfg.size < 256 else [1, 7, cfg.tokens]
    lengths = itertools.chain(counts, itertools.repeat(cfg.tokens))
    monkeypatch.setattr(detailflow, "prefix_length", lambda u, v, cfg: next(lengths))
    calls = watched(monkeypatch, "loss_tokenizer")
    run("--preset", name, "--no-bf16", *[word for key in changes for word in (f"--{key}", str(changes[key]))])
    made = {path.name for path in tmp_path.rglob("runs/**/*.p*")}
    assert made >= {"ar.pt", "prefixes.png", "correction.png", "generation.png"}
    if cfg.stage == "all":
        phases = [(model.vq.bypass, weight["gan"] > 0) for model, _, _, weight, *_ in calls]
        assert set(phases) == {(step < cfg.kmeans, bool(cfg.gan) and step + 1 >= cfg.gan_from) for step in range(cfg.steps)}
        assert len(set(phases)) == 1 + bool(cfg.kmeans) + bool(cfg.gan)
        assert [call[2]["n"] for call in calls if not call[0].vq.bypass][:len(counts)] == counts


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_tokens_with_all_losses_at_once(n, tmp_path, monkeypatch):
    """1 to 3 tokens of `small` are pictures of 4 pixels: losses and gradients with the trained judge's kind of network."""
    monkeypatch.chdir(tmp_path)
    cfg = dataclasses.replace(preset("small"), encoder="16x1x2x16", decoder="16x1x2x16", ramp=0, gan_from=0)
    assert detailflow.image_side(n, cfg) == 4
    judge = common.Judge(3, 32, 10, 32).eval().requires_grad_(False)            # as for images of 32 pixels
    monkeypatch.setattr(common, "judge", lambda data, role: judge)
    monkeypatch.setattr(detailflow, "open_split", lambda *args: None)
    features, model, disc = detailflow.open_teacher(cfg)[0], detailflow.Tokenizer(cfg, 64), detailflow.make_discriminator(64)
    draws = drawn(n, None if n == 1 else 0, torch.rand(2, 32), torch.rand(2, 2, 10))
    weight = detailflow.weights(cfg, 0)
    value, losses, _ = detailflow.loss_tokenizer(model, images(2, 32).float(), draws, weight, features, disc)
    value.backward()
    assert losses.keys() == {"mse", "codebook", "commit", "lpips", "gan", "align"} and value.isfinite()
    assert model.decoder.head.weight.grad.isfinite().all()


@pytest.mark.parametrize("train, test, error", [(1, 5, "train split of npz:few.npz: 1 image"),
                                                (20, 1, "test split of npz:few.npz: 1 image")])
def test_too_few_pictures_are_refused_before_training(train, test, error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    packed("few.npz", train, test)
    stops(tiny(data="npz:few.npz", steps=100), error, capsys)
    assert not (tmp_path / "runs" / "detailflow").exists()


def test_few_pictures_suffice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    packed("few.npz", 2, 2)
    run(*tiny(data="npz:few.npz", steps=3))
    assert "nan" not in capsys.readouterr().out
    stops(["--sample", "runs/detailflow/demo/tokenizer.pt", "--count", "1"], "the error needs 2 or more", capsys)


def test_nine_pictures_in_a_folder(tmp_path, monkeypatch, capsys):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    for k in range(9):
        path = tmp_path / "nine" / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (8, 8), (20 * k, 0, 0)).save(path)
    stops(tiny(data="folder:nine", steps=3), "nine", capsys)
    assert not (tmp_path / "runs" / "detailflow").exists()


def test_what_cannot_fit_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stops(["--encoder", "1000000000x1x1x8"], "memory", capsys)
    stops(["--gpt", "4000000x1x1x8"], "bytes", capsys)
    assert not (tmp_path / "runs").exists()


def test_more_steps_of_the_first_stage_make_the_second_start_anew(tmp_path, monkeypatch, capsys):
    """--resume --steps N: no checkpoint holds another tokenizer than the one that was trained further."""
    monkeypatch.chdir(tmp_path)
    run(*tiny(steps=3, crops=1, noisy=0))
    stored = np.load("runs/detailflow/demo/tokens.npy")
    run("--resume", "--name", "demo", "--steps", "5")
    assert "starting anew" in capsys.readouterr().out
    states = [torch.load(f"runs/detailflow/demo/{stage}.pt", weights_only=True) for stage in ("tokenizer", "ar")]
    first, second = (saved["state"]["tokenizer"] for saved in states)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert [saved["step"] for saved in states] == [5, 5]
    anew, cfg = np.load("runs/detailflow/demo/tokens.npy"), detailflow.Config(**states[1]["config"])
    model, _, _ = detailflow.load(cfg, "runs/detailflow/demo/tokenizer.pt")
    ids = model.tokenize(detailflow.open_split(cfg, "train", 40).pixels(np.arange(40)))[1]
    assert np.array_equal(anew[:, 0, 0], ids) and not np.array_equal(stored, anew)      # so are the stored tokens


def test_steps_are_those_asked_for(tmp_path, monkeypatch):
    """--steps, even where it is the preset's own number, is that of both stages; --steps_ar is of one."""
    steps = lambda *words: (lambda cfg: (cfg.steps_tokenizer, cfg.steps_ar))(
        common.cli(detailflow.Config, detailflow.PRESETS, detailflow.__doc__, [*words]))
    assert steps() == (1800, 1500) and steps("--steps", "1800") == (1800, 1800)
    assert steps("--steps", "5", "--steps_ar", "7") == (5, 7)


def test_samples_carry_the_names_of_their_classes(tmp_path, monkeypatch):
    """--sample knows the data's classes without the data, and writes where --out says."""
    monkeypatch.chdir(tmp_path)
    packed("few.npz", 4, 2)
    run(*tiny(data="npz:few.npz", steps=1))
    (tmp_path / "few.npz").unlink()
    shown = []
    monkeypatch.setattr(common, "columns_png", lambda path, columns, heads, rows, side: shown.append((path, rows)))
    run("--sample", "runs/detailflow/demo/ar.pt", "--classes", "2,0", "--count", "3", "--out", "elsewhere")
    assert [(path.parent.name, rows) for path, rows in shown] == [("elsewhere", ["c", "a", "c"])]


class Features(torch.nn.Module):
    """A teacher: 7 features of each quarter of the picture."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 7, 2, stride=2)

    def forward(self, x):
        return self.conv(x)


def test_teacher_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.trace(Features(), torch.randn(4, 3, 8, 8)).save("teacher.pt")
    run(*tiny(steps=2, gan_from=0, kmeans=0, teacher="teacher.pt", stage="tokenizer"))
    state = torch.load("runs/detailflow/demo/tokenizer.pt", weights_only=True)["state"]
    assert len(state["tokenizer"]["align.4.bias"]) == 7 and state["disc"]["0.weight"].shape[:2] == (7, 7)


class Restless(torch.nn.Module):
    """A network that was left in training mode: dropout draws, batch norm learns."""

    def __init__(self, draws=0.0):
        super().__init__()
        self.conv, self.norm, self.drop = torch.nn.Conv2d(3, 7, 4, stride=4), torch.nn.BatchNorm2d(7), torch.nn.Dropout(draws)

    def forward(self, x):
        return self.drop(self.norm(self.conv(x)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_teacher_in_training_mode_is_put_to_rest_or_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(Restless(0.5).train()).save("script.pt")
    cfg = config(teacher="script.pt", size=8)
    features, x = detailflow.open_teacher(cfg)[0], images(4, 8).float()
    assert torch.equal(features(x), features(x)) and features(x).shape == (4, 7, 2, 2)
    for number, network in enumerate((Restless(0.5), Restless())):             # dropout or statistics that no eval() reaches
        torch.jit.trace(network.train(), torch.randn(2, 3, 8, 8), check_trace=False).save(f"{number}.pt")
        stops(tiny(teacher=f"{number}.pt"), f"--teacher {number}.pt: an image's features change", capsys)


def test_a_teacher_that_does_not_fit_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.export.save(torch.export.export(Features(), (torch.randn(4, 3, 8, 8),)), "fixed.pt2")
    stops(tiny(teacher="fixed.pt2"), "fixed.pt2", capsys)                       # it takes 4 pictures and no other number
    torch.jit.script(torch.nn.Flatten()).save("flat.pt")
    stops(tiny(teacher="flat.pt"), "flat.pt", capsys)
    torch.jit.script(torch.nn.Conv2d(1, 7, 2)).save("grey.pt")
    stops(tiny(teacher="grey.pt"), "grey.pt", capsys)
    assert not (tmp_path / "runs").exists()


def test_exported_teacher_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batch, half = torch.export.Dim("batch", min=1), torch.export.Dim("half", min=2)
    shapes = {0: batch, 2: 2 * half, 3: 2 * half}
    program = torch.export.export(Features(), (torch.randn(4, 3, 8, 8),), dynamic_shapes=(shapes,))
    torch.export.save(program, "teacher.pt2")
    run(*tiny(steps=2, gan_from=0, kmeans=0, teacher="teacher.pt2", stage="tokenizer"))
    state = torch.load("runs/detailflow/demo/tokenizer.pt", weights_only=True)["state"]
    assert len(state["tokenizer"]["align.4.bias"]) == 7


def test_the_demo_that_misses_its_target_exits_with_1(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "is_preset", lambda cfg, presets: True)
    words = tiny(steps=1, stage="tokenizer", align=0, kmeans=0)
    for number, (error, codes, code) in enumerate(((1e9, 0, 0), (0.0, 0, 1), (1e9, 17, 1))):
        monkeypatch.setattr(detailflow, "TARGET", dict(error=error, codes=codes, accuracy=0.0))
        try:
            run(*words, "--name", f"n{number}")
            assert code == 0
        except SystemExit as stop:
            assert stop.code == code == 1
    run("--resume", "--name", "n2")                                             # finished: it only shows its result
