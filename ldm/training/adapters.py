"""LoRA in training: small matrices beside the layers of fixed networks. They alone learn.

    LoRA    y = W x + b + s B A x                          (Hu et al. 2021, eq. 3); B starts at zero
    DoRA    y = m (W x + s B A x) / |W + s B A| + b        (Liu et al. 2024, eq. 5); m starts at |W|

s is alpha / rank, and |.| the norm per output, which counts as a constant in the gradient (section 4.3). Of a
convolution, A has the kernel and B is 1x1. `ldm.models.lora` computes the same change of the weight for inference.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.loras import Target, layers_of
from ldm.checkpoint.save_loras import diffusers_name
from ldm.config import UNetConfig
from ldm.models.lora import Change


@dataclass(frozen=True)
class LoraConfig:
    """The size of a LoRA, and which layers it changes: those whose name in diffusers ends with one of the targets."""

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0  # share of a layer's inputs that its adapter does not see, in training
    dora: bool = False
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # of the UNet; convolutions: "conv1", "conv2"
    text_targets: tuple[str, ...] = ()  # of the text encoders, such as "q_proj", "k_proj", "v_proj", "out_proj"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"the rank of a LoRA must be at least 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"the alpha of a LoRA must be greater than 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"the dropout of a LoRA must be at least 0 and less than 1, got {self.dropout}")

    def choose(self, networks: Mapping[str, nn.Module], config: UNetConfig) -> dict[Target, nn.Module]:
        """Return the layers that the LoRA changes. networks, config: as in `ldm.checkpoint.loras.read_lora`.

        Raises ValueError for a target that no layer has.
        """
        layers = {t: x for t, x in layers_of(networks).items() if isinstance(x, nn.Linear | nn.Conv2d)}
        names = {target: f".{diffusers_name(target, config)}" for target in layers}
        for what, wanted in (("targets", self.targets), ("text_targets", self.text_targets)):
            own = [name for target, name in names.items() if (target.part == "unet") == (what == "targets")]
            for end in wanted:
                if not any(name.endswith(f".{end}") for name in own):
                    ends = sorted({re.search(r"[a-z]\w*(\.\d+)?$", name)[0] for name in own})  # type: ignore[index]
                    raise ValueError(
                        f"{what} has {end!r}, which no layer is called in diffusers: take {', '.join(ends)}"
                    )

        def chosen(target: Target) -> bool:
            wanted = self.targets if target.part == "unet" else self.text_targets
            return any(names[target].endswith(f".{end}") for end in wanted)

        return {target: layer for target, layer in layers.items() if chosen(target)}


class Adapter(nn.Module):
    """The learned matrices beside one linear layer or convolution."""

    def __init__(self, layer: Any, config: LoraConfig) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            sizes: dict[str, Any] = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding")}
            self.down: nn.Module = nn.Conv2d(layer.in_channels, config.rank, bias=False, **sizes)
            self.up: nn.Module = nn.Conv2d(config.rank, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, config.rank, bias=False)
            self.up = nn.Linear(config.rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        self.scale = config.alpha / config.rank
        self.dropout = nn.Dropout(config.dropout)
        norms = layer.weight.detach().flatten(1).norm(dim=1) if config.dora else None
        self.magnitude = None if norms is None else nn.Parameter(norms)  # o
        self.to(layer.weight.device)

    def change(self) -> Change:
        """Return the change of the layer's weight."""
        factors: dict[str, Any] = {"up": self.up.weight, "down": self.down.weight}
        if self.magnitude is not None:
            factors["size"] = self.magnitude
        return Change({name: value.detach() for name, value in factors.items()}, self.scale)

    def forward(self, layer: Any, x: Tensor, output: Tensor) -> Tensor:
        """Return the changed output of `layer`, whose input is x and whose own output is `output`."""
        change = self.scale * self.up(self.down(self.dropout(x)))
        if self.magnitude is None:
            return output + change
        with torch.no_grad():
            plain = Change({"up": self.up.weight, "down": self.down.weight}, self.scale)  # type: ignore[dict-item]
            merged = layer.weight.float() + plain.of("weight", layer.weight)
            norms = merged.flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float32).eps)
        shape = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        factor, bias = (self.magnitude / norms).reshape(shape), 0 if layer.bias is None else layer.bias.reshape(shape)
        return (output - bias + change) * factor + bias


class Adapters(nn.Module):
    """The adapters of several layers: the part of a LoRA that learns, is averaged and is saved."""

    def __init__(self, layers: Mapping[Target, nn.Module], config: LoraConfig) -> None:
        """Make new adapters, which change nothing yet, and add them to the layers, which stay fixed."""
        super().__init__()
        self.targets = tuple(layers)
        self.each = nn.ModuleList(Adapter(layer, config) for layer in layers.values())
        for layer, adapter in zip(layers.values(), self.each, strict=True):
            layer.register_forward_hook(_hook(adapter))

    def changes(self) -> dict[Target, Change]:
        """Return the change of each layer's weight, as `ldm.checkpoint.loras.read_lora` does."""
        return {t: adapter.change() for t, adapter in zip(self.targets, self.each, strict=True)}  # type: ignore[operator]


def _hook(adapter: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda layer, args, output: adapter(layer, args[0], output)
