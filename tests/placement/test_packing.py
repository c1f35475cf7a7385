"""Packed layers compute what plain ones do, and can be copied, saved and undone."""

import copy
import os
import pickle
import subprocess
import sys
import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn

from ldm.config import UNetConfig, VAEConfig
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.placement.packing import Packed, PackedConv2d, PackedLinear, can_pack, pack, unpack

pytestmark = pytest.mark.skipif(not can_pack(), reason="this torch is built without oneDNN")
DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {  # sums in another order: a few units in the last place
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.02, "atol": 0.02},
}
CONFIG = UNetConfig(channels=(32, 64), depth=(1, 1), heads=(2, 2), res_blocks=1, context_dim=16, norm_groups=8)


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG).eval().requires_grad_(False)


def call(unet: UNet) -> torch.Tensor:
    noise = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 9, 5, generator=noise), torch.randn(2, 3, 16, generator=noise)
    with torch.no_grad():
        return unet(x, torch.tensor([3.0, 900.0]), context)


def packed(layer: nn.Module) -> nn.Module:
    """The packed form of a layer, which stays as it is."""
    network = nn.Sequential(layer)
    pack(network)
    return network[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": 3, "padding": 1, "bias": False},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 4},
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 1, "padding": 1},
    ],
    ids=str,
)
def test_a_packed_convolution_is_the_plain_one_of_channels_last_bit_for_bit(options, dtype):
    plain = nn.Conv2d(24, 40, **options).to(dtype).requires_grad_(False)
    conv = packed(plain)
    assert type(conv) is PackedConv2d
    for size in ((2, 24, 13, 8), (1, 24, 32, 32), (2, 24, 4, 4), (2, 24, 13, 8)):
        x = torch.randn(size).to(dtype)
        last = x.to(memory_format=torch.channels_last)
        for _ in range(2):
            assert torch.equal(conv(x), plain(last))
            assert torch.equal(conv(last), plain(last))
        assert conv(x).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(conv(x), plain(x), **ROUNDING[dtype])
        assert torch.equal(conv.state_dict()["weight"], plain.weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (2, 77), (3, 5, 7)], ids=str)
def test_a_packed_linear_layer_is_the_plain_one_but_for_rounding(rows, bias, dtype):
    plain = nn.Linear(24, 40, bias=bias).to(dtype).requires_grad_(False)
    linear = packed(plain)
    assert type(linear) is PackedLinear
    x = torch.randn(*rows, 24).to(dtype)
    for _ in range(2):
        torch.testing.assert_close(linear(x), plain(x), **ROUNDING[dtype])
    assert torch.equal(linear.state_dict()["weight"], plain.weight)


CALLS_TWICE = """
import torch
from torch import nn
from ldm.placement.packing import pack

layers = [  # input channels, output channels, latent pixels: the bundled model's, SD 1.5's, the SDXL refiner's
    *((4, 96, 16), (96, 96, 16), (256, 96, 16), (160, 160, 8), (352, 160, 8)),
    *((192, 192, 4), (384, 192, 4), (192, 192, 8), (576, 576, 8), (320, 320, 32), (1280, 1280, 8)),
    *((4, 384, 32), (384, 384, 32), (384, 384, 16), (768, 768, 16), (1536, 768, 16), (1536, 1536, 8)),
]
kinds = [
    *(lambda i, o: nn.Conv2d(i, o, 3, padding=1), lambda i, o: nn.Conv2d(i, o, 3, 2, padding=1)),
    *(lambda i, o: nn.Conv2d(i, o, 1), nn.Linear),
]
with torch.no_grad():
    for dtype in (torch.float32, torch.bfloat16):
        for i, o, side in layers:
            for kind in kinds:
                network = nn.Sequential(kind(i, o)).to(dtype)
                pack(network)
                size = (2 * side, i) if kind is nn.Linear else (2, i, side, side)
                x = torch.randn(size).to(dtype)
                if kind is not nn.Linear:
                    x = x.to(memory_format=torch.channels_last)
                network(x)
                print("second call of", dtype, size, network, flush=True)
                network(x)
                print("end", flush=True)
"""


