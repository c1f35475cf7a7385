"""Maps of words: they are attention weights, enlarged, and the sampling is that of the Pipeline."""

import pytest
import torch

import ldm
from ldm.pictures import read_picture
from scripts.recipes import daam
from tests.recipes.mains import printed

FROG = ldm.Request("a frog", steps=2, seed=3)


def test_the_latents_are_those_of_the_pipeline_and_the_maps_sum_to_one(pipe):
    latents, maps = daam.token_maps(pipe, FROG)
    *_, last = pipe.stream(FROG)
    assert torch.equal(latents, last.latents)
    assert maps.shape[2:] == latents.shape[2:]
    assert torch.allclose(maps.sum(dim=1), torch.ones(1, *latents.shape[2:]), atol=1e-5)


def test_without_differences_between_the_words_all_maps_are_equal(pipe, monkeypatch):
    conditions = pipe.conditions(pipe.plan(FROG))
    equal = [c.map(lambda t: t[:, :1].expand_as(t)) for c in conditions]
    monkeypatch.setattr(pipe, "conditions", lambda plan: equal)
    _, maps = daam.token_maps(pipe, FROG)
    assert torch.allclose(maps, torch.full_like(maps, 1 / maps.shape[1]), atol=1e-5)


def test_a_word_is_found_behind_the_begin_token(pipe):
    encode = pipe.text_encoder.tokenizers[0].encode
    first = 1 + len(encode("a frog left of a"))
    assert daam.positions(pipe, "a frog left of a car", "car") == list(range(first, first + len(encode("car"))))
    with pytest.raises(ValueError, match="the word must be in the prompt, got 'cat'"):
        daam.positions(pipe, "a frog", "cat")


def test_an_overlay_keeps_the_brightest_place_and_darkens_the_rest():
    heat = torch.zeros(1, 4, 4)
    heat[:, :, :2] = 1
    shown = daam.overlay(torch.ones(1, 3, 4, 4), heat)
    assert torch.allclose(shown[..., 0], torch.ones(()), atol=1e-5)
    assert torch.allclose(shown[..., -1], torch.tensor(-0.6), atol=1e-5)


def test_the_script_shows_the_maps_and_prints_their_share(pipe, monkeypatch, capsys, tmp_path):
    words = "a frog and a car", "frog", "car", "--steps", "2"
    text = printed("daam", monkeypatch, capsys, tmp_path / "daam.png", *words, pipe=pipe)
    assert "% of the words' maps lie" in text
    assert read_picture(tmp_path / "daam.png").width == 2 * pipe.config.image_size


@pytest.mark.slow
def test_the_bundled_model_attends_to_the_words_where_their_objects_are(monkeypatch, capsys, tmp_path):
    text = printed("daam", monkeypatch, capsys, tmp_path / "daam.png")
    assert float(text.split()[0]) > 55
