"""`ldm inspect` and `ldm convert`: what a file holds, and the same model in another layout or dtype."""

import argparse
import json
from pathlib import Path

from ldm.checkpoint import files
from ldm.cli.inspect import inspect
from ldm.cli.options import Commands, add_layout, add_options, add_output, given
from ldm.loading import locate
from ldm.placement.memory import Placement
from ldm.record import MODEL_AND_PARTS, ModelChoice


def add(commands: Commands) -> None:
    """Add both commands."""
    command = commands.add_parser("inspect", help="show what a file or folder holds")
    command.set_defaults(run=_inspect)
    command.add_argument("file", metavar="FILE", help="a file or folder; only headers and configs are read")
    command.add_argument("--check-sha256", action="store_true", help="read the whole file, and look it up by sha256")
    add_options(command, ModelChoice, ["prediction"])
    command.add_argument("--json", action="store_true", help="print the report as JSON")

    command = commands.add_parser("convert", help="write a model in another layout or dtype")
    command.set_defaults(run=_convert)
    command.add_argument("model", metavar="IN", help="a folder, a .safetensors file or a pickle")
    command.add_argument("target", metavar="OUT", type=Path, help="the file or folder to write")
    add_layout(command, required=True)
    add_options(command, ModelChoice, MODEL_AND_PARTS[1:])
    add_output(command)


def _inspect(args: argparse.Namespace) -> None:
    """Print what the file holds."""
    path = locate(args.file)
    report = inspect(path, prediction=args.prediction, check_sha256=args.check_sha256)
    print(json.dumps(report.as_dict()) if args.json else report)


def _convert(args: argparse.Namespace) -> None:
    """Write the model, and print its path and the number of tensors that were left out."""
    choice = ModelChoice(args.model, **given(args, ModelChoice, MODEL_AND_PARTS[1:]))
    parts = choice.paths
    left_out = files.convert(
        parts.pop("model"),
        args.target,
        layout=args.layout,
        dtype=Placement(dtype=args.dtype).dtype,
        prediction=choice.prediction,
        ema=choice.ema,
        replace=parts,
        overwrite=args.overwrite,
    )
    if args.json:
        print(json.dumps({"file": str(args.target), "left_out": left_out}))
        return
    print(args.target)
    if left_out:
        print(f"left out {len(left_out)} tensors that no network uses; --json names them")
