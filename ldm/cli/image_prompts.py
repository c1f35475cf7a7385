"""The options of image prompts."""

import argparse

from ldm.cli.repeated import Group
from ldm.image_prompt import ImagePrompt

FLAGS = {"model": "--ip-adapter", "image": "--image-prompt", "encoder": "--image-encoder"}
IMAGE_PROMPTS = Group("image_prompts", ImagePrompt, "image prompt", FLAGS)


def add_image_prompts(command: argparse.ArgumentParser) -> None:
    """Add the options."""
    for field, metavar, text in (
        ("model", "FILE", "an IP-Adapter, a .safetensors file; can be repeated"),
        ("image", "PICTURE", "the picture that this IP-Adapter adds to the prompt"),
        ("encoder", "PATH", "the vision tower of CLIP that reads it, a folder or file"),
    ):
        IMAGE_PROMPTS.add(command, FLAGS[field], field, help=text, metavar=metavar)
    IMAGE_PROMPTS.add_fields(command, "--image-prompt")
