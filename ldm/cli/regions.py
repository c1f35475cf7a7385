"""The options of regional prompts."""

import argparse

from ldm.cli.repeated import Group
from ldm.regions import RegionalPrompt

REGIONS = Group("regions", RegionalPrompt, "region", {"mask": "--region"})


def add_regions(command: argparse.ArgumentParser) -> None:
    """Add the options."""
    text = "a prompt for the white part of MASK, a picture or a box such as left=0,width=0.5; can be repeated"
    REGIONS.add(command, "--region", "mask", "prompt", help=text, nargs=2, metavar=("MASK", "PROMPT"))
    REGIONS.add_fields(command, "--region")
