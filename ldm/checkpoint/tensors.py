"""Tensors in safetensors files: what a file is, told from its first bytes, and its tensors read one at a time."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit

_PICKLE = (
    "is a PyTorch pickle, which can run code when it is opened, so it is not read: give the model's "
    ".safetensors file"
)
_SIGNATURES = (  # in lower case
    (b"pk\x03\x04", _PICKLE),
    *((b"\x80" + bytes([protocol]), _PICKLE) for protocol in range(2, 6)),
    (
        b"version https://git-lfs",
        "is a Git LFS pointer and not the file itself: run `git lfs pull`",
    ),
    (
        b"<!doctype",
        "is a web page, so the download went wrong (a login may be needed): fetch it again",
    ),
    (b"<html", "is a web page, so the download went wrong (a login may be needed): fetch it again"),
    (b"{", "is a JSON file and holds no tensors: give a .safetensors file or a model folder"),
    (b"gguf", "is a GGUF file, which is not supported: give a .safetensors file"),
    (b"\x89png", "is a picture and not a model"),
    (b"\xff\xd8\xff", "is a picture and not a model"),
    (b"riff", "is a picture or sound and not a model"),
)


class TensorFiles:
    """The tensors of one safetensors file, or of the shards of one; opening reads only the headers.

    shapes: what each tensor's shape is. metadata: the strings that the (first) file carries.
    Raises ValueError for anything that is not a whole safetensors file, and for a name found twice.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file: dict[str, Path] = {}
        for path in paths:
            header = read_header(path)
            self.metadata = self.metadata or header.pop("__metadata__", {})
            header.pop("__metadata__", None)
            for name, entry in header.items():
                if name in self._file:
                    raise ValueError(f"{name!r} is in both {self._file[name]} and {path}")
                self._file[name] = path
                self.shapes[name] = tuple(entry["shape"])

    def __str__(self) -> str:
        return str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0].parent} (shards)"

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor on the CPU, memory-mapped) for each of `names`, file by file."""
        wanted = set(names)
        for path in self.paths:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in (n for n, home in self._file.items() if home == path and n in wanted):
                    yield name, file.get_tensor(name)


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of the safetensors file at `path`: name -> dtype, shape, data_offsets.

    Raises ValueError with what the file is instead, or what is wrong with it.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a model folder or a .safetensors file")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty: fetch it again")
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if start[8:9] != b"{" or length > MAX_HEADER:
            raise ValueError(f"{path} {_what_else(start)}")
        file.seek(8)
        text = file.read(length)
    if len(text) < length:
        raise ValueError(_truncated(path, 8 + length, size))
    header = _parse(path, text)
    promised = 8 + length + max((e["data_offsets"][1] for e in _entries(header)), default=0)
    if size < promised:
        raise ValueError(_truncated(path, promised, size))
    try:
        with safe_open(path, framework="pt"):
            pass  # checks that offsets, shapes and dtypes agree and cover the file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return header


def _what_else(start: bytes) -> str:
    """What a file is that begins with `start` and not as safetensors do."""
    for signature, what in _SIGNATURES:
        if start.lstrip().lower().startswith(signature):
            return what
    return f"is not a safetensors file: it starts with {start[:16]!r}"


def _entries(header: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (entry for name, entry in header.items() if name != "__metadata__")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            twice = next(n for n, _ in pairs if [m for m, _ in pairs].count(n) > 1)
            raise ValueError(f"{twice!r} occurs twice")
        return dict(pairs)

    try:
        header: dict[str, Any] = json.loads(text, object_pairs_hook=once)
        for entry in _entries(header):
            _, end = entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (end, *entry["shape"])):
                raise ValueError(f"bad shape or offset in {entry}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header does not parse ({error})") from error
    return header


def _truncated(path: Path, promised: int, size: int) -> str:
    return f"{path} is truncated: its header promises {promised:,} bytes, it has {size:,}; fetch it again"
