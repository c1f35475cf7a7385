"""Single-file checkpoints in LDM's layout: what they are, told from names, shapes and metadata, and writing them."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file

from ldm.checkpoint import tables
from ldm.checkpoint.parts import ModelLike, Part, Source, collect, recognise, tokenizer_of
from ldm.checkpoint.shapes import (
    Shapes,
    context_dim,
    text_from_shapes,
    unet_from_shapes,
    vae_from_shapes,
)
from ldm.checkpoint.tensors import TensorFiles
from ldm.config import DiffusionConfig, ModelConfig, from_dict
from ldm.models.text import Tokenizer, official_vocabulary

METADATA_KEY = "ldm.config"  # a file that this package wrote carries its ModelConfig there, as JSON

# What may be in a file beside the model: the schedule (recomputed: halved files lose its low end), averaged copies,
# leftovers of training, and constants.
_IGNORED = re.compile(
    r"betas|alphas_cumprod(_prev)?|(sqrt|log)_one_minus_alphas_cumprod|sqrt_(recip_|recipm1_)?alphas_cumprod"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|logvar|scale_factor|denoiser\.(log_)?sigmas"
    r"|(model_ema|loss|first_stage_model\.loss|embedding_manager)\..*|.*\.(position_ids|logit_scale)"
)

_OTHER_KINDS = (  # what a file without LDM's UNet is, if one of its names matches
    (r"^(control_model\.|input_hint_block\.|controlnet_cond_embedding\.)", "a ControlNet"),
    (r"lora_|\.lora\.|hada_|lokr_", "a LoRA"),
    (r"^(emb_params|string_to_param|clip_[lg])$", "a textual-inversion embedding"),
    (r"^(ip_adapter|image_proj)\.", "an IP-Adapter"),
    (r"^(adapter\.)?body\.0\.", "a T2I-Adapter"),
    (r"double_blocks\.\d", "a Flux transformer"),
    (r"joint_blocks\.\d", "a Stable Diffusion 3 transformer"),
    (r"^(down|up)_blocks\.\d", "the unet of a diffusers folder"),
    (r"^input_blocks\.\d", "a UNet alone"),
    (r"^(text_model\.)?embeddings\.token_embedding", "a text encoder alone"),
    (r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.", "a VAE alone"),
)
_OTHER_FAMILIES = {  # by the width of the text that the UNet attends to
    1024: "Stable Diffusion 2",
    2048: "Stable Diffusion XL",
    1280: "the Stable Diffusion XL refiner",
}


def open_single(path: Path) -> Source:
    """Understand the single-file checkpoint at `path` from its header.

    Raises ValueError for a file that is damaged, something else, incomplete, or of a family that is not supported.
    """
    tensors = TensorFiles([path])
    text_prefix = tables.TEXT_PREFIX
    if not any(name.startswith(text_prefix) for name in tensors.shapes):
        text_prefix = text_prefix.removesuffix("text_model.")  # some files lack that level
    if f"{tables.UNET_PREFIX}input_blocks.0.0.weight" not in tensors.shapes:
        _refuse(tensors)
    elif METADATA_KEY in tensors.metadata:
        config, why = _from_metadata(tensors), "it carries its configuration in its metadata"
    else:
        config, why = _from_shapes(tensors, text_prefix)
    return Source(
        config=config,
        layout="ldm",
        why=why,
        parts={
            "unet": Part(tensors, tables.ldm_unet(config.unet), tables.UNET_PREFIX),
            "vae": Part(tensors, tables.ldm_vae(config.vae), tables.VAE_PREFIX),
            "text_encoder": Part(tensors, tables.CLIP_TEXT, text_prefix),
        },
        ignored=lambda name: _IGNORED.fullmatch(name) is not None,
        tokenizer=Tokenizer.official,
    )


def write_single(path: Path, model: ModelLike, dtype: torch.dtype | None) -> None:
    """Write `model` into the new file `path`. Raises ValueError for one that the layout cannot express."""
    config = model.config
    text = config.text[0]
    if len(config.text) != 1 or text.activation != "quick_gelu" or text.projection is not None:
        raise ValueError(
            "the ldm layout is written for models with one CLIP text encoder as in Stable Diffusion 1.x, "
            f"{config.name} has another: save in the diffusers layout"
        )
    if tokenizer_of(model).vocab != official_vocabulary()[0]:
        raise ValueError(
            f"a single file has no place for a tokenizer, and that of {config.name} is not CLIP's own: "
            "save in the diffusers layout"
        )
    # one entry: safetensors would write several in random order
    metadata = {METADATA_KEY: json.dumps(_without_none(dataclasses.asdict(config)))}
    save_file(ldm_tensors(model, dtype), path, metadata=metadata)


def ldm_tensors(model: ModelLike, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Return the model's tensors under LDM's names: for SD 1.5 exactly the official list."""
    config = model.config
    ids = torch.arange(config.text[0].max_length, device="cpu")[None]  # as the official files have
    return {
        **collect(model.unet, tables.ldm_unet(config.unet), tables.UNET_PREFIX, dtype),
        **collect(model.vae, tables.ldm_vae(config.vae), tables.VAE_PREFIX, dtype),
        **collect(model.text_encoder, tables.CLIP_TEXT, tables.TEXT_PREFIX, dtype),
        f"{tables.TEXT_PREFIX}embeddings.position_ids": ids,
    }


