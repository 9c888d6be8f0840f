"""Mechanics that no paper could disagree about; nothing here knows what a model computes.

One idea runs through it: randomness is a function of (seed, step), so that a run can stop, go on, log and
draw, in one process or several, without changing what it learns.
"""
import hashlib
import inspect
import json
import logging
import math
import os
import re
import resource
import signal
import sys
import time
import zlib
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from dataclasses import asdict, fields
from pathlib import Path
from struct import pack

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


# --- Command line --------------------------------------------------------------
class UserError(Exception):                 # a mistake that one line can explain; ends with exit code `code`
    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code
def need(condition, message, code=2):       # raise UserError(message) unless the condition holds
    if not condition:
        raise UserError(message, code)

def quit_with(error):                       # in one line; rank 0 speaks for all, unless another fails alone
    code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "code", 2)
    if rank() > 0:                                              # by then the launcher has ended this process
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))
        time.sleep(5)
    print("error:", " ".join(str(error).split()) or "interrupted", file=sys.stderr, flush=True)
    sys.exit(code)

def cli(Config, PRESETS, doc, argv=None):
    """The command line as a Config: defaults, then the preset, then what was given. --resume and --sample
    start from the stored configuration and refuse to contradict it."""
    parser = ArgumentParser(
        description=f"{doc}\nPresets: {', '.join(PRESETS)}", usage="python %(prog)s [--field value] [--flag]",
        formatter_class=RawDescriptionHelpFormatter, argument_default=SUPPRESS, allow_abbrev=False)
    parser.error = lambda message: need(False, f"{message}; --help lists every flag")
    helps = dict(re.findall(r"^    (\w+): [^#\n]*# (.*)$", inspect.getsource(Config), re.M))
    for field in fields(Config):
        words = PRESETS if field.name == "preset" else getattr(field.type, "__args__", None)
        how = {"type": type(field.default), "choices": words, "metavar": field.name.upper()}
        how = {"action": BooleanOptionalAction} if field.type is bool else how
        text = f"{helps.get(field.name, '')} (default {field.default!r})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", help=text, **how)
    try:
        given = vars(parser.parse_args(argv))
        preset = given.get("preset", Config.preset)
        cfg = Config(**{"preset": preset, **PRESETS[preset], **given})
        cfg.name = cfg.name or re.sub(r"[^\w.+-]", "-", preset)
        need(re.fullmatch(r"\w[\w.+-]*", cfg.name), f"--name {cfg.name}: letters, digits and . _ + - only")
        source = cfg.sample or folder(cfg) / "config.json"
        free = ("steps", "log", "save", "gpus", "device", "stage", "resume")
        if cfg.sample:
            free = ("sample", "seed", "device", *Config.sampling)
            stored = read_checkpoint(source, folder(cfg).parent.name)["config"] | {"gpus": 1}
        elif cfg.resume and source.exists():
            stored = json.loads(source.read_text())
        else:
            return cfg
        odd = ", ".join({field.name for field in fields(Config)} ^ set(stored))
        need(not odd, f"{source}: written by another version of this file (fields {odd})")
        for name, value in given.items():
            fine = name in free or name.startswith("steps_") and cfg.resume or value == stored[name]
            need(fine, f"--{name} {value}: {source} has {stored[name]!r}; free are {', '.join(free)}")
        return Config(**{**stored, **given})
    except (UserError, OSError) as error:
        quit_with(error)
    except json.JSONDecodeError as error:
        quit_with(f"{source}: {error}")

def is_preset(cfg, PRESETS):                # but for where and how often it writes: then a target counts
    free = {name: getattr(cfg, name) for name in ("name", "resume", "log", "save")}
    return cfg == type(cfg)(**{"preset": cfg.preset, **PRESETS[cfg.preset], **free})

