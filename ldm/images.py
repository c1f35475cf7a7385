"""Pictures outside the networks: tensors to PIL, grids, and files, of which a PNG remembers how it was made."""

import io
import json
import math
import os
import re
import secrets
import time
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from einops import rearrange
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # of the files that are read
MAX_PIXELS = 2**27  # of such a file: 134 million, which take 400 MB as RGB

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


def to_tensor(picture: Image.Image) -> Tensor:
    raise NotImplementedError


def fit(picture: Image.Image, width: int, height: int, resize: str = "crop") -> Image.Image:
    raise NotImplementedError


def grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """Paste equally large `pictures` row by row into one that is as square as their number allows."""
    columns = math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def save_png(
    picture: Image.Image, path: str | Path, texts: Mapping[str, str] | None = None, *, overwrite: bool = False
) -> None:
    """Write `picture` with the text chunks `texts` to `path`, completely or not at all.

    Raises FileExistsError if there is a file and `overwrite` was not asked for. Of several processes that write to one
    path without `overwrite`, one succeeds.
    """
    path = Path(path)
    chunks = PngImagePlugin.PngInfo()
    for key, text in (texts or {}).items():
        chunks.add_text(key, text)
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG", pnginfo=chunks)
    temporary = path.with_name(f".ldm-{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(encoded.getbuffer())
        if not overwrite:  # take the name; not every file system has the hard links that take it in one step
            path.touch(exist_ok=False)
        os.replace(temporary, path)
    except FileExistsError:
        raise FileExistsError(f"{path} exists; nothing was overwritten") from None
    except OSError as error:  # it may name the temporary file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def clear_temporary(folder: Path) -> None:
    """Remove what a `save_png` that was killed an hour ago or earlier left in `folder`."""
    for file in folder.glob(".ldm-*"):
        if re.fullmatch(r"\.ldm-[0-9a-f]{16}(\.png)?", file.name):
            with suppress(OSError):  # of someone else, or gone meanwhile
                if file.lstat().st_mtime < time.time() - 3600:
                    file.unlink()


@contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image]:
    """Open the picture at `path` for a block of code that decodes it.

    Only FORMATS are read, whatever the name: left to itself, Pillow starts Ghostscript for a file that holds EPS.
    Raises ValueError for a file that is absent, not a regular file, of another format, damaged, or of more than
    MAX_PIXELS. What a decoder raises inside the block becomes this ValueError, too.
    """
    path = Path(path)
    try:
        if path.stat() and not path.is_file():  # a named pipe would wait for its writer
            raise ValueError("it is a folder" if path.is_dir() else "it is not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS decides
            picture = Image.open(path, formats=FORMATS)
        with picture:
            if picture.width * picture.height > MAX_PIXELS:
                size = f"{picture.width} x {picture.height}"
                raise ValueError(f"it has {size} pixels, of at most {MAX_PIXELS:,} in all; make it smaller")
            yield picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, UnidentifiedImageError):
            reason = f"it is none of {', '.join(FORMATS)}, or damaged"
        raise ValueError(f"the picture {path} cannot be read: {reason}") from error


def read_texts(path: str | Path) -> dict[str, str]:
    """Return the text chunks of the picture at `path`, empty if it has none.

    A JPEG or WebP has none; A1111 writes what would be its `parameters` into the EXIF UserComment there.
    Raises ValueError as `open_picture` does.
    """
    with open_picture(path) as picture:
        picture.load()  # chunks may follow the pixels
        info = {**picture.info, **getattr(picture, "text", {})}
        comment = picture.getexif().get_ifd(0x8769).get(0x9286)
    texts = {key: str(text) for key, text in info.items() if isinstance(text, str)}
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        texts.setdefault("parameters", comment[8:].decode("utf-16-be", "replace"))
    return texts


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
