"""Writing files and folders so that a failure, a full disk or a kill leaves what was there."""

import ctypes
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_ERRNO = re.compile(r"os error (\d+)")  # at the end of safetensors' messages


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write the safetensors file `path`, and return once the disk has it.

    Raises OSError if it cannot be written, such as on a full disk.
    """
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        if (code := _ERRNO.search(str(error))) is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    with path.open("rb+") as file:
        os.fsync(file.fileno())  # some file systems only notice here that they are full


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A path in the same folder as `path` to write to, before it is renamed; of a failure nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    _remove(new)  # of a process that had this number and was killed
    try:
        yield new
    finally:
        _remove(new)


def replace_folder(path: Path, new: Path) -> None:
    """Put the folder `new` at `path`, taking along what is in the old one and not in the new."""
    if not path.exists():
        new.rename(path)
        return
    old = new
    if not _exchange(path, new):  # in two steps, between which there is no folder at `path`
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        _remove(old)
        path.rename(old)
        try:
            new.rename(path)
        except OSError:
            old.rename(path)
            raise
    for entry in old.iterdir():
        if not (path / entry.name).exists():
            entry.rename(path / entry.name)
    _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step, which only Linux can do, and there not every file system; return whether it did."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE in <fcntl.h> and <linux/fs.h>
    return rename is not None and rename(here, bytes(one), here, bytes(other), exchange) == 0


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
