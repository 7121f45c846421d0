"""Plugin under test: lookup from the command line, and construction."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from components import registry
from components.registry import Plugin, PluginError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Fault(AssertionError):
    """A plugin violates the contract of its kind; the message says how, and how to fix it."""


@dataclass(frozen=True)
class Subject:
    """A plugin with the options to check it with.

    Attributes:
        plugin: registered plugin.
        options: options as in its TOML table; small networks make the checks fast.
        parts: for a recipe: tables of the run's other parts (tokenizer, denoiser, encoders, losses); toy parts replace
            missing ones.
    """

    plugin: Plugin
    options: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)

    def make(self, *given: Any, seed: int = 0) -> Any:
        """Construct an instance with random weights from ``seed``; restores torch's global generator afterwards."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.plugin.cls(*given, **self.options)


def resolve(package: str, spec: str, options: Sequence[str] = (), parts: str | None = None) -> Subject:
    """Find the plugin named by ``spec``.

    Args:
        package: package of plugins; all of its modules are imported as well.
        spec: "MODULE:NAME" or "FILE.py:NAME", where NAME is the registered name or the class name; ":NAME" may be
            omitted if the module registers a single plugin.
        options: "key=value" strings; a value that is not valid TOML is taken as a string.
        parts: for a recipe: TOML file with the tables of a run.

    Raises:
        PluginError: the module or plugin does not exist, or the plugin does not accept the options.
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
    subject = Subject(found[0], _options(options), _parts(parts))
    try:
        found[0].schema().model_validate(subject.options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise PluginError(
            f"{found[0].kind} {found[0].name}: option {key}: {first['msg']}; set it with --option {key}=VALUE"
            f"{nearest(key, found[0].options)}"
        ) from error
    return subject


def _options(words: Sequence[str]) -> dict[str, Any]:
    found = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise PluginError(f"'{word}' is not an option; expected key=value, as in --option width=64")
        try:
            found[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[key] = text
    return found


def _parts(file: str | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        return tomllib.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PluginError(f"--parts: '{file}' cannot be read as TOML ({error})") from error
