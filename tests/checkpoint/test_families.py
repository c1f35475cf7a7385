"""Small random models of every family through both layouts: bits, tensors of no use, averages, parts, conversions."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoint.files import convert, identify, load, load_vae, save
from ldm.checkpoint.parts import Model, ema_name
from ldm.checkpoint.single import METADATA_KEY
from tests.checkpoint.families import FAMILIES, official_tensors, small_model

UNET = "model.diffusion_model."


PLANS = ("sd15", "sd21", "sdxl-base", "sdxl-refiner")  # the others have the networks of these


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=pytest.mark.slow if "turbo" in n else ()) for n in FAMILIES]
)
def any_model(request) -> Model:
    return small_model(request.param)


@pytest.fixture(scope="module", params=PLANS)
def model(request) -> Model:
    return small_model(request.param)


def write(path, model: Model, tensors) -> None:
    """Write tensors as a file that carries the configuration of `model`."""
    config = json.dumps(dataclasses.asdict(model.config))
    save_file(tensors, path, metadata={METADATA_KEY: config})


def same_bits(one: Model, other: Model) -> None:
    assert one.config == other.config
    for a, b in zip(one[1:4], other[1:4], strict=True):
        a, b = a.state_dict(), b.state_dict()
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert value.dtype == b[key].dtype, key
            assert torch.equal(value, b[key]), key


def same_tensors(one, other) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_every_family_comes_back_bit_for_bit(any_model, layout, tmp_path):
    save(any_model, tmp_path / "m", layout=layout)
    same_bits(load(tmp_path / "m"), any_model)
    assert identify(tmp_path / "m").config == any_model.config


@pytest.mark.slow
def test_a_file_goes_to_a_folder_and_back_bit_for_bit_with_what_no_network_uses(model, tmp_path):
    tensors = official_tensors(model)
    write(tmp_path / "file", model, tensors)
    assert convert(tmp_path / "file", tmp_path / "folder") == tuple(
        sorted(name for name in tensors if name.endswith("position_ids"))
    )
    convert(tmp_path / "folder", tmp_path / "back.safetensors", layout="ldm")
    same_tensors(load_file(tmp_path / "back.safetensors"), tensors)


@pytest.mark.slow
def test_a_conversion_keeps_each_tensors_dtype_or_casts_all(model, tmp_path):
    tensors = official_tensors(model)
    mixed = {name: value.half() if name.startswith(UNET) else value for name, value in tensors.items()}
    write(tmp_path / "mixed", model, mixed)
    convert(tmp_path / "mixed", tmp_path / "kept")
    convert(tmp_path / "kept", tmp_path / "back.safetensors", layout="ldm")
    same_tensors(load_file(tmp_path / "back.safetensors"), mixed)
    convert(tmp_path / "mixed", tmp_path / "half.safetensors", layout="ldm", dtype=torch.bfloat16)
    halved = load_file(tmp_path / "half.safetensors")
    same_tensors(halved, {n: v.bfloat16() if v.is_floating_point() else v for n, v in mixed.items()})


def test_what_a_saved_pipeline_cannot_know_is_neutral(tmp_path):
    model = small_model("sd21")
    save(model, tmp_path / "file", layout="ldm")
    tensors = load_file(tmp_path / "file")
    block = "cond_stage_model.model.transformer.resblocks.2."
    assert torch.equal(tensors["cond_stage_model.model.text_projection"], torch.eye(64))
    assert tensors[f"{block}ln_1.weight"].eq(1).all()
    assert tensors[f"{block}mlp.c_proj.weight"].eq(0).all()
    assert load(tmp_path / "file").unused.keys() == {
        "text_encoder." + name.removeprefix("cond_stage_model.model.")
        for name in tensors
        if name.startswith(block) or name.endswith(("logit_scale", "text_projection"))
    }


@pytest.mark.slow
def test_the_averaged_copy_is_read_when_asked_for_and_left_out_otherwise(tmp_path):
    model = small_model("sd15")
    tensors = official_tensors(model)
    plain = {name: value for name, value in tensors.items() if name.startswith(UNET)}
    average = {ema_name(name): value + 1 for name, value in plain.items()}
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(7)}
    assert "model_ema.diffusion_modelinput_blocks00weight" in average
    write(tmp_path / "full", model, tensors | average | counters)
    for ema, shift in ((False, 0), (True, 1)):
        got = load(tmp_path / "full", ema=ema).unet.down[0].conv.weight
        assert torch.equal(got, plain[f"{UNET}input_blocks.0.0.weight"] + shift)
    left = convert(tmp_path / "full", tmp_path / "pruned.safetensors", layout="ldm", ema=True)
    ids = [name for name in tensors if name.endswith("position_ids")]
    assert left == tuple(sorted([*counters, *plain, *ids]))  # the plain ones, for which they are taken
    same_bits(load(tmp_path / "pruned.safetensors"), load(tmp_path / "full", ema=True))
    save(model, tmp_path / "folder")
    with pytest.raises(ValueError, match="is a folder, which holds one set of weights"):
        load(tmp_path / "folder", ema=True)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_parts_are_replaced_by_those_of_other_models_and_files(layout, tmp_path):
    one, two = small_model("sdxl-base"), small_model("sdxl-base")
    for network in two[1:4]:
        for parameter in network.parameters():
            parameter += 1
    save(one, tmp_path / "one", layout=layout)
    save(two, tmp_path / "two")
    for part in ("unet", "vae", "text_encoder"):
        got = load(tmp_path / "one", replace={part: tmp_path / "two"})
        same_bits(got, one._replace(**{part: getattr(two, part)}))
    vae = load(tmp_path / "one", replace={"vae": tmp_path / "two/vae"}).vae
    assert torch.equal(vae.decoder.conv_in.weight, two.vae.decoder.conv_in.weight)
    got = load(tmp_path / "one", replace={"text_encoder": tmp_path / "two/text_encoder_2"})
    first, second = (tower.state_dict() for tower in got.text_encoder.towers)
    name = next(iter(first))
    assert torch.equal(first[name], one.text_encoder.towers[0].state_dict()[name])
    assert torch.equal(second[name], two.text_encoder.towers[1].state_dict()[name])


def test_a_vae_in_a_file_of_its_own_loads_alone_and_into_a_model(tmp_path):
    model = small_model("sdxl-base")
    save(model, tmp_path / "file", layout="ldm")
    vae = {
        n.removeprefix("first_stage_model."): v
        for n, v in load_file(tmp_path / "file").items()
        if n.startswith("first_stage_model.")
    }
    write(tmp_path / "vae.safetensors", model, vae)
    alone = load_vae(tmp_path / "vae.safetensors")
    whole = load_vae(tmp_path / "file")
    assert alone.config == whole.config == model.config.vae
    assert torch.equal(whole.decoder.conv_in.weight, alone.decoder.conv_in.weight)
    joined = load(tmp_path / "file", replace={"vae": tmp_path / "vae.safetensors"})
    assert joined.config == model.config


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_when_they_are_read(bad, tmp_path):
    model = small_model("sd15")
    model.vae.decoder.conv_in.weight[0, 0, 0, 0] = bad
    save(model, tmp_path / "m", layout="ldm")
    with pytest.raises(ValueError, match=r"first_stage_model\.decoder\.conv_in\.weight in .*m holds NaN or infinity"):
        load(tmp_path / "m", dtype=torch.bfloat16)


@pytest.mark.slow
def test_what_the_user_says_of_the_prediction_holds_in_every_layout(tmp_path):
    model = small_model("sd15")
    for layout in ("ldm", "diffusers"):
        save(model, tmp_path / layout, layout=layout)
        assert load(tmp_path / layout, prediction="v").config.diffusion.prediction == "v"
        assert "you asked for v" in identify(tmp_path / layout, prediction="v").why
    convert(tmp_path / "ldm", tmp_path / "v", prediction="v")
    assert identify(tmp_path / "v").prediction == "v"
