"""Convert the authors' published checkpoints into ours: python -m tests.official METHOD IN OUT [--field value ...]

IN is a .pt/.bin/.npz of the authors' names, OUT a checkpoint that `python METHOD.py --sample OUT` reads. Names of
foreign checkpoints live here, so that the method files stay the papers.
"""

import dataclasses
import importlib
import sys
from pathlib import Path

import numpy as np
import torch

import common


def read_official(path):
    """A flat {name: tensor} from .npz or a torch file; nested under 'ema', 'model' or 'state_dict' where it is."""
    if str(path).endswith(".npz"):
        with np.load(path) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    saved = torch.load(path, map_location="cpu", weights_only=True)
    nested = next((key for key in ("ema", "model", "state_dict") if key in saved), None)
    return saved[nested] if nested else saved


def renamed(official, names, drop=()):
    """Replace every part of a name by the table; UserError where two names meet."""
    ours = {}
    for name, value in official.items():
        if name in drop:
            continue
        for old, new in names:
            name = name.replace(old, new)
        common.need(name not in ours, f"two tensors are called {name}")
        ours[name] = value
    return ours


ARFLOW = [("x_embedder.proj.", "embed."), ("t_embedder.mlp.", "time."), ("y_embedder.embedding_table.", "label."),
          (".attn.q_proj.", ".attention.q."), (".attn.k_proj.", ".attention.k."), (".attn.v_proj.", ".attention.v."),
          (".attn.g_proj.", ".attention.z."), (".attn.gt_proj.", ".attention.gate."),
          (".attn.out_proj.", ".attention.out."), (".mlp.fc1.", ".mlp.0."), (".mlp.fc2.", ".mlp.2."),
          ("final_layer.adaLN_modulation.1.", "modulation."), (".adaLN_modulation.1.", ".modulation."),
          ("final_layer.linear.", "out.")]


def arflow(official, given):
    """The configuration (read off the shapes) and the weights of an ARFlow checkpoint."""
    ours = renamed(official, ARFLOW, drop=("pos_embed",))
    ours["latent_scale"] = torch.tensor(0.18215)                        # of the Stable Diffusion VAE, digest A1
    D, C, p, _ = ours["embed.weight"].shape
    N = official["pos_embed"].shape[1]
    shape = dict(width=D, patch=p, size=p * round(N ** 0.5), heads=len(ours["blocks.0.attention.gate.weight"]),
                 depth=len([name for name in ours if name.endswith("attention.gate.weight")]))
    return dict(data="latents:official", name="official", **shape) | given, {"ema": ours}


CONVERTERS = {"arflow": arflow}


def convert(method, source, target, given):
    """Write `target` from the official file `source`; given: fields that no tensor tells."""
    common.need(method in CONVERTERS, f"{method}: no converter; there are {', '.join(CONVERTERS)}")
    module = importlib.import_module(method)
    fields, state = CONVERTERS[method](read_official(source), given)
    cfg = dataclasses.asdict(dataclasses.replace(module.Config(), **fields))
    saved = {"method": method, "config": cfg, "step": 0, "sums": {}, "count": 0, "state": state}
    common.write_atomic(target, lambda file: torch.save(saved, file))


def main(argv):
    """The command line: METHOD IN OUT, then fields of that method's Config as on its own command line."""
    common.need(len(argv) >= 3, "usage: python -m tests.official METHOD IN OUT [--field value ...]")
    module = importlib.import_module(argv[0]) if argv[0] in CONVERTERS else None
    given = {}
    if module:
        cfg = common.cli(module.Config, module.PRESETS, __doc__, argv[3:])
        base = common.cli(module.Config, module.PRESETS, __doc__, [])
        given = {name: value for name, value in vars(cfg).items() if value != getattr(base, name)}
    common.need(Path(argv[1]).is_file(), f"{argv[1]}: no such file")
    convert(argv[0], argv[1], argv[2], given)
    print(f"{argv[2]}: a checkpoint of {argv[0]}.py")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except common.UserError as error:
        common.quit_with(error)
