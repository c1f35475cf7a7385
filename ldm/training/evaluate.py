"""Measure how often a model of emoji scenes draws what its prompts say, and how close its pictures are to true ones.

The model draws fixed prompts, and the checker compares each picture with its prompt. If asked, the checker's own
accuracy is measured on pictures of the same scenes that are drawn from the sprites. They are also measured blurred,
with other contrast, and decoded from their latents, which takes longer than the model's pictures. KID, which looks at
the pictures without their prompts, is a second measure.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from ldm.models.vae import VAE
from ldm.training.checker import Checker, Found, Seen
from ldm.training.grounds import GROUNDS
from ldm.training.kid import features, kid
from ldm.training.objects import MANY, MASS, Sprites
from ldm.training.scenes import COUNTS, PLACES, RELATIONS, SIZES, Painter, Scene, Scenes, apart, held_out

Generate = Callable[[list[str], list[int]], Sequence[Image.Image]]  # prompts, seeds -> pictures
Change = Callable[[Image.Image], Image.Image]

BATCH = 16  # pictures per call of `generate`
CONDITIONS: dict[str, Change] = {
    "true renders": lambda picture: picture,
    "blurred renders": lambda picture: picture.filter(ImageFilter.GaussianBlur(1)),
    "contrast x 0.7": lambda picture: picture.point(lambda level: 128 + (level - 128) * 0.7),
    "contrast x 1.3": lambda picture: picture.point(lambda level: 128 + (level - 128) * 1.3),
}  # for measuring the checker


def fixed_scenes(concepts: Sequence[str], styles: Sequence[str], each: int = 64) -> dict[str, list[Scene]]:
    """Return the fixed scenes by the property that they test. All name a style.

    "object": 2 * `each` scenes, every second one with a ground on which training never shows the object.
    "size", "place", "relation": `each` scenes; a quarter of the relations join objects that training never shows
    together. "count": `each` / 2 scenes. But for these, all combinations are ones that training shows.
    """

    def scene(i: int, objects: tuple[str, ...], *, unseen: bool = False, **more: str) -> Scene:
        """Take the first ground from number i on that training shows with the objects, or never shows."""
        grounds = list(GROUNDS)[i % len(GROUNDS) :] + list(GROUNDS)[: i % len(GROUNDS)]
        scenes = [Scene(objects, ground, styles[i % len(styles)], **more) for ground in grounds]
        return next((s for s in scenes if held_out(concepts, s) == unseen), scenes[0])

    def turn(choices: Mapping[str, object], i: int) -> str:
        words = [word for word in choices if word]
        return words[i // len(styles) % len(words)]

    n = len(concepts)
    found: dict[str, list[Scene]] = {kind: [] for kind in MEASURES}
    for i in range(2 * each):
        name = concepts[(i + i // n) % n]
        found["object"].append(scene(i + i // n, (name,), unseen=i % 4 >= 2))
    countable = [name for name in concepts if name not in MANY | MASS]
    for i in range(each):
        found["size"].append(scene(i, (concepts[3 * i % n],), size=turn(SIZES, i)))
        found["place"].append(scene(i, (concepts[(3 * i + 1) % n],), place=turn(PLACES, i)))
        first, unseen = concepts[(3 * i + 2) % n], i % 4 == i // 4 % 4
        others = [concepts[(3 * i + 3 + (i + step) % (n - 1)) % n] for step in range(n - 1)]
        second = next((other for other in others if apart(concepts, first, other) == unseen), others[0])
        found["relation"].append(scene(i, (first, second), unseen=unseen, relation=turn(RELATIONS, i)))
        if i % 2:
            found["count"].append(scene(i // 2, (countable[5 * i % len(countable)],), count=turn(COUNTS, i // 2)))
    return found


def judge(scene: Scene, seen: Seen) -> dict[str, bool]:
    """Compare `seen` with `scene`, property by property. All but the ground need the right objects, too."""
    verdict = {"ground": seen.ground == scene.ground}
    if scene.count:  # an extra object with another name does not matter: shadows and clouds look a little like some
        own = [found for found in seen.objects if found.name == scene.objects[0]]
        styles = all(found.style == scene.style for found in own)
        return verdict | {"count": len(own) == len(COUNTS[scene.count]), "style": bool(own) and styles}
    if scene.relation:
        first, second = seen.objects
        if first.name != scene.objects[0]:
            first, second = second, first
        pair = (first.name, second.name) == scene.objects
        if abs(second.x - first.x) > abs(second.y - first.y):
            relation = "left of" if first.x < second.x else "right of"
        else:
            relation = "above" if first.y < second.y else "below"
        styles = first.style == second.style == scene.style
        return verdict | {
            "both objects": pair,
            "style": pair and styles,
            "relation": pair and relation == scene.relation,
        }
    (found,) = seen.objects
    named = found.name == scene.objects[0]
    verdict |= {"object": named, "style": named and found.style == scene.style}
    verdict["size"] = named and nearest_size(found) == scene.size
    return verdict | {"place": named and nearest_place(found) == scene.place}


def nearest_size(found: Found) -> str:
    """Return the key of SIZES that is nearest to the size of an object."""
    return min(SIZES, key=lambda size: abs(math.log(SIZES[size] / found.size)))


def nearest_place(found: Found) -> str:
    """Return the key of PLACES that is nearest to the center of an object."""
    return min(PLACES, key=lambda place: math.dist(PLACES[place], (found.x, found.y)))


def objects_to_find(scene: Scene) -> int:
    """Return for how many objects the checker must look: one more than the count, to see that there are no more."""
    return len(COUNTS[scene.count]) + 1 if scene.count else len(scene.objects)


MEASURES = {  # kind of scene -> the properties that are counted
    "object": ("object", "style", "ground"),
    "size": ("style", "size"),
    "place": ("style", "place"),
    "relation": ("style", "both objects", "relation"),
    "count": ("style", "count"),
}
COLUMNS = ("object", "style", "ground", "size", "place", "both objects", "relation", "count")


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
        lines = [" " * 26 + "".join(f"{column:>14}" for column in [*COLUMNS, "likeness"])]
        for row, scores in self.rows.items():
            cells = [_cell(*scores[column]) if column in scores else "" for column in COLUMNS]
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


def evaluate(
    generate: Generate, sprites: Sprites, *, seed: int = 0, each: int = 64, reconstruct: Change | None = None
) -> Report:
    """Let `generate` draw the fixed scenes, 16 pictures per call, and check the pictures.

    generate: (prompts, seeds) -> one square picture for each prompt, of any size. sprites: the objects that the model
    was trained on. seed: of the first picture; picture i has seed + i. each: see `fixed_scenes`.
    reconstruct: encodes and decodes a picture with the model's VAE. With it, the checker's own accuracy is measured.
    Raises ValueError if `generate` returns too few or too many pictures.
    """
    checker, concepts = Checker(sprites), tuple(next(iter(sprites.values())))
    fixed = fixed_scenes(concepts, tuple(sprites), each)
    asked = [(kind, scene) for kind, scenes in fixed.items() for scene in scenes]
    pictures = generate_all(generate, [scene.caption for _, scene in asked], seed)

    def answers(shown: Sequence[Image.Image]) -> list[Answer]:
        result = []
        for i, ((kind, scene), picture) in enumerate(zip(asked, shown, strict=True)):
            seen = checker.look(picture, objects_to_find(scene))
            verdict = {name: judge(scene, seen)[name] for name in MEASURES[kind]}
            result.append(Answer(kind, held_out(concepts, scene), scene.caption, seed + i, seen, verdict))
        return result

    model = answers(pictures)
    single, pairs = ([answer for answer in model if answer.kind == kind] for kind in ("object", "relation"))
    groups = {
        "model": model,
        "  seen combinations": [answer for answer in single if not answer.held_out],
        "  held-out combinations": [answer for answer in single if answer.held_out],
        "  seen pairs": [answer for answer in pairs if not answer.held_out],
        "  held-out pairs": [answer for answer in pairs if answer.held_out],
    }
    if reconstruct:
        painter, rng = Painter(sprites, pictures[0].width), np.random.default_rng(seed)
        renders = [Image.fromarray(painter.paint(scene, rng)) for _, scene in asked]
        for name, change in (CONDITIONS | {"decoded latents": reconstruct}).items():
            groups[f"checker, {name}"] = answers([change(render) for render in renders])
    return Report(
        rows={row: _count(group) for row, group in groups.items()},
        likeness={row: _likeness(group) for row, group in groups.items()},
        answers=tuple(model),
    )


def generate_all(generate: Generate, prompts: Sequence[str], seed: int) -> list[Image.Image]:
    """Call `generate` for BATCH prompts at a time. Picture i has the seed `seed` + i."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        batch = list(prompts[start : start + BATCH])
        made = generate(batch, [seed + start + i for i in range(len(batch))])
        if len(made) != len(batch):
            raise ValueError(f"generate must return one picture per prompt, got {len(made)} for {len(batch)} prompts")
        pictures += made
    return pictures


