"""Key maps: rules that rename our parameters, written in one direction and applied to the keys a model really has.

A rule renames a dotted prefix; what follows it is renamed by the rules `inside`, or stays. The inverse map is
the inverted dictionary, so the two directions cannot drift apart.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from torch import Size, Tensor


class Form(Enum):
    """How the other side holds a value."""

    SAME = "same"
    PIXELS = "pixels"  # our Linear is a 1x1 convolution there
    TRANSPOSED = "transposed"  # our Linear is a matrix there that is multiplied from the right

    def store(self, value: Tensor) -> Tensor:
        """Return our value as the other side holds it."""
        if self is Form.PIXELS and value.dim() == 2:
            return value[..., None, None]
        return value.T if self is Form.TRANSPOSED else value

    def restore(self, value: Tensor, shape: Size) -> Tensor:
        """Return a value of the other side in our shape. Some tools save a 1x1 convolution as a matrix."""
        return (value.T if self is Form.TRANSPOSED else value).reshape(shape)


class Piece(NamedTuple):
    """Which of how many equal parts, along the first dimension, of a stored tensor."""

    number: int  # from 0
    of: int


WHOLE = Piece(0, 1)


@dataclass(frozen=True)
class Rule:
    """One renaming. `ours` and `theirs` are dotted; `{i}` in `ours` matches a number, which `theirs` may use.

    Where the numbering differs, `theirs` is a function of the numbers matched. Several of ours may be the pieces of
    one of theirs.
    """

    ours: str
    theirs: str | Callable[..., str]
    inside: tuple["Rule", ...] = ()
    form: Form = Form.SAME
    piece: Piece = WHOLE


class Stored(NamedTuple):
    """Where one of our parameters lives on the other side, in which form, and as which piece of it."""

    name: str
    form: Form
    piece: Piece


def key_map(keys: Iterable[str], rules: tuple[Rule, ...], prefix: str = "") -> dict[str, Stored]:
    """Map every one of our `keys` to its stored name, `prefix` before it.

    Raises ValueError for a key that no rule covers, and as `inverse` does.
    """
    stored = {key: translate(key, rules, prefix) for key in keys}
    inverse(stored)
    return stored


def inverse(stored: Mapping[str, Stored]) -> dict[str, tuple[str, ...]]:
    """Return stored name -> our keys, one per piece and in their order.

    Raises ValueError if two keys are the same piece of one name, or if a piece has no key.
    """
    pieces: dict[str, dict[Piece, str]] = {}
    for key, (name, _, piece) in stored.items():
        other = pieces.setdefault(name, {}).setdefault(piece, key)
        if other != key:
            raise ValueError(f"the rules map both {other} and {key} to {name}")
    for name, found in pieces.items():
        if sorted(found) != [Piece(i, len(found)) for i in range(len(found))]:
            raise ValueError(f"the rules map {', '.join(found.values())} to pieces of {name} only")
    return {name: tuple(found[p] for p in sorted(found)) for name, found in pieces.items()}


def translate(key: str, rules: tuple[Rule, ...], prefix: str = "") -> Stored:
    """Return where our `key` is stored, `prefix` before its name. Raises ValueError for a key that no rule covers."""
    parts = key.split(".")
    for rule in rules:
        pattern = rule.ours.split(".")
        numbers = _match(pattern, parts)
        if numbers is None:
            continue
        name = (rule.theirs.format if isinstance(rule.theirs, str) else rule.theirs)(**numbers)
        inner = Stored(".".join(parts[len(pattern) :]), rule.form, rule.piece)
        if rule.inside:
            inner = translate(inner.name, rule.inside)
        return inner._replace(name=prefix + ".".join(part for part in (name, inner.name) if part))
    raise ValueError(f"no rule covers {key}; rules: {', '.join(rule.ours for rule in rules)}")


def _match(pattern: list[str], parts: list[str]) -> dict[str, int] | None:
    """The numbers that the leading `parts` put in `pattern`'s braces; None if they do not match."""
    if len(parts) < len(pattern):
        return None
    numbers = {}
    for want, part in zip(pattern, parts, strict=False):
        if want.startswith("{") and part.isdigit():
            numbers[want[1:-1]] = int(part)
        elif want != part:
            return None
    return numbers
