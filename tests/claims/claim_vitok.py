"""ViTok's claims at demo scale: the size of the code, precision, encoder and decoder, generation, video, losses.

All variants of a row see the same images, steps and seeds. Baselines (a convolutional auto-encoder, frame-wise coding)
and metrics that are not the paper's method (SSIM, motion features) live here. Distances are toy Frechet distances on
the features of the ruler; perceptual and adversarial losses use the teacher, never the ruler.
"""

import copy
import dataclasses
import time

import common
import vitok
from tests import ROOT
from tests.claims import seeds, spread

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

STEPS = {"quick": 150, "full": 600}
COUNT = {"quick": 300, "full": 1000}
CACHE = {}                                           # trained models of this process, by their settings


def config(scale, seed, **changes):
    """The sweep's configuration (stage ae without a perceptual term) at the scale's length."""
    fields = {**vitok.PRESETS["sweep"], "sweep": "", "steps": STEPS[scale], "count": COUNT[scale], "seed": seed}
    return dataclasses.replace(vitok.Config(), **{**fields, "batch": 32, **changes})


def dataset(cfg):
    """The training split, opened once."""
    key = ("data", cfg.size, cfg.frames, cfg.objects)
    if key not in CACHE:
        CACHE[key] = vitok.open_split(cfg, "train", 8000 if cfg.frames == 1 else 1500)
    return CACHE[key]


def judge(cfg, role):
    """The judge for this size, built once."""
    key = (role, cfg.size, cfg.objects)
    if key not in CACHE:
        CACHE[key] = vitok.judge(dataclasses.replace(cfg, frames=1, steps=1000), role)
    return CACHE[key]


def perceptual(cfg):
    """LPIPS's features on the teacher's map, as the method file's stand-in."""
    return vitok.TeacherFeatures(judge(cfg, "teacher"), torch.device("cpu")) if cfg.perceptual else None


def seed_weights(cfg, stage):
    """What common.Run.seed_weights does."""
    torch.manual_seed(common.make_generator(cfg.seed, 0, f"{stage} weights").initial_seed())


def step_of(opt, value, rate):
    """One step down the gradient of `value`, of the weights of `opt` alone."""
    params = opt.param_groups[0]["params"]
    common.set_learning_rate(opt, rate)
    opt.zero_grad()
    value.backward(inputs=params)
    opt.step()


def fit(cfg, make=vitok.Autoencoder, bf16=False):
    """vitok.train_ae without a folder; `make` builds another model with the same forward."""
    key = (repr(cfg), make.__name__, bf16)
    if key not in CACHE:
        features = perceptual(cfg)
        seed_weights(cfg, "ae")
        model = make(cfg)
        opt = vitok.optimizer(model, cfg)
        for step in range(cfg.steps):
            batch, draws = vitok.draw(dataset(cfg), cfg, step, torch.device("cpu"), "ae")
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                value, _ = vitok.loss_ae(model, batch, draws, cfg, features)
            step_of(opt, value, vitok.learning_rate(cfg, step, "ae"))
        CACHE[key] = model.eval().requires_grad_(False)
    return CACHE[key]


def fit_decoder(cfg, steps):
    """vitok.train_decoder without a folder: the averaged decoder behind the frozen encoder."""
    model = copy.deepcopy(fit(cfg))
    cfg = dataclasses.replace(cfg, steps_decoder=steps)
    ema, disc = copy.deepcopy(model.decoder), vitok.Discriminator(cfg.size, cfg.disc)
    model.decoder.requires_grad_(True)
    opt, opt_disc = vitok.optimizer(model.decoder, cfg), vitok.optimizer(disc, cfg)
    for step in range(steps):
        batch, draws = vitok.draw(dataset(cfg), cfg, step, torch.device("cpu"), "decoder")
        weight = cfg.gan * vitok.ramp(step, steps / 20, steps / 2)
        value, _, recon = vitok.loss_decoder(model, batch, draws, cfg, perceptual(cfg), disc, weight)
        value_disc = vitok.loss_disc(disc, batch[0], recon)
        step_of(opt, value, vitok.learning_rate(cfg, step, "decoder"))
        step_of(opt_disc, value_disc, cfg.lr_disc * cfg.batch / 256 * vitok.ramp(step + 1, 0, steps / 4))
        common.ema_update(ema, model.decoder, cfg.ema)
    model.decoder = ema
    return model.requires_grad_(False)


