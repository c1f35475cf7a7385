"""`ldm inpaint`: a picture, a mask and a prompt, again from the record, and one sentence for every bad input."""

import json

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm.pictures import read_texts
from tests.test_inpainting import PICTURE, cutout, painted


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Run each test in a folder with a picture and a mask."""
    monkeypatch.chdir(tmp_path)
    PICTURE.save("in.png")
    painted().save("mask.png")
    return tmp_path


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


FROG = ("in.png", "mask.png", "a frog", "--steps", "3")


@pytest.mark.parametrize(
    ("words", "mask", "strength"),
    [
        (FROG, {"image": "mask.png"}, 1.0),
        (("in.png", "--steps", "3", "mask.png", "a frog"), {"image": "mask.png"}, 1.0),
        ((*FROG, "--strength", "0.7"), {"image": "mask.png"}, 0.7),
        ((*FROG, "--feather", "3", "--inpaint-crop", "2"), {"image": "mask.png", "feather": 3, "crop": 2}, 1.0),
        (("in.png", "a frog", "--steps", "3", "--extend", "left=8,top=4"), {"extend": "left=8,top=4"}, 1.0),
        (("in.png", "--extend", "left=8", "a frog", "--steps", "3"), {"extend": "left=8"}, 1.0),
    ],
    ids=["mask", "late words", "strength", "feather and crop", "extend", "late prompt"],
)
@pytest.mark.slow
def test_the_command_makes_the_picture_of_the_pipeline_and_reports_the_mask(words, mask, strength, run, pipe):
    code, out, err = run("inpaint", *words, "--json")
    settings = json.loads(out)["settings"]
    assert (code, err, settings["task"]) == (0, "", "inpaint")
    source = settings["request"]["source"]
    assert source["mask"] == {"repaint": "white", "feather": 0} | mask
    assert (source["image"], source["strength"]) == ("in.png", strength)
    request = ldm.Request("a frog", steps=3, source=ldm.Source("in.png", strength, mask=ldm.Mask(**mask)))
    assert np.array_equal(pixels("out.png"), pipe.generate(request)[0])


def test_the_transparent_part_of_a_picture_is_its_own_mask(run):
    cutout().save("cutout.png")
    assert run("inpaint", "cutout.png", "a frog", "--steps", "3", "--repaint", "transparent")[0] == 0
    kept = np.asarray(painted()) == 0
    assert np.array_equal(pixels("out.png")[kept], np.asarray(PICTURE)[kept])


def test_a_picture_is_repeated_from_its_record_bit_for_bit(run):
    run("inpaint", *FROG, "--images", "2", "--feather", "2", "--out", "a.png")
    for command in ("inpaint", "img2img", "txt2img"):
        assert run(command, "--from", "a-00002.png", "--out", f"{command}.png") == (0, f"{command}.png\n", "")
        assert np.array_equal(pixels(f"{command}.png"), pixels("a-00002.png"))
    record = json.loads(read_texts("a-00002.png")["ldm"])
    assert {"model", "source", "mask"} == record["sha256"].keys()


@pytest.mark.slow
def test_options_beside_from_change_the_mask_and_the_picture(run):
    run("inpaint", *FROG, "--out", "a.png")
    painted(box=(0, 0, 8, 8)).save("other.png")
    assert run("inpaint", "in.png", "other.png", "--from", "a.png", "--feather", "1", "--out", "b.png")[0] == 0
    run("inpaint", "in.png", "other.png", *FROG[2:], "--feather", "1", "--out", "c.png")
    assert np.array_equal(pixels("b.png"), pixels("c.png"))
    run("img2img", "in.png", "a frog", "--steps", "3", "--strength", "0.7", "--out", "d.png")
    assert run("inpaint", "in.png", "mask.png", "--from", "d.png", "--out", "e.png")[0] == 0
    run("inpaint", *FROG, "--strength", "0.7", "--out", "f.png")
    assert np.array_equal(pixels("e.png"), pixels("f.png"))


def test_a_mask_that_has_changed_is_refused_unless_it_is_named(run):
    run("inpaint", *FROG, "--out", "a.png")
    painted(box=(0, 0, 8, 8)).save("mask.png")
    code, _, err = run("inpaint", "--from", "a.png", "--out", "b.png")
    assert (code, err) == (
        2,
        "ldm: error: mask.png is not the mask that made the picture; to use it all the same, name it as the MASK of "
        "ldm inpaint\n",
    )
    assert run("inpaint", "in.png", "mask.png", "--from", "a.png", "--out", "b.png")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give a picture, a mask and a prompt, or --from a picture that ldm made"),
        (("in.png", "mask.png"), "give a picture, a mask and a prompt, or --from a picture that ldm made"),
        (("in.png", "a frog"), "inpainting needs a mask, sides to extend, or a picture whose transparent part"),
        (("in.png", "gone.png", "a frog"), "the picture gone.png cannot be read: No such file or directory"),
        (("in.png", "wide.png", "a frog"), "the mask must have the size of the picture, 32 x 32 pixels, got 40 x 32"),
        (("in.png", "black.png", "a frog"), "the mask has no white part, so there is nothing to repaint"),
        ((*FROG, "--extend", "left=0"), "extend needs 1 pixel or more for one or more of left, top, right, bottom"),
        ((*FROG, "--inpaint-crop", "-1"), "crop must be a whole number from 0 to 65536, got -1"),
        ((*FROG, "--resize", "stretch"), "unrecognized arguments: --resize stretch; the prompt stands in quotes"),
    ],
)
def test_a_bad_input_is_one_sentence_and_nothing_is_written(words, message, run, here):
    painted(size=(40, 32)).save("wide.png")
    Image.new("L", (32, 32)).save("black.png")
    before = sorted(here.iterdir())
    code, out, err = run("inpaint", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"ldm: error: {message}")
    assert sorted(here.iterdir()) == before


def test_a_record_without_a_mask_needs_one(run):
    run("img2img", "in.png", "a frog", "--steps", "3", "--out", "a.png")
    code, _, err = run("inpaint", "--from", "a.png", "--out", "b.png")
    assert code == 2
    assert err.startswith("ldm: error: inpainting needs a mask, sides to extend, or a picture")


@pytest.mark.parametrize("name", ["mask.bmp", "my mask.png"])
def test_a_mask_of_any_name_and_kind_is_not_taken_for_the_prompt(name, run):
    painted().save(name)
    code, _, error = run("inpaint", "in.png", name)
    assert code == 2
    assert "give a picture, a mask and a prompt" in error
