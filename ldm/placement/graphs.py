"""A UNet's calls as CUDA graphs.

A call launches 700 (SD 1.5) to 1900 kernels (SDXL), and at one picture a fast GPU is done with them before Python has
launched the next. A graph is the list of these launches, recorded once and started as a whole. It replays the same
kernels on the same addresses: so a recording has inputs and outputs of its own, and all that Python decided is fixed.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ldm.models.transformer import Context
from ldm.models.unet import UNet

SHAPES = 8  # recordings that are kept; more than one size and batch in turns are rare


class Graphs:
    """Call `unet` with its own arguments and numbers, without gradients; replay calls whose shapes were seen before.

    The first call of a shape runs as it is: libraries initialise themselves in it, which they must not while a graph is
    recorded. The second one is recorded. Where that fails, a warning says why, and the UNet is called as it is.

    Give it contexts made by `prepare`. That is also where recordings are forgotten if the weights have moved or the
    attention is another; a UNet with hooks, which a replay would pass over, is called as it is until they are gone.
    """

    def __init__(self, unet: UNet) -> None:
        self.unet = unet
        self._fixed: list[Any] = []
        self._calls: dict[Any, Callable[..., Tensor] | None] = {}  # by shapes; None: seen once

    def prepare(self, context: Tensor, vector: Tensor | None = None) -> tuple[Context, Tensor | None]:
        """Do what `UNet.prepare` does, and make sure that no recording is out of date."""
        fixed = list(_fixed(self.unet))
        if fixed != self._fixed:
            self._calls.clear()
            self._fixed = fixed
        return self.unet.prepare(context, vector)

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Tensor:
        """Predict, with the arguments of `UNet.forward` in order."""
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in _tensors(inputs))
        if None in self._fixed or shapes not in self._calls:
            while len(self._calls) >= SHAPES:
                del self._calls[next(iter(self._calls))]  # the oldest
            self._calls[shapes] = None
            out: Tensor = self.unet(*inputs)
            return out
        call = self._calls[shapes]
        if call is None:
            call = self._calls[shapes] = self._record(inputs)
        return call(*inputs)

    def _record(self, inputs: tuple[Any, ...]) -> Callable[..., Tensor]:
        others = [call.graph for call in self._calls.values() if isinstance(call, Recording)]
        try:
            # One after the other, recordings may use the same memory: each reads only what it has written.
            return Recording(self.unet, inputs, pool=others[0].pool() if others else None)
        except RuntimeError as error:
            warnings.warn(f"the UNet runs without a CUDA graph: {error}", stacklevel=2)
            return self.unet


class Recording:
    """One call of a UNet on tensors of its own, to be replayed with other numbers in them."""

    def __init__(self, unet: UNet, inputs: tuple[Any, ...], *, pool: Any) -> None:
        inputs = tree_map_only(Tensor, torch.clone, inputs)
        self.tensors = _tensors(inputs)
        self.graph = torch.cuda.CUDAGraph()
        device = self.tensors[0].device
        with torch.cuda.device(device):
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.out: Tensor = unet(*inputs)

    def __call__(self, *inputs: Any) -> Tensor:
        """Copy the inputs in, replay, and copy the output out, before the next replay overwrites it."""
        (own_x, own_timesteps, *own), (x, timesteps, *others) = self.tensors, _tensors(inputs)
        own_x.copy_(x)
        own_timesteps.copy_(timesteps)
        torch._foreach_copy_(own, others)  # keys and values of one dtype, in a few kernels
        self.graph.replay()
        return self.out.clone()


def _fixed(unet: UNet) -> Iterator[Any]:
    """What a recording fixes: where the weights are and which function attends; None stands for a hook."""
    for module in unet.modules():
        yield from (parameter.data_ptr() for parameter in module.parameters(recurse=False))
        yield getattr(module, "attend", 0)
        if module._forward_pre_hooks or module._forward_hooks:
            yield None


def _tensors(inputs: tuple[Any, ...]) -> list[Tensor]:
    """All tensors of a nest, in order."""
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
