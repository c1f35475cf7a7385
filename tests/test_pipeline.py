"""From a request to pictures: what is refused, what the seed decides, and what each option does."""

import dataclasses
import json
import math
import operator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from PIL import Image
from torch import nn

from ldm.checkpoint import files
from ldm.config import BASE_CONDITIONING
from ldm.diagnosis import not_finite
from ldm.diffusion.denoiser import classifier_free, guided
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import NoiseSchedule
from ldm.loading import load
from ldm.models.attention import math_attention
from ldm.pipeline import Pipeline
from ldm.placement.memory import Placement
from ldm.placement.packing import can_pack
from ldm.presets import SD15, SD21, SD_TURBO, SDXL_BASE, SDXL_REFINER
from ldm.record import ModelChoice, remember
from ldm.request import Request
from ldm.sizes import Sizes
from ldm.source import Source
from tests.sparse import sparse
from tests.tiny import TINY_REFINER, TINY_SDXL, random_networks

FROG = Request("a frog on the grass", steps=3)
needs_packing = pytest.mark.skipif(not can_pack(), reason="this torch is built without oneDNN")


@pytest.fixture(scope="module")
def sdxl() -> Pipeline:
    """A tiny random model with SDXL base's two towers and conditioning."""
    return Pipeline(TINY_SDXL, *random_networks(TINY_SDXL))


@pytest.fixture(scope="module")
def refiner() -> Pipeline:
    """A tiny random model with the SDXL refiner's tower and conditioning."""
    return Pipeline(TINY_REFINER, *random_networks(TINY_REFINER))


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"prompt": None}, "prompt must be text, got None"),
        ({"prompt": "\udcff"}, "prompt must be valid Unicode text"),
        ({"negative_prompt": 3}, "negative_prompt must be text, got 3"),
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, got 0"),
        ({"steps": 1001}, "steps must be a whole number from 1 to 1000, got 1001"),
        ({"steps": 2.5}, "steps must be a whole number from 1 to 1000, got 2.5"),
        ({"steps": True}, "steps must be a whole number from 1 to 1000, got True"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number, 0 or more"),
        ({"guidance_scale": math.inf}, "guidance_scale must be a finite number, 0 or more"),
        ({"guidance_scale": 10**400}, "guidance_scale must be a finite number, 0 or more"),
        ({"width": 2**64}, "width must be a whole number from 1 to 65536, got 18446744073709551616"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a finite number, 0 or more, got -1.0"),
        ({"guidance_rescale": 2}, "guidance_rescale must be a finite number from 0 to 1, got 2"),
        ({"guidance_interval": 1.0}, "guidance_interval must be 2 numbers, got 1"),
        ({"guidance_interval": (1, 2, 3)}, "guidance_interval must be 2 numbers, got \\(1, 2, 3\\)"),
        ({"guidance_interval": (2, 1)}, "two noise levels, 0 <= low < high, got 2.0 and 1.0"),
        ({"guidance_interval": (1, 1)}, "two noise levels, 0 <= low < high, got 1.0 and 1.0"),
        ({"guidance_interval": (-1, 1)}, "two noise levels, 0 <= low < high, got -1.0 and 1.0"),
        ({"guidance_interval": (1, math.inf)}, "guidance_interval must be a finite number.* got inf"),
        ({"guidance_interval": ("a", 1)}, "guidance_interval must be a finite number.* got 'a'"),
        ({"sampler": "plms"}, f"sampler must be one of {', '.join(SAMPLERS)}, got 'plms'"),
        ({"spacing": "even"}, "spacing must be one of leading, trailing, linspace, lcm, karras"),
        ({"width": 0}, "width must be a whole number from 1 to 65536, got 0"),
        ({"height": -8}, "height must be a whole number from 1 to 65536, got -8"),
        ({"seed": "7"}, "seed must be a whole number, got '7'"),
        ({"seed": 2**64}, "seeds must lie below 2\\^64"),
        ({"seed": 2**64 - 1, "images": 2}, "seeds must lie below 2\\^64"),
        ({"images": 0}, "images must be a whole number from 1 to 99999, got 0"),
        ({"clip_skip": 0}, "clip_skip must be a whole number, 1 or more, got 0"),
        ({"clip_skip": 1.0}, "clip_skip must be a whole number, 1 or more, got 1.0"),
        ({"sampler_options": 0.5}, "sampler_options must be a mapping such as {'eta': 0.5}, got 0.5"),
        ({"sampler_options": {"eta": "high"}}, "eta must be a finite number, got 'high'"),
        ({"sizes": (1024, 768)}, r"sizes must be an ldm\.Sizes, got \(1024, 768\)"),
        ({"source": "frog.png"}, r"source must be an ldm\.Source, got 'frog.png'"),
    ],
)
def test_a_request_that_no_model_can_follow_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        Request(**({"prompt": "a frog"} | choices))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"original_width": 0}, "original_width must be a whole number from 1 to 65536, got 0"),
        ({"original_height": 1.5}, "original_height must be a whole number from 1 to 65536, got 1.5"),
        ({"target_width": -1}, "target_width must be a whole number from 1 to 65536, got -1"),
        ({"target_height": "9"}, "target_height must be a whole number from 1 to 65536, got '9'"),
        ({"crop_top": -1}, "crop_top must be a whole number from 0 to 65536, got -1"),
        ({"crop_left": 0.5}, "crop_left must be a whole number from 0 to 65536, got 0.5"),
        ({"aesthetic_score": math.nan}, "aesthetic_score must be a finite number from 0"),
        ({"negative_aesthetic_score": -1}, "negative_aesthetic_score must be a finite number"),
    ],
)
def test_sizes_that_no_model_can_follow_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        Sizes(**choices)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"strength": 0.0}, "strength must be above 0 and at most 1, got 0.0"),
        ({"strength": 1.5}, "strength must be above 0 and at most 1, got 1.5"),
        ({"strength": math.nan}, "strength must be a finite number, got nan"),
        ({"exact_steps": 1}, "exact_steps must be True or False, got 1"),
        ({"start_sigma": "high"}, "start_sigma must be a finite number, got 'high'"),
        ({"resize": "fill"}, "resize must be one of crop, stretch, got 'fill'"),
    ],
)
def test_a_source_that_no_model_can_follow_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        Source("frog.png", **choices)


