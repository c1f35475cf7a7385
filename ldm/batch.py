"""Many pictures from a list of requests: a folder of pictures, and a manifest that says which are done.

Requests that differ only in their prompts, and whose seeds follow each other, run through the UNet together. Each
picture equals the one that its request gives alone. A list that was stopped goes on where it stopped. The processes
that torchrun starts share a list.
"""

import csv
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from ldm import jobs, rescue
from ldm.outputs import Outputs
from ldm.pipeline import Pipeline
from ldm.placement.budget import Way
from ldm.placement.memory import Placement
from ldm.record import PARTS, ModelChoice
from ldm.request import Request
from ldm.strict import from_dict
from ldm.variants import expand, varied

Attributes = Mapping[str, Sequence[str]]  # values to append to prompts, by name
ENDINGS = (".jsonl", ".csv", ".txt")
_NAME = re.compile(r"[\w][\w .-]{0,150}")


@dataclass(frozen=True)
class Entry:
    """One picture of a list. request: None if the line is wrong; `error` then says why."""

    line: int
    name: str  # of the file, without .png
    request: Request | None = None
    error: str = ""
    choices: Mapping[str, str] = field(default_factory=dict)  # of groups such as {a|b}, see `ldm.variants`
    finishing: str = ""  # what happens to the finished picture, as one text

    def key(self, choice: ModelChoice) -> str:
        """Return the sha256 of everything that decides the picture, but for the contents of files."""
        values = {"request": dataclasses.asdict(self.request) if self.request else None, "error": self.error}
        values |= {"finishing": self.finishing} if self.finishing else {}
        text = json.dumps(values | {"model": dataclasses.asdict(choice)}, default=str, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


# The list ---------------------------------------------------------------------------------------------------


def read_entries(path: Path, defaults: Mapping[str, Any], attributes: Attributes | None = None) -> list[Entry]:
    """Read a list: the lines of a .jsonl, .csv or .txt file in UTF-8.

    A line of .jsonl is a table of the fields of `Request`, or a prompt as a JSON string. The first line of .csv names
    the fields. A line of .txt is a prompt. Empty lines are left out. The field `name` names the picture's file; without
    it the number of the line does. A line with several pictures, see `entries_of`, names them NAME-1 and so on.
    defaults: fields of `Request` for lines that do not give them. Without a seed of its own, picture i of the list,
    counted from 0, has the default seed + i. attributes: as in `entries_of`, for all lines.
    Raises ValueError for a file that cannot be read. A wrong line becomes an entry with an error.
    """
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"the list must end in {', '.join(ENDINGS)}, got {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the list {path} cannot be read as UTF-8 text: {error}") from error
    entries: list[Entry] = []
    names: dict[str, int] = {}
    for line, row in _rows(path.suffix.lower(), text):
        try:
            entries += _entries(line, row, defaults, len(entries), attributes)
        except ValueError as error:
            entries.append(Entry(line, f"{line:05d}", error=str(error)))
    for i, entry in enumerate(entries):
        if entry.name.lower() in names:
            taken = f"line {entry.line}: the name {entry.name!r} is taken by line {names[entry.name.lower()]}"
            entries[i] = Entry(entry.line, f"line-{entry.line}", error=taken)
        names.setdefault(entry.name.lower(), entry.line)
    if not entries:
        raise ValueError(f"the list {path} has no lines with prompts")
    return entries


def _rows(ending: str, text: str) -> Iterator[tuple[int, Any]]:
    """Yield the number and the content of each line: a prompt, or a table that may hold text in place of numbers."""
    if ending == ".csv":
        reader = csv.DictReader(text.splitlines())
        for row in reader:
            yield reader.line_num, {str(name): word for name, word in row.items() if word not in (None, "")}
        return
    for line, words in enumerate(text.split("\n"), 1):
        if words.strip():
            yield line, words.strip() if ending == ".txt" else _Json(words)


class _Json(str):
    """A line of JSON that is not read yet."""


