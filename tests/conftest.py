"""What needs more than one process runs beside the other tests, on the second core, from the first test on."""

import functools
import inspect
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from tests import ROOT
from tests.tiny import TINY, argv

import pytest
import torch

torch.set_num_threads(1)
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(number) == signal.SIG_IGN:           # of nohup and of jobs in the background: children would inherit it
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
inspect.getsource = functools.cache(inspect.getsource)       # a command line reads its Config's comments: parse a file once


def launched(words, where, **kwargs):
    """A subprocess of the repository's Python, in an empty folder."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *words], cwd=where, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **kwargs)


def two(method, where):
    """Train in two processes, in float64, in `where`; returns what they printed."""
    process = launched(["-m", "tests.two", method, *argv(method, name="two", gpus=2, device="cpu")], where)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0 and not err, (out, err)
    return out


def ctrl_c(where):
    """Start an endless run in two processes, stop it as a terminal does; returns exit code, stdout, stderr."""
    words = argv("arflow", steps=100_000, log=1, gpus=2, device="cpu", name="stopped")
    process = launched([str(ROOT / "arflow.py"), *words], where, start_new_session=True)
    log = where / "runs/arflow/stopped/log.jsonl"
    deadline = time.monotonic() + 90
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)                               # to every process of the group
    out, err = process.communicate(timeout=90)
    return process.returncode, out, err


@pytest.fixture(scope="session", autouse=True)
def background(request, tmp_path_factory):
    """{method or 'ctrl-c': (folder, future of what it gave)}; empty when no selected test asks for it."""
    if not any("background" in item.function.__code__.co_varnames for item in request.session.items):
        yield {}
        return
    pool, where = ThreadPoolExecutor(1), {name: tmp_path_factory.mktemp(f"{name}-two") for name in [*TINY, "ctrl-c"]}
    yield {name: (folder, pool.submit(ctrl_c, folder) if name == "ctrl-c" else pool.submit(two, name, folder))
           for name, folder in where.items()}
    pool.shutdown(cancel_futures=True)                                  # a run that stops early waits for one at most
