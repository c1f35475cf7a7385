"""From a job to picture files: load the models, make the pictures, and write them with their records."""

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, Protocol

import torch

from ldm.diffusion.samplers import Step
from ldm.geometry import grid
from ldm.loading import load
from ldm.pipeline import Pipeline
from ldm.placement.memory import Placement
from ldm.record import ModelChoice, Record, digest, remember
from ldm.refiner import plan_both, stream_both
from ldm.request import Request

Steps = Generator[Step]


class Saver(Protocol):
    """Writes the pictures of a job, as `Outputs` does."""

    def save(self, index: int, picture: Any, texts: Mapping[str, str]) -> Path:
        """Write picture `index` of the job, and return its path."""


Watch = Callable[[Steps, int], Steps]  # (steps, their number) -> the same steps, with a progress bar for example


class KindOfFile(NamedTuple):
    """The meaning of a name in `Job.paths`."""

    what: str
    how: str  # another file is given
    field: str = ""  # of the request or the model choice, whose files are given and replaced together


_CONTROL = "with --controlnet and --control"
_IMAGE_PROMPT = "with --ip-adapter, --image-prompt and --image-encoder"
_KINDS = {
    "source": KindOfFile("source picture", "as the PICTURE of ldm {task}"),
    "mask": KindOfFile("mask", "as the MASK of ldm inpaint"),
    "controlnet": KindOfFile("controlnet", _CONTROL, "controls"),
    "control": KindOfFile("control picture", _CONTROL, "controls"),
    "ip_adapter": KindOfFile("IP-Adapter", _IMAGE_PROMPT, "image_prompts"),
    "image_prompt": KindOfFile("image prompt", _IMAGE_PROMPT, "image_prompts"),
    "image_encoder": KindOfFile("image encoder", _IMAGE_PROMPT, "image_prompts"),
    "region": KindOfFile("region", "with --region", "regions"),
    "embedding": KindOfFile("embedding", "with --embedding", "embeddings"),
    "lora": KindOfFile("LoRA", "with --lora", "loras"),
    "model": KindOfFile("model", "with --model", "model"),
    "refiner": KindOfFile("refiner", "with --refiner", "model"),
    "vae": KindOfFile("vae", "with --vae", "model"),
    "unet": KindOfFile("unet", "with --unet", "model"),
    "text_encoder": KindOfFile("text encoder", "with --text-encoder", "model"),
}


def kind_of_file(name: str) -> KindOfFile:
    """Return the meaning of a name in `Job.paths`, such as "model" or "control_1"."""
    return _KINDS[name.rstrip("_0123456789")]


@dataclass(frozen=True)
class Job:
    """A request for pictures, with the model and the placement to use.

    `Request.task` is its kind: text to image, image to image, inpainting or editing.
    """

    request: Request
    model: ModelChoice = ModelChoice()
    placement: Placement = field(default_factory=Placement)
    grid: bool = False  # one file with all the pictures
    picture: int | None = None  # the index of the only picture to write; None: all
    sha256: Mapping[str, str] = field(default_factory=dict)  # the expected digests, by the names of `paths`
    adjusted: tuple[str, ...] = ()  # what `ldm.rescue` changed, in words

    @property
    def count(self) -> int:
        """The number of picture files to write."""
        return 1 if self.grid or self.picture is not None else self.request.images

    @property
    def paths(self) -> dict[str, Path]:
        """The files and folders that the job reads, by name: models, pictures, masks, ControlNets, IP-Adapters."""
        source = self.request.source
        files = {"source": source and source.image, "mask": source and source.mask and source.mask.image}
        for i, control in enumerate(self.request.controls, 1):
            files |= {f"controlnet_{i}": control.model, f"control_{i}": control.image}
        for i, region in enumerate(self.request.regions, 1):
            files |= {f"region_{i}": None if region.box else region.mask}
        for i, prompt in enumerate(self.request.image_prompts, 1):
            files |= {f"ip_adapter_{i}": prompt.model, f"image_prompt_{i}": prompt.image}
            files |= {f"image_encoder_{i}": prompt.encoder}
        own = {name: Path(path) for name, path in files.items() if isinstance(path, str | Path)}
        return self.model.paths | own


class Models(NamedTuple):
    """The loaded models of a job."""

    base: Pipeline
    refiner: Pipeline | None = None


