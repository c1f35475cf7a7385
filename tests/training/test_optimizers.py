"""Optimizers and schedules by name: each has its own update, and lowers a loss."""

import dataclasses
import importlib.util
import math

import pytest
import torch
from torch import nn

from ldm.training import optimizers
from ldm.training.loop import LoopConfig, train
from ldm.training.optimizers import learning_rate, make_optimizers, set_learning_rate
from tests.training.test_loop import Colors, Toy, rows

CONFIG = LoopConfig(steps=100, warmup=0, learning_rate=0.1, betas=(0.8, 0.95), weight_decay=0.5)


class Small(nn.Module):
    """A matrix of a linear layer, and a bias."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.table = nn.Embedding(5, 3)


def one_step(name):
    """The weights before and after a step, and the gradient: the matrix of the linear layer, its bias, the table."""
    torch.manual_seed(0)
    network = Small()
    chosen = make_optimizers(network, dataclasses.replace(CONFIG, optimizer=name))
    set_learning_rate(chosen, 0.1)
    before = [p.detach().clone() for p in network.parameters()]
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in chosen:
        optimizer.step()
    return before, [p.detach() for p in network.parameters()], [p.grad for p in network.parameters()]


def test_adamw_takes_the_step_of_its_paper():
    """At the first step both averages, corrected for their start, are the gradient and its square."""
    for before, after, grad in zip(*one_step("adamw"), strict=True):
        torch.testing.assert_close(after, before - 0.1 * (grad / (grad.abs() + 1e-8) + 0.5 * before))


def test_adam_adds_the_decay_to_the_gradient():
    for before, after, grad in zip(*one_step("adam"), strict=True):
        whole = grad + 0.5 * before
        torch.testing.assert_close(after, before - 0.1 * whole / (whole.abs() + 1e-8))


def test_sgd_follows_the_gradient_and_its_momentum_is_the_first_beta():
    for before, after, grad in zip(*one_step("sgd"), strict=True):
        torch.testing.assert_close(after, before - 0.1 * (grad + 0.5 * before))
    (optimizer,) = make_optimizers(Small(), dataclasses.replace(CONFIG, optimizer="sgd"))
    assert optimizer.defaults["momentum"] == 0.8


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs PyTorch 2.9")
def test_muon_orthogonalizes_the_matrices_of_linear_layers_and_adamw_does_the_rest():
    before, after, grad = one_step("muon")
    update = (before[0] * (1 - 0.1 * 0.5) - after[0]) / (0.1 * 0.2 * math.sqrt(4))
    assert all(0.6 < value < 1.3 for value in torch.linalg.svdvals(update))  # Jordan's polynomial is this close to 1
    for i in (1, 2):
        torch.testing.assert_close(after[i], before[i] - 0.1 * (grad[i] / (grad[i].abs() + 1e-8) + 0.5 * before[i]))


class Mixed(Toy):
    """A convolution, and a linear layer over the rows of its output."""

    def __init__(self, at=None):
        super().__init__(at)
        self.net = nn.Sequential(self.net, nn.Linear(4, 4))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor", "muon"])
def test_each_optimizer_lowers_the_loss_and_resumes_exactly(name, tmp_path):
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("needs PyTorch 2.9")
    config = LoopConfig(
        steps=20, batch_size=2, learning_rate=0.03, warmup=0, optimizer=name, log_every=1, checkpoint_every=12
    )
    expected = train(Mixed(), Colors(), config, tmp_path / "a", {})
    losses = [row["loss"] for row in rows(tmp_path / "a")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

    with pytest.raises(SystemExit):
        train(Mixed({15: stop}), Colors(), config, tmp_path / "b", {})
    resumed = train(Mixed(), Colors(), config, tmp_path / "b", {})
    for ours, theirs in zip(resumed.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def stop():
    raise SystemExit


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_adamw_of_8_bits_is_near_adamw_and_its_averages_have_8_bits(tmp_path):
    weights = []
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(0)
        network = nn.Linear(64, 64, bias=False)
        (optimizer,) = make_optimizers(network, dataclasses.replace(CONFIG, optimizer=name, weight_decay=0.0))
        set_learning_rate([optimizer], 0.01)
        for _ in range(3):
            network.weight.grad = torch.randn_like(network.weight)
            optimizer.step()
        weights.append(network.weight.detach())
    assert optimizer.state[network.weight]["exp_avg"].codes.dtype == torch.uint8
    assert not torch.equal(*weights)
    torch.testing.assert_close(*weights, rtol=0, atol=0.01)  # a step is 0.01 long


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamw8bit", r"needs torchao, which is not installed: install the extra with pip install 'ldm\[int8\]', or"),
        ("muon", r"PyTorch \S+ has no optimizer 'muon': install 2\.9 or later, or take 'adamw'"),
    ],
)
def test_an_optimizer_that_is_not_installed_is_named(name, message, monkeypatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda package: None)
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match=message):
        make_optimizers(Small(), dataclasses.replace(CONFIG, optimizer=name))


def test_the_learning_rate_warms_up_then_falls_to_zero_as_a_cosine():
    config = LoopConfig(steps=110, warmup=10, learning_rate=2.0)
    assert [learning_rate(s, config) for s in (0, 4, 9, 10)] == [0.2, 1.0, 2.0, 2.0]
    assert math.isclose(learning_rate(60, config), 1.0)
    assert learning_rate(110, config) < 1e-12


def test_a_linear_schedule_falls_on_a_line_and_a_constant_one_stays():
    linear = LoopConfig(steps=110, warmup=10, learning_rate=2.0, schedule="linear")
    assert [learning_rate(s, linear) for s in (4, 10, 35, 60, 110)] == [1.0, 2.0, 1.5, 1.0, 0.0]
    constant = dataclasses.replace(linear, schedule="constant")
    assert [learning_rate(s, constant) for s in (4, 10, 60, 109)] == [1.0, 2.0, 2.0, 2.0]
