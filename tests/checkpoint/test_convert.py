"""Conversions from pickles: whole models, folders of .bin files, parts and other kinds; and never by accident."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from ldm.checkpoint.files import convert, load, save
from ldm.checkpoint.pickles import TORCH_NEEDED
from ldm.checkpoint.single import ldm_tensors
from ldm.presets import SD15
from tests.checkpoint.families import official_tensors, small_model
from tests.checkpoint.standin import hollow_model, standin_tensor
from tests.checkpoint.test_families import same_bits, same_tensors, write

pytestmark = pytest.mark.skipif(
    torch.__version__ < TORCH_NEEDED, reason="this torch does not read pickles safely: all are refused"
)


@pytest.fixture(scope="module")
def model():
    return small_model("sd15")


def test_a_folder_of_pickles_becomes_a_folder_of_safetensors_bit_for_bit(model, tmp_path):
    save(model, tmp_path / "folder")
    for path in list((tmp_path / "folder").rglob("*.safetensors")):
        name = "pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
    with pytest.raises(ValueError, match="a pickle, which `ldm convert` makes a"):
        load(tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "safe")
    same_bits(load(tmp_path / "safe"), model)


@pytest.mark.slow
def test_a_checkpoint_of_lightning_is_the_model_in_it(tmp_path):
    # shapes alone must tell the family, as pickles carry no metadata: an SD 1.x of one level and few blocks
    unet = dataclasses.replace(SD15.unet, channels=(320,), depth=(1,), heads=(8,), res_blocks=1)
    config = dataclasses.replace(SD15, name="custom", unet=unet)
    shapes = {n: tuple(v.shape) for n, v in ldm_tensors(hollow_model(config)).items()}
    tensors = {n: standin_tensor(n, shape) for n, shape in shapes.items()}
    torch.save({"state_dict": tensors, "global_step": 7, "epoch": 1}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"is a PyTorch pickle.*`ldm convert` reads it"):
        load(tmp_path / "model.ckpt")
    convert(tmp_path / "model.ckpt", tmp_path / "model.safetensors", layout="ldm")
    same_tensors(load_file(tmp_path / "model.safetensors"), tensors)
    assert load(tmp_path / "model.safetensors").config == config


@pytest.mark.parametrize(
    "names",
    [
        ("encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"),  # a VAE
        ("control_model.input_hint_block.0.weight", "control_model.zero_convs.0.0.weight"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",),
    ],
)
def test_a_pickle_of_something_else_becomes_a_file_of_the_same_names(names, tmp_path):
    tensors = {name: torch.randn(2, 3) for name in names} | {"ids": torch.arange(3)}
    torch.save({"state_dict": tensors}, tmp_path / "x.pt")
    assert convert(tmp_path / "x.pt", tmp_path / "x.safetensors", layout="ldm") == ()
    same_tensors(load_file(tmp_path / "x.safetensors"), tensors)
    convert(tmp_path / "x.pt", tmp_path / "half.safetensors", layout="ldm", dtype=torch.float16)
    half = load_file(tmp_path / "half.safetensors")
    assert half[names[0]].dtype == torch.float16
    assert half["ids"].dtype == torch.int64
    with pytest.raises(ValueError, match="not a model: its tensors can be written into one file"):
        convert(tmp_path / "x.pt", tmp_path / "folder")
    with pytest.raises(ValueError, match=r"exists( already)?: give"):
        convert(tmp_path / "x.pt", tmp_path / "half.safetensors", layout="ldm")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"step": torch.tensor(5)}, r"x\.pt holds nothing that is known here, its tensors are step: give a model"),
        (
            {"step": torch.tensor(5), "network": {"conv.weight": torch.ones(2)}},
            r"x\.pt holds tensors under 'network'; only those at the top or under state_dict, model, module are read",
        ),
    ],
)
def test_a_pickle_of_which_nothing_is_known_is_not_written(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "x.pt", tmp_path / "x.safetensors", layout="ldm")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize(
    ("layout", "name", "message"),
    [
        ("ldm", "model", r"the ldm layout is one file, whose name ends in \.safetensors, got .*model: give such"),
        ("ldm", "model.ckpt", r"whose name ends in \.safetensors, got .*model\.ckpt"),
        ("diffusers", "model.safetensors", r"the diffusers layout is a folder, got .*model\.safetensors: give layout"),
    ],
)
def test_a_target_whose_name_does_not_suit_the_layout_is_refused(layout, name, message, small_folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(small_folder, tmp_path / name, layout=layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_nothing_is_overwritten_unasked_and_what_is_overwritten_is_replaced_whole(model, tmp_path):
    file = tmp_path / "file.safetensors"
    write(file, model, official_tensors(model))
    convert(file, tmp_path / "out")
    with pytest.raises(ValueError, match=r"exists( already)?: give another path, or overwrite=True"):
        convert(file, tmp_path / "out")
    convert(file, tmp_path / "out", dtype=torch.bfloat16, overwrite=True)
    assert load(tmp_path / "out", dtype=None).unet.conv_out.weight.dtype == torch.bfloat16
    convert(file, file, layout="ldm", dtype=torch.float16, overwrite=True)
    assert load(file, dtype=None).unet.conv_out.weight.dtype == torch.float16
