"""ViTok: its equations V1 to V28 by value, the official code's numbers, oracles written from the formulas, and runs."""

import dataclasses
import functools
import json
import math
import tracemalloc

import common
import data
import vitok
from tests import ROOT, official, refused, shared
from tests.tiny import argv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

TINY = {"model": "12x1x2-24x2x2/8", "channels": 4, "size": 32, "dit": "24x2x2"}
CLIP = {**TINY, "model": "12x1x2-24x2x2/2x8", "size": 16, "frames": 4}


def config(**fields):
    return vitok.Config(**{**TINY, **fields})


def few(monkeypatch, most):
    """Data sets of drawn images hold `most` of them."""
    monkeypatch.setattr(data, "open_data", lambda *args, plain=data.open_data, **named: plain(
        *args, **{**named, "count": min(named.get("count", most), most)}))


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    """Runs here draw 500 pictures where 20,000 are the default: they open their data at every stage."""
    few(monkeypatch, 500)


def build(cfg, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = vitok.Autoencoder(cfg).to(dtype)
    for parameter in model.parameters():                      # zero biases and unit norms would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def count(module):
    return sum(p.numel() for p in module.parameters())


def tubelets(q, p, grid=()):
    """Sizes as patchify and unpatchify want them."""
    return vitok.Sizes((), (), (), q, p, 3 * q * p * p, grid, 0, 0)


def macs(plan):
    return (plan["encoder MACs"] + plan["decoder MACs"]) / 1e9


# --- The equations and what follows from them -----------------------------------

@pytest.mark.parametrize("frames, size, model, tokens, e, ratio", [
    (1, 256, "S-B/16", 256, 4096, 48), (1, 512, "S-B/16", 1024, 16384, 48),
    (16, 256, "S-B/4x8", 4096, 65536, 48), (16, 128, "S-B/4x8", 1024, 16384, 48),
    (1, 256, "S-B/32", 64, 1024, 192), (1, 256, "S-B/8", 1024, 16384, 12)])
def test_table_of_e(frames, size, model, tokens, e, ratio):
    """V4."""
    plan = vitok.count_costs(config(frames=frames, size=size, model=model, channels=16))
    assert (plan["tokens"], plan["E"], plan["pixels per float"]) == (tokens, e, ratio)
    wide = vitok.count_costs(config(frames=frames, size=size, model=model, channels=64))
    assert wide["E"] == 4 * e and wide["tokens"] == tokens


@pytest.mark.parametrize("name, encoder, decoder, published", [
    ("S-S/16", 43_163_960, 43_151_643, 2 * 43.3), ("B-B/16", 85_711_184, 85_698_867, 2 * 85.8),
    ("L-L/16", 383_693_360, 383_674_899, 2 * 383.7), ("S-B/16", 43_163_960, 85_698_867, 129.0),
    ("S-L/16", 43_163_960, 383_674_899, 426.8), ("B-L/16", 85_711_184, 383_674_899, 85.8 + 383.7),
    ("1152x6x16-L/16", 480_292_055 - 383_674_899, 383_674_899, 480.3)])
def test_parameters(name, encoder, decoder, published):
    cfg = config(model=name, channels=16, size=256)
    plan = vitok.count_costs(cfg)
    assert (plan["encoder parameters"], plan["decoder parameters"]) == (encoder, decoder)
    assert (encoder + decoder) / 1e6 == pytest.approx(published, rel=0.0035)


@pytest.mark.parametrize("dit, exact", [("B", 130_592_336), ("L", 458_410_176), ("XL", 675_499_976)])
def test_parameters_of_the_generator(dit, exact):
    with torch.device("meta"):
        assert count(vitok.DiT(config(model="S-B/16", channels=16, size=256, dit=dit), 1000)) == exact


@pytest.mark.parametrize("model, frames, size, counted, exact, published", [
    ("S-B/16", 1, 256, 768, 34.760, 34.8), ("S-L/16", 1, 256, 768, 113.403, 113.4),
    ("S-B/16", 1, 512, 768, 160.781, 160.8), ("S-B/4x8", 16, 128, 768, 160.781, 160.8),
    ("S-B/8x8", 16, 128, 768, 73.143, 73.2), ("S-B/8x8", 16, 128, 1536, 73.747, 73.7),
    ("S-B/4x16", 16, 128, 768, 34.760, 34.8), ("S-B/4x16", 16, 128, 3072, 35.665, 35.7)])
def test_multiply_adds(model, frames, size, counted, exact, published):
    """V27. Tab. 5 counts `counted` values for any tubelet; the rest of a larger one costs 2 x 768 each a token."""
    cfg = config(model=model, frames=frames, size=size, channels=16)
    s = vitok.sizes(cfg)
    value = macs(vitok.count_costs(cfg)) - (s.values - counted) * 2 * 768 * s.N / 1e9
    assert value == pytest.approx(exact, abs=0.001)
    assert value == pytest.approx(published, rel=0.0015)


def test_table_1_one_side_at_a_time():
    """V27."""
    for size, encoder, decoder in (("S", 11.640, 11.637), ("B", 23.123, 23.120), ("L", 101.768, 101.764)):
        plan = vitok.count_costs(config(model=f"{size}-{size}/16", channels=16, size=256))
        assert plan["encoder MACs"] / 1e9 == pytest.approx(encoder, abs=0.001)
        assert plan["decoder MACs"] / 1e9 == pytest.approx(decoder, abs=0.001)


def test_flop_ratios_against_the_convolutional_auto_encoders():
    assert 162.2 / 34.8 == pytest.approx(4.66, abs=0.005)
    image = macs(vitok.count_costs(config(model="S-B/16", size=512, channels=16)))
    video = macs(vitok.count_costs(config(model="S-B/4x8", size=128, frames=16, channels=16)))
    assert 653.8 / image == pytest.approx(4.07, abs=0.005) and 505.3 / video == pytest.approx(3.14, abs=0.005)


@pytest.mark.parametrize("fields", [{}, {"frames": 4, "model": "12x1x2-24x2x2/2x8"}, {"latents": 6},
                                    {"variational": False}])
def test_flop_formula_equals_torchs_counter(fields):
    cfg = config(**fields)
    model = build(cfg, torch.float32)
    x = normal(1, 3, cfg.frames, cfg.size, cfg.size, dtype=torch.float32)
    plan = vitok.count_costs(cfg)
    with sdpa_kernel(SDPBackend.MATH):                        # the fused CPU kernel would not be counted
        assert common.flops(lambda: model(x)) == pytest.approx(2e9 * macs(plan), rel=0.01)
    assert plan["encoder parameters"] + plan["decoder parameters"] == plan["parameters"] == count(model)


def test_channels_cost_nothing_and_e_does_not_fix_the_cost():
    few, many = (vitok.count_costs(config(model="S-B/16", size=256, channels=c)) for c in (4, 64))
    parameters = [p["encoder parameters"] + p["decoder parameters"] for p in (few, many)]
    assert macs(many) / macs(few) < 1.0025 and parameters[1] / parameters[0] < 1.0025
    assert many["E"] == 16 * few["E"]
    pairs = ((8, 4), (16, 16), (32, 64))
    same = [vitok.count_costs(config(model=f"S-B/{p}", size=256, channels=c)) for p, c in pairs]
    assert {plan["E"] for plan in same} == {4096}
    assert macs(same[0]) / macs(same[2]) == pytest.approx(18.6, abs=0.1)


def test_embedding_is_a_strided_convolution_and_its_transpose():
    """V1 and V5."""
    cfg = config(**CLIP)
    model, x = build(cfg), normal(2, 3, 4, 16, 16)
    kernel = model.encoder.embed.weight.view(12, 3, 2, 8, 8)
    conv = F.conv3d(x, kernel, model.encoder.embed.bias, stride=(2, 8, 8)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.encoder.embed(vitok.patchify(x, tubelets(2, 8))), conv, rtol=0, atol=1e-10)
    tokens = normal(2, 8, 24, seed=1)
    kernel = model.decoder.to_pixels.weight.T.reshape(24, 3, 2, 8, 8)
    square = tokens.transpose(1, 2).reshape(2, 24, 2, 2, 2)
    conv = F.conv_transpose3d(square, kernel, model.decoder.colour.flatten(), stride=(2, 8, 8))
    ours = vitok.unpatchify(model.decoder.to_pixels(tokens), tubelets(2, 8, (2, 2, 2))) + model.decoder.colour
    torch.testing.assert_close(ours, conv, rtol=0, atol=1e-10)


def test_orthonormal_rows_make_decoding_the_inverse_of_embedding():
    x = normal(2, 3, 4, 8, 8)
    rows = torch.linalg.qr(normal(100, 96, seed=1)).Q                                  # d = 100 >= pi = 96
    tokens = vitok.patchify(x, tubelets(2, 4)) @ rows.T
    torch.testing.assert_close(vitok.unpatchify(tokens @ rows, tubelets(2, 4, (2, 2, 2))), x, rtol=0, atol=1e-10)


def test_a_still_clip_embeds_like_one_image():
    kernel, x = normal(12, 3, 4, 8, 8), normal(2, 3, 1, 16, 16, seed=1)
    still = vitok.patchify(x.expand(-1, -1, 4, -1, -1), tubelets(4, 8)) @ kernel.flatten(1).T
    image = vitok.patchify(x, tubelets(1, 8)) @ kernel.sum(2).flatten(1).T
    torch.testing.assert_close(still, image, rtol=0, atol=1e-10)


def turned(x, place):
    return vitok.rotate(x, vitok.rotary_table(vitok.rope_angles(place, x.shape[-1])))


def test_rope_turns_by_differences_of_positions():
    q, k = normal(1, 2, 24, 12), normal(1, 2, 24, 12, seed=1)
    place = vitok.token_positions((2, 3, 4), "3d")
    torch.testing.assert_close(turned(q, place).norm(dim=-1), q.norm(dim=-1))
    scores = turned(q, place) @ turned(k, place).transpose(2, 3)
    shifted = place + torch.tensor([3, 5, 7])
    moved = turned(q, shifted) @ turned(k, shifted).transpose(2, 3)
    torch.testing.assert_close(scores, moved, rtol=0, atol=1e-5)
    assert torch.equal(turned(q, torch.zeros(24, 3)), q)
    still = vitok.token_positions((1, 4, 6), "3d")
    assert torch.equal(turned(q, still)[..., 8:], q[..., 8:])  # the third for time is unrotated
    torch.testing.assert_close(turned(q, still)[..., :8], turned(q[..., :8], still[:, :2]))


def test_rope_by_the_formula():
    """V8, one pair at a time: angle = pos * theta^(-6 i / d) in thirds of d = 12, in the order x, y, t."""
    q, theta = normal(1, 1, 12, 12), 10000.0
    out = turned(q, vitok.token_positions((2, 2, 3), "3d"))
    for n in range(12):
        t, y, x = n // 6, n // 3 % 2, n % 3
        for pair in range(6):
            angle = (x, y, t)[pair // 2] * theta ** (-6 * (pair % 2) / 12)
            a, b = q[0, 0, n, 2 * pair], q[0, 0, n, 2 * pair + 1]
            cos, sin = math.cos(angle), math.sin(angle)
            want = torch.stack((a * cos - b * sin, a * sin + b * cos))
            torch.testing.assert_close(out[0, 0, n, 2 * pair:2 * pair + 2], want)


def test_values_are_not_rotated():
    attention = vitok.Attention(12, 2).double()
    with torch.no_grad():
        attention.qkv.weight[:24] = 0  # all scores equal: a plain mean of v
    x, place = normal(2, 6, 12), vitok.token_positions((1, 2, 3), "3d")
    plain = attention.out(F.linear(x, attention.qkv.weight[24:]).mean(1, keepdim=True).expand(-1, 6, -1))
    torch.testing.assert_close(attention(x, vitok.rotary_table(vitok.rope_angles(place, 6))), plain)


@pytest.mark.parametrize("d, parts", [(64, (22, 22, 20)), (72, (24, 24, 24)), (12, (4, 4, 4)), (10, (4, 4, 2)),
                                      (6, (2, 2, 2)), (8, (4, 2, 2)), (20, (8, 6, 6))])
def test_head_widths_split_as_evenly_as_can_be(d, parts):
    angles = vitok.rope_angles(torch.eye(3), d)
    assert tuple(2 * int((row != 0).sum()) for row in angles) == parts


@pytest.mark.parametrize("kind", ["none", "3d", "1d"])
def test_positions_alone_break_permutation(kind):
    cfg = config(model="24x1x2-24x2x2/8", rope=kind)
    trunk, x = build(cfg).decoder.trunk, normal(2, 16, 24)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    gap = (trunk(x[:, order]) - trunk(x)[:, order]).abs().max()
    assert gap < 1e-5 if kind == "none" else gap > 1e-3


def test_attention_is_bidirectional_in_time():
    model, x = build(config(**CLIP)), normal(1, 3, 4, 16, 16)
    other = x.clone()
    other[:, :, -1] += 1
    change = (model.encoder(other)[0] - model.encoder(x)[0]).abs()
    assert change[:, :4].max() > 1e-6  # the four tokens of the first two frames


def test_kl():
    """V12."""
    zero = torch.zeros(2, 5, 3, dtype=torch.float64)
    assert torch.equal(vitok.kl_term(zero, zero), torch.zeros(2, dtype=torch.float64))
    mean, logvar = normal(2, 5, 3), normal(2, 5, 3, seed=1)
    value = vitok.kl_term(mean, logvar)
    assert (value > 0).all()
    gauss = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (logvar / 2).exp()),
                                              torch.distributions.Normal(zero, zero + 1))
    torch.testing.assert_close(value, gauss.mean((1, 2)))
    torch.testing.assert_close(vitok.kl_term(mean.repeat(1, 4, 2), logvar.repeat(1, 4, 2)), value)
    model = build(config())
    with torch.no_grad():
        model.encoder.to_code.bias[4:6], model.encoder.to_code.bias[6:] = -1e3, 1e3
    _, logvar = model.encoder(normal(1, 3, 1, 32, 32))
    assert torch.equal(logvar[..., :2], torch.full_like(logvar[..., :2], -30))
    assert torch.equal(logvar[..., 2:], torch.full_like(logvar[..., 2:], 20))


