"""The classifier's error is the exact likelihood of Gaussians, and tells them apart."""

import re

import pytest
import torch

from ldm.diffusion.schedule import NoiseSchedule
from scripts.recipes.diffusion_classifier import denoising_errors, negative_log_likelihoods
from tests.recipes.mains import printed

SCHEDULE = NoiseSchedule()
MEANS, STD = torch.tensor([-0.6, 0.0, 0.7], dtype=torch.float64), torch.tensor([0.5, 0.3, 0.4], dtype=torch.float64)
SHAPE = (3, 2, 4, 4)


def denoise(x, sigma):
    """The denoisers of three Gaussians with independent dimensions, one for each row."""
    mean, variance = MEANS.reshape(3, 1, 1, 1), (STD**2).reshape(3, 1, 1, 1)
    return mean + (x - mean) * variance / (variance + float(sigma) ** 2)


def drawing(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(1, *SHAPE[1:], generator=generator, dtype=torch.float64)


def picture(k):
    return (MEANS[k] + STD[k] * drawing(k)()).expand(SHAPE)


@pytest.mark.parametrize("k", range(3))
def test_the_differences_of_likelihoods_are_those_of_the_gaussians(k):
    x0 = picture(k)
    exact = -torch.distributions.Normal(MEANS, STD).log_prob(x0[0].reshape(-1, 1)).sum(0)
    sigmas = torch.logspace(-3, 3, 1500, dtype=torch.float64)
    measured = negative_log_likelihoods(denoise, x0, sigmas, drawing(9))
    print(measured - measured[k], exact - exact[k])
    assert torch.allclose(measured - measured[k], exact - exact[k], rtol=0.05, atol=0.5)


@pytest.mark.parametrize("measure", [denoising_errors, negative_log_likelihoods])
def test_both_measures_name_the_gaussian_that_made_the_picture(measure):
    sigmas = SCHEDULE.sigma(torch.linspace(0, 999, 32, dtype=torch.float64))
    assert [int(measure(denoise, picture(k), sigmas, drawing(9)).argmin()) for k in range(3)] == [0, 1, 2]


def test_all_conditions_see_the_same_noise():
    seen = []
    denoising_errors(lambda x, sigma: (seen.append(x), x)[1], picture(0), SCHEDULE.sigmas[::300], drawing(0))
    assert all(torch.equal(x[0], x[1]) and torch.equal(x[0], x[2]) for x in seen)
    assert not torch.equal((seen[0] - picture(0)) / seen[0].std(), (seen[1] - picture(0)) / seen[1].std())


def right(text):
    found = re.fullmatch(r"by denoising error: (\d) of (\d) are right\nby likelihood: (\d) of \2 are right\n", text)
    return int(found[1]), int(found[3]), int(found[2])


def test_the_command_prints_how_many_are_right_and_makes_a_picture(pipe, tmp_path, monkeypatch, capsys):
    words = "--levels", "2", "--objects", "frog", "fox", "car"
    assert right(printed("diffusion_classifier", monkeypatch, capsys, tmp_path / "out.png", *words, pipe=pipe))[2] == 3


@pytest.mark.slow
def test_the_bundled_model_names_more_of_its_own_pictures_than_chance(tmp_path, monkeypatch, capsys):
    *counts, total = right(printed("diffusion_classifier", monkeypatch, capsys, tmp_path / "out.png"))
    assert all(count >= total / 2 for count in counts)
