"""Weights that come and go: the same numbers, never more of them than promised, and all at home afterwards."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm.conditioning import Condition
from ldm.models.attention import set_attention
from ldm.models.transformer import TransformerBlock
from ldm.models.unet import Encoder, UNet
from ldm.placement import offload as module
from ldm.placement.live_bytes import LiveBytes
from ldm.placement.offload import Moved, Streamed, pin, tensors_of
from ldm.presets import SD15, SDXL_BASE
from tests.tiny import TINY_SDXL, random_networks

MIB = 2**20


@pytest.fixture
def unet() -> UNet:
    """A tiny random SDXL UNet."""
    return random_networks(TINY_SDXL)[0].requires_grad_(False)


def inputs(unet, batch=2):
    torch.manual_seed(1)
    x, context = torch.randn(batch, 4, 8, 8), torch.randn(batch, 5, unet.config.context_dim)
    return x, torch.full((batch,), 500.0), context, torch.randn(batch, unet.config.vector_dim)


def addresses(module):
    return [tensor.data_ptr() for tensor in tensors_of(module)]


both = pytest.mark.parametrize("offload", [Moved, Streamed])


@both
def test_offload_changes_no_bit_and_every_parameter_is_back_where_it_was(unet, offload):
    expected, homes = unet(*inputs(unet)), addresses(unet)
    weights = offload(unet, "cpu")
    for _ in range(2):  # the same object may be used again
        with weights:
            for _ in range(2):
                assert torch.equal(unet(*inputs(unet)), expected)
            away = sum(a != b for a, b in zip(addresses(unet), homes, strict=True))
            assert away == len(homes) if offload is Moved else 0 < away < len(homes)
        assert addresses(unet) == homes
    assert not any(m._forward_pre_hooks for m in unet.modules())
    assert torch.equal(unet(*inputs(unet)), expected)


@pytest.mark.parametrize("mid", ["residual", "none"])
def test_a_middle_that_lacks_parts_has_its_turn_like_any_other(mid):
    torch.manual_seed(0)
    config = dataclasses.replace(TINY_SDXL.unet, mid=mid, guidance_dim=16)
    unet = UNet(config).requires_grad_(False)
    *given, guidance = *inputs(unet), None, torch.tensor([7.5, 1.0])
    expected, homes = unet(*given, guidance), addresses(unet)
    with Streamed(unet, "cpu"):
        for _ in range(2):
            assert torch.equal(unet(*given, guidance), expected)
    assert addresses(unet) == homes


@both
def test_after_an_error_everything_is_back_too(unet, offload):
    homes = addresses(unet)
    unet.up[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), offload(unet, "cpu"):
        unet(*inputs(unet))
    assert addresses(unet) == homes


@both
def test_when_memory_runs_out_on_the_way_in_everything_is_back_too(unet, offload, monkeypatch):
    homes, empty_like = addresses(unet), torch.empty_like
    granted = iter(range(6))

    def out_of_memory(home, **kwargs):
        if next(granted, None) is None:
            raise torch.OutOfMemoryError
        return empty_like(home, **kwargs)

    weights = offload(unet, "cpu")
    monkeypatch.setattr(torch, "empty_like", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError), weights:
        unet(*inputs(unet))
    monkeypatch.undo()
    assert addresses(unet) == homes
    assert not any(m._forward_pre_hooks for m in unet.modules())
    with weights:
        assert addresses(unet) != homes


@both
def test_ctrl_c_while_the_weights_are_exchanged_leaves_nothing_on_the_device(unet, offload, monkeypatch):
    homes, hold = addresses(unet), module._hold
    halves = iter([True])

    def interrupted(tensors, memory):
        if next(halves, False):
            hold(tensors[:1], memory[:1])
            assert addresses(unet) != homes
            raise KeyboardInterrupt
        hold(tensors, memory)

    monkeypatch.setattr(module, "_hold", interrupted)
    weights = offload(unet, "cpu")
    with pytest.raises(KeyboardInterrupt), weights:
        unet(*inputs(unet))
    assert addresses(unet) == homes


@both
def test_two_users_may_come_and_leave_in_any_order(unet, offload):
    expected, homes = unet(*inputs(unet)), addresses(unet)
    weights = offload(unet, "cpu")
    weights.__enter__()
    here = addresses(unet)
    weights.__enter__()
    assert addresses(unet) == here  # copied once
    weights.__exit__()
    assert torch.equal(unet(*inputs(unet)), expected)
    assert addresses(unet) != homes
    weights.__exit__()
    assert addresses(unet) == homes
    assert not any(m._forward_pre_hooks for m in unet.modules())


@both
def test_weights_that_joined_after_the_object_was_made_are_brought_too(unet, offload):
    weights = offload(unet, "cpu")
    stage = unet.up[0]
    stage.joined = nn.Parameter(torch.ones(3))
    unet.buffers_joined = nn.BatchNorm1d(2)  # outside of the stages, with buffers
    tensors = [stage.joined, *tensors_of(unet.buffers_joined)]
    homes, seen = [t.data_ptr() for t in tensors], []
    stage.register_forward_hook(lambda *_: seen.append(stage.joined.data_ptr() != homes[0]))
    with weights:
        unet(*inputs(unet))
        assert all(t.data_ptr() != home for t, home in zip(tensors[1:], homes[1:], strict=True))
    assert seen == [True]
    assert [t.data_ptr() for t in tensors] == homes


def test_a_streamed_unet_has_two_stages_on_the_device_at_most(unet):
    stages = [*unet.down, unet.mid, *unet.up]
    homes = [addresses(stage) for stage in stages]
    there = []

    def look(*_):
        there.append([i for i, s in enumerate(stages) if addresses(s) != homes[i]])

    with Streamed(unet, "cpu"):
        for stage in stages:
            stage.register_forward_hook(look)
        unet(*inputs(unet))
    n = len(stages)
    assert there == [sorted({i, (i + 1) % n}) for i in range(n)]


def test_a_condition_is_bound_with_the_weights_that_are_on_the_device(unet):
    x, t, context, vector = inputs(unet)
    condition = Condition(context, vector)
    expected = unet.bind(condition)(x, t)
    seen = []
    for block in unet.modules():
        if isinstance(block, TransformerBlock):
            home = block.attn2.to_k.weight.data_ptr()
            block.attn2.to_k.register_forward_hook(
                lambda layer, args, out, home=home: seen.append(layer.weight.data_ptr() != home)
            )
    with Streamed(unet, "cpu"):
        network = unet.bind(condition)
        blocks = len(seen)
        assert torch.equal(network(x, t), expected)
    assert seen == [True] * blocks  # all projected by `bind`, none by the call
    assert blocks > 3


def test_stages_may_be_left_out_or_called_in_any_order(unet):
    x, t, context, vector = inputs(unet)
    emb = unet.embed(t, vector, x.dtype)
    x = torch.randn(2, 16, 8, 8)
    expected = unet.down[1](x, emb, context)
    with Streamed(unet, "cpu") as weights:
        for i in [1, len(weights.stages) - 1, 0, 2, 1, 1, 3, 2]:
            weights._begin_turn(i, weights.stages[i], ())
            assert {i, (i + 1) % len(weights.stages)} == weights.here.keys()
        for _ in range(2):  # and none but this one
            assert torch.equal(unet.down[1](x, emb, context), expected)


def test_a_network_without_decoder_is_streamed_too():
    torch.manual_seed(0)
    encoder = Encoder(TINY_SDXL.unet).requires_grad_(False)  # as of a ControlNet
    x, t, context, vector = torch.randn(2, 4, 8, 8), torch.full((2,), 500.0), *inputs(UNet(TINY_SDXL.unet))[2:]
    expected, homes = encoder.encode(x, encoder.embed(t, vector, x.dtype), context)[0], addresses(encoder)
    with Streamed(encoder, "cpu") as weights:
        assert torch.equal(encoder.encode(x, encoder.embed(t, vector, x.dtype), context)[0], expected)
        assert len(weights.here) == 2
    assert addresses(encoder) == homes


# ------------------------------------------------------------------ the order of two CUDA streams


class Stream:
    """A CUDA stream that only keeps count: `seen` is how much of every stream comes before what is queued next."""

    def __init__(self, name):
        self.name, self.seen = name, {}

    def queue(self):
        """Queue one piece of work, and return what identifies it."""
        self.seen[self.name] = self.seen.get(self.name, 0) + 1
        return self.name, self.seen[self.name]

    def comes_after(self, work):
        name, number = work
        return self.seen.get(name, 0) >= number

    def wait_stream(self, other):
        for name, number in other.seen.items():
            self.seen[name] = max(self.seen.get(name, 0), number)


class Races(TorchDispatchMode):
    """Watches copied tensors: whether each is read after its copy, and its memory reused after it was read."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.current = self.computing = Stream("computing")
        self.copying = Stream("copying")
        self.copies = {}  # address -> the tensor, its copy and the last reads of it
        self.found, self.checked = [], 0
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.switch)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    @contextmanager
    def switch(self, stream):
        previous, self.current = self.current, stream
        yield
        self.current = previous

    def given_up(self, unet):
        """The copies that no parameter holds any more: their memory is free for the next copy."""
        held = set(addresses(unet))
        return [a for a in self.copies if a not in held]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and self.current is self.copying:
            for address in self.given_up(self.unet):
                _, _, read = self.copies.pop(address)
                self.checked += 1
                if read and not self.current.comes_after(read):
                    self.found.append("memory is overwritten while it is read")
            self.copies[args[0].data_ptr()] = [args[0], self.current.queue(), None]
            return func(*args, **(kwargs or {}))
        work = self.current.queue()
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.data_ptr() in self.copies:
                copy = self.copies[leaf.data_ptr()]
                self.checked += 1
                if not self.current.comes_after(copy[1]):
                    self.found.append("a weight is read before it was copied")
                copy[2] = work
        return func(*args, **(kwargs or {}))


