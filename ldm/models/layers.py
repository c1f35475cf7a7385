"""The residual block that the UNet and the VAE share."""

import torch.nn.functional as F
from torch import Tensor, nn


class ResBlock(nn.Module):
    """Two convolutions after group norms, with an embedding added between them, around a skip connection."""

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
        """Map x: b c h w to b out_channels h w. emb: b emb_dim, for a block that was built with `emb_dim`."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.emb is not None:
            assert emb is not None
            h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h
