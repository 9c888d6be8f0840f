#!/usr/bin/env bash
# diffusers 0.42.1, torch 2.13.0: FlowMatchEulerDiscreteScheduler draws two different schedules for one shift, by
# whether it was given to the constructor or to set_shift.
#
# Seen, at shift 8 and four steps: set_shift(8) ends at noise level .0079, which is 8 u / (1 + 7 u) at u = .001, the
# least level without a shift; shift=8 ends at .0602, that formula applied to .0079. The levels between differ as well,
# and the constructor's own list, before set_timesteps, ends at .0079. So the last Euler step removes 6 % of the noise
# in one call, where the formula as written leaves .8 % for it. With shift 1, or with levels given by hand, both agree.
#
# Why a good guess is wrong: a rectified flow's shift is thought of as one map from even steps to uneven ones, and a
# setter as the constructor's argument, later. Here the constructor keeps the ends of its shifted list, and set_timesteps
# spaces between those ends and shifts again. Who copies a model's shift into a sampler of their own, and compares
# pictures step by step, meets a difference that no weight explains.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 2> "$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cat > "$folder/levels.py" <<'PY'
from diffusers import FlowMatchEulerDiscreteScheduler


def levels(scheduler, **steps):
    scheduler.set_timesteps(**(steps or dict(num_inference_steps=4)))
    return [round(float(level), 4) for level in scheduler.sigmas[:-1]]


def setter(shift):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_shift(shift)
    return scheduler


even = [1.0, 0.667, 0.334, 0.001]
for shift in (1.0, 8.0):
    made = FlowMatchEulerDiscreteScheduler(shift=shift)
    print("shift", shift, "by the formula", [round(shift * u / (1 + (shift - 1) * u), 4) for u in even])
    print("  constructor, before set_timesteps", round(float(made.sigmas[-1]), 4))
    print("  constructor", levels(made))
    print("  set_shift", levels(setter(shift)))
    print("  levels by hand", levels(FlowMatchEulerDiscreteScheduler(shift=shift), sigmas=even))
PY
"$folder/venv/bin/python" "$folder/levels.py" | tee "$folder/seen"
cat > "$folder/expected" <<'TXT'
shift 1.0 by the formula [1.0, 0.667, 0.334, 0.001]
  constructor, before set_timesteps 0.001
  constructor [1.0, 0.667, 0.334, 0.001]
  set_shift [1.0, 0.667, 0.334, 0.001]
  levels by hand [1.0, 0.667, 0.334, 0.001]
shift 8.0 by the formula [1.0, 0.9413, 0.8005, 0.0079]
  constructor, before set_timesteps 0.0079
  constructor [1.0, 0.9418, 0.8038, 0.0602]
  set_shift [1.0, 0.9413, 0.8005, 0.0079]
  levels by hand [1.0, 0.9413, 0.8005, 0.0079]
TXT
diff "$folder/expected" "$folder/seen" && echo "as described"
