"""Models, or parts of them, in one file: identifying and writing them."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import identify, tables
from ldm.checkpoint.identify import Contents, Decision, Tower
from ldm.checkpoint.known import KnownFile, kind_of
from ldm.checkpoint.parts import TOWERS, Model, ModelLike, Source, collect
from ldm.checkpoint.tensors import Tensors, parse_object, some, write_tensors
from ldm.config import DiffusionConfig, ModelConfig, TextConfig
from ldm.diffusion.denoiser import Prediction
from ldm.models.tokens import Tokenizer, official_vocabulary
from ldm.presets import FAMILIES, SD21_BASE, SD_TURBO, SDXL_BASE, recognize
from ldm.strict import from_dict

METADATA_KEY = "ldm.config"  # the metadata key under which this package writes the ModelConfig as JSON
_NEW_FIELDS = {"overflows_fp16", "up_depth", "mid", "guidance_dim"}  # files of version 0.1 lack them


def open_single(
    tensors: Tensors, *, prediction: Prediction | None = None, ema: bool = False, known: KnownFile | None = None
) -> Source:
    """Identify a model or parts of one in `tensors` from names, shapes and metadata.

    prediction: what the UNet predicts, whatever the file says. ema: use the moving average of the UNet. known: the
    published file that has this digest or size. Raises ValueError for a file without any part of a model, and for a
    family that is not supported.
    """
    contents = identify.find(tensors)
    if contents == Contents(None, None, ()):
        what = kind_of(tensors) or f"no Stable Diffusion checkpoint, it has {some(sorted(tensors.shapes))}"
        hint = "; a LoRA is given with --lora" if "LoRA" in what else ""
        raise ValueError(f"{tensors} is {what}: give a full checkpoint or a model folder{hint}")
    identify.check_stored_plainly(tensors)
    if METADATA_KEY in tensors.metadata:
        config, why, notes = _from_metadata(tensors, prediction)
    else:
        config, why, notes = _from_shapes(tensors, contents, prediction, known)

    averaged = identify.count_ema(tensors) >= identify.ENOUGH_EMA
    if ema and not (averaged and contents.unet):
        raise ValueError(
            f"{tensors} has no averaged copy (model_ema.*); its weights may be the averaged ones already: leave out ema"
        )
    if averaged and not ema:
        notes += ("it also holds an averaged copy of the UNet, used with ema only",)
    parts = {}
    if contents.unet is not None:
        parts["unet"] = identify.unet_part(tensors, contents.unet, config.unet, ema=ema)
    if contents.vae is not None:
        parts["vae"] = identify.vae_part(tensors, contents.vae, config.vae)
    for name, tower, text in zip(TOWERS, _towers(contents, config.text), config.text, strict=False):
        if tower is not None:
            parts[name] = identify.text_part(tensors, tower.place, text)
    if contents.towers and not set(parts) & set(TOWERS):
        raise ValueError(
            f"{tensors} holds a text encoder {contents.towers[0].width} wide, and {config.name} takes "
            f"{' and '.join(str(text.width) for text in config.text)}"
        )
    return Source(config, "ldm", why, parts, (Tokenizer.official(),) * len(config.text), notes)


def _towers(contents: Contents, text: tuple[TextConfig, ...]) -> list[Tower | None]:
    """Return the file's tower for each of the model's towers, by its width; None if the file has none."""
    found: list[Tower | None] = []
    for config in text:
        fitting = (t for t in contents.towers if t.width == config.width and t not in found)
        found.append(next(fitting, None))
    return found


def write_single(
    path: Path, model: ModelLike, dtype: torch.dtype | None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write `model` into the new file `path`. Raises ValueError for a tokenizer other than CLIP's own.

    metadata: entries beside METADATA_KEY.
    """
    vocab = official_vocabulary()[0]
    for tokenizer in model.text_encoder.tokenizers:
        if tokenizer.vocab != vocab:
            raise ValueError(
                f"a single file has no place for a tokenizer, and that of {model.config.name} is not CLIP's own: "
                "save in the diffusers layout"
            )
    config = {METADATA_KEY: json.dumps(dataclasses.asdict(model.config))}
    write_tensors(ldm_tensors(model, dtype), path, {**(metadata or {}), **config})


