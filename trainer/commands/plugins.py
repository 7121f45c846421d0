"""python -m trainer plugins: what can be named in a config."""

from __future__ import annotations

import argparse
import inspect
import os

from components import registry
from components.registry import Plugin

SUMMARY = "list plugins; with a kind and a name, one plugin's options"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", choices=list(registry.KINDS), help="only plugins of this kind")
    parser.add_argument("name", nargs="?", help="one plugin: its description, options, types and defaults")
    parser.add_argument(
        "--plugins",
        action="append",
        default=[],
        metavar="MODULE_OR_FILE",
        help="also import this module or .py file (what a config names in plugins = [...]); may be repeated",
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise registry.PluginError(f"unexpected argument '{rest[0]}'; see python -m trainer plugins --help")
    registry.discover("plugins", arguments.plugins)
    if arguments.name:
        print(describe(registry.KINDS[arguments.kind].get(arguments.name)))
        return 0
    for kind in [arguments.kind] if arguments.kind else registry.KINDS:
        print(f"{kind}:")
        width = max((len(name) for name in registry.KINDS[kind].names()), default=0)
        for plugin in registry.KINDS[kind]:
            print(f"  {plugin.name:<{width}}  {plugin.summary}")
            options = ", ".join(plugin.options)
            print(f"  {'':<{width}}  {f'options: {options}; ' if options else ''}{_place(plugin)}")
    if registry.failures:
        print("could not be imported:")
        for failure in registry.failures:
            print(f"  {failure.where}: {failure.error}")
    return 0


def describe(plugin: Plugin) -> str:
    """A plugin's docstring, options with types and defaults, and where it is defined."""
    doc = inspect.cleandoc(plugin.cls.__doc__ or "").split("\nArgs:")[0].split("\nRaises:")[0].strip()
    lines = [f"{plugin.kind} {plugin.name}  ({_place(plugin)})", "", doc, ""]
    lines += ["Options:"] if plugin.options else ["No options."]
    for option in plugin.options.values():
        default = "required" if option.required else f"default {option.default!r}"
        lines.append(f"  {option.name}: {option.type_name}, {default}")
        lines.append(f"      {option.doc}")
    return "\n".join(lines)


def _place(plugin: Plugin) -> str:
    relative = os.path.relpath(plugin.file)
    return f"{plugin.file if relative.startswith('..') else relative}:{plugin.line}"
