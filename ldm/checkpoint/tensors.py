"""Tensors in safetensors files: what a file is, told from its first bytes, and its tensors read one at a time."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
MAX_TENSORS = 100_000  # thirty times as many as any model here has

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


class Tensors(Protocol):
    """Named tensors on disk, described before they are read."""

    @property
    def paths(self) -> tuple[Path, ...]: ...  # noqa: D102
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...  # noqa: D102
    @property
    def dtypes(self) -> Mapping[str, str]: ...  # noqa: D102
    @property
    def metadata(self) -> Mapping[str, str]: ...  # noqa: D102
    def read(  # noqa: D102
        self, names: Iterable[str], *, mapped: bool = True
    ) -> Iterator[tuple[str, Tensor]]: ...


class _Place(NamedTuple):
    """Where one tensor's bytes are."""

    path: Path
    start: int  # from the beginning of the file
    size: int


class TensorFiles:
    """The tensors of one safetensors file, or of the shards of one; opening reads only the headers.

    shapes, dtypes: of each tensor, the dtype as safetensors calls it. metadata: the strings that the (first) file has.
    Raises ValueError for anything that is not a whole safetensors file, and for a name found twice.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._places: dict[str, _Place] = {}
        for path in paths:
            data, header = read_header(path)
            self.metadata = self.metadata or header.pop("__metadata__", {})
            header.pop("__metadata__", None)
            for name, entry in header.items():
                if name in self._places:
                    raise ValueError(f"{name!r} is in both {self._places[name].path} and {path}")
                start, end = entry["data_offsets"]
                self._places[name] = _Place(path, data + start, end - start)
                self.shapes[name], self.dtypes[name] = tuple(entry["shape"]), entry["dtype"]

    def __str__(self) -> str:
        return str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0].parent} (shards)"

    def read(self, names: Iterable[str], *, mapped: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor on the CPU) for each of `names`, file by file.

        mapped: whether the tensors are memory-mapped. Copies are for what is cast or moved at once: pages of a map
        would stay resident beside what is made of them.
        Raises ValueError for a dtype that torch does not have.
        """
        for path, found in self._by_file(names):
            for name in found:
                if self.dtypes[name] not in DTYPES:
                    raise ValueError(
                        f"{name} in {path} is stored as {self.dtypes[name]}, allowed are {', '.join(DTYPES)}"
                    )
            if mapped:
                with safe_open(path, framework="pt", device="cpu") as file:
                    yield from ((name, file.get_tensor(name)) for name in found)
            else:
                with path.open("rb", buffering=0) as raw:
                    yield from ((name, self._copy(raw, name)) for name in found)

    def _copy(self, raw: RawIOBase, name: str) -> Tensor:
        """The tensor `name`, read from the open file that holds it."""
        path, start, size = self._places[name]
        data = torch.empty(size, dtype=torch.uint8)
        left = memoryview(data.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
        raw.seek(start)
        while left:
            got = raw.readinto(left)
            if not got:
                raise ValueError(f"{path} became shorter while it was read: fetch it again")
            left = left[got:]
        return data.view(DTYPES[self.dtypes[name]]).reshape(self.shapes[name])

    def _by_file(self, names: Iterable[str]) -> Iterator[tuple[Path, list[str]]]:
        """Each file with those of `names` that it holds, in the order in which they lie there."""
        wanted = sorted(set(names), key=lambda name: self._places[name])
        for path in self.paths:
            yield path, [name for name in wanted if self._places[name].path == path]


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where the data of the safetensors file at `path` begins, and its header: name -> dtype, shape, offsets.

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
    if len(header) > MAX_TENSORS:
        raise ValueError(
            f"{path} names {len(header):,} tensors, more than the {MAX_TENSORS:,} that are read"
        )
    promised = 8 + length + max((e["data_offsets"][1] for e in _entries(header)), default=0)
    if size < promised:
        raise ValueError(_truncated(path, promised, size))
    try:
        with safe_open(path, framework="pt"):
            pass  # checks that offsets, shapes and dtypes agree and cover the file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return 8 + length, header


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
