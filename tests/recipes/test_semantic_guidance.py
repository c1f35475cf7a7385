"""Semantic guidance: with the denoisers of Gaussians, all that it adds is known."""

import math

import pytest
import torch

from scripts.recipes.semantic_guidance import largest, semantic
from tests.recipes.mains import numbers
from tests.recipes.test_editing import toward


def test_the_mask_keeps_the_largest_tenth_of_each_channel():
    psi = torch.arange(100.0).reshape(1, 1, 10, 10) * torch.tensor([1.0, -3.0])[None, :, None, None]
    kept = largest(psi, 0.9)
    assert torch.equal((kept != 0).sum(dim=(2, 3)), torch.tensor([[10, 10]]))
    assert torch.equal(kept[:, :, -1], psi[:, :, -1])
    assert torch.equal(largest(psi, 0.0), psi)


def test_an_edit_moves_the_mean_of_a_gaussian_in_its_own_region_alone_and_only_after_the_warm_up():
    target = torch.zeros(1, 2, 10, 10, dtype=torch.float64)
    target[..., 2:4, 1:6] = 1.0  # a tenth of the picture
    x, sigma = torch.randn_like(target), torch.tensor(2.0, dtype=torch.float64)
    denoise = semantic(toward(0.0), toward(0.5), [(toward(target), 3.0)], 4.0, warmup=1, scale=0.0, threshold=0.9)
    assert torch.allclose(denoise(x, sigma), toward(4 * 0.5)(x, sigma))
    assert torch.allclose(denoise(x, sigma), toward(4 * 0.5 + 3 * target)(x, sigma))


def test_momentum_grows_during_the_warm_up_and_adds_up_as_in_the_paper():
    x, sigma = torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    denoise = semantic(
        toward(0.0), toward(0.0), [(toward(1.0), 2.0)], 1.0, warmup=2, threshold=0.0, scale=0.5, beta=0.8
    )
    found = [float(denoise(x, sigma).mean()) for _ in range(4)]
    gammas, momentum = [], 0.0
    for _ in range(4):
        gammas.append(2.0 * 0.5 + 0.5 * momentum)  # the estimates of both Gaussians differ by 1/2
        momentum = 0.8 * momentum + 0.2 * gammas[-1]
    assert found == pytest.approx([0, 0, *gammas[2:]])


def test_the_script_makes_a_picture_and_numbers(monkeypatch, capsys, tmp_path, pipe):
    assert all(
        map(
            math.isfinite,
            numbers("semantic_guidance", monkeypatch, capsys, tmp_path / "out.png", "--steps", "3", pipe=pipe),
        )
    )


@pytest.mark.slow
def test_an_edit_of_the_bundled_model_changes_the_object_and_masks_keep_the_rest(monkeypatch, capsys, tmp_path):
    inside, outside, without = numbers("semantic_guidance", monkeypatch, capsys, tmp_path / "out.png")
    assert inside > 3 * outside
    assert outside < without
