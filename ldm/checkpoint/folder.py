"""Model folders in diffusers' layout, which is also ours: reading their configs and shards, and writing them.

Ours adds `ldm.json`, with what the layout has no place for; diffusers ignores it, and it may be absent.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoint import configs, tables
from ldm.checkpoint.configs import Json
from ldm.checkpoint.parts import ModelLike, Part, Source, collect, recognise, tokenizer_of
from ldm.checkpoint.tensors import TensorFiles
from ldm.config import ModelConfig, VAEConfig, from_dict
from ldm.models.text import EOS, Tokenizer
from ldm.models.vae import VAE

_WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
_COMPONENTS = (*_WEIGHTS, "tokenizer", "scheduler")
_UNUSED_COMPONENTS = ("safety_checker", "feature_extractor", "image_encoder")
_PIPELINES = {8: "StableDiffusionInstructPix2PixPipeline", 9: "StableDiffusionInpaintPipeline"}


@dataclass(frozen=True)
class Extras:
    """The contents of ldm.json: fields of ModelConfig that diffusers' layout has no place for."""

    name: str
    image_size: int
    guidance_scale: float


def is_constant(name: str) -> bool:
    """Whether a tensor of a folder holds nothing learnt, and is not read."""
    return name.endswith("position_ids")


def open_folder(folder: Path) -> Source:
    """Understand the model in `folder` from its configs and headers.

    Raises ValueError for a folder that is no model, lacks a component, or holds one that is not implemented.
    """
    pipeline = _check_index(folder)
    unet_json, where = _config(folder, "unet")
    unet = configs.unet_from_json(unet_json, where)
    vae = configs.vae_from_json(*_config(folder, "vae"))
    text = configs.text_from_json(*_config(folder, "text_encoder"), _pad_id(folder / "tokenizer"))
    scheduler, where = _config(folder, "scheduler", "scheduler_config.json")
    diffusion = configs.diffusion_from_json(scheduler, where)
    config = recognise(unet, vae, (text,), diffusion)
    sample_size = unet_json.get("sample_size")
    if isinstance(sample_size, int):
        config = dataclasses.replace(config, image_size=sample_size * vae.factor)
    if (folder / "ldm.json").is_file():
        extras = from_dict(_read_json(folder / "ldm.json"), Extras, str(folder / "ldm.json"))
        config = dataclasses.replace(config, **dataclasses.asdict(extras))

    files = {
        name: TensorFiles(_weight_files(folder / name, stem)) for name, stem in _WEIGHTS.items()
    }
    prefixed = any(name.startswith("text_model.") for name in files["text_encoder"].shapes)
    return Source(
        config=config,
        layout="diffusers",
        why=f"the configs of its {pipeline}; {where} says {diffusion.prediction}",
        parts={
            "unet": Part(files["unet"], tables.diffusers_unet(unet)),
            "vae": _vae_part(files["vae"]),
            "text_encoder": Part(
                files["text_encoder"], tables.CLIP_TEXT, "text_model." if prefixed else ""
            ),
        },
        ignored=is_constant,
        tokenizer=lambda: _read_tokenizer(folder / "tokenizer"),
    )


def open_vae(folder: Path) -> tuple[VAEConfig, Part]:
    """Understand a folder that holds a VAE alone, such as the `vae/` of a model's.

    Raises ValueError for one that lacks a configuration or weights.
    """
    config = configs.vae_from_json(*_config(folder, ""))
    return config, _vae_part(TensorFiles(_weight_files(folder, _WEIGHTS["vae"])))


def write_folder(folder: Path, model: ModelLike, dtype: torch.dtype | None) -> None:
    """Write `model` into the new `folder`, for us and for diffusers' `from_pretrained`.

    Raises ValueError for a model that the layout cannot express.
    """
    config = model.config
    if len(config.text) != 1:
        raise ValueError(
            f"the diffusers layout is written for models of one text encoder, this has {len(config.text)}"
        )
    text, tokenizer = config.text[0], tokenizer_of(model)
    extras = Extras(config.name, config.image_size, config.guidance_scale)
    scheduler = configs.diffusion_to_json(config.diffusion)
    unet = configs.unet_to_json(config.unet, config.image_size // config.vae.factor)
    text_encoder = configs.text_to_json(text, tokenizer.bos_id, tokenizer.eos_id)

    _write_json(folder / "model_index.json", _index(config, scheduler))
    _write_json(folder / "ldm.json", dataclasses.asdict(extras))
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    tensors = collect(model.unet, tables.diffusers_unet(config.unet), dtype=dtype)
    _write_network(folder / "unet", _WEIGHTS["unet"], unet, tensors)
    write_vae(folder / "vae", model.vae, config.image_size, dtype)
    # with the level `text_model.`, which every version of transformers reads
    tensors = collect(model.text_encoder, tables.CLIP_TEXT, "text_model.", dtype)
    _write_network(folder / "text_encoder", _WEIGHTS["text_encoder"], text_encoder, tensors)
    tokenizer.save(folder / "tokenizer", text.max_length, text.pad_id)


def write_vae(folder: Path, vae: VAE, image_size: int, dtype: torch.dtype | None = None) -> None:
    """Write a VAE alone into `folder`, for us and for diffusers' `from_pretrained`."""
    config = configs.vae_to_json(vae.config, image_size)
    _write_network(
        folder, _WEIGHTS["vae"], config, collect(vae, tables.diffusers_vae(), dtype=dtype)
    )


def _write_network(folder: Path, stem: str, config: Json, tensors: dict[str, Tensor]) -> None:
    _write_json(folder / "config.json", config)
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, value: Json) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _vae_part(tensors: TensorFiles) -> Part:
    old = any(name.endswith("attentions.0.query.weight") for name in tensors.shapes)
    attention = tables.OLD_DIFFUSERS_VAE_ATTENTION if old else tables.DIFFUSERS_VAE_ATTENTION
    return Part(tensors, tables.diffusers_vae(attention))


