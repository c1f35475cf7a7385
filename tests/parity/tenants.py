"""Image to image, and SDXL with its refiner: the same requests through this package and through diffusers."""

import dataclasses
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

import ldm
from ldm.refiner import plan_both, stream_both
from tests.parity.reference import PROMPTS, SCHEDULERS, _schedule as schedule

STEPS, STRENGTH = 20, 0.6
IMG2IMG = {
    diffusers.StableDiffusionPipeline: diffusers.StableDiffusionImg2ImgPipeline,
    diffusers.StableDiffusionXLPipeline: diffusers.StableDiffusionXLImg2ImgPipeline,
    diffusers.StableDiffusionXLImg2ImgPipeline: diffusers.StableDiffusionXLImg2ImgPipeline,
}
SPACING = {"lcm": "lcm"}  # of a sampler; else that of the test


def picture(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """Draw a picture of smooth random colors."""
    levels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def request(sampler: str, spacing: str = "leading", **more: Any) -> ldm.Request:
    """Ask for a picture of 64 x 64 pixels, every value given."""
    asked = {"steps": STEPS, "guidance_scale": 7.5, "seed": 42, "width": 64, "height": 64} | more
    return ldm.Request(*PROMPTS, sampler=sampler, spacing=spacing, **asked)


def from_picture(sampler: str, spacing: str = "leading", *, strength: float = STRENGTH, **more: Any) -> ldm.Request:
    """Ask for the same from `picture`."""
    return request(sampler, spacing, source=ldm.Source(picture(), strength, resize="stretch"), **more)


@torch.no_grad()
def img2img(pipe: Any, request: ldm.Request) -> tuple[np.ndarray, int]:
    """Make with diffusers what `request` asks for, from its source picture. Returns the pictures and the steps run."""
    source, kind = request.source, IMG2IMG[type(pipe)]
    unchecked = {} if "Xl" in kind.__name__ or "XL" in kind.__name__ else {"requires_safety_checker": False}
    config = {k: v for k, v in pipe.config.items() if k in ("requires_aesthetics_score", "force_zeros_for_empty_prompt")}
    own = kind(**pipe.components, **unchecked, **(config if not unchecked else {}))
    own.set_progress_bar_config(disable=True)
    told = schedule(own, request)
    ran = []
    out = own(
        **told,
        **_texts(request),
        image=[source.open()] * request.images,
        strength=source.strength,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in request.seeds],
        callback_on_step_end=lambda _pipe, index, _t, values: ran.append(index) or values,
    )
    return _array(out.images), len(ran)


@torch.no_grad()
def two_stages(base: Any, refiner: Any, request: ldm.Request, handover: float) -> tuple[np.ndarray, tuple[int, int]]:
    """Make with diffusers what `request` asks for by both models. Returns the pictures and the steps of each."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
    texts, ran = _texts(request) | {"generator": generators}, ([], [])
    latents = base(
        **schedule(base, request),
        **texts,
        width=request.width,
        height=request.height,
        denoising_end=handover,
        output_type="latent",
        callback_on_step_end=lambda _pipe, index, _t, values: ran[0].append(index) or values,
    ).images
    out = refiner(
        **schedule(refiner, request),
        **texts,
        image=latents,
        denoising_start=handover,
        callback_on_step_end=lambda _pipe, index, _t, values: ran[1].append(index) or values,
    )
    return _array(out.images), (len(ran[0]), len(ran[1]))


def ours(pipe: ldm.Pipeline, request: ldm.Request) -> tuple[np.ndarray, int]:
    """Make with us what `request` asks for; as `img2img`."""
    *_, last = pipe.stream(request)
    return _array(pipe.decode(last.latents)), last.total


def our_two_stages(
    base: ldm.Pipeline, refiner: ldm.Pipeline, request: ldm.Request, handover: float
) -> tuple[np.ndarray, tuple[int, int]]:
    """Make with us what `request` asks for by both models; as `two_stages`."""
    plans = plan_both(base, refiner, request, handover=handover)
    *_, last = stream_both(base, refiner, request, handover=handover)
    return _array(refiner.decode(last.latents)), tuple(len(plan.sigmas) - 1 for plan in plans)


def _texts(request: ldm.Request) -> dict[str, Any]:
    negative = request.negative_prompt
    return {
        "prompt": [request.prompt] * request.images,
        "negative_prompt": None if negative is None else [negative] * request.images,
        "guidance_scale": request.guidance_scale,
    }


def _array(pictures: Any) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures])