def _from_metadata(tensors: TensorFiles) -> ModelConfig:
    where = f"{tensors}, metadata {METADATA_KEY}"
    try:
        table = json.loads(tensors.metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(table).__name__}")
    return from_dict(table, ModelConfig, where)


def _from_shapes(tensors: TensorFiles, text_prefix: str) -> tuple[ModelConfig, str]:
    """The configuration of an SD 1.x file, and why it is one. Raises ValueError for other families."""
    unet = Shapes(tensors, tables.UNET_PREFIX)
    width, text_width = unet.size("input_blocks.0.0.weight", 0), context_dim(unet)
    seen = f"{width} model channels and text of width {text_width}"
    if (width, text_width) != (320, 768):
        family = _OTHER_FAMILIES.get(text_width, "no family known here")
        raise ValueError(
            f"{tensors} is {family} ({seen}); single files are read of Stable Diffusion 1.x only, other models from a "
            "diffusers folder"
        )
    for prefix, what in ((tables.VAE_PREFIX, "VAE"), (text_prefix, "text encoder")):
        if not any(name.startswith(prefix) for name in tensors.shapes):
            raise ValueError(f"{tensors} has no {what} ({prefix}*): give a full checkpoint")
    said = tensors.metadata.get("modelspec.prediction_type")
    diffusion = DiffusionConfig(prediction="v" if said in ("v", "v_prediction") else "eps")
    config = recognise(
        unet_from_shapes(unet),
        vae_from_shapes(Shapes(tensors, tables.VAE_PREFIX)),
        (text_from_shapes(Shapes(tensors, text_prefix)),),
        diffusion,
    )
    reason = f"its metadata says {said!r}" if said else "nothing in it says otherwise"
    return config, f"{seen} are Stable Diffusion 1.x, which predicts eps; {reason}"


def _refuse(tensors: TensorFiles) -> NoReturn:
    for pattern, what in _OTHER_KINDS:
        if any(re.search(pattern, name) for name in tensors.shapes):
            raise ValueError(
                f"{tensors} is {what}, not a whole model: give a full checkpoint or a model folder"
            )
    names = ", ".join(sorted(tensors.shapes)[:3]) or "no tensors"
    raise ValueError(
        f"{tensors} is no Stable Diffusion checkpoint, it lacks {tables.UNET_PREFIX}*; it has {names}"
    )


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    """`table` as `from_dict` reads it back: what is None is left out, at every depth."""
    return {
        key: _without_none(value)
        if isinstance(value, dict)
        else [_without_none(v) if isinstance(v, dict) else v for v in value]
        if isinstance(value, tuple)
        else value
        for key, value in table.items()
        if value is not None
    }
