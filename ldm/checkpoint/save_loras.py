"""Write a LoRA for the tools that others use: as one file of kohya's scripts, or as a folder of diffusers.

    kohya      lora_unet_<name>.lora_down.weight, .lora_up.weight, .alpha and .dora_scale; "_" for "." in the name
    diffusers  unet.<name>.lora_A.weight, .lora_B.weight and .lora_magnitude_vector; alpha is in the metadata

Both take the names of layers from diffusers.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.atomic import beside
from ldm.checkpoint import tables
from ldm.checkpoint.loras import DIFFUSERS_METADATA, Target, stored_name
from ldm.checkpoint.parts import TOWERS, cast
from ldm.checkpoint.tensors import write_tensors
from ldm.config import UNetConfig
from ldm.models.lora import Change, rank

LoraLayout = Literal["kohya", "diffusers"]
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

_KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight", "diff": "diff", "diff_b": "diff_b"}


def diffusers_name(target: Target, config: UNetConfig) -> str:
    """Return the name of a layer in diffusers' UNet, or in transformers' text encoder."""
    rules = tables.diffusers_unet(config) if target.part == "unet" else tables.hf_text()
    return stored_name(target, rules)


def save_lora(
    path: Path,
    changes: Mapping[Target, Change],
    config: UNetConfig,
    *,
    layout: LoraLayout = "kohya",
    towers: int = 1,
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] = {},
) -> None:
    """Write the changes of a model to `path`: a .safetensors file of kohya, or a folder of diffusers.

    changes: of the kinds LoRA and DoRA, for kohya's layout also whole differences. config: of the UNet. towers: how
    many text encoders the model has. metadata: more entries for the file, such as those of `ldm.checkpoint.sampling`.
    Raises ValueError for a factor that is not finite in `dtype`.
    """
    names = {target: diffusers_name(target, config) for target in changes}
    write = _kohya if layout == "kohya" else _diffusers
    tensors, own = write(changes, names, towers)
    held = {name: cast(name, v.detach().cpu(), dtype) if v.dim() else v for name, v in tensors.items()}
    file = path if layout == "kohya" else path / DIFFUSERS_FILE
    with beside(file) as new:
        write_tensors(held, new, {**own, **metadata})
        new.replace(file)


def _kohya(
    changes: Mapping[Target, Change], names: Mapping[Target, str], towers: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    prefixes = {part: f"lora_te{i + 1 if towers > 1 else ''}" for i, part in enumerate(TOWERS)} | {"unet": "lora_unet"}
    tensors: dict[str, Tensor] = {}
    for target, change in changes.items():
        name, factors = f"{prefixes[target.part]}_{names[target].replace('.', '_')}", change.factors
        tensors |= {f"{name}.{theirs}": factors[ours] for ours, theirs in _KOHYA.items() if ours in factors}
        if "down" in factors:
            tensors[f"{name}.alpha"] = torch.tensor(_alpha(change))
        if "size" in factors:
            tensors[f"{name}.dora_scale"] = _per_output(factors["size"], factors["down"])
    ranked = [(rank(change.factors), _alpha(change)) for change in changes.values() if "down" in change.factors]
    ranks = {"ss_network_dim": str(ranked[0][0]), "ss_network_alpha": str(ranked[0][1])} if ranked else {}
    return tensors, {"ss_network_module": "networks.lora"} | ranks


def _diffusers(
    changes: Mapping[Target, Change], names: Mapping[Target, str], towers: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for part in dict.fromkeys(target.part for target in changes):
        own = {names[t].removeprefix("text_model."): change for t, change in changes.items() if t.part == part}
        ranks, alphas = ({n: value(c) for n, c in own.items()} for value in (lambda c: rank(c.factors), _alpha))
        (common_rank, _), *_ = Counter(ranks.values()).most_common()
        (common_alpha, _), *_ = Counter(alphas.values()).most_common()
        table: dict[str, Any] = {
            "peft_type": "LORA",
            "r": common_rank,
            "lora_alpha": common_alpha,
            "rank_pattern": {n: value for n, value in ranks.items() if value != common_rank},
            "alpha_pattern": {n: value for n, value in alphas.items() if value != common_alpha},
            "target_modules": sorted(own),
            "use_dora": any("size" in change.factors for change in own.values()),
        }
        config |= {f"{part}.{key}": value for key, value in table.items()}
    for target, change in changes.items():
        name, factors = f"{target.part}.{names[target]}", change.factors
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = factors["down"], factors["up"]
        if "size" in factors:
            size = _per_output(factors["size"], factors["down"])
            tensors[f"{name}.lora_magnitude_vector"] = size.transpose(0, 1) if size.dim() > 2 else size.flatten()
    return tensors, {DIFFUSERS_METADATA: json.dumps(config), "format": "pt"}


def _alpha(change: Change) -> float:
    return change.scale * (rank(change.factors) or 1)


def _per_output(size: Tensor, down: Tensor) -> Tensor:
    """Return the norms per output as LyCORIS has them: o 1, or o 1 1 1 for a convolution."""
    return size.reshape(-1, *[1] * (down.dim() - 1))
