"""Two and three processes on the CPU, started by torchrun, train as one process does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ldm.training import distributed
from ldm.training.distributed import check_batch, joined
from ldm.training.loop import LoopConfig
from tests.training import ranks
from tests.training.test_loop import rows

ROOT = Path(__file__).parent.parent.parent
WAYS = ("ddp", "fsdp")


def command(out, processes, *settings, restarts=0):
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        f"--max-restarts={restarts}",
    ]
    return [sys.executable, *words, str(Path(ranks.__file__)), str(out), *settings]


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(out, processes, *settings, restarts=0):
    words = command(out, processes, *settings, restarts=restarts)
    return subprocess.run(words, capture_output=True, text=True, timeout=600, env=environment())


def run(out, processes, *settings, restarts=0):
    result = torchrun(out, processes, *settings, restarts=restarts)
    assert result.returncode == 0, result.stderr
    return torch.load(out / "result.pt", weights_only=True)


def alone(out):
    ranks.main(out, [])
    return torch.load(out / "result.pt", weights_only=True)


def losses(out):
    return [row["loss"] for row in rows(out)]


def check_near(found, expected):
    """Sums of gradients have another order. Adam's first steps enlarge the differences of small gradients."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-4, msg=name)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    return out, alone(out)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_the_losses_and_the_result_are_those_of_one_process_with_the_same_batch(one, way, processes, tmp_path):
    out, expected = one
    check_near(run(tmp_path, processes, f'parallel="{way}"'), expected)
    assert losses(tmp_path) == pytest.approx(losses(out), rel=2e-4)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]  # one process writes
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-000003.png", "step-000006.png"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_killed_process_is_started_again_by_torchrun_and_the_run_goes_on_exactly(way, tmp_path):
    expected = run(tmp_path / "a", 3, f'parallel="{way}"')
    found = run(tmp_path / "b", 3, f'parallel="{way}"', "kill=4", restarts=1)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_of_two_processes_goes_on_with_three_and_then_with_one(one, way, tmp_path):
    out, expected = one
    assert torchrun(tmp_path, 2, f'parallel="{way}"', "kill=3").returncode != 0
    assert torchrun(tmp_path, 3, f'parallel="{way}"', "kill=3").returncode != 0  # in its third step
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    ranks.main(tmp_path, [f'parallel="{way}"'])
    check_near(torch.load(tmp_path / "result.pt", weights_only=True), expected)
    assert losses(tmp_path) == pytest.approx(losses(out), rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_sigterm_to_torchrun_saves_one_step_in_all_processes(way, tmp_path):
    setting = f'parallel="{way}"'
    process = subprocess.Popen(
        command(tmp_path, 2, setting, "steps=100000", "checkpoint_every=100000", "sample_every=100000"),
        env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = tmp_path / "log.jsonl"
    while not (log.is_file() and len(log.read_text().splitlines()) > 2):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    done = len(log.read_text().splitlines())
    assert f"training stopped after step {done} of 100000, saved in {tmp_path}" in error
    if way == "ddp":
        assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == done
    else:
        assert json.loads((tmp_path / "checkpoint" / "run.json").read_text())["step"] == done


@pytest.mark.slow
def test_a_damaged_part_of_a_folder_is_found_and_the_checkpoint_before_is_used(tmp_path):
    expected = run(tmp_path / "a", 2, 'parallel="fsdp"')
    out = tmp_path / "b"
    assert torchrun(out, 2, 'parallel="fsdp"', "kill=5").returncode != 0
    part = next((out / "checkpoint").glob("__1_*"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    result = torchrun(out, 2, 'parallel="fsdp"')
    assert result.returncode == 0, result.stderr
    assert f"the checkpoint {out / 'checkpoint'} is damaged" in result.stderr
    found = torch.load(out / "result.pt", weights_only=True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_stops_all_and_its_pictures_are_named(tmp_path):
    result = torchrun(tmp_path, 2, "spoil=3")
    assert result.returncode != 0
    messages = [line for line in result.stderr.splitlines() if "the loss of step 3 is not finite" in line]
    assert len(messages) == 2
    assert messages[0].count("number") == 6  # two batches of three pictures
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


def test_without_torchrun_there_is_one_process_and_its_device_stays(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(torch.device("cuda")) as device:
        assert device == torch.device("cuda")
        assert (distributed.rank(), distributed.ranks()) == (0, 1)
    check_batch(7)


def test_a_process_of_torchrun_that_has_not_joined_and_parts_that_are_not_equal_are_errors(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"train within `with ldm\.training\.distributed\.joined\(device\)`"):
        check_batch(4)
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 2 processes, got 3"):
        check_batch(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "muon"}, "parallel = 'fsdp' needs one of the optimizers adamw, adam, sgd, got muon"),
        ({"fp16": True}, "parallel = 'fsdp' works with bf16, and fp16 was asked for"),
        ({"parallel": "tensor"}, "parallel must be one of ddp, fsdp, got 'tensor'"),
    ],
)
def test_what_does_not_work_with_split_weights_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LoopConfig(**{"steps": 300, "parallel": "fsdp"} | change)
