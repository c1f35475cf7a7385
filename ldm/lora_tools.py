"""Make LoRA files from others: merge several into one, extract one from two models, and change ranks.

    merge     w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2 + ... = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]    exact
    extract   W_tuned - W_base, cut to a low rank as `ldm.models.low_rank` says
    resize    s B A, or another change, cut to another rank

The names of layers come from the model that a LoRA is for. Its family is found by the width of the text that the LoRA
attends to; a custom model has to be given.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.checkpoint import files
from ldm.checkpoint.loras import Target, context_width, layers_of, read_lora, weight_shape
from ldm.checkpoint.parts import TOWERS, modules
from ldm.checkpoint.sampling import kept
from ldm.checkpoint.save_loras import save_lora
from ldm.checkpoint.streaming import Watch, Weights
from ldm.checkpoint.tensors import some
from ldm.config import UNetConfig
from ldm.lora import Applied, Lora, read_loras
from ldm.merging import check_alike, check_apart, metadata_of
from ldm.models.lora import Change, kind
from ldm.models.low_rank import Cut, Cutter
from ldm.models.text import TextEncoder
from ldm.models.tokens import Tokenizer
from ldm.models.unet import UNet
from ldm.presets import FAMILIES

_BETWEEN = {"res", "res_in", "res_out", "downsample", "upsample"}  # modules of the UNet beside the transformers


class Base(NamedTuple):
    """The model that a LoRA is for. networks: the UNet and the text towers, on the meta device."""

    name: str
    config: UNetConfig
    networks: Mapping[str, nn.Module]

    @classmethod
    def of(cls, model: files.Identity) -> "Base":
        """Return the base of an identified model."""
        found = modules(*model.networks)
        return cls(model.preset, model.config.unet, {name: found[name] for name in ("unet", *TOWERS) if name in found})

    @classmethod
    def find(cls, lora: str | Path, model: str | Path | None = None) -> "Base":
        """Return `model`, or the family of the LoRA. Raises ValueError for a LoRA whose layers do not tell."""
        if model is not None:
            return cls.of(files.identify(model))
        width = context_width(lora)
        config = next((family for family in FAMILIES if family.unet.context_dim == width), None)
        if config is None:
            tells = "no layer tells its family" if width is None else f"no known family has text {width} wide"
            raise ValueError(f"{lora}: {tells}: give the model that it is for with --model")
        with torch.device("meta"):
            encoder = TextEncoder(config.text, [Tokenizer.official()] * len(config.text))
            networks = {"unet": UNet(config.unet), **dict(zip(TOWERS, encoder.towers, strict=False))}
        return cls(config.name, config.unet, networks)

    def save(
        self, path: str | Path, changes: Mapping[Target, Change], dtype: torch.dtype, metadata: Mapping[str, str]
    ) -> None:
        """Write a LoRA for this model, as one file of kohya's names."""
        towers = len(self.networks) - 1
        save_lora(Path(path), changes, self.config, towers=towers, dtype=dtype, metadata=metadata)


class Written(NamedTuple):
    """What was written. energy: the share of the squared singular values that stays; None if all stay."""

    path: Path
    modules: int
    ranks: tuple[int, ...]  # of the modules that have a rank
    energy: float | None
    left_out: tuple[str, ...] = ()  # names of what the file does not hold

    @classmethod
    def of(
        cls, path: str | Path, changes: Mapping[Target, Change], energy: float | None, left_out: tuple[str, ...]
    ) -> "Written":
        """Describe a file with these changes."""
        ranks = tuple(len(change.factors["down"]) for change in changes.values() if "down" in change.factors)
        return cls(Path(path), len(changes), ranks, energy, left_out)

    def __str__(self) -> str:
        text = f"{self.path}: {self.modules} modules"
        if self.ranks:
            low, high = min(self.ranks), max(self.ranks)
            text += f" of rank {low}" if low == high else f" of ranks {low} to {high}"
        if self.energy is not None:
            text += f", with {100 * self.energy:.2f} % of the energy"
        return f"{text}; left out {len(self.left_out)}: {some(self.left_out)}" if self.left_out else text


