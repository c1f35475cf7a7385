"""`ldm edit`: a picture and an instruction, again from the record, and one sentence for every bad input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.checkpoint.files import save
from ldm.checkpoint.parts import Model
from ldm.cli import main
from ldm.models.unet import UNet
from ldm.pictures import read_texts
from ldm.training import changes, objects
from tests.test_editing import EIGHT, PICTURE
from tests.tiny import random_networks


@pytest.fixture(scope="module")
def edit_model(tmp_path_factory):
    """A random editing model as one file in the official layout."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "edit"
    save(Model(EIGHT, UNet(EIGHT.unet).eval(), *random_networks()[1:]), path)
    return path


@pytest.fixture
def run(edit_model, capsys, tmp_path, monkeypatch):
    """Run `ldm` with the random editing model in a folder with a picture; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    PICTURE.save("in.png")

    def run(command, *words):
        given = [] if {"--from", "--model"} & {*words} else ["--model", str(edit_model), "--device", "cpu"]
        code = main([command, *words, *given])
        out, err = capsys.readouterr()
        return code, out, "".join(x for x in err.splitlines(keepends=True) if not x.startswith(f"ldm: {edit_model}"))

    return run


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


SNOWY = ("in.png", "make it snowy", "--steps", "2")


def test_the_command_makes_the_picture_of_the_pipeline_and_records_it(run, edit_model):
    pipe = ldm.load(edit_model, ldm.Placement.fast(device="cpu"))
    assert pipe.config.edits
    code, out, err = run("edit", *SNOWY, "--json")
    settings = json.loads(out)["settings"]
    assert (code, err, settings["task"]) == (0, "", "edit")
    assert (settings["request"]["source"]["image_guidance"], settings["request"]["source"]["strength"]) == (1.5, 1.0)
    request = ldm.Request("make it snowy", steps=2, source=ldm.Source("in.png", image_guidance=1.5))
    assert np.array_equal(pixels("out.png"), pipe.generate(request)[0])
    assert "Image CFG scale: 1.5" in read_texts("out.png")["parameters"]
    assert settings["sha256"].keys() == {"model", "source"}


def test_a_picture_is_repeated_from_its_record_and_changed_by_options(run):
    run("edit", *SNOWY, "--image-guidance", "1.2", "--images", "2", "--out", "a.png")
    for command in ("edit", "txt2img"):
        assert run(command, "--from", "a-00002.png", "--out", f"{command}.png") == (0, f"{command}.png\n", "")
        assert np.array_equal(pixels(f"{command}.png"), pixels("a-00002.png"))
    assert run("edit", "--from", "a-00001.png", "--image-guidance", "2", "--out", "b.png")[0] == 0
    run("edit", *SNOWY, "--image-guidance", "2", "--out", "c.png")
    assert np.array_equal(pixels("b.png"), pixels("c.png"))


@pytest.mark.slow
def test_a_recorded_run_with_a_mask_becomes_an_edit_without_it(run, edit_model, model_folder):
    PICTURE.convert("L").save("mask.png")
    words = ["in.png", "mask.png", "a frog", "--steps", "2", "--model", str(model_folder), "--device", "cpu"]
    assert run("inpaint", *words, "--out", "a.png")[0] == 0
    words = ["--from", "a.png", "--model", str(edit_model), "--out", "b.png"]
    assert run("edit", *words)[0] == 0
    run("edit", "in.png", "a frog", "--steps", "2", "--out", "c.png")
    assert np.array_equal(pixels("b.png"), pixels("c.png"))


def test_a_source_that_has_changed_is_refused_unless_it_is_named(run):
    run("edit", *SNOWY, "--out", "a.png")
    PICTURE.rotate(90).point(lambda level: level // 2).save("in.png")
    code, _, err = run("edit", "--from", "a.png", "--out", "b.png")
    assert code == 2
    assert err.endswith(
        "in.png is not the source picture that made the picture; to use it all the same, name it as the "
        "PICTURE of ldm edit\n"
    )
    assert run("edit", "in.png", "--from", "a.png", "--out", "b.png")[0] == 0


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("edit", (), "give a picture and an instruction, or --from a picture that ldm made"),
        ("edit", ("in.png",), "give a picture and an instruction, or --from a picture that ldm made"),
        ("edit", ("--prompts", "a", "b"), "give a picture and an instruction, or --from a picture that ldm made"),
        ("edit", (*SNOWY, "--image-guidance", "-1"), "image_guidance must be a finite number, 0 or more, got -1"),
        ("edit", ("gone.png", "make it snowy"), "the picture gone.png cannot be read: No such file or directory"),
        ("edit", (*SNOWY, "--model", "MODEL"), "takes 4 channels, and editing needs 8: use an"),
        ("txt2img", ("a frog",), "takes 8 channels, and text to image has 4: it edits pictures;"),
        ("img2img", ("in.png", "a frog"), "takes 8 channels, and text to image has 4: it edits"),
        ("img2img", (*SNOWY, "--image-guidance", "2"), "unrecognized arguments: --image-guidance 2"),
    ],
)
def test_a_bad_input_is_one_sentence_and_nothing_is_written(run, command, words, message, tmp_path, model_folder):
    before = sorted(tmp_path.iterdir())
    code, out, err = run(command, *(str(model_folder) if word == "MODEL" else word for word in words))
    *_, last = err.splitlines()
    assert (code, out) == (2, "")
    assert message in last
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("as_json", [False, True])
def test_evaluate_lets_the_model_make_edits_and_prints_their_scores(run, edit_model, monkeypatch, as_json):
    made = []

    def measure(generate, sprites, side, *, count, seed):
        made.append((generate("make it red", seed, PICTURE), sprites, side, count))
        return {"model": {"all": changes.Score(3, 2, 1, 4)}}

    monkeypatch.setattr(changes, "changes", measure)
    monkeypatch.setattr(objects, "emoji_sprites", lambda font, fluent: "sprites")
    words = ("--edit", "--steps", "2", "--seed", "3", "--image-guidance", "2")
    code, out, _ = run("evaluate", *words, *["--json"] * as_json)
    assert code == 0
    if as_json:
        assert json.loads(out) == {"model": {"all": {"changed": 3, "kept": 2, "both": 1, "pictures": 4}}}
    else:
        assert out.splitlines()[1].split() == ["model", "all", "3/4", "75%", "2/4", "50%", "1/4", "25%"]
    ((picture, *others),) = made
    assert others == ["sprites", 32, 64]
    request = ldm.Request("make it red", steps=2, seed=3, source=ldm.Source(PICTURE, image_guidance=2.0))
    (wanted,) = ldm.load(edit_model, ldm.Placement.fast(device="cpu")).generate(request)
    assert np.array_equal(picture, wanted)


def test_evaluate_refuses_image_guidance_without_edits(run):
    code, _, err = run("evaluate", "--image-guidance", "2")
    assert (code, err) == (2, "ldm: error: --image-guidance is for --edit: leave it out, or add --edit\n")
