"""The autoencoder: its distribution, its scale and its shapes."""

import dataclasses
import math

import pytest
import torch

from ldm.config import VAEConfig
from ldm.models.vae import VAE, Gaussian
from ldm.presets import SD15

SMALL = VAEConfig(channels=(8, 16), res_blocks=1, norm_groups=4, scaling_factor=0.5)


def test_the_official_autoencoder_has_its_number_of_parameters_and_tensors():
    with torch.device("meta"):
        state = VAE(SD15.vae).state_dict()
    assert (sum(t.numel() for t in state.values()), len(state)) == (83_653_863, 248)


def test_the_norms_have_ldms_epsilon():  # torch's default is 1e-5
    assert {part.eps for part in VAE(SMALL).modules() if isinstance(part, torch.nn.GroupNorm)} == {1e-6}


def test_a_gaussian_samples_mean_plus_std_times_noise_and_its_mode_is_the_mean():
    mean, std, noise = torch.randn(3, 1, 4, 2, 2)
    posterior = Gaussian(mean, std)
    torch.testing.assert_close(posterior.sample(noise), mean + std * noise)
    assert torch.equal(posterior.mode(), mean)
    torch.manual_seed(0)
    first = posterior.sample()
    torch.manual_seed(0)
    assert torch.equal(first, posterior.sample())


def test_the_scaling_factor_multiplies_latents_and_is_undone_by_decode():
    torch.manual_seed(0)
    scaled = VAE(SMALL)
    plain = VAE(dataclasses.replace(SMALL, scaling_factor=1.0))
    plain.load_state_dict(scaled.state_dict())
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    ours, raw = scaled.encode(images), plain.encode(images)
    torch.testing.assert_close(ours.mean, raw.mean * 0.5)
    torch.testing.assert_close(ours.std, raw.std * 0.5)
    torch.testing.assert_close(scaled.decode(ours.mean), plain.decode(raw.mean))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_one_latent_pixel_spans_the_factor(levels):
    config = dataclasses.replace(SMALL, channels=(8, 16, 16)[:levels])
    assert config.factor == 2 ** (levels - 1)
    vae = VAE(config)
    latents = vae.encode(torch.zeros(2, 3, 12, 8)).mode()
    assert latents.shape == (2, 4, 12 // config.factor, 8 // config.factor)
    assert vae.decode(latents).shape == (2, 3, 12, 8)


def test_an_image_size_off_the_factor_is_refused_with_what_to_do():
    for height, width in ((7, 8), (8, 7)):
        with pytest.raises(ValueError, match=f"multiples of 2, got {height}x{width}: resize or pad"):
            VAE(SMALL).encode(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize(("value", "clamped"), [(1000.0, 20), (-1000.0, -30)])
def test_a_wild_log_variance_is_clamped_as_in_ldm(value, clamped):
    vae = VAE(SMALL)
    with torch.no_grad():
        vae.quant_conv.bias[4:] = value
    std = vae.encode(torch.zeros(1, 3, 4, 4)).std
    torch.testing.assert_close(std, torch.full_like(std, 0.5 * math.exp(clamped / 2)))
