"""Does a picture show what its prompt says? A checker by analysis and synthesis, and the report on a model.

Nothing here is trained. The checker knows the sprites and grounds of `ldm.training.scenes`, finds the combination that
explains a picture best, and is itself measured on true renders, also blurred and with changed contrast.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageFilter
from torch import Tensor

from ldm.training.scenes import (
    GROUNDS,
    PAIR_SIZE,
    PLACES,
    RELATIONS,
    SIZES,
    Painter,
    Scene,
    Sprites,
    held_out,
)

Generate = Callable[[list[str], list[int]], Sequence[Image.Image]]  # prompts, seeds -> pictures

SIDE = 64  # pictures are compared at this many pixels square
CUTOFF = 60  # a pixel this far from a ground's color, in levels, counts as not of the ground
NOISE = 3  # levels: what differs less than this everywhere is nothing
LEAST = 0.45  # likeness below which an object is not recognized; empty grounds stay below it
BATCH = 16  # pictures asked for at a time
CONDITIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "true renders": lambda picture: picture,
    "blurred renders": lambda picture: picture.filter(ImageFilter.GaussianBlur(1)),
    "contrast x 0.7": lambda picture: picture.point(lambda level: 128 + (level - 128) * 0.7),
    "contrast x 1.3": lambda picture: picture.point(lambda level: 128 + (level - 128) * 1.3),
}  # in which the checker itself is measured


class Found(NamedTuple):
    """One object in a picture."""

    name: str  # "nothing" if no sprite is like it
    x: float  # of its center, over the side of the picture
    y: float
    size: float  # its longer side, over the side of the picture
    likeness: float  # cosine of what differs from the ground and what the sprite would, at most 1


class Seen(NamedTuple):
    """What the checker sees in a picture."""

    ground: str
    objects: tuple[Found, ...]


class Checker:
    """Find the ground and the objects of pictures made of known sprites and grounds.

    A picture is taken as its ground plus sprites. The ground is the nearest of many examples; then every sprite is
    slid over the picture at every scale, and the one whose difference from the ground is most parallel to the
    picture's own is seen (matching pursuit, one step per object).
    """

    def __init__(self, sprites: Sprites) -> None:
        self.names, self.grounds = tuple(sprites), tuple(GROUNDS)
        rng = np.random.default_rng(0)
        rows = [[paint(SIDE, rng).mean(1) for _ in range(32)] for paint in GROUNDS.values()]
        self.rows = torch.from_numpy(np.array(rows, np.float32))  # ground example h c

        painter = Painter(sprites, SIDE)
        sizes = [*SIZES.values(), PAIR_SIZE]
        scales = np.geomspace(0.92 * min(sizes), 1.08 * max(sizes), 13)  # 9 % apart
        sides = [round(SIDE * scale) for scale in scales]
        self.templates = [(name, side) for side in sides for name in self.names]
        self.sprites = torch.zeros(len(self.templates), 4, SIDE, SIDE)  # color times alpha, alpha
        for i, (name, side) in enumerate(self.templates):
            self.sprites[i, :, :side, :side] = torch.from_numpy(
                painter.scaled(name, side).transpose(2, 0, 1)
            )
        self.spectra = torch.fft.rfft2(self.sprites).conj().resolve_conj()
        color, alpha = self.sprites[:, :3], self.sprites[:, 3:]
        self.kernels = torch.cat([color * alpha, alpha.square()], dim=1).sum(3)  # t 4 h
        self.energy = (color.square() + NOISE**2 * alpha).sum((1, 2, 3))  # t
        reach = (
            torch.arange(SIDE) <= SIDE - torch.tensor([side for _, side in self.templates])[:, None]
        )
        self.outside = ~(reach[:, :, None] & reach[:, None, :])  # t y x: would leave the picture

    @torch.no_grad()
    def look(self, picture: Image.Image, objects: int = 1) -> Seen:
        """Say what `picture` shows, expecting so many objects."""
        if picture.size != (SIDE, SIDE):
            picture = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        levels = np.asarray(picture.convert("RGB"), np.float32)
        pixels = rearrange(torch.from_numpy(levels), "h w c -> c h w")
        name, ground = self._ground(pixels)
        rest = pixels - ground  # c h w
        found = []
        for _ in range(objects):
            best, place = self._explain(rest, ground)
            found.append(best)
            rest = rest * (1 - place)
        return Seen(name, tuple(found))

    def _ground(self, pixels: Tensor) -> tuple[str, Tensor]:
        """Return the ground of pixels, c h w, and its color in each row: c h 1.

        The distance to an example, over every fourth column, is cut off, so that an object costs every ground the
        same. The example's rows then move to the picture's own color by mean shift, where its pixels weigh nothing.
        """
        distance = pixels[:, :, ::4] - rearrange(self.rows, "g e h c -> (g e) c h 1")
        nearness = (1 - distance.square().sum(1) / CUTOFF**2).clamp(min=0).mean((1, 2))  # (g e)
        best = int(nearness.argmax())
        rows = rearrange(self.rows.flatten(0, 1)[best], "h c -> c h 1")
        for width in (40, 25, 25):
            weight = torch.exp(-0.5 * (pixels - rows).square().sum(0) / width**2)  # h w
            total = (weight * pixels).sum(2, keepdim=True) + rows
            rows = total / (weight.sum(1, keepdim=True) + 1)
        return self.grounds[best // self.rows.shape[1]], rows

    def _explain(self, rest: Tensor, ground: Tensor) -> tuple[Found, Tensor]:
        """Find the sprite that explains `rest`, c h w, best; return it and where it covers the picture, h w.

        On a ground g a sprite makes the difference e = alpha color - alpha g. Its likeness is the cosine
        <rest, e> / (|rest| |e|), which no change of contrast alters; both products are convolutions,
        the first over the picture by Fourier transform, the second, as the ground has one color per row, over rows.
        """
        difference = torch.cat([rest, -(rest * ground).sum(0, keepdim=True)])  # 4 h w
        spectrum = (torch.fft.rfft2(difference) * self.spectra).sum(1)
        product = torch.fft.irfft2(spectrum, s=(SIDE, SIDE))  # t y x
        squares = torch.cat([-2 * ground, ground.square().sum(0, keepdim=True)])[..., 0]  # 4 h
        squares = F.pad(squares, (0, SIDE - 1)).unfold(1, SIDE, 1)  # 4 y h
        energy = torch.einsum("tch,cyh->ty", self.kernels, squares) + self.energy[:, None]
        score = product / energy.clamp(min=1).sqrt()[:, :, None]
        score.masked_fill_(self.outside, -math.inf)

        best, index = score.max().item(), int(score.argmax())
        t, y, x = index // SIDE**2, index // SIDE % SIDE, index % SIDE
        name, size = self.templates[t]
        likeness = best / math.sqrt(rest.square().sum().item() + NOISE**2 * rest.numel())
        if likeness < LEAST:
            name = "nothing"
        cover = self.sprites[t, 3].roll((y, x), (0, 1))
        center = ((x + size / 2) / SIDE, (y + size / 2) / SIDE)
        return Found(name, *center, size / SIDE, likeness), cover


def fixed_scenes(concepts: Sequence[str]) -> dict[str, list[Scene]]:
    """Return the fixed scenes to ask for, by what they test.

    "object": each concept on two grounds, every other one on a ground held out in training the second time;
    "size", "place" and "relation": 16 each, of combinations that occur in training.
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
    """Say what of `scene` is right in what was seen. A size, place or relation needs its objects right, too."""
    verdict = {"ground": seen.ground == scene.ground}
    if scene.relation:
        first, second = seen.objects
        if first.name != scene.objects[0]:
            first, second = second, first
        pair = (first.name, second.name) == scene.objects
        across = abs(second.x - first.x) > abs(second.y - first.y)
        if across:
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


