"""Layers that compute on slabs of a picture: 1 c h w, from top to bottom.

For each slab, a layer returns the rows that it can compute now. A convolution stores two rows of its input for the next
slab, so that no row is computed twice. Two layers must see all slabs before they can return rows: `Norm` measures its
mean and variance, `Attention` its keys and values.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.vae import PixelAttention


class Stage:
    """A layer that computes on slabs: 1 c h w. tail: the rows of its input that the next slab needs again."""

    tail: Tensor | None = None

    def __call__(self, slab: Tensor) -> Tensor:
        """Return the rows that can be computed with `slab`: fewer rows, or none."""
        raise NotImplementedError

    def end(self) -> Tensor | None:
        """Return the rows that are left at the end of the picture, or None."""
        return None

    def whole(self, x: Tensor) -> Tensor:
        """Compute the layer on x: 1 c h w, the whole picture."""
        return self(x)

    def joined(self, slab: Tensor) -> Tensor:
        """Concatenate the tail and the slab."""
        return slab if self.tail is None else torch.cat([self.tail, slab], dim=2)


class Each(Stage):
    """A function that computes each row, or each pixel, from itself."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, slab: Tensor) -> Tensor:
        """Apply the function."""
        return self.function(slab)


SILU = Each(partial(F.silu, inplace=True))
DOUBLE = Each(partial(F.interpolate, scale_factor=2, mode="nearest"))


class Conv(Stage):
    """A 3x3 convolution. Its padding is right at the edges of the picture; rows at other edges of slabs are cut off."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer = layer

    def __call__(self, slab: Tensor) -> Tensor:
        """Return all rows whose next row is known."""
        x = self.joined(slab)
        done = 0 if self.tail is None else self.tail.shape[2] - 1  # rows of x that were returned before
        self.tail = x[:, :, -2:].clone()
        return self.whole(x)[:, :, done:-1]

    def end(self) -> Tensor:
        """Return the last row."""
        assert self.tail is not None
        return self.whole(self.tail)[:, :, -1:]

    def whole(self, x: Tensor) -> Tensor:
        """Run the layer."""
        return self.layer(x)


class Halve(Stage):
    """A 3x3 convolution of stride 2, padded at the right and the bottom only, as in `Level`."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer = layer

    def __call__(self, slab: Tensor) -> Tensor:
        """Return one row for each two rows whose next row is known."""
        x = self.joined(slab)
        rows = (x.shape[2] - 1) // 2
        self.tail = x[:, :, 2 * rows :].clone()
        return self.whole(x)[:, :, :rows] if rows else x[:, :, :0]

    def end(self) -> Tensor:
        """Return the last row."""
        assert self.tail is not None
        return self.whole(self.tail)

    def whole(self, x: Tensor) -> Tensor:
        """Pad and run the layer."""
        return self.layer(F.pad(x, (0, 1, 0, 1)))


class Norm(Stage):
    """A group normalization with the statistics of the whole picture."""

    def __init__(self, layer: nn.GroupNorm) -> None:
        self.layer = layer

    def measure(self, slabs: Iterable[Tensor]) -> None:
        """Compute the mean and variance of each group from those of its channels in each slab (Chan et al. 1979)."""
        heights, means, variances = [], [], []
        for slab in slabs:
            dtype = torch.promote_types(slab.dtype, torch.float32)
            mean = slab.mean((0, 2, 3), dtype=dtype)
            heights.append(slab.shape[2])
            means.append(mean)
            variances.append((slab - mean[:, None, None]).square_().mean((0, 2, 3)))
            del slab  # before the next one is computed
        share = mean.new_tensor(heights)[:, None, None] / sum(heights)  # k 1 1
        g = self.layer.num_groups
        m, v = (rearrange(s, "k (g c) -> k g c", g=g) for s in (means, variances))
        mean = (share * m).sum(0).mean(1, keepdim=True)  # g 1
        var = (share * (v + (m - mean).square())).sum(0).mean(1, keepdim=True)
        self.mean, self.var = (s.expand(m.shape[1:]).flatten() for s in (mean, var))

    def __call__(self, slab: Tensor) -> Tensor:
        """Normalize each channel."""
        weight, bias = self.layer.weight.to(self.mean), self.layer.bias.to(self.mean)
        # With given statistics this is a batch normalization, which computes in their dtype and rounds once.
        return F.batch_norm(slab, self.mean, self.var, weight, bias, eps=self.layer.eps)


class Attention(Stage):
    """`PixelAttention` without its normalization and residual sum. The pixels of a slab attend to the whole picture."""

    def __init__(self, layer: PixelAttention, budget: int) -> None:
        self.layer, self.budget = layer, budget

    def measure(self, slabs: Iterable[Tensor]) -> None:
        """Compute the keys and values of all slabs."""
        pixels = [rearrange(slab, "b c h w -> b 1 (h w) c") for slab in slabs]
        self.k = torch.cat([self.layer.to_k(part) for part in pixels], dim=2)
        self.v = torch.cat([self.layer.to_v(part) for part in pixels], dim=2)

    def __call__(self, slab: Tensor) -> Tensor:
        """Attend to all pixels, with a part of the queries at a time."""
        q = self.layer.to_q(rearrange(slab, "b c h w -> b 1 (h w) c"))
        rows = max(1, self.budget // (48 * self.k.shape[2]))  # at 12 bytes per score, a quarter of the budget
        parts = torch.split(q, rows, dim=2)
        h = torch.cat([self.layer.attend(part, self.k, self.v) for part in parts], dim=2)
        return rearrange(self.layer.to_out(h), "b 1 (h w) c -> b c h w", h=slab.shape[2])


class Fork(Stage):
    """The start of a residual block: stores the rows that `Join` has not added yet."""

    def __call__(self, slab: Tensor) -> Tensor:
        """Return the slab unchanged."""
        if self.tail is not None:
            self.tail = self.tail[:, :, -2:]  # there are more rows while a stage of the block is measured
        self.tail = self.joined(slab)
        return slab


class Join(Stage):
    """The end of a residual block: adds the (projected) rows that its fork has stored."""

    def __init__(self, fork: Fork, skip: nn.Module) -> None:
        self.fork, self.skip = fork, skip

    def __call__(self, slab: Tensor) -> Tensor:
        """Add the next rows, as many as the slab has."""
        assert self.fork.tail is not None
        x, rest = self.fork.tail.tensor_split([slab.shape[2]], dim=2)
        self.fork.tail = rest.clone() if rest.shape[2] else None
        return slab.add_(self.skip(x))
