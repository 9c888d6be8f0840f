"""One experiment per claim of an abstract: python -m tests.claims FILE --quick | --full

claim_FILE.py holds ROWS, a list of functions row(scale) -> dict. `scale` is "quick" (one seed, the whole file in at
most 5 minutes on two cores) or "full" (three seeds, at most 60 minutes). A row returns

    claim     what the abstract or the digest says, in one line
    paper     the paper's figure, as text; "unread" where it is unknown
    measured  ours, as text with n and spread
    verdict   "shown", "not shown at this scale", "reversed", or "not run" (a GPU row, ready to run)
    numbers   the raw figures, so that nothing has to be read off a text

and may write a picture into assets/. A row that needs what is not here returns None.
"""

import statistics

import common

import numpy as np


def spread(values):
    """'mean ± s.d. (n = ...)' of a list of numbers."""
    if len(values) == 1:
        return f"{values[0]:.3g} (n = 1)"
    return f"{statistics.mean(values):.3g} ± {statistics.stdev(values):.2g} (n = {len(values)})"


def seeds(scale):
    """The seeds of a row: one for a quick look, three in full."""
    return range(1 if scale == "quick" else 3)


def bar_chart(path, groups, title="", unit=""):
    """Write {group: {name: value or (value, spread)}} as an SVG of horizontal bars with their numbers."""
    names = dict.fromkeys(name for bars in groups.values() for name in bars)
    colors = dict(zip(names, common.COLORS))
    top = max([np.max(value) for bars in groups.values() for value in bars.values()] + [1e-12])
    parts = [common.svg_text(360, 28, title, extra='font-size="14" font-weight="bold"')]
    y = 46
    for group, bars in groups.items():
        parts.append(common.svg_text(20, y + 12, group, "start", 'font-weight="bold"'))
        for name, value in bars.items():
            value, spread = (*np.atleast_1d(value), 0)[:2]
            y += 20
            text = f"{value:.4g} ± {spread:.2g} {unit}" if spread else f"{value:.4g} {unit}"
            length = 340 * max(value, 0) / top
            parts.append(f'<rect x="200" y="{y}" width="{length:.1f}" height="15" fill="{colors[name]}"/>')
            parts.append(common.svg_text(190, y + 12, name, "end"))
            parts.append(common.svg_text(206 + length, y + 12, text, "start"))
        y += 28
    common.svg(path, 720, y, parts)
