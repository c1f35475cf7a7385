"""ControlNet and `Controlled`: sums, weights, guess mode, pooling, and ControlNets that do not fit."""

import dataclasses

import pytest
import torch

from ldm.conditioning import Condition, join
from ldm.diffusion.denoiser import classifier_free, guided
from ldm.models.attention import math_attention, set_attention
from ldm.models.controlnet import Applied, Controlled, ControlNet
from ldm.models.transformer import Attention
from ldm.models.unet import UNet
from tests.tiny import HINTS, TINY_RANDOM, TINY_SDXL, random_controlnet


@pytest.fixture(params=[TINY_RANDOM, TINY_SDXL], ids=lambda c: c.name)
def config(request):
    return request.param


@pytest.fixture
def inputs(config):
    torch.manual_seed(0)
    unet = UNet(config.unet).eval().requires_grad_(False)
    vector = torch.randn(2, config.unet.vector_dim) if config.unet.vector_dim else None
    conditions = Condition(torch.randn(2, 7, config.unet.context_dim), vector).rows()
    z, timesteps = torch.randn(1, config.unet.in_channels, 8, 8), torch.tensor([300.0])
    return unet, conditions, z, timesteps


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-5)  # fp32, another order of summation


def hint(seed=5, side=32):
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_a_new_controlnet_changes_nothing(config, inputs):
    unet, conditions, z, timesteps = inputs
    new = Applied(ControlNet(config.unet, hint_channels=HINTS), hint())
    controlled = Controlled(unet, [new]).bind(conditions[0])
    assert torch.equal(controlled(z, timesteps), unet.bind(conditions[0])(z, timesteps))


def test_the_residuals_are_those_of_forward_weighted_and_summed(config, inputs):
    unet, (condition, _), z, timesteps = inputs
    one, two = random_controlnet(config, 1), random_controlnet(config, 2)
    residuals = [
        net(z, timesteps, condition.context, h, condition.vector) for net, h in ((one, hint()), (two, hint(6)))
    ]
    assert [len(each) for each in residuals] == [len(unet.skip_channels) + 1] * 2
    expected = unet(
        z, timesteps, condition.context, condition.vector, [0.5 * a + 2 * b for a, b in zip(*residuals, strict=True)]
    )
    controlled = Controlled(unet, [Applied(one, hint(), 0.5), Applied(two, hint(6), 2.0)])
    assert close(controlled.bind(condition)(z, timesteps), expected)
    assert not close(expected, unet.bind(condition)(z, timesteps))


@pytest.mark.parametrize("guess", [False, True])
def test_guidance_in_one_batch_and_in_two_passes_agree(inputs, config, guess):
    unet, conditions, z, timesteps = inputs
    marked = [dataclasses.replace(c, is_prompt=torch.tensor([i == 0])) for i, c in enumerate(conditions)]
    controlled = Controlled(unet, [Applied(random_controlnet(config), hint(), guess=guess)])
    both = [
        guided(controlled.bind, marked, classifier_free(4.0), batched=batched)(z, timesteps)
        for batched in (True, False)
    ]
    assert close(*both)


def test_in_guess_mode_the_prompt_alone_is_controlled_with_falling_weights(inputs, config):
    unet, conditions, z, timesteps = inputs
    network = random_controlnet(config)
    controlled = Controlled(unet, [Applied(network, hint(), 0.5, guess=True)])
    prompt, negative = (dataclasses.replace(c, is_prompt=torch.tensor([i == 0])) for i, c in enumerate(conditions))
    residuals = network(z, timesteps, prompt.context, hint(), prompt.vector)
    weights = torch.logspace(-1, 0, len(residuals))
    weighted = [0.5 * w * r for w, r in zip(weights, residuals, strict=True)]
    expected = unet(z, timesteps, prompt.context, prompt.vector, weighted)
    assert close(controlled.bind(prompt)(z, timesteps), expected)
    assert torch.equal(controlled.bind(negative)(z, timesteps), unet.bind(negative)(z, timesteps))
    mixed = controlled.bind(join([negative, prompt]))(torch.cat([z, z]), timesteps.repeat(2))
    assert close(mixed, torch.cat([unet.bind(negative)(z, timesteps), expected]))


