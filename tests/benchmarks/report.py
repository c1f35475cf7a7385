"""The results as tables in docs/performance.md, and as rows in docs/performance.json."""

import json

from tests.benchmarks.cases import CASES

MEMORY = """\
## Memory, counted

The tensors of one picture in fp16 were counted without computing them (`ldm/placement/live_bytes.py`). Kernels may
use more memory inside. The rows of step, decode and encode leave out the weights. The rows of a picture include all
weights that are on the device at the peak. "sdpa" is counted as a fused kernel, which holds no scores. "slabs" has the
budget of the option.
"""
MARKS = ("<!-- measured -->\n", "<!-- end -->")
ABOUT = ("machine", "device", "date", "command", "threads", "versions", "rates")
KEY = ("machine", "case", "part", "dtype", "side", "against")


def document(results):
    """Return all results as Markdown."""
    text = []
    for machine in dict.fromkeys(row["machine"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["machine"] == machine]
        runs = dict.fromkeys("; ".join(row[name] for name in ABOUT[2:]) for row in rows)
        text += [f"## {machine}\n", "".join(f"- {run}\n" for run in runs), table(rows)]
    return "\n".join([*text, MEMORY, table(results["memory"])] if results["memory"] else text)


def table(rows):
    """Return rows as a Markdown table, without the fields that describe their runs."""
    head = list(dict.fromkeys(name for row in rows for name in row if name not in ABOUT))
    cells = [[row.get(name, "") for name in head] for row in rows]
    lines = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in line] for line in cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *lines])


def place(key):
    """Order rows by machine, then by case as in `CASES`."""
    machine, case, *rest = key
    return machine or "", [*CASES, case].index(case), case, [str(name) for name in rest]


def publish(folder, new):
    """Write results into the folder, if one is given: they replace the rows with the same key, and all others stay."""
    if folder is None:
        return
    file = folder / "performance.json"
    old = json.loads(file.read_text()) if file.is_file() else {"rows": [], "memory": []}
    merged = {}
    for kind in old:
        rows = {tuple(row.get(name) for name in KEY): row for row in old[kind] + new[kind]}
        merged[kind] = [rows[key] for key in sorted(rows, key=place)]
    file.write_text(json.dumps(merged, indent=1) + "\n")
    text, (begin, end) = file.with_suffix(".md"), MARKS
    written = text.read_text(encoding="utf-8") if text.is_file() else f"# Performance\n\n{begin}{end}\n"
    before, rest = written.split(begin)
    after = rest.split(end)[1]
    text.write_text(f"{before}{begin}\n{document(merged)}\n{end}{after}", encoding="utf-8")
