"""Weights in eight bits: how far the numbers move, what they take, and what cannot be done with them."""

import pytest
import torch
from ldm.models.int8 import can_quantize, is_plain, quantize
from torch import nn

import ldm
from ldm.checkpoint import files
from ldm.placement.memory import Placement
from tests.tiny import TINY_RANDOM, random_networks

pytestmark = pytest.mark.skipif(not can_quantize(), reason="needs torchao")
REQUEST = ldm.Request("a frog", steps=3)


def difference(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.fixture
def pipe(model_folder):
    return ldm.load(model_folder, Placement("cpu", int8=True))


def test_a_layer_is_one_of_weights_rounded_to_256_levels():
    linear, x = nn.Linear(48, 32).requires_grad_(False), torch.randn(5, 48)
    weight, exact = linear.weight.clone(), linear(x)
    quantize(linear)
    rounded = linear.weight.dequantize()
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((weight - rounded).abs() <= 0.51 * step).all()
    assert difference(linear(x), nn.functional.linear(x, rounded, linear.bias)) < 1e-5
    assert 1e-3 < difference(linear(x), exact) < 1e-2


def test_every_linear_layer_of_the_unet_is_held_in_a_byte_a_weight_and_nothing_else(pipe):
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        for part in network.modules():
            if isinstance(part, nn.Linear):
                quantized = network is pipe.unet
                assert is_plain(part.weight) is not quantized
                if quantized:
                    assert part.weight.qdata.dtype == torch.int8
            elif isinstance(part, nn.Conv2d):
                assert is_plain(part.weight)


@pytest.mark.parametrize("guidance", ["batched", "sequential"])
def test_the_latents_of_a_model_move_by_a_hundredth(model_folder, guidance):
    *_, expected = ldm.load(model_folder, Placement("cpu", guidance=guidance)).stream(REQUEST)
    *_, found = ldm.load(model_folder, Placement("cpu", guidance=guidance, int8=True)).stream(REQUEST)
    error = difference(found.x, expected.x)
    print(f"{error:.1e}")
    assert 0 < error < 0.02


@pytest.mark.slow
def test_it_works_in_compiled_blocks():
    unet = random_networks(TINY_RANDOM)[0].requires_grad_(False)
    quantize(unet)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 100.0]), torch.randn(2, 5, 32)
    expected = unet(x, t, context)
    ldm.placement.memory.compile_blocks(unet, backend="aot_eager")
    assert difference(unet(x, t, context), expected) < 1e-5
    torch.compiler.reset()


def test_a_model_in_int8_is_not_saved(pipe, tmp_path):
    with pytest.raises(ValueError, match=r"held as Int8Tensor, .*load the model without int8"):
        files.save(pipe, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_are_an_error_as_ever(pipe):
    pipe.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"conv_out\.bias of the UNet holds NaN"):
        pipe.generate(REQUEST)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"device": "cpu", "packed": True}, "go with no packed weights"),
        ({"device": "cuda", "offload": "model"}, "go with no offload 'model'"),
    ],
)
def test_what_cannot_be_in_int8_is_refused(monkeypatch, choices, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=f"weights in int8 {message}"):
        Placement(**choices, int8=True).resolve()


def test_without_torchao_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("ldm.placement.memory.can_quantize", lambda: False)
    with pytest.raises(ValueError, match="need torchao: pip install torchao"):
        Placement("cpu", int8=True).resolve()
