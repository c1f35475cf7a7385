"""ControlNets in a request: the steps that have them, the hint, the command, the record, and bad input."""

import dataclasses
import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm import control as module
from ldm.checkpoint.controlnets import save_controlnet
from ldm.cli import main
from ldm.models.controlnet import Applied, Controlled
from tests.tiny import TINY_RANDOM, random_controlnet, random_networks

PICTURE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
FROG = ldm.Request("a frog", "bad", steps=4, seed=3)


@pytest.fixture
def mine():
    """A tiny random model with two ControlNets by name."""
    pipe = ldm.Pipeline(TINY_RANDOM, *random_networks())
    pipe.controlnets |= {"one": random_controlnet(seed=1), "two": random_controlnet(seed=2)}
    return pipe


def frog(*controls, **changes):
    return dataclasses.replace(FROG, controls=controls, **changes)


# ------------------------------------------------------------------ the steps


@pytest.mark.parametrize("n", [1, 4, 7, 10])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.2, 0.8), (0.0, 0.5), (0.5, 1.0), (0.25, 0.9)])
def test_the_steps_with_a_controlnet_are_those_of_diffusers(n, start, end):
    sigmas = torch.linspace(10, 0, n + 1, dtype=torch.float64)
    expected = [1.0 - float(i / n < start or (i + 1) / n > end) == 1.0 for i in range(n)]  # their `controlnet_keep`
    control = ldm.Control("net", PICTURE, start=start, end=end)
    if not any(expected):
        with pytest.raises(ValueError, match=f"the ControlNet acts in none of the {n} steps"):
            module.levels(control, sigmas)
        return
    low, high = module.levels(control, sigmas)
    assert [low < sigma <= high for sigma in sigmas[:-1].tolist()] == expected


@torch.no_grad()
def test_each_step_uses_the_controlnets_whose_share_it_is_in(mine):
    request = frog(ldm.Control("one", PICTURE, end=0.5), ldm.Control("two", PICTURE, 0.5, start=0.25, end=0.75))
    plan = mine.plan(request)
    conditions, x = mine.conditions(plan), mine.start(plan)
    hint = module.hint(request.controls[0], 32, 32)
    one, two = Applied(mine.controlnets["one"], hint), Applied(mine.controlnets["two"], hint, 0.5)
    denoise = mine.denoiser(plan, conditions)
    for sigma, used in zip(plan.sigmas[:-1], ([one], [one, two], [two], []), strict=True):
        bind = mine.binding(Controlled(mine.unet, used) if used else None)
        expected = mine.denoiser(plan, conditions, bind)(x, sigma)
        assert torch.equal(denoise(x, sigma), expected)


def test_the_guidance_of_a_request_reaches_guess_mode_in_one_batch_and_in_two_passes(mine):
    request = frog(ldm.Control("one", PICTURE, guess=True), images=2)
    batched = [np.asarray(p).astype(int) for p in mine.generate(request)]
    mine.placement = ldm.Placement("cpu", guidance="sequential")
    sequential = [np.asarray(p).astype(int) for p in mine.generate(request)]
    assert max(np.abs(a - b).max() for a, b in zip(batched, sequential, strict=True)) <= 1
    plain = mine.generate(frog(ldm.Control("one", PICTURE), images=2))
    assert not np.array_equal(plain[0], batched[0])


def test_image_to_image_takes_controls_and_the_refiner_drops_them(mine):
    request = frog(ldm.Control("one", PICTURE), source=ldm.Source(PICTURE, 0.5))
    controlled, plain = (mine.generate(r)[0] for r in (request, dataclasses.replace(request, controls=())))
    assert not np.array_equal(controlled, plain)
    from ldm.refiner import plan_both

    plans = plan_both(mine, mine, frog(ldm.Control("one", PICTURE), steps=10), handover=0.5)
    assert [len(plan.request.controls) for plan in plans] == [1, 0]


# ------------------------------------------------------------------ the hint


