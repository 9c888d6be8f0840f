"""The mechanics of common.py, tried on a toy method: a line through points, in a file of its own."""

import errno
import hashlib
import importlib
import json
import math
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
import zlib
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
    (["--batch", "7", "--gpus", "2"], "multiple of the 2 processes"), (["--calls", "0"], "--calls 0"),
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
    cfg.batch = 8
    assert not common.is_preset(cfg, toy.PRESETS)


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
    assert re.fullmatch(r"runs/toy/demo: cpu \(1 threads\), 2 processes over gloo, fp32, batch 8, 4 parameters, "
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


def test_a_finished_run_prints_its_result(run):
    _, first, _ = run()
    before = Path("runs/toy/demo/last.pt").read_bytes(), Path("runs/toy/demo/log.jsonl").read_text()
    code, out, _ = run("--resume")
    assert code == 0 and out.splitlines()[-1] == first.splitlines()[-1] and "done" in out
    assert before == (Path("runs/toy/demo/last.pt").read_bytes(), Path("runs/toy/demo/log.jsonl").read_text())


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
             (good | {"config": {k: v for k, v in good["config"].items() if k != "calls"}}, "calls"),
             (good | {"config": good["config"] | {"gone": 1}}, "another version of this file (fields gone)"),
             ({"weights": 1}, "not a checkpoint")]
    for content, said in cases:
        torch.save(content, "other.pt")
        code, out, err = run("--sample", "other.pt")
        assert code == 2 and is_one_line(err) and said in err, err
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


def test_judge_of_shapes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ruler = common.judge(data.open_data("shapes", "judge", size=16), "ruler")
    test = data.open_data("shapes", "test", size=16, count=1000)
    x = test.pixels(np.arange(1000))
    assert common.accuracy(ruler, x, test.labels) >= 0.97
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
