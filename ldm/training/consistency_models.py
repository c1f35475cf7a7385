"""Consistency models of one or two steps: distilled from a teacher, or trained without one (Song et al. 2023)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.checkpoint.parts import Model
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import NoiseSchedule, factor
from ldm.training.consistency import ConsistencyObjective, Pairs, check_common


@dataclass(frozen=True)
class DistillationLoss:
    """The settings of consistency distillation (Song et al. 2023, algorithm 2)."""

    guidance_scale: float = 1.0  # of the teacher; 1: none
    levels: int = 18  # N
    huber_c: float = 0.00054  # c / sqrt(number of latent values), see `whole_huber`; 0: the mean squared difference
    target_ema: float = 0.95  # decay of the target's average

    def __post_init__(self) -> None:
        if not self.guidance_scale >= 0:
            raise ValueError(f"guidance_scale must be at least 0, got {self.guidance_scale}")
        if self.levels < 2:
            raise ValueError(f"levels must be at least 2, got {self.levels}")
        check_common(self.huber_c, self.target_ema)


class ConsistencyDistillation(ConsistencyObjective):
    """Distill a model into a student of one or two steps (Song et al. 2023, algorithm 2)."""

    def __init__(
        self,
        model: Model,
        student: nn.Module,
        loss: DistillationLoss,
        *,
        accumulate: int = 1,
        sample_prompts: Sequence[str] = (),
    ) -> None:
        """Freeze all networks of `model`."""
        super().__init__(
            model, student, target_ema=loss.target_ema, shown=2, accumulate=accumulate, sample_prompts=sample_prompts
        )
        self.loss = loss
        self.levels = karras_levels(self.schedule, loss.levels)

    def scales(self, count: int) -> Tensor:
        """Return the scale of the settings for all images."""
        return torch.full((count,), self.loss.guidance_scale)

    def pairs(self, count: int) -> Pairs:
        """Draw each pair of neighbors with the same chance. All weigh the same (section 4)."""
        i = torch.randint(len(self.levels) - 1, (count,))
        return Pairs(high=self.levels[i + 1], low=self.levels[i], weight=torch.ones(count))

    def lower(self, x: Tensor, x0: Tensor, noise: Tensor, pairs: Pairs, teacher: Denoiser) -> Tensor:
        """Take one Heun step with the teacher (eq. 6, with the solver of section 6.1)."""
        high, low = factor(pairs.high, x), factor(pairs.low, x)
        slope = (x - teacher(x, pairs.high)) / high
        reached = x + (low - high) * slope
        second = (reached - teacher(reached, pairs.low)) / low
        return x + (low - high) * (slope + second) / 2

    def distances(self, found: Tensor, goal: Tensor) -> Tensor:
        """Return the pseudo-Huber distance of whole images."""
        return whole_huber(found, goal, self.loss.huber_c)


@dataclass(frozen=True)
class TrainingLoss:
    """The settings of consistency training with its improved techniques (Song & Dhariwal 2023, table 1)."""

    first_levels: int = 10  # s0; the number of levels starts at s0 + 1 and doubles
    last_levels: int = 1280  # s1
    huber_c: float = 0.00054  # c / sqrt(number of latent values), see `whole_huber`
    log_mean: float = -1.1  # of log sigma; the paper's images have a deviation of 0.5, latents of 1
    log_std: float = 2.0
    from_model: bool = False  # start from the model's UNet (consistency tuning, Geng et al. 2024), not from nothing

    def __post_init__(self) -> None:
        if not 2 <= self.first_levels <= self.last_levels:
            raise ValueError(
                "first_levels must be at least 2 and at most last_levels, got "
                f"{self.first_levels} and {self.last_levels}"
            )
        if not self.log_std > 0:
            raise ValueError(f"log_std must be above 0, got {self.log_std}")
        check_common(self.huber_c, 0.0)


class ConsistencyTraining(ConsistencyObjective):
    """Train a consistency model without a teacher (Song & Dhariwal 2023)."""

    def __init__(
        self,
        model: Model,
        student: nn.Module,
        loss: TrainingLoss,
        *,
        steps: int,
        accumulate: int = 1,
        sample_prompts: Sequence[str] = (),
    ) -> None:
        """Freeze all networks of `model`. steps: of the whole training."""
        super().__init__(model, student, target_ema=0.0, shown=2, accumulate=accumulate, sample_prompts=sample_prompts)
        self.loss, self.steps = loss, steps

    def pairs(self, count: int) -> Pairs:
        """Draw neighbors so that log sigma is normal. Their weight is 1 / (high - low)."""
        n = number_of_levels(self.steps_done, self.steps, self.loss.first_levels, self.loss.last_levels)
        levels = karras_levels(self.schedule, n)
        i = torch.multinomial(chances(levels, self.loss.log_mean, self.loss.log_std), count, replacement=True)
        high, low = levels[i + 1], levels[i]
        return Pairs(high=high, low=low, weight=1 / (high - low))

    def lower(self, x: Tensor, x0: Tensor, noise: Tensor, pairs: Pairs, teacher: Denoiser) -> Tensor:
        """Add the noise of x to x0 (Song et al. 2023, eq. 9)."""
        return x0 + factor(pairs.low, x0) * noise

    def distances(self, found: Tensor, goal: Tensor) -> Tensor:
        """Return the pseudo-Huber distance of whole images."""
        return whole_huber(found, goal, self.loss.huber_c)


def whole_huber(found: Tensor, goal: Tensor, c: float) -> Tensor:
    """Return sqrt(|found - goal|^2 + n c^2) - sqrt(n) c for each image of n values (Song & Dhariwal 2023, eq. 8).

    If c is 0: |found - goal|^2 / n. The norm has no gradient where both are equal.
    """
    squares, n = (found - goal).square().flatten(1).sum(1), found[0].numel()
    return (squares + n * c**2).sqrt() - math.sqrt(n) * c if c else squares / n


def karras_levels(schedule: NoiseSchedule, n: int) -> Tensor:
    """Return n rising levels from the schedule's first to its last, evenly spaced in sigma^(1/7), fp64.

    Karras et al. 2022, eq. 5; Song et al. 2023, section 6.1.
    """
    first, last = float(schedule.sigmas[0]), float(schedule.sigmas[-1])
    levels = torch.linspace(first ** (1 / 7), last ** (1 / 7), n, dtype=torch.float64) ** 7
    levels[0], levels[-1] = first, last  # exactly, so that the boundary condition holds
    return levels


def number_of_levels(step: int, steps: int, first: int, last: int) -> int:
    """Return the number of levels at a step: first + 1, which doubles evenly until it is last + 1.

    N(k) = min(s0 2^floor(k / K'), s1) + 1,    K' = floor(K / (log2 floor(s1 / s0) + 1))   (Song & Dhariwal 2023, eq. 9)
    """
    stage = max(math.floor(steps / (math.log2(last // first) + 1)), 1)
    return min(first * 2 ** (step // stage), last) + 1


def chances(levels: Tensor, mean: float, std: float) -> Tensor:
    """Return the chance of each pair of neighbors, as log sigma were normal (Song & Dhariwal 2023, eq. 10)."""
    found = torch.erf((levels.log() - mean) / (math.sqrt(2) * std)).diff()
    return found / found.sum()
