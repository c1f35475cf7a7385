"""Putting the parts together by hand: own loops, wrappers around the UNet, own samplers, and gradients."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldm.conditioning import Condition
from ldm.diffusion.samplers import SAMPLERS, Step, ddim, euler, euler_ancestral, start
from ldm.diffusion.schedule import to_ve, to_vp
from ldm.loading import load
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline
from ldm.placement.memory import Placement
from ldm.record import ModelChoice, remember
from ldm.request import Request
from ldm.source import Source
from tests.tiny import TINY_RANDOM, TINY_SDXL, random_networks

FROG = Request("a frog on the grass", steps=3, seed=4)
PICTURE = Image.linear_gradient("L").resize((40, 32)).convert("RGB")


@pytest.fixture
def fresh() -> Pipeline:
    """A tiny random model of this test's own, to change."""
    return Pipeline(TINY_RANDOM, *random_networks())


def last_of(steps) -> Step:
    *_, last = steps
    return last


# ------------------------------------------------------------------ own loops


@torch.no_grad()
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "changes",
    [
        {"images": 2},
        {"spacing": "trailing", "guidance_rescale": 0.7, "negative_prompt": "bad", "width": 36},
        {"spacing": "karras", "guidance_interval": (0.1, 5.0)},
        {"guidance_scale": 1.0},
        {"source": Source(PICTURE, strength=0.7)},
    ],
    ids=", ".join,
)
def test_an_own_loop_over_the_public_stages_makes_the_pictures_of_generate(pipe, sampler, changes):
    request = dataclasses.replace(FROG, sampler=sampler, **changes)
    plan = pipe.plan(request)
    denoise = pipe.denoiser(plan, pipe.conditions(plan))
    step = last_of(SAMPLERS[plan.sampler](denoise, pipe.start(plan), plan.sigmas, noise=plan.noise()))
    walked = last_of(pipe.walk(plan, denoise, pipe.start(plan)))
    expected = pipe.generate(request)
    assert len(expected) == request.images
    assert all(map(np.array_equal, pipe.decode(step.latents), expected))
    assert all(map(np.array_equal, pipe.decode(walked.latents), expected))
    streamed = last_of(pipe.stream(request))
    for name in ("x", "x0", "latents"):
        assert torch.equal(getattr(step, name), getattr(streamed, name))


@torch.no_grad()
def test_an_own_loop_makes_the_pictures_of_sdxl():
    pipe = Pipeline(TINY_SDXL, *random_networks(TINY_SDXL))
    plan = pipe.plan(FROG)
    denoise = pipe.denoiser(plan, pipe.conditions(plan))
    last = last_of(SAMPLERS[plan.sampler](denoise, pipe.start(plan), plan.sigmas, noise=plan.noise()))
    assert np.array_equal(pipe.decode(last.latents)[0], pipe.generate(FROG)[0])


@torch.no_grad()
@pytest.mark.parametrize("final", ["zero", "first"])
def test_x_is_x0_and_noise_at_the_last_step_too(pipe, final):
    """Of ddim, which ends above zero: its last move by hand, and of euler, which ends at zero."""
    request = dataclasses.replace(FROG, sampler={"first": "ddim", "zero": "euler"}[final])
    *_, before, last = pipe.stream(request)
    noise = (before.x - last.x0) / before.sigma
    assert last.sigma == (float(pipe.schedule.sigmas[0]) if final == "first" else 0)
    assert torch.allclose(last.x, last.x0 + last.sigma * noise, rtol=0, atol=1e-6)  # fp32
    assert torch.equal(last.latents, to_vp(last.x, last.sigma))


