"""`ldm img2img`: a new picture from a picture, again from its record, and one sentence for every bad input."""

import json

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm.pictures import read_texts

_GRADIENT = Image.linear_gradient("L").resize((32, 32))
PICTURE = Image.merge("RGB", (_GRADIENT, _GRADIENT.rotate(90), _GRADIENT.rotate(180)))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Run each test in a folder with one picture."""
    monkeypatch.chdir(tmp_path)
    PICTURE.save("in.png")
    return tmp_path


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def frog(**source):
    return ldm.Request("a frog", steps=5, source=ldm.Source(PICTURE, **source))


FROG = ("in.png", "a frog", "--steps", "5")


# ------------------------------------------------------------------ what it makes


def test_a_picture_and_a_prompt_make_the_picture_that_the_pipeline_makes(run, pipe):
    assert run("img2img", *FROG) == (0, "out.png\n", "")
    assert np.array_equal(pixels("out.png"), pipe.generate(frog(strength=0.6))[0])


@pytest.mark.parametrize(
    ("words", "source", "steps"),
    [
        (("--strength", "1"), {"strength": 1.0}, 5),
        (("--strength", "0.2"), {"strength": 0.2}, 1),
        (("--strength", "0.2", "--exact-steps"), {"strength": 0.2, "exact_steps": True}, 5),
        (("--start-sigma", "2"), {"start_sigma": 2.0}, 5),
    ],
)
def test_each_option_reaches_the_request_and_is_reported(words, source, steps, run, pipe):
    code, out, err = run("img2img", *FROG, *words, "--json")
    settings = json.loads(out)["settings"]
    assert (code, err, settings["task"]) == (0, "", "img2img")
    told = {"image": "in.png", "strength": 0.6, "exact_steps": False, "resize": "crop"} | source
    assert settings["request"]["source"] == told
    assert (settings["resolved"]["steps"], settings["resolved"]["steps_run"]) == (5, steps)
    assert np.array_equal(pixels("out.png"), pipe.generate(frog(**source))[0])


def test_a_1111_reads_the_strength_unless_a_level_was_given_instead(run):
    run("img2img", *FROG, "--strength", "0.45")
    assert "Denoising strength: 0.45" in read_texts("out.png")["parameters"]
    run("img2img", *FROG, "--start-sigma", "2", "--out", "b.png")
    assert "Denoising strength" not in read_texts("b.png")["parameters"]


@pytest.mark.parametrize(
    "words", [("in.png", "a frog", "--strength", "0.4"), ("in.png", "--strength", "0.4", "a frog")]
)
def test_the_prompt_may_follow_an_option(words, run, pipe):
    assert run("img2img", "--steps", "5", *words)[0] == 0
    assert np.array_equal(pixels("out.png"), pipe.generate(frog(strength=0.4))[0])


def test_several_pictures_have_a_seed_each(run, pipe):
    _, out, _ = run("img2img", *FROG, "--images", "2", "--seed", "7", "--json")
    assert json.loads(out)["seeds"] == [7, 8]
    run("img2img", *FROG, "--seed", "8", "--out", "one.png")
    assert np.array_equal(pixels("out-00002.png"), pixels("one.png"))


@pytest.mark.parametrize(("orientation", "turn"), [(6, Image.Transpose.ROTATE_90), (3, Image.Transpose.ROTATE_180)])
def test_the_rotation_of_a_jpeg_is_applied(orientation, turn, run):
    wide = PICTURE.resize((48, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation  # of the camera: how to turn the picture to see it upright
    wide.transpose(turn).save("camera.jpg", exif=exif, quality=100, subsampling=0)
    with Image.open("camera.jpg") as camera:
        upright = camera.transpose({6: Image.Transpose.ROTATE_270, 3: Image.Transpose.ROTATE_180}[orientation])
    upright.save("upright.png")
    run("img2img", "camera.jpg", *FROG[1:], "--out", "a.png")
    run("img2img", "upright.png", *FROG[1:], "--out", "b.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert pixels("a.png").shape == (24, 44, 3)  # upright, at the area of 32 x 32


def test_transparent_pixels_become_white(run):
    clear = PICTURE.convert("RGBA")
    clear.putalpha(Image.new("L", (32, 32), 255))
    clear.paste((9, 99, 9, 0), (0, 0, 16, 32))
    clear.save("clear.png")
    white = PICTURE.copy()
    white.paste("white", (0, 0, 16, 32))
    white.save("white.png")
    for name in ("clear", "white"):
        run("img2img", f"{name}.png", *FROG[1:], "--out", f"{name}-out.png")
    assert np.array_equal(pixels("clear-out.png"), pixels("white-out.png"))


def test_a_large_picture_takes_the_models_size_and_a_given_size_is_kept(run):
    PICTURE.resize((3000, 1500)).save("large.png")
    run("img2img", "large.png", *FROG[1:], "--out", "a.png")
    assert pixels("a.png").shape == (24, 44, 3)  # two to one, at the area of 32 x 32, in multiples of 4
    for resize in ("crop", "stretch"):
        run(
            "img2img",
            "large.png",
            *FROG[1:],
            "--width",
            "16",
            "--height",
            "40",
            "--resize",
            resize,
            "--out",
            f"{resize}.png",
        )
        assert pixels(f"{resize}.png").shape == (40, 16, 3)
    assert not np.array_equal(pixels("crop.png"), pixels("stretch.png"))


# ------------------------------------------------------------------ again from the record


def test_a_picture_is_repeated_from_its_record_bit_for_bit_by_either_command(run, here):
    run("img2img", *FROG, "--strength", "0.45", "--images", "2", "--out", "a.png")
    for command in ("img2img", "txt2img"):
        code, out, err = run(command, "--from", "a-00002.png", "--out", f"{command}.png")
        assert (code, out, err) == (0, f"{command}.png\n", "")
        assert np.array_equal(pixels(f"{command}.png"), pixels("a-00002.png"))


def test_options_beside_from_change_the_strength_the_level_and_the_picture(run):
    run("img2img", *FROG, "--start-sigma", "2", "--out", "a.png")
    _, out, _ = run("img2img", "--from", "a.png", "--strength", "0.4", "--json")
    assert json.loads(out)["settings"]["resolved"]["steps_run"] == 2
    PICTURE.rotate(90).save("other.png")
    code, out, _ = run("img2img", "other.png", "--from", "a.png", "--out", "b.png", "--json")
    source = json.loads(out)["settings"]["request"]["source"]
    assert (code, source["image"], source["start_sigma"]) == (0, "other.png", 2.0)
    run("img2img", "other.png", *FROG[1:], "--start-sigma", "2", "--out", "c.png")
    assert np.array_equal(pixels("b.png"), pixels("c.png"))


def test_a_prompt_alone_beside_from_keeps_the_recorded_picture(run):
    run("img2img", *FROG, "--out", "a.png")
    code, out, error = run("img2img", "--from", "a.png", "a fox", "--out", "b.png", "--json")
    assert code == 0, error
    request = json.loads(out)["settings"]["request"]
    assert (request["prompt"], request["source"]["image"]) == ("a fox", "in.png")


def test_a_picture_made_from_a_prompt_can_be_made_from_a_picture(run):
    run("txt2img", "a frog", "--steps", "5", "--out", "a.png")
    assert run("img2img", "in.png", "--from", "a.png", "--out", "b.png")[0] == 0
    run("img2img", *FROG, "--out", "c.png")
    assert np.array_equal(pixels("b.png"), pixels("c.png"))
    code, _, err = run("img2img", "--from", "a.png", "--strength", "0.5")
    assert (code, err) == (2, "ldm: error: a.png was made from a prompt alone: name a picture to start from\n")


def test_a_source_picture_that_has_changed_is_refused_unless_it_is_named(run):
    run("img2img", *FROG, "--out", "a.png")
    PICTURE.rotate(90).save("in.png")
    code, _, err = run("img2img", "--from", "a.png", "--out", "b.png")
    assert code == 2
    assert err == (
        "ldm: error: in.png is not the source picture that made the picture; to use it all the same, name it as the "
        "PICTURE of ldm img2img\n"
    )
    assert run("img2img", "in.png", "--from", "a.png", "--out", "b.png")[0] == 0
    assert not np.array_equal(pixels("a.png"), pixels("b.png"))


def test_a_source_picture_that_is_gone_is_named(run, here):
    run("img2img", *FROG, "--out", "a.png")
    (here / "in.png").unlink()
    code, _, err = run("img2img", "--from", "a.png", "--out", "b.png")
    assert (code, err) == (2, "ldm: error: the picture in.png cannot be read: No such file or directory\n")


# ------------------------------------------------------------------ bad inputs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give a picture and a prompt, or --from a picture that ldm made"),
        (("in.png",), "give a picture and a prompt, or --from a picture that ldm made"),
        (
            ("in.png", "a", "frog"),
            "unrecognized arguments: frog; the prompt stands in quotes, and only img2img, inpaint and edit take a",
        ),
        (("nothing.png", "a frog"), "the picture nothing.png cannot be read: No such file or directory"),
        ((".", "a frog"), "the picture . cannot be read: it is a folder"),
        (("text.png", "a frog"), "the picture text.png cannot be read: it must be one of PNG, JPEG, "),
        ((*FROG, "--strength", "0"), "strength must be above 0 and at most 1, got 0.0"),
        ((*FROG, "--strength", "2"), "strength must be above 0 and at most 1, got 2.0"),
        ((*FROG, "--strength", "nan"), "strength must be a finite number, got nan"),
        ((*FROG, "--strength", "0.1"), "strength 0.1 of 5 steps runs no step: raise one of them, or give start_sigma"),
        ((*FROG, "--start-sigma", "99"), "the start level must lie in 0.0413 .. 14.6146, got 99.0"),
        ((*FROG, "--start-sigma", "0"), "the start level must lie in 0.0413 .. 14.6146, got 0.0"),
        ((*FROG, "--resize", "squash"), "resize must be one of crop, stretch, got 'squash'"),
        ((*FROG, "--width", "30"), "width must be a multiple of 4 pixels for this model, got 30; nearest: 28 or 32"),
        ((*FROG, "--handover", "0.5"), "handover 0.5 needs a refiner: give one, or leave out the handover"),
    ],
)
def test_a_bad_input_is_one_sentence_and_nothing_is_written(words, message, run, here):
    (here / "text.png").write_text("a frog")
    before = sorted(here.iterdir())
    code, out, err = run("img2img", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"ldm: error: {message}")
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize("image", [None, 5, np.zeros((8, 8, 3), np.uint8)], ids=["nothing", "number", "array"])
def test_a_source_that_is_no_picture_is_refused(image):
    with pytest.raises(ValueError, match="the source must be the path of a picture or a PIL picture, got"):
        ldm.Source(image)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("in.png",), 'the prompt is the name of a picture, in.png: use ldm img2img PICTURE "PROMPT"'),
        (
            ("in.png", "a frog"),
            "unrecognized arguments: a frog; the prompt stands in quotes, and only img2img, inpaint and edit take",
        ),
        (
            ("a", "red", "frog"),
            "unrecognized arguments: red frog; the prompt stands in quotes, and only img2img, inpaint and edit take",
        ),
        (("a frog", "--strength", "0.5"), "unrecognized arguments: --strength 0.5; "),
    ],
)
def test_a_picture_given_to_txt2img_is_refused(words, message, run):
    code, _, err = run("txt2img", *words)
    assert code == 2
    assert err.startswith(f"ldm: error: {message}")
