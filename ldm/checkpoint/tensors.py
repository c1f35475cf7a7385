"""Safetensors files: checking them, reading their tensors one at a time, and writing them."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

DTYPES = {  # by safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = tuple(name for name, dtype in DTYPES.items() if dtype.is_floating_point)
PICKLE_STARTS = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))

_PICKLE = (
    "is a PyTorch pickle, which can run code when it is opened, so it is not read: `ldm convert` reads it safely and "
    "writes a .safetensors file"
)
_WEB_PAGE = "is a web page, so the download went wrong (a login may be needed): fetch it again"
_SIGNATURES = (  # (first bytes in lower case, what the file is)
    *((start.lower(), _PICKLE) for start in PICKLE_STARTS),
    (b"version https://git-lfs", "is a Git LFS pointer and not the file itself: run `git lfs pull`"),
    *((start, _WEB_PAGE) for start in (b"<!doctype", b"<html")),
    (b"{", "is a JSON file and holds no tensors: give a .safetensors file or a model folder"),
    (b"gguf", "is a GGUF file, which is not supported: give a .safetensors file"),
    *((start, "is a picture and not a model") for start in (b"\x89png", b"\xff\xd8\xff")),
    (b"riff", "is a picture or sound and not a model"),
)
SHOWN = 3  # the most names that an error message lists
_ERRNO = re.compile(r"(?:os error|Os \{ code:) (\d+)")  # in safetensors' messages of today, and of 0.4


class Tensors:
    """Named tensors on disk, described before they are read.

    shapes, dtypes: by tensor name; a dtype is a key of DTYPES, or another name in safetensors' format.
    metadata: strings by key, from the first file that has any.
    """

    paths: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]

    def __str__(self) -> str:
        return str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0].parent} (shards)"

    def read(self, names: Iterable[str], *, mapped: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor on the CPU) for each of `names`.

        mapped: memory-map the tensors. Otherwise each tensor may overwrite the one before, which keeps the peak of
        memory low. So cast, move or copy a tensor before you ask for the next.
        Raises ValueError for a dtype that torch does not have.
        """
        raise NotImplementedError