def test_without_variance():
    model, x = build(config(variational=False)), normal(2, 3, 1, 32, 32)
    recon, mean, logvar = model(x, normal(2, 16, 4))
    assert logvar is None and mean.shape == (2, 16, 4)
    assert torch.equal(recon, model.decoder(mean))
    assert torch.equal(vitok.kl_term(mean, logvar), mean.new_zeros(2))


def test_evaluation_uses_the_mean():
    model, x = build(config()), normal(2, 3, 1, 32, 32)
    first, mean, logvar = model(x)
    assert torch.equal(first, model(x)[0]) and torch.equal(first, model.decoder(mean))
    one, two = model(x, normal(2, 16, 4))[0], model(x, normal(2, 16, 4, seed=1))[0]
    assert (one - two).abs().max() > 1e-3
    with torch.no_grad():
        model.encoder.to_code.weight[4:], model.encoder.to_code.bias[4:] = 0, -1e3
    torch.testing.assert_close(model(x, normal(2, 16, 4))[0], model(x)[0], rtol=0, atol=1e-4)


def features(x):
    """A stand-in for VGG that any image size allows: two fixed random convolutions of frames."""
    first = F.conv2d(x, normal(6, 3, 3, 3, seed=8, dtype=x.dtype), padding=1).relu()
    return [first, F.conv2d(first, normal(5, 6, 3, 3, seed=9, dtype=x.dtype), padding=1, stride=2).relu()]


features.heads = [normal(n, seed=7).abs() for n in (6, 5)]


def perceptual(x, y):
    return vitok.lpips(x, y, features)


def decoder_gradients(model, disc, x, cfg, ramp=0.5):
    model.zero_grad()
    draws = {"noise": normal(len(x), 16, 4, seed=3), "length": None}
    value, _, recon = vitok.loss_decoder(model, (x, None), draws, cfg, features, disc, cfg.gan * ramp)
    value.backward(inputs=list(model.decoder.parameters()))
    return [p.grad.clone() for p in model.decoder.parameters()], recon


def test_stage_two_touches_the_decoder_alone():
    cfg = config(gan=0.05)
    model, disc, x = build(cfg), vitok.Discriminator(32, 8).double(), normal(2, 3, 1, 32, 32)
    before = model.encoder(x)
    opt = torch.optim.AdamW(model.decoder.parameters(), 1e-2)
    for _ in range(10):
        _, recon = decoder_gradients(model, disc, x, cfg)
        opt.step()
    assert all(p.grad is None for p in [*model.encoder.parameters(), *disc.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(before, model.encoder(x)))
    with_kl, _ = decoder_gradients(model, disc, x, cfg)
    without, _ = decoder_gradients(model, disc, x, config(gan=0.05, kl=0.0))
    assert all(torch.equal(a, b) for a, b in zip(with_kl, without))
    whole = [p for p in model.parameters()]
    recon, mean, logvar = model(x, normal(2, 16, 4, seed=3))                           # nothing frozen here
    value, _ = vitok.reconstruction_losses(recon, mean, logvar, x, cfg, features)
    value = value - 0.05 * 0.5 * disc(recon).mean()
    free = torch.autograd.grad(value, whole)[-len(with_kl):]
    assert all(torch.equal(a, b) for a, b in zip(with_kl, free))


def test_clips_are_judged_frame_by_frame():
    x, y = normal(2, 3, 4, 16, 16), normal(2, 3, 4, 16, 16, seed=1)
    cfg, mean = config(**CLIP), torch.zeros(2, 8, 4, dtype=torch.float64)
    disc = vitok.Discriminator(16, 8).double()
    terms = vitok.reconstruction_losses(y, mean, mean, x, cfg, features)[1]
    terms["disc"] = vitok.loss_disc(disc, x, y)
    single = [vitok.reconstruction_losses(y[:, :, f:f + 1], mean, mean, x[:, :, f:f + 1], cfg, features)[1]
              | {"disc": vitok.loss_disc(disc, x[:, :, f:f + 1], y[:, :, f:f + 1])} for f in range(4)]
    order = torch.tensor([2, 0, 3, 1])
    mixed = vitok.reconstruction_losses(y[:, :, order], mean, mean, x[:, :, order], cfg, features)[1]
    mixed["disc"] = vitok.loss_disc(disc, x[:, :, order], y[:, :, order])
    for name in ("mse", "lpips", "disc"):
        torch.testing.assert_close(terms[name], sum(s[name] for s in single) / 4)
        torch.testing.assert_close(terms[name], mixed[name], rtol=0, atol=1e-6)


def test_reconstruction_losses_by_the_formula():
    """V11 and V14: mse + beta KL + eta LPIPS - lambda mean D, each from numbers of its own."""
    cfg = config(kl=0.3, perceptual=0.7)
    model, disc, x, noise = build(cfg), vitok.Discriminator(32, 8).double(), normal(2, 3, 1, 32, 32), normal(2, 16, 4)
    batch, draws = (x, None), {"noise": noise, "length": None}
    recon, mean, logvar = model(x, noise)
    mse = ((recon - x) ** 2).mean()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    lpips = perceptual(recon, x).mean()
    value, losses = vitok.loss_ae(model, batch, draws, cfg, features)
    torch.testing.assert_close(value, mse + 0.3 * kl + 0.7 * lpips)
    torch.testing.assert_close(losses, {"mse": mse, "kl": kl, "lpips": lpips})
    value, losses, _ = vitok.loss_decoder(model, batch, draws, cfg, features, disc, 0.05)
    torch.testing.assert_close(value, mse + 0.3 * kl + 0.7 * lpips - 0.05 * disc(recon).mean())
    value, losses = vitok.loss_ae(model, batch, draws, config(kl=0.3, perceptual=0.0), None)
    assert losses.keys() == {"mse", "kl"} and torch.equal(value, losses["mse"] + 0.3 * losses["kl"])


class Fixed(nn.Module):
    """A critic whose answer is the first pixel."""

    def forward(self, x):
        return x[:, 0, 0, 0, 0]


def test_lpips_and_hinge():
    """V15."""
    x, y = normal(3, 3, 1, 16, 16), normal(3, 3, 1, 16, 16, seed=1)
    assert torch.equal(perceptual(x, x), torch.zeros(3, dtype=torch.float64)) and (perceptual(x, y) > 0).all()
    clip = torch.zeros(2, 3, 1, 4, 4)
    assert vitok.loss_disc(Fixed(), clip, clip) == 1.0
    assert vitok.loss_disc(Fixed(), clip + 1.5, clip - 1) == 0
    assert vitok.loss_disc(Fixed(), clip - 1, clip + 3) == 0.5 * (2 + 4)
    model, disc = build(config()), vitok.Discriminator(32, 8).double()
    x = normal(2, 3, 1, 32, 32)
    _, recon = decoder_gradients(model, disc, x, config(gan=1.0))
    assert all(p.grad is None for p in disc.parameters())  # the G term leaves nothing in D
    model.zero_grad()
    vitok.loss_disc(disc, x, recon).backward()
    assert all(p.grad is None for p in model.parameters())  # D sends nothing to the decoder
    assert all(p.grad is not None for p in disc.parameters())


def test_lpips_by_the_formula():
    """V13: unit vectors over channels, squared difference, channel weights, mean over space, sum over taps."""
    x, y = normal(2, 3, 8, 8), normal(2, 3, 8, 8, seed=1)
    heads = [normal(n, seed=7).abs() for n in (6, 5)]
    for b in range(2):
        total = 0.0
        for f, g, head in zip(features(x), features(y), heads):
            maps = []
            for a in (f[b], g[b]):
                n = np.sqrt((a.numpy() ** 2).sum(0) + 1e-10)
                maps.append(a.numpy() / (n + 1e-10))
            total += (head.numpy()[:, None, None] * (maps[0] - maps[1]) ** 2).sum(0).mean()
        assert perceptual(x[:, :, None], y[:, :, None])[b].item() == pytest.approx(total, rel=1e-12)


def vgg_file(path):
    """A file in the layout of the `lpips` package (scaling layer, slices, heads twice), with random weights."""
    torch.manual_seed(0)
    state = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    for i, (a, b) in enumerate(zip(widths, widths[1:])):
        state[f"net.{i}.weight"] = torch.randn(b, a, 3, 3) / math.sqrt(9 * a / 2)
        state[f"net.{i}.bias"] = torch.randn(b) / 10
    for prefix in ("lin", "lins."):
        for i, n in enumerate((64, 128, 256, 512, 512)):
            state[f"{prefix}{i}.model.1.weight"] = torch.rand(1, n, 1, 1)
    torch.save(state, path)
    return state


def test_lpips_with_vgg_by_a_plain_walk(tmp_path):
    state = vgg_file(tmp_path / "vgg.pt")
    ours = vitok.perceptual_features(config(vgg=str(tmp_path / "vgg.pt")), "cpu")
    clips = normal(2, 1, 3, 2, 32, 32, dtype=torch.float32)
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 3, 1, 1)
    sides = []
    for clip in clips:
        a, taps = (clip[0].transpose(0, 1) - shift) / scale, []
        for i in range(13):
            a = F.relu(F.conv2d(a, state[f"net.{i}.weight"], state[f"net.{i}.bias"], padding=1))
            if i in (1, 3, 6, 9, 12):
                taps.append(a / (a.square().sum(1, keepdim=True) + 1e-10).sqrt())
                a = F.max_pool2d(a, 2)
        sides.append(taps)
    want = sum(F.conv2d((f - g).square(), state[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
               for i, (f, g) in enumerate(zip(*sides)))
    torch.testing.assert_close(vitok.lpips(*clips, ours), want)


@pytest.mark.parametrize("content", ["bytes", "short", "names"])
def test_a_file_that_is_no_vgg(tmp_path, content):
    path = tmp_path / "bad.pt"
    if content == "bytes":
        path.write_bytes(b"no weights")
    else:
        state = vgg_file(path)
        torch.save([1, 2] if content == "names" else dict(list(state.items())[:20]), path)
    with pytest.raises(common.UserError, match="bad.pt: (not the weights of VGG16|cannot be read|holds no tensors)"):
        vitok.perceptual_features(config(vgg=str(path)), "cpu")


def rates(stage, steps, **fields):
    cfg = config(**{f"steps_{stage}": steps, "batch": 256, **fields})
    return [vitok.learning_rate(cfg, step, stage) for step in range(steps + 1)]


def test_ramp_and_learning_rate():
    """V16 and V26."""
    assert [vitok.ramp(s, 5000, 50000) for s in (0, 5000, 30000, 55000, 99999)] == [0, 0, 0.5, 1, 1]
    lr = rates("ae", 1000, lr=4e-4)
    assert lr == rates("decoder", 1000, lr=4e-4) == rates("ae", 1000, lr=1e-4, frames=4)
    assert lr[0] == lr[1000] == pytest.approx(1e-5) and lr[30] == pytest.approx(4e-4) and max(lr) == lr[30]
    assert lr[15] == pytest.approx((4e-4 + 1e-5) / 2) and lr[515] == pytest.approx((4e-4 + 1e-5) / 2)
    assert all(a < b for a, b in zip(lr[:30], lr[1:31])) and all(a > b for a, b in zip(lr[30:], lr[31:]))
    lr = rates("dit", 100, lr_dit=4e-4, frames=4)
    assert lr[0] == pytest.approx(3e-5) and lr[10] == pytest.approx(4e-4)


def dit(cfg, classes=5, seed=0, trained=True):
    torch.manual_seed(seed)
    model = vitok.DiT(cfg, classes).double()
    if trained:
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def test_the_generator_at_initialisation():
    """V17."""
    model = dit(config(), trained=False)
    z, label, time = normal(3, 16, 4), torch.tensor([0, 4, 5]), torch.tensor([0, 500, 999])
    assert torch.equal(model(z, time, label), torch.zeros(3, 16, 8, dtype=torch.float64))
    hidden, cond = normal(3, 16, 24), normal(3, 24, seed=1)
    block = model.trunk.blocks[0]
    assert torch.equal(block(hidden, model.trunk.rotary, cond), hidden)
    noise = normal(3, 16, 4, seed=2)
    draws = {"time": time, "eps": noise, "drop": torch.zeros(3, dtype=torch.bool)}
    assert torch.equal(vitok.loss_dit(model, (z, label), draws)[1]["mse"], noise.square().mean())


def test_guidance_one_and_zero_are_the_branches():
    """V23."""
    model = dit(config())
    z, label, time = normal(3, 16, 4), torch.tensor([0, 4, 2]), torch.tensor([0, 500, 999])
    null = torch.full_like(label, 5)
    assert torch.equal(vitok.guided(model, z, time, label, 1.0), model(z, time, label))
    cond, free = model(z, time, label), model(z, time, null)
    torch.testing.assert_close(vitok.guided(model, z, time, label, 0.0), free, rtol=0, atol=1e-14)
    torch.testing.assert_close(vitok.guided(model, z, time, label, 3.0), free + 3 * (cond - free))


def test_noise_schedule_and_respacing():
    assert vitok.alphas_cumprod[0].item() == pytest.approx(0.9999, abs=1e-15)
    assert vitok.alphas_cumprod[999].item() == pytest.approx(4.03583e-5, rel=1e-5)
    assert len(vitok.alphas_cumprod) == 1000
    for steps in (2, 10, 250, 1000):
        oracle = Oracle(normal(1, 5, 3))
        vitok.sample(oracle, torch.tensor([1]), torch.Generator(), steps)
        kept = oracle.times[::-1]
        assert kept == [round(k * 999 / (steps - 1)) for k in range(steps)] and len(set(kept)) == steps
        bars = vitok.alphas_cumprod[kept]
        betas = 1 - bars / torch.cat((torch.ones(1, dtype=torch.float64), bars[:-1]))
        torch.testing.assert_close(torch.cumprod(1 - betas, 0), bars, rtol=0, atol=1e-12)


class Oracle(nn.Module):
    """The exact noise of a known clean code; the variance channels are rubbish."""

    classes, code = 10, (5, 3)

    def __init__(self, clean):
        super().__init__()
        self.clean, self.times = clean, []

    def forward(self, x, time, label):
        self.times.append(int(time[0]))
        bar = vitok.alphas_cumprod[time].view(-1, 1, 1)
        return torch.cat(((x - bar.sqrt() * self.clean) / (1 - bar).sqrt(), x), 2)


@pytest.mark.parametrize("steps", [2, 7, 250])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_oracle_leads_exactly_home(steps, eta):
    """V24."""
    oracle = Oracle(normal(2, 5, 3))
    out = vitok.sample(oracle, torch.tensor([1, 2]), torch.Generator().manual_seed(0), steps, 1.0, eta)
    torch.testing.assert_close(out.double(), oracle.clean, rtol=0, atol=1e-4)


class Half(nn.Module):
    """A model that is wrong in a known way: it calls half of x noise."""

    code = (5, 3)

    def forward(self, x, time, label):
        return torch.cat((x / 2, x), 2)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_steps_by_value(eta):
    """V24 and V25, three steps written out from the formula; the last adds no noise."""
    ours = vitok.sample(Half(), torch.tensor([1, 2]), torch.Generator().manual_seed(4), 3, 1.0, eta)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 5, 3, generator=generator)
    beta = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - beta)
    for now, then in ((999, 500), (500, 0), (0, None)):
        a, b = bar[now], 1.0 if then is None else bar[then]
        sigma = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
        clean = (x - math.sqrt(1 - a) * x / 2) / math.sqrt(a)
        x = math.sqrt(b) * clean + math.sqrt(1 - b - sigma**2) * x / 2
        if then is not None and eta:
            x = x + sigma * torch.randn(2, 5, 3, generator=generator)
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


