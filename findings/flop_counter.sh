#!/usr/bin/env bash
# torch 2.13.0 (CPU): torch.utils.flop_counter.FlopCounterMode counts attention as nothing, and the weight gradient
# of a grouped convolution as many times as there are groups.
#
# Seen: scaled_dot_product_attention on (2, 3, 5, 4), forward, counts 0, where its two matrix products cost 2,400
# (a multiply-add counts 2). The counter has formulas for the CUDA kernels of this operator, and for its plain form
# from matrix products; on a CPU torch picks a third kernel, for which there is none, and an operator without a
# formula counts 0 without a warning. With torch.nn.attention.sdpa_kernel(SDPBackend.MATH) the 2,400 appear.
#
# Seen: a 3 x 3 convolution of 6 channels in g groups, forward and backward, counts 3, 4, 5, 8 times its forward for
# g = 1, 2, 3, 6. Each of the two gradients costs as much as the forward, so 3 is right for every g; the formula for
# the weight gradient forgets the groups and counts g times too much.
#
# Why a good guess is wrong: the counter is known to be exact by operator, and a total that is not zero looks whole.
# A transformer measured on a CPU lacks its attention; a depthwise network's training step seems far dearer than
# three forwards.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 2> "$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cat > "$folder/count.py" <<'PY'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


q = torch.randn(2, 3, 5, 4)
attend = lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)
print("attention", count(attend))
with sdpa_kernel(SDPBackend.MATH):
    print("attention from matrix products", count(attend))
x = torch.randn(2, 6, 8, 8, requires_grad=True)
for groups in (1, 2, 3, 6):
    layer = torch.nn.Conv2d(6, 6, 3, padding=1, groups=groups)
    step, forward = count(lambda: layer(x).sum().backward()), count(lambda: layer(x))
    print("groups", groups, "step over forward", step / forward)
PY
"$folder/venv/bin/python" "$folder/count.py" | tee "$folder/seen"
cat > "$folder/expected" <<'TXT'
attention 0
attention from matrix products 2400
groups 1 step over forward 3.0
groups 2 step over forward 4.0
groups 3 step over forward 5.0
groups 6 step over forward 8.0
TXT
diff "$folder/expected" "$folder/seen" && echo "as described"
