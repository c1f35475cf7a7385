"""The options of ControlNets."""

import argparse
from collections.abc import Sequence

from ldm.cli.repeated import Group
from ldm.control import Control

CANNY = "canny:"
CONTROLS = Group("controls", Control, "ControlNet", {"model": "--controlnet", "image": "--control"})


def add_controls(command: argparse.ArgumentParser) -> None:
    """Add the options."""
    text = "a ControlNet: a folder or .safetensors file; can be repeated"
    CONTROLS.add(command, "--controlnet", "model", help=text, metavar="FILE")
    text = "the picture for this ControlNet; canny:PICTURE takes its edges"
    CONTROLS.add(command, "--control", "image", help=text, metavar="PICTURE")
    CONTROLS.add_fields(command, "--control")


def read_controls(args: argparse.Namespace, recorded: Sequence[Control]) -> tuple[Control, ...] | None:
    """Return the ControlNets that the arguments ask for, as `Group.read` does."""
    for each in args.controls or ():
        if "image" in each:
            edges = each["image"].startswith(CANNY)
            each |= {"image": each["image"].removeprefix(CANNY), "detector": "canny" if edges else None}
    return CONTROLS.read(args.controls, recorded)
