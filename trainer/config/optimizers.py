"""Checks the table [optimizer], its sub-tables of parameter groups, and the optimizers that they name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from components import registry
from components.registry import PluginError, nearest
from trainer.config.problems import problems_of
from trainer.config.schema import Config, OptimizerTable

COMMON = OptimizerTable.model_fields


def optimizer_problems(config: Config) -> list[str]:
    """One line per mistake that the types of :class:`OptimizerTable` do not show."""
    o = config.optimizer
    tables = {name: table for name, table in (o.model_extra or {}).items() if isinstance(table, dict)}
    every: set[str] = set()
    if registry.recipes.has(config.recipe.name):
        every |= registry.recipes.get(config.recipe.name).cls.trains.keys()
    if not tables.keys() <= every:  # listing the other recipes imports all of them
        every |= {name for recipe in registry.recipes for name in recipe.cls.trains}
    problems = _of_options("optimizer", o.name, o.options, {}, every) + _of_schedule("optimizer", dict(o))
    for name, table in tables.items():
        place = f"optimizer.{name}"
        if name not in every:
            problems.append(f"{place}: no recipe has a parameter group '{name}'{nearest(name, every)}")
            continue
        common = {key: value for key, value in table.items() if key in COMMON}
        try:
            OptimizerTable.model_validate(common)
        except ValidationError as error:
            problems += problems_of(error, OptimizerTable, place)
            continue
        own = {key: value for key, value in table.items() if key not in COMMON}
        if "name" in common or registry.optimizers.has(o.name):  # an unknown name is reported once
            problems += _of_options(place, common.get("name", o.name), own, o.options)
        problems += _of_schedule(place, dict(o) | common) if "schedule" in common or "points" in common else []
    return problems


def _of_options(
    place: str, name: str, own: dict[str, Any], inherited: dict[str, Any], groups: Iterable[str] = ()
) -> list[str]:
    """Problems of an optimizer's name and options.

    Args:
        own: options in the table itself.
        inherited: those of [optimizer]; an optimizer that lacks one ignores it.
        groups: names of parameter groups, which are valid keys, too.
    """
    try:
        plugin = registry.optimizers.get(name)
    except PluginError as error:
        return [f"{place}.name = {name!r}: {error}"]
    known = plugin.options
    valid = [*COMMON, *known, *groups]
    problems = [f"{place}.{key}: unknown key{nearest(key, valid)}" for key in own if key not in known]
    schema = plugin.schema()
    try:
        schema.model_validate({key: value for key, value in (inherited | own).items() if key in known})
    except ValidationError as error:
        problems += problems_of(error, schema, place)
    return problems


def _of_schedule(place: str, settings: dict[str, Any]) -> list[str]:
    if settings["schedule"] == "piecewise" and not settings["points"]:
        return [f"{place}.points: missing; schedule = 'piecewise' needs pairs such as [[10000, 1.0], [20000, 0.1]]"]
    return []
