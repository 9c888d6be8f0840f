"""Mechanics that no paper could disagree about; nothing here knows what a model computes.

One idea runs through it: randomness is a function of (seed, step), so that a run can stop, go on, log and
draw, in one process or several, without changing what it learns.

Read in this order: make_generator and shard; Run.steps, log and save; the rest when a method file calls it.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import logging
import math
import operator
import os
import re
import signal
import sys
import time
import zipfile
import zlib
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from struct import pack

# torch's threads spin while they wait for one another: beside another busy process that costs ten times the
# time. So they spin for a moment, which is all that a quiet machine needs, and then sleep. OpenMP reads this
# once, when torch is imported; so method files import common before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "100000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# --- Command line --------------------------------------------------------------
#
# A method's dataclass Config is its command line: a flag a field, and the comment behind the field is the
# flag's help and names its range. Whatever a user can get wrong ends in one line on stderr and exit code 2,
# before anything is written.


class UserError(Exception):
    """A mistake that one line can explain: launch prints it and leaves with exit code `code`."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


def require(condition, message, code=2):
    """Raise UserError(message, code) unless the condition holds."""
    if not condition:
        raise UserError(message, code)


def quit_with(error):
    """Print an error in one line on stderr and leave; rank 0 speaks for all, unless another fails alone."""
    code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "code", 2)
    if rank() > 0:
        # Rank 0 has 5 s to say the same. If it does, the launcher ends this process meanwhile.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))
        time.sleep(5)
    text = " ".join(str(error).split()) or "interrupted"
    print("error:", text, file=sys.stderr, flush=True)
    sys.exit(code)


COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
SMALLEST = 1e-18                        # and its inverse the largest: float32 and int64 hold both, with room
SIGNS = {"[": ">=", "(": ">", "]": "<=", ")": "<"}
RANGE = re.compile(r"(?P<range>(?:[<>]=? \S+)(?: and [<>]=? \S+)*|in [\[(]\S+, \S+[\])]): (?P<text>.*)")


def field_notes(Config):
    """{field: (range, help)} from the comments behind the fields of a Config: `p: int = 2   # >= 1: side`.

    A range is written "> 0", ">= 0 and < 1" or "in [0, 1)"; it is "" where the comment begins otherwise.
    """
    notes = {}
    for name, comment in re.findall(r"^    (\w+): [^#\n]*# (.*)$", inspect.getsource(Config), re.M):
        found = RANGE.fullmatch(comment)
        notes[name] = (found["range"], found["text"]) if found else ("", comment)
    return notes


def in_range(value, text):
    """Whether a number lies in a range of field_notes. NaN never does, infinity only where it is named."""
    if math.isnan(value) or math.isinf(value) and "inf]" not in text:
        return False
    interval = re.fullmatch(r"in ([\[(])(\S+), (\S+)([\])])", text)           # in [0, 1) is >= 0 and < 1
    if interval:
        opens, low, high, closes = interval.groups()
        text = f"{SIGNS[opens]} {low} and {SIGNS[closes]} {high}"
    bounds = [part.split() for part in text.split(" and ") if part]
    return all(COMPARE[sign](value, float(bound)) for sign, bound in bounds)


def check_ranges(cfg):
    """UserError that names the first field of a configuration outside its range or its words.

    Beyond its range a number must be one that float32 and int64 can hold with room to compute, so that a
    slip of the keyboard is named here and not by an overflow in the middle of a run.
    """
    notes = field_notes(type(cfg))
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        text, _ = notes.get(field.name, ("", ""))
        words = getattr(field.type, "__args__", ())
        if words:
            require(value in words, f"--{field.name} {value}: must be one of {', '.join(words)}")
        if type(value) in (int, float):
            require(in_range(value, text), f"--{field.name} {value}: must be {text or 'a finite number'}")
            sane = value == 0 or math.isinf(value) or SMALLEST <= abs(value) <= 1 / SMALLEST
            bounds = f"from {SMALLEST} to {1 / SMALLEST:.0e}"
            require(sane, f"--{field.name} {value}: must be 0 or {bounds} in size")


def build_parser(Config, PRESETS, doc):
    """A parser with a flag a field of Config; its help is the comment behind the field."""
    parser = ArgumentParser(
        description=doc + "\nPresets:\n" + "\n".join(f"  {name}" for name in PRESETS),
        usage="python %(prog)s [--field value] [--flag]  (Python 3.10 or newer)",
        epilog=f"--sample CHECKPOINT takes the checkpoint's own values; only these may change: "
               f"{', '.join(free_with_sample(Config))}.",
        formatter_class=RawDescriptionHelpFormatter, argument_default=SUPPRESS, allow_abbrev=False)
    parser.error = refuse_words
    notes = field_notes(Config)
    demo = resolve(Config, PRESETS, Config.preset, {})
    for field in fields(Config):
        text, help_text = notes.get(field.name, ("", ""))
        words = tuple(PRESETS) if field.name == "preset" else getattr(field.type, "__args__", ())
        parts = [help_text]
        if text:
            parts.append(f"({text})")
        if words and field.name != "preset":
            parts.append(f"[{', '.join(words)}]")
        parts.append(f"(default {getattr(demo, field.name)!r})")
        options = dict(help=" ".join(parts).replace("%", "%%"))
        if field.type is bool:
            options["action"] = BooleanOptionalAction
        else:
            options |= dict(type=type(field.default), metavar=field.name.upper())
        if words:
            options["choices"] = words
        parser.add_argument(f"--{field.name}", **options)
    return parser


def refuse_words(message):
    """What argparse calls with its complaint, in place of printing its usage."""
    raise UserError(f"{message}; --help lists every flag")


def free_with_sample(Config):
    """What --sample may change: how it draws and where it writes, not what was trained."""
    names = ("sample", "seed", "device", "out", *Config.sampling)
    return [name for name in names if hasattr(Config, name)]


def resolve(Config, PRESETS, preset, given):
    """A Config: the defaults, then the preset, then what was given, {field: value}.

    A stage's own number of steps, steps_X, is filled in: --steps_X if given, else --steps if given, else the
    preset's steps_X, else its steps. So is its own batch_X.
    """
    values = {"preset": preset, **PRESETS[preset], **given}
    return Config(**fill_stages(Config, values, given))


def fill_stages(Config, values, given):
    """The values with every steps_X and batch_X set, as `resolve` says; given: the fields that are news."""
    stages = [field.name for field in fields(Config) if field.name.startswith(("steps_", "batch_"))]
    for name in stages:
        whole = name.split("_")[0]
        overruled = whole in given and name not in given
        if overruled or not values.get(name):
            values = {**values, name: values.get(whole, getattr(Config, whole))}
    return values


def cli(Config, PRESETS, doc, argv=None):
    """The command line as a Config: defaults, then the preset, then what was given.

    --resume and --sample start from the stored configuration and refuse to contradict it. Every mistake ends
    the process with one line on stderr and exit code 2.
    """
    try:
        given = vars(build_parser(Config, PRESETS, doc).parse_args(argv))
        cfg = resolve(Config, PRESETS, given.get("preset", Config.preset), given)
        cfg.name = cfg.name or re.sub(r"[^\w.+-]", "-", cfg.preset)
        require(re.fullmatch(r"\w[\w.+-]*", cfg.name), f"--name {cfg.name}: letters, digits and . _ + - only")
        if cfg.sample:
            stored = read_checkpoint(cfg.sample, folder(cfg).parent.name)["config"] | {"gpus": 1}
            cfg = merge_stored(Config, stored, given, cfg.sample, free_with_sample(Config))
        elif cfg.resume:
            source = folder(cfg) / "config.json"
            free = ("name", "steps", "log", "save", "gpus", "device", "accumulate", "stage", "resume")
            cfg = merge_stored(Config, read_stored(source), {**given, "name": cfg.name}, source, free)
        check_ranges(cfg)
        return cfg
    except (UserError, OSError) as error:
        quit_with(error)


def read_stored(path):
    """The dict that a run stored as JSON, its config.json first of all; UserError where none can be read."""
    runs = sorted(found.parent.name for found in path.parent.parent.glob("*/config.json"))
    require(path.exists(), f"{path.parent}: no run to resume; there are: {', '.join(runs) or 'none'}")
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: no configuration can be read there ({error})") from None
    require(isinstance(stored, dict), f"{path}: holds no configuration")
    return stored


def merge_stored(Config, stored, given, source, free):
    """A Config from the stored fields of `source`; of what is given, only the `free` fields may differ.

    A field that is younger than the file has its default, aloud: defaults leave things as they were.
    """
    types = {field.name: type(field.default) for field in fields(Config)}
    odd = ", ".join(sorted(stored.keys() - types.keys()))
    require(not odd, f"{source}: written by another version of this file (fields {odd})")
    younger = {field.name: field.default for field in fields(Config) if field.name not in stored}
    if younger and rank() == 0:
        said = ", ".join(f"--{name} {value!r}" for name, value in younger.items())
        print(f"{source}: written by an earlier version of this file; defaults: {said}", flush=True)
    stored = {**younger, **stored}
    for name, kind in types.items():
        value = stored[name]
        fits = type(value) is kind or (kind is float and type(value) is int)
        require(fits, f"{source}: field {name} is {value!r}, not of type {kind.__name__}")
    for name, value in given.items():
        of_a_stage = name.startswith("steps_") and "steps" in free
        fine = name in free or of_a_stage or value == stored[name]
        require(fine, f"--{name} {value}: {source} has {stored[name]!r}; free are {', '.join(free)}")
    # a batch that was stored is no news, and overrules no stage's own
    news = [name for name in given if name in free or name.startswith("steps_")]
    return Config(**fill_stages(Config, {**stored, **given}, news))


