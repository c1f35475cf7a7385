"""The picture files of a job: all paths are checked before the work, and each file is created with its picture."""

import itertools
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.pictures import clear_temporary, save_png

DEFAULT = Path("out.png")


@dataclass(frozen=True)
class Outputs:
    """The picture files of one job, numbered if there are several.

    Without `out` the files are out.png, or out-00001.png and so on; if a name is taken, the next free number is used.
    With `out` the files must not exist, unless `overwrite` is set. records: write into each PNG how it was made.
    write: writes one file, called as `save_png`. endings: of the names of its formats.
    """

    out: Path | None
    count: int
    overwrite: bool = False
    records: bool = True
    write: Callable[..., None] = save_png
    endings: tuple[str, ...] = (".png",)

    @property
    def wanted(self) -> list[Path]:
        """The paths of the files. `save` takes another path if a file exists there in the meantime."""
        path = self.out or DEFAULT
        return [path] if self.count == 1 else [_numbered(path, i + 1) for i in range(self.count)]

    @property
    def preview(self) -> Path:
        """The path of the previews: out.preview.png beside out.png."""
        return (self.out or DEFAULT).with_suffix(".preview.png")

    def check(self) -> None:
        """Raise ValueError if the files cannot be written."""
        path = self.out or DEFAULT
        if path.suffix.lower() not in self.endings:
            example = path / DEFAULT if path.is_dir() else path.with_suffix(".png")
            raise ValueError(f"--out must end in {' or '.join(self.endings)}, such as {example}, got {str(path)!r}")
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent} to write {path.name} into")
        for file in self.wanted:
            if self.out and not self.overwrite and _present(file):
                raise ValueError(f"{file} exists; choose another --out, or add --overwrite")
            if self.overwrite and file.is_dir():
                raise ValueError(f"{file} is a folder; --out names a file")
        probe = path.parent / f".ldm-{secrets.token_hex(8)}"
        try:
            probe.touch(exist_ok=False)
            probe.unlink()
        except OSError as error:
            raise ValueError(f"cannot write into {path.parent}: {error.strerror}") from error
        clear_temporary(path.parent)

    def save(self, index: int, picture: Any, texts: Mapping[str, str]) -> Path:
        """Write picture `index` and return its path: the wanted path, or the next free number if that is taken.

        picture: what `write` takes, such as a PIL picture.
        """
        wanted = self.wanted[index]
        for file in itertools.chain([wanted], _free_numbers(wanted if self.out else DEFAULT)):
            if self.overwrite or not _present(file):
                with suppress(FileExistsError):  # another program created it after the check
                    self.write(picture, file, texts if self.records else {}, overwrite=self.overwrite)
                    break
        return file


def _free_numbers(path: Path) -> Iterator[Path]:
    """Yield `path` with numbers that are larger than all numbers of such files in its folder."""
    pattern = re.compile(re.escape(path.stem) + r"-(\d{5,})" + re.escape(path.suffix), re.IGNORECASE)
    found = [pattern.fullmatch(file.name) for file in path.parent.iterdir()]
    last = max((int(match[1]) for match in found if match), default=0)
    yield from (_numbered(path, number) for number in itertools.count(last + 1))


def _numbered(path: Path, number: int) -> Path:
    return path.with_stem(f"{path.stem}-{number:05d}")


def _present(file: Path) -> bool:
    """Whether `file` exists, also as a broken link. Unlike `Path.exists`, this raises OSError for impossible names."""
    try:
        file.lstat()
    except FileNotFoundError:
        return False
    return True
