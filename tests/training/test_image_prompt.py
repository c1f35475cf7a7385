"""A vision tower and an IP-Adapter are trained for a model that stays, and the files are read by others."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.checkpoint.files import save
from ldm.checkpoint.ip_adapters import load_image_encoder, load_ip_adapter, save_image_encoder, save_ip_adapter
from ldm.checkpoint.parts import Model
from ldm.checkpoint.tensors import TensorFiles
from ldm.image_prompt import image_tokens
from ldm.models.ip_adapter import cross_attentions
from ldm.models.tokens import Tokenizer
from ldm.training import loop
from ldm.training.image_prompt import Features, ImagePromptLoss, ImagePromptObjective, ResamplerConfig, new_ip_adapter
from ldm.training.likeness import likeness
from ldm.training.recipes import read_recipe
from ldm.training.vision import TowerConfig, VisionObjective, inverse_frequency, seen
from tests.tiny import TINY_RANDOM, random_networks
from tests.training.drawn import drawn_sprites

pytest.importorskip("transformers")
CPU = torch.device("cpu")
COLORS = ("red", "green", "blue")
DATA = """
[data]
size = 32
folder = "{out}/pictures"
[loop]
steps = {steps}
batch_size = 3
warmup = 0
schedule = "constant"
learning_rate = {rate}
log_every = 1
"""
VISION = """
recipe = "vision"
out = "{out}/vision"
model = "{out}/model"
[tower]
width = 8
layers = 1
heads = 2
mlp = 16
patch = 16
projection = 6
"""
IP_ADAPTER = """
recipe = "ip_adapter"
out = "{out}/ip"
model = "{out}/model"
encoder = "{out}/vision/image_encoder"
latents = 3
"""
PLUS = """
[resampler]
tokens = 3
dim = 64
layers = 1
mlp = 8
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small random model and pictures, and a vision tower that was trained on them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("image_prompt")
    save(Model(TINY_RANDOM, *random_networks(TINY_RANDOM)), path / "model")
    (path / "pictures").mkdir()
    for color in COLORS:
        Image.new("RGB", (32, 32), color).save(path / "pictures" / f"{color}.png")
        (path / "pictures" / f"{color}.txt").write_text(f"a {color} wall")
    assert recipe(path, VISION + DATA, steps=30, rate=1e-2).run(CPU) == path / "vision" / "image_encoder"
    return path


def recipe(folder, text, steps=3, rate=1e-2):
    (folder / "recipe.toml").write_text(text.format(out=folder, steps=steps, rate=rate))
    return read_recipe(folder / "recipe.toml")


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_vision_tower_learns_the_words_of_the_captions(folder):
    found = [json.loads(line) for line in (folder / "vision" / "log.jsonl").read_text().splitlines()]
    assert found[-1]["loss"] < 0.2 * found[0]["loss"]
    assert found[-1]["found"] == 1
    assert (folder / "vision" / "samples" / "step-000030.png").is_file()


def test_a_saved_vision_tower_is_read_by_transformers(folder):
    from transformers import CLIPVisionModelWithProjection

    path = folder / "vision" / "image_encoder"
    ours, theirs = load_image_encoder(path), CLIPVisionModelWithProjection.from_pretrained(path).float()
    images = seen(torch.rand(2, 3, 32, 32) * 2 - 1, 32)
    torch.testing.assert_close(ours(images).image_embeds, theirs(images).image_embeds)
    with pytest.raises(ValueError, match="is not a folder of a vision tower, so it is not overwritten"):
        save_image_encoder(ours, folder / "pictures")


