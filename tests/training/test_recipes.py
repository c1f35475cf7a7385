"""From a TOML file to a model that makes pictures, on a folder of pictures."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import ldm
from ldm.checkpoint.files import load_vae
from ldm.training.recipes import LDMRecipe, VAERecipe, read_recipe, run

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parent.parent.parent / "configs"

VAE_TOML = """
recipe = "vae"
out = "{out}/vae"
[data]
size = 16
folder = "{out}/pictures"
[vae]
channels = [8, 8]
res_blocks = 1
norm_groups = 2
[loss]
crop = 8
[loop]
steps = 3
batch_size = 2
warmup = 0
"""
LDM_TOML = """
recipe = "ldm"
name = "toy"
out = "{out}/ldm"
vae = "{out}/vae/vae"
vocabulary = 600
guidance_scale = 2.0
[data]
size = 16
folder = "{out}/pictures"
[unet]
channels = [8, 16]
res_blocks = 1
depth = [0, 1]
heads = [1, 2]
context_dim = 8
norm_groups = 2
[text]
width = 8
layers = 1
heads = 2
mlp = 16
max_length = 10
[diffusion]
prediction = "v"
spacing = "trailing"
[loop]
steps = 2
batch_size = 2
warmup = 0
"""


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (20, 16), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} wall")
    return tmp_path


def recipe(folder, text, name="recipe.toml"):
    (folder / name).write_text(text.format(out=folder))
    return read_recipe(folder / name)


def test_a_vae_and_then_a_diffusion_model_train_into_one_that_makes_pictures(pictures):
    vae_folder = run(recipe(pictures, VAE_TOML), CPU)
    vae = load_vae(vae_folder)
    assert vae.config.scaling_factor not in (1.0, 0.18215)  # measured

    model_folder = run(recipe(pictures, LDM_TOML), CPU)
    assert model_folder == pictures / "ldm" / "model"
    pipe = ldm.load(model_folder, ldm.Placement(device="cpu"))
    assert pipe.config.name == "toy"
    assert pipe.config.vae == vae.config
    assert (pipe.config.diffusion.prediction, pipe.config.diffusion.spacing) == ("v", "trailing")
    assert (pipe.config.image_size, pipe.config.guidance_scale) == (16, 2.0)
    (image,) = pipe.generate(ldm.Request("a red wall", steps=2))
    assert image.size == (16, 16)
    for ours, theirs in zip(pipe.vae.parameters(), vae.parameters(), strict=True):
        assert torch.equal(ours, theirs.half().float())  # saved in fp16


def test_a_recipe_can_go_on_from_a_model_with_its_vocabulary(pictures):
    run(recipe(pictures, VAE_TOML), CPU)
    first = run(recipe(pictures, LDM_TOML), CPU)
    (pictures / "pictures" / "0.txt").write_text("something entirely new")
    more = LDM_TOML.replace('out = "{out}/ldm"', 'out = "{out}/more"\nstart = "{out}/ldm/model"')
    still = more.replace("warmup = 0", "warmup = 0\nlearning_rate = 0.0")
    again = run(recipe(pictures, still), CPU)
    for name in ("unet/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"):
        assert (again / name).read_bytes() == (first / name).read_bytes()

    wider = more.replace("more", "wider").replace("mlp = 16", "mlp = 32")
    with pytest.raises(ValueError, match=r"is of another architecture than \[unet\] and \[text\]"):
        run(recipe(pictures, wider), CPU)


def test_a_finished_run_started_again_only_saves_again(pictures):
    vae_recipe = recipe(pictures, VAE_TOML)
    first = {p.name: p.read_bytes() for p in run(vae_recipe, CPU).iterdir()}
    again = {p.name: p.read_bytes() for p in run(vae_recipe, CPU).iterdir()}
    assert again["diffusion_pytorch_model.safetensors"] == first["diffusion_pytorch_model.safetensors"]
    rows = (pictures / "vae" / "vae" / "config.json").read_text()
    assert json.loads(rows)["norm_num_groups"] == 2


def test_a_changed_recipe_does_not_touch_the_run_in_its_folder(pictures):
    run(recipe(pictures, VAE_TOML), CPU)
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        run(recipe(pictures, VAE_TOML.replace("crop = 8", "crop = 4")), CPU)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('recipe = "gan"', "recipe must be one of 'vae', 'ldm', got 'gan'"),
        ("steps = 1", "recipe must be one of 'vae', 'ldm', got None"),
        ("recipe = ", "is not valid TOML"),
        (VAE_TOML + "speed = 3\n", "loop: unknown 'speed'; valid keys: steps, batch_size"),
        ('recipe = "vae"\nout = "x"\n', " lacks loop"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, text)


def test_a_missing_recipe_says_where_others_are():
    with pytest.raises(ValueError, match=r"there is no recipe nowhere\.toml; those that ship"):
        read_recipe("nowhere.toml")


def test_a_missing_vae_is_named(pictures):
    with pytest.raises(ValueError, match="vae"):
        run(recipe(pictures, LDM_TOML), CPU)


def test_the_recipes_that_ship_can_be_read():
    assert isinstance(read_recipe(CONFIGS / "train_vae.toml"), VAERecipe)
    ldm_recipe, tune = (read_recipe(CONFIGS / f"{name}_ldm.toml") for name in ("train", "tune"))
    assert isinstance(ldm_recipe, LDMRecipe)
    assert isinstance(tune, LDMRecipe)
    assert tune.start == ldm_recipe.out / "model"
    assert (tune.unet, tune.text) == (ldm_recipe.unet, ldm_recipe.text)
    assert ldm_recipe.unet == ldm.TINY.unet
