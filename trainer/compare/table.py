"""The comparison as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

from trainer.compare.arms import Arm
from trainer.compare.statistics import Goal, Reached, Value, best, last, reached
from trainer.run.monitor.tags import direction

ARROWS = {1: " (higher is better)", -1: " (lower is better)", 0: ""}


def markdown(arms: Sequence[Arm], tags: Sequence[str], goals: Sequence[Goal], notes: Sequence[str]) -> str:
    """The whole page: runs, last and best values, steps to each goal, and notes."""
    parts = ["# Comparison of runs", _runs(arms), "## Last value", _values(arms, tags, last_of)]
    directed = [tag for tag in tags if direction(tag)]
    if directed:
        parts += ["## Best value", _values(arms, directed, best_of)]
    for title, chosen in _titled(goals):
        parts += [title, _goals(arms, chosen)]
    if any(len(arm.runs) > 1 for arm in arms):
        parts.append("± is the sample standard deviation over the seeds.")
    if notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def last_of(arm: Arm, tag: str) -> Value | None:
    """Last value of a metric, if the arm has it."""
    return None if (series := arm.series(tag)) is None else last(series)


def best_of(arm: Arm, tag: str) -> Value | None:
    """Best value of a metric, if the arm has it."""
    return None if (series := arm.series(tag)) is None else best(series, direction(tag))


def _runs(arms: Sequence[Arm]) -> str:
    rows = []
    for arm in arms:
        speeds = [run.images_per_s for run in arm.runs if run.images_per_s is not None]
        training = [float(run.seconds(run.step)) for run in arm.runs]
        steps = " ".join(dict.fromkeys(f"{run.step:,}" for run in arm.runs))
        rows.append([arm.label, str(len(arm.runs)), steps, _spread(speeds), _time(training), _time(_walls(arm))])
    return _table(["run", "seeds", "steps", "images/s", "training time", "with interruptions"], rows)


def _walls(arm: Arm) -> list[float]:
    return [run.wall_s for run in arm.runs]


def _values(arms: Sequence[Arm], tags: Sequence[str], value_of: Callable[[Arm, str], Value | None]) -> str:
    rows = []
    for tag in tags:
        values = [value_of(arm, tag) for arm in arms]
        means = [value.mean * direction(tag) for value in values if value is not None]
        same_step = len({value.step for value in values if value is not None}) == 1
        cells = []
        for value in values:
            if value is None:
                cells.append("-")
                continue
            text = number(value.mean, value.std)
            if direction(tag) and len(means) > 1 and value.mean * direction(tag) == max(means):
                text = f"**{text}**"
            cells.append(text if same_step else f"{text} at {value.step:,}")
        step = next(f"{value.step:,}" for value in values if value is not None) if same_step else ""
        rows.append([tag + ARROWS[direction(tag)], step, *cells])
    return _table(["metric", "step", *(arm.label for arm in arms)], rows)


def _titled(goals: Sequence[Goal]) -> list[tuple[str, list[Goal]]]:
    given, final = [goal for goal in goals if goal.arm is None], [goal for goal in goals if goal.arm is not None]
    found = [("## Steps to a threshold", given)] if given else []
    if final:
        arm = final[0].arm
        found.append((f"## Steps to the final score of {arm.label}", final))
    return found


def _goals(arms: Sequence[Arm], goals: Sequence[Goal]) -> str:
    rows = []
    for goal in goals:
        sign = "≥" if direction(goal.tag) > 0 else "≤"
        cells = ["-" if (found := reached(arm, goal)) is None else reached_in(found) for arm in arms]
        rows.append([f"{goal.tag} {sign} {number(goal.value)}", *cells])
    return _table(["goal", *(arm.label for arm in arms)], rows)


def reached_in(r: Reached) -> str:
    """Such as "400 ± 50 (1.2 epochs, 2.5x fewer steps, 2.1x less training time)"."""
    if r.step is None:
        got = sum(step is not None for step in r.steps)
        return "not reached" if not got else f"reached by {got} of {len(r.steps)} seeds"
    text = f"{r.step:,.0f}" + (f" ± {r.std:,.0f}" if r.std is not None else "")
    parts = [] if r.epochs is None else [f"{r.epochs:.4g} epochs"]
    fewer = r.times_fewer is not None and r.times_fewer > 1
    if fewer:
        parts.append(f"{r.times_fewer:.3g}x fewer steps")
    if fewer and r.times_faster:
        less = r.times_faster >= 1
        parts.append(
            f"{r.times_faster if less else 1 / r.times_faster:.3g}x {'less' if less else 'more'} training time"
        )
    return f"{text} ({', '.join(parts)})" if parts else text


def number(mean: float, std: float | None = None) -> str:
    """Four significant digits, and the deviation with as many decimals."""
    text = f"{mean:.4g}"
    if std is None:
        return text
    if "e" in text:
        return f"{text} ± {std:.2g}"
    return f"{text} ± {std:.{len(text.partition('.')[2])}f}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = sum(values) / len(values)
    std = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else None
    return number(mean, std)


def _time(seconds: Sequence[float]) -> str:
    return str(timedelta(seconds=round(sum(seconds) / len(seconds))))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned, so that it can also be read in a terminal."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
