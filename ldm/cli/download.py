"""`ldm download`: fetch an official model file, with its size, license and sha256 shown first."""

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from ldm.cli.options import Commands
from ldm.download import HOST, PUBLISHED, download


def add(commands: Commands) -> None:
    """Add the command."""
    command = commands.add_parser("download", help="fetch an official model file from the Hugging Face Hub")
    command.set_defaults(run=_download)
    command.add_argument("name", nargs="?", choices=PUBLISHED, help="the model (default: list them all)")
    command.add_argument("folder", nargs="?", type=Path, default=Path("weights"), help="(default: weights)")
    command.add_argument("--host", default=HOST, metavar="URL", help=f"the address of a mirror (default: {HOST})")


def _download(args: argparse.Namespace) -> None:
    """Show size, license and sha256, fetch the file, and print its path. Without a name, list the models."""
    if args.name is None:
        for name, each in PUBLISHED.items():
            print(f"{name:14} {each.size / 1e9:4.1f} GB  {each.license:24}  {each.repository}")
        return
    published = PUBLISHED[args.name]
    print(
        f"ldm: {published.file} of {published.repository}: {published.size:,} bytes, license {published.license}, "
        f"sha256 {published.sha256}",
        file=sys.stderr,
    )
    with tqdm(total=published.size, unit="B", unit_scale=True, disable=None) as bar:
        print(download(published, args.folder, host=args.host, token=os.environ.get("HF_TOKEN"), watch=bar.update))
