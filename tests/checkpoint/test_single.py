"""Single-file checkpoints: what they are, told from the header alone. The files are hollow: headers without data."""

import dataclasses
import json

import pytest
import torch

from ldm.checkpoint import tables
from ldm.checkpoint.files import identify, load
from ldm.checkpoint.parts import collect
from ldm.checkpoint.single import METADATA_KEY
from ldm.config import SD15, SD21, SDXL_BASE, SDXL_REFINER, ModelConfig, UNetConfig
from ldm.models.unet import UNet
from tests.checkpoint.standin import SCHEDULE, ema_shapes, official_shapes, write_hollow

UNET, VAE = tables.UNET_PREFIX, tables.VAE_PREFIX
TEXT = "cond_stage_model.transformer.text_model."


@pytest.fixture(scope="module")
def official() -> dict[str, tuple[int, ...]]:
    return official_shapes("sd15")


def unet_shapes(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        tensors = collect(UNet(config), tables.ldm_unet(config), UNET)
    return {name: tuple(value.shape) for name, value in tensors.items()}


def test_sd15_is_told_from_its_shapes(official, tmp_path):
    identity = identify(write_hollow(tmp_path / "model.safetensors?download=true", official))
    assert identity.config == SD15
    assert identity.preset == "sd15"
    assert identity.prediction_type == "eps"
    assert identity.layout == "ldm"
    assert identity.why == (
        "320 model channels and text of width 768 are Stable Diffusion 1.x, which predicts eps; "
        "nothing in it says otherwise"
    )


@pytest.mark.parametrize(("in_channels", "name"), [(9, "inpainting"), (8, "instruct-pix2pix")])
def test_variants_of_sd15_are_told_from_their_input_channels(in_channels, name, official, tmp_path):
    shapes = official | {f"{UNET}input_blocks.0.0.weight": (320, in_channels, 3, 3)}
    identity = identify(write_hollow(tmp_path / "file", shapes))
    assert identity.preset == f"sd15-{name}"
    assert identity.config.unet == dataclasses.replace(SD15.unet, in_channels=in_channels)


def test_metadata_can_make_it_a_v_model(official, tmp_path):
    path = write_hollow(tmp_path / "file", official, {"modelspec.prediction_type": "v"})
    identity = identify(path)
    assert (identity.preset, identity.prediction_type) == ("sd15", "v")
    assert identity.why.endswith("its metadata says 'v'")


def test_distilled_depths_and_fewer_levels_are_told_from_the_shapes(official, tmp_path):
    unet = UNetConfig(
        channels=(320, 640, 1280), depth=(2, 0, 1), heads=(8, 8, 8), res_blocks=1, mid_depth=2
    )
    rest = {name: shape for name, shape in official.items() if not name.startswith(UNET)}
    identity = identify(write_hollow(tmp_path / "file", rest | unet_shapes(unet)))
    assert identity.config.unet == unet
    assert (identity.preset, identity.config.vae) == ("custom", SD15.vae)


@pytest.mark.parametrize(
    ("preset", "family"),
    [
        (SD21, "Stable Diffusion 2"),
        (SDXL_BASE, "Stable Diffusion XL"),
        (SDXL_REFINER, "the Stable Diffusion XL refiner"),
        (
            ModelConfig(unet=UNetConfig(channels=(64,), depth=(1,), heads=(1,))),
            "no family known here",
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_other_families_are_refused_by_name(preset, family, tmp_path):
    path = write_hollow(tmp_path / "file", unet_shapes(preset.unet))
    with pytest.raises(
        ValueError, match=rf"file is {family} \(\d+ model channels and text of width"
    ):
        identify(path)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("emb_params", "a textual-inversion embedding"),
        ("down_blocks.0.resnets.0.conv1.weight", "the unet of a diffusers folder"),
        ("input_blocks.0.0.weight", "a UNet alone"),
        ("first_stage_model.encoder.conv_in.weight", "a VAE alone"),
        ("decoder.conv_in.weight", "a VAE alone"),
        ("text_model.embeddings.token_embedding.weight", "a text encoder alone"),
        ("model.diffusion_model.double_blocks.0.img_attn.proj.weight", "a Flux transformer"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight", "a Stable Diffusion 3"),
    ],
)
def test_files_of_another_kind_are_refused_by_name(name, what, tmp_path):
    with pytest.raises(
        ValueError, match=f"file is {what}.*not a whole model: give a full checkpoint"
    ):
        load(write_hollow(tmp_path / "file", {name: (2, 2)}))


def test_files_of_no_known_kind_show_some_names(tmp_path):
    with pytest.raises(
        ValueError, match=r"lacks model\.diffusion_model\.\*; it has bert\.w, gpt\.w"
    ):
        identify(write_hollow(tmp_path / "file", {"gpt.w": (2,), "bert.w": (2,)}))
    with pytest.raises(ValueError, match="it has no tensors"):
        identify(write_hollow(tmp_path / "empty", {}))


@pytest.mark.parametrize(("prefix", "what"), [(VAE, "VAE"), (TEXT, "text encoder")])
def test_a_checkpoint_without_a_component_is_refused(prefix, what, official, tmp_path):
    shapes = {name: shape for name, shape in official.items() if not name.startswith(prefix)}
    with pytest.raises(ValueError, match=f"has no {what} .*give a full checkpoint"):
        identify(write_hollow(tmp_path / "file", shapes))


def test_a_checkpoint_without_a_tensor_that_tells_the_architecture_is_incomplete(
    official, tmp_path
):
    shapes = {name: shape for name, shape in official.items() if not name.endswith("out.2.weight")}
    with pytest.raises(
        ValueError, match=r"is incomplete, it lacks model\.diffusion_model\.out\.2\.weight"
    ):
        identify(write_hollow(tmp_path / "file", shapes))
    shapes = official | {f"{VAE}decoder.conv_in.weight": (512,)}
    with pytest.raises(
        ValueError, match=r"decoder\.conv_in\.weight in .*file has the shape \[512\]"
    ):
        identify(write_hollow(tmp_path / "file", shapes))


def test_wrong_metadata_of_our_own_is_named(official, tmp_path):
    for text, message in (
        ("{", "metadata ldm.config is not valid JSON"),
        ("[]", "must be a JSON object, got list"),
        (json.dumps({"nme": "x"}), "unknown 'nme'; valid keys: name, unet"),
    ):
        with pytest.raises(ValueError, match=message):
            identify(write_hollow(tmp_path / "file", official, {METADATA_KEY: text}))


def test_tensors_that_do_not_fit_their_metadata_are_named_with_the_preset_that_fits(
    official, tmp_path
):
    config = json.dumps({"unet": {"context_dim": 1024}, "text": [{"width": 1024, "heads": 16}]})
    path = write_hollow(tmp_path / "file", official, {METADATA_KEY: config})
    with pytest.raises(
        ValueError, match=r"the unet in .* does not match its configuration"
    ) as caught:
        load(path)
    message = str(caught.value)
    assert "32 of another shape: model.diffusion_model.input_blocks.1.1" in message
    assert "attn2.to_k.weight [320, 768] instead of [320, 1024], " in message
    assert message.endswith("; they fit the preset sd15")
