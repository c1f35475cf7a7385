"""PyTorch pickles (.ckpt, .pt, .pth, .bin), read without running the code in them. Only `ldm convert` uses this.

A pickle is a program. torch.load(weights_only=True) obeys only the instructions that build tensors and containers.
Classes that training frameworks leave beside the tensors are replaced by an empty class; all others are refused.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ldm.checkpoint.tensors import DTYPES, PICKLE_STARTS, read_header

TORCH_NEEDED = "2.10"  # before it, weights_only did not keep pickles from corrupting memory
SHOWN = 10  # names that an error lists
NESTS = ("state_dict", "model", "module")  # names under which training loops keep the tensors

# What honest files name beside their tensors: callbacks of Lightning and numpy's scalars (in the official Stable
# Diffusion files), ParameterDict (in embeddings). Nothing of them is imported: `_Inert` stands in.
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
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # of DistributedDataParallel, torch.compile
_FOREIGN = re.compile(r"GLOBAL (\S+)")  # in messages of torch.load
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Inert:
    """A class that takes any arguments and any state, and keeps none."""

    def __new__(cls, *args: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class PickledTensors:
    """The tensors of one pickle, with the interface of TensorFiles.

    Zip files are memory-mapped; files older than torch 1.6 are read whole. metadata: "global_step" where there is one.
    dropped: the names of values that are not tensors.
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

        mapped: whether a tensor may share the file's memory. Otherwise each is a copy.
        """
        wanted = set(names)
        for name in (name for name in self._tensors if name in wanted):
            value = self._tensors[name].contiguous()
            yield name, value if mapped else value.clone()

    def _unwrap(self, found: object) -> dict[object, object]:
        """Follow the nests of training loops to the dictionary of tensors."""
        for _ in range(8):
            if not isinstance(found, dict):
                raise ValueError(f"{self} holds a {type(found).__name__} and no tensors by name")
            found = dict(found)  # an OrderedDict may have an `items` of its own
            if type(step := found.get("global_step")) is int:
                self.metadata = {"global_step": str(step)}
            nest = next((name for name in NESTS if isinstance(found.get(name), dict)), None)
            if nest is None:
                return found
            self.dropped += [str(name) for name in found if name not in (nest, "global_step")]
            found = found[nest]
        raise ValueError(f"{self} nests its tensors more than 8 deep")

    def _add(self, name: str, value: Tensor) -> None:
        """Take in one tensor. Raises ValueError unless it is dense, on the CPU, and its name is new."""
        if name in self._tensors:
            raise ValueError(f"{self} holds {name!r} twice, with and without a wrapper's prefix")
        if (
            type(value) not in (Tensor, nn.Parameter)
            or vars(value)
            or value.dtype not in _NAMES
            or (value.layout, value.device.type) != (torch.strided, "cpu")
        ):
            raise ValueError(
                f"{name!r} in {self} is no plain tensor but a {type(value).__name__} of {value.dtype}, {value.layout}, "
                f"on {value.device}: allowed are dense ones of {', '.join(DTYPES)}"
            )
        self._tensors[name] = value.detach()
        self.shapes[name], self.dtypes[name] = tuple(value.shape), _NAMES[value.dtype]


def is_pickle(path: Path) -> bool:
    """Tell from its first bytes whether the file at `path` is a PyTorch pickle, whatever its name."""
    start = _start(path) if path.is_file() else b""
    # with "{" as the ninth byte, the eight before it are the length of a safetensors header
    return start.startswith(PICKLE_STARTS) and start[8:] != b"{"


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(9)


def _load(path: Path) -> Any:
    """Return what the pickle at `path` holds, with `_Inert` for all that `INERT` names."""
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
    zipped = _start(path).startswith(b"PK")
    with safe_globals([(_Inert, name) for name in INERT]):
        try:
            foreign = get_unsafe_globals_in_checkpoint(path) if zipped else []
            if not foreign:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:  # whatever a damaged or crafted file makes torch raise
            reason = " ".join(str(error).split())
            foreign = _FOREIGN.findall(reason)
            if not foreign:
                reason = reason.partition("WeightsUnpickler error: ")[2] or reason
                raise ValueError(
                    f"{path} is damaged or no checkpoint: {type(error).__name__} {reason[:200]}; fetch it again"
                ) from error
    raise ValueError(
        f"{path} names code that has no place among weights, so it is not opened: {_some(sorted(foreign))}; give the "
        "model's .safetensors file"
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name[:100]) for name in names[:SHOWN])
    return (shown or "nothing") + (", ..." if len(names) > SHOWN else "")
