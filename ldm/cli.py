"""The `ldm` command: one subcommand per task, its arguments generated from the dataclass that they fill.

Whatever is wrong with the input is one sentence on stderr and exit code 2, before anything is written. A run that fails
for lack of memory or precision ends with exit code 1.
"""

import argparse
import dataclasses
import json
import re
import secrets
import sys
import time
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO, get_args

from PIL import Image
from tqdm import tqdm

import ldm
from ldm.checkpoint.known import digest
from ldm.config import Spacing
from ldm.diffusion.samplers import SAMPLERS
from ldm.images import grid, save_png
from ldm.memory import ATTENTION, DTYPES
from ldm.pipeline import BUNDLED, locate
from ldm.record import Environment, environment, recall, remember
from ldm.request import default_conditioning

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

# Field, flag, what --help says. Types and defaults are the dataclass's own.
REQUEST_OPTIONS = (
    ("negative_prompt", "--negative", 'what guidance steers away from (SDXL base: none is not "")'),
    ("steps", "--steps", "denoising steps, 1 to 1000 (default: the model's)"),
    ("sampler", "--sampler", f"one of {', '.join(SAMPLERS)} (default: the model's)"),
    (
        "spacing",
        "--schedule",
        f"how steps are spread: one of {', '.join(get_args(Spacing))} (default: the model's)",
    ),
    (
        "guidance_scale",
        "--guidance",
        "how strongly the prompt steers; up to 1: without guidance (default: the model's)",
    ),
    ("guidance_rescale", "--rescale", "0 to 1: take back the contrast that guidance adds"),
    ("seed", "--seed", "of the first picture, the next has the next; negative: a random one"),
    ("images", "--images", "how many pictures"),
    ("width", "--width", "pixels (default: the model's)"),
    ("height", "--height", "pixels (default: the model's)"),
    (
        "original_width",
        "--original-width",
        "SDXL: pixels of the image that the picture is cut from (default: the width)",
    ),
    ("original_height", "--original-height", "the same (default: the height)"),
    ("crop_top", "--crop-top", "SDXL: pixels cut off at the top of that image (default: 0)"),
    ("crop_left", "--crop-left", "the same at its left (default: 0)"),
    (
        "target_width",
        "--target-width",
        "SDXL: pixels that are left of that image (default: the width)",
    ),
    ("target_height", "--target-height", "the same (default: the height)"),
    (
        "aesthetic_score",
        "--aesthetic-score",
        "SDXL refiner: how much people like it, about 0 to 10 (default: 6.0)",
    ),
    (
        "negative_aesthetic_score",
        "--negative-aesthetic-score",
        "the same of what guidance steers away from (default: 2.5)",
    ),
)
EVALUATE_OPTIONS = tuple(
    option
    for option in REQUEST_OPTIONS
    if option[0] in ("steps", "sampler", "spacing", "guidance_scale", "guidance_rescale", "seed")
)
PLACEMENT_OPTIONS = (
    ("device", "--device", "cpu, cuda, cuda:N or mps; default: the GPU if there is one"),
    (
        "dtype",
        "--dtype",
        f"one of {', '.join(DTYPE_NAMES)}; default: float16 on CUDA, else float32",
    ),
    ("vae_dtype", "--vae-dtype", "the same for the VAE; default: float32"),
    ("attention", "--attention", f"one of {', '.join(ATTENTION)}"),
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors, reported like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with argparse's own message."""
        raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `ldm` command on `argv` (default: the process's arguments) and return its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = _show_warning
        try:
            args = _parser().parse_args(argv)
            args.run(args)
            return 0
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}" if error.strerror else str(error)
            return _fail(reason, 2)
        except ValueError as error:
            return _fail(str(error), 2)
        except FloatingPointError as error:
            return _fail(str(error), 1)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "allocate" not in str(error):
                raise  # a defect of ours: its traceback is worth more than a sentence
            return _fail("not enough memory; ask for smaller or fewer pictures", 1)
        except KeyboardInterrupt:
            return _fail("interrupted", 130)


def _parser() -> Parser:
    parser = Parser(prog="ldm", description=ldm.__doc__)
    parser.add_argument("--version", action="version", version=f"ldm {ldm.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = commands.add_parser("txt2img", help="make pictures from a prompt")
    command.set_defaults(run=_txt2img)
    command.add_argument("prompt", nargs="?", help="what the picture shows")
    command.add_argument("--model", help=f"a folder or .safetensors file (default: {BUNDLED})")
    _add_options(command, ldm.Request, REQUEST_OPTIONS)
    _add_options(command, ldm.Placement, PLACEMENT_OPTIONS)
    command.add_argument(
        "--out", type=Path, help="the PNG to write; several pictures get numbers (default: out.png)"
    )
    command.add_argument("--overwrite", action="store_true", help="replace files that exist")
    command.add_argument("--grid", action="store_true", help="one file with all the pictures")
    command.add_argument(
        "--from",
        dest="source",
        metavar="PNG",
        type=Path,
        help="repeat the run that made this picture; other options change it",
    )
    command.add_argument(
        "--no-metadata", action="store_true", help="do not write into the PNG how it was made"
    )
    command.add_argument("--json", action="store_true", help="print the results as JSON")

    command = commands.add_parser("train", help="train a model, or go on where a training stopped")
    command.set_defaults(run=_train)
    command.add_argument("recipe", type=Path, help="a TOML file such as configs/train_ldm.toml")
    command.add_argument("--font", type=Path, help="the emoji font that draws the scenes")
    _add_options(command, ldm.Placement, PLACEMENT_OPTIONS[:1])

    command = commands.add_parser("evaluate", help="score a model of emoji scenes with a checker")
    command.set_defaults(run=_evaluate)
    command.add_argument("--model", help=f"a folder or .safetensors file (default: {BUNDLED})")
    command.add_argument("--font", type=Path, help="the emoji font that it was trained with")
    _add_options(command, ldm.Request, EVALUATE_OPTIONS)
    _add_options(command, ldm.Placement, PLACEMENT_OPTIONS)
    command.add_argument("--json", action="store_true", help="print every answer as JSON")
    return parser


def _add_options(
    parser: argparse.ArgumentParser, kind: type, options: Sequence[tuple[str, str, str]]
) -> None:
    """Add a flag per option; one that is not given is None, so that the field's own default holds."""
    hints = typing.get_type_hints(kind)
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    for name, flag, text in options:
        default = defaults[name]
        if default is not None:
            text += f" (default: {default})"
        parser.add_argument(
            flag, dest=name, type=_scalar(hints[name]), metavar=flag[2:].upper(), help=text
        )


def _scalar(hint: Any) -> type:
    """The type that reads a command-line word into a field of this annotation: int, float or str."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = get_args(hint)[0]
    return hint if hint in (int, float) else str


def _given(args: argparse.Namespace, options: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    return {n: getattr(args, n) for n, _, _ in options if getattr(args, n) is not None}


def _txt2img(args: argparse.Namespace) -> None:
    """Make the pictures, write them, and print where they are."""
    job = _plan_job(args)
    files = _plan_files(args.out, job.count, overwrite=args.overwrite)
    seconds: dict[str, float] = {}

    with _timed("load", seconds):
        pipe = ldm.load(job.model, job.placement)
        request = job.request.resolved(pipe.config)
    with ThreadPoolExecutor(1) as pool:  # a big file is hashed while its model works
        sha256 = pool.submit(digest, locate(job.model))
        if job.sha256 is not None and job.sha256 != sha256.result():
            raise ValueError(
                f"{job.model} is not the model that made {args.source}; to use it all the same, name it with --model"
            )
        with _timed("sample", seconds):
            for step in tqdm(pipe.stream(request), total=request.steps, unit="step", disable=None):
                latents = step.x
        chosen = list(range(request.images)) if job.picture is None else [job.picture]
        with _timed("decode", seconds):
            pictures = pipe.decode(latents[chosen])
        record = remember(pipe, request, job.placement, job.model, sha256.result())

    with _timed("save", seconds):
        shown = {None: grid(pictures)} if job.grid else dict(zip(chosen, pictures, strict=True))
        for (index, picture), file in zip(shown.items(), files, strict=True):
            texts = {} if args.no_metadata else record.texts(index)
            save_png(picture, file, texts, overwrite=args.overwrite)

    results = {
        "files": [str(file) for file in files],
        "seeds": [request.seeds[i] for i in chosen],
        "seconds": seconds,
        "settings": record.as_dict(),
    }
    print(json.dumps(results) if args.json else "\n".join(map(str, files)))


def _train(args: argparse.Namespace) -> None:
    """Train what the recipe says, and print where the result is."""
    from ldm.training.recipes import read_recipe, run

    device = ldm.Placement(device=args.device).resolve().device
    recipe = read_recipe(args.recipe)
    if args.font is not None:
        if recipe.data.folder is not None:
            raise ValueError(f"{args.recipe} trains on {recipe.data.folder}, which needs no --font")
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, font=args.font))
    print(run(recipe, device))


def _evaluate(args: argparse.Namespace) -> None:
    """Let a model draw the checker's prompts, and print how often it was right."""
    from ldm.training.evaluate import evaluate, fixed_scenes
    from ldm.training.scenes import FONT, emoji_sprites

    asked = ldm.Request("", **_given(args, EVALUATE_OPTIONS))
    placement = _placement(_given(args, PLACEMENT_OPTIONS))
    sprites = emoji_sprites(font=args.font or FONT)
    pipe = ldm.load(args.model or BUNDLED, placement)
    total = sum(map(len, fixed_scenes(tuple(sprites)).values()))
    with tqdm(total=total, unit="picture", disable=None) as progress:

        def generate(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
            pictures = []
            for prompt, seed in zip(prompts, seeds, strict=True):
                request = dataclasses.replace(asked, prompt=prompt, seed=seed)
                pictures += pipe.generate(request)
                progress.update()
            return pictures

        report = evaluate(generate, sprites, seed=asked.seed)
    print(json.dumps(report.to_json()) if args.json else report)


@contextmanager
def _timed(part: str, seconds: dict[str, float]) -> Iterator[None]:
    """Note in `seconds` how long the block took."""
    start = time.perf_counter()
    yield
    seconds[part] = round(time.perf_counter() - start, 3)


@dataclass(frozen=True)
class Job:
    """What one `ldm txt2img` is to do."""

    request: ldm.Request
    placement: ldm.Placement
    model: str
    grid: bool
    picture: int | None = None  # write only this one of the request's pictures
    sha256: str | None = None  # the model must have this one

    @property
    def count(self) -> int:
        """How many files are written."""
        return 1 if self.grid or self.picture is not None else self.request.images


def _plan_job(args: argparse.Namespace) -> Job:
    """Put together what the arguments ask for, on top of what the picture after --from remembers."""
    asked, placed = _given(args, REQUEST_OPTIONS), _given(args, PLACEMENT_OPTIONS)
    if args.prompt is not None:
        asked["prompt"] = args.prompt
    if args.source is None:
        if args.prompt is None:
            raise ValueError("give a prompt in quotes, or --from a picture that ldm made")
        model = args.model or BUNDLED
        return Job(ldm.Request(**asked), _placement(placed), model, args.grid)

    record = recall(args.source)
    request, picture = _reopened(record.request), record.picture
    as_grid = args.grid or picture is None
    if asked and picture is not None:  # another picture, from the noise of this one
        request = dataclasses.replace(request, seed=request.seed + picture, images=1)
        picture = None
    placement = _placement(dataclasses.asdict(record.placement) | placed)
    _compare(record.environment, environment(placement.resolve().device), args.source)
    return Job(
        dataclasses.replace(request, **asked),
        placement,
        args.model or record.model.path,
        as_grid,
        None if as_grid else picture,
        None if args.model else record.model.sha256,
    )


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
            f"{source} was made with {', '.join(changed)}; the new picture may differ in last bits",
            stacklevel=2,
        )


def _placement(names: dict[str, Any]) -> ldm.Placement:
    """A Placement from words, checked against this machine."""
    values = dict(names)
    for name in ("dtype", "vae_dtype"):
        if name in values:
            if values[name] not in DTYPE_NAMES:
                raise ValueError(
                    f"{name} must be one of {', '.join(DTYPE_NAMES)}, got {values[name]!r}"
                )
            values[name] = DTYPE_NAMES[values[name]]
    placement = ldm.Placement(**values)
    placement.resolve()
    return placement


def _plan_files(out: Path | None, count: int, *, overwrite: bool) -> list[Path]:
    """Choose the names of `count` files and make sure that they can be written, before the work begins."""
    wanted = out if out is not None else Path("out.png")
    if wanted.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {str(wanted)!r}")
    if not wanted.parent.is_dir():
        raise ValueError(f"there is no folder {wanted.parent} to write {wanted.name} into")

    def numbered(number: int) -> Path:
        return wanted.with_stem(f"{wanted.stem}-{number:05d}")

    files = [wanted] if count == 1 else [numbered(i + 1) for i in range(count)]
    taken = [file for file in files if _present(file)]
    if taken and not overwrite:
        if out is not None:
            raise ValueError(f"{taken[0]} exists; choose another --out, or add --overwrite")
        pattern = re.compile(re.escape(wanted.stem) + r"-(\d{5})\.png")
        found = [pattern.fullmatch(file.name) for file in wanted.parent.iterdir()]
        last = max((int(match[1]) for match in found if match), default=0)
        files = [numbered(last + 1 + i) for i in range(count)]
    for file in files:
        if file.is_dir():
            raise ValueError(f"{file} is a folder; --out names a file")
    probe = wanted.parent / f".ldm-{secrets.token_hex(8)}"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write into {wanted.parent}: {error.strerror}") from error
    return files


def _present(file: Path) -> bool:
    """Whether there is anything of that name; an impossible name is an OSError, unlike with `exists`."""
    try:
        file.lstat()
    except FileNotFoundError:
        return False
    return True


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning as one line, above the progress bar if there is one."""
    tqdm.write(f"ldm: warning: {_one_line(str(message))}", file=sys.stderr)


def _fail(reason: str, code: int) -> int:
    print(f"ldm: error: {_one_line(reason)}", file=sys.stderr)
    return code


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
