"""CLIP's text transformer (Radford et al. 2021): pre-norm residual blocks of causal self-attention and an MLP.

The operations and their order are those of transformers' `CLIPTextModel`, so that fp32 results are the same bits.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.config import TextConfig


def quick_gelu(x: Tensor) -> Tensor:
    """Return x sigmoid(1.702 x), the approximation of GELU that OpenAI trained CLIP with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class CausalAttention(nn.Module):
    """Multi-head causal self-attention.

    `set_attention` does not change it: its score matrix is small, and it needs the causal mask.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"a text tower {width} wide has no {heads} heads of equal width")
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map x: b n d to b n d."""
        q, k, v = (
            rearrange(project(x), "b n (h d) -> b h n d", h=self.heads) for project in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.to_out(rearrange(attended, "b h n d -> b n (h d)"))
        return out


class Block(nn.Module):
    """Causal self-attention and an MLP, each with pre-norm and a residual connection."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[config.activation]
        self.norm1 = nn.LayerNorm(config.width)
        self.attn = CausalAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map x: b n d to b n d."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.fc2(self.activation(self.fc1(self.norm2(x))))
        return out
