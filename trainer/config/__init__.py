"""The config of a run: TOML and overrides to typed, validated tables."""

from trainer.config.load import (
    ConfigError,
    assign,
    changes,
    check_table,
    describe,
    flatten,
    load,
    loads,
    parse_overrides,
    validate,
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
    "parse_overrides",
    "validate",
]
