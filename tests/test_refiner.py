"""SDXL in two stages: which steps each model runs, what each sees, the device, the command, and bad inputs."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.checkpoint.files import save
from ldm.checkpoint.parts import Model
from ldm.cli import main
from ldm.diffusion.samplers import SAMPLERS
from ldm.models.vae import VAE
from ldm.pictures import read_texts
from ldm.refiner import plan_both, refine, stream_both
from tests.tiny import TINY_RANDOM, TINY_REFINER, TINY_SDXL, random_networks

FROG = ldm.Request("a frog", steps=10, seed=3)
PICTURE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")


def pipeline(config: ldm.ModelConfig) -> ldm.Pipeline:
    return ldm.Pipeline(config, *random_networks(config))


@pytest.fixture(scope="module")
def base() -> ldm.Pipeline:
    return pipeline(TINY_SDXL)


@pytest.fixture(scope="module")
def refiner() -> ldm.Pipeline:
    return pipeline(TINY_REFINER)


def changed(config: ldm.ModelConfig, part: str, **fields: object) -> ldm.ModelConfig:
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **fields)})


# ------------------------------------------------------------------ the steps


@pytest.mark.parametrize(
    ("handover", "steps", "spacing", "of_base"),
    [
        (0.8, 10, "leading", 8),  # 901 801 .. 201, 101 1
        (0.8, 10, "trailing", 8),  # 999 899 .. 299, 199 99
        (0.5, 10, "leading", 5),  # 501 is the last that is 500 or more
        (0.5, 25, "leading", 12),  # 961 .. 521, 481 .. 1
        (0.799, 10, "leading", 8),  # timestep 201 itself belongs to the base model
        (0.798, 10, "leading", 7),
        (0.8, 10, "karras", 6),
        (0.7, 2, "leading", 1),
    ],
)
def test_steps_that_start_above_the_handover_are_the_base_models(handover, steps, spacing, of_base, base, refiner):
    request = dataclasses.replace(FROG, steps=steps, spacing=spacing)
    first, second = plan_both(base, refiner, request, handover=handover)
    assert (len(first.sigmas) - 1, len(second.sigmas) - 1) == (of_base, steps - of_base)
    assert first.sigmas[-1] == second.sigmas[0]
    assert torch.equal(torch.cat([first.sigmas, second.sigmas[1:]]), base.plan(request).sigmas)


def test_together_they_run_exactly_the_steps_that_were_asked_for(base, refiner):
    steps = list(stream_both(base, refiner, FROG))
    assert [step.index for step in steps] == list(range(10))
    assert {step.total for step in steps} == {10}
    assert [step.sigma for step in steps] == base.plan(FROG).sigmas[1:].tolist()


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"dpmpp_2m", "dpmpp_2m_sde"}))  # they look back a step
def test_a_model_that_takes_over_from_itself_makes_the_picture_that_it_makes_alone(sampler, base):
    request = dataclasses.replace(FROG, sampler=sampler, steps=5, images=2)
    for pictures in (refine(base, base, request), refine(base, base, request, handover=0.5)):
        assert all(np.array_equal(*pair) for pair in zip(pictures, base.generate(request), strict=True))


def test_each_model_makes_its_own_steps(base, refiner):
    *of_base, last = stream_both(base, refiner, FROG)
    alone = list(base.stream(FROG))
    assert all(torch.equal(step.x, own.x) for step, own in zip(of_base[:8], alone, strict=False))
    assert not torch.allclose(last.x, alone[-1].x, atol=1e-2)
    sigmas = base.plan(FROG).sigmas[8:]
    *_, of_refiner = refiner.stream(FROG, latents=of_base[7].x, sigmas=sigmas)
    assert torch.equal(last.x, of_refiner.x)


def test_a_picture_can_be_refined_from_a_picture(base, refiner):
    request = dataclasses.replace(FROG, sampler="euler_ancestral", source=ldm.Source(PICTURE, strength=0.6))
    first, second = plan_both(base, refiner, request, handover=0.8)
    assert (len(first.sigmas) - 1, len(second.sigmas) - 1) == (4, 2)
    (alone,) = base.generate(request)
    (same,) = refine(base, base, request)
    assert np.array_equal(same, alone)


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
@pytest.mark.parametrize("source", [None, ldm.Source(PICTURE, strength=0.9)], ids=["noise", "picture"])
def test_an_own_loop_over_both_makes_the_same_pictures(base, refiner, sampler, source):
    request = dataclasses.replace(FROG, images=2, sampler=sampler, source=source)
    first, second = plan_both(base, refiner, request, handover=0.8)
    noise, x = first.noise(), base.start(first)
    for pipe, plan in ((base, first), (refiner, second)):
        for step in pipe.walk(plan, pipe.denoiser(plan, pipe.conditions(plan)), x, noise=noise):
            x = step.x
    expected = refine(base, refiner, request)
    assert len(expected) == 2
    assert all(map(np.array_equal, refiner.decode(step.latents), expected))


# ------------------------------------------------------------------ what each model sees


def test_each_model_is_told_the_sizes_that_it_knows(base, refiner):
    sizes = ldm.Sizes(original_width=512, crop_top=8, target_width=64, aesthetic_score=9.0)
    first, second = plan_both(base, refiner, dataclasses.replace(FROG, sizes=sizes), handover=0.8)
    assert first.scalars == ((32, 512, 8, 0, 32, 64),) * 2
    assert second.scalars == ((32, 512, 8, 0, 9.0), (32, 512, 8, 0, 2.5))


def test_a_negative_prompt_that_is_left_out_is_zeros_for_the_base_model_and_empty_for_the_refiner(base, refiner):
    assert [plan.texts for plan in plan_both(base, refiner, FROG, handover=0.8)] == [("a frog", None), ("a frog", "")]


def test_the_refiner_takes_the_steps_the_sampler_and_the_size_of_the_base_model(base):
    config = dataclasses.replace(TINY_REFINER, steps=50, sampler="euler", image_size=64)
    first, second = plan_both(base, pipeline(config), ldm.Request("a frog"), handover=0.8)
    for name in ("steps", "sampler", "spacing", "width", "height", "latent_shape"):
        assert getattr(second, name) == getattr(first, name)


# ------------------------------------------------------------------ the device


def recorded(pipe: ldm.Pipeline, name: str, log: list[str]) -> ldm.Pipeline:
    """Make a copy of `pipe` that notes which of its networks comes to the device, and which leaves."""
    networks = {pipe.unet: "unet", pipe.vae: "vae", pipe.text_encoder: "text encoder"}

    class Recording(ldm.Placement):
        def at_work(self, network):
            label, entered = f"{name}'s {networks[network]}", [0]

            class Visit:
                def __enter__(self):
                    if not entered[0]:
                        log.append(f"{label} comes")
                    entered[0] += 1

                def __exit__(self, *_):
                    entered[0] -= 1
                    if not entered[0]:
                        log.append(f"{label} leaves")

            return Visit()

    return ldm.Pipeline(pipe.config, pipe.unet, pipe.vae, pipe.text_encoder, placement=Recording())


def test_the_base_model_has_left_the_device_before_the_refiner_comes(base, refiner):
    log: list[str] = []
    both = recorded(base, "base", log), recorded(refiner, "refiner", log)
    refine(*both, dataclasses.replace(FROG, source=ldm.Source(PICTURE)))
    order = ["base's vae", "base's text encoder", "base's unet", "refiner's text encoder", "refiner's unet"]
    assert log == [f"{label} {verb}" for label in (*order, "refiner's vae") for verb in ("comes", "leaves")]


def test_a_stream_that_is_stopped_early_leaves_the_device_free(base, refiner):
    log: list[str] = []
    steps = stream_both(recorded(base, "base", log), recorded(refiner, "refiner", log), FROG)
    next(steps)
    steps.close()
    assert log[-1] == "base's unet leaves"
    assert not any("refiner" in line for line in log)


# ------------------------------------------------------------------ bad inputs


@pytest.mark.parametrize("handover", [0, 1, 0.0, 1.0, -0.5, 1.5, float("nan")])
def test_a_handover_outside_0_to_1_is_refused(handover, base, refiner):
    with pytest.raises(ValueError, match=rf"handover must lie between 0 and 1, got {handover}; .* 0\.8"):
        refine(base, refiner, FROG, handover=handover)


@pytest.mark.parametrize(
    ("request_", "handover", "message"),
    [
        (
            dataclasses.replace(FROG, steps=1),
            0.8,
            "handover 0.8 leaves no step for the refiner: it is timestep 200, and steps start at 999 to 999",
        ),
        (dataclasses.replace(FROG, steps=4, spacing="trailing"), 0.8, "no step for the refiner: .* 999 to 249; change"),
        (FROG, 0.05, "no step for the base model: it is timestep 950, .* 901 to 1; change the handover or take more"),
        (
            dataclasses.replace(FROG, source=ldm.Source(PICTURE, strength=0.2)),
            0.8,
            "no step for the base model: it is timestep 200, and steps start at 101 to 1;",
        ),
    ],
)
def test_a_model_without_a_step_is_refused(request_, handover, message, base, refiner):
    with pytest.raises(ValueError, match=message):
        refine(base, refiner, request_, handover=handover)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            changed(TINY_REFINER, "vae", scaling_factor=0.18),
            "random-sdxl and random-refiner have different latents: use",
        ),
        (
            changed(TINY_REFINER, "diffusion", beta_end=0.02),
            "were trained with different noise schedules: use a refiner",
        ),
        (changed(TINY_REFINER, "unet", in_channels=9), "takes 9 channels, and text to image has 4"),
    ],
)
def test_models_that_do_not_fit_together_are_refused(config, message, base):
    other = ldm.Pipeline(config, *random_networks(TINY_REFINER))
    with pytest.raises(ValueError, match=message):
        refine(base, other, FROG)


def test_a_size_or_score_that_neither_model_has_is_refused(base):
    request = dataclasses.replace(FROG, sizes=ldm.Sizes(aesthetic_score=7.0))
    with pytest.raises(ValueError, match=r"aesthetic_score is 7\.0, and the model random-sdxl is conditioned on"):
        refine(base, base, request)


# ------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def folders(tmp_path_factory, base, refiner):
    """The tiny SDXL and its refiner, saved."""
    folder = tmp_path_factory.mktemp("models")
    for name, pipe in (("base", base), ("refiner", refiner)):
        save(Model(pipe.config, pipe.unet, pipe.vae, pipe.text_encoder), folder / name)
    return folder


@pytest.fixture
def run(folders, tmp_path, monkeypatch, capsys):
    """Run `ldm` in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = main([*words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.mark.slow
def test_the_command_refines_and_repeats_the_picture_bit_for_bit(run, folders):
    models = ("--model", str(folders / "base"), "--refiner", str(folders / "refiner"))
    words = ("a frog", "--steps", "10", "--device", "cpu", "--no-packed", "--seed", "3", "--images", "2")
    code, out, err = run("txt2img", *words, *models, "--json")
    settings = json.loads(out)["settings"]
    assert code == 0
    assert [line.split(";")[0] for line in err.splitlines()] == [
        f"ldm: {folders / 'base'}: random-sdxl",
        f"ldm: {folders / 'refiner'}: random-refiner",
    ]
    placement = ldm.Placement("cpu")
    pipes = ldm.load(folders / "base", placement), ldm.load(folders / "refiner", placement)
    expected = refine(*pipes, dataclasses.replace(FROG, images=2))
    for name, picture in zip(("out-00001.png", "out-00002.png"), expected, strict=True):
        assert np.array_equal(pixels(name), picture)
    assert settings["model"] == {"model": models[1], "ema": False, "refiner": models[3], "handover": 0.8}
    assert settings["sha256"].keys() == {"model", "refiner"}
    told = f"Refiner: refiner [{settings['sha256']['refiner'][:10]}], Refiner switch at: 0.8"
    assert told in read_texts("out-00001.png")["parameters"]
    assert (settings["resolved"]["steps"], settings["resolved"]["steps_run"]) == (10, 10)

    assert run("txt2img", "--from", "out-00002.png", "--out", "again.png")[0] == 0
    assert np.array_equal(pixels("again.png"), expected[1])
    run("txt2img", "--from", "out-00001.png", "--handover", "0.5", "--out", "half.png")
    assert np.array_equal(pixels("half.png"), refine(*pipes, FROG, handover=0.5)[0])


def test_repeating_with_another_refiner_under_its_name_is_refused_unless_it_is_named(run, folders, tmp_path):
    shutil.copytree(folders / "refiner", "refiner")
    words = ("a frog", "--steps", "5", "--device", "cpu", "--model", str(folders / "base"))
    run("txt2img", *words, "--refiner", "refiner", "--out", "a.png")
    (tmp_path / "refiner" / "another.txt").write_text("file")
    code, _, err = run("txt2img", "--from", "a.png", "--out", "b.png")
    assert code == 2
    assert "refiner is not the refiner that made the picture; to use it all the same, name it with --refiner" in err
    assert run("txt2img", "--from", "a.png", "--refiner", "refiner", "--out", "b.png")[0] == 0


def test_another_vae_decodes_what_the_refiner_has_made(run, folders, tmp_path):
    torch.manual_seed(1)
    other = VAE(TINY_SDXL.vae)
    base = ldm.load(folders / "base", ldm.Placement("cpu"))
    save(Model(TINY_SDXL, base.unet, other, base.text_encoder), tmp_path / "other")
    models = ("--model", str(folders / "base"), "--refiner", str(folders / "refiner"), "--vae", "other")
    run("txt2img", "a frog", "--steps", "10", "--device", "cpu", "--no-packed", "--seed", "3", *models)
    refiner = ldm.load(folders / "refiner", ldm.Placement("cpu"), vae=tmp_path / "other")
    assert np.array_equal(pixels("out.png"), refine(base, refiner, FROG)[0])


def test_the_command_takes_the_refiner_for_image_to_image_too(run, folders):
    PICTURE.save("in.png")
    words = ("in.png", "a frog", "--steps", "10", "--device", "cpu", "--no-packed", "--seed", "3")
    source = ldm.Source(PICTURE, strength=0.6)
    run("img2img", *words, "--model", str(folders / "refiner"), "--out", "alone.png")
    refiner = ldm.load(folders / "refiner", ldm.Placement("cpu"))
    assert np.array_equal(pixels("alone.png"), refiner.generate(dataclasses.replace(FROG, source=source))[0])
    models = ("--model", str(folders / "base"), "--refiner", str(folders / "refiner"))
    _, out, _ = run("img2img", *words, *models, "--out", "both.png", "--json")
    assert json.loads(out)["settings"]["resolved"]["steps_run"] == 6
    base = ldm.load(folders / "base", ldm.Placement("cpu"))
    assert np.array_equal(pixels("both.png"), refine(base, refiner, dataclasses.replace(FROG, source=source))[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--refiner", "nowhere"), "nowhere does not exist: give a model folder or a .safetensors file"),
        (("--refiner", "{other}"), "random-sdxl and random have different latents: use SDXL's own refiner"),
        (
            ("--refiner", "{refiner}", "--handover", "0"),
            "handover must lie between 0 and 1, got 0.0; SDXL's refiner is",
        ),
        (
            ("--refiner", "{refiner}", "--handover", "1"),
            "handover must lie between 0 and 1, got 1.0; SDXL's refiner is",
        ),
        (
            ("--refiner", "{refiner}", "--handover", "nan"),
            "handover must lie between 0 and 1, got nan; SDXL's refiner is",
        ),
        (
            ("--refiner", "{refiner}", "--steps", "1"),
            "handover 0.8 leaves no step for the refiner: it is timestep 200, ",
        ),
        (("--handover", "0.5"), "handover 0.5 needs a refiner: give one, or leave out the handover"),
        (("--aesthetic-score", "7"), "aesthetic_score is 7.0, and the model random-sdxl is conditioned on original_"),
    ],
)
def test_a_bad_choice_is_one_sentence_and_nothing_is_written(words, message, run, folders, tmp_path):
    other = changed(TINY_RANDOM, "vae", scaling_factor=0.18)
    if "{other}" in words:
        save(Model(other, *random_networks(other)), folders / "sd")
    given = [word.format(refiner=folders / "refiner", other=folders / "sd") for word in words]
    code, out, err = run("txt2img", "a frog", "--device", "cpu", "--model", str(folders / "base"), *given)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"ldm: error: {message}")
    assert not list(tmp_path.iterdir())
