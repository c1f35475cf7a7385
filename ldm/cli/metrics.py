"""`ldm evaluate --metrics`: FID, KID, precision and recall, and CLIP score, of a folder or of a model's pictures.

`ldm evaluate --loss` measures the loss of a model on a folder, as a training does on kept-out pictures.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

import ldm
from ldm.cli.generate import load_models
from ldm.cli.options import given
from ldm.placement.choice import find_device
from ldm.record import ModelChoice

NAMES = ("fid", "kid", "precision_recall", "clip_score")


def add(command: argparse.ArgumentParser, measures: Any) -> None:
    """Add the options. measures: the group of the options that choose what `ldm evaluate` measures."""
    measures.add_argument("--metrics", nargs="+", choices=NAMES, help="measure these for any pictures instead")
    measures.add_argument("--loss", type=Path, metavar="FOLDER", help="measure instead the loss on captioned pictures")
    group = command.add_argument_group("with --metrics, see docs/training.md")
    group.add_argument("--reference", type=Path, metavar="FOLDER", help="the true pictures")
    group.add_argument("--pictures", type=Path, metavar="FOLDER", help="measure these instead of a model's pictures")
    group.add_argument("--count", type=int, metavar="N", help="make N pictures (default: one for each caption)")
    group.add_argument(
        "--features", metavar="FILE", help="Inception as TorchScript, or a folder of CLIP: not for CLIP score"
    )
    group.add_argument("--clip", metavar="FOLDER", help="a CLIP model with its tokenizer, for the CLIP score")


def run(args: argparse.Namespace, asked: ldm.Request, placement: ldm.Placement) -> None:
    """Measure the pictures, and print one line for each number, or JSON. All files are opened before the work."""
    from ldm.training.data import Folder
    from ldm.training.metrics import check_torchmetrics, clip_score, compare, feature_network, pictures_in

    _check(args)
    device = find_device(args.device)
    compared = [name for name in args.metrics if name != "clip_score"]
    if "fid" in compared:
        check_torchmetrics()
    network = feature_network(args.features, device) if compared else None
    captioned = "clip_score" in args.metrics or args.pictures is None
    items = Folder(args.pictures or args.reference).items if captioned else []
    captions = [text for _, text in items]
    made: list[Any]
    if args.pictures is None:
        captions = captions[: args.count]
        made = _make(args, asked, placement, captions)
    else:
        made = [path for path, _ in items] or pictures_in(args.pictures)
    found: dict[str, float] = {"pictures": len(made)}
    if network is not None:
        true = pictures_in(args.reference)
        found |= {"reference": len(true)} | compare(compared, network(made), network(true))
    if "clip_score" in args.metrics:
        found["clip_score"] = clip_score(args.clip, made, captions, device)
    print(json.dumps(found) if args.json else "\n".join(f"{name} {value:.6g}" for name, value in found.items()))


def run_loss(args: argparse.Namespace) -> None:
    """Print the mean squared error on the folder at fixed timesteps, in fp32, as a training logs it as "validation"."""
    from ldm.training.data import Folder
    from ldm.training.diffusion import DiffusionLoss, DiffusionObjective, Networks

    placement = ldm.Placement(device=args.device, dtype=torch.float32)
    pipe = load_models(ModelChoice(**given(args, ModelChoice)), placement).base
    folder, networks = Folder(args.loss, pipe.config.image_size), Networks(pipe.unet, pipe.text_encoder)
    objective = DiffusionObjective(pipe.config, networks, pipe.vae, DiffusionLoss(), kept_out=folder)
    with torch.no_grad():
        loss = objective.validate()["validation"].item()
    found = {"loss": loss, "pictures": len(folder)}
    print(json.dumps(found) if args.json else f"loss {loss:.6f} ({len(folder)} pictures)")


def _check(args: argparse.Namespace) -> None:
    compared = [name for name in args.metrics if name != "clip_score"]
    if compared and not (args.features and args.reference):
        raise ValueError(f"{' and '.join(compared)} need --features and --reference: the network and the true pictures")
    if "clip_score" in args.metrics and not args.clip:
        raise ValueError("clip_score needs --clip: the folder of a CLIP model with its tokenizer")
    if not (args.pictures or args.reference):
        raise ValueError("give --pictures to measure a folder, or --reference, whose captions become pictures")
    if args.count is not None and (args.pictures or args.count < 1):
        raise ValueError("--count is the number of pictures that the model makes, at least 1: omit it with --pictures")


def _make(
    args: argparse.Namespace, asked: ldm.Request, placement: ldm.Placement, captions: list[str]
) -> list[Image.Image]:
    """Make one picture for each caption. Picture i has the seed of the command + i."""
    pipe = load_models(ModelChoice(**given(args, ModelChoice)), placement).base
    made = []
    for i, caption in enumerate(tqdm(captions, unit="picture", disable=None)):
        made += pipe.generate(dataclasses.replace(asked, prompt=caption, seed=asked.seed + i))
    return made
