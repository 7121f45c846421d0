"""Prepares constructed modules: activation checkpointing, compile, sharding, initialization, pretrained weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from components.contracts import Network
from components.diffusion.random_numbers import generator
from components.distributed import parallel
from components.distributed.activation_checkpoint import Recompute, apply_recompute, backend_within
from components.distributed.materialize import allocate, materialize
from components.distributed.parallel import ParallelError, Sharding, World
from components.files.weights import WeightsError
from components.nn.precision import multiplies_in_bf16
from components.optim.ema import frozen_copy
from trainer.config import Config, ConfigError
from trainer.run.parts import Parts

# Roles of convolutional networks, which use channels_last if the config asks for it.
CONVOLUTIONAL = ("tokenizer", "discriminator", "recon")


def mesh_shape(config: Config, world_size: int, local_size: int) -> tuple[int, int]:
    """Return the mesh shape (replicate, shard); raise ConfigError if the ranks do not divide into one."""
    p = config.parallel
    try:
        return parallel.mesh_shape(p.strategy, world_size, p.shard or min(local_size, world_size))
    except ParallelError as error:
        raise ConfigError(str(error)) from error


def make_sharding(config: Config, world: World) -> Sharding | None:
    """Return how modules are sharded or replicated; None for a single process without CPU offload."""
    shape = mesh_shape(config, world.size, world.local_size)
    if world.size == 1:
        if not config.parallel.cpu_offload:
            return None
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    dtype = torch.bfloat16 if autocast_dtype(config, world.device) else None
    mesh = parallel.make_mesh(world.device.type, shape)
    return Sharding(mesh, dtype, config.parallel.reshard_after_forward, config.parallel.cpu_offload)


def autocast_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """Return bfloat16 for a bf16 run on a device that multiplies in it, otherwise None (no autocast)."""
    return torch.bfloat16 if config.training.precision == "bf16" and multiplies_in_bf16(device) else None


def precision_note(config: Config, device: torch.device) -> str | None:
    """Say what a bf16 run on a CPU computes in, and why; None for other runs."""
    if config.training.precision != "bf16" or device.type != "cpu":
        return None
    if autocast_dtype(config, device):
        return 'training.precision = "bf16": autocast, as this CPU multiplies in bf16 (AMX)'
    return 'training.precision = "bf16": computed in fp32, as this CPU has no fast bf16 products (AMX)'


def channels_last(config: Config, device: torch.device, compiled: bool | None = None) -> bool:
    """Whether convolutional networks of a run, compiled or not (None: as configured), use channels-last layout."""
    chosen = config.training.channels_last
    if chosen != "auto":
        return chosen
    return device.type != "cuda" or (config.training.compile if compiled is None else compiled)


def image_format(config: Config, device: torch.device) -> dict[str, Any]:
    """Return ``image_dtype`` and ``memory_format``, keyword arguments of :class:`trainer.run.step.Step`."""
    layout = torch.channels_last if channels_last(config, device) else torch.contiguous_format
    dtype = torch.float64 if config.training.precision == "fp64" else torch.float32
    return {"image_dtype": dtype, "memory_format": layout}


@contextlib.contextmanager
def seeded(seed: int, place: str) -> Iterator[None]:
    """Seed torch from (seed, place) inside the context: initial weights do not depend on construction order."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "weights", place).initial_seed())
        yield


# The largest modules come last, so that a missing file is reported before they are allocated.
LAST = ("denoiser", "latent_norm", "heads")