def test_masking():
    """V10."""
    cfg = config(masked=True)
    model, z = build(cfg), normal(3, 16, 4)
    assert torch.equal(model.decoder(z, torch.tensor([16, 16, 16])), model.decoder(z))
    short = z.clone()
    short[0, 2:], short[1, 4:] = model.decoder.blank.data, model.decoder.blank.data
    assert torch.equal(model.decoder(z, torch.tensor([2, 4, 16])), model.decoder(short))
    assert torch.equal(vitok.Autoencoder(cfg).decoder.blank.data, torch.zeros(4))


def test_latent_variant():
    """V9."""
    for p in (4, 8, 16):
        cfg = config(model=f"12x1x2-24x2x2/{p}", latents=6)
        model, x = build(cfg), normal(2, 3, 1, 32, 32)
        recon, mean, logvar = model(x, normal(2, 6, 4))
        assert mean.shape == logvar.shape == (2, 6, 4) and recon.shape == x.shape
        assert vitok.count_costs(cfg)["E"] == 6 * 4
    with torch.no_grad():
        tokens = model.encoder.embed(vitok.patchify(x, tubelets(1, 16)))
        sequence = torch.cat((model.encoder.queries.expand(2, -1, -1), tokens), 1)
        kept = model.encoder.to_code(model.encoder.trunk(sequence)[:, :6])[..., :4]
    assert torch.equal(kept, mean)
    assert not any("queries" in name or "masks" in name for name, _ in model.named_parameters())


