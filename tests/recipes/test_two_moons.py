"""The toy learns the denoiser that is known in closed form, and its samples lie on the arcs."""

import math
import re

import pytest
import torch

from ldm.diffusion.samplers import SAMPLERS, seeded_noise
from ldm.diffusion.schedule import to_ve
from scripts.recipes.two_moons import SCHEDULE, arcs, moons
from tests.recipes.mains import printed

CENTERS = arcs(torch.linspace(0, math.pi, 400))  # 2 800


def exact(x, sigma):
    """E[x0 | x] for centers on the arcs and the data's spread about them: b 2 h w."""
    points, variance = x.movedim(1, -1), 0.05**2 + float(sigma) ** 2
    weights = (-(points[..., None, :] - CENTERS.T).square().sum(-1) / (2 * variance)).softmax(-1)
    center = weights @ CENTERS.T
    return (center + (points - center) * 0.05**2 / variance).movedim(-1, 1)


def distances(x):
    return torch.cdist(x[0].flatten(1).T, CENTERS.T).min(dim=1).values


def test_an_example_is_64_points_at_the_spread_about_both_arcs():
    torch.manual_seed(0)
    examples = moons(20)
    assert {(tuple(x.shape), caption) for x, caption in examples} == {((2, 8, 8), "")}
    x = torch.cat([x.flatten(1) for x, _ in examples], dim=1)[None, :, None]
    assert distances(x).mean() == pytest.approx(0.05 * math.sqrt(2 / math.pi), rel=0.1)  # E|n| of a normal n
    assert x[0, 0].mean().abs() < 0.15
    assert x[0, 1].max() > 0.7
    assert x[0, 1].min() < -0.7


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "ddpm"])
def test_with_the_exact_denoiser_the_samples_lie_on_the_arcs(name):
    sigmas, noise = SCHEDULE.steps(40, "exponential"), seeded_noise([0], (2, 20, 20))
    *_, last = SAMPLERS[name](exact, to_ve(noise(), sigmas[0]), sigmas, noise=noise)
    assert distances(last.x).mean() < 0.06


def measured(text):
    found = re.fullmatch(r"euler: ([\d.]+)\ndpmpp_2m: ([\d.]+)\nddpm: ([\d.]+)\n", text)
    return [float(number) for number in found.groups()]


def test_the_command_trains_and_draws(tmp_path, monkeypatch, capsys):
    assert len(measured(printed("two_moons", monkeypatch, capsys, tmp_path / "out.png", "--steps", "12"))) == 3


@pytest.mark.slow
def test_the_trained_toy_samples_near_the_arcs(tmp_path, monkeypatch, capsys):
    numbers = measured(printed("two_moons", monkeypatch, capsys, tmp_path / "out.png"))
    assert max(numbers) < 0.12  # the data themselves: 0.04
