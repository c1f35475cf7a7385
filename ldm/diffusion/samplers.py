"""Samplers: each walks noisy latents down a list of noise levels, one `Step` at a time.

All share one signature, `sampler(denoise, x, sigmas, *, noise)`, so that one can replace another:
  denoise   (x, sigma) -> x0, see `ldm.diffusion.denoiser`
  x         b c h w, x0 + sigmas[0] * noise; at the beginning of a picture see `start`
  sigmas    n + 1 falling levels, see `NoiseSchedule.steps`; the last one is usually 0
  noise     called for each b c h w of fresh noise, see `seeded_noise`; those that draw none
            (euler, heun, dpmpp_2m, and ddim with eta 0) may go without it
They are generators: the loop, and with it progress, previews and stopping, belongs to the caller.
Each raises ValueError, while it runs, for sigmas that it cannot walk down and for missing noise.

Six of the eight are the same move, `_move`, between x, x0 and fresh noise:

                                   towards x0               towards x0 extrapolated
    keeps the noise it predicts    euler, ddim              dpmpp_2m
    renews as much as the SDE      euler_ancestral, ddpm    dpmpp_2m_sde

`heun` corrects the first of these with a second look, and `lcm` renews all of the noise. The
coefficients are Python floats made of fp64 levels, x stays in its own dtype, and no two large
numbers are subtracted, so that a first level of 4096 (zero terminal SNR) costs no digits.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import to_ve

Noise = Callable[[], Tensor]


@dataclass(frozen=True)
class Step:
    """What one sampling step arrived at."""

    index: int  # 0 .. total - 1
    total: int
    sigma: float  # the noise level of x
    x: Tensor  # b c h w, x0 + sigma noise
    x0: Tensor  # b c h w, the denoiser's estimate on which this step was taken


class Sampler(Protocol):
    """The signature that all samplers share."""

    def __call__(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise) -> Iterator[Step]:
        """Walk `x` down `sigmas`."""


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Noise:
    """Make a function that draws one fp32 noise tensor b c h w per call, on the CPU.

    Image i is drawn from a generator of its own, seeded with seeds[i]: it does not depend on the
    batch around it nor on the device, and equals what diffusers draws with a CPU generator. The
    first draw is the picture's initial noise, later ones are the sampler's.
    shape: c h w. Of a seed torch uses the lowest 32 bits.
    Raises ValueError for no seeds or one outside 0 .. 2^64 - 1.
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

    eta: 0 renews no noise and is deterministic, 1 renews as much as DDPM (their eq. 16).
    Raises ValueError for an eta outside 0 .. 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in 0 .. 1, got {eta}")
    for i, sigma, target in _levels(sigmas):
        x0 = denoise(x, sigmas[i])
        x = _move(x, x0, sigma, target, eta, noise)
        yield Step(i, len(sigmas) - 1, target, x, x0)


def ddpm(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise) -> Iterator[Step]:
    """Sample from the DDPM posterior (Ho et al. 2020, eq. 6-7), over any subsequence of levels.

    The variance is their smaller one, beta-tilde, which makes it DDIM with eta 1.
    """
    yield from ddim(denoise, x, sigmas, noise=noise, eta=1.0)


def euler_ancestral(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise) -> Iterator[Step]:
    """Take an Euler step below the next level, then add the noise that is missing (k-diffusion).

    down^2 = sigma'^2 - up^2, up = sigma' sqrt(1 - sigma'^2 / sigma^2), the same as `ddpm`: what
    tells the two apart elsewhere is the list of levels that they are given.
    """
    yield from ddim(denoise, x, sigmas, noise=noise, eta=1.0)


