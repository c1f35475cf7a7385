"""Picture files: read the usual formats as 8-bit RGB, and write PNG files with text chunks, and animations."""

import io
import json
import os
import re
import secrets
import time
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # the only formats that are read
MAX_PIXELS = 2**27  # the most pixels that a picture may have: 134 million, which take 400 MB as RGB


def save_png(
    picture: Image.Image, path: str | Path, texts: Mapping[str, str] | None = None, *, overwrite: bool = False
) -> None:
    """Write `picture` with the text chunks `texts` to `path`, completely or not at all, also if Ctrl-C stops the work.

    Raises FileExistsError if the file exists and `overwrite` is false. If several processes or threads write to one
    path without `overwrite`, one of them succeeds.
    """
    _write(Path(path), overwrite, picture, format="PNG", pnginfo=_chunks(texts))


def save_animation(
    pictures: Sequence[Image.Image],
    path: str | Path,
    texts: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
    seconds: float = 0.1,
) -> None:
    """Write `pictures` as the frames of an endless animation, without loss, completely or not at all.

    path: ends in .png for an animated PNG, or in .webp, which has no text chunks: there `texts` is left out.
    seconds: how long each frame is shown. Raises FileExistsError as `save_png` does.
    """
    path = Path(path)
    first, *rest = pictures
    shown: dict[str, Any] = {"save_all": True, "append_images": rest, "duration": round(1000 * seconds), "loop": 0}
    if path.suffix.lower() == ".webp":
        _write(path, overwrite, first, format="WEBP", lossless=True, **shown)
    else:
        _write(path, overwrite, first, format="PNG", pnginfo=_chunks(texts), **shown)


def _chunks(texts: Mapping[str, str] | None) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    for key, text in (texts or {}).items():
        chunks.add_text(key, text)
    return chunks


def _write(path: Path, overwrite: bool, picture: Image.Image, **options: Any) -> None:
    encoded = io.BytesIO()
    picture.save(encoded, **options)
    temporary = path.with_name(f".ldm-{secrets.token_hex(8)}")
    reserved = False
    try:
        with open(temporary, "xb") as file:
            file.write(encoded.getbuffer())
        if not overwrite:  # reserve the name with an empty file, because not every file system has hard links
            path.touch(exist_ok=False)
            reserved = True
        os.replace(temporary, path)
    except FileExistsError:
        raise FileExistsError(f"{path} exists; nothing was overwritten") from None
    except OSError as error:  # its message may name the temporary file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if reserved and temporary.exists():  # it has not replaced the empty file
            path.unlink()
        temporary.unlink(missing_ok=True)


def clear_temporary(folder: Path) -> None:
    """Remove the temporary files in `folder` that a killed `save_png` left there an hour ago or earlier."""
    for file in folder.glob(".ldm-*"):
        if re.fullmatch(r"\.ldm-[0-9a-f]{16}(\.png)?", file.name):
            with suppress(OSError):  # another user's file, or a file that is gone by now
                if file.lstat().st_mtime < time.time() - 3600:
                    file.unlink()


@contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image]:
    """Open the picture file at `path` for a block of code that decodes it.

    Only FORMATS are read, whatever the file's name says. Without this limit Pillow starts Ghostscript for EPS files.
    Raises ValueError for a file that is absent, not a regular file, of another format, damaged, or larger than
    MAX_PIXELS. If the decoder fails inside the block, this also becomes a ValueError.
    """
    path = Path(path)
    try:
        if path.stat() and not path.is_file():  # opening a named pipe would wait for a writer
            raise ValueError("it is a folder" if path.is_dir() else "it is not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS decides
            picture = Image.open(path, formats=FORMATS)
        with picture:
            if picture.width * picture.height > MAX_PIXELS:
                size = f"{picture.width} x {picture.height}"
                raise ValueError(f"it has {size} pixels, of at most {MAX_PIXELS:,} in all; make it smaller")
            yield picture
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, UnidentifiedImageError):
            known = ", ".join(FORMATS)
            reason = f"it must be one of {known}; the file has another format, is a rare variant, or is damaged"
        elif isinstance(error, Image.DecompressionBombError):  # Pillow's own limit, which is higher
            reason = f"it has more than {MAX_PIXELS:,} pixels; make it smaller"
        raise ValueError(f"the picture {path} cannot be read: {reason}") from error


