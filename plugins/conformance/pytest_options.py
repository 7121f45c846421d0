"""pytest's options of the kit; pytest reads them only from a module that ``-p`` names."""

from __future__ import annotations

from typing import Any


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("titanrepa", "conformance of a plugin")
    group.addoption("--plugin", metavar="MODULE:NAME", help="plugin to examine: my_lab.encoders:my_encoder")
    group.addoption("--option", action="append", default=[], metavar="KEY=VALUE", help="of the plugin")
    group.addoption("--parts", metavar="TOML", help="for a recipe: a file with the tables of its other parts")
