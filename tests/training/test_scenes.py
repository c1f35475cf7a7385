"""Emoji scenes: what is drawn is what is said, and every scene follows from its number."""

import collections

import numpy as np
import pytest
import torch

from ldm.training.scenes import (
    EMOJI,
    FONT,
    GROUNDS,
    PHRASES,
    PLACES,
    RELATIONS,
    SIZES,
    Painter,
    Scene,
    Scenes,
    emoji_sprites,
    held_out,
    name_of,
)
from tests.training.drawn import drawn_sprites

SPRITES = drawn_sprites()
needs_font = pytest.mark.skipif(not FONT.is_file(), reason="needs fonts-noto-color-emoji")


def draw(scene, side=64, seed=0):
    return Painter(SPRITES, side).paint(scene, np.random.default_rng(seed)).astype(np.float32)


def object_mask(scene, side=64):
    """Where a scene differs from its ground alone, drawn with the same random numbers."""
    ground = GROUNDS[scene.ground](side, np.random.default_rng(0))
    return np.abs(draw(scene, side) - ground).max(-1) > 3


def center(mask):
    y, x = np.nonzero(mask)
    return (x.min() + x.max() + 1) / 2 / len(mask), (y.min() + y.max() + 1) / 2 / len(mask)


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (Scene(("frog",), "grass"), "a frog on the grass"),
        (Scene(("apple",), "night", size="big"), "a big apple at night"),
        (Scene(("owl",), "sea", size="small", place="at the top"), "a small owl in the sea, at the top"),
        (Scene(("frog", "apple"), "beach", relation="left of"), "a frog left of an apple on the beach"),
        (Scene(("apple",), "red", place="on the left"), "an apple on a red background, on the left"),
    ],
)
def test_captions_are_english(scene, caption):
    assert scene.caption == caption


def test_scene_i_depends_on_the_seed_and_i_alone():
    first, again = Scenes(SPRITES, seed=1), Scenes(SPRITES, seed=1)
    again[5]  # what was asked for before must not matter
    image, caption = first[77]
    assert torch.equal(image, again[77][0])
    assert caption == again[77][1]
    assert not torch.equal(image, Scenes(SPRITES, seed=2)[77][0])


def test_a_caption_is_returned_without_drawing_its_scene():
    scenes = Scenes(SPRITES, seed=1)
    expected = [scenes[i][1] for i in range(50)]
    scenes.painter = None
    assert [scenes.caption(i) for i in range(50)] == expected


@pytest.mark.parametrize("side", [32, 50, 64, 128])
def test_scenes_of_every_size_are_bytes_in_channels_first_order(side):
    image, _ = Scenes(SPRITES, side)[0]
    assert image.shape == (3, side, side)
    assert image.dtype == torch.uint8


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", ["small", ""])
def test_an_object_is_where_its_place_says(place, size):
    x, y = center(object_mask(Scene(("box",), "white", size=size, place=place)))
    assert abs(x - PLACES[place][0]) < 0.05  # jitter is 0.025 and a pixel 0.016
    assert abs(y - PLACES[place][1]) < 0.05


def test_an_object_is_as_large_as_its_size_says():
    areas = [object_mask(Scene(("box",), "white", size=size)).sum() for size in ("small", "", "big")]
    assert areas == sorted(areas)
    for area, size in zip(areas, ("small", "", "big"), strict=True):
        drawn = 80 / 96 * SIZES[size]  # the box fills 80 of 96 pixels of its sprite
        assert drawn**2 * 0.75 < area / 64**2 < drawn**2 * 1.35  # 8 % jitter in scale, soft edges


@pytest.mark.parametrize("relation", RELATIONS)
def test_two_objects_stand_as_their_relation_says(relation):
    pixels = draw(Scene(("apple", "box"), "white", relation=relation))
    red = (pixels[..., 0] > 180) & (pixels[..., 1] < 80)
    blue = (pixels[..., 2] > 180) & (pixels[..., 0] < 110)
    (x1, y1), (x2, y2) = center(red), center(blue)
    apart = {"left of": x2 - x1, "right of": x1 - x2, "above": y2 - y1, "below": y1 - y2}
    assert apart[relation] > 0.3


def test_training_never_shows_a_held_out_combination():
    scenes, names = Scenes(SPRITES), tuple(SPRITES)
    for i in range(1500):
        scene = scenes.scene(np.random.default_rng((0, i)))
        assert not any(held_out(names, name, scene.ground) for name in scene.objects)


def test_about_a_tenth_is_held_out_and_every_object_and_ground_is_seen():
    names = [name_of(c) for c in EMOJI]
    kept = [(n, g) for n in names for g in GROUNDS if not held_out(names, n, g)]
    assert 0.88 < len(kept) / (len(names) * len(GROUNDS)) < 0.92
    assert {n for n, _ in kept} == set(names)
    assert {g for _, g in kept} == set(GROUNDS)
    assert ("frog", "grass") in kept  # the README's example


def test_every_kind_of_scene_occurs_as_often_as_it_should():
    scenes = Scenes(SPRITES)
    drawn = [scenes.scene(np.random.default_rng((0, i))) for i in range(2000)]
    pairs = sum(bool(s.relation) for s in drawn) / len(drawn)
    assert 0.16 < pairs < 0.24  # 4.5 standard deviations about 0.2
    for field, choices in (("size", SIZES), ("place", PLACES), ("ground", GROUNDS)):
        assert set(choices) == set(collections.Counter(getattr(s, field) for s in drawn))
    assert all(len(set(s.objects)) == len(s.objects) for s in drawn)


def test_grounds_differ_in_color():
    means = {
        name: paint(64, np.random.default_rng(0)).reshape(4, 16, 64, 3).mean((1, 2)).ravel()
        for name, paint in GROUNDS.items()
    }
    for name, mean in means.items():
        nearest = min(np.linalg.norm(mean - other) for n, other in means.items() if n != name)
        assert nearest > 40, name  # levels over four strips: above every texture and jitter
    assert set(PHRASES) == set(GROUNDS)


def test_a_missing_font_is_named_with_what_to_do(tmp_path):
    message = r"no emoji font at .*none\.ttf: install it \(apt-get install fonts-noto-color-emoji\), or give .* --font"
    with pytest.raises(ValueError, match=message):
        emoji_sprites("🐸", tmp_path / "none.ttf")


def test_a_file_that_is_no_font_is_named(tmp_path):
    (tmp_path / "no.ttf").write_text("not a font")
    with pytest.raises(
        ValueError, match=r"no\.ttf is not a font with color bitmaps of 109 pixels \(unknown file format\): give"
    ):
        emoji_sprites("🐸", tmp_path / "no.ttf")


@needs_font
def test_a_character_that_the_font_lacks_is_named():
    with pytest.raises(ValueError, match="no color picture of a"):
        emoji_sprites("🐸a")


@needs_font
def test_every_default_object_has_a_square_picture_and_its_own_name():
    sprites = emoji_sprites()
    assert len(sprites) == len(EMOJI)
    assert {"frog", "apple"} <= set(sprites)
    for picture in sprites.values():
        assert picture.width == picture.height > 64
        assert picture.getchannel("A").getextrema() == (0, 255)


def test_names_are_what_people_say():
    assert [name_of(c) for c in "🐸🍎🌲🐙"] == ["frog", "apple", "tree", "octopus"]
