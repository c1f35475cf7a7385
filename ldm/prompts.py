r"""Prompt syntax, for requests with `emphasis`: weights of words, prompts of any length, prompts that change.

    (word)  (word:1.3)  [word]   multiply the weight of the words by 1.1, by 1.3 and by 1 / 1.1; brackets can be nested
    \(  \)  \[  \]  \\           the character itself
    BREAK                        begin the next chunk of tokens here
    [from:to:when]               read "from", and after `when` steps "to"; [to:when] and [from::when] leave one empty

The syntax is that of A1111's web UI, whose documented examples are in the tests. Three things differ. BREAK also works
in brackets, where A1111 reads it as a word. The mean of `restore_mean` is that of one prompt, where A1111 takes the
mean of all prompts in a batch. `[a|b]` is refused.
"""

import math
import re
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ldm.conditioning import Condition
from ldm.models.text import TextEncoder, TextTower
from ldm.models.tokens import Tokenizer
from ldm.phases import at_step

BACKTRACK = 20  # a chunk that is full ends after the last comma among this many tokens, if there is one
Weighted = tuple[str, float]  # a text and its weight
Token = tuple[int, float]  # an id and its weight

_MARKS = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|\)|\]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_ROUND, _SQUARE = 1.1, 1 / 1.1


# ------------------------------------------------------------------ weights of words


def parse(prompt: str) -> list[list[Weighted]]:
    """Split `prompt` at BREAK into sections, and each section into texts of one weight.

    A bracket that is not closed reaches to the end of the prompt. One that was not opened is a character.
    Raises ValueError for a weight that is not a finite number.
    """
    found: list[list[tuple[str, float]]] = [[]]  # sections
    places: list[tuple[str, int, int]] = []  # the open brackets: kind, and where they begin: section, text

    def multiply(kind: str, factor: float) -> bool:
        """Close the last bracket of this kind. Returns whether there is one."""
        at = next((i for i in reversed(range(len(places))) if places[i][0] == kind), None)
        if at is None:
            return False
        _, section, first = places.pop(at)
        for s in range(section, len(found)):
            start = first if s == section else 0
            found[s][start:] = [(text, weight * factor) for text, weight in found[s][start:]]
        return True

    for match in _MARKS.finditer(prompt):
        word = match[0]
        if word[0] == "\\":
            found[-1].append((word[1:], 1.0))
        elif word in "([":
            places.append((word, len(found) - 1, len(found[-1])))
        elif match["weight"] and any(kind == "(" for kind, *_ in places):
            multiply("(", _number(match["weight"]))
        elif not (word == ")" and multiply("(", _ROUND)) and not (word == "]" and multiply("[", _SQUARE)):
            first, *others = _BREAK.split(word)
            found[-1].append((first, 1.0))
            found += [[(other, 1.0)] for other in others]
    while places:
        multiply(places[-1][0], _ROUND if places[-1][0] == "(" else _SQUARE)
    return [_merged(section) for section in found]


def _number(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"the weight of a word must be a finite number such as (word:1.2), got {word[:20]!r}; "
            r"write \( and \) for brackets that are part of the prompt"
        )
    return number


def _merged(section: Sequence[Weighted]) -> list[Weighted]:
    """Join neighbors of one weight, so that a word in several pieces has the tokens of the whole word."""
    merged: list[Weighted] = []
    for text, weight in filter(itemgetter(0), section):
        if merged and merged[-1][1] == weight:
            merged[-1] = merged[-1][0] + text, weight
        else:
            merged.append((text, weight))
    return merged


# ------------------------------------------------------------------ chunks


def chunks(prompt: str, tokenizer: Tokenizer, room: int) -> list[list[Token]]:
    """Return the tokens of `prompt` with their weights, in chunks of at most `room` tokens: one chunk or more.

    As in A1111, a full chunk ends after the last comma among its last 20 tokens, unless the next token is a comma.
    Without such a comma it is filled, also if this splits a word.
    """
    comma = tokenizer.vocab.get(",</w>")
    found: list[list[Token]] = []
    for section in parse(prompt):
        tokens = [(i, weight) for text, weight in section for i in tokenizer.encode(text)]
        while len(tokens) > room:
            late = range(room - 1, max(room - 1 - BACKTRACK, -1), -1)
            commas = (i + 1 for i in late if tokens[i][0] == comma)
            end = room if tokens[room][0] == comma else next(commas, room)
            while tokens[end][0] in tokenizer.following:  # the vectors of an embedding stay together
                end -= 1
            found.append(tokens[:end])
            tokens = tokens[end:]
        found.append(tokens)
    return found if found[-1] or len(found) == 1 else found[:-1]  # BREAK at the end begins no chunk


# ------------------------------------------------------------------ hidden states


