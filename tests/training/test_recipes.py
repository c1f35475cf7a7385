"""From a TOML file to a model that makes pictures, on a folder of pictures."""

import dataclasses
import json
import re
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

import ldm
from ldm import cli
from ldm.checkpoint.controlnets import load_controlnet
from ldm.checkpoint.files import load, load_vae, save
from ldm.checkpoint.parts import Model
from ldm.config import DiffusionConfig
from ldm.models.controlnet import ControlNet
from ldm.models.tokens import Tokenizer
from ldm.models.unet import UNet
from ldm.training.controlnet import ControlNetObjective
from ldm.training.data import Folder
from ldm.training.diffusion import DiffusionLoss, DiffusionObjective
from ldm.training.loop import collate
from ldm.training.recipes import FREE, ControlNetRecipe, LDMRecipe, VAERecipe, read_recipe
from ldm.training.vae import VAEObjective, latent_std
from tests.tiny import TINY_RANDOM, TINY_SDXL, random_networks

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parent.parent.parent / "configs"

VAE_TOML = """
recipe = "vae"
out = "{out}/vae"
[data]
size = 16
folder = "{out}/pictures"
[vae]
channels = [8, 8]
res_blocks = 1
norm_groups = 2
[loss]
crop = 8
[loop]
steps = 3
batch_size = 2
warmup = 0
"""
LDM_TOML = """
recipe = "ldm"
name = "toy"
out = "{out}/ldm"
vae = "{out}/vae/vae"
vocabulary = 600
guidance_scale = 2.0
[data]
size = 16
folder = "{out}/pictures"
[unet]
channels = [8, 16]
res_blocks = 1
depth = [0, 1]
heads = [1, 2]
context_dim = 8
norm_groups = 2
[text]
width = 8
layers = 1
heads = 2
mlp = 16
max_length = 10
[diffusion]
prediction = "v"
spacing = "trailing"
[loop]
steps = 2
batch_size = 2
warmup = 0
"""


CONTROLNET_TOML = """
recipe = "controlnet"
out = "{out}/edges"
model = "{out}/ldm/model"
hint_channels = [4, 8]
mid = "none"
[data]
size = 16
folder = "{out}/pictures"
[loop]
steps = 2
batch_size = 2
warmup = 0
learning_rate = 1e-2
"""


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (20, 16), color).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {color} wall")
    return tmp_path


def recipe(folder, text, name="recipe.toml"):
    (folder / name).write_text(text.format(out=folder))
    return read_recipe(folder / name)


def test_a_vae_and_then_a_diffusion_model_train_into_one_that_makes_pictures(pictures):
    vae_folder = recipe(pictures, VAE_TOML).run(CPU)
    vae = load_vae(vae_folder)
    folder = Folder(pictures / "pictures", 16)
    images, _ = collate([folder[i] for i in range(3)])
    assert abs(latent_std(vae, images) - 1) < 0.05  # scaled by the measured factor; two draws of the posterior
    assert vae.config.scaling_factor not in (1.0, 0.18215)

    model_folder = recipe(pictures, LDM_TOML).run(CPU)
    assert model_folder == pictures / "ldm" / "model"
    pipe = ldm.load(model_folder, ldm.Placement(device="cpu"))
    assert pipe.config.name == "toy"
    assert pipe.config.vae == vae.config
    assert (pipe.config.diffusion.prediction, pipe.config.diffusion.spacing) == ("v", "trailing")
    assert (pipe.config.image_size, pipe.config.guidance_scale) == (16, 2.0)
    (image,) = pipe.generate(ldm.Request("a red wall", steps=2))
    assert image.size == (16, 16)
    for ours, theirs in zip(pipe.vae.parameters(), vae.parameters(), strict=True):
        assert torch.equal(ours, theirs.half().float())  # saved in fp16


