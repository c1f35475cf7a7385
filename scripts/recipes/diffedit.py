"""DiffEdit (Couairon et al. 2023): the mask of an edit follows from two prompts, and the rest of the picture is kept.

    python scripts/recipes/diffedit.py "a frog on the grass" "a cat on the grass"

1. Mask (section 3.2, step 1): add noise to the latents, estimate with both prompts, and average over noises n:

    M = [ norm(mean_n |eps(x_n, query) - eps(x_n, reference)|) > threshold ]

2. Inversion (step 2): DDIM inversion without a prompt gives y at the levels up to the encoding ratio.
3. Editing (step 3): DDIM with the query, where x = M x + (1 - M) y at each level. A DDIM step is linear in x0, so that
   the same follows from x0 = M x0(x, query) + (1 - M) x0_y, with the estimates x0_y of the inversion.
"""

import argparse

import torch
from torch import Tensor

import ldm
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.inversion import invert
from ldm.diffusion.samplers import Noise, ddim
from ldm.geometry import grid
from ldm.images import to_pil, to_tensor
from ldm.pictures import save_png


def edit_mask(
    query: Denoiser, reference: Denoiser, latents: Tensor, sigma: Tensor, noise: Noise, *, draws: int, threshold: float
) -> Tensor:
    """Return the mask, b 1 h w of 0 and 1, of latents: b c h w. draws: the number of noises, 10 in the paper.

    Extreme differences are cut at 3 times the mean, before the map is scaled to 0 .. 1, as in the authors' method.
    """
    noisy = [latents + float(sigma) * noise().to(latents) for _ in range(draws)]
    differences = torch.stack([(query(x, sigma) - reference(x, sigma)).abs() for x in noisy])  # n b c h w
    change = differences.mean(dim=(0, 2))  # b h w
    change = change.clamp(max=3 * change.mean(dim=(1, 2), keepdim=True))
    low, high = change.amin(dim=(1, 2), keepdim=True), change.amax(dim=(1, 2), keepdim=True)
    return ((change - low) / (high - low) > threshold)[:, None].to(latents)


def edit(query: Denoiser, unconditional: Denoiser, latents: Tensor, mask: Tensor, sigmas: Tensor) -> Tensor:
    """Return the edited latents: b c h w. sigmas: falling levels from that of the encoding ratio; the last is 0."""
    steps = list(invert(unconditional, latents, sigmas[:-1].flip(0)))
    kept = dict(zip(sigmas.tolist(), [*(step.x0 for step in reversed(steps)), latents], strict=False))

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return mask * query(x, sigma) + (1 - mask) * kept[float(sigma)]

    *_, last = ddim(denoise, steps[-1].x, sigmas)
    return last.x


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Edit a picture where two prompts differ.")
    parser.add_argument("reference", nargs="?", default="a frog on the grass")
    parser.add_argument("query", nargs="?", default="a cat on the grass")
    parser.add_argument("--ratio", type=float, default=0.8, help="encoding ratio: the share of the steps that run")
    parser.add_argument("--threshold", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", default="diffedit.png")
    args = parser.parse_args()
    pipe, denoisers = ldm.load(), []
    for prompt, scale in ((args.query, None), (args.query, 1.0), (args.reference, 1.0), ("", 1.0)):
        plan = pipe.plan(ldm.Request(prompt, seed=1, steps=args.steps, guidance_scale=scale))
        denoisers.append(pipe.denoiser(plan, pipe.conditions(plan)))
    guided, query, reference, unconditional = denoisers
    *_, last = pipe.stream(ldm.Request(args.reference, seed=1, steps=args.steps))
    latents, noise = last.latents, plan.noise()
    middle = plan.sigmas[args.steps // 2]  # half of the noise, as in the paper
    mask = edit_mask(query, reference, latents, middle, noise, draws=6, threshold=args.threshold)
    edited = edit(guided, unconditional, latents, mask, plan.sigmas[args.steps - int(args.ratio * args.steps) :])
    before, after = pipe.decode(torch.cat([latents, edited]))
    area = torch.nn.functional.interpolate(mask, size=(before.height, before.width))
    save_png(grid([before, *to_pil(2 * area.expand(1, 3, -1, -1) - 1), after]), args.out, overwrite=True)
    change = 127.5 * (to_tensor(after) - to_tensor(before)).abs().mean(dim=1, keepdim=True)
    inside, outside = (float((change * part).sum() / part.sum().clamp(min=1)) for part in (area, 1 - area))
    share = 100 * float(mask.mean())
    print(f"the mask has {share:.0f} % of the picture; change inside {inside:.1f}, outside {outside:.1f} of 255 levels")


if __name__ == "__main__":
    main()
