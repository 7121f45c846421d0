"""Checks of options and docstrings, for plugins of any kind."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema

from trainer.plugin_kit.conformance.subject import Fault, Subject

HANDED_IN = {"encoder": ("resolution", "grid"), "denoiser": ("latent", "num_classes"), "dataset": ("resolution",)}


class Nothing:
    """A type that no option accepts."""


def is_made_as_its_kind(subject: Subject) -> None:
    """The constructor takes the arguments of its kind, followed by keyword-only options."""
    plugin = subject.plugin
    given = HANDED_IN.get(plugin.kind, ())
    if plugin.cls.__init__ is object.__init__:
        parameters = []
    else:
        parameters = list(inspect.signature(plugin.cls.__init__).parameters.values())[1:]
    places = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    if len(places) != len(given):
        raise Fault(
            f"a {plugin.kind} is constructed with ({', '.join(given)}), but __init__ takes ({', '.join(places)}) as "
            "positional parameters; put every option after a bare *"
        )


def says_what_it_is(subject: Subject) -> None:
    """The docstring has a summary line and documents every option under Args."""
    plugin = subject.plugin
    if not plugin.summary:
        raise Fault(f"class {plugin.cls.__name__} has no docstring; listings show its first line")
    silent = [option.name for option in plugin.options.values() if not option.doc]
    if silent:
        raise Fault(f"the docstring's Args section has no line for: {', '.join(silent)}")


def refuses_bad_options(subject: Subject) -> None:
    """Unknown keys and wrong types are refused; defaults match their annotated types."""
    plugin = subject.plugin
    schema = plugin.schema()
    try:
        schema.model_validate(subject.options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise Fault(f"does not accept the options it is checked with: {first['loc'][0]}: {first['msg']}") from error
    try:
        schema.model_json_schema()
    except PydanticInvalidForJsonSchema as error:
        raise Fault(f"an option has a type that TOML cannot express ({error}); use plain types and Literal") from error
    if _accepts(schema, subject.options | {"no_such_option_": 1}):
        raise Fault("an unknown key is accepted; put every option after a bare *, without **kwargs")
    for option in plugin.options.values():
        if _accepts(schema, subject.options | {option.name: Nothing()}):
            raise Fault(f"option {option.name} accepts values of any type; annotate it, as in {option.name}: int = 3")
        if not option.required and not _accepts(schema, subject.options | {option.name: option.default}):
            raise Fault(f"option {option.name}: its default {option.default!r} is not of its type {option.type_name}")


def _accepts(schema: Any, options: dict[str, Any]) -> bool:
    try:
        schema.model_validate(options)
    except ValidationError:
        return False
    return True


CHECKS = (is_made_as_its_kind, says_what_it_is, refuses_bad_options)
