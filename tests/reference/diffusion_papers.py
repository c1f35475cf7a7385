"""The papers' own formulas, in alpha-bar space and written independently of `ldm.diffusion`.

Everything is fp64 and takes the cumulative products a (at the level left) and a_next (at the level
reached; 1 is a clean latent) as floats. `z` is the variance-preserving latent.
"""

import math

import torch
from torch import Tensor


def alphas_bar(*, scaled: bool = True, start=0.00085, end=0.012, timesteps=1000) -> list[float]:
    """Ho et al. 2020, section 2: the running product of 1 - beta_t, one factor at a time."""
    product, products = 1.0, []
    for t in range(timesteps):
        w = t / (timesteps - 1)
        power = 2 if scaled else 1  # of the evenly spaced root
        beta = ((1 - w) * start ** (1 / power) + w * end ** (1 / power)) ** power
        product *= 1 - beta
        products.append(product)
    return products


def zero_terminal_snr(products: list[float]) -> list[float]:
    """Lin et al. 2023, algorithm 1, on the cumulative products."""
    roots = [math.sqrt(a) for a in products]
    first, last = roots[0], roots[-1]
    return [((root - last) * first / (first - last)) ** 2 for root in roots]


def predicted_x0(z: Tensor, eps: Tensor, a: float) -> Tensor:
    """Ho et al. 2020, eq. 15."""
    return (z - math.sqrt(1 - a) * eps) / math.sqrt(a)


def ddpm(z: Tensor, eps: Tensor, noise: Tensor, a: float, a_next: float) -> Tensor:
    """Ho et al. 2020, eq. 6 and 7, with alpha_t = a / a_next for a subsequence of timesteps."""
    alpha = a / a_next
    beta = 1 - alpha
    mean = math.sqrt(a_next) * beta / (1 - a) * predicted_x0(z, eps, a)
    mean = mean + math.sqrt(alpha) * (1 - a_next) / (1 - a) * z
    return mean + math.sqrt((1 - a_next) / (1 - a) * beta) * noise


def ddim(z: Tensor, eps: Tensor, noise: Tensor, a: float, a_next: float, eta: float) -> Tensor:
    """Song et al. 2020, eq. 12, with the sigma of eq. 16."""
    sigma = eta * math.sqrt((1 - a_next) / (1 - a)) * math.sqrt(1 - a / a_next)
    towards = math.sqrt(1 - a_next - sigma**2) * eps
    return math.sqrt(a_next) * predicted_x0(z, eps, a) + towards + sigma * noise


def lcm(z: Tensor, eps: Tensor, noise: Tensor, t: float, a: float, a_next: float) -> Tensor:
    """Luo et al. 2023, algorithm 3: the consistency function, then noise again."""
    s = 10 * t  # their timestep scaling
    c_skip, c_out = 0.25 / (s**2 + 0.25), s / math.sqrt(s**2 + 0.25)
    clean = c_skip * z + c_out * predicted_x0(z, eps, a)
    return math.sqrt(a_next) * clean + math.sqrt(1 - a_next) * noise


def _lambda(a: float) -> float:
    return math.log(math.sqrt(a) / math.sqrt(1 - a))


def dpmpp_2m(z: Tensor, x0s: list[Tensor], a: list[float]) -> Tensor:
    """Lu et al. 2022 (DPM-Solver++), algorithm 2, the step that reaches a[-1].

    x0s: all estimates so far. a: the levels they were made at, and the one to reach.
    """
    alpha, sigma = math.sqrt(a[-1]), math.sqrt(1 - a[-1])
    if a[-1] == 1:
        return x0s[-1]  # the limit of the first-order step for h to infinity
    h = _lambda(a[-1]) - _lambda(a[-2])
    d = x0s[-1]
    if len(x0s) > 1:
        r = (_lambda(a[-2]) - _lambda(a[-3])) / h
        d = (1 + 1 / (2 * r)) * x0s[-1] - 1 / (2 * r) * x0s[-2]
    return sigma / math.sqrt(1 - a[-2]) * z - alpha * (math.exp(-h) - 1) * d


def dpmpp_2m_sde(z: Tensor, x0s: list[Tensor], a: list[float], noise: Tensor) -> Tensor:
    """Lu et al. 2022 (DPM-Solver++), section 5 and appendix: SDE-DPM-Solver++(2M), midpoint."""
    alpha, sigma = math.sqrt(a[-1]), math.sqrt(1 - a[-1])
    if a[-1] == 1:
        return x0s[-1]
    h = _lambda(a[-1]) - _lambda(a[-2])
    shrink = 1 - math.exp(-2 * h)
    out = sigma / math.sqrt(1 - a[-2]) * math.exp(-h) * z + alpha * shrink * x0s[-1]
    if len(x0s) > 1:
        r = (_lambda(a[-2]) - _lambda(a[-3])) / h
        out = out + alpha * shrink / (2 * r) * (x0s[-1] - x0s[-2])
    return out + sigma * math.sqrt(shrink) * noise


def edm_heun(x: Tensor, denoise, sigma: float, target: float) -> Tensor:
    """Karras et al. 2022, algorithm 1, one step; here x is the variance-exploding latent."""
    slope = (x - denoise(x, sigma)) / sigma
    reached = x + (target - sigma) * slope
    if target == 0:
        return reached
    second = (reached - denoise(reached, target)) / target
    return x + (target - sigma) * (slope + second) / 2


class Mixture:
    """A one-dimensional Gaussian mixture, whose diffusion is known in closed form at every level.

    At level sigma each component's variance grows by sigma^2, so the density, the distribution
    function and the posterior mean of x0 are elementary. The probability-flow ODE moves
    probability without letting paths cross, which in one dimension leaves one possibility: a point
    keeps its quantile. That makes its exact solution an inversion of two distribution functions.
    """

    def __init__(self) -> None:
        self.weight = torch.tensor([0.4, 0.6], dtype=torch.float64)
        self.mean = torch.tensor([-1.2, 0.8], dtype=torch.float64)
        self.std = torch.tensor([0.5, 0.3], dtype=torch.float64)

    def denoise(self, x: Tensor, sigma) -> Tensor:
        """E[x0 | x], the denoiser that a perfect network would learn."""
        sigma = float(sigma)
        x = x[..., None]
        variance = self.std**2 + sigma**2
        logits = self.weight.log() - 0.5 * variance.log() - (x - self.mean) ** 2 / (2 * variance)
        posterior = (self.std**2 * x + sigma**2 * self.mean) / variance
        return (logits.softmax(-1) * posterior).sum(-1)

    def cdf(self, x: Tensor, sigma: float) -> Tensor:
        """P(X <= x) at level sigma."""
        scaled = (x[..., None] - self.mean) / (2 * (self.std**2 + sigma**2)).sqrt()
        return (self.weight * 0.5 * (1 + torch.erf(scaled))).sum(-1)

    def quantile(self, q: Tensor, sigma: float) -> Tensor:
        """The x with cdf(x, sigma) = q, by bisection to the last digit."""
        low, high = torch.full_like(q, -200.0), torch.full_like(q, 200.0)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle, sigma) < q
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2