class Preparation:
    """Prepares the modules of a run; modules on the meta device are sharded before they get memory.

    Args:
        config: the run's config.
        trained: names of the trained modules, as in the recipe's ``trains``.
        world: rank, world size and device of this process.
        files: if False, read no weights; frozen modules are random. Used for timing.
        backend: torch.compile backend.
    """

    def __init__(
        self, config: Config, trained: set[str], world: World, files: bool = True, backend: str = "inductor"
    ) -> None:
        self.config, self.trained, self.world, self.files, self.backend = config, trained, world, files, backend
        self.sharding = make_sharding(config, world)

    def __call__(self, parts: Parts) -> None:
        """Prepare all modules of ``parts`` in place, with copies for the EMA and for the recipe.

        Raises:
            ConfigError: files are missing; lists them.
        """
        named = {name: module for name, module in parts.modules.named().items() if not name.startswith("copies.")}
        for name in sorted(named, key=lambda name: name in LAST):
            if name in LAST and parts.missing:
                break
            copies = [parts.modules.copies[key] for key, source in parts.recipe.copies.items() if source == name]
            try:
                self.prepare(parts, name, named[name], copies)
            except WeightsError as error:
                parts.missing.append(str(error))
        if parts.missing:
            raise ConfigError("this run needs files that do not exist:\n" + "\n".join(f"- {m}" for m in parts.missing))
        parts.reset_copies()
        parts.modules.state = parts.recipe.init_state(parts.modules)

    def prepare(self, parts: Parts, role: str, module: nn.Module, copies: Sequence[nn.Module]) -> None:
        """Prepare one module in place, and its ``copies`` for the recipe.

        Args:
            role: its name in ``parts.modules.named()``.

        Raises:
            WeightsError: its weights cannot be loaded.
        """
        learns, place = role.split(".")[0] in self.trained, parts.places[role]
        module.train(learns)
        if not learns:
            module.requires_grad_(False)
        if self.config.training.precision == "fp64":
            for each in (module, *copies):
                each.to(torch.float64)
        if averaged(self.config, self.trained, role):
            parts.averages[role] = frozen_copy(module)
        networks = _networks(module)
        recompute = Recompute.parse(self.recomputation(role))
        for network in networks:
            if learns:
                apply_recompute(network, recompute)
        if self.config.training.compile:
            for network in [*networks, *(network for each in copies for network in _networks(each))]:
                if any(True for _ in network.parameters()):
                    parallel.compile_units(network, backend_within(recompute.budget, self.backend))
        self.place(place, role, networks, learns)
        for each in (*copies, *([parts.averages[role]] if role in parts.averages else [])):
            self.place(place, role, _networks(each), False, is_copy=True)
        if self.files and isinstance(module, Network):
            module.load_weights()

    def recomputation(self, role: str) -> str:
        """The setting of [activation_checkpoint] for a module; "none" if there is no such key."""
        return self.config.activation_checkpoint.model_dump().get(role, "none")

    def place(self, place: str, role: str, networks: list[nn.Module], learns: bool, is_copy: bool = False) -> None:
        """Shard networks if the run needs it, allocate them on the device, and initialize those on the meta device.

        Args:
            place: the module's table in the config; initial weights are seeded with it.
            role: the module's field in :class:`components.contracts.Modules`.
            networks: the networks of this role: one, or several heads.
            learns: whether the networks are trained.
            is_copy: the networks are EMA copies: allocated, but not initialized.
        """
        p, device = self.config.parallel, self.world.device
        sharding = self.sharding
        if sharding is not None and not learns:
            # EMA copies are sharded or offloaded like their sources. Other frozen modules are wrapped only if they
            # are split across ranks.
            cut = sharding.shape[1] > 1
            wrapped = (cut or sharding.cpu_offload) if is_copy else (cut and p.shard_frozen)
            sharding = sharding if wrapped else None
        for index, network in enumerate(networks):
            sharded = sharding is not None and any(True for _ in network.parameters())
            on_meta = any(t.is_meta for t in (*network.parameters(), *network.buffers()))
            if not on_meta:
                network.to(device)
            if sharded:
                parallel.shard(network, sharding, learns)
            if on_meta:
                param_device = torch.device("cpu") if sharded and p.cpu_offload else None
                if is_copy:
                    allocate(network, device, param_device)
                else:
                    with seeded(self.config.training.seed, place if len(networks) == 1 else f"{place}.{index}"):
                        materialize(network, device, param_device)
            if not self.files and not learns:
                for parameter in network.parameters():
                    nn.init.normal_(parallel.local(parameter), std=0.02)
            # FSDP needs contiguous weights; a sharded convolution takes its layout from its input instead.
            convolutional = role.startswith(CONVOLUTIONAL)
            if convolutional and not sharded and channels_last(self.config, device):
                network.to(memory_format=torch.channels_last)


def _networks(module: nn.Module) -> list[nn.Module]:
    """The module itself, or the items of an ``nn.ModuleList`` (the alignment heads), which has no forward."""
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def averaged(config: Config, trained: set[str], role: str) -> bool:
    """Return whether a module has an EMA: denoiser, heads, latent norm; with ``ema.tokenizer`` a trained tokenizer."""
    if role == "tokenizer":
        return config.ema.tokenizer and role in trained
    return role in ("denoiser", "heads", "latent_norm")
