"""`ldm merge`: a weighted sum of two models, or one model plus the difference of two others."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from ldm.cli.options import Commands, add_layout, add_output, pair
from ldm.loading import locate
from ldm.placement.memory import Placement

T = TypeVar("T")


def add(commands: Commands) -> None:
    """Add the command."""
    command = commands.add_parser("merge", help="write the weighted sum of two models, or add a difference to one")
    command.set_defaults(run=_merge)
    command.add_argument("model", metavar="A", help="a folder or .safetensors file")
    command.add_argument("other", metavar="B", help="a model of the same family")
    command.add_argument("target", metavar="OUT", type=Path, help="the file or folder to write")
    command.add_argument("--minus", metavar="C", help="write A + w (B - C) instead of (1 - w) A + w B")
    command.add_argument("--weight", type=float, default=0.5, metavar="W", help="w, for all parts (default: 0.5)")
    command.add_argument(
        "--blocks",
        type=pair,
        nargs="+",
        default=[],
        metavar="NAME=W",
        help="another w for vae, text_encoder, text_encoder_2 or modules of the UNet such as down, mid and up.3",
    )
    add_layout(command, required=True)
    add_output(command)


def progress(items: list[T], unit: str = "tensor") -> Iterable[T]:
    """Return `items` with a progress bar on stderr."""
    return tqdm(items, unit=unit, disable=None, file=sys.stderr)


def _merge(args: argparse.Namespace) -> None:
    """Write the model, and print its path."""
    from ldm.merging import merge

    merge(
        locate(args.model),
        locate(args.other),
        args.target,
        minus=None if args.minus is None else locate(args.minus),
        weight=args.weight,
        blocks=dict(args.blocks),
        layout=args.layout,
        dtype=Placement(dtype=args.dtype).dtype,
        overwrite=args.overwrite,
        watch=progress,
    )
    print(json.dumps({"file": str(args.target)}) if args.json else args.target)
