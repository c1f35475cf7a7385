"""What guidance does to a picture: scale, rescale, interval and APG (Sadat et al. 2024) as curves.

    python scripts/recipes/guidance_curves.py

With x0_c for the prompt, x0_u without it, and d = x0_c - x0_u, guidance of scale w adds (w - 1) d to x0_c. APG adds
only the part of d that is orthogonal to x0_c, with at most the norm r and a negative momentum beta (algorithm 1):

    d <- d + beta d_before,    d' = d min(1, r / |d|),    x0 = x0_c + (w - 1) (d' - <d', x0_c> x0_c / |x0_c|^2)

The agreement is what guidance raises, log p(prompt | x0) - log p(prompt) in nats (Ho and Salimans 2022), as the model
itself sees it: the error of eps without the prompt minus the error with it, integrated over log sigma.
The plot needs the extra `plots`.
"""

import argparse
import dataclasses

import numpy as np
import torch
from torch import Tensor

import ldm
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers import Noise

PROMPTS = tuple(f"a 3D {name} {ground}" for ground in ("on the grass", "at night") for name in ("fox", "car"))
WAYS = {"guidance": {}, "rescale": {"guidance_rescale": 0.7}, "interval": {"guidance_interval": (0.3, 5.0)}, "APG": {}}


def apg(cond: Denoiser, uncond: Denoiser, scale: float, norm: float = 2.5, momentum: float = 0.0) -> Denoiser:
    """Make the denoiser of adaptive projected guidance, for one sampling. norm: r.

    momentum: beta, negative in the paper. In few steps, as here, pictures are better without it.
    """
    d: float | Tensor = 0.0

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal d
        x0 = cond(x, sigma)
        d = x0 - uncond(x, sigma) + momentum * d
        length, unit = d.flatten(1).norm(dim=1), x0 / x0.flatten(1).norm(dim=1)[:, None, None, None]
        short = d * (norm / length).clamp(max=1)[:, None, None, None]
        return x0 + (scale - 1) * (short - (short * unit).sum(dim=(1, 2, 3), keepdim=True) * unit)

    return denoise


def agreement(cond: Denoiser, uncond: Denoiser, x0: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
    """Return log p(prompt | x0) - log p(prompt) in nats: b. sigmas: equally spaced in log sigma."""
    gains = []
    for sigma in sigmas:
        x = x0 + float(sigma) * noise()
        without, given = ((x0 - d(x, sigma)).flatten(1).square().sum(dim=1) / sigma**2 for d in (uncond, cond))
        gains.append(without - given)
    return torch.stack(gains).mean(dim=0) * (sigmas.max() / sigmas.min()).log()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what guidance does.")
    parser.add_argument("--scales", nargs="+", type=float, default=[1, 3, 6, 12])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", default="guidance_curves.png")
    args = parser.parse_args()
    from matplotlib.figure import Figure  # the functions above work without it

    pipe, plain = ldm.load(), ldm.Request(PROMPTS, images=len(PROMPTS), seed=1, steps=args.steps, guidance_scale=2)
    plan, levels = pipe.plan(plain), torch.logspace(-0.7, 0.7, 4, dtype=torch.float64)
    cond, uncond = (pipe.denoiser(plan, [condition]) for condition in pipe.conditions(plan))
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    for name, options in WAYS.items():
        rows = []
        for scale in args.scales:
            plan = pipe.plan(dataclasses.replace(plain, guidance_scale=scale, **options))
            denoise = apg(cond, uncond, scale) if name == "APG" else pipe.denoiser(plan, pipe.conditions(plan))
            *_, last = pipe.walk(plan, denoise, pipe.start(plan))
            agreed = agreement(cond, uncond, last.latents, levels, plan.noise()).mean()
            colors = np.stack(pipe.decode(last.latents)).astype(int)
            rows.append((float(agreed), np.ptp(colors, axis=3).mean(), colors.std(axis=(1, 2, 3)).mean()))
        for axes, title, values in zip(panels, ("agreement", "saturation", "contrast"), np.array(rows).T, strict=True):
            axes.plot(args.scales, values, label=name)
            axes.set(title=title, xlabel="guidance scale")
            print(f"{name}, {title} at scales {args.scales}: " + ", ".join(f"{value:.0f}" for value in values))
    panels[0].legend()
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
