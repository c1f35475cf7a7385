"""Measure the guard of configs/policy.toml on the labeled prompts.

`python -m tests.safety.measure --write docs/operate.md` writes the table between the two marks of that file.
`python -m tests.safety.measure --names en_core_web_sm` measures the search for names, with the extra `guard`.
"""

import argparse
import re
import tomllib
from pathlib import Path

from ldm.safety.guard import Guard, Policy
from tests.safety.prompts import HARMLESS, POLICY, ROOT, count, read

BEGIN, END = "<!-- the table of tests/safety/measure.py -->\n", "<!-- end of the table -->\n"
SETS = {
    "plain": ("prompts.tsv", "written together with the lists"),
    "hard": ("hard.tsv", "written afterwards, with other words for the same wishes, and listed words in other senses"),
}
PHRASES = ("a portrait by {}", "a landscape in the style of {}", "{} painting a harbor at dusk")
PEOPLE = [
    "Jane Doe", "John Smith", "Maria Garcia", "Mohammed Ali Hassan", "Wei Zhang", "Priya Sharma", "Anna Kowalska",
    "Lars Johansson", "Fatima Al-Sayed", "Hiroshi Tanaka", "Olga Ivanova", "Kwame Mensah", "Emily Clark",
    "Pedro Alvarez", "Chloe Dubois", "Giulia Rossi", "Nguyen Van An", "Siobhan O'Brien", "Jürgen Müller", "Aisha Bello",
]  # fmt: skip


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


def names(model):
    """Return which shares of prompts Presidio refuses with the list of painters in docs/operate.md."""
    from ldm.safety.presidio import Presidio

    docs = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```toml\n(.*?)```", docs, re.DOTALL) if b.startswith("[names]"))
    allow = tomllib.loads(block)["names"]["allow"]
    painters, people = ([phrase.format(n) for phrase in PHRASES for n in some] for some in (allow, PEOPLE))
    harmless = [p.text for file, _ in SETS.values() for p in read(file) if p.kind == HARMLESS]
    listed, plain = (Presidio(model, ("PERSON",), tuple(some)) for some in (allow, ()))
    asked = {
        "painters": (listed, painters),
        "painters without the list": (plain, painters),
        "other people": (listed, people),
        "other people in small letters": (listed, [prompt.lower() for prompt in people]),
        "harmless labeled prompts": (listed, harmless),
    }
    return {
        f"{what}, refused": sum(bool(presidio.find(prompt)) for prompt in prompts) / len(prompts)
        for what, (presidio, prompts) in asked.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table into this file, too")
    parser.add_argument("--names", metavar="MODEL", help="measure only the search for names, with this spaCy model")
    args = parser.parse_args()
    if args.names:
        print(*(f"{what}: {share:.3f}" for what, share in names(args.names).items()), sep="\n")
        return
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
