"""Known files: published models by digest, and files that are not models by the names of their tensors."""

import json
import re
from functools import cache
from importlib import resources
from typing import NamedTuple

from ldm.checkpoint.tensors import Tensors

NAMES = {  # families by the context width of their UNet
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "Stable Diffusion XL",
    1280: "the Stable Diffusion XL refiner",
}


class KnownFile(NamedTuple):
    """A published file: its usual name, its preset (None for a part of a model), and how it was recognized."""

    name: str
    preset: str | None
    told_by: str = "sha256"


# SDXL-Turbo has the names and shapes of SDXL base; among the known files, its size in bytes is unique.
KNOWN_SIZES = {6_938_081_905: KnownFile("sd_xl_turbo_1.0_fp16.safetensors", "sdxl-turbo", "size in bytes")}


@cache
def known_files() -> dict[str, KnownFile]:
    """Return the known files by SHA-256, as their publishers state it. An unlisted file is not suspicious."""
    table = json.loads(resources.files("ldm.checkpoint").joinpath("known.json").read_text())
    files = ((sha, name, preset) for preset, names in table.items() for sha, name in names.items())
    return {sha: KnownFile(name, None if preset == "part" else preset) for sha, name, preset in files}


_KINDS = (  # (pattern of a tensor's name, kind of file); the first match decides
    (r"quant_state\.bitsandbytes__|\.absmax$", "a model quantized by bitsandbytes (NF4 or int8)"),
    (r"^lora_controlnet$", "a Control-LoRA"),
    (r"^lllite_unet_", "a ControlNet-LLLite"),
    (r"^(control_add_embedding|task_embedding)", "a ControlNet Union"),
    (r"control_to_base_for_conv_in|\.ctrl_to_base\.|(enc|dec)_zero_convs_(in|out)\.", "a ControlNet-XS"),
    (r"^(control_model\.|(.*\.)?input_hint_block\.|controlnet_cond_embedding\.)", "a ControlNet"),
    (r"hada_|lokr_|oft_(blocks|diag)|\.on_input$", "a LyCORIS adapter, a kind of LoRA"),
    (r"lora_|\.lora\.|\.lora_linear_layer\.|:0:(down|up)$", "a LoRA"),
    (r"^(emb_params|string_to_param.*|clip_[lg]|<[^>]+>)$", "a textual-inversion embedding"),
    (r"^(ip_adapter|image_proj)\.", "an IP-Adapter"),
    (r"^(adapter\.)?body\.0\.", "a T2I-Adapter"),
    (r"motion_modules\.", "an AnimateDiff motion module"),
    (r"double_blocks\.\d", "a Flux transformer"),
    (r"joint_blocks\.\d", "a Stable Diffusion 3 transformer"),
    (r"^(model\.diffusion_model\.)?transformer_blocks\.\d", "a diffusion transformer"),
    (r"^prior\.|^prior_", "a prior of unCLIP or Stable Cascade"),
    (r"^((taesd_)?(decoder|encoder)\.)?(layers\.)?\d+\.(conv\.)?\d*\.?weight$", "a TAESD, a tiny autoencoder"),
    (r"^(vision_model|visual_projection|concept_embeds)", "a safety checker or an image encoder"),
    (r"^(params_ema|RRDB_trunk|model\.\d+\.sub)", "an upscaler such as ESRGAN"),
)
_TO_TEXT = re.compile(r"attn2[._]to_k(\.weight|\.lora_down\.weight|.*\.lora_A\.(.*\.)?weight)$")


def kind_of(tensors: Tensors) -> str | None:
    """Return the kind of a file that is not a model, such as "a LoRA for Stable Diffusion XL"; None if unknown."""
    for pattern, kind in _KINDS:
        if any(re.search(pattern, name) for name in tensors.shapes):
            return kind + _for_family(tensors, kind)
    return None


def _for_family(tensors: Tensors, kind: str) -> str:
    """Return for which family an adapter is made, by its context width or the width of its embedding; else ""."""
    embedding = kind.startswith("a textual")
    widths = [
        shape[-1 if embedding else 1]
        for name, shape in tensors.shapes.items()
        if (embedding and shape) or (len(shape) >= 2 and _TO_TEXT.search(name))
    ]
    width = sum(widths) if {"clip_l", "clip_g"} <= tensors.shapes.keys() else next(iter(widths), 0)
    return f" for {NAMES[width]}" if width in NAMES else ""