# --- Launch --------------------------------------------------------------------
def launch(main, cfg, processes=None):
    """The method's check(cfg), once its prepare(cfg), then main(cfg) in `processes` processes (cfg.gpus), or
    as one that spawn or torchrun has started. Exits with main's code unless 0, 2 (mistake), 128 + signal."""
    local = os.environ.get("LOCAL_RANK", "0")
    processes = int(os.environ.get("WORLD_SIZE", processes or cfg.gpus))
    try:
        check(main, cfg, processes)
        if processes > 1 and "RANK" in os.environ:
            if device_of(cfg).type == "cuda":
                torch.cuda.set_device(int(local))
            torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["LOCAL_WORLD_SIZE"])))
            dist.init_process_group("gloo" if device_of(cfg).type == "cpu" else "cpu:gloo,cuda:nccl")
        if local == "0" and os.environ.get("TORCHELASTIC_RUN_ID") != "prepared":
            main.__globals__["prepare"](cfg)
        barrier()
        code = main(cfg) if world() == processes else spawn(main, cfg, processes)
        if world() > 1:
            dist.destroy_process_group()
    except (UserError, OSError, KeyboardInterrupt) as error:        # all else is a bug
        quit_with(error)
    if code:
        sys.exit(code)

def check(main, cfg, processes):            # what all methods ask of a configuration, then what this one asks
    have, asked = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", cfg.gpus))
    for name in ("steps", "batch", "gpus", "log", "save"):
        need(getattr(cfg, name) >= 1, f"--{name} {getattr(cfg, name)}: must be at least 1")
    need(0 < cfg.lr < math.inf, f"--lr {cfg.lr}: must be above 0")
    need(cfg.batch % processes == 0, f"--batch {cfg.batch}: must be a multiple of the {processes} processes")
    words = ("auto", "cpu", "cuda")[:3 if have else 2]
    need(cfg.device in words, f"--device {cfg.device}: this machine has {', '.join(words)}")
    need(cfg.device == "cpu" or not have or asked <= have,
         f"--gpus {asked}: this machine has {have}; ask for fewer, or add --device cpu")
    main.__globals__["check"](cfg)

def spawn(main, cfg, processes):            # by torch's elastic launcher; returns the exit code of who failed
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
        elastic_launch(config, launch)(main, cfg)
    except SignalException as stop:
        return 128 + stop.sigval.value
    except ChildFailedError as failed:
        code = max(failure.exitcode for failure in failed.failures.values())
        return code if code > 0 else 128 - code                 # below 0: ended by that signal

def rank():                                 # this process's number; 0 when it is alone
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))
def world():                                # the number of processes; 1 when it is alone
    return dist.get_world_size() if dist.is_initialized() else 1
def barrier():                              # wait until all processes are here
    if world() > 1:
        dist.barrier()
def device_of(cfg):                         # the torch.device that this process computes on
    return torch.device("cuda" if torch.cuda.is_available() and cfg.device != "cpu" else "cpu")
def autocast(cfg):                          # bf16 on CUDA with --bf16; otherwise nothing
    return torch.autocast("cuda", torch.bfloat16, enabled=cfg.bf16 and device_of(cfg).type == "cuda")

# --- Randomness and averages ---------------------------------------------------
def draws(seed, step, stream, device="cpu"):
    """A generator that depends on (seed, step, stream) alone. Draw for the GLOBAL batch, then take `mine`."""
    digest = hashlib.sha256(f"{seed}/{step}/{stream}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)         # 63 bits

def mine(x):                                # this rank's equal slice, along axis 0, of what was drawn for all
    part = len(x) // world()
    return x[rank() * part:(rank() + 1) * part]
def seed_dropout(seed, step):               # reseed what dropout inside modules draws from; differs by rank
    torch.manual_seed(draws(seed, step, f"dropout {rank()}").initial_seed())
def average(x):                             # the tensor x, averaged over the processes in place
    if world() > 1:
        dist.all_reduce(x.div_(world()))
    return x
def average_gradients(params):              # gradients become means over the processes, in one all_reduce
    grads = [p.grad for p in params if p.grad is not None and world() > 1]
    if grads:
        parts = average(torch.cat([g.reshape(-1) for g in grads])).split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads)])

