"""The benchmark's order, rows and files, on its smallest case; never how long anything takes."""

import json
import sys

import pytest
import torch

from ldm.presets import SD15
from tests.benchmarks import counted, report
from tests.benchmarks import run as benchmark
from tests.benchmarks.cases import PLANS

RUN = {"machine": "M", "date": "today", "command": "`c`", "threads": "1", "versions": "v", "rates": "r"}


@pytest.fixture(autouse=True)
def _known_rates(monkeypatch):
    monkeypatch.setattr(benchmark, "matrix_rate", lambda *_: 1e11)
    monkeypatch.setattr(benchmark, "copy_rate", lambda *_: 1e10)


def run(monkeypatch, *words):
    """Run the command and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["run", "--cases", "cut-down-64", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    return int(ended.value.code)


@pytest.mark.slow
def test_both_sides_do_the_same_step_in_turn_and_the_row_has_all_figures(monkeypatch, tmp_path):
    asked, ask = [], benchmark.Worker.ask
    monkeypatch.setattr(benchmark.Worker, "ask", lambda self, word: asked.append((self.side, word)) or ask(self, word))
    words = ["--parts", "memory", "step", "--dtypes", "float32", "--rounds", 2, "--write", tmp_path]
    assert run(monkeypatch, *words) == 0
    a, b = "ldm", "diffusers"
    assert [side for side, word in asked if word == "run"] == [a, b, a, b, b, a]

    results = json.loads((tmp_path / "performance.json").read_text())
    (row,) = results["rows"]
    assert {name: row[name] for name in report.KEY[1:]} == {
        "case": "cut-down-64",
        "part": "step",
        "dtype": "float32",
        "side": a,
        "against": b,
    }
    assert row["least"] <= row["ratio"] <= row["most"]
    assert row["steps/s"] == 1 / row["s"]
    flops, weights = counted.work("cut-down-64", "step")
    assert (row["TFLOP"], row["GB"]) == (flops / 1e12, 4 * weights / 1e9)
    assert row["of floor"] == max(flops / 1e11, 4 * weights / 1e10) / row["s"]
    if sys.platform == "linux":
        assert row["host MiB"] > 0
        assert row["its host MiB"] > 0
    assert {m["part"] for m in results["memory"]} == {"step", "decode", "encode", "picture"}
    text = (tmp_path / "performance.md").read_text()
    assert f"## {row['machine']}" in text
    assert "python -m tests.benchmarks.run --cases cut-down-64" in text
    assert f"| {row['s']:.4g} |" in text


@pytest.mark.slow
def test_the_first_row_is_the_command_that_everybody_runs_first(monkeypatch, tmp_path):
    words = ["--cases", "bundled-128", "--parts", "command", "--rounds", "1", "--write", tmp_path]
    assert run(monkeypatch, *words) == 0
    (row,) = json.loads((tmp_path / "performance.json").read_text())["rows"]
    assert (row["part"], row["side"], row["against"]) == ("command", "ldm", "torch")


def test_without_a_choice_the_whole_plan_is_measured_each_row_once(monkeypatch):
    done, cases = [], []
    monkeypatch.setattr(benchmark, "counted", lambda case: cases.append(case) or [])
    monkeypatch.setattr(
        benchmark,
        "fill",
        lambda row, *_: done.append(tuple(row[name] for name in report.KEY[1:])) or row.update(s=1.0, ratio=1.0),
    )
    monkeypatch.setattr(sys, "argv", ["run"])
    with pytest.raises(SystemExit, match="False"):
        benchmark.main()
    assert len(done) == len(set(done))
    assert done[0] == ("bundled-128", "command", "", "ldm", "torch")
    assert ("bundled-128", "step", "bfloat16", "ldm-not-packed", "diffusers") in done
    assert ("refiner-widths-256", "step", "float32", "ldm", "diffusers") in done
    assert ("sd15-512", "txt2img", "bfloat16", "ldm", "diffusers") in done
    assert ("sd15-256", "step", "float32", "ldm-sequential", "ldm") in done
    assert ("sd15-256", "load_file", "float16", "ldm-library", "diffusers") in done
    assert {"sd15-512", "sdxl-1024"} <= set(cases)
    for plan in PLANS["cuda"]:
        assert benchmark.arguments(["--device", "cuda", *plan.split()]).chosen


def test_a_row_that_cannot_be_measured_is_told_and_left_out(monkeypatch, capsys, tmp_path):
    def fail(*_):
        raise benchmark.FailedError("needs about 30 GB of memory, 20 are free")

    monkeypatch.setattr(benchmark, "check_room", fail)
    assert run(monkeypatch, "--parts", "step", "--write", tmp_path) == 1
    told = capsys.readouterr().err
    assert "cut-down-64 step float32 ldm diffusers failed: needs about 30 GB of memory" in told
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr(benchmark, "system", lambda *_: 1000)
    with pytest.raises(benchmark.FailedError, match=r"needs about \d+ GB of memory, 0 are free"):
        benchmark.check_room("cut-down-64", torch.float32, "cpu")


@pytest.mark.parametrize(
    ("code", "reason"), [("import os; os.abort()", "ended with -6"), ('print(\'{"error": "no memory"}\')', "no memory")]
)
def test_a_process_that_ends_or_reports_an_error_is_a_failed_row(monkeypatch, code, reason):
    monkeypatch.setitem(benchmark.CODE, ("import", "ldm"), code)
    with pytest.raises(benchmark.FailedError, match=f"ldm: {reason}"):
        benchmark.start("ldm", {"part": "import"})


def test_a_later_run_replaces_its_own_rows_and_keeps_the_others(tmp_path):
    def row(case, part, seconds):
        return RUN | {"case": case, "part": part, "dtype": "", "side": "ldm", "against": "x", "s": seconds}

    memory = [{"case": "a", "part": "step", "side": "ldm", "peak, MiB": 1.5}]
    report.publish(tmp_path, {"rows": [row("a", "step", 1.25), row("a", "text", 2.5)], "memory": memory})
    report.publish(tmp_path, {"rows": [row("a", "step", 3.75), row("b", "step", 4.0)], "memory": []})
    results = json.loads((tmp_path / "performance.json").read_text())
    assert [r["s"] for r in results["rows"]] == [3.75, 2.5, 4.0]
    first = row("bundled-128", "command", 5.5)
    report.publish(tmp_path, {"rows": [first], "memory": []})
    results = json.loads((tmp_path / "performance.json").read_text())
    assert [r["s"] for r in results["rows"]] == [5.5, 3.75, 2.5, 4.0]
    assert results["memory"] == memory
    text = (tmp_path / "performance.md").read_text()
    assert "3.75" in text
    assert "1.25" not in text


def test_what_a_person_wrote_around_the_tables_stays(tmp_path):
    document, (begin, end) = tmp_path / "performance.md", report.MARKS
    document.write_text(f"What it means: é\n{begin}old\n{end}\nMore.\n", encoding="utf-8")
    memory = [{"case": "a", "part": "step", "side": "ldm", "peak, MiB": 1.5}]
    report.publish(tmp_path, {"rows": [], "memory": memory})
    text = document.read_text(encoding="utf-8")
    assert text.startswith(f"What it means: é\n{begin}\n## Memory, counted\n")
    assert text.endswith(f"| a | step | ldm | 1.5 |\n\n{end}\nMore.\n")


@pytest.mark.slow
def test_a_picture_is_counted_with_the_weights_that_are_on_the_device():
    rows = {(row["part"], row["side"]): row["peak, MiB"] for row in counted.counted("sd15-512")}
    unet, vae, text = (2 * counted.size(n) / 2**20 for n in counted.networks(SD15))
    assert rows["picture", "ldm"] == pytest.approx(unet + vae + text + rows["decode", "ldm-sdpa"], abs=0.1)
    moved = rows["picture", "ldm-offload-model"]
    assert moved == pytest.approx(unet + rows["step", "ldm-sdpa"], abs=0.1)
    assert moved < 2048
    assert rows["picture", "ldm-offload-blocks"] < 600
    assert rows["step", "ldm-sequential"] < 0.51 * rows["step", "ldm-sdpa"]


def test_the_work_of_a_picture_is_that_of_its_parts():
    text, step, decode = (counted.work("cut-down-64", part) for part in ("text", "step", "decode"))
    picture = counted.work("cut-down-64", "txt2img", 4)
    assert picture == [t + 4 * s + d for t, s, d in zip(text, step, decode, strict=True)]


def test_a_guided_step_of_sd15_at_512_has_the_known_number_of_operations():
    # 803 GFLOP a pass: the 677 of convolutions and linear layers that the literature has, and attention.
    flops, weights = counted.work("sd15-512", "step")
    assert flops == pytest.approx(2 * 803e9, rel=1e-3)
    assert weights == 859_520_964
