"""The denoiser wrappers against their definitions and against diffusers."""

import math

import pytest
import torch
from diffusers import LCMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import nn

from ldm.diffusion.denoiser import consistency, guided, parametrize, to_x0, within
from ldm.diffusion.schedule import NoiseSchedule, to_ve, to_vp

SCHEDULE = NoiseSchedule()


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Convolution(nn.Module):
    """A network with a context and a vector, whose calls can be looked at afterwards."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(draw(4, 4, 3, 3) / 6)
        self.calls = []

    def forward(self, z, timesteps, context, vector=None):
        self.calls.append((z, timesteps, context, vector))
        shift = context.mean((1, 2)) if vector is None else context.mean((1, 2)) + vector.mean(1)
        shift = shift + timesteps / 1000
        weight = self.weight.to(z.dtype)
        return nn.functional.conv2d(z, weight, padding=1) + shift[:, None, None, None].to(z.dtype)


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_a_perfect_prediction_of_any_kind_gives_x0_back(kind, zero_terminal_snr):
    schedule = NoiseSchedule(zero_terminal_snr=zero_terminal_snr)
    x0, eps = draw(2, 1, 4, 8, 8, dtype=torch.float64).unbind(0)
    for t in (0, 123, 998, 999):
        sigma, index = schedule.sigmas[t], torch.tensor([t])
        truth = {"eps": eps, "v": schedule.velocity(x0, eps, index), "x0": x0}[kind]
        estimate = to_x0(truth, x0 + sigma * eps, sigma, kind)
        assert torch.allclose(estimate, x0, rtol=0, atol=1e-11)  # fp64; eps subtracts two 4096s


def test_v_keeps_its_digits_in_fp32_where_the_signal_is_gone():
    schedule = NoiseSchedule(zero_terminal_snr=True)
    x0, eps = draw(2, 1, 4, 8, 8).unbind(0)
    x = x0 + schedule.sigmas[999].float() * eps
    v = schedule.velocity(x0, eps, torch.tensor([999]))
    difference = (to_x0(v, x, schedule.sigmas[999], "v") - x0).abs().max().item()
    print(f"\n  x0 from v at sigma 4096, fp32: {difference:.1e}")
    assert difference < 2e-6  # a few fp32 roundings of values near 3; eps would lose 2e-4


def test_the_network_sees_unit_variance_and_the_right_timestep():
    seen = []

    def network(z, timesteps):
        seen.append((z, timesteps))
        return torch.zeros_like(z)

    z = draw(3, 4, 8, 8)
    for t in (0, 437, 999):
        sigma = SCHEDULE.sigmas[t]
        x0 = parametrize(network, SCHEDULE, "eps")(to_ve(z, sigma), sigma)
        assert torch.allclose(seen[-1][0], z, rtol=1e-6)
        assert seen[-1][1].tolist() == [t, t, t]
        assert torch.equal(x0, to_ve(z, sigma))


def test_a_bf16_network_is_cast_to_once_and_back_once():
    network = Convolution()
    predict = guided(network, (draw(2, 5, 3),), None, 1.0)
    denoise = parametrize(predict, SCHEDULE, "v", dtype=torch.bfloat16)
    x0 = denoise(draw(2, 4, 8, 8), SCHEDULE.sigmas[999])
    z, timesteps, _, _ = network.calls[0]
    assert x0.dtype == torch.float32
    assert z.dtype == torch.bfloat16
    assert timesteps.dtype == torch.float32
    assert timesteps.tolist() == [999, 999]  # bf16 would round it to 1000


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("batched", [True, False])
def test_guidance_equals_diffusers(rescale, batched):
    network, z, timesteps = Convolution(), draw(2, 4, 8, 8), torch.tensor([3.0, 900.0])
    cond, uncond = (draw(2, 5, 3, seed=1), draw(2, 6)), (draw(2, 5, 3, seed=2), draw(2, 6, seed=3))
    ours = guided(network, cond, uncond, 7.5, rescale=rescale, batched=batched)(z, timesteps)
    calls = len(network.calls)

    with_text, without = network(z, timesteps, *cond), network(z, timesteps, *uncond)
    theirs = without + 7.5 * (with_text - without)
    if rescale:
        theirs = rescale_noise_cfg(theirs, with_text, guidance_rescale=rescale)
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"\n  guidance, rescale {rescale}, batched {batched}: {difference:.1e}")
    assert difference < 2e-6  # fp32; a convolution may sum a batch of four in another order
    assert calls == (1 if batched else 2)


def test_one_batched_call_holds_uncond_first():
    network, z, timesteps = Convolution(), draw(2, 4, 8, 8), torch.tensor([3.0, 900.0])
    cond, uncond = (draw(2, 5, 3, seed=1), None), (draw(2, 5, 3, seed=2), None)
    guided(network, cond, uncond, 2.0)(z, timesteps)
    seen_z, seen_t, context, vector = network.calls[0]
    assert torch.equal(seen_z, torch.cat([z, z]))
    assert seen_t.tolist() == [3, 900, 3, 900]
    assert torch.equal(context, torch.cat([uncond[0], cond[0]]))
    assert vector is None


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_without_guidance_there_is_one_call_with_the_condition_alone(scale):
    network, z, timesteps = Convolution(), draw(2, 4, 8, 8), torch.tensor([3.0, 900.0])
    cond = (draw(2, 5, 3),)
    prediction = guided(network, cond, None, scale)(z, timesteps)
    assert torch.equal(prediction, network(z, timesteps, *cond))
    assert len(network.calls) == 2  # one of them is this test's own


def test_contexts_of_unlike_length_work_in_two_calls():
    network, z, timesteps = Convolution(), draw(2, 4, 8, 8), torch.tensor([3.0, 900.0])
    cond, uncond = (draw(2, 10, 3, seed=1),), (draw(2, 5, 3, seed=2),)
    assert guided(network, cond, uncond, 2.0, batched=False)(z, timesteps).shape == z.shape
    with pytest.raises(ValueError, match=r"\(2, 10, 3\) and \(2, 5, 3\).*batched=False"):
        guided(network, cond, uncond, 2.0)


@pytest.mark.parametrize(("scale", "batched", "calls"), [(1.0, True, 1), (2.0, True, 1), (2.0, False, 2)])
def test_what_is_made_of_a_condition_once_is_given_to_every_call(scale, batched, calls):
    network, z, timesteps = Convolution(), draw(2, 4, 8, 8), torch.tensor([3.0, 900.0])
    cond, uncond = (draw(2, 5, 3, seed=1), draw(2, 6)), (draw(2, 5, 3, seed=2), draw(2, 6, seed=3))
    plain = guided(network, cond, uncond, scale, batched=batched)(z, timesteps)
    made = []

    def prepare(context, vector):
        made.append((2 * context, vector))
        return made[-1]

    def halved(z, timesteps, context, vector):
        assert any(context is known for known, _ in made)
        return network(z, timesteps, context / 2, vector)

    predict = guided(halved, cond, uncond, scale, batched=batched, prepare=prepare)
    for _ in range(3):
        assert torch.equal(predict(z, timesteps), plain)
    assert len(made) == calls


def test_guidance_of_a_half_precision_network_is_summed_in_fp32():
    network, z, timesteps = Convolution(), draw(1, 4, 8, 8), torch.tensor([500.0])
    cond, uncond = (draw(1, 5, 3, seed=1),), (draw(1, 5, 3, seed=2),)
    half = guided(network, cond, uncond, 12.0)(z.bfloat16(), timesteps)
    with_text, without = (network(z.bfloat16(), timesteps, *c).float() for c in (cond, uncond))
    assert half.dtype == torch.float32
    assert torch.allclose(half, without + 12 * (with_text - without), atol=1e-5)


def test_an_interval_holds_its_upper_end_and_not_its_lower_one():
    denoise = within((1.0, 2.0), lambda x, sigma: x + 1, lambda x, sigma: x - 1)
    levels = [0.0, 1.0, 1.0 + 1e-9, 2.0, 2.0 + 1e-9, 4096.0]
    moved = [float(denoise(torch.zeros(1), torch.tensor(s, dtype=torch.float64))) for s in levels]
    assert moved == [-1, -1, 1, 1, -1, -1]


@pytest.mark.parametrize("interval", [(1.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (math.nan, 1.0)])
def test_an_interval_that_is_none_is_refused(interval):
    with pytest.raises(ValueError, match=r"must satisfy 0 <= low < high, got (1|2|-1|nan)"):
        within(interval, lambda x, sigma: x, lambda x, sigma: x)


def test_consistency_scalings_equal_diffusers_and_are_the_identity_at_timestep_0():
    reference = LCMScheduler()
    denoise = consistency(lambda x, sigma: torch.full_like(x, 3.0), SCHEDULE)
    x = draw(1, 4, 8, 8, dtype=torch.float64)
    for t in (0, 1, 259, 999):
        sigma = SCHEDULE.sigmas[t]
        c_skip, c_out = reference.get_scalings_for_boundary_condition_discrete(t)
        theirs = c_out * 3.0 + c_skip * x / math.sqrt(1 + sigma**2)
        assert torch.allclose(denoise(x, sigma), theirs, rtol=1e-12)
    assert torch.equal(denoise(x, SCHEDULE.sigmas[0]), to_vp(x, SCHEDULE.sigmas[0]))


def test_a_prediction_that_cannot_be_is_refused():
    def network(z, timesteps):
        return z

    with pytest.raises(ValueError, match=r"one of \('eps', 'v', 'x0'\), got 'epsilon'"):
        parametrize(network, SCHEDULE, "epsilon")
    with pytest.raises(ValueError, match=r"one of \('eps', 'v', 'x0'\), got 'epsilon'"):
        to_x0(draw(1), draw(1), 1.0, "epsilon")
    with pytest.raises(ValueError, match=r"predicts v or x0, got 'eps'.*zero_terminal_snr=False"):
        parametrize(network, NoiseSchedule(zero_terminal_snr=True), "eps")


@pytest.mark.parametrize(
    ("uncond", "scale", "rescale", "message"),
    [
        ((draw(1, 5, 3),), -1.0, 0.0, "scale must be 0 or more, got -1.0"),
        ((draw(1, 5, 3),), math.nan, 0.0, "scale must be 0 or more, got nan"),
        ((draw(1, 5, 3),), 2.0, 1.5, r"rescale must lie in 0 \.\. 1, got 1.5"),
        (None, 2.0, 0.0, "scale of 2.0 needs an unconditional condition, got None"),
        ((None,), 2.0, 0.0, r"equal shape, got \(1, 5, 3\) and None"),
    ],
)
def test_guidance_that_cannot_be_is_refused(uncond, scale, rescale, message):
    with pytest.raises(ValueError, match=message):
        guided(Convolution(), (draw(1, 5, 3),), uncond, scale, rescale=rescale)
