"""What holds for a plugin of any kind: its options and what it says about itself."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema

from components.conformance.subject import Fault, Subject

HANDED_IN = {"encoder": ("resolution", "grid"), "denoiser": ("latent", "num_classes"), "dataset": ("resolution",)}


class Nothing:
    """A value of a type that no option has."""


def is_made_as_its_kind(subject: Subject) -> None:
    """It is made with what its kind is handed; the rest are keyword-only options."""
    plugin = subject.plugin
    given = HANDED_IN.get(plugin.kind, ())
    if plugin.cls.__init__ is object.__init__:
        parameters = []
    else:
        parameters = list(inspect.signature(plugin.cls.__init__).parameters.values())[1:]
    places = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    if len(places) != len(given):
        raise Fault(
            f"a {plugin.kind} is made with ({', '.join(given)}), but __init__ takes ({', '.join(places)}) before the "
            "options; name every option after a bare *"
        )


def says_what_it_is(subject: Subject) -> None:
    """Its docstring begins with one line, and explains every option under Args."""
    plugin = subject.plugin
    if not plugin.summary:
        raise Fault(f"class {plugin.cls.__name__} has no docstring; its first line is what listings show")
    silent = [option.name for option in plugin.options.values() if not option.doc]
    if silent:
        raise Fault(f"the docstring's Args section has no line for: {', '.join(silent)}")


def refuses_bad_options(subject: Subject) -> None:
    """Unknown keys and wrong types are refused; defaults are of the types that they say."""
    plugin = subject.plugin
    schema = plugin.schema()
    try:
        schema.model_validate(subject.options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise Fault(f"is examined with options that it does not take: {first['loc'][0]}: {first['msg']}") from error
    try:
        schema.model_json_schema()
    except PydanticInvalidForJsonSchema as error:
        raise Fault(f"an option has a type that TOML cannot write ({error}); use plain types and Literal") from error
    if _accepts(schema, subject.options | {"no_such_option_": 1}):
        raise Fault("an unknown key is accepted; name every option after a bare *, without **kwargs")
    for option in plugin.options.values():
        if _accepts(schema, subject.options | {option.name: Nothing()}):
            raise Fault(f"option {option.name} takes a value of any type; annotate it, as {option.name}: int = 3")
        if not option.required and not _accepts(schema, subject.options | {option.name: option.default}):
            raise Fault(f"option {option.name}: its default {option.default!r} is not of its type {option.type_name}")


def _accepts(schema: Any, options: dict[str, Any]) -> bool:
    try:
        schema.model_validate(options)
    except ValidationError:
        return False
    return True


CHECKS = (is_made_as_its_kind, says_what_it_is, refuses_bad_options)
