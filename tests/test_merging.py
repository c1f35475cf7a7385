"""Merged models have the weights of the formulas, in every layout and dtype, and need little memory."""

import dataclasses
import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import ldm
from ldm.checkpoint.files import load, save
from ldm.checkpoint.parts import Model, modules
from ldm.cli import main
from ldm.merging import merge, merge_into
from ldm.models.text import TextEncoder
from ldm.models.tokens import Tokenizer
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from tests.checkpoint.conftest import SMALL
from tests.checkpoint.growth import MB, growth, in_fresh_process, measurable, return_freed_memory
from tests.test_lora import assert_same, lora_file
from tests.tiny import TINY_RANDOM, TINY_SDXL, random_networks

PLAIN = ldm.Placement(device="cpu")


def weights(model):
    """All weights by part and name."""
    networks = modules(*(getattr(model, name) for name in ("unet", "vae", "text_encoder")))
    return {(part, key): value for part, network in networks.items() for key, value in network.state_dict().items()}


def shifted(path, seed, config=TINY_RANDOM, layout="diffusers", dtype=None):
    """Save the tiny random model of `config` with other weights, and return these."""
    _, *others = random_networks(dataclasses.replace(config, unet=dataclasses.replace(config.unet, in_channels=4)))
    networks = UNet(config.unet), *others
    torch.manual_seed(seed)
    for network in networks:
        for parameter in network.requires_grad_(False).parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    save(Model(config, *networks), path, layout=layout, dtype=dtype)
    return weights(load(path, dtype=None))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three models: their paths and their weights."""
    folder = tmp_path_factory.mktemp("three")
    paths = [folder / name for name in "abc"]
    return paths, [shifted(path, i) for i, path in enumerate(paths)]


def test_a_weighted_sum_and_an_added_difference_are_those_of_the_formulas(three, tmp_path):
    (a, b, c), (x, y, z) = three
    merge(a, b, tmp_path / "sum", weight=0.3, layout="diffusers")
    merge(a, b, tmp_path / "plus", minus=c, weight=0.8, layout="diffusers")
    total, plus = (weights(load(tmp_path / name)) for name in ("sum", "plus"))
    assert total.keys() == x.keys()
    for key in x:
        torch.testing.assert_close(total[key], 0.7 * x[key] + 0.3 * y[key], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(plus[key], x[key] + 0.8 * (y[key] - z[key]), rtol=1e-6, atol=1e-6)
        assert not torch.equal(total[key], x[key])


def test_weights_of_parts_replace_the_weight_and_0_and_1_keep_all_bits(three, tmp_path):
    (a, b, _), (x, y, _) = three
    merge(a, b, tmp_path / "m", weight=0.5, blocks={"vae": 0, "text_encoder": 1, "up.0": 0.25}, layout="diffusers")
    merge(a, b, tmp_path / "n", minus=b, weight=2, layout="diffusers")  # the difference is 0
    for key, value in weights(load(tmp_path / "m")).items():
        part, name = key
        if part == "vae":
            assert torch.equal(value, x[key])
        elif part == "text_encoder":
            assert torch.equal(value, y[key])
        else:
            w = 0.25 if name.startswith("up.0.") else 0.5
            torch.testing.assert_close(value, (1 - w) * x[key] + w * y[key], rtol=1e-6, atol=1e-7)
    assert all(torch.equal(value, x[key]) for key, value in weights(load(tmp_path / "n")).items())
    with pytest.raises(ValueError, match=r"there is a weight for 'dowm', and the model has time_embed, down, .*, vae"):
        merge(a, b, tmp_path / "o", blocks={"dowm": 1}, layout="diffusers")


def named_officially(config):
    """A model with CLIP's vocabulary, which has a place in the ldm layout."""
    torch.manual_seed(0)
    networks = UNet(config.unet), VAE(config.vae), TextEncoder(config.text, [Tokenizer.official()])
    return Model(config, *(network.eval() for network in networks))


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Such a model in one file."""
    path = tmp_path_factory.mktemp("official") / "a.safetensors"
    save(named_officially(SMALL), path, layout="ldm")
    return path


@pytest.mark.parametrize("layout", ["ldm", pytest.param("diffusers", marks=pytest.mark.slow)])
def test_all_layouts_and_dtypes_meet_in_fp32_and_are_rounded_once(official, layout, tmp_path):
    other = load(official)
    for parameter in other.unet.parameters():
        parameter += 0.1
    save(other, tmp_path / "b", dtype=torch.float16)
    out = tmp_path / ("m.safetensors" if layout == "ldm" else "m")
    merge(official, tmp_path / "b", out, weight=0.3, layout=layout, dtype=torch.bfloat16)
    x, y, merged = (weights(load(path, dtype=None)) for path in (official, tmp_path / "b", out))
    for key in x:
        expected = x[key].clone().mul_(0.7).add_(y[key], alpha=0.3).bfloat16()
        assert torch.equal(merged[key], expected), key
    same = tmp_path / f"same{out.suffix}"
    merge(official, official, same, weight=0, layout=layout)
    saved = tmp_path / f"saved{out.suffix}"
    save(load(official), saved, layout=layout)
    for path in [saved] if saved.is_file() else saved.rglob("*"):
        written = same / path.relative_to(saved) if saved.is_dir() else same
        if path.suffix == ".safetensors":
            assert_same(load_file(written), load_file(path))
        elif path.is_file():
            assert written.read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_official_tensors_that_no_network_uses_are_written_as_by_saving(tmp_path):
    """SD 2's text encoder has a temperature, a block and a projection more, which a folder does not hold."""
    text = dataclasses.replace(SMALL.text[0], activation="gelu", pad_id=0)
    config = dataclasses.replace(SMALL, text=(text,))
    save(named_officially(config), tmp_path / "a")
    save(load(tmp_path / "a"), tmp_path / "saved.safetensors", layout="ldm")
    merge(tmp_path / "a", tmp_path / "a", tmp_path / "m.safetensors", weight=0, layout="ldm")
    saved = load_file(tmp_path / "saved.safetensors")
    assert saved["cond_stage_model.model.text_projection"].any()
    assert saved["cond_stage_model.model.logit_scale"] > 4
    assert_same(load_file(tmp_path / "m.safetensors"), saved)


