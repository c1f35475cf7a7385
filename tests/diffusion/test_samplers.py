"""The samplers against the papers' alpha-bar forms, a solvable problem and diffusers."""

import math
from itertools import pairwise

import diffusers
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from ldm.diffusion.consistency import consistency
from ldm.diffusion.denoiser import parametrize
from ldm.diffusion.inversion import invert
from ldm.diffusion.samplers import (
    CONVENTIONS,
    SAMPLERS,
    Conventions,
    conventions,
    ddim,
    ddpm,
    options,
    seeded_noise,
    start,
)  # fmt: skip
from ldm.diffusion.schedule import NoiseSchedule, to_ve, to_vp
from tests.reference import diffusion_papers as papers

SCHEDULE = NoiseSchedule()
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DETERMINISTIC = ("euler", "ddim", "heun", "dpmpp_2m")
STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "lcm")
SHAPE = (4, 8, 8)

# diffusers hands its fp32 tables to numpy in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def network(z, timesteps):
    """A smooth nonlinear stand-in for a UNet, of z and t alone."""
    phase = (timesteps / 150).reshape(-1, 1, 1, 1)
    return torch.tanh(0.9 * z + 0.2 * z.flip(-1) + 0.5 * torch.sin(phase))


def noise64(seed=0):
    draw = seeded_noise([seed], SHAPE)
    return lambda: draw().double()


def walk(name, sigmas, *, denoise=None, seed=0, schedule=SCHEDULE, prediction="eps", **options):
    """All steps of a sampler in fp64, started from its own first draw."""
    denoise = denoise or parametrize(network, schedule, prediction)
    noise = noise64(seed)
    x = to_ve(noise(), sigmas[0])
    return list(SAMPLERS[name](denoise, x, sigmas, noise=noise, **options))


def largest(name, ours, theirs):
    """The largest difference relative to the largest value, printed for `pytest -s`."""
    difference = ((ours.double() - theirs.double()).abs().max() / theirs.abs().max()).item()
    print(f"\n  {name}: {difference:.1e}")
    return difference


def alpha_bar(sigmas):
    return [1 / (1 + sigma**2) for sigma in sigmas.tolist()]


# ------------------------------------------------------------------ the papers' own formulas


LISTS = [
    ("leading", 10, "zero"),
    ("leading", 10, "first"),
    ("trailing", 25, "zero"),
    ("trailing", 4, "first"),
    ("linspace", 28, "zero"),
    ("karras", 7, "zero"),
    ("leading", 2, "first"),
    ("trailing", 1, "zero"),
    ("trailing", 1, "first"),
    ("trailing", 1000, "zero"),
]


