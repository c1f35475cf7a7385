"""The configuration of a model: its networks and its diffusion process, as frozen dataclasses."""

import dataclasses
import math
import sys
import types
import typing
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Any, Literal

from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.schedule import BetaSchedule, Spacing

Layout = Literal["ldm", "diffusers"]  # of a saved model: one official file, or a folder
LARGEST_SIDE = 2**16  # the most pixels of a side of a picture


def option(default: Any, help: str, flag: str | None = None, *, low: float = -math.inf, high: float = math.inf) -> Any:
    """Declare a field of a dataclass that is an option of the command.

    help: the text of --help. flag: the name on the command line (default: the field's, with dashes).
    low, high: the range that `check_fields` allows.
    """
    return field(default=default, metadata={"help": help, "flag": flag, "range": (low, high)})


def check_fields(value: Any, *, largest: float = math.inf) -> None:
    """Raise ValueError if a field of the dataclass `value` has another type than declared, or is out of its range.

    largest: the upper limit of all numbers.
    """
    for f in dataclasses.fields(value):
        union = typing.get_origin(f.type) in (typing.Union, types.UnionType)
        got, (kind, *others) = getattr(value, f.name), typing.get_args(f.type) if union else (f.type,)
        low, high = f.metadata.get("range", (-math.inf, math.inf))
        if got is None and type(None) in others:
            continue
        if typing.get_origin(kind) is Literal:
            if got not in (words := typing.get_args(kind)):
                raise ValueError(f"{f.name} must be one of {', '.join(words)}, got {got!r}")
        elif kind is bool and not isinstance(got, bool):
            raise ValueError(f"{f.name} must be True or False, got {got!r}")
        elif kind is str and set(others) <= {type(None), tuple[str, ...]}:
            for text in got if tuple[str, ...] in others and isinstance(got, tuple | list) else [got]:
                _check_text(f.name, text)
        elif kind in (int, float):
            check_number(f.name, got, low, min(high, largest), whole=kind is int)
        elif typing.get_origin(kind) is tuple and ... not in typing.get_args(kind):
            if not isinstance(got, tuple | list) or len(got) != len(typing.get_args(kind)):
                raise ValueError(f"{f.name} must be {len(typing.get_args(kind))} numbers, got {got!r}")
            for number in got:
                check_number(f.name, number, low, high)


def check_number(name: str, got: Any, low: float = -math.inf, high: float = math.inf, *, whole: bool = False) -> None:
    """Raise ValueError unless `got` is a finite number, or a whole one, from `low` to `high`."""
    real = isinstance(got, int if whole else int | float) and not isinstance(got, bool)
    # NaN fails these comparisons, and so does an integer that is too large for a float.
    if not real or not (whole or abs(got) <= sys.float_info.max) or not low <= got <= high:
        limits = f", {low} or more" if high == math.inf else f" from {low} to {high}"
        kind = "whole" if whole else "finite"
        raise ValueError(f"{name} must be a {kind} number{'' if low == -math.inf else limits}, got {got!r}")


def _check_text(name: str, got: object) -> None:
    if not isinstance(got, str):
        raise ValueError(f"{name} must be text, got {got!r}")
    try:
        got.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be valid Unicode text, got {got!r}") from error


Mid = Literal["full", "residual", "none"]
Depths = tuple[int | tuple[int, ...], ...]  # per level, as one number or as one per residual block


