"""The recipe of a UNet and a text encoder, trained from nothing or from a model."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ldm.atomic import beside, replace_folder
from ldm.checkpoint.files import load, load_vae, save
from ldm.checkpoint.parts import Model
from ldm.config import DiffusionConfig, ModelConfig, TextConfig, UNetConfig
from ldm.models.attention import math_attention, set_attention
from ldm.models.text import TextEncoder
from ldm.models.token_files import read_tokenizer, save_tokenizer
from ldm.models.tokens import Tokenizer
from ldm.models.unet import UNet
from ldm.training.diffusion import DiffusionLoss, DiffusionObjective, Networks, zero_init
from ldm.training.latents import Latents
from ldm.training.loop import Dataset, train
from ldm.training.recipes.base import Recipe, check_side
from ldm.training.vocabulary import build_vocabulary


@dataclass(frozen=True, kw_only=True)
class LDMRecipe(Recipe):
    """Train a UNet and a text encoder in the latents of a fixed VAE, and save all three to `out`/model."""

    vae: Path  # of the VAE: the `out`/vae of a VAE recipe, or any VAE or model that `load_vae` reads
    name: str = "custom"
    latents: int = 0  # encode this many examples once, before the training; 0: encode every batch
    start: Path | None = None  # a model of the same architecture, whose weights and vocabulary the training starts from
    unet: UNetConfig = field(default_factory=UNetConfig)
    text: TextConfig = field(default_factory=TextConfig)
    vocabulary: int = 0  # tokens of a new vocabulary, learned from the captions; 0: CLIP's vocabulary of 49,408 tokens
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    loss: DiffusionLoss = field(default_factory=DiffusionLoss)
    guidance_scale: float = 7.5  # of the sample pictures, and the default of the trained model
    sample_prompts: tuple[str, ...] = ()  # of the sample pictures; none: the captions of the last batch

    def run(self, device: torch.device) -> Path:
        """Train both networks; return the model's folder. Raises as `Recipe.run` does."""
        vae = load_vae(self.vae, device=device)
        check_side("size", self.data.size, vae.config)
        channels = (self.unet.in_channels, self.unet.out_channels)
        if channels != (vae.config.latent_channels,) * 2:
            raise ValueError(
                f"in_channels and out_channels of [unet] must be {vae.config.latent_channels}, as many as the latents "
                f"of the VAE {self.vae} have, got {channels[0]} and {channels[1]}"
            )
        dataset = self.data.open()
        start = load(self.start, device=device) if self.start else None
        tokenizer = start.text_encoder.tokenizers[0] if start else _tokenizer(self, dataset)
        text = dataclasses.replace(self.text, vocab_size=len(tokenizer.vocab), pad_id=tokenizer.eos_id)
        config = ModelConfig(
            name=self.name,
            unet=self.unet,
            vae=vae.config,
            text=(text,),
            diffusion=self.diffusion,
            image_size=self.data.size,
            guidance_scale=self.guidance_scale,
        )
        torch.manual_seed(self.loop.seed)
        text_encoder = TextEncoder((text,), (tokenizer,))
        networks = Networks(zero_init(UNet(self.unet)), text_encoder)
        objective = DiffusionObjective(config, networks, vae, self.loss, sample_prompts=self.sample_prompts)
        objective.to(device)
        if device.type == "cpu":  # the gradient of PyTorch's fused attention takes a fifth of a step there
            set_attention(objective.networks, math_attention)
        if start:
            if (start.config.unet, start.config.text) != (config.unet, config.text):
                raise ValueError(
                    f"the model in {self.start} has another architecture than [unet] and [text] say: give both the "
                    "values of that model, or leave `start` out"
                )
            objective.networks.load_state_dict(Networks(start.unet, start.text_encoder).state_dict())
        if self.latents:
            source = {name: value for name, value in self.fixed_values().items() if name.startswith("data.")}
            dataset = Latents(dataset, self.latents, vae, self.out / "latents", source, bf16=self.loop.bf16)
        average = train(objective, dataset, self.loop, self.out, self.fixed_values())

        assert isinstance(average, Networks)
        model = Model(config, average.unet, vae, average.text_encoder)
        save(model, self.out / "model", layout="diffusers", dtype=torch.float16, overwrite=True)
        return self.out / "model"


def _tokenizer(recipe: LDMRecipe, dataset: Dataset) -> Tokenizer:
    """Return CLIP's tokenizer, or one with `recipe.vocabulary` tokens learned from the first 20,000 captions."""
    if not recipe.vocabulary:
        return Tokenizer.official()
    folder = recipe.out / "tokenizer"
    if not folder.is_dir():
        captions = (dataset.caption(i) for i in range(min(20_000, len(dataset))))
        vocab, merges = build_vocabulary(captions, recipe.vocabulary)
        with beside(folder) as new:
            save_tokenizer(Tokenizer(vocab, merges), new, recipe.text.max_length)
            replace_folder(folder, new)
    return read_tokenizer(folder)[0]
