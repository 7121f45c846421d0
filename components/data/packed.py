"""Folders that ``python -m trainer pack`` writes: tar shards, the names of the classes, and what was packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from components.data.loader import DataError

CLASSES = "classes.json"
RECORD = "pack.json"


def read_record(folder: Path) -> dict[str, Any] | None:
    """What is packed in a folder, and whether it is "complete"; None if nothing is.

    Raises:
        DataError: the record is damaged.
    """
    try:
        record = json.loads((folder / RECORD).read_bytes())
        if isinstance(record, dict) and {"settings", "complete"} <= record.keys():
            return record
        raise ValueError("a record of pack has other keys")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / RECORD} cannot be read: {error}. Remove the folder, and pack again") from error


def check_complete(folder: Path, title: str) -> None:
    """Raise DataError if a folder is being packed, since its images would be others later."""
    record = read_record(folder)
    if record is not None and not record["complete"]:
        raise DataError(f"{title}: '{folder}' is not packed completely; repeat `python -m trainer pack` to go on")
