"""Null-text optimization (Mokady et al. 2023): DDIM with guidance comes back to a picture that was inverted without.

    python scripts/recipes/null_text.py "a frog on the grass" "a fox on the grass"

DDIM inversion with guidance scale 1 gives a path x*. Guidance leaves this path. At each level, from high to low noise,
the context of the empty prompt is optimized so that the guided step comes to the path (section 3.3, eq. 3):

    min over context: ||x*_target - ddim(x, sigma -> target; prompt, context, scale)||^2.

With these contexts, guided sampling with the prompt gives the picture, and with another prompt an edited picture. The
command shows the picture; then guided sampling without and with the optimization; then the other prompt.
"""

import argparse
import dataclasses

import torch
from torch import Tensor

import ldm
from ldm.conditioning import Condition
from ldm.diffusion.inversion import invert
from ldm.diffusion.samplers import ddim
from ldm.geometry import grid
from ldm.pictures import save_png
from ldm.request import Plan


def guided_step(
    pipe: ldm.Pipeline, plan: Plan, prompt: Condition, empty: Condition, context: Tensor, x: Tensor, sigmas: Tensor
) -> Tensor:
    """Take one guided DDIM step from sigmas[0] to sigmas[1] with `context` in place of that of the empty prompt."""
    denoise = pipe.denoiser(plan, [prompt, dataclasses.replace(empty, context=context)])
    return next(ddim(denoise, x, sigmas)).x


def null_text(
    pipe: ldm.Pipeline, plan: Plan, path: list[Tensor], sigmas: Tensor, *, iterations: int = 10, rate: float = 0.01
) -> list[Tensor]:
    """Return the optimized context of the empty prompt for each step: b n d.

    plan: of the prompt, with guidance. path: x at each level, b c h w. sigmas: falling levels above 0.
    """
    prompt, empty = pipe.conditions(plan)
    x, context, contexts = path[0], empty.context, []
    for i, goal in enumerate(path[1:]):
        with torch.enable_grad():
            context = context.detach().clone().requires_grad_()
            optimizer = torch.optim.Adam([context], lr=rate)
            for _ in range(iterations):
                optimizer.zero_grad()
                loss = (guided_step(pipe, plan, prompt, empty, context, x, sigmas[i : i + 2]) - goal).square().mean()
                loss.backward()
                optimizer.step()
        contexts.append(context.detach())
        x = guided_step(pipe, plan, prompt, empty, contexts[-1], x, sigmas[i : i + 2])
    return contexts


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Invert a picture for guided sampling, and edit it.")
    parser.add_argument("prompt", nargs="?", default="a frog on the grass")
    parser.add_argument("other", nargs="?", default="a fox on the grass")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--out", default="null_text.png")
    args = parser.parse_args()
    pipe = ldm.load()
    latents = pipe.encode_image(pipe.generate(ldm.Request(args.prompt, seed=1))[0])
    unguided = pipe.plan(ldm.Request(args.prompt, guidance_scale=1))
    plan, other = pipe.plan(ldm.Request(args.prompt)), pipe.plan(ldm.Request(args.other))
    sigmas = pipe.schedule.steps(args.steps + 1, "exponential")[:-1]
    inverted = invert(pipe.denoiser(unguided, pipe.conditions(unguided)), latents, sigmas.flip(0))
    path = [latents, *(step.x for step in inverted)][::-1]
    contexts = null_text(pipe, plan, path, sigmas, iterations=args.iterations)
    runs, ends = [(plan, [pipe.conditions(plan)[1].context] * args.steps), (plan, contexts), (other, contexts)], []
    for each, nulls in runs:
        (prompt, empty), x = pipe.conditions(each), path[0]
        for i, context in enumerate(nulls):
            x = guided_step(pipe, each, prompt, empty, context, x, sigmas[i : i + 2])
        ends.append(x)
    before, after = (float((end - latents).norm() / latents.norm()) for end in ends[:2])
    print(f"{args.steps} steps: relative error {before:.3f} with the empty prompt, {after:.3f} with null-text")
    save_png(grid(pipe.decode(torch.cat([latents, *ends]))), args.out, overwrite=True)


if __name__ == "__main__":
    main()
