"""Models on disk: identify, load, save and convert. Strict: every tensor is used, known to be useless, or an error."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ldm.checkpoint.contents import find
from ldm.checkpoint.folder import write_folder, write_vae
from ldm.checkpoint.kinds import kind_of
from ldm.checkpoint.known import digest
from ldm.checkpoint.limits import check_limits
from ldm.checkpoint.parts import (
    Layout,
    Model,
    ModelLike,
    Source,
    check,
    fill,
    modules,
)
from ldm.checkpoint.pickles import PickledTensors, is_pickle
from ldm.checkpoint.single import write_single
from ldm.checkpoint.sources import check_complete, check_fits, left_out, merge, open_source
from ldm.checkpoint.writing import beside, replace_folder, write_tensors
from ldm.config import ModelConfig, Prediction
from ldm.models.vae import VAE


class Identity(NamedTuple):
    """What a file or folder holds, and why that is known. preset: the name of the one it equals, or "custom"."""

    preset: str
    prediction_type: Prediction
    why: str
    layout: Layout
    config: ModelConfig


def identify(
    path: str | Path, *, prediction: Prediction | None = None, check_sha256: bool = False
) -> Identity:
    """Tell what model is at `path` from configs and headers alone, reading no tensor.

    path: a folder of ours, a diffusers folder, or a single .safetensors file. The content decides, not the name.
    prediction: what the user says that it predicts. check_sha256: look the file up among the known ones, which reads
    all of it. (One tensor of a kilobyte is read of SD 2 files, whose names and shapes do not tell eps from v.)
    Raises ValueError saying what is there instead, or what is wrong with it.
    """
    sha256 = digest(path) if check_sha256 else None
    source = open_source(path, prediction=prediction, sha256=sha256)
    check_complete(source, path)
    check_limits(source.config, path)
    config = source.config
    return Identity(config.name, config.diffusion.prediction, source.why, source.layout, config)


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    vae_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    prediction: Prediction | None = None,
    ema: bool = False,
    replace: Mapping[str, str | Path] = {},
) -> Model:
    """Load the model at `path`, each tensor going straight to `device` in `dtype` (the VAE's in `vae_dtype` if given).

    Networks are built without memory and given the file's tensors; on the CPU, what needs no cast stays memory-mapped.
    dtype: None keeps what each tensor is stored in. prediction: what the user says that the UNet predicts.
    ema: take the averaged copy of the UNet that a full single file holds.
    replace: "unet", "vae" or "text_encoder" -> a file or folder to take that from; what only `path` lacks may be there.
    Raises ValueError as `identify` does, for tensors that are missing, unknown or of another shape, naming them, and
    for those that are read and not finite.
    """
    source = open_source(path, prediction=prediction, ema=ema)
    return _load(merge(source, replace), path, dtype, vae_dtype or dtype, torch.device(device))


def load_vae(path: str | Path, *, device: torch.device | str = "cpu") -> VAE:
    """Load a VAE alone, in fp32, from a file or a folder that holds one, such as a model's `vae/`, or a whole model.

    Raises ValueError for a path without one, or tensors that do not match the configuration.
    """
    source = open_source(path)
    if "vae" not in source.parts:
        raise ValueError(f"{path} holds no VAE: give a VAE, or a model that has one")
    with torch.device("meta"):
        vae = VAE(source.config.vae)
    part = source.parts["vae"]
    dropped = [other for name, other in source.parts.items() if name != "vae"]
    check({"vae": vae}, {"vae": part}, dropped)
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
    with beside(path) as new:
        if layout == "ldm":
            write_single(new, model, dtype)
            new.replace(path)
        else:
            write_folder(new, model, dtype)
            replace_folder(path, new)


def convert(
    path: str | Path,
    target: str | Path,
    *,
    layout: Layout = "diffusers",
    dtype: torch.dtype | None = None,
    prediction: Prediction | None = None,
    ema: bool = False,
    replace: Mapping[str, str | Path] = {},
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Write the model at `path`, which may be a pickle, to `target` in another layout or dtype; else bit for bit.

    A pickle that holds something else, such as a VAE or a ControlNet, becomes a .safetensors file (layout "ldm") with
    the same names. Returns the names of the tensors that are left out, being of no use: schedules, averaged copies.
    Raises ValueError as `load` and `save` do, and for a pickle that holds anything but tensors and plain values.
    """
    _check_target(Path(target), layout, overwrite)
    if not replace and is_pickle(Path(path)):
        tensors = PickledTensors(Path(path))
        if kind_of(tensors) or not find(tensors).whole:
            _rewrite(tensors, Path(target).resolve(), layout, dtype)
            return ()
    source = merge(open_source(path, prediction=prediction, ema=ema, pickles=True), replace)
    model = _load(source, path, dtype, dtype, torch.device("cpu"))
    save(model, target, layout=layout, dtype=dtype, overwrite=overwrite)
    return left_out(source)


def save_vae(vae: VAE, path: str | Path, *, image_size: int) -> None:
    """Save a VAE alone as a folder for `load_vae` and for diffusers, replacing one that is there once it is written.

    image_size: pixels it was trained at, for the configuration. Raises ValueError if something else is at `path`.
    """
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path} is not a VAE folder, so it is not overwritten: give another path")
    path = Path(path).resolve()
    with beside(path) as new:
        write_vae(new, vae, image_size)
        replace_folder(path, new)


def _rewrite(
    tensors: PickledTensors, target: Path, layout: Layout, dtype: torch.dtype | None
) -> None:
    """Write the tensors of a pickle that is no whole model under their own names, in `dtype` where they are floats."""
    if layout != "ldm":
        what = kind_of(tensors) or "a part of a model"
        raise ValueError(
            f"{tensors} is {what}, not a model: its tensors can be written into one file as they are, with layout 'ldm'"
        )
    held = {}
    for name, value in tensors.read(tensors.shapes):
        cast = dtype is not None and value.is_floating_point()
        held[name] = (value.to(dtype) if cast else value).contiguous()
    with beside(target) as new:
        write_tensors(held, new)
        new.replace(target)


def _load(
    source: Source,
    path: str | Path,
    dtype: torch.dtype | None,
    vae_dtype: torch.dtype | None,
    device: torch.device,
) -> Model:
    check_complete(source, path)
    networks = check_fits(source, path)
    for name, module in modules(*networks).items():
        wanted = vae_dtype if name == "vae" else dtype
        fill(module, source.parts[name], dtype=wanted, device=device)
    networks[2].eval()  # its towers are, as they were filled
    unused = {}
    for name, part in source.parts.items():
        for stored, value in part.tensors.read(part.unused):
            unused[f"{name}.{stored.removeprefix(part.prefix)}"] = value
    if source.kept is not None:
        unused |= source.kept.read(source.kept.shapes)
    return Model(source.config, *networks, unused, "; ".join([source.why, *source.notes]))


def _check_target(path: Path, layout: Layout, overwrite: bool) -> None:
    """Raise ValueError if saving to `path` would replace something that it must not."""
    if not path.exists():
        return
    if not overwrite:
        raise ValueError(
            f"{path} exists already: give another path, or overwrite=True (--overwrite)"
        )
    if layout == "ldm" and path.is_dir():
        raise ValueError(f"{path} is a folder and the ldm layout is one file: give a file name")
    if layout == "diffusers" and not (path / "model_index.json").is_file():
        raise ValueError(
            f"{path} is not a model folder, so it is not overwritten: give another path"
        )
