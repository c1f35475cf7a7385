"""The objective of a vision tower: say which words the caption of a picture has (SuperClass, Huang et al. 2024).

The tokens of a caption are the labels of its picture. Rare tokens weigh more, by their inverse document frequency:

    loss = -sum_t y_t log softmax(logits)_t,    y_t = idf_t / sum of the idf of the caption's tokens

The embedding of a picture then says what its caption says, as with CLIP. But no text encoder is needed, and a batch may
have any size. An IP-Adapter needs such a tower for a model whose text encoder is not that of CLIP.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ldm.checkpoint.ip_adapters import check_transformers
from ldm.image_prompt import pixels
from ldm.images import to_pil
from ldm.models.tokens import Tokenizer
from ldm.training.loop import Batch, Dataset, Objective

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

COUNTED = 4096  # captions in which the tokens are counted
SHOWN = 8  # sample pictures, each above the one with the most similar embedding


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
        """Return a new tower for pictures of `size` pixels.

        Raises ValueError for sizes below 1 or that do not fit together, and without transformers.
        """
        check_transformers()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection  # takes seconds

        if small := [name for name, value in asdict(self).items() if value < 1]:
            raise ValueError(f"{' and '.join(small)} under [tower] must be at least 1")
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


class VisionObjective(Objective):
    """Train a vision tower. The log has the share of the captions' tokens that are among the most likely ones."""

    def __init__(self, tokenizer: Tokenizer, tower: "CLIPVisionModelWithProjection", rarity: Tensor) -> None:
        """rarity: the inverse document frequency of each token; see `inverse_frequency`. `tower` is trained."""
        super().__init__()
        self.tokenizer, self.tower = tokenizer, tower.requires_grad_(True)
        self.classify = nn.Linear(tower.config.projection_dim, len(rarity))
        self.rarity: Tensor
        self.register_buffer("rarity", rarity, persistent=False)

    @property
    def trained(self) -> nn.Module:
        """The vision tower."""
        return self.tower

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of one batch of images and captions."""
        logits, labels = self.classify(self._embed(batch[0])), self.labels(batch[1])
        present = labels > 0
        most = int(present.sum(dim=1).max())
        order = logits.topk(most, dim=1).indices
        counted = torch.arange(most, device=order.device) < present.sum(dim=1, keepdim=True)
        found = (present.gather(1, order) & counted).sum() / counted.sum().clamp(min=1)
        return -(labels * logits.log_softmax(dim=1)).sum(dim=1).mean(), {"found": found}

    def labels(self, captions: Sequence[str]) -> Tensor:
        """Return the weights of the tokens of each caption, whose sum is 1: b vocabulary."""
        rows = torch.zeros(len(captions), len(self.rarity))
        for row, caption in zip(rows, captions, strict=True):
            row[self.tokenizer.encode(caption)] = 1
        weights = rows.to(self.rarity) * self.rarity
        return weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-6)

    def _embed(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.tower(seen(images, self.tower.config.image_size)).image_embeds
        return embeddings

    def sample(self, batch: Batch) -> Tensor:
        """Return pictures of the batch, each above the most similar one: SHOWN 3 2h w."""
        images, embeddings = batch[0], nn.functional.normalize(self._embed(batch[0]), dim=-1)
        cosines = (embeddings @ embeddings.T).fill_diagonal_(-1)
        near = images[cosines.argmax(dim=1)][:SHOWN]
        return torch.cat([images[:SHOWN], near], dim=2)


def inverse_frequency(tokenizer: Tokenizer, dataset: Dataset) -> Tensor:
    """Return log(N / (1 + n)) for each token, at least 0, where n of N captions of the data have the token: vocabulary.

    N is about COUNTED, or all captions if there are fewer (Huang et al. 2024, section 3.2).
    Raises ValueError if all tokens of the captions have 0.
    """
    chosen = range(0, len(dataset), max(1, len(dataset) // COUNTED))  # from all parts: a folder may be sorted
    total, counts = len(chosen), torch.zeros(len(tokenizer.vocab))
    for i in chosen:
        counts[sorted(set(tokenizer.encode(dataset.caption(i))))] += 1
    rarity = (total / (1 + counts)).log().clamp(min=0)
    if not rarity[counts > 0].any():
        raise ValueError(
            f"the {total} captions have no words that tell the pictures apart, so a vision tower can learn nothing: "
            "write captions that differ, for at least 3 pictures"
        )
    return rarity


def seen(images: Tensor, size: int) -> Tensor:
    """Return images, b 3 h w in [-1, 1], as a vision tower sees them: b 3 size size."""
    return torch.cat([pixels(picture, size) for picture in to_pil(images)]).to(images)
