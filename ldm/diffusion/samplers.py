"""Samplers: each walks noisy latents down a list of noise levels, one `Step` at a time.

All have one signature, `sampler(denoise, x, sigmas, *, noise)`:
  denoise   (x, sigma) -> x0, see `ldm.diffusion.denoiser`
  x         b c h w, x0 + sigmas[0] * noise; `start` makes it of drawn noise
  sigmas    n + 1 falling levels, see `NoiseSchedule.steps`; the last one is usually 0
  noise     called for each b c h w of fresh noise, see `seeded_noise`; euler, heun, dpmpp_2m and ddim with eta 0 draw
            none and may do without
They are generators: the loop belongs to the caller, and with it progress, previews and stopping. Each raises
ValueError, while it runs, for sigmas that do not fall and for missing noise.

Six of the eight are the same update, `_move`, from x with x0 and fresh noise:

                                    with x0                 with x0 extrapolated
    keeps the predicted noise       euler, ddim             dpmpp_2m
    renews as much as the SDE       euler_ancestral, ddpm   dpmpp_2m_sde

`heun` corrects euler with a second prediction, and `lcm` renews all of the noise. Coefficients are Python floats from
fp64 levels, and x keeps its dtype. No two large numbers are subtracted, so a level of 4096 costs no digits.
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
    sigma: float  # the noise level of x
    x: Tensor  # b c h w, x0 + sigma noise
    x0: Tensor  # b c h w, the estimate of the clean latents that this step used

    @property
    def latents(self) -> Tensor:
        """x at unit variance, x / sqrt(1 + sigma^2). After the last step: the latents of the picture.

        They equal x0 if the last level is 0. DDIM ends at the first timestep, sigma 0.03, as in CompVis and diffusers.
        """
        return to_vp(self.x, self.sigma)


Sampler = Callable[..., Iterator[Step]]  # called with (denoise, x, sigmas, *, noise)


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Noise:
    """Make a function that draws fp32 noise, b c h w, on the CPU at each call.

    Image i has its own generator with seeds[i]: its noise depends neither on the batch nor on the device, and equals
    the noise that diffusers draws with a CPU generator. The first draw is the initial noise of a picture, the later
    ones belong to the sampler.
    shape: c h w. torch uses the lowest 32 bits of a seed.
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

    x' = x + (sigma' - sigma) (x - x0) / sigma, which is DDIM with eta 0 under another name.
    """
    yield from ddim(denoise, x, sigmas, noise=noise)


def ddim(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None, eta: float = 0.0
) -> Iterator[Step]:
    """Sample with DDIM (Song et al. 2020, eq. 12), in the sigma form of `schedule.py`.

    eta: 0 draws no noise and is deterministic, 1 renews as much noise as DDPM (their eq. 16).
    Raises ValueError for an eta outside 0 .. 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in 0 .. 1, got {eta}")
    for i, sigma, target in _levels(sigmas):
        x0 = denoise(x, sigmas[i])
        x = _move(x, x0, sigma, target, eta, noise)
        yield Step(i, len(sigmas) - 1, target, x, x0)


def ddpm(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise) -> Iterator[Step]:
    """Sample from the DDPM posterior (Ho et al. 2020, eq. 6-7), over any list of levels.

    The variance is the smaller one of the paper, beta-tilde: this is DDIM with eta 1.
    """
    yield from ddim(denoise, x, sigmas, noise=noise, eta=1.0)


def euler_ancestral(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise, eta: float = 1.0) -> Iterator[Step]:
    """Take an Euler step below the next level, then add the noise that is missing (k-diffusion).

    down^2 = sigma'^2 - up^2, up = eta sigma' sqrt(1 - sigma'^2 / sigma^2). With eta 1 this is `ddpm`. Other programs
    give the two different lists of levels.
    Raises ValueError for an eta outside 0 .. 1.
    """
    yield from ddim(denoise, x, sigmas, noise=noise, eta=eta)


