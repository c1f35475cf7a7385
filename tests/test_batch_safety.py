"""`ldm batch` with a watermark, a check of the pictures, and balanced variants."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from ldm.record import recall
from ldm.safety import watermark
from ldm.safety.nsfw import Verdict

SMALL = ("--steps", "1", "--width", "32", "--height", "32")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows():
    return [json.loads(line) for line in Path("out/manifest.jsonl").read_text().splitlines()]


def test_the_pictures_of_a_list_carry_a_watermark_which_is_part_of_what_was_asked(run, folder):
    Path("a.txt").write_text("a cat\n")
    words = ("batch", "a.txt", "out", "--steps", "1", "--width", "64", "--height", "64")
    assert run(*words, "--watermark", "ours")[0] == 0
    assert watermark.detect(Image.open("out/00001.png"), "ours").share > 0.9
    assert recall("out/00001.png").request.prompt == "a cat"
    code, _, err = run(*words)
    assert (code, "line 1 or the options changed" in err) == (2, True)


@pytest.mark.parametrize(("action", "status", "code"), [("label", "done", 0), ("refuse", "refused", 1)])
def test_each_picture_of_a_list_is_judged(run, folder, monkeypatch, action, status, code):
    class Checker:
        def check(self, picture):
            return Verdict(True, {"red": 0.9})

    monkeypatch.setattr("ldm.safety.nsfw.load_checker", lambda path: Checker())
    Path("a.txt").write_text("a cat\na dog\n")
    found, _, err = run("batch", "a.txt", "out", *SMALL, "--nsfw-check", "any", "--nsfw", action)
    assert found == code
    assert [row["status"] for row in rows()] == [status] * 2
    assert all(row["nsfw"]["flagged"] for row in rows())
    assert len(list(Path("out").glob("*.png"))) == 2 * (status == "done")
    assert "NSFW" in err


def test_groups_and_attributes_give_a_balanced_list_and_a_report(run, folder):
    Path("a.txt").write_text("a {cat|dog}\na fox\n")
    Path("balance.toml").write_text('[attributes]\nage = ["young", "old"]\n')
    code, out, _ = run("batch", "a.txt", "out", *SMALL, "--balance", "balance.toml", "--json")
    result = json.loads(out)
    assert (code, result["done"]) == (0, 6)
    assert result["variants"] == {
        "cat|dog": {"cat": {"done": 2}, "dog": {"done": 2}},
        "age": {"young": {"done": 3}, "old": {"done": 3}},
    }
    asked = Counter(", ".join(row["choices"].values()) for row in rows())
    assert asked == Counter(["cat, young", "cat, old", "dog, young", "dog, old", "young", "old"])
    assert run("batch", "a.txt", "out", *SMALL, "--balance", "balance.toml")[1] == (
        'out: 6 done, 0 failed\ncat|dog: {"cat": {"done": 2}, "dog": {"done": 2}}\n'
        'age: {"young": {"done": 3}, "old": {"done": 3}}\n'
    )