def test_a_negative_seed_becomes_a_random_one_that_the_request_remembers():
    seeds = {Request("a frog", seed=-1).seed for _ in range(8)}
    assert len(seeds) > 1
    assert all(seed >= 0 for seed in seeds)
    request = Request("a frog", seed=-1, images=3)
    assert request.seeds == [request.seed, request.seed + 1, request.seed + 2]
    assert dataclasses.replace(request, steps=1).seed == request.seed


def test_a_request_keeps_its_own_options_of_the_sampler_and_has_a_hash_with_a_picture_too():
    options = {"eta": 0.5}
    request = Request("a frog", sampler="ddim", sampler_options=options, source=Source(Image.new("RGB", (4, 4))))
    options["eta"] = 1.0
    assert request.sampler_options == {"eta": 0.5}
    assert request in {dataclasses.replace(request, seed=0)}


def test_what_a_request_leaves_open_is_the_models_own_choice():
    plan = Request("a frog").resolved(SD15)
    assert (plan.steps, plan.sampler, plan.spacing) == (25, "dpmpp_2m", "leading")
    assert (plan.guidance_scale, plan.texts) == (7.5, ("a frog", ""))
    assert (plan.width, plan.height, plan.latent_shape) == (512, 512, (4, 64, 64))
    assert torch.equal(plan.sigmas, NoiseSchedule().steps(25, "leading"))
    turbo = Request("a frog").resolved(SD_TURBO)
    assert (turbo.steps, turbo.sampler, turbo.spacing) == (4, "euler_ancestral", "trailing")
    assert (turbo.guidance_scale, turbo.texts) == (0.0, ("a frog",))
    chosen = Request("a frog", "bad", 2, 0.0, 0.5, sampler="ddim", spacing="karras", width=8, height=16)
    plan = chosen.resolved(SD15)
    assert plan.request is chosen
    assert (plan.steps, plan.sampler, plan.spacing) == (2, "ddim", "karras")
    assert (plan.guidance_scale, plan.texts) == (0.0, ("a frog",))
    assert (plan.width, plan.height, plan.latent_shape) == (8, 16, (4, 2, 1))
    assert torch.equal(plan.sigmas, NoiseSchedule().steps(2, "karras", final="first"))