def distance(generate: Generate, sprites: Sprites, vae: VAE, count: int, *, seed: int = 0) -> tuple[float, float]:
    """Return KID between `count` pictures for random captions and as many true renders, with its standard error.

    The true renders show other scenes of the same distribution. vae: gives the features; see `ldm.training.kid`.
    Raises ValueError as `generate_all` and `kid` do.
    """
    captions = Scenes(sprites, seed=seed + 1)  # not the scenes of the training, which have seed 0
    made = generate_all(generate, [captions.caption(i) for i in range(count)], seed)
    scenes = Scenes(sprites, made[0].width, seed=seed + 2)
    renders = [Image.fromarray(scenes[i][0].permute(1, 2, 0).numpy()) for i in range(count)]
    return kid(features(vae, made), features(vae, renders))


def _count(answers: Sequence[Answer]) -> dict[str, tuple[int, int]]:
    verdicts: dict[str, list[bool]] = {}
    for answer in answers:
        for name, right in answer.verdict.items():
            verdicts.setdefault(name, []).append(right)
    return {name: (sum(rights), len(rights)) for name, rights in verdicts.items()}


def _likeness(answers: Sequence[Answer]) -> float:
    """Return the mean over all objects but the extra one that is looked for in scenes with a count."""
    found = [one for a in answers for one in (a.seen.objects[:-1] if a.kind == "count" else a.seen.objects)]
    return sum(one.likeness for one in found) / max(len(found), 1)


def _cell(right: int, of: int) -> str:
    return f"{right}/{of} {100 * right / of:3.0f}%"
