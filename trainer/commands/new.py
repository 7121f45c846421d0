"""python -m trainer new: a plugin to begin with, its test, and a run with it."""

from __future__ import annotations

import argparse
import importlib.util
import keyword
import re
import shlex
import sys
from pathlib import Path

from components import registry
from components.registry import PluginError

SUMMARY = "write a working skeleton of a plugin, its test, and a config that trains with it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=sorted(registry.KINDS), help="what it is to be")
    parser.add_argument("name", help="under which configs name it: lower case, digits and underscores")
    parser.add_argument("--folder", default=".", metavar="DIR", help="of yours, made if missing (default: this one)")


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise PluginError(f"unexpected argument '{rest[0]}'; see python -m trainer new --help")
    from trainer.plugin_kit.skeletons import files

    kind, name, folder = arguments.kind, arguments.name, Path(arguments.folder).expanduser()
    texts = files(kind, name)
    if there := [str(folder / file) for file in texts if (folder / file).exists()]:
        raise PluginError(f"{', '.join(there)}: already there; nothing was written. Take another name or --folder")
    check_name(kind, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise PluginError(f"--folder: '{folder}' cannot be written to ({error})") from error
    plugin, test, toml = (shlex.quote(str(folder / file)) for file in texts)
    print(
        f"Wrote the {kind} {name}:\n  {plugin}\n  {test}\n  {toml}\n"
        "It works as it is; replace its inside, and keep these green:\n"
        f"  python -m trainer conform {plugin}:{name}\n"
        f"  python -m pytest {test}\n"
        f"  python -m trainer train {toml}\n"
        "docs/writing-a-plugin.md says what each kind must provide."
    )
    return 0


def check_name(kind: str, name: str) -> None:
    """Raises :class:`PluginError` for a name that could not be a module, a TOML key and a plugin."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise PluginError(
            f"'{name}' cannot be the name of a plugin: expected a lower-case letter, then lower-case letters, digits "
            "and underscores, and no word of Python's, as my_encoder"
        )
    registry.discover("plugins")
    if name in registry.KINDS[kind].names():
        where = registry.KINDS[kind].get(name).where
        raise PluginError(f"the name '{name}' is taken by the {kind} of {where}; take another")
    if name in sys.stdlib_module_names or importlib.util.find_spec(name) is not None:
        raise PluginError(f"'{name}' is a Python module, which {name}.py would hide; take another name, as my_{name}")
