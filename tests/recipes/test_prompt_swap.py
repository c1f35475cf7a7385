"""Swapped prompts: the exact result for two Gaussians, the cut objects, and the script's own numbers."""

import re

import pytest
import torch
from PIL import Image, ImageDraw

from ldm.training.checker import Found, Seen
from ldm.training.scenes import Scene
from scripts.recipes.prompt_swap import cutout, follows, scene, swapped
from tests.recipes.mains import printed

MEANS, STD = (-0.8, 1.1), 0.3


def gaussian(mean):
    return lambda x, sigma: mean + (x - mean) * STD**2 / (STD**2 + float(sigma) ** 2)


@pytest.mark.parametrize("level", [10.0, 1.0, 0.1])
def test_the_swap_of_two_gaussians_is_exact(level):
    sigmas = torch.logspace(1, -3, 2001, dtype=torch.float64)
    x = 10 * torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    first, second = MEANS

    def move(x, mean, high, low):
        """Follow the ODE of a Gaussian: the distance from the mean keeps its number of standard deviations."""
        return mean + (x - mean) * ((STD**2 + low**2) / (STD**2 + high**2)) ** 0.5

    exact = move(move(x, first, 10.0, level), second, level, 1e-3)
    assert torch.allclose(swapped(gaussian(first), gaussian(second), x, sigmas, level), exact, atol=0.02)


def test_above_the_first_level_all_is_of_the_second_and_below_the_last_of_the_first():
    sigmas, x = torch.tensor([5.0, 1.0, 0.1], dtype=torch.float64), torch.ones(1, 1, 2, 2, dtype=torch.float64)
    first, second = map(gaussian, MEANS)
    assert torch.equal(swapped(first, second, x, sigmas, 5.0), swapped(second, second, x, sigmas, 1.0))
    assert torch.equal(swapped(first, second, x, sigmas, 0.1), swapped(first, first, x, sigmas, 1.0))


def test_an_object_is_cut_without_its_shadow():
    picture = Image.new("RGB", (64, 64), (236, 236, 238))
    ImageDraw.Draw(picture).ellipse([10, 40, 50, 60], "gray")
    ImageDraw.Draw(picture).rectangle([20, 10, 39, 49], "red")
    cut = cutout(picture)
    assert cut.size == (40, 40)
    assert cut.getpixel((20, 20)) == (255, 0, 0, 255)
    assert cut.getpixel((2, 20))[3] == 0
    assert cut.getchannel("A").histogram()[255] == 20 * 40


def test_the_scenes_of_a_pair_differ_in_all_properties():
    for i in range(24):
        first, second = scene(i, 0), scene(i, 1)
        assert first.objects != second.objects
        assert first.ground != second.ground
        assert first.place != second.place


@pytest.mark.parametrize(
    ("name", "ground", "x", "expected"),
    [("fox", "sea", 0.3, [True, True, True]), ("car", "sea", 0.7, [False, True, False])],
)
def test_each_property_is_judged_by_itself(name, ground, x, expected):
    seen = Seen(ground, (Found(name, "3D", x, 0.5, 0.5, 0.9),))
    assert follows(seen, Scene(("fox",), "sea", "3D", place="on the left")) == expected


def shares(text):
    lines = dict(re.findall(r"^(\w+) of the second prompt: (.*)$", text, re.MULTILINE))
    assert list(lines) == ["object", "ground", "place"]
    return {name: [int(share) for share in re.findall(r"(\d+) % at", line)] for name, line in lines.items()}


def test_the_script_makes_a_plot_and_numbers(pipe, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    words = "--pairs", "2", "--steps", "2"
    found = shares(printed("prompt_swap", monkeypatch, capsys, tmp_path / "out.png", *words, pipe=pipe))
    assert all(len(each) == 2 for each in found.values())


@pytest.mark.slow
def test_the_ground_and_the_place_are_decided_at_higher_levels_than_the_object(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    found = shares(printed("prompt_swap", monkeypatch, capsys, tmp_path / "out.png"))
    for each in found.values():
        assert each[0] > 80
        assert each[-1] < 20
    assert sum(found["object"]) > max(sum(found["ground"]), sum(found["place"]))
