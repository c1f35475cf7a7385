"""Textual inversion (Gal et al. 2022): names in a prompt that stand for learned vectors, in place of tokens.

A name is found before the text is split into words: as written, in upper or lower case, and not as a part of a word.
The longest name comes first. A name that is also a word of the vocabulary replaces the word, as in A1111's web UI.
A name with n vectors takes n positions. `ldm.checkpoint.embeddings` reads the files.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.text import TextEncoder, TextTower
from ldm.models.tokens import Tokenizer


class NamedTokenizer(Tokenizer):
    """A tokenizer that finds names in the text, and gives each its ids, which lie beyond the vocabulary.

    tokenizer: reads all other text. names: the ids by name.
    Raises ValueError for a blank name.
    """

    def __init__(self, tokenizer: Tokenizer, names: Mapping[str, range]) -> None:
        vars(self).update(vars(tokenizer))
        self.plain = getattr(tokenizer, "plain", tokenizer)
        self.names = dict(names)
        self.following = {i for ids in self.names.values() for i in ids[1:]}
        if "" in self.names:
            raise ValueError("an embedding needs a name that is not blank: write NAME=FILE")
        self._longest = sorted(self.names, key=len, reverse=True)
        self._any = re.compile("|".join(f"({_pattern(name)})" for name in self._longest), re.IGNORECASE)

    def split(self, text: str) -> list[str]:
        """Split `text` at the names. Items 1, 3, 5 ... are names, as in `names`."""
        text, parts, end = unicodedata.normalize("NFC", text), list[str](), 0
        for match in self._any.finditer(text):
            parts += [text[end : match.start()], self._longest[(match.lastindex or 0) - 1]]
            end = match.end()
        return [*parts, text[end:]]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without begin and end tokens, however many there are."""
        plain, ids = super().encode, list[int]()
        for at, part in enumerate(self.split(text)):
            ids += self.names[part] if at % 2 else plain(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`. The ids of a name, or some of them, give the name once."""
        plain, words, turn = super().decode, list[tuple[str | None, int, int]](), 0
        owners = {i: name for name, own in self.names.items() for i in own}
        for i in ids:
            turn += i in owners and i not in self.following
            words.append((owners.get(i), turn, i))
        groups = groupby(words, key=lambda word: word[:2])
        return " ".join(name or plain([i for *_, i in own]) for (name, _), own in groups)


class AddedVectors(nn.Module):
    """An embedding with more vectors than its weight has. They are no part of the state that is saved.

    vectors: k d. The ids from the number of rows of the weight on select them.
    """

    vectors: Tensor

    def __init__(self, weight: nn.Parameter, vectors: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("vectors", vectors.detach().to(weight), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids: b n to b n d."""
        own = ids - len(self.weight)
        tokens = F.embedding(ids.clamp(max=len(self.weight) - 1), self.weight)
        return torch.where(own[..., None] < 0, tokens, F.embedding(own.clamp(min=0), self.vectors))


def add_embedding(text_encoder: TextEncoder, name: str, parts: Sequence[Tensor]) -> None:
    """Let `name` stand for learned vectors in the texts that `text_encoder` reads. Its saved weights do not change.

    parts: k d each, one for each tower. SDXL's refiner takes the last of two parts, because it has SDXL's second tower.
    Raises ValueError for vectors of another width than the towers, for more than a tower reads, and for a wrong name.
    """
    towers: list[TextTower] = list(text_encoder.towers)  # type: ignore[arg-type]
    used = list(parts)[-len(towers) :]
    widths = [tower.config.width for tower in towers]
    if [part.shape[1] for part in used] != widths:
        given, wanted = " + ".join(str(part.shape[1]) for part in parts), " + ".join(map(str, widths))
        raise ValueError(
            f"the embedding is {given} wide, and the text encoder of the model {wanted}: give one made for this model"
        )
    room = towers[0].config.max_length - 2
    if len({len(part) for part in used}) > 1 or not 0 < len(used[0]) <= room:
        raise ValueError(
            f"an embedding needs 1 to {room} vectors, as many for each text encoder, got "
            f"{' and '.join(str(len(part)) for part in used)}"
        )
    for tower, part in zip(towers, used, strict=True):
        embedding: Any = tower.token_embedding
        names = getattr(tower.tokenizer, "names", {})
        if (name := normal(name)) in names:
            raise ValueError(f"two embeddings have the name {name!r}: write NAME=FILE to choose another name")
        if isinstance(embedding, AddedVectors):
            part = torch.cat([embedding.vectors, part.to(embedding.vectors)])
        first = max((own.stop for own in names.values()), default=len(embedding.weight))
        ids = range(first, len(embedding.weight) + len(part))
        tower.tokenizer = NamedTokenizer(tower.tokenizer, {**names, name: ids})
        tower.token_embedding = AddedVectors(embedding.weight, part)  # type: ignore[assignment]


def remove_embedding(text_encoder: TextEncoder, name: str) -> None:
    """Undo `add_embedding`: `name` is plain text again. Other embeddings stay. Raises KeyError for an unknown name."""
    towers: Any = text_encoder.towers
    for tower in towers:
        tokenizer, embedding = tower.tokenizer, tower.token_embedding
        names, weight = dict(tokenizer.names), embedding.weight
        gone = names.pop(normal(name))
        if not names:
            tower.tokenizer = tokenizer.plain
            tower.token_embedding = nn.Embedding(len(weight), weight.shape[1], _weight=weight)
            tower.token_embedding.weight = weight
            continue
        first, count = gone.start - len(weight), len(gone)
        kept = torch.cat([embedding.vectors[:first], embedding.vectors[first + count :]])
        later = {n: range(own.start - count, own.stop - count) for n, own in names.items() if own.start > gone.start}
        tower.tokenizer = NamedTokenizer(tokenizer.plain, names | later)
        tower.token_embedding = AddedVectors(weight, kept)


def normal(name: str) -> str:
    """Return a name in the form in which names are compared."""
    return " ".join(unicodedata.normalize("NFC", name).lower().split())


def _pattern(name: str) -> str:
    """Return the pattern of a name. A letter, digit or underscore at its end must also end a word in the text."""
    before, after = (r"(?<!\w)" if re.match(r"\w", name) else ""), (r"(?!\w)" if re.search(r"\w$", name) else "")
    return before + r"\s+".join(map(re.escape, name.split())) + after
