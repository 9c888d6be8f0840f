"""The house rules as tests: budgets, banners, imports, and shape comments that cannot lie."""

import ast
import re
import subprocess
import sys
import types

import common
from tests import ROOT
from tests.tiny import EXTRA, TINY, VARIANTS, argv

import pytest
import torch

METHODS = list(TINY)
LINES = {"arflow": 650, "slimfit": 860, "common": 500, "data": 660}                     # other method files: 800
BANNERS = ["Configuration", "Building blocks", "Model", "Objective", "Sampling", "Training", "Command line"]
ALLOWED = {"torch", "numpy", "tqdm", "common", "data"} | set(sys.stdlib_module_names)
SHAPE = re.compile(r"# (each )?(\([^()]*\)(?:, \([^()]*\))*)$")


def source(name):
    return (ROOT / f"{name}.py").read_text()


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("name", [*METHODS, "common", "data"])
def test_budgets(name):
    text = source(name)
    assert text.count("\n") <= LINES.get(name, 800)
    assert max(map(len, text.split("\n"))) <= 110
    for function in functions(ast.parse(text)):
        limit = 70 if function.name.startswith("train") else 60
        assert function.end_lineno - function.lineno < limit, function.name


@pytest.mark.parametrize("name", METHODS)
def test_skeleton(name):
    text = source(name)
    banners = [line for line in text.split("\n") if re.match(r"# --- .* -+$", line)]
    assert [re.sub(r"^# --- | -+$", "", line) for line in banners] == BANNERS and {len(b) for b in banners} == {79}
    for word in ("Run:", "Faithful:", "Scaled:", "Left out:", "Letters:", "CUDA:", "Read in this order:"):
        assert word in ast.get_docstring(ast.parse(text)), word
    tree = ast.parse(text)
    names = {node.name for node in tree.body if hasattr(node, "name")}
    assert {"Config", "check", "prepare", "train", "main"} <= names and "PRESETS" in text
    fields = re.findall(r"^    (\w+): \S.* = .*$", text[:text.index("\nPRESETS")], re.M)
    for field in "preset data steps batch lr seed gpus device bf16 compile name resume sample log save".split():
        assert field in fields, field
    assert all(re.search(rf"^    {field}: [^#\n]*# \S", text, re.M) for field in fields), "a field without its help"


@pytest.mark.parametrize("name", METHODS)
def test_share_of_comments(name):
    text = source(name)
    lines = [line for line in text.split("\n") if line.strip()]
    prose = sum(line.strip().startswith("#") for line in lines)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            span = node.body[0]
            prose += sum(bool(line.strip()) for line in text.split("\n")[span.lineno - 1:span.end_lineno])
    assert 0.15 <= prose / len(lines) <= 0.32, f"{prose / len(lines):.2f}"


@pytest.mark.parametrize("name", [*METHODS, "common", "data"])
def test_imports_and_top_level(name):
    tree = ast.parse(source(name))
    for node in ast.walk(tree):
        modules = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                   [node.module] if isinstance(node, ast.ImportFrom) else [])
        for module in modules:
            assert module.split(".")[0] in ALLOWED | ({"PIL"} if name == "data" else set()), module
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AugAssign)
    for node in tree.body[1:]:
        assert isinstance(node, definitions) or "__main__" in ast.unparse(node), ast.unparse(node)[:80]
    assert ";" not in re.sub(r"(\"\"\".*?\"\"\"|\"[^\"\n]*\"|'[^'\n]*'|#[^\n]*)", "", source(name), flags=re.S)


def test_importing_prints_and_writes_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(METHODS)}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == done.stderr == "" and not list(tmp_path.iterdir())


# --- Shape comments as assertions ----------------------------------------------

