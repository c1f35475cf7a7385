"""diffusers' and transformers' config.json files <-> our dataclasses.

As in those libraries, unknown keys are ignored and missing ones take the defaults of the class. A value that would
change the numbers in a way that is not implemented here is an error.
"""

from collections.abc import Callable
from reprlib import repr as short
from typing import Any

from ldm.config import Depths, DiffusionConfig, TextConfig, UNetConfig, VAEConfig
from ldm.strict import from_dict

Json = dict[str, Any]
Fields = dict[str, tuple[str, Any]]

# Our field: (its key in config.json, the default of the class that reads the key).
_UNET: Fields = {
    "in_channels": ("in_channels", 4),
    "out_channels": ("out_channels", 4),
    "channels": ("block_out_channels", [320, 640, 1280, 1280]),
    "res_blocks": ("layers_per_block", 2),
    "heads": ("attention_head_dim", 8),  # a misnomer in diffusers: the number of heads
    "context_dim": ("cross_attention_dim", 1280),
    "guidance_dim": ("time_cond_proj_dim", None),
    "linear_projection": ("use_linear_projection", False),
    "norm_groups": ("norm_num_groups", 32),
    "upcast_attention": ("upcast_attention", False),
}
_VAE: Fields = {
    "channels": ("block_out_channels", [64]),
    "res_blocks": ("layers_per_block", 1),
    "latent_channels": ("latent_channels", 4),
    "norm_groups": ("norm_num_groups", 32),
    "scaling_factor": ("scaling_factor", 0.18215),
    "overflows_fp16": ("force_upcast", True),
}
_TEXT: Fields = {
    "width": ("hidden_size", 512),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 8),
    "mlp": ("intermediate_size", 2048),
    "activation": ("hidden_act", "quick_gelu"),
    "vocab_size": ("vocab_size", 49408),
    "max_length": ("max_position_embeddings", 77),
}
_SCHEDULER: Fields = {
    "betas": ("beta_schedule", None),  # the defaults of the betas differ between classes, so these are required
    "beta_start": ("beta_start", None),
    "beta_end": ("beta_end", None),
    "timesteps": ("num_train_timesteps", 1000),
    "zero_terminal_snr": ("rescale_betas_zero_snr", False),
    "offset": ("steps_offset", 0),
}
_BETAS = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_MIDDLES = {"UNetMidBlock2DCrossAttn": "full", "UNetMidBlock2D": "residual", None: "none"}
_PROJECTED = "CLIPTextModelWithProjection"
_EULER = {"euler": "EulerDiscreteScheduler", "euler_ancestral": "EulerAncestralDiscreteScheduler"}
_CURVES = ("karras", "exponential")  # of the sigmas
_LEADING_BY_DEFAULT = ("PNDM", "DDIM", "DDPM", "TCD")

# Keys whose value is fixed here, with the allowed values. The first is the default of the class.
_UNET_FIXED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type"), (None,)),
    **dict.fromkeys(("num_attention_heads", "time_embedding_act_fn", "time_embedding_dim"), (None,)),
    **dict.fromkeys(("center_input_sample", "dual_cross_attention"), (False,)),
    "only_cross_attention": (False, [False] * 3, [False] * 4),
    **dict.fromkeys(("attention_type", "resnet_time_scale_shift"), ("default",)),
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), (3,)),
    **dict.fromkeys(("downsample_padding", "mid_block_scale_factor"), (1,)),
    "act_fn": ("silu",),
    "addition_embed_type": (None, "text_time"),
    "addition_time_embed_dim": (None, 256),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": tuple(_MIDDLES),
    "norm_eps": (1e-5,),
    "time_embedding_type": ("positional",),
}
_VAE_FIXED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("in_channels", "out_channels"), (3,)),
    **dict.fromkeys(("latents_mean", "latents_std"), (None,)),
    **dict.fromkeys(("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"), (True,)),
    "act_fn": ("silu",),
    "shift_factor": (None, 0.0),
}
_TEXT_FIXED: dict[str, tuple[Any, ...]] = {
    "architectures": (None, ["CLIPTextModel"], [_PROJECTED]),
    "layer_norm_eps": (1e-5,),
}
_SCHEDULER_FIXED: dict[str, tuple[Any, ...]] = {
    "beta_schedule": tuple(_BETAS.values()),
    **dict.fromkeys(("sigma_max", "sigma_min", "trained_betas"), (None,)),
    **dict.fromkeys(("thresholding", "use_lu_lambdas", "use_beta_sigmas", "use_flow_sigmas"), (False,)),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
}
_SCHEDULER_USUAL = {  # options that no sampler here has, with their usual values
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    "final_sigmas_type": ("zero",),
    "set_alpha_to_one": (False,),
    "solver_order": (2,),
}


