"""DDIM inversion: from clean latents to noise from which `ddim` makes almost the same latents."""

import math
from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers import Step


def invert(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Turn clean latents into noise with DDIM inversion, one step at a time (Song et al. 2020, section 4.3).

    Sampling with `ddim` from the last x returns almost the same latents.
    x: b c h w, clean latents, treated as if their noise level were sigmas[0].
    sigmas: rising levels above 0, such as `plan.sigmas[:-1].flip(0)`: the sampler's levels except the last, reversed.
    The iterator raises ValueError for other sigmas.
    """
    levels = sigmas.tolist()
    if len(levels) < 2 or not all(0 < low < high < math.inf for low, high in pairwise(levels)):
        raise ValueError(f"sigmas must be two or more strictly rising levels above 0, got {levels}")
    for i, (sigma, target) in enumerate(pairwise(levels)):
        x0 = denoise(x, sigmas[i])
        x = x0 + target / sigma * (x - x0)
        yield Step(i, len(levels) - 1, target, x, x0)
