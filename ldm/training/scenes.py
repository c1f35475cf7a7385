"""Random pictures with captions: emoji objects on computed grounds, drawn when they are needed.

A scene is one object with a size and a place, or two objects with a relation, on a ground. The objects are sprites,
drawn from a color emoji font. Each scene depends on (seed, index) alone.
"""

import functools
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI = "🐸🍎🚗🏠🌵🐘🦋🍌🎈🌻🍄🐱🦊🐼🍕🍩🌲🚀⛵🐢🐝🍓🍇🎸👑🐧🐷🥕🍉🐙⛄🎃"
# Used instead of Unicode's name without " face".
NAMES = {
    "🍎": "apple",
    "🚗": "car",
    "🏠": "house",
    "🍕": "pizza",
    "🌲": "tree",
    "🐝": "bee",
    "⛄": "snowman",
    "🎃": "pumpkin",
}
SIZES = {"small": 0.34, "": 0.54, "big": 0.78}  # side of the object / side of the picture
PLACES = {
    "": (0.5, 0.5),  # x and y of the object's center / side of the picture
    "on the left": (0.28, 0.5),
    "on the right": (0.72, 0.5),
    "at the top": (0.5, 0.28),
    "at the bottom": (0.5, 0.72),
}
RELATIONS = {  # centers of the first and the second object
    "left of": ((0.26, 0.5), (0.74, 0.5)),
    "right of": ((0.74, 0.5), (0.26, 0.5)),
    "above": ((0.5, 0.26), (0.5, 0.74)),
    "below": ((0.5, 0.74), (0.5, 0.26)),
}
PAIR_SIZE = 0.42  # side of each of two objects / side of the picture

Pixels = NDArray[np.float32]  # h w 3 in 0..255, or h w 4 with alpha in 0..1
Sprites = Mapping[str, Image.Image]
Ground = Callable[[int, np.random.Generator], Pixels]  # paints h w 3 for a side in pixels


@dataclass(frozen=True)
class Scene:
    """The content of a picture. Two `objects` have a `relation`; one object has a `size` and a `place`."""

    objects: tuple[str, ...]
    ground: str
    size: str = ""
    place: str = ""
    relation: str = ""

    @property
    def caption(self) -> str:
        """The scene in English, such as "a small frog on the grass, on the left"."""
        things = [_with_article(f"{self.size} {name}".strip()) for name in self.objects]
        text = f" {self.relation} ".join(things)
        return f"{text} {PHRASES[self.ground]}" + (f", {self.place}" if self.place else "")


def _with_article(thing: str) -> str:
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


# Grounds ------------------------------------------------------------------------------------------


def _plain(color: tuple[int, int, int]) -> Ground:
    def paint(side: int, rng: np.random.Generator) -> Pixels:
        return np.full((side, side, 3), color, np.float32) + rng.normal(0, 8, 3).astype(np.float32)

    return paint


def _layers(
    *bands: tuple[float, tuple[int, int, int], tuple[int, int, int]], grain: tuple[int, int], contrast: float
) -> Ground:
    """Make a ground of color bands from top to bottom, with a random texture.

    bands: each (end, top color, bottom color), where end is in 0 .. 1 of the height. grain: the number of random cells
    of the texture across and down. contrast: the standard deviation of the cells.
    """

    def paint(side: int, rng: np.random.Generator) -> Pixels:
        y = np.linspace(0, 1, side, dtype=np.float32)
        column = np.zeros((side, 3), np.float32)
        start = 0.0
        for end, top, bottom in bands:
            end = end if end == 1 else end + rng.uniform(-0.03, 0.03)
            t = np.clip((y - start) / (end - start), 0, 1)[:, None]
            color = (1 - t) * np.array(top, np.float32) + t * np.array(bottom, np.float32)
            column[y >= start] = color[y >= start]
            start = end
        across, down = grain
        cells = rng.normal(0, contrast, (down, across)).astype(np.float32)
        texture: Pixels = np.asarray(Image.fromarray(cells).resize((side, side), Image.Resampling.BILINEAR))
        shade = rng.normal(0, 5)
        return column[:, None, :] + texture[:, :, None] + np.float32(shade)

    return paint


