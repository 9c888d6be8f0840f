"""What the common tests run: naming a method here lets it join test_style.py and test_runs.py.

TINY    one very small Config a file: it trains in under half a second
VARIANTS  more command lines on top of it, so that every line with a shape comment runs at least once
EXTRA   a function of the module for what no command line reaches (the slow forms beside the fast ones)
"""

import torch

TINY = {
    "arflow": dict(size=8, patch=2, width=16, depth=2, heads=2, images=3, steps=6, batch=2, lr=1e-3, calls=3,
                   count=20, scale=2.0, log=2, save=3),
}

VARIANTS = {
    "arflow": [["--block", "sit", "--images", "1"]],
}


def arflow_extra(arflow):
    q, k, v = torch.randn(3, 2, 3, 2, 5, 4)
    arflow.hybrid_matrix(q, k, v, -torch.rand(2, 3, 2, 5))


EXTRA = {
    "arflow": arflow_extra,
}


def argv(method, **changes):
    """The tiny configuration as a command line."""
    words = []
    for name, value in {**TINY[method], **changes}.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return words
