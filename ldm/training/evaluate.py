"""Measure how often a model of emoji scenes draws what its prompts say.

The model draws fixed prompts, and the checker compares each picture with its prompt. The checker's own accuracy is
measured on pictures of the same scenes that are drawn from the sprites, also blurred and with other contrast.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from ldm.training.checker import SIDE, Checker, Seen
from ldm.training.scenes import GROUNDS, PLACES, RELATIONS, SIZES, Painter, Scene, Sprites, held_out

Generate = Callable[[list[str], list[int]], Sequence[Image.Image]]  # prompts, seeds -> pictures

BATCH = 16  # pictures per call of `generate`
CONDITIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "true renders": lambda picture: picture,
    "blurred renders": lambda picture: picture.filter(ImageFilter.GaussianBlur(1)),
    "contrast x 0.7": lambda picture: picture.point(lambda level: 128 + (level - 128) * 0.7),
    "contrast x 1.3": lambda picture: picture.point(lambda level: 128 + (level - 128) * 1.3),
}  # for measuring the checker


def fixed_scenes(concepts: Sequence[str]) -> dict[str, list[Scene]]:
    """Return the fixed scenes by the property that they test.

    "object": each concept on two grounds; for every other concept, the second ground is a held-out one.
    "size", "place" and "relation": 16 scenes each, with combinations of object and ground that training shows.
    """
    seen = {n: [g for g in GROUNDS if not held_out(concepts, n, g)] for n in concepts}
    unseen = {n: [g for g in GROUNDS if held_out(concepts, n, g)] for n in concepts}
    scenes: dict[str, list[Scene]] = {"object": [], "size": [], "place": [], "relation": []}
    for i, name in enumerate(concepts):
        again = unseen[name] if i % 2 and unseen[name] else seen[name]
        scenes["object"] += [Scene((name,), seen[name][i % len(seen[name])])]
        scenes["object"] += [Scene((name,), again[(i + 5) % len(again)])]
    sizes = [size for size in SIZES if size]
    places = [place for place in PLACES if place]
    for i in range(16):
        name, other = (concepts[(2 * i + step) % len(concepts)] for step in (0, 5))
        both = [ground for ground in seen[name] if ground in seen[other]]
        ground = both[i % len(both)]
        relation = list(RELATIONS)[i % len(RELATIONS)]
        scenes["size"].append(Scene((name,), ground, size=sizes[i % len(sizes)]))
        scenes["place"].append(Scene((other,), ground, place=places[i % len(places)]))
        scenes["relation"].append(Scene((name, other), ground, relation=relation))
    return scenes


def judge(scene: Scene, seen: Seen) -> dict[str, bool]:
    """Compare `seen` with `scene`, property by property. Size, place and relation need the right objects, too."""
    verdict = {"ground": seen.ground == scene.ground}
    if scene.relation:
        first, second = seen.objects
        if first.name != scene.objects[0]:
            first, second = second, first
        pair = (first.name, second.name) == scene.objects
        if abs(second.x - first.x) > abs(second.y - first.y):
            relation = "left of" if first.x < second.x else "right of"
        else:
            relation = "above" if first.y < second.y else "below"
        return verdict | {"both objects": pair, "relation": pair and relation == scene.relation}
    (found,) = seen.objects
    named = found.name == scene.objects[0]
    size = min(SIZES, key=lambda size: abs(math.log(SIZES[size] / found.size)))
    place = min(PLACES, key=lambda place: math.dist(PLACES[place], (found.x, found.y)))
    verdict |= {"object": named, "size": named and size == scene.size}
    return verdict | {"place": named and place == scene.place}


MEASURES = {  # kind of scene -> the properties that are counted
    "object": ("object", "ground"),
    "size": ("size",),
    "place": ("place",),
    "relation": ("both objects", "relation"),
}


class Answer(NamedTuple):
    """One prompt, the checker's description of its picture, and the verdict."""

    kind: str
    held_out: bool
    prompt: str
    seed: int
    seen: Seen
    verdict: dict[str, bool]


