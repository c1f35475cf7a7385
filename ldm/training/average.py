"""The exponential moving average of the parameters that are trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The average of the trainable parameters of a network, by name. Frozen parameters have no second copy."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Begin with the parameters as they are. decay 0: there is no average, and no memory is used."""
        self.decay = decay
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad and decay}
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    def update(self, step: int) -> None:
        """Move the average towards the parameters after `step`. Young averages move faster."""
        if self.values:
            decay = min(self.decay, (1 + step) / (10 + step))
            ours, theirs = zip(*self._pairs(), strict=True)
            torch._foreach_lerp_(ours, theirs, 1 - decay)

    def swap(self) -> None:
        """Exchange the values of the parameters with those of the average."""
        for ours, theirs in self._pairs():
            kept = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(kept)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return each averaged tensor with its parameter; of those that are split among processes, the own part."""
        pairs = zip(self.values.values(), self.parameters.values(), strict=True)
        return [(_local(ours), _local(theirs)) for ours, theirs in pairs]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the network the averaged parameters within the block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


def _local(tensor: Tensor) -> Tensor:
    found: Tensor = tensor.detach()
    return found.to_local() if hasattr(found, "to_local") else found
