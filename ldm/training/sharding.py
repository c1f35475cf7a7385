"""Training of networks that are too large for one GPU: their weights are split among all processes (FSDP2).

Zhao et al. 2023. torch.distributed.checkpoint writes the checkpoints as folders: each process writes its part, and
any number of processes can read them.
"""

import copy
import json
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ldm.training.checkpoints import Checkpoints, learned
from ldm.training.distributed import Replicated, from_all, rank, ranks, wait_for_all
from ldm.training.recompute import BLOCKS

SEPARATOR = "/"  # between the name of a parameter and that of its state in the optimizer
CHUNK = 2**24  # bytes


class Sharded(Replicated):
    """Every process has a part of the trainable weights, of their gradients, averages and optimizer's state."""

    def __init__(self, objective: nn.Module, trained: nn.Module) -> None:
        """Split the trainable parameters of `objective`; fixed networks stay whole. `trained` is a part of it."""
        self.network = objective
        self.skeleton = _skeleton(trained)
        fixed = {p for p in objective.parameters() if not p.requires_grad}
        mesh = init_device_mesh(next(objective.parameters()).device.type, (ranks(),))
        for part in [*(part for part in objective.modules() if isinstance(part, BLOCKS)), objective]:
            if any(p.requires_grad for p in part.parameters()):
                fully_shard(part, mesh=mesh, ignored_params=fixed)
        self.parts = [part for part in objective.modules() if isinstance(part, FSDPModule)]

    @contextmanager
    def synchronized(self, last: bool) -> Iterator[None]:
        """Exchange gradients with the last batch of a step only."""
        assert isinstance(self.network, FSDPModule)
        self.network.set_requires_gradient_sync(last)
        yield

    @contextmanager
    def sampling(self) -> Iterator[bool]:
        """Hold all weights in every process within the block. All processes make the pictures."""
        for part in self.parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        yield True
        for part in self.parts:
            part.reshard()
            part.set_reshard_after_forward(part is not self.network, recurse=False)

    def result(self, trained: nn.Module) -> nn.Module:
        """Return the trained networks with all their weights, in main memory."""
        parts = {name: p.detach() for name, p in trained.named_parameters()}
        full = {name: p.full_tensor().cpu() for name, p in parts.items() if isinstance(p, DTensor)}
        self.skeleton.load_state_dict(full, strict=False, assign=True)
        return self.skeleton


def _skeleton(network: nn.Module) -> nn.Module:
    """Copy a network without the values of its trainable parameters; the others are shared."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in network.parameters() if p.requires_grad}
    return copy.deepcopy(network, {id(p): p for p in network.parameters()} | empty)


class FolderCheckpoints(Checkpoints):
    """The last two checkpoints of a run, as folders to which every process writes its part."""

    names = ("checkpoint", "checkpoint.previous")

    def save(self, step: int) -> None:
        """Write a checkpoint. It takes the place of the last one, which takes the place of the one before."""
        new = self.out / ".checkpoint.new"
        if rank() == 0:
            shutil.rmtree(new, ignore_errors=True)
        wait_for_all()
        state_dict_saver.save(self._state(), checkpoint_id=new)
        files = sorted(new.glob(f"__{rank()}_*")) + [new / ".metadata"] * (rank() == 0)
        found = from_all({file.name: _crc(file) for file in files})
        if rank() == 0:
            sums = {name: number for part in found for name, number in part.items()}
            about = {"step": step, "recipe": self.recipe, "crc32": sums}
            (new / "run.json").write_text(json.dumps(about), encoding="utf-8")
            self._rotate(new)
        wait_for_all()

    def _state(self) -> dict[str, Any]:
        (optimizer,) = self.optimizers  # as for all of SPLITTABLE
        moments = {
            f"{name}{SEPARATOR}{key}": value
            for name, p in self.objective.named_parameters()
            for key, value in optimizer.state.get(p, {}).items()
            if isinstance(value, Tensor)
        }
        return {"objective": learned(self.objective), "average": self.average.values, "optimizer": moments}

    def _verify(self, path: Path) -> None:
        sums = _about(path)["crc32"]
        for name in sorted(sums)[rank() :: ranks()]:
            if _crc(path / name) != sums[name]:
                raise ValueError(f"{name} has a wrong checksum")

    def _read(self, path: Path) -> dict[str, Any]:
        return _about(path) | {"path": path}

    def _restore(self, about: dict[str, Any]) -> None:
        """Load the tensors in place. A parameter that never had a gradient has no state in the optimizer."""
        (optimizer,) = self.optimizers
        parameters = dict(self.objective.named_parameters())
        for saved in FileSystemReader(about["path"]).read_metadata().state_dict_metadata:
            if saved.startswith("optimizer."):
                name, key = saved.removeprefix("optimizer.").split(SEPARATOR)
                p = parameters[name]
                value = torch.zeros((), device=p.device) if key == "step" else torch.zeros_like(p.detach())
                optimizer.state[p][key] = value
        state_dict_loader.load(self._state(), checkpoint_id=about["path"])


def _about(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "run.json").read_text(encoding="utf-8"))
    return found


def _crc(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found = zlib.crc32(chunk, found)
    return found
