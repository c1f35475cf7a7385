"""CLIP text encoding: one or more towers with their tokenizers, and the choice of the outputs for the UNet."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning import Condition
from ldm.config import TextConfig
from ldm.models.clip import ACTIVATIONS, Block
from ldm.models.tokens import Tokenizer


class TextTower(nn.Module):
    """One CLIP text transformer with its tokenizer. The config chooses the hidden state for the context."""

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

        Warns if a text is too long for the tower, with the part that is cut off.
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
        """Encode ids: b n. Returns the chosen hidden state: b n width, and the pooled projection: b p.

        clip_skip: another hidden state than the config's. Raises ValueError as `TextConfig.context_layer` does.
        """
        layer = self.config.context_layer(clip_skip)
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        for block in self.blocks[:layer]:
            x = block(x)
        context = self.norm(x) if self.config.final_norm else x
        if self.projection is None:
            return Condition(context, None)
        for block in self.blocks[layer:]:
            x = block(x)
        # The pooled position is the first end token; argmax(ids) would find added tokens, whose ids are larger.
        ends = (ids == self.tokenizer.eos_id).int().argmax(dim=-1)
        pooled = self.norm(x)[torch.arange(len(ids), device=ids.device), ends]
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
    """The towers of a model. Their contexts are concatenated along the width; the last pooled projection is used."""

    def __init__(self, configs: Sequence[TextConfig], tokenizers: Sequence[Tokenizer]) -> None:
        super().__init__()
        self.tokenizers = list(tokenizers)  # one per tower
        self.towers = nn.ModuleList(
            TextTower(config, tokenizer) for config, tokenizer in zip(configs, tokenizers, strict=True)
        )

    def encode(self, texts: list[str], clip_skip: int | None = None) -> Condition:
        """Encode `texts` as context: b n d (d: sum of the widths) and vector: b p or None.

        clip_skip: for every tower; see `TextConfig.context_layer`, which raises ValueError.
        """
        outputs = [tower(tower.tokenize(texts), clip_skip) for tower in self.towers]  # type: ignore[operator]
        vectors = [out.vector for out in outputs if out.vector is not None]
        context = torch.cat([out.context for out in outputs], dim=-1)  # b n d
        return Condition(context, vectors[-1] if vectors else None)

    @classmethod
    def from_transformers(cls, model: Any, tokenizer: Any, *, sdxl: bool | None = None) -> "TextEncoder":
        """Wrap a `CLIPTextModel` or `CLIPTextModelWithProjection` of transformers and its tokenizer, or lists of them.

        The layers are shared, not copied. sdxl: use the hidden state before the last without the final norm, and the
        pooled projection, as SDXL does; None: do so for two models, or for one with a projection.
        Raises ValueError for a model that is not a CLIP text tower of Stable Diffusion.
        """
        models, tokenizers = (list(v) if isinstance(v, list | tuple) else [v] for v in (model, tokenizer))
        if sdxl is None:
            sdxl = len(models) > 1 or hasattr(models[0], "text_projection")
        ours = [Tokenizer.from_json(t.backend_tokenizer.to_str()) for t in tokenizers]
        configs = [
            _config_of(model, int(tokenizer.pad_token_id), sdxl=sdxl)
            for model, tokenizer in zip(models, tokenizers, strict=True)
        ]
        with torch.device("meta"):
            encoder = cls(configs, ours)
        for tower, theirs in zip(encoder.towers, models, strict=True):
            assert isinstance(tower, TextTower)
            _adopt(tower, theirs)
        return encoder.train(models[0].training)


def _config_of(model: Any, pad_id: int, *, sdxl: bool) -> TextConfig:
    """Return the TextConfig of one of transformers' text models."""
    said = model.config
    if said.hidden_act not in ACTIVATIONS or said.layer_norm_eps != 1e-5 or said.attention_dropout:
        raise ValueError(
            f"a text model needs an activation of {', '.join(ACTIVATIONS)}, layer_norm_eps 1e-5 and no dropout, got "
            f"{said.hidden_act}, {said.layer_norm_eps} and {said.attention_dropout}"
        )
    projected = sdxl and hasattr(model, "text_projection")
    return TextConfig(
        width=said.hidden_size,
        layers=said.num_hidden_layers,
        heads=said.num_attention_heads,
        mlp=said.intermediate_size,
        activation=said.hidden_act,
        projection=said.projection_dim if projected else None,
        vocab_size=model.get_input_embeddings().num_embeddings,
        max_length=said.max_position_embeddings,
        pad_id=pad_id,
        output_layer=-2 if sdxl else -1,
        final_norm=not sdxl,
    )


def _adopt(tower: TextTower, model: Any) -> None:
    """Replace the layers of `tower` by those of transformers' `model`."""
    core = getattr(model, "text_model", model)  # some of transformers' classes have this inner module
    tower.token_embedding = core.embeddings.token_embedding
    tower.position_embedding = core.embeddings.position_embedding
    for ours, theirs in zip(tower.blocks, core.encoder.layers, strict=True):
        assert isinstance(ours, Block)
        ours.norm1, ours.norm2 = theirs.layer_norm1, theirs.layer_norm2
        ours.attn.to_q, ours.attn.to_k = theirs.self_attn.q_proj, theirs.self_attn.k_proj
        ours.attn.to_v, ours.attn.to_out = theirs.self_attn.v_proj, theirs.self_attn.out_proj
        ours.fc1, ours.fc2 = theirs.mlp.fc1, theirs.mlp.fc2
    tower.norm = core.final_layer_norm
    if tower.projection is not None:
        tower.projection = model.text_projection
