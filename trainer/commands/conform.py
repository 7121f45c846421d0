"""python -m trainer conform: check a plugin against the contract of its kind."""

from __future__ import annotations

import argparse
import textwrap

SUMMARY = "check a plugin against the contract of its kind"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "plugin", metavar="MODULE:NAME", help='"my_lab.encoders:my_encoder", or "path/to/file.py:my_encoder"'
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="plugin option; may be repeated"
    )
    parser.add_argument("--parts", metavar="TOML", help="for a recipe: TOML file with the tables of the parts it needs")
    parser.epilog = (
        "Weights are random and no weight file is read. Choose options that make the model small.\n"
        "In your own test suite: pytest -p trainer.plugin_kit.conformance.pytest_options\n"
        "  --pyargs trainer.plugin_kit.conformance --plugin MODULE:NAME [--option KEY=VALUE]"
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    from components.registry import PluginError
    from trainer.plugin_kit.conformance import examine, resolve

    if rest:
        raise PluginError(f"unexpected argument '{rest[0]}'; see python -m trainer conform --help")
    case = resolve("plugins", arguments.plugin, arguments.option, arguments.parts)
    print(f"{case.plugin.kind} {case.plugin.name} ({case.plugin.where})")
    failed = count = 0
    for result in examine(case):
        count += 1
        failed += bool(result.failure)
        print(f"  {'FAIL' if result.failure else 'ok  '}  {result.requirement}")
        if result.failure:
            print(textwrap.indent(textwrap.fill(result.failure, 110), " " * 8))
    print(f"{count} checks, {failed} failed" if failed else f"{count} checks, all passed")
    return 1 if failed else 0