def unet_from_json(json: Json, where: str) -> UNetConfig:
    """Read unet/config.json. Raises ValueError naming `where` for a value that is malformed or not implemented."""
    check_fixed(json, _UNET_FIXED, where)
    table = _read(json, _UNET)
    levels = len(table["channels"]) if isinstance(table["channels"], list) else 0
    downs = json.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    ups = json.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
    layers = _per_level(json.get("transformer_layers_per_block", 1), levels)
    up_layers = _per_level(json.get("reverse_transformer_layers_per_block") or layers[::-1], levels)
    blocks = table["res_blocks"]
    if isinstance(blocks, list) and blocks and blocks == blocks[:1] * levels:
        table["res_blocks"] = blocks[0]
    table["heads"] = _per_level(table["heads"], levels)
    table["depth"] = _depth(downs, layers, "DownBlock2D", where)
    table["up_depth"] = _depth(ups, up_layers, "UpBlock2D", where)
    table["mid"] = _MIDDLES[json.get("mid_block_type", "UNetMidBlock2DCrossAttn")]
    if table["mid"] == "full":
        table["mid_depth"] = _per_level(layers[-1], 1)[0]  # as in diffusers: the first number of the last level
    table["upcast_attention"] = table["upcast_attention"] or False
    if json.get("addition_embed_type") == "text_time":
        table["vector_dim"] = json.get("projection_class_embeddings_input_dim")
    return from_dict(table, UNetConfig, where)


def unet_to_json(config: UNetConfig, sample_size: int) -> Json:
    """Write unet/config.json. sample_size: latent pixels. Raises ValueError if the format cannot express `config`."""
    down, up = config.depths()
    layers = _layers(config.depth)
    if config.depth[-1] == 0:
        layers[-1] = config.mid_depth or 1  # diffusers' middle has the depth of the last level
    json = _write("UNet2DConditionModel", config, _UNET) | {
        "sample_size": sample_size,
        "down_block_types": [f"{'CrossAttn' * any(level)}DownBlock2D" for level in down],
        "up_block_types": [f"{'CrossAttn' * any(level)}UpBlock2D" for level in up],
        "mid_block_type": next(theirs for theirs, ours in _MIDDLES.items() if ours == config.mid),
        "transformer_layers_per_block": layers,
    }
    if config.up_depth is not None:
        json["reverse_transformer_layers_per_block"] = _layers(config.up_depth)
    if config.vector_dim is not None:
        json |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        json["projection_class_embeddings_input_dim"] = config.vector_dim
    _check_expressed(config, lambda: unet_from_json(json, "unet/config.json"))
    return json


def vae_from_json(json: Json, where: str, *, sdxl: bool) -> VAEConfig:
    """Read vae/config.json. sdxl: whether the VAE is SDXL's, which overflows in fp16 unless force_upcast is false.

    Raises ValueError naming `where` for a value that is malformed or not implemented.
    """
    check_fixed(json, _VAE_FIXED, where)
    table = _read(json, _VAE)
    table["overflows_fp16"] = sdxl and table["overflows_fp16"]
    config = from_dict(table, VAEConfig, where)
    for key, name in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        wanted = [name] * len(config.channels)
        if (types := json.get(key, wanted)) != wanted:
            raise ValueError(f"{where}: {key} must be {name} for every level, got {short(types)}")
    return config


