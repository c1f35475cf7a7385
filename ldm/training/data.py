"""The training data: random emoji scenes, or a folder of pictures with captions."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.pictures import open_picture
from ldm.training.loop import Dataset
from ldm.training.objects import FLUENT, FONT, OBJECTS, emoji_sprites, every_character
from ldm.training.scenes import Scenes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class DataConfig:
    """The training data: the pictures in `folder` if one is given, else emoji scenes."""

    size: int = 64  # pixels; all pictures are squares
    folder: Path | None = None  # see `Folder`
    font: Path = FONT  # draws the flat objects of the scenes
    fluent: Path = FLUENT  # has the 3D objects of the scenes; see docs/training.md
    every_emoji: bool = False  # the objects: all emoji but ten, for a VAE; False: the 108 with names
    seed: int = 0  # of the scenes

    def open(self) -> Dataset:
        """Return the data set. Raises ValueError if the folder or the font cannot be used."""
        if self.folder is not None:
            return Folder(self.folder, self.size)
        characters = every_character(self.fluent) if self.every_emoji else OBJECTS
        return Scenes(emoji_sprites(self.font, self.fluent, characters), self.size, seed=self.seed)


class Folder:
    """A folder of pictures with captions, its subfolders included.

    With a file metadata.jsonl in the folder, each of its lines describes one picture, as in Hugging Face's
    imagefolder: {"file_name": "cats/1.png", "text": "a cat"}. file_name is relative to the folder. Pictures that are
    not listed are left out.

    Without that file, the pictures are all files with one of SUFFIXES. The caption of cats/1.png is the whole text of
    cats/1.txt.

    Both kinds of file are UTF-8. White space around a caption is removed. An empty caption is allowed.
    Each picture is scaled and cropped about its center to a square of `size` pixels; small pictures are enlarged.
    The EXIF rotation is applied, and transparent parts become white.
    """

    def __init__(self, path: Path | str, size: int = 64) -> None:
        """Raises ValueError, with the file's name, for an empty folder, a missing caption or an unreadable file."""
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"the data folder {path} {'is not a folder' if path.exists() else 'does not exist'}")
        if size < 1:
            raise ValueError(f"the size of the pictures must be at least 1 pixel, got {size}")
        self.size = size
        listed = (path / "metadata.jsonl").is_file()
        self.items = _read_metadata(path) if listed else _read_captions(path)
        if not self.items:
            where = f"{path / 'metadata.jsonl'} lists no pictures" if listed else f"there are no pictures in {path}"
            raise ValueError(f"{where}: put {', '.join(SUFFIXES)} files with captions there")
        for picture, _ in self.items:
            with open_picture(picture):
                pass  # reads the header: a wrong file is found now instead of hours into the training

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        path, text = self.items[index]
        with open_picture(path) as picture:
            upright = ImageOps.exif_transpose(picture)
        square = ImageOps.fit(_on_white(upright), (self.size, self.size), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(square))  # h w 3
        return pixels.permute(2, 0, 1).contiguous(), text

    def caption(self, index: int) -> str:
        """Return the caption of a picture without opening the picture."""
        return self.items[index][1]


def _read_metadata(folder: Path) -> list[tuple[Path, str]]:
    items = []
    listing = folder / "metadata.jsonl"
    for number, line in enumerate(_read_text(listing).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
            if not isinstance(name, str) or not isinstance(text, str):
                raise TypeError("both values must be strings")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f'line {number} of {listing} must be like {{"file_name": "1.png", "text": "a cat"}}, got {line[:80]}'
            ) from error
        items.append((folder / name, text.strip()))
    return items


def _read_captions(folder: Path) -> list[tuple[Path, str]]:
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    missing = [path.relative_to(folder) for path in pictures if not path.with_suffix(".txt").is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(pictures)} pictures in {folder} have no caption, the first is {missing[0]}: write "
            f"its caption to {missing[0].with_suffix('.txt')}, or list all pictures in metadata.jsonl"
        )
    return [(path, _read_text(path.with_suffix(".txt")).strip()) for path in pictures]


def _read_text(path: Path) -> str:
    """Read UTF-8 with or without a byte order mark. Raises ValueError, with the file's name, for other encodings."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
