"""Three attentions, one result."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import nn

from ldm.models.attention import math_attention, sdpa, set_attention, sliced_attention
from ldm.models.transformer import Attention
from ldm.models.unet import UNet
from tests.tiny import TINY_RANDOM


def qkv(dtype=torch.float32, b=2, h=3, n=20, m=7, d=8):
    g = torch.Generator().manual_seed(0)
    shapes = ((b, h, n, d), (b, h, m, d), (b, h, m, d))
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def test_math_attention_is_the_formula_in_fp64():
    q, k, v = qkv()
    weights = torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()) / 8**0.5
    expected = torch.einsum("bhnm,bhmd->bhnd", weights.softmax(-1), v.double())
    difference = (math_attention(q, k, v) - expected).abs().max().item()
    print(f"math attention against fp64: {difference:.1e}")
    assert difference < 1e-6  # a few roundings of fp32


def test_sdpa_equals_math_attention():
    q, k, v = qkv()
    torch.testing.assert_close(sdpa(q, k, v), math_attention(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("budget", [1, 6, 7, 8, 14, 50, 140, 141, 280, 420, 840, 10**9])
def test_sliced_attention_equals_math_for_every_budget(budget):
    q, k, v = qkv()
    v = v[..., :5]  # narrower than q
    out = sliced_attention(q, k, v, budget=budget)
    # the same sums in the same order, but a matrix product may block another shape differently
    torch.testing.assert_close(out, math_attention(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.fixture
def slices(monkeypatch):
    """The number of scores of each slice that `sliced_attention` computes."""
    sizes = []

    def spy(q, k, v):
        sizes.append(q.shape[0] * q.shape[1] * k.shape[1])
        return math_attention(q, k, v)

    monkeypatch.setattr("ldm.models.attention.math_attention", spy)
    return sizes


# 6 heads of 20 rows of 7 scores: 1 row at a time, 4 rows, one head, two heads
@pytest.mark.parametrize(("budget", "count"), [(7, 120), (33, 30), (140, 6), (300, 3)])
def test_sliced_attention_takes_the_largest_slices_that_its_budget_allows(budget, count, slices):
    sliced_attention(*qkv(), budget=budget)
    assert max(slices) <= budget
    assert len(slices) == count
    assert sum(slices) == 2 * 3 * 20 * 7  # each score once


def test_without_a_budget_a_slice_has_two_million_scores(slices):
    sliced_attention(*qkv(b=1, h=2, n=1024, m=2048, d=2))
    assert slices == [2**21, 2**21]


def test_a_budget_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1 score element, got 0"):
        sliced_attention(*qkv(), budget=0)


def test_the_softmax_of_half_precision_runs_in_fp32():
    q, k, v = qkv(torch.bfloat16)
    expected = math_attention(*(t.float() for t in (q, k, v)))
    out = math_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() < 2e-2  # bf16 keeps 8 bits


def test_set_attention_reaches_every_layer_and_changes_nothing_else():
    torch.manual_seed(0)
    layers = Attention(16, 2), Attention(16, 4)
    net = nn.Sequential(layers[0], nn.Sequential(layers[1]))
    x = torch.randn(1, 5, 16)
    before = net(x)
    attend = partial(sliced_attention, budget=10)
    set_attention(net, attend)
    assert all(layer.attend is attend for layer in layers)
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attend", [sdpa, math_attention, sliced_attention])
def test_upcast_attention_survives_scores_that_overflow_fp16(attend):
    torch.manual_seed(0)
    layer = Attention(64, 1, upcast=True).half()
    layer.attend = attend
    for projection in (layer.to_q, layer.to_k):
        projection.weight.data = 300 * torch.eye(64, dtype=torch.float16)
    x = torch.randn(1, 5, 64).half()
    q = k = 300 * x.float()
    assert (q @ k.mT / 8).max() > 65504  # the largest fp16
    out = layer(x)
    assert out.dtype == torch.float16
    exact = layer.float()(x.float())
    # fp16 keeps 11 bits: the values are rounded at the projection, after attending, and at the output
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=4e-3)
    layer.upcast = False
    if attend is not sdpa:  # whose fused kernel keeps scores in fp32, where there is one
        assert not layer.half()(x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_upcasting_leaves_other_dtypes_alone(dtype):
    layer, seen = Attention(16, 2, upcast=True).to(dtype), []
    layer.attend = lambda q, k, v: seen.append({q.dtype, k.dtype, v.dtype}) or sdpa(q, k, v)
    assert layer(torch.randn(1, 5, 16, dtype=dtype)).dtype == dtype
    assert seen == [{dtype}]


@pytest.mark.parametrize("upcast", [False, True])
def test_every_attention_of_a_unet_upcasts_if_its_configuration_says_so(upcast):
    config = dataclasses.replace(TINY_RANDOM.unet, upcast_attention=upcast)
    layers = [part for part in UNet(config).modules() if isinstance(part, Attention)]
    assert len(layers) == 8  # two in each transformer: one down, one in the middle, two up
    assert {layer.upcast for layer in layers} == {upcast}
