"""The diffusion classifier (Li et al. 2023): the prompt whose denoiser is least wrong names the picture.

    python scripts/recipes/diffusion_classifier.py

Noise of many levels is added to the latents, the denoiser of each prompt removes it, and the error of eps is averaged:

    error(prompt) = E ||eps - eps(x0 + sigma eps, sigma, prompt)||^2, where eps - eps(...) = (x0(...) - x0) / sigma.

The levels decide what is measured. With the levels of equally spaced timesteps this is the denoising error of the
training (eq. 6). With levels equally spaced in log sigma, the error times the range of log sigma is -log p(x0 | prompt)
in nats, but for a constant that no prompt changes (Kong et al. 2023, eq. 9). All prompts see the same noise.
"""

import argparse
import math

import torch
from torch import Tensor

import ldm
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers import Noise
from ldm.geometry import grid
from ldm.pictures import save_png


def denoising_errors(denoise: Denoiser, x0: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
    """Return the mean of ||eps - eps(x)||^2 over the levels: b, one for each condition of the denoiser.

    x0: b c h w, the same latents in all rows. noise: draws 1 c h w, once for each level.
    """
    errors = []
    for sigma in sigmas:
        x = x0 + float(sigma) * noise().to(x0)
        errors.append(((denoise(x, sigma) - x0) / float(sigma)).square().flatten(1).sum(dim=1))
    return torch.stack(errors).mean(dim=0)


def negative_log_likelihoods(denoise: Denoiser, x0: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
    """Return -log p(x0 | condition) in nats but for a common constant: b. sigmas: equally spaced in log sigma."""
    return math.log(sigmas.max() / sigmas.min()) * denoising_errors(denoise, x0, sigmas, noise)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Let the model name the objects in its own pictures.")
    parser.add_argument("--prompt", default="a {} on the grass", help="{} stands for the object")
    parser.add_argument("--objects", nargs="+", default=["frog", "fox", "penguin", "apple", "car", "house"])
    parser.add_argument("--levels", type=int, default=16)
    parser.add_argument("--out", default="diffusion_classifier.png")
    args = parser.parse_args()
    pipe, prompts = ldm.load(), tuple(args.prompt.format(name) for name in args.objects)
    pictures = pipe.generate(ldm.Request(prompts, seed=1, images=len(prompts)))
    plan = pipe.plan(ldm.Request(prompts, guidance_scale=1, images=len(prompts)))  # a row for each prompt
    denoise, schedule = pipe.denoiser(plan, pipe.conditions(plan)), pipe.schedule
    spaced = torch.linspace(0, len(schedule) - 1, args.levels, dtype=torch.float64)
    methods = {
        "denoising error": (denoising_errors, schedule.sigma(spaced)),
        "likelihood": (negative_log_likelihoods, schedule.steps(args.levels, "exponential")[:-1]),
    }
    for name, (measure, sigmas) in methods.items():
        found = []
        for picture in pictures:
            latents, noise = pipe.encode_image(picture).expand(len(prompts), -1, -1, -1), plan.noise()
            found.append(int(measure(denoise, latents, sigmas, lambda draw=noise: draw()[:1]).argmin()))
        print(f"by {name}: {sum(i == j for i, j in enumerate(found))} of {len(prompts)} are right")
    save_png(grid(pictures), args.out, overwrite=True)


if __name__ == "__main__":
    main()
