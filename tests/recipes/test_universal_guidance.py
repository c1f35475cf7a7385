"""Universal guidance: for a Gaussian prior and a Gaussian likelihood, the posterior is known."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.diffusion.samplers import heun, seeded_noise
from ldm.diffusion.schedule import NoiseSchedule, to_ve
from ldm.images import to_tensor
from ldm.pictures import read_picture
from ldm.training.checker import Checker
from ldm.training.grounds import GROUNDS
from scripts.recipes.universal_guidance import differences, steered
from tests.recipes.mains import printed

PRIOR, NOISE, Y = 0.8, 0.5, 1.0


def gaussian(x, sigma):
    """The exact denoiser of N(0, PRIOR^2)."""
    return PRIOR**2 / (PRIOR**2 + sigma**2) * x


def test_steered_samples_have_the_posterior_of_a_gaussian_if_the_loss_is_its_likelihood():
    def exact(x, sigma):
        spread = NOISE**2 + PRIOR**2 * sigma**2 / (PRIOR**2 + sigma**2)  # of y given x
        return steered(gaussian, lambda x0: ((Y - x0) ** 2).flatten(1).sum(dim=1) / (2 * spread))(x, sigma)

    sigmas, draw = NoiseSchedule().steps(60, "karras"), seeded_noise([0], (4, 32, 32))
    *_, last = heun(exact, to_ve(draw().double(), sigmas[0]), sigmas)
    variance = 1 / (1 / PRIOR**2 + 1 / NOISE**2)
    assert float(last.x0.mean()) == pytest.approx(variance * Y / NOISE**2, abs=0.03)
    assert float(last.x0.std()) == pytest.approx(variance**0.5, rel=0.05)


def test_a_loss_that_is_constant_changes_nothing():
    x, sigma = torch.randn(2, 4, 8, 8), torch.tensor(2.0)
    assert torch.equal(steered(gaussian, lambda x0: 0 * x0.sum((1, 2, 3)))(x, sigma), gaussian(x, sigma))


@pytest.fixture
def checker(monkeypatch) -> Checker:
    monkeypatch.setattr("ldm.training.checker.EXAMPLES", 4)  # of each ground, for speed
    return Checker({"3D": {"square": Image.new("RGBA", (32, 32), (200, 40, 200, 255))}})


def test_the_nearest_ground_is_the_one_that_the_checker_names(checker):
    rng = np.random.default_rng(5)
    painted = [ground.paint(64, rng).clip(0, 255).astype(np.uint8) for ground in GROUNDS.values()]
    found = differences(checker, torch.cat([to_tensor(Image.fromarray(each)) for each in painted]))
    named = [list(GROUNDS).index(checker.look(Image.fromarray(each)).ground) for each in painted]
    assert (found.argmin(dim=1) == torch.tensor(named)).sum() >= len(GROUNDS) - 1
    assert float(differences(checker, checker.examples[1, :1])[0, 0]) == pytest.approx(0, abs=1e-5)


def test_the_gradient_turns_the_border_of_a_picture_into_that_of_the_wanted_ground(checker):
    images = torch.full((1, 3, 64, 64), 0.85).requires_grad_()  # white
    night = list(GROUNDS).index("night")
    steps = torch.optim.SGD([images], lr=100)
    for _ in range(20):
        steps.zero_grad()
        differences(checker, images)[0, night].backward()
        steps.step()
    assert differences(checker, images.detach()).argmin() == night


def test_the_script_prints_how_often_the_checker_names_the_ground(pipe, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("ldm.training.checker.EXAMPLES", 2)
    out, words = tmp_path / "out.png", ("a frog", "snow", "beach", "--steps", "2")
    text = printed("universal_guidance", monkeypatch, capsys, out, *words, pipe=pipe)
    assert re.match(r"of 2, the checker finds \d grounds and \d objects; without the gradient \d grounds", text)
    assert read_picture(out).width == 2 * pipe.config.image_size


@pytest.mark.slow
def test_the_checker_names_the_wanted_ground_more_often(monkeypatch, capsys, tmp_path):
    text = printed("universal_guidance", monkeypatch, capsys, tmp_path / "out.png")
    total, after, objects, before, _ = map(int, re.findall(r"\d+", text))
    assert before + 2 <= after <= total
    assert objects
