"""The pictures of inpainting: what a mask repaints, sides that are added, and the way back into the picture.

A mask has the size of its picture. White is repainted, black is kept. A gray part is kept for the first steps: the
darker, the longer. Transparent pixels of a mask count as black. If `Mask.repaint` is "transparent", the mask's colors
do not count: transparent pixels are repainted, and opaque pixels are kept.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps

from ldm.geometry import fit
from ldm.pictures import MAX_PIXELS, open_picture, to_rgb

SIDES = ("left", "top", "right", "bottom")
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Region:
    """The part of a picture that the model works on, and the way of the new pixels back into the whole picture.

    canvas: the whole picture with the added sides, RGB. mask: L, of the same size; 255 is repainted, 0 is kept.
    box: the part of the canvas. feather: see `paste`.
    """

    canvas: Image.Image
    mask: Image.Image
    box: Box
    feather: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """The width and height of the part."""
        left, top, right, bottom = self.box
        return right - left, bottom - top

    def picture(self, width: int, height: int) -> Image.Image:
        """The part, resized to the size at which the model works."""
        return fit(self.canvas.crop(self.box), width, height, "stretch")

    def paste(self, pictures: list[Image.Image]) -> list[Image.Image]:
        """Put new pictures of the part into the whole picture. Only pixels that the mask repaints change.

        feather: the pixels up to this distance from the mask are blended, so that no edge is seen. 0: they are kept.
        """
        painted = self.mask.point([0] + [255] * 255)
        if self.feather:  # at distance d from a straight edge the blur is (feather + 0.5 - d) / (2 feather + 1)
            ramp = painted.filter(ImageFilter.BoxBlur(self.feather)).point([min(255, 2 * i) for i in range(256)])
            painted = ImageChops.lighter(painted, ramp)
        whole = []
        for picture in pictures:
            new = self.canvas.copy()
            new.paste(fit(picture, *self.size, "stretch"), self.box, painted.crop(self.box))
            whole.append(new)
        return whole


def region(source: Any, width: int | None, height: int | None) -> Region:
    """Read the picture and the mask of `source`, an `ldm.Source`, and find the part for the model to work on.

    The part is the whole picture. With `Mask.crop` it is the smallest box around the repainted pixels, enlarged by
    `crop` and `feather` pixels on each side. It is made longer to the ratio of `width` to `height`, or to a square.
    Raises ValueError for no mask, a mask of another size than the picture or without a part to repaint, and for wrong
    sides.
    """
    given, picture = source.mask, source.picture
    if given.image is None and given.repaint == "white":
        if given.extend is None:
            raise ValueError(
                "inpainting needs a mask, sides to extend, or a picture whose transparent part is repainted"
            )
        mask = Image.new("L", picture.size, 0)
    else:
        image = source.image if given.image is None else given.image
        mask = read_mask(image, given.repaint)
        if mask.size != picture.size:
            raise ValueError(
                f"the mask must have the size of the picture, {_size(picture)} pixels, got {_size(mask)}: resize one"
            )
    if given.extend is not None:
        picture, mask = _extended(picture, mask, sides(given.extend))
    found = mask.getbbox()
    if found is None:
        part = "white" if given.repaint == "white" else "transparent"
        raise ValueError(f"the mask has no {part} part, so there is nothing to repaint; all of the picture is kept")
    box: Box = (0, 0, *picture.size)
    if given.crop is not None:
        around = max(given.crop, given.feather)
        box = _around(found, around, picture.size, width / height if width and height else 1.0)
    return Region(picture, mask, box, given.feather)


def sides(text: str) -> Box:
    """Read pixels per side, such as "left=64,top=32", as (left, top, right, bottom). A side that is not named gets 0.

    Raises ValueError for an unknown side, a side that is named twice, and a number below 1.
    """
    found: dict[str, int] = {}
    for word in text.split(","):
        side, _, number = (part.strip() for part in word.partition("="))
        if side not in SIDES or side in found or not number.isdecimal() or int(number) < 1:
            raise ValueError(
                f"extend needs 1 pixel or more for one or more of {', '.join(SIDES)}, such as left=64,right=32, "
                f"got {text!r}"
            )
        found[side] = int(number)
    left, top, right, bottom = (found.get(side, 0) for side in SIDES)
    return left, top, right, bottom


def read_mask(image: str | Path | Image.Image, repaint: str) -> Image.Image:
    """Read a mask as levels of gray, in which 255 is repainted."""
    if isinstance(image, Image.Image):
        return _levels(image, repaint)
    with open_picture(image) as picture:
        return _levels(picture, repaint)


def _levels(picture: Image.Image, repaint: str) -> Image.Image:
    rgb, clear = to_rgb(picture), None
    if picture.has_transparency_data:
        clear = ImageOps.invert(ImageOps.exif_transpose(picture).convert("RGBA").getchannel("A"))
    if repaint == "transparent":
        return clear or Image.new("L", rgb.size, 0)
    gray = rgb.convert("L")
    return ImageChops.subtract(gray, clear) if clear else gray  # `to_rgb` laid transparent pixels over white


def _extended(picture: Image.Image, mask: Image.Image, added: Box) -> tuple[Image.Image, Image.Image]:
    """Add sides to a picture and its mask. The new pixels repeat those at the edge, and are repainted."""
    left, top, right, bottom = added
    width, height = picture.width + left + right, picture.height + top + bottom
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"the extended picture has {width} x {height} pixels, of at most {MAX_PIXELS:,}: extend it less"
        )
    levels = np.pad(np.asarray(picture), ((top, bottom), (left, right), (0, 0)), mode="edge")
    return Image.fromarray(levels), ImageOps.expand(mask, added, fill=255)


def _around(box: Box, padding: int, size: tuple[int, int], ratio: float) -> Box:
    """Enlarge a box by `padding` on all sides, then along one side to width / height = ratio, inside of `size`."""
    across, down = ((max(0, box[i] - padding), min(size[i], box[i + 2] + padding)) for i in (0, 1))
    width, height = across[1] - across[0], down[1] - down[0]
    left, right = _longer(across, round(height * ratio), size[0])
    top, bottom = _longer(down, round(width / ratio), size[1])
    return left, top, right, bottom


def _longer(span: tuple[int, int], length: int, limit: int) -> tuple[int, int]:
    """Make a span up to `length` long, around its middle and inside of 0 .. limit. A longer span stays as it is."""
    length = min(max(length, span[1] - span[0]), limit)
    low = min(max(0, (sum(span) - length) // 2), limit - length)
    return low, low + length


def _size(picture: Image.Image) -> str:
    return f"{picture.width} x {picture.height}"
