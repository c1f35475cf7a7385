"""Prompts for regions of a picture: at each step each prompt estimates the picture, and the estimates are blended.

    x0 = sum_i w_i x0_i / sum_i w_i   (MultiDiffusion, Bar-Tal et al. 2023; see `ldm.diffusion.regions`)

with w_i = weight_i m_i for the mask m_i of region i. The prompt of the request has w_0 = max(0, 1 - sum_i m_i), so it
fills the rest of the picture. Each prompt has its own guidance, with the negative prompt of the request. A step takes
one prediction for each region, beside that of the request.

A mask is read as for inpainting: white is 1, black and transparent pixels are 0. It is stretched to the picture, and a
pixel of the latents takes the mean of its pixels. A box, such as "left=0,top=0,width=0.5,height=1", is in shares of the
picture's sides. Without left or top it begins at 0; without width or height it reaches to the right or bottom side.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ldm.conditioning import Condition
from ldm.config import check_fields, option
from ldm.diffusion.denoiser import Bind, Denoiser
from ldm.diffusion.regions import blend
from ldm.images import to_tensor
from ldm.masks import read_mask

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline
    from ldm.request import Plan

SHARES = ("left", "top", "width", "height")


@dataclass(frozen=True)
class RegionalPrompt:
    """A prompt for a part of the picture."""

    mask: str | Path | Image.Image = dataclasses.field(hash=False)  # a file, a picture, or a box
    prompt: str
    weight: float = option(
        1.0, "weight of the region where it overlaps others, 0.001 to 1000", "--region-weight", low=1e-3, high=1e3
    )

    def __post_init__(self) -> None:
        """Check the fields. Raises ValueError also for a wrong box."""
        check_fields(self)
        if not isinstance(self.mask, str | Path | Image.Image):
            raise ValueError(f"the mask of a region must be a path, a PIL picture or a box, got {self.mask!r}")
        _ = self.box

    @cached_property
    def box(self) -> dict[str, float] | None:
        """The left and top side, the width and the height of a box; None for a mask."""
        if not isinstance(self.mask, str) or "=" not in self.mask or Path(self.mask).exists():
            return None
        pairs = [word.partition("=")[::2] for word in self.mask.replace(" ", "").split(",")]
        try:
            given = {name: float(number) for name, number in pairs}
        except ValueError:
            given = {"": 0.0}
        left, top = given.get("left", 0.0), given.get("top", 0.0)
        width, height = given.get("width", 1 - left), given.get("height", 1 - top)
        inside = 0 <= left < left + width <= 1 and 0 <= top < top + height <= 1
        if not inside or set(given) - set(SHARES) or len(given) < len(pairs):
            raise ValueError(
                "a box lies in the picture, with shares of its sides such as left=0,top=0,width=0.5,height=1, "
                f"got {self.mask!r}"
            )
        return dict(zip(SHARES, (left, top, width, height), strict=True))

    @cached_property
    def picture(self) -> Image.Image | None:
        """The mask in levels of gray; None for a box. Raises ValueError if it cannot be read or is black."""
        if self.box is not None:
            return None
        levels = read_mask(self.mask, "white")
        if levels.getbbox() is None:
            raise ValueError(f"the mask of the region {self.prompt!r} has no white part: the region would be empty")
        return levels

    def on(self, height: int, width: int) -> Tensor:
        """Return the mask on latents of this size, h w in [0, 1]."""
        if self.picture is not None:
            small = self.picture.resize((width, height), Image.Resampling.BOX)
            return to_tensor(small.convert("RGB"))[0, 0] * 0.5 + 0.5
        box = self.box or {}
        across = _covered(box["left"], box["width"], width)
        return _covered(box["top"], box["height"], height)[:, None] * across


def regional(pipe: "Pipeline", plan: "Plan", conditions: Sequence[Condition], bind: Bind | None = None) -> Denoiser:
    """Make the denoiser of `Pipeline.denoiser` for a request with regions.

    conditions: those of the request's own prompt.
    """
    request = dataclasses.replace(plan.request, regions=())
    denoisers = [pipe.denoiser(dataclasses.replace(plan, request=request), conditions, bind)]
    request = dataclasses.replace(request, variation=None)  # another prompt varies that of the request alone
    for region in plan.request.regions:
        own = pipe.plan(dataclasses.replace(request, prompt=region.prompt))
        own = dataclasses.replace(own, sigmas=plan.sigmas)
        denoisers.append(pipe.denoiser(own, pipe.conditions(own), bind))
    return blend(denoisers, weights(plan.request.regions, *plan.latent_shape[1:]))


def weights(regions: Sequence[RegionalPrompt], height: int, width: int) -> Tensor:
    """Return the maps of weights on latents of this size, n h w: of the request's prompt, then those of the regions."""
    masks = torch.stack([region.on(height, width) for region in regions])
    for region, mask in zip(regions, masks, strict=True):
        if not mask.any():
            raise ValueError(
                f"the region {region.prompt!r} covers too little of {width} x {height} latent pixels: make it larger"
            )
    factors = torch.tensor([region.weight for region in regions])
    left = (1 - masks.sum(dim=0)).clamp(min=0)
    return torch.cat([left[None], factors[:, None, None] * masks])


def _covered(start: float, length: float, count: int) -> Tensor:
    """Return which share of each of `count` pixels a span covers; start and length are shares of the side."""
    edges = torch.arange(count + 1, dtype=torch.float64) / count
    low, high = edges[:-1].clamp(min=start), edges[1:].clamp(max=start + length)
    return ((high - low).clamp(min=0) * count).float()
