"""From a path to a `Source`: opening what is there, taking parts from elsewhere, and comparing it with the networks."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import get_args

import torch

from ldm.checkpoint.folder import open_folder
from ldm.checkpoint.known import KNOWN, KNOWN_SIZES
from ldm.checkpoint.limits import check_limits
from ldm.checkpoint.parts import TOWERS, Source, check, modules, recognise
from ldm.checkpoint.pickles import PickledTensors, is_pickle
from ldm.checkpoint.single import open_single
from ldm.checkpoint.tensors import TensorFiles, Tensors
from ldm.config import Prediction
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.models.vae import VAE

REPLACEABLE = ("unet", "vae", "text_encoder")


def open_source(
    path: str | Path,
    *,
    prediction: Prediction | None = None,
    ema: bool = False,
    sha256: str | None = None,
    pickles: bool = False,
) -> Source:
    """Understand what is at `path`, a model or parts of one, without reading it.

    sha256: of the file, to look it up among the known ones. pickles: whether a pickle may be opened, safely.
    Raises ValueError for what is neither, saying what it is instead, or what is wrong with it.
    """
    if prediction not in (None, *get_args(Prediction)):
        choices = ", ".join(get_args(Prediction))
        raise ValueError(f"prediction must be one of {choices}, got {prediction!r}")
    path = Path(path)
    try:
        if path.is_dir():
            if ema:
                raise ValueError(
                    f"{path} is a folder, which holds one set of weights: leave out ema, or give the single file"
                )
            return open_folder(path, prediction=prediction, pickles=pickles)
        pickled = pickles and is_pickle(path)
        tensors: Tensors = PickledTensors(path) if pickled else TensorFiles([path])
        known = KNOWN.get(sha256 or "") or KNOWN_SIZES.get(path.stat().st_size)
        return open_single(tensors, prediction=prediction, ema=ema, known=known)
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error  # of numbers that do not go together


def merge(source: Source, replace: Mapping[str, str | Path]) -> Source:
    """Return `source` with the parts that `replace` names taken from elsewhere.

    A VAE from a single file takes the scale of the model that it joins, a text encoder how its outputs are used.
    Raises ValueError for a part that is not there, or of another size.
    """
    for name, path in replace.items():
        if name not in REPLACEABLE:
            raise ValueError(f"parts to replace are {', '.join(REPLACEABLE)}, got {name!r}")
        other = open_source(path)
        if name not in other.parts:
            raise ValueError(
                f"{path} holds no {name}, only {', '.join(other.parts)}: give one that does"
            )
        source = _replaced(source, other, name, path)
    return source


def check_complete(source: Source, path: str | Path) -> None:
    """Raise ValueError if a part that the model needs is absent."""
    for name in ("unet", "vae", *TOWERS[: len(source.config.text)]):
        if name not in source.parts:
            option = name.removesuffix("_2")
            hint = f"give a full checkpoint, or another file's with {option}= (--{option.replace('_', '-')})"
            for folder in Path(path).resolve().parents[:2]:
                if (folder / "model_index.json").is_file():
                    hint = f"it is a part of the model in {folder}: give that"
            raise ValueError(f"{path} has no {name}, only {', '.join(source.parts)}: {hint}")


def left_out(source: Source) -> tuple[str, ...]:
    """Return the names of the tensors in a source's files that are known to be of no use, sorted."""
    parts = source.parts.values()
    names = {n for part in parts for n in part.tensors.shapes if part.ignored(n)}
    return tuple(sorted(names.difference(*(part.unused for part in parts))))


def check_fits(source: Source, path: str | Path) -> tuple[UNet, VAE, TextEncoder]:
    """Return the networks on the meta device, compared with the files but not read.

    Raises ValueError for a configuration that describes no model, and for tensors that do not fit it.
    """
    networks = build(source, path)
    check(modules(*networks), source.parts, source.dropped)
    return networks


def _replaced(source: Source, other: Source, name: str, path: str | Path) -> Source:
    """`source` with its part `name` from `other`, which was opened from `path`."""
    config, parts = source.config, dict(source.parts)
    taken = {name: name}  # of ours by which of theirs
    why = f"{source.why}; its {name} is from {path}"
    if name == "vae":
        vae = other.config.vae
        if other.layout == "ldm":
            vae = dataclasses.replace(vae, scaling_factor=config.vae.scaling_factor)
        config = dataclasses.replace(config, vae=vae)
    elif name == "unet":
        diffusion = config.diffusion
        if other.layout == "ldm" or len(other.parts) > 1:  # the folder of a part does not say
            diffusion, why = other.config.diffusion, f"{why} ({other.why})"
        config = dataclasses.replace(config, unet=other.config.unet, diffusion=diffusion)
    else:
        widths = [text.width for text in config.text]
        theirs = dict(zip(TOWERS, other.config.text, strict=False))
        taken = {}
        for tower in other.parts.keys() & theirs.keys():
            if theirs[tower].width not in widths:
                raise ValueError(
                    f"the text encoder of {path} is {theirs[tower].width} wide, that of {config.name} "
                    f"{' and '.join(map(str, widths))}: give one of the same family"
                )
            taken[TOWERS[widths.index(theirs[tower].width)]] = tower
    dropped = [part for n, part in source.parts.items() if n in taken]
    dropped += [part for n, part in other.parts.items() if n not in taken.values()]
    parts |= {ours: other.parts[tower] for ours, tower in taken.items()}
    if config != source.config:  # another model, perhaps one that has a name
        known = recognise(config.unet, config.vae, config.text, config.diffusion)
        config = dataclasses.replace(known, image_size=config.image_size)
    return dataclasses.replace(
        source, config=config, parts=parts, why=why, dropped=(*source.dropped, *dropped)
    )


def build(source: Source, path: str | Path) -> tuple[UNet, VAE, TextEncoder]:
    """Return the source's networks on the meta device. Raises ValueError if its configuration describes none."""
    config = source.config
    tokenizers = source.tokenizers()
    for tokenizer, text in zip(tokenizers, config.text, strict=True):
        if (tokens := max(tokenizer.vocab.values()) + 1) > text.vocab_size:
            raise ValueError(
                f"the tokenizer of {path} has {tokens} tokens, its text encoder knows "
                f"{short(text.vocab_size)}"
            )
    check_limits(config, path)
    try:
        with torch.device("meta"):
            text_encoder = TextEncoder(config.text, tokenizers)
            return UNet(config.unet), VAE(config.vae), text_encoder
    except (
        Exception
    ) as error:  # whatever torch and transformers raise for numbers that do not go together
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the configuration of {path} describes no model: {reason}") from error
