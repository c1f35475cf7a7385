"""`ldm audit`, and the option --audit of the commands that make pictures."""

import hashlib
import json

import pytest

from ldm import cli
from ldm.safety.audit import AuditLog, matches
from ldm.safety.chain import verify


def rows(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def log(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl", who="alice")
    for i in range(3):
        log.append("asked", {"i": i})
    return log


def test_a_run_is_logged_with_its_request_its_model_and_its_pictures(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("txt2img", "a frog", "--steps", "2", "--seed", "7", "--audit", "audit.jsonl")
    assert code == 0
    asked, made = rows(tmp_path / "audit.jsonl")
    assert (asked["event"], asked["request"]["prompt"], asked["request"]["seed"]) == ("asked", "a frog", 7)
    assert (made["event"], made["asked"]) == ("made", asked["hash"])
    picture = tmp_path / out.strip()
    assert made["outputs"] == [{"file": out.strip(), "sha256": hashlib.sha256(picture.read_bytes()).hexdigest()}]
    assert len(made["record"]["sha256"]["model"]) == 64
    assert not verify("audit.jsonl").problems


def test_a_run_that_failed_is_logged_as_asked_only_and_hidden_prompts_are_hidden(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, *_ = run("txt2img", "a frog", "--width", "33", "--audit", "audit.jsonl", "--audit-hidden")
    assert code == 2
    (asked,) = rows(tmp_path / "audit.jsonl")
    assert asked["event"] == "asked"
    assert matches(asked["request"]["prompt"], "a frog")
    code, _, error = run("txt2img", "a frog", "--audit-hidden")
    assert (code, "add --audit FILE" in error) == (2, True)


def test_a_log_that_cannot_be_written_ends_the_run_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run("txt2img", "a frog", "--audit", "missing/audit.jsonl")
    assert (code, "missing/audit.jsonl" in error) == (2, True)
    assert not list(tmp_path.glob("*.png"))


def test_verify_prints_the_head_and_finds_a_cut_tail_with_it(log, capsys):
    assert cli.main(["audit", "verify", str(log.path)]) == 0
    out = capsys.readouterr().out
    assert "lines 1 to 3 are whole" in out
    head = out.split()[-1]
    log.append("asked", {})
    assert cli.main(["audit", "verify", str(log.path), "--head", head]) == 0
    assert "the kept hash is there; 1 lines came after it" in capsys.readouterr().out
    log.path.write_bytes(b"".join(log.path.read_bytes().splitlines(keepends=True)[:2]))
    assert cli.main(["audit", "verify", "--head", head, str(log.path)]) == 2
    assert "the end of the log was cut" in capsys.readouterr().err
    assert cli.main(["audit", "verify", "--json", "--head", head, str(log.path)]) == 2
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["last"], len(verdict["problems"])) == (2, 1)


def test_rotate_and_prune_print_the_files_and_verify_names_what_was_removed(log, capsys):
    assert cli.main(["audit", "rotate", str(log.path)]) == 0
    old = capsys.readouterr().out.strip()
    assert old == f"{log.path}.000000004"
    assert cli.main(["audit", "prune", "--older-than", "1", str(log.path)]) == 0
    assert "no file is that old" in capsys.readouterr().out
    assert cli.main(["audit", "prune", "--older-than", "0", str(log.path)]) == 0
    assert capsys.readouterr().out.strip() == old
    with log.path.open("ab") as file:
        file.write(b"torn")
    assert cli.main(["audit", "verify", str(log.path)]) == 0
    out = capsys.readouterr().out
    assert "lines 1 to 4 were removed with audit.jsonl.000000004, sha256 " in out
    assert "the last 4 bytes are a line that its process did not finish" in out


@pytest.mark.parametrize("task", ["verify", "rotate", "prune --older-than 1"])
def test_a_log_that_is_not_there_is_not_created(task, tmp_path, capsys):
    path = tmp_path / "audit.jsonl"
    assert cli.main(["audit", *task.split(), str(path)]) == 2
    assert "no audit log" in capsys.readouterr().err.lower()
    assert not path.exists()


# ------------------------------------------------------------------ the guard

POLICY = '[rules.cats]\nweight = 0.9\nwords = ["cat"]'


@pytest.fixture
def policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy.toml").write_text(POLICY)
    return "--guard", "policy.toml", "--audit", "audit.jsonl", "--steps", "1", "--width", "32", "--height", "32"


def test_a_refused_prompt_makes_no_picture_and_is_logged_with_the_reason(run, policy, tmp_path):
    code, _, error = run("txt2img", "a c4t", *policy)
    assert (code, "refused: score 0.90 of 0.50, found cats ('c4t')" in error) == (2, True)
    assert not list(tmp_path.glob("*.png"))
    assert run("txt2img", "a frog", *policy)[0] == 0
    refused, asked, _ = rows(tmp_path / "audit.jsonl")
    assert (refused["event"], refused["guard"]["matches"][0]["rule"]) == ("refused", "cats")
    assert (asked["event"], asked["guard"]["refused"]) == ("asked", False)


def test_a_list_is_guarded_and_logged_line_by_line_and_only_once(run, policy, tmp_path):
    (tmp_path / "list.txt").write_text("a frog\na secret cat\n")
    hidden = "batch", "list.txt", "out", *policy, "--audit-hidden"
    assert run(*hidden)[0] == 1
    asked, made, refused, failed = rows(tmp_path / "audit.jsonl")
    assert [line["event"] for line in (asked, made, refused, failed)] == ["asked", "made", "refused", "failed"]
    picture = tmp_path / "out" / "00001.png"
    assert made["outputs"][0]["sha256"] == hashlib.sha256(picture.read_bytes()).hexdigest()
    assert (made["asked"], failed["asked"]) == (asked["hash"], refused["hash"])
    assert matches(refused["request"]["prompt"], "a secret cat")
    assert "cat" not in (tmp_path / "audit.jsonl").read_text().replace("cats", "")
    assert not (tmp_path / "out" / "00002.png").exists()
    assert run(*hidden)[0] == 1
    events = [line["event"] for line in rows(tmp_path / "audit.jsonl")]
    assert events[4:] == ["refused", "failed"]  # the done picture is not logged again
    assert not verify("audit.jsonl").problems
