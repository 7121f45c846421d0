"""Converts weights of other programs to state dicts of our modules, checked against a config's architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from components import registry
from components.files import weights_file
from components.files.adapter import State, recognized, take_module
from components.files.model_file import PARTS
from components.files.weights import WeightsError, check_fit
from components.files.weights_file import WeightsFile, stated_statistics
from components.nn.latent_norm import LatentNorm
from trainer.config import Config, ConfigError, PluginTable, named_files, weights_key
from trainer.run.construct import construct_parts
from trainer.run.initial_statistics import read_statistics


@dataclass
class Imported:
    """Imported weights.

    Attributes:
        step: optimizer steps of training, if the file states them, otherwise 0.
        weights: "ema" or "online".
        states: state dicts by part.
        online: raw weights by part, if ``states`` holds averaged weights and the file has both; otherwise empty.
        notes: messages for the user.
    """

    step: int
    weights: str
    states: dict[str, State] = field(default_factory=dict)
    online: dict[str, State] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def import_model(
    config: Config, path: str, *, tokenizer: str | None = None, stats: str | None = None, weights: str = "ema"
) -> Imported:
    """Read a checkpoint, or a file of a tokenizer or a denoiser alone, for the modules of a config.

    Files may be in any format that the config's plugins declare an adapter for (:mod:`components.files.adapter`).

    Args:
        config: defines the architecture; if ``training.num_classes`` is 0, it is set from the checkpoint.
        path: file or folder.
        tokenizer: file of the tokenizer, if ``path`` holds none; None: the one that the config names.
        stats: file of latent statistics; None: those in ``path``, else the config's ``latent_norm.statistics``, else
            those of a diffusers folder.
        weights: which denoiser of a training checkpoint to import, "ema" or "model"; with "ema" the raw weights are
            returned as ``online``.

    Raises:
        ConfigError: something is missing that an option can supply.
        WeightsError: keys are missing, unexpected or mis-shaped (all are listed), or a file cannot be read.
    """
    file = weights_file.read(path, "import")
    adapters = registry.denoisers.get(config.denoiser.name).cls.adapters if config.denoiser is not None else ()
    for adapter in adapters:
        config.training.num_classes = config.training.num_classes or adapter.num_classes(
            file, _option(config, "denoiser.label_dropout") or 0.0
        )
    m = construct_parts(config, on_meta=True).modules
    own = {part: module.state_dict() for part, module in m.named().items() if part in PARTS}
    step = file.values.get("steps", file.values.get("global_step", 0))
    found = Imported(int(step), "online" if weights == "model" else "ema")
    problems: list[str] = []

    def add(part: str, state: State, into: dict[str, State]) -> None:
        """Add a part's state; collect its errors, so that those of all parts are reported together."""
        try:
            check_fit(own[part], state, part, path)
        except WeightsError as error:
            problems.append(str(error))
        into[part] = state

    _take_denoiser(file, m.denoiser, own, weights, found, add)
    tokenizer_file = _take_tokenizer(config, file, tokenizer, m.tokenizer, found, add)
    if not found.states:
        raise ConfigError(
            f"'{path}' holds no tensors of this config's tokenizer or denoiser, only {weights_file.left_out(file)}"
        )
    _take_latent_norm(config, stats, tokenizer_file, own, found)
    _take_discriminator([file, tokenizer_file], m.discriminator, found, add)
    if problems:
        raise WeightsError("\n".join(problems))
    for each in {id(f): f for f in (file, tokenizer_file) if f is not None}.values():
        if rest := weights_file.left_out(each):
            found.notes.append(f"Not imported from '{each.source}': {rest}")
    arguments = {name: place for adapter in adapters for name, place in adapter.arguments.items()}
    found.notes = [*dict.fromkeys(found.notes), *_other_arguments(config, file.values.get("args"), arguments)]
    return found


Add = Callable[[str, State, dict[str, State]], None]


