"""Universal guidance (Bansal et al. 2023): steer the sampling by any differentiable loss of the clean latents.

    python scripts/recipes/universal_guidance.py "a frog" beach

Equation 6 of the paper adds the gradient of a loss of x0(x), the estimate of the clean latents, to the prediction:

    eps' = eps + s(sigma) grad_x loss(x0(x)),    which is    x0' = x0 - sigma s(sigma) grad_x loss(x0(x))

With loss = -log p(y | x0) and s = sigma, this is classifier guidance (Dhariwal & Nichol 2021, algorithm 2) with a
classifier that was not trained on noise. Here it compares colors with computed grounds, as `ldm evaluate` does.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import ldm
from ldm.diffusion.denoiser import Denoiser
from ldm.geometry import grid
from ldm.images import to_tensor
from ldm.pictures import save_png
from ldm.training.grounds import GROUNDS

SIDE, EXAMPLES, DEVIATION = 16, 8, 0.3  # pixels of the compared colors; pictures a ground; colors are in [-1, 1]


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


class Classifier:
    """Log-probabilities of the grounds, from the mean colors of computed examples on a coarse grid."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        drawn = [[ground.paint(64, rng) for _ in range(EXAMPLES)] for ground in GROUNDS.values()]
        pictures = torch.from_numpy(np.array(drawn, np.float32)).clamp(0, 255).mean(dim=1) / 127.5 - 1  # g h w c
        self.means = F.adaptive_avg_pool2d(pictures.movedim(-1, 1), SIDE)

    def __call__(self, images: Tensor) -> Tensor:
        """Return log p(ground | image) for images: b 3 h w, as b g. The border counts: objects stand in the middle."""
        colors = F.adaptive_avg_pool2d(images, SIDE)
        difference = (colors[:, None] - self.means.to(images)).square().sum(dim=2)  # b g h w
        border = torch.ones_like(difference, dtype=torch.bool)
        border[..., 3:-3, 3:-3] = False
        far = difference[border].reshape(*difference.shape[:2], -1).mean(dim=2)
        return (-far / (2 * DEVIATION**2)).log_softmax(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Steer pictures to a ground that the prompt does not name.")
    parser.add_argument("prompt", nargs="?", default="a frog")
    parser.add_argument("ground", nargs="?", default="beach", choices=list(GROUNDS))
    parser.add_argument("--scale", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="universal_guidance.png")
    args = parser.parse_args()
    pipe, classify, which = ldm.load(), Classifier(), list(GROUNDS).index(args.ground)
    plan = pipe.plan(ldm.Request(args.prompt, steps=args.steps, seed=1, images=2))
    denoise = pipe.denoiser(plan, pipe.conditions(plan))
    wanted = steered(denoise, lambda x0: -classify(pipe.vae.decode(x0))[:, which], args.scale)
    pictures, probabilities = [], []
    for each in (denoise, wanted):
        with torch.no_grad():
            *_, last = pipe.walk(plan, each, pipe.start(plan))
        pictures += pipe.decode(last.latents)
        seen = torch.cat([classify(to_tensor(picture)) for picture in pictures[-2:]])
        probabilities.append(float(seen[:, which].exp().mean()))
    save_png(grid(pictures), args.out, overwrite=True)
    print(f"p({args.ground}) is {probabilities[1]:.2f} with guidance by the classifier, {probabilities[0]:.2f} without")


if __name__ == "__main__":
    main()
