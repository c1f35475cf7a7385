"""PyTorch pickles (.ckpt, .pt, .pth, .bin), read without running what is in them; for conversion only.

A pickle is a program. torch.load(weights_only=True) obeys only those of its instructions that build tensors and
containers. Classes that training frameworks leave beside the tensors are replaced by an empty one, others refused.
"""

import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ldm.checkpoint.tensors import DTYPES, MAX_HEADER, read_header

TORCH_NEEDED = "2.10"  # before it, weights_only did not keep pickles from corrupting memory
MAX_DEPTH = 8  # of nesting
SHOWN = 10  # names that an error lists
NESTS = ("state_dict", "model", "module")  # names under which training loops keep the tensors

# What honest files name beside their tensors: callbacks of Lightning and numpy's scalars (the official Stable
# Diffusion ones), ParameterDict (embeddings). Nothing of it is imported; `_Inert` stands in.
INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "torch.nn.modules.container.ParameterDict",
)
_ZIP = b"PK\x03\x04"
_STREAMS = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))  # before torch 1.6
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # of DistributedDataParallel, torch.compile
_FOREIGN = re.compile(r"GLOBAL (\S+)")  # in messages of torch.load
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Inert:
    """A class or function that takes any arguments and any state, and keeps none."""

    def __new__(cls, *args: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class PickledTensors:
    """The tensors of one pickle, with the interface of TensorFiles.

    Zip files are memory-mapped; those older than torch 1.6 are read whole. metadata: "global_step" where there is one.
    dropped: the names of what is not a tensor.
    Raises ValueError for a file that is no whole pickle of tensors by name, and for one that names code.
    """

    def __init__(self, path: Path) -> None:
        self.paths = (path,)
        self.metadata: dict[str, str] = {}
        self.dropped: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}
        for name, value in self._unwrap(_load(path)).items():
            if isinstance(name, str) and isinstance(value, Tensor):
                self._add(_WRAPPERS.sub("", name), value)
            elif name != "global_step":
                self.dropped.append(str(name))
        if not self._tensors:
            raise ValueError(f"{path} holds no tensors by name; it holds {_some(self.dropped)}")

    def __str__(self) -> str:
        return str(self.paths[0])

    def read(self, names: Iterable[str], *, mapped: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, contiguous tensor on the CPU) for each of `names`, in the order of the file.

        mapped: whether a tensor may share the file's memory, or is a copy.
        """
        wanted = set(names)
        for name in (name for name in self._tensors if name in wanted):
            value = self._tensors[name].contiguous()
            yield name, value if mapped else value.clone()

    def _unwrap(self, found: object) -> dict[object, object]:
        """What a pickle holds at the depth where its tensors are."""
        for _ in range(MAX_DEPTH):
            if not isinstance(found, dict):
                raise ValueError(f"{self} holds a {type(found).__name__} and not tensors by name")
            found = dict(dict.items(found))  # a crafted OrderedDict may have an `items` of its own
            if type(step := found.get("global_step")) is int:
                self.metadata = {"global_step": str(step)}
            nest = next((name for name in NESTS if isinstance(found.get(name), dict)), None)
            if nest is None:
                return found
            self.dropped += [str(name) for name in found if name not in (nest, "global_step")]
            found = found[nest]
        raise ValueError(f"{self} nests its tensors more than {MAX_DEPTH} deep")

    def _add(self, name: str, value: Tensor) -> None:
        """Take in one tensor. Raises ValueError unless it is plain, its data are there and its name is new."""
        if name in self._tensors:
            raise ValueError(f"{self} holds {name!r} twice, with and without a wrapper's prefix")
        if (
            type(value) not in (Tensor, nn.Parameter)
            or vars(value)  # attributes, which may replace methods
            or value.is_nested
            or (value.layout, value.device.type) != (torch.strided, "cpu")
            or value.dtype not in _NAMES
        ):
            raise ValueError(
                f"{name!r} in {self} is no plain tensor but a {type(value).__name__} of {value.dtype}, {value.layout}, "
                f"on {value.device}: allowed are dense ones of {', '.join(DTYPES)}"
            )
        size, stored = value.numel() * value.element_size(), value.untyped_storage().nbytes()
        if size > stored or stored > self.paths[0].stat().st_size:
            raise ValueError(
                f"{name!r} in {self} claims the shape {list(value.shape)}, for which the file is too small"
            )
        self._tensors[name] = value.detach()
        self.shapes[name], self.dtypes[name] = tuple(value.shape), _NAMES[value.dtype]


def is_pickle(path: Path) -> bool:
    """Tell from its first bytes whether the file at `path` is a PyTorch pickle, whatever its name."""
    start = _start(path) if path.is_file() else b""
    # with "{" as the ninth, the eight before are the length of a safetensors header
    return start.startswith((_ZIP, *_STREAMS)) and start[8:] != b"{"


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(9)


def _load(path: Path) -> Any:
    """What the pickle at `path` holds, with `_Inert` for all that `INERT` names."""
    if not is_pickle(path):
        read_header(path)  # raises with what else it is, except for a safetensors file
        raise ValueError(f"{path} is a safetensors file and no pickle, whatever its name")
    if path.suffix == ".safetensors":  # torch.load would go by the name
        raise ValueError(f"{path} is a pickle in spite of its name: rename it to .ckpt")
    if torch.__version__ < TORCH_NEEDED:
        raise ValueError(
            f"{path} is a pickle, which torch reads safely from {TORCH_NEEDED} on (CVE-2026-24747), this is "
            f"{torch.__version__}: upgrade torch, or give the model's .safetensors file"
        )
    zipped = _start(path).startswith(_ZIP)
    if zipped:
        _check_zip(path)
    with safe_globals([(_Inert, name) for name in INERT]):
        try:
            foreign = get_unsafe_globals_in_checkpoint(path) if zipped else []
            if not foreign:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:  # whatever a crafted or damaged file makes torch raise
            reason = " ".join(str(error).split())
            foreign = _FOREIGN.findall(reason)
            if not foreign:
                reason = reason.partition("WeightsUnpickler error: ")[2] or reason
                reason = reason.partition(" Check the documentation")[0]
                shown = "".join(filter(str.isprintable, reason[:200]))  # no terminal commands
                raise ValueError(
                    f"{path} is damaged or no checkpoint: {type(error).__name__} {shown}"
                ) from error
    raise ValueError(
        f"{path} names code that has no place among weights, so it is not opened: {_some(sorted(foreign))}; give the "
        "model's .safetensors file"
    )


def _check_zip(path: Path) -> None:
    """Raise ValueError unless `path` is a whole zip file as torch.save writes it, which decompresses nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises more than its own BadZipFile
        raise ValueError(f"{path} is truncated or damaged: {error}; fetch it again") from error
    program = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if not program:
        names = _some([entry.filename for entry in entries])
        raise ValueError(f"{path} is a zip file but no PyTorch checkpoint; it holds {names}")
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise ValueError(f"{path} is a TorchScript program, which is not opened: give a checkpoint")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"{path} is compressed, so it is not opened: torch.save never does that")
    if program[0].file_size > MAX_HEADER:
        raise ValueError(
            f"{path} is no checkpoint: its pickle without tensors has {program[0].file_size:,} bytes, allowed are "
            f"{MAX_HEADER:,}"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name[:100]) for name in names[:SHOWN])
    return (shown or "nothing") + (", ..." if len(names) > SHOWN else "")
