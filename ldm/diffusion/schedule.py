"""The forward process, and the lists of noise levels that samplers walk down.

Two ways to write a noisy latent are in use, and this file is the bridge between them:

    alpha-bar   z = sqrt(a) x0 + sqrt(1 - a) noise    (Ho et al. 2020, eq. 4; unit variance, "VP")
    sigma       x = x0 + sigma noise                  (Karras et al. 2022; growing variance, "VE")

Divide the first by sqrt(a) and it is the second, with sigma = sqrt((1 - a) / a). The other way,
a = 1 / (1 + sigma^2) and z = x / sqrt(1 + sigma^2), which is `to_vp` below; `to_ve` undoes it.
Networks and training live on the first line. Samplers live on the second, where most of them
shrink to "mix x and x0", and nothing is lost by that: a step of DDIM (Song et al. 2020, eq. 12, 16)

    z' = sqrt(a') x0 + sqrt(1 - a' - s^2) eps + s noise,
    s  = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')

divided by sqrt(a') reads, because a / a' = (1 + sigma'^2) / (1 + sigma^2),

    x' = x0 + sqrt(sigma'^2 - up^2) eps + up noise,
    up = eta sigma' sqrt(1 - sigma'^2 / sigma^2)

and that one line is DDIM and Euler (eta = 0), DDPM and ancestral sampling (eta = 1).

What other libraries express as options of a scheduler class is here the contents of a list of
sigmas: which levels (`spacing`), shifted by how much (`offset`), ending where (`final`).
Image-to-image starts in the middle of such a list.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

BetaSchedule = Literal["scaled_linear", "linear"]
Spacing = Literal[
    "leading", "trailing", "linspace", "lcm", "karras", "leading_karras", "trailing_karras",
    "exponential", "leading_exponential", "trailing_exponential",
]  # fmt: skip
Final = Literal["zero", "first"]

SMALLEST_ALPHA = 2.0**-24  # stands for "no signal": sigma is 4096, not infinite, as in diffusers
LCM_TIMESTEPS = 50  # that a latent consistency model is distilled on: 999 979 .. 39 19


class NoiseSchedule:
    """The discrete forward process; the defaults are those of every official Stable Diffusion.

    Its tables are fp64 on the CPU, with one entry for each training timestep 0 .. timesteps - 1:
      alphas_cumprod   a_t, the product of 1 - beta up to t; falling
      sigmas           sqrt((1 - a_t) / a_t); rising, from 0.0292 to 14.6146 with the defaults
    """

    def __init__(
        self,
        *,
        betas: BetaSchedule = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        timesteps: int = 1000,
        zero_terminal_snr: bool = False,
    ) -> None:
        """Build the tables.

        betas: "scaled_linear" spaces sqrt(beta) evenly (LDM), "linear" beta itself (DDPM).
        zero_terminal_snr: shift and stretch sqrt(a) until the last timestep is pure noise
          (Lin et al. 2023, algorithm 1); its sigma is 4096.
        Raises ValueError for an unknown `betas`, unless 0 < beta_start <= beta_end < 1, for fewer
        than two timesteps, and when the signal is gone before the last timestep.
        """
        if betas not in get_args(BetaSchedule):
            raise ValueError(f"betas must be one of {get_args(BetaSchedule)}, got {betas!r}")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start}, {beta_end}")
        if timesteps < 2:
            raise ValueError(f"timesteps must be at least 2, got {timesteps}")

        power = 2 if betas == "scaled_linear" else 1
        first, last = beta_start ** (1 / power), beta_end ** (1 / power)
        beta = torch.linspace(first, last, timesteps, dtype=torch.float64) ** power
        alphas_cumprod = torch.cumprod(1 - beta, dim=0)
        if zero_terminal_snr:
            root = alphas_cumprod.sqrt()
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            alphas_cumprod = root.square().clamp(min=SMALLEST_ALPHA)
        sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
        if alphas_cumprod[-1] < SMALLEST_ALPHA or not (sigmas.diff() > 0).all():
            raise ValueError(
                f"betas from {beta_start} to {beta_end} leave no signal before the last of "
                f"{timesteps} timesteps; lower beta_end or timesteps"
            )

        self.zero_terminal_snr = zero_terminal_snr
        self.alphas_cumprod = alphas_cumprod
        self.sigmas = sigmas

    def __len__(self) -> int:
        """Count the training timesteps."""
        return len(self.sigmas)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Draw z_t given x0: sqrt(a_t) x0 + sqrt(1 - a_t) noise (Ho et al. 2020, eq. 4).

        x0, noise: b c h w. t: b integers in 0 .. timesteps - 1.
        """
        signal, std = self._signal_and_std(t, like=x0)
        return signal * x0 + std * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Compute v = sqrt(a_t) noise - sqrt(1 - a_t) x0 (Salimans & Ho 2022, section 4).

        x0, noise: b c h w. t: b integers in 0 .. timesteps - 1.
        """
        signal, std = self._signal_and_std(t, like=x0)
        return signal * noise - std * x0

    def snr(self, t: Tensor) -> Tensor:
        """Look up the signal-to-noise ratio a_t / (1 - a_t), fp32, in the shape of integers `t`."""
        ratio = self.alphas_cumprod / (1 - self.alphas_cumprod)
        return ratio.to(t.device, torch.float32)[t]

    def sigma(self, t: float | Tensor) -> Tensor:
        """Look up the noise level of timesteps `t`, which may be fractional; fp64 on the CPU.

        Between table entries it is linear in sigma, as in diffusers.
        Raises ValueError for a timestep outside 0 .. timesteps - 1.
        """
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        last = len(self) - 1
        if not ((t >= 0) & (t <= last)).all():
            raise ValueError(f"timesteps must lie in 0 .. {last}, got {t.tolist()}")
        low = t.long().clamp(max=last - 1)
        return torch.lerp(self.sigmas[low], self.sigmas[low + 1], t - low)

    def timestep(self, sigma: float | Tensor) -> Tensor:
        """Find the timestep whose noise level is `sigma`; fp64 on the CPU, usually fractional.

        Table entries give exactly their integer. Between them it is linear in log sigma, as in
        k-diffusion and diffusers' Karras lists, so that timestep(sigma(t)) of a fractional t is t
        within 0.05. Levels beyond the table give its first or last timestep.
        """
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device="cpu")
        sigma = sigma.clamp(self.sigmas[0], self.sigmas[-1])
        high = torch.searchsorted(self.sigmas, sigma).clamp(min=1)
        log_low, log_high = self.sigmas[high - 1].log(), self.sigmas[high].log()
        return high - (log_high - sigma.log()) / (log_high - log_low)

    def steps(self, n: int, spacing: Spacing = "leading", *, offset: int = 1, final: Final = "zero") -> Tensor:
        """List the levels of `n` sampling steps: n + 1 strictly falling fp64 sigmas.

        n: any of 1 .. timesteps, for "lcm" 1 .. 50. A single step starts at the last timestep in every spacing.
        spacing, with the timesteps that it gives to 10 steps of 1000:
          "leading"   901 801 .. 101 1, multiples of timesteps // n plus `offset`: what Stable
                      Diffusion 1, 2 and XL are sampled with. Where the offset would leave the
                      table (1000 steps) it is lowered.
          "trailing"  999 899 .. 199 99, from the end down (Lin et al. 2023, section 3.3): Turbo
                      models and zero terminal SNR
          "linspace"  999 888 .. 111 0, both ends; fractional where n - 1 does not divide
          "karras"    999 916.3 .. 6.7 0, evenly in sigma^(1/7) (Karras et al. 2022, eq. 5)
          "exponential"  999 882.3 .. 5.1 0, evenly in log sigma
          "lcm"       999 899 .. 199 99, picked from the 50 that latent consistency models know
                      (Luo et al. 2023, section 4.3); 999 759 499 259 to 4 steps
          "leading_karras" and the like: that curve from the first to the last level of the list that
                      the first word names, as diffusers' Euler samplers combine the two
        offset: timesteps added in "leading"; the other spacings have no use for it.
        final: where the last step arrives. "zero": at a clean latent. "first": at the level of
          timestep 0, the habit of CompVis and of diffusers' `set_alpha_to_one=False`; a list whose
          last step starts there already ends at zero all the same.
        Raises ValueError for an n, spacing, offset or final outside of these.
        """
        if not 1 <= n <= len(self):
            raise ValueError(f"steps must lie in 1 .. {len(self)}, got {n}")
        if spacing not in get_args(Spacing):
            raise ValueError(f"spacing must be one of {get_args(Spacing)}, got {spacing!r}")
        if spacing == "lcm" and not n <= LCM_TIMESTEPS <= len(self):
            raise ValueError(f"spacing 'lcm' picks from {LCM_TIMESTEPS} of the timesteps, got {n} steps of {len(self)}")
        if offset < 0:
            raise ValueError(f"offset must be 0 or more timesteps, got {offset}")
        if final not in get_args(Final):
            raise ValueError(f"final must be one of {get_args(Final)}, got {final!r}")

        sigmas = self._levels(n, spacing, offset)
        end = self.sigmas[0] if final == "first" and sigmas[-1] > self.sigmas[0] else 0.0
        return torch.cat([sigmas, sigmas.new_tensor([end])])

    def _levels(self, n: int, spacing: str, offset: int) -> Tensor:
        """Where each of `n` steps starts, falling."""
        total = len(self)
        if n == 1:
            return self.sigmas[-1:]  # "leading" and "linspace" would start at the clean end
        base, _, curve = spacing.rpartition("_")
        if curve in ("karras", "exponential"):
            ends = self._levels(n, base or "linspace", offset)[[0, -1]]
            high, low = (ends ** (1 / 7) if curve == "karras" else ends.log()).tolist()
            inner = torch.linspace(high, low, n, dtype=torch.float64)[1:-1]
            inner = inner**7 if curve == "karras" else inner.exp()
            return torch.cat([ends[:1], inner, ends[1:]])
        i = torch.arange(n, dtype=torch.float64)
        if spacing == "leading":
            start = (n - 1) * (total // n)
            t = start - i * (total // n) + min(offset, total - 1 - start)
        elif spacing == "trailing":
            stride = (total - total / n) - total  # rounded as numpy's arange does: ties go as in
            t = (total + i * stride).round() - 1  # diffusers, which matters for 48 steps
        elif spacing == "lcm":
            k = LCM_TIMESTEPS - (i * LCM_TIMESTEPS / n).floor()
            t = k * (total // LCM_TIMESTEPS) - 1
        else:
            t = torch.linspace(total - 1, 0, n, dtype=torch.float64)
        return self.sigma(t)

    def _signal_and_std(self, t: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t) with the dtype and device of `like`, to multiply it with."""
        shape = (-1, *[1] * (like.ndim - 1))
        signal = self.alphas_cumprod.sqrt().to(like)[t].reshape(shape)
        std = (1 - self.alphas_cumprod).sqrt().to(like)[t].reshape(shape)
        return signal, std


def to_vp(x: Tensor, sigma: float | Tensor) -> Tensor:
    """Scale x0 + sigma noise to unit variance, as networks take it: x / sqrt(1 + sigma^2).

    After sampling to a final level above zero it gives the latents that other libraries return.
    """
    return x / math.sqrt(1 + float(sigma) ** 2)


def to_ve(z: Tensor, sigma: float | Tensor) -> Tensor:
    """Undo `to_vp`: z sqrt(1 + sigma^2). Of drawn noise it makes a sampler's starting point."""
    return z * math.sqrt(1 + float(sigma) ** 2)
