"""Consistency models: students that map each point of a path of the probability-flow ODE to its clean end.

The student f learns to give the same answer at two points of one path:

    loss = distance(f(x, high), f'(x', low)),    f(x, lowest level) = x

f' has the weights of the target, which get no gradient. The boundary condition holds for any weights, because f is
`ldm.diffusion.consistency` around the student. The sampler `lcm` is multistep consistency sampling (Song et al. 2023,
algorithm 1), so that it samples from all of these students.

                                levels                          x' comes from               target
    ConsistencyDistillation     neighbors of N Karras levels    the teacher, one Heun step  average of the student
    ConsistencyTraining         the same, but N doubles         the noise of x              the student
    LCMObjective                timesteps t and t - skip        the teacher, one DDIM step  average of the student
    LCMLoraObjective            the same                        the same                    the student
"""

import copy
import dataclasses
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.parts import Model
from ldm.conditioning import Condition
from ldm.diffusion.consistency import consistency
from ldm.diffusion.denoiser import Denoiser, guided, parametrize
from ldm.diffusion.samplers import lcm
from ldm.diffusion.schedule import NoiseSchedule, factor, to_ve
from ldm.training.adapters import Adapters
from ldm.training.diffusion import DiffusionLoss, DiffusionObjective, Networks
from ldm.training.loop import Batch, extras


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The levels of the two points of each image, and the weight of their distance: b each."""

    high: Tensor
    low: Tensor
    weight: Tensor


class ConsistencyObjective(DiffusionObjective):
    """Train a student to be a consistency function.

    All networks of the model stay: the VAE, the text encoder, and the UNet, which is the teacher of a distillation.
    The batches have images, or the moments of their latents, and may have "sizes". No caption is dropped.
    """

    def __init__(
        self,
        model: Model,
        student: nn.Module,
        *,
        target_ema: float,
        shown: int,
        accumulate: int = 1,
        sample_prompts: Sequence[str] = (),
    ) -> None:
        """Freeze all networks of `model`.

        student: what is trained, averaged and saved; see `network`. target_ema: decay of the target's average; 0: the
        target is the student. shown: steps of the sample pictures. accumulate: batches per step.
        """
        networks = Networks(model.unet, model.text_encoder)
        super().__init__(model.config, networks, model.vae, DiffusionLoss(0.0), sample_prompts=sample_prompts)
        self.networks.eval().requires_grad_(False)
        self.student = student
        self.target = _fixed_copy(student) if target_ema else None
        self.target_ema, self.shown, self.accumulate = target_ema, shown, accumulate
        self.batches: Tensor
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))  # done; a resumed run counts on

    @property
    def trained(self) -> nn.Module:
        """The student."""
        return self.student

    @property
    def steps_done(self) -> int:
        """The number of steps done."""
        return int(self.batches) // self.accumulate

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean weighted distance of one batch. The log has it without weights."""
        self._move_target()
        images, captions, sizes = batch[0], batch[1], extras(batch).get("sizes")
        x0, size = self.latents(images), self._size(images)
        noise, scales = torch.randn_like(x0), self.scales(len(x0)).to(x0)
        pairs, given = self.pairs(len(x0)), self.given(captions, scales, size, sizes)
        x = x0 + factor(pairs.high, x0) * noise
        # The gradient's pass comes first: autocast keeps weights that it cast without gradients.
        found = self.function(self.student, given)(x, pairs.high)
        with torch.no_grad():
            teacher = self.teacher(given, scales, size, sizes)
            lower = self.lower(x, x0, noise, pairs, teacher)
            goal = self.function(self.student if self.target is None else self.target, given)(lower, pairs.low)
        distances = self.distances(found, goal)
        self.batches += 1
        return (pairs.weight.to(distances) * distances).mean(), {"distance": distances.mean()}

    def _move_target(self) -> None:
        """Move the target towards the student before each step but the first (Song et al. 2023, eq. 8)."""
        if self.target is not None and self.batches and self.batches % self.accumulate == 0:
            with torch.no_grad():
                for mine, theirs in zip(self.target.buffers(), self.student.parameters(), strict=True):
                    mine.lerp_(theirs, 1 - self.target_ema)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Draw the latents, b c h w, of images, or of moments."""
        return self._posterior(images).sample()

    @abstractmethod
    def pairs(self, count: int) -> Pairs:
        """Draw the levels for `count` images."""

    @abstractmethod
    def lower(self, x: Tensor, x0: Tensor, noise: Tensor, pairs: Pairs, teacher: Denoiser) -> Tensor:
        """Return the point at the low level on the path of x = x0 + high noise."""

    @abstractmethod
    def distances(self, found: Tensor, goal: Tensor) -> Tensor:
        """Return the distance of each image, b, of two estimates of x0."""

    def scales(self, count: int) -> Tensor:
        """Draw the teacher's guidance scale for `count` images. 1: no guidance."""
        return torch.ones(count)

    def given(
        self, captions: Sequence[str | None], scales: Tensor, size: Sequence[int], sizes: Tensor | None = None
    ) -> Condition:
        """Return the condition of the student. size: height and width of the images in pixels. sizes: for SDXL."""
        return self._condition(self.networks.text_encoder, captions, size, sizes)

    def network(self, trained: nn.Module) -> nn.Module:
        """Return the network that is called as a UNet is, of the student or of the target."""
        return trained

    def function(self, trained: nn.Module, given: Condition) -> Denoiser:
        """Return the consistency function (x, sigma) -> x0 with a condition. sigma: one level, or b."""
        network = self.network(trained)

        def predict(z: Tensor, timesteps: Tensor) -> Tensor:
            return network(z, timesteps, given.context, given.vector, None, given.guidance)

        return consistency(parametrize(predict, self.schedule, self.prediction), self.schedule)

    def teacher(self, given: Condition, scales: Tensor, size: Sequence[int], sizes: Tensor | None = None) -> Denoiser:
        """Return the model's denoiser, guided with one scale per image: b."""
        bind, given = self.networks.unet.bind, dataclasses.replace(given, guidance=None)
        if (scales == 1).all():
            return parametrize(bind(given), self.schedule, self.prediction)

        def rule(predictions: Sequence[Tensor]) -> Tensor:
            cond, uncond = predictions
            return uncond + factor(scales, cond) * (cond - uncond)

        empty = self._condition(self.networks.text_encoder, [None] * len(scales), size, sizes)
        return parametrize(guided(bind, [given, empty], rule), self.schedule, self.prediction)

    @torch.no_grad()
    def sample(self, batch: Batch) -> Tensor:
        """Return one picture for each sample prompt, in `shown` steps. The noise is the same at each call."""
        prompts, size = self.sample_prompts or batch[1][:16], self._size(batch[0])
        generator = torch.Generator().manual_seed(0)
        shape = (len(prompts), self.vae.config.latent_channels, *(side // self.vae.config.factor for side in size))

        def noise() -> Tensor:
            return torch.randn(shape, generator=generator).to(batch[0].device)

        scales = torch.full((len(prompts),), self.shown_scale, device=batch[0].device)
        function = self.function(self.student, self.given(prompts, scales, size))
        sigmas = self.schedule.steps(self.shown, "lcm")
        *_, last = lcm(function, to_ve(noise(), sigmas[0]), sigmas, noise=noise)
        return self.vae.decode(last.latents)

    @property
    def shown_scale(self) -> float:
        """The guidance scale of the sample pictures."""
        return 1.0


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
        _check(self.huber_c, self.target_ema)


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
        _check(self.huber_c, self.target_ema)


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
        _check(self.huber_c, 0.0)


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


def _check(huber_c: float, target_ema: float) -> None:
    if not huber_c >= 0:
        raise ValueError(f"huber_c must be at least 0, got {huber_c}")
    if not 0 <= target_ema < 1:
        raise ValueError(f"target_ema must be at least 0 and less than 1, got {target_ema}")


def _fixed_copy(network: nn.Module) -> nn.Module:
    """Return a copy whose weights are buffers, because checkpoints do not keep parameters that are not trained."""
    copied = copy.deepcopy(network)
    for part in copied.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, weight.detach())
    return copied
