"""diffusers' and transformers' config.json files <-> our dataclasses.

Unknown keys are ignored and missing ones take the classes' own defaults, as those libraries do; a value that would
change the numbers in a way this package does not implement is an error.
"""

from reprlib import repr as short
from typing import Any

from ldm.config import Depths, DiffusionConfig, TextConfig, UNetConfig, VAEConfig, from_dict

Json = dict[str, Any]

_PROJECTED = "CLIPTextModelWithProjection"
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_EULER = {"euler": "EulerDiscreteScheduler", "euler_ancestral": "EulerAncestralDiscreteScheduler"}
_LEADING_BY_DEFAULT = ("PNDM", "DDIM", "DDPM", "TCD")

# What each file may say about things that are fixed here. The first value is the default of the class.
_UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": (None, "text_time"),
    "addition_time_embed_dim": (None, 256),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "norm_eps": (1e-5,),
    "num_attention_heads": (None,),
    "only_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "timestep_post_act": (None,),
}
_MIDDLES = {"UNetMidBlock2DCrossAttn": "full", "UNetMidBlock2D": "residual", None: "none"}
_VAE_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "in_channels": (3,),
    "out_channels": (3,),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None, 0.0),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
_TEXT_FIXED: dict[str, tuple[Any, ...]] = {
    "architectures": (None, ["CLIPTextModel"], [_PROJECTED]),
    "layer_norm_eps": (1e-5,),
}
_SCHEDULER_FIXED: dict[str, tuple[Any, ...]] = {
    "interpolation_type": ("linear",),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "thresholding": (False,),
    "timestep_type": ("discrete",),
    "trained_betas": (None,),
    "use_beta_sigmas": (False,),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,),
}
_SCHEDULER_USUAL = {  # options of single schedulers that samplers here do not have, as they usually are
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    "final_sigmas_type": ("zero",),
    "set_alpha_to_one": (False,),
    "solver_order": (2,),
}


def unet_from_json(json: Json, where: str) -> UNetConfig:
    """Read unet/config.json. Raises ValueError naming `where` for what is malformed or not implemented."""
    _check_fixed(json, _UNET_FIXED, where)
    channels = _list(json, "block_out_channels", [320, 640, 1280, 1280], where)
    levels = len(channels)
    downs = _list(json, "down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], where)
    ups = _list(json, "up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, where)
    layers = _per_level(json.get("transformer_layers_per_block", 1), levels)
    up_layers = _per_level(json.get("reverse_transformer_layers_per_block") or layers[::-1], levels)
    middle = _MIDDLES[json.get("mid_block_type", "UNetMidBlock2DCrossAttn")]
    blocks = json.get("layers_per_block", 2)
    if isinstance(blocks, list) and blocks == blocks[:1] * levels:
        blocks = blocks[0]
    table = {
        "in_channels": json.get("in_channels", 4),
        "out_channels": json.get("out_channels", 4),
        "channels": channels,
        "res_blocks": blocks,
        "depth": _depth(downs, layers, "DownBlock2D", where),
        "up_depth": _depth(ups, up_layers, "UpBlock2D", where),
        "mid": middle,
        # a historic misnomer: it is the number of heads
        "heads": _per_level(json.get("attention_head_dim", 8), levels),
        "context_dim": json.get("cross_attention_dim", 1280),
        "linear_projection": json.get("use_linear_projection", False),
        "norm_groups": json.get("norm_num_groups", 32),
        "upcast_attention": json.get("upcast_attention") or False,
    }
    if middle == "full":
        table["mid_depth"] = _per_level(layers[-1], 1)[0]  # diffusers' middle takes the first
    if json.get("time_cond_proj_dim") is not None:
        table["guidance_dim"] = json["time_cond_proj_dim"]
    if json.get("addition_embed_type") == "text_time":
        table["vector_dim"] = json.get("projection_class_embeddings_input_dim")
    return from_dict(table, UNetConfig, where)


def unet_to_json(config: UNetConfig, sample_size: int) -> Json:
    """Write unet/config.json; sample_size: latent pixels. Raises ValueError for what it cannot express."""
    down, up = config.depths()
    if config.mid == "full" and down[-1][0] not in (0, config.mid_depth):
        raise ValueError(
            f"a diffusers folder cannot express mid_depth {config.mid_depth} beside a last level of depth "
            f"{config.depth[-1]}: make them equal or save in the ldm layout"
        )
    if not all(all(level) or not any(level) for level in down + up):
        raise ValueError(
            f"a diffusers folder cannot express levels that attend in some of their blocks, as depth {config.depth} "
            f"and up_depth {config.up_depth} have: save in the ldm layout"
        )
    layers = _layers(config.depth)
    if config.depth[-1] == 0:
        layers[-1] = config.mid_depth or 1  # the middle's number is the last level's
    json: Json = {
        "_class_name": "UNet2DConditionModel",
        **{key: allowed[0] for key, allowed in _UNET_FIXED.items() if allowed[0] is not None},
        "sample_size": sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": [f"{_cross(level)}DownBlock2D" for level in down],
        "up_block_types": [f"{_cross(level)}UpBlock2D" for level in up],
        "mid_block_type": next(theirs for theirs, ours in _MIDDLES.items() if ours == config.mid),
        "block_out_channels": list(config.channels),
        "layers_per_block": config.res_blocks,
        "transformer_layers_per_block": layers,
        "attention_head_dim": list(config.heads),
        "cross_attention_dim": config.context_dim,
        "use_linear_projection": config.linear_projection,
        "norm_num_groups": config.norm_groups,
        "upcast_attention": config.upcast_attention,
    }
    if config.up_depth is not None:
        json["reverse_transformer_layers_per_block"] = _layers(config.up_depth)
    if config.guidance_dim is not None:
        json["time_cond_proj_dim"] = config.guidance_dim
    if config.vector_dim is not None:
        json |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": config.vector_dim,
        }
    return json


def vae_from_json(json: Json, where: str, *, sdxl: bool) -> VAEConfig:
    """Read vae/config.json. sdxl: whether it belongs to SDXL, whose VAE overflows in fp16 unless it says otherwise.

    Raises ValueError naming `where` for what is malformed or not implemented.
    """
    _check_fixed(json, _VAE_FIXED, where)
    channels = _list(json, "block_out_channels", [64], where)
    for key, name in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        if (types := json.get(key, [name])) != [name] * len(channels):
            raise ValueError(f"{where}: {key} must be {name} for every level, got {short(types)}")
    table = {
        "channels": channels,
        "res_blocks": json.get("layers_per_block", 1),
        "latent_channels": json.get("latent_channels", 4),
        "norm_groups": json.get("norm_num_groups", 32),
        "scaling_factor": json.get("scaling_factor", 0.18215),
        "overflows_fp16": sdxl and json.get("force_upcast", True),
    }
    return from_dict(table, VAEConfig, where)


def vae_to_json(config: VAEConfig, image_size: int) -> Json:
    """Write vae/config.json."""
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "in_channels": 3,
        "out_channels": 3,
        "sample_size": image_size,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.res_blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "scaling_factor": config.scaling_factor,
        "force_upcast": config.overflows_fp16,
    }


