"""Writing LoRA files, under the names of kohya's scripts with the modules of diffusers, which all programs read."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.atomic import beside
from ldm.checkpoint import tables
from ldm.checkpoint.loras import Target, stored_name
from ldm.checkpoint.parts import TOWERS, cast
from ldm.checkpoint.tensors import write_tensors
from ldm.config import UNetConfig
from ldm.models.lora import Change

_NAMES = {"up": "lora_up.weight", "down": "lora_down.weight", "diff": "diff", "diff_b": "diff_b"}


def save_lora(
    path: str | Path,
    changes: Mapping[Target, Change],
    config: UNetConfig,
    *,
    towers: int,
    dtype: torch.dtype,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA as one .safetensors file, through a temporary one.

    changes: with factors "up" and "down", or "diff"; and "diff_b". config: of the UNet. towers: how many text towers
    the model has, which the names tell.
    Raises ValueError for a path that exists, unless `overwrite`, or does not end in .safetensors, and for a factor that
    is not finite in `dtype`.
    """
    check_lora_path(path, overwrite=overwrite)
    tensors = {}
    for target, change in changes.items():
        above = kohya_name(target, config, towers)
        for role, value in change.factors.items():
            name = f"{above}.{_NAMES[role]}"
            tensors[name] = cast(name, value.contiguous(), dtype)
        if "down" in change.factors:  # alpha stays in fp32, where it is exact
            tensors[f"{above}.alpha"] = torch.tensor(change.scale * len(change.factors["down"]))
    path = Path(path).resolve()
    with beside(path) as new:
        write_tensors(tensors, new, {"format": "pt", **(metadata or {})})
        check_lora_path(path, overwrite=overwrite)
        new.replace(path)


def check_lora_path(path: str | Path, *, overwrite: bool) -> None:
    """Raise ValueError for a path that exists, unless `overwrite`, and for one that does not end in .safetensors."""
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"a LoRA is one file, whose name ends in .safetensors, got {path}: give such a name")
    if Path(path).is_dir() or (Path(path).exists() and not overwrite):
        raise ValueError(f"{path} exists already: give another path, or overwrite=True (--overwrite)")


def kohya_name(target: Target, config: UNetConfig, towers: int) -> str:
    """Return the name of a layer in the files of kohya's scripts, with the module names of diffusers."""
    if target.part == "unet":
        return f"lora_unet_{stored_name(target, tables.diffusers_unet(config)).replace('.', '_')}"
    number = TOWERS.index(target.part) + 1 if towers > 1 else ""
    return f"lora_te{number}_{stored_name(target, tables.hf_text()).replace('.', '_')}"


def as_stored(up: Tensor, down: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the matrices up: o r and down: r i in the shapes of a layer's factors, whose weight has this `shape`."""
    ones = [1] * (len(shape) - 2)
    return {"up": up.reshape(*up.shape, *ones), "down": down.reshape(len(down), *shape[1:])}