def heun(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None) -> Iterator[Step]:
    """Integrate the ODE with Heun's method (Karras et al. 2022, algorithm 1): two predictions a step.

    The correction adds (sigma - sigma') / (2 sigma') (x0' - x0) to Euler's step. A step to 0 stays Euler's. So does a
    step that falls more than a hundredfold, which is the first one at zero terminal SNR: the correction is not valid
    over this distance. (diffusers applies it there, with a factor in the hundreds.)
    """
    for i, sigma, target in _levels(sigmas):
        x0 = denoise(x, sigmas[i])
        x = _move(x, x0, sigma, target)
        if sigma <= 100 * target:
            x = x + (sigma - target) / (2 * target) * (denoise(x, sigmas[i + 1]) - x0)
        yield Step(i, len(sigmas) - 1, target, x, x0)


def dpmpp_2m(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None) -> Iterator[Step]:
    """Solve the ODE with DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): one prediction a step.

    In sigma space it is DDIM with x0 extrapolated by half a step in log sigma.
    """
    yield from _multistep(denoise, x, sigmas, eta=0.0, noise=noise)


def dpmpp_2m_sde(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise) -> Iterator[Step]:
    """Solve the SDE with SDE-DPM-Solver++(2M) (Lu et al. 2022, section 5; midpoint form).

    In sigma space it is DDPM towards x0 extrapolated half a step ahead in log sigma.
    """
    yield from _multistep(denoise, x, sigmas, eta=1.0, noise=noise)


def lcm(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise) -> Iterator[Step]:
    """Jump to x0 and add fresh noise of the next level (Song et al. 2023, algorithm 1; LCM).

    denoise: a consistency model, see `ldm.diffusion.denoiser.consistency`.
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
    """What other programs do together with a sampler, beside its steps."""

    final: Final = "zero"  # the last level, see `NoiseSchedule.steps`
    unit_variance: bool = True  # start from sqrt(1 + sigma^2) noise; False: from sigma noise, see `start`
    consistency: bool = False  # the denoiser is wrapped in `ldm.diffusion.denoiser.consistency`
    a1111: str | None = None  # the name in AUTOMATIC1111's web UI


# A sampler without an entry has the defaults.
CONVENTIONS: dict[str, Conventions] = {
    "ddpm": Conventions(a1111="DDPM"),
    # CompVis' DDIM, and each scheduler config published since, ends at the first timestep.
    "ddim": Conventions(final="first", a1111="DDIM"),
    "euler": Conventions(unit_variance=False, a1111="Euler"),
    "euler_ancestral": Conventions(unit_variance=False, a1111="Euler a"),
    "heun": Conventions(unit_variance=False, a1111="Heun"),
    "dpmpp_2m": Conventions(a1111="DPM++ 2M"),
    "dpmpp_2m_sde": Conventions(a1111="DPM++ 2M SDE"),
    "lcm": Conventions(consistency=True, a1111="LCM"),
}


def conventions(sampler: str) -> Conventions:
    """Look up the conventions of a sampler, also of one that has no entry."""
    return CONVENTIONS.get(sampler, Conventions())


def options(sampler: Sampler) -> list[str]:
    """List the names of a sampler's own options, such as "eta"."""
    keywords = [p.name for p in inspect.signature(sampler).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return [name for name in keywords if name != "noise"]


def start(noise: Tensor, sigma: float | Tensor, *, sampler: str, spacing: str) -> Tensor:
    """Make the x at which `sampler` starts, at the level `sigma`, of drawn noise: b c h w.

    x is sqrt(1 + sigma^2) noise, because the data have unit variance. k-diffusion starts from sigma noise, which is
    0.2 % less. So does diffusers, except with "leading" steps, and so do we: a seed means the same picture.
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
    """Yield the index of each step, and the levels from which and to which it leads."""
    levels = sigmas.tolist() if sigmas.ndim == 1 else []
    pairs = list(pairwise(levels))
    if not pairs or not all(math.inf > high > low >= 0 for high, low in pairs):
        raise ValueError(
            "sigmas must be two or more strictly falling levels, finite and none below 0, got "
            f"{sigmas.tolist()}; NoiseSchedule.steps makes such a list"
        )
    for i, (sigma, target) in enumerate(pairs):
        yield i, sigma, target
