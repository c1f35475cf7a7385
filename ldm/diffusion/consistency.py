"""Latent consistency models (Luo et al. 2023): the scalings that make a denoiser a consistency function."""

from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import NoiseSchedule, factor, to_vp


def consistency(
    denoise: Denoiser, schedule: NoiseSchedule, *, sigma_data: float = 0.5, timestep_scaling: float = 10.0
) -> Denoiser:
    """Add the boundary scalings of latent consistency models to their denoiser, for the sampler `lcm`.

    f(z, t) = c_skip z + c_out x0, which equals z at t = 0 (Luo et al. 2023, eq. 9 and section 4.3), with
    c_skip = d^2 / (s^2 + d^2), c_out = s / sqrt(s^2 + d^2), s = timestep_scaling t, d = sigma_data.
    """

    def skip_and_out(x: Tensor, sigma: Tensor) -> Tensor:
        scaled = timestep_scaling * factor(schedule.timestep(sigma), x)
        c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
        c_out = scaled / (scaled**2 + sigma_data**2) ** 0.5
        return c_skip * to_vp(x, sigma) + c_out * denoise(x, sigma)

    return skip_and_out
