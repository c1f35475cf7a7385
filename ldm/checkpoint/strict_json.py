"""JSON in files that anyone may have written: strict, and not parsed at all if it could become too large.

Parsed, a value takes up to fifty times the room that it has as text, so values are counted before.
"""

import json
from collections import Counter
from typing import Any

MAX_BYTES = 10_000_000  # the header of an SDXL checkpoint has 300,000
MAX_VALUES = 250_000  # a tensor's entry counts as ten, a vocabulary as one for each token


def parse_json(text: bytes) -> Any:
    """Parse `text`, JSON in UTF-8 in which no object has a name twice.

    Raises ValueError with what is wrong, for the caller to say where.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text):,} bytes, allowed are {MAX_BYTES:,}")
    values = sum(text.count(mark) for mark in (b",", b"[", b"{"))  # also those in strings
    if values > MAX_VALUES:
        raise ValueError(f"it has {values:,} values, allowed are {MAX_VALUES:,}")
    try:
        return json.loads(text.decode(), object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def printable(value: object, length: int = 100) -> str:
    """Return the beginning of a text from a file, without line breaks and terminal commands."""
    text = str(value)
    shown = "".join(c if c.isprintable() else " " for c in text[:length])
    return shown if len(text) <= length else f"{shown}..."


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice[:100]!r} occurs twice")
    return found
