"""Model folders in diffusers' layout: reading their configs and shards, and writing them.

Folders that this package writes also have `ldm.json`, with fields that the layout lacks; diffusers ignores it.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import configs, tables
from ldm.checkpoint.configs import Json
from ldm.checkpoint.identify import Place, check_inputs, check_stored_plainly, padded_as_official, text_part, vae_part
from ldm.checkpoint.parts import TOWERS, Model, ModelLike, Part, Source, collect
from ldm.checkpoint.pickles import PickledTensors
from ldm.checkpoint.tensors import TensorFiles, Tensors, check_file, parse_object, some, write_tensors
from ldm.config import ModelConfig, TextConfig
from ldm.diffusion.denoiser import Prediction
from ldm.models.token_files import read_tokenizer, save_tokenizer
from ldm.models.tokens import Tokenizer
from ldm.models.vae import VAE
from ldm.presets import SD15, SD21, recognize
from ldm.strict import from_dict

NETWORK, _TOWER = "diffusion_pytorch_model", "model"  # stems of the files with the weights
_REFUSED = ("controlnet", "adapter", "motion_adapter", "prior", "prior_prior", "transformer", "low_res_scheduler")
_CLASSES = {  # the classes of diffusers and transformers that are implemented here
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    **dict.fromkeys(TOWERS, ("CLIPTextModel", "CLIPTextModelWithProjection")),
}
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # folders of diffusers, of PEFT
_KEPT = "ldm.safetensors"  # `Model.unused`, for which diffusers' layout has no file


@dataclass(frozen=True)
class Extras:
    """The contents of ldm.json: fields of ModelConfig that diffusers' layout lacks."""

    name: str
    image_size: int
    guidance_scale: float
    steps: int = 25
    sampler: str = "dpmpp_2m"


def open_folder(folder: Path, *, prediction: Prediction | None = None, pickles: bool = False) -> Source:
    """Identify a model or the part of one in `folder` from its configs and headers.

    prediction: what the UNet predicts, whatever the configs say. pickles: whether the weights may be pickles.
    Raises ValueError for a folder that is no model or lacks a component. Raises it for a component that changes the
    pictures in a way that is not implemented. A note names components that are not used.
    """
    if not (folder / "model_index.json").is_file() and (folder / "config.json").is_file():
        return _open_part(folder, pickles)
    index, towers, notes = _read_index(folder)
    unet_json, where = config_of(folder, "unet")
    check_inputs(unet_json.get("in_channels", 4), folder, config_of(folder, "vae")[0].get("latent_channels", 4))
    unet = configs.unet_from_json(unet_json, where)
    sdxl = unet.is_sdxl
    tokenizers = [read_tokenizer(folder / name.replace("text_encoder", "tokenizer")) for name in towers]
    text = tuple(
        configs.text_from_json(json | {"architectures": [_class(index, name)]}, where, pad_id, sdxl=sdxl)
        for (json, where), name, (_, pad_id) in zip(
            (config_of(folder, name) for name in towers), towers, tokenizers, strict=True
        )
    )
    ours = (folder / "ldm.json").is_file()
    text, repadded = padded_as_official(text, ours=ours)
    scheduler, where = config_of(folder, "scheduler", "scheduler_config.json")
    scheduler["_class_name"] = _class(index, "scheduler") or scheduler.get("_class_name")
    diffusion, unfollowed = configs.diffusion_from_json(scheduler, where, sdxl=sdxl)
    vae = configs.vae_from_json(*config_of(folder, "vae"), sdxl=sdxl)
    why = f"the configs of its {index.get('_class_name') or 'pipeline'}; {where} says {diffusion.prediction}"
    if prediction is not None:
        diffusion = dataclasses.replace(diffusion, prediction=prediction)
        why += f", you asked for {prediction}"
    size = unet_json.get("sample_size")
    named = any("turbo" in part.lower() for part in folder.resolve().parts[-3:])  # SD-Turbo's configs do not tell
    turbo = diffusion.spacing == "trailing" and not ours and (size == 64 if sdxl else named)
    config = recognize(unet, vae, text, diffusion, turbo=turbo)
    sides = size if isinstance(size, list) and size else [size]  # diffusers takes [height, width], too
    if all(type(side) is int and side > 0 for side in sides):
        config = dataclasses.replace(config, image_size=max(sides) * vae.factor)
    if isinstance(index.get("force_zeros_for_empty_prompt"), bool):
        config = dataclasses.replace(config, zero_negative=index["force_zeros_for_empty_prompt"])
    if ours:
        extras = from_dict(_read_json(folder / "ldm.json"), Extras, str(folder / "ldm.json"))
        config = dataclasses.replace(config, **dataclasses.asdict(extras))

    parts = {
        "unet": Part(tensors_of(folder / "unet", NETWORK, pickles), tables.diffusers_unet(unet)),
        "vae": vae_part(tensors_of(folder / "vae", NETWORK, pickles), Place("", "diffusers"), vae),
    }
    for name, component, tower in zip(TOWERS, towers, text, strict=False):
        parts[name] = _text_part(tensors_of(folder / component, _TOWER, pickles), tower)
    notes += (*repadded, *unfollowed)
    kept = TensorFiles([folder / _KEPT]) if (folder / _KEPT).is_file() else None
    return Source(config, "diffusers", why, parts, tuple(tokenizer for tokenizer, _ in tokenizers), notes, kept)


