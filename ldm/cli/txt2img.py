"""`ldm txt2img`: make pictures from a prompt, or again from a picture."""

import argparse
import dataclasses
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import ldm
from ldm.cli.options import (
    MODEL_OPTIONS,
    PLACEMENT_OPTIONS,
    REQUEST_OPTIONS,
    Commands,
    ModelChoice,
    add_options,
    given,
    read_placement,
)
from ldm.cli.outputs import Outputs
from ldm.images import grid
from ldm.placement.memory import find_device
from ldm.record import Environment, ModelUsed, PartUsed, digest, environment, recall, remember
from ldm.request import default_conditioning


def add(commands: Commands) -> None:
    """Add the command."""
    command = commands.add_parser("txt2img", help="make pictures from a prompt")
    command.set_defaults(run=_txt2img)
    command.add_argument("prompt", nargs="?", help="what the picture shows")
    add_options(command, ModelChoice, MODEL_OPTIONS)
    add_options(command, ldm.Request, REQUEST_OPTIONS)
    add_options(command, ldm.Placement, PLACEMENT_OPTIONS)
    command.add_argument("--out", type=Path, help="the PNG to write; several pictures get numbers (default: out.png)")
    command.add_argument("--overwrite", action="store_true", help="replace files that exist")
    command.add_argument("--grid", action="store_true", help="one file with all the pictures")
    command.add_argument(
        "--from",
        dest="source",
        metavar="PNG",
        type=Path,
        help="repeat the run that made this picture; other options change it",
    )
    command.add_argument("--no-metadata", action="store_true", help="do not write into the PNG how it was made")
    command.add_argument("--json", action="store_true", help="print the results as JSON")


def _txt2img(args: argparse.Namespace) -> None:
    """Make the pictures, write them, and print where they are."""
    job = _plan_job(args)
    outputs = Outputs(args.out, job.count, args.overwrite)
    outputs.check()
    seconds: dict[str, float] = {}

    with _timed("load", seconds):
        pipe = job.model.load(job.placement)
        request = job.request.resolved(pipe.config)
    with ThreadPoolExecutor(1) as pool:  # a big file is hashed while its model works
        digests = {name: pool.submit(digest, path) for name, path in job.model.paths.items()}
        for name, sha256 in job.sha256.items():
            if digests[name].result() != sha256:
                what, flag = name.replace("_", " "), name.replace("_", "-")
                raise ValueError(
                    f"{getattr(job.model, name)} is not the {what} that made {args.source}; to use it all the same, "
                    f"name it with --{flag}"
                )
        with _timed("sample", seconds):
            for step in tqdm(pipe.stream(request), total=request.steps, unit="step", disable=None):
                latents = step.x
        chosen = list(range(request.images)) if job.picture is None else [job.picture]
        with _timed("decode", seconds):
            pictures = pipe.decode(latents[chosen])
        sha256s = {name: found.result() for name, found in digests.items()}
        record = remember(pipe, request, _used(job.model, pipe, sha256s))

    with _timed("save", seconds):
        shown = {None: grid(pictures)} if job.grid else dict(zip(chosen, pictures, strict=True))
        files = []
        for i, (index, picture) in enumerate(shown.items()):
            texts = {} if args.no_metadata else record.texts(index)
            files.append(outputs.save(i, picture, texts))

    results = {
        "files": [str(file) for file in files],
        "seeds": [request.seeds[i] for i in chosen],
        "seconds": seconds,
        "settings": record.as_dict(),
    }
    print(json.dumps(results) if args.json else "\n".join(map(str, files)))
    moved = [(want, file) for want, file in zip(outputs.wanted, files, strict=True) if want != file]
    if moved and args.out is not None:
        taken, kept = (", ".join(map(str, names)) for names in zip(*moved, strict=True))
        raise ValueError(
            f"another program wrote {taken} during the work, so the pictures are kept as {kept}; "
            "choose another --out, or add --overwrite"
        )