def test_a_hint_is_the_picture_in_0_to_1_cropped_to_the_size():
    wide = Image.new("RGB", (96, 32), "black")
    wide.paste("white", (32, 0, 64, 32))  # the middle
    assert torch.equal(module.hint(ldm.Control("net", wide), 32, 32), torch.ones(1, 3, 32, 32))
    levels = torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)[None] / 255
    assert torch.allclose(module.hint(ldm.Control("net", PICTURE), 32, 32), levels, rtol=0, atol=1e-6)


def test_canny_gets_the_resized_picture_and_the_usual_thresholds(monkeypatch):
    cv2, seen = ModuleType("cv2"), []
    cv2.__spec__ = ModuleSpec("cv2", None)
    cv2.Canny = lambda array, low, high: (
        seen.append((array.shape, low, high)) or np.full(array.shape[:2], 255, np.uint8)
    )
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    edges = module.hint(ldm.Control("net", PICTURE.resize((80, 40)), detector="canny"), 48, 32)
    assert seen == [((32, 48, 3), 100, 200)]
    assert torch.equal(edges, torch.ones(1, 3, 32, 48))


def test_canny_finds_the_outline_of_a_square():
    square = Image.new("RGB", (32, 32), "black")
    square.paste("white", (8, 8, 24, 24))
    edges = module.hint(ldm.Control("net", square, detector="canny"), 32, 32)[0, 0]
    assert edges[12:20, 6:10].amax(1).all()
    assert not edges[12:20, 12:20].any()


def test_canny_without_opencv_names_the_extra(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"canny needs OpenCV, which is not installed: .*pip install 'ldm\[control\]'"):
        _ = ldm.Control("net", PICTURE, detector="canny").picture


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((5, PICTURE), "a ControlNet is named by its path, a str or a Path, got 5"),
        (("net", 5), "the control must be the path of a picture or a PIL picture, got 5"),
        (("net", PICTURE, "much"), "weight must be a finite number, got 'much'"),
        (("net", PICTURE, 1.0, -0.1), "start must be a finite number from 0 to 1, got -0.1"),
        (("net", PICTURE, 1.0, 0.0, 1.5), "end must be a finite number from 0 to 1, got 1.5"),
        (("net", PICTURE, 1.0, 0.5, 0.5), "must end after it begins, got the shares 0.5 and 0.5 of the steps"),
        (("net", PICTURE, 1.0, 0.0, 1.0, 1), "guess must be True or False, got 1"),
        (("net", PICTURE, 1.0, 0.0, 1.0, False, "depth"), "detector must be one of canny, got 'depth'"),
    ],
)
def test_a_bad_control_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ldm.Control(*given)


def test_controls_are_a_tuple_of_control():
    with pytest.raises(ValueError, match=r"controls must be a tuple of ldm\.Control, got"):
        ldm.Request("a frog", controls=ldm.Control("net", PICTURE))
    assert ldm.Request("a frog", controls=[ldm.Control("net", PICTURE)]).controls[0].model == "net"


# ------------------------------------------------------------------ the command


