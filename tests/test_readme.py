"""The README: short, its code the file's own, its recipes run, its scoreboard up to date."""

import json
import re
import sys
import types
from types import SimpleNamespace

import data
from tests import ROOT
from tests.claims.__main__ import FOLDER, pages, rows_by_file, scoreboard

import numpy as np
import torch
import torch.nn.functional as F

README = (ROOT / "README.md").read_text()
CODE = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)


def test_it_is_short():
    assert README.count("\n") <= 110 and len(README.split()) <= 2000


def test_the_code_shown_is_the_code():
    assert len(CODE[0].splitlines()) <= 18
    same = CODE[0] in (ROOT / "arflow.py").read_text()
    assert same, "README.md, How to read a file: copy the loop of arflow.hybrid anew"


def test_what_it_links_to_is_here():
    for link, picture in re.findall(r'\]\((?!https:)([^)#]+)[^)]*\)|src="([^"]+)"', README):
        assert (ROOT / (link or picture)).exists(), link or picture


def test_scoreboard_and_page_of_claims_are_up_to_date():
    stored = rows_by_file()
    assert scoreboard(stored) in README and (FOLDER / "README.md").read_text() == pages(stored)
    for content in stored.values():
        assert all(row["verdict"] in ("shown", "not shown at this scale", "reversed", "not run") for row in content["rows"].values())
        json.dumps(content)


def test_the_recipe_for_stable_diffusions_latents(tmp_path, monkeypatch):
    """The README's own lines, with a stand-in for the auto-encoder; data.py reads what they write."""
    monkeypatch.chdir(tmp_path)
    graphs = []

    class AutoencoderKL(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, name):
            return cls()

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def encode(self, x):
            mean = self.scale * F.avg_pool2d(torch.cat([x, x[:, :1]], 1), 8)
            graphs.append(mean.requires_grad)
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, logvar=mean - 9))

    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=AutoencoderKL))
    x = torch.rand(6, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batches = [(x[:4], torch.tensor([0, 1, 0, 1])), (x[4:], torch.tensor([1, 0]))]
    recipe = next(code for code in CODE if "AutoencoderKL" in code)
    exec(compile(recipe, "README.md", "exec"), {"batches": batches})
    assert not any(graphs), "no batch keeps its graph"
    found = data.open_data("latents:imagenet256.npz", size=32)
    assert found.images.shape == (6, 4, 32, 32) and found.labels.tolist() == [0, 1, 0, 1, 1, 0]
    plain = found.latents(np.array([5]), np.array([False]), 0.0) / 0.18215
    mirrored = found.latents(np.array([5]), np.array([True]), 0.0) / 0.18215
    wanted = 2 * F.avg_pool2d(torch.cat([x[5:], x[5:, :1]], 1), 8)
    assert (plain - wanted).abs().max() < 2e-3 and (mirrored - wanted.flip(-1)).abs().max() < 2e-3


def test_owners_of_gpus_are_told():
    """What ran on CUDA, or that nothing did, stands beside the commands for GPUs."""
    running = README[README.index("## Running"):README.index("## Your own data")]
    assert "run on a GPU by us" in running
