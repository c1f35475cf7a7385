"""The noise schedule against the papers, diffusers and published step lists."""

from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, LCMScheduler

from ldm.config import DiffusionConfig
from ldm.diffusion.schedule import NoiseSchedule, Spacing, to_ve, to_vp
from tests.reference import diffusion_papers as papers

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SPACINGS = ("leading", "trailing", "linspace", "karras")

# diffusers hands its fp32 tables to numpy in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def largest(name: str, a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest relative difference, printed for `pytest -s`."""
    difference = ((a.double() - b.double()).abs() / b.double().abs().clamp(min=1e-12)).max().item()
    print(f"\n  {name}: {difference:.1e}")
    return difference


@pytest.mark.parametrize("betas", ["scaled_linear", "linear"])
def test_alphas_cumprod_equal_the_papers_running_product(betas):
    ours = NoiseSchedule(betas=betas).alphas_cumprod
    reference = torch.tensor(papers.alphas_bar(scaled=betas == "scaled_linear"), dtype=ours.dtype)
    assert largest(betas, ours, reference) < 1e-12  # fp64, a thousand factors


def test_the_default_tables_end_where_the_official_models_do():
    # Published constants of Stable Diffusion: alphas_cumprod 0.9991 .. 0.00466 in every official
    # file, sigma_min 0.0292 and sigma_max 14.6146 in Stability's own sampling code.
    schedule = NoiseSchedule()
    assert schedule.alphas_cumprod[[0, -1]].tolist() == pytest.approx([0.99915, 0.0046601], 1e-5)
    assert schedule.sigmas[[0, -1]].tolist() == pytest.approx([0.0291672, 14.61464], 1e-5)
    assert len(schedule) == 1000


def test_alphas_cumprod_equal_diffusers():
    reference = DDPMScheduler(**STABLE_DIFFUSION).alphas_cumprod
    # 1e-5: diffusers multiplies a thousand factors in fp32
    assert largest("fp32 table", NoiseSchedule().alphas_cumprod, reference) < 1e-5


def test_cosine_equals_diffusers_and_the_paper():
    reference = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    ours = NoiseSchedule("cosine").alphas_cumprod
    # 1e-4: diffusers multiplies a thousand factors in fp32, and the last ones are differences of nearly equal numbers
    assert largest("diffusers", ours, reference) < 1e-4
    # Nichol & Dhariwal 2021, eq. 17; without the last timestep, whose beta is cut off at 0.999
    f = torch.cos((torch.arange(1000, dtype=torch.float64) / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2
    assert largest("paper", ours[:-1], f[1:] / f[0]) < 1e-10  # fp64, a thousand factors


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_a_tensor_of_betas_gives_the_schedule_of_its_name(name, zero_terminal_snr):
    named = NoiseSchedule(name, zero_terminal_snr=zero_terminal_snr)
    kinds = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
    betas = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=kinds[name]).betas
    given = NoiseSchedule(betas, zero_terminal_snr=zero_terminal_snr)
    # betas in fp32, of which a thousand are multiplied
    assert (given.alphas_cumprod - named.alphas_cumprod).abs().max() < 1e-6
    assert given.sigmas.dtype == torch.float64
    assert len(NoiseSchedule(betas[:10])) == 10


def test_the_tables_cannot_be_assigned_or_written_to():
    schedule = NoiseSchedule()
    schedule.alphas_cumprod[0] = schedule.sigmas[0] = 7.0  # of copies
    assert torch.equal(schedule.alphas_cumprod, NoiseSchedule().alphas_cumprod)
    assert torch.equal(schedule.sigmas, NoiseSchedule().sigmas)
    with pytest.raises(AttributeError):
        schedule.alphas_cumprod = schedule.alphas_cumprod.sqrt()
    with pytest.raises(AttributeError):
        schedule.sigmas = schedule.sigmas * 2


def test_a_schedule_follows_every_entry_of_its_configuration():
    config = DiffusionConfig(betas="linear", beta_start=0.001, beta_end=0.01, timesteps=500, zero_terminal_snr=True)
    expected = NoiseSchedule("linear", beta_start=0.001, beta_end=0.01, timesteps=500, zero_terminal_snr=True)
    made = NoiseSchedule.from_config(config)
    assert torch.equal(made.sigmas, expected.sigmas)
    assert made.zero_terminal_snr
    assert torch.equal(NoiseSchedule.from_config(DiffusionConfig()).sigmas, NoiseSchedule().sigmas)


def test_zero_terminal_snr_equals_algorithm_1_and_keeps_sigma_finite():
    schedule = NoiseSchedule(zero_terminal_snr=True)
    reference = torch.tensor(papers.zero_terminal_snr(papers.alphas_bar()), dtype=torch.float64)
    assert largest("all but the last", schedule.alphas_cumprod[:-1], reference[:-1]) < 1e-11
    assert reference[-1] == 0
    assert schedule.alphas_cumprod[-1] == 2**-24
    assert schedule.sigmas[-1].item() == pytest.approx(4096, 1e-6)
    euler = EulerDiscreteScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True)
    # 1e-3: diffusers divides neighbors of an fp32 product that approaches 0
    assert largest("diffusers", schedule.alphas_cumprod, euler.alphas_cumprod) < 1e-3


