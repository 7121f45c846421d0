"""Parse TOML and command-line overrides into a typed, validated :class:`Config`, without building anything."""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from components import registry
from trainer.config import trust
from trainer.config.optimizers import optimizer_problems
from trainer.config.problems import problems_of
from trainer.config.schema import Config, PluginTable
from trainer.config.switching import drop_old_options
from trainer.startup import without_garbage_collection

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(Exception):
    """Invalid configuration; the message names the key, its value and what is allowed."""


def load(path: str, overrides: list[str] = (), *, named: bool = True) -> Config:
    """Read a TOML file, apply overrides, import the plugins it names, and validate the result.

    Args:
        path: TOML file. Files it names are searched for in the current folder, then in the folder of the TOML file.
        overrides: ``--section.key=value`` or ``--section.key``, ``value``; a value that is not TOML is a plain string.
        named: whether the user named this file, so that its plugins may run unless it belongs to a run or model
            folder; see :mod:`trainer.config.trust`.

    Raises:
        ConfigError: the file cannot be read or is invalid; names each key, its value, what is allowed, and the
            nearest valid name. Or its plugins may not run.
    """
    data = read_toml(path)
    if isinstance(data.get("run", {}), dict):
        run = data.setdefault("run", {})
        run["dir"] = run.get("dir") or f"outputs/{Path(path).stem}"
    return override(data, path, overrides, own=named and not _of_a_folder(Path(path)))


def loads(text: str, source: str, overrides: list[str] = ()) -> Config:
    """Like :func:`load`, for the text of a config that a run wrote; its plugins run only if the user trusts them.

    Args:
        text: TOML.
        source: path it was read from, for messages and for resolving the files it names.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}") from error
    return override(data, source, overrides, own=False)


def override(data: dict[str, Any], source: str, overrides: list[str], own: bool) -> Config:
    """Apply overrides and validate. ``own``: the config is the user's, not that of a run or model folder."""
    before, given = copy.deepcopy(data), parse_overrides(overrides)
    run = data.get("run")
    folder = run.get("dir") if isinstance(run, dict) else None
    for key, value in given:
        assign(data, key, value)
    if folder and isinstance(data["run"], dict) and not data["run"].get("dir"):
        data["run"]["dir"] = folder  # --run.dir= asks for the default
    keys = {key for key, _ in given}
    return validate(data, source, before, keys, own=own)


