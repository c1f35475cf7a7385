"""Image prompts for a request: reading the pictures, loading IP-Adapters and vision towers, and the image tokens.

The vision tower sees a picture as CLIP was trained. The shorter side is scaled to the size of the tower by bicubic
resampling, the middle square is kept, and the colors are normalized. With guidance, the negative prompt has an image
prompt, too. It is zeros in place of the embedding. For IP-Adapter Plus it is the features of a gray picture, whose
normalized pixels are zero. The authors' code and diffusers do the same.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ldm.config import check_fields, option
from ldm.images import to_tensor
from ldm.models.ip_adapter import Applied, ImagePrompted, IPAdapter
from ldm.pictures import read_picture

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training pictures


@dataclass(frozen=True)
class ImagePrompt:
    """A picture that is a part of the prompt, and the IP-Adapter and the vision tower that read it."""

    model: str | Path  # the file of the IP-Adapter, or a name in `Pipeline.adapters`
    image: str | Path | Image.Image = dataclasses.field(hash=False)  # a file, or a picture, as `Source.image`
    encoder: str | Path  # the folder or file of the vision tower, or a name in `Pipeline.adapters`
    weight: float = option(1.0, "factor of what the picture adds to the text")

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        for what, path in (("an IP-Adapter", self.model), ("an image encoder", self.encoder)):
            if not isinstance(path, str | Path):
                raise ValueError(f"{what} is named by its path, a str or a Path, got {path!r}")
        if not isinstance(self.image, str | Path | Image.Image):
            raise ValueError(f"the image prompt must be the path of a picture or a PIL picture, got {self.image!r}")

    @cached_property
    def picture(self) -> Image.Image:
        """The picture as 8-bit RGB. Raises ValueError if it cannot be read."""
        return read_picture(self.image)


def pixels(picture: Image.Image, size: int) -> Tensor:
    """Return an RGB picture as the vision tower sees it: 1 3 size size."""
    short, long = sorted(picture.size)
    if short == 0:
        raise ValueError(f"the picture has no pixels: its size is {picture.width} x {picture.height}")
    if long > 100 * short:
        raise ValueError(f"the picture is too long and thin, {picture.width} x {picture.height} pixels: crop it")
    scaled = [size if side == short else size * long // short for side in picture.size]
    left, top = ((side - size) // 2 for side in scaled)
    picture = picture.resize((scaled[0], scaled[1]), Image.Resampling.BICUBIC)
    levels = (to_tensor(picture.crop((left, top, left + size, top + size))) + 1) / 2
    mean, std = (torch.tensor(numbers).reshape(3, 1, 1) for numbers in (MEAN, STD))
    return (levels - mean) / std


def image_tokens(adapter: IPAdapter, encoder: Any, picture: Image.Image) -> tuple[Tensor, Tensor]:
    """Return the image tokens for the prompt and for the negative prompt, 1 n context_dim each.

    encoder: transformers' `CLIPVisionModelWithProjection`.
    Raises ValueError if the features of the encoder have another width than those of the training.
    """
    config = encoder.config
    width = config.hidden_size if adapter.reads_patches else config.projection_dim
    if width != adapter.image_dim:
        raise ValueError(
            f"the IP-Adapter reads features of width {adapter.image_dim}, and the image encoder gives {width}: use "
            "the encoder that it was trained with (ViT-H for most, ViT-bigG for ip-adapter_sdxl)"
        )
    seen = pixels(picture, config.image_size).to(next(encoder.parameters()))
    patches = adapter.reads_patches
    found = features(encoder, torch.cat([seen, torch.zeros_like(seen)]) if patches else seen, patches=patches)
    tokens, negative = adapter.image_proj(found if patches else torch.cat([found, torch.zeros_like(found)])).chunk(2)
    return tokens, negative


def features(encoder: Any, seen: Tensor, *, patches: bool) -> Tensor:
    """Return the last hidden states but one of normalized pixels, b m d, or without `patches` the embeddings: b d."""
    found: Tensor = (
        encoder(seen, output_hidden_states=True).hidden_states[-2] if patches else encoder(seen).image_embeds
    )
    return found


@contextmanager
def prompted(pipe: "Pipeline", prompts: Sequence[ImagePrompt]) -> Iterator[ImagePrompted]:
    """Yield the UNet of `pipe` with image prompts, and keep the IP-Adapters on the device inside the block.

    The networks that `pipe.adapters` does not hold are loaded, with the device and dtype of the UNet.
    Raises ValueError for paths that hold no IP-Adapter or vision tower, and for those that do not fit together.
    """
    from ldm.checkpoint.ip_adapters import load_image_encoder, load_ip_adapter

    weight, held = next(pipe.unet.parameters()), pipe.adapters
    placed: dict[str, Any] = {
        "dtype": weight.dtype,
        "device": torch.device("cpu") if pipe.placement.offload else weight.device,
    }
    with ExitStack() as stack:
        applied = []
        for prompt in prompts:
            model, tower = str(prompt.model), str(prompt.encoder)
            if model not in held:
                held[model] = load_ip_adapter(model, unet=pipe.unet, **placed)
            if tower not in held:
                held[tower] = load_image_encoder(tower, **placed)
            stack.enter_context(pipe.placement.at_work(held[model]))
            with pipe.placement.at_work(held[tower]):
                tokens = image_tokens(held[model], held[tower], prompt.picture)
            applied.append(Applied(held[model], *tokens, prompt.weight))
        yield ImagePrompted(pipe.unet, applied)