def test_add_noise_velocity_and_snr_follow_their_definitions():
    schedule = NoiseSchedule()
    x0, noise = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64).unbind(0)
    t = torch.tensor([0, 500, 999])
    a = torch.tensor(papers.alphas_bar(), dtype=torch.float64)[t]
    z, v = schedule.add_noise(x0, noise, t), schedule.velocity(x0, noise, t)
    for i, a_t in enumerate(a):
        assert torch.allclose(z[i], a_t.sqrt() * x0[i] + (1 - a_t).sqrt() * noise[i], rtol=1e-12)
        # the inverse of v-prediction, Salimans & Ho 2022: x0 = alpha z - sigma v
        assert torch.allclose(x0[i], a_t.sqrt() * z[i] - (1 - a_t).sqrt() * v[i], rtol=1e-9)
    assert torch.allclose(schedule.snr(t).double(), a / (1 - a), rtol=1e-6)  # it is fp32
    assert schedule.snr(t.view(3, 1)).shape == (3, 1)


def test_add_noise_and_velocity_equal_diffusers_and_keep_the_dtype():
    schedule, reference = NoiseSchedule(), DDPMScheduler(**STABLE_DIFFUSION)
    x0, noise = torch.randn(2, 4, 4, 6, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
    t = torch.tensor([3, 250, 700, 998])
    pairs = (
        (schedule.add_noise(x0, noise, t), reference.add_noise(x0, noise, t)),
        (schedule.velocity(x0, noise, t), reference.get_velocity(x0, noise, t)),
    )
    difference = max((a - b).abs().max().item() for a, b in pairs)
    print(f"\n  add_noise, velocity: {difference:.1e}")
    assert difference < 5e-6  # fp32 tables on their side
    assert schedule.add_noise(x0.bfloat16(), noise.bfloat16(), t).dtype == torch.bfloat16


def test_sigma_and_alpha_bar_forms_are_the_same_latent():
    schedule = NoiseSchedule()
    x0, noise = torch.randn(2, 1, 4, 6, 6, dtype=torch.float64).unbind(0)
    for t in (0, 400, 999):
        x = x0 + schedule.sigmas[t] * noise
        z = schedule.add_noise(x0, noise, torch.tensor([t]))
        assert torch.allclose(to_vp(x, schedule.sigmas[t]), z, rtol=1e-12)
        assert torch.allclose(to_ve(z, schedule.sigmas[t]), x, rtol=1e-12)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_timestep_inverts_sigma_exactly_on_the_table(zero_terminal_snr):
    schedule = NoiseSchedule(zero_terminal_snr=zero_terminal_snr)
    every = torch.arange(1000, dtype=torch.float64)
    assert torch.equal(schedule.sigma(every), schedule.sigmas)
    assert torch.equal(schedule.timestep(schedule.sigmas), every)
    assert schedule.timestep(float(schedule.sigmas[7])).item() == 7
    assert schedule.timestep(schedule.sigmas.float()).sub(every).abs().max() < 1e-3


def test_timestep_nearly_inverts_sigma_between_entries_and_clamps_beyond():
    schedule = NoiseSchedule()
    t = torch.linspace(0, 999, 5001, dtype=torch.float64)
    difference = (schedule.timestep(schedule.sigma(t)) - t).abs()
    print(f"\n  timestep(sigma(t)) - t: {difference.max():.1e}, {difference[t > 30].max():.1e} t > 30")
    assert difference.max() < 0.05  # one is linear in sigma, the other in log sigma
    assert schedule.timestep(0.0) == 0
    assert schedule.timestep(1e6) == 999


# Ten steps of Stable Diffusion, printed by the scheduler classes of diffusers 0.42.1
# (EulerDiscreteScheduler, timestep_spacing as named, steps_offset 1 unless said otherwise).
LEADING = [8.39069, 5.13443, 3.34776, 2.29285, 1.62369, 1.16822, 0.83565, 0.57405, 0.34619, 0.04131]
LEADING_0 = [8.3466, 5.11103, 3.33439, 2.28464, 1.61828, 1.16439, 0.83275, 0.57167, 0.34393, 0.02917]
TRAILING = [14.61465, 8.30281, 5.08777, 3.32108, 2.27646, 1.61289, 1.16058, 0.82986, 0.56929, 0.34167]
LINSPACE = [14.61465, 7.83988, 4.60918, 2.91831, 1.95016, 1.34493, 0.93236, 0.62498, 0.36866, 0.02917]
KARRAS = [14.61465, 9.10294, 5.4784, 3.16861, 1.74942, 0.91408, 0.44692, 0.2014, 0.08191, 0.02917]
KARRAS_T = [999.0, 916.2841, 815.045, 687.1533, 523.199, 327.1472, 145.9391, 40.8569, 6.7324, 0.0]


@pytest.mark.parametrize(
    ("spacing", "offset", "sigmas", "timesteps"),
    [
        ("leading", 1, LEADING, range(901, 0, -100)),
        ("leading", 0, LEADING_0, range(900, -1, -100)),
        ("trailing", 1, TRAILING, range(999, 0, -100)),
        ("linspace", 1, LINSPACE, range(999, -1, -111)),
        ("karras", 1, KARRAS, KARRAS_T),
    ],
)
def test_ten_steps_are_the_published_ones(spacing, offset, sigmas, timesteps):
    schedule = NoiseSchedule()
    ours = schedule.steps(10, spacing, offset=offset)
    # 2e-5 and 2e-3: printed with five decimals, from fp32 tables
    assert ours.tolist() == pytest.approx([*sigmas, 0.0], abs=2e-5)
    assert schedule.timestep(ours[:-1]).tolist() == pytest.approx(list(timesteps), abs=2e-3)


@pytest.mark.parametrize("spacing", get_args(Spacing))
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_steps_from_a_given_level_fall_strictly_from_exactly_this_level(spacing, zero_terminal_snr):
    schedule = NoiseSchedule(zero_terminal_snr=zero_terminal_snr)
    between = [0.05, 0.5, 3.3, 14.0] + [1000.0] * zero_terminal_snr
    starts = [*schedule.sigmas[[1, 2, 500, 998, 999]].tolist(), *between]
    for n in (1, 2, 3, 10, 50, 100, 1000):
        if spacing == "lcm" and n > 50:
            continue
        for level in starts:
            for final in ("zero", "first"):
                sigmas = schedule.steps(n, spacing, start=level, final=final)
                assert len(sigmas) == n + 1
                assert sigmas[0] == level
                assert (sigmas.diff() < 0).all(), (n, level)
                lowest = schedule.sigmas[0]
                assert sigmas[-1] == (lowest if final == "first" and sigmas[-2] > lowest else 0)


@pytest.mark.parametrize("spacing", get_args(Spacing))
def test_steps_from_the_level_of_the_ordinary_list_are_the_ordinary_list(spacing):
    schedule = NoiseSchedule()
    for n in (1, 2, 10, 48):
        for final in ("zero", "first"):
            ordinary = schedule.steps(n, spacing, final=final)
            again = schedule.steps(n, spacing, final=final, start=float(ordinary[0]))
            torch.testing.assert_close(again, ordinary, rtol=1e-12, atol=0)  # fp64


def test_steps_from_a_given_level_visit_the_timesteps_scaled_to_it():
    schedule = NoiseSchedule()
    half = schedule.steps(10, "linspace", start=float(schedule.sigmas[499]))
    expected = torch.linspace(499, 0, 10, dtype=torch.float64)
    torch.testing.assert_close(half[:-1], schedule.sigma(expected), rtol=1e-12, atol=0)  # fp64
    # Karras et al. 2022, eq. 5, between the given level and the lowest one
    karras = schedule.steps(10, "karras", start=2.5)
    ramp = torch.linspace(2.5 ** (1 / 7), float(schedule.sigmas[0]) ** (1 / 7), 10, dtype=torch.float64) ** 7
    torch.testing.assert_close(karras[:-1], ramp, rtol=1e-12, atol=0)


def test_a_start_outside_the_levels_is_refused():
    for level in (0.0, -1.0, 0.03, 14.7, float("nan")):
        with pytest.raises(ValueError, match=r"start level must lie in 0\.0413 \.\. 14\.6146, got"):
            NoiseSchedule().steps(5, start=level)


def test_four_turbo_and_zero_terminal_snr_steps_are_the_published_ones():
    # from the same print-out: SDXL-Turbo's four trailing steps, and with rescale_betas_zero_snr
    turbo, zero = NoiseSchedule(), NoiseSchedule(zero_terminal_snr=True)
    assert turbo.steps(4, "trailing").tolist() == pytest.approx([14.61465, 4.08173, 1.61289, 0.69321, 0.0], abs=2e-5)
    assert turbo.steps(1, "trailing").tolist() == pytest.approx([14.61465, 0.0], abs=2e-5)
    assert zero.steps(4, "trailing").tolist() == pytest.approx([4096.0, 5.39874, 1.76808, 0.72706, 0.0], rel=1e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_every_number_of_steps_falls_strictly_from_the_table_to_its_end(spacing, zero_terminal_snr):
    schedule = NoiseSchedule(zero_terminal_snr=zero_terminal_snr)
    lowest, highest = schedule.sigmas[0], schedule.sigmas[-1]
    for n in range(1, 1001):
        to_zero = schedule.steps(n, spacing)
        to_first = schedule.steps(n, spacing, final="first")
        assert to_zero.shape == to_first.shape == (n + 1,)
        assert (to_zero.diff() < 0).all()
        assert (to_first.diff() < 0).all()
        assert torch.equal(to_zero[:-1], to_first[:-1])
        assert highest >= to_zero[0]
        assert to_zero[-2] >= lowest
        assert to_zero[-1] == 0
        assert to_first[-1] == (lowest if to_zero[-2] > lowest else 0)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_number_of_steps_visits_the_timesteps_of_diffusers(spacing):
    schedule = NoiseSchedule()
    reference = EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing=spacing, steps_offset=1)
    unlike = []
    for n in range(1, 1001):
        reference.set_timesteps(n)
        ours, theirs = schedule.steps(n, spacing, offset=1)[:-1], reference.timesteps.double()
        if len(theirs) != n or (ours - schedule.sigma(theirs.clamp(0, 999))).abs().max() > 1e-5:
            unlike.append(n)
    # One step: diffusers starts pure noise at the clean end. A thousand leading ones: it leaves the
    # table. Some trailing ones: its floating-point range adds a timestep -1.
    extra = [n for n in unlike if spacing == "trailing"]
    print(f"\n  unlike diffusers: {len(unlike)} of 1000, {unlike[:4]}")
    assert unlike == {"leading": [1, 1000], "trailing": extra, "linspace": [1]}[spacing]
    assert len(extra) in (0, 62)
    assert all(n > 60 for n in extra)


def test_lcm_steps_are_those_of_diffusers():
    schedule, reference = NoiseSchedule(), LCMScheduler(**STABLE_DIFFUSION)
    assert schedule.timestep(schedule.steps(4, "lcm")[:-1]).tolist() == [999, 759, 499, 259]
    for n in range(1, 51):
        reference.set_timesteps(n)
        sigmas = schedule.steps(n, "lcm")
        assert schedule.timestep(sigmas[:-1]).tolist() == reference.timesteps.tolist()
        assert sigmas[-1] == 0


def test_final_first_ends_where_ddim_ends_with_set_alpha_to_one_false():
    reference = DDIMScheduler(**STABLE_DIFFUSION, steps_offset=1, set_alpha_to_one=False)
    end = NoiseSchedule().steps(10, "leading", final="first")[-1]
    assert 1 / (1 + end**2).item() == pytest.approx(reference.final_alpha_cumprod.item(), 1e-6)


def test_short_tables_work():
    schedule = NoiseSchedule(timesteps=2)
    assert len(schedule.steps(2, "karras")) == 3
    assert schedule.timestep(schedule.sigmas).tolist() == [0, 1]
    with pytest.raises(ValueError, match="'lcm' picks from 50 of the timesteps, got 1 steps of 2"):
        schedule.steps(1, "lcm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"betas": "sigmoid"}, r"a tensor or one of \('scaled_linear', 'linear', 'cosine'\), got 'sigmoid'"),
        ({"betas": [0.1, 0.2]}, r"a tensor or one of .*, got \[0.1, 0.2\]"),
        ({"betas": torch.tensor([0.1, 0.2]).numpy()}, r"a tensor or one of .*, got array\(\[0.1, 0.2\]"),
        ({"betas": torch.tensor([[0.1, 0.2]])}, "tensor of betas must hold two or more numbers between 0 and 1"),
        ({"betas": torch.tensor([0.1])}, "two or more numbers between 0 and 1"),
        ({"betas": torch.tensor([0.0, 0.2])}, "two or more numbers between 0 and 1"),
        ({"betas": torch.tensor([0.1, 1.0])}, "two or more numbers between 0 and 1"),
        ({"betas": torch.tensor([0.1, torch.nan])}, "two or more numbers between 0 and 1"),
        ({"betas": torch.full((1000,), 0.5)}, "leave no signal before the last of 1000 timesteps"),
        ({"beta_start": 0.0}, "0 < beta_start <= beta_end < 1, got 0.0, 0.012"),
        ({"beta_end": 1.0}, "0 < beta_start <= beta_end < 1"),
        ({"beta_start": 0.1}, "0 < beta_start <= beta_end < 1, got 0.1"),
        ({"timesteps": 1}, "at least 2, got 1"),
        ({"beta_end": 0.9}, "leave no signal before the last of 1000 timesteps"),
        ({"beta_end": 0.9, "zero_terminal_snr": True}, "leave no signal before the last"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "1 .. 1000, got 0"),
        ((1001,), "1 .. 1000, got 1001"),
        ((1, "even"), "one of .*'karras'.*, got 'even'"),
        ((51, "lcm"), "'lcm' picks from 50 of the timesteps, got 51 steps of 1000"),
    ],
)
def test_a_step_list_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule().steps(*arguments)
    with pytest.raises(ValueError, match="0 or more timesteps, got -1"):
        NoiseSchedule().steps(5, offset=-1)
    with pytest.raises(ValueError, match=r"one of \('zero', 'first'\), got 'last'"):
        NoiseSchedule().steps(5, final="last")


def test_timesteps_beyond_the_table_are_refused():
    for t in (-1.0, 999.5, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in 0 \.\. 999, got"):
            NoiseSchedule().sigma(t)
