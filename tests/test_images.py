"""Tensors to pictures, and PNG files that are written whole and remember how they were made."""

import os

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, PngImagePlugin

from ldm.images import A1111_SAMPLERS, a1111_parameters, grid, read_texts, save_png, to_pil


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


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(30)])
def test_reading_the_texts_of_no_picture_is_an_error(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="not a readable picture"):
        read_texts(tmp_path / "a.png")


def test_texts_beyond_pillows_limit_are_an_error_and_not_read(tmp_path):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("ldm", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(ValueError, match="not a readable picture"):
        read_texts(tmp_path / "a.png")


def test_parameters_read_as_a1111_writes_them():
    text = a1111_parameters("a frog,\non grass", "blurry", {"Steps": 20, "Model": "a, b: c"})
    assert text == 'a frog,\non grass\nNegative prompt: blurry\nSteps: 20, Model: "a, b: c"'
    assert a1111_parameters("a\x00 frog\x1b 👩‍🌾", "", {"Steps": 1}) == "a frog 👩‍🌾\nSteps: 1"


def test_every_sampler_has_a_name_in_parameters():
    from ldm.diffusion.samplers import SAMPLERS

    assert set(A1111_SAMPLERS) == set(SAMPLERS)