def ldm_tensors(model: ModelLike, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the model's tensors under LDM's names: for each official family exactly the official list.

    Official tensors that the model does not use come from `Model.unused`, or are neutral stand-ins.
    """
    config = model.config
    kept = model.unused if isinstance(model, Model) else {}
    sgm = config.unet.is_sdxl
    tensors = {
        **collect(model.unet, tables.ldm_unet(config.unet), tables.UNET_PREFIX, dtype),
        **collect(model.vae, tables.ldm_vae(config.vae), tables.VAE_PREFIX, dtype),
    }
    towers = tables.official_towers(config.text, sgm=sgm)
    for name, tower, (prefix, rules), text in zip(TOWERS, model.text_encoder.towers, towers, config.text, strict=False):
        held = collect(tower, rules, prefix, dtype)
        if rules is tables.OPENCLIP_TEXT:
            for rest, stand_in in _stand_ins(text, {n.removeprefix(prefix): v for n, v in held.items()}).items():
                value = kept.get(f"{name}.{rest}", stand_in)
                held[prefix + rest] = value.to(dtype or value.dtype).contiguous()
        else:
            held[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(text.max_length, device="cpu")[None]
        tensors |= held
    return tensors


def _stand_ins(text: TextConfig, tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stand-ins for the tensors of an official OpenCLIP tower that ours lacks: a temperature and, for SD 2, a block.

    The block (the last one) adds nothing to its input, and the projection after it is the identity. They are on the
    CPU, also for a model on the meta device.
    """
    like = tower["token_embedding.weight"]
    neutral: dict[str, Tensor] = {"logit_scale": torch.tensor(100.0, dtype=like.dtype, device="cpu").log()}
    if text.projection is None:
        before, last = (f"transformer.resblocks.{n}." for n in (text.layers - 1, text.layers))
        for name, value in tower.items():
            if name.startswith(before):
                scale = "ln_" in name and name.endswith("weight")
                neutral[last + name.removeprefix(before)] = torch.full_like(value, float(scale), device="cpu")
        neutral["text_projection"] = torch.eye(text.width, dtype=like.dtype, device="cpu")
    return neutral


def _from_metadata(tensors: Tensors, prediction: Prediction | None) -> tuple[ModelConfig, str, tuple[str, ...]]:
    """Read the configuration from the metadata. Returns the configuration, the reason, and notes."""
    where = f"{tensors}, metadata {METADATA_KEY}"
    table = parse_object(tensors.metadata[METADATA_KEY], where)
    table.pop("micro_conditioning", None)  # files of version 0.1 have it; it follows from the other fields
    config = from_dict(table, ModelConfig, where, may_lack=_NEW_FIELDS)
    if "overflows_fp16" not in table["vae"]:
        vae = dataclasses.replace(config.vae, overflows_fp16=config.unet.is_sdxl)
        config = dataclasses.replace(config, vae=vae)
    text, notes = identify.padded_as_official(config.text, ours=True)
    config = dataclasses.replace(config, text=text)
    why = f"it carries its configuration in its metadata, which says {config.diffusion.prediction}"
    if prediction is not None:
        config = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, prediction=prediction))
        why += f"; you asked for {prediction}"
    return config, why, notes


def _from_shapes(
    tensors: Tensors, contents: Contents, prediction: Prediction | None, known: KnownFile | None
) -> tuple[ModelConfig, str, tuple[str, ...]]:
    """Identify the configuration without METADATA_KEY. Returns the configuration, the reason, and notes."""
    if contents.unet is None:
        widths = sorted(tower.width for tower in contents.towers)
        like = next((f for f in FAMILIES if [text.width for text in f.text] == widths), FAMILIES[0])
        if not widths and re.search(r"sdxl|xl(?![a-z])|xl_?vae", tensors.paths[0].stem.lower()):
            like = SDXL_BASE  # a VAE has the same names and shapes in all families
        text = _text(contents, like)
        return dataclasses.replace(like, text=text), "it holds a part of a model", ()

    unet, like, why = identify.unet_of(tensors, contents.unet)
    decision = identify.decide(tensors, contents.unet, like, prediction, known)
    diffusion, turbo = _diffusion(tensors, like, decision, known)
    unet = dataclasses.replace(unet, upcast_attention=like is SD21_BASE and decision.prediction == "v")
    config = recognize(unet, like.vae, _text(contents, like), diffusion, turbo=turbo)
    return config, f"{why}; it predicts {decision.prediction}: {decision.why}", decision.notes


def _diffusion(
    tensors: Tensors, like: ModelConfig, decision: Decision, known: KnownFile | None
) -> tuple[DiffusionConfig, bool]:
    """Return the diffusion process of the family `like` with the `decision`, and whether the model is a Turbo one."""
    turbo = known is not None and known.preset in ("sd-turbo", "sdxl-turbo")
    if like is SD21_BASE and decision.prediction == "eps":  # of these, SD-Turbo alone has names as in SDXL
        turbo = turbo or any(name.startswith("conditioner.") for name in tensors.shapes)
    diffusion = dataclasses.replace((SD_TURBO if turbo else like).diffusion, prediction=decision.prediction)
    if decision.zero_terminal_snr:  # it has an effect only if sampling starts at the last timestep
        diffusion = dataclasses.replace(diffusion, zero_terminal_snr=True, spacing="trailing")
    return diffusion, turbo


def _text(contents: Contents, like: ModelConfig) -> tuple[TextConfig, ...]:
    """Return the configurations of the family's towers, with the vocabulary sizes of the file's."""
    return tuple(
        text if tower is None else dataclasses.replace(text, vocab_size=tower.vocab_size)
        for tower, text in zip(_towers(contents, like.text), like.text, strict=True)
    )
