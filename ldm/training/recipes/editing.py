"""The recipe of an editing model."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ldm.checkpoint.parts import Model
from ldm.training.editing import EditLoss, EditObjective, with_picture_input
from ldm.training.loop import train
from ldm.training.recipes.base import ModelRecipe, choose_attention, refuse_keys


@dataclass(frozen=True, kw_only=True)
class EditRecipe(ModelRecipe):
    """Teach a model to edit pictures by instructions (InstructPix2Pix), and save it to `out`/model.

    `model` is a model of text to image, or an editing model, which is trained further.
    """

    name: str = "editor"
    latents: int = 0  # encode this many pairs once, before the training; 0: encode every batch
    train_text_encoder: bool = False  # for a text encoder that has read captions only; CLIP's stays in the paper
    loss: EditLoss = field(default_factory=EditLoss)
    guidance_scale: float | None = None  # of the sample pictures, and the default of the trained model

    def run(self, device: torch.device) -> Path:
        """Train the networks; return the model's folder. Raises as `Recipe.run` does."""
        refuse_keys(self.data, "keep_out", "layout")
        model = self._editing(self.load(device))
        dataset = self.data.open(sizes=model.config.unet.is_sdxl, pairs=True)
        if self.latents:
            dataset = self.encoded(dataset, self.latents, model.vae)
        torch.manual_seed(self.loop.seed)
        objective = EditObjective(model, self.loss, train_text_encoder=self.train_text_encoder).to(device)
        choose_attention(objective, device)
        found = objective.complete(train(objective, dataset, self.loop, self.out, self.fixed_values()))
        return self.save(model._replace(unet=found.unet, text_encoder=found.text_encoder))

    def _editing(self, start: Model) -> Model:
        """Return the model with a UNet that takes a picture, and with the values of the recipe."""
        config = start.config
        if config.unet.in_channels == config.vae.latent_channels:
            unet = with_picture_input(start.unet)
        elif config.edits:
            unet = start.unet
        else:
            raise ValueError(
                f"the model {self.model} must be one of text to image or for editing, and its UNet takes "
                f"{config.unet.in_channels} channels"
            )
        config = dataclasses.replace(
            config,
            name=self.name,
            unet=unet.config,
            image_size=self.data.size,
            guidance_scale=config.guidance_scale if self.guidance_scale is None else self.guidance_scale,
        )
        return start._replace(config=config, unet=unet)
