"""What shortcuts gain and cost on the bundled model: `python scripts/shortcuts.py` renews docs/shortcuts.md and .png.

Every picture is made with all shortcuts in turn, so that whatever else the machine does meets each of them.
"""

import copy
import re
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from statistics import fmean, median
from time import perf_counter

import numpy as np
import torch
from ldm.models.int8 import quantize
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import ldm
from ldm.models.shortcuts import DeepCache, merged_tokens
from ldm.pictures import save_png
from ldm.training.checker import Checker
from ldm.training.evaluate import MEASURES, fixed_scenes, judge
from ldm.training.scenes import emoji_sprites

SHORTCUTS = {  # fields of the Request; how the UNet is changed, see `shortened`
    "none": ({}, {}),
    "15 steps": ({"steps": 15}, {}),
    "10 steps": ({"steps": 10}, {}),
    "5 steps": ({"steps": 5}, {}),
    "lcm, 8 steps": ({"steps": 8, "sampler": "lcm"}, {}),
    "lcm, 4 steps": ({"steps": 4, "sampler": "lcm"}, {}),
    "guidance in (0.5, 20]": ({"guidance_interval": (0.5, 20)}, {}),
    "guidance in (2, 20]": ({"guidance_interval": (2, 20)}, {}),
    "guidance in (0.5, 5]": ({"guidance_interval": (0.5, 5)}, {}),
    "DeepCache, every 2, depth 1": ({}, {"cache": {"every": 2, "depth": 1}}),
    "DeepCache, every 3, depth 1": ({}, {"cache": {"every": 3, "depth": 1}}),
    "DeepCache, every 3, depth 3": ({}, {"cache": {"every": 3, "depth": 3}}),
    "DeepCache, every 5, depth 1": ({}, {"cache": {"every": 5, "depth": 1}}),
    "half of the tokens merged": ({}, {"merged": 0.5}),
    "10 steps, guidance in (0.5, 20]": ({"steps": 10, "guidance_interval": (0.5, 20)}, {}),
    "weights in int8": ({}, {"int8": True}),
}
DOCS = Path(__file__).resolve().parents[1] / "docs"
NTH = 4  # of `ldm evaluate`'s prompts every fourth


@contextmanager
def shortened(pipe, cache=None, merged=0, int8=False):
    """Within `with`, the pipeline's UNet is in a `DeepCache`, merges tokens, or has its weights in eight bits."""
    unet = pipe.unet
    if int8:
        pipe.unet = copy.deepcopy(unet)
        quantize(pipe.unet)
    elif cache:
        pipe.unet = DeepCache(unet, **cache)
    with merged_tokens(unet, merged):
        yield
    pipe.unet = unet


def count(pipe, fields, short):
    """Floating-point operations of a picture's UNet calls; attention is counted by its formula."""
    with shortened(pipe, **short):
        steps = pipe.stream(ldm.Request("a frog", **fields))
        with FlopCounterMode(display=False) as counter:
            list(steps)
    return counter.get_total_flops()


def main():
    sprites = emoji_sprites()
    pipe, counted = (ldm.load(placement=ldm.Placement("cpu", attention=a)) for a in ("sdpa", "math"))
    asked = [(k, s) for k, scenes in fixed_scenes(tuple(sprites)).items() for s in scenes][::NTH]
    made, seconds, right, likeness = ({name: [] for name in SHORTCUTS} for _ in range(4))
    checker = Checker(sprites)
    for seed, (kind, scene) in enumerate(tqdm(asked, unit="prompt", disable=None)):
        for name, (fields, short) in SHORTCUTS.items():
            with shortened(pipe, **short):
                start = perf_counter()
                *_, last = pipe.stream(ldm.Request(scene.caption, seed=seed, **fields))
                seconds[name].append(perf_counter() - start)
            made[name] += pipe.decode(last.x)
            seen = checker.look(made[name][-1], len(scene.objects))
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


main()
