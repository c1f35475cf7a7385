"""Every family in small: the same plan of networks and towers, with random weights."""

import dataclasses

import torch
from torch import Tensor

from ldm.checkpoint.parts import Model
from ldm.checkpoint.single import ldm_tensors
from ldm.config import ModelConfig, TextConfig
from ldm.models.text import TextEncoder
from ldm.models.tokens import Tokenizer
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.presets import PRESETS

FAMILIES = ("sd15", "sd21-base", "sd21", "sd-turbo", "sdxl-base", "sdxl-refiner", "sdxl-turbo")


def small_config(preset: str) -> ModelConfig:
    """Return the preset with narrow networks; towers are 64 or 128 wide, of two layers."""
    config = PRESETS[preset]
    widths = [64, 128][-len(config.text) :] if config.unet.vector_dim else [64]
    text = tuple(_small_text(t, width) for t, width in zip(config.text, widths, strict=True))
    unet = dataclasses.replace(
        config.unet,
        channels=tuple(32 * (i + 1) for i in range(len(config.unet.channels))),
        depth=tuple(min(d, 2) for d in config.unet.depth),
        mid_depth=min(config.unet.mid_depth, 2),
        heads=tuple(2 for _ in config.unet.heads),
        context_dim=sum(widths),
        vector_dim=128 + 256 * len(config.micro_conditioning) if config.unet.vector_dim else None,
    )
    vae = dataclasses.replace(config.vae, channels=(32, 32, 64, 64))
    return dataclasses.replace(config, name=f"small-{preset}", unet=unet, vae=vae, text=text)


def small_model(preset: str) -> Model:
    """Return it with random weights, nowhere at a special value."""
    torch.manual_seed(0)
    config = small_config(preset)
    tokenizers = [Tokenizer.official()] * len(config.text)
    networks = UNet(config.unet), VAE(config.vae), TextEncoder(config.text, tokenizers)
    for network in networks:
        for parameter in network.eval().requires_grad_(False).parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return Model(config, *networks)


def official_tensors(model: Model) -> dict[str, Tensor]:
    """Return the tensors of an official file of `model`, with numbers in those too that no network here uses."""
    tensors = ldm_tensors(model)
    for name, value in tensors.items():
        if value.is_floating_point():
            tensors[name] = value + 0.01 * torch.randn(value.shape)
    return tensors


def _small_text(text: TextConfig, width: int) -> TextConfig:
    projection = width if text.projection else None
    return dataclasses.replace(text, width=width, layers=2, heads=width // 64, mlp=2 * width, projection=projection)
