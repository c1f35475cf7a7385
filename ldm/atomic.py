"""Atomic writing of files and folders: a full disk or a killed process leaves none half-written."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, to write to and then rename. It is removed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    _remove(new)  # left by a killed process with the same number
    try:
        yield new
    finally:
        _remove(new)


def replace_folder(path: Path, new: Path) -> None:
    """Put the folder `new` at `path`. Entries of the old folder that `new` does not have are kept."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:  # KeyboardInterrupt, too
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    if old.exists():
        for entry in old.iterdir():
            if not (path / entry.name).exists():
                entry.rename(path / entry.name)
        _remove(old)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
