"""`ldm watermark detect`: whether a picture carries an invisible watermark."""

import argparse
import json
from typing import get_args

from ldm.cli.options import Commands
from ldm.pictures import read_picture


def add(commands: Commands) -> None:
    """Add the command."""
    command = commands.add_parser("watermark", help="find invisible watermarks")
    actions = command.add_subparsers(metavar="ACTION", required=True)
    detect = actions.add_parser("detect", help="compare the bits in a picture with those of a message")
    detect.set_defaults(run=_detect)
    detect.add_argument("picture", metavar="PICTURE", help="a picture in the size in which it was marked")
    detect.add_argument(
        "--watermark",
        nargs="+",
        metavar="TEXT",
        help="the messages to look for (default: those of the official scripts: sdxl, StableDiffusionV1, SDV2)",
    )
    detect.add_argument("--json", action="store_true", help="print the results as JSON")


def _detect(args: argparse.Namespace) -> None:
    """Print how well each message matches, for both methods."""
    from ldm.safety.watermark import KNOWN, Method, capacity, detect, message_bits

    picture = read_picture(args.picture)
    fitting = [known for known in KNOWN if len(message_bits(known)) <= capacity(*picture.size)]
    messages = args.watermark or fitting or KNOWN
    found = [detect(picture, message, method) for message in messages for method in get_args(Method)]
    if args.json:
        results = [
            {
                "message": each.message,
                "method": each.method,
                "bits": "".join(str(int(bit)) for bit in each.bits),
                "matched": each.matched,
                "share": each.share,
                "p_value": each.p_value,
                "found": each.found,
            }
            for each in found
        ]
        print(json.dumps(results))
        return
    for each in found:
        verdict = "found" if each.found else "not found"
        print(
            f"{verdict:9}  {each.method:9}  {each.matched} of {len(each.bits)} bits match, "
            f"p-value {each.p_value:.2g}: {each.message}"
        )