MEASURES = {  # kind of scene -> what is counted on it
    "object": ("object", "ground"),
    "size": ("size",),
    "place": ("place",),
    "relation": ("both objects", "relation"),
}


class Answer(NamedTuple):
    """One prompt and what its picture shows."""

    kind: str
    held_out: bool
    prompt: str
    seed: int
    seen: Seen
    verdict: dict[str, bool]


@dataclass(frozen=True)
class Report:
    """How often a model, and the checker itself, are right: measure -> (right, of how many), by row."""

    rows: dict[str, dict[str, tuple[int, int]]]
    answers: tuple[Answer, ...]  # of the model

    def __str__(self) -> str:
        columns = [measure for measures in MEASURES.values() for measure in measures]
        lines = [" " * 26 + "".join(f"{column:>14}" for column in columns)]
        for row, scores in self.rows.items():
            cells = (_cell(*scores[column]) if column in scores else "" for column in columns)
            lines.append(f"{row:<26}" + "".join(f"{cell:>14}" for cell in cells))
        return "\n".join(line.rstrip() for line in lines)

    def to_json(self) -> dict[str, object]:
        """Return the counts and every answer as plain values."""
        rows = {
            row: {name: {"right": right, "of": of} for name, (right, of) in scores.items()}
            for row, scores in self.rows.items()
        }
        answers = [
            answer._asdict()
            | {
                "seen": {
                    "ground": answer.seen.ground,
                    "objects": [found._asdict() for found in answer.seen.objects],
                }
            }
            for answer in self.answers
        ]
        return {"rows": rows, "answers": answers}


def evaluate(generate: Generate, sprites: Sprites, *, seed: int = 0) -> Report:
    """Ask `generate` for the fixed scenes, 16 pictures at a time, and check what it shows.

    generate: (prompts, seeds) -> one square picture each, of any size. sprites: what the model was trained on.
    seed: of the first picture; the next has the next. The checker is measured on renders of the same scenes.
    Raises ValueError if `generate` returns another number of pictures than it was given prompts.
    """
    checker, concepts = Checker(sprites), tuple(sprites)
    asked = [(kind, scene) for kind, scenes in fixed_scenes(concepts).items() for scene in scenes]
    prompts = [scene.caption for _, scene in asked]
    pictures: list[Image.Image] = []
    for start in range(0, len(asked), BATCH):
        batch = prompts[start : start + BATCH]
        made = generate(batch, [seed + start + i for i in range(len(batch))])
        if len(made) != len(batch):
            raise ValueError(f"generate made {len(made)} pictures of {len(batch)} prompts")
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
    rows = {
        "model": _count(model),
        "  seen combinations": _count([answer for answer in single if not answer.held_out]),
        "  held-out combinations": _count([answer for answer in single if answer.held_out]),
    }
    painter, rng = Painter(sprites, SIDE), np.random.default_rng(seed)
    renders = [Image.fromarray(painter.paint(scene, rng)) for _, scene in asked]
    for name, change in CONDITIONS.items():
        rows[f"checker, {name}"] = _count(answers([change(render) for render in renders]))
    return Report(rows, tuple(model))


def _count(answers: Sequence[Answer]) -> dict[str, tuple[int, int]]:
    verdicts: dict[str, list[bool]] = {}
    for answer in answers:
        for name, right in answer.verdict.items():
            verdicts.setdefault(name, []).append(right)
    return {name: (sum(rights), len(rights)) for name, rights in verdicts.items()}


def _cell(right: int, of: int) -> str:
    return f"{right}/{of} {100 * right / of:3.0f}%"
