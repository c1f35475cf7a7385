r"""Prompt syntax: weights against the published formulas, chunks, and A1111's documented examples."""

import copy

import numpy as np
import pytest
import torch

from ldm.models.tokens import Tokenizer
from ldm.prompts import Emphasized, chunks, interpolate, parse, restore_mean
from tests.tiny import TINY_RANDOM, TINY_SDXL, random_networks

COMMA, CAT = 267, 2368  # ids of ",</w>" and "cat</w>"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.official()


@pytest.fixture(scope="module")
def encoder():
    return random_networks(TINY_RANDOM)[2].requires_grad_(False)


@pytest.fixture(scope="module")
def sdxl_encoder():
    return random_networks(TINY_SDXL)[2].requires_grad_(False)


def close(got, expected, most=1e-5):
    """Whether two tensors of numbers around 1 are equal up to the order of summation."""
    return got.shape == expected.shape and float((got - expected).abs().max()) <= most


# ------------------------------------------------------------------ the parser


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [  # the examples in A1111's documentation of its parser
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.3 * 1.1 * 1.1),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.1**4),
                (".", 1.1),
            ],
        ),
        # and others
        ("", []),
        ("()a", [("a", 1.0)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("[[a]] b", [("a", 1 / 1.1**2), (" b", 1.0)]),
        ("(a: 1.5 )", [("a", 1.5)]),
        ("(a:-0.5)(b:+.5)", [("a", -0.5), ("b", 0.5)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:b:2)", [("a:b", 2.0)]),
        ("a:1.5)", [("a:1.5)", 1.0)]),  # no bracket is open
        ("a) b]", [("a) b]", 1.0)]),
        ("([a)", [("a", 1.0)]),
        ("([a)b]", [("a", 1.0), ("b", 1 / 1.1)]),  # crossed
        (r"\\(a\)", [("\\", 1.0), ("a)", 1.1)]),
        (r"\a", [("a", 1.0)]),
    ],
)
def test_the_weights_of_a_prompt_are_those_of_a1111(prompt, expected):
    (section,) = parse(prompt)
    assert [text for text, _ in section] == [text for text, _ in expected]
    assert [weight for _, weight in section] == pytest.approx([weight for _, weight in expected], rel=1e-12)


@pytest.mark.parametrize(
    ("prompt", "sections"),
    [
        ("a BREAK b", [[("a", 1.0)], [("b", 1.0)]]),
        ("a\nBREAK\nb", [[("a", 1.0)], [("b", 1.0)]]),
        ("a BREAK BREAK b", [[("a", 1.0)], [], [("b", 1.0)]]),
        ("a BREAKFAST break", [[("a BREAKFAST break", 1.0)]]),
        ("x (a BREAK b) c", [[("x ", 1.0), ("a", 1.1)], [("b", 1.1), (" c", 1.0)]]),
    ],
)
def test_break_begins_a_section_also_in_brackets(prompt, sections):
    assert parse(prompt) == sections


@pytest.mark.parametrize("weight", ["1.2.3", ".", "9" * 400])
def test_a_weight_that_is_no_number_is_refused(weight):
    with pytest.raises(ValueError, match=r"the weight of a word must be a finite number such as \(word:1.2\), got "):
        parse(f"a (cat:{weight})")


# ------------------------------------------------------------------ chunks


def lengths(prompt, tokenizer):
    return [len(chunk) for chunk in chunks(prompt, tokenizer, 75)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [0]),
        ("cat " * 75, [75]),
        ("cat " * 76, [75, 1]),
        ("cat " * 150, [75, 75]),
        ("cat " * 75 + "BREAK dog", [75, 1]),
        ("cat BREAK dog", [1, 1]),
        ("cat BREAK", [1]),  # nothing follows
        ("BREAK cat", [0, 1]),
        ("cat BREAK BREAK dog", [1, 0, 1]),
        ("cat " * 70 + ", " + "cat " * 10, [71, 10]),  # the comma ends the chunk
        ("cat " * 74 + ", " + "cat " * 10, [75, 10]),
        ("cat " * 55 + ", " + "cat " * 30, [56, 30]),  # the comma is among the last 20 tokens
        ("cat " * 54 + ", " + "cat " * 30, [75, 10]),  # the comma is too early
        ("cat " * 60 + ", " + "cat " * 5 + ", " + "cat " * 30, [67, 30]),  # the last comma counts
        ("cat " * 70 + ", " + "cat " * 4 + ", " + "cat " * 3, [75, 4]),  # the next token is a comma
        ("cat " * 60 + ", " + "cat " * 14, [75]),  # nothing is left over
    ],
)
def test_a_chunk_has_75_tokens_or_ends_after_a_comma_among_its_last_20(prompt, expected, tokenizer):
    assert lengths(prompt, tokenizer) == expected


def test_each_token_keeps_its_weight_and_its_place(tokenizer):
    first, second = chunks("(cat, " * 1 + "cat " * 80 + ":1.5) [dog]", tokenizer, 75)
    assert first == [(CAT, 1.5), (COMMA, 1.5), *[(CAT, 1.5)] * 73]
    assert second[:7] == [(CAT, 1.5)] * 7
    assert second[7:] == [(tokenizer.encode("dog")[0], 1 / 1.1)]


def test_a_word_whose_pieces_have_one_weight_has_the_tokens_of_the_word(tokenizer):
    assert chunks(r"(astro)(naut)", tokenizer, 75) == chunks("(astronaut)", tokenizer, 75)
    assert chunks(r"on \(mars\)!", tokenizer, 75) == [[(i, 1.0) for i in tokenizer.encode("on (mars)!")]]


# ------------------------------------------------------------------ the weights' maths


