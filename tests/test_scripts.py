"""The unrolled scripts make the pictures of the Pipeline, bit for bit, and stay short."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm

FOLDER = Path(__file__).parents[1] / "scripts"
SCRIPTS = sorted(FOLDER.glob("*.py"))


def run(path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    runpy.run_path(str(path), run_name="__main__")


def test_a_sampling_script_has_at_most_80_lines():
    for name in ("txt2img",):
        assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 80


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_no_script_hides_a_module_of_the_standard_library(path):
    assert path.stem not in sys.stdlib_module_names


@pytest.mark.parametrize("guidance", [None, 1.0, 5.5])
def test_txt2img_equals_the_pipeline_bit_for_bit(
    pipe, model_folder, tmp_path, monkeypatch, guidance
):
    out = tmp_path / "frog.png"
    words = ["a frog", "--negative", "bad", "--steps", "4", "--seed", "3", "--device", "cpu"]
    if guidance is not None:
        words += ["--guidance", str(guidance)]
    run(FOLDER / "txt2img.py", monkeypatch, *words, "--model", str(model_folder), "--out", str(out))
    request = ldm.Request("a frog", "bad", steps=4, seed=3, guidance_scale=guidance)
    assert np.array_equal(Image.open(out), pipe.generate(request)[0])
