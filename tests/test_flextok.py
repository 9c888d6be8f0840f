"""FlexTok: every equation F1 to F33, what follows from them, the authors' own numbers, the command line's promises.

Oracles are written from the formulas (loops over tokens and images, closed forms), not from the code under test.
"""

import copy
import dataclasses
import itertools
import json
import math
import re
import typing
from pathlib import Path

import common
import data
import flextok
from tests import ROOT, refused, shared
from tests.official import convert
from tests.official import flextok as convert_official
from tests.test_common import ranks

import numpy as np
import pytest
import torch
import torch.nn.functional as F

LEVELS = (8, 8, 8, 5, 5, 5)


def config(**changes):
    """A small configuration of the paper's model: P = 9 patches, R = 8 registers."""
    small = dict(size=6, channels=3, patch=2, registers=8, encoder=2, decoder=2, gpt=2, head=16, levels="8,5,5",
                 cfg_scale=1.0, cfg_scale_ar=1.0, num_steps=4)
    return dataclasses.replace(flextok.Config(), **{**small, **changes})


def awake(model, seed=0):
    """Every parameter random and sizeable, in float64, so that nothing hides behind a zero."""
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.ndim == 1 else 1 / math.sqrt(p.shape[-1]))
    return model.double()


def tokenizer(**changes):
    return awake(flextok.Tokenizer(config(**changes)))


