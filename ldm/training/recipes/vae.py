"""The recipe of a VAE."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ldm.checkpoint.files import load_vae, save_vae
from ldm.config import VAEConfig
from ldm.training.loop import collate, train
from ldm.training.recipes.base import Recipe, check_side
from ldm.training.vae import VAELoss, VAEObjective, latent_std


@dataclass(frozen=True, kw_only=True)
class VAERecipe(Recipe):
    """Train a VAE and save it to `out`/vae. Its scaling factor is measured at the end, unless the encoder stays."""

    vae: VAEConfig = field(default_factory=VAEConfig)
    loss: VAELoss = field(default_factory=VAELoss)
    start: Path | None = None  # a VAE of the same architecture, whose weights the training starts from

    def run(self, device: torch.device) -> Path:
        """Train the VAE; return its folder. Raises as `Recipe.run` does."""
        size, crop = self.data.size, self.loss.crop
        check_side("size", size, self.vae)
        check_side("crop", crop, self.vae)
        if self.loss.decoder_only and self.start is None:
            raise ValueError("decoder_only trains the decoder of a VAE that exists: give its folder as `start`")
        if crop > size:
            raise ValueError(f"crop must be at most the pictures' size of {size} pixels, got {crop}")
        dataset = self.data.open()
        torch.manual_seed(self.loop.seed)
        config = dataclasses.replace(self.vae, scaling_factor=1.0)  # the true factor is measured at the end
        objective = VAEObjective(config, self.loss).to(device)
        start = load_vae(self.start, device=device) if self.start else None
        if start:
            if dataclasses.replace(start.config, scaling_factor=1.0) != config:
                raise ValueError(
                    f"the VAE in {self.start} has another architecture than [vae] says: give the values of that VAE, "
                    "or leave `start` out"
                )
            objective.vae.load_state_dict(start.state_dict())
        average = train(objective, dataset, self.loop, self.out, self.fixed_values())

        objective.vae.load_state_dict(average.state_dict())
        if start and self.loss.decoder_only:
            factor = start.config.scaling_factor
        else:
            images, _ = collate([dataset[i] for i in range(min(256, len(dataset)))])
            factor = 1 / latent_std(objective.vae, images.to(device))
        objective.vae.config = dataclasses.replace(config, scaling_factor=factor)
        save_vae(objective.vae, self.out / "vae", image_size=size)
        return self.out / "vae"
