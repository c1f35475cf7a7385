"""Image to image: the steps that run, the noise that the picture gets, and the latents of pictures."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.images import to_pil, to_tensor
from ldm.request import Request
from ldm.source import Source

_GRADIENT = Image.linear_gradient("L").resize((32, 32))
PICTURE = Image.merge("RGB", (_GRADIENT, _GRADIENT.rotate(90), _GRADIENT.rotate(180)))
FROG = Request("a frog", steps=20, seed=3, source=Source(PICTURE, strength=0.6))


def with_source(request=FROG, picture=PICTURE, **changes):
    return dataclasses.replace(request, source=Source(picture, **changes))


@pytest.mark.parametrize("sampler", ["euler", "ddim", "lcm"])
@pytest.mark.parametrize(("steps", "strength", "run"), [(20, 0.6, 12), (20, 1.0, 20), (10, 0.3, 3), (100, 0.29, 28)])
def test_the_last_part_of_the_steps_runs_as_in_diffusers(pipe, sampler, steps, strength, run):
    request = dataclasses.replace(with_source(strength=strength), steps=steps, sampler=sampler)
    whole = pipe.plan(dataclasses.replace(request, source=None)).sigmas
    plan = pipe.plan(request)
    assert torch.equal(plan.sigmas, whole[steps - run :])
    assert plan.steps == steps
    *_, last = pipe.stream(request)
    assert (last.index, last.total) == (run - 1, run)


def test_exact_steps_run_all_from_the_level_of_the_strength(pipe):
    plan, exact = (pipe.plan(with_source(strength=0.6, exact_steps=exact)) for exact in (False, True))
    assert len(exact.sigmas) == 21
    assert exact.sigmas[0] == plan.sigmas[0]
    assert len(list(pipe.stream(exact.request))) == 20


def test_a_start_level_is_where_all_steps_start(pipe):
    for level in (0.05, 1.234, float(pipe.schedule.sigmas[-1])):
        plan = pipe.plan(with_source(start_sigma=level))
        assert plan.sigmas[0] == level
        assert len(plan.sigmas) == 21
    for level in (0.0, 20.0):
        with pytest.raises(ValueError, match=rf"start level must lie in 0\.0413 \.\. 14\.6146, got {level}"):
            pipe.plan(with_source(start_sigma=level))


def test_a_strength_that_runs_no_step_is_refused(pipe):
    for exact in (False, True):
        with pytest.raises(ValueError, match=r"strength 0\.04 of 20 steps runs no step: raise one .*start_sigma"):
            pipe.plan(with_source(strength=0.04, exact_steps=exact))


def test_the_start_is_a_sample_of_the_encoded_picture_and_noise_drawn_after_it(pipe):
    request = dataclasses.replace(FROG, images=2)
    plan = pipe.plan(request)
    x = pipe.start(plan)
    mean, std = pipe.vae.encode(to_tensor(PICTURE))
    for i, seed in enumerate(request.seeds):
        generator = torch.Generator().manual_seed(seed)
        posterior, noise, after = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(3))
        expected = mean + std * posterior + float(plan.sigmas[0]) * noise
        assert torch.allclose(x[i : i + 1], expected, rtol=0, atol=1e-5)  # fp32
        assert torch.equal(plan.noise()()[i : i + 1], after)


def test_more_strength_leads_further_away_from_the_picture(pipe):
    latents = pipe.encode_image(PICTURE)
    away = []
    for level in (0.05, 0.5, 3.0):
        *_, last = pipe.stream(with_source(start_sigma=level))
        away.append(float((last.latents - latents).square().mean().sqrt()))
    assert away == sorted(away)
    assert away[2] > 3 * away[0]


def test_a_file_and_a_picture_of_another_size_become_the_size_that_is_asked_for(pipe, tmp_path):
    large = PICTURE.resize((96, 64))
    large.save(tmp_path / "large.png")
    (own,) = pipe.generate(dataclasses.replace(with_source(picture=large), steps=3))
    assert own.size == (40, 28)  # the model's area of 32 x 32 at 3 to 2, in multiples of 4
    (asked,) = pipe.generate(dataclasses.replace(with_source(picture=large), steps=3, width=24, height=32))
    assert asked.size == (24, 32)
    (of_file,) = pipe.generate(dataclasses.replace(with_source(picture=tmp_path / "large.png"), steps=3))
    assert np.array_equal(of_file, own)
    plans = [pipe.plan(with_source(picture=large, resize=resize)) for resize in ("crop", "stretch")]
    assert not torch.equal(*map(pipe.start, plans))
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        pipe.plan(with_source(picture="nowhere.png"))


def test_the_picture_decides_the_result(pipe):
    (first,) = pipe.generate(FROG)
    (other,) = pipe.generate(with_source(picture=PICTURE.rotate(90), strength=0.6))
    assert not np.array_equal(first, other)


def test_an_encoded_image_is_the_mode_of_its_distribution_or_a_sample(pipe):
    images = torch.cat([to_tensor(PICTURE), to_tensor(PICTURE.rotate(90))])
    mean, std = pipe.vae.encode(images)
    assert torch.equal(pipe.encode_image(images), mean)
    assert torch.equal(pipe.encode_image(PICTURE), pipe.encode_image(images[:1]))
    noise = torch.randn(2, 4, 8, 8)
    assert torch.equal(pipe.encode_image(images, noise), mean + std * noise)
    assert to_pil(to_tensor(PICTURE))[0] == PICTURE
    with pytest.raises(ValueError, match="multiple"):
        pipe.encode_image(images[..., :30])


def test_an_encoded_image_carries_gradients_to_the_image(pipe):
    images = to_tensor(PICTURE).requires_grad_()
    pipe.encode_image(images).square().mean().backward()
    assert images.grad.any()