def read_toml(path: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        there = _configs(file.parent) or _configs(Path("train_configs"))
        listed = "".join(f"\n  {p}" for p in there)
        raise ConfigError(
            f"config file '{path}' does not exist" + (f"; available:{listed}" if listed else "; expected a .toml file")
        )
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _configs(folder: Path) -> list[Path]:
    """The TOML files of a folder that are configs of runs, unlike pyproject.toml."""
    return [p for p in sorted(folder.glob("*.toml")) if p.is_file() and b"[recipe]" in p.read_bytes()]


def _of_a_folder(path: Path) -> bool:
    """Whether a TOML file is the config of a run or model folder, which may come from someone else."""
    beside = ("checkpoints", "manifest.json", "*.safetensors")
    return path.name == "config.toml" and any(any(path.parent.glob(pattern)) for pattern in beside)


@without_garbage_collection()  # it imports PyTorch and plugins
def validate(
    data: dict[str, Any],
    source: str,
    before: dict[str, Any] | None = None,
    given: Collection[str] = (),
    *,
    own: bool = True,
) -> Config:
    """Validate parsed TOML against the tables of :class:`Config` and the signature of every plugin it names.

    Args:
        data: parsed TOML, after overrides.
        source: path it was read from.
        before: the same before overrides.
        given: dotted keys of the overrides.
        own: whether its plugins and commands may run without further consent, as those among the overrides may.
    """
    data = dict(data)
    if problems := [f"{source}: {key} = {x}: expected a finite number" for key, x in _not_finite(data)]:
        raise ConfigError("\n".join(problems))
    for kind in ("encoders", "losses"):  # a missing name defaults to the label
        tables = data.get(kind, {})
        if isinstance(tables, dict):
            data[kind] = {k: {"name": k, **t} if isinstance(t, dict) else t for k, t in tables.items()}
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {p}" for p in problems_of(error, Config))) from None
    folder = Path(source).parent
    config.plugins = [_find(p, folder) if p.endswith(".py") else p for p in config.plugins]
    config.latent_norm.statistics = _find(config.latent_norm.statistics, folder)
    config.latent_cache.path = _find(config.latent_cache.path, folder)
    config.evaluation.reference = _find(config.evaluation.reference, folder)
    config.evaluation.inception_weights = _find(config.evaluation.inception_weights, folder)
    if not own and "plugins" not in given and (foreign := trust.refused(config.plugins)):
        raise ConfigError(
            f"{source}: names {foreign} as a plugin, which would run its code; if you trust it, add {trust.OPTION}"
        )
    try:
        registry.discover("plugins", config.plugins, lazy=True)
    except registry.PluginError as error:
        raise ConfigError(f"{source}: {error}") from error
    commands = dict(_commands(config))
    if not own:
        for key in commands.keys() - set(given):
            if foreign := trust.refused_command(commands[key]):
                raise ConfigError(f"{source}: {key} runs the command '{foreign}'; if you trust it, add {trust.OPTION}")
    trust.remember(config.plugins, [command for found in commands.values() for command in found])
    drop_old_options([*plugin_tables(config), ("optimizer", "optimizer", config.optimizer)], before or {}, given)
    problems = [p for place, kind, table in plugin_tables(config) for p in _check_plugin(place, kind, table, folder)]
    if (heldout := config.evaluation.heldout) and not problems:
        table = PluginTable(name=config.dataset.name, **(config.dataset.options | heldout))
        problems += _check_plugin("evaluation.heldout", "dataset", table, folder)
        config.evaluation.heldout = {key: table.options[key] for key in heldout}
    problems += optimizer_problems(config)
    if not config.training.compile:
        problems += [
            f"activation_checkpoint.{name} = {form!r}: budgets are handled by the compiler; set training.compile = true"
            for name, form in config.activation_checkpoint
            if form.startswith("budget")
        ]
    if problems:
        raise ConfigError("\n".join(f"{source}: {p}" for p in problems))
    return config


def check_table(model: type[BaseModel], values: dict[str, Any], prefix: str) -> Any:
    """Validate values from outside the config file as one of its tables; ConfigError prefixes keys by ``prefix``."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(prefix + p.replace("_", "-") for p in problems_of(error, model))) from None


def _not_finite(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Dotted key and value of every infinity and NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in inner:
        yield from _not_finite(each, f"{key}.{name}" if key else str(name))


def _commands(config: Config) -> Iterator[tuple[str, list[str]]]:
    """Dotted key and shell commands of every option of a plugin that has some, as datasets run them."""
    from components.data.remote import commands

    tables = [(place, table.options) for place, _, table in plugin_tables(config)]
    for place, options in [*tables, ("evaluation.heldout", config.evaluation.heldout or {})]:
        for key, value in options.items():
            if found := [command for text in _texts(value) for command in commands(text)]:
                yield f"{place}.{key}", found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inner:
        yield from _texts(each)


def _find(name: str, folder: Path) -> str:
    """Resolve ``name`` to a file in ``folder`` if it exists there and not relative to the current folder."""
    beside = folder / name
    return str(beside) if name and not os.path.exists(name) and os.path.exists(beside) else name


def flatten(toml: str) -> dict[str, Any]:
    """Values of a TOML text by dotted key."""

    def walk(table: dict[str, Any], prefix: str) -> dict[str, Any]:
        found = {}
        for key, value in table.items():
            found |= walk(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return found

    return walk(tomllib.loads(toml), "")


def changes(old: str, new: str) -> list[str]:
    """Differences between two resolved configs, as "training.steps: 3 -> 6"."""
    before, after = flatten(old), flatten(new)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key, 'unset')} -> {after.get(key, 'unset')}" for key in keys]


def plugin_tables(config: Config) -> list[tuple[str, str, PluginTable]]:
    """All tables that name a plugin, as (dotted key, kind, table)."""
    found = [("recipe", "recipe", config.recipe), ("tokenizer", "tokenizer", config.tokenizer)]
    if config.denoiser is not None:
        found.append(("denoiser", "denoiser", config.denoiser))
    found += [(f"encoders.{label}", "encoder", table) for label, table in config.encoders.items()]
    found += [(f"losses.{label}", "loss", table) for label, table in config.losses.items()]
    return [*found, ("dataset", "dataset", config.dataset)]


def named_files(kind: str, table: PluginTable) -> list[str]:
    """Files that a plugin's table names, in the order of the plugin's options."""
    return [table.options[key] for key in registry.KINDS[kind].get(table.name).files if table.options.get(key)]


def weights_key(config: Config) -> str:
    """Key of the tokenizer's weights: its first option of type ``File``; "tokenizer.name" if it has none."""
    return f"tokenizer.{next(iter(registry.tokenizers.get(config.tokenizer.name).files), 'name')}"


def parse_overrides(arguments: list[str]) -> list[tuple[str, Any]]:
    """Parse ``--a.b=1`` or ``--a.b 1`` to ("a.b", 1), and ``--a.b`` to ("a.b", True)."""
    found: list[tuple[str, Any]] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"'{word}' is not an override; expected --section.key=value, e.g. --training.steps=100")
        key, equals, text = word[2:].partition("=")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        found.append((key, _value(text)))
    return found


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare string: --dataset.path=data/train


def assign(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, creating missing tables; ConfigError if a parent key is not a table."""
    *path, last = key.split(".")
    for part in path:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--{key}: '{part}' is a value, not a table")
    data[last] = value


def _check_plugin(place: str, kind: str, table: PluginTable, folder: Path) -> list[str]:
    """Resolve the files that a plugin's table names, and return the table's problems."""
    try:
        plugin = registry.KINDS[kind].get(table.name)
    except registry.PluginError as error:
        return [f"{place}.name = {table.name!r}: {error}"]
    for key in plugin.files:
        if isinstance(table.options.get(key), str):
            table.model_extra[key] = _find(table.options[key], folder)
    schema = plugin.schema()
    try:
        schema.model_validate(table.options)
    except ValidationError as error:
        return problems_of(error, schema, place)
    return []
