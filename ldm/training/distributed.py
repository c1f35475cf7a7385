"""Several processes, started by torchrun, that train together. Without torchrun there is one, and nothing to do."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(hours=2)  # for one process that encodes or saves while the others wait


class NotFirstProcess(SystemExit):
    """The training has ended in a process that is not the first one: it may end, and the first one saves the result."""


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the processes of torchrun within the block; yield the device of this process.

    Processes on GPUs have one each and talk by NCCL; those on the CPU talk by gloo.
    """
    if _started() == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store, number, count = next(rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(count):
        # torchrun keeps its store when it starts the processes again: they would find the addresses of dead ones
        store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    yield device
    dist.destroy_process_group()  # not after an error: other processes may wait for this one


def _started() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun


def rank() -> int:
    """Return the number of this process; the first one is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def check_batch(batch_size: int) -> None:
    """Raise ValueError unless all processes have joined, and a batch has equal parts for them."""
    if _started() != ranks():
        raise ValueError("torchrun started this process: train within `with ldm.training.distributed.joined(device)`")
    if batch_size % ranks():
        raise ValueError(f"batch_size must be a multiple of the {ranks()} processes, got {batch_size}")


def wait_for_all() -> None:
    """Return when all processes have come here."""
    if ranks() > 1:
        dist.barrier()


@contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process run the block before the others, which then find the files that it has written."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0:
        wait_for_all()


def any_process(flags: list[bool], device: torch.device) -> list[bool]:
    """Tell of each flag if it is true in any process."""
    if ranks() == 1:
        return flags
    found = torch.tensor(flags, dtype=torch.uint8, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def mean_of_all(values: dict[str, Tensor]) -> dict[str, float]:
    """Return the mean of each scalar over all processes."""
    if ranks() == 1:
        return {name: value.item() for name, value in values.items()}
    stacked = torch.stack([value.detach().float() for value in values.values()])
    dist.all_reduce(stacked)
    return dict(zip(values, (stacked / ranks()).tolist(), strict=True))


def from_all(item: Any) -> list[Any]:
    """Return the item of each process."""
    found = [item] * ranks()
    if ranks() > 1:
        dist.all_gather_object(found, item)
    return found


class Replicated:
    """Every process has all weights. The gradients are means over all processes (Li et al. 2020), if there are some."""

    def __init__(self, objective: nn.Module) -> None:
        """Parameters without a gradient are found in each step.

        The order of the sums is then the same from the first step on, so that a resumed run is exact.
        """
        self.network = objective  # to be called with a batch
        if ranks() > 1:
            self.network = DistributedDataParallel(objective, find_unused_parameters=True)

    def synchronized(self, last: bool) -> AbstractContextManager[None]:
        """Return the context of one batch: gradients are exchanged with the last one of a step."""
        if isinstance(self.network, DistributedDataParallel) and not last:
            return self.network.no_sync()
        return nullcontext()

    def sampling(self) -> AbstractContextManager[bool]:
        """Return the context of making sample pictures. Its value tells if this process makes them."""
        return nullcontext(rank() == 0)

    def result(self, trained: nn.Module) -> nn.Module:
        """Return the trained networks with all their weights."""
        return trained
