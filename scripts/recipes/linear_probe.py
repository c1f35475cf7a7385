"""Linear probes (Alain and Bengio 2016): what the UNet knows of an object's place and size, by block and by noise.

    python scripts/recipes/linear_probe.py

Noise of a timestep is added to the latents of n scenes. A ridge regression finds the targets Y, n k, in the activations
A, n d, of each block. Both are centered. In closed form, and measured on other scenes:

    W = A^T (A A^T + lambda I)^-1 Y,    R^2 = 1 - |Y - A W|^2 / |Y|^2
"""

import argparse
from contextlib import ExitStack

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

import ldm
from ldm.geometry import grid
from ldm.pictures import save_png
from ldm.training.grounds import GROUNDS


def activations(pipe: ldm.Pipeline, latents: Tensor, timestep: float) -> list[Tensor]:
    """Return the noisy latents, n c h w, and what each of `unet.stages()` returns, as means of 4 x 4 cells: n d."""
    plan = pipe.plan(ldm.Request("", seed=0, images=len(latents), guidance_scale=1))
    denoise, sigma = pipe.denoiser(plan, pipe.conditions(plan)), pipe.schedule.sigma(timestep)
    kept = [latents + float(sigma) * plan.noise()()]
    with ExitStack() as hooks:
        for stage in pipe.unet.stages():
            hooks.enter_context(stage.register_forward_hook(lambda module, args, out: kept.append(out)))
        denoise(kept[0], sigma)
    return [F.adaptive_avg_pool2d(each, 4).flatten(1) for each in kept]


def ridge(a: Tensor, y: Tensor, other: Tensor, penalty: float = 0.1) -> Tensor:
    """Fit targets y, n k, by activations a, n d, and predict the targets of others, m d: m k. penalty: lambda / d."""
    mean, std, center = a.mean(dim=0), a.std(dim=0) + 1e-6, y.mean(dim=0)
    a, other = (a - mean) / std, (other - mean) / std
    kernel = a @ a.T + penalty * a.shape[1] * torch.eye(len(a)).to(a)
    return center + other @ a.T @ torch.linalg.solve(kernel, y - center)


def r2(predicted: Tensor, y: Tensor) -> Tensor:
    """Return the share of the variance of each target that is predicted: k. Both arguments: n k."""
    return 1 - (y - predicted).square().sum(dim=0) / (y - y.mean(dim=0)).square().sum(dim=0)


def scenes(drawn: list[Image.Image], count: int) -> tuple[list[Image.Image], Tensor]:
    """Paste objects, drawn on white, on grounds. Return the scenes and x, y and size as shares of the side: count 3."""
    rng, side, made = np.random.default_rng(0), drawn[0].width, []
    targets = torch.from_numpy(rng.uniform((0.3, 0.3, 0.25), (0.7, 0.7, 0.55), (count, 3)).astype(np.float32))
    for i, (x, y, size) in enumerate(targets.tolist()):
        cut = drawn[i % len(drawn)].resize((round(2 * size * side),) * 2)  # the model draws objects of half the side
        alpha = Image.fromarray((np.ptp(np.asarray(cut).astype(int), axis=2) > 40).astype(np.uint8) * 255)
        ground = list(GROUNDS.values())[rng.integers(len(GROUNDS))].paint(side, rng)
        made.append(Image.fromarray(ground.clip(0, 255).astype(np.uint8)))
        made[-1].paste(cut, (round(x * side - cut.width / 2), round(y * side - cut.width / 2)), alpha)
    return made, targets


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Read places and sizes of objects from the UNet.")
    parser.add_argument("--scenes", type=int, default=320, help="a quarter of them is held out")
    parser.add_argument("--timesteps", nargs="+", type=int, default=[950, 750, 500, 250, 50])
    parser.add_argument("--out", default="linear_probe.png")
    args = parser.parse_args()
    pipe, held, scores = ldm.load(), args.scenes // 4, []
    prompts = tuple(f"a 3D {name} on a white background" for name in ("fox", "apple", "frog", "car", "cactus"))
    made, y = scenes(pipe.generate(ldm.Request(prompts, seed=1, images=len(prompts), steps=12)), args.scenes)
    latents = torch.cat([pipe.encode_image(picture) for picture in made])
    for timestep in args.timesteps:
        found = [ridge(a[held:], y[held:], a[:held]) for a in activations(pipe, latents, timestep)]
        scores.append([r2(each, y[:held]) for each in found])
    downs, ups = ([f"{part}.{i}" for i in range(len(getattr(pipe.unet, part)))] for part in ("down", "up"))
    print("R2 of place and of size at the timesteps " + ", ".join(map(str, args.timesteps)))
    for name, column in zip(["latents", *downs, "mid", *ups], zip(*scores, strict=True), strict=True):
        print(f"{name:>8}: " + ", ".join(f"{score[:2].mean():.2f} {score[2]:.2f}" for score in column))
    for picture, *targets in zip(made[:16], y[:held], found[-1], strict=False):
        for target, color in zip(targets, ("white", "red"), strict=True):
            left, top, size = picture.width * (target - target[2] / 2 * torch.tensor([1, 1, 0]))
            ImageDraw.Draw(picture).rectangle([left, top, left + size, top + size], outline=color)
    save_png(grid(made[:16]), args.out, overwrite=True)


if __name__ == "__main__":
    main()
