"""LoRAs in prompts: `<lora:name:0.8>` stands for the file `name.safetensors` in the folder of --lora-dir."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoint.tensors import some

_TAG = re.compile(r"\s*<lora:([^<>:]+)(?::([^<>]*))?>")


def add_loras(command: argparse.ArgumentParser) -> None:
    """Add the option of the folder."""
    command.add_argument(
        "--lora-dir", type=Path, metavar="FOLDER", help="where <lora:NAME:WEIGHT> in the prompt finds NAME.safetensors"
    )


def read_loras(args: argparse.Namespace, asked: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Take the LoRAs out of the prompts in `asked`. Returns the prompts without them, and the LoRAs as FILE:WEIGHT.

    Raises ValueError for a name without a file or with two, and for prompts of one request that name other LoRAs.
    """
    prompt = asked.get("prompt", ())
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    others = [asked.get("negative_prompt") or "", *(region.prompt for region in asked.get("regions", ()))]
    if tag := next((tag for text in others if (tag := _TAG.search(text))), None):
        raise ValueError(f"{tag[0].strip()} acts on the whole picture: write it into the prompt")
    tags = [_TAG.findall(text) for text in texts]
    if not any(tags):
        return {}, ()
    if any(each != tags[0] for each in tags):
        raise ValueError("the pictures of one run share their LoRAs: write the same <lora:...> into all prompts")
    if args.lora_dir is None:
        raise ValueError(f"the prompt names the LoRA {tags[0][0][0]!r}: add --lora-dir with the folder of its file")
    if not args.lora_dir.is_dir():
        raise ValueError(f"--lora-dir {args.lora_dir} is not a folder")
    files = sorted(args.lora_dir.rglob("*.safetensors"))
    words = tuple(f"{_find(name.strip(), files, args.lora_dir)}:{_weight(name, word)}" for name, word in tags[0])
    without = [_TAG.sub("", text).strip() for text in texts]
    return {"prompt": without[0] if isinstance(prompt, str) else tuple(without)}, words


def _find(name: str, files: list[Path], folder: Path) -> Path:
    found = [file for file in files if file.stem == name]
    if len(found) != 1:
        held = some([str(file) for file in found]) or f"only {some([file.stem for file in files]) or 'no LoRA'}"
        raise ValueError(f"the prompt names the LoRA {name!r}, and {folder} holds {held}: correct the name or folder")
    return found[0]


def _weight(name: str, word: str) -> float:
    try:
        return float(word or 1)
    except ValueError:
        raise ValueError(f"the weight of <lora:{name}:{word}> must be one number, such as 0.8") from None
