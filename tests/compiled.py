"""A few steps of a config with random weights and images, compiled or not, gradient by gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from components.diffusion.draws import generator
from components.distributed.parallel import World
from trainer.config import Config
from trainer.estimate.dry_run import micro_batches
from trainer.run.assemble import build, make_ema, parameter_groups
from trainer.run.prepare import image_format
from trainer.run.step import Step

ZERO = 2e-5  # of its group's norm: a gradient that is zero in theory, as of a bias ahead of a norm


@dataclass
class Learned:
    """What each step measured, the gradient norm of each parameter in each step, and how far each one moved."""

    values: list[dict[str, float]]
    norms: list[dict[str, float]]
    moved: dict[str, float]


def learn(config: Config, backend: str | None, steps: int = 2) -> Learned:
    """Runs ``steps`` steps on one process.

    Args:
        config: read without its files: frozen parts and images are random, and the same in every call.
        backend: of torch.compile; none: eager.
    """
    config = config.model_copy(update={"training": config.training.model_copy(update={"compile": backend is not None})})
    torch.manual_seed(config.training.seed)  # of the frozen parts
    parts = build(config, World(), files=False, backend=backend or "inductor")
    groups = parameter_groups(config, parts)
    step = Step(
        parts.recipe, parts.modules, groups, ema=make_ema(config, parts), accumulation=1, autocast_dtype=None,
        device=torch.device("cpu"), **image_format(config),
    )  # fmt: skip
    with torch.no_grad():
        for group in groups.values():
            for name, p in zip(group.names, group.parameters):
                # Nothing starts at zero: a modulation of zero would hide whether a block learns.
                p.add_(0.02 * torch.randn(p.shape, generator=generator("not zero", name)))
    before = {name: p.detach().clone() for g in groups.values() for name, p in zip(g.names, g.parameters)}
    found = Learned([], [], {})
    for k in range(steps):
        with torch.random.fork_rng():
            torch.manual_seed(k)
            batches = list(micro_batches(config, parts, World(), 1))
        # The last steps of a run: losses that start late take part.
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
    """Every loss and every parameter's gradient agree, every parameter has a gradient and has moved, in both.

    But for biases: the hinge loss gives the last one of a discriminator that is not sure yet a gradient of zero.
    """
    for k, (a, b) in enumerate(zip(eager.values, compiled.values, strict=True)):
        assert a.keys() == b.keys() and a["skipped_steps"] == b["skipped_steps"] == 0
        for name in a:
            assert abs(a[name] - b[name]) <= rtol * max(abs(a[name]), 1e-3), f"step {k}: {name}: {a[name]} {b[name]}"
    for k, (a, b) in enumerate(zip(eager.norms, compiled.norms, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            whole = eager.values[k][f"grad_norm/{name.split('/')[0]}"]
            # Steps that Adam took on the rounding of the first gradients show in the later ones.
            scale = 1 if k == 0 else 10
            close = abs(a[name] - b[name]) <= scale * (rtol * a[name] + ZERO * whole)
            assert close, f"step {k}: gradient of {name}: {a[name]} eager, {b[name]} compiled, {whole} of its group"
    for learned in (eager, compiled):
        still = [name for name, distance in learned.moved.items() if distance == 0 and not name.endswith("bias")]
        without = [name for name, norm in learned.norms[0].items() if norm == 0 and not name.endswith("bias")]
        assert not still and not without, f"never learn: {still}; without a gradient: {without}"
