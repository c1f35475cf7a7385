"""Error and order of the ODE samplers on one model and one schedule (Karras et al. 2022, figure 2, for latents).

    python scripts/recipes/sampler_orders.py "a frog on the grass"

All samplers start from the same noise and walk levels that are equally spaced in log sigma, without guidance. The error
is the distance from the solution of the ODE, Heun with many steps, relative to its norm, after as many calls of the
denoiser as the line says: a step of Heun has two. The order is the slope between two lines: of order p, a sampler with
twice the calls has 2^-p of the error. In these variables DDIM is Euler; the other samplers add noise and follow no ODE.
The plot shows the errors, and x0 of dpmpp_2m with 16 calls, step by step. It needs the extra `plots`.
"""

import argparse
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import ldm
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import NoiseSchedule, to_ve
from ldm.geometry import grid

CALLS = {"euler": 1, "heun": 2, "dpmpp_2m": 1}  # of the denoiser in each step


def sampled(denoise: Denoiser, noise: Tensor, schedule: NoiseSchedule, name: str, steps: int) -> Tensor:
    """Walk from noise, b c h w of unit variance, to the lowest level of the schedule, and return x there."""
    sigmas = schedule.steps(steps + 1, "exponential")[:-1]
    *_, last = SAMPLERS[name](denoise, to_ve(noise, sigmas[0]), sigmas, noise=None)
    return last.x


def errors(
    denoise: Denoiser, noise: Tensor, schedule: NoiseSchedule, calls: Sequence[int], *, reference: int
) -> Mapping[str, list[float]]:
    """Return the relative error of each sampler with each number of calls. reference: steps of Heun for the solution.

    noise: b c h w of unit variance.
    """
    exact = sampled(denoise, noise, schedule, "heun", reference)
    ends = {name: [sampled(denoise, noise, schedule, name, n // each) for n in calls] for name, each in CALLS.items()}
    return {name: [float((x - exact).norm() / exact.norm()) for x in xs] for name, xs in ends.items()}


def orders(errors: Sequence[float], calls: Sequence[int]) -> list[float]:
    """Return the slope of the error between each number of calls and the next."""
    steps = range(len(calls) - 1)
    return [math.log(errors[i] / errors[i + 1]) / math.log(calls[i + 1] / calls[i]) for i in steps]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the order of the samplers.")
    parser.add_argument("prompt", nargs="?", default="a frog on the grass")
    parser.add_argument("--calls", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--reference", type=int, default=200)
    parser.add_argument("--out", default="sampler_orders.png")
    args = parser.parse_args()
    from matplotlib.figure import Figure  # the functions above work without it

    figure, pipe = Figure(figsize=(10, 5), layout="constrained"), ldm.load()
    curves, strip = figure.subplots(1, 2)
    plan = pipe.plan(ldm.Request(args.prompt, guidance_scale=1, seed=1))
    denoise, noise = pipe.denoiser(plan, pipe.conditions(plan)), plan.initial_noise()()
    for name, found in errors(denoise, noise, pipe.schedule, args.calls, reference=args.reference).items():
        slopes = ["", *(f" (order {order:.1f})" for order in orders(found, args.calls))]
        cells = (f"{n} calls {e:.4f}{slope}" for n, e, slope in zip(args.calls, found, slopes, strict=True))
        print(f"{name}: {', '.join(cells)}")
        curves.loglog(args.calls, found, "o-", label=name)
    curves.set(xlabel="calls of the denoiser", ylabel="relative error")
    curves.legend()
    sigmas = pipe.schedule.steps(16, "exponential")
    walk = SAMPLERS["dpmpp_2m"](denoise, to_ve(noise, sigmas[0]), sigmas)
    strip.imshow(grid(pipe.decode(torch.cat([step.x0 for step in walk]))))
    strip.set(title="x0 of dpmpp_2m in 16 steps", xticks=[], yticks=[])
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