def is_preset(cfg, PRESETS):
    """Whether a run has exactly its preset's settings, but for where and how often it writes.

    Only then does a target count.
    """
    free = {name: getattr(cfg, name) for name in ("name", "resume", "log", "save")}
    return asdict(cfg) == asdict(resolve(type(cfg), PRESETS, cfg.preset, {})) | free


# --- Launch --------------------------------------------------------------------
#
# One process or several, by the same call. --gpus N starts N processes, one a GPU, through torch's elastic
# launcher; under torchrun, on any number of nodes, the same file finds itself to be a worker. One process
# never touches torch.distributed. check runs in every process, prepare once a node, before the others go on:
# downloads, packing and judges are done by then.


def launch(main, cfg, check, prepare, processes=None):
    """check(cfg), once prepare(cfg), then main(cfg) in `processes` processes, by default cfg.gpus.

    Under torchrun this process is one of them already. Leaves with main's code unless it is 0 or None, with 2
    after a mistake of the user, with 128 + signal after a signal; all else is a bug and keeps its traceback.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    processes = int(os.environ.get("WORLD_SIZE", processes or cfg.gpus))
    Run.trained = False
    try:
        check_ranges(cfg)
        check_machine(cfg, processes)
        check(cfg)
        torch.set_num_threads(choose_threads(cfg))
        if processes > 1 and "RANK" in os.environ:
            join_group(cfg, local)
        prepared = os.environ.get("TORCHELASTIC_RUN_ID") == "prepared"      # by the parent, in spawn
        if local == 0 and not prepared:
            prepare(cfg)
        barrier()
        if world() == processes:
            code = main(cfg)
        else:
            code = spawn(main, cfg, check, prepare, processes)
        if world() > 1:
            dist.destroy_process_group()
    except BrokenPipeError:
        ignore_output()
        code = 128 + getattr(signal, "SIGPIPE", 13)
    except (UserError, OSError, KeyboardInterrupt) as error:
        quit_with(error)
    except (MemoryError, RuntimeError) as error:
        quit_without_memory(error)
    finally:
        LOCKS.clear()                                           # closing the files lets the folders go
    if code:
        sys.exit(code)


def quit_without_memory(error):
    """Leave with the allocator's word in one line where memory was refused; raise anything else again."""
    words = ("allocate memory", "out of memory", "Storage size calculation overflowed", "unable to mmap")
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(word in text for word in words):
        quit_with(UserError(f"not enough memory: {text[:200]}"))
    raise error


def ignore_output():
    """Send what is still printed nowhere: who read it has gone (a closed pipe, a terminal that hung up)."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.stdout = open(os.devnull, "w")


def batch_size(cfg, stage):
    """Rows a step of a stage, over all processes: --batch_STAGE where the method has it and it is not 0."""
    return getattr(cfg, f"batch_{stage}", 0) or cfg.batch


def check_machine(cfg, processes):
    """UserError where this machine cannot do what all methods may ask of it: a device, so many GPUs, equal
    shares of the batch."""
    have = torch.cuda.device_count()
    asked = int(os.environ.get("LOCAL_WORLD_SIZE", cfg.gpus))
    for name in ("steps", "batch", "gpus", "log", "save"):
        value = getattr(cfg, name)
        require(value >= 1, f"--{name} {value}: must be >= 1")
    require(cfg.lr > 0, f"--lr {cfg.lr}: must be > 0")
    parts = processes * getattr(cfg, "accumulate", 1)
    for name in vars(cfg):
        if name.startswith("batch"):
            value = getattr(cfg, name)
            whole = cfg.sample or value % parts == 0
            require(whole, f"--{name} {value}: must be a multiple of {parts}, its parts in all processes")
    words = ("auto", "cpu", "cuda") if have else ("auto", "cpu")
    require(cfg.device in words, f"--device {cfg.device}: this machine has {', '.join(words)}")
    fits = cfg.device == "cpu" or not have or asked <= have
    require(fits, f"--gpus {asked}: this machine has {have}; ask for fewer, or add --device cpu")


def processors():
    """How many processors this process may use: its affinity, or less by a container's quota (cgroup)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for quota, period in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        path = Path("/sys/fs/cgroup", quota)
        if path.exists():
            words = path.read_text().split()
            if period:
                words += Path("/sys/fs/cgroup", period).read_text().split()
            if words[0].isdecimal():                            # "max" or -1: no quota
                count = min(count, int(words[0]) // int(words[1]))
    return max(1, count)


def require_memory(cfg, build, copies=5):
    """UserError where the model that build() makes cannot fit: `copies` of its parameters, as bytes.

    Five are its weights, gradients, AdamW's two averages and the averaged weights. Nothing is allocated.
    Returns the model, on the meta device.
    """
    with torch.device("meta"):
        model = build()
    asked = copies * sum(p.numel() * p.element_size() for p in model.parameters())
    if device_of(cfg).type == "cuda":
        have = torch.cuda.mem_get_info()[1]
    elif hasattr(os, "sysconf"):
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        have = math.inf
    require(asked <= have, f"this model needs {asked:,} bytes to train; {device_of(cfg)} has {have:,}")
    return model


def choose_threads(cfg):
    """Threads for torch: OMP_NUM_THREADS of them; else one for a demo, one a processor for all else.

    A demo's tensors are small. On a quiet machine a second thread saves some quarter of its time, or nothing;
    beside other busy processes two threads, each waiting for the other, take several times as long as one.
    """
    one = cfg.preset == "demo" and "OMP_NUM_THREADS" not in os.environ
    return 1 if one else min(torch.get_num_threads(), processors())


def join_group(cfg, local):
    """Join the process group that spawn or torchrun has started: gloo for the CPU, NCCL for GPUs.

    The threads of a node are shared out among its processes.
    """
    if device_of(cfg).type == "cuda":
        torch.cuda.set_device(local)
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("gloo" if device_of(cfg).type == "cpu" else "cpu:gloo,cuda:nccl")


def spawn(main, cfg, check, prepare, processes):
    """Run in several processes by torch's elastic launcher; returns the exit code of the one that failed.

    Each of them calls launch again, finds itself to be a worker there, and runs main. The launcher's run id
    tells it that this process has prepared everything already.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    if device_of(cfg).type == "cpu":
        print(f"no GPU in use: {processes} processes share the CPU over gloo", flush=True)
    logging.disable(logging.CRITICAL)                           # the launcher's own log
    patience = {"shutdown_timeout": 600} if hasattr(LaunchConfig, "shutdown_timeout") else {}
    config = LaunchConfig(1, 1, processes, run_id="prepared", rdzv_backend="c10d", max_restarts=0,
                          rdzv_endpoint="localhost:0", local_addr="localhost", **patience)
    try:
        elastic_launch(config, launch)(main, cfg, check, prepare)
    except SignalException as stop:
        return 128 + stop.sigval.value
    except ChildFailedError as failed:
        code = max(failure.exitcode for failure in failed.failures.values())
        return code if code > 0 else 128 - code                 # below 0: ended by that signal


def rank():
    """This process's number among all; 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world():
    """The number of processes; 1 when it is alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait until all processes are here."""
    if world() > 1:
        dist.barrier()


def device_of(cfg):
    """The torch.device that this process computes on: its GPU, unless there is none or --device cpu."""
    use = torch.cuda.is_available() and cfg.device != "cpu"
    return torch.device("cuda" if use else "cpu")


def autocast(cfg):
    """bf16 on CUDA with --bf16; otherwise nothing.

    What must stay in fp32 (norms, losses, states, codebooks) leaves it in the method files, where it matters.
    """
    return torch.autocast("cuda", torch.bfloat16, enabled=cfg.bf16 and device_of(cfg).type == "cuda")


def compile_blocks(cfg, blocks):
    """With --compile, torch.compile for each block, in place: copies made before stay eager."""
    if cfg.compile:
        for block in blocks:
            block.compile()


# --- Randomness and averages ---------------------------------------------------
#
# No generator lives from one step to the next. What step 731 draws is a function of (seed, 731, a name), so a
# resumed run draws what the uninterrupted one would have drawn, and no state of a generator or a loader need
# be saved. All draws are for the global batch, of which each rank takes its slice: two processes learn what
# one would have learned.


def make_generator(seed, step, stream, device="cpu"):
    """A generator that depends on (seed, step, stream) alone. Draw for the GLOBAL batch, then take shard."""
    digest = hashlib.sha256(f"{seed}/{step}/{stream}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)         # 63 bits


def shard(x):
    """This rank's slice, along axis 0, of what was drawn for all; batches are multiples of the ranks."""
    part = len(x) // world()
    return x[rank() * part:(rank() + 1) * part]


def shard_noise(shape, seed, step, stream, device, axis=0):
    """This rank's slice along `axis` of normal noise for the global batch, drawn on the device.

    Each 64 samples have a generator of their own, of which a rank draws only those that it needs: its cost
    falls with the number of ranks, and what a sample gets does not depend on that number.
    """
    part = shape[axis] // world()
    first = rank() * part
    pieces = []
    for k in range(first // 64, -(-(first + part) // 64)):
        block = [*shape]
        block[axis] = min(64, shape[axis] - 64 * k)
        name = f"{stream} {k}" if k else stream                 # a small batch draws what one generator gives
        noise = torch.randn(block, generator=make_generator(seed, step, name, device), device=device)
        low = max(0, first - 64 * k)
        high = min(block[axis], first + part - 64 * k)
        pieces.append(noise.narrow(axis, low, high - low))
    return torch.cat(pieces, axis) if len(pieces) > 1 else pieces[0]


def seed_dropout(seed, step):
    """Reseed what dropout inside modules draws from; differs by rank."""
    torch.manual_seed(make_generator(seed, step, f"dropout {rank()}").initial_seed())


def in_parts(count, *things):
    """Yield `things`, tensors (B, ...) in any containers, in `count` equal parts of the batch: --accumulate.

    Numbers and tensors without axes go along whole.
    """
    sizes = [len(leaf) for leaf in tree_leaves(things) if torch.is_tensor(leaf) and leaf.ndim]
    part = sizes[0] // count
    for start in range(0, part * count, part):
        yield tree_map(lambda x: x[start:start + part] if torch.is_tensor(x) and x.ndim else x, things)


def read_ahead(read, device, total):
    """A function of the step that gives read(step), which beside a GPU a thread has begun one step before.

    What is read depends on the step alone, so that a resumed run reads the same. A CPU has nothing to
    overlap: there it is read when it is wanted.
    """
    if device.type == "cpu":
        return read
    pool = ThreadPoolExecutor(1)
    waiting = {}

    def fetch(step):
        future = waiting.pop(step, None) or pool.submit(read, step)
        batch = future.result()
        if step + 1 < total:
            waiting[step + 1] = pool.submit(read, step + 1)
        return batch

    return fetch


def average(x):
    """The tensor x, averaged over the processes in place.

    It is divided first, so that a sum over many ranks cannot overflow where the mean would not.
    """
    if world() > 1:
        dist.all_reduce(x.div_(world()))
    return x


def average_gradients(params, size=2**23):
    """Gradients become means over the processes; those that are None stay None.

    They travel in buckets of about `size` numbers, each reduced while the next is packed, so that no second
    copy of all gradients is made. Alone, nothing happens.
    """
    if world() == 1:
        return
    grads = [p.grad for p in params if p.grad is not None]
    sent = None
    while grads:
        bucket = [grads.pop(0)]
        count = bucket[0].numel()
        while grads and grads[0].dtype == bucket[0].dtype and count < size:
            count += grads[0].numel()
            bucket.append(grads.pop(0))
        flat = torch.cat([g.reshape(-1) for g in bucket]).div_(world())
        work = dist.all_reduce(flat, async_op=True)
        if sent:
            receive(*sent)
        sent = work, flat, bucket
    if sent:
        receive(*sent)


def receive(work, flat, bucket):
    """Wait for a bucket of gradients and copy it back."""
    work.wait()
    parts = flat.split([g.numel() for g in bucket])
    torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket)])


