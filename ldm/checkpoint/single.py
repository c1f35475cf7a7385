"""Models, or parts of them, in one file: what they are, told from names, shapes and metadata, and writing them."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import tables
from ldm.checkpoint.contents import (
    ENOUGH_EMA,
    Contents,
    Place,
    count_ema,
    find,
    fitting_preset,
    text_part,
    unet_part,
    vae_part,
)
from ldm.checkpoint.kinds import kind_of
from ldm.checkpoint.known import KnownFile
from ldm.checkpoint.parts import TOWERS, Model, ModelLike, Source, collect, recognise, some
from ldm.checkpoint.prediction import MARKERS, Decision, decide
from ldm.checkpoint.shapes import (
    PRESETS_OF,
    Family,
    Shapes,
    clip_from_shapes,
    family_of,
    openclip_from_shapes,
    unet_from_shapes,
    vae_from_shapes,
)
from ldm.checkpoint.strict_json import parse_json
from ldm.checkpoint.tensors import Tensors
from ldm.checkpoint.writing import write_tensors
from ldm.config import (
    PRESETS,
    SD_TURBO,
    DiffusionConfig,
    ModelConfig,
    Prediction,
    TextConfig,
    UNetConfig,
    from_dict,
)
from ldm.models.text import Tokenizer, official_vocabulary

METADATA_KEY = "ldm.config"  # a file that this package wrote carries its ModelConfig there, as JSON

# What may be in a file beside the model: the schedule (recomputed: halved files lose its low end), averaged copies,
# leftovers of training, and constants.
_IGNORED = re.compile(
    r"betas|alphas_cumprod(_prev)?|(sqrt|log)_one_minus_alphas_cumprod|sqrt_(recip_|recipm1_)?alphas_cumprod"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|logvar|scale_factor|denoiser\.(log_)?sigmas"
    r"|(model_ema|loss|first_stage_model\.loss|embedding_manager|cond_stage_model\.(.*\.)?vision_model)\..*"
    r"|.*\.(position_ids|attn_mask|logit_scale)|cond_stage_key"
)
_SCALED = re.compile(r"scaled_fp8|.*\.(scale_weight|scale_input|weight_scale|input_scale)")


def open_single(
    tensors: Tensors,
    *,
    prediction: Prediction | None = None,
    ema: bool = False,
    known: KnownFile | None = None,
) -> Source:
    """Understand what a file holds, a whole model or parts of one, from names, shapes and metadata.

    prediction: what the user says that it predicts. ema: whether the averaged copy of the UNet is wanted.
    known: what the file's sha256 says. Raises ValueError for a file that holds neither, and for an unknown family.
    """
    contents = find(tensors)
    if contents == Contents(None, None, ()):
        _refuse(tensors)
    if scaled := next((name for name in tensors.shapes if _SCALED.fullmatch(name)), None):
        raise ValueError(
            f"{tensors} is quantised, its numbers have scales beside them ({scaled}): give one in fp32, fp16 or bf16"
        )
    if METADATA_KEY in tensors.metadata:
        config, why = _from_metadata(tensors, prediction)
    else:
        config, why = _from_shapes(tensors, contents, prediction, known)

    parts, ignored = {}, _ignored(contents, ema=ema)
    if contents.unet is not None:
        parts["unet"] = unet_part(tensors, contents.unet, config.unet, ema=ema)
    elif ema:
        raise ValueError(f"{tensors} holds no UNet, so it has no averaged copy of one")
    if contents.vae is not None:
        parts["vae"] = vae_part(tensors, contents.vae, config.vae)
    for name, place, text in zip(TOWERS, contents.towers, config.text, strict=False):
        parts[name] = text_part(tensors, place, text)
    return Source(
        config=config,
        layout="ldm",
        why=why,
        parts={name: dataclasses.replace(part, ignored=ignored) for name, part in parts.items()},
        tokenizers=lambda: [Tokenizer.official()] * len(config.text),
        notes=_notes(tensors, ema=ema),
    )


def write_single(path: Path, model: ModelLike, dtype: torch.dtype | None) -> None:
    """Write `model` into the new file `path`. Raises ValueError for one that the layout cannot express."""
    vocab = official_vocabulary()[0]
    for tokenizer in model.text_encoder.tokenizers:
        if tokenizer.vocab != vocab:
            raise ValueError(
                f"a single file has no place for a tokenizer, and that of {model.config.name} is not CLIP's own: "
                "save in the diffusers layout"
            )
    # one entry: safetensors would write several in random order
    metadata = {METADATA_KEY: json.dumps(_without_none(dataclasses.asdict(model.config)))}
    write_tensors(ldm_tensors(model, dtype), path, metadata=metadata)


def ldm_tensors(model: ModelLike, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the model's tensors under LDM's names: for each official family exactly the official list.

    What of that list the model has no use for comes from `Model.unused`, or is a neutral stand-in.
    """
    config = model.config
    kept = model.unused if isinstance(model, Model) else {}
    sgm = config.unet.vector_dim is not None
    tensors = {
        **collect(model.unet, tables.ldm_unet(config.unet), tables.UNET_PREFIX, dtype),
        **collect(model.vae, tables.ldm_vae(config.vae), tables.VAE_PREFIX, dtype),
    }
    towers = tables.official_towers(config.text, sgm=sgm)
    for name, tower, (prefix, rules), text in zip(
        TOWERS, model.text_encoder.towers, towers, config.text, strict=False
    ):
        tensors |= collect(tower, rules, prefix, dtype)
        if rules is tables.OPENCLIP_TEXT:
            like = next(tower.parameters())
            for rest, stand_in in _stand_ins(text, like).items():
                value = kept.get(f"{name}.{rest}", stand_in)
                tensors[prefix + rest] = value.to(dtype or value.dtype).contiguous()
        else:
            ids = torch.arange(text.max_length, device="cpu")[None]
            tensors[f"{prefix}text_model.embeddings.position_ids"] = ids
    return tensors


