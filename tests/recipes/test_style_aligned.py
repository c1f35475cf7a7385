"""StyleAligned: the reference is not changed, and equal pictures have nothing to share."""

import pytest
import torch

import ldm
from ldm.models.attention import math_attention
from ldm.pictures import read_picture
from scripts.recipes.style_aligned import adain, shared, style_aligned
from tests.recipes.mains import numbers, printed

REQUEST = ldm.Request(("a frog", "a car"), steps=2, seed=3, images=2)


def test_adain_gives_the_mean_and_the_standard_deviation_of_the_other():
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 50, 4), 2 * torch.randn(2, 3, 50, 4) + 1
    assert torch.allclose(adain(x, y).mean(2), y.mean(2), atol=1e-4)
    assert torch.allclose(adain(x, y).std(2), y.std(2), rtol=1e-3)
    assert torch.allclose(adain(x, x), x, atol=1e-3)


def test_equal_rows_have_nothing_to_share_and_cross_attention_is_left_as_it_is():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 20, 4).repeat(3, 1, 1, 1) for _ in range(3))
    assert torch.allclose(shared("mid.attn1", math_attention)(q, k, v), math_attention(q, k, v), atol=1e-3)
    assert shared("mid.attn2", math_attention) is math_attention


def test_the_first_picture_is_the_pipelines_and_the_second_is_not(pipe):
    latents = style_aligned(pipe, REQUEST)
    *_, last = pipe.stream(REQUEST)
    assert torch.allclose(latents[0], last.latents[0], atol=1e-4)
    assert not torch.allclose(latents[1], last.latents[1], atol=1e-2)


def test_the_script_prints_the_differences(pipe, monkeypatch, capsys, tmp_path):
    words = "a frog", "a car", "--steps", "2"
    text = printed("style_aligned", monkeypatch, capsys, tmp_path / "out.png", *words, pipe=pipe)
    assert "without sharing" in text
    assert read_picture(tmp_path / "out.png").width == 2 * pipe.config.image_size


@pytest.mark.slow
def test_the_pictures_of_the_bundled_model_come_nearer_to_the_colors_of_the_first(monkeypatch, capsys, tmp_path):
    after, before = numbers("style_aligned", monkeypatch, capsys, tmp_path / "out.png")
    assert after < 0.8 * before
