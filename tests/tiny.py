"""What the common tests run: naming a method here lets it join test_style.py and test_runs.py.

TINY    one very small Config a file: it trains in under half a second
VARIANTS  more command lines on top of it, so that every line with a shape comment runs at least once
EXTRA   a function of the module for what no command line reaches (the slow forms beside the fast ones)
"""

import dataclasses

import data

import numpy as np
import torch

TINY = {
    "arflow": dict(size=8, patch=2, width=16, depth=2, heads=2, images=3, steps=6, batch=2, lr=1e-3,
                   num_steps=3, count=10, cfg_scale=2.0, log=2, save=3),
    "gpipe": dict(data="numbers:30", layers=1, width=16, hidden=16, heads=1, stages=2, micro=2, steps=6, batch=8,
                  warmup=2, lr=1e-5, log=2, save=3),
    "vitok": dict(size=8, model="12x1x2-12x2x2/4", channels=2, disc=4, dit="12x1x2", steps=6, batch=4, lr=0.1,
                  num_steps=3, count=10, cfg_scale=2.0, ema=0.9, muon=0.0, log=2, save=3),
    "slimfit": dict(family="vit", image=8, patch=4, width=16, depth=1, heads=2, classes=10, keep=1.0, pretrain=4,
                    compare="0.5", steps=6, batch=4, lr=1e-3, log=2, save=3),
    "flextok": dict(size=8, patch=4, registers=4, encoder=1, decoder=2, gpt=1, head=8,
                    levels="8,5", repa=1.0, steps=6, batch=4, batch_ar=0, lr=1e-3, num_steps=2, apg=True, count=4, log=2, save=3),
    "detailflow": dict(size=8, patch=4, tokens=8, group=2, causal=2, codes=16, dim=4, near=4, encoder="16x1x2x16",
                       decoder="16x1x2x16", gpt="16x1x2x16", degrade=0.5, kmeans=2,
                       perceptual=1.0, ramp=2, gan=0.2, gan_from=3, align=1.0, dropout=0.0, crops=0, muon=0.0,
                       steps=6, batch=4, lr=0.1, count=4, log=2, save=3),
}

VARIANTS = {
    "detailflow": [["--zoom", "1.25", "--kmeans", "1", "--top_k", "9", "--top_p", "0.9", "--cfg_scale", "1", "--muon", "3"],
                   ["--no-correct", "--degrade", "1", "--gan_from", "0", "--kmeans", "0"]],
    "flextok": [["--condition", "text", "--top_k", "9", "--top_p", "0.9", "--cfg_scale", "1", "--time", "logit-normal"],
                ["--no-apg", "--repa", "0", "--nested", "uniform"]],
    "arflow": [["--block", "sit", "--images", "1"]],
    "gpipe": [["--model", "amoebanet-d", "--data", "shapes", "--size", "8", "--layers", "3", "--width", "4"],
              ["--plan"], ["--plan", "--model", "lm"], ["--emulate", "0.001"]],
    "vitok": [["--masked", "--cfg_scale", "1", "--eta", "1"], ["--latents", "3", "--recompute", "--muon", "3"],
              ["--frames", "2", "--model", "12x1x2-12x2x2/2x4"], ["--no-variational", "--stage", "ae"]],
    "slimfit": [["--keep", "0.1", "--scaled"], ["--keep", "0.5", "--no-products", "--no-probabilities"]],
}


def arflow_extra(arflow):
    q, k, v = torch.randn(3, 2, 3, 2, 5, 4)
    arflow.hybrid_matrix(q, k, v, -torch.rand(2, 3, 2, 5))


def detailflow_extra(detailflow):
    """The sampler without a cache, the plain form of the cached one; and stored tokens, of three images."""
    cfg = detailflow.Config(**TINY["detailflow"] | dict(crops=2))
    tokenizer, dataset = detailflow.Tokenizer(cfg).requires_grad_(False), detailflow.open_split(cfg, "train", 3)
    stored = detailflow.encode_crops(tokenizer, dataset, np.arange(3), torch.device("cpu"))
    detailflow.draw_ar(dataset, cfg, 0, torch.device("cpu"), stored.numpy())
    model = detailflow.AR(cfg, 3)
    detailflow.generate(model, torch.tensor([0, 2]), torch.rand(2, cfg.tokens), cfg, cached=False)


def vitok_extra(vitok):
    """VGG16 with random weights, as a file would bring them."""
    features = object.__new__(vitok.VGG16)
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    features.layers = [(torch.randn(b, a, 3, 3), torch.zeros(b)) for a, b in zip(widths, widths[1:])]
    features(torch.zeros(1, 3, 16, 16))


def slimfit_extra(slimfit):
    cfg = slimfit.Config(words=30, positions=8, length=8, width=16, depth=1, heads=2, dropout=0.1)
    ids, keep = torch.randint(30, (2, 8)), torch.ones(2, 8)
    for target in ("class", "span"):
        slimfit.build_model(dataclasses.replace(cfg, target=target))(ids, ids % 2, keep)
    slimfit.pack4(torch.randn(5))
    pictures = data.Data(np.zeros((3, 3, 16, 16), np.uint8), np.arange(3), None, None, "pictures")
    slimfit.fetch(pictures, dataclasses.replace(cfg, family="vit", image=8, pixels="imagenet"), np.arange(2))


def flextok_extra(flextok):
    flextok.flow_time(torch.rand(3), "uniform")
    flextok.StateCondition()(torch.randn(2, 3, 5))


EXTRA = {
    "detailflow": detailflow_extra,
    "flextok": flextok_extra,
    "arflow": arflow_extra,
    "gpipe": lambda gpipe: None,
    "vitok": vitok_extra,
    "slimfit": slimfit_extra,
}


def argv(method, **changes):
    """The tiny configuration as a command line."""
    words = []
    for name, value in {**TINY[method], **changes}.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return words
