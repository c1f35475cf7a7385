"""The picture of image to image, inpainting and editing, and the mask of the part to repaint."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from PIL import Image
from torch import Tensor

from ldm.config import LARGEST_SIDE, check_fields, option
from ldm.geometry import fit
from ldm.pictures import read_picture


@dataclass(frozen=True)
class Mask:
    """The part of a source picture to repaint: inpainting. `ldm.masks` says how masks are read."""

    # A file or a picture; None: the source picture itself if its transparent part is repainted, else no mask.
    image: str | Path | Image.Image | None = dataclasses.field(default=None, hash=False)
    repaint: Literal["white", "transparent"] = option("white", "the part of the mask to repaint; gray joins later")
    extend: str | None = option(None, "pixels to add at the sides and to paint, such as left=64,right=32")
    crop: int | None = option(
        None, "let the model work on the masked part and this many pixels around it", "--inpaint-crop", low=0
    )
    feather: int = option(0, "pixels around the repainted part to blend; with 0 they stay as they are", low=0)

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_fields(self, largest=LARGEST_SIDE)
        if not isinstance(self.image, str | Path | Image.Image | None):
            raise ValueError(f"the mask must be the path of a picture or a PIL picture, got {self.image!r}")


@dataclass(frozen=True)
class Source:
    """A picture to start from: image to image, or with a mask inpainting, or with `image_guidance` editing.

    Sampling starts below the highest noise level, from the picture's latents plus noise of that level. At strength 1,
    inpainting and editing start from noise alone.
    """

    # A file, or a picture; EXIF rotation is applied, transparency becomes white. A picture has no hash.
    image: str | Path | Image.Image = dataclasses.field(hash=False)
    strength: float = option(None, "share of the steps that run, above 0 to 1 (default: 0.6; inpaint and edit: 1)")
    exact_steps: bool = option(False, "run all steps, starting at the noise level that the strength gives")
    start_sigma: float | None = option(None, "noise level to start at, instead of the strength; all steps run")
    resize: Literal["crop", "stretch"] = option("crop", "how to resize the picture: crop keeps its aspect ratio")
    image_guidance: float | None = option(
        None, "how closely an editing model follows the picture; more keeps more of it (default: 1.5)", low=0
    )  # None: no editing
    mask: Mask | None = None  # with a mask, the picture is stretched to the size of the request

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.strength is None:
            object.__setattr__(self, "strength", 0.6 if self.task == "img2img" else 1.0)
        check_fields(self)
        if not isinstance(self.image, str | Path | Image.Image):
            raise ValueError(f"the source must be the path of a picture or a PIL picture, got {self.image!r}")
        if not isinstance(self.mask, Mask | None):
            raise ValueError(f"mask must be an ldm.Mask, such as ldm.Mask('mask.png'), got {self.mask!r}")
        if self.mask and self.image_guidance is not None:
            raise ValueError("editing repaints the whole picture: leave out the mask, or image_guidance")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {self.strength}")

    @cached_property
    def picture(self) -> Image.Image:
        """The picture as 8-bit RGB. Raises ValueError if it cannot be read."""
        return read_picture(self.image)

    def resized(self, width: int, height: int) -> Image.Image:
        """Return the picture in another size, as `resize` says."""
        return fit(self.picture, width, height, self.resize)

    @property
    def task(self) -> Literal["img2img", "inpaint", "edit"]:
        """The task that the picture is for."""
        return "inpaint" if self.mask else "img2img" if self.image_guidance is None else "edit"

    @property
    def from_noise(self) -> bool:
        """Whether sampling starts from noise alone: inpainting and editing do at strength 1."""
        return self.task != "img2img" and self.strength == 1 and self.start_sigma is None

    def draws(self, *, wide: bool) -> int:
        """Return how many draws of noise come before those of the sampler.

        They are for the picture's latents, the start, and the masked picture. wide: the UNet takes a picture itself;
        such a model does not encode the picture for a start from noise.
        """
        return 2 + bool(self.mask) - (wide and self.from_noise)

    def sigmas(self, levels: Callable[..., Tensor], steps: int) -> Tensor:
        """Return the noise levels of the steps that run: often only the last ones of `steps`.

        levels: returns the levels of all steps, or with `start=sigma` those of as many steps below sigma.
        Raises ValueError if no step runs.
        """
        if self.start_sigma is not None:
            return levels(start=self.start_sigma)
        run = int(steps * self.strength)  # rounded down, as in diffusers
        if run == 0:
            raise ValueError(
                f"strength {self.strength} of {steps} steps runs no step: raise one of them, or give start_sigma"
            )
        sigmas = levels()[steps - run :]
        return levels(start=float(sigmas[0])) if self.exact_steps else sigmas
