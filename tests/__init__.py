"""Tests: exact and fast here, one experiment per claim in tests/claims."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def shared(*parts):
    """A path below ../shared (real data, reference outputs); skips the test with one line where it is absent."""
    path = ROOT.parent.joinpath("shared", *parts)
    if not path.exists():
        pytest.skip(f"../shared/{'/'.join(parts)} is not here")
    return path


def refused(run, words, capsys):
    """The one line on stderr of a command line that run(*words) must refuse, leaving with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run(*words)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.count("\n") == 1 and text.startswith("error: "), text
    return text
