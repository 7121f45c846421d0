"""Results of an evaluation: a table, a JSON file, TensorBoard scalars."""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from pathlib import Path
from typing import Any

from components.distributed.ranks import Ranks
from components.evaluation import EvaluationError
from components.evaluation.features import FeatureCache
from components.files.atomic import atomic_write
from trainer.run.monitor.events import EventWriter

TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "is": "Inception Score",
    "mind": "MIND",
    "fdr6": "FDr6",
    "precision": "precision",
    "recall": "recall",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "rfid": "rFID",
}


def publish(
    title: str,
    output: Path,
    values: dict[str, float | None],
    warnings: list[str],
    about: dict[str, Any],
    caches: list[FeatureCache],
    run_folder: Path | None,
    setting: str,
    step: int,
) -> None:
    """Print and write the results, then delete the feature caches that serve to resume an evaluation, on rank 0.

    Args:
        title: first line of the table.
        output: JSON file.
        values: values by name.
        warnings: warnings "NAME: TEXT" about a value, or about all.
        about: provenance, for the JSON file.
        caches: feature caches to delete.
        run_folder: run to whose TensorBoard folder the values are added, if it exists.
        setting: see :func:`write_curves`.
        step: training step of the model.
    """

    def write() -> None:
        write_json(output, values, warnings, about)
        lines = [title, table(values, warnings), f"written to {output}"]
        if run_folder is not None and run_folder.is_dir():
            try:
                lines.append(f"and to {write_curves(run_folder, setting, step, values)}")
            except OSError as error:
                lines.append(f"but not to TensorBoard: {error}")
        for cache in caches:
            cache.remove()
        print("\n".join(lines), flush=True)

    if Ranks(None).rank == 0:  # nobody waits for it
        write()


def table(values: dict[str, float | None], warnings: list[str]) -> str:
    """Format values and warnings for the terminal; a star marks values with a warning."""
    width = max([len(_title(name)) for name in values] + [16])
    lines = []
    for name, value in values.items():
        text = "-" if value is None else f"{value:.4f}"
        lines.append(
            f"  {_title(name):<{width}}  {text:>12}{' *' if any(w.startswith(f'{name}: ') for w in warnings) else ''}"
        )
    lines += [f"warning: {warning}" for warning in warnings]
    return "\n".join(lines)


def write_json(path: Path, values: dict[str, float | None], warnings: list[str], about: dict[str, Any]) -> None:
    """Write ``metrics``, ``warnings`` and their provenance as one JSON object, atomically.

    Raises:
        EvaluationError: the file cannot be written.
    """
    metrics = {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
    whole = {"metrics": metrics, "warnings": warnings, **about, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        with atomic_write(path, fsync=False) as partial:
            partial.write_text(json.dumps(whole, indent=1))
    except OSError as error:
        raise EvaluationError(f"cannot write {path} ({error.strerror}); choose a file with --output") from error


def write_curves(run: Path, setting: str, step: int, values: dict[str, float | None]) -> Path:
    """Write scalars ``evaluation/NAME`` to a subfolder of the run's TensorBoard folder; return that subfolder.

    It is separate because TensorBoard follows only the newest file in a folder, which a training run may be writing.
    Each sampler setting has its own subfolder, and is thus one curve over the run's steps.
    """
    folder = run / "tensorboard" / ("evaluate-" + re.sub(r"^step\d+-", "", setting) if setting else "evaluate")
    found = {f"evaluation/{n}": v for n, v in values.items() if v is not None and math.isfinite(v)}
    with contextlib.closing(EventWriter(folder)) as writer:
        writer.scalars(found, step)
    return folder


def _title(name: str) -> str:
    return TITLES.get(name, name)
