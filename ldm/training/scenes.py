"""Random pictures with captions: emoji objects on computed grounds, drawn when they are needed.

A scene has one object with a size and a place, two objects with a relation, or several of the same object. Each scene
depends on (seed, index) alone.
"""

import dataclasses
import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from ldm.training.grounds import GROUNDS, Pixels
from ldm.training.objects import MANY, MASS, NAMES, Sprites, plural

GRID = 16  # cells along each side of the picture, as many as the latents have pixels
SIZES = {"small": 5 / GRID, "": 8 / GRID, "big": 12 / GRID}  # side of the object / side of the picture
SIZE_WORDS = {"small": ("small", "little", "tiny"), "": ("",), "big": ("big", "large", "huge")}
PLACES = {
    "": (0.5, 0.5),  # x and y of the object's center / side of the picture
    "on the left": (0.28, 0.5),
    "on the right": (0.72, 0.5),
    "at the top": (0.5, 0.28),
    "at the bottom": (0.5, 0.72),
}
RELATIONS = {  # centers of the first and the second object
    "left of": ((0.25, 0.5), (0.75, 0.5)),
    "right of": ((0.75, 0.5), (0.25, 0.5)),
    "above": ((0.5, 0.25), (0.5, 0.75)),
    "below": ((0.5, 0.75), (0.5, 0.25)),
}
COUNTS = {  # centers of several equal objects
    "two": ((0.25, 0.5), (0.75, 0.5)),
    "three": ((0.5, 0.25), (0.25, 0.75), (0.75, 0.75)),
    "four": ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)),
}


@dataclass(frozen=True)
class Scene:
    """What a picture shows: two objects with a relation, or one object with a size and a place, or with a count."""

    objects: tuple[str, ...]
    ground: str
    style: str = ""  # "3D" or "flat"; "" in a caption: either
    size: str = ""
    place: str = ""
    relation: str = ""
    count: str = ""

    @property
    def caption(self) -> str:
        """The scene in English, such as "a small 3D frog on the grass, on the left"."""
        return self.describe()

    def without_layout(self) -> "Scene":
        """Return the scene without its size and its place."""
        return dataclasses.replace(self, size="", place="")

    def describe(self, rng: np.random.Generator | None = None) -> str:
        """Return a caption. With `rng`, words vary, and some of them are left out."""

        def chance(share: float) -> bool:
            return rng is not None and rng.random() < share

        def one_of(words: Sequence[str]) -> str:
            return pick(rng, words) if rng is not None and chance(0.25) else words[0]

        things = []
        bare = chance(0.1)  # without articles
        for name in self.objects:
            noun = one_of((name, *NAMES.get(name, ())))
            size = one_of(SIZE_WORDS[self.size])
            words = (self.count, self.style, plural(noun)) if self.count else (size, self.style, noun)
            thing = " ".join(word for word in words if word)
            things.append(thing if self.count or bare or noun in MANY | MASS else with_article(thing))
        ground = "" if chance(0.05) else " " + one_of(GROUNDS[self.ground].phrases)
        text = f" {self.relation} ".join(things) + ground
        if not self.place or chance(0.05):
            return text
        return f"{self.place}, {text}" if chance(0.15) else f"{text}, {self.place}"


def with_article(thing: str) -> str:
    """Put "a" or "an" before a noun with its adjectives: "an owl", "a unicorn"."""
    return f"{'an' if thing[0] in 'aeiou' and not thing.startswith('uni') else 'a'} {thing}"


