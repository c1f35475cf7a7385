"""Samplers: each walks noisy latents down a list of noise levels, one `Step` at a time.

All have one signature, `sampler(denoise, x, sigmas, *, noise)`:
  denoise   (x, sigma) -> x0, see `ldm.diffusion.denoiser`
  x         b c h w, x0 + sigmas[0] * noise; `start` makes x from drawn noise
  sigmas    n + 1 falling noise levels, see `NoiseSchedule.steps`; the last level is usually 0
  noise     a function that returns fresh noise, b c h w, see `seeded_noise`; euler, heun, dpmpp_2m, and ddim with eta 0
            do not need it
Samplers are Python generators: the caller writes the loop, shows progress and previews, and may stop early. The loop
raises ValueError for sigmas that do not fall and for missing noise.

Six of the eight samplers make the same update, `_move`, with or without these two changes:

                                    x0 as predicted         x0 extrapolated
    keeps the noise in x (ODE)      euler, ddim             dpmpp_2m
    renews a part of it (SDE)       euler_ancestral, ddpm   dpmpp_2m_sde

`heun` corrects euler with a second prediction, and `lcm` replaces all of the noise. Coefficients are Python floats,
computed from fp64 levels; x keeps its dtype. No formula subtracts two large numbers, so the level 4096 of zero terminal
SNR costs no precision.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import Final, to_ve, to_vp

Noise = Callable[[], Tensor]


@dataclass(frozen=True)
class Step:
    """The result of one sampling step."""

    index: int  # 0 .. total - 1
    total: int
    sigma: float  # the noise level of x, after the step
    x: Tensor  # b c h w, x0 + sigma noise
    x0: Tensor  # b c h w, the estimate of the clean latents that this step used

    @property
    def latents(self) -> Tensor:
        """x at unit variance, x / sqrt(1 + sigma^2). After the last step, these are the latents of the picture.

        If the last level is 0, they equal x0. DDIM ends at timestep 0, sigma 0.03, as in CompVis and diffusers.
        """
        return to_vp(self.x, self.sigma)


Sampler = Callable[..., Iterator[Step]]  # called with (denoise, x, sigmas, *, noise)


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Noise:
    """Make a function that draws fp32 noise, b c h w, on the CPU at each call.

    Image i has its own generator with seeds[i]. Its noise depends neither on the batch nor on the device, and equals
    the noise that diffusers draws with a CPU generator. In text to image, the first draw is the initial noise, and the
    sampler takes the later draws.
    shape: c h w. torch uses only the lowest 32 bits of a seed.
    Raises ValueError for no seeds and for a seed outside 0 .. 2^64 - 1.
    """
    if not seeds:
        raise ValueError("seeds must hold one seed for each image, got none")
    for seed in seeds:
        if not 0 <= seed < 2**64:
            raise ValueError(f"a seed must lie in 0 .. 2^64 - 1, got {seed}")
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def draw() -> Tensor:
        images = [
            torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")
            for generator in generators
        ]
        return torch.stack(images)  # b c h w

    return draw


def euler(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None) -> Iterator[Step]:
    """Integrate the probability-flow ODE with Euler's method (Karras et al. 2022, eq. 3).

    x' = x + (sigma' - sigma) (x - x0) / sigma. This equals DDIM with eta 0.
    """
    yield from ddim(denoise, x, sigmas, noise=noise)


def ddim(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None, eta: float = 0.0
) -> Iterator[Step]:
    """Sample with DDIM (Song et al. 2020, eq. 12), in the sigma form of `schedule.py`.

    eta: 0 adds no fresh noise, 1 adds as much as DDPM (eq. 16).
    Raises ValueError for an eta outside 0 .. 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in 0 .. 1, got {eta}")
    for i, sigma, target in _levels(sigmas):
        x0 = denoise(x, sigmas[i])
        x = _move(x, x0, sigma, target, eta, noise)
        yield Step(i, len(sigmas) - 1, target, x, x0)


def ddpm(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise) -> Iterator[Step]:
    """Sample from the DDPM posterior (Ho et al. 2020, eq. 6-7), over any list of noise levels.

    The variance is beta-tilde, the smaller of the paper's two choices. This equals DDIM with eta 1.
    """
    yield from ddim(denoise, x, sigmas, noise=noise, eta=1.0)


def euler_ancestral(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise, eta: float = 1.0) -> Iterator[Step]:
    """Take an Euler step down to a level below the next level, then add noise up to the next level (k-diffusion).

    down^2 = sigma'^2 - up^2, up = eta sigma' sqrt(1 - sigma'^2 / sigma^2). With eta 1 the steps equal those of `ddpm`,
    but other programs start the two samplers differently, see `start`.
    Raises ValueError for an eta outside 0 .. 1.
    """
    yield from ddim(denoise, x, sigmas, noise=noise, eta=eta)


def heun(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None) -> Iterator[Step]:
    """Integrate the ODE with Heun's method (Karras et al. 2022, algorithm 1): two predictions a step.

    The correction adds (sigma - sigma') / (2 sigma') (x0' - x0) to Euler's step. A step to 0 has no correction. Neither
    has a step to less than 1/100 of the level, such as the first step at zero terminal SNR. The correction is not valid
    over this distance. (diffusers applies the correction there, with a factor in the hundreds.)
    """
    for i, sigma, target in _levels(sigmas):
        x0 = denoise(x, sigmas[i])
        x = _move(x, x0, sigma, target)
        if sigma <= 100 * target:
            x = x + (sigma - target) / (2 * target) * (denoise(x, sigmas[i + 1]) - x0)
        yield Step(i, len(sigmas) - 1, target, x, x0)


