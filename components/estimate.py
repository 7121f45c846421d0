"""What a step costs before anything runs: floating-point operations and memory, from the meta device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class StepCost:
    """Of one micro-batch.

    Attributes:
        flops: floating-point operations forward and backward; a multiply-add counts as two.
        activation_bytes: most bytes that autograd held at once for backward passes, parameters left out.
    """

    flops: int
    activation_bytes: int


def step_cost(run: Callable[[], None], parameters: Iterable[Tensor], autocast: bool) -> StepCost:
    """Runs ``run`` (forward and backward on the meta device, in fp32) and counts.

    Args:
        run: one micro-batch of a recipe.
        parameters: tensors that are held anyway, and not counted as activations.
        autocast: the run will use bf16: what is saved outside fp32 islands counts half. Norms, which autocast
            keeps in fp32, are counted too low.
    """
    held = _Held(parameters)
    counter = FlopCounterMode(display=False)
    # On meta tensors the CPU's autocast casts nothing; its flag tells where the fp32 islands are.
    region = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with counter, region, torch.autograd.graph.saved_tensors_hooks(held.pack, lambda saved: saved.tensor):
        run()
    return StepCost(counter.get_total_flops(), held.peak)


def parameter_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for m in modules for t in (*m.parameters(), *m.buffers()))


class _Held:
    """Bytes of the storages that autograd holds; views of one storage count once."""

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        self.references: Counter[int] = Counter()
        self.ignored = {_storage(t) for t in ignored}
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> _Saved:
        return _Saved(self, tensor)


class _Saved:
    """A saved tensor; gives its bytes back when autograd drops it."""

    def __init__(self, held: _Held, tensor: Tensor) -> None:
        self.held, self.tensor, self.key = held, tensor, _storage(tensor)
        if self.key in held.ignored:
            return
        self.nbytes = tensor.untyped_storage().nbytes() // (2 if torch.is_autocast_enabled("cpu") else 1)
        if not held.references[self.key]:
            held.now += self.nbytes
            held.peak = max(held.peak, held.now)
        held.references[self.key] += 1

    def __del__(self) -> None:
        if self.key in self.held.ignored:
            return
        self.held.references[self.key] -= 1
        if not self.held.references[self.key]:
            self.held.now -= self.nbytes


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
