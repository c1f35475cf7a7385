"""Latent consistency models: students of few steps, which learn the teacher's guidance, too (Luo et al. 2023)."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.parts import Model
from ldm.conditioning import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import factor
from ldm.training.adapters import Adapters
from ldm.training.consistency import ConsistencyObjective, Pairs, check_common


@dataclass(frozen=True)
class LCMLoss:
    """The settings of latent consistency distillation."""

    guidance: tuple[float, float] = (3.0, 15.0)  # the least and the largest guidance scale, w + 1 in the paper
    skip: int = 20  # timesteps between the two points; 20 gives the 50 timesteps of the spacing "lcm"
    huber_c: float = 0.001  # of the pseudo-Huber distance of each latent value; 0: the squared difference
    target_ema: float = 0.95  # decay of the target's average; 0: the target is the student

    def __post_init__(self) -> None:
        if len(self.guidance) != 2 or not 1 <= self.guidance[0] <= self.guidance[1]:
            raise ValueError(f"guidance must be the least and the largest scale, from 1, got {self.guidance}")
        if self.skip < 1:
            raise ValueError(f"skip must be at least 1 timestep, got {self.skip}")
        check_common(self.huber_c, self.target_ema)


class LCMObjective(ConsistencyObjective):
    """Distill a guided model into a student of few steps (Luo et al. 2023, algorithm 1).

    A student that takes the guidance scale as an input learns all scales of the range.
    """

    def __init__(
        self,
        model: Model,
        student: nn.Module,
        loss: LCMLoss,
        *,
        embedded: bool,
        accumulate: int = 1,
        sample_prompts: Sequence[str] = (),
    ) -> None:
        """Freeze all networks of `model`. embedded: whether the student takes the scale as an input.

        Raises ValueError for a `skip` that is not less than the number of timesteps.
        """
        super().__init__(
            model, student, target_ema=loss.target_ema, shown=4, accumulate=accumulate, sample_prompts=sample_prompts
        )
        if loss.skip >= len(self.schedule):
            raise ValueError(f"skip must be less than the {len(self.schedule)} timesteps, got {loss.skip}")
        self.loss, self.embedded = loss, embedded

    @property
    def shown_scale(self) -> float:
        """The model's own scale, or the nearest one of the range."""
        low, high = self.loss.guidance
        return min(max(self.config.guidance_scale, low), high)

    def scales(self, count: int) -> Tensor:
        """Draw scales evenly from the range."""
        low, high = self.loss.guidance
        return low + (high - low) * torch.rand(count)

    def given(
        self, captions: Sequence[str | None], scales: Tensor, size: Sequence[int], sizes: Tensor | None = None
    ) -> Condition:
        """Return the condition of the student, with w = scale - 1 if the student takes it as an input."""
        found = super().given(captions, scales, size, sizes)
        return dataclasses.replace(found, guidance=scales - 1) if self.embedded else found

    def pairs(self, count: int) -> Pairs:
        """Draw timesteps skip - 1, 2 skip - 1, ..., as the authors' code does. The low timestep is at least 0."""
        skip = self.loss.skip
        t = skip * torch.randint(1, len(self.schedule) // skip + 1, (count,)) - 1
        low = (t - skip).clamp(min=0)
        return Pairs(high=self.schedule.sigma(t), low=self.schedule.sigma(low), weight=torch.ones(count))

    def lower(self, x: Tensor, x0: Tensor, noise: Tensor, pairs: Pairs, teacher: Denoiser) -> Tensor:
        """Take one DDIM step with the teacher (Luo et al. 2023, eq. 15; in the sigma form of `ldm.diffusion`)."""
        return x + (factor(pairs.low / pairs.high, x) - 1) * (x - teacher(x, pairs.high))

    def distances(self, found: Tensor, goal: Tensor) -> Tensor:
        """Return the mean over the values of sqrt(d^2 + c^2) - c, or of d^2 if c is 0."""
        squares, c = (found - goal).square().flatten(1), self.loss.huber_c
        return ((squares + c**2).sqrt() - c if c else squares).mean(1)


class LCMLoraObjective(LCMObjective):
    """Distill a guided model into a LoRA for this model: LCM-LoRA (Luo et al. 2023, arXiv 2311.05556).

    The student is the UNet with the LoRA, and the teacher is the UNet without it. The target is the student.
    """

    student: Adapters

    def __init__(
        self,
        model: Model,
        adapters: Adapters,
        loss: LCMLoss,
        *,
        accumulate: int = 1,
        sample_prompts: Sequence[str] = (),
    ) -> None:
        """Freeze all networks of `model`, to which `adapters` were added.

        Raises ValueError unless `loss` has one guidance scale, because the UNet does not take the scale as an input.
        """
        if loss.guidance[0] != loss.guidance[1]:
            raise ValueError(f"a LoRA is distilled with one guidance scale: give it twice, got {loss.guidance}")
        without_target = dataclasses.replace(loss, target_ema=0.0)
        super().__init__(
            model, adapters, without_target, embedded=False, accumulate=accumulate, sample_prompts=sample_prompts
        )

    def network(self, trained: nn.Module) -> nn.Module:
        """Return the UNet, which computes with the student."""
        return self.networks.unet

    def teacher(self, given: Condition, scales: Tensor, size: Sequence[int], sizes: Tensor | None = None) -> Denoiser:
        """Return the guided denoiser of the UNet without the LoRA."""
        with _without(self.student):  # the keys of the context are computed here
            denoise = super().teacher(given, scales, size, sizes)

        def plain(x: Tensor, sigma: Tensor) -> Tensor:
            with _without(self.student):
                return denoise(x, sigma)

        return plain


@contextmanager
def _without(adapters: Adapters) -> Iterator[None]:
    """Let the adapters change nothing for a while."""
    layers: list[Any] = list(adapters.each)
    scales = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale
