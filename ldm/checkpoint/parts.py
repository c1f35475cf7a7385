"""The parts of a model on disk: where each network's tensors are, and how modules are filled with them, strictly."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ldm.checkpoint.keymap import Rule, Stored, inverse, key_map
from ldm.checkpoint.tensors import DTYPES, FLOATS, Tensors, some
from ldm.config import ModelConfig
from ldm.models.int8 import is_plain
from ldm.models.text import TextEncoder, Tokenizer
from ldm.models.unet import UNet
from ldm.models.vae import VAE

Layout = Literal["ldm", "diffusers"]
TOWERS = ("text_encoder", "text_encoder_2")  # names of the parts that hold the text towers


class Model(NamedTuple):
    """A model in memory. What `load` returns is in evaluation mode, without gradients.

    unused: tensors that the official lists have and no network here computes with, such as the last block of SD 2's
    text encoder; by part and name. They are saved again, so that nothing is lost.
    """

    config: ModelConfig
    unet: UNet
    vae: VAE
    text_encoder: TextEncoder
    unused: Mapping[str, Tensor] = {}
    why: str = ""  # the reason for the architecture and the prediction type, and notes for the user


class ModelLike(Protocol):
    """What can be saved: a Model, a Pipeline, or anything else with these four."""

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
    """One network's tensors: in which files, by which rules, behind which prefix.

    ema: read the averaged copy that training kept beside a UNet. unused: names that the network has no use for, though
    official files have them: they are kept for saving.
    """

    tensors: Tensors
    rules: tuple[Rule, ...]
    prefix: str = ""
    ema: bool = False
    unused: tuple[str, ...] = ()

    def stored(self, keys: Sequence[str]) -> dict[str, Stored]:
        """Return where each of the network's `keys` is."""
        found = key_map(keys, self.rules, self.prefix)
        if not self.ema:
            return found
        return {key: at._replace(name=ema_name(at.name)) for key, at in found.items()}


@dataclass(frozen=True)
class Source:
    """A model on disk, or some parts of one, understood from headers and configurations but not read."""

    config: ModelConfig  # for parts that are absent, it says what the family has
    layout: Layout
    why: str  # the reason for the architecture and the prediction type
    parts: Mapping[str, Part]  # unet, vae, and those of TOWERS that there are
    tokenizers: tuple[Tokenizer, ...]  # one per tower
    notes: tuple[str, ...] = ()  # what a user should know, a clause each
    kept: Tensors | None = None  # what `Model.unused` is, in a file of its own
    dropped: tuple[Part, ...] = ()  # parts in the same files that others replace


def modules(unet: UNet, vae: VAE, text_encoder: TextEncoder) -> dict[str, nn.Module]:
    """Return the networks by the names of their parts."""
    towers = dict(zip(TOWERS, text_encoder.towers, strict=False))
    return {"unet": unet, "vae": vae, **towers}


