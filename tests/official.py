"""Convert the authors' published checkpoints into ours: python -m tests.official METHOD IN OUT [--field value ...]

IN is a .pt/.bin/.npz of the authors' names, OUT a checkpoint that `python METHOD.py --sample OUT` reads. Names of
foreign checkpoints live here, so that the method files stay the papers.
"""

import argparse
import dataclasses
import importlib
import re
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
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):    # the authors' training scripts pickle theirs
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise common.UserError(f"{path}: not a checkpoint that can be read safely ({str(error)[:80]})") from None
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


VITOK_BLOCK = [(".attn.qkv.", ".attention.qkv."), (".attn.proj.", ".attention.out."), (".mlp.fc1.", ".gate."),
               (".mlp.fc2.", ".up."), (".mlp.fc3.", ".down."), ("linear_modulation", "modulation")]
VITOK = [("encoder.blocks.", "encoder.trunk.blocks."), ("encoder.norm.", "encoder.trunk.norm."),
         ("decoder.blocks.", "decoder.trunk.blocks."), ("decoder.norm.", "decoder.trunk.norm."),
         ("tubelet_embed.proj.", "encoder.embed."), ("encoder_to_code.", "encoder.to_code."),
         ("code_to_decoder.", "decoder.from_code."), ("tubelet_decode.proj.weight", "decoder.to_pixels.weight"),
         ("tubelet_decode.proj.bias", "decoder.colour"), *VITOK_BLOCK]
VITOK_DIT = [("posemb", "table"), ("input_width_to_width.", "enter."), ("t_embedder.mlp.", "time."),
             ("encoder.", "trunk."), ("y_embedder.embedding_table.", "label."), ("final_layer.norm_final.", "norm."),
             ("final_layer.adaLN_modulation.0.", "modulation."), ("final_layer.linear.", "head."), *VITOK_BLOCK]


def vitok(official, given):
    """The configuration and the weights of a ViTok auto-encoder (release of January 2025: 1-D RoPE, GELU gate)."""
    ours = renamed(official, VITOK, drop=("posemb", "dec_posemb"))      # its video model adds frozen tables; we do not
    D, _, q, p, _ = ours["encoder.embed.weight"].shape
    ours["encoder.embed.weight"] = ours["encoder.embed.weight"].flatten(1)
    ours["decoder.to_pixels.weight"] = ours["decoder.to_pixels.weight"].flatten(1).T
    ours["decoder.colour"] = ours["decoder.colour"].view(3, 1, 1, 1)
    depths = [len([name for name in ours if name.startswith(side) and name.endswith("qkv.weight")])
              for side in ("encoder", "decoder")]
    sides = [f"{D}x{depth}x{16 if D == 1152 else D // 64}" for depth in depths]
    shape = dict(model=f"{sides[0]}-{sides[1]}/{q}x{p}", channels=len(ours["encoder.to_code.weight"]) // 2,
                 rope="1d", act="gelu", name="official")
    return shape | given, {"tokenizer": ours}


def vitok_dit(official):
    """The weights of a ViTok generator; a sample also wants the auto-encoder that its codes come from."""
    ours = renamed(official, VITOK_DIT)
    return ours | {"table": ours["table"][0]}


FLEXTOK = [("encoder.module_dict.", "encoder."), ("decoder.module_dict.", "decoder."), ("enc_patch_emb.patch_proj.", "embed."),
           ("enc_register_module.", ""), ("enc_transformer.", ""), ("enc_to_latents.proj.", "head."),
           ("dec_from_latents.proj.", "read."), ("dec_registers_posemb_module.posembs", "token_position"),
           ("dec_nested_dropout.dropout_mask_token", "mask"), ("dec_latent_dropout.nullcond", "null"),
           ("dec_noise_patch_emb.patch_proj.", "embed."), ("dec_time_embedder.mlp.", "time."), ("dec_transformer.", ""),
           ("dec_to_patches.adaLN_modulation.1.", "modulation."), ("dec_to_patches.proj.", "head."),
           (".adaLN_modulation.1.", ".modulation."), (".attn.proj.", ".attention.wo."), (".attn.w", ".attention.w"),
           (".mlp.fc", ".w")]


