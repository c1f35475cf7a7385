"""From a TOML file to a model that edits pictures: the objective, the recipe, and a folder of pairs."""

import copy
import dataclasses
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.checkpoint.files import load, save
from ldm.checkpoint.parts import Model
from ldm.cli import main
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.training.data import DataConfig
from ldm.training.editing import EditLoss, EditObjective, kept_inputs, with_picture_input
from ldm.training.latents import Latents
from ldm.training.loop import collate
from ldm.training.recipes import EditRecipe, read_recipe
from tests.tiny import TINY_RANDOM, random_networks

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
TOML = """
recipe = "edit"
out = "{out}/run"
model = "{model}"
name = "red"
{more}
[data]
size = 32
folder = "{out}/pairs"
{data}
[loop]
steps = 2
batch_size = 2
warmup = 0
learning_rate = 1e-3
ema = 0.0
"""


@pytest.fixture
def pairs(tmp_path):
    """A folder of three edits: gray pictures become red, green and blue."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for i, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (32, 32), color).save(folder / f"{i}.png")
        Image.radial_gradient("L").resize((32, 32)).save(folder / f"{i}.before.png")
        (folder / f"{i}.txt").write_text(f"make it {color}")
    return folder


@pytest.fixture
def write(tmp_path, pairs, model_folder):
    def write(more="", data="", model=model_folder):
        (tmp_path / "recipe.toml").write_text(TOML.format(out=tmp_path, model=model, more=more, data=data))
        return read_recipe(tmp_path / "recipe.toml")

    return write


@pytest.fixture
def objective():
    unet, *others = random_networks()
    wide = with_picture_input(unet)
    config = dataclasses.replace(TINY_RANDOM, unet=wide.config)
    return EditObjective(Model(config, wide, *others), EditLoss())


def batch(pairs, count=3):
    dataset = DataConfig(size=32, folder=pairs).open(pairs=True)
    return collate([dataset[i] for i in range(count)])


def test_the_widened_unet_predicts_as_before_whatever_the_picture_is():
    unet, *_ = random_networks()
    wide = with_picture_input(unet)
    assert (wide.config.in_channels, wide.config.out_channels, unet.config.in_channels) == (8, 4, 4)
    z, picture, context = torch.randn(2, 4, 8, 8), 9 * torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    t = torch.tensor([1.0, 900.0])
    with torch.no_grad():
        assert torch.equal(wide(torch.cat([z, picture], 1), t, context), unet(z, t, context))
        wide.down[0].conv.weight[:, 4:] += 0.1
        assert not torch.equal(wide(torch.cat([z, picture], 1), t, context), unet(z, t, context))


def test_the_instruction_the_picture_and_both_are_dropped_in_equal_shares():
    text, picture = kept_inputs(torch.arange(100) / 100, 0.05)
    assert [(~text & picture).sum(), (text & ~picture).sum(), (~text & ~picture).sum()] == [5, 5, 5]
    assert all(kept.all() for kept in kept_inputs(torch.rand(50), 0.0))
    with pytest.raises(ValueError, match=r"caption_dropout must be less than 1/3 for an editing model, got 0\.4"):
        EditLoss(0.4)


def test_the_network_gets_the_unscaled_picture_and_the_instruction_unless_they_are_dropped(
    objective, pairs, monkeypatch
):
    images, texts, more = batch(pairs)
    drawn, seen = torch.tensor([0.1, 0.3, 0.5]), []
    monkeypatch.setattr("ldm.training.editing.kept_inputs", lambda draws, share: (drawn > 0.2, drawn < 0.4))
    hook = objective.networks.unet.register_forward_pre_hook(lambda _, args: seen.append(args))
    objective((images, texts, more))
    hook.remove()
    ((z, _, context, _),) = seen
    with torch.no_grad():
        mean = objective.vae.encode(2 * more["source"] - 1).mean / 0.5  # the scaling factor
        wanted = objective.networks.text_encoder.encode(["", *texts[1:]]).context
    torch.testing.assert_close(z[:, 4:], mean * torch.tensor([1.0, 1.0, 0.0])[:, None, None, None])
    torch.testing.assert_close(context, wanted)


def test_the_objective_falls_on_one_batch_and_changes_the_unet_alone(objective, pairs):
    fixed = batch(pairs)
    before = copy.deepcopy(objective.state_dict())
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(12):
        torch.manual_seed(0)
        loss, log = objective(fixed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert log["mse"].item() == pytest.approx(losses[-1])
    assert losses[-1] < 0.6 * losses[0]
    moved = {name.split(".")[1] for name, weight in objective.state_dict().items() if not weight.equal(before[name])}
    assert moved == {"unet"}
    assert objective.trained is objective.networks.unet
    assert objective.networks.unet.down[0].conv.weight[:, 4:].abs().max() > 1e-3  # the picture is used


def test_latents_of_pairs_train_as_their_pictures_do(objective, pairs, tmp_path):
    dataset = DataConfig(size=32, folder=pairs).open(pairs=True)
    encoded = Latents(dataset, 3, objective.vae, tmp_path / "latents", {})
    moments, _, more = collate([encoded[i] for i in range(3)])
    assert more.keys() == {"picture"}
    assert moments.shape == (3, 8, 8, 8)
    assert more["picture"].shape == (3, 4, 8, 8)
    losses = []
    for each in (batch(pairs), (moments, ["make it red"] * 3, more)):
        torch.manual_seed(1)
        losses.append(objective((each[0], ["make it red"] * 3, each[2]))[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the latents are kept in fp16


def test_the_sample_pictures_stand_below_their_pictures_before_and_follow_both(objective, pairs):
    torch.nn.init.normal_(objective.networks.unet.down[0].conv.weight, 0, 0.1)
    images, texts, more = batch(pairs, 2)
    with torch.no_grad():
        first = objective.sample((images, texts, more))
        others = [
            objective.sample((images, ["make it dark"] * 2, more)),
            objective.sample((images, texts, {"source": 1 - more["source"]})),
        ]
        before = objective.vae.decode(objective.vae.encode(2 * more["source"] - 1).mode())
    assert first.shape == (2, 3, 64, 32)
    torch.testing.assert_close(first[:, :, :32], before)
    assert all((other - first)[:, :, 32:].abs().max() > 0.01 for other in others)


def test_a_recipe_makes_a_model_that_ldm_edit_takes(write, tmp_path, model_folder, capsys):
    folder = write("latents = 3").run(CPU)
    assert folder == tmp_path / "run" / "model"
    pipe, start = (ldm.load(path, ldm.Placement("cpu")) for path in (folder, model_folder))
    assert pipe.config.edits
    assert (pipe.config.name, pipe.config.image_size, pipe.config.guidance_scale) == ("red", 32, 3.0)
    for name in ("vae", "text_encoder"):
        weights = zip(getattr(pipe, name).parameters(), getattr(start, name).parameters(), strict=True)
        assert all(torch.equal(mine, theirs.half().float()) for mine, theirs in weights)
    conv, old = (each.unet.down[0].conv.weight for each in (pipe, start))
    assert 0 < (conv[:, :4] - old).abs().max() < 0.01
    assert 0 < conv[:, 4:].abs().max() < 0.01  # it started from zero

    source, out = tmp_path / "pairs" / "0.before.png", tmp_path / "out.png"
    words = (str(source), "make it red", "--steps", "2", "--model", str(folder), "--device", "cpu", "--out", str(out))
    assert main(["edit", *words]) == 0
    with Image.open(out) as picture:
        assert picture.size == (32, 32)
    assert main(["inspect", str(folder)]) == 0
    assert "red, diffusers layout" in capsys.readouterr().out
    assert "StableDiffusionInstructPix2PixPipeline" in (folder / "model_index.json").read_text()


@pytest.mark.slow
def test_the_result_edits_in_diffusers_as_it_does_here(write, pairs):
    folder = write().run(CPU)
    pipe = ldm.load(folder, ldm.Placement("cpu"))
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    assert type(theirs) is diffusers.StableDiffusionInstructPix2PixPipeline
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = diffusers.EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    with Image.open(pairs / "0.before.png") as opened:
        before = opened.convert("RGB")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    (want,) = theirs(
        "make it red", before, num_inference_steps=3, latents=noise, image_guidance_scale=1.5, guidance_scale=3.0
    ).images
    request = ldm.Request("make it red", steps=3, sampler="euler", source=ldm.Source(before, image_guidance=1.5))
    difference = np.asarray(pipe.generate(request)[0]).astype(int) - np.asarray(want)
    assert np.abs(difference).max() <= 2  # rounding


def test_the_text_encoder_learns_if_asked_for(write, model_folder):
    pipe, start = load(write("train_text_encoder = true").run(CPU)), load(model_folder)
    moved = [
        (new - old).abs().max() for new, old in zip(*(m.text_encoder.parameters() for m in (pipe, start)), strict=True)
    ]
    assert 1e-4 < max(moved) < 0.01
    assert pipe.unet.down[0].conv.weight[:, 4:].any()


@pytest.mark.slow
def test_an_editing_model_is_trained_further_and_guidance_can_be_set(write, tmp_path):
    first = write("guidance_scale = 2.0").run(CPU)
    assert json.loads((first / "ldm.json").read_text())["guidance_scale"] == 2.0
    (tmp_path / "run").rename(tmp_path / "first")
    first = tmp_path / "first" / "model"
    second = write(model=first).run(CPU)
    start, found = load(first), load(second)
    assert found.config == dataclasses.replace(start.config)
    assert 0 < (found.unet.conv_out.weight - start.unet.conv_out.weight).abs().max() < 0.01


def test_an_editing_model_of_eight_latent_channels_is_read_again(tmp_path):
    config = dataclasses.replace(
        TINY_RANDOM,
        unet=dataclasses.replace(TINY_RANDOM.unet, in_channels=16, out_channels=8),
        vae=dataclasses.replace(TINY_RANDOM.vae, latent_channels=8),
    )
    *_, text_encoder = random_networks()
    save(Model(config, UNet(config.unet), VAE(config.vae), text_encoder), tmp_path / "model")
    assert load(tmp_path / "model").config.edits
    said = tmp_path / "model" / "unet" / "config.json"
    said.write_text(said.read_text().replace('"in_channels": 16', '"in_channels": 9'))
    with pytest.raises(ValueError, match="no model that is known here \\(9 input channels\\)"):
        load(tmp_path / "model")


def test_models_and_keys_that_do_not_fit_are_refused(write, tmp_path):
    for data in ("keep_out = 1", "layout = false"):
        with pytest.raises(
            ValueError, match=f"{data.split()[0]} under \\[data\\] cannot be used in this kind of recipe"
        ):
            write(data=data).run(CPU)
    config = dataclasses.replace(TINY_RANDOM, unet=dataclasses.replace(TINY_RANDOM.unet, in_channels=9))
    save(Model(config, UNet(config.unet), *random_networks()[1:]), tmp_path / "inpaint")
    with pytest.raises(ValueError, match="must be one of text to image or for editing, and its UNet takes 9 channels"):
        write(model=tmp_path / "inpaint").run(CPU)


def test_the_recipe_that_ships_edits_with_the_bundled_model():
    found = read_recipe(ROOT / "configs" / "train_edit.toml")
    assert isinstance(found, EditRecipe)
    assert (found.model, found.data.size) == (Path("weights/tiny"), ldm.TINY.image_size)
    assert found.latents
