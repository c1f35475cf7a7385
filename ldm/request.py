"""`Request`: the settings that a user gives. `Plan`: the same settings, with the defaults of one model filled in."""

import dataclasses
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ldm.config import LARGEST_SIDE, ModelConfig, check_fields, check_number, option
from ldm.diffusion.samplers import SAMPLERS, Noise, conventions, options, seeded_noise
from ldm.diffusion.schedule import NoiseSchedule, Spacing

if TYPE_CHECKING:
    from ldm.control import Control
    from ldm.image_prompt import ImagePrompt
    from ldm.regions import RegionalPrompt
    from ldm.sizes import Sizes
    from ldm.source import Source
    from ldm.variations import Variation

MOST = 99_999  # the most pictures of a request


@dataclass(frozen=True)
class Request:
    """A request for pictures. None means the model's default, see `resolved`.

    prompt: one for all images, or one for each. Image i has the seed `seed + i` and equals the single image of its seed
    and prompt. A random seed replaces a negative seed at once: `request.seed` is always the seed of the first image.

    Raises ValueError for a value that no model supports.
    """

    prompt: str | tuple[str, ...]
    negative_prompt: str | None = option(None, "what the picture should not show", "--negative")
    steps: int | None = option(None, "denoising steps, 1 to 1000 (default: the model's)", low=1, high=1000)
    guidance_scale: float | None = option(
        None, "scale of classifier-free guidance; 1 or less: no guidance (default: the model's)", "--guidance", low=0
    )
    guidance_rescale: float = option(
        0.0, "0 to 1: how far to undo the higher contrast that guidance causes", "--rescale", low=0, high=1
    )
    guidance_interval: tuple[float, float] | None = option(
        None, "use guidance only at noise levels above LOW, up to HIGH; faster (default: at all noise levels)"
    )
    sampler: str | None = option(None, f"one of {', '.join(SAMPLERS)} (default: the model's)")
    spacing: Spacing | None = option(None, "how the noise levels are spaced (default: the model's)", "--schedule")
    width: int | None = option(None, "pixels (default: the model's, in the source's ratio)", low=1, high=LARGEST_SIDE)
    height: int | None = option(None, "pixels (default: the model's, in the source's ratio)", low=1, high=LARGEST_SIDE)
    seed: int = option(0, "seed of the first picture, one more for each further picture; negative: random")
    images: int = option(1, "number of pictures", low=1, high=MOST)
    clip_skip: int | None = option(
        None, "layer of the text encoder, from the end: 1 is the last (default: the model's; SDXL: 2)", low=1
    )
    emphasis: Literal["a1111", "interpolate"] | None = option(
        None,
        "read (word:1.2), [word], BREAK, [from:to:when] and long prompts, see docs/prompts.md (default: plain text)",
    )
    sampler_options: Mapping[str, float] = dataclasses.field(
        default_factory=dict,
        hash=False,
        metadata={"help": "the sampler's own options, such as eta=0.5 for ddim", "flag": None},
    )
    sizes: "Sizes | None" = None  # None: the model's defaults
    source: "Source | None" = None  # None: start from noise
    controls: "tuple[Control, ...]" = ()
    image_prompts: "tuple[ImagePrompt, ...]" = ()
    regions: "tuple[RegionalPrompt, ...]" = ()
    variation: "Variation | None" = None

    def __post_init__(self) -> None:
        """Check what can be checked without a model, and draw a random seed for a negative one."""
        check_fields(self)
        if self.emphasis or not isinstance(self.prompt, str):
            from ldm.prompts import checked  # only prompts with syntax, and a prompt per picture, need it

            object.__setattr__(self, "prompt", checked(self.prompt, self.negative_prompt, self.images, self.emphasis))
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
        object.__setattr__(self, "sampler_options", dict(self.sampler_options))  # the caller may change theirs
        parts = self.sizes, self.source, self.controls, self.image_prompts, self.regions, self.variation
        if parts != (None, None, (), (), (), None):
            from ldm.parts import check_parts  # most requests have no parts

            check_parts(self)
        if self.seed < 0:
            object.__setattr__(self, "seed", secrets.randbelow(2**32))
        if self.seed + self.images > 2**64:
            raise ValueError(f"seeds must lie below 2^64, got {self.seed} for the first of {self.images} pictures")

    @property
    def seeds(self) -> list[int]:
        """The seed of each picture. All variations of a seed have the same."""
        return [self.seed + i * (getattr(self.variation, "other_seed", None) is None) for i in range(self.images)]

    @property
    def prompts(self) -> tuple[str, ...]:
        """One prompt for all pictures, or one for each picture."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    @property
    def task(self) -> Literal["txt2img", "img2img", "inpaint", "edit"]:
        """The kind of request, by its source."""
        return self.source.task if self.source else "txt2img"

    @cached_property
    def region(self) -> Any:
        """The `ldm.masks.Region` that inpainting works on; None without a mask. Raises ValueError for a wrong mask."""
        if self.source is None or self.source.mask is None:
            return None
        from ldm.masks import region  # only inpainting needs it

        return region(self.source, self.width, self.height)

    def resolved(self, config: ModelConfig, schedule: NoiseSchedule | None = None) -> "Plan":
        """Make the plan of this request for one model, with the model's defaults in place of None.

        schedule: the model's noise schedule (default: the one that `config.diffusion` describes).
        Raises ValueError for a setting that the model does not support, and for a picture that cannot be read.
        """
        schedule = schedule or NoiseSchedule.from_config(config.diffusion)
        sampler = self.sampler or config.sampler
        self._check_support(config, sampler)
        spacing = self.spacing or config.diffusion.spacing
        steps = config.steps if self.steps is None else self.steps
        guidance_scale = float(config.guidance_scale if self.guidance_scale is None else self.guidance_scale)
        width, height = self._size(config)
        texts, count = self._texts(config, guidance_scale), len(self.prompts)
        shown, negative = tuple(i % count for i in range(self.images)), (count,) * self.images
        sizes: dict[str, float] = {}
        if config.micro_conditioning or self.sizes:
            from ldm.sizes import resolved_sizes  # only SDXL has sizes

            sizes = resolved_sizes(self.sizes, config, width, height)
        other_sizes = sizes | {"aesthetic_score": sizes.get("negative_aesthetic_score", 0)}
        rows = [*[sizes] * count, other_sizes][: len(texts) if config.micro_conditioning else 0]
        factor, final = config.vae.factor, conventions(sampler).final
        levels = partial(schedule.steps, steps, spacing, offset=config.diffusion.offset, final=final)
        plan = Plan(
            request=self,
            texts=texts,
            which=(shown, negative) if len(texts) > count else (shown,),
            sizes=sizes,
            scalars=tuple(tuple(row[name] for name in config.micro_conditioning) for row in rows),
            steps=steps,
            guidance_scale=guidance_scale,
            guidance_interval=self.guidance_interval or (0.0, math.inf),
            sampler=sampler,
            spacing=spacing,
            sigmas=self.source.sigmas(levels, steps) if self.source else levels(),
            width=width,
            height=height,
            latent_shape=(config.vae.latent_channels, height // factor, width // factor),
            draws=self.source.draws(wide=config.inpaints or config.edits) if self.source else 1,
        )
        if self.emphasis is None:
            return plan
        from ldm.phases import phases

        return dataclasses.replace(plan, **phases(plan.texts, plan.which, plan.scalars, plan.sigmas))

    def _check_support(self, config: ModelConfig, sampler: str) -> None:
        for text in config.text:
            text.context_layer(self.clip_skip)
        for name in ("negative_prompt", "guidance_interval", "guidance_rescale"):
            if config.unet.guidance_dim and getattr(self, name):
                raise ValueError(
                    f"{name} needs classifier-free guidance, but {config.name}'s UNet takes the scale: leave it out"
                )
        if unknown := set(self.sampler_options) - set(allowed := options(SAMPLERS[sampler])):
            raise ValueError(
                f"the sampler {sampler} has {f'the options {allowed}' if allowed else 'no options'}, got "
                f"{', '.join(sorted(map(str, unknown)))}"
            )

    def _texts(self, config: ModelConfig, guidance_scale: float) -> tuple[str | None, ...]:
        """Return the prompts and, for guidance, the negative prompt."""
        if config.unet.guidance_dim or not (guidance_scale > 1 or self.task == "edit"):
            return self.prompts
        # Without a negative prompt, SDXL base takes zeros (None), and other models the encoded empty text.
        return *self.prompts, self.negative_prompt if config.zero_negative else self.negative_prompt or ""

    def _size(self, config: ModelConfig) -> tuple[int, int]:
        factor = config.vae.factor
        found = self.width or config.image_size, self.height or config.image_size
        if self.source is not None:
            from ldm.geometry import target_size

            across, down = (self.region or self.source.picture).size
            found = target_size(across, down, config.image_size, factor, width=self.width, height=self.height)
        for name, size in zip(("width", "height"), found, strict=True):
            if size % factor:
                near = " or ".join(str(n) for n in (size // factor * factor, -(-size // factor) * factor) if n)
                raise ValueError(
                    f"{name} must be a multiple of {factor} pixels for this model, got {size}; nearest: {near}"
                )
        return found


@dataclass(frozen=True, eq=False)
class Plan:
    """A request with the defaults of one model filled in. `Pipeline.plan` makes it."""

    request: Request  # the original request
    texts: tuple[str | None, ...]  # the prompts and, for guidance, the negative prompt; None is encoded as zeros
    which: tuple[tuple[int, ...], ...]  # a row per condition: the index of the text of each picture
    sizes: Mapping[str, float]  # the micro-conditioning by name; empty if the model has none
    scalars: tuple[tuple[float, ...], ...]  # one row per text: the micro-conditioning in the model's order
    steps: int  # as requested; image to image may run fewer: len(sigmas) - 1
    guidance_scale: float
    guidance_interval: tuple[float, float]  # noise levels low < sigma <= high with guidance
    sampler: str
    spacing: Spacing
    sigmas: Tensor  # falling noise levels, one more than the steps that run
    width: int  # pixels
    height: int
    latent_shape: tuple[int, int, int]  # c h w
    draws: int  # of noise, before those of the sampler
    changes: tuple[float, ...] = ()  # falling noise levels where the texts change; `which` has the rows of each phase

    def initial_noise(self) -> Noise:
        """Return a function that draws noise from the seeds. The first `draws` are for `Pipeline.start` and masks."""
        noise = seeded_noise(self.request.seeds, self.latent_shape)
        return self.request.variation.noise(noise, self) if self.request.variation else noise

    def noise(self) -> Noise:
        """Return a function that draws the sampler's noise: the draws that follow the first `draws`."""
        noise = self.initial_noise()
        for _ in range(self.draws):
            noise()
        return noise
