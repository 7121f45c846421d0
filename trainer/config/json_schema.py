"""JSON Schema of a config file for editors, with the options of every registered plugin.

Draft 7, restricted to keywords that older validators support (``enum`` and ``anyOf`` instead of ``const`` and ``if``).
TOML extensions use it for completion and validation in files with a line ``#:schema ./schema.json``.
"""

from __future__ import annotations

from typing import Any

from components import registry
from components.registry import Plugin
from trainer.config.schema import Config, OptimizerTable

DRAFT = "http://json-schema.org/draft-07/schema#"
REFERENCE = "#/definitions/{model}"
ONE_TABLE = ("recipe", "tokenizer", "denoiser", "dataset")
LABELED = {"encoders": "encoder", "losses": "loss"}


def json_schema() -> dict[str, Any]:
    """Build the schema from the plugins registered so far."""
    schema = {"$schema": DRAFT, "title": "titanrepa run"}
    schema |= Config.model_json_schema(ref_template=REFERENCE)
    definitions = schema["definitions"] = schema.pop("$defs")
    tables = schema["properties"]
    for kind, plugins in registry.KINDS.items():
        for plugin in plugins:
            definitions[f"{kind}.{plugin.name}"] = _table(plugin, definitions)
    for kind in ONE_TABLE:
        tables[kind] = {"description": f"Name of the {kind} and its options.", "anyOf": _named(kind)}
    for place, kind in LABELED.items():
        for plugin in registry.KINDS[kind]:  # with the plugin's name as the label
            own = definitions[f"{kind}.{plugin.name}"]
            unnamed = own | {"required": [key for key in own["required"] if key != "name"]}
            definitions[f"{place}.{plugin.name}"] = unnamed
        tables[place] = {
            "type": "object",
            "description": f"Tables [{place}.LABEL]: name of a {kind} (default: LABEL) and its options.",
            "properties": {
                plugin.name: {
                    "description": plugin.summary,
                    "anyOf": [{"$ref": f"#/definitions/{place}.{plugin.name}"}, *_named(kind, besides=plugin.name)],
                }
                for plugin in registry.KINDS[kind]
            },
            "additionalProperties": {"anyOf": _named(kind)},
        }
    tables["optimizer"] = {"description": definitions["Optimizer"]["description"], "anyOf": _optimizers(definitions)}
    del definitions["PluginTable"], definitions["EncoderTable"], definitions["Optimizer"]
    return _plain(schema)


def _table(plugin: Plugin, definitions: dict[str, Any]) -> dict[str, Any]:
    """Schema of one plugin's table, in which ``name`` is required."""
    table = plugin.schema().model_json_schema(ref_template=REFERENCE)
    definitions |= table.pop("$defs", {})
    name = {"enum": [plugin.name], "description": plugin.summary}
    # The trainer itself reads ``weight`` from every encoder's table.
    common = dict(definitions["EncoderTable"]["properties"]) if plugin.kind == "encoder" else {}
    return {
        "title": f"{plugin.kind} {plugin.name}",
        "description": plugin.summary,
        "type": "object",
        "properties": {**common, "name": name, **table.get("properties", {})},
        "required": ["name", *table.get("required", [])],
        "additionalProperties": False,
    }


def _optimizers(definitions: dict[str, Any]) -> list[dict[str, Any]]:
    """Schemas of [optimizer], one per optimizer, each with the sub-tables of parameter groups."""
    common = OptimizerTable.model_json_schema(ref_template=REFERENCE)["properties"]
    default = OptimizerTable.model_fields["name"].default
    groups = sorted({name for recipe in registry.recipes for name in recipe.cls.trains})
    found = []
    for plugin in registry.optimizers:
        own = definitions[f"optimizer.{plugin.name}"]
        keys = {**common, **own["properties"]}
        # In a group's table, name and options may be those of [optimizer].
        definitions[f"optimizer_group.{plugin.name}"] = own | {"properties": keys, "required": []}
        of_groups = [{"$ref": f"#/definitions/optimizer_group.{name}"} for name in registry.optimizers.names()]
        tables = {name: {"description": f"Settings of the group '{name}'.", "anyOf": of_groups} for name in groups}
        required = [key for key in own["required"] if key != "name" or plugin.name != default]
        found.append(own | {"properties": keys | tables, "required": required})
    return found


def _named(kind: str, besides: str = "") -> list[dict[str, Any]]:
    return [{"$ref": f"#/definitions/{kind}.{name}"} for name in registry.KINDS[kind].names() if name != besides]


def _plain(node: Any) -> Any:
    """Drop nulls, which TOML lacks, pydantic's titles of keys, and line breaks in descriptions."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {key: _plain(value) for key, value in node.items()}
    if isinstance(found.get("description"), str):
        found["description"] = " ".join(found["description"].split())
    if "default" in found and found["default"] is None:
        del found["default"]
    if isinstance(found.get("anyOf"), list):
        found["anyOf"] = [option for option in found["anyOf"] if option != {"type": "null"}]
        if len(found["anyOf"]) == 1:
            found = {**found.pop("anyOf")[0], **found}
    if isinstance(found.get("properties"), dict):
        for value in found["properties"].values():
            if isinstance(value, dict) and isinstance(value.get("title"), str):
                del value["title"]
    return found
