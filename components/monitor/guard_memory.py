"""State of a guard: reference levels, anomalies and open incidents."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

LATENT = "latent/variance"
ADVERSARY = "adversary/loss"
NORM = "grad_norm/"

REFERENCE_WINDOWS = 50  # a norm is compared with its largest median in this many windows: 10k steps by default
QUIET = 10  # number of normal steps that separate two incidents
ENOUGH = 5  # minimum number of values for a usual range
LARGEST = sys.float_info.max


class Anomaly(NamedTuple):
    """An anomaly: a metric outside its usual range.

    Attributes:
        metric: name of the metric.
        module: parameter group that it belongs to; "latent" for the latents' variance.
        step: step of the anomaly.
        value: its value at that step; may be infinite or NaN.
        usual: its median before; NaN if there were no values.
    """

    metric: str
    module: str
    step: int
    value: float
    usual: float


@dataclass
class Incident:
    """An open incident of one check.

    Attributes:
        metric: metric that triggered it.
        onset: its first bad step.
        count: consecutive bad steps.
        calm: consecutive normal steps.
        raised: step of its last alarm; None before the first.
        value: the metric at ``onset``.
        usual: what was usual at ``onset``.
    """

    metric: str
    onset: int
    count: int
    calm: int
    raised: int | None
    value: float
    usual: float


@dataclass
class Reference:
    """Long-term reference level of a metric: the largest over past windows of each window's smallest running median.

    The smallest, because a spike that lasts half a window moves the median but is not a sustained level.
    """

    seen: int
    smallest: float
    past: deque[float]

    @property
    def largest(self) -> float:
        return max(self.past, default=0.0)

    def see(self, median: float, window: int, forever: bool) -> None:
        """Add the running median after a step.

        Args:
            median: infinite if there is none yet.
            window: steps per window.
            forever: keep the largest median since the first full window instead of one per window.
        """
        self.seen += 1
        if forever:
            if self.seen >= window and median < math.inf:
                self.past = deque([max(self.largest, median)], REFERENCE_WINDOWS)
        # The first window is warm-up. Its norms are far above later ones and must have left the median, too.
        elif self.seen >= 2 * window:
            self.smallest = min(self.smallest, median)
            if self.seen % window == 0 and self.smallest < math.inf:
                self.past.append(self.smallest)
                self.smallest = math.inf


def watched(name: str) -> bool:
    """Whether the guard keeps a running median of a metric."""
    return name.endswith("/loss") or name.startswith(NORM) or name == LATENT


def rank(name: str) -> int:
    """Sort key that puts causes before effects: 0 for a loss term, 1 for a loss, 2 for a gradient norm."""
    return 2 if name.startswith(NORM) else int(name.endswith("/loss"))


def median_of(values: list[float]) -> float:
    """Median of sorted values; NaN for an empty list."""
    half = len(values) // 2
    if not values:
        return math.nan
    return values[half] if len(values) % 2 else 0.5 * (values[half - 1] + values[half])


def finite(rows: Iterable[tuple[int, Mapping[str, float]]], name: str) -> list[float]:
    """Sorted finite values of a metric in (step, values) rows."""
    return sorted(values[name] for _, values in rows if math.isfinite(values.get(name, math.nan)))


def usual_range(name: str, values: list[float]) -> tuple[float, float, float]:
    """(low, median, high) of sorted values; values outside [low, high] are rare even for heavy-tailed metrics."""
    if len(values) < ENOUGH:
        return -LARGEST, median_of(values), LARGEST
    median, tail = median_of(values), len(values) // 50
    # Losses are meant to fall; norms and the variance are not.
    low = values[tail] / 4 if name.startswith(NORM) or name == LATENT else -LARGEST
    return low, median, median + max(3 * (values[-1 - tail] - median), 0.1 * abs(median))


def last_incident(anomalies: list[Anomaly]) -> list[Anomaly]:
    """The last incident: the newest anomalies without a gap of more than QUIET steps, newest first."""
    anomalies = sorted(anomalies, key=lambda d: -d.step)
    for index, (later, earlier) in enumerate(zip(anomalies, anomalies[1:])):
        if later.step - earlier.step > QUIET:
            return anomalies[: index + 1]
    return anomalies


def pack(value: float | None) -> float | str | None:
    """Write NaN and infinities, which JSON lacks, as strings."""
    return value if value is None or math.isfinite(value) else str(value)
