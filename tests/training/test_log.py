"""The log: lines of JSON that keep the number of the step, and TensorBoard on request."""

import dataclasses
import sys
from types import ModuleType
from typing import ClassVar

import pytest

from ldm.training import log
from ldm.training.log import Log
from ldm.training.loop import train
from tests.training.test_loop import CONFIG, RECIPE, Colors, Toy, kill, rows

BOARD = dataclasses.replace(CONFIG, tensorboard=True)


class Writer:
    """Stands for TensorBoard's SummaryWriter, which the tests do not need to be installed."""

    made: ClassVar = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars = folder, purge_step, []
        self.open = True
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        assert self.open
        self.scalars.append((name, step, value))

    def flush(self):
        pass

    def close(self):
        self.open = False


@pytest.fixture
def writers(monkeypatch):
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(log, "find_spec", lambda name: name)
    monkeypatch.setattr(Writer, "made", [])
    return Writer.made


def test_tensorboard_gets_the_values_of_the_log_and_a_resumed_run_replaces_later_ones(writers, tmp_path):
    with pytest.raises(SystemExit):
        train(Toy({6: kill}), Colors(), BOARD, tmp_path, RECIPE)
    train(Toy(), Colors(), BOARD, tmp_path, RECIPE)
    first, second = writers
    assert first.folder == second.folder == str(tmp_path / "tensorboard")
    assert (first.purge_step, second.purge_step) == (1, 5)
    assert not first.open
    assert not second.open
    assert {step for _, step, _ in second.scalars} == {5, 6}
    row = rows(tmp_path)[-1]
    last = {name: value for name, step, value in second.scalars if step == 6}
    assert last.keys() | {"step"} == row.keys()
    assert all(row[name] == pytest.approx(value, rel=1e-5) for name, value in last.items())


def test_tensorboard_that_is_not_installed_is_named_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "find_spec", lambda name: None)
    toy = Toy()
    with pytest.raises(
        ValueError, match=r"needs TensorBoard, which is not installed: .* pip install 'ldm\[tensorboard\]'"
    ):
        train(toy, Colors(), BOARD, tmp_path, RECIPE)
    assert toy.calls == 0


def test_large_numbers_of_steps_are_written_exactly(tmp_path):
    with Log(tmp_path, 1_234_566, 2_000_000, tensorboard=False) as lines:
        lines.write(1_234_567, {"loss": 0.123456789})
    assert rows(tmp_path) == [{"loss": 0.123457, "step": 1_234_567}]