@pytest.mark.parametrize("config", [SD15, SD_TURBO, SDXL_BASE, SDXL_REFINER], ids=lambda config: config.name)
def test_a_plan_leaves_nothing_open(config):
    plan = Request("a frog", "bad").resolved(config)
    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    assert not [name for name, value in values.items() if value is None]
    assert None not in [*plan.texts, *plan.sizes.values(), *(number for row in plan.scalars for number in row)]
    assert len(plan.scalars) == (len(plan.texts) if config.micro_conditioning else 0)


@pytest.mark.parametrize("source", [None, Source(Image.new("RGB", (40, 32)), strength=0.5)], ids=["noise", "picture"])
def test_the_choices_of_a_plan_are_plain_values_of_the_record(sdxl, source):
    plan = sdxl.plan(Request("a frog", source=source))
    resolved = remember(plan, ModelChoice(), sdxl, {}).resolved
    assert json.loads(json.dumps(resolved, allow_nan=False)) == resolved
    assert None not in resolved.values()
    for name in ("steps", "guidance_scale", "sampler", "spacing", "width", "height"):
        assert resolved[name] == getattr(plan, name)
    assert resolved["steps_run"] == len(plan.sigmas) - 1 == (12 if source else 25)
    assert {name: resolved[name] for name in plan.sizes} == plan.sizes


def test_a_request_with_the_values_of_its_plan_has_the_same_plan():
    for config in (SD15, SD_TURBO, SDXL_BASE, SDXL_REFINER):
        plan = Request("a frog").resolved(config)
        names = ("steps", "guidance_scale", "sampler", "spacing", "width", "height")
        asked = Request("a frog", **{name: getattr(plan, name) for name in names}, sizes=Sizes(**plan.sizes))
        again = asked.resolved(config)
        assert torch.equal(again.sigmas, plan.sigmas)
        for name in (*names, "texts", "sizes", "scalars", "guidance_interval", "latent_shape"):
            assert getattr(again, name) == getattr(plan, name)


def test_a_clip_skip_beyond_the_layers_of_any_tower_is_refused():
    assert Request("a frog", clip_skip=12).resolved(SDXL_BASE).request.clip_skip == 12
    for config, skip, layers in ((SD15, 13, 12), (SD21, 24, 23), (SDXL_BASE, 13, 12)):
        with pytest.raises(ValueError, match=rf"clip_skip must be from 1 .* to {layers}, .* got {skip}"):
            Request("a frog", clip_skip=skip).resolved(config)


def test_only_where_zeros_stand_for_no_text_a_negative_prompt_stays_none():
    assert Request("a frog").resolved(SDXL_BASE).texts == ("a frog", None)
    assert Request("a frog", "").resolved(SDXL_BASE).texts == ("a frog", "")
    assert Request("a frog").resolved(SD15).texts == ("a frog", "")


def test_the_micro_conditioning_of_a_whole_picture_is_the_default_where_a_model_has_it():
    sizes = Request("a frog", width=640).resolved(SDXL_BASE).sizes
    assert (sizes["original_width"], sizes["original_height"]) == (640, 1024)
    assert (sizes["target_width"], sizes["target_height"]) == (640, 1024)
    assert (sizes["crop_top"], sizes["crop_left"]) == (0, 0)
    assert len(sizes) == 6
    refined = Request("a frog", sizes=Sizes(crop_top=8)).resolved(SDXL_REFINER)
    assert (refined.sizes["crop_top"], refined.sizes["crop_left"]) == (8, 0)
    assert (refined.sizes["aesthetic_score"], refined.sizes["negative_aesthetic_score"]) == (6.0, 2.5)
    assert len(refined.sizes) == 6
    assert refined.scalars == ((1024, 1024, 8, 0, 6.0), (1024, 1024, 8, 0, 2.5))
    chosen = Request("a frog", sizes=Sizes(original_width=9, target_height=8, crop_left=7)).resolved(SDXL_BASE)
    assert chosen.scalars == ((1024, 9, 0, 7, 8, 1024),) * 2
    assert Request("a frog").resolved(SD15).sizes == {}


