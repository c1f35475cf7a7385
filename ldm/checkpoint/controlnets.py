"""ControlNets on disk: single files of their authors' and diffusers' names, and diffusers' folders."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ldm.atomic import beside, replace_folder
from ldm.checkpoint import configs, identify, tables
from ldm.checkpoint.configs import Json
from ldm.checkpoint.folder import NETWORK, config_of, tensors_of, write_network
from ldm.checkpoint.identify import IGNORED, Place
from ldm.checkpoint.known import NAMES, kind_of
from ldm.checkpoint.parts import Part, check, collect, fill
from ldm.checkpoint.tensors import TensorFiles, Tensors, some
from ldm.config import UNetConfig
from ldm.models.controlnet import HINT_CHANNELS, ControlNet, check_fits
from ldm.models.unet import UNet

MARKER = "difference"  # of files that hold a ControlNet minus the UNet that it was trained with
_SHUFFLE = re.compile(r"[_-]shuffle([_-]?fp16)?$")  # file names of the ControlNet with pooled outputs
_FOLDER_FIXED: dict[str, tuple[Any, ...]] = {
    "conditioning_channels": (3,),
    "controlnet_conditioning_channel_order": ("rgb",),
    "global_pool_conditions": (False, True),
}
_UNET_ONLY = ("sample_size", "out_channels", "up_block_types", "reverse_transformer_layers_per_block")


class Identified(NamedTuple):
    """A ControlNet on disk, identified and checked, whose tensors are not read yet."""

    network: ControlNet  # on the meta device
    part: Part
    kind: str  # such as "a ControlNet for Stable Diffusion 1.x"
    why: str

    @property
    def is_difference(self) -> bool:
        """Whether the weights of the UNet must be added."""
        return MARKER in self.part.tensors.shapes


def identify_controlnet(path: str | Path) -> Identified:
    """Identify the ControlNet at `path` from headers and configs, and check that its tensors fit.

    path: a .safetensors file with the ControlNet alone or inside a whole checkpoint, or a folder of diffusers.
    Raises ValueError for anything else, naming it, and for tensors that are missing, unknown or of another shape.
    """
    path = Path(path)
    config, hints, pooled, part, why = _from_folder(path) if path.is_dir() else _from_file(TensorFiles([path]))
    try:
        with torch.device("meta"):
            network = ControlNet(config, hint_channels=hints, pooled=pooled)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no ControlNet: {' '.join(str(error).split())[:200]}") from error
    left = check({"controlnet": network}, {"controlnet": part})
    if strange := [n for n in left if n.startswith(part.prefix) and n != MARKER and not IGNORED.fullmatch(n)]:
        raise ValueError(f"{part.tensors} holds {len(strange)} tensors that no ControlNet here has: {some(strange)}")
    family = NAMES.get(config.context_dim)
    return Identified(network, part, f"a ControlNet{f' for {family}' if family else ''}", why)


def load_controlnet(
    path: str | Path,
    *,
    unet: UNet | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> ControlNet:
    """Load the ControlNet at `path`. dtype: None keeps the stored one.

    unet: the UNet to use it with. A file with the marker "difference" needs it: the weights of its encoder are added.
    Raises ValueError as `identify_controlnet` does, for a ControlNet that does not fit `unet`, and for a "difference"
    without `unet`.
    """
    network, part, *_ = found = identify_controlnet(path)
    if unet is not None:
        try:
            check_fits(network, unet)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    elif found.is_difference:
        raise ValueError(f"{path} holds the difference between a ControlNet and a UNet: give the UNet to add it to")
    fill(network, part, dtype=dtype, device=torch.device(device))
    if unet is not None and found.is_difference:
        _add(network, unet, path)
    return network


def save_controlnet(network: ControlNet, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Save a ControlNet as a folder for `load_controlnet` and for diffusers. A ControlNet at `path` is replaced.

    Raises ValueError if `path` is anything else.
    """
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path} is not a folder of a ControlNet, so it is not overwritten: give another path")
    path = Path(path).resolve()
    rules = tables.diffusers_controlnet(network.config, len(network.hint))
    with beside(path) as new:
        new.mkdir(exist_ok=True)
        write_network(new, NETWORK, _to_json(network), collect(network, rules, dtype=dtype))
        replace_folder(path, new)


