"""python -m tests.audit [FILE ...] [--write] [--trace]    from every equation to its code, its tests, the authors' numbers

For each label of a file: its equation, the lines that compute it, the tests that name it, and the golden case that pins
it, an array that the authors' own code has made (../shared/goldens; where that is absent, as stored here). Exit code 1
if any of them is missing. --write also renews assets/audit/FILE.md, in which lines stand without their numbers.
--trace runs the golden tests and names the lines that the test of their equation does not execute.

What the texts of the code and of the tests tell is read from them: equations, line numbers, the tests. What nothing
but reading can tell stands below in TRAIL, a line a label:

    LABEL | function: words && words; function: words | case: arrays > test (what of it)    or at last: - why none

The words are part of a line of that function. A case is a file of ../shared/goldens/FILE; the test compares with it.
"""

import argparse
import ast
import functools
import re
import sys
import textwrap
import threading
from pathlib import Path
from typing import NamedTuple

from tests import ROOT

import numpy as np
import pytest

LETTERS = {"arflow": "A", "flextok": "F", "detailflow": "D", "vitok": "V", "slimfit": "SI", "gpipe": "G"}
FOLDER = ROOT / "assets" / "audit"
MOST = 6                                    # tests of one label that a table names

TRAIL = {
    "arflow": """
A1  | data.Data.latents: torch.exp(logvar && device=device) * z; draw: dataset.latents( | - no case draws latents: the authors' encoder is another project
A2  | draw: .sort(1) | - a law of random numbers, which no array can pin
A3  | draw: shard_noise( | - a law of random numbers, which no array can pin
A4  | interpolate: t * x1 + (1 - t) * x0 | - the cases hold the network alone, not its training
A5  | loss: (v.to(u.dtype) - u).square().mean() | - the cases hold the network alone, not its training
A6  | ARFlow.forward: self.label(y)[:, None] + self.time( | 06_model_f64: out out_null_label > test_official_outputs_and_states
A7  | sincos_pos_embed: w = 10_000.0 && line = torch.cat && torch.cat([x, y], -1) | 06_model_weights_f32: pos_embed > test_sincos_pos_embed_equals_the_official_one
A8  | timestep_embedding: f = 10_000.0 && torch.cat([angle.cos(), angle.sin()], -1); ARFlow.__init__: self.time = | 06_model_f64: cond_c > test_official_embeddings
A9  | Block.forward: six = self.modulation && self.attention( && x = x + gate_msa && x = x + gate_mlp | 06_model_f64: out > test_official_outputs_and_states
A10 | ARFlow.forward: self.modulation(F.silu(c)) && self.out(modulate( && permute( && x.reshape(B, n, C, h, w) | 06_model_f64: out > test_official_outputs_and_states
A11 | Attention.forward: self.q(x) && self.k(x) && self.v(x) && self.decay_gate(x + c && self.output_gate(x) | 06_model_f64: out final_states > test_official_outputs_and_states
A12 | Attention.forward: rms_norm(self.q(x)) && rms_norm(self.k(x)) && rms_norm(self.v(x)); rms_norm: F.rms_norm | 06_model_f64: out final_states > test_official_outputs_and_states
A13 | Attention.forward: F.logsigmoid(a) | 06_model_f64: final_states > test_official_outputs_and_states
A14 | Attention.forward: d ** -0.5 | 06_model_f64: out final_states > test_official_outputs_and_states
A15 | hybrid: log_decay.cumsum(-1).exp() | 06_model_f64: out out_stream > test_official_outputs_and_states
A16 | hybrid: gamma = | 06_model_f64: final_states > test_official_outputs_and_states
A17 | hybrid: inside = && past = && inside + past | 06_model_f64: out out_each_image_alone > test_official_outputs_and_states
A18 | hybrid: added = && states.append( | 06_model_f64: final_states out_stream > test_official_outputs_and_states
A19 | hybrid_matrix: inside = && exponent = && decay = && M = inside && M @ v | - our own plain form: the authors have the recurrence, which the case pins, and a test holds the two equal
A20 | Attention.forward: rms_norm(o) && F.silu(self.output_gate(x)) | 06_model_f64: out > test_official_outputs_and_states
A21 | sample: drift = && (2 * (1 - t) * dt) ** 0.5 * noise && (1 - LAST_TIME) * drift | - the cases hold the network alone, not the sampler
A22 | guided_velocity: guided = v_none && v_y[:, cfg_channels:] | - the cases hold the network alone, not the sampler
""",
    "flextok": """
F1  | data.Data.latents: torch.exp(logvar && device=device) * z; read_images: dataset.latents( | - every case starts from latents
F2  | patchify: x.permute( | encoder_small: z tokens > test_official_encoder
F3  | sincos_pos_embed: frequency = && wave = && torch.cat([wave.repeat_interleave | posemb: sincos_4x4_d64 sincos_8x8_d32 > test_official_position_table
F4  | Encoder.forward: patches = && h = torch.cat([patches, registers], 1) | encoder_small: z tokens > test_official_encoder
F5  | Encoder.__init__: mask = | encoder_small: z tokens > test_official_encoder
F6  | Block.forward: h[:, first:] + self.attention( && h + self.mlp( | encoder_small: z > test_official_encoder
F7  | Attention.forward: q = && k, v = && scale=8 / self.d; Attention.keys_values: self.norm( | encoder_small: z > test_official_encoder
F8  | Block.mlp: F.silu(self.w1(h)) * self.w3(h) | encoder_small: z > test_official_encoder
F9  | Encoder.forward: self.head(self.norm( ; Encoder.__init__: nn.init.zeros_(self.head.weight) | encoder_small: z > test_official_encoder
F10 | FSQ.forward: half = && offset = && b = half * torch.tanh | fsq_release: quant tokens extreme_tokens > test_official_quantiser_with_its_gradient
F11 | FSQ.forward: rounded = && rounded / (self.levels // 2) | fsq_release: quant grad_z > test_official_quantiser_with_its_gradient
F12 | FSQ.forward: digits = && (digits * self.basis).sum(-1) | fsq_release: tokens > test_official_quantiser_with_its_gradient
F13 | FSQ.values: digits = && (digits - self.levels // 2) | fsq_release: idx idx_embedding > test_official_quantiser_with_its_gradient
F14 | Decoder.tokens: self.read(values) + self.token_position | decoder_small: regs_after_dropout > test_official_decoder
F15 | Decoder.tokens: dropped = && self.mask, r; nested_lengths: 2 ** (u * R.bit_length()) && 1 + (u * R) | decoder_small: regs_after_dropout velocity_keep > test_official_decoder (the mask; the law of k is random)
F16 | Decoder.tokens: self.null, r | decoder_small: velocity_uncond velocity_mixed > test_official_decoder
F17 | timestep_embedding: frequency = && torch.cat([angle.cos(), angle.sin()], 1); Decoder.forward: tau = | decoder_small: velocity_full > test_official_decoder
F18 | DecoderBlock.forward: vectors = self.modulation && torch.addcmul(h, gate_msa, y) && torch.addcmul(h, gate_mlp, y); Decoder.forward: h = torch.cat([patches, self.tokens( | decoder_small: velocity_full repa_patches > test_official_decoder
F19 | Decoder.forward: self.modulation(F.silu(tau)) && v = self.head( && unpatchify(v | decoder_small: velocity_full > test_official_decoder
F20 | loss_tokenizer: torch.lerp(x, noise | - the released code has no training; the cases hold none
F21 | flow_time: t = 1 - u - 0.25 | - the released code has no training; the cases hold none
F22 | loss_tokenizer: flow = | - the released code has no training; the cases hold none
F23 | loss_tokenizer: F.cosine_similarity(; Decoder.forward: early = h[ | - the released code has no training: its patches (repa_patches) are pinned, the loss is not
F24 | loss_tokenizer: flow - model.repa * cosine | - the released code has no training; the cases hold none
F25 | sample: x = x - v / cfg.num_steps | - the selection of cases holds no run of the sampler
F26 | classifier_free_guidance: (scale - 1) * (v - v_null) | - the selection of cases holds no run of the sampler
F27 | adaptive_projected_guidance: diff = v - v_null && cut = && parallel = && orthogonal = && (scale - 1) * orthogonal | - the selection of cases holds no run of the sampler
F28 | sample: F.pad(ids, (0, R - k)) && num_tokens = | - the selection of cases holds no run of the sampler
F29 | loss_ar: F.cross_entropy( | - no code of this GPT was released with the paper
F30 | GPT.encode_condition: start + self.condition(cond); ClassCondition.forward: torch.where( | - no code of this GPT was released with the paper
F31 | GPTBlock.forward: h = h + self.attention( && h = h + self.cross( && h + self.mlp( | - no code of this GPT was released with the paper
F32 | GPT.encode_condition: self.text(states && block.cross.keys_values(text); GPT.__init__: text = nn.Sequential( | - no code of this GPT was released with the paper
F33 | generate: logits = free + && common.filter_logits( && common.invert_distribution( | - no code of this GPT was released with the paper
""",
    "detailflow": """
D1  | resolution: share_missing && cfg.size - (cfg.size - 1) | 08b_tokenizer_small_clean: table_t_R_dec > test_official_tokenizer
D2  | make_target: mode="area" && mode="bicubic" | 08b_tokenizer_small_clean: train_t08_target train_t03_target > test_official_losses_and_gradients
D3  | rotary_embedding: rate = && angle = && F.pad( | 10_ar_small_g4: freqs_cis teacher_forced_logits > test_official_ar_logits_loss_and_tables
D4  | VQ.forward: u = && e = self.vectors && losses = && u + (e - u).detach(); VQ.nearest: topk( | 08b_tokenizer_small_clean: quant indices train_t16_l2_codebook_commit_entropy_align_total > test_official_losses_and_gradients
D5  | Encoder.forward: h = torch.cat([patches, z; Encoder.__init__: mask[self.P:, self.P:] = | 08b_tokenizer_small_clean: latent latent_first8_only > test_official_tokenizer
D6  | Decoder.forward: masks = self.mask && h = torch.cat( && unpatchify(self.head( | 08b_tokenizer_small_clean: decode_t08_res20 decode_t16_res32 > test_official_tokenizer
D7  | Tokenizer.correct: noisy = && noise = near && prefix = && z = torch.where(late && q2 = torch.where(late && total / (late.numel() | - the selection holds the clean pass alone
D8  | AR.embed: h = torch.cat([start; group_causal: torch.where(row < c | 10_ar_small_g4: teacher_forced_logits mask_ALLOWED > test_official_ar_logits_loss_and_tables
D9  | loss_tokenizer: F.mse_loss(recon, target) && losses["lpips"] = && losses["gan"] = && value = sum( | 08b_tokenizer_small_clean: train_t16_l2_codebook_commit_entropy_align_total > test_official_losses_and_gradients (without LPIPS and GAN)
D10 | loss_tokenizer: first = model.align( && feature = && losses["align"] = | 08b_tokenizer_small_clean: train_t08_l2_codebook_commit_entropy_align_total > test_official_losses_and_gradients
D11 | weights: lpips = && gan = | - the selection holds no schedule
D12 | prefix_length: t = 1 + int( && math.ceil(t / cfg.group) | - a law of random numbers, which no array can pin
D13 | noise_start: t = (u && t // cfg.group * cfg.group | - a law of random numbers, which no array can pin
D14 | augment: x = x + brightness && 1 + 2 * saturation && 1 + contrast && x = F.pad(x && hole = | - the authors' augmentation draws its own numbers; no case holds them
D15 | loss_disc: hinge = && lecam = && consistency = && weight * (hinge; disc_logits: (0.5, 1.0) | - the authors' discriminator needs DINO's weights; no case holds it
D16 | loss_ar: given = && target = torch.where( && F.cross_entropy( | 10_ar_small_g4: teacher_forced_loss > test_official_ar_logits_loss_and_tables (of clean sequences)
D17 | spans: yield i, i + 1 && yield i, i + g | 10_ar_small_g4: seqlens_cfg1.5_gradual0 argmax_cfg1.5_gradual0 > test_official_ar_generation
D18 | generate: logits = null +; guidance: cfg.cfg_scale * ( | 10_ar_small_g4: argmax_cfg3.0_gradual0 argmax_cfg3.0_gradual1 > test_official_ar_generation
D19 | draw_noise: data.uniform( | - a law of random numbers, which no array can pin
D20 | schedule: low + (1 - low) * && end + (1 - end); learning_rate: cfg.lr * cfg.batch / 256; learning_rate_ar: low=0.005 | - the selection holds no schedule
""",
    "vitok": """
V1  | patchify: x.permute( ; Encoder.forward: self.embed(patchify( | ae_image_rope1d: mean recon_mode > test_official_auto_encoder
V2  | Encoder.forward: self.to_code( && code.chunk(2, 2) && logvar.clamp(-30, 20) | ae_image_rope1d: mean logvar > test_official_auto_encoder
V3  | bottleneck: mean + torch.exp( | ae_image_rope1d: z_sampled recon_sampled > test_official_auto_encoder
V4  | count_costs: E = s.M * cfg.channels | - a count, published in tables, which the tests hold
V5  | Decoder.forward: self.to_pixels( && self.colour; unpatchify: x.permute( | ae_image_rope1d: recon_mode > test_official_auto_encoder
V6  | Block.forward: x + self.attention( && x + self.mlp( | ae_image_rope1d: mean recon_mode > test_official_auto_encoder
V7  | Block.mlp: self.act(self.gate(x)) * self.up(x); Block.__init__: hidden = | ae_image_rope1d: mean_silu recon_mode_silu > test_official_auto_encoder
V8  | rope_angles: rates = && positions[:, axis, None] * rates; rotary_table: sin = torch.stack(; rotate: x * cos + swapped * sin | ae_image_rope1d: mean recon_mode > test_official_auto_encoder
V9  | Encoder.forward: torch.cat((queries, x), 1) && x[:, :self.sizes.M]; Decoder.forward: torch.cat((self.from_code(z), masks), 1); sincos_pos_embed: rates = | - the selection holds no latent variant
V10 | Decoder.forward: kept = && torch.where(kept; draw: draws["length"] = | - the selection holds no masked variant
V11 | reconstruction_losses: cfg.kl * losses["kl"] && cfg.perceptual * losses["lpips"]; loss_decoder: value + weight * losses["gan"] | - the selection holds no step of training
V12 | kl_term: kl = 0.5 && kl.mean((1, 2)) | ae_image_rope1d: kl > test_official_auto_encoder
V13 | lpips: ((f - g).square() * head; unit_vectors: x / ( | - LPIPS is another project, whose weights are no part of this one
V14 | loss_decoder: losses["gan"] = | - the selection holds no discriminator
V15 | loss_disc: F.relu(1 - real) | - the selection holds no discriminator
V16 | ramp: (step - start) / length; train_decoder: weight = cfg.gan * ramp( | - the selection holds no schedule
V17 | ModulatedBlock.forward: x = x + gate_msa && x + gate_mlp | dit_small: out > test_official_generator
V18 | loss_dit: noisy = at( && noisy = noisy + at( | - the selection holds no loss of the generator
V19 | loss_dit: mse = && return mse + bound | - the selection holds no loss of the generator
V20 | variational_bound: logvar = low + (v + 1) / 2 | - the selection holds no loss of the generator
V21 | variational_bound: weight = betas && gap = && kl = 0.5 | - the selection holds no loss of the generator
V22 | first_step_nats: above = && below = && mass = torch.where( | - the selection holds no loss of the generator
V23 | guided: torch.lerp(unconditional | dit_small: out_cfg_0 out_cfg_1p5 out_cfg_3 > test_official_generator
V24 | sample: clean = (x - && x = math.sqrt(abar_next) * clean | - the selection holds no run of the sampler
V25 | sample: sigma = eta | - the selection holds no run of the sampler
V26 | learning_rate: rise = done / warmup && rise = 0.5 * && low + (1 - low) * rise | - the selection holds no schedule
V27 | count_costs: block = && depth * block | - a count, published in tables, which the tests hold
V28 | reconstruct: 10 * (4 / error).log10() | - the authors average another PSNR; by hand in the tests
""",
    "slimfit": """
S1  | quantise: code = ; restore: mul_(2.0 ** -f) | vit_model: all/logits all/grad/vit.layernorm.weight odd/loss > test_reference_models
S2  | pack4: 16 * first + second; unpack4: index_select( | vit_model: all/logits info_json > test_reference_models
S3  | Dense8.forward: ctx.save_for_backward(; Dense8.backward: dW = && g @ W, dW, rows.sum(0) | vit_model: none/logits odd/logits info_json > test_reference_models
S4  | Norm.forward: torch.native_layer_norm && largest(; Norm.backward: native_layer_norm_backward && dx.mul_(r) | vit_model: all/logits odd/logits info_json > test_reference_models
S5  | Gelu4.backward: unpack4(; gelu_slopes: slope = | vit_model: all/logits odd/logits > test_reference_models
S6  | Scores.backward: g @ restore(k | vit_model: all/logits odd/logits > test_reference_models
S7  | SoftmaxValue.forward: P = s.softmax(-1); SoftmaxValue.backward: ds = && P.mT @ g | vit_model: all/logits odd/logits > test_reference_models
S8  | activation_rows: rows = [ ; stock: products=False | vit_model: exact_autograd/logits info_json > test_reference_models
S9  | activation_rows: rows = [ | vit_model: all/logits odd/logits info_json > test_reference_models
S10 | activation_rows: ("input of pooler" && ("input of head" | bert_model: all/logits odd/logits info_json > test_reference_models
S11 | relative_change: ratio = (new - old) | - the selection holds no step of training
S12 | Scheduler.__init__: self.k = && self.distance = 1e20; Scheduler.freeze: self.active = choose(; Scheduler.measure: self.distance[self.active] = ; choose: order[t - k:] | - the selection holds no step of training
S13 | learning_rate: left = && whole = && cfg.lr * (left / whole) | - the selection holds no schedule
S14 | AdamW.step: sizes.append( && _foreach_lerp_( && _foreach_addcmul_( && _foreach_addcdiv_( && _foreach_mul_(params | - the selection holds no step of training
S15 | candidates: passage = && start[i] + end[j] && start[0] + end[0] | - a procedure of the task, SQuAD, not of the paper
""",
    "gpipe": """
G1  | Pipeline.run_stage: y = self.run_layer( ; Pipeline.__init__: self.stages = | transparency: logits > test_golden_transparency
G2  | partition: load = total - ; by_stage: rows[end - size:end] | - what a layer costs is ours to define; the cases choose their cuts by hand
G3  | partition: price = load && best = options.min(0) | - the paper has no algorithm; the cases choose their cuts by hand
G4  | scatter: tensor_split( | transparency: n10_loss n10_grad/0.weight > test_golden_transparency
G5  | Pipeline.do_forward: y = self.run_stage( | transparency: logits > test_golden_transparency
G6  | Pipeline.do_loss: value = batch.loss_fn(y); loss: F.cross_entropy( | transparency: loss n10_loss n10_WRONG_unweighted_loss > test_golden_transparency (of the whole mini-batch; without smoothing)
G7  | Pipeline.do_backward: torch.autograd.backward( ; schedule: in reversed(forward) | transparency: grad_x grad/0.weight > test_golden_transparency
G8  | Pipeline.do_backward: torch.autograd.backward( ; Pipeline.step: batch = self.run( | transparency: grad/0.weight traj_rmsprop_losses > test_golden_trajectories
G9  | Pipeline.do_forward: batch.stash[m, k] = ; Pipeline.do_backward: batch.stash.pop( && batch.interior.pop( ; footprint: interiors = | - memory: no array holds it, the tests count what is alive
G10 | bubble: (K - 1) / (M + K - 1) | - a count of idle units, which the tests take from the schedule
G11 | commit: var = && momentum * (now - old) | batchnorm_pipeline: M4_defer1_always/1.running_mean M4_defer1_except_last/1.running_var > test_golden_batch_norm
G12 | speed_up: M * sum(loads) | - derived here; the tests hold it against the schedule's makespan
G13 | pair_weights: n[dataset.direction] ** | - a law of random numbers, which no array can pin
G14 | transformer: nn.init.normal_( | - a law of random numbers, which no array can pin
G15 | Logits.forward: logits.clamp( | - the paper gives no value, and the authors' network is no case
""",
}


