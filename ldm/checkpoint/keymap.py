"""Key maps: rules that rename our parameters, written in one direction and applied to the keys a model really has.

A rule renames a dotted prefix; what follows it is renamed by the rules `inside`, or stays. The inverse map is
the inverted dictionary, so the two directions cannot drift apart.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Size, Tensor


class Form(NamedTuple):
    """How a value is held on the other side. store: ours to theirs; restore: theirs to our shape."""

    store: Callable[[Tensor], Tensor]
    restore: Callable[[Tensor, Size], Tensor]


def _as_it_is(value: Tensor, shape: Size | None = None) -> Tensor:
    return value


def _as_pixels(value: Tensor) -> Tensor:
    return value[..., None, None] if value.dim() == 2 else value


def _of_either_rank(value: Tensor, shape: Size) -> Tensor:
    """`value`, with the size-one pixels of a 1x1 convolution dropped or added as `shape` wants them."""
    rank = {2: value.dim() == 4 and value.shape[2:] == (1, 1), 4: value.dim() == 2}
    return value.reshape(*value.shape[:2], *shape[2:]) if rank.get(len(shape)) else value


SAME = Form(_as_it_is, _as_it_is)
EITHER_RANK = Form(_as_it_is, _of_either_rank)  # some tools save a 1x1 convolution as a matrix
PIXELS = Form(_as_pixels, _of_either_rank)  # our Linear is their 1x1 convolution


@dataclass(frozen=True)
class Rule:
    """One renaming. `ours` and `theirs` are dotted; `{i}` in `ours` matches a number, which `theirs` may use.

    Where the numbering differs, `theirs` is a function of the numbers matched.
    """

    ours: str
    theirs: str | Callable[..., str]
    inside: tuple["Rule", ...] = ()
    form: Form = SAME


class Stored(NamedTuple):
    """Where one of our parameters lives on the other side, and in which form."""

    name: str
    form: Form


def key_map(keys: Iterable[str], rules: tuple[Rule, ...], prefix: str = "") -> dict[str, Stored]:
    """Map every one of our `keys` to its stored name, `prefix` before it.

    Raises ValueError for a key that no rule covers and for two keys with one name.
    """
    stored = {}
    for key in keys:
        name, form = _translate(key, rules)
        stored[key] = Stored(prefix + name, form)
    inverse(stored)
    return stored


def inverse(stored: Mapping[str, Stored]) -> dict[str, str]:
    """Return stored name -> our key. Raises ValueError if two keys share a name."""
    keys: dict[str, str] = {}
    for key, (name, _) in stored.items():
        if name in keys:
            raise ValueError(f"the rules map both {keys[name]} and {key} to {name}")
        keys[name] = key
    return keys


def _translate(key: str, rules: tuple[Rule, ...]) -> Stored:
    parts = key.split(".")
    for rule in rules:
        pattern = rule.ours.split(".")
        numbers = _match(pattern, parts)
        if numbers is None:
            continue
        name = (rule.theirs.format if isinstance(rule.theirs, str) else rule.theirs)(**numbers)
        rest, form = ".".join(parts[len(pattern) :]), rule.form
        if rule.inside:
            rest, form = _translate(rest, rule.inside)
        return Stored(".".join(part for part in (name, rest) if part), form)
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
