"""The spatial transformer: self-attention over pixels, cross-attention to the text, and a gated MLP."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.attention import Attend, sdpa


class KeysValues(NamedTuple):
    """Keys and values of a cross-attention, b h m d each, for all sampling steps. added: those of image prompts."""

    keys: Tensor
    values: Tensor
    added: tuple[tuple[Tensor, Tensor], ...] = ()


class Attention(nn.Module):
    """Multi-head cross-attention from x to a context, or self-attention without a context.

    upcast: compute attention in fp32 if the network is in fp16. SD 2.1 needs this, because at 768 pixels its attention
      scores exceed the range of fp16.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, *, upcast: bool = False) -> None:
        super().__init__()
        context_dim = context_dim or dim
        self.heads = heads
        self.upcast = upcast
        self.attend: Attend = sdpa
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def project(self, context: Tensor) -> KeysValues:
        """Project context: b m context_dim to keys and values."""
        return KeysValues(self._split(self.to_k(context)), self._split(self.to_v(context)))

    def forward(self, x: Tensor, context: Tensor | KeysValues | None = None) -> Tensor:
        """Map x: b n d with context: b m context_dim, or its keys and values, to b n d."""
        if not isinstance(context, KeysValues):
            context = self.project(x if context is None else context)
        q, (k, v, added) = self._split(self.to_q(x)), context
        if self.upcast and x.dtype == torch.float16:  # bf16 has the range of fp32
            q, k, v = q.float(), k.float(), v.float()
        attended = self.attend(q, k, v).to(x.dtype)
        for keys, values in added:
            attended = attended + self.attend(q, keys.to(q.dtype), values.to(q.dtype)).to(x.dtype)
        return self.to_out(rearrange(attended, "b h n d -> b n (h d)"))

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)


class GEGLU(nn.Module):
    """An MLP, four times as wide as its input, with hidden values gated by a GELU (Shazeer 2020)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 8 * dim)  # values, then gates
        self.out = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map b n d to b n d."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))  # the exact GELU, not the tanh approximation


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and GEGLU, each with pre-norm and a residual connection."""

    def __init__(self, dim: int, heads: int, context_dim: int, *, upcast: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, upcast=upcast)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim, upcast=upcast)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = GEGLU(dim)

    def forward(self, x: Tensor, context: Tensor | KeysValues) -> Tensor:
        """Map x: b n d with context: b m context_dim, or the keys and values of `attn2`, to b n d."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, between two projections, with a residual connection."""

    def __init__(
        self, dim: int, heads: int, context_dim: int, *, depth: int, linear: bool, groups: int, upcast: bool = False
    ) -> None:
        super().__init__()
        self.linear = linear  # linear projections (SD 2, SDXL) or 1x1 convolutions (SD 1), with the same result
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)  # the other norms of the UNet have 1e-5
        self.proj_in = nn.Linear(dim, dim) if linear else nn.Conv2d(dim, dim, 1)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, context_dim, upcast=upcast) for _ in range(depth))
        self.proj_out = nn.Linear(dim, dim) if linear else nn.Conv2d(dim, dim, 1)

    def project(self, context: Tensor) -> list[KeysValues]:
        """Project context: b m context_dim to the keys and values of each block's cross-attention."""
        return [block.attn2.project(context) for block in self.blocks]  # type: ignore[union-attr, operator]

    def forward(self, x: Tensor, context: Tensor | Sequence[KeysValues]) -> Tensor:
        """Map x: b c h w with context: b m context_dim, or the result of `project`, to b c h w."""
        height = x.shape[-2]
        h = self.norm(x)

        h = h if self.linear else self.proj_in(h)
        h = rearrange(h, "b c h w -> b (h w) c")
        h = self.proj_in(h) if self.linear else h

        for i, block in enumerate(self.blocks):
            h = block(h, context if isinstance(context, Tensor) else context[i])

        h = self.proj_out(h) if self.linear else h
        h = rearrange(h, "b (h w) c -> b c h w", h=height)
        h = h if self.linear else self.proj_out(h)
        return x + h
