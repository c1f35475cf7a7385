"""The options that commands share: tables of them, and what they make of the words given."""

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, get_args

import torch

import ldm
from ldm.config import Prediction, Spacing
from ldm.diffusion.samplers import SAMPLERS
from ldm.pipeline import BUNDLED, locate
from ldm.placement.memory import ATTENTION, DECODE, DTYPES, GUIDANCE, OFFLOAD

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class ModelChoice:
    """Which model a command works with: what `ldm.load` takes beside the placement."""

    model: str = BUNDLED
    prediction: Prediction | None = None
    ema: bool = False
    vae: str | None = None
    unet: str | None = None
    text_encoder: str | None = None

    @property
    def paths(self) -> dict[str, Path]:
        """Where the model and each part from elsewhere are, by field."""
        named = {n: getattr(self, n) for n in ("model", "vae", "unet", "text_encoder")}
        return {name: locate(path) for name, path in named.items() if path is not None}

    def load(self, placement: ldm.Placement) -> ldm.Pipeline:
        """Load it, and say on stderr what it was taken for and why."""
        pipe = ldm.load(
            self.model,
            placement,
            prediction=self.prediction,
            ema=self.ema,
            vae=self.vae,
            unet=self.unet,
            text_encoder=self.text_encoder,
        )
        if self.model != BUNDLED:
            print(f"ldm: {self.model}: {pipe.config.name}; {pipe.why}", file=sys.stderr)
        return pipe


# Field, flag, what --help says. Types and defaults are the dataclass's own.
MODEL_OPTIONS = (
    ("model", "--model", "a folder or .safetensors file"),
    (
        "prediction",
        "--prediction",
        f"what its UNet predicts, if its file says it wrongly: {', '.join(get_args(Prediction))}",
    ),
    ("ema", "--ema", "take the averaged copy of the UNet that a full file also holds"),
    ("vae", "--vae", "a file or folder to take the VAE from"),
    ("unet", "--unet", "the same for the UNet"),
    ("text_encoder", "--text-encoder", "the same for the text encoder"),
)
REQUEST_OPTIONS = (
    ("negative_prompt", "--negative", 'what guidance steers away from (SDXL base: none is not "")'),
    (
        "clip_skip",
        "--clip-skip",
        "layer of the text encoder, counted from 1, the last (default: the model's; of SDXL 2)",
    ),
    ("steps", "--steps", "denoising steps, 1 to 1000 (default: the model's)"),
    ("sampler", "--sampler", f"one of {', '.join(SAMPLERS)} (default: the model's)"),
    ("spacing", "--schedule", f"how steps are spread: one of {', '.join(get_args(Spacing))} (default: the model's)"),
    (
        "guidance_scale",
        "--guidance",
        "how strongly the prompt steers; up to 1: without guidance (default: the model's)",
    ),
    ("guidance_rescale", "--rescale", "0 to 1: take back the contrast that guidance adds"),
    (
        "guidance_interval",
        "--guidance-interval",
        "guide only at noise levels above LOW, up to HIGH: faster, another picture (default: at all)",
    ),
    ("seed", "--seed", "of the first picture, the next has the next; negative: a random one"),
    ("images", "--images", "how many pictures"),
    ("width", "--width", "pixels (default: the model's)"),
    ("height", "--height", "pixels (default: the model's)"),
    (
        "original_width",
        "--original-width",
        "SDXL: pixels of the image that the picture is cut from (default: the width)",
    ),
    ("original_height", "--original-height", "the same (default: the height)"),
    ("crop_top", "--crop-top", "SDXL: pixels cut off at the top of that image (default: 0)"),
    ("crop_left", "--crop-left", "the same at its left (default: 0)"),
    ("target_width", "--target-width", "SDXL: pixels that are left of that image (default: the width)"),
    ("target_height", "--target-height", "the same (default: the height)"),
    ("aesthetic_score", "--aesthetic-score", "SDXL refiner: how much people like it, about 0 to 10 (default: 6.0)"),
    (
        "negative_aesthetic_score",
        "--negative-aesthetic-score",
        "the same of what guidance steers away from (default: 2.5)",
    ),
)
EVALUATE_OPTIONS = tuple(
    option
    for option in REQUEST_OPTIONS
    if option[0] in ("steps", "sampler", "spacing", "seed") or option[0].startswith("guidance")
)
PLACEMENT_OPTIONS = (
    ("device", "--device", "cpu, cuda, cuda:N or mps; default: the GPU if there is one"),
    ("dtype", "--dtype", f"one of {', '.join(DTYPE_NAMES)}; default: float16 on CUDA, else float32"),
    ("vae_dtype", "--vae-dtype", "the same for the VAE; default: the same, bfloat16 for SDXL"),
    ("attention", "--attention", f"one of {', '.join(ATTENTION)}; default: sdpa where that never holds all scores"),
    (
        "guidance",
        "--guidance-passes",
        f"{' or '.join(GUIDANCE)}: the UNet with and without the prompt at once, or in less memory",
    ),
    (
        "vae_memory",
        "--vae-memory",
        f"{', '.join(DECODE)}: decode at once, exactly in a quarter of the memory, or nearly in 0.4 GiB",
    ),
    (
        "offload",
        "--offload",
        f"{' or '.join(OFFLOAD)}: keep on the GPU only the network, or the part of the UNet, that works",
    ),
    ("cuda_graph", "--cuda-graph", "replay the UNet's calls on a GPU (default: yes)"),
    ("compile", "--compile", "compile blocks of the UNet and the VAE when they are first called"),
    ("packed", "--packed", "hold weights in the order that a CPU computes in: faster (default: yes, on a CPU)"),
    ("int8", "--int8", "hold the UNet's linear layers in eight bits, approximately; needs torchao"),
)


def add_options(parser: argparse.ArgumentParser, kind: type, options: Sequence[tuple[str, str, str]]) -> None:
    """Add a flag per option; one that is not given is None, so that the field's own default holds."""
    hints = typing.get_type_hints(kind)
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    for name, flag, text in options:
        if hints[name] is bool:
            parser.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, help=text)
            continue
        if defaults[name] is not None:
            text += f" (default: {defaults[name]})"
        kind, words = _words(hints[name])
        parser.add_argument(
            flag,
            dest=name,
            type=kind,
            nargs=words,
            metavar=flag[2:].upper() if words is None else ("LOW", "HIGH"),
            help=text,
        )


def _words(hint: Any) -> tuple[type, int | None]:
    """What reads a command-line word into a field of this annotation, int, float or str; and 2 for a pair of them."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = get_args(hint)[0]
    if typing.get_origin(hint) is tuple:
        return get_args(hint)[0], 2
    return (hint if hint in (int, float) else str), None


def given(args: argparse.Namespace, options: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """Return the fields whose flag was given, and what was given."""
    return {n: getattr(args, n) for n, _, _ in options if getattr(args, n) is not None}


def read_placement(names: dict[str, Any]) -> ldm.Placement:
    """Return the fast placement with the fields that are given in words, checked against this machine."""
    dtypes = {n: read_dtype(n, names[n]) for n in ("dtype", "vae_dtype") if n in names}
    return ldm.Placement.fast(**(names | dtypes))


def read_dtype(name: str, word: str) -> torch.dtype:
    """Return the dtype of that name, which was given for `name`. Raises ValueError for another word."""
    if word not in DTYPE_NAMES:
        raise ValueError(f"{name} must be one of {', '.join(DTYPE_NAMES)}, got {word!r}")
    return DTYPE_NAMES[word]
