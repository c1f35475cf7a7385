"""The recipe of a VAE."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ldm.checkpoint.files import load_vae, save_vae
from ldm.config import VAEConfig
from ldm.models.vae import VAE
from ldm.training.loop import collate, train
from ldm.training.recipes.base import Recipe, check_side, refuse_keys
from ldm.training.scripted import open_script
from ldm.training.vae import Perceptual, VAELoss, VAEObjective, latent_std


@dataclass(frozen=True, kw_only=True)
class VAERecipe(Recipe):
    """Train a VAE and save it to `out`/vae. Its scaling factor is measured at the end, unless the encoder stays."""

    vae: VAEConfig | None = None  # the architecture; None: that of `start`, or without it that of the official VAEs
    loss: VAELoss = field(default_factory=VAELoss)
    start: Path | None = None  # any VAE or model that `load_vae` reads; the training starts from its weights

    def run(self, device: torch.device) -> Path:
        """Train the VAE; return its folder. Raises as `Recipe.run` does."""
        if self.loss.decoder_only and self.start is None:
            raise ValueError("decoder_only trains the decoder of a VAE that exists: give its folder as `start`")
        start = load_vae(self.start, device=device) if self.start else None
        config = self._config(start)
        size, crop = self.data.size, self.loss.crop
        check_side("size", size, config)
        check_side("crop", crop, config)
        if crop > size:
            raise ValueError(f"crop must be at most the pictures' size of {size} pixels, got {crop}")
        refuse_keys(self.data, "buckets", "mask", "keep_out")
        dataset = self.data.open()
        torch.manual_seed(self.loop.seed)
        objective = VAEObjective(config, self.loss, self._perceptual(device)).to(device)
        if start:
            objective.vae.load_state_dict(start.state_dict())
        trained = train(objective, dataset, self.loop, self.out, self.fixed_values()).to(device)

        assert isinstance(trained, VAE)
        if start and self.loss.decoder_only:
            factor = start.config.scaling_factor
        else:
            images = collate([dataset[i] for i in range(min(256, len(dataset)))])[0]
            factor = 1 / latent_std(trained, images.to(device))
        trained.config = dataclasses.replace(config, scaling_factor=factor)
        save_vae(trained, self.out / "vae", image_size=size)
        return self.out / "vae"

    def _config(self, start: VAE | None) -> VAEConfig:
        """Return the architecture, with the scaling factor 1 during the training."""
        config = self.vae or (start.config if start else VAEConfig())
        config = dataclasses.replace(config, scaling_factor=1.0)
        if start and dataclasses.replace(start.config, scaling_factor=1.0) != config:
            raise ValueError(
                f"the VAE in {self.start} has another architecture than [vae] says: leave [vae] out, or leave `start` "
                "out"
            )
        return config

    def _perceptual(self, device: torch.device) -> Perceptual | None:
        """Read the network of the perceptual distance. Raises ValueError unless the file is TorchScript."""
        if self.loss.perceptual is None:
            return None
        return open_script(self.loss.perceptual, device).forward
