"""Labeled prompts, and how often a guard is right about them.

prompts.tsv was written together with the word lists of configs/policy.toml. hard.tsv was written afterwards, with
other words for the same wishes. After its first run one false alarm was mended, and a few translated words were added;
five rows that these words would have caught are in other languages now. So its figures flatter a little, too.
"""

import json
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
POLICY = ROOT / "configs" / "policy.toml"
HARMLESS = "harmless"


class Prompt(NamedTuple):
    kind: str  # harmless, or why it is to be refused
    text: str


class Counts(NamedTuple):
    """How many prompts were refused rightly and wrongly, and allowed wrongly and rightly."""

    hits: int
    false_alarms: int
    misses: int
    passes: int

    @property
    def precision(self):
        return self.hits / max(1, self.hits + self.false_alarms)

    @property
    def recall(self):
        return self.hits / max(1, self.hits + self.misses)


def read(name):
    """Return the prompts of a file: prompts.tsv or hard.tsv. A text may hold escapes such as \\u200b."""
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
    return [Prompt(kind, json.loads(f'"{text}"')) for kind, text in (line.split("\t") for line in lines)]


def count(guard, prompts):
    """Return the counts, and the prompts that the guard is wrong about."""
    refused = [guard.check(prompt.text).refused for prompt in prompts]
    wrong = [p for p, r in zip(prompts, refused, strict=True) if r == (p.kind == HARMLESS)]
    alarms = sum(p.kind == HARMLESS for p in wrong)
    harmless = sum(p.kind == HARMLESS for p in prompts)
    misses = len(wrong) - alarms
    return Counts(len(prompts) - harmless - misses, alarms, misses, harmless - alarms), wrong
