"""Parse TOML and command-line overrides into a typed, validated :class:`Config`, without building anything."""

from __future__ import annotations

import sys
import typing
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from components import registry
from components.registry import nearest, type_name
from trainer.config.schema import Config, OptimizerTable, PluginTable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(Exception):
    """Invalid configuration; the message names the key, its value and what is allowed."""


def load(path: str, overrides: list[str] = ()) -> Config:
    """Read a TOML file, apply overrides, import the plugins it names, and validate the result.

    Args:
        path: TOML file. Files it names are searched for in the current folder, then in the folder of the TOML file.
        overrides: ``--section.key=value`` or ``--section.key``, ``value``; a value that is not TOML is a plain string.

    Raises:
        ConfigError: the file cannot be read or is invalid; names each key, its value, what is allowed, and the
            nearest valid name.
    """
    data = read_toml(path)
    if isinstance(data.get("run", {}), dict):
        run = data.setdefault("run", {})
        run["dir"] = run.get("dir") or f"outputs/{Path(path).stem}"
    return override(data, path, overrides)


def loads(text: str, source: str, overrides: list[str] = ()) -> Config:
    """Like :func:`load`, for the text of a config that a run wrote.

    Args:
        text: TOML.
        source: path it was read from, for messages and for resolving the files it names.
    """
    return override(tomllib.loads(text), source, overrides)


def override(data: dict[str, Any], source: str, overrides: list[str]) -> Config:
    run = data.get("run")
    folder = run.get("dir") if isinstance(run, dict) else None
    for key, value in parse_overrides(overrides):
        assign(data, key, value)
    if folder and isinstance(data["run"], dict) and not data["run"].get("dir"):
        data["run"]["dir"] = folder  # --run.dir= asks for the default
    return validate(data, source)


def read_toml(path: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        there = sorted(file.parent.glob("*.toml")) or sorted(Path("train_configs").glob("*.toml"))
        listed = "".join(f"\n  {p}" for p in there)
        raise ConfigError(
            f"config file '{path}' does not exist" + (f"; available:{listed}" if listed else "; expected a .toml file")
        )
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def validate(data: dict[str, Any], source: str) -> Config:
    """Validate parsed TOML against the tables of :class:`Config` and the signature of every plugin it names."""
    data = dict(data)
    for kind in ("encoders", "losses"):  # a missing name defaults to the label
        tables = data.get(kind, {})
        if isinstance(tables, dict):
            data[kind] = {k: {"name": k, **t} if isinstance(t, dict) else t for k, t in tables.items()}
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {p}" for p in _problems(error, Config))) from None
    folder = Path(source).parent
    config.plugins = [_find(p, folder) if p.endswith(".py") else p for p in config.plugins]
    config.latent_norm.statistics = _find(config.latent_norm.statistics, folder)
    config.latent_cache.path = _find(config.latent_cache.path, folder)
    config.evaluation.reference = _find(config.evaluation.reference, folder)
    config.evaluation.inception_weights = _find(config.evaluation.inception_weights, folder)
    try:
        registry.discover("plugins", config.plugins, lazy=True)
    except registry.PluginError as error:
        raise ConfigError(f"{source}: {error}") from error
    problems = [p for place, kind, table in plugin_tables(config) for p in _check_plugin(place, kind, table, folder)]
    problems += _optimizer_problems(config)
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
        raise ConfigError("\n".join(prefix + p.replace("_", "-") for p in _problems(error, model))) from None


def _find(name: str, folder: Path) -> str:
    """Resolve ``name`` to a file in ``folder`` if it exists there and not relative to the current folder."""
    beside = folder / name
    return str(beside) if name and not Path(name).exists() and beside.exists() else name


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


def describe() -> str:
    """Help text on every config key: its type, default and meaning."""
    lines = []
    for name, field in Config.model_fields.items():
        table = _table_of(field.annotation)
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
        return _problems(error, schema, place)
    return []


def _optimizer_problems(config: Config) -> list[str]:
    problems = []
    tables = config.optimizer.model_extra or {}
    every: set[str] = set()
    if registry.recipes.has(config.recipe.name):
        every |= registry.recipes.get(config.recipe.name).cls.trains.keys()
    if not tables.keys() <= every:  # listing the other recipes imports all of them
        every |= {name for recipe in registry.recipes for name in recipe.cls.trains}
    for name, table in tables.items():
        if not isinstance(table, dict):
            problems.append(f"optimizer.{name}: unknown key{nearest(name, [*OptimizerTable.model_fields, *every])}")
        elif name not in every:
            problems.append(f"optimizer.{name}: no recipe has a parameter group '{name}'{nearest(name, every)}")
        else:
            try:
                OptimizerTable.model_validate(table)
            except ValidationError as error:
                problems += _problems(error, OptimizerTable, f"optimizer.{name}")
    return problems


def _problems(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """One line per validation error: the key, its value, what is expected, and the nearest valid name."""
    found: dict[str, str] = {}
    for e in error.errors(include_url=False):
        table, annotation = _locate(model, e["loc"])
        key = ".".join(str(part) for part in (prefix, *e["loc"]) if part != "")
        expected = type_name(annotation) if annotation is not None else ""
        if e["type"] == "extra_forbidden":
            line = f"{key}: unknown key{nearest(str(e['loc'][-1]), table.model_fields)}"
        elif e["type"] == "missing":
            line = f"{key}: missing; expected {'a table with a name' if _table_of(annotation) else expected}"
        elif e["type"] == "literal_error":
            allowed = [str(a) for a in typing.get_args(_without_none(annotation))]
            line = f"{key} = {e['input']!r}: not allowed{nearest(str(e['input']), allowed)}"
        elif e["type"].endswith("_type"):
            line = f"{key} = {e['input']!r}: expected {expected or e['msg']}"
        elif e["type"] == "value_error":
            line = f"{key} = {e['input']!r}: {e['ctx']['error']}"
        else:
            line = f"{key} = {e['input']!r}: {e['msg'][0].lower()}{e['msg'][1:]}"
        found.setdefault(key, line)
    return list(found.values())


def _locate(model: type[BaseModel], loc: tuple[str | int, ...]) -> tuple[type[BaseModel], Any]:
    """Return the table that holds a key, and the key's type (None for an unknown key)."""
    table, annotation = model, model
    for part in loc:
        annotation = _without_none(annotation)
        if inner := _table_of(annotation):
            table = inner
            field = table.model_fields.get(str(part))
            annotation = field.annotation if field else None
            if annotation is str and "file" in field.metadata:
                annotation = registry.File  # pydantic has split it into annotation and metadata
        else:  # a label of a dict, or an index of a list
            args = typing.get_args(annotation)
            annotation = args[-1] if args else None
    return table, annotation


def _table_of(annotation: Any) -> type[BaseModel] | None:
    annotation = _without_none(annotation)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _without_none(annotation: Any) -> Any:
    args = [a for a in typing.get_args(annotation) if a is not type(None)]
    is_optional = type(None) in typing.get_args(annotation)
    return args[0] if is_optional and len(args) == 1 else annotation
