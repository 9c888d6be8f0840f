"""Mechanics that no paper could disagree about: command line, launch, randomness, runs, pictures, judges.

Method files call these by name (`common.draws`, `common.Run`, ...); nothing here knows what a model computes.
One idea runs through it: **randomness is a function of (seed, step)**, so that a run can stop, go on, log and draw
pictures, in one process or several, without changing what it learns.

Read in this order: Command line, Launch, Randomness, Runs, Pictures, Charts, Judges, Read-outs.
"""

import argparse
import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import struct
import sys
import time
import typing
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# --- Command line --------------------------------------------------------------

FREE = ("steps", "log", "save", "gpus", "device", "resume")    # what a resumed run may change


class UserError(Exception):
    """A mistake that one line can explain: printed on stderr without a traceback, then exit `code`."""

    def __init__(self, message, code=2):
        super().__init__(" ".join(str(message).split()))
        self.code = code


def need(condition, message):
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def quit_with(error):
    """Print the error's one line (rank 0 alone) and exit with its code."""
    if rank() == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.code)


def cli(Config, PRESETS, doc, argv=None):
    """The command line as a Config: defaults, then the preset, then what was given. A mistake exits with 2.

    `--resume` and `--sample` start from the run's or checkpoint's own configuration and refuse to contradict it.
    """
    parser = argparse.ArgumentParser(
        description=f"{doc}\nPresets: {', '.join(PRESETS)}", usage="python %(prog)s [--field value] [--flag] ...",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS)
    parser.error = lambda message: quit_with(UserError(f"{message}; --help lists every flag"))
    helps = dict(re.findall(r"^    (\w+): [^#\n]*# (.*)$", inspect.getsource(Config), re.M))
    for field in dataclasses.fields(Config):
        choices = PRESETS.keys() if field.name == "preset" else typing.get_args(field.type) or None
        how = {"type": type(field.default), "choices": choices, "metavar": field.name.upper()}
        text = f"{helps.get(field.name, '')} (default {field.default!r})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", help=text, **(
            {"action": argparse.BooleanOptionalAction} if field.type is bool else how))
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", Config.preset)
    try:
        cfg = dataclasses.replace(Config(), **{"preset": preset, **PRESETS[preset], **given})
        cfg.name = cfg.name or cfg.preset
        need(re.fullmatch(r"[\w.+-]+", cfg.name), f"--name {cfg.name}: letters, digits and . _ + - only")
        stored = folder(cfg) / "config.json"
        if cfg.sample:
            stored = read_checkpoint(cfg.sample, method_of(Config))["config"]
            return stored_config(Config, stored, given, (*Config.sampling, "sample", "seed", "device"), cfg.sample)
        if cfg.resume and stored.exists():
            return stored_config(Config, json.loads(stored.read_text()), given, FREE, stored)
        return cfg
    except UserError as error:
        quit_with(error)


def stored_config(Config, stored, given, free, source):
    """The stored configuration, changed in the fields that are free; any other flag that differs is refused."""
    odd = {field.name for field in dataclasses.fields(Config)} ^ set(stored)
    need(not odd, f"{source}: written by another version of this file (fields {', '.join(sorted(odd))})")
    for name, value in given.items():
        need(name in free or value == stored[name],
             f"--{name} {value}: {source} has {stored[name]}, and only {', '.join(free)} may change here")
    return Config(**{**stored, **given})


def is_preset(cfg, PRESETS):
    """True where cfg is exactly its preset, but for where and how often it writes: only then a target counts."""
    exact = dataclasses.replace(type(cfg)(), **{"preset": cfg.preset, **PRESETS[cfg.preset]})
    free = {name: getattr(cfg, name) for name in ("name", "resume", "log", "save")}
    return cfg == dataclasses.replace(exact, **free)


def method_of(thing):
    """The method file that a class or function was defined in: 'arflow', 'gpipe', ..."""
    return Path(inspect.getfile(thing)).stem


# --- Launch --------------------------------------------------------------------

