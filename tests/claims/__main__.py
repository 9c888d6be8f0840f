"""python -m tests.claims FILE --quick | --full    measure and write assets/claims/FILE.json
python -m tests.claims --table                   write the README's table from those files"""

import datetime
import importlib
import json
import os
import platform
import re
import sys
import time

from tests import ROOT

import torch

FOLDER = ROOT / "assets" / "claims"


def measure(name, scale, only=()):
    """Run the rows of claim_<name>.py (those named in `only`, or all) and store what they return."""
    module = importlib.import_module(f"tests.claims.claim_{name}")
    path = FOLDER / f"{name}.json"
    for row in module.ROWS:
        long = scale == "quick" and row in getattr(module, "LONG", ())
        if row.__name__ not in only if only else long:
            continue
        start = time.perf_counter()
        result = row(scale)
        if result is None:
            print(f"{row.__name__}: skipped, what it needs is not here")
            continue
        stored = json.loads(path.read_text())["rows"] if path.exists() else {}      # others may have written since
        stored[row.__name__] = {**result, "scale": scale, "seconds": round(time.perf_counter() - start),
                                "hardware": hardware(), "date": datetime.date.today().isoformat(),
                                "command": f"python -m tests.claims {name} --{scale} {row.__name__}"}
        print(f"{row.__name__}: {result['measured']} -- {result['verdict']}", flush=True)
        FOLDER.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"file": name, "rows": stored}, indent=1, ensure_ascii=False) + "\n")


def hardware():
    """What the figures were measured on, in a few words."""
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"{chip}, torch {torch.__version__}, Python {platform.python_version()}"


def table():
    """The README's claims, from all of assets/claims/*.json: a heading, a table and its figures for each file."""
    parts, files = [], [path for path in sorted(FOLDER.glob("*.json")) if not path.stem.endswith("_gpu")]
    verdicts = [row["verdict"] for path in files for row in json.loads(path.read_text())["rows"].values()]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in sorted({*verdicts}, key=verdicts.count, reverse=True)]
    parts += [f"{len(verdicts)} claims: {', '.join(counts)}.", ""]
    for path in files:
        name = path.stem
        parts += [f"### {name}.py", "", "| claim | the paper | here | seeds | verdict |", "| --- | --- | --- | --- | --- |"]
        for row in json.loads(path.read_text())["rows"].values():
            here = row["measured"].replace(" (n = 1)", "").replace("; ", "<br>")
            count = 3 if "n = 3" in row["measured"] else 1 if row["verdict"] != "not run" else "-"      # a timing has no seeds
            parts.append(f"| {row['claim']} | {row['paper']} | {here} | {count} | {row['verdict']} |")
        figures = sorted((ROOT / "assets").glob(f"{name}_*.svg"))
        links = ", ".join(f"[{figure.stem.removeprefix(name + '_').replace('_', ' ')}](assets/{figure.name})" for figure in figures)
        parts += ["", f"Figures: {links}.", ""] if links else [""]
    return "\n".join(parts).rstrip()


def write_table():
    """Put the table between the README's markers."""
    path = ROOT / "README.md"
    text = re.sub(r"(<!-- claims -->\n).*(<!-- /claims -->)", lambda m: m[1] + table() + "\n" + m[2],
                  path.read_text(), flags=re.S)
    path.write_text(text)


if __name__ == "__main__":
    words = sys.argv[1:]
    names = [path.stem.removeprefix("claim_") for path in sorted((ROOT / "tests/claims").glob("claim_*.py"))]
    if words == ["--table"]:
        write_table()
    elif len(words) >= 2 and words[0] in names and words[1] in ("--quick", "--full"):
        measure(words[0], words[1].removeprefix("--"), words[2:])
        write_table()
    else:
        sys.exit(f"{__doc__}\nFILE: {', '.join(names)}; row names after it run these rows alone")
