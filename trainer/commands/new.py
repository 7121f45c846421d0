"""python -m trainer new: write a working plugin to start from, its tests, and a config that trains with it."""

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

SUMMARY = "write a working plugin to start from, its tests, and a config that trains with it"
KINDS = (  # one module each in trainer/plugin_kit/templates
    "encoder",
    "tokenizer",
    "denoiser",
    "reconstruction_loss",
    "adversarial_loss",
    "alignment_loss",
    "dataset",
    "recipe",
    "optimizer",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("name", help="name in configs: lower-case letters, digits and underscores")
    parser.add_argument(
        "--folder", default=".", metavar="DIR", help="output folder, created if missing (default: current folder)"
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise PluginError(f"unexpected argument '{rest[0]}'; see python -m trainer new --help")
    from trainer.plugin_kit.templates import render

    kind, name, folder = arguments.kind, arguments.name, Path(arguments.folder).expanduser()
    texts = render(kind, name)
    if there := [str(folder / file) for file in texts if (folder / file).exists()]:
        raise PluginError(f"{', '.join(there)}: exists already; nothing was written. Choose another name or --folder")
    check_name(kind.rpartition("_")[2], name)  # all kinds of losses share one registry
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise PluginError(f"--folder: '{folder}' cannot be written to ({error})") from error
    plugin, tests, toml = (shlex.quote(str(folder / file)) for file in texts)
    print(
        f"Wrote the {kind.replace('_', ' ')} {name}:\n  {plugin}\n  {tests}\n  {toml}\n"
        "It works as it is. Replace its body with your own, and keep these passing:\n"
        f"  python -m trainer conform {plugin}:{name}\n"
        f"  python -m pytest {tests}\n"
        f"  python -m trainer train {toml}\n"
        "docs/writing-a-plugin.md describes what each kind must provide."
    )
    return 0


def check_name(kind: str, name: str) -> None:
    """Raise :class:`PluginError` if ``name`` is unusable or taken as a module, a TOML key or a plugin of ``kind``."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise PluginError(
            f"'{name}' is not a valid plugin name: expected a lower-case letter, then lower-case letters, digits and "
            "underscores, and no Python keyword, e.g. my_encoder"
        )
    registry.discover("plugins")
    if name in registry.KINDS[kind].names():
        where = registry.KINDS[kind].get(name).where
        raise PluginError(f"the name '{name}' is taken by the {kind} in {where}; choose another")
    if name in sys.stdlib_module_names or importlib.util.find_spec(name) is not None:
        raise PluginError(
            f"'{name}' is a Python module, which {name}.py would shadow; choose another name, e.g. my_{name}"
        )
