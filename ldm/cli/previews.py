"""The options of previews."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from ldm.config import check_number
from ldm.diffusion.samplers import Step
from ldm.outputs import Outputs
from ldm.pipeline import Pipeline

Previews = Callable[[Pipeline], AbstractContextManager[Callable[[Iterator[Step]], Iterator[Step]]]]


def add_previews(command: argparse.ArgumentParser) -> None:
    """Add the options."""
    command.add_argument(
        "--preview",
        type=int,
        metavar="N",
        help="every N steps, write the current estimate beside the output, as out.preview.png; removed at the end",
    )
    command.add_argument(
        "--taesd",
        type=Path,
        metavar="FILE",
        help="make the previews with this TAESD, the one for the model's family (default: a linear map, which is soft)",
    )


def read_previews(args: argparse.Namespace, outputs: Outputs) -> Previews:
    """Check the options, and return what watches the steps of a model: see `ldm.previews.written`.

    Raises ValueError for wrong options, a file in the way, and a file that is not a TAESD.
    """
    if args.preview is None:
        if args.taesd is not None:
            raise ValueError("--taesd is for previews: add --preview N")
        return lambda pipe: nullcontext(lambda steps: steps)
    check_number("--preview", args.preview, 1, whole=True)
    path, every = outputs.preview, args.preview
    if path.exists():  # also with --overwrite: the preview is removed at the end, and with it the file
        raise ValueError(f"{path} exists, and previews are written there: remove it, or choose another --out")
    from ldm import previews  # imported here, because most runs have none
    from ldm.checkpoint.taesd import load_taesd

    decoder = None if args.taesd is None else load_taesd(args.taesd)
    return lambda pipe: previews.written(
        pipe, path, every, previews.linear(pipe) if decoder is None else previews.tiny(decoder, pipe)
    )
