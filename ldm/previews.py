"""Previews: pictures of the estimate x0 while the steps run, without the decoder of the VAE.

    colors = linear(pipe)                    # or tiny(load_taesd("taesd_decoder.safetensors"), pipe)
    for step in pipe.stream(request):
        pictures = preview(pipe, step, colors)

A linear map gives each latent pixel one color. TAESD is a small network in a file; it also shows fine detail.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from ldm.config import VAEConfig
from ldm.diffusion.samplers import Step
from ldm.geometry import grid
from ldm.images import to_pil
from ldm.models.taesd import FACTOR, Decoder
from ldm.models.vae import VAE
from ldm.pictures import save_png
from ldm.pipeline import Pipeline

Colors = Callable[[Tensor], Tensor]  # latents: b c h w -> images: b 3 h' w' in [-1, 1], of any size

# Red, green and blue of each latent channel, as in InvokeAI (invokeai/app/util/step_callback.py, Apache 2.0).
KNOWN = {
    VAEConfig(): (  # Stable Diffusion 1.x and 2.x, by @torridgristle
        (0.3444, 0.1385, 0.0670),
        (0.1247, 0.4027, 0.1494),
        (-0.3192, 0.2513, 0.2103),
        (-0.1307, -0.1874, -0.7445),
    ),
    VAEConfig(scaling_factor=0.13025): (  # SDXL, by @StAlKeR7779
        (0.3816, 0.4930, 0.5320),
        (-0.3753, 0.1631, 0.1739),
        (0.1770, 0.3588, -0.2048),
        (-0.4350, -0.2644, -0.4289),
    ),
}


@torch.no_grad()
def preview(pipe: Pipeline, step: Step, colors: Colors | None = None) -> list[Image.Image]:
    """Return a picture of each estimate in `step.x0`, at the size of the final pictures.

    For inpainting, this is the region that the model works on.
    colors: default `linear(pipe)`. That call fits a map for some VAEs, so make `colors` once for several steps.
    """
    images = (colors or linear(pipe))(step.x0)
    height, width = (pipe.config.vae.factor * side for side in step.x0.shape[-2:])
    return [picture.resize((width, height), Image.Resampling.BILINEAR) for picture in to_pil(images)]


def linear(pipe: Pipeline) -> Colors:
    """Return the linear map of the model's VAE family: with known numbers, or else fitted to its VAE by `fit`."""
    numbers = KNOWN.get(dataclasses.replace(pipe.config.vae, overflows_fp16=False))
    if numbers is not None:
        weight, bias = torch.tensor(numbers), torch.zeros(3)
    else:
        with pipe.at_work("vae"):
            weight, bias = fit(pipe.vae, gradients(8 * pipe.config.vae.factor))
    return lambda latents: F.conv2d(
        latents.float(), weight.T[..., None, None].to(latents.device), bias.to(latents.device)
    )


@torch.no_grad()
def fit(vae: VAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a linear map from latents to colors by least squares: weight: c 3, and bias: 3.

    images: b 3 h w in [-1, 1], such as `gradients`. The VAE encodes them. The color of a latent pixel is the mean of
    the f x f pixels that it spans.
    """
    latents = vae.encode(images.to(next(vae.parameters()))).mode().cpu().double()
    means = F.avg_pool2d(images.cpu().double(), vae.config.factor)
    x, y = (rearrange(each, "b c h w -> (b h w) c") for each in (latents, means))
    solution = torch.linalg.lstsq(F.pad(x, (0, 1), value=1.0), y).solution.float()
    return solution[:-1], solution[-1]


def gradients(side: int) -> Tensor:
    """Make 16 images of `side` pixels, 16 3 h w: smooth gradients between four random colors at the corners."""
    corners = torch.rand(16, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(corners, size=(side, side), mode="bilinear", align_corners=True)


def tiny(decoder: Decoder, pipe: Pipeline) -> Colors:
    """Return the function that decodes with a TAESD, see `ldm.checkpoint.taesd.load_taesd`.

    The files for SD and SDXL have equal names and shapes, so take the one for the model's family.
    Raises ValueError for a TAESD whose latents have another shape than the model's.
    """
    vae = pipe.config.vae
    if (decoder.latent_channels, FACTOR) != (vae.latent_channels, vae.factor):
        raise ValueError(
            f"the TAESD is for latents of {decoder.latent_channels} channels and a factor of {FACTOR}, but "
            f"{pipe.config.name} has {vae.latent_channels} and {vae.factor}: use a TAESD of its family, or leave it out"
        )
    return lambda latents: decoder.to(latents.device)(latents.float())


@contextmanager
def written(
    pipe: Pipeline, path: Path, every: int, colors: Colors
) -> Iterator[Callable[[Iterator[Step]], Iterator[Step]]]:
    """Yield a function that passes steps on and writes a preview to `path`, a PNG file, after each `every` steps.

    Each preview replaces the one before, completely or not at all. Several pictures are shown as a grid. At the end of
    the block the file is removed, also after an error or Ctrl-C.
    """

    def watch(steps: Iterator[Step]) -> Iterator[Step]:
        for step in steps:
            if (step.index + 1) % every == 0:
                save_png(grid(preview(pipe, step, colors)), path, overwrite=True)
            yield step

    try:
        yield watch
    finally:
        path.unlink(missing_ok=True)
