"""python -m tests.official: every tensor of a foreign file has its place, a known reason to be left out, or is refused."""

import json
import runpy
import struct

import common
import detailflow
import slimfit
import vitok
from tests import ROOT, official

import numpy as np
import pytest
import torch


def golden(name, start):
    """{official name: tensor} of a stored case of the authors' own."""
    with np.load(ROOT / "tests/golden" / name) as arrays:
        return {key[len(start):]: torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith(start)}


def arflow_weights():
    return golden("arflow.npz", "weights/")


def vitok_weights():
    return golden("vitok_ae_image_rope1d.npz", "w/")


VITOK = {"model": "36x1x3-36x2x3/1x8", "size": 32}


def converted(method, weights, where, given=()):
    """Convert in `where`; the report, the configuration and the state."""
    torch.save(weights, where / "theirs.pt")
    report = official.convert(method, where / "theirs.pt", where / "ours.pt", dict(given))
    saved = common.read_checkpoint(where / "ours.pt", method)
    return report, saved["config"], saved["state"]


def refused(method, weights, where, given=()):
    """The one line that refuses; nothing may be written."""
    with pytest.raises(common.UserError) as error:
        converted(method, weights, where, given)
    assert [path.name for path in where.iterdir()] == ["theirs.pt"] and "\n" not in str(error.value)
    return str(error.value)


# --- Every tensor has its place ------------------------------------------------

@pytest.mark.parametrize("method, weights, given", [("arflow", arflow_weights, {}), ("vitok", vitok_weights, VITOK)])
def test_an_unknown_tensor_or_a_missing_one_is_refused(method, weights, given, tmp_path):
    more = weights() | {"blocks.9.surprise": torch.ones(3)}
    assert "no place" in refused(method, more, tmp_path, given) and "surprise" in refused(method, more, tmp_path, given)
    for name in ("x_embedder.proj.bias", "decoder.blocks.1.mlp.fc3.bias"):
        less = {key: value for key, value in weights().items() if key != name}
        if len(less) < len(weights()):
            assert "lacks 1 tensors" in refused(method, less, tmp_path, given)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    weights = arflow_weights()
    weights["t_embedder.mlp.2.bias"] = torch.ones(7)
    assert "time.2.bias" in refused("arflow", weights, tmp_path)


def test_the_report_counts_what_is_used_and_says_why_the_rest_is_not(tmp_path):
    weights = arflow_weights()
    report, _, state = converted("arflow", weights, tmp_path)
    assert report == [f"{len(weights) - 1} of {len(weights)} tensors used",
                      "left out 1 (pos_embed): the frozen sine table, computed anew"]
    assert len(state["ema"]) == len(weights)                                        # latent_scale comes in


def test_arflows_frozen_table_must_be_the_sine_table(tmp_path):
    """A learned table of the same name would be lost in silence."""
    weights = arflow_weights()
    weights["pos_embed"] = weights["pos_embed"] + 0.1
    assert "pos_embed" in refused("arflow", weights, tmp_path)


@pytest.mark.parametrize("name, shape, reason", [
    ("posemb", (1, 16, 36), "added to the tokens"), ("dec_posemb", (1, 16, 36), "added to the tokens"),
    ("code", (1, 8, 36), "latent variant"), ("enc_freqs", (2, 1, 54), "learned rotations")])
def test_what_vitok_cannot_hold_is_refused_by_name(name, shape, reason, tmp_path):
    """Video checkpoints and those with sine tables; the latent variant; two-dimensional mixed rotations."""
    said = refused("vitok", vitok_weights() | {name: torch.randn(shape)}, tmp_path, VITOK)
    assert name in said and reason in said


def test_vitoks_masked_and_plain_variants_are_read_off_the_tensors(tmp_path):
    _, cfg, state = converted("vitok", vitok_weights() | {"mask_token": torch.arange(4.0).view(1, 1, 4)}, tmp_path, VITOK)
    assert cfg["masked"] and cfg["variational"] and state["tokenizer"]["decoder.blank"].tolist() == [0, 1, 2, 3]
    weights = vitok_weights()
    for name in ("encoder_to_code.weight", "encoder_to_code.bias"):
        weights[name] = weights[name][:4]
    _, cfg, _ = converted("vitok", weights, tmp_path, VITOK)
    assert cfg["channels"] == 4 and not cfg["variational"] and not cfg["masked"]


def test_vitok_with_a_conv2d_patch_embedding(tmp_path):
    """An image model may embed its patches by a Conv2d: the same numbers without the axis of time."""
    flat = vitok_weights()
    for name in ("tubelet_embed.proj.weight", "tubelet_decode.proj.weight"):
        flat[name] = flat[name][:, :, 0]
    _, cfg, state = converted("vitok", flat, tmp_path, {"model": "36x1x3-36x2x3/8", "size": 32})
    model = vitok.Autoencoder(vitok.Config(**cfg))
    model.load_state_dict(state["tokenizer"])
    stored = np.load(ROOT / "tests/golden/vitok_ae_image_rope1d.npz")
    with torch.no_grad():
        mean, _ = model.encoder(torch.from_numpy(stored["x"]))
        torch.testing.assert_close(mean, torch.from_numpy(stored["mean"]), rtol=0, atol=2e-5)


