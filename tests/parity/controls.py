"""ControlNets: small random ones, built and saved by diffusers, and the same requests through both packages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

import ldm
from tests.parity.reference import asked, schedule
from tests.parity.tenants import _array, picture

FAMILIES = ("sd15", "sd21-base", "sdxl-base")
CASES = {
    "one": lambda nets, hints: [ldm.Control(nets[0], hints[0])],
    "two": lambda nets, hints: [ldm.Control(n, h, w) for n, h, w in zip(nets, hints, (0.7, 0.4), strict=False)],
    "guess": lambda nets, hints: [ldm.Control(nets[0], hints[0], 0.8, guess=True)],
    "shares": lambda nets, hints: [
        ldm.Control(nets[0], hints[0], end=0.5),
        ldm.Control(nets[1], hints[1], start=0.25, end=0.9),
    ],
    "shuffle": lambda nets, hints: [ldm.Control(nets[2], hints[0])],
}


def three(folder: Path, pipe: Any) -> list[Path]:
    """Save two ControlNets, and one of the shuffle kind."""
    return [build(folder, pipe, 0), build(folder, pipe, 1), build(folder, pipe, 2, global_pool_conditions=True)]


@torch.no_grad()
def build(folder: Path, pipe: Any, seed: int = 0, **options: Any) -> Path:
    """Save a ControlNet for the UNet of a diffusers pipeline, with outputs that change the pictures. Return its path.

    options: changes of its config, such as `global_pool_conditions=True`.
    """
    torch.manual_seed(seed)
    config = {name: value for name, value in pipe.unet.config.items() if not name.startswith("_")}
    known = diffusers.ControlNetModel().config.keys()
    kept = {name: value for name, value in config.items() if name in known} | options
    network = diffusers.ControlNetModel(**kept)
    for name, parameter in network.named_parameters():
        if name.startswith(("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")):
            parameter.normal_(0, 0.3 / parameter[0].numel() ** 0.5)
    path = folder / f"controlnet-{seed}"
    network.save_pretrained(path)
    return path


def hints(count: int, side: int = 64) -> list[Image.Image]:
    """Draw different hints."""
    return [picture(side, side), picture(side, side).rotate(90).point(lambda level: 255 - level)][:count]


def theirs(pipe: Any, request: ldm.Request, **options: Any) -> np.ndarray:
    """Make with diffusers what `request` asks for, with its ControlNets: b h w 3 bytes."""
    controls = request.controls
    networks = [diffusers.ControlNetModel.from_pretrained(control.model) for control in controls]
    sdxl = isinstance(pipe, diffusers.StableDiffusionXLPipeline)
    kind = diffusers.StableDiffusionXLControlNetPipeline if sdxl else diffusers.StableDiffusionControlNetPipeline
    if request.source is not None:
        kind = diffusers.StableDiffusionControlNetImg2ImgPipeline
        options |= {"image": request.source.picture, "strength": request.source.strength}
    image = "control_image" if request.source is not None else "image"
    own = kind.from_pipe(pipe, controlnet=networks if len(networks) > 1 else networks[0])
    own.set_progress_bar_config(disable=True)
    options |= {
        image: _one_or_all([control.image for control in controls]),
        "controlnet_conditioning_scale": _one_or_all([control.weight for control in controls]),
        "control_guidance_start": _one_or_all([control.start for control in controls]),
        "control_guidance_end": _one_or_all([control.end for control in controls]),
        "guess_mode": any(control.guess for control in controls),
    }
    if request.source is None:
        options |= {"width": request.width, "height": request.height}
    return _array(own(**schedule(own, request), **asked(request), **options).images)


def _one_or_all(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else list(values)
