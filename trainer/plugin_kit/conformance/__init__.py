"""Conformance checks of plugins, run by ``python -m trainer conform`` and as pytest tests.

    pytest -p trainer.plugin_kit.conformance.pytest_options --pyargs trainer.plugin_kit.conformance --plugin MODULE:NAME

A check is a function that takes a :class:`~trainer.plugin_kit.conformance.subject.Subject` and raises :class:`Fault`
with a message that says what is wrong and how to fix it. The first line of its docstring states the requirement.
Weights stay random: no check reads weights files or accesses the network.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from trainer.plugin_kit.conformance.subject import Fault, Subject, resolve

Check = Callable[[Subject], None]

__all__ = ["Check", "Fault", "Result", "Subject", "check", "checks", "examine", "resolve"]


class Result(NamedTuple):
    """Result of one check: name, requirement, failure message ("" if passed) and duration."""

    name: str
    promise: str
    fault: str
    seconds: float


def checks(subject: Subject) -> dict[str, Check]:
    """Return the checks of a plugin by name, cheap ones first. Constructs the plugin once, to inspect it."""
    from trainer.plugin_kit.conformance import dataset, denoiser, encoder, loss, options, recipe, tokenizer

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
    """Run one check; convert any exception of the plugin to a :class:`Fault` that names its file and line."""
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
    """Run all checks in order; stop early if the options are wrong or the plugin cannot be constructed.

    Args:
        subject: plugin to check.
        leave_out: names of checks to skip.
    """
    from trainer.plugin_kit.conformance import options

    for function in options.CHECKS:
        yield (result := _timed(subject, function))
        if result.fault:
            return
    found: dict[str, Check] = {}

    def can_be_made(subject: Subject) -> None:
        """The plugin can be constructed with its options."""
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
