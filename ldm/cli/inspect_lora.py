"""The report of `ldm lora inspect` on a LoRA file."""

import dataclasses
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.checkpoint.known import kind_of
from ldm.checkpoint.loras import file_of, is_factor, read_lora
from ldm.checkpoint.tensors import TensorFiles, some
from ldm.cli.inspect import short
from ldm.lora_tools import Base
from ldm.models.lora import kind, norm, rank


@dataclass(frozen=True)
class Module:
    """The change of one layer. part, layer: as in `Target`. alpha: scale times rank. norm: the Frobenius norm."""

    part: str
    layer: str
    kind: str
    rank: int | None
    alpha: float | None
    norm: float


@dataclass(frozen=True)
class LoraReport:
    """The report on a LoRA.

    kind: what the file is. problem: why it cannot be used, or "" if it can. base: the model that it is for. unknown:
    names of layers that the base lacks, or of tensors that no supported kind has. words: learned words.
    """

    path: str
    kind: str
    dtypes: dict[str, int]  # how many tensors have each dtype
    problem: str = ""
    base: str | None = None
    modules: tuple[Module, ...] = ()
    unknown: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-ready values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Return the report as lines of text."""
        rows = {"for": self.base or "", "dtypes": ", ".join(f"{n} {dtype}" for dtype, n in self.dtypes.items())}
        rows["kinds"] = _counted(m.kind for m in self.modules)
        rows["modules"] = _counted(m.part for m in self.modules)
        rows["ranks"] = _counted(sorted(m.rank for m in self.modules if m.rank is not None))
        rows["alphas"] = _counted(
            f"{alpha:g}" for alpha in sorted(m.alpha for m in self.modules if m.alpha is not None)
        )
        if self.modules:
            largest = max(self.modules, key=lambda module: module.norm)
            median = statistics.median(module.norm for module in self.modules)
            rows["norms"] = f"median {median:.3g}, largest {largest.norm:.3g} ({largest.part} {largest.layer})"
        rows |= {name: f"{some(v)} ({len(v)})" for name, v in (("unknown", self.unknown), ("words", self.words)) if v}
        lines = [f"{self.path}: {self.kind}", *(f"  {name:12} {text}" for name, text in rows.items() if text)]
        lines += [f"  metadata     {key}: {value}" for key, value in self.metadata.items()]
        return "\n".join([*lines, f"  usable       {f'no: {self.problem}' if self.problem else 'yes'}"])


def _counted(values: Any) -> str:
    return ", ".join(f"{value} ({n})" for value, n in Counter(values).items())


def inspect_lora(path: str | Path, model: str | Path | None = None) -> LoraReport:
    """Report on the LoRA at `path`. model: the model that it is for, if that is no official one.

    Raises ValueError for a file that is damaged or no safetensors file.
    """
    tensors = TensorFiles([file_of(Path(path))])
    report = LoraReport(
        str(path),
        kind_of(tensors) or "no LoRA",
        dict(Counter(tensors.dtypes.values())),
        metadata={short(key): short(value) for key, value in tensors.metadata.items()},
    )
    try:
        base = Base.find(path, model)
        file = read_lora(path, base.networks, base.config)
    except ValueError as error:
        strange = tuple(name for name in tensors.shapes if not is_factor(name))
        return dataclasses.replace(report, problem=str(error), unknown=strange)
    found = []
    for target, change in file.changes.items():
        own = rank(change.factors)
        alpha = None if own is None else change.scale * own
        found.append(Module(*target, kind(change.factors), own, alpha, norm(change)))
    return dataclasses.replace(
        report, base=base.name, modules=tuple(found), unknown=file.unknown, words=tuple(file.words)
    )
