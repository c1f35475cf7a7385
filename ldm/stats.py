"""What a run costs: seconds of each stage, steps per second, peak memory, and the GPU's utilization and power.

    with measured(pipe) as stats:
        pictures = pipe.generate(request)
    print(stats.as_dict())

A GPU is waited for at the end of each stage and of each step, so that the seconds are those of the work. This makes a
run a little slower. `traced` writes all operations of a block for a viewer of traces.
"""

import resource
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ldm.diffusion.samplers import Step
from ldm.pipeline import Pipeline

STAGES = {"conditions": "text", "encode_image": "encode", "decode": "decode"}  # method of `Pipeline` -> name
INTERVAL = 0.1  # seconds between two questions to the GPU


class Stats:
    """The costs of the work in a `measured` block. seconds and calls: by the name of the stage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.peaks: dict[str, int] = {}  # in MiB, known at the end of the block
        self.gpu: dict[str, float] = {}  # known at the end of the block, if nvidia-ml-py is installed

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of a block of code to the stage `name`, also in a trace. For saving, use the name "save"."""
        began = time.perf_counter()
        with torch.profiler.record_function(f"ldm {name}"):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - began
        self.calls[name] += 1

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers, as JSON can hold them. Without any step, there are no steps per second."""
        found: dict[str, Any] = {"seconds": {name: round(value, 4) for name, value in self.seconds.items()}}
        found["calls"] = dict(self.calls)
        if self.calls["step"]:
            found["steps_per_second"] = round(self.calls["step"] / self.seconds["step"], 3)
        return found | {"peak_mib": self.peaks} | ({"gpu": self.gpu} if self.gpu else {})


@contextmanager
def measured(*pipes: Pipeline) -> Iterator[Stats]:
    """Measure what `pipes` do inside the block: those of one run, such as a model and its refiner.

    The methods of these pipelines are wrapped for the time of the block, so no other thread should use them.
    The host's peak is that of the process since its start. The GPU's peak is that of PyTorch's tensors in the block.
    """
    device = next(pipes[0].unet.parameters()).device
    if pipes[0].placement.offload:  # the weights wait in the host's memory
        device = torch.device(pipes[0].placement.device or "cuda")
    stats = Stats(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with ExitStack() as stack:
        for pipe in pipes:
            for method, name in STAGES.items():
                stack.enter_context(_replaced(pipe, method, _timed(stats, name, getattr(pipe, method))))
            stack.enter_context(_replaced(pipe, "walk", _timed_steps(stats, pipe.walk)))
        if device.type == "cuda" and find_spec("pynvml") and (opened := _open_gpu(device)):
            stack.enter_context(_watched(stats, *opened))
        yield stats
    stats.peaks["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)
    if device.type == "cuda":
        stats.peaks["gpu"] = torch.cuda.max_memory_allocated(device) >> 20


@contextmanager
def traced(path: str | Path, device: torch.device) -> Iterator[None]:
    """Write all operations inside the block to `path`, a trace as chrome://tracing and Perfetto show it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        yield
    profile.export_chrome_trace(str(path))


@contextmanager
def _replaced(pipe: Pipeline, method: str, function: Callable[..., Any]) -> Iterator[None]:
    setattr(pipe, method, function)
    try:
        yield
    finally:
        delattr(pipe, method)  # the method of the class is visible again


def _timed(stats: Stats, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*args: Any, **options: Any) -> Any:
        with stats.stage(name):
            return function(*args, **options)

    return timed


def _timed_steps(stats: Stats, walk: Callable[..., Iterator[Step]]) -> Callable[..., Iterator[Step]]:
    """Wrap `Pipeline.walk`: each step is timed alone, without what its receiver does between the steps."""

    def timed(*args: Any, **options: Any) -> Iterator[Step]:
        steps = iter(walk(*args, **options))
        while True:
            try:
                with stats.stage("step"):
                    step = next(steps)
            except StopIteration:
                return
            yield step

    return timed


def _open_gpu(device: torch.device) -> tuple[Any, Any] | None:
    """Return NVIDIA's management library and its handle of `device`; None if the library is missing or refuses.

    Some containers lack the library, and GPUs of other makers have none: PyTorch calls AMD's "cuda", too.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return None


@contextmanager
def _watched(stats: Stats, nvml: Any, handle: Any) -> Iterator[None]:
    """Ask the GPU for its utilization and its power every INTERVAL seconds, in a thread, and add them to `stats`."""
    utilization: list[float] = []
    watts: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        while True:
            with suppress(nvml.NVMLError):  # some GPUs do not tell their power
                utilization.append(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
                watts.append(nvml.nvmlDeviceGetPowerUsage(handle) / 1000)
            if stop.wait(INTERVAL):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if utilization:
            stats.gpu["utilization_percent"] = round(sum(utilization) / len(utilization), 1)
        if watts:
            stats.gpu["watts"] = round(sum(watts) / len(watts), 1)
            stats.gpu["peak_watts"] = round(max(watts), 1)
