"""The parts of a model on disk: where each network's tensors are, and how modules are strictly filled with them."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Size, Tensor, nn

from ldm.checkpoint.keymap import Form, Rule, Stored, inverse, key_map
from ldm.checkpoint.tables import diffusers_unet, ldm_unet
from ldm.checkpoint.tensors import DTYPES, FLOATS, Tensors
from ldm.config import (
    BASE_CONDITIONING,
    PRESETS,
    REFINER_CONDITIONING,
    SD15,
    SDXL_BASE,
    SDXL_REFINER,
    DiffusionConfig,
    ModelConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from ldm.models.int8 import is_plain
from ldm.models.text import TextEncoder, Tokenizer
from ldm.models.unet import UNet
from ldm.models.vae import VAE

Layout = Literal["ldm", "diffusers"]
TOWERS = ("text_encoder", "text_encoder_2")  # names of the parts that hold the text towers
SHOWN = 3  # names of each kind that an error lists
_VARIANTS = {4: "", 8: "-instruct-pix2pix", 9: "-inpainting"}  # by the UNet's in_channels


class Model(NamedTuple):
    """A model in memory. What `load` returns is in evaluation mode, without gradients.

    unused: tensors of its files that no network here computes with, though the official lists have them, such as the
    last block of SD 2's text encoder; by part and name. They are saved again, so that nothing is lost.
    """

    config: ModelConfig
    unet: UNet
    vae: VAE
    text_encoder: TextEncoder
    unused: Mapping[str, Tensor] = {}
    why: str = ""  # the reason for the architecture and the prediction type, and what else a user should know


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


def is_constant(name: str) -> bool:
    """Whether a tensor holds nothing learnt, and is not read."""
    return name.endswith("position_ids")


@dataclass(frozen=True)
class Part:
    """One network's tensors: in which files, by which rules, behind which prefix.

    ignored: whether a name may be in the files without being used. ema: read the averaged copy that training kept
    beside a UNet. unused: names behind the prefix that the network has no use for, though official files have them.
    """

    tensors: Tensors
    rules: tuple[Rule, ...]
    prefix: str = ""
    ignored: Callable[[str], bool] = is_constant
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
    """A model on disk, or some parts of one, understood from headers and configs but not read."""

    config: ModelConfig  # of parts that are absent it says what the family has
    layout: Layout
    why: str  # the reason for the architecture and the prediction type
    parts: Mapping[str, Part]  # unet, vae, and those of TOWERS that there are
    tokenizers: Callable[[], list[Tokenizer]]  # builds one per tower, which imports transformers
    notes: tuple[str, ...] = ()  # what a user should know, a sentence each
    kept: Tensors | None = None  # what `Model.unused` is, in a file of its own
    dropped: tuple[Part, ...] = ()  # parts in the same files that others replace


def modules(unet: UNet, vae: VAE, text_encoder: TextEncoder) -> dict[str, nn.Module]:
    """Return the networks by the names of their parts."""
    towers = dict(zip(TOWERS, text_encoder.towers, strict=False))
    return {"unet": unet, "vae": vae, **towers}


def ema_name(name: str) -> str:
    """Return where LDM keeps the average of a UNet's tensor: its dots are lost, so this has no inverse."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def recognise(
    unet: UNetConfig, vae: VAEConfig, text: tuple[TextConfig, ...], diffusion: DiffusionConfig
) -> ModelConfig:
    """Complete an architecture with the name, image size, guidance and steps of the preset it equals, if any.

    Raises ValueError for a UNet that wants scalars beside the pooled text that no SDXL model has.
    """

    def plain(config: UNetConfig) -> UNetConfig:
        return dataclasses.replace(config, in_channels=4, upcast_attention=False)

    own = {"unet": unet, "vae": vae, "text": text, "diffusion": diffusion}
    same = [
        p for p in PRESETS.values() if (plain(p.unet), p.vae, p.text) == (plain(unet), vae, text)
    ]
    same.sort(
        key=lambda preset: (
            preset.diffusion.prediction != diffusion.prediction,
            preset.diffusion != diffusion,
        )
    )
    if same and unet.in_channels in _VARIANTS:
        name = same[0].name + _VARIANTS[unet.in_channels]
        return dataclasses.replace(same[0], name=name, **own)  # type: ignore[arg-type]
    return dataclasses.replace(_relative(unet, text), name="custom", **own)  # type: ignore[arg-type]


