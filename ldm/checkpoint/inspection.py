"""What `ldm inspect` reports: everything that can be told of a file or folder from its headers."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.checkpoint import sources
from ldm.checkpoint.contents import count_ema
from ldm.checkpoint.keymap import inverse
from ldm.checkpoint.kinds import kind_of
from ldm.checkpoint.known import KNOWN, digest
from ldm.checkpoint.parts import Mismatch, Source, compare, modules
from ldm.checkpoint.strict_json import printable
from ldm.checkpoint.tensors import TensorFiles
from ldm.config import Prediction

SHOWN = 10  # names of a list that the text shows; `as_dict` has all
_LONGEST = 200  # characters of a metadata value that are shown; some hold a picture


@dataclass(frozen=True)
class Component:
    """One network of a model: how many tensors and numbers, and how many tensors of each dtype."""

    name: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    prefix: str


@dataclass(frozen=True)
class Report:
    """What is at a path. problem: why it cannot be loaded as it is, None if it can.

    prediction, why: what its UNet predicts, and what says so; None where there is none.
    missing, unknown, misshapen: names of tensors that do not fit the model. left_out: names that are known to be of no
    use, such as schedules. ema: tensors of an averaged copy of the UNet.
    """

    path: str
    kind: str
    problem: str | None = None
    layout: str | None = None
    preset: str | None = None
    prediction: str | None = None
    why: str | None = None
    components: tuple[Component, ...] = ()
    ema: int = 0
    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    sha256: str | None = None
    known_as: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-ready values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Return it as lines of text."""
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
        for title, names in (
            ("missing", self.missing),
            ("unknown", self.unknown),
            ("misshapen", self.misshapen),
            ("left out", _grouped(self.left_out)),
        ):
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                lines.append(f"  {title:12} {', '.join(names[:SHOWN])}{more}")
        lines += [f"  metadata     {key}: {value}" for key, value in self.metadata.items()]
        if self.sha256:
            known = (
                f", known as {self.known_as}" if self.known_as else ", not among the known files"
            )
            lines.append(f"  sha256       {self.sha256}{known}")
        lines.append(f"  loads        {f'no: {self.problem}' if self.problem else 'yes'}")
        return "\n".join(lines)


def inspect(
    path: str | Path, *, prediction: Prediction | None = None, check_sha256: bool = False
) -> Report:
    """Report what is at `path`, reading headers and configs only, and all of a file if `check_sha256`.

    prediction: what the user says that its UNet predicts.
    Raises ValueError for what is no file of tensors and no model folder, saying what it is instead.
    """
    path = Path(path)
    report, sha256 = Report(str(path), ""), None
    if check_sha256 and path.exists():
        sha256 = digest(path)
        known = KNOWN.get(sha256)
        report = dataclasses.replace(report, sha256=sha256, known_as=known.name if known else None)
    if not path.is_dir():
        tensors = TensorFiles([path])
        metadata = {_short(k): _short(v) for k, v in tensors.metadata.items()}
        report = dataclasses.replace(report, metadata=metadata, ema=count_ema(tensors))
        if kind := kind_of(tensors):
            dtypes = dict(Counter(tensors.dtypes.values()))
            whole = Component("tensors", len(tensors.shapes), _count(tensors.shapes), dtypes, "")
            return dataclasses.replace(
                report, kind=kind, components=(whole,), problem=f"it is {kind}, not a model"
            )
    try:
        source = sources.open_source(path, prediction=prediction, sha256=sha256)
    except ValueError as error:
        if path.is_dir():
            raise
        return dataclasses.replace(report, kind="tensors", problem=str(error))
    return _of_source(report, source)


def _of_source(report: Report, source: Source) -> Report:
    """The report of a model, or of parts of one."""
    path, config = report.path, source.config
    problem, kind = None, "a model"
    try:
        sources.check_complete(source, path)
    except ValueError as error:
        problem = str(error)
        kind = f"a part of a model: {', '.join(source.parts)}"
    networks = modules(*sources.build(source, path))
    mismatches = compare(networks, source.parts)
    if mismatches and problem is None:
        problem = "names or shapes of its tensors do not match its configuration"
    components = []
    for name, part in source.parts.items():
        stored = inverse(part.stored(list(networks[name].state_dict())))
        shapes = {n: part.tensors.shapes[n] for n in stored if n in part.tensors.shapes}
        dtypes = dict(Counter(part.tensors.dtypes[n] for n in shapes))
        components.append(Component(name, len(shapes), _count(shapes), dtypes, part.prefix))
    has_unet = "unet" in source.parts
    return dataclasses.replace(
        report,
        kind=kind,
        problem=problem,
        layout=source.layout,
        preset=config.name if has_unet else None,
        prediction=config.diffusion.prediction if has_unet else None,
        why=source.why,
        components=tuple(components),
        missing=_names(mismatches, "missing"),
        unknown=_names(mismatches, "unknown"),
        misshapen=_names(mismatches, "misshapen"),
        left_out=sources.left_out(source),
    )


def _grouped(names: Sequence[str]) -> list[str]:
    """`names`, where several begin with the same word and a dot counted, as in "model_ema.* (688)"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    return [f"{w}.* ({len(g)})" if len(g) > 1 else g[0] for w, g in groups.items()]


def _names(mismatches: list[Mismatch], which: str) -> tuple[str, ...]:
    return tuple(name for m in mismatches for name in getattr(m, which))


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _short(text: str) -> str:
    shown = printable(text, _LONGEST)
    return shown if len(text) <= _LONGEST else f"{shown} ({len(text):,} characters)"
