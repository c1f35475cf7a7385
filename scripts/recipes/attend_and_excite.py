"""Attend-and-Excite (Chefer et al. 2023): no object of the prompt may be missing.

    python scripts/recipes/attend_and_excite.py

In the first half of n steps, z follows the gradient of the most neglected word s (algorithm 1), at steps in THRESHOLDS
until loss <= 1 - threshold. A_s is the smoothed cross-attention to s in the last layer at the coarse resolution.

    loss = max over words s of (1 - max over pixels of A_s),    z' = z - rate sqrt(1 - i / 2n) grad_z loss
"""

import argparse

import torch
import torch.nn.functional as F
from PIL import ImageOps
from torch import Tensor

import ldm
from ldm.diffusion.samplers import ddim
from ldm.diffusion.schedule import to_ve, to_vp
from ldm.geometry import grid
from ldm.models.own_attention import with_attention
from ldm.pictures import save_png
from ldm.training.checker import Checker

FIRST = "frog", "fox", "penguin", "panda", "house", "robot", "cat", "owl"
SECOND = "car", "pizza", "apple", "cactus", "tree", "balloon", "strawberry", "guitar"
THRESHOLDS, SHARPNESS = {0.0: 0.05, 0.2: 0.5, 0.4: 0.8}, 20  # by i / n; paper: 100, rate 20, mean of all layers


def neglect(maps: Tensor, words: list[int]) -> Tensor:
    """Return the loss: b. maps: b m h w, attention to the tokens. words: their places among the m."""
    line, rows = torch.tensor([0.1065, 0.7870, 0.1065]).to(maps), [word - 1 for word in words]  # standard deviation 0.5
    text = F.pad((SHARPNESS * maps[:, 1:-1]).softmax(dim=1)[:, rows], [1] * 4, mode="reflect")
    smooth = F.conv2d(text, torch.outer(line, line).expand(len(rows), 1, 3, 3), groups=len(rows))
    return (1 - smooth.amax(dim=(2, 3))).amax(dim=1)


def attend_and_excite(pipe: ldm.Pipeline, request: ldm.Request, words: list[int], rate: float = 100.0) -> Tensor:
    """Return sampled latents, 1 c h w. words: places of tokens in the context, where the begin token has 0."""
    plan, found = pipe.plan(request), list[Tensor]()
    conditions, x = pipe.conditions(plan), pipe.start(plan)

    def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)  # b heads n m
        if q.shape[2] <= 256:  # 16 x 16 pixels in the paper
            h = round((q.shape[2] * plan.height / plan.width) ** 0.5)
            found[:] = [weights.mean(dim=1).mT.unflatten(-1, (h, -1))]  # b m h w
        return weights @ v

    watched = with_attention(pipe.unet, lambda name, attend: look if name.endswith("attn2") else attend)
    watch, denoise = pipe.denoiser(plan, conditions[:1], bind=watched.bind), pipe.denoiser(plan, conditions)
    for i, sigma in enumerate(plan.sigmas[:-1]):
        for _ in range(20 if 2 * i < plan.steps else 0):
            z = to_vp(x, sigma).detach().requires_grad_()
            watch(to_ve(z, sigma), sigma)
            loss = neglect(found[0], words)
            x = to_ve(z.detach() - rate * (1 - 0.5 * i / plan.steps) ** 0.5 * torch.autograd.grad(loss, z)[0], sigma)
            if loss <= 1 - THRESHOLDS.get(i / plan.steps, 0):
                break
        x = next(ddim(denoise, x, plan.sigmas[i : i + 2])).x
    return to_vp(x, plan.sigmas[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Make pictures of two objects, with and without Attend-and-Excite.")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", default="attend_and_excite.png")
    args = parser.parse_args()
    pipe, pairs = ldm.load(), [*zip(FIRST, SECOND, strict=True)]
    names, encode = [name for pair in pairs for name in pair], pipe.text_encoder.tokenizers[0].encode
    white = tuple(f"a 3D {name} on a white background" for name in names)
    sprites = pipe.generate(ldm.Request(white, seed=1, images=len(white), steps=args.steps))
    for sprite in sprites:  # the shadow is gray
        sprite.putalpha(sprite.convert("HSV").getchannel("S").point(lambda level: 255 * (level > 40)))
    cuts = {name: ImageOps.pad(cut.crop(cut.getbbox()), cut.size) for name, cut in zip(names, sprites, strict=True)}
    prompts = tuple(f"a 3D {first} to the left of a 3D {second} on the grass" for first, second in pairs)
    pictures = pipe.generate(ldm.Request(prompts, seed=1, images=len(pairs), steps=args.steps, sampler="ddim"))
    for n, (prompt, pair) in enumerate(zip(prompts, pairs, strict=True), 1):
        words = [1 + encode(prompt).index(encode(name)[-1]) for name in pair]
        request = ldm.Request(prompt, seed=n, steps=args.steps, sampler="ddim")
        pictures += pipe.decode(attend_and_excite(pipe, request, words))
    look = Checker({"3D": cuts}).look
    both = [{f.name for f in look(p, 2).objects} == {*pair} for p, pair in zip(pictures, 2 * pairs, strict=True)]
    save_png(grid(pictures), args.out, overwrite=True)
    print(f"the checker finds both objects in {sum(both[n:])} of {n} pictures, in {sum(both[:n])} without the gradient")


if __name__ == "__main__":
    main()
