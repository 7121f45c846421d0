"""Config of a run: parses TOML and overrides into typed, validated tables."""

from trainer.config.help import describe
from trainer.config.load import (
    ConfigError,
    assign,
    changes,
    check_table,
    flatten,
    load,
    loads,
    named_files,
    parse_overrides,
    validate,
    weights_key,
)
from trainer.config.schema import Config, PluginTable

__all__ = [
    "Config",
    "ConfigError",
    "PluginTable",
    "assign",
    "changes",
    "check_table",
    "describe",
    "flatten",
    "load",
    "loads",
    "named_files",
    "parse_overrides",
    "validate",
    "weights_key",
]
