"""Tables of pictures in Parquet and Arrow files, with a stand-in for `datasets`, and with the package if installed."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ldm.training.data import DataConfig


def encoded(color, size=(8, 8)):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


class Rows:
    """The part of `datasets.Dataset` that is used, over columns."""

    def __init__(self, columns, decode=True):
        self.columns, self.column_names = columns, list(columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}

    def select_columns(self, names):
        return Rows({name: self.columns[name] for name in names})

    def cast_column(self, name, feature):
        assert feature == "files, not pictures"
        return Rows({name: [content and {"bytes": content, "path": None} for content in self.columns[name]]})


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Let `datasets` be a stand-in that reads one table; return the columns."""
    columns = {
        "image": [encoded("red", (40, 20)), encoded("blue")],
        "text": [" a red one ", "a blue one"],
        "mask": [encoded("black", (40, 20)), encoded("white")],
    }
    monkeypatch.setitem(
        sys.modules,
        "datasets",
        SimpleNamespace(
            load_from_disk=lambda folder: Rows(columns),
            Dataset=SimpleNamespace(
                from_parquet=lambda files: Rows(columns) if files == [str(tmp_path / "p.parquet")] else 1 / 0
            ),
            Image=lambda decode: "pictures" if decode else "files, not pictures",
        ),
    )
    return columns


@pytest.mark.parametrize("name", ["state.json", "p.parquet"])
def test_the_rows_of_a_table_are_pictures_with_captions_masks_and_sizes(tmp_path, table, name):
    (tmp_path / name).touch()
    dataset = DataConfig(size=16, folder=tmp_path, buckets=4, mask="file").open(sizes=True)
    assert [dataset.caption(i) for i in range(len(dataset))] == ["a red one", "a blue one"]
    image, caption, more = dataset[0]
    assert torch.equal(image, torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 12, 20))
    assert caption == "a red one"
    assert (more["sizes"].tolist(), int(more["mask"].max())) == ([20, 40, 0, 2], 0)
    assert dataset[1][2]["mask"].min() == 255


def test_a_table_of_edits_has_a_column_of_the_pictures_before(tmp_path, table):
    (tmp_path / "state.json").touch()
    table["before"] = [encoded("green", (40, 20)), encoded("white")]
    image, instruction, more = DataConfig(size=16, folder=tmp_path).open(pairs=True)[0]
    assert (instruction, more.keys()) == ("a red one", {"source"})
    assert (image[:, 0, 0].tolist(), more["source"][:, 0, 0].tolist()) == ([255, 0, 0], [0, 128, 0])
    del table["before"]
    with pytest.raises(ValueError, match="must have the columns image, before and text or caption, and it has image"):
        DataConfig(size=16, folder=tmp_path).open(pairs=True)


def test_mistakes_in_a_table_are_named(tmp_path, table):
    (tmp_path / "state.json").touch()
    table["text"][1] = None
    table["image"][1] = b"no picture"
    config = DataConfig(size=16, folder=tmp_path)
    dataset = config.open()
    with pytest.raises(ValueError, match=r"the caption of row 1 in .* must be a string, got None"):
        dataset.caption(1)
    with pytest.raises(ValueError, match=r"the image of row 1 in .* cannot be read: it must be one of PNG, JPEG"):
        dataset[1]
    table["image"][1] = None
    with pytest.raises(ValueError, match=r"the image of row 1 in .* is empty"):
        config.open()[1]
    del table["mask"]
    with pytest.raises(
        ValueError, match="must have the columns image, mask and text or caption, and it has image, text"
    ):
        DataConfig(size=16, folder=tmp_path, mask="file").open()
    (tmp_path / "dataset_dict.json").touch()
    with pytest.raises(ValueError, match=r"holds several splits: name the folder of one of them, such as .*train"):
        DataConfig(size=16, folder=tmp_path).open()


def test_without_the_package_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match=r'need the package datasets: pip install -e "\.\[datasets\]", or put'):
        DataConfig(size=16, folder=tmp_path).open()


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_that_the_package_has_written_are_read(tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    columns = {"image": [{"bytes": encoded(color), "path": None} for color in ("red", "blue")], "caption": ["a", "b"]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = datasets.Dataset.from_dict(columns, features=features)
    rows.to_parquet(tmp_path / "p.parquet") if kind == "parquet" else rows.save_to_disk(tmp_path)
    dataset = DataConfig(size=4, folder=tmp_path).open()
    assert [dataset.caption(i) for i in range(len(dataset))] == ["a", "b"]
    assert (dataset[1][0] == torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None]).all()