def merge_loras(
    loras: Sequence[str | Path | Lora],
    path: str | Path,
    *,
    model: str | Path | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> tuple[Written, tuple[Applied, ...]]:
    """Write the weighted sum of LoRAs as one LoRA, whose rank is the sum of theirs.

    loras: FILE, FILE:WEIGHT or `Lora`. dtype: of the factors (default: the widest of the inputs). Learned words, and
    layers that the model lacks, are left out. Settings of sampling, as an LCM-LoRA has them, stay.
    Raises ValueError for kinds that are no product of two matrices, and for a `path` that exists or is an input. Raises
    it as `read_loras` and `save_lora` do, too.
    """
    words = [Lora.parse(word) for word in loras]
    inputs = {f"C_{i}": Path(lora.path) for i, lora in enumerate(words, 1)}
    check_apart(path, inputs.values())
    _check_path(path, overwrite=overwrite)
    base = Base.find(words[0].path, model)
    applied, changes, _ = read_loras(words, base.networks, base.config)
    layers = layers_of(base.networks)
    result = {target: _summed(target, parts, weight_shape(layers[target])) for target, parts in changes.items()}
    widest = _dtype_of(change for parts in changes.values() for _, change in parts)
    weights = {f"w_{i}": [lora.weight, dict(lora.blocks)] for i, lora in enumerate(words, 1)}
    metadata = metadata_of({"formula": "w_1 C_1 + w_2 C_2 + ...", **weights}, inputs)
    base.save(path, result, dtype or widest, metadata | kept(lora.path for lora in words if lora.weight))
    left = tuple(name for each in applied for name in (*each.unknown, *each.words))
    return Written.of(path, result, None, left), applied


def _summed(target: Target, parts: list[tuple[float, Change]], shape: tuple[int, ...]) -> Change:
    """Return the weighted sum of the changes of one layer, whose weight has this `shape`."""
    found: dict[str, Tensor] = {}
    pairs = [(weight * change.scale, change.factors) for weight, change in parts if "up" in change.factors]
    kinds = {kind(change.factors) for _, change in parts} - {"LoRA", "LoCon", "difference"}
    kinds |= {"LoCon with a core" for _, factors in pairs if "mid" in factors}
    if kinds:
        raise ValueError(
            f"the change of {target.layer} is of the kind {', '.join(sorted(kinds))}: make it a LoRA with "
            "`ldm lora resize`, or merge it into a model"
        )
    if pairs:
        ups = [factor * factors["up"].float().flatten(1) for factor, factors in pairs]
        downs = [factors["down"].float().flatten(1) for _, factors in pairs]
        found |= _as_stored(torch.cat(ups, dim=1), torch.cat(downs), shape)
    for name in ("diff", "diff_b"):
        differences = [weight * change.factors[name].float() for weight, change in parts if name in change.factors]
        if differences:
            found[name] = torch.stack([each.reshape(differences[0].shape) for each in differences]).sum(dim=0)
    if pairs and "diff" in found:
        raise ValueError(
            f"{target.layer} is changed by a LoRA and by a whole difference: make this a LoRA with `ldm lora resize`"
        )
    return Change(found)


def resize(
    lora: str | Path,
    path: str | Path,
    cut: Cut,
    *,
    model: str | Path | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    watch: Watch[Target] = list,
) -> Written:
    """Write a LoRA with other ranks. Changes of biases and normalizations stay whole.

    LoHa, LoKr, LoCon with a core and whole differences become LoRA. Settings of sampling, as of an LCM-LoRA, stay.
    dtype: of the factors (default: the widest of the input). device: where the singular values are computed. watch:
    wraps the list of the layers.
    Raises ValueError for DoRA, whose change depends on the weights of the model, and for a `path` that exists or is the
    input. Raises it as `read_lora` and `save_lora` do, too.
    """
    check_apart(path, [Path(lora)])
    _check_path(path, overwrite=overwrite)
    base = Base.find(lora, model)
    file, layers = read_lora(lora, base.networks, base.config), layers_of(base.networks)
    result, cutter = dict[Target, Change](), Cutter(cut, device)
    for target in watch(list(file.changes)):
        change = file.changes[target]
        if "size" in change.factors:
            raise ValueError(
                f"{lora} is a DoRA, whose change depends on the model's weights: merge it into the model, and extract "
                "a LoRA from the result"
            )
        shape = weight_shape(layers[target])
        whole = {name: value for name, value in change.factors.items() if name == "diff_b" or len(shape) == 1}
        factors = {name: value for name, value in change.factors.items() if name not in whole}
        result[target] = Change(whole | (_as_stored(*cutter.cut(factors, change.scale), shape) if factors else {}))
    metadata = metadata_of({"formula": "C_1 with other ranks", "cut": _given(cut)}, {"C_1": Path(lora)})
    base.save(path, result, dtype or _dtype_of(file.changes.values()), metadata | kept([lora]))
    return Written.of(path, result, cutter.energy, (*file.unknown, *file.words))


def extract(
    tuned: str | Path,
    model: str | Path,
    path: str | Path,
    cut: Cut,
    *,
    convolutions: bool = False,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    watch: Watch[tuple[str, str]] = list,
) -> Written:
    """Write the LoRA that turns `model` into `tuned`, as nearly as its ranks allow. Weights are read one at a time.

    It changes the layers of the UNet's transformers and the linear layers of the text encoders; with `convolutions`
    also the layers between the transformers. `Written.left_out` names all other weights that differ.
    dtype: of the factors (default: that of the tuned UNet). device: where the singular values are computed. watch:
    wraps the list of all weights.
    Raises ValueError for models of two families, for models whose layers are equal, and for a `path` that exists or is
    an input. Raises it as `save_lora` does, too.
    """
    check_apart(path, [Path(tuned), Path(model)])
    _check_path(path, overwrite=overwrite)
    first, second = files.identify(model), files.identify(tuned)
    old, new = Weights(first), Weights(second)
    check_alike(first, old, second, new, f"{tuned} and {model}", same_inputs=True)
    base, left = Base.of(first), list[str]()
    layers, result, cutter = layers_of(base.networks), dict[Target, Change](), Cutter(cut, device)
    for part, key in watch([(part, key) for part, keys in old.shapes.items() for key in keys]):
        difference = new.read(part, key).float() - old.read(part, key).float()
        if not difference.any():
            continue
        target = Target(part, key.removesuffix(".weight"))
        if target in layers and _is_target(target, layers[target], convolutions=convolutions):
            result[target] = Change(_as_stored(*cutter.cut({"diff": difference}), tuple(difference.shape)))
        else:
            left.append(f"{part}: {key}")
    if not result:
        raise ValueError(f"{tuned} and {model} have the same weights in all layers that the LoRA would change")
    made = {"formula": "B - A", "cut": _given(cut), "convolutions": convolutions}
    metadata = metadata_of(made, {"A": Path(model), "B": Path(tuned)})
    dtype = dtype or new.dtype_of("unet", "conv_out.weight")
    base.save(path, result, dtype, metadata)
    return Written.of(path, result, cutter.energy, tuple(left))


def _is_target(target: Target, layer: nn.Module, *, convolutions: bool) -> bool:
    """Return whether `extract` changes this layer. kohya's scripts choose the same layers."""
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return False
    words = set(target.layer.split("."))
    if target.part != "unet":
        return "blocks" in words
    return "transformer" in words or (convolutions and not words.isdisjoint(_BETWEEN))


def _as_stored(up: Tensor, down: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the matrices up: o r and down: r i in the shapes of a layer's factors, whose weight has this `shape`."""
    ones = [1] * (len(shape) - 2)
    return {"up": up.reshape(*up.shape, *ones), "down": down.reshape(len(down), *shape[1:])}


def _check_path(path: str | Path, *, overwrite: bool) -> None:
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"a LoRA is one file, whose name ends in .safetensors, got {path}: give such a name")
    if Path(path).is_dir() or (Path(path).exists() and not overwrite):
        raise ValueError(f"{path} exists already: give another path, or overwrite=True (--overwrite)")


def _dtype_of(changes: Iterable[Change]) -> torch.dtype:
    """Return the widest dtype of all factors."""
    first, *others = {value.dtype for change in changes for value in change.factors.values()}
    for dtype in others:
        first = torch.promote_types(first, dtype)
    return first


def _given(cut: Cut) -> dict[str, float]:
    return {name: value for name, value in vars(cut).items() if value is not None}
