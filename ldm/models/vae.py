"""The variational autoencoder between images in [-1, 1] and scaled latents, 2^(levels - 1) times smaller."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.config import VAEConfig
from ldm.models.attention import Attend, sdpa
from ldm.models.layers import ResBlock


class Gaussian(NamedTuple):
    """A diagonal normal distribution over latents. mean, std: b c h w."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Draw mean + std * noise; noise: b c h w standard normal, drawn here if not given."""
        return self.mean + self.std * (torch.randn_like(self.mean) if noise is None else noise)

    def mode(self) -> Tensor:
        """Return the most likely latents, the mean."""
        return self.mean


class VAE(nn.Module):
    """Encode images as distributions over latents, decode latents as images (Rombach et al. 2022)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        moments = 2 * config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, images: Tensor) -> Gaussian:
        """Map images: b 3 h w in [-1, 1] to the distribution of their scaled latents: b c h/f w/f.

        Raises ValueError if h or w is not a multiple of f.
        """
        self.check_size(images)
        return self.gaussian(self.encoder(images))

    def check_size(self, images: Tensor) -> None:
        """Raise ValueError if the height or width of images: b 3 h w is not a multiple of f."""
        f = self.config.factor
        height, width = images.shape[-2:]
        if height % f or width % f:
            raise ValueError(
                f"image height and width must be multiples of {f}, got {height}x{width}: resize or pad the image"
            )

    def gaussian(self, moments: Tensor) -> Gaussian:
        """Map the encoder's output: b 2c h w to the distribution of scaled latents."""
        mean, logvar = self.quant_conv(moments).chunk(2, dim=1)
        std = torch.exp(0.5 * logvar.clamp(-30, 20))  # LDM's clamp
        return Gaussian(mean * self.config.scaling_factor, std * self.config.scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Map scaled latents: b c h w to images: b 3 h*f w*f, about [-1, 1] and not clamped."""
        out: Tensor = self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))
        return out


class Encoder(nn.Module):
    """Residual levels with a halving between them, then the middle; images to moments."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        first, last = config.channels[0], config.channels[-1]
        self.conv_in = nn.Conv2d(3, first, 3, padding=1)
        ins = (first, *config.channels[:-1])
        self.levels = nn.ModuleList(
            Level(
                in_channels,
                out_channels,
                blocks=config.res_blocks,
                groups=config.norm_groups,
                downsample=i < len(ins) - 1,
            )
            for i, (in_channels, out_channels) in enumerate(zip(ins, config.channels, strict=True))
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
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class Decoder(nn.Module):
    """The middle, then residual levels with a doubling between them; latents to images."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid = Middle(channels[0], config.norm_groups)
        ins = (channels[0], *channels[:-1])
        self.levels = nn.ModuleList(
            Level(
                in_channels,
                out_channels,
                blocks=config.res_blocks + 1,
                groups=config.norm_groups,
                upsample=i < len(ins) - 1,
            )
            for i, (in_channels, out_channels) in enumerate(zip(ins, channels, strict=True))
        )
        self.norm_out = nn.GroupNorm(config.norm_groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Map b c h w, after `post_quant_conv`, to b 3 h*f w*f."""
        h = self.mid(self.conv_in(latents))
        for level in self.levels:
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class Level(nn.Module):
    """Residual blocks at one resolution, then the step to the next one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        blocks: int,
        groups: int,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResBlock(in_channels if i == 0 else out_channels, out_channels, groups=groups, eps=1e-6)
            for i in range(blocks)
        )
        self.downsample = nn.Conv2d(out_channels, out_channels, 3, stride=2) if downsample else None
        self.upsample = nn.Conv2d(out_channels, out_channels, 3, padding=1) if upsample else None

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
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.res_in = ResBlock(channels, channels, groups=groups, eps=1e-6)
        self.attn = PixelAttention(channels, groups)
        self.res_out = ResBlock(channels, channels, groups=groups, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Map b c h w to b c h w."""
        out: Tensor = self.res_out(self.attn(self.res_in(x)))
        return out


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
        # In this order the sum takes the layout of h, channels last, in which what follows is faster.
        out: Tensor = rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[-2]) + x
        return out
