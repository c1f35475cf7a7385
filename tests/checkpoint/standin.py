"""Stand-ins for official files, of their names and shapes: hollow ones for headers, random ones at full size."""

import json
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoint.parts import Model
from ldm.checkpoint.single import ldm_tensors
from ldm.config import SD15
from ldm.models.text import TextEncoder, Tokenizer
from ldm.models.unet import UNet
from ldm.models.vae import VAE


def sd15_shapes() -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of SD 1.5's tensors, which a test holds to the official digest."""
    tokenizer = Tokenizer.official()
    with torch.device("meta"):
        model = Model(SD15, UNet(SD15.unet), VAE(SD15.vae), TextEncoder(SD15.text, [tokenizer]))
    return {name: tuple(tensor.shape) for name, tensor in ldm_tensors(model).items()}


def write_hollow(
    path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: dict[str, str] | None = None
) -> Path:
    """Write a safetensors file of fp16 zeros that takes no room on the disk, however large it says that it is."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def standin_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Draw the tensor `name`, seeded by its name: norms near 1, biases near 0, matrices that preserve variance."""
    if name.endswith("position_ids"):
        return torch.arange(shape[-1])[None]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) == 1:
        return 1 + 0.1 * x if name.endswith("weight") else 0.02 * x
    if "embedding" in name:
        return 0.05 * x
    return x / math.sqrt(math.prod(shape[1:]))


def write_standin(path: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write the stand-in, 2.1 GB in fp16, and return its path."""
    tensors = {}
    for name, shape in sd15_shapes().items():
        tensor = standin_tensor(name, shape)
        tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    save_file(tensors, path)
    return path
