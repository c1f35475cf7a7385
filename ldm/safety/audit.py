"""The audit log: who asked for which pictures, what was made, and what a guard decided. See `ldm.safety.chain`.

Several processes and threads may append to one log, because the file is locked for each line (`fcntl.flock`). Each line
is on the disk before `append` returns. A process that is killed loses at most the line that it writes.
"""

import getpass
import hashlib
import os
import platform
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ldm.config import check_number
from ldm.safety.chain import START, Line, describe_segment, describe_torn, make_line, read_line, segments, verify

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEXTS = ("prompt", "negative_prompt", "other_prompt", "text", "error")  # the keys whose texts `hide` hides
OWN = {"number", "previous", "torn", "time", "who", "event", "hash"}  # the keys of each line
BLOCK = 1 << 16  # bytes


def user() -> str:
    """Return the name of the user and of the machine: name@machine."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user has a number, and may have no name
        name = str(os.getuid())
    return f"{name}@{platform.node()}"


@dataclass(frozen=True)
class AuditLog:
    """An append-only log of JSON lines at `path`. The file is created with the first line, readable by its owner only.

    who: is written into each line. hidden: prompts are stored as salted sha256, see `hide`.
    rotate_at: bytes; a file of this size is set aside as `rotate` does.

    Raises ValueError for rotate_at below 1, and on a system without `fcntl`, such as Windows.
    """

    path: Path
    who: str = field(default_factory=user)
    hidden: bool = False
    rotate_at: int | None = None

    def __post_init__(self) -> None:
        """Check the values and the system."""
        if self.rotate_at is not None:
            check_number("rotate_at", self.rotate_at, 1, whole=True)
        if fcntl is None:
            raise ValueError(
                f"the audit log needs fcntl.flock, so that processes do not mix their lines, and {platform.system()} "
                "has none: write the log on Linux or macOS"
            )

    def append(self, event: str, values: Mapping[str, Any]) -> str:
        """Append a line with the time, the user, `event` and `values`, and return its hash.

        values: JSON-ready; others, such as paths, are written as text.
        Raises ValueError for a key that each line has, and if the last line was changed. Raises OSError if the line
        cannot be written.
        """
        if taken := OWN & values.keys():
            raise ValueError(f"each line has {', '.join(sorted(OWN))}, so that values must not have {sorted(taken)}")
        with self._locked() as file:
            if self.rotate_at is not None and os.fstat(file).st_size >= self.rotate_at:
                self._set_aside(file)
            else:
                return self._write(file, event, values)
        return self.append(event, values)

    def asked(self, request: Any, decision: Any = None) -> str:
        """Append that pictures were asked for, and return the line's hash. The event is "refused" if a guard says so.

        request: an `ldm.Request`. decision: an `ldm.safety.guard.Decision`.
        """
        guard = {} if decision is None else {"guard": plain(decision)}
        event = "refused" if guard and decision.refused else "asked"
        return self.append(event, {"request": plain(request), **guard})

    def made(self, asked: str, files: Sequence[Path], record: Mapping[str, Any]) -> str:
        """Append that the pictures of the line with the hash `asked` were made, and return the new line's hash.

        files: the pictures; the line holds their sha256. record: `ldm.record.Record.as_dict()`; its request is not
        written again, and its "sha256" has the digests of the model and of all other files.
        """
        outputs = [{"file": str(file), "sha256": _sha256(file)} for file in files]
        rest = {key: value for key, value in record.items() if key != "request"}
        return self.append("made", {"asked": asked, "outputs": outputs, "record": rest})

    def rotate(self) -> Path:
        """Rename the file, and begin a new one that goes on with its chain. Return the new path of the old file.

        The new name ends in the number of the last line, as in audit.jsonl.000000812.
        """
        with self._locked() as file:
            old = self._set_aside(file)
        self.append("continued", {})
        return old

    def prune(self, before: datetime) -> list[Path]:
        """Remove the files of older lines whose last line was written before `before`. Return their paths.

        A line of the event "removed" proves what they were: their lines' numbers, last hash and sha256. It is written
        before they are removed, and lists all files that were ever removed.
        Raises ValueError for a log that `verify` finds faults in.
        """
        with self._locked() as file:
            verdict = verify(self.path)
            if verdict.problems:
                raise ValueError(f"{self.path} has faults, so that nothing is removed: {'; '.join(verdict.problems)}")
            old = [path for path in segments(self.path) if _last_time(path) < before]
            if old:
                known = [segment._asdict() for segment in verdict.removed if segment.name not in {p.name for p in old}]
                new = [describe_segment(path)._asdict() for path in old]
                self._write(file, "removed", {"segments": known + new})
            for path in old:
                path.unlink()
        return old

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Open the file and lock it against other processes and threads. Yield its descriptor."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if self.path.exists() and os.path.samestat(os.fstat(file), os.stat(self.path)):
                    yield file
                    return
            finally:  # another process renamed the file while this one waited
                os.close(file)

    def _write(self, file: int, event: str, values: Mapping[str, Any]) -> str:
        """Write a line at the end of the locked file."""
        last, rest = _tail(file)
        if last is None and (older := segments(self.path)):
            last = _tail_of(older[-1])
        begin, torn = b"", {}
        if rest and (complete := read_line(rest)) is not None:  # only its newline is missing
            last, begin = complete, b"\n"
        elif rest:
            torn = {"torn": describe_torn(rest)._asdict()}
        if self.hidden:
            values = hide(values)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line, digest = make_line(
            last.number + 1 if last else 1,
            last.hash if last else START,
            {**torn, "time": now, "who": self.who, "event": event, **values},
        )
        line = begin + line
        while line:
            line = line[os.write(file, line) :]
        os.fsync(file)
        return digest

    def _set_aside(self, file: int) -> Path:
        """End the locked file with a line of the event "rotated", and rename it."""
        self._write(file, "rotated", {})
        last, _ = _tail(file)
        assert last is not None  # the line that was written
        return self.path.rename(self.path.with_name(f"{self.path.name}.{last.number:09d}"))


def plain(value: Any) -> Any:
    """Return dataclasses as tables of their fields, without None and empty values. Other values stay as they are."""
    if is_dataclass(value) and not isinstance(value, type):
        table = {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        return {name: item for name, item in table.items() if item is not None and item not in ({}, [])}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def hide(value: Any, key: str = "") -> Any:
    """Replace each text under one of the keys `TEXTS` by a random salt and sha256(salt + text), both in hex.

    `matches` says whether a given prompt is the hidden one. So whoever guesses a prompt can confirm the guess.
    """
    if isinstance(value, Mapping):
        return {name: hide(item, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide(item, key) for item in value]
    if key in TEXTS and isinstance(value, str):
        salt = secrets.token_hex(16)
        return {"salt": salt, "sha256": _salted(salt, value)}
    return value


def matches(hidden: Mapping[str, str], text: str) -> bool:
    """Whether `hidden` is what `hide` made of `text`."""
    return secrets.compare_digest(hidden["sha256"], _salted(hidden["salt"], text))


def _salted(salt: str, text: str) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tail(file: int) -> tuple[Line | None, bytes]:
    """Return the last line that ends with a newline, and the bytes after its newline.

    Raises ValueError if that line was changed.
    """
    size = os.fstat(file).st_size
    start, tail = size, b""
    while start > 0 and tail.count(b"\n") < 2:
        block = min(start, BLOCK)
        start -= block
        tail = os.pread(file, block, start) + tail
    *_, line, rest = [b"", *tail.split(b"\n")]
    if b"\n" not in tail:
        return None, rest
    last = read_line(line)
    if last is None:
        raise ValueError("the last line of the audit log was changed: run ldm audit verify, and begin another log")
    return last, rest


def _tail_of(path: Path) -> Line | None:
    """Return the last line of a file of older lines."""
    file = os.open(path, os.O_RDONLY)
    try:
        return _tail(file)[0]
    finally:
        os.close(file)


def _last_time(path: Path) -> datetime:
    last = _tail_of(path)
    return datetime.fromisoformat(last.fields["time"]) if last else datetime.max.replace(tzinfo=UTC)
