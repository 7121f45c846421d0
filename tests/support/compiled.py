"""Compares eager and compiled training: runs steps with random weights and images and records every gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from components.diffusion.random_numbers import generator
from components.distributed.parallel import World
from trainer.config import Config
from trainer.estimate.dry_run import micro_batches
from trainer.run.assemble import build
from trainer.run.step import make_step

ZERO = 2e-5  # of the group's norm; tolerance for gradients that are zero in theory, such as of a bias before a norm


@dataclass
class Learned:
    """Results of a run.

    Attributes:
        values: metrics of each step.
        norms: gradient norm of each parameter, by step.
        moved: largest absolute change of each parameter over all steps.
    """

    values: list[dict[str, float]]
    norms: list[dict[str, float]]
    moved: dict[str, float]


def learn(config: Config, backend: str | None, steps: int = 2, device: str = "cpu") -> Learned:
    """Run ``steps`` steps in one process, without autocast.

    Args:
        config: config to run; its files are not read. Frozen modules and images are random, but equal in all calls.
        backend: torch.compile backend; None: eager.
        steps: number of steps, the last ones of the run, so that losses with a late start are active.
        device: device to run on.
    """
    config = config.model_copy(update={"training": config.training.model_copy(update={"compile": backend is not None})})
    torch.manual_seed(config.training.seed)  # for the frozen modules
    world = World(device=torch.device(device))
    parts = build(config, world, files=False, backend=backend or "inductor")
    step = make_step(config, parts, world.device, accumulation=1, bf16=False)
    groups = step.groups
    with torch.no_grad():
        for group in groups.values():
            for name, p in zip(group.names, group.parameters):
                # Make all weights nonzero: with zero modulation (adaLN-Zero), blocks would get no gradient.
                p.add_(0.02 * torch.randn(p.shape, generator=generator("not zero", name)).to(device))
    before = {name: p.detach().clone() for g in groups.values() for name, p in zip(g.names, g.parameters)}
    found = Learned([], [], {})
    for k in range(steps):
        with torch.random.fork_rng():
            torch.manual_seed(k)
            batches = list(micro_batches(config, parts, world, 1))
        record = step(config.training.steps - steps + k, batches)
        found.values.append(record.read())
        found.norms.append(
            {
                f"{group}/{n}": v
                for group, (names, norms) in record.layers.items()
                for n, v in zip(names, norms.tolist())
            }
        )
    for group in groups.values():
        for name, p in zip(group.names, group.parameters):
            found.moved[f"{group.name}/{name}"] = (p.detach() - before[name]).abs().max().item()
    return found


def assert_learns_alike(eager: Learned, compiled: Learned, rtol: float = 2e-3) -> None:
    """Assert that losses and gradients agree, and that every parameter has a nonzero gradient and changes in both runs.

    Biases are exempt: the hinge loss has a zero gradient for the last bias of an untrained discriminator.
    """
    for k, (a, b) in enumerate(zip(eager.values, compiled.values, strict=True)):
        assert a.keys() == b.keys() and a["skipped_steps"] == b["skipped_steps"] == 0
        for name in a:
            assert abs(a[name] - b[name]) <= rtol * max(abs(a[name]), 1e-3), f"step {k}: {name}: {a[name]} {b[name]}"
    for k, (a, b) in enumerate(zip(eager.norms, compiled.norms, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            whole = eager.values[k][f"grad_norm/{name.split('/')[0]}"]
            # Adam amplifies rounding differences of the first gradients in later steps.
            scale = 1 if k == 0 else 10
            close = abs(a[name] - b[name]) <= scale * (rtol * a[name] + ZERO * whole)
            assert close, f"step {k}: gradient of {name}: {a[name]} eager, {b[name]} compiled, {whole} of its group"
    for learned in (eager, compiled):
        still = [name for name, distance in learned.moved.items() if distance == 0 and not name.endswith("bias")]
        without = [name for name, norm in learned.norms[0].items() if norm == 0 and not name.endswith("bias")]
        assert not still and not without, f"unchanged: {still}; zero gradient: {without}"
