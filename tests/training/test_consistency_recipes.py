"""From a TOML file to a student of few steps that makes pictures."""

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import ldm
from ldm.checkpoint.sampling import KEY, LCM_LORA, with_sampling
from ldm.training.consistency_models import ConsistencyTraining, DistillationLoss, TrainingLoss
from ldm.training.lcm import LCMLoss, LCMObjective
from ldm.training.recipes import ConsistencyRecipe, LCMRecipe, RewardRecipe, read_recipe
from ldm.training.reward import RewardLoss
from tests.tiny import TINY_RANDOM

ROOT = Path(__file__).parent.parent.parent
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
    "tuning": ("consistency", "[training]\nfirst_levels = 2\nlast_levels = 8\nfrom_model = true"),
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
    ("name", "steps", "scale", "guidance_dim"),
    [("lcm", 4, 3.0, 256), pytest.param("distillation", 2, 1.0, None, marks=pytest.mark.slow)],
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


@pytest.mark.slow
def test_an_lcm_lora_is_saved_as_a_file_that_gives_the_model_four_steps(write, model_folder):
    loss = '[loss]\nguidance = [3.0, 3.0]\n[lora]\nrank = 2\ntargets = ["to_q", "to_v", "conv1"]'
    file = write("lcm", loss=loss).run(CPU)
    assert file.name == "lora.safetensors"
    plain, with_lora = (ldm.load(model_folder, ldm.Placement("cpu"), loras=loras) for loras in ([], [file]))
    (applied,) = with_lora.loras.applied
    assert applied.applied == applied.total > 4
    request = ldm.Request("a red wall", seed=1)
    plan = with_lora.plan(request)
    assert (plan.sampler, plan.spacing, plan.steps, plan.guidance_scale) == ("lcm", "lcm", 4, 1.0)
    asked = dataclasses.replace(request, sampler="lcm", spacing="lcm", steps=4, guidance_scale=1.0)
    assert with_lora.generate(request)[0].tobytes() == with_lora.generate(asked)[0].tobytes()
    assert with_lora.generate(asked)[0].tobytes() != plain.generate(asked)[0].tobytes()
    assert plain.plan(request).sampler == "dpmpp_2m"
    off = ldm.load(model_folder, ldm.Placement("cpu"), loras=[f"{file}:0"])
    assert off.config == plain.config


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"sampler": "magic"}, "the sampler must be one of ddpm, .*, got 'magic'"),
        ({"steps": 0}, "steps must be a whole number, 1 or more, got 0"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a finite number, 0 or more, got -1.0"),
        ({"spacing": "even"}, "spacing must be one of 'leading', .*, got 'even'"),
        ({"more": 1}, "unknown 'more'"),
    ],
)
def test_settings_in_a_loras_file_that_cannot_be_are_refused(said, message, tmp_path):
    text = json.dumps(dataclasses.asdict(LCM_LORA) | said)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {KEY: text})
    with pytest.raises(ValueError, match=rf"metadata ldm\.sampling.*{message}"):
        with_sampling(TINY_RANDOM, [tmp_path / "a.safetensors"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["training", "tuning"])
def test_consistency_training_starts_from_nothing_or_from_the_models_unet(name, write, model_folder):
    student = ldm.load(write(name, "latents = 3").run(CPU), ldm.Placement("cpu"))
    teacher = ldm.load(model_folder, ldm.Placement("cpu"))
    assert student.config.sampler == "lcm"
    changed = (student.unet.conv_out.weight - teacher.unet.conv_out.weight).abs().max()
    assert changed < 0.05 if name == "tuning" else changed > 0.05


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("size = 32", 'size = 32\nkeep_out = 1\nmask = "alpha"', r"^mask and keep_out under \[data\] cannot be used"),
        ("steps = 4", 'steps = 4\nparallel = "fsdp"', "^parallel = 'fsdp' cannot be used in this kind of recipe"),
    ],
)
def test_keys_that_a_student_does_not_use_are_refused(write, tmp_path, before, after, message):
    write("lcm")
    path = tmp_path / "recipe.toml"
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(ValueError, match=message):
        read_recipe(path).run(CPU)


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


def documented(heading, end):
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").split(heading)[1].split(end)[0]
    return dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \| ", text, re.MULTILINE))


@pytest.mark.parametrize(
    ("settings", "heading", "end"),
    [
        (LCMLoss, "## Fewer steps", "### Consistency models"),
        (DistillationLoss, "| key of `[distillation]`", "| key of `[training]`"),
        (TrainingLoss, "| key of `[training]`", "## A reward"),
        (RewardLoss, "## A reward", "## Your own pictures"),
    ],
)
def test_the_keys_in_the_documentation_are_those_of_the_code(settings, heading, end):
    rows = {name: tomllib.loads(f"x = {value}")["x"] for name, value in documented(heading, end).items()}
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    assert rows == defaults


def test_the_recipes_that_ship_can_be_read():
    names = ("distill_lcm", "distill_lcm_lora", "distill_consistency", "train_consistency", "reward_tiny")
    lcm, lora, distillation, training, reward = (read_recipe(ROOT / "configs" / f"{name}.toml") for name in names)
    assert isinstance(lcm, LCMRecipe)
    assert lcm.lora is None
    assert isinstance(lora, LCMRecipe)
    assert lora.lora is not None
    assert lora.loss.guidance[0] == lora.loss.guidance[1]
    assert isinstance(distillation, ConsistencyRecipe)
    assert distillation.distillation is not None
    assert isinstance(training, ConsistencyRecipe)
    assert training.training is not None
    assert isinstance(reward, RewardRecipe)
    assert len({recipe.out for recipe in (lcm, lora, distillation, training, reward)}) == 5
    assert {str(recipe.model) for recipe in (lcm, lora, distillation, training, reward)} == {"weights/tiny"}
