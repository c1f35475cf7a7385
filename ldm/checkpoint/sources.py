"""From a path to a checked `Source`: open it, replace parts of it, and compare its tensors with the networks."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, get_args

import torch

from ldm.checkpoint.folder import open_folder
from ldm.checkpoint.identify import IGNORED
from ldm.checkpoint.known import KNOWN_SIZES, known_files
from ldm.checkpoint.parts import TOWERS, Source, check, modules
from ldm.checkpoint.pickles import PickledTensors, is_pickle
from ldm.checkpoint.single import open_single
from ldm.checkpoint.tensors import TensorFiles, Tensors, some
from ldm.diffusion.denoiser import Prediction
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.presets import SD15, recognize

N = TypeVar("N")
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


def open_part(path: str | Path, name: str) -> Source:
    """Open a model, or a part of one, that has the part `name`, one of REPLACEABLE.

    Raises ValueError as `open_source` does, and for a path without that part.
    """
    if name not in REPLACEABLE:
        raise ValueError(f"the parts of a model are {', '.join(REPLACEABLE)}, got {name!r}")
    source = open_source(path)
    check_holds(source, path, [name])
    return source


def check_holds(source: Source, path: str | Path, names: Iterable[str]) -> None:
    """Raise ValueError if `source` lacks one of the parts `names`."""
    for name in names:
        if name not in source.parts:
            raise ValueError(f"{path} holds no {name}, only {', '.join(source.parts)}: give one that does")


def merge(source: Source, replace: Mapping[str, str | Path]) -> Source:
    """Return `source` with the parts in `replace`, by name, taken from other files or folders.

    The model's scaling factor applies to a VAE from a file without a model, and its choice of outputs to a new text
    encoder. Raises ValueError for a part that is not at its path, or is of another size.
    """
    for name, path in replace.items():
        source = _replaced(source, open_part(path, name), name, path)
    return source


def _replaced(source: Source, other: Source, name: str, path: str | Path) -> Source:
    config, parts, notes = source.config, dict(source.parts), list(source.notes)
    taken = {name: name}  # our part -> the part of `other` that replaces it
    why = f"{source.why}; its {name} is from {path}"
    if name == "vae":
        vae, scale = other.config.vae, config.vae.scaling_factor
        sdxl = config.unet.is_sdxl
        alone = other.layout == "ldm" and len(other.parts) == 1
        unknown = alone and vae == SD15.vae  # a VAE's file without a hint is read as that of SD 1
        if vae.scaling_factor != scale and not unknown:
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
    networks = build_unet(source, path), build_vae(source, path), build_text_encoder(source, path)
    try:
        config.micro_conditioning  # noqa: B018  # raises ValueError for an unknown width of the vector
    except ValueError as error:
        raise _inconsistent(path, error) from error
    return networks


def build_unet(source: Source, path: str | Path) -> UNet:
    """Return the UNet of `source` on the meta device. Raises ValueError if its configuration is inconsistent."""
    config = source.config.unet
    depths = (*config.depth, *(config.up_depth or ()))
    counts = [n for depth in depths for n in (depth if isinstance(depth, tuple) else (depth,))]
    counts += [config.mid_depth, config.res_blocks, len(config.channels)]
    return _on_meta(lambda: UNet(config), counts, source, path)


def build_vae(source: Source, path: str | Path) -> VAE:
    """Return the VAE of `source` on the meta device. Raises ValueError if its configuration is inconsistent."""
    config = source.config.vae
    return _on_meta(lambda: VAE(config), [config.res_blocks, len(config.channels)], source, path)


def build_text_encoder(source: Source, path: str | Path) -> TextEncoder:
    """Return the text encoder of `source` on the meta device.

    Raises ValueError if its configuration is inconsistent, and for a tokenizer with more tokens than the encoder.
    """
    configs = source.config.text
    for tokenizer, text in zip(source.tokenizers, configs, strict=True):
        if (tokens := max(tokenizer.vocab.values()) + 1) > text.vocab_size:
            raise ValueError(f"the tokenizer of {path} has {tokens} tokens, its text encoder knows {text.vocab_size}")
    counts = [text.layers or -1 for text in configs]  # a tower without layers is an error
    return _on_meta(lambda: TextEncoder(configs, source.tokenizers), counts, source, path)


def _on_meta(network: Callable[[], N], counts: Sequence[int], source: Source, path: str | Path) -> N:
    """Return `network()` on the meta device. counts: the numbers of its blocks and levels.

    Raises ValueError for a number that no file has tensors for, and for numbers that do not go together.
    """
    tensors = sum(len(part.tensors.shapes) for part in source.parts.values())
    if max(counts) > tensors or min(counts) < 0:  # a damaged number may be too large to build the network
        wants = f"{min(counts)} to {max(counts)} blocks of a kind"
        raise ValueError(f"the configuration of {path} wants {wants}, and there are {tensors} tensors")
    try:
        with torch.device("meta"):
            return network()
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise _inconsistent(path, error) from error


def _inconsistent(path: str | Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    return ValueError(f"the configuration of {path} describes no model: {reason}")
