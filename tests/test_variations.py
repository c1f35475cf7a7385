"""Variations and interpolation: the arc between two noises, requests between two pictures, and the commands."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import ldm
from ldm.diffusion.samplers import seeded_noise
from ldm.loading import BUNDLED
from ldm.pictures import read_texts
from ldm.record import digest
from ldm.safety.audit import matches
from ldm.safety.watermark import detect
from ldm.variations import Variation, between, slerp

FROG = ldm.Request("a frog", steps=3, seed=3, sampler="euler")


def latents(pipe, request):
    *_, last = pipe.stream(request)
    return last.latents


# ------------------------------------------------------------------ the arc


def of_a1111(val, low, high):
    """A1111's formula, for latents c h w in fp32 (modules/rng.py; first posted on PyTorch's forum)."""
    low_norm = low / torch.norm(low, dim=1, keepdim=True)
    high_norm = high / torch.norm(high, dim=1, keepdim=True)
    omega = torch.acos((low_norm * high_norm).sum(1))
    so = torch.sin(omega)
    first, second = torch.sin((1.0 - val) * omega) / so, torch.sin(val * omega) / so
    return first.unsqueeze(1) * low + second.unsqueeze(1) * high


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_slerp_of_latents_is_that_of_a1111(t):
    a, b = torch.randn(2, 3, 4, 64, 48, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([of_a1111(t, low, high) for low, high in zip(a, b, strict=True)])
    assert torch.allclose(slerp(a, b, t), expected, rtol=0, atol=1e-5)  # fp32


def test_slerp_turns_by_equal_angles_and_keeps_the_length():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    for t in (0.0, 0.25, 0.5, 1.0):
        angle = torch.tensor(t * torch.pi / 2)
        assert torch.allclose(slerp(a, b, t, dim=0), 2 * torch.stack([angle.cos(), angle.sin()]), atol=1e-6)


def test_slerp_of_two_noises_is_noise_and_its_ends_are_exact():
    a, b = torch.randn(2, 1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)
    assert abs(slerp(a, b, 0.5).std() - 1) < 0.02
    assert torch.lerp(a, b, 0.5).std() < 0.75  # so that the difference is seen


@pytest.mark.parametrize("factor", [1.0, -1.0, 2.0, 0.0])
def test_slerp_of_parallel_opposite_and_zero_vectors_is_linear(factor):
    a = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(slerp(a, factor * a, 0.25), (0.75 + 0.25 * factor) * a, rtol=0, atol=1e-6)


# ------------------------------------------------------------------ variations of one picture


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_amount_1_is_the_other_picture_and_amount_0_the_picture_itself(pipe, sampler):
    request = dataclasses.replace(FROG, sampler=sampler)
    for amount, expected in ((0.0, request), (1.0, dataclasses.replace(request, prompt="a cat", seed=9))):
        varied = dataclasses.replace(request, variation=Variation(9, "a cat", amount))
        assert torch.equal(latents(pipe, varied), latents(pipe, expected))


def test_the_initial_noise_is_that_of_a1111(pipe):
    request = dataclasses.replace(FROG, images=2, variation=Variation(7, amount=0.1))
    plan = pipe.plan(request)
    drawn = [seeded_noise([seed], plan.latent_shape)()[0] for seed in (3, 7, 8)]
    expected = torch.stack([of_a1111(0.1, drawn[0], drawn[1]), of_a1111(0.1, drawn[0], drawn[2])])
    assert torch.allclose(plan.initial_noise()(), expected, rtol=0, atol=1e-3)  # fp32, columns of 8 numbers
    assert request.seeds == [3, 3]


def test_the_prompt_is_mixed_linearly_and_the_negative_prompt_stays(pipe):
    request = dataclasses.replace(FROG, negative_prompt="bad", images=2)
    plain, other, mixed = (
        pipe.conditions(pipe.plan(dataclasses.replace(request, **change)))
        for change in ({}, {"prompt": "a cat"}, {"variation": Variation(other_prompt="a cat", amount=0.25)})
    )
    assert torch.allclose(mixed[0].context, 0.75 * plain[0].context + 0.25 * other[0].context, rtol=0, atol=1e-6)
    assert torch.equal(mixed[1].context, plain[1].context)
    assert not torch.equal(plain[0].context, other[0].context)


def test_prompts_that_do_not_fit_and_wrong_values_are_refused(pipe):
    changing = dataclasses.replace(
        FROG, emphasis="a1111", prompt="[a:b:1] frog", variation=Variation(other_prompt="a cat")
    )
    with pytest.raises(ValueError, match=r"change at the same steps, got '.*' and 'a cat'"):
        pipe.stream(changing)
    with pytest.raises(ValueError, match="a variation needs another seed or another prompt"):
        Variation(amount=0.5)
    with pytest.raises(ValueError, match=r"amount must be a finite number from 0 to 1, got 1\.5"):
        Variation(1, amount=1.5)
    with pytest.raises(ValueError, match=r"variation must be an ldm\.Variation, got 7"):
        ldm.Request("a frog", variation=7)


# ------------------------------------------------------------------ the way from one picture to another


def test_the_way_has_equal_steps_and_passes_the_stations():
    frames = between(FROG, ["a", "b", "c"], [1, 2, 2], 5)
    assert [(f.prompt, f.seed) for f in frames] == [("a", 1), ("a", 1), ("b", 2), ("b", 2), ("c", 2)]
    assert [f.variation for f in frames] == [None, Variation(2, "b", 0.5), None, Variation(None, "c", 0.5), None]
    assert [f.variation and f.variation.amount for f in between(FROG, ["a"], [1, 2], 4)] == [None, 1 / 3, 2 / 3, None]


@pytest.mark.parametrize(
    ("prompts", "seeds", "frames", "message"),
    [
        (["a"], [1], 5, "give two prompts or more, or two seeds or more; .* got 1 prompts and 1 seeds"),
        (["a", "b", "c"], [1, 2], 5, "if both, then equally many: got 3 prompts and 2 seeds"),
        (["a", "b", "c"], [1], 2, "frames must be 3 or more, one for each prompt or seed, got 2"),
    ],
)
def test_a_way_that_is_not_clear_is_refused(prompts, seeds, frames, message):
    with pytest.raises(ValueError, match=message):
        between(FROG, prompts, seeds, frames)


def test_on_the_bundled_model_neighbors_differ_less_than_the_ends():
    pipe = ldm.load(BUNDLED, ldm.Placement("cpu"))
    request = ldm.Request("", steps=2)
    for prompts, seeds in ((["a red apple", "a panda"], [1]), (["a red apple"], [1, 2])):
        walked = [np.asarray(pipe.generate(each)[0]).astype(float) for each in between(request, prompts, seeds, 4)]
        ends = np.abs(walked[0] - walked[-1]).mean()
        steps = [np.abs(a - b).mean() for a, b in itertools.pairwise(walked)]
        print(prompts, seeds, ends, steps)
        assert min(steps) > 0
        assert np.mean(steps) < 0.8 * ends


# ------------------------------------------------------------------ the commands


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Run each test in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def fast(model_folder):
    """That model as the command loads it: packed weights can change the last bit."""
    return ldm.load(model_folder, ldm.Placement.fast(device="cpu"))


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_a_variation_is_repeated_from_its_record_and_changed_by_options(run, fast):
    words = ["a frog", "--steps", "2", "--seed", "3", "--images", "2", "--variation-seed", "7"]
    assert run("txt2img", *words, "--variation-strength", "0.2", "--out", "a.png")[0] == 0
    assert "Variation seed: 8, Variation seed strength: 0.2" in read_texts("a-00002.png")["parameters"]
    request = ldm.Request("a frog", steps=2, seed=3, variation=Variation(8, amount=0.2))
    assert np.array_equal(pixels("a-00002.png"), fast.generate(request)[0])
    assert run("txt2img", "--from", "a-00002.png", "--out", "b.png") == (0, "b.png\n", "")
    assert np.array_equal(pixels("b.png"), pixels("a-00002.png"))
    assert run("txt2img", "--from", "a-00002.png", "--variation-strength", "0.6", "--out", "c.png")[0] == 0
    request = dataclasses.replace(request, variation=Variation(8, amount=0.6))
    assert np.array_equal(pixels("c.png"), fast.generate(request)[0])


@pytest.mark.parametrize("out", ["walk.png", "walk.webp"])
def test_interpolate_writes_an_animation_whose_ends_are_the_plain_pictures(run, fast, out):
    words = ["--prompts", "a frog", "a cat", "--seeds", "3", "9", "--frames", "3", "--steps", "2", "--fps", "4"]
    assert run("interpolate", *words, "--out", out) == (0, f"{out}\n", "")
    with Image.open(out) as animation:
        assert animation.info["loop"] == 0
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(animation)]
        assert animation.info["duration"] == 250
    assert len(frames) == 3
    assert np.array_equal(frames[0], fast.generate(ldm.Request("a frog", steps=2, seed=3))[0])
    assert np.array_equal(frames[2], fast.generate(ldm.Request("a cat", steps=2, seed=9))[0])
    if out == "walk.png":
        way = {"prompts": ["a frog", "a cat"], "seeds": [3, 9], "frames": 3}
        assert json.loads(read_texts(out)["ldm-interpolate"]) == way
        assert run("txt2img", "--from", out, "--out", "first.png")[0] == 0
        assert np.array_equal(pixels("first.png"), frames[0])


def test_interpolate_writes_a_grid(run, fast):
    words = ["--prompts", "a frog", "--seeds", "3", "9", "--frames", "4", "--steps", "2", "--grid", "--json"]
    code, out, _ = run("interpolate", *words)
    assert (code, json.loads(out)["file"]) == (0, "out.png")
    assert pixels("out.png").shape == (64, 64, 3)
    assert np.array_equal(pixels("out.png")[:32, :32], fast.generate(ldm.Request("a frog", steps=2, seed=3))[0])


def test_interpolate_marks_each_picture_and_the_run_is_measured_and_logged(run, tmp_path):
    size = ["--width", "64", "--height", "64"]
    words = ["--prompts", "a frog", "a cat", "--seeds", "3", "--frames", "2", "--steps", "1", *size, "--out", "a.png"]
    code, out, err = run(
        "interpolate", *words, "--watermark", "sdxl", "--stats", "--audit", "log.jsonl", "--audit-hidden"
    )
    assert (code, out) == (0, "a.png\n")
    assert json.loads(err.removeprefix("ldm: "))["calls"] == {"text": 2, "step": 2, "decode": 2, "save": 1}
    with Image.open("a.png") as animation:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(animation)]
    assert [detect(frame, "sdxl").found for frame in frames] == [True, True]
    assert json.loads(read_texts("a.png")["ldm-watermark"]) == {"message": "sdxl", "method": "dwtDctSvd"}
    log = (tmp_path / "log.jsonl").read_text()
    asked, made = map(json.loads, log.splitlines())
    assert [matches(*pair) for pair in zip(asked["request"]["prompt"], ["a frog", "a cat"], strict=True)] == [True] * 2
    assert "frog" not in log
    assert (made["event"], made["outputs"][0]["sha256"]) == ("made", digest(Path("a.png")))
    assert (made["record"]["seeds"], made["record"]["frames"]) == ([3], 2)


def test_the_guard_refuses_an_animation_by_any_of_its_prompts(run, tmp_path):
    (tmp_path / "policy.toml").write_text('[rules.cats]\nweight = 0.9\nwords = ["cat"]')
    code, out, err = run("interpolate", "--prompts", "a frog", "a cat", "--guard", "policy.toml")
    assert (code, out) == (2, "")
    assert "refused: score 0.90 of 0.50, found cats ('cat')" in err
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "a.gif"], r"--out must end in .png or .webp, such as a.png, got 'a.gif'"),
        (["--out", "a.webp", "--grid"], "--out must end in .png, such as a.png, got 'a.webp'"),
        (["--fps", "0"], "--fps must be from 0.1 to 100, got 0.0"),
        (["--seeds", "1", "2", "3"], "give two prompts or more, or two seeds or more"),
        (["--frames", "1"], "frames must be 2 or more"),
        (["--watermark-method", "dwtDct"], "--watermark-method is for a watermark: add --watermark TEXT"),
        (["--trace", "no/trace.json"], "the trace no/trace.json is in no folder: there is no no; "),
        (["--audit-hidden"], "--audit-hidden is for the audit log: add --audit FILE"),
    ],
)
def test_a_bad_input_is_one_sentence_and_nothing_is_written(run, words, message, tmp_path):
    code, out, err = run("interpolate", "--prompts", "a", "b", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"ldm: error: {message}")
    assert not list(tmp_path.iterdir())
