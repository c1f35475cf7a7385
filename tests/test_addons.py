"""The files in weights/addons change the pictures of the bundled model as their card says."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm

ROOT = Path(__file__).parent.parent
ADDONS = ROOT / "weights" / "addons"


def load(*loras):
    return ldm.load(ROOT / "weights" / "tiny", ldm.Placement("cpu"), loras=loras)


def test_the_card_lists_all_files_and_they_are_small():
    listed = dict(
        re.findall(r"^\| `([\w./]+)` \| ([\d.]+) MB", (ADDONS / "README.md").read_text("utf-8"), re.MULTILINE)
    )
    assert {name.rstrip("/") for name in listed} == {path.name for path in ADDONS.iterdir()} - {"README.md"}
    for name, size in listed.items():
        files = [path for path in (ADDONS / name, *(ADDONS / name).rglob("*.safetensors")) if path.is_file()]
        assert sum(path.stat().st_size for path in files) / 1e6 == pytest.approx(float(size), abs=0.05)
        assert float(size) <= (8 if name.endswith("/") else 4)


def test_the_lcm_lora_brings_its_sampler_four_steps_and_no_guidance():
    plan = load(ADDONS / "lcm.safetensors").plan(ldm.Request("a 3D castle in the mountains"))
    assert (plan.sampler, plan.steps, plan.guidance_scale) == ("lcm", 4, 1)


@pytest.mark.slow
def test_the_ink_lora_takes_the_red_out_of_an_apple():
    request = ldm.Request("a flat apple on a wooden table", steps=10, seed=2)
    middle = (48, 56, 80, 88)

    def red(pipe):
        pixels = np.asarray(pipe.generate(request)[0].crop(middle), float)
        return float((pixels[..., 0] - pixels[..., 2]).mean())

    assert red(load()) > 80
    assert red(load(ADDONS / "ink.safetensors")) < 20


@pytest.mark.slow
def test_the_controlnet_of_edges_follows_its_hint():
    pytest.importorskip("cv2")
    from ldm.training.outlines import followed

    pipe, hint = load(), Image.open(ADDONS / "edges" / "hint.png")
    shares = []
    for controls in ((), (ldm.Control(ADDONS / "edges", hint),)):
        request = ldm.Request("a 3D tent on the beach", steps=10, seed=1, controls=controls)
        shares.append(followed(hint, pipe.generate(request)[0]))
    print(f"edges followed without and with the hint: {shares}")
    assert shares[1] > shares[0] + 0.2


@pytest.mark.slow
def test_an_image_prompt_brings_its_ground():
    pytest.importorskip("transformers")
    folder = ADDONS / "image_prompt"
    pictures = [ROOT / "docs" / "gallery" / name for name in ("panda.png", "wide.png")]  # on red, and in the snow
    pipe, shares = load(), []
    for picture in pictures:
        prompt = ldm.ImagePrompt(folder / "ip-adapter.safetensors", picture, folder / "image_encoder")
        pixels = np.asarray(
            pipe.generate(ldm.Request("a 3D frog", steps=10, seed=1, image_prompts=(prompt,)))[0], float
        )
        shares.append(float(pixels[:8, :, 0].mean() - pixels[:8, :, 2].mean()))
    print(f"red less blue at the top of the pictures: {shares}")
    assert shares[0] > shares[1] + 60
