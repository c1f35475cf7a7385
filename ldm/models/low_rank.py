"""Cut the change of a layer to a low rank: C = U S V^T, of which the r largest singular values stay.

B = U S^1/2 and A = S^1/2 V^T are the factors. No matrix of rank r is nearer to C (Eckart and Young 1936).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.config import check_fields, option
from ldm.models.lora import Factors, product


@dataclass(frozen=True)
class Cut:
    """How many singular values of each layer stay. `rank` alone is fixed; with another field it is the most.

    The other fields are those of kohya's scripts: energy is the square of sv_fro, total is sv_cumulative, and ratio is
    sv_ratio. Raises ValueError for no field, and for two of these three.
    """

    rank: int | None = option(None, "the rank; with another of these options the highest rank", low=1)
    energy: float | None = option(None, "keep this share of the sum of squared singular values: 0 to 1", low=0, high=1)
    total: float | None = option(None, "keep this share of the sum of singular values: 0 to 1", low=0, high=1)
    ratio: float | None = option(None, "keep singular values above the largest one divided by this: 1 or more", low=1)

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        rules = [name for name in ("energy", "total", "ratio") if getattr(self, name) is not None]
        if len(rules) > 1 or not (rules or self.rank):
            got = " and ".join(rules) or "nothing"
            raise ValueError(f"give a rank, or one of energy, total and ratio, or both; got {got}")

    def of(self, values: Tensor) -> int:
        """Return how many of the descending singular `values` stay, at least 1."""
        count = len(values)
        if self.energy is not None:
            count = _fewest(values.double().square(), self.energy)
        elif self.total is not None:
            count = _fewest(values.double(), self.total)
        elif self.ratio is not None:
            count = int((values > values[0] / self.ratio).sum())
        return max(min(count, len(values), self.rank or count), 1)


def _fewest(parts: Tensor, share: float) -> int:
    """Return how many of the first `parts` have this share of the sum."""
    sums = parts.cumsum(0)
    return int((sums < share * sums[-1]).sum()) + 1


class Cutter:
    """Cuts the changes of layers, and counts the share of the squared singular values that stays."""

    def __init__(self, cut: Cut, device: torch.device | str = "cpu") -> None:
        self.rule, self.device = cut, device
        self.kept = self.all = 0.0

    @property
    def energy(self) -> float:
        """The share so far, over all layers."""
        return self.kept / self.all if self.all else 1.0

    def cut(self, factors: Factors, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return B: o r and A: r i, on the CPU, of the change with these factors, where i may stand for i h w."""
        left, values, right = decomposed({n: v.to(self.device, torch.float32) for n, v in factors.items()}, scale)
        rank, squares = self.rule.of(values), values.double().square()
        self.kept += float(squares[:rank].sum())
        self.all += float(squares.sum())
        root = values[:rank].sqrt()
        return (left[:, :rank] * root).cpu(), (root[:, None] * right[:rank]).cpu()


def decomposed(factors: Factors, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return U: o k, S: k and V^T: k i of a change. For the narrow factors B and A, k is their rank."""
    if "up" in factors and "mid" not in factors:
        (left, first), (right, second) = map(torch.linalg.qr, (factors["up"].flatten(1), factors["down"].flatten(1).T))
        u, values, v = torch.linalg.svd(scale * first @ second.T, full_matrices=False)
        return left @ u, values, v @ right.T
    found = product(factors)
    if found is None:
        raise ValueError("only a change of a weight has singular values")
    u, values, v = torch.linalg.svd(scale * found.flatten(1), full_matrices=False)
    return u, values, v