def fit_dit(cfg, tokenizer, steps):
    """vitok.train_dit without a folder: the averaged generator on the tokenizer's codes."""
    cfg = dataclasses.replace(cfg, steps_dit=steps, batch_dit=64)
    seed_weights(cfg, "dit")
    model = vitok.DiT(cfg, 10)
    ema, opt = copy.deepcopy(model), vitok.optimizer(model, cfg)
    for step in range(steps):
        (x, y), draws = vitok.draw(dataset(cfg), cfg, step, torch.device("cpu"), "dit")
        z = vitok.bottleneck(*tokenizer.encoder(x), draws["noise"])
        step_of(opt, vitok.loss_dit(model, (z, y), draws)[0], vitok.learning_rate(cfg, step, "dit"))
        common.ema_update(ema, model, cfg.ema)
    return ema.requires_grad_(False)


def ssim(x, y):
    """Structural similarity of frames (M, 3, H, W) in [-1, 1]: 8 x 8 windows, the usual constants, range 2."""
    def mean(a):
        return F.avg_pool2d(a, 8, 1)
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    top = (2 * mx * my + 4e-4) * (2 * cov + 3.6e-3)
    return (top / ((mx**2 + my**2 + 4e-4) * (vx + vy + 3.6e-3))).mean().item()


def psnr_of(model, cfg):
    """PSNR of --count test clips."""
    return vitok.reconstruct(cfg, model)[2]["psnr"]


def reconstructed(model, cfg):
    """PSNR, SSIM and toy Frechet distance of test reconstructions, with the real-against-real floor."""
    test = vitok.open_split(cfg, "test", cfg.count)
    x = vitok.clips(test, np.arange(min(cfg.count, len(test))))
    y = common.in_blocks(lambda block: model(block)[0].clamp(-1, 1), torch.device("cpu"), x)
    a, b = (v.transpose(1, 2).flatten(0, 1) for v in (x, y))
    ruler, half = judge(cfg, "ruler"), len(a) // 2
    real, decoded = ruler.features(a), ruler.features(b[half:])
    return {"psnr": psnr_of(model, cfg), "ssim": ssim(a, b), "FD": common.frechet(decoded, real[:half]),
            "floor": common.frechet(real[half:], real[:half])}


def generated(model, tokenizer, cfg, scale):
    """Toy Frechet distance and class accuracy of samples (first frames), against as many test images."""
    labels, ruler = torch.arange(cfg.count) % 10, judge(cfg, "ruler")
    blocks = [vitok.sample(model, y, common.make_generator(cfg.seed, i, "sample"), cfg.num_steps, scale)
              for i, y in enumerate(labels.split(100))]
    clips = torch.cat([tokenizer.decoder(z).clamp(-1, 1) for z in blocks])
    test = vitok.clips(vitok.open_split(cfg, "test", cfg.count), np.arange(cfg.count))
    return {"gFD": common.frechet(ruler.features(clips[:, :, 0]), ruler.features(test[:, :, 0])),
            "accuracy": common.accuracy(ruler, clips[:, :, 0], labels), "motion": motion(clips, test)}


def motion(a, b):
    """Distance of the mean absolute frame difference of two sets of clips, in grey levels; 0 for images."""
    if a.shape[2] == 1:
        return 0.0
    step = [v.diff(dim=2).abs().mean().item() * 127.5 for v in (a, b)]
    return abs(step[0] - step[1])


def macs(cfg):
    """Multiply-adds of both sides."""
    return vitok.count_costs(cfg)["MACs"]


# --- The size of the code --------------------------------------------------------

def grid(scale, seed):
    """The study's ten configurations: E from 16 to 512 with patch 8, from 128 to 1024 with patch 4. Left out: one
    channel with patch 4. Its 64 tokens of one float hardly train: an eleventh point at 16.5 dB makes R² .80."""
    sweep = {name: vitok.PRESETS["sweep"][name] for name in ("sweep", "steps")}
    return list(vitok.parse_sweep(config(scale, seed, **sweep)))


