"""Constructs a run's recipe and networks from its config, and checks that they fit each other; allocates nothing large.

Networks that initialize themselves are constructed on the meta device; :mod:`trainer.run.prepare` shards and fills
them. Initial weights are seeded by the module's table in the config, so they do not depend on the order here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from components import registry
from components.contracts import Dataset, Denoiser, LatentShape, Modules, Network, Recipe
from components.data.loader import DataError, check_item
from components.diffusion.flow import Flow, dimension_shift
from components.distributed.materialize import NoRandom
from components.nn.last_layer import LastLayer
from components.nn.latent_norm import LatentNorm
from components.optim.ema import frozen_copy
from trainer.config import Config, ConfigError, PluginTable
from trainer.config.schema import OptimizerTable
from trainer.run.first_use import attribute_fault
from trainer.run.parts import Parts
from trainer.run.prepare import seeded


def construct_parts(
    config: Config,
    dataset: Dataset | None = None,
    *,
    recipe: Recipe | None = None,
    uses: frozenset[str] | None = None,
    loaded: Collection[str] = (),
    on_meta: bool = False,
) -> Parts:
    """Construct the recipe and the modules that it uses, each once: tokenizer, losses, denoiser, encoders, heads.

    Args:
        config: the run's config.
        dataset: source of the number of classes; None if it was not built.
        recipe: if it is constructed already.
        uses: fields of ``Modules`` to construct in addition to the tokenizer; None: ``recipe.uses``.
        loaded: names of modules whose weights the caller loads, so that no initial ones are drawn.
        on_meta: construct all modules on the meta device, also those that do not initialize themselves.

    Raises:
        ConfigError: for settings that cannot work together; the message names the keys.
    """
    with torch.device("meta") if on_meta else contextlib.nullcontext():
        recipe = make_plugin("recipe", "recipe", config.recipe) if recipe is None else recipe
        whole, uses = uses is None, recipe.uses if uses is None else uses
        m, places = Modules(), {}

        m.tokenizer = _network(config, "tokenizer", "tokenizer", config.tokenizer, loaded=loaded)
        latent = _latent(config, m)
        if whole:
            _check_trainable(config, recipe, m)
        shift = dimension_shift(latent) if config.flow.shift == "auto" else config.flow.shift
        m.flow = Flow(config.flow.path, config.flow.time, config.flow.time_mean, config.flow.time_std, shift)
        for label, table in config.losses.items():
            places |= _add_loss(config, m, label, table, uses)
        num_classes = _num_classes(config, dataset, needed="denoiser" in uses)
        if uses & {"denoiser", "encoders"}:
            denoiser = _denoiser(config, latent, num_classes, loaded, discard="denoiser" not in uses)
            if "encoders" in uses:
                _add_encoders(config, m, denoiser.grid)
            if "denoiser" in uses:
                m.denoiser = denoiser
                with seeded(config.training.seed, "latent_norm"), torch.device("meta"):
                    norm = config.latent_norm
                    m.latent_norm = LatentNorm(
                        latent.channels,
                        positions=latent[1:] if norm.per_position else None,
                        momentum=norm.momentum,
                        eps=norm.eps,
                        fixed=norm.fixed,
                    )
                if "heads" in uses:
                    m.heads = _heads(config, recipe, m)
        if "reconstruction" in uses and not m.reconstruction:
            raise ConfigError(f"recipe.name = '{config.recipe.name}' needs a reconstruction loss, such as [losses.l1]")
        if whole and m.discriminator is not None and m.discriminator.adaptive:
            m.last_layer = _last_layer(config, recipe, m, places)
        if whole:
            try:
                recipe.check(m)
            except ValueError as error:
                raise ConfigError(str(error)) from error
            m.copies = {name: frozen_copy(m.named()[source]) for name, source in recipe.copies.items()}
    tables = [place for place, names in (("denoiser", config.denoiser), ("encoders", config.encoders)) if names]
    unused = [place for place in tables if place not in uses]
    return Parts(recipe, m, dataset, num_classes, latent, {n: places.get(n, n) for n in m.named()}, unused)


def make_plugin(place: str, kind: str, table: PluginTable | OptimizerTable, *given: Any) -> Any:
    """Construct a plugin from its config table.

    Raises:
        ConfigError: its constructor raises ValueError, or it lacks an attribute of its contract; names the table.
    """
    try:
        part = registry.KINDS[kind].get(table.name).cls(*given, **table.options)
    except ValueError as error:
        message = str(error)
        raise ConfigError(message if place.split(".")[0] in message else f"[{place}] {message}") from error
    if fault := attribute_fault(part):
        raise ConfigError(f"[{place}] {registry.title(part)} {fault}")
    return part


def make_dataset(config: Config) -> Dataset:
    """Construct the config's dataset, and read one item to check it.

    Raises:
        DataError: there are no images, or the item is not as the contract says.
    """
    dataset = make_plugin("dataset", "dataset", config.dataset, config.training.resolution)
    check_first_item(dataset, config)
    return dataset


def check_first_item(dataset: Dataset, config: Config) -> None:
    """Raise DataError if the dataset is empty, or its first item is not as the contract says."""
    if not len(dataset):
        raise DataError(f"{registry.title(dataset)} is empty: its length is 0")
    check_item(dataset[0], dataset, 0, config.training.resolution)


def trained_modules(recipe: Recipe | type[Recipe]) -> set[str]:
    """Return the names of the modules that the recipe trains."""
    return {name for members in recipe.trains.values() for name in members}


def _network(
    config: Config,
    place: str,
    kind: str,
    table: PluginTable,
    *given: Any,
    on_meta: bool | None = None,
    loaded: Collection[str] = (),
) -> Any:
    """Construct a network.

    Args:
        on_meta: on the meta device; None: if it initializes itself.
        loaded: places of networks that need no initial weights.
    """
    cls = registry.KINDS[kind].get(table.name).cls
    deferred = (issubclass(cls, Network) and cls.initializes_itself()) if on_meta is None else on_meta
    with (
        seeded(config.training.seed, place),
        torch.device("meta") if deferred else contextlib.nullcontext(),
        NoRandom() if deferred or place in loaded else contextlib.nullcontext(),  # on meta, drawing nothing is slow
    ):
        return make_plugin(place, kind, table, *given)


def _latent(config: Config, m: Modules) -> LatentShape:
    """Shape of one latent.

    Raises:
        ConfigError: the resolution does not fit the tokenizer.
    """
    resolution, factor = config.training.resolution, m.tokenizer.factor
    if resolution % factor:
        below = resolution // factor * factor
        raise ConfigError(
            f"training.resolution = {resolution}: not divisible by the tokenizer's factor of {factor}; "
            f"the nearest valid sizes are {f'{below} and {below + factor}' if below else factor}"
        )
    if m.tokenizer.resolution not in (None, resolution):
        raise ConfigError(
            f"tokenizer.resolution = {m.tokenizer.resolution}, but training.resolution = {resolution}; make them equal"
        )
    return LatentShape(m.tokenizer.channels, resolution // factor, resolution // factor)


def _check_trainable(config: Config, recipe: Recipe, m: Modules) -> None:
    """Raise ConfigError if the recipe trains parts of the tokenizer that it does not allow to be trained."""
    if "tokenizer" not in trained_modules(recipe):
        return
    name = config.tokenizer.name
    if not m.tokenizer.trainable:
        option = "trainable" in registry.tokenizers.get(name).options
        why = "has tokenizer.trainable = false" if option else "has nothing to train"
        remedy = "set it to true, or choose" if option else "choose"
        fit = [r.name for r in registry.recipes if "tokenizer" not in trained_modules(r.cls)]
        raise ConfigError(
            f"recipe.name = '{config.recipe.name}' trains the tokenizer, but '{name}' {why}; {remedy} a recipe that "
            f"does not train it ({', '.join(fit)})"
        )
    if m.tokenizer.frozen_encoder and not recipe.trains_decoder_alone:
        fit = [r.name for r in registry.recipes if r.cls.trains_decoder_alone]
        raise ConfigError(
            f"recipe.name = '{config.recipe.name}' trains the tokenizer's encoder, but that of '{name}' is frozen; "
            f"choose a recipe that trains only the decoder ({', '.join(fit)})"
        )
    if recipe.trains_decoder_alone and not m.tokenizer.frozen_encoder:
        fit = [t.name for t in registry.tokenizers if t.cls.frozen_encoder]
        raise ConfigError(
            f"recipe.name = '{config.recipe.name}' trains only the decoder, but the encoder of '{name}' is trainable; "
            f"choose a tokenizer with a frozen encoder ({', '.join(fit)})"
        )


def _last_layer(config: Config, recipe: Recipe, m: Modules, places: dict[str, str]) -> LastLayer | None:
    """The tokenizer's last layer, for an adversarial loss whose weight adapts; None if the tokenizer does not learn."""
    if "tokenizer" not in trained_modules(recipe):
        return None
    layer = m.tokenizer.last_layer()
    if layer is None:
        raise ConfigError(
            f"[{places['discriminator']}] adaptive = true needs the decoder's last layer, which tokenizer "
            f"'{config.tokenizer.name}' does not name (last_layer); set it to false"
        )
    return LastLayer(layer)


