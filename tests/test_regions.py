"""Prompts for regions: the blend of estimates, masks and boxes, pictures, the command, and its errors."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.cli import main
from ldm.diffusion.regions import blend
from ldm.regions import RegionalPrompt, weights
from tests.tiny import TINY_RANDOM, random_controlnet, random_networks

LEFT = "left=0,width=0.5"
PICTURE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
FROG = ldm.Request("a frog", "bad", steps=2, seed=3)


def masked(*box, size=(32, 32)):
    """A black mask with a white box."""
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def pixels(pipe, request):
    return np.asarray(pipe.generate(request)[0]).astype(int)


# ------------------------------------------------------------------ the blend


def test_the_blend_is_the_least_squares_solution_of_the_paper():
    draw = torch.Generator().manual_seed(0)
    estimates = torch.randn(3, 2, 4, 5, 6, generator=draw, dtype=torch.float64)
    maps = torch.rand(3, 5, 6, generator=draw, dtype=torch.float64)
    maps[0, 2:] = 0
    x = torch.zeros(2, 4, 5, 6)
    given = []
    denoisers = [lambda x, sigma, each=each: given.append((x, sigma)) or each for each in estimates]
    got = blend(denoisers, maps)(x, torch.tensor(3.0))
    assert all(each[0] is x and each[1] == 3 for each in given)
    for i in range(5):
        for j in range(6):  # eq. 3: the J with the least sum of |sqrt(W_i) (J - estimate_i)|^2
            roots = maps[:, i, j].sqrt()[:, None]
            solved = torch.linalg.lstsq(roots, roots * estimates[..., i, j].reshape(3, -1)).solution
            assert torch.allclose(got[..., i, j].reshape(1, -1), solved, rtol=0, atol=1e-12)


@pytest.mark.parametrize("maps", [-torch.ones(1, 2, 2), torch.zeros(1, 2, 2), torch.ones(2, 2, 2)])
def test_wrong_weights_of_a_blend_are_refused(maps):
    with pytest.raises(ValueError, match="each region needs a map of weights of 0 or more"):
        blend([lambda x, sigma: x], maps)


# ------------------------------------------------------------------ masks and boxes


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("left=0.5,width=0.5", [[0, 0, 1, 1]] * 4),
        ("left=0.125, width=0.5", [[0.5, 1, 0.5, 0]] * 4),
        ("top=0.25,height=0.25,width=0.5", [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
        (masked(0, 0, 8, 32), [[1, 0, 0, 0]] * 4),
        (masked(0, 0, 4, 32), [[0.5, 0, 0, 0]] * 4),
        (masked(0, 0, 10, 10, size=(20, 10)), [[1, 1, 0, 0]] * 4),  # stretched
        (masked(0, 0, 8, 32).convert("RGBA"), [[1, 0, 0, 0]] * 4),
    ],
)
def test_a_mask_takes_its_share_of_each_pixel_of_the_latents(mask, expected):
    found = RegionalPrompt(mask, "a fox").on(4, 4)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1 / 255)


def test_the_prompt_of_the_request_fills_what_the_masks_leave():
    regions = [RegionalPrompt("width=0.5", "a fox"), RegionalPrompt("left=0.25,width=0.5", "a cat", 3.0)]
    found = weights(regions, 1, 4)
    assert found[:, 0].tolist() == [[0, 0, 0, 1], [1, 1, 0, 0], [0, 3, 3, 0]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((5, "a fox"), "the mask of a region must be a path, a PIL picture or a box, got 5"),
        ((LEFT, 5), "prompt must be text, got 5"),
        ((LEFT, "a fox", 0.0), r"weight must be a finite number from 0.001 to 1000.0, got 0.0"),
        ((LEFT, "a fox", "much"), "weight must be a finite number from 0.001 to 1000.0, got 'much'"),
        (
            ("left=0.6,width=0.5", "a fox"),
            "a box lies in the picture, with shares of its sides such as left=0,top=0,.*0.6",
        ),
        (("right=0.6", "a fox"), "a box lies in the picture"),
        (("left=a", "a fox"), "a box lies in the picture"),
        (("left=0,left=0", "a fox"), "a box lies in the picture"),
        (("width=nan", "a fox"), "a box lies in the picture"),
        (("width=0", "a fox"), "a box lies in the picture"),
    ],
)
def test_a_wrong_region_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        RegionalPrompt(*given)


def test_regions_are_a_tuple_of_regional_prompts_with_a_white_part():
    with pytest.raises(ValueError, match=r"regions must be a tuple of ldm\.RegionalPrompt, got"):
        ldm.Request("a frog", regions=[(LEFT, "a fox")])
    assert ldm.Request("a frog", regions=[RegionalPrompt(LEFT, "a fox")]).regions[0].prompt == "a fox"
    with pytest.raises(ValueError, match="the mask of the region 'a fox' has no white part: the region would be empty"):
        _ = RegionalPrompt(Image.new("L", (8, 8)), "a fox").picture


# ------------------------------------------------------------------ pictures


def test_a_region_of_the_whole_picture_has_the_picture_of_its_prompt(pipe):
    whole = dataclasses.replace(FROG, regions=[RegionalPrompt("left=0", "a fox")])
    assert np.array_equal(pixels(pipe, whole), pixels(pipe, dataclasses.replace(FROG, prompt="a fox")))
    half = pixels(pipe, dataclasses.replace(FROG, regions=[RegionalPrompt(LEFT, "a fox")]))
    assert not np.array_equal(half, pixels(pipe, FROG))


@torch.no_grad()
def test_at_each_step_a_pixel_has_the_estimate_of_its_region(pipe):
    """With changing prompts and weights of words, and in image to image."""
    prompts = ("a [frog:cat:1]", "a (fox:1.4)")
    request = dataclasses.replace(FROG, emphasis="interpolate", source=ldm.Source(PICTURE, 1.0))
    plans = [pipe.plan(dataclasses.replace(request, prompt=prompt)) for prompt in prompts]
    asked = dataclasses.replace(request, prompt=prompts[0], regions=(RegionalPrompt(LEFT, prompts[1]),))
    plan = pipe.plan(asked)
    denoise, x = pipe.denoiser(plan, pipe.conditions(plan)), pipe.start(plan)
    frog, fox = (pipe.denoiser(each, pipe.conditions(each)) for each in plans)
    half = plan.latent_shape[2] // 2
    for sigma in plan.sigmas[:-1]:
        expected = frog(x, sigma)
        expected[..., :half] = fox(x, sigma)[..., :half]
        assert torch.allclose(denoise(x, sigma), expected, rtol=0, atol=1e-6)


def test_regions_work_with_a_controlnet_and_with_inpainting():
    mine = ldm.Pipeline(TINY_RANDOM, *random_networks())
    mine.controlnets["one"] = random_controlnet()
    regions = (RegionalPrompt("left=0", "a fox"),)
    source = ldm.Source(PICTURE, mask=ldm.Mask(masked(0, 0, 16, 16)))
    for part in ({"controls": (ldm.Control("one", PICTURE),)}, {"source": source}):
        got = pixels(mine, dataclasses.replace(FROG, regions=regions, **part))
        assert np.array_equal(got, pixels(mine, dataclasses.replace(FROG, prompt="a fox", **part)))
        assert not np.array_equal(got, pixels(mine, dataclasses.replace(FROG, **part)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_each_region_shows_the_ground_of_its_prompt(seed):
    pipe = ldm.load()
    prompts = ("a frog on the grass", "a frog in the snow")
    request = ldm.Request(prompts[0], steps=8, seed=seed)
    grass, snow = (pixels(pipe, dataclasses.replace(request, prompt=prompt)) for prompt in prompts)
    both = pixels(pipe, dataclasses.replace(request, regions=(RegionalPrompt("left=0.5,width=0.5", prompts[1]),)))
    half = both.shape[1] // 2
    for part, own, other in ((np.s_[:, :half], grass, snow), (np.s_[:, half:], snow, grass)):
        near, far = (np.abs(both[part].mean((0, 1)) - each[part].mean((0, 1))).sum() for each in (own, other))
        print(f"{near:.0f} {far:.0f}")
        assert near < far / 2


# ------------------------------------------------------------------ the command


@pytest.fixture
def run(model_folder, capsys, tmp_path, monkeypatch):
    """Run `ldm txt2img` in a folder with a mask; returns exit code, stdout and the error."""
    monkeypatch.chdir(tmp_path)
    masked(0, 0, 16, 32).save("mask.png")
    Image.new("L", (8, 8)).save("black.png")

    def run(*words):
        given = [] if "--from" in words else ["--model", str(model_folder), "--device", "cpu", "--steps", "1"]
        code = main(["txt2img", *given, *words])
        out, err = capsys.readouterr()
        return code, out, "".join(line for line in err.splitlines() if "error" in line)

    return run


def test_the_record_of_regions_repeats_the_picture_and_knows_the_masks(run):
    words = ("--region", "mask.png", "a fox", "--region-weight", "2", "--region", "top=0.5,height=0.5", "a cat")
    code, out, err = run("a frog", *words, "--out", "a.png", "--json")
    assert (code, err) == (0, "")
    settings = json.loads(out)["settings"]
    assert settings["request"]["regions"] == [
        {"mask": "mask.png", "prompt": "a fox", "weight": 2.0},
        {"mask": "top=0.5,height=0.5", "prompt": "a cat", "weight": 1.0},
    ]
    assert "region_1" in settings["sha256"]
    assert "region_2" not in settings["sha256"]
    assert run("--from", "a.png", "--out", "b.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    masked(0, 0, 16, 16).save("mask.png")
    message = "mask.png is not the region that made the picture; to use it all the same, name it with --region"
    assert run("--from", "a.png", "--out", "c.png")[::2] == (2, f"ldm: error: {message}")
    assert run("--from", "a.png", "--region", "mask.png", "a dog", "--out", "c.png")[0] == 0


def test_the_weight_of_the_only_recorded_region_can_be_changed(run):
    assert run("a frog", "--region", LEFT, "a fox", "--out", "a.png")[0] == 0
    _, out, _ = run("--from", "a.png", "--region-weight", "3", "--out", "b.png", "--json")
    assert json.loads(out)["settings"]["request"]["regions"] == [{"mask": LEFT, "prompt": "a fox", "weight": 3.0}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--region-weight", "2"), "the options of one region follow the --region that they are for"),
        (("--region", "none.png", "a fox"), "the picture none.png cannot be read: No such file or directory"),
        (
            ("--region", "black.png", "a fox"),
            "the mask of the region 'a fox' has no white part: the region would be empty",
        ),
        (
            ("--region", LEFT, "a fox", "--region-weight", "0"),
            "weight must be a finite number from 0.001 to 1000.0, got 0.0",
        ),
        (
            ("--region", "left=2", "a fox"),
            "a box lies in the picture, with shares of its sides such as left=0,top=0,width",
        ),
    ],
)
def test_a_wrong_region_is_one_sentence_and_no_picture(words, message, run):
    code, out, err = run("a frog", *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"ldm: error: {message}")
    assert not Path("out.png").exists()


def test_another_prompt_varies_the_prompt_of_the_request_and_not_the_regions(pipe):
    whole = ldm.RegionalPrompt("width=1", "a fox", 1.0)
    varied = ldm.Variation(other_prompt="a cat", amount=1.0)
    request = ldm.Request("a frog", steps=2, width=32, height=32, regions=(whole,), variation=varied)
    fox = ldm.Request("a fox", steps=2, width=32, height=32)
    assert pipe.generate(request)[0].tobytes() == pipe.generate(fox)[0].tobytes()


def test_a_box_without_a_width_reaches_to_the_side():
    assert ldm.RegionalPrompt("left=0.5", "a fox").box == {"left": 0.5, "top": 0.0, "width": 0.5, "height": 1.0}


def test_a_region_that_is_too_small_for_the_latents_is_refused(pipe):
    mask = Image.new("L", (512, 512))
    mask.putpixel((0, 0), 255)
    request = ldm.Request("a frog", steps=1, width=32, height=32, regions=(ldm.RegionalPrompt(mask, "a fox"),))
    with pytest.raises(ValueError, match="the region 'a fox' covers too little of"):
        pipe.generate(request)
