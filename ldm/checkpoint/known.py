"""What is known of files: published models by their digests, and files that are no models by the names in them."""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from ldm.checkpoint.tensors import Tensors

NAMES = {  # of the families, by the width of the text that their UNet attends to
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "Stable Diffusion XL",
    1280: "the Stable Diffusion XL refiner",
}


class KnownFile(NamedTuple):
    """A published file: its usual name, its preset (None for a part of a model), and what it is known by."""

    name: str
    preset: str | None
    told_by: str = "sha256"


# By preset, then by sha256. From publishers' pages and public lists; a file that is not here is not suspicious.
_FILES: dict[str | None, dict[str, str]] = {
    "sd15": {
        "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa": "v1-5-pruned-emaonly.safetensors",
        "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516": "v1-5-pruned-emaonly.ckpt",
        "1a189f0be69d6106a48548e7626207dddd7042a418dbf372cefd05e0cdba61b6": "v1-5-pruned.safetensors",
        "e1441589a6f3c5a53f5f54d0975a18a7feb7cdf0b0dee276dfc3331ae376a053": "v1-5-pruned.ckpt",
        "e9476a13728cd75d8279f6ec8bad753a66a1957ca375a1464dc63b37db6e3916": "v1-5-pruned-emaonly-fp16.safetensors",
        "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556": "sd-v1-4.ckpt",
        "879db523c30d3b9017143d56705015e15a2cb5628762c11d086fed9538abd7fd": "DreamShaper_8_pruned.safetensors",
    },
    "sd15-inpainting": {
        "c6bbc15e3224e6973459ba78de4998b80b50112b0ae5b5c67113d56b4e366b19": "sd-v1-5-inpainting.ckpt",
        "ef97ac1fe87ed0406433ad8710ff1da6e07e873de9a1a107b828844336d015ec": "sd-v1-5-inpainting.safetensors",
    },
    "sd21-base": {
        "d635794c1fedfdfa261e065370bea59c651fc9bfa65dc6d67ad29e11869a1824": "512-base-ema.ckpt (SD 2.0 base)",
        "ab800444cdd1e6ade2236874dd28db9608d1d740aaf6087c7273884140612993": "512-base-ema.safetensors (SD 2.0 base)",
        "88ecb782561455673c4b78d05093494b9c539fc6bfc08f3a9a4a0dd7b0b10f36": "v2-1_512-ema-pruned.ckpt",
        "df955bdf6b682338ea9b55dfc0d8f3475aadf4836e204893d28b82355e0956d2": "v2-1_512-ema-pruned.safetensors",
        "34dccb9e60d83a4ef963f51e9ff63548323a70024f8679095956d7c403b3ef4a": "v2-1_512-nonema-pruned",
        "fc4f9fe7528b2ee3de21971fb805bbf74d680bf1ab5b5f9c08379b0397b82a9d": "v2-1_512-nonema-pruned",
    },
    "sd21": {
        "bfcaf0755797b0c30eb00a3787e8b423eb1f5decd8de76c4d824ac2dd27e139f": "768-v-ema.ckpt (SD 2.0)",
        "703d49a1d847b218c5c230fce80ba1f73f848bc3afc06e48e727ee47fdf06b1f": "768-v-ema.safetensors (SD 2.0)",
        "ad2a33c361c1f593c4a1fb32ea81afce2b5bb7d1983c6b94793a26a3b54b08a0": "v2-1_768-ema-pruned.ckpt",
        "dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac": "v2-1_768-ema-pruned.safetensors",
        "4711ff4dd270067f71d5ea0725e83e4dc7c41f586a588531ee1c3bd549e9119d": "v2-1_768-nonema-pruned",
        "ff144a49841cf383adbc68841272ce639e1032b0a1f0f6586347feb953c244f4": "v2-1_768-nonema-pruned",
    },
    "sd21-base-inpainting": {
        "2a208a7ded5d42dcb0c0ec908b23c631002091e06afe7e76d16cd11079f8d4e3": "512-inpainting-ema.ckpt",
        "b29e2ed9a8fe58e76f7e801bda091d23738bd74c1da3f339bcbe2d40922fcb60": "512-inpainting-ema.safetensors",
    },
    "sd-turbo": {"3f067a1b943cf162f2b8f8588f6cf5824bd5b4c7d1d88d87164b9ca123616549": "sd_turbo.safetensors"},
    "sdxl-base": {
        "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b": "sd_xl_base_1.0.safetensors",
        "e6bb9ea85bbf7bf6478a7c6d18b71246f22e95d41bcdd80ed40aa212c33cfeff": "sd_xl_base_1.0_0.9vae.safetensors",
        "1f697312617db511045698dbf419ae1e2999427d4e4423a321b461cc180d1a97": "sd_xl_base_0.9.safetensors",
    },
    "sdxl-refiner": {
        "7440042bbdc8a24813002c09b6b69b64dc90fded4472613437b7f55f9b7d9c5f": "sd_xl_refiner_1.0.safetensors",
        "13406f993ca1f118e1fabf14f7e189b5271a4383512cb046887a5de27375d227": "sd_xl_refiner_0.9.safetensors",
    },
    "sdxl-turbo": {
        "e869ac7d6942cb327d68d5ed83a40447aadf20e0c3358d98b2cc9e270db0da26": "sd_xl_turbo_1.0_fp16.safetensors"
    },
    None: {
        "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75": "vae-ft-mse-840000-ema-pruned.safetensors",
        "c6a580b13a5bc05a5e16e4dbb80608ff2ec251a162311590c1f34c013d7f3dab": "vae-ft-mse-840000-ema-pruned.ckpt",
        "95f26a5ab04779d5467d1fcecaf93160ffa523afe399b835b3e1bb77ff2d937a": "vae-ft-ema-560000-ema-pruned.safetensors",
        "63aeecb90ff7bc1c115395962d3e803571385b61938377bc7089b36e81e92e2e": "sdxl_vae.safetensors",
        "235745af8d86bf4a4c1b5b4f529868b37019a10f7c0b2e79ad0abca3a22bc6e1": "sdxl_vae.safetensors (fp16-fix)",
        "1b909373b28f2137098b0fd9dbc6f97f8410854f31f84ddc9fa04b077b0ace2c": "sdxl-vae-fp16-fix",
        "8f90d840e075ff588a58e22c6586e2ae9a6f7922996ee6649a7f01072333afe4": "lcm-lora-sdv1-5",
        "a764e6859b6e04047cd761c08ff0cee96413a8e004c9f07707530cd776b19141": "lcm-lora-sdxl",
    },
}
KNOWN: dict[str, KnownFile] = {
    sha256: KnownFile(name, preset) for preset, files in _FILES.items() for sha256, name in files.items()
}


