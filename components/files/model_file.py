"""Model folders: titanrepa's format for a trained model, with its config and one safetensors file per module.

``config.toml`` is the run's resolved config. ``tokenizer.safetensors``, ``denoiser.safetensors``,
``latent_norm.safetensors`` and, optionally, ``heads.safetensors`` and ``discriminator.safetensors`` contain the
modules' state dicts. Each file is self-contained: its metadata include the config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.files.atomic import atomic_write
from components.files.weights import WeightsError
from components.finite import check_weights
from components.version import version

FORMAT = "titanrepa-1"
CONFIG = "config.toml"
PARTS = ("tokenizer", "denoiser", "latent_norm", "heads", "discriminator")


def write_model(
    folder: Path,
    states: Mapping[str, dict[str, Tensor]],
    config_toml: str,
    step: int,
    weights: str,
    classes: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write a model folder and return its files; ``config.toml`` comes last, so a partial folder has none.

    Args:
        folder: created if missing; a model already in it is replaced completely.
        states: state dicts by part.
        config_toml: the resolved config.
        step: optimizer steps taken.
        weights: "ema" or "online".
        classes: record of the classes that the labels stand for; None: unknown.

    Raises:
        NotFiniteError: a tensor holds NaN or infinity; nothing is written.
    """
    check_weights(states, "nothing was written: choose another checkpoint (--step) or file")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    for part in PARTS:
        if part not in states:
            (folder / f"{part}.safetensors").unlink(missing_ok=True)
    files = [folder / f"{part}.safetensors" for part in states]
    for file, (part, state) in zip(files, states.items()):
        write_part(file, part, state, config_toml, step, weights, classes)
    with atomic_write(folder / CONFIG) as partial:
        partial.write_text(config_toml, encoding="utf-8")
    return [*files, folder / CONFIG]


def write_part(
    path: Path,
    part: str,
    state: dict[str, Tensor],
    config_toml: str,
    step: int,
    weights: str,
    classes: Mapping[str, Any] | None = None,
) -> None:
    """Atomically write one module's state dict.

    Args:
        path: the file; an existing one is replaced.
        part: the module's name, as in ``Modules.named``.
        state: tensors on any device and in any memory format; dtypes are kept.
        config_toml: the resolved config.
        step: optimizer steps taken.
        weights: "ema" or "online".
        classes: record of the classes that the labels stand for; None: unknown.
    """
    about = {"format": FORMAT, "part": part, "config": config_toml, "step": str(step), "weights": weights}
    if classes is not None:
        about["classes"] = json.dumps(classes)
    save_tensors(path, state, about)


def save_tensors(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Atomically write a safetensors file; its metadata also get ``titanrepa_version``."""
    from safetensors.torch import save_file

    seen: set[int] = set()
    metadata = metadata | {"titanrepa_version": version()}
    with atomic_write(path) as partial:
        save_file({key: _alone(value, seen) for key, value in state.items()}, partial, metadata)


def save_tree(path: Path, tree: dict[str, Any]) -> None:
    """Atomically write nested dicts of tensors and plain values with torch.save."""
    seen: set[int] = set()

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: bare(inner) for key, inner in value.items()}
        return _alone(value, seen) if isinstance(value, Tensor) else value

    with atomic_write(path) as partial:
        torch.save(bare(tree), partial)


def _alone(tensor: Tensor, seen: set[int]) -> Tensor:
    """Copy on the host with its own storage: torch.save writes a view's whole storage; safetensors rejects sharing."""
    tensor = tensor.detach().cpu().contiguous()
    memory = tensor.untyped_storage()
    if memory.nbytes() != tensor.nbytes or memory.data_ptr() in seen:
        tensor = tensor.clone()
    seen.add(tensor.untyped_storage().data_ptr())
    return tensor


def read_part(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the state dict and metadata ("part", "config", "step", "weights", "classes") of a model folder's file.

    Raises:
        WeightsError: the file is missing, damaged, or not from a model folder.
    """
    from safetensors import safe_open

    if not Path(path).is_file():
        raise WeightsError(f"'{path}' does not exist; expected a file of a model folder, e.g. tokenizer.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        raise WeightsError(f"'{path}' is damaged or not safetensors ({type(error).__name__}: {reason})") from error
    if about.get("format") != FORMAT:
        raise WeightsError(
            f"'{path}' has format {about.get('format')!r}, expected '{FORMAT}': it was not written by export or "
            "import; convert it to a model folder with python -m trainer import"
        )
    return state, about
