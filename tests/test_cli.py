"""The `ldm` command: what it writes and prints, and one sentence with exit code 2 for every bad input."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import ldm
from ldm import jobs
from ldm.checkpoint import files
from ldm.cli import main
from ldm.cli.options import add_options, given
from ldm.outputs import Outputs
from ldm.pictures import read_texts, save_png
from ldm.placement.packing import can_pack
from ldm.record import digest
from ldm.training import evaluate, objects, recipes
from ldm.training.data import DataConfig
from ldm.training.loop import Interrupted
from tests.tiny import TINY_REFINER, TINY_SDXL, random_networks
from tests.training.drawn import write_archive


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """Run each test in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def txt2img(model_folder, capsys):
    """Run `ldm txt2img` with the tiny random model; returns exit code, stdout and what went wrong on stderr."""

    def run(*words: str, model: bool = True) -> tuple[int, str, str]:
        given = ["--model", str(model_folder)] if model else []
        if "--from" not in words:
            given += ["--steps", "2", "--device", "cpu"]
        code = main(["txt2img", *given, *words])
        out, err = capsys.readouterr()
        lines = err.splitlines(keepends=True)
        return code, out, "".join(x for x in lines if not x.startswith(f"ldm: {model_folder}: "))

    return run


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def edit_record(source: str, target: str, **changes: object) -> None:
    """Copy a picture with some entries of its record changed."""
    record = json.loads(read_texts(source)["ldm"]) | changes
    save_png(Image.open(source), target, {"ldm": json.dumps(record)})


def test_a_prompt_makes_the_picture_that_the_pipeline_makes(txt2img, pipe, here):
    assert txt2img("a frog") == (0, "out.png\n", "")
    expected = pipe.generate(ldm.Request("a frog", steps=2))[0]
    assert np.array_equal(pixels("out.png"), expected)
    assert os.listdir(here) == ["out.png"]


def test_what_a_model_is_taken_for_and_why_is_said_but_for_the_bundled_one(model_folder, capsys):
    words = ["a frog", "--steps", "1", "--device", "cpu"]
    main(["txt2img", *words, "--model", str(model_folder), "--prediction", "v"])
    err = capsys.readouterr().err
    assert err.startswith(f"ldm: {model_folder}: random; ")
    assert "you asked for v" in err
    main(["txt2img", *words])
    assert capsys.readouterr().err == ""


def test_every_option_reaches_the_request_and_is_reported(txt2img):
    code, out, _ = txt2img(
        "a frog",
        *"--negative bad --steps 3 --sampler euler_ancestral --schedule karras --guidance 2 --rescale 0.5".split(),
        *"--seed 9 --images 2 --width 36 --height 20 --dtype bfloat16 --vae-dtype bfloat16".split(),
        *"--attention sliced --out frog.png --json".split(),
    )
    results = json.loads(out)
    assert code == 0
    assert results["files"] == ["frog-00001.png", "frog-00002.png"]
    assert results["seeds"] == [9, 10]
    assert list(results["seconds"]) == ["load", "sample", "decode", "save"]
    settings = results["settings"]
    assert settings["request"] == {
        "prompt": "a frog",
        "negative_prompt": "bad",
        "steps": 3,
        "guidance_scale": 2.0,
        "guidance_rescale": 0.5,
        "sampler": "euler_ancestral",
        "spacing": "karras",
        "width": 36,
        "height": 20,
        "seed": 9,
        "images": 2,
    }
    assert settings["placement"] == {
        "device": "cpu",
        "dtype": "bfloat16",
        "vae_dtype": "bfloat16",
        "attention": "sliced",
        "guidance": "batched",
        "vae_memory": "whole",
        "compile": False,
        "packed": can_pack(),
    }
    assert settings["resolved"] == {
        "steps": 3,
        "steps_run": 3,
        "guidance_scale": 2.0,
        "sampler": "euler_ancestral",
        "spacing": "karras",
        "width": 36,
        "height": 20,
    }
    assert settings["environment"]["torch"] == torch.__version__
    assert pixels("frog-00002.png").shape == (20, 36, 3)


@pytest.mark.skipif(not can_pack(), reason="this torch is built without oneDNN")
@pytest.mark.parametrize(("words", "packed"), [([], True), (["--no-packed"], False), (["--compile"], False)])
def test_the_command_packs_weights_on_a_cpu_unless_told_otherwise(words, packed):
    command = argparse.ArgumentParser()
    add_options(command, ldm.Placement)
    words = given(command.parse_args([*words, "--device", "cpu"]), ldm.Placement)
    assert ldm.Placement.fast(**words).packed is packed


def test_a_guidance_interval_is_two_numbers_and_remembered(txt2img):
    words = ["--guidance-interval", "0.5", "3", "--out", "a.png", "--json"]
    settings = json.loads(txt2img("a frog", *words)[1])["settings"]
    assert settings["request"]["guidance_interval"] == [0.5, 3.0]
    assert txt2img("--from", "a.png", "--out", "b.png", model=False)[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    txt2img("a frog", "--out", "c.png")
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))


