"""What a resumed run needs, on disk: the trainable parameters, their average, the optimizers' state, the recipe."""

import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ldm.atomic import beside
from ldm.training.average import Average
from ldm.training.distributed import any_process, rank, wait_for_all

FORMATS = {"checkpoint.pt": "ddp", "checkpoint": "fsdp"}  # the last checkpoint of a run with this value of `parallel`


class Checkpoints:
    """The last two checkpoints of a run, as files that the first process writes."""

    names = ("checkpoint.pt", "checkpoint.previous.pt")  # the last one first

    def __init__(
        self,
        out: Path,
        recipe: Mapping[str, object],
        objective: nn.Module,
        average: Average,
        optimizers: list[Optimizer],
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Hold what is saved. recipe: the values that a run must keep; see `ldm.training.loop.train`."""
        self.out, self.recipe = out, json.loads(json.dumps(recipe))
        self.objective, self.average, self.optimizers, self.scaler = objective, average, optimizers, scaler

    def save(self, step: int) -> None:
        """Write a checkpoint. It takes the place of the last one, which takes the place of the one before.

        Raises OSError if the disk is full; both checkpoints stay then.
        """
        if rank() > 0:
            return
        state = {
            "step": step,
            "recipe": self.recipe,
            "objective": learned(self.objective),
            "average": self.average.values,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
        }
        with beside(self.out / self.names[0]) as new:
            with new.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())  # before the name: a power failure must not leave an empty file
            self._rotate(new)

    def _rotate(self, new: Path) -> None:
        last, previous = (self.out / name for name in self.names)
        if last.exists():
            if previous.is_dir():
                shutil.rmtree(previous)
            os.replace(last, previous)
        os.replace(new, last)

    def resume(self) -> int:
        """Load the run's last checkpoint, or the one before if it is damaged. Return the number of steps done.

        Later lines of the log are removed. Warns if a checkpoint is damaged. Raises ValueError if all checkpoints are
        damaged, or if the run has another recipe.
        """
        device = next(self.objective.parameters()).device
        paths = [path for path in (self.out / name for name in self.names) if path.exists()]
        for name, parallel in FORMATS.items():
            if name not in self.names and (self.out / name).exists():
                raise ValueError(
                    f"the run in {self.out} has parallel = {parallel!r}: keep this value, or choose another `out`"
                )
        wait_for_all()  # before the first process removes or writes
        if rank() == 0:
            for left in self.out.glob(".checkpoint*.new"):  # by a process that was killed while writing
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        for path in paths:
            reason = ""
            try:
                self._verify(path)
            except Exception as error:  # damage has many faces
                reason = str(error) or type(error).__name__
            if any_process([bool(reason)], device) == [True]:
                warnings.warn(f"the checkpoint {path} is damaged ({reason}), so the one before is used", stacklevel=2)
                continue
            state = self._read(path)
            self._check(state)
            self._restore(state)
            self._cut_log(state["step"])
            return int(state["step"])
        if paths:
            raise ValueError(
                f"all checkpoints of the run in {self.out} are damaged: choose another `out`, or delete them"
            )
        self._cut_log(0)
        return 0

    def _check(self, state: Mapping[str, Any]) -> None:
        changes = _changes(state["recipe"], self.recipe)
        if changes:
            raise ValueError(
                f"{self.out} holds a run of another recipe, at step {state['step']}: {changes}; undo the change, or "
                "choose another `out`"
            )

    def _verify(self, path: Path) -> None:
        """Raise any exception if the checkpoint is damaged."""
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()  # compares checksums, which torch.load does not
        if bad is not None:
            raise ValueError(f"{bad} has a wrong checksum")

    def _read(self, path: Path) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        for name, value in learned(self.objective).items():
            if name == "_extra_state":  # torch's name for what a module keeps beside its tensors
                self.objective.set_extra_state(state["objective"][name])
            else:
                value.copy_(state["objective"][name])
        for name, value in self.average.values.items():
            value.copy_(state["average"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])

    def _cut_log(self, step: int) -> None:
        """Remove the lines of later steps from the log, and a line that was not written to its end."""
        log = self.out / "log.jsonl"
        if rank() > 0 or not log.is_file():
            return
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        with beside(log) as new:
            new.write_text("".join(kept), encoding="utf-8")
            os.replace(new, log)


def learned(objective: nn.Module) -> dict[str, Any]:
    """Return the state of `objective` without the parameters that are not trained; each one that is trained once."""
    left_out = {name for name, _ in objective.named_parameters(remove_duplicate=False)}
    left_out -= {name for name, p in objective.named_parameters() if p.requires_grad}
    return {name: value for name, value in objective.state_dict().items() if name not in left_out}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name up to five values that differ, with both values; a value that is absent counts as None."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    shown = [f"{name} was {before.get(name)!r} and is now {now.get(name)!r}" for name in names[:5]]
    return ", ".join(shown + [f"and {len(names) - 5} more values differ"] * (len(names) > 5))
