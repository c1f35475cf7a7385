"""Edit a picture by an instruction: InstructPix2Pix (Brooks et al. 2023).

The UNet of an editing model has 2 c input channels for c latent channels: the noisy latents, and those of the picture.
The picture's latents are the mode of the VAE's distribution. They are not multiplied by `VAEConfig.scaling_factor`,
unlike the noisy latents. Zeros in their place stand for no picture.

Each step combines three predictions: with instruction and picture, with the picture alone, and with neither. For the
last two the text is the negative prompt, which is empty by default.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning import Condition
from ldm.diffusion.denoiser import Bind, Network, Rule, rescaled
from ldm.request import Plan


@dataclass(frozen=True)
class Pictured(Condition):
    """A condition with the latents of a picture, one row per image. picture: b c h w, not scaled."""

    picture: Tensor | None = None


def with_picture(condition: Condition, picture: Tensor) -> Pictured:
    """Add the latents of the picture, 1 c h w, to a condition."""
    fields = {f.name: getattr(condition, f.name) for f in dataclasses.fields(condition)}
    rows = picture.expand(len(condition.context), -1, -1, -1)
    return Pictured(**fields | {"picture": rows})


def taking_pictures(bind: Bind) -> Bind:
    """Make a `bind` for conditions of the class `Pictured`. Its networks get the picture after the noisy latents."""

    def bind_picture(condition: Any) -> Network:
        network = bind(condition)
        return lambda z, timesteps: network(torch.cat([z, condition.picture.to(z)], dim=1), timesteps)

    return bind_picture


def two_scales(scale: float, image_scale: float, rescale: float = 0.0) -> Rule:
    """Make the rule of guidance by a text and a picture, for three conditions: both, the picture alone, and neither.

    prediction = neither + image_scale (picture - neither) + scale (both - picture)   (Brooks et al. 2023, eq. 3)

    scale: how closely to follow the instruction. image_scale: how closely to follow the picture.
    rescale: as in `classifier_free`, with the prediction for both as the conditional one.
    """

    def rule(predictions: Sequence[Tensor]) -> Tensor:
        both, picture, neither = predictions
        return rescaled(neither + image_scale * (picture - neither) + scale * (both - picture), both, rescale)

    return rule


def edit(pipe: Any, plan: Plan, conditions: Sequence[Condition], bind: Bind) -> tuple[list[Condition], Bind, Rule]:
    """Return the three conditions, the `bind` for them and the rule, for `Pipeline.denoiser`.

    conditions: of the instruction and of the negative prompt.
    """
    source: Any = plan.request.source
    image = source.resized(plan.width, plan.height)
    picture = pipe.encode_image(image) / pipe.config.vae.scaling_factor
    instruction, negative = conditions
    both, alone = with_picture(instruction, picture), with_picture(negative, picture)
    neither = with_picture(negative, torch.zeros_like(picture))
    rule = two_scales(plan.guidance_scale, source.image_guidance, plan.request.guidance_rescale)
    return [both, alone, neither], taking_pictures(bind), rule
