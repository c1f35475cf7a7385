"""KID against its formula, and in the order that one sees: true pictures, blurred ones, noise."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from ldm.config import VAEConfig
from ldm.models.vae import VAE
from ldm.training import kid as module
from ldm.training.kid import features, kid
from ldm.training.scenes import Scenes
from ldm.training.vae import init
from tests.training.drawn import drawn_sprites


def test_the_distance_is_the_unbiased_estimate_of_the_paper_in_each_block_of_standardized_features(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 3)
    made, true = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).double() * 100 + 7
    a, b = ((side - true.mean(0)) / true.std(0) for side in (made, true))

    def kernel(x, y):
        return ((x * y).sum().item() / 5 + 1) ** 3

    blocks = []
    for start in (0, 3):
        x, y = a[start : start + 3], b[start : start + 3]
        own = sum(kernel(s[i], s[j]) for s in (x, y) for i, j in itertools.permutations(range(3), 2)) / 6
        blocks.append(own - 2 * sum(kernel(p, q) for p in x for q in y) / 9)
    mean, error = kid(made, true)
    assert mean == pytest.approx(sum(blocks) / 2)
    assert error == pytest.approx(abs(blocks[0] - blocks[1]) / 2)


def test_a_feature_that_never_varies_is_no_obstacle():
    assert kid(torch.ones(200, 2), torch.ones(200, 2)) == (0, 0)


def test_sets_of_other_sizes_are_refused():
    for a, b in ((199, 199), (200, 300)):
        with pytest.raises(ValueError, match=f"two equal sets of at least 200 pictures, got {a} and {b}"):
            kid(torch.zeros(a, 4), torch.zeros(b, 4))


def test_true_pictures_are_nearer_than_blurred_ones_and_these_nearer_than_noise(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 20)
    torch.manual_seed(0)
    vae = init(VAE(VAEConfig(channels=(8, 16), res_blocks=1, norm_groups=2))).eval()
    scenes = Scenes(drawn_sprites(), 32)
    pictures = [Image.fromarray(scenes[i][0].permute(1, 2, 0).numpy()) for i in range(80)]
    noise = np.random.default_rng(0)
    changed = {
        "true": pictures[40:],
        "blurred": [picture.filter(ImageFilter.GaussianBlur(2)) for picture in pictures[40:]],
        "noise": [Image.fromarray(noise.integers(256, size=(32, 32, 3), dtype=np.uint8)) for _ in range(40)],
    }
    known = features(vae, pictures[:40])
    assert known.shape == (40, 2 * 16)
    found = {name: kid(features(vae, shown), known) for name, shown in changed.items()}
    assert found["true"][0] < found["blurred"][0] < found["noise"][0]
    assert abs(found["true"][0]) < 4 * found["true"][1] + 1e-6