def test_a_pooled_controlnet_averages_its_outputs_and_acts_on_the_prompt_only(inputs, config):
    unet, conditions, z, timesteps = inputs
    prompt, negative = (dataclasses.replace(c, is_prompt=torch.tensor([i == 0])) for i, c in enumerate(conditions))
    plain, pooled = random_controlnet(config), random_controlnet(config, pooled=True)
    outputs = [net(z, timesteps, prompt.context, hint(), prompt.vector) for net in (plain, pooled)]
    for whole, mean in zip(*outputs, strict=True):
        assert torch.equal(whole.mean(dim=(2, 3), keepdim=True), mean)
    controlled = Controlled(unet, [Applied(pooled, hint())])
    assert torch.equal(controlled.bind(negative)(z, timesteps), unet.bind(negative)(z, timesteps))
    expected = unet(z, timesteps, prompt.context, prompt.vector, outputs[1])
    assert close(controlled.bind(prompt)(z, timesteps), expected)


def test_each_picture_may_have_its_own_hint(inputs, config):
    unet, (condition, _), z, timesteps = inputs
    network, two = random_controlnet(config), torch.cat([hint(), hint(6)])
    both = Controlled(unet, [Applied(network, two)]).bind(join([condition, condition]))(
        torch.cat([z, z]), timesteps.repeat(2)
    )
    for i in range(2):
        alone = Controlled(unet, [Applied(network, two[i : i + 1])]).bind(condition)(z, timesteps)
        assert close(both[i : i + 1], alone)


def test_the_context_and_the_hint_are_projected_once_for_all_steps(inputs, config, monkeypatch):
    unet, (condition, _), z, timesteps = inputs
    network, calls = random_controlnet(config), []
    project = Attention.project
    monkeypatch.setattr(Attention, "project", lambda self, c: calls.append(c.shape[1]) or project(self, c))
    network.hint[0].register_forward_hook(lambda *_: calls.append("hint"))
    tokens = condition.context.shape[1]  # 7; the self-attentions see 64 or 16 pixels
    controlled = Controlled(unet, [Applied(network, hint())]).bind(condition)
    assert calls.count("hint") == 1
    assert calls.count(tokens) > 0
    calls.clear()
    for _ in range(2):
        controlled(z, timesteps)
    assert calls.count("hint") == calls.count(tokens) == 0 < len(calls)


def test_another_attention_gives_the_same_numbers(inputs, config):
    _, (condition, _), z, timesteps = inputs
    network = random_controlnet(config)
    before = network(z, timesteps, condition.context, hint(), condition.vector)
    set_attention(network, math_attention)
    after = network(z, timesteps, condition.context, hint(), condition.vector)
    assert all(map(close, before, after))


def test_a_unet_with_more_channels_gives_the_first_ones_to_the_controlnet():
    torch.manual_seed(0)
    unet = UNet(dataclasses.replace(TINY_RANDOM.unet, in_channels=9)).eval().requires_grad_(False)
    condition, t = Condition(torch.randn(1, 7, 32)), torch.tensor([300.0])
    z, network = torch.randn(1, 9, 8, 8), random_controlnet()
    residuals = network(z[:, :4], t, condition.context, hint())
    expected = unet(z, t, condition.context, residuals=residuals)
    assert close(Controlled(unet, [Applied(network, hint())]).bind(condition)(z, t), expected)


def test_a_controlnet_of_another_family_is_refused(inputs, config):
    unet = inputs[0]
    for changes, message in (
        ({"context_dim": 48}, r"has text of width 48, and the UNet of the model \d+: use a ControlNet that was made"),
        ({"vector_dim": 8}, "has a vector of width 8, and the UNet of the model"),
        ({"channels": (16, 16)}, r"has skips with the channels \[16, 16, 16, 16\], and the UNet of the model \[16, 16"),
    ):
        other = ControlNet(dataclasses.replace(config.unet, **changes), hint_channels=HINTS)
        with pytest.raises(ValueError, match=message):
            Controlled(unet, [Applied(other, hint())])


def test_a_hint_of_another_size_is_refused(inputs, config):
    unet, (condition, _), z, timesteps = inputs
    controlled = Controlled(unet, [Applied(random_controlnet(config), hint(side=64))]).bind(condition)
    with pytest.raises(ValueError, match="the hint must have 4 pixels for each latent pixel, so 32 x 32"):
        controlled(z, timesteps)
