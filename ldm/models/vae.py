"""The variational autoencoder: images in [-1, 1] to latents that are f = 2^(levels - 1) times smaller, and back.

Latents are scaled by `VAEConfig.scaling_factor`, so that their variance is about 1.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.config import VAEConfig
from ldm.models.attention import Attend, sdpa
from ldm.models.layers import ResBlock


class Gaussian(NamedTuple):
    """A normal distribution over latents with independent elements. mean, std: b c h w."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Return mean + std * noise. noise: b c h w of unit variance (default: drawn from torch's global generator)."""
        return self.mean + self.std * (torch.randn_like(self.mean) if noise is None else noise)

    def mode(self) -> Tensor:
        """Return the most likely latents, the mean."""
        return self.mean


class VAE(nn.Module):
    """The autoencoder of latent diffusion (Rombach et al. 2022)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        moments = 2 * config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, images: Tensor) -> Gaussian:
        """Encode images: b 3 h w in [-1, 1] as a distribution over scaled latents: b c h/f w/f.

        Raises ValueError if h or w is not a multiple of f.
        """
        self.check_size(images)
        return self.gaussian(self.encoder(images))

    def check_size(self, images: Tensor) -> None:
        """Raise ValueError if h or w of images: b 3 h w is not a multiple of f."""
        f = self.config.factor
        height, width = images.shape[-2:]
        if height % f or width % f:
            raise ValueError(
                f"image height and width must be multiples of {f}, got {height}x{width}: resize or pad the image"
            )

    def gaussian(self, moments: Tensor) -> Gaussian:
        """Turn the output of `encoder`, b 2c h w, into the distribution of scaled latents."""
        mean, logvar = self.quant_conv(moments).chunk(2, dim=1)
        std = torch.exp(0.5 * logvar.clamp(-30, 20))  # LDM's clamp
        return Gaussian(mean * self.config.scaling_factor, std * self.config.scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents: b c h w as images: b 3 h*f w*f. Values may lie a little outside [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))


class Encoder(nn.Module):
    """Images to the mean and log-variance of latents: levels of residual blocks, each at half the resolution."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        first, last = config.channels[0], config.channels[-1]
        self.conv_in = nn.Conv2d(3, first, 3, padding=1)
        ins = (first, *config.channels[:-1])
        self.levels = nn.ModuleList(
            Level(
                a, b, blocks=config.res_blocks, groups=config.norm_groups, resample="down" if i < len(ins) - 1 else None
            )
            for i, (a, b) in enumerate(zip(ins, config.channels, strict=True))
        )
        self.mid = Middle(last, config.norm_groups)
        self.norm_out = nn.GroupNorm(config.norm_groups, last, eps=1e-6)
        self.conv_out = nn.Conv2d(last, 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map b 3 h w to the mean and log-variance, b 2c h/f w/f, before `quant_conv`."""
        h = self.conv_in(images)
        for level in self.levels:
            h = level(h)
        h = self.mid(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents to images: the middle, then levels of residual blocks, each at twice the resolution."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid = Middle(channels[0], config.norm_groups)
        ins = (channels[0], *channels[:-1])
        self.levels = nn.ModuleList(
            Level(
                a,
                b,
                blocks=config.res_blocks + 1,
                groups=config.norm_groups,
                resample="up" if i < len(ins) - 1 else None,
            )
            for i, (a, b) in enumerate(zip(ins, channels, strict=True))
        )
        self.norm_out = nn.GroupNorm(config.norm_groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Map b c h w, after `post_quant_conv`, to b 3 h*f w*f."""
        h = self.mid(self.conv_in(latents))
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Level(nn.Module):
    """Residual blocks at one resolution, then the change to the next resolution."""

    def __init__(
        self, in_channels: int, out_channels: int, *, blocks: int, groups: int, resample: Literal["down", "up"] | None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResBlock(in_channels if i == 0 else out_channels, out_channels, groups=groups, eps=1e-6)
            for i in range(blocks)
        )
        self.downsample = nn.Conv2d(out_channels, out_channels, 3, stride=2) if resample == "down" else None
        self.upsample = nn.Conv2d(out_channels, out_channels, 3, padding=1) if resample == "up" else None

    def forward(self, x: Tensor) -> Tensor:
        """Map b c h w to b c' h' w'."""
        for block in self.blocks:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(F.pad(x, (0, 1, 0, 1)))  # LDM's VAE pads right and bottom only
        if self.upsample is not None:
            x = self.upsample(F.interpolate(x, scale_factor=2, mode="nearest"))
        return x


class Middle(nn.Module):
    """Residual block, self-attention, residual block, at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.res_in = ResBlock(channels, channels, groups=groups, eps=1e-6)
        self.attn = PixelAttention(channels, groups)
        self.res_out = ResBlock(channels, channels, groups=groups, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Map b c h w to b c h w."""
        return self.res_out(self.attn(self.res_in(x)))


class PixelAttention(nn.Module):
    """Self-attention with one head over all pixels, added to its input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attend: Attend = sdpa
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map b c h w to b c h w."""
        h = rearrange(self.norm(x), "b c h w -> b 1 (h w) c")  # one head
        h = self.to_out(self.attend(self.to_q(h), self.to_k(h), self.to_v(h)))
        # The sum takes the memory layout of its first term, channels last, in which the next layers are faster.
        return rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[-2]) + x