@dataclass(frozen=True)
class Report:
    """How often the model and the checker are right. Each row is the model or the checker in one condition."""

    rows: dict[str, dict[str, tuple[int, int]]]  # row -> property -> (right, all)
    likeness: dict[str, float]  # row -> mean over all objects: 0.9 for clear pictures, 0.7 for unclear ones
    answers: tuple[Answer, ...]  # for the model's pictures

    def __str__(self) -> str:
        columns = [measure for measures in MEASURES.values() for measure in measures]
        lines = [" " * 26 + "".join(f"{column:>14}" for column in [*columns, "likeness"])]
        for row, scores in self.rows.items():
            cells = [_cell(*scores[column]) if column in scores else "" for column in columns]
            cells.append(f"{self.likeness[row]:.2f}")
            lines.append(f"{row:<26}" + "".join(f"{cell:>14}" for cell in cells))
        return "\n".join(line.rstrip() for line in lines)

    def to_json(self) -> dict[str, object]:
        """Return the counts and every answer as plain values."""
        rows = {
            row: {name: {"right": right, "of": of} for name, (right, of) in scores.items()}
            | {"likeness": self.likeness[row]}
            for row, scores in self.rows.items()
        }
        answers = [
            {
                **answer._asdict(),
                "seen": {"ground": answer.seen.ground, "objects": [found._asdict() for found in answer.seen.objects]},
            }
            for answer in self.answers
        ]
        return {"rows": rows, "answers": answers}


def evaluate(generate: Generate, sprites: Sprites, *, seed: int = 0) -> Report:
    """Let `generate` draw the fixed scenes, 16 pictures per call, and check the pictures.

    generate: (prompts, seeds) -> one square picture for each prompt, of any size. sprites: the objects that the model
    was trained on. seed: of the first picture; picture i has seed + i.
    Raises ValueError if `generate` returns too few or too many pictures.
    """
    checker, concepts = Checker(sprites), tuple(sprites)
    asked = [(kind, scene) for kind, scenes in fixed_scenes(concepts).items() for scene in scenes]
    prompts = [scene.caption for _, scene in asked]
    pictures: list[Image.Image] = []
    for start in range(0, len(asked), BATCH):
        batch = prompts[start : start + BATCH]
        made = generate(batch, [seed + start + i for i in range(len(batch))])
        if len(made) != len(batch):
            raise ValueError(f"generate must return one picture per prompt, got {len(made)} for {len(batch)} prompts")
        pictures += made

    def answers(shown: Sequence[Image.Image]) -> list[Answer]:
        result = []
        for i, ((kind, scene), picture) in enumerate(zip(asked, shown, strict=True)):
            seen = checker.look(picture, len(scene.objects))
            unseen = any(held_out(concepts, name, scene.ground) for name in scene.objects)
            verdict = {name: judge(scene, seen)[name] for name in MEASURES[kind]}
            result.append(Answer(kind, unseen, scene.caption, seed + i, seen, verdict))
        return result

    model = answers(pictures)
    single = [answer for answer in model if answer.kind == "object"]
    groups = {
        "model": model,
        "  seen combinations": [answer for answer in single if not answer.held_out],
        "  held-out combinations": [answer for answer in single if answer.held_out],
    }
    painter, rng = Painter(sprites, SIDE), np.random.default_rng(seed)
    renders = [Image.fromarray(painter.paint(scene, rng)) for _, scene in asked]
    for name, change in CONDITIONS.items():
        groups[f"checker, {name}"] = answers([change(render) for render in renders])
    return Report(
        rows={row: _count(group) for row, group in groups.items()},
        likeness={row: _likeness(group) for row, group in groups.items()},
        answers=tuple(model),
    )


def _count(answers: Sequence[Answer]) -> dict[str, tuple[int, int]]:
    verdicts: dict[str, list[bool]] = {}
    for answer in answers:
        for name, right in answer.verdict.items():
            verdicts.setdefault(name, []).append(right)
    return {name: (sum(rights), len(rights)) for name, rights in verdicts.items()}


def _likeness(answers: Sequence[Answer]) -> float:
    found = [found.likeness for answer in answers for found in answer.seen.objects]
    return sum(found) / max(len(found), 1)


def _cell(right: int, of: int) -> str:
    return f"{right}/{of} {100 * right / of:3.0f}%"