@dataclass(frozen=True)
class UNetConfig:
    """The denoising network (Rombach et al. 2022; Podell et al. 2023 for SDXL)."""

    in_channels: int = 4  # 9 for inpainting (latent, mask, masked latent), 8 for instruct-pix2pix
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # one entry per level, full resolution first
    res_blocks: int = 2  # per level going down; one more per level going up
    depth: Depths = (1, 1, 1, 0)  # transformer blocks after a residual block; 0: no attention
    up_depth: Depths | None = None  # the same for the decoder, deepest level first; None: `depth` reversed
    mid: Mid = "full"  # residual: only the first residual block
    mid_depth: int = 1  # transformer blocks of a full middle; 0 for the others
    heads: tuple[int, ...] = (8, 8, 8, 8)  # the number of heads, not their width
    context_dim: int = 768
    vector_dim: int | None = None  # pooled text and sizes (SDXL); None: timestep conditioning only
    guidance_dim: int | None = None  # width of the guidance scale's embedding (LCM: 256); None: no embedding
    linear_projection: bool = False  # linear instead of 1x1-convolution projections around transformers
    norm_groups: int = 32
    upcast_attention: bool = False  # queries and keys in fp32 where fp16 overflows (SD 2.1 at 768)

    def __post_init__(self) -> None:
        """Check the numbers, and normalize them, so that equal architectures compare equal."""
        up_depth = self.depth[::-1] if self.up_depth is None else self.up_depth
        if not len(self.channels) == len(self.depth) == len(up_depth) == len(self.heads):
            raise ValueError(
                "channels, depth, up_depth and heads need one entry per level, got "
                f"{short(self.channels)}, {short(self.depth)}, {short(self.up_depth)} and {short(self.heads)}"
            )
        depth = _shortest("depth", self.depth, self.res_blocks)
        up_depth = _shortest("up_depth", up_depth, self.res_blocks + 1)
        object.__setattr__(self, "depth", depth)
        object.__setattr__(self, "up_depth", None if up_depth == depth[::-1] else up_depth)
        if self.mid != "full":
            object.__setattr__(self, "mid_depth", 0)
        elif self.mid_depth < 1:
            raise ValueError(
                f"mid_depth must be 1 or more in a full middle, got {short(self.mid_depth)}; "
                "for a middle without transformer set mid to 'residual' or 'none'"
            )
        for channels, heads in zip(self.channels, self.heads, strict=True):
            for divisor, what in ((self.norm_groups, "norm_groups"), (heads, "heads")):
                if divisor < 1 or channels % divisor:
                    raise ValueError(f"{short(channels)} channels are not divisible by {short(divisor)} {what}")
        if self.guidance_dim is not None and (self.guidance_dim < 4 or self.guidance_dim % 2):
            raise ValueError(f"guidance_dim must be even and 4 or more, got {short(self.guidance_dim)}")

    @property
    def is_sdxl(self) -> bool:
        """Whether the UNet takes pooled text and sizes, as SDXL base and its refiner do."""
        return self.vector_dim is not None

    def depths(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Return the number of transformer blocks after each residual block, per level: encoder's, decoder's."""
        up_depth = self.depth[::-1] if self.up_depth is None else self.up_depth
        return (
            [_per_block(level, self.res_blocks) for level in self.depth],
            [_per_block(level, self.res_blocks + 1) for level in up_depth],
        )


def _per_block(level: int | tuple[int, ...], blocks: int) -> tuple[int, ...]:
    return level if isinstance(level, tuple) else (level,) * blocks


def _shortest(name: str, depths: Depths, blocks: int) -> Depths:
    """Check `depths`, and write a level whose residual blocks have equal depths as one number."""
    for level in depths:
        numbers = level if isinstance(level, tuple) else (level,)
        if min(numbers, default=-1) < 0 or (isinstance(level, tuple) and len(level) != blocks):
            raise ValueError(
                f"{name} needs a number from 0 per level, or one for each of its {blocks} residual blocks, got "
                f"{short(level)}"
            )
    return tuple(level[0] if isinstance(level, tuple) and len(set(level)) == 1 else level for level in depths)


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder with KL-regularized latents (Rombach et al. 2022, section 3.1)."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    res_blocks: int = 2
    latent_channels: int = 4
    norm_groups: int = 32
    scaling_factor: float = 0.18215  # 1 / (standard deviation of the training data's latents)
    overflows_fp16: bool = False  # SDXL's own VAE: its activations are too large for fp16

    @property
    def factor(self) -> int:
        """How many image pixels one latent pixel spans along each side."""
        return int(2 ** (len(self.channels) - 1))


@dataclass(frozen=True)
class TextConfig:
    """One CLIP text tower, and the choice of the outputs that condition the UNet."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    projection: int | None = None  # width of the pooled projection; None: the tower has none
    vocab_size: int = 49408
    max_length: int = 77
    pad_id: int = 49407  # 0 for the OpenCLIP towers, where "!" is still 256
    output_layer: int = -1  # the hidden state used as context: -1 the last, -2 the one before
    final_norm: bool = True  # apply the tower's final LayerNorm to that hidden state

    def context_layer(self, clip_skip: int | None = None) -> int:
        """Return the number of layers before the context, from `clip_skip` if given, else from `output_layer`.

        clip_skip: counted from the end, as in A1111: 1 is the last layer, 2 the one before. SDXL's default is 2.
        Raises ValueError for a clip_skip beyond the layers of the tower.
        """
        if clip_skip is None:
            back = self.output_layer
            return back if back >= 0 else self.layers + 1 + back
        if not 1 <= clip_skip <= self.layers:
            raise ValueError(
                f"clip_skip must be from 1 (the last layer) to {self.layers}, the layers of this model's text encoder, "
                f"got {clip_skip}"
            )
        return self.layers + 1 - clip_skip


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process, the prediction type, and the spacing of the timesteps that the authors sample with."""

    prediction: Prediction = "eps"
    betas: BetaSchedule = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: int = 1000
    zero_terminal_snr: bool = False
    spacing: Spacing = "leading"
    offset: int = 1  # added to the leading timesteps


@dataclass(frozen=True)
class ModelConfig:
    """All numbers that a model is built from, and the defaults for sampling with it."""

    name: str = "custom"
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: tuple[TextConfig, ...] = field(default_factory=lambda: (TextConfig(),))
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    image_size: int = 512  # pixels per side at which the model was trained
    guidance_scale: float = 7.5  # the defaults of the model's authors, as the next two
    steps: int = 25
    sampler: str = "dpmpp_2m"
    zero_negative: bool = False  # without a negative prompt, condition on zeros (SDXL base), not on the encoded ""

    @property
    def inpaints(self) -> bool:
        """Whether the UNet takes a mask and the latents of a masked picture, in addition to the noisy latents."""
        return self.unet.in_channels == 2 * self.vae.latent_channels + 1

    @property
    def edits(self) -> bool:
        """Whether the UNet takes the latents of a picture, in addition to the noisy latents: instruct-pix2pix."""
        return self.unet.in_channels == 2 * self.vae.latent_channels

    @property
    def micro_conditioning(self) -> tuple[str, ...]:
        """The names of the scalars that follow the pooled text in the UNet's vector, in order; () without a vector.

        Each scalar is embedded in 256 numbers.
        Raises ValueError for any number of scalars except 6 (SDXL base) and 5 (its refiner).
        """
        if self.unet.vector_dim is None:
            return ()
        pooled = next((t.projection for t in reversed(self.text) if t.projection), 0)
        for scalars in (BASE_CONDITIONING, REFINER_CONDITIONING):
            if self.unet.vector_dim == pooled + 256 * len(scalars):
                return scalars
        raise ValueError(
            f"the UNet takes a vector of {self.unet.vector_dim}, the pooled text is {pooled} wide: each scalar adds "
            "256, and SDXL base has 6, its refiner 5"
        )


_SIZE_AND_CROP = ("original_height", "original_width", "crop_top", "crop_left")
BASE_CONDITIONING = (*_SIZE_AND_CROP, "target_height", "target_width")
REFINER_CONDITIONING = (*_SIZE_AND_CROP, "aesthetic_score")
