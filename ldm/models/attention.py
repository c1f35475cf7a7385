"""Scaled dot-product attention as three functions with the same arguments: q, k, v of shape b h n d.

`softmax(q k^T / sqrt(d)) v` (Vaswani et al. 2017, eq. 1). An attention layer calls its attribute `attend`, which is one
of these functions. `set_attention` changes it for a whole network.
"""

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def math_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by the formula, with all b h n m scores in memory. The softmax computes in fp32 or better.

    q: b h n d. k, v: b h m d. Returns b h n d in the dtype of q.
    """
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)  # b h n m
    return scores.softmax(dim=-1) @ v


def sliced_attention(q: Tensor, k: Tensor, v: Tensor, *, budget: int = 2**21) -> Tensor:
    """Attend by the formula to a few query rows at a time, so that at most `budget` scores are in memory.

    The result is exact: the softmax runs over keys, so that query rows do not depend on each other. A slice has at
    least one row of one head, even if this exceeds the budget. Shapes as in `math_attention`.
    Raises ValueError for a budget below 1.
    """
    if budget < 1:
        raise ValueError(f"the attention budget must be at least 1 score element, got {budget}")
    b, h, n, _ = q.shape
    out = q.new_empty(b, h, n, v.shape[-1])
    rows_at_once = max(1, budget // k.shape[-2])
    pairs = max(1, rows_at_once // n)  # whole (batch, head) pairs that fit together
    rows = min(n, rows_at_once)
    q_, k_, v_, out_ = (t.flatten(0, 1) for t in (q, k, v, out))  # (b h) n d
    for i in range(0, b * h, pairs):
        for j in range(0, n, rows):
            part = slice(i, i + pairs), slice(j, j + rows)
            out_[part] = math_attention(q_[part], k_[i : i + pairs], v_[i : i + pairs])
    return out


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with PyTorch's fused kernels. Where the hardware has them, no score matrix is in memory.

    Shapes as in `math_attention`.
    """
    return F.scaled_dot_product_attention(q, k, v)


def set_attention(module: nn.Module, attend: Attend) -> None:
    """Make every attention layer inside `module` use `attend`."""
    for part in module.modules():
        if hasattr(part, "attend"):
            part.attend = attend  # type: ignore[assignment]  # mypy sees any attribute as a tensor