@pytest.mark.parametrize(
    ("config", "choice", "message"),
    [
        (SD15, {"original_width": 512}, "original_width is 512, and the model sd15 is .* on no size or score"),
        (SD15, {"crop_top": 0}, "crop_top is 0, and the model sd15"),
        (SDXL_BASE, {"aesthetic_score": 6.0}, "sdxl-base is conditioned on original_height, orig"),
        (SDXL_BASE, {"negative_aesthetic_score": 1.0}, "negative_aesthetic_score is 1.0"),
        (SDXL_REFINER, {"target_width": 1024}, "target_width is 1024.* sdxl-refiner"),
    ],
)
def test_a_conditioning_that_the_model_does_not_have_is_refused(config, choice, message):
    with pytest.raises(ValueError, match=message):
        Request("a frog", sizes=Sizes(**choice)).resolved(config)


@pytest.mark.parametrize(("size", "nearest"), [(100, "96 or 104"), (7, "8")])
def test_a_size_that_the_vae_cannot_make_is_refused_with_the_nearest_ones(size, nearest):
    with pytest.raises(ValueError, match=f"multiple of 8 .* got {size}; nearest: {nearest}$"):
        Request("a frog", height=size).resolved(SD15)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_every_sampler_makes_a_picture_that_its_seed_decides(pipe, sampler, steps):
    request = dataclasses.replace(FROG, sampler=sampler, steps=steps, seed=5)
    first, again = pipe.generate(request), pipe.generate(request)
    assert first[0].size == (32, 32)
    assert np.array_equal(first[0], again[0])
    assert pixels(first[0]).std() > 10  # not flat
    other = pipe.generate(dataclasses.replace(request, seed=6))
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_picture_i_of_a_batch_equals_its_seed_alone(pipe, sampler):
    request = dataclasses.replace(FROG, sampler=sampler, seed=7, images=3)
    batch = pipe.generate(request)
    for seed, picture in zip(request.seeds, batch, strict=True):
        alone = pipe.generate(dataclasses.replace(request, seed=seed, images=1))[0]
        # Kernels add up in another order for another batch size: a level on a boundary may flip.
        assert abs(pixels(picture) - pixels(alone)).max() <= 1


def test_the_stream_shows_every_step_and_ends_in_what_decode_takes(pipe):
    steps = list(pipe.stream(FROG))
    assert [step.index for step in steps] == [0, 1, 2]
    assert all(step.total == 3 for step in steps)
    assert all(step.x.shape == step.x0.shape == (1, 4, 8, 8) for step in steps)
    assert all(step.x.dtype == torch.float32 for step in steps)
    assert not steps[-1].x.requires_grad
    assert np.array_equal(pipe.decode(steps[-1].latents)[0], pipe.generate(FROG)[0])
    assert len(pipe.decode(steps[0].x0)) == 1  # a preview


@pytest.mark.parametrize(
    ("sampler", "spacing", "squared"), [("euler", "trailing", 0), ("euler", "leading", 1), ("dpmpp_2m", "trailing", 1)]
)
def test_a_picture_starts_from_its_seeds_noise_at_the_samplers_own_scale(pipe, sampler, spacing, squared):
    request = dataclasses.replace(FROG, sampler=sampler, spacing=spacing, steps=1, seed=3)
    (step,) = pipe.stream(request)  # one step to zero noise: x is x0 = start - sigma eps
    sigma = float(pipe.schedule.sigmas[-1])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    first = math.sqrt(squared + sigma**2) * noise
    with torch.no_grad():
        predict = guided(pipe.unet.bind, pipe.conditions(pipe.plan(request)), classifier_free(3.0))
        eps = predict(first / math.sqrt(1 + sigma**2), torch.tensor([999.0]))
    assert torch.allclose(step.x, first - sigma * eps, rtol=0, atol=1e-3)  # sigma times fp32's bits


