"""Prompts that change during sampling: what they say in each step, and the denoiser that follows them."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import ldm
from ldm.diffusion.denoiser import within
from ldm.phases import at_step
from ldm.refiner import plan_both
from ldm.request import Request
from tests.tiny import TINY_RANDOM, TINY_REFINER, TINY_SDXL, random_networks


@pytest.fixture(scope="module")
def fresh():
    return ldm.Pipeline(TINY_RANDOM, *random_networks())


def said(prompt, steps=10):
    """What the prompt says in each run of steps, with the steps after which each run ends, as A1111 writes it."""
    texts, step = [], 0
    while step < steps:
        text, step = at_step(prompt, step, steps)
        texts.append([step, text])
    return texts


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [  # the examples in A1111's documentation of its parser, with 10 steps
        ("test", [[10, "test"]]),
        ("a [b:3]", [[3, "a "], [10, "a b"]]),
        ("a [b: 3]", [[3, "a "], [10, "a b"]]),
        ("a [[[b]]:2]", [[2, "a "], [10, "a [[b]]"]]),
        ("[(a:2):3]", [[3, ""], [10, "(a:2)"]]),
        ("a [b : c : 1] d", [[1, "a b  d"], [10, "a  c  d"]]),
        ("a[b:[c:d:2]:1]e", [[1, "abe"], [2, "ace"], [10, "ade"]]),
        ("a [unbalanced", [[10, "a [unbalanced"]]),
        ("a [b:.5] c", [[5, "a  c"], [10, "a b c"]]),
        ("((a][:b:c [d:3]", [[3, "((a][:b:c "], [10, "((a][:b:c d"]]),
        # and others
        ("[a:b:0.25]", [[2, "a"], [10, "b"]]),  # rounded down
        ("[a::7]", [[7, "a"], [10, ""]]),
        ("[a:b:0]", [[10, "b"]]),
        ("[a:b:1.0]", [[10, "a"]]),
        ("[a:b:1]", [[1, "a"], [10, "b"]]),
        ("[a:b:99]", [[10, "a"]]),
        ("[a:b:4] and [c:d:0.6]", [[4, "a and c"], [6, "b and c"], [10, "b and d"]]),
        ("(x [a:b:4]:1.2)", [[4, "(x a:1.2)"], [10, "(x b:1.2)"]]),
        ("[a]", [[10, "[a]"]]),
        ("[a:b]", [[10, "[a:b]"]]),
        ("[a:b:c:3]", [[10, "[a:b:c:3]"]]),
        (r"\[a:b:3\]", [[10, r"\[a:b:3\]"]]),
        (r"[a\:x:b:3]", [[3, r"a\:x"], [10, "b"]]),
        ("[a [b:c:3]", [[3, "[a b"], [10, "[a c"]]),
    ],
)
def test_a_prompt_says_in_each_step_what_it_says_in_a1111(prompt, expected):
    assert said(prompt) == expected


@pytest.mark.parametrize("prompt", ["a [b|c] d", "[x:[b|c]:0]"])
def test_an_alternation_is_refused(prompt):
    with pytest.raises(ValueError, match=r"'\[b\|c\]' would alternate between its words in every step"):
        Request(prompt, emphasis="a1111")
    assert at_step(r"a \| b", 0, 5)[0] == r"a \| b"


# ------------------------------------------------------------------ plans


def test_a_plan_has_each_text_once_and_the_levels_where_the_texts_change():
    request = Request("[a:b:4] cat", "[bad:worse:0.6]", steps=10, emphasis="a1111", images=2)
    plan = request.resolved(TINY_RANDOM)
    assert plan.texts == ("a cat", "bad", "b cat", "worse")
    assert plan.which == ((0, 0), (1, 1), (2, 2), (1, 1), (2, 2), (3, 3))
    assert plan.changes == (float(plan.sigmas[4]), float(plan.sigmas[6]))


def test_without_emphasis_the_prompt_is_text():
    plan = Request("[a:b:4] (cat:1.2) BREAK", steps=10).resolved(TINY_RANDOM)
    assert (plan.texts, plan.changes) == (("[a:b:4] (cat:1.2) BREAK", ""), ())


def test_scores_follow_the_texts_of_their_kind():
    plan = Request("[a:b:4]", steps=10, emphasis="a1111").resolved(TINY_REFINER)
    assert plan.texts == ("a", "", "b")
    assert [row[-1] for row in plan.scalars] == [6.0, 2.5, 6.0]
    zeros = Request("[a:b:4]", steps=10, emphasis="a1111").resolved(TINY_SDXL)
    assert zeros.texts == ("a", None, "b")
    assert zeros.which == ((0,), (1,), (2,), (1,))


def test_base_and_refiner_change_at_one_level():
    pipes = [ldm.Pipeline(config, *random_networks(config)) for config in (TINY_SDXL, TINY_REFINER)]
    request = Request("[a:b:2]", steps=5, emphasis="a1111", spacing="leading")
    whole = request.resolved(TINY_SDXL)
    base, refiner = plan_both(*pipes, request, handover=0.8)
    assert base.changes == refiner.changes == (float(whole.sigmas[2]),)
    assert len(ldm.refine(*pipes, request)) == 1


# ------------------------------------------------------------------ pictures


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_the_prompt_before_the_change_is_read_above_the_level_and_the_other_below(sampler, fresh):
    plain = Request("a cat", "bad", steps=4, sampler=sampler, seed=3)
    request = dataclasses.replace(plain, prompt="a [cat:dog:2]", emphasis="a1111")
    *_, last = fresh.stream(request)
    plan = fresh.plan(plain)
    before, after = (
        fresh.denoiser(plan, fresh.conditions(dataclasses.replace(plan, texts=(text, "bad"))))
        for text in ("a cat", "a dog")
    )
    denoise = within((float(plan.sigmas[2]), math.inf), before, after)
    with torch.no_grad():
        *_, expected = fresh.walk(plan, denoise, fresh.start(plan))
    # The texts are encoded in another batch, where sums may have another order.
    assert float((last.latents - expected.latents).abs().max()) < 1e-4
    *_, other = fresh.stream(plain)
    assert float((last.latents - other.latents).abs().max()) > 1e-2


def test_a_prompt_that_changes_from_the_start_or_never_is_the_plain_prompt(fresh):
    plain = Request("a cat", steps=4)
    expected = fresh.generate(plain)[0]
    for prompt in ("a [dog:cat:0]", "a [cat:dog:4]", "a [cat:dog:1.0]"):
        made = fresh.generate(dataclasses.replace(plain, prompt=prompt, emphasis="a1111"))[0]
        assert np.array_equal(made, expected)


def test_from_a_picture_the_steps_that_run_are_counted(fresh):
    from PIL import Image

    source = ldm.Source(Image.linear_gradient("L").resize((32, 32)), strength=0.5)
    plan = Request("[a:b:0.4]", steps=10, source=source, emphasis="a1111").resolved(TINY_RANDOM)
    assert len(plan.sigmas) == 6
    assert plan.changes == (float(plan.sigmas[2]),)
