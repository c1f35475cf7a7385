"""The recipes of students of few steps: latent consistency models, and consistency models."""

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ldm.checkpoint.parts import Model
from ldm.checkpoint.sampling import LCM_LORA
from ldm.models.unet import UNet
from ldm.training.adapters import Adapters, LoraConfig
from ldm.training.consistency import ConsistencyObjective
from ldm.training.consistency_models import ConsistencyDistillation, ConsistencyTraining, DistillationLoss, TrainingLoss
from ldm.training.diffusion import zero_init
from ldm.training.lcm import LCMLoraObjective, LCMLoss, LCMObjective
from ldm.training.loop import Dataset, train
from ldm.training.recipes.base import ModelRecipe, choose_attention, refuse_fsdp, refuse_keys
from ldm.training.recipes.lora import new_adapters, save_adapters

GUIDANCE_DIM = 256  # of the embedded scale, as in the official LCMs


@dataclass(frozen=True, kw_only=True)
class StudentRecipe(ModelRecipe):
    """What both recipes have: a model whose VAE and text encoder stay, and a student of its UNet's architecture."""

    name: str = "student"
    latents: int = 0  # encode this many examples once, before the training; 0: encode every batch
    sample_prompts: tuple[str, ...] = ()  # of the sample pictures; none: the captions of the last batch

    def _open(self, device: torch.device) -> tuple[Model, Dataset]:
        """Load the model, and open the data. Raises ValueError for a model that is a student, or of another kind."""
        refuse_keys(self.data, "mask", "keep_out")
        refuse_fsdp(self.loop)
        model = self.load(device)
        config = model.config
        if config.unet.guidance_dim is not None or config.unet.in_channels != config.vae.latent_channels:
            raise ValueError(
                f"the model {self.model} must be one of text to image that is not distilled, got {config.name}"
            )
        dataset = self.data.open(sizes=config.unet.is_sdxl)
        if self.latents:
            dataset = self.encoded(dataset, self.latents, model.vae)
        torch.manual_seed(self.loop.seed)
        return model, dataset

    def _train(self, objective: ConsistencyObjective, dataset: Dataset, device: torch.device) -> nn.Module:
        """Run the loop, and return the average of the student's weights."""
        objective.to(device)
        choose_attention(objective, device)
        return train(objective, dataset, self.loop, self.out, self.fixed_values())

    def _save(self, model: Model, student: nn.Module, *, steps: int, guidance_scale: float) -> Path:
        """Save the model with the student as its UNet, and with the defaults that the student needs."""
        assert isinstance(student, UNet)
        config = dataclasses.replace(
            model.config,
            name=self.name,
            unet=student.config,
            diffusion=dataclasses.replace(model.config.diffusion, spacing="lcm"),
            sampler="lcm",
            steps=steps,
            guidance_scale=guidance_scale,
        )
        return self.save(Model(config, student, model.vae, model.text_encoder))


@dataclass(frozen=True, kw_only=True)
class LCMRecipe(StudentRecipe):
    """Distill a model with guidance into a latent consistency model of 4 steps, and save it to `out`/model.

    With the table [lora], distill it into an LCM-LoRA, and save this to `out`/lora.safetensors.
    """

    loss: LCMLoss = field(default_factory=LCMLoss)
    lora: LoraConfig | None = None

    def run(self, device: torch.device) -> Path:
        """Train the student; return the folder of the model, or the file of the LoRA. Raises as `Recipe.run` does."""
        model, dataset = self._open(device)
        accumulate, prompts = self.loop.accumulate, self.sample_prompts
        if self.lora:
            adapters = new_adapters(model, self.lora)
            distill = LCMLoraObjective(model, adapters, self.loss, accumulate=accumulate, sample_prompts=prompts)
            found = self._train(distill, dataset, device)
            assert isinstance(found, Adapters)
            return save_adapters(found, model, self.out, "kohya", LCM_LORA.metadata())
        student = with_guidance(model.unet)
        objective = LCMObjective(
            model, student, self.loss, embedded=True, accumulate=accumulate, sample_prompts=prompts
        )
        average = self._train(objective, dataset, device)
        return self._save(model, average, steps=4, guidance_scale=objective.shown_scale)


@dataclass(frozen=True, kw_only=True)
class ConsistencyRecipe(StudentRecipe):
    """Train a consistency model of one or two steps, and save it to `out`/model.

    The recipe has one of two tables. With [distillation], the student starts from the model's UNet, its teacher. With
    [training], there is no teacher, and the student starts from nothing, or from the model's UNet with `from_model`.
    """

    distillation: DistillationLoss | None = None
    training: TrainingLoss | None = None

    def __post_init__(self) -> None:
        if (self.distillation is None) == (self.training is None):
            raise ValueError("a consistency recipe needs the table [distillation] or the table [training], not both")

    def run(self, device: torch.device) -> Path:
        """Train the student; return the folder of the model. Raises as `Recipe.run` does."""
        model, dataset = self._open(device)
        accumulate, prompts = self.loop.accumulate, self.sample_prompts
        if self.training and not self.training.from_model:
            student = zero_init(UNet(model.config.unet))
        else:
            student = copy.deepcopy(model.unet).requires_grad_(True)
        objective: ConsistencyObjective
        if self.distillation:
            objective = ConsistencyDistillation(
                model, student, self.distillation, accumulate=accumulate, sample_prompts=prompts
            )
        else:
            assert self.training
            objective = ConsistencyTraining(
                model, student, self.training, steps=self.loop.steps, accumulate=accumulate, sample_prompts=prompts
            )
        return self._save(model, self._train(objective, dataset, device), steps=2, guidance_scale=1.0)


def with_guidance(unet: UNet) -> UNet:
    """Return a copy of a UNet that takes the guidance scale as an input. The scale has no effect yet."""
    student = UNet(dataclasses.replace(unet.config, guidance_dim=GUIDANCE_DIM))
    assert student.guidance_embed is not None
    nn.init.zeros_(student.guidance_embed.weight)
    student.load_state_dict(student.state_dict() | unet.state_dict())
    return student
