"""Models on disk: identify, load and save. Strict: every tensor of a file is used, known to be useless, or an error."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from ldm.checkpoint.folder import is_constant, open_folder, open_vae, write_folder, write_vae
from ldm.checkpoint.parts import Layout, Model, ModelLike, Source, check, fill
from ldm.checkpoint.single import open_single, write_single
from ldm.config import ModelConfig, Prediction
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.models.vae import VAE


class Identity(NamedTuple):
    """What a file or folder holds, and why that is known. preset: the name of the one it equals, or "custom"."""

    preset: str
    prediction_type: Prediction
    why: str
    layout: Layout
    config: ModelConfig


def identify(path: str | Path) -> Identity:
    """Tell what model is at `path` from configs and headers alone, reading no tensor.

    path: a folder of ours, a diffusers folder, or a single .safetensors file. The content decides, not the name.
    Raises ValueError saying what is there instead, or what is wrong with it.
    """
    source = _open(Path(path))
    config = source.config
    return Identity(config.name, config.diffusion.prediction, source.why, source.layout, config)


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Model:
    """Load the model at `path`, each tensor going straight to `device` in `dtype` (the VAE's in `vae_dtype` if given).

    Networks are built without memory and given the file's tensors; on the CPU, what needs no cast stays memory-mapped.
    Raises ValueError as `identify` does, and for tensors that are missing, unknown or of another shape, naming them.
    """
    source = _open(Path(path))
    config, device = source.config, torch.device(device)
    unet, vae, text_encoder = _build(source, path)
    modules = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    check(modules, source.parts, layout=source.layout, ignored=source.ignored)
    for name, part in source.parts.items():
        wanted = vae_dtype or dtype if name == "vae" else dtype
        fill(modules[name], part, dtype=wanted, device=device)
    return Model(config, unet, vae, text_encoder)


def load_vae(path: str | Path, *, device: torch.device | str = "cpu") -> VAE:
    """Load a VAE alone, in fp32, from a folder with config.json and weights, such as a model's `vae/`.

    Raises ValueError for a folder that lacks them, or tensors that do not match the configuration.
    """
    config, part = open_vae(Path(path))
    with torch.device("meta"):
        vae = VAE(config)
    check({"vae": vae}, {"vae": part}, layout="diffusers", ignored=is_constant)
    fill(vae, part, dtype=torch.float32, device=torch.device(device))
    return vae


def save(
    model: ModelLike,
    path: str | Path,
    *,
    layout: Layout = "diffusers",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Save `model` as a folder (diffusers, and ours) or as one .safetensors file (ldm), in `dtype` if given.

    Written beside `path` and renamed, so that a failure leaves what was there; what else lies in an overwritten folder
    stays. Raises ValueError for a path that exists, unless it is a model of the same layout and `overwrite` is given,
    and for a model that the layout cannot express.
    """
    if layout not in ("ldm", "diffusers"):
        raise ValueError(
            f"layout must be 'ldm' (one file) or 'diffusers' (a folder), got {layout!r}"
        )
    _check_target(Path(path), layout, overwrite)
    path = Path(path).resolve()
    with _beside(path) as new:
        if layout == "ldm":
            write_single(new, model, dtype)
            new.replace(path)
        else:
            write_folder(new, model, dtype)
            _replace_folder(path, new)


def save_vae(vae: VAE, path: str | Path, *, image_size: int) -> None:
    """Save a VAE alone as a folder for `load_vae` and for diffusers, replacing one that is there once it is written.

    image_size: pixels it was trained at, for the configuration. Raises ValueError if something else is at `path`.
    """
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path} is not a VAE folder, so it is not overwritten: give another path")
    path = Path(path).resolve()
    with _beside(path) as new:
        write_vae(new, vae, image_size)
        _replace_folder(path, new)


def _open(path: Path) -> Source:
    return open_folder(path) if path.is_dir() else open_single(path)


def _build(source: Source, path: str | Path) -> tuple[UNet, VAE, TextEncoder]:
    """The source's networks on the meta device. Raises ValueError if its configuration describes none."""
    config, tokenizer = source.config, source.tokenizer()
    known, width = min(t.vocab_size for t in config.text), sum(t.width for t in config.text)
    if len(tokenizer.vocab) > known:
        raise ValueError(
            f"the tokenizer of {path} has {len(tokenizer.vocab)} tokens, its text encoder knows {known}"
        )
    if width != config.unet.context_dim:
        raise ValueError(
            f"the text encoder of {path} is {width} wide, its unet attends to {config.unet.context_dim}"
        )
    try:
        with torch.device("meta"):
            text_encoder = TextEncoder(config.text, [tokenizer] * len(config.text))
            return UNet(config.unet), VAE(config.vae), text_encoder
    except (
        Exception
    ) as error:  # whatever torch and transformers raise for numbers that do not go together
        reason = " ".join(str(error).split())
        raise ValueError(f"the configuration of {path} describes no model: {reason}") from error


def _check_target(path: Path, layout: Layout, overwrite: bool) -> None:
    """Raise ValueError if saving to `path` would replace something that it must not."""
    if not path.exists():
        return
    if not overwrite:
        raise ValueError(f"{path} exists already: give another path, or overwrite=True")
    if layout == "ldm" and path.is_dir():
        raise ValueError(f"{path} is a folder and the ldm layout is one file: give a file name")
    if layout == "diffusers" and not (path / "model_index.json").is_file():
        raise ValueError(
            f"{path} is not a model folder, so it is not overwritten: give another path"
        )


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A path in the same folder as `path` to write to, before it is renamed; of a failure nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)
        new.unlink(missing_ok=True)


def _replace_folder(path: Path, new: Path) -> None:
    """Put the folder `new` at `path`, taking along what is in the old one and not in the new."""
    if not path.exists():
        new.rename(path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    for entry in old.iterdir():
        if not (path / entry.name).exists():
            entry.rename(path / entry.name)
    shutil.rmtree(old)
