"""Checks of options and docstrings, for plugins of any kind."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema

from trainer.plugin_kit.conformance.case import Case, Check, Failure, bind

GIVEN = {"encoder": ("resolution", "grid"), "denoiser": ("latent", "num_classes"), "dataset": ("resolution",)}


class Unaccepted:
    """A type that no option accepts."""


def checks(case: Case) -> list[Check]:
    return bind(case, case, takes_the_arguments_of_its_kind, is_documented, refuses_bad_options)


def takes_the_arguments_of_its_kind(case: Case) -> None:
    """The constructor takes the arguments of its kind, followed by keyword-only options."""
    kind, cls = case.plugin.kind, case.plugin.cls
    given = GIVEN.get(kind, ())
    own = [] if cls.__init__ is object.__init__ else list(inspect.signature(cls.__init__).parameters.values())[1:]
    found = [p.name for p in own if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    if len(found) != len(given):
        raise Failure(
            f"the trainer constructs this {kind} with ({', '.join(given)}), but __init__ takes ({', '.join(found)}) as "
            "positional parameters; put every option after a bare *"
        )


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
        schema.model_validate(case.options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise Failure(f"does not accept the options it is checked with: {first['loc'][0]}: {first['msg']}") from error
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

    if accepts("no_such_option_", 1):
        raise Failure("an unknown key is accepted; put every option after a bare *, without **kwargs")
    for name, option in case.plugin.options.items():
        if accepts(name, Unaccepted()):
            raise Failure(f"option {name} accepts values of any type; annotate it, as in {name}: int = 3")
        if not option.required and not accepts(name, option.default):
            raise Failure(f"option {name}: its default {option.default!r} is not of its type {option.type_name}")
