"""`ldm lora`: merge, extract, resize and inspect LoRA files."""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from ldm.checkpoint.tensors import some
from ldm.cli.merging import progress
from ldm.cli.options import Commands, add_layout, add_options, add_output, given
from ldm.loading import locate
from ldm.models.low_rank import Cut
from ldm.placement.choice import find_device
from ldm.placement.memory import Placement


def add(commands: Commands) -> None:
    """Add the command with its four subcommands."""
    group = commands.add_parser("lora", help="merge, extract, resize and inspect LoRAs")
    tools = group.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = tools.add_parser("merge", help="write LoRAs as one LoRA, or with --into merge them into a model")
    command.set_defaults(run=_merge)
    command.add_argument("lora", nargs="+", metavar="LORA", help="FILE or FILE:WEIGHT, as of --lora")
    command.add_argument("target", metavar="OUT", type=Path, help="the file or folder to write")
    command.add_argument("--into", metavar="MODEL", help="write this model with the LoRAs in its weights")
    _add_model(command)
    add_layout(command, required=False)
    add_output(command)

    command = tools.add_parser("extract", help="write the difference of two models as a LoRA")
    command.set_defaults(run=_extract)
    command.add_argument("tuned", metavar="TUNED", help="a folder or .safetensors file")
    command.add_argument("base", metavar="BASE", help="the model that it was trained from")
    command.add_argument("target", metavar="OUT", type=Path, help="the .safetensors file to write")
    command.add_argument("--convolutions", action="store_true", help="also for the layers between the transformers")
    _add_cut(command)

    command = tools.add_parser("resize", help="write a LoRA with other ranks; LoHa and LoKr become LoRA")
    command.set_defaults(run=_resize)
    command.add_argument("lora", metavar="LORA", help="a .safetensors file, or a folder of diffusers or PEFT")
    command.add_argument("target", metavar="OUT", type=Path, help="the .safetensors file to write")
    _add_model(command)
    _add_cut(command)

    command = tools.add_parser("inspect", help="show what a LoRA changes, and by how much")
    command.set_defaults(run=_inspect)
    command.add_argument("lora", metavar="LORA", help="a .safetensors file, or a folder of diffusers or PEFT")
    _add_model(command)
    command.add_argument("--json", action="store_true", help="print the report as JSON")


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", help="the model that the LoRA is for, if that is no official one")


def _add_cut(command: argparse.ArgumentParser) -> None:
    add_options(command, Cut)
    add_options(command, Placement, ["device"])
    add_output(command)


def _merge(args: argparse.Namespace) -> None:
    """Write the LoRA or the model, and print what was applied and where."""
    from ldm.lora_tools import merge_loras
    from ldm.merging import merge_into

    given_as: dict[str, Any] = {"dtype": Placement(dtype=args.dtype).dtype, "overwrite": args.overwrite}
    if args.into is None:
        if args.layout is not None:
            raise ValueError("--layout is that of a model: add --into MODEL, or leave it out to write one LoRA")
        written, applied = merge_loras(args.lora, args.target, model=_model(args), **given_as)
        _print(args, [*(each._replace(words=()) for each in applied), written], written._asdict())
        return
    if args.layout is None or args.model is not None:
        raise ValueError("--into needs --layout, and no --model: the LoRAs are for the model that they go into")
    into = locate(args.into)
    applied = merge_into(into, args.lora, args.target, layout=args.layout, watch=progress, **given_as)
    left = [f"left out the learned words {some(each.words)} of {each.lora.path}" for each in applied if each.words]
    lines = [*(each._replace(words=()) for each in applied), *left, args.target]
    _print(args, lines, {"path": args.target, "left_out": [word for each in applied for word in each.words]})


def _extract(args: argparse.Namespace) -> None:
    """Write the LoRA, and print its description."""
    from ldm.lora_tools import extract

    written = extract(
        locate(args.tuned),
        locate(args.base),
        args.target,
        Cut(**given(args, Cut)),
        convolutions=args.convolutions,
        dtype=Placement(dtype=args.dtype).dtype,
        overwrite=args.overwrite,
        device=find_device(args.device),
        watch=progress,
    )
    _print(args, [written], written._asdict())


def _resize(args: argparse.Namespace) -> None:
    """Write the LoRA, and print its description."""
    from ldm.lora_tools import resize

    written = resize(
        args.lora,
        args.target,
        Cut(**given(args, Cut)),
        model=_model(args),
        dtype=Placement(dtype=args.dtype).dtype,
        overwrite=args.overwrite,
        device=find_device(args.device),
        watch=partial(progress, unit="module"),
    )
    _print(args, [written], written._asdict())


def _inspect(args: argparse.Namespace) -> None:
    """Print what the LoRA holds."""
    from ldm.cli.inspect_lora import inspect_lora

    report = inspect_lora(args.lora, _model(args))
    print(json.dumps(report.as_dict()) if args.json else report)


def _model(args: argparse.Namespace) -> Path | None:
    return None if args.model is None else locate(args.model)


def _print(args: argparse.Namespace, lines: list[object], results: dict[str, Any]) -> None:
    print(json.dumps(results, default=str) if args.json else "\n".join(map(str, lines)))