def test_a_controlnet_is_trained_for_a_model_that_stays_and_changes_its_pictures(pictures):
    recipe(pictures, VAE_TOML).run(CPU)
    model = recipe(pictures, LDM_TOML).run(CPU)
    before = {path: path.read_bytes() for path in model.rglob("*.safetensors")}
    folder = recipe(pictures, CONTROLNET_TOML).run(CPU)
    assert folder == pictures / "edges" / "controlnet"
    assert {path: path.read_bytes() for path in model.rglob("*.safetensors")} == before

    pipe = ldm.load(model, ldm.Placement(device="cpu"))
    network = load_controlnet(folder, unet=pipe.unet)
    copied = network.down[1].res.conv1.weight - pipe.unet.down[1].res.conv1.weight
    assert 0 < copied.abs().max() < 0.05  # it started from the UNet's encoder, and learned
    assert network.mid_out.weight.abs().max() > 0  # it started from zero
    plain = ldm.Request("a red wall", steps=2)
    hint = Image.effect_noise((16, 16), 100).convert("RGB")
    steered = dataclasses.replace(plain, controls=(ldm.Control(folder, hint),))
    assert pipe.generate(steered)[0].tobytes() != pipe.generate(plain)[0].tobytes()

    with pytest.raises(ValueError, match="hint_channels must be 2 numbers, because the latents are 2 times smaller"):
        recipe(pictures, CONTROLNET_TOML.replace("[4, 8]", "[4, 8, 8]")).run(CPU)


def test_a_new_controlnet_changes_no_prediction(pictures):
    recipe(pictures, VAE_TOML).run(CPU)
    pipe = ldm.load(recipe(pictures, LDM_TOML).run(CPU), ldm.Placement(device="cpu"))
    objective = ControlNetObjective(pipe, ControlNet.copy_of(pipe.unet, hint_channels=(4, 8)), DiffusionLoss())
    plain = DiffusionObjective(pipe.config, objective.networks, pipe.vae, DiffusionLoss())
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    losses = []
    for each in (objective, plain):
        torch.manual_seed(0)
        losses.append(each((images, ["a red wall", "a green wall"]))[0].item())
    assert losses[0] == losses[1]


def test_a_recipe_can_go_on_from_a_model_with_its_vocabulary(pictures):
    recipe(pictures, VAE_TOML).run(CPU)
    first = recipe(pictures, LDM_TOML).run(CPU)
    (pictures / "pictures" / "0.txt").write_text("something entirely new")
    more = LDM_TOML.replace('out = "{out}/ldm"', 'out = "{out}/more"\nstart = "{out}/ldm/model"')
    still = more.replace("warmup = 0", "warmup = 0\nlearning_rate = 0.0")
    again = recipe(pictures, still).run(CPU)
    for name in ("unet/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"):
        assert (again / name).read_bytes() == (first / name).read_bytes()

    wider = more.replace("more", "wider").replace("mlp = 16", "mlp = 32")
    with pytest.raises(ValueError, match=r"has another architecture than \[unet\] and \[text\] say: give both"):
        recipe(pictures, wider).run(CPU)


def test_a_finished_run_started_again_only_saves_again(pictures, monkeypatch):
    vae_recipe = recipe(pictures, VAE_TOML)
    weights = "diffusion_pytorch_model.safetensors"
    first = (vae_recipe.run(CPU) / weights).read_bytes()
    (pictures / "vae" / "vae" / weights).unlink()
    monkeypatch.setattr(VAEObjective, "forward", None)  # no step is taken
    assert (vae_recipe.run(CPU) / weights).read_bytes() == first
    config = (pictures / "vae" / "vae" / "config.json").read_text()
    assert json.loads(config)["norm_num_groups"] == 2


