"""Arrow and Parquet folders of the ``datasets`` library and the Hugging Face hub, such as ILSVRC/imagenet-1k."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from components import registry
from components.data import columns
from components.data.image_dataset import ImageDataset
from components.data.images import ImageError, printable
from components.data.loader import DataError
from components.data.shards import Shard

logger = logging.getLogger(__name__)

MANY = 16  # rows of a row group, above which reading them one by one is said to be slow


@registry.datasets.register("hf_dataset")
class HFDataset(ImageDataset):
    """Center-cropped images in Arrow or Parquet files, as the datasets library and the Hugging Face hub keep them.

    Needs pyarrow (``pip install "titanrepa[hf]"``). A folder is a download of a repository (data/train-*.parquet), of
    ``save_to_disk()`` or of the library's cache. The image is a column of {bytes, path}, of bytes, or of paths relative
    to the folder; the label an integer or a text. Names of classes are those of the ClassLabel; without one, the
    numbers up to the largest, or the labels, sorted.

    Arrow files are mapped into memory and read row by row. Parquet compresses groups of 100 rows or more, and each
    image costs its whole group where images are shuffled: for training, ``python -m trainer pack FOLDER
    --format=original`` first. For pixels, crop and unreadable images see
    :class:`components.data.image_dataset.ImageDataset`.

    Args:
        path: folder of the files, with sub-folders, or one file.
        split: which files, by the names of folders and files; files without a split in their names are "train".
        image_column: name of the column of images.
        label_column: name of the column of labels.
        flip: allow horizontal flips in training.
        decoder: as of image_folder.

    Raises:
        DataError: pyarrow, the files, the split or a column is missing, a file is damaged, or a label is no class.
    """

    title = "dataset hf_dataset"
    suffixes = (".parquet", ".arrow")

    def __init__(
        self,
        resolution: int,
        *,
        path: registry.File,
        split: str = "train",
        image_column: str = "image",
        label_column: str = "label",
        flip: bool = True,
        decoder: Literal["exact", "fast"] = "exact",
    ) -> None:
        super().__init__(resolution, os.path.abspath(os.path.expanduser(path)), flip, decoder)
        columns.check_installed(self.title)
        self._image = image_column
        self._files = [Shard.of(file) for file in columns.find_files(path, split, self.title)]
        self._root = self.path if os.path.isdir(self.path) else os.path.dirname(self.path)
        labels: list[np.ndarray] = []
        features: dict[str, Any] = {}
        longest = 0
        for file in self._files:
            try:
                table = columns.Table(file)
                self._check_columns(table, label_column)
                column = table.column(label_column)
                if column.null_count:
                    where = printable(file.path)
                    raise DataError(f"{self.title}: {where}: {column.null_count} rows have no '{label_column}'")
                labels.append(column.to_numpy())
            except DataError:
                raise
            except Exception as error:  # pyarrow raises many types of exceptions for broken files
                where = printable(file.path)
                raise DataError(f"{self.title}: {where} cannot be read: {error}. Download it again") from error
            features = features or table.features or _information(file.path)
            if table.parquet:
                longest = max(longest, int(np.diff(table.ends, prepend=0).max(initial=0)))
        self._ends = np.cumsum([len(found) for found in labels], dtype=np.int64)
        found = np.concatenate(labels)
        if not len(found):
            raise DataError(f"{self.title}: '{path}' has no rows")
        distinct, codes = np.unique(found, return_inverse=True)
        feature = features.get(label_column)
        names = feature.get("names") if isinstance(feature, dict) else None
        texts = [str(label) for label in distinct]
        self._set_labels(texts, codes, names, f"{self.title}: '{path}': column '{label_column}'")
        if longest > MANY:
            logger.warning(
                f"{self.title}: an image costs the decoding of a row group of up to {longest} images where images are "
                f"shuffled; for training, copy them first: python -m trainer pack {path} --format=original --out FOLDER"
            )

    def encoded(self, index: int) -> str | bytes:
        file, row = self._find(index)
        value = columns.value(file, row, self._image)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not value:
            raise ImageError("the row holds neither bytes nor a path")
        return os.path.join(self._root, value) if isinstance(value, str) else value

    def place(self, index: int) -> str:
        file, row = self._find(index)
        return f"{file.path}: row {row}"

    def _find(self, index: int) -> tuple[Shard, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._files[number], index - int(self._ends[number - 1] if number else 0)

    def _check_columns(self, table: columns.Table, label_column: str) -> None:
        import pyarrow.types as types

        for option, column in (("image_column", self._image), ("label_column", label_column)):
            if column not in table.types:
                raise DataError(
                    f"{self.title}: {printable(table.file.path)} has no column '{column}'"
                    f"{registry.nearest(column, table.types)}; set [dataset] {option}"
                )
        label = table.types[label_column]
        if not (types.is_integer(label) or types.is_string(label) or types.is_large_string(label)):
            raise DataError(f"{self.title}: column '{label_column}' is {label}; expected integers or text")


def _information(file: str) -> dict[str, Any]:
    """Features in the dataset_info.json beside a file; empty without one."""
    try:
        return json.loads((Path(file).parent / "dataset_info.json").read_bytes()).get("features") or {}
    except (OSError, ValueError, AttributeError):
        return {}
