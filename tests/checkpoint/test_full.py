"""Every family at full size, as stand-ins of official names and shapes: both layouts, and diffusers' own converter."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.checkpoint.files import convert, identify
from ldm.presets import PRESETS
from tests.checkpoint.standin import official_shapes, write_standin

pytestmark = pytest.mark.full


@pytest.fixture(scope="module", params=["sd15", "sd21-base", "sdxl-base", "sdxl-refiner"])
def converted(request, tmp_path_factory) -> Iterator[tuple[str, Path, Path]]:
    """A preset's name, a file of it in fp16 with random numbers, and the folder that we make of it."""
    place = tmp_path_factory.mktemp(request.param)
    file = write_standin(place / "file.safetensors", official_shapes(request.param))
    convert(file, place / "folder")
    yield request.param, file, place / "folder"
    for path in place.rglob("*.safetensors"):  # up to 14 GB
        path.unlink()


def test_a_file_goes_to_a_folder_and_back_bit_for_bit(converted):
    preset, file, folder = converted
    assert identify(file).config == PRESETS[preset]
    assert identify(folder).config == PRESETS[preset]
    convert(folder, file.with_name("back.safetensors"), layout="ldm")
    with safe_open(file, "pt") as one, safe_open(file.with_name("back.safetensors"), "pt") as two:
        assert set(one.keys()) == set(two.keys())
        for name in one.keys():  # noqa: SIM118  (a handle, not a mapping)
            assert torch.equal(one.get_tensor(name), two.get_tensor(name)), name


def test_our_folder_holds_what_diffusers_own_converter_makes_of_the_file(converted):
    preset, file, folder = converted
    for part, rename in (("unet", convert_ldm_unet_checkpoint), ("vae", convert_ldm_vae_checkpoint)):
        config = json.loads((folder / part / "config.json").read_text())
        ours = load_file(folder / part / "diffusion_pytorch_model.safetensors")
        same(ours, rename(load_file(file), config))
    if preset == "sd15":
        clip = convert_ldm_clip_checkpoint(load_file(file))
        clip = {name: value for name, value in clip.items() if not name.endswith("position_ids")}
        same(load_file(folder / "text_encoder/model.safetensors"), clip)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
