"""What each noise level decides: the prompt is swapped during the sampling (eDiff-I, Balaji et al. 2022).

    python scripts/recipes/prompt_swap.py

The first prompt works above the noise level s: x0(x, sigma) = x0_1(x, sigma) if sigma > s, otherwise x0_2(x, sigma).

What follows the second prompt is decided below s: the object, the ground or the place. The training's checker finds
them. Its sprites are objects that the model draws on white. The plot needs the extra `plots`.
"""

import argparse

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

import ldm
from ldm.diffusion.denoiser import Denoiser, within
from ldm.diffusion.samplers import ddim
from ldm.training.checker import Checker, Seen
from ldm.training.scenes import PLACES, Scene

OBJECTS, SIDES = ("fox", "apple", "frog", "car", "orange", "cactus"), ("on the left", "on the right")
GROUNDS = "grass", "purple", "night", "beach", "sea", "city"


def swapped(first: Denoiser, second: Denoiser, x: Tensor, sigmas: Tensor, level: float) -> Tensor:
    """Sample from x, b c h w, with `first` at noise levels above `level`, and with `second` from there."""
    *_, last = ddim(within((0.0, level), second, first), x, sigmas)
    return last.x


def cutout(picture: Image.Image) -> Image.Image:
    """Cut a colorful object out of a white background, as an RGBA square. Its gray shadow stays behind."""
    mask = Image.fromarray((np.ptp(np.asarray(picture).astype(int), axis=2) > 40).astype(np.uint8) * 255)
    picture.putalpha(mask)
    cut = picture.crop(mask.getbbox())
    return ImageOps.pad(cut, (max(cut.size),) * 2, color=(0, 0, 0, 0))


def follows(seen: Seen, scene: Scene) -> list[bool]:
    """Tell whether the object, the ground and the half of the picture are those of `scene`."""
    (found,), left = seen.objects, PLACES[scene.place][0] < 0.5
    return [found.name == scene.objects[0], seen.ground == scene.ground, (found.x < 0.5) == left]


def scene(i: int, which: int) -> Scene:
    """Return the scene of the first prompt, 0, or of the second prompt, 1, of pair i. They differ in all properties."""
    ground = GROUNDS[(i + i // 6 + 3 * which) % 6]
    return Scene((OBJECTS[(i + which) % 6],), ground, "3D", place=SIDES[(i + which) % 2])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Swap the prompt at several noise levels.")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", default="prompt_swap.png")
    args = parser.parse_args()
    from matplotlib.figure import Figure  # the functions above work without it

    pipe, denoisers, both = ldm.load(), [], [[scene(i, which) for i in range(args.pairs)] for which in (0, 1)]
    white = tuple(f"a 3D {name} on a white background" for name in OBJECTS)
    drawn = map(cutout, pipe.generate(ldm.Request(white, seed=1, images=len(white), steps=args.steps)))
    checker = Checker({"3D": dict(zip(OBJECTS, drawn, strict=True))})
    for scenes in both:
        prompts = tuple(each.caption for each in scenes)
        plan = pipe.plan(ldm.Request(prompts, seed=1, images=args.pairs, steps=args.steps, sampler="ddim"))
        denoisers.append(pipe.denoiser(plan, pipe.conditions(plan)))
    levels, strip, shares = plan.sigmas[::2].tolist(), [], []
    for level in levels:
        made = pipe.decode(swapped(*denoisers, pipe.start(plan), plan.sigmas, level))
        strip, seen = [*strip, made[0]], [checker.look(picture) for picture in made]
        shares.append([np.mean([*map(follows, seen, scenes)], axis=0) for scenes in both])
    figure = Figure(figsize=(9, 6), layout="constrained")
    curves, pictures = figure.subplots(2, height_ratios=(3, 1))
    for name, (first, second) in zip(("object", "ground", "place"), 100 * np.array(shares).T, strict=True):
        (line,) = curves.semilogx(levels, second, label=name)
        curves.semilogx(levels, first, "--", color=line.get_color())
        cells = ", ".join(f"{share:.0f} % at {level:.2g}" for level, share in zip(levels, second, strict=True))
        print(f"{name} of the second prompt: {cells}")
    curves.set(xlabel="level of the swap", ylabel="% (dashed: first prompt)", xlim=(levels[0], levels[-1]))
    curves.legend()
    pictures.imshow(np.concatenate(strip, axis=1))
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