def _add_loss(config: Config, m: Modules, label: str, table: PluginTable, uses: frozenset[str]) -> dict[str, str]:
    """Construct a loss if the recipe uses its kind; returns its place in the config by its name in ``m``."""
    place, role = f"losses.{label}", registry.losses.get(table.name).cls.role
    if role not in uses:
        return {}
    fields = vars(m)
    if role != "reconstruction" and fields[role] is not None:
        raise ConfigError(f"[{place}]: a run takes one {role} loss, but the config has two; remove one")
    loss = _network(config, place, "loss", table)
    if role == "reconstruction":
        m.reconstruction[label] = loss
        return {f"reconstruction.{label}": place}
    fields[role] = loss
    return {role: place}


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


def _denoiser(
    config: Config, latent: LatentShape, num_classes: int, loaded: Collection[str], discard: bool
) -> Denoiser:
    """Construct the denoiser; only for its grid, without memory, if it is discarded."""
    if config.denoiser is None:
        raise ConfigError(f"recipe.name = '{config.recipe.name}' needs a [denoiser] table with a name")
    given = latent, num_classes or 1
    return _network(config, "denoiser", "denoiser", config.denoiser, *given, on_meta=discard or None, loaded=loaded)


def _add_encoders(config: Config, m: Modules, grid: int) -> None:
    for label, table in config.encoders.items():
        m.encoders[label] = _network(config, f"encoders.{label}", "encoder", table, config.training.resolution, grid)
        m.encoder_weights[label] = table.weight
    if not m.encoders:
        raise ConfigError(
            f"recipe.name = '{config.recipe.name}' needs an [encoders.NAME] table, such as [encoders.dinov2]"
        )


def _heads(config: Config, recipe: Recipe, m: Modules) -> nn.ModuleList:
    if m.alignment is None:
        raise ConfigError(f"recipe.name = '{config.recipe.name}' needs an alignment loss: [losses.cosine]")
    dims = recipe.head_dims(m)
    for device in (torch.device("meta"), torch.device("cpu")):
        with seeded(config.training.seed, "heads"), device:
            heads = m.alignment.make_heads(m.denoiser.width, dims, m.denoiser.grid)
        if all(isinstance(head, Network) and head.initializes_itself() for head in heads):
            return heads
    return heads  # heads that do not initialize themselves, on the CPU
