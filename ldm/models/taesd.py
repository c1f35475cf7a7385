"""TAESD: a tiny decoder of Stable Diffusion's latents, for previews (Ollin Boer Bohan 2023).

It has 1.2 million weights; the decoder of Stable Diffusion's VAE has 49 million. The pictures differ in fine detail.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 64  # channels of all layers
FACTOR = 8  # pixels per latent pixel, along each side


class Decoder(nn.Module):
    """Three times: three blocks, then twice the size. The numbers of the layers are those of the author's files."""

    def __init__(self, latent_channels: int = 4) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        layers: list[nn.Module] = [Clamp(), conv(latent_channels, WIDTH), nn.ReLU()]
        for _ in range(3):
            layers += [Block(), Block(), Block(), nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False)]
        self.layers = nn.Sequential(*layers, Block(), conv(WIDTH, 3))

    def forward(self, latents: Tensor) -> Tensor:
        """Map scaled latents: b c h w to images: b 3 8h 8w. Values may lie a little outside [-1, 1]."""
        return self.layers(latents) * 2 - 1


class Clamp(nn.Module):
    """A smooth limit of the latents to the range from -3 to 3."""

    def forward(self, latents: Tensor) -> Tensor:
        """Map b c h w to b c h w."""
        return torch.tanh(latents / 3) * 3


class Block(nn.Module):
    """A residual block of three convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Map b c h w to b c h w."""
        return F.relu(self.conv(x) + x)


def conv(in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Conv2d:
    """Make a 3x3 convolution that keeps the size."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
