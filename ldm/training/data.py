"""The training data: random emoji scenes, or pictures with captions from a folder, tar files or tables."""

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ldm.pictures import FORMATS, MAX_PIXELS, open_picture
from ldm.training.buckets import Size, bucket_table, crop_corner, nearest
from ldm.training.edits import Edits
from ldm.training.loop import Dataset, Example
from ldm.training.objects import FLUENT, FONT, OBJECTS, emoji_sprites, every_character
from ldm.training.scenes import Scenes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BESIDE = {"mask": "mask", "before": "picture before the edit"}  # what the file 1.mask.png or 1.before.png of 1.jpg is
Masking = Literal["none", "file", "alpha"]


@dataclass(frozen=True)
class Frame:
    """How pictures become examples: their size, and what is recorded of them."""

    size: int = 64  # side of the square pictures in pixels
    buckets: int = 0  # crop to `bucket_table(size, buckets)` instead of squares; 0: squares
    mask: Masking = "none"  # where a picture is trained on: everywhere, by a file beside it, or where it is opaque
    sizes: bool = False  # record the original size and the crop, for SDXL
    before: bool = False  # the pictures show the result of an edit, and each has the picture before it

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"the size of the pictures must be at least 1 pixel, got {self.size}")
        if self.buckets:
            bucket_table(self.size, self.buckets)

    @property
    def beside(self) -> tuple[str, ...]:
        """The files that each picture has beside it, as keys of BESIDE."""
        return ("mask",) * (self.mask == "file") + ("before",) * self.before


@dataclass(frozen=True)
class DataConfig:
    """The training data: the pictures in `folder` if one is given, else emoji scenes."""

    size: int = 64  # pixels; all pictures are squares, unless `buckets` is given
    folder: Path | None = None  # see docs/training.md for the kinds of folders
    buckets: int = 0  # pixels; the step of the sides of aspect-ratio buckets, for SDXL 64; 0: squares
    mask: Masking = "none"  # see `Frame`
    keep_out: int = 0  # pictures that are not trained on; the loss on them is measured every `validate_every` steps
    font: Path = FONT  # draws the flat objects of the scenes
    fluent: Path = FLUENT  # has the 3D objects of the scenes; see docs/training.md
    every_emoji: bool = False  # the objects: all emoji but ten, for a VAE; False: the 108 with names
    layout: bool = True  # the captions of the scenes name sizes and places; False: for a ControlNet, which sees them
    seed: int = 0  # of the scenes, and of the choice of the pictures that are kept out

    def open(self, *, sizes: bool = False, pairs: bool = False) -> Dataset:
        """Return the data set. sizes: record the original size and the crop of each picture, for SDXL.

        pairs: pictures after an edit, with the instruction and the picture before it.
        Raises ValueError if the folder or the font cannot be used.
        """
        if self.folder is not None:
            return open_folder(self.folder, Frame(self.size, self.buckets, self.mask, sizes, pairs))
        if self.buckets or self.mask != "none":
            raise ValueError(
                "buckets and mask are for the pictures of a folder, and emoji scenes are squares: omit them"
            )
        characters = every_character(self.fluent) if self.every_emoji else OBJECTS
        sprites = emoji_sprites(self.font, self.fluent, characters)
        if pairs:
            return Edits(sprites, self.size, seed=self.seed)
        return Scenes(sprites, self.size, seed=self.seed, layout=self.layout)

    def split(self, dataset: Dataset) -> tuple[Dataset, Dataset | None]:
        """Return the examples to train on, and `keep_out` others that `seed` chooses, or None for `keep_out` 0.

        Raises ValueError if nothing is left to train on.
        """
        if not self.keep_out:
            return dataset, None
        if not 0 < self.keep_out < len(dataset):
            raise ValueError(f"keep_out must be from 0 to less than the {len(dataset)} pictures, got {self.keep_out}")
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.seed))
        return Some(dataset, order[self.keep_out :].sort().values), Some(dataset, order[: self.keep_out])


class Some:
    """Some examples of a data set."""

    def __init__(self, dataset: Dataset, indices: Tensor) -> None:
        self.dataset, self.indices = dataset, indices
        for name in ("buckets", "shards"):
            if (numbers := getattr(dataset, name, None)) is not None:
                setattr(self, name, numbers[indices])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.dataset[int(self.indices[index])]

    def caption(self, index: int) -> str:
        """Return the caption of an example."""
        return self.dataset.caption(int(self.indices[index]))


