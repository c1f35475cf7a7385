"""Recorded and replayed calls of a network: the same numbers, whatever happens between two of them."""

import warnings

import pytest
import torch

import ldm
from ldm.conditioning import Condition
from ldm.diffusion.denoiser import classifier_free, guided
from ldm.models.attention import math_attention, set_attention
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline
from ldm.placement.graphs import Recorded
from ldm.placement.memory import Placement
from tests.recorded import record_on_the_cpu
from tests.tiny import TINY_SDXL, random_networks


@pytest.fixture
def unet() -> UNet:
    """A tiny random SDXL UNet."""
    return random_networks(TINY_SDXL)[0].requires_grad_(False)


@pytest.fixture
def recorded(monkeypatch):
    """Graphs can be recorded; `recorded.made` counts them."""
    return record_on_the_cpu(monkeypatch)


@pytest.fixture
def calls(unet):
    """How often Python has run the UNet, by the batch of each call."""
    batches, forward = [], unet.forward
    unet.forward = lambda x, *rest: batches.append(len(x)) or forward(x, *rest)
    return batches


def latents(seed, batch=2, size=8):
    """Arguments of a bound network, different for each seed."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, size, size, generator=g), torch.rand(batch, generator=g) * 999


def condition(unet, seed, batch=2):
    """A condition, different for each seed."""
    g = torch.Generator().manual_seed(100 + seed)
    context = torch.randn(batch, 5, unet.config.context_dim, generator=g)
    return Condition(context, torch.randn(batch, unet.config.vector_dim, generator=g))


def test_the_first_call_runs_the_second_is_recorded_and_the_others_replay_its_numbers(unet, calls, recorded):
    bound, plain = Recorded(unet).bind(condition(unet, 0)), unet.bind(condition(unet, 0))
    outs, made = [], []
    for seed in range(4):
        outs.append(bound(*latents(seed)))
        made.append(recorded.made)
    assert made == [0, 1, 1, 1]
    assert calls == [2, 2]  # the first call, and the recording
    for seed, out in enumerate(outs):  # no later call has overwritten it
        assert torch.equal(out, plain(*latents(seed)))


def test_each_binding_has_its_own_recording_so_that_two_pictures_in_turns_keep_their_text(unet, recorded):
    network, conditions = Recorded(unet), [condition(unet, seed) for seed in range(2)]
    bound = [network.bind(each) for each in conditions]
    for step in range(4):
        for mine, each in zip(bound, conditions, strict=True):
            assert torch.equal(mine(*latents(step)), unet.bind(each)(*latents(step)))
    assert recorded.made == 2


def test_another_shape_starts_again(unet, calls, recorded):
    bound, plain = Recorded(unet).bind(condition(unet, 0)), unet.bind(condition(unet, 0))
    for size, made in ((8, 1), (6, 2), (8, 3)):
        calls.clear()
        for seed in range(3):
            out = bound(*latents(seed, size=size))
        assert calls == [2, 2]
        assert torch.equal(out, plain(*latents(2, size=size)))
        assert recorded.made == made


def test_weights_that_change_in_place_are_read_by_the_next_replay(unet, recorded):
    bound = Recorded(unet).bind(condition(unet, 0))
    for _ in range(3):
        before = bound(*latents(0))
    unet.mid.res_in.conv1.weight.mul_(1.5)
    after = bound(*latents(0))
    assert not torch.equal(after, before)
    assert torch.equal(after, unet.bind(condition(unet, 0))(*latents(0)))


def test_any_network_with_bind_can_be_recorded(unet, recorded):
    class Doubled:
        def bind(self, condition):
            predict = unet.bind(condition)
            return lambda z, timesteps: 2 * predict(z, timesteps)

    bound = Recorded(Doubled()).bind(condition(unet, 0))
    for seed in range(3):
        out = bound(*latents(seed))
    assert recorded.made == 1
    assert torch.equal(out, 2 * unet.bind(condition(unet, 0))(*latents(2)))


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_takes_a_recorded_network(unet, recorded, batched):
    conditions, rule = [condition(unet, seed) for seed in range(2)], classifier_free(3.0)
    network = guided(Recorded(unet).bind, conditions, rule, batched=batched)
    plain = guided(unet.bind, conditions, rule, batched=batched)
    for seed in range(3):
        assert torch.equal(network(*latents(seed)), plain(*latents(seed)))
    assert recorded.made == (1 if batched else 2)


def test_a_call_whose_latents_require_gradients_is_not_replayed(unet, recorded):
    bound, plain = Recorded(unet).bind(condition(unet, 0)), unet.bind(condition(unet, 0))
    for seed in range(2):
        bound(*latents(seed))
    z, timesteps = latents(2)
    z.requires_grad_()
    gradients = [torch.autograd.grad(each(z, timesteps).square().sum(), z)[0] for each in (bound, plain)]
    assert torch.equal(*gradients)
    with torch.no_grad():
        assert torch.equal(bound(z, timesteps), plain(z, timesteps))
    assert recorded.made == 1


def test_if_recording_fails_a_warning_says_why_and_the_calls_run_unrecorded(unet, recorded):
    set_attention(unet, lambda q, k, v: math_attention(q, k, v) if q.sum().item() else v)
    bound, plain = Recorded(unet).bind(condition(unet, 0)), unet.bind(condition(unet, 0))
    bound(*latents(0))
    with pytest.warns(UserWarning, match="without a CUDA graph: operation not permitted when"):
        assert torch.equal(bound(*latents(1)), plain(*latents(1)))
    with warnings.catch_warnings(action="error"):
        assert torch.equal(bound(*latents(2)), plain(*latents(2)))
    assert recorded.made == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_the_warning_says_so(unet):
    bound = Recorded(unet).bind(condition(unet, 0))
    bound(*latents(0))
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        out = bound(*latents(1))
    assert torch.equal(out, unet.bind(condition(unet, 0))(*latents(1)))


def test_a_pipeline_records_only_if_its_placement_says_so(recorded):
    request = ldm.Request("a frog", steps=4, images=2, guidance_interval=(0.5, 5.0))
    last = {}
    for graph in (False, True):
        pipe = Pipeline(TINY_SDXL, *random_networks(TINY_SDXL), placement=Placement("cpu", cuda_graph=graph))
        *_, last[graph] = pipe.stream(request)
        assert bool(recorded.made) is graph
    assert recorded.made <= 2  # with guidance and without
    assert torch.equal(last[True].x, last[False].x)