@dataclass(frozen=True)
class Result:
    """The files of a job, the seed of each file, the record of the run, and the seconds that each part took."""

    files: list[Path]
    seeds: list[int]
    record: Record
    seconds: dict[str, float]


def load_models(choice: ModelChoice, placement: Placement) -> Models:
    """Load the model, and the refiner if one was chosen. Raises ValueError as `ldm.load` does."""
    base = load(
        choice.model,
        placement,
        prediction=choice.prediction,
        ema=choice.ema,
        vae=choice.vae,
        unet=choice.unet,
        text_encoder=choice.text_encoder,
        embeddings=choice.embeddings,
        loras=choice.loras,
    )
    refiner = None
    if choice.refiner is not None:  # it decodes
        refiner = load(choice.refiner, placement, vae=choice.vae, embeddings=choice.embeddings)
    return Models(base, refiner)


def run(job: Job, models: Models, outputs: Saver, watch: Watch = lambda steps, total: steps) -> Result:
    """Make the pictures of `job` with its loaded models, and write each as soon as it is finished.

    watch: wraps the generator of the steps, to show progress.
    Raises ValueError for a request that the models do not support, and for files that `job.sha256` does not describe.
    Raises FloatingPointError for pictures that are not finite, and KeyboardInterrupt at Ctrl-C. Both name the pictures
    that are written. In all cases offloaded networks leave the device.
    """
    request, (base, refiner) = job.request, models
    seconds: dict[str, float] = {}
    with _digests(job.paths) as digests:  # a large file is hashed while its model works
        for name, sha256 in job.sha256.items():
            if digests[name].result() != sha256:
                what, how, _ = kind_of_file(name)
                raise ValueError(
                    f"{job.paths[name]} is not the {what} that made the picture; to use it all the same, name it "
                    f"{how.format(task=request.task)}"
                )
        with timed("sample", seconds):
            if refiner is None:
                plan, steps = base.plan(request), base.stream(request)
            else:
                plan, last = plan_both(base, refiner, request, handover=job.model.handover)
                plan = dataclasses.replace(plan, request=request, sigmas=torch.cat([plan.sigmas, last.sigmas[1:]]))
                steps = stream_both(base, refiner, request, handover=job.model.handover)
            with closing(steps), closing(watch(steps, len(plan.sigmas) - 1)) as watched:
                for step in watched:
                    latents = step.latents
        chosen = list(range(request.images)) if job.picture is None else [job.picture]
        files: list[Path] = []
        with (refiner or base).at_work("vae"), _listed(files):
            for together in [chosen] if job.grid else [[i] for i in chosen]:
                with timed("decode", seconds):
                    pictures = (refiner or base).decode(latents[together])
                    pictures = request.region.paste(pictures) if request.region else pictures
                record = remember(plan, job.model, base, {name: found.result() for name, found in digests.items()})
                record = dataclasses.replace(record, adjusted=job.adjusted)
                with timed("save", seconds):
                    texts = record.texts(None if job.grid else together[0])
                    files.append(outputs.save(len(files), grid(pictures) if job.grid else pictures[0], texts))
    return Result(files, [request.seeds[i] for i in chosen], record, seconds)


@contextmanager
def _digests(paths: Mapping[str, Path]) -> Iterator[dict[str, Future[str]]]:
    """Compute the digests of `paths` one after the other in a thread, until the end of the block.

    The thread is a daemon: an interrupted program ends at once, and does not wait for the digest of a large file.
    """
    digests: dict[str, Future[str]] = {name: Future() for name in paths}

    def work() -> None:
        for name, path in paths.items():
            if digests[name].set_running_or_notify_cancel():
                try:
                    digests[name].set_result(digest(path))
                except Exception as error:
                    digests[name].set_exception(error)

    Thread(target=work, daemon=True).start()
    try:
        yield digests
    finally:
        for future in digests.values():
            future.cancel()


@contextmanager
def _listed(files: list[Path]) -> Iterator[None]:
    """Name the finished `files` in the error that ends the work."""
    try:
        yield
    except (KeyboardInterrupt, FloatingPointError) as stop:
        if not files:
            raise
        raise type(stop)(f"{str(stop) or 'interrupted'}; finished: {', '.join(map(str, files))}") from None


@contextmanager
def timed(part: str, seconds: dict[str, float]) -> Iterator[None]:
    """Add to `seconds[part]` how long the block took."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()  # the GPU may still work on steps that Python has queued
    seconds[part] = round(seconds.get(part, 0.0) + time.perf_counter() - start, 3)
