"""Watermarks against a slow form of the library's algorithm with OpenCV, and after changes of the pictures."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from ldm import cli
from ldm.safety import watermark
from ldm.safety.watermark import FOUND, KNOWN, SDXL, detect, message_bits, read, write
from tests.benchmarks.watermark import CHANGES, PICTURES, lines, psnr

METHODS = ("dwtDctSvd", "dwtDct")
HAAR = 0.7071067811865476


def noisy(height, width, seed=0, contrast=40):
    """A picture whose neighboring pixels differ, with gray levels and colors near both ends, too."""
    rng = np.random.default_rng(seed)
    rough = np.kron(rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3)), np.ones((16, 16, 1)))
    levels = rough[:height, :width] + rng.normal(0, contrast, (height, width, 3))
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def haar_of_pairs(a, b):
    return HAAR * a + HAAR * b, HAAR * a - HAAR * b


def slow_bands(plane):
    """One level of the Haar transform of a list of rows, one 2x2 square at a time: low, columns, rows, both."""
    bands = np.empty((4, plane.shape[0] // 2, plane.shape[1] // 2))
    for i in range(bands.shape[1]):
        for j in range(bands.shape[2]):
            (a, b), (c, d) = plane[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].astype(float)
            (low_1, high_1), (low_2, high_2) = haar_of_pairs(a, c), haar_of_pairs(b, d)
            (bands[0, i, j], bands[2, i, j]), (bands[1, i, j], bands[3, i, j]) = (
                haar_of_pairs(low_1, low_2),
                haar_of_pairs(high_1, high_2),
            )
    return bands


def slow_inverse(low, columns, rows, both):
    plane = np.empty((2 * low.shape[0], 2 * low.shape[1]))
    for i, j in np.ndindex(low.shape):
        top = haar_of_pairs(low[i, j], rows[i, j])
        bottom = haar_of_pairs(columns[i, j], both[i, j])
        for x in (0, 1):
            plane[2 * i, 2 * j + x], plane[2 * i + 1, 2 * j + x] = haar_of_pairs(top[x], bottom[x])
    return plane


def slow_blocks(low):
    for i in range(low.shape[0] // 4):
        for j in range(low.shape[1] // 4):
            yield low[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]  # a view


def slow_write_dwt_dct(picture, bits):
    """The pixels that invisible-watermark's method dwtDct writes, in its order of operations."""
    yuv = cv2.cvtColor(np.asarray(picture)[..., ::-1].copy(), cv2.COLOR_BGR2YUV)
    height, width = yuv.shape[0] // 4 * 4, yuv.shape[1] // 4 * 4
    low, columns, rows, both = slow_bands(yuv[:height, :width, 1])
    for number, block in enumerate(slow_blocks(low)):
        place = 1
        for k in range(2, 16):
            if abs(block[k // 4, k % 4]) > abs(block[place // 4, place % 4]):
                place = k
        value = block[place // 4, place % 4]
        level = (abs(value) // 36 + 0.25 + 0.5 * bits[number % len(bits)]) * 36
        block[place // 4, place % 4] = level if value >= 0 else -level
    yuv[:height, :width, 1] = slow_inverse(low, rows, columns, both)  # the library swaps the two
    return cv2.cvtColor(yuv, cv2.COLOR_YUV2BGR)[..., ::-1]


def slow_read_svd(picture, length):
    """The bits that invisible-watermark's method dwtDctSvd reads, with its DCT."""
    yuv = cv2.cvtColor(np.asarray(picture)[..., ::-1].copy(), cv2.COLOR_BGR2YUV)
    height, width = yuv.shape[0] // 4 * 4, yuv.shape[1] // 4 * 4
    votes = [[] for _ in range(length)]
    for number, block in enumerate(slow_blocks(slow_bands(yuv[:height, :width, 1])[0])):
        largest = np.linalg.svd(cv2.dct(block.copy()))[1][0]
        votes[number % length].append(int(largest % 36 > 18))
    return np.array([np.mean(each) * 255 > 127 for each in votes])


@pytest.mark.parametrize(("height", "width"), [(96, 128), (91, 133)])
def test_dwt_dct_writes_the_pixels_of_the_slow_form(height, width):
    picture = noisy(height, width)
    for message in ("sdxl", "StableDiffusionV1"):
        expected = slow_write_dwt_dct(picture, message_bits(message))
        np.testing.assert_array_equal(np.asarray(write(picture, message, "dwtDct")), expected)


@pytest.fixture(scope="module")
def library():
    """The library invisible-watermark, which takes pictures as arrays of BGR."""
    return pytest.importorskip("imwatermark")


def bgr(picture):
    return np.asarray(picture)[..., ::-1].copy()


@pytest.mark.parametrize("message", KNOWN)
@pytest.mark.parametrize("size", [(261, 270), (256, 256), (300, 221)])
def test_dwt_dct_writes_the_pixels_of_the_library(library, size, message):
    for picture in (noisy(*size), PICTURES["landscape"]().crop((60, 90, 60 + size[1], 90 + size[0]))):
        encoder = library.WatermarkEncoder()
        encoder.set_watermark("bits", message_bits(message).astype(int).tolist())
        theirs = encoder.encode(bgr(picture), "dwtDct")[..., ::-1]
        np.testing.assert_array_equal(np.asarray(write(picture, message, "dwtDct")), theirs)


@pytest.mark.parametrize("method", METHODS)
def test_each_reads_the_bits_of_the_other_and_loses_the_same_ones(library, method):
    picture, bits = PICTURES["landscape"]().crop((100, 100, 361, 370)), message_bits(SDXL)
    encoder, decoder = library.WatermarkEncoder(), library.WatermarkDecoder("bits", 48)
    encoder.set_watermark("bits", bits.astype(int).tolist())
    theirs = Image.fromarray(encoder.encode(bgr(picture), method)[..., ::-1].copy())
    ours = write(picture, SDXL, method)
    for marked in (theirs, ours):
        for changed in (marked, *(CHANGES[change](marked) for change in ("JPEG 95", "JPEG 50", "WebP 50"))):
            np.testing.assert_array_equal(read(changed, 48, method), decoder.decode(bgr(changed), method))
        if method == "dwtDctSvd":  # the other loses bits where colors are flat
            np.testing.assert_array_equal(read(marked, 48, method), bits)
    np.testing.assert_array_equal(decoder.decode(bgr(write(noisy(261, 270), SDXL, method)), method), bits)
    if method == "dwtDctSvd":  # the library may take a level that is further away
        assert psnr(picture, ours) > psnr(picture, theirs) + 1


def test_the_default_is_read_by_the_slow_form_with_its_dct():
    marked = write(noisy(128, 160), SDXL)
    np.testing.assert_array_equal(slow_read_svd(marked, 48), message_bits(SDXL))
    changed = CHANGES["JPEG 50"](marked)  # bits that are not all right must be the same wrong ones
    np.testing.assert_array_equal(slow_read_svd(changed, 48), read(changed, 48))


def test_colors_are_converted_as_opencv_does():
    """Each picture has all levels of one pair of channels; a wrong constant changes some of them."""
    for fixed in (0, 77, 255):
        first, second = np.mgrid[:256, :256].astype(np.uint8)
        for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
            levels = np.stack([first, second, np.full_like(first, fixed)], -1)[..., order]
            yuv = cv2.cvtColor(levels[..., ::-1].copy(), cv2.COLOR_BGR2YUV)
            np.testing.assert_array_equal(watermark._to_yuv(levels), yuv)
            rgb = cv2.cvtColor(levels.copy(), cv2.COLOR_YUV2BGR)[..., ::-1]
            np.testing.assert_array_equal(watermark._to_rgb(levels.astype(np.int64)), rgb)


def test_the_messages_are_those_of_the_official_scripts():
    sdxl = "101100111110110010010000011110111011000110011110"  # generative-models, scripts/util/detection
    assert "".join(str(int(bit)) for bit in message_bits(SDXL)) == sdxl
    assert np.packbits(message_bits("StableDiffusionV1")).tobytes() == b"StableDiffusionV1"
    assert set(KNOWN) == {"sdxl", "StableDiffusionV1", "SDV2"}


@pytest.mark.parametrize("method", METHODS)
def test_a_message_is_read_again_and_no_other_is_found(method):
    picture = noisy(256, 256, contrast=15)
    marked = write(picture, "StableDiffusionV1", method)
    found = detect(marked, "StableDiffusionV1", method)
    assert len(found.bits) == 136
    assert found.matched == 136 if method == "dwtDctSvd" else found.matched >= 110  # the official one loses some bits
    assert found.found
    assert not detect(marked, SDXL, method).found
    assert not detect(picture, "StableDiffusionV1", method).found
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(noisy(256, 256, contrast=15)))  # a copy was marked


def test_the_p_value_is_the_upper_tail_of_a_binomial():
    marked = write(noisy(128, 128), "abc")  # 24 bits
    found = detect(marked, "abc")
    assert found.share == 1
    assert found.p_value == 0.5**24
    other = detect(marked, "abb")  # the last bit differs
    assert other.matched == 23
    assert other.p_value == (24 + 1) / 2**24
    assert found.p_value < FOUND < other.p_value


def test_flat_pictures_keep_the_default_mark_at_the_ends_of_the_levels_too():
    for color in ("black", "white", (254, 255, 250), (250, 250, 5), (5, 5, 250), (200, 30, 90)):
        picture = Image.new("RGB", (128, 128), color)
        assert detect(write(picture, SDXL), SDXL).found, color


def test_the_default_mark_survives_jpeg_at_quality_80_where_the_official_one_is_lost():
    for draw in PICTURES.values():
        picture = draw().crop((128, 128, 384, 384))
        marked = write(picture, SDXL)
        assert detect(CHANGES["JPEG 80"](marked), SDXL).found
        assert psnr(picture, marked) > 43
        assert not detect(CHANGES["JPEG 90"](write(picture, SDXL, "dwtDct")), SDXL, "dwtDct").found
        assert not detect(marked.crop((16, 0, 256, 256)), SDXL).found


def test_errors_say_what_to_do():
    small = Image.new("RGB", (40, 48))
    with pytest.raises(ValueError, match="the watermark has 48 bits, and 40 x 48 pixels carry 30, one in each 8x8: "):
        write(small, SDXL)
    with pytest.raises(ValueError, match="carry 30"):
        detect(small, SDXL)
    with pytest.raises(ValueError, match="'ab' has 16 bits and needs at least 24"):
        write(small, "ab")
    with pytest.raises(ValueError, match="mode RGB, got L"):
        write(Image.new("L", (64, 64)), "abc")
    with pytest.raises(ValueError, match="dwtDctSvd, dwtDct, got 'rivaGan'"):
        write(small, "abc", "rivaGan")


def test_the_command_marks_pictures_and_finds_the_mark(run, capsys, tmp_path):
    words = "txt2img frog --width 64 --height 64 --steps 1 --watermark sdxl --out".split()
    assert run(*words[:-3], "--out", str(tmp_path / "plain.png"))[0] == 0
    assert run(*words, str(tmp_path / "marked.png"))[0] == 0
    with Image.open(tmp_path / "plain.png") as plain, Image.open(tmp_path / "marked.png") as marked:
        np.testing.assert_array_equal(np.asarray(marked), np.asarray(write(plain, SDXL)))
        assert json.loads(marked.text["ldm-watermark"]) == {"message": "sdxl", "method": "dwtDctSvd"}
        matched = detect(marked, SDXL).matched
    assert cli.main(["watermark", "detect", str(tmp_path / "marked.png"), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert {each["message"] for each in results} == {"sdxl", "SDV2"}  # StableDiffusionV1 has more bits than blocks
    assert results[0]["matched"] == matched >= 41
    assert [each["message"] for each in results if each["found"]] == ["sdxl"]
    assert cli.main(["watermark", "detect", str(tmp_path / "plain.png"), "--watermark", "frogs"]) == 0
    assert re.match(r"not found +dwtDctSvd +\d+ of 40 bits match, p-value 0\.\d+: frogs\n", capsys.readouterr().out)


def test_the_command_refuses_wrong_watermarks_before_the_work(run, tmp_path):
    for words, message in (
        ("--watermark ab", "'ab' has 16 bits and needs at least 24"),
        ("--watermark sdxl", "32 x 32 pixels carry 16"),
        ("--watermark-method dwtDct", "add --watermark TEXT"),
    ):
        code, _, err = run("txt2img", "frog", *words.split(), "--out", str(tmp_path / "out.png"))
        assert code == 2
        assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_the_command_prints():
    """Bits may differ by a few with another version of the JPEG and WebP encoders."""
    text = (Path(__file__).parents[2] / "docs" / "operate.md").read_text(encoding="utf-8")
    for line in lines():
        row = re.search(rf"^\| {re.escape(line.split(' | ')[0][2:])} \|.*$", text, re.MULTILINE)
        assert row, line
        old, new = ([float(number) for number in re.findall(r"[\d.]+(?= [/|])", each)] for each in (row[0], line))
        np.testing.assert_allclose(new, old, atol=4)