def plot(table):
    """assets/vitok_e.svg from {patch: {E: PSNRs of the seeds}}: mean and s.d., a line a patch, and the fit of all."""
    lines = {f"patch {p}": ([int(e) for e in row], [float(np.mean(v)) for v in row.values()],
                            [float(np.std(v)) for v in row.values()]) for p, row in table.items()}
    E, psnr = (np.concatenate([line[i] for line in lines.values()]) for i in (0, 1))
    (slope, start), r2 = vitok.least_squares(np.log2(E), psnr)
    ends = np.array([E.min(), E.max()])
    lines["fit of all"] = (ends.tolist(), (slope * np.log2(ends) + start).tolist())
    title = f"PSNR on log E: {slope:+.2f} dB per doubling, R² {r2:.3f} (paper: +2.30, .92)"
    common.line_chart(ROOT / "assets/vitok_e.svg", lines, title, "E = tokens x channels (floats)", "PSNR, dB", logx=True)


def size_of_the_code(scale):
    """Reconstruction against E, and against FLOPs; the README's plot."""
    fits, table = {"E": [], "MACs": []}, {}
    for seed in seeds(scale):
        cfgs = grid(scale, seed)
        psnr = [psnr_of(fit(cfg), cfg) for cfg in cfgs]
        E = [vitok.count_costs(cfg)["E"] for cfg in cfgs]
        fits["E"].append(vitok.least_squares(np.log2(E), psnr))
        fits["MACs"].append(vitok.least_squares(np.log2([macs(cfg) for cfg in cfgs]), psnr))
        for cfg, e, value in zip(cfgs, E, psnr):
            table.setdefault(cfg.model.split("/")[1], {}).setdefault(e, []).append(value)
    plot(table)
    r2 = {name: [float(f[1]) for f in fs] for name, fs in fits.items()}
    slopes = [float(f[0][0]) for f in fits["E"]]
    return {"claim": "reconstruction follows the floats of the code E, whatever the patch and the FLOPs",
            "paper": "PSNR on log E: R² .92, +2.30 dB per doubling",
            "measured": f"R² {spread(r2['E'])} on log E, {spread(r2['MACs'])} on log MACs; {spread(slopes)} dB per "
            f"doubling; ten models of {vitok.PRESETS['sweep']['steps']} steps; patch 4 with one channel is left out: it "
            "hardly trains (with it R² .80)",
            "verdict": "shown" if min(r2["E"]) >= 0.9 > max(r2["MACs"]) else "not shown at this scale",
            "numbers": {"psnr": table, "r2": r2, "slope": slopes}}


def precision(scale):
    """bf16 autocast against fp32 (Table 2)."""
    gaps, values = [], []
    for seed in seeds(scale):
        cfg = config(scale, seed)
        pair = [reconstructed(fit(cfg, bf16=bf16), cfg)["psnr"] for bf16 in (False, True)]
        values.append(pair)
        gaps.append(abs(pair[1] - pair[0]))
    return {"claim": "the bottleneck's law does not depend on float precision", "paper": "26.1 dB in bf16 and in fp32",
            "measured": f"PSNR fp32 {spread([v[0] for v in values])}, bf16 {spread([v[1] for v in values])}, gap "
            f"{max(gaps):.2f} dB at most (asked: under 0.2)",
            "verdict": "shown" if max(gaps) < 0.2 else "not shown at this scale", "numbers": {"psnr": values}}


def depths(scale):
    """Encoder or decoder three blocks instead of one (Figs. 6 to 8)."""
    variants = {"1-1": "72x1x6-72x1x6/8", "3-1": "72x3x6-72x1x6/8", "1-3": "72x1x6-72x3x6/8"}
    psnr = {name: [] for name in variants}
    for seed in seeds(scale):
        for name, model in variants.items():
            cfg = config(scale, seed, model=model, steps=2 * STEPS[scale])
            psnr[name].append(psnr_of(fit(cfg), cfg))
    gain = {name: float(np.mean(psnr[name]) - np.mean(psnr["1-1"])) for name in ("3-1", "1-3")}
    shown = abs(gain["3-1"]) < 0.2 and gain["1-3"] > 0.1
    return {"claim": "a larger decoder helps reconstruction, a larger encoder hardly",
            "paper": "PSNR S-S 25.88, B-S 25.93 (encoder), S-B 26.12, S-L 26.47 (decoder)",
            "measured": "; ".join(f"{name} blocks {spread(v)} dB" for name, v in psnr.items())
            + f"; encoder {gain['3-1']:+.2f}, decoder {gain['1-3']:+.2f} dB",
            "verdict": "shown" if shown and scale == "full" else "not shown at this scale", "numbers": psnr}


