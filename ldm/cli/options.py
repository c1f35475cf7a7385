"""The options of the commands, generated from the fields of dataclasses."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeAlias, get_args, get_origin

from ldm.config import Layout

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_options(parser: argparse.ArgumentParser, kind: type, only: Collection[str] | None = None) -> None:
    """Add a flag for each option field of the dataclass `kind`, see `ldm.config.option`.

    only: the names of the fields to use (default: all). A flag that is not given has the value None; `given` leaves it
    out, so that the field keeps its default.
    """
    for field in _options(kind, only):
        flag = field.metadata["flag"] or f"--{field.name.replace('_', '-')}"
        hint, text = _without_none(field.type), field.metadata["help"]
        if field.default not in (None, (), dataclasses.MISSING) and hint is not bool:
            text += f" (default: {field.default})"
        if get_origin(hint) is Literal:
            text += f"; one of {', '.join(get_args(hint))}"
        metavar: str | tuple[str, ...] = flag[2:].upper()
        if hint is bool:
            parser.add_argument(flag, dest=field.name, action=argparse.BooleanOptionalAction, help=text)
        elif hint == tuple[str, ...]:
            parser.add_argument(flag, dest=field.name, action="append", metavar="FILE", help=text)
        elif get_origin(hint) is tuple:
            parser.add_argument(flag, dest=field.name, type=float, nargs=2, metavar=("LOW", "HIGH"), help=text)
        elif get_origin(hint) is Mapping:
            parser.add_argument(flag, dest=field.name, type=pair, nargs="+", metavar="NAME=NUMBER", help=text)
        else:
            read = hint if hint in (int, float) else str
            parser.add_argument(flag, dest=field.name, type=read, metavar=metavar, help=text)


def given(args: argparse.Namespace, kind: type, only: Collection[str] | None = None) -> dict[str, Any]:
    """Return the fields of `kind` whose flags were given, with their values."""
    values = {field.name: getattr(args, field.name, None) for field in _options(kind, only)}
    return {
        name: (dict(value) if isinstance(value[0], tuple) else tuple(value)) if isinstance(value, list) else value
        for name, value in values.items()
        if value is not None
    }


def add_layout(command: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the option for the layout of a model that is written."""
    command.add_argument(
        "--layout",
        choices=get_args(Layout),
        required=required,
        help="of a model: ldm, one official .safetensors file, or diffusers, a folder",
    )


def add_output(command: argparse.ArgumentParser) -> None:
    """Add the options of commands that write weights."""
    command.add_argument("--dtype", help="dtype of all tensors (default: as in the input)")
    command.add_argument("--overwrite", action="store_true", help="replace a file or model that exists")
    command.add_argument("--json", action="store_true", help="print the results as JSON")


def _options(kind: type, only: Collection[str] | None) -> list["dataclasses.Field[Any]"]:
    fields = [field for field in dataclasses.fields(kind) if "help" in field.metadata]
    return [field for field in fields if only is None or field.name in only]


def _without_none(hint: Any) -> Any:
    """Return the first alternative of an annotation such as `int | None`."""
    return get_args(hint)[0] if get_origin(hint) in (typing.Union, types.UnionType) else hint


def pair(word: str) -> tuple[str, float]:
    """Read NAME=NUMBER."""
    name, _, number = word.partition("=")
    try:
        return name, float(number)
    except ValueError:
        wanted = "give NAME=NUMBER such as eta=0.5, and the prompt before this option"
        raise argparse.ArgumentTypeError(f"{wanted}, got {word!r}") from None
