"""Encode and decode in bounded memory with the numbers of the whole network: slabs of rows stream through its layers.

What is kept of a picture on its way decides memory and time. Inside SD's decoder at 2048 x 2048 in fp16, which takes
6 GiB when each layer runs on the whole picture, it is

    channels, size    512, 1/8   512, 1/4   512, 1/2   256, 1/2   256, 1   128, 1
    MiB                     64        256       1024        512     2048     1024

so below 1 GiB nothing of full size can be kept, not even once. Nothing but a normalisation and the attention needs the
whole picture at once, to be measured; for each of them the layers before it run once more, from what was kept last. The
last level then runs eight times from the 256 channels of half its size: seven normalisations, and the result.

The plan for any budget: a segment (a block, or the step between levels) that fits it with its whole picture computes
nothing twice. Otherwise slabs stream, five of which fill a quarter of the budget: a layer's input, twice, its output,
a branch and one more. What comes out is kept if it takes at most the other three quarters, its rows coming in while
those before are freed; else the next segment continues the stream.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.models.layers import ResBlock
from ldm.models.vae import VAE, Decoder, Encoder, Gaussian, Level, Middle
from ldm.placement.stages import DOUBLE, SILU, Attention, Conv, Fork, Halve, Join, Norm, Stage


@torch.no_grad()
def decode_slabs(vae: VAE, latents: Tensor, *, budget: int | None = None) -> Tensor:
    """Do what `vae.decode` does, a picture at a time, in at most `budget` bytes beside weights, latents and images.

    latents: b c h w, scaled. Returns images: b 3 h*f w*f, without gradients. They differ from those of `vae.decode` by
    roundings only, because sums run in another order. The smaller the budget, the longer it takes; below what the
    attention needs, about six times its input, less budget saves no memory. Raises ValueError for a budget below 1.
    """
    pixels = latents[0, 0].numel() * vae.config.factor**2
    budget = slab_budget(pixels, latents.dtype) if budget is None else budget
    latents = vae.post_quant_conv(latents / vae.config.scaling_factor)
    segments = partial(_decoder, vae.decoder, vae.config.factor, budget)
    return torch.cat([_run([*segments()], latent, pixels, budget) for latent in latents[:, None]])


@torch.no_grad()
def encode_slabs(vae: VAE, images: Tensor, *, budget: int | None = None) -> Gaussian:
    """Do what `vae.encode` does, a picture at a time, in at most `budget` bytes beside weights, images and latents.

    images: b 3 h w in [-1, 1]. Returns the distribution of scaled latents: b c h/f w/f; exactness, limits and errors as
    of `decode_slabs`, and ValueError if h or w is not a multiple of f.
    """
    vae.check_size(images)
    pixels = images[0, 0].numel()
    budget = slab_budget(pixels, images.dtype) if budget is None else budget
    segments = partial(_encoder, vae.encoder, vae.config.factor, budget)
    moments = [_run([*segments()], image, pixels, budget) for image in images[:, None]]
    return vae.gaussian(torch.cat(moments))


def slab_budget(pixels: int, dtype: torch.dtype) -> int:
    """Return the default budget for an image of `pixels`, in bytes.

    It is a quarter of what the whole image takes, but at least 384 MiB and at most 1 GiB.
    """
    whole = 768 * dtype.itemsize * pixels  # SD's decoder holds 256 channels of full size three times
    return min(max(whole // 4, 384 * 2**20), 2**30)


class Segment(NamedTuple):
    """Stages after which the picture may be kept: it has `channels` and is `factor` times smaller than the image."""

    stages: list[Stage]
    channels: int
    factor: int


def _encoder(encoder: Encoder, factor: int, budget: int) -> Iterator[Segment]:
    yield Segment([Conv(encoder.conv_in)], encoder.conv_in.out_channels, 1)
    yield from _levels(encoder.levels, 1)
    yield from _middle(encoder.mid, factor, budget)
    end = [Norm(encoder.norm_out), SILU, Conv(encoder.conv_out)]
    yield Segment(end, encoder.conv_out.out_channels, factor)


def _decoder(decoder: Decoder, factor: int, budget: int) -> Iterator[Segment]:
    yield Segment([Conv(decoder.conv_in)], decoder.conv_in.out_channels, factor)
    yield from _middle(decoder.mid, factor, budget)
    yield from _levels(decoder.levels, factor)
    end = [Norm(decoder.norm_out), SILU, Conv(decoder.conv_out)]
    yield Segment(end, decoder.conv_out.out_channels, 1)


def _levels(levels: nn.ModuleList, factor: int) -> Iterator[Segment]:
    for level in levels:
        assert isinstance(level, Level)
        yield from (_block(block, factor) for block in level.blocks)
        if level.downsample is not None:
            factor *= 2
            yield Segment([Halve(level.downsample)], level.downsample.out_channels, factor)
        if level.upsample is not None:
            factor //= 2
            yield Segment([DOUBLE, Conv(level.upsample)], level.upsample.out_channels, factor)


def _middle(mid: Middle, factor: int, budget: int) -> Iterator[Segment]:
    yield _block(mid.res_in, factor)
    fork, attn = Fork(), mid.attn
    stages = [fork, Norm(attn.norm), Attention(attn, budget), Join(fork, nn.Identity())]
    yield Segment(stages, attn.norm.num_channels, factor)
    yield _block(mid.res_out, factor)


def _block(block: nn.Module, factor: int) -> Segment:
    assert isinstance(block, ResBlock)
    fork = Fork()
    first = [fork, Norm(block.norm1), SILU, Conv(block.conv1)]
    second = [Norm(block.norm2), SILU, Conv(block.conv2), Join(fork, block.skip)]
    return Segment([*first, *second], block.conv2.out_channels, factor)


def _through(stages: list[Stage], slab: Tensor) -> Iterator[Tensor]:
    for stage in stages:
        slab = stage(slab)
        if not slab.shape[2]:
            return
    yield slab


class Stream:
    """A picture inside the network: rows that are kept, 1 c 1 w each, and stages that have yet to run on them.

    It is read in `count` slabs, or more.
    """

    def __init__(self, x: Tensor, count: int) -> None:
        self.rows, self.count = list(torch.split(x, 1, dim=2)), count
        self.stages: list[Stage] = []

    def slabs(self, *, free: bool = False) -> Iterator[Tensor]:
        """Run the stages over all rows; free: forget each row once it is read."""
        for stage in self.stages:
            stage.tail = None
        rows = self.rows if free else list(self.rows)
        height = max(1, len(rows) // self.count)
        while rows:
            slab = torch.cat(rows[:height], dim=2)
            del rows[:height]
            yield from _through(self.stages, slab)
        for i, stage in enumerate(self.stages):
            rest = stage.end()
            if rest is not None:
                yield from _through(self.stages[i + 1 :], rest)

    def add(self, stage: Stage) -> None:
        """Append a stage, measured if it has to be."""
        if isinstance(stage, Norm | Attention):
            stage.measure(self.slabs())
        self.stages.append(stage)

    def keep(self) -> None:
        """Run the stages and keep the result instead of what they began with."""
        self.rows = [row for slab in self.slabs(free=True) for row in torch.split(slab, 1, dim=2)]
        self.stages = []

    def run_whole(self, stages: list[Stage]) -> None:
        """Run `stages` on all rows at once and keep the result; no stage may be left to run before."""
        x = torch.cat(self.rows, dim=2)
        self.rows = []
        height = math.ceil(x.shape[2] / self.count)
        for stage in stages:
            stage.tail = None
            if isinstance(stage, Norm | Attention):
                stage.measure(torch.split(x, height, dim=2))
            x = stage.whole(x)
        parts = torch.split(x, math.ceil(x.shape[2] / self.count), dim=2)
        self.rows = [row for part in parts for row in torch.split(part.clone(), 1, dim=2)]


def _run(segments: list[Segment], x: Tensor, pixels: int, budget: int) -> Tensor:
    """Run a network on x: 1 c h w, for an image of `pixels`. Uses up `segments`, to free what their stages hold."""
    if budget < 1:
        raise ValueError(f"the budget of the slabs must be at least 1 byte, got {budget}")
    sizes = [pixels // s.factor**2 * s.channels * x.element_size() for s in segments]
    stream = Stream(x, count=math.ceil(20 * max(sizes) / budget))
    for before, size in zip([x.nbytes, *sizes], sizes, strict=False):
        stages = segments.pop(0).stages
        if not stream.stages and 3 * max(before, size) <= budget * 0.95:  # and a slab to measure
            stream.run_whole(stages)
            continue
        for stage in stages:
            stream.add(stage)
        if size <= budget * 0.75:
            stream.keep()
    return torch.cat([*stream.slabs(free=True)], dim=2)
