"""`ldm audit`: check an audit log, set its file aside, remove old files; and the options --audit and --guard."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.options import Commands
from ldm.config import check_number
from ldm.request import Request

if TYPE_CHECKING:
    from ldm.batch import Entry, Manifest, Row
    from ldm.safety.audit import AuditLog
    from ldm.safety.guard import Decision, Guard


def add(commands: Commands) -> None:
    """Add the command."""
    tasks = commands.add_parser("audit", help="check, rotate or shorten an audit log").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    command = tasks.add_parser("verify", help="find changed, removed and reordered lines")
    command.set_defaults(run=_verify)
    command.add_argument("--head", metavar="HASH", help="a hash that was kept elsewhere: finds a cut tail, too")
    command.add_argument("--json", action="store_true", help="print the verdict as JSON")
    _add_file(command)
    command = tasks.add_parser("rotate", help="set the file aside; a new file continues the chain")
    command.set_defaults(run=_rotate)
    _add_file(command)
    command = tasks.add_parser("prune", help="remove old files, and write into the log what they were")
    command.set_defaults(run=_prune)
    command.add_argument("--older-than", type=float, required=True, metavar="DAYS", help="age of their last line")
    _add_file(command)


def _add_file(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", type=Path, help="the log, such as audit.jsonl")


def add_audit(command: argparse.ArgumentParser) -> None:
    """Add the options of a command that makes pictures."""
    command.add_argument("--audit", metavar="FILE", type=Path, help="write who asked for what, and what was made")
    command.add_argument("--audit-hidden", action="store_true", help="with --audit: prompts as salted hashes")
    command.add_argument(
        "--guard", metavar="POLICY", type=Path, help="refuse prompts by this policy, such as configs/policy.toml"
    )


def _read_log(args: argparse.Namespace) -> "AuditLog | None":
    """Return the log that the options name. It is imported only then."""
    if args.audit is None:
        if args.audit_hidden:
            raise ValueError("--audit-hidden is for the audit log: add --audit FILE")
        return None
    from ldm.safety.audit import AuditLog

    return AuditLog(args.audit, hidden=args.audit_hidden)


def _read_guard(args: argparse.Namespace) -> "Guard | None":
    """Return the guard that the options name. With names, it takes seconds."""
    if args.guard is None:
        return None
    from ldm.safety.guard import Guard, Policy

    return Guard(Policy.read(args.guard))


def start_audit(args: argparse.Namespace, request: Request) -> Callable[[Sequence[Path], Mapping[str, Any]], None]:
    """Write into the log, if there is one, that `request` was asked for. Return what writes which files were made.

    Raises ValueError if the guard, if there is one, refuses the prompts.
    """
    log, guard = _read_log(args), _read_guard(args)
    decision = guard.check_request(request) if guard else None
    asked = log.asked(request, decision) if log else ""
    if decision is not None and decision.refused:
        raise ValueError(f"the guard's policy {args.guard} does not allow this prompt; {decision.reason}")

    def finish(files: Sequence[Path], record: Mapping[str, Any]) -> None:
        if log is not None:
            log.made(asked, files, record)

    return finish


def check_list(args: argparse.Namespace, entries: "list[Entry]") -> "tuple[list[Entry], dict[str, Decision]]":
    """Return the entries, with an error in place of requests that the guard refuses, and its decisions by name."""
    _read_log(args)  # raises its errors before the work
    guard = _read_guard(args)
    decisions = {entry.name: guard.check_request(entry.request) for entry in entries if guard and entry.request}
    refused = {name for name, decision in decisions.items() if decision.refused}
    checked = [
        dataclasses.replace(entry, request=None, error=decisions[entry.name].reason) if entry.name in refused else entry
        for entry in entries
    ]
    return checked, decisions


def logged(
    args: argparse.Namespace,
    entries: "Sequence[Entry]",
    decisions: "Mapping[str, Decision]",
    manifest: "Manifest",
    rows: "Iterator[Row]",
) -> "Iterator[Row]":
    """Yield `rows`, and write each that is new into the log, if there is one, as "made", "refused" or "failed"."""
    log = _read_log(args)
    if log is None:
        yield from rows
        return
    from ldm.record import recall

    requests, before = {entry.name: entry.request for entry in entries}, dict(manifest.rows)
    for row in rows:
        name = row["name"]
        if before.get(name) is not row:
            asked = log.asked(requests[name], decisions.get(name))
            if row["status"] == "done":
                file = manifest.folder / row["file"]
                log.made(asked, [file], recall(file).as_dict())
            else:
                log.append("failed", {"asked": asked, "error": row["error"]})
        yield row


def _verify(args: argparse.Namespace) -> None:
    """Print what was found. Raises ValueError for a log with faults."""
    from ldm.safety.chain import verify

    verdict = verify(_present(args.file), args.head)
    if args.json:
        table = dataclasses.asdict(verdict) | {"removed": [entry._asdict() for entry in verdict.removed]}
        print(json.dumps(table))
    if verdict.problems:
        raise ValueError(f"{args.file} has faults: {'; '.join(verdict.problems)}")
    if args.json:
        return
    print(f"{args.file}: lines {verdict.first} to {verdict.last} are whole")
    for entry in verdict.removed:
        print(f"lines {entry.first} to {entry.last} were removed with {entry.name}, sha256 {entry.sha256}")
    if verdict.torn:
        print(f"the last {verdict.torn} bytes are a line that its process did not finish")
    if verdict.after is not None:
        print(f"the kept hash is there; {verdict.after} lines came after it")
    print(f"keep this hash elsewhere: {verdict.head}")


def _rotate(args: argparse.Namespace) -> None:
    from ldm.safety.audit import AuditLog

    print(AuditLog(_present(args.file)).rotate())


def _prune(args: argparse.Namespace) -> None:
    from ldm.safety.audit import AuditLog

    check_number("--older-than", args.older_than, 0, 36_500)
    removed = AuditLog(_present(args.file)).prune(datetime.now(UTC) - timedelta(days=args.older_than))
    print("\n".join(map(str, removed)) or "no file is that old")


def _present(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"there is no audit log {path}")
    return path
