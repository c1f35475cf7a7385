"""The record in a picture: how to make the picture again bit for bit, as JSON in a text chunk of the PNG file."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import ldm
from ldm.config import option
from ldm.control import Control
from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.samplers import conventions
from ldm.image_prompt import ImagePrompt
from ldm.loading import BUNDLED, locate, named_file
from ldm.pictures import a1111_parameters, read_texts
from ldm.placement.memory import Placement
from ldm.refiner import HANDOVER, check_handover
from ldm.regions import RegionalPrompt
from ldm.request import Plan, Request
from ldm.sizes import Sizes
from ldm.source import Source
from ldm.strict import from_dict
from ldm.variations import Variation

KEY = "ldm"  # the key of our text chunk
OTHERS = {  # the keys of other programs' text chunks
    "parameters": "AUTOMATIC1111's web UI, or of a program that writes as it does",
    "workflow": "ComfyUI",
    "invokeai_metadata": "InvokeAI",
    "sd-metadata": "InvokeAI",
}
MODEL_AND_PARTS = ("model", "prediction", "ema", "vae", "unet", "text_encoder")  # all but the refiner
PARTS = {
    kind.__name__: kind for kind in (Sizes, Source, Control, ImagePrompt, RegionalPrompt, Variation)
}  # of a request
UNRECORDED = ("offload", "cuda_graph")  # fields of a Placement that do not change the results


@dataclass(frozen=True)
class ModelChoice:
    """The choice of the model: the arguments of `ldm.load` except the placement, and an SDXL refiner."""

    model: str = option(BUNDLED, "a folder or .safetensors file")
    prediction: Prediction | None = option(None, "what the UNet predicts, if its file says nothing or is wrong")
    ema: bool = option(False, "use the averaged copy of the UNet, from a file that holds both")
    vae: str | None = option(None, "a file or folder to take the VAE from")
    unet: str | None = option(None, "a file or folder to take the UNet from")
    text_encoder: str | None = option(None, "a file or folder to take the text encoder from")
    embeddings: tuple[str, ...] = option(
        (), "a textual inversion; its name is the file's, or give NAME=FILE; can be repeated", "--embedding"
    )
    loras: tuple[str, ...] = option(
        (), "a LoRA, as FILE or FILE:WEIGHT such as a.safetensors:0.8; can be repeated", "--lora"
    )
    refiner: str | None = option(None, "an SDXL refiner for the last steps: a folder or .safetensors file")
    handover: float = option(HANDOVER, "with --refiner: the share of the timesteps that the base model runs")

    def __post_init__(self) -> None:
        """Check the handover."""
        check_handover(self.handover)
        if self.refiner is None and self.handover != HANDOVER:
            raise ValueError(f"handover {self.handover} needs a refiner: give one, or leave out the handover")

    @property
    def paths(self) -> dict[str, Path]:
        """The files and folders of the model by field: replaced parts, the refiner, embedding_1, lora_1 and so on."""
        named = {n: getattr(self, n) for n in ("model", "vae", "unet", "text_encoder", "refiner")}
        learned = {f"embedding_{i}": named_file(word)[1] for i, word in enumerate(self.embeddings, 1)}
        if self.loras:
            from ldm.lora import Lora  # few pictures use LoRAs

            learned |= {f"lora_{i}": Path(Lora.parse(word).path) for i, word in enumerate(self.loras, 1)}
        return {name: locate(path) for name, path in named.items() if path is not None} | learned


@dataclass(frozen=True)
class Environment:
    """Versions, hardware and number of threads: they can change the last bits of the results."""

    ldm: str
    torch: str
    hardware: str
    threads: int


@dataclass(frozen=True)
class Record:
    """How a picture was made: the request, the model, and the defaults that the model filled in.

    resolved: the main fields of the `Plan`. name, why: the name of the identified model, and how it was identified.
    sha256: the digest of each path in `model.paths`, of the source picture and of its mask. Other files have numbers
      from 1. A ControlNet and its picture are "controlnet_1" and "control_1"; the mask of a region is "region_1". An
      image prompt has "ip_adapter_1", "image_prompt_1" and "image_encoder_1".
    placement: its fields, with device and dtypes as text. picture: the index of the picture; None: a grid of all.
    adjusted: what was changed because memory was too small or a part failed, see `ldm.rescue`.
    """

    task: Literal["txt2img", "img2img", "inpaint", "edit"]
    request: Request
    model: ModelChoice
    sha256: Mapping[str, str]
    environment: Environment
    placement: Mapping[str, Any]
    resolved: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    why: str = ""
    picture: int | None = None
    adjusted: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON-ready values, without None and empty tables.

        Empty texts stay: for SDXL, an empty negative prompt makes another picture than none.
        """
        table = dataclasses.asdict(
            self, dict_factory=lambda pairs: {k: v for k, v in pairs if v is not None and v not in ({}, ())}
        )
        for name in ("controls", "image_prompts"):
            for part, held in zip(getattr(self.request, name), table["request"].get(name, ()), strict=True):
                held |= {key: str(getattr(part, key)) for key in ("model", "image", "encoder") if key in held}
        for region in table["request"].get("regions", ()):
            region["mask"] = str(region["mask"])
        source = table["request"].get("source", {})
        for picture in (source, source.get("mask", {})):
            if "image" in picture:
                picture["image"] = str(picture["image"])
        return table

    def texts(self, picture: int | None) -> dict[str, str]:
        """Return the PNG text chunks for this picture, or for a grid of all (None): A1111's `parameters`, and ours."""
        request, resolved, vae, refiner = self.request, self.resolved, self.model.vae, self.model.refiner
        image_guidance = request.source.image_guidance if request.source else None
        varied = request.variation.of(picture or 0) if request.variation else None
        strength = request.source.strength if request.source and request.source.start_sigma is None else None
        parameters = a1111_parameters(
            request.prompts[(picture or 0) % len(request.prompts)],
            request.negative_prompt or "",
            {
                "Steps": resolved["steps"],
                "Sampler": conventions(resolved["sampler"]).a1111 or resolved["sampler"],
                "Schedule type": str(resolved["spacing"]).capitalize(),
                "CFG scale": resolved["guidance_scale"],
                "Seed": request.seeds[picture or 0],
                "Size": f"{resolved['width']}x{resolved['height']}",
                "Model hash": self.sha256["model"][:10],
                "Model": self.name,
                **({"VAE hash": self.sha256["vae"][:10], "VAE": Path(vae).name} if vae else {}),
                **({"Refiner": f"{Path(refiner).stem} [{self.sha256['refiner'][:10]}]"} if refiner else {}),
                **({"Refiner switch at": self.model.handover} if refiner else {}),
                **({"Denoising strength": strength} if strength else {}),
                **({"Variation seed": varied.other_seed} if varied and varied.other_seed is not None else {}),
                **({"Variation seed strength": varied.amount} if varied and varied.other_seed is not None else {}),
                **({"Image CFG scale": image_guidance} if image_guidance is not None else {}),
                **({"Clip skip": request.clip_skip} if (request.clip_skip or 1) > 1 else {}),
                "RNG": "CPU",
                "Version": f"ldm {self.environment.ldm}",
            },
        )
        return {
            "parameters": parameters,
            KEY: json.dumps(dataclasses.replace(self, picture=picture).as_dict(), default=str),
        }


