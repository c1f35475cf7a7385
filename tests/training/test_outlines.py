"""How much of a hint the edges of a picture follow."""

import numpy as np
import pytest
from PIL import Image

from ldm.control import canny
from ldm.training.outlines import WITHIN, followed, outlines
from ldm.training.scenes import Painter, Scene
from tests.training.drawn import drawn_sprites

SPRITES = drawn_sprites()


def square(left, side=16):
    picture = Image.new("RGB", (64, 64), "black")
    picture.paste("white", (left, 24, left + side, 24 + side))
    return picture


def test_a_picture_follows_its_own_edges_and_those_that_are_near():
    hint = canny(square(24))
    assert followed(hint, square(24)) == 1
    assert followed(hint, square(24 + WITHIN)) == 1
    assert 0.2 < followed(hint, square(24 + WITHIN + 3)) < 0.8  # the horizontal edges overlap
    assert followed(hint, square(0, 8)) == 0
    assert followed(hint, Image.new("RGB", (64, 64), "gray")) == 0
    assert followed(Image.new("RGB", (64, 64)), square(24)) == 1  # no edge is asked for


def test_the_measure_tells_pictures_that_follow_the_hint_from_others():
    asked = []

    def generate(prompt, seed, hint):
        asked.append((prompt, seed, hint is not None))
        return hint or Image.fromarray(Painter(SPRITES, 64).paint(Scene(("apple",), "white"), np.random.default_rng(1)))

    found = outlines(generate, SPRITES, 64, count=4, seed=7)
    assert [(seed, hinted) for _, seed, hinted in asked] == [(7 + i // 2, i % 2 == 0) for i in range(8)]
    assert found["with"] == pytest.approx(1, abs=0.05)
    assert found["without"] < 0.8