def ema_name(name: str) -> str:
    """Return where LDM keeps the average of a UNet's tensor. The dots are lost, so this has no inverse."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def compare(
    networks: Mapping[str, nn.Module], parts: Mapping[str, Part], dropped: Sequence[Part] = ()
) -> tuple[dict[str, dict[str, list[str]]], list[str]]:
    """Compare names and shapes of `networks`, on the meta device, with the files of their `parts`, reading no data.

    dropped: parts in the same files that are not wanted. Returns, for each part that does not fit, the names that are
    "missing", "misshapen" (with both shapes) and "unexpected"; and the names that nothing uses. A tensor that nothing
    uses is harmless, unless it looks like another layer of a part's network, which would compute something else.
    """
    wanted, left = {}, set()
    for name, part in parts.items():
        held = collect(networks[name], part.rules, part.prefix)
        wanted[name] = {ema_name(n) if part.ema else n: list(t.shape) for n, t in held.items()}
        gone = tuple(other.prefix for other in dropped if other.tensors is part.tensors)
        left |= {n for n in part.tensors.shapes if not gone or not n.startswith(gone)}
    left = left.difference(*wanted.values(), *(part.unused for part in parts.values()))
    found = {}
    for name, part in parts.items():
        shapes = part.tensors.shapes
        misshapen = [
            f"{n} {list(shapes[n])} instead of {shape}"
            for n, shape in wanted[name].items()
            if n in shapes and _squeezed(shapes[n]) != _squeezed(shape)
        ]
        kinds = {_kind(n.removeprefix(part.prefix)) for n in wanted[name]}
        behind = sorted(n for n in left & shapes.keys() if n.startswith(part.prefix))
        unexpected = [n for n in behind if _kind(n.removeprefix(part.prefix)) in kinds]
        missing = [n for n in wanted[name] if n not in shapes]
        differs = {"missing": missing, "misshapen": misshapen, "unexpected": unexpected}
        if any(differs.values()):
            found[name] = differs
    return found, sorted(left)


def check(networks: Mapping[str, nn.Module], parts: Mapping[str, Part], dropped: Sequence[Part] = ()) -> list[str]:
    """Return the names that nothing uses. Raises ValueError for the first part that does not fit, with names."""
    mismatches, left = compare(networks, parts, dropped)
    for name, differs in mismatches.items():
        found = "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in differs.items() if names)
        raise ValueError(f"the {name} in {parts[name].tensors} does not match its configuration ({found})")
    return left


def _kind(name: str) -> tuple[str, ...]:
    """The first and the last two words of a tensor's name: those of another layer of the same network are alike."""
    words = name.split(".")
    return words[0], *words[-2:]


def _squeezed(shape: Sequence[int]) -> list[int]:
    """A shape without the pixels of a 1x1 convolution, which some tools save as a matrix."""
    return list(shape[:2] if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else shape)


def fill(module: nn.Module, part: Part, *, dtype: torch.dtype | None, device: torch.device) -> None:
    """Give `module`, on the meta device, its tensors from `part` in `dtype` on `device`; it then evaluates, frozen.

    dtype: None keeps what each tensor has. Tensors that need no cast and no move stay memory-mapped and are not read
    yet; the others are read one at a time.
    Raises ValueError naming a tensor that is not stored as floating-point numbers, or was read and holds NaN, infinity
    or more than `dtype` can.
    """
    wanted = module.state_dict()
    stored = part.stored(list(wanted))
    keys_of = inverse(stored)
    values: dict[str, Tensor] = {}
    mapped: list[str] = []
    copied: list[str] = []
    for name in keys_of:
        if (held := part.tensors.dtypes[name]) not in FLOATS:
            raise ValueError(
                f"{name} in {part.tensors} is stored as {held}, weights are {', '.join(FLOATS)}: use another file"
            )
        as_it_is = device.type == "cpu" and dtype in (None, DTYPES[held])
        (mapped if as_it_is else copied).append(name)
    for names in (mapped, copied):
        for name, value in part.tensors.read(names, mapped=names is mapped):
            if names is copied:
                value = _cast(f"{name} in {part.tensors}", value, dtype or value.dtype)
            for key, piece in zip(keys_of[name], value.chunk(len(keys_of[name])), strict=True):
                values[key] = stored[key].form.restore(piece, wanted[key].shape).to(device)
    module.load_state_dict(values, strict=True, assign=True)
    module.to(device).eval().requires_grad_(False)  # `to`: buffers that no file holds


def collect(
    module: nn.Module, rules: tuple[Rule, ...], prefix: str = "", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the module's tensors under their stored names and in their stored forms, in `dtype` if given.

    Raises ValueError for weights that are not held as they are, such as in int8.
    """
    state = module.state_dict()
    for name, value in state.items():
        if not is_plain(value):
            raise ValueError(
                f"{name} is held as {type(value).__name__}, which no file can: load the model without int8 to save it"
            )
    stored = key_map(state, rules, prefix)

    def held(key: str) -> Tensor:
        return stored[key].form.store(state[key]).to(dtype=dtype or state[key].dtype)

    return {
        name: (torch.cat([held(k) for k in keys]) if len(keys) > 1 else held(keys[0])).contiguous()
        for name, keys in inverse(stored).items()
    }


def _cast(what: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of `value` in `dtype`. Raises ValueError if it holds what `dtype` has no finite number for.

    It goes a part at a time through fp32 (a cast to bf16 is faster so) and the processor's cache.
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