@pytest.mark.parametrize("sampler", [euler, euler_ancestral])
def test_a_stream_takes_a_sampler_levels_and_latents(pipe, sampler):
    sigmas = torch.tensor([9.0, 2.5, 0.4, 0.1], dtype=torch.float64)
    latents = 9 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    request = dataclasses.replace(FROG, images=2, steps=25)
    streamed = list(pipe.stream(request, latents=latents, sigmas=sigmas, sampler=sampler))
    plan = pipe.plan(request)
    with torch.no_grad():
        denoise = pipe.denoiser(plan, pipe.conditions(plan))
        expected = list(sampler(denoise, latents, sigmas, noise=plan.noise()))
    assert [step.sigma for step in streamed] == sigmas[1:].tolist()
    for ours, theirs in zip(streamed, expected, strict=True):
        assert torch.equal(ours.x, theirs.x)
        assert torch.equal(ours.x0, theirs.x0)
    only_levels = next(pipe.stream(request, sigmas=sigmas))  # starts from noise of the first level given
    x = start(plan.initial_noise()(), sigmas[0], sampler=plan.sampler, spacing=plan.spacing)
    with torch.no_grad():
        assert torch.equal(only_levels.x0, denoise(x, sigmas[0]))
    listed = last_of(pipe.stream(request, latents=latents, sigmas=sigmas.tolist(), sampler=sampler))
    assert torch.equal(listed.x, streamed[-1].x)
    with pytest.raises(ValueError, match="strictly falling levels"):
        next(pipe.stream(request, sigmas=sigmas.flip(0)))
    with pytest.raises(ValueError, match=r"size and images of this request are \(2, 4, 8, 8\), got \(1, 4, 8, 8\)"):
        pipe.stream(request, latents=latents[:1])
    with pytest.raises(ValueError, match="the sampler must be a function, got 'euler': name a sampler in the request"):
        pipe.stream(request, sampler="euler")


# ------------------------------------------------------------------ own samplers


def mine(denoise, x, sigmas, *, noise=None, share=1.0):
    """Euler's method, keeping a share of the predicted noise."""
    for i, (sigma, target) in enumerate(pairwise(sigmas.tolist())):
        x0 = denoise(x, sigmas[i])
        x = x0 + share * target / sigma * (x - x0)
        yield Step(i, len(sigmas) - 1, target, x, x0)


@torch.no_grad()
@pytest.mark.parametrize("sampler_options", [{}, {"share": 0.5}], ids=str)
def test_a_sampler_under_a_new_name_makes_pictures_with_the_default_conventions(pipe, monkeypatch, sampler_options):
    monkeypatch.setitem(SAMPLERS, "mine", mine)
    request = dataclasses.replace(FROG, sampler="mine", spacing="trailing", sampler_options=sampler_options)
    plan = pipe.plan(request)
    sigmas = pipe.schedule.steps(3, "trailing", final="zero")
    assert torch.equal(plan.sigmas, sigmas)
    x = to_ve(plan.initial_noise()(), sigmas[0])
    last = last_of(mine(pipe.denoiser(plan, pipe.conditions(plan)), x, sigmas, **sampler_options))
    assert np.array_equal(pipe.generate(request)[0], pipe.decode(last.latents)[0])
    record = remember(plan, ModelChoice(), pipe, {"model": "0" * 64})
    assert "Sampler: mine," in record.texts(0)["parameters"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["ddim", "euler_ancestral"])
def test_the_options_of_a_sampler_reach_it(pipe, name):
    request = dataclasses.replace(FROG, sampler=name, sampler_options={"eta": 0.6})
    plan = pipe.plan(request)
    denoise = pipe.denoiser(plan, pipe.conditions(plan))
    expected = last_of(ddim(denoise, pipe.start(plan), plan.sigmas, noise=plan.noise(), eta=0.6))
    got = last_of(pipe.stream(request))
    assert torch.equal(got.x, expected.x)
    assert not torch.equal(got.x, last_of(pipe.stream(dataclasses.replace(request, sampler_options={}))).x)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("ddim", r"the sampler ddim has the options \['eta'\], got speed"),
        ("dpmpp_2m", "the sampler dpmpp_2m has no options, got eta, speed"),
    ],
)
def test_an_option_that_the_sampler_does_not_have_is_refused_with_those_that_it_has(pipe, sampler, message):
    request = dataclasses.replace(FROG, sampler=sampler, sampler_options={"speed": 2.0, "eta": 0.5})
    with pytest.raises(ValueError, match=message):
        pipe.stream(request)


# ------------------------------------------------------------------ wrappers around the UNet


