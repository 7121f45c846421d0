"""Reads what a run wrote: its config, the curves of metrics.jsonl, and its pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import ConfigError, flatten

Points = dict[int, float]  # value by step, ascending
SPEED, EPOCH, OUTSIDE = "speed/images_per_s", "data/epoch", "time/outside/"


@dataclass
class Run:
    """One run folder.

    Attributes:
        folder: of the run.
        settings: its config by dotted key.
        curves: finite values by tag and step. Of steps that a resume or a rollback repeated, the last counts.
        notes: what a reader of the comparison must know about it.
    """

    folder: Path
    settings: dict[str, Any]
    curves: dict[str, Points]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        speed = self.curves.get(SPEED, {})
        steps = np.array([0, *speed], dtype=float)
        images = np.diff(steps) * self.settings["training.batch_size"]
        self._clock = steps, np.cumsum([0.0, *(images / np.array(list(speed.values())))])

    def epochs(self, steps: Any) -> np.ndarray | None:
        """Passes over the dataset until each of ``steps``; None if the run did not record them ("data/epoch")."""
        points = {0: 0.0} | self.curves.get(EPOCH, {})
        if len(points) < 2:
            return None
        (s1, e1), (s2, e2) = list(points.items())[-2:]
        end = max(self.step, s2)  # an evaluation may follow the last record
        return np.interp(steps, [*points, end], [*points.values(), e2 + (end - s2) * (e2 - e1) / (s2 - s1)])

    @property
    def seed(self) -> int:
        return self.settings["training.seed"]

    @property
    def planned(self) -> int:
        """Steps in the config."""
        return self.settings["training.steps"]

    @property
    def step(self) -> int:
        """Last step with a point."""
        return max(max(points) for points in self.curves.values())

    def seconds(self, steps: Any) -> np.ndarray:
        """Seconds of training until each of ``steps``, without interruptions: from the speed of each interval."""
        return np.interp(steps, *self._clock)

    @property
    def wall_s(self) -> float:
        """Seconds of training and its interruptions (evaluation, pictures, saving, logging), up to the last point."""
        outside = {tag for tag in self.curves if tag.startswith(OUTSIDE)} - {f"{OUTSIDE}share"}
        return float(self._clock[1][-1]) + sum(sum(self.curves[tag].values()) for tag in outside)

    @property
    def images_per_s(self) -> float | None:
        """Median over the points, without the first, in which PyTorch warms up and compiles."""
        speed = list(self.curves.get(SPEED, {}).values())
        return float(np.median(speed[1:] or speed)) if speed else None

    def picture(self, kind: str) -> tuple[int, Path] | None:
        """Step and file of the last picture of a kind, "samples" or "reconstructions"."""
        if not (found := sorted(self.folder.glob(f"images/{kind}_*.png"))):
            return None
        return int(found[-1].stem.rpartition("_")[2]), found[-1]


def read_run(path: str | Path) -> Run:
    """Read a run folder.

    Raises:
        ConfigError: it is no run folder, or has no points yet.
    """
    folder = Path(path).expanduser()
    settings = _settings(folder)
    notes: list[str] = []
    curves = _curves(folder / "metrics.jsonl", notes)
    if not curves:
        raise ConfigError(f"'{folder}' has no points yet in metrics.jsonl: it is a run that has not logged a step")
    run = Run(folder, settings, curves, notes)
    if run.step < run.planned:
        notes.append(f"unfinished: step {run.step:,} of {run.planned:,}")
    return run


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "config.toml"
    if not file.is_file():
        what = "does not exist" if not folder.exists() else "is no run folder: it has no config.toml"
        there = [str(p.parent) for place in (folder.parent, Path("outputs")) for p in place.glob("*/metrics.jsonl")]
        near = get_close_matches(str(folder), there, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"'{folder}' {what}; expected outputs/NAME of a run{hint}")
    try:
        settings = flatten(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not TOML, or not text
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    for key in ("training.steps", "training.batch_size", "training.seed"):
        if not isinstance(settings.get(key), int):
            raise ConfigError(f"{file} has no {key}: expected the config.toml that train writes into a run's folder")
    return settings


def _curves(file: Path, notes: list[str]) -> dict[str, Points]:
    curves: dict[str, Points] = {}
    last = 0
    for step, values in _lines(file, notes):
        if step < last:  # resumed or rolled back: what followed was discarded
            for points in curves.values():
                for later in [s for s in points if s >= step]:
                    del points[later]
        last = step
        for tag, value in values.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(tag, {})[step] = float(value)
    return {tag: points for tag, points in curves.items() if points}


def _lines(file: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = file.read_bytes().splitlines() if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            yield int(values.pop("step")), values
        except (ValueError, TypeError, KeyError, AttributeError):
            end = "the last line is incomplete" if number == len(lines) else f"line {number} is damaged"
            notes.append(f"metrics.jsonl: {end} and left out")
