"""Where a model is placed by default, what is refused, and that each choice changes what it says and nothing else."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import ldm
from ldm.checkpoint import files
from ldm.models.attention import math_attention, sdpa, sliced_attention
from ldm.models.layers import ResBlock
from ldm.models.transformer import TransformerBlock
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline
from ldm.placement import choice, compiled, memory, offload, packing, slabs, tiles
from ldm.placement.choice import find_device
from ldm.placement.compiled import compile_blocks
from ldm.placement.memory import ATTENTION, Placement
from ldm.placement.offload import Moved, Streamed, tensors_of
from ldm.placement.packing import can_pack, unpack
from ldm.placement.slabs import slab_budget
from ldm.presets import SD15, SD21, SDXL_BASE
from tests.tiny import TINY_RANDOM, TINY_SDXL, random_networks

CUDA = torch.device("cuda")
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def cuda(monkeypatch):
    """A machine that says it has a GPU, which knows bf16 and fused attention."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(choice, "_is_fused", lambda width, dtype, device: True)


# ------------------------------------------------------------------ what is chosen


def test_a_cpu_computes_in_fp32_with_fused_attention_by_default():
    placed = Placement(device="cpu").resolve(SDXL_BASE)
    assert (placed.device, placed.dtype, placed.vae_dtype) == (torch.device("cpu"), FP32, FP32)
    assert placed.attention == "sdpa"
    assert placed.resolve(SDXL_BASE) == placed


def test_what_depends_on_the_model_stays_open_without_one():
    placed = Placement(device="cpu").resolve()
    assert (placed.dtype, placed.vae_dtype, placed.attention) == (FP32, None, None)


@pytest.mark.parametrize("device", [None, "cuda", "cuda:0"])
def test_a_gpu_computes_in_fp16_by_default(cuda, device):
    placed = Placement(device=device).resolve(SD15)
    assert placed.device.type == "cuda"
    assert (placed.dtype, placed.vae_dtype, placed.attention) == (FP16, FP16, "sdpa")


