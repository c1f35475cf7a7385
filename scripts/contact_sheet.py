"""Make one picture per line of a text file, on one sheet. The first picture of the README was made with it.

python scripts/contact_sheet.py docs/tiny.txt --out sheet.png
"""

import argparse
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import ldm
from ldm.geometry import grid
from ldm.pictures import save_png

parser = argparse.ArgumentParser(description="Make a sheet of pictures from a file of prompts.")
parser.add_argument("prompts", type=Path, help="a text file with one prompt a line")
parser.add_argument("--model", default="weights/tiny")
parser.add_argument("--steps", type=int, help="default: the model's own")
parser.add_argument("--seed", default=0, type=int, help="seed of the first picture; it rises by 1 for each picture")
parser.add_argument("--zoom", default=1, type=int, help="enlarge the sheet by this factor")
parser.add_argument("--out", default="sheet.png", type=Path)
parser.add_argument("--overwrite", action="store_true")
args = parser.parse_args()

pipe = ldm.load(args.model)
prompts = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
pictures: list[Image.Image] = []
for i, prompt in enumerate(tqdm(prompts, unit="picture", disable=None)):
    pictures += pipe.generate(ldm.Request(prompt, steps=args.steps, seed=args.seed + i))
sheet = grid(pictures)
sheet = sheet.resize((sheet.width * args.zoom, sheet.height * args.zoom), Image.Resampling.NEAREST)
save_png(sheet, args.out, overwrite=args.overwrite)