def _stand_ins(text: TextConfig, like: Tensor) -> dict[str, Tensor]:
    """What an official OpenCLIP tower has beside `text`: a temperature and, where no pooled text is used, a last block.

    The block is one that changes nothing, and the projection the identity.
    """
    neutral: dict[str, Tensor] = {"logit_scale": like.new_tensor(100.0).log()}
    if text.projection is not None:
        return neutral
    width, block = text.width, f"transformer.resblocks.{text.layers}."
    shapes = {
        **{f"ln_{i}.weight": (width,) for i in (1, 2)},
        **{f"ln_{i}.bias": (width,) for i in (1, 2)},
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (text.mlp, width),
        "mlp.c_fc.bias": (text.mlp,),
        "mlp.c_proj.weight": (width, text.mlp),
        "mlp.c_proj.bias": (width,),
    }
    for name, shape in shapes.items():
        make = like.new_ones if name.startswith("ln_") and "weight" in name else like.new_zeros
        neutral[block + name] = make(shape)
    neutral["text_projection"] = torch.eye(width, dtype=like.dtype, device=like.device)
    return neutral


def _from_metadata(tensors: Tensors, prediction: Prediction | None) -> tuple[ModelConfig, str]:
    where = f"{tensors}, metadata {METADATA_KEY}"
    try:
        table = parse_json(tensors.metadata[METADATA_KEY].encode())
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(table).__name__}")
    config = from_dict(table, ModelConfig, where)
    why = "it carries its configuration in its metadata"
    if prediction is None:
        return config, f"{why}, which says {config.diffusion.prediction}"
    return with_prediction(config, prediction), f"{why}; you asked for {prediction}"


def with_prediction(config: ModelConfig, prediction: Prediction) -> ModelConfig:
    """Return `config` with what the user says that its UNet predicts."""
    diffusion = dataclasses.replace(config.diffusion, prediction=prediction)
    return dataclasses.replace(config, diffusion=diffusion)


