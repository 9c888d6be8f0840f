"""python -m tests.mutate [--only FILE ...] [--number 3,7] [--jobs N] [--list]    which faults do the tests notice?

One-line faults, written from the methods, are made one at a time in a copy of the repository; then the file's own
tests run there until one fails. A fault that no test notices is a survivor: the exit code is 1 unless at least 97 %
are noticed. Not part of CI: a fault costs about two seconds of one core, a survivor the whole test file.

A fault is (function, old, new, what it breaks, words). `old` occurs exactly once in that function (or class, or with ""
in the file), on one line. `words` choose the tests that should notice it, as pytest's -k has them; they run first, and
only where they all pass do the others of the file. tests/test_tools.py keeps the table in step with the code.
"""

import argparse
import ast
import functools
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import common  # noqa: F401  before torch; both are here for the children, which need not import them
from tests import ROOT

import pytest
import torch  # noqa: F401

GOAL = 0.97
PATIENCE = 600                              # seconds; a test that hangs has noticed

FAULTS = {
    "arflow": [
        ("hybrid", "log_decay.mean(-1)", "log_decay.sum(-1)", "A16: S decays by the sum of the gates", "official or loop_equals"),
        ("hybrid", "log_decay.cumsum(-1)", "(log_decay.cumsum(-1) - log_decay)", "A15: the running sum leaves out the token itself", "official or loop_equals"),
        ("hybrid", "gamma[:, i] * states[i] + added[:, i]", "gamma[:, i] * (states[i] + added[:, i])", "A18: the new image decays, too", "official or loop_equals"),
        ("hybrid", "torch.stack(states[:-1], 1)", "(gamma * torch.stack(states[:-1], 1))", "A17: the past is read after it has faded", "official or loop_equals"),
        ("Attention.forward", "self.decay_gate(x + c", "self.decay_gate(x + F.silu(c)", "A11: the decay gate reads SiLU(c)", "official or formulas"),
        ("guided_velocity", "v_none + cfg_scale * (v_y - v_none)", "v_y + cfg_scale * (v_y - v_none)", "A22: one unit of guidance too much", "guidance"),
        ("guided_velocity", "v_y[:, cfg_channels:]", "v_none[:, cfg_channels:]", "A22: the unguided channels follow no label", "guidance or channels"),
        ("sample", "(1 - LAST_TIME) * drift", "dt * drift", "A21: the last step is as long as the others", "sampler or time_grid"),
        ("sample", 'if context == "reset"', 'if context == "carry"', "the two contexts are exchanged", "context or time_grid"),
        ("sample", "if i < num_steps - 1", "if i < num_steps", "A21: the last step draws noise, too", "sampler or time_grid"),
        ("sample_blocks", "make_generator(cfg.seed, first,", "make_generator(cfg.seed, 0,", "every block of 100 samples has the same noise", "export or block"),
        ("sample_blocks", 'cfg.context if cfg.images > 1 else "reset"', "cfg.context", "n = 1 reads a state it never learnt to read", "context or option"),
        ("draw", ".sort(1).values", "", "A2: the images are not in the order of their noise", "draws_by_value or draws_are_independent or times_are or sequences"),
        ("draw", "(torch.rand(B, n, generator=cpu_generator) < 0.5)", "(torch.rand(B, 1, generator=cpu_generator) < 0.5).expand(B, n)", "one flip for a whole sequence", "draws_by_value or draws_are_independent or times_are or sequences"),
        ("draw", "order[:n]", "order[:1].repeat(n)", "a sequence shows one picture n times", "draws_by_value or draws_are_independent or times_are or sequences"),
        ("draw", "torch.rand(B, generator=cpu_generator) < cfg.label_dropout", "torch.rand(1, generator=cpu_generator).expand(B) < cfg.label_dropout", "one draw decides for the whole batch who loses its label", "draws_by_value or draws_are_independent or times_are or sequences"),
        ("draw", 'cfg.seed, step, "noise"', 'cfg.seed, 0, "noise"', "A3: the noise is the same at every step", "draws_by_value or draws_are_independent or times_are or sequences"),
        ("learning_rate", "rise = (step + 1)", "rise = step", "the first step of the warm-up has rate 0", "learning_rate or training_by_value"),
        ("learning_rate", "left = (cfg.steps - step)", "left = (cfg.steps - step - 1)", "the cooldown runs a step ahead", "learning_rate or training_by_value"),
        ("train", "clip_grad_value_(model.parameters(), cfg.clip)", "clip_grad_norm_(model.parameters(), cfg.clip)", "gradients are clipped by norm, not by value", "training_by_value"),
        ("train", "ema_update(ema, model, cfg.ema)", "ema_update(ema, model, 1 - cfg.ema)", "decay and rate of the average are exchanged", "training_by_value"),
        ("train", "preview(run, step, ema,", "preview(run, step, model,", "pictures on the way show the raw weights", "averaged_weights or pictures_on"),
        ("train", "finish(run, ema,", "finish(run, model,", "the pictures and the figure are of the raw weights", "averaged_weights or pictures_on"),
        ("sample_checkpoint", 'common.load_into({"ema": ema}, saved, cfg.sample)', 'ema.load_state_dict(saved["state"]["model"])', "--sample draws from the raw weights", "averaged_weights or sample_writes"),
        ("finish", 'test = open_split(cfg, "test",', 'test = open_split(cfg, "train",', "the distance is to training images", "averaged_weights or target_decides"),
    ],
    "common": [
        ("read_checkpoint", "map_location=device, weights_only=True", "map_location=device, weights_only=False", "a checkpoint may run code", "would_run_code"),
        ("read_pickle", "weights_only=True", "weights_only=False", "foreign weights may run code", "no_weights"),
        ("write_atomic", "os.replace(temporary, path)", "Path(path).write_bytes(temporary.read_bytes())", "a file is written in place: a kill leaves half of it", "takes_its_name"),
        ("write_atomic", "os.fsync(file.fileno())", "file.fileno()", "what was renamed may not be on the disk yet", "takes_its_name"),
        ("ema_update", "model.parameters()), 1 - decay", "model.parameters()), decay", "decay and rate of the average are exchanged", "ema"),
        ("make_generator", 'f"{seed}/{step}/{stream}"', 'f"{seed}/{stream}"', "every step draws the same", "draws"),
        ("make_generator", 'f"{seed}/{step}/{stream}"', 'f"{seed}/{step}"', "all streams of a step draw the same", "draws"),
        ("shard", "x[rank() * part:(rank() + 1) * part]", "x[:part]", "all ranks have the first slice", "own_slice"),
        ("seed_dropout", 'f"dropout {rank()}"', '"dropout"', "dropout is alike on all ranks", "differs_by_rank"),
        ("choose_threads", "1 if one else", "2 if one else", "a demo waits for a second thread", "one_thread"),
        ("choose_threads", 'and "OMP_NUM_THREADS" not in os.environ', "and True", "a demo takes no more threads when told", "one_thread"),
        ("check_machine", 'if name.startswith("batch"):', 'if name == "batch":', "a stage's own batch may leave some process without a share", "fields_of_a_batch"),
        ("fill_stages", '("steps_", "batch_")', '"steps_"', "--batch leaves a stage its preset's batch", "batches_of_stages"),
        ("merge_stored", 'if name in free or name.startswith("steps_")]', "]", "a resumed run's stage takes the batch of another", "batches_of_stages"),
        ("merge_stored", ' or name.startswith("steps_")', "", "--resume --steps does away with the --steps_X beside it", "steps_of_stages"),
        ("cli", '{**given, "name": cfg.name}', '{"name": cfg.name, **given}', "a resumed run without a name is written among all runs", "empty_name"),
        ("export_images", "not packed and any(", "not any(", "an export is mixed with an earlier one", "both_ways"),
        ("Run.steps", "start < self.total", "True", "a finished demo below its target fails at every look", "shows_its_result"),
        ("Run.introduce", "batch_size(self.cfg, self.stage)", "self.cfg.batch", "a stage is introduced with another's batch", "fields_of_a_batch"),
        ("seed_dropout", "make_generator(seed, step,", "make_generator(seed, 0,", "dropout is alike at all steps", "differs_by_rank"),
        ("shard_noise", "low = max(0, first - 64 * k)", "low = 0", "a rank in mid-block has the noise of another", "noise_in_shards"),
        ("shard_noise", 'f"{stream} {k}" if k else stream', "stream", "every 64 samples have the same noise", "noise_in_shards"),
        ("average_gradients", ".div_(world())", "", "gradients are sums over the ranks", "buckets"),
        ("Run.restore", 'self.sums = saved["sums"]', "self.sums = {}", "a resumed run forgets what it had summed up to log", "resume_is_bitwise"),
        ("Run.restore", "read_log(self.log_path, step)", "read_log(self.log_path, self.total)", "a resumed run keeps log lines of steps that it does again", "each_step_once"),
        ("Run.restore", "{**objects, **frozen}", "{**objects}", "a checkpoint lacks the frozen stage that it was trained on", "earlier_stage or stage"),
        ("Run.due", "(step + 1) % every", "step % every", "checkpoints and log lines come a step late", "resume_is_bitwise or logged"),
        ("Run.save", "ReduceOp.MAX", "ReduceOp.MIN", "a signal to one rank is overlooked", "two_processes"),
        ("Run.on_signal", "self.since > 5", "self.since >= 0", "the second of two signals kills at once", "second_signal"),
        ("differs", "return any(not", "return all(not", "an earlier stage that changed in one tensor is taken for the same", "one_other_bit"),
        ("Run.save", "self.weight_sums().sum()", "self.weight_sums().sum().nan_to_num()", "a checkpoint may hold NaN", "nan or finite"),
        ("is_preset", '("name", "resume", "log", "save")', '("name", "resume", "log", "save", "steps")', "a shorter run is held against the demo's target", "preset or target"),
        ("cli", 'free = ("name", "steps"', 'free = ("name", "lr", "steps"', "--resume may change the learning rate", "resumed_run_may_change"),
        ("in_parts", "range(0, part * count, part)", "range(0, part * count - 1, part + 1)", "--accumulate leaves samples out", "parts"),
        ("read_ahead", "pool.submit(read, step + 1)", "pool.submit(read, step)", "beside a GPU every step reads the batch of the one before", "ahead"),
        ("set_learning_rate", 'lr * group.get("factor", 1)', "lr", "Muon's factor is forgotten at the first step", "muon"),
        ("MuonAdamW.__init__", "if p not in chosen", "if p is not None", "AdamW steps the matrices of Muon, too", "muon"),
        ("share_blocks", "first = round_[rank()]", "first = round_[0]", "all ranks make the same block", "blocks"),
        ("stored_rows", 'if (found["recipe"], found["count"]) == (recipe, count) else 0', "", "rows of another tokenizer are read: the key holds too little", "stored"),
        ("init_state", "key in new and key in own", "key in own", "any tensor of another shape stays new in silence", "init"),
        ("load_init", "run.begins", "run.cfg.init", "--resume begins again from --init's weights", "init"),
        ("filter_logits", "logits.double() / temperature", "logits.double() * temperature", "a high temperature sharpens", "filter"),
        ("filter_logits", "mass <= 1 - top_p", "mass <= top_p", "top-p keeps what it should cut", "filter"),
        ("judge", "np.asarray(data.labels).tobytes()", 'b""', "a judge of other labels is read from the cache", "all_that_it_depends_on"),
        ("judge", "inspect.getsource(Judge) + inspect.getsource(train_judge)", "inspect.getsource(Judge)", "a judge trained by an older recipe is read from the cache", "all_that_it_depends_on"),
        ("train_judge", "halves[1] if role", "halves[0] if role", "teacher and ruler learn from the same half", "disjoint"),
        ("measure_samples", "frechet(real[N:], real[:N])", "frechet(real[:N], real[:N])", "the floor compares one half with itself", "measure or floor"),
        ("measure_samples", "images[:N].split(250)", "images[-N:].split(250)", "the distance is of other samples than the first N", "measure or floor"),
        ("frechet", "- 2 * cross", "- cross", "the distance of two equal sets is not 0", "frechet"),
    ],
    "data": [
        ("", '"judge": 5 * 10**8', '"judge": 0', "the judges learn from training pictures", "shapes or split"),
        ("uniform", "seed * GOLDEN", "GOLDEN", "the seed is ignored", "splitmix or scenes or uniform"),
        ("draw", "for j in (3, 2, 1, 0)", "for j in (0, 1, 2, 3)", "the largest object lies below the others", "object_zero or drawing"),
        ("draw", "% (2 * room)", "% room", "shapes jump back instead of bouncing", "bounce"),
        ("", "np.float32(127.5) - 1", "np.float32(128) - 1", "white is not 1", "pixels or floats"),
        ("Data.latents", "rows[flip] = mirrored[index[flip]]", "rows[flip] = plain[index[flip]]", "a flipped latent is the plain one", "latents"),
        ("Data.latents", "clamp(-30, 20) / 2)", "clamp(-30, 20))", "A1, F1: the standard deviation is the variance", "latents"),
        ("Data.__post_init__", "labels if self.train_labels is None else self.train_labels", "labels", "a test split numbers its classes by itself", "class_list or gaps"),
        ("held_out", "% 10 == 9", "% 10 == 0", "another tenth is held out", "held or split or packs or folders"),
        ("held_out", 'tenth == (split == "test")', "tenth == (split == split)", "training and judges see the test images", "split or packs or folders"),
        ("cached", "file.stat().st_size, file.stat().st_mtime_ns", "file.stat().st_size", "a file that changed is read from the cache", "changed or cached or packed"),
        ("cached", "common.write_atomic(path, write)", 'write(open(path, "wb"))', "an interrupted pack stays in the cache", "interrupted or cut_short"),
        ("open_folder", 'size, split == "test")', 'split == "test")', "a folder packed at one size is served at another", "folder or scaled"),
        ("open_folder", "sorted({name for name, _ in train})", "sorted({name for name, _ in chosen})", "every split of a folder has its own class numbers", "classes_of_train or folder"),
        ("ArraysOnly.find_class", 'module == "numpy" and name in ("ndarray", "dtype")', "module", "a pickle may run code", "pickle"),
        ("eight_bits", "values * (255 / top)", "values.clip(0, 255)", "deep pictures are clipped, not scaled", "deep or sixteen"),
        ("WordPiece.pieces", '"##" if start else ""', '""', "a word's later pieces are taken for words", "wordpiece"),
        ("WordPiece.encode", "max(reversed(bodies), key=len)", "max(bodies, key=len)", "of two equal texts the first is shortened", "wordpiece"),
        ("WordPiece.joined", "[kind] * (len(body) + 1)", "[kind] * len(body) + [0]", "the last [SEP] belongs to the first text", "wordpiece"),
        ("glue", 'columns[split != "train"]', "columns[0]", "the other file has the columns of the training file", "mnli or glue"),
        ("number_rows", 'numbers = np.flatnonzero(for_tests == (split == "test"))', "numbers = np.arange(limit)", "numbers of the test split are trained on", "translation_pairs or numbers"),
        ("number_rows", "min(NUMERALS[a][0], NUMERALS[b][0])", "NUMERALS[a][0]", "a rare language has as many pairs as a common one", "resources or translation"),
        ("translation_pairs", 'held_out(len(table_rows), "train", path, "rows") for text', 'held_out(len(table_rows), split, path, "rows") for text', "each split has a vocabulary of its own", "translation_pairs"),
        ("translation_pairs", 'f"<2{row[1]}>"', 'f"<2{row[0]}>"', "the tag names the language that is there, not the one wanted", "translation_pairs"),
    ],
    "detailflow": [
        ("weights", "if step + 1 >= cfg.gan_from", "if step >= cfg.gan_from", "D11: the GAN begins a step late", "D11"),
        ("weights", "cfg.gan if step + 1 >= cfg.gan_from else 0.0", "cfg.gan", "D11: the GAN counts from the first step", "D11"),
        ("weights", "min(1, (step + 1)", "min(1, step", "D11: the ramp begins a step late", "D11"),
        ("prefix_length", "math.ceil(t / cfg.group)", "math.floor(t / cfg.group)", "D12: prefixes end before the group", "D12"),
        ("noise_start", "n if n <= cfg.causal else n - cfg.group", "n", "D13: the last group may be noise", "D13"),
        ("Tokenizer.correct", "self.vq.vectors(noise), q).detach()", "self.vq.vectors(noise), q)", "D7: gradients flow through the prefix", "D7"),
        ("Tokenizer.correct", "total / (late.numel() + late.sum())", "total / (2 * late.numel())", "D7: the losses are means over tokens that were not chosen", "D7"),
        ("loss_ar", 'y.masked_fill(draws["drop"]', 'y.masked_fill(draws["drop"] & draws["noisy"]', "labels are dropped only where there is noise", "D16 or ar_training"),
        ("loss_ar", "torch.where(noisy, triple.target, triple.clean)", "torch.where(noisy, triple.given, triple.clean)", "D16: the model learns to make the mistake", "D16"),
        ("guidance", "cfg.tokens - i + cfg.group", "cfg.tokens - i", "D18: the gradual scale begins too low", "D18"),
        ("draw_tokenizer", 'noise_start(draws["start"]', 'noise_start(draws["length"]', "the noise's place is decided by the draw that decides the length", "draws_of_a_run or tokenizer_training_by_value"),
        ("draw_tokenizer", "if step >= cfg.kmeans", "if step > cfg.kmeans", "the first step with codes still decodes all tokens", "draws_of_a_run or tokenizer_training_by_value"),
        ("draw_noise", "cfg.seed + 1)", "cfg.seed + 1 + k)", "D19: the noise's place differs from crop to crop of an image", "D19"),
        ("learning_rate", "cfg.batch / 256 *", "", "D20: the peak is not scaled by the batch", "D20"),
        ("learning_rate_ar", "cosine_from=0.05", "cosine_from=0.0", "D20: the AR model's rate jumps at the end of its rise", "D20"),
        ("renew_codes", "vq.use.zero_()", "vq.use.add_(0)", "codes that were used long ago count as used", "codes"),
        ("renew_codes", "step >= 0.7 * total and not first", "step >= 0.7 * total", "a late first renewal never comes", "codes"),
        ("train_tokenizer", "bypass = step < cfg.kmeans", "bypass = step <= cfg.kmeans", "the first step with codes does not quantise", "tokenizer_training_by_value"),
        ("follow_disc", "common.average(means), 0.001", "common.average(means), 0.999", "D15: decay and rate of LeCam's means are exchanged", "lecam or training_by_value"),
        ("train_tokenizer", "for network in (model, disc)", "for network in (model,)", "the discriminator's gradients are not clipped", "tokenizer_training_by_value"),
        ("train_tokenizer", ".backward(inputs=[*model.parameters()])", ".backward()", "the tokenizer's adversarial loss trains the discriminator", "tokenizer_training_by_value"),
        ("train_tokenizer", "renew_codes(model, dataset, cfg, step)", "renew_codes(model, dataset, cfg, step + 1)", "codes are renewed a step early", "tokenizer_training_by_value"),
        ("train_ar", "seed_dropout(cfg.seed, step)", "seed_dropout(cfg.seed, 0)", "dropout is the same at every step", "ar_training_by_value"),
        ("train_ar", "ema_update(ema, model, cfg.ema)", "ema_update(ema, model, 1 - cfg.ema)", "decay and rate of the average are exchanged", "ar_training_by_value"),
        ("load", 'common.load_into({"ema": ar}, saved, path)', 'ar.load_state_dict(saved["state"]["model"])', "pictures and figures are of the raw weights", "exported_samples or run_starts or averaged"),
        ("report", 'open_split(cfg, "judge"), "ruler")', 'open_split(cfg, "judge"), "teacher")', "the figure is the teacher's, whom the model has seen", "demo_that_misses or leaves_its_folder"),
        ("measure", 'open_split(cfg, "test", cfg.count)', 'open_split(cfg, "train", cfg.count)', "the error is of training images", "demo_that_misses or leaves_its_folder"),
        ("train_tokenizer", "found.get(name, own)", "own", "--tokenizer is not read in stage tokenizer", "one_by_one"),
    ],
    "flextok": [
        ("draw", "u_null < cfg.null", "u_time < cfg.null", "the draw of the time decides who has no tokens", "both_stages_by_value or no_two_draws"),
        ("draw", "nested_lengths(u_length,", "nested_lengths(u_length[:1].expand_as(u_length),", "one k for the whole batch", "both_stages_by_value or no_two_draws"),
        ("draw", 'step, "tokenizer noise"', '0, "tokenizer noise"', "the noise is the same at every step", "both_stages_by_value or no_two_draws"),
        ("draw_index", "cfg.seed, step, f", "cfg.seed, 0, f", "every step has the same images", "both_stages_by_value"),
        ("draw_ar", "u_drop < cfg.label_dropout", "u_row < cfg.label_dropout", "the draw of the crop decides who loses its label", "no_two_draws or stored or lost_condition or crops"),
        ("store_tokens", '"crop", "crops", "bf16")', '"crops", "bf16")', "stored tokens of other crops are read: the key holds too little", "encoded_once or stored_rows"),
        ("store_tokens", "common.fingerprint(tokenizer.encoder)", '""', "stored tokens of another tokenizer are read: the key holds too little", "encoded_once or stored_rows"),
        ("draw_ar", "(u[0] * cfg.crops)", "(0 * u[0])", "of the stored crops only the first is read", "no_two_draws or stored or lost_condition or crops"),
        ("random_crops", "columns = (u_column", "columns = (u_row", "all crops lie on the diagonal", "crops or both_stages"),
        ("nested_lengths", "R.bit_length()", "(R.bit_length() - 1)", "F15: no image keeps all tokens", "nested"),
        ("nested_lengths", "1 + (u * R).long()", "(u * R).long()", "F15: k from 0 to R - 1", "nested"),
        ("flow_time", "torch.cos(math.pi / 2 * u) ** 2 - 1 + u", "torch.cos(math.pi / 2 * u) - 1 + u", "F21: another law of the times", "flow_path or times"),
        ("loss_tokenizer", "v.to(x.dtype) - (noise - x)", "v.to(x.dtype) - (x - noise)", "F22: the velocity points to the image", "losses or flow"),
        ("loss_tokenizer", "flow - model.repa * cosine", "flow + model.repa * cosine", "F23: features are driven apart", "losses"),
        ("adaptive_projected_guidance", "- 0.5 * last_diff", "+ 0.5 * last_diff", "F27: the momentum has the wrong sign", "guidance"),
        ("adaptive_projected_guidance", "to(v.dtype), diff", "to(v.dtype), cut.to(v.dtype)", "F27: the next step wants the uncut difference", "guidance"),
        ("sample", "new_full((B,), i / cfg.num_steps)", "new_full((B,), (i - 1) / cfg.num_steps)", "F25: times from 1 - 1/n to 0", "guidance or flow or calls"),
        ("learning_rate", "progress = step /", "progress = (step + 1) /", "the schedule runs a step ahead", "rates_at"),
        ("learning_rate", "0.01 + 0.99 * height", "height", "the rate falls to 0", "rates_at"),
        ("train_ar", "decay=0.05", "decay=0.01", "the GPT has the tokenizer's weight decay", "both_stages_by_value"),
        ("train_ar", 'learning_rate(cfg, step, "ar")', "learning_rate(cfg, step)", "the GPT has the tokenizer's learning rate", "both_stages_by_value"),
        ("train_ar", "ema_update(ema, model, cfg.ema)", "ema_update(ema, model, 1 - cfg.ema)", "decay and rate of the average are exchanged", "both_stages_by_value"),
        ("train_tokenizer", "clip_grad_norm_(model.parameters(), 1.0)", "clip_grad_norm_(model.encoder.parameters(), 1.0)", "the decoder's gradients are not clipped", "both_stages_by_value"),
        ("train_tokenizer", "ema_update(ema, model, cfg.ema)", "ema_update(ema, model, 1 - cfg.ema)", "decay and rate of the average are exchanged", "both_stages_by_value"),
        ("load_tokenizer", 'else "ema"', 'else "model"', "ids and pictures are of the raw tokenizer", "averaged_weights"),
        ("load_gpt", 'common.load_into({"ema": gpt}, saved, path)', 'gpt.load_state_dict(saved["state"]["model"])', "samples are of the raw GPT", "averaged_weights"),
        ("show_tokens", 'open_split(cfg, "test", cfg.count)', 'open_split(cfg, "train", cfg.count)', "the error is of training images", "averaged_weights or leaves_its_folder"),
        ("GPT.encode_condition", "start + self.condition(cond)[:, None]", "self.condition(cond)[:, None]", "F30: no class leaves nothing at all", "gpt_by or bare"),
        ("report", "errors[-1] > TARGET", "errors[0] > TARGET", "the target is of one token", "demo"),
        ("Encoder.forward", "first = patches.shape[1] if", "first = patches.shape[1] - 1 if", "the last patch counts as a register", "prefix_encoding or encoder"),
        ("Block.forward", "kv, mask[..., first:, :]", "kv, mask[..., :h.shape[1] - first, :]", "F5: the last block's registers see what patches see", "last_positions"),
        ("draw_index", "common.batch_size(cfg, stage)", "cfg.batch", "stage ar has the tokenizer's batch", "batch_of_its_own"),
        ("use_checkpoint", "not of_words or", "True or", "--classes is ignored for a GPT that reads words", "not_what_a_checkpoint or bad or checkpoint"),
    ],
    "gpipe": [
        ("stage_dropout", "x * keep / (1 - p)", "x * keep", "dropout without 1 / (1 - p)", "dropout_by_value"),
        ("Pipeline.run_layer", "{m + common.rank() * batch.M}", "{m}", "dropout is alike in all replicas", "dropout_by_value"),
        ("Pipeline.run_layer", "self.seed, batch.number,", "self.seed, 0,", "dropout is alike at all steps", "dropout_by_value"),
        ("commit", "common.average(torch.cat(sums, 1))", "torch.cat(sums, 1)", "G11: the running averages are those of one replica", "replicas or batch_norm"),
        ("commit", "s2 / n - mean.square()", "(s2 / n - mean.square()) * n / (n - 1)", "G11: the running variance is unbiased", "golden_batch_norm"),
        ("BatchNorm.forward", "if thread_local.recompute", "if False", "G11: recomputed micro-batches count twice", "golden_batch_norm"),
        ("Pipeline.run", "norm.moments.clear()", "pass", "G11: the moments of all mini-batches so far are averaged", "golden_batch_norm"),
        ("Logits.forward", "self.training and self.clip > 0", "self.clip > 0", "G15: answers are clipped, too", "clip or transformer or logits"),
        ("transformer", 'scaled and "narrow" in name', 'scaled and "wide" in name', "G14: another matrix is scaled down", "initialisation"),
        ("loss", "label_smoothing=smoothing", "label_smoothing=0.0", "labels are not smoothed", "loss_counts or loop"),
        ("partition", "load ** 2", "load", "G3: any partition will do", "partition"),
        ("schedule", '"except_last": M - 1', '"except_last": M', "the last micro-batch is recomputed for nothing", "schedule or kept"),
        ("schedule", 'tasks.append(("R", m, k))', 'tasks.insert(-1, ("R", m, k))', "R comes before the B that frees its memory", "schedule or kept or figure"),
        ("Pipeline.step", "gradients.reverse()", "gradients.copy()", "the inputs' gradients come in the wrong order", "input_gradient"),
        ("Pipeline.do_backward", "batch.stash.pop((m, k))", "batch.stash[m, k]", "G9: inputs are kept to the end of the step", "kept"),
        ("pair_weights", "1 / cfg.temperature - 1", "1 / cfg.temperature", "G13: a pair counts n times too much", "temperature"),
        ("draw", "/ common.world()", "", "the loss is divided by the tokens of all replicas, then averaged over them", "temperature or by_value or replicas"),
        ("draw", "torch.rand(cfg.batch, 1, 1, 1, generator=generator)", "torch.rand(1, 1, 1, 1, generator=generator).expand(cfg.batch, 1, 1, 1)", "one flip for the whole batch", "temperature or by_value or replicas"),
        ("learning_rate", "step / cfg.decay", "step // cfg.decay", "the exponential decay goes in stairs", "learning_rate"),
        ("learning_rate", "rise = (step + 1)", "rise = step", "the first step has rate 0", "learning_rate"),
        ("learning_rate", "left = (cfg.steps - step)", "left = (cfg.steps - step - 1)", "the cooldown runs a step ahead", "learning_rate"),
        ("optimizer", "alpha=0.9,", "alpha=0.1,", "decay and rate of RMSProp's average are exchanged", "by_value or optimizer"),
        ("build", "module.momentum = cfg.bn_momentum", "module.momentum = 1 - cfg.bn_momentum", "decay and rate of the running averages are exchanged", "by_value or batch_norm"),
        ("train", "opt.zero_grad()", "pass", "gradients add up over the steps", "by_value"),
        ("train", "samples.loss, step)", "samples.loss)", "dropout is alike at all steps of training", "by_value"),
        ("train", 'open_split(cfg, "test")', 'open_split(cfg, "train")', "the figure is of the training split", "demo_fails or by_value"),
        ("build_pipeline", "common.world() > 1", "False", "replicas that time their layers cut elsewhere", "cut_alike"),
    ],
    "slimfit": [
        ("finetune", "opt.step()", "scheduler.measure(), opt.step()", "S11: distances are measured before the update, and stay 0", "by_value or by_hand or by_a_loop"),
        ("finetune", "scheduler.freeze(step)", "scheduler.freeze(step + 1)", "the policies run a step ahead", "by_value or by_hand or by_a_loop"),
        ("finetune", "seed_dropout(cfg.seed, step)", "seed_dropout(cfg.seed, 0)", "dropout is the same at every step", "by_value or by_hand or by_a_loop"),
        ("finetune", "opt.zero_grad()", "opt.zero_grad(set_to_none=False)", "what is frozen moves on by its momentum", "by_value or by_hand or by_a_loop"),
        ("finetune", "learning_rate(variant, step)", "learning_rate(cfg, step)", "pre-training and the full run have another run's learning rate", "by_value or by_hand or by_a_loop"),
        ("relative_change", "(new - old).div_(old)", "(new - old).div_(new)", "S11: relative to the new weights", "s11"),
        ("choose", "order[t - k:]", "order[:k]", "S12: those that moved least train", "policies or s12 or largest"),
        ("Scheduler.__init__", "cfg.rate * t + 1e-9", "cfg.rate * t", "rounding freezes one tensor too few", "rounding"),
        ("Scheduler.__init__", "1e20 * torch.rand(", "0 * torch.rand(", "S12: from zeros, the first to train train for ever", "s12"),
        ("Scheduler.__init__", 'make_generator(cfg.seed, 0, "start")', 'make_generator(0, 0, "start")', "S12: every seed starts with the same tensors", "by_value or s12"),
        ("Scheduler.load_state_dict", 'self.distance = state["distance"].cpu()', "pass", "a resumed run starts its sweep anew", "checkpoint or state or damaged"),
        ("epochs", 'cfg.seed, epoch, "data"', 'cfg.seed, 0, "data"', "one order for all epochs", "by_value or by_hand"),
        ("learning_rate", "n + 1 - step if", "n - step if", "S13: linear is vit", "s13"),
        ("AdamW.step", '1 - lr * group["weight_decay"]', '1 - group["weight_decay"]', "S14: decay does not follow the learning rate", "s14 or adam"),
        ("AdamW.step", "torch._foreach_sqrt(v)", "torch._foreach_mul(v, 1)", "S14: no root", "s14 or adam"),
        ("stock", "cfg.full_lr or cfg.lr", "cfg.lr", "--full_lr is not heard", "by_value or by_hand"),
        ("class_half", "half == 2", "half == 1", "the halves of the classes are exchanged", "by_value or halves"),
        ("dropout", "torch.native_dropout(x, p, True)[0]", "x * torch.native_dropout(x, p, True)[1]", "dropout without 1 / (1 - p)", "dropout"),
        ("predict", "model.eval()", "model.train()", "tests run with dropout", "by_value or measures_are or dropout"),
        ("train", "evaluate(model, test, class_half(test, half))", "evaluate(model, dataset, class_half(dataset, half))", "the accuracy is of the training split", "by_value or by_hand"),
        ("train", 'if not name.startswith("head.")', 'if name != "head."', "the head of the pre-training is fine-tuned", "by_value or by_hand"),
        ("saved_bytes", "sizes[storage.data_ptr()] = storage.nbytes()", "sizes[len(sizes)] = storage.nbytes()", "a storage with two views counts twice", "saved_bytes"),
        ("Norm.forward", "int(keep * x.numel())", "int(keep * x.shape[-1])", "S4: next to nothing is kept", "s4 or s8 or pruning"),
        ("finetune", "cfg.resume and kept.exists()", "False", "a finished stage has lost what it measured", "demo_in_small"),
    ],
    "vitok": [
        ("draw", "torch.rand(B, generator=generator) < cfg.label_dropout", "torch.rand(1, generator=generator).expand(B) < cfg.label_dropout", "one draw decides for the whole batch who loses its label", "a_stage_draws"),
        ("draw", "torch.randint(4, (B,), generator=generator)", "torch.randint(4, (1,), generator=generator).expand(B)", "V10: one length for the whole batch", "a_stage_draws"),
        ("draw", "torch.randint(1000, (B,)", "torch.randint(999, (B,)", "the last diffusion time is never trained", "a_stage_draws"),
        ("draw", 'f"{stage} data")', '"data")', "all stages see the same batches", "a_stage_draws"),
        ("ramp", "(step - start) / length", "step / length", "V16: the ramp jumps at its start", "ramp"),
        ("learning_rate", "cfg.lr_dit, 1, 0.075, 0.1", "cfg.lr_dit, cfg.frames, 0.075, 0.1", "V26: the generator's rate grows with the frames", "learning_rate"),
        ("learning_rate", "done = step /", "done = (step + 1) /", "V26: the schedule runs a step ahead", "learning_rate"),
        ("train_decoder", "ramp(step, run.total / 20, run.total / 2)", "ramp(step, 0, run.total / 2)", "V16: the GAN counts from the first step on", "stage_decoder_by_a_plain_loop"),
        ("train_decoder", "ramp(step + 1, 0, run.total / 4)", "ramp(step, 0, run.total / 4)", "the discriminator's rate lags a step behind", "stage_decoder_by_a_plain_loop"),
        ("train_decoder", "ema_update(ema, decoder, cfg.ema)", "ema_update(ema, decoder, 1 - cfg.ema)", "decay and rate of the average are exchanged", "stage_decoder_by_a_plain_loop"),
        ("train_decoder", 'learning_rate(cfg, step, "decoder")', "learning_rate(cfg, step)", "the decoder follows the schedule of stage ae", "stage_decoder_by_a_plain_loop"),
        ("train_decoder", ".backward(inputs=list(decoder.parameters()))", ".backward()", "the decoder's adversarial loss trains the discriminator", "stage_decoder_by_a_plain_loop"),
        ("train_decoder", "[*decoder.parameters(), *disc.parameters()]", "decoder.parameters()", "each process has a discriminator of its own", "replica or ranks"),
        ("train_dit", 'bottleneck(*tokenizer.encoder(x), part_draws["noise"])', "tokenizer.encoder(x)[0]", "V3: the generator learns from means", "stage_dit_by_a_plain_loop"),
        ("train_dit", 'earlier = earlier.with_name("decoder.pt")', "pass", "the generator's samples are decoded by stage 1's decoder", "averaged_weights or stage_whose or one_by_one"),
        ("train_dit", "ema_update(ema, model, cfg.ema)", "ema_update(ema, model, 1 - cfg.ema)", "decay and rate of the average are exchanged", "stage_dit_by_a_plain_loop"),
        ("load", '"ema": tokenizer.decoder}', '"decoder": tokenizer.decoder}', "reconstructions are of the raw decoder", "every_checkpoint_gives_averaged"),
        ("load", 'common.load_into({"ema": generator}, saved, path)', 'generator.load_state_dict(saved["state"]["model"])', "samples are of the raw generator", "every_checkpoint_gives_averaged"),
        ("loss_dit", "noise.detach(), v, time", "noise, v, time", "V19: the bound trains the noise, too", "bound"),
        ("variational_bound", "betas * alphas_cumprod_prev.sqrt()", "betas * alphas_cumprod.sqrt()", "V21: the means' weight is of the next time", "objective or bound"),
        ("", "posterior_variance[1]", "betas[0]", "V20: the first posterior variance is that of beta", "schedule or objective"),
        ("sample", "if k > 0 else 1.0", "if k > 0 else abar", "V24: the last step stays where it is", "ddim or oracle"),
        ("sample", "* 999 / (num_steps - 1)", "* 1000 / num_steps", "V24: other times", "ddim or respacing"),
        ("guided", "torch.lerp(unconditional, conditional, cfg_scale)", "torch.lerp(conditional, unconditional, cfg_scale)", "V23: guidance leads away from the class", "guidance"),
        ("kl_term", "kl.mean((1, 2))", "kl.sum((1, 2))", "V12: beta means another thing at every E", "kl"),
        ("reconstruct", "square().mean((1, 2, 3, 4))", "square().mean()[None]", "V28: one PSNR of the whole batch", "figures_and_pictures"),
        ("reconstruct", 'open_split(cfg, "test", cfg.count)', 'open_split(cfg, "train", cfg.count)', "the PSNR is of training clips", "figures_and_pictures"),
        ("draw_samples", "make_generator(cfg.seed, first // 100,", "make_generator(cfg.seed, 0,", "every block of 100 samples has the same noise", "other_processes or export"),
        ("write_latents", 'square += codes["logvar"].double().exp().sum().item()', "pass", "the scale leaves the noise out", "export_and_decode"),
        ("export_samples", "np.resize(chosen, cfg.count)", "np.repeat(chosen, cfg.count // len(chosen))", "--export draws fewer samples than --count says", "export_says"),
        ("run_sweep", "< 3:", "< 1:", "a line is fitted through one point", "fits_no_line"),
    ],
}