@pytest.mark.slow
def test_no_weight_is_reordered_once_a_layer_was_called_with_that_size():
    told = subprocess.run(
        [sys.executable, "-c", CALLS_TWICE],
        env=os.environ | {"ONEDNN_VERBOSE": "1"}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    calls = [call.split("end\n")[0] for call in told.split("second call of ")[1:]]
    assert len(calls) == 2 * 17 * 4
    for call in calls:
        # "onednn_verbose,...,exec,cpu,convolution,..."
        done = [line.split("exec,cpu,")[1] for line in call.splitlines() if "exec,cpu," in line]
        assert len(done) == 1, call
        assert not done[0].startswith("reorder"), call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [96, 192, 320])
def test_sizes_in_turn_pack_a_weight_again_only_if_they_want_another_order(width, dtype):
    conv = packed(nn.Conv2d(width, width, 3, padding=1).to(dtype).requires_grad_(False))
    held = []
    for batch, side in [(2, 16), (1, 16), (2, 16), (2, 4), (2, 16)]:
        conv(torch.randn(batch, width, side, side).to(dtype))
        held.append(conv.held)
    for (before, old), (after, new) in pairwise(held):
        assert (before is after) == (old == new)


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


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda u: pickle.loads(pickle.dumps(u))])
def test_a_packed_network_can_be_copied_and_pickled_whether_or_not_it_was_used(unet, copied):
    pack(unet)
    unused = copied(unet)
    expected = call(unet)
    assert torch.equal(call(unused), expected)
    assert torch.equal(call(copied(unet)), expected)
    assert torch.equal(call(unet), expected)


@pytest.mark.parametrize("used", [False, True])
def test_a_packed_network_takes_another_dtype_with_its_weights(unet, used):
    rounded = copy.deepcopy(unet).to(torch.bfloat16)
    pack(unet)
    if used:
        call(unet)
    for name, weight in unet.to(torch.bfloat16).state_dict().items():
        assert torch.equal(weight, rounded.state_dict()[name]), name


def test_the_plain_weights_are_let_go_when_they_are_packed(unet):
    pack(unet)
    layers = [part for part in unet.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    plain = [weakref.ref(layer.held[0]) for layer in layers]
    call(unet)
    assert all(isinstance(layer, Packed) and layer.weight is None for layer in layers)
    assert all(layer.held[0].is_mkldnn for layer in layers)
    assert not any(weight() is not None for weight in plain)


def test_gradients_to_the_input_are_those_of_the_plain_convolution():
    vae = VAE(VAEConfig(channels=(8, 8), res_blocks=1, norm_groups=4)).requires_grad_(False)
    latents = torch.randn(1, 4, 4, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(vae.decode(latents).square().sum(), latents)
    pack(vae)
    with torch.no_grad():
        vae.decode(latents)
    (found,) = torch.autograd.grad(vae.decode(latents).square().sum(), latents)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # summed in another order


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_packed_network_loads_a_state_dict_and_computes_with_the_new_weights(unet, used, assign):
    torch.manual_seed(5)
    other = UNet(CONFIG).eval().requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    pack(unet)
    if used:
        call(unet)
    assert str(unet.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    for tensor in state.values():
        tensor.fill_(torch.nan)  # the weights are copies: a packed weight must not change with the state dict
    pack(other)
    if not assign:
        assert torch.equal(call(unet), call(other))
    unpack(unet)
    assert torch.equal(unet.conv_out.weight, other.conv_out.dense())


def test_a_packed_layer_keeps_its_dtype_unless_weights_are_assigned():
    state = nn.Linear(3, 4).bfloat16().state_dict()
    for assign, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        linear = packed(nn.Linear(3, 4).requires_grad_(False))
        linear.load_state_dict(state, assign=assign)
        assert linear.dense().dtype == linear.bias.dtype == dtype
        assert torch.equal(linear.dense().float(), state["weight"].float())


def test_a_state_dict_that_does_not_fit_a_packed_layer_is_an_error():
    linear = packed(nn.Linear(3, 4).requires_grad_(False))
    weight, bias = torch.zeros(4, 3), torch.zeros(4)
    for state, message in (
        ({"bias": bias}, r"Missing key\(s\) in state_dict: \"weight\""),
        ({"weight": weight.T, "bias": bias}, "size mismatch for weight"),
        ({"weight": weight, "bias": bias, "scale": bias}, r"Unexpected key\(s\) in state_dict: \"scale\""),
    ):
        with pytest.raises(RuntimeError, match=message):
            linear.load_state_dict(state)
    assert linear.load_state_dict({"bias": bias}, strict=False).missing_keys == ["weight"]
