"""ControlNets for a request: reading the hints, loading the networks, and the steps at which each one acts.

The hint of a `Control` is its picture as RGB in [0, 1], with the size of the pictures to make. A picture of another
size is scaled by Lanczos resampling until it covers this size, and its middle is kept. With the detector "canny" the
hint is the edges of the resized picture, white on black.

`start` and `end` are shares of the steps that run, as `control_guidance_start` and `control_guidance_end` in diffusers.
Step i of n has the ControlNet if start <= i / n and (i + 1) / n <= end. The ControlNet acts at the noise levels where
these steps begin. Heun's second prediction of a step counts for the level where the next step begins.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.conditioning import Condition
from ldm.config import check_fields, option
from ldm.diffusion.denoiser import Denoiser
from ldm.geometry import fit
from ldm.images import to_tensor
from ldm.models.controlnet import Applied, Controlled, ControlNet
from ldm.pictures import read_picture

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline
    from ldm.request import Plan


@dataclass(frozen=True)
class Control:
    """A ControlNet, and the picture that it follows."""

    model: str | Path  # a file or folder, or a name in `Pipeline.controlnets`
    image: str | Path | Image.Image = dataclasses.field(hash=False)  # a file, or a picture, as `Source.image`
    weight: float = option(1.0, "factor of what the ControlNet adds to the UNet")
    start: float = option(0.0, "share of the steps at which the ControlNet begins", "--control-from", low=0, high=1)
    end: float = option(1.0, "share of the steps at which it ends", "--control-to", low=0, high=1)
    guess: bool = option(False, "follow the picture also without a prompt: guess mode")
    detector: Literal["canny"] | None = None  # draws the hint from the picture; None: the picture is the hint

    def __post_init__(self) -> None:
        """Check the fields. Raises ValueError also if `start` and `end` leave no share of the steps."""
        check_fields(self)
        if not isinstance(self.model, str | Path):
            raise ValueError(f"a ControlNet is named by its path, a str or a Path, got {self.model!r}")
        if not isinstance(self.image, str | Path | Image.Image):
            raise ValueError(f"the control must be the path of a picture or a PIL picture, got {self.image!r}")
        if not self.start < self.end:
            raise ValueError(
                f"a ControlNet must end after it begins, got the shares {self.start} and {self.end} of the steps"
            )

    @cached_property
    def picture(self) -> Image.Image:
        """The picture as 8-bit RGB. Raises ValueError if it cannot be read, and for "canny" without OpenCV."""
        if self.detector == "canny":
            check_opencv()
        return read_picture(self.image)


def hint(control: Control, width: int, height: int) -> Tensor:
    """Return the hint: 1 3 h w in [0, 1].

    Raises ValueError as `Control.picture` does.
    """
    picture = fit(control.picture, width, height)
    if control.detector == "canny":
        picture = canny(picture)
    return (to_tensor(picture) + 1) / 2


def check_opencv() -> None:
    """Raise ValueError if OpenCV, which the extra `control` installs, is not there."""
    if find_spec("cv2") is None:
        raise ValueError(
            "canny needs OpenCV, which is not installed: install the extra with pip install 'ldm[control]', or give a "
            "picture of the edges"
        )


def canny(picture: Image.Image, low: int = 100, high: int = 200) -> Image.Image:
    """Draw the edges of an RGB picture, white on black (Canny 1986).

    low, high: the thresholds of the gradient; the defaults are usual with the published ControlNets.
    Raises ValueError without OpenCV.
    """
    check_opencv()
    import cv2

    edges = cv2.Canny(np.asarray(picture), low, high)
    return Image.fromarray(edges).convert("RGB")


def networks(pipe: "Pipeline", controls: Sequence[Control]) -> list[ControlNet]:
    """Return the ControlNets, and load those that `pipe.controlnets` does not hold, with the placement of `pipe`.

    Raises ValueError for a path that holds no ControlNet, and for a ControlNet of another family than the model.
    """
    from ldm.checkpoint.controlnets import load_controlnet

    weight = next(pipe.unet.parameters())
    for name in (str(control.model) for control in controls):
        if name not in pipe.controlnets:
            device = torch.device("cpu") if pipe.placement.offload else weight.device
            network = load_controlnet(name, unet=pipe.unet, dtype=weight.dtype, device=device)
            pipe.placement.apply({"controlnet": network})
            pipe.controlnets[name] = network
    return [pipe.controlnets[str(control.model)] for control in controls]


@contextmanager
def all_at_work(pipe: "Pipeline", name: str, controls: Sequence[Control]) -> Iterator[None]:
    """Keep the network `name` of `pipe` and the ControlNets on the device."""
    with ExitStack() as stack:
        stack.enter_context(pipe.at_work(name))
        for control, network in zip(controls, networks(pipe, controls), strict=True):
            key = f"controlnet {control.model}"
            if key not in pipe._at_work or pipe._at_work[key][0] is not network:
                pipe._at_work[key] = network, pipe.placement.at_work(network)
            stack.enter_context(pipe._at_work[key][1])
        yield


def controlled(pipe: "Pipeline", plan: "Plan", conditions: Sequence[Condition]) -> Denoiser:
    """Make the denoiser of `Pipeline.denoiser` with the ControlNets and image prompts of the request.

    conditions: the prompt's first.
    Raises ValueError as `networks`, `hint`, `levels` and `ldm.image_prompt.prompted` do.
    """
    controls = plan.request.controls
    bounds = [levels(control, plan.sigmas) for control in controls]
    hints = [hint(control, plan.width, plan.height) for control in controls]
    rows = [torch.full((len(each.context),), i == 0, device=each.context.device) for i, each in enumerate(conditions)]
    marked = [dataclasses.replace(c, is_prompt=is_prompt) for c, is_prompt in zip(conditions, rows, strict=True)]

    def acting(sigma: float) -> tuple[int, ...]:
        return tuple(i for i, (low, high) in enumerate(bounds) if low < sigma <= high)

    made: dict[tuple[int, ...], Denoiser] = {}  # one denoiser for each set of ControlNets that act together
    with _prompted(pipe, plan) as base, all_at_work(pipe, "unet", controls):
        weight, nets = next(pipe.unet.parameters()), networks(pipe, controls)
        applied = [
            Applied(net, picture.to(weight), control.weight, control.guess)
            for control, net, picture in zip(controls, nets, hints, strict=True)
        ]
        for chosen in dict.fromkeys(map(acting, plan.sigmas[:-1].tolist())):
            unet = Controlled(base, [applied[i] for i in chosen]) if chosen else base
            made[chosen] = pipe.denoiser(plan, marked, pipe.binding(unet))
    if len(made) == 1:
        return next(iter(made.values()))
    return lambda x, sigma: made[acting(float(sigma))](x, sigma)


def _prompted(pipe: "Pipeline", plan: "Plan") -> AbstractContextManager[Any]:
    """Return a context manager that yields the UNet of `pipe`, with the image prompts of the request."""
    if not plan.request.image_prompts:
        return nullcontext(pipe.unet)
    from ldm.image_prompt import prompted

    return prompted(pipe, plan.request.image_prompts)


def levels(control: Control, sigmas: Tensor) -> tuple[float, float]:
    """Return the noise levels, low < sigma <= high, at which the ControlNet acts.

    The limits lie in the middle between the levels of two steps. Before the first step and after the last step there
    is no limit.
    sigmas: the levels of the steps that run, n + 1. Raises ValueError if the share of the steps holds none.
    """
    n = len(sigmas) - 1
    on = [i for i in range(n) if control.start <= i / n and (i + 1) / n <= control.end]
    if not on:
        raise ValueError(
            f"the ControlNet acts in none of the {n} steps: none lies between the shares {control.start} and "
            f"{control.end}; widen them, or take more steps"
        )
    first, last = on[0], on[-1]
    high = float(sigmas[first - 1] + sigmas[first]) / 2 if first else math.inf
    low = float(sigmas[last] + sigmas[last + 1]) / 2 if last + 1 < n else -math.inf
    return low, high
