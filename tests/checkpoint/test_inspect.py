"""What `inspect` reports of models, parts, adapters and damaged files, from headers alone."""

import json

import pytest

from ldm.checkpoint import sources
from ldm.checkpoint.files import save
from ldm.checkpoint.known import KnownFile
from ldm.cli import inspect as module
from ldm.cli.inspect import inspect
from tests.checkpoint.families import small_model
from tests.checkpoint.standin import SCHEDULE, ema_shapes, official_shapes, write_hollow

UNET = "model.diffusion_model."


def test_a_model_is_reported_with_its_components_and_what_is_beside_them(tmp_path):
    shapes = official_shapes("sdxl-base")
    extra = dict.fromkeys(SCHEDULE, (1000,)) | ema_shapes(shapes)
    metadata = {"modelspec.title": "XL", "modelspec.thumbnail": "A" * 1000}
    report = inspect(write_hollow(tmp_path / "file", shapes | extra, metadata))
    assert (report.kind, report.preset, report.layout) == ("a model", "sdxl-base", "ldm")
    assert (report.prediction, report.problem or None, report.ema) == ("eps", None, 1680)
    assert [(c.name, c.parameters, c.dtypes) for c in report.components] == [
        ("unet", 2_567_463_684, {"F16": 1680}),  # the published counts
        ("vae", 83_653_863, {"F16": 248}),
        ("text_encoder", 123_060_480, {"F16": 196}),
        ("text_encoder_2", 694_659_840, {"F16": 389}),
    ]
    assert report.metadata["modelspec.thumbnail"].endswith("... (1,000 characters)")
    text = str(report)
    for line in (
        "predicts     eps: 320 model channels and text of width 2048 are Stable Diffusion XL",
        "ema          1680 tensors, an averaged copy of the UNet",
        "model_ema.* (1682)",
        "metadata     modelspec.title: XL",
        "loads        yes",
    ):
        assert line in text
    assert json.loads(json.dumps(report.as_dict()))["components"][0]["name"] == "unet"


def test_a_model_with_something_else_beside_it_is_a_model(tmp_path):
    beside = {"control_model.input_hint_block.0.weight": (16, 3, 3, 3), "lora_te_x.lora_down.weight": (4, 768)}
    report = inspect(write_hollow(tmp_path / "file", official_shapes("sd15") | beside))
    assert (report.kind, report.problem or None) == ("a model", None)
    assert set(report.unknown) == set(beside)


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    shapes = dict(official_shapes("sd15"))
    del shapes[f"{UNET}out.0.weight"]
    shapes |= {f"{UNET}out.0.bias": (7,), f"{UNET}extra.weight": (2, 2), "junk": (3,)}
    report = inspect(write_hollow(tmp_path / "file", shapes))
    assert report.missing == (f"{UNET}out.0.weight",)
    assert report.misshapen == (f"{UNET}out.0.bias [7] instead of [320]",)
    assert set(report.unknown) == {f"{UNET}extra.weight", "junk"}
    assert "loads        no: names or shapes" in str(report)


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        (
            {"lora_unet_down_blocks_0_attentions_0_attn2_to_k.lora_down.weight": (8, 2048)},
            "a LoRA for Stable Diffusion XL",
        ),
        ({"unet.down_blocks.0.attn2.to_k.lora_A.weight": (8, 768)}, "a LoRA for Stable Diffusion 1.x"),
        ({"emb_params": (4, 1024)}, "a textual-inversion embedding for Stable Diffusion 2.x"),
        ({"clip_l": (4, 768), "clip_g": (4, 1280)}, "a textual-inversion embedding for Stable Diffusion XL"),
        (
            {"control_model.input_hint_block.0.weight": (16, 3, 3, 3), "control_model.x.attn2.to_k.weight": (320, 768)},
            "a ControlNet for Stable Diffusion 1.x",
        ),
    ],
)
def test_adapters_are_named_with_the_family_that_they_are_for(shapes, kind, tmp_path):
    report = inspect(write_hollow(tmp_path / "file", shapes))
    assert report.kind == kind
    assert f"file is {kind}: give a full checkpoint" in report.problem


def test_a_part_says_what_is_lacking(tmp_path):
    save(small_model("sd15"), tmp_path / "m")
    report = inspect(tmp_path / "m/vae")
    assert report.kind == "a part of a model: vae"
    assert (report.preset, report.prediction) == (None, None)
    assert "has no unet, only vae" in report.problem
    assert not inspect(tmp_path / "m").problem


def test_a_model_of_an_unsupported_family_says_which(tmp_path):
    shapes = {n: s for n, s in official_shapes("sd21", 5).items() if n.startswith(UNET)}
    report = inspect(write_hollow(tmp_path / "file", shapes))
    assert "Stable Diffusion 2 depth-to-image" in report.problem


def test_the_sha256_is_looked_up_on_request_only(tmp_path, monkeypatch):
    path = write_hollow(tmp_path / "file", official_shapes("sd15"))
    assert inspect(path).sha256 is None
    monkeypatch.setattr(module, "digest", lambda _: "0" * 64)
    assert "not among the known files" in str(inspect(path, check_sha256=True))
    for place in (module, sources):
        monkeypatch.setattr(place, "known_files", lambda: {"0" * 64: KnownFile("v1-5.safetensors", "sd15")})
    report = inspect(path, check_sha256=True)
    assert (report.sha256, report.known_as) == ("0" * 64, "v1-5.safetensors")
    assert "by its sha256 it is v1-5.safetensors" in report.why


def test_what_is_no_file_of_tensors_is_an_error(tmp_path):
    (tmp_path / "page").write_text("<!DOCTYPE html>")
    with pytest.raises(ValueError, match="is a web page"):
        inspect(tmp_path / "page")
    with pytest.raises(ValueError, match="does not exist"):
        inspect(tmp_path / "none")
    with pytest.raises(ValueError, match="is not a model folder"):
        inspect(tmp_path)
