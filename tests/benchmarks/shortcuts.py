"""Measure the shortcuts on the bundled model: `python -m tests.benchmarks.shortcuts` renews docs/shortcuts.md and .png.

Each picture is made with all shortcuts in turn, so that other work on the machine slows all of them alike.
"""

import re
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from statistics import fmean, median
from time import perf_counter

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import ldm
from ldm.pictures import save_png
from ldm.training.checker import Checker
from ldm.training.evaluate import MEASURES, fixed_scenes, judge, objects_to_find
from ldm.training.objects import emoji_sprites
from scripts.recipes.deepcache import DeepCache

SHORTCUTS = {  # fields of the Request; arguments of DeepCache, or None
    "none": ({}, None),
    "15 steps": ({"steps": 15}, None),
    "10 steps": ({"steps": 10}, None),
    "5 steps": ({"steps": 5}, None),
    "lcm, 8 steps": ({"steps": 8, "sampler": "lcm"}, None),
    "lcm, 4 steps": ({"steps": 4, "sampler": "lcm"}, None),
    "guidance in (0.5, 20]": ({"guidance_interval": (0.5, 20)}, None),
    "guidance in (2, 20]": ({"guidance_interval": (2, 20)}, None),
    "guidance in (0.5, 5]": ({"guidance_interval": (0.5, 5)}, None),
    "DeepCache, every 2, depth 1": ({}, {"every": 2, "depth": 1}),
    "DeepCache, every 3, depth 1": ({}, {"every": 3, "depth": 1}),
    "DeepCache, every 3, depth 3": ({}, {"every": 3, "depth": 3}),
    "DeepCache, every 5, depth 1": ({}, {"every": 5, "depth": 1}),
    "10 steps, guidance in (0.5, 20]": ({"steps": 10, "guidance_interval": (0.5, 20)}, None),
}
DOCS = Path(__file__).resolve().parents[2] / "docs"
NTH = 7  # take every seventh prompt of `ldm evaluate`; styles and properties repeat after 2, 4 and 8 prompts


@contextmanager
def cached(pipe, cache):
    """Inside `with`, the pipeline's UNet is in a `DeepCache` with these arguments, unless they are None."""
    unet = pipe.unet
    if cache is not None:
        pipe.unet = DeepCache(unet, **cache)
    yield
    pipe.unet = unet


def count(pipe, fields, cache):
    """Count the floating-point operations of the UNet for one picture; attention is counted by its formula."""
    with cached(pipe, cache):
        steps = pipe.stream(ldm.Request("a frog", **fields))
        with FlopCounterMode(display=False) as counter:
            list(steps)
    return counter.get_total_flops()


def main():
    sprites = emoji_sprites()
    pipe, counted = (ldm.load(placement=ldm.Placement("cpu", attention=a)) for a in ("sdpa", "math"))
    asked = [(k, s) for k, scenes in fixed_scenes(tuple(sprites["flat"]), tuple(sprites)).items() for s in scenes][
        ::NTH
    ]
    made, seconds, right, likeness = ({name: [] for name in SHORTCUTS} for _ in range(4))
    checker = Checker(sprites)
    for seed, (kind, scene) in enumerate(tqdm(asked, unit="prompt", disable=None)):
        for name, (fields, cache) in SHORTCUTS.items():
            with cached(pipe, cache):
                start = perf_counter()
                *_, last = pipe.stream(ldm.Request(scene.caption, seed=seed, **fields))
                seconds[name].append(perf_counter() - start)
            made[name] += pipe.decode(last.latents)
            seen = checker.look(made[name][-1], objects_to_find(scene))
            likeness[name] += [found.likeness for found in seen.objects]
            right[name] += [judge(scene, seen)[measure] for measure in MEASURES[kind]]

    table = "| shortcut | UNet work | time | levels | PSNR | right | likeness |\n|" + " --- |" * 7
    levels = {name: np.stack([np.asarray(p, float) for p in made[name]]) for name in made}
    plain, work = levels["none"], count(counted, *SHORTCUTS["none"])
    for name, shortcut in SHORTCUTS.items():
        time = median(a / b for a, b in zip(seconds[name], seconds["none"], strict=True))
        mean, square = abs(levels[name] - plain).mean(), ((levels[name] - plain) ** 2).mean()
        psnr = f"{10 * np.log10(255**2 / square):.1f} dB" if square else ""
        table += f"\n| {name} | {count(counted, *shortcut) / work:.0%} | {time:.2f} | {mean:.1f} | {psnr} "
        table += f"| {sum(right[name])}/{len(right[name])} | {fmean(likeness[name]):.2f} |"
    table += f"\n\n{date.today()}: {len(asked)} prompts, torch {torch.__version__}, {torch.get_num_threads()} threads."
    document = (DOCS / "shortcuts.md").read_text(encoding="utf-8")
    document = re.sub(r"(?s)(<!-- measured -->\n).*(?=<!-- end -->)", rf"\1{table}\n", document)
    (DOCS / "shortcuts.md").write_text(document, encoding="utf-8")
    shown = slice(0, None, len(asked) // 6 + 1)  # six prompts from left to right
    rows = [np.concatenate([np.asarray(p) for p in made[name][shown]], axis=1) for name in made]
    save_png(Image.fromarray(np.concatenate(rows)), DOCS / "shortcuts.png", overwrite=True)


if __name__ == "__main__":
    main()
