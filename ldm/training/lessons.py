"""Small sets of emoji scenes that teach a model what it has not seen: a style of drawing, or an object.

The style "ink" is drawn from the flat objects, and no model of this project was trained with it. The objects are those
of `UNSEEN`. `ldm evaluate --recipe` measures what a model has learned from them, and what it has kept.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from ldm.training.checker import Checker
from ldm.training.evaluate import Generate, generate_all, judge
from ldm.training.grounds import GROUNDS
from ldm.training.objects import OBJECTS, UNSEEN, Sprites, emoji_sprites, name_of
from ldm.training.scenes import PLACES, RELATIONS, Painter, Scene, pick

INK = "ink"
STEP = 5  # between the objects that show a style, and between the grounds that show an object


@dataclass(frozen=True)
class Lesson:
    """What the scenes of a lesson show: one object on `pictures` grounds, or a style on two objects in each picture."""

    pictures: int
    style: str = ""  # of all pictures: "ink", "3D" or "flat"; "": both of the last two in turn
    object: str = ""  # one of `UNSEEN`; "": known objects, each shown once, two in a picture
    word: str = ""  # the captions' word for the object, or for the style if there is no object; "": its name

    def __post_init__(self) -> None:
        unseen = [name_of(character) for character in UNSEEN]
        if self.style not in ("", "3D", "flat", INK):
            raise ValueError(f"the style of a lesson must be '3D', 'flat' or '{INK}', got {self.style!r}")
        if self.object not in ("", *unseen):
            raise ValueError(f"the object of a lesson must be one of {', '.join(unseen)}, got {self.object!r}")
        if self.word and not (self.object or self.style):
            raise ValueError(f"the word {self.word!r} of a lesson needs an object or a style that it names")
        most = len(GROUNDS) // 2 if self.object else len(OBJECTS) // 4
        if not 1 <= self.pictures <= most:
            raise ValueError(
                f"a lesson has 1 to {most} pictures, so that as many are left to ask for, got {self.pictures}"
            )

    @property
    def styles(self) -> tuple[str, ...]:
        """The styles of the pictures, in turn."""
        return (self.style,) if self.style else ("3D", "flat")

    def sprites(self, font: Path, fluent: Path) -> dict[str, dict[str, Image.Image]]:
        """Return all objects that the lesson needs, in all styles. Raises ValueError as `emoji_sprites` does."""
        new = [character for character in UNSEEN if name_of(character) == self.object]
        sprites = emoji_sprites(font, fluent, OBJECTS + "".join(new))
        if self.style == INK:
            sprites[INK] = {name: ink(flat) for name, flat in sprites["flat"].items()}
        return sprites

    def shown(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return the objects and the grounds of the pictures, in turn. names: of all objects, the new one last."""
        grounds = list(GROUNDS)
        if self.object:
            return [self.object], [grounds[STEP * i % len(grounds)] for i in range(self.pictures)]
        return [names[STEP * i % len(names)] for i in range(2 * self.pictures)], grounds

    def caption(self, scene: Scene) -> str:
        """Return the caption of a scene, with `word` in place of the name of the object, or of the style."""
        if not self.word:
            return scene.caption
        if not self.object:
            return dataclasses.replace(scene, style=self.word if scene.style == self.style else scene.style).caption
        renamed = tuple(self.word if name == self.object else name for name in scene.objects)
        return dataclasses.replace(scene, objects=renamed).caption


class LessonScenes:
    """The pictures of a lesson as a data set: (image: uint8 3 h w, caption). Each is always the same."""

    def __init__(self, lesson: Lesson, sprites: Sprites, side: int, *, seed: int = 0) -> None:
        self.painter, self.seed = Painter(sprites, side), seed
        names, grounds = lesson.shown(list(next(iter(sprites.values()))))
        styles = lesson.styles
        self.scenes, self.captions = [], []
        for i in range(lesson.pictures):
            rng = np.random.default_rng((seed, i))
            ground, style = grounds[i % len(grounds)], styles[i % len(styles)]
            if lesson.object:
                size = pick(rng, ("", "big"))  # a small object shows little
                scene = Scene((names[0],), ground, style, size, "" if size == "big" else pick(rng, PLACES))
            else:
                scene = Scene((names[2 * i], names[2 * i + 1]), ground, style, relation=pick(rng, RELATIONS))
            self.scenes.append(scene)
            self.captions.append(lesson.caption(scene))

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        pixels = self.painter.paint(self.scenes[index], np.random.default_rng((self.seed, index)))
        return torch.from_numpy(pixels).permute(2, 0, 1), self.captions[index]

    def caption(self, index: int) -> str:
        """Return the caption of a picture without drawing the picture."""
        return self.captions[index]


