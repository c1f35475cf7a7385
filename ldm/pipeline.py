"""From a prompt to pictures: what can be asked for (`Request`), and the loop that makes it (`Pipeline`)."""

import dataclasses
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint import files
from ldm.config import ModelConfig, Spacing
from ldm.diffusion.denoiser import consistency, guided, parametrise
from ldm.diffusion.samplers import SAMPLERS, Step, seeded_noise
from ldm.diffusion.schedule import NoiseSchedule, to_ve, to_vp
from ldm.images import to_pil
from ldm.memory import Placement
from ldm.models.attention import set_attention
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.models.vae import VAE

BUNDLED = "weights/tiny"


@dataclass(frozen=True)
class Request:
    """One order for pictures. Where the model has an opinion, None stands for it: see `resolved`.

    Image i is made from seed + i, and comes out as that seed does alone. A negative seed is replaced by a random one
    when the request is made, so that `request.seed` always says how to make the picture again.

    Raises ValueError for a value that no model can follow.
    """

    prompt: str
    negative_prompt: str = ""  # what guidance steers away from
    steps: int = 25  # 1 .. 1000
    guidance_scale: float | None = (
        None  # 0 or more; up to 1 the prompt is followed without guidance
    )
    guidance_rescale: float = 0.0  # 0 .. 1, see `guided`
    sampler: str = "dpmpp_2m"  # a name in SAMPLERS
    spacing: Spacing | None = None  # see `NoiseSchedule.steps`
    width: int | None = None  # pixels
    height: int | None = None
    seed: int = 0  # of the first picture, below 2^64
    images: int = 1  # how many

    def __post_init__(self) -> None:
        """Check what can be checked without a model, and draw the seed if it is to be random."""
        for name in ("prompt", "negative_prompt"):
            _check_text(name, getattr(self, name))
        _check_integer("steps", self.steps, 1, 1000)
        _check_integer("images", self.images, 1)
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 1)
        if self.guidance_scale is not None:
            _check_number("guidance_scale", self.guidance_scale, 0)
        _check_number("guidance_rescale", self.guidance_rescale, 0, 1)
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

        Raises ValueError for a size that the model cannot make.
        """
        request = dataclasses.replace(
            self,
            guidance_scale=_either(self.guidance_scale, config.guidance_scale),
            spacing=_either(self.spacing, config.diffusion.spacing),
            width=_either(self.width, config.image_size),
            height=_either(self.height, config.image_size),
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
        return request


class Pipeline:
    """A model with everything around it that turns a `Request` into pictures.

    unet, vae, text_encoder: plain modules. schedule: the `NoiseSchedule` they were trained on. config: `ModelConfig`.
    """

    def __init__(
        self, config: ModelConfig, unet: UNet, vae: VAE, text_encoder: TextEncoder
    ) -> None:
        self.config = config
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        process = config.diffusion
        self.schedule = NoiseSchedule(
            betas=process.betas,
            beta_start=process.beta_start,
            beta_end=process.beta_end,
            timesteps=process.timesteps,
            zero_terminal_snr=process.zero_terminal_snr,
        )

    @torch.no_grad()
    def stream(self, request: Request) -> Iterator[Step]:
        """Encode the prompt, then return an iterator over the denoising steps; leave it at any time.

        A step's x is x0 + sigma noise, and its x0 the current estimate; both are latents, fp32: b c h w. Of the last
        step, x are the finished latents that `decode` takes.
        Raises ValueError for a request that this model cannot follow.
        """
        request = request.resolved(self.config)
        channels, latent_channels = self.config.unet.in_channels, self.config.vae.latent_channels
        if channels != latent_channels:
            raise ValueError(
                f"the UNet of {self.config.name} takes {channels} channels, of which a prompt gives {latent_channels}: "
                "it is made for inpainting or editing; use a text-to-image model"
            )
        assert request.guidance_scale is not None  # as the three below: resolved fills them in
        assert request.spacing is not None
        assert request.width is not None
        assert request.height is not None
        weight = next(self.unet.parameters())

        cond, uncond = self._conditions(request)
        predict = guided(
            self.unet, cond, uncond, request.guidance_scale, rescale=request.guidance_rescale
        )
        denoise = parametrise(
            predict, self.schedule, self.config.diffusion.prediction, dtype=weight.dtype
        )
        if request.sampler == "lcm":
            denoise = consistency(denoise, self.schedule)

        # CompVis' DDIM, and every scheduler config published since, ends at the first timestep, not at zero noise.
        final: Literal["zero", "first"] = "first" if request.sampler == "ddim" else "zero"
        offset = self.config.diffusion.offset
        sigmas = self.schedule.steps(request.steps, request.spacing, offset=offset, final=final)

        factor = self.config.vae.factor
        shape = (
            latent_channels,
            request.height // factor,
            request.width // factor,
        )
        noise = seeded_noise(request.seeds, shape)
        x = to_ve(noise(), sigmas[0]).to(weight.device)
        return _finished(SAMPLERS[request.sampler](denoise, x, sigmas, noise=noise))

    def generate(self, request: Request) -> list[Image.Image]:
        """Make the pictures that `request` asks for.

        Raises ValueError and FloatingPointError as `stream` and `decode` do.
        """
        for step in self.stream(request):
            latents = step.x
        return self.decode(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Turn clean latents, b c h w, into pictures: the x of the last step, or the x0 of any.

        One picture at a time, so that memory does not grow with their number.
        Raises FloatingPointError for latents or pictures with numbers that are not finite: a network overflowed.
        """
        weight = next(self.vae.parameters())
        _check_finite(latents, "UNet", next(self.unet.parameters()).dtype, "dtype")
        pictures = []
        for latent in latents.to(weight):
            image = self.vae.decode(latent[None])
            _check_finite(image, "VAE", weight.dtype, "vae_dtype")
            pictures += to_pil(image)
        return pictures

    def _conditions(self, request: Request) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """What follows the timesteps in a call of the UNet, with the prompt and with the negative prompt."""
        texts = [request.prompt, request.negative_prompt]
        encoded = self.text_encoder.encode(texts)
        cond, uncond = (
            [
                None if part is None else part[i : i + 1].expand(request.images, *part.shape[1:])
                for part in encoded
            ]
            for i in range(len(texts))
        )
        return cond, uncond


