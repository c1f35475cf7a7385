"""The parts of a model on disk: where each network's tensors are, and how modules are strictly filled with them."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Size, Tensor, nn

from ldm.checkpoint import tables
from ldm.checkpoint.keymap import Form, Rule, inverse, key_map
from ldm.checkpoint.tensors import TensorFiles
from ldm.config import PRESETS, DiffusionConfig, ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.models.text import TextEncoder, TextTower, Tokenizer
from ldm.models.unet import UNet
from ldm.models.vae import VAE

Layout = Literal["ldm", "diffusers"]
SHOWN = 3  # names of each kind that an error lists
_VARIANTS = {4: "", 8: "-instruct-pix2pix", 9: "-inpainting"}  # by the UNet's in_channels


class Model(NamedTuple):
    """A model in memory. What `load` returns is in evaluation mode, without gradients."""

    config: ModelConfig
    unet: UNet
    vae: VAE
    text_encoder: TextEncoder


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


class Part(NamedTuple):
    """One network's tensors: in which files, by which rules, behind which prefix."""

    tensors: TensorFiles
    rules: tuple[Rule, ...]
    prefix: str = ""


@dataclass(frozen=True)
class Source:
    """A model on disk, understood from headers and configs but not read."""

    config: ModelConfig
    layout: Layout
    why: str  # the reason for the architecture and the prediction type
    parts: Mapping[str, Part]  # unet, vae, text_encoder
    ignored: Callable[[str], bool]  # whether a name may be in the files without being used
    tokenizer: Callable[[], Tokenizer]  # builds it, which imports transformers


def tokenizer_of(model: ModelLike) -> Tokenizer:
    """Return the tokenizer of a model with one text tower."""
    (tower,) = model.text_encoder.towers
    assert isinstance(tower, TextTower)
    return tower.tokenizer


def recognise(
    unet: UNetConfig, vae: VAEConfig, text: tuple[TextConfig, ...], diffusion: DiffusionConfig
) -> ModelConfig:
    """Complete an architecture with the name, image size and guidance of the preset it equals, if any."""
    plain = dataclasses.replace(unet, in_channels=4)
    same = [p for p in PRESETS.values() if (p.unet, p.vae, p.text) == (plain, vae, text)]
    same.sort(
        key=lambda preset: (
            preset.diffusion.prediction != diffusion.prediction,
            preset.diffusion != diffusion,
        )
    )
    if not same or unet.in_channels not in _VARIANTS:
        return ModelConfig(unet=unet, vae=vae, text=text, diffusion=diffusion)
    name = same[0].name + _VARIANTS[unet.in_channels]
    return dataclasses.replace(same[0], name=name, unet=unet, diffusion=diffusion)


def check(
    modules: Mapping[str, nn.Module],
    parts: Mapping[str, Part],
    *,
    layout: Layout,
    ignored: Callable[[str], bool],
) -> None:
    """Compare names and shapes of `modules`, on the meta device, with the files of their `parts`, reading no data.

    Raises ValueError listing what is missing, unknown or of another shape, and the preset that would fit.
    """
    unused = {
        tensors: {name for name in tensors.shapes if not ignored(name)}
        for tensors in {part.tensors for part in parts.values()}
    }
    for name, part in parts.items():
        shapes, state = part.tensors.shapes, modules[name].state_dict()
        wanted = {
            stored: (form, state[key].shape)
            for key, (stored, form) in key_map(state, part.rules, part.prefix).items()
        }
        unused[part.tensors] -= wanted.keys()
        problems = {
            "missing": [n for n in wanted if n not in shapes],
            "unknown": sorted(n for n in unused[part.tensors] if n.startswith(part.prefix)),
            "of another shape": [
                f"{n} {list(shapes[n])} instead of {list(shape)}"
                for n, (form, shape) in wanted.items()
                if n in shapes and not _fits(shapes[n], form, shape)
            ],
        }
        found = [
            f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names
        ]
        if found:
            preset = _fitting_unet(part, layout) if name == "unet" else None
            raise ValueError(
                f"the {name} in {part.tensors} does not match its configuration ({'; '.join(found)})"
                + (f"; they fit the preset {preset}" if preset else "")
            )
    for tensors, names in unused.items():
        if names:
            raise ValueError(
                f"{tensors} holds tensors that this model has no use for: {_some(sorted(names))}"
            )


def fill(module: nn.Module, part: Part, *, dtype: torch.dtype, device: torch.device) -> None:
    """Give `module`, on the meta device, its tensors from `part` in `dtype` on `device`; it then evaluates, frozen.

    What needs no cast and no move stays memory-mapped.
    """
    wanted = module.state_dict()
    stored = key_map(wanted, part.rules, part.prefix)
    keys = inverse(stored)
    values: dict[str, Tensor] = {}
    for name, value in part.tensors.read(keys):
        key = keys[name]
        value = stored[key].form.restore(value, wanted[key].shape)
        values[key] = value.to(device=device, dtype=dtype)
    module.load_state_dict(values, strict=True, assign=True)
    module.to(device).eval().requires_grad_(False)  # `to`: buffers that no file holds


def collect(
    module: nn.Module, rules: tuple[Rule, ...], prefix: str = "", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the module's tensors under their stored names and in their stored forms, in `dtype` if given."""
    state = module.state_dict()
    return {
        name: form.store(state[key]).to(dtype=dtype or state[key].dtype).contiguous()
        for key, (name, form) in key_map(state, rules, prefix).items()
    }


def _fits(stored: tuple[int, ...], form: Form, shape: Size) -> bool:
    return form.restore(torch.empty(stored, device="meta"), shape).shape == shape


def _fitting_unet(part: Part, layout: Layout) -> str | None:
    """The first preset whose UNet has exactly the names and shapes behind the part's prefix."""
    rules = {"ldm": tables.ldm_unet, "diffusers": tables.diffusers_unet}[layout]
    shapes = {
        name: shape for name, shape in part.tensors.shapes.items() if name.startswith(part.prefix)
    }
    for preset in PRESETS.values():
        with torch.device("meta"):
            unet = UNet(preset.unet)
        stored = collect(unet, rules(preset.unet), part.prefix)
        if {name: tuple(value.shape) for name, value in stored.items()} == shapes:
            return preset.name
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
