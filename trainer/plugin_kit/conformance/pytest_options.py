"""pytest options of the conformance checks; pytest only reads them from a module named with ``-p``."""

from __future__ import annotations

from typing import Any


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("titanrepa", "conformance of a plugin")
    group.addoption("--plugin", metavar="MODULE:NAME", help="plugin to check, such as my_lab.encoders:my_encoder")
    group.addoption("--option", action="append", default=[], metavar="KEY=VALUE", help="option of the plugin")
    group.addoption("--parts", metavar="TOML", help="for a recipe: file with the tables of the other parts")
