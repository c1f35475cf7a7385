"""Pictures in spite of too little memory, numbers that are not finite, or a disk that fails for a moment.

`prepare` chooses how to work before the model is loaded. `run` makes the pictures, and repeats what failed in the next
of the `ldm.placement.budget.ways`, in fp32, or after a pause. Each change is told, and written into the record.
The pictures keep their size, unless the caller allows smaller ones.
"""

import dataclasses
import errno
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import files
from ldm.diagnosis import NotFiniteError
from ldm.jobs import Job, Models, Result, Saver, Watch, load_models
from ldm.jobs import run as run_once
from ldm.loading import BUNDLED, locate
from ldm.pipeline import Pipeline
from ldm.placement.budget import Need, Way, Work, fit, free_bytes, ways
from ldm.request import Request

PAUSES = (1.0, 2.0, 4.0)  # seconds before the same work is tried again
PASSING = {errno.EAGAIN, errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.EBUSY}  # errors of a disk that may pass
SMALLER = 0.75  # factor of both sides
LARGEST = 1024  # pixels: the largest default size of a supported model
OVERHEAD = 4096  # bytes for each pixel of each picture, more than any supported model needs

Say = Callable[[str], None]


def prepare(job: Job, say: Say = lambda words: None) -> Way:
    """Return how to make the pictures of `job` in the memory that is free now. The model is not loaded yet.

    say: is told what was chosen, in one sentence.
    """
    device = torch.device(job.placement.device or "cpu")
    free, count = free_bytes(device), 1 if job.picture is not None else job.request.images
    way = Way(job.placement, job.request.images if job.picture is None else 1)
    if free is None or job.model.model == BUNDLED:
        return way
    on_disk = sum(_size(path) for path in job.model.paths.values())

    def plenty(width: int, height: int) -> bool:
        return free > 6 * on_disk + OVERHEAD * width * height * (count + 1)

    if plenty(job.request.width or LARGEST, job.request.height or LARGEST):  # without reading the model's headers
        return way
    try:
        config = files.identify(locate(job.model.model), prediction=job.model.prediction, ema=job.model.ema).config
        plan = job.request.resolved(config)
    except ValueError:  # loading the model or planning the request will say what is wrong
        return way
    if plenty(plan.width, plan.height):  # the exact count takes a second
        return way
    placement = job.placement.resolve(config)
    work = Work(count, plan.height, plan.width, guided=len(plan.which) > 1)
    way, need = fit(config, placement, work, free)
    if way.changes:
        say(_told(need, free, way))
    return Way(dataclasses.replace(job.placement, **_changes(way, placement)), way.images, way.changes)


def run(
    job: Job,
    models: Models,
    outputs: Saver,
    watch: Watch = lambda steps, total: steps,
    *,
    way: Way | None = None,
    allow_smaller: bool = False,
    say: Say = lambda words: None,
    pause: Callable[[float], None] = time.sleep,
) -> Result:
    """Make the pictures of `job` as `ldm.jobs.run` does, and write each once, also if a part of the work is repeated.

    way: how to begin, from `prepare`. allow_smaller: if no way is left, make smaller pictures. say: is told changes.
    Raises the error of the last try. It is out of memory in the last way, numbers that are not finite in fp32, or a
    disk that fails after three pauses. Other errors are raised at once.
    """
    work = _Work(job, models, outputs, way or Way(models.base.placement, len(_chosen(job))), allow_smaller, say)
    pauses = iter(PAUSES)
    while work.pending:
        try:
            work.next_part(watch)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error) or not work.smaller_way():
                raise
        except NotFiniteError as error:
            if not work.more_precise(error.network):
                raise
        except OSError as error:
            seconds = next(pauses, None) if error.errno in PASSING else None
            if seconds is None:
                raise
            say(f"{error.strerror}: trying again in {seconds:g} s")
            pause(seconds)
    return work.result()


