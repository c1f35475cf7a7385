"""The rules against the official lists (by digest), against diffusers' own modules, and its own converter."""

import dataclasses
import hashlib

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.checkpoint import configs, tables
from ldm.checkpoint.keymap import key_map
from ldm.checkpoint.parts import collect
from ldm.config import TextConfig, UNetConfig, VAEConfig
from ldm.models.text import TextTower
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.presets import RELATIVES, SD15, SD21, SDXL_BASE, SDXL_REFINER, TINY
from tests.checkpoint.standin import official_shapes

PRESETS = {p.name: p.unet for p in (SD15, SD21, SDXL_BASE, SDXL_REFINER, TINY)}
ODD = {
    "one level": UNetConfig(channels=(32,), depth=(1,), heads=(2,), res_blocks=3),
    "uneven depths": UNetConfig(channels=(32, 32, 64), depth=(2, 0, 3), heads=(2, 1, 4), res_blocks=1, mid_depth=3),
    "a depth per block": UNetConfig(
        channels=(32, 32, 64),
        depth=((2, 1), 0, (3, 1)),
        up_depth=((1, 1, 2), (1, 2, 1), 0),
        heads=(2, 1, 4),
        mid_depth=3,
    ),
    "told its guidance": dataclasses.replace(SD15.unet, guidance_dim=256),
    **RELATIVES,
}
VAES = {"sd15": SD15.vae, "tiny": TINY.vae, "one level": VAEConfig(channels=(32,), res_blocks=3, latent_channels=8)}


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
    ("preset", "in_channels", "count", "official"),
    [  # of the names and shapes in the files that Stability, Runway and Timothy Brooks published
        ("sd15", 4, 1131, "8130453d4ebe9f46b30a65959d1326fd2827cb5067bd178970ae2a274ec5d1f6"),
        ("sd15", 9, 1131, "a8628725d0d3e4a6a0c1c8edaf7474484b9f4453b6f27885b04efe3a420a3147"),
        ("sd15", 8, 1131, "722b634d7857c85960bee230800e04b4e9bad678f5d7c3bd2086cd94e8e5f299"),
        ("sd21", 4, 1228, "bc301c57b82f26ff9b42a65ed19c6a0b649e7d4b8d7cab43c9991fc73bba95d2"),
        ("sd21-base", 9, 1228, "355baa9f981284602155fd7c3d97ce343e08bef8901c20232145da3c377c204e"),
        ("sdxl-base", 4, 2515, "2086c2ba91745f921763779e5e7d19ed40cf689f25c1dd929bb509a000f8cb6e"),
        ("sdxl-refiner", 4, 1858, "654d6f478f8e71195c517ebcaf5327d0b28862e8abe9b34200f3e6eb3f7e8e93"),
    ],
)
def test_a_model_in_the_ldm_layout_has_exactly_the_official_tensors(preset, in_channels, count, official):
    tensors = official_shapes(preset, in_channels)
    lines = (f"{name} {list(shape)}\n" for name, shape in sorted(tensors.items()))
    assert len(tensors) == count
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == official


def test_ssd_1b_in_the_ldm_layout_is_sdxl_without_what_its_authors_removed():
    depths = {"input_blocks.7": 4, "input_blocks.8": 4, "output_blocks.0": 4, "output_blocks.1": 4}
    depths |= {"output_blocks.4": 1, "output_blocks.5": 1}

    def kept(name):
        block, found, inside = name.removeprefix(tables.UNET_PREFIX).partition(".1.transformer_blocks.")
        return not found or int(inside.split(".")[0]) < depths.get(block, 10)

    teacher = {
        name: shape
        for name, shape in official_shapes("sdxl-base").items()
        if name.startswith(tables.UNET_PREFIX)
        and not name.startswith(tuple(f"{tables.UNET_PREFIX}middle_block.{i}." for i in (1, 2)))
        and kept(name)
    }
    config = RELATIVES["SSD-1B"]
    assert shapes(collect(meta(UNet, config), tables.ldm_unet(config), tables.UNET_PREFIX)) == teacher


def test_the_embedding_of_the_guidance_has_the_name_that_converters_leave_it():
    config = ODD["told its guidance"]
    names = shapes(collect(meta(UNet, config), tables.ldm_unet(config), tables.UNET_PREFIX))
    assert names["model.diffusion_model.time_embedding.cond_proj.weight"] == (320, 256)
    assert len(names) == 687


def test_diffusers_builds_the_same_unet_from_our_config_under_our_names(unet):
    theirs = meta(UNet2DConditionModel.from_config, configs.unet_to_json(unet.config, 64))
    ours = collect(unet, tables.diffusers_unet(unet.config))
    assert shapes(ours) == shapes(theirs.state_dict())


def test_diffusers_builds_the_same_vae_from_our_config_under_our_names(vae):
    theirs = meta(AutoencoderKL.from_config, configs.vae_to_json(vae.config, 64))
    assert shapes(collect(vae, tables.diffusers_vae())) == shapes(theirs.state_dict())


@pytest.mark.parametrize("projection", [None, 48])
def test_the_text_rules_give_the_names_of_transformers_modules_whatever_its_version(projection, tokenizer):
    config = TextConfig(width=32, layers=2, heads=2, mlp=64)
    if projection:
        config = dataclasses.replace(config, projection=projection, output_layer=-2, final_norm=False)
    ours = collect(meta(TextTower, config, tokenizer), tables.hf_text())
    sdxl = projection is not None
    json = configs.text_to_json(config, tokenizer.bos_id, tokenizer.eos_id, sdxl=sdxl)
    kind = CLIPTextModelWithProjection if sdxl else CLIPTextModel
    theirs = meta(kind, CLIPTextConfig.from_dict(json)).state_dict()
    core = {name.removeprefix("text_model."): tuple(v.shape) for name, v in theirs.items()}
    assert {name.removeprefix("text_model."): s for name, s in shapes(ours).items()} == core
    assert "text_model.encoder.layers.1.mlp.fc2.bias" in ours


def test_diffusers_own_converter_takes_our_openclip_tower_to_our_tower_of_transformers(tokenizer):
    # 32 layers of width 1280 are what it takes for bigG; no other size splits in_proj and transposes text_projection
    config = dataclasses.replace(SDXL_BASE.text[1], layers=2)
    torch.manual_seed(0)
    tower = TextTower(config, tokenizer)
    ours = collect(tower, tables.OPENCLIP_TEXT, "conditioner.embedders.1.model.")
    json = configs.text_to_json(config, tokenizer.bos_id, tokenizer.eos_id, sdxl=True)
    theirs = meta(CLIPTextModelWithProjection, CLIPTextConfig.from_dict(json))
    converted = convert_open_clip_checkpoint(theirs, dict(ours), prefix="conditioner.embedders.1.model.")
    wanted = collect(tower, tables.hf_text())
    assert converted.keys() - {"text_model.embeddings.position_ids"} == wanted.keys()
    assert all(torch.equal(converted[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("unet", ["sd15", "sd21", "sdxl-base", "sdxl-refiner", *RELATIVES], indirect=True)
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
