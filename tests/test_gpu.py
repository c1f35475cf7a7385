"""What only a CUDA device can show: `python -m pytest -m gpu`."""

import pytest
import torch

import ldm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
REQUEST = ldm.Request("a frog on the grass", steps=8, images=2)


def latents(folder, **placement):
    *_, last = ldm.load(folder, ldm.Placement(**placement)).stream(REQUEST)
    return last.x.cpu()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-3), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)],
    # fp32 sums in another order, eight steps on; fp16 keeps 11 bits and bf16 8
)
@pytest.mark.parametrize("attention", ["sdpa", "sliced", "math"])
def test_a_gpu_makes_the_latents_of_the_cpu(model_folder, dtype, tolerance, attention):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    expected = latents(model_folder, device="cpu")
    got = latents(model_folder, device="cuda", dtype=dtype, attention=attention)
    difference = ((got - expected).norm() / expected.norm()).item()
    print(f"{dtype}, {attention}: {difference:.1e}")
    assert difference < tolerance


def test_the_default_on_a_gpu_is_fp16_networks_and_an_fp32_sampler(model_folder):
    pipe = ldm.load(model_folder)
    step = next(iter(pipe.stream(REQUEST)))
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float16}
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float32}
    assert (step.x.dtype, step.x.device.type) == (torch.float32, "cuda")


def test_sliced_attention_holds_less_memory_than_math_attention():
    from functools import partial

    from ldm.models.attention import math_attention, sliced_attention

    def peak(attend):
        q, k, v = (torch.randn(1, 8, 4096, 64, device="cuda", dtype=torch.float16) for _ in "qkv")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attend(q, k, v)
        return torch.cuda.max_memory_allocated() - before

    scores = 8 * 4096 * 4096
    assert peak(math_attention) > 2 * scores  # bytes: all scores at once, in fp16 at least
    assert peak(partial(sliced_attention, budget=2**20)) < scores / 2