def test_ddim_ends_at_the_first_timestep_in_variance_preserving_scale(pipe):
    request = dataclasses.replace(FROG, sampler="ddim")
    *_, last = pipe.stream(request)
    sigma = float(pipe.schedule.sigmas[0])
    assert last.sigma == sigma
    sigmas = pipe.schedule.steps(3, "leading", final="first")
    *_, before, _ = pipe.stream(request)
    x = last.x0 + sigma / float(sigmas[2]) * (before.x - last.x0)  # DDIM's last step by hand
    assert torch.allclose(last.x, x, rtol=0, atol=1e-5)  # fp32 rounding
    assert torch.allclose(last.latents, x / math.sqrt(1 + sigma**2), rtol=0, atol=1e-5)
    assert np.array_equal(pipe.decode(last.latents)[0], pipe.generate(request)[0])


def test_a_request_is_checked_before_the_first_step_is_asked_for(pipe):
    with pytest.raises(ValueError, match="width must be a multiple of 4"):
        pipe.stream(dataclasses.replace(FROG, width=30))


def test_sizes_that_the_levels_do_not_divide_work(pipe):
    picture = pipe.generate(dataclasses.replace(FROG, width=36, height=20))[0]
    assert picture.size == (36, 20)


def test_guidance_up_to_1_ignores_the_negative_prompt_and_above_1_follows_it(pipe):
    def picture(scale: float, negative: str, rescale: float = 0.0) -> np.ndarray:
        return pixels(
            pipe.generate(
                dataclasses.replace(FROG, guidance_scale=scale, negative_prompt=negative, guidance_rescale=rescale)
            )[0]
        )

    assert np.array_equal(picture(1.0, ""), picture(1.0, "blurry"))
    assert np.array_equal(picture(1.0, ""), picture(0.0, ""))
    assert not np.array_equal(picture(3.0, ""), picture(3.0, "blurry"))
    assert not np.array_equal(picture(3.0, ""), picture(3.0, "", rescale=0.7))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "lcm"])
def test_an_interval_of_all_levels_changes_nothing_and_one_of_none_turns_guidance_off(pipe, sampler):
    request = dataclasses.replace(FROG, sampler=sampler)

    def last(**changes) -> torch.Tensor:
        *_, step = pipe.stream(dataclasses.replace(request, **changes))
        return step.x

    assert torch.equal(last(guidance_interval=(0, 20)), last())
    assert torch.equal(last(guidance_interval=(20, 21)), last(guidance_scale=1.0))
    interval = (0, pipe.schedule.steps(3)[1].item())  # of three levels the lower two
    assert not torch.equal(last(guidance_interval=interval), last())
    assert not torch.equal(last(guidance_interval=interval), last(guidance_scale=1.0))


def test_only_levels_within_the_interval_cost_two_passes(pipe, monkeypatch):
    batches = []
    forward = pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda z, *rest: batches.append(len(z)) or forward(z, *rest))
    high, middle, low, _ = pipe.schedule.steps(3).tolist()
    for interval, expected in [
        (None, [2, 2, 2]),
        ((low, middle), [1, 2, 1]),  # low itself is outside, middle inside
        ((middle, high), [2, 1, 1]),
        ((0, middle), [1, 2, 2]),
    ]:
        batches.clear()
        list(pipe.stream(dataclasses.replace(FROG, guidance_interval=interval)))
        assert batches == expected


def test_without_guidance_the_negative_prompt_is_not_encoded(pipe, monkeypatch):
    seen = []
    encode = pipe.text_encoder.encode
    monkeypatch.setattr(pipe.text_encoder, "encode", lambda texts, skip: seen.append(texts) or encode(texts, skip))
    for scale in (0.0, 1.0, 1.5):
        pipe.stream(dataclasses.replace(FROG, negative_prompt="bad", guidance_scale=scale))
    assert seen == [[FROG.prompt], [FROG.prompt], [FROG.prompt, "bad"]]


