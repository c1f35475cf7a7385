"""What can be asked of a model, a `Request`, and what a model makes of it, a `Plan`."""

import dataclasses
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

from PIL import Image
from torch import Tensor

from ldm.config import ModelConfig, Spacing, check_fields, check_number, option
from ldm.diffusion.samplers import SAMPLERS, Noise, conventions, options, seeded_noise
from ldm.diffusion.schedule import NoiseSchedule

LARGEST = 2**16  # pixels of a side
MOST = 99_999  # pictures of a request


@dataclass(frozen=True)
class Sizes:
    """The sizes and scores that condition SDXL (Podell et al. 2023, section 2.2). None: the model's default.

    They describe a training image: how large the original was, what was cut off, and how large the rest is. The
    defaults describe a whole picture of the request's size. The scores are for the SDXL refiner only.
    """

    original_width: int | None = option(None, "SDXL: width of the uncropped image (default: the width)", low=1)
    original_height: int | None = option(None, "SDXL: height of the uncropped image (default: the height)", low=1)
    crop_top: int | None = option(None, "SDXL: pixels cropped at the top of that image (default: 0)", low=0)
    crop_left: int | None = option(None, "SDXL: pixels cropped at the left of that image (default: 0)", low=0)
    target_width: int | None = option(None, "SDXL: width after cropping (default: the width)", low=1)
    target_height: int | None = option(None, "SDXL: height after cropping (default: the height)", low=1)
    aesthetic_score: float | None = option(None, "SDXL refiner: how much people like it, 0 to 10 (default: 6)", low=0)
    negative_aesthetic_score: float | None = option(None, "the same of the negative prompt (default: 2.5)", low=0)

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_fields(self, largest=LARGEST)


@dataclass(frozen=True)
class Source:
    """A picture to start from: image to image.

    Sampling starts at a noise level below the highest: from the picture's latents with noise of that level.
    """

    image: str | Path | Image.Image  # a file, or a picture; EXIF rotation is applied, transparency becomes white
    strength: float = option(0.6, "how much of the steps run, above 0 to 1: 1 keeps almost nothing of the picture")
    exact_steps: bool = option(False, "run all steps, from the noise level of the strength")
    start_sigma: float | None = option(None, "the noise level to start from, instead of the strength; runs all steps")
    resize: Literal["crop", "stretch"] = option("crop", "how the picture gets the size: crop keeps its aspect ratio")

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_fields(self)
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {self.strength}")

    @cached_property
    def picture(self) -> Image.Image:
        """The picture as 8-bit RGB. Raises ValueError if it cannot be read."""
        from ldm.pictures import read_picture, to_rgb  # as `ldm.geometry`: only image to image needs it

        return to_rgb(self.image) if isinstance(self.image, Image.Image) else read_picture(self.image)


