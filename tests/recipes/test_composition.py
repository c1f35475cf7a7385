"""AND and NOT, panoramas and tileable textures: exact where the answer is known, and the scripts' own numbers."""

import math

import pytest
import torch

import ldm
from ldm.diffusion.denoiser import classifier_free
from scripts.recipes import compose, panorama, tileable
from tests.recipes.mains import numbers

FROG = ldm.Request("a frog", steps=2, seed=3)


def test_the_composition_of_gaussians_is_their_weighted_product():
    """p(x | c) = N(m, 1) and p(x) = N(0, 1): the product has the mean sum w m, which its denoiser tends to."""
    x, sigma, means, weights = torch.tensor([[0.7]]), 2.0, [1.5, -0.4], [3.0, -1.0]

    def eps(mean):  # -sigma grad log N(x; mean, 1 + sigma^2)
        return sigma * (x - mean) / (1 + sigma**2)

    composed = compose.conjunction(weights)([eps(0.0), *map(eps, means)])
    assert torch.allclose(composed, eps(3.0 * 1.5 + 0.4))


def test_one_prompt_is_classifier_free_guidance():
    cond, uncond = torch.randn(2, 1, 4, 3, 3)
    assert torch.allclose(compose.conjunction([4.0])([uncond, cond]), classifier_free(4.0)([cond, uncond]), atol=1e-5)


def test_a_prompt_and_its_negation_cancel(pipe):
    x, sigma = torch.randn(1, 4, 8, 8), torch.tensor(2.0)
    with torch.no_grad():
        both = compose.composed(pipe, ["a frog", "a frog"], [2.0, -2.0])(x, sigma)
        plan = pipe.plan(ldm.Request("", guidance_scale=1))
        assert torch.allclose(both, pipe.denoiser(plan, pipe.conditions(plan))(x, sigma), atol=1e-4)
        assert not torch.allclose(both, compose.composed(pipe, ["a frog"], [2.0])(x, sigma), atol=1e-2)


def test_each_prompt_needs_a_weight(pipe):
    with pytest.raises(ValueError, match="each prompt needs a weight, got 2 prompts and 1 weights"):
        compose.composed(pipe, ["a frog", "a fox"], [1.0])


def test_windows_of_a_denoiser_of_single_pixels_change_nothing():
    """The Gaussian denoiser x / (1 + sigma^2) is the same for a window and for the whole."""
    x = torch.randn(2, 3, 9, 21, dtype=torch.float64)
    wide = panorama.multidiffusion(lambda x, sigma: x / (1 + sigma**2), 8, 5)
    assert torch.allclose(wide(x, torch.tensor(3.0)), x / 10, rtol=0, atol=1e-15)


def test_a_pixel_takes_the_mean_of_the_windows_that_cover_it():
    calls = iter([torch.tensor(1.0), torch.tensor(3.0), torch.tensor(8.0)])
    wide = panorama.multidiffusion(lambda x, sigma: next(calls).expand_as(x), 4, 3)
    expected = torch.tensor([1, 1, 1, 2, 3, 5.5, 5.5, 8, 8])  # the windows start at 0, 3 and 5
    assert torch.equal(wide(torch.zeros(1, 1, 4, 9), torch.tensor(1.0))[0, 0, 0], expected)
    assert panorama.starts(9, 4, 3) == [0, 3, 5]
    with pytest.raises(ValueError, match="windows need 1 <= stride <= side <= length, got 5, 4 and 9"):
        panorama.starts(9, 4, 5)


def test_a_window_of_the_whole_picture_is_the_plain_picture(pipe):
    plan = pipe.plan(FROG)
    with torch.no_grad():
        denoise, x = pipe.denoiser(plan, pipe.conditions(plan)), pipe.start(plan)
        assert torch.equal(panorama.multidiffusion(denoise, 8, 8)(x, plan.sigmas[0]), denoise(x, plan.sigmas[0]))


@pytest.mark.parametrize("dim", [2, 3])
def test_circular_networks_commute_with_shifts(pipe, dim):
    """The random model's UNet halves the sides once; its VAE doubles them twice."""
    z, t, context = torch.randn(1, 4, 8, 8), torch.tensor([300.0]), torch.randn(1, 7, 32)
    unet, vae = tileable.circular(pipe.unet), tileable.circular(pipe.vae)
    with torch.no_grad():
        assert torch.allclose(unet(z.roll(2, dim), t, context), unet(z, t, context).roll(2, dim), atol=1e-4)
        assert torch.allclose(vae.decode(z.roll(2, dim)), vae.decode(z).roll(8, dim), atol=1e-4)
        plain = pipe.unet(z, t, context)
        assert not torch.allclose(pipe.unet(z.roll(2, dim), t, context), plain.roll(2, dim), atol=1e-2)


def test_a_picture_with_one_step_of_color_at_its_border_has_a_large_border_step():
    ramp = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16)
    assert math.isclose(tileable.border(ramp), 15, rel_tol=1e-5)  # the step from the last to the first column
    assert tileable.border(torch.sin(torch.arange(16) * math.pi / 8).expand(1, 3, 16, 16)) < 2


@pytest.mark.parametrize("script", ["compose", "panorama", "tileable"])
def test_the_script_makes_a_picture_and_a_number(script, monkeypatch, capsys, tmp_path, pipe):
    first, second = numbers(script, monkeypatch, capsys, tmp_path / "out.png", "--steps", "2", pipe=pipe)
    assert math.isfinite(first)
    assert math.isfinite(second)


@pytest.mark.slow
def test_not_red_makes_the_picture_less_red(monkeypatch, capsys, tmp_path):
    alone, without = numbers("compose", monkeypatch, capsys, tmp_path / "out.png")
    assert alone > 40
    assert without < alone / 2


@pytest.mark.slow
@pytest.mark.parametrize("script", ["panorama", "tileable"])
def test_borders_are_less_visible_than_without_the_method(script, monkeypatch, capsys, tmp_path):
    own, without = numbers(script, monkeypatch, capsys, tmp_path / "out.png")
    assert own < 0.8 * without
