"""Attend-and-Excite: the loss is that of the paper, and its gradient raises the neglected word."""

import re

import pytest
import torch

import ldm
from ldm.pictures import read_picture
from scripts.recipes import attend_and_excite as recipe
from tests.recipes.mains import printed

FROG = ldm.Request("a frog", steps=3, seed=3, sampler="ddim")


def losses(pipe, monkeypatch, rate):
    """Return the sampled latents, and the loss of each update."""
    found, neglect = [], recipe.neglect
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "neglect", lambda *args: found.append(neglect(*args)) or found[-1])
        latents = recipe.attend_and_excite(pipe, FROG, [2], rate)
    return latents, [float(loss.detach()) for loss in found]


def test_the_loss_is_1_for_a_word_without_attention_and_0_for_words_with_all_of_it():
    maps = torch.zeros(1, 5, 8, 8)  # begin, two words, another, end
    maps[:, 0] = 0.9
    maps[:, 1, :, :4] = 1.0
    maps[:, 2, :, 4:] = 1.0
    assert recipe.neglect(maps, [1, 2]) == pytest.approx(0, abs=1e-5)
    maps[:, 2] = 0
    maps[:, 3, :, 4:] = 1.0
    assert recipe.neglect(maps, [1, 2]) == pytest.approx(1, abs=1e-5)
    assert recipe.neglect(maps, [1]) == pytest.approx(0, abs=1e-5)


def test_the_attention_is_smoothed_before_its_maximum():
    maps = torch.zeros(1, 4, 5, 5)
    maps[:, 2] = 1
    maps[:, 1, 2, 2], maps[:, 2, 2, 2] = 1, 0
    assert recipe.neglect(maps, [1]) == pytest.approx(1 - 0.787**2, abs=1e-3)


def test_rate_0_samples_as_the_pipeline(pipe, monkeypatch):
    latents, _ = losses(pipe, monkeypatch, 0.0)
    *_, last = pipe.stream(FROG)
    assert torch.allclose(latents, last.latents, atol=1e-5)


def test_the_gradient_lowers_the_loss_of_the_next_update_and_enough_attention_ends_the_updates_of_a_step(
    pipe, monkeypatch
):
    monkeypatch.setattr(recipe, "THRESHOLDS", {0.0: 1.0})  # never reached
    plain, before = losses(pipe, monkeypatch, 0.0)
    excited, after = losses(pipe, monkeypatch, 20.0)
    assert len(before) == len(after) == 20 + 1  # two of the three steps follow the gradient
    assert before[0] == after[0]
    assert after[19] < after[1] < before[1]
    assert not torch.equal(plain, excited)
    monkeypatch.setattr(recipe, "THRESHOLDS", {0.0: 1 - after[2]})
    _, enough = losses(pipe, monkeypatch, 20.0)
    assert enough[:3] == after[:3]
    assert len(enough) == 3 + 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the prompt has")  # the words of the random model are letters
def test_the_script_prints_how_often_the_checker_finds_both_objects(pipe, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("ldm.training.checker.EXAMPLES", 2)  # of each ground, for speed
    text = printed("attend_and_excite", monkeypatch, capsys, tmp_path / "out.png", "--steps", "1", pipe=pipe)
    assert re.search(r"in \d of 8 pictures, in \d without the gradient", text)
    assert read_picture(tmp_path / "out.png").width == 4 * pipe.config.image_size


@pytest.mark.slow
def test_the_bundled_model_draws_both_objects_more_often(monkeypatch, capsys, tmp_path):
    text = printed("attend_and_excite", monkeypatch, capsys, tmp_path / "out.png")
    after, total, before = map(int, re.findall(r"\d+", text))
    assert before + 2 <= after <= total
