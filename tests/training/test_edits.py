"""Pairs of scenes with an instruction: what differs, what stays, what is said, and how edits are measured."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ldm.training.changes import Score, changes, fixed_edits, table
from ldm.training.data import DataConfig
from ldm.training.edits import DIRECTIONS, SHARES, Edit, Edits
from ldm.training.grounds import GROUNDS
from ldm.training.scenes import PLACES, SIZES, Scene, Scenes, held_out
from tests.training.drawn import drawn_sprites

EDITS = Edits(drawn_sprites(), 64, seed=3)
FROG = Scene(("frog",), "grass", "3D")
BOTH = Scene(("frog", "owl"), "grass", "3D", relation="above")


def pair(edit, index=0):
    return [EDITS.paint(scene, index).astype(int) for scene in (edit.before, edit.after)]


def differs(edit, index=0):
    before, after = pair(edit, index)
    return (before != after).any(axis=2)


@pytest.mark.parametrize("kind", SHARES)
def test_an_edit_changes_one_property_and_shows_nothing_that_is_held_out(kind):
    for i in range(40):
        before, after, named = EDITS.edit(np.random.default_rng(i), kind)
        changed = [f.name for f in dataclasses.fields(Scene) if getattr(before, f.name) != getattr(after, f.name)]
        assert changed == [kind] == [named]
        assert before.style in ("3D", "flat")
        assert not before.count
        assert not any(held_out(EDITS.concepts, scene) for scene in (before, after))
        if kind == "objects":
            assert sum(a != b for a, b in zip(before.objects, after.objects, strict=True)) == 1
            assert len(set(after.objects)) == len(after.objects)
        if kind in ("size", "place"):
            assert not before.relation
            assert "big" not in (before.size, after.size) or not after.place or kind == "size"
        if kind == "size":
            assert after.size == "small" or (after.size, after.place) == ("big", "")


@pytest.mark.parametrize(("ground", "shadows"), [("sea", False), ("grass", True)])
def test_pixels_outside_of_the_changed_object_stay(ground, shadows):
    first, second = (Scene((name,), ground, "flat", "small", "on the left") for name in ("apple", "box"))
    for index in range(4):
        changed = differs(Edit(first, second, "objects"), index)
        rows, columns = changed.nonzero()
        side = round(64 * SIZES["small"])
        assert changed.any()
        assert np.ptp(columns) < side + 8 * shadows
        assert np.ptp(rows) < side + 8 * shadows
        assert columns.max() < 32 + 4 * shadows
        moved = differs(Edit(first, dataclasses.replace(first, place="on the right"), "place"), index)
        assert not moved[:16].any()
        assert moved[:, 32:].any()


def test_an_object_stays_in_its_place_when_the_ground_changes():
    for index in range(6):
        scenes = [Scene(("box",), ground, "flat", "small", "at the top") for ground in ("sea", "night", "space")]
        blue = [(abs(EDITS.paint(scene, index).astype(int) - (65, 105, 225)) < 3).all(axis=2) for scene in scenes]
        inside = np.asarray(Image.fromarray(blue[0]).convert("L").filter(ImageFilter.MinFilter(3))) > 0
        assert inside.sum() > 20  # the box has marks
        assert all(one[inside].all() for one in blue)


def test_an_example_is_the_picture_after_the_edit_with_the_instruction_and_the_picture_before():
    again = Edits(drawn_sprites(), 64, seed=3)
    for index in (0, 7):
        after, instruction, more = EDITS[index]
        assert after.shape == more["source"].shape == (3, 64, 64)
        edit, said = EDITS._edit(index)
        assert instruction == said == EDITS.caption(index) == again[index][1]
        for image, scene in ((more["source"], edit.before), (after, edit.after)):
            assert np.array_equal(image.permute(1, 2, 0), again.paint(scene, index))
    assert len({EDITS.caption(i) for i in range(30)}) > 15
    assert Edits(drawn_sprites(), 64, seed=4).caption(0) != EDITS.caption(0)


def test_the_kinds_of_edits_have_their_shares():
    kinds = Counter(EDITS._edit(i)[0].kind for i in range(400))
    assert {kind: pytest.approx(400 * share, abs=40) for kind, share in SHARES.items()} == kinds


@pytest.mark.parametrize(
    ("scene", "change", "said"),
    [
        (FROG, {"objects": ("owl",)}, "turn the frog into an owl"),
        (BOTH, {"objects": ("frog", "fries")}, "turn the owl into fries"),
        (FROG, {"ground": "beach"}, "put the frog on the beach"),
        (FROG, {"ground": "night"}, "show the frog at night"),
        (BOTH, {"style": "flat"}, "make the frog and the owl flat"),
        (Scene(("grapes",), "sea", "flat"), {"size": "big"}, "make the grapes big"),
        (Scene(("frog",), "sea", "flat", place="at the top"), {"place": ""}, "move the frog to the middle"),
        (FROG, {"place": "on the left"}, "move the frog to the left"),
    ],
)
def test_the_instruction_says_the_edit_in_english(scene, change, said):
    (kind,) = change
    edit = Edit(scene, dataclasses.replace(scene, **change), kind)
    assert edit.instruction() == said
    assert DIRECTIONS.keys() == PLACES.keys()


def test_words_for_the_objects_and_the_edits_vary():
    edit = Edit(Scene(("cat",), "grass", "3D"), Scene(("car",), "grass", "3D"), "objects")
    said = {edit.instruction(np.random.default_rng(i)) for i in range(200)}
    assert {"turn the kitten into a car", "replace the cat with a car", "turn the cat into an automobile"} <= said


def test_scenes_are_painted_as_before_there_were_edits():
    scene = Scene(("apple",), "grass", "flat")
    painter = Scenes(drawn_sprites(), 32).painter
    one, other = (painter.paint(scene, np.random.default_rng(seed)) for seed in (0, 1))
    assert np.array_equal(one, painter.paint(scene, np.random.default_rng(0), None))
    assert not np.array_equal(one, other)
    rng, places = np.random.default_rng(0), np.random.default_rng(0)
    painter.paint(scene, rng, places)
    assert places.random() == np.random.default_rng(0).random(3)[2]  # two numbers for the place
    GROUNDS["grass"].paint(32, fresh := np.random.default_rng(0))
    assert rng.random() == fresh.random()  # the rest for the ground


def test_a_model_that_does_nothing_keeps_all_and_a_perfect_one_changes_what_is_asked():
    sprites = drawn_sprites()
    after = iter(fixed_edits(Edits(sprites, 64, seed=64), 5))
    asked = []

    def perfect(instruction, seed, before):
        asked.append((instruction, seed))
        index, edit = len(asked) - 1, next(after)
        assert np.array_equal(before, Edits(sprites, 64, seed=64).paint(edit.before, index))
        return Image.fromarray(Edits(sprites, 64, seed=64).paint(edit.after, index))

    found = changes(perfect, sprites, 64, count=5, seed=5)
    assert [seed for _, seed in asked] == list(range(5, 10))
    assert found["model"] == found["true picture"]
    assert found["model"]["all"] == Score(changed=5, kept=5, both=5, pictures=5)
    assert found["picture before"]["all"] == Score(changed=0, kept=5, both=0, pictures=5)
    assert {kind: score.pictures for kind, score in found["model"].items()} == dict.fromkeys(SHARES, 1) | {"all": 5}
    lines = table(found).splitlines()
    assert lines[0].split() == ["edit", "changed", "others", "kept", "both"]
    assert len(lines) == 1 + 3 * 6
    assert lines[12].split() == ["picture", "before", "all", "0/5", "0%", "5/5", "100%", "0/5", "0%"]


def test_the_scenes_of_a_recipe_are_edits_only_if_pairs_are_asked_for(monkeypatch):
    monkeypatch.setattr("ldm.training.data.emoji_sprites", lambda *files: drawn_sprites())
    config = DataConfig(size=64, seed=3)
    assert len(config.open(pairs=True)[0]) == 3
    assert config.open(pairs=True).caption(5) == EDITS.caption(5)
    assert type(config.open()) is Scenes