def watch(unet, monkeypatch):
    weights, races = Streamed(unet, "cpu"), Races(monkeypatch)
    weights.copying, races.unet = races.copying, unet
    with races, weights:
        for _ in range(2):
            unet(*inputs(unet))
    return races


def test_no_copy_races_with_the_computation(unet, monkeypatch):
    races = watch(unet, monkeypatch)
    assert races.checked > 100
    assert not races.found


@pytest.mark.parametrize(("stream", "message"), [("computing", "read before"), ("copying", "overwritten while")])
def test_that_check_would_see_a_wait_that_is_missing(unet, monkeypatch, stream, message):
    wait_stream = Stream.wait_stream
    monkeypatch.setattr(Stream, "wait_stream", lambda self, other: self.name == stream or wait_stream(self, other))
    assert any(message in found for found in watch(unet, monkeypatch).found)


def test_the_next_stage_is_copied_while_this_one_computes(unet, monkeypatch):
    events = []
    weights, races = Streamed(unet, "cpu"), Races(monkeypatch)
    weights.copying, races.unet = races.copying, unet
    copied = {}  # stage -> how much is queued for copying with its copy
    first = {id(tensors_of(stage)[0]): i for i, stage in enumerate(weights.stages)}
    move = module.move

    def copy(tensors, device, keep):
        tensors = list(tensors)
        move(tensors, device, keep)
        i = first.get(id(tensors[0]))
        if i is not None:
            events.append(("copy", i))
            copied[i] = races.copying.seen["copying"]

    monkeypatch.setattr(module, "move", copy)
    for i, stage in enumerate(weights.stages):
        stage.register_forward_hook(lambda *_, i=i: events.append(("compute", i)))
        stage.register_forward_hook(
            # all that the computing stream has waited for by then is its own copy
            lambda *_, i=i: assert_equal(races.computing.seen["copying"], copied[i])
        )
    with races, weights:
        unet(*inputs(unet))
    n = len(weights.stages)
    pairs = [(("copy", (i + 1) % n), ("compute", i)) for i in range(n)]
    assert events == [("copy", 0), *(event for pair in pairs for event in pair)]


