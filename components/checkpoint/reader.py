"""Reads DCP files without running code: DCP itself unpickles ``.metadata`` and byte items as they come.

A checkpoint may come from anyone, and a pickle can name any function and have it called. Ours hold tensors alone (plain
values are in ``meta.json``), so that few classes are needed to describe them, and byte items never occur.
"""

from __future__ import annotations

import os
import pathlib
import pickle
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import _get_layout

# What .metadata of tensors consists of, for torch 2.11 and newer. Calling any of it has no effect beyond its result.
ALLOWED: dict[tuple[str, str], Any] = {
    (each.__module__, each.__name__): each
    for each in (
        torch.Size, _get_layout, _MEM_FORMAT_ENCODING, ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta,
        TensorProperties, TensorStorageMetadata, _StorageInfo,
    )
} | {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}  # fmt: skip
PATHS = {"pathlib", "pathlib._local"}  # the folder that was written, of which only the text matters


class ForeignCheckpoint(Exception):
    """A checkpoint holds what this project never writes there, and reading it could run code; the message says what."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module in PATHS and name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
            return pathlib.PurePath
        raise ForeignCheckpoint(f"its .metadata pickles {module}.{name}")


class Reader(dcp.FileSystemReader):
    """Reads tensors, from files of the checkpoint's own folder.

    Raises:
        ForeignCheckpoint: ``.metadata`` names anything else.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        # Read here: DCP would log a traceback and try other files, hiding the error.
        self.metadata = _metadata(path / ".metadata")

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        self.metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self.metadata


def _metadata(path: Path) -> Metadata:
    with open(path, "rb") as file:
        found = _Unpickler(file).load()
    if not isinstance(found, Metadata):
        raise ForeignCheckpoint(f"its .metadata is a {type(found).__name__}, not DCP metadata")
    for name, entry in found.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ForeignCheckpoint(f"its .metadata lists '{name}' as a {type(entry).__name__}, not a tensor")
    for index, place in found.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo):
            raise ForeignCheckpoint("its .metadata lists something other than parts of tensors")
        file_name = place.relative_path
        if not isinstance(file_name, str) or file_name != os.path.basename(file_name) or place.transform_descriptors:
            raise ForeignCheckpoint(f"its .metadata places '{index.fqn}' outside the checkpoint, in '{file_name}'")
    return found


def foreign(error: BaseException) -> str | None:
    """Why reading was refused, if ``error`` is a refusal by :class:`Reader` or by ``torch.load``; otherwise None."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, ForeignCheckpoint):
        return str(error)
    named = re.findall(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error):
        return f"a .distcp file pickles {', '.join(dict.fromkeys(named)) or 'more than tensors'}"
    return None
