"""What runs around the arithmetic: threads beside other work, files in memory, bytes, noise of many ranks, the wait for data.

"before" is written out here as it was; both sides run in turn in one process tree, and ratios are medians of pairs.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import common
import data
import detailflow
from tests import ROOT, tiny

import numpy as np
import torch


def seconds_of_steps(where, name, ours):
    """Seconds of 60 training steps of arflow.py's demo, from its own log, on common.py's threads or on torch's."""
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    if not ours:                                                # as torch does by itself: one a core, spinning
        env |= {"OMP_NUM_THREADS": str(common.processors()), "OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "INFINITY"}
    words = [sys.executable, str(ROOT / "arflow.py"), "--steps", "60", "--log", "60", "--count", "20", "--name", name]
    subprocess.run(words, cwd=where, env=env, check=True, capture_output=True)
    text = (where / "runs/arflow" / name / "log.jsonl").read_text()
    return json.loads(text.splitlines()[-1])["seconds"]


def busy(scale):
    """Beside one busy process a core: torch's own threads against a demo's one, and against the quiet machine."""
    pairs = 3 if scale == "quick" else 5
    spin = [sys.executable, "-c", "while True: pass"]
    found = {key: [] for key in ("quiet torch", "quiet ours", "busy torch", "busy ours")}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(pairs):
            for load in ("quiet", "busy"):
                others = [subprocess.Popen(spin) for _ in range(common.processors() if load == "busy" else 0)]
                try:
                    for word in ("torch", "ours"):
                        seconds = seconds_of_steps(Path(folder), f"{load}-{word}-{i}", word == "ours")
                        found[f"{load} {word}"].append(seconds)
                finally:
                    for other in others:
                        other.kill()
                        other.wait()
    medians = {key: statistics.median(values) for key, values in found.items()}
    slower = medians["busy ours"] / medians["quiet ours"]
    price = medians["quiet ours"] / medians["quiet torch"]
    before = medians["busy torch"] / medians["quiet torch"]
    return {"claim": "a busy machine: beside one busy process a core a demo's steps take at most 3 x the quiet time, and quiet "
                     "at most 1.05 x that of torch's own threads", "paper": "no paper's",
            "measured": f"beside one busy process a core {slower:.2f} x the quiet time (torch's own threads {before:.1f} x); "
                        f"quiet {price:.2f} x the time of torch's own threads (medians of {pairs})",
            "verdict": "shown" if slower <= 3 and price <= 1.05 else "not shown at this scale", "numbers": found}


MEASURE = """
import sys
sys.path.insert(0, {root!r})
import data
import numpy as np


def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024


data.open_data("shapes", size=8, count=10)
before = resident()
{action}
print(resident() - before)
"""


def memory(scale):
    """Opening a large file of latents and reading a batch: MiB of the process, mapped against read whole."""
    shape = (9_000, 4, 32, 32) if scale == "quick" else (40_000, 4, 32, 32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "latents.npz")
        np.savez(path, latents=np.ones(shape, np.float32), labels=np.arange(shape[0]) % 10)
        size = path.stat().st_size / 2 ** 20
        batch = "d.latents(np.arange(64), np.zeros(64, bool), 0.0)"
        actions = {"before": f"d = dict(np.load({str(path)!r}))", "after": f"d = data.open_data('latents:{path}', size=32); {batch}"}
        grown = {}
        for name, action in actions.items():
            code = MEASURE.format(root=str(ROOT), action=action)
            out = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True).stdout
            grown[name] = float(out.split()[-1])
    return {"claim": "a file of latents costs no memory but what is used: at most 16 MiB whatever its size", "paper": "no paper's",
            "measured": f"{size:.0f} MiB file: +{grown['after']:.0f} MiB opened and a batch read, where reading it whole takes "
                        f"+{grown['before']:.0f} MiB",
            "verdict": "shown" if grown["after"] <= 16 else "not shown at this scale", "numbers": {"file": size, **grown}}


def ratios(before, after, pairs):
    """Ratios of CPU time, after over before, of interleaved pairs."""
    found = []
    for _ in range(pairs):
        times = []
        for function in (before, after):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        found.append(times[1] / times[0])
    return found


def conversion(scale):
    """256 pictures of 256 px from bytes to floats: scaled in place against three copies."""
    images = np.random.default_rng(0).integers(0, 256, (256, 3, 256, 256), np.uint8)
    dataset, index = data.Data(images, np.arange(256) % 10), np.arange(256)
    found = ratios(lambda: torch.from_numpy(np.ascontiguousarray(images[index])).float() / 127.5 - 1,
                   lambda: dataset.pixels(index), 5 if scale == "quick" else 15)
    ratio = statistics.median(found)
    return {"claim": "bytes become floats in place, at least 2.3 x faster and bitwise equal", "paper": "no paper's",
            "measured": f"{1 / ratio:.2f} x as fast by CPU time (median of {len(found)} pairs, {1 / max(found):.2f} to {1 / min(found):.2f})",
            "verdict": "shown" if ratio <= 1 / 2.3 else "not shown at this scale", "numbers": {"after over before": found}}


