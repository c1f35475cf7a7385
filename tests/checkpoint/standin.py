"""Stand-ins for official files, of their names and shapes: hollow ones for headers, random ones at full size."""

import dataclasses
import json
import math
import struct
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoint.parts import Model
from ldm.checkpoint.single import ldm_tensors
from ldm.config import ModelConfig
from ldm.models.text import TextEncoder
from ldm.models.tokens import Tokenizer
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.presets import PRESETS

SCHEDULE = (  # the twelve buffers of LDM's training code, 1000 numbers each
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip

BITS = {  # of a number, in every dtype that safetensors has
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}


def hollow_model(config: ModelConfig) -> Model:
    """Build `config` without memory."""
    tokenizers = [Tokenizer.official()] * len(config.text)
    with torch.device("meta"):
        return Model(config, UNet(config.unet), VAE(config.vae), TextEncoder(config.text, tokenizers))


@cache
def official_shapes(preset: str, in_channels: int = 4) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a family's official file, which a test holds to the official digest."""
    config = PRESETS[preset]
    unet = dataclasses.replace(config.unet, in_channels=in_channels)
    tensors = ldm_tensors(hollow_model(dataclasses.replace(config, unet=unet)))
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def ema_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the averaged copy of the UNet as LDM's training code names it, dots removed, with its two counters."""
    unet = {name for name in shapes if name.startswith("model.diffusion_model.")}
    flat = {n: "model_ema." + n.removeprefix("model.").replace(".", "") for n in unet}
    return {flat[n]: shapes[n] for n in unet} | {"model_ema.decay": (), "model_ema.num_updates": ()}


def write_hollow(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    metadata: dict[str, str] | None = None,
    dtypes: Mapping[str, str] = {},
) -> Path:
    """Write a safetensors file of zeros that takes no room on the disk, however large it says that it is.

    dtypes: of the tensors that are not fp16, as safetensors calls them.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        dtype = dtypes.get(name, "F16")
        start, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def standin_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Draw the tensor `name`, seeded by its name: norms near 1, biases near 0, matrices that preserve variance."""
    if name.endswith("position_ids"):
        return torch.arange(shape[-1])[None]
    if shape == ():
        return torch.tensor(4.6)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) == 1:
        return 1 + 0.1 * x if name.endswith("weight") else 0.02 * x
    if "embedding" in name:
        return 0.05 * x
    return x / math.sqrt(math.prod(shape[1:]))


def write_standin(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float16) -> Path:
    """Write random tensors of those names and shapes, and return the path."""
    tensors = {}
    for name, shape in shapes.items():
        tensor = standin_tensor(name, shape)
        tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    save_file(tensors, path)
    return path
