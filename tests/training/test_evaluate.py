"""Verdicts need the right object; the prompts cover seen and held-out combinations; the report counts."""

import json

import numpy as np
import pytest
from PIL import Image

from ldm.training.checker import Found, Seen
from ldm.training.evaluate import distance, evaluate, fixed_scenes, judge
from ldm.training.grounds import GROUNDS
from ldm.training.objects import MANY, MASS, OBJECTS, name_of
from ldm.training.scenes import COUNTS, RELATIONS, Painter, Scene, Scenes, held_out
from tests.training.drawn import drawn_sprites

SPRITES = drawn_sprites()
STYLES = tuple(SPRITES)
NAMES = tuple(SPRITES["flat"])
CONCEPTS = tuple(name_of(character) for character in OBJECTS)


def draw(scene, side=64, seed=0):
    return Image.fromarray(Painter(SPRITES, side).paint(scene, np.random.default_rng(seed)))


def found(name="apple", style="flat", x=0.5, y=0.5, size=0.54):
    return Found(name, style, x, y, size, 0.9)


def seen(ground="white", **object_):
    return Seen(ground, (found(**object_),))


def test_a_verdict_needs_the_right_object_for_its_style_place_and_size():
    scene = Scene(("apple",), "white", "flat", size="small", place="on the left")
    right = seen(x=0.25, size=0.33)
    properties = ("ground", "object", "style", "size", "place")
    assert judge(scene, right) == dict.fromkeys(properties, True)
    other = judge(scene, seen(name="box", x=0.25, size=0.33))
    assert other == dict.fromkeys(properties, False) | {"ground": True}
    assert not judge(scene, seen(x=0.5, size=0.33))["place"]
    assert not judge(scene, seen(x=0.25, size=0.6))["size"]
    assert not judge(scene, seen(style="3D", x=0.25, size=0.33))["style"]
    assert not judge(scene, seen(ground="snow", x=0.25))["ground"]


def test_a_relation_is_judged_in_whatever_order_its_objects_are_found():
    scene = Scene(("apple", "box"), "white", "flat", relation="left of")
    left, right = found(x=0.2, size=0.4), found("box", x=0.8, y=0.6, size=0.4)
    for objects in ((left, right), (right, left)):
        verdict = judge(scene, Seen("white", objects))
        assert verdict["relation"]
        assert verdict["style"]
    swapped = (left._replace(name="box"), right._replace(name="apple"))
    verdict = judge(scene, Seen("white", swapped))
    assert verdict["both objects"]
    assert not verdict["relation"]
    assert not judge(scene, Seen("white", (left, right._replace(style="3D"))))["style"]
    wrong = judge(scene, Seen("white", (left, right._replace(name="hill"))))
    assert not wrong["both objects"]
    assert not wrong["relation"]


def test_a_count_needs_exactly_as_many_of_the_right_objects():
    scene = Scene(("apple",), "white", "flat", count="two")
    apple, nothing = found(), found("nothing")
    for objects in ((apple, apple, nothing), (apple, apple, found("box"))):
        assert judge(scene, Seen("white", objects))["count"]
    for objects in ((apple, nothing, nothing), (apple, apple, apple), (apple, found("box"), found("box"))):
        assert not judge(scene, Seen("white", objects))["count"]
    assert not judge(scene, Seen("white", (apple, apple._replace(style="3D"), nothing)))["style"]


def test_the_fixed_scenes_cover_every_object_both_styles_and_half_of_the_combinations_are_held_out():
    scenes = fixed_scenes(CONCEPTS, STYLES)
    assert {kind: len(of_kind) for kind, of_kind in scenes.items()} == {
        "object": 128, "size": 64, "place": 64, "relation": 64, "count": 32,
    }  # fmt: skip
    single = scenes["object"]
    assert len(set(single)) > 110  # an object has one or two held-out grounds
    assert {scene.objects[0] for scene in single} == set(CONCEPTS)
    assert {scene.ground for scene in single} == set(GROUNDS)
    assert sum(held_out(CONCEPTS, scene) for scene in single) == 64
    for held in (True, False):
        group = [scene for scene in single if held_out(CONCEPTS, scene) == held]
        assert [sum(scene.style == style for scene in group) for style in STYLES] == [32, 32]


