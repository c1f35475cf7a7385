"""The training loop: it optimizes an `Objective` and writes checkpoints, sample pictures and a log.

Each step draws its data and its random numbers from (seed, step) alone. A run that was stopped and resumed therefore
equals a run without a stop, bit for bit.
"""

import copy
import json
import math
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm.atomic import beside
from ldm.geometry import grid
from ldm.images import to_pil
from ldm.pictures import save_png
from ldm.training import order

# Images: b 3 h w in [-1, 1], or the moments of their latents: b 2c h w; the captions; and, for data that have them,
# more tensors by name, with one row for each image: "sizes", "mask", "context", "pooled"; see `DiffusionObjective`.
Batch = tuple[Tensor, list[str]] | tuple[Tensor, list[str], Mapping[str, Tensor]]
Example = tuple[Tensor, str] | tuple[Tensor, str, Mapping[str, Tensor]]
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal stopped the training. The text names the step and the folder with the checkpoint."""


class Dataset(Protocol):
    """Examples by index: an image as uint8 3 h w, or the moments of its latents as float 2c h w, and its caption.

    A third member may hold more tensors by name; see `Batch`. A data set whose images differ in size has an attribute
    `buckets`, and one that is stored in several files an attribute `shards`; see `ldm.training.order.batches`.
    """

    def __len__(self) -> int:
        """Count the examples."""

    def __getitem__(self, index: int) -> Example:
        """Return one example. The same index always gives the same example."""

    def caption(self, index: int) -> str:
        """Return the caption of an example without making or decoding its image."""


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
    def sample(self, trained: nn.Module, batch: Batch) -> Tensor:
        """Return pictures, n 3 h w in [-1, 1], made by `trained`, which is the average of the weights."""

    @property
    def validates(self) -> bool:
        """Whether there are kept-out data for `validate`."""
        return False

    def validate(self, trained: nn.Module) -> dict[str, Tensor]:
        """Return named scalars of `trained`, which is the average of the weights, on the kept-out data."""
        return {}


@dataclass(frozen=True)
class LoopConfig:
    """The optimization. A step is one update of the weights."""

    steps: int
    batch_size: int = 32  # images
    accumulate: int = 1  # batches per step
    learning_rate: float = 1e-4
    warmup: int = 200  # steps
    schedule: Literal["cosine", "constant"] = "cosine"  # of the learning rate after the warmup
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient
    bf16: bool = False  # compute the networks in bfloat16, as autocast does; the weights stay in fp32
    ema: float = 0.999  # decay of the average of the weights
    seed: int = 0
    workers: int = 0  # processes that load data; 0: the training process loads them
    log_every: int = 20  # steps
    validate_every: int = 500  # steps; for recipes that keep pictures out
    sample_every: int = 500
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        intervals = ("log_every", "validate_every", "sample_every", "checkpoint_every")
        for name in ("steps", "batch_size", "accumulate", *intervals):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup must be from 0 to steps - 1 = {self.steps - 1}, got {self.warmup}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and less than 1, got {self.ema}")


def learning_rate(step: int, config: LoopConfig) -> float:
    """Return the learning rate of `step`: linear warmup, then half a cosine to zero (Loshchilov & Hutter 2017).

    With the schedule "constant", it stays as it is after the warmup.
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup) / (config.steps - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def train(
    objective: Objective, dataset: Dataset, config: LoopConfig, out: Path, recipe: Mapping[str, object]
) -> nn.Module:
    """Optimize `objective` on `dataset`, write to the folder `out`, and return the average of `trained`.

    The run resumes from `out`/checkpoint.pt if that file exists.

    recipe: every value that changes the numbers of the run, by name, as JSON can hold it. The checkpoint keeps it.

    The first SIGINT (Ctrl-C) or SIGTERM lets the current step end and saves a checkpoint; then Interrupted is raised.
    A second signal acts as it did before the run. Python allows this in the main thread only.
    Raises ValueError if the run in `out` has another recipe or more steps than `config`, and FloatingPointError if the
    gradient is not finite.
    """
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=config.weight_decay)
    average = copy.deepcopy(objective.trained).eval().requires_grad_(False)

    (out / "samples").mkdir(parents=True, exist_ok=True)
    text = json.dumps(recipe)
    start = _resume(out, text, objective, average, optimizer)
    if start > config.steps:
        raise ValueError(
            f"the run in {out} has done {start} steps, and the recipe asks for {config.steps}: set steps to {start} or "
            "more, or choose another `out`"
        )
    batches = _batches(dataset, config, start)
    with (
        _stop_signals() as signals,
        (out / "log.jsonl").open("a", encoding="utf-8") as log,
        tqdm(total=config.steps, initial=start, unit="step", disable=None) as progress,
    ):
        seconds: list[float] = []  # of each step since the last line of the log
        for step in range(start, config.steps):
            began = perf_counter()
            torch.manual_seed(config.seed * 1_000_003 + step)  # makes a resumed run exact
            rate = learning_rate(step, config)
            batch, values = _step(objective, optimizer, batches, config, rate)
            if not values["grad_norm"].isfinite():
                raise FloatingPointError(
                    f"the gradient of step {step + 1} is not finite, so the training cannot go on: lower "
                    "learning_rate and start again with another `out`"
                )
            _update(average, objective.trained, min(config.ema, (1 + step) / (10 + step)))
            seconds.append(perf_counter() - began)

            done = step + 1
            progress.update()
            validating = objective.validates and _due(done, config.validate_every, config)
            if validating or _due(done, config.log_every, config):
                values |= _validate(objective, average, config) if validating else {}
                row = {k: v.item() for k, v in values.items()}
                row |= {"step": done, "lr": rate, "step_seconds": sum(seconds) / len(seconds)}
                seconds.clear()
                log.write(json.dumps({k: float(f"{v:.6g}") for k, v in row.items()}) + "\n")
                log.flush()
                progress.set_postfix(loss=f"{row['loss']:.4f}")
            if _due(done, config.sample_every, config):
                objective.eval()
                with torch.no_grad():
                    pictures = objective.sample(average, batch)
                save_png(grid(to_pil(pictures)), out / "samples" / f"step-{done:06d}.png", overwrite=True)
            stopping = bool(signals)
            if stopping or _due(done, config.checkpoint_every, config):
                _checkpoint(out, text, done, objective, average, optimizer)
            if stopping:
                raise Interrupted(f"training stopped after step {done} of {config.steps}, saved in {out}")
    return average


