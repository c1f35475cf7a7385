"""Tensors in safetensors files: what a file is, told from its first bytes, and its tensors read one at a time."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.checkpoint.strict_json import MAX_BYTES, parse_json

MAX_HEADER = MAX_BYTES  # safetensors' own limit is ten times as much
MAX_NAME = 300  # characters; those of models have up to 130
MAX_RANK = 8
MAX_NUMBERS = 2**40  # of one tensor, also of an empty one whose other sizes are not 0

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


_SHRUNK = "{} became shorter while it was read: fetch it again"


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
            header = read_header(path)
            self.metadata = self.metadata or header.metadata
            for name, entry in header.entries.items():
                if name in self._places:
                    raise ValueError(f"{name!r} is in both {self._places[name].path} and {path}")
                size = entry.end - entry.start
                self._places[name] = _Place(path, header.size + entry.start, size)
                self.shapes[name], self.dtypes[name] = entry.shape, entry.dtype

    def __str__(self) -> str:
        return str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0].parent} (shards)"

    def read(self, names: Iterable[str], *, mapped: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor on the CPU) for each of `names`, file by file.

        mapped: whether the tensors are memory-mapped. Else each is read into the memory of the one before, so it must
        be done with by then: for what is cast or moved at once. Pages of a map would stay resident beside what is made
        of them, and buffers of their own would leave holes between.
        Raises ValueError for a dtype that torch does not have.
        """
        for path, found in self._by_file(names):
            for name in found:
                if self.dtypes[name] not in DTYPES:
                    raise ValueError(
                        f"{name} in {path} is stored as {self.dtypes[name]}, allowed are {', '.join(DTYPES)}"
                    )
            if mapped:
                yield from self._mapped(path, found)
            else:
                yield from self._copied(path, found)

    def _mapped(self, path: Path, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors that share a private mapping of the file; unlike safetensors', making them reads nothing of it."""
        places = [self._places[name] for name in names]
        end = max(place.start + place.size for place in places)
        if path.stat().st_size < end:
            raise ValueError(_SHRUNK.format(path))
        whole = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=end)
        for name, place in zip(names, places, strict=True):
            value = torch.empty(0, dtype=DTYPES[self.dtypes[name]])
            value.set_(whole[place.start : place.start + place.size])
            yield name, value.reshape(self.shapes[name])

    def _copied(self, path: Path, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors that share the memory into which they are read, one after the other."""
        buffer = torch.empty(max(self._places[name].size for name in names), dtype=torch.uint8)
        with path.open("rb", buffering=0) as file:
            for name in names:
                data = buffer[: self._places[name].size]
                left = memoryview(data.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
                file.seek(self._places[name].start)
                while left:
                    got = file.readinto(left)
                    if not got:
                        raise ValueError(_SHRUNK.format(path))
                    left = left[got:]
                yield name, data.view(DTYPES[self.dtypes[name]]).reshape(self.shapes[name])

    def _by_file(self, names: Iterable[str]) -> Iterator[tuple[Path, list[str]]]:
        """Each file that holds some of `names`, with these in the order in which they lie there."""
        wanted = sorted(set(names), key=lambda name: self._places[name])
        for path in self.paths:
            if found := [name for name in wanted if self._places[name].path == path]:
                yield path, found


class Entry(NamedTuple):
    """What a header says of one tensor: its bytes are those from start to end, counted from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple):
    """The beginning of a safetensors file. size: its bytes."""

    size: int
    metadata: dict[str, str]
    entries: dict[str, Entry]


def read_header(path: Path) -> Header:
    """Read the header of the safetensors file at `path`.

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
        if start[8:9] != b"{" or length > max(size, MAX_HEADER):
            raise ValueError(f"{path} {_what_else(start)}")
        if length > MAX_HEADER:
            raise ValueError(
                f"{path} has a header of {length:,} bytes, allowed are {MAX_HEADER:,}: it is damaged or no model"
            )
        file.seek(8)
        text = file.read(length)
    if len(text) < length:
        raise ValueError(_truncated(path, 8 + length, size))
    try:
        header = parse_json(text)
        metadata = _metadata(header.pop("__metadata__", None))
        entries = {name: _entry(name, value) for name, value in header.items()}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its header does not parse ({error})") from error
    promised = 8 + length + max((entry.end for entry in entries.values()), default=0)
    if size < promised:
        raise ValueError(_truncated(path, promised, size))
    try:
        with safe_open(path, framework="np"):
            pass  # checks that offsets, shapes and dtypes agree and cover the file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return Header(8 + length, metadata, entries)


def _what_else(start: bytes) -> str:
    """What a file is that begins with `start` and not as safetensors do."""
    for signature, what in _SIGNATURES:
        if start.lstrip().lower().startswith(signature):
            return what
    return f"is not a safetensors file: it starts with {start[:16]!r}"


def _metadata(value: object) -> dict[str, str]:
    """The strings that a header holds beside its entries, if any. Raises ValueError for anything else."""
    value = value or {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"its metadata must be strings by name, got {short(value)}")
    return value


def _entry(name: str, value: object) -> Entry:
    """What a header says of the tensor `name`. Raises ValueError for a name or sizes that no tensor has."""
    if not name.isprintable() or len(name) > MAX_NAME:
        raise ValueError(
            f"{short(name)} is no name of a tensor: allowed are {MAX_NAME} printable characters"
        )
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end], **rest} if (
            not rest
            and dtype.isidentifier()
            and len(dtype) < 20
            and len(shape) <= MAX_RANK
            and all(type(n) is int and 0 <= n <= MAX_NUMBERS for n in (*shape, start, end))
            and math.prod(max(n, 1) for n in shape) <= MAX_NUMBERS
        ):
            return Entry(dtype, tuple(shape), start, end)
    raise ValueError(f"{name!r} has a bad dtype, shape or offset: {short(value)}")


def _truncated(path: Path, promised: int, size: int) -> str:
    return f"{path} is truncated: its header promises {promised:,} bytes, it has {size:,}; fetch it again"
