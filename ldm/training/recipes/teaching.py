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
from ldm.checkpoint.parts import TOWERS, Model
from ldm.training.data import DataConfig, Frame, picture_files
from ldm.training.diffusion import DiffusionLoss
from ldm.training.distributed import first_process_first
from ldm.training.lessons import Lesson, LessonScenes
from ldm.training.loop import Dataset
from ldm.training.recipes.base import ModelRecipe, choose_attention, refuse_keys


@dataclass(frozen=True, kw_only=True)
class TeachingRecipe(ModelRecipe):
    """Teach a model something new with a few pictures, whose latents are encoded once."""

    loss: DiffusionLoss = field(default_factory=DiffusionLoss)
    sample_prompts: tuple[str, ...] = ()  # of the sample pictures; none: the captions of the last batch
    lesson: Lesson | None = None  # emoji scenes with something new, instead of the pictures of `data`

    def pictures(self, *, sizes: bool = False) -> Dataset:
        """Return the data set. sizes: see `DataConfig.open`.

        Raises ValueError as `DataConfig.open` and `Lesson.sprites` do.
        """
        if self.lesson is None:
            return self.data.open(sizes=sizes)
        if self.data.folder is not None:
            raise ValueError(f"[lesson] makes the pictures, so folder = {self.data.folder} has no effect: omit one")
        refuse_keys(self.data, "buckets", "mask")
        sprites = self.lesson.sprites(self.data.font, self.data.fluent)
        return LessonScenes(self.lesson, sprites, self.data.size, seed=self.data.seed)

    def load(self, device: torch.device) -> Model:
        """Read the model in fp32. Raises ValueError as `ModelRecipe.load` does."""
        model = super().load(device)
        choose_attention(model.unet, device)
        return model

    def examples(self, model: Model) -> tuple[Dataset, Dataset | None]:
        """Return the latents that are trained on, and the pictures that are kept out.

        Raises ValueError as `pictures` and `DataConfig.split` do.
        """
        dataset, kept_out = self.data.split(self.pictures(sizes=model.config.unet.is_sdxl))
        values = ("data.", "lesson", "instance_prompt", "captions", "word")
        return self.encoded(dataset, len(dataset), model.vae, values=values), kept_out


def captioned(data: DataConfig, captions: Sequence[str], listing: Path, *, sizes: bool) -> Dataset:
    """Return all pictures in `data.folder`, each with every one of the captions. Their own captions are not read.

    listing: the folder for the list of the pictures. sizes: see `DataConfig.open`. Raises ValueError without a folder,
    for `keep_out` with several captions, and as `DataConfig.open` does.
    """
    if data.folder is None:
        raise ValueError("captions in the recipe are for your own pictures: give their folder under [data]")
    if data.keep_out and len(captions) > 1:
        raise ValueError("with several captions, each picture is also trained on: give one caption, or omit keep_out")
    names = picture_files(data.folder.resolve(), Frame(mask=data.mask))
    with first_process_first():
        write_list(listing, [{"file_name": str(name), "text": caption} for caption in captions for name in names])
    return dataclasses.replace(data, folder=listing if names else data.folder).open(sizes=sizes)


def write_list(folder: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write the list of the pictures of a data set, as `ldm.training.data.Folder` reads it."""
    with beside(folder / "metadata.jsonl") as new:
        new.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(new, folder / "metadata.jsonl")


def networks_of(model: Model) -> Mapping[str, nn.Module]:
    """Return the UNet and the text towers by the names of their parts."""
    return {"unet": model.unet, **dict(zip(TOWERS, model.text_encoder.towers, strict=False))}
