"""The options for what happens to a finished picture before it is written."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ldm.pictures import save_png
from ldm.pipeline import Pipeline
from ldm.request import Request

if TYPE_CHECKING:
    from ldm.safety.watermark import Method


def add_finishing(command: argparse.ArgumentParser) -> None:
    """Add the options."""
    command.add_argument(
        "--watermark",
        metavar="TEXT",
        help="write TEXT into the colors of each picture, invisibly; sdxl stands for the official mark of SDXL",
    )
    command.add_argument(
        "--watermark-method",
        choices=("dwtDctSvd", "dwtDct"),
        help="dwtDct is that of the official scripts, which most JPEG files lose (default: dwtDctSvd)",
    )


@dataclass(frozen=True)
class Finishing:
    """What happens to each picture: it gets the watermark, and is written."""

    watermark: str | None = None
    method: "Method" = "dwtDctSvd"

    def check(self, pipe: Pipeline, request: Request) -> None:
        """Raise ValueError if the watermark does not fit into the pictures of `request`."""
        if self.watermark is not None:
            from ldm.safety.watermark import check_size, message_bits

            plan = pipe.plan(request)
            check_size(plan.width, plan.height, len(message_bits(self.watermark)))

    def write(self, picture: Image.Image, path: Path, texts: Mapping[str, str], *, overwrite: bool) -> None:
        """Finish a picture and write it, as `save_png` does."""
        if self.watermark is not None:
            from ldm.safety import watermark

            picture = watermark.write(picture, self.watermark, self.method)
            if texts:  # none with --no-metadata
                way = {"message": self.watermark, "method": self.method}
                texts = {**texts, "ldm-watermark": json.dumps(way)}
        save_png(picture, path, texts, overwrite=overwrite)


def read_finishing(args: argparse.Namespace) -> Finishing:
    """Read the options. Raises ValueError for those that are wrong or do not fit together."""
    if args.watermark is None:
        if args.watermark_method is not None:
            raise ValueError("--watermark-method is for a watermark: add --watermark TEXT")
        return Finishing()
    from ldm.safety.watermark import message_bits

    message_bits(args.watermark)
    return Finishing(args.watermark, args.watermark_method or Finishing.method)
