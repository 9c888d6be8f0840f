"""The house rules as tests: budgets, banners, imports, and shape comments that cannot lie."""

import ast
import dataclasses
import difflib
import importlib
import inspect
import io
import itertools
import re
import subprocess
import sys
import textwrap
import tokenize
import types

import common
from tests import ROOT
from tests.tiny import EXTRA, TINY, VARIANTS, argv

import pytest
import torch

METHODS = list(TINY)
FILES = [*METHODS, "common", "data"]
CODE_LINES = {                                      # a line a file, so that changes do not collide
    "arflow": 457,
    "common": 1197,
    "data": 1010,
    "detailflow": 882,
    "flextok": 901,
    "gpipe": 987,
    "slimfit": 834,
    "vitok": 900,
}
BANNERS = ["Configuration", "Building blocks", "Model", "Objective", "Sampling", "Training", "Checks", "Command line"]
FIFTH = {"gpipe": "Pipeline", "slimfit": "Scheduling"}                  # in the place of Sampling
LABELS = {"arflow": "A", "flextok": "F", "detailflow": "D", "vitok": "V", "slimfit": "SI", "gpipe": "G"}
ALLOWED = {"torch", "numpy", "tqdm", "common", "data"} | set(sys.stdlib_module_names)
SHAPE = re.compile(r"# (each )?(\([^()]*\)(?:, \([^()]*\))*)$")


def source(name):
    return (ROOT / f"{name}.py").read_text()


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


# --- What reading a file costs --------------------------------------------------

def prose_lines(text):
    """Numbers of the lines that are docstrings or comments alone."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found | {number for number, line in enumerate(text.split("\n"), 1) if line.strip().startswith("#")}


def squeezes(tree):
    """Lines where more than one thing happens: two computed values in an assignment, a condition as a number or in
    the place of a statement, and/or for if/else, a conditional inside another or in a loop's head, a named lambda."""
    plain = (ast.Name, ast.Constant, ast.Attribute)
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Tuple(), *_], value=ast.Tuple(elts=values)):
                bad = not all(isinstance(value, plain) for value in values)
            case ast.Assign(value=ast.Lambda()) | ast.For(iter=ast.IfExp()) | ast.Expr(value=ast.IfExp()):
                bad = True
            case ast.IfExp():
                bad = isinstance(node.body, ast.IfExp) or isinstance(node.orelse, ast.IfExp)
            case ast.BoolOp(op=ast.Or(), values=values):
                bad = any(isinstance(value, ast.BoolOp) and isinstance(value.op, ast.And) for value in values)
            case ast.BinOp(op=ast.Mult()):
                bad = any(isinstance(side, (ast.Compare, ast.BoolOp)) or isinstance(side, ast.UnaryOp)
                          and isinstance(side.op, ast.Not) for side in (node.left, node.right))
            case _:
                bad = False
        if bad:
            found.append(node.lineno)
    return found


def weigh(text):
    """Code lines, shares of blank lines and of prose, syntax nodes a code line, squeezes per 100, unaired definitions."""
    tree, lines, prose = ast.parse(text), text.rstrip("\n").split("\n"), prose_lines(text)
    blank = sum(not line.strip() for line in lines)
    written = sum(1 for number in prose if lines[number - 1].strip())
    code = len(lines) - blank - written
    unaired = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            above = lines[first - 2].strip()
            if above and not above.startswith(("#", "class ", "def ")):
                unaired.append(node.name)
    return dict(code=code, blank=blank / len(lines), prose=written / (len(lines) - blank), unaired=unaired,
                nodes=sum(1 for _ in ast.walk(tree)) / code, squeezes=100 * len(squeezes(tree)) / code)


def test_what_is_weighed():
    """The scale itself, on eight lines that are squeezed in eight ways and on the same written plainly."""
    squeezed = ["a, b = f(x), 1", "a = x * (x > 1)", "a = x and 1 or 2 and 3", "a = 1 if x else 2 if y else 3", "g = lambda x: x",
                "f() if x else g()", "for a in b if x else c:\n    f()", "a = 2 * (not x)"]
    assert all(squeezes(ast.parse(line)) for line in squeezed)
    plain = ["a, b = x, y", "a = x * y", "a = x or y", "a = 1 if x else 2", "def g(x):\n    return x", "for a in b:\n    f()"]
    assert not any(squeezes(ast.parse(line)) for line in plain)
    text = '"""Title."""\nimport x\n\n# why\ndef f():\n    """What."""\n    return 1\n\nclass A:\n    y = 1\n    def g(self):\n        pass\n'
    found = weigh(text)
    assert found["code"] == 7 and found["blank"] == 2 / 12 and found["prose"] == 3 / 10 and found["unaired"] == ["g"]


