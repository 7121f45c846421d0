"""One line per mistake in a config, from pydantic's validation errors."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from components import registry
from components.registry import nearest, type_name


def problems_of(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """One line per validation error: the key, its value, what is expected, and the nearest valid name."""
    found: dict[str, str] = {}
    for e in error.errors(include_url=False):
        table, annotation, loc = _locate(model, e["loc"])
        key = ".".join(str(part) for part in (prefix, *loc) if part != "")
        expected = type_name(annotation) if annotation is not None else ""
        if len(loc) < len(e["loc"]) and e["type"].endswith(("_type", "_parsing", "literal_error")):
            line = f"{key} = {e['input']!r}: expected {expected}"
        elif e["type"] == "extra_forbidden":
            line = f"{key}: unknown key{nearest(str(e['loc'][-1]), table.model_fields)}"
        elif e["type"] == "model_type" and len(e["loc"]) == 2 and e["loc"][0] in ("encoders", "losses"):
            kind, label = e["loc"]
            such = e["input"] if label == "name" and isinstance(e["input"], str) else label
            line = (
                f"{key} = {e['input']!r}: expected one table per {'loss' if kind == 'losses' else 'encoder'}; write "
                f"[{kind}.LABEL], such as [{kind}.{such}], and its options below"
            )
        elif e["type"] == "missing":
            line = f"{key}: missing; expected {'a table with a name' if table_of(annotation) else expected}"
        elif e["type"] == "literal_error":
            allowed = [str(a) for a in typing.get_args(_without_none(annotation))]
            line = f"{key} = {e['input']!r}: not allowed{nearest(str(e['input']), allowed)}"
        elif e["type"].endswith("_type"):
            line = f"{key} = {e['input']!r}: expected {expected or e['msg']}"
        elif e["type"] == "value_error":
            line = f"{key} = {e['input']!r}: {e['ctx']['error']}"
        else:
            line = f"{key} = {e['input']!r}: {e['msg'][0].lower()}{e['msg'][1:]}"
        found.setdefault(key, line)
    return list(found.values())


def _locate(model: type[BaseModel], loc: tuple[str | int, ...]) -> tuple[type[BaseModel], Any, tuple[str | int, ...]]:
    """Return the table that holds a key, the key's type (None for an unknown key), and the key's own location.

    For a key with several types, such as ``bool | Literal["auto"]``, pydantic appends one of them to the location.
    """
    table, annotation = model, model
    for depth, part in enumerate(loc):
        annotation = _without_none(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType):
            return table, annotation, loc[:depth]
        if inner := table_of(annotation):
            table = inner
            field = table.model_fields.get(str(part))
            annotation = field.annotation if field else None
            if annotation is str and "file" in field.metadata:
                annotation = registry.File  # pydantic has split it into annotation and metadata
        else:  # a label of a dict, or an index of a list
            args = typing.get_args(annotation)
            annotation = args[-1] if args else None
    return table, annotation, loc


def table_of(annotation: Any) -> type[BaseModel] | None:
    annotation = _without_none(annotation)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _without_none(annotation: Any) -> Any:
    args = [a for a in typing.get_args(annotation) if a is not type(None)]
    is_optional = type(None) in typing.get_args(annotation)
    return args[0] if is_optional and len(args) == 1 else annotation
