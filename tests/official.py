"""Convert the authors' published checkpoints into ours: python -m tests.official METHOD IN OUT [--field value ...]

IN holds the authors' names: a .safetensors, .bin, .pt, .pth or .npz, or a folder or index of shards. OUT is a
checkpoint that `python METHOD.py --sample OUT` reads. Every tensor of IN is accounted for: it has its place in OUT,
or IDLE knows that it is of no use and why (which is printed), or the file is refused before anything is written.
Names of foreign checkpoints live here, so that the method files stay the papers.
"""

import argparse
import dataclasses
import importlib
import re
import sys
from pathlib import Path

import common

import torch


def read_official(path):
    """{name: tensor} of a file, of a folder or of an index of shards; UserError in one line.

    A training script's file holds several state dicts: the averaged weights are taken.
    """
    if Path(path).suffix in (".pt", ".pth", ".bin") and Path(path).is_file():
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):            # of the script's command line
                saved = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:                                                  # whatever the bytes provoke
            raise common.UserError(f"{path}: cannot be read as weights ({str(error)[:80]})") from None
        inner = [saved[key] for key in ("ema", "model", "state_dict", "module") if isinstance(saved, dict) and saved.get(key)]
        saved = inner[0] if inner else saved
    else:
        saved = common.read_weights(path)
    tensors = isinstance(saved, dict) and saved and all(map(torch.is_tensor, saved.values()))
    common.require(tensors, f"{path}: holds no tensors by name")
    for wrapper in ("module.", "_orig_mod."):                           # of DataParallel and torch.compile
        if all(name.startswith(wrapper) for name in saved):
            saved = {name[len(wrapper):]: value for name, value in saved.items()}
    return saved


# What a file holds that ours compute anew or do without: patterns of names, and the reason.
IDLE = {
    "arflow": {r"pos_embed": "the frozen sine table, computed anew"},
    "vitok": {},
    "flextok": {r"vae\..*": "the VAE, whose latents flextok.py works on",
                r".*(enc|dec_patches)_posemb_module\.posembs": "frozen sine tables, computed anew",
                r".*\b_?(levels|basis)": "constants of the quantiser, computed anew"},
    "detailflow": {r"(.*\.)?repa_model\..*": "SigLIP2, the frozen teacher of the alignment",
                   r"quantize\.codebook_used": "a counter of the training",
                   r"text_model\..*|logit_(scale|bias)": "SigLIP2's half for texts",
                   r"(vision_model\.)?head\..*": "SigLIP2's pooling head, which the encoder has not",
                   r".*position_ids": "a list of numbers",
                   r"freqs_cis": "the rotary table, computed anew"},
    "slimfit": {r".*position_ids": "a list of numbers"}}

# What a release knows and our file does not.
REFUSED = {
    "vitok": {r"(dec_)?posemb": "a table that is added to the tokens (video checkpoints, sincos, learned); vitok.py rotates",
              r"code": "the latent variant, which adds position tables that vitok.py has not",
              r"(enc|dec)_freqs": "learned rotations; vitok.py's are fixed"}}


def siglip2_depth(given):
    """The blocks of SigLIP2 that DetailFlow's encoder keeps."""
    return int(given.get("encoder", "1152x12x16x4304").split("x")[1])


def idle_names(method, official, given):
    """{name: reason} of the tensors that are of no use; UserError for one that our file has no place for."""
    found = {}
    if method == "detailflow" and "quantize.embedding.weight" not in official:
        depth = siglip2_depth(given)
        behind = [name for name in official if int((re.findall(r"encoder\.layers\.(\d+)", name) or [0])[0]) >= depth]
        found = dict.fromkeys(behind, f"behind the encoder's {depth} blocks")
    for name in official:
        for pattern, reason in REFUSED.get(method, {}).items():
            common.require(not re.fullmatch(pattern, name), f"{name}: {reason}; nothing is written")
        for pattern, reason in IDLE[method].items():
            if re.fullmatch(pattern, name):
                found[name] = reason
    return found


def useful(method, official, given):
    """What is left of a file without its idle tensors."""
    idle = idle_names(method, official, given)
    return {name: value for name, value in official.items() if name not in idle}


def renamed(official, names):
    """Replace every part of a name by the table; UserError where two names meet."""
    ours = {}
    for name, value in official.items():
        for old, new in names:
            name = name.replace(old, new)
        common.require(name not in ours, f"two tensors are called {name}")
        ours[name] = value
    return ours


