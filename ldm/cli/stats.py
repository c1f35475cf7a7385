"""The options --stats and --trace of the generating commands."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.jobs import Models

if TYPE_CHECKING:
    from ldm.stats import Stats


def add_stats(command: argparse.ArgumentParser) -> None:
    """Add the options."""
    command.add_argument(
        "--stats", action="store_true", help="print seconds per stage, steps/s, memory and power on stderr"
    )
    command.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a trace of all operations, see docs/operate.md"
    )


def check_stats(args: argparse.Namespace) -> None:
    """Raise ValueError if the trace cannot be written."""
    if args.trace is not None and (args.trace.exists() or not args.trace.parent.is_dir()):
        reason = "exists" if args.trace.exists() else f"is in no folder: there is no {args.trace.parent}"
        raise ValueError(f"the trace {args.trace} {reason}; choose another --trace")


@contextmanager
def measuring(args: argparse.Namespace, models: Models) -> "Iterator[Stats | None]":
    """Measure and trace the block as the options say. Yields None without --stats and --trace."""
    if not args.stats and args.trace is None:
        yield None
        return
    from ldm.stats import measured, traced

    with ExitStack() as stack:
        stats = stack.enter_context(measured(*(pipe for pipe in models if pipe is not None)))
        if args.trace is not None:
            stack.enter_context(traced(args.trace, stats.device))
        yield stats


def report_stats(args: argparse.Namespace, stats: "Stats | None", saving: float, files: int) -> dict[str, Any]:
    """Print what was measured on stderr, unless --json prints it. Return it for --json; empty without `stats`.

    saving: the seconds that saving took. files: the number of the saved files.
    """
    if stats is None:
        return {}
    stats.seconds["save"], stats.calls["save"] = saving, files
    if args.stats and not args.json:
        print(f"ldm: {json.dumps(stats.as_dict())}", file=sys.stderr)
    return {"stats": stats.as_dict()}
