"""What an installed wheel must carry: every package, the vocabulary, and the bundled model."""

import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from PIL import Image, ImageChops

import ldm
from ldm import loading

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_the_wheel_lists_every_package_of_the_tree_and_the_weights():
    inits = (ROOT / "ldm").rglob("__init__.py")
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in inits}
    assert set(SETUPTOOLS["packages"]) == found | {"ldm.weights"}
    assert SETUPTOOLS["package-dir"] == {"ldm.weights": "weights"}


def test_every_file_of_a_package_that_is_not_python_is_listed_as_its_data():
    others = [path for path in (ROOT / "ldm").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    for path in others:
        package = ".".join(path.parent.relative_to(ROOT).parts)
        assert path.name in SETUPTOOLS["package-data"][package]
    assert SETUPTOOLS["package-data"]["ldm.weights"] == ["tiny/**/*"]


def test_the_version_is_written_once():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "ldm.__version__"}
    assert ldm.__version__.count(".") == 2


def test_the_oldest_versions_to_test_with_are_those_that_pip_would_accept():
    project = PROJECT["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["test"]
    run = [bounds for bounds in asked if not bounds.startswith(("ruff", "mypy"))]
    pinned = (ROOT / "tests" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(line for line in pinned if line[0] != "#") == sorted(
        bounds.split(",")[0].replace(">=", "==") for bounds in run
    )


@pytest.mark.parametrize("layout", ["repository", "installed"])
def test_the_bundled_model_is_found_from_any_folder(tmp_path, monkeypatch, layout):
    package = tmp_path / "site" / "ldm"
    package.mkdir(parents=True)
    weights = (package if layout == "installed" else package.parent) / "weights" / "tiny"
    weights.mkdir(parents=True)
    monkeypatch.setattr(loading, "__file__", str(package / "pipeline.py"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert loading.locate("weights/tiny") == weights
    assert loading.locate("weights/other") == Path("weights/other")


def test_a_model_of_that_name_here_comes_before_the_bundled_one(tmp_path, monkeypatch):
    (tmp_path / "weights" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert loading.locate("weights/tiny") == Path("weights/tiny")


@pytest.mark.slow
def test_a_wheel_in_another_environment_and_folder_makes_the_same_picture(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built, folder = tmp_path / "wheel", tmp_path / "elsewhere"
    no_network = ["--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", str(ROOT), *no_network, "-w", str(built)], check=True)
    (wheel,) = built.glob("ldm-*.whl")

    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))  # torch and the others

    folder.mkdir()
    words = ["txt2img", "a frog on the grass", "--steps", "3", "--device", "cpu", "--out", "frog.png"]
    code = f"import sys, ldm.cli; print(ldm.__file__); sys.exit(ldm.cli.main({words}))"
    result = subprocess.run(
        [python, "-c", "import torch; torch.set_num_threads(1);" + code],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(site) in result.stdout  # not the repository's
    placement = ldm.Placement.fast(device="cpu")  # as the command's
    (expected,) = ldm.load(ROOT / "weights" / "tiny", placement).generate(ldm.Request("a frog on the grass", steps=3))
    with Image.open(folder / "frog.png") as picture:
        assert ImageChops.difference(picture, expected).getbbox() is None
