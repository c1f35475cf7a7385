"""Diffusion posterior sampling: the paper's own form, and a Gaussian whose posterior is known."""

import math

import pytest
import torch

from ldm.diffusion.samplers import seeded_noise, start
from ldm.diffusion.schedule import NoiseSchedule, to_vp
from ldm.pictures import read_picture
from scripts.recipes import dps
from tests.recipes.mains import printed

STD = 0.8
SCHEDULE = NoiseSchedule()


def gaussian(x, sigma):
    """The exact denoiser of N(0, STD^2)."""
    return STD**2 / (STD**2 + sigma**2) * x


def test_a_step_equals_the_papers_alpha_bar_form():
    torch.manual_seed(0)
    z, y, drawn = (torch.randn(1, 2, 3, 3, dtype=torch.float64) for _ in range(3))
    sigmas = torch.tensor([2.0, 1.2], dtype=torch.float64)
    a, b = (1 / (1 + sigmas**2)).tolist()  # alpha-bar of the step and of the next
    shrink = STD**2 * math.sqrt(a) / (STD**2 * a + 1 - a)  # x0 = shrink z
    x0 = shrink * z
    mean = math.sqrt(b) * (1 - a / b) / (1 - a) * x0 + math.sqrt(a / b) * (1 - b) / (1 - a) * z  # Ho et al., eq. 7
    expected = mean + math.sqrt((1 - b) / (1 - a) * (1 - a / b)) * drawn
    expected += 0.3 / (y - x0).norm() * 2 * shrink * (y - x0)
    x = z * math.sqrt(1 + 2.0**2)
    found = dps.dps(gaussian, lambda x: x, y, x, sigmas, noise=lambda: drawn, zeta=0.3)
    assert torch.allclose(to_vp(found, 1.2), expected)


def test_what_is_measured_is_found_and_the_rest_stays_as_the_prior():
    noise = seeded_noise(range(40), (2, 4, 4))
    sigmas = SCHEDULE.steps(60)
    x, y = start(noise(), sigmas[0], sampler="ddpm", spacing="leading"), torch.full((40, 4, 4), 0.5)
    found = dps.dps(gaussian, lambda latents: latents[:, 0], y, x, sigmas, noise=noise, zeta=0.3)
    assert (found[:, 0] - 0.5).abs().mean() < 0.15
    assert abs(found[:, 1].mean()) < 0.1
    assert found[:, 1].std() == pytest.approx(STD, abs=0.08)


@pytest.mark.parametrize(("name", "shape"), [("deblur", (1, 3, 32, 32)), ("superresolve", (1, 3, 8, 8))])
def test_a_measurement_keeps_the_mean_of_each_channel_and_loses_detail(name, shape):
    torch.manual_seed(0)
    images = torch.ones(1, 3, 32, 32) * torch.tensor([0.1, -0.3, 0.5]).reshape(1, 3, 1, 1)
    assert dps.PROBLEMS[name](images).shape == shape
    assert torch.allclose(dps.PROBLEMS[name](images).mean((2, 3)), images.mean((2, 3)), atol=1e-6)
    assert dps.PROBLEMS[name](torch.randn(1, 3, 32, 32)).std() < 0.5


def test_psnr_is_20_db_for_an_error_of_a_tenth_of_the_range():
    assert dps.psnr(torch.full((1, 3, 4, 4), 0.2), torch.zeros(1, 3, 4, 4)) == pytest.approx(20, abs=1e-4)


@pytest.mark.parametrize("problem", ["colorize"])
def test_the_script_restores_a_picture_and_prints_its_psnr(pipe, monkeypatch, capsys, tmp_path, problem):
    text = printed("dps", monkeypatch, capsys, tmp_path / "dps.png", problem, "--steps", "2", pipe=pipe)
    assert f"{problem}: " in text
    assert read_picture(tmp_path / "dps.png").width == 2 * pipe.config.image_size


@pytest.mark.slow
@pytest.mark.parametrize("problem", dps.PROBLEMS)
def test_the_bundled_model_restores_more_than_was_measured(monkeypatch, capsys, tmp_path, problem):
    words = printed("dps", monkeypatch, capsys, tmp_path / "dps.png", problem).split()
    assert float(words[1]) > float(words[4])
