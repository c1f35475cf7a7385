"""Measure how much of a hint's edges the pictures of a ControlNet follow."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from ldm.control import canny
from ldm.training.evaluate import fixed_scenes
from ldm.training.objects import Sprites
from ldm.training.scenes import Painter

GenerateOne = Callable[[str, int, Image.Image | None], Image.Image]  # prompt, seed, hint or None -> picture
WITHIN = 2  # pixels


def outlines(generate: GenerateOne, sprites: Sprites, side: int, *, count: int = 64, seed: int = 0) -> dict[str, float]:
    """Return the mean of `followed` for pictures with and without a hint.

    The hints are the edges of true renders of `fixed_scenes`, in which one object has a size or a place. The prompts
    are their captions without size and place, which only the hint tells. Picture i has the seed `seed` + i.
    side: of the pictures in pixels.
    """
    kinds = fixed_scenes(tuple(next(iter(sprites.values()))), tuple(sprites), count // 2)
    scenes = [scene for both in zip(kinds["size"], kinds["place"], strict=True) for scene in both]
    painter, rng = Painter(sprites, side), np.random.default_rng(seed)
    shares: dict[str, list[float]] = {"with": [], "without": []}
    for i, scene in enumerate(scenes):
        hint = canny(Image.fromarray(painter.paint(scene, rng)))
        prompt = scene.without_layout().caption
        for name, given in (("with", hint), ("without", None)):
            shares[name].append(followed(hint, generate(prompt, seed + i, given)))
    return {name: float(np.mean(found)) for name, found in shares.items()}


def followed(hint: Image.Image, picture: Image.Image) -> float:
    """Return the share of the hint's edge pixels with an edge of `picture` at most WITHIN pixels away, 1 without edges.

    hint: edges, white on black. picture: RGB, of the same size; its edges are found by Canny's method.
    """
    near = canny(picture).convert("L").filter(ImageFilter.MaxFilter(2 * WITHIN + 1))
    wanted = np.asarray(hint.convert("L")) > 127
    return float((np.asarray(near) > 127)[wanted].mean()) if wanted.any() else 1.0