@torch.no_grad()
def ema_update(ema, model, decay):
    """ema <- decay ema + (1 - decay) model, all parameters at once.

    lerp adds the difference, so weights that agree stay as they are, to the bit. Buffers are not averaged.
    """
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def set_learning_rate(opt, lr):
    """The learning rate of all groups of an optimizer, times a group's own "factor" if it has one.

    Schedules are functions of the step in the method files: an object would be one more state to save.
    """
    for group in opt.param_groups:
        group["lr"] = lr * group.get("factor", 1)


class Muon(torch.optim.Muon):
    """torch's Muon with adjust_lr_fn="match_rms_adamw", all matrices of one shape at once.

    A tall matrix counts as its transpose. The numbers are torch's, in a third of the time where matrices are
    small: there a step is as long as its list of operations.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            stacks = {}
            for p in group["params"]:
                if p.grad is not None:
                    stacks.setdefault(tuple(sorted(p.shape)), []).append(p)
            for matrices in stacks.values():
                self.update(matrices, **group)

    def update(self, matrices, lr, momentum, weight_decay, eps, ns_steps, ns_coefficients, **others):
        """One step of matrices (m, n) or (n, m); the arguments are those of torch's Muon."""
        grads = [p.grad for p in matrices]
        buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in matrices]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, buffers, momentum)                 # Nesterov's
        tall = [p.shape[0] > p.shape[1] for p in matrices]
        x = torch.stack([u.T if turn else u for u, turn in zip(updates, tall)]).bfloat16()
        x /= x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
        a, b, c = ns_coefficients
        for _ in range(ns_steps):                                               # x <- a x + (b g + c g g) x
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        rate = lr * 0.2 * math.sqrt(max(matrices[0].shape))
        steps = [u.T if turn else u for u, turn in zip(x.to(grads[0]), tall)]
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        torch._foreach_add_(matrices, steps, alpha=-rate)


