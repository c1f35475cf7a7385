"""The residual block that the UNet and the VAE share, and the sinusoidal embeddings of timesteps and guidance."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Embed scalars as cosines, then sines, of dim / 2 geometric frequencies from 1 down to 1/10000.

    timesteps: b, any float or int. Returns b dim in fp32 (Ho et al. 2020, section 4; LDM puts the
    cosines first).
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) * exponents)  # b half
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # b dim


def guidance_embedding(guidance: Tensor, dim: int) -> Tensor:
    """Embed guidance as sines, then cosines, of 1000 w in dim / 2 geometric frequencies from 1 down to 1/10000.

    guidance: b, w = guidance scale - 1. Returns b dim in fp32, as latent consistency models were trained with it (Luo
    et al. 2023): unlike timesteps, sines come first and the last frequency is 1/10000 itself.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=guidance.device)
    frequencies = torch.exp(exponents * (-math.log(10000) / (half - 1)))
    angles = 1000 * guidance.float()[:, None] * frequencies  # b half
    return torch.cat([angles.sin(), angles.cos()], dim=-1)  # b dim


class ResBlock(nn.Module):
    """Two normalised convolutions around an optional embedding, added to their (projected) input."""

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, eps: float, emb_dim: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_dim, out_channels) if emb_dim else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """Map x: b c h w and emb: b emb_dim (needed if the block was built with one) to b out_channels h w."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.emb is not None:
            assert emb is not None
            h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = self.skip(x) + h
        return out