def launch(main, cfg, processes=None):
    """Run main(cfg) in `processes` processes (default cfg.gpus), or as the worker that torchrun started.

    The method file's check(cfg) (every bad input) and prepare(cfg) (downloads, judges) run before, once. Exits
    with main's code where it is not 0, with 2 after a user's mistake, with 128 + signal after a signal.
    """
    processes = processes or cfg.gpus
    try:
        if "RANK" in os.environ:
            code = worker(main, cfg, first=True)
        else:
            check(main, cfg, processes)
            main.__globals__["prepare"](cfg)
            code = main(cfg) if processes == 1 else spawn(main, cfg, processes)
    except UserError as error:
        quit_with(error)
    if code:
        sys.exit(code)


def check(main, cfg, processes):
    """What all methods ask of a configuration, then what this one asks."""
    for name in ("steps", "batch", "gpus", "log", "save"):
        need(getattr(cfg, name) >= 1, f"--{name} {getattr(cfg, name)}: must be at least 1")
    need(cfg.lr > 0, f"--lr {cfg.lr}: must be above 0")
    gpus = torch.cuda.device_count()
    need(cfg.device != "cuda" or gpus, "--device cuda: this machine has no CUDA GPU; leave the flag out")
    if gpus and cfg.device != "cpu" and "RANK" not in os.environ:
        need(cfg.gpus <= gpus, f"--gpus {cfg.gpus}: this machine has {gpus}; ask for fewer, or add --device cpu")
    need(cfg.batch % processes == 0, f"--batch {cfg.batch}: must be a multiple of the {processes} processes")
    main.__globals__["check"](cfg)


def spawn(main, cfg, processes):
    """Start the workers with torch's elastic launcher; return 0 or the exit code of the first that failed."""
    os.environ["LOGLEVEL"] = "CRITICAL"                         # silences the launcher's own log
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    if cfg.device == "cpu" or not torch.cuda.is_available():
        print(f"no GPU in use: {processes} processes share the CPU over gloo", flush=True)
    config = LaunchConfig(1, 1, processes, run_id=str(os.getpid()), rdzv_endpoint="localhost:0",
                          rdzv_backend="c10d", max_restarts=0, monitor_interval=0.1, local_addr="localhost")
    try:
        return max(elastic_launch(config, worker)(main, cfg).values())
    except SignalException as stop:
        return 128 + stop.sigval.value
    except ChildFailedError as failed:
        codes = [failure.exitcode for failure in failed.failures.values()]
        return next((code if code > 0 else 128 - code for code in codes if code), 1)


def worker(main, cfg, first=False):
    """One process of several: join the group, run main, leave. Under torchrun (first) also check and prepare."""
    local, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    cuda = torch.cuda.is_available() and cfg.device != "cpu"
    if cuda:
        torch.cuda.set_device(local)
    else:
        torch.set_num_threads(max(1, os.cpu_count() // local_world))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        if first:
            check(main, cfg, dist.get_world_size())
            if local == 0:
                main.__globals__["prepare"](cfg)
            dist.barrier()
        code = main(cfg) or 0
    except UserError as error:
        quit_with(error)
    dist.destroy_process_group()
    return code


def rank():
    """This process's number; 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """The number of processes; 1 when it is alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device_of(cfg):
    """The torch.device that this process computes on."""
    cuda = torch.cuda.is_available() and cfg.device != "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


# --- Randomness ----------------------------------------------------------------

def draws(seed, step, stream, device="cpu"):
    """A generator that depends on (seed, step, stream) alone. Draw for the GLOBAL batch, then take `mine`."""
    digest = hashlib.sha256(f"{seed}/{step}/{stream}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)         # 63 bits


def mine(x):
    """This rank's equal slice, along the first axis, of what was drawn for the global batch."""
    part = len(x) // world()
    return x[rank() * part:(rank() + 1) * part]


def seed_dropout(seed, step):
    """Reseed torch's default generator, which dropout inside modules draws from; differs by rank."""
    torch.manual_seed(draws(seed, step, f"dropout {rank()}").initial_seed())


def average_gradients(params):
    """After backward: each gradient becomes its mean over the processes, in one flattened all_reduce."""
    if world() > 1:
        grads = [p.grad for p in params if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        parts = (flat / world()).split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads)])


@torch.no_grad()
def ema_update(ema, model, decay):
    """ema <- decay ema + (1 - decay) model, all parameters at once."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def autocast(cfg):
    """bf16 on CUDA with --bf16; otherwise nothing."""
    return torch.autocast("cuda", torch.bfloat16, enabled=cfg.bf16 and device_of(cfg).type == "cuda")


# --- Runs ----------------------------------------------------------------------

def folder(cfg):
    """runs/<method>/<name>, below the current directory."""
    return Path("runs") / method_of(type(cfg)) / cfg.name


def write_atomic(path, write):
    """write(file) into a temporary file, fsync, rename: readers see the old file or the new one, never half."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                    # torch.save reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot save ({error}); the file before it is untouched", code=1) from None