ARFLOW = [("x_embedder.proj.", "embed."), ("t_embedder.mlp.", "time."), ("y_embedder.embedding_table.", "label."),
          (".attn.q_proj.", ".attention.q."), (".attn.k_proj.", ".attention.k."), (".attn.v_proj.", ".attention.v."),
          (".attn.g_proj.", ".attention.output_gate."), (".attn.gt_proj.", ".attention.decay_gate."),
          (".attn.out_proj.", ".attention.out."), (".mlp.fc1.", ".mlp.0."), (".mlp.fc2.", ".mlp.2."),
          ("final_layer.adaLN_modulation.1.", "modulation."), (".adaLN_modulation.1.", ".modulation."),
          ("final_layer.linear.", "out.")]


def arflow(official, given):
    """The configuration (read off the shapes) and the weights of an ARFlow checkpoint."""
    ours = renamed(useful("arflow", official, given), ARFLOW)
    ours["latent_scale"] = torch.tensor(0.18215)                        # of the Stable Diffusion VAE
    D, C, p, _ = ours["embed.weight"].shape
    N = official["pos_embed"].shape[1]
    sines = importlib.import_module("arflow").sincos_pos_embed(round(N ** 0.5), D)
    common.require(torch.allclose(official["pos_embed"][0].double(), sines, atol=5e-3), "pos_embed: not the sine table")
    shape = dict(width=D, patch=p, size=p * round(N ** 0.5), heads=len(ours["blocks.0.attention.decay_gate.weight"]),
                 depth=len([name for name in ours if name.endswith("attention.decay_gate.weight")]))
    return dict(data="latents:official", name="official", **shape) | given, {"ema": ours}


VITOK_BLOCK = [(".attn.qkv.", ".attention.qkv."), (".attn.proj.", ".attention.out."), (".mlp.fc1.", ".gate."),
               (".mlp.fc2.", ".up."), (".mlp.fc3.", ".down."), ("linear_modulation", "modulation")]
VITOK = [("encoder.blocks.", "encoder.trunk.blocks."), ("encoder.norm.", "encoder.trunk.norm."),
         ("decoder.blocks.", "decoder.trunk.blocks."), ("decoder.norm.", "decoder.trunk.norm."),
         ("tubelet_embed.proj.", "encoder.embed."), ("encoder_to_code.", "encoder.to_code."),
         ("code_to_decoder.", "decoder.from_code."), ("tubelet_decode.proj.weight", "decoder.to_pixels.weight"),
         ("tubelet_decode.proj.bias", "decoder.colour"), *VITOK_BLOCK]
VITOK_DIT = [("posemb", "pos_embed"), ("input_width_to_width.", "enter."), ("t_embedder.mlp.", "time."),
             ("encoder.", "trunk."), ("y_embedder.embedding_table.", "label."), ("final_layer.norm_final.", "norm."),
             ("final_layer.adaLN_modulation.0.", "modulation."), ("final_layer.linear.", "head."), *VITOK_BLOCK]


def vitok(official, given):
    """The configuration and the weights of a ViTok auto-encoder (release of January 2025: 1-D RoPE, GELU gate)."""
    ours = renamed(useful("vitok", official, given), VITOK)
    kernel = ours["encoder.embed.weight"]
    D, p, q = len(kernel), kernel.shape[-1], kernel.shape[2] if kernel.ndim == 5 else 1       # (D, 3, [q,] p, p)
    ours["encoder.embed.weight"] = kernel.flatten(1)
    ours["decoder.to_pixels.weight"] = ours["decoder.to_pixels.weight"].flatten(1).T
    ours["decoder.colour"] = ours["decoder.colour"].view(3, 1, 1, 1)
    if "mask_token" in ours:
        ours["decoder.blank"] = ours.pop("mask_token").flatten()
    c = ours["decoder.from_code.weight"].shape[1]
    depths = [len([name for name in ours if name.startswith(side) and name.endswith("qkv.weight")])
              for side in ("encoder", "decoder")]
    sides = [f"{D}x{depth}x{16 if D == 1152 else D // 64}" for depth in depths]
    shape = dict(model=f"{sides[0]}-{sides[1]}/{q}x{p}", channels=c, masked="decoder.blank" in ours,
                 variational=len(ours["encoder.to_code.weight"]) == 2 * c, rope="1d", act="gelu", name="official")
    return shape | given, {"tokenizer": ours}


def vitok_dit(official):
    """The weights of a ViTok generator; a sample also wants the auto-encoder that its codes come from."""
    ours = renamed(official, VITOK_DIT)
    return ours | {"pos_embed": ours["pos_embed"][0]}


