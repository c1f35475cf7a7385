"""Calls of a network as CUDA graphs.

A call launches 700 (SD 1.5) to 1900 kernels (SDXL). For one picture, a fast GPU computes them faster than Python
launches them. A CUDA graph is a recorded list of launches that starts as a whole. It replays the same kernels on the
same memory, so each recording has its own input and output tensors.
"""

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ldm.conditioning import Condition


class Binds(Protocol):
    """A network with conditions, such as `ldm.models.unet.UNet`."""

    def bind(self, condition: Condition) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the function (z, timesteps) -> prediction of a condition."""


class Recorded:
    """A network whose calls on a CUDA device are recorded and replayed, with the same numbers.

    Weights, attention and hooks must stay as they are while a bound function is in use. Its memory is that of the
    activations of one call, and is freed with the function.
    """

    def __init__(self, network: Binds) -> None:
        self.network = network

    def bind(self, condition: Condition) -> "Replayed":
        """Return the function (z, timesteps) -> prediction of a condition."""
        return Replayed(self.network.bind(condition))


class Replayed:
    """The function (z, timesteps) -> prediction that `predict` is, recorded and replayed.

    The first call runs as it is, because libraries initialize themselves in it, which a recording forbids. The second
    call is recorded, and all later ones replay it. Another shape or dtype starts again. If recording fails, a warning
    says why, and all calls run as they are. So do calls whose z requires gradients, which a replay does not compute.
    """

    def __init__(self, predict: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.predict = predict
        self.kind: object = None  # the shape and dtype of the last call
        self.replay: Callable[[Tensor, Tensor], Tensor] | None = None

    def __call__(self, z: Tensor, timesteps: Tensor) -> Tensor:
        """Predict, from z: b c h w and timesteps: b."""
        if z.requires_grad and torch.is_grad_enabled():
            return self.predict(z, timesteps)
        if self.kind != (z.shape, z.dtype):
            self.kind, self.replay = (z.shape, z.dtype), None
            return self.predict(z, timesteps)
        if self.replay is None:
            try:
                self.replay = Recording(self.predict, z, timesteps)
            except RuntimeError as error:
                warnings.warn(f"the network runs without a CUDA graph: {error}", stacklevel=2)
                self.replay = self.predict
        return self.replay(z, timesteps)


class Recording:
    """One call of `predict` on tensors of its own, to be replayed with other numbers in them."""

    @torch.no_grad()
    def __init__(self, predict: Callable[[Tensor, Tensor], Tensor], z: Tensor, timesteps: Tensor) -> None:
        self.z, self.timesteps = z.clone(), timesteps.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(z.device):
            stream = torch.cuda.Stream(z.device)  # type: ignore[no-untyped-call]
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.out = predict(self.z, self.timesteps)

    @torch.no_grad()
    def __call__(self, z: Tensor, timesteps: Tensor) -> Tensor:
        """Copy the inputs in, replay, and copy the output out before the next replay overwrites it."""
        self.z.copy_(z)
        self.timesteps.copy_(timesteps)
        self.graph.replay()
        return self.out.clone()
