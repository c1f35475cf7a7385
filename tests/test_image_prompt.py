"""Image prompts in a request: what the tower sees, the negative prompt, the command, the record, and bad input."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm import image_prompt as module
from ldm.cli import main
from ldm.models.ip_adapter import Applied, ImagePrompted
from tests.tiny import TINY_RANDOM, Tower, random_controlnet, random_ip_adapter, random_networks, save_ip_adapter

PICTURE = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
FROG = ldm.Request("a frog", "bad", steps=3, seed=3)


@pytest.fixture
def mine():
    """A tiny random model with two IP-Adapters and a vision tower by name."""
    pipe = ldm.Pipeline(TINY_RANDOM, *random_networks())
    pipe.adapters |= {"plain": random_ip_adapter(), "plus": random_ip_adapter(plus=True), "tower": Tower()}
    pipe.controlnets["net"] = random_controlnet()
    return pipe


def frog(*names, weight=1.0, **changes):
    prompts = tuple(ldm.ImagePrompt(name, PICTURE, "tower", weight) for name in names)
    return dataclasses.replace(FROG, image_prompts=prompts, **changes)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------ the picture


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (8, 8), (5, 9)])
def test_the_tower_sees_what_transformers_shows_it(size):
    transformers = pytest.importorskip("transformers")
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    expected = transformers.CLIPImageProcessor(size=16, crop_size=16)(picture, return_tensors="pt").pixel_values
    got = module.pixels(picture, 16)
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, rtol=0, atol=1e-5)  # fp32, another order of the operations


@torch.no_grad()
def test_the_negative_tokens_are_those_of_zeros(mine):
    plain, plus, tower = (mine.adapters[name] for name in ("plain", "plus", "tower"))
    seen = module.pixels(PICTURE, 8)
    tokens, negative = module.image_tokens(plain, tower, PICTURE)
    assert torch.equal(negative, plain.image_proj(torch.zeros(1, 24)))
    assert torch.allclose(tokens, plain.image_proj(tower(seen).image_embeds), rtol=0, atol=1e-6)
    tokens, negative = module.image_tokens(plus, tower, PICTURE)
    for found, shown in ((tokens, seen), (negative, torch.zeros_like(seen))):
        assert torch.allclose(found, plus.image_proj(tower(shown).hidden_states[-2]), rtol=0, atol=1e-5)


def test_features_of_another_width_are_refused(mine):
    mine.adapters["tower"] = Tower(20)
    for name in ("plain", "plus"):
        with pytest.raises(ValueError, match="reads features of width 24, and the image encoder gives 20: use the"):
            mine.generate(frog(name))


# ------------------------------------------------------------------ the request


@pytest.mark.parametrize("name", ["plain", "plus"])
@torch.no_grad()
def test_the_denoiser_is_that_of_the_unet_with_the_tokens(mine, name):
    request = frog(name, weight=0.6)
    plan = mine.plan(request)
    conditions, x = mine.conditions(plan), mine.start(plan)
    marked = [dataclasses.replace(c, is_prompt=torch.tensor([i == 0])) for i, c in enumerate(conditions)]
    adapter = mine.adapters[name]
    prompt = Applied(adapter, *module.image_tokens(adapter, mine.adapters["tower"], PICTURE), 0.6)
    expected = mine.denoiser(plan, marked, ImagePrompted(mine.unet, [prompt]).bind)(x, plan.sigmas[0])
    assert torch.equal(mine.denoiser(plan, conditions)(x, plan.sigmas[0]), expected)
    plain = mine.denoiser(mine.plan(FROG), conditions)(x, plan.sigmas[0])
    assert not torch.allclose(expected, plain, atol=1e-3)


def test_a_picture_changes_the_result_and_a_weight_of_zero_does_not(mine):
    plain = mine.generate(FROG)
    assert same(mine.generate(frog("plain", weight=0.0)), plain)
    results = [plain, mine.generate(frog("plain")), mine.generate(frog("plus")), mine.generate(frog("plain", "plus"))]
    for i, one in enumerate(results):
        assert not any(same(one, other) for other in results[:i])
    other = dataclasses.replace(frog("plain").image_prompts[0], image=PICTURE.rotate(90))
    assert not same(mine.generate(dataclasses.replace(FROG, image_prompts=(other,))), results[1])


def test_guidance_in_one_batch_and_in_two_passes_agree(mine):
    request = frog("plus", images=2)
    batched = [np.asarray(p).astype(int) for p in mine.generate(request)]
    mine.placement = ldm.Placement("cpu", guidance="sequential")
    sequential = [np.asarray(p).astype(int) for p in mine.generate(request)]
    assert max(np.abs(a - b).max() for a, b in zip(batched, sequential, strict=True)) <= 1


def test_it_goes_with_controlnets_a_source_a_mask_and_changing_prompts(mine):
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 24, 24))
    square = PICTURE.resize((32, 32))
    for changes in (
        {"controls": (ldm.Control("net", PICTURE),)},
        {"source": ldm.Source(PICTURE, 0.7)},
        {"source": ldm.Source(square, mask=ldm.Mask(mask))},
        {"prompt": "a [frog:fox:2]", "emphasis": "a1111"},
        {"guidance_scale": 1.0},
    ):
        assert not same(mine.generate(frog("plain", **changes)), mine.generate(dataclasses.replace(FROG, **changes)))


def test_the_refiner_drops_the_image_prompts(mine):
    from ldm.refiner import plan_both

    plans = plan_both(mine, mine, frog("plain", steps=10), handover=0.5)
    assert [len(plan.request.image_prompts) for plan in plans] == [1, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((5, PICTURE, "tower"), "an IP-Adapter is named by its path, a str or a Path, got 5"),
        (("ip", PICTURE, 5), "an image encoder is named by its path, a str or a Path, got 5"),
        (("ip", 5, "tower"), "the image prompt must be the path of a picture or a PIL picture, got 5"),
        (("ip", PICTURE, "tower", "much"), "weight must be a finite number, got 'much'"),
    ],
)
def test_a_bad_image_prompt_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ldm.ImagePrompt(*given)


def test_image_prompts_are_a_tuple_of_image_prompt():
    with pytest.raises(ValueError, match=r"image_prompts must be a tuple of ldm\.ImagePrompt, got"):
        ldm.Request("a frog", image_prompts=ldm.ImagePrompt("ip", PICTURE, "tower"))
    assert ldm.Request("a frog", image_prompts=[ldm.ImagePrompt("ip", PICTURE, "tower")]).image_prompts[0].model == "ip"


# ------------------------------------------------------------------ the command


@pytest.fixture
def run(model_folder, tmp_path, monkeypatch, capsys):
    """Run `ldm` in a folder with two IP-Adapters, a vision tower and a picture; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    PICTURE.save("in.png")
    save_ip_adapter(random_ip_adapter(), tmp_path / "plain.safetensors")
    save_ip_adapter(random_ip_adapter(plus=True), tmp_path / "plus.safetensors")
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text("{}")
    monkeypatch.setattr("ldm.checkpoint.ip_adapters.load_image_encoder", lambda path, **_: Tower())

    def run(command, *words):
        given = [] if "--from" in words else ["--model", str(model_folder), "--device", "cpu", "--steps", "2"]
        code = main([command, *words, *given])
        out, err = capsys.readouterr()
        return code, out, "".join(x for x in err.splitlines(keepends=True) if "error" in x)

    return run


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


