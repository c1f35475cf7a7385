"""How much memory pictures need, counted before the run, and the ways to need less.

`need` runs the networks on the meta device, where a tensor has a size but no memory. `fit` tries the ways in the order
of `WAYS`, each of which costs more time than the one before, until the pictures fit.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import ModelConfig
from ldm.models.attention import set_attention, sliced_attention
from ldm.models.text import TextTower
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.placement.live_bytes import LiveBytes
from ldm.placement.memory import Placement

KERNELS = 64 << 20  # bytes that kernels allocate inside themselves
SPARE = 0.9  # share of the free memory to use


@dataclass(frozen=True)
class Work:
    """The pictures of a run: how many at once, their size in pixels, and whether the UNet sees two prompts for each."""

    images: int
    height: int
    width: int
    guided: bool = True


@dataclass(frozen=True)
class Need:
    """Bytes on the device at the peak of each part, the weights that are there included."""

    text: int
    step: int
    decode: int

    @property
    def peak(self) -> int:
        """The most of all parts."""
        return max(self.text, self.step, self.decode)


@dataclass(frozen=True)
class Way:
    """A placement and a number of images at once. changes: what was chosen to need less memory, in words."""

    placement: Placement
    images: int
    changes: tuple[str, ...] = ()


def need(config: ModelConfig, placement: Placement, work: Work) -> Need:
    """Count the memory of `work` with a resolved placement. It takes some tenths of a second.

    Counted are the tensors, and an allowance for the kernels. Text encoders are counted by their weights alone.
    """
    dtypes = placement.dtype or torch.float32, placement.vae_dtype or torch.float32
    text, unet, vae = map(_bytes, _networks(config, *dtypes))
    side = work.height // config.vae.factor, work.width // config.vae.factor
    batch = work.images * (2 if work.guided and placement.guidance == "batched" else 1)
    fused = placement.attention in (None, "sdpa")
    step = _step(config, *dtypes, fused, placement.offload == "blocks", batch, side)
    decode = _decode(config, *dtypes, fused, placement.vae_memory, side)
    sampler = 4 * 4 * work.images * config.vae.latent_channels * side[0] * side[1]  # four tensors like x, in fp32
    here = [text + unet + vae] * 3  # weights on the device during each part
    if placement.offload:
        here = [text, 0 if placement.offload == "blocks" else unet, vae]
    return Need(here[0] + KERNELS, here[1] + step + sampler + KERNELS, here[2] + decode + sampler + KERNELS)


@cache
def _networks(config: ModelConfig, dtype: torch.dtype, vae_dtype: torch.dtype) -> tuple[nn.ModuleList, UNet, VAE]:
    """Make the text towers, the UNet and the VAE on the meta device."""
    with torch.device("meta"):
        towers = nn.ModuleList(TextTower(text, None) for text in config.text)  # type: ignore[arg-type]
        return towers.to(dtype=dtype), UNet(config.unet).to(dtype=dtype), VAE(config.vae).to(dtype=vae_dtype)


@cache
@torch.no_grad()
def _step(
    config: ModelConfig,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    fused: bool,
    streamed: bool,
    batch: int,
    side: tuple[int, int],
) -> int:
    """Count the bytes of a call of the UNet; if it is streamed, with the weights that are on the device."""
    _, unet, _ = _networks(config, dtype, vae_dtype)
    set_attention(unet, _fused if fused else sliced_attention)
    empty = partial(torch.empty, device="meta", dtype=dtype)
    latents, context = empty(batch, config.unet.in_channels, *side), empty(batch, 77, config.unet.context_dim)
    vector, number = empty(batch, config.unet.vector_dim or 0), empty(batch)
    guidance = number if config.unet.guidance_dim else None
    at_work: AbstractContextManager[object] = nullcontext()
    if streamed:
        from ldm.placement.offload import Streamed

        at_work = Streamed(unet, "meta")
    with LiveBytes() as live, at_work:
        unet(latents, number, context, vector, guidance=guidance)
    return live.peak


@cache
@torch.no_grad()
def _decode(
    config: ModelConfig, dtype: torch.dtype, vae_dtype: torch.dtype, fused: bool, vae_memory: Any, side: tuple[int, int]
) -> int:
    """Count the bytes of decoding one picture."""
    _, _, vae = _networks(config, dtype, vae_dtype)
    set_attention(vae, _fused if fused else sliced_attention)
    latents = torch.empty(1, config.vae.latent_channels, *side, device="meta", dtype=vae_dtype)
    with LiveBytes() as live:
        Placement(vae_memory=vae_memory).decoder()(vae, latents)
    return live.peak


def ways(placement: Placement, images: int) -> Iterator[Way]:
    """Yield the ways to make the same pictures with less and less memory. The first one changes nothing."""
    way = Way(placement, images)
    yield way
    if placement.guidance == "batched":
        way = _changed(way, "prompt and negative prompt one after the other", guidance="sequential")
        yield way
    before = way.changes
    while way.images > 1:
        images = -(-way.images // 2)
        way = Way(way.placement, images, (*before, f"{images} picture{'s' * (images > 1)} at once"))
        yield way
    if placement.vae_memory == "whole":
        way = _changed(way, "the VAE in slabs", vae_memory="slabs")
        yield way
    if torch.device(placement.device or "cpu").type == "cuda" and not placement.cuda_graph:
        if placement.offload is None:
            way = _changed(way, "one network on the GPU at a time", offload="model")
            yield way
        if placement.offload != "blocks":
            yield _changed(way, "two stages of the UNet on the GPU at a time", offload="blocks")


def _changed(way: Way, words: str, **fields: Any) -> Way:
    return Way(dataclasses.replace(way.placement, **fields), way.images, (*way.changes, words))


def fit(config: ModelConfig, placement: Placement, work: Work, free: int) -> tuple[Way, Need]:
    """Return the first of `ways` that needs at most SPARE of `free` bytes, or the last one, and its need."""
    for way in ways(placement, work.images):
        found = need(config, way.placement, dataclasses.replace(work, images=way.images))
        if found.peak <= SPARE * free:
            break
    return way, found


def memory_bytes(device: torch.device) -> tuple[int, int] | None:
    """Return the free and the whole memory of a GPU, or of the host for programs; None if they are not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    listing = Path("/proc/meminfo")
    if not listing.is_file():
        return None
    rows = dict(line.split(":") for line in listing.read_text(encoding="utf-8").splitlines())
    free, whole = (1024 * int(rows[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    return free, whole


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a GPU, or the memory of the host that programs can get; None if it is not known."""
    found = memory_bytes(device)
    return found[0] if found else None


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Hold what a fused attention kernel holds beside its inputs: the output."""
    return torch.empty_like(q)


def _bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