@dataclass(frozen=True)
class Request:
    """A request for pictures. None means the model's default, see `resolved`.

    Image i is made from seed + i, and equals the image that this seed gives alone. A negative seed is replaced by a
    random one here, so that `request.seed` always says how to make the picture again.

    Raises ValueError for a value that no model can follow.
    """

    prompt: str
    negative_prompt: str | None = option(None, "what the picture should not show", "--negative")
    steps: int | None = option(None, "denoising steps, 1 to 1000 (default: the model's)", low=1, high=1000)
    guidance_scale: float | None = option(
        None, "strength of classifier-free guidance; up to 1: no guidance (default: the model's)", "--guidance", low=0
    )
    guidance_rescale: float = option(
        0.0, "0 to 1: scale guided predictions back to the contrast of unguided ones", "--rescale", low=0, high=1
    )
    guidance_interval: tuple[float, float] | None = option(
        None, "use guidance only at noise levels above LOW, up to HIGH; faster, another picture (default: at all)"
    )
    sampler: str | None = option(None, f"one of {', '.join(SAMPLERS)} (default: the model's)")
    spacing: Spacing | None = option(None, "how the steps are spaced (default: the model's)", "--schedule")
    width: int | None = option(None, "pixels (default: the model's)", low=1, high=LARGEST)
    height: int | None = option(None, "pixels (default: the model's)", low=1, high=LARGEST)
    seed: int = option(0, "seed of the first picture, the next has the next; negative: a random one")
    images: int = option(1, "number of pictures", low=1, high=MOST)
    clip_skip: int | None = option(
        None, "layer of the text encoder, counted from 1, the last (default: the model's; SDXL: 2)", low=1
    )
    sampler_options: Mapping[str, float] = dataclasses.field(
        default_factory=dict,
        hash=False,
        metadata={"help": "the sampler's own options, such as eta=0.5 for ddim", "flag": None},
    )
    sizes: Sizes = Sizes()
    source: Source | None = None  # None: start from noise

    def __post_init__(self) -> None:
        """Check what can be checked without a model, and draw the seed if it is to be random."""
        check_fields(self)
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")
        if self.guidance_interval is not None:
            low, high = map(float, self.guidance_interval)
            if not 0 <= low < high:
                raise ValueError(f"guidance_interval needs two noise levels, 0 <= low < high, got {low} and {high}")
            object.__setattr__(self, "guidance_interval", (low, high))
        if not isinstance(self.sampler_options, Mapping):
            raise ValueError(f"sampler_options must be a mapping such as {{'eta': 0.5}}, got {self.sampler_options!r}")
        for name, number in self.sampler_options.items():
            check_number(f"the sampler's {name}", number)
        for name, kind in (("sizes", Sizes), ("source", Source)):
            value = getattr(self, name)
            if not isinstance(value, kind) and not (name == "source" and value is None):
                raise ValueError(f"{name} must be an ldm.{kind.__name__}, got {value!r}")
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

    def resolved(self, config: ModelConfig, schedule: NoiseSchedule | None = None) -> "Plan":
        """Make the plan of this request for a model, with its defaults.

        schedule: the model's noise schedule, if it is not the one that `config.diffusion` describes.
        Raises ValueError for what the model cannot do: sizes, conditioning, guidance or a text layer that it lacks, and
        a picture that cannot be read.
        """
        for text in config.text:
            text.context_layer(self.clip_skip)
        for name in ("negative_prompt", "guidance_interval", "guidance_rescale"):
            if config.unet.guidance_dim and getattr(self, name):
                raise ValueError(
                    f"{name} needs classifier-free guidance, and the model {config.name} has none: its UNet takes the "
                    "guidance scale as an input; leave it out"
                )
        schedule = schedule or NoiseSchedule.from_config(config.diffusion)
        sampler = self.sampler or config.sampler
        if unknown := set(self.sampler_options) - set(allowed := options(SAMPLERS[sampler])):
            raise ValueError(
                f"the sampler {sampler} has {f'the options {allowed}' if allowed else 'no options'}, got "
                f"{', '.join(sorted(unknown))}"
            )
        spacing = self.spacing or config.diffusion.spacing
        steps = config.steps if self.steps is None else self.steps
        guidance_scale = float(config.guidance_scale if self.guidance_scale is None else self.guidance_scale)
        width, height = self._size(config)

        texts: list[str | None] = [self.prompt]
        if guidance_scale > 1 and not config.unet.guidance_dim:
            # SDXL base: zeros stand for a negative prompt that is left out. Other models: the empty text does.
            texts.append(self.negative_prompt if config.zero_negative else self.negative_prompt or "")
        sizes = _resolved_sizes(self.sizes, config, width, height)
        negative = sizes | {"aesthetic_score": sizes.get("negative_aesthetic_score", 0)}
        rows = [[row[name] for name in config.micro_conditioning] for row in (sizes, negative)][: len(texts)]
        factor = config.vae.factor
        return Plan(
            request=self,
            texts=tuple(texts),
            sizes=sizes,
            scalars=tuple(tuple(row) for row in rows) if config.micro_conditioning else (),
            steps=steps,
            guidance_scale=guidance_scale,
            guidance_interval=self.guidance_interval or (0.0, math.inf),
            sampler=sampler,
            spacing=spacing,
            sigmas=self._sigmas(schedule, sampler, spacing, steps, config.diffusion.offset),
            width=width,
            height=height,
            latent_shape=(config.vae.latent_channels, height // factor, width // factor),
        )

    def _size(self, config: ModelConfig) -> tuple[int, int]:
        """Return the width and height of the pictures."""
        factor = config.vae.factor
        found = self.width or config.image_size, self.height or config.image_size
        if self.source is not None:
            from ldm.geometry import target_size

            picture = self.source.picture
            found = target_size(*picture.size, config.image_size, factor, width=self.width, height=self.height)
        for name, size in zip(("width", "height"), found, strict=True):
            if size % factor:
                near = [n for n in (size // factor * factor, -(-size // factor) * factor) if n]
                raise ValueError(
                    f"{name} must be a multiple of {factor} pixels for this model, got {size}; "
                    f"nearest: {' or '.join(map(str, near))}"
                )
        return found

    def _sigmas(self, schedule: NoiseSchedule, sampler: str, spacing: Spacing, steps: int, offset: int) -> Tensor:
        """List the noise levels of the steps that run."""
        levels = partial(schedule.steps, steps, spacing, offset=offset, final=conventions(sampler).final)
        if self.source is None:
            return levels()
        if self.source.start_sigma is not None:
            return levels(start=self.source.start_sigma)
        run = int(steps * self.source.strength)  # rounded down, as in diffusers
        if run == 0:
            raise ValueError(
                f"strength {self.source.strength} of {steps} steps runs no step: raise one of them, or give start_sigma"
            )
        sigmas = levels()[steps - run :]
        return levels(start=float(sigmas[0])) if self.source.exact_steps else sigmas


@dataclass(frozen=True, eq=False)
class Plan:
    """A request with every choice made, for one model. Make it with `Pipeline.plan`."""

    request: Request  # as it was asked
    texts: tuple[str | None, ...]  # the prompt, and for guidance the negative one; zeros stand for None
    sizes: Mapping[str, float]  # the micro-conditioning by name, empty for a model without
    scalars: tuple[tuple[float, ...], ...]  # for each text the micro-conditioning in the model's order
    steps: int  # as asked; image to image may run fewer, one per pair of sigmas
    guidance_scale: float
    guidance_interval: tuple[float, float]  # noise levels low < sigma <= high with guidance
    sampler: str
    spacing: Spacing
    sigmas: Tensor  # the noise levels, falling: one more than there are steps
    width: int  # pixels
    height: int
    latent_shape: tuple[int, int, int]  # c h w

    def initial_noise(self) -> Noise:
        """Return the function whose first draws are for `Pipeline.start`."""
        return seeded_noise(self.request.seeds, self.latent_shape)

    def noise(self) -> Noise:
        """Return the function that draws the sampler's noise: the draws after those of `Pipeline.start`."""
        noise = self.initial_noise()
        for _ in range(1 if self.request.source is None else 2):
            noise()
        return noise


def _resolved_sizes(sizes: Sizes, config: ModelConfig, width: int, height: int) -> dict[str, float]:
    """Return the micro-conditioning of the model by name.

    The defaults are those of a whole picture, and the aesthetic scores of diffusers.
    Raises ValueError for a size or score that the model does not have.
    """
    defaults = Sizes(width, height, 0, 0, width, height, aesthetic_score=6.0, negative_aesthetic_score=2.5)
    resolved = {}
    for field in dataclasses.fields(Sizes):
        name, value = field.name, getattr(sizes, field.name)
        if name.removeprefix("negative_") in config.micro_conditioning:
            resolved[name] = getattr(defaults, name) if value is None else value
        elif value is not None:
            known = ", ".join(config.micro_conditioning) or "nothing of the kind"
            raise ValueError(f"{name} is {value}, and the model {config.name} is conditioned on {known}; leave it out")
    return resolved
