"""Convolutions and linear layers on a CPU with their weights in the order that oneDNN computes in.

PyTorch reorders the weight of a convolution at each call: most of the work, where there are few pixels. A packed layer
does so once. oneDNN's order depends on the sizes of the input and the number of threads: a layer is packed when first
called, and again when another order is wanted. fp32 linear layers run in oneDNN too, instead of MKL. The numbers are
those of the plain layers but for the order of summation.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# PyTorch has no public names for these. Its builds for CPUs with oneDNN have them.
_ONEDNN: Any = torch.ops.mkldnn
_CONVOLUTION = ("_reorder_convolution_weight", "_convolution_pointwise")
_LINEAR = ("_reorder_linear_weight", "_linear_pointwise")
_QUESTIONS = ("_get_mkldnn_serialized_md", "_is_mkldnn_bf16_supported")
_NOTHING_FUSED: Any = ("none", [], "")

PLAIN = b""  # the order of a weight that is not packed yet


class Packed(nn.Module):
    """A layer for inference. Its weight is no parameter; state dict, copies and pickles have it in its plain order.

    Where a gradient of the input is wanted, the plain layer is computed.
    """

    held: tuple[Tensor, bytes]  # the weight and its order, in one value for threads that share the layer

    def dense(self) -> Tensor:
        """Return the weight in its plain order."""
        return self.held[0].to_dense()

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled; a packed weight cannot be."""
        return self.__dict__ | {"held": (self.dense(), PLAIN)}

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.dense()


class PackedLinear(Packed, nn.Linear):
    """A linear layer: ... d to ... d'."""

    def forward(self, x: Tensor) -> Tensor:
        """Do what the plain layer does."""
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, self.dense(), self.bias)
        weight, order = self.held
        if order == PLAIN:
            weight = _ONEDNN._reorder_linear_weight(weight)
            self.held = weight, b"any input"
        out: Tensor = _ONEDNN._linear_pointwise(x, weight, self.bias, *_NOTHING_FUSED)
        return out


class PackedConv2d(Packed, nn.Conv2d):
    """A convolution: b c h w to b c' h' w'."""

    def forward(self, x: Tensor) -> Tensor:
        """Do what the plain layer does; the output's channels are last in memory whatever the input's layout."""
        if torch.is_grad_enabled() and x.requires_grad:
            plain: Tensor = self._conv_forward(x, self.dense(), self.bias)
            return plain
        geometry = self.padding, self.stride, self.dilation, self.groups
        weight, order = self.held
        wanted = _order(weight.shape, x.shape, x.dtype, geometry, torch.get_num_threads())
        if order != wanted:
            weight = _ONEDNN._reorder_convolution_weight(weight.to_dense(), *geometry, x.shape)
            self.held = weight, wanted
        out: Tensor = _ONEDNN._convolution_pointwise(x, weight, self.bias, *geometry, *_NOTHING_FUSED)
        return out


@cache
def _order(weight: torch.Size, x: torch.Size, dtype: torch.dtype, geometry: Any, threads: int) -> bytes:
    """Describe the order that a weight should be in for an input, both of these shapes, by packing an empty one."""
    empty = torch.empty(weight, dtype=dtype, memory_format=torch.channels_last)
    packed = _ONEDNN._reorder_convolution_weight(empty, *geometry, x)
    return bytes(_ONEDNN._get_mkldnn_serialized_md(packed).tolist())


def can_pack(dtype: torch.dtype | None = None) -> bool:
    """Whether PyTorch and this processor have oneDNN's layers with packed weights for fp32 or bf16."""
    built = all(hasattr(_ONEDNN, name) for name in (*_CONVOLUTION, *_LINEAR, *_QUESTIONS))
    return built and (dtype != torch.bfloat16 or _ONEDNN._is_mkldnn_bf16_supported())


def pack(network: nn.Module) -> None:
    """Replace the convolutions and linear layers inside `network`, on the CPU in fp32 or bf16, by packed ones."""
    _replace(network, {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d})


def unpack(network: nn.Module) -> None:
    """Undo `pack`: plain layers with the same weights, which want no gradient."""
    _replace(network, {PackedLinear: nn.Linear, PackedConv2d: nn.Conv2d})


def _replace(network: nn.Module, kinds: Mapping[type, type]) -> None:
    for name, layer in list(network.named_children()):
        kind = kinds.get(type(layer))
        if kind is None or getattr(layer, "padding_mode", "zeros") != "zeros":
            _replace(layer, kinds)
        else:
            setattr(network, name, _rebuild(layer, kind))


def _rebuild(layer: Any, kind: Any) -> Any:
    """Return a layer of class `kind` with the geometry, weight and bias of another."""
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
