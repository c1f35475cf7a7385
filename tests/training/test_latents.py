"""A data set whose latents or captions were encoded once."""

import pytest
import torch

from ldm.config import VAEConfig
from ldm.models.text import TextEncoder
from ldm.models.vae import VAE
from ldm.training import latents
from ldm.training.latents import Latents, Texts
from ldm.training.loop import collate
from tests.tiny import TINY_SDXL, random_networks


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
    assert all(torch.equal(again[i][0], first[i][0]) for i in range(4))


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
    each = (Latents(Noise(), 4, vae, tmp_path / str(b), {}, bf16=b) for b in (False, True))
    exact, rounded = (torch.stack([latents[i][0] for i in range(4)]) for latents in each)
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().max() < 0.05


class Shapes(Noise):
    """Pictures in two buckets, with masks and sizes."""

    buckets = torch.arange(7) % 2

    def __getitem__(self, index):
        image, caption = super().__getitem__(index)
        mask = torch.full((1, 8, 8), 255 * (index % 3 == 0), dtype=torch.uint8)
        mask[..., 4:] = 0
        return image[:, : 8 - 4 * (index % 2)], caption, {"mask": mask, "sizes": torch.tensor([4001, index, 0, 3])}


def test_latents_of_any_shape_keep_their_masks_and_sizes_and_their_buckets(vae, tmp_path):
    for encoded in (Latents(Shapes(), 6, vae, tmp_path, {}), Latents(Shapes(), 6, vae, tmp_path, {})):  # written, read
        assert encoded.buckets.tolist() == [0, 1, 0, 1, 0, 1]
        for i in range(6):
            moments, caption, more = encoded[i]
            images, _, _ = collate([Shapes()[i]])
            with torch.no_grad():
                expected = torch.cat(vae.encode(images), dim=1)[0]
            torch.testing.assert_close(moments, expected, rtol=2e-3, atol=1e-3)  # kept as fp16
            assert caption == f"noise {i}"
            assert more["sizes"].tolist() == [4001, i, 0, 3]  # 4001 is no number of fp16
            height = 4 - 2 * (i % 2)
            assert torch.equal(more["mask"], torch.tensor([1.0, 1.0, 0, 0]).mul(i % 3 == 0).expand(1, height, 4))


@pytest.fixture
def text_encoder():
    return random_networks(TINY_SDXL)[2]


def test_captions_are_encoded_once_and_read_when_they_are_needed(vae, text_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "TEXTS", 4)
    texts = Texts(Latents(Shapes(), 7, vae, tmp_path / "latents", {}), text_encoder, tmp_path / "texts")
    assert len(texts) == 7
    assert len(list((tmp_path / "texts").iterdir())) == 2
    monkeypatch.setattr(TextEncoder, "encode", None)  # a second run encodes nothing
    again = Texts(Latents(Shapes(), 7, vae, tmp_path / "latents", {}), text_encoder, tmp_path / "texts")
    monkeypatch.undo()
    assert again.buckets.tolist() == texts.buckets.tolist() == [0, 1, 0, 1, 0, 1, 0]
    for i in (0, 5):
        moments, caption, more = again[i]
        assert set(more) == {"mask", "sizes", "context", "pooled"}
        assert torch.equal(moments, texts[i][0])
        given = text_encoder.encode([caption])
        torch.testing.assert_close(more["context"], given.context[0], rtol=2e-3, atol=1e-3)  # kept as fp16
        torch.testing.assert_close(more["pooled"], given.vector[0], rtol=2e-3, atol=1e-3)


def test_texts_of_other_captions_or_of_another_encoder_are_refused(text_encoder, tmp_path):
    Texts(Noise(), text_encoder, tmp_path)
    other = Noise()
    other.caption = lambda index: "other"
    error = r"00000000\.safetensors has captions of other data or of another encoder: delete the folder"
    with pytest.raises(ValueError, match=error):
        Texts(other, text_encoder, tmp_path)
    torch.nn.init.zeros_(text_encoder.towers[1].projection.weight)
    with pytest.raises(ValueError, match=error):
        Texts(Noise(), text_encoder, tmp_path)