# --- Generation --------------------------------------------------------------------

def channels_and_generation(scale):
    """Generation against E by the channels alone: DiTs of equal steps on codes of 2 to 32 channels."""
    few = (2, 8, 32) if scale == "quick" else (1, 2, 4, 8, 16, 32)
    results = {c: [] for c in few}
    for seed in seeds(scale):
        for c in few:
            cfg = config(scale, seed, channels=c, objects=1)
            tokenizer = fit(cfg)
            model = fit_dit(cfg, tokenizer, 2 * STEPS[scale])
            rfd = reconstructed(tokenizer, cfg)
            guided = {f"CFG {s:g}": generated(model, tokenizer, cfg, s) for s in (1.0, 2.0)}
            results[c].append({"rFD": rfd["FD"], "floor": rfd["floor"], **guided})
    mean = {c: float(np.mean([r["CFG 1"]["gFD"] for r in rs])) for c, rs in results.items()}
    best = min(mean, key=mean.get)
    text = "; ".join(f"c {c}: rFD {np.mean([r['rFD'] for r in rs]):.1f}, gFD {mean[c]:.1f} (CFG 2 "
                     f"{np.mean([r['CFG 2']['gFD'] for r in rs]):.1f})" for c, rs in results.items())
    return {"claim": "generation does not follow E: many channels are hard to generate",
            "paper": "gFID at CFG 1.5, p 16: c 4, 8, 16, 32, 64: 10.8, 6.8, 6.1, 8.2, 15.0",
            "measured": text + f"; best c = {best}; {COUNT[scale]} samples",
            "verdict": "shown" if best not in (few[0], few[-1]) else "not shown at this scale", "numbers": results}


# --- FLOPs -------------------------------------------------------------------------

