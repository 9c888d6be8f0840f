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


def spread(values):
    """'mean ± s.d. (n = ...)' of a list of numbers."""
    if len(values) == 1:
        return f"{values[0]:.3g} (n = 1)"
    return f"{statistics.mean(values):.3g} ± {statistics.stdev(values):.2g} (n = {len(values)})"


def seeds(scale):
    """The seeds of a row: one for a quick look, three in full."""
    return range(1 if scale == "quick" else 3)
