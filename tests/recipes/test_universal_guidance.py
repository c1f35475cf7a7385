"""Universal guidance: for a Gaussian prior and a Gaussian likelihood, the posterior is known."""

import numpy as np
import pytest
import torch

from ldm.diffusion.samplers import heun, seeded_noise
from ldm.diffusion.schedule import NoiseSchedule, to_ve
from ldm.pictures import read_picture
from ldm.training.grounds import GROUNDS
from scripts.recipes.universal_guidance import Classifier, steered
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


def test_the_classifier_knows_grounds_that_it_has_not_seen():
    rng = np.random.default_rng(5)
    pictures = torch.from_numpy(np.array([ground.paint(64, rng) for ground in GROUNDS.values()])).movedim(-1, 1)
    found = Classifier()(pictures / 127.5 - 1).argmax(dim=1)
    assert (found == torch.arange(len(GROUNDS))).float().mean() > 0.8
    assert torch.allclose(Classifier()(torch.zeros(2, 3, 32, 32)).exp().sum(dim=1), torch.ones(2))


def test_the_script_prints_the_probabilities(pipe, monkeypatch, capsys, tmp_path):
    out, words = tmp_path / "out.png", ("a frog", "snow", "--steps", "2")
    assert printed("universal_guidance", monkeypatch, capsys, out, *words, pipe=pipe).startswith("p(snow) is ")
    assert read_picture(out).width == 2 * pipe.config.image_size


@pytest.mark.slow
def test_the_bundled_model_shows_the_ground_that_the_classifier_wants(monkeypatch, capsys, tmp_path):
    words = printed("universal_guidance", monkeypatch, capsys, tmp_path / "out.png").split()
    assert float(words[2]) > 2 * float(words[8])