def _validate(objective: Objective, average: nn.Module, config: LoopConfig) -> dict[str, Tensor]:
    objective.eval()
    device = next(average.parameters()).device
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
        return objective.validate(average)


def _due(done: int, every: int, config: LoopConfig) -> bool:
    return done % every == 0 or done == config.steps


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Yield a list that receives the first of STOP_SIGNALS; the handlers from before then return.

    The list stays empty outside the main thread. A signal that was ignored before stays ignored.
    """
    received: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: the handler is not Python's
                before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


def _step(
    objective: Objective, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], config: LoopConfig, rate: float
) -> tuple[Batch, dict[str, Tensor]]:
    """Update the weights once at learning rate `rate`; return the step's last batch and its scalars.

    The weights stay as they are if the gradient is not finite.
    """
    objective.train()
    (group,) = optimizer.param_groups
    group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    for _ in range(config.accumulate):
        device = group["params"][0].device
        batch = to_device(next(batches), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            loss, logs = objective(batch)
        (loss / config.accumulate).backward()
    norm = nn.utils.clip_grad_norm_(group["params"], config.clip)
    if torch.isfinite(norm):
        optimizer.step()
    return batch, {"loss": loss} | logs | {"grad_norm": norm}


def _batches(dataset: Dataset, config: LoopConfig, start: int) -> Iterator[Batch]:
    """Yield batches without end, beginning with step `start`."""
    parts: dict[str, Tensor | None] = {name: getattr(dataset, name, None) for name in ("buckets", "shards")}
    indices = order.batches(len(dataset), config.batch_size, config.seed, start * config.accumulate, **parts)
    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=indices,
        num_workers=config.workers,
        collate_fn=collate,
        worker_init_fn=_ignore_stop_signals,
    )
    return iter(loader)


def _ignore_stop_signals(worker: int) -> None:
    """Let a data process live on when a signal reaches all processes: the current step needs its data."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def collate(examples: list[Example]) -> Batch:
    """Stack uint8 images as b 3 h w in [-1, 1], or float moments as they are; list the captions; stack the rest.

    Other uint8 tensors, such as masks, are scaled to [0, 1].
    """
    images = torch.stack([example[0] for example in examples])
    if images.dtype == torch.uint8:
        images = images.float() / 127.5 - 1
    captions = [example[1] for example in examples]
    rows = [extras(example) for example in examples]
    more = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    more = {name: tensor / 255 if tensor.dtype == torch.uint8 else tensor for name, tensor in more.items()}
    return (images, captions, more) if more else (images, captions)


def extras(batch: Batch | Example) -> Mapping[str, Tensor]:
    """Return the tensors of a batch or an example beside the images; none if it has two members."""
    return batch[2] if len(batch) == 3 else {}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch to a device."""
    images, more = batch[0].to(device), {name: tensor.to(device) for name, tensor in extras(batch).items()}
    return (images, batch[1], more) if more else (images, batch[1])


def _update(average: nn.Module, trained: nn.Module, decay: float) -> None:
    """Move the exponential moving average towards the trained weights."""
    with torch.no_grad():
        pairs = zip(average.parameters(), trained.parameters(), strict=True)
        ours, theirs = (list(side) for side in zip(*pairs, strict=True))
        torch._foreach_lerp_(ours, theirs, 1 - decay)


def _checkpoint(out: Path, recipe: str, step: int, objective: nn.Module, average: nn.Module, optimizer: Any) -> None:
    """Write everything that a resumed run needs to `out`/checkpoint.pt."""
    state = {
        "step": step,
        "recipe": recipe,
        "objective": objective.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with beside(out / "checkpoint.pt") as new:
        torch.save(state, new)
        os.replace(new, out / "checkpoint.pt")


def _resume(out: Path, recipe: str, objective: nn.Module, average: nn.Module, optimizer: Any) -> int:
    """Load the run's last checkpoint, remove later lines from its log, and return the number of steps done."""
    path, log = out / "checkpoint.pt", out / "log.jsonl"
    if not path.is_file():
        log.unlink(missing_ok=True)
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    step = int(state["step"])
    changes = _changes(json.loads(state["recipe"]), json.loads(recipe))
    if changes:
        raise ValueError(
            f"{out} holds a run of another recipe, at step {step}: {changes}; undo the change, or choose another `out`"
        )
    objective.load_state_dict(state["objective"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    with beside(log) as new:
        new.write_text("".join(kept), encoding="utf-8")
        os.replace(new, log)
    return step


def _changes(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Name up to five values that differ, with both values; a value that is absent counts as None."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    shown = [f"{name} was {before.get(name)!r} and is now {now.get(name)!r}" for name in names[:5]]
    return ", ".join(shown + [f"and {len(names) - 5} more values differ"] * (len(names) > 5))