class Controlled(nn.Module):
    """A UNet with residuals that depend on z, as those of a ControlNet do."""

    def __init__(self, unet, strength):
        super().__init__()
        self.unet, self.strength = unet, strength

    def residuals(self, z, timesteps, context):
        middle, skips = self.unet.encode(z.flip(-1), self.unet.embed(timesteps, None, z.dtype), context)
        return [self.strength * h for h in [*skips, middle]]

    def bind(self, condition):
        network = self.unet.bind(condition)
        return lambda z, timesteps: network(z, timesteps, self.residuals(z, timesteps, condition.context))


class Concatenated(nn.Module):
    """A network with more input channels, which are the same at every step, as those of an inpainting model."""

    def __init__(self, unet, channels):
        super().__init__()
        self.unet, self.channels = unet, channels

    def bind(self, condition):
        network = self.unet.bind(condition)
        return lambda z, timesteps: network(torch.cat([z, self.channels.expand(len(z), -1, -1, -1)], 1), timesteps)


class Shifted(nn.Module):
    """A network that has the UNet's arguments and nothing else."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, timesteps, context, vector=None, residuals=None, guidance=None):
        return self.unet(x, timesteps, context, vector, residuals, guidance) + 0.1


@torch.no_grad()
def by_hand(pipe, predict, request):
    """Euler's method with guidance, from eps as `predict(z, timesteps, context)` gives it."""
    plan = pipe.plan(request)
    (cond, uncond), x = (c.context for c in pipe.conditions(plan)), pipe.start(plan)
    for sigma, target in pairwise(plan.sigmas.tolist()):
        z, timesteps = x / (1 + sigma**2) ** 0.5, pipe.schedule.timestep(sigma).float().expand(len(x))
        without = predict(z, timesteps, uncond)
        x = x + (target - sigma) * (without + plan.guidance_scale * (predict(z, timesteps, cond) - without))
    return x


EULER = dataclasses.replace(FROG, sampler="euler", images=2, guidance_scale=3.0)


@pytest.mark.parametrize("guidance", ["batched", "sequential"])
def test_residuals_are_bound_around_the_unet(fresh, guidance):
    plain, unet = last_of(fresh.stream(EULER)).x, fresh.unet
    fresh.placement = Placement(guidance=guidance)
    fresh.unet = control = Controlled(unet, 0.5)
    got = last_of(fresh.stream(EULER)).x
    expected = by_hand(fresh, lambda z, t, context: unet(z, t, context, None, control.residuals(z, t, context)), EULER)
    assert torch.allclose(got, expected, rtol=0, atol=1e-4)  # fp32, in another order
    assert (got - plain).abs().max() > 0.1  # so that residuals that are ignored would be seen


@pytest.mark.parametrize("guidance", ["batched", "sequential"])
def test_channels_are_bound_around_the_unet_and_wrappers_around_wrappers(guidance):
    torch.manual_seed(1)
    unet = UNet(dataclasses.replace(TINY_RANDOM.unet, in_channels=7)).eval()
    _, vae, text_encoder = random_networks()
    channels = torch.randn(1, 3, 8, 8)
    pipe = Pipeline(
        TINY_RANDOM, Concatenated(unet, channels), vae, text_encoder, placement=Placement(guidance=guidance)
    )
    expected = by_hand(
        pipe, lambda z, t, context: unet(torch.cat([z, channels.expand(2, -1, -1, -1)], 1), t, context), EULER
    )
    got = last_of(pipe.stream(EULER)).x
    assert torch.allclose(got, expected, rtol=0, atol=1e-4)  # fp32, in another order
    pipe.unet = Concatenated(unet, channels + 1)
    assert (last_of(pipe.stream(EULER)).x - got).abs().max() > 0.1

    control = Controlled(unet, 0.5)
    pipe.unet = Concatenated(control, channels)
    expected = by_hand(
        pipe,
        lambda z, t, context: control.bind(Condition(context))(torch.cat([z, channels.expand(2, -1, -1, -1)], 1), t),
        EULER,
    )
    assert torch.allclose(last_of(pipe.stream(EULER)).x, expected, rtol=0, atol=1e-4)


def test_a_wrapper_with_the_arguments_of_the_unet_takes_its_place(fresh):
    unet = fresh.unet
    fresh.unet = Shifted(unet)
    got = last_of(fresh.stream(EULER)).x
    expected = by_hand(fresh, lambda z, t, context: unet(z, t, context) + 0.1, EULER)
    assert torch.allclose(got, expected, rtol=0, atol=1e-4)  # fp32, in another order


