"""Merge whole models, or LoRAs into a model, on disk. Weights are read, computed and written one at a time.

    weighted sum      (1 - w) A + w B
    add difference    A + w (B - C)
    LoRAs             A + w_1 C_1 + w_2 C_2 + ...    as `ldm.lora`

Each is computed in fp32 and rounded once. w can differ between parts of the model; a weight with w = 0 stays bit for
bit. The metadata of the result says what was merged, with the sha256 of each input.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import files
from ldm.checkpoint.blocks import check_blocks, full_name, number_for
from ldm.checkpoint.files import Identity
from ldm.checkpoint.loras import Target
from ldm.checkpoint.parts import TOWERS, modules
from ldm.checkpoint.streaming import Watch, Weights, rewrite
from ldm.checkpoint.tensors import some
from ldm.config import Layout, check_number
from ldm.lora import Applied, Lora, changed, read_loras
from ldm.record import digest

METADATA_KEY = "ldm.merge"  # in the metadata of results
_INPUT = "down.0.conv.weight"  # of the UNet; models for inpainting and editing have more input channels


def merge(
    model: str | Path,
    other: str | Path,
    path: str | Path,
    *,
    minus: str | Path | None = None,
    weight: float = 0.5,
    blocks: Mapping[str, float] = {},
    layout: Layout,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    watch: Watch[tuple[str, str]] = list,
) -> None:
    """Write the weighted sum of `model` (A) and `other` (B), or with `minus` (C) A plus the weighted difference B - C.

    weight: w above, for all parts without a weight in `blocks`. blocks: w by the name of a part: "vae", "text_encoder",
    "text_encoder_2" or a module of the UNet, such as "down" or "up.3". The longest name counts. If A has more input
    channels than B and C, as a model for inpainting has, the further channels stay those of A. What no network computes
    with is that of A, too.
    path, layout, dtype, overwrite: as of `ldm.checkpoint.files.save`; without `dtype` each weight keeps that of A.
    watch: as of `rewrite`. Memory holds at most four times the largest weight in fp32.
    Raises ValueError for models that do not fit together, a `path` that is or holds one of them, and as `save` does.
    """
    for name, number in {"the weight": weight, **blocks}.items():
        check_number(name, number, -1e6, 1e6)
    paths = [Path(each) for each in (model, other, minus) if each is not None]
    check_apart(path, paths)
    files.check_output(path, layout, overwrite=overwrite)
    base, *others = (files.identify(each) for each in paths)
    first, *rest = map(Weights, (base, *others))
    names = [full_name(part, key) for part, keys in first.shapes.items() for key in keys]
    check_blocks(blocks, names, "there is a weight")
    for each, weights, where in zip(others, rest, paths[1:], strict=True):
        check_alike(base, first, each, weights, f"{where} and {paths[0]}")

    def change(part: str, key: str, old: Tensor) -> Tensor:
        w = number_for(blocks, full_name(part, key), weight)
        if w == 0:
            return old
        new = old.to(torch.promote_types(old.dtype, torch.float32), copy=True)
        added = rest[0].read(part, key)
        shared = new[:, : added.shape[1]] if key == _INPUT and part == "unet" else new
        if len(rest) == 2:
            shared.add_(added.to(new.dtype).sub_(rest[1].read(part, key)), alpha=w)
        else:
            shared.mul_(1 - w).add_(added, alpha=w)
        return new

    made = {"formula": "A + w (B - C)" if minus else "(1 - w) A + w B", "weight": weight, "blocks": dict(blocks)}
    metadata = metadata_of(made, dict(zip("ABC", paths, strict=False)))
    rewrite(base, path, change, layout=layout, dtype=dtype, overwrite=overwrite, metadata=metadata, watch=watch)


def merge_into(
    model: str | Path,
    loras: Sequence[str | Path | Lora],
    path: str | Path,
    *,
    layout: Layout,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    watch: Watch[tuple[str, str]] = list,
) -> tuple[Applied, ...]:
    """Write `model` with `loras` merged into its weights, which are those of `ldm.load(model, loras=loras)`.

    path, layout, dtype, overwrite: as of `ldm.checkpoint.files.save`; without `dtype` each weight keeps its own.
    Returns what was applied. A model has no place for learned words, which are left out.
    Raises ValueError as `ldm.lora.read_loras` and `save` do, and for a `path` that is or holds one of the inputs.
    """
    words = [Lora.parse(word) for word in loras]
    inputs = {"A": Path(model)} | {f"C_{i}": Path(lora.path) for i, lora in enumerate(words, 1)}
    check_apart(path, inputs.values())
    files.check_output(path, layout, overwrite=overwrite)
    base = files.identify(model)
    networks = {name: network for name, network in modules(*base.networks).items() if name in ("unet", *TOWERS)}
    applied, changes, _ = read_loras(words, networks, base.config.unet)

    def change(part: str, key: str, old: Tensor) -> Tensor:
        layer, _, name = key.rpartition(".")
        new = changed(name, old.float(), changes.get(Target(part, layer), ()))
        return old if new is None else new

    weights = {f"w_{i}": [lora.weight, dict(lora.blocks)] for i, lora in enumerate(words, 1)}
    metadata = metadata_of({"formula": "A + w_1 C_1 + w_2 C_2 + ...", **weights}, inputs)
    rewrite(base, path, change, layout=layout, dtype=dtype, overwrite=overwrite, metadata=metadata, watch=watch)
    return applied


def metadata_of(made: Mapping[str, Any], inputs: Mapping[str, Path]) -> dict[str, str]:
    """Return the metadata of a result. inputs: by the letter in the formula."""
    read = {letter: {"file": path.name, "sha256": digest(path)} for letter, path in inputs.items()}
    return {METADATA_KEY: json.dumps({**made, **read})}


def check_apart(path: str | Path, inputs: Any) -> None:
    """Raise ValueError if `path` is one of the inputs or a folder around one, which would be overwritten."""
    target = Path(path).resolve()
    for each in inputs:
        same = target.exists() and each.exists() and os.path.samefile(target, each)
        if same or target in (each.resolve(), *each.resolve().parents):
            raise ValueError(f"{path} is or holds the input {each}, which is never overwritten: give another output")


def check_alike(
    base: Identity, ours: Weights, other: Identity, theirs: Weights, who: str, *, same_inputs: bool = False
) -> None:
    """Raise ValueError for two models whose weights cannot be combined.

    same_inputs: whether `other` must have as many input channels as `base`, and not fewer.
    """
    for part, shapes in ours.shapes.items():
        found = theirs.shapes.get(part, {})
        both = {key: (shape, found.get(key)) for key, shape in shapes.items()} | {
            key: (None, shape) for key, shape in found.items() if key not in shapes
        }
        unequal = [key for key, (a, b) in both.items() if a != b]
        differ = [key for key in unequal if same_inputs or not _narrower(part, key, *both[key])]
        if differ:
            raise ValueError(
                f"{who} differ in the architecture of the {part} ({other.preset} and {base.preset}: {some(differ)}): "
                "merge models of one family"
            )
    if other.prediction != base.prediction:
        raise ValueError(
            f"{who} predict {other.prediction} and {base.prediction}: merge models that predict the same; "
            "`ldm convert --prediction` corrects a file that says the wrong one"
        )


def _narrower(part: str, key: str, ours: Any, theirs: Any) -> bool:
    """Return whether the UNet's first weight has only fewer input channels than ours."""
    known = part == "unet" and key == _INPUT and ours is not None and theirs is not None
    return known and ours[0] == theirs[0] and ours[2:] == theirs[2:] and theirs[1] < ours[1]
