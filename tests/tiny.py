"""Random models that are small, complete and well scaled: their pictures are neither flat nor saturated."""

import torch
from torch import nn

from ldm.config import ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.models.text import BOS, EOS, TextEncoder, Tokenizer, byte_alphabet
from ldm.models.unet import UNet
from ldm.models.vae import VAE

TINY_RANDOM = ModelConfig(
    name="random",
    unet=UNetConfig(
        channels=(16, 32), res_blocks=1, depth=(0, 1), heads=(2, 2), context_dim=32, norm_groups=8
    ),
    vae=VAEConfig(channels=(16, 16, 16), res_blocks=1, norm_groups=8, scaling_factor=0.5),
    text=(
        TextConfig(width=32, layers=2, heads=2, mlp=64, vocab_size=514, max_length=32, pad_id=513),
    ),
    image_size=32,
    guidance_scale=3.0,
)


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer that knows single bytes, as they stand inside and at the end of a word, and nothing else."""
    alphabet = byte_alphabet()
    tokens = alphabet + [c + "</w>" for c in alphabet] + [BOS, EOS]
    return Tokenizer({token: i for i, token in enumerate(tokens)}, [])


def random_networks(config: ModelConfig = TINY_RANDOM) -> tuple[UNet, VAE, TextEncoder]:
    """Build the three networks of `config`, seeded, so that eps has unit variance and pictures a deviation of 0.4."""
    torch.manual_seed(0)
    unet, vae = UNet(config.unet).eval(), VAE(config.vae).eval()
    text_encoder = TextEncoder(config.text, [byte_tokenizer()]).eval()
    size = config.image_size // config.vae.factor
    latents = torch.randn(2, config.vae.latent_channels, size, size)
    context = torch.randn(2, config.text[0].max_length, config.unet.context_dim)
    with torch.no_grad():
        _scale(unet.conv_out, unet(latents, torch.tensor([900.0, 100.0]), context), 1.0)
        _scale(vae.decoder.conv_out, vae.decode(latents), 0.4)
    return unet, vae, text_encoder


def _scale(layer: nn.Conv2d, output: torch.Tensor, std: float) -> None:
    """Rescale the last layer, so that what was `output` gets the standard deviation `std` around zero."""
    layer.weight *= std / output.std()
    layer.bias.zero_()