def read_checkpoint(path, method, device="cpu"):
    """What Run.save wrote; UserError where the file is missing, broken or another method's."""
    need(Path(path).is_file(), f"{path}: no such checkpoint")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        found = saved["method"]
    except Exception as error:
        raise UserError(f"{path}: not a checkpoint of this project ({str(error)[:80]})") from None
    need(found == method, f"{path}: a checkpoint of {found}.py, not of {method}.py")
    return saved


def load_into(objects, saved, path):
    """Load a checkpoint's state dicts into objects {name: module or optimizer}; UserError names what misfits."""
    for name, thing in objects.items():
        try:
            thing.load_state_dict(saved["state"][name])
        except (KeyError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[-1]
            raise UserError(f"{path}: does not fit this configuration ({name}: {reason})") from None


class Run:
    """One run's folder, log, checkpoints and signals. All ranks decide alike; rank 0 alone writes.

    run = Run(cfg)
    start = run.restore(model=model, ema=ema, opt=opt)
    for step in run.steps(start): ...; run.log(step, loss=value); run.save(step)
    A file with stages gives each its own checkpoint: Run(cfg, "ae", cfg.steps_ae).
    """

    def __init__(self, cfg, stage="last", steps=None):
        self.cfg, self.stage, self.total = cfg, stage, steps or cfg.steps
        self.sums, self.count, self.signal, self.signal_time = {}, 0, 0, 0.0
        base, number = cfg.name, 2
        while rank() == 0 and not cfg.resume and (folder(cfg) / f"{stage}.pt").exists():
            cfg.name, number = f"{base}-{number}", number + 1   # a finished or broken-off run is never written over
        names = [cfg.name]
        if world() > 1:
            dist.broadcast_object_list(names)
        cfg.name, self.folder = names[0], folder(cfg).with_name(names[0])
        self.checkpoint = self.folder / f"{stage}.pt"
        suffix = "" if stage == "last" else f"-{stage}"
        self.log_path, self.chart = self.folder / f"log{suffix}.jsonl", self.folder / f"loss{suffix}.svg"
        if cfg.name != base:
            self.say(f"{folder(cfg).with_name(base)} holds a run; this one goes to {self.folder}")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True    # as the papers trained

    def say(self, text):
        """Print on rank 0, above the progress bar."""
        if rank() == 0:
            tqdm.write(text)
            sys.stdout.flush()

    def restore(self, **objects):
        """Name all that a checkpoint must hold; with --resume, load it. Returns the number of finished steps."""
        self.objects, step, cfg = objects, 0, self.cfg
        if cfg.resume and self.checkpoint.exists():
            saved = read_checkpoint(self.checkpoint, method_of(type(cfg)), device_of(cfg))
            load_into(objects, saved, self.checkpoint)
            step, self.sums, self.count = saved["step"], saved["sums"], saved["count"]
        elif cfg.resume:
            self.say(f"{self.checkpoint}: no checkpoint yet, starting at step 0")
        if rank() == 0:
            stored = json.dumps(dataclasses.asdict(cfg) | {"resume": False}, indent=1)
            write_atomic(self.folder / "config.json", lambda file: file.write(stored.encode()))
            source = Path(inspect.getfile(type(cfg)))
            shutil.copyfile(source, self.folder / source.name)
            kept = [line for line in self.lines() if line["step"] <= step]      # the rest will be written again
            self.log_path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        modules = [thing for thing in objects.values() if isinstance(thing, nn.Module)]
        if world() > 1:
            sums = torch.stack([p.detach().double().sum().cpu() for m in modules for p in m.parameters()])
            gathered = [torch.empty_like(sums) for _ in range(world())]
            dist.all_gather(gathered, sums)
            need(all(torch.equal(other, sums) for other in gathered), "the processes hold different weights")
        where = device_of(cfg)
        chip = torch.cuda.get_device_name() if where.type == "cuda" else f"{torch.get_num_threads()} threads"
        self.say(f"{self.folder}: {where.type} ({chip}), {world()} x {dist.get_backend() if world() > 1 else 'alone'}"
                 f", {'bf16' if cfg.bf16 and where.type == 'cuda' else 'fp32'}, batch {cfg.batch}, "
                 f"{sum(p.numel() for p in modules[0].parameters() if p.requires_grad):,} parameters, "
                 f"steps {step} to {self.total}")
        return step

    def lines(self):
        """The log as a list of dicts; a line that a crash cut short is dropped."""
        lines = self.log_path.read_text().splitlines() if self.log_path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def steps(self, start):
        """Yield the step numbers, with a progress bar on a terminal; SIGINT and SIGTERM wait for Run.save."""
        handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        quiet = rank() > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=self.total, initial=start, desc=self.stage, disable=quiet, dynamic_ncols=True)
        self.clock = time.perf_counter()
        try:
            for step in range(start, self.total):
                yield step
                self.bar.update()
        finally:
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_signal(self, number, frame):
        """Remember the first signal. A second counts after 5 s: a terminal delivers one Ctrl-C twice."""
        if self.signal and time.monotonic() - self.signal_time > 5:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self.signal_time = number, time.monotonic()

    def due(self, step, every):
        """True at every `every`-th finished step and at the last one."""
        return (step + 1) % every == 0 or step + 1 == self.total

    def log(self, step, **values):
        """Add 0-d tensors to running sums; at log steps read them, average over ranks, write and show one line."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + torch.as_tensor(value).detach().double()
        self.count += 1
        if not self.due(step, self.cfg.log):
            return
        means = torch.stack([total.cpu() for total in self.sums.values()]) / self.count
        if world() > 1:
            dist.all_reduce(means)
        record = dict(zip(self.sums, (means / world()).tolist()))
        self.guard(step, record)
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        self.sums, self.count = {}, 0
        if rank() == 0:
            line = {"step": step + 1, **record, "seconds": seconds, "memory": memory(device_of(self.cfg))}
            with open(self.log_path, "a") as file:
                file.write(json.dumps(line) + "\n")
        text = "  ".join(f"{name} {value:.4f}" for name, value in record.items())
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            self.say(f"step {step + 1}/{self.total}  {text}  {seconds:.1f} s")

    def guard(self, step, record):
        """Stop at a number that is not finite, and say from where one can go on."""
        bad = [name for name, value in record.items() if not math.isfinite(value)]
        last = f"last good checkpoint: {self.checkpoint}" if self.checkpoint.exists() else "no checkpoint yet"
        if bad:
            raise UserError(f"step {step + 1}: {', '.join(bad)} is not finite; {last}; try a smaller --lr", code=1)

    def save(self, step):
        """Write the checkpoint when it is due, or when a signal has come to any rank: then all leave."""
        number = torch.tensor(self.signal)
        if world() > 1:
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        if number or self.due(step, self.cfg.save):
            self.guard(step, {name: float(total) for name, total in self.sums.items()})
            if rank() == 0:
                self.write(step + 1)
        if number:
            self.say(f"signal {int(number)}: {self.checkpoint} holds step {step + 1}; go on with --resume")
            sys.exit(128 + int(number))

    def write(self, step):
        """The checkpoint (plain containers and tensors; every tenth is kept) and the picture of the losses."""
        saved = {"method": method_of(type(self.cfg)), "config": dataclasses.asdict(self.cfg) | {"resume": False},
                 "step": step, "sums": self.sums, "count": self.count,
                 "state": {name: thing.state_dict() for name, thing in self.objects.items()}}
        kept = [self.folder / f"{self.stage}-{step}.pt"] if step % (10 * self.cfg.save) == 0 else []
        for path in [self.checkpoint, *kept]:
            write_atomic(path, lambda file: torch.save(saved, file))
        lines = self.lines()
        names = [name for name in (lines[0] if lines else ()) if name not in ("step", "seconds", "memory")]
        if names:
            xs = [line["step"] for line in lines]
            series = {name: (xs, [line[name] for line in lines]) for name in names}
            line_chart(self.chart, series, self.cfg.name, "step", logy=True)


# --- Pictures ------------------------------------------------------------------

FONT = dict(zip("0123456789abcdefghijklmnopqrstuvwxyz.,-+=%:/", (
    "75557 26227 71747 71717 55711 74717 74757 71111 75757 75717 25755 65656 34443 65556 74647 74644 34553 "
    "55755 72227 11152 55655 44447 57755 65555 25552 65644 25531 65655 34216 72222 55557 55552 55775 55255 "
    "55222 71247 00002 00024 00700 02720 07070 51245 02020 11244").split()))   # 5 rows of 3 bits: octal digits


def to_uint8(x):
    """Images (..., C, H, W) in [-1, 1] to bytes: the inverse of v / 127.5 - 1, rounded and clipped."""
    return (x.detach().float().cpu() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def write_text(canvas, row, column, text):
    """Small letters into a uint8 canvas (H, W, 3): 8 pixels a letter, 10 high."""
    for i, letter in enumerate(text.lower()):
        bits = [[int(digit) >> b & 1 for b in (2, 1, 0)] for digit in FONT.get(letter, "00000")]
        for y, x in np.argwhere(bits) * 2:
            canvas[row + y:row + y + 2, column + 8 * i + x:column + 8 * i + x + 2] = 40


def grid(images, columns, rows=(), heads=(), scale=1):
    """Images uint8 (M, C, H, W) as one picture uint8 (height, width, 3), `columns` to a row, on white.

    rows and heads are texts beside each row and above each column; scale repeats pixels, for small pictures.
    """
    x = torch.as_tensor(images).permute(0, 2, 3, 1)
    x = x.expand(-1, -1, -1, 3) if x.shape[-1] == 1 else x[..., :3]
    x = x.repeat_interleave(scale, 1).repeat_interleave(scale, 2).numpy()
    left, top = 6 + 8 * max(map(len, rows), default=0), 16 if heads else 2
    high, wide = x.shape[1] + 2, x.shape[2] + 2
    canvas = np.full((top + -(-len(x) // columns) * high, left + columns * wide, 3), 255, np.uint8)
    for i, image in enumerate(x):
        y, z = top + i // columns * high, left + i % columns * wide
        canvas[y:y + high - 2, z:z + wide - 2] = image
    for i, text in enumerate(rows):
        write_text(canvas, top + i * high + (high - 12) // 2, 3, text)
    for i, text in enumerate(heads):
        write_text(canvas, 3, left + i * wide + max(0, (wide - 8 * len(text)) // 2), text)
    return canvas


def chunk(kind, body):
    """One PNG chunk: length, kind, body, checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(path, picture, seconds=0.1):
    """Write uint8 (H, W, 3) as a PNG; (frames, H, W, 3) as an animated one that loops for ever."""
    frames = np.asarray(picture).reshape(-1, *np.shape(picture)[-3:])
    count, height, width, _ = frames.shape
    out = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))]
    out += [chunk(b"acTL", struct.pack(">2I", count, 0))] if count > 1 else []
    for i, frame in enumerate(frames):
        body = zlib.compress(np.pad(frame.reshape(height, -1), ((0, 0), (1, 0))).tobytes(), 9)   # filter 0 a row
        timing = struct.pack(">5I2H2B", max(0, 2 * i - 1), width, height, 0, 0, round(seconds * 1000), 1000, 0, 0)
        out += [chunk(b"fcTL", timing)] if count > 1 else []
        out += [chunk(b"fdAT", struct.pack(">I", 2 * i) + body) if i else chunk(b"IDAT", body)]
    write_atomic(path, lambda file: file.write(b"".join([*out, chunk(b"IEND", b"")])))