class Mismatch(NamedTuple):
    """How the tensors of one part differ from what its network wants; part: "" for tensors that are of no part."""

    part: str
    tensors: Tensors
    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()  # with both shapes


def compare(
    networks: Mapping[str, nn.Module], parts: Mapping[str, Part], dropped: Sequence[Part] = ()
) -> list[Mismatch]:
    """Compare names and shapes of `networks`, on the meta device, with the files of their `parts`, reading no data.

    dropped: parts that may be in the same files without being used. Returns what differs, nothing where all fits.
    """
    unused = {part.tensors: set(part.tensors.shapes) for part in parts.values()}
    for part in parts.values():
        unused[part.tensors] -= {n for n in unused[part.tensors] if part.ignored(n)}
        unused[part.tensors] -= set(part.unused)
    for part in dropped:
        if part.tensors in unused:
            unused[part.tensors] -= {n for n in unused[part.tensors] if n.startswith(part.prefix)}
    found = []
    for name, part in parts.items():
        shapes, state = part.tensors.shapes, networks[name].state_dict()
        stored = part.stored(list(state))
        wanted = inverse(stored)
        unused[part.tensors] -= wanted.keys()
        unknown = sorted(
            n for n in unused[part.tensors] if part.prefix and n.startswith(part.prefix)
        )
        unused[part.tensors] -= set(unknown)
        misshapen = [
            f"{n} {list(shapes[n])} instead of {_shape(keys, stored, state)}"
            for n, keys in wanted.items()
            if n in shapes and not _fits(shapes[n], keys, stored, state)
        ]
        missing = [n for n in wanted if n not in shapes]
        found.append(Mismatch(name, part.tensors, tuple(missing), tuple(unknown), tuple(misshapen)))
    for tensors, names in unused.items():
        of = [name for name, part in parts.items() if part.tensors is tensors]
        if len(of) == 1:  # it is alone in its file, so they are its own
            own = next(m for m in found if m.part == of[0])
            found[found.index(own)] = own._replace(unknown=(*own.unknown, *sorted(names)))
        else:
            found.append(Mismatch("", tensors, unknown=tuple(sorted(names))))
    return [m for m in found if m.missing or m.unknown or m.misshapen]


def check(
    networks: Mapping[str, nn.Module], parts: Mapping[str, Part], dropped: Sequence[Part] = ()
) -> None:
    """Raise ValueError for the first part that `compare` finds to differ, with names, and the preset that would fit."""
    for part, tensors, missing, unknown, misshapen in compare(networks, parts, dropped):
        if not part:
            raise ValueError(
                f"{tensors} holds {len(unknown)} tensors that this model has no use for: {some(unknown)}"
            )
        kinds = (("missing", missing), ("unknown", unknown), ("of another shape", misshapen))
        found = [f"{len(names)} {what}: {some(names)}" for what, names in kinds if names]
        preset = _fitting_unet(parts[part]) if part == "unet" else None
        raise ValueError(
            f"the {part} in {tensors} does not match its configuration ({'; '.join(found)})"
            + (f"; they fit the preset {preset}" if preset else "")
        )


def fill(module: nn.Module, part: Part, *, dtype: torch.dtype | None, device: torch.device) -> None:
    """Give `module`, on the meta device, its tensors from `part` in `dtype` on `device`; it then evaluates, frozen.

    dtype: None keeps what each tensor has. What needs no cast and no move stays memory-mapped and is not read yet;
    the rest is read one tensor at a time.
    Raises ValueError naming a tensor that is not stored as floating-point numbers, or was read and holds NaN, infinity
    or more than `dtype` can.
    """
    wanted = module.state_dict()
    stored = part.stored(list(wanted))
    values: dict[str, Tensor] = {}
    keys_of = inverse(stored)
    for name in keys_of:
        if (held := part.tensors.dtypes[name]) not in FLOATS:
            raise ValueError(
                f"{name} in {part.tensors} is stored as {held}, weights are {', '.join(FLOATS)}: use another file"
            )
    as_it_is = {
        name
        for name in keys_of
        if device.type == "cpu" and _has_dtype(part.tensors.dtypes[name], dtype)
    }
    for mapped, names in ((True, as_it_is), (False, keys_of.keys() - as_it_is)):
        for name, value in part.tensors.read(names, mapped=mapped):
            if not mapped:
                value = _checked(f"{name} in {part.tensors}", value, dtype or value.dtype)
            pieces = value.chunk(len(keys_of[name]))
            for key, piece in zip(keys_of[name], pieces, strict=True):
                restored = stored[key].form.restore(piece, wanted[key].shape)
                values[key] = restored.to(device=device, dtype=dtype or value.dtype)
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


