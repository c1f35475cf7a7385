"""LoRAs, DreamBooth and textual inversion: a few steps teach a small model, and only what should change changes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.checkpoint.embeddings import read_embedding
from ldm.checkpoint.files import save
from ldm.checkpoint.loras import layers_of, read_lora
from ldm.checkpoint.parts import Model
from ldm.checkpoint.pickles import TORCH_NEEDED
from ldm.checkpoint.save_loras import save_lora
from ldm.training import loop, teaching
from ldm.training.adapters import Adapters, LoraConfig
from ldm.training.average import Average
from ldm.training.data import Folder
from ldm.training.diffusion import DiffusionLoss
from ldm.training.recipes import read_recipe
from ldm.training.recipes.teaching import networks_of
from tests.tiny import TINY_RANDOM, TINY_SDXL, random_networks

CPU = torch.device("cpu")
FAMILIES = {"one": TINY_RANDOM, "sdxl": TINY_SDXL}
COMMON = """
out = "{out}/run"
model = "{out}/{family}"
sample_prompts = ["a red wall"]
[data]
size = 32
folder = "{out}/pictures"
[loss]
caption_dropout = 0.0
[loop]
steps = 4
batch_size = 2
warmup = 0
schedule = "constant"
learning_rate = {rate}
log_every = 1
checkpoint_every = 2
"""
LORA = """
recipe = "lora"
layout = "{layout}"
[lora]
rank = 2
alpha = 4.0
dropout = 0.1
dora = {dora}
targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
text_targets = ["q_proj", "v_proj"]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with small random models by family, and with pictures."""
    folder = tmp_path_factory.mktemp("teaching")
    for name, config in FAMILIES.items():
        save(Model(config, *random_networks(config)), folder / name)
    (folder / "pictures").mkdir()
    for i, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (32, 32), color).save(folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text(f"a {color} wall")
    return folder


@pytest.fixture
def recipe(models, tmp_path):
    """Read a recipe from its own text and COMMON, whose top-level keys come first."""

    def read(text, family="one", rate=3e-3, common=COMMON, **values):
        (tmp_path / "pictures").symlink_to(models / "pictures") if not (tmp_path / "pictures").exists() else None
        for name in FAMILIES:
            (tmp_path / name).symlink_to(models / name) if not (tmp_path / name).exists() else None
        for key, value in {"out": tmp_path, "family": family, "rate": rate, **values}.items():
            text, common = (part.replace(f"{{{key}}}", str(value)) for part in (text, common))
        (own, *tables), (top, *more) = (part.split("\n[", 1) for part in (text, common))
        whole = "\n[".join([f"{own}\n{top}", *more, *tables])
        (tmp_path / "recipe.toml").write_text(whole)
        return read_recipe(tmp_path / "recipe.toml")

    return read


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def falls(monkeypatch, run):
    """Run with the same noise and timesteps in each step, so that the losses can be compared."""
    seeds = torch.manual_seed
    monkeypatch.setattr(loop.torch, "manual_seed", lambda seed: seeds(0))
    result = run()
    monkeypatch.undo()
    return result


def weights(pipe):
    networks = pipe.unet, pipe.text_encoder, pipe.vae
    return {f"{i}.{k}": v for i, network in enumerate(networks) for k, v in network.state_dict().items()}


@pytest.mark.parametrize(
    ("layout", "dora", "family"),
    [
        ("kohya", "false", "one"),
        ("diffusers", "true", "sdxl"),
        pytest.param("kohya", "false", "sdxl", marks=pytest.mark.slow),
        pytest.param("diffusers", "true", "one", marks=pytest.mark.slow),
    ],
)
def test_a_lora_is_trained_saved_and_loaded(recipe, monkeypatch, family, layout, dora):
    own = recipe(LORA, family, rate=1e-2, layout=layout, dora=dora)
    path = falls(monkeypatch, lambda: own.run(CPU))
    assert path == own.out / ("lora.safetensors" if layout == "kohya" else "lora")
    first, *_, last = losses(own.out)
    assert last < 0.995 * first
    plain = ldm.load(own.model, ldm.Placement(device="cpu"))
    changed = ldm.load(own.model, ldm.Placement(device="cpu"), loras=[path])
    (applied,) = changed.loras.applied
    assert applied.applied == applied.total > 20
    before, after = weights(plain), weights(changed)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    unused = "1.towers.0.blocks.1."  # SDXL takes the layer before the last; only DoRA's norms are rounded
    assert len(moved) == applied.applied - (2 if family == "sdxl" and dora == "false" else 0)
    assert dora == "true" or family == "one" or not [name for name in moved if name.startswith(unused)]
    ends = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.weight", ".conv1.weight")
    assert all(name.endswith(ends) for name in moved)
    towers = {name.split(".")[2] for name in moved if name.startswith("1.")}
    assert len(towers) == len(FAMILIES[family].text)
    assert not [name for name in moved if name.startswith("1.") and ".to_k." in name]


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_compute_what_the_merged_weights_compute_and_start_with_no_change(dora, tmp_path):
    model, plain = (Model(TINY_SDXL, *random_networks(TINY_SDXL)) for _ in range(2))
    config = LoraConfig(3, 6.0, 0.5, dora, ("to_q", "to_out.0", "conv1", "conv", "proj_in"), ("fc1", "text_projection"))
    adapters = Adapters(config.choose(networks_of(model), model.config.unet), config).eval()
    given = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 700.0])
    size = [[32.0] * 6]

    def predict(which):
        with torch.no_grad():
            found = ldm.conditioning.condition(which.text_encoder, ["a frog", "b"], size * 2)
            return which.unet(*given, found.context, found.vector)

    assert torch.allclose(predict(model), predict(plain), rtol=0, atol=1e-5)  # DoRA divides by the same norm
    for parameter in adapters.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    expected = predict(model)
    assert (expected - predict(plain)).abs().max() > 0.1
    for path, layout in ((tmp_path / "a.safetensors", "kohya"), (tmp_path / "folder", "diffusers")):
        save_lora(path, adapters.changes(), TINY_SDXL.unet, layout=layout, towers=2, dtype=torch.float32)
        merged = Model(TINY_SDXL, *random_networks(TINY_SDXL))
        layers = layers_of(networks_of(merged))
        found = read_lora(path, networks_of(merged), TINY_SDXL.unet)
        assert found.changes.keys() == adapters.changes().keys()
        for target, change in found.changes.items():
            layers[target].weight.data += change.of("weight", layers[target].weight.data)
        torch.testing.assert_close(predict(merged), expected, rtol=0, atol=2e-5)


def test_only_what_learns_is_in_the_optimizer_the_average_and_the_checkpoint(recipe):
    own = recipe(LORA, layout="kohya", dora="false")
    own.run(CPU)
    state = torch.load(own.out / "checkpoint.pt", weights_only=True)
    names = {name.rsplit(".", 2)[1] for name in state["average"]}
    assert names == {"up", "down"}
    assert {name.removeprefix("learned.") for name in state["objective"]} == set(state["average"])
    (optimizer,) = state.get("optimizers") or [state["optimizer"]]
    assert len(optimizer["state"]) == len(state["average"])


def test_pictures_are_kept_out_and_sdxl_is_told_the_sizes_of_all(recipe):
    common = COMMON.replace("size = 32", "size = 16\nkeep_out = 1").replace("steps = 4", "steps = 2")
    own = recipe(LORA, "sdxl", common=common, layout="kohya", dora="false")
    own.run(CPU)
    rows = [json.loads(line) for line in (own.out / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["validation"] > 0
    dataset, kept_out = own.examples(own.load(CPU))
    assert (len(dataset), len(kept_out)) == (2, 1)
    for example in (dataset[0], dataset[1], kept_out[0]):
        assert example[2]["sizes"].tolist() == [32, 32, 0, 0]


def test_a_target_that_no_layer_has_is_named(recipe):
    own = recipe(LORA.replace('"conv1"', '"conv9"'), layout="kohya", dora="false")
    with pytest.raises(ValueError, match=r"targets has 'conv9', which no layer is called in diffusers: take .*to_q"):
        own.run(CPU)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank of a LoRA must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha of a LoRA must be greater than 0, got 0"),
        ({"dropout": 1.0}, "dropout of a LoRA must be at least 0 and less than 1, got 1"),
    ],
)
def test_a_lora_that_cannot_learn_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**values)


def stopped_and_resumed(own, monkeypatch):
    """Run `own` to its end, then again with a stop in the fourth step. Return both checkpoints."""
    own.run(CPU)
    expected = torch.load(own.out / "checkpoint.pt", weights_only=True)
    for path in own.out.glob("checkpoint*"):
        path.unlink()
    forward, calls = teaching.TeachingObjective.forward, []

    def killed(self, batch):
        calls.append(batch)
        if len(calls) == 4:
            raise SystemExit
        return forward(self, batch)

    monkeypatch.setattr(teaching.TeachingObjective, "forward", killed)
    with pytest.raises(SystemExit):
        own.run(CPU)
    own.run(CPU)
    return expected, torch.load(own.out / "checkpoint.pt", weights_only=True)


def assert_equal_runs(expected, resumed):
    assert resumed["step"] == 4
    for part in ("objective", "average"):
        assert resumed[part].keys() == expected[part].keys()
        assert all(torch.equal(resumed[part][name], expected[part][name]) for name in expected[part])


def test_a_resumed_run_of_a_lora_equals_one_without_a_stop(recipe, monkeypatch):
    assert_equal_runs(*stopped_and_resumed(recipe(LORA, layout="kohya", dora="true"), monkeypatch))


def test_sample_pictures_and_the_validation_are_those_of_the_average(models):
    model, kept_out = Model(TINY_RANDOM, *random_networks()), Folder(models / "pictures", 32)
    config = LoraConfig(2, 2.0)
    adapters = Adapters(config.choose(networks_of(model), model.config.unet), config)
    objective = teaching.TeachingObjective(model, adapters, DiffusionLoss(), kept_out=kept_out)
    average = Average(adapters, 0.9)
    for value in average.values.values():
        value += 0.5 * torch.randn_like(value)

    def seen():
        with torch.no_grad():
            sample = objective.sample((torch.zeros(1, 3, 32, 32), ["a frog"]))
            return sample, objective.validate()["validation"]

    before = seen()
    with average.applied():
        assert all((mine - theirs).abs().max() > 1e-3 for mine, theirs in zip(seen(), before, strict=True))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(seen(), before, strict=True))


# DreamBooth ---------------------------------------------------------------------------------------

DREAMBOOTH = """
recipe = "dreambooth"
instance_prompt = "a sks wall"
class_prompts = ["a wall", "a house"]
class_images = 3
{more}
"""
TEXT = "train_text_encoder = true"
ON_LORA = '[lora]\nrank = 2\ntext_targets = ["q_proj"]'


@pytest.mark.parametrize(
    ("more", "family"),
    [
        pytest.param(ON_LORA, "one", id="lora"),
        pytest.param("", "one", id="unet", marks=pytest.mark.slow),
        pytest.param(TEXT, "one", id="text", marks=pytest.mark.slow),
        pytest.param(TEXT, "sdxl", id="sdxl", marks=pytest.mark.slow),
    ],
)
def test_dreambooth_teaches_a_model_and_changes_what_was_asked_for(recipe, monkeypatch, family, more):
    own = recipe(DREAMBOOTH, family, rate=1e-2 if more == ON_LORA else 1e-3, more=more)
    path = falls(monkeypatch, lambda: own.run(CPU))
    first, *_, last = losses(own.out)
    assert last < 0.995 * first
    plain = ldm.load(own.model, ldm.Placement(device="cpu"))
    placement = ldm.Placement(device="cpu")
    taught = ldm.load(own.model, placement, loras=[path]) if more == ON_LORA else ldm.load(path, placement)
    before, after = weights(plain), weights(taught)
    moved = {name[0] for name in before if not torch.equal(before[name].half(), after[name].half())}
    assert moved == ({"0"} if not more else {"0", "1"})
    rows = [json.loads(line) for line in (own.out / "log.jsonl").read_text().splitlines()]
    assert all(abs(row["loss"] - row["mse"] - row["prior"]) < 1e-4 for row in rows)


def test_the_class_is_drawn_once_by_the_model_with_the_seeds_of_the_recipe(recipe):
    own = recipe(DREAMBOOTH, more="")
    drawn = own._class_pictures(own.load(CPU))
    pipe = ldm.load(own.model, ldm.Placement(device="cpu"))
    rows = [json.loads(line) for line in (own.out / "class" / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["a wall", "a house", "a wall"]
    for i, row in enumerate(rows):
        asked = {"steps": 25, "spacing": "trailing", "sampler": "ddim", "guidance_scale": 3.0}
        (expected,) = pipe.generate(ldm.Request(row["text"], seed=i, **asked))
        made = Image.open(own.out / "class" / row["file_name"])
        difference = np.abs(np.asarray(made, int) - np.asarray(expected, int))
        assert difference.max() <= 1  # a value between two levels may be rounded to either
    kept = own.out / "class" / "00001.png"
    (own.out / "class" / "00002.png").unlink()
    Image.new("RGB", (32, 32), "gold").save(kept)
    before = kept.read_bytes()
    again = own._class_pictures(own.load(CPU))
    assert torch.equal(again[1][0], drawn[1][0])
    assert kept.read_bytes() == before
    assert (own.out / "class" / "00002.png").is_file()
    with pytest.raises(ValueError, match=r"class holds class pictures of another recipe: delete it, or choose another"):
        recipe(DREAMBOOTH.replace('"a house"', '"a hut"'), more="").run(CPU)


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", ON_LORA], ids=["unet", "lora"])
def test_a_resumed_dreambooth_equals_one_without_a_stop(recipe, monkeypatch, more):
    assert_equal_runs(*stopped_and_resumed(recipe(DREAMBOOTH, more=more), monkeypatch))


def test_without_an_instance_prompt_the_pictures_have_their_own_captions(recipe):
    own = recipe(DREAMBOOTH.replace("a sks wall", ""), more="")
    assert [own.pictures().caption(i) for i in range(3)] == ["a red wall", "a green wall", "a blue wall"]
    named = recipe(DREAMBOOTH, more="")
    assert [named.pictures().caption(i) for i in range(3)] == ["a sks wall"] * 3
    assert torch.equal(named.pictures()[1][0], own.pictures()[1][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_images = 3": "class_images = 0"}, "class_images must be at least 1, got 0"),
        ({"class_images = 3": "prior_weight = -1.0"}, "prior_weight must be at least 0, got -1"),
        ({"{more}": TEXT + "\n" + ON_LORA}, "for a LoRA give text_targets under"),
        ({"{more}": "[lesson]\npictures = 3"}, "the pictures of .lesson. have captions: omit instance_prompt"),
    ],
)
def test_a_dreambooth_that_cannot_be_meant_is_refused(recipe, change, message):
    text = DREAMBOOTH
    for before, after in change.items():
        text = text.replace(before, after)
    with pytest.raises(ValueError, match=message):
        recipe(text, more="")


# Textual inversion --------------------------------------------------------------------------------

INVERSION = """
recipe = "textual_inversion"
word = "<zorb>"
start = "hut"
vectors = 2
captions = ["a photo of <zorb>", "the <Zorb>"]
"""


@pytest.mark.parametrize("family", ["sdxl", pytest.param("one", marks=pytest.mark.slow)])
def test_textual_inversion_teaches_a_word_and_changes_nothing_else(recipe, monkeypatch, family):
    own = recipe(INVERSION, family, rate=0.05)
    teach, held = teaching.TeachingObjective.__init__, []

    def watched(self, model, *given, **more):
        teach(self, model, *given, **more)
        held.append(self)

    monkeypatch.setattr(teaching.TeachingObjective, "__init__", watched)
    falls(monkeypatch, lambda: own.run(CPU))
    (objective,) = held
    first, *_, last = losses(own.out)
    assert last < first
    plain = ldm.load(own.model, ldm.Placement(device="cpu"))
    networks = {"unet.": plain.unet, "text_encoder.": plain.text_encoder}
    expected = {above + name: value for above, n in networks.items() for name, value in n.state_dict().items()}
    names = [name for name in dict(objective.networks.named_parameters()) if not name.endswith("vectors")]
    found = objective.networks.named_parameters()
    assert {n: v.requires_grad for n, v in found if v.requires_grad}.keys() == {
        f"text_encoder.towers.{i}.token_embedding.vectors" for i in range(len(FAMILIES[family].text))
    }
    state = dict(objective.networks.named_parameters())
    assert set(names) == set(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    for vectors, tower in zip(objective.learned, plain.text_encoder.towers, strict=True):
        start = tower.token_embedding.weight[tower.tokenizer.encode("hut")[:2]]
        assert vectors.shape == start.shape
        assert (vectors - start).abs().min(dim=1).values.max() > 0
    state = torch.load(own.out / "checkpoint.pt", weights_only=True)
    assert len(state["objective"]) == len(FAMILIES[family].text)  # the vectors of each tower, and nothing else


@pytest.mark.slow
def test_a_resumed_textual_inversion_equals_one_without_a_stop(recipe, monkeypatch):
    assert_equal_runs(*stopped_and_resumed(recipe(INVERSION, rate=0.05), monkeypatch))


@pytest.mark.parametrize("family", ["one", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_the_files_of_a_word_are_read_and_mean_the_same(recipe, family):
    own = recipe(INVERSION, family, rate=0.05)
    folder = own.run(CPU)
    average = torch.load(own.out / "checkpoint.pt", weights_only=True)["average"]
    files = {path.name for path in folder.iterdir()}
    both = {"zorb.safetensors"} if family == "sdxl" else {"zorb.pt", "zorb.safetensors", "learned_embeds.safetensors"}
    assert files == both
    for file in files:
        if file.endswith(".pt") and torch.__version__ < TORCH_NEEDED:
            continue
        name, vectors = read_embedding(folder / file)
        assert name == ("<zorb>" if file.startswith("learned") else "zorb")
        assert all(torch.equal(part, average[str(i)]) for i, part in enumerate(vectors))
        assert len(vectors) == len(FAMILIES[family].text)
    pipe = ldm.load(own.model, ldm.Placement(device="cpu"), embeddings=[f"<zorb>={folder / 'zorb.safetensors'}"])
    plain = ldm.load(own.model, ldm.Placement(device="cpu"))
    made, other = (each.generate(ldm.Request("a photo of <zorb>", steps=2, seed=1))[0] for each in (pipe, plain))
    assert made.tobytes() != other.tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {'"the <Zorb>"': '"the thing"'},
            "the caption 'the thing' does not have the word '<zorb>': write it into each",
        ),
        ({'start = "hut"': 'start = " "'}, "the vectors start from those of a word, and ' ' has none: give a word"),
        ({"captions": "[lesson]\npictures = 3\n#"}, "lesson. needs word = '<zorb>', as the recipe, got ''"),
        ({"vectors = 2": "vectors = 0"}, "vectors must be at least 1, got 0"),
        ({"vectors = 2": "vectors = 31"}, "an embedding needs 1 to 30 vectors"),
    ],
)
def test_a_word_that_cannot_be_learned_is_refused(recipe, change, message):
    text = INVERSION
    for before, after in change.items():
        text = text.replace(before, after)
    with pytest.raises(ValueError, match=message):
        recipe(text).run(CPU)
