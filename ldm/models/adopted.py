"""Text models of transformers that a user already holds, as a `TextEncoder` that shares their weights."""

from typing import Any

import torch

from ldm.config import TextConfig
from ldm.models.text import ACTIVATIONS, Block, TextEncoder, TextTower
from ldm.models.token_files import tokenizer_from_json


def adopt(model: Any, tokenizer: Any, *, sdxl: bool | None = None) -> TextEncoder:
    """Return the text encoder of transformers' models and tokenizers; see `TextEncoder.from_transformers`."""
    models, tokenizers = (list(v) if isinstance(v, list | tuple) else [v] for v in (model, tokenizer))
    if sdxl is None:
        sdxl = len(models) > 1 or hasattr(models[0], "text_projection")
    ours = [tokenizer_from_json(t.backend_tokenizer.to_str()) for t in tokenizers]
    configs = [_config_of(*each, sdxl=sdxl) for each in zip(models, tokenizers, strict=True)]
    with torch.device("meta"):
        encoder = TextEncoder(configs, ours)
    for tower, theirs in zip(encoder.towers, models, strict=True):
        assert isinstance(tower, TextTower)
        _share_layers(tower, theirs)
    return encoder.train(models[0].training)


def _config_of(model: Any, tokenizer: Any, *, sdxl: bool) -> TextConfig:
    """Return the TextConfig of one of transformers' text models."""
    said = model.config
    if said.hidden_act not in ACTIVATIONS or said.layer_norm_eps != 1e-5 or said.attention_dropout:
        raise ValueError(
            f"a text model needs an activation of {', '.join(ACTIVATIONS)}, layer_norm_eps 1e-5 and no dropout, got "
            f"{said.hidden_act}, {said.layer_norm_eps} and {said.attention_dropout}"
        )
    return TextConfig(
        width=said.hidden_size,
        layers=said.num_hidden_layers,
        heads=said.num_attention_heads,
        mlp=said.intermediate_size,
        activation=said.hidden_act,
        projection=said.projection_dim if sdxl and hasattr(model, "text_projection") else None,
        vocab_size=model.get_input_embeddings().num_embeddings,
        max_length=said.max_position_embeddings,
        pad_id=int(tokenizer.pad_token_id),
        output_layer=-2 if sdxl else -1,
        final_norm=not sdxl,
    )


def _share_layers(tower: TextTower, model: Any) -> None:
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
