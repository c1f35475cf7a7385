"""The options of regional prompts, which can be repeated: each --region begins the next one."""

import argparse
import dataclasses
from typing import Any

from ldm.regions import RegionalPrompt


class _Option(argparse.Action):
    """Add a region, or change the weight of the last one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        regions: list[RegionalPrompt] = [*(namespace.regions or [])]
        if isinstance(values, list):
            regions.append(RegionalPrompt(*values))
        elif regions:
            regions[-1] = dataclasses.replace(regions[-1], weight=values)
        else:
            raise ValueError('--region-weight follows the --region MASK "PROMPT" that it is for')
        namespace.regions = regions


def add_regions(command: argparse.ArgumentParser) -> None:
    """Add the options."""
    command.add_argument(
        "--region",
        dest="regions",
        nargs=2,
        action=_Option,
        metavar=("MASK", "PROMPT"),
        help="a prompt for the white part of MASK, a picture or a box such as left=0,width=0.5; can be repeated",
    )
    (weight,) = (field for field in dataclasses.fields(RegionalPrompt) if "help" in field.metadata)
    text = f"{weight.metadata['help']} (default: {weight.default})"
    command.add_argument("--region-weight", dest="regions", type=float, action=_Option, metavar="NUMBER", help=text)
