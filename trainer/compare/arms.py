"""Arms: runs that differ in their seed only, and what differs between arms."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.compare.runs import Run, read_run
from trainer.config import ConfigError

NOT_SHARED = ("training.seed", "run.dir")  # keys in which seeds of one arm may differ
# Keys that define how samples are made and measured: those of two tables, without those that choose what and when.
MEASURES = ("evaluation.", "sampling.")
NO_MEASURES = ("every", "metrics", "encoders", "reconstruction")


@dataclass
class Series:
    """A metric of an arm, at the steps that all its runs have.

    Attributes:
        steps: (n,) int.
        values: (runs, n).
        seconds: (runs, n) of training until each step.
        epochs: (runs, n) until each step; None if a run did not record them.
    """

    steps: np.ndarray
    values: np.ndarray
    seconds: np.ndarray
    epochs: np.ndarray | None = None

    @property
    def mean(self) -> np.ndarray:
        return self.values.mean(0)

    @property
    def std(self) -> np.ndarray | None:
        """Sample standard deviation over the seeds (n - 1); None for a single one."""
        return self.values.std(0, ddof=1) if len(self.values) > 1 else None


@dataclass
class Arm:
    """Runs shown as one, with a label."""

    label: str
    runs: list[Run]

    @property
    def tags(self) -> set[str]:
        """Metrics that every run has."""
        return set.intersection(*(set(run.curves) for run in self.runs))

    def series(self, tag: str) -> Series | None:
        """The metric's values, or None if the runs have it at no common step."""
        curves = [run.curves.get(tag, {}) for run in self.runs]
        steps = sorted(set.intersection(*(set(points) for points in curves)))
        if not steps:
            return None
        values = np.array([[points[step] for step in steps] for points in curves])
        epochs = [run.epochs(steps) for run in self.runs]
        seconds = np.array([run.seconds(steps) for run in self.runs])
        return Series(np.array(steps), values, seconds, None if any(e is None for e in epochs) else np.array(epochs))


def make_arms(words: Sequence[str]) -> list[Arm]:
    """Read the runs of a command line: RUN, or NAME=RUN[,RUN...] for an arm with a label.

    Runs without a label form one arm if their configs differ in ``training.seed`` (and ``run.dir``) only.

    Raises:
        ConfigError: a folder is no run, or is named twice.
    """
    arms: list[Arm] = []
    for word in words:
        label, equals, folders = word.partition("=")
        if equals and not Path(word).expanduser().exists():
            if not label or not all(folders.split(",")):
                raise ConfigError(f"'{word}': expected NAME=RUN or NAME=RUN,RUN")
            arms.append(Arm(label, [read_run(folder) for folder in folders.split(",")]))
            continue
        run = read_run(word)
        same = (arm for arm in arms if not arm.label and _is_another_seed(run, arm.runs))
        if (arm := next(same, None)) is not None:
            arm.runs.append(run)
        else:
            arms.append(Arm("", [run]))
    seen: set[Path] = set()
    for run in itertools.chain.from_iterable(arm.runs for arm in arms):
        if (place := run.folder.resolve()) in seen:
            raise ConfigError(f"'{run.folder}' is named twice")
        seen.add(place)
    for arm in arms:
        arm.label = arm.label or _label([run.folder for run in arm.runs])
    for arm in arms:
        alike = [other for other in arms if other.label == arm.label]
        for number, other in enumerate(alike[1:], start=2):
            other.label = f"{other.label} ({number})"
    return arms


def _is_another_seed(run: Run, others: list[Run]) -> bool:
    return all(not _differing([run, other], NOT_SHARED) and run.seed != other.seed for other in others)


def _differing(runs: Iterable[Run], without: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Values of each key in which the runs differ."""
    all_settings = [run.settings for run in runs]
    keys = dict.fromkeys(key for settings in all_settings for key in settings if key not in without)
    values = {key: [settings.get(key, "unset") for settings in all_settings] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _label(folders: list[Path]) -> str:
    """Name of the folder; of several, what their names begin with."""
    names = [folder.resolve().name for folder in folders]
    if len(names) == 1:
        return names[0]
    alike = itertools.takewhile(lambda letters: len({*letters}) == 1, zip(*names))
    common = re.sub(r"([-_.](seed|s))?[-_.]?\d*$", "", "".join(letters[0] for letters in alike))
    return common or names[0]


def notes_on(arms: Sequence[Arm]) -> list[str]:
    """What a reader must know: unfinished or damaged runs, and differences that make values incomparable."""
    found = [f"{run.folder}: {note}" for arm in arms for run in arm.runs for note in run.notes]
    for arm in arms:
        if differs := _differing(arm.runs, NOT_SHARED):
            found.append(f"the runs of '{arm.label}' differ in more than their seed: {', '.join(differs)}")
    first = [arm.runs[0] for arm in arms]
    for key, values in _differing(first).items():
        measures = key.startswith(MEASURES) and key.partition(".")[2] not in NO_MEASURES and key != "sampling.images"
        if not measures and key != "training.batch_size":
            continue
        listed = ", ".join(f"{arm.label} {value}" for arm, value in zip(arms, values))
        why = "steps see different numbers of images" if key == "training.batch_size" else "scores are not comparable"
        found.append(f"{key} differs ({listed}): {why}")
    return found
