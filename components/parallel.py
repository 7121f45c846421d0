"""The process's place among the ranks, and what ranks do together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """One process of a run.

    Attributes:
        rank: in [0, size).
        size: number of processes.
        device: where this one computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_world(timeout_s: float = 600.0) -> World:
    """Reads torchrun's environment and joins the process group: NCCL on GPUs, gloo on CPUs.

    Args:
        timeout_s: seconds after which a rank that waits for a lost one gives up.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return World(rank, size, device)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@torch.no_grad()
def average(tensors: Sequence[Tensor], bucket_bytes: int = 64 * 2**20) -> None:
    """Replaces tensors by their means over all ranks, in place; many small ones share one reduction."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for bucket in _buckets(tensors, bucket_bytes):
        flat = torch.cat([t.flatten() for t in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for tensor, mean in zip(bucket, flat.split([t.numel() for t in bucket])):
            tensor.copy_(mean.view_as(tensor))


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is true on at least one rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def barrier() -> None:
    any_rank(False)


def compile_units(module: nn.Module, backend: str = "inductor") -> None:
    """Compiles each part of ``module.units()``, or the module itself; compile time does not grow with depth."""
    for unit in module.units() if hasattr(module, "units") else [module]:
        unit.compile(fullgraph=True, backend=backend)


def _buckets(tensors: Iterable[Tensor], limit: int) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if bucket and (size + nbytes > limit or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += nbytes
    if bucket:
        yield bucket