@pytest.mark.parametrize("name", FILES)
def test_weights(name):
    text, found = source(name), weigh(source(name))
    assert max(map(len, text.split("\n"))) <= 110
    assert found["code"] <= CODE_LINES[name], found
    assert found["nodes"] <= 16 and found["squeezes"] <= 2 and found["blank"] >= 0.11 and not found["unaired"], found
    assert 0.20 <= found["prose"] <= 0.30, found
    for function in functions(ast.parse(text)):
        assert function.end_lineno - function.lineno < 60, function.name


@pytest.mark.parametrize("name", METHODS)
def test_the_core_comes_first(name):
    """The first line of the method stands within the first 120 lines; its checks stand behind the training loop."""
    lines = source(name).split("\n")
    first = next(number for number, line in enumerate(lines, 1) if line.startswith("# --- Building blocks"))
    assert first < 120, first


@pytest.mark.parametrize("name", METHODS)
def test_skeleton(name):
    text = source(name)
    banners = [line for line in text.split("\n") if re.match(r"# --- .* -+$", line)]
    wanted = [FIFTH.get(name, banner) if banner == "Sampling" else banner for banner in BANNERS]
    assert [re.sub(r"^# --- | -+$", "", line) for line in banners] == wanted and {len(b) for b in banners} == {79}
    for word in ("Run:", "Faithful:", "Scaled:", "Left out:", "Letters:", "CUDA:", "Read in this order:"):
        assert word in ast.get_docstring(ast.parse(text)), word
    tree = ast.parse(text)
    names = {node.name for node in tree.body if hasattr(node, "name")}
    assert {"Config", "check", "prepare", "train", "main"} <= names and "PRESETS" in text
    fields = re.findall(r"^    (\w+): \S.* = .*$", text[:text.index("\nPRESETS")], re.M)
    for field in "preset data steps batch lr seed gpus device bf16 compile name resume sample out log save".split():
        assert field in fields, field
    silent = [field for field in fields if not re.search(rf"^    {field}: [^#\n]*# \S", text, re.M)]
    assert silent in ([], ["sampling"]), f"without help: {silent}"


@pytest.mark.parametrize("name", METHODS)
def test_every_number_of_a_configuration_has_its_range(name):
    """--help shows it and one place checks it; a seed may be anything."""
    module = importlib.import_module(name)
    notes = common.field_notes(module.Config)
    numbers = [field.name for field in dataclasses.fields(module.Config) if type(field.default) in (int, float)]
    assert [field for field in numbers if not notes[field][0]] == ["seed"]


@pytest.mark.parametrize("name", METHODS)
def test_every_label_is_an_equation_of_this_file_and_has_a_test(name):
    """A label (A16, F20 ...) stands once at the beginning of a line of prose, before two spaces and its equation;
    whoever uses it elsewhere in the file finds it there, and a test file names it."""
    text, letters = source(name), LABELS[name]
    prose = "\n".join(text.split("\n")[number - 1] for number in sorted(prose_lines(text)))
    defined = re.findall(rf'^[ #"]*([{letters}]\d+)  +\S', prose, re.M)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    spoken = "\n".join(token.string for token in tokens if token.type in (tokenize.COMMENT, tokenize.STRING))
    used = set(re.findall(rf"\b([{letters}]\d{{1,2}})\b(?![-/@])", spoken))
    assert defined and len(defined) == len(set(defined)), [label for label in defined if defined.count(label) > 1]
    assert used <= set(defined), f"without an equation: {sorted(used - set(defined))}"
    tests = (ROOT / f"tests/test_{name}.py").read_text()
    silent = [label for label in defined if not re.search(rf"\b{label}\b", tests)]
    assert not silent, f"no test names {silent}"
    assert "digest" not in text and not re.search(r"\binvariant \d", text)


def lines_of(function):
    """The statements of a function without its docstring, as text, a line each."""
    text = inspect.getsource(function).split("\n")
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    start = tree.body[1].lineno if ast.get_docstring(tree) else tree.body[0].lineno
    return [re.sub(r"\s+#.*", "", line).strip() for line in text[start - 1:] if line.strip() and not line.strip().startswith("#")]


@pytest.mark.parametrize("a, b", itertools.combinations([("arflow", "train"), ("flextok", "train_tokenizer"), ("vitok", "train_ae")], 2))
def test_training_functions_are_alike(a, b):
    """At least 60 % of the lines of two training functions are the same to the letter, in the same order."""
    first, second = (lines_of(getattr(importlib.import_module(file), function)) for file, function in (a, b))
    same = sum(block.size for block in difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks())
    assert 2 * same / (len(first) + len(second)) >= 0.6, f"{2 * same / (len(first) + len(second)):.2f}"


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
        words = ast.unparse(node)
        policy = name == "common" and words.startswith("os.environ.setdefault(")
        assert isinstance(node, definitions) or "__main__" in words or policy, words[:80]
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
