"""The change that a LoRA, or a relative of LoRA, makes to one layer: the product of its factors.

    LoRA    s B A                        (Hu et al. 2021); of a convolution, A has the kernel and B is 1x1
    LoCon   s M x B x A                  A is 1x1, too, and the core M has the kernel
    LoHa    s (W1a W1b) * (W2a W2b)      elementwise product; each pair may have a core, as above
    LoKr    s kron(W1, W2)               each of the two may be a product, W2 with a core
    full    D                            the difference itself, also of biases and of normalizations
    DoRA    m (W + C) / |W + C| - W      (Liu et al. 2024); C: one of the above, |.|: the norm per output or input

s is alpha / rank. LoCon, LoHa and LoKr: Yeh et al. 2023 (LyCORIS).
"""

import math
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
    """Multiply the factors. Returns the change of the weight without s and DoRA: o (i h w), or whole.

    Returns None if only the bias changes.
    """
    if "up" in factors:
        return _pair(factors["up"], factors["down"], factors.get("mid"))
    if "hada_w1_a" in factors:
        first, second = (_whole(factors, f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
        return first * second
    if "lokr_w1" in factors or "lokr_w1_a" in factors:
        first, second = (_whole(factors, f"lokr_w{i}", f"lokr_t{i}") for i in (1, 2))
        return torch.kron(first, second.flatten(1))
    return factors.get("diff")


def shape(factors: Factors) -> tuple[int, int]:
    """Return the sides of the product as a matrix, o and i h w, without computing it; for a bias o and 1.

    Raises ValueError for factors that do not fit together, and KeyError if one is missing.
    """
    if "up" in factors:
        return _pair_shape(factors["up"], factors["down"], factors.get("mid"))
    if "hada_w1_a" in factors:
        first, second = (_shape_of(factors, f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
        if first != second:
            raise ValueError("the factors do not fit together")
        return first
    if "lokr_w1" in factors or "lokr_w1_a" in factors:
        first, second = (_shape_of(factors, f"lokr_w{i}", f"lokr_t{i}") for i in (1, 2))
        return first[0] * second[0], first[1] * second[1]
    whole = factors["diff"] if "diff" in factors else factors["diff_b"]
    return whole.shape[0], math.prod(whole.shape[1:])


def rank(factors: Factors) -> int | None:
    """Return the rank of the factors; None if none of them is a product, so that alpha has no meaning."""
    names = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    return next((factors[name].shape[0] for name in names if name in factors), None)


def kind(factors: Factors) -> str:
    """Return the kind, such as "LoRA"; "difference" for whole differences."""
    if "size" in factors:
        return "DoRA"
    if "up" in factors:
        return "LoCon" if "mid" in factors or math.prod(factors["down"].shape[2:]) > 1 else "LoRA"
    if "hada_w1_a" in factors:
        return "LoHa"
    return "LoKr" if any(name.startswith("lokr") for name in factors) else "difference"


def norm(change: Change) -> float:
    """Return the Frobenius norm of the change of the weight, or of the bias if only this changes; of DoRA that of C.

    For a product of two factors, |B A|^2 is the sum of (B^T B) * (A A^T), which needs no o i matrix.
    """
    factors = {name: value.float() for name, value in change.factors.items()}
    if "up" in factors and "mid" not in factors:
        up, down = factors["up"].flatten(1).double(), factors["down"].flatten(1).double()
        return abs(change.scale) * math.sqrt(max(((up.T @ up) * (down @ down.T)).sum().item(), 0.0))
    found = product(factors)
    return abs(change.scale) * float((factors["diff_b"] if found is None else found).norm())


def _pair(up: Tensor, down: Tensor, core: Tensor | None = None) -> Tensor:
    """Multiply up: o r or o r 1 1, core: r r h w and down: r i h w or r i, into o (i h w)."""
    if core is None:
        return up.flatten(1) @ down.flatten(1)
    return torch.einsum("mn...,om,ni->oi...", core, up.flatten(1), down.flatten(1)).flatten(1)


def _whole(factors: Factors, name: str, core: str) -> Tensor:
    """Return a matrix of LyCORIS, which may be the product of a: o r and b. With a core a is r o."""
    if name in factors:
        return factors[name]
    a, b = factors[f"{name}_a"], factors[f"{name}_b"]
    return _pair(a.T, b, factors[core]) if core in factors else _pair(a, b)


def _shape_of(factors: Factors, name: str, core: str) -> tuple[int, int]:
    if name in factors:
        rows, *columns = factors[name].shape
        if not columns:
            raise ValueError("the factors do not fit together")
        return rows, math.prod(columns)
    a, b = factors[f"{name}_a"], factors[f"{name}_b"]
    if a.dim() != 2:
        raise ValueError("the factors do not fit together")
    return _pair_shape(a.T if core in factors else a, b, factors.get(core))


def _pair_shape(up: Tensor, down: Tensor, core: Tensor | None) -> tuple[int, int]:
    middle = (down if core is None else core).shape
    if (
        min(up.dim(), down.dim()) < 2
        or math.prod(up.shape[1:]) != middle[0]
        or (core is not None and middle[1] != down.shape[0])
    ):
        raise ValueError("the factors do not fit together")
    return up.shape[0], math.prod(down.shape[1:]) * (1 if core is None else math.prod(middle[2:]))


def sized_axis(size: Tensor) -> int:
    """Return the dimension of the weight whose norms `size` holds: 0, outputs: o or o 1 1 1; 1, inputs: 1 i 1 1."""
    return 1 if size.dim() > 1 and size.shape[0] == 1 else 0


def _resized(weight: Tensor, change: Tensor, size: Tensor) -> Tensor:
    """Return the change that gives weight + change the norms `size`."""
    merged, axis = weight + change, sized_axis(size)
    norms = merged.transpose(0, axis).flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float32).eps)
    shape = [1] * merged.dim()
    shape[axis] = -1
    return merged * (size.flatten() / norms).reshape(shape) - weight
