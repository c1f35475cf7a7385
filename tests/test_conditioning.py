"""Conditions: texts and sizes as the UNet's inputs."""

import dataclasses

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from ldm.conditioning import Condition, condition, join
from tests.tiny import TINY_RANDOM, TINY_REFINER, TINY_SDXL, random_networks

SIZES = (768.0, 1024.0, 16.0, 8.0, 512.0, 640.0)


@pytest.fixture(scope="module")
def sdxl():
    return random_networks(TINY_SDXL)[2]


def test_the_vector_of_sdxl_is_the_pooled_text_and_the_sizes_as_diffusers_embeds_them(sdxl):
    other = tuple(2 * size for size in SIZES)
    made = condition(sdxl, ["a frog", "bad"], [SIZES, other])
    encoded = sdxl.encode(["a frog", "bad"])
    assert torch.equal(made.context, encoded.context)
    assert made.vector.shape == (2, TINY_SDXL.unet.vector_dim)
    assert torch.equal(made.vector[:, :24], encoded.vector)
    for row, sizes in zip(made.vector, (SIZES, other), strict=True):
        expected = get_timestep_embedding(torch.tensor(sizes), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
        assert torch.allclose(row[24:], expected.flatten(), rtol=0, atol=1e-4)  # fp32 angles of up to 2000
    assert made.guidance is None


def test_zeros_stand_for_a_text_that_is_left_out_and_its_sizes_stay(sdxl):
    made = condition(sdxl, [None, "a frog", None], [SIZES] * 3)
    for row in (0, 2):
        assert not made.context[row].any()
        assert not made.vector[row, :24].any()
        assert torch.equal(made.vector[row, 24:], made.vector[1, 24:])
    whole = condition(sdxl, ["a frog"], [SIZES])
    assert torch.allclose(made.context[1], whole.context[0], atol=1e-5)  # another batch may sum in another order
    assert torch.allclose(made.vector[1], whole.vector[0], atol=1e-5)
    assert condition(sdxl, [""], [SIZES]).context.any()


def test_sizes_without_a_pooled_output_are_refused():
    text_encoder = random_networks(TINY_RANDOM)[2]
    assert condition(text_encoder, ["a frog"]).vector is None
    with pytest.raises(ValueError, match="sizes need a text encoder with a pooled output"):
        condition(text_encoder, ["a frog"], [SIZES])


def test_the_layer_of_clip_skip_is_the_encoders():
    text_encoder = random_networks(TINY_REFINER)[2]
    made = condition(text_encoder, ["a frog"], clip_skip=1)
    assert torch.equal(made.context, text_encoder.encode(["a frog"], 1).context)
    assert not torch.equal(made.context, condition(text_encoder, ["a frog"]).context)


def test_rows_that_are_joined_are_the_rows():
    whole = Condition(torch.randn(3, 5, 4), torch.randn(3, 6), torch.randn(3))
    rows = whole.rows()
    assert [row.context.shape for row in rows] == [(1, 5, 4)] * 3
    for again in (join(rows), join([join(rows[:1]), join(rows[1:])])):
        for field in dataclasses.fields(Condition):
            ours, theirs = getattr(again, field.name), getattr(whole, field.name)
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Condition(torch.zeros(1, 9, 4), torch.zeros(1, 6)), r"context of one shape, got \[\(5, 4\), \(9, 4\)\]"),
        (Condition(torch.zeros(1, 5, 4), torch.zeros(1, 7)), r"vector of one shape, got \[\(6,\), \(7,\)\]"),
        (Condition(torch.zeros(1, 5, 4)), r"vector of one shape, got \[\(6,\), None\]"),
    ],
)
def test_conditions_that_one_batch_cannot_hold_are_refused(other, message):
    with pytest.raises(ValueError, match=message + "; use batched=False"):
        join([Condition(torch.zeros(1, 5, 4), torch.zeros(1, 6)), other])
