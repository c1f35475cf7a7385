"""The objective of an IP-Adapter: with it, a fixed UNet predicts better, because it sees the picture (Ye et al. 2023).

The vision tower is fixed, too, so the embedding of each picture is computed once, when its latents are encoded.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.parts import Model
from ldm.conditioning import Condition
from ldm.models.ip_adapter import Applied, ImageProjection, ImagePrompted, IPAdapter, cross_attentions
from ldm.models.unet import UNet
from ldm.training.diffusion import DiffusionLoss, DiffusionObjective, Networks
from ldm.training.loop import Batch, extras
from ldm.training.vision import seen

SHOWN = 8  # sample pictures, each below the picture that is its prompt


def new_ip_adapter(unet: UNet, image_dim: int, tokens: int) -> IPAdapter:
    """Return a new IP-Adapter, whose keys and values of pictures are those that `unet` has for texts.

    image_dim: the width of the embedding of a picture. tokens: image tokens.
    """
    attentions = cross_attentions(unet)
    context_dim = unet.config.context_dim
    widths = [attention.to_k.out_features for attention in attentions]
    adapter = IPAdapter(ImageProjection(image_dim, context_dim, tokens), image_dim, context_dim, widths)
    for new, old in ((adapter.to_k, [a.to_k for a in attentions]), (adapter.to_v, [a.to_v for a in attentions])):
        for ours, theirs in zip(new, old, strict=True):
            ours.load_state_dict(theirs.state_dict())
    return adapter


class Embeddings(nn.Module):
    """From images, b 3 h w in [-1, 1], to "embedding": b d, their embeddings by a vision tower."""

    def __init__(self, tower: nn.Module) -> None:
        """tower: transformers' `CLIPVisionModelWithProjection`."""
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> Mapping[str, Tensor]:
        """Return the embeddings by their name."""
        tower: Any = self.tower
        return {"embedding": tower(seen(images, tower.config.image_size)).image_embeds}


class ImagePromptObjective(DiffusionObjective):
    """Train an IP-Adapter for a fixed model.

    The batches have the moments of latents, and "embedding": b d, those of the images. Some captions and some
    pictures are left out, so that each of them works alone, and for guidance. A left-out picture is an embedding of
    zeros.
    """

    def __init__(self, model: Model, adapter: IPAdapter, weights: DiffusionLoss, picture_dropout: float) -> None:
        """Freeze all networks of `model`. `adapter` is trained. picture_dropout: the share of left-out pictures."""
        super().__init__(model.config, Networks(model.unet, model.text_encoder), model.vae, weights)
        self.networks.eval().requires_grad_(False)
        self.adapter, self.picture_dropout = adapter.requires_grad_(True), picture_dropout

    @property
    def trained(self) -> nn.Module:
        """The IP-Adapter."""
        return self.adapter

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean weighted squared error of one batch at random timesteps."""
        pictures = extras(batch)["embedding"]
        keep = torch.rand(len(pictures), 1) >= self.picture_dropout
        tokens = self.adapter.image_proj(pictures * keep.to(pictures))

        def predict(z: Tensor, t: Tensor, given: Condition) -> Tensor:
            return ImagePrompted(self.networks.unet, [Applied(self.adapter, tokens, tokens)]).bind(given)(z, t)

        return self._errors(batch, predict)

    def sample(self, batch: Batch) -> Tensor:
        """Return pictures of the batch and, in the next row, those that they prompt without text: 2 * SHOWN 3 h w."""
        moments, embeddings = batch[0][:SHOWN], extras(batch)["embedding"][:SHOWN]
        tokens, negative = (self.adapter.image_proj(e) for e in (embeddings, torch.zeros_like(embeddings)))
        prompted = ImagePrompted(self.networks.unet, [Applied(self.adapter, tokens, negative)])
        texts = [""] * len(moments)
        made = self._sampled(prompted.bind, self.networks.text_encoder, texts, (moments, texts))
        true = self.vae.decode(self._posterior(moments).mode())
        half = len(made) // 2  # rows of four, as the loop's grid has them
        return torch.cat([true[:half], made[:half], true[half:], made[half:]])