def test_all_other_scenes_are_ones_that_training_shows_but_for_a_quarter_of_the_relations():
    scenes = fixed_scenes(CONCEPTS, STYLES)
    for kind in ("size", "place", "relation", "count"):
        held = sum(held_out(CONCEPTS, scene) for scene in scenes[kind])
        assert held == (16 if kind == "relation" else 0)
        words = [getattr(scene, kind) for scene in scenes[kind]]
        assert all(words)
        assert all(abs(words.count(word) - len(words) / len(set(words))) <= 2 for word in words)
        assert {scene.style for scene in scenes[kind]} == set(STYLES)
    pairs = [scene for scene in scenes["relation"] if held_out(CONCEPTS, scene)]
    assert {scene.style for scene in pairs} == set(STYLES)
    assert {scene.relation for scene in pairs} == set(RELATIONS)
    assert {scene.count for scene in scenes["count"]} == set(COUNTS)
    assert not {scene.objects[0] for scene in scenes["count"]} & (MANY | MASS)


EACH = 4


@pytest.fixture(scope="module")
def report():
    """A model that draws everything right, but for a black picture every fourth time."""
    known = {s.caption: s for scenes in fixed_scenes(NAMES, STYLES, EACH).values() for s in scenes}
    seeds = []

    def generate(prompts, given):
        assert len(prompts) == len(given) <= 16
        seeds.extend(given)
        return [
            draw(known[prompt], seed=seed) if seed % 4 else Image.new("RGB", (64, 64), "black")
            for prompt, seed in zip(prompts, given, strict=True)
        ]

    report = evaluate(generate, SPRITES, seed=100, each=EACH, reconstruct=lambda picture: picture)
    assert seeds == list(range(100, 122))  # 8 single objects, 4 of three kinds, 2 counts
    return report


def test_the_report_counts_what_the_model_got_right(report):
    model = report.rows["model"]
    assert model["object"] == (6, 8)
    assert model["style"] == (16, 22)
    halves = [report.rows[f"  {half} combinations"]["object"] for half in ("seen", "held-out")]
    assert tuple(map(sum, zip(*halves, strict=True))) == model["object"]


def test_the_checker_is_measured_beside_the_model(report):
    for condition in ("true renders", "blurred renders", "contrast x 0.7", "contrast x 1.3", "decoded latents"):
        scores = report.rows[f"checker, {condition}"]
        assert scores["object"] == scores["ground"] == (8, 8)
        assert scores["relation"] == (4, 4)
        assert scores["count"][1] == 2


def test_without_the_vae_only_the_model_is_measured():
    blank = Image.new("RGB", (64, 64), "black")
    report = evaluate(lambda prompts, seeds: [blank] * len(prompts), SPRITES, each=2)
    assert not any("checker" in row for row in report.rows)


def test_the_report_is_a_table_and_plain_json(report):
    lines = str(report).splitlines()
    assert lines[0].split() == [
        *("object", "style", "ground", "size", "place", "both", "objects", "relation", "count", "likeness")
    ]
    assert len(lines) == 1 + len(report.rows)
    assert "6/8  75%" in lines[1]
    values = json.loads(json.dumps(report.to_json()))
    assert values["rows"]["model"]["object"] == {"right": 6, "of": 8}
    assert values["rows"]["checker, true renders"]["likeness"] > values["rows"]["model"]["likeness"]
    assert values["answers"][1]["seed"] == 101
    assert values["answers"][1]["seen"]["objects"][0]["name"] in NAMES


def test_a_model_that_loses_pictures_is_an_error():
    with pytest.raises(ValueError, match="must return one picture per prompt, got 0 for 16 prompts"):
        evaluate(lambda prompts, seeds: [], SPRITES)


def test_the_distance_compares_pictures_of_random_captions_with_other_true_scenes(monkeypatch):
    asked, vae = [], object()

    def generate(prompts, seeds):
        asked.extend(zip(prompts, seeds, strict=True))
        return [Image.new("RGB", (32, 32), "red") for _ in prompts]

    monkeypatch.setattr("ldm.training.evaluate.features", lambda given, pictures: pictures if given is vae else None)
    with pytest.raises(ValueError, match="at least 200 pictures, got 20 and 20"):
        distance(generate, SPRITES, vae, 20, seed=5)
    scenes = Scenes(SPRITES, seed=6)
    assert asked == [(scenes.caption(i), 5 + i) for i in range(20)]
