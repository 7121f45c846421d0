"""Config of a run: parses TOML and overrides into typed, validated tables."""

from trainer.config.load import ConfigError, assign, changes, describe, flatten, load, loads, read_toml, validate
from trainer.config.schema import Config, PluginTable

__all__ = [
    "Config",
    "ConfigError",
    "PluginTable",
    "assign",
    "changes",
    "describe",
    "flatten",
    "load",
    "loads",
    "read_toml",
    "validate",
]
