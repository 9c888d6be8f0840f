"""The mechanics of common.py, tried on a toy method: a line through points, in a file of its own."""

import copy
import dataclasses
import errno
import hashlib
import importlib
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import common
import data
from tests import ROOT

import numpy as np
import pytest
import torch
import torch.nn as nn

TOY = '''"""Toy: a line through points.

Run:  python toy.py     100 % of it
"""
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal
import common
import torch
import torch.nn as nn

@dataclass
class Config:
    preset: str = "demo"                    # where the values start from
    mode: Literal["plain", "nan", "slow", "probe"] = "plain"    # what goes wrong
    width: int = 3                          # >= 1: inputs
    steps: int = 9                          # >= 1: optimizer steps
    batch: int = 8                          # >= 1: points a step
    lr: float = 1e-2                        # > 0: learning rate
    seed: int = 0                           # of everything
    gpus: int = 1                           # >= 1: processes
    device: str = "cpu"                     # auto, cpu or cuda
    bf16: bool = False                      # 50 % of the bits
    name: str = ""                          # run folder
    resume: bool = False                    # go on
    sample: str = ""                        # checkpoint to draw from
    log: int = 4                            # >= 1: steps between log lines
    save: int = 4                           # >= 1: steps between checkpoints
    calls: int = 5                          # >= 1: of the sampler

    out: str = ""                           # where --sample writes

    sampling: ClassVar = ("calls",)

PRESETS = {"demo": {}, "big/2": dict(batch=16, calls=7)}

def check(cfg):
    common.require(cfg.calls != 13, "--calls 13: bad luck")

def prepare(cfg):
    with open("prepared", "a") as file:
        file.write("once ")

def probe(cfg):
    """What only two processes can show; rank 0 writes it down."""
    rank, found = common.rank(), {}
    found["mine"] = common.shard(torch.arange(8)).tolist()
    p, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    p.grad = torch.tensor([1.0, 2.0]) * (1 + 2 * rank)
    common.average_gradients([p, unused])
    found["gradient"], found["unused"] = p.grad.tolist(), unused.grad is None
    found["average"] = common.average(torch.tensor([float(rank)])).item()
    torch.manual_seed(rank)
    try:
        common.Run(cfg).restore(model=nn.Linear(3, 1))
    except common.UserError as error:
        found["unequal"] = str(error)
    if rank == 0:
        Path("probe.json").write_text(json.dumps(found))

def main(cfg):
    if cfg.sample:
        saved = common.read_checkpoint(cfg.sample, "toy")
        print("drawn at step", saved["step"], cfg.calls)
        return 0
    if cfg.mode == "probe":
        probe(cfg)
    run = common.Run(cfg)
    torch.manual_seed(common.make_generator(cfg.seed, 0, "weights").initial_seed())
    model = nn.Linear(cfg.width, 1)
    opt = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    start = run.restore(model=model, opt=opt)
    for step in run.steps(start):
        x = common.shard(torch.randn(cfg.batch, cfg.width, generator=common.make_generator(cfg.seed, step, "data")))
        value = (model(x) - x.sum(1, keepdim=True)).square().mean()
        if cfg.mode == "nan" and step == 5:
            value = value * float("nan")
        if cfg.mode == "probe" and step == 5 and common.rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        opt.zero_grad()
        value.backward()
        common.average_gradients(model.parameters())
        opt.step()
        run.log(step, loss=value, half=0.5, **({"late": step} if step > 5 else {}))
        run.save(step)
    run.say(f"done {sum(p.sum().item() for p in model.parameters()):.9f}")
    return 0

if __name__ == "__main__":
    common.launch(main, common.cli(Config, PRESETS, __doc__), check, prepare)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toy module, imported from a file in an empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("toy.py").write_text(TOY)
    sys.modules.pop("toy", None)
    yield importlib.import_module("toy")
    sys.modules.pop("toy", None)


@pytest.fixture
def run(toy, capsys):
    """run(*words) -> (exit code, stdout, stderr) of the toy's command line, in this process."""
    def run(*words):
        code = 0
        try:
            cfg = common.cli(toy.Config, toy.PRESETS, toy.__doc__, [str(word) for word in words])
            common.launch(toy.main, cfg, toy.check, toy.prepare)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run


def command(*words, env=None, **kwargs):
    """The toy as a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.Popen([sys.executable, *map(str, words)], env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **kwargs)


def saved(name="demo", file="last.pt"):
    return torch.load(f"runs/toy/{name}/{file}", weights_only=True)


def log_lines(name="demo"):
    lines = [json.loads(line) for line in Path(f"runs/toy/{name}/log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "memory")} for line in lines]


def same_state(a, b):
    """Bitwise equality of two nested states."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def is_one_line(err):
    return err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


# --- Command line --------------------------------------------------------------

@pytest.mark.parametrize("words, said", [
    (["--nope", "1"], "--nope"), (["--step", "3"], "--step"), (["extra"], "extra"), (["--steps", "many"], "many"),
    (["--steps", "1.5"], "1.5"), (["--preset", "huge"], "huge"), (["--mode", "sideways"], "plain"), (["--lr"], "--lr"),
    (["--steps", "0"], ">= 1"), (["--batch", "-8"], ">= 1"), (["--log", "0"], "--log"),
    (["--lr", "0"], "> 0"), (["--lr", "nan"], "> 0"), (["--lr", "inf"], "> 0"),
    (["--name", "../out"], "letters"), (["--name", ".."], "letters"), (["--device", "tpu"], "tpu"),
    (["--batch", "7", "--gpus", "2"], "multiple of 2,"), (["--calls", "0"], "--calls 0"),
    (["--calls", "0", "--gpus", "2"], "--calls 0"), (["--sample", "none.pt"], "No such file"),
])
def test_a_mistake_is_one_line_and_exit_2(run, words, said):
    code, out, err = run(*words)
    assert code == 2 and out == "" and is_one_line(err) and said in err
    assert sorted(path.name for path in Path().iterdir()) in (["toy.py"], ["__pycache__", "toy.py"])


def test_more_gpus_than_there_are(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, _, err = run("--gpus", 2, "--device", "auto")
    assert code == 2 and is_one_line(err) and "--gpus 2: this machine has 1" in err
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, _, err = run("--device", "cuda")
    assert code == 2 and is_one_line(err) and "--device cuda" in err


def test_a_preset_and_flags_make_the_config(toy):
    cfg = common.cli(toy.Config, toy.PRESETS, toy.__doc__, ["--preset", "big/2", "--calls", "3", "--bf16"])
    assert (cfg.batch, cfg.calls, cfg.bf16, cfg.lr, cfg.name) == (16, 3, True, 1e-2, "big-2")
    assert common.cli(toy.Config, toy.PRESETS, toy.__doc__, ["--bf16", "--no-bf16"]).bf16 is False
    cfg = common.cli(toy.Config, toy.PRESETS, toy.__doc__, ["--preset", "big/2", "--log", "1", "--name", "x"])
    assert common.is_preset(cfg, toy.PRESETS)
    for name, value in (("batch", 8), ("steps", 8), ("seed", 1)):
        assert not common.is_preset(dataclasses.replace(cfg, **{name: value}), toy.PRESETS), name


def test_help_shows_the_docstring_and_every_comment(run, toy):
    code, out, _ = run("--help")
    plain = " ".join(out.split())
    assert code == 0 and toy.__doc__.strip() in out and "Presets:\n  demo\n  big/2\n" in out and "Python 3.10" in out
    for name, (range_text, text) in common.field_notes(toy.Config).items():
        shown = f"{text} ({range_text})" if range_text else text
        assert re.search(rf"--{name}\b[^#]*{re.escape(shown)}", plain), name
    assert "--bf16, --no-bf16" in out and "(default 0.01)" in plain and "[plain, nan, slow, probe]" in plain
    assert "only these may change: sample, seed, device, out, calls." in plain


def test_help_shows_what_the_demo_uses(run, toy, monkeypatch):
    monkeypatch.setitem(toy.PRESETS, "demo", dict(batch=48))
    assert "points a step (>= 1) (default 48)" in " ".join(run("--help")[1].split())


@pytest.mark.parametrize("text, inside, outside", [
    (">= 1", [1, 7], [0, -1, math.nan, math.inf]), ("> 0", [1e-9], [0, -1]), (">= 0 and < 1", [0, 0.99], [1, -0.1]),
    ("in [0, 1]", [0, 1, 0.5], [-0.1, 1.1]), ("in (0, 1]", [1e-9, 1], [0]), ("in [0, 1)", [0], [1]),
    ("in [1, inf]", [1, math.inf], [0.5, math.nan]), ("", [-3, 0.5], [math.nan, math.inf, -math.inf])])
def test_ranges(text, inside, outside):
    assert all(common.in_range(value, text) for value in inside)
    assert not any(common.in_range(value, text) for value in outside)


def test_ranges_hold_without_the_command_line(toy, capsys):
    for changes, said in ((dict(calls=0), "--calls 0: must be >= 1"), (dict(lr=math.nan), "--lr nan: must be > 0"),
                          (dict(mode="sideways"), "--mode sideways: must be one of plain, nan")):
        with pytest.raises(SystemExit) as stop:
            common.launch(toy.main, toy.Config(**changes), toy.check, toy.prepare)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and is_one_line(err) and said in err


def test_steps_of_stages(toy):
    """--steps_X given, else --steps given, else the preset's steps_X, else its steps: whatever the numbers are."""
    source = TOY.replace("    batch: int", "    steps_ae: int = 0                       # of one stage\n    batch: int", 1)
    Path("staged.py").write_text(source.replace("dict(batch=16, calls=7)", "dict(steps=70, steps_ae=5)"))
    staged = importlib.import_module("staged")

    def steps(*words):
        cfg = common.cli(staged.Config, staged.PRESETS, "", words)
        return cfg.steps, cfg.steps_ae, common.is_preset(cfg, staged.PRESETS)

    assert steps() == (9, 9, True) and steps("--steps", "9") == (9, 9, True)
    assert steps("--preset", "big/2") == (70, 5, True)
    assert steps("--preset", "big/2", "--steps", "70") == (70, 70, False)       # the preset's own number, but given
    assert steps("--preset", "big/2", "--steps", "8", "--steps_ae", "3") == (8, 3, False)
    assert steps("--preset", "big/2", "--steps_ae", "3") == (70, 3, False)
    cfg = common.cli(staged.Config, staged.PRESETS, "", ["--preset", "big/2", "--name", "kept"])
    common.write_json(common.folder(cfg) / "config.json", dataclasses.asdict(cfg))
    for words, wanted in (([], (70, 5)), (["--steps", "80"], (80, 80)), (["--steps", "80", "--steps_ae", "6"], (80, 6)), (["--steps_ae", "6"], (70, 6))):
        assert steps("--name", "kept", "--resume", *words)[:2] == wanted, words


def test_batches_of_stages(toy, run):
    """--batch_X given, else --batch given, else the preset's batch_X, else its batch; a resumed run keeps its own."""
    source = TOY.replace("    batch: int", "    batch_ae: int = 0                       # of one stage\n    batch: int", 1)
    Path("batched.py").write_text(source.replace("dict(batch=16, calls=7)", "dict(batch=16, batch_ae=32)"))
    batched = importlib.import_module("batched")

    def batches(*words):
        cfg = common.cli(batched.Config, batched.PRESETS, "", [str(word) for word in words])
        return cfg.batch, cfg.batch_ae

    assert batches("--preset", "big/2") == (16, 32)
    assert batches("--preset", "big/2", "--batch", 16) == (16, 16)              # the preset's own number, but given
    assert batches("--preset", "big/2", "--batch", 8, "--batch_ae", 4) == (8, 4)
    assert batches("--preset", "big/2", "--batch_ae", 4) == (16, 4)
    assert batches("--batch", 4) == (4, 4)
    cfg = common.cli(batched.Config, batched.PRESETS, "", ["--preset", "big/2", "--name", "kept"])
    common.write_json(common.folder(cfg) / "config.json", dataclasses.asdict(cfg))
    assert batches("--name", "kept", "--resume", "--preset", "big/2", "--batch", 16) == (16, 32)


# --- Launch --------------------------------------------------------------------

def test_launch_exits_with_what_main_returns(toy, run, monkeypatch):
    assert run("--steps", 1)[0] == 0
    assert Path("prepared").read_text() == "once "
    monkeypatch.setattr(toy, "main", lambda cfg: 1)
    assert run("--steps", 1)[0] == 1


@pytest.mark.parametrize("error, code, said", [
    (KeyboardInterrupt(), 130, "interrupted"), (OSError(errno.ENOSPC, "No space left"), 2, "No space left"),
    (common.UserError("two\nlines"), 2, "two lines"), (common.UserError("late", code=1), 1, "late"),
    (data.DataError("x.npz: broken"), 2, "x.npz: broken")])
def test_what_main_may_raise(toy, run, monkeypatch, error, code, said):
    def fails(cfg):
        raise error
    monkeypatch.setattr(toy, "prepare", fails)
    found, _, err = run("--steps", 1)
    assert found == code and is_one_line(err) and said in err


def test_a_bug_keeps_its_traceback(toy, run, monkeypatch):
    monkeypatch.setattr(toy, "prepare", lambda cfg: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--steps", 1)


def test_one_process_under_torchrun_needs_no_group(run, monkeypatch):
    for name, value in dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1").items():
        monkeypatch.setenv(name, value)
    code, out, _ = run("--steps", 2, "--gpus", 4)
    assert code == 0 and "1 process," in out and not torch.distributed.is_initialized()


def test_two_processes(toy):
    """One launch: slices, averages, the check of equal weights, then a signal that reaches rank 1 alone."""
    process = command("toy.py", "--gpus", 2, "--mode", "probe", "--log", 4)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and err == "", err
    lines = out.splitlines()
    assert lines[0] == "no GPU in use: 2 processes share the CPU over gloo"
    assert re.fullmatch(r"runs/toy/demo: cpu \(1 thread; more by OMP_NUM_THREADS\), 2 processes over gloo, fp32, batch 8, 4 parameters, "
                        r"steps 0 to 9", lines[1])
    assert [line.split()[1] for line in lines[2:]] == ["4/9", "15:"], "rank 0 alone prints, one line a log step"
    assert Path("prepared").read_text() == "once "
    found = json.loads(Path("probe.json").read_text())
    assert found["mine"] == [0, 1, 2, 3] and found["average"] == 0.5
    assert found["gradient"] == [2.0, 4.0] and found["unused"]
    assert "different weights" in found["unequal"]
    stopped = saved()
    assert stopped["step"] == 6
    words = ["--name", "one", "--steps", "6", "--log", "4", "--save", "6"]
    alone = common.launch(toy.main, common.cli(toy.Config, toy.PRESETS, toy.__doc__, words), toy.check, toy.prepare)
    assert alone is None
    for name, value in saved("one")["state"]["model"].items():
        assert torch.allclose(value, stopped["state"]["model"][name], rtol=0, atol=1e-6)
    (line,), first = log_lines(), log_lines("one")[0]
    assert line["step"] == 4 and abs(line["loss"] - first["loss"]) < 1e-6 and line["half"] == 0.5


# --- Randomness ----------------------------------------------------------------

def test_draws_are_a_function_of_their_arguments():
    first = torch.rand(5, generator=common.make_generator(1, 2, "noise"))
    torch.rand(100)
    assert torch.equal(first, torch.rand(5, generator=common.make_generator(1, 2, "noise")))
    seeds = {common.make_generator(*args).initial_seed() for args in [(1, 2, "noise"), (12, 0, "noise"), (1, 2, "data"),
                                                              (2, 1, "noise"), (1, 20, "noise"), (0, 0, "")]}
    assert len(seeds) == 6
    digest = int(hashlib.sha256(b"7/31/data").hexdigest(), 16)
    assert common.make_generator(7, 31, "data").initial_seed() == digest >> 193          # the first 63 of 256 bits
    many = [common.make_generator(0, step, "x").initial_seed() for step in range(200)]
    assert max(many) < 2 ** 63 and max(many) > 2 ** 62 and min(many) >= 0


def test_dropout_is_reseeded_and_alone_all_is_mine():
    common.seed_dropout(3, 4)
    first = torch.nn.functional.dropout(torch.ones(50))
    common.seed_dropout(3, 4)
    assert torch.equal(first, torch.nn.functional.dropout(torch.ones(50)))
    assert torch.equal(common.shard(torch.arange(6)), torch.arange(6)) and common.average(torch.ones(2)).sum() == 2


def test_dropout_differs_by_rank_step_and_seed(monkeypatch):
    seeds = set()
    for rank in range(3):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        for seed, step in ((3, 4), (3, 5), (4, 4)):
            common.seed_dropout(seed, step)
            seeds.add(tuple(torch.rand(4).tolist()))
    assert len(seeds) == 9


def test_each_rank_has_its_own_slice(monkeypatch):
    monkeypatch.setattr(common, "world", lambda: 3)
    slices = []
    for rank in range(3):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        slices.append(common.shard(torch.arange(6)).tolist())
    assert slices == [[0, 1], [2, 3], [4, 5]]


def test_ema_by_hand():
    ema, model = nn.Linear(2, 2), nn.Linear(2, 2)
    wanted = [0.9 * a.detach() + 0.1 * b.detach() for a, b in zip(ema.parameters(), model.parameters())]
    common.ema_update(ema, model, 0.9)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(ema.parameters(), wanted))


# --- Runs ----------------------------------------------------------------------

def test_a_run_leaves_its_folder(run):
    code, out, err = run("--steps", 20, "--save", 1)
    assert code == 0 and err == ""
    files = {path.name for path in Path("runs/toy/demo").iterdir()}
    assert files == {".lock", "config.json", "toy.py", "log.jsonl", "loss.svg", "last.pt", "last-10.pt", "last-20.pt"}
    assert Path("runs/toy/demo/toy.py").read_text() == TOY
    config = json.loads(Path("runs/toy/demo/config.json").read_text())
    assert config["steps"] == 20 and config == saved()["config"]
    first = out.splitlines()[0]
    for word in ("runs/toy/demo", "cpu", "1 process", "fp32", "batch 8", "4 parameters"):
        assert word in first
    assert out.count("step ") == 5
    ET.parse("runs/toy/demo/loss.svg")


def test_logged_means_are_means(run):
    """The mean since the last log line of each name, over the steps that logged it; the last step always logs."""
    run("--name", "every", "--log", 1)
    run("--name", "fourth", "--log", 4)
    every, fourth = log_lines("every"), log_lines("fourth")
    assert [line["step"] for line in fourth] == [4, 8, 9]
    assert fourth[0]["loss"] == pytest.approx(np.mean([line["loss"] for line in every[:4]]), rel=1e-12)
    assert fourth[2]["loss"] == every[8]["loss"] and "late" not in fourth[0] and fourth[1]["late"] == 6.5


@pytest.mark.parametrize("cut", [0, 4, 6])
def test_resume_is_bitwise_exact(run, monkeypatch, cut):
    original, run_whole = common.Run.log, run("--name", "whole")

    def interrupted(self, step, **values):
        if step == cut:
            signal.raise_signal(signal.SIGTERM)
        original(self, step, **values)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log", interrupted)
        code, out, _ = run("--name", "cut")
    assert run_whole[0] == 0 and code == 128 + signal.SIGTERM and "go on with --resume" in out
    assert saved("cut")["step"] == cut + 1
    with open("runs/toy/cut/log.jsonl", "a") as file:
        file.write('{"step": 99, "loss": 1}\n{"step": 3, "lo')                  # of a later step; cut by a crash
    code, out, _ = run("--name", "cut", "--resume")
    assert code == 0 and f"steps {cut + 1} to 9" in out
    assert same_state(saved("cut")["state"], saved("whole")["state"]) and saved("cut")["step"] == 9
    assert log_lines("cut") == log_lines("whole")


def test_observing_changes_nothing(run):
    run("--name", "a")
    run("--name", "b", "--log", 1, "--save", 1)
    assert same_state(saved("a")["state"], saved("b")["state"])
    run("--name", "c", "--seed", 1)
    assert not same_state(saved("a")["state"], saved("c")["state"])


def test_what_a_resumed_run_may_change(run):
    run("--steps", 4)
    for words, said in ((["--lr", 1], "0.01"), (["--batch", 16], "8"), (["--seed", 1], "0"), (["--bf16"], "False")):
        code, out, err = run("--resume", *words)
        assert code == 2 and out == "" and is_one_line(err) and said in err and words[0] in err
    assert saved()["step"] == 4
    code, out, _ = run("--resume", "--steps", 6, "--log", 1, "--save", 2, "--lr", 0.01)
    assert code == 0 and saved()["step"] == 6 and json.loads(Path("runs/toy/demo/config.json").read_text())["log"] == 1


def test_fewer_steps_than_a_run_has_are_refused(run):
    run("--steps", 6)
    before = Path("runs/toy/demo/config.json").read_bytes()
    code, _, err = run("--resume", "--steps", 3)
    assert code == 2 and is_one_line(err) and "holds step 6 already" in err
    assert Path("runs/toy/demo/config.json").read_bytes() == before


@pytest.mark.parametrize("words, said", [(["--calls", 10 ** 21], "--calls 1000"), (["--lr", 1e300], "--lr 1e+300"), (["--lr", 1e-320], "--lr 1e-320")])
def test_numbers_that_no_tensor_can_hold_are_refused(run, words, said):
    code, _, err = run(*words)
    assert code == 2 and is_one_line(err) and said in err and "in size" in err and not Path("runs").exists()


def test_a_stage_asked_for_with_resume_is_of_that_call_alone(toy):
    source = TOY.replace("    batch: int", "    stage: str = 'all'                      # which\n    batch: int", 1)
    Path("stage_toy.py").write_text(source)
    staged = importlib.import_module("stage_toy")
    words = ["--name", "s", "--steps", "2"]
    for more in ([], ["--resume", "--stage", "one", "--steps", "3"]):
        cfg = common.cli(staged.Config, staged.PRESETS, "", words + more)
        common.launch(staged.main, cfg, staged.check, staged.prepare)
        assert cfg.stage == ("one" if more else "all")
    assert common.cli(staged.Config, staged.PRESETS, "", ["--resume", "--name", "s"]).stage == "all"


def test_a_finished_run_prints_its_result(run):
    _, first, _ = run()
    before = Path("runs/toy/demo/last.pt").read_bytes(), Path("runs/toy/demo/log.jsonl").read_text()
    code, out, _ = run("--resume")
    assert code == 0 and out.splitlines()[-1] == first.splitlines()[-1] and "done" in out
    assert before == (Path("runs/toy/demo/last.pt").read_bytes(), Path("runs/toy/demo/log.jsonl").read_text())


def test_an_empty_name_is_the_presets_when_resumed_as_well(run):
    assert run("--steps", 2)[0] == 0 and run("--resume", "--name", "", "--steps", 4)[0] == 0
    assert saved()["step"] == 4 and not Path("runs/toy/last.pt").exists()


def test_a_finished_run_only_shows_its_result(run):
    """By this flag the methods know that no target counts."""
    assert run("--steps", 2)[0] == 0 and common.Run.trained
    assert run("--resume")[0] == 0 and not common.Run.trained
    assert run("--resume", "--steps", 3)[0] == 0 and common.Run.trained


def test_an_empty_checkpoint_is_named_with_a_reason(run):
    Path("empty.pt").touch()
    code, _, err = run("--sample", "empty.pt")
    assert code == 2 and is_one_line(err) and "empty.pt: not a checkpoint of this project (EOFError)" in err, err


def test_resume_without_a_run_is_refused(run):
    run("--steps", 2)
    code, out, err = run("--resume", "--name", "dmeo")
    assert code == 2 and is_one_line(err) and "runs/toy/dmeo: no run to resume; there are: demo" in err
    assert sorted(path.name for path in Path("runs/toy").iterdir()) == ["demo"]


def test_resume_without_a_checkpoint_starts_and_says_so(run):
    run("--steps", 2)
    Path("runs/toy/demo/last.pt").unlink()
    code, out, _ = run("--resume", "--steps", 2)
    assert code == 0 and "no checkpoint yet, starting at step 0" in out and saved()["step"] == 2


def test_a_fresh_run_never_overwrites(run):
    run("--steps", 2)
    before = Path("runs/toy/demo/last.pt").read_bytes()
    for name in ("demo-2", "demo-3"):
        code, out, _ = run("--steps", 1)
        assert code == 0 and f"this one goes to runs/toy/{name}" in out and saved(name)["config"]["name"] == name
    assert Path("runs/toy/demo/last.pt").read_bytes() == before
    run("--resume", "--name", "demo-2", "--steps", 3)
    assert saved("demo-2")["step"] == 3


def test_sample_takes_the_checkpoints_config(run):
    run("--steps", 2, "--batch", 4)
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    code, out, _ = run("--sample", "runs/toy/demo/last.pt", "--calls", 2, "--seed", 9)
    assert code == 0 and "drawn at step 2 2" in out
    for words in (["--batch", 8], ["--width", 5], ["--gpus", 2], ["--steps", 5]):
        code, _, err = run("--sample", "runs/toy/demo/last.pt", *words)
        assert code == 2 and is_one_line(err) and "sample, seed, device, out, calls" in err
    assert before == {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}


def test_stages_have_their_own_checkpoint_and_free_steps(toy, monkeypatch):
    cfg = toy.Config(name="staged")
    run = common.Run(cfg, "ae", steps=3)
    assert (run.total, run.checkpoint.name, run.log_path.name, run.chart.name) == (
        3, "ae.pt", "log-ae.jsonl", "loss-ae.svg")
    run.restore(model=nn.Linear(1, 1))
    for step in run.steps(0):
        run.log(step, loss=0.0)
        run.save(step)
    assert common.Run(cfg, "dit").folder == run.folder and cfg.name == "staged"
    assert common.Run(toy.Config(name="staged"), "ae").folder.name == "staged-2"


def test_other_files_are_refused(run, toy):
    run("--steps", 2)
    path = Path("runs/toy/demo/last.pt")
    good = saved()
    cases = [(good | {"method": "gpipe"}, "a checkpoint of gpipe.py, not of toy.py"),
             (good | {"config": good["config"] | {"gone": 1}}, "another version of this file (fields gone)"),
             ({"weights": 1}, "not a checkpoint")]
    for content, said in cases:
        torch.save(content, "other.pt")
        code, out, err = run("--sample", "other.pt")
        assert code == 2 and is_one_line(err) and said in err, err
    younger = {name: value for name, value in good["config"].items() if name != "calls"}
    torch.save(good | {"config": younger}, "other.pt")
    code, out, err = run("--sample", "other.pt")
    assert code == 0 and "other.pt: written by an earlier version of this file; defaults: --calls" in out, err
    Path("other.pt").write_bytes(path.read_bytes()[:700])
    code, _, err = run("--sample", "other.pt")
    assert code == 2 and is_one_line(err) and "not a checkpoint" in err
    torch.save(good | {"state": good["state"] | {"model": nn.Linear(5, 1).state_dict()}}, path)
    code, _, err = run("--resume", "--steps", 4)
    assert code == 2 and is_one_line(err) and "does not fit" in err and "size mismatch" in err
    config = Path("runs/toy/demo/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"older": 1}))
    code, _, err = run("--resume")
    assert code == 2 and is_one_line(err) and "fields older" in err
    config.write_text("{half")
    code, _, err = run("--resume")
    assert code == 2 and is_one_line(err) and "config.json" in err


def test_nan_guard_names_the_step_and_the_last_good_checkpoint(run):
    code, _, err = run("--mode", "nan", "--log", 3)
    assert code == 1 and is_one_line(err) and "step 6: loss is not finite" in err
    assert "last good checkpoint: runs/toy/demo/last.pt" in err and saved()["step"] == 4
    code, _, err = run("--mode", "nan", "--log", 100, "--name", "silent", "--save", 7)
    assert code == 1 and "step 7" in err and "weights" in err and "no checkpoint yet" in err


def test_a_second_signal_counts_after_five_seconds(toy, monkeypatch):
    run, clock, left = common.Run(toy.Config()), [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(os, "_exit", left.append)
    run.on_signal(signal.SIGINT, None)
    clock[0] += 4.9
    run.on_signal(signal.SIGTERM, None)
    assert run.signal == signal.SIGINT and left == []
    clock[0] += 0.2
    run.on_signal(signal.SIGINT, None)
    assert left == [130]


def test_signals_are_given_back(run):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run("--steps", 2)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_ctrl_c_saves_and_resume_equals_the_uninterrupted_run(toy, run):
    words = ["--steps", 100_000, "--log", 2, "--save", 100_000, "--name", "stopped"]
    process = command("toy.py", *words)
    log, deadline = Path("runs/toy/stopped/log.jsonl"), time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "" and "signal 2" in out and "go on with --resume" in out
    step = saved("stopped")["step"]
    run("--resume", "--name", "stopped", "--steps", step + 3)
    run("--name", "whole", "--steps", step + 3, "--log", 2)
    assert same_state(saved("stopped")["state"], saved("whole")["state"])
    assert log_lines("stopped") == log_lines("whole")


def test_a_crash_between_two_checkpoints_leaves_each_step_once_in_the_log(run, monkeypatch):
    original = common.Run.log

    def dies(self, step, **values):
        if step == 6:
            raise SystemExit(9)
        original(self, step, **values)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log", dies)
        assert run("--log", 1, "--name", "cut")[0] == 9
    assert [line["step"] for line in log_lines("cut")] == [1, 2, 3, 4, 5, 6] and saved("cut")["step"] == 4
    assert run("--resume", "--name", "cut")[0] == run("--log", 1, "--name", "whole")[0] == 0
    assert log_lines("cut") == log_lines("whole") and same_state(saved("cut")["state"], saved("whole")["state"])


# --- Atomic files --------------------------------------------------------------

def test_a_full_disk_leaves_the_old_checkpoint(run, monkeypatch):
    run("--steps", 4)
    before = Path("runs/toy/demo/last.pt").read_bytes()
    real = os.fsync

    def full(number):
        name = os.readlink(f"/proc/self/fd/{number}")
        if ".pt." in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = run("--resume", "--steps", 8)
    assert code == 1 and is_one_line(err) and "No space left" in err and "last.pt" in err and "untouched" in err
    assert Path("runs/toy/demo/last.pt").read_bytes() == before and not list(Path("runs").rglob("*.tmp"))


def test_a_disk_that_fills_in_mid_write(tmp_path):
    """A real refusal of the kernel, in the middle of torch.save: files may grow to 64 KiB."""
    path, limits = tmp_path / "x.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    common.write_atomic(path, lambda file: file.write(b"old"))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
        for write in (lambda file: torch.save(torch.zeros(10 ** 6), file), lambda file: file.write(bytes(10 ** 6))):
            with pytest.raises(common.UserError) as stop:
                common.write_atomic(path, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stop.value.code == 1 and "cannot save" in str(stop.value)
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]


def test_a_file_where_a_folder_is_wanted_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(common.UserError, match="cannot save"):
        common.write_atomic(tmp_path / "file" / "x.pt", lambda file: file.write(b"new"))


def test_a_file_is_whole_and_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    path, events, fsync, replace = tmp_path / "x", [], os.fsync, os.replace
    common.write_atomic(path, lambda file: file.write(b"old"))
    monkeypatch.setattr(os, "fsync", lambda number: events.append(("fsync", path.read_bytes())) or fsync(number))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append((Path(a).read_bytes(), Path(b).read_bytes())) or replace(a, b))
    common.write_atomic(path, lambda file: file.write(b"new"))
    assert events == [("fsync", b"old"), (b"new", b"old")] and path.read_bytes() == b"new"


def test_kill_in_mid_save(tmp_path):
    """SIGKILL when half is written: the old file is whole."""
    code = ("import common, os, signal\n"
            "common.write_atomic('x', lambda file: file.write(b'old'))\n"
            "def half(file):\n    file.write(bytes(100000))\n    file.flush()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
            "common.write_atomic('x', half)\n")
    process = command("-c", code, cwd=tmp_path)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and (tmp_path / "x").read_bytes() == b"old"
    common.write_atomic(tmp_path / "x", lambda file: file.write(b"new"))
    assert (tmp_path / "x").read_bytes() == b"new"


# --- Pictures ------------------------------------------------------------------

def decode(path):
    """Frames (F, H, W, 3) and delays in seconds of a PNG or animated PNG of 8-bit RGB, from its specification."""
    raw = Path(path).read_bytes()
    assert raw[:8] == bytes([137, 80, 78, 71, 13, 10, 26, 10])
    at, parts, delays, sequence, count = 8, [], [], [], 1
    while at < len(raw):
        length = int.from_bytes(raw[at:at + 4], "big")
        kind, body = raw[at + 4:at + 8], raw[at + 8:at + 8 + length]
        assert int.from_bytes(raw[at + 8 + length:at + 12 + length], "big") == zlib.crc32(kind + body)
        at += 12 + length
        if kind == b"IHDR":
            width, height, *rest = struct.unpack(">2I5B", body)
            assert rest == [8, 2, 0, 0, 0]
        elif kind == b"acTL":
            count, plays = struct.unpack(">2I", body)
            assert plays == 0 and not parts
        elif kind == b"fcTL":
            number, w, h, x, y, top, bottom, dispose, blend = struct.unpack(">5I2H2B", body)
            assert (w, h, x, y, dispose, blend) == (width, height, 0, 0, 0, 0)
            sequence.append(number)
            delays.append(top / bottom)
        elif kind == b"IDAT":
            parts.append(body)
        elif kind == b"fdAT":
            sequence.append(int.from_bytes(body[:4], "big"))
            parts.append(body[4:])
    assert kind == b"IEND" and sequence == list(range(len(sequence))) and len(parts) == count
    rows = [np.frombuffer(zlib.decompress(part), np.uint8).reshape(height, 1 + 3 * width) for part in parts]
    assert not any(row[:, 0].any() for row in rows)                             # filter 0: bytes as they are
    return np.stack([row[:, 1:].reshape(height, width, 3) for row in rows]), delays


def test_png_and_animated_png(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (4, 5, 7, 3), np.uint8)
    common.png(tmp_path / "one.png", pictures[0])
    assert (decode(tmp_path / "one.png")[0] == pictures[:1]).all()
    common.png(tmp_path / "many.png", pictures, seconds=0.25)
    frames, delays = decode(tmp_path / "many.png")
    assert (frames == pictures).all() and delays == [0.25] * 4


@pytest.mark.optional
def test_pillow_reads_what_we_write(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pictures = np.random.default_rng(1).integers(0, 256, (3, 6, 4, 3), np.uint8)
    common.png(tmp_path / "many.png", pictures, seconds=0.5)
    with Image.open(tmp_path / "many.png") as image:
        assert image.n_frames == 3 and image.info["duration"] == 500
        for i, picture in enumerate(pictures):
            image.seek(i)
            assert (np.asarray(image.convert("RGB")) == picture).all()


def test_to_uint8_inverts_the_reader():
    values = torch.arange(256).view(1, 16, 16)
    assert torch.equal(common.to_uint8(values / 127.5 - 1), values.to(torch.uint8))
    assert common.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_font():
    """Every printable ASCII character has a glyph of its own; text is as high as asked, with ink, and cached."""
    letters = [chr(code) for code in range(33, 127)] + ["±", "×"]
    glyphs = {letter: common.text_bitmap(letter, 13) for letter in letters}
    for height in (10, 13):
        shown = {common.text_bitmap(letter, height).tobytes() for letter in letters}
        assert len(shown) == len(letters), "two letters look alike"
    assert all(glyph.shape[0] == 13 and 0 <= glyph.min() and glyph.max() > 0.9 for glyph in glyphs.values())
    both = np.concatenate([glyphs["k"], glyphs["="]], 1)
    assert (common.text_bitmap("k=", 13) == both).all() and common.text_bitmap("", 13).shape == (13, 0)
    assert common.text_bitmap("\u2603", 13).tobytes() == common.text_bitmap("\u2604", 13).tobytes()


def test_grid_geometry():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 4, 6) + 10
    plain = common.grid(images, 3)
    top, left = [int(axis.min()) for axis in np.nonzero((plain == 10).all(-1))]
    for i in range(5):
        ys, xs = np.nonzero((plain == 10 + i).all(-1))
        assert len(ys) == 4 * 6 and (ys.max() - ys.min(), xs.max() - xs.min()) == (3, 5)
        assert (ys.min() - top, xs.min() - left) == (i // 3 * 6, i % 3 * 8)     # two pixels between
    assert ((plain == 255) | ((plain >= 10) & (plain < 15))).all() and plain.dtype == np.uint8
    twice = common.grid(images[:1], 1, scale=2)
    assert (twice == 10).all(-1).sum() == 4 * 4 * 6
    named = common.grid(images, 3, rows=["cat", "dog"], heads=["a", "b", "c"], scale=4)
    dark = (named < 10).any(-1) | ((named > 30) & (named < 60)).all(-1)
    ys, xs = np.nonzero(dark)
    images_at = np.nonzero((named >= 10) & (named < 15))
    assert dark.any() and (xs.min() < images_at[1].min()) and (ys.min() < images_at[0].min())
    assert not (dark & ((named >= 10) & (named < 15)).all(-1)).any()
    bytes_of = {word: common.grid(images[:1], 1, rows=[word]).tobytes() for word in ("ab", "ba", "AB")}
    assert len(set(bytes_of.values())) == 3
    grey = common.grid(np.full((2, 1, 3, 3), 77, np.uint8), 2)
    assert (grey == 77).all(-1).sum() == 18


# --- Charts --------------------------------------------------------------------

def numbers_of(path):
    """All coordinates of an SVG that must parse, and its texts."""
    root = ET.parse(path).getroot()
    values = []
    for element in root.iter():
        for key in ("x", "y", "cx", "cy", "d", "points", "width", "height", "r"):
            values += re.findall(r"[-+.\w]+", re.sub(r"[MVHLhv]", " ", element.get(key, "")))
    numbers = [float(value) for value in values if value != "9999"]
    assert all(map(math.isfinite, numbers))
    assert min(numbers) >= -260 and max(numbers) <= 2000
    return root, [element.text or "" for element in root.iter() if element.tag.endswith("text")]


@pytest.mark.parametrize("series, kwargs", [
    ({"a": ([1, 2, 3], [0.1, 10, 1000]), "b": ([1, 2, 3], [1, 2, 3])}, dict(logy=True, logx=True)),
    ({"flat": ([1, 2, 3], [5, 5, 5])}, {}), ({"flat": ([1, 2, 3], [5, 5, 5])}, dict(logy=True)),
    ({"zero": ([0, 1], [0, 0])}, dict(logy=True)), ({"point": ([7], [3.5])}, {}), ({"point": ([7], [3.5])}, dict(logx=True)),
    ({"minus": ([1, 2], [-1, 2])}, dict(logy=True)), ({"spread": ([1, 2], [1, 2], [0.1, 3])}, dict(logy=True)),
    ({"gaps": ([1, 2, 3], [1, float("nan"), float("inf")])}, {}), ({"none": ([], [])}, {}), ({}, {}),
    ({"tiny": ([1, 2], [1e-12, 3e-12])}, dict(logy=True)), ({"huge": ([1e9, 2e9], [1e20, 1e20])}, {}),
    ({str(i): (range(50), [i + j for j in range(50)]) for i in range(12)}, {})])
def test_line_charts_are_sound(tmp_path, series, kwargs):
    common.line_chart(tmp_path / "x.svg", series, "a < b & c", "steps", "loss", **kwargs)
    _, texts = numbers_of(tmp_path / "x.svg")
    assert {"a < b & c", "steps", "loss", *series} <= set(texts)


def test_a_line_chart_shows_the_data(tmp_path):
    common.line_chart(tmp_path / "x.svg", {"line": ([0, 5, 10], [0, 5, 10]), "log": ([0, 10], [1, 1])})
    root, texts = numbers_of(tmp_path / "x.svg")
    line = [element for element in root if element.tag.endswith("polyline")][0].get("points")
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in line.split())
    assert x1 - x0 == pytest.approx(x2 - x1) and y1 - y0 == pytest.approx(y2 - y1) and y2 < y0 and x2 > x0
    assert {"0", "2", "4", "6", "8", "10"} <= set(texts)
    common.line_chart(tmp_path / "y.svg", {"log": ([1, 10, 100], [1, 10, 1e4])}, logx=True, logy=True)
    root, texts = numbers_of(tmp_path / "y.svg")
    line = [element for element in root if element.tag.endswith("polyline")][0].get("points")
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in line.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and 3 * (y1 - y0) == pytest.approx(y2 - y1, abs=0.5)
    assert {"1", "10", "100", "1000", "10000"} <= set(texts)


# --- Judges and read-outs ------------------------------------------------------

class Stripes:
    """Two classes of 4 x 4 pictures, dark and bright; remembers which it was asked for."""
    classes, labels = ["dark", "bright"], np.arange(64) % 2

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 64

    def pixels(self, index):
        self.asked.append(index)
        noise = torch.from_numpy(np.random.default_rng(0).normal(size=(64, 3, 4, 4))).float()[index] / 10
        return noise + torch.from_numpy(self.labels[index] - 0.5).float().view(-1, 1, 1, 1)


def test_judges_have_disjoint_halves_and_no_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "tqdm", lambda steps, *_, **__: list(steps)[:100])          # enough for stripes
    seen, states = {}, {}
    for role, seed in (("teacher", 0), ("ruler", 0), ("ruler", 1)):
        folder, stripes = tmp_path / f"{role}{seed}", Stripes()
        folder.mkdir()
        monkeypatch.chdir(folder)
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        network = common.judge(stripes, role)
        assert torch.equal(before, torch.random.get_rng_state())
        seen[role] = set(np.concatenate(stripes.asked[1:]).tolist())            # the first look makes the file's name
        states[role, seed] = network.state_dict()
        assert common.accuracy(network, stripes.pixels(np.arange(64)), stripes.labels) == 1.0
    assert len(seen["teacher"]) == len(seen["ruler"]) == 32 and not seen["teacher"] & seen["ruler"]
    assert same_state(states["ruler", 0], states["ruler", 1])
    assert {k: v.shape for k, v in states["ruler", 0].items()} != {k: v.shape for k, v in states["teacher", 0].items()}


def test_a_judge_is_kept_under_all_that_it_depends_on(tmp_path, monkeypatch):
    """Its role, pictures, labels and recipe: where one differs, another is trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "tqdm", lambda steps, *_, **__: [0])
    others, dimmed, source = Stripes(), Stripes(), common.inspect.getsource
    others.labels, others.pixels = 1 - others.labels, Stripes().pixels          # the same pictures, under other names
    dimmed.pixels = lambda index: Stripes().pixels(index) / 2
    for data_set, role in ((Stripes(), "ruler"), (Stripes(), "teacher"), (others, "ruler"), (dimmed, "ruler"), (Stripes(), "ruler")):
        common.judge(data_set, role)
    assert len(list(Path("runs/judges").iterdir())) == 4
    for changed in (common.Judge, common.train_judge):
        monkeypatch.setattr(common.inspect, "getsource", lambda thing, changed=changed: source(thing) + "#" * (thing is changed))
        common.judge(Stripes(), "ruler")
    assert len(list(Path("runs/judges").iterdir())) == 6


def test_judge_of_shapes(tmp_path, monkeypatch):
    """After 250 of its 700 steps; the demos print what it knows after all of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.train_judge, "__defaults__", (250,))
    ruler = common.judge(data.open_data("shapes", "judge", size=16), "ruler")
    test = data.open_data("shapes", "test", size=16, count=1000)
    x = test.pixels(np.arange(1000))
    assert common.accuracy(ruler, x, test.labels) >= 0.9
    assert not ruler.training and not any(p.requires_grad for p in ruler.parameters())
    assert ruler(x[:5]).shape == (5, 10) and ruler.features(x[:5]).shape == (5, 64)
    assert ruler.spatial(x[:5]).shape == (5, 64, 4, 4)
    assert torch.allclose(ruler.spatial(x[:5]).mean((2, 3)), ruler.features(x[:5]))
    assert [path.suffix for path in Path("runs/judges").iterdir()] == [".pt"]
    monkeypatch.setattr(torch.optim, "Adam", None)                              # a second call must not train
    again = common.judge(data.open_data("shapes", "judge", size=16), "ruler")
    assert same_state(again.state_dict(), ruler.state_dict()) and not again.training
    assert not any(p.requires_grad for p in again.parameters())
    halves = ruler.features(x[:500]), ruler.features(x[500:])
    noise = ruler.features(torch.rand_like(x[:500]) * 2 - 1)
    assert common.frechet(halves[0], noise) > 20 * common.frechet(*halves) > 0


def test_nearest_training_images_in_one_block_and_in_several():
    dataset = data.open_data("shapes", "train", size=8, count=50)
    rows = np.array([41, 7, 7, 0, 49])
    x = dataset.pixels(rows) + 0.05 * torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    by_hand = (x[:, None] - dataset.pixels(np.arange(50))).square().sum((2, 3, 4)).argmin(1)
    assert by_hand.tolist() == rows.tolist()
    assert torch.equal(common.nearest(x.double(), dataset), dataset.pixels(rows))
    asked = []

    class Large:                                                                # says that it fills 256 MB three times
        images = SimpleNamespace(size=3 * 2 ** 26)
        __len__ = dataset.__len__

        def pixels(self, index):
            asked.append(len(index))
            return dataset.pixels(index)

    assert torch.equal(common.nearest(x, Large()), dataset.pixels(rows)) and asked == [13, 13, 12, 12, 5]


def whitened(N, D, seed):
    """Numbers (N, D) whose sample mean is 0 and sample covariance the identity, exactly."""
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    return torch.linalg.qr(x).Q * math.sqrt(N - 1)


def test_frechet_closed_form():
    draw = torch.Generator().manual_seed(0)
    ma, mb, sa, sb = torch.rand(4, 64, generator=draw, dtype=torch.float64) + 0.1
    a, b = whitened(300, 64, 1) * sa + ma, whitened(500, 64, 2) * sb + mb
    assert common.frechet(a, b) == pytest.approx(((ma - mb) ** 2).sum().item() + ((sa - sb) ** 2).sum().item(), rel=1e-9)
    assert common.frechet(a, a) == pytest.approx(0, abs=1e-9)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=draw, dtype=torch.float64)).Q
    ca, cb = torch.cov(a.T), torch.cov((b @ turn).T)
    values, vectors = torch.linalg.eigh(ca)                                     # tr (Ca^(1/2) Cb Ca^(1/2))^(1/2)
    root = vectors * values.sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cb @ root).sqrt().sum()
    wanted = (a.mean(0) - (b @ turn).mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * cross
    assert common.frechet(a, b @ turn) == pytest.approx(wanted.item(), rel=1e-9)
    few = torch.randn(20, 64, generator=draw)                                   # fewer samples than features
    assert common.frechet(few, few) == pytest.approx(0, abs=1e-5) and common.frechet(few, few + 1) == pytest.approx(64, rel=1e-5)


def test_flops_and_memory():
    layer, x = nn.Linear(7, 5), torch.randn(3, 7, requires_grad=True)
    assert common.flops(lambda: layer(x)) == 2 * 3 * 7 * 5
    assert common.flops(lambda: layer(x).sum().backward()) == 3 * 2 * 3 * 7 * 5
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert common.memory(torch.device("cpu")) == pytest.approx(int(peak[1]) / 1024, rel=0.02)


# --- What users meet -----------------------------------------------------------

def wait_for(path, process, seconds=60):
    """Until a file is there, while the process lives."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def test_two_runs_at_once_never_share_a_folder(toy, run):
    """A second run of the same name takes the next folder; resuming what another process trains is refused."""
    process = command("toy.py", "--steps", 10 ** 6, "--log", 2, "--save", 10 ** 6)
    try:
        wait_for(Path("runs/toy/demo/log.jsonl"), process)
        code, out, _ = run("--steps", 2)
        assert code == 0 and "runs/toy/demo is another run's; this one goes to runs/toy/demo-2" in out
        assert saved("demo-2")["step"] == 2 and not Path("runs/toy/demo/last.pt").exists()
        code, out, err = run("--resume")
        assert code == 2 and is_one_line(err) and "another process is training there" in err
    finally:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "go on with --resume: python toy.py --resume --name demo" in out
    assert saved()["config"]["name"] == "demo"


def test_a_copied_and_a_renamed_run_resume(run):
    run("--steps", 4, "--name", "first")
    shutil.copytree("runs/toy/first", "runs/toy/copy")
    Path("runs/toy/first").rename("runs/toy/renamed")
    for name in ("copy", "renamed"):
        code, out, err = run("--resume", "--name", name, "--steps", 6)
        assert code == 0 and f"runs/toy/{name}: cpu" in out and saved(name)["step"] == 6, err
        assert saved(name)["config"]["name"] == name


def test_temporary_files_of_killed_writers_are_swept(run):
    run("--steps", 2)
    Path("runs/toy/demo/last.pt.123.tmp").write_bytes(b"half")
    run("--steps", 3, "--resume")
    assert not list(Path("runs").rglob("*.tmp"))


@pytest.mark.parametrize("change, said", [
    (dict(step="four"), "field step is no int"), (dict(step=True), "field step is no int"), (dict(step=-1), "field step is -1"),
    (dict(step=10 ** 20), "field step is 1000"), (dict(sums={1: torch.ones(2)}), "field sums"), (dict(sums={"a": torch.zeros(1, 2)}), "field sums"),
    (dict(sums={"a": torch.tensor([math.nan, 1])}), "field sums"), (dict(sums={"a": torch.zeros(2)}), "field sums"), (dict(classes=[None]), "field classes"),
    (dict(sums=[1]), "field sums is no dict"), (dict(sums={"loss": 3}), "field sums"), (dict(state=[]), "field state is no dict"),
    (dict(config=[]), "field config is no dict"), (dict(classes="a"), "field classes is no list")])
def test_a_damaged_checkpoint_names_its_field(run, change, said):
    run("--steps", 4)
    path = Path("runs/toy/demo/last.pt")
    torch.save(saved() | change, path)
    for words in (["--resume", "--steps", 6], ["--sample", path]):
        code, out, err = run(*words)
        assert code == 2 and is_one_line(err) and said in err and str(path) in err, err


def test_a_checkpoint_that_lacks_a_field_or_has_other_parts(run):
    run("--steps", 4)
    path, good = Path("runs/toy/demo/last.pt"), saved()
    for name in ("step", "sums", "state", "config", "method"):
        torch.save({key: value for key, value in good.items() if key != name}, path)
        code, _, err = run("--resume", "--steps", 6)
        assert code == 2 and is_one_line(err) and str(path) in err and name in err
    broken = [{"model": good["state"]["model"]}, {"model": [1], "opt": good["state"]["opt"]},
              {"model": good["state"]["model"], "opt": {"state": 3}}, {"model": {1: 2}, "opt": good["state"]["opt"]},
              {"model": good["state"]["model"], "opt": "text"}]
    for state in broken:
        torch.save(good | {"state": state}, path)
        code, _, err = run("--resume", "--steps", 6)
        assert code == 2 and is_one_line(err) and "does not fit" in err, (state, err)
    torch.save(good | {"state": good["state"] | {"model": {k: v * math.nan for k, v in good["state"]["model"].items()}}}, path)
    code, _, err = run("--resume", "--steps", 6)
    assert code == 2 and is_one_line(err) and "model holds weights that are not finite" in err


@pytest.mark.parametrize("text, said", [
    ("[1]", "holds no configuration"), ("{half", "no configuration can be read"), ("\xff\xfe\x00", "no configuration can be read"),
    ('{"batch": "8"}', "field batch is '8', not of type int")])
def test_a_damaged_configuration_is_one_line(run, text, said):
    run("--steps", 2)
    path = Path("runs/toy/demo/config.json")
    path.write_bytes(text.encode("latin-1"))
    code, _, err = run("--resume")
    assert code == 2 and is_one_line(err) and said in err and str(path) in err


@pytest.mark.parametrize("field, value", [("batch", "8"), ("lr", "fast"), ("bf16", 1), ("steps", 2.5), ("mode", None)])
def test_a_field_of_another_type_is_named(run, field, value):
    run("--steps", 2)
    path = Path("runs/toy/demo/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    code, _, err = run("--resume")
    assert code == 2 and is_one_line(err) and f"field {field} is {value!r}" in err
    torch.save(saved() | {"config": saved()["config"] | {field: value}}, "runs/toy/demo/last.pt")
    code, _, err = run("--sample", "runs/toy/demo/last.pt")
    assert code == 2 and is_one_line(err) and f"field {field} is {value!r}" in err


@pytest.mark.parametrize("line", ["[1, 2]", '{"step": "4", "loss": 1}', '{"loss": 1}', "\udcff\udcfe", '{"step": 1, "loss": "x"}'])
def test_a_damaged_log_is_one_line(run, line):
    run("--steps", 4, "--log", 1)
    path = Path("runs/toy/demo/log.jsonl")
    lines = path.read_text().splitlines()
    path.write_bytes("\n".join([lines[0], line, *lines[2:]]).encode(errors="surrogateescape"))
    code, _, err = run("--resume", "--steps", 6)
    assert code == 2 and is_one_line(err) and "log.jsonl: line 2" in err


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_hung_up_terminal_saves_like_sigterm(run, monkeypatch, number):
    original = common.Run.log

    def hangs_up(self, step, **values):
        if step == 5:
            signal.raise_signal(number)
        original(self, step, **values)

    monkeypatch.setattr(common.Run, "log", hangs_up)
    code, _, _ = run("--save", 100)
    assert code == 128 + number and saved()["step"] == 6


def test_nohup_is_respected(run, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        original = common.Run.log

        def hangs_up(self, step, **values):
            signal.raise_signal(signal.SIGHUP)
            original(self, step, **values)

        monkeypatch.setattr(common.Run, "log", hangs_up)
        assert run("--steps", 3)[0] == 0 and saved()["step"] == 3
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_pipe_saves_and_leaves(toy):
    """What `| head -1` does: the reader leaves after the first line."""
    process = command("toy.py", "--steps", 10 ** 6, "--log", 5, "--save", 10 ** 6)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE and process.stderr.read() == ""
    assert saved()["step"] % 5 == 0


def test_a_machine_without_resource_or_locks(toy):
    """Windows has neither module, and no SIGHUP; a run of one process needs none of them."""
    code = ("import sys, signal\n"
            "sys.modules['resource'] = sys.modules['fcntl'] = None\n"
            "del signal.SIGHUP\n"
            "import common, toy\n"
            "cfg = common.cli(toy.Config, toy.PRESETS, '', ['--steps', '3', '--log', '1'])\n"
            "common.launch(toy.main, cfg, toy.check, toy.prepare)\n")
    process = command("-c", code, env={"PYTHONPATH": f"{ROOT}{os.pathsep}."})
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == "" and saved()["step"] == 3
    assert json.loads(Path("runs/toy/demo/log.jsonl").read_text().splitlines()[0])["memory"] is None


def test_what_does_not_fit_into_memory_is_one_line(run, toy, monkeypatch):
    code, out, err = run("--width", 10 ** 12)
    assert code == 2 and is_one_line(err) and "not enough memory" in err and "4000000000000 bytes" in err
    with pytest.raises(common.UserError, match="this model needs 20,000,000,000,000 bytes"):
        common.require_memory(toy.Config(), lambda: nn.Linear(10 ** 12, 1, bias=False))
    common.require_memory(toy.Config(), lambda: nn.Linear(10, 1))
    for error in (MemoryError("big"), RuntimeError("Storage size calculation overflowed with sizes=[9]"),
                  torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 GiB")):
        def fails(cfg, error=error):
            raise error
        monkeypatch.setattr(toy, "prepare", fails)
        code, _, err = run("--steps", 1)
        assert code == 2 and is_one_line(err) and "not enough memory" in err


def test_threads_keep_to_the_share_of_the_process(toy, monkeypatch, tmp_path):
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE" and int(os.environ["GOMP_SPINCOUNT"]) <= 10 ** 6
    assert common.processors() == len(os.sched_getaffinity(0))
    for text, count in (("150000 100000", 1), ("400000 100000", 3), ("max 100000", 3), ("50000 100000", 1), ("200000 100000", 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
        monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/sys/fs/cgroup/cpu.max")
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text + "\n")
        assert common.processors() == count, text
        monkeypatch.undo()


def test_all_fields_of_a_batch_are_shared_out(toy, capsys):
    """A stage's own batch: whole shares for every process, named in the introduction; 0 is --batch."""
    @dataclasses.dataclass
    class Staged(toy.Config):
        batch_ar: int = 0

    for own, count in ((0, 4), (6, 6)):
        cfg = Staged(batch=4, batch_ar=own, steps=1, name=f"own-{own}")
        assert common.batch_size(cfg, "ar") == count and common.batch_size(cfg, "tokenizer") == 4
        common.check_machine(cfg, 2)
        common.Run(cfg, "ar").restore(model=nn.Linear(2, 1))
        assert f"batch {count}, " in capsys.readouterr().out
    with pytest.raises(common.UserError, match="--batch_ar 5: must be a multiple of 2"):
        common.check_machine(Staged(batch=4, batch_ar=5), 2)


def test_a_demo_runs_on_one_thread_unless_told(run, toy, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1] if chosen else 2)
    monkeypatch.setattr(common, "processors", lambda: 3)
    for words, told, count in (((), None, 1), (("--preset", "big/2"), None, 2), ((), "2", 2), (("--steps", 3), None, 1)):
        chosen.clear()
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if told:
            monkeypatch.setenv("OMP_NUM_THREADS", told)
        code, out, _ = run(*words)
        assert code == 0 and chosen[0] == count, words
        assert ("cpu (1 thread; more by OMP_NUM_THREADS)" if count == 1 else "cpu (2 threads)") in out


def test_a_stage_whose_earlier_stage_changed_starts_anew(toy, capsys):
    """It keeps the old checkpoint beside it; with the earlier stage unchanged it goes on."""
    def go_on(frozen, resume=True):
        run = common.Run(toy.Config(name="staged", resume=resume, steps=4), "ar")
        model = nn.Linear(2, 1)
        start = run.restore(model=model, frozen={"tokenizer": frozen})
        for step in run.steps(start):
            run.log(step, loss=1.0)
            run.save(step)
        return start

    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    assert go_on(first, resume=False) == 0 and go_on(first) == 4
    before = Path("runs/toy/staged/ar.pt").read_bytes()
    capsys.readouterr()
    assert go_on(second) == 0
    assert "starting anew" in capsys.readouterr().out
    assert Path("runs/toy/staged/ar-of-another-staged.pt").read_bytes() == before
    kept = torch.load("runs/toy/staged/ar.pt", weights_only=True)["state"]["tokenizer"]
    assert same_state(dict(kept), dict(second.state_dict()))


def test_classes_travel_with_the_checkpoint(toy):
    run = common.Run(toy.Config(name="named", steps=1), classes=["cat", np.str_("dog")])
    start = run.restore(model=nn.Linear(1, 1))
    for step in run.steps(start):
        run.save(step)
    found = common.read_checkpoint("runs/toy/named/last.pt", "toy")
    assert common.class_names(found, 2) == ["cat", "dog"]
    torch.save({key: value for key, value in found.items() if key != "classes"}, "runs/toy/named/last.pt")
    assert common.class_names(common.read_checkpoint("runs/toy/named/last.pt", "toy"), 2) == ["class 0", "class 1"]


def test_one_other_bit_makes_a_module_differ():
    net = nn.Linear(2, 2)
    state = copy.deepcopy(net.state_dict())
    assert not common.differs(net, state)
    state["bias"][1] += 1
    assert common.differs(net, state) and common.differs(net, {"bias": state["bias"]}) and common.differs(net, None)


def test_stages_run_in_order_and_miss_each_other(toy):
    cfg, seen = toy.Config(name="staged"), []
    cfg.stage = "all"
    stages = {name: lambda cfg, name=name: seen.append(name) for name in ("ae", "dit")}
    assert common.run_stages(cfg, stages) == Path("runs/toy/staged/dit.pt") and seen == ["ae", "dit"]
    cfg.stage = "ae"
    assert common.run_stages(cfg, stages).name == "ae.pt" and seen == ["ae", "dit", "ae"]
    with pytest.raises(common.UserError, match="python toy.py --preset demo --name staged --stage ae` makes it"):
        common.require_stage(cfg, "ae")
    cfg.sample, cfg.out = "runs/toy/staged/last.pt", ""
    assert common.sample_folder(cfg) == Path("runs/toy/staged/samples")
    cfg.out = "elsewhere"
    assert common.sample_folder(cfg) == Path("elsewhere")


# --- Weights from files --------------------------------------------------------

def safetensors(tensors):
    """The bytes of a .safetensors file, from its specification."""
    kinds = {torch.float32: "F32", torch.int64: "I64", torch.bfloat16: "BF16"}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_read_weights_of_every_kind(tmp_path):
    tensors = {"a.weight": torch.randn(3, 2), "b": torch.arange(4), "half": torch.randn(5).bfloat16(), "none": torch.zeros(0, 2),
               "one": torch.tensor(2.5)}
    (tmp_path / "x.safetensors").write_bytes(safetensors(tensors))
    torch.save(tensors, tmp_path / "x.bin")
    torch.save({"state_dict": tensors}, tmp_path / "x.pt")
    plain = {name: tensor for name, tensor in tensors.items() if tensor.dtype != torch.bfloat16}
    np.savez(tmp_path / "x.npz", **{name: tensor.numpy() for name, tensor in plain.items()})
    for ending, wanted in ((".safetensors", tensors), (".bin", tensors), (".pt", tensors), (".npz", plain)):
        found = common.read_weights(tmp_path / f"x{ending}")
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())
        assert all(found[name].dtype == value.dtype for name, value in wanted.items())


def test_read_weights_of_shards_and_folders(tmp_path):
    parts = [{"a": torch.ones(2)}, {"b": torch.zeros(3)}]
    for i, part in enumerate(parts):
        (tmp_path / f"model-{i}.safetensors").write_bytes(safetensors(part))
    index = {"weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert sorted(common.read_weights(path)) == ["a", "b"]
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(common.UserError, match="index.json: cannot be read as weights"):
        common.read_weights(tmp_path)


class Marks:
    """Whoever unpickles it leaves a mark: what a hostile file could do."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


def test_a_checkpoint_whose_loading_would_run_code_is_refused(run, tmp_path):
    """By every door: --resume, --sample and a judge in the cache. What the file would do is left undone."""
    run("--steps", 4)
    path, mark = Path("runs/toy/demo/last.pt"), tmp_path / "mark"
    torch.save(saved() | {"sums": {"loss": Marks(mark)}}, path)
    with open(path, "rb") as file:                              # the mark is real: a careless reader leaves it
        torch.load(file, weights_only=False)["sums"]["loss"].close()
    assert mark.exists()
    mark.unlink()
    for words in (("--resume", "--steps", 8), ("--sample", path)):
        code, _, err = run(*words)
        assert code == 2 and is_one_line(err) and "last.pt: not a checkpoint" in err, err
    assert not mark.exists()


def test_a_judge_whose_loading_would_run_code_is_trained_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "tqdm", lambda steps, *_, **__: list(steps)[:3])
    first = common.judge(Stripes(), "ruler").state_dict()
    (path,) = Path("runs/judges").iterdir()
    torch.save({**first, "more": Marks("mark")}, path)
    assert same_state(common.judge(Stripes(), "ruler").state_dict(), first) and not Path("mark").exists()
    assert "training it anew" in capsys.readouterr().out


def test_what_is_no_weights_is_one_line(tmp_path):
    """Among others a file whose loading would run code: it leaves no mark."""
    class Marks:
        def __reduce__(self):
            return Path.touch, (tmp_path / "marked",)

    torch.save({"a": Marks()}, tmp_path / "code.bin")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "text.txt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    np.savez(tmp_path / "empty.npz")
    for name in ("code.bin", "text.safetensors", "text.txt", "list.pt", "empty.npz", "none.pt"):
        with pytest.raises(common.UserError, match=name):
            common.read_weights(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(common.UserError, match="holds no weights"):
        common.read_weights(tmp_path / "folder")
    assert not (tmp_path / "marked").exists()


class Noisy(nn.Module):
    """Dropout and BatchNorm: what a network saved in training mode would go on drawing and moving."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.conv(x)))


def test_a_teacher_in_training_mode_is_frozen(tmp_path):
    path = str(tmp_path / "teacher.pt")
    torch.jit.script(Noisy().train()).save(path)
    features, x = common.load_teacher(path, 3, 8), torch.randn(2, 3, 8, 8, requires_grad=True)
    first = features(x)
    assert first.shape == (2, 5, 4, 4) and torch.equal(first, features(x)) and torch.equal(first, features(x))
    first.sum().backward()
    assert x.grad is not None, "losses reach the pictures through it"


@pytest.mark.parametrize("last", [nn.Dropout(0.5), nn.BatchNorm2d(5)])
def test_a_teacher_exported_in_training_mode_is_refused(last, tmp_path):
    """An exported graph has no switch: a picture's features must be the same alone and beside another."""
    network, path = nn.Sequential(nn.Conv2d(3, 5, 4, 4), last), str(tmp_path / "teacher.pt2")
    for mode in (True, False):
        graph = torch.export.export(network.train(mode), (torch.randn(4, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("B")},))
        torch.export.save(graph, path)
        if mode:
            with pytest.raises(common.UserError, match="teacher.pt2: an image's features change with the call; export it after .eval()"):
                common.load_teacher(path, 3, 8)
        else:
            features, x = common.load_teacher(path, 3, 8), torch.randn(3, 3, 8, 8)
            assert torch.allclose(features(x)[:1], features(x[:1]), atol=1e-5)


def test_teachers_that_cannot_serve_are_one_line(tmp_path):
    class Tokens(nn.Module):
        def forward(self, x):
            return x.flatten(2).transpose(1, 2)

    class Single(nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3))

    path = str(tmp_path / "tokens.pt")
    torch.jit.trace(Tokens(), torch.zeros(1, 3, 8, 8)).save(path)
    assert common.load_teacher(path, 3, 8)(torch.zeros(2, 3, 8, 8)).shape == (2, 3, 8, 8)
    torch.jit.script(Single()).save(tmp_path / "single.pt")
    torch.export.save(torch.export.export(Noisy().eval(), (torch.zeros(3, 3, 8, 8),)), tmp_path / "fixed.pt2")
    (tmp_path / "bytes.pt").write_bytes(b"no")
    for name, said in (("single.pt", "gives"), ("fixed.pt2", "one or two pictures"), ("bytes.pt", "cannot be read"), ("none.pt2", "cannot be read")):
        with pytest.raises(common.UserError, match=said) as stop:
            common.load_teacher(str(tmp_path / name), 3, 8)
        assert "\n" not in str(stop.value) and name in str(stop.value)


# --- Sampling of tokens --------------------------------------------------------

def test_filter_logits_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    kept = [torch.isfinite(row).nonzero()[:, 0].tolist() for row in common.filter_logits(p.log(), top_p=0.75)]
    assert kept == [[0, 1], [1, 2, 3]]
    kept = [torch.isfinite(row).nonzero()[:, 0].tolist() for row in common.filter_logits(p.log(), top_k=2)]
    assert kept == [[0, 1], [2, 3]]
    assert torch.isfinite(common.filter_logits(p.log(), top_p=1e-9)).sum(1).tolist() == [1, 1]
    warm = common.filter_logits(p.log(), temperature=2.0).softmax(1)
    assert torch.allclose(warm, p.sqrt() / p.sqrt().sum(1, keepdim=True))


def test_invert_distribution_by_hand():
    logits = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log().expand(6, 3)
    u = torch.tensor([0.0, 0.199, 0.201, 0.699, 0.701, 0.9999])
    assert common.invert_distribution(logits, u).tolist() == [0, 0, 1, 1, 2, 2]


def test_blocks_are_the_whole():
    x, y = torch.randn(7, 2), torch.randn(7, 2)
    assert torch.equal(common.in_blocks(torch.add, torch.device("cpu"), x, y, size=3), x + y)


@pytest.mark.parametrize("text, labels", [("all", [0, 1, 2, 3]), ("2", [2]), ("3,0,3", [3, 0, 3])])
def test_parse_classes(text, labels):
    assert common.parse_classes(text, 4) == labels


@pytest.mark.parametrize("text", ["", "4", "1,", "-1", "a", "all,1", "²"])
def test_classes_that_are_none(text):
    with pytest.raises(common.UserError, match="--classes"):
        common.parse_classes(text, 4)


# --- Exports, pictures of columns, measures ------------------------------------

def test_export_images_both_ways(tmp_path):
    x = torch.rand(5, 3, 4, 6) * 2 - 1
    wanted = common.to_uint8(x).permute(0, 2, 3, 1).numpy()
    common.export_images(tmp_path / "x.npz", x.split(2), 5)
    with np.load(tmp_path / "x.npz") as file:
        assert file.files == ["arr_0"] and file["arr_0"].dtype == np.uint8 and (file["arr_0"] == wanted).all()
    common.export_images(tmp_path / "folder", x[:, :1].split(2), 5)
    names = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert names == [f"{i:06}.png" for i in range(5)]
    assert (decode(tmp_path / "folder/000003.png")[0][0] == wanted[3, :, :, :1]).all()
    before = {path: path.read_bytes() for path in (tmp_path / "folder").iterdir()}
    with pytest.raises(common.UserError, match="holds pictures already"):       # five old ones beside two new ones
        common.export_images(tmp_path / "folder", x[:2].split(2), 2)
    assert before == {path: path.read_bytes() for path in (tmp_path / "folder").iterdir()}
    common.export_images(tmp_path / "x.npz", x[:2].split(2), 2)                 # a file is replaced whole
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (2, 4, 6, 3)
    for place in ("x.npz/y", "x.npz/y.npz"):
        with pytest.raises(OSError):                                            # which launch turns into one line and 2
            common.export_images(tmp_path / place, iter([]), 0)


def test_columns_and_prefixes(tmp_path):
    x = [torch.full((2, 3, side, side), -0.5) for side in (2, 3, 6)]
    common.columns_png(tmp_path / "x.png", x, side=6)
    (picture,), _ = decode(tmp_path / "x.png")
    assert [(picture == 64).all(-1)[:, 2 + 8 * i:8 + 8 * i].sum() for i in range(3)] == [8, 18, 72]
    asked = []
    common.prefixes_png(tmp_path / "y.png", lambda ids: asked.append(ids.shape[1]) or x[ids.shape[1] - 1], torch.zeros(2, 3, dtype=int),
                        [1, 3], ["a", "b"], lambda k, images: f"k={k} {images.shape[-1]}px", [("real", lambda last: last)])
    assert asked == [1, 3]


def test_measure_samples_needs_more_images_than_features():
    class Ruler(nn.Module):
        def features(self, x):
            return x.flatten(1)

        def forward(self, x):
            return x.flatten(1)[:, :2]

    class Test:
        def __len__(self):
            return 200

        def pixels(self, rows):
            return torch.from_numpy(np.random.default_rng(0).normal(size=(200, 1, 8, 8)))[rows].float()

    x = torch.randn(80, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = x.flatten(1)[:, :2].argmax(1)
    few, many = common.measure_samples(x[:64], labels[:64], Ruler(), Test()), common.measure_samples(x, labels, Ruler(), Test())
    assert few == {"N": 64, "accuracy": 1.0, "distance": None, "floor": None}
    real = Test().pixels(np.arange(160)).flatten(1)
    assert many["N"] == 80 and many["accuracy"] == 1.0
    assert many["distance"] == pytest.approx(common.frechet(x.flatten(1), real[:80]), rel=1e-9)
    assert many["floor"] == pytest.approx(common.frechet(real[80:], real[:80]), rel=1e-9) and many["floor"] > 0
    more = torch.randn(120, 1, 8, 8, generator=torch.Generator().manual_seed(2))           # more than half of the test images:
    found = common.measure_samples(more, torch.zeros(120), Ruler(), Test())                 # the first of them count
    assert found["N"] == 100 and found["distance"] == pytest.approx(
        common.frechet(more[:100].flatten(1), Test().pixels(np.arange(100)).flatten(1)), rel=1e-9)


def test_flops_of_attention_and_grouped_convolutions():
    q = torch.randn(2, 3, 5, 4, requires_grad=True)
    attention = 2 * 2 * 2 * 3 * 5 * 5 * 4                                       # q k^T and P v, a multiply-add counts 2
    assert common.flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == attention
    x = torch.randn(2, 6, 8, 8, requires_grad=True)
    for groups, transposed in ((1, False), (3, False), (6, False), (3, True)):
        layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(6, 6, 3, 1, 1, groups=groups)
        once = 2 * 2 * 8 * 8 * 6 * (6 // groups) * 9
        assert common.flops(lambda layer=layer: layer(x)) == once
        assert common.flops(lambda layer=layer: layer(x).sum().backward()) == 3 * once, (groups, transposed)


def test_a_judge_cut_short_is_trained_anew_aloud(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "tqdm", lambda steps, *_, **__: list(steps)[:3])
    first = common.judge(Stripes(), "ruler")
    (path,) = Path("runs/judges").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    again = common.judge(Stripes(), "ruler")
    assert "training it anew" in capsys.readouterr().out and same_state(first.state_dict(), again.state_dict())
    assert common.judge(Stripes(), "ruler").state_dict().keys() == first.state_dict().keys()


def test_the_judge_trains_on_one_thread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = []
    monkeypatch.setattr(common, "tqdm", lambda steps, *_, **__: threads.append(torch.get_num_threads()) or [0])
    torch.set_num_threads(2)
    try:
        common.judge(Stripes(), "ruler")
        assert threads == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


# --- Large runs ----------------------------------------------------------------

def test_noise_in_shards_is_the_same_for_any_number_of_ranks(monkeypatch):
    """Every 64 samples have their own generator; the first 64 are what one generator of that name gives."""
    shape, where = (160, 3), torch.device("cpu")
    alone = common.shard_noise(shape, 1, 2, "noise", where)
    assert torch.equal(alone[:64], torch.randn(64, 3, generator=common.make_generator(1, 2, "noise")))
    assert torch.equal(alone[64:128], torch.randn(64, 3, generator=common.make_generator(1, 2, "noise 1")))
    assert torch.equal(alone[128:], torch.randn(32, 3, generator=common.make_generator(1, 2, "noise 2")))
    for ranks in (2, 5, 8):
        monkeypatch.setattr(common, "world", lambda ranks=ranks: ranks)
        parts = []
        for r in range(ranks):
            monkeypatch.setattr(common, "rank", lambda r=r: r)
            drawn, original = [], torch.randn
            with monkeypatch.context() as patch:
                patch.setattr(torch, "randn", lambda size, **kw: drawn.append(size[0]) or original(size, **kw))
                parts.append(common.shard_noise(shape, 1, 2, "noise", where))
            assert sum(drawn) <= 160 // ranks + 127, "a rank draws only the shards that it needs"
        assert torch.equal(torch.cat(parts), alone)
    monkeypatch.undo()
    pair = common.shard_noise((2, 100, 3), 1, 2, "noise", where, axis=1)
    assert torch.equal(pair[:, :64], torch.randn(2, 64, 3, generator=common.make_generator(1, 2, "noise")))


def test_parts_of_a_batch():
    batch = (torch.arange(6), {"x": torch.arange(12).view(6, 2), "n": 3, "t": torch.tensor(1.5), "none": None})
    found = list(common.in_parts(3, *batch))
    assert len(found) == 3 and [part[0].tolist() for part in found] == [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(torch.cat([part[1]["x"] for part in found]), batch[1]["x"])
    assert all(part[1]["n"] == 3 and part[1]["t"] == 1.5 and part[1]["none"] is None for part in found)


def test_reading_ahead_reads_each_step_once_and_one_step_before():
    asked = []

    def read(step):
        asked.append(step)
        return step * step

    assert common.read_ahead(read, torch.device("cpu"), 9) is read
    fetch = common.read_ahead(read, torch.device("cuda"), 7)
    assert [fetch(step) for step in range(3, 7)] == [9, 16, 25, 36] and asked == [3, 4, 5, 6]


def test_what_reading_ahead_raises_is_raised_where_it_is_wanted():
    def read(step):
        raise common.UserError(f"step {step} cannot be read")

    with pytest.raises(common.UserError, match="step 3"):
        common.read_ahead(read, torch.device("cuda"), 7)(3)


def ranks(monkeypatch, count, run):
    """run() in `count` threads that take themselves for ranks and exchange objects as torch.distributed would."""
    place = threading.local()
    desk = [None] * count
    gate = threading.Barrier(count, timeout=20)

    def all_gather(found, mine):
        desk[place.rank] = mine
        gate.wait()
        found[:] = desk
        gate.wait()

    def worker(number):
        place.rank = number
        return run()

    monkeypatch.setattr(common, "world", lambda: count)
    monkeypatch.setattr(common, "rank", lambda: place.rank)
    monkeypatch.setattr(common, "barrier", lambda: gate.wait() if count > 1 else None)
    monkeypatch.setattr(common.dist, "all_gather_object", all_gather)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(worker, range(count)))


@pytest.mark.parametrize("count", (1, 2, 3))
def test_blocks_are_shared_out_and_come_in_order_on_all_ranks(monkeypatch, count):
    made = []

    def make(first, last):
        made.append((first, last))
        return torch.arange(first, last)

    for found in ranks(monkeypatch, count, lambda: list(common.share_blocks(make, 11, 3, 1))):
        assert [block.tolist() for block in found] == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10]]
    assert sorted(made) == [(1, 4), (4, 7), (7, 10), (10, 11)], "each block once"


def test_stored_rows_are_made_once_and_go_on_where_they_were_cut(tmp_path, monkeypatch):
    path = tmp_path / "rows.npy"
    asked = []

    def make(first, last):
        asked.append(first)
        if first == cut:
            raise KeyboardInterrupt
        return torch.stack([torch.arange(first, last), torch.arange(first, last) ** 2], 1)

    want = np.stack([np.arange(10), np.arange(10) ** 2], 1)
    cut = 6
    with pytest.raises(KeyboardInterrupt):
        common.stored_rows(path, make, 10, "a", 3)
    cut = None
    found = common.stored_rows(path, make, 10, "a", 3)
    assert isinstance(found, np.memmap) and np.array_equal(found, want) and asked == [0, 3, 6, 6, 9]
    assert np.array_equal(common.stored_rows(path, make, 10, "a", 3), want) and len(asked) == 5, "nothing again"
    assert np.array_equal(common.stored_rows(path, make, 10, "b", 5), want) and asked[5:] == [0, 5], "another recipe"
    Path(f"{path}.json").write_text("{")
    assert np.array_equal(common.stored_rows(path, make, 10, "b", 5), want) and asked[7:] == [0, 5], "a damaged note"
    assert len(common.stored_rows(path, make, 8, "b", 5)) == 8 and asked[9:] == [0, 5], "another count"
    cut = 0
    with pytest.raises(KeyboardInterrupt):
        common.stored_rows(path, make, 8, "c", 5)
    cut = None
    assert len(common.stored_rows(path, make, 8, "b", 5)) == 8 and asked[12:] == [0, 5], "what c began is not b's"
    shared = tmp_path / "shared.npy"
    for found in ranks(monkeypatch, 2, lambda: common.stored_rows(shared, make, 10, "a", 3)):
        assert np.array_equal(found, want)
    assert sorted(asked[14:]) == [0, 3, 6, 9], "the ranks share the work"


def test_a_fingerprint_is_of_every_bit_and_name():
    net = nn.Linear(3, 2)
    first = common.fingerprint(net)
    assert first == common.fingerprint(copy.deepcopy(net)) != common.fingerprint(nn.Sequential(net))
    with torch.no_grad():
        net.bias[1] += 1e-3
    assert common.fingerprint(net) != first


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    """One step of Muon by hand: the update has singular values near 1, times .2 sqrt(larger side), times lr."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)), "out": nn.Linear(4, 2)})
    twin = copy.deepcopy(net)

    def optimizer(net):
        groups = [{"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": 0.0},
                  {"params": [p for p in net.parameters() if p.ndim == 1], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1.0)

    plain = optimizer(twin)
    assert common.with_muon(plain, twin["blocks"], 0) is plain
    opt = common.with_muon(optimizer(net), net["blocks"], 3)
    for network, chosen in ((net, opt), (twin, plain)):
        for p in network.parameters():
            p.grad = torch.linspace(-1, 2, p.numel()).view_as(p).sin()
        common.set_learning_rate(chosen, 1e-2)
        chosen.step()
    matrices = [p for p in net["blocks"].parameters() if p.ndim == 2]
    assert torch.equal(net["out"].weight, twin["out"].weight)
    assert torch.equal(net["blocks"][0].bias, twin["blocks"][0].bias)
    torch.manual_seed(0)
    start = nn.Linear(6, 4).weight
    step = (start - matrices[0]) / (3e-2 * 0.2 * 6 ** 0.5)
    values = torch.linalg.svdvals(step)
    assert values[0] < 1.3 and (values[:2] > 0.6).all() and [len(g["params"]) for g in opt.param_groups] == [1, 3, 2]
    other = copy.deepcopy(net)
    again = common.with_muon(optimizer(other), other["blocks"], 3)
    again.load_state_dict(opt.state_dict())
    assert len(again.state_dict()["muon"]["state"]) == 2
    common.set_learning_rate(again, 5e-3)
    assert [group["lr"] for group in again.param_groups] == [5e-3, 5e-3, 1.5e-2]
    again.zero_grad()


def test_muon_of_stacked_matrices_is_torchs():
    """Wide, tall and square matrices, one without a gradient: the weights of torch's own Muon, a matrix at a time."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in [(4, 6), (6, 4), (5, 5), (4, 6), (5, 5), (3, 2)]]
    options = dict(lr=0.1, weight_decay=0.5, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    results = []
    for kind in (torch.optim.Muon, common.Muon):
        matrices = [nn.Parameter(value.clone()) for value in start]
        opt = kind(matrices, **options)
        for step in range(4):
            for i, p in enumerate(matrices[:-1]):
                p.grad = torch.linspace(-1, 2 + step, p.numel()).view_as(p).sin() * (1 + i)
            opt.step()
        results.append(matrices)
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)
    assert torch.equal(results[1][-1], start[-1]) and (results[1][0] - start[0]).abs().max() > 0.1


def test_gradients_in_buckets(toy):
    """Two processes, buckets of every size, parameters of two types, one unused: the mean, in every case."""
    Path("buckets.py").write_text("""
import os, sys
sys.path.insert(0, os.environ["ROOT"])
import common
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
for size in (1, 5, 8, 1000):
    params = [torch.nn.Parameter(torch.zeros(n, dtype=kind)) for n in (3, 4, 5) for kind in (torch.float32, torch.float64)]
    params.append(torch.nn.Parameter(torch.zeros(2)))
    for i, p in enumerate(params[:-1]):
        p.grad = torch.full_like(p, float(i + 1)) * (1 + 2 * common.rank())
    common.average_gradients(params, size)
    assert params[-1].grad is None
    assert all((p.grad == 2 * (i + 1)).all() for i, p in enumerate(params[:-1])), size
print("fine")
dist.destroy_process_group()
""")
    ports = dict(MASTER_ADDR="localhost", MASTER_PORT=str(20000 + os.getpid() % 20000), WORLD_SIZE="2", ROOT=str(ROOT))
    workers = [command("buckets.py", env=ports | {"RANK": str(rank)}) for rank in range(2)]
    for worker in workers:
        out, err = worker.communicate(timeout=90)
        assert worker.returncode == 0 and out.strip() == "fine", err


def test_init_takes_the_averaged_weights_but_tables_of_classes(toy, capsys):
    def net(classes, width=3):
        return nn.ModuleDict({"body": nn.Linear(width, 3), "label": nn.Embedding(classes, 3)})

    first = net(4)
    run = common.Run(toy.Config(name="first", steps=1))
    for step in run.steps(run.restore(model=net(4), ema=first)):
        run.save(step)
    cfg = toy.Config(name="second")
    cfg.init = ""
    run = common.Run(cfg)
    same, other = net(4), net(7)
    untouched = copy.deepcopy(same.state_dict())
    common.load_init(run, same)
    cfg.init = "runs/toy/first/last.pt"
    cfg.resume = True
    run.checkpoint.touch()
    common.load_init(run, same)
    assert all(torch.equal(value, untouched[key]) for key, value in same.state_dict().items()), "resume wins"
    run.checkpoint.unlink()                                     # a later stage of a resumed run begins with --init
    table = other["label"].weight.detach().clone()
    common.load_init(run, same, new=("label.weight",))
    common.load_init(run, other, new=("label.weight",))
    assert capsys.readouterr().out.count("begins with the averaged weights of runs/toy/first/last.pt\n") == 2
    assert torch.equal(same["label"].weight, first["label"].weight), "the averaged weights"
    assert torch.equal(other["body"].weight, first["body"].weight) and torch.equal(other["label"].weight, table)
    with torch.device("meta"):
        meta = net(7)
    assert common.init_state(cfg, meta, new=("label.weight",))["body.weight"].shape == (3, 3)
    for model, name, said in ((net(7), "ema", r"label.weight is \[4, 3\] there and \[7, 3\] here"),
                              (net(4, 5), "ema", r"body.weight is \[3, 3\] there and \[3, 5\] here"),
                              (nn.Linear(3, 3), "ema", "weight is nothing there"), (same, "gpt", "has no gpt")):
        with pytest.raises(common.UserError, match=said):
            common.init_state(cfg, model, name)