def test_clip_skip_is_counted_as_a1111_counts_told_to_it_and_remembered(txt2img):
    code, out, _ = txt2img("a frog", "--clip-skip", "2", "--out", "a.png", "--json")
    assert code == 0
    assert json.loads(out)["settings"]["request"]["clip_skip"] == 2
    assert ", Clip skip: 2, " in read_texts("a.png")["parameters"]
    assert txt2img("--from", "a.png", "--out", "b.png", model=False)[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    txt2img("a frog", "--out", "c.png")
    txt2img("a frog", "--clip-skip", "1", "--out", "d.png")  # the model's own
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))
    assert np.array_equal(pixels("c.png"), pixels("d.png"))
    for plain in ("c.png", "d.png"):
        assert "Clip skip" not in read_texts(plain)["parameters"]
    txt2img("--from", "a.png", "--clip-skip", "1", "--out", "e.png", model=False)
    assert np.array_equal(pixels("e.png"), pixels("c.png"))


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ("0", "clip_skip must be a whole number, 1 or more, got 0"),
        ("3", "clip_skip must be from 1 (the last layer) to 2, the layers of this model's text encoder, got 3"),
    ],
)
def test_a_clip_skip_that_is_no_layer_is_refused(txt2img, skip, message):
    code, _, err = txt2img("a frog", "--clip-skip", skip)
    assert (code, err) == (2, f"ldm: error: {message}\n")
    assert not Path("out.png").exists()


def test_one_grid_holds_all_the_pictures(txt2img):
    assert txt2img("a frog", "--images", "3", "--grid", "--out", "grid.png")[:2] == (0, "grid.png\n")
    txt2img("a frog", "--images", "3", "--out", "one.png")
    sheet = pixels("grid.png")
    assert sheet.shape == (64, 64, 3)
    assert np.array_equal(sheet[32:, :32], pixels("one-00003.png"))


def test_the_default_name_takes_the_next_free_number(txt2img):
    assert txt2img("a frog")[1] == "out.png\n"
    assert txt2img("a frog")[1] == "out-00001.png\n"
    assert txt2img("a frog", "--images", "2")[1] == "out-00002.png\nout-00003.png\n"
    Path("out-00007.png").touch()
    assert txt2img("a frog")[1] == "out-00008.png\n"
    assert Path("out-00007.png").stat().st_size == 0


def test_an_existing_file_is_replaced_only_with_overwrite(txt2img):
    Path("a.png").write_bytes(b"precious")
    code, _, err = txt2img("a frog", "--out", "a.png")
    assert (code, err) == (2, "ldm: error: a.png exists; choose another --out, or add --overwrite\n")
    assert Path("a.png").read_bytes() == b"precious"
    assert txt2img("a frog", "--out", "a.png", "--overwrite")[0] == 0
    assert pixels("a.png").shape == (32, 32, 3)
    Path("b-00002.png").touch()
    assert "b-00002.png exists" in txt2img("a frog", "--out", "b.png", "--images", "2")[2]


def test_the_png_tells_other_programs_how_it_was_made(txt2img, model_folder):
    txt2img("a frog, green", "--negative", "bad", "--seed", "4", "--images", "2", "--out", "a.png")
    text = read_texts("a-00002.png")["parameters"]
    assert re.fullmatch(
        r"a frog, green\nNegative prompt: bad\nSteps: 2, Sampler: DPM\+\+ 2M, Schedule type: Leading, "
        r"CFG scale: 3.0, Seed: 5, Size: 32x32, Model hash: [0-9a-f]{10}, Model: random, RNG: CPU, "
        rf"Version: ldm {re.escape(ldm.__version__)}",
        text,
    )