@pytest.mark.parametrize(("spacing", "n", "final"), LISTS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_equals_the_papers_alpha_bar_formula(spacing, n, final, eta):
    sigmas = SCHEDULE.steps(n, spacing, final=final)
    a, t = alpha_bar(sigmas), SCHEDULE.timestep(sigmas[:-1])
    noise = noise64()
    z = noise()
    worst = 0.0
    for i, step in enumerate(walk("ddim", sigmas, eta=eta)):
        drawn = noise() if eta and a[i + 1] < 1 else torch.zeros_like(z)
        z = papers.ddim(z, network(z, t[i : i + 1]), drawn, a[i], a[i + 1], eta)
        worst = max(worst, (to_vp(step.x, step.sigma) - z).abs().max().item())
    print(f"\n  ddim eta {eta}, {n} {spacing}, final {final}: {worst:.1e}")
    assert worst < 1e-10


@pytest.mark.parametrize(("spacing", "n", "final"), LISTS)
@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral"])
def test_ddpm_equals_the_papers_alpha_bar_formula(spacing, n, final, name):
    sigmas = SCHEDULE.steps(n, spacing, final=final)
    a, t = alpha_bar(sigmas), SCHEDULE.timestep(sigmas[:-1])
    noise = noise64()
    z = noise()
    worst = 0.0
    for i, step in enumerate(walk(name, sigmas)):
        drawn = noise() if a[i + 1] < 1 else torch.zeros_like(z)
        z = papers.ddpm(z, network(z, t[i : i + 1]), drawn, a[i], a[i + 1])
        worst = max(worst, (to_vp(step.x, step.sigma) - z).abs().max().item())
    print(f"\n  {name}, {n} {spacing}, final {final}: {worst:.1e}")
    assert worst < 1e-10


@pytest.mark.parametrize(("spacing", "n", "final"), LISTS)
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_dpmpp_equals_the_papers_lambda_formula(spacing, n, final, name):
    sigmas = SCHEDULE.steps(n, spacing, final=final)
    a, t = alpha_bar(sigmas), SCHEDULE.timestep(sigmas[:-1])
    noise = noise64()
    z = noise()
    estimates, worst = [], 0.0
    for i, step in enumerate(walk(name, sigmas)):
        estimates.append(papers.predicted_x0(z, network(z, t[i : i + 1]), a[i]))
        if name == "dpmpp_2m":
            z = papers.dpmpp_2m(z, estimates, a[: i + 2])
        else:
            drawn = noise() if a[i + 1] < 1 else torch.zeros_like(z)
            z = papers.dpmpp_2m_sde(z, estimates, a[: i + 2], drawn)
        worst = max(worst, (to_vp(step.x, step.sigma) - z).abs().max().item())
    print(f"\n  {name}, {n} {spacing}, final {final}: {worst:.1e}")
    assert worst < 1e-10


@pytest.mark.parametrize(("spacing", "n", "final"), LISTS)
def test_lcm_equals_the_papers_algorithm(spacing, n, final):
    sigmas = SCHEDULE.steps(n, spacing, final=final)
    a, t = alpha_bar(sigmas), SCHEDULE.timestep(sigmas[:-1])
    denoise = consistency(parametrize(network, SCHEDULE, "eps"), SCHEDULE)
    noise = noise64()
    z = noise()
    worst = 0.0
    for i, step in enumerate(walk("lcm", sigmas, denoise=denoise)):
        drawn = noise() if a[i + 1] < 1 else torch.zeros_like(z)
        z = papers.lcm(z, network(z, t[i : i + 1]), drawn, t[i].item(), a[i], a[i + 1])
        worst = max(worst, (to_vp(step.x, step.sigma) - z).abs().max().item())
    print(f"\n  lcm, {n} {spacing}, final {final}: {worst:.1e}")
    assert worst < 1e-10


@pytest.mark.parametrize(
    ("spacing", "n", "final"),
    [case for case in LISTS if case != ("trailing", 1, "first")],  # more than a hundredfold
)
def test_heun_equals_edm_algorithm_1(spacing, n, final):
    sigmas = SCHEDULE.steps(n, spacing, final=final)
    denoise = parametrize(network, SCHEDULE, "eps")
    x = to_ve(noise64()(), sigmas[0])
    worst = 0.0
    for i, step in enumerate(walk("heun", sigmas)):
        x = papers.edm_heun(x, denoise, sigmas[i], sigmas[i + 1])
        worst = max(worst, (to_vp(step.x, step.sigma) - to_vp(x, step.sigma)).abs().max().item())
    print(f"\n  heun, {n} {spacing}, final {final}: {worst:.1e}")
    assert worst < 1e-10


def test_a_sampler_under_two_names_is_the_same_sampler():
    sigmas = SCHEDULE.steps(12)
    for eta in (0.0, 0.4):
        same = (walk(name, sigmas, eta=eta)[-1].x for name in ("ddim", "euler_ancestral"))
        assert torch.equal(*same)
    full = walk("ddim", sigmas, eta=1.0)[-1].x
    assert torch.equal(walk("ddpm", sigmas)[-1].x, full)
    assert torch.equal(walk("euler_ancestral", sigmas)[-1].x, full)
    assert torch.equal(walk("euler", sigmas)[-1].x, walk("ddim", sigmas)[-1].x)


# ------------------------------------------------------------------ a problem with known answer


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_the_measured_order_of_convergence_is_the_theoretical_one(name, order):
    mixture = papers.Mixture()
    q = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    high, low = 20.0, 0.05
    start, exact = mixture.quantile(q, high), mixture.quantile(q, low)
    errors = []
    for n in (100, 200, 400, 800):
        sigmas = torch.linspace(high ** (1 / 7), low ** (1 / 7), n + 1, dtype=torch.float64) ** 7
        *_, last = SAMPLERS[name](mixture.denoise, start, sigmas, noise=None)
        errors.append((last.x - exact).abs().mean().item())
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    print(f"\n  {name}: errors {[f'{e:.1e}' for e in errors]}, orders {[f'{o:.2f}' for o in orders]}")
    assert orders[-1] == pytest.approx(order, abs=0.1)


def test_a_thousand_steps_of_stable_diffusion_reach_the_exact_answer():
    mixture = papers.Mixture()
    q = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    sigmas = SCHEDULE.steps(1000, "karras")
    start, exact = mixture.quantile(q, float(sigmas[0])), mixture.quantile(q, 0.0)
    for name, tolerance in (("euler", 5e-3), ("heun", 3e-3), ("dpmpp_2m", 3e-3)):
        *_, last = SAMPLERS[name](mixture.denoise, start, sigmas, noise=None)
        difference = (last.x - exact).abs().max().item()
        print(f"\n  {name}, 1000 karras steps, from exact: {difference:.1e}")
        assert difference < tolerance  # of order 2 what remains is the one step from 0.029 to 0


def marginal_variances(name, sigmas, std):
    """The variance of x after each step for data N(0, std^2), exactly, without sampling.

    With this data the denoiser is linear, so x is a linear combination of the initial noise and the
    draws. Element k of the state follows draw k alone; independent unit draws add their squares.
    """
    draws = iter(torch.eye(len(sigmas), dtype=torch.float64))

    def denoise(x, sigma):
        if name == "lcm":  # the exact consistency function: where the ODE's path ends
            return x * std / (std**2 + sigma**2).sqrt()
        return x * std**2 / (std**2 + sigma**2)

    x = next(draws) * (std**2 + sigmas[0] ** 2).sqrt()
    steps = SAMPLERS[name](denoise, x, sigmas, noise=lambda: next(draws))
    return torch.stack([step.x.square().sum() for step in steps])


@pytest.mark.parametrize(
    ("name", "order", "tolerance"),
    [
        ("ddpm", 1, 0.01),
        ("euler_ancestral", 1, 0.01),
        ("dpmpp_2m_sde", 2, 1e-4),
        ("lcm", 0, 1e-12),  # an exact consistency function leaves nothing to discretise
    ],
)
def test_sde_samplers_reproduce_the_known_marginal_variance(name, order, tolerance):
    std = 0.7
    errors = []
    for n in (250, 1000):
        sigmas = torch.linspace(20 ** (1 / 7), 0.05 ** (1 / 7), n + 1, dtype=torch.float64) ** 7
        known = std**2 + sigmas[1:] ** 2
        errors.append((marginal_variances(name, sigmas, std) / known - 1).abs().max().item())
    print(f"\n  {name}: relative error of the variance at any step {errors[0]:.1e}, {errors[1]:.1e}")
    assert errors[1] < tolerance  # of a thousand steps
    assert order == 0 or math.log(errors[0] / errors[1], 4) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral", "dpmpp_2m_sde"])
def test_sde_samplers_fill_both_modes_of_a_mixture_as_they_should(name):
    mixture = papers.Mixture()
    count = 20_000
    noise = seeded_noise([7], (count,))
    sigmas = SCHEDULE.steps(100, "karras")
    x = float(sigmas[0]) * noise().double()[0]
    *_, last = SAMPLERS[name](mixture.denoise, x, sigmas, noise=lambda: noise()[0])
    below = torch.tensor([-1.5, -1.0, 0.0, 0.6, 1.0], dtype=torch.float64)
    measured = (last.x[:, None] < below).double().mean(0)
    difference = (measured - mixture.cdf(below, 0.0)).abs().max().item()
    print(f"\n  {name}: largest difference of the distribution function {difference:.1e}")
    # four standard deviations of the count are 0.014; the discretisation of 100 steps takes the rest
    assert difference < 0.02


# ------------------------------------------------------------------ inversion


def gaussian(std):
    """The exact denoiser of data N(0, std^2)."""
    return lambda x, sigma: x * std**2 / (std**2 + float(sigma) ** 2)


def test_inversion_follows_the_exact_path_and_ddim_returns_to_the_start():
    std, low, high = 0.7, 0.05, 15.0
    x = draw = noise64()()
    exact = draw * math.sqrt((std**2 + high**2) / (std**2 + low**2))  # the ODE's path keeps x in proportion
    off, back = [], []
    for n in (50, 100, 200):
        sigmas = torch.linspace(low ** (1 / 7), high ** (1 / 7), n + 1, dtype=torch.float64) ** 7
        steps = list(invert(gaussian(std), x, sigmas))
        assert [step.sigma for step in steps] == sigmas[1:].tolist()
        assert [(step.index, step.total) for step in steps] == [(i, n) for i in range(n)]
        assert torch.equal(x, draw)
        noisy = steps[-1].x
        off.append(((noisy - exact).abs().max() / exact.abs().max()).item())
        *_, last = ddim(gaussian(std), noisy, sigmas.flip(0))
        back.append(((last.x - x).abs().max() / x.abs().max()).item())
    print(f"\n  inversion off the exact path: {off}, back at the start: {back}")
    for errors in (off, back):
        assert errors[-1] < 0.05
        # halved by twice the steps: both are Euler's method, of first order
        assert all(0.4 < b / a < 0.6 for a, b in pairwise(errors))


def test_inversion_of_a_network_returns_to_the_start():
    denoise = parametrize(network, SCHEDULE, "eps")
    x, back = noise64()(), []
    for n in (100, 200):
        sigmas = SCHEDULE.steps(n, "trailing")[:-1]
        *_, up = invert(denoise, x, sigmas.flip(0))
        *_, last = ddim(denoise, up.x, sigmas)
        back.append((last.x - x).abs().max().item())
    print(f"\n  inverted and sampled: {back}")
    assert 0 < back[1] < 0.6 * back[0]  # of first order


@pytest.mark.parametrize("sigmas", [[], [1.0], [2.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, math.inf], [1.0, math.nan]])
def test_levels_that_do_not_rise_are_refused_by_inversion(sigmas):
    with pytest.raises(ValueError, match="two or more strictly rising levels above 0, got"):
        next(invert(lambda x, sigma: x, torch.ones(1), torch.tensor(sigmas)))


# ------------------------------------------------------------------ diffusers' scheduler classes


def scheduler_walk(scheduler, x, sigma0, *, generator=None, **options):
    """What a diffusers pipeline does with a scheduler, from our x; returns its final latents."""
    exploding = "Euler" in type(scheduler).__name__ or "Heun" in type(scheduler).__name__
    sample = x if exploding else to_vp(x, sigma0)
    if generator is not None:
        options["generator"] = generator
    for t in scheduler.timesteps:
        prediction = network(scheduler.scale_model_input(sample, t), t.reshape(1).float())
        sample = scheduler.step(prediction, t, sample, **options, return_dict=False)[0]
    return sample


PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
EXACT = {"clip_sample": False}
CASES = [
    ("ddim", "DDIMScheduler", "leading", 10, "first", EXACT | {"set_alpha_to_one": False}),
    ("ddim", "DDIMScheduler", "trailing", 20, "zero", EXACT),
    ("ddpm", "DDPMScheduler", "leading", 10, "zero", EXACT),
    ("ddpm", "DDPMScheduler", "trailing", 20, "zero", EXACT),
    ("euler", "EulerDiscreteScheduler", "leading", 10, "zero", {}),
    ("euler", "EulerDiscreteScheduler", "trailing", 30, "zero", {}),
    ("euler", "EulerDiscreteScheduler", "linspace", 28, "zero", {}),
    ("euler_ancestral", "EulerAncestralDiscreteScheduler", "leading", 10, "zero", {}),
    ("euler_ancestral", "EulerAncestralDiscreteScheduler", "trailing", 4, "zero", {}),
    ("heun", "HeunDiscreteScheduler", "leading", 10, "zero", {}),
    ("heun", "HeunDiscreteScheduler", "trailing", 20, "zero", {}),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", "trailing", 10, "zero", {}),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", "trailing", 25, "zero", {}),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", "trailing", 20, "first", {"final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", "trailing", 20, "zero", {"algorithm_type": "sde-dpmsolver++"}),
]


