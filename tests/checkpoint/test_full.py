"""SD 1.5 at full size, as a stand-in of official names and shapes: loading, layouts, and diffusers' own reading."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file
from transformers import CLIPTextModel

from ldm.checkpoint.files import identify, load, save
from ldm.checkpoint.single import ldm_tensors
from ldm.config import SD15
from tests.checkpoint.standin import write_standin

pytestmark = pytest.mark.full
RELATIVE = 1e-5  # of the largest value, in fp32: both sum in their own order


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_standin(tmp_path_factory.mktemp("sd15") / "sd15.safetensors")


@pytest.fixture(scope="module")
def folder(file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sd15") / "folder"
    save(load(file, dtype=torch.float16), folder, layout="diffusers")
    return folder


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_file_is_sd15_and_goes_through_both_layouts_bit_for_bit(file, folder):
    assert identify(file).config == SD15
    assert load(folder, dtype=torch.float16).config == SD15
    assert_same(ldm_tensors(load(file, dtype=torch.float16)), load_file(file))
    assert_same(ldm_tensors(load(folder, dtype=torch.float16)), load_file(file))


def test_our_folder_holds_what_diffusers_own_converter_makes_of_the_file(file, folder):
    tensors = load_file(file)
    for part, name, convert in (
        ("unet", "diffusion_pytorch_model", convert_ldm_unet_checkpoint),
        ("vae", "diffusion_pytorch_model", convert_ldm_vae_checkpoint),
    ):
        config = json.loads((folder / part / "config.json").read_text())
        ours = load_file(folder / part / f"{name}.safetensors")
        assert_same(ours, convert(dict(tensors), config))
    clip = convert_ldm_clip_checkpoint(dict(tensors))
    clip = {name: value for name, value in clip.items() if not name.endswith("position_ids")}
    assert_same(load_file(folder / "text_encoder/model.safetensors"), clip)


@torch.no_grad()
def test_networks_equal_diffusers_at_full_size(file, folder):
    ours = load(file)
    torch.manual_seed(0)
    latents, context = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 768)
    images, t = torch.rand(1, 3, 64, 64) * 2 - 1, torch.tensor([500.0])
    scale = SD15.vae.scaling_factor

    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    pairs = {"unet": (ours.unet(latents, t, context), unet(latents, t, context).sample)}
    del unet
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    mean = vae.encode(images).latent_dist.mean * scale
    pairs["vae encode"] = (ours.vae.encode(images).mean, mean)
    pairs["vae decode"] = (ours.vae.decode(latents), vae.decode(latents / scale).sample)
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    ids = ours.text_encoder.towers[0].tokenize(["a photo of a frog on the beach!"])
    found = ours.text_encoder.encode(["a photo of a frog on the beach!"]).context
    pairs["text"] = (found, text(ids)[0])

    differences = {n: float((a - b).abs().max() / b.abs().max()) for n, (a, b) in pairs.items()}
    print(*(f"{name}: {value:.1e}" for name, value in differences.items()), sep=", ")
    assert max(differences.values()) < RELATIVE
    assert all(0.01 < float(a.std()) < 100 for a, _ in pairs.values())  # not dead, not exploded
