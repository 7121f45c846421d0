"""What was measured of each unit of images, on the disk, so that a killed evaluation goes on.

A unit is a batch of images by number, so its values do not depend on how many ranks share the work. Each unit is one
file, whole or absent, in a folder named by a fingerprint of everything the values depend on: units of other settings
are in other folders, and are never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from components.evaluation import EvaluationError

FOLDER = ".evaluation"


class FeatureCache:
    """The units of one set of images under one network.

    Args:
        place: folder in which the units' folder is made.
        settings: what the values depend on: images, network, unit size; anything that JSON takes.

    Raises:
        EvaluationError: the place cannot be written to.
    """

    def __init__(self, place: str | Path, settings: dict[str, Any]) -> None:
        text = json.dumps(settings, sort_keys=True)
        self.folder = Path(place) / FOLDER / hashlib.sha256(text.encode()).hexdigest()[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(
                f"cannot write to {place}, where an interrupted evaluation keeps its progress ({error.strerror}); "
                "choose another folder with --output FOLDER/evaluation.json"
            ) from error

    def has(self, unit: int) -> bool:
        """Whether the unit is there and whole; a damaged file is removed."""
        if not self._path(unit).is_file():
            return False
        try:
            self.read(unit)
        except Exception:  # safetensors' own exception, or the system's
            self._path(unit).unlink(missing_ok=True)
            return False
        return True

    def read(self, unit: int) -> dict[str, Tensor]:
        """Tensors by name, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self._path(unit))

    def write(self, unit: int, values: dict[str, Tensor]) -> None:
        """Keeps a unit's values; whole or not at all."""
        from safetensors.torch import save_file

        temporary = self._path(unit).with_name(f".{unit}.{os.getpid()}.tmp")
        save_file({name: value.contiguous().cpu() for name, value in values.items()}, temporary)
        os.replace(temporary, self._path(unit))

    def remove(self) -> None:
        """Removes the units, and the folder around them when no others are in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()

    def _path(self, unit: int) -> Path:
        return self.folder / f"{unit:06d}.safetensors"