@pytest.mark.parametrize(
    ("name", "reference", "spacing", "n", "final", "options", "prediction"),
    [
        (*case, prediction)
        for case in CASES
        for prediction in PREDICTIONS
        if not (prediction == "x0" and case[0] == "euler_ancestral")  # diffusers has not got it
    ],
)
def test_samplers_equal_diffusers_with_the_same_steps_and_seed(name, reference, spacing, n, final, options, prediction):
    theirs = getattr(diffusers, reference)(
        **STABLE_DIFFUSION, timestep_spacing=spacing, steps_offset=1, prediction_type=PREDICTIONS[prediction], **options
    )
    theirs.set_timesteps(n)
    sigmas = SCHEDULE.steps(n, spacing, final=final)
    noise = seeded_noise([42], SHAPE)
    x = to_ve(noise(), sigmas[0])
    generator = torch.Generator().manual_seed(42)
    torch.randn(1, *SHAPE, generator=generator)  # the initial noise, which ours has drawn too
    denoise = parametrize(network, SCHEDULE, prediction)
    *_, last = SAMPLERS[name](denoise, x, sigmas, noise=noise)
    expected = scheduler_walk(theirs, x, sigmas[0], generator=generator if name in STOCHASTIC else None)
    difference = largest(f"{name}, {n} {spacing}, final {final}, {prediction}", to_vp(last.x, last.sigma), expected)
    assert last.x.dtype == torch.float32
    assert difference < 1e-5  # fp32 on both sides, fp32 tables on theirs


