"""Fake ranks: run a step of any number of GPUs on a machine without GPUs, memory, communication or values."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from components.nn.group_norm import GroupNorm

LOW = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def pretended_ranks(size: int) -> Iterator[None]:
    """Fake process group of ``size`` ranks in which this process is rank 0; collectives do nothing.

    Raises:
        RuntimeError: a process group exists already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("an estimate creates its own process group: destroy the existing one first")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def cuda_autocast() -> Iterator[None]:
    """Make CPU autocast run norms and interpolation in fp32, as CUDA autocast does.

    This doubles the size of their outputs and saved tensors. CUDA's list of fp32 functions is longer, but the others
    are only applied to small or fp32 tensors here.
    """
    originals = {name: vars(F)[name] for name in ("layer_norm", "group_norm", "interpolate")}
    for name, function in originals.items():
        setattr(F, name, functools.partial(_in_fp32, function))
    fast, GroupNorm.fast = GroupNorm.fast, False  # its path for CPUs is not CUDA's
    try:
        yield
    finally:
        GroupNorm.fast = fast
        for name, function in originals.items():
            setattr(F, name, function)


def _in_fp32(function: Callable[..., Tensor], *args: object, **kwargs: object) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        args = tuple(_fp32(a) for a in args)
        kwargs = {name: _fp32(value) for name, value in kwargs.items()}
    return function(*args, **kwargs)


def _fp32(value: object) -> object:
    return value.float() if isinstance(value, Tensor) and value.dtype in LOW else value


def prime(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Take one optimizer step on zero gradients to create the optimizer's states, and return them. Changes weights."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def held_tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """All parameters and buffers of the modules."""
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
