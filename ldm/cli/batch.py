"""`ldm batch`: the pictures of a list of prompts, in a folder with a manifest."""

import argparse
import dataclasses
import json
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import ldm
from ldm import jobs, rescue
from ldm.cli.audit import add_audit, check_list, logged
from ldm.cli.finishing import add_finishing, finishing_key, read_finishing
from ldm.cli.generate import load_models
from ldm.cli.options import Commands, add_options, given
from ldm.pictures import read_picture
from ldm.placement.budget import Way
from ldm.record import ModelChoice
from ldm.request import Request


def add(commands: Commands) -> None:
    """Add the command."""
    command = commands.add_parser("batch", help="make the pictures of a list of prompts; goes on where it stopped")
    command.set_defaults(run=_batch)
    command.add_argument("list", type=Path, help="a .jsonl, .csv or .txt file with a request or a prompt in each line")
    command.add_argument("out", type=Path, help="the folder of the pictures and the manifest")
    command.add_argument(
        "--batch-size", type=int, default=4, metavar="N", help="pictures that run together (default: 4)"
    )
    command.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="spread the list by Ray Data: over this machine, or over the cluster at ADDRESS (extra: ray)",
    )
    command.add_argument("--actors", type=int, default=1, metavar="N", help="with --ray: processes (default: 1)")
    for kind in (ModelChoice, Request, ldm.Placement):
        add_options(command, kind)
    command.add_argument(
        "--balance",
        metavar="FILE",
        type=Path,
        help="append to each prompt the attributes of a TOML file, all combinations; its classifiers see the pictures",
    )
    add_audit(command)
    add_finishing(command)
    command.add_argument("--json", action="store_true", help="print the numbers of pictures as JSON")


def _prepared(requests: list[Request], size: int, choice: ModelChoice, placement: ldm.Placement) -> Way:
    """Return how to make `size` of the largest pictures at once in the memory that is free."""
    if not requests:
        return Way(placement, size)
    largest = max(requests, key=lambda request: (request.width or 0) * (request.height or 0))
    job = jobs.Job(dataclasses.replace(largest, images=min(size, len(requests))), choice, placement)
    return rescue.prepare(job, lambda words: print(f"ldm: {words}", file=sys.stderr))


def _batch(args: argparse.Namespace) -> int:
    """Make the pictures, and print how many are done, failed and refused. The exit code is 1 if any is not done."""
    from ldm import batch
    from ldm.classifier import Classifier
    from ldm.variants import Balance, report

    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.actors < 1:
        raise ValueError(f"--actors must be at least 1, got {args.actors}")
    defaults = given(args, Request)
    if defaults.get("seed", 0) < 0:
        raise ValueError(f"--seed must be 0 or more, so that the list can be repeated, got {defaults['seed']}")
    balance, finishing = Balance.read(args.balance) if args.balance else Balance(), finishing_key(args)
    classifiers = {name: Classifier(folder) for name, folder in balance.classifiers.items()}
    listed = batch.read_entries(args.list, defaults, balance.attributes)
    listed = [dataclasses.replace(entry, finishing=finishing) for entry in listed]
    entries, decisions = check_list(args, listed)
    shard = batch.Shard.of_this_process()
    manifest = batch.Manifest(args.out, shard)
    choice, placement = ModelChoice(**given(args, ModelChoice)), ldm.Placement.fast(**given(args, ldm.Placement))
    if shard.world > 1 and (placement.device or "cuda") == "cuda" and torch.cuda.is_available():
        placement = dataclasses.replace(placement, device=f"cuda:{os.environ['LOCAL_RANK']}")
    if args.ray is None:
        way = _prepared([entry.request for entry in entries if entry.request], args.batch_size, choice, placement)
        models = load_models(choice, way.placement)
        way = dataclasses.replace(way, placement=models.base.placement)
        maker = batch.PictureMaker(choice, way.placement, models, args.out, read_finishing(args), way)
        make = batch.in_turn(maker)
    else:
        from ldm.batch_ray import spread

        make = spread(
            choice,
            placement,
            args.out,
            address=args.ray or None,
            actors=args.actors,
            finishing=partial(read_finishing, args),
        )
    made = batch.run(entries, choice, manifest, make, size=args.batch_size, shard=shard)
    total = len(entries) if shard.world == 1 else None  # torchrun: the share of this process is not known
    counts: Counter[str] = Counter()
    variants: dict[str, dict[str, Counter[str]]] = {}  # how many pictures of each value are done, failed and refused
    done = []
    made = logged(args, listed, decisions, manifest, made)
    for row in tqdm(made, total=total, unit="picture", disable=None):
        counts[row["status"]] += 1
        if row["status"] != "done":
            tqdm.write(f"ldm: line {row['line']} {row['status']}: {row['error']}", file=sys.stderr)
        elif row.get("nsfw", {}).get("flagged"):
            tqdm.write(f"ldm: line {row['line']} is flagged as NSFW: {row['nsfw']['scores']}", file=sys.stderr)
        done += [row] if row["status"] == "done" else []
        for name, value in row.get("choices", {}).items():
            variants.setdefault(name, {}).setdefault(value, Counter())[row["status"]] += 1
    result: dict[str, object] = {"folder": str(args.out), "done": counts["done"], "failed": counts["failed"]}
    result |= {"refused": counts["refused"]} if counts["refused"] else {}
    words = f"{args.out}: {', '.join(f'{n} {status}' for status, n in result.items() if status != 'folder')}"
    if variants:
        result["variants"] = variants
        words += "".join(f"\n{name}: {json.dumps(numbers, ensure_ascii=False)}" for name, numbers in variants.items())
    if classifiers:
        pictures = (read_picture(args.out / row["file"]) for row in done)
        found = [{name: classify(picture) for name, classify in classifiers.items()} for picture in pictures]
        result["report"] = report([row.get("choices", {}) for row in done], found)
        words += f"\n{json.dumps(result['report'], ensure_ascii=False, indent=1)}"
    print(json.dumps(result) if args.json else words)
    return int(counts["done"] < counts.total())