def test_frozen_tokens_by_the_released_formula():
    """V9: [sin, cos] of number * 10000^(-i / (n - 1)), n = D / 2; in the encoder l of D = 12, behind the code N of 24."""
    model = vitok.Autoencoder(config(latents=6))
    for tokens, count, D in ((model.encoder.queries, 6, 12), (model.decoder.masks, 16, 24)):
        rates = 10_000.0 ** -(np.arange(D // 2) / (D // 2 - 1))
        angles = np.arange(count)[:, None] * rates
        np.testing.assert_allclose(tokens, np.concatenate((np.sin(angles), np.cos(angles)), 1), rtol=0, atol=1e-6)


# Figs. 2 and 5: p, c, E, rFID, rIS, SSIM, PSNR, gFID (CFG 1.5)
RESULTS = """32 4 256 44.81 27.3 .516 20.09 41.70; 32 8 512 24.85 54.2 .572 21.32 22.13;
32 16 1024 11.47 98.9 .633 22.62 13.79; 16 4 1024 9.326 103.2 .647 22.82 10.84;
32 32 2048 5.759 138.4 .692 23.93 12.48; 16 8 2048 4.133 154.1 .715 24.29 6.77;
32 64 4096 2.410 177.1 .761 25.44 14.47; 16 16 4096 1.584 193.5 .790 26.12 6.13;
8 4 4096 1.824 188.3 .797 26.17 5.63; 16 32 8192 .876 212.3 .856 28.12 8.20;
8 8 8192 .874 213.7 .862 28.34 5.94; 16 64 16384 .528 225.1 .910 30.55 15.00;
8 16 16384 .455 225.4 .915 30.95 8.31; 8 32 32768 .0788 234.9 .963 35.11 15.33;
8 64 65536 .0087 236.6 .985 39.94 nan"""


def test_regression_on_the_published_points():
    rows = np.array([[float(v) for v in row.split()] for row in RESULTS.split(";")])
    e, rfid, psnr, gfid = np.log2(rows[:, 2]), rows[:, 3], rows[:, 6], rows[:, 7]
    (slope, start), r2 = vitok.least_squares(e, np.log2(rfid))
    assert (round(slope, 3), round(start, 2), round(r2, 3)) == (-1.383, 17.34, 0.944)
    (slope, _), r2 = vitok.least_squares(e, psnr)
    assert (round(slope, 2), round(r2, 3)) == (2.30, 0.923)
    assert vitok.least_squares(e[:-1], np.log2(gfid[:-1]), 2)[1] == pytest.approx(0.747, abs=0.0006)
    assert vitok.least_squares(e[:-1], np.log2(gfid[:-1]))[1] < 0.25


def test_recomputation_changes_nothing():
    x, noise = normal(2, 3, 1, 32, 32), normal(2, 16, 4, seed=1)
    outcomes = []
    for recompute in (False, True):
        model = build(config(recompute=recompute)).train()
        recon = model(x, noise)[0]
        recon.square().mean().backward()
        outcomes.append([recon, *(p.grad for p in model.parameters())])
    for plain, again in zip(*outcomes):
        torch.testing.assert_close(plain, again, rtol=0, atol=1e-12)


# --- Oracles from the formulas ---------------------------------------------------

def test_bottleneck_by_the_formula():
    """V2 and V3."""
    mean, logvar, noise = normal(2, 5, 3), normal(2, 5, 3, seed=1), normal(2, 5, 3, seed=2)
    want = mean.numpy() + np.exp(logvar.numpy()) ** 0.5 * noise.numpy()
    np.testing.assert_allclose(vitok.bottleneck(mean, logvar, noise), want, rtol=1e-12)
    assert torch.equal(vitok.bottleneck(mean, logvar, None), mean)


def test_block_by_the_formula():
    """V6 and V7, one block in numpy: pre-norm, q k v of all heads in a row, softmax, gated MLP of width int(2.67 d)."""
    block, x = vitok.Block(12, 2, "silu").double(), normal(1, 5, 12)
    for parameter in block.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    p = {name: value.detach().numpy() for name, value in block.named_parameters()}
    assert p["gate.weight"].shape == (32, 12) and "attention.qkv.bias" not in p

    def norm(a, name):
        centred = a - a.mean(1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        return unit * p[f"{name}.weight"] + p[f"{name}.bias"]

    a = x[0].numpy()
    q, k, v = np.split(norm(a, "norm1") @ p["attention.qkv.weight"].T, 3, 1)
    out = []
    for head in (slice(0, 6), slice(6, 12)):
        scores = np.exp(q[:, head] @ k[:, head].T / math.sqrt(6))
        out.append(scores / scores.sum(1, keepdims=True) @ v[:, head])
    a = a + np.concatenate(out, 1) @ p["attention.out.weight"].T + p["attention.out.bias"]
    b = norm(a, "norm2")
    gate = b @ p["gate.weight"].T + p["gate.bias"]
    b = gate / (1 + np.exp(-gate)) * (b @ p["up.weight"].T + p["up.bias"])
    a = a + b @ p["down.weight"].T + p["down.bias"]
    ours = block(x, vitok.rotary_table(torch.zeros(5, 3, dtype=torch.float64)))[0]
    torch.testing.assert_close(ours, torch.from_numpy(a), rtol=1e-12, atol=1e-12)


def test_generator_objective_by_the_formula():
    """V18, V19, V20, V21 and V22: mean squared noise error + bits per dimension of the reverse step, one sample at a time in numpy."""
    model, z, label = dit(config()), normal(4, 16, 4), torch.tensor([0, 4, 2, 1])
    draws = {"time": torch.tensor([0, 1, 500, 999]), "eps": normal(4, 16, 4, seed=2),
             "drop": torch.tensor([False, True, False, False])}
    value, terms = vitok.loss_dit(model, (z, label), draws)
    beta = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - beta)
    mse, bits = [], []
    for b, t in enumerate(draws["time"].tolist()):
        x0, eps = z[b].numpy(), draws["eps"][b].numpy()
        xt = math.sqrt(bar[t]) * x0 + math.sqrt(1 - bar[t]) * eps
        given = torch.tensor([5 if draws["drop"][b] else label[b]])
        out = model(torch.from_numpy(xt)[None], torch.tensor([t]), given)[0].detach().numpy()
        guess, v = out[:, :4], out[:, 4:]
        prev = bar[t - 1] if t else 1.0
        tilde = beta * (1 - np.concatenate(([1.0], bar[:-1]))) / (1 - bar)
        low = math.log(tilde[t] if t else tilde[1])
        fraction = (v + 1) / 2
        logvar = fraction * math.log(beta[t]) + (1 - fraction) * low
        clean = (xt - math.sqrt(1 - bar[t]) * guess) / math.sqrt(bar[t])

        def mean_of(start):
            first = beta[t] * math.sqrt(prev) / (1 - bar[t]) * start
            return first + (1 - prev) * math.sqrt(1 - beta[t]) / (1 - bar[t]) * xt

        mse.append(((eps - guess) ** 2).mean())
        if t:
            gap = (mean_of(x0) - mean_of(clean)) ** 2
            nats = 0.5 * (logvar - low - 1 + np.exp(low - logvar) + gap / np.exp(logvar))
        else:
            def cdf(u):
                return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
            std = np.exp(logvar / 2)
            above = cdf((x0 - mean_of(clean) + 1 / 255) / std)
            below = cdf((x0 - mean_of(clean) - 1 / 255) / std)
            mass = np.where(x0 < -0.999, above, np.where(x0 > 0.999, 1 - below, above - below))
            nats = -np.log(np.maximum(mass, 1e-12))
        bits.append(nats.mean() / math.log(2))
    assert terms["mse"].item() == pytest.approx(np.mean(mse), rel=1e-5)
    assert terms["bound"].item() == pytest.approx(np.mean(bits), rel=1e-5)
    assert value.item() == pytest.approx(np.mean(mse) + np.mean(bits), rel=1e-5)


def test_the_bound_trains_only_the_variance():
    model, z = dit(config()), normal(2, 16, 4)
    draws = {"time": torch.tensor([3, 700]), "eps": normal(2, 16, 4, seed=2),
             "drop": torch.zeros(2, dtype=torch.bool)}
    _, terms = vitok.loss_dit(model, (z, torch.tensor([0, 1])), draws)
    terms["bound"].backward()
    assert model.head.weight.grad[:4].abs().max() == 0 and model.head.weight.grad[4:].abs().max() > 0


def test_discriminator_by_a_plain_walk():
    """32 -> 16 -> 8 -> 4 in residual blocks; the blur is checked against a shift-and-add of [1, 3, 3, 1]."""
    disc, x = vitok.Discriminator(16, 8).double(), normal(2, 3, 16, 16)
    padded = F.pad(x, (1, 1, 1, 1))
    rows = sum(w * padded[:, :, i:i + 16:2] for i, w in enumerate((1, 3, 3, 1))) / 8
    both = sum(w * rows[:, :, :, i:i + 16:2] for i, w in enumerate((1, 3, 3, 1))) / 8
    torch.testing.assert_close(vitok.blur(x), both)
    leak = nn.LeakyReLU(0.2)
    rgb, _, *blocks, conv, _, _, mid, _, out = disc.layers
    a = leak(rgb(x))
    for block in blocks:
        a = (leak(block.conv2(vitok.blur(leak(block.conv1(a))))) + block.skip(vitok.blur(a))) / 2**0.5
    a = leak(conv(a))
    assert a.shape == (2, 8, 4, 4) and len(blocks) == 2
    torch.testing.assert_close(disc(x[:, :, None]), out(leak(mid(a.reshape(2, -1)))).squeeze(1))


def test_discriminator_widths_are_the_published_ones():
    with torch.device("meta"):
        disc = vitok.Discriminator(512)
    blocks = [layer for layer in disc.layers if isinstance(layer, vitok.DiscriminatorBlock)]
    assert [block.conv1.in_channels for block in blocks] == [32, 64, 128, 256, 512, 512, 512]
    assert disc.layers[-1].in_features == 512 and all(block.skip.bias is None for block in blocks)


def test_discriminator_widens_in_the_first_convolution_of_a_block_as_released():
    """At 256 pixels: channels 64 128 256 512 512 512 512, 26.3 M parameters; 24.0 M if the second one widened."""
    with torch.device("meta"):
        disc = vitok.Discriminator(256)
    widths = [64, 128, 256, 512, 512, 512, 512]
    blocks = sum(9 * a * b + b + 9 * b * b + b + a * b for a, b in zip(widths, widths[1:]))
    ends = 27 * 64 + 64 + 9 * 512**2 + 512 + 16 * 512 * 512 + 512 + 512 + 1
    assert count(disc) == blocks + ends and round(count(disc) / 1e6, 1) == 26.3


def test_initialisation():
    cfg = config(model="48x1x4-96x2x4/8")
    torch.manual_seed(0)
    model = vitok.Autoencoder(cfg)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "decoder.to_pixels":
            bound = math.sqrt(6 / sum(module.weight.shape))
            assert 0.95 * bound < module.weight.abs().max() <= bound, name
            if module.bias is not None and name != "encoder.embed":
                assert torch.equal(module.bias, torch.zeros_like(module.bias))
        if isinstance(module, nn.LayerNorm):
            assert module.weight.eq(1).all() and module.bias.eq(0).all() and module.eps == 1e-5
    bound = 192**-0.5  # one over the root of 3 q p p
    assert 0.95 * bound < model.decoder.to_pixels.weight.abs().max() <= bound
    assert 0.8 * bound < model.encoder.embed.bias.abs().max() <= bound
    assert 0 < model.decoder.colour.abs().max() <= bound
    generator = vitok.DiT(config(model="S-B/16", size=64, dit="96x2x4"), 1000)
    assert generator.pos_embed.std().item() == pytest.approx(1 / 4, rel=0.1)
    assert generator.label.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert len(generator.label.weight) == 1001


# --- The official code's numbers -----------------------------------------------------

def golden(name):
    """The official code's arrays from ../shared, or the part that tests/golden holds: the first sample's."""
    whole, kept = ROOT.parent / "shared/goldens/vitok" / f"{name}.npz", ROOT / "tests/golden" / f"vitok_{name}.npz"
    return np.load(kept if kept.exists() and not whole.exists() else shared("goldens", "vitok", whole.name))


@pytest.mark.parametrize("name, act", [("ae_image_rope1d", "gelu"), ("ae_image_rope1d", "silu"),
                                       ("ae_video_sincos3d_rope1d", "gelu")])
def test_official_auto_encoder(name, act):
    data = golden(name)
    tail = "" if act == "gelu" else "_silu"
    told = json.loads(str(data["config"]))
    size = f"{told['width']}x{{}}x{told['num_heads']}"
    cfg = vitok.Config(model=f"{size.format(1)}-{size.format(2)}/{told['tubelet_size']}x{told['patch_size']}",
                       channels=told["code_width"], size=told["img_size"], frames=told["num_frames"],
                       rope="1d", act=act)
    model = vitok.Autoencoder(cfg)
    weights = {key[2:]: torch.from_numpy(data[key]) for key in data if key.startswith("w/")}
    for part, name in (("encoder.embed", "posemb"), ("decoder.from_code", "dec_posemb")):
        if name in weights:                                   # in the release's video model, not in the paper's
            add = functools.partial(lambda table, module, given, out: out + table, weights.pop(name))
            model.get_submodule(part).register_forward_hook(add)
    model.load_state_dict(official.vitok(weights, {})[1]["tokenizer"])
    x, noise = torch.from_numpy(data["x"]), torch.from_numpy(data["eps"])
    with torch.no_grad():
        sampled, mean, logvar = model(x, noise)
        ours = {"mean": mean, "logvar": logvar, "kl": vitok.kl_term(mean, logvar), "recon_sampled": sampled,
                "z_sampled": vitok.bottleneck(mean, logvar, noise), "recon_mode": model(x)[0]}
    compared = [key for key in ours if key + tail in data]
    assert {"mean", "logvar", "kl", "recon_mode"} <= set(compared)
    for key in compared:
        torch.testing.assert_close(ours[key], torch.from_numpy(data[key + tail]), rtol=0, atol=2e-5, msg=key)


def test_official_generator():
    data = np.load(shared("goldens", "vitok", "dit_small.npz"))
    cfg = vitok.Config(model="12x1x2-12x1x2/8", size=24, channels=4, dit="36x2x3", act="gelu")
    model = vitok.DiT(cfg, 5)
    weights = {key[2:]: torch.from_numpy(data[key]) for key in data if key.startswith("w/")}
    model.load_state_dict(official.vitok_dit(weights))
    x, time, label = (torch.from_numpy(data[key]) for key in ("x", "t", "y"))
    with torch.no_grad():
        ours = {"t_freq_embedding": vitok.timestep_embedding(time), "t_embed": model.time(vitok.timestep_embedding(time)),
                "y_embed": model.label(label), "out": model(x, time, label),
                "out_null": model(x, time, torch.full_like(label, 5))}
        for key, scale in (("0", 0.0), ("1", 1.0), ("1p5", 1.5), ("3", 3.0)):
            ours[f"out_cfg_{key}"] = vitok.guided(model, x, time, label, scale)
    for key, value in ours.items():
        atol = 1e-4 if "freq" in key else 2e-5
        torch.testing.assert_close(value, torch.from_numpy(data[key]), rtol=0, atol=atol, msg=key)


# --- Command lines: bad inputs, stages, the study, export and decode ------------

def run(*words):
    common.launch(vitok.main, common.cli(vitok.Config, vitok.PRESETS, vitok.__doc__, [str(word) for word in words]),
                  vitok.check, vitok.prepare)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with tiny runs 'image' and 'video', all three stages."""
    where = tmp_path_factory.mktemp("vitok")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        few(patch, 500)
        run(*argv("vitok", name="image", steps=4, flip=True))
        run(*argv("vitok", name="video", steps=2, flip=True, frames=4, model="12x1x2-12x2x2/2x4"))
    return where


@pytest.mark.parametrize("words, message", [
    (["--frames", "2", "--model", "12x1x2-12x2x2/4x4"], "--frames 2 --size 8: not in whole tubelets"),
    (["--frames", "6", "--model", "12x1x2-12x2x2/4x4"], "--frames 6 --size 8: not in whole tubelets"),
    (["--model", "12x1x2-12x2x2/3"], "--size 8: not in whole tubelets of --model 12x1x2-12x2x2/3"),
    (["--model", "12x1x2-12x2x2/16"], "--size 8: not in whole tubelets"),
    (["--model", "S-Q/16"], "'Q' is no trunk: write S, B, L or"), (["--model", "S-B"], "write a model as"),
    (["--model", "S-B/0"], "write a model as"), (["--dit", "12x1"], "'12x1' is no trunk: write B, L, XL or"),
    (["--model", "12x0x2-12x2x2/4"], "'12x0x2' is no trunk"), (["--dit", "10x1x3"], "10x1x3: heads must be even parts"),
    (["--dit", "14x1x2"], "even parts"), (["--dit", "8x1x2"], "even parts of the width, 6 or more wide"),
    (["--dit", "12x1000x2"], "no trunk"), (["--model", "12x1x\u00b2-12x2x2/4"], "no trunk"),
    (["--model", "12x1x-2-12x2x2/4"], "write a model as"), (["--model", "12x1x0-12x2x2/4"], "no trunk"),
    (["--model", "10000008x1x2-12x2x2/4"], "bytes to train"), (["--dit", "10000008x1x2"], "bytes to train"),
    (["--size", "12"], "power of two"), (["--data", "latents:none.npz"], "none.npz"),
    (["--channels", "0"], "--channels 0: must be >= 1"), (["--eta", "2"], "--eta 2.0: must be in [0, 1]"),
    (["--classes", "3,,5"], "--classes 3,,5"), (["--stage", "decoder"], "ae.pt is missing"),
    (["--stage", "dit"], "ae.pt is missing"), (["--export", "a.npz"], "only with --sample"),
    (["--num_steps", "1"], "--num_steps 1: must be >= 2"), (["--kl", "-1"], "--kl -1.0: must be >= 0"),
    (["--cfg_scale", "inf"], "--cfg_scale inf"), (["--gan", "inf"], "--gan inf"), (["--kl", "nan"], "--kl nan"),
    (["--eta", "nan"], "--eta nan"), (["--lr_dit", "inf"], "--lr_dit inf"), (["--perceptual", "inf"], "--perceptual inf"),
    (["--sweep", " "], "--sweep ' ': write"), (["--classes", "30"], "--classes 30: labels are 0 to 9"),
    (["--classes", "1,-1"], "--classes 1,-1"), (["--stage", "ae", "--classes", "10"], "labels are 0 to 9"),
    (["--sweep", "/4"], "--sweep '/4': write"), (["--sweep", "/4:0"], "--sweep '/4:0': write"),
    (["--sweep", "/3:4"], "--size 8: not in whole tubelets"),
    (["--vgg", "none.pt"], "none.pt: no such file"), (["--data", "npz:none.npz"], "none.npz"),
    (["--batch_dit", "3", "--gpus", "2"], "--batch_dit 3: must be a multiple of 2, its parts in all processes"),
    (["--sample", "none.pt"], "none.pt: ")])
def test_bad_input_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = argv("vitok") + words if "--sample" not in words else words
    assert message in refused(run, words, capsys)


@pytest.mark.parametrize("train, test, words", [(9, None, "0 images"), (1, 2, "judge split of npz:few.npz: 1 images; a judge needs 2")])
def test_too_few_pictures_are_refused_before_training(train, test, words, tmp_path, monkeypatch, capsys):
    """Nine pictures without a split of their own leave none for the test; a judge needs two halves."""
    monkeypatch.chdir(tmp_path)
    pictures = np.zeros((12, 8, 8, 3), np.uint8)
    if test is None:
        np.savez("few.npz", images=pictures[:train], labels=np.arange(train) % 2)
    else:
        np.savez("few.npz", train_images=pictures[:train], train_labels=np.zeros(train, int),
                 test_images=pictures[:test], test_labels=np.zeros(test, int))
    assert words in refused(run, argv("vitok", data="npz:few.npz"), capsys)
    assert not (tmp_path / "runs/vitok").exists()


@pytest.mark.parametrize("count", [10, 13])
def test_the_fewest_pictures_train_all_stages(count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    np.savez("few.npz", images=pictures, labels=np.arange(count) % 2)
    run(*argv("vitok", data="npz:few.npz", steps=2))
    assert (tmp_path / "runs/vitok/demo/nearest.png").exists()


def test_clips_that_are_too_short(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("clips.npz", videos=np.zeros((20, 3, 8, 8, 3), np.uint8), labels=np.arange(20) % 2)
    words = argv("vitok", frames=4, model="12x1x2-12x2x2/2x4", data="npz:clips.npz")
    assert "clips.npz" in refused(run, words, capsys)


def folder_of(where, sides, write):
    """PATH/CLASS/NUMBER.png of two classes, one file a side, by `write(path, side)`."""
    for k, side in enumerate(sides):
        path = where / "ab"[k % 2] / f"{k:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, side)
    return f"folder:{where}"


def check_folders(where, write, capsys):
    words = argv("vitok", steps=1, save=1)
    run(*words, "--data", folder_of(where / "good", [8] * 20, write), "--name", "good")
    text = refused(run, [*words, "--data", folder_of(where / "mixed", [8] * 9 + [12, 8, 8], write)], capsys)
    assert "mixed image sizes (3, 8, 8), (3, 12, 12)" in text and "09.png" in text
    text = refused(run, [*words, "--data", folder_of(where / "large", [16] * 20, write)], capsys)
    assert "(18, 3, 16, 16) where pictures of side 8 are wanted" in text
    assert not (where / "runs/vitok/demo").exists()


def test_folders_of_one_size_only(tmp_path, monkeypatch, capsys):
    """Files that hold their side as text stand for pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "decoded", lambda sources, size: (
        np.full((3, size or side, size or side), 7, np.uint8) for side in (int(path.read_text()) for path in sources)))
    check_folders(tmp_path, lambda path, side: path.write_text(str(side)), capsys)


@pytest.mark.optional
def test_folders_of_pictures_of_one_size_only(tmp_path, monkeypatch, capsys):
    from PIL import Image
    monkeypatch.chdir(tmp_path)
    check_folders(tmp_path, lambda path, side: Image.new("RGB", (side, side), (200, 9, 9)).save(path), capsys)


def test_latents_are_no_pictures(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    np.savez("square.npz", latents=np.zeros((4, 3, 8, 8), np.float16), labels=np.zeros(4, int), scale=1.0)
    assert "pictures of side 8 are wanted" in refused(run, argv("vitok", data="latents:square.npz"), capsys)


def test_latents_of_another_shape_and_another_methods_file(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    np.savez("wide.npz", latents=np.zeros((4, 3, 2, 2), np.float16), labels=np.zeros(4, int), scale=1.0)
    text = refused(run, ["--sample", "runs/vitok/image/ae.pt", "--decode", "wide.npz"], capsys)
    assert "--decode wide.npz: (4, 3) tokens and channels, (4, 2) are wanted" in text
    torch.save({"method": "arflow", "config": {}}, "other.pt")
    assert "other.pt" in refused(run, ["--sample", "other.pt"], capsys)
    assert "--classes 12: labels are 0 to 9" in refused(run, ["--sample", "runs/vitok/image/dit.pt", "--classes", "12"], capsys)
    assert "--model" in refused(run, ["--sample", "runs/vitok/image/dit.pt", "--model", "S-B/16"], capsys)


def test_a_run_leaves_all_stages_and_pictures(trained):
    for name, animated in (("image", False), ("video", True)):
        where = trained / "runs/vitok" / name
        for stage in vitok.STAGES:
            assert (where / f"{stage}.pt").exists() and (where / f"log-{stage}.jsonl").exists()
        for picture in ("reconstructions.png", "samples.png", "nearest.png"):
            assert (b"acTL" in (where / picture).read_bytes()) == animated


def test_stages_one_by_one_equal_all_at_once(trained, monkeypatch):
    monkeypatch.chdir(trained)
    for stage in vitok.STAGES:
        run(*argv("vitok", name="single", steps=4, flip=True, stage=stage))
    for stage in vitok.STAGES:
        one, all_ = (torch.load(f"runs/vitok/{name}/{stage}.pt", weights_only=True)["state"] for name in ("single", "image"))
        for part in one:
            for key, value in one[part].items():
                assert not torch.is_tensor(value) or torch.equal(value, all_[part][key]), (stage, part, key)


def test_stage_two_leaves_the_encoder_and_its_average_decodes(trained):
    ae, decoder, dit = (torch.load(trained / f"runs/vitok/image/{stage}.pt", weights_only=True)["state"]
                        for stage in vitok.STAGES)
    for key, value in ae["tokenizer"].items():
        side, name = key.split(".", 1)
        assert torch.equal(value, decoder[side][name]) == (side == "encoder"), key
        wanted = decoder["ema"][key.removeprefix("decoder.")] if key.startswith("decoder.") else value
        assert torch.equal(dit["tokenizer"][key], wanted), key


def idle(monkeypatch, loaded=()):
    """Stages that do no step: a list of (stage, total steps, folder) and of what they load grow instead."""
    begun = []
    monkeypatch.setattr(common.Run, "steps", lambda self, start: begun.append((self.stage, self.total, self.folder.name)) or [])
    monkeypatch.setattr(vitok, "load", lambda cfg, path: loaded.append(path.name) or (
        vitok.Autoencoder(cfg).requires_grad_(False), None, []))
    few(monkeypatch, 20)
    return begun


@pytest.mark.parametrize("words, steps", [
    ([], [600, 60, 1500]), (["--steps", "7"], [7, 7, 7]), (["--steps", "600"], [600, 600, 600]),
    (["--steps", "7", "--steps_dit", "9"], [7, 7, 9])])
def test_steps_given_override_every_stage(words, steps, tmp_path, monkeypatch):
    """Also where they equal the preset's own number."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "judge", lambda split, role: common.Judge(3, 32, 10).requires_grad_(False))
    monkeypatch.setattr(common, "require_stage", lambda cfg, stage: common.folder(cfg) / f"{stage}.pt")
    begun = idle(monkeypatch, [])
    cfg = common.cli(vitok.Config, vitok.PRESETS, "", ["--preset", "demo", *words])
    for train_stage in vitok.STAGES.values():
        train_stage(cfg)
    assert begun == [(stage, total, "demo") for stage, total in zip(vitok.STAGES, steps)]


def test_a_stage_begins_where_the_one_before_it_ended(tmp_path, monkeypatch):
    """ae.pt for stage decoder, for dit decoder.pt where there is one; also when the new run goes to another folder."""
    monkeypatch.chdir(tmp_path)
    loaded = []
    begun = idle(monkeypatch, loaded)
    monkeypatch.setattr(vitok, "require_same_encoder", lambda cfg, path: None)          # the files are empty
    where = tmp_path / "runs/vitok/demo"
    where.mkdir(parents=True)
    (where / "ae.pt").touch()
    vitok.train_dit(config(name="demo", steps=2, batch=4))
    (where / "decoder.pt").touch()
    (where / "dit.pt").touch()
    vitok.train_decoder(config(name="demo", steps=2, batch=4))
    vitok.train_dit(config(name="demo", steps=2, batch=4))
    assert loaded == ["ae.pt", "ae.pt", "decoder.pt"] and [name for _, _, name in begun] == ["demo", "demo-2", "demo-2"]


def test_a_stage_whose_earlier_stage_changed_starts_anew(tmp_path, monkeypatch, capsys):
    """More steps for a finished run: stage ae goes on; the others begin again, and nothing holds the old encoder."""
    monkeypatch.chdir(tmp_path)
    few(monkeypatch, 20)
    run(*argv("vitok", steps=2, save=2))
    run("--resume", "--steps", "4")
    assert capsys.readouterr().out.count("starting anew") == 2
    state = {stage: torch.load(f"runs/vitok/demo/{stage}.pt", weights_only=True) for stage in vitok.STAGES}
    assert [saved["step"] for saved in state.values()] == [4, 4, 4]
    for key, value in state["ae"]["state"]["tokenizer"].items():
        if key.startswith("encoder."):
            assert torch.equal(value, state["decoder"]["state"]["encoder"][key.removeprefix("encoder.")])
            assert torch.equal(value, state["dit"]["state"]["tokenizer"][key])
    assert (tmp_path / "runs/vitok/demo/dit-of-another-demo.pt").exists()
    run("--resume", "--stage", "ae", "--steps", "6")                    # now decoder.pt stands behind another encoder
    line = refused(run, ["--resume", "--stage", "dit", "--steps", "6"], capsys)
    assert "decoder.pt: was trained behind another ae.pt" in line
    assert torch.load("runs/vitok/demo/dit.pt", weights_only=True)["step"] == 4


def shrunk(name):
    """A preset's fields with tiny trunks, few steps and small pictures, and all else as it is."""
    fields = {**vars(vitok.Config()), "preset": name, **vitok.PRESETS[name]}
    tubelet = fields["model"].split("/")[1]
    fields.update(model=f"12x1x2-12x2x2/{tubelet}", dit="12x1x2", size=fields["size"] // 256 * 32 or 16, disc=4, count=10,
                  num_steps=3, batch=4, batch_decoder=2 * bool(fields["batch_decoder"]), log=2, save=2, name="tiny",
                  steps=2, steps_decoder=0, steps_dit=3 * bool(fields["steps_dit"]), data="npz:real.npz" if
                  fields["data"] == "cifar10" else fields["data"], batch_dit=2 * bool(fields["batch_dit"]))
    return fields | {"sweep": fields["sweep"].replace("16,32", "3").replace(",8,16", "")}


def test_every_preset_runs_all_its_phases(tmp_path, monkeypatch):
    """Shrunk in width, steps and pixels but not in kind; what is then alike runs once."""
    monkeypatch.chdir(tmp_path)
    pictures = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    np.savez("real.npz", images=pictures, labels=np.arange(20) // 10)
    few(monkeypatch, 20)
    done = set()
    for name in vitok.PRESETS:
        cfg = vitok.Config(**shrunk(name))
        kind = repr(dataclasses.replace(cfg, preset=""))
        if kind not in done:
            done.add(kind)
            cfg.name = f"tiny{len(done)}"
            common.launch(vitok.main, cfg, vitok.check, vitok.prepare)
            if not cfg.sweep:
                assert {path.stem for path in (tmp_path / f"runs/vitok/{cfg.name}").glob("*.pt")} == set(vitok.STAGES)
    assert 6 <= len(done) <= 9


def test_every_preset_is_valid_and_published_counts_hold():
    for name in vitok.PRESETS:
        cfg = common.cli(vitok.Config, vitok.PRESETS, "", ["--preset", name])
        vitok.check(cfg)
    published = {"S-S/16": 86.6, "B-B/16": 171.6, "L-L/16": 767.4, "S-B/16": 129.0, "S-L/16": 426.8, "S-B/4x8": 129.0}
    for name, millions in published.items():
        plan = vitok.count_costs(common.cli(vitok.Config, vitok.PRESETS, "", ["--preset", name]))
        count = plan["encoder parameters"] + plan["decoder parameters"]
        assert count / 1e6 == pytest.approx(millions, rel=0.0035)


def test_plan_prints_the_published_figures(capsys):
    run("--preset", "S-B/16@512", "--plan")
    lines = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.strip().split("\n"))
    lines = {name.strip(): float(value.replace(",", "")) for name, value in lines.items()}
    assert (lines["tokens"], lines["E"], lines["pixels per float"]) == (1024, 16384, 48)
    assert round(lines["MACs"] / 1e9, 1) == 160.8 and lines["MACs"] == lines["encoder MACs"] + lines["decoder MACs"]
    assert lines["parameters"] == lines["encoder parameters"] + lines["decoder parameters"]


def test_a_sweep_of_two_sizes_fits_no_line(tmp_path, monkeypatch, capsys):
    """Three points, but of two values of E: two points lie on any line."""
    monkeypatch.chdir(tmp_path)
    run(*argv("vitok", steps=1, sweep="12x1x2-12x1x2/4:1,2 /2:1", count=12))
    fitted = capsys.readouterr().out
    assert fitted.count("dB per doubling") == 2, "E of three values, MACs of three"
    run(*argv("vitok", steps=1, sweep="12x1x2-12x1x2/4:1,2", count=12, name="two"))
    out = capsys.readouterr().out
    assert out.count("no fit, for want of three values") == 2 and "doubling" not in out


def test_sweep_prints_a_table_and_a_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr(vitok, "film", lambda *args: drawn.append(args))
    run(*argv("vitok", steps=2, sweep="12x1x2-12x1x2/2:1 /4:1,2", count=12))
    text = capsys.readouterr().out
    assert "PSNR on log2 E" in text and "PSNR on log2 MACs" in text
    rows = [line.split() for line in text.split("\n") if line.lstrip().startswith("12x1x2-")]
    assert [(row[0], *map(int, row[1:3])) for row in rows] == [
        ("12x1x2-12x2x2/4", 1, 4), ("12x1x2-12x2x2/4", 2, 8), ("12x1x2-12x1x2/2", 1, 16)]
    names = ["demo-12x1x2-12x2x2-4-c1", "demo-12x1x2-12x2x2-4-c2", "demo-12x1x2-12x1x2-2-c1"]
    assert {path.name for path in (tmp_path / "runs/vitok").iterdir()} == {"demo", *names}
    # the picture: a column of originals, then one a code, for rising E
    ((path, x, titles, heads),) = drawn
    assert path.name == "sweep.png" and heads == ["original", "E4 p4", "E8 p4", "E16 p2"] and len(titles) == 8
    x = x.unflatten(0, (8, 4))
    cfg = common.cli(vitok.Config, vitok.PRESETS, "", ["--sample", f"runs/vitok/{names[1]}/ae.pt"])
    test = vitok.clips(vitok.open_split(cfg, "test", 12), np.arange(8))
    assert torch.equal(x[:, 0], test)
    torch.testing.assert_close(x[:, 2], vitok.load(cfg, cfg.sample)[0](test)[0].clamp(-1, 1))
    run("--resume", "--name", "demo")                                                  # a finished study shows its table
    assert capsys.readouterr().out.splitlines()[-6:] == text.splitlines()[-6:]


def cells(x):
    """Clips (M, 3, 1, H, W) as the bytes that a picture shows of them."""
    return common.to_uint8(x)[:, :, 0].numpy()


def test_figures_and_pictures_of_a_run_that_is_not_short(trained, monkeypatch, capsys):
    """V28, a PSNR a clip and then the mean; the ruler's accuracy on --count samples, so many of each class, on as many
    reconstructions and on the test images themselves. Which judge, which split and which weights is seen, too."""
    monkeypatch.chdir(trained)
    few(monkeypatch, 130)
    asked, shown = [], {}
    opened = vitok.open_split
    monkeypatch.setattr(vitok, "open_split", lambda cfg, split, *count: asked.append(split) or opened(cfg, split, *count))
    monkeypatch.setattr(common, "judge", lambda split, role: asked.append(role) or (
        lambda x: F.one_hot((x.mean((1, 2, 3)) * 1e5).long() % 10, 10).float()))
    monkeypatch.setattr(vitok, "film", lambda path, x, rows, heads=(): shown.setdefault(path.name, x))
    cfg = common.cli(vitok.Config, vitok.PRESETS, "", ["--sample", "runs/vitok/image/dit.pt", "--count", "120"])
    cfg = dataclasses.replace(cfg, steps=100, sample="")
    result = vitok.report(cfg, trained / "runs/vitok/image/dit.pt")
    assert asked == ["judge", "ruler", "test", "train"] and list(result) == ["psnr", "accuracy_decoded", "accuracy_real", "accuracy"]
    test, saved = opened(cfg, "test", 120), torch.load("runs/vitok/image/dit.pt", weights_only=True)["state"]
    tokenizer, generator = vitok.Autoencoder(cfg), vitok.DiT(cfg, 10)
    tokenizer.load_state_dict(saved["tokenizer"])
    generator.load_state_dict(saved["ema"])                                            # the averaged one
    x, labels = vitok.clips(test, np.arange(120)), torch.arange(10).repeat_interleave(12)
    with torch.no_grad():
        y = tokenizer(x)[0].clamp(-1, 1)
        z = [vitok.sample(generator, part, common.make_generator(0, i, "sample"), 3, 2.0)
             for i, part in enumerate(labels.split(100))]
        drawn = tokenizer.decoder(torch.cat(z)).clamp(-1, 1)
    want = [10 * math.log10(4 / np.mean((a - b) ** 2)) for a, b in zip(x.double().numpy(), y.double().numpy())]
    assert result["psnr"] == pytest.approx(np.mean(want), rel=1e-5)
    for name, images, classes in (("accuracy_decoded", y, test.labels), ("accuracy_real", x, test.labels), ("accuracy", drawn, labels)):
        guessed = (images[:, :, 0].mean((1, 2, 3)) * 1e5).long() % 10
        assert result[name] == pytest.approx((guessed == torch.as_tensor(classes)).double().mean().item(), abs=1e-6), name
    assert (cells(shown["reconstructions.png"]) == cells(torch.cat((x[:10], y[:10])))).all()
    assert (cells(shown["samples.png"]) == cells(drawn.unflatten(0, (10, 12))[:, :8].flatten(0, 1))).all()
    first, train = drawn[::12], vitok.clips(opened(cfg, "train"), np.arange(130))
    near = train[torch.cdist(first.flatten(1), train.flatten(1)).argmin(1)]
    assert (cells(shown["nearest.png"]) == cells(torch.cat((first, near)))).all()
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("figures, code", [((30, 1), 0), ((30, 0.0), 1), ((9, 1), 1)])
def test_the_demos_target_counts_in_the_demo_alone(figures, code, monkeypatch, capsys):
    monkeypatch.setattr(common, "run_stages", lambda cfg, stages: None)
    monkeypatch.setattr(vitok, "report", lambda cfg, path: dict(zip(("psnr", "accuracy"), figures)))
    monkeypatch.setattr(common.Run, "trained", True)
    demo = common.cli(vitok.Config, vitok.PRESETS, "", [])
    assert vitok.train(demo) == code and ("MISSED" in capsys.readouterr().out) == bool(code)
    assert vitok.train(dataclasses.replace(demo, seed=1)) == 0 and not capsys.readouterr().out
    monkeypatch.setattr(common.Run, "trained", False)
    assert vitok.train(demo) == 0, "a finished run only shows its result"
    monkeypatch.setattr(common, "rank", lambda: 1)
    assert vitok.train(demo) == 0


def test_every_checkpoint_gives_averaged_weights(trained, monkeypatch):
    """Of decoder.pt the averaged decoder, of dit.pt the averaged generator; of ae.pt, which averages nothing, what it has."""
    monkeypatch.chdir(trained)
    for stage, parts in (("ae", {"tokenizer": "tokenizer"}), ("decoder", {"ema": "decoder", "encoder": "encoder"}),
                         ("dit", {"tokenizer": "tokenizer", "ema": "generator"})):
        cfg = common.cli(vitok.Config, vitok.PRESETS, "", ["--sample", f"runs/vitok/image/{stage}.pt"])
        tokenizer, generator, _ = vitok.load(cfg, cfg.sample)
        state = torch.load(cfg.sample, weights_only=True)["state"]
        own = {"tokenizer": tokenizer, "decoder": tokenizer.decoder, "encoder": tokenizer.encoder, "generator": generator}
        for name, mine in parts.items():
            assert all(torch.equal(value, own[mine].state_dict()[key]) for key, value in state[name].items())
        if stage != "ae":
            raw = state["decoder" if stage == "decoder" else "model"]
            assert any(not torch.equal(value, state["ema"][key]) for key, value in raw.items())


def test_pictures_of_clips_are_animated_and_of_equal_rows(tmp_path):
    vitok.film(tmp_path / "a.png", torch.zeros(6, 3, 4, 8, 8), ["one", "two"], ["a", "b", "c"])
    raw = (tmp_path / "a.png").read_bytes()
    assert raw.count(b"fcTL") == 4
    vitok.film(tmp_path / "b.png", torch.zeros(6, 3, 1, 8, 8), ["one", "two"])
    assert b"acTL" not in (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("name, shape", [("image", (2, 2, 2)), ("video", (2, 2, 2, 2))])
def test_export_and_decode(trained, name, shape, monkeypatch):
    """The file holds the encoder's mean and logvar; decoding the means is reconstructing the images."""
    monkeypatch.chdir(trained)
    run("--sample", f"runs/vitok/{name}/decoder.pt", "--export", f"{name}.npz")
    found = data.open_data(f"latents:{name}.npz", size=0)
    packed = np.load(f"{name}.npz")
    assert found.images.shape[1:] == shape and found.images.dtype == np.float16 and len(found) == 500
    assert "latents_flip" in packed and packed["logvar"].shape == packed["latents"].shape
    cfg = common.cli(vitok.Config, vitok.PRESETS, "", ["--sample", f"runs/vitok/{name}/decoder.pt"])
    tokenizer, _, _ = vitok.load(cfg, cfg.sample)
    x = vitok.clips(vitok.open_split(cfg, "train"), np.arange(3))
    for tail, flipped in (("", x), ("_flip", x.flip(-1))):
        for key, value in zip(("latents", "logvar"), tokenizer.encoder(flipped)):
            want = value.transpose(1, 2).reshape(3, *shape)
            np.testing.assert_allclose(packed[key + tail][:3], want.numpy(), rtol=2e-3, atol=2e-3)
    z = found.latents(np.arange(len(found)), np.zeros(len(found), bool), torch.randn(found.images.shape))
    assert z.std().item() == pytest.approx(1, abs=0.05)                                # what the scale is for
    np.savez("few.npz", latents=packed["latents"][:3], labels=packed["labels"][:3], scale=packed["scale"])
    run("--sample", f"runs/vitok/{name}/decoder.pt", "--decode", "few.npz")
    decoded = np.load(f"runs/vitok/{name}/samples/decoded.npz")["arr_0"]
    want = common.to_uint8(vitok.as_frames(tokenizer(x)[0])).permute(0, 2, 3, 1).numpy()
    assert decoded.shape == want.shape and np.abs(decoded.astype(int) - want).max() <= 1


def test_export_and_decode_take_blocks_of_64(trained, monkeypatch):
    monkeypatch.chdir(trained)
    few(monkeypatch, 200)
    seen = []
    monkeypatch.setattr(vitok.Encoder, "forward", lambda self, x, plain=vitok.Encoder.forward: seen.append(len(x)) or plain(self, x))
    run("--sample", "runs/vitok/image/ae.pt", "--export", "deep/blocks.npz")
    assert sum(seen) == 2 * 200 and max(seen) == 64                                    # plain and mirrored
    assert [path.name for path in (trained / "deep").iterdir()] == ["blocks.npz"]
    assert np.load("deep/blocks.npz")["class_names"].tolist() == data.SHAPES
    monkeypatch.setattr(vitok.Decoder, "forward", lambda self, z, plain=vitok.Decoder.forward: seen.append(len(z)) or plain(self, z))
    del seen[:]
    run("--sample", "runs/vitok/image/ae.pt", "--decode", "deep/blocks.npz", "--out", "pictures", "--export", "deep/pngs")
    assert sum(seen) == 200 + 8 and max(seen) == 64
    assert len(list((trained / "deep/pngs").iterdir())) == 200 and (trained / "pictures/decoded.png").exists()


def test_memory_of_an_export_does_not_grow_with_the_data(trained, monkeypatch):
    """Four times the pictures, drawn when they are asked for, and not even twice the memory at its peak."""
    monkeypatch.chdir(trained)

    class Endless:
        def __init__(self, count):
            self.labels, self.classes, self.count = np.zeros(count, int), ["one"], count

        def __len__(self):
            return self.count

        def pixels(self, index, device="cpu"):
            return torch.zeros(len(index), 3, 8, 8)

    peaks = []
    for count in (2_000, 8_000):
        monkeypatch.setattr(vitok, "open_split", lambda cfg, split, count=count: Endless(count))
        tracemalloc.start()
        run("--sample", "runs/vitok/image/ae.pt", "--export", "endless.npz")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0] and len(np.load("endless.npz")["latents"]) == 8_000


@pytest.mark.parametrize("name, frames", [("image", 1), ("video", 4)])
def test_samples_are_kept_where_export_says(name, frames, trained, monkeypatch):
    monkeypatch.chdir(trained)
    words = ["--sample", f"runs/vitok/{name}/dit.pt", "--count", "25", "--classes", "3,7"]
    run(*words, "--export", "drawn.npz")
    run(*words, "--export", f"drawn/{name}")
    kept = np.load("drawn.npz")["arr_0"]
    assert kept.shape == (25 * frames, 8, 8, 3) and len(list((trained / "drawn" / name).glob("*.png"))) == 25 * frames
    cfg = common.cli(vitok.Config, vitok.PRESETS, "", words)
    tokenizer, generator, names = vitok.load(cfg, cfg.sample)
    assert names == data.SHAPES
    labels = torch.tensor([3, 7] * 12 + [3])
    z = vitok.sample(generator, labels, common.make_generator(0, 0, "sample"), 3, 2.0)
    want = common.to_uint8(vitok.as_frames(tokenizer.decoder(z))).permute(0, 2, 3, 1)
    assert (kept == want.numpy()).all()


@pytest.mark.parametrize("stage, words", [("dit", ["--export", "two"]), ("dit", []), ("ae", ["--export", "two.npz"]), ("ae", [])])
def test_other_processes_make_their_blocks_and_write_nothing(stage, words, trained, tmp_path, monkeypatch, capsys):
    """Rank 1's share is made alike; rank 0 alone writes and prints."""
    monkeypatch.chdir(tmp_path)
    few(monkeypatch, 150)
    made = []

    def all_blocks(make, count, size=100, start=0):
        for first in range(start, count, size):
            made.append((first, min(count, first + size)))
            yield make(*made[-1])

    monkeypatch.setattr(common, "share_blocks", all_blocks)
    monkeypatch.setattr(common, "rank", lambda: 1)
    run("--sample", trained / f"runs/vitok/image/{stage}.pt", "--count", "120", "--out", "pictures", *words)
    assert made == ([(0, 80)] if stage == "dit" and not words else [(0, 64), (64, 128), (128, 150)] if words and stage == "ae"
                    else [(0, 100), (100, 120)])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()] and not capsys.readouterr().out


def recipe():
    """The README's command lines for latents of one's own, as (method, words)."""
    lines = (ROOT / "README.md").read_text().split("from ViTok to ARFlow and back")[1].split("```")[1].strip().split("\n")[1:]
    return [(words[1].removesuffix(".py"), words[2:]) for words in map(str.split, lines)]


def test_recipe_vitok_then_arflow_then_decode(tmp_path, monkeypatch):
    """The README's lines as they stand, with tiny models; then once more with an ARFlow that samples the very
    latents of the training images: what comes out must be their reconstructions."""
    import arflow
    monkeypatch.chdir(tmp_path)
    tiny = {"vitok": argv("vitok", size=16, channels=8, steps=2), "arflow": argv("arflow", steps=2)}
    lines = recipe()
    for method, words in lines:
        module = {"vitok": vitok, "arflow": arflow}[method]
        words = words if "--sample" in words else tiny[method] + words
        common.launch(module.main, common.cli(module.Config, module.PRESETS, module.__doc__, words), module.check, module.prepare)
    assert [method for method, _ in lines] == ["vitok", "vitok", "arflow", "arflow", "vitok"]
    first = np.load("runs/vitok/demo/samples/decoded.npz")["arr_0"]
    assert first.shape == (40, 16, 16, 3)
    found = data.open_data("latents:shapes.npz")
    exact = found.latents(np.arange(40), np.zeros(40, bool), torch.zeros(40, 8, 4, 4))
    monkeypatch.setattr(arflow, "sample_many", lambda model, cfg, labels: (exact, None))
    for (_, words), module in zip(lines[3:], (arflow, vitok)):
        common.launch(module.main, common.cli(module.Config, module.PRESETS, module.__doc__, words), module.check, module.prepare)
    cfg = common.cli(vitok.Config, vitok.PRESETS, "", ["--sample", "runs/vitok/demo/decoder.pt"])
    x = vitok.clips(vitok.open_split(cfg, "train", 40), np.arange(40))
    want = common.to_uint8(vitok.load(cfg, cfg.sample)[0](x)[0][:, :, 0]).permute(0, 2, 3, 1).numpy()
    decoded = np.load("runs/vitok/demo/samples/decoded.npz")["arr_0"]
    assert np.abs(decoded.astype(int) - want).max() <= 1 and (decoded != first).any()


@pytest.mark.parametrize("stage", ["ae", "dit"])
def test_sampling_never_touches_the_run(trained, stage, monkeypatch):
    monkeypatch.chdir(trained)
    where = trained / "runs/vitok/image"
    before = {path: path.read_bytes() for path in where.iterdir() if path.is_file()}
    run("--sample", f"runs/vitok/image/{stage}.pt", "--count", "20")
    assert before == {path: path.read_bytes() for path in where.iterdir() if path.is_file()}
    assert (where / "samples" / {"ae": "reconstructions.png", "dit": "samples.png"}[stage]).exists()


# --- Training loops by value -------------------------------------------------------

LOOPS = dict(size=8, model="12x1x2-12x2x2/4", channels=2, disc=4, dit="12x1x2", batch=4, batch_decoder=6, batch_dit=8, lr=0.5,
             lr_disc=0.4, lr_dit=0.3, muon=0.0, gan=0.5, kl=0.3, perceptual=0.7, label_dropout=0.4, flip=True, ema=0.9, steps=20,
             steps_ae=34, steps_decoder=20, steps_dit=20, num_steps=3, count=10, seed=3, log=5, save=100)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def looped(tmp_path_factory):
    """A folder with one run of all stages in float64, through every change of phase."""
    where = tmp_path_factory.mktemp("looped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        few(patch, 50)
        averaged = []                                                   # numbers whose gradients the processes average
        patch.setattr(common, "average_gradients", lambda params: averaged.append(sum(p.numel() for p in params)))
        torch.set_default_dtype(torch.float64)
        try:
            run(*argv("vitok", **LOOPS, name="whole"))
        finally:
            torch.set_default_dtype(torch.float32)
        (where / "averaged.json").write_text(json.dumps(averaged))
    return where


def ended(stage):
    return torch.load(f"runs/vitok/whole/{stage}.pt", weights_only=True)["state"]


def close(model, state):
    assert model.state_dict().keys() == state.keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=1e-9, msg=name)


def begin(stage):
    """Configuration, data, features and the stage's random state, as a run finds them."""
    cfg = common.cli(vitok.Config, vitok.PRESETS, "", argv("vitok", **LOOPS, name="whole"))
    torch.manual_seed(common.make_generator(3, 0, f"{stage} weights").initial_seed())
    return cfg, vitok.open_split(cfg, "train", 50)


def rate_of(opt, lr):
    for group in opt.param_groups:
        group["lr"] = lr


def adamw(model):
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=1e-4)


def cosine(done, warmup, low):
    """Linear from `low` to 1 in the warm-up, then half a cosine down to `low` again."""
    up = done / warmup if done < warmup else (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2
    return low + (1 - low) * up


def test_stage_ae_by_a_plain_loop(looped, float64, monkeypatch):
    """V11, V12 and V26: 34 steps, of which the second is the warm-up's last (3 %), then the cosine to its end."""
    monkeypatch.chdir(looped)
    cfg, pictures = begin("ae")
    model = vitok.Autoencoder(cfg)
    opt, teacher = adamw(model), vitok.perceptual_features(cfg, "cpu")
    for step in range(34):
        (x, _), draws = vitok.draw(pictures, cfg, step, torch.device("cpu"), "ae")
        rate_of(opt, 0.5 * 4 / 256 * cosine(step / 34, 0.03, 0.025))
        recon, mean, logvar = model(x, draws["noise"])
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = (recon - x).square().mean() + 0.3 * kl + 0.7 * vitok.lpips(recon, x, teacher).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    close(model, ended("ae")["tokenizer"])


def test_stage_decoder_by_a_plain_loop(looped, float64, monkeypatch):
    """V14 to V16: the GAN counts from step 2 (5 % of 20) on and fully from 12; the discriminator learns from step 0, its rate
    rises in 5 steps (25k of 100k); both see the decoder before its step; the average follows both."""
    monkeypatch.chdir(looped)
    cfg, pictures = begin("decoder")
    model, disc = vitok.Autoencoder(cfg), vitok.Discriminator(8, 4)
    model.load_state_dict(ended("ae")["tokenizer"])
    ema = {name: value.clone() for name, value in model.decoder.named_parameters()}
    opt, opt_disc, teacher = adamw(model.decoder), adamw(disc), vitok.perceptual_features(cfg, "cpu")
    for step in range(20):
        (x, _), draws = vitok.draw(pictures, cfg, step, torch.device("cpu"), "decoder")
        rate_of(opt, 0.5 * 6 / 256 * cosine(step / 20, 0.03, 0.025))
        rate_of(opt_disc, 0.4 * 6 / 256 * min((step + 1) / 5, 1))
        recon = model(x, draws["noise"])[0]
        weight = 0.5 * min(max((step - 1) / 10, 0), 1)
        loss = (recon - x).square().mean() + 0.7 * vitok.lpips(recon, x, teacher).mean() - weight * disc(recon).mean()
        grads = torch.autograd.grad(loss, list(model.decoder.parameters()), retain_graph=True)
        hinge = (1 - disc(x)).relu().mean() / 2 + (1 + disc(recon.detach())).relu().mean() / 2
        for optimizer, net, found in ((opt, model.decoder, grads), (opt_disc, disc, torch.autograd.grad(hinge, list(disc.parameters())))):
            for parameter, grad in zip(net.parameters(), found):
                parameter.grad = grad
            optimizer.step()
        ema = {name: 0.9 * ema[name] + 0.1 * value.detach() for name, value in model.decoder.named_parameters()}
    state = ended("decoder")
    for net, name in ((model.encoder, "encoder"), (model.decoder, "decoder"), (disc, "disc")):
        close(net, state[name])
    trained = sum(p.numel() for net in (model.decoder, disc) for p in net.parameters())
    assert json.loads((looped / "averaged.json").read_text())[34:54] == [trained] * 20              # behind 34 of stage ae
    torch.testing.assert_close(ema, dict(state["ema"]), rtol=0, atol=1e-9)


def test_stage_dit_by_a_plain_loop(looped, float64, monkeypatch):
    """V18, V19 and V26: codes with noise from the averaged auto-encoder, labels lost at .4, warm-up of 2 steps (10 %), average."""
    monkeypatch.chdir(looped)
    cfg, pictures = begin("dit")
    encoder = vitok.Autoencoder(cfg).encoder
    encoder.load_state_dict(ended("decoder")["encoder"])
    model = vitok.DiT(cfg, 10)
    ema, opt, lost = {name: value.detach().clone() for name, value in model.named_parameters()}, adamw(model), 0
    for step in range(20):
        (x, y), draws = vitok.draw(pictures, cfg, step, torch.device("cpu"), "dit")
        rate_of(opt, 0.3 * 8 / 256 * cosine(step / 20, 0.1, 0.075))
        with torch.no_grad():
            mean, logvar = encoder(x)
        z, bar = mean + logvar.exp().sqrt() * draws["noise"], vitok.alphas_cumprod[draws["time"]].view(-1, 1, 1)
        noisy, label = bar.sqrt() * z + (1 - bar).sqrt() * draws["eps"], torch.where(draws["drop"], 10, y)
        noise, v = model(noisy, draws["time"], label).chunk(2, 2)
        loss = (noise - draws["eps"]).square().mean()
        loss = loss + vitok.variational_bound(z, noisy, noise.detach(), v, draws["time"]).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        ema = {name: 0.9 * ema[name] + 0.1 * value.detach() for name, value in model.named_parameters()}
        lost += draws["drop"].sum().item()
    state = ended("dit")
    close(model, state["model"])
    torch.testing.assert_close(ema, dict(state["ema"]), rtol=0, atol=1e-9)
    assert 40 < lost < 90                                                              # of 160


@pytest.mark.parametrize("build", [vitok.Autoencoder, lambda cfg: vitok.DiT(cfg, 5)], ids=("Autoencoder", "DiT"))
def test_muon_takes_the_blocks_matrices_at_its_own_rate(build):
    """All else stays with AdamW, and nothing is left to Muon where the paper's optimizer is asked for."""
    model = build(config())
    assert type(vitok.optimizer(model, config())) is torch.optim.AdamW
    opt = vitok.optimizer(model, config(), 3.0)
    common.set_learning_rate(opt, 0.5)
    rates = {parameter: group["lr"] for group in opt.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[parameter] == (1.5 if ".blocks." in name and parameter.ndim == 2 else 0.5), name
    assert {group["weight_decay"] for group in opt.param_groups} == {1e-4}


@pytest.mark.parametrize("stage", ["ae", "decoder", "dit"])
def test_parts_of_a_batch_learn_what_the_whole_learns(stage, looped, float64, monkeypatch):
    """--accumulate, in all stages: also the discriminator's parts; what is logged is the mean over them."""
    monkeypatch.chdir(looped)
    few(monkeypatch, 50)
    for other in ("ae", "decoder"):
        (looped / f"runs/vitok/parts-{stage}").mkdir(parents=True, exist_ok=True)
        if stage != other:
            (looped / f"runs/vitok/parts-{stage}/{other}.pt").write_bytes((looped / f"runs/vitok/whole/{other}.pt").read_bytes())
    cfg = common.cli(vitok.Config, vitok.PRESETS, "", argv("vitok", **LOOPS | dict(name=f"parts-{stage}", stage=stage, accumulate=2)))
    vitok.STAGES[stage](cfg)
    state = torch.load(f"runs/vitok/parts-{stage}/{stage}.pt", weights_only=True)["state"]
    for part, tensors in ended(stage).items():
        if not part.startswith("opt"):
            for name, value in tensors.items():
                torch.testing.assert_close(state[part][name], value, rtol=0, atol=1e-9, msg=f"{part} {name}")
    logs = [[json.loads(line) for line in open(f"runs/vitok/{name}/log-{stage}.jsonl")] for name in ("whole", f"parts-{stage}")]
    for one, two in zip(*logs):
        assert [one[key] for key in ("step", "loss")] == pytest.approx([two[key] for key in ("step", "loss")], abs=1e-9)


def test_a_stage_draws_what_it_uses_and_nothing_depends_on_anything(monkeypatch):
    """By name; of named streams that differ by seed, step and stage; flips, drops, times, noise and eps independent."""
    cfg = config(batch=4096, channels=1, size=16, objects=1, flip=True, label_dropout=0.3)
    seen = []

    class Pictures:
        labels = np.arange(500) % 10

        def __len__(self):
            return 500

        def pixels(self, index, device):
            seen.append((index, device))
            return torch.from_numpy(index[:, None, None, None] * np.array([0.001, 0.002], np.float32)).expand(-1, 3, 1, 2)

    def drawn(stage, step=5, **fields):
        return vitok.draw(Pictures(), dataclasses.replace(cfg, **fields), step, torch.device("cpu"), stage)

    assert list(drawn("ae")[1]) == list(drawn("decoder")[1]) == ["noise"]
    assert sorted(drawn("ae", masked=True)[1]) == ["length", "noise"]
    (x, y), draws = drawn("dit")
    assert sorted(draws) == ["drop", "eps", "noise", "time"] and seen[-1][1] == torch.device("cpu")
    index = torch.from_numpy(seen[-1][0])
    assert torch.equal(y, index % 10)
    flipped = x[:, 0, 0, 0, 0] > x[:, 0, 0, 0, 1]
    torch.testing.assert_close(x[:, 0, 0, 0].sum(1), index * 0.003, rtol=1e-5, atol=1e-6)
    facts = {"index": index, "flip": flipped, "drop": draws["drop"], "time": draws["time"],
             "noise": draws["noise"].mean((1, 2)), "eps": draws["eps"].mean((1, 2))}
    table = np.corrcoef(np.stack([np.asarray(value, float) for value in facts.values()]))
    assert np.abs(table - np.eye(6)).max() < 0.06, table                               # nearly 4 s.d. of 1 / 64
    pieces = np.abs(np.corrcoef([np.asarray(v.flatten()) for v in (draws["noise"], draws["eps"])])[0, 1])
    assert pieces < 0.04 and abs(draws["drop"].double().mean() - 0.3) < 0.03
    assert draws["time"].min() == 0 and draws["time"].max() == 999 and abs(draws["time"].double().mean() - 499.5) < 18
    lengths = drawn("ae", masked=True, size=64)[1]["length"]                            # of 64 tokens
    assert lengths.unique().tolist() == [8, 16, 32, 64] and lengths.bincount().max() < 1150
    for other in (drawn("dit", step=6), drawn("dit", seed=1)):
        for name in draws:
            assert not torch.equal(other[1][name], draws[name]), name
    for stage in ("ae", "decoder"):
        assert not torch.equal(drawn(stage)[1]["noise"], draws["noise"]) and not torch.equal(drawn(stage)[0][0], x)


def test_another_runs_weights_start_a_run(trained, monkeypatch, capsys):
    """--init: of any checkpoint the averaged auto-encoder; of dit.pt also the averaged generator, with new rows for new
    classes; not when the run goes on from its own; what does not fit is refused before anything is written."""
    monkeypatch.chdir(trained)
    np.savez("two.npz", images=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8), labels=np.arange(40) % 2)
    begun = []
    monkeypatch.setattr(common.Run, "steps", lambda self, start: begun.append(copied(self.objects)) or [])
    words = argv("vitok", data="two.npz", name="begun", steps=4)
    for source in ("decoder", "dit"):
        cfg = common.cli(vitok.Config, vitok.PRESETS, "", [*words, "--data", "npz:two.npz", "--init", f"runs/vitok/image/{source}.pt"])
        state = torch.load(cfg.init, weights_only=True)["state"]
        vitok.prepare(cfg)
        vitok.train_ae(dataclasses.replace(cfg, name=f"begun-{source}"))
        for name, value in begun[-1]["tokenizer"].items():
            side, key = name.split(".", 1)
            wanted = state["tokenizer"][name] if source != "decoder" else state["ema" if side == "decoder" else "encoder"][key]
            assert torch.equal(value, wanted), (source, name)
        monkeypatch.setattr(common, "require_stage", lambda cfg, stage: trained / "runs/vitok/image/ae.pt")
        vitok.train_dit(dataclasses.replace(cfg, name=f"begun-{source}"))
        same = [torch.equal(begun[-1][part][name], value) for part in ("model", "ema") for name, value in
                state.get("ema", {}).items() if source == "dit" and name != "label.weight"]
        assert all(same) and bool(same) == (source == "dit") and begun[-1]["model"]["label.weight"].shape == (3, 12)
        assert source == "dit" or begun[-1]["model"]["head.weight"].abs().max() == 0     # a fresh one
    monkeypatch.undo()
    monkeypatch.chdir(trained)
    few(monkeypatch, 500)
    for words, message in ((["--channels", "4"], "ae.pt: does not fit: encoder.to_code.weight is [4, 12] there and [8, 12] here"),
                           (["--init", "runs/vitok/none.pt"], "none.pt: not a checkpoint")):
        text = refused(run, [*argv("vitok", name="wrong"), "--init", "runs/vitok/image/ae.pt", *words], capsys)
        assert message in text and not (trained / "runs/vitok/wrong").exists()


def copied(objects):
    return {name: {key: value.clone() for key, value in thing.state_dict().items() if torch.is_tensor(value)}
            for name, thing in objects.items()}


@pytest.mark.parametrize("words", [
    {"rope": "1d"}, {"rope": "none"}, {"act": "gelu"}, {"variational": False}, {"perceptual": 0.0}, {"gan": 0.0},
    {"stage": "ae"}, {"flip": True}, {"eta": 0.5}, {"muon": 2.0}])
def test_every_option_runs_a_step(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*argv("vitok", **{"steps": 1, **words}))
