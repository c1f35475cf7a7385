"""What a file is that holds tensors and is no model: told from the names in it."""

import re
from collections.abc import Iterable

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
    (r"^(down|up|decoder\.layers|encoder\.layers)\.\d+\.", "a TAESD decoder or another small VAE"),
    (r"^(vision_model|visual_projection|concept_embeds)", "a safety checker or an image encoder"),
    (r"^(params_ema|body\.\d|RRDB_trunk|model\.\d+\.sub)", "an upscaler such as ESRGAN"),
)


def kind_of(names: Iterable[str]) -> str | None:
    """Return what a file with these tensors is, such as "a LoRA"; None if that is not known."""
    names = list(names)
    for pattern, kind in _KINDS:
        if any(re.search(pattern, name) for name in names):
            return kind
    return None
