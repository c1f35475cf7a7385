"""The parts of a model on disk: where each network's tensors are, strict checks of them, and loading into modules."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ldm.checkpoint.keymap import Rule, Stored, inverse, key_map
from ldm.checkpoint.tensors import DTYPES, FLOATS, Tensors, some
from ldm.config import Layout, ModelConfig
from ldm.models.text import TextEncoder
from ldm.models.tokens import Tokenizer
from ldm.models.unet import UNet
from ldm.models.vae import VAE

TOWERS = ("text_encoder", "text_encoder_2")  # names of the parts that hold the text towers


class Model(NamedTuple):
    """A model in memory. The networks that `load` returns are in evaluation mode and need no gradients.

    unused: tensors of official files that no network here computes with, such as the last block of SD 2's text
    encoder, by "part.name". `save` writes them again.
    """

    config: ModelConfig
    unet: UNet
    vae: VAE
    text_encoder: TextEncoder
    unused: Mapping[str, Tensor] = {}
    why: str = ""  # the reason for the architecture and the prediction type, and notes for the user


class ModelLike(Protocol):
    """An object that `save` accepts: a Model, a Pipeline, or another object with these four attributes."""

    @property
    def config(self) -> ModelConfig: ...  # noqa: D102
    @property
    def unet(self) -> UNet: ...  # noqa: D102
    @property
    def vae(self) -> VAE: ...  # noqa: D102
    @property
    def text_encoder(self) -> TextEncoder: ...  # noqa: D102


@dataclass(frozen=True)
class Part:
    """One network on disk: its tensors, the rules from our names to theirs, and the prefix of their names.

    ema: read the exponential moving average of the UNet instead. unused: stored names of official tensors that the
    network does not use; they are kept for saving.
    """

    tensors: Tensors
    rules: tuple[Rule, ...]
    prefix: str = ""
    ema: bool = False
    unused: tuple[str, ...] = ()
    _maps: dict[tuple[str, ...], dict[str, Stored]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def stored(self, keys: Iterable[str]) -> dict[str, Stored]:
        """Return where each of the network's `keys` is stored. The key map is made once."""
        keys = tuple(keys)
        if keys not in self._maps:
            found = key_map(keys, self.rules, self.prefix)
            if self.ema:
                found = {key: at._replace(name=ema_name(at.name)) for key, at in found.items()}
            self._maps[keys] = found
        return self._maps[keys]

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of the stored tensor `name`. Raises ValueError if it is not a floating-point one."""
        if (held := self.tensors.dtypes[name]) not in FLOATS:
            raise ValueError(
                f"{name} in {self.tensors} is stored as {held}, weights are {', '.join(FLOATS)}: use another file"
            )
        return DTYPES[held]


@dataclass(frozen=True)
class Source:
    """A model on disk, or some parts of one, known from headers and configurations; no tensor is read yet."""

    config: ModelConfig  # absent parts have the family's configuration
    layout: Layout
    why: str  # the reason for the architecture and the prediction type
    parts: Mapping[str, Part]  # by name: "unet", "vae" and TOWERS, if present
    tokenizers: tuple[Tokenizer, ...]  # one per tower
    notes: tuple[str, ...] = ()  # clauses for the user
    kept: Tensors | None = None  # the file of a folder that holds `Model.unused`
    dropped: tuple[Part, ...] = ()  # parts that are in the files but not loaded


def modules(unet: UNet, vae: VAE, text_encoder: TextEncoder) -> dict[str, nn.Module]:
    """Return the networks by the names of their parts, as in `Source.parts`."""
    towers = dict(zip(TOWERS, text_encoder.towers, strict=False))
    return {"unet": unet, "vae": vae, **towers}


def ema_name(name: str) -> str:
    """Return the name of the moving average of the UNet tensor `name` in LDM's files, which drop the dots."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def compare(
    networks: Mapping[str, nn.Module], parts: Mapping[str, Part], dropped: Sequence[Part] = ()
) -> tuple[dict[str, dict[str, list[str]]], list[str]]:
    """Compare names and shapes of `networks`, on the meta device, with the headers of the files of their `parts`.

    dropped: parts in the same files that are not loaded. Returns the names that are "missing", "misshapen" (with both
    shapes) and "unexpected" for each part that does not fit. Returns also all names that no network uses. "Unexpected"
    are those of them that look like one more layer of a part: the network of the file has that layer, ours does not.
    """
    wanted, left = {}, set()
    for name, part in parts.items():
        state = networks[name].state_dict()
        wanted[name] = {n: list(t.shape) for n, t in _stored_tensors(state, part.stored(state)).items()}
        gone = tuple(other.prefix for other in dropped if other.tensors is part.tensors)
        left |= {n for n in part.tensors.shapes if not n.startswith(gone)}
    left = left.difference(*wanted.values(), *(part.unused for part in parts.values()))
    found = {}
    for name, part in parts.items():
        shapes = part.tensors.shapes
        misshapen = [
            f"{n} {list(shapes[n])} instead of {shape}"
            for n, shape in wanted[name].items()
            if n in shapes and _squeezed(shapes[n]) != _squeezed(shape)
        ]
        unexpected = _surplus(part, wanted[name], left & shapes.keys())
        missing = [n for n in wanted[name] if n not in shapes]
        if missing or misshapen or unexpected:
            found[name] = {"missing": missing, "misshapen": misshapen, "unexpected": unexpected}
    return found, sorted(left)


