"""The loop: resuming is exact, schedules are what they say, and nothing of a run is overwritten."""

import dataclasses
import json
import math

import pytest
import torch
from PIL import Image
from torch import nn

from ldm.training.loop import LoopConfig, Objective, learning_rate, train

CONFIG = LoopConfig(
    steps=6, batch_size=2, learning_rate=1e-2, warmup=2, ema=0.9, log_every=1, sample_every=3,
    checkpoint_every=2,
)  # fmt: skip


class Colours:
    """Ten pictures of one colour each."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.full((3, 4, 4), 25 * index, dtype=torch.uint8), f"colour {index}"


class Toy(Objective):
    """Fit noisy images by a convolution; uses dropout, data and random numbers."""

    def __init__(self, fail_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Conv2d(3, 3, 3, padding=1)
        self.fail_at, self.calls, self.seen = fail_at, 0, []

    @property
    def trained(self):
        return self.net

    def forward(self, batch):
        images, captions = batch
        self.calls += 1
        self.seen.append(captions)
        if self.calls == self.fail_at:
            raise KeyboardInterrupt  # a kill, at the worst of times
        loss = (self.trained(images + torch.randn_like(images)) - images).square().mean()
        return loss, {"loss_again": loss}

    def sample(self, trained, batch):
        return trained(batch[0])


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_a_run_that_was_killed_and_resumed_equals_one_that_was_not_bit_for_bit(tmp_path):
    straight = Toy()
    expected = train(straight, Colours(), CONFIG, tmp_path / "a", "r")

    killed = Toy(fail_at=6)  # steps 1-4 are safe in a checkpoint, step 5 is lost with it
    with pytest.raises(KeyboardInterrupt):
        train(killed, Colours(), CONFIG, tmp_path / "b", "r")
    resumed = Toy()
    average = train(resumed, Colours(), CONFIG, tmp_path / "b", "r")

    assert resumed.calls == 2  # only what was after the last checkpoint
    assert torch.equal(weights(resumed.trained), weights(straight.trained))
    assert torch.equal(weights(average), weights(expected))
    logs = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in "ab"]
    assert [row["step"] for row in logs[1]] == [1, 2, 3, 4, 5, 6]  # no step twice
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]


def test_a_finished_run_does_not_train_again_and_gives_its_average(tmp_path):
    expected = train(Toy(), Colours(), CONFIG, tmp_path, "r")
    again = Toy()
    assert torch.equal(weights(train(again, Colours(), CONFIG, tmp_path, "r")), weights(expected))
    assert again.calls == 0


def test_a_folder_with_another_recipes_run_is_left_alone(tmp_path):
    train(Toy(), Colours(), CONFIG, tmp_path, "one recipe")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="holds a run of another recipe, at step 6: choose another"):
        train(Toy(), Colours(), CONFIG, tmp_path, "another recipe")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_kill_while_writing_a_checkpoint_keeps_the_one_before(tmp_path, monkeypatch):
    real = torch.save

    def torn(state, path):
        real(state, path)
        if state["step"] == 4:
            path.write_bytes(path.read_bytes()[:100])
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        train(Toy(), Colours(), CONFIG, tmp_path, "r")
    monkeypatch.undo()
    resumed = Toy()
    train(resumed, Colours(), CONFIG, tmp_path, "r")
    assert resumed.calls == 4  # from step 2


def test_accumulated_batches_equal_one_batch_of_their_sum(tmp_path):
    class Plain(Toy):
        def forward(self, batch):
            loss = (self.trained(batch[0]) - batch[0]).square().mean()
            return loss, {}

    whole, parts = Plain(), Plain()
    train(whole, Colours(), dataclasses.replace(CONFIG, batch_size=4), tmp_path / "a", "r")
    train(parts, Colours(), dataclasses.replace(CONFIG, accumulate=2), tmp_path / "b", "r")
    # a mean of means of equal sizes is the mean; only the order of sums differs
    torch.testing.assert_close(weights(whole.trained), weights(parts.trained), rtol=1e-4, atol=1e-5)


def test_every_example_is_seen_once_an_epoch_in_a_seeded_order(tmp_path):
    toy = Toy()
    train(toy, Colours(), dataclasses.replace(CONFIG, steps=10), tmp_path, "r")
    seen = [caption for captions in toy.seen for caption in captions]
    assert sorted(seen[:10]) == sorted(seen[10:]) == [f"colour {i}" for i in range(10)]
    assert seen[:10] != seen[10:]


def test_worker_processes_change_nothing_but_speed(tmp_path):
    expected = train(Toy(), Colours(), CONFIG, tmp_path / "a", "r")
    workers = dataclasses.replace(CONFIG, workers=1)
    got = train(Toy(), Colours(), workers, tmp_path / "b", "r")
    assert torch.equal(weights(got), weights(expected))


def test_the_learning_rate_warms_up_then_falls_to_zero_as_a_cosine():
    config = LoopConfig(steps=110, warmup=10, learning_rate=2.0)
    assert [learning_rate(s, config) for s in (0, 4, 9, 10)] == [0.2, 1.0, 2.0, 2.0]
    assert math.isclose(learning_rate(60, config), 1.0)
    assert learning_rate(110, config) < 1e-12


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    class Broken(Toy):
        def forward(self, batch):
            loss, logs = super().forward(batch)
            return loss * (float("nan") if self.calls == 4 else 1), logs

    with pytest.raises(FloatingPointError, match="gradient of step 3 is not finite: lower"):
        train(Broken(), Colours(), CONFIG, tmp_path, "r")
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


def test_samples_and_a_log_are_written_as_it_goes(tmp_path):
    train(Toy(), Colours(), CONFIG, tmp_path, "r")
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "step-000003.png", "step-000006.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "samples" / "step-000006.png") as grid:
        assert grid.size == (8, 4)  # two pictures of 4 pixels
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert {"step", "loss", "loss_again", "grad_norm", "lr", "step_seconds"} == set(row)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"warmup": 6}, r"warmup must be in 0 \.\. steps - 1, got 6 of 6"),
        ({"ema": 1.0}, "ema must be in 0 <= ema < 1"),
    ],
)
def test_a_bad_loop_configuration_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
