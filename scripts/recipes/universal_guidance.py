"""Universal guidance (Bansal et al. 2023): steer the sampling by any differentiable loss of the clean latents.

    python scripts/recipes/universal_guidance.py "a 3D frog" beach night

Equation 6 of the paper adds the gradient of a loss of x0(x), the estimate of the clean latents, to the prediction:

    eps' = eps + s(sigma) grad_x loss(x0(x)),    which is    x0' = x0 - sigma s(sigma) grad_x loss(x0(x))

With loss = -log p(y | x0) and s = sigma, this is classifier guidance (Dhariwal & Nichol 2021, algorithm 2) with a
classifier that was not trained on noise. Here -log p is the difference from the nearest example of a ground, among the
examples that the checker of `ldm evaluate` compares pictures with. The checker itself then judges the pictures.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import ImageOps
from torch import Tensor

import ldm
from ldm.diffusion.denoiser import Denoiser
from ldm.geometry import grid
from ldm.pictures import save_png
from ldm.training.checker import BORDER, CUTOFF, GRID, Checker
from ldm.training.grounds import GROUNDS


def steered(denoise: Denoiser, loss: Callable[[Tensor], Tensor], scale: float = 1.0) -> Denoiser:
    """Make a denoiser that lowers `loss`, a function from x0: b c h w to one number per image: b.

    scale: s / sigma. With 1 and loss = -log p(y | x0), x0' is the estimate for the product of prior and likelihood.
    """

    def lowered(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = denoise(x, sigma)
            (gradient,) = torch.autograd.grad(loss(x0).sum(), x)
        return x0.detach() - scale * float(sigma) ** 2 * gradient

    return lowered


def differences(checker: Checker, images: Tensor) -> Tensor:
    """Return how much the borders of images, b 3 h w, differ from the nearest example of each ground: b g.

    The checker counts pixels that are near to an example's, max(0, 1 - difference / CUTOFF^2). This has no gradient far
    from an example. -log(1 + difference / CUTOFF^2) has the same slope at 0, and a gradient at every distance.
    The border has the checker's largest weight. The rest is left to the object.
    """
    colors = F.adaptive_avg_pool2d(images, GRID)
    squares = (colors[:, None, None] - checker.examples.to(images)).square().sum(dim=3)  # b contrast (g e) h w
    far = (1 + squares / CUTOFF**2).log()[..., checker.importance == BORDER].mean(dim=3)  # b contrast (g e)
    return far.unflatten(2, (len(GROUNDS), -1)).amin(dim=(1, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description="Steer pictures to grounds that the prompt does not name.")
    parser.add_argument("prompt", nargs="?", default="a 3D frog")
    parser.add_argument("grounds", nargs="*", default=["beach", "night", "forest"], help=", ".join(GROUNDS))
    parser.add_argument("--scale", type=float, default=50.0)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", default="universal_guidance.png")
    args = parser.parse_args()
    pipe, n, names = ldm.load(), len(args.grounds), list(GROUNDS)
    (sprite,) = pipe.generate(ldm.Request(f"{args.prompt} on a white background", seed=1, steps=args.steps))
    sprite.putalpha(sprite.convert("HSV").getchannel("S").point(lambda level: 255 * (level > 40)))  # without the shadow
    checker = Checker({"3D": {args.prompt: ImageOps.pad(sprite.crop(sprite.getbbox()), sprite.size)}})
    plan = pipe.plan(ldm.Request(args.prompt, steps=args.steps, seed=1, images=n))
    denoise, wanted = pipe.denoiser(plan, pipe.conditions(plan)), torch.tensor([[names.index(g)] for g in args.grounds])

    def loss(x0: Tensor) -> Tensor:
        return differences(checker, pipe.vae.decode(x0)).gather(1, wanted.to(x0.device))[:, 0]

    pictures, found = [], []
    for each in (denoise, steered(denoise, loss, args.scale)):
        with torch.no_grad():
            *_, last = pipe.walk(plan, each, pipe.start(plan))
        pictures += pipe.decode(last.latents)
        seen = [checker.look(picture) for picture in pictures[-n:]]
        right = sum(one.ground == ground for one, ground in zip(seen, args.grounds, strict=True))
        found.append(f"{right} grounds and {sum(one.objects[0].name == args.prompt for one in seen)} objects")
    save_png(grid(pictures), args.out, overwrite=True)
    print(f"of {n}, the checker finds {found[1]}; without the gradient {found[0]}")


if __name__ == "__main__":
    main()
