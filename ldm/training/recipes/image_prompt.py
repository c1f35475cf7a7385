"""The recipe of an IP-Adapter."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ldm.checkpoint.ip_adapters import TOKENS, load_image_encoder, save_ip_adapter
from ldm.models.ip_adapter import IPAdapter
from ldm.training.diffusion import DiffusionLoss
from ldm.training.image_prompt import Embeddings, ImagePromptObjective, new_ip_adapter
from ldm.training.loop import train
from ldm.training.recipes.base import ModelRecipe, choose_attention, refuse_keys


@dataclass(frozen=True, kw_only=True)
class ImagePromptRecipe(ModelRecipe):
    """Train a plain IP-Adapter for a fixed model, and save it to `out`/ip-adapter.safetensors."""

    encoder: Path  # the vision tower, a folder or file, as for --image-encoder
    latents: int  # encode this many pictures once, before the training
    picture_dropout: float = 0.05  # share of examples without their picture, as in the authors' code
    loss: DiffusionLoss = field(default_factory=DiffusionLoss)

    def __post_init__(self) -> None:
        if not 0 <= self.picture_dropout < 1:
            raise ValueError(f"picture_dropout must be at least 0 and less than 1, got {self.picture_dropout}")
        if self.latents < 1:
            raise ValueError(f"latents must be at least 1, got {self.latents}")

    def run(self, device: torch.device) -> Path:
        """Train the IP-Adapter; return its file. Raises as `Recipe.run` does."""
        refuse_keys(self.data, "keep_out")
        model = self.load(device)
        tower = load_image_encoder(self.encoder, device=device)
        dataset = self.data.open(sizes=model.config.unet.is_sdxl)
        dataset = self.encoded(dataset, self.latents, model.vae, also=Embeddings(tower))
        torch.manual_seed(self.loop.seed)
        adapter = new_ip_adapter(model.unet, tower.config.projection_dim, TOKENS).to(device)
        objective = ImagePromptObjective(model, adapter, self.loss, self.picture_dropout)
        choose_attention(objective, device)
        average = train(objective, dataset, self.loop, self.out, self.fixed_values())
        assert isinstance(average, IPAdapter)
        save_ip_adapter(average, self.out / "ip-adapter.safetensors", dtype=torch.float16)
        return self.out / "ip-adapter.safetensors"
