"""More instances of each kind of fault in users' files: prefixes, words, towers, configurations. All hollow."""

import json
import shutil
from dataclasses import replace

import pytest

from ldm.checkpoint import tables
from ldm.checkpoint.files import identify
from ldm.checkpoint.parts import collect
from ldm.checkpoint.tables import UNET_PREFIX, VAE_PREFIX
from ldm.cli.inspect import inspect
from ldm.presets import SD15, SD21, SD21_BASE, SDXL_BASE
from tests.checkpoint.standin import hollow_model, official_shapes, write_hollow
from tests.checkpoint.test_folders_of_all_ages import (
    DECODER,
    SD1,
    SD1_UNET,
    SD2,
    SDXL,
    SDXL_UNET,
    VAE,
    scheduler,
    vocabulary,  # noqa: F401  # a fixture
    write_folder,
    write_json,
)
from tests.sparse import sparse

BIG_G = "conditioner.embedders.1.model."
MATRIX = f"{UNET_PREFIX}input_blocks.4.1.proj_in"


def tower(config, number=0):
    """The names and shapes of a preset's text tower, as transformers has them."""
    held = collect(hollow_model(config).text_encoder.towers[number], tables.hf_text())
    return {name: tuple(value.shape) for name, value in held.items()}


def behind(prefix, shapes):
    return {prefix + name: shape for name, shape in shapes.items()}


@pytest.mark.parametrize("owner", [BIG_G, f"{BIG_G}transformer.", "conditioner.embedders.1.transformer."])
def test_sdxls_second_tower_is_read_under_transformers_names(owner, tmp_path):
    shapes = {n: s for n, s in official_shapes("sdxl-base").items() if not n.startswith(BIG_G)}
    found = identify(write_hollow(tmp_path / "m", shapes | behind(owner, tower(SDXL_BASE, 1))))
    assert found.config == SDXL_BASE
    assert found.source.notes == ()


@pytest.mark.parametrize("prefix", ["", "clip_h.transformer.", "text_encoders.clip_h.transformer."])
def test_a_whole_sd2_tower_under_transformers_names_gives_its_first_23_layers(prefix, tmp_path):
    shapes = tower(SD21)
    shapes |= {n.replace("layers.22.", "layers.23."): s for n, s in shapes.items() if "layers.22." in n}
    part = write_hollow(tmp_path / "clip", behind(prefix, shapes))
    model = write_hollow(tmp_path / "m", official_shapes("sd21"))
    found = identify(model, replace={"text_encoder": part})
    assert found.config == SD21_BASE
    assert len(found.networks[2].towers[0].blocks) == 23
    assert found.source.notes == ()


@pytest.mark.parametrize(
    ("word", "prediction", "zero_snr"),
    sparse(
        [
            ('"v"', "v", False),
            ('["v_prediction"]', "v", False),
            ("v_pred+zsnr", "v", True),
            ("v (ZTSNR)", "v", True),
            ("v-parameterization", "v", False),
            ("VPrediction", "v", False),
            ("'epsilon'", "eps", False),
        ],
        3,
    ),
)
def test_a_word_in_metadata_is_known_whatever_stands_around_it(word, prediction, zero_snr, tmp_path):
    path = write_hollow(tmp_path / "m", official_shapes("sdxl-base"), {"modelspec.prediction_type": word})
    found = identify(path)
    assert (found.prediction, found.config.diffusion.zero_terminal_snr) == (prediction, zero_snr)
    assert found.source.notes == ()


@pytest.mark.parametrize(
    ("leftover", "dtype"),
    [(f"{UNET_PREFIX}scaled_fp8", "F8_E4M3"), (f"{MATRIX}.comfy_quant", "U8"), (f"{MATRIX}.weight", "I8")],
)
def test_quantized_numbers_are_refused_and_inspect_says_so(leftover, dtype, tmp_path):
    shapes = official_shapes("sd15")
    shapes = shapes | {leftover: shapes.get(leftover, (2,))}
    path = write_hollow(tmp_path / "m", shapes, dtypes={leftover: dtype})
    with pytest.raises(ValueError, match=r"is quantized, its numbers need scales"):
        identify(path)
    assert "is quantized" in inspect(path).problem


@pytest.mark.parametrize("stem", ["fixFP16ErrorsSDXLLowerMemoryUse_v10", "sdxlVAE", "xlVAEC_c91"])
def test_sdxls_vae_is_told_by_names_with_letters_after_xl(stem, tmp_path):
    vae = {n.removeprefix(VAE_PREFIX): s for n, s in official_shapes("sd15").items() if n.startswith(VAE_PREFIX)}
    path = write_hollow(tmp_path / f"{stem}.safetensors", vae)
    found = identify(write_hollow(tmp_path / "m", official_shapes("sd15")), replace={"vae": path})
    assert "made for latents scaled by 0.13025" in found.why


