"""LoRAs on disk, and their relatives: which layers of a model they change, and by which factors.

A dictionary has all names that the layers of the model can have in a file. Each name of the file is looked up there.
The dictionary is made from the key tables. A name such as `lora_unet_down_blocks_0_...` is never taken apart, because
"_" stands for "." and for itself. Names have one of four styles. kohya's scripts have the module names of diffusers or
LDM. The other styles are diffusers, new and old; PEFT; and cloneofsimo's first scripts, which number the layers.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ldm.checkpoint import tables
from ldm.checkpoint.folder import LORA_FILES
from ldm.checkpoint.identify import find
from ldm.checkpoint.keymap import Rule, translate
from ldm.checkpoint.known import NAMES, kind_of
from ldm.checkpoint.parts import TOWERS
from ldm.checkpoint.tensors import FLOATS, TensorFiles, Tensors, parse_object, some
from ldm.config import UNetConfig, check_number
from ldm.models.lora import Change, Factors, rank, shape, sized_axis

KINDS = "LoRA, LoCon, LoHa, LoKr, DoRA and whole differences"
PEFT_PREFIX, PEFT_CONFIG = "base_model.model.", "adapter_config.json"
DIFFUSERS_METADATA = "lora_adapter_metadata"

_ROLES = {  # the end of a tensor's name, after the layer's -> the factor's name in `ldm.models.lora`
    r"(lora_down|lora\.down|lora_linear_layer\.down|lora_A(\.\w+)?|down)\.weight|down": "down",
    r"(lora_up|lora\.up|lora_linear_layer\.up|lora_B(\.\w+)?|up)\.weight|up": "up",
    r"lora_mid\.weight": "mid",
    r"alpha": "alpha",
    r"dora_scale": "size",
    r"lora_magnitude_vector(\.\w+){0,2}": "size of outputs",
    r"diff|w_norm": "diff",
    r"diff_b|b_norm": "diff_b",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
}
_TENSOR = re.compile(rf"(?P<layer>.+?)[.:](?P<role>{'|'.join(_ROLES)})")  # the shortest layer, so the longest role
_REFUSED = (  # (pattern of a tensor's name, what it belongs to)
    (r"oft_(blocks|diag|R)|oft_S", "OFT"),
    (r"\.on_input$|ia3_l", "IA3"),
    (r"\.[ab][12](\.weight)?$", "GLoRA"),
    (r"\.bias_(indices|values|size)$", "a sparse change of biases"),
    (r"vera_lambda|lora_embedding_", "VeRA or a LoRA of embeddings"),
    (r"^bundle_emb\.", "embeddings beside its LoRA"),
)
_TO_TEXT = re.compile(r"attn2[._](processor\.)?to_k(_lora)?$")
_OLD_PROJECTIONS = {  # diffusers' old names for the layers of an attention, by the new names
    **{"to_q": "to_q_lora", "to_k": "to_k_lora", "to_v": "to_v_lora", "to_out.0": "to_out_lora"},
    **{"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"},
}
_NUMBERED = {  # cloneofsimo's files: the classes of diffusers whose layers they number, and our layers in this order
    "unet": (
        {"CrossAttention", "Attention", "GEGLU"},
        ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out", "ff.proj"]  # the diffusers of that time: ff before
        + ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out"],  # attn2
    ),
    "text_encoder": ({"CLIPAttention"}, ["attn.to_k", "attn.to_v", "attn.to_q", "attn.to_out"]),
}
_EMBEDDED = "<embed>"  # in their metadata, for a learned word

_Shape = tuple[int, int]


class Target(NamedTuple):
    """A layer of a model: the name of its network, as in `ldm.checkpoint.parts.modules`, and our name of the layer."""

    part: str
    layer: str


@dataclass(frozen=True)
class LoraFile:
    """What a file changes in one model.

    count: how many layers the file changes. unknown: those that the model does not have, by their names in the file.
    words: the vectors, k d, of learned words that some files bring along.
    """

    changes: Mapping[Target, Change]
    count: int
    unknown: tuple[str, ...]
    words: Mapping[str, Tensor]


def read_lora(path: str | Path, networks: Mapping[str, nn.Module], config: UNetConfig) -> LoraFile:
    """Read the LoRA at `path` for a model. The factors stay memory-mapped.

    path: a .safetensors file, or a folder as diffusers or PEFT saves it. networks: "unet", whose config is `config`,
    and the text towers, by the names of their parts.
    Raises ValueError for a file that is damaged, no LoRA, of a kind that is not supported, or for another model.
    """
    path = file_of(Path(path))
    tensors = TensorFiles([path])
    found, words = _by_layer(tensors)
    alphas = _Alphas(tensors, path, found)
    layers = layers_of(networks)
    names = names_of(layers, config)
    held = dict(tensors.read(stored for roles in found.values() for stored in roles.values()))
    changes: dict[Target, Change] = {}
    misfits: list[tuple[str, _Shape]] = []
    unknown: list[tuple[str, _Shape]] = []
    for name, roles in found.items():
        factors = {role: held[stored] for role, stored in roles.items() if role != "alpha"}
        if "size of outputs" in factors:  # PEFT's, which has the shape of the layer's output
            factors["size"] = factors.pop("size of outputs").flatten()
        sides = _shape(factors, f"{path}: {name}")
        candidates = names.get(name, [])
        target = next((target for target in candidates if _fits(factors, sides, layers[target])), None)
        if target is None:
            (misfits if candidates else unknown).append((name, sides))
        elif target in changes:
            raise ValueError(f"{path} changes {target.layer} twice, the second time as {name}: save one change alone")
        else:
            alpha = held[roles["alpha"]] if "alpha" in roles else None
            changes[target] = Change(factors, alphas.scale(name, target.part, rank(factors), alpha))
    if misfits or not changes:
        raise ValueError(f"{path} {_for_whom(config, misfits, unknown)}")
    vectors = {name: value.reshape(-1, value.shape[-1]) for name, value in tensors.read(words)}
    return LoraFile(changes, len(found), tuple(name for name, _ in unknown), vectors)


def context_width(path: str | Path) -> int | None:
    """Return how wide the text is that a LoRA's layers attend to, which tells its family; None if no layer tells.

    Raises ValueError for a file that is damaged, no LoRA, or of a kind that is not supported.
    """
    tensors = TensorFiles([file_of(Path(path))])
    for name, roles in _by_layer(tensors)[0].items():
        if _TO_TEXT.search(name) or name == f"unet:{_NUMBERED['unet'][1].index('attn2.to_k')}":
            wanted = {role: stored for role, stored in roles.items() if role != "alpha" and not role.startswith("size")}
            held = dict(tensors.read(wanted.values()))
            return _shape({role: held[stored] for role, stored in wanted.items()}, f"{tensors}: {name}")[1]
    return None


def is_factor(name: str) -> bool:
    """Return whether a tensor's name is that of a factor of a supported kind."""
    return _TENSOR.fullmatch(name) is not None


