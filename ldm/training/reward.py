"""Policy gradients for a diffusion model (DDPO, Black et al. 2023): pictures with a higher reward become more likely.

Each step of DDPM sampling draws x' from a normal distribution, whose mean the network predicts:

    x' = mean(x) + up noise,    log p(x' | x) = -|x' - mean(x)|^2 / (2 up^2) + const

Pictures are drawn, and their rewards become advantages. Then the network is trained on the steps of these pictures:

    loss = -mean of min(r A, clip(r, 1 - c, 1 + c) A),    r = p_new(x' | x) / p_old(x' | x)    (Schulman et al. 2017)

As in the authors' code, log p is the mean over the values of the latents, so that c is small. The last step draws no
noise and is not trained.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoint.parts import Model
from ldm.diffusion.denoiser import Denoiser, classifier_free, guided, parametrize
from ldm.diffusion.schedule import to_ve
from ldm.images import to_pil
from ldm.training.checker import Checker
from ldm.training.diffusion import DiffusionLoss, DiffusionObjective, Networks
from ldm.training.evaluate import judge, objects_to_find
from ldm.training.loop import Batch
from ldm.training.scenes import Scene, Scenes

Reward = Callable[[Sequence[Image.Image], Sequence[int]], Tensor]  # pictures, index of each one's prompt -> b


@dataclass(frozen=True)
class RewardLoss:
    """The settings of the policy gradient."""

    pictures: int = 8  # for each prompt of a batch; they are compared with each other
    sampling_steps: int = 10  # of DDPM; all but the last are trained
    updates: int = 3  # steps of the training on the same pictures, each with its share of the sampling steps
    guidance_scale: float = 4.0
    clip: float = 1e-4  # c
    largest_advantage: float = 5.0

    def __post_init__(self) -> None:
        if self.pictures < 2:
            raise ValueError(f"pictures must be at least 2 for each prompt, got {self.pictures}")
        if not 1 <= self.updates < self.sampling_steps:
            raise ValueError(
                f"updates must be at least 1 and less than sampling_steps = {self.sampling_steps}, got {self.updates}"
            )
        if not self.guidance_scale >= 0:
            raise ValueError(f"guidance_scale must be at least 0, got {self.guidance_scale}")
        for name in ("clip", "largest_advantage"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


class Prompts:
    """The captions of scenes without their pictures: (the index of the scene, as a tensor: 1, caption)."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return torch.tensor([index]), self.caption(index)

    def caption(self, index: int) -> str:
        """Return the caption of a scene."""
        return self.scenes.caption(index)


class SceneReward:
    """The share of a caption's properties that the checker finds in a picture, from 0 to 1."""

    def __init__(self, scenes: Scenes, checker: Checker) -> None:
        self.scenes, self.checker = scenes, checker

    def __call__(self, pictures: Sequence[Image.Image], indices: Sequence[int]) -> Tensor:
        """Return the reward of each picture for the scene with its index."""
        return torch.tensor([self._score(*pair) for pair in zip(pictures, indices, strict=True)])

    def _score(self, picture: Image.Image, index: int) -> float:
        scene = self.scenes.scene(np.random.default_rng((self.scenes.seed, index)))
        return score(scene, judge(scene, self.checker.look(picture, objects_to_find(scene))))


def score(scene: Scene, verdict: dict[str, bool]) -> float:
    """Return the share of right properties. The style counts if the scene has one."""
    counted = [right for name, right in verdict.items() if scene.style or name != "style"]
    return sum(counted) / len(counted)


