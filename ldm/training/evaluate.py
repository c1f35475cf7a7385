"""Does a picture show what its prompt says? A checker by analysis and synthesis, and the report on a model.

Nothing here is trained. The checker knows the sprites and grounds of `ldm.training.scenes`, finds the combination that
explains a picture best, and is itself measured on true renders, also blurred and with changed contrast.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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

Generate = Callable[[list[str], list[int]], list[Image.Image]]  # prompts, seeds -> pictures
SIDE = 64  # pictures are compared at this many pixels square


class Found(NamedTuple):
    """One object that the checker sees."""

    name: str
    x: float  # center, over the side of the picture
    y: float
    size: float  # side, over the side of the picture
    likeness: float  # cosine between what differs from the ground and the sprite, at most 1


class Checker:
    """Find the ground and the objects of pictures made of known sprites and grounds."""

    def __init__(self, sprites: Sprites) -> None:
        self.names = tuple(sprites)
        self.grounds = tuple(GROUNDS)
        rng = np.random.default_rng(0)
        profiles = [[paint(SIDE, rng).mean(1) for _ in range(32)] for paint in GROUNDS.values()]
        self.profiles = torch.from_numpy(np.array(profiles, np.float32))  # ground sample h 3

        painter = Painter(sprites, SIDE)
        smallest, largest = 0.9 * min(SIZES.values()), 1.1 * max(*SIZES.values(), PAIR_SIZE)
        steps = round(math.log(largest / smallest, 1.09))
        scales = np.geomspace(smallest, largest, steps + 1)
        self.templates = {
            side: torch.from_numpy(
                np.stack([painter.scaled(name, side).transpose(2, 0, 1) for name in self.names])
            )
            for side in sorted({round(SIDE * scale) for scale in scales})
        }  # side -> n 4 side side: color times alpha, alpha

    def ground(self, picture: Tensor) -> tuple[str, Tensor]:
        """Return the ground of `picture`, 3 h w in 0..255, and its color per row: 3 h 1.

        Every row of a ground is about one color. The nearest of 32 examples of each ground is taken, by a distance that
        is cut off, so that an object costs each of them the same; its rows then move to the picture's own color.
        """
        pixels = rearrange(picture, "c h w -> h w c")
        shift = pixels[None, None, :, ::2] - self.profiles[:, :, :, None]  # ground sample h w c
        distance = (shift.square().sum(-1) / CUTOFF**2).clamp(max=1).mean((-1, -2))
        best = int(distance.argmin())
        row = self.profiles.flatten(0, 1)[best][:, None]  # h 1 c
        for width in (40, 25, 25):  # mean shift: an object's pixels weigh nothing
            weight = torch.exp(-0.5 * (pixels - row).square().sum(-1, keepdim=True) / width**2)
            row = ((weight * pixels).sum(1, keepdim=True) + row) / (weight.sum(1, keepdim=True) + 1)
        return self.grounds[best // self.profiles.shape[1]], rearrange(row, "h 1 c -> c h 1")

    def objects(self, picture: Tensor, ground: Tensor, count: int) -> list[Found]:
        """Return the `count` objects of `picture`, 3 h w in 0..255, that best explain what is not `ground`, 3 h 1."""
        found: list[Found] = []
        rest = picture - ground
        for _ in range(count):
            best, template, corner = self._best(rest, ground)
            found.append(best)
            side = template.shape[-1]
            y, x = corner
            rest = rest.clone()
            rest[:, y : y + side, x : x + side] *= 1 - template[3]
        return found

    def _best(self, rest: Tensor, ground: Tensor) -> tuple[Found, Tensor, tuple[int, int]]:
        """Slide every sprite at every scale over `rest`; a sprite differs from the ground by e = color - alpha ground.

        The likeness is <rest, e> / (|rest| |e|): the cosine, which no change of contrast alters.
        """
        maps = torch.cat([rest, -(rest * ground).sum(0, keepdim=True)])[None]  # 1 4 h w
        rows = torch.cat([-2 * ground, ground.square().sum(0, keepdim=True)])[None, :, :, 0]  # 1 4 h
        best, where = -1.0, (0, 0, 0, 0)
        for side, sprites in self.templates.items():
            color, alpha = sprites[:, :3], sprites[:, 3:]
            product = F.conv2d(maps, sprites, stride=STRIDE)[0]  # n y x
            kernel = torch.cat([color * alpha, alpha.square()], dim=1).sum(-1)  # n 4 side
            energy = F.conv1d(rows, kernel, stride=STRIDE)[0] + (
                color.square().sum((1, 2, 3)) + FLOOR**2 * alpha.sum((1, 2, 3))
            )[:, None]  # n y
            score = product / energy.clamp(min=1).sqrt()[..., None]
            if score.max() > best:
                n, y, x = np.unravel_index(int(score.argmax()), score.shape)
                best, where = score.max().item(), (side, int(n), STRIDE * int(y), STRIDE * int(x))
        side, n, y, x = where
        center = ((x + side / 2) / SIDE, (y + side / 2) / SIDE)
        likeness = best / max(rest.norm().item(), 1e-6)
        found = Found(self.names[n], *center, side / SIDE, likeness)
        return found, self.templates[side][n], (y, x)


CUTOFF = 60.0
STRIDE = 2
FLOOR = 8.0
