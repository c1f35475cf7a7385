"""The options of ControlNets, which can be repeated: each --controlnet begins the next one."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from ldm.control import Control

CANNY = "canny:"
NAMES = {"controls": ("ControlNet", "--controlnet"), "image_prompts": ("image prompt", "--ip-adapter")}


class Repeated(argparse.Action):
    """Store the value in the last dictionary of a list; the option of the name "model" begins a dictionary."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the value."""
        parts: list[dict[str, Any]] = [*(getattr(namespace, self.dest) or [])]
        name = str(self.const)
        if name == "model" or not parts:
            parts.append({})
        if name in parts[-1]:
            what, first = NAMES[self.dest]
            raise ValueError(f"{option_string} is given twice for one {what}: name each with {first} first")
        parts[-1][name] = True if self.nargs == 0 else values
        setattr(namespace, self.dest, parts)


def add_controls(command: argparse.ArgumentParser) -> None:
    """Add the options."""

    def add(flag: str, name: str, text: str, **more: Any) -> None:
        command.add_argument(flag, dest="controls", action=Repeated, const=name, help=text, **more)

    add("--controlnet", "model", "a ControlNet: a folder or .safetensors file; can be repeated", metavar="FILE")
    add("--control", "image", "the picture for this ControlNet; canny:PICTURE takes its edges", metavar="PICTURE")
    for field in dataclasses.fields(Control):
        if "help" in field.metadata:
            flag = field.metadata["flag"] or f"--control-{field.name}"
            text = f"{field.metadata['help']} (default: {field.default})"
            kind: dict[str, Any] = {"nargs": 0} if field.type is bool else {"type": float, "metavar": "NUMBER"}
            add(flag, field.name, text, **kind)


def read_controls(args: argparse.Namespace, recorded: Sequence[Control] = ()) -> tuple[Control, ...] | None:
    """Return the ControlNets that the arguments ask for, None if they name none.

    recorded: those of the picture in --from. Options without --controlnet change the only one of them.
    Raises ValueError for a ControlNet without a picture, and for options without a ControlNet.
    """
    if args.controls is None:
        return None
    given = [_with_detector(each) for each in args.controls]
    if "model" not in given[0]:
        if len(given) > 1 or len(recorded) != 1:
            raise ValueError("the options --control and --control-... follow the --controlnet FILE that they are for")
        return (dataclasses.replace(recorded[0], **given[0]),)
    for each in given:
        if "image" not in each:
            raise ValueError(f"--controlnet {each['model']} needs a picture: add --control PICTURE")
    return tuple(Control(**each) for each in given)


def _with_detector(given: dict[str, Any]) -> dict[str, Any]:
    image = given.get("image")
    if image is None:
        return given
    edges = image.startswith(CANNY)
    return given | {"image": image.removeprefix(CANNY), "detector": "canny" if edges else None}
