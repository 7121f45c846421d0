"""The config of a run: TOML and overrides to typed, validated tables."""

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
