"""Official files, for those who have them in weights/ or in the folder that LDM_WEIGHTS names: `pytest -m weights`.

The slices are those of diffusers' own slow tests (tests/pipelines/stable_diffusion*, stable_diffusion_2 and
stable_diffusion_xl of its repository), made on a GPU: nine values of the last color, from 0 to 1.
"""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import ldm
from ldm.checkpoint.files import convert, identify
from ldm.checkpoint.known import known_files
from ldm.record import digest

pytestmark = pytest.mark.weights
FOLDER = Path(os.environ.get("LDM_WEIGHTS") or Path(__file__).parent.parent / "weights")

DIGESTS = defaultdict(set)  # by published file name; one name may have several revisions
for _sha256, _known in known_files().items():
    if _known.name.split(" ")[0].endswith((".safetensors", ".ckpt")):
        DIGESTS[_known.name.split(" ")[0]].add(_sha256)


class Slice(NamedTuple):
    """A published picture: where it comes from, and nine of its values."""

    files: tuple[str, ...]  # any of these; a folder is one of diffusers' layout
    request: dict[str, Any]
    values: tuple[float, ...]
    tolerance: float  # diffusers' own, at least that of another device
    rows: slice = slice(-3, None)
    dtype: torch.dtype = torch.float32  # on a GPU; elsewhere fp32, which the tolerance allows
    numpy_latents: bool = False  # the initial noise is numpy's RandomState(0), not torch's seed 0


SQUIRREL = {"prompt": "A painting of a squirrel eating a burger", "guidance_scale": 7.5}
SLICES = {
    "sd 1.4, ddim": Slice(
        ("sd-v1-4.safetensors", "sd-v1-4.ckpt", "stable-diffusion-v1-4"),
        {
            "prompt": "a photograph of an astronaut riding a horse",
            **{"sampler": "ddim", "spacing": "leading", "steps": 3, "guidance_scale": 7.5},
        },
        (0.38019, 0.28647, 0.27321, 0.40377, 0.38290, 0.35446, 0.39218, 0.38165, 0.42239),
        tolerance=1e-3,  # 1e-4 there, between GPUs of one kind
        numpy_latents=True,
    ),
    "sd 2.0 at 768, ddim": Slice(
        ("768-v-ema.safetensors", "768-v-ema.ckpt", "stable-diffusion-2"),
        SQUIRREL | {"sampler": "ddim", "spacing": "leading", "steps": 20},
        (0.1868, 0.1922, 0.1527, 0.1921, 0.1908, 0.1624, 0.1779, 0.1652, 0.1734),
        tolerance=1e-2,
        rows=slice(253, 256),
    ),
    "sd 2.0 at 768, euler": Slice(
        ("768-v-ema.safetensors", "768-v-ema.ckpt", "stable-diffusion-2"),
        SQUIRREL | {"sampler": "euler", "spacing": "linspace", "steps": 5},
        (0.1781, 0.1695, 0.1661, 0.1705, 0.1588, 0.1699, 0.2005, 0.1589, 0.1677),
        tolerance=1e-2,
        rows=slice(253, 256),
    ),
    "sd 2.1 at 768, ddim, fp16": Slice(
        ("v2-1_768-ema-pruned.safetensors", "v2-1_768-ema-pruned.ckpt", "stable-diffusion-2-1"),
        SQUIRREL | {"sampler": "ddim", "spacing": "leading", "steps": 20},
        (0.4209, 0.4087, 0.4097, 0.4209, 0.3860, 0.4329, 0.4280, 0.4324, 0.4187),
        tolerance=5e-2,
        rows=slice(253, 256),
        dtype=torch.float16,
    ),
    "sdxl-turbo, euler_ancestral, fp16": Slice(
        ("sd_xl_turbo_1.0_fp16.safetensors", "sdxl-turbo"),
        {
            "prompt": "A small cactus with a happy face in the Sahara desert.",
            **{"sampler": "euler_ancestral", "spacing": "trailing", "steps": 1},
            "guidance_scale": 0.0,
        },
        (0.3524, 0.3160, 0.3652, 0.3316, 0.3376, 0.3315, 0.3042, 0.3102, 0.3449),
        tolerance=5e-2,
        dtype=torch.float16,
    ),
}


def find(*names: str) -> Path:
    """The first of `names` that is in FOLDER; skips the test where none is."""
    for name in names:
        if (FOLDER / name).exists():
            return FOLDER / name
    pytest.skip(f"{FOLDER} has no {' or '.join(names)}: put it there, or name its folder in LDM_WEIGHTS")


@pytest.mark.parametrize("name", DIGESTS)
def test_an_official_file_is_whole_and_taken_for_what_it_is(name):
    path = find(name)
    found = digest(path)
    assert found in DIGESTS[name], f"{path} has sha256 {found}: damaged, or not the published file"
    preset = known_files()[found].preset
    if preset is not None and path.suffix == ".safetensors":
        assert identify(path).preset == preset


@pytest.mark.parametrize("name", SLICES)
def test_a_published_picture_comes_out_again(name, tmp_path, monkeypatch):
    case = SLICES[name]
    path = find(*case.files)
    if path.suffix == ".ckpt":
        convert(path, tmp_path / "model.safetensors", layout="ldm")
        path = tmp_path / "model.safetensors"
    if case.numpy_latents:
        drawn = np.random.RandomState(0).standard_normal((1, 4, 64, 64))
        latents = torch.from_numpy(drawn).float()
        monkeypatch.setattr("ldm.pipeline.seeded_noise", lambda seeds, shape: lambda: latents)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    dtype = case.dtype if torch.cuda.is_available() else torch.float32
    pipe = ldm.load(path, ldm.Placement(dtype=dtype))
    *_, last = pipe.stream(ldm.Request(**case.request, negative_prompt="", seed=0))
    with torch.no_grad():
        image = pipe.vae.decode(last.x.to(next(pipe.vae.parameters())))[0, -1]  # h w, blue
    values = (image / 2 + 0.5).clamp(0, 1)[case.rows, case.rows].flatten().float().cpu()
    difference = (values - torch.tensor(case.values)).abs().max().item()
    print(f"{name}: {difference:.1e}")
    assert difference < case.tolerance
