"""A data set whose latents were encoded once."""

import pytest
import torch

from ldm.config import VAEConfig
from ldm.models.vae import VAE
from ldm.training import latents
from ldm.training.latents import Latents
from ldm.training.loop import collate


class Noise:
    def __init__(self):
        self.drawn = []

    def __len__(self):
        return 7

    def __getitem__(self, index):
        self.drawn.append(index)
        generator = torch.Generator().manual_seed(index)
        return torch.randint(256, (3, 8, 8), generator=generator, dtype=torch.uint8), self.caption(index)

    def caption(self, index):
        return f"noise {index}"


@pytest.fixture
def vae(monkeypatch):
    monkeypatch.setattr(latents, "PART", 4)
    monkeypatch.setattr(latents, "BATCH", 3)
    torch.manual_seed(0)
    return VAE(VAEConfig(channels=(8, 8), res_blocks=1, norm_groups=2, scaling_factor=0.5)).eval()


def test_an_example_has_the_mean_and_the_deviation_of_its_latents_and_its_caption(vae, tmp_path):
    encoded = Latents(Noise(), 6, vae, tmp_path, {})
    assert len(encoded) == 6
    for index in (0, 5):
        images, _ = collate([Noise()[index]])
        with torch.no_grad():
            mean, std = vae.encode(images)
        moments, caption = encoded[index]
        torch.testing.assert_close(moments, torch.cat([mean, std], dim=1)[0], rtol=2e-3, atol=1e-3)  # kept as fp16
        assert caption == encoded.caption(index) == f"noise {index}"
    batch, _ = collate([encoded[0], encoded[1]])
    assert torch.equal(batch[0], encoded[0][0])  # not scaled as levels are


def test_no_more_examples_are_encoded_than_there_are(vae, tmp_path):
    assert len(Latents(Noise(), 100, vae, tmp_path, {})) == 7


def test_a_stopped_encoding_goes_on_where_it_was(vae, tmp_path):
    first = Latents(Noise(), 4, vae, tmp_path, {})
    noise = Noise()
    again = Latents(noise, 7, vae, tmp_path, {})
    assert noise.drawn == [4, 5, 6]
    assert torch.equal(again.moments[:4], first.moments)


def test_latents_of_another_source_are_refused(vae, tmp_path):
    Latents(Noise(), 4, vae, tmp_path, {"data.seed": 0})
    error = r"00000000\.safetensors has latents of other data or of another encoder: delete the folder"
    with pytest.raises(ValueError, match=error):
        Latents(Noise(), 4, vae, tmp_path, {"data.seed": 1})
    torch.nn.init.zeros_(vae.decoder.conv_in.weight)
    Latents(Noise(), 4, vae, tmp_path, {"data.seed": 0})  # the decoder may change
    torch.nn.init.zeros_(vae.quant_conv.weight)
    with pytest.raises(ValueError, match=error):
        Latents(Noise(), 4, vae, tmp_path, {"data.seed": 0})


def test_bfloat16_changes_the_moments_a_little(vae, tmp_path):
    exact, rounded = (Latents(Noise(), 4, vae, tmp_path / str(b), {}, bf16=b).moments for b in (False, True))
    assert not torch.equal(exact, rounded)
    assert (exact.float() - rounded.float()).abs().max() < 0.05
