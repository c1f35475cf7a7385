"""Null-text optimization finds contexts that bring guided sampling onto a path that another context made."""

import re

import pytest
import torch

import ldm
from scripts.recipes.null_text import guided_step, null_text
from tests.recipes.mains import printed


def sampled(pipe, plan, prompt, empty, contexts, x, sigmas):
    path = [x]
    for i, context in enumerate(contexts):
        path.append(guided_step(pipe, plan, prompt, empty, context, path[-1], sigmas[i : i + 2]))
    return path


def test_the_optimized_contexts_bring_the_sampling_to_a_path_that_another_context_made(pipe):
    plan = pipe.plan(ldm.Request("a frog", guidance_scale=3, seed=1))
    prompt, empty = pipe.conditions(plan)
    sigmas = pipe.schedule.steps(4, "exponential")[:-1]
    with torch.no_grad():
        x = plan.noise()() * float(sigmas[0])
        other = pipe.conditions(pipe.plan(ldm.Request("a cat, a house", "zebra", guidance_scale=3)))[1].context
        path = sampled(pipe, plan, prompt, empty, [other] * 3, x, sigmas)
        contexts = null_text(pipe, plan, path, sigmas, iterations=10, rate=0.04)
        before = sampled(pipe, plan, prompt, empty, [empty.context] * 3, x, sigmas)
        after = sampled(pipe, plan, prompt, empty, contexts, x, sigmas)
    assert [context.shape for context in contexts] == [empty.context.shape] * 3
    assert not any(context.requires_grad for context in contexts)
    assert (after[-1] - path[-1]).norm() < 0.5 * (before[-1] - path[-1]).norm()
    assert torch.equal(pipe.conditions(plan)[1].context, empty.context)


def errors(text):
    found = re.fullmatch(r"\d+ steps: relative error ([\d.]+) with the empty prompt, ([\d.]+) with null-text\n", text)
    return [float(number) for number in found.groups()]


def test_the_command_prints_both_errors_and_makes_a_picture(pipe, tmp_path, monkeypatch, capsys):
    words = "--steps", "2", "--iterations", "3"
    before, after = errors(printed("null_text", monkeypatch, capsys, tmp_path / "out.png", *words, pipe=pipe))
    assert after < before


@pytest.mark.slow
def test_null_text_halves_the_error_on_the_bundled_model(tmp_path, monkeypatch, capsys):
    before, after = errors(printed("null_text", monkeypatch, capsys, tmp_path / "out.png"))
    assert after < before / 2
