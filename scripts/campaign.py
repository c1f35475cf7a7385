"""A campaign from a brief: concepts, one of them refined and finished, and a sheet of all pictures.

python scripts/campaign.py configs/campaign.toml campaign            # takes the most colorful concept
python scripts/campaign.py configs/campaign.toml campaign --choose 3 # takes the third; the concepts are kept

Each picture holds the record of how it was made. A finished picture has the record of its refined picture.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps
from tqdm import tqdm

import ldm
from ldm import batch, jobs
from ldm.geometry import grid
from ldm.pictures import read_picture, read_texts, save_png
from ldm.record import PARTS, ModelChoice
from ldm.safety import credentials, watermark
from ldm.strict import from_dict, read_toml


@dataclass(frozen=True)
class Refine:  # image to image from the chosen concept
    strength: float = 0.5
    steps: int | None = None  # None: as the concepts
    width: int | None = None
    height: int | None = None
    controlnet: str | None = None  # a file or folder; its hint is the concept
    detector: Literal["canny"] | None = None  # the hint is the edges of the concept


@dataclass(frozen=True)
class Finish:  # what happens to the refined picture, in this order
    scale: float = 4.0
    saturation: float = 1.0
    contrast: float = 1.0
    text: str = ""
    text_color: str = "white"
    logo: str = ""  # a file
    watermark: str = ""
    certificates: str = ""  # PEM files for content credentials
    key: str = ""


@dataclass(frozen=True)
class Brief:
    concepts: ldm.Request  # its prompt may have groups such as {a|b}
    model: ModelChoice = ModelChoice()
    refine: Refine = Refine()
    finish: Finish = Finish()


def colorfulness(picture: Image.Image) -> float:
    """Return how colorful a picture is (Hasler and Suesstrunk 2003, M3): 0 for gray, about 100 for bright colors."""
    red, green, blue = np.moveaxis(np.asarray(picture, dtype=float), -1, 0)
    first, second = red - green, (red + green) / 2 - blue
    return math.hypot(first.std(), second.std()) + 0.3 * math.hypot(first.mean(), second.mean())


def make(entries: list[batch.Entry], maker: batch.PictureMaker) -> list[Path]:
    """Make the pictures that are not there yet. Return their files."""
    rows = batch.run(entries, maker.choice, batch.Manifest(maker.folder), batch.in_turn(maker))
    if failed := [row["error"] for row in tqdm(rows, total=len(entries), disable=None) if row["status"] != "done"]:
        raise SystemExit("\n".join(failed))
    return [maker.folder / f"{entry.name}.png" for entry in entries]


def finished(picture: Image.Image, finish: Finish) -> Image.Image:
    """Return the picture, enlarged, with its colors, text, logo and watermark."""
    width, height = (round(side * finish.scale) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    picture = ImageEnhance.Contrast(ImageEnhance.Color(picture).enhance(finish.saturation)).enhance(finish.contrast)
    if finish.text:
        middle, font = (width / 2, height * 0.92), ImageFont.load_default(height / 12)
        edge = {"stroke_width": max(1, height // 200), "stroke_fill": "black"}
        ImageDraw.Draw(picture).text(middle, finish.text, finish.text_color, font, "mm", **edge)
    if finish.logo:
        with Image.open(finish.logo) as opened:
            logo = ImageOps.contain(opened.convert("RGBA"), (width // 5, height // 5))
        picture.paste(logo, (width - logo.width - width // 40, height // 40), logo)
    return watermark.write(picture, finish.watermark) if finish.watermark else picture


def cell(path: Path, label: str, chosen: bool = False) -> Image.Image:
    """Return a picture of the sheet with its label."""
    color = "gold" if chosen else "white"
    framed = ImageOps.expand(ImageOps.pad(read_picture(path), (256, 256), color=color), (8, 8, 8, 32), color)
    ImageDraw.Draw(framed).text((136, 280), shorten(label, 36), "black", ImageFont.load_default(14), "mm")
    return framed


parser = argparse.ArgumentParser(description="Make the pictures of a campaign from a brief.")
parser.add_argument("brief", type=Path, help="a TOML file such as configs/campaign.toml")
parser.add_argument("out", type=Path, help="the folder of the pictures; a second call goes on there")
parser.add_argument("--choose", type=int, metavar="N", help="the concept to refine, from 1 (default: most colorful)")
parser.add_argument("--device")
args = parser.parse_args()

# The brief, and the model.
brief = from_dict(read_toml(args.brief), Brief, where=str(args.brief), names=PARTS)
refine, finish, entries = brief.refine, brief.finish, batch.entries_of(1, "concept", brief.concepts)
if args.choose is not None and not 1 <= args.choose <= len(entries):
    parser.error(f"--choose must be from 1 to {len(entries)}, got {args.choose}")
placement = ldm.Placement.fast(device=args.device)
models = jobs.load_models(brief.model, placement)
makers = [batch.PictureMaker(brief.model, placement, models, args.out / name) for name in ("concepts", "refined")]

# The concepts, and the choice.
concepts = make(entries, makers[0])
scores = [colorfulness(read_picture(path)) for path in concepts]
number = args.choose or scores.index(max(scores)) + 1
chosen, concept = entries[number - 1], concepts[number - 1]

# The refined picture.
controls = (ldm.Control(refine.controlnet, concept, detector=refine.detector),) if refine.controlnet else ()
changes = {name: getattr(refine, name) or getattr(chosen.request, name) for name in ("steps", "width", "height")}
request = replace(chosen.request, source=ldm.Source(concept, refine.strength), controls=controls, **changes)
(refined,) = make([batch.Entry(1, chosen.name, request)], makers[1])

# The finished picture. Content credentials come last: any later change of the file breaks them.
best = args.out / "finished" / refined.name
best.parent.mkdir(exist_ok=True)
texts = read_texts(refined) | {"ldm-finish": json.dumps(asdict(replace(finish, key="")))}
save_png(finished(read_picture(refined), finish), best, texts, overwrite=True)
if finish.certificates:
    credentials.sign(best, finish.certificates, finish.key)

# The sheet. The chosen concept has a golden frame, and the last row is filled with white.
rows = enumerate(zip(concepts, scores, entries, strict=True), 1)
cells = [cell(path, f"{i}. {score:.0f}: {entry.request.prompt}", i == number) for i, (path, score, entry) in rows]
cells += [cell(refined, f"{number}. refined"), cell(best, f"{number}. finished")]
cells += [Image.new("RGB", cells[0].size, "white")] * (-len(cells) % math.ceil(len(cells) ** 0.5))
save_png(grid(cells), args.out / "sheet.png", overwrite=True)
print(best)