FLEXTOK = [("encoder.module_dict.", "encoder."), ("decoder.module_dict.", "decoder."), ("enc_patch_emb.patch_proj.", "embed."),
           ("enc_register_module.", ""), ("enc_transformer.", ""), ("enc_to_latents.proj.", "head."),
           ("dec_from_latents.proj.", "read."), ("dec_registers_posemb_module.posembs", "token_position"),
           ("dec_nested_dropout.dropout_mask_token", "mask"), ("dec_latent_dropout.nullcond", "null"),
           ("dec_noise_patch_emb.patch_proj.", "embed."), ("dec_time_embedder.mlp.", "time."), ("dec_transformer.", ""),
           ("dec_to_patches.adaLN_modulation.1.", "modulation."), ("dec_to_patches.proj.", "head."),
           (".adaLN_modulation.1.", ".modulation."), (".attn.proj.", ".attention.wo."), (".attn.w", ".attention.w"),
           (".mlp.fc", ".w")]


def flextok(official, given):
    """A released FlexTok tokenizer (d12-d12, d18-d18, d18-d28) without its VAE."""
    ours = renamed(useful("flextok", official, given), FLEXTOK)
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


def detailflow_tokenizer(official, given=()):
    """The weights of a DetailFlow tokenizer; or of SigLIP2's vision model, to start from."""
    own = useful("detailflow", official, dict(given))
    if not any(re.search("visual_model|vision_model", name) for name in own):       # SigLIP2's vision model alone
        own = {f"vision_model.{name}": value for name, value in own.items()}
    ours = renamed(own, DETAILFLOW)
    for name in [name for name in ours if ".q_proj." in name]:
        parts = [ours.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        ours[name.replace("self_attn.q_proj", "qkv")] = torch.cat(parts)
    for name, value in ours.items():
        if name.endswith("grid"):
            ours[name] = value.unflatten(0, (round(len(value) ** 0.5), -1))
        elif name.endswith("embed.weight") and value.ndim == 4:                     # a Conv2d (D, 3, f, f)
            ours[name] = value.permute(0, 2, 3, 1).flatten(1)                       # patches as (row, column, channel)
        elif name.endswith(("queries", "refined", "positions", "decoder.mask")):
            ours[name] = value.reshape(-1, value.shape[-1]).squeeze(0) if name.endswith("mask") else value[0]
    return ours


def detailflow(official, given):
    """A DetailFlow tokenizer; its AR model, joined to a converted --tokenizer; or SigLIP2, to start from."""
    if "tok_embeddings.weight" in official:
        ours = renamed(useful("detailflow", official, given), DETAILFLOW_AR)
        (K, D), m = ours["table.weight"].shape, len(ours["blocks.0.up.weight"])
        depth = len([name for name in ours if name.endswith("qkv.weight")])
        common.require(given.get("tokenizer"), "give --tokenizer CHECKPOINT, the converted tokenizer that draws its tokens")
        found = common.read_checkpoint(given["tokenizer"], "detailflow")
        shape = dict(gpt=f"{D}x{depth}x{max(1, D // 64)}x{m}", codes=K, group=1 + len(ours["masks"]), stage="ar")
        return found["config"] | shape | given, {"tokenizer": found["state"]["tokenizer"], "ema": ours}
    ours = detailflow_tokenizer(official, given)
    if "vq.codes" not in ours:
        return siglip2(ours, given)
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


def siglip2(ours, given):
    """The encoder's part of a tokenizer, to start from."""
    (D, S), m = ours["encoder.embed.weight"].shape, len(ours["encoder.blocks.0.up.weight"])
    f = round((S // 3) ** 0.5)
    shape = dict(encoder=f"{D}x{siglip2_depth(given)}x{16 if D == 1152 else max(1, D // 64)}x{m}", patch=f,
                 size=f * len(ours["encoder.grid"]), name="siglip2")
    return shape | given, {"tokenizer": ours}


def slimfit(official, given):
    """A fine-tuned BERT or ViT of the usual names; what no shape tells (heads, data, classes' file) is given."""
    import slimfit as method
    ours = {method.our_name(name): value for name, value in useful("slimfit", official, given).items()}
    common.require("head.weight" in ours, "no head: a pre-trained encoder; python slimfit.py --weights reads it as it is")
    K, d = ours["head.weight"].shape
    shape = dict(width=d, heads=max(1, d // 64), classes=K, name="official",
                 depth=len([name for name in ours if re.fullmatch(r"blocks\.\d+\.out\.bias", name)]))
    if "cls" in ours:
        p = ours["patch.weight"].shape[-1]
        shape |= dict(family="vit", patch=p, image=p * round((ours["position"].shape[1] - 1) ** 0.5),
                      scaled="blocks.0.scale1" in ours)
    else:
        shape |= dict(family="bert", words=len(ours["word.weight"]), positions=len(ours["position.weight"]),
                      target="class" if "pooler.weight" in ours else "span")
    return shape | given, {"model": ours}


CONVERTERS = {"arflow": arflow, "vitok": vitok, "flextok": flextok, "detailflow": detailflow, "slimfit": slimfit}


def empty_models(method, cfg, state):
    """{name in the checkpoint: the module it is for}, without memory."""
    module = importlib.import_module(method)
    with torch.device("meta"):
        if method == "arflow":
            C, K = state["ema"]["embed.weight"].shape[1], len(state["ema"]["label.weight"]) - 1
            return {"ema": module.ARFlow(cfg, C, K)}
        if method == "vitok":
            return {"tokenizer": module.Autoencoder(cfg)}
        if method == "flextok":
            return {"ema": module.Tokenizer(cfg)}
        if method == "slimfit":
            return {"model": module.build_model(cfg)}
        models = {"tokenizer": module.Tokenizer(cfg, len(state["tokenizer"].get("align.4.bias", ())))}
        if "ema" in state:                                              # the last row is "no label"
            models["ema"] = module.AR(cfg, len(state["ema"]["label.weight"]) - 1)
        return models


def check_places(method, cfg, state):
    """UserError unless every tensor has its place in our model, of its shape, and no place stays empty."""
    for part, model in empty_models(method, cfg, state).items():
        places, found = model.state_dict(), state[part]
        lost = [name for name in found if name not in places]
        common.require(not lost, f"no place in {method}.py for {len(lost)} tensors ({', '.join(lost)[:80]})")
        other = [name for name, value in found.items() if value.shape != places[name].shape]
        common.require(not other, f"{other[:1]} is {[list(found[n].shape) for n in other[:1]]}, {method}.py wants "
                               f"{[list(places[n].shape) for n in other[:1]]}; see the fields of --help")
        if cfg.name == "siglip2":                                       # a start: the rest of the tokenizer is new
            places = [name for name in places if re.match(r"encoder\.(embed|grid|blocks|norm)", name)]
        empty = [name for name in places if name not in found]
        common.require(not empty, f"lacks {len(empty)} tensors of {method}.py's model ({', '.join(empty)[:80]})")


def convert(method, source, target, given):
    """Write `target` from the official file `source`; given: fields that no tensor tells. Returns a report."""
    common.require(method in CONVERTERS, f"{method}: no converter; there are {', '.join(CONVERTERS)}")
    module = importlib.import_module(method)
    official = {name: value.float() if value.is_floating_point() else value
                for name, value in read_official(source).items()}
    try:
        idle = idle_names(method, official, given)
        fields, state = CONVERTERS[method](official, given)
        cfg = dataclasses.replace(module.Config(), **fields)
        check_places(method, cfg, state)
    except common.UserError as error:
        raise common.UserError(f"{source}: {error}") from None
    except (KeyError, IndexError, ValueError, RuntimeError) as error:   # a name that is not there, another shape
        reason = str(error).split("\n")[0][:80]
        raise common.UserError(f"{source}: not a checkpoint of {method}'s authors ({reason})") from None
    saved = {"method": method, "config": dataclasses.asdict(cfg), "step": 0, "sums": {}, "count": 0, "state": state}
    common.write_atomic(target, lambda file: torch.save(saved, file))
    reasons = {reason: [name for name in idle if idle[name] == reason] for reason in idle.values()}
    lines = [f"left out {len(names)} ({names[0]}{', ...' if names[1:] else ''}): {why}" for why, names in reasons.items()]
    return [f"{len(official) - len(idle)} of {len(official)} tensors used", *lines]


def main(argv):
    """The command line: METHOD IN OUT, then fields of that method's Config as on its own command line."""
    common.require(len(argv) >= 3, "usage: python -m tests.official METHOD IN OUT [--field value ...]")
    module = importlib.import_module(argv[0]) if argv[0] in CONVERTERS else None
    given = {}
    if module:
        cfg = common.cli(module.Config, module.PRESETS, __doc__, argv[3:])
        base = common.cli(module.Config, module.PRESETS, __doc__, [])
        given = {name: value for name, value in vars(cfg).items() if value != getattr(base, name)}
    common.require(Path(argv[1]).exists(), f"{argv[1]}: no such file")
    print("\n".join(convert(argv[0], argv[1], argv[2], given)))
    print(f"{argv[2]}: a checkpoint of {argv[0]}.py")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (common.UserError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