class RewardObjective(DiffusionObjective):
    """Train a part of a model for a higher reward of its pictures. The batches have indices of prompts, and prompts."""

    def __init__(
        self, model: Model, learned: nn.Module, reward: Reward, loss: RewardLoss, *, sample_prompts: Sequence[str] = ()
    ) -> None:
        """Freeze `model` but for the parameters of `learned`, with which the UNet of `model` computes."""
        networks = Networks(model.unet, model.text_encoder)
        super().__init__(model.config, networks, model.vae, DiffusionLoss(0.0), sample_prompts=sample_prompts)
        self.networks.eval().requires_grad_(False)
        self.learned = learned.requires_grad_(True)
        self.reward, self.loss = reward, loss
        self.sigmas = self.schedule.steps(loss.sampling_steps, "trailing")
        self.drawn: dict[str, Any] = {}  # the pictures that are trained on; a checkpoint keeps them

    @property
    def trained(self) -> nn.Module:
        """The part that learns."""
        return self.learned

    def get_extra_state(self) -> dict[str, Any]:
        """Return the drawn pictures, for a checkpoint."""
        return self.drawn

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the drawn pictures of a checkpoint."""
        self.drawn = state

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the clipped loss on a share of the sampling steps. The log has the mean reward of the pictures."""
        if not self.drawn or not self.drawn["shares"]:
            self.drawn = self.collect(batch[0].flatten().tolist(), batch[1])
            torch.clear_autocast_cache()  # it holds weights that were cast without gradients
        share = self.drawn["shares"].pop(0)
        points, device = self.drawn["points"].to(batch[0].device), batch[0].device
        denoise, advantages = self.denoiser(self.drawn["prompts"]), self.drawn["advantages"].to(device)
        losses = []
        for i in share:
            new = self.log_p(denoise, points[i], points[i + 1], i)
            ratio = (new - self.drawn["log_p"][i].to(device)).exp()
            losses.append(clipped(ratio, advantages, self.loss.clip))
        return torch.stack(losses).mean(), {"reward": self.drawn["reward"].mean()}

    @torch.no_grad()
    def collect(self, indices: Sequence[int], prompts: Sequence[str]) -> dict[str, Any]:
        """Draw pictures of each prompt, and return the points of their paths, advantages and shares of the steps."""
        count = self.loss.pictures
        texts, which = [p for p in prompts for _ in range(count)], [i for i in indices for _ in range(count)]
        side, device = self.config.image_size // self.vae.config.factor, next(self.learned.parameters()).device
        denoise = self.denoiser(texts)
        shape = (len(texts), self.vae.config.latent_channels, side, side)
        points, log_p = [to_ve(torch.randn(shape, device=device), self.sigmas[0])], []
        for i in range(self.loss.sampling_steps - 1):
            mean, up = self.move(denoise, points[-1], i)
            points.append(mean + up * torch.randn(shape, device=device))
            log_p.append(log_normal(points[-1], mean, up))
        latents, _ = self.move(denoise, points[-1], self.loss.sampling_steps - 1)
        images = [self.vae.decode(part).float() for part in torch.split(latents, 8)]
        rewards = self.reward(to_pil(torch.cat(images)), which)
        order = torch.randperm(self.loss.sampling_steps - 1)
        return {
            "prompts": texts,
            "points": torch.stack(points).cpu(),  # step b c h w
            "log_p": torch.stack(log_p).cpu(),
            "reward": rewards,
            "advantages": advantages(rewards, count, self.loss.largest_advantage),
            "shares": [share.tolist() for share in order.tensor_split(self.loss.updates)],
        }

    def denoiser(self, prompts: Sequence[str]) -> Denoiser:
        """Return the guided denoiser of the model for these prompts."""
        size = (self.config.image_size,) * 2
        conditions = [self._condition(self.networks.text_encoder, t, size) for t in (prompts, [None] * len(prompts))]
        network = guided(self.networks.unet.bind, conditions, classifier_free(self.loss.guidance_scale))
        return parametrize(network, self.schedule, self.prediction)

    def move(self, denoise: Denoiser, x: Tensor, i: int) -> tuple[Tensor, float]:
        """Return the mean of x after sampling step i, and the deviation of its noise, as `ldm.diffusion.samplers`."""
        sigma, target = self.sigmas[i : i + 2].tolist()
        up = target * math.sqrt(1 - (target / sigma) ** 2)
        x0 = denoise(x, self.sigmas[i])
        return x0 + math.sqrt(target**2 - up**2) / sigma * (x - x0), up

    def log_p(self, denoise: Denoiser, x: Tensor, reached: Tensor, i: int) -> Tensor:
        """Return log p of the point that step i reached from x, per image: b."""
        mean, up = self.move(denoise, x, i)
        return log_normal(reached, mean, up)

    def sample(self, batch: Batch) -> Tensor:
        """Return one guided picture for each sample prompt. The noise is the same at each call."""
        prompts = self.sample_prompts or batch[1][:16]
        blank = torch.empty(len(prompts), 3, *(self.config.image_size,) * 2, device=batch[0].device)
        return self._sampled(self.networks.unet.bind, self.networks.text_encoder, prompts, (blank, list(prompts)))


def log_normal(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """Return the mean over the values of the log density of a normal distribution, without its constant: b."""
    return -((x - mean).square() / (2 * std**2)).flatten(1).mean(1)


def clipped(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Return the mean of -min(r A, clip(r) A) (Schulman et al. 2017, eq. 7). ratio, advantages: b."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def advantages(rewards: Tensor, count: int, largest: float) -> Tensor:
    """Return (reward - mean) / deviation among the `count` pictures of each prompt, within +- `largest`: b."""
    groups = rewards.float().reshape(-1, count)
    centered = groups - groups.mean(1, keepdim=True)
    return (centered / (groups.std(1, keepdim=True) + 1e-4)).clamp(-largest, largest).flatten()
