"""Pictures outside the networks: tensors to PIL, grids, and PNG files that remember how they were made."""

import json
import math
import os
import re
import secrets
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from einops import rearrange
from PIL import Image, PngImagePlugin
from torch import Tensor

A1111_SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "lcm": "LCM",
}


def to_pil(images: Tensor) -> list[Image.Image]:
    """Turn images: b 3 h w in [-1, 1] into 8-bit pictures, clamped and rounded to the nearest level.

    CompVis' scripts cut off instead of rounding, and are up to one level darker.
    """
    levels = (images.float() * 0.5 + 0.5).clamp(0, 1) * 255
    array = rearrange(levels.round(), "b c h w -> b h w c").byte().cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """Paste equally large `pictures` row by row into one that is as square as their number allows."""
    columns = math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def save_png(
    picture: Image.Image,
    path: str | Path,
    texts: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write `picture` with the text chunks `texts` to `path`, completely or not at all.

    Raises FileExistsError if there is a file and `overwrite` was not asked for.
    """
    path = Path(path)
    chunks = PngImagePlugin.PngInfo()
    for key, text in (texts or {}).items():
        chunks.add_text(key, text)
    temporary = path.with_name(f".ldm-{secrets.token_hex(8)}.png")
    try:
        with open(temporary, "xb") as file:
            picture.save(file, format="PNG", pnginfo=chunks)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; nothing was overwritten")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_texts(path: str | Path) -> dict[str, str]:
    """Return the text chunks of the picture at `path`, empty if it has none.

    Raises ValueError if there is no readable picture.
    """
    try:
        with Image.open(path) as picture:
            picture.load()  # chunks may follow the pixels
            info = {**picture.info, **getattr(picture, "text", {})}
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable picture ({error})") from error
    return {key: str(text) for key, text in info.items() if isinstance(text, str)}


def a1111_parameters(prompt: str, negative_prompt: str, settings: Mapping[str, object]) -> str:
    """Write the text that image viewers and sharing sites read from the PNG key "parameters".

    settings: listed in the last line as "Name: value", in this order.
    """
    lines = [_printable(prompt)]
    if negative_prompt:
        lines.append(f"Negative prompt: {_printable(negative_prompt)}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def _printable(text: str) -> str:
    """`text` without the control characters that a PNG text chunk must not hold."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
