"""The options of image prompts, which can be repeated: each --ip-adapter begins the next one."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from ldm.cli.controls import Repeated
from ldm.image_prompt import ImagePrompt

FLAGS = {"model": "--ip-adapter", "image": "--image-prompt", "encoder": "--image-encoder"}


def add_image_prompts(command: argparse.ArgumentParser) -> None:
    """Add the options."""

    def add(flag: str, name: str, text: str, **more: Any) -> None:
        command.add_argument(flag, dest="image_prompts", action=Repeated, const=name, help=text, **more)

    add(FLAGS["model"], "model", "an IP-Adapter, a .safetensors file; can be repeated", metavar="FILE")
    add(FLAGS["image"], "image", "the picture that this IP-Adapter adds to the prompt", metavar="PICTURE")
    add(FLAGS["encoder"], "encoder", "the vision tower of CLIP that reads it, a folder or file", metavar="PATH")
    weight = next(field for field in dataclasses.fields(ImagePrompt) if field.name == "weight")
    text = f"{weight.metadata['help']} (default: {weight.default})"
    add("--image-prompt-weight", "weight", text, type=float, metavar="NUMBER")


def read_image_prompts(
    args: argparse.Namespace, recorded: Sequence[ImagePrompt] = ()
) -> tuple[ImagePrompt, ...] | None:
    """Return the image prompts that the arguments ask for, None if they name none.

    recorded: those of the picture in --from. Options without --ip-adapter change the only one of them.
    Raises ValueError for an image prompt that lacks its IP-Adapter, its picture or its encoder.
    """
    given = args.image_prompts
    if given is None:
        return None
    if "model" not in given[0]:
        if len(given) > 1 or len(recorded) != 1:
            raise ValueError("the options --image-prompt, --image-... follow the --ip-adapter FILE that they are for")
        return (dataclasses.replace(recorded[0], **given[0]),)
    for each in given:
        if lacking := [flag for name, flag in FLAGS.items() if name not in each]:
            raise ValueError(
                f"--ip-adapter {each['model']} needs a picture and an encoder: add {' and '.join(lacking)}"
            )
    return tuple(ImagePrompt(**each) for each in given)
