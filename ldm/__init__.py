"""Latent diffusion from scratch in pure PyTorch."""

from typing import TYPE_CHECKING

from ldm.config import ModelConfig
from ldm.control import Control
from ldm.image_prompt import ImagePrompt
from ldm.loading import load
from ldm.pipeline import Pipeline
from ldm.placement.memory import Placement
from ldm.presets import PRESETS, SD15, SD21, SD21_BASE, SD_TURBO, SDXL_BASE, SDXL_REFINER, SDXL_TURBO, TINY
from ldm.refiner import refine
from ldm.regions import RegionalPrompt
from ldm.request import Request
from ldm.sizes import Sizes
from ldm.source import Mask, Source
from ldm.variations import Variation

if TYPE_CHECKING:
    from ldm.lora import Lora

__version__ = "0.1.0"  # pyproject.toml reads it from here

__all__ = [
    "PRESETS",
    "SD15",
    "SD21",
    "SD21_BASE",
    "SDXL_BASE",
    "SDXL_REFINER",
    "SDXL_TURBO",
    "SD_TURBO",
    "TINY",
    "Control",
    "ImagePrompt",
    "Lora",
    "Mask",
    "ModelConfig",
    "Pipeline",
    "Placement",
    "RegionalPrompt",
    "Request",
    "Sizes",
    "Source",
    "Variation",
    "load",
    "refine",
]


def __getattr__(name: str) -> object:
    """Import `Lora` at its first use, because few pictures use LoRAs."""
    if name != "Lora":
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    from ldm.lora import Lora

    return Lora
