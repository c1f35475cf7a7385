"""The order of the examples: each once an epoch, batches of one bucket, and the same from any start."""

import itertools
from collections import Counter

import pytest
import torch

from ldm.training.order import MIXED, batches


def take(n, *args, **options):
    return list(itertools.islice(batches(*args, **options), n))


def test_without_buckets_each_epoch_is_one_seeded_order_of_all_examples():
    found = list(itertools.chain(*take(10, 10, 3, seed=2)))
    for epoch in range(3):
        generator = torch.Generator().manual_seed(2 * 1_000_003 + epoch)  # as the loop has always drawn them
        assert found[10 * epoch :][:10] == torch.randperm(10, generator=generator).tolist()


@pytest.mark.parametrize("buckets", [None, torch.tensor([0, 2, 2, 0, 2, 2, 2, 7, 0, 2, 2])])
def test_batches_are_the_same_from_any_start(buckets):
    whole = take(30, 11, 2, seed=1, buckets=buckets)
    for start in (1, 5, 6, 17):
        assert take(30 - start, 11, 2, seed=1, start=start, buckets=buckets) == whole[start:]
    assert take(30, 11, 2, seed=2, buckets=buckets) != whole


def test_each_batch_is_full_and_of_one_bucket_and_each_example_comes_once_in_a_round_of_its_bucket():
    buckets = torch.tensor([0] * 7 + [1] * 2 + [2] * 4)  # one bucket is smaller than a batch
    found = take(39, 13, 3, seed=0, buckets=buckets)  # 9 epochs
    assert {len(batch) for batch in found} == {3}
    for batch in found:
        assert len({int(buckets[i]) for i in batch}) == 1
    for bucket in range(3):
        row = [i for batch in found for i in batch if buckets[i] == bucket]
        members = (buckets == bucket).nonzero().flatten().tolist()
        assert len(row) == 9 * len(members)
        for i in range(0, len(row), len(members)):
            assert sorted(row[i : i + len(members)]) == members
    assert set(Counter(itertools.chain(*found)).values()) == {9}
    orders = [[int(buckets[batch[0]]) for batch in found[i : i + 13]] for i in (0, 13, 26)]
    assert len({tuple(order) for order in orders}) == 3  # the buckets alternate in another way in each epoch


def test_an_order_with_shards_reads_a_few_files_at_a_time_and_each_example_once():
    shards = torch.arange(40).repeat_interleave(5)
    found = list(itertools.chain(*take(100, 200, 2, seed=0, shards=shards)))
    assert sorted(found) == list(range(200))
    for i in range(0, 200, 5 * MIXED):
        files = [int(shards[j]) for j in found[i : i + 5 * MIXED]]
        assert len(set(files)) == MIXED
        assert files != sorted(files)
        assert set(files) != set(range(min(files), min(files) + MIXED))  # the files are in random order
    second = list(itertools.chain(*take(100, 200, 2, seed=0, start=100, shards=shards)))
    assert sorted(second) == list(range(200))
    assert second != found


def test_buckets_of_shards_go_through_the_files_together():
    shards = torch.arange(32).repeat_interleave(10)
    buckets = torch.arange(320) % 2
    early = list(itertools.chain(*take(40, 320, 2, seed=0, buckets=buckets, shards=shards)))
    assert len({int(shards[i]) for i in early}) <= 2 * MIXED
