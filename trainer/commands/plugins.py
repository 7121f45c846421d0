"""python -m trainer plugins: list the plugins that a config can name, and their options."""

from __future__ import annotations

import argparse
import inspect
import json
import os
from pathlib import Path

from components import registry
from components.plugin_list import Listed, list_plugins
from components.registry import Plugin

SUMMARY = "list plugins, or describe the options of one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", choices=list(registry.KINDS), help="list only this kind")
    parser.add_argument("name", nargs="?", help="describe one plugin: options, types and defaults")
    parser.add_argument(
        "--plugins",
        action="append",
        default=[],
        metavar="MODULE_OR_FILE",
        help="also import this module or .py file, like plugins = [...] in a config; may be repeated",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--schema", action="store_true", help="print a JSON Schema of configs for editors, all plugins included"
    )
    form.add_argument("--docs", action="store_true", help="print a Markdown page of all plugins (docs/plugins.md)")
    parser.add_argument("--out", metavar="FILE", help="write --schema or --docs to this file")


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise registry.PluginError(f"unexpected argument '{rest[0]}'; see python -m trainer plugins --help")
    if arguments.out and not (arguments.schema or arguments.docs):
        raise registry.PluginError("--out FILE requires --schema or --docs")
    if arguments.schema or arguments.docs:
        registry.discover("plugins", arguments.plugins)
        return _write(_page(arguments.schema), arguments)
    if arguments.name:
        registry.discover("plugins", arguments.plugins, lazy=True)
        print(describe(registry.KINDS[arguments.kind].get(arguments.name)))
        return 0
    plugins = list_plugins("plugins", arguments.plugins)
    for kind in [arguments.kind] if arguments.kind else registry.KINDS:
        print(f"{kind}:")
        found = [plugin for plugin in plugins if plugin.kind == kind]
        width = max((len(plugin.name) for plugin in found), default=0)
        for plugin in found:
            print(f"  {plugin.name:<{width}}  {plugin.summary}")
            options = ", ".join(plugin.options)
            print(f"  {'':<{width}}  {f'options: {options}; ' if options else ''}{_place(plugin)}")
    if registry.failures:
        print("could not be imported:")
        for failure in registry.failures:
            print(f"  {failure.where}: {failure.error}")
    return 0


def describe(plugin: Plugin) -> str:
    """Text on one plugin: where it is defined, its docstring, and its options with types and defaults."""
    doc = inspect.cleandoc(plugin.cls.__doc__ or "").split("\nArgs:")[0].split("\nRaises:")[0].strip()
    lines = [f"{plugin.kind} {plugin.name}  ({_place(plugin)})", "", doc, ""]
    lines += ["Options:"] if plugin.options else ["No options."]
    for option in plugin.options.values():
        default = "required" if option.required else f"default {option.default!r}"
        lines.append(f"  {option.name}: {option.type_name}, {default}")
        lines.append(f"      {option.doc}")
    return "\n".join(lines)


def _page(schema: bool) -> str:
    if schema:
        from trainer.config.json_schema import json_schema

        return json.dumps(json_schema(), indent=2) + "\n"
    from trainer.plugin_kit.plugins_page import plugins_page

    return plugins_page()


def _write(text: str, arguments: argparse.Namespace) -> int:
    if not arguments.out:
        print(text, end="")
        return 0
    path = Path(arguments.out).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise registry.PluginError(f"--out: '{path}' cannot be written ({error})") from error
    print(f"Wrote {path}")
    if arguments.schema:
        print(f"To use it in an editor, begin a config in the same folder with this line:\n#:schema ./{path.name}")
    return 0


def _place(plugin: Plugin | Listed) -> str:
    relative = os.path.relpath(plugin.file)
    return f"{plugin.file if relative.startswith('..') else relative}:{plugin.line}"