def test_ddim_with_eta_equals_diffusers():
    theirs = diffusers.DDIMScheduler(**STABLE_DIFFUSION, **EXACT, set_alpha_to_one=False, steps_offset=1)
    theirs.set_timesteps(20)
    sigmas = SCHEDULE.steps(20, final="first")
    noise = seeded_noise([42], SHAPE)
    x = to_ve(noise(), sigmas[0])
    generator = torch.Generator().manual_seed(42)
    torch.randn(1, *SHAPE, generator=generator)
    *_, last = ddim(parametrize(network, SCHEDULE, "eps"), x, sigmas, noise=noise, eta=0.6)
    expected = scheduler_walk(theirs, x, sigmas[0], generator=generator, eta=0.6)
    assert largest("ddim eta 0.6", to_vp(last.x, last.sigma), expected) < 1e-5


def test_lcm_equals_diffusers():
    theirs = diffusers.LCMScheduler(**STABLE_DIFFUSION, clip_sample=False)
    theirs.set_timesteps(4)
    sigmas = SCHEDULE.steps(4, "lcm")
    noise = seeded_noise([42], SHAPE)
    x = to_ve(noise(), sigmas[0])
    generator = torch.Generator().manual_seed(42)
    torch.randn(1, *SHAPE, generator=generator)
    denoise = consistency(parametrize(network, SCHEDULE, "eps"), SCHEDULE)
    *_, last = SAMPLERS["lcm"](denoise, x, sigmas, noise=noise)
    expected = scheduler_walk(theirs, x, sigmas[0], generator=generator)
    assert largest("lcm", last.x, expected) < 1e-5