def text_from_json(json: Json, where: str, pad_id: int, *, sdxl: bool) -> TextConfig:
    """Read text_encoder/config.json; transformers leaves out what equals its defaults.

    sdxl: whether the UNet takes the layer before the last, without norm, as SDXL's do.
    Raises ValueError naming `where` for what is malformed or not implemented.
    """
    _check_fixed(json, _TEXT_FIXED, where)
    table = {
        "width": json.get("hidden_size", 512),
        "layers": json.get("num_hidden_layers", 12),
        "heads": json.get("num_attention_heads", 8),
        "mlp": json.get("intermediate_size", 2048),
        "activation": json.get("hidden_act", "quick_gelu"),
        "vocab_size": json.get("vocab_size", 49408),
        "max_length": json.get("max_position_embeddings", 77),
        "pad_id": pad_id,
    }
    if sdxl:
        table |= {"output_layer": -2, "final_norm": False}
    if sdxl and json.get("architectures") == [_PROJECTED]:
        table["projection"] = json.get("projection_dim", 512)
    return from_dict(table, TextConfig, where)


def text_to_json(config: TextConfig, bos_id: int, eos_id: int, *, sdxl: bool) -> Json:
    """Write text_encoder/config.json. Raises ValueError for outputs that diffusers would not take."""
    projection = config.projection if sdxl else None
    taken = (projection, -2, False) if sdxl else (None, -1, True)
    if (config.projection, config.output_layer, config.final_norm) != taken:
        raise ValueError(
            "a diffusers folder uses the last layer of a text encoder, normed and without projection, or in SDXL "
            f"the one before it without norm, not output_layer {config.output_layer}, final_norm {config.final_norm}, "
            f"projection {config.projection}"
        )
    return {
        "architectures": [_PROJECTED if projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": config.activation,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "projection_dim": projection or config.width,
        "layer_norm_eps": 1e-5,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": config.pad_id,
    }


def diffusion_from_json(
    json: Json, where: str, *, sdxl: bool
) -> tuple[DiffusionConfig, tuple[str, ...]]:
    """Read scheduler_config.json, whichever of diffusers' schedulers it is for: the process, and notes.

    json: its "_class_name" is the one of model_index.json, which diffusers follows. The notes name options that have
    no counterpart here. sdxl: diffusers' pipelines of SD 1 and 2 take offset 1 whatever the file says, SDXL's do not.
    Raises ValueError naming `where` for what is malformed, or would give other pictures than diffusers.
    """
    name = str(json.get("_class_name") or "DDIMScheduler")
    predictions = {theirs: ours for ours, theirs in _PREDICTIONS.items()}
    prediction = json.get("prediction_type", "epsilon")
    if name.startswith(("EDM", "CosineDPM", "Flow")) or prediction not in list(predictions):
        raise ValueError(
            f"{where}: {name[:100]} with prediction_type {short(prediction)} is not supported; allowed are discrete "
            f"schedulers with one of {', '.join(predictions)}"
        )
    _check_fixed(json, _SCHEDULER_FIXED, where)
    if missing := [key for key in ("beta_schedule", "beta_start", "beta_end") if key not in json]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")  # each class has its own defaults
    default = "leading" if name.startswith(_LEADING_BY_DEFAULT) else "linspace"
    spacing = "lcm" if name == "LCMScheduler" else json.get("timestep_spacing", default)
    curves = ("karras", "exponential")
    if curve := next((curve for curve in curves if json.get(f"use_{curve}_sigmas")), None):
        # Euler's schedulers bend the list of the spacing, DPM-Solver's that of all timesteps
        spacing = f"{spacing}_{curve}" if "Euler" in name and spacing != "linspace" else curve
    table = {
        "prediction": predictions[prediction],
        "betas": json["beta_schedule"],
        "beta_start": json["beta_start"],
        "beta_end": json["beta_end"],
        "timesteps": json.get("num_train_timesteps", 1000),
        "zero_terminal_snr": json.get("rescale_betas_zero_snr", False),
        "spacing": spacing,
        "offset": json.get("steps_offset", 0) if sdxl else 1,
    }
    unusual = [
        f"{k} {json[k]}"
        for k, usual in _SCHEDULER_USUAL.items()
        if json.get(k, usual[0]) not in usual
    ]
    notes = (f"its scheduler's {', '.join(unusual)} has no counterpart here",) if unusual else ()
    return from_dict(table, DiffusionConfig, where), notes


def diffusion_to_json(config: DiffusionConfig, sampler: str) -> Json:
    """Write scheduler_config.json for the class of the model's `sampler` if that is Euler's or LCM's, else for DDIM.

    Where the levels follow a curve, which DDIM has not, it is Euler's, too.
    """
    json: Json = {
        "_class_name": "DDIMScheduler",
        "prediction_type": _PREDICTIONS[config.prediction],
        "beta_schedule": config.betas,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "num_train_timesteps": config.timesteps,
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "steps_offset": config.offset,
        "trained_betas": None,
    }
    if config.spacing == "lcm":
        return json | {"_class_name": "LCMScheduler"}
    base, _, curve = config.spacing.rpartition("_")
    if curve in ("karras", "exponential"):
        spacing = {"timestep_spacing": base or "linspace", f"use_{curve}_sigmas": True}
        return json | {"_class_name": _EULER["euler"]} | spacing
    if sampler in _EULER:
        return json | {"_class_name": _EULER[sampler], "timestep_spacing": config.spacing}
    ddim = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": config.spacing}
    return json | ddim


def _depth(types: list[Any], layers: list[Any], kind: str, where: str) -> list[Any]:
    """The depth of each level: what `layers` says, or 0 where the block of this `kind` does not attend."""
    if len(types) != len(layers) or not all(name in (kind, f"CrossAttn{kind}") for name in types):
        raise ValueError(
            f"{where}: blocks {short(types)} with transformer layers {short(layers)} are not supported; allowed is one "
            f"(CrossAttn){kind}, and one number or list of transformer layers, per entry of block_out_channels"
        )
    depth = [n if name != kind else 0 for name, n in zip(types, layers, strict=True)]
    if any(name != kind and 0 in _per_level(n, 1) for name, n in zip(types, depth, strict=True)):
        raise ValueError(
            f"{where}: {short(layers)} transformer layers in {short(types)}: a block that attends needs 1 or more"
        )
    return depth


def _layers(depth: Depths) -> list[int | list[int]]:
    """`depth` as diffusers writes it: any number, here 1, for a level that does not attend."""
    return [list(level) if isinstance(level, tuple) else level or 1 for level in depth]


def _cross(level: tuple[int, ...]) -> str:
    """What begins the name of diffusers' block for a level of these depths."""
    return "CrossAttn" if any(level) else ""


def _check_fixed(json: Json, fixed: dict[str, tuple[Any, ...]], where: str) -> None:
    for key, allowed in fixed.items():
        if json.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"{where}: {key} {short(json[key])} is not supported; allowed: {', '.join(map(repr, allowed))}"
            )


def _list(json: Json, key: str, default: list[Any], where: str) -> list[Any]:
    value = json.get(key, default)
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{where}: {key} must be a list with one entry per level, got {short(value)}"
        )
    return value


def _per_level(value: Any, levels: int) -> list[Any]:
    return value if isinstance(value, list) and value else [value] * levels
