"""The denoiser wrappers against their definitions and against diffusers."""

import math

import pytest
import torch
from diffusers import LCMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import nn

from ldm.conditioning import Condition
from ldm.diffusion.consistency import consistency
from ldm.diffusion.denoiser import classifier_free, guided, parametrize, to_x0, within
from ldm.diffusion.schedule import NoiseSchedule, to_ve, to_vp

SCHEDULE = NoiseSchedule()


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Convolution(nn.Module):
    """A network with a context and a vector, which lists its bound conditions and its calls."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(draw(4, 4, 3, 3) / 6)
        self.bound, self.calls = [], []

    def bind(self, condition):
        self.bound.append(condition)
        shift = condition.context.mean((1, 2))
        if condition.vector is not None:
            shift = shift + condition.vector.mean(1)

        def network(z, timesteps):
            self.calls.append((z, timesteps, condition))
            moved = (shift + timesteps / 1000)[:, None, None, None]
            convolved = nn.functional.conv2d(z, self.weight.to(z.dtype), padding=1)
            # By tanh a condition changes the standard deviation of the prediction too, which rescaled guidance reads.
            return torch.tanh(convolved + moved.to(z.dtype))

        return network


def conditions(n=2, images=2):
    """Conditions of different texts: context b 5 3, vector b 6."""
    return [Condition(draw(images, 5, 3, seed=i + 1), draw(images, 6, seed=i + 9)) for i in range(n)]


def separately(network, given, z, timesteps):
    """The prediction of each condition in a call of its own."""
    return [network.bind(condition)(z, timesteps) for condition in given]


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
    predict = network.bind(*conditions(1))
    x, sigma = draw(2, 4, 8, 8), SCHEDULE.sigmas[999]
    x0 = parametrize(predict, SCHEDULE, "v", dtype=torch.bfloat16)(x, sigma)
    z, timesteps, _ = network.calls[0]
    assert x0.dtype == torch.float32
    assert torch.equal(x0, to_x0(predict(z, timesteps).float(), x, sigma, "v"))  # nothing else is rounded to bf16
    assert z.dtype == torch.bfloat16
    assert timesteps.dtype == torch.float32
    assert timesteps.tolist() == [999, 999]  # bf16 would round it to 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_one_sigma_per_image_equals_each_image_alone(kind, dtype):
    x, prediction = draw(2, 4, 4, 8, 8, dtype=dtype).unbind(0)
    sigmas = SCHEDULE.sigmas[[0, 123, 700, 999]]

    def network(z, timesteps):
        return torch.tanh(z) * (timesteps / 1000 - 0.3).reshape(-1, 1, 1, 1)

    denoise = parametrize(network, SCHEDULE, kind)
    for function in (
        lambda rows, sigma: to_x0(prediction[rows], x[rows], sigma, kind),
        lambda rows, sigma: denoise(x[rows], sigma),
        lambda rows, sigma: consistency(denoise, SCHEDULE)(x[rows], sigma),
        lambda rows, sigma: to_vp(x[rows], sigma),
        lambda rows, sigma: to_ve(x[rows], sigma),
    ):
        together = function(slice(None), sigmas)
        assert together.dtype == dtype
        for i, sigma in enumerate(sigmas):
            alone = function(slice(i, i + 1), sigma)
            # One rounding: the factors of one level are combined as Python floats, those of several in the dtype of x.
            tolerance = torch.finfo(dtype).eps * (1 + float(sigma)) * x.abs().max()
            assert (together[i : i + 1] - alone).abs().max() <= tolerance


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("batched", [True, False])
def test_guidance_equals_diffusers(rescale, batched):
    network, z, timesteps = Convolution(), draw(2, 4, 8, 8), torch.tensor([3.0, 900.0])
    given = conditions()
    ours = guided(network.bind, given, classifier_free(7.5, rescale), batched=batched)(z, timesteps)
    calls = len(network.calls)

    with_text, without = separately(network, given, z, timesteps)
    theirs = without + 7.5 * (with_text - without)
    if rescale:
        theirs = rescale_noise_cfg(theirs, with_text, guidance_rescale=rescale)
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"\n  guidance, rescale {rescale}, batched {batched}: {difference:.1e}")
    assert difference < 2e-6  # fp32; a convolution may sum a batch of four in another order
    assert calls == (1 if batched else 2)


def test_one_batched_call_holds_uncond_first():
    network, z, timesteps = Convolution(), draw(2, 4, 8, 8), torch.tensor([3.0, 900.0])
    cond, uncond = Condition(draw(2, 5, 3, seed=1)), Condition(draw(2, 5, 3, seed=2))
    guided(network.bind, [cond, uncond], classifier_free(2.0))(z, timesteps)
    seen_z, seen_t, condition = network.calls[0]
    assert torch.equal(seen_z, torch.cat([z, z]))
    assert seen_t.tolist() == [3, 900, 3, 900]
    assert torch.equal(condition.context, torch.cat([uncond.context, cond.context]))
    assert condition.vector is condition.guidance is None


@pytest.mark.parametrize("batched", [True, False])
def test_three_conditions_follow_the_rule_of_instruct_pix2pix(batched):
    network, z, timesteps = Convolution(), draw(2, 4, 8, 8), torch.tensor([3.0, 900.0])
    given = conditions(3)

    def rule(predictions):  # Brooks et al. 2023, eq. 3
        full, image, uncond = predictions
        return uncond + 1.5 * (image - uncond) + 7.5 * (full - image)

    ours = guided(network.bind, given, rule, batched=batched)(z, timesteps)
    assert len(network.calls) == (1 if batched else 3)
    full, image, uncond = separately(network, given, z, timesteps)
    expected = uncond + 1.5 * (image - uncond) + 7.5 * (full - image)
    # fp32; a convolution may sum a batch of six in another order
    assert (ours - expected).abs().max() < 2e-6 * expected.abs().max()
    for swapped in (given[::-1], [given[1], given[0], given[2]]):  # so that a wrong order would be seen
        other = guided(network.bind, swapped, rule, batched=batched)(z, timesteps)
        assert (other - expected).abs().max() > 0.1


@pytest.mark.parametrize("batched", [True, False])
def test_one_condition_is_one_call_without_the_rule(batched):
    def rule(predictions):
        raise AssertionError("called")

    network, z, timesteps = Convolution(), draw(2, 4, 8, 8), torch.tensor([3.0, 900.0])
    (only,) = conditions(1)
    prediction = guided(network.bind, [only], rule, batched=batched)(z, timesteps)
    assert len(network.calls) == 1
    assert torch.equal(prediction, network.bind(only)(z, timesteps))


def test_guidance_of_no_condition_is_refused():
    with pytest.raises(ValueError, match="one condition or more, got none"):
        guided(Convolution().bind, [], classifier_free(2.0))


def test_contexts_of_different_lengths_work_in_two_calls():
    network, z, timesteps = Convolution(), draw(2, 4, 8, 8), torch.tensor([3.0, 900.0])
    cond, uncond = Condition(draw(2, 10, 3, seed=1)), Condition(draw(2, 5, 3, seed=2))
    rule = classifier_free(2.0)
    assert guided(network.bind, [cond, uncond], rule, batched=False)(z, timesteps).shape == z.shape
    with pytest.raises(ValueError, match=r"a context of one shape, got \[\(5, 3\), \(10, 3\)\]; use batched=False"):
        guided(network.bind, [cond, uncond], rule)
    pooled = Condition(uncond.context, draw(2, 6))
    with pytest.raises(ValueError, match=r"a vector of one shape, got \[\(6,\), None\]; use batched=False"):
        guided(network.bind, [uncond, pooled], rule)


@pytest.mark.parametrize(("n", "batched", "bound"), [(1, True, 1), (2, True, 1), (2, False, 2)])
def test_each_condition_is_bound_once_for_all_calls(n, batched, bound):
    network, z, timesteps = Convolution(), draw(2, 4, 8, 8), torch.tensor([3.0, 900.0])
    predict = guided(network.bind, conditions(n), classifier_free(2.0), batched=batched)
    first, *others = [predict(z, timesteps) for _ in range(3)]
    assert all(torch.equal(first, other) for other in others)
    assert len(network.bound) == bound
    assert len(network.calls) == 3 * bound


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_of_a_half_precision_network_is_summed_in_fp32(batched):
    network, z, timesteps = Convolution(), draw(1, 4, 8, 8), torch.tensor([500.0])
    given = conditions(images=1)
    half = guided(network.bind, given, classifier_free(12.0), batched=batched)(z.bfloat16(), timesteps)
    with_text, without = (p.float() for p in separately(network, given, z.bfloat16(), timesteps))
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
    ("scale", "rescale", "message"),
    [
        (-1.0, 0.0, "scale must be 0 or more, got -1.0"),
        (math.nan, 0.0, "scale must be 0 or more, got nan"),
        (2.0, 1.5, r"rescale must lie in 0 \.\. 1, got 1.5"),
        (2.0, -0.1, r"rescale must lie in 0 \.\. 1, got -0.1"),
    ],
)
def test_guidance_that_cannot_be_is_refused(scale, rescale, message):
    with pytest.raises(ValueError, match=message):
        classifier_free(scale, rescale)


def test_classifier_free_guidance_of_three_conditions_is_refused():
    with pytest.raises(ValueError, match="combines 2 conditions, not 3: give another rule"):
        classifier_free(2.0)([torch.zeros(1)] * 3)
