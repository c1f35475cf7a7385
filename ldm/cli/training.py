"""`ldm train` and `ldm evaluate`: train a model, and measure how well a model follows prompts."""

import argparse
import contextlib
import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

import ldm
from ldm.cli import metrics
from ldm.cli.generate import load_models
from ldm.cli.options import Commands, add_options, given
from ldm.placement.choice import find_device
from ldm.record import MODEL_AND_PARTS, ModelChoice

TAUGHT = 64  # pictures of what a recipe has taught, and as many of what the model knew
ASKED = ("steps", "sampler", "spacing", "seed", "guidance_scale", "guidance_rescale", "guidance_interval")


def add(commands: Commands) -> None:
    """Add the commands to the parser."""
    command = commands.add_parser("train", help="train with one recipe after another, or resume a stopped training")
    command.set_defaults(run=_train)
    command.add_argument("recipe", type=Path, nargs="+", help="a TOML file such as configs/train_ldm.toml")
    command.add_argument("--font", type=Path, help="the font of the flat emoji, a NotoColorEmoji.ttf")
    command.add_argument("--fluent", type=Path, help="the archive of the 3D emoji, see docs/training.md")
    add_options(command, ldm.Placement, ["device"])

    command = commands.add_parser("evaluate", help="measure how often a model of emoji scenes draws its prompts")
    command.set_defaults(run=_evaluate)
    add_options(command, ModelChoice, (*MODEL_AND_PARTS, "embeddings", "loras"))
    command.add_argument("--font", type=Path, help="the font of the flat emoji that the model was trained with")
    command.add_argument("--fluent", type=Path, help="the archive of the 3D emoji, see docs/training.md")
    other = command.add_mutually_exclusive_group()
    other.add_argument("--kid", type=int, metavar="N", help="measure KID with N pictures instead, such as 1000")
    other.add_argument("--controlnet", help="measure instead how well pictures follow the edges that this one is given")
    other.add_argument("--ip-adapter", metavar="FILE", help="measure instead how much pictures keep of an image prompt")
    command.add_argument("--image-encoder", metavar="PATH", help="the vision tower of the IP-Adapter, a folder or file")
    other.add_argument("--edit", action="store_true", help="measure instead how an editing model follows instructions")
    add_options(command, ldm.Source, ("image_guidance",))
    metrics.add(command, other)
    other.add_argument("--recipe", type=Path, help="measure instead what this recipe with a [lesson] has taught")
    add_options(command, ldm.Request, ASKED)
    add_options(command, ldm.Placement)
    other.add_argument("--checker", action="store_true", help="measure also the checker itself, on true renders")
    command.add_argument("--json", action="store_true", help="print the results of all pictures as JSON")


def _train(args: argparse.Namespace) -> None:
    """Train with each recipe, and print the folder of each result. All recipes are read before the first training."""
    from ldm.training.distributed import NotFirstProcess, joined, wait_for_all
    from ldm.training.loop import Interrupted
    from ldm.training.recipes import read_recipe

    device = find_device(args.device)
    files = {name: path for name, path in {"font": args.font, "fluent": args.fluent}.items() if path is not None}
    recipes = []
    for path in args.recipe:
        recipe = read_recipe(path)
        if files and recipe.data.folder is not None:
            flags = " and ".join(f"--{name}" for name in files)
            raise ValueError(f"{path} trains on the folder {recipe.data.folder}, without emoji: omit {flags}")
        recipes.append(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **files)))
    try:
        with joined(device) as own:
            for recipe in recipes:
                with contextlib.suppress(NotFirstProcess):
                    print(recipe.run(own), flush=True)
                wait_for_all()  # the next recipe may read the result
    except Interrupted as stop:
        options = files | ({"device": args.device} if args.device is not None else {})
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = shlex.join(["ldm", "train", *map(str, args.recipe), *words])
        raise Interrupted(f"{stop}; to go on: {command}") from None


