"""Why a network returned NaN or Inf, as an error message."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

NAMES = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder"}


def not_finite(part: str, network: nn.Module, file: Path | None, *, causes: str, where: str = "") -> FloatingPointError:
    """Return the error to raise. It names a damaged weight, or else the range of float16, or else the usual causes.

    part: "unet", "vae" or "text_encoder". file: the file of its weights, if known.
    where: the place of the first wrong number, such as " at step 3". causes: the usual ones if all weights are finite.
    """
    name, dtype, peak = NAMES[part], next(network.parameters()).dtype, 0.0
    for key, weight in _weights(network):
        largest = float(weight.detach().abs().max())  # NaN if there is one
        # A cast to float16 turns large numbers into Inf, so in float16 only NaN shows damage.
        if math.isnan(largest) or (math.isinf(largest) and dtype != torch.float16):
            source = f"the file {file}" if file else "the model's file"
            return FloatingPointError(f"{key} of the {name} holds NaN or Inf: {source} is damaged, get it again")
        peak = max(peak, largest)
    gave = f"the {name} gave numbers that are not finite in {str(dtype).removeprefix('torch.')}{where}"
    if dtype == torch.float16:
        option = "vae_dtype" if part == "vae" else "dtype"
        return FloatingPointError(
            f"{gave}, which ends at 65504 (its weights reach {peak:.3g}): load the model with {option} float32"
        )
    return FloatingPointError(f"{gave}, from finite weights (up to {peak:.3g}); usual causes: {causes}")


def _weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights by name, except those of other tensor classes, such as quantized weights."""
    for prefix, module in network.named_modules():
        for name, weight in module.named_parameters(prefix, recurse=False):
            if type(weight) is nn.Parameter:
                yield name, weight
        if callable(dense := getattr(module, "dense", None)):  # a packed layer, whose weight is no parameter
            yield f"{prefix}.weight", dense()