def test_help_says_what_holds_where_an_option_is_not_given(capsys):
    with pytest.raises(SystemExit):
        main(["txt2img", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "denoising steps, 1 to 1000 (default: the model's)" in out
    assert "number of pictures (default: 1)" in out


def test_metadata_can_be_left_out(txt2img):
    txt2img("a frog", "--no-metadata")
    assert read_texts("out.png") == {}


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_a_picture_is_repeated_from_its_file_bit_for_bit(txt2img, sampler):
    txt2img("a frog 🐸", "--seed", "-1", "--sampler", sampler, "--guidance", "2.5", "--out", "a.png")
    code, out, err = txt2img("--from", "a.png", "--out", "b.png", model=False)
    assert (code, out, err) == (0, "b.png\n", "")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_a_job_of_a_program_may_name_its_model_by_a_path(txt2img, model_folder, here):
    job = jobs.Job(ldm.Request("a frog", steps=2), jobs.ModelChoice(model_folder), ldm.Placement.fast(device="cpu"))
    jobs.run(job, jobs.load_models(job.model, job.placement), Outputs(here / "a.png", job.count))
    assert txt2img("--from", "a.png", "--out", "b.png", model=False)[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_one_picture_of_a_batch_is_repeated_alone_and_a_grid_as_a_grid(txt2img):
    txt2img("a frog", "--images", "3", "--out", "a.png")
    txt2img("--from", "a-00002.png", "--out", "b.png", model=False)
    assert Path("a-00002.png").read_bytes() == Path("b.png").read_bytes()
    txt2img("--from", "a-00002.png", "--grid", "--out", "c.png", model=False)
    txt2img("--from", "c.png", "--out", "d.png", model=False)
    assert Path("c.png").read_bytes() == Path("d.png").read_bytes()
    assert pixels("d.png").shape == (64, 64, 3)


def test_options_beside_from_change_that_picture(txt2img):
    txt2img("a frog", "--images", "3", "--seed", "5", "--out", "a.png")
    _, out, _ = txt2img("--from", "a-00002.png", "--sampler", "euler", "--json", model=False)
    request = json.loads(out)["settings"]["request"]
    assert (request["prompt"], request["seed"], request["images"]) == ("a frog", 6, 1)
    assert request["sampler"] == "euler"
    _, out, _ = txt2img("a cat", "--from", "a-00002.png", "--dtype", "bfloat16", "--json")
    settings = json.loads(out)["settings"]
    assert (settings["request"]["prompt"], settings["placement"]["dtype"]) == ("a cat", "bfloat16")


def test_another_sampler_is_not_given_the_options_of_the_recorded_one(txt2img):
    txt2img("a frog", "--sampler", "ddim", "--sampler-options", "eta=0.5", "--out", "a.png")
    code, out, _ = txt2img("--from", "a.png", "--sampler", "heun", "--json")
    assert code == 0
    assert "sampler_options" not in json.loads(out)["settings"]["request"]
    code, out, _ = txt2img("--from", "a.png", "--sampler", "ddim", "--json")
    assert json.loads(out)["settings"]["request"]["sampler_options"] == {"eta": 0.5}


def test_weights_that_were_packed_on_a_cpu_are_not_on_another_device_and_not_compiled(txt2img, monkeypatch):
    txt2img("a frog", "--out", "a.png")
    seen = []
    fast = ldm.Placement.fast
    monkeypatch.setattr(ldm.Placement, "fast", lambda **names: seen.append(names) or fast(device="cpu"))
    for words in (["--device", "cuda"], ["--compile"], ["--device", "cpu"], []):
        txt2img("--from", "a.png", "--overwrite", *words, model=False)
    assert ["packed" in names for names in seen] == [False, False, True, True]


@pytest.fixture
def sdxl(monkeypatch):
    """Make `ldm txt2img` work with a tiny SDXL, whatever model it is told."""
    pipe = ldm.Pipeline(TINY_SDXL, *random_networks(TINY_SDXL))
    monkeypatch.setattr("ldm.jobs.load", lambda *_, **__: pipe)


def test_sdxls_conditioning_is_remembered_and_follows_another_size(sdxl, txt2img):
    words = ["--original-width", "99", "--crop-top", "5", "--crop-left", "6"]
    _, out, _ = txt2img("a frog", *words, "--target-height", "7", "--out", "a.png", "--json")
    settings = json.loads(out)["settings"]
    assert "negative_prompt" not in settings["request"]  # zeros
    asked = {"original_width": 99, "crop_top": 5, "crop_left": 6, "target_height": 7}
    assert settings["request"]["sizes"] == asked
    resolved = settings["resolved"]
    conditioning = {
        "original_width": 99,
        "original_height": 32,
        "crop_top": 5,
        "crop_left": 6,
        "target_width": 32,
        "target_height": 7,
    }
    assert {name: resolved[name] for name in conditioning} == conditioning
    assert "aesthetic_score" not in resolved
    txt2img("--from", "a.png", "--out", "b.png", model=False)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    _, out, _ = txt2img("--from", "a.png", "--width", "40", "--height", "16", "--json", model=False)
    resolved = json.loads(out)["settings"]["resolved"]
    conditioning |= {"original_height": 16, "target_width": 40}  # sizes that were not asked follow
    assert {name: resolved[name] for name in conditioning} == conditioning


def test_the_scores_of_the_refiner_are_remembered_beside_the_sizes_of_the_base_model(txt2img, monkeypatch, here):
    (here / "refiner").mkdir()
    pipes = [ldm.Pipeline(config, *random_networks(config)) for config in (TINY_SDXL, TINY_REFINER)]
    monkeypatch.setattr("ldm.jobs.load", lambda path, *_, **__: pipes[path == "refiner"])
    words = ["--refiner", "refiner", "--steps", "10", "--crop-top", "5", "--aesthetic-score", "3"]
    txt2img("a frog", *words, "--out", "a.png")
    txt2img("--from", "a.png", "--out", "b.png", model=False)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_an_empty_negative_prompt_is_remembered_because_sdxl_draws_another_picture_without_one(sdxl, txt2img):
    txt2img("a frog", "--out", "none.png")
    txt2img("a frog", "--negative", "", "--out", "a.png")
    txt2img("--from", "a.png", "--out", "b.png", model=False)
    assert not np.array_equal(pixels("a.png"), pixels("none.png"))
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_a_default_conditioning_is_no_obstacle_for_a_model_without_one(sdxl, txt2img, monkeypatch, here):
    txt2img("a frog", "--out", "a.png")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    code, out, _ = txt2img("--from", "a.png", "--out", "b.png", "--json")
    assert code == 0
    assert "crop_top" not in json.loads(out)["settings"]["resolved"]


def test_repeating_with_other_files_under_the_models_name_is_refused(txt2img, model_folder):
    txt2img("a frog", "--out", "a.png")
    record = json.loads(read_texts("a.png")["ldm"])
    edit_record("a.png", "b.png", sha256=record["sha256"] | {"model": "0" * 64})
    code, _, err = txt2img("--from", "b.png", model=False)
    assert code == 2
    assert f"{model_folder} is not the model that made the picture" in err
    assert txt2img("--from", "b.png")[0] == 0  # --model given


@pytest.fixture
def other_vae(model_folder, here) -> str:
    """A folder with a VAE that paints otherwise than the tiny random model's."""
    vae = files.load(model_folder).vae
    vae.decoder.conv_out.weight.neg_()
    files.save_vae(vae, "vae", image_size=32)
    return "vae"


def test_how_a_model_was_read_is_remembered_and_repeated(txt2img, other_vae):
    txt2img("a frog", "--out", "plain.png")
    words = ["--vae", other_vae, "--prediction", "v", "--out", "a.png", "--json"]
    settings = json.loads(txt2img("a frog", *words)[1])["settings"]
    used = settings["model"]
    assert (used["prediction"], used["ema"], used["vae"]) == ("v", False, "vae")
    assert settings["sha256"]["vae"] == digest(other_vae)
    assert "you asked for v" in settings["why"]
    assert not np.array_equal(pixels("a.png"), pixels("plain.png"))
    text = read_texts("a.png")["parameters"]
    assert f"Model: random, VAE hash: {digest(other_vae)[:10]}, VAE: vae, RNG" in text
    assert txt2img("--from", "a.png", "--out", "b.png", model=False)[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    txt2img("--from", "a.png", "--prediction", "eps", "--out", "c.png", model=False)
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))
    txt2img("--from", "a.png", "--out", "d.png")  # --model given: as it is
    assert np.array_equal(pixels("d.png"), pixels("plain.png"))


def test_repeating_with_another_file_in_place_of_a_part_is_refused(txt2img, other_vae):
    txt2img("a frog", "--vae", other_vae, "--out", "a.png")
    vae = files.load_vae(other_vae)
    vae.decoder.conv_out.weight.neg_()
    files.save_vae(vae, other_vae, image_size=32)
    code, _, err = txt2img("--from", "a.png", model=False)
    assert code == 2
    assert err == ("ldm: error: vae is not the vae that made the picture; to use it all the same, name it with --vae\n")
    assert txt2img("--from", "a.png", "--vae", other_vae, model=False)[0] == 0


@pytest.mark.parametrize("command", ["txt2img", "evaluate"])
def test_every_word_about_the_model_reaches_load(monkeypatch, capsys, command):
    asked = {}

    def load(*args, **options):
        asked.update(options, path=args[0], device=str(args[1].device))
        raise ValueError("enough")

    monkeypatch.setattr("ldm.jobs.load", load)
    monkeypatch.setattr(objects, "emoji_sprites", lambda font, fluent: {"flat": {}})
    monkeypatch.setattr(evaluate, "fixed_scenes", lambda concepts, styles: {})
    words = ["--model", "m", "--vae", "v", "--unet", "u", "--text-encoder", "t", "--ema", "--lora", "l:0.5"]
    prompt = ["a frog", "--embedding", "e", "--embedding", "n=f"] if command == "txt2img" else []
    assert main([command, *prompt, *words, "--prediction", "x0", "--device", "cpu"]) == 2
    assert asked == {
        "path": "m",
        "device": "cpu",
        "prediction": "x0",
        "ema": True,
        "vae": "v",
        "unet": "u",
        "text_encoder": "t",
        "embeddings": ("e", "n=f") if prompt else (),
        "loras": ("l:0.5",),
    }


def test_repeating_on_other_versions_or_hardware_says_what_differs(txt2img):
    txt2img("a frog", "--out", "a.png")
    then = json.loads(read_texts("a.png")["ldm"])["environment"]
    edit_record("a.png", "b.png", environment=then | {"torch": "1.4", "threads": 99})
    code, out, err = txt2img("--from", "b.png", model=False)
    assert (code, out) == (0, "out.png\n")
    assert err == (
        f"ldm: warning: b.png was made with torch 1.4 (here {torch.__version__}), threads 99 (here 1); "
        "the new picture may differ in the last bits\n"
    )


def test_a_record_of_the_first_version_is_followed(txt2img, sdxl, other_vae):
    words = ["--vae", other_vae, "--guidance", "2", "--images", "2", "--out", "a.png"]
    txt2img("a frog", *words, "--original-width", "99")
    new = json.loads(read_texts("a-00002.png")["ldm"])
    sizes = {name: value for name, value in new["resolved"].items() if "_" in name and name not in new["request"]}
    sizes.pop("steps_run")
    record = {
        "command": "txt2img",
        "request": {**new["request"], **sizes, "steps": 2, "sampler": "dpmpp_2m"},
        "model": {
            "path": new["model"]["model"], "name": "random", "sha256": new["sha256"]["model"], "ema": False,
            "vae": {"path": "vae", "sha256": new["sha256"]["vae"]},
        },
        "placement": new["placement"] | {"int8": False},
        "environment": new["environment"] | {"transformers": "5.0.0"},
        "picture": 1,
    }  # fmt: skip
    record["request"].pop("sizes")
    save_png(Image.open("a-00002.png"), "b.png", {"ldm": json.dumps(record)})
    code, _, err = txt2img("--from", "b.png", "--out", "c.png", model=False)
    assert (code, err) == (0, "")
    assert np.array_equal(pixels("a-00002.png"), pixels("c.png"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"request": {"prompt": "a", "wings": 2}}, "b.png: request: unknown 'wings'"),
        ({"request": {"steps": 2}}, "b.png: request lacks prompt; .* give the prompt and options yourself"),
        ({"request": {"prompt": "a", "steps": 0}}, "steps must be a whole number"),
        ({"task": "rm"}, "b.png: task must be one of 'txt2img', 'img2img', 'inpaint', 'edit', got 'rm'"),
        ({"picture": 1}, "b.png: picture must be one of the 1 of its request, got 1"),
        ({"placement": {"devise": "cpu"}}, "unexpected keyword argument 'devise'; .* give the prompt"),
        ({"command": "txt2img", "model": 3}, "'int' object is not iterable; .* give the prompt"),
    ],
)
def test_a_record_that_cannot_be_followed_is_refused(txt2img, changes, message):
    txt2img("a frog", "--out", "a.png")
    edit_record("a.png", "b.png", **changes)
    code, _, err = txt2img("--from", "b.png", model=False)
    assert code == 2
    assert re.search(message, err)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "x.png holds no record of how ldm made it"),
        ("{", "x.png: its 'ldm' chunk is not JSON"),
        ("[]", "x.png: its 'ldm' chunk is not a JSON object"),
        ("[" * 10**5, "x.png: its 'ldm' chunk is not JSON"),
    ],
)
def test_a_picture_without_a_readable_record_cannot_be_repeated(txt2img, text, message):
    save_png(Image.new("RGB", (1, 1)), "x.png", {} if text is None else {"ldm": text})
    code, _, err = txt2img("--from", "x.png", model=False)
    assert code == 2
    assert err.startswith(f"ldm: error: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a prompt in quotes, or --from a picture that ldm made"),
        (["a frog", "--steps", "0"], "steps must be a whole number from 1 to 1000, got 0"),
        (["a frog", "--width", str(2**64)], "width must be a whole number from 1 to 65536, got 1844"),
        (["a frog", "--crop-top", str(2**64)], "crop_top must be a whole number from 0 to 65536"),
        (["a frog", "--images", str(10**9)], "images must be a whole number from 1 to 99999"),
        (["a frog", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["a frog", "--guidance", "nan"], "guidance_scale must be a finite number, 0 or more"),
        (["a frog", "--guidance-interval", "1"], "--guidance-interval: expected 2 arguments"),
        (
            ["a frog", "--guidance-interval", "2", "1"],
            "guidance_interval needs two noise levels, 0 <= low < high, got 2.0 and 1.0",
        ),
        (["a frog", "--sampler", "plms"], "sampler must be one of ddpm, ddim"),
        (["a frog", "--seed", str(2**64)], "seeds must lie below 2^64"),
        (["a frog", "--width", "30"], "width must be a multiple of 4 pixels for this model, got 30"),
        (["a frog", "--crop-top", "9"], "crop_top is 9, and the model random is conditioned on"),
        (["a frog", "--aesthetic-score", "7"], "aesthetic_score is 7.0, and the model random"),
        (["a frog", "--images", "0"], "images must be a whole number from 1 to 99999, got 0"),
        (["a frog", "--dtype", "float16"], "dtype float16 is up to 200 times slower"),
        (["a frog", "--dtype", "int8"], "dtype must be one of float32, float16, bfloat16"),
        (["a frog", "--device", "cuda:99"], "device cuda:99 is not available"),
        (["a frog", "--attention", "flash"], "attention must be one of sdpa, sliced, math"),
        (["a frog", "--out", "a.jpg"], "--out must end in .png, such as a.png, got 'a.jpg'"),
        (["a frog", "--out", ""], "--out must end in .png, such as out.png, got '.'"),
        (["a frog", "--out", "folder.png/"], "folder.png exists; choose another --out"),
        (["a frog", "--out", "a"], "--out must end in .png, such as a.png, got 'a'"),
        (["a frog", "--out", "no/a.png"], "there is no folder no to write a.png into"),
        (["a frog", "--out", "folder.png", "--overwrite"], "folder.png is a folder"),
        (["a frog", "--out", "x" * 300 + ".png"], "File name too long"),
        (["a frog", "--model", "no/model"], "no/model does not exist"),
        (["a frog", "--vae", "no/vae"], "no/vae does not exist"),
        (["a frog", "--ema"], "holds one set of weights: leave out ema"),
        (["a frog", "--prediction", "w"], "prediction must be one of eps, v, x0, got 'w'"),
        (["a frog", "--model", "text.safetensors"], "text.safetensors"),
        (["a frog", "--from", "no.png"], "the picture no.png cannot be read: No such file or directory"),
        (["a frog", "on grass"], "unrecognized arguments: on grass"),
        (["a frog", "--wings", "2"], "unrecognized arguments: --wings"),
        (
            ["--sampler-options", "eta=1", "a frog"],
            "give NAME=NUMBER such as eta=0.5, and the prompt before this option",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(txt2img, here, words, message):
    (here / "folder.png").mkdir()
    (here / "text.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    code, out, err = txt2img(*words)
    assert (code, out) == (2, "")
    assert err.startswith("ldm: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(os.listdir(here)) == ["folder.png", "text.safetensors"]


def test_a_folder_that_cannot_be_written_is_noticed_before_the_work(txt2img, monkeypatch):
    def refuse(self: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr("ldm.jobs.load", None)  # must not get that far
    code, _, err = txt2img("a frog")
    assert (code, err) == (2, "ldm: error: cannot write into .: Permission denied\n")


def test_a_prompt_that_is_cut_is_a_warning_on_one_line(txt2img):
    code, _, err = txt2img("frogs " * 20)
    assert code == 0
    assert err.startswith("ldm: warning: the prompt has 100 tokens and the text encoder reads 30")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "not enough memory"),
        (torch.OutOfMemoryError("Tried to allocate 2 GiB"), 1, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "not enough memory"),
        (FloatingPointError("the VAE gave numbers"), 1, "the VAE gave numbers"),
        (OSError(28, "No space left on device", "a.png"), 2, "a.png: No space left on device"),
    ],
)
def test_what_goes_wrong_later_is_a_sentence_too(txt2img, here, monkeypatch, error, code, message):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("ldm.jobs.load", fail)
    exit_code, _, err = txt2img("a frog")
    assert exit_code == code
    assert err.startswith(f"ldm: error: {message}")
    assert os.listdir(here) == []


def test_a_defect_of_the_program_keeps_its_traceback(txt2img, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("ldm.jobs.load", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        txt2img("a frog")


def test_progress_is_shown_on_a_terminal(txt2img, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, out, err = txt2img("a frog")
    assert out == "out.png\n"
    assert "2/2" in err


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["txt2img", "--help"]])
def test_version_and_help_are_printed(capsys, words):
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert out == f"ldm {ldm.__version__}\n" if words == ["--version"] else "usage: ldm" in out


def test_the_command_runs_as_a_process_of_its_own():
    check = "import ldm.cli, sys; sys.exit(ldm.cli.main(['txt2img']))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "ldm: error: give a prompt in quotes, or --from a picture that ldm made\n"


def test_a_picture_too_large_to_be_a_picture_is_refused_as_a_source(txt2img, monkeypatch):
    save_png(Image.new("RGB", (100, 100)), "x.png")
    monkeypatch.setattr("ldm.pictures.MAX_PIXELS", 9999)
    err = txt2img("--from", "x.png", model=False)[2]
    assert "x.png cannot be read: it has 100 x 100 pixels, of at most 9,999 in all" in err
    assert PngImagePlugin.MAX_TEXT_CHUNK == 2**20  # what bounds a record


@pytest.fixture
def meanwhile(monkeypatch):
    """Let another program write files while the command works."""
    load = ldm.load

    def write(*names: str) -> None:
        def loading(*args: object, **options: object) -> ldm.Pipeline:
            for name in names:
                Path(name).write_bytes(b"precious")
            return load(*args, **options)

        monkeypatch.setattr("ldm.jobs.load", loading)

    return write


@pytest.mark.parametrize(
    ("words", "taken", "made"),
    [
        ([], ["out.png"], ["out-00001.png"]),
        ([], ["out.png", "out-00004.png"], ["out-00005.png"]),
        (["--images", "2"], ["out-00001.png"], ["out-00002.png", "out-00003.png"]),
        (["--images", "2"], ["out-00002.png"], ["out-00001.png", "out-00003.png"]),
        (["--images", "2", "--grid"], ["out.png"], ["out-00001.png"]),
    ],
)
def test_a_name_that_is_taken_during_the_work_costs_no_picture(txt2img, meanwhile, here, words, taken, made):
    meanwhile(*taken)
    assert txt2img("a frog", *words) == (0, "".join(f"{name}\n" for name in made), "")
    assert all(pixels(name).shape[2] == 3 for name in made)
    assert [Path(name).read_bytes() for name in taken] == [b"precious"] * len(taken)
    assert sorted(os.listdir(here)) == sorted(taken + made)


def test_a_given_name_that_is_taken_during_the_work_is_an_error_and_the_picture_is_kept(txt2img, meanwhile, here):
    meanwhile("a.png", "b-00002.png")
    code, out, err = txt2img("a frog", "--out", "a.png")
    assert (code, out) == (2, "a-00001.png\n")
    assert err == (
        "ldm: error: another program wrote a.png during the work, so the pictures are kept as a-00001.png; "
        "choose another --out, or add --overwrite\n"
    )
    assert Path("a.png").read_bytes() == b"precious"
    Path("b-00002.png").unlink()
    code, out, err = txt2img("a frog", "--images", "3", "--out", "b.png", "--json")
    files = ["b-00001.png", "b-00002-00001.png", "b-00003.png"]
    assert (code, json.loads(out)["files"]) == (2, files)
    assert [read_texts(file)["parameters"].count("Seed: 1,") for file in files] == [0, 1, 0]
    assert Path("b-00002.png").read_bytes() == b"precious"
    Path("a.png").unlink()
    assert txt2img("a frog", "--out", "a.png", "--overwrite")[:2] == (0, "a.png\n")


def test_commands_that_save_at_one_time_each_keep_all_their_pictures(here):
    def save(level: int) -> list[Path]:
        outputs = Outputs(None, 4)
        outputs.check()
        return [outputs.save(i, Image.new("L", (64, 64), level), {}) for i in range(4)]

    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(save, range(8)))
    for level, names in enumerate(files):
        assert [pixels(name).max() for name in names] == [level] * 4
    assert sorted(os.listdir(here)) == sorted(str(name) for names in files for name in names)


def test_what_a_kill_left_long_ago_is_cleared_and_nothing_else(txt2img, here):
    names = [".ldm-0123456789abcdef", ".ldm-0123456789abcdef.png", ".ldm-notes", "ldm-old.png"]
    for name in (*names, ".ldm-fedcba9876543210"):
        Path(name).touch()
    for name in names:
        os.utime(name, (0, 0))
    assert txt2img("a frog")[0] == 0
    assert sorted(os.listdir(here)) == [".ldm-fedcba9876543210", ".ldm-notes", "ldm-old.png", "out.png"]


def test_what_cannot_be_a_source_is_said(txt2img, here):
    os.mkfifo("pipe.png")
    (here / "folder.png").mkdir()
    (here / "empty.png").touch()
    formats = "it must be one of PNG, JPEG, WEBP, BMP, TIFF, GIF"
    for name, reason in (
        ("pipe.png", "it is not a regular file"),
        ("folder.png", "it is a folder"),
        ("empty.png", f"{formats}; the file has another format, is a rare variant, or is damaged"),
        ("x" * 300, "File name too long"),
        ("", "it is a folder"),
    ):
        code, _, err = txt2img("--from", name, model=False)
        assert code == 2
        assert err == f"ldm: error: the picture {name or '.'} cannot be read: {reason}\n"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"parameters": "a cat\nSteps: 20"}, r"'parameters' of AUTOMATIC1111's .* 'a cat\\nSteps: 20'"),
        ({"prompt": "{}", "workflow": "graph"}, r"'workflow' of ComfyUI; .* 'graph'"),
        ({"invokeai_metadata": "steps"}, r"'invokeai_metadata' of InvokeAI; .* 'steps'"),
    ],
)
def test_a_picture_of_another_program_is_called_that(txt2img, texts, message):
    save_png(Image.new("RGB", (1, 1)), "x.png", texts)
    code, _, err = txt2img("--from", "x.png", model=False)
    assert code == 2
    assert re.search("x.png holds no record of ldm, but the " + message, err)


