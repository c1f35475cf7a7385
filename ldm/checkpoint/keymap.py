"""Key maps: rules from our parameter names to the stored ones, applied to the state-dict keys of a model.

A rule renames a dotted prefix. Its rules `inside` rename the rest of the key; without them the rest stays. The inverse
map is this dictionary inverted, so the two directions always agree.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from torch import Size, Tensor


class Form(Enum):
    """How the shape of a stored tensor differs from our parameter's."""

    SAME = "same"
    PIXELS = "pixels"  # our Linear weight is stored as that of a 1x1 convolution
    TRANSPOSED = "transposed"  # our Linear weight is stored transposed

    def store(self, value: Tensor) -> Tensor:
        """Return our value in its stored shape."""
        if self is Form.PIXELS and value.dim() == 2:
            return value[..., None, None]
        return value.T if self is Form.TRANSPOSED else value

    def restore(self, value: Tensor, shape: Size) -> Tensor:
        """Return a stored value in our `shape`. Some tools store a 1x1 convolution as a matrix."""
        return (value.T if self is Form.TRANSPOSED else value).reshape(shape)


class Piece(NamedTuple):
    """One of several equal parts of a stored tensor, split along its first dimension."""

    number: int  # from 0
    of: int  # how many parts


WHOLE = Piece(0, 1)


@dataclass(frozen=True)
class Rule:
    """One renaming of a dotted prefix. `{i}` in `ours` matches a number, and `theirs` may contain it.

    Where the numbering differs, `theirs` is a function of the matched numbers. Several of our parameters may be the
    pieces of one stored tensor.
    """

    ours: str
    theirs: str | Callable[..., str]
    inside: tuple["Rule", ...] = ()
    form: Form = Form.SAME
    piece: Piece = WHOLE


class Stored(NamedTuple):
    """Where one of our parameters is stored: under which name, in which form, and as which piece."""

    name: str
    form: Form
    piece: Piece


def key_map(keys: Iterable[str], rules: tuple[Rule, ...], prefix: str = "") -> dict[str, Stored]:
    """Map each of our `keys` to where it is stored, with `prefix` before the stored name.

    Raises ValueError for a key that no rule covers, and as `inverse` does.
    """
    stored = {key: translate(key, rules, prefix) for key in keys}
    inverse(stored)
    return stored


def inverse(stored: Mapping[str, Stored]) -> dict[str, tuple[str, ...]]:
    """Return stored name -> our keys, one per piece, in the order of the pieces.

    Raises ValueError if two keys map to the same piece of one name, or if a piece has no key.
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
    """Return where our `key` is stored, with `prefix` before the name. Raises ValueError if no rule covers it."""
    parts = key.split(".")
    for rule in rules:
        pattern = rule.ours.split(".")
        if (numbers := _match(pattern, parts)) is None:
            continue
        name = (rule.theirs.format if isinstance(rule.theirs, str) else rule.theirs)(**numbers)
        inner = Stored(".".join(parts[len(pattern) :]), rule.form, rule.piece)
        if rule.inside:
            inner = translate(inner.name, rule.inside)
        return inner._replace(name=prefix + ".".join(part for part in (name, inner.name) if part))
    raise ValueError(f"no rule covers {key}; rules: {', '.join(rule.ours for rule in rules)}")


def _match(pattern: list[str], parts: list[str]) -> dict[str, int] | None:
    """The numbers in `parts` at the braces of `pattern`, by name; None if `pattern` does not match."""
    if len(parts) < len(pattern):
        return None
    numbers = {}
    for want, part in zip(pattern, parts, strict=False):
        if want.startswith("{") and part.isdigit():
            numbers[want[1:-1]] = int(part)
        elif want != part:
            return None
    return numbers