def test_flextok_leaves_out_what_it_names_and_refuses_the_rest(tmp_path):
    """Its stored case is not in the repository: names alone, on a model of ours."""
    names = ["vae.decoder.conv_in.weight", "encoder.module_dict.enc_posemb_module.posembs",
             "decoder.module_dict.dec_patches_posemb_module.posembs", "regularizer._levels", "regularizer._basis"]
    weights = {name: torch.ones(2) for name in names}
    assert set(official.idle_names("flextok", weights, {})) == set(names)
    kept = {"decoder.module_dict.dec_registers_posemb_module.posembs": torch.ones(2), "vaexyz": torch.ones(2)}
    assert not official.idle_names("flextok", kept, {})
    assert "not a checkpoint of flextok's authors" in refused("flextok", kept, tmp_path)


# --- SigLIP2, to start DetailFlow from ------------------------------------------

def siglip2(prefix="vision_model.", conv=False, depth=2, D=32, side=4, f=4):
    """SigLIP2's vision model under the names of transformers, with what a whole model holds beside it."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g)
    kernel = draw(D, 3, f, f)
    weights = {"embeddings.patch_embedding.weight": kernel if conv else kernel.permute(0, 2, 3, 1).flatten(1),
               "embeddings.patch_embedding.bias": draw(D), "embeddings.position_embedding.weight": draw(side ** 2, D),
               "post_layernorm.weight": draw(D), "post_layernorm.bias": draw(D), "head.probe": draw(1, 1, D)}
    for i in range(depth):
        layer = f"encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights |= {f"{layer}.self_attn.{part}.weight": draw(D, D), f"{layer}.self_attn.{part}.bias": draw(D)}
        for part, (m, n) in (("fc1", (2 * D, D)), ("fc2", (D, 2 * D))):
            weights |= {f"{layer}.mlp.{part}.weight": draw(m, n), f"{layer}.mlp.{part}.bias": draw(m)}
        for part in ("layer_norm1", "layer_norm2"):
            weights |= {f"{layer}.{part}.weight": draw(D), f"{layer}.{part}.bias": draw(D)}
    weights = {prefix + name: value for name, value in weights.items()}
    if prefix:
        weights |= {"text_model.embeddings.token_embedding.weight": draw(5, D), "logit_scale": draw(1)}
    return weights


SIGLIP2 = {"encoder": "32x2x1x64", "decoder": "16x1x2x16", "tokens": 4, "codes": 16}


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
@pytest.mark.parametrize("conv", [False, True])
def test_siglip2_with_and_without_prefix_as_linear_and_as_convolution(prefix, conv, tmp_path):
    """All four name the same encoder: 2 blocks of 12 tensors, embedding, grid and norm."""
    report, cfg, state = converted("detailflow", siglip2(prefix, conv), tmp_path, SIGLIP2)
    ours = state["tokenizer"]
    assert report[0].startswith("37 of ") and len(ours) == 2 * 12 + 5 and (cfg["patch"], cfg["size"]) == (4, 16)
    _, _, first = converted("detailflow", siglip2(), tmp_path, SIGLIP2)
    assert all(torch.equal(value, first["tokenizer"][name]) for name, value in ours.items())
    model = detailflow.Tokenizer(detailflow.Config(**cfg))
    assert not model.load_state_dict(ours, strict=False).unexpected_keys
    assert torch.equal(model.encoder.blocks[1].norm1.weight, siglip2()["vision_model.encoder.layers.1.layer_norm1.weight"])


def test_siglip2s_deeper_blocks_are_left_out_with_their_reason(tmp_path):
    report, _, state = converted("detailflow", siglip2(depth=4), tmp_path, SIGLIP2)
    assert len(state["tokenizer"]) == 29 and any("behind the encoder's 2" in line and "left out 32" in line for line in report)


def test_siglip2_that_is_too_shallow_is_refused(tmp_path):
    said = refused("detailflow", siglip2(depth=1), tmp_path, SIGLIP2)
    assert "lacks 12 tensors" in said


# --- Files of every kind --------------------------------------------------------

KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def save_safetensors(path, tensors):
    """The format by hand: length of the header, header, raw values."""
    header, body = {}, b""
    for name, value in tensors.items():
        raw = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": KINDS[value.dtype], "shape": list(value.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def written(kind, where):
    """The authors' small ARFlow as a file or folder of this kind."""
    weights = {name: value.float() for name, value in arflow_weights().items()}
    if kind == "npz":
        np.savez(where / "theirs.npz", **{name: value.numpy() for name, value in weights.items()})
    elif kind == "safetensors":
        save_safetensors(where / "theirs.safetensors", weights)
    elif kind == "wrapped":
        torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, where / "theirs.pth")
        return where / "theirs.pth"
    elif kind in ("index", "folder"):
        names = sorted(weights)
        parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
        for part, inside in parts.items():
            save_safetensors(where / part, {name: weights[name] for name in inside})
        index = {"weight_map": {name: part for part, inside in parts.items() for name in inside}}
        (where / "model.safetensors.index.json").write_text(json.dumps(index))
        return where if kind == "folder" else where / "model.safetensors.index.json"
    else:
        torch.save(weights, where / f"theirs.{kind}")
    return where / f"theirs.{kind}"