# --- Charts --------------------------------------------------------------------

COLORS = ("#2864b4", "#dc6e1e", "#3c963c", "#b43232", "#825aaa", "#787878", "#1e9696", "#c8a000")


def svg(path, width, height, parts):
    """Write SVG elements (strings) on a white ground."""
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="sans-serif" font-size="12"><rect width="100%" height="100%" '
            'fill="white"/>')
    write_atomic(path, lambda file: file.write("\n".join([head, *parts, "</svg>\n"]).encode()))


def svg_text(x, y, text, anchor="middle", extra=""):
    """One SVG text element."""
    text = str(text).replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{text}</text>'


def axis(values, log):
    """(place, marks): place(v) in 0..1 along an axis that holds the values, and about five round marks."""
    low, high = min(values), max(values)
    low, high = (low, high) if low < high else (low / 1.1 - (not log), high * 1.1 + (not log))
    f = math.log10 if log else float
    unit = 10.0 ** math.floor(math.log10((f(high) - f(low)) / 3))
    unit = next(unit * m for m in (1, 2, 5, 10) if (f(high) - f(low)) / (m * unit) < 6)
    marks = [k * unit for k in range(math.ceil(f(low) / unit), math.floor(f(high) / unit) + 1)]
    return lambda v: (f(v) - f(low)) / (f(high) - f(low)), [10 ** m if log else m for m in marks]


