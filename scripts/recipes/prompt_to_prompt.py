"""Prompt-to-Prompt (Hertz et al. 2022): change words of the prompt and keep the composition of the picture.

    python scripts/recipes/prompt_to_prompt.py "a frog on the grass" "a cat on the grass"

Both prompts are sampled from one noise. M are the attention maps of the source, M* those of the edit (section 3.2):

    replace, refine   Edit(M, M*)[j] = M[A(j)] if token j has a partner A(j) in the source, else M*[j]
    re-weight         Edit(M, M*)[j] = c[j] M*[j]
"""

import argparse
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import partial

import torch
from torch import Tensor

import ldm
from ldm.geometry import grid
from ldm.images import to_tensor
from ldm.models.attention import Attend
from ldm.models.own_attention import with_attention
from ldm.pictures import save_png


def partners(source: Sequence[int], edit: Sequence[int]) -> list[int]:
    """Return A: for each token of the edit the place of its partner in the source, or -1 for an added token."""
    found = [-1] * len(edit)
    for _, i1, i2, j1, j2 in SequenceMatcher(None, source, edit, autojunk=False).get_opcodes():
        for j in range(j1, j2 if i1 < i2 else j1):
            found[j] = min(i1 + j - j1, i2 - 1)  # a shorter word lends its last token to the rest of a longer word
    return found


@torch.no_grad()
def prompt_to_prompt(
    pipe: ldm.Pipeline, source: str, edit: str, *, weights: float | Tensor = 1.0,
    cross: float = 0.8, pixels: float = 0.4, steps: int | None = None, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Return clean latents of the source and of the edit: 2 c h w.

    weights: c, one number for each token of the context. cross, pixels: the share of the first steps, 0 to 1, in which
    cross-attention and self-attention are edited.
    """
    plan = pipe.plan(ldm.Request((source, edit), steps=steps, seed=seed, images=2, sampler="ddim"))
    conditions, index = pipe.conditions(plan), 0
    tokens: list[list[int]] = pipe.text_encoder.towers[0].tokenize([source, edit]).tolist()
    places = torch.tensor(partners(*tokens)).to(conditions[0].context.device)

    def choose(name: str, attend: Attend) -> Attend:
        def edited(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            theirs, ours = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)  # heads n m each
            if name.endswith("attn1"):
                ours = theirs if index < pixels * plan.steps else ours
            elif index < cross * plan.steps:
                ours = torch.where(places < 0, ours, theirs[..., places]) * weights
            return torch.stack([theirs, ours]) @ v

        return edited

    cond = pipe.denoiser(plan, conditions[:1], bind=with_attention(pipe.unet, choose).bind)
    uncond = pipe.denoiser(plan, conditions[1:])

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.lerp(uncond(x, sigma), cond(x, sigma), plan.guidance_scale)

    for step in pipe.walk(plan, denoise, pipe.start(plan)[:1].repeat(2, 1, 1, 1)):
        index = step.index + 1
    return step.latents


def main() -> None:
    parser = argparse.ArgumentParser(description="Change words of a prompt and keep the composition.")
    parser.add_argument("source", nargs="?", default="a fox")
    parser.add_argument("edit", nargs="?", default="a cat")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="prompt_to_prompt.png")
    args = parser.parse_args()
    pipe = ldm.load()
    run = partial(prompt_to_prompt, pipe, args.source, args.edit, steps=args.steps, seed=5)
    pictures = pipe.decode(torch.cat([run(), run(cross=0, pixels=0)[1:]]))
    save_png(grid(pictures), args.out, overwrite=True)
    source, ours, theirs = (127.5 * to_tensor(picture) for picture in pictures)
    kept, lost = (ours - source).abs().mean(), (theirs - source).abs().mean()
    print(f"the edit differs from the source by {kept:.1f} of 255 levels, by {lost:.1f} without control")


if __name__ == "__main__":
    main()