class Fault(NamedTuple):
    """A fault of a file, number `number` of the table."""

    number: int
    file: str
    where: str
    old: str
    new: str
    breaks: str
    words: str


def table():
    """All faults, numbered from 1 in the order of FAULTS."""
    rows = [(file, *fault) for file, faults in FAULTS.items() for fault in faults]
    return [Fault(number, *row) for number, row in enumerate(rows, 1)]


parse = functools.lru_cache(maxsize=16)(ast.parse)


def definition(text, name):
    """The (start, end) offsets of a function or class "A" or "A.b" in a source text; "" is all of it. KeyError if absent."""
    if not name:
        return 0, len(text)
    node = parse(text)
    for part in name.split("."):
        found = [child for child in node.body if getattr(child, "name", "") == part]
        if not found:
            raise KeyError(f"no {name}")
        node = found[0]
    lines = text.split("\n")
    start = sum(len(line) + 1 for line in lines[:node.lineno - 1])
    return start, start + sum(len(line) + 1 for line in lines[node.lineno - 1:node.end_lineno])


def make(fault, text):
    """The text with the fault in it; ValueError where `old` is not there exactly once."""
    start, end = definition(text, fault.where)
    count = text[start:end].count(fault.old)
    if count != 1:
        raise ValueError(f"{fault.file}.py, {fault.where or 'whole file'}: {fault.old!r} occurs {count} times")
    return text[:start] + text[start:end].replace(fault.old, fault.new) + text[end:]


