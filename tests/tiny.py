"""Random models that are small, complete and well scaled: their pictures are neither flat nor saturated."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from ldm.checkpoint.ip_adapters import RULES
from ldm.checkpoint.parts import collect
from ldm.checkpoint.tensors import write_tensors
from ldm.config import ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.models.controlnet import ControlNet
from ldm.models.ip_adapter import ImageProjection, IPAdapter, Resampler, cross_attentions
from ldm.models.text import TextEncoder
from ldm.models.tokens import BOS, EOS, Tokenizer, byte_alphabet
from ldm.models.unet import UNet
from ldm.models.vae import VAE

HINTS = (8, 8, 16)  # channels of a hint embedding with two halvings, as the VAE below has
TINY_RANDOM = ModelConfig(
    name="random",
    unet=UNetConfig(channels=(16, 32), res_blocks=1, depth=(0, 1), heads=(2, 2), context_dim=32, norm_groups=8),
    vae=VAEConfig(channels=(16, 16, 16), res_blocks=1, norm_groups=8, scaling_factor=0.5),
    text=(TextConfig(width=32, layers=2, heads=2, mlp=64, vocab_size=514, max_length=32, pad_id=513),),
    image_size=32,
    guidance_scale=3.0,
)

_CLIP = TextConfig(*(16, 2, 2, 32), vocab_size=514, max_length=32, pad_id=513, output_layer=-2, final_norm=False)
_OPEN_CLIP = dataclasses.replace(_CLIP, activation="gelu", projection=24, pad_id=0)
TINY_SDXL = dataclasses.replace(
    TINY_RANDOM,
    name="random-sdxl",
    unet=dataclasses.replace(TINY_RANDOM.unet, vector_dim=24 + 6 * 256, linear_projection=True),
    text=(_CLIP, _OPEN_CLIP),
    zero_negative=True,
)
TINY_REFINER = dataclasses.replace(
    TINY_SDXL,
    name="random-refiner",
    unet=dataclasses.replace(TINY_SDXL.unet, context_dim=16, vector_dim=24 + 5 * 256),
    text=(_OPEN_CLIP,),
    zero_negative=False,
)


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer that knows single bytes, as they stand inside and at the end of a word, and nothing else."""
    alphabet = byte_alphabet()
    tokens = alphabet + [c + "</w>" for c in alphabet] + [BOS, EOS]
    return Tokenizer({token: i for i, token in enumerate(tokens)}, [])


def random_networks(
    config: ModelConfig = TINY_RANDOM, tokenizer: Tokenizer | None = None
) -> tuple[UNet, VAE, TextEncoder]:
    """Build the three networks of `config`, seeded, so that eps has unit variance and pictures a deviation of 0.4."""
    torch.manual_seed(0)
    unet, vae = UNet(config.unet).eval(), VAE(config.vae).eval()
    tokenizers = [tokenizer or byte_tokenizer()] * len(config.text)
    text_encoder = TextEncoder(config.text, tokenizers).eval()
    size = config.image_size // config.vae.factor
    latents = torch.randn(2, config.vae.latent_channels, size, size)
    context = torch.randn(2, config.text[0].max_length, config.unet.context_dim)
    vector = torch.randn(2, config.unet.vector_dim) if config.unet.vector_dim else None
    with torch.no_grad():
        predicted = unet(latents, torch.tensor([900.0, 100.0]), context, vector)
        _scale(unet.conv_out, predicted, 1.0)
        _scale(vae.decoder.conv_out, vae.decode(latents), 0.4)
    return unet, vae, text_encoder


def random_controlnet(config: ModelConfig = TINY_RANDOM, seed: int = 1, *, pooled: bool = False) -> ControlNet:
    """Build a ControlNet for the UNet of `config`, seeded, whose outputs are not zero."""
    torch.manual_seed(seed)
    network = ControlNet(config.unet, hint_channels=HINTS, pooled=pooled).eval().requires_grad_(False)
    for layer in (network.hint[-1], *network.zero_convs, network.mid_out):
        layer.weight.normal_(0, 0.1)
        layer.bias.normal_(0, 0.1)
    return network


def random_ip_adapter(
    config: ModelConfig = TINY_RANDOM, seed: int = 1, *, plus: bool = False, image_dim: int = 24
) -> IPAdapter:
    """Build an IP-Adapter for the UNet of `config`, seeded, for image features of width `image_dim`."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        widths = [attention.to_k.out_features for attention in cross_attentions(UNet(config.unet))]
    dim = config.unet.context_dim
    projection = ImageProjection(image_dim, dim, 4)
    if plus:
        projection = Resampler(image_dim, dim, 5, dim=64, mlp=80, layers=2)
    return IPAdapter(projection, image_dim, dim, widths).eval().requires_grad_(False)


def save_ip_adapter(adapter: IPAdapter, path: Path) -> Path:
    """Write an IP-Adapter as its authors do, and return the path."""
    write_tensors(collect(adapter, RULES), path)
    return path


class Tower(nn.Module):
    """Stands for transformers' `CLIPVisionModelWithProjection`: linear, with one hidden state for each quarter."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(hidden_size=width, projection_dim=width, image_size=8)
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.requires_grad_(False)

    def forward(self, pixels: torch.Tensor, output_hidden_states: bool = False) -> SimpleNamespace:
        """Map pixels: b 3 8 8 to an embedding of the picture, and to hidden states: b 4 width."""
        states = self.patches(pixels).flatten(2).transpose(1, 2)
        return SimpleNamespace(image_embeds=states.mean(1), hidden_states=(0 * states, states, 0 * states))


def _scale(layer: nn.Conv2d, output: torch.Tensor, std: float) -> None:
    """Rescale the last layer, so that what was `output` gets the standard deviation `std` around zero."""
    layer.weight *= std / output.std()
    layer.bias.zero_()
