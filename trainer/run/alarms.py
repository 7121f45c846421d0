"""Handling of alarms: a diagnosis file, a log line, a TensorBoard mark, and the configured policy."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from components.contracts import Recipe
from components.data.loader import GlobalOrder
from components.distributed.parallel import World
from components.distributed.ranks import Ranks
from components.files.atomic import atomic_write
from components.monitor.guard import ADVERSARY, NORM, Alarm, Guard
from components.monitor.metrics import StepRecord, broken_here
from trainer.config import Config
from trainer.run.troubles import Troubles

logger = logging.getLogger("titanrepa")


class GuardStop(Exception):
    """The guard stopped the run; the message is its report."""


class Watch:
    """Passes every step to the guard and applies the configured policy when it raises an alarm.

    Args:
        config: of the run.
        world: this process; rank 0 writes files and logs.
        recipe: of the run; its ``trains`` identifies the discriminator's group.
        troubles: counts alarms and failed writes.

    Attributes:
        guard: detects anomalies.
        rollbacks: number of rollbacks of this run, across restarts.
        mark: callback that displays an alarm; takes its name and the number of finished steps.
    """

    def __init__(self, config: Config, world: World, recipe: Recipe, troubles: Troubles | None = None) -> None:
        self.table, self.world, self.folder = config.guard, world, Path(config.run.dir)
        self.batch_size = config.training.batch_size
        self.guard = Guard(**config.guard.model_dump(exclude={"policy", "max_rollbacks"}))
        self.rollbacks = 0
        self.troubles = troubles or Troubles()
        self.mark: Callable[[str, int], None] = lambda name, step: None
        self._adversary = next((g for g, members in recipe.trains.items() if "discriminator" in members), None)
        self._path: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"guard": self.guard.state_dict(), "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.guard.load_state_dict(state["guard"])
        self.rollbacks = state["rollbacks"]

    def forget(self, step: int) -> None:
        """Discard what was observed of ``step`` and later steps."""
        self.guard.forget(step)

    def observe(self, record: StepRecord, values: dict[str, float], order: GlobalOrder, consumed: int) -> Alarm | None:
        """Check one step; the result is the same on every rank.

        Args:
            record: of the step.
            values: read from ``record``, the same on every rank.
            order: of the data.
            consumed: samples consumed by the end of the step.

        Returns:
            An alarm that requires a rollback, or None.

        Raises:
            GuardStop: by policy, or because ``guard.max_rollbacks`` is reached.
        """
        seen = dict(values)
        if f"grad_norm/{self._adversary}" in values:  # trained in this step
            seen[ADVERSARY] = values[f"{self._adversary}/loss"]
        for alarm in self.guard.observe(record.step, seen, applied=values["skipped_steps"] == 0):
            self._write_down(alarm, record, values, samples_of(order, consumed, self.batch_size))
            if self.table.policy == "stop":
                self.stop(alarm, "guard.policy = 'stop'")
            if self.table.policy == "rollback" and self.rollbacks >= self.table.max_rollbacks:
                self.stop(alarm, f"guard.max_rollbacks = {self.table.max_rollbacks} is reached")
            if self.table.policy == "rollback":
                return alarm
        return None

    def stop(self, alarm: Alarm, reason: str) -> NoReturn:
        """Raise :class:`GuardStop` with the closing report."""
        raise GuardStop(closing_report(alarm, self.guard, reason, self._path))

    def _write_down(self, alarm: Alarm, record: StepRecord, values: dict[str, float], samples: list) -> None:
        found = diagnosis(alarm, record, values, self.guard, samples)
        broken = dict(enumerate(Ranks(None).gather(broken_here(record))))
        found["not_finite_on_ranks"] = {str(rank): names for rank, names in broken.items() if names}
        self._path = path_of(self.folder, found)
        self.troubles.raised(alarm.name)
        self.mark(alarm.name, alarm.step + 1)
        where = ""
        if found["not_finite_on_ranks"] and self.world.size > 1:
            where = f"; not finite on ranks {', '.join(found['not_finite_on_ranks'])} of {self.world.size}"
        if self.world.is_main:
            with self.troubles.only_warning("alarms/"):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(self._path, fsync=False) as partial:
                    partial.write_text(json.dumps(found, indent=1))
            logger.warning(f"ALARM {alarm.name} at step {alarm.step}: {alarm.message}{where} (details: {self._path})")


def diagnosis(alarm: Alarm, record: StepRecord, values: dict[str, float], guard: Guard, samples: list) -> dict:
    """Everything known about an alarm, as a JSON-serializable dict.

    Args:
        record: of the step that raised the alarm.
        values: measured in that step.
        samples: (epoch, index into the dataset) of each image of that step, over all ranks.
    """
    layers = {name: dict(zip(names, norms.tolist())) for name, (names, norms) in record.layers.items()}
    totals = {name: math.sqrt(sum(n * n for n in norms.values())) for name, norms in layers.items()}
    first = guard.first_anomaly()
    suspects = [alarm.metric.removeprefix(NORM).split("/")[0], first.module if first is not None else ""]
    # In a skipped step many values are non-finite; the first module to become abnormal is more informative.
    suspects = suspects[::-1] if values["skipped_steps"] else suspects
    # The tokenizer determines the latent variance.
    suspects = ["tokenizer" if suspect == "latent" else suspect for suspect in suspects]
    worst = next((module for module in suspects if module in layers), _largest(totals))
    return _plain(
        {
            "alarm": alarm._asdict(),
            "step": record.step,
            "first_anomaly": first._asdict() if first is not None else None,
            "values": values,
            "gradient_norms": totals,
            "worst_module": worst,
            "layers_of_worst_module": dict(sorted(layers.get(worst, {}).items(), key=lambda item: -_rank(item[1]))),
            "samples_epoch_and_index": samples,
            "last_steps": [{"step": step, **seen} for step, seen in guard.history],
        }
    )


def path_of(folder: Path, found: dict[str, Any]) -> Path:
    """Path of a diagnosis file in a run folder."""
    return folder / "alarms" / f"step_{found['step']:08d}_{found['alarm']['name']}.json"


def closing_report(alarm: Alarm, guard: Guard, reason: str, path: Path | None) -> str:
    """Report on a stopped run: the alarm, the first metric to become abnormal, and the last steps."""
    first = guard.first_anomaly()
    lines = [f"the guard stopped the run at step {alarm.step}: {alarm.message} ({reason})"]
    if first is not None:
        lines.append(
            f"first abnormal metric: {first.metric} at step {first.step}: {first.value:.4g}, usually about "
            f"{first.usual:.4g}"
        )
    lines.append("the last steps:")
    watched = sorted({name for _, seen in list(guard.history)[-5:] for name in seen if _shown(name)})
    lines += [
        f"  {step:>8}  " + "  ".join(f"{name} {seen[name]:.4g}" for name in watched if name in seen)
        for step, seen in list(guard.history)[-5:]
    ]
    return "\n".join([*lines, f"details: {path}"])


def samples_of(order: GlobalOrder, consumed: int, batch_size: int) -> list[tuple[int, int]]:
    """(epoch, index) of the images in the step after which ``consumed`` samples had been consumed."""
    return [order.at(position) for position in range(consumed - batch_size, consumed)]


def _shown(name: str) -> bool:
    return name.endswith("/loss") or name.startswith("grad_norm/")


def _rank(norm: float) -> float:
    return norm if math.isfinite(norm) else math.inf


def _largest(totals: dict[str, float]) -> str | None:
    return max(totals, key=lambda name: _rank(totals[name]), default=None)


def _plain(value: Any) -> Any:
    """Replace infinities and NaN by text, since JSON cannot represent them."""
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
