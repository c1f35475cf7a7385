"""The loop: a resumed run is exact, the log and the schedule are right, and no run is overwritten."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
import threading

import pytest
import torch
from PIL import Image
from torch import nn

from ldm.training import loop
from ldm.training.loop import Interrupted, LoopConfig, Objective, learning_rate, train

CONFIG = LoopConfig(
    steps=6, batch_size=2, learning_rate=1e-2, warmup=2, ema=0.9, log_every=1, sample_every=3,
    checkpoint_every=2,
)  # fmt: skip
RECIPE = {"data.size": 4, "loop.batch_size": 2, "unet.channels": [8, 16]}


class Colors:
    """Ten pictures of one color each."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.full((3, 4, 4), 25 * index, dtype=torch.uint8), self.caption(index)

    def caption(self, index):
        return f"color {index}"


class Toy(Objective):
    """Fit noisy images by a convolution. `at`: what happens at each call of `forward`, by its number."""

    def __init__(self, at=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Conv2d(3, 3, 3, padding=1)
        self.at, self.calls, self.seen = at or {}, 0, []

    @property
    def trained(self):
        return self.net

    def forward(self, batch):
        images, captions = batch
        self.calls += 1
        self.seen.append(captions)
        if self.calls in self.at:
            self.at[self.calls]()
        loss = (self.trained(images + torch.randn_like(images)) - images).square().mean()
        return loss, {"loss_again": loss}

    def sample(self, batch):
        return self.trained(batch[0])


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def kill():
    raise SystemExit


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def saved(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def steps_saved(out):
    return saved(out)["step"]


def tensors(state):
    """All tensors of a checkpoint, by their place in it."""
    if isinstance(state, dict | list):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {f"{key}.{rest}": t for key, value in items for rest, t in tensors(value).items()}
    return {"": state} if isinstance(state, torch.Tensor) else {}


def check_equal(out, other):
    """The checkpoints of both runs have the same weights, averages and optimizer's state, bit for bit."""
    ours, theirs = tensors(saved(out)), tensors(saved(other))
    assert {name.split(".")[0] for name in ours} == {"objective", "average", "optimizers"}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_run_that_was_killed_and_resumed_equals_one_that_was_not_bit_for_bit(tmp_path):
    expected = train(Toy(), Colors(), CONFIG, tmp_path / "a", RECIPE)

    killed = Toy({6: kill})  # the checkpoint has steps 1 to 4, so that step 5 is lost, too
    with pytest.raises(SystemExit):
        train(killed, Colors(), CONFIG, tmp_path / "b", RECIPE)
    resumed = Toy()
    average = train(resumed, Colors(), CONFIG, tmp_path / "b", RECIPE)

    assert resumed.calls == 2  # only what was after the last checkpoint
    assert torch.equal(weights(average), weights(expected))
    check_equal(tmp_path / "a", tmp_path / "b")
    logs = [rows(tmp_path / run) for run in "ab"]
    assert [row["step"] for row in logs[1]] == [1, 2, 3, 4, 5, 6]  # no step twice
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]


def test_a_finished_run_does_not_train_again_and_gives_its_average(tmp_path):
    expected = train(Toy(), Colors(), CONFIG, tmp_path, RECIPE)
    again = Toy()
    assert torch.equal(weights(train(again, Colors(), CONFIG, tmp_path, RECIPE)), weights(expected))
    assert again.calls == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_running_step_and_the_resumed_run_is_exact(tmp_path, number):
    expected = train(Toy(), Colors(), CONFIG, tmp_path / "a", RECIPE)

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    stopped = Toy({5: lambda: signal.raise_signal(number)})
    with pytest.raises(Interrupted, match=r"^training stopped after step 5 of 6, saved in .*b$"):
        train(stopped, Colors(), CONFIG, tmp_path / "b", RECIPE)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert (stopped.calls, steps_saved(tmp_path / "b")) == (5, 5)

    resumed = Toy()
    average = train(resumed, Colors(), CONFIG, tmp_path / "b", RECIPE)
    assert resumed.calls == 1
    assert torch.equal(weights(average), weights(expected))
    check_equal(tmp_path / "a", tmp_path / "b")


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stop:
        train(Toy({4: twice}), Colors(), CONFIG, tmp_path, RECIPE)
    assert stop.type is KeyboardInterrupt
    assert steps_saved(tmp_path) == 2  # step 3 is lost
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_was_ignored_before_the_run_stays_ignored(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background job
    try:
        train(Toy({4: lambda: signal.raise_signal(signal.SIGINT)}), Colors(), CONFIG, tmp_path, RECIPE)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps_saved(tmp_path) == 6


def test_a_run_outside_the_main_thread_sets_no_signal_handlers(tmp_path):
    def run():
        train(Toy({4: lambda: seen.append(signal.getsignal(signal.SIGINT))}), Colors(), CONFIG, tmp_path, RECIPE)

    seen = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
    assert steps_saved(tmp_path) == 6


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_data_processes_survive_a_signal_to_all_processes_until_the_step_ends(tmp_path, number):
    code = f"""
import dataclasses, os, pathlib
from ldm.training.loop import Interrupted, train
from tests.training.test_loop import CONFIG, RECIPE, Colors, Toy
config = dataclasses.replace(CONFIG, workers=2, accumulate=20)  # more batches than the workers hold in advance
try:
    train(Toy({{41: lambda: os.killpg(0, {int(number)})}}), Colors(), config, pathlib.Path({str(tmp_path)!r}), RECIPE)
except Interrupted as stop:
    print(stop)
"""
    words = [sys.executable, "-c", code]
    result = subprocess.run(words, capture_output=True, text=True, start_new_session=True, timeout=120)
    assert result.stdout.startswith("training stopped after step 3 of 6"), result.stderr
    assert steps_saved(tmp_path) == 3


def test_a_run_of_another_recipe_is_left_alone_and_the_values_that_differ_are_named(tmp_path):
    train(Toy(), Colors(), CONFIG, tmp_path, RECIPE)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = {"data.size": 4, "loop.batch_size": 3, "unet.channels": [8, 32], "loss.kl": 0.5}
    message = (
        r"holds a run of another recipe, at step 6: loop\.batch_size was 2 and is now 3, loss\.kl was None and is now "
        r"0\.5, unet\.channels was \[8, 16\] and is now \[8, 32\]; undo the change, or choose another `out`$"
    )
    with pytest.raises(ValueError, match=message):
        train(Toy(), Colors(), CONFIG, tmp_path, other)
    many = RECIPE | {f"new {i}": i for i in range(7)}
    with pytest.raises(ValueError, match=r"new 4 was None and is now 4, and 2 more values differ; undo"):
        train(Toy(), Colors(), CONFIG, tmp_path, many)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_longer_run_goes_on_with_the_schedule_of_the_new_number_of_steps(tmp_path):
    short = dataclasses.replace(CONFIG, steps=4)
    train(Toy(), Colors(), short, tmp_path, RECIPE)
    more = Toy()
    train(more, Colors(), CONFIG, tmp_path, RECIPE)
    assert more.calls == 2
    expected = [learning_rate(step, short) for step in range(4)] + [learning_rate(step, CONFIG) for step in (4, 5)]
    assert [row["lr"] for row in rows(tmp_path)] == pytest.approx(expected, rel=1e-5)  # the log has six digits


def test_a_run_that_has_more_steps_than_the_recipe_is_an_error(tmp_path):
    train(Toy(), Colors(), CONFIG, tmp_path, RECIPE)
    with pytest.raises(ValueError, match=r"has done 6 steps, and the recipe asks for 5: set steps to 6 or more"):
        train(Toy(), Colors(), dataclasses.replace(CONFIG, steps=5), tmp_path, RECIPE)


def test_a_run_may_go_on_with_other_intervals_and_workers_bit_for_bit(tmp_path):
    expected = train(Toy(), Colors(), CONFIG, tmp_path / "a", RECIPE)
    with pytest.raises(SystemExit):
        train(Toy({4: kill}), Colors(), CONFIG, tmp_path / "b", RECIPE)
    other = dataclasses.replace(CONFIG, log_every=3, sample_every=1, checkpoint_every=5, workers=1)
    assert torch.equal(weights(train(Toy(), Colors(), other, tmp_path / "b", RECIPE)), weights(expected))


def test_step_seconds_is_the_mean_of_the_logged_steps_without_sampling_and_saving(tmp_path, monkeypatch):
    clock = [0.0]

    class Slow(Toy):
        """Step i takes i seconds, a sample 1000 seconds and a checkpoint 100 seconds."""

        def forward(self, batch):
            loss, logs = super().forward(batch)
            clock[0] += self.calls
            return loss, logs

        def sample(self, batch):
            clock[0] += 1000
            return super().sample(batch)

    def save(state, path):
        clock[0] += 100
        real(state, path)

    real = torch.save
    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(loop, "perf_counter", lambda: clock[0])
    train(Slow(), Colors(), dataclasses.replace(CONFIG, log_every=4, sample_every=1), tmp_path, RECIPE)
    assert [(row["step"], row["step_seconds"]) for row in rows(tmp_path)] == [(4, 2.5), (6, 5.5)]


def test_a_kill_while_writing_a_checkpoint_keeps_the_one_before(tmp_path, monkeypatch):
    real = torch.save

    def torn(state, file):
        real(state, file)
        if state["step"] == 4:
            file.truncate(100)
            kill()

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(SystemExit):
        train(Toy(), Colors(), CONFIG, tmp_path, RECIPE)
    monkeypatch.undo()
    resumed = Toy()
    train(resumed, Colors(), CONFIG, tmp_path, RECIPE)
    assert resumed.calls == 4  # from step 2


def test_accumulated_batches_equal_one_batch_of_their_sum(tmp_path):
    class Plain(Toy):
        def forward(self, batch):
            loss = (self.trained(batch[0]) - batch[0]).square().mean()
            return loss, {}

    whole, parts = Plain(), Plain()
    train(whole, Colors(), dataclasses.replace(CONFIG, batch_size=4), tmp_path / "a", RECIPE)
    train(parts, Colors(), dataclasses.replace(CONFIG, accumulate=2), tmp_path / "b", RECIPE)
    # a mean of means of equal sizes is the mean; only the order of sums differs
    torch.testing.assert_close(weights(whole.trained), weights(parts.trained), rtol=1e-4, atol=1e-5)


def test_every_example_is_seen_once_an_epoch_in_a_seeded_order(tmp_path):
    toy = Toy()
    train(toy, Colors(), dataclasses.replace(CONFIG, steps=10), tmp_path, RECIPE)
    seen = [caption for captions in toy.seen for caption in captions]
    assert sorted(seen[:10]) == sorted(seen[10:]) == [f"color {i}" for i in range(10)]
    assert seen[:10] != seen[10:]


def test_worker_processes_change_nothing_but_speed(tmp_path):
    expected = train(Toy(), Colors(), CONFIG, tmp_path / "a", RECIPE)
    workers = dataclasses.replace(CONFIG, workers=1)
    got = train(Toy(), Colors(), workers, tmp_path / "b", RECIPE)
    assert torch.equal(weights(got), weights(expected))


class Spoiled(Toy):
    """The loss of batch 4 is changed by a function."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, batch):
        loss, logs = super().forward(batch)
        return self.change(loss) if self.calls == 4 else loss, logs


@pytest.mark.parametrize(
    ("change", "what"), [(lambda loss: loss * math.nan, "loss"), (lambda loss: loss + (loss - loss).sqrt(), "gradient")]
)
def test_a_loss_or_gradient_that_is_not_finite_names_the_pictures_and_keeps_the_state_before_it(change, what, tmp_path):
    """The derivative of a root at zero is infinite."""
    spoiled = Spoiled(change)
    message = rf"^the {what} of step 4 is not finite; the captions of its pictures: "
    with pytest.raises(FloatingPointError, match=message) as stop:
        train(spoiled, Colors(), CONFIG, tmp_path, RECIPE)
    assert f": {', '.join(map(repr, spoiled.seen[3]))}. The last checkpoint is kept" in str(stop.value)
    assert weights(spoiled.trained).isfinite().all()
    assert steps_saved(tmp_path) == 2


def test_of_the_batches_of_a_step_only_the_one_whose_loss_is_not_finite_is_named(tmp_path):
    spoiled = Spoiled(lambda loss: loss * math.inf)
    with pytest.raises(FloatingPointError, match="the loss of step 2 is") as stop:
        train(spoiled, Colors(), dataclasses.replace(CONFIG, accumulate=2), tmp_path, RECIPE)
    assert all(repr(caption) in str(stop.value) for caption in spoiled.seen[3])
    assert not any(repr(caption) in str(stop.value) for caption in spoiled.seen[2])


def test_the_average_is_the_moving_average_of_the_weights_after_each_step(tmp_path):
    class Recorded(Toy):
        def forward(self, batch):
            history.append(weights(self.trained).double())
            return super().forward(batch)

    history = []
    average = train(Recorded(), Colors(), CONFIG, tmp_path, RECIPE)
    last = saved(tmp_path)["objective"]
    history.append(torch.cat([last["net.weight"].flatten(), last["net.bias"]]).double())
    expected = history[0]
    for step, after in enumerate(history[1:]):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * after
    torch.testing.assert_close(weights(average).double(), expected, rtol=1e-5, atol=1e-7)  # fp32 sums


def test_samples_are_made_by_the_average_without_gradients_and_training_goes_on_in_training_mode(tmp_path):
    class Watched(Toy):
        def forward(self, batch):
            assert self.training
            return super().forward(batch)

        def sample(self, batch):
            made_by.append(weights(self.trained))
            assert not self.training
            assert not self.trained.training
            assert not torch.is_grad_enabled()
            return super().sample(batch)

    made_by = []
    average = train(Watched(), Colors(), CONFIG, tmp_path, RECIPE)
    assert torch.equal(made_by[1], weights(average))
    assert not torch.equal(made_by[0], made_by[1])
    assert not average.training


def test_without_an_average_the_result_is_the_trained_weights_and_no_copy_is_kept(tmp_path):
    average = train(Toy(), Colors(), dataclasses.replace(CONFIG, ema=0.0), tmp_path, RECIPE)
    state = saved(tmp_path)
    assert state["average"] == {}
    last = state["objective"]
    assert torch.equal(weights(average), torch.cat([last["net.weight"].flatten(), last["net.bias"]]))


def test_networks_that_stay_fixed_are_neither_averaged_nor_saved_nor_changed(tmp_path):
    class Partly(Toy):
        """The bias is fixed, and so is a large network that is not part of the result. A buffer counts the calls."""

        def __init__(self, at=None):
            super().__init__(at)
            self.net.bias.requires_grad_(False)
            self.teacher = nn.Linear(100, 100).requires_grad_(False)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, batch):
            self.count += 1
            return super().forward(batch)

    partly = Partly()
    before = [p.clone() for p in (partly.net.bias, *partly.teacher.parameters())]
    average = train(partly, Colors(), CONFIG, tmp_path / "a", RECIPE)
    after = [partly.net.bias, *partly.teacher.parameters()]
    assert average is partly.net
    assert all(map(torch.equal, before, after))
    state = saved(tmp_path / "a")
    assert state["objective"].keys() == {"net.weight", "count"}
    assert state["average"].keys() == {"weight"}
    assert (tmp_path / "a" / "checkpoint.pt").stat().st_size < 8_000

    with pytest.raises(SystemExit):
        train(Partly({6: kill}), Colors(), CONFIG, tmp_path / "b", RECIPE)
    train(Partly(), Colors(), CONFIG, tmp_path / "b", RECIPE)
    check_equal(tmp_path / "a", tmp_path / "b")
    assert saved(tmp_path / "b")["objective"]["count"] == 6


def test_an_objective_without_trainable_parameters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no parameter of the objective is trainable"):
        train(Toy().requires_grad_(False), Colors(), CONFIG, tmp_path, RECIPE)


def test_a_large_gradient_is_clipped_and_logged_as_it_was(tmp_path):
    class Steep(Toy):
        def forward(self, batch):
            loss, logs = super().forward(batch)
            return 1000 * loss, logs

    steep, config = Steep(), dataclasses.replace(CONFIG, clip=0.5)
    train(steep, Colors(), config, tmp_path, RECIPE)
    norm = torch.cat([p.grad.flatten() for p in steep.parameters()]).norm().item()
    assert math.isclose(norm, 0.5, rel_tol=1e-3)
    assert rows(tmp_path)[-1]["grad_norm"] > 5


def test_samples_and_a_log_are_written_during_the_run(tmp_path):
    train(Toy(), Colors(), CONFIG, tmp_path, RECIPE)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "step-000003.png", "step-000006.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "samples" / "step-000006.png") as grid:
        assert grid.size == (8, 4)  # two pictures of 4 pixels
    row = rows(tmp_path)[-1]
    assert {"step", "loss", "loss_again", "grad_norm", "lr", "step_seconds"} == set(row)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint.previous.pt", "checkpoint.pt", "log.jsonl", "samples",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"warmup": 6}, "warmup must be from 0 to steps - 1 = 5, got 6"),
        ({"ema": 1.0}, "ema must be at least 0 and less than 1, got 1.0"),
        ({"betas": (0.9, 1.0)}, "betas must be at least 0 and less than 1, got 0.9 and 1.0"),
        ({"betas": (0.9,)}, r"betas must be 2 numbers, got \(0.9,\)"),
        ({"optimizer": "lion"}, "optimizer must be one of adamw, adam, sgd, adafactor, muon, adamw8bit, got 'lion'"),
        ({"schedule": "steps"}, "schedule must be one of cosine, linear, constant, got 'steps'"),
    ],
)
def test_a_bad_loop_configuration_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_the_validation_of_the_average_is_logged_at_its_own_interval(tmp_path):
    class Validated(Toy):
        validates = True

        def validate(self):
            assert not self.trained.training
            assert not torch.is_grad_enabled()
            measured_by.append(self.trained)
            return {"validation": weights(self.trained).sum()}

    measured_by = []
    average = train(Validated(), Colors(), dataclasses.replace(CONFIG, log_every=4, validate_every=2), tmp_path, RECIPE)
    assert [each is average for each in measured_by] == [True] * 3
    found = [(row["step"], "validation" in row) for row in rows(tmp_path)]
    assert found == [(2, True), (4, True), (6, True)]
    assert rows(tmp_path)[-1]["validation"] == pytest.approx(weights(average).sum().item(), rel=1e-4)


def test_a_data_set_with_buckets_gives_batches_of_one_bucket_and_its_tensors_reach_the_objective(tmp_path):
    class Shapes(Colors):
        buckets = torch.arange(10) % 2

        def __getitem__(self, index):
            image = torch.zeros(3, 4, 4 + 2 * (index % 2), dtype=torch.uint8)
            return image, self.caption(index), {"mask": torch.full((1, 4, 4), 51 * (index % 2), dtype=torch.uint8)}

    class Wide(Toy):
        def forward(self, batch):
            assert set(batch[2]) == {"mask"}
            odd = {int(caption.split()[1]) % 2 for caption in batch[1]}
            assert odd == {(batch[0].shape[-1] - 4) // 2}
            torch.testing.assert_close(batch[2]["mask"], torch.full((2, 1, 4, 4), 0.2 * odd.pop()))
            return super().forward(batch[:2])

    toy = Wide()
    train(toy, Shapes(), dataclasses.replace(CONFIG, steps=10), tmp_path, RECIPE)
    assert sorted(caption for captions in toy.seen for caption in captions) == sorted(
        2 * [f"color {i}" for i in range(10)]
    )