def line_chart(path, series, title="", xlabel="", ylabel="", logx=False, logy=False):
    """Write {name: (xs, ys)} or {name: (xs, ys, spreads)} as an SVG; a spread is drawn as a bar at its point."""
    curves = {name: (*curve, [0] * len(curve[0]))[:3] for name, curve in series.items()}
    xs = [x for curve in curves.values() for x in curve[0]]
    ys = [y + side * e for curve in curves.values() for y, e in zip(*curve[1:]) for side in (-1, 1)]
    (px, xmarks), (py, ymarks) = axis(xs, logx and min(xs) > 0), axis(ys, logy and min(ys) > 0)
    parts = [svg_text(320, 28, title, extra='font-weight="bold"'), svg_text(320, 345, xlabel),
             svg_text(16, 175, ylabel, extra='transform="rotate(-90 16 175)"')]
    for mark in xmarks:
        parts += [f'<path d="M{70 + 500 * px(mark):.1f} 50v250" stroke="#ddd"/>',
                  svg_text(70 + 500 * px(mark), 318, f"{mark:.4g}")]
    for mark in ymarks:
        parts += [f'<path d="M70 {300 - 250 * py(mark):.1f}h500" stroke="#ddd"/>',
                  svg_text(64, 304 - 250 * py(mark), f"{mark:.4g}", "end")]
    for i, (name, curve) in enumerate(curves.items()):
        color = COLORS[i % len(COLORS)]
        points = [(70 + 500 * px(x), 300 - 250 * py(y)) for x, y in zip(*curve[:2])]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts += [f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>',
                  svg_text(580, 62 + 18 * i, name, "start", f'fill="{color}" font-weight="bold"')]
        for (x, _), y, e in zip(points, *curve[1:]):
            ends = f"{300 - 250 * py(y - e):.1f}V{300 - 250 * py(y + e):.1f}" if e else ""
            parts += [f'<path d="M{x:.1f} {ends}" stroke="{color}"/>'] if e else []
        if len(points) < 20:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
    svg(path, 760, 360, parts)