@pytest.mark.parametrize(
    ("config", "dtype", "has_bf16", "expected"),
    [
        (SD15, FP16, True, FP16),
        (SD21, FP16, True, FP16),
        (SDXL_BASE, FP16, True, BF16),  # fp16 overflows in it
        (SDXL_BASE, FP16, False, FP32),
        *((config, BF16, True, BF16) for config in (SD15, SDXL_BASE)),
        *((config, FP32, True, FP32) for config in (SD15, SDXL_BASE)),
    ],
)
def test_the_vae_computes_like_the_unet_unless_it_would_overflow(cuda, monkeypatch, config, dtype, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert Placement("cuda", dtype).resolve(config).vae_dtype == expected
    assert Placement("cuda", dtype, FP16).resolve(config).vae_dtype == FP16  # if one says so


def test_bf16_may_be_chosen_on_a_cpu_for_both():
    placed = Placement("cpu", BF16).resolve(SDXL_BASE)
    assert (placed.dtype, placed.vae_dtype) == (BF16, BF16)
    assert Placement("cpu", BF16, FP32).resolve(SDXL_BASE).vae_dtype == FP32


def test_where_sdpa_would_hold_all_scores_attention_is_sliced(cuda, monkeypatch):
    asked = set()

    def is_fused(width, dtype, device):
        asked.add((width, dtype))
        return dtype != BF16

    monkeypatch.setattr(choice, "_is_fused", is_fused)
    assert Placement("cuda").resolve(SD15).attention == "sdpa"
    assert asked == {(40, FP16), (80, FP16), (160, FP16), (512, FP16)}
    asked.clear()
    assert Placement("cuda").resolve(SD21).attention == "sdpa"
    assert asked == {(64, FP32), (512, FP16)}  # SD 2.1 attends in fp32
    asked.clear()
    # heads of 40, 80 and 160 channels, of which only some are there: level 2 attends going up alone
    unet = dataclasses.replace(SD15.unet, depth=(1, 0, 0, 0), up_depth=(0, 0, 1, 1), mid="residual")
    assert Placement("cuda").resolve(dataclasses.replace(SD15, unet=unet)).attention == "sdpa"
    assert asked == {(40, FP16), (80, FP16), (512, FP16)}
    assert Placement("cuda", BF16).resolve(SD15).attention == "sliced"
    assert Placement("cuda", BF16, attention="sdpa").resolve(SD15).attention == "sdpa"


def test_whether_there_is_a_fused_kernel_is_pytorchs_own_answer(monkeypatch):
    assert choice._is_fused(40, FP32, torch.device("cpu"))
    assert not choice._is_fused(40, FP32, torch.device("mps"))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device, **kw: empty(*shape, **kw))
    for flash, efficient in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(choice, "can_use_flash_attention", lambda p, f=flash: f)
        monkeypatch.setattr(choice, "can_use_efficient_attention", lambda p, e=efficient: e)
        assert choice._is_fused(40, FP16, CUDA) == (flash or efficient)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"dtype": torch.float16}, "dtype float16 is up to 200 times slower"),
        ({"vae_dtype": torch.float16}, "vae_dtype float16 is up to 200 times slower"),
        ({"dtype": "float16"}, "dtype float16 is up to 200 times slower"),
        ({"dtype": torch.float64}, "dtype must be one of float32, float16, bfloat16, got 'float64'"),
        ({"vae_dtype": "bf16"}, "vae_dtype must be one of float32, float16, bfloat16, got 'bf16'"),
        ({"attention": "flash"}, "attention must be one of sdpa, sliced, math, got 'flash'"),
        ({"guidance": "twice"}, "guidance must be one of batched, sequential, got 'twice'"),
        ({"vae_memory": "little"}, "vae_memory must be one of whole, slabs, tiles, got 'little'"),
        ({"offload": "disk"}, "offload must be one of model, blocks, got 'disk'"),
        ({"offload": "model"}, "offload needs a CUDA device, and the device is cpu: leave out offload"),
        ({"cuda_graph": True}, "cuda_graph needs a CUDA device, and the device is cpu: leave out cuda_graph"),
        ({"cuda_graph": "yes"}, "cuda_graph must be True or False, got 'yes'"),
        ({"device": "toaster"}, "device must be cpu, cuda, cuda:N or mps, got 'toaster'"),
        ({"device": "meta"}, "device must be cpu, cuda, cuda:N or mps, got 'meta'"),
        ({"device": 1.5}, "device must be cpu, cuda, cuda:N or mps, got 1.5"),
        ({"device": "cuda:99"}, "device cuda:99 is not available"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        Placement(**({"device": "cpu"} | choices)).resolve()


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="needs a machine without MPS")
def test_an_absent_mps_is_refused():
    with pytest.raises(ValueError, match="device mps is not available"):
        find_device("mps")


def test_a_dtype_may_be_given_by_its_name():
    assert Placement("cpu", "bfloat16", vae_dtype="float32") == Placement("cpu", BF16, FP32)
    assert Placement(dtype="bfloat16").dtype is BF16


def test_a_recorded_graph_needs_weights_that_stay(cuda):
    assert Placement(cuda_graph=True).resolve().cuda_graph
    with pytest.raises(ValueError, match="leave out offload or cuda_graph"):
        Placement(cuda_graph=True, offload="model").resolve()


