"""CLIP's text transformers (Radford et al. 2021), which turn prompts into the context of the UNet.

The operations and their order are those of transformers' `CLIPTextModel`, so that fp32 results are the same bits.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.conditioning import Condition
from ldm.config import TextConfig
from ldm.models.tokens import Tokenizer


def quick_gelu(x: Tensor) -> Tensor:
    """Return x sigmoid(1.702 x), the approximation of GELU that OpenAI trained CLIP with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class CausalAttention(nn.Module):
    """Multi-head causal self-attention.

    `set_attention` does not change it: its score matrix is small, and it needs the causal mask.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"a text tower {width} wide cannot be split into {heads} heads of equal width")
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map x: b n d to b n d."""
        projections = self.to_q(x), self.to_k(x), self.to_v(x)
        q, k, v = (rearrange(p, "b n (h d) -> b h n d", h=self.heads) for p in projections)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.to_out(rearrange(attended, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """Causal self-attention and an MLP, each with pre-norm and a residual connection."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.norm1 = nn.LayerNorm(config.width)
        self.attn = CausalAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map x: b n d to b n d."""
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class TextTower(nn.Module):
    """One CLIP text transformer with its tokenizer. The config chooses which hidden state is the context."""

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.token_embedding = _embedding(config.vocab_size, config.width)
        self.position_embedding = _embedding(config.max_length, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, config.projection, bias=False) if config.projection else None
        self._initialize()

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return the ids of `texts` with the begin token, the end token and padding: b max_length.

        Warns if a text is too long for the tower, and names the part that is cut off.
        """
        room = self.config.max_length - 2
        rows = []
        for text in texts:
            ids = self.tokenizer.encode(text)
            if len(ids) > room:
                warnings.warn(
                    f"the prompt has {len(ids)} tokens and the text encoder reads {room}; this part is cut off: "
                    f"{self.tokenizer.decode(ids[room:])!r}",
                    stacklevel=2,
                )
            row = [self.tokenizer.bos_id, *ids[:room], self.tokenizer.eos_id]
            rows.append(row + [self.config.pad_id] * (self.config.max_length - len(row)))
        return torch.tensor(rows, device=self.norm.weight.device)

    def forward(self, ids: Tensor, clip_skip: int | None = None) -> Condition:
        """Encode ids: b n. Returns the chosen hidden state as context: b n width, and the pooled text as vector: b p.

        The vector is None for a tower without a projection. clip_skip: another hidden state than the config's.
        Raises ValueError as `TextConfig.context_layer` does.
        """
        layer = self.config.context_layer(clip_skip)
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        for block in self.blocks[:layer]:
            x = block(x)
        context = self.norm(x) if self.config.final_norm else x
        if self.projection is None:
            return Condition(context)
        for block in self.blocks[layer:]:
            x = block(x)
        # The pooled position is the first end token; argmax(ids) would find added tokens, whose ids are larger.
        ends = (ids == self.tokenizer.eos_id).int().argmax(dim=-1)
        pooled = self.norm(x)[torch.arange(len(ids), device=ids.device), ends]  # b width
        return Condition(context, self.projection(pooled))

    @torch.no_grad()
    def _initialize(self) -> None:
        """Draw the weights with the standard deviations of transformers' `CLIPTextModel`."""
        if self.norm.weight.is_meta:
            return
        width, into = self.config.width**-0.5, (2 * self.config.width * self.config.layers) ** -0.5
        special = {"to_out": width, "fc1": (2 * self.config.width) ** -0.5, "projection": width}
        for embedding in (self.token_embedding, self.position_embedding):
            embedding.weight.normal_(std=0.02)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(std=special.get(name.split(".")[-1], into))
                if layer.bias is not None:
                    layer.bias.zero_()


def _embedding(count: int, width: int) -> nn.Embedding:
    """An embedding without initial values: drawing them on "meta" would import torch._dynamo, which takes a second."""
    return nn.Embedding(count, width, _weight=torch.empty(count, width))


class TextEncoder(nn.Module):
    """The text towers of a model, one or two."""

    def __init__(self, configs: Sequence[TextConfig], tokenizers: Sequence[Tokenizer]) -> None:
        super().__init__()
        self.tokenizers = list(tokenizers)  # one per tower
        self.towers = nn.ModuleList(TextTower(*pair) for pair in zip(configs, tokenizers, strict=True))

    def encode(self, texts: list[str], clip_skip: int | None = None) -> Condition:
        """Encode `texts` as context: b n d (the towers' contexts side by side) and vector: b p or None.

        The vector is the pooled text of the last tower that has one. clip_skip: for every tower; see
        `TextConfig.context_layer`, which raises ValueError.
        """
        outputs = [tower(tower.tokenize(texts), clip_skip) for tower in self.towers]  # type: ignore[operator]
        vectors = [out.vector for out in outputs if out.vector is not None]
        context = torch.cat([out.context for out in outputs], dim=-1)  # b n d
        return Condition(context, vectors[-1] if vectors else None)

    @classmethod
    def from_transformers(cls, model: Any, tokenizer: Any, *, sdxl: bool | None = None) -> "TextEncoder":
        """Wrap a `CLIPTextModel` or `CLIPTextModelWithProjection` of transformers and its tokenizer, or lists of them.

        The weights are shared, not copied. sdxl: use the pooled projection, and the hidden state before the last
        without the final norm, as SDXL does. None: True for two models and for one with a projection.
        Raises ValueError for a model that is not a CLIP text tower of Stable Diffusion.
        """
        from ldm.models.adopted import adopt  # only users of transformers need it

        return adopt(model, tokenizer, sdxl=sdxl)
