"""Convolutions and linear layers on a CPU with their weights in the order that oneDNN computes in.

A weight is put into that order once and not at every call, which is most of the work of a convolution over few pixels;
and fp32 products run in oneDNN, which is faster than what PyTorch takes for them on some processors. The kernels are
PyTorch's own, and so are the numbers: those of the plain convolution of a channels-last input, and those of the plain
linear layer but for the order in which oneDNN sums.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# No public interface has them. They are in every build for CPUs with oneDNN since PyTorch 2.0.
_ONEDNN: Any = torch.ops.mkldnn
_ALONE: Any = ("none", [], "")  # nothing is fused to follow it


class Packed(nn.Module):
    """A layer for inference that has its weight packed, and not as a parameter.

    It is in the state dict as ever. Where a gradient is wanted, the plain form is computed.
    """

    packed: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Do what the plain layer does; of pictures, the output has its channels last whatever the input's layout."""
        if torch.is_grad_enabled() and x.requires_grad:
            return self.plain(x, self.dense())
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """Compute with the packed weight."""
        raise NotImplementedError

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute with the plain weight."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """Return the plain weight."""
        return self.packed.to_dense()

    def pack(self, weight: Tensor) -> Tensor:
        """Return a plain weight in oneDNN's order, which suits any size of input."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the plain weight: a packed one cannot be."""
        return self.__dict__ | {"packed": self.dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pack the weight again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.packed = self.pack(self.packed)

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.dense()


class PackedLinear(Packed, nn.Linear):
    """A linear layer: ... d to ... d'."""

    def pack(self, weight: Tensor) -> Tensor:
        """Return a plain weight in oneDNN's order."""
        out: Tensor = _ONEDNN._reorder_linear_weight(weight)
        return out

    def run(self, x: Tensor) -> Tensor:
        """Compute with the packed weight."""
        out: Tensor = _ONEDNN._linear_pointwise(x, self.packed, self.bias, *_ALONE)
        return out

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute with the plain weight."""
        return F.linear(x, weight, self.bias)


class PackedConv2d(Packed, nn.Conv2d):
    """A convolution: b c h w to b c' h' w'."""

    def pack(self, weight: Tensor) -> Tensor:
        """Return a plain weight in oneDNN's order."""
        out: Tensor = _ONEDNN._reorder_convolution_weight(weight, *self._geometry())
        return out

    def run(self, x: Tensor) -> Tensor:
        """Compute with the packed weight."""
        out: Tensor = _ONEDNN._convolution_pointwise(
            x, self.packed, self.bias, *self._geometry(), *_ALONE
        )
        return out

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute with the plain weight."""
        out: Tensor = self._conv_forward(x, weight, self.bias)
        return out

    def _geometry(self) -> tuple[Any, ...]:
        return self.padding, self.stride, self.dilation, self.groups


class PackedPixelwise(Packed, nn.Conv2d):
    """A convolution of one pixel, as the linear layer that it is: no order of its weight as one suits all sizes."""

    def pack(self, weight: Tensor) -> Tensor:
        """Return a plain weight in oneDNN's order."""
        out: Tensor = _ONEDNN._reorder_linear_weight(weight.flatten(1))
        return out

    def dense(self) -> Tensor:
        """Return the plain weight."""
        return self.packed.to_dense()[:, :, None, None]

    def run(self, x: Tensor) -> Tensor:
        """Compute with the packed weight."""
        pixels = rearrange(x, "b c h w -> b h w c")
        out: Tensor = _ONEDNN._linear_pointwise(pixels, self.packed, self.bias, *_ALONE)
        return rearrange(out, "b h w c -> b c h w")

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute with the plain weight."""
        out: Tensor = self._conv_forward(x, weight, self.bias)
        return out


def can_pack() -> bool:
    """Whether this build of PyTorch has oneDNN's layers of packed weights."""
    runs = ("_convolution_pointwise", "_linear_pointwise")
    packs = ("_reorder_convolution_weight", "_reorder_linear_weight")
    return all(hasattr(_ONEDNN, name) for name in (*runs, *packs))


def pack(module: nn.Module) -> None:
    """Pack every convolution and linear layer in `module`, on the CPU and in fp32 or bf16. Undone by `unpack`."""
    for part in module.modules():
        kind = _packed_kind(part)
        if kind is not None:
            weight = part.get_parameter("weight").detach()
            part.register_parameter("weight", None)
            part.__class__ = kind
            assert isinstance(part, Packed)
            part.packed = part.pack(weight)


def unpack(module: nn.Module) -> None:
    """Undo `pack`: plain layers with the same weights."""
    for part in module.modules():
        if isinstance(part, Packed):
            part.register_parameter("weight", nn.Parameter(part.dense(), requires_grad=False))
            del part.packed
            part.__class__ = nn.Conv2d if isinstance(part, nn.Conv2d) else nn.Linear  # type: ignore[assignment]


def _packed_kind(layer: nn.Module) -> type[Packed] | None:
    """What a layer becomes, if it is one to be packed."""
    if type(layer) is nn.Linear:
        return PackedLinear
    if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros":
        return None
    one = layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0)
    return PackedPixelwise if one and layer.groups == 1 else PackedConv2d
