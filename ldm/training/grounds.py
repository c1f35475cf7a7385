"""The grounds of the scenes, computed at any size. Light comes from the upper left.

A painter is a function (side, rng) -> pixels: h w 3, about 0 .. 255, for a square of `side` pixels. All lengths are
shares of the side. Each call differs a little in colors and shapes.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.float32]
Color = tuple[float, float, float]


@dataclass(frozen=True)
class Ground:
    """A place in which objects are shown."""

    paint: Callable[[int, np.random.Generator], Pixels]
    phrases: tuple[str, ...]  # of captions; the first is the most frequent
    floor: bool  # objects stand on it and have a shadow


# Tools: a mask is h w in 0 .. 1 -------------------------------------------------------------------


def _axes(side: int) -> tuple[Pixels, Pixels]:
    """Return x: 1 w and y: h 1 of the pixels' centers."""
    line = ((np.arange(side) + 0.5) / side).astype(np.float32)
    return line[None, :], line[:, None]


def _gradient(side: int, *stops: tuple[float, Color]) -> Pixels:
    """Return colors from top to bottom. stops: (y, color), from small to large y."""
    _, y = _axes(side)
    heights = [stop for stop, _ in stops]
    column = [np.interp(y[:, 0], heights, [color[i] for _, color in stops]) for i in range(3)]
    return np.repeat(np.stack(column, axis=-1)[:, None].astype(np.float32), side, axis=1)


def _noise(side: int, rng: np.random.Generator, across: int, down: int) -> Pixels:
    """Return smooth noise, h w with mean 0. across, down: its random points, which have unit variance."""
    cells = Image.fromarray(rng.standard_normal((down, across), np.float32))
    return np.asarray(cells.resize((side, side), Image.Resampling.BICUBIC))


def _clouds(side: int, rng: np.random.Generator, across: int = 4, down: int = 7) -> Pixels:
    """Return the sum of smooth noise at three scales, h w with mean 0. across, down: cells of the largest scale."""
    scales = [_noise(side, rng, across * 2**i, down * 2**i) * 0.5**i for i in range(3)]
    return np.sum(scales, axis=0) * np.float32(0.8)


