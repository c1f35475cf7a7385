"""The one training loop: objectives in, checkpoints, samples and a log out.

What is trained is an `Objective`; this file knows optimisation only. Every step draws its data and its random
numbers from (seed, step) alone, so a run that was killed and resumed equals one that never stopped, bit for bit.
"""

import copy
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm.images import grid, to_pil

Batch = tuple[Tensor, list[str]]  # images: b 3 h w in [-1, 1], and their captions


class Dataset(Protocol):
    """Examples by index: an image as uint8 3 h w and its caption."""

    def __len__(self) -> int:
        """Count the examples."""

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """Return one example, always the same for the same index."""


class Objective(nn.Module, ABC):
    """What a recipe trains. Its part `trained` is averaged, sampled from and saved; others may learn too."""

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """The networks that the run is for."""

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to minimise and named scalars for the log."""

    @abstractmethod
    def sample(self, trained: nn.Module, batch: Batch) -> Tensor:
        """Return pictures, n 3 h w in [-1, 1], that show what the averaged `trained` can do."""


@dataclass(frozen=True)
class LoopConfig:
    """How to optimise. Counts are optimiser steps, batch sizes are images."""

    steps: int
    batch_size: int = 32
    accumulate: int = 1  # batches per optimiser step
    learning_rate: float = 1e-4
    warmup: int = 200
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.999
    seed: int = 0
    workers: int = 0  # processes that prepare data
    log_every: int = 20
    sample_every: int = 500
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulate", "log_every", "sample_every")
        for name in (*counts, "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup must be in 0 .. steps - 1, got {self.warmup} of {self.steps}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in 0 <= ema < 1, got {self.ema}")


def learning_rate(step: int, config: LoopConfig) -> float:
    """Return the rate of `step`: linear warm-up, then half a cosine to zero (Loshchilov & Hutter 2017)."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / (config.steps - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def train(objective: Objective, dataset: Dataset, config: LoopConfig, out: Path, recipe: str) -> nn.Module:
    """Optimise `objective` on `dataset`, writing to the folder `out`; return the averaged `trained`.

    Resumes from `out`/checkpoint.pt where there is one. `recipe` is the run's whole configuration as text: it is
    kept beside the weights, and ValueError is raised if the run in `out` was started with another one.
    """
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=config.weight_decay)
    average = copy.deepcopy(objective.trained).eval().requires_grad_(False)

    (out / "samples").mkdir(parents=True, exist_ok=True)
    start = _resume(out, recipe, objective, average, optimizer)
    batches = _batches(dataset, config, start)
    with (
        (out / "log.jsonl").open("a", encoding="utf-8") as log,
        tqdm(total=config.steps, initial=start, unit="step", disable=None) as progress,
    ):
        since = time.perf_counter()
        for step in range(start, config.steps):
            torch.manual_seed(config.seed * 1_000_003 + step)  # makes a resumed run exact
            rate = learning_rate(step, config)
            batch, values = _step(objective, optimizer, batches, config, rate)
            if not values["grad_norm"].isfinite():
                raise FloatingPointError(
                    f"the gradient of step {step} is not finite: lower the learning rate; {out} has its checkpoint"
                )
            _update(average, objective.trained, min(config.ema, (1 + step) / (10 + step)))

            done = step + 1
            progress.update()
            if _due(done, config.log_every, config):
                seconds = (time.perf_counter() - since) / config.log_every
                since = time.perf_counter()
                row = {k: v.item() for k, v in values.items()}
                row |= {"step": done, "lr": rate, "step_seconds": seconds}
                log.write(json.dumps({k: float(f"{v:.6g}") for k, v in row.items()}) + "\n")
                log.flush()
                progress.set_postfix(loss=f"{row['loss']:.4f}")
            if _due(done, config.sample_every, config):
                objective.eval()
                with torch.no_grad():
                    pictures = objective.sample(average, batch)
                grid(to_pil(pictures)).save(out / "samples" / f"step-{done:06d}.png")
            if _due(done, config.checkpoint_every, config):
                _checkpoint(out, recipe, done, objective, average, optimizer)
    return average


def _due(done: int, every: int, config: LoopConfig) -> bool:
    return done % every == 0 or done == config.steps


def _step(
    objective: Objective, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], config: LoopConfig, rate: float
) -> tuple[Batch, dict[str, Tensor]]:
    """Take one optimiser step at learning rate `rate`; return its last batch and its scalars.

    With a gradient that is not finite, the weights stay as they are.
    """
    objective.train()
    (group,) = optimizer.param_groups
    group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    for _ in range(config.accumulate):
        images, captions = next(batches)
        batch = images.to(group["params"][0].device), captions
        loss, logs = objective(batch)
        (loss / config.accumulate).backward()
    norm = nn.utils.clip_grad_norm_(group["params"], config.clip)
    if torch.isfinite(norm):
        optimizer.step()
    return batch, {"loss": loss} | logs | {"grad_norm": norm}


def _batches(dataset: Dataset, config: LoopConfig, start: int) -> Iterator[Batch]:
    """Yield batches for ever from optimiser step `start` on; epoch after epoch in a seeded order."""
    size, per_step = len(dataset), config.batch_size * config.accumulate

    def indices() -> Iterator[list[int]]:
        position, epoch, order = start * per_step, -1, torch.empty(0)
        while True:
            batch = []
            for i in range(position, position + config.batch_size):
                if i // size != epoch:
                    epoch = i // size
                    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
                    order = torch.randperm(size, generator=generator)
                batch.append(int(order[i % size]))
            position += config.batch_size
            yield batch

    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=indices(),
        num_workers=config.workers,
        collate_fn=collate,
    )
    return iter(loader)


def collate(examples: list[tuple[Tensor, str]]) -> Batch:
    """Stack uint8 images as b 3 h w in [-1, 1], beside their captions."""
    images = torch.stack([image for image, _ in examples]).float() / 127.5 - 1  # b 3 h w
    return images, [caption for _, caption in examples]


def _update(average: nn.Module, trained: nn.Module, decay: float) -> None:
    """Move the exponential moving average towards the trained weights."""
    with torch.no_grad():
        pairs = zip(average.parameters(), trained.parameters(), strict=True)
        ours, theirs = (list(side) for side in zip(*pairs, strict=True))
        torch._foreach_lerp_(ours, theirs, 1 - decay)


def _checkpoint(out: Path, recipe: str, step: int, objective: nn.Module, average: nn.Module, optimizer: Any) -> None:
    """Write everything that a resumed run needs, under a temporary name first."""
    state = {
        "step": step,
        "recipe": recipe,
        "objective": objective.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    partial = out / "checkpoint.pt.partial"
    torch.save(state, partial)
    os.replace(partial, out / "checkpoint.pt")


def _resume(out: Path, recipe: str, objective: nn.Module, average: nn.Module, optimizer: Any) -> int:
    """Load the run's last checkpoint, cut its log back to it, and return the steps done so far."""
    path = out / "checkpoint.pt"
    if not path.is_file():
        (out / "log.jsonl").unlink(missing_ok=True)
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["recipe"] != recipe:
        raise ValueError(
            f"{out} holds a run of another recipe, at step {state['step']}: choose another `out`, or undo the change"
        )
    objective.load_state_dict(state["objective"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    step = int(state["step"])
    log = out / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    partial = out / "log.jsonl.partial"
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, log)
    return step
