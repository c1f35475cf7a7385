"""Textual inversion in training (Gal et al. 2022): the vectors of one word learn, and nothing else."""

from typing import Any

import torch
from torch import nn

from ldm.models.text import TextEncoder
from ldm.models.textual_inversion import add_embedding


def learn_word(text_encoder: TextEncoder, name: str, start: str, count: int) -> nn.ParameterList:
    """Let `name` stand for `count` new vectors in each text tower, and return them: k d for each tower.

    The vectors start as those of the tokens of `start`, in turn. The towers compute with the returned parameters.
    Raises ValueError as `add_embedding` does, and for a start without tokens.
    """
    towers: list[Any] = list(text_encoder.towers)
    parts = []
    for tower in towers:
        ids = tower.tokenizer.encode(start)
        if not ids:
            raise ValueError(f"the vectors start from those of a word, and {start!r} has none: give a word")
        turns = torch.tensor([ids[i % len(ids)] for i in range(count)], device=tower.norm.weight.device)
        parts.append(tower.token_embedding(turns).detach())
    add_embedding(text_encoder, name, parts)
    learned = nn.ParameterList()
    for tower, part in zip(towers, parts, strict=True):
        learned.append(nn.Parameter(part))
        del tower.token_embedding.vectors  # a buffer
        tower.token_embedding.vectors = learned[-1]
    return learned