def bar_chart(path, groups, title="", unit=""):
    """Write {group: {name: value or (value, spread)}} as an SVG of horizontal bars with their numbers."""
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    top = max(np.max(value) for bars in groups.values() for value in bars.values()) or 1
    parts, y = [svg_text(380, 28, title, extra='font-weight="bold"')], 44
    for group, bars in groups.items():
        parts.append(svg_text(20, y + 16, group, "start", 'font-weight="bold"'))
        y += 22
        for name, value in bars.items():
            value, spread = (*value, 0)[:2] if isinstance(value, (tuple, list)) else (value, 0)
            shown = f"{value:.4g}{f' ± {spread:.2g}' if spread else ''} {unit}"
            color = COLORS[names.index(name) % len(COLORS)]
            length = 400 * max(value, 0) / top
            parts += [svg_text(190, y + 12, name, "end"), svg_text(206 + length, y + 12, shown, "start"),
                      f'<rect x="200" y="{y}" width="{length:.1f}" height="15" fill="{color}"/>']
            y += 19
    svg(path, 760, y + 20, parts)


# --- Judges --------------------------------------------------------------------

class Judge(nn.Module):
    """A small classifier of images (B, C, H, W) in [-1, 1]; sides above 32 pixels are pooled down first."""

    def __init__(self, channels, width, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 64, 3, padding=1)
        self.head = nn.Linear(64, classes)

    def spatial(self, x):
        """Feature map (B, 64, h, w), at a quarter of the (pooled) resolution."""
        x = F.avg_pool2d(x, max(1, x.shape[-1] // 32))
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.conv3(x))

    def features(self, x):
        """Features (B, 64): the map averaged over space."""
        return self.spatial(x).mean((2, 3))

    def forward(self, x):
        """Class logits (B, classes)."""
        return self.head(self.features(x))


def judge(data, role):
    """The 'teacher' (features for losses) or the 'ruler' (metrics alone): never the same network or images.

    Both are trained on disjoint halves of `data` (its 'judge' split), independent of --seed, and kept in
    runs/judges. `data` has labels (M,), classes and pixels(index) -> (B, C, H, W) in [-1, 1].
    """
    sample = data.pixels(np.arange(0, len(data), max(1, len(data) // 256)))
    recipe = inspect.getsource(Judge) + inspect.getsource(train_judge)
    digest = hashlib.sha256(recipe.encode() + sample.numpy().tobytes() + np.asarray(data.labels).tobytes())
    path = Path("runs/judges") / f"{role}-{digest.hexdigest()[:16]}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(role))
        network = Judge(sample.shape[1], {"teacher": 32, "ruler": 24}[role], len(data.classes))
        if path.exists():
            network.load_state_dict(torch.load(path, weights_only=True))
        else:
            train_judge(network, data, role)
            write_atomic(path, lambda file: torch.save(network.state_dict(), file))
    return network.eval().requires_grad_(False)


def train_judge(network, data, role, steps=300, batch=96):
    """Adam under a one-cycle learning rate, on the teacher's or the ruler's half of the data."""
    order = torch.randperm(len(data), generator=draws(0, 0, "judge halves"))
    half = order[:len(data) // 2] if role == "teacher" else order[len(data) // 2:]
    opt = torch.optim.Adam(network.parameters(), fused=True)
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=steps)
    for step in tqdm(range(steps), desc=f"training the {role}", disable=not sys.stderr.isatty()):
        index = half[torch.randint(len(half), (batch,), generator=draws(0, step, role))].numpy()
        value = F.cross_entropy(network(data.pixels(index)), torch.as_tensor(data.labels[index]))
        opt.zero_grad()
        value.backward()
        opt.step()
        plan.step()


@torch.no_grad()
def judged(network, images):
    """(class logits, features) of images (M, C, H, W) in [-1, 1], computed in blocks."""
    features = torch.cat([network.features(block) for block in images.float().cpu().split(250)])
    return network.head(features), features


def accuracy(network, images, labels):
    """Share of images (M, C, H, W) in [-1, 1] that the judge puts into their own class."""
    return (judged(network, images)[0].argmax(1) == torch.as_tensor(labels)).double().mean().item()


def frechet(a, b):
    """Frechet distance of Gaussians fitted to features (M, 64) and (N, 64), in float64. A toy FD, not FID."""
    (a, ca), (b, cb) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (a, b))
    values, vectors = torch.linalg.eigh(ca)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp(min=0).sqrt().sum()
    return ((a - b).square().sum() + ca.trace() + cb.trace() - 2 * cross).item()


# --- Read-outs -----------------------------------------------------------------

def flops(function):
    """Floating-point operations of function(), by torch's own counter (one multiply-add counts 2)."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def memory(device):
    """Peak memory in MiB: of the CUDA allocator, or of the process (resident set) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