@contextmanager
def _timed(part: str, seconds: dict[str, float]) -> Iterator[None]:
    """Note in `seconds` how long the block took."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()  # the steps are queued long before they are done
    seconds[part] = round(time.perf_counter() - start, 3)


@dataclass(frozen=True)
class Job:
    """What one `ldm txt2img` is to do."""

    request: ldm.Request
    placement: ldm.Placement
    model: ModelChoice
    grid: bool
    picture: int | None = None  # write only this one of the request's pictures
    sha256: Mapping[str, str] = field(default_factory=dict)  # what these of `model.paths` must have

    @property
    def count(self) -> int:
        """How many files are written."""
        return 1 if self.grid or self.picture is not None else self.request.images


def _plan_job(args: argparse.Namespace) -> Job:
    """Put together what the arguments ask for, on top of what the picture after --from remembers."""
    asked, placed = given(args, REQUEST_OPTIONS), given(args, PLACEMENT_OPTIONS)
    model = given(args, MODEL_OPTIONS)
    if args.prompt is not None:
        asked["prompt"] = args.prompt
    if args.source is None:
        if args.prompt is None:
            raise ValueError("give a prompt in quotes, or --from a picture that ldm made")
        return Job(ldm.Request(**asked), read_placement(placed), ModelChoice(**model), args.grid)

    record = recall(args.source)
    request, picture = _reopened(record.request), record.picture
    as_grid = args.grid or picture is None
    if asked and picture is not None:  # another picture, from the noise of this one
        request = dataclasses.replace(request, seed=request.seed + picture, images=1)
        picture = None
    remembered = dataclasses.asdict(record.placement)
    if "device" in placed and not placed["device"].startswith("cpu"):
        del remembered["packed"]  # which only a CPU can
    placement = read_placement(remembered | placed)
    _compare(record.environment, environment(find_device(placement.device)), args.source)
    choice, sha256 = _recalled(record.model)
    if "model" in model:  # another one, and none of what was said of that one
        choice, sha256 = ModelChoice(), {}
    return Job(
        dataclasses.replace(request, **asked),
        placement,
        dataclasses.replace(choice, **model),
        as_grid,
        None if as_grid else picture,
        {name: expected for name, expected in sha256.items() if name not in model},
    )


def _used(choice: ModelChoice, pipe: ldm.Pipeline, sha256: Mapping[str, str]) -> ModelUsed:
    """What the record says of the model, given the digests of its paths."""
    parts = {n: PartUsed(str(getattr(choice, n)), sha256[n]) for n in sha256 if n != "model"}
    return ModelUsed(
        path=choice.model,
        name=pipe.config.name,
        sha256=sha256["model"],
        why=pipe.why,
        prediction=choice.prediction,
        ema=choice.ema,
        **parts,
    )


def _recalled(used: ModelUsed) -> tuple[ModelChoice, dict[str, str]]:
    """The choice of a model that a record remembers, and the digests of its paths."""
    parts = {"vae": used.vae, "unet": used.unet, "text_encoder": used.text_encoder}
    replaced = {name: part for name, part in parts.items() if part is not None}
    paths = {name: part.path for name, part in replaced.items()}
    sha256 = {name: part.sha256 for name, part in replaced.items()}
    choice = ModelChoice(used.path, used.prediction, used.ema, **paths)
    return choice, {"model": used.sha256} | sha256


def _reopened(request: ldm.Request) -> ldm.Request:
    """`request` with the micro-conditioning that is its default left open, to follow another size or model."""
    assert request.width is not None
    assert request.height is not None
    defaults = default_conditioning(request.width, request.height)
    default: dict[str, Any] = {n: None for n, v in defaults.items() if getattr(request, n) == v}
    return dataclasses.replace(request, **default)


def _compare(then: Environment, now: Environment, source: Path) -> None:
    """Warn if a picture was made by other software or hardware than there is here."""
    was, here = dataclasses.asdict(then), dataclasses.asdict(now)
    changed = [f"{name} {was[name]} (here {here[name]})" for name in was if was[name] != here[name]]
    if changed:
        warnings.warn(
            f"{source} was made with {', '.join(changed)}; the new picture may differ in last bits", stacklevel=2
        )
