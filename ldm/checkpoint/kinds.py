"""What a file is that holds tensors and is no model: told from the names in it."""

import re

from ldm.checkpoint.tensors import Tensors

_KINDS = (  # what a file is, if one of its names matches
    (r"^lora_controlnet$", "a Control-LoRA"),
    (r"^lllite_unet_", "a ControlNet-LLLite"),
    (r"^(control_add_embedding|task_embedding)", "a ControlNet Union"),
    (r"^(control_model\.|input_hint_block\.|controlnet_cond_embedding\.)", "a ControlNet"),
    (r"hada_|lokr_|oft_(blocks|diag)|\.on_input$", "a LyCORIS adapter, a kind of LoRA"),
    (r"lora_|\.lora\.|\.lora_linear_layer\.", "a LoRA"),
    (r"^(emb_params|string_to_param.*|clip_[lg]|<[^>]+>)$", "a textual-inversion embedding"),
    (r"^(ip_adapter|image_proj)\.", "an IP-Adapter"),
    (r"^(adapter\.)?body\.0\.", "a T2I-Adapter"),
    (r"double_blocks\.\d", "a Flux transformer"),
    (r"joint_blocks\.\d", "a Stable Diffusion 3 transformer"),
    (r"^(model\.diffusion_model\.)?transformer_blocks\.\d", "a diffusion transformer"),
    (r"^prior\.|^prior_", "a prior of unCLIP or Stable Cascade"),
    (r"^(decoder|encoder)\.layers\.\d", "a TAESD, a smaller autoencoder"),
    (r"^(vision_model|visual_projection|concept_embeds)", "a safety checker or an image encoder"),
    (r"^(params_ema|RRDB_trunk|model\.\d+\.sub)", "an upscaler such as ESRGAN"),
)
_FAMILIES = {  # by the width of the text
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "Stable Diffusion XL",
    1280: "the Stable Diffusion XL refiner",
}
_TO_TEXT = re.compile(r"attn2[._]to_k(\.weight|\.lora_down\.weight|.*\.lora_A\.(.*\.)?weight)$")


def kind_of(tensors: Tensors) -> str | None:
    """Return what a file is, such as "a LoRA for Stable Diffusion XL"; None if that is not known."""
    for pattern, kind in _KINDS:
        if any(re.search(pattern, name) for name in tensors.shapes):
            return kind + _family(tensors, kind)
    return None


def _family(tensors: Tensors, kind: str) -> str:
    """For which models an adapter is made, told from how wide a text it attends to or holds."""
    shapes = tensors.shapes
    if "clip_l" in shapes and "clip_g" in shapes:
        return " for Stable Diffusion XL"
    embedding = kind.startswith("a textual")
    widths = [
        shape[-1 if embedding else 1]
        for name, shape in shapes.items()
        if (embedding and shape) or (len(shape) >= 2 and _TO_TEXT.search(name))
    ]
    return f" for {_FAMILIES[widths[0]]}" if widths and widths[0] in _FAMILIES else ""
