"""Linear probes: the closed form, the activations, the scenes' targets, and the script's own numbers."""

import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from scripts.recipes.linear_probe import activations, r2, ridge, scenes
from tests.recipes.mains import printed

RANDOM = torch.Generator().manual_seed(0)
A = 3 + 2 * torch.randn(40, 12, generator=RANDOM, dtype=torch.float64)
Y = torch.randn(40, 2, generator=RANDOM, dtype=torch.float64)


def test_ridge_is_the_minimum_of_the_squared_error_and_the_penalty():
    predicted = ridge(A, Y, A[:5], penalty=0.5)
    a = (A - A.mean(0)) / (A.std(0) + 1e-6)
    weights = torch.linalg.solve(a.T @ a + 0.5 * 12 * torch.eye(12), a.T @ (Y - Y.mean(0)))  # the other closed form
    assert torch.allclose(predicted, Y.mean(0) + a[:5] @ weights)


def test_a_linear_target_is_found_and_noise_is_not():
    linear, noise = A @ torch.ones(12, 1, dtype=torch.float64), Y[:, :1]
    scores = r2(
        ridge(A[:30], torch.cat([linear, noise], dim=1)[:30], A[30:], penalty=1e-6), torch.cat([linear, noise], 1)[30:]
    )
    assert scores[0] > 0.999
    assert scores[1] < 0.5


def test_r2_is_1_for_the_targets_and_0_for_their_mean():
    assert torch.equal(r2(Y, Y), torch.ones(2))
    assert torch.allclose(r2(Y.mean(0).expand_as(Y), Y), torch.zeros(2, dtype=torch.float64))


@torch.no_grad()
def test_activations_are_those_of_all_stages_at_the_timestep(pipe):
    latents, timesteps = torch.randn(3, 4, 8, 8), []
    with pipe.unet.register_forward_pre_hook(lambda module, args: timesteps.append(args[1].tolist())):
        found = activations(pipe, latents, 150)
    assert timesteps == [[150.0] * 3]
    assert len(found) == 1 + len(pipe.unet.stages())
    assert all(len(each) == 3 for each in found)
    middle = 1 + len(pipe.unet.down)
    assert found[middle].shape[1] == 16 * pipe.config.unet.channels[-1]
    assert not any(stage._forward_hooks for stage in pipe.unet.stages())


def test_the_targets_say_where_the_objects_are():
    drawn = Image.new("RGB", (64, 64), (236, 236, 238))
    ImageDraw.Draw(drawn).rectangle([16, 16, 47, 47], (255, 0, 255))
    for picture, (x, y, size) in zip(*scenes([drawn], 10), strict=True):
        mine = torch.from_numpy((np.asarray(picture) == (255, 0, 255)).all(axis=2)).nonzero().float()
        assert float(mine[:, 1].mean() / 64) == pytest.approx(float(x), abs=0.03)
        assert float(mine[:, 0].mean() / 64) == pytest.approx(float(y), abs=0.03)
        assert float(len(mine) ** 0.5 / 64) == pytest.approx(float(size), abs=0.05)


def table(text):
    head, *lines = text.splitlines()
    assert head.startswith("R2 of place and of size at the timesteps ")
    return {line.split(":")[0].strip(): [float(x) for x in re.findall(r"-?\d+\.\d+", line)] for line in lines}


def test_the_script_makes_a_picture_and_a_line_for_each_block(pipe, tmp_path, monkeypatch, capsys):
    words = "--scenes", "16", "--timesteps", "500", "100"
    found = table(printed("linear_probe", monkeypatch, capsys, tmp_path / "out.png", *words, pipe=pipe))
    assert next(iter(found)) == "latents"
    assert len(found) == 1 + len(pipe.unet.stages())
    assert all(len(each) == 4 for each in found.values())


@pytest.mark.slow
def test_the_bundled_model_knows_the_place_better_than_its_latents_do(tmp_path, monkeypatch, capsys):
    found = table(printed("linear_probe", monkeypatch, capsys, tmp_path / "out.png"))
    latents, *blocks = found.values()
    assert max(block[-2] for block in blocks) > 0.7
    assert all(max(block[i] for block in blocks) > latents[i] for i in range(len(latents)))