def layers_of(networks: Mapping[str, nn.Module]) -> dict[Target, Any]:
    """Return the layers that a LoRA can change."""
    kinds = nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm
    return {
        Target(part, name): layer
        for part, network in networks.items()
        for name, layer in network.named_modules()
        if isinstance(layer, kinds)
    }


def names_of(targets: Iterable[Target], config: UNetConfig) -> dict[str, list[Target]]:
    """Return all names that LoRA files have for `targets`. Only those that PEFT has for two towers are ambiguous."""
    names: dict[str, list[Target]] = defaultdict(list)
    targets = list(targets)
    towers = [part for part in TOWERS if any(target.part == part for target in targets)]
    for target in targets:
        own = _unet_names(target, config) if target.part == "unet" else _text_names(target, towers)
        for name in dict.fromkeys(own):
            names[name].append(target)
    for part, (_, numbered) in _NUMBERED.items():
        first = f".{numbered[0]}"
        blocks = [t.layer.removesuffix(first) for t in targets if t.part == part and t.layer.endswith(first)]
        blocks.sort(key=lambda block: block.startswith("mid."))  # which diffusers lists last
        for i, layer in enumerate(f"{block}.{layer}" for block in blocks for layer in numbered):
            names[f"{part}:{i}"].append(Target(part, layer))
    return names


def _unet_names(target: Target, config: UNetConfig) -> Iterator[str]:
    ldm, diffusers = (stored_name(target, rules(config)) for rules in (tables.ldm_unet, tables.diffusers_unet))
    yield from (f"lora_unet_{ldm.replace('.', '_')}", f"lycoris_{diffusers.replace('.', '_')}")
    yield from (f"lora_unet_{diffusers.replace('.', '_')}", f"diffusion_model.{ldm}")
    for name in (diffusers, *_old_names(diffusers, ".processor")):
        yield from (name, f"unet.{name}", f"{PEFT_PREFIX}{name}")


