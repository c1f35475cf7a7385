"""`ldm merge`: a weighted sum of two models, or one model plus the difference of two others."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar, get_args

from tqdm import tqdm

from ldm.cli.options import Commands, pair
from ldm.config import Layout
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
    add_output(command, required=True)


def add_output(command: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the options of the file or folder that is written."""
    command.add_argument(
        "--layout",
        choices=get_args(Layout),
        required=required,
        help="of a model: ldm, one official .safetensors file, or diffusers, a folder",
    )
    command.add_argument("--dtype", help="dtype of all tensors (default: as in the input)")
    command.add_argument("--overwrite", action="store_true", help="replace a file or model that exists, but no input")
    command.add_argument("--json", action="store_true", help="print the results as JSON")


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
