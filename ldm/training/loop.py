"""The training loop: it optimizes an `Objective` and writes checkpoints, sample pictures and a log.

Each step draws its data and its random numbers from (seed, step) alone. A run that was stopped and resumed therefore
equals a run without a stop, bit for bit.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from ldm.geometry import grid
from ldm.images import to_pil
from ldm.pictures import save_png
from ldm.training.average import Average
from ldm.training.batches import Batch, Dataset, Example, batches, collate, extras, to_device
from ldm.training.checkpoints import Checkpoints
from ldm.training.distributed import NotFirstProcess, Replicated, any_process, check_batch, mean_of_all, rank, ranks
from ldm.training.log import Log
from ldm.training.optimizers import learning_rate
from ldm.training.recompute import recompute_blocks
from ldm.training.settings import LoopConfig
from ldm.training.stopping import Interrupted, stop_signals
from ldm.training.update import Updater, autocast

__all__ = [
    "Batch",
    "Dataset",
    "Example",
    "Interrupted",
    "LoopConfig",
    "Objective",
    "collate",
    "extras",
    "learning_rate",
    "to_device",
    "train",
]


class Objective(nn.Module, ABC):
    """A loss with its networks. The loop averages, samples and saves `trained`; other parts may learn, too."""

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """The networks that are the result of the run."""

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and named scalars for the log."""

    @abstractmethod
    def sample(self, batch: Batch) -> Tensor:
        """Return pictures, n 3 h w in [-1, 1], made by `trained`, which has the averaged weights then."""

    @property
    def validates(self) -> bool:
        """Whether there are kept-out data for `validate`."""
        return False

    def validate(self) -> dict[str, Tensor]:
        """Return named scalars of `trained`, which has the averaged weights then, on the kept-out data."""
        return {}


def train(
    objective: Objective, dataset: Dataset, config: LoopConfig, out: Path, recipe: Mapping[str, object]
) -> nn.Module:
    """Optimize `objective` on `dataset`, write to the folder `out`, and return `trained` with its averaged weights.

    The run resumes from the last checkpoint in `out`, if there is one. Started by torchrun, within
    `ldm.training.distributed.joined`, all processes train together; only the first one writes and returns.

    recipe: every value that changes the numbers of the run, by name, as JSON can hold it. The checkpoint keeps it.

    The first SIGINT (Ctrl-C) or SIGTERM lets the current step end and saves a checkpoint; then Interrupted is raised.
    A second signal acts as it did before the run. Python allows this in the main thread only.
    Raises ValueError if the run in `out` has another recipe or more steps than `config`, or if all its checkpoints are
    damaged. Raises FloatingPointError if a loss or a gradient is not finite, and OSError if the disk is full. All
    processes but the first raise NotFirstProcess at the end. The last checkpoint is intact in all these cases.
    """
    check_batch(config.batch_size)
    if config.gradient_checkpointing:
        recompute_blocks(objective)
    processes, kind = _parallel(objective, config)
    updater = Updater(objective, processes, config)
    average = Average(objective.trained, config.ema)
    checkpoints = kind(out, recipe, objective, average, updater.optimizers, updater.scaler)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    start = _resume(checkpoints, config, out)
    data = batches(dataset, config, start)
    with stop_signals() as signals, Log(out, start, config.steps, tensorboard=config.tensorboard) as log:
        seconds: list[float] = []  # of each step since the last line of the log
        for step in range(start, config.steps):
            began = perf_counter()
            batch, values = updater.update(data, step)
            average.update(step)
            seconds.append(perf_counter() - began)

            done = step + 1
            log.advance()
            validating = objective.validates and _due(done, config.validate_every, config)
            if validating or _due(done, config.log_every, config):
                if validating:
                    with _averaged(objective, average, processes), autocast(updater.device, config):
                        values |= objective.validate()
                row = mean_of_all(values)
                row |= {"lr": learning_rate(step, config), "step_seconds": sum(seconds) / len(seconds)}
                seconds.clear()
                log.write(done, row)
            if _due(done, config.sample_every, config):
                with _averaged(objective, average, processes) as wanted:
                    pictures = objective.sample(batch) if wanted else None
                if pictures is not None and rank() == 0:
                    save_png(grid(to_pil(pictures)), out / "samples" / f"step-{done:06d}.png", overwrite=True)
            (stopping,) = any_process([bool(signals)], updater.device)
            if stopping or _due(done, config.checkpoint_every, config):
                checkpoints.save(done)
            if stopping:
                raise Interrupted(f"training stopped after step {done} of {config.steps}, saved in {out}")
    average.swap()
    result = processes.result(objective.trained)
    if rank() > 0:
        raise NotFirstProcess
    return result.eval()


def _parallel(objective: Objective, config: LoopConfig) -> tuple[Replicated, type[Checkpoints]]:
    """Choose how the processes share the work, and the format of the checkpoints."""
    if config.parallel == "ddp":
        return Replicated(objective), Checkpoints
    from ldm.training.sharding import FolderCheckpoints, Sharded  # imports much of torch.distributed

    return Sharded(objective, objective.trained) if ranks() > 1 else Replicated(objective), FolderCheckpoints


def _resume(checkpoints: Checkpoints, config: LoopConfig, out: Path) -> int:
    """Read the last checkpoint, if there is one, and return the number of steps that are done."""
    start = checkpoints.resume()
    if start > config.steps:
        raise ValueError(
            f"the run in {out} has done {start} steps, and the recipe asks for {config.steps}: set steps to {start} or "
            "more, or choose another `out`"
        )
    return start


@contextmanager
def _averaged(objective: Objective, average: Average, processes: Replicated) -> Iterator[bool]:
    """Evaluate the averaged weights inside the block, without gradients. Yields whether this process should sample."""
    objective.eval()
    with average.applied(), processes.sampling() as wanted, torch.no_grad():
        yield wanted


def _due(done: int, every: int, config: LoopConfig) -> bool:
    return done % every == 0 or done == config.steps
