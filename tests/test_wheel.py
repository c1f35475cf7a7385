"""What an installed wheel must carry: every package, the vocabulary, and the bundled model."""

import tomllib
from pathlib import Path

import pytest

import ldm
from ldm import pipeline

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_the_wheel_lists_every_package_of_the_tree_and_the_weights():
    inits = (ROOT / "ldm").rglob("__init__.py")
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in inits}
    assert set(SETUPTOOLS["packages"]) == found | {"ldm.weights"}
    assert SETUPTOOLS["package-dir"] == {"ldm.weights": "weights"}


def test_every_file_of_a_package_that_is_not_python_is_listed_as_its_data():
    others = [
        path
        for path in (ROOT / "ldm").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    for path in others:
        package = ".".join(path.parent.relative_to(ROOT).parts)
        assert path.name in SETUPTOOLS["package-data"][package]
    assert SETUPTOOLS["package-data"]["ldm.weights"] == ["tiny/**/*"]


def test_the_version_is_written_once():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "ldm.__version__"}
    assert ldm.__version__.count(".") == 2


@pytest.mark.parametrize("layout", ["repository", "installed"])
def test_the_bundled_model_is_found_from_any_folder(tmp_path, monkeypatch, layout):
    package = tmp_path / "site" / "ldm"
    package.mkdir(parents=True)
    weights = (package if layout == "installed" else package.parent) / "weights" / "tiny"
    weights.mkdir(parents=True)
    monkeypatch.setattr(pipeline, "__file__", str(package / "pipeline.py"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pipeline.locate("weights/tiny") == weights
    assert pipeline.locate("weights/other") == Path("weights/other")


def test_a_model_of_that_name_here_comes_before_the_bundled_one(tmp_path, monkeypatch):
    (tmp_path / "weights" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert pipeline.locate("weights/tiny") == Path("weights/tiny")
