"""Picture files: every usual kind is read as 8-bit RGB; PNG files are written whole, with texts about their making."""

import io
import os
import random
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from PIL import EpsImagePlugin, ExifTags, Image, ImageCms, PngImagePlugin

from ldm.pictures import FORMATS, MAX_PIXELS, a1111_parameters, open_picture, read_picture, read_texts, save_png, to_rgb
from ldm.training.data import Folder


def test_a_saved_picture_comes_back_with_its_texts(tmp_path):
    picture = Image.effect_noise((8, 8), 50).convert("RGB")
    texts = {"parameters": "a frog 🐸\nSteps: 1", "ldm": '{"a": 1}'}
    save_png(picture, tmp_path / "a.png", texts)
    assert read_texts(tmp_path / "a.png") == texts
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(picture))
    assert os.listdir(tmp_path) == ["a.png"]


def test_an_existing_file_is_only_replaced_when_that_is_asked_for(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="nothing was overwritten"):
        save_png(Image.new("RGB", (1, 1)), path)
    assert path.read_bytes() == b"precious"
    save_png(Image.new("RGB", (1, 1)), path, overwrite=True)
    assert read_texts(path) == {}
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_picture_that_fails_while_it_is_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(self, file, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(Image.new("RGB", (1, 1)), tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_ctrl_c_before_the_picture_is_in_place_leaves_not_even_an_empty_file(tmp_path, monkeypatch):
    def stop(source, target):
        assert os.path.getsize(target) == 0  # the reserved name
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_png(Image.new("RGB", (1, 1)), tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_ctrl_c_after_the_picture_is_in_place_keeps_it(tmp_path, monkeypatch):
    replace = os.replace

    def stop(source, target):
        replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_png(Image.new("RGB", (1, 1), "red"), tmp_path / "a.png")
    assert os.listdir(tmp_path) == ["a.png"]
    assert np.asarray(Image.open(tmp_path / "a.png")).tolist() == [[[255, 0, 0]]]


def test_of_those_who_save_at_one_path_at_one_time_one_succeeds(tmp_path):
    path = tmp_path / "a.png"

    def save(level):
        try:
            save_png(Image.new("L", (99, 99), level), path)
        except FileExistsError:
            return None
        return level

    with ThreadPoolExecutor(8) as pool:
        (winner,) = (level for level in pool.map(save, range(16)) if level is not None)
    assert np.asarray(Image.open(path)).max() == winner
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_failure_to_write_names_the_picture_and_not_the_temporary_file(tmp_path, monkeypatch):
    def fail(source, target):
        raise PermissionError(13, "Permission denied", source)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PermissionError) as caught:
        save_png(Image.new("RGB", (1, 1)), tmp_path / "a.png", overwrite=True)
    assert caught.value.filename == str(tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_the_usual_formats_are_read_whatever_the_name_is(tmp_path, kind):
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.xyz", format=kind)
    with open_picture(tmp_path / "a.xyz") as picture:
        assert picture.convert("RGB").size == (8, 6)
    assert read_texts(tmp_path / "a.xyz").get("ldm") is None


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "PCX"])
def test_other_formats_are_refused_whatever_the_name_is(tmp_path, kind):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", format=kind)
    with pytest.raises(
        ValueError, match=r"cannot be read: it must be one of PNG, JPEG, .*; the file has another format"
    ):
        read_texts(tmp_path / "a.png")


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_a_picture_starts_no_other_program(tmp_path, monkeypatch):
    started = tmp_path / "started"
    gs = tmp_path / "bin" / "gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\necho >> {started}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # what it found before
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", format="EPS")
    (tmp_path / "a.txt").write_text("a frog")
    for read in (read_texts, lambda path: Folder(path.parent)):
        with pytest.raises(ValueError, match=r"a\.png cannot be read: it must be one of PNG"):
            read(tmp_path / "a.png")
    assert not started.exists()
    with suppress(OSError), Image.open(tmp_path / "a.png") as picture:  # it paints nothing
        picture.load()
    assert started.exists()


def test_a_picture_beyond_pillows_own_limit_is_refused_with_ours(tmp_path, monkeypatch):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=rf"it has more than {MAX_PIXELS:,} pixels; make it smaller$"):
        read_picture(tmp_path / "a.png")


