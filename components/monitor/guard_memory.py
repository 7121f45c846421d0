"""What a guard remembers of a run: what is usual, and the trouble that is under way."""

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

REFERENCE_WINDOWS = 50  # a norm is compared with its largest median of so many windows: 10k steps by default
QUIET = 10  # steps without trouble that separate two troubles
ENOUGH = 5  # values below which a usual range means nothing
LARGEST = sys.float_info.max


class Departure(NamedTuple):
    """A metric that left its usual range.

    Attributes:
        metric: which one.
        module: the parameter group that it belongs to; "latent" for the latents' variance.
        step: when it left.
        value: what it was then; may be infinite or NaN.
        usual: its median before; NaN if too little was seen.
    """

    metric: str
    module: str
    step: int
    value: float
    usual: float


@dataclass
class Episode:
    """A watch's trouble: its first step and value there, bad steps in a row, normal ones in a row, last alarm."""

    metric: str
    onset: int
    count: int
    calm: int
    raised: int | None
    value: float
    usual: float


@dataclass
class Reference:
    """What is usual in the long run: the smallest running median of a window's steps, the largest of past windows.

    The smallest, since a spike that lasts for half a window moves the median, and is not usual yet.
    """

    seen: int
    smallest: float
    past: deque[float]

    @property
    def largest(self) -> float:
        return max(self.past, default=0.0)

    def see(self, median: float, window: int, forever: bool) -> None:
        """Another running median; infinite if there is none yet. ``forever`` keeps the largest median of all."""
        self.seen += 1
        if forever:
            if self.seen >= window and median < math.inf:
                self.past = deque([max(self.largest, median)], REFERENCE_WINDOWS)
        # The first window is warm-up; a norm's, far above all later ones, must have left the median, too.
        elif self.seen >= 2 * window:
            self.smallest = min(self.smallest, median)
            if self.seen % window == 0 and self.smallest < math.inf:
                self.past.append(self.smallest)
                self.smallest = math.inf


def watched(name: str) -> bool:
    """Whether a guard keeps medians of a metric."""
    return name.endswith("/loss") or name.startswith(NORM) or name == LATENT


def rank(name: str) -> int:
    """Causes before effects: a term, the loss that sums it, the loss's gradient."""
    return 2 if name.startswith(NORM) else int(name.endswith("/loss"))


def median_of(values: list[float]) -> float:
    """Of sorted values; NaN of none."""
    half = len(values) // 2
    if not values:
        return math.nan
    return values[half] if len(values) % 2 else 0.5 * (values[half - 1] + values[half])


def finite(rows: Iterable[tuple[int, Mapping[str, float]]], name: str) -> list[float]:
    """A metric's finite values in (step, values) rows, sorted."""
    return sorted(values[name] for _, values in rows if math.isfinite(values.get(name, math.nan)))


def usual_range(name: str, values: list[float]) -> tuple[float, float, float]:
    """(low, median, high) of sorted values; what lies outside is rare even for heavy tails."""
    if len(values) < ENOUGH:
        return -LARGEST, median_of(values), LARGEST
    median, tail = median_of(values), len(values) // 50
    # Losses fall for good; only norms and the variance must not.
    low = values[tail] / 4 if name.startswith(NORM) or name == LATENT else -LARGEST
    return low, median, median + max(3 * (values[-1 - tail] - median), 0.1 * abs(median))


def last_trouble(departures: list[Departure]) -> list[Departure]:
    """Those that no QUIET steps separate from the last."""
    departures = sorted(departures, key=lambda d: -d.step)
    for index, (later, earlier) in enumerate(zip(departures, departures[1:])):
        if later.step - earlier.step > QUIET:
            return departures[: index + 1]
    return departures


def pack(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinities."""
    return value if value is None or math.isfinite(value) else str(value)
