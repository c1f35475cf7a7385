"""Semantic guidance (SEGA, Brack et al. 2023): edit a picture in the making, in the few places that an edit is about.

    python scripts/recipes/semantic_guidance.py "a frog on the grass" --add "a fox" --remove "a frog"

Equations 4 to 8 of the paper add the guidance gamma of the edits e to that of the prompt p. eps(x) has no prompt.

    eps'     = eps(x) + s_g (eps(x, p) - eps(x)) + gamma
    gamma    = sum_e mask_e psi_e + s_m nu,    psi_e = s_e (eps(x, e) - eps(x)), where s_e < 0 removes e
    mask_e   = 1 where |psi_e| is above its quantile lambda in this channel, else 0
    nu'      = beta nu + (1 - beta) gamma          the momentum, which grows during the warm-up, too

Within the first steps, the warm-up, gamma is not added, so that the composition stays.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

import ldm
from ldm.diffusion.denoiser import Denoiser
from ldm.geometry import grid
from ldm.images import to_tensor
from ldm.pictures import save_png


def largest(psi: Tensor, threshold: float) -> Tensor:
    """Return psi, b c h w, with 0 where |psi| is below the quantile `threshold`, 0 to 1, of its channel."""
    size = psi.abs()
    return torch.where(size >= size.flatten(2).quantile(threshold, dim=2)[..., None, None], psi, 0)


def semantic(
    uncond: Denoiser, prompt: Denoiser, edits: Sequence[tuple[Denoiser, float]], guidance: float, *,
    warmup: int = 4, threshold: float = 0.9, scale: float = 0.3, beta: float = 0.6,
) -> Denoiser:  # fmt: skip
    """Make the denoiser of one run of a sampler that calls it once for each level, such as DDIM.

    edits: a denoiser and the weight s_e of each edit. warmup: steps. threshold: lambda. scale: s_m, of the momentum.
    """
    momentum, index = torch.zeros(()), -1

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal momentum, index
        x0, index = uncond(x, sigma), index + 1
        # eps(x) = (x - x0(x)) / sigma, so that differences of eps are those of -x0 / sigma
        psi = [weight * (x0 - edit(x, sigma)) / float(sigma) for edit, weight in edits]
        gamma = torch.stack([largest(each, threshold) for each in psi]).sum(dim=0) + scale * momentum
        momentum = beta * momentum + (1 - beta) * gamma
        guided = torch.lerp(x0, prompt(x, sigma), guidance)
        return guided - float(sigma) * gamma if index >= warmup else guided

    return denoise


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Exchange the object of a picture.")
    parser.add_argument("prompt", nargs="?", default="a frog on the grass")
    parser.add_argument("--add", default="a fox")
    parser.add_argument("--remove", default="a frog")
    parser.add_argument("--weight", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", default="semantic_guidance.png")
    args = parser.parse_args()
    pipe, denoisers, latents = ldm.load(), [], []
    for text in ("", args.prompt, args.add, args.remove):
        plan = pipe.plan(ldm.Request(text, seed=1, steps=args.steps, sampler="ddim", guidance_scale=1))
        denoisers.append(pipe.denoiser(plan, pipe.conditions(plan)))
    (uncond, prompt, add, remove), scale = denoisers, pipe.plan(ldm.Request(args.prompt)).guidance_scale
    for weight, threshold in ((0.0, 0.0), (args.weight, 0.9), (args.weight, 0.0)):
        edits = [(add, weight), (remove, -weight)]
        denoise = semantic(uncond, prompt, edits, scale, threshold=threshold)
        *_, last = pipe.walk(plan, denoise, pipe.start(plan))
        latents.append(last.latents)
    pictures = pipe.decode(torch.cat(latents))
    save_png(grid(pictures), args.out, overwrite=True)
    plain, masked, whole = (127.5 * to_tensor(picture)[0].mean(dim=0) for picture in pictures)  # h w
    middle, quarter = torch.zeros_like(plain, dtype=torch.bool), plan.width // 4
    middle[quarter:-quarter, quarter:-quarter] = True  # where the object is
    inside, outside, without = (
        float((edited - plain)[area].abs().mean())
        for edited, area in ((masked, middle), (masked, ~middle), (whole, ~middle))
    )
    print(f"change inside {inside:.1f}, outside {outside:.1f} of 255 levels, outside without masks {without:.1f}")


if __name__ == "__main__":
    main()
