"""One step: the number formats of the networks and the scale of the loss in float16."""

import dataclasses

import pytest
import torch

from ldm.training.loop import LoopConfig, train
from tests.training.test_loop import CONFIG, RECIPE, Colors, Toy, check_equal, kill, rows, saved, weights

HALF = dataclasses.replace(CONFIG, fp16=True)


@pytest.mark.parametrize(("name", "dtype"), [("", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_networks_compute_in_the_format_that_is_asked_for_and_the_weights_stay_in_fp32(name, dtype, tmp_path):
    toy, seen = Toy(), []
    toy.net.register_forward_hook(lambda module, given, result: seen.append(result.dtype))
    formats = {name: True} if name else {}
    train(toy, Colors(), LoopConfig(steps=1, batch_size=2, warmup=0, **formats), tmp_path, {})
    assert seen[0] == dtype
    assert {p.dtype for p in toy.parameters()} == {torch.float32}


def test_the_scale_of_the_loss_in_float16_cancels_and_changes_no_gradient_that_float16_can_hold(tmp_path):
    half = train(Toy(), Colors(), HALF, tmp_path / "half", RECIPE)
    full = train(Toy(), Colors(), CONFIG, tmp_path / "full", RECIPE)
    torch.testing.assert_close(weights(half), weights(full), rtol=0, atol=3e-3)  # float16 has 11 bits
    assert not torch.equal(weights(half), weights(full))
    assert {row["scale"] for row in rows(tmp_path / "half")} == {65536.0}


class Steep(Toy):
    """The gradient times the first scale of the loss is larger than float16's largest number, 65504."""

    def forward(self, batch):
        loss, logs = super().forward(batch)
        return 300 * loss, logs


def test_a_scaled_gradient_that_is_too_large_leaves_the_weights_and_lowers_the_scale(tmp_path):
    steep = Steep()
    before = weights(steep)
    train(steep, Colors(), dataclasses.replace(HALF, steps=3, checkpoint_every=1, ema=0.0), tmp_path, RECIPE)
    first, second, _ = rows(tmp_path)
    assert first["grad_norm"] == float("inf") or first["grad_norm"] != first["grad_norm"]
    assert (first["scale"], second["scale"]) == (32768.0, 16384.0)
    assert torch.equal(weights(steep), before)


def test_a_resumed_run_in_float16_has_the_scale_that_it_had(tmp_path):
    config = dataclasses.replace(HALF, steps=10, checkpoint_every=5)
    train(Steep(), Colors(), config, tmp_path / "a", RECIPE)
    with pytest.raises(SystemExit):
        train(Steep({8: kill}), Colors(), config, tmp_path / "b", RECIPE)
    assert saved(tmp_path / "b")["scaler"]["scale"] < 65536
    train(Steep(), Colors(), config, tmp_path / "b", RECIPE)
    check_equal(tmp_path / "a", tmp_path / "b")
    assert [row["scale"] for row in rows(tmp_path / "a")] == [row["scale"] for row in rows(tmp_path / "b")]


def test_a_gradient_that_is_not_finite_at_any_scale_stops_the_run_in_float16(tmp_path):
    class Endless(Toy):
        def forward(self, batch):
            loss, logs = super().forward(batch)
            return loss + (loss - loss).sqrt(), logs

    config = dataclasses.replace(HALF, steps=30)
    with pytest.raises(FloatingPointError, match="the gradient of step 18 is not finite"):
        train(Endless(), Colors(), config, tmp_path, RECIPE)


def test_two_formats_at_once_are_refused():
    with pytest.raises(ValueError, match="bf16 and fp16 exclude each other: choose one"):
        dataclasses.replace(HALF, bf16=True)
