"""The inputs of the UNet other than the noisy latents: texts, sizes, timesteps and the guidance scale."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """The inputs of the UNet that are the same at every step, with one row per image.

    context: b n d, the hidden states of the text. vector: b p, pooled text and sizes (SDXL), or None.
    guidance: b, the guidance scale - 1, for a UNet that takes the scale as an input (LCM), or None.
    is_prompt: b, whether the row is the prompt's, for image prompts and ControlNets in guess mode. None: all rows are.
    """

    context: Tensor
    vector: Tensor | None = None
    guidance: Tensor | None = None
    is_prompt: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Condition":
        """Apply `change` to each tensor."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: change(t) for name, t in tensors.items() if t is not None})

    def rows(self) -> list["Condition"]:
        """Split into conditions with one row each."""
        return [self.map(lambda tensor, i=i: tensor[i : i + 1]) for i in range(len(self.context))]  # type: ignore[misc]


def join(conditions: Sequence[Condition]) -> Condition:
    """Concatenate conditions along the batch dimension.

    Raises ValueError if their shapes differ in another dimension.
    """
    joined: dict[str, Any] = {}
    for name in (field.name for field in dataclasses.fields(conditions[0])):
        tensors = [getattr(condition, name) for condition in conditions]
        shapes = [None if tensor is None else tuple(tensor.shape[1:]) for tensor in tensors]
        if len(set(shapes)) > 1:
            raise ValueError(f"conditions in one batch need a {name} of one shape, got {shapes}; use batched=False")
        joined[name] = None if tensors[0] is None else torch.cat(tensors)
    return dataclasses.replace(conditions[0], **joined)


def condition(
    text_encoder: Any,
    texts: Sequence[str | None],
    scalars: Sequence[Sequence[float]] = (),
    *,
    clip_skip: int | None = None,
) -> Condition:
    """Encode `texts`, and for SDXL the sizes, as a condition with one row per text.

    text_encoder: such as `ldm.models.text.TextEncoder`.
    texts: None is encoded as zeros. SDXL base was trained with zeros where the text was dropped.
    scalars: one row per text, in the order of `ModelConfig.micro_conditioning`. Each scalar is embedded in 256 numbers
      and appended to the vector (Podell et al. 2023, section 2.2). Empty for models without micro-conditioning.
    clip_skip: the layer of the text encoder, counted from the end; see `TextConfig.context_layer`.
    """
    encoded = text_encoder.encode([text or "" for text in texts], clip_skip)
    if None in texts:
        left_out = torch.tensor([text is None for text in texts], device=encoded.context.device)
        encoded = encoded.map(lambda part: part.masked_fill(left_out.reshape(-1, *[1] * (part.ndim - 1)), 0))
    if not scalars:
        return encoded
    if encoded.vector is None:
        raise ValueError("sizes need a text encoder with a pooled output, and this one has none: leave out the sizes")
    numbers = torch.tensor(scalars, dtype=torch.float32)  # b n
    sizes = timestep_embedding(numbers.flatten(), 256).to(encoded.vector)  # (b n) 256
    return dataclasses.replace(encoded, vector=torch.cat([encoded.vector, sizes.reshape(len(texts), -1)], dim=1))


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Embed scalars as cosines, then sines, of dim / 2 geometric frequencies from 1 down to almost 1/10000.

    timesteps: b, any float or int. Returns b dim in fp32 (Ho et al. 2020, section 4). LDM puts the cosines first.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) * exponents)  # b half
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # b dim


def guidance_embedding(guidance: Tensor, dim: int) -> Tensor:
    """Embed guidance as sines, then cosines, of 1000 w in dim / 2 geometric frequencies from 1 down to 1/10000.

    guidance: b, w = guidance scale - 1. Returns b dim in fp32, as latent consistency models were trained (Luo et al.
    2023). Unlike in `timestep_embedding`, sines come first and the last frequency is exactly 1/10000.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=guidance.device)
    frequencies = torch.exp(exponents * (-math.log(10000) / (half - 1)))
    angles = 1000 * guidance.float()[:, None] * frequencies  # b half
    return torch.cat([angles.sin(), angles.cos()], dim=-1)  # b dim