def check(networks: Mapping[str, nn.Module], parts: Mapping[str, Part], dropped: Sequence[Part] = ()) -> list[str]:
    """Return the names that no network uses. Raises ValueError for the first part that does not fit its network."""
    mismatches, left = compare(networks, parts, dropped)
    for name, differs in mismatches.items():
        found = "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in differs.items() if names)
        raise ValueError(f"the {name} in {parts[name].tensors} does not match its configuration ({found})")
    return left


def _surplus(part: Part, wanted: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return those of `others`, names in the file of `part`, that look like one more layer of its network.

    They begin with a module that the network or its rules know, and end in two words as a wanted name does.
    """
    ours = [name.removeprefix(part.prefix).split(".") for name in wanted]
    modules = {words[0] for words in ours}
    modules |= {rule.theirs.split(".")[0] for rule in part.rules if isinstance(rule.theirs, str)}
    endings = {tuple(words[-2:]) for words in ours}
    found = []
    for name in sorted(others):
        first, *_ = words = name.removeprefix(part.prefix).split(".")
        if name.startswith(part.prefix) and first in modules and tuple(words[-2:]) in endings:
            found.append(name)
    return found


def _squeezed(shape: Sequence[int]) -> list[int]:
    """`shape` without the kernel dimensions of a 1x1 convolution, which some tools store as a matrix."""
    return list(shape[:2] if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else shape)


def fill(module: nn.Module, part: Part, *, dtype: torch.dtype | None, device: torch.device) -> None:
    """Load the tensors of `part` into `module`, which is on the meta device; it is then in evaluation mode and frozen.

    dtype: None keeps the stored one. Tensors that need no cast and no move stay memory-mapped and are not read yet;
    the others are read one at a time.
    Raises ValueError for a tensor that is not stored in floating point. Raises ValueError for a tensor that is read and
    has NaN, infinity or numbers out of the range of `dtype`.
    """
    wanted = module.state_dict()
    stored = part.stored(wanted)
    keys_of = inverse(stored)
    values: dict[str, Tensor] = {}
    groups: dict[bool, list[str]] = {True: [], False: []}  # by whether a tensor stays memory-mapped
    for name in keys_of:
        groups[device.type == "cpu" and dtype in (None, part.dtype_of(name))].append(name)
    for mapped, names in groups.items():
        for name, value in part.tensors.read(names, mapped=mapped):
            if not mapped:
                value = cast(f"{name} in {part.tensors}", value, dtype or value.dtype)
            for key, piece in zip(keys_of[name], value.chunk(len(keys_of[name])), strict=True):
                values[key] = stored[key].form.restore(piece, wanted[key].shape).to(device)
    module.load_state_dict(values, strict=True, assign=True)
    module.to(device).eval().requires_grad_(False)  # `to` moves the buffers, which are in no file


def collect(
    module: nn.Module, rules: tuple[Rule, ...], prefix: str = "", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the module's tensors under their stored names and in their stored forms, in `dtype` if given.

    Raises ValueError for weights that are not plain tensors, such as quantized ones, which cannot be saved.
    """
    state = module.state_dict()
    for name, value in state.items():
        if type(value) not in (Tensor, nn.Parameter):
            kind = type(value).__name__
            raise ValueError(f"{name} has the type {kind}, which no file can hold: save the model before quantizing it")
    return _stored_tensors(state, key_map(state, rules, prefix), dtype)


def _stored_tensors(
    state: Mapping[str, Tensor], stored: Mapping[str, Stored], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the tensors of `state` under their stored names and in their stored forms, in `dtype` if given."""

    def held(key: str) -> Tensor:
        return stored[key].form.store(state[key]).to(dtype=dtype or state[key].dtype)

    return {
        name: (torch.cat([held(k) for k in keys]) if len(keys) > 1 else held(keys[0])).contiguous()
        for name, keys in inverse(stored).items()
    }


def cast(what: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of `value` in `dtype`. Raises ValueError for NaN, infinity or a number out of its range.

    The cast goes through fp32, which is faster for bf16, in pieces that fit the processor's cache.
    """
    out = torch.empty(value.shape, dtype=dtype)
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    source, target = value.flatten(), out.flatten()
    for start in range(0, len(source), 2**20):
        part = source[start : start + 2**20].to(wide)
        largest = torch.stack(part.aminmax()).abs().max().item()  # NaN spreads
        if not math.isfinite(largest):
            raise ValueError(f"{what} holds NaN or infinity: the file is damaged (a merge gone wrong?), use another")
        if largest > torch.finfo(dtype).max:
            name = str(dtype).removeprefix("torch.")
            raise ValueError(f"{what} holds {largest:.3g}, too large for {name}: take another dtype")
        target[start : start + 2**20] = part
    return out
