"""The tools beside the tests: the table of faults fits the code, the audit is whole and current, exercises can be set."""

import ast
import collections
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap

import data
import detailflow
from tests import ROOT, audit, exercise, kills, mutate
from tests.claims import claim_detailflow
from tests.claims.__main__ import OPEN

import numpy as np
import pytest
import torch
import torch.nn as nn

METHODS = list(audit.LETTERS)


# --- Faults ------------------------------------------------------------------------

def test_every_fault_fits_its_file():
    """Its old text stands once where the table says, on one line, and what takes its place is Python."""
    for fault in mutate.table():
        text = (ROOT / f"{fault.file}.py").read_text()
        try:
            broken = mutate.make(fault, text)
        except (KeyError, ValueError) as error:
            pytest.fail(f"{error}: mend number {fault.number} of tests/mutate.py (python -m tests.mutate --list)")
        start, end = mutate.definition(text, fault.where)
        ast.parse(textwrap.dedent(broken[start:end + len(broken) - len(text)]))
        assert broken != text and "\n" not in fault.old + fault.new and fault.breaks, fault


def test_there_are_enough_faults_in_every_file():
    counts = collections.Counter(fault.file for fault in mutate.table())
    assert counts.keys() == {*METHODS, "common", "data"} and min(counts.values()) >= 12 and counts.total() >= 120
    assert len({fault[1:5] for fault in mutate.table()}) == counts.total()


def test_a_fault_is_made_once_and_in_its_place():
    text = "def f(x):\n    return x + 1\n\n\nclass A:\n    def f(self, x):\n        return x + 1\n"
    fault = lambda where, old: mutate.Fault(1, "file", where, old, "x - 1", "", "")
    assert mutate.make(fault("A.f", "x + 1"), text) == text[:-6] + "x - 1\n"
    assert mutate.make(fault("f", "x + 1"), text).startswith("def f(x):\n    return x - 1")
    for where, old in (("", "x + 1"), ("f", "x + 2"), ("A", "return y")):
        with pytest.raises(ValueError, match="occurs"):
            mutate.make(fault(where, old), text)
    with pytest.raises(KeyError):
        mutate.make(fault("A.g", "x + 1"), text)


# --- Audit -------------------------------------------------------------------------

@pytest.mark.parametrize("name", METHODS)
def test_every_equation_has_code_tests_and_a_golden_case_or_the_reason_why_none(name):
    rows = audit.audit(name)
    assert [row.label for row in rows if row.faults] == [], [fault for row in rows for fault in row.faults]


@pytest.mark.parametrize("name", METHODS)
def test_the_stored_audit_is_current(name):
    found = audit.stale(name, audit.audit(name))
    assert not found, f"python -m tests.audit {name} --write    renews it: {found}"


def test_the_audit_names_what_is_missing(monkeypatch, capsys):
    """Each column: a function that is gone, words that are, a test, a case; and a label without a trail."""
    monkeypatch.setitem(audit.TRAIL, "gpipe", audit.TRAIL["gpipe"].replace("bubble: (K - 1)", "bubbles: (K - 1)").replace(
        "speed_up: M * sum", "speed_up: 2 * sum").replace("> test_golden_batch_norm", "> test_gone").replace("\nG15", "\nG99"))
    assert audit.main(["gpipe"]) == 1
    said = capsys.readouterr().out
    for words in ("has no bubbles", "no line with '2 * sum(loads)'", "has no test_gone", "defines no G99", "no code"):
        assert f"MISSING: {words}" in said or words in said, words
    assert "no golden case, and no reason why" in said and re.search(r"\d+ missing\n$", said)


def test_what_a_text_names():
    assert audit.mentions("A1 to A3, A9 and xA5, A12b", "A") == {"A1", "A2", "A3", "A9"}
    assert audit.equations("arflow")["A18"] == ["S_(i+1) = gamma_i S_i + K_i^T V_i                    then it is written into S, undecayed"]
    assert len(audit.equations("arflow")["A19"]) == 5
    assert "test_loop_equals_matrix_equals_definition" in audit.tests_by_label("arflow")["A19"]


# --- Exercises ---------------------------------------------------------------------

@pytest.mark.parametrize("name", METHODS)
def test_every_level_blanks_functions_that_equations_or_tests_define(name):
    names = list(dict.fromkeys(",".join(exercise.LEVELS[name]).split(",")))
    blanks, whole = ast.parse(exercise.blank(name, names)), audit.parsed(f"{name}.py")[2]
    for function in names:
        assert exercise.tests_of(name, function), function
        node, was = audit.locate(blanks, function), audit.locate(whole, function)
        assert ast.get_docstring(node) == ast.get_docstring(was) and ast.unparse(node.args) == ast.unparse(was.args)
        assert ast.unparse(node.body[-1]) == "..." and len(node.body) <= 2
    assert all(any(exercise.labels_of(name, function) for function in level.split(",")) for level in exercise.LEVELS[name])
    assert f"## {name}" in (ROOT / "assets/exercises.md").read_text()


def test_a_blank_shows_its_equations(capsys):
    text = exercise.blank("arflow", ["hybrid"])
    body = text[text.index("def hybrid("):text.index("def hybrid_matrix")]
    assert "    # A16  gamma_i = exp(mean_j g_ij)" in body and body.rstrip().endswith("    ...") and "cumsum" not in body
    assert exercise.main(["arflow", "--blank", "hybrid", "--solution"]) == 0 and "cumsum" in capsys.readouterr().out
    assert exercise.main(["arflow"]) == 0 and capsys.readouterr().out.count("level") == 6
    for words in (["--blank", "hybrids"], ["--blank", "Attention"], ["--level", "1"], ["--level", "1", "--to", str(ROOT / "x")]):
        with pytest.raises(SystemExit, match="error"):
            exercise.main(["arflow", *words])


