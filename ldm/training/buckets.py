"""Aspect-ratio buckets: the sizes that pictures of any shape are cropped to, all of about the same area.

SDXL was trained with them (Podell et al. 2023, section 2.3 and appendix I). NovelAI described them first.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

SMALLEST_AREA = 0.9  # of a bucket / area of the square; with this share the table of 1024 and 64 is SDXL's


class Size(NamedTuple):
    """Width and height in pixels, in Pillow's order."""

    width: int
    height: int


def bucket_table(side: int, step: int) -> list[Size]:
    """Return all sizes that are multiples of `step` and have 0.9 to 1 times the area of the square of `side` pixels.

    The sides are from half to twice `side`. Raises ValueError if `side` is no multiple of `step`.
    """
    if step < 1 or side % step:
        raise ValueError(f"the size of the pictures must be a multiple of buckets = {step} pixels, got {side}")
    sides = range(step * math.ceil(side / 2 / step), 2 * side + 1, step)
    sizes = (Size(width, height) for width in sides for height in sides)
    return [size for size in sizes if SMALLEST_AREA * side**2 <= size.width * size.height <= side**2]


def nearest(table: Sequence[Size], picture: Size) -> int:
    """Return the index of the bucket whose aspect ratio is nearest; of equal ratios, that of the largest bucket."""

    def distance(i: int) -> tuple[float, int]:
        bucket = table[i]
        ratio = picture.width * bucket.height / (picture.height * bucket.width)
        return round(abs(math.log(ratio)), 9), -bucket.width * bucket.height

    return min(range(len(table)), key=distance)


def crop_corner(picture: Size, bucket: Size) -> tuple[int, int]:
    """Return the top and left of the middle of a picture that was scaled to cover the bucket, in its scaled pixels."""
    scale = max(bucket.width / picture.width, bucket.height / picture.height)
    spare = picture.height * scale - bucket.height, picture.width * scale - bucket.width
    return round(spare[0] / 2), round(spare[1] / 2)