def restore_mean(z: Tensor, weights: Tensor, empty: Tensor) -> Tensor:
    """Multiply the hidden states by the weights, and the result by the number that restores their mean.

    z' = w z mean(z) / mean(w z), with the mean over all positions and channels of a chunk, as in A1111. A mean close to
    zero makes the last factor large; `interpolate` has no such factor.
    z: k n d, weights: k n. The states of the empty prompt are not used.
    """
    weighted = z * weights[..., None]
    return weighted * (z.mean(dim=(1, 2), keepdim=True) / weighted.mean(dim=(1, 2), keepdim=True))


def interpolate(z: Tensor, weights: Tensor, empty: Tensor) -> Tensor:
    """Move from the hidden states of the empty prompt to those of the prompt, or beyond: z' = e + w (z - e).

    As in ComfyUI. z: k n d, weights: k n, empty: n d.
    """
    return empty + weights[..., None] * (z - empty)


WEIGHTINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"a1111": restore_mean, "interpolate": interpolate}


class Emphasized:
    """A text encoder for prompts with the syntax of this module. `condition` takes it like a `TextEncoder`.

    weighting: how the weights change the hidden states, a key of WEIGHTINGS.
    """

    def __init__(self, text_encoder: TextEncoder, weighting: str) -> None:
        self.text_encoder, self.weighting = text_encoder, WEIGHTINGS[weighting]

    def encode(self, texts: Sequence[str], clip_skip: int | None = None) -> Condition:
        """Encode `texts` as context: b (k n) d, k chunks of n positions one after another, and vector: b p or None.

        All texts get the k of the longest: chunks of the empty prompt are added. The vector is that of the first chunk,
        without weights. A text of one chunk without weights has the states of `TextEncoder.encode`.
        """
        towers: list[TextTower] = list(self.text_encoder.towers)  # type: ignore[arg-type]
        split = [[chunks(text, t.tokenizer, t.config.max_length - 2) for text in texts] for t in towers]
        k = max(len(each) for tower in split for each in tower)
        outputs = []
        for tower, prompts in zip(towers, split, strict=True):
            rows = [chunk for prompt in prompts for chunk in prompt + [[]] * (k - len(prompt))]
            outputs.append(self._encode(tower, rows, k, clip_skip))
        vectors = [out.vector for out in outputs if out.vector is not None]
        return Condition(torch.cat([out.context for out in outputs], dim=-1), vectors[-1] if vectors else None)

    def _encode(self, tower: TextTower, rows: Sequence[Sequence[Token]], k: int, clip_skip: int | None) -> Condition:
        """Encode the chunks of all texts with one tower. rows: b k."""
        length, device = tower.config.max_length, tower.norm.weight.device
        out = tower(torch.tensor([_with_ends(tower, row) for row in rows], device=device), clip_skip)
        padded = [[1.0, *(weight for _, weight in row), *[1.0] * (length - 1 - len(row))] for row in rows]
        weights = torch.tensor(padded, device=device)  # (b k) n
        context: Tensor = out.context  # (b k) n d
        changed = (weights != 1).any(dim=1)
        if changed.any():
            empty = tower(torch.tensor([_with_ends(tower, [])], device=device), clip_skip).context[0]
            dtype = torch.promote_types(context.dtype, torch.float32)  # a mean in fp16 would be rounded
            z = self.weighting(context[changed].to(dtype), weights[changed].to(dtype), empty.to(dtype))
            context = context.index_put((changed,), z.to(context.dtype))
        vector = None if out.vector is None else out.vector[::k]  # the first chunk of each text
        return Condition(rearrange(context, "(b k) n d -> b (k n) d", k=k), vector)


def _with_ends(tower: TextTower, row: Sequence[Token]) -> list[int]:
    """Return the ids of a chunk with the begin token, the end token and padding."""
    ids = [tower.tokenizer.bos_id, *(i for i, _ in row), tower.tokenizer.eos_id]
    return ids + [tower.config.pad_id] * (tower.config.max_length - len(ids))


def checked(prompt: Any, negative: str | None, images: int, emphasis: str | None) -> str | tuple[str, ...]:
    """Return the prompt, or the prompts of the pictures as a tuple.

    Raises ValueError for prompts that are not as many as the pictures, and for wrong syntax if `emphasis` asks for it.
    """
    if not isinstance(prompt, str):
        prompt = tuple(prompt)
        if len(prompt) != images:
            raise ValueError(
                f"a prompt per picture needs as many pictures as prompts, got {len(prompt)} prompts and images={images}"
            )
    for text in (*([prompt] if isinstance(prompt, str) else prompt), negative or ""):
        if emphasis is not None:
            parse(text)
            at_step(text, 0, 1)
    return prompt