CLASSES = {case[0]: case[1] for case in CASES} | {"lcm": "LCMScheduler"}
STARTS = [
    *((name, spacing) for name in CLASSES for spacing in ("leading", "trailing", "linspace")),
    *(("euler", "karras"), ("heun", "karras")),
]


@pytest.mark.parametrize(("name", "spacing"), STARTS)
def test_pictures_start_from_the_noise_that_diffusers_starts_from(name, spacing):
    options = {"timestep_spacing": spacing, "steps_offset": 1}
    if spacing == "karras":
        options = {"timestep_spacing": "linspace", "use_karras_sigmas": True}
    theirs = getattr(diffusers, CLASSES[name])(**STABLE_DIFFUSION, **options)
    theirs.set_timesteps(8)
    noise = torch.randn(1, *SHAPE)
    sigma = SCHEDULE.steps(8, spacing)[0]
    ours = to_vp(start(noise, sigma, sampler=name, spacing=spacing), sigma)
    first = theirs.scale_model_input(noise * theirs.init_noise_sigma, theirs.timesteps[0])
    assert largest(f"{name}, {spacing}", ours, first) < 1e-6  # fp32 on both sides


def test_karras_steps_equal_diffusers():
    theirs = diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="linspace", use_karras_sigmas=True)
    theirs.set_timesteps(12)
    sigmas = SCHEDULE.steps(12, "karras")
    x = to_ve(seeded_noise([42], SHAPE)(), sigmas[0])
    *_, last = SAMPLERS["euler"](parametrize(network, SCHEDULE, "eps"), x, sigmas, noise=None)
    assert largest("euler, karras", last.x, scheduler_walk(theirs, x, sigmas[0])) < 2e-5


