"""Plugin under test: lookup from the command line, construction, and the checks bound to it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import nn

from components import registry
from components.contracts import LatentShape
from components.registry import Plugin, PluginError, nearest
from trainer.config.load import parse_overrides, read_toml

CLASSES, SIDE = 10, 32  # number of classes, image side in pixels
GIVEN: dict[str, Any] = {
    "resolution": SIDE,
    "grid": 4,
    "latent": LatentShape(4, 8, 8),
    "num_classes": CLASSES,
    "modules": nn.ModuleDict({"layer": nn.Linear(4, 4)}),
    "lr": 0.01,
}
"""Constructor arguments by name, as in ``given`` of a kind's base class."""


class Failure(AssertionError):
    """A plugin violates the contract of its kind; the message says how, and how to fix it."""


@dataclass(frozen=True)
class Case:
    """A plugin with the options to check it with.

    Attributes:
        plugin: registered plugin.
        options: options as in its TOML table; small networks make the checks fast.
        parts: for a recipe: tables of a run (tokenizer, denoiser, encoders, losses); each replaces that of
            templates/run.toml as a whole.
        given: constructor arguments that replace those in ``GIVEN``.
    """

    plugin: Plugin
    options: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)

    def make(self, seed: int = 0, **given: Any) -> Any:
        """Construct an instance with random weights from ``seed``; restores torch's global generator afterwards.

        Args:
            given: constructor arguments that differ from those of the case.
        """
        values = GIVEN | self.given | given
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.plugin.cls(*(values[name] for name in self.plugin.cls.given), **self.options)


class Check(NamedTuple):
    """One requirement of a plugin; ``function`` raises :class:`Failure` unless ``argument`` meets it."""

    case: Case
    name: str
    function: Callable[[Any], None]
    argument: Any

    @property
    def requirement(self) -> str:
        """First line of the function's docstring."""
        return (self.function.__doc__ or "").split("\n", 1)[0].rstrip(".")

    def run(self) -> None:
        """Run the check; any exception of the plugin becomes a :class:`Failure` that names its file and line."""
        try:
            self.function(self.argument)
        except Failure:
            raise
        except Exception as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == self.case.plugin.file]
            place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
            first = str(error).strip().split("\n", 1)[0]
            raise Failure(f"raises {type(error).__name__}: {first}{place}") from error


def bind(case: Case, argument: Any, *functions: Callable[[Any], None]) -> list[Check]:
    """Return the checks that call ``functions`` with ``argument``: the case itself, or an adapter of it."""
    return [Check(case, function.__name__, function, argument) for function in functions]


def resolve(package: str, spec: str, options: Sequence[str] = (), parts: str | None = None) -> Case:
    """Find the plugin named by ``spec``.

    Args:
        package: package of plugins; all of its modules are imported as well.
        spec: "MODULE:NAME" or "FILE.py:NAME", where NAME is the registered name or the class name; ":NAME" may be
            omitted if the module registers a single plugin.
        options: "key=value" strings; a value that is not valid TOML is taken as a string.
        parts: for a recipe: TOML file with the tables of a run.

    Raises:
        PluginError: the module or plugin does not exist, or the plugin does not accept the options.
        ConfigError: ``parts`` cannot be read.
    """
    module, colon, name = spec.rpartition(":")
    if not colon or name.endswith(".py"):
        module, name = spec, ""
    registry.discover(package, [module])
    file = Path(module).expanduser().resolve()
    every = [plugin for kind in registry.KINDS.values() for plugin in kind]
    here = [p for p in every if p.cls.__module__ == module or (module.endswith(".py") and Path(p.file) == file)]
    found = [p for p in here if not name or name in (p.name, p.cls.__name__)]
    if not found:
        valid = nearest(name, [p.name for p in here]) if here else "; it registers no plugin"
        raise PluginError(f"'{module}' has no plugin '{name}'{valid}" if name else f"'{module}' registers no plugin")
    if len(found) > 1:
        listed = ", ".join(f"{p.name} ({p.kind})" for p in found)
        raise PluginError(f"'{spec}' may be any of {listed}; choose one, as in {module}:{found[0].cls.__name__}")
    if bare := [word for word in options if "=" not in word]:
        raise PluginError(f"'{bare[0]}' is not an option; expected key=value, as in --option width=64")
    values = dict(parse_overrides([f"--{word}" for word in options]))
    case = Case(found[0], values, read_toml(parts) if parts else {})
    try:
        found[0].schema().model_validate(case.options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, options = ".".join(map(str, first["loc"])), found[0].options
        if first["type"] == "missing":
            says = f"requires the option {key} ({options[key].type_name}); add --option {key}=VALUE"
        elif first["type"] == "extra_forbidden":
            says = f"has no option '{key}'{nearest(key, options)}"
        else:
            says = f"option {key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
        raise PluginError(f"{found[0].kind} {found[0].name} {says}") from error
    return case
