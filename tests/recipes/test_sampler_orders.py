"""The measured orders are those of the methods, against the exact law of Gaussians and the exact ODE of a mixture."""

import re

import pytest
import torch

from ldm.diffusion.samplers import SAMPLERS, seeded_noise
from ldm.diffusion.schedule import NoiseSchedule
from scripts.recipes.sampler_orders import CALLS, STD, distance, error, gaussian, orders, sampled
from tests.recipes.mains import printed
from tests.reference.diffusion_papers import Mixture

SCHEDULE, MIXTURE = NoiseSchedule(), Mixture()
NOISE = torch.linspace(-1.5, 1.5, 16, dtype=torch.float64).reshape(1, 1, 4, 4)


ORDERS = {name: 2 if name in ("heun", "dpmpp_2m", "dpmpp_2m_sde") else 1 for name in SAMPLERS if name != "lcm"}


@pytest.mark.parametrize("name", ORDERS)
def test_the_law_of_each_sampler_converges_to_that_of_the_gaussian_with_the_order_of_its_method(name):
    calls = [128, 256]
    found = [distance(gaussian, SCHEDULE, name, n) for n in calls]
    assert 1e-6 < found[1] < 0.02
    assert orders(found, calls)[0] == pytest.approx(ORDERS[name], abs=0.05)


def test_lcm_needs_a_consistency_function_and_has_no_error_with_the_exact_one():
    assert distance(lambda x, sigma: STD / (STD**2 + sigma**2).sqrt() * x, SCHEDULE, "lcm", 8) < 1e-12
    assert distance(gaussian, SCHEDULE, "lcm", 64) > 0.2


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_law_is_that_of_many_samples(name):
    """64,000 samples of each of three widths; their deviations have errors of 0.3 %."""
    steps, many = 16 // CALLS.get(name, 1), 64_000
    sigmas, noise = SCHEDULE.steps(steps + 1, "exponential")[:-1], seeded_noise([0], (many, 3))
    x = noise()[0].double() * (STD**2 + sigmas[0] ** 2).sqrt()
    *_, last = SAMPLERS[name](gaussian, x, sigmas, noise=lambda: noise()[0].double())
    exact = (STD**2 + sigmas[-1] ** 2).sqrt()
    found = (last.x.std(dim=0) - exact).norm() / exact.norm()
    assert distance(gaussian, SCHEDULE, name, 16) == pytest.approx(float(found), abs=0.006)


def test_the_law_of_samplers_of_the_ode_has_the_error_of_x():
    x = seeded_noise([0], (64_000, 3))().double()
    for name, each in CALLS.items():
        found = sampled(gaussian, x, SCHEDULE, name, 16 // each)
        sigmas = SCHEDULE.sigmas[[0, -1]][:, None]
        low, high = (STD**2 + sigmas**2).sqrt()
        exact = x * (1 + float(sigmas[1]) ** 2) ** 0.5 * low / high
        assert distance(gaussian, SCHEDULE, name, 16) == pytest.approx(
            float((found - exact).norm() / exact.norm()), rel=0.02
        )


@pytest.mark.parametrize("name", CALLS)
def test_on_a_mixture_the_error_of_x_falls_with_the_order_of_the_method(name):
    high, low = float(SCHEDULE.sigmas[-1]), float(SCHEDULE.sigmas[0])
    exact = MIXTURE.quantile(MIXTURE.cdf(NOISE * (1 + high**2) ** 0.5, high), low)
    found = [error(MIXTURE.denoise, NOISE, SCHEDULE, name, n, exact) for n in (160, 320)]
    assert orders(found, [160, 320])[0] == pytest.approx(ORDERS[name], abs=0.2 * ORDERS[name])


def test_the_command_prints_a_line_for_each_sampler_and_makes_a_plot(pipe, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    words = "--calls", "2", "4", "--reference", "6"
    text = printed("sampler_orders", monkeypatch, capsys, tmp_path / "out.png", *words, pipe=pipe)
    assert re.findall(r"^(\w+) +\d\.\d{4} +\d\.\d{4} \(order -?\d+\.\d\) *$", text, re.MULTILINE) == [*SAMPLERS, *CALLS]


@pytest.mark.slow
def test_on_the_bundled_model_heun_and_dpmpp_2m_are_nearer_than_euler(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    text = printed("sampler_orders", monkeypatch, capsys, tmp_path / "out.png")
    _, model = text.split("model")
    last = {line.split()[0]: float(line.split()[-3]) for line in model.splitlines()[1:]}  # error (order p)
    assert max(last["heun"], last["dpmpp_2m"]) < last["euler"]
