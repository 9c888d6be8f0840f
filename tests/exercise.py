"""python -m tests.exercise FILE [--level N | --blank hybrid,loss,sample] --to DIR    learn a method by writing its core

DIR becomes a copy of the repository in which the bodies of these functions (or methods, Class.method) are replaced by
their docstring, their equations and `...`. `python check.py` there runs the tests that define them, and says equation
by equation what is right, with the first shape or value that differs from the solution's. Without --blank and --level
the three levels of a file are shown. --solution prints the original functions. assets/exercises.md has one exercise a
file.
"""

import argparse
import ast
import copy
import functools
import importlib
import inspect
import math
import re
import shutil
import sys
from pathlib import Path

from tests import ROOT
from tests.audit import LETTERS, TRAIL, equations, locate, parsed, tests_by_label, trail

import numpy as np
import torch
import torch.nn as nn

LEVELS = {
    "arflow": ("interpolate,loss", "hybrid", "hybrid,Attention.forward,guided_velocity,sample"),
    "flextok": ("nested_lengths,flow_time", "FSQ.forward,FSQ.values", "Decoder.tokens,loss_tokenizer,adaptive_projected_guidance,sample"),
    "detailflow": ("spans,group_causal", "group_causal,AR.embed,spans,generate", "VQ.forward,Tokenizer.correct,loss_ar,loss_disc"),
    "vitok": ("bottleneck,kl_term,ramp", "rope_angles,rotary_table,rotate", "loss_dit,variational_bound,guided,sample"),
    "slimfit": ("quantise,restore", "relative_change,choose,Scheduler.freeze,Scheduler.measure", "pack4,Norm.forward,Norm.backward,AdamW.step,learning_rate"),
    "gpipe": ("clock_cycles,bubble", "partition,schedule", "schedule,scatter,Pipeline.do_loss,Pipeline.do_backward,commit"),
}
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".pytest_cache", ".ruff_cache", "samples")
CHECK = '''"""python check.py [--solution]: what is right in {file}.py, equation by equation."""

import sys

from tests.exercise import check

sys.exit(check({file!r}, {names!r}, "--solution" in sys.argv))
'''


# --- Blanks ---------------------------------------------------------------------

def labels_of(file, name):
    """The labels of the equations that a function computes, as tests/audit.py has them."""
    return [label for label, (code, _) in trail(file).items() if re.search(rf"(^|; ){re.escape(name)}: ", code)]


def blank(file, names):
    """The text of a file with the bodies of these functions blanked. SystemExit names what is no function."""
    _, lines, tree = parsed(f"{file}.py")
    lines = [*lines]
    nodes = {}
    for name in names:
        node = locate(tree, name)
        if not isinstance(node, ast.FunctionDef):
            sys.exit(f"error: {file}.py has no function {name}; give functions, or methods as Class.method")
        nodes[name] = node
    for name, node in sorted(nodes.items(), key=lambda item: -item[1].lineno):      # from the end: numbers stay right
        documented = ast.get_docstring(node) is not None
        if documented and len(node.body) == 1:
            continue
        start = node.body[1 if documented else 0].lineno
        while lines[start - 2].strip().startswith("#"):                 # comments tell the solution
            start -= 1
        indent = " " * node.body[0].col_offset
        body = []
        for label in labels_of(file, name):
            body += [f"{indent}# {head:5}{line}".rstrip() for head, line in zip([label] + [""] * 99, equations(file)[label])]
        lines[start - 1:node.end_lineno] = [*body, f"{indent}..."]
    return "\n".join(lines)


def originals(file, names):
    """The original functions as text."""
    hidden = ROOT / ".solution" / f"{file}.py"                          # in a copy that an exercise has made
    text = (hidden if hidden.exists() else ROOT / f"{file}.py").read_text()
    tree, lines = ast.parse(text), text.split("\n")
    return "\n\n".join("\n".join(lines[node.lineno - 1:node.end_lineno]) for node in (locate(tree, name) for name in names))


def set_exercise(file, names, where):
    """Make the copy of the repository with its blanks and its check.py."""
    where = Path(where)
    if where.exists() and any(where.iterdir()):
        sys.exit(f"error: {where}: is there already and not empty")
    if where.resolve().is_relative_to(ROOT):
        sys.exit(f"error: {where}: give a folder outside the repository")
    blanked = blank(file, names)
    shutil.copytree(ROOT, where, ignore=LEFT_OUT, dirs_exist_ok=True)
    (where / f"{file}.py").write_text(blanked)
    (where / ".solution").mkdir()
    shutil.copy(ROOT / f"{file}.py", where / ".solution")
    (where / "check.py").write_text(CHECK.format(file=file, names=list(names)))
    print(f"{where}/{file}.py: write {', '.join(names)}; then, in {where}: python check.py")


