"""The checker sees what is there, also blurred, faded or misplaced; and the report counts it."""

import json
import math

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ldm.training.evaluate import Checker, Found, Seen, evaluate, fixed_scenes, judge
from ldm.training.scenes import (
    FONT,
    GROUNDS,
    PLACES,
    SIZES,
    Painter,
    Scene,
    emoji_sprites,
    held_out,
)
from tests.training.drawn import drawn_sprites

SPRITES = drawn_sprites()
NAMES = tuple(SPRITES)


@pytest.fixture(scope="module")
def checker():
    return Checker(SPRITES)


def draw(scene, side=64, seed=0):
    return Image.fromarray(Painter(SPRITES, side).paint(scene, np.random.default_rng(seed)))


def seen(name="apple", ground="white", x=0.5, y=0.5, size=0.54):
    return Seen(ground, (Found(name, x, y, size, 0.9),))


@pytest.mark.parametrize("ground", GROUNDS)
def test_the_checker_sees_object_and_ground(checker, ground):
    name = NAMES[list(GROUNDS).index(ground) % len(NAMES)]
    look = checker.look(draw(Scene((name,), ground)))
    assert look.ground == ground
    assert look.objects[0].name == name


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", ["small", ""])
def test_the_checker_measures_place_and_size(checker, place, size):
    (found,) = checker.look(draw(Scene(("kite",), "beach", size=size, place=place))).objects
    assert math.dist((found.x, found.y), PLACES[place]) < 0.06  # jitter is 0.025 along each axis
    assert 0.85 < found.size / SIZES[size] < 1.18  # jitter is 8 %, scales are 9 % apart


@pytest.mark.parametrize("side", [64, 128, 100])
def test_pictures_of_any_size_are_checked(checker, side):
    look = checker.look(draw(Scene(("orange",), "sea"), side))
    assert (look.ground, look.objects[0].name) == ("sea", "orange")


def test_blur_and_contrast_change_nothing(checker):
    picture = draw(Scene(("apple",), "desert"))
    for changed in (
        picture.filter(ImageFilter.GaussianBlur(1)),
        picture.point(lambda level: 128 + (level - 128) * 0.7),
    ):
        look = checker.look(changed)
        assert (look.ground, look.objects[0].name) == ("desert", "apple")


def test_likeness_is_one_for_a_sprite_on_a_plain_ground_and_lower_for_a_distorted_one(checker):
    picture = draw(Scene(("box",), "yellow"))
    exact = checker.look(picture).objects[0].likeness
    shear = (1, 0.3, -10, 0, 1, 0)
    background = picture.getpixel((0, 0))
    bent = picture.transform((64, 64), Image.Transform.AFFINE, shear, fillcolor=background)
    assert 0.95 < exact <= 1  # the scales are 9 % apart: not exactly 1
    assert checker.look(bent).objects[0].likeness < exact - 0.03


@pytest.mark.parametrize("ground", GROUNDS)
def test_nothing_is_seen_on_an_empty_ground(checker, ground):
    pixels = np.clip(GROUNDS[ground](64, np.random.default_rng(3)), 0, 255).astype(np.uint8)
    assert checker.look(Image.fromarray(pixels)).objects[0].name == "nothing"


def test_two_objects_are_seen_apart(checker):
    picture = draw(Scene(("apple", "box"), "snow", relation="above"))
    found = {f.name: f for f in checker.look(picture, 2).objects}
    assert set(found) == {"apple", "box"}
    assert found["apple"].y < found["box"].y - 0.3


def test_a_verdict_needs_the_right_object_for_its_place_and_size():
    scene = Scene(("apple",), "white", size="small", place="on the left")
    right = seen(x=0.25, size=0.33)
    assert judge(scene, right) == dict.fromkeys(("ground", "object", "size", "place"), True)
    other = judge(scene, seen("box", x=0.25, size=0.33))
    assert other == {"ground": True, "object": False, "size": False, "place": False}
    assert not judge(scene, seen(x=0.5, size=0.33))["place"]
    assert not judge(scene, seen(x=0.25, size=0.6))["size"]
    assert not judge(scene, seen(ground="snow", x=0.25))["ground"]


