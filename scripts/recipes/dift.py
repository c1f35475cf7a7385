"""DIFT (Tang et al. 2023): activations of the UNet are descriptors that find the same point in two scenes.

    python scripts/recipes/dift.py "a big frog on a white background"

Section 4 of the paper: add noise of timestep t to the latents, run the UNet, and take the activations F of one stage of
the decoder, averaged over noises. The point p of scene 1 belongs to the point of scene 2 with the nearest descriptor,

    q(p) = argmax_q cos(F_1(p), F_2(q))

The scenes show one object, which the model draws on white, in two places on two grounds. So all pairs are known.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import ldm
from ldm.geometry import grid
from ldm.images import to_tensor
from ldm.pictures import save_png
from ldm.training.grounds import GROUNDS


@torch.no_grad()
def descriptors(pipe: ldm.Pipeline, latents: Tensor, timestep: float, stage: int, draws: int = 8) -> Tensor:
    """Return the activations of `unet.up[stage]` for latents, 1 c h w, without a prompt: c' h' w'.

    timestep: 0 to 999, of the noise. draws: the number of noises, 8 in the paper.
    """
    plan = pipe.plan(ldm.Request("", seed=0, guidance_scale=1))
    denoise, noise, sigma = pipe.denoiser(plan, pipe.conditions(plan)), plan.noise(), pipe.schedule.sigma(timestep)
    kept: list[Tensor] = []
    with pipe.unet.up[stage].register_forward_hook(lambda module, args, out: kept.append(out[0])):
        for _ in range(draws):
            denoise(latents + float(sigma) * noise(), sigma)
    return torch.stack(kept).mean(dim=0)


def matches(first: Tensor, second: Tensor, points: Tensor) -> Tensor:
    """Return the nearest points, n 2, in the map `second` for points, n 2, of `first`: y, x. Maps: c h w."""
    wanted = F.normalize(first[:, points[:, 0], points[:, 1]], dim=0)  # c n
    nearest = (wanted.T @ F.normalize(second.flatten(1), dim=0)).argmax(dim=1)
    return torch.stack([nearest // second.shape[2], nearest % second.shape[2]], dim=1)


def scene(cutout: Image.Image, side: int, ground: str, left: int, top: int) -> Image.Image:
    """Paste an object, RGBA, on a ground of `side` pixels."""
    pixels = GROUNDS[ground].paint(side, np.random.default_rng(0))
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    picture.paste(cutout, (left, top), cutout)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description="Find the points of an object in another scene.")
    parser.add_argument("prompt", nargs="?", default="a big frog on a white background")
    parser.add_argument("--timestep", type=float, default=150)
    parser.add_argument("--stage", type=int, default=-1, help="of unet.up; the last has the most pixels")
    parser.add_argument("--radius", type=float, default=1.5, help="in pixels of the latents")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", default="dift.png")
    args = parser.parse_args()
    pipe, grounds = ldm.load(), list(GROUNDS)
    (drawn,) = pipe.generate(ldm.Request(args.prompt, seed=4, steps=args.steps))
    side, f = drawn.width, pipe.config.vae.factor
    small = drawn.resize((side // 2 // f * f,) * 2, Image.Resampling.LANCZOS)
    small.putalpha(Image.fromarray((np.asarray(small).min(axis=2) < 195).astype(np.uint8) * 255))
    move = (side - small.width) // f * f  # along both sides, in whole pixels of the latents
    scenes = scene(small, side, grounds[0], 0, 0), scene(small, side, grounds[1], move, move)
    first, second = (descriptors(pipe, pipe.encode_image(s), args.timestep, args.stage) for s in scenes)
    scale = side / first.shape[1]  # pixels of the picture in one of the map
    alpha = to_tensor(small.getchannel("A").convert("RGB"))[:, :1]
    points = (F.adaptive_avg_pool2d(alpha, round(small.width / scale))[0, 0] > 0.5).nonzero()
    found = matches(first, second, points)
    distance = (found - points - move / scale).norm(dim=1) * scale / f
    save_png(grid(scenes), args.out, overwrite=True)
    share = 100 * float((distance <= args.radius).float().mean())
    print(f"{share:.0f} % of {len(points)} points found within {args.radius} pixels of the latents")


if __name__ == "__main__":
    main()