def seen_by_the_unet(pipe, monkeypatch, request):
    """The context and the vector that it binds, with guidance 2b: without the prompt, then with it."""
    bound = []
    bind = pipe.unet.bind
    monkeypatch.setattr(pipe.unet, "bind", lambda condition: bound.append(condition) or bind(condition))
    next(iter(pipe.stream(request)))
    (condition,) = bound
    return condition.context, condition.vector


def embedded(*scalars):
    """Those scalars as diffusers embeds them."""
    return get_timestep_embedding(torch.tensor(scalars), 256, True, 0).flatten()


def test_sdxl_sees_both_towers_the_pooled_text_and_the_sizes(sdxl, monkeypatch):
    request = Request("a frog", "bad", 1, images=2, width=36, sizes=Sizes(original_width=99, crop_top=5))
    context, vector = seen_by_the_unet(sdxl, monkeypatch, request)
    encoded = sdxl.text_encoder.encode(["bad", "a frog"])
    expected, pooled = encoded.context, encoded.vector
    assert context.shape == (4, 32, 32)
    assert torch.equal(context, expected.repeat_interleave(2, 0))
    assert torch.equal(vector[:, :24], pooled.repeat_interleave(2, 0))
    # height before width: original, crop, target
    sizes = embedded(32, 99, 5, 0, 32, 36)
    assert torch.allclose(vector[:, 24:], sizes.expand(4, -1), rtol=0, atol=1e-6)  # fp32 sines


def test_the_refiner_sees_a_good_score_with_the_prompt_and_a_bad_one_without(refiner, monkeypatch):
    _, vector = seen_by_the_unet(refiner, monkeypatch, Request("a frog", steps=1))
    assert torch.allclose(vector[0, 24:], embedded(32, 32, 0, 0, 2.5), rtol=0, atol=1e-6)
    assert torch.allclose(vector[1, 24:], embedded(32, 32, 0, 0, 6.0), rtol=0, atol=1e-6)


def test_sdxl_steers_away_from_zeros_but_a_given_empty_text_is_encoded(sdxl, refiner, monkeypatch):
    context, vector = seen_by_the_unet(sdxl, monkeypatch, Request("a frog", steps=1))
    assert not context[0].any()
    assert not vector[0, :24].any()
    assert torch.equal(vector[0, 24:], vector[1, 24:])  # the sizes stay
    for pipe, negative in ((sdxl, ""), (refiner, None), (refiner, "")):
        context, vector = seen_by_the_unet(pipe, monkeypatch, Request("a frog", negative, 1))
        encoded = pipe.text_encoder.encode(["a frog", ""])
        expected, pooled = encoded.context, encoded.vector
        assert torch.equal(context[0], expected[1])
        assert torch.equal(vector[0, :24], pooled[1])


@pytest.mark.parametrize(
    "choice", [*({"sizes": Sizes(**{name: 9})} for name in BASE_CONDITIONING), {"negative_prompt": ""}], ids=str
)
def test_each_conditioning_of_sdxl_changes_its_picture(sdxl, choice):
    base = Request("a frog", steps=2)
    first, other = sdxl.generate(base), sdxl.generate(dataclasses.replace(base, **choice))
    assert not np.array_equal(first[0], other[0])


def test_without_guidance_sdxl_needs_no_second_condition(sdxl, monkeypatch):
    request = Request("a frog", steps=1, guidance_scale=0.0)
    context, vector = seen_by_the_unet(sdxl, monkeypatch, request)
    assert (len(context), len(vector)) == (1, 1)
    assert context.any()


def test_the_prompt_the_steps_and_the_spacing_each_change_the_picture(pipe):
    base = pixels(pipe.generate(FROG)[0])
    for change in ({"prompt": "a cat"}, {"steps": 4}, {"spacing": "karras"}):
        assert not np.array_equal(base, pipe.generate(dataclasses.replace(FROG, **change))[0])


