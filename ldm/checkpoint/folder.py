"""Model folders in diffusers' layout, which is also ours: reading their configs and shards, and writing them.

Ours adds `ldm.json`, with what the layout has no place for; diffusers ignores it, and it may be absent.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.checkpoint import configs, tables
from ldm.checkpoint.configs import Json
from ldm.checkpoint.contents import Place, vae_part
from ldm.checkpoint.parts import TOWERS, Model, ModelLike, Part, Source, collect, recognise, some
from ldm.checkpoint.pickles import PickledTensors
from ldm.checkpoint.strict_json import MAX_BYTES, parse_json, printable
from ldm.checkpoint.tensors import TensorFiles, Tensors
from ldm.checkpoint.writing import write_tensors
from ldm.config import SD15, ModelConfig, Prediction, VAEConfig, from_dict
from ldm.models.text import EOS, Tokenizer
from ldm.models.vae import VAE

_NETWORK, _TOWER = "diffusion_pytorch_model", "model"  # stems of the files with the weights
_COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_SECOND = ("text_encoder_2", "tokenizer_2")  # of SDXL, whose refiner has these alone
_UNUSED_COMPONENTS = ("safety_checker", "feature_extractor", "image_encoder")
_PIPELINES = {8: "StableDiffusionInstructPix2PixPipeline", 9: "StableDiffusionInpaintPipeline"}
_SDXL_PIPELINES = {
    8: "StableDiffusionXLInstructPix2PixPipeline",
    9: "StableDiffusionXLInpaintPipeline",
}
_KEPT = "ldm.safetensors"  # tensors of a single file that this layout has no place for


@dataclass(frozen=True)
class Extras:
    """The contents of ldm.json: fields of ModelConfig that diffusers' layout has no place for."""

    name: str
    image_size: int
    guidance_scale: float
    steps: int = 25
    sampler: str = "dpmpp_2m"


def open_folder(
    folder: Path, *, prediction: Prediction | None = None, pickles: bool = False
) -> Source:
    """Understand the model in `folder`, or the part of one, from its configs and headers.

    prediction: what the user says that its UNet predicts. pickles: whether weights that are pickles may be opened.
    Raises ValueError for a folder that is no model, lacks a component, or holds one that is not implemented.
    """
    if not (folder / "model_index.json").is_file() and (folder / "config.json").is_file():
        return _open_part(folder, pickles)
    index = _read_index(folder)
    unet_json, where = _config(folder, "unet")
    unet = configs.unet_from_json(unet_json, where)
    vae = configs.vae_from_json(*_config(folder, "vae"))
    tokenizers = [folder / name.replace("text_encoder", "tokenizer") for name in index.towers]
    text = tuple(
        configs.text_from_json(
            *_config(folder, name), _pad_id(tokenizer), sdxl=unet.vector_dim is not None
        )
        for name, tokenizer in zip(index.towers, tokenizers, strict=True)
    )
    scheduler, where = _config(folder, "scheduler", "scheduler_config.json")
    diffusion = configs.diffusion_from_json(scheduler, where)
    why = f"the configs of its {index.pipeline}; {where} says {diffusion.prediction}"
    if prediction is not None:
        diffusion = dataclasses.replace(diffusion, prediction=prediction)
        why += f", you asked for {prediction}"
    config = recognise(unet, vae, text, diffusion)
    sample_size = unet_json.get("sample_size")
    if isinstance(sample_size, int):
        config = dataclasses.replace(config, image_size=sample_size * vae.factor)
    if index.zero_negative is not None:
        config = dataclasses.replace(config, zero_negative=index.zero_negative)
    if (folder / "ldm.json").is_file():
        extras = from_dict(_read_json(folder / "ldm.json"), Extras, str(folder / "ldm.json"))
        config = dataclasses.replace(config, **dataclasses.asdict(extras))

    parts = {
        "unet": Part(_tensors(folder / "unet", _NETWORK, pickles), tables.diffusers_unet(unet)),
        "vae": _vae_part(_tensors(folder / "vae", _NETWORK, pickles)),
    }
    for name, component in zip(TOWERS, index.towers, strict=False):
        parts[name] = _text_part(_tensors(folder / component, _TOWER, pickles))
    return Source(
        config=config,
        layout="diffusers",
        why=why,
        parts=parts,
        tokenizers=lambda: [_read_tokenizer(path) for path in tokenizers],
        kept=TensorFiles([folder / _KEPT]) if (folder / _KEPT).is_file() else None,
    )


