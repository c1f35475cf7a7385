"""The lines of an audit log, each chained by sha256 to the line before, and the check of a whole log.

A line is a JSON object in ASCII. Its last key, "hash", is the sha256 of the same object without that key. "previous" is
the hash of the line before, and "number" counts from 1. Every newline of the file ends a complete line. So bytes after
the last newline are a line that a process did not finish. The next line names these bytes in "torn".

The chain has no secret: whoever can write the file can write another chain. Only a hash that is kept elsewhere (the
head) shows this, as it shows a tail that was cut.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

START = "0" * 64  # in place of the hash of the line before the first
_LINE = re.compile(rb'(\{"number":[0-9]{1,15},"previous":"[0-9a-f]{64}",.*),"hash":"([0-9a-f]{64})"\}')
_BEGIN = re.compile(rb'\{"number":')


class Line(NamedTuple):
    """A line of the log. fields: all its keys but the number and the two hashes."""

    number: int
    previous: str
    hash: str
    fields: Mapping[str, Any]


class Torn(NamedTuple):
    """An unfinished line: its number of bytes and their sha256."""

    bytes: int
    sha256: str


class Segment(NamedTuple):
    """A file of older lines: the numbers of its first and last line, its last hash, and the sha256 of the file."""

    name: str
    first: int
    last: int
    head: str
    sha256: str


@dataclass(frozen=True)
class Verdict:
    """The result of `verify`.

    first, last: the numbers of the lines that are there. head: the hash of the last line, to be kept elsewhere.
    after: how many lines follow the kept head. torn: the bytes of an unfinished line at the end.
    removed: the files that `AuditLog.prune` removed. problems: sentences; empty if the log is whole.
    """

    first: int
    last: int
    head: str
    after: int | None
    torn: int
    removed: tuple[Segment, ...]
    problems: tuple[str, ...]


def make_line(number: int, previous: str, fields: Mapping[str, Any]) -> tuple[bytes, str]:
    """Return a line with its newline, and its hash. fields: JSON-ready values; others are written as text."""
    body = json.dumps({"number": number, "previous": previous, **fields}, separators=(",", ":"), default=str).encode()
    digest = hashlib.sha256(body).hexdigest()
    return body[:-1] + b',"hash":"' + digest.encode() + b'"}\n', digest


def read_line(raw: bytes) -> Line | None:
    """Read a line without its newline. Return None for bytes that are not a line with the right hash.

    The unfinished line that may stand before the line must be the one that its "torn" describes.
    """
    for begin in _BEGIN.finditer(raw):
        match = _LINE.fullmatch(raw, begin.start())
        if match is None or hashlib.sha256(match[1] + b"}").hexdigest() != match[2].decode():
            continue  # the begin of the unfinished line
        try:
            table = json.loads(match[0])
        except (ValueError, RecursionError):
            return None
        number, previous, digest = table.pop("number"), table.pop("previous"), table.pop("hash")
        before = raw[: begin.start()]
        if type(number) is not int:  # a second key of this name
            return None
        if table.get("torn") == (describe_torn(before)._asdict() if before else None):
            return Line(number, previous, digest, table)
    return None


def describe_torn(raw: bytes) -> Torn:
    """Describe the bytes of an unfinished line."""
    return Torn(len(raw), hashlib.sha256(raw).hexdigest())


def segments(path: Path) -> list[Path]:
    """Return the files of older lines beside the log at `path`, oldest first.

    The number at the end of a name, as in audit.jsonl.000000812, is that of the last line in the file.
    """
    pattern = re.compile(re.escape(path.name) + r"\.\d{9}")
    return sorted(file for file in path.parent.iterdir() if pattern.fullmatch(file.name))


def describe_segment(path: Path) -> Segment:
    """Describe a file of older lines. Raises ValueError if its first or last line is not a line of a log."""
    with path.open("rb") as file:
        first = last = read_line(file.readline().rstrip(b"\n"))
        for raw in file:
            last = read_line(raw.rstrip(b"\n"))
        if first is None or last is None:
            raise ValueError(f"{path} does not begin and end with a line of an audit log: run ldm audit verify")
        file.seek(0)
        return Segment(path.name, first.number, last.number, last.hash, hashlib.file_digest(file, "sha256").hexdigest())


def verify(path: str | Path, head: str | None = None) -> Verdict:
    """Check the log at `path` with its files of older lines.

    Any changed, removed, added or reordered line is found, unless the rest of the chain was written anew. head: a hash
    that was kept elsewhere; then that is found, too, and so is a cut tail.
    Raises FileNotFoundError if there is no log.
    """
    path = Path(path)
    while True:
        older = segments(path)
        files = [*older, *([path] if path.exists() or not older else [])]
        check = _Check(head)
        try:
            for file in files:
                check.read(file, is_last=file is files[-1])
        except FileNotFoundError:
            if older == segments(path):
                raise
        if older == segments(path):  # else another process renamed or removed a file in the meantime
            return check.verdict()


class _Check:
    """The state of `verify` on its way through the files."""

    def __init__(self, head: str | None):
        self.kept = head
        self.found: int | None = None
        self.first: Line | None = None
        self.last: Line | None = None
        self.hidden = 0  # lines since `last` that were changed
        self.lost = 0  # lines before `first` that were changed
        self.torn = 0
        self.removed: tuple[Segment, ...] = ()
        self.problems: list[str] = []

    def read(self, path: Path, is_last: bool) -> None:
        with path.open("rb") as file:
            for place, (raw, whole) in enumerate(_lines(file), 1):
                line = read_line(raw)
                if line is not None:
                    self._follow(line, f"{path.name}, line {place}")
                elif is_last and not whole:
                    self.torn = len(raw)
                else:
                    self.hidden += 1
                    self.problems.append(f"{path.name}, line {place} was changed: its hash does not fit")

    def _follow(self, line: Line, where: str) -> None:
        """Compare `line` with the line before."""
        if self.last is None:
            self.first, self.lost = line, self.hidden
        elif line.number != self.last.number + self.hidden + 1:
            expected = self.last.number + self.hidden + 1
            self.problems.append(
                f"{where} has number {line.number}, not {expected}: lines were removed, added or reordered"
            )
        elif not self.hidden and line.previous != self.last.hash:
            self.problems.append(f"{where} does not continue the line before: one of them was changed")
        self.last, self.hidden = line, 0
        if line.hash == self.kept:
            self.found = line.number
        if line.fields.get("event") == "removed":
            try:
                self.removed = tuple(Segment(**entry) for entry in line.fields["segments"])
            except (KeyError, TypeError):
                self.problems.append(f"{where} does not describe the files that were removed")

    def verdict(self) -> Verdict:
        first, last = self.first, self.last
        if first is not None:
            self._check_beginning(first)
        if self.kept is not None and self.found is None:
            self.found = next((old.last for old in self.removed if old.head == self.kept), None)
        if self.kept is not None and self.found is None:
            self.problems.append(
                f"no line has the kept hash {self.kept}: the end of the log was cut, or the log was written anew"
            )
        return Verdict(
            first=first.number if first else 0,
            last=last.number if last else 0,
            head=last.hash if last else START,
            after=None if self.found is None or last is None else last.number - self.found,
            torn=self.torn,
            removed=self.removed,
            problems=tuple(self.problems),
        )

    def _check_beginning(self, first: Line) -> None:
        """Check that the lines before the first are none, or stood in files whose removal the log records."""
        number = first.number - 1 - self.lost
        by_last = {old.last: old for old in self.removed}
        before = by_last[number].head if number in by_last else START
        if not self.lost and number in (0, *by_last) and first.previous != before:
            self.problems.append("the first line does not continue the lines before it")
        while number > 0:
            if number not in by_last:
                self.problems.append(f"the lines up to {number} are missing, and no line says that they were removed")
                return
            number = min(number, by_last[number].first) - 1


def _lines(file: Any) -> Iterator[tuple[bytes, bool]]:
    """Yield the lines without their newline, and whether they had one."""
    for raw in file:
        yield raw.removesuffix(b"\n"), raw.endswith(b"\n")
