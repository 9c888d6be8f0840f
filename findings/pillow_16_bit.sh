#!/usr/bin/env bash
# Pillow 13.0.0: a 16-bit grey PNG converted to "L" or "RGB" is cut off at 255, not scaled to 8 bits.
#
# Seen: a ramp from 0 to 65,535 in steps of 257, whose 8-bit equivalent is 0, 1, ... 255 with mean 127.5, opens in
# mode I;16; convert("L") and convert("RGB") give 0 once and 255 for all else, mean 254.0. No warning is given.
#
# Why a good guess is wrong: convert("RGB") is what every image loader calls to get 8-bit colour from whatever a
# folder holds, and for all other modes of files (1, L, LA, P, RGB, RGBA, CMYK, YCbCr) it maps black to black and
# white to white. Sixteen-bit pictures (medical scans, depth maps, microscopes) turn white in training, and a data
# set of them still loads, batches and trains. Dividing the array by 257 before the conversion is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 numpy==2.4.6 2> "$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cat > "$folder/ramp.py" <<'PY'
import io

import numpy as np
from PIL import Image

ramp = (np.arange(256, dtype=np.uint16) * 257)[None].repeat(4, 0)
file = io.BytesIO()
Image.fromarray(ramp).save(file, "PNG")
image = Image.open(io.BytesIO(file.getvalue()))
print(image.mode, "scaled by hand", (np.asarray(image) / 257).mean())
for mode in ("L", "RGB"):
    values = np.asarray(image.convert(mode))
    print(mode, "mean", round(float(values.mean()), 3), "values", sorted(set(values.ravel().tolist())))
PY
"$folder/venv/bin/python" "$folder/ramp.py" | tee "$folder/seen"
cat > "$folder/expected" <<'TXT'
I;16 scaled by hand 127.5
L mean 254.004 values [0, 255]
RGB mean 254.004 values [0, 255]
TXT
diff "$folder/expected" "$folder/seen" && echo "as described"
