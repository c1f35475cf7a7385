"""Error and order of every sampler on one schedule (Karras et al. 2022, figure 2), for Gaussians and for the model.

    python scripts/recipes/sampler_orders.py "a frog on the grass"

Levels are evenly spaced in log sigma. Of order p, twice the calls of the denoiser leave 2^-p of the error. With the
exact denoiser of N(0, s^2), the last x is a sum of the initial noise and the draws, times constants. So its law is
known without samples. Its error is the Wasserstein-2 distance from the exact law, relative to this law's root mean
square: for samplers of the ODE, the error of x. lcm is for consistency functions: with the exact one it has no error.
With the model, x of the ODE's samplers is compared with Heun's of many steps. The plot needs the extra `plots`.
"""

import argparse

import torch
from torch import Tensor

import ldm
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import NoiseSchedule, to_ve
from ldm.geometry import grid

CALLS, STD = {"euler": 1, "heun": 2, "dpmpp_2m": 1}, torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)  # s


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """Return the exact E[x0 | x] for x0 from N(0, STD^2)."""
    return STD**2 / (STD**2 + sigma**2) * x


def distance(denoise: Denoiser, schedule: NoiseSchedule, name: str, calls: int) -> float:
    """Return the distance of a sampler's law from N(0, STD^2 + sigma^2) at its last level. denoise is linear in x."""
    sigmas = schedule.steps(calls // CALLS.get(name, 1) + 1, "exponential")[:-1]
    sources = torch.eye(len(sigmas), dtype=torch.float64)[..., None]  # noise k reaches only x[k], and variances add up
    draws, exact = iter(sources[1:]), (STD**2 + sigmas[:, None] ** 2).sqrt()
    *_, last = SAMPLERS[name](denoise, exact[0] * sources[0], sigmas, noise=lambda: next(draws))
    return float((last.x.norm(dim=0) - exact[-1]).norm() / exact[-1].norm())


def sampled(denoise: Denoiser, noise: Tensor, schedule: NoiseSchedule, name: str, steps: int) -> Tensor:
    """Walk from noise, b c h w of unit variance, to the lowest level of the schedule, and return x there."""
    sigmas = schedule.steps(steps + 1, "exponential")[:-1]
    *_, last = SAMPLERS[name](denoise, to_ve(noise, sigmas[0]), sigmas, noise=None)
    return last.x


def error(denoise: Denoiser, noise: Tensor, schedule: NoiseSchedule, name: str, calls: int, exact: Tensor) -> float:
    """Return the error of the x that `sampled` returns, relative to the norm of the exact one."""
    x = sampled(denoise, noise, schedule, name, calls // CALLS[name])
    return float((x - exact).norm() / exact.norm())


def orders(errors: list[float], calls: list[int]) -> list[float]:
    """Return the slope of the error between each number of calls and the next."""
    falls, rises = torch.tensor([errors, calls], dtype=torch.float64).log().diff()
    return (-falls / rises).tolist()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the order of the samplers.")
    parser.add_argument("prompt", nargs="?", default="a frog on the grass")
    parser.add_argument("--calls", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--reference", type=int, default=200)
    parser.add_argument("--out", default="sampler_orders.png")
    args, pipe = parser.parse_args(), ldm.load()
    from matplotlib.figure import Figure  # the functions above work without it

    figure = Figure(figsize=(15, 5), layout="constrained")
    *plots, strip = figure.subplots(1, 3)
    plan = pipe.plan(ldm.Request(args.prompt, guidance_scale=1, seed=1, steps=16, spacing="exponential"))
    denoise, noise = pipe.denoiser(plan, pipe.conditions(plan)), plan.initial_noise()()
    known = {name: [distance(gaussian, pipe.schedule, name, n) for n in args.calls] for name in SAMPLERS}
    exact = sampled(denoise, noise, pipe.schedule, "heun", args.reference)
    model = {name: [error(denoise, noise, pipe.schedule, name, n, exact) for n in args.calls] for name in CALLS}
    for plot, title, table in zip(plots, ("Gaussian", "model"), (known, model), strict=True):
        print(f"{title:15}", " ".join(f"{f'{n} calls':18}" for n in args.calls).rstrip())
        for name, found in table.items():
            slopes = ["", *(f"(order {order:.1f})" for order in orders(found, args.calls))]
            print(f"{name:15}", *(f"{e:.4f} {slope:11}" for e, slope in zip(found, slopes, strict=True)))
            plot.loglog(args.calls, found, "o-", label=name)
        plot.set(title=title, xlabel="calls of the denoiser", ylabel="relative error")
        plot.legend()
    strip.imshow(grid(pipe.decode(torch.cat([step.x0 for step in pipe.walk(plan, denoise, pipe.start(plan))]))))
    strip.set(title=f"x0 of {plan.sampler} in {plan.steps} steps", xticks=[], yticks=[])
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
