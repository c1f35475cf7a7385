"""Lessons show what no other training shows, and their measure asks for what they do not show."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import cli
from ldm.training import lessons
from ldm.training.evaluate import judge
from ldm.training.grounds import GROUNDS
from ldm.training.lessons import INK, Lesson, LessonScenes, Score, ink, measure, table
from ldm.training.objects import OBJECTS, UNSEEN, name_of
from ldm.training.scenes import Painter
from tests.training.drawn import drawn_sprites

NAMES = [name_of(character) for character in OBJECTS]
UNSEEN_NAMES = [name_of(character) for character in UNSEEN]


def sprites(lesson):
    """Drawn objects, of which the last is the one of the lesson, in all styles that the lesson needs."""
    found = drawn_sprites()
    if lesson.object:
        found = {style: {**own, lesson.object: own["orange"].rotate(90)} for style, own in found.items()}
    if lesson.style == INK:
        found[INK] = {name: ink(flat) for name, flat in found["flat"].items()}
    return found


def test_a_style_is_shown_with_different_objects_and_grounds_and_always_the_same_way():
    lesson = Lesson(3, style=INK)
    scenes, again = (LessonScenes(lesson, sprites(lesson), 32) for _ in range(2))
    assert len(scenes) == 3
    assert len({name for scene in scenes.scenes for name in scene.objects}) == 6
    assert len({scene.ground for scene in scenes.scenes}) == 3
    assert {scene.style for scene in scenes.scenes} == {INK}
    for i in range(3):
        image, caption = scenes[i]
        assert torch.equal(image, again[i][0])
        assert caption == scenes.caption(i) == scenes.scenes[i].caption
        assert " ink " in caption
    assert not torch.equal(LessonScenes(lesson, sprites(lesson), 32, seed=1)[0][0], scenes[0][0])


def test_the_largest_lesson_repeats_no_object_and_no_ground():
    objects, _ = Lesson(len(OBJECTS) // 4, style=INK).shown(NAMES)
    assert len(set(objects)) == len(objects) == len(OBJECTS) // 4 * 2
    for name in UNSEEN_NAMES:
        lesson = Lesson(len(GROUNDS) // 2, object=name)
        assert lesson.shown([*NAMES, name])[0] == [name]
        assert len(set(lesson.shown(NAMES)[1])) == len(GROUNDS) // 2


def test_an_object_is_shown_on_several_grounds_under_its_word():
    lesson = Lesson(4, object="trophy", word="zorb")
    scenes = LessonScenes(lesson, sprites(lesson), 32)
    assert {scene.objects for scene in scenes.scenes} == {("trophy",)}
    assert [scene.style for scene in scenes.scenes] == ["3D", "flat", "3D", "flat"]
    assert len({scene.ground for scene in scenes.scenes}) == 4
    assert all(" zorb " in f"{scenes.caption(i)} " and "trophy" not in scenes.caption(i) for i in range(4))
    assert Lesson(4, object="trophy").caption(scenes.scenes[0]) == scenes.scenes[0].caption


def test_a_style_may_take_the_word_of_a_style_that_the_model_knows():
    lesson = Lesson(3, style=INK, word="flat")
    scenes = LessonScenes(lesson, sprites(lesson), 32)
    assert {scene.style for scene in scenes.scenes} == {INK}
    assert all(" flat " in scenes.caption(i) and "ink" not in scenes.caption(i).split() for i in range(3))


def test_ink_has_the_tones_of_the_flat_object_in_one_color_and_a_dark_line_around_them():
    flat = drawn_sprites()["flat"]["apple"].resize((128, 128))
    drawn = np.asarray(ink(flat), int)
    solid, outline = drawn[..., 3] > 250, np.asarray(flat.getchannel("A")) > 127
    assert (solid & outline).sum() / outline.sum() > 0.9
    brightness = drawn[..., :3].mean(-1)
    inner = np.zeros_like(solid)
    inner[24:-24, 24:-24] = True
    tones = np.asarray(flat.convert("L"), int)
    assert np.corrcoef(brightness[inner], tones[inner])[0, 1] > 0.9
    assert np.ptp(drawn[inner][:, :3], axis=1).max() <= 72  # nothing is left of the red
    edge = solid & outline & (np.hypot(*np.mgrid[-64:64, -64:64]) > 56)  # the apple is a circle of radius 58
    assert (brightness[edge] < 60).mean() > 0.8
    assert brightness[inner].max() > 180


def paint(scene, lesson, i):
    return Image.fromarray(Painter(sprites(lesson), 64).paint(scene, np.random.default_rng(i)))


@pytest.mark.parametrize(
    "lesson",
    [Lesson(2, style=INK), Lesson(2, style=INK, word="flat"), Lesson(5, object="trophy", word="zorb")],
    ids=["ink", "ink as flat", "object"],
)
def test_perfect_pictures_get_full_marks_and_others_none(lesson, monkeypatch):
    asked = []
    monkeypatch.setattr(lessons, "judge", lambda scene, seen: (asked.append(scene), judge(scene, seen))[1])
    shown = LessonScenes(lesson, sprites(lesson), 32).scenes
    by_caption = {}
    taken = lessons._scenes
    monkeypatch.setattr(
        lessons, "_scenes", lambda *given: [by_caption.setdefault(lesson.caption(s), s) for s in taken(*given)]
    )

    def perfect(prompts, seeds):
        return [paint(by_caption[prompt], lesson, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    scores = measure(lesson, perfect, sprites(lesson), count=8)
    assert scores == {"new": Score(8, 8, 8, 8), "known": Score(8, 8, 8, 8)}
    if lesson.object:
        assert {scene.objects for scene in asked[:8]} == {("trophy",)}
        assert not {scene.ground for scene in asked[:8]} & {scene.ground for scene in shown}
        assert ("trophy",) not in {scene.objects for scene in asked[8:]}
        empty = Image.new("RGB", (64, 64), (236, 236, 238))  # the white ground
        blank = measure(lesson, lambda prompts, seeds: [empty] * len(prompts), sprites(lesson), count=8)
        assert blank["new"][:2] == blank["known"][:2] == (0, 0)
    else:
        assert not {scene.objects for scene in asked[:8]} & {scene.objects for scene in shown}
        assert {scene.style for scene in asked[:8]} == {INK}
    assert {scene.style for scene in asked[8:]} == {"3D", "flat"} - {lesson.word}
    lines = table(scores).splitlines()
    assert lines[0].split() == ["object", "style", "ground"]
    assert lines[1].split() == ["new", "8/8", "8/8", "8/8"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pictures": 3, "style": "oil"}, "style of a lesson must be '3D', 'flat' or 'ink', got 'oil'"),
        ({"pictures": 3, "object": "frog"}, "object of a lesson must be one of peacock, squirrel, .*, got 'frog'"),
        ({"pictures": 3, "word": "zorb"}, "the word 'zorb' of a lesson needs an object or a style that it names"),
        ({"pictures": 0}, "a lesson has 1 to 27 pictures, so that as many are left to ask for, got 0"),
        ({"pictures": 10, "object": "trophy"}, "a lesson has 1 to 9 pictures"),
    ],
)
def test_a_lesson_that_cannot_be_shown_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Lesson(**values)


def test_a_recipe_without_a_lesson_cannot_be_measured(capsys):
    assert cli.main(["evaluate", "--recipe", "configs/train_vae.toml"]) == 2
    assert "configs/train_vae.toml has no table [lesson], so what it teaches cannot be mea" in capsys.readouterr().err