def noise(scale):
    """Noise of a global batch of 1,024 latents: what one of eight ranks draws, against the whole batch."""
    shape, where = (1024, 16, 32, 32), torch.device("cpu")

    def one_of_eight():
        with mock.patch.object(common, "world", lambda: 8), mock.patch.object(common, "rank", lambda: 3):
            common.shard_noise(shape, 0, 1, "noise", where)

    found = ratios(lambda: common.shard_noise(shape, 0, 1, "noise", where), one_of_eight, 5 if scale == "quick" else 15)
    ratio = statistics.median(found)
    return {"claim": "noise is drawn in shards: one of eight ranks takes at most .15 of one process's time", "paper": "no paper's",
            "measured": f"{ratio:.3f} of it (median of {len(found)} pairs, {min(found):.3f} to {max(found):.3f})",
            "verdict": "shown" if ratio <= 0.15 else "not shown at this scale", "numbers": {"one of eight over all": found}}


def pictures_of_256(batch):
    """A data set of `batch` pictures of 256 px, and DetailFlow's configuration with as many a step."""
    images = np.random.default_rng(0).integers(0, 256, (batch, 3, 256, 256), np.uint8)
    cfg = common.resolve(detailflow.Config, detailflow.PRESETS, "DetailFlow-16", {"batch": batch, "kmeans": 0})
    return data.Data(images, np.arange(batch) % 10), cfg


def wait(scale):
    """How long steps wait for pictures that a thread reads one step ahead; a step is a sleep, as the host's is beside a GPU."""
    batch, steps = (64, 5) if scale == "quick" else (256, 12)
    dataset, cfg = pictures_of_256(batch)

    def read(step):
        return detailflow.draw_tokenizer(dataset, cfg, step, torch.device("meta"))

    start = time.perf_counter()
    read(0)
    alone = time.perf_counter() - start
    fetch = common.read_ahead(read, torch.device("cuda"), steps)
    waits = []
    for step in range(steps):
        start = time.perf_counter()
        fetch(step)
        waits.append(time.perf_counter() - start)
        time.sleep(3 * alone)
    share = statistics.median(waits[1:]) / (3 * alone)
    return {"claim": "a thread reads ahead: a step that takes three times what reading takes waits for data at most .02 of its time",
            "paper": "no paper's",
            "measured": f"waits {share:.4f} of the step (median of {steps - 1}; reading takes {1000 * alone:.0f} ms)",
            "verdict": "shown" if share <= 0.02 else "not shown at this scale", "numbers": {"seconds": waits, "reading": alone}}


def peak(where, method, words):
    """MiB at most of one command of a method file, RuntimeError where it fails. Linux counts it per program: what
    getrusage says of a child begins with the memory of the process that started it."""
    process = subprocess.Popen([sys.executable, str(ROOT / f"{method}.py"), *map(str, words)], cwd=where,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    highest = 0
    while process.poll() is None:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        highest = int(found[1]) if found else highest
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"{method}.py {words}: {process.stderr.read()[-300:]}")
    return highest / 1024


def flat(scale):
    """Peak memory of --encode and --export of many images of 32 px, less that of 2,000, by tiny models."""
    many = 10_000 if scale == "quick" else 40_000
    last = {"arflow": "last.pt", "flextok": "ar.pt", "detailflow": "ar.pt", "vitok": "dit.pt"}
    grown = {}
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        for count in (2_000, many):
            images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
            np.savez(where / f"{count}.npz", train_images=images, train_labels=np.arange(count) % 10,
                     test_images=images[:100], test_labels=np.arange(100) % 10)
        for method, checkpoint in last.items():
            wide = {"size": 32, "patch": 16} if "patch" in tiny.TINY[method] else {"size": 32, "model": "12x1x2-12x2x2/16"}
            peak(where, method, tiny.argv(method, **wide, name="flat"))
            base = ["--sample", f"runs/{method}/flat/{checkpoint}"]
            for task in ("encode", "export"):
                if task == "encode" and method not in ("flextok", "detailflow"):
                    continue
                mib = {}
                for count in (2_000, many):
                    more = ["--encode", "out.npz", "--data", f"npz:{count}.npz"] if task == "encode" else [
                        "--export", "out.npz", "--count", count]
                    mib[count] = peak(where, method, [*base, *more])
                grown[f"{method} --{task}"] = mib[many] - mib[2_000]
    worst = max(grown, key=grown.get)
    return {"claim": f"--encode and --export of {many:,} images take at most 64 MiB more than of 2,000", "paper": "no paper's",
            "measured": ", ".join(f"{name} {mib:+.0f} MiB" for name, mib in grown.items()),
            "verdict": "shown" if grown[worst] <= 64 else "not shown at this scale", "numbers": grown}


ROWS = [busy, memory, conversion, noise, wait, flat]
# Of rows that are not shown: what it would take. A judgement, untested.
NEEDED = {
    "busy": "threads that wait without spinning at no cost: torch's own are 1.31 x as fast where nothing else runs"}
