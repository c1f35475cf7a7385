"""The `ldm` command: one subcommand per task. Its options are generated from the fields of dataclasses.

Wrong input ends the command with one sentence on stderr and exit code 2, before anything is written. If another program
takes the name of a picture during the work, the picture gets another name, and the exit code is 2. A run that needs too
much memory, or computes NaN or Inf, ends with exit code 1.
"""

import argparse
import sys
import unicodedata
import warnings
from collections.abc import Sequence
from typing import NoReturn, TextIO

from tqdm import tqdm

import ldm
from ldm.cli import (
    audit,
    batch,
    doctor,
    download,
    files,
    generate,
    interpolate,
    lora_tools,
    merging,
    training,
    watermark,
)
from ldm.placement.allocator import keep_freed_memory


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ValueError, so that `main` reports its errors like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with argparse's own message."""
        raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `ldm` command on `argv` and return its exit code.

    argv: None means the arguments of this process. Only then the memory allocator of the process is configured.
    """
    if argv is None:
        keep_freed_memory()
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = _show_warning
        try:
            args = _parse(argv)
            return int(args.run(args) or 0)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}" if error.strerror else str(error)
            return _fail(reason, 2)
        except ValueError as error:
            return _fail(str(error), 2)
        except FloatingPointError as error:
            return _fail(str(error), 1)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "allocate" not in str(error):
                raise  # a bug in this library, which needs a traceback
            return _fail("not enough memory; ask for smaller or fewer pictures", 1)
        except KeyboardInterrupt as stop:
            return _fail(str(stop) or "interrupted", 130)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments. Raises ValueError for arguments that are left over."""
    args, rest = _parser().parse_known_args(argv)
    # argparse does not find the prompt, or a mask and the prompt, after an option that follows the picture.
    for name in ("mask", "prompt")[-len(rest) :]:
        if rest and not rest[0].startswith("-") and getattr(args, name, "") is None:
            setattr(args, name, rest.pop(0))
    if rest:
        hint = "; the prompt stands in quotes, and only img2img, inpaint and edit take a picture"
        raise ValueError(f"unrecognized arguments: {' '.join(rest)}{hint if hasattr(args, 'prompt') else ''}")
    return args


def _parser() -> Parser:
    parser = Parser(prog="ldm", description=ldm.__doc__)
    parser.add_argument("--version", action="version", version=f"ldm {ldm.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    groups = generate, interpolate, batch, files, download, merging, lora_tools, training, doctor, audit, watermark
    for group in groups:
        group.add(commands)
    return parser


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
    """Return `text` in one line, with control characters escaped: text from a file must not control the terminal."""
    words = " ".join(text.split())
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in words)
