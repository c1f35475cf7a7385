"""Read dataclasses strictly from TOML files and from plain values, such as those of a JSON file."""

import dataclasses
import sys
import tomllib
import types
import typing
from collections.abc import Container, Mapping
from dataclasses import MISSING
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read the TOML file at `path` as plain values. Raises ValueError if it is not TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error


def from_dict(
    table: dict[str, Any],
    kind: type[T],
    where: str = "",
    *,
    may_lack: Container[str] | None = None,
    names: Mapping[str, type] | None = None,
) -> T:
    """Build the dataclass `kind` from a table of plain values, and the dataclasses in it from the tables in `table`.

    where: the source, for error messages. may_lack: if given, only these fields and those that may be None can be
    missing, also in nested dataclasses. names: the classes that annotations of `kind` name in quotes.
    Raises ValueError for an unknown key (and lists the valid ones), and for a missing required field. Raises it for a
    value of the wrong type or out of its range.
    """
    hints = typing.get_type_hints(kind, localns=dict(names or {}))
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(table) - set(fields))
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(map(short, unknown[:3]))}; valid keys: {', '.join(fields)}")
    needed = {n for n, f in fields.items() if f.default is f.default_factory is MISSING}
    if may_lack is not None:
        needed |= {n for n, hint in hints.items() if n not in may_lack and type(None) not in typing.get_args(hint)}
    if lacking := [n for n in fields if n in needed and n not in table]:
        raise ValueError(f"{where} lacks {', '.join(lacking)}")
    values = {k: _convert(v, hints[k], f"{where}: {k}", may_lack, names) for k, v in table.items()}
    try:
        return kind(**values)
    except ValueError as error:  # inconsistent values
        raise ValueError(f"{where}: {error}") from error


def _convert(
    value: Any, kind: Any, where: str, may_lack: Container[str] | None, names: Mapping[str, type] | None
) -> Any:
    """Convert `value` to the annotation `kind`: a dataclass, mapping, tuple, Literal, union or scalar."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        return from_dict(value, kind, where, may_lack=may_lack, names=names)
    if kind is Any:
        return value
    if origin is Mapping and isinstance(value, dict):
        return {key: _convert(v, args[1], f"{where}: {key}", may_lack, names) for key, v in value.items()}
    if origin is Literal:
        if value in args:
            return value
        raise ValueError(f"{where} must be one of {', '.join(map(repr, args))}, got {short(value)}")
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(v, args[0], where, may_lack, names) for v in value)
    if origin in (typing.Union, types.UnionType):  # X | None, or X | tuple; TOML has no null
        if value is None and type(None) in args:
            return None
        listed = isinstance(value, list | tuple) and typing.get_origin(args[1]) is tuple
        return _convert(value, args[1 if listed else 0], where, may_lack, names)
    if kind is float:
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:  # false for NaN
            return float(value)
    elif isinstance(kind, type) and type(value) is kind:
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise ValueError(f"{where} must be {getattr(kind, '__name__', kind)}, got {short(value)}")