def micro_conditioning(unet: UNetConfig, text: Sequence[TextConfig]) -> tuple[str, ...]:
    """Return the scalars that make up the UNet's vector beside the pooled text, 256 numbers each.

    Raises ValueError for a number of them that no SDXL model has.
    """
    if unet.vector_dim is None:
        return ()
    pooled = next((t.projection for t in reversed(text) if t.projection), 0)
    for scalars in (BASE_CONDITIONING, REFINER_CONDITIONING):
        if unet.vector_dim == pooled + 256 * len(scalars):
            return scalars
    raise ValueError(
        f"the unet wants a vector of {unet.vector_dim} beside a pooled text of {pooled}; known are pooled text and 256 "
        "for each of 6 scalars (SDXL base) or 5 (refiner)"
    )


def _relative(unet: UNetConfig, text: Sequence[TextConfig]) -> ModelConfig:
    """The preset whose image size and habits suit a UNet that no preset has."""
    scalars = micro_conditioning(unet, text)
    return next((p for p in (SDXL_BASE, SDXL_REFINER) if p.micro_conditioning == scalars), SD15)


def _has_dtype(name: str, dtype: torch.dtype | None) -> bool:
    """Whether a tensor that a file calls `name` needs no cast to `dtype`."""
    return dtype is None or DTYPES.get(name) == dtype


def _checked(what: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of `value` in `dtype`. Raises ValueError if it holds what `dtype` has no finite number for.

    It goes a part at a time through fp32 (a cast to bf16 is faster so) and the processor's cache.
    """
    out = torch.empty(value.shape, dtype=dtype)
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    buffer = torch.empty(2**20, dtype=wide)
    sources, targets = (torch.split(tensor.flatten(), 2**20) for tensor in (value, out))
    for source, target in zip(sources, targets, strict=True):
        if not len(source):
            continue
        part = buffer[: len(source)].copy_(source)
        largest = torch.stack(part.aminmax()).abs().max().item()  # NaN spreads
        if not math.isfinite(largest):
            raise ValueError(
                f"{what} holds NaN or infinity: the file is damaged (a merge gone wrong?), use another"
            )
        if largest > torch.finfo(dtype).max:
            name = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"{what} holds {largest:.3g}, too large for {name}: take another dtype"
            )
        target.copy_(part)
    return out


def _fits(
    shape: tuple[int, ...],
    keys: Sequence[str],
    stored: Mapping[str, Stored],
    state: Mapping[str, Tensor],
) -> bool:
    """Whether a stored tensor of that shape can be restored to our `keys`, its pieces."""
    if not shape or shape[0] % len(keys):
        return len(keys) == 1 and _restores(shape, stored[keys[0]].form, state[keys[0]].shape)
    piece = (shape[0] // len(keys), *shape[1:])
    return all(_restores(piece, stored[key].form, state[key].shape) for key in keys)


def _restores(shape: tuple[int, ...], form: Form, wanted: Size) -> bool:
    return form.restore(torch.empty(shape, device="meta"), wanted).shape == wanted


def _shape(
    keys: Sequence[str], stored: Mapping[str, Stored], state: Mapping[str, Tensor]
) -> list[int]:
    """The shape in which our `keys` are stored together."""
    first = stored[keys[0]].form.store(torch.empty(state[keys[0]].shape, device="meta")).shape
    return [first[0] * len(keys), *first[1:]] if first else []


def _fitting_unet(part: Part) -> str | None:
    """The first preset whose UNet has exactly the names and shapes behind the part's prefix."""
    found = part.tensors.shapes.items()
    shapes = {n.removeprefix(part.prefix): s for n, s in found if n.startswith(part.prefix)}
    names_of = ldm_unet if "out.2.weight" in shapes else diffusers_unet
    return next((name for name in PRESETS if _shapes_of(name, names_of) == shapes), None)


@cache
def _shapes_of(
    preset: str, names_of: Callable[[UNetConfig], tuple[Rule, ...]]
) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a preset's UNet."""
    config = PRESETS[preset].unet
    with torch.device("meta"):
        stored = collect(UNet(config), names_of(config))
    return {name: tuple(value.shape) for name, value in stored.items()}


def some(names: Sequence[str]) -> str:
    """Return the first few of `names` as a list in a sentence."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
