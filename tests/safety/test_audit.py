"""The audit log: faults that are found, killed writers, several writers, rotation, retention and hidden prompts."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import ldm
from ldm.safety import audit
from ldm.safety.audit import AuditLog, hide, matches
from ldm.safety.chain import START, read_line, segments, verify


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # slow, and only a power cut shows the difference
    return AuditLog(tmp_path / "audit.jsonl", who="alice@test")


def written(log, count=6):
    return [log.append("asked", {"request": {"prompt": f"a frog {i}"}}) for i in range(count)]


def lines(path):
    return path.read_bytes().splitlines(keepends=True)


# ------------------------------------------------------------------ a whole log


def test_each_line_is_json_and_continues_the_line_before(log):
    hashes = written(log)
    rows = [json.loads(line) for line in lines(log.path)]
    assert [row["number"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["hash"] for row in rows] == hashes
    assert [row["previous"] for row in rows] == [START, *hashes[:-1]]
    assert {row["who"] for row in rows} == {"alice@test"}
    assert datetime.fromisoformat(rows[0]["time"]) <= datetime.now(UTC)
    verdict = verify(log.path, hashes[2])
    assert (verdict.problems, verdict.head, verdict.last, verdict.after) == ((), hashes[-1], 6, 3)


def test_a_hash_is_the_sha256_of_the_line_without_it(log):
    (digest,) = written(log, 1)
    text = log.path.read_text().rstrip("\n")
    bare = text.removesuffix(f',"hash":"{digest}"}}') + "}"
    assert hashlib.sha256(bare.encode()).hexdigest() == digest


def test_a_line_is_on_the_disk_before_append_returns(log, monkeypatch):
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda file: sizes.append(os.fstat(file).st_size))
    written(log, 1)
    assert sizes == [log.path.stat().st_size]


def test_only_the_owner_can_read_the_log(log):
    written(log, 1)
    assert log.path.stat().st_mode & 0o777 == 0o600


def test_a_request_and_its_pictures_are_logged_with_digests(log, tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"picture")
    asked = log.asked(ldm.Request(("a frog", "ein Frösch\n"), images=2, seed=5))
    log.made(asked, [picture], {"request": {"prompt": "a frog"}, "sha256": {"model": "12ab"}})
    first, second = (json.loads(line) for line in lines(log.path))
    assert (first["event"], first["request"]["prompt"]) == ("asked", ["a frog", "ein Frösch\n"])
    assert first["request"]["seed"] == 5
    assert (second["event"], second["asked"]) == ("made", asked)
    assert second["record"] == {"sha256": {"model": "12ab"}}
    (output,) = second["outputs"]
    assert output == {"file": str(picture), "sha256": hashlib.sha256(b"picture").hexdigest()}


def test_values_must_not_replace_the_keys_of_each_line(log):
    with pytest.raises(ValueError, match="values must not have \\['who'\\]"):
        log.append("asked", {"who": "mallory"})


# ------------------------------------------------------------------ faults


def test_a_change_of_any_bit_is_found_in_a_line(log):
    written(log, 1)
    line = log.path.read_bytes().rstrip(b"\n")
    assert read_line(line) is not None
    for i in range(len(line)):
        for bit in range(8):
            assert read_line(line[:i] + bytes([line[i] ^ 1 << bit]) + line[i + 1 :]) is None
        assert read_line(line[:i] + line[i + 1 :]) is None


def test_a_change_of_any_byte_is_found_in_a_file(log):
    hashes = written(log, 3)
    whole = log.path.read_bytes()
    newlines = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for i in sorted({*range(0, len(whole), 13), *newlines}):
        log.path.write_bytes(whole[:i] + b"#" + whole[i + 1 :])
        assert verify(log.path, hashes[-1]).problems


@pytest.mark.parametrize("removed", [0, 1, 2, 3, 4])
def test_a_removed_line_is_found(log, removed):
    written(log)
    rows = lines(log.path)
    log.path.write_bytes(b"".join(rows[:removed] + rows[removed + 1 :]))
    assert verify(log.path).problems


def test_swapped_repeated_and_foreign_lines_are_found(log, tmp_path):
    written(log)
    other = AuditLog(tmp_path / "other.jsonl", who="bob")
    written(other)
    a = lines(log.path)
    changed = [
        [a[1], a[0], *a[2:]],
        [*a[:3], a[4], a[3], a[5]],
        [*a[:3], a[2], *a[3:]],
        [*a[:2], lines(other.path)[2], *a[3:]],
        [*a[:2], b"\n", *a[2:]],
        [*a[:2], b"text\n", *a[2:]],
        a[3:],
    ]
    for rows in changed:
        log.path.write_bytes(b"".join(rows))
        assert verify(log.path).problems
    log.path.write_bytes(b"".join(a))
    assert not verify(log.path).problems


def test_a_line_with_a_new_hash_is_found_by_the_line_after(log):
    written(log)
    rows = lines(log.path)
    table = json.loads(rows[2])
    fields = {k: v for k, v in table.items() if k not in ("number", "previous", "hash")} | {"who": "mallory"}
    rows[2] = audit.make_line(3, table["previous"], fields)[0]
    log.path.write_bytes(b"".join(rows))
    (problem,) = verify(log.path).problems
    assert "line 4 does not continue the line before" in problem


@pytest.mark.parametrize("left", [0, 1, 5])
def test_a_cut_tail_is_found_with_the_kept_head_only(log, left):
    *_, head = written(log)
    log.path.write_bytes(b"".join(lines(log.path)[:left]))
    assert not verify(log.path).problems
    assert "the end of the log was cut" in verify(log.path, head).problems[0]


def test_a_log_that_was_written_anew_is_found_with_the_kept_head(log):
    *_, head = written(log)
    log.path.unlink()
    written(AuditLog(log.path, who="mallory"), 8)
    assert not verify(log.path).problems
    assert verify(log.path, head).problems


def test_a_line_with_a_right_hash_and_wrong_content_is_found(log):
    (head,) = written(log, 1)
    whole = log.path.read_bytes()
    begin = f'{{"number":2,"previous":"{head}",'
    for body in (
        begin + '"a"',
        begin + '"a":' + "[" * 100_000,
        begin + '"number":"x"',
        begin + '"event":"removed","segments":[{"name":3}]',
    ):
        body += "}"
        line = f'{body[:-1]},"hash":"{hashlib.sha256(body.encode()).hexdigest()}"}}\n'
        log.path.write_bytes(whole + line.encode())
        assert verify(log.path).problems


def test_nothing_is_appended_to_a_changed_last_line(log):
    written(log)
    log.path.write_bytes(log.path.read_bytes().replace(b"a frog 5", b"a frog 6"))
    with pytest.raises(ValueError, match="the last line of the audit log was changed"):
        written(log, 1)


# ------------------------------------------------------------------ killed writers


def test_a_line_cut_at_every_byte_is_recognized_and_the_lines_around_it_stay(log):
    log = AuditLog(log.path, who="")
    written(log, 2)
    before = log.path.stat().st_size
    log.append("", {})
    whole = log.path.read_bytes()
    for end in range(before, len(whole) + 1):
        log.path.write_bytes(whole[:end])
        complete = end >= len(whole) - 1  # all but the newline
        verdict = verify(log.path)
        assert (verdict.problems, verdict.last) == ((), 3 if complete else 2)
        assert verdict.torn == (0 if complete else end - before)
        verdict = verify(log.path, log.append("", {}))
        assert (verdict.problems, verdict.last, verdict.torn) == ((), 4 if complete else 3, 0)
        assert log.path.read_bytes().startswith(whole[:end])


def test_writers_cut_one_after_the_other_are_recognized(log):
    written(log, 1)
    for _ in range(3):
        written(log, 1)
        log.path.write_bytes(log.path.read_bytes()[:-40])
    written(log, 1)
    verdict = verify(log.path)
    assert (verdict.problems, verdict.last) == ((), 2)
    raw = log.path.read_bytes()
    place = raw.index(b'"asked"', raw.index(b"\n"))
    log.path.write_bytes(raw[:place] + b'"Asked"' + raw[place + 7 :])  # in an unfinished line
    assert verify(log.path).problems


def test_a_first_line_that_was_cut_is_recognized(log):
    written(log, 1)
    log.path.write_bytes(log.path.read_bytes()[:30])
    assert verify(log.path).torn == 30
    written(log, 2)
    assert (verify(log.path).problems, verify(log.path).last) == ((), 2)


def append_forever(path):
    log = AuditLog(path, who="killed")
    while True:
        log.append("asked", {"request": {"prompt": "a frog " * 2000}})


def test_a_process_killed_while_it_writes_leaves_a_whole_log(log):
    context = multiprocessing.get_context("fork")
    for wait in (0.02, 0.05):
        process = context.Process(target=append_forever, args=(log.path,))
        process.start()
        while not log.path.exists() or log.path.stat().st_size < 20_000:
            process.join(0.005)
        process.join(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not verify(log.path).problems
        written(log, 1)
        assert not verify(log.path).problems


# ------------------------------------------------------------------ several writers


def append_some(path, name, count):
    log = AuditLog(path, who=name, rotate_at=4000)
    for i in range(count):
        log.append("asked", {"request": {"prompt": "x" * random.Random(i).randrange(300)}})


def test_processes_and_threads_append_and_rotate_together(log):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=append_some, args=(log.path, f"process {i}", 25)) for i in range(3)]
    workers += [threading.Thread(target=append_some, args=(log.path, f"thread {i}", 25)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    files = [*segments(log.path), log.path]
    rows = [json.loads(line) for file in files for line in lines(file)]
    asked = [row["who"] for row in rows if row["event"] == "asked"]
    assert {who: asked.count(who) for who in asked} == dict.fromkeys(
        ["process 0", "process 1", "process 2", "thread 0", "thread 1"], 25
    )
    assert len(files) > 3
    verdict = verify(log.path)
    assert (verdict.problems, verdict.last) == ((), len(rows))


def test_a_system_without_fcntl_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "fcntl", None)
    with pytest.raises(ValueError, match=r"needs fcntl\.flock"):
        AuditLog(tmp_path / "audit.jsonl")


# ------------------------------------------------------------------ rotation and retention


def rotated(log, times=3):
    heads = []
    for _ in range(times):
        heads += written(log, 3)
        log.rotate()
    return heads + written(log, 2)


def test_a_rotated_log_is_one_chain(log):
    heads = rotated(log)
    assert [file.name for file in segments(log.path)] == [f"audit.jsonl.{n:09d}" for n in (4, 9, 14)]
    verdict = verify(log.path, heads[0])
    assert (verdict.problems, verdict.first, verdict.last, verdict.after) == ((), 1, 17, 16)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_missing_file_of_older_lines_is_found(log, place):
    rotated(log)
    segments(log.path)[place].unlink()
    assert verify(log.path).problems


def test_a_log_whose_newest_file_was_removed_is_found_with_the_kept_head(log):
    *_, head = rotated(log)
    log.path.unlink()
    assert not verify(log.path).problems
    assert verify(log.path, head).problems
    written(log, 1)
    assert verify(log.path).last == 15


def test_an_unfinished_line_is_recognized_when_the_file_is_rotated(log):
    written(log, 2)
    with log.path.open("ab") as file:
        file.write(b'{"number":3,"prev')
    log.rotate()
    assert (verify(log.path).problems, verify(log.path).last) == ((), 4)


def test_a_first_line_that_was_cut_after_a_rotation_is_recognized(log):
    written(log, 2)
    log.rotate()
    log.path.write_bytes(log.path.read_bytes()[:50])
    assert verify(log.path).torn == 50
    written(log, 1)
    assert (verify(log.path).problems, verify(log.path).last) == ((), 4)


def later():
    return datetime.now(UTC) + timedelta(seconds=1)


def test_removed_files_are_proven_by_their_digest_and_last_hash(log):
    rotated(log)
    old = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in segments(log.path)]
    assert log.prune(datetime.now(UTC) - timedelta(days=1)) == []
    assert [file.name for file in log.prune(later())] == [name for name, _ in old]
    verdict = verify(log.path)
    assert (verdict.problems, verdict.first, verdict.last) == ((), 15, 18)
    assert [(entry.name, entry.sha256) for entry in verdict.removed] == old
    assert [(entry.first, entry.last) for entry in verdict.removed] == [(1, 4), (5, 9), (10, 14)]
    kept = verdict.removed[1].head  # the last hash of a removed file still says where the log was
    assert verify(log.path, kept).after == 18 - 9


def test_the_proof_of_all_removed_files_stays_when_the_file_that_held_it_is_removed(log):
    rotated(log, 1)
    log.prune(later())
    log.rotate()
    log.prune(later())
    verdict = verify(log.path)
    assert (verdict.problems, len(verdict.removed)) == ((), 2)


def test_files_that_were_removed_without_a_line_are_found(log):
    rotated(log)
    log.prune(later())
    log.rotate()
    written(log, 1)
    segments(log.path)[0].unlink()
    (problem,) = verify(log.path).problems
    assert "no line says that they were removed" in problem


def stop(path):
    raise KeyboardInterrupt


def test_a_process_killed_between_the_proof_and_the_removal_leaves_a_whole_log(log, monkeypatch):
    rotated(log)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            log.prune(later())
    assert not verify(log.path).problems
    assert len(log.prune(later())) == 3
    verdict = verify(log.path)
    assert (verdict.problems, len(verdict.removed)) == ((), 3)


def test_nothing_is_removed_from_a_log_with_faults(log):
    rotated(log)
    old = segments(log.path)[0]
    old.write_bytes(old.read_bytes().replace(b"a frog 1", b"a frog 9"))
    with pytest.raises(ValueError, match="has faults, so that nothing is removed"):
        log.prune(later())
    assert old.exists()


# ------------------------------------------------------------------ hidden prompts


def test_hidden_prompts_are_nowhere_in_the_file_and_can_be_compared(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl", who="alice", hidden=True)
    request = ldm.Request("a secret frog", negative_prompt="a secret cat", images=1)
    log.asked(request)
    log.append("other", {"request": {"prompt": ["a secret frog"], "regions": [{"prompt": "a secret dog"}]}})
    text = log.path.read_text()
    assert "secret" not in text
    first, second = map(json.loads, text.splitlines())
    hidden = first["request"]["prompt"]
    assert matches(hidden, "a secret frog")
    assert not matches(hidden, "a secret cat")
    assert matches(second["request"]["regions"][0]["prompt"], "a secret dog")
    assert hidden != second["request"]["prompt"][0]  # salted


def test_hiding_changes_texts_of_prompts_only():
    table = {"steps": 3, "sampler": "ddim", "prompt": None}
    assert hide(table) == table
