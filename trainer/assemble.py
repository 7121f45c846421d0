"""Names in the config -> modules -> weights -> parameter groups. The registry is the only way to a plugin."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from components import parallel, registry
from components.contracts import AdversarialLoss, AlignmentLoss, Dataset, LatentShape, Modules, Recipe
from components.data import DataError
from components.draws import generator
from components.ema import Ema
from components.flow import Flow
from components.latent_norm import LatentNorm
from components.optimizer import ParameterGroup, Schedule
from components.weights import WeightsError
from trainer.config import Config, ConfigError, PluginTable


@dataclass
class Parts:
    """A run's parts, before optimizers.

    Attributes:
        recipe: the algorithm.
        modules: what it works on; only what it uses is built.
        dataset: none if it was not asked for.
        latent: shape of one latent.
        unused: tables of the config that the recipe does not use.
    """

    recipe: Recipe
    modules: Modules
    dataset: Dataset | None
    num_classes: int
    latent: LatentShape
    unused: list[str] = field(default_factory=list)


def check(config: Config, world_size: int) -> Parts:
    """Builds every module on the meta device, where it costs no memory and reads no file.

    Raises:
        ConfigError: a combination that cannot work, naming the keys.
    """
    share = world_size * config.training.accumulation
    if config.training.batch_size % share:
        raise ConfigError(
            f"training.batch_size = {config.training.batch_size}: not divisible by {world_size} ranks x "
            f"training.accumulation = {config.training.accumulation}; expected a multiple of {share}"
        )
    with torch.device("meta"):
        return _build(config, dataset=None, prepare=lambda place, module: None)


def build(config: Config, device: torch.device, files: bool = True) -> Parts:
    """Builds the dataset and every module on ``device``, initialised from the seed or from the named weights.

    Args:
        files: False builds no dataset and reads no weights: frozen parts are random, for timing.

    Raises:
        ConfigError: every file that is missing at once (data, checkpoints, encoder weights), with how to get it.
    """
    missing: list[str] = []

    def prepare(place: str, module: nn.Module) -> None:
        if not files:
            for p in module.parameters():
                nn.init.normal_(p, std=0.02)
        elif hasattr(module, "load_weights"):
            try:
                module.load_weights()
            except WeightsError as error:
                missing.append(str(error))

    dataset = None
    try:
        if files:
            dataset = _plugin("dataset", "dataset", config.dataset, config.training.resolution)
    except (DataError, OSError) as error:
        missing.append(f"dataset: {error}")
    statistics = config.latent_norm.statistics
    if files and statistics and not Path(statistics).is_file():
        missing.append(
            f"latent_norm.statistics = '{statistics}' does not exist; get the file that belongs to the tokenizer, or "
            'set it to "" to measure the statistics before the first step'
        )
    # Frozen and pretrained parts first: a missing file shows before the large denoiser is made.
    parts = _build(config, dataset, prepare, stop=lambda: bool(missing))
    if missing:
        raise ConfigError("this run needs files that are not there:\n" + "\n".join(f"- {m}" for m in missing))
    dtype = torch.float64 if config.training.precision == "fp64" else None
    for name, module in parts.modules.named().items():
        convolutional = config.training.channels_last and name.startswith(("tokenizer", "discriminator", "recon"))
        memory_format = torch.channels_last if convolutional else torch.preserve_format
        module.to(device=device, dtype=dtype, memory_format=memory_format)
    _set_trainable(parts)
    if config.training.compile:
        compile_modules(parts.modules)
    return parts


def parameter_groups(config: Config, parts: Parts) -> dict[str, ParameterGroup]:
    """One group per loss of the recipe that has something to train."""
    groups = {}
    for name, members in parts.recipe.trains.items():
        settings = config.optimizer.group(name)
        trained = {m: getattr(parts.modules, m) for m in members if getattr(parts.modules, m) is not None}
        if not trained:
            continue
        schedule = Schedule(
            settings.lr, settings.schedule, config.training.steps, settings.warmup_steps, settings.final_lr_ratio
        )
        groups[name] = ParameterGroup(
            name,
            trained,
            schedule=schedule,
            betas=tuple(settings.betas),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            clip_norm=settings.clip_norm,
        )
    return groups


def make_ema(config: Config, parts: Parts) -> Ema | None:
    """Averages of the denoiser, its heads and the latent statistics, and of the tokenizer on request."""
    m = parts.modules
    averaged = {"denoiser": m.denoiser, "heads": m.heads, "latent_norm": m.latent_norm}
    if config.ema.tokenizer and "tokenizer" in parts.recipe.trains:
        averaged["tokenizer"] = m.tokenizer
    averaged = {name: module for name, module in averaged.items() if module is not None}
    return Ema(averaged, config.ema.decay) if averaged else None


def _build(
    config: Config,
    dataset: Dataset | None,
    prepare: Callable[[str, nn.Module], None],
    stop: Callable[[], bool] = lambda: False,
) -> Parts:
    recipe: Recipe = _plugin("recipe", "recipe", config.recipe)
    uses, resolution = recipe.uses, config.training.resolution
    m = Modules(flow=Flow(config.flow.path, config.flow.time))

    def make(place: str, kind: str, table: PluginTable, *given: Any) -> Any:
        with _seeded(config.training.seed, place):
            part = _plugin(place, kind, table, *given)
        if isinstance(part, nn.Module):
            prepare(place, part)
        return part

    m.tokenizer = make("tokenizer", "tokenizer", config.tokenizer)
    if resolution % m.tokenizer.factor:
        raise ConfigError(
            f"training.resolution = {resolution}: not divisible by the tokenizer's factor of {m.tokenizer.factor}; "
            f"the nearest sizes are {_multiples(resolution, m.tokenizer.factor)}"
        )
    if "tokenizer" in recipe.trains and not getattr(m.tokenizer, "trainable", True):
        raise ConfigError(
            f"tokenizer.trainable = false, but recipe.name = '{config.recipe.name}' trains the tokenizer; "
            "set it to true, or choose the recipe 'repa' or 'ldm'"
        )
    side = resolution // m.tokenizer.factor
    latent = LatentShape(m.tokenizer.channels, side, side)

    for label, table in config.losses.items():
        with _seeded(config.training.seed, f"losses.{label}"):
            loss = _plugin(f"losses.{label}", "loss", table)
        # The weights of a loss that the recipe leaves out may be missing.
        if _sort_loss(m, label, loss, recipe) and isinstance(loss, nn.Module):
            prepare(f"losses.{label}", loss)
    num_classes = _num_classes(config, dataset, needed="denoiser" in uses)
    if "denoiser" in uses:
        if config.denoiser is None:
            raise ConfigError(f"recipe.name = '{config.recipe.name}' needs a [denoiser] table with a name")
        # On the meta device first: the encoders need its grid, and their files may be missing.
        with torch.device("meta"):
            grid = _plugin("denoiser", "denoiser", config.denoiser, latent, num_classes).grid
        if "encoders" in uses:
            for label, table in config.encoders.items():
                m.encoders[label] = make(f"encoders.{label}", "encoder", table, resolution, grid)
            if not m.encoders:
                raise ConfigError(f"recipe.name = '{config.recipe.name}' needs an [encoders.NAME] table, as dinov2")
        if not stop():
            m.denoiser = make("denoiser", "denoiser", config.denoiser, latent, num_classes)
            m.latent_norm = LatentNorm(
                latent.channels, momentum=config.latent_norm.momentum, eps=config.latent_norm.eps
            )
            if "heads" in uses:
                if m.alignment is None:
                    raise ConfigError(f"recipe.name = '{config.recipe.name}' needs an alignment loss: [losses.cosine]")
                with _seeded(config.training.seed, "heads"):
                    dims = [e.embed_dim for e in m.encoders.values()]
                    m.heads = m.alignment.make_heads(m.denoiser.width, dims, m.denoiser.grid)
    if "reconstruction" in uses and not m.reconstruction:
        raise ConfigError(f"recipe.name = '{config.recipe.name}' needs a reconstruction loss, as [losses.l1]")
    unused = [place for place, names in (("denoiser", config.denoiser), ("encoders", config.encoders)) if names]
    return Parts(recipe, m, dataset, num_classes, latent, [place for place in unused if place not in uses])


def _plugin(place: str, kind: str, table: PluginTable, *given: Any) -> Any:
    """One plugin from its table; its ValueError becomes a ConfigError that names the table."""
    try:
        return registry.KINDS[kind].get(table.name).cls(*given, **table.options)
    except ValueError as error:
        message = str(error)
        raise ConfigError(message if place.split(".")[0] in message else f"[{place}] {message}") from error


def _sort_loss(m: Modules, label: str, loss: Any, recipe: Recipe) -> bool:
    """Puts a loss where its contract says, and tells whether the recipe uses it; else it is dropped."""
    if isinstance(loss, AlignmentLoss):
        place = "alignment"
    elif isinstance(loss, AdversarialLoss):
        place = "discriminator"
    else:
        if "reconstruction" in recipe.uses:
            m.reconstruction[label] = loss
        return "reconstruction" in recipe.uses
    if getattr(m, place) is not None:
        raise ConfigError(f"[losses.{label}]: a run has one {place} loss, and there is another; remove one")
    if place in recipe.uses:
        setattr(m, place, loss)
    return place in recipe.uses


def _num_classes(config: Config, dataset: Dataset | None, needed: bool) -> int:
    wanted = config.training.num_classes
    found = dataset.num_classes if dataset is not None else 0
    if not wanted and not found and needed:
        # Asked for without data: a dataset that needs no files can still tell.
        with contextlib.suppress(DataError, OSError, ConfigError), torch.device("cpu"):
            found = _plugin("dataset", "dataset", config.dataset, config.training.resolution).num_classes
        return found or 1
    if wanted and found > wanted:
        raise ConfigError(
            f"training.num_classes = {wanted}, but the dataset has {found} classes; set it to {found}, or to 0 to "
            "take the dataset's number"
        )
    return wanted or found


def compile_modules(m: Modules, backend: str = "inductor") -> None:
    """Compiles every network, part by part, without graph breaks."""
    heads = list(m.heads) if m.heads is not None else []
    for module in (m.tokenizer, m.denoiser, m.discriminator, *heads, *m.encoders.values(), *m.reconstruction.values()):
        if isinstance(module, nn.Module):
            parallel.compile_units(module, backend)


def _set_trainable(parts: Parts) -> None:
    trained = {name for members in parts.recipe.trains.values() for name in members}
    for name, module in parts.modules.named().items():
        learns = name in trained
        module.train(learns)
        if not learns:
            module.requires_grad_(False)


@contextlib.contextmanager
def _seeded(seed: int, place: str):
    """Each part's initial weights depend on the seed and its own place only, not on what was built before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "weights", place).initial_seed())
        yield


def _multiples(value: int, factor: int) -> str:
    below = value // factor * factor
    return f"{below} and {below + factor}" if below else str(factor)