def flextok(official, given):
    """A released FlexTok tokenizer (d12-d12, d18-d18, d18-d28) without its VAE; fixed position tables are dropped."""
    halves = {name: value for name, value in official.items() if name.startswith(("encoder.", "decoder."))}
    fixed = ("enc_posemb_module.posembs", "dec_patches_posemb_module.posembs", ".levels", ".basis")
    ours = renamed(halves, FLEXTOK, drop=[name for name in halves if name.endswith(fixed)])
    ours["decoder.token_position"] = ours["decoder.token_position"][0, 0].T
    R, D = ours["encoder.registers"].shape
    depth = {half: len([name for name in ours if name.startswith(half) and name.endswith("wq.weight")]) for half in
             ("encoder", "decoder")}
    shape = dict(registers=R, encoder=depth["encoder"], decoder=depth["decoder"], head=D // depth["encoder"],
                 channels=ours["encoder.embed.weight"].shape[1] // 4, size=32, patch=2)
    return dict(data="latents:official", name="official", stage="tokenizer", **shape) | given, {"ema": ours}


DETAILFLOW = [("visual_model.", ""), ("vision_model.", "encoder."), ("embeddings.patch_embedding.", "embed."),
              ("embeddings.position_embedding.weight", "grid"), ("encoder.layers.", "blocks."), ("post_layernorm.", "norm."),
              ("latent_tokens", "queries"), ("refined_tokens", "refined"), ("latent_pos_embed", "positions"),
              (".layer_norm", ".norm"), (".self_attn.out_proj.", ".out."), (".mlp.fc1.", ".up."),
              (".mlp.fc2.", ".down."), ("decoder.mask_token", "decoder.mask"), ("to_pixel.model.", "head."),
              ("post_quant_conv.", "read."), ("quant_conv.", "quant."), ("refine_conv.", "refine."),
              ("quantize.embedding.weight", "vq.codes"), ("global_token_proj.", "align.")]
DETAILFLOW_AR = [("cls_embedding.embedding_table.", "label."), ("spe_tok_embeddings.special_embeddings.weight", "masks"),
                 ("tok_embeddings.", "table."), ("layers.", "blocks."), ("attention_norm", "norm1"), ("ffn_norm", "norm2"),
                 ("attention.wqkv.", "qkv."), ("attention.wo.", "out."), ("feed_forward.w1.", "gate."), ("feed_forward.w3.", "up."),
                 ("feed_forward.w2.", "down."), ("output.", "head.")]


def detailflow_tokenizer(official):
    """The weights of a DetailFlow tokenizer; or of SigLIP2's vision model, to start from (its last blocks idle)."""
    own = {name: value for name, value in official.items() if not re.search("repa_model|text_model|logit|head[.]", name)}
    ours = renamed(own, DETAILFLOW, drop=("quantize.codebook_used",))
    for name in [name for name in ours if ".q_proj." in name]:
        parts = [ours.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        ours[name.replace("self_attn.q_proj", "qkv")] = torch.cat(parts)
    for name, value in ours.items():
        if name.endswith("grid"):
            ours[name] = value.unflatten(0, (round(len(value) ** 0.5), -1))
        elif name.endswith(("queries", "refined", "positions", "decoder.mask")):
            ours[name] = value.reshape(-1, value.shape[-1]).squeeze(0) if name.endswith("mask") else value[0]
    return ours


def detailflow(official, given):
    """A DetailFlow tokenizer; its AR model, joined to a converted --tokenizer; or SigLIP2, to start from."""
    if "tok_embeddings.weight" in official:
        ours = renamed(official, DETAILFLOW_AR, drop=("freqs_cis",))
        (K, D), m = ours["table.weight"].shape, len(ours["blocks.0.up.weight"])
        depth = len([name for name in ours if name.endswith("qkv.weight")])
        common.need(given.get("tokenizer"), "give --tokenizer CHECKPOINT, the converted tokenizer that draws its tokens")
        found = common.read_checkpoint(given["tokenizer"], "detailflow")
        shape = dict(gpt=f"{D}x{depth}x{max(1, D // 64)}x{m}", codes=K, group=1 + len(ours["masks"]), stage="ar")
        return found["config"] | shape | given, {"tokenizer": found["state"]["tokenizer"], "ema": ours}
    ours = detailflow_tokenizer(official)
    if "vq.codes" not in ours:
        return dict(name="siglip2") | given, {"tokenizer": ours}
    ours["vq.use"] = torch.ones(len(ours["vq.codes"]))
    N, D = ours["encoder.queries"].shape
    f = round((ours["encoder.embed.weight"].shape[1] // 3) ** 0.5)
    shape = dict(tokens=N, codes=len(ours["vq.codes"]), dim=ours["vq.codes"].shape[1], patch=f,
                 size=f * len(ours["encoder.grid"]))
    for half in ("encoder", "decoder"):
        D, m = ours[f"{half}.norm.weight"].shape[0], len(ours[f"{half}.blocks.0.up.weight"])
        depth = len([name for name in ours if name.startswith(half) and name.endswith("qkv.weight")])
        shape[half] = f"{D}x{depth}x{16 if D == 1152 else max(1, D // 64)}x{m}"
    return dict(data="folder:official", name="official", stage="tokenizer", **shape) | given, {"tokenizer": ours}


def slimfit(official, given):
    """A fine-tuned BERT or ViT of the usual names; what no shape tells (heads, data, classes' file) is given."""
    import slimfit as method
    ours = {method.our_name(name): value.float() for name, value in official.items() if "position_ids" not in name}
    K, d = ours["head.weight"].shape
    shape = dict(width=d, heads=max(1, d // 64), classes=K, name="official",
                 depth=len([name for name in ours if re.fullmatch(r"blocks\.\d+\.out\.bias", name)]))
    if "cls" in ours:
        p = ours["patch.weight"].shape[-1]
        shape |= dict(family="vit", patch=p, image=p * round((ours["position"].shape[1] - 1) ** 0.5),
                      scaled="blocks.0.scale1" in ours)
    else:
        shape |= dict(family="bert", words=len(ours["word.weight"]), positions=len(ours["position.weight"]))
    return shape | given, {"model": ours}


CONVERTERS = {"arflow": arflow, "vitok": vitok, "flextok": flextok, "detailflow": detailflow, "slimfit": slimfit}


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
