"""The recipe of an IP-Adapter."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ldm.checkpoint.ip_adapters import load_image_encoder, save_ip_adapter
from ldm.models.ip_adapter import IPAdapter
from ldm.training.image_prompt import Features, ImagePromptLoss, ImagePromptObjective, ResamplerConfig, new_ip_adapter
from ldm.training.loop import train
from ldm.training.recipes.base import ModelRecipe, choose_attention, refuse_keys


@dataclass(frozen=True, kw_only=True)
class ImagePromptRecipe(ModelRecipe):
    """Train an IP-Adapter for a fixed model, and save it to `out`/ip-adapter.safetensors."""

    encoder: Path  # the vision tower, a folder or file, as for --image-encoder
    latents: int  # encode this many pictures once, before the training
    resampler: ResamplerConfig | None = None  # train an IP-Adapter Plus, which reads patches; None: a plain one
    loss: ImagePromptLoss = field(default_factory=ImagePromptLoss)

    def run(self, device: torch.device) -> Path:
        """Train the IP-Adapter; return its file. Raises as `Recipe.run` does."""
        refuse_keys(self.data, "keep_out")
        model = self.load(device)
        tower = load_image_encoder(self.encoder, device=device)
        features = Features(tower, patches=self.resampler is not None)
        dataset = self.data.open(sizes=model.config.unet.is_sdxl)
        values = ("data.", "resampler")
        dataset = self.encoded(dataset, self.latents, model.vae, values=values, also=features)
        torch.manual_seed(self.loop.seed)
        adapter = new_ip_adapter(model.unet, tower, self.resampler).to(device)
        objective = ImagePromptObjective(model, adapter, self.loss, features.left_out())
        del tower, features  # a large tower would take memory during the training
        choose_attention(objective, device)
        average = train(objective, dataset, self.loop, self.out, self.fixed_values())
        assert isinstance(average, IPAdapter)
        save_ip_adapter(average, self.out / "ip-adapter.safetensors", dtype=torch.float16)
        return self.out / "ip-adapter.safetensors"
