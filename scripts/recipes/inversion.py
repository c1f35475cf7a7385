"""Inversion: from a picture to the noise that makes it, by DDIM, by DDIM with fixed points, and by edit-friendly DDPM.

    python scripts/recipes/inversion.py "a frog on the grass" "a fox on the grass"

DDIM inversion (Song et al. 2020, section 4.3) takes the steps of DDIM from low to high noise levels. Each step uses x0
at its low level, and DDIM uses x0 at the high level: therefore the inversion is not exact. The fixed point (Pan et al.
2023, eq. 8) solves for the x' at the level sigma' whose DDIM step to sigma is x, by repeating

    x' <- x0(x', sigma') + sigma' / sigma (x - x0(x', sigma')).

Edit-friendly DDPM inversion (Huberman-Spiegelglas et al. 2024, eq. 6 and algorithm 1) draws x at every level with noise
of its own, and then finds the noise that DDPM must add to go from each to the next. It is exact with any steps.

The command prints the error of the latents after inversion and sampling, relative to their norm. The picture shows the
sampling with the prompt (above) and with another prompt (below), by the three methods.
"""

import argparse
import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

import ldm
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.inversion import invert
from ldm.diffusion.samplers import Noise, Step, ddim, ddpm
from ldm.geometry import grid
from ldm.pictures import save_png


def invert_fixed_point(denoise: Denoiser, x: Tensor, sigmas: Tensor, *, iterations: int = 3) -> Iterator[Step]:
    """Invert DDIM; each step is corrected `iterations` times. With 0, this equals `ldm.diffusion.inversion.invert`.

    x: b c h w, at the level sigmas[0]. sigmas: rising levels above 0. The iteration converges if the levels are close:
    (sigma' / sigma - 1) times the slope of x0, which is at most about 1, must be below 1.
    """
    for i, (sigma, target) in enumerate(pairwise(sigmas.tolist())):
        x0 = denoise(x, sigmas[i])
        ahead = x0 + target / sigma * (x - x0)
        for _ in range(iterations):
            x0 = denoise(ahead, sigmas[i + 1])
            ahead = x0 + target / sigma * (x - x0)
        x = ahead
        yield Step(i, len(sigmas) - 1, target, x, x0)


def invert_edit_friendly(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> tuple[Tensor, list[Tensor]]:
    """Return x at the level sigmas[0], and the noise of each step with which `ddpm` comes back to x.

    x: b c h w, at the level sigmas[-1]. sigmas: falling levels above 0.
    """
    path = [*(x + sigma * noise() for sigma in sigmas[:-1].tolist()), x]
    noises = []
    for i, (before, after) in enumerate(pairwise(path)):
        sigma, target = sigmas[i : i + 2].tolist()
        mean = next(ddpm(denoise, before, sigmas[i : i + 2], noise=lambda: torch.zeros_like(x))).x
        noises.append((after - mean) / (target * math.sqrt(1 - (target / sigma) ** 2)))
    return path[0], noises


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Invert a picture, and sample it again with two prompts.")
    parser.add_argument("prompt", nargs="?", default="a frog on the grass")
    parser.add_argument("other", nargs="?", default="a fox on the grass")
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 20, 40])
    parser.add_argument("--out", default="inversion.png")
    args = parser.parse_args()
    pipe = ldm.load()
    (picture,) = pipe.generate(ldm.Request(args.prompt, seed=1))
    plans = [pipe.plan(ldm.Request(prompt, guidance_scale=1)) for prompt in (args.prompt, args.other)]
    given, other = (pipe.denoiser(plan, pipe.conditions(plan)) for plan in plans)
    latents, noise = pipe.encode_image(picture), plans[0].noise()
    for steps in args.steps:
        sigmas = pipe.schedule.steps(steps + 1, "exponential")[:-1]
        *_, plain = invert(given, latents, sigmas.flip(0))
        *_, fixed = invert_fixed_point(given, latents, sigmas.flip(0))
        start, noises = invert_edit_friendly(given, latents, sigmas, noise)
        runs = [(ddim, plain.x, []), (ddim, fixed.x, []), (ddpm, start, noises)]
        ends = [list(f(d, x, sigmas, noise=iter(z).__next__))[-1].x for d in (given, other) for f, x, z in runs]
        errors = [float((end - latents).norm() / latents.norm()) for end in ends[:3]]
        print(f"{steps} steps: DDIM {errors[0]:.4f}, fixed point {errors[1]:.4f}, edit-friendly {errors[2]:.6f}")
    save_png(grid(pipe.decode(torch.cat(ends))), args.out, overwrite=True)


if __name__ == "__main__":
    main()
