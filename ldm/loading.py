"""From a path to a `Pipeline`: identify the model, read the weights, and move the networks to the device."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.checkpoint import files
from ldm.diffusion.denoiser import Prediction
from ldm.pipeline import Pipeline
from ldm.placement.choice import find_device
from ldm.placement.memory import Placement

if TYPE_CHECKING:
    from ldm.lora import Lora

BUNDLED = "weights/tiny"


def load(
    path: str | Path = BUNDLED,
    placement: Placement | None = None,
    *,
    prediction: Prediction | None = None,
    ema: bool = False,
    vae: str | Path | None = None,
    unet: str | Path | None = None,
    text_encoder: str | Path | None = None,
    embeddings: Sequence[str | Path] = (),
    loras: "Sequence[str | Path | Lora]" = (),
) -> Pipeline:
    """Load a model from a folder in diffusers' layout, or from a single .safetensors file in the official layout.

    path: the default is the small model that ships with the package.
    placement: device, precision and memory, see `Placement`. The command uses `Placement.fast()`.
    prediction: what the UNet predicts, if the file says nothing or is wrong.
    ema: take the averaged copy (EMA) of the UNet from a file that holds both copies.
    vae, unet, text_encoder: a file or folder to take this part from, instead of from `path`.
    embeddings: files of textual inversion, or "NAME=FILE" to choose the name that stands for the embedding in prompts.
    loras: LoRAs to merge into the weights, as FILE, FILE:WEIGHT or `ldm.lora.Lora`. The defaults of sampling become
      those that the file of a LoRA says.
    The weights do not require gradients. Call `pipe.unet.requires_grad_()` to train.
    Raises ValueError for a model that is absent, damaged or not supported, and for parts that do not fit together. Also
    for a placement that this machine does not support, and an embedding or a LoRA that is damaged or for another model.
    """
    if placement is not None and not isinstance(placement, Placement):
        raise ValueError(
            f"the placement must be an ldm.Placement, such as ldm.Placement(device='cuda'), got {placement!r}"
        )
    placement = (placement or Placement()).resolve()
    parts = {"vae": vae, "unet": unet, "text_encoder": text_encoder}
    paths = {name: locate(path if part is None else part) for name, part in parts.items()}
    replace = {name: paths[name] for name, part in parts.items() if part is not None}
    found = files.identify(locate(path), prediction=prediction, ema=ema, replace=replace)
    placement = placement.resolve(found.config)
    model = files.read(
        found,
        dtype=placement.dtype,
        vae_dtype=placement.vae_dtype,
        device="cpu" if placement.offload else find_device(placement.device),
    )
    if embeddings:
        from ldm.checkpoint.embeddings import load_embeddings  # few prompts use embeddings

        load_embeddings(model.text_encoder, [named_file(word) for word in embeddings])
    networks = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}
    for network in networks.values():
        network.requires_grad_(False)
    pipe = Pipeline(model.config, model.unet, model.vae, model.text_encoder, model.why, placement, paths)
    if loras:
        from ldm.checkpoint.sampling import with_sampling  # few pictures use LoRAs
        from ldm.lora import set_loras

        applied = set_loras(pipe, loras)
        pipe.config = with_sampling(pipe.config, [each.lora.path for each in applied if each.lora.weight])
    placement.apply(networks)
    return pipe


def locate(path: str | Path) -> Path:
    """Return `path`. If it is "weights/tiny" and does not exist here, return the folder of the bundled model.

    Raises ValueError for a value that is not a path.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"a model's path must be a str or a pathlib.Path, got {path!r}")
    if Path(path) == Path(BUNDLED) and not Path(path).exists():
        package = Path(__file__).parent
        for root in (package.parent, package):  # the repository; the installed package
            if (root / BUNDLED).is_dir():
                return root / BUNDLED
    return Path(path)


def named_file(word: str | Path) -> tuple[str | None, Path]:
    """Read "NAME=FILE" or "FILE", which has no name. A file whose own name holds "=" counts as FILE."""
    if not isinstance(word, str | os.PathLike):
        raise ValueError(f"an embedding is given as FILE or 'NAME=FILE', got {word!r}")
    name, equals, file = str(word).partition("=")
    return (name, Path(file)) if equals and not Path(word).exists() else (None, Path(word))
