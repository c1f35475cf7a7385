"""The log of a run: lines of JSON, a progress bar with the time that is left, and TensorBoard if it is asked for."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.training.distributed import rank


class Log:
    """Within `with`, takes the values of the steps. Only the first process writes."""

    def __init__(self, out: Path, start: int, steps: int, *, tensorboard: bool) -> None:
        """Go on after step `start` of `steps`. Raises ValueError if TensorBoard is asked for and not installed."""
        if tensorboard and find_spec("tensorboard") is None:
            raise ValueError(
                "tensorboard = true needs TensorBoard, which is not installed: install the extra with "
                "pip install 'ldm[tensorboard]', or leave the line out"
            )
        self.out, self.start, self.steps, self.tensorboard = out, start, steps, tensorboard

    def __enter__(self) -> "Log":
        first = rank() == 0
        self.progress = tqdm(total=self.steps, initial=self.start, unit="step", disable=None if first else True)
        self.file = (self.out / "log.jsonl").open("a", encoding="utf-8") if first else None
        self.board: Any = None
        if first and self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.start + 1)
        return self

    def __exit__(self, *reason: Any) -> None:
        for part in (self.progress, self.file, self.board):
            if part is not None:
                part.close()

    def advance(self) -> None:
        """Count a step."""
        self.progress.update()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step, with six digits."""
        if self.file is None:
            return
        self.file.write(json.dumps({k: float(f"{v:.6g}") for k, v in values.items()} | {"step": step}) + "\n")
        self.file.flush()
        self.progress.set_postfix(loss=f"{values['loss']:.4f}")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()
