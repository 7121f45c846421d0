"""Checks that a latent cache fits a run, and the dataset of a run that trains on a cache."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from components import registry
from components.contracts import Dataset, Recipe
from components.data.classes import Classes
from components.files.fingerprint import fingerprint
from components.latent_cache.cache import LatentCache
from components.latent_cache.dataset import CachedDataset, CachedEncoder
from trainer.config import Config, ConfigError, PluginTable, named_files, weights_key

if TYPE_CHECKING:
    from trainer.run.parts import Parts

PROBES, PROBE_SIDE = 4, 8  # images that identify a dataset, and the side of their small copies in pixels
TOLERANCE = 3  # of 255; image decoders differ


def check_recipe(config: Config, recipe: Recipe) -> None:
    """Raise ConfigError if the config names a cache and the recipe cannot train on one."""
    if config.latent_cache.path and not recipe.cached_latents:
        why = "trains the tokenizer" if "tokenizer" in recipe.uses & set().union(*recipe.trains.values()) else (
            "does not declare cached_latents = True"
        )  # fmt: skip
        raise ConfigError(
            f"latent_cache.path = '{config.latent_cache.path}': the recipe '{config.recipe.name}' {why}, so it needs "
            f'images; set latent_cache.path = "", or choose a recipe that trains on cached latents: {_able()}'
        )


def open_cache(config: Config) -> LatentCache | None:
    """Open the cache of a run, or return None if it trains on images.

    Raises:
        DataError: the cache is incomplete or damaged.
    """
    return LatentCache(config.latent_cache.path) if config.latent_cache.path else None


def features(config: Config, recipe: Recipe, cache: LatentCache) -> list[str]:
    """Labels of the encoders whose features are read from the cache."""
    wanted = config.encoders if "encoders" in recipe.uses and config.latent_cache.features else ()
    return [label for label in wanted if label in cache.index["features"]]


def needs_images(config: Config, recipe: Recipe, cache: LatentCache) -> bool:
    """Whether images are read too: for encoders whose features are not read from the cache, or for their conditions."""
    if registry.datasets.get(config.dataset.name).cls.conditions:
        return True
    return "encoders" in recipe.uses and len(features(config, recipe, cache)) < len(config.encoders)


def dataset_on_cache(config: Config, parts: Parts, cache: LatentCache) -> CachedDataset:
    """Dataset of a run on a cache; replaces encoders in ``parts`` whose features are cached, which frees their memory.

    Args:
        parts: built, with weights; ``parts.images`` is the image dataset, if available.

    Raises:
        ConfigError: the cache does not fit this run; lists every difference and its remedy.
    """
    m, images = parts.modules, parts.images
    index, labels = cache.index, features(config, parts.recipe, cache)
    problems = _dataset_problems(config, index, images)
    here = fingerprint(m.tokenizer)
    if here != index["tokenizer"]["fingerprint"]:
        problems.append(
            f"it was encoded by another tokenizer:\n"
            f"    cache:     {_short(index['tokenizer']['fingerprint'])}, {index['tokenizer']['origin']}\n"
            f"    this run:  {_short(here)}, {origin('tokenizer', config.tokenizer)}\n"
            f"  Set {weights_key(config)} to the weights of the cache, or encode the dataset with this run's tokenizer"
        )
    elif tuple(parts.latent) != cache.latent:
        problems.append(f"its latents are {_times(cache.latent)}, but those of this run are {_times(parts.latent)}")
    flip = _flip(config, index, images)
    if flip and not cache.flipped:
        problems.append(
            "the dataset flips images, but the cache holds no mirrored copies; encode it again with --flip, or set "
            "dataset.flip = false"
        )
    for label in labels:
        problems += _encoder_problems(config, label, index["features"][label], parts)
    if problems:
        raise ConfigError(
            f"latent_cache.path = '{config.latent_cache.path}' does not fit this run:\n"
            + "\n".join(f"- {problem}" for problem in problems)
            + "\nTo make a cache: python -m trainer encode CONFIG --out FOLDER"
        )
    for label in labels:
        m.encoders[label] = CachedEncoder(m.encoders[label].embed_dim)
    read = images if needs_images(config, parts.recipe, cache) else None
    return CachedDataset(cache, read, flip=flip, features=labels)


def describe(kind: str, table: PluginTable) -> dict[str, Any]:
    """Name and options of a plugin as JSON, including defaults, excluding file paths and ``flip``.

    Paths differ between machines; fingerprints and probes compare the contents instead.
    """
    known = registry.KINDS[kind].get(table.name).options
    kept = [option for option in known.values() if not option.is_file and option.name != "flip"]
    options = {option.name: table.options.get(option.name, option.default) for option in kept}
    return json.loads(json.dumps({"name": table.name, "options": options}))


def origin(kind: str, table: PluginTable) -> str:
    """Human-readable origin of a part's weights."""
    files = named_files(kind, table)
    return f"{table.name} ({'weights of ' + ', '.join(files) if files else 'no checkpoint given'})"


