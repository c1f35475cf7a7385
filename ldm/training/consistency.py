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

The first two are in `ldm.training.consistency_models`, the others in `ldm.training.lcm`.
"""

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.checkpoint.parts import Model
from ldm.conditioning import Condition
from ldm.diffusion.consistency import consistency
from ldm.diffusion.denoiser import Denoiser, guided, parametrize
from ldm.diffusion.samplers import lcm
from ldm.diffusion.schedule import factor, to_ve
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


def check_common(huber_c: float, target_ema: float) -> None:
    """Check the settings that the losses have in common. Raises ValueError."""
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
