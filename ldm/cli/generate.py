"""`ldm txt2img`, `img2img`, `inpaint` and `edit`: make pictures from a prompt, a picture, or a picture's record."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

import ldm
from ldm import jobs, rescue
from ldm.cli.audit import add_audit, start_audit
from ldm.cli.controls import add_controls
from ldm.cli.finishing import add_finishing, read_finishing
from ldm.cli.image_prompts import add_image_prompts
from ldm.cli.job import read_job
from ldm.cli.loras import add_loras
from ldm.cli.options import Commands, add_options
from ldm.cli.previews import add_previews, read_previews
from ldm.cli.regions import add_regions
from ldm.cli.stats import add_stats, check_stats, measuring, report_stats
from ldm.diffusion.samplers import Step
from ldm.loading import BUNDLED
from ldm.outputs import Outputs
from ldm.record import ModelChoice
from ldm.request import Request
from ldm.sizes import Sizes
from ldm.source import Mask, Source
from ldm.variations import Variation

FROM_PICTURE = ("strength", "exact_steps", "start_sigma", "resize")


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
    add_loras(command)
    command.add_argument("--out", type=Path, help="the PNG to write; several pictures get numbers (default: out.png)")
    command.add_argument("--overwrite", action="store_true", help="replace files that exist")
    add_finishing(command)
    add_previews(command)
    command.add_argument(
        "--allow-smaller", action="store_true", help="make smaller pictures if no other way fits into memory"
    )
    add_stats(command)
    command.add_argument("--grid", action="store_true", help="one file with all the pictures")
    command.add_argument(
        "--from",
        dest="repeated",
        metavar="PNG",
        type=Path,
        help="repeat the run that made this picture; other options change the run",
    )
    command.add_argument("--no-metadata", action="store_true", help="do not write into the PNG how it was made")
    add_audit(command)
    command.add_argument("--json", action="store_true", help="print the results as JSON")


def _generate(args: argparse.Namespace) -> None:
    """Make the pictures, write them, and print their paths."""
    job = read_job(args)
    finishing = read_finishing(args)
    outputs = Outputs(args.out, job.count, args.overwrite, not args.no_metadata, finishing.write)
    outputs.check()
    check_stats(args)
    previews = read_previews(args, outputs)
    if job.request.source is not None:  # read the pictures before the model, so that their errors come early
        _ = job.request.source.picture, job.request.region
    for control in job.request.controls:
        _ = control.picture
    for region in job.request.regions:
        _ = region.picture
    for prompt in job.request.image_prompts:
        _ = prompt.picture
    finish_audit = start_audit(args, job.request)
    way = rescue.prepare(job, _say)
    job = dataclasses.replace(job, placement=way.placement)
    seconds: dict[str, float] = {}
    with jobs.timed("load", seconds):
        models = load_models(job.model, job.placement)
    finishing.check(models.base, job.request)
    if job.model.embeddings or (models.base.loras and models.base.loras.words):
        _report_embeddings(models.base, job.request)
    with measuring(args, models) as stats, previews(models.base) as previewed:
        result = rescue.run(
            job,
            models,
            outputs,
            lambda steps, total: _watch(previewed(steps), total),
            way=dataclasses.replace(way, placement=models.base.placement),
            allow_smaller=args.allow_smaller,
            say=_say,
        )
    written = [i for i, file in enumerate(result.files) if file not in finishing.refused]
    files = [str(result.files[i]) for i in written]
    finish_audit([result.files[i] for i in written], result.record.as_dict())
    results: dict[str, object] = {
        "files": files,
        "seeds": [result.seeds[i] for i in written],
        "seconds": seconds | result.seconds,
        "settings": result.record.as_dict(),
        **finishing.results(),
        **report_stats(args, stats, result.seconds["save"], len(result.files)),
    }
    if args.json or files:
        print(json.dumps(results) if args.json else "\n".join(files))
    finishing.report()
    moved = [(want, file) for want, file in zip(outputs.wanted, result.files, strict=True) if want != file]
    if moved and args.out is not None:
        taken, kept = (", ".join(map(str, names)) for names in zip(*moved, strict=True))
        raise ValueError(
            f"another program wrote {taken} during the work, so the pictures are kept as {kept}; "
            "choose another --out, or add --overwrite"
        )


def load_models(choice: ModelChoice, placement: ldm.Placement) -> jobs.Models:
    """Load the models. Print on stderr what each was identified as, and how many modules of each LoRA were applied."""
    models = jobs.load_models(choice, placement)
    for path, pipe in zip((choice.model, choice.refiner), models, strict=True):
        if pipe is not None and path != BUNDLED:
            print(f"ldm: {path}: {pipe.config.name}; {pipe.why}", file=sys.stderr)
    for applied in models.base.loras.applied if choice.loras else ():
        print(f"ldm: {applied}", file=sys.stderr)
    return models


def _report_embeddings(pipe: ldm.Pipeline, request: Request) -> None:
    """Print on stderr which embeddings the prompts use."""
    from ldm.checkpoint.embeddings import words_used

    texts = [*request.prompts, request.negative_prompt or "", *(region.prompt for region in request.regions)]
    if request.variation:
        texts.append(request.variation.other_prompt or "")
    if request.emphasis:
        from ldm.prompts import parse

        texts = [text for prompt in texts for section in parse(prompt) for text, _ in section]
    used = words_used(pipe.text_encoder, texts)
    words = ", ".join(f"{name!r} ({count} vector{'s' * (count > 1)})" for name, count in used.items())
    print(f"ldm: embeddings in the prompts: {words or 'none'}", file=sys.stderr)


def _say(words: str) -> None:
    tqdm.write(f"ldm: {words}", file=sys.stderr)


def _watch(steps: Iterator[Step], total: int) -> jobs.Steps:
    with tqdm(total=total, unit="step", disable=None) as bar:
        for step in steps:
            bar.update()
            yield step