class Pictures(ABC):
    """Pictures with captions, scaled and cropped about their center. A subclass knows where they are stored.

    Small pictures are enlarged. The EXIF rotation is applied, and transparent parts become white.
    An example has "mask" beside the image, uint8 1 h w, unless the frame has none. It has "sizes" if the frame asks for
    them. These are the original height and width, and the top and left of the crop in pixels of the scaled picture.
    It has "source", uint8 3 h w, if the frame asks for the pictures before an edit.
    buckets: the bucket of each picture, or None for squares.
    """

    def __init__(self, frame: Frame, sizes: Sequence[Size]) -> None:
        """sizes: of the upright pictures; not needed for squares without "sizes"."""
        self.frame, self.originals = frame, torch.tensor(sizes)
        self.table = bucket_table(frame.size, frame.buckets) if frame.buckets else [Size(frame.size, frame.size)]
        found = {size: nearest(self.table, size) for size in set(sizes)}
        self.buckets = torch.tensor([found[size] for size in sizes]) if frame.buckets else None

    @abstractmethod
    def __len__(self) -> int:
        """Count the pictures."""

    @abstractmethod
    def caption(self, index: int) -> str:
        """Return the caption of a picture without opening the picture."""

    @abstractmethod
    def open(self, index: int) -> AbstractContextManager[Image.Image]:
        """Open a picture for a block of code that decodes it. Raises ValueError if it cannot be decoded."""

    @abstractmethod
    def open_beside(self, index: int, kind: str) -> AbstractContextManager[Image.Image]:
        """Open what is stored beside a picture. kind: a key of BESIDE. Raises ValueError if there is none."""

    def __getitem__(self, index: int) -> Example:
        with self.open(index) as picture:
            upright = ImageOps.exif_transpose(picture)
        bucket = self.table[0 if self.buckets is None else int(self.buckets[index])]
        image, more = _cropped(upright, bucket), {}
        if self.frame.mask != "none":
            mask = ImageOps.fit(self._mask(index, upright), bucket, Image.Resampling.BILINEAR)
            more["mask"] = torch.from_numpy(np.array(mask))[None]
        if self.frame.sizes:
            width, height = self.originals[index].tolist()
            more["sizes"] = torch.tensor([height, width, *crop_corner(Size(width, height), bucket)])
        if self.frame.before:
            more["source"] = _cropped(self._beside(index, "before", upright), bucket)
        return (image, self.caption(index), more) if more else (image, self.caption(index))

    def _mask(self, index: int, upright: Image.Image) -> Image.Image:
        """Return the mask of a picture in levels of gray, as large as the picture."""
        if self.frame.mask == "alpha":
            return upright.convert("RGBA").getchannel("A")
        return self._beside(index, "mask", upright).convert("L")

    def _beside(self, index: int, kind: str, upright: Image.Image) -> Image.Image:
        """Return the picture that is stored beside another one. It must be as large."""
        with self.open_beside(index, kind) as picture:
            found = ImageOps.exif_transpose(picture)
        if found.size != upright.size:
            raise ValueError(
                f"the {BESIDE[kind]} of picture {index} ({self.caption(index)[:40]!r}) has {found.width} x "
                f"{found.height} pixels, and the picture {upright.width} x {upright.height}: make them equal"
            )
        return found


def upright_size(picture: Image.Image) -> Size:
    """Return the size that a picture has after its EXIF rotation, from its header.

    EXIF data behind the pixels of a PNG file are not seen, because Pillow would decode the picture to find them.
    """
    in_header = picture.format != "PNG" or {"exif", "Raw profile type exif"} & picture.info.keys()
    turned = in_header and picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return Size(*(picture.size[::-1] if turned else picture.size))