class _Work:
    """The pictures of a job that are not written yet, and the way to make them."""

    def __init__(self, job: Job, models: Models, outputs: Saver, way: Way, allow_smaller: bool, say: Say) -> None:
        self.job, self.models, self.outputs, self.say = job, models, outputs, say
        self.way, self.allow_smaller = way, allow_smaller
        self.adjusted = way.changes
        self.left: Iterator[Way] = iter(list(ways(way.placement, way.images))[1:])
        self.chosen = self.pending = _chosen(job)
        self.written: dict[int, Path] = {}
        self.results: list[Result] = []

    def next_part(self, watch: Watch) -> None:
        """Make the next pictures, as many at once as the way says."""
        if self.job.grid or (self.pending == self.chosen and self.way.images >= len(self.chosen)):
            part, indices = self.job, list(range(self.job.count))
        else:
            wanted = self.pending[: self.way.images]
            indices = [self.chosen.index(i) for i in wanted]
            part = dataclasses.replace(self.job, request=_some(self.job.request, wanted), picture=None)
        saver = _Part(self.outputs, indices, self.written)
        try:
            self.results.append(run_once(dataclasses.replace(part, adjusted=self.adjusted), self.models, saver, watch))
        finally:
            done = {self.chosen[i] for i in self.written}
            self.pending = [] if self.job.grid and done else [i for i in self.pending if i not in done]

    def smaller_way(self) -> bool:
        """Choose the next way that needs less memory. False: there is none."""
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        way = next((way for way in self.left if not (self.job.grid and way.images < self.way.images)), None)
        if way is not None:
            new = way.changes[-1]
            self.way, self.adjusted = way, (*self.adjusted, new)
            for pipe in self.models:
                if pipe is not None:
                    _place(pipe, way)
            self.say(f"out of memory: trying again with {new}")
            return True
        if not self.allow_smaller:
            return False
        plan = self.models.base.plan(self.job.request)
        factor = self.models.base.config.vae.factor * 8
        width, height = (int(SMALLER * side) // factor * factor for side in (plan.width, plan.height))
        if min(width, height) < factor:
            return False
        new = f"{width} x {height} pixels"
        self.job = dataclasses.replace(
            self.job, request=dataclasses.replace(self.job.request, width=width, height=height)
        )
        self.adjusted = (*self.adjusted, new)
        self.say(f"out of memory: trying again with {new}")
        return True

    def more_precise(self, network: str) -> bool:
        """Load the network that gave NaN or Inf in fp32, with those of its dtype. False: it was in fp32."""
        placement, name = self.models.base.placement, "vae_dtype" if network == "vae" else "dtype"
        if getattr(placement, name) in (None, torch.float32):
            return False
        shown, first = network.replace("_", " "), self._first_module(network)
        more: dict[str, Any] = {name: torch.float32}
        placement = dataclasses.replace(placement, **more)
        new = f"the {shown} in fp32" + (f", because {first} gave numbers that are not finite" if first else "")
        self.models = load_models(self.job.model, placement)
        self.way = dataclasses.replace(self.way, placement=placement)
        self.left = iter(list(ways(placement, self.way.images))[1:])
        self.adjusted = (*self.adjusted, new)
        self.say(f"the {shown} gave numbers that are not finite: trying again with {new}")
        return True

    def _first_module(self, network: str) -> str:
        """Repeat the part that failed, and return the name of the first module with an output that is not finite."""
        found: list[str] = []

        def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        with ExitStack() as hooks:
            for name, module in getattr(self.models.base, network).named_modules():
                if not any(module.children()):
                    hooks.enter_context(module.register_forward_hook(partial(look, name)))
            hooks.enter_context(suppress(NotFiniteError))
            self.next_part(lambda steps, total: steps)
        return next(iter(found), "")

    def result(self) -> Result:
        """Return one result for all parts."""
        seconds: dict[str, float] = {}
        for result in self.results:
            for name, amount in result.seconds.items():
                seconds[name] = round(seconds.get(name, 0.0) + amount, 3)
        files = [self.written[i] for i in sorted(self.written)]
        return Result(files, [self.job.request.seeds[i] for i in self.chosen], self.results[-1].record, seconds)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Writes the pictures of a part under their numbers in the whole job."""

    outputs: Saver
    indices: Sequence[int]
    written: dict[int, Path]

    def save(self, index: int, picture: Any, texts: Mapping[str, str]) -> Path:
        """Write a picture, unless an earlier try has written it."""
        number = self.indices[index]
        if number not in self.written:
            self.written[number] = self.outputs.save(number, picture, texts)
        return self.written[number]


def _chosen(job: Job) -> list[int]:
    return list(range(job.request.images)) if job.picture is None else [job.picture]


def _some(request: Request, pictures: Sequence[int]) -> Request:
    """Return the request for neighboring pictures of `request` alone."""
    prompts = tuple(request.prompts[i % len(request.prompts)] for i in pictures)
    return dataclasses.replace(
        request,
        prompt=prompts if len(set(prompts)) > 1 else prompts[0],
        seed=request.seeds[pictures[0]],
        images=len(pictures),
        variation=request.variation and request.variation.of(pictures[0]),
    )


def _place(pipe: Pipeline, way: Way) -> None:
    """Change how a loaded pipeline uses memory. For offload, its networks leave the GPU for page-locked memory."""
    fields = _changes(way, pipe.placement)
    if fields.get("offload") and pipe.placement.offload is None:
        from ldm.placement.offload import pin

        for network in (pipe.unet, pipe.vae, pipe.text_encoder):
            pin(network.to("cpu"))
        torch.cuda.empty_cache()
    pipe.placement = dataclasses.replace(pipe.placement, **fields)
    pipe._at_work.clear()


def _changes(way: Way, placement: Any) -> dict[str, Any]:
    """Return the fields that a way changes in `placement`."""
    names = ("guidance", "vae_memory", "offload")
    return {n: getattr(way.placement, n) for n in names if getattr(way.placement, n) != getattr(placement, n)}


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    return path.stat().st_size if path.is_file() else 0


def _told(need: Need, free: int, way: Way) -> str:
    least = "" if need.peak <= free else f", which may still need {need.peak / 1e9:.1f} GB"
    return f"{free / 1e9:.1f} GB of memory are free: {', '.join(way.changes)}{least}"