def read_picture(image: str | Path | Image.Image) -> Image.Image:
    """Read a file or a PIL picture as 8-bit RGB, as `to_rgb` does. Raises ValueError as `open_picture` does."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    with open_picture(image) as picture:
        return to_rgb(picture)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Turn a picture of any kind into 8-bit RGB, without metadata.

    - The rotation in the EXIF data is applied.
    - Gray levels of 12 or 16 bits are scaled to 8 bits.
    - A color profile is applied, so that the colors become those of sRGB. A profile is ignored if it is damaged or
      made for other channels than the picture has, or if Pillow was built without LittleCMS.
    - Transparent pixels are laid over white.
    - Of an animation, or a file with several pages, the first frame or page is taken.

    Raises ValueError for pixels with 32 bits or a sign, because their levels of black and white are unknown.
    """
    picture = ImageOps.exif_transpose(_eight_bits(picture))
    transparent = picture.convert("RGBA") if picture.has_transparency_data else None
    channels = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(picture.mode, "RGB")
    rgb = _to_srgb((transparent or picture).convert(channels), picture.info.get("icc_profile"))
    if transparent:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), transparent.getchannel("A"))
    rgb.info = {}  # the profile does not describe the new pixels
    return rgb


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Scale gray levels of 12 or 16 bits to 8 bits; Pillow would clip them. Return other pictures unchanged."""
    if picture.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are signed or have 32 bits (mode {picture.mode}), so black and white are unknown levels; "
            "save it with 8 or 16 unsigned bits per channel"
        )
    if not picture.mode.startswith("I;16"):
        return picture
    tags = getattr(picture, "tag_v2", {})  # of a TIFF
    white = 2 ** tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1
    levels = (np.asarray(picture).astype(np.uint32) * 255 + white // 2) // white
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is 0, and Pillow inverts only 8-bit levels
        levels = 255 - levels
    gray = Image.fromarray(levels.astype(np.uint8))
    gray.info = {key: value for key, value in picture.info.items() if key != "transparency"}
    return gray


def _to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Turn a picture of mode L, RGB or CMYK into sRGB. `profile` is its ICC color profile.

    A profile that changes no level by more than 2 is not applied, because many profiles only describe sRGB itself.
    """
    rgb = picture.convert("RGB")
    if not profile:
        return rgb
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        srgb = ImageCms.ImageCmsTransform(source, target, picture.mode, "RGB").apply(picture)
    except (ImportError, OSError, ValueError):  # no LittleCMS; a damaged profile, or one for other channels
        return rgb
    return srgb if np.asarray(ImageChops.difference(rgb, srgb)).max() > 2 else rgb


def read_texts(path: str | Path) -> dict[str, str]:
    """Return the text chunks of the picture at `path`, empty if it has none.

    JPEG and WebP have no text chunks. In these files A1111 writes its parameters into the EXIF field UserComment, which
    is returned under the key "parameters".
    Raises ValueError as `open_picture` does.
    """
    with open_picture(path) as picture:
        picture.load()  # chunks may follow the pixels
        info = {**picture.info, **getattr(picture, "text", {})}
        comment = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    texts = {key: str(text) for key, text in info.items() if isinstance(text, str)}
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        texts.setdefault("parameters", comment[8:].decode("utf-16-be", "replace"))
    return texts


def a1111_parameters(prompt: str, negative_prompt: str, settings: Mapping[str, object]) -> str:
    """Return the text that A1111, image viewers and sharing sites read from the PNG key "parameters".

    settings: the entries of the last line, "Name: value", in this order.
    """
    lines = [_printable(prompt)]
    if negative_prompt:
        lines.append(f"Negative prompt: {_printable(negative_prompt)}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def _printable(text: str) -> str:
    """Return `text` without the control characters that a PNG text chunk must not hold."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
