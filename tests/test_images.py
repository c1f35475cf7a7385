"""Tensors to 8-bit pictures and back, and the sizes and shapes of pictures."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ldm.geometry import fit, grid, target_size
from ldm.images import to_pil, to_tensor


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_pictures_equal_those_of_diffusers_to_the_last_level():
    images = torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    reference = VaeImageProcessor().postprocess(images, output_type="pil")
    for ours, theirs in zip(to_pil(images), reference, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_levels_are_rounded_and_what_lies_outside_is_clamped():
    images = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).expand(1, 3, 1, 5)
    assert np.asarray(to_pil(images)[0])[0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(("count", "size"), [(1, (2, 3)), (2, (4, 3)), (3, (4, 6)), (5, (6, 6))])
def test_a_grid_is_nearly_square_and_filled_row_by_row(count, size):
    pictures = [Image.new("RGB", (2, 3), (i + 1, 0, 0)) for i in range(count)]
    sheet = grid(pictures)
    assert sheet.size == size
    levels = np.asarray(sheet)[::3, ::2, 0].flatten().tolist()
    assert levels[:count] == list(range(1, count + 1))
    assert not any(levels[count:])


def test_every_level_becomes_a_tensor_and_the_same_level_again():
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2))
    tensor = to_tensor(picture)
    assert (tensor.min(), tensor.max(), tensor.dtype) == (-1, 1, torch.float32)
    assert np.array_equal(to_pil(tensor)[0], picture)


def test_a_tensor_of_a_picture_equals_that_of_diffusers_bit_for_bit():
    picture = noise(24, 16)
    tensor = to_tensor(picture)
    assert tensor.shape == (1, 3, 16, 24)
    assert tensor.is_contiguous()
    assert torch.equal(tensor, VaeImageProcessor().preprocess(picture))
    assert np.array_equal(to_pil(tensor)[0], picture)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_a_picture_that_is_not_rgb_does_not_become_a_tensor(mode):
    with pytest.raises(ValueError, match=f"must have the mode RGB, got {mode}: convert it with ldm.pictures.to_rgb"):
        to_tensor(Image.new(mode, (8, 8)))


@pytest.mark.parametrize("size", [(64, 64), (16, 40), (40, 16), (8, 8), (128, 96)])
def test_stretch_equals_the_resizing_of_diffusers_bit_for_bit(size):
    picture = noise(61, 37)
    width, height = size
    reference = VaeImageProcessor(resample="lanczos").preprocess(picture, height, width)
    assert torch.equal(to_tensor(fit(picture, width, height, resize="stretch")), reference)


@pytest.mark.parametrize(
    ("size", "scaled", "middle"),
    [((60, 30), (64, 32), (16, 0, 48, 32)), ((30, 90), (32, 96), (0, 32, 32, 64)), ((8, 4), (64, 32), (16, 0, 48, 32))],
)
def test_crop_scales_until_both_sides_cover_and_keeps_the_middle(size, scaled, middle):
    picture = noise(*size).point(lambda level: 100 + level // 5)  # no level is clamped between the two passes
    expected = picture.resize(scaled, Image.Resampling.LANCZOS).crop(middle)
    ours = fit(picture, 32, 32)
    assert ours.size == (32, 32)
    assert np.abs(np.asarray(ours, int) - np.asarray(expected, int)).max() <= 2  # levels are rounded after each pass


def test_crop_cuts_as_much_from_one_side_as_from_the_other():
    picture = Image.new("RGB", (90, 30), "green")
    picture.paste("red", (0, 0, 30, 30))
    picture.paste("blue", (60, 0, 90, 30))
    levels = np.asarray(fit(picture, 16, 16))
    assert (levels[:, 4:-4] == [0, 128, 0]).all()
    assert np.array_equal(levels, levels[:, ::-1, ::-1])


@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_a_picture_that_has_the_size_is_unchanged(resize):
    assert np.array_equal(fit(noise(24, 16), 24, 16, resize=resize), noise(24, 16))


@pytest.mark.parametrize("resize", ["crop", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (3, 997)])
def test_pictures_of_every_shape_are_resized(size, resize):
    assert fit(Image.new("RGB", size, "red"), 24, 16, resize=resize).getcolors() == [(24 * 16, (255, 0, 0))]


def test_an_unknown_way_to_resize_is_refused():
    with pytest.raises(ValueError, match='resize must be "crop" or "stretch", got \'fill\''):
        fit(noise(8, 8), 8, 8, resize="fill")


@pytest.mark.parametrize("size", [(0, 8), (8, 0), (0, 0)])
def test_a_picture_without_pixels_is_refused(size):
    with pytest.raises(ValueError, match=f"has no pixels: its size is {size[0]} x {size[1]}"):
        target_size(*size, 64, 8)
    for resize in ("crop", "stretch"):
        with pytest.raises(ValueError, match=f"has no pixels: its size is {size[0]} x {size[1]}"):
            fit(Image.new("RGB", size), 8, 8, resize=resize)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        ((512, 512), (512, 512)),
        ((10, 10), (512, 512)),
        ((1024, 512), (728, 360)),  # 724.1 x 362.0
        ((3000, 4000), (440, 592)),  # 443.4 x 591.2
        ((1920, 1080), (680, 384)),  # 682.7 x 384
    ],
)
def test_a_picture_gives_its_aspect_ratio_to_the_area_of_the_square(picture, expected):
    assert target_size(*picture, 512, 8) == expected
    assert target_size(*picture[::-1], 512, 8) == expected[::-1]


@pytest.mark.parametrize(("area_side", "factor"), [(512, 8), (512, 64), (64, 4), (1024, 8)])
@pytest.mark.parametrize("ratio", [1, 1.5, 7, 33, 64, 65, 127, 1000, 10**6])
def test_the_area_stays_near_that_of_the_square_however_long_the_picture_is(ratio, area_side, factor):
    width, height = target_size(round(ratio * 100), 100, area_side, factor)
    assert width % factor == height % factor == 0
    assert min(width, height) >= factor
    assert 0.6 < width * height / area_side**2 < 1.4  # a short side of 1.5 factors is rounded by a third
    if height > 4 * factor:
        assert width / height == pytest.approx(ratio, rel=0.2)


def test_a_network_whose_square_is_smaller_than_the_factor_gets_one_factor():
    assert target_size(100, 100, 4, 8) == (8, 8)


@pytest.mark.parametrize(
    ("picture", "given", "expected"),
    [
        ((1920, 1080), {"width": 640}, (640, 360)),
        ((1920, 1080), {"height": 640}, (1136, 640)),  # 1137.8
        ((1080, 1920), {"width": 640}, (640, 1136)),
        ((1000, 1), {"width": 640}, (640, 8)),
        ((10**6, 1), {"height": 64}, (512 * 512 // 8, 64)),
        ((1920, 1080), {"width": 640, "height": 72}, (640, 72)),
    ],
)
def test_a_given_side_is_kept_and_the_other_follows_from_the_aspect_ratio(picture, given, expected):
    assert target_size(*picture, 512, 8, **given) == expected
