"""Maps of words (DAAM, Tang et al. 2023): where in the picture does the UNet attend to each word of the prompt?

    python scripts/recipes/daam.py "a frog left of a car on the grass" frog car

Equation 5 of the paper sums the cross-attention to word k over steps t, layers l and heads h, all enlarged to one size:

    D_k = sum over t, l, h of enlarge(F_k[t, l, h])
"""

import argparse

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import ldm
from ldm.geometry import grid
from ldm.images import to_pil, to_tensor
from ldm.models.attention import Attend
from ldm.models.own_attention import with_attention
from ldm.pictures import save_png


def positions(pipe: ldm.Pipeline, prompt: str, word: str) -> list[int]:
    """Return the places of the tokens of `word` in the context. Raises ValueError if the prompt has no such word."""
    encode = pipe.text_encoder.tokenizers[0].encode
    tokens, own = encode(prompt), encode(word)
    for i in range(len(tokens) - len(own) + 1):
        if tokens[i : i + len(own)] == own:
            return list(range(i + 1, i + 1 + len(own)))  # the context begins with the begin token
    raise ValueError(f"the word must be in the prompt, got {word!r} and {prompt!r}")


@torch.no_grad()
def token_maps(pipe: ldm.Pipeline, request: ldm.Request) -> tuple[Tensor, Tensor]:
    """Return sampled latents, b c h w, and the maps of the tokens of the context, b m h w, with the sum 1 over m."""
    plan = pipe.plan(request)
    conditions, (_, height, width) = pipe.conditions(plan), plan.latent_shape
    total, count = torch.zeros(()), 0

    def choose(name: str, attend: Attend) -> Attend:
        def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nonlocal total, count
            weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)  # b heads n m
            rows = round((weights.shape[2] * height / width) ** 0.5)
            maps = rearrange(weights.float().mean(dim=1), "b (h w) m -> b m h w", h=rows)
            total, count = total + F.interpolate(maps, (height, width), mode="bicubic"), count + 1
            return attend(q, k, v)

        return look if name.endswith("attn2") else attend  # cross-attention only

    watch = pipe.denoiser(plan, conditions[:1], bind=with_attention(pipe.unet, choose).bind)  # the prompt's alone
    guided = pipe.denoiser(plan, conditions)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        watch(x, sigma)
        return guided(x, sigma)

    *_, last = pipe.walk(plan, denoise, pipe.start(plan))
    return last.latents, total / count


def overlay(image: Tensor, heat: Tensor) -> Tensor:
    """Darken an image, b 3 h w in [-1, 1], where the map, b h' w', is small."""
    heat = F.interpolate(heat[:, None], image.shape[-2:], mode="bicubic")
    low, high = heat.amin((2, 3), keepdim=True), heat.amax((2, 3), keepdim=True)
    heat = (heat - low) / (high - low)
    return (image + 1) * (0.2 + 0.8 * heat.clamp(0, 1)) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Show where the model attends to two words.")
    parser.add_argument("prompt", nargs="?", default="a frog left of a car on the grass")
    parser.add_argument("words", nargs="*", default=("frog", "car"), help="the left object, then the right object")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="daam.png")
    args = parser.parse_args()
    pipe = ldm.load()
    latents, maps = token_maps(pipe, ldm.Request(args.prompt, steps=args.steps, seed=1))
    left, right = (maps[:, positions(pipe, args.prompt, word)].mean(dim=1) for word in args.words)
    image, half = to_tensor(pipe.decode(latents)[0]).to(maps), maps.shape[-1] // 2
    save_png(grid(to_pil(torch.cat([image, overlay(image, left), overlay(image, right)]))), args.out, overwrite=True)
    left, right = ((heat - heat.mean()).clamp(min=0) for heat in (left, right))  # what exceeds the mean
    share = (left[..., :half].sum() / left.sum() + right[..., -half:].sum() / right.sum()) / 2
    print(f"{100 * share:.0f} % of the words' maps lie on the side of their object; without knowledge: 50 %")


if __name__ == "__main__":
    main()
