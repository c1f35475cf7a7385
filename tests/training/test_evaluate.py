"""Verdicts need the right object; the prompts cover seen and held-out combinations; the report counts."""

import json

import numpy as np
import pytest
from PIL import Image

from ldm.training.checker import Found, Seen
from ldm.training.evaluate import evaluate, fixed_scenes, judge
from ldm.training.scenes import GROUNDS, Painter, Scene, held_out
from tests.training.drawn import drawn_sprites

SPRITES = drawn_sprites()
NAMES = tuple(SPRITES)


def draw(scene, side=64, seed=0):
    return Image.fromarray(Painter(SPRITES, side).paint(scene, np.random.default_rng(seed)))


def seen(name="apple", ground="white", x=0.5, y=0.5, size=0.54):
    return Seen(ground, (Found(name, x, y, size, 0.9),))


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
    black = fixed_scenes(NAMES)["object"][::4]  # seeds 100, 104 and 108; the checker takes black for night
    assert model["ground"] == (9 + sum(scene.ground == "night" for scene in black), 12)
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
    assert lines[0].split() == ["object", "ground", "size", "place", "both", "objects", "relation", "likeness"]
    assert len(lines) == 1 + len(report.rows)
    assert "9/12  75%" in lines[1]
    values = json.loads(json.dumps(report.to_json()))
    assert values["rows"]["model"]["object"] == {"right": 9, "of": 12}
    assert 0.5 < values["rows"]["model"]["likeness"] < 0.9  # a quarter shows nothing
    assert values["rows"]["checker, true renders"]["likeness"] > 0.9
    assert values["answers"][1]["seed"] == 101
    assert values["answers"][1]["seen"]["objects"][0]["name"] in NAMES


def test_a_model_that_loses_pictures_is_an_error():
    with pytest.raises(ValueError, match="must return one picture per prompt, got 0 for 16 prompts"):
        evaluate(lambda prompts, seeds: [], SPRITES)
