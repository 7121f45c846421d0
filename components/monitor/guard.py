"""Watches what a run measures and says when it is dying: skipped steps, spikes, vanishing gradients, flat latents.

Pure arithmetic on host values that are the same on every rank, so that every rank decides the same. It explains and
never acts.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from components.monitor.guard_memory import (
    ADVERSARY,
    LATENT,
    NORM,
    REFERENCE_WINDOWS,
    Departure,
    Episode,
    Reference,
    finite,
    last_trouble,
    median_of,
    pack,
    rank,
    usual_range,
    watched,
)

MAD_TO_DEVIATION = 1.4826  # median absolute deviation -> standard deviation of a normal distribution
CHANCE = 1.0  # hinge loss of a discriminator that cannot tell real from fake


class Alarm(NamedTuple):
    """A watch that went off.

    Attributes:
        name: of the watch: "skipped", "spike", "collapse", "latent_variance" or "discriminator".
        metric: the value that gave it away, such as "grad_norm/denoiser".
        step: when it was raised.
        onset: first step of the trouble; a checkpoint of a step <= onset, the steps taken before it, is good.
        message: one sentence: what, since when, against what.
    """

    name: str
    metric: str
    step: int
    onset: int
    message: str


class Guard:
    """Decides at each step whether a run is in trouble.

    Values are known by name: ``<group>/loss``, ``<group>/<term>``, ``grad_norm/<group>``, ``latent/variance``, and
    ``adversary/loss``, a copy of the discriminator's loss in the steps that train it. Any may be missing, NaN or
    infinite in a step. Steps that were not applied count for ``skipped`` alone, and pause the other watches.

    An alarm is raised once. The same watch on the same metric speaks again after ``window // 10`` (at least 1)
    normal steps in a row, or ``window`` steps later if the trouble lasts.

    Args:
        window: applied steps over which medians run. 200 steps hold a heavy-tailed norm's median to some per cent,
            and a new level becomes the usual one after 100.
        spike: alarm at a ``<group>/loss`` or ``grad_norm/*`` above median + spike * scale, once half a window was
            seen; scale = max(abs(median), 1.4826 * median absolute deviation), so that losses may cross zero. 10: norms
            of dying runs reach hundreds of times their median. Norms whose logarithm deviates by 0.5 exceed it once in
            a million steps, by 0.6 once in 30k: raise it if alarms come without harm. The discriminator's loss must
            also exceed its median by 1, a hinge loss at chance: coming back from near 0 is no trouble. Spikes enter
            the window, or a lasting new level would stay a spike for ever.
        skipped: alarm after so many steps in a row that were not applied. 10: a single bad batch skips one.
        collapse: alarm at a ``grad_norm/*`` below this fraction of its reference for ``patience`` applied steps in a
            row, unless the loss of the group is exactly 0. The reference is the largest level that the running median
            held for a window within the last 50, without the values of the first window, when norms are large. 1e-3:
            norms of healthy runs shrink tenfold over a run. Losses are not watched: one near zero is no trouble.
        latent_variance: alarm at ``latent/variance`` below this fraction of its reference for ``patience // 10`` (at
            least 1) steps in a row; the reference is the largest running median since the first full window. 0.05:
            naive end-to-end training falls to 0.001 of it (arXiv 2504.10483).
        discriminator: alarm at ``adversary/loss`` below this for ``patience`` steps in a row, in the loss's own unit.
            0.01: one per cent of the hinge loss at chance; the tokenizer then learns nothing from it.
        patience: applied steps in a row before a collapse counts. 100: no batch effect lasts as long.
        history: steps whose values are kept for reports.

    A threshold of 0 switches its watch off.

    Attributes:
        history: (step, values) of the last steps, the skipped ones included.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        *,
        window: int = 200,
        spike: float = 10.0,
        skipped: int = 10,
        collapse: float = 1e-3,
        latent_variance: float = 0.05,
        discriminator: float = 0.01,
        patience: int = 100,
        history: int = 50,
    ) -> None:
        for name, value, least in (("window", window, 2), ("patience", patience, 1), ("history", history, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"guard: {name} = {value!r}; expected a whole number of steps, at least {least}")
        if not isinstance(skipped, int) or skipped < 0:
            raise ValueError(f"guard: skipped = {skipped!r}; expected a whole number of steps, or 0 for never")
        for name, value, end in (
            ("spike", spike, math.inf),
            ("collapse", collapse, 1.0),
            ("latent_variance", latent_variance, 1.0),
            ("discriminator", discriminator, math.inf),
        ):
            if not 0 <= value < end:
                raise ValueError(f"guard: {name} = {value!r}; expected 0 for never, or a number below {end:g}")
        self.window, self.spike, self.skipped, self.patience = window, spike, skipped, patience
        self.collapse, self.latent_variance, self.discriminator = collapse, latent_variance, discriminator
        self.history: deque[tuple[int, dict[str, float]]] = deque(maxlen=history)
        self._rows: deque[tuple[int, dict[str, float]]] = deque()  # applied steps alone
        self._sorted: dict[str, list[float]] = {}  # the rows' finite values of each watched metric
        self._references: dict[str, Reference] = {}
        self._episodes: dict[tuple[str, str], Episode] = {}

    def observe(self, step: int, values: Mapping[str, float], applied: bool) -> list[Alarm]:
        """Looks at a step.

        Args:
            step: counted from 0, larger than the one before.
            values: what it measured, by name; the same on every rank.
            applied: False if it was skipped, since a loss or a gradient norm was not finite.
        """
        values = dict(values)
        self.history.append((step, values))
        found = [*self._watch_skipped(step, values, applied)] if self.skipped else []
        if applied:
            for name, value in values.items():
                if watched(name) and math.isfinite(value):
                    found += self._watch(step, name, value, values)
            self._remember(step, values)
        return found

    def forget(self, step: int) -> None:
        """Goes back to before ``step``: what was seen of it and later ones is dropped, and no trouble is under way.

        References stay: what is usual was learned in longer than a rollback.
        """
        rows = [row for row in self._rows if row[0] < step]
        kept = [entry for entry in self.history if entry[0] < step]
        self._restore(rows, kept)
        self._episodes.clear()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to raise the same alarms: numbers, text, lists and dicts, as JSON can hold them."""
        applied = {step for step, _ in self._rows}
        table = dict([*self._rows, *self.history])
        steps = sorted(table)
        names = dict.fromkeys(name for step in steps for name in table[step])
        return {
            "steps": steps,
            "applied": [int(step in applied) for step in steps],
            "values": {name: [pack(table[step].get(name)) for step in steps] for name in names},
            "references": {name: [r.seen, pack(r.smallest), *r.past] for name, r in self._references.items()},
            "episodes": [
                [*key, e.metric, e.onset, e.count, e.calm, e.raised, pack(e.value), pack(e.usual)]
                for key, e in self._episodes.items()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was called; a smaller window or history keeps the newest steps."""
        columns = state["values"].items()
        entries = []
        for index, step in enumerate(state["steps"]):
            row = {name: float(column[index]) for name, column in columns if column[index] is not None}
            entries.append((step, row))
        self._restore([entry for entry, applied in zip(entries, state["applied"]) if applied], entries)
        self._references = {
            name: Reference(seen, float(smallest), deque(past, REFERENCE_WINDOWS))
            for name, (seen, smallest, *past) in state["references"].items()
        }
        self._episodes = {
            (watch, key): Episode(*rest, float(value), float(usual))
            for watch, key, *rest, value, usual in state["episodes"]
        }

    def first_to_go(self) -> Departure | None:
        """Which metric left its usual range first, in the trouble that the history ends with; none: no trouble.

        Trouble is the steps with a departure that no 10 quiet steps separate; where an alarm is up or a watch has
        been counting for longer, from there. Whatever is not finite comes before values that are merely unusual,
        unless they are so by a watch's measure. Of a step's metrics, a term comes before the loss that it is part
        of, and that before the gradient norm; then the order in which the values came.
        """
        names = list(dict.fromkeys(name for _, values in self.history for name in values))
        groups = {name[: -len("/loss")] for name in names if name.endswith("/loss")}
        names = [
            n for n in names if n != ADVERSARY and (n.startswith(NORM) or n == LATENT or n.split("/")[0] in groups)
        ]
        trouble = last_trouble(self._departures(names))
        found = [d for d in trouble if not math.isfinite(d.value)] or trouble
        found += [
            Departure(e.metric, self._module(e.metric), e.onset, e.value, e.usual) for e in self._episodes.values()
        ]
        order = {name: index for index, name in enumerate(names)}
        return min(
            found,
            key=lambda d: (d.step, math.isfinite(d.value), rank(d.metric), order.get(d.metric, -1)),
            default=None,
        )

    def _watch_skipped(self, step: int, values: dict[str, float], applied: bool) -> Iterator[Alarm]:
        metric, usual = "skipped_steps", math.nan
        if not applied:
            broken = [name for name, value in values.items() if not math.isfinite(value) and name != ADVERSARY]
            metric = min(broken, key=rank, default=metric)
            usual = median_of(finite(self._rows, metric))
        value = values.get(metric, math.nan)
        episode = self._see("skipped", "", step, not applied, self.skipped, metric, value, usual)
        if episode is not None:
            message = (
                f"{episode.count} steps in a row were skipped, and the trouble began at step {episode.onset} with "
                f"{episode.metric} = {episode.value:.4g} (usually {episode.usual:.4g}): a loss or a gradient norm "
                "was not finite"
            )
            yield Alarm("skipped", episode.metric, step, episode.onset, message)

    def _watch(self, step: int, name: str, value: float, values: dict[str, float]) -> Iterator[Alarm]:
        """The watches of a finite value of an applied step, before it enters the medians."""
        usual = self._references[name].largest if name in self._references else 0.0
        if name == LATENT:
            least = self.latent_variance * usual
            yield from self._watch_low("latent_variance", step, name, value, least, max(1, self.patience // 10), usual)
        elif name == ADVERSARY:
            usual = median_of(self._sorted.get(name, []))
            yield from self._watch_low("discriminator", step, name, value, self.discriminator, self.patience, usual)
        else:
            if self.spike:
                yield from self._watch_spike(step, name, value, value == values.get(ADVERSARY))
            # A loss of exactly 0, as a hinge that is met, has no gradient: nothing is left to learn, for now.
            idle = values.get(f"{name.removeprefix(NORM)}/loss") == 0
            if name.startswith(NORM):
                least = 0.0 if idle else self.collapse * usual
                yield from self._watch_low("collapse", step, name, value, least, self.patience, usual)

    def _watch_spike(self, step: int, name: str, value: float, adversary: bool) -> Iterator[Alarm]:
        """A loss or norm against its median; the discriminator's loss, against chance as well."""
        window = self._sorted.get(name, [])
        median, scale = median_of(window), 0.0
        above = value - median
        bad = 2 * len(window) >= self.window and above > self.spike * abs(median) and (above > CHANCE or not adversary)
        if bad:  # rare: only now is the other measure of scale worth its sorting
            scale = max(abs(median), MAD_TO_DEVIATION * median_of(sorted(abs(x - median) for x in window)))
            # No scale: a loss that was always 0 has begun to count.
            bad = scale > 0 and above > self.spike * scale
        episode = self._see("spike", name, step, bad, 1, name, value, median)
        if episode is not None:
            since = f" since step {episode.onset}" if episode.onset < step else ""
            message = (
                f"{name} is {value:.4g} at step {step}{since}: {above / scale:.3g} times its scale of "
                f"{scale:.4g} above its median of {median:.4g} over the last {len(window)} steps (alarm above "
                f"{self.spike:g})"
            )
            yield Alarm("spike", name, step, episode.onset, message)

    def _watch_low(
        self, watch: str, step: int, name: str, value: float, least: float, patience: int, usual: float
    ) -> Iterator[Alarm]:
        """Values that fall below ``least`` and stay there; a ``least`` of 0 never counts."""
        episode = self._see(watch, name, step, least > 0 and value < least, patience, name, value, usual)
        if episode is not None:
            message = (
                f"{name} was below {least:.3g} for {episode.count} steps in a row, and the trouble began at step "
                f"{episode.onset}: it is {value:.4g} now, where {episode.usual:.4g} was usual"
            )
            yield Alarm(watch, name, step, episode.onset, message)

    def _see(
        self, watch: str, key: str, step: int, bad: bool, patience: int, metric: str, value: float, usual: float
    ) -> Episode | None:
        """Counts a watch's bad and normal steps; its episode if this step raises the alarm."""
        episode = self._episodes.get((watch, key))
        if not bad:
            if episode is not None:
                episode.count, episode.calm = 0, episode.calm + 1
                if episode.raised is None or episode.calm >= self.window // 10:
                    del self._episodes[watch, key]
            return None
        if episode is None:
            episode = self._episodes[watch, key] = Episode(metric, step, 0, 0, None, value, usual)
        episode.count, episode.calm = episode.count + 1, 0
        if episode.count < patience or (episode.raised is not None and step - episode.raised < self.window):
            return None
        episode.raised = step
        return episode

    def _remember(self, step: int, values: dict[str, float]) -> None:
        """An applied step's values enter the medians, and the medians the references."""
        self._rows.append((step, values))
        old = self._rows.popleft()[1] if len(self._rows) > self.window else {}
        for name, value in old.items():
            if watched(name) and math.isfinite(value):
                del self._sorted[name][bisect_left(self._sorted[name], value)]
        for name, value in values.items():
            if not watched(name) or not math.isfinite(value):
                continue
            window = self._sorted.setdefault(name, [])
            insort(window, value)
            if name.startswith(NORM) or name == LATENT:
                reference = self._references.setdefault(name, Reference(0, math.inf, deque(maxlen=REFERENCE_WINDOWS)))
                median = median_of(window) if 2 * len(window) >= self.window else math.inf
                reference.see(median, self.window, forever=name == LATENT)

    def _restore(self, rows: list, entries: list) -> None:
        self._rows = deque(rows[-self.window :])
        self.history = deque(entries, maxlen=self.history.maxlen)
        names = {name for _, values in self._rows for name in values if watched(name)}
        self._sorted = {name: finite(self._rows, name) for name in names}

    def _departures(self, names: list[str]) -> list[Departure]:
        """Values of the history that are not finite, or outside the usual range of the applied steps before it."""
        recent = sum(step >= self.history[0][0] for step, _ in self._rows) if self.history else 0
        # In a run's first steps there is nothing before the history: its own first half must do.
        before = [*self._rows][: max(len(self._rows) - recent, len(self._rows) // 2)]
        since = before[-1][0] if before else -1
        found = []
        for name in names:
            low, usual, high = usual_range(name, finite(before, name))
            for step, values in self.history:
                value = values.get(name, usual)
                judged = step > since or not math.isfinite(value)
                if name in values and judged and not low <= value <= high:  # NaN is within nothing
                    found.append(Departure(name, self._module(name), step, value, usual))
        return found

    def _module(self, metric: str) -> str:
        if metric.startswith(NORM):
            return metric.removeprefix(NORM)
        if metric == ADVERSARY:  # a copy: of whose loss?
            for _, values in self.history:
                for name, value in values.items():
                    if name != metric and name.endswith("/loss") and value == values.get(metric):
                        return name.removesuffix("/loss")
        return metric.split("/")[0]