class TensorFiles(Tensors):
    """The tensors of one safetensors file or of several shards. The constructor reads only the headers.

    Raises ValueError for a file that is not a complete safetensors file, and for a name in two files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.shapes, self.dtypes, self.metadata = {}, {}, {}
        self._places: dict[str, tuple[Path, int, int]] = {}  # file, first byte, number of bytes
        for path in paths:
            size, header = read_header(path)
            metadata = header.pop("__metadata__", None)
            self.metadata = self.metadata or metadata or {}
            for name, entry in header.items():
                if name in self._places:
                    raise ValueError(f"{name!r} is in both {self._places[name][0]} and {path}")
                start, end = entry["data_offsets"]
                self._places[name] = path, size + start, end - start
                self.shapes[name], self.dtypes[name] = tuple(entry["shape"]), entry["dtype"]

    def read(self, names: Iterable[str], *, mapped: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors file by file, in the order of their bytes."""
        wanted = sorted(set(names), key=lambda name: self._places[name])
        for name in wanted:
            if self.dtypes[name] not in DTYPES:
                raise ValueError(f"{name} in {self} is stored as {self.dtypes[name]}, allowed are {', '.join(DTYPES)}")
        for path in self.paths:
            if found := [name for name in wanted if self._places[name][0] == path]:
                yield from self._mapped(path, found) if mapped else self._copied(path, found)

    def _mapped(self, path: Path, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors that share a private memory map of `path`. No data is read until they are used."""
        places = {name: self._places[name][1:] for name in names}  # safe_open would touch half of a cached file's pages
        end = max(start + size for start, size in places.values())
        whole = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=end)
        for name, (start, size) in places.items():
            value = torch.empty(0, dtype=DTYPES[self.dtypes[name]]).set_(whole[start : start + size])
            yield name, value.reshape(self.shapes[name])

    def _copied(self, path: Path, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Read the tensors one after the other into one buffer, and yield each as a view of it."""
        buffer = torch.empty(max(self._places[name][2] for name in names), dtype=torch.uint8)
        with path.open("rb") as file:
            for name in names:
                _, start, size = self._places[name]
                data = buffer[:size]
                file.seek(start)
                if file.readinto(data.numpy()) < size:  # type: ignore[arg-type]  # numpy arrays are buffers
                    raise ValueError(f"{path} became shorter while it was read: fetch it again")
                yield name, data.view(DTYPES[self.dtypes[name]]).reshape(self.shapes[name])

    def overwrite(self, name: str, value: Tensor) -> None:
        """Write `value` over a tensor of a file. It has the same dtype and shape."""
        path, start, _ = self._places[name]
        with _named(path), path.open("rb+") as file:
            file.seek(start)
            file.write(value.contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]  # as above

    def sync(self) -> None:
        """Return once the disk has the files. Raises OSError on a full disk."""
        for path in self.paths:
            _sync(path)


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Read the header of the safetensors file at `path`. Returns its size in bytes, and its entries by name.

    Raises ValueError for another kind of file, naming the kind, and for a truncated or damaged file.
    """
    check_file(path, "give a model folder or a .safetensors file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if start[8:9] != b"{" or length > max(size, 10**8):
            raise ValueError(f"{path} {_what_else(start)}")
        file.seek(8)
        text = file.read(length)
    try:
        with safe_open(path, framework="np"):  # safetensors validates the header
            pass
    except SafetensorError as error:
        promised = 8 + length
        if len(text) == length and "incomplete" in str(error).lower():
            entries = [entry for name, entry in json.loads(text).items() if name != "__metadata__"]
            promised += max((entry["data_offsets"][1] for entry in entries), default=0)
        if size < promised:
            raise ValueError(
                f"{path} is truncated: its header promises {promised:,} bytes, it has {size:,}; fetch it again"
            ) from error
        raise ValueError(f"{path} is damaged: {error}") from error
    return 8 + length, json.loads(text)


def parse_object(text: str | bytes, where: object) -> dict[str, Any]:
    """Parse `text` as a JSON object. Raises ValueError naming `where` if it is not one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(value).__name__}")
    return value


def check_file(path: Path, advice: str) -> None:
    """Raise ValueError, ending in `advice`, unless `path` is a regular file that is not empty."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a broken link, its target {os.readlink(path)} is missing: fetch it again")
    if not path.exists():
        raise ValueError(f"{path} does not exist: {advice}")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file: {advice}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: fetch it again")


def _what_else(start: bytes) -> str:
    """Describe a file that begins with `start` and is not a safetensors file."""
    known = (what for signature, what in _SIGNATURES if start.lstrip().lower().startswith(signature))
    return next(known, f"is not a safetensors file: it starts with {start[:16]!r}")


def some(names: Sequence[str]) -> str:
    """Return the first SHOWN of `names`, separated by commas, for an error message."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write the safetensors file `path`, and return once the disk has it.

    Tensors on the meta device become zeros, which take no space until `TensorFiles.overwrite` replaces them.
    Raises OSError if the file cannot be written, for example on a full disk.
    """
    path.touch()
    if any(value.is_meta for value in tensors.values()):
        _write_with_holes(tensors, path, metadata)
        return
    mode = path.stat().st_mode  # of a new file here; safetensors lets only the owner read it
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        if (code := _ERRNO.search(str(error))) is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    path.chmod(mode)
    _sync(path)


def _write_with_holes(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, value in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):  # aligns them
        start, end = end, end + value.nbytes
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with _named(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    written = TensorFiles([path])
    for name, value in tensors.items():
        if not value.is_meta:
            written.overwrite(name, value)


def _sync(path: Path) -> None:
    with _named(path), path.open("rb+") as file:
        os.fsync(file.fileno())  # some file systems notice only here that they are full


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Put `path` into an OSError that names no file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error
