"""The likelihood is the Gaussian's where that is known, and its error falls with the square of the steps."""

import math
import re

import pytest
import torch

import ldm
from ldm.diffusion.schedule import NoiseSchedule
from scripts.recipes.likelihood import bits_per_dimension, log_likelihood
from tests.recipes.mains import printed

D = 16
SCHEDULE = NoiseSchedule()
torch.manual_seed(0)
STD = 0.4 + torch.rand(D, dtype=torch.float64)  # of mean 0: then the density at the highest level is almost the prior
TURN = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]


def denoise(x, sigma):
    """E[x0 | x] of the Gaussian with the covariance TURN^T diag(STD^2) TURN."""
    shrunk = (x.reshape(len(x), D) @ TURN.T) * (STD**2 / (STD**2 + float(sigma) ** 2))
    return (shrunk @ TURN).reshape(x.shape)


def exact(x, sigma):
    covariance = TURN.T @ torch.diag(STD**2 + float(sigma) ** 2) @ TURN
    return torch.distributions.MultivariateNormal(torch.zeros(D, dtype=torch.float64), covariance).log_prob(
        x.reshape(len(x), D)
    )


def errors(n, draws=1):
    """Signed errors in nats per dimension, the mean over `draws` sign vectors for each x."""
    generator = torch.Generator().manual_seed(1)
    x = ((torch.randn(8, D, generator=generator, dtype=torch.float64) * STD) @ TURN).reshape(8, 1, 4, 4)
    sigmas = SCHEDULE.steps(n + 1, "exponential")[:-1].flip(0)
    x = x + sigmas[0] * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    repeated = x.repeat(draws, 1, 1, 1)
    v = torch.randn(repeated.shape, generator=generator, dtype=torch.float64).sign()
    estimates, _ = log_likelihood(denoise, repeated, sigmas, v)
    return (estimates.reshape(draws, 8).mean(0) - exact(x, sigmas[0])) / D


def test_the_error_against_the_exact_gaussian_falls_with_the_square_of_the_steps(monkeypatch):
    monkeypatch.setattr("tests.recipes.test_likelihood.TURN", torch.eye(D, dtype=torch.float64))
    worst = [errors(n).abs().max().item() for n in (20, 40, 80)]  # of a diagonal Jacobian, signs give the exact trace
    print(worst)
    assert worst[0] < 0.1
    assert worst[1] < worst[0] / 3
    assert worst[2] < worst[1] / 3 or worst[2] < 3e-3  # what is left: the prior has the variance 1 + sigma^2


def test_hutchinsons_estimate_is_right_on_average_if_dimensions_depend_on_each_other():
    single, many = errors(60).abs().max().item(), errors(60, draws=200).abs().max().item()
    print(single, many)
    assert many < 0.03
    assert single > 2 * many


def test_the_vae_has_a_part_that_counts_what_the_latents_lose(pipe):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    plan = pipe.plan(ldm.Request("a frog", guidance_scale=1, images=2))
    sigmas = pipe.schedule.steps(5, "exponential")[:-1].flip(0)
    with torch.no_grad():
        posterior = pipe.vae.encode(images)
        lossless = pipe.vae.decode(posterior.sample(noise)).clamp(-1, 1)
        given = pipe.denoiser(plan, pipe.conditions(plan)), images, sigmas, noise, noise.sign()
        latents, vae, path = bits_per_dimension(pipe, *given)
        log_p, _ = log_likelihood(given[0], posterior.sample(noise), sigmas, noise.sign())
    log_q = torch.distributions.Normal(*posterior).log_prob(posterior.sample(noise)).flatten(1).sum(1)
    assert torch.allclose(latents * math.log(2) * 3 * 32 * 32, log_q - log_p, rtol=1e-4)
    spread = (127.5 * (lossless - images)).square().flatten(1).mean(1)
    assert torch.allclose(2**vae, (2 * math.pi * math.e * (spread + 1 / 12)).sqrt(), rtol=1e-4)
    assert len(path) == 5


def test_the_command_prints_the_bits_and_makes_a_picture(pipe, tmp_path, monkeypatch, capsys):
    text = printed("likelihood", monkeypatch, capsys, tmp_path / "out.png", "--steps", "3", pipe=pipe)
    assert re.fullmatch(r"3 steps: -?\d+\.\d\d bits per dimension, \d+\.\d\d of them the VAE's\n", text)


@pytest.mark.slow
def test_the_bundled_models_own_picture_needs_fewer_bits_than_8(tmp_path, monkeypatch, capsys):
    text = printed("likelihood", monkeypatch, capsys, tmp_path / "out.png")
    assert 0 < float(re.search(r": (\d+\.\d\d) bits", text)[1]) < 8
