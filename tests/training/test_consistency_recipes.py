"""From a TOML file to a student of few steps that makes pictures."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.training.consistency import ConsistencyTraining, LCMObjective
from ldm.training.recipes import read_recipe

CPU = torch.device("cpu")
TOML = """
recipe = "{kind}"
out = "{out}/run"
model = "{model}"
name = "fast"
{more}
[data]
size = 32
folder = "{out}/pictures"
[loop]
steps = 4
batch_size = 2
warmup = 0
learning_rate = 1e-3
checkpoint_every = 2
{loss}
"""
KINDS = {
    "lcm": ("lcm", "[loss]\nguidance = [2.0, 4.0]\ntarget_ema = 0.5"),
    "distillation": ("consistency", "[distillation]\nguidance_scale = 2.0\ntarget_ema = 0.5"),
    "training": ("consistency", "[training]\nfirst_levels = 2\nlast_levels = 8"),
}


@pytest.fixture
def write(tmp_path, model_folder):
    """Write a recipe for three pictures, and read it."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (32, 32), color).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {color} wall")

    def write(name, more="", loss=None, model=model_folder):
        kind, table = KINDS[name]
        text = TOML.format(kind=kind, out=tmp_path, model=model, more=more, loss=table if loss is None else loss)
        (tmp_path / "recipe.toml").write_text(text)
        return read_recipe(tmp_path / "recipe.toml")

    return write


@pytest.mark.parametrize(
    ("name", "steps", "scale", "guidance_dim"), [("lcm", 4, 3.0, 256), ("distillation", 2, 1.0, None)]
)
def test_a_student_is_saved_with_the_defaults_that_it_needs_and_makes_pictures(
    write, model_folder, name, steps, scale, guidance_dim
):
    folder = write(name).run(CPU)
    student, teacher = (ldm.load(path, ldm.Placement("cpu")) for path in (folder, model_folder))
    found = student.config
    assert (found.name, found.sampler, found.steps, found.guidance_scale) == ("fast", "lcm", steps, scale)
    assert (found.diffusion.spacing, found.unet.guidance_dim) == ("lcm", guidance_dim)
    moved = student.unet.conv_out.weight - teacher.unet.conv_out.weight
    assert 0 < moved.abs().max() < 0.02  # it started from the teacher, and learned
    for part in ("vae", "text_encoder"):
        pairs = zip(getattr(student, part).parameters(), getattr(teacher, part).parameters(), strict=True)
        assert all(torch.equal(mine, theirs.half().float()) for mine, theirs in pairs)
    plan = student.plan(ldm.Request("a red wall", seed=1))
    assert (len(plan.sigmas), len(plan.texts)) == (steps + 1, 1)  # one prediction a step
    (picture,) = student.generate(plan.request)
    assert picture.size == (32, 32)
    if guidance_dim:
        (other,) = student.generate(dataclasses.replace(plan.request, guidance_scale=2.0))
        assert other.tobytes() != picture.tobytes()
        assert student.unet.guidance_embed.weight.any()


def test_consistency_training_does_not_use_the_models_unet(write, model_folder):
    student = ldm.load(write("training", "latents = 3").run(CPU), ldm.Placement("cpu"))
    teacher = ldm.load(model_folder, ldm.Placement("cpu"))
    assert student.config.sampler == "lcm"
    assert (student.unet.conv_out.weight - teacher.unet.conv_out.weight).abs().max() > 0.05


@pytest.mark.parametrize(("name", "kind"), [("lcm", LCMObjective), ("training", ConsistencyTraining)])
def test_a_run_that_was_killed_and_resumed_equals_one_that_was_not_bit_for_bit(
    write, name, kind, tmp_path, monkeypatch
):
    def weights():
        folder = write(name).run(CPU)
        return (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

    calls, forward = [], kind.forward

    def killed(self, batch):
        calls.append(self.steps_done)
        if len(calls) == 4:
            raise RuntimeError("killed")
        return forward(self, batch)

    whole = weights()
    (tmp_path / "run").rename(tmp_path / "whole")
    monkeypatch.setattr(kind, "forward", killed)
    with pytest.raises(RuntimeError, match="killed"):
        weights()
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["objective"]
    assert state["batches"] == 2
    assert not [key for key in state if key.startswith(("vae.", "networks."))]
    assert weights() == whole
    assert calls == [0, 1, 2, 3, 2, 3]


@pytest.mark.parametrize(
    ("name", "loss", "message"),
    [
        ("training", "", r"needs the table \[distillation\] or the table \[training\], not both"),
        ("training", "[training]\n[distillation]", r"needs the table \[distillation\] or"),
        ("lcm", "[loss]\nskip = 0", "loss: skip must be at least 1 timestep, got 0"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(write, name, loss, message):
    with pytest.raises(ValueError, match=message):
        write(name, loss=loss)


def test_a_student_cannot_be_a_teacher(write):
    student = write("lcm").run(CPU)
    again = dataclasses.replace(write("lcm"), model=student)
    with pytest.raises(ValueError, match="must be one of text to image that is not distilled, got fast"):
        again.run(CPU)


@pytest.mark.slow
def test_diffusers_loads_the_student_and_makes_its_pictures(write):
    diffusers = pytest.importorskip("diffusers")
    folder = write("lcm").run(CPU)
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder).to(torch.float32)
    assert type(theirs).__name__ == "LatentConsistencyModelPipeline"
    theirs.set_progress_bar_config(disable=True)
    (expected,) = theirs(
        "a red wall", num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(5),
        height=32, width=32,
    ).images  # fmt: skip
    (found,) = ldm.load(folder, ldm.Placement("cpu")).generate(ldm.Request("a red wall", seed=5))
    assert np.abs(np.asarray(found, float) - np.asarray(expected, float)).max() <= 1
