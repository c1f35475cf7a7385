"""Tiles: what the blending keeps, and how far the result is from the whole."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

import ldm
from ldm.models.vae import Gaussian
from ldm.placement.live_bytes import LiveBytes
from ldm.placement.tiles import decode_tiles, encode_tiles
from tests.placement.test_slabs import NARROW, SMALL, pictures, random_vae

LOCAL = SimpleNamespace(  # an autoencoder to which every pixel is alone: tiles must change nothing
    config=SimpleNamespace(factor=2),
    check_size=lambda images: None,
    decode=lambda latents: F.interpolate(latents, scale_factor=2),
    encode=lambda images: Gaussian(images[:, :, ::2, ::2], images[:, :, ::2, ::2].abs()),
)


@pytest.mark.parametrize("size", [(1, 1), (4, 9), (8, 8), (9, 8), (23, 37)], ids=str)
@pytest.mark.parametrize(("tile", "overlap"), [(8, 1), (8, 3), (8, 4), (7, 3), (2, 1)])
def test_blending_changes_nothing_where_tiles_agree(size, tile, overlap):
    latents = torch.randn(2, 3, *size)
    images = LOCAL.decode(latents)
    options = {"tile": tile, "overlap": overlap}
    # weights that add up to 1 within a rounding
    torch.testing.assert_close(decode_tiles(LOCAL, latents, **options), images)
    encoded = encode_tiles(LOCAL, images, **options)
    torch.testing.assert_close(encoded.mean, latents)
    torch.testing.assert_close(encoded.std, latents.abs())


def test_a_tile_as_large_as_the_picture_is_the_whole():
    vae = random_vae(SMALL)
    latents, images = pictures(SMALL, 9, 5)
    decoded, encoded = vae.decode(latents), vae.encode(images)
    assert torch.equal(decode_tiles(vae, latents, tile=9, overlap=4), decoded)
    tiled = encode_tiles(vae, images, tile=9, overlap=4)
    assert torch.equal(tiled.mean, encoded.mean)
    assert torch.equal(tiled.std, encoded.std)


def test_the_error_of_tiles_on_the_bundled_model():
    pipe = ldm.load()
    *_, last = pipe.stream(ldm.Request("a frog on the grass", steps=2, images=4))
    latents = rearrange(last.x, "(i j) c h w -> 1 c (i h) (j w)", i=2)
    with torch.no_grad():
        whole = pipe.vae.decode(latents)
    error = (decode_tiles(pipe.vae, latents, tile=16, overlap=4) - whole).abs().mean().item()
    print(f"{error:.4f} of a range of 2, {error * 127.5:.2f} of 255 levels")
    # Tiles of a quarter of the picture. Of 16 pictures side by side it is 0.010, and 0.003 with tiles of 32.
    assert 0.002 < error < 0.02


def test_tiles_take_the_memory_of_one_tile():
    vae = random_vae(NARROW)
    latents, _ = pictures(NARROW, 36, 36)
    peaks = {}
    for tile in (36, 12):
        with LiveBytes() as live:
            decode_tiles(vae, latents, tile=tile, overlap=4)
        peaks[tile] = live.peak
    print(f"{peaks[12] / peaks[36]:.2f}")
    assert peaks[12] < peaks[36] / 4  # a ninth, and the image


@pytest.mark.parametrize(("side", "count", "tile"), [(64, 1, 64), (128, 9, 48), (256, 25, 58)])
def test_tiles_are_as_few_as_may_be_and_as_small_as_they_then_can_be(side, count, tile):
    seen = []
    spy = SimpleNamespace(config=LOCAL.config, decode=lambda x: seen.append(x) or LOCAL.decode(x))
    decode_tiles(spy, torch.zeros(1, 1, side, side))
    assert [tuple(x.shape[2:]) for x in seen] == [(tile, tile)] * count


@pytest.mark.parametrize("overlap", [0, 5, -1])
def test_an_overlap_that_leaves_seams_or_no_step_is_refused(overlap):
    with pytest.raises(ValueError, match=f"tiles of 8 must overlap by 1 to 4 .* got {overlap}"):
        decode_tiles(LOCAL, torch.zeros(1, 3, 9, 9), tile=8, overlap=overlap)
