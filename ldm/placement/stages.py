"""Layers that take a picture slab by slab: 1 c h w, from top to bottom, and return the rows that each slab completes.

A convolution keeps two rows of its input for the next slab, so that no halo is computed twice. Two kinds of layers must
be shown the whole picture before they return anything: `Norm` measures its statistics, `Attention` its keys and values.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.vae import PixelAttention


class Stage:
    """A layer that takes a picture slab by slab: 1 c h w. tail: rows of its input that the next slab needs again."""

    tail: Tensor | None = None

    def __call__(self, slab: Tensor) -> Tensor:
        """Return the rows that `slab` completes, none perhaps."""
        raise NotImplementedError

    def end(self) -> Tensor | None:
        """Return the rows that the end of the picture completes."""
        return None

    def whole(self, x: Tensor) -> Tensor:
        """Do all at once, for x: the whole picture."""
        return self(x)

    def joined(self, slab: Tensor) -> Tensor:
        """Return the tail and the slab as one."""
        return slab if self.tail is None else torch.cat([self.tail, slab], dim=2)


class Each(Stage):
    """A function that works on any rows alone."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, slab: Tensor) -> Tensor:
        """Return the function of the slab."""
        return self.function(slab)


SILU = Each(partial(F.silu, inplace=True))
DOUBLE = Each(partial(F.interpolate, scale_factor=2, mode="nearest"))


class Conv(Stage):
    """A 3x3 convolution, whose padding is right for the picture's edges only: rows by other edges are cut off."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer = layer

    def __call__(self, slab: Tensor) -> Tensor:
        """Return the rows below which there is one more."""
        x = self.joined(slab)
        done = 0 if self.tail is None else self.tail.shape[2] - 1  # rows of x returned before
        self.tail = x[:, :, -2:].clone()
        return self.whole(x)[:, :, done:-1]

    def end(self) -> Tensor:
        """Return the last row."""
        assert self.tail is not None
        return self.whole(self.tail)[:, :, -1:]

    def whole(self, x: Tensor) -> Tensor:
        """Run the layer."""
        out: Tensor = self.layer(x)
        return out


class Halve(Stage):
    """A 3x3 convolution of stride 2, padded right and bottom only, as in `Level`."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer = layer

    def __call__(self, slab: Tensor) -> Tensor:
        """Return a row for every two below which there is one more."""
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
        out: Tensor = self.layer(F.pad(x, (0, 1, 0, 1)))
        return out


class Norm(Stage):
    """A group normalisation with the statistics of the whole picture."""

    def __init__(self, layer: nn.GroupNorm) -> None:
        self.layer = layer

    def measure(self, slabs: Iterable[Tensor]) -> None:
        """Take the mean and variance of each group from those of its channels in every slab (Chan et al. 1979)."""
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
        """Normalise each channel."""
        weight, bias = self.layer.weight.to(self.mean), self.layer.bias.to(self.mean)
        # With statistics given this is a batch normalisation, which computes in their dtype and rounds once.
        return F.batch_norm(slab, self.mean, self.var, weight, bias, eps=self.layer.eps)


class Attention(Stage):
    """`PixelAttention` without its norm and its sum: the pixels of a slab attend to all of the picture."""

    def __init__(self, layer: PixelAttention, budget: int) -> None:
        self.layer, self.budget = layer, budget

    def measure(self, slabs: Iterable[Tensor]) -> None:
        """Take the keys and values of all slabs."""
        pixels = [rearrange(slab, "b c h w -> b 1 (h w) c") for slab in slabs]
        self.k = torch.cat([self.layer.to_k(part) for part in pixels], dim=2)
        self.v = torch.cat([self.layer.to_v(part) for part in pixels], dim=2)

    def __call__(self, slab: Tensor) -> Tensor:
        """Attend to all, a part of the queries at a time."""
        q = self.layer.to_q(rearrange(slab, "b c h w -> b 1 (h w) c"))
        rows = max(1, self.budget // (48 * self.k.shape[2]))  # at 12 bytes a score a quarter of it
        parts = torch.split(q, rows, dim=2)
        h = torch.cat([self.layer.attend(part, self.k, self.v) for part in parts], dim=2)
        out: Tensor = rearrange(self.layer.to_out(h), "b 1 (h w) c -> b c h w", h=slab.shape[2])
        return out


class Fork(Stage):
    """Where a residual branch begins: remembers the rows that its end has not added yet."""

    def __call__(self, slab: Tensor) -> Tensor:
        """Return the slab as it is."""
        if self.tail is not None:
            self.tail = self.tail[:, :, -2:]  # more if the branch is still being measured
        self.tail = self.joined(slab)
        return slab


class Join(Stage):
    """Where a residual branch ends: adds the (projected) rows that went into its fork."""

    def __init__(self, fork: Fork, skip: nn.Module) -> None:
        self.fork, self.skip = fork, skip

    def __call__(self, slab: Tensor) -> Tensor:
        """Add as many rows as the slab has."""
        assert self.fork.tail is not None
        x, rest = self.fork.tail.tensor_split([slab.shape[2]], dim=2)
        self.fork.tail = rest.clone() if rest.shape[2] else None
        return slab.add_(self.skip(x))
