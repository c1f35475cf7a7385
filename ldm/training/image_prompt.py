"""The objective of an IP-Adapter: with it, a fixed UNet predicts better, because it sees the picture (Ye et al. 2023).

The vision tower is fixed, too, so the features of each picture are computed once, when its latents are encoded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.ip_adapters import TOKENS
from ldm.checkpoint.parts import Model
from ldm.conditioning import Condition
from ldm.image_prompt import features
from ldm.models.ip_adapter import (
    HEAD_DIM,
    Applied,
    ImageProjection,
    ImagePrompted,
    IPAdapter,
    Resampler,
    cross_attentions,
)
from ldm.models.unet import UNet
from ldm.training.diffusion import DiffusionLoss, DiffusionObjective, Networks
from ldm.training.loop import Batch, extras
from ldm.training.vision import seen

SHOWN = 8  # sample pictures, each below the picture that is its prompt


@dataclass(frozen=True)
class ResamplerConfig:
    """The sizes of the projection of an IP-Adapter Plus. The defaults are those of the published one for SD 1.5."""

    tokens: int = 16
    dim: int = 768
    layers: int = 4
    mlp: int = 3072

    def __post_init__(self) -> None:
        if self.dim % HEAD_DIM:
            raise ValueError(
                f"dim of a resampler must be a multiple of {HEAD_DIM}, the width of its heads, got {self.dim}"
            )


@dataclass(frozen=True, kw_only=True)
class ImagePromptLoss(DiffusionLoss):
    """The weights of a `DiffusionLoss`, and the share of left-out pictures."""

    picture_dropout: float = 0.05  # share of examples without their picture, as in the authors' code

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.picture_dropout < 1:
            raise ValueError(f"picture_dropout must be at least 0 and less than 1, got {self.picture_dropout}")


def new_ip_adapter(unet: UNet, tower: Any, resampler: ResamplerConfig | None = None) -> IPAdapter:
    """Return a new IP-Adapter, whose keys and values of pictures are those that `unet` has for texts.

    tower: transformers' `CLIPVisionModelWithProjection`. resampler: of an IP-Adapter Plus; None: a plain IP-Adapter.
    """
    attentions, context_dim = cross_attentions(unet), unet.config.context_dim
    projection: ImageProjection | Resampler
    if resampler is None:
        image_dim = tower.config.projection_dim
        projection = ImageProjection(image_dim, context_dim, TOKENS)
    else:
        image_dim, sizes = tower.config.hidden_size, resampler
        projection = Resampler(image_dim, context_dim, sizes.tokens, dim=sizes.dim, mlp=sizes.mlp, layers=sizes.layers)
    adapter = IPAdapter(projection, image_dim, context_dim, [each.to_k.out_features for each in attentions])
    for keys, values, own in zip(adapter.to_k, adapter.to_v, attentions, strict=True):
        keys.load_state_dict(own.to_k.state_dict())
        values.load_state_dict(own.to_v.state_dict())
    return adapter


class Features(nn.Module):
    """From images, b 3 h w in [-1, 1], to "features", what an IP-Adapter reads of them.

    They are b d, the embeddings by a vision tower, or for an IP-Adapter Plus b m d, its last hidden states but one.
    """

    def __init__(self, tower: nn.Module, *, patches: bool) -> None:
        """tower: transformers' `CLIPVisionModelWithProjection`. patches: whether the adapter is an IP-Adapter Plus."""
        super().__init__()
        self.tower, self.patches = tower, patches

    def forward(self, images: Tensor) -> Mapping[str, Tensor]:
        """Return the features by their name."""
        tower: Any = self.tower
        return {"features": self.of(seen(images, tower.config.image_size))}

    @torch.no_grad()
    def of(self, pixels: Tensor) -> Tensor:
        """Return the features of normalized pixels, b 3 size size."""
        return features(self.tower, pixels, patches=self.patches)

    def left_out(self) -> Tensor:
        """Return the features of no picture, one row: zeros, or for an IP-Adapter Plus those of a gray picture."""
        tower: Any = self.tower
        size = tower.config.image_size
        found = self.of(torch.zeros(1, 3, size, size, device=next(tower.parameters()).device))
        return found if self.patches else torch.zeros_like(found)


class ImagePromptObjective(DiffusionObjective):
    """Train an IP-Adapter for a fixed model.

    The batches have the moments of latents, and "features", see `Features`. Some captions and some pictures are left
    out, so that each of them works alone, and for guidance.
    """

    weights: ImagePromptLoss

    def __init__(self, model: Model, adapter: IPAdapter, weights: ImagePromptLoss, left_out: Tensor) -> None:
        """Freeze all networks of `model`. `adapter` is trained. left_out: the features of no picture, one row."""
        super().__init__(model.config, Networks(model.unet, model.text_encoder), model.vae, weights)
        self.networks.eval().requires_grad_(False)
        self.adapter = adapter.requires_grad_(True)
        self.left_out: Tensor
        self.register_buffer("left_out", left_out, persistent=False)

    @property
    def trained(self) -> nn.Module:
        """The IP-Adapter."""
        return self.adapter

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean weighted squared error of one batch at random timesteps."""
        pictures = extras(batch)["features"]
        keep = (torch.rand(len(pictures)) >= self.weights.picture_dropout).to(pictures.device)
        chosen = torch.where(keep.reshape(-1, *[1] * (pictures.dim() - 1)), pictures, self.left_out.to(pictures))
        tokens = self.adapter.image_proj(chosen)

        def predict(z: Tensor, t: Tensor, given: Condition) -> Tensor:
            return ImagePrompted(self.networks.unet, [Applied(self.adapter, tokens, tokens)]).bind(given)(z, t)

        return self._errors(batch, predict)

    def sample(self, batch: Batch) -> Tensor:
        """Return pictures of the batch, each above the one that it prompts without text: SHOWN 3 2h w."""
        moments, shown = batch[0][:SHOWN], extras(batch)["features"][:SHOWN]
        tokens, negative = (self.adapter.image_proj(f) for f in (shown, self.left_out.to(shown)))
        prompted = ImagePrompted(self.networks.unet, [Applied(self.adapter, tokens, negative)])
        texts = [""] * len(moments)
        made = self._sampled(prompted.bind, self.networks.text_encoder, texts, (moments, texts))
        true = self.vae.decode(self._posterior(moments).mode())
        return torch.cat([true, made], dim=2)
