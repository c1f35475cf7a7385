"""Gradient checkpointing: equal gradients, less memory."""

import pytest
import torch
from torch import nn

from ldm.models.unet import Stage
from ldm.placement.live_bytes import LiveBytes
from ldm.training.diffusion import DiffusionLoss, DiffusionObjective, Networks
from ldm.training.loop import LoopConfig, train
from ldm.training.recompute import recompute_blocks
from ldm.training.vae import VAELoss, VAEObjective
from tests.tiny import TINY_RANDOM, TINY_SDXL, random_networks
from tests.training.test_loop import Colors, Toy


def diffusion(config=TINY_RANDOM):
    unet, vae, text_encoder = random_networks(config)
    return DiffusionObjective(config, Networks(unet, text_encoder), vae, DiffusionLoss(caption_dropout=0.3))


def autoencoder():
    torch.manual_seed(0)
    return VAEObjective(TINY_RANDOM.vae, VAELoss(adversarial=0.1))


def with_lora_only():
    """Only a part of each attention is trained, behind layers that stay."""
    objective = diffusion().requires_grad_(False)
    for name, p in objective.named_parameters():
        p.requires_grad_(name.endswith("to_q.weight") and "networks." in name)
    return objective


def gradients(objective, *, again):
    if again:
        recompute_blocks(objective)
    torch.manual_seed(3)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    with LiveBytes() as live:
        loss, _ = objective((images, ["a frog", "a car", "two cars", ""]))
        loss.backward()
    return {name: p.grad for name, p in objective.named_parameters()}, live.peak


@pytest.mark.parametrize(
    "make", [diffusion, lambda: diffusion(TINY_SDXL), autoencoder, with_lora_only],
    ids=["diffusion", "sdxl", "vae", "lora"],
)  # fmt: skip
def test_gradients_are_the_same_bits_and_the_peak_of_memory_is_lower(make):
    expected, peak = gradients(make(), again=False)
    found, lower = gradients(make(), again=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        assert value is None or torch.equal(found[name], value), name
    assert lower < 0.75 * peak


def test_the_loop_switches_it_on_and_nothing_else_changes(tmp_path):
    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = Stage(conv=nn.Conv2d(3, 3, 3, padding=1))

        def forward(self, x):
            return self.stage(x, None, None)

    results, calls = [], []
    for again in (False, True):
        torch.manual_seed(0)
        toy = Toy()
        toy.net = Stages()
        toy.net.stage.conv.register_forward_pre_hook(lambda *given: calls.append(given))
        config = LoopConfig(steps=2, batch_size=2, warmup=0, gradient_checkpointing=again)
        results.append(train(toy, Colors(), config, tmp_path / str(again), {}))
        calls.append(None)
    before, after = "".join("x" if call else " " for call in calls).split()
    assert (len(before), len(after)) == (3, 5)  # two steps and a sample; each step computes again
    assert all(map(torch.equal, *(network.parameters() for network in results)))
    assert isinstance(results[1].stage, Stage)