@pytest.mark.slow
def test_the_second_text_encoder_of_sdxl_is_merged_in_its_official_names(tmp_path):
    """OpenCLIP stores three of our weights in one tensor, and one transposed; a folder does not."""
    a, b = shifted(tmp_path / "a", 0, TINY_SDXL), shifted(tmp_path / "b", 1, TINY_SDXL, dtype=torch.float16)
    merge(
        tmp_path / "a", tmp_path / "b", tmp_path / "m", weight=0.25, blocks={"text_encoder_2": 0.5}, layout="diffusers"
    )
    for key, value in weights(load(tmp_path / "m")).items():
        w = 0.5 if key[0] == "text_encoder_2" else 0.25
        torch.testing.assert_close(value, (1 - w) * a[key] + w * b[key].float(), rtol=1e-6, atol=1e-7)


def test_more_input_channels_of_the_first_model_stay(three, tmp_path):
    wide = dataclasses.replace(TINY_RANDOM, unet=dataclasses.replace(TINY_RANDOM.unet, in_channels=9))
    (_, b, c), (_, y, z) = three
    x = shifted(tmp_path / "wide", 5, wide)
    merge(tmp_path / "wide", b, tmp_path / "m", minus=c, weight=1, layout="diffusers")
    key = "unet", "down.0.conv.weight"
    merged = weights(load(tmp_path / "m"))
    assert torch.equal(merged[key][:, 4:], x[key][:, 4:])
    torch.testing.assert_close(merged[key][:, :4], x[key][:, :4] + y[key] - z[key])
    with pytest.raises(
        ValueError, match=r"differ in the architecture of the unet .*down.0.conv.weight.*: merge models"
    ):
        merge(b, tmp_path / "wide", tmp_path / "n", layout="diffusers")


def test_loras_are_merged_into_a_file_as_into_a_pipeline(model_folder, tmp_path):
    lora = lora_file(tmp_path / "a.safetensors")
    words = [f"{lora}:0.5", f"{lora}:-0.2:down=0"]
    (applied, _) = merge_into(model_folder, words, tmp_path / "m", layout="diffusers")
    assert (applied.applied, applied.total) == (3, 3)
    merged, expected = weights(load(tmp_path / "m")), weights(ldm.load(model_folder, PLAIN, loras=words))
    assert all(torch.equal(merged[key], expected[key]) for key in expected)
    assert any(not torch.equal(merged[key], value) for key, value in weights(load(model_folder)).items())


