"""What can be asked of a model, checked: a `Request`."""

import dataclasses
import math
import secrets
import sys
from dataclasses import dataclass
from typing import Any, get_args

from ldm.config import ModelConfig, Spacing
from ldm.diffusion.samplers import SAMPLERS

LARGEST = 2**16  # pixels of a side
MOST = 99_999  # pictures of a request


@dataclass(frozen=True)
class Request:
    """One order for pictures. Where the model has an opinion, None stands for it: see `resolved`.

    Image i is made from seed + i, and comes out as that seed does alone. A negative seed is replaced by a random one
    when the request is made, so that `request.seed` always says how to make the picture again.

    Raises ValueError for a value that no model can follow.
    """

    prompt: str
    negative_prompt: str | None = None  # what guidance steers away from; None and "": see `resolved`
    steps: int | None = None  # 1 .. 1000
    guidance_scale: float | None = None  # 0 or more; guidance is off up to 1
    guidance_rescale: float = 0.0  # 0 .. 1, see `guided`
    guidance_interval: tuple[float, float] | None = (
        None  # guide only at noise levels low < sigma <= high; None: at all of them
    )
    sampler: str | None = None  # a name in SAMPLERS
    spacing: Spacing | None = None  # see `NoiseSchedule.steps`
    width: int | None = None  # pixels
    height: int | None = None
    seed: int = 0  # of the first picture, below 2^64
    images: int = 1  # how many
    original_width: int | None = None  # SDXL: pixels of the training image that it is to be like,
    original_height: int | None = None
    crop_top: int | None = None  # what was cut off from it,
    crop_left: int | None = None
    target_width: int | None = None  # and what was left
    target_height: int | None = None
    aesthetic_score: float | None = None  # SDXL refiner: about 0 .. 10
    negative_aesthetic_score: float | None = None  # what guidance steers away from
    clip_skip: int | None = None  # the text towers' layer that is used, counted from 1, the last

    def __post_init__(self) -> None:
        """Check what can be checked without a model, and draw the seed if it is to be random."""
        _check_text("prompt", self.prompt)
        if self.negative_prompt is not None:
            _check_text("negative_prompt", self.negative_prompt)
        if self.clip_skip is not None:
            _check_integer("clip_skip", self.clip_skip, 1)
        if self.steps is not None:
            _check_integer("steps", self.steps, 1, 1000)
        _check_integer("images", self.images, 1, MOST)
        for side in ("width", "height"):
            for name in (side, f"original_{side}", f"target_{side}"):
                if getattr(self, name) is not None:
                    _check_integer(name, getattr(self, name), 1, LARGEST)
        for name in ("crop_top", "crop_left"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 0, LARGEST)
        for name in ("guidance_scale", "aesthetic_score", "negative_aesthetic_score"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), 0)
        _check_number("guidance_rescale", self.guidance_rescale, 0, 1)
        if self.guidance_interval is not None:
            interval = _checked_interval("guidance_interval", self.guidance_interval)
            object.__setattr__(self, "guidance_interval", interval)
        if self.sampler is not None:
            _check_choice("sampler", self.sampler, SAMPLERS)
        if self.spacing is not None:
            _check_choice("spacing", self.spacing, get_args(Spacing))
        _check_integer("seed", self.seed)
        if self.seed < 0:
            object.__setattr__(self, "seed", secrets.randbelow(2**32))
        if self.seed + self.images > 2**64:
            raise ValueError(
                f"seeds must lie below 2^64 = {2**64}, got {self.seed} for the first of {self.images} pictures"
            )

    @property
    def seeds(self) -> list[int]:
        """The seed of each picture."""
        return [self.seed + i for i in range(self.images)]

    def resolved(self, config: ModelConfig) -> "Request":
        """Return the request with the model's own choices in place of None.

        Two may stay None. clip_skip: each text tower is used as the model was trained (`TextConfig.context_layer`).
        negative_prompt: guidance steers away from zeros instead of a text, as SDXL base was trained to
        (`ModelConfig.zero_negative`); for other models none is the empty text, and a given "" always is.
        What SDXL is conditioned on beside the text gets its defaults (`default_conditioning`) in a model that has it.
        Raises ValueError for a size that the model cannot make, and for conditioning, guidance or a text layer that it
        does not have.
        """
        for text in config.text:
            text.context_layer(self.clip_skip)
        request = dataclasses.replace(
            self,
            negative_prompt=_either(self.negative_prompt, None if config.zero_negative else ""),
            steps=_either(self.steps, config.steps),
            guidance_scale=_either(self.guidance_scale, config.guidance_scale),
            sampler=_either(self.sampler, config.sampler),
            spacing=_either(self.spacing, config.diffusion.spacing),
            width=_either(self.width, config.image_size),
            height=_either(self.height, config.image_size),
        )
        for name in ("negative_prompt", "guidance_interval", "guidance_rescale"):
            if config.unet.guidance_dim and getattr(self, name):
                raise ValueError(
                    f"{name} is for guidance by two predictions, and the model {config.name} makes one: its UNet is "
                    "told the guidance scale; leave it out"
                )
        factor = config.vae.factor
        for name in ("width", "height"):
            size = getattr(request, name)
            if size % factor:
                near = [n for n in (size // factor * factor, -(-size // factor) * factor) if n]
                raise ValueError(
                    f"{name} must be a multiple of {factor} pixels for this model, got {size}; "
                    f"nearest: {' or '.join(map(str, near))}"
                )
        assert request.width is not None
        assert request.height is not None
        conditioning = {}
        for name, default in default_conditioning(request.width, request.height).items():
            value = getattr(self, name)
            if name.removeprefix("negative_") in config.micro_conditioning:
                conditioning[name] = _either(value, default)
            elif value is not None:
                known = ", ".join(config.micro_conditioning) or "nothing of the kind"
                raise ValueError(
                    f"{name} is {value}, and the model {config.name} is conditioned on {known}; leave it out"
                )
        return dataclasses.replace(request, **conditioning)

    def scalars(self, config: ModelConfig) -> list[list[float]]:
        """Return the model's micro-conditioning, in its order, of a resolved request: with the prompt, and without it.

        The two differ in the aesthetic score.
        """
        given = {name: getattr(self, name) for name in config.micro_conditioning}
        without = given | {"aesthetic_score": self.negative_aesthetic_score}
        return [[row[name] for name in given] for row in (given, without)]


def default_conditioning(width: int, height: int) -> dict[str, Any]:
    """Return SDXL's micro-conditioning of a whole picture of that size, and the aesthetic scores that diffusers takes.

    The keys are fields of `Request`, which the names in `ModelConfig.micro_conditioning` are, too.
    """
    return {
        "original_width": width,
        "original_height": height,
        "crop_top": 0,
        "crop_left": 0,
        "target_width": width,
        "target_height": height,
        "aesthetic_score": 6.0,
        "negative_aesthetic_score": 2.5,
    }


def _either(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be valid Unicode text, got {value!r}") from error


def _check_integer(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number{_range(low, high)}, got {value!r}")


def _check_number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    # True of no NaN, and of no integer that is too large for a float.
    if not real or not abs(value) <= sys.float_info.max or not low <= value <= high:
        raise ValueError(f"{name} must be a finite number{_range(low, high)}, got {value!r}")


def _checked_interval(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"{name} must be two noise levels, low and high, got {value!r}")
    for level in value:
        _check_number(name, level, 0)
    low, high = map(float, value)
    if not low < high:
        raise ValueError(f"{name} must be two noise levels, the lower one first, got {value!r}")
    return low, high


def _range(low: float, high: float) -> str:
    if low == -math.inf:
        return ""
    return f", {low} or more" if high == math.inf else f" from {low} to {high}"


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
