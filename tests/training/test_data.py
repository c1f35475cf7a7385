"""Folders of pictures: the caption format, geometry, transparency, and an error for each mistake."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.training import data
from ldm.training.data import DataConfig, Folder
from ldm.training.loop import collate
from ldm.training.objects import FLUENT, FONT, OBJECTS
from ldm.training.scenes import Scenes
from tests.training.drawn import drawn_sprites, write_archive


def save(path, size=(8, 8), color="red", mode="RGB", text=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    if text is not None:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
    return path


def test_pictures_are_paired_with_the_text_files_beside_them_in_subfolders_too(tmp_path):
    save(tmp_path / "b.png", color="blue", text="ein blaues Bild: größer\n")
    save(tmp_path / "a" / "c.JPG", color="red", text="a red one")
    folder = Folder(tmp_path, 4)
    assert [folder[i][1] for i in range(len(folder))] == ["a red one", "ein blaues Bild: größer"]
    image, _ = folder[1]
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None].expand(3, 4, 4))


def test_every_suffix_counts_and_other_files_do_not(tmp_path):
    for suffix in (".png", ".jpg", ".jpeg", ".webp", ".bmp"):
        save(tmp_path / f"picture{suffix[1:]}{suffix}", text=suffix)
    save(tmp_path / "film.gif", text="left out")
    (tmp_path / "notes.md").write_text("left out")
    folder = Folder(tmp_path, 4)
    assert {folder[i][1] for i in range(len(folder))} == {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def test_a_caption_is_the_whole_text_file_without_white_space_around_and_may_be_empty(tmp_path):
    save(tmp_path / "a.png", text="  a frog,\non the grass \n\n")
    save(tmp_path / "b.png", text="\ufeffwith a byte order mark")
    save(tmp_path / "c.png", text="\n")
    folder = Folder(tmp_path)
    assert [folder.caption(i) for i in range(3)] == ["a frog,\non the grass", "with a byte order mark", ""]


def test_a_caption_is_returned_without_opening_the_picture(tmp_path, monkeypatch):
    save(tmp_path / "a.png", text="one")
    folder = Folder(tmp_path)
    monkeypatch.setattr(data, "open_picture", None)
    assert folder.caption(0) == "one"
    with pytest.raises(TypeError):
        folder[0]


def test_text_that_is_not_utf8_is_named(tmp_path):
    save(tmp_path / "a.png").with_suffix(".txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text .*: save it as UTF-8"):
        Folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "a.png", "text": "ö"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"metadata\.jsonl is not UTF-8 text"):
        Folder(tmp_path)


def test_metadata_lists_pictures_and_captions(tmp_path):
    save(tmp_path / "x" / "1.png")
    save(tmp_path / "unlisted.png")
    rows = [{"file_name": "x/1.png", "text": " one ", "more": 3}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    folder = Folder(tmp_path)
    assert len(folder) == 1
    assert folder[0][1] == "one"


def test_the_middle_of_a_wide_picture_is_kept(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("wide")
    assert (Folder(tmp_path, 10)[0][0] == 200).all()


def test_a_rotated_photograph_is_turned_upright(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255  # white on the left; orientation 6 turns it clockwise: white on top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    (tmp_path / "photo.txt").write_text("photo")
    image, _ = Folder(tmp_path, 8)[0]
    assert (image[:, :4] == 255).all()
    assert (image[:, 4:] == 0).all()


def test_transparency_is_laid_on_white(tmp_path):
    save(tmp_path / "half.png", mode="RGBA", color=(255, 0, 0, 0), text="nothing")
    save(tmp_path / "palette.gif.png", mode="P", color=0, text="nothing", transparency=0)
    for image, _ in (Folder(tmp_path, 4)[i] for i in range(2)):
        assert (image == 255).all()


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 90, (90, 90, 90)),
        ("LA", (90, 255), (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("P", "blue", (0, 0, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
    ],
)
def test_every_color_mode_becomes_rgb(tmp_path, mode, color, expected):
    save(tmp_path / f"picture{'.jpg' if mode == 'CMYK' else '.png'}", mode=mode, color=color, text="x")
    image, _ = Folder(tmp_path, 4)[0]
    assert image.shape == (3, 4, 4)
    difference = image.short() - torch.tensor(expected, dtype=torch.short)[:, None, None]
    assert difference.abs().max() <= (2 if mode == "CMYK" else 0)  # JPEG rounds


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"the data folder .*nowhere does not exist"):
        Folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"the data folder .*a\.png is not a folder"):
        Folder(save(tmp_path / "a.png"))


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"there are no pictures in .*: put \.png, \.jpg"):
        Folder(tmp_path)
    save(tmp_path / "a.png", text="not listed")
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl lists no pictures: put"):
        Folder(tmp_path)


def test_a_missing_caption_is_named(tmp_path):
    save(tmp_path / "told.png", text="told")
    save(tmp_path / "cats" / "silent.png")
    message = r"1 of 2 pictures .*, the first is cats/silent\.png: write its caption to cats/silent\.txt, or list"
    with pytest.raises(ValueError, match=message):
        Folder(tmp_path)


def test_a_file_that_is_no_picture_is_named_at_once(tmp_path):
    (tmp_path / "fake.png").write_text("not a picture")
    (tmp_path / "fake.txt").write_text("fake")
    with pytest.raises(ValueError, match=r"fake\.png cannot be read"):
        Folder(tmp_path)


def test_a_damaged_picture_is_named_when_it_is_reached(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / "cut.png"
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    path.with_suffix(".txt").write_text("cut")
    folder = Folder(tmp_path, 8)
    with pytest.raises(ValueError, match=r"cut\.png"):
        folder[0]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '"word"',
        '{"file_name": "a.png"}',
        '{"text": "a"}',
        "7",
        '{"file_name": 3, "text": "a"}',
        '{"file_name": "a.png", "text": null}',
    ],
)
def test_a_bad_line_of_the_metadata_is_named_by_number(tmp_path, line):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n' + line)
    with pytest.raises(
        ValueError, match=r'line 2 of .*metadata\.jsonl must be like {"file_name": "1\.png", "text": "a cat"}'
    ):
        Folder(tmp_path)


def test_a_picture_that_is_listed_and_missing_is_named(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "a"}')
    with pytest.raises(ValueError, match=r"gone\.png cannot be read: No such file"):
        Folder(tmp_path)


def test_the_size_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="must be at least 1 pixel, got 0"):
        Folder(tmp_path, 0)


def test_the_configuration_opens_a_folder_where_there_is_one(tmp_path):
    save(tmp_path / "a.png", text="a")
    dataset = DataConfig(size=16, folder=tmp_path).open()
    assert dataset[0][0].shape == (3, 16, 16)


@pytest.fixture
def archive(tmp_path):
    """An archive of two emoji: the frog of the scenes, and a mouse that is no object of the scenes."""
    green = Image.new("RGBA", (8, 8), "green")
    return write_archive(tmp_path / "emoji.tgz", {"1f438": green, "1f42d": green})


def test_the_configuration_opens_scenes_of_its_size_and_seed_otherwise(monkeypatch):
    monkeypatch.setattr(data, "emoji_sprites", lambda *_: drawn_sprites())
    dataset = DataConfig(size=32, seed=4).open()
    assert isinstance(dataset, Scenes)
    image, caption = dataset[9]
    expected, same_caption = Scenes(drawn_sprites(), 32, seed=4)[9]
    assert torch.equal(image, expected)
    assert caption == same_caption


def test_the_configuration_names_the_font_the_archive_and_the_objects(monkeypatch, archive):
    asked = []
    monkeypatch.setattr(data, "emoji_sprites", lambda *given: asked.append(given) or drawn_sprites())
    assert DataConfig().open().layout
    assert not DataConfig(layout=False).open().layout
    DataConfig(font=Path("my.ttf"), fluent=Path("my.tgz")).open()
    DataConfig(fluent=archive, every_emoji=True).open()
    assert asked == [*[(FONT, FLUENT, OBJECTS)] * 2, (Path("my.ttf"), Path("my.tgz"), OBJECTS), (FONT, archive, "🐸🐭")]


def test_scenes_without_their_files_are_an_error_at_once(tmp_path, archive):
    with pytest.raises(ValueError, match=r"no archive of 3D emoji at .*no\.tgz"):
        DataConfig(fluent=tmp_path / "no.tgz").open()
    with pytest.raises(ValueError, match=r"has no picture of 🐘 \(elephant\)"):
        DataConfig(fluent=archive).open()
    with pytest.raises(ValueError, match=r"no emoji font at .*no\.ttf"):
        DataConfig(fluent=archive, font=tmp_path / "no.ttf", every_emoji=True).open()


@pytest.mark.skipif(not FONT.is_file(), reason="needs fonts-noto-color-emoji")
def test_every_emoji_of_the_archive_becomes_an_object_in_both_styles(archive):
    dataset = DataConfig(size=32, fluent=archive, every_emoji=True).open()
    assert dataset.concepts == ("frog", "mouse")
    assert {style: list(sprites) for style, sprites in dataset.painter.sprites.items()} == {
        "3D": ["frog", "mouse"],
        "flat": ["frog", "mouse"],
    }
    assert dataset[9][0].shape == (3, 32, 32)


def test_pictures_in_buckets_keep_their_shape_and_record_their_sizes(tmp_path):
    save(tmp_path / "a.png", (40, 20), text="wide")
    save(tmp_path / "b.png", (16, 16), text="square")
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "c.jpg", (60, 20), text="turned upright", exif=exif)
    folder = Folder(tmp_path, 16, buckets=4, sizes=True)
    wide, square, tall = (folder[i] for i in range(3))
    assert wide[0].shape == (3, 12, 20)  # of the ratios 1, 1.67 and 4
    assert square[0].shape == (3, 16, 16)
    assert tall[0].shape == (3, 32, 8)
    # original height and width, and top and left of the crop: 40 x 20 is scaled to 24 x 12, and 20 x 60 to 10.7 x 32
    assert wide[2]["sizes"].tolist() == [20, 40, 0, 2]
    assert square[2]["sizes"].tolist() == [16, 16, 0, 0]
    assert tall[2]["sizes"].tolist() == [60, 20, 0, 1]
    assert len(set(folder.buckets.tolist())) == 3
    images, _, more = collate([wide, wide])
    assert (images.shape, more["sizes"].shape) == ((2, 3, 12, 20), (2, 4))


def test_squares_record_their_crop_if_asked(tmp_path):
    save(tmp_path / "a.png", (40, 20), text="wide")
    _, _, more = Folder(tmp_path, 16, sizes=True)[0]
    assert more["sizes"].tolist() == [20, 40, 0, 8]


def test_a_mask_beside_a_picture_is_cropped_with_it_and_is_no_picture_itself(tmp_path):
    save(tmp_path / "a.jpg", (32, 16), text="wide")
    mask = Image.new("L", (32, 16), 0)
    mask.paste(255, (8, 0, 16, 16))  # the left half of the middle
    mask.save(tmp_path / "a.mask.png")
    folder = Folder(tmp_path, 8, mask="file")
    assert len(folder) == 1
    _, _, more = collate([folder[0]])
    assert more["mask"].shape == (1, 1, 8, 8)
    assert (more["mask"][..., 1:3] == 1).all()  # the first column has a part of the pixels outside of the crop
    assert (more["mask"][..., 5:] == 0).all()

    Image.new("L", (16, 16)).save(tmp_path / "a.mask.png")
    with pytest.raises(ValueError, match=r"mask of picture 0 \('wide'\) has 16 x 16 pixels, and the picture 32 x 16"):
        folder[0]
    (tmp_path / "a.mask.png").unlink()
    with pytest.raises(ValueError, match=r"a\.mask\.png cannot be read: No such file"):
        folder[0]


def test_the_picture_before_an_edit_is_cropped_as_the_one_after_it(tmp_path):
    save(tmp_path / "a.jpg", (32, 16), text="make it dark")
    before = Image.new("RGBA", (32, 16), "blue")
    before.paste((0, 0, 0, 0), (16, 0, 32, 16))
    before.save(tmp_path / "a.before.png")
    Image.new("L", (32, 16)).save(tmp_path / "a.mask.png")
    folder = DataConfig(size=8, folder=tmp_path, mask="file").open(pairs=True)
    assert len(folder) == 1
    image, instruction, more = folder[0]
    assert (image.shape, instruction, more.keys()) == ((3, 8, 8), "make it dark", {"mask", "source"})
    assert more["source"][:2, 4, 0].max() < 9  # blue
    assert more["source"][:2, 4, 7].min() > 246  # transparent parts become white
    _, _, found = collate([folder[0]])
    assert found["source"].max() == 1

    Image.new("L", (16, 16)).save(tmp_path / "a.before.png")
    error = r"picture before the edit of picture 0 \('make it dark'\) has 16 x 16 pixels, and the picture 32 x 16"
    with pytest.raises(ValueError, match=error):
        folder[0]


@pytest.mark.parametrize("listed", [False, True])
def test_pictures_without_the_picture_before_the_edit_are_counted_before_the_training(tmp_path, listed):
    for name in ("a", "b"):
        save(tmp_path / f"{name}.jpg", (8, 8), text="make it dark")
    if listed:
        rows = [{"file_name": f"{name}.jpg", "text": "make it dark"} for name in ("a", "b")]
        (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    Image.new("L", (8, 8)).save(tmp_path / "a.before.png")
    error = r"1 of 2 pictures in .* have no picture before the edit, the first is .*b\.jpg: save it as .*b\.before\.png"
    with pytest.raises(ValueError, match=error):
        DataConfig(size=8, folder=tmp_path).open(pairs=True)
    Image.new("L", (8, 8)).save(tmp_path / "b.before.png")
    assert [DataConfig(size=8, folder=tmp_path).open(pairs=True).caption(i) for i in range(2)] == ["make it dark"] * 2


def test_the_alpha_channel_can_be_the_mask(tmp_path):
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 4, 8))
    picture.save(tmp_path / "a.png")
    save(tmp_path / "b.png", text="opaque")
    (tmp_path / "a.txt").write_text("half")
    half, opaque = (Folder(tmp_path, 8, mask="alpha")[i][2]["mask"] for i in range(2))
    assert (half[..., :4] == 0).all()
    assert (half[..., 4:] == 255).all()
    assert (opaque == 255).all()


def test_kept_out_pictures_are_never_trained_on(tmp_path):
    for i in range(6):
        save(tmp_path / f"{i}.png", (8 + 8 * (i % 2), 8), text=str(i))
    config = DataConfig(size=8, folder=tmp_path, buckets=4, keep_out=2, seed=3)
    dataset = config.open()
    rest, out = config.split(dataset)
    captions = [[part.caption(i) for i in range(len(part))] for part in (rest, out)]
    assert [len(each) for each in captions] == [4, 2]
    assert sorted(captions[0] + captions[1]) == list("012345")
    assert [part[i][1] for part in (rest, out) for i in range(len(part))] == captions[0] + captions[1]
    assert rest.buckets.tolist() == [dataset.buckets[int(caption)] for caption in captions[0]]
    other = dataclasses.replace(config, seed=4).split(dataset)[1]
    assert {other.caption(0), other.caption(1)} != set(captions[1])
    assert dataclasses.replace(config, keep_out=0).split(dataset) == (dataset, None)
    with pytest.raises(ValueError, match="keep_out must be from 0 to less than the 6 pictures, got 6"):
        dataclasses.replace(config, keep_out=6).split(dataset)


def test_buckets_and_masks_of_scenes_are_refused():
    with pytest.raises(ValueError, match="buckets and mask are for the pictures of a folder"):
        DataConfig(buckets=8).open()
