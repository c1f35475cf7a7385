"""Score distillation (DreamFusion, Poole et al. 2022): a prompt finds the parameters of a renderer.

    python scripts/recipes/sds.py "a flat orange on a purple background, on the left"

Equation 3 of the paper, for latents z = g(theta) with noise eps of the level sigma on them:

    grad = E[w(sigma) (eps_hat(z + sigma eps) - eps) dz / dtheta],    eps_hat(x) = (x - x0(x, sigma)) / sigma

The gradient does not go through the network. Here theta is the place, size and color of a disc and the color of the
ground behind the disc. The same function moves latents (theta = z), or any other differentiable renderer.
"""

import argparse

import torch
from torch import Tensor

import ldm
from ldm.diffusion.denoiser import Denoiser
from ldm.geometry import grid
from ldm.images import to_pil
from ldm.pictures import save_png


@torch.no_grad()
def sds(denoise: Denoiser, latents: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Return the gradient with respect to latents: b c h w, with w = sigma^2 / (1 + sigma^2), DreamFusion's sigma_t^2.

    sigma: one level. noise: b c h w of unit variance. Use `latents.backward(sds(...))` for the renderer's parameters.
    """
    s = float(sigma)
    x = latents + s * noise
    eps = (x - denoise(x, sigma)) / s
    return s**2 / (1 + s**2) * (eps - noise)


class Disc(torch.nn.Module):
    """A disc with a soft edge on a ground of one color. All lengths are shares of the picture's side."""

    def __init__(self) -> None:
        super().__init__()
        self.center = torch.nn.Parameter(torch.tensor([0.5, 0.5]))  # x y
        self.radius = torch.nn.Parameter(torch.tensor(0.2))
        self.color = torch.nn.Parameter(torch.full((3,), 0.6))  # in [-1, 1]; lighter than the ground
        self.ground = torch.nn.Parameter(torch.zeros(3))

    def forward(self, side: int) -> Tensor:
        """Draw the disc: 1 3 side side in [-1, 1]."""
        line = (torch.arange(side) + 0.5) / side
        y, x = torch.meshgrid(line, line, indexing="ij")
        distance = ((x - self.center[0]).square() + (y - self.center[1]).square() + 1e-8).sqrt()
        alpha = ((self.radius - distance) / 0.05).sigmoid()
        color, ground = (part[:, None, None] for part in (self.color, self.ground))
        return (ground + alpha * (color - ground)).clamp(-1, 1)[None]


def distill(pipe: ldm.Pipeline, request: ldm.Request, disc: Disc, sigmas: Tensor) -> None:
    """Fit `disc` to the prompt with Adam. sigmas: the level of each step. The first are high: they decide the place."""
    plan = pipe.plan(request)
    denoise, noise = pipe.denoiser(plan, pipe.conditions(plan)), plan.noise()
    lengths = {"params": [disc.center, disc.radius], "lr": 0.01}
    adam = torch.optim.Adam([lengths, {"params": [disc.color, disc.ground], "lr": 0.05}], betas=(0.9, 0.99))
    for sigma in sigmas:
        adam.zero_grad()
        latents = pipe.encode_image(disc(plan.width))
        latents.backward(sds(denoise, latents, sigma, noise()))
        adam.step()


def main() -> None:
    parser = argparse.ArgumentParser(description="Find a disc and the color behind the disc from a prompt.")
    parser.add_argument("prompt", nargs="?", default="a flat orange on a purple background, on the left")
    parser.add_argument("--ground", nargs=3, type=int, default=(136, 78, 184), help="the color that the prompt names")
    parser.add_argument("--place", nargs=2, type=float, default=(0.28, 0.5), help="x and y that the prompt names")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="sds.png")
    args = parser.parse_args()
    pipe, disc, pictures, errors = ldm.load(), Disc(), [], []
    for steps in (0, args.steps):
        distill(pipe, ldm.Request(args.prompt, seed=1, guidance_scale=20), disc, torch.logspace(1, 0, steps))
        pictures.append(disc(pipe.config.image_size).detach())
        place = 100 * (disc.center - torch.tensor(args.place)).norm()
        color = (127.5 * (disc.ground + 1) - torch.tensor(args.ground)).abs().mean()
        errors.append(f"{place:.0f} % of the side in place and {color:.0f} of 255 levels in the ground's color")
    save_png(grid(to_pil(torch.cat(pictures))), args.out, overwrite=True)
    print(f"the disc differs from the prompt by {errors[1]}; at first by {errors[0]}")


if __name__ == "__main__":
    main()
