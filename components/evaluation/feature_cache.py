"""On-disk cache of features per unit of images, so that an interrupted evaluation can be resumed.

A unit is a batch of consecutive images, so its values do not depend on the number of ranks. Each unit is one file,
written atomically, in a folder named by a hash of everything the values depend on; units computed with other settings
are in other folders and never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from components.evaluation import EvaluationError
from components.files.atomic import atomic_write

FOLDER = ".evaluation"


class FeatureCache:
    """Cached units of one set of images and one network.

    Args:
        place: directory in which the cache folder is created.
        settings: JSON-compatible description of everything the values depend on: images, network, unit size.

    Raises:
        EvaluationError: ``place`` is not writable.
    """

    def __init__(self, place: str | Path, settings: dict[str, Any]) -> None:
        text = json.dumps(settings, sort_keys=True)
        self.folder = Path(place) / FOLDER / hashlib.sha256(text.encode()).hexdigest()[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(
                f"cannot write to {place}, where evaluation stores its progress ({error.strerror}); "
                "choose another folder with --output FOLDER/evaluation.json"
            ) from error

    def has(self, unit: int) -> bool:
        """Whether the unit is cached; removes it if the file is damaged."""
        if not self._path(unit).is_file():
            return False
        try:
            self.read(unit)
        except Exception:  # safetensors' own exception or an OSError
            self._path(unit).unlink(missing_ok=True)
            return False
        return True

    def read(self, unit: int) -> dict[str, Tensor]:
        """Read a unit's tensors by name, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self._path(unit))

    def write(self, unit: int, values: dict[str, Tensor]) -> None:
        """Atomically write a unit's values."""
        from safetensors.torch import save_file

        with atomic_write(self._path(unit), fsync=False, concurrent=True) as temporary:
            save_file({name: value.contiguous().cpu() for name, value in values.items()}, temporary)

    def remove(self) -> None:
        """Remove the units, and the parent folder if it is then empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()

    def _path(self, unit: int) -> Path:
        return self.folder / f"{unit:06d}.safetensors"
