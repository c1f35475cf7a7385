"""The recipe of a ControlNet."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ldm.checkpoint.controlnets import save_controlnet
from ldm.config import Mid
from ldm.control import check_opencv
from ldm.models.controlnet import HINT_CHANNELS, ControlNet
from ldm.training.controlnet import ControlNetObjective
from ldm.training.diffusion import DiffusionLoss
from ldm.training.loop import train
from ldm.training.recipes.base import ModelRecipe, choose_attention, refuse_keys


@dataclass(frozen=True, kw_only=True)
class ControlNetRecipe(ModelRecipe):
    """Train a ControlNet of edges for a fixed model, and save it to `out`/controlnet. It needs the extra `control`."""

    loss: DiffusionLoss = field(default_factory=DiffusionLoss)
    hint_channels: tuple[int, ...] = HINT_CHANNELS
    mid: Mid | None = None  # see `UNetConfig`; None: as in the UNet

    def run(self, device: torch.device) -> Path:
        """Train the ControlNet; return its folder. Raises as `Recipe.run` does."""
        check_opencv()
        model = self.load(device)
        if 2 ** (len(self.hint_channels) - 1) != model.config.vae.factor:
            raise ValueError(
                f"hint_channels must be {(model.config.vae.factor).bit_length()} numbers, because the latents are "
                f"{model.config.vae.factor} times smaller than the pictures, got {self.hint_channels}"
            )
        refuse_keys(self.data, "keep_out")
        dataset = self.data.open(sizes=model.config.unet.is_sdxl)
        torch.manual_seed(self.loop.seed)
        network = ControlNet.copy_of(model.unet, hint_channels=self.hint_channels, mid=self.mid).to(device)
        objective = ControlNetObjective(model, network, self.loss)
        choose_attention(objective, device)
        average = train(objective, dataset, self.loop, self.out, self.fixed_values())
        assert isinstance(average, ControlNet)
        save_controlnet(average, self.out / "controlnet", dtype=torch.float16)
        return self.out / "controlnet"
