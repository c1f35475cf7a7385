"""The recipe of a LoRA."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ldm.checkpoint.parts import Model
from ldm.checkpoint.save_loras import LoraLayout, save_lora
from ldm.training.adapters import Adapters, LoraConfig
from ldm.training.loop import train
from ldm.training.recipes.teaching import TeachingRecipe, networks_of
from ldm.training.teaching import TeachingObjective


@dataclass(frozen=True, kw_only=True)
class LoraRecipe(TeachingRecipe):
    """Train a LoRA for a model, and save it to `out`/lora.safetensors, or for diffusers to the folder `out`/lora."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    layout: LoraLayout = "kohya"

    def run(self, device: torch.device) -> Path:
        """Train the LoRA; return its file or folder. Raises as `Recipe.run` does."""
        model = self.load(device)
        dataset, kept_out = self.examples(model)
        torch.manual_seed(self.loop.seed)
        adapters = new_adapters(model, self.lora)
        prompts = self.sample_prompts
        objective = TeachingObjective(model, adapters, self.loss, sample_prompts=prompts, kept_out=kept_out)
        average = train(objective, dataset, self.loop, self.out, self.fixed_values())
        assert isinstance(average, Adapters)
        return save_adapters(average, model, self.out, self.layout)


def new_adapters(model: Model, config: LoraConfig) -> Adapters:
    """Add new adapters to the networks of `model`. Raises ValueError as `LoraConfig.choose` does."""
    return Adapters(config.choose(networks_of(model), model.config.unet), config)


def save_adapters(
    adapters: Adapters, model: Model, out: Path, layout: LoraLayout, metadata: Mapping[str, str] = {}
) -> Path:
    """Save a LoRA in the folder `out` of its run; return its file or folder. metadata: more entries for the file."""
    path = out / ("lora.safetensors" if layout == "kohya" else "lora")
    towers = len(model.text_encoder.towers)
    save_lora(path, adapters.changes(), model.config.unet, layout=layout, towers=towers, metadata=metadata)
    return path