def write_folder(
    folder: Path, model: ModelLike, dtype: torch.dtype | None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write `model` into the new `folder`, for `load` and for diffusers' `from_pretrained`.

    metadata: entries for the files of the networks.
    Raises ValueError for a model that the layout cannot express.
    """
    config = model.config
    sdxl = config.unet.is_sdxl
    extras = Extras(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Extras)})
    scheduler = configs.diffusion_to_json(config.diffusion, config.sampler)
    unet = configs.unet_to_json(config.unet, config.image_size // config.vae.factor)
    # SDXL's refiner has the second text encoder alone
    names = TOWERS[1:] if sdxl and len(config.text) == 1 else TOWERS[: len(config.text)]

    _write_json(folder / "model_index.json", _write_index(config, scheduler, names))
    _write_json(folder / "ldm.json", dataclasses.asdict(extras))
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    tensors = collect(model.unet, tables.diffusers_unet(config.unet), dtype=dtype)
    write_network(folder / "unet", NETWORK, unet, tensors, metadata)
    write_vae(folder / "vae", model.vae, config.image_size, dtype, metadata)
    encoder = model.text_encoder
    for name, tower, tokenizer, text in zip(names, encoder.towers, encoder.tokenizers, config.text, strict=True):
        json = configs.text_to_json(text, tokenizer.bos_id, tokenizer.eos_id, sdxl=sdxl)
        # under the names with `text_model.`, which every version of transformers reads
        write_network(folder / name, _TOWER, json, collect(tower, tables.hf_text(), dtype=dtype), metadata)
        save_tokenizer(tokenizer, folder / name.replace("text_encoder", "tokenizer"), text.max_length, text.pad_id)
    if kept := model.unused if isinstance(model, Model) else {}:
        held = {name: value.to(dtype or value.dtype).contiguous() for name, value in kept.items()}
        write_tensors(held, folder / _KEPT)


def write_vae(
    folder: Path, vae: VAE, image_size: int, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write only a VAE into `folder`, for `load_vae` and for diffusers' `from_pretrained`."""
    config = configs.vae_to_json(vae.config, image_size)
    write_network(folder, NETWORK, config, collect(vae, tables.diffusers_vae(), dtype=dtype), metadata)


def write_network(
    folder: Path, stem: str, config: Json, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a network's config.json and its weights, in a file with this `stem` and `metadata`."""
    _write_json(folder / "config.json", config)
    write_tensors(tensors, folder / f"{stem}.safetensors", {"format": "pt", **(metadata or {})})


def _write_json(path: Path, value: Json) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _open_part(folder: Path, pickles: bool) -> Source:
    """Identify a folder of one component: a UNet, a VAE or a text encoder."""
    json, where = config_of(folder)
    config, parts, tokenizer = SD15, {}, Tokenizer.official()
    classes = json.get("architectures") or json.get("_class_name")  # of text encoders, of the others
    if classes == "UNet2DConditionModel":
        unet = configs.unet_from_json(json, where)
        parts["unet"] = Part(tensors_of(folder, NETWORK, pickles), tables.diffusers_unet(unet))
        config = dataclasses.replace(config, unet=unet)
    elif classes == "AutoencoderKL":
        vae = configs.vae_from_json(json, where, sdxl=True)  # `merge` corrects this for the other families
        config = dataclasses.replace(config, vae=vae)
        parts["vae"] = vae_part(tensors_of(folder, NETWORK, pickles), Place("", "diffusers"), vae)
    elif classes in (["CLIPTextModel"], ["CLIPTextModelWithProjection"]):
        pad_id = (SD21 if json.get("hidden_act") == "gelu" else SD15).text[0].pad_id
        if (beside := folder.with_name(folder.name.replace("text_encoder", "tokenizer"))) != folder and beside.is_dir():
            tokenizer, pad_id = read_tokenizer(beside)
        sdxl = classes == ["CLIPTextModelWithProjection"] or (folder.parent / TOWERS[1]).is_dir()
        text = configs.text_from_json(json, where, pad_id, sdxl=sdxl)
        config = dataclasses.replace(config, text=(text,))
        parts[TOWERS[0]] = _text_part(tensors_of(folder, _TOWER, pickles), text)
    else:
        raise ValueError(
            f"{where} describes {classes or 'nothing'}: allowed are UNet2DConditionModel, AutoencoderKL and "
            "CLIPTextModel"
        )
    return Source(config, "diffusers", f"{where} says so", parts, (tokenizer,))


def tensors_of(folder: Path, stem: str, pickles: bool) -> Tensors:
    """Return the tensors of a component. With `pickles`, a .bin file is used if there is no .safetensors file."""
    if pickles and not any(folder.glob("*.safetensors")) and (found := sorted(folder.glob("*.bin"))):
        return PickledTensors(found[0])
    tensors = TensorFiles(_weight_files(folder, stem))
    check_stored_plainly(tensors)
    return tensors


def _text_part(tensors: Tensors, config: TextConfig) -> Part:
    level = any(name.startswith("text_model.") for name in tensors.shapes)
    return text_part(tensors, Place("", "hf" if level else "hf without text_model"), config)


def _write_index(config: ModelConfig, scheduler: Json, towers: tuple[str, ...]) -> Json:
    sdxl, refiner = config.unet.is_sdxl, "aesthetic_score" in config.micro_conditioning
    latents = config.vae.latent_channels
    tasks = {2 * latents: "InstructPix2Pix", 2 * latents + 1: "Inpaint"}
    task = tasks.get(config.unet.in_channels, "Img2Img" if refiner else "")
    index: Json = {
        "_class_name": f"StableDiffusion{'XL' * sdxl}{task}Pipeline",
        "_diffusers_version": "0.36.0",  # the oldest supported; some pipelines require the key
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if config.unet.guidance_dim:
        index["_class_name"] = "LatentConsistencyModelPipeline"
    if sdxl:
        index |= {"force_zeros_for_empty_prompt": config.zero_negative, "requires_aesthetics_score": refiner}
    else:
        index["requires_safety_checker"] = False
    absent = ("feature_extractor", "image_encoder", *(TOWERS if sdxl else ("safety_checker",)))
    absent += ("tokenizer", "tokenizer_2") * sdxl
    index |= {name: [None, None] for name in absent}
    for name, text in zip(towers, config.text, strict=True):
        index[name] = ["transformers", "CLIPTextModelWithProjection" if text.projection else "CLIPTextModel"]
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    return index


def _read_index(folder: Path) -> tuple[Json, tuple[str, ...], tuple[str, ...]]:
    """Read and check model_index.json. Returns its contents, the folders of the text encoders, and notes."""
    if not (folder / "model_index.json").is_file():
        snapshots = sorted(folder.glob("snapshots/*/model_index.json"))
        inner = sorted(folder.glob("*/model_index.json"))
        files = sorted(path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".ckpt"))
        hint = "give the folder that holds model_index.json"
        if any((folder / name).is_file() for name in LORA_FILES):
            raise ValueError(f"{folder} is a LoRA and no model: give it with --lora, and the model with --model")
        if snapshots:
            hint = f"it is a cache of Hugging Face, give {snapshots[-1].parent}"
        elif inner:
            hint = f"give the folder in it that does, {inner[0].parent}"
        elif files:
            hint = f"give a file in it, such as {folder / files[0]}"
        raise ValueError(f"{folder} is not a model folder, it has no model_index.json: {hint}")
    index = _read_json(folder / "model_index.json")
    pipeline = index.get("_class_name")
    present = [name for name in index if _class(index, name)]
    if refused := sorted(set(present) & set(_REFUSED)):
        raise ValueError(f"{folder} is a {pipeline} with {some(refused)}, which is not supported")
    towers = tuple(name for name in TOWERS if name in present) or TOWERS[:1]  # SDXL's refiner has the second alone
    needed = ["unet", "vae", "scheduler", *towers, *(name.replace("text_encoder", "tokenizer") for name in towers)]
    for name in needed:
        if name not in present or not (folder / name).is_dir():
            raise ValueError(f"{folder} lacks its {name}: fetch the whole folder again")
        if (kind := _class(index, name)) not in (allowed := _CLASSES.get(name, (kind,))):
            raise ValueError(f"the {name} of {folder} is {kind}, supported are {', '.join(allowed)}")
    others = sorted(set(present) - {*needed, "safety_checker", "feature_extractor"})
    return index, towers, (f"its {some(others)} is not used",) if others else ()


def _class(index: Json, name: str) -> str:
    """The class of a component in model_index.json; "" if it is absent or null."""
    value = index.get(name)
    return str(value[1]) if isinstance(value, list) and len(value) == 2 and value[1] else ""


def config_of(folder: Path, part: str = "", name: str = "config.json") -> tuple[Json, str]:
    """Return the config of `folder` or of its component `part`, and the path of the config."""
    path = folder / part / name
    config = _read_json(path)
    kind = config.get("_class_name") if part in ("unet", "vae") else None
    if kind not in (None, *_CLASSES.get(part, ())):
        raise ValueError(f"{path} describes {kind}, supported are {', '.join(_CLASSES[part])}")
    return config, str(path)


def _read_json(path: Path) -> Json:
    check_file(path, "fetch the folder again")
    return parse_object(path.read_bytes(), path)


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors file of a component, or its shards; a variant such as fp16 if there is no plain one."""
    files = sorted(folder.glob(f"{stem}.*.safetensors"))
    others = [path.name.split(".")[1].split("-")[0] for path in files]  # a shard ends in -00001-of-2
    for variant in ("", ".fp16", *(f".{name}" for name in others)):
        file = folder / f"{stem}{variant}.safetensors"
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if file.is_file() or file.is_symlink():
            return [file]
        if index.is_file():
            return _shards(index)
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    what = f"only {pickles[0]}, a pickle, which `ldm convert` makes a .safetensors file of" if pickles else "no weights"
    raise ValueError(f"{folder} has {what}: it needs {stem}.safetensors")


def _shards(index: Path) -> list[Path]:
    """The files that a shard index names. Raises ValueError for a file that is not beside the index."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} must hold a weight_map of tensor names to file names")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name[:100]!r}, which is not a .safetensors file beside it")
        check_file(index.parent / name, f"{index.name} names it; fetch the folder again")
    return [index.parent / name for name in names]
