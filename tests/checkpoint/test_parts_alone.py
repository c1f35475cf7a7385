"""`load_unet`, `load_vae` and `load_text_encoder`: one network from a model, or from its own folder or file."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ldm.checkpoint.files import load_text_encoder, load_unet, load_vae, save
from ldm.checkpoint.parts import TOWERS
from tests.checkpoint.families import small_model
from tests.checkpoint.test_families import write

LOADERS = {"unet": load_unet, "vae": load_vae, "text_encoder": load_text_encoder}
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "conditioner."}


@pytest.fixture(scope="module")
def model():
    return small_model("sdxl-base")


@pytest.fixture(scope="module", params=["ldm", "diffusers"])
def saved(request, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("parts") / "model"
    save(model, path, layout=request.param)
    return path


def assert_same(got, wanted):
    got, wanted = got.state_dict(), wanted.state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("name", LOADERS)
def test_a_part_of_a_model_is_loaded_alone_bit_for_bit_frozen_and_for_inference(name, saved, model):
    part = LOADERS[name](saved)
    assert_same(part, getattr(model, name))
    assert not part.training
    assert not any(p.requires_grad or p.is_meta for p in part.parameters())
    if name == "text_encoder":
        assert tuple(tower.config for tower in part.towers) == model.config.text
        assert part.tokenizers[1].vocab == model.text_encoder.tokenizers[1].vocab
    else:
        assert part.config == getattr(model.config, name)


@pytest.mark.parametrize("name", LOADERS)
def test_a_part_is_loaded_in_the_dtype_asked_for(name, small, small_file):
    part = LOADERS[name](small_file, dtype=torch.bfloat16)
    wanted = getattr(small, name).state_dict()
    assert all(torch.equal(value, wanted[key].bfloat16()) for key, value in part.state_dict().items())
    assert next(LOADERS[name](small_file, dtype=None).parameters()).dtype == torch.float32  # as it is stored


@pytest.mark.parametrize("name", LOADERS)
def test_a_part_in_a_file_of_its_own_is_loaded(name, model, tmp_path):
    save(model, tmp_path / "model", layout="ldm")
    tensors = load_file(tmp_path / "model")
    write(tmp_path / "part", model, {n: v for n, v in tensors.items() if n.startswith(PREFIXES[name])})
    assert_same(LOADERS[name](tmp_path / "part"), getattr(model, name))
    others = {n: v for n, v in tensors.items() if not n.startswith(PREFIXES[name])}
    write(tmp_path / "others", model, others)
    with pytest.raises(ValueError, match=f"others holds no {name}, only .*: give one that does"):
        LOADERS[name](tmp_path / "others")


def test_a_text_encoder_without_its_second_tower_is_refused(model, tmp_path):
    save(model, tmp_path / "model", layout="ldm")
    tensors = load_file(tmp_path / "model")
    write(tmp_path / "one", model, {n: v for n, v in tensors.items() if not n.startswith("conditioner.embedders.1.")})
    with pytest.raises(ValueError, match="one holds no text_encoder_2, only unet, vae, text_encoder: give one that"):
        load_text_encoder(tmp_path / "one")


@pytest.mark.parametrize("name", ["unet", "vae", *TOWERS])
def test_a_part_in_a_folder_of_its_own_is_loaded(name, model, tmp_path):
    save(model, tmp_path / "model")
    folder = tmp_path / "model" / name
    if name not in TOWERS:
        part = LOADERS[name](folder)
        assert part.config == getattr(model.config, name)
        assert_same(part, getattr(model, name))
        return
    (tower,) = load_text_encoder(folder).towers
    wanted = model.text_encoder.towers[TOWERS.index(name)]
    assert_same(tower, wanted)
    assert tower.config == wanted.config  # as the tokenizer beside it and the second tower say
    with torch.no_grad():
        assert torch.equal(tower(tower.tokenize(["a frog"])).context, wanted(wanted.tokenize(["a frog"])).context)


@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_the_folder_of_a_text_encoder_without_a_tokenizer_pads_as_the_official_models(family, tmp_path):
    model = small_model(family)
    save(model, tmp_path / "model")
    shutil.move(tmp_path / "model" / "text_encoder", tmp_path / "alone")
    (tower,) = load_text_encoder(tmp_path / "alone").towers
    assert tower.config == model.config.text[0]
    assert tower.config.pad_id == (0 if family == "sd21" else 49407)


@pytest.mark.parametrize("name", ["unet", "vae"])
def test_a_part_whose_tensors_do_not_fit_its_configuration_is_refused(name, small, small_file, tmp_path):
    config = getattr(small.config, name)
    changed = dataclasses.replace(config, res_blocks=config.res_blocks + 1)
    model = small._replace(config=dataclasses.replace(small.config, **{name: changed}))
    write(tmp_path / "file", model, load_file(small_file))
    with pytest.raises(ValueError, match=f"the {name} in .* does not match its configuration"):
        LOADERS[name](tmp_path / "file")


@pytest.mark.parametrize("name", LOADERS)
def test_a_number_that_no_file_has_tensors_for_is_refused_before_building(name, small, small_file, tmp_path):
    huge = {"unet": {"mid_depth": 10**9}, "vae": {"res_blocks": 10**9}, "text_encoder": {"layers": 10**9}}[name]
    field = "text" if name == "text_encoder" else name
    value = getattr(small.config, field)
    changed = tuple(dataclasses.replace(t, **huge) for t in value) if field == "text" else None
    config = dataclasses.replace(small.config, **{field: changed or dataclasses.replace(value, **huge)})
    write(tmp_path / "file", small._replace(config=config), load_file(small_file))
    with pytest.raises(ValueError, match=r"the configuration of .* wants .* 1000000000 blocks of a kind"):
        LOADERS[name](tmp_path / "file")