def _text_names(target: Target, towers: list[str]) -> Iterator[str]:
    number = towers.index(target.part) + 1 if len(towers) > 1 else ""  # kohya's, for SDXL
    for name in (stored_name(target, tables.hf_text(level)) for level in ("text_model", "")):
        yield from (f"lora_te{number}_{name.replace('.', '_')}", f"{PEFT_PREFIX}{name}")
        yield from (f"{target.part}.{each}" for each in (name, *_old_names(name, "")))


def stored_name(target: Target, rules: tuple[Rule, ...]) -> str:
    """Return the name of a layer under the rules of a key table."""
    return translate(f"{target.layer}.weight", rules).name.removesuffix(".weight")


def _old_names(name: str, between: str) -> Iterator[str]:
    """Yield diffusers' old name, if `name` is a layer of an attention."""
    for new, old in _OLD_PROJECTIONS.items():
        if name.endswith(f".{new}"):
            yield f"{name.removesuffix(f'.{new}')}{between}.{old}"


def file_of(path: Path) -> Path:
    """Return the file with the tensors. Raises ValueError for a folder without a LoRA, or with two."""
    if not path.is_dir():
        return path
    found = [path / name for name in LORA_FILES if (path / name).is_file()]
    if (path / "model_index.json").is_file():
        raise ValueError(f"{path} is a model and no LoRA: give it with --model")
    if len(found) != 1:
        held = "both" if found else "neither of"
        raise ValueError(f"{path} holds {held} {' and '.join(LORA_FILES)}: give the file of the LoRA")
    return found[0]


def _by_layer(tensors: Tensors) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Sort the tensors by layer: name of the layer in the file -> factor -> name of the tensor. And the learned words.

    Raises ValueError for tensors that are no factor of a known kind.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    strange = []
    for name in tensors.shapes:
        match = _TENSOR.fullmatch(name)
        if match is None:
            strange.append(name)
            continue
        role = next(role for pattern, role in _ROLES.items() if re.fullmatch(pattern, match["role"]))
        if role in found[match["layer"]]:
            raise ValueError(f"{tensors} changes {match['layer']} twice, the second time as {name}: save one alone")
        found[match["layer"]][role] = name
    words = tuple(n for n in strange if tensors.metadata.get(n) == _EMBEDDED and len(tensors.shapes[n]) in (1, 2))
    strange = sorted(set(strange).difference(words))
    kind = kind_of(tensors)
    if kind is not None and not re.match("a LoRA|a LyCORIS", kind):
        raise ValueError(f"{tensors} is {kind}: give a LoRA")
    for pattern, what in _REFUSED:
        if any(re.search(pattern, name) for name in strange):
            raise ValueError(f"{tensors} holds {what}, which is not supported: {KINDS} are")
    if not found:
        if any(find(tensors)):
            raise ValueError(f"{tensors} is a model or a part of one, and no LoRA: give it with --model")
        raise ValueError(f"{tensors} is no LoRA, it holds {some(strange)}: give a LoRA")
    if strange:
        raise ValueError(f"{tensors} holds {len(strange)} tensors that no known kind of LoRA has: {some(strange)}")
    if whole := {kind for name, kind in tensors.dtypes.items() if kind not in FLOATS}:
        raise ValueError(f"{tensors} holds factors of {', '.join(sorted(whole))}, allowed are {', '.join(FLOATS)}")
    for part, (classes, _) in _NUMBERED.items():
        if f"{part}:0" in found and part in tensors.metadata:
            named = set(re.findall(r"\w+", tensors.metadata[part]))
            if not named <= classes:
                raise ValueError(
                    f"{tensors} numbers the layers of {', '.join(sorted(named - classes))}: only those of "
                    f"{', '.join(sorted(classes))} are supported"
                )
    return dict(found), words


