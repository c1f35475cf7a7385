"""Measure the guard of configs/policy.toml on the labeled prompts.

`python -m tests.safety.measure --write docs/operate.md` writes the table between the two marks of that file.
"""

import argparse
import re
from pathlib import Path

from ldm.safety.guard import Guard, Policy
from tests.safety.prompts import HARMLESS, POLICY, count, read

BEGIN, END = "<!-- the table of tests/safety/measure.py -->\n", "<!-- end of the table -->\n"
SETS = {
    "plain": ("prompts.tsv", "written together with the lists"),
    "hard": ("hard.tsv", "written afterwards, with other words for the same wishes, and listed words in other senses"),
}


def table(guard):
    """Return the lines of the table in Markdown."""
    lines = [
        "| prompts | harmless | of these refused | to refuse | of these refused | precision | recall |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (file, what) in SETS.items():
        counts, _ = count(guard, read(file))
        harmless, wanted = counts.false_alarms + counts.passes, counts.hits + counts.misses
        lines.append(
            f"| {name}: {what} | {harmless} | {counts.false_alarms} | {wanted} | {counts.hits} | "
            f"{counts.precision:.3f} | {counts.recall:.3f} |"
        )
    lines += ["", "| kind of the plain prompts | prompts | refused |", "| --- | --- | --- |"]
    prompts = read("prompts.tsv")
    for kind in dict.fromkeys(prompt.kind for prompt in prompts if prompt.kind != HARMLESS):
        some = [prompt for prompt in prompts if prompt.kind == kind]
        lines.append(f"| {kind} | {len(some)} | {count(guard, some)[0].hits} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table into this file, too")
    args = parser.parse_args()
    guard = Guard(Policy.read(POLICY))
    found = table(guard)
    print(found)
    for file, _ in SETS.values():
        print(file, *count(guard, read(file))[1], sep="\n    ")
    if args.write:
        text = args.write.read_text(encoding="utf-8")
        text = re.sub(f"(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", lambda _: found, text, flags=re.DOTALL)
        args.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
