"""IP-Adapter: a picture as a part of the prompt (Ye et al. 2023).

A vision tower describes the picture. A projection turns this description into image tokens, as wide as those of the
text. Each cross-attention of the UNet gets a second pair of keys and values, made from the image tokens:

    softmax(q k^T / sqrt(d)) v + weight softmax(q k'^T / sqrt(d)) v'   (eq. 5: "decoupled cross-attention")

`ImagePrompted(unet, prompts)` is the UNet with such keys and values. As `UNet`, it has a method `bind(condition)`, so
it takes the UNet's place everywhere.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.conditioning import Condition
from ldm.models.transformer import Attention
from ldm.models.unet import UNet

HEAD_DIM = 64  # of all published resamplers; their files do not tell it


class ImageProjection(nn.Module):
    """One linear layer from the embedding of a picture to a few tokens, of the plain IP-Adapter."""

    def __init__(self, image_dim: int, context_dim: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(image_dim, tokens * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map features: b image_dim, the embedding that CLIP compares with texts, to b tokens context_dim."""
        return self.norm(rearrange(self.proj(features), "b (n d) -> b n d", n=self.tokens))


class ResamplerLayer(nn.Module):
    """Attention from the tokens to the picture and to the tokens, and an MLP without biases."""

    def __init__(self, dim: int, mlp: int) -> None:
        super().__init__()
        self.norm_image = nn.LayerNorm(dim)
        self.norm_tokens = nn.LayerNorm(dim)
        self.attn = Attention(dim, dim // HEAD_DIM)
        self.attn.to_out = nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, mlp, bias=False)
        self.down = nn.Linear(mlp, dim, bias=False)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """Map x: b n d with image: b m d to b n d."""
        h = self.norm_tokens(x)
        x = x + self.attn(h, torch.cat([self.norm_image(image), h], dim=1))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Resampler(nn.Module):
    """Learned queries that read all patches of a picture, of IP-Adapter Plus (Perceiver, Jaegle et al. 2021)."""

    def __init__(self, image_dim: int, context_dim: int, tokens: int, *, dim: int, mlp: int, layers: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, tokens, dim) / dim**0.5)
        self.proj_in = nn.Linear(image_dim, dim)
        self.layers = nn.ModuleList(ResamplerLayer(dim, mlp) for _ in range(layers))
        self.proj_out = nn.Linear(dim, context_dim)
        self.norm_out = nn.LayerNorm(context_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map features: b m image_dim, the last hidden states but one of the tower, to b tokens context_dim."""
        image = self.proj_in(features)
        x = self.latents.expand(len(image), -1, -1)
        for layer in self.layers:
            x = layer(x, image)
        return self.norm_out(self.proj_out(x))


class IPAdapter(nn.Module):
    """The projection of a picture, and layers to keys and values for each cross-attention of a UNet.

    widths: of the cross-attentions, in the order of `cross_attentions`. image_dim: the width of the features.
    """

    def __init__(
        self, projection: ImageProjection | Resampler, image_dim: int, context_dim: int, widths: Sequence[int]
    ) -> None:
        super().__init__()
        self.image_dim, self.context_dim, self.widths = image_dim, context_dim, tuple(widths)
        self.image_proj = projection
        self.to_k = nn.ModuleList(nn.Linear(context_dim, width, bias=False) for width in widths)
        self.to_v = nn.ModuleList(nn.Linear(context_dim, width, bias=False) for width in widths)

    @property
    def reads_patches(self) -> bool:
        """Whether the features are a vector for each patch (IP-Adapter Plus), not one for the picture."""
        return isinstance(self.image_proj, Resampler)


class Applied(NamedTuple):
    """An IP-Adapter with a picture.

    tokens, negative: 1 n context_dim, or b n context_dim, for the prompt, and for the negative prompt. weight: a factor
    of what the attention to the picture adds.
    """

    adapter: IPAdapter
    tokens: Tensor
    negative: Tensor
    weight: float = 1.0


class ImagePrompted:
    """A UNet with image prompts, whose attentions are added up.

    Raises ValueError for an IP-Adapter that was made for another UNet.
    """

    def __init__(self, unet: UNet, prompts: Sequence[Applied]) -> None:
        for prompt in prompts:
            check_fits(prompt.adapter, unet)
        self.unet, self.prompts = unet, tuple(prompts)
        self.config, self.skip_channels = unet.config, unet.skip_channels  # a ControlNet is compared with them

    def bind(self, condition: Condition) -> Callable[..., Tensor]:
        """Return a function (z, timesteps, residuals=None) -> prediction, as `UNet.bind` does.

        The keys and values of text and pictures are computed here, once for all steps.
        """
        context = self.unet.project(condition.context)
        images = [_per_row(prompt, condition) for prompt in self.prompts]
        middle, i = len(self.unet.down), 0
        for stage in (*context[:middle], *context[middle + 1 :], context[middle]):  # as `cross_attentions`
            for j, text in enumerate(stage):
                added = [_keys_values(p, tokens, i, text.keys) for p, tokens in zip(self.prompts, images, strict=True)]
                stage[j], i = text._replace(added=tuple(added)), i + 1

        def network(z: Tensor, timesteps: Tensor, residuals: Sequence[Tensor] | None = None) -> Tensor:
            return self.unet(z, timesteps, context, condition.vector, residuals, condition.guidance)

        return network


def cross_attentions(unet: UNet) -> list[Attention]:
    """List the cross-attentions in the order of the published files: encoder, decoder, middle."""
    transformers = [stage.transformer for stage in (*unet.down, *unet.up, unet.mid)]
    return [block.attn2 for part in transformers if part is not None for block in part.blocks]


def check_fits(adapter: IPAdapter, unet: UNet) -> None:
    """Raise ValueError unless `adapter` has keys and values for each cross-attention of `unet`."""
    widths = tuple(attention.to_k.out_features for attention in cross_attentions(unet))
    for what, own, wanted in (
        ("text of width", adapter.context_dim, unet.config.context_dim),
        ("this many cross-attentions:", len(adapter.widths), len(widths)),
        ("cross-attentions of the widths", adapter.widths, widths),
    ):
        if own != wanted:
            raise ValueError(
                f"the IP-Adapter has {what} {own}, and the UNet of the model {wanted}: use an IP-Adapter that was made "
                "for this model's family"
            )


def _per_row(prompt: Applied, condition: Condition) -> Tensor:
    """Return the image tokens for each row of a condition, b n context_dim: those of the prompt, or the negative."""
    rows, b = condition.is_prompt, len(condition.context)
    tokens, negative = (t.repeat(b // len(t), 1, 1) for t in (prompt.tokens, prompt.negative))
    return tokens if rows is None else torch.where(rows[:, None, None], tokens, negative)


def _keys_values(prompt: Applied, tokens: Tensor, i: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and the weighted values of the i-th cross-attention, b h n d each. like: its keys of the text."""
    keys, values = prompt.adapter.to_k[i](tokens), prompt.weight * prompt.adapter.to_v[i](tokens)
    heads = like.shape[1]
    return rearrange(keys, "b n (h d) -> b h n d", h=heads), rearrange(values, "b n (h d) -> b h n d", h=heads)
