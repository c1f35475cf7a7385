"""By how much a call makes the process grow at its peak, as the operating system counts it; on Linux."""

import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

MB = 2**20
_RESET_PEAK = "5"  # proc(5): to the present size
_MMAP_THRESHOLD = -3  # mallopt(3)


def measurable() -> bool:
    """Return whether this system tells the peak and lets it be reset."""
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def in_fresh_process(function: Callable[..., Any], *args: object) -> Any:
    """Call `function` where no freed memory of other tests hides what it takes."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def return_freed_memory() -> None:
    """Let glibc give each freed block of 1 MB or more back to the system, so that `growth` counts what is in use.

    By default glibc keeps such blocks after the first ones, and the peak varies from run to run.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, MB)


def growth(call: Callable[[], object]) -> int:
    """Return how many bytes more than before are resident at the peak of `call`, whose result is let go."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))
