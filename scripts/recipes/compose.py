"""Composable diffusion (Liu et al. 2022): several prompts joined by AND and NOT.

    python scripts/recipes/compose.py "a frog on a red background" --no "a red background"

Equations 11 and 13 of the paper, with a weight w_i > 0 for AND and w_i < 0 for NOT:

    eps = eps(x) + sum_i w_i (eps(x, c_i) - eps(x))

Each prompt multiplies the density by (p(x | c_i) / p(x))^w_i. With one prompt this is classifier-free guidance.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

import ldm
from ldm.diffusion.denoiser import Denoiser, Rule, guided, parametrize
from ldm.geometry import grid
from ldm.images import to_tensor
from ldm.pictures import save_png


def conjunction(weights: Sequence[float]) -> Rule:
    """Make the rule for the predictions without a prompt, then with each prompt. weights: one for each prompt."""

    def rule(predictions: Sequence[Tensor]) -> Tensor:
        uncond, *conds = predictions
        return uncond + sum(w * (cond - uncond) for w, cond in zip(weights, conds, strict=True))

    return rule


def composed(pipe: ldm.Pipeline, prompts: Sequence[str], weights: Sequence[float]) -> Denoiser:
    """Make the denoiser of one picture for prompts with weights. Raises ValueError unless each prompt has a weight."""
    if len(prompts) != len(weights):
        raise ValueError(f"each prompt needs a weight, got {len(prompts)} prompts and {len(weights)} weights")
    plans = [pipe.plan(ldm.Request(text, guidance_scale=1)) for text in ("", *prompts)]
    network = guided(pipe.binding(), [pipe.conditions(plan)[0] for plan in plans], conjunction(weights))
    dtype = next(pipe.unet.parameters()).dtype
    return parametrize(network, pipe.schedule, pipe.config.diffusion.prediction, dtype=dtype)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Make a picture of all prompts, then one also without another prompt.")
    parser.add_argument("prompts", nargs="*", default=["a frog on a red background"])
    parser.add_argument("--no", default="a red background", help="what the second picture should not show")
    parser.add_argument("--weight", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", default="compose.png")
    args = parser.parse_args()
    pipe, pictures = ldm.load(), []
    plan = pipe.plan(ldm.Request(args.prompts[0], seed=1, steps=args.steps))
    for more in ([], [args.no]):
        prompts = [*args.prompts, *more]
        weights = [args.weight] * len(args.prompts) + [-args.weight] * len(more)
        *_, last = pipe.walk(plan, composed(pipe, prompts, weights), pipe.start(plan))
        pictures += pipe.decode(last.latents)
    save_png(grid(pictures), args.out, overwrite=True)
    red, rest = (127.5 + 127.5 * torch.cat([to_tensor(p) for p in pictures])).mean(dim=(2, 3)).split([1, 2], dim=1)
    excess = (red[:, 0] - rest.mean(dim=1)).tolist()
    print(f"red above green and blue: {excess[0]:.0f} of 255 levels, and {excess[1]:.0f} with NOT {args.no}")


if __name__ == "__main__":
    main()
