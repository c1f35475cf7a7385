"""Encode and decode a picture exactly in a given amount of memory: slabs of rows pass through the layers of the VAE.

When each layer runs on the whole picture, SD's decoder takes 6 GiB for 2048 x 2048 pixels in fp16. Its feature maps are

    channels, size    512, 1/8   512, 1/4   512, 1/2   256, 1/2   256, 1   128, 1
    MiB                     64        256       1024        512     2048     1024

With less than 1 GiB, no feature map of full size can be stored. A convolution does not need one: it computes each slab
of rows from the rows around it. A group normalization and the attention first need the whole picture, to measure
statistics, or keys and values. For each of them, the layers before it run an additional time, from the feature map that
was stored last. So the last level of the decoder runs eight times, from 256 channels at half the size: for seven
normalizations, and for the result.

The network is cut into segments: its blocks, and the layers between two levels. For each segment, the budget decides:
- If the feature maps before and after the segment fit, the segment runs on the whole picture and computes nothing
  twice.
- Otherwise the segment takes slabs. Five slabs fill a quarter of the budget: the input of a layer, a copy of the input,
  the output, a residual branch, and one in reserve. If the output of the segment fits the other three quarters, it is
  stored, and the rows before the segment are freed one by one. Otherwise the next segment continues with the slabs.
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
    """Compute `vae.decode(latents)` one picture at a time, in at most `budget` bytes.

    latents: b c h w, scaled. budget: beside weights, latents and images (default: `slab_budget`). A smaller budget
    takes longer. The attention needs about six times its input, whatever the budget is.
    Returns images: b 3 h*f w*f, without gradients. They differ from those of `vae.decode` by rounding only, because
    sums have another order. Raises ValueError for a budget below 1.
    """
    pixels = latents[0, 0].numel() * vae.config.factor**2
    budget = slab_budget(pixels, latents.dtype) if budget is None else budget
    latents = vae.post_quant_conv(latents / vae.config.scaling_factor)
    segments = partial(_decoder, vae.decoder, vae.config.factor, budget)
    return torch.cat([_run([*segments()], latent, pixels, budget) for latent in latents[:, None]])


@torch.no_grad()
def encode_slabs(vae: VAE, images: Tensor, *, budget: int | None = None) -> Gaussian:
    """Compute `vae.encode(images)` one picture at a time, in at most `budget` bytes.

    images: b 3 h w in [-1, 1]. budget: as for `decode_slabs`. Returns the distribution of scaled latents: b c h/f w/f,
    without gradients, equal to that of `vae.encode` except for rounding.
    Raises ValueError for a budget below 1, and if h or w is not a multiple of f.
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
    """Stages after which the feature map can be stored.

    It then has `channels`, and each side is `factor` times smaller than that of the image.
    """

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
    """A feature map of one picture: its stored rows, 1 c 1 w each, and the stages that still have to run on them.

    count: the least number of slabs that the rows are read in.
    """

    def __init__(self, x: Tensor, count: int) -> None:
        self.rows, self.count = list(torch.split(x, 1, dim=2)), count
        self.stages: list[Stage] = []

    def slabs(self, *, free: bool = False) -> Iterator[Tensor]:
        """Run the stages and yield the resulting slabs from top to bottom; free: delete each row once it is read."""
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
        """Append a stage. If it has to measure the whole picture, run the stages before it once for that."""
        if isinstance(stage, Norm | Attention):
            stage.measure(self.slabs())
        self.stages.append(stage)

    def keep(self) -> None:
        """Run the stages and store the result in place of the rows."""
        self.rows = [row for slab in self.slabs(free=True) for row in torch.split(slab, 1, dim=2)]
        self.stages = []

    def run_whole(self, stages: list[Stage]) -> None:
        """Run `stages` on all rows at once and store the result. No other stage may be waiting."""
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
    """Run a network on x: 1 c h w, for an image of `pixels`. Empties `segments`, which frees the memory of stages."""
    if budget < 1:
        raise ValueError(f"the budget of the slabs must be at least 1 byte, got {budget}")
    sizes = [pixels // s.factor**2 * s.channels * x.element_size() for s in segments]
    stream = Stream(x, count=math.ceil(20 * max(sizes) / budget))
    for before, size in zip([x.nbytes, *sizes], sizes, strict=False):
        stages = segments.pop(0).stages
        if not stream.stages and 3 * max(before, size) <= budget * 0.95:  # the rest is for a slab that is measured
            stream.run_whole(stages)
            continue
        for stage in stages:
            stream.add(stage)
        if size <= budget * 0.75:
            stream.keep()
    return torch.cat([*stream.slabs(free=True)], dim=2)
