"""Convolutions and linear layers on a CPU with their weights in oneDNN's memory format.

PyTorch reorders the weight of a convolution at each call. For a small picture this takes most of the time. A packed
layer reorders its weight once. The format depends on the size of the input and the number of threads. So a layer is
packed at its first call, and again if a later call needs another format. Packed linear layers in fp32 run in oneDNN
instead of MKL. The outputs equal those of plain layers, apart from the order of summation.

Packed weights are for inference: they are not parameters. Call `unpack(network)` before you train a network, merge LoRA
weights into it, or quantize it. `load_state_dict` works on packed layers.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Private operators of PyTorch, present in its CPU builds with oneDNN.
_ONEDNN: Any = torch.ops.mkldnn
_CONVOLUTION = ("_reorder_convolution_weight", "_convolution_pointwise")
_LINEAR = ("_reorder_linear_weight", "_linear_pointwise")
_QUESTIONS = ("_get_mkldnn_serialized_md", "_is_mkldnn_bf16_supported")
_NOTHING_FUSED: Any = ("none", [], "")

PLAIN = b""  # the format of a weight that is not packed


class Packed(nn.Module):
    """A layer whose weight is not a parameter. State dicts, copies and pickles have the weight in plain format.

    If the input requires a gradient, the layer computes with the plain weight.
    """

    held: tuple[Tensor, bytes]  # the weight and its format; threads that share the layer replace both at once

    def dense(self) -> Tensor:
        """Return the weight in plain format."""
        return self.held[0].to_dense()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Change the weight, too, in `to` and its relatives. The next call packs the new weight."""
        self.held = fn(self.dense()), PLAIN
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, with a plain weight, because a packed weight cannot be copied."""
        return self.__dict__ | {"held": (self.dense(), PLAIN)}

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.dense()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the weight here, and let PyTorch load the bias. The next call of the layer packs the new weight."""
        name, old = f"{prefix}weight", self.held[0]
        others = {key: value for key, value in state_dict.items() if key != name}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        new = state_dict.get(name)
        if new is None:
            missing_keys.append(name)
        elif new.shape != old.shape:
            error_msgs.append(f"size mismatch for {name}: the layer has {old.shape}, the state dict {new.shape}")
        else:
            assign = local_metadata.get("assign_to_params_buffers", False)
            self.held = new.detach().to(new.dtype if assign else old.dtype, copy=True), PLAIN


class PackedLinear(Packed, nn.Linear):
    """A packed linear layer: ... d to ... d'."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the same as the plain layer."""
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, self.dense(), self.bias)
        weight, order = self.held
        if order == PLAIN:
            weight = _ONEDNN._reorder_linear_weight(weight)
            self.held = weight, b"any input"
        return _ONEDNN._linear_pointwise(x, weight, self.bias, *_NOTHING_FUSED)


class PackedConv2d(Packed, nn.Conv2d):
    """A packed convolution: b c h w to b c' h' w'."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the same as the plain layer. The output is in channels-last memory format, whatever the input has."""
        if torch.is_grad_enabled() and x.requires_grad:
            return self._conv_forward(x, self.dense(), self.bias)
        geometry = self.padding, self.stride, self.dilation, self.groups
        weight, order = self.held
        wanted = _order(weight.shape, x.shape, x.dtype, geometry, torch.get_num_threads())
        if order != wanted:
            weight = _ONEDNN._reorder_convolution_weight(weight.to_dense(), *geometry, x.shape)
            self.held = weight, wanted
        return _ONEDNN._convolution_pointwise(x, weight, self.bias, *geometry, *_NOTHING_FUSED)


@cache
def _order(weight: torch.Size, x: torch.Size, dtype: torch.dtype, geometry: Any, threads: int) -> bytes:
    """Pack an empty weight, to find the format that oneDNN uses for a weight and an input of these shapes."""
    empty = torch.empty(weight, dtype=dtype, memory_format=torch.channels_last)
    packed = _ONEDNN._reorder_convolution_weight(empty, *geometry, x)
    return bytes(_ONEDNN._get_mkldnn_serialized_md(packed).tolist())


def can_pack(dtype: torch.dtype | None = None) -> bool:
    """Return whether PyTorch and the processor support packed weights in fp32 and in `dtype`."""
    built = all(hasattr(_ONEDNN, name) for name in (*_CONVOLUTION, *_LINEAR, *_QUESTIONS))
    return built and (dtype != torch.bfloat16 or _ONEDNN._is_mkldnn_bf16_supported())


def pack(network: nn.Module) -> None:
    """Replace the convolutions and linear layers inside `network`, on the CPU and in fp32 or bf16, by packed layers."""
    _replace(network, {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d})


def unpack(network: nn.Module) -> None:
    """Undo `pack`. The weights are parameters again, and do not require gradients."""
    _replace(network, {PackedLinear: nn.Linear, PackedConv2d: nn.Conv2d})


def _replace(network: nn.Module, kinds: Mapping[type, type]) -> None:
    for name, layer in list(network.named_children()):
        kind = kinds.get(type(layer))
        if kind is None or getattr(layer, "padding_mode", "zeros") != "zeros":
            _replace(layer, kinds)
        else:
            setattr(network, name, _rebuild(layer, kind))


def _rebuild(layer: Any, kind: Any) -> Any:
    """Return a layer of class `kind` with the geometry, weight and bias of `layer`."""
    if isinstance(layer, nn.Linear):
        new = kind(layer.in_features, layer.out_features, device="meta")
    else:
        geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups
        new = kind(layer.in_channels, layer.out_channels, *geometry, device="meta")
    new.bias = layer.bias
    if isinstance(layer, Packed):
        new.weight = nn.Parameter(layer.dense(), requires_grad=False)
    else:
        new.weight = None
        new.held = layer.weight.detach(), PLAIN
    return new.train(layer.training)
