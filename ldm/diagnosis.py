"""Errors that need a diagnosis: a network that returned NaN or Inf, and a model that is made for another task."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import ModelConfig
from ldm.request import Plan

NAMES = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder"}


class NotFiniteError(FloatingPointError):
    """A network with sound weights gave NaN or Inf. network: "unet", "vae" or "text_encoder"."""

    def __init__(self, text: str, network: str) -> None:
        super().__init__(text)
        self.network = network


def not_finite(
    pipe: Any, name: str, *, plan: Plan | None = None, index: int = 0, peak: float = 0.0
) -> FloatingPointError:
    """Return the error to raise. It names a damaged weight; if there is none, the range of float16, or usual causes.

    name: the network of `pipe`: "unet", "vae" or "text_encoder".
    plan, index: for the UNet, the plan and the first step that was not finite. peak: for the VAE, the largest latent.
    """
    network, file = getattr(pipe, name), pipe.paths.get(name)
    shown, dtype, largest = NAMES[name], next(network.parameters()).dtype, 0.0
    for key, weight in _weights(network):
        size = float(weight.detach().abs().max())  # NaN if there is one
        # A cast to float16 turns large numbers into Inf, so in float16 only NaN shows damage.
        if math.isnan(size) or (math.isinf(size) and dtype != torch.float16):
            source = f"the file {file}" if file else "the model's file"
            return FloatingPointError(f"{key} of the {shown} holds NaN or Inf: {source} is damaged, get it again")
        largest = max(largest, size)
    where = ""
    if plan is not None:
        level, steps = float(plan.sigmas[index]), len(plan.sigmas) - 1
        where = f" at step {index + 1} of {steps}, from noise level {level:.3g}"
    gave = f"the {shown} gave numbers that are not finite in {str(dtype).removeprefix('torch.')}{where}"
    if dtype == torch.float16:
        option = "vae_dtype" if name == "vae" else "dtype"
        return NotFiniteError(
            f"{gave}, whose largest number is 65504 (the largest weight is {largest:.3g}): load the model with "
            f"{option} float32",
            name,
        )
    causes = {
        "unet": f"a UNet that does not predict {pipe.config.diffusion.prediction} (see `prediction`), a custom sampler"
        " or denoiser, or parts of different models",
        "vae": f"latents up to {peak:.3g}, where 5 is usual, or a VAE of another kind of model",
        "text_encoder": "an activation that overflows",
    }[name]
    if plan is not None and len(plan.texts) > 1:
        causes = f"too much guidance (guidance_scale {plan.guidance_scale:g}), {causes}"
    return NotFiniteError(f"{gave}, from finite weights (up to {largest:.3g}); usual causes: {causes}", name)


def unfit(config: ModelConfig, task: str) -> ValueError:
    """Return the error to raise if the UNet of `config` has other input channels than `task` needs."""
    channels, latents = config.unet.in_channels, config.vae.latent_channels
    needs = f"editing needs {2 * latents}" if task == "edit" else f"text to image has {latents}"
    use = "use a text-to-image model"
    if task == "edit":
        use = "use an instruct-pix2pix model, or ldm img2img, which takes a prompt for the new picture"
    elif config.inpaints:
        use = f"give a source with a mask, as ldm inpaint does, or {use}"
    elif config.edits:
        use = f"it edits pictures; give a picture and an instruction, as ldm edit does, or {use}"
    return ValueError(f"the UNet of {config.name} takes {channels} channels, and {needs}: {use}")


def _weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights by name, except weights of other tensor classes, such as quantized weights."""
    for prefix, module in network.named_modules():
        for name, weight in module.named_parameters(prefix, recurse=False):
            if type(weight) is nn.Parameter:
                yield name, weight
        if callable(dense := getattr(module, "dense", None)):  # a packed layer, whose weight is not a parameter
            yield f"{prefix}.weight", dense()