def _from_shapes(
    tensors: Tensors, contents: Contents, prediction: Prediction | None, known: KnownFile | None
) -> tuple[ModelConfig, str]:
    """The configuration of a file whose shapes alone tell what it is, and why. Raises ValueError for other families."""
    if contents.unet is None:
        family, why = _family_of_parts(tensors, contents), "it holds a part of a model"
        unet, decision = PRESETS_OF[family].unet, None
    elif contents.unet.style == "diffusers":
        preset = fitting_preset(tensors, contents.unet)
        family = next(f for f, p in PRESETS_OF.items() if p.unet.context_dim == preset.context_dim)
        why, unet = "its unet has the names and shapes of that preset", preset
        decision = _decide(tensors, family, contents.unet, unet, prediction, known)
    else:
        shapes = Shapes(tensors, contents.unet.prefix)
        family, why = family_of(shapes)
        unet = unet_from_shapes(shapes, family)
        decision = _decide(tensors, family, contents.unet, unet, prediction, known)

    like = PRESETS_OF[family]
    text = _text(tensors, contents.towers, like)
    vae = like.vae
    if contents.vae is not None and contents.vae.style == "ldm":
        vae = vae_from_shapes(Shapes(tensors, contents.vae.prefix), like.vae.scaling_factor)
    diffusion = like.diffusion
    if decision is not None:
        diffusion = _diffusion(tensors, family, decision, known)
        unet = dataclasses.replace(
            unet, upcast_attention=family == "sd2" and decision.prediction == "v"
        )
        why = f"{why}; it predicts {decision.prediction}: {decision.why}"
    return recognise(unet, vae, text, diffusion), why


def _decide(
    tensors: Tensors,
    family: Family,
    place: Place,
    unet: UNetConfig,
    prediction: Prediction | None,
    known: KnownFile | None,
) -> Decision:
    return decide(
        tensors,
        family=family,
        unet_prefix=place.prefix,
        in_channels=unet.in_channels,
        asked=prediction,
        known=known,
    )


def _diffusion(
    tensors: Tensors, family: Family, decision: Decision, known: KnownFile | None
) -> DiffusionConfig:
    """The process of a family, as what was decided changes it."""
    diffusion = PRESETS_OF[family].diffusion
    if known is not None and known.preset in PRESETS:
        diffusion = PRESETS[known.preset].diffusion
    elif family == "sd2" and any(name.startswith("conditioner.") for name in tensors.shapes):
        diffusion = SD_TURBO.diffusion  # of all SD 2 files only this one has sgm's names
    diffusion = dataclasses.replace(diffusion, prediction=decision.prediction)
    if decision.zero_terminal_snr:  # sampled from the very last timestep, or it means nothing
        diffusion = dataclasses.replace(diffusion, zero_terminal_snr=True, spacing="trailing")
    return diffusion


def _text(tensors: Tensors, towers: tuple[Place, ...], like: ModelConfig) -> tuple[TextConfig, ...]:
    """The towers of a file, or those of the family where it has none."""
    if not towers:
        return like.text
    if len(towers) != len(like.text):
        raise ValueError(
            f"{tensors} holds {len(towers)} text encoders ({some([p.prefix or 'at the root' for p in towers])}), "
            f"{like.name} has {len(like.text)}"
        )
    found = []
    for place, config in zip(towers, like.text, strict=True):
        level = "text_model." if place.style == "hf" else ""
        infer = openclip_from_shapes if place.style == "openclip" else clip_from_shapes
        found.append(infer(Shapes(tensors, place.prefix + level), config))
    return tuple(found)


def _family_of_parts(tensors: Tensors, contents: Contents) -> Family:
    """The family whose towers those of a file without a UNet are; SD 1's where there are none."""
    widths = []
    for place in contents.towers:
        name = {"hf": "text_model.embeddings.", "openclip": ""}.get(place.style, "embeddings.")
        widths.append(tensors.shapes[f"{place.prefix}{name}token_embedding.weight"][1])
    for family, preset in PRESETS_OF.items():
        if [t.width for t in preset.text] == widths:
            return family
    return "sd1"


def _ignored(contents: Contents, *, ema: bool) -> Callable[[str], bool]:
    """Whether a name may be in the file without being used."""
    plain = contents.unet.prefix if ema and contents.unet is not None else None

    def ignored(name: str) -> bool:
        replaced = plain is not None and name.startswith(plain)
        return replaced or name in MARKERS or _IGNORED.fullmatch(name) is not None

    return ignored


def _notes(tensors: Tensors, *, ema: bool) -> tuple[str, ...]:
    count = count_ema(tensors)
    if count < ENOUGH_EMA or ema:
        return ()
    return (f"it also holds an averaged copy of the UNet ({count} tensors), used with ema only",)


def _refuse(tensors: Tensors) -> None:
    """Raise ValueError saying what the file is instead of a model."""
    what = kind_of(tensors)
    if what is not None:
        raise ValueError(
            f"{tensors} is {what}, not a model: give a full checkpoint or a model folder"
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