@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_zero_terminal_snr_equals_diffusers(name):
    theirs = {"euler": diffusers.EulerDiscreteScheduler, "ddim": diffusers.DDIMScheduler}[name](
        **STABLE_DIFFUSION,
        **(EXACT if name == "ddim" else {}),
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
    )
    theirs.set_timesteps(10)
    schedule = NoiseSchedule(zero_terminal_snr=True)
    sigmas = schedule.steps(10, "trailing")
    x = to_ve(seeded_noise([42], SHAPE)(), sigmas[0])
    *_, last = SAMPLERS[name](parametrize(network, schedule, "v"), x, sigmas, noise=None)
    difference = largest(f"{name}, zero SNR", last.x, scheduler_walk(theirs, x, sigmas[0]))
    # Their table is 4e-5 off, an fp32 product that approaches 0, and their DDIM takes a = 0 where
    # ours takes 2^-24, which is 2.4e-4 of the first latent.
    assert difference < 3e-4


# ------------------------------------------------------------------ noise


def test_image_i_of_a_batch_is_drawn_from_its_own_seed():
    together, alone = seeded_noise([5, 6, 5], SHAPE), [seeded_noise([s], SHAPE) for s in (5, 6, 5)]
    for _ in range(3):
        assert torch.equal(together(), torch.cat([draw() for draw in alone]))


def test_noise_is_what_diffusers_draws_with_cpu_generators():
    seeds = [0, 2**40 + 2**31 + 1, 2**64 - 1]  # torch uses the lowest 32 bits
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = seeded_noise(seeds, SHAPE)
    for _ in range(2):
        theirs = randn_tensor((3, *SHAPE), generator=generators)
        assert torch.equal(noise(), theirs)
    # the first values of torch's CPU stream for seed 0, as printed in many a bug report
    first = seeded_noise([0], (4, 64, 64))().flatten()[:3]
    assert first.tolist() == pytest.approx([-1.1258398, -1.1523602, -0.2505786])


def test_noise_does_not_depend_on_global_settings():
    expected = seeded_noise([3], SHAPE)()
    with torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            drawn = seeded_noise([3], SHAPE)()
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_does_not_depend_on_the_batch_around_it(name):
    sigmas = SCHEDULE.steps(6)
    denoise = parametrize(network, SCHEDULE, "eps")

    def picture(seeds):
        noise = seeded_noise(seeds, SHAPE)
        *_, last = SAMPLERS[name](denoise, to_ve(noise(), sigmas[0]), sigmas, noise=noise)
        return last.x

    batch = picture([11, 12, 13])
    for i, seed in enumerate((11, 12, 13)):
        assert torch.equal(batch[i : i + 1], picture([seed]))


def test_seeds_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="one seed for each image, got none"):
        seeded_noise([], SHAPE)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=rf"must lie in 0 \.\. 2\^64 - 1, got {seed}"):
            seeded_noise([seed], SHAPE)


# ------------------------------------------------------------------ what a name implies


def test_every_sampler_has_its_conventions_and_its_own_name_in_a1111():
    assert CONVENTIONS.keys() == SAMPLERS.keys()
    names = [conventions(name).a1111 for name in SAMPLERS]
    assert None not in names
    assert len(set(names)) == len(names)
    assert [name for name in SAMPLERS if conventions(name).final == "first"] == ["ddim"]
    assert [name for name in SAMPLERS if conventions(name).consistency] == ["lcm"]
    assert conventions("of my own") == Conventions()


