"""The random numbers of a batch that several processes share: they do not depend on the number of processes.

All processes have the same seed. Each one draws the numbers of the whole batch and keeps those of its own examples.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

P = ParamSpec("P")
SIZED = {torch.rand: 0, torch.randn: 0, torch.randint: -1}  # where the size is among the arguments; 0: all of them
LIKE = {torch.rand_like, torch.randn_like, torch.randint_like}


class SharedDraws(TorchFunctionMode):
    """Within the block, random tensors whose first size is `count` are parts of those of the whole batch.

    These functions are covered: torch.rand, randn and randint, their forms that end in _like, multinomial and dropout.
    A call with a generator of its own is left alone.
    """

    active: ClassVar["SharedDraws | None"] = None

    def __init__(self, count: int, rank: int, ranks: int) -> None:
        """count: examples of this process, which has part number `rank` of the `ranks` equal parts of the batch."""
        super().__init__()
        self.count, self.ranks = count, ranks
        self.own = slice(rank * count, (rank + 1) * count)

    def __enter__(self) -> "SharedDraws":
        SharedDraws.active = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *reason: Any) -> None:
        SharedDraws.active = None
        super().__exit__(*reason)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if func in SIZED:
            return self._sized(func, args, kwargs)
        if func in LIKE and self._is_own(args[0].shape):
            return func(self._whole(args[0]), *args[1:], **kwargs)[self.own]
        if func is torch.multinomial and args[0].ndim == 1 and args[1] == self.count:
            return func(args[0], self.ranks * self.count, *args[2:], **kwargs)[self.own]
        if func is F.dropout and self._is_own(args[0].shape):
            return self._dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _sized(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        if "size" in kwargs:
            before, size = args, kwargs.pop("size")
        elif SIZED[func] == 0:
            before, size = (), args[0] if len(args) == 1 and not isinstance(args[0], int) else args
        else:
            *before, size = args
        if not self._is_own(size):
            return func(*before, size=size, **kwargs)
        return func(*before, size=(self.ranks * self.count, *size[1:]), **kwargs)[self.own]

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training:
            return x
        kept = torch.empty_like(self._whole(x)).bernoulli_(1 - p).div_(1 - p)[self.own]
        return x.mul_(kept) if inplace else x * kept

    def _is_own(self, size: Any) -> bool:
        return len(size) > 0 and size[0] == self.count

    def _whole(self, x: Tensor) -> Tensor:
        """Return a tensor of the whole batch with the type and the memory layout of x, the part of this process."""
        return torch.cat([x.detach()] * self.ranks)


def for_the_whole_batch(draw: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorate a function (count, ...) -> random tensor of `count` values that depend on each other or on the count."""

    @wraps(draw)
    def part(*args: Any, **kwargs: Any) -> Tensor:
        shared, (count, *others) = SharedDraws.active, args
        if shared is None or count != shared.count:
            return draw(*args, **kwargs)
        return draw(shared.ranks * count, *others, **kwargs)[shared.own]

    return part
