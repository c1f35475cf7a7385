"""`ldm txt2img`, `img2img`, `inpaint` and `edit`: make pictures from a prompt, a picture, or a picture's record."""

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

import ldm
from ldm import jobs
from ldm.cli.controls import add_controls, read_controls
from ldm.cli.image_prompts import add_image_prompts, read_image_prompts
from ldm.cli.options import Commands, add_options, given
from ldm.cli.previews import add_previews, read_previews
from ldm.cli.regions import add_regions
from ldm.diffusion.samplers import Step
from ldm.loading import BUNDLED
from ldm.outputs import Outputs
from ldm.placement.choice import find_device
from ldm.record import Environment, ModelChoice, environment, recall
from ldm.request import Request
from ldm.sizes import Sizes
from ldm.source import Mask, Source
from ldm.variations import Variation

FROM_PICTURE = ("strength", "exact_steps", "start_sigma", "resize")

CONTROL, IMAGE_PROMPT = ("control",), ("ip_adapter", "image_")  # the digests of a record begin with these


def add(commands: Commands) -> None:
    """Add the commands."""
    command = commands.add_parser("txt2img", help="make pictures from a prompt")
    command.add_argument("prompt", nargs="?", help="what the picture shows")
    _add_common(command)
    command = commands.add_parser("img2img", help="make pictures from a picture and a prompt")
    command.add_argument("image", nargs="?", metavar="PICTURE", help="the picture to start from")
    command.add_argument("prompt", nargs="?", help="what the new picture shows")
    add_options(command, Source, FROM_PICTURE)
    _add_common(command)
    command = commands.add_parser("inpaint", help="repaint a part of a picture, or paint around a picture")
    command.add_argument("image", nargs="?", metavar="PICTURE", help="the picture")
    command.add_argument("mask", nargs="?", metavar="MASK", help="a picture of the same size: white is repainted")
    command.add_argument("prompt", nargs="?", help="what the picture shows afterwards")
    add_options(command, Source, FROM_PICTURE[:-1])
    add_options(command, Mask)
    _add_common(command)
    command = commands.add_parser("edit", help="change a picture by an instruction, with an instruct-pix2pix model")
    command.add_argument("image", nargs="?", metavar="PICTURE", help="the picture")
    command.add_argument("prompt", nargs="?", metavar="INSTRUCTION", help='what to do with it: "make it snowy"')
    add_options(command, Source)
    _add_common(command)


def _add_common(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_generate)
    command.add_argument("--prompts", nargs="+", metavar="PROMPT", help="a prompt for each picture, not one for all")
    for kind in (ModelChoice, Request, Variation, Sizes, ldm.Placement):
        add_options(command, kind)
    add_controls(command)
    add_regions(command)
    add_image_prompts(command)
    command.add_argument("--out", type=Path, help="the PNG to write; several pictures get numbers (default: out.png)")
    command.add_argument("--overwrite", action="store_true", help="replace files that exist")
    add_previews(command)
    command.add_argument("--grid", action="store_true", help="one file with all the pictures")
    command.add_argument(
        "--from",
        dest="repeated",
        metavar="PNG",
        type=Path,
        help="repeat the run that made this picture; other options change the run",
    )
    command.add_argument("--no-metadata", action="store_true", help="do not write into the PNG how it was made")
    command.add_argument("--json", action="store_true", help="print the results as JSON")


