"""Conformance checks of plugins, run by ``python -m trainer conform`` and as pytest tests.

    pytest -p trainer.plugin_kit.conformance.pytest_options --pyargs trainer.plugin_kit.conformance --plugin MODULE:NAME

A check raises :class:`Failure` with a message that says what is wrong and how to fix it. Weights stay random: no check
reads weights files or accesses the network.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator
from typing import NamedTuple

from trainer.plugin_kit.conformance import contract
from trainer.plugin_kit.conformance.case import Case, Check, Failure, bind, resolve

__all__ = ["Case", "Check", "Failure", "Result", "checks", "examine", "resolve"]

OF_THE_CLASS = (contract.is_documented, contract.refuses_bad_options, contract.overrides_every_method)


class Result(NamedTuple):
    """Result of one check: name, requirement, and failure message ("" if passed)."""

    name: str
    requirement: str
    failure: str


def checks(case: Case) -> dict[str, Check]:
    """Return the checks of a plugin by name, cheap ones first. Constructs the plugin once, to inspect it."""
    return {check.name: check for check in (*bind(case, case, *OF_THE_CLASS), *_checks_of_kind(case))}


def examine(case: Case, leave_out: Collection[str] = ()) -> Iterator[Result]:
    """Run all checks in order; stop early if those of the class fail or the plugin cannot be constructed.

    Args:
        case: plugin to check.
        leave_out: names of checks to skip.
    """
    rest: list[Check] = []

    def can_be_constructed(case: Case) -> None:
        """The plugin can be constructed with its options."""
        rest.extend(_checks_of_kind(case))

    for check in bind(case, case, *OF_THE_CLASS, can_be_constructed):
        yield (result := _run(check))
        if result.failure:
            return
    for check in rest:
        if check.name not in leave_out:
            yield _run(check)


def _checks_of_kind(case: Case) -> list[Check]:
    return importlib.import_module(f"{__name__}.{case.plugin.kind}").checks(case)


def _run(check: Check) -> Result:
    try:
        check.run()
    except Failure as error:
        return Result(check.name, check.requirement, str(error))
    return Result(check.name, check.requirement, "")
