"""The recipe of a vision tower for the text encoder of a model."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ldm.checkpoint.ip_adapters import save_image_encoder
from ldm.training.clip import ClipObjective, TowerConfig
from ldm.training.distributed import ranks
from ldm.training.loop import train
from ldm.training.recipes.base import ModelRecipe, refuse_fsdp, refuse_keys


@dataclass(frozen=True, kw_only=True)
class ClipRecipe(ModelRecipe):
    """Train a vision tower by CLIP's loss, and save it to `out`/image_encoder. The model's text encoder stays."""

    tower: TowerConfig = field(default_factory=TowerConfig)

    def run(self, device: torch.device) -> Path:
        """Train the tower; return its folder. Raises as `Recipe.run` does."""
        refuse_keys(self.data, "keep_out", "mask", "buckets")
        refuse_fsdp(self.loop)
        if ranks() > 1:
            raise ValueError("the loss of CLIP compares all pictures of a batch in one process: omit torchrun")
        model = self.load(device)
        torch.manual_seed(self.loop.seed)
        objective = ClipObjective(model.text_encoder, self.tower.build(self.data.size)).to(device)
        average = train(objective, self.data.open(), self.loop, self.out, self.fixed_values())
        save_image_encoder(average, self.out / "image_encoder", dtype=torch.float16)
        return self.out / "image_encoder"
