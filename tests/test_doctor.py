"""`ldm doctor`: each section is true, and a wrong picture is found."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

import ldm
from ldm import cli, doctor
from ldm.checkpoint.files import load, save
from tests.tiny import TINY_RANDOM

CPU = ldm.Placement(device="cpu")
REQUEST = {"prompt": "a frog", "seed": 3, "steps": 2}


@pytest.fixture
def model(model_folder, tmp_path):
    """A copy of the tiny random model, with the colors of its picture."""
    folder = tmp_path / "weights" / "mine"
    shutil.copytree(model_folder, folder)
    doctor.write_reference(folder, REQUEST)
    return folder


def test_the_bundled_model_draws_its_picture_and_the_report_is_json(capsys):
    """If the bundled model is new: look at the picture of `doctor.REQUEST`, then call `doctor.write_reference`."""
    assert cli.main(["doctor", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    sections = ["versions", "device", "precision", "attention", "memory", "weights", "picture"]
    assert list(report) == sections
    assert report["picture"]["right"] is True
    assert report["versions"]["torch"] == torch.__version__


def test_a_picture_is_right_in_another_precision_and_wrong_with_other_weights(model):
    report = doctor.examine(ldm.Placement(device="cpu", dtype=torch.bfloat16), [model.parent], model)
    assert report["picture"]["right"] is True
    assert report["precision"]["unet and text encoder"].startswith("bfloat16")
    assert report["weights"] == {str(model): "random, predicts eps"}

    other = load(model)
    other.vae.decoder.conv_out.bias.data += 0.1  # 13 levels
    save(other, model, overwrite=True)
    found = doctor.examine(CPU, [], model)["picture"]
    assert found["right"] is False
    assert found["difference"] > found["tolerance"]


def test_without_a_reference_nothing_is_said_about_the_picture(model):
    (model / doctor.REFERENCE).unlink()
    found = doctor.examine(CPU, [], model)["picture"]
    assert found == {"right": None, "why": f"there is no {model / doctor.REFERENCE}"}


@pytest.mark.parametrize(("right", "code"), [(True, 0), (None, 0), (False, 1)])
def test_the_exit_code_tells_a_wrong_picture(monkeypatch, capsys, right, code):
    report = {"versions": {"ldm": "1"}, "picture": {"right": right}}
    monkeypatch.setattr(doctor, "examine", lambda placement, weights: report)
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().out.splitlines() == [
        "versions", f"  {'ldm':<24} 1", "picture", f"  {'right':<24} {right}",
    ]  # fmt: skip


def test_weights_are_identified_and_what_is_none_is_said(model, tmp_path):
    torch.save({}, tmp_path / "weights" / "a.ckpt")  # not looked at
    (tmp_path / "weights" / "b.safetensors").write_bytes(b"nothing")
    found = {path.name: what for path, what in doctor.identified(tmp_path / "weights").items()}
    assert found.pop("mine") == "random, predicts eps"
    assert list(found) == ["b.safetensors"]
    assert found["b.safetensors"].startswith("no model: ")
    assert doctor.identified(model) == {model: "random, predicts eps"}


def test_the_attention_kernel_is_the_one_that_runs():
    placement = CPU.resolve(TINY_RANDOM)
    fused = doctor.attention_kernels(placement, TINY_RANDOM)
    assert fused == {f"heads of width {n}": "_scaled_dot_product_flash_attention_for_cpu" for n in (8, 16)}
    with sdpa_kernel(SDPBackend.MATH):
        assert set(doctor.attention_kernels(placement, TINY_RANDOM).values()) == {"math"}
    sliced = ldm.Placement(device="cpu", attention="sliced").resolve(TINY_RANDOM)
    assert doctor.attention_kernels(sliced, TINY_RANDOM) == {
        "kernel": "none: sliced attention is made of matrix products"
    }


def test_the_precision_comes_with_its_reason():
    placement = ldm.Placement(device="cpu", vae_dtype=torch.bfloat16).resolve(TINY_RANDOM)
    found = doctor.precision(placement, TINY_RANDOM)
    assert found["unet and text encoder"].startswith("float32 (float32 is the default here; this ")
    assert found["vae"] == "bfloat16 (as asked)"


def test_missing_packages_are_listed(monkeypatch):
    monkeypatch.setattr(doctor, "OPTIONAL", ("no-such-package",))
    assert doctor.versions()["no-such-package"] == "not installed"


def test_colors_are_the_means_of_8_by_8_cells():
    levels = np.random.default_rng(0).integers(256, size=(64, 128, 3), dtype=np.uint8)
    found = doctor.colors(Image.fromarray(levels))
    expected = [[levels[8 * i : 8 * i + 8, 16 * j : 16 * j + 16].mean((0, 1)) for j in range(8)] for i in range(8)]
    np.testing.assert_allclose(found, expected, atol=0.5)  # the scaled picture has 8 bits