def vae_to_json(config: VAEConfig, image_size: int) -> Json:
    """Write vae/config.json."""
    levels = len(config.channels)
    return _write("AutoencoderKL", config, _VAE) | {
        "sample_size": image_size,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_from_json(json: Json, where: str, pad_id: int, *, sdxl: bool) -> TextConfig:
    """Read text_encoder/config.json. transformers leaves out the keys that have their default values.

    sdxl: the UNet takes the output of the layer before the last, without the final norm, as SDXL's does.
    Raises ValueError naming `where` for a value that is malformed or not implemented.
    """
    check_fixed(json, _TEXT_FIXED, where)
    table = _read(json, _TEXT) | {"pad_id": pad_id}
    if sdxl:
        table |= {"output_layer": -2, "final_norm": False}
    if sdxl and json.get("architectures") == [_PROJECTED]:
        table["projection"] = json.get("projection_dim", 512)
    return from_dict(table, TextConfig, where)


def text_to_json(config: TextConfig, bos_id: int, eos_id: int, *, sdxl: bool) -> Json:
    """Write text_encoder/config.json. Raises ValueError for a choice of outputs that diffusers does not make."""
    name = _PROJECTED if config.projection else "CLIPTextModel"
    json = _write(name, config, _TEXT) | {
        "architectures": [name],
        "model_type": "clip_text_model",
        "projection_dim": config.projection or config.width,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": config.pad_id,
    }
    _check_expressed(config, lambda: text_from_json(json, "text_encoder/config.json", config.pad_id, sdxl=sdxl))
    return json


def _check_expressed(config: object, read: Callable[[], object]) -> None:
    """Raise ValueError unless `read` returns `config` from the JSON that was written for it."""
    try:
        same = read() == config
    except ValueError:
        same = False
    if not same:
        raise ValueError(f"a diffusers folder cannot express {config}: save in the ldm layout")


def diffusion_from_json(json: Json, where: str, *, sdxl: bool) -> tuple[DiffusionConfig, tuple[str, ...]]:
    """Read scheduler_config.json of any of diffusers' schedulers. Returns the diffusion process, and notes.

    json: its "_class_name" must be the one in model_index.json, which diffusers follows. The notes name options that
    no sampler here has. sdxl: diffusers' SD 1 and 2 pipelines set steps_offset to 1 whatever the file says, SDXL's do
    not. Raises ValueError naming `where` for a value that is malformed, or would give other pictures than diffusers.
    """
    name = str(json.get("_class_name") or "DDIMScheduler")
    predictions = {theirs: ours for ours, theirs in _PREDICTIONS.items()}
    prediction = json.get("prediction_type", "epsilon")
    if name.startswith(("EDM", "CosineDPM", "Flow")) or prediction not in list(predictions):
        raise ValueError(
            f"{where}: {name[:100]} with prediction_type {short(prediction)} is not supported; allowed are discrete "
            f"schedulers with one of {', '.join(predictions)}"
        )
    check_fixed(json, _SCHEDULER_FIXED, where)
    if missing := [key for key in ("beta_schedule", "beta_start", "beta_end") if key not in json]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    default = "leading" if name.startswith(_LEADING_BY_DEFAULT) else "linspace"
    spacing = "lcm" if name == "LCMScheduler" else json.get("timestep_spacing", default)
    if curve := next((name for name in _CURVES if json.get(f"use_{name}_sigmas")), None):
        # Euler's schedulers apply the curve to the spaced timesteps, DPM-Solver's to all timesteps
        spacing = f"{spacing}_{curve}" if "Euler" in name and spacing != "linspace" else curve
    table = _read(json, _SCHEDULER) | {"prediction": predictions[prediction], "spacing": spacing}
    table["betas"] = next(ours for ours, theirs in _BETAS.items() if theirs == json["beta_schedule"])
    if not sdxl:
        table["offset"] = 1
    unusual = [f"{k} {json[k]}" for k, usual in _SCHEDULER_USUAL.items() if json.get(k, usual[0]) not in usual]
    notes = (f"its scheduler's {', '.join(unusual)} has no counterpart here",) if unusual and spacing != "lcm" else ()
    return from_dict(table, DiffusionConfig, where), notes


def diffusion_to_json(config: DiffusionConfig, sampler: str) -> Json:
    """Write scheduler_config.json for diffusers' LCM, Euler or DDIM scheduler, by the spacing and `sampler`.

    Sigmas on a curve, which DDIM does not have, are written for Euler.
    """
    json = _write("DDIMScheduler", config, _SCHEDULER)
    json |= {"beta_schedule": _BETAS[config.betas], "prediction_type": _PREDICTIONS[config.prediction]}
    if config.spacing == "lcm":
        return json | {"_class_name": "LCMScheduler"}
    base, _, curve = config.spacing.rpartition("_")
    if curve in _CURVES:
        spacing = {"timestep_spacing": base or "linspace", f"use_{curve}_sigmas": True}
        return json | {"_class_name": _EULER["euler"]} | spacing
    if sampler in _EULER:
        return json | {"_class_name": _EULER[sampler], "timestep_spacing": config.spacing}
    return json | {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": config.spacing}


def _read(json: Json, fields: Fields) -> Json:
    return {ours: json.get(theirs, default) for ours, (theirs, default) in fields.items()}


def _write(class_name: str, config: object, fields: Fields) -> Json:
    """The `fields` of `config` under their keys in JSON, tuples as lists."""
    values = {theirs: getattr(config, ours) for ours, (theirs, _) in fields.items()}
    lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
    return {"_class_name": class_name} | values | lists


def _per_level(value: Any, levels: int) -> list[Any]:
    return value if isinstance(value, list) and value else [value] * levels


def _depth(types: list[Any], layers: list[Any], kind: str, where: str) -> list[Any]:
    """The depth of each level: its number in `layers`, or 0 where the block has no cross-attention."""
    pairs = list(zip(types, layers, strict=False)) if isinstance(types, list) and len(types) == len(layers) else []
    attends = f"CrossAttn{kind}"
    if not pairs or not all(name == kind or (name == attends and 0 not in _per_level(n, 1)) for name, n in pairs):
        raise ValueError(
            f"{where}: blocks {short(types)} with transformer layers {short(layers)} are not supported; allowed is one "
            f"(CrossAttn){kind}, and one number or list of transformer layers from 1, per entry of block_out_channels"
        )
    return [n if name == attends else 0 for name, n in pairs]


def _layers(depth: Depths) -> list[int | list[int]]:
    """`depth` as diffusers writes it, with 1 for a level without transformers, where it ignores the number."""
    return [list(level) if isinstance(level, tuple) else level or 1 for level in depth]


def check_fixed(json: Json, fixed: dict[str, tuple[Any, ...]], where: str) -> None:
    """Raise ValueError naming `where` for a key of `fixed` with a value that is not among its allowed ones."""
    for key, valid in fixed.items():
        if (value := json.get(key, valid[0])) not in valid:
            raise ValueError(f"{where}: {key} {short(value)} is not supported; allowed: {', '.join(map(repr, valid))}")
