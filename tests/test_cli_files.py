"""`ldm inspect` and `ldm convert`: what they print and write, and what they refuse."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ldm
from ldm.checkpoint import files
from ldm.checkpoint.parts import Model, ema_name
from ldm.cli import main
from ldm.models.tokens import Tokenizer
from ldm.record import digest
from tests.checkpoint.conftest import SMALL
from tests.tiny import random_networks


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A single file of the official layout with a schedule and an averaged UNet, all of it twice as large."""
    path = tmp_path_factory.mktemp("source") / "model.safetensors"
    files.save(Model(SMALL, *random_networks(SMALL, Tokenizer.official())), path, layout="ldm")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    unet = {name: value for name, value in tensors.items() if "diffusion_model" in name}
    tensors |= {ema_name(name): 2 * value for name, value in unet.items()}
    save_file(tensors | {"betas": torch.zeros(1000)}, path, metadata)
    return path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """Run each test in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Run `ldm`; returns exit code, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


def same(a: torch.nn.Module, b: torch.nn.Module, factor: float = 1) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(x * factor, y) for x, y in pairs)


def test_inspect_says_what_a_file_holds_and_why(run, source):
    code, out, err = run("inspect", source)
    assert (code, err) == (0, "")
    assert out.startswith(f"{source}: ")
    for part in ("unet ", "vae ", "text_encoder ", "predicts     v: "):
        assert f"\n  {part}" in out
    assert "sha256" not in out
    assert f"sha256       {digest(source)}" in run("inspect", source, "--check-sha256")[1]


def test_inspect_gives_its_report_to_programs_and_believes_the_user(run, source):
    report = json.loads(run("inspect", source, "--json", "--prediction", "eps")[1])
    assert report["prediction"] == "eps"
    assert not report["problem"]
    assert "you asked for eps" in report["why"]
    assert {part["name"] for part in report["components"]} == {"unet", "vae", "text_encoder"}


def test_inspect_finds_the_bundled_model_from_anywhere(run):
    assert "preset       tiny" in run("inspect", "weights/tiny")[1]


def test_convert_writes_the_other_layout_and_says_what_is_left_out(run, source):
    code, out, err = run("convert", source, "folder", "--layout", "diffusers")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"folder\nleft out \d+ tensors that no network uses; --json .*\n", out)
    assert run("convert", "folder", "b.safetensors", "--layout", "ldm") == (0, "b.safetensors\n", "")
    models = [files.load(path) for path in (source, "folder", "b.safetensors")]
    assert models[1].config == models[0].config
    for other in models[1:]:
        assert all(same(a, b) for a, b in zip(models[0][1:4], other[1:4], strict=True))


def test_convert_tells_programs_everything(run, source):
    words = ["--layout", "ldm", "--dtype", "bfloat16", "--json"]
    results = json.loads(run("convert", source, "half.safetensors", *words)[1])
    assert results["file"] == "half.safetensors"
    assert "betas" in results["left_out"]
    assert any(name.startswith("model_ema.") for name in results["left_out"])
    assert {value.dtype for value in load_file("half.safetensors").values()} >= {torch.bfloat16}


def test_convert_takes_the_average_the_prediction_and_parts_that_it_is_told(run, source, here):
    model = files.load(source)
    other = ldm.Pipeline(model.config, *model[1:4])
    for parameter in other.vae.parameters():
        parameter.neg_()
    files.save_vae(other.vae, "vae", image_size=64)
    words = ["--layout", "diffusers", "--ema", "--prediction", "eps", "--vae", "vae"]
    assert run("convert", source, "new", *words)[0] == 0
    new = files.load("new")
    assert new.config.diffusion.prediction == "eps"
    assert same(model.unet, new.unet, factor=2)
    assert same(other.vae, new.vae)
    assert same(model.text_encoder, new.text_encoder)


def test_convert_replaces_a_model_only_with_overwrite(run, source):
    words = ["convert", source, "a.safetensors", "--layout", "ldm"]
    Path("a.safetensors").write_bytes(b"precious")
    code, _, err = run(*words)
    assert code == 2
    assert "a.safetensors exists already" in err
    assert Path("a.safetensors").read_bytes() == b"precious"
    assert run(*words, "--overwrite")[0] == 0
    assert files.load("a.safetensors").config.unet == SMALL.unet


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect"], "the following arguments are required: FILE"),
        (["inspect", "no.safetensors"], "no.safetensors does not exist"),
        (["inspect", "page.safetensors"], "page.safetensors"),
        (["inspect", "weights/tiny", "--prediction", "w"], "must be one of eps, v, x0, got 'w'"),
        (["convert", "weights/tiny", "a"], "the following arguments are required: --layout"),
        (["convert", "weights/tiny", "a", "--layout", "b"], "argument --layout: invalid choice"),
        (["convert", "no", "a.safetensors", "--layout", "ldm"], "no does not exist"),
        (["convert", "weights/tiny", "a.safetensors", "--layout", "ldm", "--ema"], "leave out ema"),
        (["convert", "weights/tiny", "a", "--layout", "ldm"], "one file, whose name ends in .safetensors, got a:"),
        (
            ["convert", "weights/tiny", "a.safetensors", "--layout", "diffusers"],
            "the diffusers layout is a folder, got a.safetensors",
        ),
        (
            ["convert", "weights/tiny", "a", "--layout", "ldm", "--dtype", "int8"],
            "dtype must be one of float32, float16, bfloat16, got 'int8'",
        ),
        (["convert", "weights/tiny", "a.safetensors", "--layout", "ldm", "--unet", "no"], "no does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(run, here, words, message):
    (here / "page.safetensors").write_text("<!DOCTYPE html>")
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("ldm: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert [path.name for path in here.iterdir()] == ["page.safetensors"]