def _from_file(tensors: Tensors) -> tuple[UNetConfig, tuple[int, ...], bool, Part, str]:
    """Identify a ControlNet by names and shapes. Returns the arguments of `ControlNet`, the part, and the reason."""
    kind = kind_of(tensors)
    if kind is None or not re.fullmatch(r"a ControlNet( for .*)?", kind):
        what = f"is {kind}" if kind else f"holds no ControlNet, but {some(sorted(tensors.shapes))}"
        raise ValueError(f"{tensors} {what}: give a ControlNet as it was first published")
    identify.check_stored_plainly(tensors)
    prefix = tables.CONTROLNET_PREFIX if any(n.startswith(tables.CONTROLNET_PREFIX) for n in tensors.shapes) else ""
    ldm = f"{prefix}input_hint_block.0.weight" in tensors.shapes
    place = Place(prefix, "ldm" if ldm else "diffusers")
    _, config, _, why = identify.encoder_of(tensors, place)
    stem = "input_hint_block" if ldm else "controlnet_cond_embedding"
    layers = [n for n in tensors.shapes if n.startswith(f"{prefix}{stem}.") and n.endswith(".weight")]
    rules = tables.ldm_controlnet(config) if place.style == "ldm" else tables.diffusers_controlnet(config, len(layers))
    part = Part(tensors, rules, prefix)
    stored = part.stored([f"hint.{i}.weight" for i in range(0, len(layers) - 1, 2)])
    hints = tuple(tensors.shapes.get(at.name, (0,))[0] for at in stored.values())
    pooled = bool(_SHUFFLE.search(tensors.paths[0].stem.lower()))
    if pooled:
        why += "; by its name it is the shuffle ControlNet, whose outputs are averaged over the pixels"
    if MARKER in tensors.shapes:
        why += f"; by its marker {MARKER} it holds the difference to a UNet"
    return config, hints, pooled, part, why


def _from_folder(folder: Path) -> tuple[UNetConfig, tuple[int, ...], bool, Part, str]:
    """Read a folder in diffusers' layout. Returns the arguments of `ControlNet`, the part, and the reason."""
    json, where = config_of(folder)
    if (name := json.get("_class_name")) != "ControlNetModel":
        raise ValueError(f"{where} describes {name or 'nothing'}: allowed is ControlNetModel")
    configs.check_fixed(json, _FOLDER_FIXED, where)
    downs = json.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    ups = [str(block).replace("Down", "Up") for block in reversed(downs)] if isinstance(downs, list) else downs
    config = configs.unet_from_json(json | {"up_block_types": ups}, where)
    hints = json.get("conditioning_embedding_out_channels", list(HINT_CHANNELS))
    if not isinstance(hints, list) or not hints or not all(type(n) is int and 0 < n < 10_000 for n in hints):
        raise ValueError(f"{where}: conditioning_embedding_out_channels must be a list of channels, got {hints}")
    part = Part(tensors_of(folder, NETWORK, pickles=False), tables.diffusers_controlnet(config, 2 * len(hints)))
    return config, tuple(hints), bool(json.get("global_pool_conditions")), part, f"{where} says so"


def _to_json(network: ControlNet) -> Json:
    json = configs.unet_to_json(network.config, 0)
    kept = {name: value for name, value in json.items() if name not in _UNET_ONLY}
    return kept | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": 3,
        "conditioning_embedding_out_channels": list(network.hint_channels),
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": network.pooled,
    }


@torch.no_grad()
def _add(network: nn.Module, unet: nn.Module, path: str | Path) -> None:
    """Add the weights of `unet` to those of `network` that have the same names."""
    state, own = unet.state_dict(), network.state_dict()
    for name in own.keys() & state.keys():
        if own[name].shape != state[name].shape:
            raise ValueError(
                f"{path} holds the difference to a UNet of {own[name].shape[1]} input channels, the model's has "
                f"{state[name].shape[1]}: use a text-to-image model"
            )
        own[name] = (own[name].float() + state[name].to(own[name].device).float()).to(own[name].dtype)
    network.load_state_dict(own, assign=True)
    network.requires_grad_(False)
