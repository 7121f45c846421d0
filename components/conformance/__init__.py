"""Checks that a plugin keeps the contract of its kind: what `python -m trainer conform` and plugins.conformance run.

A check is a function of a :class:`~components.conformance.subject.Subject` that raises :class:`Fault`, whose message
says what is wrong and what to do. The first line of its docstring is the promise. Weights stay random: no check reads a
file or a network.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from components.conformance.subject import Fault, Subject, resolve

Check = Callable[[Subject], None]

__all__ = ["Check", "Fault", "Result", "Subject", "check", "checks", "examine", "resolve"]


class Result(NamedTuple):
    """How one check ended: its name, its promise, the fault ("" if there is none), and how long it took."""

    name: str
    promise: str
    fault: str
    seconds: float


def checks(subject: Subject) -> dict[str, Check]:
    """The checks of a plugin by name, cheap ones first. It is made once, to see what it is."""
    from components.conformance import dataset, denoiser, encoder, loss, options, recipe, tokenizer

    kinds = {
        "encoder": encoder.checks,
        "tokenizer": tokenizer.checks,
        "denoiser": denoiser.checks,
        "loss": loss.checks,
        "dataset": dataset.checks,
        "recipe": recipe.checks,
    }
    return {f.__name__: f for f in (*options.CHECKS, *kinds[subject.plugin.kind](subject))}


def check(subject: Subject, function: Check) -> None:
    """Runs one check; whatever a plugin raises in it becomes a :class:`Fault` that says where."""
    try:
        function(subject)
    except Fault:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == subject.plugin.file]
        place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        first = str(error).strip().split("\n", 1)[0]
        raise Fault(f"raises {type(error).__name__}: {first}{place}") from error


def examine(subject: Subject, leave_out: Collection[str] = ()) -> Iterator[Result]:
    """Runs every check, one after the other; one that cannot even be made is not examined further.

    Args:
        leave_out: names of checks.
    """
    from components.conformance import options

    for function in options.CHECKS:
        yield (result := _timed(subject, function))
        if result.fault:
            return
    found: dict[str, Check] = {}

    def can_be_made(subject: Subject) -> None:
        """It can be made with its options."""
        found.update(checks(subject))

    yield _timed(subject, can_be_made)
    for name, function in found.items():
        if name not in leave_out and function not in options.CHECKS:
            yield _timed(subject, function)


def _timed(subject: Subject, function: Check) -> Result:
    begin, fault = time.perf_counter(), ""
    try:
        check(subject, function)
    except Fault as error:
        fault = str(error)
    promise = (function.__doc__ or "").split("\n", 1)[0].rstrip(".")
    return Result(function.__name__, promise, fault, time.perf_counter() - begin)
