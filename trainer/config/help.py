"""Help text on config keys."""

from __future__ import annotations

import tomli_w

from components.registry import type_name
from trainer.config.problems import table_of
from trainer.config.schema import Config, PluginTable


def describe() -> str:
    """Help text on every config key: its type, default and meaning."""
    lines = []
    for name, field in Config.model_fields.items():
        table = table_of(field.annotation)
        if table is None or table is PluginTable:
            lines.append(f"[{name}]  {_PLUGIN_HELP.get(name, field.description)}")
            continue
        lines.append(f"[{name}]")
        for key, inner in table.model_fields.items():
            default = tomli_w.dumps({"x": inner.default})[4:].strip().replace("\n", "")
            lines.append(f"  {key} = {default}  ({type_name(inner.annotation)})  {' '.join(inner.description.split())}")
    return "\n".join(lines)


_PLUGIN_HELP = {
    "recipe": "name of a recipe and its options: python -m trainer plugins recipe",
    "tokenizer": "name of a tokenizer and its options: python -m trainer plugins tokenizer",
    "denoiser": "name of a denoiser and its options: python -m trainer plugins denoiser",
    "encoders": "[encoders.LABEL] name (default: LABEL), weight (default: 1.0), options: python -m trainer plugins "
    "encoder",
    "losses": "[losses.LABEL] name (default: LABEL) and options: python -m trainer plugins loss",
    "dataset": "name of a dataset and its options: python -m trainer plugins dataset",
}
