"""The inversions come back to the picture, and the fixed point is the exact one of a solvable problem."""

import re

import pytest
import torch

from ldm.diffusion.inversion import invert
from ldm.diffusion.samplers import ddim, ddpm
from ldm.diffusion.schedule import NoiseSchedule
from scripts.recipes.inversion import invert_edit_friendly, invert_fixed_point
from tests.recipes.mains import printed
from tests.reference.diffusion_papers import Mixture

SCHEDULE, MIXTURE = NoiseSchedule(), Mixture()
X = torch.linspace(-1.8, 1.5, 24, dtype=torch.float64).reshape(2, 3, 2, 2)


def falling(steps):
    return SCHEDULE.steps(steps + 1, "exponential")[:-1]


def back(x, sigmas):
    *_, last = ddim(MIXTURE.denoise, x, sigmas)
    return (last.x - X).abs().max().item()


@pytest.mark.parametrize("steps", [20, 40])
def test_more_iterations_of_the_fixed_point_bring_ddim_closer_to_the_picture(steps):
    sigmas, errors = falling(steps), []
    for iterations in (0, 3, 9, 100):
        *_, last = invert_fixed_point(MIXTURE.denoise, X, sigmas.flip(0), iterations=iterations)
        errors.append(back(last.x, sigmas))
    print(errors)
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[3] < 1e-9


def test_without_iterations_the_fixed_point_is_the_librarys_inversion():
    sigmas = falling(15).flip(0)
    ours = list(invert_fixed_point(MIXTURE.denoise, X, sigmas, iterations=0))
    theirs = list(invert(MIXTURE.denoise, X, sigmas))
    assert [step.sigma for step in ours] == [step.sigma for step in theirs]
    assert all(torch.equal(a.x, b.x) for a, b in zip(ours, theirs, strict=True))


def test_ddpm_comes_back_exactly_with_the_noise_of_the_edit_friendly_inversion():
    generator = torch.Generator().manual_seed(0)
    sigmas = falling(6)
    x, noises = invert_edit_friendly(
        MIXTURE.denoise, X, sigmas, lambda: torch.randn(X.shape, generator=generator, dtype=torch.float64)
    )
    drawn = torch.randn(X.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(x, X + sigmas[0] * drawn)  # the definition: x0 and noise of its own
    assert len(noises) == 6
    *_, last = ddpm(MIXTURE.denoise, x, sigmas, noise=iter(noises).__next__)
    assert (last.x - X).abs().max() < 1e-9
    *_, other = ddpm(MIXTURE.denoise, x, sigmas, noise=iter(noises[::-1]).__next__)
    assert (other.x - X).abs().max() > 0.1


def errors(text):
    found = re.findall(r"(\d+) steps: DDIM ([\d.]+), fixed point ([\d.]+), edit-friendly ([\d.]+)\n", text)
    assert len(found) == len(text.splitlines())
    return [[float(number) for number in row] for row in found]


def test_the_command_prints_the_errors_and_makes_a_picture(pipe, tmp_path, monkeypatch, capsys):
    text = printed("inversion", monkeypatch, capsys, tmp_path / "out.png", "--steps", "1", "2", pipe=pipe)
    rows = errors(text)
    assert [row[0] for row in rows] == [1, 2]
    assert all(row[3] < 1e-3 for row in rows)


@pytest.mark.slow
def test_on_the_bundled_model_the_error_falls_with_the_steps_and_with_the_fixed_point(tmp_path, monkeypatch, capsys):
    rows = errors(printed("inversion", monkeypatch, capsys, tmp_path / "out.png"))
    assert rows[0][1] > rows[1][1] > rows[2][1]
    assert rows[2][2] < rows[2][1]