ONE = ("--ip-adapter", "plain.safetensors", "--image-prompt", "in.png", "--image-encoder", "tower")


@pytest.mark.slow
def test_each_option_reaches_its_image_prompt_and_the_record_repeats_the_picture(run, model_folder):
    more = ("--image-prompt-weight", "0.5", "--ip-adapter", "plus.safetensors", "--image-prompt", "in.png")
    code, out, err = run("txt2img", "a frog", *ONE, *more, "--image-encoder", "tower", "--json")
    assert (code, err) == (0, "")
    settings = json.loads(out)["settings"]
    usual = {"image": "in.png", "encoder": "tower"}
    one, two = ({"model": "plain.safetensors", "weight": 0.5}, {"model": "plus.safetensors", "weight": 1.0})
    assert settings["request"]["image_prompts"] == [usual | one, usual | two]
    names = {f"{name}_{i}" for name in ("ip_adapter", "image_prompt", "image_encoder") for i in (1, 2)}
    assert names <= settings["sha256"].keys()
    pipe = ldm.load(model_folder, ldm.Placement.fast(device="cpu"))
    prompts = tuple(ldm.ImagePrompt(each["model"], "in.png", "tower", each["weight"]) for each in (one, two))
    assert np.array_equal(pixels("out.png"), pipe.generate(ldm.Request("a frog", steps=2, image_prompts=prompts))[0])
    assert run("txt2img", "--from", "out.png", "--out", "b.png")[0] == 0
    assert np.array_equal(pixels("out.png"), pixels("b.png"))


