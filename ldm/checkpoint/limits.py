"""What the numbers of a configuration may be: a file that says anything else is damaged, or made to waste memory."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as short

from ldm.checkpoint.parts import TOWERS, micro_conditioning
from ldm.config import DiffusionConfig, ModelConfig, TextConfig, UNetConfig, VAEConfig

MAX_LEVELS = 10  # resolutions; all models have 3 or 4
MAX_BLOCKS = 500  # residual and transformer blocks of a network; SDXL's UNet has 85
MAX_WIDTH = 2**16  # SDXL's UNet takes a vector of 2,816
MAX_VOCABULARY = 2**20  # CLIP's has 49,408 tokens
MAX_TOKENS = 4096  # of a prompt; CLIP reads 77
MAX_TIMESTEPS = 100_000  # models are trained with 1,000
MAX_NAME = 200  # characters

_Limit = tuple[
    str, float, float, float
]  # what it is, its value, the smallest and the largest allowed


def check_limits(config: ModelConfig, where: str | Path) -> None:
    """Raise ValueError for a number that no model has, or numbers that do not go together; `where` names the file.

    Even without memory, the networks of an absurd configuration would take hours to build.
    """
    if not config.name.isprintable() or len(config.name) > MAX_NAME:
        raise ValueError(
            f"the model in {where} has the name {short(config.name)}; names are {MAX_NAME} printable characters at most"
        )
    for what, value, low, high in _limits(config):
        if not low <= value <= high:
            raise ValueError(
                f"{what} of {where} is said to be {short(value)}; models have {low:,} to {high:,}"
            )
    width = sum(text.width for text in config.text)
    if width != config.unet.context_dim:
        raise ValueError(
            f"the text encoder of {where} is {width} wide, its unet attends to {config.unet.context_dim}"
        )
    try:
        scalars = micro_conditioning(config.unet, config.text)
    except ValueError as error:
        raise ValueError(f"the configuration of {where} describes no model: {error}") from error
    if config.micro_conditioning != scalars:
        raise ValueError(
            f"the unet of {where} takes {', '.join(scalars) or 'no scalars'}, its configuration says "
            f"{short(config.micro_conditioning)}"
        )


def _limits(config: ModelConfig) -> Iterator[_Limit]:
    """Everything that has limits, such that no number is used for another's limit before it is checked itself."""
    yield from _of_unet(config.unet)
    yield from _of_vae(config.vae)
    yield "the number of text encoders", len(config.text), 1, len(TOWERS)
    for text in config.text:
        yield from _of_text(text)
    yield from _of_diffusion(config.diffusion)
    yield "the image size", config.image_size, config.vae.factor, MAX_WIDTH
    yield "the guidance scale", config.guidance_scale, 0, 1000
    yield "the number of steps", config.steps, 1, 1000


def _of_unet(config: UNetConfig) -> Iterator[_Limit]:
    yield "the number of the unet's levels", len(config.channels), 1, MAX_LEVELS
    for channels in config.channels:
        yield "the unet's width", channels, 1, MAX_WIDTH
    yield "the unet's depth", config.mid_depth, 0, MAX_BLOCKS
    yield "the unet's residual blocks per level", config.res_blocks, 1, MAX_BLOCKS
    down, up = config.depths()
    for depth in itertools.chain(*down, *up):
        yield "the unet's depth", depth, 0, MAX_BLOCKS
    blocks = config.mid_depth + sum(1 + depth for depth in itertools.chain(*down, *up))
    yield "the number of the unet's blocks", blocks, 1, MAX_BLOCKS
    for what, width in (
        ("input channels", config.in_channels),
        ("output channels", config.out_channels),
        ("text width", config.context_dim),
        ("vector", 1 if config.vector_dim is None else config.vector_dim),
    ):
        yield f"the unet's {what}", width, 1, MAX_WIDTH


def _of_vae(config: VAEConfig) -> Iterator[_Limit]:
    yield "the number of the vae's levels", len(config.channels), 1, MAX_LEVELS
    for channels in config.channels:
        yield "the vae's width", channels, 1, MAX_WIDTH
        yield "the vae's norm groups", config.norm_groups, 1, channels
    yield "the vae's residual blocks per level", config.res_blocks, 1, MAX_BLOCKS
    blocks = len(config.channels) * (2 * config.res_blocks + 1)
    yield "the number of the vae's blocks", blocks, 1, MAX_BLOCKS
    yield "the vae's latent channels", config.latent_channels, 1, MAX_WIDTH
    yield "the vae's scaling factor", config.scaling_factor, 1e-6, 1e6


def _of_text(config: TextConfig) -> Iterator[_Limit]:
    yield "the text encoder's width", config.width, 1, MAX_WIDTH
    yield "the text encoder's layers", config.layers, 1, MAX_BLOCKS
    yield "the text encoder's heads", config.heads, 1, config.width
    yield "the text encoder's mlp", config.mlp, 1, MAX_WIDTH
    yield "the text encoder's projection", config.projection or 1, 1, MAX_WIDTH
    yield "the text encoder's vocabulary", config.vocab_size, 1, MAX_VOCABULARY
    yield "the text encoder's tokens", config.max_length, 3, MAX_TOKENS
    yield "the text encoder's padding", config.pad_id, 0, config.vocab_size - 1
    yield "the text encoder's output layer", config.output_layer, -config.layers - 1, config.layers


def _of_diffusion(config: DiffusionConfig) -> Iterator[_Limit]:
    yield "the first beta", config.beta_start, 1e-12, 1
    yield "the last beta", config.beta_end, config.beta_start, 1
    yield "the number of timesteps", config.timesteps, 2, MAX_TIMESTEPS
    yield "the timesteps' offset", config.offset, 0, config.timesteps