def test_the_labels_of_a_picture_are_the_rare_tokens_of_its_caption():
    tokenizer = ldm.load("weights/tiny", ldm.Placement("cpu")).text_encoder.tokenizers[0]
    captions = ["a cat", "a cat", "a dog"]
    (a,), (cat,), (dog,) = (tokenizer.encode(word) for word in ("a", "cat", "dog"))

    class Captions:
        def __len__(self):
            return len(captions)

        def caption(self, index):
            return captions[index]

    rarity = inverse_frequency(tokenizer, Captions())
    assert rarity[cat] == 0  # log(3 / 3)
    assert rarity[a] == 0  # log(3 / 4), raised to 0
    assert float(rarity[dog]) == pytest.approx(math.log(3 / 2))
    rarity[cat] = 3 * rarity[dog]
    objective = VisionObjective(tokenizer, TowerConfig(8, 1, 2, 16, 16, 6).build(32), rarity)
    labels = objective.labels(["a cat", "a dog", "a dog and a cat", ""])
    assert labels[0].nonzero().tolist() == [[cat]]
    assert labels.sum(dim=1)[:3].tolist() == pytest.approx([1, 1, 1])
    assert float(labels[2, cat] / labels[2, dog]) == pytest.approx(3)
    assert not labels[3].any()

    images = torch.rand(3, 3, 32, 32) * 2 - 1
    loss, logs = objective((images, captions))
    logits = objective.classify(objective.tower(seen(images, 32)).image_embeds)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([cat, cat, dog]))
    torch.testing.assert_close(loss, expected)
    assert logs["found"] == (logits.argmax(1) == torch.tensor([cat, cat, dog])).float().mean()


@pytest.mark.parametrize(("more", "name"), [("", "proj.weight"), (PLUS, "latents")], ids=["plain", "plus"])
def test_an_ip_adapter_is_trained_for_a_model_that_stays_and_changes_its_pictures(
    folder, tmp_path, monkeypatch, more, name
):
    fixed = [path for part in ("model", "vision") for path in (folder / part).rglob("*.safetensors")]
    before = {path: path.read_bytes() for path in fixed}
    seeds = torch.manual_seed
    monkeypatch.setattr(loop.torch, "manual_seed", lambda seed: seeds(0))  # the same noise in each step
    own = recipe(folder, IP_ADAPTER.replace("{out}/ip", str(tmp_path / "ip")) + more + DATA, steps=6)
    path = own.run(CPU)
    monkeypatch.undo()
    assert path == tmp_path / "ip" / "ip-adapter.safetensors"
    assert {path: path.read_bytes() for path in before} == before
    assert losses(tmp_path / "ip")[-1] < losses(tmp_path / "ip")[0]

    pipe = ldm.load(folder / "model", ldm.Placement("cpu"))
    adapter = load_ip_adapter(path, unet=pipe.unet)
    moved = adapter.to_k[0].weight - cross_attentions(pipe.unet)[0].to_k.weight
    assert 0 < moved.abs().max() < 0.2  # it started from the keys of texts, and learned
    assert {f"image_proj.{name}", "ip_adapter.1.to_k_ip.weight"} <= set(TensorFiles([path]).shapes)
    prompts = [ldm.ImagePrompt(path, folder / "pictures" / f"{color}.png", own.encoder) for color in COLORS[:2]]
    pictures = [
        pipe.generate(ldm.Request("", steps=2, seed=1, image_prompts=given))[0].tobytes()
        for given in ((), *((prompt,) for prompt in prompts))
    ]
    assert len(set(pictures)) == 3


def test_embeddings_of_another_vision_tower_are_not_used(folder):
    own = recipe(folder, IP_ADAPTER.replace("/ip", "/other") + DATA, steps=1)
    own.run(CPU)
    torch.manual_seed(1)
    kept = load_image_encoder(own.encoder)
    save_image_encoder(TowerConfig(8, 1, 2, 16, 16, 6).build(32), own.encoder)
    with pytest.raises(ValueError, match="has latents of other data or of another encoder"):
        own.run(CPU)
    save_image_encoder(kept, own.encoder, dtype=torch.float16)


@pytest.fixture
def pipe(folder):
    return ldm.load(folder / "model", ldm.Placement("cpu"))


