"""Convolutions on a CPU with their weights in the order that oneDNN computes in, put so once and not at every call.

The kernels are PyTorch's own, and so are the numbers: those of the plain convolution of a channels-last input, bit for
bit. What is saved is the reordering, most of the work of a small picture.
"""

from typing import Any

import torch
from torch import Tensor, nn

# No public interface has them. They are in every build for CPUs with oneDNN since PyTorch 2.0.
_REORDER: Any = getattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", None)
_CONVOLVE: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)


class PackedConv2d(nn.Conv2d):
    """A convolution for inference on a CPU. The weight is packed at the first call, and the plain one let go.

    It is in the state dict as ever. Where a gradient is wanted, the plain form is computed.
    """

    packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map b c h w to b c' h' w', channels last whatever the input's layout."""
        if self.packed is None:
            self.packed = _REORDER(
                self.weight.detach().to_mkldnn(),
                self.padding,
                self.stride,
                self.dilation,
                self.groups,
            )
            self.register_parameter("weight", None)
        if torch.is_grad_enabled() and x.requires_grad:
            plain: Tensor = self._conv_forward(x, self.packed.to_dense(), self.bias)
            return plain
        out: Tensor = _CONVOLVE(
            x,
            self.packed,
            self.bias,
            self.padding,
            self.stride,
            self.dilation,
            self.groups,
            "none",
            [],
            "",
        )
        return out

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle as if never packed: packed weights cannot be."""
        state = self.__dict__.copy()
        if self.packed is not None:
            weight = nn.Parameter(self.packed.to_dense(), requires_grad=False)
            state |= {"packed": None, "_parameters": self._parameters | {"weight": weight}}
        return state

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[f"{prefix}weight"] = self.packed.to_dense()


def can_pack() -> bool:
    """Whether this build of PyTorch has oneDNN's convolutions of packed weights."""
    return _REORDER is not None and _CONVOLVE is not None


def pack_convolutions(module: nn.Module) -> None:
    """Make every convolution in `module`, on the CPU and in fp32 or bf16, one of packed weights. Undone by `unpack`."""
    for part in module.modules():
        if type(part) is nn.Conv2d and part.padding_mode == "zeros":
            part.__class__ = PackedConv2d


def unpack_convolutions(module: nn.Module) -> None:
    """Undo `pack_convolutions`: plain convolutions with the same weights."""
    for part in module.modules():
        if isinstance(part, PackedConv2d):
            if part.packed is not None:
                part.weight = nn.Parameter(part.packed.to_dense(), requires_grad=False)
                part.packed = None
            part.__class__ = nn.Conv2d  # type: ignore[assignment]