def test_a_relation_is_judged_in_whatever_order_its_objects_are_found():
    scene = Scene(("apple", "box"), "white", relation="left of")
    left, right = Found("apple", 0.2, 0.5, 0.4, 0.9), Found("box", 0.8, 0.6, 0.4, 0.9)
    for objects in ((left, right), (right, left)):
        assert judge(scene, Seen("white", objects))["relation"]
    swapped = (left._replace(name="box"), right._replace(name="apple"))
    verdict = judge(scene, Seen("white", swapped))
    assert verdict["both objects"]
    assert not verdict["relation"]
    wrong = judge(scene, Seen("white", (left, right._replace(name="hill"))))
    assert not wrong["both objects"]
    assert not wrong["relation"]


def test_every_concept_is_asked_for_twice_and_a_quarter_of_the_combinations_is_held_out():
    names = [f"object {i}" for i in range(32)]
    scenes = fixed_scenes(names)["object"]
    assert len(scenes) == len(set(scenes)) == 64
    assert {s.ground for s in scenes} == set(GROUNDS)
    assert sum(held_out(names, s.objects[0], s.ground) for s in scenes) == 16


def test_sizes_places_and_relations_are_asked_of_combinations_seen_in_training():
    names = [f"object {i}" for i in range(32)]
    scenes = fixed_scenes(names)
    for kind in ("size", "place", "relation"):
        assert len(scenes[kind]) == 16
        for scene in scenes[kind]:
            assert not any(held_out(names, name, scene.ground) for name in scene.objects)
            assert getattr(scene, kind)


@pytest.fixture(scope="module")
def report():
    """A model that draws everything right, but for a frame of the wrong ground every fourth time."""
    known = {s.caption: s for scenes in fixed_scenes(NAMES).values() for s in scenes}
    seeds = []

    def generate(prompts, given):
        assert len(prompts) == len(given) <= 16
        seeds.extend(given)
        return [
            draw(known[prompt], seed=seed) if seed % 4 else Image.new("RGB", (64, 64), "black")
            for prompt, seed in zip(prompts, given, strict=True)
        ]

    report = evaluate(generate, SPRITES, seed=100)
    assert seeds == list(range(100, 160))  # 12 single objects and 16 of each other kind
    return report


def test_the_report_counts_what_the_model_got_right(report):
    model = report.rows["model"]
    assert model["object"] == (9, 12)
    assert model["ground"][0] in (9, 10, 11, 12)  # black is nearest to night
    assert model["relation"] == (12, 16)
    halves = [report.rows[f"  {half} combinations"]["object"] for half in ("seen", "held-out")]
    assert tuple(map(sum, zip(*halves, strict=True))) == model["object"]


def test_the_checker_is_measured_beside_the_model(report):
    for condition in ("true renders", "blurred renders", "contrast x 0.7", "contrast x 1.3"):
        scores = report.rows[f"checker, {condition}"]
        assert scores["object"] == scores["ground"] == (12, 12)
        assert scores["relation"] == (16, 16)


def test_the_report_is_a_table_and_plain_json(report):
    lines = str(report).splitlines()
    assert lines[0].split() == ["object", "ground", "size", "place", "both", "objects", "relation"]
    assert len(lines) == 1 + len(report.rows)
    assert "9/12  75%" in lines[1]
    values = json.loads(json.dumps(report.to_json()))
    assert values["rows"]["model"]["object"] == {"right": 9, "of": 12}
    assert values["answers"][1]["seed"] == 101
    assert values["answers"][1]["seen"]["objects"][0]["name"] in NAMES


def test_a_model_that_loses_pictures_is_an_error():
    with pytest.raises(ValueError, match="0 pictures of 16 prompts"):
        evaluate(lambda prompts, seeds: [], SPRITES)


@pytest.mark.skipif(not FONT.is_file(), reason="needs fonts-noto-color-emoji")
def test_the_checker_tells_the_emoji_apart():
    sprites = emoji_sprites()
    checker, painter = Checker(sprites), Painter(sprites, 64)
    for i, name in enumerate(sprites):
        scene = Scene((name,), list(GROUNDS)[i % len(GROUNDS)])
        picture = Image.fromarray(painter.paint(scene, np.random.default_rng(i)))
        look = checker.look(picture.filter(ImageFilter.GaussianBlur(0.7)))
        assert (look.objects[0].name, look.ground) == (name, scene.ground)
