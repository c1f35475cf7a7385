"""What to train on: endless emoji scenes, or a folder of one's own captioned pictures."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.pictures import open_picture
from ldm.training.loop import Dataset
from ldm.training.scenes import FONT, Scenes, emoji_sprites

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class DataConfig:
    """What to train on: the folder if there is one, otherwise emoji scenes."""

    size: int = 64  # pixels, square
    folder: Path | None = None  # pictures with .txt captions beside them, or with a metadata.jsonl
    font: Path = FONT  # of the scenes' objects
    seed: int = 0  # of the scenes

    def open(self) -> Dataset:
        """Return the data set. Raises ValueError if it cannot be read."""
        if self.folder is not None:
            return Folder(self.folder, self.size)
        return Scenes(emoji_sprites(font=self.font), self.size, seed=self.seed)


class Folder:
    """A folder of pictures, each scaled and cropped about its center to `size` pixels square.

    Captions come from metadata.jsonl where there is one (a line per picture, {"file_name": ..., "text": ...}, as
    in Hugging Face's imagefolder), and from a .txt file beside each picture otherwise; subfolders count.
    EXIF rotation is applied and transparency laid on white.
    """

    def __init__(self, path: Path | str, size: int = 64) -> None:
        """Raises ValueError, naming the file, for an empty folder, a missing caption or an unreadable picture."""
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"the data folder {path} does not exist")
        if size < 1:
            raise ValueError(f"the pictures' size must be at least 1 pixel, got {size}")
        self.size = size
        listed = (path / "metadata.jsonl").is_file()
        self.items = _read_metadata(path) if listed else _read_captions(path)
        if not self.items:
            raise ValueError(f"no pictures in {path}: need {', '.join(SUFFIXES)} files with captions")
        for picture, _ in self.items:
            with open_picture(picture):
                pass  # the headers now, rather than an error hours into a training

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        path, text = self.items[index]
        with open_picture(path) as picture:
            upright = ImageOps.exif_transpose(picture)
        square = ImageOps.fit(_on_white(upright), (self.size, self.size), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(square))  # h w 3
        return pixels.permute(2, 0, 1).contiguous(), text


def _read_metadata(folder: Path) -> list[tuple[Path, str]]:
    items = []
    listing = folder / "metadata.jsonl"
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f'{listing}, line {number}: want {{"file_name": ..., "text": ...}}, got {line[:80]}'
            ) from error
        items.append((folder / name, str(text)))
    return items


def _read_captions(folder: Path) -> list[tuple[Path, str]]:
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    missing = [path.name for path in pictures if not path.with_suffix(".txt").is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(pictures)} pictures in {folder} have no caption, such as {missing[0]}: "
            f"write {Path(missing[0]).with_suffix('.txt')} beside it, or list all in metadata.jsonl"
        )
    return [(path, path.with_suffix(".txt").read_text(encoding="utf-8").strip()) for path in pictures]


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
