"""Measure what the pictures of an IP-Adapter keep of the pictures that prompt them."""

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from ldm.training.checker import Checker
from ldm.training.evaluate import fixed_scenes, judge, objects_to_find
from ldm.training.objects import Sprites
from ldm.training.scenes import Painter

GenerateOne = Callable[[int, Image.Image | None], Image.Image]  # seed, image prompt or None -> picture
COUNTED = {  # kind of scene -> the properties that are counted
    "object": ("object", "style", "ground"),
    "size": ("size",),
    "place": ("place",),
}
Scores = Mapping[str, tuple[int, int]]  # property -> (right, all)


def likeness(
    generate: GenerateOne, sprites: Sprites, side: int, *, count: int = 64, seed: int = 0
) -> dict[str, Scores]:
    """Return how many properties of true renders are right in pictures "with" these renders as image prompts.

    "without" is the same for pictures without any prompt. `count` scenes show one object; as many have a size or a
    place. There is no text. Picture i has the seed `seed` + i. side: of the renders in pixels.
    """
    fixed = fixed_scenes(tuple(next(iter(sprites.values()))), tuple(sprites), count // 2)
    painter, checker, rng = Painter(sprites, side), Checker(sprites), np.random.default_rng(seed)
    found: dict[str, dict[str, list[bool]]] = {"with": {}, "without": {}}
    asked = [(kind, scene) for kind in COUNTED for scene in fixed[kind]]
    for i, (kind, scene) in enumerate(asked):
        render = Image.fromarray(painter.paint(scene, rng))
        for row, prompt in (("with", render), ("without", None)):
            verdict = judge(scene, checker.look(generate(seed + i, prompt), objects_to_find(scene)))
            for name in COUNTED[kind]:
                found[row].setdefault(name, []).append(verdict[name])
    return {row: {name: (sum(r), len(r)) for name, r in verdicts.items()} for row, verdicts in found.items()}
