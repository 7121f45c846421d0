"""Cost of one training step of a config on one GPU of a given number, traced on fake tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from components.contracts import Batch, RandomNumbers
from components.diffusion.random_numbers import placeholders
from components.distributed.parallel import World
from trainer.config import Config
from trainer.estimate.fake_ranks import cuda_autocast, held_tensors, pretended_ranks, prime
from trainer.estimate.memory_tracker import GATHERED, TEMPORARY, StepTracker, Traffic
from trainer.run import assemble
from trainer.run.construct import trained_modules
from trainer.run.monitor.flops import never_stop
from trainer.run.parts import Parts
from trainer.run.prepare import Preparation, mesh_shape
from trainer.run.step import make_step

PARAMETERS = "trained parameters"
GRADIENTS = "gradients"
STATES = "optimizer states"
AVERAGES = "averages (EMA)"
FROZEN = "frozen parts"
KINDS = (PARAMETERS, GRADIENTS, STATES, AVERAGES, FROZEN, GATHERED, TEMPORARY)
OFFLOADED = (PARAMETERS, GRADIENTS, STATES, AVERAGES)


@dataclass(frozen=True)
class Cost:
    """Cost of one step on one GPU.

    Attributes:
        parts: the run's parts, without weights.
        mesh: (replicate, shard) sizes of the device mesh.
        images: per micro-batch on this GPU.
        peak: bytes by kind at the moment of peak GPU memory.
        most: maximum bytes of each kind at any moment.
        flops: including recomputation; a multiply-add counts as two.
        traffic: bytes sent by this GPU.
    """

    parts: Parts
    mesh: tuple[int, int]
    images: int
    peak: dict[str, int]
    most: dict[str, int]
    flops: int
    traffic: Traffic

    @property
    def total(self) -> int:
        return sum(self.peak.values())


def dry_run(config: Config, world_size: int, local_size: int, bf16: bool) -> Cost:
    """Build the run as rank 0 would and run one full step on fake tensors, without torch.compile.

    Args:
        local_size: ranks per machine.
        bf16: use bf16 autocast, and gather sharded weights in bf16.

    Raises:
        ConfigError: a config that a real run would also refuse.
    """
    with StepTracker():  # returns 0 where code reads a value
        parts = assemble.check(config, world_size, local_size)
    mesh = mesh_shape(config, world_size, local_size)
    config = _changed(config, "training", compile=False)
    dtype = torch.bfloat16 if bf16 else None
    world = World(0, world_size, torch.device("cpu"), local_size)
    with pretended_ranks(world_size):
        _prepare(config, parts, world, dtype)
        tracker = StepTracker(local_size)
        with FakeTensorMode(allow_non_fake_inputs=True):
            named = parts.modules.named()
            for module in (*named.values(), *parts.averages.values()):
                module.to_empty(device=world.device)
            count = min(config.training.accumulation, 2)
            step = make_step(config, parts, world.device, accumulation=count, bf16=bf16)
            groups = step.groups
            trained = {member for group in groups.values() for member in group.modules}
            tracker.hold(FROZEN, held_tensors(m for name, m in named.items() if name not in trained))
            tracker.hold(PARAMETERS, held_tensors(m for name, m in named.items() if name in trained))
            tracker.hold(AVERAGES, held_tensors(parts.averages.values()))
            for group in groups.values():
                tracker.hold(STATES, prime(group.optimizer))
                _watch_gradients(tracker, group)
            with tracker, cuda_autocast():
                # In the last step, losses that start late are active; never_stop keeps those that stop early.
                never_stop(parts)
                step(config.training.steps - 1, micro_batches(config, parts, world, count, tracker))
    images = config.training.batch_size // (world_size * config.training.accumulation)
    on_host = OFFLOADED if config.parallel.cpu_offload else ()
    return Cost(parts, mesh, images, *tracker.peak(on_host), tracker.flops, tracker.traffic)


def _prepare(config: Config, parts: Parts, world: World, dtype: torch.dtype | None) -> None:
    """Like :func:`trainer.run.assemble.prepare`, with all parts on the meta device."""
    prepare = _Weightless(config, trained_modules(parts.recipe), world, files=False)
    if prepare.sharding is not None:
        # One fake device stands for both GPU and host; the kind of a tensor decides where it lives.
        prepare.sharding = dataclasses.replace(prepare.sharding, param_dtype=dtype, cpu_offload=False)
    prepare.config = _changed(config, "parallel", cpu_offload=False)
    prepare.world = dataclasses.replace(world, device=torch.device("meta"))
    with StepTracker(), torch.device("meta"):
        prepare(parts)


class _Weightless(Preparation):
    """Skips weight initialization, also for parts that are normally created on the CPU."""

    def place(self, place: str, role: str, networks: list[nn.Module], *rest: bool, **how: bool) -> None:
        for network in networks:
            network.init_weights = lambda: None
        super().place(place, role, networks, *rest, **how)


def _watch_gradients(tracker: StepTracker, group) -> None:
    def before_step(*_) -> None:
        tracker.hold(GRADIENTS, (p.grad for p in group.parameters))

    group.optimizer.register_step_pre_hook(before_step)


def micro_batches(
    config: Config, parts: Parts, world: World, count: int, tracker: StepTracker | None = None
) -> Iterator[tuple[Batch, RandomNumbers]]:
    """Yield random images and random numbers of one rank.

    Args:
        count: number of micro-batches. If it is less than ``training.accumulation``, the first one represents all
            that are left out; two suffice, since gradients exist from the second on.
        tracker: its ``repeats`` is set to the number of micro-batches that each one represents.
    """
    t = config.training
    size = t.batch_size // (world.size * t.accumulation)
    where = {"device": world.device}
    for index in range(count):
        if tracker is not None:
            tracker.repeats = t.accumulation - count + 1 if index == 0 else 1
        images = torch.rand(size, 3, t.resolution, t.resolution, **where)
        condition = parts.example_condition(size, world.device)
        yield Batch(images, condition), placeholders(parts.random_numbers, size, **where)


def _changed(config: Config, table: str, **values: object) -> Config:
    return config.model_copy(update={table: dict(config)[table].model_copy(update=values)})
