"""Delta Denoising Score (Hertz et al. 2023): edit a picture by the difference of two score distillations.

    python scripts/recipes/dds.py "a frog on the grass" "a cat on the grass"

Equation 3 of the paper, with one noise eps of the level sigma on both latents, z of the edit and z_hat of the source:

    grad = eps_hat(z + sigma eps, y) - eps_hat(z_hat + sigma eps, y_hat),    eps_hat(x) = (x - x0(x, sigma)) / sigma

y is the new prompt, y_hat describes the source. Score distillation of the source with its own prompt should be 0, and
what is there instead is the error that blurs pictures. The subtraction removes it, so that the ground stays sharp.
"""

import argparse

import torch
from torch import Tensor

import ldm
from ldm.diffusion.denoiser import Denoiser
from ldm.geometry import grid
from ldm.images import to_tensor
from ldm.pictures import save_png


@torch.no_grad()
def dds(edit: Denoiser, describe: Denoiser, latents: Tensor, source: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Return the gradient with respect to latents: b c h w.

    edit, describe: denoisers with the new prompt and with the prompt of the source. source: b c h w, clean latents.
    sigma: one level. noise: b c h w of unit variance.
    """
    x, x_source = latents + float(sigma) * noise, source + float(sigma) * noise
    return ((x - edit(x, sigma)) - (x_source - describe(x_source, sigma))) / float(sigma)


def changed(pipe: ldm.Pipeline, source: Tensor, prompts: tuple[str, str], steps: int, rate: float = 0.1) -> Tensor:
    """Change latents of a picture, 1 c h w, from the first prompt to the second, by gradient descent.

    Each step draws a noise level from those of the model's own sampling steps, without the lowest tenth.
    """
    plans = [pipe.plan(ldm.Request(prompt, seed=2)) for prompt in prompts]
    describe, edit = (pipe.denoiser(plan, pipe.conditions(plan)) for plan in plans)
    sigmas, noise = plans[0].sigmas[: -max(2, plans[0].steps // 10)], plans[0].noise()
    generator, latents = torch.Generator().manual_seed(2), source
    for _ in range(steps):
        sigma = sigmas[torch.randint(len(sigmas), (), generator=generator)]
        latents = latents - rate * dds(edit, describe, latents, source, sigma, noise())
    return latents


def main() -> None:
    parser = argparse.ArgumentParser(description="Change the object of a picture and keep the ground.")
    parser.add_argument("source", nargs="?", default="a frog on the grass")
    parser.add_argument("prompt", nargs="?", default="a cat on the grass")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", default="dds.png")
    args = parser.parse_args()
    pipe = ldm.load()
    *_, last = pipe.stream(ldm.Request(args.source, seed=1))
    edited = changed(pipe, last.latents, (args.source, args.prompt), args.steps)
    pictures = pipe.decode(torch.cat([last.latents, edited]))
    save_png(grid(pictures), args.out, overwrite=True)
    before, after = map(to_tensor, pictures)
    change = 127.5 * (after - before)[0].abs().mean(dim=0)  # h w
    edge = len(change) // 8
    inside = change[2 * edge : -2 * edge, 2 * edge : -2 * edge].mean()
    change[edge:-edge, edge:-edge] = torch.nan
    print(f"{args.steps} steps: the middle changed by {inside:.1f} of 255 levels, the border by {change.nanmean():.1f}")


if __name__ == "__main__":
    main()
