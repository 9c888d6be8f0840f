"""What every method promises of its runs: exact resume, harmless observation, 1 = 2 processes, compile, commands."""

import importlib
import json
import re
import shlex
import signal
from pathlib import Path

import common
from tests import ROOT
from tests.tiny import TINY, argv

import pytest
import torch

METHODS = list(TINY)


def run(method, words):
    """The method's command line in this process."""
    module = importlib.import_module(method)
    cfg = common.cli(module.Config, module.PRESETS, module.__doc__, words)
    common.launch(module.main, cfg, module.check, module.prepare)


def checkpoints(method, name):
    """{file name: saved} of a run's newest checkpoints."""
    found = sorted((Path("runs") / method / name).glob("*.pt"))
    return {path.name: torch.load(path, weights_only=True) for path in found if not re.search(r"-\d+\.pt$", path.name)}


def tensors(thing, path=""):
    """Every tensor and number in nested containers: {path: value}."""
    if isinstance(thing, dict):
        return {k: v for key, part in thing.items() for k, v in tensors(part, f"{path}/{key}").items()}
    if isinstance(thing, (list, tuple)):
        return {k: v for i, part in enumerate(thing) for k, v in tensors(part, f"{path}/{i}").items()}
    return {path: thing}


def assert_same(a, b, atol=0.0):
    """Two checkpoints' states agree, bitwise unless atol is given."""
    a, b = tensors(a["state"]), tensors(b["state"])
    assert a.keys() == b.keys()
    for path, value in a.items():
        if torch.is_tensor(value) and value.is_floating_point():
            assert torch.equal(value, b[path]) if not atol else (value - b[path]).abs().max() <= atol, path
        elif not atol:
            assert (value == b[path]).all() if torch.is_tensor(value) else value == b[path], path


def log_lines(method, name):
    """The log without the clock and the memory."""
    lines = [json.loads(line) for path in sorted((Path("runs") / method / name).glob("log*.jsonl"))
             for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "memory")} for line in lines]


@pytest.fixture(scope="module", params=METHODS)
def whole(request, tmp_path_factory):
    """(method, folder) of one uninterrupted tiny run called 'whole'."""
    where = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        run(request.param, argv(request.param, name="whole"))
    return request.param, where


@pytest.mark.parametrize("cut", [0, 2, 3])
def test_resume_is_bitwise_exact(whole, cut, monkeypatch):
    method, where = whole
    monkeypatch.chdir(where)
    original = common.Run.log

    def interrupted(self, step, **values):
        if step == cut:
            signal.raise_signal(signal.SIGTERM)
        original(self, step, **values)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log", interrupted)
        with pytest.raises(SystemExit) as stop:
            run(method, argv(method, name=f"cut{cut}"))
    assert stop.value.code == 128 + signal.SIGTERM
    assert cut + 1 in [saved["step"] for saved in checkpoints(method, f"cut{cut}").values()]
    run(method, ["--resume", "--name", f"cut{cut}"])
    resumed, expected = checkpoints(method, f"cut{cut}"), checkpoints(method, "whole")
    assert resumed.keys() == expected.keys()
    for name in expected:
        assert_same(resumed[name], expected[name])
    assert log_lines(method, f"cut{cut}") == log_lines(method, "whole")


def test_a_finished_run_resumes_to_its_result(whole, monkeypatch, capsys):
    method, where = whole
    monkeypatch.chdir(where)
    before = {path: path.read_bytes() for path in Path(f"runs/{method}/whole").glob("*.pt")}
    run(method, ["--resume", "--name", "whole"])
    assert before == {path: path.read_bytes() for path in Path(f"runs/{method}/whole").glob("*.pt")}
    assert capsys.readouterr().out


def test_observing_changes_nothing(whole, monkeypatch):
    method, where = whole
    monkeypatch.chdir(where)
    run(method, argv(method, name="watched", log=1, save=1))
    for name, saved in checkpoints(method, "watched").items():
        assert_same(saved, checkpoints(method, "whole")[name])


def test_another_seed_changes_everything(whole, monkeypatch):
    method, where = whole
    monkeypatch.chdir(where)
    run(method, argv(method, name="seeded", seed=1))
    pairs = zip(checkpoints(method, "seeded").values(), checkpoints(method, "whole").values())
    with pytest.raises(AssertionError):
        for ours, theirs in pairs:
            assert_same(ours, theirs)


def test_one_process_equals_two_in_float64(whole, background, monkeypatch):
    method, _ = whole
    where, said = background[method]
    monkeypatch.chdir(where)
    torch.set_default_dtype(torch.float64)
    try:
        run(method, argv(method, name="one"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert "2 processes share the CPU" in said.result()
    for name, saved in checkpoints(method, "two").items():
        assert_same(saved, checkpoints(method, "one")[name], atol=1e-12)


def test_ctrl_c_with_two_processes(background, monkeypatch):
    where, done = background["ctrl-c"]
    code, out, err = done.result()
    assert code == 130 and "Traceback" not in err and "go on with --resume" in out, (out, err)
    monkeypatch.chdir(where)
    assert checkpoints("arflow", "stopped")["last.pt"]["step"] >= 4


@pytest.mark.parametrize("method", [method for method in METHODS if method != "slimfit"])      # it refuses --compile
def test_compile_changes_no_number_and_compiles(method, tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: setattr(
        self, "_compiled_call_impl", torch.compile(self._call_impl, backend="eager")))
    torch._dynamo.utils.counters.clear()
    run(method, argv(method, steps=2, save=2, name="compiled", compile=True))
    assert sum(torch._dynamo.utils.counters["frames"].values()) > 0
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    run(method, argv(method, steps=2, save=2, name="plain"))
    for name, saved in checkpoints(method, "compiled").items():
        assert_same(saved, checkpoints(method, "plain")[name], atol=1e-5)


COMMAND = re.compile(r"^\s*(?:Run:\s+)?(?:\.venv/bin/)?python (\w+)\.py(.*?)(?:   .*|  #.*)?$", re.M)


def commands():
    """Every `python METHOD.py ...` line of the README and of the docstrings of the methods that are here."""
    texts = [("README.md", (ROOT / "README.md").read_text())]
    texts += [(f"{method}.py", importlib.import_module(method).__doc__) for method in METHODS]
    return [(where, method, words.strip()) for where, text in texts for method, words in COMMAND.findall(text)
            if method in METHODS]


@pytest.mark.parametrize("where, method, words", commands())
def test_every_written_command_is_understood(where, method, words, tmp_path, monkeypatch):
    """The command line parses and passes the checks; what it names (a checkpoint, a data file) need not be here."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(method)
    words = shlex.split(words)
    checkpoint = words.pop(words.index("--sample") + 1) if "--sample" in words else ""
    words = [word for word in words if word not in ("--sample", "--resume")]
    cfg = common.cli(module.Config, module.PRESETS, module.__doc__, words)
    cfg.sample = checkpoint
    module.check(cfg)
