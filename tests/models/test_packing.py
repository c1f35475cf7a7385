"""Packed layers compute what plain ones do, and can be copied, saved and undone."""

import copy

import pytest
import torch
from torch import nn

from ldm.config import UNetConfig, VAEConfig
from ldm.models.packing import Packed, PackedConv2d, PackedLinear, PackedPixelwise, can_pack, pack, unpack
from ldm.models.unet import UNet
from ldm.models.vae import VAE

pytestmark = pytest.mark.skipif(not can_pack(), reason="this torch is built without oneDNN")
ROUNDING = {  # sums in another order: a few units in the last place
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.02, "atol": 0.02},
}
CONFIG = UNetConfig(
    channels=(32, 64), depth=(1, 1), heads=(2, 2), res_blocks=1, context_dim=16, norm_groups=8
)


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG).eval().requires_grad_(False)


def call(unet: UNet) -> torch.Tensor:
    noise = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 9, 5, generator=noise), torch.randn(2, 3, 16, generator=noise)
    with torch.no_grad():
        return unet(x, torch.tensor([3.0, 900.0]), context)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": 3, "padding": 1, "bias": False},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 1, "padding": 1},
    ],
    ids=str,
)
def test_a_packed_convolution_is_the_plain_one_of_channels_last_bit_for_bit(options, dtype):
    conv = nn.Conv2d(24, 40, **options).to(dtype).requires_grad_(False)
    x = torch.randn(2, 24, 13, 8).to(dtype)
    expected = conv(x.to(memory_format=torch.channels_last))
    plain, weight = conv(x), conv.weight.clone()
    pack(conv)
    assert type(conv) is PackedConv2d
    for _ in range(2):
        assert torch.equal(conv(x), expected)
        assert torch.equal(conv(x.to(memory_format=torch.channels_last)), expected)
    torch.testing.assert_close(expected, plain, **ROUNDING[dtype])
    assert torch.equal(conv.state_dict()["weight"], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (2, 77), (3, 5, 7)], ids=str)
def test_a_packed_linear_layer_is_the_plain_one_but_for_rounding(rows, bias, dtype):
    linear = nn.Linear(24, 40, bias=bias).to(dtype).requires_grad_(False)
    x = torch.randn(*rows, 24).to(dtype)
    expected, weight = linear(x), linear.weight.clone()
    pack(linear)
    assert type(linear) is PackedLinear
    torch.testing.assert_close(linear(x), expected, **ROUNDING[dtype])
    assert torch.equal(linear.state_dict()["weight"], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_of_one_pixel_becomes_a_linear_layer(layout, dtype):
    conv = nn.Conv2d(24, 40, 1).to(dtype).requires_grad_(False)
    x = torch.randn(2, 24, 13, 8).to(dtype, memory_format=layout)
    expected, weight = conv(x), conv.weight.clone()
    pack(conv)
    assert type(conv) is PackedPixelwise
    out = conv(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected, **ROUNDING[dtype])
    assert torch.equal(conv.state_dict()["weight"], weight)


def test_a_network_of_packed_convolutions_computes_the_same_and_keeps_its_state(unet):
    expected, state = call(unet), {k: v.clone() for k, v in unet.state_dict().items()}
    pack(unet)
    assert any(isinstance(part, PackedConv2d) for part in unet.modules())
    # summed in another order
    torch.testing.assert_close(call(unet), expected, rtol=1e-5, atol=1e-5)
    assert unet.state_dict().keys() == state.keys()
    assert all(torch.equal(unet.state_dict()[key], value) for key, value in state.items())


def test_it_is_undone_whether_or_not_it_was_used(unet):
    expected = call(unet)
    for used in (False, True):
        pack(unet)
        if used:
            call(unet)
        unpack(unet)
        assert not any(isinstance(part, Packed) for part in unet.modules())
        assert torch.equal(call(unet), expected)


def test_a_packed_network_can_be_copied_and_pickled(unet):
    pack(unet)
    expected = call(unet)
    assert torch.equal(call(copy.deepcopy(unet)), expected)
    assert torch.equal(call(unet), expected)


def test_the_plain_weights_are_let_go(unet):
    pack(unet)
    layers = [part for part in unet.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    assert all(isinstance(layer, Packed) and layer.weight is None for layer in layers)


def test_gradients_to_the_input_are_those_of_the_plain_convolution():
    vae = VAE(VAEConfig(channels=(8, 8), res_blocks=1, norm_groups=4)).requires_grad_(False)
    latents = torch.randn(1, 4, 4, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(vae.decode(latents).square().sum(), latents)
    pack(vae)
    with torch.no_grad():
        vae.decode(latents)
    (found,) = torch.autograd.grad(vae.decode(latents).square().sum(), latents)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # summed in another order