def test_the_metadata_names_the_inputs_by_sha256(official, model_folder, tmp_path):
    merge(official, official, tmp_path / "m.safetensors", weight=0.2, layout="ldm")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        made = json.loads(file.metadata()["ldm.merge"])
    sha256 = hashlib.sha256(official.read_bytes()).hexdigest()
    assert made["A"] == made["B"] == {"file": official.name, "sha256": sha256}
    assert (made["formula"], made["weight"], made["blocks"]) == ("(1 - w) A + w B", 0.2, {})
    lora = lora_file(tmp_path / "a.safetensors")
    merge_into(model_folder, [f"{lora}:0.5:down=0"], tmp_path / "m", layout="diffusers")
    with safe_open(tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        made = json.loads(file.metadata()["ldm.merge"])
    assert made["C_1"] == {"file": "a.safetensors", "sha256": hashlib.sha256(lora.read_bytes()).hexdigest()}
    assert made["w_1"] == [0.5, {"down": 0}]


def test_an_input_is_never_overwritten_and_an_error_leaves_the_old_output(three, tmp_path):
    (a, b, _), (x, _, _) = three
    (tmp_path / "link").symlink_to(a)
    for out in (a, tmp_path / "link", a.parent):
        with pytest.raises(ValueError, match=r"is or holds the input .*, which is never overwritten: give another out"):
            merge(a, b, out, layout="diffusers", overwrite=True)
    merge(a, b, tmp_path / "m", weight=0.1, layout="diffusers")
    with pytest.raises(ValueError, match="exists already"):
        merge(a, b, tmp_path / "m", layout="diffusers")
    before = weights(load(tmp_path / "m"))
    with pytest.raises(ValueError, match=r"the new .* of the unet holds .*, too large for float16: take another dtype"):
        merge(a, b, tmp_path / "m", weight=1e6, layout="diffusers", overwrite=True, dtype=torch.float16)
    after = weights(load(tmp_path / "m"))
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert {path.name for path in tmp_path.iterdir()} == {"link", "m"}
    assert all(torch.equal(value, x[key]) for key, value in weights(load(a)).items())


def test_models_that_do_not_fit_together_are_named(three, tmp_path):
    (a, b, _), _ = three
    shifted(tmp_path / "xl", 0, TINY_SDXL)
    with pytest.raises(
        ValueError, match=r"xl and .*a differ in the architecture of the unet \(random-sdxl and random: "
    ):
        merge(a, tmp_path / "xl", tmp_path / "m", layout="diffusers")
    diffusion = dataclasses.replace(TINY_RANDOM.diffusion, prediction="v")
    shifted(tmp_path / "v", 0, dataclasses.replace(TINY_RANDOM, diffusion=diffusion))
    with pytest.raises(ValueError, match=r"v and .*a predict v and eps: merge models that predict the same"):
        merge(a, tmp_path / "v", tmp_path / "m", layout="diffusers")
    with pytest.raises(ValueError, match=r"the ldm layout is one file, whose name ends in .safetensors, got .*m: give"):
        merge(a, b, tmp_path / "m", layout="ldm")
    with pytest.raises(ValueError, match=r"the weight must be a finite number from -1000000.0 to 1000000.0, got nan"):
        merge(a, b, tmp_path / "m", weight=float("nan"), layout="diffusers")


def peak_of(folder, tiny):
    """By how many bytes a process grows that merges the model in `folder` with itself."""
    torch.set_num_threads(1)
    return_freed_memory()
    merge(tiny, tiny, folder / "tiny", layout="diffusers")
    small = growth(lambda: merge(tiny, tiny, folder / "tiny", layout="diffusers", overwrite=True))
    a = folder / "large"
    return small, growth(lambda: merge(a, a, folder / "m", minus=a, layout="diffusers"))


@pytest.mark.slow
@pytest.mark.skipif(not measurable(), reason="needs /proc of Linux")
def test_memory_holds_a_few_weights_and_not_a_model(model_folder, tmp_path):
    unet = dataclasses.replace(TINY_RANDOM.unet, channels=(256, 512), res_blocks=2)
    large = dataclasses.replace(TINY_RANDOM, unet=unet)
    with torch.device("meta"):
        held = UNet(unet).state_dict().values()
    size, largest = sum(value.nbytes for value in held), max(value.nbytes for value in held)
    save(Model(large, UNet(unet), *random_networks()[1:]), tmp_path / "large")
    small, peak = in_fresh_process(peak_of, tmp_path, model_folder)
    print(
        f"{size / MB:.0f} MB, largest weight {largest / MB:.0f} MB: peak {peak / MB:.0f} MB, tiny {small / MB:.0f} MB"
    )
    assert peak < max(small, 0) + 5 * largest + 16 * MB < size / 2


def test_the_command_writes_the_model(three, tmp_path, capsys):
    (a, b, c), (x, y, z) = three
    words = ["merge", str(a), str(b), str(tmp_path / "m"), "--layout", "diffusers"]
    assert main([*words, "--minus", str(c), "--weight", "0.5", "--blocks", "vae=0", "mid=1"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'm'}\n"
    merged = weights(load(tmp_path / "m"))
    key = "unet", "mid.res_in.conv1.weight"
    torch.testing.assert_close(merged[key], x[key] + y[key] - z[key], rtol=1e-6, atol=1e-6)
    assert torch.equal(merged["vae", "decoder.conv_in.weight"], x["vae", "decoder.conv_in.weight"])
    assert main([*words, "--weight", "0.5"]) == 2
    assert "m exists already" in capsys.readouterr().err
