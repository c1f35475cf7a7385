"""The recipe of a vision tower."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ldm.checkpoint.ip_adapters import save_image_encoder
from ldm.training.loop import train
from ldm.training.recipes.base import ModelRecipe, refuse_keys
from ldm.training.vision import TowerConfig, VisionObjective, inverse_frequency


@dataclass(frozen=True, kw_only=True)
class VisionRecipe(ModelRecipe):
    """Train a vision tower on pictures with captions, and save it to `out`/image_encoder.

    The tokens are those of the model's first text encoder. Nothing else of the model is used.
    """

    tower: TowerConfig = field(default_factory=TowerConfig)

    def run(self, device: torch.device) -> Path:
        """Train the tower; return its folder. Raises as `Recipe.run` does."""
        refuse_keys(self.data, "keep_out", "mask", "buckets")
        tokenizer = self.load(device).text_encoder.tokenizers[0]
        dataset = self.data.open()
        torch.manual_seed(self.loop.seed)
        tower = self.tower.build(self.data.size)
        objective = VisionObjective(tokenizer, tower, inverse_frequency(tokenizer, dataset)).to(device)
        average = train(objective, dataset, self.loop, self.out, self.fixed_values())
        save_image_encoder(average, self.out / "image_encoder", dtype=torch.float16)
        return self.out / "image_encoder"
