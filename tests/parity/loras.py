"""LoRAs: random ones in files of kohya's names, and the same requests through diffusers with peft and this package."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ldm
from ldm.lora import Lora, set_loras
from tests.parity import compare, reference, tenants

FAMILIES = ("sd15", "sd21", "sdxl-base")
CASES = {"one": (1.0,), "weight 0.5": (0.5,), "two": (0.7, -0.4)}  # the weight of each LoRA
_NAMED = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1", "q_proj", "out_proj", "fc1")


def installed() -> bool:
    """Return whether peft is installed, which diffusers needs for LoRAs."""
    return find_spec("peft") is not None


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kohya(theirs: Any, path: Path, seed: int = 0) -> int:
    """Write a LoRA for attentions and convolutions of the UNet and for the text encoders; return how many modules."""
    tensors = {}
    single = not hasattr(theirs, "text_encoder_2")
    parts = {"lora_unet": theirs.unet, ("lora_te" if single else "lora_te1"): theirs.text_encoder}
    parts |= {} if single else {"lora_te2": theirs.text_encoder_2}
    for prefix, network in parts.items():
        for i, (name, layer) in enumerate(network.named_modules(), 10_000 * seed):
            if not name.endswith(_NAMED) or not isinstance(layer, nn.Linear | nn.Conv2d):
                continue
            stem = f"{prefix}_{name.replace('.', '_')}"
            out, inside, *kernel = layer.weight.shape
            tensors[f"{stem}.lora_down.weight"] = drawn((4, inside, *kernel), i) / inside**0.5
            tensors[f"{stem}.lora_up.weight"] = 0.2 * drawn((out, 4, *(1 for _ in kernel)), i + 1)
            tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return len(tensors) // 3


def write(folder: Path, theirs: Any) -> list[Path]:
    """Write two LoRAs for a pipeline of diffusers."""
    files = [folder / f"{i}.safetensors" for i in range(2)]
    for i, file in enumerate(files):
        kohya(theirs, file, i)
    return files


def adapt(theirs: Any, files: list[Path], weights: tuple[float, ...]) -> None:
    """Load LoRAs into a pipeline of diffusers, with these weights."""
    names = [f"lora_{i}" for i in range(len(weights))]
    for name, file in zip(names, files, strict=False):
        theirs.load_lora_weights(file, adapter_name=name)
    theirs.set_adapters(names, list(weights))


def difference(ours: ldm.Pipeline, theirs: Any, files: list[Path], case: str, request: ldm.Request) -> int:
    """Return the largest difference of pictures with the LoRAs of a case, in levels of 255. It then removes them."""
    adapt(theirs, files, CASES[case])
    set_loras(ours, [Lora(file, weight) for file, weight in zip(files, CASES[case], strict=False)])
    made: tuple[np.ndarray, Any] = tenants.ours(ours, request)
    expected = reference.pictures(theirs, request)[0]
    set_loras(ours, [])
    theirs.unload_lora_weights()
    return compare.levels(made[0], expected)
