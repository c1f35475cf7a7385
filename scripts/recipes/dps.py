"""Diffusion posterior sampling (Chung et al. 2023): solve inverse problems with a model that was not trained for them.

    python scripts/recipes/dps.py superresolve        # or deblur, or colorize

A measurement y = A(picture) is given. Algorithm 1 of the paper takes a DDPM step, then a step down the gradient of the
residual of x0, the estimate of the clean latents, with z = x / sqrt(1 + sigma^2):

    z' = ddpm(z, x0) - zeta / |y - A(x0)| grad_z |y - A(x0(z))|^2

For latent models, A contains the VAE's decoder. The gradient goes through the decoder and the UNet.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import ldm
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers import Noise, ddpm
from ldm.diffusion.schedule import to_ve, to_vp
from ldm.geometry import grid
from ldm.images import to_pil, to_tensor
from ldm.pictures import save_png

Measure = Callable[[Tensor], Tensor]  # images: b 3 h w -> what is known of them


def dps(
    denoise: Denoiser, measure: Measure, y: Tensor, x: Tensor, sigmas: Tensor, *, noise: Noise, zeta: float = 1.0
) -> Tensor:
    """Return clean latents, b c h w, whose measurement is about y. zeta is the size of the gradient's steps.

    measure: maps latents to the form of y. x: b c h w, noise of the level sigmas[0]. sigmas: falling levels.
    """
    for i in range(len(sigmas) - 1):
        with torch.enable_grad():
            z = to_vp(x, sigmas[i]).detach().requires_grad_()
            x = to_ve(z, sigmas[i])
            x0 = denoise(x, sigmas[i])
            residual = (y - measure(x0)).flatten(1).norm(dim=1)  # b
            (gradient,) = torch.autograd.grad(residual.sum(), z)  # half of grad |.|^2 / |.|
        (step,) = ddpm(lambda *_, x0=x0: x0.detach(), x.detach(), sigmas[i : i + 2], noise=noise)
        x = step.x - to_ve(2 * zeta * gradient, step.sigma)
    return x


def psnr(image: Tensor, reference: Tensor) -> float:
    """Return the peak signal-to-noise ratio of images in [-1, 1], in dB."""
    return float(10 * torch.log10(4 / (image.clamp(-1, 1) - reference).square().mean()))


def blur(images: Tensor, width: float = 2.0) -> Tensor:
    """Blur with a Gaussian whose standard deviation is `width` pixels of 64 across the picture."""
    reach = round(3 * (std := width * images.shape[-1] / 64))
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1).to(images) / std).square())
    kernel = torch.outer(line, line).div(line.sum() ** 2).expand(3, 1, -1, -1)
    return F.conv2d(F.pad(images, [reach] * 4, mode="reflect"), kernel, groups=3)


PROBLEMS: dict[str, Measure] = {
    "deblur": blur,
    "superresolve": lambda images: F.avg_pool2d(images, 4),
    "colorize": lambda images: images.mean(dim=1, keepdim=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Restore a picture from a measurement of it.")
    parser.add_argument("problem", nargs="?", default="superresolve", choices=list(PROBLEMS))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--prompt", default="a frog on the grass", help="what the picture shows")
    parser.add_argument("--zeta", type=float, default=2.0)
    parser.add_argument("--out", default="dps.png")
    args = parser.parse_args()
    pipe, measure = ldm.load(), PROBLEMS[args.problem]
    y = measure(image := to_tensor(pipe.generate(ldm.Request("a frog on the grass", seed=1))[0]))
    plan = pipe.plan(ldm.Request(args.prompt, steps=args.steps, guidance_scale=1, sampler="ddpm", seed=2))
    given = pipe.denoiser(plan, pipe.conditions(plan)), lambda latents: measure(pipe.vae.decode(latents)), y
    latents = dps(*given, pipe.start(plan), plan.sigmas, noise=plan.noise(), zeta=args.zeta)
    restored = to_tensor(pipe.decode(latents)[0])
    shown = F.interpolate(y, image.shape[-2:], mode="nearest").expand_as(image)
    save_png(grid(to_pil(torch.cat([image, shown, restored]))), args.out, overwrite=True)
    print(f"{args.problem}: {psnr(restored, image):.1f} dB, and {psnr(shown, image):.1f} dB before")


if __name__ == "__main__":
    main()