def _evaluate(args: argparse.Namespace) -> None:
    """Make pictures of fixed prompts, and print how often they show what the prompts say; or another measure."""
    from ldm.training.evaluate import distance, evaluate, fixed_scenes
    from ldm.training.lessons import measure, table
    from ldm.training.objects import FLUENT, FONT, emoji_sprites

    if (args.ip_adapter is None) != (args.image_encoder is None):
        raise ValueError("--ip-adapter and --image-encoder belong together: give both or neither")
    if args.image_guidance is not None and not args.edit:
        raise ValueError("--image-guidance is for --edit: leave it out, or add --edit")
    asked = ldm.Request("", **given(args, ldm.Request, ASKED))
    placement = ldm.Placement.fast(**given(args, ldm.Placement))
    if args.loss is not None:
        metrics.run_loss(args)
        return
    if args.metrics is not None:
        metrics.run(args, asked, placement)
        return
    files = args.font or FONT, args.fluent or FLUENT
    lesson = _lesson(args.recipe) if args.recipe is not None else None
    sprites = lesson.sprites(*files) if lesson else emoji_sprites(*files)
    pipe = load_models(ModelChoice(**given(args, ModelChoice)), placement).base
    if args.controlnet is not None:
        _evaluate_controlnet(args, asked, pipe, sprites)
        return
    if args.ip_adapter is not None:
        _evaluate_ip_adapter(args, asked, pipe, sprites)
        return
    if args.edit:
        _evaluate_edits(args, asked, pipe, sprites)
        return
    scenes = fixed_scenes(tuple(next(iter(sprites.values()))), tuple(sprites))
    total = 2 * TAUGHT if lesson else args.kid or sum(map(len, scenes.values()))
    with tqdm(total=total, unit="picture", disable=None) as progress:

        def generate(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
            pictures = []
            for prompt, seed in zip(prompts, seeds, strict=True):
                request = dataclasses.replace(asked, prompt=prompt, seed=seed)
                pictures += pipe.generate(request)
                progress.update()
            return pictures

        def reconstruct(picture: Image.Image) -> Image.Image:
            return pipe.decode(pipe.encode_image(picture))[0]

        if lesson:
            scores = measure(lesson, generate, sprites, seed=asked.seed, count=TAUGHT)
            print(json.dumps({name: score._asdict() for name, score in scores.items()}) if args.json else table(scores))
            return
        if args.kid is not None:
            value, error = distance(generate, sprites, pipe.vae, args.kid, seed=asked.seed)
            found = {"kid": value, "standard_error": error, "pictures": args.kid}
            print(json.dumps(found) if args.json else f"KID {value:.5f} +- {error:.5f} ({args.kid} pictures)")
            return
        report = evaluate(generate, sprites, seed=asked.seed, reconstruct=reconstruct if args.checker else None)
    print(json.dumps(report.to_json()) if args.json else report)


def _lesson(path: Path) -> Any:
    """Return the lesson of the recipe at `path`. Raises ValueError if the recipe has none."""
    from ldm.training.recipes import read_recipe

    lesson = getattr(read_recipe(path), "lesson", None)
    if lesson is None:
        raise ValueError(
            f"{path} has no table [lesson], so what it teaches cannot be measured here: give another recipe"
        )
    return lesson


def _evaluate_controlnet(args: argparse.Namespace, asked: ldm.Request, pipe: ldm.Pipeline, sprites: Any) -> None:
    from ldm.training.outlines import WITHIN, outlines

    count = 64
    with tqdm(total=2 * count, unit="picture", disable=None) as progress:

        def generate(prompt: str, seed: int, hint: Image.Image | None) -> Image.Image:
            controls = () if hint is None else (ldm.Control(args.controlnet, hint),)
            (picture,) = pipe.generate(dataclasses.replace(asked, prompt=prompt, seed=seed, controls=controls))
            progress.update()
            return picture

        found = outlines(generate, sprites, pipe.config.image_size, count=count, seed=asked.seed)
    if args.json:
        print(json.dumps(found | {"pictures": count}))
    else:
        shares = ", ".join(f"{100 * share:.0f} % {name} the ControlNet" for name, share in found.items())
        print(f"edges of the hint with an edge of the picture within {WITHIN} pixels: {shares} ({count} pictures each)")


def _evaluate_ip_adapter(args: argparse.Namespace, asked: ldm.Request, pipe: ldm.Pipeline, sprites: Any) -> None:
    from ldm.training.likeness import likeness

    count = 64
    with tqdm(total=4 * count, unit="picture", disable=None) as progress:

        def generate(seed: int, picture: Image.Image | None) -> Image.Image:
            prompts = () if picture is None else (ldm.ImagePrompt(args.ip_adapter, picture, args.image_encoder),)
            (made,) = pipe.generate(dataclasses.replace(asked, seed=seed, image_prompts=prompts))
            progress.update()
            return made

        found = likeness(generate, sprites, pipe.config.image_size, count=count, seed=asked.seed)
    if args.json:
        print(json.dumps(found))
        return
    for row, scores in found.items():
        print(f"{row} the image prompt: " + ", ".join(f"{name} {right}/{of}" for name, (right, of) in scores.items()))


def _evaluate_edits(args: argparse.Namespace, asked: ldm.Request, pipe: ldm.Pipeline, sprites: Any) -> None:
    from ldm.training.changes import changes, table

    guidance = {"image_guidance": 1.5} | given(args, ldm.Source, ("image_guidance",))
    count = 64
    with tqdm(total=count, unit="picture", disable=None) as progress:

        def generate(instruction: str, seed: int, before: Image.Image) -> Image.Image:
            source = ldm.Source(before, **guidance)
            (picture,) = pipe.generate(dataclasses.replace(asked, prompt=instruction, seed=seed, source=source))
            progress.update()
            return picture

        found = changes(generate, sprites, pipe.config.image_size, count=count, seed=asked.seed)
    if args.json:
        print(json.dumps({row: {kind: score._asdict() for kind, score in own.items()} for row, own in found.items()}))
    else:
        print(table(found))
