"""MultiDiffusion (Bar-Tal et al. 2023): a picture wider than the model's, from windows that overlap.

    python scripts/recipes/panorama.py "two 3D penguins in the mountains" --width 4

Equation 5 of the paper, with all weights 1: each pixel takes the mean of the estimates of the windows that cover it,

    x0(x) = sum_i F_i^-1(x0(F_i(x))) / sum_i F_i^-1(1)

F_i cuts window i out of x, and F_i^-1 puts it back. The paper averages the next latents. Samplers are linear in x0, so
that this is the same. scripts/regions.py blends prompts with the same equation.
"""

import argparse

import torch
from torch import Tensor

import ldm
from ldm.diffusion.denoiser import Denoiser
from ldm.pictures import save_png


def starts(length: int, side: int, stride: int) -> list[int]:
    """Return where windows of `side` pixels start, so that they cover `length` pixels. The last ends at the end."""
    if not 1 <= stride <= side <= length:
        raise ValueError(f"windows need 1 <= stride <= side <= length, got {stride}, {side} and {length}")
    return [*range(0, length - side, stride), length - side]


def multidiffusion(denoise: Denoiser, side: int, stride: int) -> Denoiser:
    """Make the denoiser of large latents, b c h w, from one that takes windows of side x side latent pixels."""

    def whole(x: Tensor, sigma: Tensor) -> Tensor:
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        for top in starts(x.shape[2], side, stride):
            for left in starts(x.shape[3], side, stride):
                window = (..., slice(top, top + side), slice(left, left + side))
                total[window] += denoise(x[window], sigma)
                count[window] += 1
        return total / count

    return whole


def seams(latents: Tensor, side: int) -> float:
    """Return the mean step across columns at multiples of `side`, relative to steps two columns beside. 1 c h w."""
    steps = latents.diff(dim=3).abs().mean(dim=(0, 1, 2))  # w - 1
    at = torch.arange(side - 1, len(steps), side)
    return float(steps[at].sum() / (steps[at - 2] + steps[at + 2]).mul(0.5).sum())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Make a panorama.")
    parser.add_argument("prompt", nargs="?", default="two 3D penguins in the mountains")
    parser.add_argument("--width", type=int, default=3, help="in pictures of the model's size")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", default="panorama.png")
    args = parser.parse_args()
    pipe = ldm.load()
    one = pipe.plan(ldm.Request(args.prompt, steps=args.steps))
    wide = pipe.plan(ldm.Request(args.prompt, seed=1, width=args.width * one.width, steps=args.steps))
    denoise, side = pipe.denoiser(one, pipe.conditions(one)), one.latent_shape[1]
    numbers = []
    for stride in (side, side // 2):  # without overlap, then with half
        *_, last = pipe.walk(wide, multidiffusion(denoise, side, stride), pipe.start(wide))
        numbers.append(seams(last.latents, side))
    save_png(pipe.decode(last.latents)[0], args.out, overwrite=True)
    print(
        f"step of the latents at borders of pictures / beside them: {numbers[1]:.2f}, without overlap {numbers[0]:.2f}"
    )


if __name__ == "__main__":
    main()