class Row(NamedTuple):
    """What the audit finds of a label."""

    label: str
    equation: list          # its lines
    code: list              # of (function, words, [(line number, line)])
    tests: list             # names of tests
    golden: str             # case: arrays > test; or - why none
    faults: list            # what is missing or wrong, in words


@functools.cache
def parsed(path):
    """(text, its lines, its syntax tree) of a file of the repository."""
    text = (ROOT / path).read_text()
    return text, text.split("\n"), ast.parse(text)


@functools.cache
def prose_lines(name):
    """{number: line} of a file's lines that are docstrings or comments alone, a comment without its #."""
    _, lines, tree = parsed(f"{name}.py")
    numbers = {number for number, line in enumerate(lines, 1) if line.strip().startswith("#")}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            numbers |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return {number: re.sub(r'^(\s*)(#|""")', lambda found: found[1] + " " * len(found[2]), lines[number - 1])
            for number in sorted(numbers)}


@functools.cache
def equations(name):
    """{label: its lines}: a definition is a label and two spaces at the start of a line of prose; deeper lines go on."""
    found, label, depth, last = {}, None, 0, 0
    for number, line in prose_lines(name).items():
        start = re.match(rf"\s*([{LETTERS[name]}]\d+)  +(\S.*)", line)
        indent = len(line) - len(line.lstrip())
        goes_on = label and number == last + 1 and line.strip() and indent > depth
        if start:
            label, depth = start[1], indent
            found[label] = [start[2].rstrip(' "')]
            column = start.start(2)
        elif goes_on:
            found[label].append(" " * max(0, indent - column) + line.strip().rstrip('"'))
        else:
            label = None
        last = number
    return found


