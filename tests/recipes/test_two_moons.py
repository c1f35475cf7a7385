"""The toy: its data and its numbers are those of the exact denoiser, and the training reaches them."""

import re

import pytest
import torch

from ldm.diffusion.samplers import SAMPLERS, seeded_noise
from ldm.diffusion.schedule import to_ve
from scripts.recipes.two_moons import MOONS, SCHEDULE, STD, moons, share_near
from tests.recipes.mains import printed


def exact(x, sigma):
    """E[x0 | x] of the data: a Gaussian at each point of MOONS."""
    points, variance = x.flatten(1), STD**2 + float(sigma) ** 2
    center = (-torch.cdist(points, MOONS).square() / (2 * variance)).softmax(dim=1) @ MOONS
    return (center + (points - center) * STD**2 / variance).reshape(x.shape)


def test_new_data_are_near_the_moons():
    torch.manual_seed(0)
    points = moons(1000)
    assert 0.99 < share_near(points) < 1
    assert share_near(torch.tensor([[0.0, 0.0], MOONS[7].tolist()])) == 0.5
    assert 0.45 < float((points[:, 1] > 0).float().mean()) < 0.55


def test_samples_of_the_exact_denoiser_have_the_numbers_of_the_data():
    torch.manual_seed(0)
    sigmas, noise = SCHEDULE.steps(25, "karras"), seeded_noise(range(300), (2, 1, 1))
    *_, last = SAMPLERS["euler"](exact, to_ve(noise(), sigmas[0]), sigmas)
    assert share_near(last.x.flatten(1)) > 0.98


def numbers(text):
    found = dict(re.findall(r"^(\w+): ([\d.]+)% of the samples lie within 3", text, re.MULTILINE))
    assert list(found) == ["euler", "dpmpp_2m", "euler_ancestral"]
    return [float(share) for share in found.values()]


def test_the_script_trains_and_makes_a_picture(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    numbers(printed("two_moons", monkeypatch, capsys, tmp_path / "out.png", "--steps", "3"))


@pytest.mark.slow
def test_the_samples_lie_on_the_moons(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    assert min(numbers(printed("two_moons", monkeypatch, capsys, tmp_path / "out.png"))) > 90
