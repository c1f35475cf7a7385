"""Time a guided step of SD 1.5's UNet against OpenVINO: `python -m tests.benchmarks.against_openvino`.

Needs `pip install openvino`. Both have the same random weights, inputs and number of threads, and run in turn in one
process: A B B A.
"""

import argparse
import statistics
import time
from functools import partial

import openvino
import torch

from ldm.models.attention import set_attention
from ldm.models.unet import UNet
from ldm.placement.allocator import keep_freed_memory
from ldm.placement.memory import ATTENTION, Placement
from ldm.placement.packing import pack
from ldm.presets import SD15

HINTS = {"float32": "f32", "bfloat16": "bf16"}


def clocked(call, *inputs):
    """Return the result of a call and its seconds."""
    start = time.perf_counter()
    return call(*inputs), time.perf_counter() - start


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--dtype", choices=HINTS, default="bfloat16")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    unet = UNet(SD15.unet).eval().requires_grad_(False)
    side, dtype = args.pixels // SD15.vae.factor, getattr(torch, args.dtype)
    inputs = torch.randn(2, 4, side, side), torch.full((2,), 500.0), torch.randn(2, 77, 768)
    exact = unet(*inputs)
    shapes = [openvino.PartialShape(list(each.shape)) for each in inputs]
    model = openvino.convert_model(unet, example_input=inputs, input=shapes)
    hints = {"INFERENCE_PRECISION_HINT": HINTS[args.dtype], "PERFORMANCE_HINT": "LATENCY"}
    hints["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
    compiled, seconds = clocked(openvino.Core().compile_model, model, "CPU", hints)
    print(f"{args.dtype}, {args.pixels} pixels; OpenVINO {openvino.__version__} compiled in {seconds:.1f} s")

    placement = Placement.fast(device="cpu", dtype=dtype).resolve(SD15)
    unet.to(dtype)
    set_attention(unet, ATTENTION[placement.attention])
    if placement.packed:
        pack(unet)
    a = partial(unet, *(each.to(dtype) for each in inputs))
    b = partial(compiled, [each.numpy() for each in inputs])
    for name, out in (("ldm", a()), ("OpenVINO", torch.from_numpy(b()[0]))):
        error = (out.float() - exact).norm() / exact.norm()
        print(f"{name}: relative error {error:.2g} of the fp32 network")
    times = {a: [], b: []}
    for i in range(args.rounds):
        for call in (a, b) if i % 2 == 0 else (b, a):
            times[call].append(clocked(call)[1])
    ours, theirs = (statistics.median(seconds) for seconds in times.values())
    print(f"ldm {ours:.3f} s, OpenVINO {theirs:.3f} s, ratio {theirs / ours:.3f}")


if __name__ == "__main__":
    main()
