"""What a picture remembers: all it takes to make it again bit for bit, as JSON in a text chunk of its PNG."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import ldm
from ldm.config import Prediction, from_dict
from ldm.pictures import A1111_SAMPLERS, a1111_parameters, read_texts
from ldm.pipeline import Pipeline
from ldm.request import Request

KEY = "ldm"  # of the PNG's text chunk
OTHERS = {  # the text chunks of other programs
    "parameters": "AUTOMATIC1111's web UI, or of a program that writes as it does",
    "workflow": "ComfyUI",
    "invokeai_metadata": "InvokeAI",
    "sd-metadata": "InvokeAI",
}


@dataclass(frozen=True)
class PartUsed:
    """Where a part of a model came from, and the digest of what is there."""

    path: str
    sha256: str


@dataclass(frozen=True)
class ModelUsed:
    """Which model: where it was, what it is and why, the digest of its files (see `digest`), and how it was read."""

    path: str
    name: str
    sha256: str
    why: str = ""
    prediction: Prediction | None = None  # what it was said to predict
    ema: bool = False
    vae: PartUsed | None = None  # of a part that came from elsewhere
    unet: PartUsed | None = None
    text_encoder: PartUsed | None = None


@dataclass(frozen=True)
class PlacementUsed:
    """A `Placement` in words, with nothing left open, without what changes no number."""

    device: str
    dtype: str
    vae_dtype: str
    attention: str | None = None  # of networks that no placement was applied to
    guidance: str = "batched"
    vae_memory: str = "whole"
    compile: bool = False
    packed: bool = False
    int8: bool = False


@dataclass(frozen=True)
class Environment:
    """What, beside the inputs, decides the last bits of a number: versions, hardware and threads."""

    ldm: str
    torch: str
    hardware: str
    threads: int


@dataclass(frozen=True)
class Record:
    """One run of one command; `picture` is the index of the picture that holds it, None in a grid of all."""

    command: Literal["txt2img"]
    request: Request  # resolved
    model: ModelUsed
    placement: PlacementUsed
    environment: Environment
    picture: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON-ready values, without what is None."""
        return dataclasses.asdict(self, dict_factory=lambda pairs: {k: v for k, v in pairs if v is not None})

    def texts(self, picture: int | None) -> dict[str, str]:
        """Return the PNG text chunks of that picture, or of a grid of all: A1111's `parameters` and ours."""
        request = self.request
        assert request.sampler is not None  # resolved
        vae = self.model.vae
        parameters = a1111_parameters(
            request.prompt,
            request.negative_prompt or "",
            {
                "Steps": request.steps,
                "Sampler": A1111_SAMPLERS[request.sampler],
                "Schedule type": str(request.spacing).capitalize(),
                "CFG scale": request.guidance_scale,
                "Seed": request.seeds[picture or 0],
                "Size": f"{request.width}x{request.height}",
                "Model hash": self.model.sha256[:10],
                "Model": self.model.name,
                **({"VAE hash": vae.sha256[:10], "VAE": Path(vae.path).name} if vae else {}),
                **({"Clip skip": request.clip_skip} if (request.clip_skip or 1) > 1 else {}),
                "RNG": "CPU",
                "Version": f"ldm {self.environment.ldm}",
            },
        )
        return {"parameters": parameters, KEY: json.dumps(dataclasses.replace(self, picture=picture).as_dict())}


def remember(pipe: Pipeline, request: Request, model: ModelUsed) -> Record:
    """Describe the run of txt2img that makes `request` with `pipe`, which is `model`."""
    placement, weight = pipe.placement, next(pipe.unet.parameters())
    device = torch.device(placement.device or weight.device)  # weights may wait elsewhere
    return Record(
        command="txt2img",
        request=request.resolved(pipe.config),
        model=model,
        placement=PlacementUsed(
            device=str(device),
            dtype=_name(weight.dtype),
            vae_dtype=_name(next(pipe.vae.parameters()).dtype),
            attention=placement.attention,
            guidance=placement.guidance,
            vae_memory=placement.vae_memory,
            compile=placement.compile,
            packed=placement.packed,
            int8=placement.int8,
        ),
        environment=environment(device),
    )


def environment(device: torch.device) -> Environment:
    """Describe this process, computing on `device`."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
    return Environment(ldm=ldm.__version__, torch=torch.__version__, hardware=hardware, threads=torch.get_num_threads())


def recall(path: str | Path) -> Record:
    """Read the record in the PNG at `path`.

    Raises ValueError if that is no picture, holds no record, or one that this version cannot follow.
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
    if isinstance(table.get("environment"), dict):  # the first pictures name its version, too
        table["environment"].pop("transformers", None)
    try:
        record = from_dict(table, Record, where=f"the record in {path}")
    except ValueError as error:
        raise ValueError(
            f"{error}; ldm {ldm.__version__} cannot follow this record: give the prompt and options yourself"
        ) from error
    if record.picture is not None and not 0 <= record.picture < record.request.images:
        raise ValueError(
            f"{path}: picture must be one of the {record.request.images} of its request, got {record.picture}"
        )
    return record


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
