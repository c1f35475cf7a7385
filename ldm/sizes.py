"""The sizes and scores that condition SDXL."""

import dataclasses
from dataclasses import dataclass

from ldm.config import LARGEST_SIDE, ModelConfig, check_fields, option


@dataclass(frozen=True)
class Sizes:
    """The sizes and scores that condition SDXL (Podell et al. 2023, section 2.2). None: the model's default.

    They describe a training image: the size of the original, the corner where the crop begins, and the size of the
    crop. The defaults describe an uncropped picture of the request's size. The scores are for the SDXL refiner only.
    """

    original_width: int | None = option(None, "SDXL: width of the uncropped image (default: the width)", low=1)
    original_height: int | None = option(None, "SDXL: height of the uncropped image (default: the height)", low=1)
    crop_top: int | None = option(None, "SDXL: pixels cropped at the top of that image (default: 0)", low=0)
    crop_left: int | None = option(None, "SDXL: pixels cropped at the left of that image (default: 0)", low=0)
    target_width: int | None = option(None, "SDXL: width after cropping (default: the width)", low=1)
    target_height: int | None = option(None, "SDXL: height after cropping (default: the height)", low=1)
    aesthetic_score: float | None = option(None, "SDXL refiner: aesthetic score from 0 to 10 (default: 6)", low=0)
    negative_aesthetic_score: float | None = option(None, "the same for the negative prompt (default: 2.5)", low=0)

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_fields(self, largest=LARGEST_SIDE)


def resolved_sizes(sizes: Sizes | None, config: ModelConfig, width: int, height: int) -> dict[str, float]:
    """Return the micro-conditioning of the model by name, with its defaults in place of None.

    The defaults are the sizes of an uncropped picture, and the aesthetic scores that diffusers uses.
    Raises ValueError for a size or score that the model does not take.
    """
    defaults = Sizes(width, height, 0, 0, width, height, aesthetic_score=6.0, negative_aesthetic_score=2.5)
    resolved = {}
    for field in dataclasses.fields(Sizes):
        name, value = field.name, getattr(sizes, field.name, None)
        if name.removeprefix("negative_") in config.micro_conditioning:
            resolved[name] = getattr(defaults, name) if value is None else value
        elif value is not None:
            known = ", ".join(config.micro_conditioning) or "no size or score"
            raise ValueError(f"{name} is {value}, and the model {config.name} is conditioned on {known}; leave it out")
    return resolved
