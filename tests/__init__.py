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
