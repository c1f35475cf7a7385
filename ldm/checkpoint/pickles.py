"""PyTorch pickles (.ckpt, .pt, .pth, .bin), read without running the code in them.

Only `ldm convert` and `ldm.checkpoint.embeddings` use this.

A pickle is a program. torch.load(weights_only=True) runs only the instructions that build tensors and containers.
Classes that training frameworks save beside the tensors are replaced by an empty class; all others are refused.
"""

import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ldm.checkpoint.tensors import DTYPES, PICKLE_STARTS, Tensors, read_header, some

TORCH_NEEDED = "2.10"  # earlier versions let a pickle corrupt memory in spite of weights_only
NESTS = ("state_dict", "model", "module")  # names under which training loops keep the tensors
GROUPS = ("image_proj", "ip_adapter")  # dictionaries side by side, in IP-Adapters; their names become prefixes

# Classes and functions that harmless files name: callbacks of Lightning and numpy's scalars (in the official Stable
# Diffusion files). None of them is imported: `_Inert` replaces them.
INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
PARAMETERS = "torch.nn.modules.container.ParameterDict"  # in old embeddings; `_Parameters` replaces it
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # of DistributedDataParallel, torch.compile
_FOREIGN = re.compile(r"GLOBAL (\S+)")  # in messages of torch.load
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Inert:
    """A class that accepts any arguments and any state, and ignores them."""

    def __new__(cls, *args: object) -> "_Inert":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None: ...


class _Parameters(dict[object, object]):
    """The parameters of a pickled ParameterDict by name."""

    def __setstate__(self, state: object) -> None:
        found = state.get("_parameters") if isinstance(state, dict) else None
        self.update(found if isinstance(found, dict) else {})


class PickledTensors(Tensors):
    """The tensors of one pickle.

    Zip files are memory-mapped; the format from before torch 1.6 is read whole. metadata: "global_step", if present.
    nests: the names under which dictionaries of tensors are looked for.
    Raises ValueError for a file that is not a complete pickle of named tensors, and for one that names code.
    """

    def __init__(self, path: Path, nests: Sequence[str] = NESTS) -> None:
        self.paths = (path,)
        self.metadata = {}
        self._tensors: dict[str, Tensor] = {}
        for name, value in self._unwrap(_load(path), nests).items():
            if isinstance(value, dict) and any(isinstance(inner, Tensor) for inner in value.values()):
                raise ValueError(
                    f"{path} holds tensors under {str(name)[:100]!r}; only those at the top or under "
                    f"{', '.join(nests)} are read: save them in a file of their own"
                )
            if not isinstance(value, Tensor):
                continue
            name = _WRAPPERS.sub("", str(name))
            if name in self._tensors:
                raise ValueError(f"{path} holds {name!r} twice, with and without a wrapper's prefix")
            if value.is_nested or value.layout != torch.strided or value.is_meta or value.dtype not in _NAMES:
                raise ValueError(
                    f"{name!r} in {path} is no plain tensor but one of {value.dtype}, {value.layout}, on "
                    f"{value.device}: allowed are dense ones of {', '.join(DTYPES)}"
                )
            self._tensors[name] = value.detach()
        if not self._tensors:
            raise ValueError(f"{path} holds no tensors by name")
        self.shapes = {name: tuple(value.shape) for name, value in self._tensors.items()}
        self.dtypes = {name: _NAMES[value.dtype] for name, value in self._tensors.items()}

    def read(self, names: Iterable[str], *, mapped: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield contiguous tensors in the order of the file. mapped: several may be views of one storage."""
        wanted = set(names)
        for name, value in self._tensors.items():
            if name in wanted:
                yield name, value.contiguous() if mapped else value.clone(memory_format=torch.contiguous_format)

    def _unwrap(self, found: object, nests: Sequence[str]) -> dict[object, object]:
        """Return the dictionary of tensors, which may lie in others under the names in `nests`."""
        for _ in range(8):
            if not isinstance(found, dict):
                break
            found = dict(found)  # a pickled OrderedDict may carry an attribute `items`
            if type(step := found.get("global_step")) is int:
                self.metadata = {"global_step": str(step)}
            nest = next((name for name in nests if isinstance(found.get(name), dict)), None)
            if nest is None:
                for group in GROUPS:
                    if isinstance(found.get(group), dict):
                        found |= {f"{group}.{name}": value for name, value in dict(found.pop(group)).items()}
                return found
            found = found[nest]
        raise ValueError(f"{self} holds a {type(found).__name__} and no tensors by name")


def is_pickle(path: Path) -> bool:
    """Whether the file at `path` is a PyTorch pickle, by its first bytes and not by its name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(9)  # in a safetensors file: 8 bytes with the length of the header, then "{"
    return start.startswith(PICKLE_STARTS) and start[8:] != b"{"


def _load(path: Path) -> Any:
    """Return the content of the pickle at `path`, with `_Inert` in place of the classes in INERT."""
    if not is_pickle(path):
        read_header(path)  # raises ValueError unless `path` is a safetensors file
        raise ValueError(f"{path} is a safetensors file and no pickle, whatever its name")
    if path.suffix == ".safetensors":  # torch.load would go by the name
        raise ValueError(f"{path} is a pickle in spite of its name: rename it to .ckpt")
    if torch.__version__ < TORCH_NEEDED:
        raise ValueError(
            f"{path} is a pickle, which torch reads safely from {TORCH_NEEDED} on (CVE-2026-24747), this is "
            f"{torch.__version__}: upgrade torch, or give the model's .safetensors file"
        )
    with safe_globals([*((_Inert, name) for name in INERT), (_Parameters, PARAMETERS)]):
        try:
            zipped = zipfile.is_zipfile(path)
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
        f"{path} names code that has no place among weights, so it is not opened: {some(sorted(foreign))}; give the "
        "model's .safetensors file"
    )
