"""The check of the parts of a `Request`, whose classes most requests do not import."""

from typing import TYPE_CHECKING

from ldm.control import Control
from ldm.image_prompt import ImagePrompt
from ldm.regions import RegionalPrompt
from ldm.sizes import Sizes
from ldm.source import Source
from ldm.variations import Variation

if TYPE_CHECKING:
    from ldm.request import Request


def check_parts(request: "Request") -> None:
    """Raise ValueError for a part of another class, and turn lists of parts into tuples."""
    for name, single in (("sizes", Sizes), ("source", Source), ("variation", Variation)):
        if not isinstance(value := getattr(request, name), single | None):
            raise ValueError(f"{name} must be an ldm.{single.__name__}, got {value!r}")
    for name, several in (("controls", Control), ("image_prompts", ImagePrompt), ("regions", RegionalPrompt)):
        value = getattr(request, name)
        if not isinstance(value, tuple | list) or not all(isinstance(part, several) for part in value):
            raise ValueError(f"{name} must be a tuple of ldm.{several.__name__}, got {value!r}")
        object.__setattr__(request, name, tuple(value))
