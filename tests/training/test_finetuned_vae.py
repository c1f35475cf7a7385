"""The decoder of a VAE of another make learns a folder of pictures, and its encoder stays."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from ldm.checkpoint.files import load_vae, save, save_vae
from ldm.checkpoint.parts import Model
from ldm.config import VAEConfig
from ldm.models.vae import VAE
from ldm.training.data import Folder
from ldm.training.loop import collate
from ldm.training.recipes import read_recipe
from ldm.training.vae import VAELoss, VAEObjective, init
from tests.tiny import TINY_RANDOM, random_networks

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parent.parent.parent / "configs"
OFFICIAL_SHAPE = VAEConfig(channels=(4, 8, 8, 8), norm_groups=4)  # four levels, two blocks, 4 channels, scale 0.18215

TOML = """
recipe = "vae"
out = "{out}/run"
start = "{out}/start"
[data]
size = 32
folder = "{out}/pictures"
[loss]
crop = 16
kl = 0.0
adversarial = 0.01
adversarial_start = 5
discriminator_channels = 8
discriminator_layers = 1
decoder_only = true
[loop]
steps = 20
batch_size = 4
learning_rate = 5e-2
warmup = 0
ema = 0.5
log_every = 1
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with four gray pictures, and a VAE whose decoder makes all pictures too bright."""
    torch.manual_seed(0)
    (tmp_path / "pictures").mkdir()
    for i, color in enumerate(("dimgray", "gray", "slategray", "darkgray")):
        picture = Image.new("RGB", (32, 32), color)
        picture.paste("silver", (8 * i, 8, 8 * i + 8, 24))
        picture.save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text("")
    vae = init(VAE(OFFICIAL_SHAPE))
    nn.init.ones_(vae.decoder.conv_out.bias)
    save_vae(vae, tmp_path / "start", image_size=32)
    return tmp_path


def recipe(folder, *changes):
    text = TOML
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    (folder / "recipe.toml").write_text(text.format(out=folder))
    return read_recipe(folder / "recipe.toml")


def logged(folder, name):
    return [json.loads(line)[name] for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


@torch.no_grad()
def error(vae, folder):
    data = Folder(folder / "pictures", 32)
    images, _ = collate([data[i] for i in range(len(data))])
    return (vae.decode(vae.encode(images).mode()) - images).abs().mean().item()


def is_of_the_encoder(name):
    return name.startswith(("encoder.", "quant_conv."))


def test_a_decoder_is_fine_tuned_with_the_architecture_of_its_file_and_the_encoder_stays_bit_for_bit(folder):
    start = load_vae(folder / "start")
    tuned = load_vae(recipe(folder).run(CPU))
    assert tuned.config == start.config
    for name, before in start.state_dict().items():
        after = tuned.state_dict()[name]
        assert torch.equal(before, after) == is_of_the_encoder(name), name
    losses = logged(folder, "l1")
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert error(tuned, folder) < 0.7 * error(start, folder)
    assert logged(folder, "fool")[0] != logged(folder, "fool")[-1]  # the discriminator takes part


def test_the_vae_of_a_whole_model_is_a_start(folder):
    unet, vae, text_encoder = random_networks()
    save(Model(TINY_RANDOM, unet, vae, text_encoder), folder / "model")
    changes = ("{out}/start", "{out}/model"), ("steps = 20", "steps = 1")
    tuned = load_vae(recipe(folder, *changes).run(CPU))
    assert tuned.config == vae.config
    assert torch.equal(tuned.encoder.conv_in.weight, vae.encoder.conv_in.weight)
    assert not torch.equal(tuned.decoder.conv_in.weight, vae.decoder.conv_in.weight)


def test_an_architecture_beside_a_start_must_be_the_same(folder):
    other = ("[loss]", "[vae]\nchannels = [8, 8]\n[loss]")
    with pytest.raises(ValueError, match=r"start has another architecture than \[vae\] says: leave \[vae\] out"):
        recipe(folder, other).run(CPU)


def scripted(path, network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript
        torch.jit.save(torch.jit.script(network), path)


class Distance(nn.Module):
    """Three times the mean squared error of each image, with a weight that must not be trained."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.factor * (a - b).square().mean(dim=(1, 2, 3))


def test_a_perceptual_distance_comes_from_a_file_counts_with_its_weight_and_is_not_saved(folder):
    scripted(folder / "distance.pt", Distance())
    with_distance = (
        ("kl = 0.0", 'kl = 0.0\nperceptual = "{out}/distance.pt"\nperceptual_weight = 0.5'),
        ("steps = 20", "steps = 1"),
    )
    recipe(folder, *with_distance).run(CPU)
    terms = {name: logged(folder, name)[0] for name in ("loss", "l1", "edges", "perceptual", "discriminator")}
    expected = terms["l1"] + terms["edges"] + 0.5 * terms["perceptual"] + terms["discriminator"]
    assert terms["loss"] == pytest.approx(expected, rel=1e-4)  # the adversarial term has not started
    assert terms["perceptual"] > 0
    state = torch.load(folder / "run" / "checkpoint.pt", weights_only=True)
    assert not [name for name in state["objective"] if "perceptual" in name]

    (folder / "distance.pt").write_text("no network")
    with pytest.raises(ValueError, match=r"distance\.pt is no TorchScript file"):
        recipe(folder, *with_distance).run(CPU)
    (folder / "distance.pt").unlink()
    with pytest.raises(ValueError, match=r"there is no file .*distance\.pt: give a TorchScript file"):
        recipe(folder, *with_distance).run(CPU)


def test_the_size_of_the_discriminator_is_that_of_the_recipe():
    loss = VAELoss(adversarial=0.1, discriminator_channels=64, discriminator_layers=3)
    widths = [conv.out_channels for conv in VAEObjective(OFFICIAL_SHAPE, loss).discriminator.convs]
    assert widths == [128, 256, 512]  # as in the official training of the autoencoders


def test_the_recipe_for_official_vaes_can_be_read_and_takes_its_architecture_from_the_file():
    found = read_recipe(CONFIGS / "finetune_vae_sd15.toml")
    assert (found.vae, found.loss.decoder_only) == (None, True)
    assert found.start.name in (CONFIGS.parent / "weights" / "README.md").read_text(encoding="utf-8")
