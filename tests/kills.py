"""python -m tests.kills [METHOD ...] [--kills 50] [--seed 0]    training that is killed again and again ends the same

For each method an undisturbed run of its tiny configuration, then runs that SIGKILL ends at random moments, in the
middle of a step or of a write, and that --resume goes on with. Every one must resume, and the weights, averages,
optimizer and log at its end must be those of the undisturbed run, bit for bit. Not part of CI: a kill costs
about a second of one core. Exit code 1 where anything differs.
"""

import argparse
import contextlib
import functools
import importlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import common
import data
from tests.tiny import TINY, argv

import torch

STEPS = 24                                  # of each stage; every one is logged and saved
PATIENCE = 300                              # seconds that one life may take


def draw_once(method):
    """Make the data sets in this process, so that the lives, which are its children, find them made."""
    module = importlib.import_module(method)
    for name in ("open_data", "translation_pairs"):
        setattr(data, name, functools.cache(getattr(data, name)))
    cfg = common.cli(module.Config, module.PRESETS, module.__doc__, words_of(method, "whole"))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        module.prepare(cfg)


def live(method, words):
    """Start the method's command line in a child process, which has torch already; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        out = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        module = importlib.import_module(method)
        cfg = common.cli(module.Config, module.PRESETS, module.__doc__, words)
        common.launch(module.main, cfg, module.check, module.prepare)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:                   # a bug: its traceback goes to said.txt, its code to the parent
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)


def wait(child, seconds):
    """A child's exit code, or None where it was still alive after so many seconds and has been killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return None if code == -signal.SIGKILL else code


def words_of(method, name):
    """The command line of a run, or of its next life where it has left a configuration."""
    if Path("runs", method, name, "config.json").exists():
        return ["--resume", "--name", name]
    return argv(method, name=name, steps=STEPS, log=1, save=1)


def finished(method, name):
    """({file: its tensors and numbers by name}, log lines without clock and memory) of a run."""
    from tests.test_runs import checkpoints, log_lines, tensors  # its fixtures want pytest
    states = {file: tensors(saved["state"]) | {"step": saved["step"]} for file, saved in checkpoints(method, name).items()}
    return states, log_lines(method, name)


def difference(one, other):
    """The first thing in which two finished runs differ, in words; "" if none."""
    (states, log), (expected, expected_log) = one, other
    if states.keys() != expected.keys():
        return f"checkpoints {sorted(states)}, not {sorted(expected)}"
    for file, wanted in expected.items():
        if states[file].keys() != wanted.keys():
            return f"{file}: other names"
        for name, value in wanted.items():
            found = states[file][name]
            same = torch.equal(found, value) if torch.is_tensor(value) else found == value
            if not same:
                return f"{file}{name}"
    return "" if log == expected_log else "the log"


def torture(method, kills, seed):
    """Kill runs of a method `kills` times in all. Returns (runs that reached their end, kills by phase, first failure)."""
    torch.set_num_threads(1)
    draw_once(method)
    start = time.monotonic()
    code = wait(live(method, words_of(method, "whole")), PATIENCE)
    if code != 0:
        return 0, {}, f"undisturbed: exit code {code}: {Path('said.txt').read_text()[-500:]}"
    whole = time.monotonic() - start
    expected = finished(method, "whole")
    chance = random.Random(f"{seed}/{method}")
    phases = {"before its first checkpoint": 0, "in training": 0, "in a write": 0}
    runs = done = 0
    while done < kills:
        name = f"killed-{runs}"
        # Any moment of an undisturbed run; most lives end before it does, and some in the middle of a write.
        code = wait(live(method, words_of(method, name)), chance.uniform(0, whole))
        folder = Path("runs", method, name)
        if code is None:
            done += 1
            left_over = list(folder.glob("*.tmp"))
            begun = list(folder.glob("*.pt"))
            phases["in a write" if left_over else "in training" if begun else "before its first checkpoint"] += 1
        elif code != 0:
            return runs, phases, f"life {done + runs + 1}: exit code {code}: {Path('said.txt').read_text()[-500:]}"
        if code == 0 or done == kills:
            code = wait(live(method, words_of(method, name)), PATIENCE)             # a finished run shows its result
            if code != 0:
                return runs, phases, f"the last life: exit code {code}: {Path('said.txt').read_text()[-500:]}"
            runs += 1
            found = difference(finished(method, name), expected)
            if found:
                return runs, phases, f"{name} differs from the undisturbed run in {found}"
    return runs, phases, ""


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=[], metavar="METHOD", help=", ".join(TINY))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    failed = False
    print(f"{'method':12}{'kills':>6}{'before its first checkpoint':>29}{'in training':>13}{'in a write':>12}{'runs':>6}{'s':>6}")
    for method in given.methods or TINY:
        here = os.getcwd()
        with tempfile.TemporaryDirectory() as where:
            os.chdir(where)
            try:
                clock = time.monotonic()
                runs, phases, failure = torture(method, given.kills, given.seed)
            finally:
                os.chdir(here)
        cells = "".join(f"{count:>{width}}" for count, width in zip(phases.values(), (29, 13, 12)))
        print(f"{method:12}{sum(phases.values()):>6}{cells}{runs:>6}{time.monotonic() - clock:6.0f}  "
              f"{failure or 'all resumed, bitwise equal'}", flush=True)
        failed = failed or bool(failure)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