def test_a_unet_in_another_dtype_than_the_text_encoder_takes_its_context(fresh):
    expected = last_of(fresh.stream(EULER)).x
    fresh.unet.double()
    assert torch.allclose(last_of(fresh.stream(EULER)).x, expected, rtol=0, atol=1e-3)  # fp32, amplified by guidance


def test_a_wrapper_that_passes_on_the_attributes_of_the_unet_inside_is_called_itself(fresh):
    """As the modules that `torch.compile` returns."""

    class Passing(Shifted):
        def __getattr__(self, name):
            return self._modules[name] if name in self._modules else getattr(self._modules["unet"], name)

    unet = fresh.unet
    fresh.unet = Shifted(unet)
    expected = last_of(fresh.stream(EULER)).x
    fresh.unet = Passing(unet)
    assert torch.equal(last_of(fresh.stream(EULER)).x, expected)


@pytest.mark.parametrize("change", [{"guidance_dim": 16}, {"vector_dim": TINY_SDXL.unet.vector_dim}], ids=str)
def test_such_a_wrapper_is_given_the_guidance_and_the_vector(change):
    config = TINY_SDXL if "vector_dim" in change else TINY_RANDOM
    config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, **change))
    torch.manual_seed(0)
    unet = UNet(config.unet).eval()
    _, vae, text_encoder = random_networks(TINY_SDXL if "vector_dim" in change else TINY_RANDOM)
    pipe = Pipeline(config, unet, vae, text_encoder)
    expected = last_of(pipe.stream(FROG)).x

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, *args):
            return unet(*args)

    pipe.unet = Plain()
    # keys and values are projected anew in each call, by the same kernels
    assert torch.equal(last_of(pipe.stream(FROG)).x, expected)


# ------------------------------------------------------------------ gradients


def test_loaded_weights_require_no_gradients_and_those_of_a_trained_unet_get_them(model_folder):
    pipe = load(model_folder, Placement(device="cpu"))
    networks = pipe.unet, pipe.vae, pipe.text_encoder
    assert not [p for network in networks for p in network.parameters() if p.requires_grad]
    pipe.unet.requires_grad_()
    plan = pipe.plan(FROG)
    denoise = pipe.denoiser(plan, pipe.conditions(plan))
    denoise(pipe.start(plan), plan.sigmas[0]).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pipe.unet.parameters())
    assert all(p.grad.any() for name, p in pipe.unet.named_parameters() if name.endswith("weight"))
    assert not any(step.x.requires_grad for step in pipe.stream(FROG))


def test_one_sigma_per_image_trains_a_denoiser_at_several_levels(fresh):
    plan = fresh.plan(dataclasses.replace(FROG, images=3, guidance_scale=1.0))
    sigmas = fresh.schedule.sigmas[[10, 400, 900]]
    x0 = torch.randn(3, 4, 8, 8)
    x = x0 + sigmas.float()[:, None, None, None] * torch.randn(3, 4, 8, 8)
    denoise = fresh.denoiser(plan, fresh.conditions(plan))
    denoised = denoise(x, sigmas)
    assert denoised.requires_grad
    for i, sigma in enumerate(sigmas):
        alone = fresh.denoiser(plan, [c.rows()[i] for c in fresh.conditions(plan)])(x[i : i + 1], sigma)
        # a convolution may sum a batch of one in another order
        assert torch.allclose(denoised[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_start_of_a_walk_and_the_text_encoder(model_folder):
    pipe = load(model_folder, Placement(device="cpu"))
    plan = pipe.plan(FROG)
    x = pipe.start(plan).requires_grad_()
    pipe.text_encoder.requires_grad_()
    denoise = pipe.denoiser(plan, pipe.conditions(plan))
    last_of(pipe.walk(plan, denoise, x)).latents.square().mean().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()
    grads = [p.grad for p in pipe.text_encoder.parameters()]
    assert any(grad is not None and grad.any() for grad in grads)
    assert all(p.grad is None for p in pipe.unet.parameters())
