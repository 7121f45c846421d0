"""Training runs whose numbers the tests compare."""

from __future__ import annotations

from unittest import mock

import torch
from torch._dynamo.utils import counters

from components.distributed.activation_checkpoint import backend_within
from components.distributed.parallel import local
from trainer.run.loop import Trainer
from trainer.run.report import Reporter


def finished(trainer: Trainer) -> dict:
    """Train to the end without checkpoints; pictures are drawn only if ``sampling.every`` is set, to save time.

    Returns:
        steps: the metrics of each step.
        seen: step and sums of image and noise for every sample that this rank trained on.
        weights, buffers: by name, unsharded, including the averages.
        held: the fraction of the denoiser's largest parameter on this rank.
        graphs: number of graphs compiled by the end of each step.
    """
    steps, seen, graphs = [], [], []
    observe, step = trainer.watch.observe, trainer.parts.recipe.step

    def observed(record, values, *rest):
        steps.append(dict(values))
        graphs.append(counters["stats"]["unique_graphs"])
        return observe(record, values, *rest)

    def stepped(m, batch, draws, update, k):
        for image, noise in zip(batch.images, draws["noise"]):
            seen.append((k, image.double().sum().item(), noise.double().sum().item()))
        step(m, batch, draws, update, k)

    trainer.watch.observe, trainer.parts.recipe.step = observed, stepped
    trainer.checkpoints.save = lambda step: None
    draw = Reporter.draw if trainer.config.sampling.every else lambda *_: None
    with mock.patch.object(Reporter, "draw", draw):
        trainer.run()
    modules = trainer.parts.modules.named() | {f"ema.{n}": m for n, m in trainer.ema.modules.items()}
    largest = max(trainer.parts.modules.denoiser.parameters(), key=lambda p: p.numel())
    return {
        "steps": steps,
        "seen": seen,
        "weights": {f"{n}.{bare(key)}": whole(p) for n, m in modules.items() for key, p in m.named_parameters()},
        "buffers": {f"{n}.{bare(key)}": b.clone() for n, m in modules.items() for key, b in m.named_buffers()},
        "held": local(largest).numel() / largest.numel(),
        "graphs": graphs,
    }


def compiled_by_aot_eager() -> mock._patch:
    """Context manager that compiles with aot_eager, which traces as inductor does in a fraction of the time."""
    return mock.patch(
        "trainer.run.prepare.backend_within", lambda budget, backend: backend_within(budget, backend="aot_eager")
    )


def bare(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def largest_difference(a: dict, b: dict) -> dict[str, float]:
    """Return the largest relative differences of losses and norms over all steps, of weights, and of buffers."""
    found = {"losses": 0.0, "weights": 0.0, "buffers": 0.0}
    assert len(a["steps"]) == len(b["steps"]) > 0
    for ours, theirs in zip(a["steps"], b["steps"]):
        assert ours.keys() == theirs.keys()
        for name in ours:
            difference = abs(ours[name] - theirs[name]) / max(abs(ours[name]), 1e-3)
            found["losses"] = max(found["losses"], difference)
    for kind in ("weights", "buffers"):
        assert a[kind].keys() == b[kind].keys()
        for name, tensor in a[kind].items():
            if tensor.is_floating_point():
                difference = (tensor - b[kind][name]).abs().max() / tensor.abs().max().clamp_min(1e-3)
                found[kind] = max(found[kind], difference.item())
    return found