class Residual(nn.Module):
    """GroupNorm, SiLU, convolution, twice, around a shortcut."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
                                  nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)


class ConvAutoencoder(nn.Module):
    """The SD-VAE pattern in small: three halvings, residual blocks, the same Gaussian bottleneck, E equal."""

    def __init__(self, cfg, width=32):
        super().__init__()
        down, up = [nn.Conv2d(3, width, 3, padding=1)], [nn.Conv2d(cfg.channels, 2 * width, 3, padding=1)]
        for a, b in ((width, width), (width, 2 * width), (2 * width, 2 * width)):
            down += [Residual(a), nn.Conv2d(a, b, 3, stride=2, padding=1)]
        for a, b in ((2 * width, 2 * width), (2 * width, width), (width, width)):
            up += [Residual(a), nn.Upsample(scale_factor=2), nn.Conv2d(a, b, 3, padding=1)]
        self.down = nn.Sequential(*down, Residual(2 * width), nn.Conv2d(2 * width, 2 * cfg.channels, 3, padding=1))
        self.up = nn.Sequential(*up, Residual(width), nn.GroupNorm(8, width), nn.SiLU(),
                                nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x, noise=None, length=None):
        mean, logvar = self.down(x[:, :, 0]).flatten(2).transpose(1, 2).chunk(2, 2)
        z = vitok.bottleneck(mean, logvar, noise).transpose(1, 2)
        return self.up(z.unflatten(2, (4, 4)))[:, :, None], mean, logvar


def convolutions(scale):
    """Against a small convolutional auto-encoder at equal E and equal steps: PSNR and counted multiply-adds."""
    psnr, cost = {"ViTok": [], "conv": []}, {}
    for seed in seeds(scale):
        cfg = config(scale, seed)
        for name, make in (("ViTok", vitok.Autoencoder), ("conv", ConvAutoencoder)):
            model = fit(dataclasses.replace(cfg, lr=cfg.lr if name == "ViTok" else 1e-2), make)
            psnr[name].append(psnr_of(model, cfg))
            cost[name] = common.flops(lambda: model(torch.zeros(1, 3, 1, 32, 32))) / 2e6
    gap, ratio = np.mean(psnr["ViTok"]) - np.mean(psnr["conv"]), cost["conv"] / cost["ViTok"]
    return {"claim": "competitive reconstruction at 2 to 5 times fewer FLOPs than convolutional auto-encoders",
            "paper": "4.66 x fewer at 256 px, 4.07 x at 512 px, 3.14 x for video; PSNR -0.7 dB",
            "measured": f"ViTok {spread(psnr['ViTok'])} dB with {cost['ViTok']:.1f} MMACs, convolutions "
            f"{spread(psnr['conv'])} dB with {cost['conv']:.1f}: {ratio:.1f} x fewer, {gap:+.2f} dB",
            "verdict": "shown" if ratio >= 2 and gap > -1 else "not shown at this scale",
            "numbers": {"psnr": psnr, "MMACs": cost}}


# --- Video ---------------------------------------------------------------------------

class FrameByFrame(nn.Module):
    """An image model applied to every frame of a clip: the same frames, the same floats in all."""

    def __init__(self, cfg):
        super().__init__()
        self.frames = cfg.frames
        image = dataclasses.replace(cfg, frames=1, model=cfg.model.replace("/2x", "/"), channels=cfg.channels // 2)
        self.image = vitok.Autoencoder(image)

    def forward(self, x, noise=None, length=None):
        flat = x.transpose(1, 2).flatten(0, 1)[:, :, None]
        mean, logvar = self.image.encoder(flat)
        noise = None if noise is None else noise.reshape(mean.shape)                   # as many floats in all
        recon = self.image.decoder(vitok.bottleneck(mean, logvar, noise))[:, :, 0]
        recon = recon.unflatten(0, (len(x), self.frames)).transpose(1, 2)
        mean, logvar = (v.unflatten(0, (len(x), self.frames)).flatten(1, 2) for v in (mean, logvar))
        return recon, mean, logvar


def video(scale):
    """A clip coded in tubelets against frame-wise coding at equal floats."""
    psnr = {"tubelets": [], "frame by frame": []}
    for seed in seeds(scale):
        cfg = config(scale, seed, model="72x1x6-72x2x6/2x8", frames=8, channels=16, batch=8)
        for name, make in (("tubelets", vitok.Autoencoder), ("frame by frame", FrameByFrame)):
            psnr[name].append(psnr_of(fit(cfg, make), dataclasses.replace(cfg, count=100)))
    gain = float(np.mean(psnr["tubelets"]) - np.mean(psnr["frame by frame"]))
    return {"claim": "video is reconstructed better than its frames at equal pixels per float",
            "paper": "33.2 dB for clips against 26.1 dB for images at 48 pixels per float",
            "measured": "; ".join(f"{name} {spread(v)} dB" for name, v in psnr.items()) + f"; {gain:+.2f} dB at 24 "
            "pixels per float", "verdict": "shown" if gain > 0.3 else "not shown at this scale", "numbers": psnr}


def clip_length(scale):
    """4, 8 and 16 frames with the same tubelets, channels and frames a step (Fig. 13)."""
    psnr = {}
    for seed in seeds(scale):
        for frames in (4, 8, 16):
            cfg = config(scale, seed, model="72x1x6-72x2x6/2x8", frames=frames, channels=16, batch=64 // frames, count=100)
            psnr.setdefault(frames, []).append(psnr_of(fit(cfg), cfg))
    mean = [float(np.mean(v)) for v in psnr.values()]
    return {"claim": "longer clips help a little", "paper": "PSNR 25.6, 26.3, 27.9 for 16, 32, 64 frames; not monotone in rFVD",
            "measured": "; ".join(f"{frames} frames {spread(v)} dB" for frames, v in psnr.items()),
            "verdict": "shown" if mean[0] < mean[1] < mean[2] else "not shown at this scale", "numbers": psnr}


def video_tokens(scale):
    """Class-conditional clips from codes of fewer and fewer tokens (Table 7)."""
    results = {}
    for seed in seeds(scale):
        for qp in ("2x8", "4x8"):
            cfg = config(scale, seed, model=f"72x1x6-72x2x6/{qp}", frames=8, channels=16, batch=8, count=100, objects=1)
            tokenizer = fit(cfg)
            model = fit_dit(cfg, tokenizer, STEPS[scale])
            results.setdefault(qp, []).append(generated(model, tokenizer, cfg, 2.0))
    mean = {qp: float(np.mean([r["gFD"] for r in rs])) for qp, rs in results.items()}
    return {"claim": "class-conditional video: more tokens generate better", "paper": "gFVD 27, 53, 92 for 4x8, 8x8, 4x16",
            "measured": "; ".join(f"{qp}: frame FD {mean[qp]:.1f}, motion off by {np.mean([r['motion'] for r in rs]):.2f} "
                                  f"grey levels" for qp, rs in results.items()),
            "verdict": "shown" if mean["2x8"] < mean["4x8"] and scale == "full" else "not shown at this scale",
            "numbers": results}


# --- Losses ----------------------------------------------------------------------------

def losses(scale):
    """The trade-off of Fig. 10: MSE, + perceptual .5, + 1, + stage 2 with the GAN."""
    results = {}
    for seed in seeds(scale):
        for eta in (0.0, 0.5, 1.0):
            cfg = config(scale, seed, perceptual=eta)
            results.setdefault(f"eta {eta:g}", []).append(reconstructed(fit(cfg), cfg))
        model = fit_decoder(cfg, STEPS[scale] // 2)
        results.setdefault("+ GAN", []).append(reconstructed(model, cfg))
    mean = {name: {k: float(np.mean([r[k] for r in rs])) for k in rs[0]} for name, rs in results.items()}
    shown = mean["+ GAN"]["FD"] < mean["eta 0"]["FD"] and mean["+ GAN"]["psnr"] < mean["eta 0"]["psnr"]
    return {"claim": "perceptual and GAN losses trade PSNR and SSIM for the distance",
            "paper": "rFID 9.82, 2.16, 1.58, .56; PSNR 26.1, 26.5, 26.1, 25.1; SSIM .824, .795, .790, .767",
            "measured": "; ".join(f"{name}: FD {m['FD']:.1f}, PSNR {m['psnr']:.2f}, SSIM {m['ssim']:.3f}"
                                  for name, m in mean.items()) + f"; floor {mean['eta 0']['floor']:.1f}",
            "verdict": "shown" if shown else "not shown at this scale", "numbers": results}


# --- Speed on a GPU ----------------------------------------------------------------------

def speed(scale):
    """A GPU row: images a second and MFU of a bf16 training step of S-B/16, compiled, at 256 and 512 px."""
    if not torch.cuda.is_available():
        return {"claim": "S-B/16 trains at 40 % MFU or more, compiled, in bf16", "paper": "6 to 12 hours on 8 H100",
                "measured": "no CUDA GPU here", "verdict": "not run", "numbers": {}}
    rates = {}
    for size, batch in ((256, 64), (512, 16)):
        cfg = dataclasses.replace(vitok.Config(), **vitok.PRESETS["S-B/16"], size=size, perceptual=0.0, compile=True)
        model = vitok.Autoencoder(cfg).cuda()
        common.compile_blocks(cfg, model.blocks)
        opt = vitok.optimizer(model, cfg)
        x = torch.randn(batch, 3, 1, size, size, device="cuda")
        draws = {"noise": torch.randn(batch, vitok.sizes(cfg).M, 16, device="cuda"), "length": None}
        for step in range(30):
            if step == 10:
                torch.cuda.synchronize()
                start = time.perf_counter()
            with common.autocast(cfg):
                value, _ = vitok.loss_ae(model, (x, None), draws, cfg, None)
            opt.zero_grad()
            value.backward()
            opt.step()
        torch.cuda.synchronize()
        rate = 20 * batch / (time.perf_counter() - start)
        rates[size] = {"images/s": rate, "MFU of 989 TFLOP/s": rate * 6 * macs(cfg) / 989e12}
    shown = rates[256]["MFU of 989 TFLOP/s"] >= 0.4
    return {"claim": "S-B/16 trains at 40 % MFU or more, compiled, in bf16", "paper": "6 to 12 hours on 8 H100",
            "measured": "; ".join(f"{s} px: {r['images/s']:.0f} images/s, MFU {r['MFU of 989 TFLOP/s']:.2f}"
                                  for s, r in rates.items()),
            "verdict": "shown" if shown else "not shown at this scale", "numbers": rates}


ROWS = [size_of_the_code, precision, convolutions, losses, depths, channels_and_generation, video, clip_length,
        video_tokens, speed]
