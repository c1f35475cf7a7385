"""The geometry of pictures: sizes, cropping and grids."""

import math
from collections.abc import Sequence

from PIL import Image, ImageOps


def target_size(
    picture_width: int,
    picture_height: int,
    area_side: int,
    factor: int,
    *,
    width: int | None = None,
    height: int | None = None,
) -> tuple[int, int]:
    """Return the width and height of the image to make from a picture.

    width, height: the sides that the user chose. A side that is None follows from the picture's aspect ratio. If both
    are None, the image has the area of a square of `area_side` pixels. A side that was None is rounded to the nearest
    multiple of `factor`. It is at least `factor`, and at most area_side^2 / factor, which limits long, thin pictures.
    """
    if not picture_width or not picture_height:
        raise ValueError(f"the picture has no pixels: its size is {picture_width} x {picture_height}")
    if width:
        scale = width / picture_width
    elif height:
        scale = height / picture_height
    else:
        scale = area_side / math.sqrt(picture_width * picture_height)
    longest = area_side**2 // factor**2
    across, down = (max(1, min(round(side * scale / factor), longest)) for side in (picture_width, picture_height))
    return width or factor * across, height or factor * down


def fit(picture: Image.Image, width: int, height: int, resize: str = "crop") -> Image.Image:
    """Resize an RGB picture by Lanczos resampling. A picture that already has this size is returned unchanged.

    resize: "crop" keeps the aspect ratio: it scales the picture until the picture covers the new size, and keeps the
    middle. "stretch" scales width and height independently, so that the aspect ratio changes.
    """
    if 0 in picture.size:
        raise ValueError(f"the picture has no pixels: its size is {picture.width} x {picture.height}")
    if resize == "crop":
        return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    if resize == "stretch":
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    raise ValueError(f'resize must be "crop" or "stretch", got {resize!r}')


def grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """Paste `pictures` of one size row by row into a single picture with about as many columns as rows."""
    columns = math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet
