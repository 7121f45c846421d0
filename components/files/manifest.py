"""Manifest of a folder: size and CRC-32 of every file, and the manifest's own CRC-32."""

from __future__ import annotations

import errno
import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
NAME = "manifest.json"


class ManifestError(Exception):
    """The manifest is missing, damaged or of an unsupported format; the message says which."""


def write(folder: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of ``files`` (:func:`checksum` by name) and flush the folder to disk."""
    fields = {"format": FORMAT, "step": step, "torch": torch.__version__, "files": files}
    fields["crc32"] = _fields_crc32(fields)
    with open(folder / NAME, "w") as file:
        json.dump(fields, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def checksum(path: Path, sync: bool) -> dict[str, Any] | str:
    """{"size": bytes, "crc32": hex} of a file, or an error message; flushes it to disk first if ``sync``."""
    try:
        with open(path, "rb", buffering=0) as file:
            if sync:
                os.fsync(file.fileno())
            crc, size = 0, 0
            while chunk := file.read(1 << 23):
                crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    except OSError as error:
        return error.strerror or str(error)
    return {"size": size, "crc32": f"{crc:08x}"}


def _fields_crc32(fields: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(fields, sort_keys=True).encode()):08x}"


def read(path: Path) -> dict[str, Any]:
    """Read a folder's manifest: the fields "format", "step", "torch" and "files".

    Raises:
        ManifestError: it is missing, damaged or of an unsupported format.
    """
    try:
        fields = json.loads((path / NAME).read_bytes())
        crc32 = fields.pop("crc32")
    except OSError as error:
        raise ManifestError(f"{NAME} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ManifestError(f"{NAME} is damaged: it is incomplete") from error
    if _fields_crc32(fields) != crc32:
        raise ManifestError(f"{NAME} is damaged: its CRC-32 does not match its content")
    if fields["format"] != FORMAT:
        raise ManifestError(f"{NAME} has format {fields['format']}; this version reads format {FORMAT}")
    return fields


def problem(path: Path) -> str | None:
    """Check a folder's manifest and file sizes, not contents; return what is wrong, or None."""
    if not path.is_dir():
        return "it is not a folder" if path.exists() else "it does not exist"
    try:
        files = read(path)["files"]
    except ManifestError as error:
        return str(error)
    for name, expected in files.items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if size != expected["size"]:
            return f"{name} is damaged: {size} bytes, expected {expected['size']}"
    return None


def sync_folder(folder: Path) -> None:
    """Flush a folder's directory entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot fsync folders
            raise
    finally:
        os.close(descriptor)
