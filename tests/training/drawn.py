"""Drawn objects and an archive of drawn emoji, so that scenes can be tested without an emoji font and a download."""

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image, ImageDraw

SHAPES: dict[str, Callable[[ImageDraw.ImageDraw], None]] = {
    "apple": lambda pen: pen.ellipse((4, 4, 91, 91), fill="crimson"),
    "box": lambda pen: pen.rectangle((8, 8, 87, 87), fill="royalblue"),
    "hill": lambda pen: pen.polygon([(48, 2), (94, 92), (2, 92)], fill="seagreen"),
    "kite": lambda pen: pen.polygon([(48, 2), (90, 48), (48, 94), (6, 48)], fill="gold"),
    "bar": lambda pen: pen.rectangle((2, 34, 94, 62), fill="indigo"),
    "orange": lambda pen: pen.pieslice((2, 2, 94, 94), 20, 300, fill="darkorange"),
}


def drawn_sprites() -> dict[str, dict[str, Image.Image]]:
    """Return the shapes as RGBA squares of 96 pixels: style -> name -> picture.

    They differ in outline and color. The flat ones have small marks inside. The 3D ones have no marks, and are lighter
    towards the top.
    """
    sprites: dict[str, dict[str, Image.Image]] = {"3D": {}, "flat": {}}
    white = Image.new("RGBA", (96, 96), "white")
    light = Image.linear_gradient("L").resize((96, 96)).point(lambda y: (255 - y) * 0.6)
    for i, (name, draw) in enumerate(SHAPES.items()):
        flat = Image.new("RGBA", (96, 96))
        pen = ImageDraw.Draw(flat)
        draw(pen)
        shaded = Image.composite(white, flat, light)
        shaded.putalpha(flat.getchannel("A"))
        for k in range(3):  # marks in another order for each shape
            x, y = 30 + 14 * ((i + k) % 3), 42 + 12 * ((i * k) % 2)
            pen.ellipse((x, y, x + 9, y + 9), fill=("white", "black", "white")[k])
        sprites["3D"][name], sprites["flat"][name] = shaded, flat
    return sprites


def write_archive(path: Path, names: Mapping[str, Image.Image]) -> Path:
    """Write an archive like the one of `npm pack @lobehub/fluent-emoji-3d`. names: such as "1f438" -> picture."""
    files = {"package/package.json": b"{}", "package/README.md": b"Fluent Emoji"}
    for name, picture in names.items():
        encoded = io.BytesIO()
        picture.save(encoded, "WEBP", lossless=True)
        files[f"package/assets/{name}.webp"] = encoded.getvalue()
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
