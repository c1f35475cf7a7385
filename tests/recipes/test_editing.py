"""DiffEdit and concept erasure: exact where the answer is known, and the scripts' own numbers."""

import math

import pytest
import torch

from scripts.recipes import diffedit, uce
from tests.recipes.mains import numbers

LEVELS = torch.tensor([6.0, 3.0, 1.5, 0.7, 0.0], dtype=torch.float64)


def toward(target):
    """The denoiser of N(target, 1): the posterior mean of x0."""
    return lambda x, sigma: (x + sigma**2 * target) / (1 + sigma**2)


def test_the_mask_is_where_the_means_of_two_gaussians_differ():
    target = torch.zeros(1, 2, 6, 6, dtype=torch.float64)
    target[..., 2:4, 1:3] = 1.0
    noise = lambda: torch.randn_like(target)  # noqa: E731
    options = {"draws": 3, "threshold": 0.5}
    mask = diffedit.edit_mask(toward(target), toward(0 * target), 0 * target, LEVELS[1], noise, **options)
    assert torch.equal(mask, target[:, :1])


def test_what_the_mask_leaves_stays_and_the_rest_goes_to_the_query():
    latents = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    mask[..., 2:4, 1:3] = 1
    exact = lambda x, sigma: torch.full_like(x, 5.0)  # noqa: E731  # the denoiser of a single picture
    edited = diffedit.edit(exact, toward(0.0), latents, mask, LEVELS)
    assert torch.allclose(edited, torch.where(mask > 0, 5.0, latents), rtol=0, atol=1e-12)


def test_the_closed_form_is_the_minimum_of_the_papers_objective():
    draw = torch.Generator().manual_seed(0)
    old, erased, new, kept = (torch.randn(*s, generator=draw).double() for s in ((5, 4), (3, 4), (3, 4), (7, 4)))
    weight = uce.closed_form(old, erased, new, kept, 0.3).requires_grad_()
    moved = (erased @ weight.T - new @ old.T).square().sum()
    stayed = (kept @ weight.T - kept @ old.T).square().sum()
    (gradient,) = torch.autograd.grad(moved + stayed + 0.3 * (weight - old).square().sum(), weight)
    assert gradient.abs().max() < 1e-9
    assert (weight - old).abs().max() > 0.1


def test_an_erased_prompt_gets_the_keys_and_values_of_its_replacement(pipe):
    unet = uce.erase(pipe, [("a frog", "a bear")], ["a bear"], ridge=1e-6)
    frog, bear = pipe.text_encoder.encode(["a frog", "a bear"]).map(torch.detach).rows()
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    with torch.no_grad():
        original = pipe.unet(x, t, bear.context)
        assert torch.allclose(unet(x, t, frog.context), original, atol=2e-3)
        assert torch.allclose(unet(x, t, bear.context), original, atol=2e-3)
        assert not torch.allclose(pipe.unet(x, t, frog.context), original, atol=1e-2)


def test_kept_prompts_alone_change_nothing(pipe):
    unet = uce.erase(pipe, [("a frog", "a frog")], ["a bear"])
    for new, old in zip(unet.parameters(), pipe.unet.parameters(), strict=True):
        assert torch.allclose(new, old, atol=1e-4)


@pytest.mark.parametrize("script", ["diffedit", "uce"])
def test_the_script_makes_a_picture_and_numbers(script, monkeypatch, capsys, tmp_path, pipe):
    found = numbers(script, monkeypatch, capsys, tmp_path / "out.png", "--steps", "4", pipe=pipe)
    assert all(map(math.isfinite, found))


@pytest.mark.slow
def test_an_edit_changes_its_mask_and_little_else(monkeypatch, capsys, tmp_path):
    share, inside, outside = numbers("diffedit", monkeypatch, capsys, tmp_path / "out.png")
    assert 3 < share < 60
    assert outside < inside / 4


@pytest.mark.slow
def test_an_erased_object_is_drawn_no_more_and_another_stays(monkeypatch, capsys, tmp_path):
    before, after, kept_before, kept_after = numbers("uce", monkeypatch, capsys, tmp_path / "out.png")
    assert after < before / 3
    assert kept_after > 0.8 * kept_before
