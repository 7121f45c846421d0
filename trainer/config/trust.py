"""Which plugins and commands may run: those that the user named, not those that merely a run or model folder names.

A plugin is Python code. Reading a run or model folder must not run code, for folders are passed around. The plugins
that its config names run only if

- the command has ``--trust-plugins``, or names them itself (``--plugins='["my_encoder.py"]'``);
- an installed package registers the module as an entry point;
- the user has run this file before, at this path and with this content, in a config of his own or with
  ``--trust-plugins``. These are remembered in the user's own state folder, never in the run: what a folder says of
  itself proves nothing.

The same holds for commands (``pipe:``) whose output a dataset reads; they are remembered by their text.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

from components.registry import ENTRY_POINT_GROUP

OPTION = "--trust-plugins"
HELP = "run the plugins and pipe: commands that the config of a run or model folder names (docs/models.md)"
_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


@contextlib.contextmanager
def trusting(plugins: bool) -> Iterator[None]:
    """Context manager in which every plugin may run if ``plugins``, as ``--trust-plugins`` says."""
    token = _trusted.set(plugins)
    try:
        yield
    finally:
        _trusted.reset(token)


def refused(plugins: Sequence[str]) -> str | None:
    """The first of these plugins (modules or files) that a folder's config may not run, or None; runs none of them."""
    if _trusted.get():
        return None
    entries = [e.value.partition(":")[0] for e in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)]
    for name in plugins:
        if name.endswith(".py"):
            if (mark := _mark(name)) is None or not mark.is_file():
                return f"the file {Path(name).expanduser().absolute()}"
        elif not any(name == entry or name.startswith(f"{entry}.") for entry in entries):
            return f"the module '{name}'"
    return None


def refused_command(commands: Sequence[str]) -> str | None:
    """The first of these commands that a folder's config may not run, or None."""
    if _trusted.get():
        return None
    for command in commands:
        if (mark := _command_mark(command)) is None or not mark.is_file():
            return command
    return None


def remember(plugins: Sequence[str], commands: Sequence[str] = ()) -> None:
    """Note that the user runs these plugin files and commands, if there is a writable state folder."""
    notes = [(_mark(name), str(Path(name).expanduser().resolve())) for name in plugins if name.endswith(".py")]
    for mark, note in [*notes, *((_command_mark(command), command) for command in commands)]:
        if mark is not None:
            with contextlib.suppress(OSError):
                mark.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                mark.write_text(f"{note}\n", encoding="utf-8", errors="replace")


def state_folder() -> Path:
    """Where trusted files and commands are remembered; deleting it forgets them all."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "titanrepa" / "trusted_plugins"


def _command_mark(command: str) -> Path | None:
    """File that stands for this command; None if there is no home folder."""
    try:
        return state_folder() / hashlib.sha256(b"command\0" + command.encode(errors="surrogateescape")).hexdigest()
    except RuntimeError:
        return None


def _mark(name: str) -> Path | None:
    """File that stands for this plugin file, by its path and content; None if it cannot be read."""
    path = Path(name).expanduser().resolve()
    try:
        content = path.read_bytes()
        return state_folder() / hashlib.sha256(os.fsencode(path) + b"\0" + content).hexdigest()
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return None
