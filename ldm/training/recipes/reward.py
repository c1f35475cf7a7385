"""The recipe of a policy gradient by the checker's reward."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ldm.checkpoint.parts import Model
from ldm.models.unet import UNet
from ldm.training.adapters import Adapters, LoraConfig
from ldm.training.checker import Checker
from ldm.training.distributed import ranks
from ldm.training.loop import train
from ldm.training.recipes.base import ModelRecipe, choose_attention, refuse_fsdp, refuse_keys
from ldm.training.recipes.lora import new_adapters, save_adapters
from ldm.training.reward import Prompts, RewardLoss, RewardObjective, SceneReward
from ldm.training.scenes import Scenes


@dataclass(frozen=True, kw_only=True)
class RewardRecipe(ModelRecipe):
    """Train the UNet of a model of emoji scenes for the checker's score (DDPO), and save the model to `out`/model.

    With the table [lora], train a LoRA, and save it to `out`/lora.safetensors. A batch is `batch_size` captions, with
    `pictures` pictures each.
    """

    loss: RewardLoss = field(default_factory=RewardLoss)
    lora: LoraConfig | None = None
    sample_prompts: tuple[str, ...] = ()  # of the sample pictures; none: the captions of the last batch

    def run(self, device: torch.device) -> Path:
        """Train; return the folder of the model, or the file of the LoRA. Raises as `Recipe.run` does."""
        refuse_keys(self.data, "keep_out")
        refuse_fsdp(self.loop)
        if ranks() > 1:
            raise ValueError("a checkpoint of this kind of recipe has the pictures of one process: omit torchrun")
        model = self.load(device)
        scenes = self.data.open()
        if not isinstance(scenes, Scenes):
            raise ValueError(f"the checker knows emoji scenes only: omit folder = {self.data.folder}")
        torch.manual_seed(self.loop.seed)
        reward = SceneReward(scenes, Checker(scenes.painter.sprites))
        learned = new_adapters(model, self.lora) if self.lora else model.unet
        objective = RewardObjective(model, learned, reward, self.loss, sample_prompts=self.sample_prompts)
        choose_attention(objective, device)
        average = train(objective, Prompts(scenes), self.loop, self.out, self.fixed_values())
        if isinstance(average, Adapters):
            return save_adapters(average, model, self.out, "kohya")
        assert isinstance(average, UNet)
        return self.save(Model(model.config, average, model.vae, model.text_encoder))