def test_a_record_of_the_first_words_only_is_refused_in_plain_words(txt2img):
    save_png(Image.new("RGB", (1, 1)), "x.png", {"ldm": '{"task": "txt2img"}'})
    assert txt2img("--from", "x.png", model=False)[2] == (
        "ldm: error: the record in x.png lacks request, model, sha256, environment, placement; "
        f"ldm {ldm.__version__} cannot repeat this record: give the prompt and options yourself\n"
    )


def test_what_a_file_says_cannot_command_the_terminal(txt2img):
    txt2img("a frog", "--out", "a.png")
    edit_record("a.png", "b.png", task="\x1b[31mrm\x07")
    err = txt2img("--from", "b.png", model=False)[2]
    assert "\\x1b[31mrm\\x07" in err
    assert all(c.isprintable() for c in err.removesuffix("\n"))


def test_a_prompt_may_hold_any_character(txt2img):
    for i, prompt in enumerate(("", "a\0frog", "🐸👩‍🌾", "\n\x1b[31m")):
        assert txt2img(prompt, "--out", f"{i}.png")[0] == 0
        assert json.loads(read_texts(f"{i}.png")["ldm"])["request"]["prompt"] == prompt
        assert txt2img("--from", f"{i}.png", "--out", f"{i}b.png", model=False)[0] == 0
        assert Path(f"{i}.png").read_bytes() == Path(f"{i}b.png").read_bytes()


