"""The project's version, which pyproject.toml states."""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


@functools.cache
def version() -> str:
    """``[project] version`` of the code that runs, as "0.1.0".

    A checkout reads its own pyproject.toml, since the environment may hold an installed copy of another version or
    none at all; an installed package has no pyproject.toml beside it and reads its metadata.
    """
    try:
        project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError):
        project = {}
    return project["version"] if project.get("name") == "titanrepa" else importlib.metadata.version("titanrepa")


def versions() -> str:
    """Versions of the project and of PyTorch, which is not imported: "titanrepa 0.1.0, torch 2.11.0+cu128"."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "is not installed"
    return f"titanrepa {version()}, torch {torch}"
