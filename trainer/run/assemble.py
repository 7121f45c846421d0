"""Assembles a run: its dataset, modules with weights, parameter groups and EMA; plugins come from the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from components.data.classes import Classes, counted
from components.data.loader import DataError
from components.diffusion.image_sampler import guidance_fault, sampler_of
from components.diffusion.samplers import Guidance
from components.distributed.parallel import World, gather_floats
from components.distributed.ranks import patient_ranks
from components.optim.ema import Ema
from components.optim.optimizer import ParameterGroup
from components.optim.schedule import Schedule
from trainer.caching import cached
from trainer.config import Config, ConfigError
from trainer.config.schema import OptimizerTable
from trainer.run.construct import check_first_item, construct_parts, make_plugin, trained_modules
from trainer.run.parts import Parts
from trainer.run.prepare import Preparation, averaged, mesh_shape


def check(config: Config, world_size: int, local_size: int = 1) -> Parts:
    """Validate a config by constructing every module on the meta device, without reading files.

    Args:
        config: the run's config.
        world_size: number of ranks.
        local_size: number of ranks on one machine.

    Raises:
        ConfigError: for settings that cannot work together; the message names the keys.
    """
    _check_ranks(config, world_size, local_size)
    parts = construct_parts(config, on_meta=True)
    _check_parts(config, parts)
    return parts


def construct(config: Config, world: World, files: bool = True) -> Parts:
    """Build the dataset and construct all modules, each once; :func:`prepare` gives them memory and weights.

    Collective: all ranks call it together.

    Args:
        config: the run's config.
        world: this process.
        files: if False, build no dataset and read no files. Used for timing.

    Raises:
        ConfigError: for settings that cannot work together. Missing files are kept in ``Parts.missing``.
    """
    _check_ranks(config, world.size, world.local_size)
    if not files:
        parts = construct_parts(config)
        _check_parts(config, parts)
        return parts
    missing: list[str] = []
    images = cache = None
    try:
        cache = cached.open_cache(config)
    except DataError as error:
        missing.append(f"latent_cache.path: {error}")
    recipe = make_plugin("recipe", "recipe", config.recipe)
    try:
        images = make_plugin("dataset", "dataset", config.dataset, config.training.resolution)
    except (DataError, OSError) as error:
        if cache is None or cached.needs_images(config, recipe, cache):
            missing.append(f"dataset: {error}")
    if world.size > 1:
        patient_ranks().first(lambda: None)  # a dataset may fetch its files, and other machines take longer
    if images is not None and (cache is None or cached.needs_images(config, recipe, cache)):
        check_first_item(images, config)
    if cache is not None and min(there for (there,) in gather_floats(float(images is not None))) == 0:
        images = None  # making images is collective: every rank needs the dataset
    statistics = config.latent_norm.statistics
    if statistics and not statistics.startswith("hf://") and not Path(statistics).exists():
        missing.append(
            f"latent_norm.statistics = '{statistics}' does not exist; download the statistics of this tokenizer, or "
            'set it to "" to measure them before the first step'
        )
    source = cache if images is None else images
    parts = construct_parts(config, source, recipe=recipe)
    _check_parts(config, parts)
    if source is not None:
        parts.classes = Classes.of(source)
        _check_classes(config, parts.classes)
    parts.images, parts.cache, parts.missing = images, cache, missing
    return parts


def prepare(config: Config, parts: Parts, world: World, files: bool = True, backend: str = "inductor") -> None:
    """Shard the constructed modules, and initialize them from the seed or from pretrained weights. Collective.

    Args:
        parts: from :func:`construct`.
        files: if False, read no weights; frozen modules are random. Used for timing.
        backend: torch.compile backend.

    Raises:
        ConfigError: if files are missing; lists all of them (data, checkpoints, encoder weights) with how to get each.
    """
    Preparation(config, trained_modules(parts.recipe), world, files, backend)(parts)
    if parts.cache is not None:
        parts.dataset = cached.dataset_on_cache(config, parts, parts.cache)


def build(config: Config, world: World, files: bool = True, backend: str = "inductor") -> Parts:
    """:func:`construct` and :func:`prepare` the parts of a run."""
    parts = construct(config, world, files)
    prepare(config, parts, world, files, backend)
    return parts


def parameter_groups(config: Config, parts: Parts) -> dict[str, ParameterGroup]:
    """Return one parameter group per entry of ``recipe.trains`` that has at least one module."""
    groups, named = {}, parts.modules.named()
    for name, members in parts.recipe.trains.items():
        settings = config.optimizer.group(name)
        trained = {member: named[member] for member in members if member in named}
        if not trained:
            continue
        steps = config.training.steps
        schedule = Schedule(
            settings.lr,
            settings.schedule,
            steps,
            settings.warmup_steps,
            settings.final_lr_ratio,
            settings.decay_steps or round(settings.decay_fraction * steps),
            settings.decay_shape,
            [(int(step), factor) for step, factor in settings.points],
            settings.between,
        )

        def make(modules: nn.ModuleDict, lr: float, settings: OptimizerTable = settings, place: str = name) -> Any:
            return make_plugin(f"optimizer.{place}", "optimizer", settings, modules, lr)

        groups[name] = ParameterGroup(name, trained, make, schedule=schedule, clip_norm=settings.clip_norm)
    return groups


def make_ema(config: Config, parts: Parts) -> Ema | None:
    """Return the EMA of denoiser, heads and latent norm, and of the tokenizer with ``ema.tokenizer``; None if empty."""
    trained = trained_modules(parts.recipe)
    sources = {name: m for name, m in parts.modules.named().items() if averaged(config, trained, name)}
    return Ema(sources, config.ema.decay, parts.averages) if sources else None


def _check_ranks(config: Config, world_size: int, local_size: int) -> None:
    share = world_size * config.training.accumulation
    if config.training.batch_size % share:
        raise ConfigError(
            f"training.batch_size = {config.training.batch_size}: not divisible by {world_size} ranks x "
            f"training.accumulation = {config.training.accumulation}; expected a multiple of {share}"
        )
    mesh_shape(config, world_size, local_size)


def _check_classes(config: Config, classes: Classes) -> None:
    """Raise ConfigError if the config expects more classes than the dataset has, without saying that this is meant."""
    wanted, found = config.training.num_classes, len(classes.names)
    if wanted > found and not config.training.allow_fewer_classes:
        raise ConfigError(
            f"training.num_classes = {wanted}, but the dataset has fewer: {counted(found)} found "
            f"({classes.listing(3)}), {wanted} expected. Check the dataset's options (is dataset.path one level too "
            f"high?), set training.num_classes = {found}, or allow it: training.allow_fewer_classes = true"
        )


def _check_parts(config: Config, parts: Parts) -> None:
    cached.check_recipe(config, parts.recipe)
    denoiser = parts.modules.denoiser
    if denoiser is None:
        return
    guidance = Guidance(config.sampling.guidance, kind=config.sampling.guidance_kind)
    if fault := guidance_fault(guidance, parts.recipe, parts.modules):
        raise ConfigError(f"sampling.guidance = {guidance.scale}: {fault}; or set sampling.guidance = 1 (off)")
    if denoiser.prediction != "velocity" and config.flow.path != "linear":
        raise ConfigError(
            f"denoiser.prediction = '{denoiser.prediction}' is converted to the velocity of the linear path, but "
            f'flow.path = \'{config.flow.path}\'; set flow.path = "linear", or denoiser.prediction = "velocity"'
        )
    try:
        sampler_of(parts.recipe, config.sampling.method, config.sampling.steps)
    except ValueError as error:
        raise ConfigError(str(error)) from error
