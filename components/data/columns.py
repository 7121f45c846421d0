"""Arrow and Parquet files as tables of blocks of rows: record batches and row groups.

A block of an Arrow file is mapped into memory, where one row can be read alone. A row group of a Parquet file is
compressed as a whole: each process keeps the last :data:`GROUPS` that it decoded.
"""

from __future__ import annotations

import functools
import json
import os
import re
from typing import Any

import numpy as np

from components.data.loader import DataError
from components.data.shards import Shard

OPEN = 256  # files that a process keeps open
GROUPS = 2  # row groups that a process keeps decoded
SPLITS = ("train", "training", "validation", "valid", "val", "test", "testing")
INSTALL = 'pip install "titanrepa[hf]"'


class Table:
    """Rows of an Arrow or Parquet file.

    Args:
        file: to open.

    Attributes:
        ends: (blocks,), number of rows in each block and those before.
        types: Arrow types of the columns, by name.
        features: of the ``datasets`` library, by column; empty if the file has none.

    Raises:
        OSError, pyarrow.ArrowException: the file cannot be read.
    """

    def __init__(self, file: Shard) -> None:
        import pyarrow

        self.file = file
        self.parquet = file.path.endswith(".parquet")
        if self.parquet:
            from pyarrow import parquet

            self._reader = parquet.ParquetFile(file.path)
            schema, meta = self._reader.schema_arrow, self._reader.metadata
            rows = [meta.row_group(number).num_rows for number in range(meta.num_row_groups)]
        else:
            mapped = pyarrow.memory_map(file.path)
            try:
                reader = pyarrow.ipc.open_file(mapped)
                self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            except pyarrow.ArrowInvalid:  # a stream, as the datasets library writes
                mapped.seek(0)
                reader = pyarrow.ipc.open_stream(mapped)
                self._batches = list(reader)
            schema, rows = reader.schema, [len(batch) for batch in self._batches]
        self.ends = np.cumsum(rows, dtype=np.int64)
        self.types = {field.name: field.type for field in schema}
        text = (schema.metadata or {}).get(b"huggingface", b"{}")
        self.features: dict[str, Any] = json.loads(text).get("info", {}).get("features", {})

    def block(self, number: int, column: str) -> Any:
        """A column of a block, a pyarrow array."""
        if not self.parquet:
            return self._batches[number].column(column)
        group = self._reader.read_row_group(number, columns=[column], use_threads=False)
        return group.column(0).combine_chunks()

    def column(self, column: str) -> Any:
        """A whole column, a pyarrow chunked array; of few bytes a row."""
        import pyarrow

        if self.parquet:
            return self._reader.read(columns=[column], use_threads=False).column(0)
        blocks = [self.block(number, column) for number in range(len(self.ends))]
        return pyarrow.chunked_array(blocks, self.types[column])


@functools.lru_cache(OPEN)
def open_table(file: Shard) -> Table:
    """Open a file; raises :class:`components.data.images.ImageError` if it was changed."""
    file.check()
    return Table(file)


def value(file: Shard, row: int, column: str) -> Any:
    """One value, as a Python object; reads no other row of an Arrow file."""
    table = open_table(file)
    number = int(np.searchsorted(table.ends, row, side="right"))
    block = _decoded(file, number, column) if table.parquet else table.block(number, column)
    return block[row - int(table.ends[number - 1] if number else 0)].as_py()


@functools.lru_cache(GROUPS)
def _decoded(file: Shard, number: int, column: str) -> Any:
    return open_table(file).block(number, column)


def forget() -> None:
    """Drop the row groups that this process keeps."""
    _decoded.cache_clear()


def check_installed(title: str) -> None:
    """Raise DataError if pyarrow is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise DataError(f"{title}: needs pyarrow, which cannot be imported ({error}): {INSTALL}") from error


def find_files(path: str, split: str, title: str) -> list[str]:
    """Absolute paths of the Arrow or Parquet files of a split, sorted.

    Args:
        path: file, or folder that is searched with its sub-folders; hidden ones and ``cache-*.arrow`` are left out.
        split: found in the names of folders and files, such as train-00000-of-00294.parquet. Files of which none
            names a split are all taken as "train".
        title: of the dataset, for messages.

    Raises:
        DataError: there are none, or both kinds; says which splits there are.
    """
    root = os.path.abspath(os.path.expanduser(path))
    if os.path.isfile(root) and root.endswith((".parquet", ".arrow")):
        return [root]
    if not os.path.isdir(root):
        raise DataError(
            f"{title}: '{path}' is not a folder (looked at {root}); set [dataset] path to the folder of .parquet or "
            ".arrow files, such as a download, or what save_to_disk() of the datasets library wrote"
        )
    found: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        kept = [name for name in sorted(files) if name.endswith((".parquet", ".arrow"))]
        found += [os.path.join(folder, name) for name in kept if not name.startswith((".", "cache-"))]
    kinds = sorted({os.path.splitext(name)[1] for name in found})
    if len(kinds) != 1:
        what = "both .arrow and .parquet files" if found else "no .arrow or .parquet files"
        raise DataError(f"{title}: '{path}' holds {what}; set [dataset] path to the folder of one kind")
    splits = {name: _split(os.path.relpath(name, root)) for name in found}
    if not any(splits.values()) and split == "train":
        return found
    if not (chosen := [name for name in found if splits[name] == split]):
        there = ", ".join(f"'{name or 'files without a split'}'" for name in sorted(set(splits.values())))
        raise DataError(f"{title}: '{path}' has no split '{split}', but {there}; set [dataset] split to one of them")
    return chosen


def _split(name: str) -> str:
    words = re.split(r"[^a-z]+", name.lower())
    if known := [word for word in words if word in SPLITS]:
        return known[0]
    numbered = re.match(r"(\w+)-\d+-of-\d+", os.path.basename(name))
    return numbered[1] if numbered and numbered[1] != "data" else ""