def states():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64) + 0.3
    weights = torch.tensor([[1.0, 1.3, 0.5, 1.0, 1.0], [1.0, -1.0, 2.0, 1.1, 1.0]], dtype=torch.float64)
    return z, weights, torch.randn(5, 6, generator=generator, dtype=torch.float64)


def test_restore_mean_is_the_product_with_the_mean_of_the_chunk_as_before():
    z, weights, empty = states()
    got = restore_mean(z, weights, empty).numpy()
    for chunk, weight, result in zip(z.numpy(), weights.numpy(), got, strict=True):
        product = np.stack([w * vector for w, vector in zip(weight, chunk, strict=True)])
        np.testing.assert_allclose(result, product * chunk.mean() / product.mean(), rtol=1e-12)
        assert result.mean() == pytest.approx(chunk.mean())


def test_interpolate_is_a_line_through_the_states_of_the_empty_prompt():
    z, weights, empty = states()
    got = interpolate(z, weights, empty).numpy()
    for k, i, j in np.ndindex(got.shape):
        w = float(weights[k, i])
        assert got[k, i, j] == pytest.approx((1 - w) * float(empty[i, j]) + w * float(z[k, i, j]), rel=1e-12, abs=1e-12)


# ------------------------------------------------------------------ the encoder


@pytest.mark.parametrize("weighting", ["a1111", "interpolate"])
@pytest.mark.parametrize("clip_skip", [None, 1, 2])
def test_short_prompts_without_syntax_have_the_plain_states_bit_for_bit(weighting, clip_skip, encoder, sdxl_encoder):
    texts = ["a cat", "", "a dog on mars"]
    for each in (encoder, sdxl_encoder):
        got, expected = Emphasized(each, weighting).encode(texts, clip_skip), each.encode(texts, clip_skip)
        assert torch.equal(got.context, expected.context)
        assert (got.vector is None) == (expected.vector is None)
        assert got.vector is None or torch.equal(got.vector, expected.vector)


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_weights_change_the_states_of_each_tower_alone_and_not_the_pooled_text(clip_skip, sdxl_encoder):
    plain = sdxl_encoder.encode(["a red cat"], clip_skip)
    weights = np.ones(32)
    weights[2:5] = 1.5  # after the begin token and "a"; a token per letter
    by_tower = np.split(plain.context[0].double().numpy(), [16], axis=1)
    product = [weights[:, None] * z for z in by_tower]
    expected = np.hstack([p * z.mean() / p.mean() for p, z in zip(product, by_tower, strict=True)])
    got = Emphasized(sdxl_encoder, "a1111").encode(["a (red:1.5) cat"], clip_skip)
    assert close(got.context[0], torch.from_numpy(expected).float())
    assert torch.equal(got.vector, plain.vector)

    empty = sdxl_encoder.encode([""], clip_skip).context[0].double().numpy()
    z = plain.context[0].double().numpy()
    got = Emphasized(sdxl_encoder, "interpolate").encode(["a (red:1.5) cat"], clip_skip)
    assert close(got.context[0], torch.from_numpy(empty + weights[:, None] * (z - empty)).float())
    assert torch.equal(got.vector, plain.vector)


def test_the_weights_of_one_text_leave_the_other_texts_alone(encoder):
    alone = encoder.encode(["a cat", "a dog"]).context
    both = Emphasized(encoder, "a1111").encode(["a cat", "a (dog:1.4)"]).context
    assert torch.equal(both[0], alone[0])
    assert not torch.equal(both[1], alone[1])


def test_chunks_stand_one_after_another_and_all_texts_get_as_many(sdxl_encoder):
    long = "aaaaa " * 6  # 30 tokens, and the tower reads 30
    got = Emphasized(sdxl_encoder, "a1111").encode([long + "bbb", "", "cat BREAK dog BREAK bird"])
    parts = [[long, "bbb", ""], ["", "", ""], ["cat", "dog", "bird"]]
    assert got.context.shape == (3, 3 * 32, 32)
    for row, texts in zip(got.context, parts, strict=True):
        expected = torch.cat([sdxl_encoder.encode([text]).context[0] for text in texts])
        assert close(row, expected)
    assert got.vector.shape == (3, 24)  # of the first chunk
    assert close(got.vector[2:], sdxl_encoder.encode(["cat"]).vector)
    assert close(got.vector[1:2], sdxl_encoder.encode([""]).vector)


def test_each_tower_pads_its_chunks_with_its_own_id(sdxl_encoder, monkeypatch):
    seen = []
    for tower in sdxl_encoder.towers:
        forward = tower.forward
        monkeypatch.setattr(tower, "forward", lambda ids, skip, f=forward: seen.append(ids.tolist()) or f(ids, skip))
    Emphasized(sdxl_encoder, "a1111").encode(["a BREAK (b:1.2)"])
    a, b = (sdxl_encoder.tokenizers[0].encode(letter) for letter in "ab")
    for pad, (rows, empty) in zip((513, 0), (seen[:2], seen[2:]), strict=True):
        assert rows == [[512, *ids, 513] + [pad] * 29 for ids in (a, b)]
        assert empty == [[512, 513] + [pad] * 30]


def test_half_precision_is_weighted_in_fp32(encoder):
    half = copy.deepcopy(encoder).bfloat16()
    plain = half.encode(["a red cat"]).context
    weights = torch.ones(1, 32)
    weights[0, 2:5] = 1.5
    expected = restore_mean(plain.float(), weights, plain[0]).bfloat16()
    assert torch.equal(Emphasized(half, "a1111").encode(["a (red:1.5) cat"]).context, expected)
    assert not torch.equal(restore_mean(plain, weights.bfloat16(), plain[0]), expected)
