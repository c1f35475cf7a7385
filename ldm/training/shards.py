"""Pictures in tar files, as WebDataset writes them: the files of one picture stand together and differ in suffix.

The tar files stay packed. Their headers are read once at the start, and later single files at their places. So each
example comes once in each epoch on any number of ranks, and a resumed run is exact. `ldm.training.order` reads a few
tar files at a time.
"""

import io
import json
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, cast

import torch
from PIL import Image

from ldm.training.buckets import Size
from ldm.training.data import BESIDE, SUFFIXES, Frame, Pictures, decoded, upright_size

TEXT, JSON = ".txt", ".json"
FILES = ("picture", "caption", *BESIDE)  # of each example; the place of a file that is not used is that of the picture


class Shards(Pictures):
    """The pictures of tar files.

    The files of one picture follow each other, such as 0001.jpg, 0001.txt. Their names are equal up to the first dot.
    The caption is the whole file .txt, or the string "text" or "caption" in the file .json. The mask is .mask.png, and
    the picture before an edit .before.png.
    """

    def __init__(self, paths: Sequence[Path], frame: Frame) -> None:
        """Raises ValueError for a file that is no plain tar or is cut off, and for a picture that lacks a file.

        A damaged picture is found when it is reached, or at once if the sizes of the pictures are needed.
        """
        self.paths = list(paths)
        places = array("q")  # of each example: the tar; offset and size of the files in FILES; 1 for JSON
        sizes: list[Size] = []
        for number, path in enumerate(self.paths):
            for row, size in _examples(path, frame):
                places.extend([number, *row])
                sizes += [] if size is None else [size]
        if not places:
            raise ValueError(f"there are no pictures in {self.paths[0]} and the {len(paths) - 1} tar files after it")
        self.places = torch.tensor(places).reshape(-1, 2 + 2 * len(FILES))
        self.shards = self.places[:, 0]
        super().__init__(frame, sizes)

    def __len__(self) -> int:
        return len(self.places)

    def caption(self, index: int) -> str:
        """Return the caption of a picture without opening the picture."""
        content, name = self._read(index, "caption")
        try:
            text = content.decode("utf-8-sig")
            if self.places[index, -1]:
                row = json.loads(text)
                text = row["text"] if "text" in row else row["caption"]
            return text.strip()
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'the {name} must be UTF-8 text, or JSON with a string "text" or "caption" ({error!r})'
            ) from error

    def open(self, index: int) -> AbstractContextManager[Image.Image]:
        """Open a picture; see `Pictures.open`."""
        content, name = self._read(index, "picture")
        return decoded(io.BytesIO(content), name)

    def open_beside(self, index: int, kind: str) -> AbstractContextManager[Image.Image]:
        """Open what is stored beside a picture; see `Pictures.open_beside`."""
        content, name = self._read(index, kind)
        return decoded(io.BytesIO(content), name)

    def _read(self, index: int, what: str) -> tuple[bytes, str]:
        """Return the content of one file of an example, and a name for messages."""
        at = 1 + 2 * FILES.index(what)
        number, (offset, size) = int(self.places[index, 0]), self.places[index, at : at + 2].tolist()
        with self.paths[number].open("rb") as file:
            file.seek(offset)
            return file.read(size), f"{what} at byte {offset} of {self.paths[number]}"


def _examples(path: Path, frame: Frame) -> Iterator[tuple[list[int], Size | None]]:
    """Yield the places of the files of each picture, and its size if the frame needs it."""
    try:
        with tarfile.open(path, "r:") as tar:
            for key, members in groupby(_members(tar), key=lambda member: _split(member.name)[0]):
                files = {_split(member.name)[1]: member for member in members}
                picture = next((files[suffix] for suffix in SUFFIXES if suffix in files), None)
                if picture is None:
                    continue
                caption = files.get(TEXT, files.get(JSON))
                if caption is None:
                    raise ValueError(
                        f"picture {key} in {path} has no caption: add {key}{TEXT} or {key}{JSON} beside it"
                    )
                for kind in frame.beside:
                    if f".{kind}.png" not in files:
                        raise ValueError(
                            f"picture {key} in {path} has no {BESIDE[kind]}: add {key}.{kind}.png beside it"
                        )
                others = (files[f".{kind}.png"] if kind in frame.beside else picture for kind in BESIDE)
                places = [place for file in (picture, caption, *others) for place in (file.offset_data, file.size)]
                yield [*places, int(TEXT not in files)], _size(tar, picture, path, frame)
    except tarfile.ReadError as error:
        raise ValueError(
            f"{path} is no tar file, is compressed, or is cut off ({error}): only plain tar is read"
        ) from error


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # the list would have every file
        if member.isfile() and not PurePosixPath(member.name).name.startswith("."):  # macOS adds files "._name"
            yield member


def _split(name: str) -> tuple[str, str]:
    """Split the name of a file into key and suffix at the first dot of its last part."""
    path = PurePosixPath(name)
    stem, dot, suffix = path.name.partition(".")
    return str(path.with_name(stem)), dot + suffix.lower()


def _size(tar: tarfile.TarFile, picture: tarfile.TarInfo, path: Path, frame: Frame) -> Size | None:
    if not (frame.buckets or frame.sizes):
        return None
    with decoded(cast(IO[bytes], tar.extractfile(picture)), f"picture {picture.name} of {path}") as opened:
        return upright_size(opened)
