"""Likelihood of a picture by the probability-flow ODE (Song et al. 2021, eq. 39 and 40), in bits per dimension.

    python scripts/recipes/likelihood.py "a frog on the grass"

In sigma space the ODE is dx / d log sigma = x - x0(x, sigma), and along its path from a low to a high noise level
    log p_low(x_low) = log p_high(x_high) + integral of (d - tr(dx0 / dx)) d log sigma,
with d dimensions. Hutchinson's estimate of the trace is E[v^T (dx0 / dx) v] with random signs v. The density at the
highest level is taken as the Gaussian of variance 1 + sigma^2. The bits of a picture have two parts, which together
are a bound (Kingma & Welling 2014, eq. 3): log q(z | picture) - log p(z) for the latents z, a sample of the VAE's
encoder, and -log p(picture | z), the VAE's part, with a Gaussian of the best standard deviation about the decoded z.
"""

import argparse
import math
from itertools import pairwise

import torch
from torch import Tensor

import ldm
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import to_vp
from ldm.geometry import grid
from ldm.images import to_tensor
from ldm.pictures import save_png


def with_trace(denoise: Denoiser, x: Tensor, sigma: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return x0: b c h w, and the estimate v^T (dx0 / dx) v of the trace: b."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = denoise(x, sigma)
        (product,) = torch.autograd.grad(x0, x, v)
    return x0.detach(), (v * product).flatten(1).sum(dim=1)


def log_likelihood(denoise: Denoiser, x: Tensor, sigmas: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return log p(x) in nats: b, and the path of x by Heun's method, at unit variance.

    x: b c h w, at the level sigmas[0]. sigmas: n + 1 rising levels above 0. v: b c h w, random signs.
    """
    d, path, integral = x[0].numel(), [to_vp(x, sigmas[0])], torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for low, high in pairwise(sigmas):
        h = math.log(high / low)
        x0, trace = with_trace(denoise, x, low, v)
        ahead = x + h * (x - x0)
        ahead_x0, ahead_trace = with_trace(denoise, ahead, high, v)
        x = x + h / 2 * ((x - x0) + (ahead - ahead_x0))
        integral += h / 2 * ((d - trace) + (d - ahead_trace))
        path.append(to_vp(x, high))
    variance = 1 + float(sigmas[-1]) ** 2
    prior = -0.5 * (x.square().flatten(1).sum(dim=1) / variance + d * math.log(2 * math.pi * variance))
    return prior + integral, path


def bits_per_dimension(
    pipe: ldm.Pipeline, denoise: Denoiser, images: Tensor, sigmas: Tensor, noise: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the bits per dimension of images, b 3 h w in [-1, 1]: b for the latents, b for the VAE; and the path.

    noise: b c h/f w/f of unit variance, to sample z. sigmas, v: see `log_likelihood`.
    """
    posterior = pipe.vae.encode(images)
    z = posterior.sample(noise)
    log_p, path = log_likelihood(denoise, z, sigmas, v)
    log_q = -(0.5 * noise.square() + posterior.std.log() + 0.5 * math.log(2 * math.pi)).flatten(1).sum(dim=1)
    levels = 127.5 * (pipe.vae.decode(z).clamp(-1, 1) - images)
    variance = levels.square().flatten(1).mean(dim=1) + 1 / 12  # of the rest, and of rounding to 8 bits
    return (log_q - log_p) / math.log(2) / images[0].numel(), 0.5 * (2 * math.pi * math.e * variance).log2(), path


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the likelihood of a picture that the model made.")
    parser.add_argument("prompt", nargs="?", default="a frog on the grass")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", default="likelihood.png")
    args = parser.parse_args()
    pipe = ldm.load()
    plan = pipe.plan(ldm.Request(args.prompt, guidance_scale=1))  # a guided denoiser has no density
    (picture,), noise = pipe.generate(ldm.Request(args.prompt, seed=1)), plan.noise()
    sigmas, v = pipe.schedule.steps(args.steps + 1, "exponential")[:-1].flip(0), noise().sign()
    denoise = pipe.denoiser(plan, pipe.conditions(plan))
    latents, vae, path = bits_per_dimension(pipe, denoise, to_tensor(picture), sigmas, noise(), v)
    save_png(grid(pipe.decode(torch.cat(path[:: max(1, args.steps // 8)][:9]))), args.out, overwrite=True)
    print(f"{args.steps} steps: {float(latents + vae):.2f} bits per dimension, {float(vae):.2f} of them the VAE's")


if __name__ == "__main__":
    main()
