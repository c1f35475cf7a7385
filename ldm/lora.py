"""LoRAs in a pipeline: merged into the weights, so that a step costs nothing more, and removed exactly.

    W' = W + w_1 C_1 + w_2 C_2 + ...       in fp32, rounded once to the dtype of W

Each change C_i is computed from the original weight W, so their order does not matter beyond rounding. For DoRA, whose
C_i depends on W, a weight below 1 lies between W and the whole change. The original weights of changed layers are kept
in CPU memory: removing a LoRA restores them bit for bit, and another w_i starts from them. For a model on the CPU they
are the memory-mapped file itself, if its dtype is that of the model.

`ldm.load(..., loras=["style.safetensors:0.8"])` merges before the weights are compiled, packed or pinned for offload.
`set_loras` works after these, too: packed weights are packed again, and CUDA graphs are recorded in each run.
Call it between runs, because a running one has computed its keys and values.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.checkpoint.blocks import check_blocks, full_name, number_for
from ldm.checkpoint.loras import Target, layers_of, read_lora
from ldm.checkpoint.parts import TOWERS
from ldm.checkpoint.tensors import some
from ldm.config import UNetConfig, check_number
from ldm.models.lora import Change
from ldm.models.text import TextEncoder
from ldm.models.textual_inversion import add_embedding, remove_embedding

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline

_NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)"
_WORD = re.compile(rf"(?P<path>.+?)(:(?P<weight>{_NUMBER}))?(:(?P<blocks>[\w.]+={_NUMBER}(,[\w.]+={_NUMBER})*))?")


@dataclass(frozen=True)
class Lora:
    """A LoRA with its weight: 0 has no effect, 1 the full one.

    blocks: factors of the weight for parts of the model, such as {"text_encoder": 0, "down": 0.5, "up.3": 1}. A part is
      "text_encoder", "text_encoder_2", or a module of the UNet; the longest name counts.
    """

    path: str | Path
    weight: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, number in {"the weight": self.weight, **self.blocks}.items():
            check_number(f"{name} of the LoRA {self.path}", number)

    @classmethod
    def parse(cls, word: "str | Path | Lora") -> "Lora":
        """Read FILE, FILE:WEIGHT or FILE:WEIGHT:PART=FACTOR,...; a file that has such a name counts as FILE."""
        match = _WORD.fullmatch(str(word))
        if isinstance(word, Lora) or match is None or Path(str(word)).exists():
            return word if isinstance(word, Lora) else cls(word)
        blocks = (pair.split("=") for pair in (match["blocks"] or "").split(",") if pair)
        return cls(match["path"], float(match["weight"] or 1), {name: float(number) for name, number in blocks})

    def check_blocks(self, targets: Iterable[Target]) -> None:
        """Raise ValueError for a part that none of these layers is in."""
        check_blocks(self.blocks, (full_name(*target) for target in targets), f"the LoRA {self.path} has a factor")

    def weight_of(self, target: Target) -> float:
        """Return the weight for a layer."""
        return self.weight * number_for(self.blocks, full_name(*target), 1.0)


class Applied(NamedTuple):
    """A LoRA that was merged."""

    lora: Lora
    applied: int  # how many layers it changes
    total: int  # how many layers its file names
    unknown: tuple[str, ...]  # names of layers in the file that the model does not have
    words: tuple[str, ...]  # learned words in the file, which prompts may use

    def __str__(self) -> str:
        parts = [f"{self.lora.path}: LoRA with weight {self.lora.weight:g}, {self.applied} of {self.total} modules"]
        if self.unknown:
            parts.append(f"the model has no {some(self.unknown)}")
        if self.words:
            parts.append(f"prompts may use its learned words: {some(self.words)}")
        return "; ".join(parts)


class Merged(NamedTuple):
    """The LoRAs in a pipeline, and the original weights, on the CPU: layer and "weight" or "bias" -> value."""

    applied: tuple[Applied, ...]
    originals: dict[tuple[Target, str], Tensor]
    networks: Mapping[str, nn.Module]
    words: tuple[str, ...] = ()  # learned words in the text encoder


def set_loras(pipe: "Pipeline", loras: "Sequence[str | Path | Lora]") -> tuple[Applied, ...]:
    """Let these LoRAs replace those in the networks of `pipe`; none restores the weights as they were loaded.

    loras: `Lora`, or as text FILE or FILE:WEIGHT. `pipe.loras.applied` holds the result, too.
    Raises ValueError as `read_lora` and `add_embedding` do, and for quantized weights; then the pipeline stays
    unchanged. Raises it for weights that would not be finite; then the pipeline has no LoRA.
    """
    networks = {"unet": pipe.unet, **dict(zip(TOWERS, pipe.text_encoder.towers, strict=False))}
    layers = layers_of(networks)
    applied, changes, words = read_loras(loras, networks, pipe.config.unet)
    old = pipe.loras or Merged((), {}, networks)
    originals = {
        key: value for key, value in old.originals.items() if old.networks[key[0].part] is networks[key[0].part]
    }
    own = all(old.networks[part] is networks[part] for part in networks.keys() & TOWERS)
    _teach(pipe.text_encoder, old.words if own else (), words)
    pipe.loras = Merged(applied, originals, networks, tuple(words))
    try:
        for target in changes | {target: None for target, _ in originals}:
            _merge(layers[target], target, changes.get(target, []), originals)
    except ValueError:
        pipe.loras = Merged((), originals, networks, tuple(words))
        set_loras(pipe, [])
        raise
    return pipe.loras.applied


def read_loras(
    loras: "Sequence[str | Path | Lora]", networks: Mapping[str, nn.Module], config: UNetConfig
) -> tuple[tuple[Applied, ...], dict[Target, list[tuple[float, Change]]], dict[str, Tensor]]:
    """Read LoRAs for a model: what will be applied, the weighted changes of each layer, and the learned words.

    networks, config: as of `read_lora`. Raises ValueError as `read_lora` does, for a factor of a part that the model
    lacks, and for two LoRAs with the same learned word.
    """
    layers = layers_of(networks)
    applied, words = [], dict[str, Tensor]()
    changes: dict[Target, list[tuple[float, Change]]] = defaultdict(list)
    for lora in map(Lora.parse, loras):
        file = read_lora(lora.path, networks, config)
        lora.check_blocks(layers)
        if both := words.keys() & file.words:
            raise ValueError(f"two LoRAs bring along the learned word {min(both)}: use one of them")
        words |= file.words
        applied.append(Applied(lora, len(file.changes), file.count, file.unknown, tuple(file.words)))
        for target, change in file.changes.items():
            changes[target].append((lora.weight_of(target), change))
    return tuple(applied), changes, words


def changed(name: str, base: Tensor, changes: Iterable[tuple[float, Change]]) -> Tensor | None:
    """Return the weight or bias `base`, in fp32, plus the weighted changes; None if none of them changes it."""
    found = [weight * part for weight, change in changes if (part := change.of(name, base)) is not None]
    return base + torch.stack(found).sum(dim=0) if found else None


def _teach(text_encoder: TextEncoder, old: Iterable[str], words: Mapping[str, Tensor]) -> None:
    """Replace the learned words `old` by `words`. An error changes nothing."""
    towers: Any = text_encoder.towers
    before = [(tower.tokenizer, tower.token_embedding) for tower in towers]
    try:
        for name in old:
            remove_embedding(text_encoder, name)
        for name, vectors in words.items():
            add_embedding(text_encoder, name, [vectors])
    except ValueError as error:
        for tower, held in zip(towers, before, strict=True):
            tower.tokenizer, tower.token_embedding = held
        raise ValueError(f"the learned words of the LoRA cannot be used: {error}") from error


@torch.no_grad()
def _merge(
    layer: nn.Module, target: Target, changes: list[tuple[float, Change]], originals: dict[tuple[Target, str], Tensor]
) -> None:
    """Give `layer` its original weight and bias plus the changes. `originals` keeps those that differ then."""
    for name, held in layer.state_dict().items():  # of packed layers, too, in plain format
        key = target, name
        if type(held) is not Tensor or not held.is_floating_point():
            raise ValueError(f"the {name} of {target.layer} is quantized: set the LoRAs before you quantize the model")
        original = originals.get(key, held)
        base = original.to(held.device, torch.float32)
        if (merged := changed(name, base, changes)) is not None:
            if key not in originals:
                originals[key] = held.cpu()
            new = torch.empty_like(held).copy_(merged)
            if not new.isfinite().all():
                raise ValueError(f"the {name} of {target.layer} is not finite with the LoRA: give a lower weight")
        elif key in originals:
            new = torch.empty_like(held).copy_(originals.pop(key))
        else:
            continue
        new = new.pin_memory() if held.is_pinned() else new  # for offload
        layer.load_state_dict({name: new}, strict=False, assign=True)
