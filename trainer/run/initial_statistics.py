"""Initial statistics of the latent norm: from a file, a latent cache, or the first training images."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from components.contracts import Distribution, Tokenizer
from components.data.loader import make_loader
from components.data.pixels import to_float
from components.diffusion.random_numbers import draw
from components.distributed.parallel import World
from components.files import weights_file
from components.files.weights import WeightsError, local_file, read_state
from components.files.weights_file import stated_statistics
from components.latent_cache.dataset import CachedDataset
from components.nn.precision import parameter_dtype
from trainer.config import Config, ConfigError
from trainer.run.first_use import checked
from trainer.run.parts import Parts


def read_statistics(path: str) -> tuple[Tensor, Tensor]:
    """Read mean and standard deviation per latent channel, (C,) each, or per channel and position, (C, h, w).

    Args:
        path: file with tensors ``mean`` and ``std``, or ``mean`` and ``var`` (published RAE files), or ``latents_bias``
            and ``latents_scale`` = 1 / std (published REPA-E files), or ``running_mean`` and ``running_var`` (latent
            norms written by export); or a diffusers folder, or its config.json, with ``latents_mean`` and
            ``latents_std``, or else ``shift_factor`` and ``scaling_factor`` = 1 / std; of FLUX.2, the batch norm among
            its weights.

    Raises:
        ConfigError: the file is missing or holds no such pair.
    """
    try:
        file = local_file(path, "latent_norm.statistics")
        if file.is_dir() or file.suffix == ".json":
            return _read_diffusers(file / "config.json" if file.is_dir() else file, path)
        state = read_state(file, "latent_norm.statistics")
    except WeightsError as error:
        raise ConfigError(str(error)) from error
    if {"latents_bias", "latents_scale"} <= state.keys():
        return state["latents_bias"].flatten(), 1.0 / state["latents_scale"].flatten()
    if {"mean", "std"} <= state.keys():
        return state["mean"], state["std"]
    for mean, variance in (("mean", "var"), ("running_mean", "running_var")):
        if {mean, variance} <= state.keys():
            return state[mean], state[variance].sqrt()
    raise ConfigError(
        f"latent_norm.statistics = '{path}': expected tensors mean and std, mean and var, latents_bias and "
        f"latents_scale, or running_mean and running_var; found {', '.join(sorted(state))}"
    )


def _read_diffusers(file: Path, path: str) -> tuple[Tensor, Tensor]:
    what = f"latent_norm.statistics = '{path}'"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        found = stated_statistics(about)
        if found is None and "batch_norm_eps" in about:
            found = stated_statistics(about, weights_file.read(file.parent, "latent_norm.statistics").tensors)
    except OSError as error:
        raise ConfigError(f"{what}: '{file}' cannot be read ({error.strerror}); expected a diffusers folder") from error
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{what}: '{file}' is not the JSON of a diffusers autoencoder: {error}") from error
    if found is None:
        raise ConfigError(
            f"{what}: '{file}' states neither latents_mean and latents_std nor scaling_factor; leave the option empty "
            "to measure the statistics"
        )
    return found


@torch.no_grad()
def measure_statistics(config: Config, parts: Parts, world: World) -> tuple[Tensor, Tensor]:
    """Measure mean and standard deviation of z over the first training images: (C,), or (C, h, w) if per position.

    The result is the same for every world size. Cost: encodes ``latent_norm.images`` images, divided among the ranks.
    """
    tokenizer = checked(parts.modules, parts.places).tokenizer
    batch_size, declared = config.training.batch_size, {"posterior": Distribution("normal", parts.latent)}
    loader = make_loader(
        parts.dataset, seed=config.training.seed, batch_size=batch_size, rank=world.rank, world=world.size,
        resolution=config.training.resolution,
    )  # fmt: skip
    positions = loader.batch_sampler.positions()
    per_position = config.latent_norm.per_position
    shape = parts.latent if per_position else parts.latent[:1]
    total = torch.zeros(3, *shape, dtype=torch.float64, device=world.device)
    for loaded, position in zip(loader, positions):
        if position >= max(config.latent_norm.images, batch_size):
            break
        step, first = divmod(position, batch_size)
        here = range(first, first + len(loaded.images))
        # Negative step: training must not reuse these random numbers.
        noise = draw(config.training.seed, -1 - step, here, batch_size, declared)["posterior"]
        # As many images at once as in a step, whose memory is known to suffice.
        pieces = zip(loaded.images.chunk(config.training.accumulation), noise.chunk(config.training.accumulation))
        z = [_encode(tokenizer, images.to(world.device), part.to(world.device)) for images, part in pieces]
        z = torch.cat(z).double()
        total += torch.stack([torch.ones_like(z), z, z.square()]).sum(dim=1 if per_position else (1, 3, 4))
    if world.size > 1:
        dist.all_reduce(total)
    count, first_moment, second_moment = total
    mean = first_moment / count
    return mean, (second_moment / count - mean.square()).clamp_min(1e-12).sqrt()


def _encode(tokenizer: Tokenizer, images: Tensor, noise: Tensor) -> Tensor:
    """Latents (b, C, h, w) of uint8 images (b, 3, R, R)."""
    return tokenizer.encode(to_float(images).to(parameter_dtype(tokenizer))).sample(noise)


def prepare_latent_norm(config: Config, parts: Parts, world: World) -> None:
    """Set the latent norm's running statistics before the first step of a new run.

    Raises:
        ConfigError: the statistics cannot be read or do not fit the latents.
    """
    if parts.modules.latent_norm is None:
        return
    path = config.latent_norm.statistics
    if path:
        mean, std = read_statistics(path)
    elif isinstance(parts.dataset, CachedDataset):
        cache = parts.dataset.cache
        mean, std = cache.position_statistics() if config.latent_norm.per_position else cache.statistics
    else:
        with torch.compiler.set_stance("force_eager"):  # once: compiling it takes longer
            mean, std = measure_statistics(config, parts, world)
    try:
        parts.modules.latent_norm.set_statistics(mean, std)
    except ValueError as error:
        raise ConfigError(f"latent_norm.statistics = '{path}': {error}") from error
