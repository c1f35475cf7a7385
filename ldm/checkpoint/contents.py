"""Which networks a file holds: behind which prefixes, under whose names, and by which rules they are read."""

import dataclasses
from typing import NamedTuple

import torch

from ldm.checkpoint import tables
from ldm.checkpoint.keymap import Rule
from ldm.checkpoint.parts import Part, collect
from ldm.checkpoint.shapes import PRESETS_OF, Shapes
from ldm.checkpoint.tensors import Tensors
from ldm.config import TextConfig, UNetConfig, VAEConfig
from ldm.models.unet import UNet

ENOUGH_EMA = (
    100  # tensors below model_ema. that make an averaged copy; pruned files keep two counters
)


class Place(NamedTuple):
    """Where a network stands in a file: behind which prefix, under whose names."""

    prefix: str
    style: str  # "ldm", "diffusers"; of text towers "hf", "hf without text_model", "openclip"


class Contents(NamedTuple):
    """The networks that a file holds."""

    unet: Place | None
    vae: Place | None
    towers: tuple[Place, ...]  # the narrower first, as SDXL counts them

    @property
    def whole(self) -> bool:
        """Whether it may be a model, and not parts of one."""
        return bool(self.unet and self.vae and self.towers)


def find(tensors: Tensors) -> Contents:
    """Look for networks under each of the prefixes and names that files in use have."""
    names = tensors.shapes
    unet = vae = None
    for prefix in (tables.UNET_PREFIX, "unet.", ""):
        for style, mark in (("ldm", "input_blocks.0.0.weight"), ("diffusers", "conv_in.weight")):
            beside = "input_blocks.1.0.in_layers.0.weight"
            if style == "diffusers":
                beside = "down_blocks.0.resnets.0.norm1.weight"
            if prefix + mark in names and prefix + beside in names:
                unet = unet or Place(prefix, style)
    if unet and f"{unet.prefix}input_hint_block.0.weight" in names:
        unet = None  # a ControlNet is the same encoder with a hint
    if unet and f"{unet.prefix}controlnet_cond_embedding.conv_in.weight" in names:
        unet = None
    for prefix in (tables.VAE_PREFIX, "vae.", ""):
        for style, mark in (
            ("ldm", "encoder.down.0.block.0.conv1.weight"),
            ("diffusers", "encoder.down_blocks.0.resnets.0.conv1.weight"),
        ):
            if prefix + mark in names:
                vae = vae or Place(prefix, style)
    towers = []
    for name, shape in names.items():
        for ending, style in (
            ("text_model.embeddings.token_embedding.weight", "hf"),
            ("embeddings.token_embedding.weight", "hf without text_model"),
            ("token_embedding.weight", "openclip"),
        ):
            prefix = name.removesuffix(ending)
            if prefix != name and (not prefix or prefix.endswith(".")) and len(shape) == 2:
                towers.append((shape[1], Place(prefix, style)))
                break
    return Contents(unet, vae, tuple(place for _, place in sorted(towers)))


def unet_part(tensors: Tensors, place: Place, config: UNetConfig, *, ema: bool = False) -> Part:
    """Return where a UNet's tensors are. Raises ValueError if `ema` is asked for and there is no averaged copy."""
    if ema and count_ema(tensors) < ENOUGH_EMA:
        raise ValueError(
            f"{tensors} has no averaged copy (model_ema.*); its weights may be the averaged ones already: leave out ema"
        )
    names_of = tables.ldm_unet if place.style == "ldm" else tables.diffusers_unet
    return Part(tensors, names_of(config), place.prefix, ema=ema)


def vae_part(tensors: Tensors, place: Place, config: VAEConfig) -> Part:
    """Return where a VAE's tensors are, whichever names it has for its attention."""
    if place.style == "ldm":
        return Part(tensors, tables.ldm_vae(config), place.prefix)
    old = any(name.endswith("attentions.0.query.weight") for name in tensors.shapes)
    attention = tables.OLD_DIFFUSERS_VAE_ATTENTION if old else tables.DIFFUSERS_VAE_ATTENTION
    return Part(tensors, tables.diffusers_vae(attention), place.prefix)


def text_part(tensors: Tensors, place: Place, config: TextConfig) -> Part:
    """Return where a tower's tensors are, and which beside them are of no use for `config`."""
    unused = {f"{place.prefix}logit_scale"}
    if config.projection is None:
        unused |= {f"{place.prefix}text_projection", f"{place.prefix}text_projection.weight"}
    if place.style == "openclip":
        rules: tuple[Rule, ...] = tables.OPENCLIP_TEXT
        block = f"transformer.resblocks.{config.layers}."
    else:
        level = "text_model" if place.style == "hf" else ""
        rules = tables.hf_text(level)
        block = ".".join(filter(None, [level, f"encoder.layers.{config.layers}."]))
    if config.final_norm:  # the block after the layer that is used: SD 2
        unused |= {n for n in tensors.shapes if n.startswith(place.prefix + block)}
    return Part(tensors, rules, place.prefix, unused=tuple(sorted(unused & tensors.shapes.keys())))


def count_ema(tensors: Tensors) -> int:
    """Count the tensors of an averaged copy of the UNet."""
    return sum(name.startswith("model_ema.diffusion_model") for name in tensors.shapes)


def fitting_preset(tensors: Tensors, place: Place) -> UNetConfig:
    """The UNet of the preset that has the tensors behind a prefix under diffusers' names.

    Raises ValueError if none has.
    """
    shapes = Shapes(tensors, place.prefix)
    inputs = shapes.size("conv_in.weight", 1)
    names = {n for n in tensors.shapes if n.startswith(place.prefix)}
    for preset in PRESETS_OF.values():
        config = dataclasses.replace(preset.unet, in_channels=inputs)
        with torch.device("meta"):
            unet = UNet(config)
        stored = collect(unet, tables.diffusers_unet(config), place.prefix)
        if stored.keys() <= names and all(
            tensors.shapes[n][:2] == tuple(value.shape)[:2] for n, value in stored.items()
        ):
            return config
    raise ValueError(
        f"the unet in {tensors} has diffusers' names and the shapes of no preset: give the folder with its config.json"
    )
