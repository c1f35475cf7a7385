"""From the arguments of a generating command to a `Job`, with the record of a picture if --from names one."""

import argparse
import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

import ldm
from ldm.cli.controls import read_controls
from ldm.cli.image_prompts import IMAGE_PROMPTS
from ldm.cli.loras import read_loras
from ldm.cli.options import given
from ldm.cli.regions import REGIONS
from ldm.jobs import Job, kind_of_file
from ldm.placement.choice import find_device
from ldm.record import Environment, ModelChoice, Record, environment, recall
from ldm.request import Request
from ldm.sizes import Sizes
from ldm.source import Mask, Source
from ldm.variations import Variation

Fields = dict[str, Any]


def read_job(args: argparse.Namespace) -> Job:
    """Make the job from the arguments. With --from, the picture's record holds the values that are not given.

    Raises ValueError for arguments that are missing, wrong or do not fit together.
    """
    record = None if args.repeated is None else recall(args.repeated)
    asked, source, mask = _request_fields(args, record), _source_fields(args, record), given(args, Mask)
    if hasattr(args, "mask") and args.mask is not None:
        mask["image"] = args.mask
    if record is None:
        return _new(args, asked, source, mask)
    return _repeated(args, record, asked, source, mask)


def _request_fields(args: argparse.Namespace, record: Record | None) -> Fields:
    """Return the fields of the request that are given, but for its sizes, source and variation."""
    asked = given(args, Request)
    alone = args.prompt is None and getattr(args, "mask", None) is None
    if args.repeated and alone and getattr(args, "image", None) is not None and not _names_a_picture(args.image):
        args.prompt, args.image = args.image, None  # --from PNG "prompt", with the recorded picture
    if getattr(args, "mask", None) is not None and args.prompt is None and not _names_a_picture(args.mask):
        args.prompt, args.mask = args.mask, None  # PICTURE "prompt", without a MASK
    if args.prompt is not None:
        if _names_a_picture(args.prompt):
            raise ValueError(f'the prompt is the name of a picture, {args.prompt}: use ldm img2img PICTURE "PROMPT"')
        asked["prompt"] = args.prompt
    if args.prompts is not None:
        if args.prompt is not None:
            raise ValueError(f"give one prompt, or --prompts with one for each picture, not both: {args.prompt!r}")
        asked = {"images": len(args.prompts)} | asked | {"prompt": tuple(args.prompts)}
    old = record.request if record else None
    for name, parts in (
        ("controls", read_controls(args, old.controls if old else ())),
        ("image_prompts", IMAGE_PROMPTS.read(args.image_prompts, old.image_prompts if old else ())),
        ("regions", REGIONS.read(args.regions, old.regions if old else ())),
    ):
        if parts is not None:
            asked[name] = parts
    without, loras = read_loras(args, asked)
    if loras:
        args.loras = [*(args.loras or ()), *loras]
    return asked | without


def _source_fields(args: argparse.Namespace, record: Record | None) -> Fields:
    """Return the fields of the source that are given, but for its mask."""
    source = given(args, Source)
    if getattr(args, "image", None) is not None:
        source["image"] = args.image
    if "strength" in source:
        source.setdefault("start_sigma", None)  # the strength replaces the recorded level
    if hasattr(args, "image_guidance") and not (record and record.task == "edit"):
        source = {"image_guidance": 1.5, "mask": None} | source
    elif hasattr(args, "mask") and record and record.task == "edit":
        source["image_guidance"] = None
    return source


def _new(args: argparse.Namespace, asked: Fields, source: Fields, mask: Fields) -> Job:
    """Make a job without a record."""
    if "prompt" not in asked or (hasattr(args, "image") and "image" not in source):
        words = "a picture and a prompt" if hasattr(args, "image") else "a prompt in quotes"
        words = "a picture, a mask and a prompt" if hasattr(args, "mask") else words
        words = "a picture and an instruction" if hasattr(args, "image_guidance") else words
        raise ValueError(f"give {words}, or --from a picture that ldm made")
    if hasattr(args, "mask"):
        source["mask"] = Mask(**mask)
    for name, kind, fields in (
        ("sizes", Sizes, given(args, Sizes)),
        ("source", Source, source),
        ("variation", Variation, given(args, Variation)),
    ):
        if fields:
            asked[name] = kind(**fields)
    placement = ldm.Placement.fast(**given(args, ldm.Placement))
    return Job(Request(**asked), ModelChoice(**given(args, ModelChoice)), placement, args.grid)