def test_a_changed_recipe_does_not_touch_the_run_in_its_folder(pictures):
    recipe(pictures, VAE_TOML).run(CPU)
    before = {path: path.read_bytes() for path in (pictures / "vae").rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=r"holds a run of another recipe, at step 3: loss\.crop was 8 and is now 4; undo"
    ):
        recipe(pictures, VAE_TOML.replace("crop = 8", "crop = 4")).run(CPU)
    assert {path: path.read_bytes() for path in (pictures / "vae").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_run_may_be_moved_made_longer_and_sampled_with_other_prompts(pictures):
    recipe(pictures, VAE_TOML).run(CPU)
    recipe(pictures, LDM_TOML).run(CPU)
    (pictures / "ldm").rename(pictures / "moved")
    more = LDM_TOML.replace("{out}/ldm", "{out}/moved").replace("steps = 2", "steps = 3").replace("toy", "bear")
    more = more.replace("guidance_scale = 2.0", 'guidance_scale = 3.0\nsample_prompts = ["a red wall"]')
    more = more.replace('spacing = "trailing"', 'spacing = "leading"')
    pipe = ldm.load(recipe(pictures, more).run(CPU), ldm.Placement(device="cpu"))
    found = (pipe.config.name, pipe.config.guidance_scale, pipe.config.diffusion.spacing)
    assert found == ("bear", 3.0, "leading")
    log = (pictures / "moved" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [2, 3]


def test_every_value_that_may_change_is_one_of_a_recipe_and_all_others_are_fixed(pictures):
    def names(value, prefix=""):
        if not dataclasses.is_dataclass(value):
            return {prefix[:-1]}
        return set().union(*(names(getattr(value, f.name), f"{prefix}{f.name}.") for f in dataclasses.fields(value)))

    free = set()
    for text in (VAE_TOML, LDM_TOML):
        each = recipe(pictures, text)
        free |= names(each) & FREE
        assert set(each.fixed_values()) == names(each) - FREE
    assert free == FREE


def test_an_own_vocabulary_is_learned_from_captions_without_decoding_pictures(pictures, monkeypatch):
    recipe(pictures, VAE_TOML).run(CPU)
    monkeypatch.setattr(Folder, "__getitem__", None)
    with pytest.raises(TypeError):  # the first step of the training
        recipe(pictures, LDM_TOML).run(CPU)
    vocab = json.loads((pictures / "ldm" / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert {"red</w>", "wall</w>", "green</w>"} <= set(vocab)
    assert [path.name for path in (pictures / "ldm").glob("*token*")] == ["tokenizer"]


def test_ctrl_c_names_the_step_and_the_command_that_goes_on(pictures, monkeypatch, capsys):
    def interrupted(self, batch):
        signal.raise_signal(signal.SIGINT)
        return forward(self, batch)

    forward = VAEObjective.forward
    recipe(pictures, VAE_TOML, "my recipe.toml")
    monkeypatch.chdir(pictures)
    monkeypatch.setattr(VAEObjective, "forward", interrupted)
    assert cli.main(["train", "my recipe.toml", "--device", "cpu"]) == 130
    error = capsys.readouterr().err.splitlines()[-1]
    command = "ldm train 'my recipe.toml' --device cpu"
    assert error.endswith(f"training stopped after step 1 of 3, saved in {pictures}/vae; to go on: {command}")
    monkeypatch.setattr(VAEObjective, "forward", forward)
    assert cli.main(["train", "my recipe.toml", "--device", "cpu"]) == 0
    log = (pictures / "vae" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [3]


def test_one_command_trains_one_recipe_after_another(pictures, monkeypatch, capsys):
    recipe(pictures, VAE_TOML, "vae.toml")
    recipe(pictures, LDM_TOML, "ldm.toml")
    monkeypatch.chdir(pictures)
    assert cli.main(["train", "vae.toml", "nowhere.toml", "--device", "cpu"]) == 2
    assert not (pictures / "vae").exists()  # every recipe is read before the first training
    capsys.readouterr()
    assert cli.main(["train", "vae.toml", "ldm.toml", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(pictures / "vae" / "vae"), str(pictures / "ldm" / "model")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size = 16": "size = 15"}, "size must be a multiple of 2 pixels for this VAE, got 15"),
        ({"crop = 8": "crop = 9"}, "crop must be a multiple of 2 pixels for this VAE, got 9"),
        ({"crop = 8": "crop = 18"}, "crop must be at most the pictures' size of 16 pixels, got 18"),
    ],
)
def test_pictures_that_do_not_fit_the_vae_are_refused_before_the_training(pictures, changes, message):
    text = VAE_TOML
    for before, after in changes.items():
        text = text.replace(before, after)
    with pytest.raises(ValueError, match=message):
        recipe(pictures, text).run(CPU)
    recipe(pictures, VAE_TOML).run(CPU)
    with pytest.raises(ValueError, match="size must be a multiple of 2 pixels for this VAE, got 17"):
        recipe(pictures, LDM_TOML.replace("size = 16", "size = 17")).run(CPU)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('recipe = "gan"', "recipe must be one of 'vae', 'ldm', 'controlnet', .*, got 'gan'"),
        ("steps = 1", "recipe must be one of 'vae', 'ldm', 'controlnet', .*, got None"),
        ("recipe = ", "is not valid TOML"),
        (VAE_TOML + "speed = 3\n", "loop: unknown 'speed'; valid keys: steps, batch_size"),
        ('recipe = "vae"\nout = "x"\n', " lacks loop"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, text)


def test_keys_of_the_data_that_a_recipe_does_not_use_are_refused(pictures):
    text = VAE_TOML.replace("size = 16", 'size = 16\nbuckets = 4\nmask = "alpha"')
    with pytest.raises(ValueError, match=r"^buckets and mask under \[data\] cannot be used in this kind of recipe"):
        recipe(pictures, text).run(CPU)


def test_a_missing_recipe_says_where_others_are():
    with pytest.raises(ValueError, match=r"there is no recipe nowhere\.toml; the project's own recipes are in"):
        read_recipe("nowhere.toml")


def test_a_missing_vae_is_named(pictures):
    with pytest.raises(ValueError, match=f"{pictures / 'vae' / 'vae'}"):
        recipe(pictures, LDM_TOML).run(CPU)


def test_the_recipes_that_ship_can_be_read():
    names = ("train_vae", "sharpen_vae", "train_ldm", "train_controlnet")
    vae_recipe, sharpen, ldm_recipe, controlnet = (read_recipe(CONFIGS / f"{name}.toml") for name in names)
    assert isinstance(vae_recipe, VAERecipe)
    assert isinstance(sharpen, VAERecipe)
    assert isinstance(ldm_recipe, LDMRecipe)
    assert sharpen.start == vae_recipe.out / "vae"
    assert ldm_recipe.vae == sharpen.out / "vae"
    assert sharpen.vae == vae_recipe.vae
    assert ldm.TINY.unet == ldm_recipe.unet
    assert ldm.TINY.vae == dataclasses.replace(vae_recipe.vae, scaling_factor=ldm.TINY.vae.scaling_factor)
    assert isinstance(controlnet, ControlNetRecipe)
    assert len(controlnet.hint_channels) == len(vae_recipe.vae.channels)
    for name, side in {"finetune_sd15": 512, "finetune_sdxl": 1024}.items():
        tuned = read_recipe(CONFIGS / f"{name}.toml")
        assert (tuned.train, tuned.data.size, tuned.data.buckets) == (("unet",), side, 64)


def test_latents_that_were_encoded_once_train_as_those_of_each_batch_do(pictures):
    recipe(pictures, VAE_TOML.replace("steps = 3", "steps = 1\nlearning_rate = 0.0")).run(CPU)
    recipe(pictures, LDM_TOML).run(CPU)
    cached = LDM_TOML.replace('out = "{out}/ldm"', 'out = "{out}/cached"\nlatents = 3')
    recipe(pictures, cached).run(CPU)
    assert len(list((pictures / "cached" / "latents").iterdir())) == 1
    log = [json.loads((pictures / out / "log.jsonl").read_text()) for out in ("ldm", "cached")]
    assert log[0]["loss"] == pytest.approx(log[1]["loss"], rel=1e-3)  # the moments are kept in fp16

    recipe(pictures, VAE_TOML.replace("{out}/vae", "{out}/other")).run(CPU)
    (pictures / "cached" / "checkpoint.pt").unlink()
    with pytest.raises(ValueError, match="has latents of other data or of another encoder"):
        recipe(pictures, cached.replace("{out}/vae/vae", "{out}/other/vae")).run(CPU)


def test_the_decoder_of_a_vae_can_be_trained_alone(pictures):
    first = load_vae(recipe(pictures, VAE_TOML).run(CPU))
    text = VAE_TOML.replace("crop = 8", "crop = 8\ndecoder_only = true\nadversarial = 0.1")
    with pytest.raises(ValueError, match="decoder_only trains the decoder of a VAE that exists: give its folder as"):
        recipe(pictures, text).run(CPU)
    text = text.replace('out = "{out}/vae"', 'out = "{out}/sharp"\nstart = "{out}/vae/vae"')
    sharp = load_vae(recipe(pictures, text).run(CPU))
    assert sharp.config == first.config  # the same scaling factor
    for (name, before), after in zip(first.named_parameters(), sharp.parameters(), strict=True):
        fixed = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(before, after) == fixed, name

    with pytest.raises(ValueError, match=r"has another architecture than \[vae\] says: leave \[vae\] out"):
        recipe(pictures, text.replace("sharp", "deeper").replace("[8, 8]", "[8, 16]")).run(CPU)


def test_a_unet_that_does_not_fit_the_latents_is_refused_before_the_training(pictures):
    recipe(pictures, VAE_TOML).run(CPU)
    text = LDM_TOML.replace("[unet]", "[unet]\nin_channels = 8")
    with pytest.raises(ValueError, match=r"in_channels and out_channels of \[unet\] must be 4, as many as the latents"):
        recipe(pictures, text).run(CPU)


FINETUNE_TOML = """
recipe = "ldm"
out = "{out}/tuned"
start = "{out}/start"
train = ["unet"]
sample_prompts = ["a wall"]
[data]
size = 32
folder = "{out}/pictures"
[loop]
steps = 2
batch_size = 2
warmup = 0
learning_rate = 1e-2
log_every = 1
"""


def saved(folder, config, tokenizer=None, **options):
    """Save a tiny random model in `folder`, and return it as it is read again."""
    save(Model(config, *random_networks(config, tokenizer)), folder, **options)
    return load(folder)


def changed(before, after):
    """The parts of a model of which any parameter changed by more than the rounding to fp16."""
    parts = {"unet": 1, "vae": 1, "text_encoder": 3}  # levels of names: the towers apart
    found = set()
    for part, levels in parts.items():
        pairs = zip(getattr(before, part).named_parameters(), getattr(after, part).parameters(), strict=True)
        found |= {
            ".".join([part, *n.split(".")][:levels]) for (n, a), b in pairs if not torch.equal(a.half().float(), b)
        }
    return found


def test_sdxl_is_fine_tuned_from_a_checkpoint_without_its_architecture_in_the_recipe(pictures):
    before = saved(pictures / "start", TINY_SDXL)
    files = {path: path.read_bytes() for path in (pictures / "start").rglob("*") if path.is_file()}
    after = load(recipe(pictures, FINETUNE_TOML).run(CPU))
    assert changed(before, after) == {"unet"}
    assert after.config == before.config  # its size is that of the pictures
    assert {path: path.read_bytes() for path in (pictures / "start").rglob("*") if path.is_file()} == files
    average = torch.load(pictures / "tuned" / "checkpoint.pt", weights_only=True)["average"]
    assert average.keys() == before.unet.state_dict().keys()  # the frozen networks have no average

    other = FINETUNE_TOML.replace("tuned", "v") + '[diffusion]\nprediction = "v"\nzero_terminal_snr = true\n'
    config = load(recipe(pictures, other.replace("size = 32", "size = 16")).run(CPU)).config
    assert config.diffusion == DiffusionConfig("v", zero_terminal_snr=True)
    assert (config.image_size, config.guidance_scale, config.zero_negative) == (16, 3.0, True)


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        pytest.param('"text_encoder"', {"text_encoder.towers.0"}, marks=pytest.mark.slow),
        ('"text_encoder_2"', {"text_encoder.towers.1"}),
        ('"unet", "text_encoder", "text_encoder_2"', {"unet", "text_encoder.towers.0", "text_encoder.towers.1"}),
    ],
)
def test_the_recipe_chooses_which_networks_are_trained(pictures, names, parts):
    before = saved(pictures / "start", TINY_SDXL)
    after = load(recipe(pictures, FINETUNE_TOML.replace('"unet"', names)).run(CPU))
    assert changed(before, after) == parts


def test_a_single_file_is_fine_tuned_and_saved_as_a_single_file(pictures):
    tokenizer = Tokenizer.official()
    text = dataclasses.replace(TINY_RANDOM.text[0], vocab_size=49408, pad_id=49407)
    config = dataclasses.replace(TINY_RANDOM, text=(text,), image_size=32)
    before = saved(pictures / "start.safetensors", config, tokenizer, layout="ldm")
    text = FINETUNE_TOML.replace("/start", "/start.safetensors").replace("train =", 'layout = "ldm"\ntrain =')
    path = recipe(pictures, text).run(CPU)
    assert path == pictures / "tuned" / "model.safetensors"
    assert changed(before, load(path)) == {"unet"}


def test_mistakes_of_a_fine_tuning_are_named_before_the_training(pictures):
    saved(pictures / "start", TINY_RANDOM)
    for change, message in {
        ('["unet"]', '["text_encoder_2"]'): "train must name one of unet, text_encoder, got text_encoder_2",
        ('["unet"]', "[]"): "train must name one of unet, text_encoder, got nothing",
        ("train =", 'layout = "ldm"\ntrain ='): 'layout "ldm" has no place for a vocabulary other than CLIP\'s',
        ('start = "{out}/start"', ""): "vae is missing: name a VAE, or a model to start from as `start`",
        ("size = 32", "size = 32\nbuckets = 2"): "buckets must be a multiple of 4 pixels for this VAE, got 2",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            recipe(pictures, FINETUNE_TOML.replace(*change)).run(CPU)
    inpainting = dataclasses.replace(TINY_RANDOM, unet=dataclasses.replace(TINY_RANDOM.unet, in_channels=9))
    save(Model(inpainting, UNet(inpainting.unet), *random_networks()[1:]), pictures / "inpainting")
    with pytest.raises(ValueError, match=r"must be 4, .* got 9 and 4; models for editing have recipe ="):
        recipe(pictures, FINETUNE_TOML.replace("/start", "/inpainting")).run(CPU)
    assert not (pictures / "tuned" / "log.jsonl").exists()


@pytest.mark.parametrize("cached", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_killed_fine_tuning_in_buckets_goes_on_bit_for_bit(pictures, monkeypatch, cached):
    saved(pictures / "start", TINY_SDXL)
    for i, size in enumerate(((20, 60), (60, 20), (50, 18), (18, 50)), 3):
        Image.effect_noise(size, 50).convert("RGBA").save(pictures / "pictures" / f"{i}.png")
        (pictures / "pictures" / f"{i}.txt").write_text(f"noise {i}")
    text = FINETUNE_TOML.replace("size = 32", 'size = 32\nbuckets = 8\nmask = "alpha"\nkeep_out = 1')
    text = text.replace("steps = 2", "steps = 6\nvalidate_every = 3\ncheckpoint_every = 2")
    text = text.replace("train =", "latents = 6\ntexts = true\ntrain =") if cached else text
    seen, forward = [], DiffusionObjective.forward

    def watched(self, batch):
        seen.append((batch[0].shape, sorted(batch[2])))
        if len(seen) == 4:
            raise SystemExit
        return forward(self, batch)

    monkeypatch.setattr(DiffusionObjective, "forward", watched)
    with pytest.raises(SystemExit):
        recipe(pictures, text).run(CPU)
    killed = recipe(pictures, text).run(CPU)
    straight = recipe(pictures, text.replace("tuned", "straight")).run(CPU)
    for path in killed.rglob("*.safetensors"):
        assert path.read_bytes() == (straight / path.relative_to(killed)).read_bytes()
    logs = [(pictures / run / "log.jsonl").read_text().splitlines() for run in ("tuned", "straight")]
    found = [[(row["step"], row["loss"], row.get("validation")) for row in map(json.loads, log)] for log in logs]
    assert found[0] == found[1]
    assert [step for step, _, validation in found[0] if validation is not None] == [3, 6]
    assert len({shape for shape, _ in seen}) > 1
    names = ["context", "mask", "pooled", "sizes"] if cached else ["mask", "sizes"]
    assert all(each == names for _, each in seen)


def test_texts_of_a_text_encoder_that_is_trained_are_refused(pictures):
    saved(pictures / "start", TINY_RANDOM)
    text = FINETUNE_TOML.replace('["unet"]', '["unet", "text_encoder"]\ntexts = true')
    with pytest.raises(ValueError, match="texts = true is for a text encoder that stays: set train"):
        recipe(pictures, text).run(CPU)


def test_a_fine_tuning_lowers_the_loss_on_pictures_that_are_kept_out(pictures):
    saved(pictures / "start", TINY_RANDOM)
    for i in range(3, 8):
        Image.new("RGB", (32, 32), (30 * i, 255 - 30 * i, 90)).save(pictures / "pictures" / f"{i}.png")
        (pictures / "pictures" / f"{i}.txt").write_text("a wall")
    text = FINETUNE_TOML.replace("size = 32", "size = 32\nkeep_out = 2").replace("steps = 2", "steps = 60\nema = 0.9")
    text = text.replace("log_every = 1", "validate_every = 20").replace("train =", "latents = 6\ntexts = true\ntrain =")
    recipe(pictures, text).run(CPU)
    rows = [json.loads(line) for line in (pictures / "tuned" / "log.jsonl").read_text().splitlines()]
    first, *_, last = [row["validation"] for row in rows if "validation" in row]
    assert last < 0.7 * first
