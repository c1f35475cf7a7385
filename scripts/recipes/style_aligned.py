"""StyleAligned (Hertz et al. 2024): pictures of several prompts in one style, by shared self-attention.

    python scripts/recipes/style_aligned.py "a frog at sunset" "a house" "an apple"

Equation 3 of the paper: each picture also attends to the first, r, the reference, after AdaIN of its queries and keys:

    Attention(AdaIN(Q, Q_r), [K_r, AdaIN(K, K_r)], [V_r, V]),    AdaIN(x, y) = std(y) (x - mean(x)) / std(x) + mean(y)
"""

import argparse

import torch
from torch import Tensor

import ldm
from ldm.geometry import grid
from ldm.images import to_tensor
from ldm.models.attention import Attend
from ldm.models.own_attention import with_attention
from ldm.pictures import save_png


def adain(x: Tensor, y: Tensor) -> Tensor:
    """Give x the mean and the standard deviation of y over the pixels: b h n d each."""
    std, mean = torch.std_mean(x, dim=2, keepdim=True)
    std_y, mean_y = torch.std_mean(y, dim=2, keepdim=True)
    return std_y * (x - mean) / (std + 1e-5) + mean_y


def shared(name: str, attend: Attend) -> Attend:
    """Choose self-attention that is shared with the first row of the batch, see `with_attention`."""

    def attend_to_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_r, k_r, v_r = (part[:1].expand_as(part) for part in (q, k, v))
        both = torch.cat([k_r, adain(k, k_r)], dim=2), torch.cat([v_r, v], dim=2)
        return torch.cat([attend(q[:1], k[:1], v[:1]), attend(adain(q, q_r), *both)[1:]])

    return attend_to_both if name.endswith("attn1") else attend


@torch.no_grad()
def style_aligned(pipe: ldm.Pipeline, request: ldm.Request) -> Tensor:
    """Return sampled latents, b c h w. The first picture equals that of the Pipeline, the others take its style."""
    plan, bind = pipe.plan(request), with_attention(pipe.unet, shared).bind
    cond, uncond = (pipe.denoiser(plan, [condition], bind=bind) for condition in pipe.conditions(plan))

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.lerp(uncond(x, sigma), cond(x, sigma), plan.guidance_scale)

    *_, last = pipe.walk(plan, denoise, pipe.start(plan))
    return last.latents


def main() -> None:
    parser = argparse.ArgumentParser(description="Make pictures in the style of the first.")
    parser.add_argument("prompts", nargs="*", default=("a frog at sunset", "a house", "an apple"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="style_aligned.png")
    args = parser.parse_args()
    pipe = ldm.load()
    request = ldm.Request(tuple(args.prompts), steps=args.steps, images=len(args.prompts), seed=2)
    runs = pipe.generate(request), pipe.decode(style_aligned(pipe, request))
    save_png(grid([*runs[0], *runs[1]]), args.out, overwrite=True)
    colors = [torch.cat([127.5 * to_tensor(picture).mean((2, 3)) for picture in run]) for run in runs]
    before, after = (float((mean[1:] - mean[0]).abs().mean()) for mean in colors)
    print(
        f"the mean colors differ by {after:.0f} of 255 levels from the first picture's, by {before:.0f} without sharing"
    )


if __name__ == "__main__":
    main()
