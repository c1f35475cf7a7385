"""Embeddings of textual inversion on disk: files of A1111's web UI, of diffusers' training, and of SDXL.

    A1111     .pt: {"string_to_param": {"*": k d}, ...}; .safetensors: {"emb_params": k d}
    diffusers .bin, .safetensors: {"<name>": d or k d}
    SDXL      {"clip_l": k 768, "clip_g": k 1280}, or with the names text_encoders_0 and text_encoders_1

A file of diffusers holds its name. Any other embedding has the name of its file, without the ending.
Pickles are read without running code, see `ldm.checkpoint.pickles`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.atomic import beside
from ldm.checkpoint.known import NAMES, kind_of
from ldm.checkpoint.pickles import PickledTensors, is_pickle
from ldm.checkpoint.tensors import FLOATS, TensorFiles, Tensors, check_file, some, write_tensors
from ldm.models.text import TextEncoder
from ldm.models.textual_inversion import add_embedding

_PAIRS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
_UNNAMED = ("emb_params", "*", "clip_l", "clip_g")  # names of tensors that are not for prompts


def read_embedding(path: Path) -> tuple[str, list[Tensor]]:
    """Read the embedding at `path`: its name, and k d vectors for each text tower that it was made for.

    Raises ValueError for a file that is damaged or no embedding, and for a pickle that names code.
    """
    check_file(path, "give the file of an embedding, such as a .pt or .safetensors file")
    tensors: Tensors = PickledTensors(path, ("string_to_param",)) if is_pickle(path) else TensorFiles([path])
    names = next((pair for pair in _PAIRS if set(pair) == set(tensors.shapes)), tuple(tensors.shapes))
    fit = all(len(shape) in (1, 2) and 0 not in shape for shape in tensors.shapes.values())
    if not fit or (len(names) != 1 and names not in _PAIRS) or not set(tensors.dtypes.values()) <= set(FLOATS):
        raise ValueError(
            f"{path} is {kind_of(tensors) or 'no embedding'} with {some(sorted(tensors.shapes))}: give a file of one "
            "embedding of textual inversion"
        )
    found = dict(tensors.read(names))
    vectors = [found[n].to(torch.float32, copy=True).reshape(-1, found[n].shape[-1]) for n in names]
    own = names[0] if len(names) == 1 and names[0] not in _UNNAMED else path.stem
    return own, vectors


def save_embedding(folder: Path, name: str, vectors: Sequence[Tensor]) -> None:
    """Write the embedding `name` into `folder` in the formats above; for two text encoders only in that of SDXL.

    vectors: k d for each text tower. The files of A1111 are called like the name, without characters such as "<".
    Raises ValueError for a name without letters and digits.
    """
    stem = re.sub(r"[^\w-]", "", name)
    if not stem:
        raise ValueError(f"the name of an embedding needs letters or digits, got {name!r}")
    held = [part.detach().to("cpu", torch.float32).contiguous() for part in vectors]
    files: dict[str, dict[str, Any]] = {f"{stem}.safetensors": dict(zip(_PAIRS[0], held, strict=False))}
    if len(held) == 1:
        files = {f"{stem}.safetensors": {"emb_params": held[0]}, "learned_embeds.safetensors": {name: held[0]}}
        files[f"{stem}.pt"] = {"string_to_token": {"*": 265}, "string_to_param": {"*": held[0]}, "name": name}
    for file, content in files.items():
        with beside(folder / file) as new:
            torch.save(content, new) if file.endswith(".pt") else write_tensors(content, new)
            new.replace(folder / file)


def load_embeddings(text_encoder: TextEncoder, files: Sequence[tuple[str | None, Path]]) -> None:
    """Add the embeddings in `files` to `text_encoder`.

    files: the name to use in prompts, or None for the embedding's own, and the path.
    Raises ValueError as `read_embedding` and `add_embedding` do, naming the file.
    """
    for name, path in files:
        own, vectors = read_embedding(path)
        try:
            add_embedding(text_encoder, own if name is None else name, vectors)
        except ValueError as error:
            family = NAMES.get(sum(part.shape[1] for part in vectors))
            raise ValueError(f"{path}{f', an embedding for {family}' if family else ''}: {error}") from error


def words_used(text_encoder: TextEncoder, texts: Sequence[str]) -> dict[str, int]:
    """Return the names of embeddings that stand in `texts`, and their numbers of vectors."""
    tokenizer: Any = text_encoder.towers[0].tokenizer
    found = {name for text in texts for name in tokenizer.split(text)[1::2]}
    return {name: len(ids) for name, ids in tokenizer.names.items() if name in found}