def images(B=3, C=3, side=6, seed=1):
    return torch.randn(B, C, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(name):
    """A file of reference outputs as tensors."""
    with np.load(shared("goldens", "flextok", f"{name}.npz")) as found:
        return {key: torch.from_numpy(found[key]) for key in found.files}


def stored():
    """The small reference arrays that live in this repository."""
    with np.load(ROOT / "tests/golden/flextok.npz") as found:
        return {key: torch.from_numpy(found[key]) for key in found.files}


def named(time, noise, num_tokens, no_tokens):
    """The draws of loss_tokenizer."""
    return {"time": time, "noise": noise, "num_tokens": num_tokens, "no_tokens": no_tokens}


def close(a, b, atol):
    torch.testing.assert_close(a, b, atol=atol, rtol=0, check_dtype=False)


# --- The authors' numbers ------------------------------------------------------

def official(part):
    """The authors' small encoder or decoder, converted by the code for published checkpoints, and its outputs."""
    weights = {f"{half}.{name[2:]}": value.float() for half in ("encoder", "decoder")
               for name, value in tensors(f"{half}_small").items() if name.startswith("w.")}
    fields, state = convert_official(weights, {"size": 8})
    cfg = dataclasses.replace(flextok.Config(), **fields)
    model = flextok.Tokenizer(cfg)
    model.load_state_dict(state["ema"])
    return model, tensors(f"{part}_small")


@torch.no_grad()
def test_official_encoder():
    """F2 to F13 at once."""
    model, g = official("encoder")
    z = model.encoder(g["latents"])
    close(z, g["z"], 5e-5)
    values, ids = model.fsq(z)
    close(values, g["quant"], 1e-6)
    assert torch.equal(ids, g["tokens"])


@torch.no_grad()
def test_official_decoder():
    """F14 to F19 at once."""
    model, g = official("decoder")
    no, full = torch.zeros(4, dtype=torch.bool), torch.full((4,), 16)
    close(model.decoder.tokens(g["quant"], g["keep_k"], no), g["regs_after_dropout"], 1e-6)
    for name, keep, null in (("keep", g["keep_k"], no), ("full", full, no), ("uncond", full, ~no)):
        close(model.decoder(g["noised"], g["timesteps"], g["quant"], keep, null)[0], g[f"velocity_{name}"], 5e-5)
    mixed = torch.tensor([False, True, False, True])
    close(model.decoder(g["noised"], g["timesteps"], g["quant"], g["keep_k"], mixed)[0], g["velocity_mixed"], 5e-5)
    close(model.decoder(g["noised"], g["timesteps"], g["quant"], g["keep_k"], no)[1], g["repa_patches"], 5e-5)


@torch.no_grad()
def test_official_checkpoint_becomes_a_file_that_sample_reads(tmp_path):
    weights = {f"{half}.{name[2:]}": value.float() for half in ("encoder", "decoder")
               for name, value in tensors(f"{half}_small").items() if name.startswith("w.")}
    fixed = {f"{half}.module_dict.{name}_posemb_module.posembs": torch.zeros(1, 128, 4, 4)
             for half, name in (("encoder", "enc"), ("decoder", "dec_patches"))}
    torch.save(weights | fixed | {"vae.encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "official.pt")
    convert("flextok", tmp_path / "official.pt", tmp_path / "ours.pt", {"size": 8, "repa": 0.0})
    cfg = flextok.Config(**common.read_checkpoint(tmp_path / "ours.pt", "flextok")["config"])
    model, gpt = flextok.load_tokenizer(cfg, tmp_path / "ours.pt"), flextok.load_gpt(cfg, tmp_path / "ours.pt")
    g = tensors("encoder_small")
    assert gpt is None and torch.equal(model.fsq(model.encoder(g["latents"]))[1], g["tokens"])


def test_official_quantiser_with_its_gradient():
    """F10 to F13."""
    g = stored()
    fsq, z = flextok.FSQ(LEVELS), g["z"].requires_grad_()
    values, ids = fsq(z)
    close(values, g["quant"], 1e-6)
    assert torch.equal(ids, g["tokens"]) and torch.equal(fsq(g["extreme_in"])[1], g["extreme_tokens"])
    close(fsq.values(g["idx"]), g["idx_embedding"], 1e-6)
    close(torch.autograd.grad((values * g["cotangent"]).sum(), z)[0], g["grad_z"], 1e-6)


@pytest.mark.parametrize("n, D", [(4, 64), (8, 32), (16, 16)])
def test_official_position_table(n, D):
    """F3."""
    close(flextok.sincos_pos_embed(n, D).T.view(D, n, n), stored()[f"sincos_{n}x{n}_d{D}"][0], 1e-6)


# --- What the equations say and imply ------------------------------------------

def test_fsq_is_a_bijection():
    """F12 inverts F13 on every id; F10 inverted gives a z for each."""
    fsq, ids = flextok.FSQ(LEVELS), torch.arange(64_000)[None]
    values = fsq.values(ids)
    assert len(values[0].unique(dim=0)) == 64_000
    assert set(values[..., :3].unique().tolist()) == {i / 4 for i in range(-4, 4)}
    assert set(values[..., 3:].unique().tolist()) == {-1, -0.5, 0, 0.5, 1}
    half = torch.tensor([(L - 1) * 1.001 / 2 for L in LEVELS])          # F10 inverted: the z of every code
    off = torch.tensor([0.5 * (L % 2 == 0) for L in LEVELS])
    code = values * torch.tensor([L // 2 for L in LEVELS])
    z = torch.atanh((code + off) / half) - torch.atanh(off / half)
    again, back = fsq(z)
    assert torch.equal(back, ids)
    close(again, values, 1e-6)


def test_fsq_at_zero_and_far_out():
    """F10 keeps 0 at 0 and reaches the outermost levels; F12 counts the first digit fastest."""
    fsq = flextok.FSQ(LEVELS)
    for value, expected in ((0.0, 32_036), (-30.0, 0), (30.0, 63_999)):
        values, ids = fsq(torch.full((1, 1, 6), value))
        assert ids.item() == expected and (value or not values.any())
    assert [math.prod(LEVELS[:i]) for i in range(6)] == fsq.basis.tolist() == [1, 8, 64, 512, 2560, 12800]


def test_fsq_is_monotone_coordinatewise_with_the_closed_gradient():
    """F10 and F11."""
    fsq, j = flextok.FSQ(LEVELS), 2
    z = torch.randn(1, 1, 6, dtype=torch.float64).repeat(1, 500, 1)
    z[0, :, j] = torch.linspace(-4, 4, 500)
    ids = fsq(z)[1]
    digits = torch.stack([ids // b % L for b, L in zip(fsq.basis, fsq.levels)], -1)[0]
    assert (digits[1:, j] >= digits[:-1, j]).all() and digits[:, j].unique().tolist() == [*range(8)]
    assert all((digits[:, i] == digits[0, i]).all() for i in range(6) if i != j)
    z = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(fsq(z)[0].sum(), z)
    for i, L in enumerate(LEVELS):
        half, off = (L - 1) * 1.001 / 2, 0.5 * (L % 2 == 0)
        expected = half * (1 - torch.tanh(z[..., i] + math.atanh(off / half)) ** 2) / (L // 2)
        close(gradient[..., i], expected.detach(), 1e-6)


def test_fsq_of_two_levels():
    """F10 stays finite at L = 2, where without the 1.001 the offset would be half of everything."""
    values, ids = flextok.FSQ((2, 2))(torch.tensor([[[-9.0, -9.0], [0.0, -9.0], [-9.0, 0.0], [9.0, 9.0]]]))
    assert ids.tolist() == [[0, 1, 2, 3]] and values.unique().tolist() == [-1, 0]


def test_fsq_never_computes_in_bf16():
    fsq, z = flextok.FSQ(LEVELS), torch.randn(4, 50, 6).bfloat16()
    assert fsq(z)[0].dtype == torch.float32 and torch.equal(fsq(z)[1], fsq(z.float())[1])


def outputs(encoder, x):
    """Patches, the last time that somebody reads them, and z of an encoder."""
    seen = []
    handle = encoder.blocks[-1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    z = encoder(x)
    handle.remove()
    return seen[0][:, :9], z


@torch.no_grad()
def test_a_block_answers_for_the_last_positions_alone():
    encoder = tokenizer().encoder
    h = torch.randn(2, 17, 32, dtype=encoder.registers.dtype)
    block, mask = encoder.blocks[0], encoder.mask
    for first in (0, 9, 16):
        close(block(h, mask, first), block(h, mask)[:, first:], 1e-6)
    assert len(encoder.blocks) > 1 and mask.shape == (17, 17)


@torch.no_grad()
def test_encoder_causality():
    """F5: register i moves z_j for j >= i alone, and no patch."""
    encoder, x = tokenizer().encoder, images()
    patches, z = outputs(encoder, x)
    for i in range(8):
        changed = copy.deepcopy(encoder)
        changed.registers[i] += torch.randn(32)
        other, moved = outputs(changed, x)
        assert torch.equal(other, patches)
        difference = (moved - z).abs().amax((0, 2))
        assert (difference[:i] == 0).all() and (difference[i:] > 0).all()
    shifted = copy.deepcopy(encoder)
    shifted.registers[3] += 0.7                                         # a constant: the norms take it out
    close(outputs(shifted, x)[1], z, 1e-5)


@torch.no_grad()
def test_prefix_encoding():
    """F5: with k registers alone the first k rows are the same."""
    encoder, x = tokenizer().encoder, images()
    whole = encoder(x)
    for k in range(1, 9):
        short = copy.deepcopy(encoder)
        short.registers, short.mask = torch.nn.Parameter(encoder.registers[:k]), encoder.mask[:9 + k, :9 + k]
        close(short(x), whole[:, :k], 1e-12)


def decoder_inputs(B=3, seed=2):
    g = torch.Generator().manual_seed(seed)
    return (images(B, seed=seed), torch.rand(B, generator=g, dtype=torch.float64),
            torch.rand(B, 8, 3, generator=g, dtype=torch.float64) * 2 - 1)


NO = torch.zeros(3, dtype=torch.bool)


def test_suffix_independence():
    """F15: nothing of token k + 1 and beyond reaches the velocity, and no gradient goes back."""
    model, (x, t, values), keep = tokenizer(), decoder_inputs(), torch.tensor([1, 4, 7])
    changed = values.clone()
    for b, k in enumerate(keep):
        changed[b, k:] = torch.rand(8 - k, 3)
    close(model.decoder(x, t, changed, keep, NO)[0], model.decoder(x, t, values, keep, NO)[0], 1e-12)
    values.requires_grad_()
    gradient, = torch.autograd.grad(model.decoder(x, t, values, keep, NO)[0].square().sum(), values)
    for b, k in enumerate(keep):
        assert gradient[b, :k].any(-1).all() and not gradient[b, k:].any()


@torch.no_grad()
def test_full_prefix_and_exchangeable_masks():
    """F14 is all there is at k = R; by F15 all dropped tokens are alike in every layer."""
    model, (x, t, values) = tokenizer().decoder, decoder_inputs()
    r = values @ model.read.weight.T + model.read.bias + model.token_position
    close(model.tokens(values, torch.tensor([8, 8, 8]), NO), r, 1e-14)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append(out[:, 9:]))
    model(x, t, values, torch.tensor([3, 3, 3]), NO)
    for h in seen:
        close(h[:, 3:], h[:, 3:4].expand(-1, 5, -1), 1e-12)
        assert (h[:, 2] - h[:, 3]).abs().min() > 0


@torch.no_grad()
def test_without_tokens_nothing_of_them_is_left():
    """F16."""
    model, (x, t, values) = tokenizer().decoder, decoder_inputs()
    plain = model(x, t, values, torch.tensor([8, 8, 8]), ~NO)[0]
    close(model(x, t, torch.rand_like(values), torch.tensor([1, 5, 8]), ~NO)[0], plain, 1e-14)
    assert (model(x, t, values, torch.tensor([1, 1, 1]), NO)[0] - plain).abs().max() > 1e-3


@torch.no_grad()
def test_short_ids_equal_masked_long_ones():
    """F28, through F25."""
    model, cfg, noise = tokenizer(), config(), images()
    ids = torch.randint(200, (3, 8))
    for k in (1, 3, 8):
        x, values = noise, model.fsq.values(ids).double()
        for i in range(cfg.num_steps, 0, -1):                               # F25 with keep = k and all the ids
            t = torch.full((3,), i / cfg.num_steps, dtype=torch.float64)
            x = x - model.decoder(x, t, values, torch.full((3,), k), NO)[0] / cfg.num_steps
        assert torch.equal(flextok.sample(model, noise, ids[:, :k], cfg), x)


def test_the_untrained_model_is_known():
    """F9, F18 and F19 start at zero: ids of z = 0, blocks that do nothing, velocity 0."""
    torch.manual_seed(0)
    cfg = config(levels="8,8,8,5,5,5", cfg_scale=3.0)
    model = flextok.Tokenizer(cfg)
    x, noise = images().float(), images(seed=5).float()
    values, ids = model.fsq(model.encoder(x))
    assert not values.any() and (ids == 32_036).all()
    h = torch.randn(2, 17, 32)
    assert torch.equal(model.decoder.blocks[0](h, torch.randn(2, 32), 9), h)
    assert not model.decoder(x, torch.rand(3), values, torch.tensor([1, 2, 8]), NO)[0].any()
    assert torch.equal(flextok.sample(model, noise, ids, cfg), noise)
    x, noise = torch.randn(2000, 3, 6, 6) * 0.5, torch.randn(2000, 3, 6, 6)
    draws = named(torch.rand(2000), noise, torch.full((2000,), 8), torch.zeros(2000, dtype=torch.bool))
    value = flextok.loss_tokenizer(model, x, draws)[0].item()
    assert abs(value - (1 + x.square().mean().item())) < 0.02


def test_wake_up_order():
    """F9, F18 and F19: the order in which gradients arrive."""
    torch.manual_seed(0)
    model = flextok.Tokenizer(config())
    opt = torch.optim.AdamW(model.parameters(), 1e-3)
    first, x = {}, images(8).float()
    for step in range(20):
        draws = named(torch.rand(8), torch.randn(8, 3, 6, 6), torch.randint(1, 9, (8,)), torch.rand(8) < 0.1)
        opt.zero_grad()
        flextok.loss_tokenizer(model, x, draws)[0].backward()
        for name, p in model.named_parameters():
            if p.grad is not None and p.grad.any():
                first.setdefault(name, step)
        opt.step()
    assert {name for name, step in first.items() if step == 0} == {"decoder.head.weight", "decoder.head.bias"}
    modulations = [name for name in first if "modulation" in name]
    assert len(modulations) == 6 and {first[name] for name in modulations} == {1}
    assert first["encoder.head.weight"] == first["encoder.head.bias"] == 2
    assert {first[name] for name, _ in model.named_parameters() if "encoder" in name and "head" not in name} == {3}
    assert 4 <= first["decoder.read.weight"] < 20                       # when the first id moves


def test_guidance_by_formula():
    """F26 and F27: scale 1 is the conditional velocity; APG adds nothing along it and no more than the bounded length."""
    v, u, last = images(seed=1), images(seed=2), images(seed=3) * 5
    assert torch.equal(flextok.adaptive_projected_guidance(v, u, 1.0, last)[0], v)
    assert torch.equal(flextok.classifier_free_guidance(v, u, 1.0), v)
    close(flextok.classifier_free_guidance(v, u, 0.0), u, 1e-14)
    close(flextok.classifier_free_guidance(v, u, 4.0), u + 4 * (v - u), 1e-12)
    guided, diff = flextok.adaptive_projected_guidance(v, u, 4.0, last)
    close(diff, v - u - 0.5 * last, 1e-14)
    step = (guided - v).flatten(1)
    cosine = F.cosine_similarity(step, v.flatten(1))
    assert cosine.abs().max() < 1e-5 and (step.norm(dim=1) <= 3 * 2.5 * (1 + 1e-5)).all()
    for b in range(3):
        bounded = diff[b] * min(1.0, 2.5 / diff[b].norm().item())
        orthogonal = bounded - (bounded * v[b]).sum() / v[b].square().sum() * v[b]
        close(guided[b], v[b] + 3 * orthogonal, 1e-12)
    loose, _ = flextok.adaptive_projected_guidance(v, u, 4.0, 0 * v, threshold=math.inf)
    along = ((v - u) * v).sum((1, 2, 3), True) / v.square().sum((1, 2, 3), True) * v
    close(loose, v + 3 * (v - u - along), 1e-12)


@torch.no_grad()
def test_guidance_inside_the_sampler_by_value():
    model, noise, ids = tokenizer(), images(), torch.randint(200, (3, 8))
    values, full = model.fsq.values(ids).double(), torch.full((3,), 8)
    for g, apg, schedule in itertools.product((0.0, 2.5), (False, True), ("constant", "linear", "cosine")):
        x, diff = noise, torch.zeros_like(noise)
        for i in (4, 3, 2, 1):
            t = torch.full((3,), i / 4, dtype=torch.float64)
            v, u = (model.decoder(x, t, values, full, null)[0] for null in (NO, ~NO))
            scale = {"constant": g, "linear": 1 + (g - 1) * (1 - i / 4), "cosine": 1 + (g - 1) * math.cos(math.pi * i / 8)}[schedule]
            if scale != 1 and apg:
                v, diff = flextok.adaptive_projected_guidance(v, u, scale, diff, threshold=2.5 * math.sqrt(108) / 128)
            else:
                v = u + scale * (v - u)
            x = x - v / 4
        close(flextok.sample(model, noise, ids, config(cfg_scale=g, apg=apg, cfg_schedule=schedule)), x, 1e-11)


class Oracle(torch.nn.Module):
    """A tokenizer whose decoder knows the truth, v = noise - x; counts the images it is called for."""

    def __init__(self, truth):
        super().__init__()
        self.decoder, self.fsq, self.truth, self.calls = self.velocity, flextok.FSQ((8, 5, 5)), truth, 0
        self.velocity.__func__.token_position = torch.zeros(8, 1)

    def velocity(self, x, t, values, keep, null):
        self.calls += len(x)
        truth = self.truth.repeat(len(x) // len(self.truth), 1, 1, 1)
        return (x - truth) / t.view(-1, 1, 1, 1), None


def test_flow_path_and_times():
    """F20 at its ends, F25 with a decoder that knows the truth, F21 with its symmetry and its masses."""
    x, noise = images(seed=1), images(seed=2)
    for N in (1, 2, 7, 20):
        drawn = flextok.sample(Oracle(x), noise, torch.zeros(3, 8).long(), config(num_steps=N))
        close(drawn, x, 1e-5)
    model, seen = tokenizer(), []
    model.decoder.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    for t, expected in ((0.0, x), (1.0, noise), (0.25, 0.25 * noise + 0.75 * x)):
        draws = named(torch.full((3,), t, dtype=torch.float64), noise, torch.tensor([8, 8, 8]), NO)
        flextok.loss_tokenizer(model, x, draws)
        close(seen[-1], expected, 1e-12)
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    t = flextok.flow_time(u, "mode")
    close(t[[0, 500, 1000]], torch.tensor([1.0, 0.5, 0.0]).double(), 1e-6)
    assert (t.diff() < 0).all()
    close(t + t.flip(0), torch.ones(1001).double(), 1e-6)
    close(t, 1 - u - 0.25 * (torch.cos(math.pi * u / 2) ** 2 - 1 + u), 1e-14)
    masses = torch.histc(flextok.flow_time((torch.arange(100_000) + 0.5) / 100_000, "mode"), 10, 0, 1) / 100_000
    assert typing.get_args(flextok.Config.__annotations__["time"]) == ("mode", "logit-normal", "uniform")
    close(masses[:5], torch.tensor([0.083, 0.091, 0.100, 0.109, 0.115]), 2e-3)
    close(flextok.flow_time(u, "uniform"), 1 - u, 1e-14)
    close(flextok.flow_time(u, "mode", 8.0), 8 * t / (1 + 7 * t), 1e-14)
    normal = flextok.flow_time((torch.arange(1000) + 0.5) / 1000, "logit-normal")
    assert abs(torch.logit(normal).std().item() - 1) < 0.01


@pytest.mark.parametrize("k", [1, 3, 8])
def test_calls_an_image(k):
    for g, calls in ((1.0, 4), (3.0, 8)):
        oracle = Oracle(images())
        flextok.sample(oracle, images(seed=2), torch.zeros(3, k).long(), config(cfg_scale=g))
        assert oracle.calls == 3 * calls


def test_laws_of_nested_dropout():
    """F15: how often register i is kept."""
    R, u = 256, torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    i = torch.arange(1, R + 1)
    pow2, uniform = (flextok.nested_lengths(u, R, law) for law in typing.get_args(flextok.Config.__annotations__["nested"]))
    assert pow2.unique().tolist() == [2 ** j for j in range(9)]
    assert uniform.min() == 1 and uniform.max() == R
    theory = torch.tensor([sum(2 ** j >= n for j in range(9)) / 9 for n in i.tolist()])
    for kept, expected in ((pow2, theory), (uniform, (R - i + 1) / R)):
        close((kept[:, None] >= i).float().mean(0), expected, 0.01)
    assert abs(pow2.float().mean() - 56.8) < 1.5 and abs(uniform.float().mean() - 128.5) < 1.5
    assert (theory > (R - i + 1) / R).nonzero().min() + 1 == 229
    edge = torch.tensor([0.0, 1 - 2 ** -24])
    assert flextok.nested_lengths(edge, R, "pow2").tolist() == flextok.nested_lengths(edge, R, "uniform").tolist() == [1, R]
    for law, kept in (("pow2", pow2), ("uniform", uniform)):                    # a share keeps all, the others keep the law
        some = flextok.nested_lengths(u, R, law, 0.6)
        assert (some[u > 0.4] == R).all()
        close((some[u < 0.4][:, None] >= i).float().mean(0), (kept[:, None] >= i).float().mean(0), 0.02)
        assert flextok.nested_lengths(edge, R, law, 0.99).tolist() == [1, R]


def test_patches():
    """F2, entry by entry, and F3."""
    x = images(2, 3, 6)
    u = flextok.patchify(x, 2)
    assert torch.equal(flextok.unpatchify(u, 2, 6, 6), x)
    for row, column, i, j, c in itertools.product(range(3), range(3), range(2), range(2), range(3)):
        assert torch.equal(u[:, 3 * row + column, 6 * i + 3 * j + c], x[:, c, 2 * row + i, 2 * column + j])
    wide, small = flextok.sincos_pos_embed(5, 16), flextok.Encoder(config(size=10, encoder=1, base=10.0)).pos_embed
    assert torch.equal(wide.view(5, 5, 16)[:3, :3].reshape(9, 16), flextok.sincos_pos_embed(3, 16))
    assert torch.equal(small, flextok.Decoder(config(size=10, decoder=1, base=10.0)).pos_embed)
    for (base, table), r, c, j in itertools.product(((10_000, wide), (10, small)), range(5), range(5), range(4)):
        w = base ** (-j / 4)
        expected = torch.tensor([math.sin(r * w), math.cos(r * w), math.sin(c * w), math.cos(c * w)])
        close(table[5 * r + c, j::4], expected, 1e-6)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("preset, encoder, decoder, modulations", [
    ("d12-d12", 85_185_798, 172_251_712, 85.0), ("d18-d18", 287_031_174, 578_292_544, 286.9),
    ("d18-d28", 287_031_174, 2_169_276_992, 1079.6)])
def test_published_tokenizer_sizes(preset, encoder, decoder, modulations):
    cfg = dataclasses.replace(flextok.Config(), **flextok.PRESETS[preset])
    with torch.device("meta"):
        model = flextok.Tokenizer(cfg)
    assert (count(model.encoder), count(model.decoder)) == (encoder, decoder)
    assert round(sum(count(block.modulation) for block in model.decoder.blocks) / 1e6, 1) == modulations
    assert {tuple(buffer.shape) for buffer in model.encoder.buffers()} == {(256, cfg.encoder * 64), (512, 512)}


@pytest.mark.parametrize("preset, millions", [
    ("ar-d10", 49), ("ar-d12", 85), ("ar-d16", 201), ("ar-d20", 393), ("ar-d24", 679), ("ar-d30", 1327),
    ("ar-text-d12", 113), ("ar-text-d18", 382), ("ar-text-d26", 1152), ("ar-text-d36", 3058)])
def test_published_gpt_sizes(preset, millions):
    cfg = dataclasses.replace(flextok.Config(), **flextok.PRESETS[preset])
    w, d, text = 64 * cfg.gpt, cfg.gpt, cfg.condition == "text"
    with torch.device("meta"):
        empty = torch.zeros(4, 2048) if text else torch.tensor(-1)
        model = flextok.GPT(cfg, [str(k) for k in range(1000)], empty)
    blocks = count(model.blocks)
    exact = (16 if text else 12) * w ** 2 * d
    assert exact - 2 * w * d <= blocks <= exact and (w % 3 or blocks == exact)    # SwiGLU's 8 w / 3 rounds down
    assert abs(blocks / 1e6 - millions) < 0.5 + 0.001 * millions


def test_mask():
    """F5, entry by entry."""
    mask = flextok.Encoder(config(size=6, patch=2, registers=4)).mask[3:, 3:]     # P = 9; cut to P = 6, R = 4
    assert mask.sum(1).tolist() == [6, 6, 6, 6, 6, 6, 7, 8, 9, 10]
    whole = flextok.Encoder(config()).mask
    for q, s in itertools.product(range(17), range(17)):
        assert whole[q, s] == (s < 9 or s <= q)


@torch.no_grad()
def test_separate_modulation():
    """F18: what modulates registers does not touch patches."""
    block, h, tau = awake(flextok.DecoderBlock(32, 16)), torch.randn(2, 17, 32).double(), torch.randn(2, 32).double()
    for part in (block.modulation.weight.view(2, 6, 32, 32), block.modulation.bias.view(2, 6, 32)):
        part[:, 0] = 0                                                  # both attention gates
    before = block(h, tau, 9)
    block.modulation.weight.view(2, -1)[1] += torch.randn(6 * 32 * 32)  # the register half
    block.modulation.weight.view(2, 6, 32, 32)[1, 0] = 0
    after = block(h, tau, 9)
    assert torch.equal(before[:, :9], after[:, :9]) and (before[:, 9:] - after[:, 9:]).abs().max() > 1e-3


WORDS = ["a", "blue", "circle", "red"]


def gpt(kind, **changes):
    """An awake GPT of one of the three kinds, ids and conditions; some conditions are empty."""
    g = torch.Generator().manual_seed(3)
    cfg = config(condition="class" if kind == "class" else "text", text="x.npy" if kind == "states" else "", **changes)
    if kind == "class":
        cond, empty = torch.tensor([3, -1, 0]), torch.tensor(-1)
    elif kind == "words":
        cond = torch.tensor([[1, 4, 7, 6], [1, 0, 0, 0], [1, 5, 6, 0]])
        empty = cond[1]
    else:
        cond = torch.randn(3, 5, 12, generator=g).double()
        cond[1, 1:] = cond[2, 3:] = 0
        empty = cond[1]
    model = flextok.GPT(cfg, WORDS + ["star"], empty)
    return awake(model), torch.randint(200, (3, 8), generator=g), cond


KINDS = ["class", "words", "states"]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_cache_equals_the_plain_form(kind):
    """F29: an id depends on those before it alone, and the cache changes nothing."""
    model, ids, cond = gpt(kind)
    plain = model(ids, cond)
    h, texts = model.encode_condition(cond)
    kv_cache = [None] * 2
    for i in range(8):
        close(model.decode_step(h, i, texts, kv_cache)[:, 0], plain[:, i], 1e-12)
        h = model.table(ids[:, i])[:, None]
    for i in range(8):                                                  # position i sees ids before it, never later
        changed = ids.clone()
        changed[:, i:] = torch.randint(200, (3, 8 - i))
        close(model(changed, cond)[:, :i + 1], plain[:, :i + 1], 1e-12)
    assert (model(ids.roll(1, 0), cond)[:, 1:] - plain[:, 1:]).abs().amax((0, 2)).min() > 1e-3


@torch.no_grad()
def test_no_class_is_the_bare_start():
    """F30."""
    model, ids, _ = gpt("class")
    zeroed = copy.deepcopy(model)
    zeroed.condition.table.weight.zero_()
    assert torch.equal(model(ids, torch.full((3,), -1)), zeroed(ids, torch.tensor([0, 1, 2])))
    first = model.encode_condition(torch.tensor([2]))[0][0, 0]
    close(first, model.start + model.condition.table.weight[2], 1e-14)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["words", "states"])
def test_padding_of_a_caption_is_not_read(kind):
    model, ids, cond = gpt(kind)
    longer, plain = F.pad(cond, (0, 3) if kind == "words" else (0, 0, 0, 3)), model(ids, cond)
    positions = getattr(model.condition, "position", None)
    if kind == "words":
        model.condition.position = torch.nn.Parameter(torch.cat([positions, torch.randn(3, 32).double()]))
    close(model(ids, longer), plain, 1e-12)
    cond = cond.clone()
    if kind == "words":
        model.condition.position = positions
    cond[0, 1] = 5 if kind == "words" else 1.0
    assert (model(ids, cond)[0] - plain[0]).abs().max() > 1e-3


def plain_generate(model, cond, u, cfg):
    """F33 without a cache: all positions again for every token, numpy's search for the sampled id."""
    ids = torch.zeros(len(cond), 0, dtype=torch.long)
    for i in range(u.shape[1]):
        padded = F.pad(ids, (0, 1))
        logits = model(padded, cond)[:, -1]
        if cfg.cfg_scale_ar != 1:
            free = model(padded, model.empty.expand_as(cond))[:, -1]
            logits = free + cfg.cfg_scale_ar * (logits - free)
        p = common.filter_logits(logits, cfg.temperature, cfg.top_k, cfg.top_p).softmax(1).numpy()
        new = [int(np.searchsorted(np.cumsum(row), float(x) * row.sum(), side="right")) for row, x in zip(p, u[:, i])]
        ids = torch.cat([ids, torch.tensor(new)[:, None]], 1)
    return ids


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("s", [1.0, 3.0])
def test_generation_equals_the_plain_loop(kind, s):
    """F33."""
    model, _, cond = gpt(kind)
    u, cfg = torch.rand(3, 8, generator=torch.Generator().manual_seed(4)), config(cfg_scale_ar=s)
    ids = flextok.generate(model, cond, u, cfg)
    assert torch.equal(ids, plain_generate(model, cond, u, cfg))
    assert torch.equal(ids[:, :3], flextok.generate(model, cond, u[:, :3], cfg))    # stopping early is a prefix


def test_sampled_ids_follow_the_distribution():
    model, _, _ = gpt("class", levels="3,2")
    cond = torch.zeros(20_000, dtype=torch.long)
    u = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(5))
    ids = flextok.generate(model, cond, u, config(levels="3,2"))
    p = model(torch.zeros(1, 1).long(), cond[:1])[0, 0].softmax(0)
    close(torch.bincount(ids[:, 0], minlength=6) / 20_000, p.detach(), 0.012)


def test_filters_by_value():
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    logits = p.log()
    for changes, kept in ((dict(top_k=2), [1, 3]), (dict(top_p=0.65), [1, 3]), (dict(top_p=0.75), [1, 2, 3]),
                          (dict(top_p=1e-6), [1]), (dict(top_k=9), [0, 1, 2, 3]), (dict(), [0, 1, 2, 3])):
        out = common.filter_logits(logits, **changes).softmax(1)[0]
        assert out.nonzero()[:, 0].tolist() == kept
        close(out[kept], p[0, kept].double() / p[0, kept].sum(), 1e-6)
    cold = common.filter_logits(logits, temperature=0.5).softmax(1)
    close(cold, (p ** 2 / (p ** 2).sum()).double(), 1e-6)


@torch.no_grad()
def test_queries_and_keys_have_no_length():
    """F7."""
    attention, h = awake(flextok.Attention(32, 16)), torch.randn(2, 9, 32).double() * 30
    before = attention(h)
    attention.wq.weight *= 7.0
    attention.wk.weight *= 0.3
    close(attention(h), before, 1e-4)


@torch.no_grad()
def test_attention_by_formula():
    """F7, a head and a position at a time."""
    attention, h, d = awake(flextok.Attention(32, 16)), torch.randn(2, 5, 32).double(), 16
    mask = torch.rand(5, 5) < 0.6
    mask.fill_diagonal_(True)
    expected = torch.zeros(2, 5, 32).double()
    unit = lambda a: (a - a.mean()) / (a.var(unbiased=False) + 1e-5).sqrt()
    for b, head, i in itertools.product(range(2), range(2), range(5)):
        part = slice(16 * head, 16 * head + 16)
        q = unit((attention.wq.weight @ h[b, i])[part])
        weights = torch.tensor([(q @ unit((attention.wk.weight @ h[b, s])[part]) * 8 / d).exp() * mask[i, s] for s in range(5)])
        expected[b, i, part] = sum(w * (attention.wv.weight @ h[b, s])[part] for s, w in enumerate(weights / weights.sum()))
    close(attention(h, mask=mask), expected @ attention.wo.weight.T, 1e-10)


def unit(h):
    """The norm without gain of one vector, or of rows."""
    return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def swiglu(block, h):
    """F8."""
    a, b = h @ block.w1.weight.T, h @ block.w3.weight.T
    return (a / (1 + (-a).exp()) * b) @ block.w2.weight.T


@torch.no_grad()
def test_encoder_by_formula():
    """F4, F6, F8 and F9 around the attention of F7."""
    encoder, x = tokenizer(encoder=1).encoder, images(1)
    patches = [torch.cat([x[0, :, 2 * r + i, 2 * c + j] for i in range(2) for j in range(2)]) for r in range(3) for c in range(3)]
    h = torch.stack(patches) @ encoder.embed.weight.T + encoder.embed.bias + flextok.sincos_pos_embed(3, 16)
    h, block = torch.cat([h, encoder.registers]), encoder.blocks[0]
    h = h + block.attention(unit(h)[None], mask=encoder.mask)[0]
    h = h + swiglu(block, unit(h))
    z = unit(h[9:]) @ encoder.head.weight.T + encoder.head.bias
    close(encoder(x)[0], z, 1e-6)


@torch.no_grad()
def test_decoder_by_formula():
    """F14, F15, F16, F17, F18 and F19 for one image, a position at a time where it matters."""
    model = tokenizer(decoder=1, max_time=500.0).decoder
    x, t, values = images(1), torch.tensor([0.3], dtype=torch.float64), torch.rand(1, 8, 3, dtype=torch.float64)
    angles = [0.3 * 2 * 256 ** (-j / 128) for j in range(128)]
    code = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float64)
    close(flextok.timestep_embedding(t, 500.0)[0], code, 1e-12)
    a, silu = model.time[0](code), torch.nn.functional.silu
    tau = model.time[2](a / (1 + (-a).exp()))
    r = [model.read.weight @ values[0, i] + model.read.bias + model.token_position[i] if i < 3 else model.mask for i in range(8)]
    h = torch.cat([flextok.patchify(x, 2)[0] @ model.embed.weight.T + model.embed.bias + model.pos_embed, torch.stack(r)])
    block = model.blocks[0]
    parts = block.modulation(silu(tau)).view(2, 6, 16)
    g1, g2, s1, c1, s2, c2 = (torch.stack([parts[int(i >= 9), k] for i in range(17)]) for k in range(6))
    h = h + g1 * block.attention((unit(h) * (1 + c1) + s1)[None])[0]
    h = h + g2 * swiglu(block, unit(h) * (1 + c2) + s2)
    shift, scale = model.modulation(silu(tau)).view(2, 16)
    u = model.head(unit(h[:9]) * (1 + scale) + shift)
    v = model(x, t, values, torch.tensor([3]), NO[:1])[0]
    close(flextok.patchify(v, 2)[0], u, 1e-6)
    without = model.tokens(values, torch.tensor([3]), ~NO[:1])
    assert torch.equal(without, model.null.expand(1, 8, 16))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["class", "words", "states"])
def test_gpt_by_formula(kind):
    """F29, F30, F31 and F32 with one block: the first input, causal attention, cross-attention to the text, the read-out."""
    model, ids, cond = gpt(kind, gpt=1)
    rms = lambda h: h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    block, b = model.blocks[0], 2
    h = torch.stack([model.start, *model.table.weight[ids[b, :-1]]])
    if kind == "class":
        h[0] += model.condition.table.weight[cond[b]]
    h = h + model.position
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    h = h + block.attention(rms(h)[None], mask=causal)[0]
    if kind != "class":
        states = cond[b, :3]                                            # the rest is padding
        if kind == "words":
            states = (model.condition.table.weight[cond[b]] + model.condition.position)[:3]
            for reader in model.condition.blocks:
                states = states + reader.attention(unit(states)[None])[0]
                states = states + swiglu(reader, unit(states))
        a = states @ model.text[0].weight.T
        text = (0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a ** 3)))) @ model.text[2].weight.T
        h = h + block.cross(rms(h)[None], block.cross.keys_values(text[None]))[0]
    h = h + swiglu(block, rms(h))
    close(model(ids, cond)[b], rms(h) @ model.head.weight.T, 1e-6)


@torch.no_grad()
def test_batch_independence():
    model, (x, t, values), keep = tokenizer(), decoder_inputs(), torch.tensor([1, 4, 8])
    null = torch.tensor([False, True, False])
    z, v = model.encoder(x), model.decoder(x, t, values, keep, null)[0]
    for j in range(3):
        one = slice(j, j + 1)
        close(model.encoder(x[one]), z[one], 1e-12)
        close(model.decoder(x[one], t[one], values[one], keep[one], null[one])[0], v[one], 1e-12)


def test_losses_by_formula():
    """F20, F22, F23 and F24, an image and a patch at a time; the teacher sees the images, which latents are not."""
    torch.manual_seed(0)
    model, (x, t, _), noise, keep = tokenizer(), decoder_inputs(), images(seed=8), torch.tensor([1, 4, 8])
    model.align, model.repa = awake(torch.nn.Linear(32, 5)), 0.3
    features = torch.randn(3, 5, 3, 3).double()                         # already on the grid of patches
    draws = {**named(t, noise, keep, NO), "images": torch.zeros(3, 1, 40, 40)}
    value, parts = flextok.loss_tokenizer(model, x, draws, lambda seen: features * (seen is draws["images"]))
    values = model.fsq(model.encoder(x))[0]
    point = torch.stack([t[b] * noise[b] + (1 - t[b]) * x[b] for b in range(3)])
    v, patches = model.decoder(point, t, values, keep, NO)
    cosines = [F.cosine_similarity(model.align(patches[b, i]), features[b, :, i // 3, i % 3], dim=0)
               for b in range(3) for i in range(9)]
    close(parts["flow"], ((v - (noise - x)) ** 2).mean(), 1e-12)
    close(value, parts["flow"] - 0.3 * sum(cosines) / 27, 1e-12)


def test_only_early_patches_of_the_decoder_are_aligned():
    """F23."""
    model, (x, t, values), keep = tokenizer(decoder=3, repa_layer=1), decoder_inputs(), torch.tensor([8, 8, 8])
    seen = []
    for block in model.decoder.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append(out))
    _, patches = model.decoder(x, t, values, keep, NO)
    assert patches.shape == (3, 9, 48) and torch.equal(patches, seen[1][:, :9])


def test_ar_loss_by_formula():
    """F29."""
    model, ids, cond = gpt("class")
    drop = torch.tensor([True, False, False])
    value, _ = flextok.loss_ar(model, (ids, cond), {"drop": drop})
    logits = model(ids, torch.tensor([-1, -1, 0]))
    expected = -sum(logits[b, i].log_softmax(0)[ids[b, i]] for b in range(3) for i in range(8)) / 24
    close(value, expected, 1e-12)


def test_latents_are_drawn_from_their_posterior():
    """F1, of the image or of its mirror, by the draws of the step."""
    g = np.random.default_rng(0)
    parts = {name: g.normal(size=(5, 3, 6, 6)).astype(np.float32) for name in ("images", "logvar", "mean_flip", "logvar_flip")}
    dataset = data.Data(labels=np.arange(5) % 2, latent=True, scale=0.7, **parts)
    cfg = config(batch=4, flip=True, repa=0.0)
    x, draws = flextok.draw(dataset, cfg, 3, torch.device("cpu"))
    draw = torch.Generator().manual_seed(common.make_generator(cfg.seed, 3, "tokenizer data").initial_seed())
    index, u = torch.randint(5, (4,), generator=draw), torch.rand(4, 5, generator=draw)
    noise = torch.randn(4, 3, 6, 6, generator=common.make_generator(cfg.seed, 3, "tokenizer posterior"))
    for b, i in enumerate(index):
        mean, logvar = ("mean_flip", "logvar_flip") if u[b, 0] < 0.5 else ("images", "logvar")
        z = parts[mean][i] + np.exp(parts[logvar][i] / 2) * noise[b].numpy()
        close(x[b], torch.from_numpy(0.7 * z), 1e-6)
    assert torch.equal(draws["time"], flextok.flow_time(u[:, 1], "mode")) and draws["noise"].shape == x.shape
    assert torch.equal(draws["num_tokens"], flextok.nested_lengths(u[:, 2], 8, "pow2"))
    assert torch.equal(draws["no_tokens"], u[:, 3] < cfg.null)


def test_a_teacher_sees_the_images_and_not_their_latents():
    """F23: of latents those of the file, mirrored where the latents are; pixels are seen as they are decoded."""
    g = np.random.default_rng(0)
    pictures = g.integers(0, 256, (5, 3, 16, 16), np.uint8)
    means = g.normal(size=(2, 5, 4, 6, 6)).astype(np.float32)
    draw = torch.Generator().manual_seed(common.make_generator(0, 3, "tokenizer data").initial_seed())
    index, u = torch.randint(5, (8,), generator=draw), torch.rand(8, 5, generator=draw)
    plain = torch.from_numpy(pictures[index.numpy()]) / 127.5 - 1
    assert 0 < (u[:, 0] < 0.5).sum() < 8
    for mean_flip in (means[1], None):                                  # None: there are no mirrored latents
        dataset = data.Data(means[0], np.arange(5), latent=True, mean_flip=mean_flip, pictures=pictures)
        x, draws = flextok.draw(dataset, config(channels=4, batch=8, flip=True), 3, torch.device("cpu"))
        for b, i in enumerate(index):
            flips = mean_flip is not None and u[b, 0] < 0.5
            close(draws["images"][b], plain[b].flip(-1) if flips else plain[b], 1e-6)
            close(x[b], torch.from_numpy(means[int(flips)][i]), 1e-6)
    x, draws = flextok.draw(data.Data(pictures, np.arange(5)), config(batch=8), 3, torch.device("cpu"))
    assert draws["images"] is x


def test_ids_are_those_that_stage_ar_learns_from(monkeypatch):
    """Where training tokenizes under autocast, so does --encode."""
    cfg = config(levels="8,8,8,8,8,8")
    model, dataset = awake(flextok.Tokenizer(cfg)).float(), data.Data(np.random.default_rng(0).integers(0, 256, (40, 3, 6, 6), np.uint8), np.zeros(40, int))
    bf16 = lambda cfg: torch.autocast("cpu", torch.bfloat16)
    with torch.no_grad():
        exact, rounded = model.tokenize(dataset.pixels(range(40))), None
        with bf16(cfg):
            rounded = model.tokenize(dataset.pixels(range(40)))
        assert not torch.equal(exact, rounded) and torch.equal(flextok.encode_images(model, cfg, dataset, 40), exact)
        monkeypatch.setattr(common, "autocast", bf16)
        assert torch.equal(flextok.encode_images(model, cfg, dataset, 40), rounded)


def test_reported_training_of_the_gpts():
    """1.2e-3 at 49M, which is depth 10, and 300 epochs of ImageNet in batches of 1024; rates fall with the width."""
    for name in (name for name in flextok.PRESETS if name.startswith("ar-")):
        cfg = dataclasses.replace(flextok.Config(), **flextok.PRESETS[name])
        assert abs(cfg.lr_ar * cfg.gpt - 0.012) < 1e-9 and abs(cfg.steps * cfg.batch / 1_281_167 - 300) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_gpt_gradients_of_every_parameter(kind):
    model, ids, cond = gpt(kind)
    flextok.loss_ar(model, (ids, cond), {"drop": torch.tensor([False, False, True])})[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


# --- Command line --------------------------------------------------------------

TINY = ["--size", "8", "--patch", "4", "--registers", "4", "--levels", "8,5", "--encoder", "1", "--decoder", "2", "--gpt", "1",
        "--head", "8", "--steps", "2", "--batch", "4", "--batch_ar", "0", "--num_steps", "2", "--count", "6", "--repa", "1"]


def run(*argv):
    """flextok.py with these arguments, in this process, on 200 training images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flextok.open_split, "__defaults__", (200,))
        cfg = common.cli(flextok.Config, flextok.PRESETS, flextok.__doc__, list(argv))
        common.launch(flextok.main, cfg, flextok.check, flextok.prepare)


@pytest.mark.parametrize("argv, words", [
    (["--registers", "6"], "power of 2"), (["--keep", "0"], "--keep 0: give all, or 1 to 8"), (["--keep", "9"], "1 to 8"),
    (["--levels", "8,1"], "--levels 8,1"), (["--levels", "x"], "--levels x"), (["--head", "6"], "multiple of 4"),
    (["--patch", "5"], "--size 12: must be a multiple of --patch 5"), (["--prompt", " "], "--prompt: is empty"),
    (["--objects", "5"], "--objects 5"), (["--null", "2"], "--null 2.0"), (["--top_p", "0"], "--top_p 0.0"),
    (["--temperature", "0"], "--temperature 0.0"), (["--classes", "a"], "--classes a"), (["--encode", "x.npz"], "--sample"),
    (["--decode", "x.npz"], "--sample"), (["--repa", "1", "--repa_layer", "9"], "--repa_layer 9"),
    (["--repa", "1", "--teacher", "no.pt2"], "no.pt2"),
    (["--nested", "what"], "invalid choice"), (["--channels", "1"], "images (3, 12, 12); --channels, --size: (1, 12, 12)"), (["--crop", "0.5"], "--crop 0.5"),
    (["--data", "npz:nowhere.npz"], "nowhere.npz"), (["--data", "latents:nowhere.npz"], "nowhere.npz"),
    (["--sample", "nowhere.pt"], "nowhere.pt"), (["--batch", "3", "--gpus", "2"], "multiple of 2"),
    (["--batch", "4", "--batch_ar", "3", "--gpus", "2"], "--batch_ar 3: must be a multiple of 2"), (["--batch_ar", "-1"], "--batch_ar -1"),
    (["--stage", "ar"], "runs/flextok/demo/tokenizer.pt is missing; `python flextok.py --preset demo --name demo --stage tokenizer` makes it"),
    (["--num_steps", "0"], "--num_steps 0"),
    (["--stage", "ar", "--repa", "0", "--tokenizer", "no.pt"], "no.pt"),
    (["--std", "0"], "--std 0"), (["--std", "nan"], "--std nan"), (["--cfg_scale", "inf"], "--cfg_scale inf"),
    (["--cfg_scale_ar", "inf"], "--cfg_scale_ar inf"), (["--cfg_scale", "nan"], "--cfg_scale nan"), (["--crop", "inf"], "--crop inf"),
    (["--temperature", "inf"], "--temperature inf"), (["--lr_ar", "nan"], "--lr_ar nan"), (["--shift", "-1"], "--shift -1"),
    (["--levels", "\u00b2"], "--levels"), (["--levels", "8,\u0665"], "--levels"), (["--levels", "90000,90000"], "--levels 90000,90000"),
    (["--keep", "\u0663"], "--keep"), (["--classes", "30"], "labels are 0 to 9"),
    (["--classes", "3,10"], "labels are 0 to 9"), (["--tokenizer", "x.pt"], "--tokenizer: goes with --stage ar"),
    (["--text", "x.npy"], "--text: goes with"), (["--text", "x.npy", "--condition", "text"], "--text x.npy"),
    (["--prompt", "a red star"], "--prompt: for a GPT that learns"), (["--condition", "text", "--classes", "3"], "--classes"),
    (["--condition", "text", "--prompt", "two red circles"], "unknown words in 'two red circles'; known are: a "),
    (["--condition", "text", "--prompt", "a " * 60], "has 60 words"),
])
def test_bad_input_is_one_line_and_exit_2(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "judge", lambda data, role: pytest.fail("a judge was trained before the mistake was named"))
    assert words in refused(run, ["--steps", "2", *argv], capsys) and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The runs folder of two tiny finished runs, demo (classes) and text."""
    where = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        run(*TINY)
        run(*TINY, "--condition", "text", "--name", "text", "--objects", "2")
    return where / "runs" / "flextok"


def images_file(path, count=40, **arrays):
    """A pack of `count` pictures of 8 pixels, of two classes; arrays replace or add."""
    pictures = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    np.savez(path, **{"images": pictures, "labels": np.arange(count) % 2, **arrays})


def latents_file(path, **arrays):
    """A pack of 20 latents of two classes, (4, 8, 8) each; arrays replace or add."""
    g, shape = np.random.default_rng(0), (20, 4, 8, 8)
    pack = {name: g.normal(size=shape).astype(np.float16) for name in ("latents", "logvar", "latents_flip", "logvar_flip")}
    np.savez(path, **{"labels": np.arange(20) % 2, "scale": np.float32(0.5), **pack, **arrays})


def test_stage_ar_may_have_a_batch_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = []
    plain = flextok.draw_index
    monkeypatch.setattr(flextok, "draw_index", lambda *args: sizes.append(len(plain(*args)[0])) or plain(*args))
    run(*TINY, "--steps", "1", "--batch", "4", "--batch_ar", "6")
    said = re.findall(r"batch \d+", capsys.readouterr().out)
    assert said == ["batch 4", "batch 6"] and set(sizes) == {4, 6}


def test_what_the_data_lacks_is_said_before_training(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.Run, "steps", lambda run, start: pytest.fail("trained before the mistake was named"))
    images_file("few.npz", 9)
    images_file("two.npz")
    latents_file("clips.npz", latents=np.zeros((20, 4, 8, 8, 8), np.float16), logvar=np.zeros((20, 4, 8, 8, 8), np.float16),
                 latents_flip=np.zeros((20, 4, 8, 8, 8), np.float16), logvar_flip=np.zeros((20, 4, 8, 8, 8), np.float16))
    latents_file("z.npz")
    latents_file("both.npz", images=np.zeros((20, 16, 16, 3), np.uint8))
    save_teacher("t.pt", Features(0, 4))
    np.save("states.npy", np.zeros((5, 3, 5), np.float16))
    np.save("words.npy", np.zeros((37, 3, 5), int))
    demo = str(trained / "demo/tokenizer.pt")
    for words, said in ((["--data", "npz:few.npz"], "few.npz"),
                        (["--data", "npz:two.npz", "--classes", "2"], "labels are 0 to 1"),
                        (["--data", "npz:two.npz", "--condition", "text"], "npz:two.npz has no captions"),
                        (["--data", "npz:two.npz", "--condition", "text", "--text", "states.npy"], "holds 5 states; 37 are wanted"),
                        (["--data", "npz:two.npz", "--condition", "text", "--text", "words.npy"], "must hold one array of floats (M, L, S)"),
                        (["--data", "npz:two.npz", "--condition", "text", "--text", "two.npz"], "--text two.npz"),
                        (["--data", "latents:clips.npz", "--channels", "4", "--repa", "0"], "latents (4, 8, 8, 8); --channels, --size: (4, 8, 8)"),
                        (["--data", "latents:z.npz", "--channels", "16", "--repa", "0"], "latents (4, 8, 8); --channels, --size: (16, 8, 8) (the paper's VAE has 16 channels, Stable Diffusion's 4)"),
                        (["--data", "latents:z.npz", "--channels", "4", "--teacher", "t.pt"], "latents:z.npz: REPA's teacher sees images, not latents; add images"),
                        (["--data", "latents:both.npz", "--channels", "4"], "give --teacher FILE, or --repa 0"),
                        (["--stage", "ar", "--tokenizer", demo, "--levels", "5,8"], "--levels 5,8: "),
                        (["--stage", "ar", "--tokenizer", demo, "--max_time", "1"], "--max_time 1.0: "),
                        (["--stage", "ar", "--tokenizer", "two.npz"], "not a checkpoint")):
        assert said in refused(run, [*TINY, *words], capsys), words
    assert not (tmp_path / "runs/flextok").exists()


def test_a_folder_of_nine_pictures_has_no_test_split(tmp_path, monkeypatch, capsys):
    Image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    Path("pictures/red").mkdir(parents=True)
    for i in range(9):
        Image.new("RGB", (8, 8), (28 * i, 0, 0)).save(f"pictures/red/{i}.png")
    assert "split test: 0 images of 9" in refused(run, [*TINY, "--data", "folder:pictures"], capsys)
    assert not (tmp_path / "runs/flextok").exists()


def test_steps_given_count_for_both_stages():
    def steps(*words):
        cfg = common.cli(flextok.Config, flextok.PRESETS, flextok.__doc__, [*words])
        return cfg.steps_tokenizer, cfg.steps_ar
    assert steps() == (5200, 700) and steps("--steps", "4500") == (4500, 4500) and steps("--steps", "7", "--steps_ar", "3") == (7, 3)


def test_a_tokenizer_that_trains_on_starts_stage_ar_anew(tmp_path, monkeypatch, capsys):
    """Whatever the order of --resume, ar.pt holds the tokenizer whose tokens its GPT has learnt."""
    monkeypatch.chdir(tmp_path)
    run(*TINY, "--repa", "0", "--name", "on")
    run("--resume", "--name", "on", "--steps", "4")
    assert "starting anew" in capsys.readouterr().out
    folder = tmp_path / "runs/flextok/on"
    tokenizer, ar = (torch.load(folder / f"{stage}.pt", weights_only=True) for stage in ("tokenizer", "ar"))
    assert tokenizer["step"] == ar["step"] == 4
    assert all(torch.equal(value, tokenizer["state"]["ema"][name]) for name, value in ar["state"]["tokenizer"].items())
    before = (folder / "ar.pt").read_bytes()
    run("--resume", "--name", "on")
    assert (folder / "ar.pt").read_bytes() == before


def test_samples_carry_class_names_and_go_where_out_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images_file("two.npz", class_names=["oak", "elm"])
    run(*TINY, "--data", "npz:two.npz", "--repa", "0", "--name", "trees")
    rows, columns_png = [], common.columns_png
    monkeypatch.setattr(common, "columns_png", lambda path, columns, heads, names, side: rows.append((path, names)))
    checkpoint = "runs/flextok/trees/ar.pt"
    assert torch.load("runs/flextok/trees/tokenizer.pt", weights_only=True)["classes"] == ["oak", "elm"]
    run("--sample", checkpoint, "--classes", "1,0", "--count", "3")
    assert rows == [(Path("runs/flextok/trees/samples/generation.png"), ["elm", "oak", "elm"])]
    monkeypatch.setattr(common, "columns_png", columns_png)
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    run("--sample", checkpoint, "--out", "elsewhere")
    assert Path("elsewhere/generation.png").exists()
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}


def step_by_hand(model, ema, opt, value, rate):
    """One step of AdamW at a rate, gradients cut to a length of .05, averages of decay .9."""
    opt.zero_grad()
    value.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    length = math.sqrt(sum(g.square().sum().item() for g in grads))
    assert length > 0.05
    for g in grads:
        g.mul_(0.05 / (length + 1e-6))
    for group in opt.param_groups:
        group["lr"] = rate
    opt.step()
    with torch.no_grad():
        for average, weight in zip(ema.parameters(), model.parameters()):
            average.copy_(0.9 * average + 0.1 * weight)


def rate_by_hand(step, peak):
    """Six steps, half of them warming up."""
    return peak * (0.01 + 0.99 * (step / 3 if step < 3 else 0.5 + 0.5 * math.cos(math.pi * (step - 3) / 3)))


stream = common.make_generator
BY_VALUE = ["--steps", "6", "--repa", "0", "--flip", "--null", "0.5", "--warmup", "0.5", "--ema", "0.9", "--crop", "1.5",
            "--label_dropout", "0.5", "--shift", "3", "--whole", "0.25", "--muon", "0"]


@pytest.fixture
def double(tmp_path, monkeypatch):
    """A folder of its own, float64 throughout, and gradients cut to .05 where the paper's 1 would leave them as they are."""
    monkeypatch.chdir(tmp_path)
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda params, length: clip(params, 0.05 * length))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def saved_stages(name="demo"):
    return {stage: torch.load(f"runs/flextok/{name}/{stage}.pt", weights_only=True) for stage in ("tokenizer", "ar")}


def drawn_by_hand(train, step, stage):
    """Index, uniform draws, and mirrored images of a step of four."""
    g = stream(0, step, f"{stage} data")
    index, u = torch.randint(len(train), (4,), generator=g), torch.rand(4, 5, generator=g)
    x = torch.from_numpy(train.images[index.numpy()]).float() / 127.5 - 1
    return index, u, torch.stack([image.flip(2) if flip < 0.5 else image for image, flip in zip(x, u[:, 0])]).double()


def crop_by_hand(image, u_row, u_column):
    """8 pixels of 12, at one of five places each way."""
    large = F.interpolate(image[None].float(), (12, 12), mode="bilinear")[0].double()
    return large[:, int(5 * u_row):int(5 * u_row) + 8, int(5 * u_column):int(5 * u_column) + 8]


def tokenizer_by_hand(cfg, train):
    """Stage 1 in six steps: the tokenizer and its averages."""
    torch.manual_seed(stream(0, 0, "tokenizer weights").initial_seed())
    model = flextok.Tokenizer(cfg)
    ema, opt = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(6):
        _, u, x = drawn_by_hand(train, step, "tokenizer")
        noise = torch.randn(4, 3, 8, 8, generator=stream(0, step, "tokenizer noise"))
        t = 1 - u[:, 1] - 0.25 * (torch.cos(math.pi / 2 * u[:, 1]) ** 2 - 1 + u[:, 1])
        t = 3 * t / (1 + 2 * t)
        k = torch.tensor([(1, 2, 4, 4)[int(4 * a)] for a in u[:, 2]])       # a quarter keeps all, the rest by F15
        point = torch.stack([t[b] * noise[b] + (1 - t[b]) * x[b] for b in range(4)])
        v = model.decoder(point, t, model.fsq(model.encoder(x))[0], k, u[:, 3] < 0.5)[0]
        step_by_hand(model, ema, opt, (v - (noise - x)).square().mean(), rate_by_hand(step, 2e-3))
    return model, ema


def gpt_by_hand(cfg, train, ids_of):
    """Stage 2 in six steps on the ids that ids_of(step) gives: the GPT and its averages."""
    torch.manual_seed(stream(0, 0, "ar weights").initial_seed())
    model = flextok.GPT(cfg, [*map(str, range(10))], torch.tensor(-1))
    ema, opt = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(6):
        index, u, _ = drawn_by_hand(train, step, "ar")
        labels = torch.where(u[:, 3] < 0.5, -1, torch.from_numpy(train.labels[index.numpy()]))
        value = -model(ids_of(step), labels).log_softmax(-1).gather(2, ids_of(step)[..., None]).mean()
        step_by_hand(model, ema, opt, value, rate_by_hand(step, 3e-3))
    return model, ema


def same_weights(saved, **modules):
    for part, module in modules.items():
        for name, weight in module.state_dict().items():
            close(saved["state"][part][name], weight, 1e-9)


def awake_checkpoint(path):
    """The checkpoint of a tokenizer, but with averaged weights that give images different ids, which six steps do not."""
    saved = torch.load(path, weights_only=True)
    model = awake(flextok.Tokenizer(flextok.Config(**saved["config"])))
    saved["state"]["ema"] = model.state_dict()
    torch.save(saved, "awake.pt")
    return model


def test_both_stages_by_value(double):
    """Two hand-written loops end in the weights of the run: F20 to F22, then F29, with every draw in its own place, a k
    and a loss of tokens for every image alone, averages, clipped gradients, and a rate at its first, turning and last step."""
    run(*TINY, *BY_VALUE)
    saved = saved_stages()
    cfg, train = flextok.Config(**saved["tokenizer"]["config"]), data.open_data("shapes", "train", 8, count=200)
    model, tokenizer = tokenizer_by_hand(cfg, train)
    same_weights(saved["tokenizer"], model=model, ema=tokenizer)
    same_weights(saved["ar"], tokenizer=tokenizer)
    tokenizer = awake_checkpoint("runs/flextok/demo/tokenizer.pt")
    run(*TINY, *BY_VALUE, "--stage", "ar", "--tokenizer", "awake.pt", "--name", "awake")

    def ids_of(step):
        _, u, x = drawn_by_hand(train, step, "ar")
        return tokenizer.fsq(tokenizer.encoder(torch.stack([crop_by_hand(*each) for each in zip(x, u[:, 1], u[:, 2])])))[1]

    assert len(torch.cat([ids_of(0), ids_of(1)]).unique(dim=0)) == 8
    gpt, average = gpt_by_hand(cfg, train, ids_of)
    same_weights(torch.load("runs/flextok/awake/ar.pt", weights_only=True), model=gpt, ema=average, tokenizer=tokenizer)


def test_stage_ar_reads_the_tokens_of_crops_that_were_encoded_once(double, monkeypatch):
    """Ten images of two crops each: 20 rows, where six steps draw 24 images. Of each image one crop is drawn afresh."""
    train = data.open_data("shapes", "train", 8, count=10)
    monkeypatch.setattr(flextok, "open_split", lambda cfg, split, count=0: data.open_data("shapes", split, 8, count=10))
    run(*TINY, *BY_VALUE, "--stage", "tokenizer", "--steps", "2")
    tokenizer = awake_checkpoint("runs/flextok/demo/tokenizer.pt")
    words = [*TINY, *BY_VALUE, "--crops", "2", "--stage", "ar", "--name", "awake"]
    run(*words, "--tokenizer", "awake.pt")
    folder = Path("runs/flextok/awake")
    saved = torch.load(folder / "ar.pt", weights_only=True)
    u, images = torch.rand(3, 20, generator=stream(0, 0, "crops")), torch.from_numpy(train.images).float() / 127.5 - 1
    crops = []
    for row in range(20):
        image = images[row // 2]
        crops.append(crop_by_hand(image.flip(2) if u[0, row] < 0.5 else image, u[1, row], u[2, row]))
    ids = tokenizer.fsq(tokenizer.encoder(torch.stack(crops)))[1]
    kept = np.load(folder / "tokens.npy")
    assert kept.dtype == np.uint16 and kept.tolist() == ids.tolist() and len(ids.unique(dim=0)) > 15

    def ids_of(step):
        index, u, _ = drawn_by_hand(train, step, "ar")
        return ids[2 * index + (2 * u[:, 0]).long()]

    gpt, average = gpt_by_hand(flextok.Config(**saved["config"]), train, ids_of)
    same_weights(saved, model=gpt, ema=average, tokenizer=tokenizer)
    made = []
    monkeypatch.setattr(flextok, "encode_crops", lambda *args, encode=flextok.encode_crops: made.append(1) or encode(*args))
    run("--resume", "--name", "awake")
    assert not made
    for change, value in (("seed", 1), ("flip", False), ("crop", 1.2), ("crops", 3)):       # rows of others are not taken
        cfg = dataclasses.replace(flextok.Config(**saved["config"]), **{change: value})
        first = type("Run", (), dict(total=99, folder=folder))                               # in which only this differs
        assert np.array_equal(flextok.store_tokens(tokenizer, train, flextok.Config(**saved["config"]), first), kept)
        places = [type("Run", (), dict(total=99, folder=folder)), type("Run", (), dict(total=99, folder=Path(".")))]
        old, new = (flextok.store_tokens(tokenizer, train, cfg, place) for place in places)
        assert np.array_equal(old, new) and not np.array_equal(old, kept)
        Path("tokens.npy").unlink()
    other = awake(flextok.Tokenizer(cfg), 1)
    assert not np.array_equal(flextok.store_tokens(other, train, cfg, places[0]), new)
    fewer = data.open_data("shapes", "train", 8, count=9)
    assert len(flextok.store_tokens(other, fewer, cfg, places[0])) == 27


def test_stored_rows_of_latents_are_draws_of_their_posterior(tmp_path):
    """F1: every row another draw, of the image or its mirror; the file of a large codebook has wider numbers."""
    g = np.random.default_rng(0)
    parts = {name: g.normal(size=(5, 3, 6, 6)).astype(np.float32) for name in ("images", "logvar", "mean_flip", "logvar_flip")}
    dataset = data.Data(labels=np.arange(5), latent=True, scale=0.7, **parts)
    cfg, run = config(crops=110, batch=110, levels="60,40,40"), type("Run", (), dict(total=5, folder=tmp_path))
    model = awake(flextok.Tokenizer(cfg)).float()
    kept = flextok.store_tokens(model, dataset, cfg, run)
    assert kept.dtype == np.int32 and len(kept) == 550
    for start in range(0, 550, 32):
        rows = np.arange(start, min(start + 32, 550))
        if start in (0, 512):                                           # a generator for each block of the file
            cpu_generator = stream(0, start, "crops")
        noise, u = torch.randn(len(rows), 3, 6, 6, generator=cpu_generator), torch.rand(3, len(rows), generator=cpu_generator)
        flip = (u[0] < 0.5)[:, None, None, None].numpy()
        mean, logvar = (np.where(flip, parts[a][rows // 110], parts[b][rows // 110]) for a, b in (("mean_flip", "images"), ("logvar_flip", "logvar")))
        z = torch.from_numpy(mean) + torch.exp(torch.from_numpy(logvar) / 2) * noise
        assert torch.equal(torch.from_numpy(kept[rows]).long(), model.tokenize(0.7 * z))
    run.total = 4
    assert flextok.store_tokens(model, dataset, cfg, run) is None       # fewer images than rows: they are encoded as they come
    assert flextok.store_tokens(model, dataset, dataclasses.replace(cfg, crops=0), run) is None


def test_parts_of_a_batch_learn_what_the_whole_does(double):
    """--accumulate: the same weights after six steps of both stages, to rounding."""
    run(*TINY, *BY_VALUE, "--repa", "1", "--name", "whole")
    run(*TINY, *BY_VALUE, "--repa", "1", "--name", "parts", "--accumulate", "4")
    whole, parts = saved_stages("whole"), saved_stages("parts")
    for stage in whole:
        for part in ("model", "ema"):
            for name, weight in whole[stage]["state"][part].items():
                close(parts[stage]["state"][part][name], weight, 1e-12)
        lines = [Path(f"runs/flextok/{name}/log-{stage}.jsonl").read_text().splitlines() for name in ("whole", "parts")]
        for a, b in zip(*lines):
            assert abs(json.loads(a)["loss"] - json.loads(b)["loss"]) < 1e-12


def test_rates_at_the_first_the_turning_and_the_last_step():
    """Each stage has its own peak and its own number of steps: up from 1 % of the peak, then a cosine down to 1 %."""
    cfg = dataclasses.replace(flextok.Config(), steps_tokenizer=100, steps_ar=50, warmup=0.2, lr=2.0, lr_ar=3.0)
    for stage, steps, peak in (("tokenizer", 100, 2.0), ("ar", 50, 3.0)):
        rates = [flextok.learning_rate(cfg, step, stage) for step in range(steps + 1)]
        turn = steps // 5
        assert abs(rates[0] - 0.01 * peak) < 1e-12 and rates[turn] == max(rates) == peak and abs(rates[-1] - 0.01 * peak) < 1e-12
        assert abs(rates[turn // 2] - 0.505 * peak) < 1e-12 and abs(rates[(steps + turn) // 2] - 0.505 * peak) < 1e-12
        assert rates[turn - 1] < rates[turn] > rates[turn + 1]
    assert flextok.learning_rate(cfg, 0) == flextok.learning_rate(cfg, 0, "tokenizer")
    assert flextok.learning_rate(dataclasses.replace(cfg, warmup=0.0), 0) == 2.0


def ranks_correlation(a, b):
    return np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1]


def test_no_two_draws_share_a_number(monkeypatch):
    """Two draws from one place of one generator would go together over many steps; and no stream is begun twice."""
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 6, 6), np.uint8)
    dataset, seen, begun = data.Data(images, np.arange(50)), [], []
    monkeypatch.setattr(common, "make_generator", lambda *args, make=common.make_generator: begun.append(args[:3]) or make(*args))
    cfg = config(batch=16, null=0.5, label_dropout=0.5, nested="uniform", repa=0.0, crop=1.5)
    monkeypatch.setattr(flextok, "encode_crops", lambda tokenizer, dataset, cfg, index, u, noise: torch.stack(u, 1))
    for step in range(40):
        x, draws = flextok.draw(dataset, cfg, step, torch.device("cpu"))
        plain = torch.from_numpy(images).float() / 127.5 - 1
        flips = [min(float((plain - a.flip(-1)).abs().amax((1, 2, 3)).min()), 1.0) > 1e-6 for a in x]
        place = [min((a - plain).abs().amax((1, 2, 3)).argmin().item() if not f else (a.flip(-1) - plain).abs().amax((1, 2, 3)).argmin().item(), 49)
                 for a, f in zip(x, flips)]
        (u, cond), ar = flextok.draw_ar(None, dataset, None, dataset.labels, cfg, step, torch.device("cpu"))
        seen.append(torch.stack([torch.tensor(place), torch.tensor(flips), draws["time"], draws["num_tokens"], draws["no_tokens"],
                                 draws["noise"].mean((1, 2, 3)), cond, *u.unbind(1), ar["drop"]]).double())
    columns = torch.cat(seen, 1).numpy()
    found = [(i, j) for i, j in itertools.combinations(range(len(columns)), 2) if abs(ranks_correlation(columns[i], columns[j])) > 0.16]
    assert not found and len(begun) == len(set(begun)) == 3 * 40


@pytest.mark.parametrize("latent", [False, True])
def test_the_shares_of_all_ranks_are_the_whole_batch(latent, monkeypatch):
    """Both stages' images or latents, conditions and draws, of a batch that spans two generators of the noise."""
    g, device = np.random.default_rng(0), torch.device("cpu")
    parts = {name: g.normal(size=(50, 3, 6, 6)).astype(np.float32) for name in ("images", "logvar", "mean_flip", "logvar_flip")}
    parts = dict(parts, latent=True) if latent else {"images": g.integers(0, 256, (50, 3, 6, 6), np.uint8)}
    dataset, cfg, model = data.Data(labels=np.arange(50), **parts), config(batch=72, repa=0.0), tokenizer().float()

    def step():
        stored = np.arange(50 * cfg.crops)[:, None]
        return [flextok.draw(dataset, cfg, 3, device), *(flextok.draw_ar(model, dataset, rows, dataset.labels, cfg, 3, device) for rows in (stored, None))]

    whole = torch.utils._pytree.tree_leaves(step())
    monkeypatch.setattr(common, "world", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        shares.append(torch.utils._pytree.tree_leaves(step()))
    assert len(whole) == 12 and all(torch.equal(torch.cat(pieces), one) for one, *pieces in zip(whole, *shares))


def test_a_lost_condition_is_the_one_that_says_nothing():
    """A dropped class is -1, a dropped text the empty one, each for its own image."""
    for kind in KINDS:
        model, ids, cond = gpt(kind)
        cond = cond[[0, 0, 0]]
        dropped = cond.clone()
        dropped[1] = model.empty
        values = [flextok.loss_ar(model, (ids, c), {"drop": torch.tensor(drop)})[0]
                  for c, drop in ((cond, [False, True, False]), (dropped, [False] * 3), (cond, [False] * 3))]
        close(values[0], values[1], 1e-14)
        assert abs(values[0] - values[2]) > 1e-6


def test_reports_samples_and_checkpoints_hold_averaged_weights(trained, tmp_path, monkeypatch, capsys):
    """Of the tokenizer of stage 1 and of its own GPT; what is measured are test images, by the one-step estimate."""
    monkeypatch.chdir(tmp_path)
    saved = {stage: torch.load(trained / f"demo/{stage}.pt", weights_only=True) for stage in ("tokenizer", "ar")}
    for stage in saved:
        assert list(saved[stage]["state"]) == ["model", "ema", "opt"] + ["tokenizer"] * (stage == "ar")
        assert any(not torch.equal(a, b) for a, b in zip(saved[stage]["state"]["model"].values(), saved[stage]["state"]["ema"].values()))
    cfg = flextok.Config(**saved["ar"]["config"])
    for path, part in (("tokenizer", "ema"), ("ar", "tokenizer")):
        ours = flextok.load_tokenizer(cfg, trained / f"demo/{path}.pt").state_dict()
        assert all(torch.equal(value, saved["tokenizer"]["state"]["ema"][name]) for name, value in ours.items())
        assert all(torch.equal(value, saved[path]["state"][part][name]) for name, value in ours.items())
    ours = flextok.load_gpt(cfg, trained / "demo/ar.pt")
    assert all(torch.equal(value, saved["ar"]["state"]["ema"][name]) for name, value in ours.state_dict().items())
    frozen = [*ours.parameters(), *flextok.load_tokenizer(cfg, trained / "demo/ar.pt").parameters()]
    assert not any(p.requires_grad for p in frozen)
    model, cfg = awake(flextok.Tokenizer(cfg)).float(), dataclasses.replace(cfg, cfg_scale=3.0)
    x = torch.from_numpy(data.open_data("shapes", "test", 8, count=cfg.count).images).float() / 127.5 - 1
    noise = torch.randn(100, 3, 8, 8, generator=stream(0, 0, "sample"))[:len(x)]
    values, no = model.fsq(model.encoder(x))[0], torch.zeros(len(x), dtype=torch.bool)
    lengths, errors = flextok.show_tokens(model, cfg, tmp_path)
    assert lengths == [1, 2, 4] and len(x) == cfg.count == 6
    with torch.no_grad():
        for k, error in zip(lengths, errors):
            once = noise - model.decoder(noise, torch.ones(len(x)), values, torch.full((len(x),), k), no)[0]
            close(torch.tensor(error), (once - x).square().mean(), 1e-5)
    assert errors[0] != errors[1] != errors[2]
    _, errors = flextok.show_tokens(flextok.load_tokenizer(cfg, trained / "demo/tokenizer.pt"), cfg, tmp_path)
    run("--sample", str(trained / "demo/tokenizer.pt"), "--out", "here")
    assert ", ".join(f"{error:.4f} (k={k})" for k, error in zip(lengths, errors)) in capsys.readouterr().out


def starts(monkeypatch, *words):
    """What each stage of a run begins with: [state of its model], before the first step."""
    found = []
    restore = common.Run.restore
    monkeypatch.setattr(common.Run, "restore", lambda self, **objects: found.append(
        {name: value.clone() for name, value in objects["model"].state_dict().items()}) or restore(self, **objects))
    run(*words)
    monkeypatch.setattr(common.Run, "restore", restore)
    return found


def test_init_begins_with_averaged_weights_of_other_data(trained, tmp_path, monkeypatch, capsys):
    """Both stages, from either checkpoint; tables of classes and words are new where they do not fit."""
    monkeypatch.chdir(tmp_path)
    images_file("two.npz")
    other = [*TINY, "--data", "npz:two.npz", "--seed", "3"]
    plain = starts(monkeypatch, *other)
    ar, text = (torch.load(trained / f"{name}/ar.pt", weights_only=True)["state"] for name in ("demo", "text"))
    averaged = {key: value for key, value in ar["ema"].items() if key != "condition.table.weight"}
    for path, gpt in (("ar.pt", averaged), ("tokenizer.pt", {})):
        Path("init.pt").write_bytes((trained / "demo" / path).read_bytes())
        found = starts(monkeypatch, *other, "--init", "init.pt")
        assert all(torch.equal(value, ar["tokenizer"][name]) for name, value in found[0].items())
        assert all(torch.equal(value, gpt.get(name, plain[1][name])) for name, value in found[1].items())
    found, = starts(monkeypatch, *other, "--stage", "ar", "--tokenizer", str(trained / "demo/tokenizer.pt"), "--init", str(trained / "demo/ar.pt"))
    assert torch.equal(found["head.weight"], ar["ema"]["head.weight"]) and found["condition.table.weight"].shape == (2, 8)
    _, found = starts(monkeypatch, *TINY, "--condition", "text", "--objects", "1", "--init", str(trained / "text/ar.pt"))
    assert torch.equal(found["text.0.weight"], text["ema"]["text.0.weight"]) and len(found["empty"]) < len(text["ema"]["empty"])
    made = {path for path in Path("runs/flextok").iterdir()}
    for words, said in ((["--init", "none.pt"], "none.pt"), (["--init", str(trained / "demo/tokenizer.pt"), "--repa", "0"], "align.1.weight is"),
                        (["--init", str(trained / "demo/ar.pt"), "--gpt", "2"], "start is [8] there and [16] here"),
                        (["--stage", "ar", "--tokenizer", str(trained / "demo/tokenizer.pt"), "--init", str(trained / "demo/tokenizer.pt")], "holds no GPT")):
        assert said in refused(run, [*other, *words, "--name", "new"], capsys), words
    assert made == {path for path in Path("runs/flextok").iterdir()}
    Path("init.pt").unlink()
    run("--resume", "--name", "demo-2")                                 # the run's own weights win, and no file is wanted


def test_init_of_states_keeps_the_new_empty_one(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*TINY, "--stage", "ar", "--tokenizer", str(trained / "demo/tokenizer.pt"), "--condition", "text", "--text", "states.npy"]
    for name, init, value in (("a", [], 1), ("b", ["--init", "runs/flextok/a/ar.pt"], 2)):
        np.save("states.npy", np.full((201, 3, 5), value, np.float16))
        model, = starts(monkeypatch, *words, "--name", name, *init)
        assert (model["empty"] == value).all()
    first = torch.load("runs/flextok/a/ar.pt", weights_only=True)["state"]["ema"]
    assert torch.equal(model["text.0.weight"], first["text.0.weight"])


@pytest.fixture(scope="module")
def lively(trained):
    """Checkpoints of both stages like the trained ones, but with weights by which images, tokens and labels matter."""
    saved = torch.load(trained / "demo/ar.pt", weights_only=True)
    cfg = flextok.Config(**saved["config"])
    gpt = flextok.GPT(cfg, saved["classes"], torch.tensor(-1))
    saved["state"] |= {"tokenizer": awake(flextok.Tokenizer(cfg)).float().state_dict(), "ema": awake(gpt).float().state_dict()}
    torch.save(saved, trained / "lively.pt")
    torch.save(saved | {"state": {"ema": saved["state"]["tokenizer"]}}, trained / "lively-tokenizer.pt")
    return trained / "lively.pt"


def exported(*words):
    """The pictures that --export writes, uint8 (M, H, W, 3)."""
    run(*words, "--export", "out.npz")
    with np.load("out.npz") as found:
        assert found.files == ["arr_0"]
        return found["arr_0"]


def test_export_of_samples_by_value(lively, tmp_path, monkeypatch):
    """F28, F33: sample i has the draws of its block and the label of its turn, whatever is drawn beside it; so has its prefix."""
    monkeypatch.chdir(tmp_path)
    words = ["--sample", str(lively), "--classes", "3,5,7"]
    pictures = exported(*words, "--count", "130")
    cfg = flextok.Config(**torch.load(lively, weights_only=True)["config"])
    tokenizer, gpt = flextok.load_tokenizer(cfg, lively), flextok.load_gpt(cfg, lively)
    for first, count in ((0, 100), (100, 30)):
        u = torch.rand(100, 4, generator=stream(0, first, "tokens"))[:count]
        noise = torch.randn(100, 3, 8, 8, generator=stream(0, first, "sample"))[:count]
        labels = torch.tensor([(3, 5, 7)[i % 3] for i in range(first, first + count)])
        ids = plain_generate(gpt, labels, u, cfg)
        for k in (4, 2):
            if k == 2:
                shorter = exported(*words, "--count", "105", "--keep", "2")
            got = (pictures if k == 4 else shorter)[first:first + count]
            x = flextok.sample(tokenizer, noise, ids[:, :k], cfg)[:len(got)]
            close(torch.from_numpy(got).permute(0, 3, 1, 2).float(), (x * 127.5 + 127.5).round().clamp(0, 255), 1.0)
    run(*words, "--count", "3", "--export", "folder")
    assert sorted(path.name for path in Path("folder").iterdir()) == ["000000.png", "000001.png", "000002.png"]


def test_export_of_reconstructions_and_of_tokens(lively, tmp_path, monkeypatch, capsys):
    """A tokenizer's checkpoint: test images at --keep tokens; with --decode the rows of the file."""
    monkeypatch.chdir(tmp_path)
    lively = lively.with_name("lively-tokenizer.pt")
    words = ["--sample", str(lively)]
    cfg = flextok.Config(**torch.load(lively, weights_only=True)["config"])
    model, test = flextok.load_tokenizer(cfg, lively), data.open_data("shapes", "test", 8, count=120)
    pictures = exported(*words, "--count", "120", "--keep", "2")
    ids = model.tokenize(test.pixels(range(120)))
    noise = torch.cat([torch.randn(100, 3, 8, 8, generator=stream(0, first, "sample")) for first in (0, 100)])[:120]
    expected = (flextok.sample(model, noise, ids[:, :2], cfg) * 127.5 + 127.5).round().clamp(0, 255)
    close(torch.from_numpy(pictures).permute(0, 3, 1, 2).float(), expected, 1.0)
    np.savez("tokens.npz", ids=ids[:, :3].numpy(), levels=np.array([8, 5]))
    assert np.array_equal(exported(*words, "--decode", "tokens.npz", "--count", "120", "--keep", "2"), pictures)
    assert len(exported(*words, "--decode", "tokens.npz", "--count", "7")) == 7
    for more, said in ((["--export", "x.npz", "--encode", "y.npz"], "--encode: goes without"), (["--data", "latents:x.npz", "--export", "x.npz"], "--export: these are latents")):
        assert said in refused(run, [*words, *more], capsys)


def test_processes_share_what_a_checkpoint_is_asked_for(lively, tmp_path, monkeypatch):
    """--encode and --export of three processes are one's, block by block; one of them draws pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flextok.open_split, "__defaults__", (350,))
    cfg = flextok.Config(**torch.load(lively, weights_only=True)["config"])
    assert common.cli(flextok.Config, flextok.PRESETS, "", ["--sample", str(lively), "--gpus", "3"]).gpus == 3
    for field, path in (("encode", "tokens.npz"), ("export", "pictures.npz"), ("export", "pictures"), ("out", "here")):
        asked = {count: dataclasses.replace(cfg, sample=str(lively), count=230, **{field: f"{count}-{path}"}) for count in (1, 3)}
        flextok.use_checkpoint(asked[1])
        with monkeypatch.context() as patch:
            calls, tokenize, sample = [], flextok.Tokenizer.tokenize, flextok.sample
            patch.setattr(flextok.Tokenizer, "tokenize", lambda *args: calls.append(1) or tokenize(*args))
            patch.setattr(flextok, "sample", lambda *args: calls.append(1) or sample(*args))
            ranks(patch, 3, lambda: flextok.use_checkpoint(asked[3]))
        assert len(calls) == {"encode": 4, "export": 3, "out": 3}[field]        # each block once
        one, three = Path(f"1-{path}"), Path(f"3-{path}")
        files = [(one, three)] if one.is_file() else [(a, three / a.name) for a in sorted(one.iterdir())]
        assert files and all(a.read_bytes() == b.read_bytes() for a, b in files)


class Runs:
    """What a pickle that runs code looks like: reading it would leave a file."""

    def __reduce__(self):
        return (Path.touch, (Path("it-ran"),))


def test_files_that_would_run_code_are_refused(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(torch.load(trained / "demo/ar.pt", weights_only=True) | {"step": Runs()}, "bad.pt")
    objects = np.empty((201, 3, 5), object)
    objects[:] = Runs()
    np.save("bad.npy", objects, allow_pickle=True)
    np.savez("bad.npz", images=objects, labels=objects, ids=objects[0], levels=np.array([8, 5]))
    demo = str(trained / "demo/tokenizer.pt")
    for words, said in ((["--sample", "bad.pt"], "bad.pt"), (["--init", "bad.pt"], "bad.pt"), (["--stage", "ar", "--tokenizer", "bad.pt"], "bad.pt"),
                        (["--condition", "text", "--text", "bad.npy"], "bad.npy"), (["--data", "npz:bad.npz"], "bad.npz"),
                        (["--data", "latents:bad.npz", "--channels", "4"], "bad.npz"), (["--sample", demo, "--decode", "bad.npz"], "bad.npz")):
        assert said in refused(run, words if "--sample" in words else [*TINY, *words], capsys), words
    assert not Path("it-ran").exists() and not Path("runs/flextok").exists()
    torch.load("bad.pt", weights_only=False)                            # read with trust it does run
    assert Path("it-ran").exists()


@pytest.mark.parametrize("preset", flextok.PRESETS)
def test_every_preset_runs_from_its_first_step_to_its_last_picture(preset, trained, tmp_path, monkeypatch):
    """Narrow, short and on small files, but with the stages, conditions, teachers and laws that the preset asks for."""
    monkeypatch.chdir(tmp_path)
    asked = flextok.PRESETS[preset]
    words = ["--preset", preset, *TINY[:-2], "--size", "8", "--name", "here", "--log", "1", "--save", "1"]
    if asked.get("data") == "cifar10":
        images_file("small.npz")
        words += ["--data", "npz:small.npz"]
    elif asked.get("data"):
        latents_file("small.npz", images=np.random.default_rng(1).integers(0, 256, (20, 8, 8, 3), np.uint8))
        words += ["--data", "latents:small.npz"]
    words += ["--channels", "3" if asked.get("channels") else "4"]
    if asked.get("teacher"):
        save_teacher("dinov2.pt2", Features(0))
    if asked.get("text"):
        np.save("t5-xl.npy", np.random.default_rng(0).normal(size=(21, 3, 5)).astype(np.float16))
    if asked.get("stage") == "ar":
        run(*words, "--stage", "tokenizer", "--text", "", "--condition", "class")
    run(*words)
    made = {path.stem for path in (tmp_path / "runs/flextok/here").glob("*.pt")} - {"tokenizer-2", "ar-2"}
    assert made == ({"tokenizer"} if asked.get("stage") == "tokenizer" else {"tokenizer", "ar"})


def test_weights_that_are_not_finite_are_called_so(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved = torch.load(trained / "demo/ar.pt", weights_only=True)
    for part, name in (("tokenizer", "encoder.registers"), ("ema", "head.weight")):
        saved["state"][part][name][0, 0] = math.nan
        torch.save(saved, "bad.pt")
        assert f"bad.pt: {part} holds weights that are not finite" in refused(run, ["--sample", "bad.pt"], capsys)
        saved["state"][part][name][0, 0] = 0.0


def test_a_damaged_checkpoint_is_one_line(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for file, damage in (("demo/ar.pt", lambda saved: saved["state"].pop("ema")),
                         ("demo/ar.pt", lambda saved: saved["state"].update(ema=5)),
                         ("demo/ar.pt", lambda saved: saved["classes"].pop()),
                         ("demo/ar.pt", lambda saved: saved["state"].update(tokenizer=[])),
                         ("text/ar.pt", lambda saved: saved["classes"].pop()),
                         ("demo/tokenizer.pt", lambda saved: saved.update(state={})),
                         ("demo/tokenizer.pt", lambda saved: saved["state"]["ema"].pop("encoder.head.bias"))):
        saved = torch.load(trained / file, weights_only=True)
        damage(saved)
        torch.save(saved, "bad.pt")
        assert "bad.pt: " in refused(run, ["--sample", "bad.pt"], capsys)


def test_a_run_leaves_its_folder(trained):
    names = {path.name for path in (trained / "demo").iterdir()}
    assert {"config.json", "flextok.py", "tokenizer.pt", "ar.pt", "prefixes.png", "vocabulary.png", "generation.png",
            "loss-tokenizer.svg", "log-ar.jsonl"} <= names


def test_generation_stands_beside_the_nearest_training_images(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, shown = trained / "demo/ar.pt", []
    cfg = flextok.Config(**torch.load(path, weights_only=True)["config"])
    tokenizer, gpt = flextok.load_tokenizer(cfg, path), flextok.load_gpt(cfg, path)
    monkeypatch.setattr(common, "columns_png", lambda path, columns, heads, rows, side: shown.append((columns, heads)))
    for sample in ("", "a checkpoint"):
        flextok.show_samples(tokenizer, gpt, dataclasses.replace(cfg, sample=sample), tmp_path)
    (columns, heads), (alone, without) = shown
    assert heads == [*without, "train"] and all(torch.equal(a, b) for a, b in zip(columns, alone))
    train = flextok.open_split(cfg, "train").pixels(np.arange(20_000))
    near = torch.cdist(columns[-2].flatten(1), train.flatten(1)).argmin(1)
    assert torch.equal(columns[-1], train[near])


def test_tokens_go_out_and_come_back(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = str(trained / "demo" / "tokenizer.pt")
    before = (trained / "demo" / "tokenizer.pt").read_bytes()
    run("--sample", checkpoint, "--data", "shapes", "--encode", "tokens.npz")
    found = np.load("tokens.npz")
    assert found["ids"].shape == (200, 4) and found["ids"].max() < 40 and found["levels"].tolist() == [8, 5]
    run("--sample", checkpoint, "--decode", "tokens.npz", "--keep", "2", "--count", "5")
    assert (trained / "demo" / "samples" / "decoded.png").exists()
    assert (trained / "demo" / "tokenizer.pt").read_bytes() == before
    bad = {"no ids (M, k) of a codebook of levels 8,5": [dict(ids=found["ids"], levels=[8, 8]), dict(ids=[[40]], levels=[8, 5]),
                                                       dict(ids=[], levels=[8, 5]), dict(ids=[[-1]], levels=[8, 5])],
           "cannot be read": [dict(levels=[8, 5]), dict(ids=[["a"]], levels=[8, 5])]}
    for words, several in bad.items():
        for arrays in several:
            np.savez("bad.npz", **{key: np.array(value) for key, value in arrays.items()})
            assert words in refused(run, ["--sample", checkpoint, "--decode", "bad.npz"], capsys)
    np.savez("short.npz", ids=found["ids"][:3, :2], levels=found["levels"])
    cfg = flextok.Config(**torch.load(checkpoint, weights_only=True)["config"])
    cfg.decode = "short.npz"
    for keep, k in (("3", 2), ("all", 2), ("1", 1)):
        cfg.keep = keep
        assert flextok.read_tokens(cfg).tolist() == found["ids"][:3, :k].tolist()


@pytest.mark.parametrize("argv, words", [
    (["demo/ar.pt", "--classes", "10"], "0 to 9"), (["demo/ar.pt", "--prompt", "red"], "never saw words"),
    (["text/ar.pt", "--classes", "3"], "reads words, not classes"),
    (["demo/tokenizer.pt", "--prompt", "red"], "never saw words"), (["demo/ar.pt", "--head", "16"], "--head 16"),
    (["text/ar.pt", "--prompt", "two red circles"], "unknown words in 'two red circles'; known are: a "),
    (["text/ar.pt", "--prompt", "a " * 60], "has 60 words; at most"), (["demo/ar.pt", "--keep", "5"], "1 to 4")])
def test_sample_names_the_mistake(argv, words, trained, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--sample", str(trained / argv[0]), *argv[1:])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_generation_from_classes_and_from_words(trained):
    for argv in (["demo/ar.pt", "--classes", "6,9", "--keep", "2"], ["text/ar.pt"], ["text/ar.pt", "--prompt", "a red star"],
                 ["demo/tokenizer.pt"]):
        picture = trained / argv[0].split("/")[0] / "samples" / (
            "prefixes.png" if "tokenizer" in argv[0] else "generation.png")
        picture.unlink(missing_ok=True)
        run("--sample", str(trained / argv[0]), *argv[1:])
        assert picture.exists()


@pytest.mark.parametrize("argv", [
    ["--nested", "uniform", "--registers", "3", "--time", "uniform", "--flip", "--no-apg", "--bf16"],
    ["--time", "logit-normal", "--repa", "0", "--crop", "1.5", "--cfg_schedule", "linear", "--top_k", "3", "--objects", "4"],
    ["--cfg_schedule", "cosine", "--cfg_scale_ar", "1", "--top_p", "0.5", "--keep", "2", "--warmup", "0", "--max_time", "1"],
    ["--cfg_scale", "1", "--temperature", "0.5", "--stage", "tokenizer", "--null", "0", "--ema", "0"]])
def test_every_option_trains(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*TINY, *argv)
    assert (tmp_path / "runs/flextok/demo/prefixes.png").exists()


def test_stage_ar_on_another_runs_tokenizer_and_on_states(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    states = np.zeros((201, 3, 5), np.float16)
    states[:, 0] = np.random.default_rng(0).normal(size=(201, 5))
    np.save("states.npy", states)
    checkpoint = str(trained / "demo" / "tokenizer.pt")
    run(*TINY, "--stage", "ar", "--tokenizer", checkpoint, "--condition", "text", "--text", "states.npy")
    ours = torch.load("runs/flextok/demo/ar.pt", weights_only=True)["state"]["tokenizer"]
    theirs = torch.load(checkpoint, weights_only=True)["state"]["ema"]
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    run("--sample", "runs/flextok/demo/ar.pt")
    np.save("states.npy", states[:, :2])
    assert "--text states.npy: states (2, 5); the GPT reads (3, 5)" in refused(run, ["--sample", "runs/flextok/demo/ar.pt"], capsys)
    Path("states.npy").unlink()
    assert "--text states.npy" in refused(run, ["--sample", "runs/flextok/demo/ar.pt"], capsys)
    np.save("states.npy", states[:5])
    with pytest.raises(SystemExit):
        run(*TINY, "--stage", "ar", "--tokenizer", checkpoint, "--condition", "text", "--text", "states.npy", "--name", "x")


class Features(torch.nn.Module):
    """A teacher: S = 5 features of each quarter of the picture; as a list of places, or as a grid."""

    def __init__(self, places, channels=3, last=None):
        super().__init__()
        self.conv, self.places = torch.nn.Conv2d(channels, 5, 4, stride=4), places
        self.last = last or torch.nn.Identity()

    def forward(self, x):
        f = self.last(self.conv(x))
        return f.flatten(2).transpose(1, 2)[:, :self.places] if self.places else f


def save_teacher(path, model, batch=None):
    """The model as TorchScript (.pt) or by torch.export (.pt2), for any number of images or for `batch` alone."""
    example = torch.randn(batch or 4, model.conv.in_channels, 8, 8)
    if path.endswith(".pt"):
        torch.jit.script(model).save(path)
    else:
        sizes = None if batch else ({0: torch.export.Dim("B")},)
        torch.export.save(torch.export.export(model, (example,), dynamic_shapes=sizes), path)


@pytest.mark.parametrize("kind", ["pt", "pt2"])
def test_teacher_from_a_file(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for places in (0, 4, 3):
        save_teacher(f"teacher.{kind}", Features(places))
        words = [*TINY, "--teacher", f"teacher.{kind}", "--stage", "tokenizer", "--name", f"t{places}"]
        if places == 3:
            with pytest.raises(SystemExit) as stop:
                run(*words)
            assert stop.value.code == 2 and "gives (2, 5, 1, 3) where maps" in capsys.readouterr().err
        else:
            run(*words)
            state = torch.load(f"runs/flextok/t{places}/tokenizer.pt", weights_only=True)["state"]["ema"]
            assert len(state["align.5.bias"]) == 5


def test_a_teacher_from_a_file_is_frozen(tmp_path, monkeypatch, capsys):
    """Saved in training mode, with dropout or batch norm, it neither draws nor moves, or it is refused."""
    monkeypatch.chdir(tmp_path)
    for last in (torch.nn.Dropout(0.5), torch.nn.BatchNorm2d(5)):
        save_teacher("teacher.pt", Features(0, last=last).train())
        cfg = config(size=8, repa=1.0, teacher="teacher.pt")
        features, S = flextok.open_teacher(cfg, flextok.open_split(cfg, "train", 4))
        x = torch.randn(3, 3, 8, 8)
        assert S == 5 and torch.equal(features(x), features(x)) and torch.equal(features(x)[:1], features(x[:1]))
        save_teacher("teacher.pt2", Features(0, last=last).train())
        assert "--teacher teacher.pt2: an image's features change" in refused(run, [*TINY, "--teacher", "teacher.pt2"], capsys)


def test_a_teacher_for_one_size_of_batch_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_teacher("teacher.pt2", Features(0), batch=4)
    assert "--teacher teacher.pt2" in refused(run, [*TINY, "--teacher", "teacher.pt2"], capsys)
    assert not (tmp_path / "runs/flextok").exists()


def test_latents_train_and_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    latents_file("pack.npz")
    run(*TINY, "--data", "latents:pack.npz", "--channels", "4", "--repa", "0")
    run("--sample", "runs/flextok/demo/ar.pt", "--classes", "1", "--cfg_scale", "2")
    sides = []
    monkeypatch.setattr(F, "interpolate", lambda x, *args, interpolate=F.interpolate, **more: sides.append(x.shape) or interpolate(x, *args, **more))
    latents_file("pack.npz", images=np.zeros((20, 16, 16, 1), np.uint8))    # a network of 3 channels at 16 pixels, beside latents of 4 at 8
    save_teacher("teacher.pt", Features(0))
    run(*TINY, "--data", "latents:pack.npz", "--channels", "4", "--teacher", "teacher.pt", "--stage", "tokenizer", "--name", "seen")
    assert set(sides) == {(4, 5, 4, 4)}


def test_accuracy_is_that_of_prefixes_and_samples_by_the_ruler(monkeypatch):
    """Pictures are painted with their class: test images, what their last token says, what a GPT told so writes."""
    labels = np.arange(120) % 10
    test = dataclasses.make_dataclass("Test", ["labels"], namespace={"__len__": lambda self: 120})(labels)
    gpt = dataclasses.make_dataclass("Told", ["is_text", "names"])(False, [*"0123456789"])
    asked = []

    def paint(classes):
        return torch.as_tensor(classes)[:, None, None, None].expand(-1, 3, 6, 6) / 10

    def write(gpt, cfg, told, first, last):
        return torch.tensor([[0, told[i % 2] if i < 110 else 7] for i in range(first, last)])

    monkeypatch.setattr(flextok, "open_split", lambda cfg, split, count=0: asked.append(split) or test)
    monkeypatch.setattr(flextok, "plain_images", lambda dataset, rows: paint(labels[list(rows)]))
    monkeypatch.setattr(flextok, "encode_images", lambda *args: torch.from_numpy(np.stack([labels % 5, labels], 1)))
    monkeypatch.setattr(flextok, "decode_tokens", lambda tokenizer, cfg, ids: paint(ids[:, -1]))
    monkeypatch.setattr(flextok, "draw_ids", write)
    monkeypatch.setattr(common, "judge", lambda *args: lambda x: F.one_hot((10 * x[:, 0, 0, 0]).round().long(), 10))
    cfg = config(count=120, registers=2, classes="3,1")
    found = flextok.class_accuracy(None, gpt, cfg)
    assert found == {"real": 1.0, "k=1": 0.5, "k=2": 1.0, "samples": pytest.approx(110 / 120)}
    assert asked == ["test", "judge"] and "samples" not in flextok.class_accuracy(None, None, cfg)


def test_muon_takes_the_matrices_of_all_blocks():
    """Of both halves of the tokenizer, or of the GPT and its word encoder; AdamW keeps the rest, without --muon all."""
    empty = torch.zeros(3, dtype=torch.long)
    for model in (flextok.Tokenizer(config()), flextok.GPT(config(condition="text"), ["a", "b"], empty)):
        mine = {p for name, p in model.named_parameters() if "blocks." in name and p.ndim == 2}
        adamw, muon = flextok.optimizer(model, config(muon=2.0), decay=0.5).param_groups
        assert len(mine) > 20 and set(muon["params"]) == mine and muon["factor"] == 2 and muon["weight_decay"] == 0.5
        assert set(adamw["params"]) == set(model.parameters()) - mine
        assert set(flextok.optimizer(model, config()).param_groups[0]["params"]) == set(model.parameters())


def test_the_demo_that_misses_its_target_exits_with_1(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "is_preset", lambda cfg, presets: True)
    words = [*TINY, "--stage", "tokenizer", "--repa", "0"]
    monkeypatch.setattr(flextok, "SHORT_RUN", 1)
    cases = [(0.5, [0.4, 0.3], 0.6, 0), (0.35, [0.4, 0.3], 0.6, 0), (0.2, [0.4, 0.3], 0.6, 1), (0.5, [0.3, 0.4], 0.6, 1), (0.5, [0.3, 0.301], 0.6, 0),
             (0.5, [0.4, 0.3], 0.4, 1)]
    for number, (target, errors, share, code) in enumerate(cases):
        monkeypatch.setattr(flextok, "TARGET", {"error": target, "k=4": 0.5, "samples": 0.9})       # no GPT, no samples
        monkeypatch.setattr(flextok, "show_tokens", lambda *args, errors=errors: ([1, 4], errors))
        monkeypatch.setattr(flextok, "class_accuracy", lambda *args, share=share: {"real": 1.0, "k=1": 0.0, "k=4": share})
        try:
            run(*words, "--name", f"n{number}")
            assert code == 0
        except SystemExit as stop:
            assert stop.code == code == 1
    run("--resume", "--name", "n5")                                             # finished: it only shows its result
