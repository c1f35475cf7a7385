"""The change that a LoRA, or a relative of LoRA, makes to one layer: the product of its factors.

    LoRA    s B A                        (Hu et al. 2021); of a convolution, A has the kernel and B is 1x1
    LoCon   s M x B x A                  A is 1x1, too, and the core M has the kernel
    LoHa    s (W1a W1b) * (W2a W2b)      elementwise product; each pair may have a core, as above
    LoKr    s kron(W1, W2)               each of the two may be a product, W2 with a core
    full    D                            the difference itself, also of biases and of normalizations
    DoRA    m (W + C) / |W + C| - W      (Liu et al. 2024); C: one of the above, |.|: the norm per output or input

s is alpha / rank. LoCon, LoHa and LoKr: Yeh et al. 2023 (LyCORIS).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Change:
    """The factors for one layer. scale: s above."""

    factors: Factors
    scale: float = 1.0

    def of(self, name: str, value: Tensor) -> Tensor | None:
        """Return the change of the original weight or bias `value` in fp32; None if it does not change.

        name: "weight" or "bias".
        """
        wanted = [factor for factor in self.factors if (factor == "diff_b") == (name == "bias")]
        factors = {factor: self.factors[factor].to(value.device, torch.float32) for factor in wanted}
        found = factors.get("diff_b") if name == "bias" else product(factors)
        if found is None or name == "bias":
            return found
        change = (found * self.scale).reshape(value.shape)
        return _resized(value.float(), change, factors["size"]) if "size" in factors else change


def product(factors: Factors) -> Tensor | None:
    """Multiply the factors. Returns the change of the weight without s and DoRA: o i, o i h w or o (i h w).

    Returns None if only the bias changes. Raises RuntimeError for factors that do not fit together, and KeyError if one
    is missing.
    """
    if "up" in factors:
        return _pair(factors["up"], factors["down"], factors.get("mid"))
    if "hada_w1_a" in factors:
        first, second = (
            _product_of(factors[f"hada_w{i}_a"], factors[f"hada_w{i}_b"], factors.get(f"hada_t{i}")) for i in (1, 2)
        )
        return first * second
    if "lokr_w1" in factors or "lokr_w1_a" in factors:
        first, second = (
            factors[f"lokr_w{i}"]
            if f"lokr_w{i}" in factors
            else _product_of(factors[f"lokr_w{i}_a"], factors[f"lokr_w{i}_b"], factors.get(f"lokr_t{i}"))
            for i in (1, 2)
        )
        return torch.kron(first, second.flatten(1))
    return factors.get("diff")


def rank(factors: Factors) -> int | None:
    """Return the rank of the factors; None if none of them is a product, so that alpha has no meaning."""
    names = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    return next((factors[name].shape[0] for name in names if name in factors), None)


def _pair(up: Tensor, down: Tensor, core: Tensor | None = None) -> Tensor:
    """Multiply up: o r or o r 1 1, core: r r h w and down: r i h w or r i, into o (i h w), or with a core o i h w."""
    if core is None:
        return up.flatten(1) @ down.flatten(1)
    return torch.einsum("mn...,om,ni->oi...", core, up.flatten(1), down.flatten(1))


def _product_of(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """Multiply factors of LyCORIS. a: o r, but r o if there is a core."""
    return _pair(a, b) if core is None else _pair(a.T, b, core)


def _resized(weight: Tensor, change: Tensor, size: Tensor) -> Tensor:
    """Return the change that gives weight + change the norms `size`: o or o 1 .. for outputs, 1 i .. for inputs."""
    merged = weight + change
    axis = 1 if size.dim() > 1 and size.shape[0] == 1 else 0
    norms = merged.transpose(0, axis).flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float32).eps)
    shape = [1] * merged.dim()
    shape[axis] = -1
    return merged * (size.flatten() / norms).reshape(shape) - weight
