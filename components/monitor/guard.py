"""Detects failing runs from their metrics: skipped steps, spikes, vanishing gradients, collapsing latents.

Pure arithmetic on host values that are identical on all ranks, so all ranks reach the same decision. The guard only
reports; it never acts.
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
    Anomaly,
    Incident,
    Reference,
    finite,
    last_incident,
    median_of,
    pack,
    rank,
    usual_range,
    watched,
)

MAD_TO_DEVIATION = 1.4826  # median absolute deviation -> standard deviation of a normal distribution
CHANCE = 1.0  # hinge loss of a discriminator that cannot tell real from fake


class Alarm(NamedTuple):
    """An alarm raised by one of the guard's checks.

    Attributes:
        name: check that raised it: "skipped", "spike", "collapse", "latent_variance" or "discriminator".
        metric: metric that triggered it, such as "grad_norm/denoiser".
        step: step at which it was raised.
        onset: first bad step; checkpoints taken after ``onset`` or fewer steps are good.
        message: one sentence: the value, when it went bad, and what it was compared with.
    """

    name: str
    metric: str
    step: int
    onset: int
    message: str


class Guard:
    """Checks after each step whether a run is failing.

    Metrics are identified by name: ``<group>/loss``, ``<group>/<term>``, ``grad_norm/<group>``, ``latent/variance``,
    and ``adversary/loss``, a copy of the discriminator's loss in the steps that train it. Any of them may be missing,
    NaN or infinite in a step. Skipped steps count for ``skipped`` only and pause the other checks.

    Each incident raises one alarm. The same check on the same metric can raise another one after ``window // 10`` (at
    least 1) consecutive normal steps, or after ``window`` steps if the incident lasts.

    Args:
        window: number of applied steps in the running medians. Over 200 steps the median of a heavy-tailed norm is
            accurate to a few percent, and a new level becomes the median after 100.
        spike: alarm if a ``<group>/loss`` or ``grad_norm/*`` exceeds median + spike * scale, once half a window has
            been seen; scale = max(abs(median), 1.4826 * median absolute deviation), so that losses may cross zero. 10:
            norms of failing runs reach hundreds of times their median. Log-normal norms with sigma = 0.5 exceed it once
            in a million steps, with sigma = 0.6 once in 30k; raise it if there are false alarms. The discriminator's
            loss must also exceed its median by 1, the hinge loss at chance: recovering from near 0 is normal. Spikes
            are added to the window; otherwise a permanent new level would count as a spike forever.
        skipped: alarm after this many consecutive skipped steps. 10: a single bad batch skips one.
        collapse: alarm if a ``grad_norm/*`` is below this fraction of its reference for ``patience`` consecutive
            applied steps, unless the group's loss is exactly 0; also if a ``<group>/loss`` that was not 0 is exactly 0
            for ``patience`` consecutive applied steps. The reference is the highest level that the running
            median sustained for a full window within the last 50 windows; values of the first window, when norms are
            large, are excluded. 1e-3: norms of healthy runs shrink tenfold. Losses are exempt: a loss near 0 is normal.
        latent_variance: alarm if ``latent/variance`` is below this fraction of its reference for ``patience // 10``
            (at least 1) consecutive steps; the reference is the largest running median since the first full window.
            0.05: in naive end-to-end training it falls to 0.001 of the reference (arXiv 2504.10483).
        discriminator: alarm if ``adversary/loss`` is below this for ``patience`` consecutive steps, in units of the
            loss. 0.01: one percent of the hinge loss at chance; the tokenizer then learns nothing from it.
        patience: number of consecutive applied steps that make a collapse. 100: no batch effect lasts that long.
        history: number of steps whose values are kept for reports.

    A threshold of 0 disables its check.

    Attributes:
        history: (step, values) of the most recent steps, including skipped ones.

    Raises:
        ValueError: an argument is out of range.
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
                raise ValueError(f"guard: {name} = {value!r}; expected an integer number of steps, at least {least}")
        if not isinstance(skipped, int) or skipped < 0:
            raise ValueError(f"guard: skipped = {skipped!r}; expected a number of steps, or 0 (disabled)")
        for name, value, end in (
            ("spike", spike, math.inf),
            ("collapse", collapse, 1.0),
            ("latent_variance", latent_variance, 1.0),
            ("discriminator", discriminator, math.inf),
        ):
            if not 0 <= value < end:
                raise ValueError(f"guard: {name} = {value!r}; expected 0 (disabled) or a number below {end:g}")
        self.window, self.spike, self.skipped, self.patience = window, spike, skipped, patience
        self.collapse, self.latent_variance, self.discriminator = collapse, latent_variance, discriminator
        self.history: deque[tuple[int, dict[str, float]]] = deque(maxlen=history)
        self._rows: deque[tuple[int, dict[str, float]]] = deque()  # applied steps only
        self._sorted: dict[str, list[float]] = {}  # finite values in `_rows` of each watched metric
        self._references: dict[str, Reference] = {}
        self._incidents: dict[tuple[str, str], Incident] = {}

    def observe(self, step: int, values: Mapping[str, float], applied: bool) -> list[Alarm]:
        """Check one step and return the alarms that it raises.

        Args:
            step: counted from 0; must increase from call to call.
            values: metrics of the step by name; identical on all ranks.
            applied: False if the step was skipped because a loss or a gradient norm was not finite.
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
        """Discard ``step``, all later steps and all open incidents, as after a rollback.

        References are kept: they cover far more steps than a rollback discards.
        """
        rows = [row for row in self._rows if row[0] < step]
        kept = [entry for entry in self.history if entry[0] < step]
        self._restore(rows, kept)
        self._incidents.clear()

    def state_dict(self) -> dict[str, Any]:
        """JSON-compatible state with which a resumed run raises the same alarms."""
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
                for key, e in self._incidents.items()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state; if ``window`` or ``history`` is now smaller, the newest steps are kept."""
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
        self._incidents = {
            (watch, key): Incident(*rest, float(value), float(usual))
            for watch, key, *rest, value, usual in state["episodes"]
        }

    def lasting(self) -> list[str]:
        """Names of the alarms whose incident has not ended."""
        return sorted({watch for (watch, _), e in self._incidents.items() if e.raised is not None and e.count})

    def first_anomaly(self) -> Anomaly | None:
        """First metric to become abnormal in the current incident, or None.

        The current incident is the latest series of anomalies without a gap of more than 10 normal steps. It starts
        earlier if an open alarm, or a check that is still counting, did. Non-finite values take precedence over
        values that are only unusual, unless a check has flagged them. Within a step, loss terms come before the loss,
        and the loss before the gradient norm; ties keep the order of the metrics.
        """
        names = list(dict.fromkeys(name for _, values in self.history for name in values))
        groups = {name[: -len("/loss")] for name in names if name.endswith("/loss")}
        names = [
            n for n in names if n != ADVERSARY and (n.startswith(NORM) or n == LATENT or n.split("/")[0] in groups)
        ]
        latest = last_incident(self._anomalies(names))
        found = [a for a in latest if not math.isfinite(a.value)] or latest
        found += [
            Anomaly(e.metric, self._module(e.metric), e.onset, e.value, e.usual) for e in self._incidents.values()
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
        incident = self._see("skipped", "", step, not applied, self.skipped, metric, value, usual)
        if incident is not None:
            message = (
                f"{incident.count} consecutive steps were skipped because a loss or a gradient norm was not finite; "
                f"it began at step {incident.onset} with {incident.metric} = {incident.value:.4g} (usually "
                f"{incident.usual:.4g})"
            )
            yield Alarm("skipped", incident.metric, step, incident.onset, message)

    def _watch(self, step: int, name: str, value: float, values: dict[str, float]) -> Iterator[Alarm]:
        """Run the checks on a finite value of an applied step, before it is added to the medians."""
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
            # A loss of exactly 0, as of a satisfied hinge, has no gradient: that is not a collapse of the norm. If it
            # stays 0, the loss itself raises the alarm.
            idle = values.get(f"{name.removeprefix(NORM)}/loss") == 0
            if self.collapse and name.endswith("/loss"):
                yield from self._watch_zero(step, name, value)
            if name.startswith(NORM):
                least = 0.0 if idle else self.collapse * usual
                yield from self._watch_low("collapse", step, name, value, least, self.patience, usual)

    def _watch_spike(self, step: int, name: str, value: float, adversary: bool) -> Iterator[Alarm]:
        """Compare a loss or norm with its median, and the discriminator's loss also with chance."""
        window = self._sorted.get(name, [])
        median, scale = median_of(window), 0.0
        above = value - median
        bad = 2 * len(window) >= self.window and above > self.spike * abs(median) and (above > CHANCE or not adversary)
        if bad:  # rare, so the sort for the second measure of scale is affordable only here
            scale = max(abs(median), MAD_TO_DEVIATION * median_of(sorted(abs(x - median) for x in window)))
            # scale = 0: the loss was 0 until now, as before a scheduled loss starts.
            bad = scale > 0 and above > self.spike * scale
        incident = self._see("spike", name, step, bad, 1, name, value, median)
        if incident is not None:
            since = f" since step {incident.onset}" if incident.onset < step else ""
            message = (
                f"{name} is {value:.4g} at step {step}{since}, which exceeds its median of {median:.4g} over the last "
                f"{len(window)} steps by {above / scale:.3g} times its scale of {scale:.4g} (threshold: {self.spike:g})"
            )
            yield Alarm("spike", name, step, incident.onset, message)

    def _watch_zero(self, step: int, name: str, value: float) -> Iterator[Alarm]:
        """Check for a loss that has become exactly 0 and stays so: nothing trains its group any more."""
        window = self._sorted.get(name, [])
        bad = value == 0
        if bad and ("collapse", name) not in self._incidents:
            # Before a scheduled loss starts, all values are 0, and that is no change. The discriminator's loss has a
            # check of its own.
            rows = [values for _, values in self.history if ADVERSARY in values] if self.discriminator else []
            adversary = bool(rows) and all(values.get(name) == values[ADVERSARY] for values in rows)
            bad = not adversary and bool(window) and (window[0] != 0 or window[-1] != 0)
        incident = self._see("collapse", name, step, bad, self.patience, name, value, median_of(window))
        if incident is not None:
            message = (
                f"{name} has been exactly 0 for {incident.count} consecutive steps, since step {incident.onset}: "
                f"{incident.usual:.4g} was usual"
            )
            yield Alarm("collapse", name, step, incident.onset, message)

    def _watch_low(
        self, watch: str, step: int, name: str, value: float, least: float, patience: int, usual: float
    ) -> Iterator[Alarm]:
        """Check for values that stay below ``least``; a ``least`` of 0 disables the check."""
        incident = self._see(watch, name, step, least > 0 and value < least, patience, name, value, usual)
        if incident is not None:
            message = (
                f"{name} has been below {least:.3g} for {incident.count} consecutive steps, since step "
                f"{incident.onset}: it is {value:.4g} now, {incident.usual:.4g} was usual"
            )
            yield Alarm(watch, name, step, incident.onset, message)

    def _see(
        self, watch: str, key: str, step: int, bad: bool, patience: int, metric: str, value: float, usual: float
    ) -> Incident | None:
        """Count a check's bad and normal steps; return its incident if this step raises the alarm."""
        incident = self._incidents.get((watch, key))
        if not bad:
            if incident is not None:
                incident.count, incident.calm = 0, incident.calm + 1
                if incident.raised is None or incident.calm >= self.window // 10:
                    del self._incidents[watch, key]
            return None
        if incident is None:
            incident = self._incidents[watch, key] = Incident(metric, step, 0, 0, None, value, usual)
        incident.count, incident.calm = incident.count + 1, 0
        if incident.count < patience or (incident.raised is not None and step - incident.raised < self.window):
            return None
        incident.raised = step
        return incident

    def _remember(self, step: int, values: dict[str, float]) -> None:
        """Add an applied step's values to the medians, and the medians to the references."""
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

    def _anomalies(self, names: list[str]) -> list[Anomaly]:
        """Anomalies in the history: values that are not finite or outside the range of the preceding applied steps."""
        recent = sum(step >= self.history[0][0] for step, _ in self._rows) if self.history else 0
        # At the start of a run nothing precedes the history: compare with its own first half.
        before = [*self._rows][: max(len(self._rows) - recent, len(self._rows) // 2)]
        since = before[-1][0] if before else -1
        found = []
        for name in names:
            low, usual, high = usual_range(name, finite(before, name))
            for step, values in self.history:
                value = values.get(name, usual)
                judged = step > since or not math.isfinite(value)
                if name in values and judged and not low <= value <= high:  # True for NaN
                    found.append(Anomaly(name, self._module(name), step, value, usual))
        return found

    def _module(self, metric: str) -> str:
        if metric.startswith(NORM):
            return metric.removeprefix(NORM)
        if metric == ADVERSARY:  # a copy of some group's loss: find which
            for _, values in self.history:
                for name, value in values.items():
                    if name != metric and name.endswith("/loss") and value == values.get(metric):
                        return name.removesuffix("/loss")
        return metric.split("/")[0]
