"""Tar files of pictures: names, captions, masks, sizes, and an error for each mistake."""

import gzip
import io
import json
import tarfile
from itertools import islice

import pytest
import torch
from PIL import Image

from ldm.training.data import DataConfig, Frame
from ldm.training.order import batches
from ldm.training.shards import Shards


def encoded(color, size=(8, 8), kind="PNG"):
    file = io.BytesIO()
    Image.new("L" if isinstance(color, int) else "RGB", size, color).save(file, kind)
    return file.getvalue()


def tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_pictures_and_captions_are_read_from_packed_tar_files(tmp_path):
    tar(tmp_path / "b.tar", {"7.jpg": encoded("blue", kind="JPEG"), "7.json": '{"text": "a blue one", "width": 8}'})
    tar(
        tmp_path / "a.tar",
        {
            "x/1.json": '{"key": 1}', "x/1.png": encoded("red"), "x/1.txt": " ein rotes Bild: größer\n",
            "x/readme.md": "left out", "x/._2.png": "left out, as macOS writes it",
            "x/2.cls": "3", "x/2.PNG": encoded("lime"), "x/2.json": '{"caption": "a green one"}',
        },
    )  # fmt: skip
    dataset = DataConfig(size=4, folder=tmp_path).open()
    assert [dataset.caption(i) for i in range(len(dataset))] == [
        "ein rotes Bild: größer", "a green one", "a blue one",
    ]  # fmt: skip
    assert dataset.shards.tolist() == [0, 0, 1]
    for i, color in enumerate(([255, 0, 0], [0, 255, 0])):
        image, caption = dataset[i]
        assert torch.equal(image, torch.tensor(color, dtype=torch.uint8)[:, None, None].expand(3, 4, 4))
        assert caption == dataset.caption(i)


def test_each_example_of_the_tar_files_comes_once_in_an_epoch_in_the_order_of_the_loop(tmp_path):
    for number in range(3):
        tar(
            tmp_path / f"{number}.tar",
            {
                f"{i}.{suffix}": content
                for i in range(4)
                for suffix, content in (("png", encoded("red")), ("txt", f"{number} {i}"))
            },
        )
    dataset = DataConfig(size=4, folder=tmp_path).open()
    found = islice(batches(len(dataset), 3, 0, shards=dataset.shards), 4)
    captions = [dataset.caption(i) for batch in found for i in batch]
    assert sorted(captions) == [f"{number} {i}" for number in range(3) for i in range(4)]


def test_pictures_before_an_edit_stand_in_tar_files_beside_those_after_it(tmp_path):
    files = {"1.png": encoded("red"), "1.txt": "make it red", "1.before.png": encoded("blue")}
    dataset = DataConfig(size=8, folder=tar(tmp_path / "a.tar", files).parent).open(pairs=True)
    image, instruction, more = dataset[0]
    assert (instruction, more.keys()) == ("make it red", {"source"})
    assert (image[:, 0, 0].tolist(), more["source"][:, 0, 0].tolist()) == ([255, 0, 0], [0, 0, 255])
    del files["1.before.png"]
    tar(tmp_path / "a.tar", files)
    with pytest.raises(
        ValueError, match=r"picture 1 in .* has no picture before the edit: add 1\.before\.png beside it"
    ):
        DataConfig(size=8, folder=tmp_path).open(pairs=True)


def test_buckets_masks_and_sizes_work_in_tar_files_as_in_folders(tmp_path):
    path = tar(
        tmp_path / "a.tar",
        {
            "1.png": encoded("red", (40, 20)), "1.mask.png": encoded(0, (40, 20)), "1.txt": "wide",
            "2.png": encoded("red", (16, 16)), "2.mask.png": encoded(255, (16, 16)), "2.txt": "square",
        },
    )  # fmt: skip
    dataset = Shards([path], Frame(16, buckets=4, mask="file", sizes=True))
    wide, square = dataset[0], dataset[1]
    assert (wide[0].shape, square[0].shape) == ((3, 12, 20), (3, 16, 16))
    assert dataset.buckets[0] != dataset.buckets[1]
    assert wide[2]["sizes"].tolist() == [20, 40, 0, 2]
    assert not wide[2]["mask"].any()
    assert (square[2]["mask"] == 255).all()


def test_mistakes_in_tar_files_are_named(tmp_path):
    picture = encoded("red")
    with pytest.raises(ValueError, match=r"picture 1 in .*a\.tar has no caption: add 1\.txt or 1\.json beside it"):
        Shards([tar(tmp_path / "a.tar", {"1.png": picture})], Frame())
    path = tar(tmp_path / "a.tar", {"1.png": picture, "1.txt": "one"})
    with pytest.raises(ValueError, match=r"picture 1 in .*a\.tar has no mask: add 1\.mask\.png beside it"):
        Shards([path], Frame(mask="file"))
    with pytest.raises(ValueError, match=r"there are no pictures in .*b\.tar and the 0 tar files after it"):
        Shards([tar(tmp_path / "b.tar", {"1.txt": "one"})], Frame())
    for name, content in (("cut.tar", path.read_bytes()[:700]), ("packed.tar", gzip.compress(path.read_bytes()))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is no tar file, is compressed, or is cut off"):
            Shards([tmp_path / name], Frame())
    for text in ('{"url": 1}', '{"text": 3}', "[", b"\xff"):
        dataset = Shards([tar(tmp_path / "a.tar", {"1.png": picture, "1.json": text})], Frame())
        with pytest.raises(ValueError, match=r"the caption at byte \d+ of .*a\.tar must be UTF-8 text, or JSON with"):
            dataset.caption(0)
    path = tar(tmp_path / "a.tar", {"1.png": picture[:45], "1.txt": "one"})
    with pytest.raises(ValueError, match=r"the picture at byte 512 of .*a\.tar cannot be read: "):
        Shards([path], Frame(4))[0]
    path = tar(tmp_path / "a.tar", {"1.png": "no picture", "1.txt": "one"})
    with pytest.raises(ValueError, match=r"the picture 1\.png of .*a\.tar cannot be read: it must be one of PNG, JPEG"):
        Shards([path], Frame(16, buckets=4))


def test_the_header_of_each_file_is_read_once_and_the_pictures_stay_on_the_disk(tmp_path, monkeypatch):
    files = {
        f"{i}.{suffix}": content
        for i in range(50)
        for suffix, content in (("png", encoded("red")), ("txt", json.dumps(i)))
    }
    path = tar(tmp_path / "a.tar", files)
    calls, following = [], tarfile.TarFile.next
    monkeypatch.setattr(tarfile.TarFile, "next", lambda self: calls.append(len(self.members)) or following(self))
    dataset = Shards([path], Frame(4))
    assert (len(calls), max(calls)) == (102, 1)  # opening a tar reads its first header, too
    dataset[3], dataset.caption(7)
    assert len(calls) == 102
