"""The pictures of a list: `ldm.batch` and `ldm batch`."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import batch, jobs, rescue
from ldm.batch import Manifest, Shard, groups, read_entries
from ldm.record import recall

SMALL = ("--steps", "2", "--width", "32", "--height", "32")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(name, *lines):
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(name)


def rows(folder):
    return [json.loads(line) for path in sorted(folder.glob("manifest*")) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------ the list


def test_each_kind_of_list_gives_the_same_requests(folder):
    text = listed("a.txt", "a cat", "", "a dog")
    table = listed("a.csv", "prompt,seed,guidance_scale", "a cat,0,", "a dog,1,")
    lines = listed("a.jsonl", '{"prompt": "a cat"}', '"a dog"')
    found = [[entry.request for entry in read_entries(path, {"steps": 3})] for path in (text, table, lines)]
    assert found[0] == found[1] == found[2]
    assert [(r.prompt, r.seed, r.steps) for r in found[0]] == [("a cat", 0, 3), ("a dog", 1, 3)]


def test_a_line_overrides_the_defaults_and_names_its_file(folder):
    path = listed("a.jsonl", '{"prompt": "a", "steps": 5, "seed": 9, "name": "first"}', '{"prompt": "b"}')
    first, second = read_entries(path, {"steps": 3, "seed": 4})
    assert (first.name, first.request.steps, first.request.seed) == ("first", 5, 9)
    assert (second.name, second.request.steps, second.request.seed) == ("00002", 3, 5)


def test_a_line_with_several_images_gives_as_many_pictures(folder):
    path = listed("a.jsonl", '{"prompt": "a", "images": 2}', '"b"')
    entries = read_entries(path, {})
    assert [(e.name, e.request.seed, e.request.images) for e in entries] == [
        ("00001-1", 0, 1),
        ("00001-2", 1, 1),
        ("00002", 2, 1),
    ]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", "line 2 is not JSON"),
        ("3", "line 2 must be a prompt or a table"),
        ('{"promt": "a"}', "line 2: unknown 'promt'; valid keys: prompt"),
        ('{"prompt": "a", "steps": 0}', "line 2: steps must be"),
        ('{"prompt": "a", "seed": -1}', "line 2: the seeds of a list must be 0 or more"),
        ('{"prompt": "a", "name": "../a"}', "line 2: name must be the name of a file"),
        ('{"prompt": "a", "name": "00001"}', "line 2: the name '00001' is taken by line 1"),
    ],
)
def test_a_wrong_line_is_an_entry_with_an_error(line, error, folder):
    first, second = read_entries(listed("a.jsonl", '"a cat"', line), {})
    assert (first.error, second.request) == ("", None)
    assert second.error.startswith(error)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("a.json", "[]", "the list must end in .jsonl, .csv, .txt, got 'a.json'"),
        ("a.txt", "\n\n", "the list a.txt has no lines with prompts"),
    ],
)
def test_a_wrong_list_is_an_error(name, text, error, folder):
    Path(name).write_text(text)
    with pytest.raises(ValueError, match=error):
        read_entries(Path(name), {})


def test_neighbors_run_together_if_only_prompt_and_seed_differ(folder):
    lines = [{"prompt": str(i)} for i in range(7)]
    lines[3]["steps"] = 9
    lines[6]["seed"] = 50
    entries = read_entries(listed("a.jsonl", *map(json.dumps, lines)), {})
    assert [[entry.line for entry in group] for group in groups(entries, 2)] == [[1, 2], [3], [4], [5, 6], [7]]


# ------------------------------------------------------------------ the pictures


def test_a_picture_does_not_depend_on_the_grouping_and_repeats_from_its_record(run, folder):
    path = listed("a.txt", "a cat", "a dog", "a fox")
    assert run("batch", str(path), "one", *SMALL, "--batch-size", "1")[0] == 0
    assert run("batch", str(path), "all", *SMALL)[:2] == (0, "all: 3 done, 0 failed\n")
    for name in ("00001.png", "00002.png", "00003.png"):
        alone, together = (np.asarray(Image.open(folder / each / name)).astype(int) for each in ("one", "all"))
        assert np.abs(alone - together).max() <= 1
    assert run("txt2img", "--from", "all/00002.png", "--out", "again.png")[0] == 0
    assert Path("again.png").read_bytes() == Path("all/00002.png").read_bytes()


def test_one_bad_line_stops_nothing_and_is_tried_again(run, folder):
    path = listed("a.jsonl", '"a cat"', '{"prompt": "a dog", "width": 33}', "{", '"a fox"')
    code, out, err = run("batch", str(path), "out", *SMALL, "--json")
    assert (code, json.loads(out)) == (1, {"folder": "out", "done": 2, "failed": 2})
    assert "line 2 failed: width must be a multiple of" in err
    assert "line 3 failed: line 3 is not JSON" in err
    assert [(row["line"], row["status"]) for row in rows(folder / "out")] == [
        (1, "done"),
        (2, "failed"),
        (3, "failed"),
        (4, "done"),
    ]
    made = (folder / "out" / "00001.png").stat().st_mtime_ns
    listed("a.jsonl", '"a cat"', '{"prompt": "a dog"}', '"a pig"', '"a fox"')
    assert run("batch", str(path), "out", *SMALL)[:2] == (0, "out: 4 done, 0 failed\n")
    assert (folder / "out" / "00001.png").stat().st_mtime_ns == made


def test_a_changed_line_does_not_replace_a_picture(run, folder):
    path = listed("a.txt", "a cat")
    assert run("batch", str(path), "out", *SMALL)[0] == 0
    before = Path("out/00001.png").read_bytes()
    listed("a.txt", "a dog")
    code, _, err = run("batch", str(path), "out", *SMALL)
    assert (code, "line 1 or the options changed" in err) == (2, True)
    assert Path("out/00001.png").read_bytes() == before
    Path("out/00001.png").unlink()
    assert run("batch", str(path), "out", *SMALL)[0] == 0
    assert recall("out/00001.png").request.prompt == "a dog"


def test_a_folder_with_other_files_is_refused(run, folder):
    Path("out").mkdir()
    Path("out/mine.png").write_bytes(b"")
    code, _, err = run("batch", str(listed("a.txt", "a cat")), "out", *SMALL)
    assert (code, "out has files and no manifest of a list" in err) == (2, True)


def test_half_a_line_of_the_manifest_is_not_a_picture(run, folder):
    path = listed("a.txt", "a cat", "a dog")
    assert run("batch", str(path), "out", *SMALL)[0] == 0
    manifest = folder / "out" / "manifest.jsonl"
    whole = manifest.read_text()
    manifest.write_text(whole[:-20])
    assert run("batch", str(path), "out", *SMALL)[:2] == (0, "out: 2 done, 0 failed\n")
    assert [row["line"] for row in rows(folder / "out")] == [1, 2]


def test_a_group_that_fails_is_done_one_by_one(pipe, folder, monkeypatch):
    entries = read_entries(listed("a.txt", "a", "b", "c"), {"steps": 2, "width": 32, "height": 32})
    real = rescue.run

    def fails(job, *rest, **more):
        if job.request.images > 1 or job.request.prompt == "b":
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return real(job, *rest, **more)

    monkeypatch.setattr(rescue, "run", fails)
    manifest = Manifest(folder / "out")
    maker = batch.PictureMaker(_choice(pipe), pipe.placement, jobs.Models(pipe), manifest.folder)
    done = list(batch.run(entries, _choice(pipe), manifest, batch.in_turn(maker)))
    assert [row["line"] for row in done] == [1, 2, 3]
    assert [manifest.rows[entry.name]["status"] for entry in entries] == ["done", "failed", "done"]


def test_a_list_is_planned_for_its_largest_pictures_before_the_model_is_loaded(run, folder, monkeypatch):
    path = listed("a.jsonl", '"a cat"', '{"prompt": "a dog", "width": 64}', '"a fox"', '"a pig"')
    assert run("batch", str(path), "plain", *SMALL)[0] == 0
    planned, real = [], rescue.prepare
    monkeypatch.setattr(rescue, "free_bytes", lambda device: 5 << 20)
    monkeypatch.setattr(rescue, "prepare", lambda job, say: planned.append(job.request) or real(job, say))
    code, _, err = run("batch", str(path), "out", *SMALL)
    assert (code, "memory are free: prompt and negative prompt one after the other, 1 picture at once" in err) == (
        0,
        True,
    )
    assert [(request.prompt, request.width, request.images) for request in planned] == [("a dog", 64, 4)]
    for name in ("00001", "00002", "00003", "00004"):
        assert recall(f"out/{name}.png").adjusted[0] == "prompt and negative prompt one after the other"
        alone, other = (np.asarray(Image.open(f"{each}/{name}.png")).astype(int) for each in ("plain", "out"))
        assert np.abs(alone - other).max() <= 1


def test_the_processes_of_torchrun_share_a_list_and_any_number_goes_on(pipe, folder):
    entries = read_entries(listed("a.txt", *"abcde"), {"steps": 1, "width": 32, "height": 32})

    def work(rank, world):
        shard = Shard(rank, world)
        manifest = Manifest(folder / "out", shard)
        maker = batch.PictureMaker(_choice(pipe), pipe.placement, jobs.Models(pipe), manifest.folder)
        rows = batch.run(entries, _choice(pipe), manifest, batch.in_turn(maker), size=1, shard=shard)
        return [row["line"] for row in rows]

    assert work(0, 3) == [1, 4]
    assert work(0, 1) == [1, 4, 2, 3, 5]
    lines = [row["line"] for row in rows(folder / "out")]
    assert sorted(lines) == [1, 2, 3, 4, 5]  # each picture once
    assert len(list((folder / "out").glob("*.png"))) == 5


def _choice(pipe):
    from ldm.record import ModelChoice

    return ModelChoice(str(pipe.paths["unet"].parent))


@pytest.mark.slow
def test_a_killed_batch_goes_on_where_it_stopped(model_folder, folder):
    path = listed("a.txt", *(f"a cat {i}" for i in range(12)))
    code = "from ldm.cli import main; raise SystemExit(main())"
    words = [sys.executable, "-c", code, "batch", str(path), "out", "--model", str(model_folder), "--device", "cpu"]
    words += [*SMALL, "--batch-size", "2"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=folder, env=os.environ)
    manifest = folder / "out" / "manifest.jsonl"
    while not manifest.is_file() or manifest.read_bytes().count(b"\n") < 4:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(rows(folder / "out"))
    assert 4 <= before < 12
    subprocess.run(words, check=True, cwd=folder)
    assert sorted(row["line"] for row in rows(folder / "out")) == list(range(1, 13))
    assert not [file for file in (folder / "out").iterdir() if file.name.startswith(".")]


@pytest.mark.slow
def test_ray_replaces_a_killed_actor_and_loses_nothing(model_folder, folder, run):
    pytest.importorskip("ray.data")
    path = listed("a.txt", *(f"a cat {i}" for i in range(40)))
    code = "from ldm.cli import main; raise SystemExit(main())"
    words = ["batch", str(path), "out", *SMALL, "--batch-size", "1"]
    model = ["--model", str(model_folder), "--device", "cpu"]
    command = [sys.executable, "-c", code, *words, *model, "--ray", "--actors", "2", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=folder, text=True)
    while not list(folder.glob("out/*.png")):
        assert process.poll() is None
        time.sleep(0.05)
    victim = _actors()[0]
    os.kill(victim, signal.SIGKILL)
    out, _ = process.communicate(timeout=240)
    assert json.loads(out.splitlines()[-1]) == {"folder": "out", "done": 40, "failed": 0}  # Ray prints the death
    assert sorted(row["line"] for row in rows(folder / "out")) == list(range(1, 41))  # none lost, none twice
    assert run(*words[:2], "alone", *words[3:])[0] == 0
    for file in (folder / "alone").glob("*.png"):
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(folder / "out" / file.name)))


def _actors():
    """Return the process numbers of Ray's actors that make pictures."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if b"ray::" in (title := path.read_bytes()) and b"_Actor" in title:
                found.append(int(path.parent.name))
    return found