def probes(dataset: Dataset) -> list[dict[str, Any]]:
    """Downscaled copies of a few images, evenly spaced over the dataset, to identify it; skips unreadable images."""
    found = []
    for index in sorted({(len(dataset) - 1) * i // (PROBES - 1) for i in range(PROBES)}):
        sample = dataset[index]
        if sample.unreadable is None:
            small = F.adaptive_avg_pool2d(sample.image.float(), PROBE_SIDE).round().int()
            found.append({"index": index, "label": sample.label, "pixels": small.flatten().tolist()})
    return found


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Differences between two JSON values, as "dtype: fp16 -> bf16"; omits values of more than 200 characters."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [d for k in {**old, **new} for d in differences(old.get(k), new.get(k), f"{key}.{k}".lstrip("."))]
    if old == new:
        return []
    shown = [json.dumps(value) for value in (old, new)]
    return [key if max(map(len, shown)) > 200 else f"{key}: {shown[0]} -> {shown[1]}"]


def _dataset_problems(config: Config, index: dict[str, Any], images: Dataset | None) -> list[str]:
    there = index["dataset"]
    here = describe("dataset", config.dataset) | {"resolution": config.training.resolution}
    recorded = {key: there[key] for key in here}
    if there["name"] == here["name"]:  # the plugin may have more options now; until then, it did what the defaults do
        defaults = describe("dataset", PluginTable(name=here["name"]))["options"]
        recorded["options"] = defaults | there["options"]
    problems = [
        f"it was made from another dataset (cache -> this run): {difference}"
        for difference in differences(recorded, here)
    ]
    if images is None or problems:
        return problems
    if changed := Classes(tuple(index["class_names"])).difference(Classes.of(images)):
        problems.append(f"its classes differ from those of the dataset (cache -> this run): {changed}")
    elif len(images) != index["count"]:
        problems.append(f"it holds {index['count']} images, the dataset has {len(images)}")
    elif not recognized(there["probes"], images):
        problems.append("its images differ from those of the dataset (a sample was compared)")
    return problems


def recognized(recorded: list[dict[str, Any]], images: Dataset) -> bool:
    """Whether a dataset has the images of which these are :func:`probes`, as far as they can be read."""
    seen = {probe["index"]: probe for probe in probes(images)}
    for probe in recorded:
        other = seen.get(probe["index"])
        if other is None:  # now unreadable
            continue
        apart = max(abs(a - b) for a, b in zip(probe["pixels"], other["pixels"]))
        if apart > TOLERANCE or probe["label"] != other["label"]:
            return False
    return True


def _flip(config: Config, index: dict[str, Any], images: Dataset | None) -> bool:
    if images is not None:
        return images.flip
    option = registry.datasets.get(config.dataset.name).options.get("flip")
    return index["dataset"]["flip"] if option is None else config.dataset.options.get("flip", option.default)


def _encoder_problems(config: Config, label: str, there: dict[str, Any], parts: Parts) -> list[str]:
    encoder, table = parts.modules.encoders[label], config.encoders[label]
    here = describe("encoder", table) | {"shape": [parts.modules.denoiser.grid**2, encoder.embed_dim]}
    found = differences({key: there[key] for key in here}, here)
    if not found:
        mine = fingerprint(encoder)
        if mine == there["fingerprint"]:
            return []
        here_from = origin("encoder", table)
        found = [f"weights {_short(there['fingerprint'])} ({there['origin']}) -> {_short(mine)} ({here_from})"]
    return [
        f"its features '{label}' come from another encoder (cache -> this run): {'; '.join(found)}\n"
        "  Encode again with --features, or set latent_cache.features = false to compute features from images"
    ]


def _able() -> str:
    return ", ".join(p.name for p in registry.recipes if p.cls.cached_latents)


def _short(digest: str) -> str:
    return f"sha256 {digest[:12]}"


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)
