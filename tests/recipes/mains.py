"""Run the recipes as commands, in tests."""

import re
import runpy
import sys
from pathlib import Path

import pytest

import ldm
from tests.recipes.write import FOLDER


def printed(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: Path, *words: str, pipe=None
) -> str:
    """Run a recipe as a command and return what it prints. pipe: stands for the bundled model."""
    if pipe is not None:
        monkeypatch.setattr(ldm, "load", lambda: pipe)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words, "--out", str(out)])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert out.is_file()
    return capsys.readouterr().out


def numbers(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: Path, *words: str, pipe=None
) -> list[float]:
    """Run a recipe as `printed` does, and return the numbers of its lines, without the 255 of "of 255 levels"."""
    text = printed(name, monkeypatch, capsys, out, *words, pipe=pipe).replace("255", "")
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", text)]
