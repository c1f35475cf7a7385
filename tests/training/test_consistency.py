"""Consistency objectives: their points, targets and weights against the papers, and students that learn a known f."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from ldm.checkpoint.parts import Model
from ldm.config import DiffusionConfig
from ldm.diffusion.schedule import NoiseSchedule, to_vp
from ldm.models.unet import UNet
from ldm.training.adapters import LoraConfig
from ldm.training.consistency import Pairs
from ldm.training.consistency_models import (
    ConsistencyDistillation,
    ConsistencyTraining,
    DistillationLoss,
    TrainingLoss,
    chances,
    karras_levels,
    number_of_levels,
)
from ldm.training.lcm import LCMLoraObjective, LCMLoss, LCMObjective
from ldm.training.recipes.consistency import with_guidance
from ldm.training.recipes.lora import new_adapters
from tests.reference import diffusion_papers as papers
from tests.tiny import TINY_RANDOM, random_networks

CAPTIONS = ["a frog", "an apple", "a car"]
SIGMAS = [math.sqrt((1 - a) / a) for a in papers.alphas_bar()]


def model(prediction="v"):
    config = dataclasses.replace(TINY_RANDOM, diffusion=DiffusionConfig(prediction=prediction))
    return Model(config, *random_networks(config))


def perturbed(unet, seed=2):
    """Another UNet of the same architecture: the student after some training."""
    torch.manual_seed(seed)
    for weight in [*unet.parameters(), *unet.buffers()]:  # of a student, of a target
        weight.data += 0.02 * torch.randn_like(weight)
    return unet.requires_grad_(True)


def lcm(prediction="v", *, embedded=True, **loss):
    teacher = model(prediction)
    student = perturbed(with_guidance(teacher.unet) if embedded else UNet(teacher.config.unet))
    return LCMObjective(teacher, student, LCMLoss(**{"guidance": (2.0, 6.0), **loss}), embedded=embedded)


def distillation(prediction="v", **loss):
    teacher = model(prediction)
    return ConsistencyDistillation(teacher, perturbed(UNet(teacher.config.unet)), DistillationLoss(**loss))


def training(prediction="v", steps=100, **loss):
    teacher = model(prediction)
    return ConsistencyTraining(teacher, perturbed(UNet(teacher.config.unet)), TrainingLoss(**loss), steps=steps)


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, 32, 32, generator=generator) * 2 - 1, CAPTIONS


def observed(objective):
    """Compute in fp64, and return a dict that receives the arguments of `lower`, its result and the condition."""
    objective.double()
    seen, lower, given = {}, objective.lower, objective.given
    objective.latents = lambda images: torch.randn(3, 4, 8, 8, dtype=torch.float64)

    def remember(x, x0, noise, pairs, teacher):
        seen.update(x0=x0, noise=noise, pairs=pairs, lower=lower(x, x0, noise, pairs, teacher))
        return seen["lower"]

    def condition(captions, *rest):
        seen.update(given=given(captions, *rest), scales=rest[0])
        return seen["given"]

    objective.lower, objective.given = remember, condition
    return seen


def timestep(sigma):
    """The timestep of a level, linear in its logarithm between those of the table, by bisection of the list."""
    high = next((t for t, s in enumerate(SIGMAS) if s >= float(sigma) * (1 - 1e-12)), len(SIGMAS) - 1)
    if high == 0 or abs(SIGMAS[high] - float(sigma)) < 1e-12 * float(sigma):
        return float(high)
    low, up = math.log(SIGMAS[high - 1]), math.log(SIGMAS[high])
    return high - (up - math.log(float(sigma))) / (up - low)


def estimate(network, z, sigma, kind, context, guidance=None):
    """x0 and eps of one image from a network, by the papers' formulas: z = sqrt(a) x0 + sqrt(1 - a) eps."""
    t, a = torch.tensor([timestep(sigma)], dtype=torch.float64), 1 / (1 + float(sigma) ** 2)
    with torch.no_grad():
        out = network(z[None], t, context[None], guidance=guidance)[0]
    if kind == "eps":
        return papers.predicted_x0(z, out, a), out
    if kind == "v":
        return math.sqrt(a) * z - math.sqrt(1 - a) * out, math.sqrt(a) * out + math.sqrt(1 - a) * z
    return out, (z - math.sqrt(a) * out) / math.sqrt(1 - a)


