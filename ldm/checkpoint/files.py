"""Models on disk: identify, load, save and convert them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.atomic import beside, replace_folder
from ldm.checkpoint import sources
from ldm.checkpoint.folder import write_folder, write_vae
from ldm.checkpoint.identify import find
from ldm.checkpoint.known import kind_of
from ldm.checkpoint.parts import TOWERS, Model, ModelLike, Source, check, fill, modules
from ldm.checkpoint.pickles import PickledTensors, is_pickle
from ldm.checkpoint.single import write_single
from ldm.checkpoint.sources import Networks
from ldm.checkpoint.tensors import some, write_tensors
from ldm.config import Layout, ModelConfig
from ldm.diffusion.denoiser import Prediction
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.models.vae import VAE


class Identity(NamedTuple):
    """A model on disk, identified and checked, whose tensors are not read yet."""

    source: Source
    networks: Networks  # on the meta device
    config: ModelConfig
    preset: str  # the name of the architecture in `ldm.presets`, or "custom"
    prediction: Prediction
    why: str  # the reason for the architecture and the prediction, and notes for the user
    left: tuple[str, ...]  # names of the tensors that no network uses


def identify(
    path: str | Path,
    *,
    prediction: Prediction | None = None,
    ema: bool = False,
    replace: Mapping[str, str | Path] = {},
    pickles: bool = False,
) -> Identity:
    """Identify the model at `path` and check that its tensors fit its networks, from headers and configs alone.

    path: a folder in diffusers' layout, or a .safetensors file; the content decides, not the name. prediction: what the
    UNet predicts, whatever the file says. ema: use the moving average of the UNet in a full single file. replace:
    "unet", "vae" or "text_encoder" -> a file or folder to take that part from. pickles: whether `path` may be a pickle.
    Of SD 2 files one tensor of a kilobyte is read, because names and shapes do not tell eps from v.
    Raises ValueError for anything but a model, naming it, and for tensors that are missing or of another shape.
    """
    source = sources.merge(sources.open_source(path, prediction=prediction, ema=ema, pickles=pickles), replace)
    sources.check_complete(source, path)
    networks, source, left = sources.check_fits(source, path)
    config, why = source.config, "; ".join([source.why, *source.notes])
    return Identity(source, networks, config, config.name, config.diffusion.prediction, why, left)


def read(
    model: Identity,
    *,
    dtype: torch.dtype | None = None,
    vae_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Model:
    """Read the tensors of an identified model, one at a time, to `device` and in `dtype` (None: the stored dtype).

    vae_dtype: the dtype of the VAE, if another. On the CPU, tensors that need no cast stay memory-mapped.
    Raises ValueError for a tensor that is not finite in its new dtype.
    """
    source, networks = model.source, model.networks
    for name, module in modules(*networks).items():
        wanted = (vae_dtype or dtype) if name == "vae" else dtype
        fill(module, source.parts[name], dtype=wanted, device=torch.device(device))
    networks[2].eval()  # `fill` did so for its towers
    return Model(model.config, *networks, unused(source), model.why)


def unused(source: Source) -> dict[str, Tensor]:
    """Return `Model.unused` of a model on disk, memory-mapped."""
    found = {}
    for name, part in source.parts.items():
        for stored, value in part.tensors.read(part.unused):
            found[f"{name}.{stored.removeprefix(part.prefix)}"] = value
    return found if source.kept is None else found | dict(source.kept.read(source.kept.shapes))


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
    """`identify` the model at `path` and `read` it. Raises ValueError as these two do."""
    model = identify(path, prediction=prediction, ema=ema, replace=replace)
    return read(model, dtype=dtype, vae_dtype=vae_dtype, device=device)


def load_unet(
    path: str | Path, *, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
) -> UNet:
    """Load only the UNet, from a file or folder of a UNet or of a model. dtype: None keeps the stored one.

    Raises ValueError for a path without a UNet, and for tensors that do not match its configuration.
    """
    source = sources.open_part(path, "unet")
    unet = sources.build_unet(source, path)
    _read_only({"unet": unet}, source, path, dtype, device)
    return unet


def load_vae(path: str | Path, *, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu") -> VAE:
    """Load only the VAE, as `load_unet` loads the UNet."""
    source = sources.open_part(path, "vae")
    vae = sources.build_vae(source, path)
    _read_only({"vae": vae}, source, path, dtype, device)
    return vae


def load_text_encoder(
    path: str | Path, *, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
) -> TextEncoder:
    """Load only the text encoder, with all its towers, as `load_unet` loads the UNet.

    A file or folder of one tower does not say which hidden state the UNet takes. For a tower with a projection, and for
    a folder in a model with two towers, SDXL's is assumed. For all others that of Stable Diffusion 1 and 2 is assumed.
    """
    source = sources.open_part(path, "text_encoder")
    encoder = sources.build_text_encoder(source, path)
    _read_only(dict(zip(TOWERS, encoder.towers, strict=False)), source, path, dtype, device)
    return encoder.eval()  # `_read_only` did so for its towers


def _read_only(
    networks: Mapping[str, nn.Module],
    source: Source,
    path: str | Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Check and read only the parts of `source` that are the `networks`, which are on the meta device."""
    sources.check_holds(source, path, networks)
    parts = {name: part for name, part in source.parts.items() if name in networks}
    check(networks, parts, [part for name, part in source.parts.items() if name not in networks])
    for name, part in parts.items():
        fill(networks[name], part, dtype=dtype, device=torch.device(device))


