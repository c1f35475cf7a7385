"""What loading takes at its peak: the model in its dtype and a tenth, and one stored tensor; nothing without a cast.

The files are hollow: their zeros take no room on the disk, but are read and cast as others are.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from ldm.checkpoint.files import load
from ldm.checkpoint.single import METADATA_KEY, ldm_tensors
from ldm.checkpoint.tensors import DTYPES, TensorFiles
from ldm.config import UNetConfig, VAEConfig
from ldm.placement.allocator import keep_freed_memory
from ldm.presets import SD15
from tests.checkpoint.growth import MB, growth, in_fresh_process, measurable
from tests.checkpoint.standin import hollow_model, official_shapes, write_hollow

pytestmark = pytest.mark.skipif(not measurable(), reason="needs /proc of Linux")

SD15_LIKE = dataclasses.replace(  # as SD 1.5 in every width of its first levels, with fewer blocks
    SD15,
    unet=UNetConfig(channels=(320, 640), res_blocks=1, depth=(1, 1), heads=(8, 8)),
    vae=VAEConfig(channels=(128, 256), res_blocks=1),
    text=(dataclasses.replace(SD15.text[0], layers=2),),
)
BESIDE = 16 * MB  # modules, key maps and the allocator's rounding, beside what the tokenizer takes


class Measured(NamedTuple):
    """What was measured, in bytes."""

    size: int  # of the model in memory
    tensor: int  # the largest that has to be cast; 0 where none has
    peak: int  # by how much the process grew
    tiny: int  # by how much for a tiny model


def measure(tiny: Path, cases: list[tuple[Path, torch.dtype]], as_command: bool) -> list[Measured]:
    """Load each path in its dtype, in a process that has imported everything by loading `tiny`."""
    torch.set_num_threads(1)
    if as_command:
        keep_freed_memory()
    load(tiny)
    small = growth(lambda: load(tiny))
    return [Measured(*_measure(path, dtype), small) for path, dtype in cases]


def _measure(path: Path, dtype: torch.dtype) -> tuple[int, int, int]:
    models = []
    peak = growth(lambda: models.append(load(path, dtype=dtype)))
    values = [v for network in models[0][1:4] for v in network.state_dict().values()]
    size = sum(value.numel() * value.element_size() for value in values)
    tensors = TensorFiles([path])
    cast = (n for n in tensors.shapes if DTYPES[tensors.dtypes[n]] != dtype)
    bytes_of = (math.prod(tensors.shapes[n]) * DTYPES[tensors.dtypes[n]].itemsize for n in cast)
    return size, max(bytes_of, default=0), peak


def check(found: list[Measured]) -> None:
    """Hold what was measured to the promise; what a tiny model takes is its tokenizer and its modules."""
    for size, tensor, peak, tiny in found:
        print(
            f"\n{size / MB:,.0f} MB in memory, largest tensor that is cast {tensor / MB:.0f} MB: "
            f"peak {peak / MB:,.0f} MB, that of a tiny model {tiny / MB:.0f} MB"
        )
        assert peak < tiny + BESIDE + (1.1 * size + tensor if tensor else 0)
        if tensor:
            assert peak > size  # it was measured


@pytest.mark.slow
@pytest.mark.parametrize("as_command", [False, True], ids=["library", "command"])
def test_a_cast_takes_the_model_and_a_tenth_and_one_tensor_and_mapping_nothing(as_command, small_file, tmp_path):
    tensors = ldm_tensors(hollow_model(SD15_LIKE))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    metadata = {METADATA_KEY: json.dumps(dataclasses.asdict(SD15_LIKE))}
    f16 = write_hollow(tmp_path / "f16", shapes, metadata)
    f32 = write_hollow(tmp_path / "f32", shapes, metadata, dtypes=dict.fromkeys(shapes, "F32"))
    cases = [(f16, torch.bfloat16), (f32, torch.float16), (f16, torch.float16), (f32, torch.float32)]
    runs = [in_fresh_process(measure, small_file, cases, as_command) for _ in range(3)]
    found = [min(measured, key=lambda m: m.peak) for measured in zip(*runs, strict=True)]  # a busy machine only adds
    assert [m.tensor > 0 for m in found] == [True, True, False, False]
    check(found)


@pytest.mark.full
@pytest.mark.parametrize("as_command", [False, True], ids=["library", "command"])
def test_the_promise_holds_at_full_size(as_command, small_file, tmp_path):
    files = [write_hollow(tmp_path / name, official_shapes(name)) for name in ("sd15", "sdxl-base")]
    cases = [(file, dtype) for file in files for dtype in (torch.bfloat16, torch.float16)]
    check(in_fresh_process(measure, small_file, cases, as_command))