def write_folder(folder: Path, model: ModelLike, dtype: torch.dtype | None) -> None:
    """Write `model` into the new `folder`, for us and for diffusers' `from_pretrained`.

    Raises ValueError for a model that the layout cannot express.
    """
    config = model.config
    sdxl = config.unet.vector_dim is not None
    extras = Extras(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Extras)})
    scheduler = configs.diffusion_to_json(config.diffusion, config.sampler)
    unet = configs.unet_to_json(config.unet, config.image_size // config.vae.factor)
    # SDXL's refiner has the second text encoder alone
    names = TOWERS[1:] if sdxl and len(config.text) == 1 else TOWERS[: len(config.text)]

    _write_json(folder / "model_index.json", _index(config, scheduler, names))
    _write_json(folder / "ldm.json", dataclasses.asdict(extras))
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    tensors = collect(model.unet, tables.diffusers_unet(config.unet), dtype=dtype)
    _write_network(folder / "unet", _NETWORK, unet, tensors)
    write_vae(folder / "vae", model.vae, config.image_size, dtype)
    encoder = model.text_encoder
    for name, tower, tokenizer, text in zip(
        names, encoder.towers, encoder.tokenizers, config.text, strict=True
    ):
        json = configs.text_to_json(text, tokenizer.bos_id, tokenizer.eos_id, sdxl=sdxl)
        # with the level `text_model.`, which every version of transformers reads
        _write_network(folder / name, _TOWER, json, collect(tower, tables.hf_text(), dtype=dtype))
        where = folder / name.replace("text_encoder", "tokenizer")
        tokenizer.save(where, text.max_length, text.pad_id)
    if kept := model.unused if isinstance(model, Model) else {}:
        held = {name: value.to(dtype or value.dtype).contiguous() for name, value in kept.items()}
        write_tensors(held, folder / _KEPT)


def write_vae(folder: Path, vae: VAE, image_size: int, dtype: torch.dtype | None = None) -> None:
    """Write a VAE alone into `folder`, for us and for diffusers' `from_pretrained`."""
    config = configs.vae_to_json(vae.config, image_size)
    _write_network(folder, _NETWORK, config, collect(vae, tables.diffusers_vae(), dtype=dtype))


def _write_network(folder: Path, stem: str, config: Json, tensors: dict[str, Tensor]) -> None:
    _write_json(folder / "config.json", config)
    write_tensors(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, value: Json) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _open_part(folder: Path, pickles: bool) -> Source:
    """Understand a folder that holds one component: a UNet, a VAE or a text encoder."""
    json, where = _config(folder, "")
    config, parts = SD15, {}
    classes = json.get("_class_name") or json.get("architectures")
    if classes == "UNet2DConditionModel":
        unet = configs.unet_from_json(json, where)
        parts["unet"] = Part(_tensors(folder, _NETWORK, pickles), tables.diffusers_unet(unet))
        config = dataclasses.replace(config, unet=unet)
    elif classes == "AutoencoderKL":
        config = dataclasses.replace(config, vae=configs.vae_from_json(json, where))
        parts["vae"] = _vae_part(_tensors(folder, _NETWORK, pickles))
    elif classes in (["CLIPTextModel"], ["CLIPTextModelWithProjection"]):
        projected = classes == ["CLIPTextModelWithProjection"]
        text = configs.text_from_json(json, where, SD15.text[0].pad_id, sdxl=projected)
        config = dataclasses.replace(config, text=(text,))
        parts[TOWERS[0]] = _text_part(_tensors(folder, _TOWER, pickles))
    else:
        raise ValueError(
            f"{where} describes {printable(classes or 'nothing')}: allowed are UNet2DConditionModel, AutoencoderKL and "
            "CLIPTextModel"
        )
    return Source(
        config=config,
        layout="diffusers",
        why=f"{where} says so",
        parts=parts,
        tokenizers=lambda: [Tokenizer.official()],
    )


def _tensors(folder: Path, stem: str, pickles: bool) -> Tensors:
    """The tensors of a component; those of a pickle if they may be, and there is nothing better."""
    if pickles and not any(folder.glob("*.safetensors")):
        name = "pytorch_model" if stem == _TOWER else stem
        for path in (folder / f"{name}.bin", folder / f"{name}.fp16.bin"):
            if path.is_file():
                return PickledTensors(path)
    return TensorFiles(_weight_files(folder, stem))


def _vae_part(tensors: Tensors) -> Part:
    return vae_part(tensors, Place("", "diffusers"), VAEConfig())


def _text_part(tensors: Tensors) -> Part:
    level = "text_model" if any(n.startswith("text_model.") for n in tensors.shapes) else ""
    return Part(tensors, tables.hf_text(level))


class _Index(NamedTuple):
    """What model_index.json says. towers: the folders of the text encoders."""

    pipeline: str
    towers: tuple[str, ...]
    zero_negative: bool | None


def _index(config: ModelConfig, scheduler: Json, towers: tuple[str, ...]) -> Json:
    inputs, sdxl = config.unet.in_channels, config.unet.vector_dim is not None
    index: Json = {
        "_class_name": _PIPELINES.get(inputs, "StableDiffusionPipeline"),
        "_diffusers_version": "0.36.0",  # the oldest supported; some of its classes need one
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if sdxl:
        index["_class_name"] = _SDXL_PIPELINES.get(inputs, "StableDiffusionXLPipeline")
        index["force_zeros_for_empty_prompt"] = config.zero_negative
        if "aesthetic_score" in config.micro_conditioning:
            index["_class_name"] = "StableDiffusionXLImg2ImgPipeline"
            index["requires_aesthetics_score"] = True
    else:
        index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    classes = {
        name: "CLIPTextModelWithProjection" if text.projection else "CLIPTextModel"
        for name, text in zip(towers, config.text, strict=True)
    }
    for name in TOWERS if sdxl else TOWERS[:1]:
        here = name in classes
        index[name] = ["transformers", classes[name]] if here else [None, None]
        tokenizer = ["transformers", "CLIPTokenizer"] if here else [None, None]
        index[name.replace("text_encoder", "tokenizer")] = tokenizer
    return index


def _read_index(folder: Path) -> _Index:
    """The contents of model_index.json, once its components are known and present."""
    if not (folder / "model_index.json").is_file():
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        hint = "give the folder that holds model_index.json"
        if files:
            hint = f"give a file in it, such as {folder / files[0]}"
        raise ValueError(f"{folder} is not a model folder, it has no model_index.json: {hint}")
    index = _read_json(folder / "model_index.json")
    pipeline = printable(index.get("_class_name"))
    present = [name for name, value in index.items() if isinstance(value, list) and any(value)]
    allowed = (*_COMPONENTS, *_SECOND, *_UNUSED_COMPONENTS)
    if other := sorted(set(present) - {*allowed}):
        found = some([printable(name) for name in other])
        raise ValueError(
            f"{folder} is a {pipeline} with {found}, which is not supported: the folder may have {', '.join(allowed)}"
        )
    second = any(name in present for name in _SECOND)
    first = not second or "text_encoder" in present
    needed = [name for name in _COMPONENTS if first or name not in ("text_encoder", "tokenizer")]
    for name in [*needed, *(_SECOND if second else ())]:
        if name not in present or not (folder / name).is_dir():
            raise ValueError(f"{folder} lacks its {name}: fetch the whole folder again")
    zeros = index.get("force_zeros_for_empty_prompt")
    towers = tuple(name for name in TOWERS if name in present)
    return _Index(pipeline, towers, zeros if isinstance(zeros, bool) else None)


def _config(folder: Path, part: str, name: str = "config.json") -> tuple[Json, str]:
    path = folder / part / name
    return _read_json(path), str(path)


def _read_json(path: Path) -> Json:
    """The JSON object at `path`. Raises ValueError if there is none."""
    try:
        with path.open("rb") as file:
            value = parse_json(file.read(MAX_BYTES + 1))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): fetch the folder again"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors file of a component, or its shards; another variant, such as fp16, if no plain one."""
    files = sorted(folder.glob(f"{stem}.*.safetensors"))
    others = [
        path.name.split(".")[1].split("-")[0] for path in files
    ]  # a shard ends in -00001-of-2
    for variant in ("", ".fp16", *(f".{name}" for name in others)):
        file = folder / f"{stem}{variant}.safetensors"
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if file.is_file():
            return [file]
        if index.is_file():
            return _shards(index)
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    what = "no weights"
    if pickles:
        what = f"only {pickles[0]}, a pickle, which `ldm convert` makes a .safetensors file of"
    raise ValueError(f"{folder} has {what}: it needs {stem}.safetensors")


def _shards(index: Path) -> list[Path]:
    """The files that a shard index names, each checked to lie beside it and to hold what is said of it."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} must hold a weight_map of tensor names to file names")
    names = {str(name) for name in weight_map.values()}
    for name in sorted(names):
        plain = Path(name).name == name and "\\" not in name and len(name) < 200
        if not plain or not name.isprintable() or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names {short(name)}, which is not a .safetensors file beside it"
            )
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} names {name}, which is missing: fetch the folder again")
    paths = [index.parent / name for name in sorted(names)]
    for path in paths:
        said = {key for key, name in weight_map.items() if name == path.name}
        if said != (held := set(TensorFiles([path]).shapes)):
            raise ValueError(f"{index} and {path.name} disagree on {short(min(said ^ held))}")
    return paths


def _read_tokenizer(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_folder(folder)
    except Exception as error:  # whatever transformers raises for lists that do not go together
        reason = " ".join(repr(error).split())[:200]
        raise ValueError(f"the tokenizer in {folder} cannot be read: {reason}") from error


def _pad_id(folder: Path) -> int:
    """The id that pads prompts: that of the tokenizer's pad token, by default its end token."""
    token: object = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            token = _read_json(folder / name).get("pad_token") or token
    token = token["content"] if isinstance(token, dict) and "content" in token else token or EOS
    vocab = _vocabulary(folder)
    if not isinstance(token, str) or type(vocab.get(token)) is not int:
        raise ValueError(f"{folder} pads with {short(token)}, which is not in its vocabulary")
    return int(vocab[token])


def _vocabulary(folder: Path) -> Json:
    """The ids by token, from the file that `Tokenizer` reads."""
    merges = folder / "merges.txt"
    if (folder / "vocab.json").is_file() and merges.is_file():
        if merges.stat().st_size > MAX_BYTES:
            raise ValueError(f"{merges} is too large: allowed are {MAX_BYTES:,} bytes")
        return _read_json(folder / "vocab.json")
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder} holds no tokenizer: need vocab.json and merges.txt, or tokenizer.json"
        )
    model = _read_json(folder / "tokenizer.json").get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise ValueError(f"{folder / 'tokenizer.json'} has no vocabulary")
    vocab: Json = model["vocab"]
    return vocab
