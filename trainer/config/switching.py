"""Another plugin chosen on the command line, as ``--dataset.name=image_folder``, in a table with another's options."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from typing import Any

from pydantic import ValidationError

from components import registry
from trainer.config.schema import OptimizerTable, PluginTable

logger = logging.getLogger("titanrepa")


def drop_old_options(
    tables: Sequence[tuple[str, str, PluginTable | OptimizerTable]], before: dict[str, Any], given: Collection[str]
) -> None:
    """Drop the options of a plugin that an override replaced, unless the new one has them, and log which.

    Args:
        tables: (dotted key, kind, table) of the config's plugins; options are removed in place.
        before: the config before overrides.
        given: dotted keys of the overrides; options that they set stay, so that mistakes in them are reported.
    """
    for place, kind, table in tables:
        if f"{place}.name" not in given:
            continue
        old: Any = before
        for part in place.split("."):
            old = old.get(part, {}) if isinstance(old, dict) else {}
        label = place.rpartition(".")[2] if "." in place else None
        default = label or type(table).model_fields["name"].get_default()
        name = old.get("name", default) if isinstance(old, dict) and (old or not label) else table.name
        if name == table.name or not registry.KINDS[kind].has(table.name):
            continue
        schema = registry.KINDS[kind].get(table.name).schema()
        left = [key for key in table.options if f"{place}.{key}" not in given]
        dropped = [key for key in left if not _fits(schema, key, table.options[key])]
        for key in dropped:
            del table.model_extra[key]
        kept = [key for key in left if key not in dropped]
        if dropped and not int(os.environ.get("RANK", "0")):
            logger.warning(
                f"{place}.name = '{table.name}' replaces '{name}': dropped its {', '.join(dropped)}"
                + (f"; kept {', '.join(kept)}" if kept else "")
            )


def _fits(schema: Any, key: str, value: Any) -> bool:
    """Whether a plugin has an option ``key`` that takes ``value``."""
    try:
        schema.model_validate({key: value})
    except ValidationError as error:
        return all(e["loc"][:1] != (key,) for e in error.errors(include_url=False))
    return True
