"""A small model with CLIP's own vocabulary, which both layouts can hold, and helpers to compare models."""

from pathlib import Path

import pytest
import torch

from ldm.checkpoint.files import save
from ldm.checkpoint.parts import Model
from ldm.config import DiffusionConfig, ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.models.text import TextEncoder
from ldm.models.tokens import Tokenizer
from ldm.models.unet import UNet
from ldm.models.vae import VAE

SMALL = ModelConfig(
    name="small",
    unet=UNetConfig(channels=(32, 64), res_blocks=1, depth=(1, 0), heads=(2, 4), context_dim=32, norm_groups=8),
    vae=VAEConfig(channels=(16, 32), res_blocks=1, norm_groups=8, scaling_factor=0.5),
    text=(TextConfig(width=32, layers=2, heads=2, mlp=64),),
    diffusion=DiffusionConfig(prediction="v", spacing="trailing", zero_terminal_snr=True),
    image_size=64,
    guidance_scale=3.0,
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.official()


@pytest.fixture(scope="session")
def small(tokenizer: Tokenizer) -> Model:
    """SMALL with random weights that are nowhere at a special value, not to be changed."""
    torch.manual_seed(0)
    text_encoder = TextEncoder(SMALL.text, [tokenizer])
    model = Model(SMALL, UNet(SMALL.unet), VAE(SMALL.vae), text_encoder)
    for network in model[1:4]:
        for parameter in network.eval().requires_grad_(False).parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="session")
def small_folder(small: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small` in the diffusers layout, not to be changed."""
    folder = tmp_path_factory.mktemp("small") / "folder"
    save(small, folder, layout="diffusers")
    return folder


@pytest.fixture(scope="session")
def small_file(small: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small` in the ldm layout, not to be changed."""
    file = tmp_path_factory.mktemp("small") / "file.safetensors"
    save(small, file, layout="ldm")
    return file