def _take_denoiser(
    file: WeightsFile, denoiser: Any, own: dict[str, State], weights: str, found: Imported, add: Add
) -> None:
    held = {role for role in ("ema", "model") if denoiser is not None and recognized(denoiser, file, role)}
    if weights == "ema" and held == {"model"}:
        found.notes.append(f"'{file.source}' has no averaged weights; imported its raw weights (`model`)")
        found.weights, weights = "online", "model"
    if weights not in held:
        return
    chosen: list[tuple[str, dict[str, State]]] = [(weights, found.states)]
    if weights == "ema" and all(any(key.startswith(f"{role}.") for key in file.tensors) for role in ("ema", "model")):
        chosen.append(("model", found.online))
    for role, into in chosen:
        states = take_module(denoiser, file, role, "denoiser")
        for part, state in states.items():
            if part in own:
                add(part, state, into)
            else:
                found.notes.append(f"Not imported: {part}, which the config's recipe does not use")
        if "heads" in own and "heads" not in states:
            found.notes.append(f"'{file.source}' has no alignment heads; only training needs them")


def _take_tokenizer(
    config: Config, file: WeightsFile, path: str | None, tokenizer: Any, found: Imported, add: Add
) -> WeightsFile | None:
    held = recognized(tokenizer, file, "tokenizer") is not None
    path = path or (None if held else next(iter(named_files("tokenizer", config.tokenizer)), None))
    if path is None and not held:
        if found.states:
            key = weights_key(config)
            raise ConfigError(f"'{file.source}' holds no tokenizer; add --tokenizer=FILE, or set {key}")
        return None
    source = weights_file.read(path, "tokenizer") if path else file
    add("tokenizer", take_module(tokenizer, source, "tokenizer", "tokenizer")["tokenizer"], found.states)
    return source


def _take_latent_norm(
    config: Config, stats: str | None, tokenizer_file: WeightsFile | None, own: dict[str, State], found: Imported
) -> None:
    if "latent_norm" not in own:
        return
    measured = None
    if stats or ("latent_norm" not in found.states and config.latent_norm.statistics):
        measured = read_statistics(stats or config.latent_norm.statistics)
    elif "latent_norm" not in found.states and tokenizer_file is not None and tokenizer_file.config is not None:
        measured = stated_statistics(tokenizer_file.config, tokenizer_file.tensors)
    if measured is not None:
        channels, *positions = own["latent_norm"]["running_mean"].shape
        norm = LatentNorm(channels, positions=tuple(positions) or None)
        try:
            norm.set_statistics(*measured)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for states in (found.states, found.online) if found.online else (found.states,):
            states["latent_norm"] = norm.state_dict()
    if "latent_norm" not in found.states:
        if "denoiser" in found.states:
            raise ConfigError("the file has no latent statistics (bn.*), which the denoiser needs; add --stats=FILE")
        found.notes.append("No latent statistics were found; --stats=FILE adds them")


def _take_discriminator(sources: list[WeightsFile | None], discriminator: Any, found: Imported, add: Add) -> None:
    role = "discriminator"
    for file in sources if discriminator is not None else ():
        if file is not None and role not in found.states and recognized(discriminator, file, role):
            add(role, take_module(discriminator, file, role, role)[role], found.states)


def _other_arguments(config: Config, arguments: Any, places: dict[str, str]) -> list[str]:
    """Warnings on settings stated in a checkpoint that differ from the config's keys ``places`` and affect no shape."""
    lines = []
    for name, place in places.items():
        theirs, ours = getattr(arguments, name, None), _option(config, place)
        if theirs is not None and ours is not None and theirs != ours:
            lines.append(
                f"Warning: the checkpoint was trained with {name} = {theirs}, but the config has {place} = {ours}"
            )
    return lines


def _option(config: Config, place: str) -> Any:
    """Value of a config key, or the default of a plugin's option; None if the key does not exist."""
    table_name, key = place.split(".")
    table = getattr(config, table_name)
    if not isinstance(table, PluginTable):
        return getattr(table, key, None)
    option = registry.KINDS[table_name].get(table.name).options.get(key)
    return table.options.get(key, option.default if option else None)