def _repeated(args: argparse.Namespace, record: Record, asked: Fields, source: Fields, mask: Fields) -> Job:
    """Make a job from a record, with the values of the arguments in place of the recorded ones."""
    request, picture = record.request, record.picture
    as_grid = args.grid or picture is None
    if asked.get("sampler", request.sampler) != request.sampler:
        asked.setdefault("sampler_options", {})  # another sampler has other options
    varied = request.variation and request.variation.of(picture or 0)
    if variation := given(args, Variation):
        asked["variation"] = dataclasses.replace(varied or Variation(**variation), **variation)
    if sizes := given(args, Sizes):
        asked["sizes"] = dataclasses.replace(request.sizes or Sizes(), **sizes)
    old = request.source.mask if request.source else None
    if mask or (hasattr(args, "mask") and old is None):
        source["mask"] = dataclasses.replace(old or Mask(), **mask)
    if source:
        if request.source is None and "image" not in source:
            raise ValueError(f"{args.repeated} was made from a prompt alone: name a picture to start from")
        asked["source"] = dataclasses.replace(request.source or Source(**source), **source)
    if asked and picture is not None:  # a changed request: one picture, from the noise of the recorded one
        prompt, seed = request.prompts[picture % len(request.prompts)], request.seeds[picture]
        request = dataclasses.replace(request, prompt=prompt, seed=seed, images=1, variation=varied)
        picture = None
    model = given(args, ModelChoice)
    named = {name for name, fields in (("source", source), ("mask", mask)) if "image" in fields}
    if source.get("mask", old) is None:
        named.add("mask")
    choice = record.model
    if "model" in model:
        choice = ModelChoice(embeddings=choice.embeddings, loras=choice.loras)
    return Job(
        dataclasses.replace(request, **asked),
        dataclasses.replace(choice, **model),
        _placement(args, record),
        as_grid,
        None if as_grid else picture,
        _expected(record, asked, model, named),
    )


def _placement(args: argparse.Namespace, record: Record) -> ldm.Placement:
    """Return the recorded placement with the given fields. Warn if this machine differs from that of the record."""
    placed, remembered = given(args, ldm.Placement), dict(record.placement)
    if placed.get("compile") or ("device" in placed and not placed["device"].startswith("cpu")):
        remembered.pop("packed", None)  # for a CPU and blocks that are not compiled
    placement = ldm.Placement.fast(**(remembered | placed))
    _compare(record.environment, environment(find_device(placement.device)), args.repeated)
    return placement


def _expected(record: Record, asked: Fields, model: Fields, named: set[str]) -> dict[str, str]:
    """Return the recorded digests of the files that the arguments do not replace.

    named: the pictures among them that are replaced. Another model comes without the recorded one's replaced parts.
    """
    changed = asked.keys() | model.keys()
    return {
        name: sha256
        for name, sha256 in record.sha256.items()
        if name not in named and name not in model and kind_of_file(name).field not in changed
    }


def _names_a_picture(word: str) -> bool:
    endings = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
    return word.lower().endswith(endings) and (" " not in word or os.path.isfile(word))


def _compare(then: Environment, now: Environment, source: Path) -> None:
    """Warn if a picture was made with other software or hardware than this process has."""
    was, here = dataclasses.asdict(then), dataclasses.asdict(now)
    changed = [f"{name} {was[name]} (here {here[name]})" for name in was if was[name] != here[name]]
    if changed:
        warnings.warn(
            f"{source} was made with {', '.join(changed)}; the new picture may differ in the last bits", stacklevel=2
        )
