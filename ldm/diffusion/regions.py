"""Denoisers that share a picture: each estimates its region."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser


def blend(denoisers: Sequence[Denoiser], weights: Tensor) -> Denoiser:
    """Make the denoiser whose estimate is the weighted mean of the estimates, at each pixel of the latents.

    x0 = sum_i w_i x0_i / sum_i w_i   (MultiDiffusion, Bar-Tal et al. 2023, eq. 5, with estimates of x0 in place of the
    next latents: their samplers are linear in x0). It is the least-squares solution of eq. 3.
    weights: n h w, 0 or more, one map per denoiser. All denoisers get the same x.
    Raises ValueError for weights that are negative, or zero in all maps at one pixel.
    """
    if len(weights) != len(denoisers) or weights.min() < 0 or not weights.sum(dim=0).all():
        raise ValueError(
            "each region needs a map of weights of 0 or more, and each pixel a weight above 0 in one of them"
        )
    shares = weights / weights.sum(dim=0)  # n h w

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        estimates = torch.stack([each(x, sigma) for each in denoisers])  # n b c h w
        return (shares[:, None, None].to(estimates) * estimates).sum(dim=0)

    return denoise
