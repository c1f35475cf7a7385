"""Attend-and-Excite (Chefer et al. 2023): no object of the prompt may be missing.

    python scripts/recipes/attend_and_excite.py "a penguin and a pizza" penguin pizza

Equation 1 of the paper: the latents of each of the first steps follow the gradient of the most neglected word. A_s is
the cross-attention to word s at the coarse resolution, without the begin and end tokens, smoothed by a Gaussian.

    loss = max over words s of (1 - max over pixels of A_s),    z' = z - rate grad_z loss
"""

import argparse

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import ldm
from ldm.diffusion.samplers import ddim
from ldm.diffusion.schedule import to_ve, to_vp
from ldm.geometry import grid
from ldm.models.attention import Attend
from ldm.models.own_attention import with_attention
from ldm.pictures import save_png


def smooth(maps: Tensor) -> Tensor:
    """Smooth maps, b m h w, with a Gaussian of 3 x 3 pixels and the standard deviation 0.5."""
    line, m = torch.tensor([0.1065, 0.7870, 0.1065]).to(maps), maps.shape[1]
    return F.conv2d(F.pad(maps, [1] * 4, mode="reflect"), torch.outer(line, line).expand(m, 1, 3, 3), groups=m)


def neglect(maps: Tensor, words: list[int]) -> Tensor:
    """Return the loss of equation 1: b. maps: b m h w, attention to the tokens. words: their places among the m."""
    text = smooth((100 * maps[:, 1:-1]).softmax(dim=1))[:, [word - 1 for word in words]]
    return (1 - text.amax(dim=(2, 3))).amax(dim=1)


def attend_and_excite(
    pipe: ldm.Pipeline, request: ldm.Request, words: list[int], *, rate: float = 20.0, share: float = 0.5
) -> tuple[Tensor, list[float]]:
    """Return sampled latents, 1 c h w, and the loss before each step. rate: 0 changes nothing, the paper has 20.

    words: places of tokens in the context; the begin token has 0. share: 0 to 1, of the steps, with the gradient.
    """
    plan = pipe.plan(request)
    conditions, ratio, found = pipe.conditions(plan), plan.height / plan.width, list[Tensor]()

    def choose(name: str, attend: Attend) -> Attend:
        def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)  # b heads n m
            found.append(rearrange(weights.mean(dim=1), "b (h w) m -> b m h w", h=round((q.shape[2] * ratio) ** 0.5)))
            return weights @ v

        return look if name.endswith("attn2") else attend

    watch = pipe.denoiser(plan, conditions[:1], bind=with_attention(pipe.unet, choose).bind)
    denoise, x, losses = pipe.denoiser(plan, conditions), pipe.start(plan), list[float]()
    for i, sigma in enumerate(plan.sigmas[:-1]):
        found.clear()
        with torch.enable_grad():
            z = to_vp(x, sigma).detach().requires_grad_()
            watch(to_ve(z, sigma), sigma)
            size = max(maps.shape[2:] for maps in found if maps[0, 0].numel() <= 256)  # 16 x 16 in the paper
            loss = neglect(torch.stack([maps for maps in found if maps.shape[2:] == size]).mean(dim=0), words)
            (gradient,) = torch.autograd.grad(loss.sum(), z)
        losses.append(loss.item())
        z = z.detach() - (i < share * plan.steps) * rate * (1 - 0.5 * i / plan.steps) ** 0.5 * gradient
        with torch.no_grad():
            x = next(ddim(denoise, to_ve(z, sigma), plan.sigmas[i : i + 2])).x
    return to_vp(x, plan.sigmas[-1]), losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a picture of two objects, with and without Attend-and-Excite.")
    parser.add_argument("prompt", nargs="?", default="a penguin and a pizza")
    parser.add_argument("words", nargs="*", default=("penguin", "pizza"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", default="attend_and_excite.png")
    args = parser.parse_args()
    pipe, request = ldm.load(), ldm.Request(args.prompt, steps=args.steps, seed=2)
    encode = pipe.text_encoder.tokenizers[0].encode
    words = [1 + encode(args.prompt).index(encode(word)[-1]) for word in args.words]
    (plain, before), (excited, after) = (attend_and_excite(pipe, request, words, rate=rate) for rate in (0.0, 20.0))
    save_png(grid(pipe.decode(torch.cat([plain, excited]))), args.out, overwrite=True)
    print(f"the loss of the most neglected word is {after[-1]:.2f} at the end, {before[-1]:.2f} without the gradient")


if __name__ == "__main__":
    main()
