"""The options for what happens to a finished picture: the check for NSFW content, and the watermark."""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ldm.pictures import save_png
from ldm.pipeline import Pipeline
from ldm.request import Request

if TYPE_CHECKING:  # a plain picture takes none of these
    from ldm.safety.nsfw import Action, Checker, Verdict
    from ldm.safety.watermark import Method


def add_finishing(command: argparse.ArgumentParser) -> None:
    """Add the options."""
    command.add_argument(
        "--nsfw-check",
        metavar="FOLDER",
        help="judge each picture by this safety checker: its folder or file, or open-nsfw (extras: vision, nsfw)",
    )
    command.add_argument(
        "--nsfw",
        choices=("label", "blur", "refuse"),
        help="what happens to a flagged picture: it is named, blurred, or not written (default: label)",
    )
    add_watermark(command)


def add_watermark(command: argparse.ArgumentParser) -> None:
    """Add the options of the watermark."""
    command.add_argument(
        "--watermark",
        metavar="TEXT",
        help="write TEXT into the colors of each picture, invisibly; sdxl stands for the official mark of SDXL",
    )
    command.add_argument(
        "--watermark-method",
        choices=("dwtDctSvd", "dwtDct"),
        help="dwtDct is that of the official scripts, which most JPEG files lose (default: dwtDctSvd)",
    )


@dataclass
class Finishing:
    """What happens to each picture: it is judged, gets the watermark, and is written.

    verdicts: of the pictures written so far, by file. refused: those that were not written, with their verdicts.
    """

    checker: "Checker | None" = None
    action: "Action" = "label"
    watermark: str | None = None
    method: "Method" = "dwtDctSvd"
    verdicts: dict[Path, "Verdict"] = field(default_factory=dict)
    refused: dict[Path, "Verdict"] = field(default_factory=dict)

    def check(self, pipe: Pipeline, request: Request) -> None:
        """Raise ValueError if the watermark does not fit into the pictures of `request`."""
        if self.watermark is not None:
            from ldm.safety.watermark import check_size, message_bits

            plan = pipe.plan(request)
            check_size(plan.width, plan.height, len(message_bits(self.watermark)))

    def write(self, picture: Image.Image, path: Path, texts: Mapping[str, str], *, overwrite: bool) -> None:
        """Finish a picture and write it, as `save_png` does. A refused picture is not written."""
        verdict, added = None, {}
        if self.checker is not None:
            from ldm.safety.nsfw import act

            verdict = self.checker.check(picture)
            acted = act(picture, verdict, self.action)
            if acted is None:
                self.refused[path] = verdict
                return
            picture, added["ldm-nsfw"] = acted, json.dumps(verdict.as_dict())
        picture, added = self.mark(picture), added | self.mark_texts
        save_png(picture, path, {**texts, **added} if texts else {}, overwrite=overwrite)
        if verdict is not None:
            self.verdicts[path] = verdict

    def mark(self, picture: Image.Image) -> Image.Image:
        """Return the picture with the watermark, or the same picture if there is none."""
        if self.watermark is None:
            return picture
        from ldm.safety import watermark

        return watermark.write(picture, self.watermark, self.method)

    @property
    def mark_texts(self) -> dict[str, str]:
        """The text chunks that name the watermark; none without one."""
        named = json.dumps({"message": self.watermark, "method": self.method})
        return {} if self.watermark is None else {"ldm-watermark": named}

    def row(self, file: Path) -> dict[str, Any]:
        """Return what the manifest of a list says of a picture: whether it is there, and its verdict."""
        if file in self.refused:
            verdict = self.refused[file]
            error = f"refused as NSFW and not written: {_worst(verdict)}"
            return {"status": "refused", "file": None, "error": error, "nsfw": verdict.as_dict()}
        judged = {"nsfw": self.verdicts[file].as_dict()} if file in self.verdicts else {}
        return {"status": "done", "file": file.name} | judged

    def results(self) -> dict[str, Any]:
        """Return the verdicts by file, for --json; empty without a checker."""
        verdicts = {str(file): verdict.as_dict() for file, verdict in (self.verdicts | self.refused).items()}
        return {"nsfw": verdicts} if self.checker is not None else {}

    def report(self) -> None:
        """Name the flagged pictures on stderr. Raises ValueError if any was refused."""
        for file, verdict in self.verdicts.items():
            if verdict.flagged:
                print(f"ldm: {file} is flagged as NSFW ({self.action}): {_worst(verdict)}", file=sys.stderr)
        if self.refused:
            names = "; ".join(f"{file}: {_worst(verdict)}" for file, verdict in self.refused.items())
            raise ValueError(f"refused as NSFW and not written: {names}; --nsfw label and --nsfw blur write them")


def _worst(verdict: "Verdict") -> str:
    """Name the largest score, without those of special care, which alone flag nothing."""
    scores = {name: score for name, score in verdict.scores.items() if not name.startswith("special")}
    name = max(scores, key=lambda name: scores[name])
    return f"{name} has the score {scores[name]:g}"


def finishing_key(args: argparse.Namespace) -> str:
    """Return the options that are given as one text; empty without any."""
    names = ("nsfw_check", "nsfw", "watermark", "watermark_method")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    return json.dumps(given) if given else ""


def read_watermark(args: argparse.Namespace) -> Finishing:
    """Read the options of the watermark. Raises ValueError for options that are wrong or do not fit together."""
    finishing = Finishing()
    if args.watermark_method is not None and args.watermark is None:
        raise ValueError("--watermark-method is for a watermark: add --watermark TEXT")
    if args.watermark is not None:
        from ldm.safety.watermark import message_bits

        message_bits(args.watermark)
        finishing.watermark, finishing.method = args.watermark, args.watermark_method or finishing.method
    return finishing


def read_finishing(args: argparse.Namespace) -> Finishing:
    """Read all options, and load the checker. Raises ValueError as `read_watermark` does."""
    finishing = read_watermark(args)
    if args.nsfw is not None and args.nsfw_check is None:
        raise ValueError("--nsfw is for a checker: add --nsfw-check with its folder")
    if args.nsfw_check is not None:
        if getattr(args, "grid", False) or getattr(args, "preview", None) is not None:
            raise ValueError("--nsfw-check judges single finished pictures: leave out --grid and --preview")
        from ldm.safety.nsfw import load_checker

        finishing.checker, finishing.action = load_checker(args.nsfw_check), args.nsfw or finishing.action
    return finishing
