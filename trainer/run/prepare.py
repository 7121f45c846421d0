"""One module's way from its constructor to its place: recompute, compile, shard, initialize, load."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from components.diffusion.draws import generator
from components.distributed import parallel
from components.distributed.activation_checkpoint import Recompute, apply_recompute, backend_within
from components.distributed.materialize import allocate, materialize
from components.distributed.parallel import ParallelError, Sharding, World
from components.files.weights import WeightsError
from components.optim.ema import frozen_copy
from trainer.config import Config, ConfigError

# What the contracts call besides `forward`.
METHODS = {"tokenizer": ("encode", "decode"), "denoiser": ("tokens",), "encoders": ("embed",)}
# Roles of convolutional networks, which take the layout of the images.
CONVOLUTIONAL = ("tokenizer", "discriminator", "recon")


def mesh_shape(config: Config, world_size: int, local_size: int) -> tuple[int, int]:
    """(replicate, shard) of a run; ConfigError where its ranks cannot be arranged."""
    p = config.parallel
    try:
        return parallel.mesh_shape(p.strategy, world_size, p.shard or min(local_size, world_size))
    except ParallelError as error:
        raise ConfigError(str(error)) from error


def make_sharding(config: Config, world: World) -> Sharding | None:
    """Where modules go; None: whole, on a single process."""
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
    """bf16 on a GPU where the config asks for it."""
    return torch.bfloat16 if config.training.precision == "bf16" and device.type == "cuda" else None


def image_format(config: Config) -> dict[str, Any]:
    """How a training step takes its images: ``image_dtype`` and ``memory_format`` of :class:`trainer.run.step.Step`."""
    layout = torch.channels_last if config.training.channels_last else torch.contiguous_format
    dtype = torch.float64 if config.training.precision == "fp64" else torch.float32
    return {"image_dtype": dtype, "memory_format": layout}


@contextlib.contextmanager
def seeded(seed: int, place: str) -> Iterator[None]:
    """Each part's initial weights depend on the seed and its own place only, not on what was built before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "weights", place).initial_seed())
        yield


def construct(seed: int, place: str, make: Callable[[], Any], on_meta: bool) -> Any:
    """Calls a constructor, on the meta device if what it makes initializes itself later (``init_weights``)."""
    with seeded(seed, place), torch.device("meta") if on_meta else contextlib.nullcontext():
        return make()


class Preparation:
    """Puts modules where a run needs them, one after the other, so that no rank ever holds a large one whole.

    Args:
        config: of the run.
        trained: names of the modules that learn, as in the recipe's ``trains``.
        world: this process.
        files: False reads no weights: frozen parts are random, for timing.
        backend: of torch.compile.

    Attributes:
        missing: what could not be read, each with how to get it.
        copies: averages of modules, by role, sharded alike; not yet equal to them.
    """

    def __init__(
        self, config: Config, trained: set[str], world: World, files: bool = True, backend: str = "inductor"
    ) -> None:
        self.config, self.trained, self.world, self.files, self.backend = config, trained, world, files, backend
        self.sharding = make_sharding(config, world)
        self.missing: list[str] = []
        self.copies: dict[str, nn.Module] = {}

    def __call__(self, place: str, role: str, module: nn.Module) -> None:
        """Prepares one module.

        Args:
            place: its table in the config, which seeds its weights.
            role: its field in :class:`components.contracts.Modules`.
            module: as constructed, on the CPU or on the meta device.
        """
        learns = role.split(".")[0] in self.trained
        module.train(learns)
        if not learns:
            module.requires_grad_(False)
        if self.config.training.precision == "fp64":
            module.to(torch.float64)
        if averaged(self.config, self.trained, role):
            self.copies[role] = frozen_copy(module)
        # A list (of alignment heads) is no network, its items are.
        networks = list(module) if isinstance(module, nn.ModuleList) else [module]
        recompute = Recompute.parse(getattr(self.config.activation_checkpoint, role, "none"))
        for network in networks:
            if learns:
                apply_recompute(network, recompute)
            if self.config.training.compile and any(True for _ in network.parameters()):
                parallel.compile_units(network, backend_within(recompute.budget, self.backend))
        self.place(place, role, networks, learns)
        if role in self.copies:
            copy = self.copies[role]
            self.place(place, role, list(copy) if isinstance(copy, nn.ModuleList) else [copy], False, is_copy=True)
        if self.files and hasattr(module, "load_weights"):
            try:
                module.load_weights()
            except WeightsError as error:
                self.missing.append(str(error))

    def place(self, place: str, role: str, networks: list[nn.Module], learns: bool, is_copy: bool = False) -> None:
        """Shards networks, or not, and gives them memory and initial weights.

        Args:
            networks: of one role, as the heads.
            learns: a backward pass follows their forward passes.
            is_copy: they are averages, which get their values later.
        """
        p, device = self.config.parallel, self.world.device
        sharding = self.sharding
        if sharding is not None and not learns:
            # An average lives where its source does: in the same shards, or on the host. What else is not trained
            # needs no wrapping unless it is to be cut.
            cut = sharding.shape[1] > 1
            wrapped = (cut or sharding.cpu_offload) if is_copy else (cut and p.shard_frozen)
            sharding = sharding if wrapped else None
        for index, network in enumerate(networks):
            sharded = sharding is not None and any(True for _ in network.parameters())
            on_meta = any(t.is_meta for t in (*network.parameters(), *network.buffers()))
            if not on_meta:
                network.to(device)
            if sharded:
                methods = [name for name in METHODS.get(role.split(".")[0], ()) if hasattr(network, name)]
                parallel.shard(network, sharding, methods, learns)
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
            # Sharded weights must be contiguous; convolutions then follow the layout of the images.
            convolutional = role.startswith(CONVOLUTIONAL)
            if self.config.training.channels_last and convolutional and not sharded:
                network.to(memory_format=torch.channels_last)


def averaged(config: Config, trained: set[str], role: str) -> bool:
    """Whether a run keeps an average of a module: the denoiser's side always, the tokenizer on request."""
    if role == "tokenizer":
        return config.ema.tokenizer and role in trained
    return role in ("denoiser", "heads", "latent_norm")
