"""Descriptors of the UNet: known matches, the right activations, and the script's own number."""

import math

import pytest
import torch

from scripts.recipes import dift
from tests.recipes.mains import numbers


def test_a_moved_map_matches_its_own_points():
    first = torch.randn(16, 7, 9, generator=torch.Generator().manual_seed(0))
    points = torch.tensor([[0, 0], [3, 5], [6, 8]])
    moved = 3 * first.roll((1, 2), (1, 2))  # the cosine ignores the scale
    assert torch.equal(dift.matches(first, moved, points), (points + torch.tensor([1, 2])) % torch.tensor([7, 9]))


def test_descriptors_are_the_mean_activations_of_the_stage_at_the_timestep(pipe):
    latents, seen = torch.randn(1, 4, 8, 8), []
    with pipe.unet.up[1].register_forward_hook(lambda module, args, out: seen.append(out[0])):
        got = dift.descriptors(pipe, latents, 150, 1, draws=3)
    assert len(seen) == 3
    assert torch.equal(got, torch.stack(seen).mean(dim=0))
    assert not torch.equal(seen[0], seen[1])
    timesteps = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: timesteps.append(float(args[1])))
    with hook:
        dift.descriptors(pipe, latents, 150, 1, draws=1)
    assert timesteps == [150]


def test_the_same_picture_matches_itself(pipe):
    latents = torch.randn(1, 4, 8, 8)
    same = dift.descriptors(pipe, latents, 150, -1, draws=2)
    points = torch.tensor([[1, 2], [5, 6]])
    assert torch.equal(dift.matches(same, same, points), points)


def test_the_script_makes_a_picture_and_numbers(monkeypatch, capsys, tmp_path, pipe):
    assert all(
        map(math.isfinite, numbers("dift", monkeypatch, capsys, tmp_path / "out.png", "--steps", "2", pipe=pipe))
    )


@pytest.mark.slow
def test_most_points_of_the_object_are_found(monkeypatch, capsys, tmp_path):
    share, points, _ = numbers("dift", monkeypatch, capsys, tmp_path / "out.png")
    assert points > 10
    assert share > 70
