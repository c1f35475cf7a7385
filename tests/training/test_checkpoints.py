"""Checkpoints keep the work: a damaged file, a full disk or a kill at any moment costs a few steps at most."""

import dataclasses
import errno
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

from ldm.training.loop import train
from tests.training.test_loop import CONFIG, RECIPE, Colors, Toy, kill, rows, saved, steps_saved, weights

LAST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
STRAIGHT = dataclasses.replace(CONFIG, checkpoint_every=1)


def stopped(out):
    """A run that was stopped in step 5. It has checkpoints of the steps 3 and 4."""
    with pytest.raises(SystemExit):
        train(Toy({5: kill}), Colors(), STRAIGHT, out, RECIPE)
    return out


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """Change one bit of a weight, which leaves the file readable."""
    weight = torch.load(path, weights_only=True)["objective"]["net.weight"].numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(weight) + 5] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_exactly_from_the_one_before(damage, tmp_path):
    expected = train(Toy(), Colors(), STRAIGHT, tmp_path / "a", RECIPE)
    out = stopped(tmp_path / "b")
    damage(out / LAST)
    resumed = Toy()
    with pytest.warns(UserWarning, match=rf"the checkpoint {out / LAST} is damaged \(.+\), so the one before is used"):
        average = train(resumed, Colors(), STRAIGHT, out, RECIPE)
    assert resumed.calls == 3  # steps 4, 5, 6
    assert torch.equal(weights(average), weights(expected))
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4, 5, 6]


def test_a_run_whose_checkpoints_are_all_damaged_is_an_error_that_touches_nothing(tmp_path):
    out = stopped(tmp_path)
    cut(out / LAST)
    cut(out / PREVIOUS)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(
            ValueError, match=r"all checkpoints of the run in .* are damaged: choose another `out`, or delete"
        ),
    ):
        train(Toy(), Colors(), STRAIGHT, out, RECIPE)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    expected = train(Toy(), Colors(), STRAIGHT, tmp_path / "a", RECIPE)

    def replace(source, target):
        real(source, target)
        if target == tmp_path / "b" / PREVIOUS and torch.load(target, weights_only=True)["step"] == 3:
            kill()

    real = os.replace
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(SystemExit):
        train(Toy(), Colors(), STRAIGHT, tmp_path / "b", RECIPE)
    monkeypatch.undo()
    assert not (tmp_path / "b" / LAST).exists()
    resumed = Toy()
    average = train(resumed, Colors(), STRAIGHT, tmp_path / "b", RECIPE)
    assert resumed.calls == 3  # step 4 was done, but its checkpoint had no name yet
    assert torch.equal(weights(average), weights(expected))


def test_what_a_killed_process_left_is_removed_and_the_checkpoint_stays(tmp_path):
    out = stopped(tmp_path)
    left = out / ".checkpoint.pt.1.new"
    left.write_bytes(b"half of a checkpoint")
    train(Toy(), Colors(), STRAIGHT, out, RECIPE)
    assert not left.exists()
    assert steps_saved(out) == 6


def test_a_full_disk_stops_the_run_with_the_last_checkpoint_intact(tmp_path, monkeypatch):
    """The space ends in the middle of the fourth checkpoint."""
    expected = train(Toy(), Colors(), STRAIGHT, tmp_path / "a", RECIPE)

    def full(state, file):
        if state["step"] == 4:
            file.write(b"the first bytes")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        real(state, file)

    real, out = torch.save, tmp_path / "b"
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(Toy(), Colors(), STRAIGHT, out, RECIPE)
    monkeypatch.undo()
    assert steps_saved(out) == 3
    assert sorted(path.name for path in out.iterdir()) == [PREVIOUS, LAST, "log.jsonl", "samples"]
    assert torch.equal(weights(train(Toy(), Colors(), STRAIGHT, out, RECIPE)), weights(expected))


def test_a_write_that_the_system_refuses_is_an_oserror_and_leaves_the_last_checkpoint(tmp_path):
    """The largest size of a file ends the write inside torch.save, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    lower = Toy({5: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))})
    try:
        with pytest.raises(OSError, match="File too large"):
            train(lower, Colors(), CONFIG, tmp_path, RECIPE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert steps_saved(tmp_path) == 4


@pytest.mark.slow
def test_sigterm_saves_what_sigkill_loses(tmp_path):
    code = """
import os, pathlib, signal, sys
from ldm.training.loop import train
from tests.training.test_loop import CONFIG, RECIPE, Colors, Toy
number = int(sys.argv[2])
train(Toy({5: lambda: os.kill(os.getpid(), number)}), Colors(), CONFIG, pathlib.Path(sys.argv[1]), RECIPE)
"""
    expected = train(Toy(), Colors(), CONFIG, tmp_path / "a", RECIPE)
    for number, done in ((signal.SIGTERM, 5), (signal.SIGKILL, 4)):
        out = tmp_path / str(done)
        words = [sys.executable, "-c", code, str(out), str(int(number))]
        threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # more threads add in another order
        assert subprocess.run(words, env=threads, capture_output=True, timeout=120).returncode != 0
        assert steps_saved(out) == done
        assert torch.equal(weights(train(Toy(), Colors(), CONFIG, out, RECIPE)), weights(expected))


def test_both_kept_checkpoints_are_the_last_two(tmp_path):
    train(Toy(), Colors(), CONFIG, tmp_path, RECIPE)
    assert steps_saved(tmp_path) == 6
    assert torch.load(tmp_path / PREVIOUS, weights_only=True)["step"] == 4
    assert saved(tmp_path)["recipe"] == RECIPE