def f(network, z, sigma, kind, context, guidance=None):
    """Luo et al. 2023, eq. 9: c_skip z + c_out x0 of one image."""
    s = 10 * timestep(sigma)
    x0, _ = estimate(network, z, sigma, kind, context, guidance)
    return 0.25 / (s**2 + 0.25) * z + s / math.sqrt(s**2 + 0.25) * x0


@pytest.mark.parametrize(("make", "prediction"), [(lcm, "eps"), (distillation, "v"), (training, "eps")])
def test_at_the_lowest_level_f_returns_its_input_exactly_whatever_the_weights(make, prediction):
    objective = make(prediction)
    x = torch.randn(3, 4, 8, 8)
    lowest = objective.schedule.sigmas[:1].expand(3)
    given = objective.given(CAPTIONS, torch.full((3,), 3.0), (32, 32))
    with torch.no_grad():
        found = objective.function(objective.student, given)
        assert torch.equal(found(x, lowest), to_vp(x, lowest))
        assert not torch.allclose(found(x, 40 * lowest), to_vp(x, 40 * lowest), atol=0.01)


@pytest.mark.parametrize(("prediction", "huber_c"), [("eps", 0.0), ("v", 0.001)])
def test_the_loss_of_latent_consistency_distillation_is_that_of_the_paper(prediction, huber_c):
    o = lcm(prediction, huber_c=huber_c, target_ema=0.9)
    perturbed(o.target, seed=3)
    seen = observed(o)
    torch.manual_seed(1)
    loss, logs = o(batch())

    empty = o.networks.text_encoder.encode([""]).context[0]
    total = []
    for i, (high, low) in enumerate(zip(seen["pairs"].high, seen["pairs"].low, strict=True)):
        context, w = seen["given"].context[i], seen["scales"][i] - 1
        assert 1 <= w <= 5
        t, t_low = round(timestep(high)), round(timestep(low))
        assert ((t + 1) % 20, t_low) == (0, max(t - 20, 0))
        a, a_low = 1 / (1 + float(high) ** 2), 1 / (1 + float(low) ** 2)
        z = math.sqrt(a) * seen["x0"][i] + math.sqrt(1 - a) * seen["noise"][i]
        unet = o.networks.unet
        _, cond = estimate(unet, z, high, prediction, context)
        _, uncond = estimate(unet, z, high, prediction, empty)
        eps = (1 + w) * cond - w * uncond  # eq. 6
        z_low = papers.ddim(z, eps, 0, a, a_low, 0)
        torch.testing.assert_close(to_vp(seen["lower"][i], low), z_low, rtol=1e-9, atol=1e-9)
        difference = f(o.student, z, high, prediction, context, w[None])
        difference = difference - f(o.target, z_low, low, prediction, context, w[None])
        distance = (difference**2 + huber_c**2).sqrt() - huber_c if huber_c else difference**2
        total.append(distance.mean())
    torch.testing.assert_close(loss, sum(total) / 3, rtol=1e-7, atol=0)
    assert torch.equal(logs["distance"], loss)