@pytest.mark.slow
def test_options_beside_from_change_or_replace_the_image_prompt(run):
    run("txt2img", "a frog", *ONE, "--out", "a.png")
    run("txt2img", "--from", "a.png", "--image-prompt-weight", "0.5", "--out", "b.png")
    run("txt2img", "a frog", *ONE, "--image-prompt-weight", "0.5", "--out", "c.png")
    assert np.array_equal(pixels("b.png"), pixels("c.png"))
    assert not np.array_equal(pixels("a.png"), pixels("b.png"))
    run("txt2img", "--from", "a.png", "--ip-adapter", "plus.safetensors", *ONE[2:], "--out", "d.png")
    run("img2img", "in.png", "--from", "d.png", "--out", "e.png")
    assert not np.array_equal(pixels("a.png"), pixels("d.png"))
    assert not np.array_equal(pixels("d.png"), pixels("e.png"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("in.png", "in.png is not the image prompt that made the picture; to use it all the same, name it with "),
        ("plain.safetensors", "plain.safetensors is not the IP-Adapter that made the picture; to use it all "),
        ("tower/config.json", "tower is not the image encoder that made the picture; to use it all the same, name it "),
    ],
)
def test_a_changed_file_of_a_record_is_refused_unless_it_is_named(run, changed, message, tmp_path):
    run("txt2img", "a frog", *ONE, "--out", "a.png")
    if changed == "in.png":
        PICTURE.rotate(90).save("in.png")
    elif changed == "plain.safetensors":
        (tmp_path / "plus.safetensors").replace(tmp_path / changed)  # the old file may be mapped still
    else:
        (tmp_path / changed).write_text('{"a": 1}')
    code, _, err = run("txt2img", "--from", "a.png", "--out", "b.png")
    assert code == 2
    assert err.startswith(f"ldm: error: {message}")
    assert err.endswith("with --ip-adapter, --image-prompt and --image-encoder\n")
    assert run("txt2img", "--from", "a.png", *ONE, "--out", "b.png")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (ONE[:2], "--ip-adapter plain.safetensors is not complete: add --image-prompt and --image-"),
        (ONE[:4], "--ip-adapter plain.safetensors is not complete: add --image-encoder"),
        (ONE[2:], "the options of one image prompt follow the --ip-adapter that they are for"),
        ((*ONE, "--image-prompt", "in.png"), "--image-prompt is given twice for one image prompt: name each with"),
        ((*ONE[:3], "no.png", *ONE[4:]), "the picture no.png cannot be read: No such file"),
        (("--ip-adapter", "none", *ONE[2:]), "none does not exist: give a model folder or a"),
        ((*ONE, "--image-prompt-weight", "nan"), "weight must be a finite number, got nan"),
    ],
)
def test_a_bad_input_is_one_sentence_and_nothing_is_written(run, words, message, tmp_path):
    before = sorted(tmp_path.iterdir())
    code, _, err = run("txt2img", "a frog", *words)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"ldm: error: {message}")
    assert sorted(tmp_path.iterdir()) == before
