"""The recipe of a UNet and a text encoder, trained from nothing or from a model."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from ldm.atomic import beside, replace_folder
from ldm.checkpoint.files import load, load_vae, save
from ldm.checkpoint.parts import TOWERS, Model
from ldm.config import DiffusionConfig, Layout, ModelConfig, TextConfig, UNetConfig
from ldm.loading import locate
from ldm.models.text import TextEncoder
from ldm.models.token_files import read_tokenizer, save_tokenizer
from ldm.models.tokens import Tokenizer, official_vocabulary
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.training.diffusion import DiffusionLoss, DiffusionObjective, Networks, learns, zero_init
from ldm.training.distributed import first_process_first
from ldm.training.latents import Texts
from ldm.training.loop import Dataset, train
from ldm.training.recipes.base import Recipe, check_side, choose_attention
from ldm.training.vocabulary import build_vocabulary

Part = Literal["unet", "text_encoder", "text_encoder_2"]


@dataclass(frozen=True, kw_only=True)
class LDMRecipe(Recipe):
    """Train a UNet and its text encoder in the latents of a fixed VAE, and save all three to `out`/model.

    Without `start` both networks are new. With `start` they are those of a model, whose values are also the defaults of
    `vae`, `name`, `unet`, `text`, `diffusion` and `guidance_scale`.
    """

    start: Path | None = None  # what `ldm.load` takes: SD 1, 2 or XL, or a result of this recipe
    train: tuple[Part, ...] = ("unet", "text_encoder", "text_encoder_2")  # of the networks that the model has
    vae: Path | None = None  # the `out`/vae of a VAE recipe, or any VAE or model that `load_vae` reads
    name: str | None = None
    latents: int = 0  # encode this many examples once, before the training; 0: encode every batch
    texts: bool = False  # encode the captions once, before the training, for a text encoder that is not trained
    unet: UNetConfig | None = None
    text: TextConfig | None = None
    vocabulary: int = 0  # tokens of a new vocabulary, learned from the captions; 0: CLIP's vocabulary of 49,408 tokens
    diffusion: DiffusionConfig | None = None
    loss: DiffusionLoss = field(default_factory=DiffusionLoss)
    guidance_scale: float | None = None  # of the sample pictures, and the default of the trained model
    sample_prompts: tuple[str, ...] = ()  # of the sample pictures; none: the captions of the last batch
    layout: Layout = "diffusers"  # "ldm": save the single file `out`/model.safetensors

    def run(self, device: torch.device) -> Path:
        """Train the networks; return the model's folder or file. Raises as `Recipe.run` does."""
        start = load(locate(self.start), device=device) if self.start else None
        if start is None and self.vae is None:
            raise ValueError("vae is missing: name a VAE, or a model to start from as `start`, whose VAE is then used")
        vae = load_vae(self.vae, device=device) if self.vae else start.vae  # type: ignore[union-attr]
        unet = self.unet or (start.config.unet if start else UNetConfig())
        self._check_sides(unet, vae)
        dataset, kept_out = self.data.split(self.data.open(sizes=unet.is_sdxl))
        tokenizers = start.text_encoder.tokenizers if start else [_tokenizer(self, dataset)]
        if self.layout == "ldm" and any(t.vocab != official_vocabulary()[0] for t in tokenizers):
            raise ValueError('layout "ldm" has no place for a vocabulary other than CLIP\'s: set layout to "diffusers"')
        config = self._config(start, unet, vae, tokenizers[0])
        torch.manual_seed(self.loop.seed)
        if start:
            networks = Networks(start.unet, start.text_encoder)
        else:
            text_encoder = TextEncoder(config.text, tokenizers)
            networks = Networks(zero_init(UNet(unet)), text_encoder)
        self._choose(networks)
        objective = DiffusionObjective(
            config, networks, vae, self.loss, sample_prompts=self.sample_prompts, kept_out=kept_out
        )
        objective.to(device)
        choose_attention(objective.networks, device)
        if self.latents:
            dataset = self.encoded(dataset, self.latents, vae)
        if self.texts:
            with first_process_first():
                dataset = Texts(dataset, networks.text_encoder, self.out / "texts", bf16=self.loop.bf16)
        average = objective.complete(train(objective, dataset, self.loop, self.out, self.fixed_values()))

        path = self.out / ("model.safetensors" if self.layout == "ldm" else "model")
        model = Model(config, average.unet, vae, average.text_encoder, start.unused if start else {})
        save(model, path, layout=self.layout, dtype=torch.float16, overwrite=True)
        return path

    def _check_sides(self, unet: UNetConfig, vae: VAE) -> None:
        check_side("size", self.data.size, vae.config)
        check_side("buckets", self.data.buckets, vae.config)
        channels = (unet.in_channels, unet.out_channels)
        if channels != (vae.config.latent_channels,) * 2:
            raise ValueError(
                f"in_channels and out_channels of [unet] must be {vae.config.latent_channels}, as many as the latents "
                f"of the VAE {self.vae or self.start} have, got {channels[0]} and {channels[1]}; models for editing "
                'have recipe = "edit", and models for inpainting cannot be trained'
            )

    def _config(self, start: Model | None, unet: UNetConfig, vae: VAE, tokenizer: Tokenizer) -> ModelConfig:
        """Return the values of the model: those of the recipe, else those of `start`, else the defaults."""
        text = self.text or TextConfig()
        text = dataclasses.replace(text, vocab_size=len(tokenizer.vocab), pad_id=tokenizer.eos_id)
        base = start.config if start else ModelConfig(text=(text,))
        if start and ((self.text and base.text != (text,)) or base.unet != unet):
            raise ValueError(
                f"the model in {self.start} has another architecture than [unet] and [text] say: give both the "
                "values of that model, or leave both out"
            )
        return dataclasses.replace(
            base,
            name=self.name or base.name,
            unet=unet,
            vae=vae.config,
            diffusion=self.diffusion or base.diffusion,
            image_size=self.data.size,
            guidance_scale=base.guidance_scale if self.guidance_scale is None else self.guidance_scale,
        )

    def _choose(self, networks: Networks) -> None:
        """Let the parameters of the networks in `train` need gradients, and no others."""
        parts = {"unet": networks.unet, **dict(zip(TOWERS, networks.text_encoder.towers, strict=False))}
        for name, part in parts.items():
            part.requires_grad_(name in self.train)
        if not parts.keys() & set(self.train):
            raise ValueError(f"train must name one of {', '.join(parts)}, got {', '.join(self.train) or 'nothing'}")
        if self.texts and learns(networks.text_encoder):
            raise ValueError('texts = true is for a text encoder that stays: set train = ["unet"], or leave out texts')


def _tokenizer(recipe: LDMRecipe, dataset: Dataset) -> Tokenizer:
    """Return CLIP's tokenizer, or one with `recipe.vocabulary` tokens learned from the first 20,000 captions."""
    if not recipe.vocabulary:
        return Tokenizer.official()
    folder = recipe.out / "tokenizer"
    with first_process_first():
        if not folder.is_dir():
            captions = (dataset.caption(i) for i in range(min(20_000, len(dataset))))
            vocab, merges = build_vocabulary(captions, recipe.vocabulary)
            with beside(folder) as new:
                save_tokenizer(Tokenizer(vocab, merges), new, (recipe.text or TextConfig()).max_length)
                replace_folder(folder, new)
    return read_tokenizer(folder)[0]