@pytest.mark.parametrize("found, wanted, said", [
    (None, torch.ones(2), "output is None where a tensor (2,) is wanted"),
    (torch.ones(2, 3), torch.ones(2), "output has the shape (2, 3) where (2,) is wanted"),
    (torch.ones(2, dtype=torch.long), torch.ones(2), "output is of type torch.int64 where torch.float32 is wanted"),
    ((1, torch.tensor([[1.0, 2.0]])), (1, torch.tensor([[1.0, 3.0]])), "output[1][0, 1] is 2 where 3 is wanted"),
    ({"a": 1.0}, {"a": 1.5}, "output['a'] is float 1.0 where float 1.5 is wanted"),
    ({"b": 1.0}, {"a": 1.5}, "output has ['b'] where ['a'] are wanted"),
    ([1], [1, 2], "output is list of 1 where list of 2 is wanted"),
    (np.arange(2), np.arange(2), ""), (1, 1, ""), (torch.tensor(torch.nan), torch.tensor(torch.nan), ""), (True, 1, "output is bool True where int 1 is wanted")])
def test_the_first_difference(found, wanted, said):
    assert exercise.difference(found, wanted) == said


def test_a_twin_shares_no_number():
    given = ({"a": torch.ones(2, requires_grad=True)}, [np.ones(2)], torch.Generator().manual_seed(3))
    made = exercise.twin(given)
    made[0]["a"].data.zero_()
    made[1][0][:] = 0
    assert given[0]["a"].all() and given[1][0].all() and made[0]["a"].requires_grad
    assert torch.rand(1, generator=given[2]) == torch.rand(1, generator=made[2])
    norm = nn.BatchNorm1d(2)
    exercise.twin_self(norm)(torch.rand(4, 2))
    assert norm.num_batches_tracked == 0


def setting(tmp_path, words):
    """An exercise in a folder; what its check.py prints, for the blanks and for the solution."""
    exercise.main([*words, "--to", str(tmp_path / "x")])
    file = words[0]
    said = []
    for text in (None, (tmp_path / f"x/.solution/{file}.py").read_text()):
        if text:
            (tmp_path / f"x/{file}.py").write_text(text)
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "check.py"], cwd=tmp_path / "x", env=env, capture_output=True, text=True)
        said.append((done.returncode, done.stdout + done.stderr))
    return said


@pytest.mark.optional
@pytest.mark.parametrize("name", METHODS)
def test_an_exercise_from_blank_to_solved(name, tmp_path):
    (code, said), (solved, told) = setting(tmp_path, [name, "--level", "2"])
    assert code == 1 and "wrong" in said and "is wanted" in said and "Traceback" not in said, said
    assert solved == 0 and "wrong" not in told and re.search(r"(\d+) of \1 right", told), told


# --- Kills -------------------------------------------------------------------------

def test_what_differs_between_two_runs_is_named():
    run = ({"last.pt": {"/w": torch.ones(2), "step": 3}}, [{"step": 3, "loss": 1.0}])
    assert kills.difference(run, run) == ""
    assert kills.difference(({"last.pt": {"/w": torch.tensor([1.0, 1 + 1e-7]), "step": 3}}, run[1]), run) == "last.pt/w"
    assert kills.difference(({}, run[1]), run).startswith("checkpoints") and kills.difference((run[0], []), run) == "the log"


@pytest.mark.optional
@pytest.mark.parametrize("method", kills.TINY)
def test_two_kills_change_nothing(method, tmp_path):
    """In a process of its own: lives are forks, and a fork wants a parent without threads."""
    done = subprocess.run([sys.executable, "-m", "tests.kills", method, "--kills", "2"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "bitwise equal" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["common", *METHODS])
def test_every_claim_has_a_row_that_can_be_run(name):
    """Each stored row is a function of its file, by that name; what is open says what it would take."""
    module = importlib.import_module(f"tests.claims.claim_{name}")
    rows = [row.__name__ for row in module.ROWS]
    stored = json.loads((ROOT / "assets/claims" / f"{name}.json").read_text())["rows"]
    assert len(set(rows)) == len(rows) and set(stored) | set(module.NEEDED) <= set(rows)
    assert {key for key, row in stored.items() if row["verdict"] in OPEN} <= set(module.NEEDED)


def test_the_claims_run_detailflows_own_stages(monkeypatch):
    """Both stages of a row, one step each, through the stand-in for a run's folder."""
    monkeypatch.setattr(claim_detailflow, "opened", lambda cfg, split, count=0: data.open_data("shapes", split, cfg.size, count=100))
    monkeypatch.setitem(claim_detailflow.STEPS, "quick", dict(tokenizer=1, ar=1))
    monkeypatch.setattr(claim_detailflow, "CACHE", {})
    cfg = claim_detailflow.config("quick", 0, batch=4, batch_ar=4, kmeans=0)
    tokenizer = claim_detailflow.fit(cfg, "quick")
    model = claim_detailflow.fit_ar(cfg, "quick", tokenizer)
    assert isinstance(tokenizer, detailflow.Tokenizer) and isinstance(model, detailflow.AR)
    assert not any(p.requires_grad for p in (*tokenizer.parameters(), *model.parameters()))
