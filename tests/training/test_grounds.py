"""The grounds of the scenes: pictures of any size that differ from each other and from call to call."""

import functools

import numpy as np
import pytest

from ldm.training.grounds import GROUNDS


def paint(name, side, seed=0):
    return GROUNDS[name].paint(side, np.random.default_rng(seed))


@functools.cache
def layouts(name, side):
    """The mean colors of 4 x 4 parts of a ground in 24 calls: 24 4 4 3."""
    calls = [paint(name, side, seed) for seed in range(24)]
    return np.mean(np.reshape(calls, (24, 4, side // 4, 4, side // 4, 3)), axis=(2, 4))


@pytest.mark.parametrize("side", [32, 50, 64, 128])
@pytest.mark.parametrize("name", GROUNDS)
def test_a_ground_of_any_size_has_colors_that_can_be_shown(name, side):
    pixels = paint(name, side)
    assert pixels.shape == (side, side, 3)
    assert pixels.dtype == np.float32
    assert -20 < pixels.min() <= pixels.max() < 290  # lighting may leave 0..255 a little
    assert ((pixels < -1) | (pixels > 256)).mean() < 0.2  # white snow and clouds


@pytest.mark.parametrize("name", GROUNDS)
def test_a_ground_follows_from_its_random_numbers_alone(name):
    first = paint(name, 32)
    assert np.array_equal(first, paint(name, 32))
    assert np.abs(first - paint(name, 32, seed=1)).max() > 2


@pytest.mark.parametrize("name", GROUNDS)
def test_a_ground_keeps_its_look_at_every_size(name):
    rows = [layouts(name, side).mean((0, 2)) for side in (32, 64)]
    assert np.abs(rows[0] - rows[1]).max() < 8  # levels; the city's windows and the table's planks are small at 32


def test_every_ground_is_told_from_all_others_by_its_colors():
    typical = {name: layouts(name, 32)[:12].mean(0) for name in GROUNDS}
    for name in GROUNDS:
        for colors in layouts(name, 32)[12:]:
            distance = {other: np.linalg.norm(colors - typical[other]) for other in GROUNDS}
            assert min(distance, key=distance.get) == name


@pytest.mark.parametrize("name", [name for name, ground in GROUNDS.items() if ground.floor])
def test_floors_are_lit_from_the_left_because_shadows_fall_to_the_right(name):
    left, right = layouts(name, 32)[:, :, [0, -1]].mean((0, 1, 3))
    assert 1.01 < left / right < 1.2


def test_phrases_belong_to_one_ground_each():
    phrases = [phrase for ground in GROUNDS.values() for phrase in ground.phrases]
    assert len(phrases) == len(set(phrases))
    assert all(ground.phrases for ground in GROUNDS.values())
    assert {name for name, ground in GROUNDS.items() if not ground.floor} == {
        "sea",
        "underwater",
        "night",
        "sky",
        "sunset",
        "space",
    }
