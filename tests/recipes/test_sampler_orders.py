"""The measured orders are those of the methods, against the exact solution of a mixture's ODE."""

import re

import pytest
import torch

from ldm.diffusion.schedule import NoiseSchedule
from scripts.recipes.sampler_orders import CALLS, errors, orders, sampled
from tests.recipes.mains import printed
from tests.reference.diffusion_papers import Mixture

SCHEDULE, MIXTURE = NoiseSchedule(), Mixture()
NOISE = torch.linspace(-1.5, 1.5, 16, dtype=torch.float64).reshape(1, 1, 4, 4)


def test_euler_is_of_order_1_and_heun_and_dpmpp_2m_are_of_order_2():
    calls = [160, 320]
    found = errors(MIXTURE.denoise, NOISE, SCHEDULE, calls, reference=600)
    measured = {name: orders(found[name], calls)[0] for name in CALLS}
    print(measured)
    assert measured["euler"] == pytest.approx(1, abs=0.2)
    assert measured["heun"] == pytest.approx(2, abs=0.4)
    assert measured["dpmpp_2m"] == pytest.approx(2, abs=0.4)


def test_the_error_is_that_against_the_exact_solution():
    high, low = float(SCHEDULE.sigmas[-1]), float(SCHEDULE.sigmas[0])
    x = NOISE * (1 + high**2) ** 0.5
    exact = MIXTURE.quantile(MIXTURE.cdf(x, high), low)
    found = errors(MIXTURE.denoise, NOISE, SCHEDULE, [20], reference=600)
    for name, each in CALLS.items():
        x = sampled(MIXTURE.denoise, NOISE, SCHEDULE, name, 20 // each)
        assert found[name][0] == pytest.approx(float((x - exact).norm() / exact.norm()), rel=0.05)


def test_the_command_prints_a_line_for_each_sampler_and_makes_a_plot(pipe, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    words = "--calls", "2", "4", "--reference", "6"
    text = printed("sampler_orders", monkeypatch, capsys, tmp_path / "out.png", *words, pipe=pipe)
    lines = re.findall(r"^(\w+): 2 calls \d+\.\d{4}, 4 calls \d+\.\d{4} \(order -?\d+\.\d\)$", text, re.MULTILINE)
    assert lines == list(CALLS)


@pytest.mark.slow
def test_on_the_bundled_model_heun_and_dpmpp_2m_are_nearer_than_euler(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    text = printed("sampler_orders", monkeypatch, capsys, tmp_path / "out.png")
    last = {line.split(":")[0]: float(re.search(r"64 calls ([\d.]+)", line)[1]) for line in text.splitlines()}
    assert max(last["heun"], last["dpmpp_2m"]) < last["euler"]