def assert_equal(a, b):
    assert a == b


def test_pinned_weights_keep_their_values_and_layout(unet, monkeypatch):
    unet.to(memory_format=torch.channels_last)
    before = [(t.clone(), t.stride()) for t in tensors_of(unet)]
    pinned = []
    monkeypatch.setattr(  # a CPU has no page-locked memory to give
        torch.Tensor, "pin_memory", lambda self: pinned.append(self.clone()) or pinned[-1]
    )
    pin(unet)
    assert [t.data_ptr() for t in pinned] == addresses(unet)
    for tensor, (value, stride) in zip(tensors_of(unet), before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor.stride() == stride
    with Streamed(unet, "cpu"), torch.no_grad():
        unet(*inputs(unet))
        assert unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------ what it takes at full size


def fused(q, k, v):
    """Attention with the memory of a fused kernel: its output."""
    return torch.empty_like(q)


def on_meta(config, size):
    """A UNet in fp16 without memory, and what a guided call of it takes."""
    with torch.device("meta"):
        unet = UNet(config.unet).half().requires_grad_(False)
        x = torch.empty(2, 4, size // 8, size // 8, dtype=torch.float16)
        context = torch.empty(2, 77, config.unet.context_dim, dtype=torch.float16)
        vector = torch.empty(2, config.unet.vector_dim or 1, dtype=torch.float16)
        timesteps = torch.empty(2)
    set_attention(unet, fused)
    return unet, (x, timesteps, context, vector)


def peaks(config, size):
    """MiB of one call's activations, of all weights, and of those that are on the device when streamed."""
    unet, inputs = on_meta(config, size)
    with LiveBytes() as activations:
        unet(*inputs)
    with LiveBytes() as parts, Streamed(unet, "meta") as weights:
        for i in 2 * [*range(len(weights.stages))]:
            weights._begin_turn(i, weights.stages[i], ())
    whole = sum(tensor.nbytes for tensor in tensors_of(unet))
    sizes = [size / MIB for size in (activations.peak, whole, parts.peak)]
    print(f"\n  {config.name}, {size} px: {[round(size) for size in sizes]}")
    return sizes


def test_sd15_at_512_fits_two_gib_moved_and_a_third_of_that_streamed():
    activations, whole, parts = peaks(SD15, 512)
    assert whole == pytest.approx(1639.4, abs=0.1)
    assert activations + whole < 1800
    assert activations + parts < 600


@pytest.mark.slow
def test_sdxl_at_1024_fits_half_of_four_gib_streamed():
    activations, whole, parts = peaks(SDXL_BASE, 1024)
    assert whole == pytest.approx(4897.0, abs=0.1)
    assert activations + parts < 2048


def test_moving_nothing_is_no_error():
    with Moved(nn.Module(), "cpu"):
        pass
