"""`ldm doctor`: what a bug report needs."""

import argparse
import json
from pathlib import Path

import ldm
from ldm.cli.options import Commands, add_options, given


def add(commands: Commands) -> None:
    """Add the command."""
    command = commands.add_parser(
        "doctor", help="show what a bug report needs, and check a picture of the bundled model"
    )
    command.set_defaults(run=_doctor)
    command.add_argument(
        "--weights", type=Path, nargs="+", default=[Path("weights")], metavar="PATH",
        help="files and folders to identify (default: weights)",
    )  # fmt: skip
    add_options(command, ldm.Placement)
    command.add_argument("--json", action="store_true", help="print the report as JSON")


def _doctor(args: argparse.Namespace) -> int:
    """Print the report. The exit code is 1 if the picture is wrong."""
    from ldm.doctor import examine

    report = examine(ldm.Placement.fast(**given(args, ldm.Placement)), args.weights)
    if args.json:
        print(json.dumps(report))
    else:
        for title, section in report.items():
            print(title)
            for name, value in section.items():
                print(f"  {name:<24} {value}")
    return int(report["picture"]["right"] is False)
