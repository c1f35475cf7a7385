"""The stages of the `Pipeline` for inpainting: the start, the network and the denoiser of a request with a mask.

Text-to-image models keep the known latents with `ldm.diffusion.inpainting.keep`. For c latent channels, the UNet of an
inpainting model has 2c + 1 input channels: noisy latents, mask, and latents of the masked picture.

Noise is drawn in the order of diffusers: for the latents of the picture, the initial noise, and for the latents of the
masked picture. A text-to-image model does not use the third draw. An inpainting model at strength 1 has no first draw.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion import inpainting, samplers
from ldm.diffusion.denoiser import Bind, Denoiser
from ldm.images import to_tensor
from ldm.masks import Region
from ldm.request import Plan


def start(pipe: Any, plan: Plan) -> Tensor:
    """Return x at the level plan.sigmas[0], b c h w: the latents of the picture plus noise.

    At strength 1 it is noise alone, unlike in image to image. In an inpainting model this is so for gray parts of the
    mask, too. In a text-to-image model gray parts start from the picture, because they are kept at first.
    """
    _, noise, _ = _draws(plan)
    pure = samplers.start(noise, plan.sigmas[0], sampler=plan.sampler, spacing=plan.spacing)
    mask = fit_mask(plan.request.region, *plan.latent_shape[1:])
    gray = (mask > 0) & (mask < 1)
    from_noise = plan.request.source is not None and plan.request.source.from_noise
    if from_noise and (pipe.config.inpaints or not gray.any()):
        return pure
    known = _known(pipe, plan)
    x = known + float(plan.sigmas[0]) * noise.to(known)
    return torch.where(gray.to(x.device), x, pure.to(x)) if from_noise else x


def bound(pipe: Any, plan: Plan, bind: Bind) -> Bind:
    """Return the function (condition) -> network. For an inpainting model it adds the mask and the masked picture.

    The mask of such a model is 0 or 1: levels of gray from the middle on count as white.
    """
    if not pipe.config.inpaints:
        return bind
    mask = fit_mask(plan.request.region, plan.height, plan.width)
    image = to_tensor(plan.request.region.picture(plan.width, plan.height)) * (mask < 0.5)
    latents = pipe.encode_image(image, _draws(plan)[2])
    white = (fit_mask(plan.request.region, *plan.latent_shape[1:]) >= 0.5).to(latents)
    return inpainting.with_channels(bind, torch.cat([white.expand(len(latents), -1, -1, -1), latents], dim=1))


def keep(pipe: Any, plan: Plan, denoise: Denoiser) -> Denoiser:
    """Wrap the denoiser of a text-to-image model, so that it keeps the latents where the mask says so."""
    if pipe.config.inpaints:
        return denoise
    known, (_, noise, _) = _known(pipe, plan), _draws(plan)
    mask = fit_mask(plan.request.region, *plan.latent_shape[1:]).to(known)
    return inpainting.keep(denoise, known, mask, noise=noise.to(known), sigmas=plan.sigmas)


def fit_mask(region: Region, height: int, width: int) -> Tensor:
    """Return the mask of `region`, 1 1 height width in [0, 1]. A new pixel is as white as the whitest in its place.

    So each pixel that is repainted lies in a latent that is. diffusers takes one pixel in 64 instead; both agree for
    masks in blocks of the VAE's factor.
    """
    levels = to_tensor(region.mask.crop(region.box).convert("RGB"))[:, :1] * 0.5 + 0.5
    return F.adaptive_max_pool2d(levels, (height, width))


def _known(pipe: Any, plan: Plan) -> Tensor:
    """Return the latents of the picture, b c h w, a sample of the VAE's distribution for each image."""
    latents: Tensor = pipe.encode_image(plan.request.region.picture(plan.width, plan.height), _draws(plan)[0])
    return latents


def _draws(plan: Plan) -> tuple[Tensor | None, Tensor, Tensor]:
    draw = plan.initial_noise()
    first = draw() if plan.draws == 3 else None
    return first, draw(), draw()