def test_the_options_of_a_sampler_are_its_keywords_beside_noise():
    own = {name: options(sampler) for name, sampler in SAMPLERS.items() if options(sampler)}
    assert own == {"ddim": ["eta"], "euler_ancestral": ["eta"]}

    def mine(denoise, x, sigmas, *, noise=None, strength=1.0, order=2):
        yield

    assert options(mine) == ["strength", "order"]


# ------------------------------------------------------------------ behavior


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("final", ["zero", "first"])
def test_one_step_lands_on_its_estimate_or_near_it(name, final):
    for spacing in ("leading", "trailing", "linspace", "karras"):
        (step,) = walk(name, SCHEDULE.steps(1, spacing, final=final))
        assert (step.index, step.total) == (0, 1)
        if final == "zero":
            assert torch.equal(step.x, step.x0)
        assert (step.x - step.x0).abs().max() < 10 * SCHEDULE.sigmas[0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_say_where_they_are(name):
    sigmas = SCHEDULE.steps(5, final="first")
    steps = walk(name, sigmas)
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert {step.total for step in steps} == {5}
    assert [step.sigma for step in steps] == sigmas[1:].tolist()


@pytest.mark.parametrize("name", SAMPLERS)
def test_x_is_x0_and_noise_of_its_level_at_every_step_and_latents_are_x_at_unit_variance(name):
    x0, eps = noise64(1)(), noise64()()
    sigmas = SCHEDULE.steps(6, final="first")
    draws = []

    def noise():
        draws.append(noise64(len(draws) + 2)())
        return draws[-1]

    previous, level = x0 + sigmas[0] * eps, float(sigmas[0])
    for step in SAMPLERS[name](lambda x, sigma: x0, previous, sigmas, noise=noise):
        # x0 is known, so the rest is noise: what is left of the last step's, and a new draw, with squares that add up
        rest = step.x - x0
        kept = (previous - x0) / level
        new = draws[-1] if draws else torch.zeros_like(kept)
        basis = torch.stack([kept.flatten(), new.flatten()], dim=1)
        parts = torch.linalg.lstsq(basis, rest.flatten()[:, None]).solution if draws else rest.norm() / kept.norm()
        assert parts.square().sum().sqrt() == pytest.approx(step.sigma, rel=1e-6)
        assert torch.equal(step.latents, step.x / math.sqrt(1 + step.sigma**2))
        previous, level = step.x, step.sigma
    assert step.sigma == float(SCHEDULE.sigmas[0])


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", ["trailing", "karras", "linspace", "leading"])
def test_zero_terminal_snr_stays_finite_and_in_scale_in_fp32(name, spacing):
    schedule = NoiseSchedule(zero_terminal_snr=True)
    for n in (1, 2, 4, 25):
        sigmas = schedule.steps(n, spacing)
        noise = seeded_noise([1], SHAPE)
        denoise = parametrize(network, schedule, "v")
        x = to_ve(noise(), sigmas[0])
        for step in SAMPLERS[name](denoise, x, sigmas, noise=noise):
            assert step.x.isfinite().all()
            assert to_vp(step.x, step.sigma).abs().max() < 8  # unit variance, give or take


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_first_step_from_sigma_4096_costs_no_digits_in_fp32(name):
    schedule = NoiseSchedule(zero_terminal_snr=True)
    sigmas = schedule.steps(10, "trailing")
    exact = walk(name, sigmas, schedule=schedule, prediction="v")[-1].x
    x = to_ve(noise64()(), sigmas[0]).float()
    *_, last = SAMPLERS[name](parametrize(network, schedule, "v"), x, sigmas, noise=None)
    assert largest(f"{name}, fp32 against fp64", last.x, exact) < 5e-6  # k-diffusion's form: 4e-5


def test_heun_takes_a_hundredfold_step_with_euler():
    for high, corrected in ((99.0, True), (101.0, False)):
        sigmas = torch.tensor([high, 1.0], dtype=torch.float64)
        heun, euler = (walk(name, sigmas)[-1].x for name in ("heun", "euler"))
        assert torch.equal(heun, euler) is not corrected


@pytest.mark.parametrize("name", ["euler", "ddim", "heun"])
def test_a_list_cut_in_two_gives_the_same_picture(name):
    sigmas = SCHEDULE.steps(10)
    whole = walk(name, sigmas)
    denoise = parametrize(network, SCHEDULE, "eps")
    rest = list(SAMPLERS[name](denoise, whole[5].x, sigmas[6:], noise=None))
    assert torch.equal(rest[-1].x, whole[-1].x)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_caller_owns_the_loop_and_the_latents(name):
    calls = []

    def denoise(x, sigma):
        calls.append(float(sigma))
        return 0.5 * x

    sigmas = SCHEDULE.steps(8)
    x = torch.ones(1, *SHAPE)
    steps = SAMPLERS[name](denoise, x, sigmas, noise=seeded_noise([0], SHAPE))
    assert calls == []  # nothing happens before the first step is asked for
    first = next(steps)
    kept = first.x.clone(), first.x0.clone()
    assert len(calls) == (2 if name == "heun" else 1)
    list(steps)
    assert len(calls) == (15 if name == "heun" else 8)  # the step to 0 has no second look
    assert calls[0] == float(sigmas[0])
    assert torch.equal(x, torch.ones(1, *SHAPE))
    assert torch.equal(first.x, kept[0])
    assert torch.equal(first.x0, kept[1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_x0_of_a_step_is_the_denoisers_estimate_at_the_start_of_the_step(name):
    estimates, ask = {}, parametrize(network, SCHEDULE, "eps")

    def denoise(x, sigma):
        estimates[float(sigma)] = ask(x, sigma)  # heun asks for a level twice: first for the step before
        return estimates[float(sigma)]

    steps = walk(name, SCHEDULE.steps(5), denoise=denoise)
    assert all(torch.equal(step.x0, x0) for step, x0 in zip(steps, estimates.values(), strict=True))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_draw_once_a_step_and_not_for_the_step_to_0_and_keep_the_dtype_of_x(name):
    draws = []

    def noise():
        draws.append(torch.randn(1, *SHAPE))
        return draws[-1]

    x = torch.ones(1, *SHAPE, dtype=torch.bfloat16)
    steps = list(SAMPLERS[name](lambda x, s: 0.5 * x, x, SCHEDULE.steps(5), noise=noise))
    assert len(draws) == 4
    assert {step.x.dtype for step in steps} == {torch.bfloat16}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers_draw_no_noise(name):
    def noise():
        raise AssertionError("drawn")

    *_, last = SAMPLERS[name](lambda x, s: 0.5 * x, torch.ones(1), SCHEDULE.steps(5), noise=noise)
    assert last.sigma == 0


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("sigmas", [[], [1.0], [1.0, 2.0], [1.0, 1.0], [1.0, -1.0], [math.inf, 1.0], [math.nan, 0.0]])
def test_levels_that_do_not_fall_are_refused(name, sigmas):
    steps = SAMPLERS[name](lambda x, sigma: x, torch.ones(1), torch.tensor(sigmas), noise=lambda: torch.ones(1))
    with pytest.raises(ValueError, match=r"strictly falling levels.*got \[.*NoiseSchedule.steps"):
        next(steps)


def test_levels_in_more_than_one_dimension_are_refused():
    with pytest.raises(ValueError, match=r"strictly falling levels"):
        next(ddpm(lambda x, s: x, torch.ones(1), torch.tensor([[2.0, 1.0]]), noise=torch.ones))


def test_an_eta_that_cannot_be_is_refused():
    steps = ddim(lambda x, s: x, torch.ones(1), SCHEDULE.steps(3), eta=1.5)
    with pytest.raises(ValueError, match=r"eta must lie in 0 \.\. 1, got 1\.5"):
        next(steps)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_sampler_without_noise_is_refused(name):
    with pytest.raises(ValueError, match=r"draws noise, got None; pass noise=seeded_noise"):
        next(SAMPLERS[name](lambda x, s: x, torch.ones(1), SCHEDULE.steps(3), noise=None))