def test_a_picture_of_too_many_pixels_is_refused_before_they_are_decoded(tmp_path):
    Image.new("1", (2**14, 2**13)).save(tmp_path / "a.png")
    with warnings.catch_warnings(), open_picture(tmp_path / "a.png") as picture:
        warnings.simplefilter("error")
        assert picture.width * picture.height == MAX_PIXELS
    Image.new("1", (2**14, 2**13 + 1)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="it has 16384 x 8193 pixels, of at most 134,217,728"):
        read_texts(tmp_path / "a.png")


def test_a_jpegs_parameters_are_read_from_where_a1111_writes_them(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: b"UNICODE\0" + "a frog 🐸".encode("utf-16-be")}
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    assert read_texts(tmp_path / "a.jpg")["parameters"] == "a frog 🐸"


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(30)])
def test_reading_the_texts_of_no_picture_is_an_error(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        read_texts(tmp_path / "a.png")


def test_texts_beyond_pillows_limit_are_an_error_and_not_read(tmp_path):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("ldm", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(ValueError, match="cannot be read"):
        read_texts(tmp_path / "a.png")


def test_parameters_read_as_a1111_writes_them():
    text = a1111_parameters("a frog,\non grass", "blurry", {"Steps": 20, "Model": "a, b: c"})
    assert text == 'a frog,\non grass\nNegative prompt: blurry\nSteps: 20, Model: "a, b: c"'
    assert a1111_parameters("a\x00 frog\x1b 👩‍🌾", "", {"Steps": 1}) == "a frog 👩‍🌾\nSteps: 1"


# Reading any kind as 8-bit RGB


@pytest.fixture
def read(tmp_path):
    """Save a picture, or write the bytes of a file, and read it as RGB levels: h w 3."""

    def read(picture, kind="PNG", **options):
        path = tmp_path / "a"
        if isinstance(picture, Image.Image):
            picture.save(path, format=kind, **options)
        else:
            path.write_bytes(picture)
        rgb = read_picture(path)
        assert rgb.mode == "RGB"
        assert rgb.info == {}
        return np.asarray(rgb).astype(int)

    return read


def row(*pixels, mode="RGB"):
    """A picture one pixel high."""
    picture = Image.new(mode, (len(pixels), 1))
    picture.putdata(pixels)
    return picture


def tiff(width, pixels, bits, photometric=1, *, order="<", sample_format=1, offset_type=4):
    """A TIFF file of one row of gray pixels, also of the kinds that Pillow does not write."""
    rows = [
        *((256, 4, width), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, offset_type, 8)),
        *((277, 3, 1), (278, 4, 1), (279, 4, len(pixels)), (339, 3, sample_format)),
    ]
    codes = {3: "H2x", 4: "I", 11: "f"}
    tags = b"".join(struct.pack(f"{order}HHI{codes[kind]}", tag, kind, 1, value) for tag, kind, value in rows)
    pixels += bytes(len(pixels) % 2)
    magic = {"<": b"II", ">": b"MM"}[order]
    return (
        magic + struct.pack(f"{order}HI", 42, 8 + len(pixels)) + pixels + struct.pack(f"{order}H", len(rows)) + tags
    ) + bytes(4)


LOSSLESS = {"WEBP": {"lossless": True, "exact": True}}  # exact: the color of transparent pixels, too
QUARTERS = np.kron([[20, 90], [160, 230]], np.ones((16, 32))).astype(np.uint8)
UPRIGHT = {  # by the EXIF orientation: the stored array, turned as it is to be shown
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "MPO"])
def test_exif_rotation_is_applied_once(read, kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    levels = read(Image.fromarray(QUARTERS).convert("RGB"), kind, exif=exif, **LOSSLESS.get(kind, {}))
    expected = UPRIGHT[orientation](QUARTERS)[:, :, None]
    assert levels.shape == (*expected.shape[:2], 3)
    assert np.abs(levels - expected).max() <= 2  # of JPEG


def test_the_rotation_counts_for_16_bit_pictures_too(read):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture = Image.fromarray(np.array([[0, 65535]], np.uint16))
    assert read(picture, exif=exif)[:, :, 0].tolist() == [[0], [255]]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparent_pixels_are_laid_over_white(read, kind):
    picture = row((9, 8, 7, 255), (9, 8, 7, 0), (0, 0, 255, 128), mode="RGBA")
    assert read(picture, kind, **LOSSLESS.get(kind, {})).tolist() == [[[9, 8, 7], [255, 255, 255], [127, 127, 255]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_transparent_gray_is_laid_over_white(read, kind):
    picture = row((9, 255), (9, 0), (0, 128), mode="LA")
    assert read(picture, kind)[0, :, 0].tolist() == [9, 255, 127]


def palette(*pixels):
    picture = row(*pixels, mode="P")
    picture.putpalette([200, 10, 20, 30, 40, 50, 60, 70, 80])
    return picture


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_a_palette_is_applied(read, kind):
    assert read(palette(1, 0, 2), kind).tolist() == [[[30, 40, 50], [200, 10, 20], [60, 70, 80]]]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_color_of_a_palette_is_white(read, kind):
    levels = read(palette(1, 0, 2), kind, transparency=0)
    assert levels.tolist() == [[[30, 40, 50], [255, 255, 255], [60, 70, 80]]]


def test_half_transparent_colors_of_a_palette_are_laid_over_white_without_a_warning(read):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        levels = read(palette(1, 0, 2), transparency=bytes([0, 255, 128]))
    assert levels.tolist() == [[[30, 40, 50], [255, 255, 255], [157, 162, 167]]]


def test_a_color_that_a_png_declares_transparent_is_white(read):
    assert read(row((1, 2, 3), (4, 5, 6)), transparency=(1, 2, 3)).tolist() == [[[255] * 3, [4, 5, 6]]]
    assert read(row(1, 4, mode="L"), transparency=1)[0, :, 0].tolist() == [255, 4]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_gray_and_black_and_white_keep_their_levels(read, kind):
    assert read(row(0, 77, 255, mode="L"), kind).tolist() == [[[0] * 3, [77] * 3, [255] * 3]]
    assert read(row(0, 255, 255, mode="1"), kind).tolist() == [[[0] * 3, [255] * 3, [255] * 3]]


def test_gray_of_16_bits_is_scaled_to_8(read):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(levels / 257).astype(int)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(read(Image.fromarray(levels), kind)[:, :, 0], expected)


def test_gray_tiffs_of_12_and_16_bits_are_scaled_in_either_byte_order_and_polarity(read):
    for order in "<>":
        sixteen = struct.pack(f"{order}3H", 0, 32768, 65535)
        assert read(tiff(3, sixteen, 16, order=order))[0, :, 0].tolist() == [0, 128, 255]
    assert read(tiff(3, struct.pack("<3H", 0, 32768, 65535), 16, photometric=0))[0, :, 0].tolist() == [255, 127, 0]
    assert read(tiff(4, bytes.fromhex("000800fff010"), 12))[0, :, 0].tolist() == [0, 128, 255, 1]


def test_colors_of_16_bits_are_scaled_to_8(read):
    levels = struct.pack(">6H", 0, 32768, 65535, 257, 514, 65278)
    file = io.BytesIO()
    file.write(b"\x89PNG\r\n\x1a\n")
    PngImagePlugin.putchunk(file, b"IHDR", struct.pack(">IIBB3x", 2, 1, 16, 2))
    PngImagePlugin.putchunk(file, b"IDAT", zlib.compress(b"\0" + levels))
    PngImagePlugin.putchunk(file, b"IEND", b"")
    assert read(file.getvalue()).tolist() == [[[0, 128, 255], [1, 2, 254]]]


@pytest.mark.parametrize(
    "file",
    [
        tiff(2, struct.pack("<2f", 0, 0.5), 32, sample_format=3),
        tiff(2, struct.pack("<2I", 0, 5), 32),
        tiff(2, struct.pack("<2i", 0, -5), 32, sample_format=2),
        tiff(2, struct.pack("<2h", 0, -5), 16, sample_format=2),
    ],
    ids=["float", "unsigned", "signed", "signed 16"],
)
def test_pixels_whose_range_is_unknown_are_refused(read, file):
    message = r"cannot be read: its pixels are signed or have 32 bits .* save it with 8 or 16 unsigned bits per channel"
    with pytest.raises(ValueError, match=message):
        read(file)


def test_cmyk_is_converted(read):
    picture = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert set(map(tuple, read(picture, "TIFF").reshape(-1, 3))) == {(255, 0, 0)}
    assert np.abs(read(picture, "JPEG") - [255, 0, 0]).max() <= 2


def test_the_inverted_cmyk_of_adobes_jpegs_is_not_taken_for_its_negative(tmp_path, read):
    picture = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    picture.save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    assert b"Adobe" in data
    assert read(data).min() >= 253


def test_colors_of_other_spaces_are_converted(read):
    red = Image.new("RGB", (16, 16), "red")
    assert np.abs(read(red.convert("YCbCr"), "JPEG") - [255, 0, 0]).max() <= 3
    lab = ImageCms.profileToProfile(red, *map(ImageCms.createProfile, ("sRGB", "LAB")), outputMode="LAB")
    assert np.abs(read(lab, "TIFF") - [255, 0, 0]).max() <= 5  # LAB of 8 bits is that coarse


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# A profile in which the red channel is green light, and the green channel red light.
SWAPPED = SRGB.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")


def fixed(*numbers):
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def profile(space, lights, **tags):
    """An ICC profile by hand: `space` is that of the picture's channels, `lights` that of their meaning."""
    tags["wtpt"] = b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)
    start = 132 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name.encode() + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(">I4xBBxx4s4s4s12x4s28x", start + len(body), 2, 16, kind, space, lights, b"acsp")
    return header + fixed(0.9642, 1, 0.8249) + bytes(48) + table + body


LINEAR_GRAY = profile(b"GRAY", b"XYZ ", kTRC=b"curv" + bytes(8))
SAME = bytes(range(256))
LIGHTNESS = b"".join(bytes([0 if i & 8 else 255, 128, 128]) for i in range(16))  # black with cyan ink, else white
CYAN_IS_BLACK = profile(
    b"CMYK", b"Lab ", A2B0=b"mft1\0\0\0\0\4\3\2\0" + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + SAME * 4 + LIGHTNESS + SAME * 3
)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_color_profile_is_applied(read, kind):
    picture = row((255, 0, 0), (0, 255, 0), (9, 9, 9))
    levels = read(picture, kind, icc_profile=SWAPPED, **LOSSLESS.get(kind, {}))
    assert np.abs(levels - [[[0, 255, 0], [255, 0, 0], [9, 9, 9]]]).max() <= 1


def test_a_color_profile_is_applied_before_transparent_pixels_are_laid_over_white(read):
    levels = read(row((255, 0, 0, 255), (255, 0, 0, 128), mode="RGBA"), icc_profile=SWAPPED)
    assert np.abs(levels - [[[0, 255, 0], [127, 255, 127]]]).max() <= 1
    levels = read(palette(0, 1), icc_profile=SWAPPED, transparency=1)
    assert levels[0, 1].tolist() == [255] * 3
    assert levels[0, 0, 1] > 100 + levels[0, 0, 0]


def test_profiles_of_gray_and_of_cmyk_are_applied(read):
    expected = 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)  # sRGB's curve
    assert read(row(55, mode="L"), icc_profile=LINEAR_GRAY)[0, 0].tolist() == [round(expected)] * 3
    assert read(row((55, 255), (0, 0), mode="LA"), icc_profile=LINEAR_GRAY)[0, :, 0].tolist() == [round(expected), 255]
    sixteen = Image.fromarray(np.array([[55 * 257]], np.uint16))
    assert read(sixteen, icc_profile=LINEAR_GRAY)[0, 0].tolist() == [round(expected)] * 3
    levels = read(row((0, 0, 0, 255), (255, 0, 0, 0), mode="CMYK"), "TIFF", icc_profile=CYAN_IS_BLACK)
    assert levels.tolist() == [[[255] * 3, [0] * 3]]


def test_a_profile_of_srgb_changes_no_level(read):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    source = ImageCms.ImageCmsProfile(io.BytesIO(SRGB))
    assert np.array_equal(read(picture, icc_profile=SRGB), picture)
    steps = b"curv\0\0\0\0" + struct.pack(
        ">I26H",
        26,
        *(round(65535 * (v / 12.92 if v < 0.04 else ((v + 0.055) / 1.055) ** 2.4)) for v in np.arange(26) / 25),
    )
    tags = {name: SRGB[start : start + 20] for name, start in (("rXYZ", 460), ("bXYZ", 480), ("gXYZ", 500))}
    coarse = profile(b"RGB ", b"XYZ ", rTRC=steps, gTRC=steps, bTRC=steps, **tags)
    assert np.array_equal(read(picture, icc_profile=coarse), picture)
    transform = ImageCms.ImageCmsTransform(ImageCms.ImageCmsProfile(io.BytesIO(coarse)), source, "RGB", "RGB")
    assert not np.array_equal(transform.apply(picture), picture)


@pytest.mark.parametrize("broken", [b"junk", SWAPPED[:200], LINEAR_GRAY, CYAN_IS_BLACK], ids=range(4))
def test_a_profile_that_is_damaged_or_of_other_channels_is_ignored(read, broken):
    assert read(row((255, 0, 0), (1, 2, 3)), icc_profile=broken).tolist() == [[[255, 0, 0], [1, 2, 3]]]


def test_without_littlecms_profiles_are_ignored(read, monkeypatch):
    class Absent:
        def __getattr__(self, name):
            raise ImportError("The _imagingcms C module is not installed")

    monkeypatch.setattr(ImageCms, "core", Absent())
    assert read(row((255, 0, 0)), icc_profile=SWAPPED).tolist() == [[[255, 0, 0]]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_several_frames_or_pages_the_first_is_read(read, kind):
    first, second = (Image.new("RGB", (16, 16), color) for color in ("red", "blue"))
    levels = read(first, kind, save_all=True, append_images=[second])
    assert np.abs(levels - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_one_clear_sentence(tmp_path, read, kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "whole", format=kind)
    whole = (tmp_path / "whole").read_bytes()
    for part in (0.1, 0.5, 0.9):
        with pytest.raises(ValueError, match=r"the picture .* cannot be read: .+"):
            read(whole[: int(part * len(whole))])


@pytest.mark.parametrize(("kind", "size_at"), [("GIF", 6), ("BMP", 18)])
def test_a_file_without_pixels_is_refused(tmp_path, read, kind, size_at):
    Image.new("RGB", (3, 2)).save(tmp_path / "whole", format=kind)
    file = bytearray((tmp_path / "whole").read_bytes())
    file[size_at : size_at + 2] = bytes(2)
    if kind == "GIF":  # the width of its frame
        start = file.index(b",\0\0\0\0\3")
        file[start + 5] = 0
    for empty in (file, tiff(0, b"", 8)):
        with pytest.raises(ValueError, match="cannot be read: it must be one of PNG"):
            read(bytes(empty))


def test_a_tiff_with_a_damaged_tag_is_refused(read):
    assert read(tiff(3, bytes([1, 2, 3]), 8))[0, :, 0].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="cannot be read"):
        read(tiff(3, bytes([1, 2, 3]), 8, offset_type=11))


def test_a_picture_in_memory_is_converted_as_a_file_is():
    picture = row((9, 8, 7, 255), (0, 0, 255, 128), mode="RGBA")
    assert np.asarray(to_rgb(picture)).tolist() == [[[9, 8, 7], [127, 127, 255]]]
    with pytest.raises(ValueError, match="its pixels are signed or have 32 bits"):
        to_rgb(Image.new("F", (2, 2)))


def test_a_picture_of_too_many_pixels_is_not_converted(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.pictures.MAX_PIXELS", 99)
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="it has 10 x 10 pixels, of at most 99 in all; make it smaller"):
        read_picture(tmp_path / "a.png")


@pytest.mark.slow
def test_changed_files_are_read_as_rgb_or_refused_with_a_sentence(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (17, 23, 3), dtype=np.uint8))
    wholes = []
    for kind in FORMATS:
        for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK"):
            file = io.BytesIO()
            with suppress(OSError, ValueError):  # a mode that the format does not have
                noise.convert(mode).save(file, format=kind, exif=exif, icc_profile=SWAPPED)
                wholes.append(file.getvalue())
    choose = random.Random(0)
    for _ in range(2000):
        file = bytearray(choose.choice(wholes))
        for _ in range(choose.choice((1, 3, 20))):
            file[choose.randrange(choose.choice((len(file), min(len(file), 300))))] = choose.randrange(256)
        (tmp_path / "a").write_bytes(file[: choose.choice((None, choose.randrange(len(file))))])
        with warnings.catch_warnings(), suppress(ValueError):
            warnings.simplefilter("ignore")
            assert read_picture(tmp_path / "a").mode == "RGB"