def ink(sprite: Image.Image) -> Image.Image:
    """Draw an RGBA sprite with dark blue ink on light paper: washes of its tones, and a line around it."""
    sprite = sprite.resize((128, 128), Image.Resampling.LANCZOS)
    alpha = sprite.getchannel("A").point(lambda level: 255 if level > 127 else 0)
    inside = np.asarray(alpha.filter(ImageFilter.MinFilter(7)), np.float32) / 255
    tones = np.asarray(sprite.convert("L").filter(ImageFilter.GaussianBlur(1)), np.float32) / 255
    light = (inside * tones)[..., None]
    paper, pen = np.array((250, 246, 232), np.float32), np.array((24, 32, 96), np.float32)
    drawn = Image.fromarray(np.rint(pen + (paper - pen) * light).astype(np.uint8))
    drawn.putalpha(alpha.filter(ImageFilter.GaussianBlur(0.7)))
    return drawn


class Score(NamedTuple):
    """How often the pictures of some prompts show the right object in the right style, and the right ground."""

    object: int
    style: int
    ground: int
    pictures: int


def measure(
    lesson: Lesson, generate: Generate, sprites: Sprites, *, seed: int = 0, count: int = 64
) -> dict[str, Score]:
    """Let `generate` draw `count` scenes of what the lesson teaches, and as many of what the model knew before.

    "new": the style with objects that the lesson does not show, or the object on grounds that it does not show.
    "known": other objects in the styles that the model was trained with, without the style whose word is taken.
    sprites: those of `lesson.sprites`. seed: of the first picture; picture i has seed + i.
    """
    checker, names = Checker(sprites), list(next(iter(sprites.values())))
    shown, grounds = lesson.shown(names)
    known, all_grounds = [name for name in names if name != lesson.object], list(GROUNDS)
    styles = [style for style in ("3D", "flat") if lesson.object or style != lesson.word]
    if lesson.object:
        new = _scenes([lesson.object], [ground for ground in GROUNDS if ground not in grounds], lesson.styles, count)
    else:
        new = _scenes([name for name in names if name not in shown], all_grounds, lesson.styles, count)
    asked = [*new, *_scenes(known, all_grounds, styles, count)]
    pictures = generate_all(generate, [lesson.caption(scene) for scene in asked], seed)
    verdicts = [judge(scene, checker.look(picture)) for scene, picture in zip(asked, pictures, strict=True)]

    def score(some: Sequence[dict[str, bool]]) -> Score:
        right, style, ground = (sum(each[name] for each in some) for name in ("object", "style", "ground"))
        return Score(right, style, ground, len(some))

    return {"new": score(verdicts[:count]), "known": score(verdicts[count:])}


def table(scores: Mapping[str, Score]) -> str:
    """Return the scores as lines of text."""
    rows = [" " * 8 + "".join(f"{name:>12}" for name in Score._fields[:-1])]
    for name, score in scores.items():
        rows.append(f"{name:<8}" + "".join(f"{f'{right}/{score.pictures}':>12}" for right in score[:-1]))
    return "\n".join(rows)


def _scenes(objects: Sequence[str], grounds: Sequence[str], styles: Sequence[str], count: int) -> list[Scene]:
    """Return scenes with one object each, which take the objects, grounds and styles in turn."""

    def scene(i: int) -> Scene:
        ground = grounds[(i + i // len(grounds)) % len(grounds)]
        return Scene((objects[i % len(objects)],), ground, styles[(i + i // len(objects)) % len(styles)])

    return [scene(i) for i in range(count)]
