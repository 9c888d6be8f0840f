#!/usr/bin/env bash
# torch 2.13.0: torch.optim.Muon has neither foreach nor fused, and takes no stack of matrices: it updates one matrix
# after the other.
#
# Seen: a step of fused AdamW is 4 tensor operations for 1, 10 or 100 matrices; a step of Muon is 30, 282 and 2,802.
# Its constructor knows no `foreach` and no `fused`, which SGD and AdamW have, and refuses a parameter of three axes,
# so that matrices of one shape cannot be handed to it in one tensor.
#
# Why a good guess is wrong: Muon's cost is thought of as that of its matrix products, which for a large layer vanish
# beside the layer's own. In a small network the list of operations is what a step costs, here seven hundred times that
# of AdamW, and no argument shortens it. Matrices of one shape can be stacked in a subclass that overrides `step`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 2> "$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cat > "$folder/count.py" <<'PY'
import inspect

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Counter(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls += 1
        return operator(*args, **(kwargs or {}))


def calls(make, count):
    matrices = [torch.nn.Parameter(torch.eye(8)) for _ in range(count)]
    for matrix in matrices:
        matrix.grad = torch.ones_like(matrix)
    optimizer = make(matrices)
    optimizer.step()                                    # makes the averages
    with Counter() as counter:
        optimizer.step()
    return counter.calls


for name in ("SGD", "AdamW", "Muon"):
    arguments = inspect.signature(getattr(torch.optim, name)).parameters
    print(name, "foreach" in arguments, "fused" in arguments)
fused = lambda matrices: torch.optim.AdamW(matrices, fused=True)
muon = lambda matrices: torch.optim.Muon(matrices)
for name, make in (("AdamW fused", fused), ("Muon", muon)):
    print(name, [calls(make, count) for count in (1, 10, 100)])
tensor = torch.nn.Parameter(torch.zeros(3, 8, 8))
try:
    torch.optim.Muon([tensor])
except ValueError as error:
    print("a stack of matrices:", "2D" in str(error))
PY
"$folder/venv/bin/python" "$folder/count.py" | tee "$folder/seen"
cat > "$folder/expected" <<'TXT'
SGD True True
AdamW True True
Muon False False
AdamW fused [4, 4, 4]
Muon [30, 282, 2802]
a stack of matrices: True
TXT
diff "$folder/expected" "$folder/seen" && echo "as described"