def test_train_follows_a_recipe_and_says_where_the_result_is(here, capsys):
    (here / "pictures").mkdir()
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (16, 16), color).save(here / f"pictures/{name}.png")
        (here / f"pictures/{name}.txt").write_text(color)
    (here / "vae.toml").write_text(
        'recipe = "vae"\nout = "runs"\n'
        '[data]\nsize = 16\nfolder = "pictures"\n'
        "[vae]\nchannels = [8, 8]\nres_blocks = 1\nnorm_groups = 2\n"
        "[loss]\ncrop = 8\n[loop]\nsteps = 1\nbatch_size = 2\nwarmup = 0\n"
    )
    assert main(["train", "vae.toml", "--device", "cpu"]) == 0
    out, _ = capsys.readouterr()
    assert out == "runs/vae\n"
    assert (here / "runs/vae/config.json").is_file()

    for words in (["--font", "x.ttf"], ["--fluent", "x.tgz"], ["--font", "x.ttf", "--fluent", "x.tgz"]):
        assert main(["train", "vae.toml", *words]) == 2
        flags = " and ".join(words[::2])
        assert f"vae.toml trains on the folder pictures, without emoji: omit {flags}\n" in capsys.readouterr().err


def test_train_takes_the_emoji_of_the_scenes_from_the_files_that_it_is_told(here, capsys, monkeypatch):
    (here / "vae.toml").write_text(
        'recipe = "vae"\nout = "runs"\n[data]\nsize = 16\nevery_emoji = true\n'
        "[loss]\ncrop = 8\n[loop]\nsteps = 1\nwarmup = 0\n"
    )
    assert main(["train", "vae.toml", "--device", "cpu", "--fluent", "no.tgz"]) == 2
    assert "there is no archive of 3D emoji at no.tgz" in capsys.readouterr().err
    write_archive(here / "emoji.tgz", {"1f438": Image.new("RGBA", (8, 8), "green")})
    assert main(["train", "vae.toml", "--device", "cpu", "--fluent", "emoji.tgz", "--font", "no.ttf"]) == 2
    assert "there is no emoji font at no.ttf" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--font", "a font.ttf", "--fluent", "emoji.tgz", "--device", "cpu"]])
