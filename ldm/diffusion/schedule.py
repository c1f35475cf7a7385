"""The noise schedule of the forward process, and the lists of noise levels for sampling.

Noisy latents have two forms, and this file converts between them:

    z = sqrt(a) x0 + sqrt(1 - a) noise    with alpha-bar a (Ho et al. 2020, eq. 4; unit variance, "VP")
    x = x0 + sigma noise                  with noise level sigma (Karras et al. 2022; growing variance, "VE")

x is z / sqrt(a), with sigma = sqrt((1 - a) / a). `to_vp` turns x into z, and `to_ve` turns z into x.
Networks and training use z. Samplers use x, because in this form most of them only mix x and x0. A DDIM step in z is
(Song et al. 2020, eq. 12 and 16)

    z' = sqrt(a') x0 + sqrt(1 - a' - s^2) eps + s noise,
    s  = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')

The same step in x follows by division by sqrt(a'), because a / a' = (1 + sigma'^2) / (1 + sigma^2):

    x' = x0 + sqrt(sigma'^2 - up^2) eps + up noise,
    up = eta sigma' sqrt(1 - sigma'^2 / sigma^2)

This step is DDIM and Euler with eta = 0, and DDPM and ancestral sampling with eta = 1.

Spacing, offset and final level are scheduler options in other libraries. Here they only change the list of sigmas.
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

BetaSchedule = Literal["scaled_linear", "linear", "cosine"]
Spacing = Literal[
    "leading", "trailing", "linspace", "lcm", "karras", "leading_karras", "trailing_karras",
    "exponential", "leading_exponential", "trailing_exponential",
]  # fmt: skip
Final = Literal["zero", "first"]

SMALLEST_ALPHA = 2.0**-24  # replaces 0 at zero terminal SNR, as in diffusers: sigma is 4096, not infinite
LARGEST_SIGMA = 1e6  # above this level, x in fp32 holds almost nothing of x0
LCM_TIMESTEPS = 50  # the number of timesteps that LCMs are distilled on: 999 979 .. 39 19


class NoiseSchedule:
    """The discrete noise schedule. The defaults are those of every official Stable Diffusion.

    Its tables have one entry per training timestep 0 .. timesteps - 1, fp64 on the CPU. Reading them gives copies.
      alphas_cumprod   a_t, the product of 1 - beta up to t; falling
      sigmas           sqrt((1 - a_t) / a_t); rising, from 0.0292 to 14.6146 with the defaults
    """

    def __init__(
        self,
        betas: BetaSchedule | Tensor = "scaled_linear",
        *,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        timesteps: int = 1000,
        zero_terminal_snr: bool = False,
    ) -> None:
        """Build the tables.

        betas: "scaled_linear" spaces sqrt(beta) evenly (LDM), "linear" spaces beta evenly (DDPM), "cosine" follows
          Nichol & Dhariwal 2021, eq. 17, without beta_start and beta_end. A tensor holds the beta of each timestep; the
          three arguments after it are then not used.
        zero_terminal_snr: shift and scale sqrt(a), so that the last timestep is pure noise (Lin et al. 2023,
          algorithm 1). Its sigma is 4096.
        Raises ValueError for unknown `betas`, betas outside 0 < beta < 1, beta_start > beta_end, and fewer than two
        timesteps. Raises it if no signal is left before the last timestep.
        """
        beta = _betas(betas, beta_start, beta_end, timesteps)
        alphas_cumprod = torch.cumprod(1 - beta, dim=0)
        if zero_terminal_snr:
            root = alphas_cumprod.sqrt()
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            alphas_cumprod = root.square().clamp(min=SMALLEST_ALPHA)
        sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
        if not sigmas[-1] < LARGEST_SIGMA or not (sigmas.diff() > 0).all():
            raise ValueError(
                f"these betas leave no signal before the last of {len(beta)} timesteps: lower beta_end or timesteps"
            )
        self._alphas_cumprod, self._sigmas = alphas_cumprod, sigmas
        self.zero_terminal_snr = zero_terminal_snr

    @classmethod
    def from_config(cls, config: Any) -> "NoiseSchedule":
        """Build the schedule from a `DiffusionConfig`, or from any object that has the five attributes below."""
        names = "betas", "beta_start", "beta_end", "timesteps", "zero_terminal_snr"
        return cls(**{name: getattr(config, name) for name in names})

    @property
    def alphas_cumprod(self) -> Tensor:
        """The product of 1 - beta up to each timestep, fp64."""
        return self._alphas_cumprod.clone()

    @property
    def sigmas(self) -> Tensor:
        """The noise level of each timestep, fp64."""
        return self._sigmas.clone()

    def __len__(self) -> int:
        """Return the number of training timesteps."""
        return len(self._sigmas)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Compute z_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise (Ho et al. 2020, eq. 4).

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
        """Look up the signal-to-noise ratio a_t / (1 - a_t), fp32, of timesteps `t`: integers of any shape."""
        ratio = self._alphas_cumprod / (1 - self._alphas_cumprod)
        return ratio.to(t.device, torch.float32)[t]

    def sigma(self, t: float | Tensor) -> Tensor:
        """Look up the noise level of timesteps `t`, which may be fractions. The result is fp64 on the CPU.

        Between table entries, sigma is interpolated linearly, as in diffusers.
        Raises ValueError for a timestep outside 0 .. timesteps - 1.
        """
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        last = len(self) - 1
        if not ((t >= 0) & (t <= last)).all():
            raise ValueError(f"timesteps must lie in 0 .. {last}, got {t.tolist()}")
        low = t.long().clamp(max=last - 1)
        return torch.lerp(self._sigmas[low], self._sigmas[low + 1], t - low)

    def timestep(self, sigma: float | Tensor) -> Tensor:
        """Find the timestep with noise level `sigma`, usually a fraction. The result is fp64 on the CPU.

        Levels in the table give exactly their integer. Between them, the timestep is linear in log sigma, as in
        k-diffusion and in diffusers' Karras lists. So timestep(sigma(t)) differs from a fraction t by up to 0.05.
        A level outside the table gives the first or the last timestep.
        """
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device="cpu")
        sigma = sigma.clamp(self._sigmas[0], self._sigmas[-1])
        high = torch.searchsorted(self._sigmas, sigma).clamp(min=1)
        log_low, log_high = self._sigmas[high - 1].log(), self._sigmas[high].log()
        return high - (log_high - sigma.log()) / (log_high - log_low)

    def steps(
        self,
        n: int,
        spacing: Spacing = "leading",
        *,
        offset: int = 1,
        final: Final = "zero",
        start: float | None = None,
    ) -> Tensor:
        """List the levels of `n` sampling steps: n + 1 strictly falling sigmas, fp64.

        n: 1 to timesteps; for "lcm" 1 to 50. A single step starts at the last timestep.
        spacing, each with its timesteps for 10 steps of 1000:
          "leading"   901 801 .. 101 1, multiples of timesteps // n plus `offset`: for Stable Diffusion 1, 2 and XL.
                      If the offset would exceed the last timestep (1000 steps), it is lowered.
          "trailing"  999 899 .. 199 99, from the end down (Lin et al. 2023, section 3.3): for Turbo models and zero
                      terminal SNR.
          "linspace"  999 888 .. 111 0, with both ends. Timesteps may be fractions.
          "karras"    999 916.3 .. 6.7 0, evenly in sigma^(1/7) (Karras et al. 2022, eq. 5).
          "exponential"  999 882.3 .. 5.1 0, evenly in log sigma.
          "lcm"       999 899 .. 199 99, taken from the 50 timesteps of latent consistency models (Luo et al. 2023,
                      section 4.3). 4 steps are 999 759 499 259.
          "leading_karras" and similar: the ends of the first word's list, with the curve of the second word between
                      them, as in diffusers' Euler samplers.
        offset: the number that "leading" adds to its timesteps.
        final: the last level. "zero": clean latents. "first": the level of timestep 0, as in CompVis and in diffusers'
          `set_alpha_to_one=False`. If the last step already starts at this level, the list ends at zero.
        start: the first level (default: as `spacing` gives it). The timesteps, or the curve, are scaled to this level.
        Raises ValueError for an n, spacing, offset, final or start that is not allowed.
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
        low, high = float(self._sigmas[1]), float(self._sigmas[-1])
        if start is not None and not low <= start <= high:
            raise ValueError(f"the start level must lie in {low:.4f} .. {high:.4f}, got {start}")

        sigmas = self._levels(n, spacing, offset, start)
        end = self._sigmas[0] if final == "first" and sigmas[-1] > self._sigmas[0] else 0.0
        return torch.cat([sigmas, sigmas.new_tensor([end])])

    def _levels(self, n: int, spacing: str, offset: int, start: float | None = None) -> Tensor:
        """Return the level at which each of `n` steps starts, falling."""
        total = len(self)
        if n == 1:  # "leading" and "linspace" would start at the clean end
            return self._sigmas[-1:] if start is None else self._sigmas.new_tensor([start])
        base, _, curve = spacing.rpartition("_")
        if curve in ("karras", "exponential"):
            ends = self._levels(n, base or "linspace", offset, start)[[0, -1]]
            high, low = (ends ** (1 / 7) if curve == "karras" else ends.log()).tolist()
            inner = torch.linspace(high, low, n, dtype=torch.float64)[1:-1]
            inner = inner**7 if curve == "karras" else inner.exp()
            return torch.cat([ends[:1], inner, ends[1:]])
        i = torch.arange(n, dtype=torch.float64)
        if spacing == "leading":
            lowered = (n - 1) * (total // n)
            t = lowered - i * (total // n) + min(offset, total - 1 - lowered)
        elif spacing == "trailing":
            stride = (total - total / n) - total  # rounds as numpy's arange does, so that ties
            t = (total + i * stride).round() - 1  # are as in diffusers, such as those of 48 steps
        elif spacing == "lcm":
            k = LCM_TIMESTEPS - (i * LCM_TIMESTEPS / n).floor()
            t = k * (total // LCM_TIMESTEPS) - 1
        else:
            t = torch.linspace(total - 1, 0, n, dtype=torch.float64)
        if start is None:
            return self.sigma(t)
        # Invert `self.sigma`. `self.timestep` interpolates differently, so that a level could lie above `start`.
        above = int(torch.searchsorted(self._sigmas, start).clamp(min=1))
        low, high = self._sigmas[above - 1 : above + 1].tolist()
        levels = self.sigma(t / t[0] * (above - (high - start) / (high - low)))
        levels[0] = start  # exactly
        return levels

    def _signal_and_std(self, t: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(a_t) and sqrt(1 - a_t) in a shape that multiplies `like`."""
        signal, std = self._alphas_cumprod.sqrt().to(like)[t], (1 - self._alphas_cumprod).sqrt().to(like)[t]
        return per_image(signal, like), per_image(std, like)


def to_vp(x: Tensor, sigma: float | Tensor) -> Tensor:
    """Scale x = x0 + sigma noise to unit variance: z = x / sqrt(1 + sigma^2), the input of networks.

    sigma: one level, or one per image: b.
    """
    return x / (1 + factor(sigma, x) ** 2) ** 0.5


def to_ve(z: Tensor, sigma: float | Tensor) -> Tensor:
    """Undo `to_vp`: x = z sqrt(1 + sigma^2). For drawn noise z, this x is the start of sampling at the level sigma."""
    return z * (1 + factor(sigma, z) ** 2) ** 0.5


def factor(number: float | Tensor, like: Tensor) -> Any:
    """Return `number` in a form that multiplies `like`: a float, or for one number per image a tensor b 1 1 1."""
    if isinstance(number, Tensor) and number.ndim:
        return per_image(number.to(like), like)
    return float(number)


def per_image(numbers: Tensor, like: Tensor) -> Tensor:
    """Reshape numbers: b to b 1 1 1, with as many dimensions as `like`."""
    return numbers.reshape(-1, *[1] * (like.ndim - 1))


def _betas(betas: BetaSchedule | Tensor, beta_start: float, beta_end: float, timesteps: int) -> Tensor:
    """Return the beta of each timestep, fp64."""
    if not isinstance(betas, Tensor):
        if not isinstance(betas, str) or betas not in get_args(BetaSchedule):
            raise ValueError(f"betas must be a tensor or one of {get_args(BetaSchedule)}, got {betas!r}")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start}, {beta_end}")
        if timesteps < 2:
            raise ValueError(f"timesteps must be at least 2, got {timesteps}")
        if betas == "cosine":
            u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
            alphas_cumprod = ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2
            return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
        power = 2 if betas == "scaled_linear" else 1
        first, last = beta_start ** (1 / power), beta_end ** (1 / power)
        return torch.linspace(first, last, timesteps, dtype=torch.float64) ** power
    if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError("a tensor of betas must hold two or more numbers between 0 and 1, one per timestep")
    return betas.to("cpu", torch.float64)
