"""The objective of CLIP, with a text tower that stays: pictures and captions that belong together are close.

The embeddings of n pictures and of their n captions have length 1. Each picture is classified among the captions, and
each caption among the pictures, by the cosines (Radford et al. 2021, figure 3):

    logits = cos(picture_i, caption_j) exp(t)
    loss = (cross_entropy(logits, i) + cross_entropy(logits^T, i)) / 2

An IP-Adapter needs such a vision tower for a model whose text encoder is not that of CLIP.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.image_prompt import pixels
from ldm.images import to_pil
from ldm.models.text import TextEncoder, TextTower
from ldm.training.loop import Batch, Objective

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

TEMPERATURE = 0.07  # at the start, as in the paper
LARGEST = 100.0  # of exp(t), as in the paper
SHOWN = 8  # sample pictures, each above the picture that its caption finds


@dataclass(frozen=True)
class TowerConfig:
    """The sizes of a new vision tower."""

    width: int = 192
    layers: int = 4
    heads: int = 4
    mlp: int = 768
    patch: int = 16  # pixels; side of the square patches
    projection: int = 192  # width of the embedding

    def build(self, size: int) -> "CLIPVisionModelWithProjection":
        """Return a new tower for pictures of `size` pixels. Raises ValueError for sizes that do not fit together."""
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection  # takes seconds

        if self.width % self.heads or size % self.patch:
            raise ValueError(
                f"the width must be a multiple of the heads, and the size of the pictures one of the patch, got width "
                f"{self.width}, heads {self.heads}, size {size}, patch {self.patch}"
            )
        return CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=self.width,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                intermediate_size=self.mlp,
                patch_size=self.patch,
                image_size=size,
                projection_dim=self.projection,
            )
        )


class ClipObjective(Objective):
    """Train a vision tower for a fixed text encoder. The log has the share of pictures whose caption is the nearest."""

    def __init__(self, text_encoder: TextEncoder, tower: "CLIPVisionModelWithProjection") -> None:
        """Freeze the text encoder. A new linear layer maps the text to the embedding. `tower` is trained."""
        super().__init__()
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.tower = tower.requires_grad_(True)
        width = sum(text.config.width for text in self._text_towers())
        self.text_projection = nn.Linear(width, tower.config.projection_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(TEMPERATURE)))

    @property
    def trained(self) -> nn.Module:
        """The vision tower."""
        return self.tower

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of one batch of images and captions."""
        cosines = self.cosines(batch[0], batch[1])
        logits = cosines * self.log_scale.exp().clamp(max=LARGEST)
        own = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return loss, {"accuracy": (logits.argmax(dim=1) == own).float().mean()}

    def cosines(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Compare images, b 3 h w in [-1, 1], with captions: b n. Both are embedded here."""
        pictures = self.tower(seen(images, self.tower.config.image_size)).image_embeds
        texts = self.text_projection(self._pooled(captions))
        return F.normalize(pictures, dim=-1) @ F.normalize(texts, dim=-1).T

    def _text_towers(self) -> list[TextTower]:
        return [cast(TextTower, tower) for tower in self.text_encoder.towers]

    @torch.no_grad()
    def _pooled(self, captions: Sequence[str]) -> Tensor:
        """Return the mean of each caption's states from the begin token to the end token, of all towers: b width.

        CLIP takes the state of the end token. A text encoder that was trained with a UNet hardly has the objects there.
        """
        states = []
        for tower in self._text_towers():
            ids = tower.tokenize(captions)
            ends = (ids == tower.tokenizer.eos_id).int().argmax(dim=-1, keepdim=True)
            inside = (torch.arange(ids.shape[1], device=ids.device) <= ends).float()
            states.append(torch.einsum("bnd,bn->bd", tower(ids).context, inside / inside.sum(dim=1, keepdim=True)))
        return torch.cat(states, dim=-1)

    def sample(self, batch: Batch) -> Tensor:
        """Return pictures of the batch and, in the next row, those that their captions find: 2 * SHOWN 3 h w."""
        images = batch[0]
        found = images[self.cosines(images, batch[1]).argmax(dim=0)][:SHOWN]
        half = len(found) // 2  # rows of four, as the loop's grid has them
        return torch.cat([images[:half], found[:half], images[half : len(found)], found[half:]])


def seen(images: Tensor, size: int) -> Tensor:
    """Return images, b 3 h w in [-1, 1], as a vision tower sees them: b 3 size size."""
    return torch.cat([pixels(picture, size) for picture in to_pil(images)]).to(images)