def _index(config: ModelConfig, scheduler: Json) -> Json:
    return {
        "_class_name": _PIPELINES.get(config.unet.in_channels, "StableDiffusionPipeline"),
        "_diffusers_version": "0.36.0",  # the oldest supported; some of its classes need one
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _check_index(folder: Path) -> str:
    """The pipeline class that model_index.json names, once its components are known and present."""
    if not (folder / "model_index.json").is_file():
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        hint = "give the folder that holds model_index.json"
        if (folder.parent / "model_index.json").is_file():
            hint = f"it is a part of the model in {folder.parent}: give that"
        elif files:
            hint = f"give a file in it, such as {folder / files[0]}"
        raise ValueError(f"{folder} is not a model folder, it has no model_index.json: {hint}")
    index = _read_json(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    present = [name for name, value in index.items() if isinstance(value, list) and any(value)]
    if other := sorted(set(present) - {*_COMPONENTS, *_UNUSED_COMPONENTS}):
        raise ValueError(
            f"{folder} is a {pipeline} with {', '.join(other)}, which is not supported: the folder may have "
            f"{', '.join(_COMPONENTS)}"
        )
    for name in _COMPONENTS:
        if name not in present or not (folder / name).is_dir():
            raise ValueError(f"{folder} lacks its {name}: fetch the whole folder again")
    return pipeline


def _config(folder: Path, part: str, name: str = "config.json") -> tuple[Json, str]:
    path = folder / part / name
    return _read_json(path), str(path)


def _read_json(path: Path) -> Json:
    """The JSON object at `path`. Raises ValueError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): fetch the folder again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors file of a component, or its shards; the fp16 variant where there is no other."""
    for variant in ("", ".fp16"):
        file = folder / f"{stem}{variant}.safetensors"
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if file.is_file():
            return [file]
        if index.is_file():
            return _shards(index)
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    what = f"only {pickles[0]}, a pickle, which is not read" if pickles else "no weights"
    raise ValueError(f"{folder} has {what}: it needs {stem}.safetensors")


def _shards(index: Path) -> list[Path]:
    """The files that a shard index names, each checked to lie beside it and to hold what is said of it."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} must hold a weight_map of tensor names to file names")
    names = {str(name) for name in weight_map.values()}
    for name in sorted(names):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}, which is not a .safetensors file beside it")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} names {name}, which is missing: fetch the folder again")
    paths = [index.parent / name for name in sorted(names)]
    for path in paths:
        said = {key for key, name in weight_map.items() if name == path.name}
        if said != (held := set(TensorFiles([path]).shapes)):
            raise ValueError(f"{index} and {path.name} disagree on {sorted(said ^ held)[0]!r}")
    return paths


def _read_tokenizer(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_folder(folder)
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error!r}") from error


def _pad_id(folder: Path) -> int:
    """The id that pads prompts: that of the tokenizer's pad token, by default its end token."""
    token: object = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            token = _read_json(folder / name).get("pad_token") or token
    token = token["content"] if isinstance(token, dict) and "content" in token else token or EOS
    vocab = _vocabulary(folder)
    if not isinstance(token, str) or type(vocab.get(token)) is not int:
        raise ValueError(f"{folder} pads with {token!r}, which is not in its vocabulary")
    return int(vocab[token])


def _vocabulary(folder: Path) -> Json:
    if (folder / "vocab.json").is_file():
        return _read_json(folder / "vocab.json")
    model = _read_json(folder / "tokenizer.json").get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise ValueError(f"{folder / 'tokenizer.json'} has no vocabulary")
    vocab: Json = model["vocab"]
    return vocab
