"""The report of `ldm inspect` on a file or folder, from its headers and configs."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.checkpoint.controlnets import identify_controlnet
from ldm.checkpoint.identify import IGNORED, count_ema
from ldm.checkpoint.keymap import inverse
from ldm.checkpoint.known import kind_of, known_files
from ldm.checkpoint.parts import compare, modules
from ldm.checkpoint.sources import build, check_complete, open_source
from ldm.checkpoint.tensors import TensorFiles, Tensors
from ldm.diffusion.denoiser import Prediction
from ldm.record import digest

SHOWN = 10  # the most names of a list in the text; `as_dict` has all
_LONGEST = 200  # the most characters of a metadata value; some values hold a picture


@dataclass(frozen=True)
class Component:
    """One network of a model: how many tensors and parameters it has, and how many tensors of each dtype."""

    name: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    prefix: str = ""


@dataclass(frozen=True)
class Report:
    """The report on a file or folder.

    problem: why it cannot be loaded, or "" if it can. prediction: what the UNet predicts, None without a UNet.
    why: how the prediction was found. missing, misshapen: names of tensors that do not fit the model.
    unknown: names of tensors that no network uses. left_out: names in `IGNORED`, such as noise schedules.
    ema: the number of tensors of the UNet's moving average.
    """

    path: str
    kind: str = "tensors"
    problem: str = ""
    layout: str | None = None
    preset: str | None = None
    prediction: str | None = None
    why: str | None = None
    notes: tuple[str, ...] = ()
    components: tuple[Component, ...] = ()
    ema: int = 0
    missing: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    sha256: str | None = None
    known_as: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-ready values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Return the report as lines of text."""
        lines = [f"{self.path}: {self.kind}"]
        if self.preset:
            lines.append(f"  preset       {self.preset}, {self.layout} layout")
        if self.prediction:
            lines.append(f"  predicts     {self.prediction}: {self.why}")
        for c in self.components:
            held = ", ".join(f"{n} {dtype}" for dtype, n in c.dtypes.items())
            where = f", behind {c.prefix}" if c.prefix else ""
            lines.append(f"  {c.name:12} {c.parameters:,} parameters in {held}{where}")
        if self.ema:
            lines.append(f"  ema          {self.ema} tensors, an averaged copy of the UNet")
        lines += [f"  note         {note}" for note in self.notes]
        for title, names in (
            ("missing", self.missing),
            ("misshapen", self.misshapen),
            ("unused", _grouped(self.unknown)),
            ("left out", _grouped(self.left_out)),
        ):
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                lines.append(f"  {title:12} {', '.join(names[:SHOWN])}{more}")
        lines += [f"  metadata     {key}: {value}" for key, value in self.metadata.items()]
        if self.sha256:
            known = f", known as {self.known_as}" if self.known_as else ", not among the known files"
            lines.append(f"  sha256       {self.sha256}{known}")
        lines.append(f"  loads        {f'no: {self.problem}' if self.problem else 'yes'}")
        return "\n".join(lines)


def inspect(path: str | Path, *, prediction: Prediction | None = None, check_sha256: bool = False) -> Report:
    """Report on `path` from headers and configs only. With `check_sha256` the whole file is read.

    prediction: what the UNet predicts, whatever the file says.
    Raises ValueError if `path` is neither a safetensors file nor a model folder. The message says what `path` is.
    """
    path = Path(path)
    sha256 = digest(path) if check_sha256 and path.exists() else None
    known = known_files().get(sha256) if sha256 else None
    report = Report(str(path), sha256=sha256, known_as=known.name if known else None)
    tensors = None if path.is_dir() else TensorFiles([path])
    if tensors is not None:
        report = dataclasses.replace(
            report, metadata={short(k): short(v) for k, v in tensors.metadata.items()}, ema=count_ema(tensors)
        )
    try:
        source = open_source(path, prediction=prediction, sha256=sha256)
    except ValueError as error:
        if (controlnet := _controlnet(report, path)) is not None:
            return controlnet
        if tensors is None:
            raise
        whole = _component("tensors", tensors, tensors.shapes, "")
        kind = kind_of(tensors) or report.kind
        return dataclasses.replace(report, kind=kind, components=(whole,), problem=str(error))
    problem, kind = "", "a model"
    try:
        check_complete(source, path)
    except ValueError as error:
        problem, kind = str(error), f"a part of a model: {', '.join(source.parts)}"
    networks = modules(*build(source, path))
    mismatches, left = compare(networks, source.parts, source.dropped)
    if mismatches and not problem:
        problem = "names or shapes of its tensors do not match its configuration"
    components = []
    for name, part in source.parts.items():
        stored = inverse(part.stored(list(networks[name].state_dict())))
        held = [n for n in stored if n in part.tensors.shapes]
        components.append(_component(name, part.tensors, held, part.prefix))
    config, has_unet = source.config, "unet" in source.parts
    return dataclasses.replace(
        report,
        kind=kind,
        problem=problem,
        layout=source.layout,
        preset=config.name if has_unet else None,
        prediction=config.diffusion.prediction if has_unet else None,
        why=source.why,
        notes=source.notes,
        components=tuple(components),
        missing=tuple(name for differs in mismatches.values() for name in differs["missing"]),
        misshapen=tuple(name for differs in mismatches.values() for name in differs["misshapen"]),
        unknown=tuple(name for name in left if not IGNORED.fullmatch(name)),
        left_out=tuple(name for name in left if IGNORED.fullmatch(name)),
    )


def _controlnet(report: Report, path: Path) -> Report | None:
    """Report on a ControlNet; None for anything else."""
    try:
        network, part, kind, why = identify_controlnet(path)
    except ValueError:
        return None
    stored = inverse(part.stored(list(network.state_dict())))
    component = _component("controlnet", part.tensors, stored, part.prefix)
    note = f"use it with --controlnet; {why}"
    layout = "diffusers" if path.is_dir() else "ldm"
    return dataclasses.replace(report, kind=kind, layout=layout, why=why, notes=(note,), components=(component,))


def _component(name: str, tensors: Tensors, names: Iterable[str], prefix: str) -> Component:
    """Describe the network whose tensors have these `names`."""
    shapes = {n: tensors.shapes[n] for n in names}
    numbers = sum(math.prod(shape) for shape in shapes.values())
    return Component(name, len(shapes), numbers, dict(Counter(tensors.dtypes[n] for n in shapes)), prefix)


def _grouped(names: Sequence[str]) -> list[str]:
    """Return `names`. Names with the same first word become one entry with their number: "model_ema.* (688)"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    return [f"{w}.* ({len(g)})" if len(g) > 1 else g[0] for w, g in groups.items()]


def short(text: str) -> str:
    """Return the beginning of `text`, without line breaks and control characters."""
    shown = "".join(c if c.isprintable() else " " for c in text[:_LONGEST])
    return shown if len(text) <= _LONGEST else f"{shown}... ({len(text):,} characters)"
