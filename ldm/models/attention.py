"""Scaled dot-product attention as three interchangeable functions of one signature.

`softmax(q k^T / sqrt(d)) v` (Vaswani et al. 2017, eq. 1), always on tensors of shape b h n d. A module
holds the function it uses as its attribute `attend`; `set_attention` changes it for a whole network.
"""

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def math_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by the formula, holding all b h n m scores; inside, a softmax computes in fp32 at least.

    q: b h n d. k, v: b h m d. Returns b h n d in q's dtype.
    """
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)  # b h n m
    return scores.softmax(dim=-1) @ v


def sliced_attention(q: Tensor, k: Tensor, v: Tensor, *, budget: int = 2**21) -> Tensor:
    """Attend to a slice of query rows at a time, so that at most `budget` scores exist at once.

    Exact: a softmax runs over keys, so query rows are independent. At least one row of one batch and head is always
    taken, whatever the budget. Shapes as in `math_attention`. Raises ValueError for a budget below 1.
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
    """Attend with PyTorch's fused kernels, which never hold the score matrix where the hardware allows it.

    Shapes as in `math_attention`.
    """
    return F.scaled_dot_product_attention(q, k, v)


def set_attention(module: nn.Module, attend: Attend) -> None:
    """Make every attention layer inside `module` use `attend`."""
    for part in module.modules():
        if hasattr(part, "attend"):
            part.attend = attend  # type: ignore[assignment]  # mypy sees any attribute as a tensor