@torch.no_grad()
def ema_update(ema, model, decay):          # ema <- decay ema + (1 - decay) model, all parameters at once
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)

# --- Runs ----------------------------------------------------------------------
def folder(cfg):                            # runs/<method>/<name>; the method is the file that defines Config
    return Path("runs", Path(inspect.getfile(type(cfg))).stem, cfg.name)

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
        temporary.unlink(missing_ok=True)

def read_checkpoint(path, method, device="cpu"):    # what Run.save wrote; UserError: broken, another method's
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        found, _ = saved["method"], saved["config"]
    except Exception as error:                                  # whatever the bytes provoke
        raise UserError(f"{path}: not a checkpoint of this project ({str(error)[:80]})") from None
    need(found == method, f"{path}: a checkpoint of {found}.py, not of {method}.py")
    return saved

def load_into(objects, saved, path):        # a checkpoint's state into {name: module or optimizer}
    for name, thing in objects.items():
        try:
            thing.load_state_dict(saved["state"][name])
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: does not fit ({name}: {str(error).splitlines()[-1]})") from None

class Run:
    """One run's folder, log, checkpoints and signals. All ranks decide alike; rank 0 alone writes.
    run = Run(cfg)                                  a file with stages: Run(cfg, "ae", cfg.steps_ae) for each
    start = run.restore(model=model, ema=ema, opt=opt)
    for step in run.steps(start): ...; run.log(step, loss=value); run.save(step)
    """
    def __init__(self, cfg, stage="last", steps=None):
        self.cfg, self.stage, self.total, self.device = cfg, stage, steps or cfg.steps, device_of(cfg)
        self.sums, self.lines, self.signal, self.since = {}, [], 0, 0.0
        base, number = folder(cfg), 2
        while not cfg.resume and (folder(cfg) / f"{stage}.pt").exists():        # a run is never written over
            cfg.name, number = f"{base.name}-{number}", number + 1
        self.config = asdict(cfg) | {"resume": False}
        self.folder, suffix = folder(cfg), "" if stage == "last" else f"-{stage}"
        self.checkpoint, self.log_path = self.folder / f"{stage}.pt", self.folder / f"log{suffix}.jsonl"
        self.chart = self.folder / f"loss{suffix}.svg"
        if self.folder != base:
            self.say(f"{base} holds a run; this one goes to {self.folder}")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True     # as the papers

    def say(self, text):                    # print on rank 0, above the progress bar
        if rank() == 0:
            tqdm.write(text)
            sys.stdout.flush()

    def restore(self, **objects):
        """Name all that a checkpoint must hold; with --resume, load it. Returns the finished steps."""
        self.objects, step, cfg, source = objects, 0, self.cfg, Path(inspect.getfile(type(self.cfg)))
        if cfg.resume and self.checkpoint.exists():
            saved = read_checkpoint(self.checkpoint, source.stem, self.device)
            load_into(objects, saved, self.checkpoint)
            step, self.sums = saved["step"], saved["sums"]
        elif cfg.resume:
            self.say(f"{self.checkpoint}: no checkpoint yet, starting at step 0")
        if step and self.log_path.exists():                     # a crash may have cut its last line short
            whole = [line for line in self.log_path.read_text().splitlines() if line.endswith("}")]
            self.lines = [line for line in map(json.loads, whole) if line["step"] <= step]
        alike = torch.allclose(average(self.weight_sums()), self.weight_sums(), rtol=1e-12, atol=0)
        need(alike, "the processes start with different weights")
        if rank() == 0:
            log = "".join(json.dumps(line) + "\n" for line in self.lines)
            texts = json.dumps(self.config, indent=1), source.read_text(), log
            for name, text in zip(("config.json", source.name, self.log_path.name), texts):
                write_atomic(self.folder / name, lambda file: file.write(text.encode()))
        chip, precision = f"cpu ({torch.get_num_threads()} threads)", "fp32"
        if self.device.type == "cuda":
            chip, precision = torch.cuda.get_device_name(), "bf16" if cfg.bf16 else "tf32"
        params = sum(p.numel() for p in next(iter(objects.values())).parameters() if p.requires_grad)
        backend = f"es over {dist.get_backend()}" if world() > 1 else ""
        self.say(f"{self.folder}: {chip}, {world()} process{backend}, {precision}, batch {cfg.batch}, "
                 f"{params:,} parameters, steps {step} to {self.total}")
        return step
    def weight_sums(self):                  # one a parameter: equal on all ranks at first, finite when saved
        modules = [thing for thing in self.objects.values() if isinstance(thing, nn.Module)]
        return torch.stack([p.detach().double().sum().cpu() for m in modules for p in m.parameters()])

    def steps(self, start):                 # the step numbers, with a progress bar; signals wait for save
        handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        todo, self.clock = range(start, self.total), time.perf_counter()
        self.bar = tqdm(todo, self.stage, self.total, initial=start, disable=rank() > 0 or None)
        try:
            yield from self.bar
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    def on_signal(self, number, frame):     # a second counts after 5 s: a terminal delivers Ctrl-C twice
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
        if time.monotonic() - self.since > 5:
            os._exit(128 + number)
    def due(self, step, every):             # true at every `every`-th finished step and at the last one
        return (step + 1) % every == 0 or step + 1 == self.total

    def log(self, step, **values):          # sum up 0-d tensors or numbers; at log steps check, write, show
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float64, device=self.device).detach().reshape(1)
            self.sums[name] = self.sums.get(name, 0) + F.pad(value, (0, 1), value=1.0)          # sum, count
        if not self.due(step, self.cfg.log):
            return
        sums = {name: average(pair.cpu()) for name, pair in self.sums.items()}
        record = {name: (total / count).item() for name, (total, count) in sums.items()}
        self.guard(step + 1, record)
        seconds, self.clock, self.sums = time.perf_counter() - self.clock, time.perf_counter(), {}
        self.lines.append({"step": step + 1, **record, "seconds": seconds, "memory": memory(self.device)})
        text = "  ".join(f"{name} {value:.4f}" for name, value in record.items())
        self.bar.set_postfix_str(text)
        if rank() == 0:
            with open(self.log_path, "a") as file:
                file.write(json.dumps(self.lines[-1]) + "\n")
        if self.bar.disable:
            self.say(f"step {step + 1}/{self.total}  {text}  {seconds:.1f} s")
    def guard(self, step, values):          # stop at a number that is not finite; say where to go on from
        bad = ", ".join(name for name, value in values.items() if not math.isfinite(value))
        last = f"last good checkpoint: {self.checkpoint}" if self.checkpoint.exists() else "no checkpoint yet"
        need(not bad, f"step {step}: {bad} is not finite; {last}; try a smaller --lr", code=1)

    def save(self, step):                   # when due, or when a signal has come to any: then all leave
        number = torch.tensor(self.signal)
        if world() > 1:
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        if number or self.due(step, self.cfg.save):
            self.guard(step + 1, {"sum of weights": self.weight_sums().sum()})
            self.sums = {name: average(pair.cpu()).to(self.device) for name, pair in self.sums.items()}
            if rank() == 0:
                self.write(step + 1)
        if number:
            self.say(f"signal {int(number)}: {self.checkpoint} holds step {step + 1}; go on with --resume")
            barrier()                                           # an early exit would end the one that writes
            sys.exit(128 + int(number))

    def write(self, step):                  # the checkpoint (every tenth is kept) and the chart of the losses
        saved = {"method": self.folder.parent.name, "config": self.config, "step": step, "sums": self.sums,
                 "state": {name: thing.state_dict() for name, thing in self.objects.items()}}
        kept = [self.folder / f"{self.stage}-{step}.pt"] if step % (10 * self.cfg.save) == 0 else []
        for path in [*kept, self.checkpoint]:
            write_atomic(path, lambda file: torch.save(saved, file))
        lines = self.lines[::1 + len(self.lines) // 1000]
        names = dict.fromkeys(k for line in lines for k in line if k not in ("step", "seconds", "memory"))
        curves = {k: zip(*[(line["step"], line[k]) for line in lines if k in line]) for k in names}
        line_chart(self.chart, curves, self.cfg.name, "step", logy=True)

# --- Pictures ------------------------------------------------------------------
FONT = dict(zip("0123456789abcdefghijklmnopqrstuvwxyz.,-+=%:/", (             # 5 rows of 3 bits: octal digits
    "75557 26227 71747 71717 55711 74717 74757 71111 75757 75717 25755 65656 34443 65556 74647 74644 34553 "
    "55755 72227 11152 55655 44447 57755 65555 25552 65644 25531 65655 34216 72222 55557 55552 55775 55255 "
    "55222 71247 00002 00024 00700 02720 07070 51245 02020 11244").split()))
COLORS = ("#2864b4", "#dc6e1e", "#3c963c", "#b43232", "#825aaa", "#787878", "#1e9696", "#c8a000") * 9

def to_uint8(x):                            # [-1, 1] to bytes: the inverse of v / 127.5 - 1, clipped
    return (x.detach().float().cpu() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)

def grid(images, columns, rows=(), heads=(), scale=1):
    """Images uint8 (M, C, H, W) as one picture uint8 (height, width, 3), `columns` to a row, on white;
    rows and heads are texts beside each row and above each column; scale enlarges small pictures."""
    x = torch.as_tensor(images).permute(0, 2, 3, 1).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    high, wide, lines = x.shape[1] + 2, x.shape[2] + 2, -(-len(x) // columns)
    left, top = 6 + 8 * max(map(len, rows), default=0), 16 if heads else 2
    canvas = np.full((top + lines * high, left + columns * wide, 3), 255, np.uint8)
    for i, image in enumerate(x[..., :3].numpy()):              # one channel spreads over three
        y, z = top + i // columns * high, left + i % columns * wide
        canvas[y:y + high - 2, z:z + wide - 2] = image
    texts = [(top + i * high + (high - 12) // 2, 3, text) for i, text in enumerate(rows)]
    texts += [(3, left + i * wide + max(0, wide - 8 * len(text)) // 2, text) for i, text in enumerate(heads)]
    for y, z, text in texts:                                    # letters are 6 pixels wide, 10 high, 8 apart
        for i, letter in enumerate(text.lower()):
            bits = [[int(digit) >> b & 1 for b in (2, 1, 0)] for digit in FONT.get(letter, "00000")]
            for dy, dx in np.argwhere(bits) * 2 + (y, z + 8 * i):
                canvas[dy:dy + 2, dx:dx + 2] = 40
    return canvas

def png(path, picture, seconds=0.1):
    """Write uint8 (H, W, 3) as a PNG; (frames, H, W, 3) as an animated one that loops for ever."""
    frames = np.asarray(picture).reshape(-1, *np.shape(picture)[-3:])
    count, height, width, _ = frames.shape
    chunk = lambda kind, body=b"": pack(">I4s", len(body), kind) + body + pack(">I", zlib.crc32(kind + body))
    out = chunk(b"IHDR", pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    out += chunk(b"acTL", pack(">2I", count, 0)) if count > 1 else b""
    for i, frame in enumerate(frames):
        timing = pack(">5I2HH", max(0, 2 * i - 1), width, height, 0, 0, round(seconds * 1000), 1000, 0)
        body = zlib.compress(np.pad(frame.reshape(height, -1), ((0, 0), (1, 0))).tobytes())   # filter 0 a row
        out += chunk(b"fcTL", timing) if count > 1 else b""
        out += chunk(b"fdAT", pack(">I", 2 * i) + body) if i else chunk(b"IDAT", body)
    write_atomic(path, lambda file: file.write(b"\x89PNG\r\n\x1a\n" + out + chunk(b"IEND")))

def svg(path, width, height, parts):        # write SVG elements (strings) on a white ground
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
    head += f' width="{width}" height="{height}" font-size="12"><path d="M0 0h9999v9999H0" fill="white"/>'
    write_atomic(path, lambda file: file.write("\n".join([head, *parts, "</svg>\n"]).encode()))
def svg_text(x, y, text, anchor="middle", extra=""):
    text = str(text).replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{text}</text>'

def axis(values, log, start, length):       # place(v) in pixels, and round marks as (pixel, text)
    low, high = min(values, default=0), max(values, default=1)
    f = math.log10 if log and low > 0 else float
    high += (abs(low) + 1) * (low == high)
    place = lambda v: start + length * (f(v) - f(low)) / (f(high) - f(low))
    unit = 10.0 ** math.floor(math.log10((high - low) / 3))
    unit *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * unit) < 6)
    marks = [k * unit for k in range(math.ceil(low / unit), math.floor(high / unit) + 1)]
    if f is math.log10 and high > 10 * low:
        digits = (1, 2, 5) if high < 1000 * low else (1,)
        marks = [m * 10.0 ** k for k in range(math.floor(f(low)), math.ceil(f(high)) + 1) for m in digits]
    return place, [(place(mark), f"{mark:.5g}") for mark in marks if low <= mark <= high]

def line_chart(path, series, title="", xlabel="", ylabel="", logx=False, logy=False):
    """Write {name: (xs, ys)} or {name: (xs, ys, spreads)} as an SVG; a spread is a bar at its point."""
    curves = [[(*p, 0)[:3] for p in zip(*curve) if all(map(math.isfinite, p))] for curve in series.values()]
    px, xmarks = axis([x for curve in curves for x, _, _ in curve], logx, 70, 500)
    py, ymarks = axis([v for curve in curves for _, y, e in curve for v in (y - e, y + e)], logy, 300, -250)
    parts = [svg_text(320, 28, title, extra='font-size="14" font-weight="bold"'), svg_text(320, 345, xlabel),
             svg_text(16, 175, ylabel, extra='transform="rotate(-90 16 175)"')]
    parts += [f'<path d="M{x:.1f} 50v250" stroke="#ddd"/>' + svg_text(x, 318, text) for x, text in xmarks]
    parts += [f'<path d="M70 {y:.1f}h500" stroke="#ddd"/>' + svg_text(64, y + 4, t, "end") for y, t in ymarks]
    for i, (color, name, curve) in enumerate(zip(COLORS, series, curves)):
        line = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y, _ in curve)
        parts += [f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>',
                  svg_text(582, 62 + 18 * i, name, "start", f'fill="{color}" font-weight="bold"')]
        for x, y, e in curve if len(curve) < 20 else ():
            parts += [f'<path d="M{px(x):.1f} {py(y - e):.1f}V{py(y + e):.1f}" stroke="{color}"/>',
                      f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3" fill="{color}"/>']
    svg(path, 780, 360, parts)

def bar_chart(path, groups, title="", unit=""):
    """Write {group: {name: value or (value, spread)}} as an SVG of horizontal bars with their numbers."""
    colors = dict(zip(dict.fromkeys(name for bars in groups.values() for name in bars), COLORS))
    top = max([np.max(value) for bars in groups.values() for value in bars.values()] + [1e-12])
    parts, y = [svg_text(360, 28, title, extra='font-size="14" font-weight="bold"')], 46
    for group, bars in groups.items():
        parts.append(svg_text(20, y + 12, group, "start", 'font-weight="bold"'))
        for name, value in bars.items():
            (value, spread), y = (*np.atleast_1d(value), 0)[:2], y + 20
            text = f"{value:.4g}{f' ± {spread:.2g}' if spread else ''} {unit}"
            length = 340 * max(value, 0) / top
            parts += [f'<rect x="200" y="{y}" width="{length:.1f}" height="15" fill="{colors[name]}"/>',
                      svg_text(190, y + 12, name, "end"), svg_text(206 + length, y + 12, text, "start")]
        y += 28
    svg(path, 720, y, parts)

# --- Judges and read-outs ------------------------------------------------------
class Judge(nn.Module):                     # a small classifier of images (B, C, H, W) in [-1, 1]
    def __init__(self, channels, width, classes, side=16):
        super().__init__()
        sizes = ((channels, width, 1 + (side > 16)), (width, 2 * width, 1), (2 * width, 64, 1))
        layers = [x for i, o, s in sizes for x in (nn.MaxPool2d(2), nn.Conv2d(i, o, 3, s, 1), nn.ReLU())]
        self.body, self.head = nn.Sequential(*layers[1:]), nn.Linear(64, classes)
    def spatial(self, x):                   # sides above 32 are pooled first
        return self.body(F.avg_pool2d(x, max(1, x.shape[-1] // 32)))                    # (B, 64, h, w)
    def features(self, x):
        return self.spatial(x).mean((2, 3))                                             # (B, 64)
    def forward(self, x):
        return self.head(self.features(x))                                              # (B, K)

@torch.enable_grad()
def judge(data, role):
    """The 'teacher' (features for losses) or the 'ruler' (metrics alone), trained on disjoint halves of data:
    a 'judge' split with labels (M,), classes and pixels(index) -> (B, C, H, W). Kept in runs/judges."""
    sample = data.pixels(np.arange(0, len(data), max(1, len(data) // 256)))
    recipe = inspect.getsource(Judge) + inspect.getsource(judge)
    digest = hashlib.sha256(recipe.encode() + sample.numpy().tobytes() + np.asarray(data.labels).tobytes())
    path = Path("runs/judges", f"{role}-{digest.hexdigest()[:16]}.pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(role))
        network = Judge(sample.shape[1], 24 if role == "ruler" else 32, len(data.classes), sample.shape[-1])
    if not path.exists():
        half = torch.randperm(len(data), generator=draws(0, 0, "halves")).chunk(2)[role == "ruler"]
        opt = torch.optim.Adam(network.parameters(), fused=True)
        plan = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=700)
        for step in tqdm(range(700), f"training the {role}", disable=None):
            index = half[torch.randint(len(half), (64,), generator=draws(0, step, role))].numpy()
            value = F.cross_entropy(network(data.pixels(index)), torch.as_tensor(data.labels[index]))
            opt.zero_grad()
            value.backward()
            opt.step()
            plan.step()
        write_atomic(path, lambda file: torch.save(network.state_dict(), file))
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval().requires_grad_(False)

@torch.no_grad()
def accuracy(network, images, labels):      # share of images in [-1, 1] that the judge puts into their class
    logits = torch.cat([network(block) for block in images.float().cpu().split(250)])
    return (logits.argmax(1) == torch.as_tensor(labels)).double().mean().item()
def nearest(images, dataset):               # the training images nearest in pixels: has the model copied?
    blocks = np.array_split(np.arange(len(dataset)), 1 + dataset.images.size // 2**26)         # of 256 MB
    far = [torch.cdist(images.float().flatten(1), dataset.pixels(rows).flatten(1)) for rows in blocks]
    return dataset.pixels(torch.cat(far, 1).argmin(1).numpy())

def frechet(a, b):
    """Frechet distance of Gaussians fitted to features (M, 64) and (N, 64), in float64. A toy FD, not FID."""
    (a, ca), (b, cb) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (a, b))
    cross = torch.linalg.eigvals(ca @ cb).real.clamp(min=0).sqrt().sum()         # trace of (Ca Cb)^(1/2)
    return ((a - b).square().sum() + ca.trace() + cb.trace() - 2 * cross).item()

def flops(function):                        # of function(), by torch's own counter: one multiply-add counts 2
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()
def memory(device):                         # peak MiB of the CUDA allocator, or of the whole process
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
