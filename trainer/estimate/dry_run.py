"""One training step of a config as one of any number of GPUs would run it, without the GPUs: what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from components.contracts import Batch, Draws
from components.distributed.parallel import World
from trainer.config import Config
from trainer.estimate.fake_ranks import cuda_autocast, held_tensors, pretended_ranks, prime
from trainer.estimate.memory_tracker import GATHERED, TEMPORARY, StepTracker, Traffic
from trainer.run import assemble
from trainer.run.monitor.flops import never_stop
from trainer.run.parts import Parts
from trainer.run.prepare import Preparation, mesh_shape
from trainer.run.step import make_step

PARAMETERS = "parameters that learn"
GRADIENTS = "gradients"
STATES = "AdamW states"
AVERAGES = "averages (EMA)"
FROZEN = "frozen parts"
KINDS = (PARAMETERS, GRADIENTS, STATES, AVERAGES, FROZEN, GATHERED, TEMPORARY)
OFFLOADED = (PARAMETERS, GRADIENTS, STATES, AVERAGES)


@dataclass(frozen=True)
class Cost:
    """Of one step on one GPU.

    Attributes:
        parts: what was built, without weights.
        mesh: (replicate, shard).
        images: per micro-batch.
        peak: bytes by kind when most were live on the GPU.
        most: bytes of each kind at the time when most of it was live.
        flops: recomputation included; a multiply-add counts as two.
        traffic: bytes sent.
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
    """Builds the run as its first rank would, and runs one whole step on tensors without data, not compiled.

    Args:
        local_size: ranks per machine.
        bf16: autocast, and weights gathered in bf16.

    Raises:
        ConfigError: a combination that a run refuses, too.
    """
    assemble.check(config, world_size, local_size)
    mesh = mesh_shape(config, world_size, local_size)
    config = _changed(config, "training", compile=False)
    dtype = torch.bfloat16 if bf16 else None
    world = World(0, world_size, torch.device("cpu"), local_size)
    with pretended_ranks(world_size):
        parts = _build(config, world, dtype)
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
                # The last step: losses that start late take part, and one that stops early does so, too.
                never_stop(parts)
                step(config.training.steps - 1, micro_batches(config, parts, world, count, tracker))
    images = config.training.batch_size // (world_size * config.training.accumulation)
    on_host = OFFLOADED if config.parallel.cpu_offload else ()
    return Cost(parts, mesh, images, *tracker.peak(on_host), tracker.flops, tracker.traffic)


def _build(config: Config, world: World, dtype: torch.dtype | None) -> Parts:
    """As :func:`trainer.run.assemble.build`, but everything stays on the meta device."""
    recipe = assemble.make_plugin("recipe", "recipe", config.recipe)
    prepare = _Weightless(config, assemble.trained_modules(recipe), world, files=False)
    if prepare.sharding is not None:
        # One pretended device stands for GPU and host; what lives where is told by its kind.
        prepare.sharding = dataclasses.replace(prepare.sharding, param_dtype=dtype, cpu_offload=False)
    prepare.config = _changed(config, "parallel", cpu_offload=False)
    prepare.world = dataclasses.replace(world, device=torch.device("meta"))
    with StepTracker(), torch.device("meta"):  # the tracker answers questions for values
        parts = assemble.build_parts(config, None, prepare)
    parts.averages = prepare.copies
    return parts


class _Weightless(Preparation):
    """Leaves weights without values, those of parts made on the CPU otherwise, too."""

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
) -> Iterator[tuple[Batch, Draws]]:
    """Random images and draws of one rank.

    Args:
        count: of micro-batches. Where it is less than the run's, the first stands for all but the last: gradients
            are there from the second on.
        tracker: is told for how many each stands.
    """
    t = config.training
    size = t.batch_size // (world.size * t.accumulation)
    where = {"device": world.device}
    for index in range(count):
        if tracker is not None:
            tracker.repeats = t.accumulation - count + 1 if index == 0 else 1
        images = torch.rand(size, 3, t.resolution, t.resolution, **where)
        draws = Draws(
            torch.randn(size, *parts.latent, **where), torch.randn(size, *parts.latent, **where),
            torch.rand(size, **where), torch.rand(size, **where), torch.randn(size, parts.extra_dim, **where),
        )  # fmt: skip
        yield Batch(images, torch.zeros(size, dtype=torch.int64, **where)), draws


def _changed(config: Config, table: str, **values: object) -> Config:
    return config.model_copy(update={table: getattr(config, table).model_copy(update=values)})
