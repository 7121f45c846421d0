"""docs/plugins.md, out of the registry."""

from __future__ import annotations

import os
from pathlib import Path

from components import registry
from components.registry import Option, Plugin

COMMAND = "python -m trainer plugins --docs --out docs/plugins.md"
ROOT = Path(__file__).resolve().parents[2]
INTRODUCTION = f"""\
# Plugins

<!-- Made by `{COMMAND}`: change the docstrings, then run it again. -->

What a config can name, with every option. `python -m trainer plugins KIND NAME` says more about one of them.
[Writing a plugin](writing-a-plugin.md) is another page.

## Completion and checks in an editor

```bash
python -m trainer plugins --schema --out schema.json
```

writes a JSON Schema of the whole TOML file, every plugin's options included. Editors that know it (Even Better TOML for
VS Code, and everything else that runs taplo) complete keys, show what they mean, and underline what is misspelt, in
each file whose first line names it, relative to that file:

```toml
#:schema ./schema.json
```

Plugins of your own are in it with `--plugins my_encoder.py`, and those of installed packages always. Make it again when
plugins change."""
TABLES = {
    "recipe": "`[recipe]`, one per run.",
    "tokenizer": "`[tokenizer]`, one per run.",
    "denoiser": "`[denoiser]`, one per run.",
    "encoder": "`[encoders.LABEL]`, any number; `name` is the label, if it is missing.",
    "loss": "`[losses.LABEL]`, any number; `name` is the label, if it is missing.",
    "dataset": "`[dataset]`, one per run.",
}


def plugins_page() -> str:
    """Every registered plugin: name, summary, place, and its options with type, default and meaning."""
    parts = [INTRODUCTION]
    for kind, plugins in registry.KINDS.items():
        title = f"{kind.capitalize()}s" if kind != "loss" else "Losses"
        parts.append(f"## {title}\n\n{TABLES[kind]}")
        parts += [_section(plugin) for plugin in plugins]
    return "\n\n".join(parts) + "\n"


def _section(plugin: Plugin) -> str:
    # Without its line, which every edit of the file would move.
    place = os.path.relpath(plugin.file, ROOT)
    shown = f"`{plugin.file}`" if place.startswith("..") else f"[{place}](../{place})"
    lines = [f"### {plugin.kind} `{plugin.name}`", "", _cell(plugin.summary), "", shown]
    if plugin.options:
        lines += ["", "| option | type | default | |", "| --- | --- | --- | --- |"]
        lines += [_row(option) for option in plugin.options.values()]
    return "\n".join(lines)


def _row(option: Option) -> str:
    default = "required" if option.required else f"`{_toml(option.default)}`" if option.default is not None else ""
    cells = (f"`{option.name}`", f"`{option.type_name}`", default, option.doc)
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _toml(value: object) -> str:
    """A default as a config would write it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
