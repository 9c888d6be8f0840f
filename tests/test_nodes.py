"""Two nodes under torchrun on this machine's loopback: one loses its worker, and the run goes on from where it was.

Two launchers meet at a c10d rendezvous, as two machines with one shared folder would. Not in the fast set:
python -m pytest -m optional tests/test_nodes.py
"""

import os
import signal
import subprocess
import sys
import time

import arflow
import common
from tests import ROOT
from tests.test_runs import assert_same, checkpoints, run
from tests.tiny import argv

import pytest
import torch

STEPS = 180                                                             # under 200 no ruler is trained
WORDS = argv("arflow", steps=STEPS, save=10, log=10, device="cpu", count=20)


def node(where, port, *words):
    """One of two nodes, a launcher with one worker that computes in float64. The store where they meet is the test's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", str(port), "--rdzv-conf", "is_host=false", "--", str(ROOT / "tests/two.py"), "arflow", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=where, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def meeting_place():
    """A store that outlives both nodes: hosted by one of them, it ends with that one, and the other, a moment later, fails."""
    return torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def workers(launcher):
    """Process ids of a launcher's children, from /proc."""
    children = f"/proc/{launcher.pid}/task/{launcher.pid}/children"
    with open(children) as file:
        return [int(word) for word in file.read().split()]


@pytest.mark.optional
def test_two_nodes_one_loses_its_worker_and_the_run_goes_on(tmp_path, monkeypatch):
    stores = [meeting_place(), meeting_place()]
    first = [node(tmp_path, stores[0].port, *WORDS, "--name", "nodes") for _ in range(2)]
    log = tmp_path / "runs/arflow/nodes/log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 5):
        assert time.monotonic() < deadline and all(launcher.poll() is None for launcher in first), [p.communicate() for p in first]
        time.sleep(0.02)
    for pid in workers(first[1]):
        os.kill(pid, signal.SIGKILL)
    for launcher in first:
        launcher.communicate(timeout=120)
    assert all(launcher.returncode for launcher in first)
    monkeypatch.chdir(tmp_path)
    assert 10 <= checkpoints("arflow", "nodes")["last.pt"]["step"] < STEPS
    second = [node(tmp_path, stores[1].port, "--resume", "--name", "nodes") for _ in range(2)]
    said = [launcher.communicate(timeout=240) for launcher in second]
    assert [launcher.returncode for launcher in second] == [0, 0], said
    assert all(store.num_keys() for store in stores), "both runs met there"
    torch.set_default_dtype(torch.float64)
    try:
        run("arflow", [*WORDS, "--name", "one"])
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(checkpoints("arflow", "nodes")["last.pt"], checkpoints("arflow", "one")["last.pt"], atol=1e-9)
    assert common.read_checkpoint("runs/arflow/nodes/last.pt", arflow.__name__)["step"] == STEPS
