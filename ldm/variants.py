"""Balanced variants of a prompt, and a report of what came out.

`a photo of a {nurse|engineer}` stands for two prompts. Attributes, such as those of a file, are appended to each.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ldm.request import MOST, Request
from ldm.strict import from_dict, read_toml

_GROUP = re.compile(r"\{([^{}|]*(?:\|[^{}|]*)+)\}")
Choices = Mapping[str, str]  # the value of each attribute; a group of a prompt is an attribute with its text as name


@dataclass(frozen=True)
class Variant:
    """A prompt, and the choices that made it."""

    prompt: str
    choices: Choices


@dataclass(frozen=True)
class Balance:
    """What a file says about variants.

    attributes: the values of each are appended to a prompt after a comma. "" appends nothing.
    classifiers: the folders of `ldm.classifier.Classifier`, by the name of what they tell.
    """

    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    classifiers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> "Balance":
        """Read a TOML file, for example with `[attributes]` and the line `age = ["young", "old"]`.

        Raises ValueError for a wrong file, and OSError for one that cannot be read.
        """
        return from_dict(read_toml(path), cls, where=str(path))


def expand(prompt: str, attributes: Mapping[str, Sequence[str]] | None = None) -> list[Variant]:
    """Return a variant for each combination of the groups of `prompt` and the values of `attributes`.

    The first n variants, for each n, have all values of an attribute equally often, up to one. Braces without a | stay.
    Raises ValueError for nested groups, a value that an attribute has twice, and too many combinations.
    """
    pieces = _GROUP.split(prompt)
    texts, groups = pieces[::2], [piece.split("|") for piece in pieces[1::2]]
    if any(re.search(r"\{[^}]*$|^[^{]*\}", text) for text in texts) and groups:
        raise ValueError(f"groups such as {{a|b}} must not stand in other braces, got {prompt!r}")
    names: list[str] = []
    for piece in pieces[1::2]:
        again = sum(name.split(" #")[0] == piece for name in names)
        names.append(f"{piece} #{again + 1}" if again else piece)
    lists = dict(zip(names, groups, strict=True)) | {name: list(values) for name, values in (attributes or {}).items()}
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} needs values that differ from each other, got {values}")
    total = math.prod(map(len, lists.values()))
    if total > MOST:
        raise ValueError(f"the groups and attributes have {total} combinations; at most {MOST} are possible")
    variants = []
    for i in range(total):
        choices = {n: v[k] for (n, v), k in zip(lists.items(), _places(i, [*map(len, lists.values())]), strict=True)}
        chosen = [*choices.values()]
        text = texts[0] + "".join(a + b for a, b in zip(chosen, texts[1:], strict=False))
        variants.append(Variant(", ".join([text, *filter(None, chosen[len(groups) :])]), choices))
    return variants


def _places(i: int, sizes: Sequence[int]) -> list[int]:
    """Return combination `i` of as many lists as `sizes`: a place in each.

    Each list is walked in circles. It skips a place whenever it and the lists before it come to their beginnings
    together. So prod(sizes) combinations are all different, and the first n of them have each place equally often, up
    to one.
    """
    places, before = [], 1
    for size in sizes:
        j = i % (before * size)
        places.append((j + j // math.lcm(before, size)) % size)
        before *= size
    return places


def varied(request: Request, variants: Sequence[Variant]) -> Request:
    """Return a request with as many pictures as `request`, but at least one per variant, whose prompts are `variants`.

    A number that is no multiple of the variants is raised to the next, so that all variants have equally many pictures.
    The record of such a picture holds its prompt.
    """
    times = -(-request.images // len(variants))
    prompts = tuple(variant.prompt for variant in variants) * times
    return replace(request, prompt=prompts, images=len(prompts))


def report(asked: Sequence[Choices], found: Sequence[Choices]) -> dict[str, Any]:
    """Count what came out for what was asked.

    asked: the choices of each picture, as in `Variant` and in the manifest of `ldm batch`. found: what classifiers say
    of each picture, such as {"age": "old"}; an attribute that they do not know is left out.
    Returns {"pictures": n, "asked": {attribute: {value: n}}, "found": the same, "crossed": {asked attribute:
    {asked value: {found attribute: {found value: n}}}}, "right": {attribute that was asked and found: share}}.
    Raises ValueError if the numbers of pictures differ.
    """
    if len(asked) != len(found):
        raise ValueError(f"the report needs an answer for each of {len(asked)} pictures, got {len(found)}")
    pairs = [
        (choice, answer)
        for choices, answers in zip(asked, found, strict=True)
        for choice in choices.items()
        for answer in answers.items()
    ]
    crossed: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    for ((attribute, value), (other, answer)), n in sorted(Counter(pairs).items()):
        crossed.setdefault(attribute, {}).setdefault(value, {}).setdefault(other, {})[answer] = n
    same = [(choice[0], choice[1] == answer[1]) for choice, answer in pairs if choice[0] == answer[0]]
    return {
        "pictures": len(asked),
        "asked": _counts(asked),
        "found": _counts(found),
        "crossed": crossed,
        "right": {
            name: sum(right for n, right in same if n == name) / sum(n == name for n, _ in same)
            for name in dict.fromkeys(name for name, _ in same)
        },
    }


def _counts(choices: Sequence[Choices]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for each in choices:
        for name, value in each.items():
            counts.setdefault(name, Counter())[value] += 1
    return {name: dict(sorted(counter.items())) for name, counter in counts.items()}