def copy_repository(where):
    """What the tests need, in a folder of its own beside a link to ../shared; returns its path."""
    root = Path(where) / "repository"
    root.mkdir(parents=True)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("*.t*t"), *ROOT.glob("*.toml")]:
        shutil.copy2(path, root)
    shutil.copytree(ROOT / "tests", root / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    if (ROOT.parent / "shared").exists():
        (root.parent / "shared").symlink_to(ROOT.parent.joinpath("shared").resolve())
    return root


class Notice:
    """A pytest plugin: the first test that fails."""

    first = ""

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.first = self.first or report.nodeid


def run_tests(root, words):
    """pytest in a copy of the repository, in a child process that has torch already: (exit code, first test that failed)."""
    receive, send = os.pipe()
    child = os.fork()
    if child:
        os.close(send)
        return wait(child, receive)
    code, notice = 3, Notice()
    try:
        out = os.open(root.parent / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(root)
        sys.path[:] = [str(root), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
        own = {path.stem for path in ROOT.glob("*.py")} | {"tests"}
        for name in [name for name in sys.modules if name.split(".")[0] in own]:
            del sys.modules[name]
        code = int(pytest.main(["-x", "--no-header", "--tb=line", *words], plugins=[notice]))
    finally:
        os.write(send, f"{code} {notice.first}".encode())
        os._exit(0)


def wait(child, receive):
    """What a child of run_tests has found; one that hangs is ended."""
    ready, _, _ = select.select([receive], [], [], PATIENCE)
    if not ready:
        os.kill(child, signal.SIGKILL)
    said = os.read(receive, 2**16).decode() if ready else "1 (hangs)"
    os.close(receive)
    os.waitpid(child, 0)
    code, _, first = (said or "1 (died)").partition(" ")
    return int(code), first


def try_fault(fault, root, clock):
    """Make one fault in a copy and run its tests; returns the test that noticed it, or "" if none did."""
    path = root / f"{fault.file}.py"
    whole = path.read_text()
    try:
        path.write_text(make(fault, whole))
        stamp(path, clock)
        own = f"tests/test_{fault.file}.py"
        for words in ([own, "-k", fault.words] if fault.words else [], [own]):
            if not words:
                continue
            code, first = run_tests(root, words)
            if code not in (0, 5):                                      # 5: the words chose no test
                return first or f"(exit code {code})"
        return ""
    finally:
        path.write_text(whole)
        stamp(path, clock)


def stamp(path, clock):
    """A time of its own for every version of a file: Python's compiled files know versions by whole seconds."""
    clock[0] += 2
    os.utime(path, (clock[0], clock[0]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[*FAULTS], choices=[*FAULTS], metavar="FILE")
    parser.add_argument("--number", default="", help="numbers of the table, as 3,7")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args(argv)
    numbers = [int(word) for word in given.number.split(",") if word]
    faults = [fault for fault in table() if fault.file in given.only and (not numbers or fault.number in numbers)]
    for fault in faults:
        make(fault, (ROOT / f"{fault.file}.py").read_text())            # all of them fit, or nothing runs
    if given.list:
        for fault in faults:
            print(f"{fault.number:4} {fault.file:11}{fault.where:24} {fault.breaks}\n{'':16}{fault.old}  ->  {fault.new}")
        return 0
    with tempfile.TemporaryDirectory() as where:
        return run(faults, given.jobs, Path(where))


def run(faults, jobs, where):
    """Try all faults in so many processes; print what survives and the rate; returns the exit code."""
    children = []
    for job in range(jobs):
        child = os.fork()
        if child == 0:
            work(faults[job::jobs], copy_repository(where / str(job)), where / f"{job}.txt")
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    lines = [line.split("\t") for path in where.glob("*.txt") for line in path.read_text().splitlines()]
    noticed = {int(number): test for number, test in lines}
    # A test that fails without a fault has noticed nothing.
    tests = sorted({test for test in noticed.values() if "::" in test})
    root, broken = copy_repository(where / "clean"), set()
    for test in tests if tests and run_tests(root, tests)[0] else ():
        if run_tests(root, [test])[0]:
            broken.add(test)
            print(f"fails without a fault: {test}")
    survivors = [fault for fault in faults if noticed.get(fault.number, "") in {"", *broken}]
    print()
    for fault in survivors:
        print(f"survives: {fault.number} {fault.file}.py, {fault.where or 'whole file'}: {fault.breaks}\n    {fault.old}  ->  {fault.new}")
    for file in dict.fromkeys(fault.file for fault in faults):
        mine, lost = (sum(fault.file == file for fault in some) for some in (faults, survivors))
        print(f"{file}: {mine - lost} of {mine} noticed")
    rate = 1 - len(survivors) / max(1, len(faults))
    print(f"{len(faults) - len(survivors)} of {len(faults)} noticed, {rate:.1%}")
    return int(rate < GOAL)


def work(faults, root, path):
    """Try faults in one copy, one after the other; a line each in a file, and printed."""
    clock = [time.time()]
    for fault in faults:
        test = try_fault(fault, root, clock)
        with open(path, "a") as file:
            file.write(f"{fault.number}\t{test}\n")
        print(f"{fault.number:4} {fault.file:11}{test or 'SURVIVES'}    {fault.breaks}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
