"""Tensors to pictures, and PNG files that are written whole and remember how they were made."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import EpsImagePlugin, Image, PngImagePlugin

from ldm.images import (
    A1111_SAMPLERS,
    FORMATS,
    MAX_PIXELS,
    a1111_parameters,
    grid,
    open_picture,
    read_texts,
    save_png,
    to_pil,
)
from ldm.training.data import Folder


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
    with pytest.raises(ValueError, match=r"cannot be read: it is none of PNG, JPEG, .* or damaged"):
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
        with pytest.raises(ValueError, match=r"a\.png cannot be read: it is none of PNG"):
            read(tmp_path / "a.png")
    assert not started.exists()
    with suppress(OSError), Image.open(tmp_path / "a.png") as picture:  # it paints nothing
        picture.load()
    assert started.exists()


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
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a frog 🐸".encode("utf-16-be")
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


def test_every_sampler_has_a_name_in_parameters():
    from ldm.diffusion.samplers import SAMPLERS

    assert set(A1111_SAMPLERS) == set(SAMPLERS)