class Folder(Pictures):
    """A folder of pictures with captions, its subfolders included.

    With a file metadata.jsonl in the folder, each of its lines describes one picture, as in Hugging Face's
    imagefolder: {"file_name": "cats/1.png", "text": "a cat"}. file_name is relative to the folder. Pictures that are
    not listed are left out.

    Without that file, the pictures are all files with one of SUFFIXES. The caption of cats/1.png is the whole text of
    cats/1.txt.

    Both kinds of file are UTF-8. White space around a caption is removed. An empty caption is allowed.
    With the masking "file", the mask of cats/1.jpg is cats/1.mask.png: white where the picture is trained on.
    With `before`, cats/1.before.png is the picture before the edit whose result is cats/1.jpg.
    """

    def __init__(
        self,
        path: Path | str,
        size: int = 64,
        *,
        buckets: int = 0,
        mask: Masking = "none",
        sizes: bool = False,
        before: bool = False,
    ) -> None:
        """Raises ValueError, with the file's name, for an empty folder, a missing or an unreadable file.

        size, buckets, mask, sizes, before: see `Frame`.
        """
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"the data folder {path} {'is not a folder' if path.exists() else 'does not exist'}")
        frame = Frame(size, buckets, mask, sizes, before)
        listed = (path / "metadata.jsonl").is_file()
        self.items = _read_metadata(path) if listed else _read_captions(path, frame)
        if not self.items:
            where = f"{path / 'metadata.jsonl'} lists no pictures" if listed else f"there are no pictures in {path}"
            raise ValueError(f"{where}: put {', '.join(SUFFIXES)} files with captions there")
        for kind in frame.beside:
            self._check_beside(path, kind)
        found = []
        for file, _ in self.items:
            with open_picture(file) as picture:  # a wrong file is found now instead of hours into the training
                found.append(upright_size(picture))
        super().__init__(frame, found)

    def __len__(self) -> int:
        return len(self.items)

    def caption(self, index: int) -> str:
        """Return the caption of a picture without opening the picture."""
        return self.items[index][1]

    def open(self, index: int) -> AbstractContextManager[Image.Image]:
        """Open a picture; see `Pictures.open`."""
        return open_picture(self.items[index][0])

    def open_beside(self, index: int, kind: str) -> AbstractContextManager[Image.Image]:
        """Open the file beside a picture; see `Pictures.open_beside`."""
        return open_picture(self.items[index][0].with_suffix(f".{kind}.png"))

    def _check_beside(self, folder: Path, kind: str) -> None:
        """Raise ValueError if a picture has no file of this kind."""
        missing = [file for file, _ in self.items if not file.with_suffix(f".{kind}.png").exists()]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self.items)} pictures in {folder} have no {BESIDE[kind]}, the first is "
                f"{missing[0]}: save it as {missing[0].with_suffix(f'.{kind}.png')}"
            )


def open_folder(folder: Path, frame: Frame) -> Pictures:
    """Return the pictures of a folder, which are files, tar files, or tables; the content decides.

    Raises ValueError for a folder that cannot be used, with the name of the file.
    """
    if not (folder / "metadata.jsonl").is_file():
        if tars := sorted(folder.glob("*.tar")):
            from ldm.training.shards import Shards

            return Shards(tars, frame)
        if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")) or any(
            folder.glob("*.parquet")
        ):
            from ldm.training.tables import Table

            return Table(folder, frame)
    return Folder(folder, **dataclasses.asdict(frame))


@contextmanager
def decoded(file: IO[bytes] | Path, name: str) -> Iterator[Image.Image]:
    """Open a picture for a block of code that decodes it, as `open_picture` does. name: for messages."""
    try:
        with Image.open(file, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"it has more than {MAX_PIXELS:,} pixels; make it smaller")
            yield picture
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        known = f"it must be one of {', '.join(FORMATS)}, and it has another format or is damaged"
        raise ValueError(
            f"the {name} cannot be read: {known if isinstance(error, UnidentifiedImageError) else error}"
        ) from error


def picture_files(folder: Path, frame: Frame) -> list[Path]:
    """Return the pictures in a folder and its subfolders, in the order of their names, without the files beside them.

    frame: says which files stand beside the pictures.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return [path for path in found if not path.name.endswith(tuple(f".{kind}.png" for kind in frame.beside))]


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


def _read_captions(folder: Path, frame: Frame) -> list[tuple[Path, str]]:
    pictures = picture_files(folder, frame)
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


def _cropped(picture: Image.Image, size: Size) -> Tensor:
    """Scale a picture, and crop it about its center: uint8 3 h w."""
    fitted = ImageOps.fit(_on_white(picture), size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
