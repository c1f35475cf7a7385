"""SDXL's base model and refiner: one list of noise levels, cut in two."""

import dataclasses

import numpy as np
import pytest
import torch

from ldm.pipeline import Pipeline
from ldm.refiner import plan_both, refine, stream_both
from ldm.request import Request, Sizes, Source
from tests.test_image_to_image import PICTURE
from tests.tiny import TINY_REFINER, TINY_SDXL, random_networks

FROG = Request("a frog", steps=10, seed=2)


@pytest.fixture(scope="module")
def base() -> Pipeline:
    return Pipeline(TINY_SDXL, *random_networks(TINY_SDXL))


@pytest.fixture(scope="module")
def refiner() -> Pipeline:
    return Pipeline(TINY_REFINER, *random_networks(TINY_REFINER))


@pytest.mark.parametrize(("handover", "cut"), [(0.8, 8), (0.5, 5), (0.85, 8), (0.95, 9)])
def test_the_two_run_exactly_the_steps_of_one_list(base, refiner, handover, cut):
    whole = base.plan(FROG).sigmas
    first, second = plan_both(base, refiner, FROG, handover=handover)
    assert torch.equal(first.sigmas, whole[: cut + 1])
    assert torch.equal(second.sigmas, whole[cut:])
    assert base.schedule.timestep(whole[cut - 1]) >= round(1000 * (1 - handover)) > base.schedule.timestep(whole[cut])
    steps = list(stream_both(base, refiner, FROG, handover=handover))
    assert [step.index for step in steps] == list(range(10))
    assert {step.total for step in steps} == {10}
    assert [step.sigma for step in steps] == whole[1:].tolist()
    assert np.array_equal(refine(base, refiner, FROG, handover=handover)[0], refiner.decode(steps[-1].latents)[0])


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
@pytest.mark.parametrize("source", [None, Source(PICTURE, strength=0.9)], ids=["noise", "picture"])
def test_an_own_loop_over_both_makes_the_same_pictures(base, refiner, sampler, source):
    request = dataclasses.replace(FROG, images=2, sampler=sampler, source=source)
    first, second = plan_both(base, refiner, request, handover=0.8)
    noise, x = first.noise(), base.start(first)
    for pipe, plan in ((base, first), (refiner, second)):
        for step in pipe.walk(plan, pipe.denoiser(plan, pipe.conditions(plan)), x, noise=noise):
            x = step.x
    expected = refine(base, refiner, request)
    assert len(expected) == 2
    assert all(map(np.array_equal, refiner.decode(step.latents), expected))


def test_each_is_told_the_sizes_and_scores_that_it_has(base, refiner):
    sizes = Sizes(crop_top=5, target_width=99, aesthetic_score=7.0, negative_aesthetic_score=1.0)
    first, second = plan_both(base, refiner, dataclasses.replace(FROG, sizes=sizes, width=36), handover=0.8)
    assert first.scalars == ((32, 36, 5, 0, 32, 99),) * 2
    assert second.scalars == ((32, 36, 5, 0, 7.0), (32, 36, 5, 0, 1.0))


def test_the_refiner_takes_the_steps_and_the_size_of_the_base_model(base, refiner):
    config = dataclasses.replace(refiner.config, steps=7, sampler="ddim", image_size=64)
    other = Pipeline(config, refiner.unet, refiner.vae, refiner.text_encoder)
    first, second = plan_both(base, other, Request("a frog"), handover=0.8)
    for name in ("steps", "sampler", "spacing", "width", "height", "latent_shape"):
        assert getattr(first, name) == getattr(second, name)


@pytest.mark.parametrize(
    ("steps", "handover", "message"),
    [
        (10, 0.0, "handover must lie between 0 and 1, got 0.0"),
        (10, 1.0, "handover must lie between 0 and 1, got 1.0"),
        (10, 0.01, "handover 0.01 of 10 steps leaves no step for the base model"),
        (10, 0.9999, "handover 0.9999 of 10 steps leaves no step for the refiner"),
        (1, 0.8, "handover 0.8 of 1 steps leaves no step for the refiner"),
    ],
)
def test_a_handover_that_leaves_one_of_them_without_steps_is_refused(base, refiner, steps, handover, message):
    with pytest.raises(ValueError, match=message):
        stream_both(base, refiner, dataclasses.replace(FROG, steps=steps), handover=handover)


def test_models_that_do_not_fit_together_are_refused(base, refiner):
    diffusion = dataclasses.replace(refiner.config.diffusion, beta_end=0.02)
    noisier = dataclasses.replace(refiner.config, name="noisier", diffusion=diffusion)
    with pytest.raises(ValueError, match="random-sdxl and noisier have different noise schedules"):
        refine(base, Pipeline(noisier, refiner.unet, refiner.vae, refiner.text_encoder), FROG)
    vae = dataclasses.replace(refiner.config.vae, scaling_factor=0.1)
    scaled = dataclasses.replace(refiner.config, name="scaled", vae=vae)
    with pytest.raises(ValueError, match="random-sdxl and scaled have different latents"):
        refine(base, Pipeline(scaled, refiner.unet, refiner.vae, refiner.text_encoder), FROG)


def test_only_one_of_the_two_unets_is_at_work_at_a_time(base, refiner, monkeypatch):
    at_work = []

    class Noted:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            at_work.append(self.name)

        def __exit__(self, *_):
            at_work.remove(self.name)

    for name, pipe in (("base", base), ("refiner", refiner)):
        monkeypatch.setattr(pipe, "at_work", lambda network, name=name: Noted(f"{name} {network}"))
    seen = []
    for _ in stream_both(base, refiner, FROG):
        assert len({word.split()[0] for word in at_work}) == 1
        seen.append(at_work[0])
    assert seen == ["base unet"] * 8 + ["refiner unet"] * 2
    assert not at_work