# Folders.

EDM = scheduler("EDMDPMSolverMultistepScheduler", sigma_max=80.0, sigma_min=0.002)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (replace(SDXL, scheduler=EDM, vae=VAE | {"latents_mean": [0.1]}), "EDMDPMSolverMultistepScheduler"),
        (replace(SDXL, unet=SDXL_UNET | {"in_channels": 13, "encoder_hid_dim": 1280}), "virtual try-on"),
    ],
)
def test_a_folder_that_is_refused_for_two_reasons_is_called_what_it_is(made, message, tmp_path, vocabulary):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        identify(write_folder(tmp_path / "m", made, vocabulary))


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"sample_size": [96, 96]}, 768),
        ({"sample_size": [64, 96]}, 768),
        ({"sample_size": []}, 512),
        ({"sample_size": 0}, 512),
        ({"sample_size": True}, 512),
        ({"only_cross_attention": [False] * 4, "dropout": 0.1}, 512),
    ],
)
def test_harmless_values_of_a_unets_config_load(changes, size, tmp_path, vocabulary):  # noqa: F811
    found = identify(write_folder(tmp_path / "m", replace(SD1, unet=SD1_UNET | changes), vocabulary))
    assert found.config == replace(SD15, image_size=size)
    assert found.source.notes == ()


@pytest.mark.parametrize("said", [None, ["CLIPTextModel"]])
def test_a_text_encoders_class_is_that_of_the_index(said, tmp_path, vocabulary):  # noqa: F811
    root = write_folder(tmp_path / "m", SDXL, vocabulary)
    path = root / "text_encoder_2" / "config.json"
    write_json(path, json.loads(path.read_text()) | {"architectures": said})
    assert identify(root).config == SDXL_BASE


def test_lcms_last_step_has_no_alpha_to_note(tmp_path, vocabulary):  # noqa: F811
    made = replace(SD1, scheduler=scheduler("LCMScheduler", set_alpha_to_one=True, original_inference_steps=50))
    found = identify(write_folder(tmp_path / "m", made, vocabulary))
    assert found.config.diffusion.spacing == "lcm"
    assert found.source.notes == ()


def test_a_model_with_lcms_scheduler_samples_as_one_without_the_scale_as_an_input(tmp_path, vocabulary):  # noqa: F811
    found = identify(write_folder(tmp_path / "m", replace(SD1, scheduler=scheduler("LCMScheduler")), vocabulary)).config
    assert (found.name, found.sampler, found.steps, found.guidance_scale) == ("sd15", "lcm", 4, 1.0)


@pytest.mark.parametrize("token", [["!"], {"lstrip": False}, 5])
def test_a_padding_token_that_is_no_token_is_an_error(token, tmp_path, vocabulary):  # noqa: F811
    made = replace(SD2, tokenizers=({"tokenizer_config": DECODER | {"pad_token": token}},))
    with pytest.raises(ValueError, match=r"tokenizer pads with .*, which is not in its vocabulary"):
        identify(write_folder(tmp_path / "m", made, vocabulary))


def test_a_folder_quantized_by_bitsandbytes_is_called_so(tmp_path, vocabulary):  # noqa: F811
    root = write_folder(tmp_path / "m", SD1, vocabulary)
    shapes = tower(SD15) | {"text_model.encoder.layers.0.mlp.fc1.weight.absmax": (36864,)}
    write_hollow(root / "text_encoder" / "model.safetensors", shapes)
    with pytest.raises(ValueError, match=r"text_encoder.model\.safetensors is quantized"):
        identify(root)


def test_a_folder_around_a_model_or_a_pickle_names_it(tmp_path, vocabulary):  # noqa: F811
    root = write_folder(tmp_path / "outer" / "model", SD1, vocabulary)
    with pytest.raises(ValueError, match=rf"give the folder in it that does, {root}$"):
        identify(root.parent)
    shutil.rmtree(root)
    (root.parent / "sd.ckpt").touch()
    with pytest.raises(ValueError, match=r"give a file in it, such as .*sd\.ckpt"):
        identify(root.parent)


@pytest.mark.parametrize("key", ["mid_block_type", "addition_embed_type"])
def test_a_config_that_lost_a_part_of_the_unet_which_its_weights_have_is_refused(key, tmp_path, vocabulary):  # noqa: F811
    root = write_folder(tmp_path / "model", SDXL, vocabulary)
    write_json(root / "unet" / "config.json", SDXL_UNET | {key: None})
    with pytest.raises(ValueError, match=r"unexpected|describes no model|of different families"):
        identify(root)
