"""Checks of the class itself, for plugins of any kind: docstring, options, and what its base class leaves to it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema

from trainer.plugin_kit.conformance.case import Case, Failure
from trainer.run.first_use import attribute_fault


class Unaccepted:
    """A type that no option accepts."""


def is_documented(case: Case) -> None:
    """The docstring has a summary line and documents every option under Args."""
    if not case.plugin.summary:
        raise Failure(f"class {case.plugin.cls.__name__} has no docstring; listings show its first line")
    if missing := [option.name for option in case.plugin.options.values() if not option.doc]:
        raise Failure(f"the docstring's Args section has no line for: {', '.join(missing)}")


def refuses_bad_options(case: Case) -> None:
    """Unknown keys and wrong types are refused; defaults match their annotated types."""
    schema = case.plugin.schema()
    try:
        schema.model_json_schema()
    except PydanticInvalidForJsonSchema as error:
        raise Failure(
            f"an option has a type that TOML cannot express ({error}); use plain types and Literal"
        ) from error

    def accepts(name: str, value: Any) -> bool:
        try:
            schema.model_validate(case.options | {name: value})
        except ValidationError:
            return False
        return True

    for name, option in case.plugin.options.items():
        if accepts(name, Unaccepted()):
            raise Failure(f"option {name} accepts values of any type; annotate it, as in {name}: int = 3")
        if not option.required and not accepts(name, option.default):
            raise Failure(f"option {name}: its default {option.default!r} is not of its type {option.type_name}")


def overrides_every_method(case: Case) -> None:
    """The class overrides every abstract method of its base class."""
    cls = case.plugin.cls
    for base in _contracts(cls):
        abstract = [name for name, value in vars(base).items() if _is_abstract(value)]
        if lacking := [name for name in abstract if next(c for c in cls.__mro__ if name in vars(c)) is base]:
            raise Failure(f"does not define {', '.join(lacking)}; see components.contracts.{base.__name__}")


def sets_every_attribute(case: Case) -> None:
    """The plugin sets every attribute that its base class only annotates, and each has the annotated type."""
    if fault := attribute_fault(case.make()):
        raise Failure(fault)


def _is_abstract(value: Any) -> bool:
    return inspect.isfunction(value) and "__isabstractmethod__" in vars(value)


def _contracts(cls: type) -> Iterator[type]:
    return (base for base in cls.__mro__ if base.__module__.startswith("components.contracts."))