def _generate(args: argparse.Namespace) -> None:
    """Make the pictures, write them, and print their paths."""
    job = _read_job(args)
    outputs = Outputs(args.out, job.count, args.overwrite, records=not args.no_metadata)
    outputs.check()
    previews = read_previews(args, outputs)
    if job.request.source is not None:  # read the pictures before the model, so that their errors come early
        _ = job.request.source.picture, job.request.region
    for control in job.request.controls:
        _ = control.picture
    for region in job.request.regions:
        _ = region.picture
    for prompt in job.request.image_prompts:
        _ = prompt.picture
    seconds: dict[str, float] = {}
    with jobs.timed("load", seconds):
        models = load_models(job.model, job.placement)
    if job.model.embeddings:
        _report_embeddings(models.base, job.request)
    with previews(models.base) as previewed:
        result = jobs.run(job, models, outputs, lambda steps, total: _watch(previewed(steps), total))
    results = {
        "files": [str(file) for file in result.files],
        "seeds": result.seeds,
        "seconds": seconds | result.seconds,
        "settings": result.record.as_dict(),
    }
    print(json.dumps(results) if args.json else "\n".join(map(str, result.files)))
    moved = [(want, file) for want, file in zip(outputs.wanted, result.files, strict=True) if want != file]
    if moved and args.out is not None:
        taken, kept = (", ".join(map(str, names)) for names in zip(*moved, strict=True))
        raise ValueError(
            f"another program wrote {taken} during the work, so the pictures are kept as {kept}; "
            "choose another --out, or add --overwrite"
        )


def load_models(choice: ModelChoice, placement: ldm.Placement) -> jobs.Models:
    """Load the models. Print on stderr what each model was identified as, and why."""
    models = jobs.load_models(choice, placement)
    for path, pipe in zip((choice.model, choice.refiner), models, strict=True):
        if pipe is not None and path != BUNDLED:
            print(f"ldm: {path}: {pipe.config.name}; {pipe.why}", file=sys.stderr)
    return models


def _report_embeddings(pipe: ldm.Pipeline, request: Request) -> None:
    """Print on stderr which embeddings the prompts use."""
    from ldm.checkpoint.embeddings import words_used

    texts = [*request.prompts, request.negative_prompt or "", *(region.prompt for region in request.regions)]
    used = words_used(pipe.text_encoder, texts)
    words = ", ".join(f"{name!r} ({count} vector{'s' * (count > 1)})" for name, count in used.items())
    print(f"ldm: embeddings in the prompts: {words or 'none'}", file=sys.stderr)


def _watch(steps: Iterator[Step], total: int) -> jobs.Steps:
    with tqdm(total=total, unit="step", disable=None) as bar:
        for step in steps:
            bar.update()
            yield step


