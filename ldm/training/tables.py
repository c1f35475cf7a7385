"""Pictures in tables: Parquet files, or the Arrow files that `datasets` writes. They need the extra `datasets`."""

import io
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.training.data import Frame, Pictures, decoded, upright_size

CAPTIONS = ("text", "caption")  # the first column of these that a table has


class Table(Pictures):
    """The rows of a folder with Parquet files, or of one that `datasets.Dataset.save_to_disk` wrote.

    The column "image" holds the files of pictures, as the feature `datasets.Image` or as bytes. The caption is the
    column "text" or "caption". The mask is the column "mask", and the picture before an edit the column "before".
    """

    def __init__(self, folder: Path, frame: Frame) -> None:
        """Raises ValueError if `datasets` is not installed, and for a table that lacks a column."""
        datasets = _datasets()
        if (folder / "dataset_dict.json").is_file():
            raise ValueError(
                f"{folder} holds several splits: name the folder of one of them, such as {folder / 'train'}"
            )
        parquet = sorted(str(file) for file in folder.glob("*.parquet"))
        rows = datasets.Dataset.from_parquet(parquet) if parquet else datasets.load_from_disk(str(folder))
        caption = next((name for name in CAPTIONS if name in rows.column_names), None)
        wanted = ["image", *frame.beside]
        if caption is None or not set(wanted) <= set(rows.column_names):
            raise ValueError(
                f"the table in {folder} must have the columns {', '.join(wanted)} and text or caption, and it has "
                f"{', '.join(rows.column_names)}: rename its columns"
            )
        self.folder = folder
        self.captions = rows.select_columns([caption])
        self.files = {}
        for name in wanted:
            self.files[name] = rows.select_columns([name]).cast_column(name, datasets.Image(decode=False))
        sizes = []
        if frame.buckets or frame.sizes:
            for index in range(len(self)):
                with self.open(index) as picture:
                    sizes.append(upright_size(picture))
        super().__init__(frame, sizes)

    def __len__(self) -> int:
        return len(self.captions)

    def caption(self, index: int) -> str:
        """Return the caption of a picture without opening the picture. Raises ValueError if it is no string."""
        (text,) = self.captions[index].values()
        if not isinstance(text, str):
            raise ValueError(f"the caption of row {index} in {self.folder} must be a string, got {text!r}")
        return text.strip()

    def open(self, index: int) -> AbstractContextManager[Image.Image]:
        """Open a picture; see `Pictures.open`."""
        return self._file("image", index)

    def open_beside(self, index: int, kind: str) -> AbstractContextManager[Image.Image]:
        """Open what a row has beside its picture; see `Pictures.open_beside`."""
        return self._file(kind, index)

    def _file(self, column: str, index: int) -> AbstractContextManager[Image.Image]:
        stored = self.files[column][index][column] or {}
        name = f"{column} of row {index} in {self.folder}"
        if stored.get("bytes") is None and not stored.get("path"):
            raise ValueError(f"the {name} is empty")
        return decoded(io.BytesIO(stored["bytes"]) if stored.get("bytes") else Path(stored["path"]), name)


def _datasets() -> Any:
    try:
        import datasets  # of the extra `datasets`
    except ImportError as error:
        raise ValueError(
            'Parquet and Arrow files need the package datasets: pip install -e ".[datasets]", or put the pictures in a '
            "folder with metadata.jsonl"
        ) from error
    return datasets
