"""The unrolled scripts make the pictures of the Pipeline, bit for bit, and stay short."""

import dataclasses
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm.checkpoint import files, ip_adapters
from ldm.checkpoint.controlnets import save_controlnet
from ldm.checkpoint.parts import Model
from ldm.models.unet import UNet
from tests.tiny import (
    TINY_RANDOM,
    TINY_REFINER,
    TINY_SDXL,
    Tower,
    random_controlnet,
    random_ip_adapter,
    random_networks,
    save_ip_adapter,
)

FOLDER = Path(__file__).parents[1] / "scripts"
SCRIPTS = sorted(FOLDER.glob("*.py"))


def run(path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    runpy.run_path(str(path), run_name="__main__")


def test_a_sampling_script_has_at_most_80_lines():
    for name in ("txt2img", "img2img", "inpaint", "edit", "sdxl_refiner", "controlnet", "ip_adapter", "regions"):
        assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 80


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_no_script_hides_a_module_of_the_standard_library(path):
    assert path.stem not in sys.stdlib_module_names


@pytest.mark.parametrize("guidance", [None, 1.0, 5.5])
@pytest.mark.parametrize("config", [TINY_RANDOM, TINY_SDXL, TINY_REFINER], ids=lambda c: c.name)
@pytest.mark.parametrize("negative", [None, "", "bad"])
def test_txt2img_equals_the_pipeline_bit_for_bit(tmp_path, monkeypatch, config, negative, guidance):
    networks = random_networks(config)
    monkeypatch.setattr(files, "load", lambda *_, **__: Model(config, *networks))
    out = tmp_path / "frog.png"
    words = ["a frog", "--steps", "3", "--seed", "3", "--device", "cpu", "--out", str(out)]
    if guidance is not None:
        words += ["--guidance", str(guidance)]
    if negative is not None:
        words += ["--negative", negative]
    run(FOLDER / "txt2img.py", monkeypatch, *words)
    request = ldm.Request("a frog", negative, steps=3, seed=3, guidance_scale=guidance)
    assert np.array_equal(Image.open(out), ldm.Pipeline(config, *networks).generate(request)[0])


def test_txt2img_reads_the_model_that_it_is_told(pipe, model_folder, tmp_path, monkeypatch):
    words = ["a frog", "--device", "cpu", "--model", str(model_folder), "--out", "frog.png"]
    monkeypatch.chdir(tmp_path)
    run(FOLDER / "txt2img.py", monkeypatch, *words)
    assert np.array_equal(Image.open("frog.png"), pipe.generate(ldm.Request("a frog"))[0])


# ------------------------------------------------------------------ image to image, and SDXL with its refiner


@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("config", [TINY_RANDOM, TINY_SDXL, TINY_REFINER], ids=lambda c: c.name)
def test_img2img_equals_the_pipeline_bit_for_bit(tmp_path, monkeypatch, config, strength):
    networks = random_networks(config)
    monkeypatch.setattr(files, "load", lambda *_, **__: Model(config, *networks))
    picture, out = tmp_path / "picture.png", tmp_path / "frog.png"
    Image.linear_gradient("L").resize((50, 30)).convert("RGBA").rotate(20).save(picture)
    words = ["a frog", "--steps", "5", "--seed", "3", "--strength", str(strength), "--negative", "bad"]
    run(FOLDER / "img2img.py", monkeypatch, str(picture), *words, "--device", "cpu", "--out", str(out))
    request = ldm.Request("a frog", "bad", steps=5, seed=3, source=ldm.Source(picture, strength))
    assert np.array_equal(Image.open(out), ldm.Pipeline(config, *networks).generate(request)[0])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("config", [TINY_RANDOM, TINY_SDXL], ids=lambda c: c.name)
def test_controlnet_equals_the_pipeline_bit_for_bit(tmp_path, monkeypatch, config, guidance):
    networks = random_networks(config)
    monkeypatch.setattr(files, "load", lambda *_, **__: Model(config, *networks))
    save_controlnet(random_controlnet(config), tmp_path / "net")
    Image.linear_gradient("L").resize((50, 30)).rotate(20).save(tmp_path / "hint.png")
    given, out = [str(tmp_path / name) for name in ("net", "hint.png")], tmp_path / "frog.png"
    words = ["--weight", "0.7", "--steps", "3", "--seed", "0", "--guidance", str(guidance), "--model", "random"]
    run(FOLDER / "controlnet.py", monkeypatch, "a frog", *given, *words, "--device", "cpu", "--out", str(out))
    request = ldm.Request("a frog", steps=3, guidance_scale=guidance, controls=(ldm.Control(*given, 0.7),))
    pipe = ldm.Pipeline(config, *networks)
    assert np.array_equal(Image.open(out), pipe.generate(request)[0])
    assert not np.array_equal(Image.open(out), pipe.generate(dataclasses.replace(request, controls=()))[0])


@pytest.mark.parametrize(("config", "plus"), [(TINY_RANDOM, False), (TINY_SDXL, True)], ids=["plain", "sdxl plus"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_ip_adapter_equals_the_pipeline_bit_for_bit(tmp_path, monkeypatch, config, plus, guidance):
    networks = random_networks(config)
    monkeypatch.setattr(files, "load", lambda *_, **__: Model(config, *networks))
    monkeypatch.setattr(ip_adapters, "load_image_encoder", lambda *_, **__: Tower())
    save_ip_adapter(random_ip_adapter(config, plus=plus), tmp_path / "ip.safetensors")
    Image.linear_gradient("L").resize((50, 30)).rotate(20).save(tmp_path / "in.png")
    adapter, picture, out = (str(tmp_path / name) for name in ("ip.safetensors", "in.png", "frog.png"))
    words = ["--weight", "0.7", "--steps", "3", "--guidance", str(guidance), "--model", "random", "--device", "cpu"]
    run(FOLDER / "ip_adapter.py", monkeypatch, "a frog", adapter, "tower", picture, *words, "--out", out)
    prompts = (ldm.ImagePrompt(adapter, picture, "tower", 0.7),)
    request = ldm.Request("a frog", steps=3, guidance_scale=guidance, image_prompts=prompts)
    pipe = ldm.Pipeline(config, *networks)
    assert np.array_equal(Image.open(out), pipe.generate(request)[0])
    assert not np.array_equal(Image.open(out), pipe.generate(dataclasses.replace(request, image_prompts=()))[0])


@pytest.mark.parametrize("config", [TINY_RANDOM, TINY_SDXL], ids=lambda c: c.name)
def test_regions_equals_the_pipeline_bit_for_bit(tmp_path, monkeypatch, config):
    networks = random_networks(config)
    monkeypatch.setattr(files, "load", lambda *_, **__: Model(config, *networks))
    mask, out = tmp_path / "mask.png", tmp_path / "frog.png"
    Image.radial_gradient("L").resize((50, 30)).save(mask)
    given = [(str(mask), "a fox"), ("left=0.3,width=0.5", "a cat")]
    words = ["a frog", "--steps", "3", "--guidance", "4", "--negative", "bad", "--device", "cpu", "--out", str(out)]
    run(FOLDER / "regions.py", monkeypatch, *words, *(word for each in given for word in ("--region", *each)))
    request = ldm.Request("a frog", "bad", 3, 4.0, regions=[ldm.RegionalPrompt(*each) for each in given])
    pipe = ldm.Pipeline(config, *networks)
    assert np.array_equal(Image.open(out), pipe.generate(request)[0])
    assert not np.array_equal(Image.open(out), pipe.generate(dataclasses.replace(request, regions=()))[0])


@pytest.mark.parametrize("config", [TINY_RANDOM, TINY_SDXL], ids=lambda c: c.name)
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_inpaint_equals_the_pipeline_bit_for_bit(tmp_path, monkeypatch, config, strength):
    networks = random_networks(config)
    monkeypatch.setattr(files, "load", lambda *_, **__: Model(config, *networks))
    picture, mask, out = (tmp_path / name for name in ("picture.png", "mask.png", "frog.png"))
    Image.linear_gradient("L").resize((50, 30)).convert("RGB").save(picture)
    Image.radial_gradient("L").resize((50, 30)).point(lambda level: max(0, level - 90)).save(mask)
    words = ["a frog", "--steps", "5", "--seed", "3", "--strength", str(strength), "--feather", "2", "--device", "cpu"]
    run(FOLDER / "inpaint.py", monkeypatch, str(picture), str(mask), *words, "--out", str(out))
    source = ldm.Source(picture, strength, mask=ldm.Mask(mask, feather=2))
    (expected,) = ldm.Pipeline(config, *networks).generate(ldm.Request("a frog", steps=5, seed=3, source=source))
    assert np.array_equal(Image.open(out), expected)
    assert not np.array_equal(Image.open(out), Image.open(picture))


@pytest.mark.parametrize(("guidance", "image_guidance"), [(None, 1.5), (1.0, 0.8)])
def test_edit_equals_the_pipeline_bit_for_bit(tmp_path, monkeypatch, guidance, image_guidance):
    config = dataclasses.replace(TINY_RANDOM, unet=dataclasses.replace(TINY_RANDOM.unet, in_channels=8))
    networks = UNet(config.unet).eval(), *random_networks()[1:]
    monkeypatch.setattr(files, "load", lambda *_, **__: Model(config, *networks))
    picture, out = tmp_path / "picture.png", tmp_path / "frog.png"
    Image.linear_gradient("L").resize((50, 30)).rotate(20).save(picture)
    words = ["make it a frog", "--steps", "3", "--seed", "3", "--image-guidance", str(image_guidance)]
    words += ["--negative", "bad", "--model", "random", "--device", "cpu", "--out", str(out)]
    words += [] if guidance is None else ["--guidance", str(guidance)]
    run(FOLDER / "edit.py", monkeypatch, str(picture), *words)
    source = ldm.Source(picture, image_guidance=image_guidance)
    request = ldm.Request("make it a frog", "bad", 3, guidance, seed=3, source=source)
    assert np.array_equal(Image.open(out), ldm.Pipeline(config, *networks).generate(request)[0])


@pytest.mark.parametrize("negative", [None, "bad"])
@pytest.mark.parametrize("handover", [0.8, 0.5])
def test_sdxl_refiner_equals_the_pipelines_bit_for_bit(tmp_path, monkeypatch, handover, negative):
    models = {config.name: Model(config, *random_networks(config)) for config in (TINY_SDXL, TINY_REFINER)}
    monkeypatch.setattr(files, "load", lambda path, **_: models[path.name])
    out = tmp_path / "frog.png"
    words = ["a frog", "--base", "random-sdxl", "--refiner", "random-refiner", "--handover", str(handover)]
    words += ["--steps", "5", "--seed", "3", "--size", "32", "--guidance", "4"]
    words += ["--negative", negative] if negative else []
    run(FOLDER / "sdxl_refiner.py", monkeypatch, *words, "--device", "cpu", "--out", str(out))
    pipes = (ldm.Pipeline(*model[:4]) for model in models.values())
    request = ldm.Request("a frog", negative, 5, 4.0, sampler="euler", spacing="leading", seed=3)
    assert np.array_equal(Image.open(out), ldm.refine(*pipes, request, handover=handover)[0])