def _shape(factors: Factors, where: str) -> _Shape:
    """Return the sides of the change as a matrix: o and i h w; o and 1 if only a bias changes.

    Raises ValueError for factors that are incomplete, of two kinds, or do not fit together.
    """
    kinds = {"lora" if name in ("up", "down", "mid") else name[:4] for name in factors.keys() - {"size", "diff_b"}}
    try:
        found = shape(factors)
        if len(kinds) <= 1 and (kinds or "size" not in factors):
            return found
        reason = "are of two kinds"
    except (IndexError, KeyError, ValueError):
        reason = "do not fit together"
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in factors.items())
    raise ValueError(f"{where} has factors that {reason}: {shapes or 'none'}; fetch the file again")


def _fits(factors: Factors, sides: _Shape, layer: Any) -> bool:
    """Return whether a change of this shape fits the weight and the bias of `layer`."""
    weight, bias = weight_shape(layer), 0 if layer.bias is None else len(layer.bias)
    size = factors.get("size")
    if "diff_b" in factors and factors["diff_b"].numel() != bias:
        return False
    if size is not None and (len(weight) < 2 or size.numel() != weight[sized_axis(size)]):
        return False
    return factors.keys() == {"diff_b"} or sides == (weight[0], math.prod(weight[1:]))


def weight_shape(layer: Any) -> tuple[int, ...]:
    """Return the shape of the weight, which a packed layer does not have as a parameter."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    return tuple(layer.weight.shape)


class _Alphas:
    """The alphas that a file keeps apart from its tensors: in the metadata of diffusers, or in PEFT's config."""

    def __init__(self, tensors: Tensors, path: Path, layers: Iterable[str]) -> None:
        self.where, self.table = f"{tensors}, metadata {DIFFUSERS_METADATA}", {}
        self.peft = any(name.startswith(PEFT_PREFIX) for name in layers)
        if self.peft:
            self.where = str(path.parent / PEFT_CONFIG)
            if not Path(self.where).is_file():
                raise ValueError(f"{path} needs the file {PEFT_CONFIG} of its folder, which holds alpha: fetch it, too")
            self.table = parse_object(Path(self.where).read_bytes(), self.where)
            if (kind := self.table.get("peft_type")) != "LORA":
                raise ValueError(f"{self.where} describes an adapter of kind {kind}: of PEFT's, only LORA is supported")
        elif DIFFUSERS_METADATA in tensors.metadata:
            self.table = parse_object(tensors.metadata[DIFFUSERS_METADATA], self.where)

    def scale(self, name: str, part: str, rank: int | None, alpha: Tensor | None) -> float:
        """Return alpha / rank. An alpha of 0 counts as none, as in kohya's scripts, and the scale is 1."""
        if rank is None:
            return 1.0
        if alpha is not None:
            if alpha.numel() != 1 or not math.isfinite(float(alpha)):
                raise ValueError(f"the alpha of {name} must be one finite number, got {alpha.float().tolist()}")
            return (float(alpha) or rank) / rank
        above = "" if self.peft else f"{part}."
        own = name.removeprefix(PEFT_PREFIX if self.peft else above)
        found = self.table.get(f"{above}lora_alpha")
        patterns = self.table.get(f"{above}alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{self.where}: alpha_pattern must be a JSON object, got {patterns!r}")
        for pattern, value in patterns.items():
            if not re.fullmatch(r"\^?[\w.]+", pattern):
                raise ValueError(f"{self.where}: alpha_pattern must name layers, got the pattern {pattern!r}")
            if own == pattern.removeprefix("^") or own.endswith(f".{pattern}"):
                found = value
                break
        if found is None:
            return 1.0
        check_number(f"{self.where}: lora_alpha", found)
        return float(found) / (math.sqrt(rank) if self.table.get(f"{above}use_rslora") else rank)


def _for_whom(config: UNetConfig, misfits: list[tuple[str, _Shape]], unknown: list[tuple[str, _Shape]]) -> str:
    """Say for which model the LoRA is, or how it does not fit."""
    widths = [sides[1] for name, sides in misfits + unknown if _TO_TEXT.search(name)]
    if widths and widths[0] != config.context_dim:
        theirs, ours = (f"{NAMES.get(w, 'a custom model')}, {w} wide" for w in (widths[0], config.context_dim))
        return f"is a LoRA for {theirs}; the model is {ours}: give a LoRA for this model"
    if misfits:
        shapes = [f"{name} {list(sides)}" for name, sides in misfits]
        return f"has {len(misfits)} changes of another size than the model's layers: {some(shapes)}; give another LoRA"
    return f"changes none of the model's layers, but {some([name for name, _ in unknown])}: give a LoRA for this model"
