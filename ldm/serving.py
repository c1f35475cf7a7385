"""One loaded pipeline for the tasks of an asyncio program: a bounded queue, back-pressure and cancellation.

    served = Served(pipe, waiting=8)
    pictures = await served.generate(ldm.Request("a cat"))

A pipeline itself can be used from several threads at once: a run changes nothing that other runs read. With threads=1
the requests run one after the other, which is as fast on one device and takes the memory of one run.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from PIL import Image
from torch import Tensor

from ldm.diffusion.samplers import Step
from ldm.pipeline import Pipeline
from ldm.request import Request


class BusyError(RuntimeError):
    """As many requests wait as may wait. Try again later."""


class Served:
    """A pipeline whose requests wait for one of `threads` threads."""

    def __init__(self, pipe: Pipeline, *, waiting: int = 8, threads: int = 1) -> None:
        """Start no thread yet. waiting: requests that may wait. threads: requests that run at once.

        Raises ValueError for a negative `waiting`, and for less than one thread.
        """
        if waiting < 0 or threads < 1:
            raise ValueError(
                f"waiting must be at least 0 and threads at least 1, got waiting={waiting} and threads={threads}"
            )
        self.pipe = pipe
        self.places = asyncio.Semaphore(waiting + threads)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="ldm")

    @property
    def full(self) -> bool:
        """Whether a new request has to wait for a place in the queue."""
        return self.places.locked()

    async def generate(
        self, request: Request, *, on_step: Callable[[Step], None] | None = None, wait: bool = True
    ) -> list[Image.Image]:
        """Make the pictures of `request` in a thread, as `Pipeline.generate` does.

        on_step: called in the event loop after each step. wait: wait for a place if the queue is full; with
          False, raise BusyError.
        A task that is cancelled leaves the queue, or stops its run after the current step. The run has ended, and its
        place is free, when the cancellation is raised.
        """
        if not wait and self.full:
            raise BusyError("the queue is full: try again later")
        async with self.places:
            loop, stop = asyncio.get_running_loop(), threading.Event()

            def report(step: Step) -> None:
                if on_step is not None:
                    loop.call_soon_threadsafe(on_step, step)

            work = loop.run_in_executor(self._threads, self._run, request, stop, report)
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                stop.set()
                if not work.cancel():
                    await asyncio.wait([work])
                raise

    def _run(self, request: Request, stop: threading.Event, report: Callable[[Step], None]) -> list[Image.Image]:
        """Make the pictures, or an empty list if `stop` is set."""
        latents: Tensor | None = None
        if stop.is_set():
            return []
        with closing(self.pipe.stream(request)) as steps:
            for step in steps:
                if stop.is_set():
                    return []
                latents = step.latents
                report(step)
        assert latents is not None
        pictures = self.pipe.decode(latents)
        return request.region.paste(pictures) if request.region else pictures

    def close(self) -> None:
        """Wait for the runs, and end the threads."""
        self._threads.shutdown()