def remember(plan: Plan, choice: ModelChoice, pipe: ldm.Pipeline, sha256: Mapping[str, str]) -> Record:
    """Make the record of a run of `plan` with `pipe`, which was loaded from `choice`."""
    chosen = {f.name: getattr(pipe.placement, f.name) for f in dataclasses.fields(Placement)}
    device = torch.device(pipe.placement.device or "cpu")
    words = {n: v if isinstance(v, bool | None) else str(v).removeprefix("torch.") for n, v in chosen.items()}
    return Record(
        task=plan.request.task,
        request=plan.request,
        model=choice,
        sha256=sha256,
        environment=environment(device),
        placement={name: word for name, word in words.items() if name not in UNRECORDED},
        resolved={
            "steps_run": len(plan.sigmas) - 1,
            **{
                name: getattr(plan, name)
                for name in ("steps", "guidance_scale", "sampler", "spacing", "width", "height")
            },
            **plan.sizes,
        },
        name=pipe.config.name,
        why=pipe.why,
    )


def environment(device: torch.device) -> Environment:
    """Return the versions, hardware and number of threads of this process, if it computes on `device`."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
    return Environment(ldm=ldm.__version__, torch=torch.__version__, hardware=hardware, threads=torch.get_num_threads())


def recall(path: str | Path) -> Record:
    """Read the record in the PNG at `path`.

    Raises ValueError for a file that is not a picture, has no record, or has a record that this version cannot repeat.
    """
    texts = read_texts(path)
    for key, program in OTHERS.items():
        if key in texts and KEY not in texts:
            raise ValueError(
                f"{path} holds no record of ldm, but the {key!r} of {program}; give the prompt and options yourself: "
                f"{texts[key][:500]!r}"
            )
    text = texts.get(KEY)
    if text is None:
        raise ValueError(
            f"{path} holds no record of how ldm made it, or another program removed it; give the prompt and options"
        )
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its {KEY!r} chunk is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: its {KEY!r} chunk is not a JSON object")
    try:
        table = _upgraded(table) if "command" in table else table
        record = from_dict(table, Record, where=f"the record in {path}", names=PARTS)
        Placement(**record.placement)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{error}; ldm {ldm.__version__} cannot repeat this record: give the prompt and options yourself"
        ) from error
    if record.picture is not None and not 0 <= record.picture < record.request.images:
        raise ValueError(
            f"{path}: picture must be one of the {record.request.images} of its request, got {record.picture}"
        )
    return record


def _upgraded(table: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a record in the first format, which stored the model's defaults as if the user had asked for them."""
    used, request = dict(table["model"]), dict(table["request"])
    if table["placement"].get("int8"):
        raise ValueError("the picture was made with weights in int8, which this version does not have")
    sizes = {f.name: request.pop(f.name) for f in dataclasses.fields(Sizes) if f.name in request}
    parts = {name: used[name] for name in ("vae", "unet", "text_encoder") if name in used}
    choice = {"model": used["path"], **{name: used[name] for name in ("prediction", "ema") if name in used}}
    return {
        "task": table["command"],
        "request": request | {"sizes": sizes},
        "model": choice | {name: part["path"] for name, part in parts.items()},
        "sha256": {"model": used["sha256"]} | {name: part["sha256"] for name, part in parts.items()},
        "placement": {name: value for name, value in table["placement"].items() if name != "int8"},
        "environment": {name: value for name, value in table["environment"].items() if name != "transformers"},
        **{name: used[name] for name in ("name", "why") if name in used},
        **{name: table[name] for name in ("picture",) if name in table},
    }


def digest(path: str | Path) -> str:
    """Return the sha256 of a file, or for a folder the sha256 of the list of its files with their digests.

    The list has the files in and below the folder that can change a picture: .safetensors, .json and .txt.
    """
    path = Path(path)
    if not path.is_dir():
        state = path.stat()
        return _digest(path.resolve(), state.st_size, state.st_mtime_ns)
    parts = sorted(
        (part.relative_to(path).as_posix(), digest(part))
        for part in path.rglob("*")
        if part.suffix in (".safetensors", ".json", ".txt") and part.is_file()
    )
    return hashlib.sha256("".join(f"{n} {d}\n" for n, d in parts).encode()).hexdigest()


@functools.lru_cache(maxsize=1000)
def _digest(path: Path, size: int, changed: int) -> str:
    """Return the sha256 of a file. A process that makes many pictures reads each large file once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
