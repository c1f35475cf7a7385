"""Attend-and-Excite: the loss is that of the paper, and its gradient raises the neglected word."""

import sys

import pytest
import torch

import ldm
from ldm.pictures import read_picture
from scripts.recipes.attend_and_excite import attend_and_excite, main, neglect, smooth

FROG = ldm.Request("a frog", steps=3, seed=3, sampler="ddim")


def test_the_loss_is_1_for_a_word_without_attention_and_0_for_words_with_all_of_it():
    maps = torch.zeros(1, 5, 8, 8)  # begin, two words, another, end
    maps[:, 0] = 0.9
    maps[:, 1, :, :4] = 1.0
    maps[:, 2, :, 4:] = 1.0
    assert neglect(maps, [1, 2]) == pytest.approx(0, abs=1e-5)
    maps[:, 2] = 0
    maps[:, 3, :, 4:] = 1.0
    assert neglect(maps, [1, 2]) == pytest.approx(1, abs=1e-5)
    assert neglect(maps, [1]) == pytest.approx(0, abs=1e-5)


def test_smoothing_keeps_the_sum_of_a_map_in_the_middle():
    maps = torch.zeros(1, 1, 5, 5)
    maps[..., 2, 2] = 1
    assert smooth(maps).sum() == pytest.approx(1, abs=1e-4)
    assert 0.5 < smooth(maps)[..., 2, 2] < 0.7


def test_rate_0_samples_as_the_pipeline(pipe):
    latents, losses = attend_and_excite(pipe, FROG, [2], rate=0)
    *_, last = pipe.stream(FROG)
    assert torch.allclose(latents, last.latents, atol=1e-5)
    assert len(losses) == 3


def test_the_gradient_lowers_the_loss_of_the_next_step(pipe):
    plain, before = attend_and_excite(pipe, FROG, [2], rate=0)
    excited, after = attend_and_excite(pipe, FROG, [2], rate=20)
    assert before[0] == after[0]
    assert after[1] < before[1]
    assert not torch.equal(plain, excited)


def test_the_script_prints_both_losses(pipe, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ldm, "load", lambda: pipe)
    words = ["a frog and a car", "frog", "car", "--steps", "2", "--out", str(tmp_path / "out.png")]
    monkeypatch.setattr(sys, "argv", ["attend_and_excite.py", *words])
    main()
    assert "the loss of the most neglected word is" in capsys.readouterr().out
    assert read_picture(tmp_path / "out.png").width == 2 * pipe.config.image_size


@pytest.mark.slow
def test_the_words_of_the_bundled_model_are_less_neglected(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["attend_and_excite.py", "--out", str(tmp_path / "out.png")])
    main()
    words = capsys.readouterr().out.split()
    assert float(words[8]) < float(words[12]) / 2
