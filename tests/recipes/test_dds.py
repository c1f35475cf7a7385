"""Delta Denoising Score, where the denoisers of Gaussians give the exact gradient."""

import pytest
import torch

import ldm
from ldm.pictures import read_picture
from scripts.recipes import dds
from tests.recipes.mains import printed

STD, SIGMA = 0.5, torch.tensor(1.5, dtype=torch.float64)


def gaussian(mean):
    """The exact denoiser of N(mean, STD^2)."""
    return lambda x, sigma: mean + STD**2 / (STD**2 + sigma**2) * (x - mean)


def latents(seed):
    return torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_noise_cancels_in_the_gradient_of_two_gaussians():
    z, source = latents(0), latents(1)
    expected = ((z - 2.0) - (source + 1.0)) * SIGMA / (STD**2 + SIGMA**2)
    for seed in (2, 3):
        found = dds.dds(gaussian(2.0), gaussian(-1.0), z, source, SIGMA, latents(seed))
        assert torch.allclose(found, expected)


def test_descent_moves_each_latent_by_the_difference_of_the_means_and_keeps_the_rest():
    source = z = latents(1)
    for seed in range(60):
        z = z - 0.5 * dds.dds(gaussian(2.0), gaussian(-1.0), z, source, SIGMA, latents(seed))
    assert torch.allclose(z, source + 3.0)


def test_equal_prompts_change_nothing(pipe):
    source = torch.randn(1, *pipe.plan(ldm.Request("a frog")).latent_shape)
    assert torch.equal(dds.changed(pipe, source, ("a frog", "a frog"), steps=2), source)
    assert not torch.equal(dds.changed(pipe, source, ("a frog", "a cat"), steps=2), source)


def test_the_script_edits_a_picture_and_prints_the_change(pipe, monkeypatch, capsys, tmp_path):
    words = "a frog", "a cat", "--steps", "2"
    text = printed("dds", monkeypatch, capsys, tmp_path / "dds.png", *words, pipe=pipe)
    assert "the middle changed by" in text
    assert read_picture(tmp_path / "dds.png").width == 2 * pipe.config.image_size


@pytest.mark.slow
def test_the_bundled_model_changes_the_object_more_than_the_ground(monkeypatch, capsys, tmp_path):
    words = printed("dds", monkeypatch, capsys, tmp_path / "dds.png").split()
    assert float(words[6]) > 2 * float(words[-1])