def _rise(low: float, high: float, values: Pixels) -> Pixels:
    """Return 0 below `low`, 1 above `high`, and a smooth step between."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _over(pixels: Pixels, mask: Pixels, color: Color | Pixels) -> Pixels:
    """Paint `color` where `mask` is 1."""
    return pixels + mask.astype(np.float32)[..., None] * (np.asarray(color, np.float32) - pixels)


def _below(line: Pixels, side: int) -> Pixels:
    """Return the mask of what lies below a line y(x), with a soft edge of one pixel. line: w."""
    _, y = _axes(side)
    return np.clip((y - line[None, :]) * side + 0.5, 0, 1)


def _ridge(side: int, rng: np.random.Generator, height: float, swing: float, bumps: int = 3) -> Pixels:
    """Return a smooth line y(x) about `height`: w."""
    x = np.linspace(0, 1, side)
    bends = [
        np.sin(2 * np.pi * (rng.uniform(0.35, 1) * k * x + rng.random())) * rng.uniform(0.4, 1) / k
        for k in range(1, bumps + 1)
    ]
    return (height + swing * np.sum(bends, axis=0)).astype(np.float32)


def _peaks(side: int, rng: np.random.Generator, height: float, swing: float, count: int) -> Pixels:
    """Return a line y(x) of `count` sharp peaks: w."""
    tops = np.sort(rng.uniform(-0.1, 1.1, count))
    x = np.linspace(0, 1, side)
    cones = [rng.uniform(0.6, 1) * swing - np.abs(x - top) * rng.uniform(0.8, 1.3) for top in tops]
    return (height - np.maximum(np.max(cones, axis=0), -0.02)).astype(np.float32)


def _disc(side: int, x: float, y: float, radius: float, soft: float = 0.0) -> Pixels:
    """Return the mask of a disc. soft: the width of its edge beyond one pixel."""
    across, down = _axes(side)
    distance = np.sqrt((across - x) ** 2 + (down - y) ** 2)
    return np.clip((radius - distance) / (soft + 1 / side) + 0.5, 0, 1)


def _spots(
    side: int, rng: np.random.Generator, count: int, radius: float, top: float = 0.0, end: float = 1.0
) -> Pixels:
    """Return a mask of `count` soft round spots between the heights `top` and `end`."""
    mask = np.zeros((side, side), np.float32)
    for x, y, size in zip(rng.random(count), rng.uniform(top, end, count), rng.uniform(0.6, 1.2, count), strict=True):
        reach = 3 * radius * size
        left, right = max(0, int((x - reach) * side)), min(side, int((x + reach) * side) + 2)
        upper, lower = max(0, int((y - reach) * side)), min(side, int((y + reach) * side) + 2)
        across = (np.arange(left, right) + 0.5) / side - x
        down = (np.arange(upper, lower) + 0.5) / side - y
        spot = np.exp(-(across[None, :] ** 2 + down[:, None] ** 2) / (2 * (radius * size) ** 2))
        mask[upper:lower, left:right] = np.maximum(mask[upper:lower, left:right], spot)
    return mask


def _lit(pixels: Pixels, rng: np.random.Generator, contrast: float = 0.12) -> Pixels:
    """Brighten the upper left, darken the lower right, and vary the colors and the brightness a little."""
    x, y = _axes(len(pixels))
    ramp = 1 + np.float32(contrast) * (1 - x - y) / 2
    tint = rng.normal(1, 0.02, 3).astype(np.float32) * np.float32(rng.normal(1, 0.02))
    return pixels * ramp[..., None] * tint


def _sky(side: int, rng: np.random.Generator, horizon: float, top: Color, bottom: Color, cover: float) -> Pixels:
    """Return a sky with clouds that are lit from above. cover: 0 for few clouds, larger for more."""
    pixels = _gradient(side, (0, top), (horizon, bottom))
    field = _clouds(side, rng)
    cloud = _rise(0.75 - cover, 1.6 - cover, field)
    shade = _rise(-0.4, 1.2, np.roll(field, -max(1, side // 24), axis=0) - field)  # dark where more cloud lies below
    color = np.array((255, 255, 255), np.float32) - shade[..., None] * np.array((45, 36, 22), np.float32)
    return _over(pixels, cloud * 0.95, color)


# Grounds ------------------------------------------------------------------------------------------


def _grass(side: int, rng: np.random.Generator) -> Pixels:
    pixels = _sky(side, rng, 0.4, (105, 185, 250), (205, 235, 255), 0.2)
    far = _ridge(side, rng, 0.34, 0.03)
    pixels = _over(pixels, _below(far, side), _gradient(side, (0.3, (120, 190, 110)), (0.45, (95, 170, 80))))
    meadow = _gradient(side, (0.4, (150, 212, 85)), (0.65, (98, 182, 55)), (1, (52, 132, 36)))
    _, y = _axes(side)
    blades = _noise(side, rng, 40, 10) * (2 + 6 * y) + _noise(side, rng, 4, 5) * 7
    return _lit(_over(pixels, _below(_ridge(side, rng, 0.4, 0.025, 2), side), meadow + blades[..., None]), rng)


def _beach(side: int, rng: np.random.Generator) -> Pixels:
    pixels = _sky(side, rng, 0.3, (70, 170, 245), (200, 235, 255), 0.1)
    water = _gradient(side, (0.28, (20, 115, 190)), (0.5, (70, 205, 215))) + _noise(side, rng, 4, 30)[..., None] * 7
    pixels = _over(pixels, _below(np.full(side, 0.28 + rng.uniform(-0.02, 0.02), np.float32), side), water)
    shore = _ridge(side, rng, 0.5, 0.02, 2)
    foam = _below(shore - 0.035, side)
    pixels = _over(pixels, foam, (245, 252, 255))
    sand = _gradient(side, (0.45, (226, 196, 142)), (0.6, (250, 226, 172)), (1, (236, 202, 138)))
    ripples = _noise(side, rng, 5, 20) * 4
    return _lit(_over(pixels, _below(shore, side), sand + ripples[..., None]), rng)


def _waves(side: int, rng: np.random.Generator, horizon: float) -> Pixels:
    """Return the light of waves that are closer together towards the horizon: h w in 0 .. 1."""
    x, y = _axes(side)
    depth = np.clip((y - horizon) / (1 - horizon), 0.002, 1)
    bend = _noise(side, rng, 5, 9) * 1.3 + np.sin(2 * np.pi * (x * 3 / (0.4 + depth) + rng.random())) * 0.5
    crest: Pixels = (0.5 + 0.5 * np.sin(26 * depth**0.6 + bend)) ** 4
    return crest * (0.35 + 0.65 * depth)


def _sea(side: int, rng: np.random.Generator) -> Pixels:
    horizon = 0.27 + rng.uniform(-0.02, 0.02)
    pixels = _sky(side, rng, horizon, (85, 175, 245), (215, 238, 252), 0.25)
    water = _gradient(side, (horizon, (60, 150, 205)), (0.55, (25, 110, 190)), (1, (8, 62, 140)))
    water = _over(water, _waves(side, rng, horizon) * 0.55, (150, 220, 245))
    return _lit(_over(pixels, _below(np.full(side, horizon, np.float32), side), water), rng)


def _underwater(side: int, rng: np.random.Generator) -> Pixels:
    pixels = _gradient(side, (0, (95, 225, 230)), (0.45, (20, 140, 195)), (0.9, (8, 60, 125)))
    x, y = _axes(side)
    slanted = _ridge(4 * side, rng, 0, 1, 9)[((x + 0.45 * y) * 2 * side).astype(int)]
    pixels = pixels + (_rise(0.1, 1.2, slanted) * (1 - y) * 70)[..., None]
    bed = _ridge(side, rng, 0.88, 0.02)
    sand = _gradient(side, (0.85, (150, 170, 140)), (1, (95, 125, 125))) + _noise(side, rng, 12, 30)[..., None] * 5
    pixels = _over(pixels, _below(bed, side), sand)
    for cx, cy, radius in zip(rng.random(7), rng.uniform(0, 0.8, 7), rng.uniform(0.012, 0.03, 7), strict=True):
        ring = _disc(side, cx, cy, radius)
        ring -= _disc(side, cx, cy, radius * 0.6) * 0.75
        pixels = _over(pixels, ring * 0.6, (215, 250, 255))
    return _lit(pixels, rng)


def _desert(side: int, rng: np.random.Generator) -> Pixels:
    pixels = _gradient(side, (0, (255, 196, 120)), (0.42, (255, 236, 200)))
    sun_x, sun_y = rng.uniform(0.08, 0.3), rng.uniform(0.08, 0.16)
    pixels = _over(pixels, _disc(side, sun_x, sun_y, 0.12, 0.2) * 0.5, (255, 245, 200))
    pixels = _over(pixels, _disc(side, sun_x, sun_y, 0.06, 0.02), (255, 252, 225))
    for height, top, bottom in ((0.37, 226, 196), (0.47, 236, 200), (0.6, 244, 205)):
        line = _ridge(side, rng, height, 0.035, 2)
        slope = np.gradient(line, 1 / side)  # rises to the right where negative: that side is lit
        light = np.clip(-slope * 90, -28, 28)[None, :, None]
        _, y = _axes(side)
        dune = np.stack([np.full((side, side), v, np.float32) for v in (top, top * 0.68, top * 0.38)], axis=-1)
        fade = np.clip((y - height) * 2.2, 0, 1)[..., None] * (top - bottom)
        ripple = _noise(side, rng, 4, 40)[..., None] * 3
        light = light * (1 - 0.6 * np.clip((y - height) * 4, 0, 1))[..., None]
        pixels = _over(pixels, _below(line, side), dune + light - fade + ripple)
    return _lit(pixels, rng)


def _night(side: int, rng: np.random.Generator) -> Pixels:
    pixels = _gradient(side, (0, (10, 12, 48)), (0.6, (38, 42, 105)), (0.85, (70, 72, 140)))
    pixels = _over(pixels, _spots(side, rng, 22, 0.010, 0, 0.75), (255, 250, 215))
    moon_x, moon_y = rng.uniform(0.78, 0.9), rng.uniform(0.1, 0.2)
    pixels = _over(pixels, _disc(side, moon_x, moon_y, 0.13, 0.2) * 0.25, (200, 205, 240))
    pixels = _over(pixels, _disc(side, moon_x, moon_y, 0.065), (250, 244, 215))
    for height, color in ((0.78, (30, 36, 84)), (0.87, (14, 20, 52))):
        pixels = _over(pixels, _below(_ridge(side, rng, height, 0.025), side), color)
    return _lit(pixels, rng, 0.06)


def _bright_sky(side: int, rng: np.random.Generator) -> Pixels:
    return _lit(_sky(side, rng, 1, (60, 150, 240), (205, 235, 255), 0.3), rng)


def _snow(side: int, rng: np.random.Generator) -> Pixels:
    pixels = _gradient(side, (0, (120, 155, 205)), (0.4, (205, 220, 238)))
    for height, top, bottom in ((0.36, (190, 207, 232), (215, 228, 245)), (0.48, (246, 250, 255), (205, 220, 242))):
        hill = _gradient(side, (height, top), (1, bottom)) + _noise(side, rng, 6, 12)[..., None] * 3
        pixels = _over(pixels, _below(_ridge(side, rng, height, 0.035, 2), side), hill)
    return _lit(_over(pixels, _spots(side, rng, 26, 0.010) * 0.95, (255, 255, 255)), rng, 0.08)


def _forest(side: int, rng: np.random.Generator) -> Pixels:
    pixels = _gradient(side, (0, (190, 225, 165)), (0.6, (150, 200, 130)))
    x, y = _axes(side)
    for count, width, color in ((9, 0.09, (112, 168, 104)), (7, 0.12, (66, 124, 72)), (4, 0.17, (34, 84, 52))):
        mask = np.zeros((side, side), np.float32)
        for center in (np.arange(count) + rng.uniform(0.1, 0.9, count)) / count:
            top, foot = rng.uniform(0.02, 0.14), 0.62
            share = np.clip((y - top) / (foot - top), 0, 1)
            edge = width * (0.35 * share + 0.65 * np.mod(share * 4, 1) * (0.4 + 0.6 * share))  # four tiers of branches
            inside = np.clip((edge - np.abs(x - center)) * side + 0.5, 0, 1) * (y > top) * (y < foot + 0.02)
            mask = np.maximum(mask, inside)
        pixels = _over(pixels, mask, color)
    floor = _gradient(side, (0.58, (70, 118, 52)), (1, (46, 76, 36))) + _noise(side, rng, 20, 14)[..., None] * 7
    return _lit(_over(pixels, _below(_ridge(side, rng, 0.6, 0.015), side), floor), rng)


def _mountains(side: int, rng: np.random.Generator) -> Pixels:
    pixels = _sky(side, rng, 0.5, (90, 170, 240), (220, 238, 252), 0.0)
    far = _peaks(side, rng, 0.5, 0.3, 4)
    pixels = _over(pixels, _below(far, side), _gradient(side, (0.2, (150, 170, 205)), (0.55, (175, 195, 220))))
    near = _peaks(side, rng, 0.6, 0.42, 3)
    _, y = _axes(side)
    light = np.where(np.gradient(near, 1 / side) < 0, 16.0, -18.0).astype(np.float32)  # left slopes are lit
    rock = np.array((118, 122, 142), np.float32) + light[None, :, None] + _noise(side, rng, 14, 14)[..., None] * 5
    snow = _rise(-0.02, 0.02, 0.36 - y + _noise(side, rng, 14, 6) * 0.02)
    rock = _over(rock, snow, np.array((238, 243, 250), np.float32) + light[None, :, None])
    pixels = _over(pixels, _below(near, side), rock)
    meadow = _gradient(side, (0.6, (128, 178, 88)), (1, (70, 128, 52))) + _noise(side, rng, 28, 10)[..., None] * 5
    return _lit(_over(pixels, _below(_ridge(side, rng, 0.63, 0.02, 2), side), meadow), rng)


def _sunset(side: int, rng: np.random.Generator) -> Pixels:
    horizon = 0.56 + rng.uniform(-0.02, 0.02)
    stops = (0, (72, 44, 120)), (0.25, (190, 72, 120)), (0.45, (250, 140, 80)), (horizon, (255, 212, 120))
    pixels = _gradient(side, *stops)
    streaks = _rise(0.5, 1.4, _noise(side, rng, 3, 16))
    pixels = _over(pixels, streaks * 0.5, (255, 170, 130))
    sun = rng.uniform(0.3, 0.7)
    pixels = _over(pixels, _disc(side, sun, horizon, 0.28, 0.4) * 0.45, (255, 225, 140))
    pixels = _over(pixels, _disc(side, sun, horizon - 0.02, 0.13), (255, 244, 190))
    water = _gradient(side, (horizon, (196, 104, 110)), (0.75, (110, 56, 110)), (1, (52, 32, 84)))
    x, y = _axes(side)
    path = np.exp(-(((x - sun) / (0.07 + 0.25 * np.clip(y - horizon, 0, 1))) ** 2))  # where the sun is reflected
    glitter = path * (0.3 + _waves(side, rng, horizon))
    water = _over(water, np.clip(glitter, 0, 0.85), (255, 205, 130))
    water = water + (_waves(side, rng, horizon) * 28)[..., None]
    return _lit(_over(pixels, _below(np.full(side, horizon, np.float32), side), water), rng, 0.05)


def _city(side: int, rng: np.random.Generator) -> Pixels:
    pixels = _sky(side, rng, 0.6, (120, 185, 240), (230, 240, 250), 0.05)
    x, y = _axes(side)
    for count, low, high, shades in ((5, 0.1, 0.3, (168, 184, 208)), (4, 0.26, 0.46, (128, 142, 172))):
        edges = np.linspace(-0.05, 1.05, count + 1) + rng.uniform(-0.02, 0.02, count + 1)
        for left, right in itertools.pairwise(edges):
            top = rng.uniform(low, high)
            body = ((x > left + 0.006) & (x < right - 0.006) & (y > top)).astype(np.float32)
            color = np.array(shades, np.float32) * rng.uniform(0.88, 1.12) + rng.normal(0, 8, 3)
            lit_side = 1 + 0.1 * np.clip(1 - 2 * (x - left) / (right - left), -1, 1)
            pixels = _over(pixels, body, color * lit_side[..., None])
            column, row = np.mod((x - left) / (right - left) * 3, 1), np.mod((y - top) / 0.09, 1)
            window = body * ((column > 0.3) & (column < 0.75) & (row > 0.4) & (row < 0.9))
            pixels = _over(pixels, window * 0.8, (255, 238, 180) if rng.random() < 0.5 else (205, 230, 250))
    pavement = _gradient(side, (0.64, (196, 194, 190)), (0.7, (182, 180, 178)))
    road = _gradient(side, (0.7, (104, 106, 114)), (1, (78, 80, 90)))
    pixels = _over(pixels, _below(np.full(side, 0.63, np.float32), side), pavement)
    pixels = _over(pixels, _below(np.full(side, 0.7, np.float32), side), road)
    dashes = (np.mod(x * 4 + rng.random(), 1) < 0.55) & (np.abs(y - 0.9) < 0.014)
    return _lit(_over(pixels, dashes.astype(np.float32) * 0.85, (245, 240, 225)), rng)


def _table(side: int, rng: np.random.Generator) -> Pixels:
    pixels = _gradient(side, (0, (236, 222, 200)), (0.5, (222, 202, 174))) + _noise(side, rng, 3, 3)[..., None] * 3
    pixels = _over(pixels, _disc(side, 0.12, 0.05, 0.5, 0.6) * 0.4, (255, 248, 232))
    wood = _gradient(side, (0.48, (186, 124, 72)), (1, (146, 88, 46)))
    x, y = _axes(side)
    depth = np.clip((y - 0.48) / 0.52, 0, 1)
    grain = _noise(side, rng, 4, 40) * 4 + _noise(side, rng, 3, 16) * 6
    planks = np.floor(5 * depth**0.7)
    tone = rng.normal(0, 9, 7).astype(np.float32)[planks.astype(int)]
    gap = np.exp(-((np.mod(5 * depth**0.7, 1) / 0.06) ** 2)) * 45
    pixels = _over(pixels, _below(np.full(side, 0.48, np.float32), side), wood + (grain + tone - gap)[..., None])
    edge = np.exp(-(((y - 0.48) * 60) ** 2)) * np.ones_like(x)
    return _lit(_over(pixels, edge * 0.5, (240, 190, 130)), rng, 0.18)


def _space(side: int, rng: np.random.Generator) -> Pixels:
    pixels = _gradient(side, (0, (14, 8, 34)), (1, (26, 12, 52)))
    for color, low in (((120, 40, 150), 0.1), ((30, 90, 170), 0.4)):
        pixels = _over(pixels, _rise(low, 2.2, _clouds(side, rng, 3, 3)) * 0.75, color)
    pixels = _over(pixels, _spots(side, rng, 30, 0.009), (255, 250, 240))
    x, y, radius = rng.uniform(0.05, 0.2), rng.uniform(0.78, 0.95), rng.uniform(0.13, 0.18)
    hue = np.array(((225, 140, 90), (110, 170, 200), (190, 150, 215))[rng.integers(3)], np.float32)
    shade = 0.35 + 0.65 * _disc(side, x - 0.05, y - 0.06, radius, radius)
    return _over(pixels, _disc(side, x, y, radius), hue * shade[..., None])


def _plain(color: Color) -> Callable[[int, np.random.Generator], Pixels]:
    def paint(side: int, rng: np.random.Generator) -> Pixels:
        pixels = np.full((side, side, 3), color, np.float32) + rng.normal(0, 4, 3).astype(np.float32)
        return _over(_lit(pixels, rng, 0.16), _disc(side, 0.35, 0.3, 0.4, 0.7) * 0.14, (255, 255, 255))

    return paint


GROUNDS: dict[str, Ground] = {
    "grass": Ground(_grass, ("on the grass", "in a meadow"), floor=True),
    "beach": Ground(_beach, ("on the beach", "on the sand"), floor=True),
    "sea": Ground(_sea, ("in the sea", "on the ocean"), floor=False),
    "underwater": Ground(_underwater, ("under water", "underwater"), floor=False),
    "desert": Ground(_desert, ("in the desert", "on the dunes"), floor=True),
    "night": Ground(_night, ("at night", "under the stars"), floor=False),
    "sky": Ground(_bright_sky, ("in the sky", "in the clouds"), floor=False),
    "snow": Ground(_snow, ("in the snow", "in winter"), floor=True),
    "forest": Ground(_forest, ("in the forest", "in the woods"), floor=True),
    "mountains": Ground(_mountains, ("in the mountains",), floor=True),
    "sunset": Ground(_sunset, ("at sunset",), floor=False),
    "city": Ground(_city, ("in the city", "on the street"), floor=True),
    "table": Ground(_table, ("on a wooden table", "on a table"), floor=True),
    "space": Ground(_space, ("in space", "in outer space"), floor=False),
    "red": Ground(_plain((205, 48, 52)), ("on a red background",), floor=True),
    "yellow": Ground(_plain((242, 204, 62)), ("on a yellow background",), floor=True),
    "purple": Ground(_plain((136, 78, 184)), ("on a purple background",), floor=True),
    "white": Ground(_plain((236, 236, 238)), ("on a white background",), floor=True),
}