def locate(tree, name):
    """The node of a function or class "A" or "A.b"; None where there is none."""
    for part in name.split("."):
        tree = next((node for node in tree.body if getattr(node, "name", "") == part), None)
        if tree is None:
            return None
    return tree


def mentions(text, letters):
    """The labels that a text names: A16; A1 to A5 and A1 - A5 are all five."""
    found = {f"{letter}{number}" for letter, number in re.findall(rf"\b([{letters}])(\d+)\b", text)}
    for letter, low, high in re.findall(rf"\b([{letters}])(\d+) (?:to|-) [{letters}](\d+)\b", text):
        found |= {f"{letter}{number}" for number in range(int(low), int(high) + 1)}
    return found


@functools.cache
def tests_by_label(name):
    """{label: tests}: those that name it, above or within themselves, or that call a helper which names it."""
    _, lines, tree = parsed(f"tests/test_{name}.py")
    functions, calls = {}, {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            while first > 1 and lines[first - 2].startswith("#") and not lines[first - 2].startswith("# ---"):
                first -= 1
            body = "\n".join(lines[first - 1:node.end_lineno])
            functions[node.name] = mentions(body.replace("_", " "), LETTERS[name])
            functions[node.name] |= {label.upper() for label in mentions(node.name.upper().replace("_", " "), LETTERS[name])}
            calls[node.name] = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            calls[node.name] |= {argument.arg for argument in ast.walk(node) if isinstance(argument, ast.arg)}
    found = {}
    for test in functions:
        if test.startswith("test_"):
            labels, seen, waiting = set(functions[test]), {test}, list(calls[test])
            while waiting:
                helper = waiting.pop()
                if helper in functions and helper not in seen and not helper.startswith("test_"):
                    seen.add(helper)
                    labels |= functions[helper]
                    waiting += calls[helper]
            for label in labels:
                found.setdefault(label, []).append(test)
    return found


def find_lines(name, function, words):
    """[(number, line)] of the lines of a function that hold the words, without docstrings; or what is wrong, as a str."""
    module = name
    if function.split(".")[0] in ("data", "common"):
        module, _, function = function.partition(".")
    _, lines, tree = parsed(f"{module}.py")
    node = locate(tree, function)
    if node is None:
        return f"{module}.py has no {function}"
    prose = prose_lines(module)
    found = [(number, re.sub(r"\s+# .*", "", lines[number - 1].strip())) for number in range(node.lineno, node.end_lineno + 1)
             if words in lines[number - 1] and number not in prose]
    return found or f"{module}.py: {function} has no line with {words!r}"


def check_golden(name, text):
    """What is wrong with the third column of a trail, as a list."""
    if text.startswith("- "):
        return []
    found = re.fullmatch(r"(\S+): (.+) > (\w+)(?: \(.+\))?", text)
    if not found:
        return [f"golden column {text!r}: write `case: arrays > test` or `- why none`"]
    case, arrays, test = found.groups()
    faults = []
    if locate(parsed(f"tests/test_{name}.py")[2], test) is None:
        faults.append(f"tests/test_{name}.py has no {test}")
    path = ROOT.parent / "shared" / "goldens" / name / f"{case}.npz"
    if path.parent.exists():                                            # else the trail's word is taken for it
        inside = set(np.load(path).files) if path.exists() else set()
        lost = [array for array in arrays.split() if array not in inside]
        if lost:
            faults.append(f"../shared/goldens/{name}/{case}.npz: no {', '.join(lost)}")
    return faults


def trail(name):
    """{label: (code column, golden column)} of TRAIL."""
    rows = [re.split(r"\s+\| ", line, maxsplit=2) for line in TRAIL[name].strip().split("\n")]
    return {label: (code, golden) for label, code, golden in rows}


def audit(name):
    """The Rows of a file, in the order of its labels."""
    written, stored, rows = equations(name), trail(name), []
    for label in sorted({*written, *stored}, key=lambda label: (label[0], int(label[1:]))):
        if label not in written:
            rows.append(Row(label, [], [], [], "", [f"{name}.py defines no {label}: mend TRAIL in tests/audit.py"]))
            continue
        code_text, golden = stored.get(label, ("", ""))
        code, faults = [], []
        for part in filter(None, re.split(r"\s*; (?=[\w.]+: )", code_text)):
            function, _, words = part.partition(": ")
            for word in words.split(" && "):
                lines = find_lines(name, function, word.strip())
                if isinstance(lines, str):
                    faults.append(f"{lines}: mend TRAIL in tests/audit.py")
                    lines = []
                code.append((function, word.strip(), lines))
        tests = tests_by_label(name).get(label, [])
        faults += [f"no {what}" for what, have in (("code", code), ("test names it", tests), ("golden case, and no reason why", golden)) if not have]
        rows.append(Row(label, written[label], code, tests, golden, faults + check_golden(name, golden or "- ")))
    return rows


def show(name, rows):
    """Print the rows with their line numbers."""
    print(f"{name}.py: {len(rows)} equations\n")
    for row in rows:
        print("\n".join(f"{label:5}{line}" for label, line in zip([row.label] + [""] * 99, row.equation)))
        places = [(function, number, line) for function, _, lines in row.code for number, line in lines]
        for function, number, line in dict.fromkeys(places):            # once, whatever words are on the line
            module = function.split(".")[0] if function.startswith(("data.", "common.")) else name
            print(f"       {module}.py:{number:<5} {function}: {line}")
        for test in row.tests[:MOST]:
            print(f"       {test}")
        if len(row.tests) > MOST:
            print(f"       and {len(row.tests) - MOST} more tests")
        kind = "no golden case" if row.golden.startswith("- ") else "golden"
        print(f"       {kind}: {row.golden.removeprefix('- ')}")
        for fault in row.faults:
            print(f"       MISSING: {fault}")
        print()


class Trace:
    """A pytest plugin: {test: the (file, line) pairs of the repository's files that it executes}, in all threads."""

    def __init__(self):
        self.lines = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        seen = self.lines.setdefault(item.originalname, set())

        def line(frame, event, _):
            seen.add((Path(frame.f_code.co_filename).name, frame.f_lineno))
            return line

        def call(frame, event, _):
            return line if Path(frame.f_code.co_filename).parent == ROOT else None

        sys.settrace(call)
        threading.settrace(call)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)


