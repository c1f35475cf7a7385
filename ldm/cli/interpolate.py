"""`ldm interpolate`: an animation, or a grid, of the pictures on the way from one prompt or seed to another."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tqdm import tqdm

import ldm
from ldm.cli.audit import add_audit, start_audit
from ldm.cli.finishing import add_watermark, read_watermark
from ldm.cli.generate import load_models
from ldm.cli.options import Commands, add_options, given
from ldm.cli.stats import add_stats, check_stats, measuring, report_stats
from ldm.geometry import grid
from ldm.jobs import timed
from ldm.outputs import Outputs
from ldm.pictures import save_animation, save_png
from ldm.record import MODEL_AND_PARTS, ModelChoice, digest, remember
from ldm.request import Request
from ldm.sizes import Sizes
from ldm.variations import between

CHOSEN = (*MODEL_AND_PARTS, "loras", "embeddings")
ASKED = {field.name for field in dataclasses.fields(Request)} - {"seed", "images"}


def add(commands: Commands) -> None:
    """Add the command."""
    command = commands.add_parser("interpolate", help="make an animation from one prompt or seed to another")
    command.set_defaults(run=_interpolate)
    command.add_argument(
        "--prompts", nargs="+", required=True, metavar="PROMPT", help="one prompt, or one for each keyframe"
    )
    command.add_argument(
        "--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="one seed, or one for each keyframe"
    )
    command.add_argument("--frames", type=int, default=16, help="number of pictures (default: 16)")
    command.add_argument("--fps", type=float, default=8.0, help="pictures per second (default: 8)")
    command.add_argument("--grid", action="store_true", help="a PNG with all the pictures, not an animation")
    add_options(command, ModelChoice, CHOSEN)
    add_options(command, Request, ASKED)
    add_options(command, Sizes)
    add_options(command, ldm.Placement)
    add_watermark(command)
    add_stats(command)
    add_audit(command)
    command.add_argument("--out", type=Path, help="the file to write: an animated .png, or .webp (default: out.png)")
    command.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    command.add_argument("--no-metadata", action="store_true", help="do not write into a PNG how it was made")
    command.add_argument("--json", action="store_true", help="print the results as JSON")


def _interpolate(args: argparse.Namespace) -> None:
    """Make the pictures, write the file, and print its path."""
    if not 0.1 <= args.fps <= 100:
        raise ValueError(f"--fps must be from 0.1 to 100, got {args.fps}")
    sizes = given(args, Sizes)
    request = Request(args.prompts[0], **given(args, Request, ASKED), sizes=Sizes(**sizes) if sizes else None)
    requests = between(request, args.prompts, args.seeds, args.frames)
    write: Callable[..., None] = save_png if args.grid else partial(save_animation, seconds=1 / args.fps)
    endings = (".png",) if args.grid else (".png", ".webp")
    outputs = Outputs(args.out, 1, args.overwrite, not args.no_metadata, write, endings)
    outputs.check()
    check_stats(args)
    finishing = read_watermark(args)
    asked = dataclasses.replace(requests[0], prompt=tuple(args.prompts), images=len(args.prompts))  # all prompts
    finish_audit = start_audit(args, asked)
    choice = ModelChoice(**given(args, ModelChoice, CHOSEN))
    models = load_models(choice, ldm.Placement.fast(**given(args, ldm.Placement)))
    pipe, seconds = models.base, {"save": 0.0}
    finishing.check(pipe, requests[0])
    with measuring(args, models) as stats:
        pictures = [pipe.generate(each)[0] for each in tqdm(requests, unit="picture", disable=None)]
    marked = [finishing.mark(picture) for picture in ([grid(pictures)] if args.grid else pictures)]
    sha256 = {name: digest(path) for name, path in choice.paths.items()}
    record = remember(pipe.plan(requests[0]), choice, pipe, sha256)
    way = {"prompts": args.prompts, "seeds": args.seeds, "frames": args.frames}
    texts = record.texts(0) | {"ldm-interpolate": json.dumps(way)} | finishing.mark_texts
    with timed("save", seconds):
        file = outputs.save(0, marked[0] if args.grid else marked, texts)
    finish_audit([file], record.as_dict() | {"seeds": args.seeds, "frames": args.frames})
    results = {"file": str(file), **way, **report_stats(args, stats, seconds["save"], 1)}
    print(json.dumps(results) if args.json else file)
