"""python -m tests.claims FILE --quick | --full    measure and write assets/claims/FILE.json
python -m tests.claims --table                   write assets/claims/README.md and the README's scoreboard from those files"""

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
OPEN = ("not shown at this scale", "reversed")


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
        content = json.loads(path.read_text()) if path.exists() else {"file": name, "notes": [], "rows": {}}     # others may have written since
        content["rows"][row.__name__] = {**result, "scale": scale, "seconds": round(time.perf_counter() - start),
                                "hardware": hardware(), "date": datetime.date.today().isoformat(),
                                "command": f"python -m tests.claims {name} --{scale} {row.__name__}"}
        print(f"{row.__name__}: {result['measured']} -- {result['verdict']}", flush=True)
        FOLDER.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def hardware():
    """What the figures were measured on, in a few words."""
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"{chip}, torch {torch.__version__}, Python {platform.python_version()}"


def rows_by_file():
    """{file: its stored claims}, in the order of their names."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json")) if not path.stem.endswith("_gpu")}


def scoreboard(stored):
    """The README's few lines: how many rows of each file have which verdict."""
    verdicts = ("shown", "not shown at this scale", "reversed", "not run")
    lines = [f"| file | {' | '.join(verdicts)} |", "| --- |" + " --- |" * len(verdicts)]
    for name, content in stored.items():
        found = [row["verdict"] for row in content["rows"].values()]
        counts = " | ".join(str(found.count(verdict)) for verdict in verdicts)
        lines.append(f"| [{name}.py](assets/claims/README.md#{name}py) | {counts} |")
    return "\n".join(lines)


def pages(stored):
    """assets/claims/README.md: for each file its words, its table and its figures."""
    parts = ["# Claims, measured", "", "Made by `python -m tests.claims FILE --quick` (one seed) or `--full` (three); this page by",
             "`python -m tests.claims --table`, from the JSON files beside it, which hold command, seconds, hardware and raw figures",
             "of every row. All figures are toy-scale, beside the paper's and never in its place. The column `seeds` says how many",
             "trainings a figure rests on (accounts and timings have none and count as one): where it is 1, \"shown\" means that one",
             "short run points the paper's way, no more. The verdicts' rules were written before the runs, unless a word says otherwise.",
             "What an open row would take is a judgement, untested.", ""]
    for name, content in stored.items():
        parts += [f"## {name}.py", ""]
        parts += [f"- {note}" for note in content.get("notes", [])]
        parts += ["", "| claim | the paper | here | seeds | verdict |", "| --- | --- | --- | --- | --- |"]
        needed = importlib.import_module(f"tests.claims.claim_{name}").NEEDED
        for key, row in content["rows"].items():
            here = row["measured"].replace(" (n = 1)", "").replace("; ", "<br>")
            if row["verdict"] in OPEN:
                here += f"<br>*To show it would take:* {needed.get(key, 'not said yet')}"
            count = 3 if "n = 3" in row["measured"] else 1 if row["verdict"] != "not run" else "-"      # a timing has no seeds
            parts.append(f"| {row['claim']} | {row['paper']} | {here} | {count} | {row['verdict']} |")
        for figure in sorted((ROOT / "assets").glob(f"{name}_*.svg")):
            title = figure.stem.removeprefix(name + "_").replace("_", " ")
            parts += ["", f"![{name}: {title}](../{figure.name})"]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def write_table():
    """assets/claims/README.md, and the scoreboard between the README's markers."""
    stored = rows_by_file()
    (FOLDER / "README.md").write_text(pages(stored))
    path = ROOT / "README.md"
    text = re.sub(r"(<!-- claims -->\n).*(<!-- /claims -->)", lambda m: m[1] + scoreboard(stored) + "\n" + m[2],
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
