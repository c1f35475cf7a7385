"""The order of the examples: which of them each batch has, for any number of epochs, from the seed alone."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

MIXED = 8  # shards whose examples are mixed


def batches(
    count: int, size: int, seed: int, start: int = 0, *, buckets: Tensor | None = None, shards: Tensor | None = None
) -> Iterator[list[int]]:
    """Yield the indices of each batch without end, from batch number `start` on. They depend on `seed` alone.

    Each batch has `size` examples of one bucket. The examples of a bucket are an endless row. It has all of them in a
    seeded order, then all of them in another order, and so on. The batches are cut from this row, so that a batch may
    reach into the next order. In each epoch, a bucket gives as many batches as its share of the examples fills, at
    random places. Ranks that train together each take a part of every batch.

    count: of the examples. buckets: the bucket of each example (default: one bucket has all of them).
    shards: the file of each example. With them, an order goes through the files in random order, MIXED at a time. So
    examples that are near each other in a file are read at about the same time.
    """
    everything = torch.arange(count)
    groups = [everything] if buckets is None else [everything[buckets == bucket] for bucket in torch.unique(buckets)]
    rows = [_Row(group, seed, shards) for group in groups]
    number = 0  # of the first batch of the epoch
    for epoch in itertools.count():
        done = [epoch * len(group) // size for group in groups]
        counts = [(epoch + 1) * len(group) // size - before for group, before in zip(groups, done, strict=True)]
        turns = torch.cat([torch.full((n,), i) for i, n in enumerate(counts)])
        if number + len(turns) > start:
            turns = turns[torch.randperm(len(turns), generator=_generator(seed, epoch))]
            for turn, i in enumerate(turns.tolist(), number):
                if turn >= start:
                    yield rows[i].cut(done[i] * size, size)
                done[i] += 1
        number += len(turns)


class _Row:
    """The examples of one bucket in one order after another. The last order is kept."""

    def __init__(self, group: Tensor, seed: int, shards: Tensor | None) -> None:
        self.group, self.seed, self.shards = group, seed, shards
        self.epoch, self.order = -1, group

    def cut(self, position: int, size: int) -> list[int]:
        """Return the examples at `position` to `position` + `size` - 1."""
        indices = []
        for i in range(position, position + size):
            epoch, place = divmod(i, len(self.group))
            if epoch != self.epoch:
                self.epoch, self.order = epoch, self._shuffled(epoch)
            indices.append(int(self.order[place]))
        return indices

    def _shuffled(self, epoch: int) -> Tensor:
        order = self.group[torch.randperm(len(self.group), generator=_generator(self.seed, epoch))]
        if self.shards is None:
            return order
        count = int(self.shards.max()) + 1
        turn = torch.randperm(count, generator=_generator(self.seed, epoch)) // MIXED  # the same for every bucket
        return order[turn[self.shards[order]].argsort(stable=True)]


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)
