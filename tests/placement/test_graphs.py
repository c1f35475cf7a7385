"""Recorded and replayed calls of the UNet: the same numbers, whatever happens between two of them."""

import warnings

import pytest
import torch

from ldm.models.attention import math_attention, set_attention
from ldm.models.unet import UNet
from ldm.placement.graphs import SHAPES, Graphs
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


def draw(unet, seed, batch=2, size=8):
    """Arguments of the UNet, different for each seed."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, size, size, generator=g)
    timesteps = torch.rand(batch, generator=g) * 999
    context = torch.randn(batch, 5, unet.config.context_dim, generator=g)
    return x, timesteps, context, torch.randn(batch, unet.config.vector_dim, generator=g)


def call(graphs, x, timesteps, context, vector):
    return graphs(x, timesteps, *graphs.prepare(context, vector))


def test_a_replay_gives_the_numbers_of_a_call(unet, calls, recorded):
    graphs, inputs = Graphs(unet), [draw(unet, seed) for seed in range(4)]
    outs = [call(graphs, *each) for each in inputs]
    assert calls == [2, 2]  # the first, and the recording
    for out, each in zip(outs, inputs, strict=True):  # none of them was overwritten by a later one
        assert torch.equal(out, unet(*each))


def test_two_pictures_in_turns_do_not_see_each_others_text(unet, recorded):
    graphs, (x, t, *first), (*_, context, vector) = Graphs(unet), draw(unet, 0), draw(unet, 1)
    prepared = graphs.prepare(*first), graphs.prepare(context, vector)
    for step in range(4):
        for mine, condition in zip(prepared, (first, (context, vector)), strict=True):
            assert torch.equal(graphs(x + step, t, *mine), unet(x + step, t, *condition))
    assert recorded.made == 1


def test_each_shape_and_dtype_has_a_recording_and_all_use_the_same_memory(unet, calls, recorded):
    graphs = Graphs(unet)
    for _ in range(3):
        for batch, size in ((1, 8), (2, 8), (1, 6)):
            each = draw(unet, 0, batch, size)
            assert torch.equal(call(graphs, *each), unet.forward(*each))
    assert recorded.made == 3
    assert len({id(c.graph.pool()) for c in graphs._calls.values()}) == 1


def test_only_so_many_recordings_are_kept(unet, recorded):
    graphs = Graphs(unet)
    for batch in range(1, SHAPES + 3):
        for _ in range(2):
            call(graphs, *draw(unet, 0, batch, 2))
        assert len(graphs._calls) <= SHAPES
    assert recorded.made == SHAPES + 2


def test_new_weights_another_attention_and_a_hook_are_all_seen(unet, recorded):
    graphs, inputs = Graphs(unet), draw(unet, 0)
    for _ in range(3):
        before = call(graphs, *inputs)

    unet.mid.res_in.conv1.weight.mul_(1.5)  # in place: the recording reads the new numbers
    assert torch.equal(call(graphs, *inputs), unet(*inputs))
    assert recorded.made == 1
    unet.mid.res_in.conv1.weight.data = 2 * unet.mid.res_in.conv1.weight
    for _ in range(3):
        assert torch.equal(call(graphs, *inputs), unet(*inputs))
    assert recorded.made == 2
    set_attention(unet, math_attention)
    for _ in range(3):
        assert torch.equal(call(graphs, *inputs), unet(*inputs))
    assert recorded.made == 3

    seen = []
    with unet.mid.register_forward_hook(lambda *_: seen.append(1)):
        for _ in range(3):
            assert torch.equal(call(graphs, *inputs), unet(*inputs))
    assert len(seen) == 6
    assert recorded.made == 3
    for _ in range(3):
        assert torch.equal(call(graphs, *inputs), unet(*inputs))
    assert recorded.made == 4
    assert not torch.equal(before, call(graphs, *inputs))


def test_where_nothing_can_be_recorded_a_warning_says_why_and_the_unet_is_called(unet, recorded):
    set_attention(unet, lambda q, k, v: math_attention(q, k, v) if q.sum().item() else v)
    graphs, inputs = Graphs(unet), draw(unet, 0)
    call(graphs, *inputs)
    with pytest.warns(UserWarning, match="without a CUDA graph: operation not permitted when"):
        assert torch.equal(call(graphs, *inputs), unet(*inputs))
    with warnings.catch_warnings(action="error"):
        assert torch.equal(call(graphs, *inputs), unet(*inputs))
    assert recorded.made == 1


def test_where_there_is_no_cuda_that_is_the_reason(unet):
    graphs, inputs = Graphs(unet), draw(unet, 0)
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    call(graphs, *inputs)
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        assert torch.equal(call(graphs, *inputs), unet(*inputs))