def untouched(name, rows):
    """What the golden tests of a file do not execute of their equations' lines, as a list of lines to print."""
    pinned = {row.label: row.golden.split(" > ")[1].split(" ")[0] for row in rows if " > " in row.golden}
    trace = Trace()
    tests = [f"{ROOT}/tests/test_{name}.py::{test}" for test in sorted(set(pinned.values()))]
    pytest.main([*tests, "-o", "addopts=", "-p", "no:terminal", "-p", "no:cacheprovider", f"--rootdir={ROOT}"], plugins=[trace])
    found = []
    for row in rows:
        for function, _, lines in row.code if row.label in pinned else ():
            module = function.split(".")[0] if function.startswith(("data.", "common.")) else name
            places = [(f"{module}.py", number) for number, _ in lines]
            if not trace.lines.get(pinned[row.label], set()).intersection(places):
                found.append(f"{row.label}: {pinned[row.label]} does not execute {function}: {lines[0][1]}")
    return found


def cell(texts, mark=""):
    """Texts as one cell of a Markdown table, a line each."""
    return "<br>".join(mark + text.replace("|", "\\|") + mark for text in texts)


def table(name, rows):
    """The rows as a Markdown table; nothing in it moves when lines do."""
    lines = [f"# {name}.py, equation by equation", "",
             f"Made by `python -m tests.audit {name} --write`; the same command without `--write` shows line numbers.",
             "A golden case is an array that the authors' own code has made, and the test that compares with it.", "",
             "| | equation | code | golden case | tests that name it |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        functions = {}
        for function, words, _ in row.code:
            functions.setdefault(function, []).append("`" + words.replace("|", "\\|") + "`")
        code = "<br>".join(f"{function}: {', '.join(words)}" for function, words in functions.items())
        more = [f"and {len(row.tests) - MOST} more"] if len(row.tests) > MOST else []
        golden = "none: " + row.golden[2:] if row.golden.startswith("- ") else "`{}` {}<br>{}".format(*re.split(": | > ", row.golden))
        equation = cell(row.equation, "`")
        lines.append(f"| {row.label} | {equation} | {code} | {golden} | {cell([*row.tests[:MOST], *more])} |")
    return "\n".join(lines) + "\n"


def stale(name, rows):
    """Why the stored table of a file no longer holds, as a list: equations, functions, tests or cases that are gone.

    A test that has come since is no reason.
    """
    path = FOLDER / f"{name}.md"
    if not path.exists():
        return [f"{path.name} is missing"]
    stored, fresh = ([line.rsplit(" | ", 1) for line in text.split("\n") if line.startswith("| ")]
                     for text in (path.read_text(), table(name, rows)))
    found = []
    for row, line in zip(rows, stored[2:]):
        gone = [test for test in re.findall(r"test_\w+", line[1]) if test not in row.tests]
        if gone:
            found.append(f"{row.label}: {', '.join(gone)} no longer names it")
    for old, new in zip(stored, fresh):
        if old[0] != new[0]:
            found.append(f"{path.name}: {old[0]} -- is now -- {new[0]}")
    return found + ([f"{path.name}: another number of equations"] if len(stored) != len(fresh) else [])


def main(argv=None):
    parser = argparse.ArgumentParser(description=textwrap.dedent(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=[], metavar="FILE", help=", ".join(LETTERS))
    parser.add_argument("--write", action="store_true", help="renew assets/audit/FILE.md")
    parser.add_argument("--trace", action="store_true", help="which lines the golden tests execute")
    given = parser.parse_args(argv)
    unknown = [name for name in given.files if name not in LETTERS]
    if unknown:
        parser.error(f"{', '.join(unknown)}: give {', '.join(LETTERS)}")
    missing = 0
    for name in given.files or LETTERS:
        rows = audit(name)
        show(name, rows)
        missing += sum(len(row.faults) for row in rows)
        if given.trace:
            print("\n".join([*untouched(name, rows), ""]))
        if given.write:
            FOLDER.mkdir(parents=True, exist_ok=True)
            Path(FOLDER / f"{name}.md").write_text(table(name, rows))
    print(f"{missing or 'nothing'} missing")
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