def test_a_prompt_longer_than_the_encoder_reads_is_cut_with_a_warning(pipe):
    with pytest.warns(UserWarning, match="this part is cut off"):
        pipe.generate(dataclasses.replace(FROG, prompt="a frog " * 30))


@pytest.mark.parametrize("attention", ["sliced", "math"])
def test_the_placements_attention_reaches_every_layer_and_changes_nothing(pipe, model_folder, attention):
    other = load(model_folder, Placement(device="cpu", attention=attention))
    if attention == "math":
        attends = {m.attend for n in (other.unet, other.vae) for m in n.modules() if hasattr(m, "attend")}
        assert attends == {math_attention}
    difference = abs(pixels(pipe.generate(FROG)[0]) - pixels(other.generate(FROG)[0]))
    assert difference.max() <= 1  # fp32 sums in another order


def test_bf16_networks_make_nearly_the_same_picture_with_an_fp32_sampler(pipe, model_folder):
    half = load(model_folder, Placement(device="cpu", dtype=torch.bfloat16))
    assert {p.dtype for p in half.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.text_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.vae.parameters()} == {torch.bfloat16}
    assert all(step.x.dtype == torch.float32 for step in half.stream(FROG))
    difference = abs(pixels(pipe.generate(FROG)[0]) - pixels(half.generate(FROG)[0]))
    assert difference.mean() < 4  # bf16 keeps 8 bits; 3 steps of a random network add up its rounding


@pytest.mark.parametrize(
    ("part", "dtype", "message"),
    [
        ("unet.conv_out", torch.float32, r"the UNet gave .* in float32 at step 1 of 3, .*UNet that"),
        ("unet.conv_out", torch.bfloat16, r"the UNet gave .* in bfloat16 at step 1 of 3, .*UNet"),
        ("vae.decoder", torch.float32, "the VAE gave .* in float32, .* latents up to .*, where 5 is usual"),
        ("text_encoder", torch.float32, "the text encoder gave .* in float32, "),
    ],
)
def test_numbers_that_are_not_finite_are_an_error_and_never_a_black_picture(model_folder, part, dtype, message):
    broken = load(model_folder, Placement(device="cpu", dtype=dtype, vae_dtype=dtype))
    weights = next(operator.attrgetter(part)(broken).parameters())
    with torch.no_grad():
        weights.fill_(3e38)
        weights.flatten()[::2] *= -1  # so that a norm meets an infinite sum, too
    with pytest.raises(FloatingPointError, match=message) as caught:
        broken.generate(FROG)
    assert f"from finite weights (up to {float(weights.abs().max()):.3g}); usual causes" in str(caught.value)
    assert "damaged, get" not in str(caught.value)


def test_the_step_whose_numbers_are_not_finite_first_is_named_and_the_last(pipe, monkeypatch):
    forward, calls = pipe.unet.forward, []

    def overflow(x, *args, **options):
        calls.append(x)
        return forward(x, *args, **options) * (math.inf if len(calls) == 2 else 1)

    monkeypatch.setattr(pipe.unet, "forward", overflow)
    sigma = pipe.schedule.steps(3, "leading", offset=1, final="zero")[1]
    with pytest.raises(FloatingPointError, match=rf"step 2 of 3, from noise level {sigma:.3g}"):
        pipe.generate(FROG)
    assert len(calls) == 2


def test_guidance_that_is_too_strong_is_named_as_a_cause(pipe):
    request = dataclasses.replace(FROG, guidance_scale=1e38)
    with pytest.raises(FloatingPointError, match=r"finite weights .* \(guidance_scale 1e\+38\)"):
        pipe.generate(request)


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=needs_packing)])
@pytest.mark.parametrize("number", sparse([math.nan, math.inf], 2))
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("unet", r"mid.res_in.conv1.weight of the UNet holds NaN or Inf: the file \S*u is damaged"),
        ("vae", r"decoder.conv_in.weight of the VAE holds NaN or Inf: the file \S*v is damaged"),
        ("text_encoder", r"towers.0\..* of the text encoder holds NaN or Inf: the file \S*t is"),
    ],
)
def test_a_damaged_weight_is_named_with_the_file_that_holds_it(model_folder, tmp_path, part, number, packed, message):
    model = files.load(model_folder)
    layers = {"unet": model.unet.mid.res_in.conv1, "vae": model.vae.decoder.conv_in, "text_encoder": model.text_encoder}
    with torch.no_grad():
        next(layers[part].parameters())[:] = number
    files.save(model, tmp_path / part[0])
    placement = Placement(device="cpu", packed=packed)
    broken = load(model_folder, placement, **{part: tmp_path / part[0]})
    with pytest.raises(FloatingPointError, match=message):
        broken.generate(FROG)


