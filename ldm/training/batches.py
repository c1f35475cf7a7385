"""Examples in batches, in a seeded order that begins at any step."""

import signal
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ldm.training import order
from ldm.training.distributed import rank, ranks
from ldm.training.settings import LoopConfig
from ldm.training.stopping import STOP_SIGNALS

# The images, b 3 h w in [-1, 1], or the moments of their latents, b 2c h w. Then the captions. Some data have more
# tensors by name, with one row for each image: "sizes", "mask", "context", "pooled"; see `DiffusionObjective`.
Batch = tuple[Tensor, list[str]] | tuple[Tensor, list[str], Mapping[str, Tensor]]
Example = tuple[Tensor, str] | tuple[Tensor, str, Mapping[str, Tensor]]


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


def batches(dataset: Dataset, config: LoopConfig, start: int) -> Iterator[Batch]:
    """Yield batches without end, beginning with step `start`.

    Each of several processes that train together has its part of every batch.
    """
    parts: dict[str, Tensor | None] = {name: getattr(dataset, name, None) for name in ("buckets", "shards")}
    indices = order.batches(len(dataset), config.batch_size, config.seed, start * config.accumulate, **parts)
    count = config.batch_size // ranks()
    own = slice(rank() * count, (rank() + 1) * count)
    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=(batch[own] for batch in indices),
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
