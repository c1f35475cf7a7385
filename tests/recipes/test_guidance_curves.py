"""Guidance: APG against its definition, the agreement against exact likelihoods, and the script's own numbers."""

import re

import pytest
import torch
from torch.distributions import Normal

from scripts.recipes.guidance_curves import WAYS, agreement, apg
from tests.recipes.mains import printed

RANDOM = torch.Generator().manual_seed(0)
COND, OTHER, UNCOND = torch.randn(3, 2, 4, 5, 5, generator=RANDOM, dtype=torch.float64)
SIGMA = torch.tensor(1.0)


def dot(a, b):
    return (a * b).flatten(1).sum(dim=1)


def test_apg_adds_only_what_is_orthogonal_to_the_conditional_prediction():
    denoise = apg(lambda x, sigma: COND, lambda x, sigma: UNCOND, 5.0, norm=1e6)
    added = denoise(COND, SIGMA) - COND
    d = COND - UNCOND
    assert torch.allclose(dot(added, COND), torch.zeros(2, dtype=torch.float64), atol=1e-9)
    parallel = (dot(d, COND) / dot(COND, COND))[:, None, None, None] * COND
    assert torch.allclose(added, 4 * (d - parallel))


def test_apg_limits_the_norm_of_each_picture():
    scaled = UNCOND * torch.tensor([1.0, 0.0], dtype=torch.float64)[:, None, None, None]
    far = apg(lambda x, sigma: COND, lambda x, sigma: COND + scaled, 2.0, norm=0.5)(COND, SIGMA) - COND
    assert 0 < far[0].norm() <= 0.5
    assert far[1].norm() == 0


def test_the_momentum_of_apg_adds_the_difference_before():
    pairs = iter([COND, OTHER])
    denoise = apg(lambda x, sigma: next(pairs), lambda x, sigma: UNCOND, 3.0, norm=1e6, momentum=-0.5)
    denoise(COND, SIGMA)
    d = OTHER - UNCOND - 0.5 * (COND - UNCOND)
    parallel = (dot(d, OTHER) / dot(OTHER, OTHER))[:, None, None, None] * OTHER
    assert torch.allclose(denoise(COND, SIGMA), OTHER + 2 * (d - parallel))


def test_apg_of_scale_1_is_the_conditional_prediction():
    assert torch.equal(apg(lambda x, sigma: COND, lambda x, sigma: UNCOND, 1.0)(COND, SIGMA), COND)


def test_the_agreement_is_the_difference_of_the_log_likelihoods_of_gaussians():
    prompt, others = Normal(0.4, 0.3), Normal(0.0, 0.8)

    def denoiser(known):
        mean, variance = known.mean, known.variance
        return lambda x, sigma: mean + (x - mean) * variance / (variance + float(sigma) ** 2)

    generator = torch.Generator().manual_seed(1)
    x0 = torch.stack(
        [known.mean + known.stddev * torch.randn(2, 4, 4, generator=generator) for known in (prompt, others)]
    )
    sigmas = torch.logspace(-3, 3, 1500, dtype=torch.float64)
    measured = agreement(
        denoiser(prompt), denoiser(others), x0, sigmas, lambda: torch.randn(x0.shape, generator=generator)
    )
    exact = (prompt.log_prob(x0) - others.log_prob(x0)).flatten(1).sum(dim=1)
    print(measured, exact)
    assert torch.allclose(measured.float(), exact, rtol=0.1, atol=1.5)
    assert measured[0] > 0 > measured[1]


def curves(text):
    found = re.findall(r"^(\w+), (\w+) at scales [^:]*: (.*)$", text, re.MULTILINE)
    return {(way, name): [int(number) for number in numbers.split(", ")] for way, name, numbers in found}


def test_the_script_makes_a_plot_and_numbers(pipe, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    words = "--scales", "1", "4", "--steps", "2"
    found = curves(printed("guidance_curves", monkeypatch, capsys, tmp_path / "out.png", *words, pipe=pipe))
    assert found.keys() == {(way, name) for way in WAYS for name in ("agreement", "saturation", "contrast")}
    assert all(len(numbers) == 2 for numbers in found.values())


@pytest.mark.slow
def test_guidance_raises_the_agreement_and_rescale_and_apg_saturate_less(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    found = curves(printed("guidance_curves", monkeypatch, capsys, tmp_path / "out.png"))
    assert found["guidance", "agreement"][2] > found["guidance", "agreement"][0]
    for way in ("rescale", "APG"):
        assert found[way, "saturation"][-1] < found["guidance", "saturation"][-1]