def test_an_lcm_lora_learns_as_a_student_with_its_merged_weights_from_the_unet_without_it():
    teacher, loss = model(), LCMLoss(guidance=(3.0, 3.0))
    before = copy.deepcopy(teacher.unet)
    adapters = new_adapters(teacher, LoraConfig(rank=2, alpha=4.0, targets=("to_q", "to_k", "conv1")))
    perturbed(adapters)
    o = LCMLoraObjective(teacher, adapters, loss)
    merged = copy.deepcopy(before).requires_grad_(True)
    for target, change in adapters.changes().items():
        weight = merged.get_parameter(f"{target.layer}.weight")
        moved = change.of("weight", weight.detach())
        assert moved.abs().max() > 1e-3
        weight.data += moved
    plain = Model(teacher.config, before, teacher.vae, teacher.text_encoder)
    expected = LCMObjective(plain, merged, dataclasses.replace(loss, target_ema=0.0), embedded=False)
    losses = []
    for each in (o, expected):
        torch.manual_seed(1)
        losses.append(each(batch())[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    losses[0].backward()
    assert {name.split(".")[0] for name, p in o.named_parameters() if p.grad is not None} == {"student"}

    pictures = o.sample(batch())
    assert o.sample(batch()).equal(pictures)
    for parameter in adapters.parameters():
        parameter.data.zero_()
    without = o.sample(batch())
    expected.student = before
    torch.testing.assert_close(without, expected.sample(batch()))
    assert (without - pictures).abs().max() > 0.01
    with pytest.raises(ValueError, match=r"one guidance scale: give it twice, got \(2.0, 3.0\)"):
        LCMLoraObjective(teacher, adapters, LCMLoss(guidance=(2.0, 3.0)))


def test_the_loss_of_consistency_distillation_is_that_of_the_paper():
    o = distillation("v", guidance_scale=3.0, levels=7)
    perturbed(o.target, seed=3)
    seen = observed(o)
    torch.manual_seed(1)
    loss, _ = o(batch())
    low, high = SIGMAS[0] ** (1 / 7), SIGMAS[-1] ** (1 / 7)
    levels = [(low + i / 6 * (high - low)) ** 7 for i in range(7)]
    empty, total = o.networks.text_encoder.encode([""]).context[0], 0.0
    for i in range(3):
        context = seen["given"].context[i]
        high, low = float(seen["pairs"].high[i]), float(seen["pairs"].low[i])
        (n,) = (n for n in range(6) if levels[n] == pytest.approx(low))
        assert levels[n + 1] == pytest.approx(high)

        def denoise(x, sigma, context=context):
            z = x / math.sqrt(1 + sigma**2)
            cond, uncond = (estimate(o.networks.unet, z, sigma, "v", each)[0] for each in (context, empty))
            return uncond + 3 * (cond - uncond)

        x = seen["x0"][i] + high * seen["noise"][i]
        x_low = papers.edm_heun(x, denoise, high, low)
        torch.testing.assert_close(seen["lower"][i], x_low, rtol=1e-9, atol=1e-9)
        ours = f(o.student, x / math.sqrt(1 + high**2), high, "v", context)
        difference = ours - f(o.target, x_low / math.sqrt(1 + low**2), low, "v", context)
        c = 0.00054 * math.sqrt(4 * 8 * 8)
        total += (difference.square().sum() + c**2).sqrt() - c
    torch.testing.assert_close(loss, total / 3, rtol=1e-7, atol=0)


def test_consistency_training_uses_one_noise_for_both_points_and_weighs_by_their_distance():
    o = training("v", first_levels=4, last_levels=64)
    seen = observed(o)
    torch.manual_seed(1)
    loss, logs = o(batch())
    total = 0.0
    for i in range(3):
        high, low = float(seen["pairs"].high[i]), float(seen["pairs"].low[i])
        points = [(seen["x0"][i] + s * seen["noise"][i]) / math.sqrt(1 + s**2) for s in (high, low)]
        torch.testing.assert_close(to_vp(seen["lower"][i], low), points[1], rtol=1e-9, atol=1e-9)
        context = seen["given"].context[i]
        difference = f(o.student, points[0], high, "v", context) - f(o.student, points[1], low, "v", context)
        c = 0.00054 * math.sqrt(4 * 8 * 8)
        total += ((difference.square().sum() + c**2).sqrt() - c) / (high - low)
    torch.testing.assert_close(loss, total / 3, rtol=1e-7, atol=0)
    assert logs["distance"] < loss  # the levels are closer than 1 almost everywhere


def test_the_number_of_levels_doubles_as_in_the_paper():
    # 400,000 steps: s0 = 10 and s1 = 1280 give 8 stages of 50,000 steps
    found = [number_of_levels(k, 400_000, 10, 1280) for k in range(0, 400_001, 25_000)]
    doubled = [10, 20, 40, 80, 160, 320, 640, 1280]
    assert found == [n + 1 for n in doubled for _ in range(2)] + [1281]
    assert number_of_levels(7, 9, 5, 5) == 6


def test_the_chance_of_a_pair_is_the_share_of_the_normal_distribution_between_its_levels():
    levels = karras_levels(NoiseSchedule(), 12)
    normal = torch.distributions.Normal(torch.tensor(-1.1).double(), torch.tensor(2.0).double())
    share = normal.cdf(levels.log()).diff()
    torch.testing.assert_close(chances(levels, -1.1, 2.0), share / share.sum())


def test_the_target_is_the_average_of_the_student_after_each_step():
    o = lcm(target_ema=0.9)
    o.accumulate = 2
    first = o.student.conv_out.bias.detach().clone()
    expected = first.clone()
    for _ in range(3):
        o(batch())
        o(batch())
        torch.testing.assert_close(o.target.conv_out.bias, expected)
        o.student.conv_out.bias.data += 1
        expected = 0.9 * expected + 0.1 * o.student.conv_out.bias.detach()
    assert o.steps_done == 3
    assert not torch.allclose(o.target.conv_out.bias, first)


@pytest.mark.parametrize("make", [lcm, training])
def test_only_the_student_learns_and_bfloat16_leaves_it_its_gradient(make):
    o = make() if make is training else make(target_ema=0.0)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = o(batch())
    loss.backward()
    learning = {name.split(".")[0] for name, p in o.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"student"}
    assert o.student.conv_out.weight.grad.any()
    assert o.student.down[1].res.conv1.weight.grad.any()


class GaussianUNet(nn.Module):
    """Predicts v exactly for latents that are normal with the deviation `std`, at any timestep and condition."""

    std = 0.7

    def bind(self, condition):
        def predict(z, timesteps):
            sigma = levels_of(timesteps).to(z).reshape(-1, 1, 1, 1)
            x0 = z * (1 + sigma**2).sqrt() * self.std**2 / (self.std**2 + sigma**2)
            return (z / (1 + sigma**2).sqrt() - x0) * (1 + sigma**2).sqrt() / sigma

        return predict


def levels_of(timesteps):
    """The inverse of `timestep`."""
    logs = torch.tensor(SIGMAS, dtype=torch.float64).log()
    low = timesteps.double().floor().long().clamp(max=len(logs) - 2)
    return torch.lerp(logs[low], logs[low + 1], timesteps.double() - low).exp()


class Gains(nn.Module):
    """A student with one number for each of a few levels: v = gain z."""

    def __init__(self, schedule, levels):
        super().__init__()
        self.timesteps = schedule.timestep(levels)
        self.gains = nn.Parameter(torch.zeros(len(levels)))

    def forward(self, z, timesteps, *rest):
        index = (timesteps[:, None].double() - self.timesteps).abs().argmin(1)
        return self.gains[index].reshape(-1, 1, 1, 1) * z


def gaussian(make, levels):
    plain = model()
    fixed = Model(plain.config, GaussianUNet(), plain.vae, plain.text_encoder)
    student = Gains(NoiseSchedule(), levels)
    objective = make(fixed, student)
    objective.latents = lambda images: GaussianUNet.std * torch.randn(64, 4, 2, 2)
    encoded = objective.given(["a frog"] * 64, torch.ones(64), (32, 32))
    objective.given = lambda *args: encoded
    return objective


def truth(sigma):
    """How much f scales x: the path of a normal distribution keeps x / sqrt(std^2 + sigma^2)."""
    end = SIGMAS[0]
    return math.sqrt((GaussianUNet.std**2 + end**2) / (GaussianUNet.std**2 + sigma**2)) / math.sqrt(1 + end**2)


def gain(sigma, scale):
    """The student's gain with which f scales x by `scale`."""
    a, s = 1 / (1 + sigma**2), 10 * timestep(sigma)
    x0 = scale / math.sqrt(a) if s == 0 else (scale / math.sqrt(a) - 0.25 / (s**2 + 0.25)) / (s / math.hypot(s, 0.5))
    return (math.sqrt(a) - x0) / math.sqrt(1 - a)


CASES = {  # levels, the objective, and how far its solver's steps may miss the true path
    "distillation": (
        karras_levels(NoiseSchedule(), 18),
        lambda *args: ConsistencyDistillation(*args, DistillationLoss(huber_c=0.0, target_ema=0.0)),
        0.02,
    ),
    "lcm": (
        NoiseSchedule().sigma(torch.tensor([0, *range(19, 1000, 20)])),
        lambda *args: LCMObjective(*args, LCMLoss(guidance=(1.0, 1.0), huber_c=0.0, target_ema=0.0), embedded=False),
        0.04,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_of_normal_data_the_known_path_has_no_loss_and_another_one_has(name):
    levels, make, error = CASES[name]
    objective, count = gaussian(make, levels), len(levels) - 1
    pairs = Pairs(high=levels[1:], low=levels[:-1], weight=torch.ones(count))
    x, given = torch.ones(count, 4, 2, 2, dtype=torch.float64), objective.given()
    with torch.no_grad():
        steps = objective.lower(x, x, x, pairs, objective.teacher(given, torch.ones(count), (32, 32)))[:, 0, 0, 0]
    scales = [1 / math.sqrt(1 + SIGMAS[0] ** 2)]
    for step in steps.tolist():
        scales.append(scales[-1] * step)  # from the lowest level up: the steps below, then the boundary
    expected = [truth(float(level)) for level in levels]
    assert max(abs(s / e - 1) for s, e in zip(scales, expected, strict=True)) < error
    assert expected[-1] < 0.06  # the path is long

    def loss(scales):
        gains = [gain(float(level), scale) for level, scale in zip(levels, scales, strict=True)]
        objective.student.gains.data = torch.tensor(gains)
        torch.manual_seed(0)
        return objective((torch.zeros(64, 3, 32, 32), ["a frog"] * 64))[0].item()

    exact, near, far = loss(scales), loss(expected), loss([scales[0], *(1.1 * s for s in scales[1:])])
    print(exact, near, far)
    assert exact < 1e-9  # fp32
    assert near < 0.2 * far


@pytest.mark.slow
def test_a_student_of_normal_data_learns_the_known_path():
    levels, make, _ = CASES["distillation"]
    objective = gaussian(make, levels)
    optimizer, steps = torch.optim.Adam(objective.student.parameters()), 600
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        optimizer.zero_grad()
        objective((torch.zeros(64, 3, 32, 32), ["a frog"] * 64))[0].backward()
        optimizer.step()
    with torch.no_grad():
        x = torch.ones(len(levels), 4, 2, 2)
        found = objective.function(objective.student, objective.given())(x, levels)[:, 0, 0, 0]
    expected = torch.tensor([truth(float(level)) for level in levels])
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("make", [lcm, distillation, training])
def test_each_loss_falls_in_a_few_steps(make):
    objective = make()
    objective.target_ema = 0.5
    optimizer = torch.optim.Adam(objective.student.parameters(), lr=2e-3)
    values = []
    for _ in range(12):
        torch.manual_seed(0)
        loss, _ = objective(batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    print(values)
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LCMLoss(guidance=(3.0,)), r"guidance must be the least and the largest scale, from 1, got \(3.0,\)"),
        (lambda: LCMLoss(guidance=(4.0, 2.0)), r"guidance must be .* got \(4.0, 2.0\)"),
        (lambda: LCMLoss(skip=0), "skip must be at least 1 timestep, got 0"),
        (lambda: LCMLoss(huber_c=-1), "huber_c must be at least 0, got -1"),
        (lambda: LCMLoss(target_ema=1.0), "target_ema must be at least 0 and less than 1, got 1.0"),
        (lambda: lcm(skip=1000), "skip must be less than the 1000 timesteps, got 1000"),
        (lambda: DistillationLoss(levels=1), "levels must be at least 2, got 1"),
        (lambda: DistillationLoss(guidance_scale=-1), "guidance_scale must be at least 0, got -1"),
        (lambda: TrainingLoss(first_levels=20, last_levels=10), "at least 2 and at most last_levels, got 20 and 10"),
        (lambda: TrainingLoss(log_std=0), "log_std must be above 0, got 0"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
