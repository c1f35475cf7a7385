"""The sizes and scores that condition SDXL: the defaults of a request."""

import dataclasses

from ldm.config import ModelConfig
from ldm.request import Sizes


def resolved_sizes(sizes: Sizes, config: ModelConfig, width: int, height: int) -> dict[str, float]:
    """Return the micro-conditioning of the model by name, with its defaults in place of None.

    The defaults are the sizes of an uncropped picture, and the aesthetic scores that diffusers uses.
    Raises ValueError for a size or score that the model does not take.
    """
    defaults = Sizes(width, height, 0, 0, width, height, aesthetic_score=6.0, negative_aesthetic_score=2.5)
    resolved = {}
    for field in dataclasses.fields(Sizes):
        name, value = field.name, getattr(sizes, field.name)
        if name.removeprefix("negative_") in config.micro_conditioning:
            resolved[name] = getattr(defaults, name) if value is None else value
        elif value is not None:
            known = ", ".join(config.micro_conditioning) or "no size or score"
            raise ValueError(f"{name} is {value}, and the model {config.name} is conditioned on {known}; leave it out")
    return resolved