def test_a_stopped_training_names_the_command_that_goes_on_with_the_same_files(here, capsys, monkeypatch, words):
    given = []

    def stop(recipe, device):
        given.append(recipe.data)
        raise Interrupted("training stopped after step 5 of 9")

    (here / "vae.toml").write_text('recipe = "vae"\nout = "runs"\n[loop]\nsteps = 9\nwarmup = 0\n')
    monkeypatch.setattr(recipes.VAERecipe, "run", stop)
    assert main(["train", "vae.toml", *words]) == 130
    command = shlex.join(["ldm", "train", "vae.toml", *words])
    assert capsys.readouterr().err == f"ldm: error: training stopped after step 5 of 9; to go on: {command}\n"
    files = {"font": Path("a font.ttf"), "fluent": Path("emoji.tgz")} if words else {}
    assert given == [DataConfig(**files)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "the following arguments are required: recipe"),
        (["train", "no.toml"], "there is no recipe no.toml"),
        (["train", "bad.toml"], "bad.toml: recipe must be one of 'vae', 'ldm', "),
        (["train", "bad.toml", "--device", "toaster"], "device must be cpu, cuda, cuda:N or mps"),
        (["evaluate", "--font", "no.ttf"], "there is no emoji font at no.ttf"),
        (["evaluate", "--steps", "0"], "steps must be a whole number from 1 to 1000, got 0"),
        (["dance"], "invalid choice: 'dance'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_input_to_the_other_commands_is_one_sentence_too(here, capsys, words, message):
    (here / "bad.toml").write_text('recipe = "cake"')
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("ldm: error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("as_json", [False, True])
def test_evaluate_shows_the_checker_what_the_model_makes(model_folder, pipe, monkeypatch, capsys, as_json):
    seen = {}

    def look(generate, sprites, *, seed, reconstruct):
        seen["sprites"], seen["seed"] = sprites, seed
        seen["again"] = reconstruct and reconstruct(Image.new("RGB", (64, 64), "red"))
        seen["pictures"] = generate(["a frog", "a cat"], [seed, seed + 1])
        return evaluate.Report({"model": {"object": (1, 2)}}, {"model": 0.5}, ())

    frogs = {"flat": {"frog": Image.new("RGBA", (8, 8)), "cat": Image.new("RGBA", (8, 8))}}
    monkeypatch.setattr(evaluate, "evaluate", look)
    monkeypatch.setattr(evaluate, "fixed_scenes", lambda concepts, styles: {"object": [None, None]})
    monkeypatch.setattr(objects, "emoji_sprites", lambda font, fluent: frogs)
    words = ["--model", str(model_folder), "--device", "cpu", "--steps", "2", "--seed", "3"]
    assert main(["evaluate", *words, "--guidance", "2", *["--json", "--checker"] * as_json]) == 0
    out = capsys.readouterr().out
    if as_json:
        assert json.loads(out)["rows"]["model"]["object"] == {"right": 1, "of": 2}
    else:
        assert "1/2" in out
    assert (seen["sprites"], seen["seed"]) == (frogs, 3)
    assert seen["again"].size == (64, 64) if as_json else seen["again"] is None
    request = ldm.Request("a cat", steps=2, seed=4, guidance_scale=2.0)
    assert np.array_equal(seen["pictures"][1], pipe.generate(request)[0])


@pytest.mark.parametrize("as_json", [False, True])
def test_evaluate_measures_kid_with_as_many_pictures_as_asked(model_folder, monkeypatch, capsys, as_json):
    asked = {}

    def distance(generate, sprites, vae, count, *, seed):
        asked.update(count=count, seed=seed, channels=vae.config.latent_channels)
        return 0.25, 0.0625

    monkeypatch.setattr(evaluate, "distance", distance)
    monkeypatch.setattr(evaluate, "fixed_scenes", lambda concepts, styles: {})
    monkeypatch.setattr(objects, "emoji_sprites", lambda font, fluent: {"flat": {}})
    words = ["--model", str(model_folder), "--device", "cpu", "--kid", "300", "--seed", "3"]
    assert main(["evaluate", *words, *["--json"] * as_json]) == 0
    out = capsys.readouterr().out
    if as_json:
        assert json.loads(out) == {"kid": 0.25, "standard_error": 0.0625, "pictures": 300}
    else:
        assert out == "KID 0.25000 +- 0.06250 (300 pictures)\n"
    assert asked == {"count": 300, "seed": 3, "channels": 4}
