"""Concept erasure by fine-tuning: the target is guidance away from the prompt, and only cross-attention learns it."""

import inspect
import math

import pytest
import torch

import ldm
from ldm.diffusion.denoiser import guided
from scripts.recipes import esd, uce
from tests.recipes.mains import numbers


def test_the_target_of_a_gaussian_is_the_noise_of_the_mirrored_gaussian():
    x, sigma = torch.randn(1, 2, 3, 3, dtype=torch.float64), 1.5

    def eps(mean):  # of N(mean, 1)
        return sigma * (x - mean) / (1 + sigma**2)

    assert torch.allclose(esd.away(eps(0.8), eps(0.0), 2.0), eps(-1.6))


def test_only_a_copy_of_the_cross_attention_learns_and_comes_nearer_to_the_target(pipe):
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    unet = esd.erase(pipe, "a frog", 12, rate=3e-3)
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.unet.state_dict().items())
    moved = {name for name, weight in unet.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if ".attn2." in name}
    assert not any(weight.requires_grad for weight in unet.parameters())
    conditions = pipe.conditions(pipe.plan(ldm.Request("a frog")))
    target, generator = guided(pipe.binding(), conditions, lambda both: esd.away(*both, 1.0)), torch.Generator()
    far = near = 0.0
    for t in (200.0, 500.0, 800.0):
        z, times = torch.randn(1, 4, 8, 8, generator=generator.manual_seed(int(t))), torch.tensor([t])
        with torch.no_grad():
            far += float((pipe.unet.bind(conditions[0])(z, times) - target(z, times)).square().mean())
            near += float((unet.bind(conditions[0])(z, times) - target(z, times)).square().mean())
    assert near < 0.95 * far


def test_the_score_is_0_for_the_empty_prompt_and_measures_both_recipes_of_unlearning_alike(pipe):
    latents = torch.randn(1, *pipe.plan(ldm.Request("")).latent_shape)
    assert esd.score(pipe, latents, "") == pytest.approx(0, abs=1e-3)
    assert abs(esd.score(pipe, latents, "a frog")) > 1e-3
    assert inspect.getsource(esd.score) == inspect.getsource(uce.score)


def test_the_script_makes_a_picture_and_numbers(monkeypatch, capsys, tmp_path, pipe):
    assert all(map(math.isfinite, numbers("esd", monkeypatch, capsys, tmp_path / "out.png", "--steps", "2", pipe=pipe)))


@pytest.mark.slow
def test_an_erased_object_is_drawn_no_more_and_another_stays(monkeypatch, capsys, tmp_path):
    before, after, kept_before, kept_after = numbers("esd", monkeypatch, capsys, tmp_path / "out.png")
    assert after < before / 3
    assert kept_after > 0.7 * kept_before