class MuonAdamW:
    """Muon for some matrices, AdamW for the rest, behind the face of one optimizer.

    Muon makes each update orthogonal (Jordan 2024); scaled to the size of AdamW's (Liu et al., 2502.16982),
    it takes AdamW's learning rate times a factor and AdamW's weight decay. On small transformers it learns
    in fewer steps, each of which costs more. Of the six papers none uses it.
    """

    def __init__(self, adamw, matrices, factor):
        chosen = set(matrices)
        decay = adamw.param_groups[0]["weight_decay"]
        for group in adamw.param_groups:
            group["params"] = [p for p in group["params"] if p not in chosen]
        group = {"params": list(matrices), "factor": factor}
        muon = Muon([group], lr=adamw.defaults["lr"], weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        self.both = (adamw, muon)
        self.param_groups = [*adamw.param_groups, *muon.param_groups]

    def step(self):
        for opt in self.both:
            opt.step()

    def zero_grad(self):
        for opt in self.both:
            opt.zero_grad()

    def state_dict(self):
        return {"adamw": self.both[0].state_dict(), "muon": self.both[1].state_dict()}

    def load_state_dict(self, state):
        self.both[0].load_state_dict(state["adamw"])
        self.both[1].load_state_dict(state["muon"])
        self.param_groups = [*self.both[0].param_groups, *self.both[1].param_groups]


def with_muon(adamw, blocks, factor):
    """`adamw`, but the matrices in a module of blocks go to Muon at `factor` times the rate; 0: none do."""
    if not factor:
        return adamw
    return MuonAdamW(adamw, [p for p in blocks.parameters() if p.ndim == 2], factor)


# --- Runs ----------------------------------------------------------------------
#
# runs/<method>/<name>/ holds config.json, the method's source, log.jsonl, loss.svg, pictures and checkpoints.
# A process holds its folder by a lock while it lives, so two runs of one name never share it; a run is never
# written over. Files appear whole or not at all. A checkpoint holds plain containers, numbers and tensors.


def folder(cfg):
    """runs/<method>/<name>; the method is the file that defines Config."""
    return Path("runs", Path(inspect.getfile(type(cfg))).stem, cfg.name)


def sample_folder(cfg):
    """Where --sample writes: --out, or samples/ beside the checkpoint. It touches nothing else of a run.

    Made before anything is drawn, so that a place where nobody may write is found at once.
    """
    path = Path(cfg.out or Path(cfg.sample).parent / "samples")
    path.mkdir(parents=True, exist_ok=True)
    require(os.access(path, os.W_OK), f"{path}: no right to write there")
    return path


def require_stage(cfg, stage):
    """The checkpoint that an earlier stage of this run has left; UserError with what makes it."""
    path = folder(cfg) / f"{stage}.pt"
    method = folder(cfg).parent.name
    require(path.exists(), f"{path} is missing; `python {method}.py --preset {cfg.preset} --name {cfg.name} "
                           f"--stage {stage}` makes it")
    return path


def run_stages(cfg, stages):
    """Train cfg.stage of {name: train(cfg)}, or all in order; returns the last one's checkpoint.

    With --resume a finished stage is over at once, so all in order goes on in the first unfinished one.
    """
    names = list(stages) if cfg.stage == "all" else [cfg.stage]
    for name in names:
        stages[name](cfg)
        barrier()                                               # the next stage reads what rank 0 writes
    return folder(cfg) / f"{names[-1]}.pt"


def write_atomic(path, write):
    """write(file) into a temporary file, fsync, rename: readers see the old file or the new, never half."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                    # torch.save turns a full disk into the latter
        raise UserError(f"{path}: cannot save ({error}); the file before it is untouched", code=1) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path, thing):
    """A container of plain values as a JSON file, atomically."""
    write_atomic(path, lambda file: file.write(json.dumps(thing, indent=1).encode()))


def read_checkpoint(path, method, device="cpu"):
    """What Run.save wrote: a dict of method, config, step, sums, state, classes.

    sums holds the running sum and count of every logged value, so that a resumed run logs the same means.

    UserError where the file is broken, of another method, or its fields are of other types.
    """
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        found = saved["method"]
    except Exception as error:                                  # whatever the bytes provoke
        reason = str(error)[:80] or type(error).__name__
        raise UserError(f"{path}: not a checkpoint of this project ({reason})") from None
    require(found == method, f"{path}: a checkpoint of {found}.py, not of {method}.py")
    saved.setdefault("classes", [])
    for name, kind in dict(config=dict, step=int, sums=dict, state=dict, classes=list).items():
        fits = type(saved.get(name)) is kind
        require(fits, f"{path}: field {name} is no {kind.__name__}; the file is damaged")
    require(0 <= saved["step"] < 2**63, f"{path}: field step is {saved['step']}; the file is damaged")
    require(all(map(is_sum, saved["sums"].items())), f"{path}: field sums is damaged")
    require(all(type(name) is str for name in saved["classes"]), f"{path}: field classes is damaged")
    return saved


def is_sum(item):
    """Whether an entry of a checkpoint's sums is a name and a tensor of a finite sum and a count above 0."""
    name, pair = item
    fits = type(name) is str and torch.is_tensor(pair) and pair.shape == (2,)
    return bool(fits and pair.isfinite().all() and pair[1] > 0)


def load_into(objects, saved, path):
    """A checkpoint's state into {name: module or optimizer}; UserError where it does not fit, or is NaN."""
    for name, thing in objects.items():
        try:
            thing.load_state_dict(saved["state"][name])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[-1] if str(error) else type(error).__name__
            raise UserError(f"{path}: does not fit ({name}: {reason})") from None
        if isinstance(thing, nn.Module):
            finite = all(p.isfinite().all() for p in thing.parameters())
            require(finite, f"{path}: {name} holds weights that are not finite")


def lock_folder(path):
    """An open file that this process alone holds while it lives, or None where another process holds it.

    Where the system knows no locks (Windows, some network disks), two runs at once are not noticed.
    """
    file = open(path / ".lock", "a+")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except (ImportError, OSError):
        return file
    return file


LOCKS = {}                                                      # folder: the file that holds it


def take_folder(path, checkpoint, resume):
    """Whether this process now holds a run's folder: no other writer, nothing there to write over."""
    path.mkdir(parents=True, exist_ok=True)
    key = path.resolve()
    held = LOCKS.get(key) or lock_folder(path)
    if held is None:
        return False
    if (path / checkpoint).exists() and not resume:
        if key not in LOCKS:
            held.close()
        return False
    LOCKS[key] = held
    for left_over in path.glob("*.tmp"):                        # of a writer that was killed
        left_over.unlink()
    return True


class Run:
    """One run's folder, log, checkpoints and signals. All ranks decide alike; rank 0 alone writes.

    run = Run(cfg)                                  a file with stages: Run(cfg, "ae") for each of them
    run.seed_weights()
    start = run.restore(model=model, ema=ema, opt=opt)
    for step in run.steps(start): ...; run.log(step, loss=value); run.save(step)

    Beside the methods: device; total, the number of steps; folder; checkpoint, the path of the newest; of all
    runs of this process: trained, whether any has taken a step. A finished one shows its result and exits 0.
    """

    trained = False

    def __init__(self, cfg, stage="last", steps=None, classes=()):
        self.cfg = cfg
        self.stage = stage
        self.classes = [str(name) for name in classes]
        self.total = steps or getattr(cfg, f"steps_{stage}", 0) or cfg.steps
        self.device = device_of(cfg)
        self.sums = {}
        self.lines = []
        self.signal = 0
        self.since = 0.0
        base = folder(cfg)
        self.claim()
        self.config = asdict(cfg) | {"resume": False}
        self.folder = folder(cfg)
        if cfg.resume and hasattr(cfg, "stage"):                # --stage with --resume is of this call alone
            stored = self.folder / "config.json"
            self.config["stage"] = read_stored(stored)["stage"] if stored.exists() else cfg.stage
        suffix = "" if stage == "last" else f"-{stage}"
        self.checkpoint = self.folder / f"{stage}.pt"
        self.log_path = self.folder / f"log{suffix}.jsonl"
        self.chart = self.folder / f"loss{suffix}.svg"
        if self.folder != base:
            self.say(f"{base} is another run's; this one goes to {self.folder}")
        torch.backends.cuda.matmul.allow_tf32 = True            # as the papers
        torch.backends.cudnn.allow_tf32 = True

    def claim(self):
        """Give cfg a name whose folder this run alone writes: name, name-2 ... Rank 0 finds it for all."""
        cfg = self.cfg
        base = cfg.name
        number = 2
        if rank() == 0:
            while not take_folder(folder(cfg), f"{self.stage}.pt", cfg.resume):
                require(not cfg.resume, f"{folder(cfg)}: another process is training there")
                cfg.name = f"{base}-{number}"
                number += 1
        found = [cfg.name, time.time_ns()]
        if world() > 1:
            dist.broadcast_object_list(found)
            cfg.name = found[0]
            token = folder(cfg) / ".lock"
            if rank() == 0:
                token.write_text(str(found[1]))
            barrier()
            seen = token.exists() and token.read_text() == str(found[1])
            require(seen, f"{folder(cfg)}: this node does not see what rank 0 writes there; several nodes "
                          "must start in one shared folder")

    @property
    def begins(self):
        """Whether the weights are those of --init at first: it is given, and no checkpoint goes on."""
        goes_on = self.cfg.resume and self.checkpoint.exists()
        return bool(getattr(self.cfg, "init", "")) and not goes_on

    def seed_weights(self):
        """Seed what initial weights are drawn from: they depend on --seed alone, not on the processes."""
        stream = "weights" if self.stage == "last" else f"{self.stage} weights"
        torch.manual_seed(make_generator(self.cfg.seed, 0, stream).initial_seed())

    def say(self, text):
        """Print on rank 0, above the progress bar. A reader who has gone is a signal to save and leave."""
        if rank() == 0:
            try:
                tqdm.write(text)
                sys.stdout.flush()
            except OSError:
                ignore_output()
                self.signal = self.signal or getattr(signal, "SIGPIPE", 13)

    def restore(self, frozen=None, **objects):
        """Name all that a checkpoint must hold; with --resume, load it. Returns the finished steps.

        frozen: {name: module} of an earlier stage. A checkpoint that was trained on others starts anew.
        """
        frozen = frozen or {}
        self.objects = {**objects, **frozen}
        step = 0
        if self.cfg.resume and self.checkpoint.exists():
            saved = read_checkpoint(self.checkpoint, self.folder.parent.name, self.device)
            if any(differs(module, saved["state"].get(name)) for name, module in frozen.items()):
                self.put_aside()
            else:
                load_into(objects, saved, self.checkpoint)
                step = saved["step"]
                fewer = f"{self.checkpoint}: holds step {step} already; --steps {self.total} asks for fewer"
                require(step <= self.total, fewer)
                self.sums = saved["sums"]
                self.lines = read_log(self.log_path, step)
        elif self.cfg.resume:
            self.say(f"{self.checkpoint}: no checkpoint yet, starting at step 0")
        sums = self.weight_sums()
        require(sums.isfinite().all(), "the weights to start from are not finite")
        alike = torch.allclose(average(sums.clone()), sums, rtol=1e-12, atol=0)
        require(alike, "the processes start with different weights")
        if rank() == 0:
            self.write_folder()
        self.introduce(step)
        return step

    def put_aside(self):
        """Keep under another name a checkpoint that no longer fits the earlier stage, which starts anew."""
        kept = self.checkpoint.with_name(f"{self.stage}-of-another-{self.cfg.name}.pt")
        self.say(f"{self.checkpoint} was trained on another earlier stage: starting anew; it is now {kept}")
        barrier()                                               # all have read it
        if rank() == 0:
            os.replace(self.checkpoint, kept)

    def write_folder(self):
        """config.json, the method's source, and the log without the lines of later steps."""
        source = Path(inspect.getfile(type(self.cfg)))
        log = "".join(json.dumps(line) + "\n" for line in self.lines)
        write_json(self.folder / "config.json", self.config)
        write_atomic(self.folder / source.name, lambda file: file.write(source.read_bytes()))
        write_atomic(self.log_path, lambda file: file.write(log.encode()))

    def introduce(self, step):
        """One line: where, on what, how much, from which step to which."""
        threads = torch.get_num_threads()
        chip = f"cpu ({threads} threads)" if threads > 1 else "cpu (1 thread; more by OMP_NUM_THREADS)"
        precision = "fp32"
        if self.device.type == "cuda":
            chip = torch.cuda.get_device_name()
            precision = "bf16" if self.cfg.bf16 else "tf32"
        model = next(iter(self.objects.values()))
        params = sum(p.numel() for p in model.parameters() if p.requires_grad)
        processes = f"{world()} processes over {dist.get_backend()}" if world() > 1 else "1 process"
        batch = batch_size(self.cfg, self.stage)
        self.say(f"{self.folder}: {chip}, {processes}, {precision}, batch {batch}, {params:,} parameters, "
                 f"steps {step} to {self.total}")

    def weight_sums(self):
        """One number a parameter, float64: equal on all ranks at first, finite when saved.

        Sums see nearly every difference, and cost less than comparing the weights themselves.
        """
        modules = [thing for thing in self.objects.values() if isinstance(thing, nn.Module)]
        return torch.stack([p.detach().double().sum().cpu() for m in modules for p in m.parameters()])

    def steps(self, start):
        """The step numbers, with a progress bar. Signals are noted and wait for save."""
        names = ("SIGINT", "SIGTERM", "SIGHUP")                 # Windows has no SIGHUP
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]      # nohup
        handlers = {number: signal.signal(number, self.on_signal) for number in numbers}
        self.clock = time.perf_counter()
        Run.trained = Run.trained or start < self.total
        self.bar = tqdm(range(start, self.total), self.stage, self.total, initial=start,
                        disable=rank() > 0 or None)
        try:
            yield from self.bar
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_signal(self, number, frame):
        """Note a signal for save. A second one, 5 s later or more, ends the process at once.

        An earlier second one is ignored: a terminal sends Ctrl-C to the launcher and to its processes.
        """
        if number == getattr(signal, "SIGHUP", None):
            self.bar.disable = True                             # nobody is left to see it
        if not self.signal:
            self.signal = number
            self.since = time.monotonic()
        if time.monotonic() - self.since > 5:
            os._exit(128 + number)

    def due(self, step, every):
        """True at every `every`-th finished step and at the last one."""
        return (step + 1) % every == 0 or step + 1 == self.total

    def add(self, **values):
        """Sum up 0-d tensors or numbers for the next log line.

    They stay on the device: reading one would make every step wait for it.
    """
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float64, device=self.device).detach().reshape(1)
            self.sums[name] = self.sums.get(name, 0) + F.pad(value, (0, 1), value=1.0)          # sum, count

    def log(self, step, **values):
        """Add the values; at log steps check, write and show the means since the last one, over all ranks."""
        self.add(**values)
        if not self.due(step, self.cfg.log):
            return
        sums = {name: average(pair.cpu()) for name, pair in self.sums.items()}
        record = {name: (total / count).item() for name, (total, count) in sums.items()}
        self.guard(step + 1, record)
        now = time.perf_counter()
        seconds = now - self.clock
        self.clock = now
        self.sums = {}
        self.lines.append({"step": step + 1, **record, "seconds": seconds, "memory": memory(self.device)})
        text = "  ".join(f"{name} {value:.4f}" for name, value in record.items())
        self.bar.set_postfix_str(text)
        if rank() == 0:
            with open(self.log_path, "a") as file:
                file.write(json.dumps(self.lines[-1]) + "\n")
        if self.bar.disable:
            self.say(f"step {step + 1}/{self.total}  {text}  {seconds:.1f} s")

    def guard(self, step, values):
        """Stop at a number that is not finite; say where to go on from."""
        bad = ", ".join(name for name, value in values.items() if not math.isfinite(value))
        last = f"last good checkpoint: {self.checkpoint}" if self.checkpoint.exists() else "no checkpoint yet"
        require(not bad, f"step {step}: {bad} is not finite; {last}; try a smaller --lr", code=1)

    def save(self, step):
        """Write a checkpoint when it is due, or when a signal has come to any rank: then all leave."""
        number = torch.tensor(self.signal)
        if world() > 1:
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        if number or self.due(step, self.cfg.save):
            self.guard(step + 1, {"sum of weights": self.weight_sums().sum()})
            self.sums = {name: average(pair.cpu()).to(self.device) for name, pair in self.sums.items()}
            if rank() == 0:
                self.write(step + 1)
        if number:
            method = self.folder.parent.name
            self.say(f"signal {int(number)}: {self.checkpoint} holds step {step + 1}; "
                     f"go on with --resume: python {method}.py --resume --name {self.cfg.name}")
            barrier()                                           # an early exit would end the one that writes
            sys.exit(128 + int(number))

    def write(self, step):
        """The checkpoint (every tenth is kept) and the chart of the losses."""
        state = {name: thing.state_dict() for name, thing in self.objects.items()}
        saved = {"method": self.folder.parent.name, "config": self.config, "classes": self.classes,
                 "step": step, "sums": self.sums, "state": state}
        paths = [self.checkpoint]
        if step % (10 * self.cfg.save) == 0:
            paths.append(self.folder / f"{self.stage}-{step}.pt")
        for path in paths:
            write_atomic(path, lambda file: torch.save(saved, file))
        lines = self.lines[::1 + len(self.lines) // 1000]
        names = dict.fromkeys(key for line in lines for key in line)
        curves = {}
        for name in names:
            if name not in ("step", "seconds", "memory"):
                points = [(line["step"], line[name]) for line in lines if name in line]
                curves[name] = zip(*points)
        line_chart(self.chart, curves, self.cfg.name, "step", logy=True)


def differs(module, state):
    """Whether a module's state is another than the one stored: other names, shapes or a single other bit."""
    own = module.state_dict()
    if not isinstance(state, dict) or state.keys() != own.keys():
        return True
    return any(not torch.equal(value, state[name].to(value)) for name, value in own.items())


def read_log(path, step):
    """The lines of a log up to a step, as dicts. A crash may have cut the last one; all else must parse."""
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines()
    found = []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        whole = isinstance(line, dict) and all(type(value) in (int, float) for value in line.values())
        if whole and type(line.get("step")) is int:
            found.append(line)
        else:
            last = number == len(lines)
            require(last, f"{path}: line {number} is no line of a log; mend or delete the file")
    return [line for line in found if line["step"] <= step]


def share_blocks(make, count, size=100, start=0):
    """Yield make(first, last) for each block of `size` of the rows start to count, in order, on all ranks.

    Each rank makes every world()-th block and gets the others' from them. So all ranks must call it alike.
    """
    firsts = range(start, count, size)
    for turn in range(0, len(firsts), world()):
        round_ = firsts[turn:turn + world()]
        mine = None
        if rank() < len(round_):
            first = round_[rank()]
            mine = make(first, min(count, first + size))
        blocks = [mine]
        if world() > 1:
            blocks = [None] * world()
            dist.all_gather_object(blocks, mine)
        yield from blocks[:len(round_)]


def stored_rows(path, make, count, recipe, size=100):
    """An array (count, ...) of which make(first, last) gives rows, as tensors on the CPU; memory-mapped.

    Made once and kept in `path` (.npy). PATH.json says how many rows are there and of what `recipe`: an
    interrupted run goes on behind them; another count or recipe (a string: all that rows depend on) begins
    anew. All ranks call it; they share the work, and rank 0 writes.
    """
    note = Path(f"{path}.json")
    done = 0
    if path.exists() and note.exists():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            found = json.loads(note.read_text())
            done = found["rows"] if (found["recipe"], found["count"]) == (recipe, count) else 0
    barrier()                                                   # all have read it
    if rank() == 0 and done == 0:
        note.unlink(missing_ok=True)                            # it must not vouch for what is written over
    array = None
    blocks = share_blocks(make, count, size, done)
    hidden = rank() > 0 or None
    bar = tqdm(total=count, initial=done, desc=path.name, unit="row", disable=hidden, leave=False)
    for block in blocks:
        if rank() == 0:
            rows = block.numpy()
            if array is None:
                mode = "r+" if done else "w+"
                array = np.lib.format.open_memmap(path, mode, rows.dtype, (count, *rows.shape[1:]))
            array[done:done + len(rows)] = rows
            array.flush()
            write_json(note, {"rows": done + len(rows), "count": count, "recipe": recipe})
        done += len(block)
        bar.update(len(block))
    bar.close()
    barrier()
    return np.load(path, mmap_mode="r")


def fingerprint(module):
    """A digest of all tensors of a module: what was computed with it depends on it."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- Weights from files --------------------------------------------------------
#
# Foreign files are read as data: no code of theirs runs, and whatever is wrong with them is one line.


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: the header's length (8 bytes), the header (JSON), raw values."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
             "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        body = bytearray(file.read())
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            kind = kinds[entry["dtype"]]
            found[name] = torch.empty(entry["shape"], dtype=kind)
            if end > start:
                found[name] = torch.frombuffer(body[start:end], dtype=kind).view(entry["shape"])
    return found


def read_pickle(path):
    """{name: tensor} of a .pt, .pth or .bin file; no code runs; a dict under one of the usual keys counts."""
    found = torch.load(path, "cpu", weights_only=True)
    for key in ("state_dict", "model", "module"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    return found


def read_npz(path):
    """{name: tensor} of an .npz file."""
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


READERS = {".safetensors": read_safetensors, ".bin": read_pickle, ".pt": read_pickle, ".pth": read_pickle,
           ".npz": read_npz}


def read_weights(path):
    """{name: tensor} of a file, of an index of shards (*.index.json), or of the first of these in a folder.

    Local files alone; no code of theirs runs. UserError with the file and the reason.
    """
    path = Path(path)
    if path.is_dir():
        names = sorted(file for file in path.iterdir() if file.name.endswith((*READERS, ".index.json")))
        order = [".index.json", *READERS]
        found = [file for ending in order for file in names if file.name.endswith(ending)]
        require(found, f"{path}: holds no weights ({', '.join(READERS)})")
        path = found[0]
    require(path.exists(), f"{path}: no such file")
    try:
        if path.name.endswith(".index.json"):
            shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
            found = {}
            for shard_name in shards:
                found |= READERS[Path(shard_name).suffix](path.with_name(shard_name))
        else:
            found = READERS[path.suffix](path)
    except Exception as error:                                  # whatever foreign bytes provoke
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        raise UserError(f"{path}: cannot be read as weights ({reason})") from None
    tensors = isinstance(found, dict) and all(map(torch.is_tensor, found.values()))
    require(tensors and found, f"{path}: holds no tensors by name")
    return found


def load_teacher(path, channels, size):
    """A frozen network from a file as a function: images (B, channels, size, size) -> maps (B, S, h, w).

    TorchScript .pt or torch.export .pt2; it may also give tokens (B, h*w, S). UserError where it does not
    take one picture and two, gives something else, or gives a picture other features beside another.
    """
    require(path.endswith((".pt", ".pt2")), f"--teacher {path}: give TorchScript .pt or torch.export .pt2")
    try:
        network = torch.jit.load(path, "cpu") if path.endswith(".pt") else torch.export.load(path).module()
    except Exception as error:                                  # whatever foreign bytes provoke
        raise UserError(f"--teacher {path}: cannot be read ({type(error).__name__})") from None
    if path.endswith(".pt"):
        network.eval()                                          # it may have been saved in training mode
    for p in network.parameters():
        p.requires_grad_(False)

    def features(x):
        maps = network.to(x.device)(x)
        if maps.ndim == 3:
            side = math.isqrt(maps.shape[1])
            maps = maps.transpose(1, 2).unflatten(2, (side, -1))
        return maps                                                                             # (B, S, h, w)

    x = torch.linspace(-1, 1, 2 * channels * size ** 2).view(2, channels, size, size)
    try:
        with torch.no_grad():
            maps = [features(x[:B]) for B in (1, 2)]
    except Exception as error:                                  # whatever a foreign network does
        reason = " ".join(str(error).split())[:120]
        shape = (channels, size, size)
        raise UserError(f"--teacher {path}: does not take one or two pictures {shape}: {reason}") from None
    good = [y.ndim == 4 and len(y) == B and y.shape[2] == y.shape[3] for B, y in zip((1, 2), maps)]
    shape = tuple(maps[-1].shape)
    require(all(good), f"--teacher {path}: gives {shape} where maps (B, S, h, h) are wanted")
    # Traced or exported in training mode it has no switch: it draws dropout, or takes norms over the batch.
    alone, beside = maps
    frozen = (alone[0] - beside[0]).abs().max() <= 1e-3 * beside.abs().max()
    require(frozen, f"--teacher {path}: an image's features change with the call; export it after .eval()")
    return features


def init_state(cfg, model, name="ema", new=()):
    """The state that --init's checkpoint has for `model`; UserError where it does not fit.

    name: what the checkpoint calls it; tables of classes, tensors named in `new`, stay the model's own where
    their shape differs.
    """
    state = read_checkpoint(cfg.init, folder(cfg).parent.name, device_of(cfg))["state"]
    found = state.get(name)
    have = f"{cfg.init}: has no {name} to start from; it has {', '.join(state)}"
    require(isinstance(found, dict) and all(map(torch.is_tensor, found.values())), have)
    own = model.state_dict()
    found = {key: own[key] if key in new and key in own and value.shape != own[key].shape else value
             for key, value in found.items()}
    for key in dict.fromkeys([*own, *found]):
        ours = list(own[key].shape) if key in own else "nothing"
        theirs = list(found[key].shape) if key in found else "nothing"
        require(ours == theirs, f"{cfg.init}: does not fit: {key} is {theirs} there and {ours} here")
    return found


def load_init(run, model, name="ema", new=()):
    """--init: begin with another run's averaged weights (init_state), unless a stage goes on from its own."""
    cfg = run.cfg
    if run.begins:
        load_into({name: model}, {"state": {name: init_state(cfg, model, name, new)}}, cfg.init)
        if rank() == 0:
            print(f"begins with the averaged weights of {cfg.init}", flush=True)


# --- Sampling of tokens --------------------------------------------------------
#
# What all models of tokens do to draw from their logits, and to work through many rows in blocks.


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Logits (rows, V) under temperature, top-k (0: all) and top-p (1: all), float64; what is cut is -inf."""
    logits = logits.double() / temperature                                                      # (rows, V)
    if top_k:
        least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]                         # (rows, 1)
        logits = logits.masked_fill(logits < least, -math.inf)                                  # (rows, V)
    if top_p < 1:
        order = logits.argsort(1)                               # the least likely first        # (rows, V)
        mass = logits.softmax(1).gather(1, order).cumsum(1)                                     # (rows, V)
        cut = mass <= 1 - top_p                                                                 # (rows, V)
        cut[:, -1] = False                                      # the likeliest always stays
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), -math.inf)    # (rows, V)
    return logits


def invert_distribution(logits, u):
    """Ids (rows,) from logits (rows, V): their distribution function, inverted at uniform u (rows,).

    So the same draws give the same ids, with a cache and without, whatever else is in the batch.
    """
    mass = logits.softmax(1).cumsum(1)                                                          # (rows, V)
    height = u[:, None].double() * mass[:, -1:]                                                 # (rows, 1)
    return torch.searchsorted(mass, height, right=True)[:, 0]                                   # (rows)


def in_blocks(function, device, *tensors, size=100):
    """function(*tensors) on blocks of `size` rows, computed on the device, joined on the CPU."""
    blocks = zip(*(tensor.split(size) for tensor in tensors))
    return torch.cat([function(*(part.to(device) for part in block)).cpu() for block in blocks])


def parse_classes(text, K):
    """Labels of "all" or "3,5" as a list; UserError where one is not below K."""
    if text == "all":
        return list(range(K))
    require(re.fullmatch(r"\d+(,\d+)*", text), f"--classes {text}: write all, or labels as 3,5")
    labels = [int(word) for word in text.split(",")]
    require(max(labels) < K, f"--classes {text}: labels are 0 to {K - 1}")
    return labels


def class_names(saved, K):
    """K names of a checkpoint's classes, as its data set had them."""
    return saved["classes"] or [f"class {k}" for k in range(K)]


# --- Pictures ------------------------------------------------------------------
#
# PNG (still or animated) and SVG, written from their specifications, so that a run needs no package to show
# what it does. Letters are strokes of a few points each, drawn at any height.

# of curves and bars, over and over
COLORS = ("#2864b4", "#dc6e1e", "#3c963c", "#b43232", "#825aaa", "#787878", "#1e9696", "#c8a000") * 9


# An entry is a character and its polylines, separated by commas. A point is two digits, x then y; a point
# given twice is a dot. Rows: 0 descender, 2 baseline, 7 top of small letters, 9 top of capitals and digits.
STROKES = r"""
!0904,0202 "0907,2927 #1219,4249,0454,0757 $47381807163544331304,2922 %0269,0929270709,4464624244
&621718293948470403123255 '0907 (29070321 )09272301 *2925,0846,0648 +2723,0545 ,222110 -0535 .1212 /0149
0120407193947443212 1072922,0242 208193948460242 308193948473616,364543321203 432390444 5490906364543321203
63929070312324345361605 7094912 816070819394847361605031232434536 91222444839190806153546 :1616,1212
;2626,222110 <380532 =0444,0646 >083502 ?08193948472524,2222 @5121030729597774635457,5647372624334354
A023962,1454 B02094958574606,4655534202 C5849290704224253 D02093957543202 E49090242,0636 F490902,0636
G58492907042242535535 H0209,5259,0656 I0222,1219,0929 J4943321203 K0209,4905,1652 L090242 M0209356962
N02095259 O220407294967644222 P02094958564505 Q220407294967644222,4461 R02094958564505,2552
S584919080716465553421203 T0969,3932 U090312425359 V093269 W0922476289 X0259,0952 Y093669,3632 Z09590252
[29090121 \0941 ]09292101 ^072947 _0151 `0917 a0617374642,45150403123243 b0902,0312324346371706
c4637170603123243 d4942,4332120306173746 e044446371706031242 f39291812,0737 g47413010,4637170603123243
h0902,0617374642 i0702,0909 j27211000,2929 k0902,3704,1542 l090312 m0207,0617273632,3647576662
n0207,0617374642 o120306173746433212 p0700,0312324346371706 q4740,4332120306173746 r0207,052737
s471706153544433202 t19132232,0737 u0703123243,4742 v072247 w0722364267 x0742,0247 y0722,47221000 z07470242
{392918160514122131 |0900 }091928263524221101 ~051626354556 ±2824,0646,0242 ×0347,0743 ·0505 °1708192817
"""
GLYPHS = {entry[0]: entry[1:].split(",") for entry in STROKES.split()}
BOX = ["0242490902"]


def strokes(char, unit):
    """Starts and ends of a character's segments, snapped to pixels: x + 1j * y, complex (2, S).

    unit: pixels a step of the grid that the strokes are written on.
    """
    quads = []                                                  # x and y of the start, x and y of the end
    for line in GLYPHS.get(char, BOX):
        quads += [list(line[i:i + 4]) for i in range(0, len(line) - 2, 2)]
    columns = np.array(quads, float).T
    x = columns[[0, 2]]
    y = columns[[1, 3]]
    right = x.max()
    stretch = round(right * unit) / max(right, 1)
    return np.round(x * stretch) + 1j * np.floor((y + 0.5) * unit)


@functools.lru_cache(maxsize=4096)
def glyph_bitmap(char, height):
    """Coverage of one character with its side bearings: float (height, width) in 0..1."""
    gap = max(2, round(height / 5))
    if char == " ":
        return np.zeros((height, 2 * gap))
    start, end = strokes(char, height / 11)
    width = int(max(start.real.max(), end.real.max())) + gap
    columns = np.arange(width) - (gap - 1) // 2
    rows = np.arange(height)[::-1, None]
    offset = (columns + 1j * rows)[..., None] - start
    step = end - start
    along = (offset * step.conj()).real / np.maximum(abs(step) ** 2, 1)
    distance = abs(offset - np.clip(along, 0, 1) * step).min(axis=-1)
    half_width = 0.25 + 0.025 * height
    return np.clip(0.5 + half_width - distance, 0, 1)


def text_bitmap(text, height=13):
    """Draw one line of text: float32 (height, width) in 0..1, where 1 is full ink."""
    bitmaps = [np.zeros((height, 0))]
    bitmaps += [glyph_bitmap(char, height) for char in text]
    return np.concatenate(bitmaps, axis=1, dtype=np.float32)


def to_uint8(x):
    """[-1, 1] to bytes: the inverse of v / 127.5 - 1, clipped; on the CPU."""
    return (x.detach().float().cpu() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def write_text(canvas, x, y, text, height):
    """Write a text in dark grey into a picture uint8 (height, width, 3), its top left corner at (x, y)."""
    ink = text_bitmap(text, height)[:, :, None]
    place = canvas[y:y + ink.shape[0], x:x + ink.shape[1]]
    ink = ink[:place.shape[0], :place.shape[1]]
    place[:] = np.rint(place + ink * (40.0 - place))


def grid(images, columns, rows=(), heads=(), scale=1):
    """Images uint8 (M, C, H, W) as one picture uint8 (height, width, 3), `columns` to a row, on white.

    C is 1 (grey) or 3; two pixels lie between images.

    rows and heads are texts beside each row and above each column; scale enlarges small pictures.
    """
    pixels = torch.as_tensor(images).permute(0, 2, 3, 1)
    pixels = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    high = pixels.shape[1] + 2
    wide = pixels.shape[2] + 2
    lines = -(-len(pixels) // columns)
    widest = max([text_bitmap(text, 13).shape[1] for text in heads], default=0)
    size = 13 if widest <= wide else 10                         # of the heads: they share a column's width
    left = 2
    if any(rows):
        left = 10 + max(text_bitmap(text, 13).shape[1] for text in rows)
    top = 20 if any(heads) else 2
    canvas = np.full((top + lines * high, left + columns * wide, 3), 255, np.uint8)
    for i, image in enumerate(pixels[..., :3].numpy()):         # one channel spreads over three
        row, column = divmod(i, columns)
        y = top + row * high
        x = left + column * wide
        canvas[y:y + high - 2, x:x + wide - 2] = image
    for i, text in enumerate(rows):
        write_text(canvas, 4, top + i * high + max(0, (high - 18) // 2), text, 13)
    for i, text in enumerate(heads):
        margin = max(0, wide - text_bitmap(text, size).shape[1]) // 2
        write_text(canvas, left + i * wide + margin, 2, text, size)
    return canvas


def png(path, picture, seconds=0.1):
    """Write uint8 (H, W, 3) as a PNG; (frames, H, W, 3) as an animated one that loops for ever.

    seconds: how long a frame stays. Programs that know no animation show the first frame.
    """

    def chunk(kind, body=b""):
        return pack(">I4s", len(body), kind) + body + pack(">I", zlib.crc32(kind + body))

    frames = np.asarray(picture).reshape(-1, *np.shape(picture)[-3:])
    count, height, width, _ = frames.shape
    out = chunk(b"IHDR", pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    if count > 1:
        out += chunk(b"acTL", pack(">2I", count, 0))
    for i, frame in enumerate(frames):
        rows = np.pad(frame.reshape(height, -1), ((0, 0), (1, 0)))                  # filter 0 for each row
        body = zlib.compress(rows.tobytes())
        if count > 1:
            number = max(0, 2 * i - 1)
            out += chunk(b"fcTL", pack(">5I2HH", number, width, height, 0, 0, round(seconds * 1000), 1000, 0))
        out += chunk(b"fdAT", pack(">I", 2 * i) + body) if i else chunk(b"IDAT", body)
    write_atomic(path, lambda file: file.write(b"\x89PNG\r\n\x1a\n" + out + chunk(b"IEND")))


def columns_png(path, columns, heads=(), rows=(), side=48):
    """Columns of images (M, C, r, r) in [-1, 1] as a PNG, each at its own side r, centred on white.

    The largest are enlarged to about `side` pixels.
    """
    largest = max(x.shape[-1] for x in columns)
    padded = []
    for x in columns:
        before = (largest - x.shape[-1]) // 2
        after = largest - x.shape[-1] - before
        padded.append(F.pad(x, (before, after, before, after), value=1.0))
    x = torch.stack(padded, 1).flatten(0, 1)
    png(path, grid(to_uint8(x), len(columns), rows, heads, scale=max(1, side // largest)))


def prefixes_png(path, decode, ids, counts, names, head, extra=(), side=48):
    """A row an image, a column a number k of counts: what decode(ids[:, :k]) makes of the first k tokens.

    ids (M, K); head(k, images) is a column's title; extra: (title, function of the last column) pairs.
    """
    columns = [decode(ids[:, :k]) for k in counts]
    heads = [head(k, x) for k, x in zip(counts, columns)]
    last = columns[-1]
    for title, function in extra:
        heads.append(title)
        columns.append(function(last))
    columns_png(path, columns, heads, names, side)


def export_images(path, blocks, count):
    """Write `count` images, blocks (m, C, H, W) in [-1, 1], C = 1 or 3, without holding more than one block.

    PATH.npz: arr_0, uint8 (count, H, W, C), which the evaluation suite of guided diffusion (ADM) reads. Any
    other path: a folder of PNGs, which pytorch-fid, clean-fid and torch-fidelity read.
    """
    if rank() > 0:                                              # it takes part in making the blocks
        for _ in blocks:
            pass
        return
    packed = Path(path).suffix == ".npz"
    folder = Path(path).parent if packed else Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    require(os.access(folder, os.W_OK), f"--export {path}: no right to write there")
    mixed = not packed and any(folder.glob("*.png"))
    require(not mixed, f"--export {path}: holds pictures already, which would count; name another folder")
    pixels = (to_uint8(block).permute(0, 2, 3, 1).numpy() for block in blocks)
    if packed:
        write_atomic(path, lambda file: write_npz(file, pixels, count))
        return
    number = 0
    for block in pixels:
        for picture in block:
            png(Path(path, f"{number:06}.png"), np.broadcast_to(picture, (*picture.shape[:2], 3)))
            number += 1


def write_npz(file, blocks, count, name="arr_0", **others):
    """An uncompressed npz of one array `name` (count, ...) from blocks of its rows and small others.

    np.savez would want all of it at once; here a header comes first and each block follows.
    """
    with zipfile.ZipFile(file, "w") as archive:
        for key, array in others.items():
            with archive.open(f"{key}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(array))
        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            for i, block in enumerate(blocks):
                if i == 0:
                    kind = np.lib.format.dtype_to_descr(block.dtype)
                    header = {"descr": kind, "fortran_order": False, "shape": (count, *block.shape[1:])}
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(np.ascontiguousarray(block).tobytes())


def svg(path, width, height, parts):
    """Write SVG elements (strings) on a white ground."""
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="sans-serif" font-size="12">'
            '<path d="M0 0h9999v9999H0" fill="white"/>')
    write_atomic(path, lambda file: file.write("\n".join([head, *parts, "</svg>\n"]).encode()))


def svg_text(x, y, text, anchor="middle", extra=""):
    """A text as an SVG element; `extra` holds more attributes."""
    text = str(text).replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{text}</text>'


def axis(values, log, start, length):
    """Of one axis of a chart: place(v) in pixels, and its round marks as (pixel, text).

    start and length are pixels; a logarithmic axis of values that are not all positive becomes a linear one.
    """
    low = min(values, default=0)
    high = max(values, default=1)
    scale = math.log10 if log and low > 0 else float
    if low == high:
        high += abs(low) + 1

    def place(value):
        return start + length * (scale(value) - scale(low)) / (scale(high) - scale(low))

    unit = 10.0 ** math.floor(math.log10((high - low) / 3))
    unit *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * unit) < 6)
    marks = [k * unit for k in range(math.ceil(low / unit), math.floor(high / unit) + 1)]
    if scale is math.log10 and high > 10 * low:
        digits = (1, 2, 5) if high < 1000 * low else (1,)
        powers = range(math.floor(scale(low)), math.ceil(scale(high)) + 1)
        marks = [m * 10.0 ** k for k in powers for m in digits]
    return place, [(place(mark), f"{mark:.5g}") for mark in marks if low <= mark <= high]


def line_chart(path, series, title="", xlabel="", ylabel="", logx=False, logy=False):
    """Write {name: (xs, ys)} or {name: (xs, ys, spreads)} as an SVG; a spread is a bar at its point.

    Points that are not finite are left out; curves of fewer than 20 points show each of them.
    """
    curves = []
    for curve in series.values():
        points = [(*point, 0)[:3] for point in zip(*curve)]
        curves.append([point for point in points if all(map(math.isfinite, point))])
    px, xmarks = axis([x for curve in curves for x, _, _ in curve], logx, 70, 500)
    py, ymarks = axis([v for curve in curves for _, y, e in curve for v in (y - e, y + e)], logy, 300, -250)
    parts = [svg_text(320, 28, title, extra='font-size="14" font-weight="bold"'), svg_text(320, 345, xlabel),
             svg_text(16, 175, ylabel, extra='transform="rotate(-90 16 175)"')]
    parts += [f'<path d="M{x:.1f} 50v250" stroke="#ddd"/>' + svg_text(x, 318, text) for x, text in xmarks]
    parts += [f'<path d="M70 {y:.1f}h500" stroke="#ddd"/>' + svg_text(64, y + 4, t, "end") for y, t in ymarks]
    for i, (color, name, curve) in enumerate(zip(COLORS, series, curves)):
        line = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y, _ in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(svg_text(582, 62 + 18 * i, name, "start", f'fill="{color}" font-weight="bold"'))
        if len(curve) < 20:
            for x, y, e in curve:
                parts.append(f'<path d="M{px(x):.1f} {py(y - e):.1f}V{py(y + e):.1f}" stroke="{color}"/>')
                parts.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3" fill="{color}"/>')
    svg(path, 780, 360, parts)


# --- Judges and read-outs ------------------------------------------------------
#
# Two small classifiers stand in for Inception and LPIPS where there is no download: the teacher gives
# features to losses, the ruler measures. They are trained on disjoint halves of the 'judge' split (drawn
# data: pictures that no model has trained on; files: those of the training split). No model sees the ruler,
# so none can learn to please it. Their Frechet distances are toy figures, to be compared with one another.


class Judge(nn.Module):
    """A small classifier of images (B, C, H, W) in [-1, 1]: three convolutions, 64 features, K logits.

    It trains in seconds on one core, and tells the drawn shapes apart at 16 pixels and more.
    """

    def __init__(self, channels, width, classes, side=16):
        super().__init__()
        strides = (2 if side > 16 else 1, 1, 1)
        widths = (channels, width, 2 * width, 64)
        layers = []
        for i, stride in enumerate(strides):
            layers += [nn.MaxPool2d(2), nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1), nn.ReLU()]
        self.body = nn.Sequential(*layers[1:])
        self.head = nn.Linear(64, classes)

    def spatial(self, x):
        """Feature maps (B, 64, h, w). Sides above 32 are pooled first, sides below 8 are enlarged to 8."""
        if x.shape[-1] < 8:
            x = F.interpolate(x, (8, 8), mode="nearest")
        return self.body(F.avg_pool2d(x, max(1, x.shape[-1] // 32)))                    # (B, 64, h, w)

    def features(self, x):
        """Features (B, 64): the maps' means."""
        return self.spatial(x).mean((2, 3))                                             # (B, 64)

    def forward(self, x):
        """Logits (B, K)."""
        return self.head(self.features(x))                                              # (B, K)


@torch.enable_grad()
def judge(data, role):
    """The 'teacher' (features for losses) or the 'ruler' (metrics alone), trained on disjoint halves of data.

    data: a 'judge' split with labels (M,), classes and pixels(index) -> (B, C, H, W). One thread, so that the
    same pictures get the same figure on every machine of a kind. Kept in runs/judges.
    """
    sample = data.pixels(np.arange(0, len(data), max(1, len(data) // 256)))
    recipe = inspect.getsource(Judge) + inspect.getsource(train_judge)
    digest = hashlib.sha256(recipe.encode() + sample.numpy().tobytes() + np.asarray(data.labels).tobytes())
    path = Path("runs/judges", f"{role}-{digest.hexdigest()[:16]}.pt")
    width = 24 if role == "ruler" else 32
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed({"ruler": 5, "teacher": 7}[role])
        network = Judge(sample.shape[1], width, len(data.classes), sample.shape[-1])
    if path.exists():
        try:
            network.load_state_dict(torch.load(path, weights_only=True))
            return network.eval().requires_grad_(False)
        except Exception as error:                              # cut short by a full disk, or foreign
            print(f"{path}: cannot be read ({type(error).__name__}); training it anew", flush=True)
    try:
        torch.set_num_threads(1)
        train_judge(network, data, role)
    finally:
        torch.set_num_threads(threads)
    write_atomic(path, lambda file: torch.save(network.state_dict(), file))
    return network.eval().requires_grad_(False)


def train_judge(network, data, role, steps=700):
    """Train on one half of the data: 700 batches of 64, Adam, one cycle of the learning rate."""
    halves = torch.randperm(len(data), generator=make_generator(0, 0, "halves")).chunk(2)
    half = halves[1] if role == "ruler" else halves[0]
    opt = torch.optim.Adam(network.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=steps)
    for step in tqdm(range(steps), f"training the {role}", disable=None):
        index = half[torch.randint(len(half), (64,), generator=make_generator(0, step, role))].numpy()
        value = F.cross_entropy(network(data.pixels(index)), torch.as_tensor(data.labels[index]))
        opt.zero_grad()
        value.backward()
        opt.step()
        schedule.step()


@torch.no_grad()
def accuracy(network, images, labels):
    """The share of images (M, C, H, W) in [-1, 1] that the judge puts into their class."""
    logits = torch.cat([network(block) for block in images.float().cpu().split(250)])
    return (logits.argmax(1) == torch.as_tensor(labels)).double().mean().item()


@torch.no_grad()
def measure_samples(images, labels, ruler, test):
    """What the ruler says of samples (M, C, H, W): class accuracy, and Frechet distance to test images.

    Beside the distance stands its floor, that between as many test images and others; N is how many each.
    From fewer than 65 images, one more than features, no distance is computed: both are None.
    """
    N = min(len(images), len(test) // 2)
    result = {"N": N, "accuracy": accuracy(ruler, images, labels), "distance": None, "floor": None}
    if N > 64:
        real = torch.cat([ruler.features(test.pixels(rows)) for rows in np.array_split(np.arange(2 * N), 2)])
        fake = torch.cat([ruler.features(block) for block in images[:N].split(250)])
        result["distance"] = frechet(fake, real[:N])
        result["floor"] = frechet(real[N:], real[:N])
    return result


def nearest(images, dataset):
    """The training images nearest in pixels to images (M, ...): has the model copied? In blocks of 256 MB."""
    flat = images.float().flatten(1)
    best = torch.full((len(flat),), math.inf)
    found = torch.zeros(len(flat), dtype=torch.long)
    for rows in np.array_split(np.arange(len(dataset)), 1 + dataset.images.size // 2**26):
        distance, place = torch.cdist(flat, dataset.pixels(rows).flatten(1)).min(1)
        closer = distance < best
        best = torch.where(closer, distance, best)
        found = torch.where(closer, torch.as_tensor(rows)[place], found)
    return dataset.pixels(found.numpy())


def frechet(a, b):
    """Frechet distance of Gaussians fitted to features (M, 64) and (N, 64), in float64. A toy FD, not FID.

    |mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)), the last as the sum of the roots of the
    eigenvalues of C_a C_b, which are never negative but for rounding.
    """
    a = a.double()
    b = b.double()
    ca = torch.cov(a.T)
    cb = torch.cov(b.T)
    cross = torch.linalg.eigvals(ca @ cb).real.clamp(min=0).sqrt().sum()         # trace of (Ca Cb)^(1/2)
    return ((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * cross).item()


def flops(function):
    """FLOPs of function(), by torch's own counter: a multiply-add counts 2, elementwise work nothing.

    Attention is computed by matrix products meanwhile, since the counter does not know the CPU's flash
    kernel; gradients of grouped convolutions are counted as they are: torch's formula forgets the groups.
    """
    backward = torch.ops.aten.convolution_backward
    counter = FlopCounterMode(display=False, custom_mapping={backward: conv_backward})
    with sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return counter.get_total_flops()


def conv_backward(grad, x, weight, *others, out_shape=None):
    """FLOPs of a convolution's backward, from shapes: each of its two gradients costs one forward."""
    _, _, _, _, transposed, _, _, wanted = others               # wanted: of x, of the weights, of the bias
    side = x if transposed else grad                            # each of its pixels meets the whole kernel
    once = 2 * side[0] * math.prod(side[2:]) * math.prod(weight)
    return once * sum(map(bool, wanted[:2]))


def memory(device):
    """Peak MiB of the CUDA allocator, or of the whole process; None where it cannot be told (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