def load(path: str | Path = BUNDLED, placement: Placement | None = None) -> Pipeline:
    """Load a model: a folder of ours or of diffusers, or a single .safetensors file of the official layout.

    path: by default the small model that ships with the package, wherever that is installed.
    placement: device, precision and attention, see `Placement`.
    Raises ValueError for a model that is absent, damaged or not supported, and for a placement that cannot be used.
    """
    device, dtype, vae_dtype, attend = (placement or Placement()).resolve()
    model = files.load(locate(path), dtype=dtype, vae_dtype=vae_dtype, device=device)
    for network in (model.unet, model.vae):
        set_attention(network, attend)
    return Pipeline(model.config, model.unet, model.vae, model.text_encoder)


def locate(path: str | Path) -> Path:
    """Return `path`, or where the bundled model is if `path` is its name and nothing here has that name."""
    if Path(path) == Path(BUNDLED) and not Path(path).exists():
        package = Path(__file__).parent
        for root in (package.parent, package):  # the repository; the installed package
            if (root / BUNDLED).is_dir():
                return root / BUNDLED
    return Path(path)


@torch.no_grad()
def _finished(steps: Iterator[Step]) -> Iterator[Step]:
    """The steps, the last one's x scaled from noise level sigma (0, but for DDIM) to the latents it stands for."""
    for step in steps:
        last = step.index == step.total - 1
        yield dataclasses.replace(step, x=to_vp(step.x, step.sigma)) if last else step


def _either(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check_finite(tensor: Tensor, network: str, dtype: torch.dtype, option: str) -> None:
    if not tensor.isfinite().all():
        name = str(dtype).removeprefix("torch.")
        cause = f"load the model with {option} float32"
        if dtype == torch.float32:
            cause = "its weights are damaged"
        raise FloatingPointError(
            f"the {network} gave numbers that are not finite in {name}: {cause}"
        )


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be valid Unicode text, got {value!r}") from error


def _check_integer(
    name: str, value: object, low: float = -math.inf, high: float = math.inf
) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number{_range(low, high)}, got {value!r}")


def _check_number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} must be a finite number{_range(low, high)}, got {value!r}")


def _range(low: float, high: float) -> str:
    if low == -math.inf:
        return ""
    return f", {low} or more" if high == math.inf else f" from {low} to {high}"


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