def _entries(
    line: int, row: Any, defaults: Mapping[str, Any], index: int, attributes: Attributes | None
) -> list[Entry]:
    """Make the entries of one line. Raises ValueError for a wrong line."""
    where = f"line {line}"
    if isinstance(row, _Json):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
    table = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(table, dict):
        raise ValueError(f'{where} must be a prompt or a table such as {{"prompt": "a cat"}}, got {row!r}')
    table = dict(table)
    name = str(table.pop("name", f"{line:05d}"))
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where}: name must be the name of a file without folders and ending, got {name!r}")
    given = {"seed": defaults.get("seed", 0) + index} | {n: v for n, v in defaults.items() if n != "seed"}
    asked = given | _typed(table, where)
    request = from_dict(asked, Request, where, names=PARTS)
    if asked["seed"] != request.seed:
        raise ValueError(f"{where}: the seeds of a list must be 0 or more, so that it can be repeated")
    try:
        return entries_of(line, name, request, attributes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def entries_of(line: int, name: str, request: Request, attributes: Attributes | None = None) -> list[Entry]:
    """Return an entry for each picture of `request`.

    A prompt with groups such as {a|b}, and each value of `attributes`, gives as many pictures, see `ldm.variants`.
    Raises ValueError for wrong groups and attributes.
    """
    variants = [variant for prompt in request.prompts for variant in expand(prompt, attributes)]
    if len(variants) > len(request.prompts):
        request = varied(request, variants)
    if request.images == 1:
        return [Entry(line, name, request, choices=variants[0].choices)]
    alone = [
        dataclasses.replace(
            request,
            prompt=request.prompts[i % len(request.prompts)],
            seed=request.seeds[i],
            images=1,
            variation=request.variation and request.variation.of(i),
        )
        for i in range(request.images)
    ]
    choices = [variants[i % len(variants)].choices for i in range(request.images)]
    return [Entry(line, f"{name}-{i + 1}", alone[i], choices=choices[i]) for i in range(request.images)]


def _typed(table: dict[str, Any], where: str) -> dict[str, Any]:
    """Read the numbers of a CSV file: text in a field that takes a number."""
    numbers = {f.name: f.type for f in dataclasses.fields(Request) if f.type in (int, int | None, float, float | None)}
    typed = {}
    for name, value in table.items():
        if name in numbers and isinstance(value, str):
            try:
                value = int(value) if numbers[name] in (int, int | None) else float(value)
            except ValueError:
                raise ValueError(f"{where}: {name} must be a number, got {value!r}") from None
        typed[name] = value
    return typed


def groups(entries: Sequence[Entry], size: int) -> list[list[Entry]]:
    """Put neighbors together that can run through the UNet together, at most `size` in a group."""
    found: list[list[Entry]] = []
    for entry in entries:
        if found and len(found[-1]) < size and _fits(found[-1], entry):
            found[-1].append(entry)
        else:
            found.append([entry])
    return found


def _fits(group: Sequence[Entry], entry: Entry) -> bool:
    first, new = group[0].request, entry.request
    if first is None or new is None or new.emphasis or new.variation or new.seed != first.seed + len(group):
        return False
    return dataclasses.replace(new, prompt=first.prompt, seed=first.seed) == first


# The work ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """The part of a list that this process does: every `world`-th group, from number `rank`. torchrun sets both."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_this_process(cls) -> "Shard":
        """Read what torchrun says."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


class Manifest:
    """The file OUT/manifest.jsonl: one line of JSON for each picture that is done or failed. The last line counts.

    Each process of a `Shard` appends to its own file, manifest-0.jsonl and so on, and reads all of them.
    """

    def __init__(self, folder: Path, shard: Shard = Shard()) -> None:
        """Make the folder. Raises ValueError if it holds files of something else than a list."""
        self.folder = folder
        self.path = folder / ("manifest.jsonl" if shard.world == 1 else f"manifest-{shard.rank}.jsonl")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: name a folder for the pictures")
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, Any]] = {}
        found = sorted(folder.glob("manifest*.jsonl"))
        if not found and any(folder.iterdir()):
            raise ValueError(f"{folder} has files and no manifest of a list: name a new or empty folder")
        for path in found:
            for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if text.endswith("\n"):  # a killed process may leave half a line
                    row = json.loads(text)
                    self.rows[row["name"]] = row
        if self.path.is_file() and not self.path.read_bytes().endswith(b"\n"):
            self.path.write_bytes(self.path.read_bytes().rpartition(b"\n")[0] + b"\n")

    def done(self, entry: Entry, key: str) -> bool:
        """Return whether the picture is there. Raises ValueError if another request made it."""
        row = self.rows.get(entry.name)
        if row is None or row["status"] != "done" or not (self.folder / row["file"]).is_file():
            return False
        if row["key"] != key:
            raise ValueError(
                f"line {entry.line} or the options changed after {self.folder / row['file']} was made: undo the "
                "change, remove the picture, or name another folder"
            )
        return True

    def add(self, row: dict[str, Any]) -> None:
        """Append the line of a picture, at once to the disk."""
        self.rows[row["name"]] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class _Named(Outputs):
    """The files of one group."""

    files: tuple[Path, ...] = ()

    @property
    def wanted(self) -> list[Path]:
        """The paths of the files."""
        return list(self.files)


Row = dict[str, Any]  # a line of the manifest
Maker = Callable[[list[Entry]], list[Row]]


def run(
    entries: Sequence[Entry],
    choice: ModelChoice,
    manifest: Manifest,
    make: Callable[[list[list[Entry]]], Iterator[Row]],
    *,
    size: int = 4,
    shard: Shard = Shard(),
) -> Iterator[Row]:
    """Make the pictures that are not done. Yield the manifest's line of each, also of those that were done before.

    make: makes the pictures of groups and yields their lines, such as `in_turn(maker)`, or `ldm.batch_ray.spread`.
    size: the most pictures of a group, which run through the UNet together.
    Raises ValueError if a picture that is done has another request now, and OSError if a file cannot be written.
    """
    pending = []
    for entry in entries:
        if not manifest.done(entry, entry.key(choice)):
            pending.append(entry)
        elif shard.rank == 0:
            yield manifest.rows[entry.name]
    for row in make(groups(pending, size)[shard.rank :: shard.world]):
        manifest.add(row)
        yield row


def in_turn(maker: Maker) -> Callable[[list[list[Entry]]], Iterator[Row]]:
    """Return a function that makes one group after the other in this process."""
    return lambda pending: (row for group in pending for row in maker(group))


class Finisher(Protocol):
    """What happens to each finished picture, such as a watermark."""

    def check(self, pipe: Pipeline, request: Request) -> None:
        """Raise ValueError if the pictures of `request` cannot be finished."""

    def write(self, picture: Any, path: Path, texts: Mapping[str, str], *, overwrite: bool) -> None:
        """Write the picture, as `ldm.pictures.save_png` does, or refuse it."""

    def row(self, file: Path) -> Row:
        """Return the status of a picture, its file, and more for the manifest."""


@dataclass(frozen=True)
class PictureMaker:
    """Makes the pictures of a group with loaded models, in `folder`.

    finishing: None: they are only written. way: how to begin, from `ldm.rescue.prepare`; None: all at once.
    """

    choice: ModelChoice
    placement: Placement
    models: jobs.Models
    folder: Path
    finishing: Finisher | None = None
    way: Way | None = None

    def __call__(self, group: list[Entry]) -> list[Row]:
        """Return the manifest's lines. If the group fails, each picture is made alone. One that fails has an error."""
        files = tuple(self.folder / f"{entry.name}.png" for entry in group)
        began = perf_counter()
        try:
            request = _together(group)
            outputs = _Named(files[0], len(files), overwrite=True, files=files)
            if self.finishing is not None:
                self.finishing.check(self.models.base, request)
                outputs = dataclasses.replace(outputs, write=self.finishing.write)
            rescue.run(jobs.Job(request, self.choice, self.placement), self.models, outputs, way=self.way)
        except (ValueError, ArithmeticError, MemoryError, RuntimeError) as error:
            if len(group) > 1:
                return [row for entry in group for row in self([entry])]
            return [self._row(group[0], status="failed", error=str(error))]
        seconds = round((perf_counter() - began) / len(group), 3)
        tell = self.finishing.row if self.finishing else lambda file: {"status": "done", "file": file.name}
        return [self._row(e, **tell(f), seconds=seconds) for e, f in zip(group, files, strict=True)]

    def _row(self, entry: Entry, **more: Any) -> Row:
        row = {"line": entry.line, "name": entry.name, "key": entry.key(self.choice)}
        return row | ({"choices": dict(entry.choices)} if entry.choices else {}) | more


def _together(group: Sequence[Entry]) -> Request:
    """Return one request for all pictures of a group. Raises ValueError for a wrong line."""
    requests = [entry.request for entry in group if entry.request]
    if not requests:
        raise ValueError(group[0].error)
    if len(requests) == 1:
        return requests[0]
    prompts = tuple(str(request.prompt) for request in requests)
    return dataclasses.replace(requests[0], prompt=prompts, images=len(requests))
