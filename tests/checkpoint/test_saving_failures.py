"""A kill or a full disk while a model is saved over another: what was there stays, whole, and can be saved over."""

import errno
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ldm.checkpoint import tensors as module
from ldm.checkpoint.files import load, save
from ldm.checkpoint.parts import Model

FILES = {"ldm": 1, "diffusers": 3}  # safetensors files of a layout
KILLS = 4  # at random moments

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes to kill")


@pytest.fixture(params=FILES)
def layout(request) -> str:
    return request.param


@pytest.fixture
def saved(layout, small, tmp_path) -> Path:
    """A saved model, alone in its folder, that the other is to be saved over."""
    save(small, tmp_path / "model", layout=layout)
    return tmp_path / "model"


@pytest.fixture(scope="module")
def other(small_folder) -> Model:
    """A model like `small` with other numbers."""
    model = load(small_folder)
    for network in model[1:4]:
        for parameter in network.parameters():
            parameter.neg_()
    return model


def forked(run: Callable[[], None]) -> int:
    """Start `run` in a copy of this process and return its number; it ends with 1 after an exception."""
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def ended(child: int) -> int:
    """Wait for a process; return its exit status, or the negative signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_itself(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def same(one: Model, two: Model) -> bool:
    pairs = zip(one[1:4], two[1:4], strict=True)
    states = [(a.state_dict(), b.state_dict()) for a, b in pairs]
    return all(torch.equal(a[name], b[name]) for a, b in states for name in a)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Failing:
    """In place of `save_file`: writes the file of number `at` by half, and then does `fail`."""

    def __init__(self, at: int, fail: Callable[[], None]) -> None:
        self.at, self.fail = at, fail

    def __call__(self, tensors, path, metadata=None) -> None:
        save_file(tensors, path, metadata)
        self.at -= 1
        if self.at == 0:
            os.truncate(path, path.stat().st_size // 2)
            self.fail()


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True], ids=["first file", "last file"])
def test_a_kill_while_writing_leaves_the_old_model_and_does_not_disturb_the_next_save(
    layout, last, saved, small, other, monkeypatch
):
    monkeypatch.setattr(module, "save_file", Failing(FILES[layout] if last else 1, kill_itself))
    child = forked(lambda: save(other, saved, layout=layout, overwrite=True))
    assert ended(child) == -signal.SIGKILL
    monkeypatch.undo()
    assert names(saved.parent) == [f".model.{child}.new", "model"]
    assert same(load(saved), small)
    with pytest.raises(ValueError, match=r"is not a model folder, it has no model_index\.json"):
        load(saved.parent)

    monkeypatch.setattr(os, "getpid", lambda: child)  # numbers of processes are used again
    save(other, saved, layout=layout, overwrite=True)
    assert names(saved.parent) == ["model"]
    assert same(load(saved), other)


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_one_of_two_models(layout, saved, small, other):
    def alternate() -> None:
        while True:
            save(other, saved, layout=layout, overwrite=True)
            save(small, saved, layout=layout, overwrite=True)

    moments = random.Random(0)
    for _ in range(KILLS):
        child = forked(alternate)
        time.sleep(moments.uniform(0.05, 0.5))
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        found = load(saved)
        assert same(found, small) or same(found, other)


def test_a_file_that_the_disk_has_no_room_for_leaves_the_old_model_and_no_litter(layout, saved, small, other, tmp_path):
    said = tmp_path / "said"

    def save_it() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))  # the model has 6 MB and more
        try:
            save(other, saved, layout=layout, overwrite=True)
        except OSError as error:
            said.write_text(f"{error.errno} {error}")

    assert ended(forked(save_it)) == 0
    assert said.read_text().startswith(f"{errno.EFBIG} [Errno {errno.EFBIG}] File too large: '")
    said.unlink()
    assert names(tmp_path) == ["model"]
    assert same(load(saved), small)


@pytest.mark.parametrize("last", [False, True], ids=["first file", "last file"])
def test_a_full_disk_leaves_the_old_model_and_no_litter(layout, last, saved, small, other, monkeypatch):
    def full() -> None:  # in safetensors' words
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", Failing(FILES[layout] if last else 1, full))
    with pytest.raises(OSError, match=r"No space left on device: '.*model.*new") as caught:
        save(other, saved, layout=layout, overwrite=True)
    assert caught.value.errno == errno.ENOSPC
    assert "\n" not in str(caught.value)
    assert names(saved.parent) == ["model"]
    assert same(load(saved), small)


@pytest.mark.slow
def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(small, other, tmp_path, monkeypatch):
    save(small, tmp_path / "model")
    (tmp_path / "model/README.md").write_text("a model card")
    rename = Path.rename

    def refuse(self, target):
        if self.name.endswith(".new"):
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    with monkeypatch.context() as refusing:
        refusing.setattr(Path, "rename", refuse)
        with pytest.raises(PermissionError):
            save(other, tmp_path / "model", overwrite=True)
    assert names(tmp_path) == ["model"]
    assert same(load(tmp_path / "model"), small)

    save(other, tmp_path / "model", overwrite=True)
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model/README.md").read_text() == "a model card"
    assert same(load(tmp_path / "model"), other)
