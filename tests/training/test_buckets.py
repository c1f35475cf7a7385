"""Aspect-ratio buckets: SDXL's table, the nearest bucket, and the crop that is recorded."""

import pytest
from PIL import Image, ImageOps

from ldm.training.buckets import Size, bucket_table, crop_corner, nearest

# Podell et al. 2023, appendix I: height and width of the upright half
SDXL = """
2048x512 1984x512 1920x512 1856x512 1792x576 1728x576 1664x576 1600x640 1536x640 1472x704 1408x704 1344x704 1344x768
1280x768 1216x832 1152x832 1152x896 1088x896 1088x960 1024x960
"""


def test_the_table_of_1024_pixels_in_steps_of_64_is_that_of_sdxl():
    upright = {Size(int(w), int(h)) for h, w in (word.split("x") for word in SDXL.split())}
    assert set(bucket_table(1024, 64)) == upright | {Size(h, w) for w, h in upright} | {Size(1024, 1024)}


def test_buckets_have_almost_the_area_of_the_square_and_sides_that_are_multiples():
    table = bucket_table(128, 16)
    assert Size(128, 128) in table
    assert all(0.9 * 128**2 <= w * h <= 128**2 and w % 16 == h % 16 == 0 for w, h in table)
    with pytest.raises(ValueError, match="must be a multiple of buckets = 24 pixels, got 128"):
        bucket_table(128, 24)
    with pytest.raises(ValueError, match="must be a multiple of buckets = -8 pixels, got 128"):
        bucket_table(128, -8)


def test_a_picture_goes_to_the_bucket_of_the_nearest_aspect_ratio():
    table = bucket_table(1024, 64)

    def bucket(width, height):
        return tuple(table[nearest(table, Size(width, height))])

    assert bucket(300, 300) == (1024, 1024)
    assert bucket(4000, 3000) == (1152, 896)  # 1.286; the next ones are 1.385 and 1.214
    assert bucket(3000, 4000) == (896, 1152)
    assert bucket(1920, 1080) == (1344, 768)  # 1.75; the next one is 1.909
    assert bucket(10000, 100) == (2048, 512)
    assert bucket(100, 10000) == (512, 2048)


@pytest.mark.parametrize(("picture", "bucket"), [((40, 20), (16, 16)), ((30, 50), (16, 24)), ((8, 8), (24, 16))])
def test_the_recorded_corner_is_where_the_crop_of_the_scaled_picture_begins(picture, bucket):
    """A gradient from 0 to 250 along each axis shows which part of the picture is kept."""
    width, height = picture
    top, left = crop_corner(Size(*picture), Size(*bucket))
    for axis, corner in ((0, left), (1, top)):
        ramp = Image.new("F", picture)
        ramp.putdata([250 * ((x, y)[axis] + 0.5) / picture[axis] for y in range(height) for x in range(width)])
        kept = ImageOps.fit(ramp, bucket, Image.Resampling.BILINEAR)
        scaled = picture[axis] * max(bucket[0] / width, bucket[1] / height)
        middle = kept.getpixel((bucket[0] // 2, bucket[1] // 2)) / 250 * scaled - 0.5  # in scaled pixels
        assert abs(middle - bucket[axis] // 2 - corner) < 1
