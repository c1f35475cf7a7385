"""What the recipes have in common that teach an existing model something new: the model, the pictures, the loss."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ldm.atomic import beside
from ldm.checkpoint.files import load
from ldm.checkpoint.parts import TOWERS, Model
from ldm.loading import locate
from ldm.models.attention import math_attention, set_attention
from ldm.training.data import SUFFIXES, DataConfig
from ldm.training.diffusion import DiffusionLoss
from ldm.training.latents import Latents
from ldm.training.lessons import Lesson, LessonScenes
from ldm.training.loop import Dataset
from ldm.training.recipes.base import Recipe, check_side


@dataclass(frozen=True, kw_only=True)
class TeachingRecipe(Recipe):
    """Teach a model something new with a few pictures, whose latents are encoded once."""

    model: Path  # what `ldm.load` takes
    loss: DiffusionLoss = field(default_factory=DiffusionLoss)
    sample_prompts: tuple[str, ...] = ()  # of the sample pictures; none: the captions of the last batch
    lesson: Lesson | None = None  # emoji scenes with something new, instead of the pictures of `data`

    def pictures(self) -> Dataset:
        """Return the data set. Raises ValueError as `DataConfig.open` and `Lesson.sprites` do."""
        if self.lesson is None:
            return self.data.open()
        if self.data.folder is not None:
            raise ValueError(f"[lesson] makes the pictures, so folder = {self.data.folder} has no effect: omit one")
        sprites = self.lesson.sprites(self.data.font, self.data.fluent)
        return LessonScenes(self.lesson, sprites, self.data.size, seed=self.data.seed)

    def load(self, device: torch.device) -> Model:
        """Read the model in fp32. Raises ValueError as `ldm.load` does, and for a size that the VAE cannot encode."""
        model = load(locate(self.model), device=device)
        check_side("size", self.data.size, model.config.vae)
        if device.type == "cpu":  # as in `LDMRecipe.run`
            set_attention(model.unet, math_attention)
        return model

    def encoded(
        self,
        dataset: Dataset,
        model: Model,
        folder: str = "latents",
        values: tuple[str, ...] = ("data.", "lesson", "instance_prompt", "captions", "word"),
    ) -> Dataset:
        """Return `dataset` as latents, which stay in `folder` below `out`.

        values: the beginnings of the names of the recipe's values that the data depend on.
        """
        source = {name: value for name, value in self.fixed_values().items() if name.startswith(values)}
        return Latents(dataset, len(dataset), model.vae, self.out / folder, source, bf16=self.loop.bf16)


def captioned(data: DataConfig, captions: Sequence[str], listing: Path) -> Dataset:
    """Return all pictures in `data.folder`, each with every one of the captions. Their own captions are not read.

    listing: the folder for the list of the pictures. Raises ValueError without a folder, and as `DataConfig.open` does.
    """
    if data.folder is None:
        raise ValueError("captions in the recipe are for your own pictures: give their folder under [data]")
    names = sorted(path.resolve() for path in data.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    write_list(listing, [{"file_name": str(name), "text": caption} for caption in captions for name in names])
    return dataclasses.replace(data, folder=listing if names else data.folder).open()


def write_list(folder: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write the list of the pictures of a data set, as `ldm.training.data.Folder` reads it."""
    with beside(folder / "metadata.jsonl") as new:
        new.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(new, folder / "metadata.jsonl")


def networks_of(model: Model) -> Mapping[str, nn.Module]:
    """Return the UNet and the text towers by the names of their parts."""
    return {"unet": model.unet, **dict(zip(TOWERS, model.text_encoder.towers, strict=False))}
