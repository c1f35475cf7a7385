"""The checker sees what is there, also blurred or faded, in any place and size, and nothing where there is nothing."""

import math

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ldm.training.checker import Checker
from ldm.training.grounds import GROUNDS
from ldm.training.objects import FLUENT, FONT, emoji_sprites
from ldm.training.scenes import COUNTS, PLACES, SIZES, Painter, Scene
from tests.training.drawn import drawn_sprites

SPRITES = drawn_sprites()
NAMES = tuple(SPRITES["flat"])


@pytest.fixture(scope="module")
def checker():
    return Checker(SPRITES)


def draw(scene, side=64, seed=0):
    return Image.fromarray(Painter(SPRITES, side).paint(scene, np.random.default_rng(seed)))


@pytest.mark.parametrize("style", SPRITES)
@pytest.mark.parametrize("ground", GROUNDS)
def test_the_checker_sees_object_style_and_ground(checker, ground, style):
    name = NAMES[list(GROUNDS).index(ground) % len(NAMES)]
    look = checker.look(draw(Scene((name,), ground, style)))
    assert look.ground == ground
    assert (look.objects[0].name, look.objects[0].style) == (name, style)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", ["small", ""])
def test_the_checker_measures_place_and_size(checker, place, size):
    (found,) = checker.look(draw(Scene(("kite",), "beach", size=size, place=place))).objects
    assert math.dist((found.x, found.y), PLACES[place]) < 0.1  # jitter is 0.04 and half a cell 0.03 along each axis
    assert 0.85 < found.size / SIZES[size] < 1.18  # scales are 9 % apart


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


@pytest.mark.parametrize("ground", [ground for ground in GROUNDS if ground != "space"])  # which has a planet
def test_nothing_is_seen_on_an_empty_ground(checker, ground):
    pixels = np.clip(GROUNDS[ground].paint(64, np.random.default_rng(3)), 0, 255).astype(np.uint8)
    assert checker.look(Image.fromarray(pixels)).objects[0].name == "nothing"


def test_two_objects_are_seen_apart(checker):
    picture = draw(Scene(("apple", "box"), "snow", relation="above"))
    found = {f.name: f for f in checker.look(picture, 2).objects}
    assert set(found) == {"apple", "box"}
    assert found["apple"].y < found["box"].y - 0.3


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["apple", "bar"])  # the gap between two bars could be taken for a bar
def test_equal_objects_are_each_found_once(checker, name, count):
    number = len(COUNTS[count])
    *found, extra = checker.look(draw(Scene((name,), "white", "3D", count=count), 128), number + 1).objects
    assert [one.name for one in found] == [name] * number
    assert extra.name != name
    for center in COUNTS[count]:
        assert min(math.dist(center, (one.x, one.y)) for one in found) < 0.13  # less than a third of the distance


def test_many_red_objects_are_no_red_ground(checker):
    picture = draw(Scene(("apple",), "grass", "flat", count="four"), 128, seed=1)
    for contrast in (0.7, 1):
        faded = picture.point(lambda level, contrast=contrast: 128 + (level - 128) * contrast)
        assert checker.look(faded).ground == "grass"


@pytest.mark.slow
@pytest.mark.skipif(not (FONT.is_file() and FLUENT.is_file()), reason="needs both sets of emoji")
def test_the_checker_tells_the_emoji_apart():
    sprites = emoji_sprites()
    checker, painter = Checker(sprites), Painter(sprites, 128)
    right = []
    for i, name in enumerate(sprites["flat"]):
        scene = Scene((name,), list(GROUNDS)[i % len(GROUNDS)], list(sprites)[i % 2])
        picture = Image.fromarray(painter.paint(scene, np.random.default_rng(i)))
        look = checker.look(picture.filter(ImageFilter.GaussianBlur(1)))
        right.append((look.objects[0].name, look.objects[0].style, look.ground) == (name, scene.style, scene.ground))
    assert sum(right) >= 0.95 * len(right)