@pytest.mark.slow
def test_reading_a_placement_imports_no_mode_that_was_not_chosen(tmp_path):
    code = """
import sys, ldm
ldm.load(placement=ldm.Placement("cpu")).generate(ldm.Request("a frog", steps=1))
print(*(name for name in sys.modules if name.startswith("ldm.placement.")))"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert set(told.stdout.split()) == {"ldm.placement.choice", "ldm.placement.memory"}


def test_every_field_is_an_option_with_a_text():
    for field in dataclasses.fields(Placement):
        assert field.metadata["help"], field.name
    flags = {field.name: field.metadata["flag"] for field in dataclasses.fields(Placement)}
    assert {name: flag for name, flag in flags.items() if flag} == {"guidance": "--guidance-passes"}


# ------------------------------------------------------------------ what is applied


def named(networks):
    return dict(zip(("unet", "vae", "text_encoder"), networks, strict=True))


@pytest.mark.parametrize(
    ("attention", "attend"), [("sdpa", sdpa), ("sliced", sliced_attention), ("math", math_attention)]
)
def test_the_attention_reaches_every_layer(attention, attend):
    networks = random_networks()
    Placement("cpu", FP32, FP32, attention).apply(named(networks))
    for network in networks[:2]:
        assert {m.attend for m in network.modules() if hasattr(m, "attend")} == {attend}
    assert set(ATTENTION.values()) == {sdpa, sliced_attention, math_attention}


@pytest.mark.parametrize(
    ("device", "dtype", "last"),
    [("cuda", FP16, True), ("cuda", BF16, True), ("cuda", FP32, False), ("cpu", BF16, False)],
)
def test_half_precision_on_cuda_puts_the_channels_last(cuda, device, dtype, last):
    unet, vae, text_encoder = random_networks()
    unet.to(dtype)
    Placement(device, dtype, dtype, "sdpa").apply(named((unet, vae, text_encoder)))
    weights = [m.weight for n in (unet, vae) for m in n.modules() if isinstance(m, nn.Conv2d)]
    assert {w.dtype for w in weights} == {dtype}
    weights = [w for w in weights if w.shape[1] > 1 and w.shape[2] > 1]  # others are both
    assert all(w.is_contiguous(memory_format=torch.channels_last) == last for w in weights)


def test_channels_last_changes_no_more_than_rounding(cuda):
    torch.manual_seed(0)
    unet = random_networks()[0]
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    with torch.no_grad():
        plain = unet(x, torch.full((2,), 500.0), context)
        unet.to(memory_format=torch.channels_last)
        torch.testing.assert_close(unet(x, torch.full((2,), 500.0), context), plain)


@pytest.mark.parametrize("mode", ["model", "blocks"])
def test_weights_that_wait_are_pinned(cuda, monkeypatch, mode):
    pinned = []
    monkeypatch.setattr(offload, "pin", pinned.append)
    networks = random_networks()
    Placement("cuda", FP32, FP32, "sdpa", offload=mode).apply(named(networks))
    assert pinned == list(networks)


def test_networks_of_any_name_are_set_up_in_one_order(cuda, monkeypatch):
    done = []
    record = {  # what is called last of each kind; packing and offload never go together, except here
        "attention": (memory, "set_attention"),
        "compile": (compiled, "compile_blocks"),
        "pack": (packing, "pack"),
        "pin": (offload, "pin"),
    }
    for name, (module, function) in record.items():
        monkeypatch.setattr(module, function, lambda network, *rest, name=name: done.append((name, network)))
    networks = named(random_networks()) | {"control": UNet(TINY_RANDOM.unet).half()}
    placement = Placement("cuda", FP32, FP16, "sdpa", offload="model", compile=True, packed=True)
    placement.apply(networks)
    for name, network in networks.items():
        steps = ["pin"] if name == "text_encoder" else list(record)
        assert [step for step, one in done if one is network] == steps
    assert networks["vae"].decoder.conv_in.weight.dtype == FP16
    assert networks["control"].down[0].conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_each_offload_brings_weights_in_its_way(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    unet, vae, _ = random_networks()
    whole = Placement("cuda", offload="model").at_work(unet)
    parts = Placement("cuda", offload="blocks").at_work(unet)
    assert isinstance(whole, Moved)
    assert isinstance(parts, Streamed)
    assert isinstance(Placement("cuda", offload="blocks").at_work(vae), Moved)
    assert whole.device == parts.device == CUDA
    with Placement().at_work(unet):
        pass


# ------------------------------------------------------------------ pictures


def test_load_applies_a_placement_and_the_pipeline_remembers_it(model_folder, monkeypatch):
    pipe = ldm.load(model_folder, Placement(device="cpu", dtype=BF16, guidance="sequential"))
    assert {p.dtype for n in (pipe.unet, pipe.vae) for p in n.parameters()} == {BF16}
    expected = Placement(torch.device("cpu"), BF16, BF16, "sdpa", "sequential")
    assert pipe.placement == expected


def test_with_offload_the_files_are_read_into_host_memory(cuda, model_folder, monkeypatch):
    read = {}

    def read_nothing(model, **choices):
        read.update(choices)
        raise StopIteration

    monkeypatch.setattr(files, "read", read_nothing)
    for mode, device in ((None, CUDA), ("model", "cpu"), ("blocks", "cpu")):
        with pytest.raises(StopIteration):
            ldm.load(model_folder, Placement("cuda", offload=mode))
        assert read["device"] == device
        assert read["dtype"] == read["vae_dtype"] == FP16


def pictures(placement, config=TINY_SDXL, request=None):
    """Two small pictures, and the pipeline that made them, its networks on the CPU."""
    pipe = Pipeline(config, *random_networks(config), placement=placement)
    request = request or ldm.Request("a frog", steps=4, images=2)
    return np.stack(pipe.generate(request)), pipe


@pytest.mark.parametrize("mode", ["model", "blocks"])
@pytest.mark.parametrize("config", [TINY_RANDOM, TINY_SDXL], ids=lambda c: c.name)
def test_offload_makes_the_same_pictures_and_leaves_nothing_behind(config, mode):
    plain, _ = pictures(None, config)
    placement = Placement("cpu", FP32, FP32, "sdpa", offload=mode)
    pipe = Pipeline(config, *random_networks(config), placement=placement)
    networks = pipe.unet, pipe.vae, pipe.text_encoder
    homes = [[t.data_ptr() for t in tensors_of(n)] for n in networks]

    def at_home():
        return [[t.data_ptr() for t in tensors_of(n)] == h for n, h in zip(networks, homes, strict=True)]  # fmt: skip

    request = ldm.Request("a frog", steps=4, images=2)
    steps = pipe.stream(request)
    assert at_home() == [True, True, True]  # the text is encoded, and no step asked for
    for step in steps:
        assert at_home() == [False, True, True]
        preview = pipe.decode(step.x0)
        assert len(preview) == 2
        assert at_home() == [False, True, True]
    assert at_home() == [True, True, True]
    assert np.array_equal(np.stack(pipe.decode(step.x)), plain)

    steps = pipe.stream(request)
    next(steps)
    steps.close()  # left in the middle
    assert at_home() == [True, True, True]
    first, second = pipe.stream(request), pipe.stream(dataclasses.replace(request, seed=5))
    in_turns = [step for pair in zip(first, second, strict=True) for step in pair]
    assert at_home() == [True, True, True]
    assert torch.equal(in_turns[-2].x, step.x)


def test_an_error_while_decoding_leaves_nothing_on_the_device():
    _, pipe = pictures(Placement("cpu", FP32, FP32, "sdpa", offload="model"))
    homes = [t.data_ptr() for t in tensors_of(pipe.vae)]
    with pytest.raises(FloatingPointError, match="VAE gave numbers that are not finite"):
        pipe.decode(torch.full((1, 4, 8, 8), 3e38))
    assert [t.data_ptr() for t in tensors_of(pipe.vae)] == homes


def test_sequential_guidance_makes_nearly_the_same_picture_in_calls_of_half_the_size(monkeypatch):
    plain, _ = pictures(None)
    batches, forward = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, *rest: batches.append(len(x)) or forward(self, x, *rest))
    other, _ = pictures(Placement("cpu", FP32, FP32, "sdpa", "sequential"))
    assert batches[-8:] == [2, 2] * 4  # calls before them scaled the random weights
    assert abs(plain.astype(int) - other).max() <= 1  # a batch of two sums in another order


def test_the_vae_encodes_and_decodes_as_it_is_told():
    vae = random_networks(TINY_SDXL)[1].requires_grad_(False)
    torch.manual_seed(0)
    latents, images = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 32, 32) * 2 - 1
    whole = Placement("cpu")
    assert torch.equal(whole.decoder()(vae, latents), vae.decode(latents))
    assert torch.equal(whole.encoder()(vae, images).std, vae.encode(images).std)
    for way, decode, encode in (
        ("slabs", slabs.decode_slabs, slabs.encode_slabs),
        ("tiles", tiles.decode_tiles, tiles.encode_tiles),
    ):
        placement = Placement("cpu", vae_memory=way)
        assert placement.decoder() is decode
        assert placement.encoder() is encode
        # at this size one tile is the picture, and a slab may sum in another order
        torch.testing.assert_close(decode(vae, latents), vae.decode(latents), rtol=0, atol=1e-5)
        torch.testing.assert_close(encode(vae, images).mean, vae.encode(images).mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["slabs", "tiles"])
def test_a_picture_is_decoded_as_its_placement_says(monkeypatch, way):
    plain, _ = pictures(None)
    module, name, used = {"slabs": slabs, "tiles": tiles}[way], f"decode_{way}", []
    decode = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: used.append(args) or decode(*args))
    other, _ = pictures(Placement("cpu", FP32, FP32, "sdpa", vae_memory=way))
    assert [len(latents) for _, latents in used] == [1, 1]
    assert abs(plain.astype(int) - other).max() <= 1


@pytest.mark.parametrize(
    ("pixels", "dtype", "mib"),
    [(512, FP16, 384), (1024, FP16, 384), (1024, FP32, 768), (2048, FP16, 1024), (4096, FP16, 1024)],
)
def test_slabs_take_a_quarter_of_the_whole_within_limits(pixels, dtype, mib):
    assert slab_budget(pixels**2, dtype) == mib * 2**20


def test_slabs_take_the_default_budget_of_the_image(monkeypatch):
    asked, run = [], slabs._run
    monkeypatch.setattr(slabs, "slab_budget", lambda *args: asked.append(args) or 3000)
    monkeypatch.setattr(slabs, "_run", lambda *args: asked.append(args[2:]) or run(*args))
    vae = random_networks()[1]
    slabs.decode_slabs(vae, torch.zeros(1, 4, 8, 6))
    slabs.encode_slabs(vae, torch.zeros(1, 3, 32, 24))
    assert asked == [(32 * 24, FP32), (32 * 24, 3000)] * 2


# ------------------------------------------------------------------ compilation


@pytest.mark.slow
def test_blocks_are_compiled_whole_and_once():
    torch._dynamo.reset()  # what other tests compiled counts as sizes seen before
    one_level = dataclasses.replace(TINY_RANDOM.unet, channels=(16,), depth=(1,), heads=(2,))
    config = dataclasses.replace(TINY_RANDOM, unet=one_level)
    plain, _ = pictures(None, config)
    networks, graphs = random_networks(config), []
    compile_blocks(networks[0], backend=lambda graph, _: graphs.append(graph) or graph.forward)
    pipe = Pipeline(config, *networks)
    request = ldm.Request("a frog", steps=4, images=2)
    assert np.array_equal(np.stack(pipe.generate(request)), plain)

    blocks = [m for m in networks[0].modules() if isinstance(m, ResBlock | TransformerBlock)]
    first = len(graphs)
    assert 0 < first < len(blocks)
    for change in (
        *({"prompt": "a toad in a hole"}, {"seed": 9}, {"steps": 2}, {"guidance_scale": 2.0}),
        *({"sampler": "heun"}, {"negative_prompt": "bad"}),
    ):
        pipe.generate(dataclasses.replace(request, **change))
        assert len(graphs) == first, change
    for width, height in ((48, 32), (40, 48)):  # one side, then the other: now both are open
        pipe.generate(dataclasses.replace(request, width=width, height=height))
    assert len(graphs) <= 3 * first
    again = len(graphs)
    for width, height in ((64, 64), (32, 56)):
        pipe.generate(dataclasses.replace(request, width=width, height=height))
    assert len(graphs) == again


def test_a_placement_compiles_unet_and_vae(monkeypatch):
    blocks = []
    monkeypatch.setattr(compiled, "compile_blocks", blocks.append)
    unet, vae, text_encoder = random_networks()
    Placement("cpu", FP32, FP32, "sdpa").apply(named((unet, vae, text_encoder)))
    assert not blocks
    Placement("cpu", FP32, FP32, "sdpa", compile=True).apply(named((unet, vae, text_encoder)))
    assert blocks == [unet, vae]


def test_packed_weights_change_a_picture_by_rounding_only(model_folder):
    request = ldm.Request("a frog", steps=3)
    plain = ldm.load(model_folder, Placement("cpu"))
    packed = ldm.load(model_folder, Placement("cpu", packed=True))
    (one,), (other,) = plain.generate(request), packed.generate(request)
    difference = np.asarray(one).astype(int) - np.asarray(other).astype(int)
    assert abs(difference).max() <= 1  # a value on the boundary of two levels


def test_packed_weights_are_for_plain_blocks():
    with pytest.raises(ValueError, match="packed weights need a CPU, a PyTorch with oneDNN"):
        Placement("cpu", compile=True, packed=True).resolve()


# ------------------------------------------------------------------ the fastest


@pytest.mark.skipif(not can_pack(BF16), reason="needs oneDNN, in bf16 too")
@pytest.mark.parametrize(
    ("chosen", "attention", "packed"),
    [
        ({}, None, True),
        ({"dtype": FP32, "vae_memory": "tiles"}, None, True),
        ({"dtype": BF16}, "sliced", True),
        ({"dtype": "bfloat16"}, "sliced", True),
        ({"dtype": BF16, "attention": "sdpa"}, "sdpa", True),
        ({"packed": False}, None, False),
        ({"compile": True}, None, False),
    ],
)
def test_on_a_cpu_the_fast_placement_packs_and_slices_where_nothing_else_is_chosen(chosen, attention, packed):
    placement = Placement.fast(device="cpu", **chosen)
    expected = Placement("cpu", **(chosen | {"attention": attention, "packed": packed}))
    assert placement == expected.resolve()
    assert placement.resolve(SD15) == expected.resolve(SD15)


def test_a_processor_without_bf16_in_onednn_is_given_nothing_that_needs_it(monkeypatch):
    monkeypatch.setattr(packing, "can_pack", lambda dtype: dtype != BF16)
    assert Placement.fast(device="cpu", dtype=BF16) == Placement("cpu", BF16).resolve()
    assert Placement.fast(device="cpu", vae_dtype=BF16) == Placement("cpu", vae_dtype=BF16).resolve()
    assert Placement.fast(device="cpu", dtype=FP32).packed
    with pytest.raises(ValueError, match="for bfloat16 a processor that oneDNN supports"):
        Placement("cpu", BF16, packed=True).resolve()


def test_on_a_gpu_the_fast_placement_is_the_default(cuda):
    assert Placement.fast() == Placement().resolve()
    assert Placement.fast(dtype=BF16).resolve(SDXL_BASE) == Placement(dtype=BF16).resolve(SDXL_BASE)


def test_the_fast_placement_is_checked():
    with pytest.raises(ValueError, match="dtype float16 is up to 200 times slower"):
        Placement.fast(device="cpu", dtype=FP16)
    with pytest.raises(TypeError, match="unexpected keyword argument 'speed'"):
        Placement.fast(speed=2)


@pytest.mark.skipif(not can_pack(), reason="needs oneDNN")
def test_unpacking_what_was_loaded_fast_gives_the_plain_network(model_folder):
    plain = ldm.load(model_folder, Placement("cpu")).unet
    unet = ldm.load(model_folder, Placement.fast(device="cpu")).unet
    names = [name for name, _ in plain.named_parameters()]
    assert len([*unet.parameters()]) < len(names)
    unpack(unet)
    assert [name for name, _ in unet.named_parameters()] == names
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), plain.parameters(), strict=True))
