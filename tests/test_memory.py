"""Where a model is placed by default, and which placements are refused."""

import pytest
import torch

from ldm.memory import ATTENTION, Placement
from ldm.models.attention import sdpa


def test_a_cpu_computes_in_fp32_by_default():
    assert Placement(device="cpu").resolve() == (
        torch.device("cpu"),
        torch.float32,
        torch.float32,
        sdpa,
    )


def test_a_gpu_computes_in_fp16_but_decodes_in_fp32_by_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in (None, "cuda", "cuda:0"):
        placed = Placement(device=device).resolve()
        assert placed.device.type == "cuda"
        assert (placed.dtype, placed.vae_dtype) == (torch.float16, torch.float32)


def test_bf16_may_be_chosen_on_a_cpu_and_every_attention_has_a_function():
    for name, attend in ATTENTION.items():
        placed = Placement("cpu", torch.bfloat16, torch.bfloat16, name).resolve()
        assert placed == (torch.device("cpu"), torch.bfloat16, torch.bfloat16, attend)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"dtype": torch.float16}, "dtype float16 is up to 200 times slower"),
        ({"vae_dtype": torch.float16}, "vae_dtype float16 is up to 200 times slower"),
        ({"dtype": torch.float64}, "dtype must be one of float32, float16, bfloat16"),
        ({"attention": "flash"}, "attention must be one of sdpa, sliced, math, got 'flash'"),
        ({"device": "toaster"}, "device must be cpu, cuda, cuda:N or mps, got 'toaster'"),
        ({"device": "meta"}, "device must be cpu, cuda, cuda:N or mps, got 'meta'"),
        ({"device": "cuda:99"}, "device cuda:99 is not available"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        Placement(**({"device": "cpu"} | choices)).resolve()


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="needs a machine without MPS")
def test_an_absent_mps_is_refused():
    with pytest.raises(ValueError, match="device mps is not available"):
        Placement(device="mps").resolve()
