"""Time of a step's convolutions, matrix products and attention alone: the floor that a step of these kernels has.

Everything else (norms, activations, casts, optimizers, EMA) can in principle be fused, overlapped or left out; these
operations cannot. Each is timed alone on random data, in the dtype that the step uses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
KINDS = {
    aten.convolution.default: "convolutions, forward",
    aten.convolution_backward.default: "convolutions, backward",
    aten.mm.default: "products",
    aten.addmm.default: "products",
    aten.bmm.default: "products",
    aten.baddbmm.default: "products",
}
FORWARD, BACKWARD = "attention, forward", "attention, backward"


class Shape(tuple):
    """(sizes, strides, dtype) of a tensor."""


class Operations(TorchDispatchMode):
    """Counts the operations that run inside it, by kind, operator and arguments (tensors as :class:`Shape`)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = op.overloadpacket.__name__
        if op in KINDS:
            self.seen[KINDS[op], op, _described(args)] += 1
        elif "dot_product" in name and "attention" in name:
            backward = name.endswith("backward")
            self.seen[BACKWARD if backward else FORWARD, None, _described(args[backward : backward + 3])] += 1
        return op(*args, **(kwargs or {}))


def _described(args: Any) -> tuple:
    described = tree_map(lambda a: Shape((tuple(a.shape), a.stride(), a.dtype)) if isinstance(a, Tensor) else a, args)
    return tuple(tuple(a) if isinstance(a, list) else a for a in described)


def _drawn(args: tuple, device: torch.device) -> list[Any]:
    """Arguments with random tensors of the described shapes; feature maps in channels-last layout."""

    def draw(a: Any) -> Any:
        if not isinstance(a, Shape):
            return list(a) if isinstance(a, tuple) else a
        sizes, strides, dtype = a
        drawn = torch.empty_strided(sizes, strides, dtype=dtype, device=device).normal_()
        return drawn.contiguous(memory_format=torch.channels_last) if len(sizes) == 4 else drawn

    return [draw(a) for a in args]


def _call(op: Any, kind: str, args: list[Any]) -> Callable[[], Any]:
    if op is not None:
        return lambda: op(*args)
    if kind == FORWARD:
        return lambda: F.scaled_dot_product_attention(*args)
    inputs = [a.requires_grad_() for a in args]
    with torch.enable_grad():
        out = F.scaled_dot_product_attention(*inputs)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def _alone(run: Callable[[], Any], clock: Callable[[Callable, int], float]) -> float:
    """Milliseconds per call, over so many calls that launching them hardly counts."""
    clock(run, 2)
    count = min(20, max(1, round(3 / max(clock(run, 1), 1e-3))))
    return min(clock(run, count) for _ in range(2))


def measure(seen: Counter[tuple], device: torch.device, clock: Any) -> dict[str, Any]:
    """Time each operation alone.

    Args:
        seen: from :class:`Operations`.
        device: to run on.
        clock: called as ``clock(run, count)``; returns the mean milliseconds of ``count`` calls back to back.

    Returns:
        "ms": of all, each as often as it ran; "by kind": milliseconds; "most expensive": the first 12 with their
        milliseconds in all, number of calls, and sizes of the tensors.
    """
    rows = []
    for (kind, op, described), count in seen.items():
        ms = _alone(_call(op, kind, _drawn(described, device)), clock)
        sizes = ["x".join(map(str, a[0])) for a in described if isinstance(a, Shape)]
        rows.append((ms * count, count, kind, " ".join(sizes)))
    by_kind: Counter[str] = Counter()
    for ms, _, kind, _ in rows:
        by_kind[kind] += ms
    top = [{"ms": round(ms, 2), "calls": n, "what": f"{kind}: {sizes}"} for ms, n, kind, sizes in sorted(rows)[::-1]]
    return {
        "ms": round(sum(by_kind.values()), 1),
        "by kind": {k: round(v, 1) for k, v in by_kind.items()},
        "most expensive": top[:12],
    }
