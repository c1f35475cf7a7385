"""What all recipes of `ldm train` have: an output folder, data, the settings of the loop, and a method `run`."""

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.checkpoint.files import load, save
from ldm.checkpoint.parts import Model
from ldm.config import VAEConfig
from ldm.loading import locate
from ldm.models.attention import math_attention, set_attention
from ldm.models.vae import VAE
from ldm.training.data import DataConfig
from ldm.training.distributed import first_process_first
from ldm.training.latents import Latents
from ldm.training.loop import Dataset, LoopConfig

FREE = frozenset(  # may change in a run that goes on, because they change no number (steps: only of later steps)
    {
        "out",
        "name",
        "guidance_scale",
        "layout",
        "sample_prompts",
        "diffusion.spacing",
        "diffusion.offset",
        "loop.steps",
        "loop.workers",
        "loop.gradient_checkpointing",
        "loop.log_every",
        "loop.validate_every",
        "loop.tensorboard",
        "loop.sample_every",
        "loop.checkpoint_every",
    }
)


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """One experiment, as a TOML file describes it. The key `recipe` is its name in `ldm.training.recipes.RECIPES`."""

    recipe: str
    out: Path
    loop: LoopConfig
    data: DataConfig = field(default_factory=DataConfig)

    @abstractmethod
    def run(self, device: torch.device) -> Path:
        """Start this training, or resume it; return the folder of the trained weights.

        Raises ValueError for data, a VAE or a model that cannot be read, and for sizes or networks that do not fit
        together. Raises ValueError, FloatingPointError and Interrupted as `train` does.
        """

    def fixed_values(self) -> dict[str, Any]:
        """Return the values that a run keeps from start to end, by name, such as "loop.batch_size"."""
        table = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return {name: value for name, value in _flat(table).items() if name not in FREE}

    def encoded(
        self,
        dataset: Dataset,
        count: int,
        vae: VAE,
        folder: str = "latents",
        values: tuple[str, ...] = ("data.",),
        also: nn.Module | None = None,
    ) -> Dataset:
        """Return the first `count` examples as latents, which stay in `folder` below `out`. One process encodes them.

        values: the beginnings of the names of the recipe's values that the data depend on. also: see `Latents`.
        Raises ValueError for a count below 1.
        """
        if count < 1:
            raise ValueError(f"the number of pictures to encode, latents, must be at least 1, got {count}")
        source = {name: value for name, value in self.fixed_values().items() if name.startswith(values)}
        with first_process_first():
            return Latents(dataset, count, vae, self.out / folder, source, also, bf16=self.loop.bf16)


@dataclass(frozen=True, kw_only=True)
class ModelRecipe(Recipe):
    """A recipe that starts from a whole model."""

    model: Path  # what `ldm.load` takes

    def load(self, device: torch.device) -> Model:
        """Read the model in fp32. Raises ValueError as `ldm.load` does, and for sizes that the VAE cannot encode."""
        model = load(locate(self.model), device=device)
        check_side("size", self.data.size, model.config.vae)
        check_side("buckets", self.data.buckets, model.config.vae)
        return model

    def save(self, model: Model) -> Path:
        """Save a model to `out`/model in fp16 and in diffusers' layout; return this folder."""
        save(model, self.out / "model", layout="diffusers", dtype=torch.float16, overwrite=True)
        return self.out / "model"


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def refuse_keys(data: DataConfig, *names: str) -> None:
    """Raise ValueError if [data] has one of these keys, because the recipe does not use them."""
    given = [name for name in names if getattr(data, name) != getattr(DataConfig(), name)]
    if given:
        raise ValueError(f"{' and '.join(given)} under [data] cannot be used in this kind of recipe: leave the key out")


def refuse_fsdp(loop: LoopConfig) -> None:
    """Raise ValueError for weights that are split among processes, if a recipe cannot train them."""
    if loop.parallel == "fsdp":
        raise ValueError("parallel = 'fsdp' cannot be used in this kind of recipe: leave the key out")


def choose_attention(network: nn.Module, device: torch.device) -> None:
    """On a CPU, use plain attention in a network that learns: the gradient of the fused one is slow there."""
    if device.type == "cpu":
        set_attention(network, math_attention)


def check_side(name: str, side: int, vae: VAEConfig) -> None:
    """Raise ValueError unless the VAE can encode pictures of `side` pixels. name: of the value in the recipe."""
    if side % vae.factor:
        raise ValueError(f"{name} must be a multiple of {vae.factor} pixels for this VAE, got {side}")
