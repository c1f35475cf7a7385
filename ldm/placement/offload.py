"""Networks whose weights wait in host memory and are on the device only while they work.

`Moved` brings a whole network, `Streamed` a UNet stage by stage. Inside a `with` block of either the network is used as
ever, and its numbers are the same. Afterwards, after an error too, each parameter holds the very memory that it held
before: weights do not change, so nothing is copied back. A block may be entered again inside itself, and left in any
order, as two pictures made in turns do: the network goes when the last one is left.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn

from ldm.models.transformer import TransformerBlock
from ldm.models.unet import UNet


class Shared:
    """A context manager that may be entered many times: the first entry begins, the last exit undoes."""

    def __init__(self) -> None:
        self._entries = 0
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        if self._entries == 0:
            with ExitStack() as undo:  # a beginning that fails is undone as far as it came
                self.begin(undo)
                self._undo = undo.pop_all()
        self._entries += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._entries -= 1
        if self._entries == 0:
            self._undo.close()

    def begin(self, undo: ExitStack) -> None:
        """Do what is to be done, and tell `undo` how it is undone."""
        raise NotImplementedError


class Moved(Shared):
    """Within `with`, these tensors hold copies on `device`: the current stream makes them, in its order."""

    def __init__(self, tensors: Iterable[Tensor], device: torch.device | str) -> None:
        super().__init__()
        self.tensors, self.device = list(tensors), device

    def begin(self, undo: ExitStack) -> None:
        """Copy all, then let each tensor hold its copy."""
        homes = [tensor.data for tensor in self.tensors]
        copies = [torch.empty_like(home, device=self.device).copy_(home, non_blocking=True) for home in homes]
        undo.callback(_hold, self.tensors, homes)
        _hold(self.tensors, copies)


class Streamed(Shared):
    """Within `with`, the stages of a UNet are on `device` in turns: while one computes, the next one is copied.

    At most two stages of `down`, `mid` and `up` are there at a time, with the few layers that belong to none. On CUDA a
    stream of its own makes the copies, from page-locked memory (see `pin`) beside the computation. Three orders matter:
    - a stage computes after its copy: the computing stream waits for the copying one;
    - a copy overwrites nothing that is still read: it goes into memory that belongs to the copying stream and was given
      up by an earlier stage, whose computation is queued by then, and the copying stream waits for the computing one;
    - that wait comes before the current stage is queued, so that the two do overlap.
    """

    def __init__(self, unet: UNet, device: torch.device | str) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.stages: list[nn.Module] = [*unet.down, unet.mid, *unet.up]
        self.parts = [Moved(tensors_of(stage), device) for stage in self.stages]
        streamed = {id(tensor) for part in self.parts for tensor in part.tensors}
        self.rest = Moved((t for t in tensors_of(unet) if id(t) not in streamed), device)
        self.copying: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self.copying = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.here: set[int] = set()  # stages that are on the device, by index
        self.turn = -1  # the stage that was called last

    def begin(self, undo: ExitStack) -> None:
        """Bring the rest and the first stage, and have each stage's turn begin when it is called."""
        if self.copying is not None:  # what a stream has given up, only that stream uses again
            undo.callback(torch.cuda.empty_cache)
        undo.enter_context(self.rest)
        undo.callback(self._leave_all_but, set())
        self.turn = -1
        self._bring(0)
        for i, stage in enumerate(self.stages):
            begin = partial(self._begin_turn, i)
            for part in (stage, *_projections(stage)):  # `UNet.prepare` calls only these
                undo.enter_context(part.register_forward_pre_hook(begin))

    def _begin_turn(self, i: int, module: nn.Module, args: Any) -> None:
        """Before stage i computes: make sure that it is there, and begin to bring the next one."""
        if i == self.turn:
            return
        self.turn = i
        following = (i + 1) % len(self.stages)
        self._leave_all_but({i, following})
        self._bring(i)  # it is there, unless a stage was left out
        if self.copying is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copying)
        self._bring(following)

    def _bring(self, i: int) -> None:
        if i in self.here:
            return
        beside: AbstractContextManager[object] = nullcontext()
        if self.copying is not None:
            self.copying.wait_stream(torch.cuda.current_stream(self.device))
            beside = torch.cuda.stream(self.copying)
        with beside:
            self.parts[i].__enter__()
        self.here.add(i)

    def _leave_all_but(self, wanted: set[int]) -> None:
        for i in self.here - wanted:
            self.parts[i].__exit__()
        self.here &= wanted


def pin(network: nn.Module) -> None:
    """Put the weights of a network on the CPU into page-locked memory, from which a GPU copies at its full speed.

    PyTorch rounds each tensor up to a power of two there: a fifth to a third more than the weights.
    """
    for tensor in tensors_of(network):
        tensor.data = tensor.data.pin_memory()


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module."""
    return [*chain(module.parameters(), module.buffers())]


def _projections(stage: nn.Module) -> Iterator[nn.Module]:
    """The layers that make keys and values of the text."""
    for block in stage.modules():
        if isinstance(block, TransformerBlock):
            yield from (block.attn2.to_k, block.attn2.to_v)


def _hold(tensors: list[Tensor], memory: list[Tensor]) -> None:
    for tensor, data in zip(tensors, memory, strict=True):
        tensor.data = data
