"""Score distillation, where the denoiser of a Gaussian gives the exact gradient."""

import pytest
import torch

from scripts.recipes import sds
from tests.recipes.mains import numbers

MEAN, STD = 0.7, 0.5


def gaussian(x, sigma):
    """The exact denoiser of N(MEAN, STD^2)."""
    return MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)


def test_the_gradient_of_a_gaussian_leads_to_its_mean_with_the_weight_of_the_paper():
    z, sigma = torch.full((1, 4, 64, 64), 2.0, dtype=torch.float64), torch.tensor(1.5)
    noise = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = sds.sds(gaussian, z, sigma, noise) + sds.sds(gaussian, z, sigma, -noise)  # the noise has mean 0
    weight = 1.5**2 / (1 + 1.5**2)
    assert torch.allclose(both / 2, weight * (z - MEAN) * 1.5 / (STD**2 + 1.5**2))


def test_latents_that_follow_the_gradient_become_the_mode():
    z, generator = torch.full((1, 1, 8, 8), 3.0), torch.Generator().manual_seed(0)
    for i in range(400):
        z = z - 4 / (i + 4) * sds.sds(gaussian, z, torch.tensor(1.0), torch.randn(z.shape, generator=generator))
    assert (z - MEAN).abs().max() < 0.25
    assert abs(z.mean() - MEAN) < 0.02


def test_a_disc_is_where_and_as_large_as_its_parameters_say():
    disc = sds.Disc()
    with torch.no_grad():
        disc.center.copy_(torch.tensor([0.25, 0.5]))
        disc.color.copy_(torch.tensor([1.0, 0.0, -1.0]))
    picture = disc(64)[0]
    assert torch.allclose(picture[:, 32, 16], disc.color, atol=0.03)
    assert torch.allclose(picture[:, 32, 48], disc.ground, atol=0.01)
    picture[0].sum().backward()
    assert disc.radius.grad > 0


def test_the_script_changes_the_disc_and_prints_its_place_and_the_color_of_the_ground(
    pipe, monkeypatch, capsys, tmp_path
):
    place, color, first, gray = numbers(
        "sds", monkeypatch, capsys, tmp_path / "out.png", "a frog", "--steps", "2", pipe=pipe
    )
    assert first == 22
    assert gray == pytest.approx((8.5 + 49.5 + 56.5) / 3, abs=1)
    assert (place, color) != (first, gray)


@pytest.mark.slow
def test_the_prompt_of_the_bundled_model_places_the_disc_and_colors_the_ground(monkeypatch, capsys, tmp_path):
    place, color, first, gray = numbers("sds", monkeypatch, capsys, tmp_path / "out.png")
    assert place < 0.6 * first
    assert color < 0.6 * gray
