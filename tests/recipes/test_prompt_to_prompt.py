"""Prompt-to-Prompt: an edit that changes nothing is exact, and each word takes the map of its partner."""

import warnings

import pytest
import torch

import ldm
from ldm.pictures import read_picture
from scripts.recipes.prompt_to_prompt import partners, prompt_to_prompt
from tests.recipes.mains import printed


def test_a_replaced_token_has_the_replaced_one_as_its_partner_and_an_added_token_has_none():
    assert partners([9, 1, 2, 3, 8], [9, 1, 5, 3, 8]) == [0, 1, 2, 3, 4]  # replace
    assert partners([9, 1, 2, 8, 8], [9, 1, 7, 2, 8]) == [0, 1, -1, 2, 3]  # refine
    assert partners([9, 1, 2, 8], [9, 1, 5, 6, 8]) == [0, 1, 2, 2, 3]  # a word of two tokens replaces one of one
    assert partners([9, 1, 2, 8], [9, 2, 8, 8]) == [0, 2, 3, -1]


@pytest.fixture(autouse=True)
def _short_texts():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a prompt that is cut off would test less
        yield


def test_the_source_is_not_changed_and_an_equal_prompt_makes_the_same_picture(pipe):
    source, edit = prompt_to_prompt(pipe, "a frog", "a frog", steps=2, seed=3)
    *_, plain = pipe.stream(ldm.Request("a frog", steps=2, seed=3, sampler="ddim"))
    assert torch.allclose(source, edit, atol=1e-5)
    assert torch.allclose(source, plain.latents[0], atol=1e-4)


def test_without_control_the_edit_is_the_picture_of_its_own_prompt(pipe):
    _, edit = prompt_to_prompt(pipe, "a frog", "a cat", cross=0, pixels=0, steps=2, seed=3)
    *_, plain = pipe.stream(ldm.Request("a cat", steps=2, seed=3, sampler="ddim"))
    assert torch.allclose(edit, plain.latents[0], atol=1e-4)


def test_control_brings_the_edit_nearer_to_the_source_and_weights_change_the_edit_alone(pipe):
    def run(**settings):
        return prompt_to_prompt(pipe, "a frog", "a cat", steps=3, seed=3, **settings)

    free, full = run(cross=0, pixels=0), run(cross=1, pixels=1)
    assert (full[1] - full[0]).abs().mean() < (free[1] - free[0]).abs().mean()
    weights = torch.ones(pipe.conditions(pipe.plan(ldm.Request("a cat")))[0].context.shape[1])
    weights[2] = 5.0
    weighted = run(cross=1, pixels=1, weights=weights)
    assert torch.allclose(weighted[0], full[0], atol=1e-5)
    assert not torch.allclose(weighted[1], full[1], atol=1e-3)


def test_the_script_prints_the_differences(pipe, monkeypatch, capsys, tmp_path):
    words = "a frog", "a cat", "--steps", "2"
    text = printed("prompt_to_prompt", monkeypatch, capsys, tmp_path / "p2p.png", *words, pipe=pipe)
    assert "without control" in text
    assert read_picture(tmp_path / "p2p.png").width == 2 * pipe.config.image_size


@pytest.mark.slow
def test_control_keeps_more_of_the_picture_of_the_bundled_model(monkeypatch, capsys, tmp_path):
    words = printed("prompt_to_prompt", monkeypatch, capsys, tmp_path / "p2p.png").split()
    assert float(words[7]) < float(words[12])