@pytest.mark.parametrize("kind", ["pt", "pth", "bin", "npz", "safetensors", "wrapped", "index", "folder"])
def test_every_kind_of_file_gives_the_same_checkpoint(kind, tmp_path):
    (tmp_path / "in").mkdir()
    official.convert("arflow", written(kind, tmp_path / "in"), tmp_path / "ours.pt", {})
    ours = common.read_checkpoint(tmp_path / "ours.pt", "arflow")["state"]["ema"]
    _, state = official.arflow(arflow_weights(), {})
    assert ours.keys() == state["ema"].keys()
    assert all(torch.equal(value, state["ema"][name].float()) for name, value in ours.items())


def test_half_precision_becomes_single(tmp_path):
    save_safetensors(tmp_path / "theirs.safetensors", {name: value.bfloat16() for name, value in arflow_weights().items()})
    official.convert("arflow", tmp_path / "theirs.safetensors", tmp_path / "ours.pt", {})
    ours = common.read_checkpoint(tmp_path / "ours.pt", "arflow")["state"]["ema"]
    assert {value.dtype for value in ours.values()} == {torch.float32}


@pytest.mark.parametrize("name, body", [
    ("a.pt", b"no weights"), ("a.safetensors", b"\x08\0\0\0\0\0\0\0{"), ("a.npz", b"PK"), ("a.txt", b"hello"),
    ("model.safetensors.index.json", b'{"weight_map": {"x": "gone.safetensors"}}'), ("a.bin", b"")])
def test_a_foreign_file_is_one_line_and_exit_2(name, body, tmp_path):
    (tmp_path / name).write_bytes(body)
    with pytest.raises(common.UserError) as error:
        official.main(["arflow", str(tmp_path / name), str(tmp_path / "ours.pt")])
    assert error.value.code == 2 and "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("method", list(official.CONVERTERS))
@pytest.mark.parametrize("saved", [{}, [1, 2], {"a": 1}, {"weight": torch.ones(2, 2)}, {"model": {"a": torch.ones(1)}}])
def test_another_programs_checkpoint_is_one_line(method, saved, tmp_path):
    assert "theirs.pt" in refused(method, saved, tmp_path)


def test_one_methods_checkpoint_given_to_another_is_one_line(tmp_path):
    for method, weights in (("vitok", arflow_weights()), ("flextok", arflow_weights()), ("arflow", vitok_weights())):
        assert "authors" in refused(method, weights, tmp_path)


def test_the_command_prints_one_line_and_leaves_with_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["official", "arflow", str(tmp_path / "gone.pt"), "ours.pt"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tests/official.py"), run_name="__main__")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "gone.pt: no such file" in err


# --- SlimFit --------------------------------------------------------------------

def bert(head, pooler=True, D=8, K=2):
    """A BERT of one block under the usual names."""
    shapes = {"bert.embeddings.word_embeddings.weight": (30, D), "bert.embeddings.position_embeddings.weight": (9, D),
              "bert.embeddings.token_type_embeddings.weight": (2, D), "bert.embeddings.LayerNorm.weight": (D,),
              "bert.embeddings.LayerNorm.bias": (D,)}
    block = "bert.encoder.layer.0."
    for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
        shapes |= {f"{block}{part}.weight": (D, D), f"{block}{part}.bias": (D,)}
    for part in ("attention.output.LayerNorm", "output.LayerNorm"):
        shapes |= {f"{block}{part}.weight": (D,), f"{block}{part}.bias": (D,)}
    for part, (m, n) in (("intermediate.dense", (4 * D, D)), ("output.dense", (D, 4 * D))):
        shapes |= {f"{block}{part}.weight": (m, n), f"{block}{part}.bias": (m,)}
    if pooler:
        shapes |= {"bert.pooler.dense.weight": (D, D), "bert.pooler.dense.bias": (D,)}
    if head:
        shapes |= {f"{head}.weight": (K, D), f"{head}.bias": (K,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | {"bert.embeddings.position_ids": torch.arange(9)}


@pytest.mark.parametrize("head, pooler, target", [("classifier", True, "class"), ("qa_outputs", False, "span")])
def test_a_span_model_is_told_from_its_missing_pooler(head, pooler, target, tmp_path):
    report, cfg, state = converted("slimfit", bert(head, pooler), tmp_path)
    assert cfg["target"] == target and cfg["depth"] == 1 and report[1].startswith("left out 1 (bert.embeddings.position_ids)")
    slimfit.build_model(slimfit.Config(**cfg)).load_state_dict(state["model"])


def test_a_pre_trained_encoder_without_head_is_told_where_to_go(tmp_path):
    assert "--weights" in refused("slimfit", bert(""), tmp_path)
