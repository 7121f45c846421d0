"""What follows a step: log, save, draw, evaluate. A signal or an error ends the last two, but not the run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from components.distributed.parallel import gather_floats
from components.distributed.ranks import Ranks
from trainer.config import Config
from trainer.run.report import Reporter
from trainer.run.troubles import Troubles, reason


class Stopped(Exception):
    """A signal ended pictures or an evaluation; raised on every rank."""


def stop_requested(here: bool) -> bool:
    """Whether a signal has arrived on some rank. Collective."""
    return any(flag for (flag,) in gather_floats(float(here)))


def due_after(config: Config, step: int) -> set[str]:
    """What the config schedules after ``step`` finished steps: "log", "save", "draw", "evaluate"."""
    c, last = config, step == config.training.steps
    cadences = {"save": c.run.checkpoint_every, "draw": c.sampling.every, "evaluate": c.evaluation.every}
    due = {name for name, every in cadences.items() if every and step % every == 0}
    if last:
        due |= {"save", "draw"} | ({"evaluate"} if c.evaluation.every else set())
    if last or step == 1 or step % c.run.log_every == 0:
        due.add("log")
    return due


def follow_up(t: Any, due: set[str], reporter: Reporter, waited_s: float) -> None:
    """Do what is due after a step. Collective.

    Args:
        t: the run, a :class:`trainer.run.loop.Trainer`.
        due: see :func:`due_after`.
        reporter: of the run.
        waited_s: total seconds that this rank has waited for data so far.

    Raises:
        CheckpointError: the last checkpoint of this start cannot be written.
    """
    outside, ends = reporter.stopwatch.outside, t.stopping or t.step == t.config.training.steps
    if "log" in due:
        values = t.metrics.read()
        values["data/unreadable"] = float(t.unreadable.count)
        values["data/epoch"] = t.consumed / len(t.parts.dataset)
        reporter.report(t.step, values, waited_s)

    def save(ends: bool) -> None:
        with outside("saving"):
            (t.checkpoints.save if ends else t.checkpoints.try_to_save)(t.step)

    def look(kind: str, action: Callable[[], None]) -> None:
        warning = only_warning_everywhere(kind, t.troubles)
        with outside(kind), t.train_step.evaluating(), contextlib.suppress(Stopped), warning:
            action()

    # Save first: drawing needs memory, and a failure there must not lose the step.
    if "save" in due:
        save(ends)
    if "draw" in due:
        look("pictures", lambda: reporter.draw(t.step, t.parts, t.ema, t.check_stop))
    if "evaluate" in due and not t.stopping:
        look("evaluation", lambda: reporter.evaluated(t.step, *t.evaluation(t.parts, t.ema, t.check_stop)))
    if t.stopping and t.checkpoints.saved != t.step:  # a signal arrived during the pictures or the evaluation
        save(True)


@contextlib.contextmanager
def only_warning_everywhere(kind: str, troubles: Troubles) -> Iterator[None]:
    """Like ``troubles.only_warning`` for collective work: a failure on any rank counts on every rank. Collective.

    A rank that fails where others go on to a collective still ends the run, by that collective's timeout.
    """
    failure = None
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        failure = reason(error)
    found = next((text for text in Ranks(None).gather(failure) if text is not None), None)
    if found is not None:
        troubles.failed(kind, found)