def _dots(under: Ground, count: int, color: tuple[int, int, int]) -> Ground:
    """Make a ground of another ground and `count` random square dots, 1/64 of the side wide."""

    def paint(side: int, rng: np.random.Generator) -> Pixels:
        pixels = under(side, rng)
        width = max(1, side // 64)
        for x, y in rng.integers(0, side - width + 1, (count, 2)):
            pixels[y : y + width, x : x + width] = color
        return pixels

    return paint


_BLUE_SKY = (0.22, (150, 205, 250), (190, 225, 250))  # end, top color, bottom color
GROUNDS: dict[str, Ground] = {
    "grass": _layers(_BLUE_SKY, (1, (110, 190, 70), (50, 130, 35)), grain=(32, 5), contrast=14),
    "beach": _layers(
        (0.2, (120, 195, 245), (170, 220, 250)),
        (0.42, (20, 120, 190), (60, 170, 210)),
        (1, (250, 225, 165), (235, 200, 130)),
        grain=(24, 24),
        contrast=5,
    ),
    "sea": _layers((1, (40, 140, 215), (5, 50, 120)), grain=(4, 20), contrast=16),
    "desert": _layers(
        (0.4, (250, 205, 140), (255, 235, 195)), (1, (225, 150, 75), (190, 105, 45)), grain=(5, 14), contrast=9
    ),
    "night": _dots(_layers((1, (10, 10, 45), (35, 30, 85)), grain=(4, 4), contrast=3), 24, (255, 250, 210)),
    "sky": _layers((1, (95, 170, 245), (195, 228, 252)), grain=(5, 7), contrast=11),
    "snow": _dots(
        _layers(
            (0.4, (150, 165, 190), (190, 200, 215)), (1, (250, 252, 255), (225, 235, 248)), grain=(6, 6), contrast=4
        ),
        24,
        (255, 255, 255),
    ),
    "red": _plain((215, 45, 45)),
    "yellow": _plain((245, 215, 60)),
    "purple": _plain((135, 65, 175)),
    "white": _plain((243, 243, 243)),
}
PHRASES = {
    "grass": "on the grass",
    "beach": "on the beach",
    "sea": "in the sea",
    "desert": "in the desert",
    "night": "at night",
    "sky": "in the sky",
    "snow": "in the snow",
} | {color: f"on a {color} background" for color in ("red", "yellow", "purple", "white")}


# Objects ------------------------------------------------------------------------------------------


def emoji_sprites(emoji: str = EMOJI, font: Path = FONT) -> dict[str, Image.Image]:
    """Draw each character of `emoji` as a cropped RGBA square. The keys are the English names.

    Raises ValueError if the font is missing or cannot be used, or has no color picture of a character.
    """
    if not font.is_file():
        raise ValueError(
            f"there is no emoji font at {font}: install it (apt-get install fonts-noto-color-emoji), or give the path "
            "of a NotoColorEmoji.ttf with --font"
        )
    try:
        face = ImageFont.truetype(str(font), 109)  # the only size of the bitmaps in NotoColorEmoji.ttf
    except OSError as error:
        raise ValueError(
            f"{font} is not a font with color bitmaps of 109 pixels ({error}): give the path of a NotoColorEmoji.ttf"
        ) from error
    sprites = {}
    for character in emoji:
        image = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(image).text((0, 0), character, font=face, fill="magenta", embedded_color=True)
        box = image.getbbox()
        if box is None or not image.getchannel("G").getbbox():  # no glyph, or one without colors, drawn in magenta
            raise ValueError(f"the font {font} has no color picture of {character} ({name_of(character)})")
        sprites[name_of(character)] = _square(image.crop(box))
    return sprites


def name_of(character: str) -> str:
    """Return the English name of an emoji, mostly from Unicode: "frog" for FROG FACE."""
    return NAMES.get(character) or unicodedata.name(character, "unknown").lower().removesuffix(" face")


def _square(image: Image.Image) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class Painter:
    """Draw scenes as squares of `side` pixels. Scaled sprites are kept for later scenes."""

    def __init__(self, sprites: Sprites, side: int) -> None:
        self.sprites, self.side = sprites, side
        self.scaled = functools.cache(self._scaled)

    def _scaled(self, name: str, side: int) -> Pixels:
        """Return a sprite of `side` pixels: h w 4. Its colors are multiplied by its alpha, which is in 0..1."""
        image = self.sprites[name].convert("RGBa").resize((side, side), Image.Resampling.LANCZOS)
        pixels = np.asarray(image).astype(np.float32)
        pixels[..., 3] /= 255
        return pixels

    def paint(self, scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
        """Draw `scene` as h w 3. Sizes and places vary a little at random."""
        pixels = GROUNDS[scene.ground](self.side, rng)
        centers = RELATIONS[scene.relation] if scene.relation else (PLACES[scene.place],)
        size = PAIR_SIZE if scene.relation else SIZES[scene.size]
        for name, (x, y) in zip(scene.objects, centers, strict=True):
            side = round(self.side * size * rng.uniform(0.92, 1.08))
            sprite = self.scaled(name, side)
            jitter = rng.uniform(-0.025, 0.025, 2)
            left, top = (
                int(np.clip(round(self.side * c - side / 2), 0, self.side - side))
                for c in (x + jitter[0], y + jitter[1])
            )
            spot = pixels[top : top + side, left : left + side]
            spot *= 1 - sprite[..., 3:]
            spot += sprite[..., :3]
        return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


# Datasets -----------------------------------------------------------------------------------------


def held_out(concepts: Sequence[str], name: str, ground: str) -> bool:
    """Tell whether training never shows this object on this ground. This holds for a tenth of the combinations."""
    return (3 * list(concepts).index(name) + 7 * list(GROUNDS).index(ground) + 1) % 10 == 0


class Scenes:
    """A data set of a million random scenes: (image: uint8 3 h w, caption)."""

    def __init__(self, sprites: Sprites, side: int = 64, *, seed: int = 0, pairs: float = 0.2) -> None:
        """side: of the pictures in pixels. pairs: the share of scenes with two objects."""
        self.concepts = tuple(sprites)
        self.painter = Painter(sprites, side)
        self.seed, self.pairs = seed, pairs
        self.seen = [
            (name, ground) for name in self.concepts for ground in GROUNDS if not held_out(self.concepts, name, ground)
        ]

    def __len__(self) -> int:
        return 1_000_000

    def scene(self, rng: np.random.Generator) -> Scene:
        """Choose a random scene without held-out combinations of object and ground."""
        name, ground = self.seen[rng.integers(len(self.seen))]
        if rng.random() < self.pairs:
            partners = [n for n, g in self.seen if g == ground and n != name]
            partner = partners[rng.integers(len(partners))]
            return Scene((name, partner), ground, relation=_pick(rng, RELATIONS))
        size = _pick(rng, SIZES)
        place = "" if size == "big" or rng.random() < 0.4 else _pick(rng, PLACES)
        return Scene((name,), ground, size=size, place=place)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        rng = np.random.default_rng((self.seed, index))
        scene = self.scene(rng)
        return torch.from_numpy(self.painter.paint(scene, rng)).permute(2, 0, 1), scene.caption

    def caption(self, index: int) -> str:
        """Return the caption of a scene without drawing the scene."""
        return self.scene(np.random.default_rng((self.seed, index))).caption


def _pick(rng: np.random.Generator, choices: Mapping[str, object]) -> str:
    return list(choices)[rng.integers(len(choices))]
