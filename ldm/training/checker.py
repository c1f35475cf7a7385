"""Recognize the ground and the objects in a picture of an emoji scene. Nothing here is trained.

1. The ground is the most similar of many example grounds. Colors are compared on a coarse grid, and pixels with another
   color count the same, however different they are, because they may belong to objects. The examples exist with three
   contrasts. The contrast of the most similar one is undone in the picture.
2. The mean of a ground's examples is the color that each pixel should have without objects. Their variance says how
   much this color can be trusted: little where a ground has clouds or windows.
3. Every sprite is compared with the picture in every size and place, at 32 x 32 pixels. Its score is the part of the
   picture's squared difference from the ground that the sprite explains.
4. The best sprites are drawn on the ground at 64 x 64 pixels. The best product of score and likeness decides.
5. Before the next object is looked for, the found one is replaced with the ground.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from ldm.images import to_tensor
from ldm.training.grounds import GROUNDS
from ldm.training.objects import Sprites
from ldm.training.scenes import SIZES, Painter

GRID, COARSE, FINE = 16, 32, 64  # pixels: sides of the pictures for the ground, for all sprites and for the best ones
EXAMPLES = 32  # of each ground
CONTRASTS = (0.75, 1.0, 1.25)
CUTOFF = 0.4  # colors are in [-1, 1]; a pixel that differs more from an example is not part of that ground
BORDER = 3.0  # weight of the pixels at the border when grounds are compared, because few objects reach it
NOISE = 0.1  # a smaller difference from the ground is noise
GAIN = (0.7, 1.4)  # the least and the largest contrast of an object, if its sprite's contrast is 1
BEST = 20  # sprites to draw at FINE pixels
LARGEST = 0.65  # side of one of several objects / side of the picture; a larger sprite would explain two objects
MARGIN = 3  # pixels around a sprite in which the picture must show the ground
LEAST = 0.53  # an object with less likeness is not recognized; on most empty grounds the likeness is smaller


class Found(NamedTuple):
    """One object in a picture."""

    name: str  # "nothing" if no sprite is similar
    style: str
    x: float  # of the object's center / side of the picture
    y: float
    size: float  # the object's longer side / side of the picture
    likeness: float  # cosine between the picture's and the sprite's difference from the ground, at most 1


class Seen(NamedTuple):
    """The checker's description of a picture."""

    ground: str
    objects: tuple[Found, ...]


class _View(NamedTuple):
    """A picture's difference from its ground, c h w, the ground, c h w, and the weights of the pixels: h w."""

    rest: Tensor
    ground: Tensor
    weight: Tensor


class _Place(NamedTuple):
    """A sprite in a picture of FINE pixels."""

    style: str
    name: str
    side: int
    top: int
    left: int

    def spot(self, margin: int = 0) -> tuple[slice, slice]:
        """Return the rows and columns of the sprite and of a margin around it."""
        starts = max(self.top - margin, 0), max(self.left - margin, 0)
        return slice(starts[0], self.top + self.side + margin), slice(starts[1], self.left + self.side + margin)


