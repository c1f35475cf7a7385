"""From a path to a checked `Source`: open it, replace parts of it, and compare its tensors with the networks."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

import torch

from ldm.checkpoint.folder import open_folder
from ldm.checkpoint.identify import IGNORED
from ldm.checkpoint.known import KNOWN_SIZES, known_files
from ldm.checkpoint.parts import TOWERS, Source, check, modules
from ldm.checkpoint.pickles import PickledTensors, is_pickle
from ldm.checkpoint.single import open_single
from ldm.checkpoint.tensors import TensorFiles, Tensors, some
from ldm.config import ModelConfig, Prediction
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.presets import SD15, recognize

Networks = tuple[UNet, VAE, TextEncoder]
REPLACEABLE = ("unet", "vae", "text_encoder")


def open_source(
    path: str | Path,
    *,
    prediction: Prediction | None = None,
    ema: bool = False,
    sha256: str | None = None,
    pickles: bool = False,
) -> Source:
    """Identify a model or parts of one at `path` from headers and configurations.

    sha256: the digest of the file, to look it up in `known_files`. pickles: whether `path` may be a pickle.
    Raises ValueError for anything else at `path`, naming it, and for a damaged file.
    """
    if prediction not in (None, *get_args(Prediction)):
        raise ValueError(f"prediction must be one of {', '.join(get_args(Prediction))}, got {prediction!r}")
    if not isinstance(path, str | Path):
        raise ValueError(f"a model is named by its path, a str or a Path, got {path!r}")
    path = Path(path)
    if path.is_dir():
        if ema:
            raise ValueError(f"{path} is a folder, which holds one set of weights: leave out ema or give a single file")
        return open_folder(path, prediction=prediction, pickles=pickles)
    tensors: Tensors = PickledTensors(path) if pickles and is_pickle(path) else TensorFiles([path])
    known = known_files().get(sha256) if sha256 else KNOWN_SIZES.get(path.stat().st_size)
    return open_single(tensors, prediction=prediction, ema=ema, known=known)


def merge(source: Source, replace: Mapping[str, str | Path]) -> Source:
    """Return `source` with the parts in `replace`, by name, taken from other files or folders.

    The model's scaling factor applies to a VAE from a file without a model, and its choice of outputs to a new text
    encoder. Raises ValueError for a part that is not at its path, or is of another size.
    """
    for name, path in replace.items():
        if name not in REPLACEABLE:
            raise ValueError(f"parts to replace are {', '.join(REPLACEABLE)}, got {name!r}")
        other = open_source(path)
        if name not in other.parts:
            raise ValueError(f"{path} holds no {name}, only {', '.join(other.parts)}: give one that does")
        source = _replaced(source, other, name, path)
    return source


def _replaced(source: Source, other: Source, name: str, path: str | Path) -> Source:
    config, parts, notes = source.config, dict(source.parts), list(source.notes)
    taken = {name: name}  # our part -> the part of `other` that replaces it
    why = f"{source.why}; its {name} is from {path}"
    if name == "vae":
        vae, scale = other.config.vae, config.vae.scaling_factor
        sdxl = config.unet.is_sdxl
        alone = other.layout == "ldm" and len(other.parts) == 1  # then its scaling factor is unknown
        if vae.scaling_factor != scale and not (alone and vae == SD15.vae):
            notes.append(
                f"the VAE from {path} is made for latents scaled by {vae.scaling_factor:g}, the model's are scaled by "
                f"{scale:g}: it may belong to another family"
            )
        overflows = config.vae.overflows_fp16 if alone else vae.overflows_fp16 and sdxl
        vae = dataclasses.replace(vae, scaling_factor=scale if alone else vae.scaling_factor, overflows_fp16=overflows)
        config = dataclasses.replace(config, vae=vae)
    elif name == "unet":
        diffusion = config.diffusion
        if other.layout == "ldm" or len(other.parts) > 1:  # the folder of a UNet alone has no prediction type
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
    if config.unet != source.config.unet:  # another architecture has another name and other defaults
        known = recognize(config.unet, config.vae, config.text, config.diffusion)
        config = dataclasses.replace(known, image_size=config.image_size)
    return dataclasses.replace(
        source, config=config, parts=parts, why=why, notes=tuple(notes), dropped=(*source.dropped, *dropped)
    )


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


def check_fits(source: Source, path: str | Path) -> tuple[Networks, Source, tuple[str, ...]]:
    """Compare the tensors of `source` with its networks, which are on the meta device.

    Returns the networks, `source` with a note on tensors that are left out, and the names that no network uses.
    Raises ValueError for a configuration that describes no model, and for tensors that do not fit the networks.
    """
    networks = build(source, path)
    left = check(modules(*networks), source.parts, source.dropped)
    plain = tuple(part.prefix for part in source.parts.values() if part.ema)  # in its place the average is taken
    if strange := [name for name in left if not IGNORED.fullmatch(name) and not name.startswith(plain)]:
        what = f"left out {len(strange)} tensors that no network here uses: {some(strange)}"
        source = dataclasses.replace(source, notes=(*source.notes, what))
    return networks, source, tuple(left)


def build(source: Source, path: str | Path) -> Networks:
    """Return the networks of `source` on the meta device. Raises ValueError if the configuration is inconsistent."""
    config = source.config
    width = sum(text.width for text in config.text)
    if width != config.unet.context_dim:
        raise ValueError(
            f"the text encoder of {path} is {width} wide, its unet attends to {config.unet.context_dim}: "
            "they are of different families"
        )
    for tokenizer, text in zip(source.tokenizers, config.text, strict=True):
        if (tokens := max(tokenizer.vocab.values()) + 1) > text.vocab_size:
            raise ValueError(f"the tokenizer of {path} has {tokens} tokens, its text encoder knows {text.vocab_size}")
    tensors = sum(len(part.tensors.shapes) for part in source.parts.values())
    counts = [*_counts(config)]
    if max(counts) > tensors or min(counts) < 0:  # a damaged number may be too large to build the network
        wants = f"{min(counts)} to {max(counts)} blocks of a kind"
        raise ValueError(f"the configuration of {path} wants {wants}, and there are {tensors} tensors")
    try:
        config.micro_conditioning  # noqa: B018  # raises ValueError for an unknown width of the vector
        with torch.device("meta"):
            text_encoder = TextEncoder(config.text, source.tokenizers)
            return UNet(config.unet), VAE(config.vae), text_encoder
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:  # inconsistent numbers
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the configuration of {path} describes no model: {reason}") from error


def _counts(config: ModelConfig) -> Iterator[int]:
    """The numbers of blocks and levels of a model; -1 for a text tower without layers, which is an error."""
    yield from (config.unet.mid_depth, config.unet.res_blocks, config.vae.res_blocks)
    yield from (len(config.unet.channels), len(config.vae.channels), *(text.layers or -1 for text in config.text))
    for depth in (*config.unet.depth, *(config.unet.up_depth or ())):
        yield from depth if isinstance(depth, tuple) else (depth,)
