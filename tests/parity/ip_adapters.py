"""IP-Adapters: small random ones in the files of their authors, and the same requests through both packages."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import ldm
from tests.parity.reference import asked, schedule
from tests.parity.tenants import _array, picture

FAMILIES = ("sd15", "sdxl-base")
CASES = {  # (file, number of the picture, weight)
    "plain": [("plain", 0, 1.0)],
    "plus": [("plus", 0, 1.0)],
    "plus, weight 0.5": [("plus", 1, 0.5)],
    "both": [("plain", 0, 0.7), ("plus", 1, 0.4)],
}
WIDTH, EMBEDDING = 64, 48  # of the hidden states of the tower, and of its embedding of a picture
_DIM, _TOKENS = 128, 16  # of the resampler


@torch.no_grad()
def build(folder: Path, pipe: Any) -> Path:
    """Save a plain and a Plus IP-Adapter for a pipeline of diffusers, and a vision tower. Returns the folder."""
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        projection_dim=EMBEDDING,
        hidden_act="gelu",
        initializer_factor=10.0,  # so that pictures differ in their embeddings
    )
    CLIPVisionModelWithProjection(tower).save_pretrained(folder / "image_encoder")
    context = pipe.unet.config.cross_attention_dim
    for name, shapes in (("plain", _plain(context)), ("plus", _plus(context))):
        tensors = {f"image_proj.{key}": _random(key, shape) for key, shape in shapes.items()}
        for number, processor in enumerate(pipe.unet.attn_processors):
            if processor.endswith("attn2.processor"):
                layer = pipe.unet.get_submodule(processor.removesuffix(".processor")).to_k
                for part in "kv":
                    key = f"ip_adapter.{number}.to_{part}_ip.weight"
                    tensors[key] = 2 * _random(key, (layer.out_features, context))
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def prompts(folder: Path, case: str) -> list[ldm.ImagePrompt]:
    """Return the image prompts of a case, with the files in `folder`."""
    return [
        ldm.ImagePrompt(folder / f"{name}.safetensors", pictures()[i], folder / "image_encoder", weight)
        for name, i, weight in CASES[case]
    ]


def pictures() -> list[Image.Image]:
    """Draw two different pictures, which are not square."""
    return [picture(80, 64), picture(60, 90).rotate(180).point(lambda level: 255 - level)]


@contextmanager
def loaded(pipe: Any, prompts: list[ldm.ImagePrompt]) -> Iterator[Any]:
    """Yield a pipeline of diffusers with the IP-Adapters of `prompts`, and remove them at the end."""
    folder = Path(prompts[0].encoder).parent
    names = [Path(prompt.model).name for prompt in prompts]
    pipe.load_ip_adapter(str(folder), subfolder=[""] * len(names), weight_name=names)
    pipe.set_ip_adapter_scale([prompt.weight for prompt in prompts])
    try:
        yield pipe
    finally:
        pipe.unload_ip_adapter()


def theirs(pipe: Any, request: ldm.Request) -> np.ndarray:
    """Make with diffusers what `request` asks for, with its image prompts: b h w 3 bytes."""
    options = asked(request) | {"width": request.width, "height": request.height}
    with loaded(pipe, list(request.image_prompts)) as own:
        images = [prompt.picture for prompt in request.image_prompts]
        return _array(own(**schedule(own, request), **options, ip_adapter_image=images).images)


def _plain(context: int) -> dict[str, tuple[int, ...]]:
    shapes = {"proj.weight": (4 * context, EMBEDDING), "proj.bias": (4 * context,)}
    return shapes | {"norm.weight": (context,), "norm.bias": (context,)}


def _plus(context: int) -> dict[str, tuple[int, ...]]:
    layer: dict[str, tuple[int, ...]] = {
        **{f"0.norm{i}.{part}": (_DIM,) for i in (1, 2) for part in ("weight", "bias")},
        "0.to_q.weight": (_DIM, _DIM),
        "0.to_kv.weight": (2 * _DIM, _DIM),
        "0.to_out.weight": (_DIM, _DIM),
        "1.0.weight": (_DIM,),
        "1.0.bias": (_DIM,),
        "1.1.weight": (4 * _DIM, _DIM),
        "1.3.weight": (_DIM, 4 * _DIM),
    }
    return {
        "latents": (1, _TOKENS, _DIM),
        "proj_in.weight": (_DIM, WIDTH),
        "proj_in.bias": (_DIM,),
        "proj_out.weight": (context, _DIM),
        "proj_out.bias": (context,),
        "norm_out.weight": (context,),
        "norm_out.bias": (context,),
        **{f"layers.{i}.{name}": shape for i in range(4) for name, shape in layer.items()},
    }


def _random(name: str, shape: tuple[int, ...]) -> Tensor:
    """Draw weights that keep the variance; biases and the weights of norms lie around 0 and 1."""
    if len(shape) == 1:
        return float(name.endswith("weight")) + 0.1 * torch.randn(shape)
    return torch.randn(shape) / (1 if name == "latents" else shape[-1] ** 0.5)
