"""Textual inversion: the same embeddings and prompts through diffusers and this package."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ldm
from ldm.conditioning import Condition
from tests.parity import compare, reference

FAMILIES = ("sd15", "sd21", "sdxl-base")
TEXTS = ["a <cat-toy> on the grass", "a photo of <style>, as a <cat-toy>, red"]
COUNTS = {"<cat-toy>": 1, "<style>": 3}  # vectors by name


def write(folder: Path, pipe: Any) -> list[Path]:
    """Write a file for each name, with random vectors as large as those of the tokens."""
    files = []
    for i, (name, count) in enumerate(COUNTS.items()):
        draw = torch.Generator().manual_seed(i)
        tables = [model.get_input_embeddings().weight for *_, model in reference.towers(pipe)]
        vectors = [torch.randn(count, t.shape[1], generator=draw) * t.std().item() for t in tables]
        keys = [name] if len(vectors) == 1 else ["clip_l", "clip_g"]
        files.append(folder / f"{name[1:-1]}.safetensors")
        save_file(dict(zip(keys, vectors, strict=True)), files[-1])
    return files


def theirs(folder: Path, files: list[Path]) -> tuple[Tensor, Tensor | None]:
    """Encode TEXTS with diffusers, as context and pooled text. Each tower gets its own part of the vectors.

    The published configs name a wrong end token. transformers then pools at the largest id, which is an embedding's; it
    is told the right end token here.
    """
    pipe = reference.load(folder)
    for name, file in zip(COUNTS, files, strict=True):
        stored = load_file(file)
        keys = [name] if len(stored) == 1 else ["clip_l", "clip_g"]
        for key, (_, tokenizer, model) in zip(keys, reference.towers(pipe), strict=True):
            pipe.load_textual_inversion({name: stored[key]}, token=name, tokenizer=tokenizer, text_encoder=model)
    for _, tokenizer, model in reference.towers(pipe):
        for module in (model, getattr(model, "text_model", model)):
            module.eos_token_id = module.config.eos_token_id = tokenizer.eos_token_id
    return reference.encode(pipe, TEXTS)


def ours(folder: Path, files: list[Path]) -> Condition:
    """Encode TEXTS with us."""
    words = [f"{name}={file}" for name, file in zip(COUNTS, files, strict=True)]
    pipe = ldm.load(folder, ldm.Placement("cpu"), embeddings=words)
    with torch.no_grad():
        return pipe.text_encoder.encode(TEXTS)


def differences(folder: Path, pipe: Any, into: Path) -> list[float]:
    """Return the largest difference of the context, and of the pooled text if any, divided by the largest value.

    folder: the model, which `pipe` of diffusers holds. into: the folder where the embeddings are written.
    """
    files = write(into, pipe)
    (context, pooled), made = theirs(folder, files), ours(folder, files)
    pairs = [(made.context, context), (made.vector, pooled)]
    return [compare.relative(got, expected) for got, expected in pairs if got is not None and expected is not None]