@pytest.mark.parametrize("resampler", [None, ResamplerConfig(3, 64, 1, 8)], ids=["plain", "plus"])
def test_a_left_out_picture_has_the_features_that_stand_for_none_in_a_request(folder, pipe, resampler):
    tower = load_image_encoder(folder / "vision" / "image_encoder")
    features = Features(tower, patches=resampler is not None)
    adapter = new_ip_adapter(pipe.unet, tower, resampler)
    moments, captions = torch.rand(4, 2 * pipe.config.vae.latent_channels, 8, 8), ["a red wall"] * 4
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    shown, left_out = features(images)["features"], features.left_out()
    _, negative = image_tokens(adapter, tower, Image.new("RGB", (32, 32)))
    torch.testing.assert_close(adapter.image_proj(left_out), negative)

    def loss(dropout, given):
        torch.manual_seed(0)
        weights = ImagePromptLoss(caption_dropout=0.0, picture_dropout=dropout)
        objective = ImagePromptObjective(pipe, adapter, weights, left_out)
        return objective((moments, captions, {"features": given}))[0]

    assert torch.equal(loss(0.999999, shown), loss(0.0, left_out.expand_as(shown)))
    assert not torch.equal(loss(0.0, shown), loss(0.0, left_out.expand_as(shown)))


def test_a_saved_ip_adapter_is_read_back(folder, pipe, tmp_path):
    adapter = new_ip_adapter(pipe.unet, load_image_encoder(folder / "vision" / "image_encoder"))
    save_ip_adapter(adapter, tmp_path / "a.safetensors")
    found = load_ip_adapter(tmp_path / "a.safetensors", unet=pipe.unet)
    for name, value in adapter.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("latents = 3", "latents = -1"), "pictures to encode, latents, must be at least 1, got -1"),
        (("latents = 3", "latents = 3\n[loss]\npicture_dropout = 1.0"), "picture_dropout must be at least 0 and less"),
        (("latents = 3", "latents = 3\n[resampler]\ndim = 10"), "dim of a resampler must be a multiple of 64"),
    ],
)
def test_wrong_values_are_refused(folder, change, message):
    with pytest.raises(ValueError, match=message):
        recipe(folder, IP_ADAPTER.replace(*change) + DATA).run(CPU)


@pytest.mark.parametrize("captions", [["a wall"] * 4, ["a cat", "a dog"], ["", ""]])
def test_captions_without_words_that_tell_pictures_apart_are_refused(captions):
    class Captions:
        def __len__(self):
            return len(captions)

        def caption(self, index):
            return captions[index]

    with pytest.raises(ValueError, match="have no words that tell the pictures apart"):
        inverse_frequency(Tokenizer.official(), Captions())


def test_the_log_is_finite_for_a_batch_without_known_words():
    objective = VisionObjective(Tokenizer.official(), TowerConfig(8, 1, 2, 16, 16, 6).build(32), torch.ones(49408))
    loss, logs = objective((torch.zeros(2, 3, 32, 32), ["", ""]))
    assert loss == 0
    assert logs["found"] == 0


def test_a_new_tower_without_transformers_is_refused(monkeypatch):
    monkeypatch.setattr("ldm.checkpoint.ip_adapters.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="which is not installed: install the extra"):
        TowerConfig().build(32)


def test_sizes_of_a_tower_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="heads and patch under \\[tower\\] must be at least 1"):
        TowerConfig(heads=0, patch=0).build(32)
    with pytest.raises(ValueError, match="width 10, heads 4, size 32, patch 16"):
        TowerConfig(width=10).build(32)


def test_the_measure_tells_pictures_that_keep_the_image_prompt_from_others():
    blank = Image.fromarray(np.full((64, 64, 3), 255, np.uint8))
    found = likeness(lambda seed, prompt: prompt or blank, drawn_sprites(), 64, count=8)
    assert set(found["with"]) == {"object", "style", "ground", "size", "place"}
    assert sum(right for right, _ in found["with"].values()) > 0.9 * sum(of for _, of in found["with"].values())
    assert found["with"]["object"][1] == found["without"]["object"][1] == 8
    assert found["without"]["object"][0] < 4