def heun(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None) -> Iterator[Step]:
    """Integrate the ODE with Heun's method (Karras et al. 2022, algorithm 1): two calls a step.

    With both slopes written by their x0, half of the difference between them adds
    (sigma - sigma') / (2 sigma') (x0' - x0) to Euler's step. The step to 0 stays Euler's, and so
    does one that falls more than a hundredfold (the first at zero terminal SNR, where diffusers
    corrects by hundreds of times the difference): a straight line is no guide over that distance.
    """
    for i, sigma, target in _levels(sigmas):
        x0 = denoise(x, sigmas[i])
        x = _move(x, x0, sigma, target)
        if sigma <= 100 * target:
            x = x + (sigma - target) / (2 * target) * (denoise(x, sigmas[i + 1]) - x0)
        yield Step(i, len(sigmas) - 1, target, x, x0)


def dpmpp_2m(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None) -> Iterator[Step]:
    """Solve the ODE with DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): one call a step.

    In sigma space it is DDIM towards x0 extrapolated half a step ahead in log sigma.
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

K_DIFFUSION = ("euler", "euler_ancestral", "heun")  # samplers that came into use with k-diffusion


def start(noise: Tensor, sigma: float | Tensor, *, sampler: str, spacing: str) -> Tensor:
    """Make drawn noise, b c h w, the x that `sampler` starts a picture from, at the level `sigma`.

    sqrt(1 + sigma^2) noise, because data of unit variance lie beneath. k-diffusion leaves them out
    and starts from sigma noise, 0.2 % less at the last timestep; diffusers does so too with the
    samplers from there, but for "leading" steps, which begin lower. A seed means one picture here
    and there, so this follows.
    """
    if sampler in K_DIFFUSION and not spacing.startswith("leading"):
        return noise * float(sigma)
    return to_ve(noise, sigma)


def _multistep(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, eta: float, noise: Noise | None) -> Iterator[Step]:
    """`_move` towards x0 as the last two estimates, a line over log sigma, foretell it."""
    previous: tuple[Tensor, float] | None = None
    for i, sigma, target in _levels(sigmas):
        x0 = ahead = denoise(x, sigmas[i])
        if previous is not None and target:  # the step to 0 is infinitely long: no extrapolation
            old, before = previous
            ahead = x0 + (x0 - old) * (math.log(sigma / target) / (2 * math.log(before / sigma)))
        x = _move(x, ahead, sigma, target, eta, noise)
        yield Step(i, len(sigmas) - 1, target, x, x0)
        previous = x0, sigma


def _move(x: Tensor, x0: Tensor, sigma: float, target: float, eta: float = 0.0, noise: Noise | None = None) -> Tensor:
    """Lower the noise in `x` from `sigma` to `target`, renewing a part of it.

    x' = x0 + sqrt(target^2 - up^2) (x - x0) / sigma + up noise,
    up = eta target sqrt(1 - target^2 / sigma^2)
    """
    up = eta * target * math.sqrt(1 - (target / sigma) ** 2)
    moved = x0 + math.sqrt(target**2 - up**2) / sigma * (x - x0)
    return moved + up * _drawn(noise, like=x) if up else moved


def _drawn(noise: Noise | None, *, like: Tensor) -> Tensor:
    """Fresh noise with the dtype and device of `like`."""
    if noise is None:
        raise ValueError("this sampler draws noise, got None; pass noise=seeded_noise(seeds, shape)")
    drawn = noise()
    if like.is_cuda:  # from page-locked memory a copy need not wait for what the device has yet to do
        drawn = drawn.pin_memory()
    return drawn.to(like, non_blocking=drawn.is_pinned())


def _levels(sigmas: Tensor) -> Iterator[tuple[int, float, float]]:
    """Each step's index and the levels that it leads from and to."""
    levels = sigmas.tolist() if sigmas.ndim == 1 else []
    pairs = list(pairwise(levels))
    if not pairs or not all(math.inf > high > low >= 0 for high, low in pairs):
        raise ValueError(
            "sigmas must be two or more strictly falling levels, finite and none below 0, got "
            f"{sigmas.tolist()}; NoiseSchedule.steps makes such a list"
        )
    for i, (sigma, target) in enumerate(pairs):
        yield i, sigma, target