class Instrument(ast.NodeTransformer):
    """Behind every assignment or return that ends on a line with a shape comment, check what the comment says."""

    def __init__(self, text):
        self.comments = {number: match for number, line in enumerate(text.split("\n"), 1)
                         if (match := SHAPE.search(line)) and line[:match.start()].strip()}
        self.inside, self.function = False, ""

    def visit_FunctionDef(self, node):
        outer, self.inside, self.function = (self.inside, self.function), True, node.name
        self.generic_visit(node)
        self.inside, self.function = outer
        first = 1 if ast.get_docstring(node) is not None else 0
        node.body.insert(first, ast.parse("shape_dims = {}").body[0])
        return node

    def check(self, node, value):
        match = self.comments[node.end_lineno]
        call = ast.parse(f"shape_check({node.end_lineno}, {bool(match[1])}, {match[2]!r}, None, shape_dims, locals())").body[0]
        call.value.args[3] = value
        return call

    def bare(self, node, value):
        """In a forward, a line without a shape comment must not make a tensor."""
        if self.function != "forward" or node.end_lineno in self.comments:
            return None
        call = ast.parse(f"shape_bare({node.end_lineno}, None)").body[0]
        call.value.args[1] = value
        return call

    def visit_Assign(self, node):
        if not self.inside or node.end_lineno not in self.comments:
            value = ast.parse(ast.unparse(node.targets[0])).body[0].value
            call = self.bare(node, value)
            return [node, call] if call else node
        target = node.targets[0]
        names = [element.id for element in target.elts] if isinstance(target, ast.Tuple) else [target.id]
        many = isinstance(target, ast.Tuple)
        return [node, self.check(node, ast.parse(f"({', '.join(names)},)" if many else names[0]).body[0].value)]

    def visit_Return(self, node):
        if self.inside and node.end_lineno in self.comments:
            node.value = self.check(node, node.value).value
        elif node.value and (call := self.bare(node, node.value)):
            node.value = call.value
        return node


def size(expression, dims):
    """The number an axis must have, or None where a letter of a product is not bound yet."""
    try:
        return eval(expression, {"__builtins__": {}}, dims)
    except NameError:
        return None


def make_check(name, seen):
    def check(line, each, text, value, dims, scope):
        seen.add(line)
        dims.update({key: v for key, v in scope.items() if isinstance(v, int) and re.fullmatch("[A-Za-z]", key)})
        shapes = [[part.strip() for part in shape.split(",") if part.strip()]
                  for shape in re.findall(r"\(([^()]*)\)", text)]
        values = value if isinstance(value, tuple) else (value,)
        shapes = shapes * len(values) if each or len(shapes) == 1 and len(values) > 1 and each else shapes
        assert len(shapes) == len(values), f"{name}.py:{line}: {len(values)} values, {len(shapes)} shapes"
        for shape, x in zip(shapes, values):
            while isinstance(x, (list, tuple)):
                x = x[0]                                                # a list of equal tensors: the comment is of one
            if x is None:                                               # left out in this call
                continue
            where = f"{name}.py:{line}: {tuple(x.shape)} is not ({', '.join(shape)}) with {dims}"
            assert x.ndim == len(shape), where
            for have, axis in zip(x.shape, shape):
                if re.fullmatch("[A-Za-z]", axis) and axis not in dims:
                    dims[axis] = have
                want = size(axis, dims)
                assert want is None or want == have, where
        return value
    return check


def make_bare(silent):
    def bare(line, value):
        parts = value if isinstance(value, (tuple, list)) else [value]
        if any(torch.is_tensor(part) for part in parts):
            silent.add(line)
        return value
    return bare


@pytest.mark.parametrize("name", METHODS)
def test_shape_comments_hold_and_all_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, seen, silent = source(name), set(), set()
    instrument = Instrument(text)
    tree = ast.fix_missing_locations(instrument.visit(ast.parse(text)))
    module = types.ModuleType(name)
    module.__file__ = str(ROOT / f"{name}.py")
    module.__dict__.update(shape_check=make_check(name, seen), shape_bare=make_bare(silent))
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(tree, module.__file__, "exec"), module.__dict__)
    for words in [[], *VARIANTS[name]]:
        cfg = common.cli(module.Config, module.PRESETS, module.__doc__, argv(name, steps=2, save=2) + words)
        common.launch(module.main, cfg, module.check, module.prepare)
    EXTRA[name](module)
    never = set(instrument.comments) - seen
    assert not never, f"{name}.py: shape comments never executed in lines {sorted(never)}"
    assert not silent, f"{name}.py: tensor lines of a forward without their shape: {sorted(silent)}"
    assert len(seen) >= 20