class Painter:
    """Draw scenes as squares of `side` pixels. The last scaled sprites are kept for later scenes."""

    def __init__(self, sprites: Sprites, side: int) -> None:
        self.sprites, self.side = sprites, side
        self.scaled = functools.lru_cache(maxsize=2000)(self._scaled)

    def _scaled(self, style: str, name: str, side: int) -> Pixels:
        """Return a sprite of `side` pixels: h w 4. Its colors are multiplied by its alpha, which is in 0..1."""
        image = self.sprites[style][name].convert("RGBa").resize((side, side), Image.Resampling.LANCZOS)
        pixels = np.asarray(image).astype(np.float32)
        pixels[..., 3] /= 255
        return pixels

    def paint(
        self, scene: Scene, rng: np.random.Generator, place_rng: np.random.Generator | None = None
    ) -> NDArray[np.uint8]:
        """Draw `scene` as h w 3. The place of a single object varies a little at random.

        A style that is not given is random, too. place_rng: draws the place, instead of `rng`.

        Objects fill whole cells of the GRID. A moved object then has the same latents, moved: a model learns it faster.
        """
        style = scene.style or pick(rng, self.sprites)
        ground = GROUNDS[scene.ground]
        pixels = ground.paint(self.side, rng)
        names = scene.objects * len(COUNTS[scene.count]) if scene.count else scene.objects
        centers = RELATIONS[scene.relation] if scene.relation else COUNTS.get(scene.count, (PLACES[scene.place],))
        size = SIZES["small" if scene.count == "four" else scene.size]
        placed = []
        cells, side = round(GRID * size), round(self.side * size)
        for name, (x, y) in zip(names, centers, strict=True):
            jitter = (place_rng or rng).uniform(-0.04, 0.04, 2) * (len(centers) == 1)
            left, top = (
                round(np.clip(round(GRID * c - cells / 2), 0, GRID - cells) * self.side / GRID)
                for c in (x + jitter[0], y + jitter[1])
            )
            placed.append((self.scaled(style, name, side), left, top))
        if ground.floor:
            for sprite, left, top in placed:
                pixels *= 1 - self._shadow(sprite[..., 3], left, top)[..., None]
        for sprite, left, top in placed:
            spot = pixels[top : top + len(sprite), left : left + len(sprite)]
            spot *= 1 - sprite[..., 3:]
            spot += sprite[..., :3]
        return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)

    def _shadow(self, alpha: Pixels, left: int, top: int) -> Pixels:
        """Return how much the shadow of an object darkens the floor: h w in 0..1.

        The shadow is the object's outline, flattened, moved to its foot and a little to the right, and blurred.
        """
        side = len(alpha)
        rows = np.flatnonzero(alpha.max(axis=1) > 0.5)
        foot = top + (rows[-1] if len(rows) else side - 1)
        height = max(2, round(0.24 * side))
        flat = Image.fromarray((alpha * 110).astype(np.uint8)).resize((side, height), Image.Resampling.BILINEAR)
        layer = Image.new("L", (self.side, self.side))
        layer.paste(flat, (left + round(0.06 * side), int(foot - 0.62 * height)))
        blurred = layer.filter(ImageFilter.GaussianBlur(0.035 * side))
        return np.asarray(blurred).astype(np.float32) / np.float32(255)


# The data set -------------------------------------------------------------------------------------


def held_out(concepts: Sequence[str], scene: Scene) -> bool:
    """Tell whether training never shows this combination of an object and the ground, or of two objects.

    This holds for a tenth of each kind of combination.
    """
    ground = list(GROUNDS).index(scene.ground)
    if len(scene.objects) == 2 and apart(concepts, *scene.objects):
        return True
    return any((3 * concepts.index(name) + 7 * ground + 1) % 10 == 0 for name in scene.objects)


def apart(concepts: Sequence[str], first: str, second: str) -> bool:
    """Tell whether training never shows these two objects together."""
    return (concepts.index(first) + concepts.index(second)) % 10 == 4


class Scenes:
    """A data set of a million random scenes: (image: uint8 3 h w, caption)."""

    def __init__(self, sprites: Sprites, side: int = 128, *, seed: int = 0, layout: bool = True) -> None:
        """Make the data set. side: of the pictures in pixels. layout: whether captions name sizes and places."""
        self.concepts = tuple(next(iter(sprites.values())))
        self.painter = Painter(sprites, side)
        self.seed, self.layout = seed, layout

    def __len__(self) -> int:
        return 1_000_000

    def scene(self, rng: np.random.Generator) -> Scene:
        """Choose a random scene that is not held out. Almost half have two objects, a tenth have several equal ones.

        Half of the scenes with one or two objects are small ones: at 5 x 5 latent pixels, objects need the most views.
        """
        while held_out(self.concepts, scene := self._any_scene(rng)):
            pass
        return scene

    def _any_scene(self, rng: np.random.Generator) -> Scene:
        name = pick(rng, self.concepts)
        ground = pick(rng, GROUNDS)
        style = pick(rng, self.painter.sprites) if rng.random() < 0.85 else ""
        kind = rng.random()
        if kind < 0.45:
            other = pick(rng, self.concepts)
            if other != name:
                size = "small" if rng.random() < 0.5 else ""
                return Scene((name, other), ground, style, size, relation=pick(rng, RELATIONS))
        if kind > 0.9 and name not in MANY | MASS:
            return Scene((name,), ground, style, count=pick(rng, COUNTS))
        size = "small" if rng.random() < 0.5 else pick(rng, ("", "big"))
        place = "" if size == "big" or rng.random() < 0.4 else pick(rng, PLACES)
        return Scene((name,), ground, style, size, place)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        rng = np.random.default_rng((self.seed, index))
        scene = self.scene(rng)
        caption = self._caption(scene, rng)
        return torch.from_numpy(self.painter.paint(scene, rng)).permute(2, 0, 1), caption

    def caption(self, index: int) -> str:
        """Return the caption of a scene without drawing the scene."""
        rng = np.random.default_rng((self.seed, index))
        return self._caption(self.scene(rng), rng)

    def _caption(self, scene: Scene, rng: np.random.Generator) -> str:
        return (scene if self.layout else scene.without_layout()).describe(rng)


def pick(rng: np.random.Generator, choices: Collection[str]) -> str:
    """Choose a word, or a key of a mapping, at random."""
    return list(choices)[rng.integers(len(choices))]
