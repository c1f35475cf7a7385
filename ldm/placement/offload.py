"""Networks whose weights wait in host memory and are on the device only while they work.

`Moved` copies a whole network to the device, `Streamed` copies one stage after the other. Inside a `with` block the
network is used as usual and computes the same numbers. At the end of the block, also after an error, each parameter
points to its old host memory again. Weights do not change inside the block, so nothing is copied back.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn

from ldm.models.transformer import TransformerBlock


class Offloaded:
    """A context manager that copies `network` to `device`.

    Several users, such as two pictures that are sampled in turns, may be inside one object and leave in any order. The
    first user copies the network to the device, and the last user returns it to host memory.
    """

    def __init__(self, network: nn.Module, device: torch.device | str) -> None:
        self.network, self.device = network, torch.device(device)
        self.users, self.home = 0, ExitStack()

    def __enter__(self) -> Self:
        if self.users == 0:
            with ExitStack() as undo:  # if `bring` fails, the part that was copied returns to host memory
                self.bring(undo)
                self.home = undo.pop_all()
        self.users += 1
        return self

    def __exit__(self, *error: object) -> None:
        self.users -= 1
        if self.users == 0:
            self.home.close()

    def bring(self, undo: ExitStack) -> None:
        """Copy weights to the device, and register in `undo` the functions that return them to host memory."""
        raise NotImplementedError


class Moved(Offloaded):
    """Inside `with`, all weights of the network are on the device."""

    def bring(self, undo: ExitStack) -> None:
        """Copy all weights."""
        move(tensors_of(self.network), self.device, undo.callback)


class Streamed(Offloaded):
    """Inside `with`, at most two stages of a UNet or a ControlNet are on the device.

    `network.stages()` lists the stages. While one stage computes, the next stage is copied. The few layers outside of
    the stages stay on the device. On CUDA a second stream copies from page-locked memory (see `pin`) while the first
    stream computes. Three rules keep the two streams in order:
    - A stage computes after its copy: the computing stream waits for the copying stream.
    - A copy overwrites nothing that is still read. Its memory belongs to the copying stream and comes from an earlier
      stage, whose computation is queued. The copying stream waits for that computation.
    - That wait is queued before the computation of the current stage, so that both streams can work at a time.
    """

    def __init__(self, network: Any, device: torch.device | str) -> None:
        super().__init__(network, device)
        self.stages: list[nn.Module] = network.stages()
        self.copying: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self.copying = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.here: dict[int, Callable[[], None]] = {}  # index of a stage on the device -> function that returns it
        self.turn = -1  # the stage that was called last

    def bring(self, undo: ExitStack) -> None:
        """Copy the first stage and the layers outside of stages. Then the call of each stage copies the next stage."""
        if self.copying is not None:  # other streams cannot use the memory that the copying stream has freed
            undo.callback(torch.cuda.empty_cache)
        in_stages = {id(tensor) for stage in self.stages for tensor in tensors_of(stage)}
        move((t for t in tensors_of(self.network) if id(t) not in in_stages), self.device, undo.callback)
        undo.callback(self._send_home_all_but, set())
        self.turn = -1
        self._bring_stage(0)
        for i, stage in enumerate(self.stages):
            begin = partial(self._begin_turn, i)
            for part in (stage, *_projections(stage)):  # `UNet.bind` calls only the projections of a stage
                undo.enter_context(part.register_forward_pre_hook(begin))

    def _begin_turn(self, i: int, module: nn.Module, args: Any) -> None:
        """Before stage i computes, make sure that it is on the device, and start to copy the next stage."""
        if i == self.turn:
            return
        self.turn = i
        following = (i + 1) % len(self.stages)
        self._send_home_all_but({i, following})
        self._bring_stage(i)  # only needed if the stages are called in another order
        if self.copying is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copying)
        self._bring_stage(following)

    def _bring_stage(self, i: int) -> None:
        if i in self.here:
            return
        beside: AbstractContextManager[object] = nullcontext()
        if self.copying is not None:
            self.copying.wait_stream(torch.cuda.current_stream(self.device))
            beside = torch.cuda.stream(self.copying)
        with beside:
            move(tensors_of(self.stages[i]), self.device, partial(self.here.__setitem__, i))

    def _send_home_all_but(self, wanted: set[int]) -> None:
        for i in self.here.keys() - wanted:
            self.here[i]()
            del self.here[i]


def move(tensors: Iterable[Tensor], device: torch.device, keep: Callable[[Callable[[], None]], object]) -> None:
    """Let each tensor point to a copy on `device`. The current CUDA stream makes the copies.

    keep: is given the function that lets each tensor point to the old memory again. This happens before the first
      change, so that Ctrl-C at any time leaves nothing on the device.
    """
    moved = list(tensors)
    homes = [tensor.data for tensor in moved]
    keep(partial(_hold, moved, homes))
    copies = [torch.empty_like(home, device=device).copy_(home, non_blocking=True) for home in homes]
    _hold(moved, copies)


def _hold(tensors: list[Tensor], memory: list[Tensor]) -> None:
    for tensor, data in zip(tensors, memory, strict=True):
        tensor.data = data


def pin(network: nn.Module) -> None:
    """Move the weights of a network from CPU memory to page-locked memory, from which a GPU copies at full speed.

    PyTorch rounds the size of each tensor up to a power of two, which takes a fifth to a third more than the weights.
    """
    for tensor in tensors_of(network):
        tensor.data = tensor.data.pin_memory()


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module."""
    return [*chain(module.parameters(), module.buffers())]


def _projections(stage: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a stage that project the context to keys and values."""
    for block in stage.modules():
        if isinstance(block, TransformerBlock):
            yield from (block.attn2.to_k, block.attn2.to_v)