def dpmpp_2m(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None) -> Iterator[Step]:
    """Solve the ODE with DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): one prediction a step.

    In sigma space this is DDIM with x0 extrapolated half a step ahead in log sigma.
    """
    yield from _multistep(denoise, x, sigmas, eta=0.0, noise=noise)


def dpmpp_2m_sde(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise) -> Iterator[Step]:
    """Solve the SDE with SDE-DPM-Solver++(2M) (Lu et al. 2022, section 5; midpoint form).

    In sigma space this is DDPM with x0 extrapolated half a step ahead in log sigma.
    """
    yield from _multistep(denoise, x, sigmas, eta=1.0, noise=noise)


def lcm(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise) -> Iterator[Step]:
    """Jump to x0 and add fresh noise of the next level (Song et al. 2023, algorithm 1; LCM).

    denoise: a consistency model, see `ldm.diffusion.consistency`.
    """
    for i, _, target in _levels(sigmas):
        x = x0 = denoise(x, sigmas[i])
        if target:
            x = x0 + target * _drawn(noise, like=x0)
        yield Step(i, len(sigmas) - 1, target, x, x0)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "lcm": lcm,
}


@dataclass(frozen=True)
class Conventions:
    """Settings that other programs tie to the name of a sampler, in addition to its steps."""

    final: Final = "zero"  # the last level, see `NoiseSchedule.steps`
    unit_variance: bool = True  # start from sqrt(1 + sigma^2) noise; False: from sigma noise, see `start`
    consistency: bool = False  # the denoiser is wrapped in `ldm.diffusion.consistency.consistency`
    a1111: str | None = None  # the name in AUTOMATIC1111's web UI


# A sampler without an entry has the defaults.
CONVENTIONS: dict[str, Conventions] = {
    "ddpm": Conventions(a1111="DDPM"),
    # CompVis' DDIM, and every scheduler config published since, ends at timestep 0.
    "ddim": Conventions(final="first", a1111="DDIM"),
    "euler": Conventions(unit_variance=False, a1111="Euler"),
    "euler_ancestral": Conventions(unit_variance=False, a1111="Euler a"),
    "heun": Conventions(unit_variance=False, a1111="Heun"),
    "dpmpp_2m": Conventions(a1111="DPM++ 2M"),
    "dpmpp_2m_sde": Conventions(a1111="DPM++ 2M SDE"),
    "lcm": Conventions(consistency=True, a1111="LCM"),
}


def conventions(sampler: str) -> Conventions:
    """Return the conventions of a sampler: the defaults if it has no entry."""
    return CONVENTIONS.get(sampler, Conventions())


def options(sampler: Sampler) -> list[str]:
    """List the names of a sampler's own options, such as "eta"."""
    keywords = [p.name for p in inspect.signature(sampler).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return [name for name in keywords if name != "noise"]


def start(noise: Tensor, sigma: float | Tensor, *, sampler: str, spacing: str) -> Tensor:
    """Scale drawn noise, b c h w, to the x from which `sampler` starts at the noise level `sigma`.

    x is sqrt(1 + sigma^2) noise, because clean latents have unit variance. k-diffusion's samplers start from sigma
    noise, 0.2 % less; diffusers too, except with "leading" spacing. We do the same, so that seeds give equal pictures.
    """
    if not conventions(sampler).unit_variance and not spacing.startswith("leading"):
        return noise * float(sigma)
    return to_ve(noise, sigma)


def _multistep(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, eta: float, noise: Noise | None) -> Iterator[Step]:
    """Apply `_move` with x0 extrapolated from the last two estimates, linearly in log sigma."""
    previous: tuple[Tensor, float] | None = None
    for i, sigma, target in _levels(sigmas):
        x0 = ahead = denoise(x, sigmas[i])
        if previous is not None and target:  # no extrapolation to 0, which is infinitely far in log sigma
            old, before = previous
            ahead = x0 + (x0 - old) * (math.log(sigma / target) / (2 * math.log(before / sigma)))
        x = _move(x, ahead, sigma, target, eta, noise)
        yield Step(i, len(sigmas) - 1, target, x, x0)
        previous = x0, sigma


def _move(x: Tensor, x0: Tensor, sigma: float, target: float, eta: float = 0.0, noise: Noise | None = None) -> Tensor:
    """Lower the noise level of `x` from `sigma` to `target`, and renew a part of the noise.

    x' = x0 + sqrt(target^2 - up^2) (x - x0) / sigma + up noise,
    up = eta target sqrt(1 - target^2 / sigma^2)
    """
    up = eta * target * math.sqrt(1 - (target / sigma) ** 2)
    moved = x0 + math.sqrt(target**2 - up**2) / sigma * (x - x0)
    return moved + up * _drawn(noise, like=x) if up else moved


def _drawn(noise: Noise | None, *, like: Tensor) -> Tensor:
    """Draw noise with the dtype and device of `like`."""
    if noise is None:
        raise ValueError("this sampler draws noise, got None; pass noise=seeded_noise(seeds, shape)")
    drawn = noise()
    if like.is_cuda:  # a copy from page-locked memory does not wait for the device
        drawn = drawn.pin_memory()
    return drawn.to(like, non_blocking=drawn.is_pinned())


def _levels(sigmas: Tensor) -> Iterator[tuple[int, float, float]]:
    """Yield the index, the start level and the end level of each step."""
    levels = sigmas.tolist() if sigmas.ndim == 1 else []
    pairs = list(pairwise(levels))
    if not pairs or not all(math.inf > high > low >= 0 for high, low in pairs):
        raise ValueError(
            "sigmas must be two or more strictly falling levels, finite and none below 0, got "
            f"{sigmas.tolist()}; NoiseSchedule.steps makes such a list"
        )
    for i, (sigma, target) in enumerate(pairs):
        yield i, sigma, target