def _read_job(args: argparse.Namespace) -> jobs.Job:
    """Make the job from the arguments. With --from, the picture's record holds the values that are not given."""
    asked, placed, model = given(args, Request), given(args, ldm.Placement), given(args, ModelChoice)
    sizes, source, mask = given(args, Sizes), given(args, Source), given(args, Mask)
    variation = given(args, Variation)
    if getattr(args, "mask", None) is not None:
        if args.prompt is None and not _names_a_picture(args.mask):
            args.prompt = args.mask  # PICTURE "prompt", without a MASK
        else:
            mask["image"] = args.mask
    if args.prompt is not None:
        if _names_a_picture(args.prompt):
            raise ValueError(f'the prompt is the name of a picture, {args.prompt}: use ldm img2img PICTURE "PROMPT"')
        asked["prompt"] = args.prompt
    if args.prompts is not None:
        if args.prompt is not None:
            raise ValueError(f"give one prompt, or --prompts with one for each picture, not both: {args.prompt!r}")
        asked = {"images": len(args.prompts)} | asked | {"prompt": tuple(args.prompts)}
    if getattr(args, "image", None) is not None:
        source["image"] = args.image
    if "strength" in source:
        source.setdefault("start_sigma", None)  # the strength replaces the recorded level
    recorded = None if args.repeated is None else recall(args.repeated)
    if hasattr(args, "image_guidance") and not (recorded and recorded.task == "edit"):
        source = {"image_guidance": 1.5, "mask": None} | source
    if (controls := read_controls(args, recorded.request.controls if recorded else ())) is not None:
        asked["controls"] = controls
    if args.regions is not None:
        asked["regions"] = tuple(args.regions)
    if (prompts := read_image_prompts(args, recorded.request.image_prompts if recorded else ())) is not None:
        asked["image_prompts"] = prompts
    if recorded is None:
        if "prompt" not in asked or (hasattr(args, "image") and "image" not in source):
            words = "a picture and a prompt" if hasattr(args, "image") else "a prompt in quotes"
            words = "a picture, a mask and a prompt" if hasattr(args, "mask") else words
            words = "a picture and an instruction" if hasattr(args, "image_guidance") else words
            raise ValueError(f"give {words}, or --from a picture that ldm made")
        if hasattr(args, "mask"):
            source["mask"] = Mask(**mask)
        if variation:
            asked["variation"] = Variation(**variation)
        request = Request(**asked, sizes=Sizes(**sizes) if sizes else None, source=Source(**source) if source else None)
        return jobs.Job(request, ModelChoice(**model), ldm.Placement.fast(**placed), args.grid)

    record, request, picture = recorded, recorded.request, recorded.picture
    as_grid = args.grid or picture is None
    if asked.get("sampler", request.sampler) != request.sampler:
        asked.setdefault("sampler_options", {})  # another sampler has other options
    if variation:
        varied = request.variation and request.variation.of(picture or 0)
        asked["variation"] = dataclasses.replace(varied or Variation(**variation), **variation)
    if sizes:
        asked["sizes"] = dataclasses.replace(request.sizes or Sizes(), **sizes)
    old = request.source.mask if request.source else None
    if mask or (hasattr(args, "mask") and old is None):
        source["mask"] = dataclasses.replace(old or Mask(), **mask)
    if source:
        if request.source is None and "image" not in source:
            raise ValueError(f"{args.repeated} was made from a prompt alone: name a picture to start from")
        asked["source"] = dataclasses.replace(request.source or Source(**source), **source)
    if asked and picture is not None:  # a changed request: one picture, from the noise of the recorded one
        prompt = request.prompts[picture % len(request.prompts)]
        seed, varied = request.seeds[picture], request.variation and request.variation.of(picture)
        request = dataclasses.replace(request, prompt=prompt, seed=seed, images=1, variation=varied)
        picture = None
    remembered = dict(record.placement)
    if placed.get("compile") or ("device" in placed and not placed["device"].startswith("cpu")):
        remembered.pop("packed", None)  # for a CPU and blocks that are not compiled
    placement = ldm.Placement.fast(**(remembered | placed))
    _compare(record.environment, environment(find_device(placement.device)), args.repeated)
    choice, sha256 = record.model, dict(record.sha256)
    if "model" in model:  # another model, without the recorded model's replaced parts and digests
        kept = {
            name
            for name in sha256
            if name.startswith(("source", "mask", "region", "embedding", *CONTROL, *IMAGE_PROMPT))
        }
        choice, sha256 = ModelChoice(embeddings=choice.embeddings), {name: sha256[name] for name in kept}
    if source.get("mask", old) is None:
        sha256.pop("mask", None)
    new = {*model, *(name for name, table in (("source", source), ("mask", mask)) if "image" in table)}
    changed = {
        CONTROL: controls is not None,
        IMAGE_PROMPT: prompts is not None,
        ("embedding",): "embeddings" in model,
        ("region",): args.regions is not None,
    }
    for names, given_anew in changed.items():
        if given_anew:  # the recorded digests are of other files
            sha256 = {name: expected for name, expected in sha256.items() if not name.startswith(names)}
    return jobs.Job(
        dataclasses.replace(request, **asked),
        dataclasses.replace(choice, **model),
        placement,
        as_grid,
        None if as_grid else picture,
        {name: expected for name, expected in sha256.items() if name not in new},
    )


def _names_a_picture(word: str) -> bool:
    return word.lower().endswith((".png", ".jpg", ".jpeg", ".webp")) and " " not in word


def _compare(then: Environment, now: Environment, source: Path) -> None:
    """Warn if a picture was made with other software or hardware than this process has."""
    was, here = dataclasses.asdict(then), dataclasses.asdict(now)
    changed = [f"{name} {was[name]} (here {here[name]})" for name in was if was[name] != here[name]]
    if changed:
        warnings.warn(
            f"{source} was made with {', '.join(changed)}; the new picture may differ in the last bits", stacklevel=2
        )