def save(
    model: ModelLike,
    path: str | Path,
    *,
    layout: Layout = "diffusers",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Save `model` as a folder (layout "diffusers") or as one .safetensors file ("ldm"), in `dtype` if given.

    The model is written beside `path` and then renamed, so a failure leaves the old model. Other files in an
    overwritten folder stay.
    Raises ValueError for a path that exists; with `overwrite` it may be a model of the same layout. Raises ValueError
    too for a folder that is named like a file, a dtype of integers, and a model that the layout cannot express.
    """
    with at_once(path, layout, dtype, overwrite=overwrite) as new:
        (write_single if layout == "ldm" else write_folder)(new, model, dtype)


@contextmanager
def at_once(path: str | Path, layout: Layout, dtype: torch.dtype | None, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary path for a model, which gets the name `path` at the end of the block. An error removes it.

    Raises ValueError as `save` does for the arguments.
    """
    if layout not in ("ldm", "diffusers"):
        raise ValueError(f"layout must be 'ldm' (a file) or 'diffusers' (a folder), got {layout!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a torch dtype of real numbers, such as torch.float16, got {dtype!r}")
    _check_target(Path(path), layout, overwrite)
    path = Path(path).resolve()
    with beside(path) as new:
        yield new
        _check_target(path, layout, overwrite)  # again, because another program may have created `path` meanwhile
        if layout == "ldm":
            new.replace(path)
        else:
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
    """Write the model at `path`, which may be a pickle, to `target`. Without `dtype` the values stay bit for bit.

    A pickle of something else, such as a VAE or a ControlNet, becomes a .safetensors file (layout "ldm") with the same
    names. So does a pickle of a model with a ControlNet. Returns the names of the tensors that are left out because no
    network uses them, such as noise schedules.
    Raises ValueError as `load` and `save` do. Raises it for a pickle that names code or has no known tensors, and for a
    file whose name does not end in .safetensors.
    """
    check_output(target, layout, overwrite=overwrite)
    if not replace and is_pickle(Path(path)):
        tensors = PickledTensors(Path(path))
        with_controlnet = layout == "ldm" and (kind_of(tensors) or "").startswith("a ControlNet")
        if not all(find(tensors)) or with_controlnet:
            _rewrite(tensors, Path(target).resolve(), layout, dtype)
            return ()
    model = identify(path, prediction=prediction, ema=ema, replace=replace, pickles=True)
    save(read(model, dtype=dtype), target, layout=layout, dtype=dtype, overwrite=overwrite)
    return model.left


def save_vae(vae: VAE, path: str | Path, *, image_size: int) -> None:
    """Save a VAE as a folder for `load_vae` and for diffusers. A VAE folder at `path` is replaced at the end.

    image_size: the pixels that it was trained at, for its config.json. Raises ValueError if `path` is anything else.
    """
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path} is not a VAE folder, so it is not overwritten: give another path")
    path = Path(path).resolve()
    with beside(path) as new:
        write_vae(new, vae, image_size)
        replace_folder(path, new)


def _rewrite(tensors: PickledTensors, target: Path, layout: Layout, dtype: torch.dtype | None) -> None:
    """Write the tensors of a pickle under their own names, those in floating point in `dtype` if given."""
    what = "a part of a model" if any(find(tensors)) else kind_of(tensors)
    if what is None:
        raise ValueError(
            f"{tensors} holds nothing that is known here, its tensors are {some(sorted(tensors.shapes))}: give a "
            "model, a part of one or an adapter"
        )
    if layout != "ldm":
        raise ValueError(f"{tensors} is {what}, not a model: its tensors can be written into one file (layout 'ldm')")
    held = {}
    for name, value in tensors.read(tensors.shapes, mapped=False):  # views of one storage cannot be saved
        held[name] = value.to(dtype) if dtype and value.is_floating_point() else value
    with beside(target) as new:
        write_tensors(held, new)
        new.replace(target)


def check_output(path: str | Path, layout: Layout, *, overwrite: bool) -> None:
    """Raise ValueError as `save` does for a path, and for a file whose name does not end in .safetensors."""
    if layout == "ldm" and Path(path).suffix != ".safetensors":
        raise ValueError(f"the ldm layout is one file, whose name ends in .safetensors, got {path}: give such a name")
    _check_target(Path(path), layout, overwrite)


def _check_target(path: Path, layout: Layout, overwrite: bool) -> None:
    if layout == "diffusers" and path.suffix == ".safetensors":
        raise ValueError(f"the diffusers layout is a folder, got {path}: give layout='ldm' to write one file")
    if not path.exists():
        return
    if not overwrite:
        raise ValueError(f"{path} exists already: give another path, or overwrite=True (--overwrite)")
    if layout == "ldm" and path.is_dir():
        raise ValueError(f"{path} is a folder and the ldm layout is one file: give a file name")
    if layout == "diffusers" and not (path / "model_index.json").is_file():
        raise ValueError(f"{path} is no model folder, so it is not overwritten: give another path")
