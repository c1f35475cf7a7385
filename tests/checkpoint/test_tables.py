"""The rules against the official lists (by digest), against diffusers' own modules, and its own converter."""

import dataclasses
import hashlib

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.checkpoint import configs, tables
from ldm.checkpoint.keymap import key_map
from ldm.checkpoint.parts import Model, collect
from ldm.checkpoint.single import ldm_tensors
from ldm.config import (
    SD15,
    SD21,
    SDXL_BASE,
    SDXL_REFINER,
    TINY,
    ModelConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from ldm.models.text import TextEncoder, Tokenizer
from ldm.models.unet import UNet
from ldm.models.vae import VAE

PRESETS = {p.name: p.unet for p in (SD15, SD21, SDXL_BASE, SDXL_REFINER, TINY)}
ODD = {
    "one level": UNetConfig(channels=(32,), depth=(1,), heads=(2,), res_blocks=3),
    "uneven depths": UNetConfig(
        channels=(32, 32, 64), depth=(2, 0, 3), heads=(2, 1, 4), res_blocks=1, mid_depth=3
    ),
}
VAES = {
    "sd15": SD15.vae,
    "tiny": TINY.vae,
    "one level": VAEConfig(channels=(32,), res_blocks=3, latent_channels=8),
}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over the sorted lines "name [shape]", which identifies a family of checkpoints."""
    lines = (f"{name} {list(value.shape)}\n" for name, value in sorted(tensors.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def meta(build, *args):
    with torch.device("meta"):
        return build(*args)


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


@pytest.fixture(params=[*PRESETS, *ODD])
def unet(request) -> UNet:
    return meta(UNet, (PRESETS | ODD)[request.param])


@pytest.fixture(params=VAES)
def vae(request) -> VAE:
    return meta(VAE, VAES[request.param])


@pytest.mark.parametrize(
    (
        "in_channels",
        "official",
    ),  # of the names and shapes in the files that Stability and Runway published
    [
        (4, "8130453d4ebe9f46b30a65959d1326fd2827cb5067bd178970ae2a274ec5d1f6"),
        (9, "a8628725d0d3e4a6a0c1c8edaf7474484b9f4453b6f27885b04efe3a420a3147"),  # inpainting
        (8, "722b634d7857c85960bee230800e04b4e9bad678f5d7c3bd2086cd94e8e5f299"),  # instruct-pix2pix
    ],
)
def test_sd15_in_the_ldm_layout_has_exactly_the_official_tensors(in_channels, official, tokenizer):
    config = dataclasses.replace(SD15.unet, in_channels=in_channels)
    text_encoder = meta(TextEncoder, SD15.text, [tokenizer])
    model = Model(SD15, meta(UNet, config), meta(VAE, SD15.vae), text_encoder)
    tensors = ldm_tensors(model)
    assert len(tensors) == 1131
    assert digest(tensors) == official


@pytest.mark.parametrize(
    ("preset", "official"),  # as above, over the tensors below model.diffusion_model alone
    [
        (SD21, "2eadac4df5c94323215ccd1f9f3472bf5556a556b54d1a41336fd7e3ee286b8c"),
        (SDXL_BASE, "3697d2b34c652067c6a960df89b3e19d7a709e8f01c5065cb299cc01d9097157"),
        (SDXL_REFINER, "81981fbe60ab298ad8f54785d9d492aa8c1c7999fa644d552e30240a579d79cb"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_unet_rules_hold_for_every_official_architecture(preset: ModelConfig, official):
    unet = meta(UNet, preset.unet)
    assert digest(collect(unet, tables.ldm_unet(preset.unet), tables.UNET_PREFIX)) == official


def test_diffusers_builds_the_same_unet_from_our_config_under_our_names(unet):
    theirs = meta(UNet2DConditionModel.from_config, configs.unet_to_json(unet.config, 64))
    ours = collect(unet, tables.diffusers_unet(unet.config))
    assert shapes(ours) == shapes(theirs.state_dict())


def test_diffusers_builds_the_same_vae_from_our_config_under_our_names(vae):
    theirs = meta(AutoencoderKL.from_config, configs.vae_to_json(vae.config, 64))
    assert shapes(collect(vae, tables.diffusers_vae())) == shapes(theirs.state_dict())


def test_the_text_rules_strip_what_the_installed_transformers_calls_its_module(
    tokenizer: Tokenizer,
):
    config = TextConfig(width=32, layers=2, heads=2, mlp=64)
    ours = collect(meta(TextEncoder, (config,), [tokenizer]), tables.CLIP_TEXT, "text_model.")
    json = configs.text_to_json(config, tokenizer.bos_id, tokenizer.eos_id)
    theirs = meta(CLIPTextModel, CLIPTextConfig.from_dict(json)).state_dict()
    core = {name.removeprefix("text_model."): tuple(v.shape) for name, v in theirs.items()}
    assert {name.removeprefix("text_model."): s for name, s in shapes(ours).items()} == core
    assert "text_model.encoder.layers.1.mlp.fc2.bias" in ours


@pytest.mark.parametrize("unet", ["sd15", "sd21", "sdxl-base", "sdxl-refiner"], indirect=True)
def test_diffusers_own_converter_takes_each_tensor_from_our_ldm_name_to_our_diffusers_name(unet):
    state = unet.state_dict()
    ldm = key_map(state, tables.ldm_unet(unet.config), tables.UNET_PREFIX)
    config = configs.unet_to_json(unet.config, 64)
    converted = convert_ldm_unet_checkpoint({ldm[key].name: state[key] for key in state}, config)
    names = key_map(state, tables.diffusers_unet(unet.config))
    assert len(converted) == len(state)
    assert all(converted[names[key].name] is state[key] for key in state)


def test_diffusers_own_converter_takes_our_ldm_vae_to_our_diffusers_vae():
    vae = VAE(VAEConfig(channels=(8, 8, 16), res_blocks=1, norm_groups=4))
    ldm = collect(vae, tables.ldm_vae(vae.config), tables.VAE_PREFIX)
    config = configs.vae_to_json(vae.config, 64)
    converted = convert_ldm_vae_checkpoint(ldm, config)
    wanted = collect(vae, tables.diffusers_vae())
    assert converted.keys() == wanted.keys()
    assert all(torch.equal(converted[name], value) for name, value in wanted.items())
