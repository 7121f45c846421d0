"""Folders of the diffusers library: config.json and one file of weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from components.files.atomic import atomic_write
from components.files.model_file import save_tensors
from components.version import version


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> list[Path]:
    """Write a folder for ``from_pretrained`` of a diffusers model and return its files.

    Args:
        folder: created if missing; a model already in it is replaced.
        tensors: by the keys of the diffusers model.
        config: content of config.json, with ``_class_name``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    about.unlink(missing_ok=True)  # written last, so that a partial folder has none
    save_tensors(weights, tensors, {"format": "pt"})
    config = config | {"_titanrepa_version": version()}  # diffusers ignores keys that begin with an underscore
    with atomic_write(about) as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return [about, weights]