# --- The first difference ---------------------------------------------------------

def kind(value):
    """What a value is, in a few words."""
    if torch.is_tensor(value) or isinstance(value, np.ndarray):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    return "None" if value is None else f"{type(value).__name__} {value!r}"[:60]


def difference(found, wanted, path="output"):
    """The first thing in which two results differ, in words; "" if none. Objects of unknown types are passed over."""
    if torch.is_tensor(wanted) or isinstance(wanted, np.ndarray):
        if not (torch.is_tensor(found) or isinstance(found, np.ndarray)):
            return f"{path} is {kind(found)} where {kind(wanted)} is wanted"
        found, wanted = torch.as_tensor(found).detach(), torch.as_tensor(wanted).detach()
        if found.shape != wanted.shape:
            return f"{path} has the shape {tuple(found.shape)} where {tuple(wanted.shape)} is wanted"
        if found.is_floating_point() != wanted.is_floating_point():
            return f"{path} is of type {found.dtype} where {wanted.dtype} is wanted"
        if wanted.device.type == "meta":
            return ""
        low = torch.float32 in (found.dtype, wanted.dtype) or torch.bfloat16 in (found.dtype, wanted.dtype)
        near = torch.isclose(found.double(), wanted.double(), rtol=1e-4 if low else 1e-9, atol=1e-5 if low else 1e-10, equal_nan=True)
        if near.all():
            return ""
        place = [int(i) for i in (~near).nonzero()[0]]
        values = (x[tuple(place)].item() for x in (found, wanted))
        return "{}{} is {:.6g} where {:.6g} is wanted".format(path, place if place else "", *values)
    if isinstance(wanted, dict):
        if not isinstance(found, dict) or found.keys() != wanted.keys():
            names = sorted(map(str, found)) if isinstance(found, dict) else kind(found)
            return f"{path} has {names} where {sorted(map(str, wanted))} are wanted"
        return next(filter(None, (difference(found[key], wanted[key], f"{path}[{key!r}]") for key in wanted)), "")
    if isinstance(wanted, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(wanted):
            return f"{path} is {kind(found)} where {kind(wanted)} is wanted"
        pairs = enumerate(zip(found, wanted))
        return next(filter(None, (difference(a, b, f"{path}[{i}]") for i, (a, b) in pairs)), "")
    if isinstance(wanted, (bool, int, float, str)) or wanted is None:
        if isinstance(wanted, float) and isinstance(found, (int, float)):
            same = math.isclose(found, wanted, rel_tol=1e-9, abs_tol=1e-12) or found != found and wanted != wanted
        else:
            same = type(found) is type(wanted) and found == wanted
        return "" if same else f"{path} is {kind(found)} where {kind(wanted)} is wanted"
    return ""


def twin(value):
    """A copy of an argument for the solution, so that neither call sees what the other does to it.

    Modules and objects that hold no numbers are shared.
    """
    if torch.is_tensor(value):
        made = value.detach().clone()
        return made.requires_grad_(value.requires_grad) if made.is_floating_point() else made
    if isinstance(value, torch.Generator):
        made = torch.Generator(value.device)
        made.set_state(value.get_state())
        return made
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, tuple):
        parts = [twin(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [twin(part) for part in value]
    if isinstance(value, dict):
        return {key: twin(part) for key, part in value.items()}
    return value


def twin_self(thing):
    """A copy of the object whose method is called; None where it is of a kind that cannot be called twice."""
    if isinstance(thing, nn.Module):
        try:
            return copy.deepcopy(thing)
        except RuntimeError:                                            # it holds results of a computation
            return None
    plain = (bool, int, float, str, list, tuple, dict, torch.Tensor, np.ndarray, nn.Module, type(None))
    known = all(isinstance(value, plain) or hasattr(value, "__dataclass_fields__") for value in vars(thing).values())
    if not known or isinstance(thing, torch.optim.Optimizer):
        return None
    made = copy.copy(thing)
    made.__dict__ = {name: twin(value) for name, value in vars(thing).items()}
    return made


def solution(file, name, module):
    """A function of the original file, in the student's module: all that it calls is the student's."""
    node = locate(ast.parse((ROOT / ".solution" / f"{file}.py").read_text()), name)
    node.decorator_list = [d for d in node.decorator_list if ast.unparse(d) != "staticmethod"]
    owner = getattr(module, name.split(".")[0]) if "." in name else None
    # super() and __class__ in a method want the class in a scope around it
    around = ast.parse("def around(__class__):\n    pass\n    return made").body[0]
    around.body[0] = node
    around.body[1].value.id = node.name
    scope = {}
    exec(compile(ast.fix_missing_locations(ast.Module([around], [])), f"{file}.py", "exec"), module.__dict__, scope)
    return scope["around"](owner)


class Watch:
    """A pytest plugin that knows who called the student's functions and, with `comparing`, what the solution would give.

    calls: {function: {test: first difference, or ""}}; outcomes: {test: "passed", "failed" or "skipped"}; reasons:
    {test: the first line of what failed}. A comparison is a second call, which a test that counts calls would notice:
    so the tests run without it, and those that fail once more with it.
    """

    comparing = False

    def __init__(self, file, names):
        self.calls = {name: {} for name in names}
        self.compared = set()                                           # (function, test)
        self.outcomes = {}
        self.reasons = {}
        self.test = ""
        self.solving = False
        self.module = importlib.import_module(file)
        for name in names:
            self.wrap(file, name)

    def wrap(self, file, name):
        owner, _, short = name.rpartition(".")
        holder = getattr(self.module, owner) if owner else self.module
        static = isinstance(holder.__dict__[short], staticmethod)
        student, solved = getattr(holder, short), solution(file, name, self.module)

        @functools.wraps(student)
        def both(*args, **kwargs):
            if self.solving:                                            # an inner call of the solution's
                return solved(*args, **kwargs)
            seen = self.calls[name].setdefault(self.test, "")
            if not self.comparing:
                return student(*args, **kwargs)
            comparable, mine = not static, None
            if comparable and owner:
                mine = twin_self(args[0])
                comparable = mine is not None
            if comparable:
                given = [mine, *map(twin, args[1:])] if owner else [*map(twin, args)]
                named = twin(kwargs)
                state = torch.get_rng_state()
            try:
                found = student(*args, **kwargs)
            except Exception as error:
                self.calls[name][self.test] = seen or f"raises {type(error).__name__}: {error}"[:150]
                raise
            if inspect.isgenerator(found):
                found = list(found)
            if comparable:
                after = torch.get_rng_state()
                torch.set_rng_state(state)
                self.solving = True
                try:
                    wanted = solved(*given, **named)
                    wanted = list(wanted) if inspect.isgenerator(wanted) else wanted
                except Exception:                                       # a test of what is refused: nothing to compare
                    return found
                finally:
                    self.solving = False
                    torch.set_rng_state(after)
                told = difference(found, wanted)
                if not told and owner and not isinstance(mine, nn.Module):
                    told = difference(vars(args[0]), vars(mine), "self")
                self.calls[name][self.test] = seen or told
                self.compared.add((name, self.test))
            return found

        setattr(holder, short, staticmethod(both) if static else both)

    def pytest_runtest_setup(self, item):
        self.test = item.originalname

    def pytest_runtest_logreport(self, report):
        if self.comparing:
            return
        test = re.sub(r"\[.*", "", report.nodeid.split("::")[-1])
        if report.failed:
            self.outcomes[test] = "failed"
            crash = getattr(report.longrepr, "reprcrash", None)
            self.reasons.setdefault(test, crash.message.split("\n")[0] if crash else "")
        elif report.skipped:
            self.outcomes.setdefault(test, "skipped")
        elif report.when == "call":
            self.outcomes.setdefault(test, "passed")


# --- What is right -----------------------------------------------------------------

def golden_test(file, label):
    """The test that compares an equation with the authors' numbers, or ""."""
    found = re.search(r" > (\w+)", trail(file)[label][1])
    return found[1] if found else ""


def tests_of(file, name):
    """The tests that define a function: those that name its equations; where it has none, those that call it by name."""
    labels = labels_of(file, name)
    by_label = tests_by_label(file)
    found = [test for label in labels for test in by_label.get(label, [])]
    found += [test for test in map(functools.partial(golden_test, file), labels) if test]
    if not found:
        _, lines, tree = parsed(f"tests/test_{file}.py")
        attribute = rf"\b{file}\.{re.escape(name.split('.')[0])}\b"
        found = [node.name for node in tree.body if getattr(node, "name", "").startswith("test_")
                 and re.search(attribute, "\n".join(lines[node.lineno - 1:node.end_lineno]))]
    return list(dict.fromkeys(found))


def verdict(watch, name, tests):
    """("right", "wrong" or "untried", why) of an equation of function `name`, by those of {test: how many of the
    function's equations it names} that are the most specific."""
    ran = [test for test in tests if watch.outcomes.get(test) in ("passed", "failed")]
    ran = [test for test in ran if test in watch.calls[name]] or ran
    ran = [test for test in ran if tests[test] == min(map(tests.get, ran))]
    failed = [test for test in ran if watch.outcomes[test] == "failed"]
    differs = {test: told for test, told in watch.calls[name].items() if told}
    # A test may fail for another function's sake: then this one agrees with the solution wherever both were called.
    guilty = [test for test in failed if differs or (name, test) not in watch.compared]
    if guilty:
        return "wrong", f"{guilty[0]}: {watch.reasons.get(guilty[0], '')}"[:150]
    return ("right", "") if ran else ("untried", "all its tests are skipped here")


def check(file, names, show_solution=False):
    """Run the tests that define the functions; print what is right. Returns the exit code, 0 if all is."""
    if show_solution:
        print(originals(file, names))
        return 0
    import pytest
    torch.set_num_threads(1)
    chosen = list(dict.fromkeys(test for name in names for test in tests_of(file, name)))
    watch = Watch(file, names)
    path = ROOT / f"tests/test_{file}.py"
    options = ["-o", "addopts=", "-m", "not optional", "-p", "no:terminal", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    code = pytest.main([*(f"{path}::{test}" for test in chosen), *options], plugins=[watch])
    if code not in (0, 1):
        sys.exit(f"error: pytest ends with {code!r}: does {file}.py still import?")
    failed = [test for test in chosen if watch.outcomes.get(test) == "failed"]
    if failed:
        watch.comparing = True
        sys.modules.pop(f"tests.test_{file}", None)                     # collected anew: its parameters may be generators
        pytest.main([*(f"{path}::{test}" for test in failed), *options], plugins=[watch])
    right = count = differ = 0
    by_label = tests_by_label(file)
    for name in names:
        print(f"\n{name}")
        told = [(test, text) for test, text in watch.calls[name].items() if text]
        labels = labels_of(file, name)
        for label in labels or [""]:
            named = by_label.get(label, []) if label else tests_of(file, name)
            tests = {test: sum(test in by_label.get(other, []) for other in labels) for test in named}
            if label and golden_test(file, label):
                tests.setdefault(golden_test(file, label), len(labels))
            what, why = verdict(watch, name, tests)
            count += 1
            right += what == "right"
            print(f"  {label or '-':5}{what:8}{equations(file)[label][0] if label else 'the tests that call it'}")
            if why:
                print(f"{'':15}{why}")
        differ += bool(told)
        if told:
            print(f"  first difference: {told[0][1]}  ({told[0][0]})")
        elif not watch.calls[name]:
            print("  no test has called it yet")
    print(f"\n{right} of {count} right; {len(chosen)} tests, {sum(v == 'failed' for v in watch.outcomes.values())} fail")
    return int(right < count or differ > 0)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", choices=[*TRAIL], metavar="FILE", help=", ".join(LETTERS))
    parser.add_argument("--blank", default="", help="functions, or methods as Class.method, with commas between")
    parser.add_argument("--level", type=int, choices=(1, 2, 3))
    parser.add_argument("--to", default="", metavar="DIR")
    parser.add_argument("--solution", action="store_true", help="print the original functions")
    given = parser.parse_args(argv)
    names = given.blank.split(",") if given.blank else LEVELS[given.file][given.level - 1].split(",") if given.level else []
    if not names:
        for level, text in enumerate(LEVELS[given.file], 1):
            labels = dict.fromkeys(label for name in text.split(",") for label in labels_of(given.file, name))
            print(f"level {level}: {text.replace(',', ', ')}  ({', '.join(labels)})\n"
                  f"         python -m tests.exercise {given.file} --level {level} --to ../{given.file}-{level}")
        return 0
    blank(given.file, names)               # all of them are there
    if given.solution:
        print(originals(given.file, names))
    elif given.to:
        set_exercise(given.file, names, given.to)
    else:
        sys.exit("error: --to DIR: where to?")
    return 0


if __name__ == "__main__":
    sys.exit(main())
