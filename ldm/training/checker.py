"""Recognize the ground and the objects in a picture of an emoji scene. Nothing here is trained."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from ldm.training.scenes import GROUNDS, PAIR_SIZE, SIZES, Painter, Sprites

SIDE = 64  # pictures are compared at this many pixels square
CUTOFF = 60  # levels of 255; a pixel that differs more from a ground's color is not part of that ground
NOISE = 3  # levels; a smaller difference from the ground is noise
LEAST = 0.45  # an object with less likeness is not recognized; on empty grounds the likeness is smaller


class Found(NamedTuple):
    """One object in a picture."""

    name: str  # "nothing" if no sprite is similar
    x: float  # of the object's center / side of the picture
    y: float
    size: float  # the object's longer side / side of the picture
    likeness: float  # cosine between the picture's and the sprite's difference from the ground, at most 1


class Seen(NamedTuple):
    """The checker's description of a picture."""

    ground: str
    objects: tuple[Found, ...]


class Checker:
    """Find the ground and the objects in pictures of known sprites on known grounds.

    The ground is the most similar of many example grounds. Then every sprite is compared with the picture at every
    scale and place. The best sprite is the one whose difference from the ground has the largest cosine with the
    picture's own difference. One sprite is found per object (matching pursuit).
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
            self.sprites[i, :, :side, :side] = torch.from_numpy(painter.scaled(name, side).transpose(2, 0, 1))
        self.spectra = torch.fft.rfft2(self.sprites).conj().resolve_conj()
        color, alpha = self.sprites[:, :3], self.sprites[:, 3:]
        self.kernels = torch.cat([color * alpha, alpha.square()], dim=1).sum(3)  # t 4 h
        self.energy = (color.square() + NOISE**2 * alpha).sum((1, 2, 3))  # t
        room = SIDE - torch.tensor([side for _, side in self.templates])[:, None]
        leaves = torch.arange(SIDE) > room  # t x
        self.outside = leaves[:, :, None] | leaves[:, None, :]  # t y x: the sprite would leave the picture

    @torch.no_grad()
    def look(self, picture: Image.Image, objects: int = 1) -> Seen:
        """Return the ground of `picture` and as many objects as are expected."""
        picture = picture.convert("RGB")
        if picture.size != (SIDE, SIDE):
            picture = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        levels = np.asarray(picture, np.float32)
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
        """Return the name of the ground of pixels, c h w, and the ground's color in each row: c h 1.

        Each example ground is compared with every fourth column. Differences above CUTOFF count the same, because they
        belong to objects. Then the colors of the best example are moved to the picture's own colors by mean shift,
        in which the pixels of objects have almost no weight.
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
        """Find the sprite that is most similar to `rest`, c h w; return it and its alpha in the picture: h w.

        On a ground g, a sprite makes the difference e = alpha color - alpha g. Its likeness is the cosine
        <rest, e> / (|rest| |e|), which does not depend on the contrast. Both products are convolutions. The first is
        computed by Fourier transform. For |e| only rows matter, because the ground has one color per row.
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