class Checker:
    """Find the ground and the objects in pictures of known sprites on known grounds."""

    def __init__(self, sprites: Sprites) -> None:
        rng = np.random.default_rng(0)
        painted = [[ground.paint(FINE, rng) for _ in range(EXAMPLES)] for ground in GROUNDS.values()]
        levels = torch.from_numpy(np.array(painted, np.float32)).clamp(0, 255)
        grounds = rearrange(levels, "g e h w c -> g e c h w") / 127.5 - 1
        self.means = grounds.mean(1)
        self.weights = 1 / (1 + grounds.var(1).mean(1) / NOISE**2)  # g h w
        examples = [(_shrink(grounds.flatten(0, 1), GRID) * contrast).clamp(-1, 1) for contrast in CONTRASTS]
        self.examples = torch.stack(examples)  # contrast (g e) c h w
        self.importance = F.pad(torch.ones(GRID - 2, GRID - 2), (1, 1, 1, 1), value=BORDER)

        self.painter = Painter(sprites, FINE)
        sides = [round(COARSE * size * f) for size in SIZES.values() for f in (0.96, 1.04)]
        self.templates = [(style, name, side) for side in sides for style in sprites for name in sprites[style]]
        self.sides = torch.tensor([side for *_, side in self.templates])[:, None]  # t 1
        drawn = torch.zeros(len(self.templates), 4, COARSE, COARSE)
        for template, (style, name, side) in zip(drawn, self.templates, strict=True):
            template[:, :side, :side] = self._sprite(style, name, side)
        color, alpha = drawn[:, :3], drawn[:, 3:]
        squares = torch.cat([alpha.square(), -2 * alpha * color, color.square().sum(1, keepdim=True)], dim=1)
        self.spectra, self.square_spectra = (torch.fft.rfft2(x).conj().resolve_conj() for x in (drawn, squares))

    def _sprite(self, style: str, name: str, side: int) -> Tensor:
        """Return color times alpha, and alpha: 4 h w."""
        pixels = rearrange(torch.from_numpy(self.painter.scaled(style, name, side)), "h w c -> c h w")
        return torch.cat([pixels[:3] / 127.5 - pixels[3:], pixels[3:]])

    @torch.no_grad()
    def look(self, picture: Image.Image, objects: int = 1) -> Seen:
        """Return the ground of `picture` and as many objects as are expected."""
        pixels = to_tensor(picture.convert("RGB").resize((FINE, FINE), Image.Resampling.LANCZOS))[0]
        difference = (_shrink(pixels, GRID) - self.examples).square().sum(2)  # contrast (g e) h w
        nearness = ((1 - difference / CUTOFF**2).clamp(min=0) * self.importance).sum((2, 3))
        contrast, example = divmod(int(nearness.argmax()), nearness.shape[1])
        ground = example // EXAMPLES
        mean, weight = self.means[ground], self.weights[ground]
        view = _View(pixels / CONTRASTS[contrast] - mean, mean, weight)

        found = []
        for _ in range(objects):
            candidates = self._candidates(view, LARGEST if objects > 1 else 1)
            best = max(candidates, key=lambda place: candidates[place] * self._likeness(view, place))
            place = max(_neighbors(best), key=lambda place: self._likeness(view, place))
            likeness = self._likeness(view, place)
            x, y, size = place.left + place.side / 2, place.top + place.side / 2, place.side
            name = place.name if likeness > LEAST else "nothing"
            found.append(Found(name, place.style, x / FINE, y / FINE, size / FINE, likeness))
            view.rest[:, *place.spot()] *= 1 - self._sprite(*place[:3])[3]
        return Seen(list(GROUNDS)[ground], tuple(found))

    def _candidates(self, view: _View, largest: float) -> dict[_Place, float]:
        """Return the sprites with the best scores, each in its best place, and their scores.

        On a ground g, a sprite makes the difference e = alpha color - alpha g. The picture's difference is r. With the
        contrast k, the sprite explains |r|^2 - |r - k e|^2 = 2 k <r, e> - k^2 |e|^2 of it. k is chosen to explain most.
        Both products are correlations with the sprites, computed by Fourier transform.
        """
        rest, ground, weight = (_shrink(x, COARSE) for x in (view.rest, view.ground, view.weight[None]))
        product = _correlate([weight * rest, -weight * (rest * ground).sum(0, keepdim=True)], self.spectra)
        squares = [weight * ground.square().sum(0, keepdim=True), weight * ground, weight]
        energy = _correlate(squares, self.square_spectra).clamp(min=1e-3)  # t y x
        gain = (product / energy).clamp(*GAIN)
        scores = gain * (2 * product - gain * energy)

        starts = torch.arange(COARSE)
        leaves = starts > COARSE - self.sides  # t x: the sprite would leave the picture
        scores.masked_fill_(leaves[:, :, None] | leaves[:, None, :], -math.inf)
        score, index = scores.flatten(1).max(1)
        score.masked_fill_(self.sides[:, 0] > largest * COARSE, -math.inf)
        result, f = {}, FINE // COARSE
        for t in score.argsort(descending=True)[:BEST].tolist():
            style, name, side = self.templates[t]
            top, left = divmod(int(index[t]), COARSE)
            result[_Place(style, name, f * side, f * top, f * left)] = float(score[t])
        return result

    def _likeness(self, view: _View, place: _Place) -> float:
        """Return the cosine between the picture's and the sprite's difference from the ground."""
        sprite, spot, around = self._sprite(*place[:3]), place.spot(), place.spot(MARGIN)
        weight, rest = view.weight[spot], view.rest[:, *spot]
        own = sprite[:3] - sprite[3:] * view.ground[:, *spot]
        all_rest = (view.weight[around] * view.rest[:, *around].square()).sum() + NOISE**2 * weight.numel()
        return float((weight * rest * own).sum() / (all_rest * (weight * own.square()).sum()).sqrt())


def _neighbors(place: _Place) -> list[_Place]:
    """Return the sprite at its place, also one pixel smaller, larger or moved, where it stays inside the picture."""
    result = []
    for more, down, right in itertools.product((0, -1, 1), repeat=3):
        side, top, left = place.side + more, place.top + down, place.left + right
        if min(top, left) >= 0 and max(top, left) + side <= FINE:
            result.append(_Place(place.style, place.name, side, top, left))
    return result


def _shrink(images: Tensor, side: int) -> Tensor:
    """Shrink FINE to `side` pixels by averaging."""
    return F.avg_pool2d(images, FINE // side)


def _correlate(maps: Sequence[Tensor], spectra: Tensor) -> Tensor:
    """Sum the channels of `maps` times the templates, which are moved to each place y x. Return t y x."""
    spectrum = (torch.fft.rfft2(torch.cat(list(maps))) * spectra).sum(1)
    return torch.fft.irfft2(spectrum, s=(COARSE, COARSE))
