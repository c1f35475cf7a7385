"""Unified Concept Editing (Gandikota et al. 2024): erase a concept from the cross-attention, in closed form.

    python scripts/recipes/uce.py frog --as cat

Equation 7 of the paper, for each key and value projection W_0 of the cross-attention: the rows c of erased prompts get
the output of the rows c* of other prompts, and the rows k of kept prompts get what they had,

    W = (sum W_0 c* c^T + sum W_0 k k^T + ridge W_0) (sum c c^T + sum k k^T + ridge I)^-1

This is the minimum of sum |W c - W_0 c*|^2 + sum |W k - W_0 k|^2 + ridge |W - W_0|^2. c and c* are token by token, so
that a prompt and its replacement need the same number of tokens for the best result.
"""

import argparse
import copy
from collections.abc import Sequence

import torch
from torch import Tensor

import ldm
from ldm.geometry import grid
from ldm.models.unet import UNet
from ldm.pictures import save_png

KEPT = ("fox", "apple", "house", "panda", "car", "turtle", "penguin", "tree", "pizza")
GROUNDS = ("on the grass", "in the snow", "on the beach", "at night")


def closed_form(weight: Tensor, erased: Tensor, new: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Return the edited weight: o d. erased, new: n d, row by row. kept: m d. Computed in fp64."""
    w, c, target, k = (tensor.double() for tensor in (weight, erased, new, kept))
    identity = ridge * torch.eye(c.shape[1], dtype=torch.float64, device=c.device)
    wanted = w @ (target.T @ c + k.T @ k + identity)
    return torch.linalg.solve(c.T @ c + k.T @ k + identity, wanted, left=False).to(weight)


@torch.no_grad()
def erase(pipe: ldm.Pipeline, pairs: Sequence[tuple[str, str]], kept: Sequence[str], ridge: float = 0.1) -> UNet:
    """Return a copy of the UNet without a concept. pairs: prompts, each with its replacement. kept: other prompts."""
    erased, new = zip(*pairs, strict=True)
    rows = [pipe.text_encoder.encode([*texts]).context.flatten(0, 1) for texts in (erased, new, kept)]  # (b n) d
    unet = copy.deepcopy(pipe.unet)
    for name, weight in unet.named_parameters():
        if "attn2.to_k" in name or "attn2.to_v" in name:
            weight.copy_(closed_form(weight, *rows, ridge))
    return unet


@torch.no_grad()
def score(pipe: ldm.Pipeline, latents: Tensor, prompt: str) -> float:
    """Return by how many percent a prompt lowers the denoising error of latents, 1 c h w: the diffusion classifier's
    evidence (Li et al. 2023). It is near 0 for what the picture does not show."""
    plan = pipe.plan(ldm.Request((prompt, ""), seed=7, images=2, guidance_scale=1))
    denoise, noise, errors = pipe.denoiser(plan, pipe.conditions(plan)), plan.noise(), torch.zeros(2)
    for sigma in plan.sigmas[plan.steps // 5 : plan.steps // 2]:
        x0 = denoise((latents + float(sigma) * noise()[:1]).expand(2, -1, -1, -1), sigma)
        errors += ((x0 - latents) / float(sigma)).square().mean(dim=(1, 2, 3)).cpu()
    return 100 * (1 - float(errors[0] / errors[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Erase an object from a model.")
    parser.add_argument("concept", nargs="?", default="frog")
    parser.add_argument("--as", dest="other", default="cat")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", default="uce.png")
    args = parser.parse_args()
    pipe = ldm.load()
    pairs = [(f"a {args.concept} {ground}", f"a {args.other} {ground}") for ground in GROUNDS]
    kept = [f"a {name} {ground}" for name in (*KEPT, args.other) if name != args.concept for ground in GROUNDS]
    edited = ldm.Pipeline(pipe.config, erase(pipe, pairs, kept), pipe.vae, pipe.text_encoder)
    latents, scores = [], []
    for prompt in (pairs[0][0], "a fox on the grass"):  # the second is kept
        for model in (pipe, edited):
            *_, last = model.stream(ldm.Request(prompt, seed=1, steps=args.steps))
            latents.append(last.latents)
            scores.append(score(pipe, last.latents, prompt))
    save_png(grid(pipe.decode(torch.cat(latents))), args.out, overwrite=True)
    before, after, kept_before, kept_after = scores
    print(
        f"score of {args.concept}: {before:z.0f} to {after:z.0f} %, of fox: {kept_before:z.0f} to {kept_after:z.0f} %"
    )


if __name__ == "__main__":
    main()