@pytest.fixture
def run(model_folder, tmp_path, monkeypatch, capsys):
    """Run `ldm` in a folder with two ControlNets and a picture; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    PICTURE.save("in.png")
    for i, name in enumerate(("one", "two"), 1):
        save_controlnet(random_controlnet(seed=i), tmp_path / name)

    def run(command, *words):
        given = [] if "--from" in words else ["--model", str(model_folder), "--device", "cpu", "--steps", "4"]
        code = main([command, *words, *given])
        out, err = capsys.readouterr()
        return code, out, "".join(x for x in err.splitlines(keepends=True) if "error" in x)

    return run


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


ONE = ("--controlnet", "one", "--control", "in.png")


@pytest.mark.slow
def test_each_option_reaches_its_controlnet_and_the_record_repeats_the_picture(run, model_folder):
    more = ("--control-weight", "0.5", "--controlnet", "two", "--control", "in.png")
    more += ("--control-from", "0.25", "--control-to", "0.75", "--control-guess")
    code, out, err = run("txt2img", "a frog", *ONE, *more, "--json")
    assert (code, err) == (0, "")
    settings = json.loads(out)["settings"]
    usual = {"image": "in.png", "weight": 1.0, "start": 0.0, "end": 1.0, "guess": False}
    two = usual | {"model": "two", "start": 0.25, "end": 0.75, "guess": True}
    assert settings["request"]["controls"] == [usual | {"model": "one", "weight": 0.5}, two]
    assert {"controlnet_1", "control_1", "controlnet_2", "control_2"} <= settings["sha256"].keys()
    controls = (ldm.Control("one", "in.png", 0.5), ldm.Control("two", "in.png", 1.0, 0.25, 0.75, True))
    request = ldm.Request("a frog", steps=4, controls=controls)
    pipe = ldm.load(model_folder, ldm.Placement.fast(device="cpu"))
    assert np.array_equal(pixels("out.png"), pipe.generate(request)[0])
    assert run("txt2img", "--from", "out.png", "--out", "b.png")[0] == 0
    assert np.array_equal(pixels("out.png"), pixels("b.png"))


@pytest.mark.slow
def test_options_beside_from_change_or_replace_the_controlnet(run):
    run("txt2img", "a frog", *ONE, "--out", "a.png")
    run("txt2img", "--from", "a.png", "--control-weight", "0.5", "--out", "b.png")
    run("txt2img", "a frog", *ONE, "--control-weight", "0.5", "--out", "c.png")
    assert np.array_equal(pixels("b.png"), pixels("c.png"))
    assert not np.array_equal(pixels("a.png"), pixels("b.png"))
    run("txt2img", "--from", "a.png", "--controlnet", "two", "--control", "in.png", "--out", "d.png")
    run("img2img", "in.png", "--from", "d.png", "--out", "e.png")
    assert not np.array_equal(pixels("a.png"), pixels("d.png"))
    assert not np.array_equal(pixels("d.png"), pixels("e.png"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("in.png", "in.png is not the control picture that made the picture; to use it all the same, name it with "),
        ("one/config.json", "one is not the controlnet that made the picture; to use it all the same, name it with "),
    ],
)
@pytest.mark.slow
def test_a_changed_file_of_a_record_is_refused_unless_it_is_named(run, changed, message, tmp_path):
    run("txt2img", "a frog", *ONE, "--out", "a.png")
    if changed == "in.png":
        PICTURE.rotate(90).save("in.png")
    else:
        save_controlnet(random_controlnet(seed=9), tmp_path / "one")
    code, _, err = run("txt2img", "--from", "a.png", "--out", "b.png")
    assert (code, err) == (2, f"ldm: error: {message}--controlnet and --control\n")
    assert run("txt2img", "--from", "a.png", *ONE, "--out", "b.png")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--controlnet", "one"), "--controlnet one is not complete: add --control"),
        (("--control", "in.png"), "the options of one ControlNet follow the --controlnet that they are for"),
        ((*ONE, "--control", "in.png"), "--control is given twice for one ControlNet: name each with --controlnet"),
        (("--controlnet", "one", "--control", "no.png"), "the picture no.png cannot be read: No such file"),
        (("--controlnet", "none", "--control", "in.png"), "none does not exist: give a model folder or a"),
        ((*ONE, "--control-weight", "nan"), "weight must be a finite number, got nan"),
        ((*ONE, "--control-to", "0.1"), "the ControlNet acts in none of the 4 steps: none lies between the shares 0.0"),
        (("--controlnet", "one", "--control", "canny:in.png"), "canny needs OpenCV, which is not installed"),
    ],
)
def test_a_bad_input_is_one_sentence_and_nothing_is_written(run, words, message, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    before = sorted(tmp_path.iterdir())
    code, _, err = run("txt2img", "a frog", *words)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"ldm: error: {message}")
    assert sorted(tmp_path.iterdir()) == before
