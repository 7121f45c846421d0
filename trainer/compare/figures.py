"""Figures of a comparison, drawn by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.compare.arms import Arm
from trainer.compare.statistics import SCORES, Goal

# Okabe and Ito's palette, which color-blind readers can tell apart, without its yellow, which is too light on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
End = tuple[str, int, float]  # label and number of an arm, and its last value
DPI = 120
PANEL = (3.6, 2.8)  # inches
LABELS = 1.7  # inches right of a metric's panels
INK, GRID = "#222222", "#DDDDDD"
STYLE = {"font.size": 11, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
LOG_RANGE = 20  # values over a larger range are drawn on a logarithmic axis
SAMPLES_WIDTH = 640, 1280  # pixels of an arm's grid, at least about and at most


def draw_curves(
    path: Path, arms: Sequence[Arm], tags: Sequence[str], goals: Sequence[Goal] = (), smooth: float = 0.0
) -> None:
    """Draw each metric against steps and against training time, with mean and standard deviation over seeds.

    Args:
        path: PNG file to write.
        arms: at most as many as can be told apart by color and dashes (28).
        tags: metrics; up to four are drawn below each other, more in two columns.
        goals: drawn as dotted lines.
        smooth: weight of the past in the moving average of losses, as in TensorBoard; scores are never smoothed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    blocks = 1 if len(tags) <= 4 else 2
    rows = -(-len(tags) // blocks)
    block = (2 * PANEL[0] + LABELS + 0.75, PANEL[1] + 0.65)
    width, height = blocks * block[0], rows * block[1]
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        for place, tag in enumerate(tags):
            left, top = (place % blocks) * block[0] + 0.9, height - (place // blocks) * block[1] - 0.4
            for column in range(2):
                inches = (left + column * (PANEL[0] + 0.15), top - PANEL[1] + 0.25, PANEL[0] - 0.2, PANEL[1] - 0.3)
                box = [inches[0] / width, inches[1] / height, inches[2] / width, inches[3] / height]
                axes = figure.add_axes(box, facecolor="white", sharey=figure.axes[-1] if column else None)
                weight = 0.0 if tag.startswith(SCORES) else smooth
                ends = _panel(axes, arms, tag, goals, weight, time=column == 1)
                axes.set_xlabel("training time" if column else "steps", labelpad=1)
                if column:
                    axes.tick_params(labelleft=False)
                    _label_ends(figure, axes, ends)
                else:
                    axes.set_title(tag, loc="left", fontweight="bold", fontsize=12)
        figure.savefig(path, facecolor="white")


def _panel(axes: Any, arms: Sequence[Arm], tag: str, goals: Sequence[Goal], smooth: float, time: bool) -> list[End]:
    """Draw one metric, and return where the lines end."""
    from matplotlib.ticker import LogLocator, NullLocator

    ends: list[End] = []
    lowest, highest, longest = np.inf, -np.inf, 0.0
    for series in filter(None, (arm.series(tag) for arm in arms)):
        longest = max(longest, float(series.seconds.mean(0)[-1]))
    unit, name = next(((u, n) for u, n in ((3600, "h"), (60, "min")) if longest > 2 * u), (1, "s"))
    for number, arm in enumerate(arms):
        if (series := arm.series(tag)) is None:
            continue
        x = series.seconds.mean(0) / unit if time else series.steps
        values = np.array([smoothed(row, smooth) for row in series.values])
        mean = values.mean(0)
        ends.append((arm.label, number, float(mean[-1])))
        lowest, highest = min(lowest, values.min()), max(highest, values.max())
        color, dash = COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]
        marker = "o" if len(x) <= 20 else ""
        axes.plot(x, mean, dash, color=color, linewidth=2.2, marker=marker, markersize=4.5)
        if len(values) > 1:
            std = values.std(0, ddof=1)
            axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
    for goal in goals:
        if goal.tag == tag:
            axes.axhline(goal.value, color="#666666", linestyle=":", linewidth=1.4)
    if lowest > 0 and highest > LOG_RANGE * lowest:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if time:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} {name}")
    else:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}")
    axes.locator_params(axis="x", nbins=5)
    return ends


def _label_ends(figure: Any, axes: Any, ends: Sequence[End]) -> None:
    """Write each arm's label, in its color, right of the panel at the height of its last value, without overlaps."""
    ends = sorted(ends, key=lambda end: end[2])
    to_panel = axes.transData + axes.transAxes.inverted()
    heights = [float(np.clip(to_panel.transform((0.0, value))[1], 0, 1)) for *_, value in ends]
    gap = 17 / DPI / (axes.get_position().height * figure.get_figheight())  # a line of text, in heights of the panel
    for (label, number, _), y in zip(ends, spread(heights, gap)):
        short = label if len(label) <= 22 else label[:21] + "…"
        color = COLORS[number % len(COLORS)]
        axes.text(1.03, y, short, color=color, transform=axes.transAxes, va="center", fontweight="bold", fontsize=11)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending ``heights`` apart to at least ``gap``, around their mean, where they would overlap."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _bottom(groups[-1], gap) - _top(groups[-2], gap) < gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_bottom(group, gap) + number * gap for group in groups for number in range(len(group))]


def _bottom(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: Sequence[float], gap: float) -> float:
    return _bottom(group, gap) + gap * (len(group) - 1)


def smoothed(values: np.ndarray, weight: float) -> np.ndarray:
    """TensorBoard's exponential moving average, corrected for its start; weight 0: the values."""
    found, average, total = [], 0.0, 0.0
    for value in values:
        average, total = weight * average + (1 - weight) * value, weight * total + 1 - weight
        found.append(average / total)
    return np.array(found)


def draw_pictures(path: Path, arms: Sequence[Arm], kind: str) -> list[str]:
    """Draw the last picture of each arm's first run side by side, small ones enlarged.

    Args:
        path: PNG file to write.
        arms: in the order of the pictures.
        kind: "samples", or "reconstructions", which have the latents' principal components below them.

    Returns:
        Labels of the arms without such pictures; if all are, no file is written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from PIL import Image

    found, without = [], []
    for arm in arms:
        if (picture := arm.runs[0].picture(kind)) is None:
            without.append(arm.label)
            continue
        step, file = picture
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        times = max(1, round(SAMPLES_WIDTH[0] / image.width))
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
        image.thumbnail((SAMPLES_WIDTH[1], 4 * SAMPLES_WIDTH[1]))
        found.append((f"{arm.label}, step {step:,}", image))
    if not found:
        return without
    columns, gap, head = min(3, len(found)), 16, 36
    cell = max(image.width for _, image in found) + gap, max(image.height for _, image in found) + head
    width, height = columns * cell[0] + gap, -(-len(found) // columns) * cell[1] + gap
    with rc_context(STYLE):
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        for number, (title, image) in enumerate(found):
            x, top = gap + number % columns * cell[0], height - number // columns * cell[1] - head
            box = [x / width, (top - image.height) / height, image.width / width, image.height / height]
            axes = figure.add_axes(box)
            axes.imshow(np.asarray(image), interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            figure.text(x / width, (top + 8) / height, title, fontweight="bold")
        figure.savefig(path, facecolor="white")
    return without
