"""Requests with prompt syntax and with a prompt per picture: pictures, records, the command, and its errors."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm.cli import main
from ldm.pictures import read_texts
from ldm.request import Request
from tests.tiny import TINY_RANDOM, TINY_SDXL, random_networks


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


@pytest.fixture
def run(model_folder, capsys, tmp_path, monkeypatch):
    """Run `ldm txt2img` with the tiny random model in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        given = [] if "--from" in words else ["--model", str(model_folder), "--device", "cpu", "--steps", "2"]
        code = main(["txt2img", *given, *words])
        out, err = capsys.readouterr()
        return code, out, "".join(x for x in err.splitlines(keepends=True) if not x.startswith(f"ldm: {model_folder}"))

    return run


# ------------------------------------------------------------------ emphasis


@pytest.mark.parametrize("config", [TINY_RANDOM, TINY_SDXL], ids=lambda config: config.name)
def test_emphasis_changes_a_picture_with_weights_and_no_other(config):
    pipe = ldm.Pipeline(config, *random_networks(config))
    plain = Request("a red cat", steps=2)
    expected = pipe.generate(plain)[0]
    for emphasis in ("a1111", "interpolate"):
        for clip_skip in (None, 1):
            asked = dataclasses.replace(plain, clip_skip=clip_skip)
            same = pipe.generate(dataclasses.replace(asked, emphasis=emphasis))[0]
            assert np.array_equal(same, expected if clip_skip is None else pipe.generate(asked)[0])
        weighted = dataclasses.replace(plain, prompt="a (red:1.5) cat")
        changed = pipe.generate(dataclasses.replace(weighted, emphasis=emphasis))[0]
        assert not np.array_equal(changed, expected)
        assert not np.array_equal(changed, pipe.generate(weighted)[0])  # brackets as text


def test_a_long_prompt_makes_both_conditions_longer(pipe):
    plan = pipe.plan(Request("a cat BREAK on the grass", "bad", steps=2, emphasis="a1111"))
    assert [tuple(c.context.shape) for c in pipe.conditions(plan)] == [(1, 64, 32)] * 2
    short, long = (pipe.generate(Request(text, steps=2, emphasis="a1111"))[0] for text in ("a cat", "a cat BREAK dog"))
    assert not np.array_equal(short, long)


def test_emphasis_is_in_the_record_and_repeated_from_it(run):
    words = ["a [cat:dog:1] (on:1.4) grass BREAK red", "--emphasis", "interpolate", "--out", "a.png", "--json"]
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    assert json.loads(out)["settings"]["request"]["emphasis"] == "interpolate"
    assert run("--from", "a.png", "--out", "b.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a cat", "--emphasis", "compel"), "emphasis must be one of a1111, interpolate, got 'compel'"),
        (
            ("a (cat:1.2.3)", "--emphasis", "a1111"),
            "the weight of a word must be a finite number such as (word:1.2), got '1.2.3'; "
            r"write \( and \) for brackets that are part of the prompt",
        ),
        (
            ("a cat", "--negative", "[a|b]", "--emphasis", "a1111"),
            "'[a|b]' would alternate between its words in every step, which is not supported: "
            r"write [from:to:when], or \| for a bar that is part of the prompt",
        ),
        (
            ("--prompts", "a cat", "a dog", "--images", "3"),
            "a prompt per picture needs as many pictures as prompts, got 2 prompts and images=3",
        ),
        (("a cat", "--prompts", "a dog"), "give one prompt, or --prompts with one for each picture, not both: 'a cat'"),
    ],
)
def test_a_wrong_prompt_is_one_sentence_and_no_picture(words, message, run):
    assert run(*words) == (2, "", f"ldm: error: {message}\n")
    assert not Path("out.png").exists()


# ------------------------------------------------------------------ a prompt per picture


def test_each_picture_of_a_batch_equals_its_prompt_and_seed_alone():
    for config in (TINY_RANDOM, TINY_SDXL):
        pipe = ldm.Pipeline(config, *random_networks(config))
        request = Request(["a cat", "a dog"], "bad", steps=2, seed=5, images=2)
        assert request.prompt == ("a cat", "a dog")
        assert hash(request) == hash(dataclasses.replace(request))
        for i, picture in enumerate(pipe.generate(request)):
            alone = pipe.generate(Request(request.prompt[i], "bad", steps=2, seed=5 + i))[0]
            assert np.abs(np.asarray(picture).astype(int) - np.asarray(alone)).max() <= 1  # sums in another order
            other = pipe.generate(Request(request.prompt[1 - i], "bad", steps=2, seed=5 + i))[0]
            assert np.abs(np.asarray(picture).astype(int) - np.asarray(other)).max() > 1


def test_prompts_of_several_pictures_may_change_and_have_weights(pipe):
    request = Request(("a [cat:dog:1]", "(a:1.3) bird BREAK red"), steps=2, images=2, emphasis="a1111")
    plan = pipe.plan(request)
    assert plan.texts == ("a cat", "(a:1.3) bird BREAK red", "", "a dog")
    assert plan.which == ((0, 1), (2, 2), (3, 1), (2, 2))
    assert len(pipe.generate(request)) == 2


def test_prompts_per_picture_are_in_the_record_and_each_picture_is_repeated(run):
    code, out, err = run("--prompts", "a cat", "a dog", "--seed", "7", "--out", "a.png", "--json")
    made = json.loads(out)
    assert (code, err, made["files"], made["seeds"]) == (0, "", ["a-00001.png", "a-00002.png"], [7, 8])
    assert made["settings"]["request"]["prompt"] == ["a cat", "a dog"]
    assert read_texts("a-00002.png")["parameters"].startswith("a dog\n")
    assert run("--from", "a-00002.png", "--out", "b.png")[0] == 0
    assert Path("a-00002.png").read_bytes() == Path("b.png").read_bytes()
    assert run("--from", "a-00002.png", "--steps", "3", "--out", "c.png")[0] == 0
    assert read_texts("c.png")["parameters"].startswith("a dog\n")
    run("a dog", "--seed", "8", "--steps", "3", "--out", "d.png")
    assert np.abs(pixels("c.png") - pixels("d.png")).max() <= 1


@pytest.mark.parametrize("prompt", [None, 5, ("a", 5), ["a", None]])
def test_a_prompt_that_is_no_text_is_refused(prompt):
    with pytest.raises(ValueError, match=r"prompt must be text, got (None|5)"):
        Request(prompt, images=2)
