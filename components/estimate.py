"""Running a step of any number of GPUs on one machine without any: no memory, no communication, no values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LOW = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def pretended_ranks(size: int) -> Iterator[None]:
    """A process group of ``size`` ranks of which this process is the first and only; collectives do nothing.

    Raises:
        RuntimeError: a process group exists already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("an estimate needs a process group of its own: destroy the existing one first")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class CudaAutocast(TorchFunctionMode):
    """Lets the CPU's autocast keep the operations in fp32 that CUDA's keeps: norms, interpolation, powers.

    Memory differs by it: what such an operation returns and keeps for its backward pass is twice as large.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in FP32 and torch.is_autocast_enabled("cpu"):
            args = [_fp32(a) for a in args]
            kwargs = {name: _fp32(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


# Those of the networks at hand; the list of CUDA's autocast is longer.
FP32 = frozenset(
    getattr(place, name)
    for place in (torch, Tensor, F)
    for name in ("layer_norm", "group_norm", "interpolate", "exp", "log", "pow", "square", "rsqrt", "softplus",
                 "cosine_similarity", "normalize", "norm")
    if hasattr(place, name)
)  # fmt: skip


def _fp32(value: object) -> object:
    return value.float() if isinstance(value, Tensor) and value.dtype in LOW else value


def prime(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Makes the optimizer's states, which it else makes in its first step, and returns them. Changes weights."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def held_tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """All parameters and buffers."""
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
