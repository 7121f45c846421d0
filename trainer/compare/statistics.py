"""Numbers of a comparison: last and best values, and when an arm reaches a score."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from trainer.compare.arms import Arm, Series
from trainer.config import ConfigError
from trainer.run.monitor.tags import direction

SCORES = "evaluation/"


@dataclass
class Value:
    """A value of an arm at a step: ``mean`` and sample standard deviation over its seeds (None: a single seed)."""

    step: int
    mean: float
    std: float | None
    values: list[float]


@dataclass
class Reached:
    """When an arm reached a score: the first point at or beyond it, in each seed.

    Attributes:
        steps: of each seed; None: it did not reach it.
        step: mean over the seeds; None if one did not reach it. ``std`` likewise.
        seconds: of training until then, mean over the seeds.
        epochs: passes over the dataset until then, mean over the seeds; None if a run did not record them.
        times_fewer: steps of the arm whose final score this is, divided by ``step``; None: a given threshold.
        times_faster: the same for the seconds of training.
    """

    steps: list[int | None]
    step: float | None = None
    std: float | None = None
    seconds: float | None = None
    epochs: float | None = None
    times_fewer: float | None = None
    times_faster: float | None = None


@dataclass
class Goal:
    """A score to reach: ``tag`` = ``value``, the final score of ``arm`` or, if that is None, a given threshold."""

    tag: str
    value: float
    arm: Arm | None = None


def value_at(series: Series, index: int) -> Value:
    """Value at one of the points."""
    std = None if series.std is None else float(series.std[index])
    return Value(int(series.steps[index]), float(series.mean[index]), std, series.values[:, index].tolist())


def last(series: Series) -> Value:
    return value_at(series, -1)


def best(series: Series, better: int) -> Value:
    """Best point of the mean over seeds; ``better``: 1 if higher is better, -1 if lower."""
    return value_at(series, int(np.argmax(series.mean * better)))


def reached(arm: Arm, goal: Goal) -> Reached | None:
    """When an arm reached a goal; None if it does not have the metric."""
    if (series := arm.series(goal.tag)) is None:
        return None
    hits = (series.values - goal.value) * direction(goal.tag) >= 0
    places = [int(np.argmax(row)) if row.any() else None for row in hits]
    steps = [None if place is None else int(series.steps[place]) for place in places]
    if None in places:
        return Reached(steps)
    seconds = float(np.mean([series.seconds[seed, place] for seed, place in enumerate(places)]))
    std = float(np.std(steps, ddof=1)) if len(steps) > 1 else None
    found = Reached(steps, float(np.mean(steps)), std, seconds)
    if series.epochs is not None:
        found.epochs = float(np.mean([series.epochs[seed, place] for seed, place in enumerate(places)]))
    if goal.arm is not None and arm is not goal.arm:
        whole = goal.arm.series(goal.tag)
        found.times_fewer = float(whole.steps[-1]) / found.step
        found.times_faster = float(whole.seconds[:, -1].mean()) / seconds if seconds else None
    return found


def choose(names: Sequence[str], arms: Sequence[Arm]) -> list[str]:
    """Tags of the metrics to show: those named, or by default all scores of evaluations and the losses.

    A name is a tag ("denoiser/loss"), its last word ("fid"), or a pattern ("evaluation/*").

    Raises:
        ConfigError: no run has it; says the nearest names.
    """
    known = sorted(set().union(*(arm.tags for arm in arms)))
    if not names:
        scores = [tag for tag in known if tag.startswith(SCORES)]
        return scores + [tag for tag in known if re.fullmatch(r"\w+/loss", tag)]
    return list(dict.fromkeys(tag for name in names for tag in _find(name, known)))


def _find(name: str, known: Sequence[str]) -> list[str]:
    found = [tag for tag in known if tag == name] or [tag for tag in known if tag.rpartition("/")[2] == name]
    found = found or fnmatch.filter(known, name)
    if not found:
        words = {word: tag for tag in known for word in (tag, tag.rpartition("/")[2])}
        near = dict.fromkeys(words[word] for word in get_close_matches(name, words, n=4, cutoff=0.4))
        hint = f"the nearest names: {', '.join(near)}" if near else f"e.g. {', '.join(known[:4])}"
        raise ConfigError(f"no run has the metric '{name}'; {hint}")
    return found


def thresholds(words: Sequence[str], arms: Sequence[Arm]) -> list[Goal]:
    """Goals of ``--threshold metric=value``.

    Raises:
        ConfigError: it is malformed, or names no metric, several, or one of which neither more nor less is better.
    """
    goals = []
    for word in words:
        name, _, text = word.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ConfigError(f"--threshold={word}: expected METRIC=NUMBER, such as fid=10")
        tags = choose([name], arms)
        if len(tags) > 1:
            raise ConfigError(f"--threshold={word}: '{name}' is ambiguous: {', '.join(tags)}")
        if not direction(tags[0]):
            raise ConfigError(f"--threshold={word}: neither a higher nor a lower {tags[0]} is better")
        goals.append(Goal(tags[0], value))
    return goals


def final_scores(named: str | None, tags: Sequence[str], arms: Sequence[Arm]) -> list[Goal]:
    """Goals of ``--reach ARM``: its final scores; by default those of the first of several arms.

    Raises:
        ConfigError: there is no such arm.
    """
    if named is None and len(arms) < 2:
        return []
    labels = {arm.label: arm for arm in arms} | {str(run.folder): arm for arm in arms for run in arm.runs}
    if named is not None and named.rstrip("/") not in labels:
        raise ConfigError(f"--reach={named}: expected one of the arms: {', '.join(arm.label for arm in arms)}")
    arm = arms[0] if named is None else labels[named.rstrip("/")]
    chosen = [tag for tag in tags if direction(tag) and (tag.startswith(SCORES) or named is not None)]
    return [Goal(tag, last(series).mean, arm) for tag in chosen if (series := arm.series(tag)) is not None]


def everything(arms: Sequence[Arm], tags: Sequence[str], goals: Sequence[Goal], notes: Sequence[str]) -> dict[str, Any]:
    """All numbers as JSON."""
    return {
        "notes": list(notes),
        "arms": {arm.label: _of_arm(arm, tags) for arm in arms},
        "goals": [
            {
                "metric": goal.tag,
                "value": goal.value,
                "final_score_of": goal.arm.label if goal.arm is not None else None,
                "reached": {arm.label: asdict(r) for arm in arms if (r := reached(arm, goal)) is not None},
            }
            for goal in goals
        ],
    }


def _of_arm(arm: Arm, tags: Sequence[str]) -> dict[str, Any]:
    metrics = {}
    for tag in tags:
        if (series := arm.series(tag)) is None:
            continue
        better = direction(tag)
        metrics[tag] = {
            "better": {1: "higher", -1: "lower", 0: None}[better],
            "last": asdict(last(series)),
            "best": asdict(best(series, better)) if better else None,
            "steps": series.steps.tolist(),
            "values": series.values.tolist(),
            "training_s": series.seconds.tolist(),
        }
    runs = [
        {
            "folder": str(run.folder),
            "seed": run.seed,
            "step": run.step,
            "planned_steps": run.planned,
            "images_per_s": run.images_per_s,
            "training_s": float(run.seconds(run.step)),
            "wall_s": run.wall_s,
        }
        for run in arm.runs
    ]
    return {"runs": runs, "metrics": metrics}