@pytest.mark.parametrize(("part", "option"), [("unet", "dtype"), ("vae", "vae_dtype")])
def test_inf_in_fp16_weights_may_be_of_the_cast_and_asks_for_fp32_first(part, option):
    network = nn.Linear(1, 1).half()
    pipe = SimpleNamespace(paths={}, **{part: network})
    network.weight.data.fill_(math.inf)
    assert str(not_finite(pipe, part)).endswith(
        "gave numbers that are not finite in float16, whose largest number is 65504 (the largest weight is inf): "
        f"load the model with {option} float32"
    )
    network.weight.data.fill_(math.nan)
    error = str(not_finite(pipe, part))
    assert error.startswith("weight of the ")
    assert error.endswith("holds NaN or Inf: the model's file is damaged, get it again")


def test_latents_that_are_not_finite_are_not_decoded(pipe):
    with pytest.raises(FloatingPointError, match="the latents hold NaN or Inf"):
        pipe.decode(torch.full((1, 4, 8, 8), math.nan))


@pytest.mark.parametrize("path", [5, None, b"weights/tiny"])
def test_what_is_no_path_is_named(path, model_folder):
    with pytest.raises(ValueError, match=r"path must be a str or a pathlib\.Path, got (5|None|b')"):
        load(path)
    if path is not None:
        with pytest.raises(ValueError, match=r"path must be a str or a pathlib\.Path, got (5|b')"):
            load(model_folder, vae=path)


def test_a_word_in_the_place_of_a_placement_or_a_request_is_told_what_to_write(pipe, model_folder):
    with pytest.raises(ValueError, match=r"ldm\.Placement\(device='cuda'\), got 'cuda'"):
        load(model_folder, "cuda")
    for take in (pipe.stream, pipe.generate):
        with pytest.raises(ValueError, match=r"ldm\.Request\('a frog'\), got 'a cat'"):
            take("a cat")


def test_a_model_whose_unet_takes_more_than_latents_is_refused(pipe):
    config = dataclasses.replace(pipe.config, unet=dataclasses.replace(pipe.config.unet, in_channels=9))
    inpainting = Pipeline(config, pipe.unet, pipe.vae, pipe.text_encoder)
    with pytest.raises(ValueError, match="takes 9 channels"):
        inpainting.stream(FROG)


def test_parts_from_elsewhere_and_a_prediction_are_passed_on(pipe, model_folder, tmp_path):
    other = files.load(model_folder)
    for network in (other.unet, other.vae, other.text_encoder):
        for parameter in network.parameters():
            parameter.copy_(parameter * 1.01)
    files.save(other, tmp_path / "other")
    cpu = Placement(device="cpu")
    for part in ("unet", "vae", "text_encoder"):
        mixed = load(model_folder, cpu, **{part: tmp_path / "other"})
        for name in ("unet", "vae", "text_encoder"):
            expected = other if name == part else pipe
            for ours, theirs in zip(
                getattr(mixed, name).parameters(), getattr(expected, name).parameters(), strict=True
            ):
                assert torch.equal(ours, theirs)
    assert load(model_folder, cpu).config.diffusion.prediction == "eps"
    told = load(model_folder, cpu, prediction="v")
    assert told.config.diffusion.prediction == "v"
    assert "you asked for v" in told.why
    with pytest.raises(ValueError, match="holds one set of weights"):
        load(model_folder, cpu, ema=True)


def test_loading_nothing_says_where_nothing_was():
    with pytest.raises(ValueError, match="no/such/model does not exist"):
        load("no/such/model")
