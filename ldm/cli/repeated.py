"""Groups of options that can be repeated: the first option of a group begins the next part of the request.

ldm txt2img "a house" --controlnet edges --control a.png --controlnet depth --control b.png
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Part = TypeVar("Part")


@dataclass(frozen=True)
class Group(Generic[Part]):
    """The options of one kind of part, such as a ControlNet with its picture and its weight."""

    dest: str  # the field of `Request` that holds the parts
    kind: type[Part]
    name: str  # of one part, for messages
    needed: Mapping[str, str]  # the fields without a default, with their options; the first option begins a part

    def add(self, command: argparse.ArgumentParser, flag: str, *fields: str, **more: Any) -> None:
        """Add an option for a field of the part, or for as many fields as it takes values."""
        command.add_argument(flag, dest=self.dest, action=_Store, const=(self, fields), **more)

    def add_fields(self, command: argparse.ArgumentParser, prefix: str) -> None:
        """Add an option for each field that has a help text, see `ldm.config.option`: a number, or a switch."""
        for field in dataclasses.fields(self.kind):  # type: ignore[arg-type]
            if "help" in field.metadata:
                flag = field.metadata["flag"] or f"{prefix}-{field.name}"
                text = f"{field.metadata['help']} (default: {field.default})"
                kind: dict[str, Any] = {"nargs": 0} if field.type is bool else {"type": float, "metavar": "NUMBER"}
                self.add(command, flag, field.name, help=text, **kind)

    def read(self, given: Sequence[dict[str, Any]] | None, recorded: Sequence[Part]) -> tuple[Part, ...] | None:
        """Return the parts that the arguments ask for, None if they name none.

        given: the values of each part. recorded: the parts of the picture in --from. Options that do not begin a part
        change the only one of them.
        Raises ValueError for a part that lacks something, and for options without a part.
        """
        if given is None:
            return None
        first, flag = next(iter(self.needed.items()))
        if first not in given[0]:
            if len(given) > 1 or len(recorded) != 1:
                raise ValueError(f"the options of one {self.name} follow the {flag} that they are for")
            return (dataclasses.replace(recorded[0], **given[0]),)  # type: ignore[type-var]
        for each in given:
            if lacking := [option for field, option in self.needed.items() if field not in each]:
                raise ValueError(f"{flag} {each[first]} is not complete: add {' and '.join(lacking)}")
        return tuple(self.kind(**each) for each in given)


class _Store(argparse.Action):
    """Store the values of an option in the last part; the option of the first needed field begins a part."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        group, fields = self.const
        first, flag = next(iter(group.needed.items()))
        parts: list[dict[str, Any]] = [*(getattr(namespace, self.dest) or [])]
        if fields[0] == first or not parts:
            parts.append({})
        if fields[0] in parts[-1]:
            raise ValueError(f"{option_string} is given twice for one {group.name}: name each with {flag} first")
        if self.nargs == 0:
            values = [True]
        parts[-1] |= dict(zip(fields, values if isinstance(values, list) else [values], strict=True))
        setattr(namespace, self.dest, parts)
