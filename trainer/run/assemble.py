"""Builds the modules, weights, parameter groups and EMA of a run from its config; plugins come from the registry."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from components import registry
from components.contracts import AdversarialLoss, AlignmentLoss, Dataset, LatentShape, Modules, Recipe
from components.data.loader import DataError
from components.diffusion.flow import Flow, dimension_shift
from components.distributed.parallel import World, gather_floats
from components.nn.latent_norm import LatentNorm
from components.optim.ema import Ema
from components.optim.optimizer import ParameterGroup, Schedule
from trainer.caching import cached
from trainer.config import Config, ConfigError, PluginTable
from trainer.run.parts import Parts
from trainer.run.prepare import Preparation, averaged, construct, mesh_shape


def check(config: Config, world_size: int, local_size: int = 1) -> Parts:
    """Validate a config by building every module on the meta device, without allocating memory or reading files.

    Args:
        config: the run's config.
        world_size: number of ranks.
        local_size: number of ranks on one machine.

    Raises:
        ConfigError: for settings that cannot work together; the message names the keys.
    """
    share = world_size * config.training.accumulation
    if config.training.batch_size % share:
        raise ConfigError(
            f"training.batch_size = {config.training.batch_size}: not divisible by {world_size} ranks x "
            f"training.accumulation = {config.training.accumulation}; expected a multiple of {share}"
        )
    mesh_shape(config, world_size, local_size)
    with torch.device("meta"):
        parts = build_parts(config, dataset=None, prepare=lambda place, name, module: None)
    cached.check_recipe(config, parts.recipe)
    denoiser = parts.modules.denoiser
    if denoiser is not None and not denoiser.label_dropout and config.sampling.guidance > 1:
        raise ConfigError(
            f"sampling.guidance = {config.sampling.guidance}: classifier-free guidance needs a denoiser trained with "
            "label dropout, but denoiser.label_dropout is 0; set it above 0, or set sampling.guidance = 1 (off)"
        )
    return parts


def build(config: Config, world: World, files: bool = True, backend: str = "inductor") -> Parts:
    """Build the dataset and all modules on their devices, initialized from the seed or from pretrained weights.

    Collective: all ranks call it together.

    Args:
        config: the run's config.
        world: rank, world size and device of this process.
        files: if False, build no dataset and read no weights; frozen modules are random. Used for timing.
        backend: torch.compile backend.

    Raises:
        ConfigError: if files are missing; lists all of them (data, checkpoints, encoder weights) with how to get each.
    """
    recipe = make_plugin("recipe", "recipe", config.recipe)
    prepare = Preparation(config, trained_modules(recipe), world, files, backend)
    missing = prepare.missing
    dataset = cache = None
    try:
        cache = cached.open_cache(config) if files else None
    except DataError as error:
        missing.append(f"latent_cache.path: {error}")
    try:
        if files:
            dataset = make_plugin("dataset", "dataset", config.dataset, config.training.resolution)
    except (DataError, OSError) as error:
        if cache is None or cached.needs_images(config, recipe, cache):
            missing.append(f"dataset: {error}")
    if cache is not None and min(there for (there,) in gather_floats(float(dataset is not None))) == 0:
        dataset = None  # making images is collective: every rank needs the dataset
    statistics = config.latent_norm.statistics
    if files and statistics and not statistics.startswith("hf://") and not Path(statistics).exists():
        missing.append(
            f"latent_norm.statistics = '{statistics}' does not exist; download the statistics of this tokenizer, or "
            'set it to "" to measure them before the first step'
        )
    # Pretrained modules are built first, so that a missing file is reported before the large denoiser is allocated.
    parts = build_parts(config, cache if dataset is None else dataset, prepare, stop=lambda: bool(missing))
    if missing:
        raise ConfigError("this run needs files that do not exist:\n" + "\n".join(f"- {m}" for m in missing))
    parts.averages = prepare.copies
    parts.images = dataset
    if cache is not None:
        parts.dataset = cached.dataset_on_cache(config, parts, cache)
    return parts


def parameter_groups(config: Config, parts: Parts) -> dict[str, ParameterGroup]:
    """Return one parameter group per entry of ``recipe.trains`` that has at least one module."""
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
    """Return the EMA of denoiser, heads and latent norm, and of the tokenizer with ``ema.tokenizer``; None if empty."""
    named = {name: getattr(parts.modules, name) for name in ("denoiser", "heads", "latent_norm", "tokenizer")}
    trained = trained_modules(parts.recipe)
    sources = {name: m for name, m in named.items() if m is not None and averaged(config, trained, name)}
    return Ema(sources, config.ema.decay, parts.averages) if sources else None


def trained_modules(recipe: Recipe | type[Recipe]) -> set[str]:
    """Return the names of the modules that the recipe trains."""
    return {name for members in recipe.trains.values() for name in members}


def build_parts(
    config: Config,
    dataset: Dataset | None,
    prepare: Callable[[str, str, nn.Module], None],
    stop: Callable[[], bool] = lambda: False,
    uses: frozenset[str] | None = None,
) -> Parts:
    """Construct the modules that the recipe uses and pass each to ``prepare``.

    Args:
        config: the run's config.
        dataset: source of the number of classes; None if it was not built.
        prepare: called as ``prepare(place, role, module)``: the module's table in the config, its field in
            :class:`Modules`, and the module.
        stop: if it returns True, the denoiser (the largest module), latent norm and heads are not built.
        uses: fields of ``Modules`` to build in addition to the tokenizer; None: ``recipe.uses``.

    Raises:
        ConfigError: for settings that cannot work together; the message names the keys.
    """
    recipe: Recipe = make_plugin("recipe", "recipe", config.recipe)
    uses, resolution = recipe.uses if uses is None else uses, config.training.resolution
    m = Modules()

    def construct_plugin(place: str, kind: str, table: PluginTable, *given: Any) -> Any:
        on_meta = hasattr(registry.KINDS[kind].get(table.name).cls, "init_weights")
        return construct(config.training.seed, place, lambda: make_plugin(place, kind, table, *given), on_meta)

    def make(place: str, kind: str, table: PluginTable, *given: Any) -> Any:
        part = construct_plugin(place, kind, table, *given)
        if isinstance(part, nn.Module):
            prepare(place, place, part)
        return part

    m.tokenizer = make("tokenizer", "tokenizer", config.tokenizer)
    if resolution % m.tokenizer.factor:
        raise ConfigError(
            f"training.resolution = {resolution}: not divisible by the tokenizer's factor of {m.tokenizer.factor}; "
            f"the nearest valid sizes are {_multiples(resolution, m.tokenizer.factor)}"
        )
    if getattr(m.tokenizer, "resolution", resolution) != resolution:
        raise ConfigError(
            f"tokenizer.resolution = {m.tokenizer.resolution}, but training.resolution = {resolution}; make them equal"
        )
    _check_trainable(config, recipe, m.tokenizer)
    side = resolution // m.tokenizer.factor
    latent = LatentShape(m.tokenizer.channels, side, side)
    f = config.flow
    shift = dimension_shift(latent) if f.shift == "auto" else f.shift
    m.flow = Flow(f.path, f.time, f.time_mean, f.time_std, shift)

    for label, table in config.losses.items():
        loss = construct_plugin(f"losses.{label}", "loss", table)
        # Losses that the recipe does not use are not prepared: their weights may be missing.
        name = _sort_loss(m, label, loss, uses)
        if name and isinstance(loss, nn.Module):
            prepare(f"losses.{label}", name, loss)
    num_classes = _num_classes(config, dataset, needed="denoiser" in uses)
    if uses & {"denoiser", "encoders"}:
        if config.denoiser is None:
            raise ConfigError(f"recipe.name = '{config.recipe.name}' needs a [denoiser] table with a name")
        # Encoders are built first and need the denoiser's grid: get it from a denoiser on the meta device.
        with torch.device("meta"):
            grid = make_plugin("denoiser", "denoiser", config.denoiser, latent, num_classes or 1).grid
        if "encoders" in uses:
            for label, table in config.encoders.items():
                m.encoders[label] = make(f"encoders.{label}", "encoder", table, resolution, grid)
                m.encoder_weights[label] = table.weight
            if not m.encoders:
                raise ConfigError(
                    f"recipe.name = '{config.recipe.name}' needs an [encoders.NAME] table, such as [encoders.dinov2]"
                )
        if "denoiser" in uses and not stop():
            m.denoiser = make("denoiser", "denoiser", config.denoiser, latent, num_classes)
            norm = config.latent_norm
            m.latent_norm = construct(
                config.training.seed, "latent_norm",
                lambda: LatentNorm(latent.channels, momentum=norm.momentum, eps=norm.eps), on_meta=True,
            )  # fmt: skip
            prepare("latent_norm", "latent_norm", m.latent_norm)
            if "heads" in uses:
                if m.alignment is None:
                    raise ConfigError(f"recipe.name = '{config.recipe.name}' needs an alignment loss: [losses.cosine]")
                m.heads = _make_heads(config, m)
                prepare("heads", "heads", m.heads)
    if "reconstruction" in uses and not m.reconstruction:
        raise ConfigError(f"recipe.name = '{config.recipe.name}' needs a reconstruction loss, such as [losses.l1]")
    if uses == recipe.uses and not stop() and hasattr(recipe, "check"):
        try:
            recipe.check(m)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    unused = [place for place, names in (("denoiser", config.denoiser), ("encoders", config.encoders)) if names]
    return Parts(recipe, m, dataset, num_classes, latent, [place for place in unused if place not in uses])


def _check_trainable(config: Config, recipe: Recipe, tokenizer: Any) -> None:
    """Raise ConfigError if the recipe trains parts of the tokenizer that it does not allow to be trained."""
    if "tokenizer" not in trained_modules(recipe):
        return
    name = config.tokenizer.name
    if not getattr(tokenizer, "trainable", True):
        option = "trainable" in registry.tokenizers.get(name).options
        why = "has tokenizer.trainable = false" if option else "has nothing to train"
        remedy = "set it to true, or choose" if option else "choose"
        fit = [r.name for r in registry.recipes if "tokenizer" not in trained_modules(r.cls)]
        raise ConfigError(
            f"recipe.name = '{config.recipe.name}' trains the tokenizer, but '{name}' {why}; {remedy} a recipe that "
            f"does not train it ({', '.join(fit)})"
        )
    decoder_alone, frozen_encoder = (
        getattr(recipe, "trains_decoder_alone", False), getattr(tokenizer, "frozen_encoder", False)
    )  # fmt: skip
    if frozen_encoder and not decoder_alone:
        fit = [r.name for r in registry.recipes if getattr(r.cls, "trains_decoder_alone", False)]
        raise ConfigError(
            f"recipe.name = '{config.recipe.name}' trains the tokenizer's encoder, but that of '{name}' is frozen; "
            f"choose a recipe that trains only the decoder ({', '.join(fit)})"
        )
    if decoder_alone and not frozen_encoder:
        fit = [t.name for t in registry.tokenizers if getattr(t.cls, "frozen_encoder", False)]
        raise ConfigError(
            f"recipe.name = '{config.recipe.name}' trains only the decoder, but the encoder of '{name}' is trainable; "
            f"choose a tokenizer with a frozen encoder ({', '.join(fit)})"
        )


def _make_heads(config: Config, m: Modules) -> nn.ModuleList:
    depths = 1 if isinstance(m.denoiser.align_depth, int) else len(m.denoiser.align_depth)
    dims = [e.embed_dim for e in m.encoders.values()] * depths

    def make() -> nn.ModuleList:
        return m.alignment.make_heads(m.denoiser.width, dims, m.denoiser.grid)

    heads = construct(config.training.seed, "heads", make, on_meta=True)
    if all(hasattr(head, "init_weights") for head in heads):
        return heads
    return construct(config.training.seed, "heads", make, on_meta=False)


def make_plugin(place: str, kind: str, table: PluginTable, *given: Any) -> Any:
    """Construct a plugin from its config table; a ValueError becomes a ConfigError that names the table."""
    try:
        return registry.KINDS[kind].get(table.name).cls(*given, **table.options)
    except ValueError as error:
        message = str(error)
        raise ConfigError(message if place.split(".")[0] in message else f"[{place}] {message}") from error


def _sort_loss(m: Modules, label: str, loss: Any, uses: frozenset[str]) -> str:
    """Store a loss in the field of ``m`` for its kind and return the field's name; "" if the recipe does not use it."""
    if isinstance(loss, AlignmentLoss):
        place = "alignment"
    elif isinstance(loss, AdversarialLoss):
        place = "discriminator"
    else:
        if "reconstruction" not in uses:
            return ""
        m.reconstruction[label] = loss
        return f"reconstruction.{label}"
    if getattr(m, place) is not None:
        raise ConfigError(f"[losses.{label}]: a run takes one {place} loss, but the config has two; remove one")
    if place not in uses:
        return ""
    setattr(m, place, loss)
    return place


def _num_classes(config: Config, dataset: Dataset | None, needed: bool) -> int:
    wanted = config.training.num_classes
    found = dataset.num_classes if dataset is not None else 0
    if not wanted and not found and needed:
        # No dataset was built, but one that reads no files can be constructed here for its number of classes.
        with contextlib.suppress(DataError, OSError, ConfigError), torch.device("cpu"):
            found = make_plugin("dataset", "dataset", config.dataset, config.training.resolution).num_classes
        return found or 1
    if wanted and found > wanted:
        raise ConfigError(
            f"training.num_classes = {wanted}, but the dataset has {found} classes; set it to {found}, or to 0 to "
            "use the dataset's number"
        )
    return wanted or found


def _multiples(value: int, factor: int) -> str:
    below = value // factor * factor
    return f"{below} and {below + factor}" if below else str(factor)