# SDXL-Turbo has the names and shapes of SDXL base, and no other file that is known has its size to the byte.
KNOWN_SIZES = {6_938_081_905: KnownFile("sd_xl_turbo_1.0_fp16.safetensors", "sdxl-turbo", "size in bytes")}


def digest(path: str | Path) -> str:
    """Return the sha256 that identifies a model: the file's own, or of the list of a folder's files and theirs.

    A folder's files are those that can change a picture: .safetensors, .json and .txt, in it and below.
    """
    path = Path(path)
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    parts = sorted(
        (part.relative_to(path).as_posix(), digest(part))
        for part in path.rglob("*")
        if part.suffix in (".safetensors", ".json", ".txt") and part.is_file()
    )
    return hashlib.sha256("".join(f"{n} {d}\n" for n, d in parts).encode()).hexdigest()


_KINDS = (  # what a file is, if one of its names matches
    (r"quant_state\.bitsandbytes__|\.absmax$", "a model quantized by bitsandbytes (NF4 or int8)"),
    (r"^lora_controlnet$", "a Control-LoRA"),
    (r"^lllite_unet_", "a ControlNet-LLLite"),
    (r"^(control_add_embedding|task_embedding)", "a ControlNet Union"),
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
    """Return what a file is that is no model, such as "a LoRA for Stable Diffusion XL"; None if that is not known."""
    for pattern, kind in _KINDS:
        if any(re.search(pattern, name) for name in tensors.shapes):
            return kind + _for_family(tensors, kind)
    return None


def _for_family(tensors: Tensors, kind: str) -> str:
    """Say for which models an adapter is made, told from how wide a text it attends to or holds."""
    if "clip_l" in tensors.shapes and "clip_g" in tensors.shapes:
        return f" for {NAMES[2048]}"
    embedding = kind.startswith("a textual")
    widths = [
        shape[-1 if embedding else 1]
        for name, shape in tensors.shapes.items()
        if (embedding and shape) or (len(shape) >= 2 and _TO_TEXT.search(name))
    ]
    return f" for {NAMES[widths[0]]}" if widths and widths[0] in NAMES else ""
