"""Image to image, inpainting, editing, SDXL with its refiner: the same requests through diffusers and this package."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import ldm
from ldm.refiner import plan_both, stream_both
from tests.parity.reference import PROMPTS, SCORES, asked, schedule


def picture(width: int = 64, height: int = 64) -> Image.Image:
    """Draw a picture of smooth random colors."""
    levels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def request(sampler: str = "euler", steps: int = 20, **more: Any) -> ldm.Request:
    """Ask for a picture of 64 pixels, every value given."""
    spacing = "lcm" if sampler == "lcm" else "leading"
    given = {"spacing": spacing, "guidance_scale": 7.5, "seed": 42, "width": 64, "height": 64} | more
    return ldm.Request(*PROMPTS, steps, sampler=sampler, **given)


def from_picture(sampler: str = "euler", strength: float = 0.6, **more: Any) -> ldm.Request:
    """Ask for the same from `picture`."""
    return request(sampler, source=ldm.Source(picture(), strength), **more)


def with_mask(sampler: str = "euler", strength: float = 1.0, **more: Any) -> ldm.Request:
    """Ask for `picture` with a new part. The mask has blocks of 8 pixels, so that both take the same latents for it."""
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 8, 48, 40))
    return request(sampler, source=ldm.Source(picture(), strength, mask=ldm.Mask(mask)), **more)


def to_edit(sampler: str = "euler", **more: Any) -> ldm.Request:
    """Ask for an edited `picture`."""
    return request(sampler, source=ldm.Source(picture(), image_guidance=1.5), **more)


def nine_channels(pipe: Any, folder: Path) -> Any:
    """Give a pipeline of diffusers a UNet for inpainting, and save it to `folder`."""
    return _widened(diffusers.AutoPipelineForInpainting.from_pipe(pipe), 9, folder)


def eight_channels(pipe: Any, folder: Path) -> Any:
    """Give a pipeline of diffusers a UNet for editing, and save it to `folder`."""
    return _widened(diffusers.StableDiffusionInstructPix2PixPipeline.from_pipe(pipe), 8, folder)


def _widened(pipe: Any, channels: int, folder: Path) -> Any:
    """Replace the UNet by one with more input channels.

    The new weights of the first layer are random, and small enough that the UNet still removes noise.
    """
    unet = pipe.unet
    wide, weights = type(unet).from_config(unet.config, in_channels=channels), dict(unet.state_dict())
    first = weights["conv_in.weight"]
    new = torch.randn(len(first), channels - 4, 3, 3, generator=torch.Generator().manual_seed(1))
    weights["conv_in.weight"] = torch.cat([first, 0.5 * first.std() * new], dim=1)
    wide.load_state_dict(weights)
    pipe.register_modules(unet=wide.eval())
    pipe.save_pretrained(folder)
    return pipe


# ------------------------------------------------------------------ pictures, b h w 3 bytes, and the number of steps


def theirs_inpainted(pipe: Any, request: ldm.Request) -> tuple[np.ndarray, int]:
    """Make with diffusers what `request` asks for, from its source picture and mask.

    DDIM is told to end at level 0 here. At its own last level, 0.03, diffusers removes the noise of the kept latents.
    """
    own = diffusers.AutoPipelineForInpainting.from_pipe(pipe)
    own.set_progress_bar_config(disable=True)
    kept: list[Tensor] = []
    told = schedule(own, request)
    if request.sampler == "ddim":
        own.scheduler = type(own.scheduler).from_config(own.scheduler.config, set_alpha_to_one=True)
    out = own(
        **told,
        **asked(request),
        image=[request.source.picture] * request.images,
        mask_image=request.source.mask.image,
        strength=request.source.strength,
        width=request.width,
        height=request.height,
        callback_on_step_end=_keep_in(kept),
    )
    return _array(out.images), _steps(request, kept)


def ours_inpainted(pipe: ldm.Pipeline, request: ldm.Request) -> tuple[np.ndarray, int]:
    """Make with us what `request` asks for, with the pixels that the VAE gives for the kept part."""
    sigmas = pipe.plan(request).sigmas
    *_, last = pipe.stream(request, sigmas=torch.cat([sigmas[:-1], torch.zeros(1)]))
    return _array(pipe.decode(last.latents)), last.total


def theirs_edited(pipe: Any, request: ldm.Request) -> tuple[np.ndarray, int]:
    """Make with diffusers what `request` asks for, from its source picture. The pipeline has 8 channels."""
    pipe.set_progress_bar_config(disable=True)
    kept: list[Tensor] = []
    told = schedule(pipe, request)
    if "timesteps" in told:  # this pipeline takes only a number of steps
        set_timesteps = pipe.scheduler.set_timesteps
        pipe.scheduler.set_timesteps = lambda _steps, device: set_timesteps(**told, device=device)
    out = pipe(
        **asked(request),
        num_inference_steps=request.steps,
        image=[request.source.picture] * request.images,
        image_guidance_scale=request.source.image_guidance,
        callback_on_step_end=_keep_in(kept),
    )
    return _array(out.images), _steps(request, kept)


def theirs(pipe: Any, request: ldm.Request) -> tuple[np.ndarray, int]:
    """Make with diffusers what `request` asks for, from its source picture.

    Their processor rounds the sides of the picture down to multiples of 8, which the request must ask for. Of a latent
    consistency model their own pipeline runs all steps whatever the strength, so it gets that of Stable Diffusion.
    """
    kind = diffusers.AutoPipelineForImage2Image
    if isinstance(pipe, diffusers.LatentConsistencyModelPipeline):
        kind = diffusers.StableDiffusionImg2ImgPipeline
    own = kind.from_pipe(pipe)
    own.set_progress_bar_config(disable=True)
    kept: list[Tensor] = []
    out = own(
        **schedule(own, request),
        **asked(request),
        image=[request.source.picture] * request.images,
        strength=request.source.strength,
        callback_on_step_end=_keep_in(kept),
    )
    return _array(out.images), _steps(request, kept)


def ours(pipe: ldm.Pipeline, request: ldm.Request) -> tuple[np.ndarray, int]:
    """Make with us what `request` asks for."""
    *_, last = pipe.stream(request)
    return _array(pipe.decode(last.latents)), last.total


def theirs_in_two_stages(
    base: Any, refiner: Any, request: ldm.Request, handover: float
) -> tuple[np.ndarray, list[int]]:
    """Make with diffusers what `request` asks for by both models.

    With Heun's method the base model stops in the middle of a step, and the refiner starts at the beginning of this
    step. Here it is given the latents from there, not those from the middle, so that no half of a step is repeated.
    """
    options, kept = asked(request), ([], [])
    base(
        **schedule(base, request),
        **{name: value for name, value in options.items() if name not in SCORES},
        width=request.width,
        height=request.height,
        denoising_end=handover,
        output_type="latent",
        callback_on_step_end=_keep_in(kept[0]),
    )
    if request.sampler == "heun":
        kept[0].pop()
    out = refiner(
        **schedule(refiner, request),
        **options,
        image=kept[0][-1],
        denoising_start=handover,
        callback_on_step_end=_keep_in(kept[1]),
    )
    return _array(out.images), [_steps(request, each) for each in kept]


def same_handover(request: ldm.Request, handover: float) -> float:
    """Return the handover at which we begin where `theirs_in_two_stages` begins: with Heun's method a step earlier."""
    return handover - 1 / request.steps if request.sampler == "heun" else handover


def ours_in_two_stages(
    base: ldm.Pipeline, refiner: ldm.Pipeline, request: ldm.Request, handover: float
) -> tuple[np.ndarray, list[int]]:
    """Make with us what `request` asks for by both models."""
    plans = plan_both(base, refiner, request, handover=handover)
    *_, last = stream_both(base, refiner, request, handover=handover)
    return _array(refiner.decode(last.latents)), [len(plan.sigmas) - 1 for plan in plans]


def _keep_in(kept: list[Tensor]) -> Any:
    """Make a callback that keeps the latents after each call of the UNet."""
    return lambda _pipe, _index, _timestep, values: kept.append(values["latents"]) or values


def _steps(request: ldm.Request, kept: list[Tensor]) -> int:
    """Count the steps. Heun's method calls the UNet twice in each, but once in the last step."""
    return (len(kept) + 1) // 2 if request.sampler == "heun" else len(kept)


def _array(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures])
